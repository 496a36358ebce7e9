"""The ledger's text is plain JSON of its entries, and entering releases one by one is entering them together."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sordino.errors import RunError
from sordino.privacy.accounting import spent
from sordino.privacy.ledger import Disclosure, Ledger, Observer, Release
from sordino.privacy.statement import read_ledgers, statement

# Among them what the text itself is made of.
WORDS = st.one_of(
    st.text(max_size=6), st.sampled_from(['"party": ""', '"releases": []', '"data": {}', "client 3", "\\"])
)
RELEASES = st.builds(
    Release,
    content=WORDS,
    party=WORDS,
    unit=st.just("example"),
    noise_multipliers=st.lists(st.sampled_from([0.5, 2.0]), min_size=1, max_size=2).map(tuple),
    sampling_rate=st.sampled_from([0.25, 1.0]),
    steps=st.integers(1, 3),
    noise_by=st.just("client"),
    observers=st.sampled_from([("server",), ("server", "clients", "public")]),
    name=st.sampled_from(["", "one"]),
)
LEDGERS = st.builds(
    Ledger,
    releases=st.lists(RELEASES, max_size=5).map(tuple),
    disclosures=st.lists(st.builds(Disclosure, WORDS, st.just("upload")), max_size=2).map(tuple),
    assumptions=st.lists(WORDS, max_size=2).map(tuple),
    delta=st.sampled_from([None, 1e-5]),
    run=WORDS,
    data=st.dictionaries(WORDS, WORDS, max_size=3),
)


@given(LEDGERS)
def test_the_text_is_plain_json_of_the_entries(ledger: Ledger) -> None:
    content = asdict(ledger)
    for entry, disclosure in zip(content["disclosures"], ledger.disclosures, strict=True):
        entry["observers"] = disclosure.observers
    content["parts"] = []
    expected = {"private": ledger.private, "simulated": ledger.simulated, **content}
    assert ledger.to_json() == json.dumps(expected, indent=2) + "\n"
    assert Ledger.from_json(ledger.to_json()) == ledger


def test_a_damaged_ledger_is_named(tmp_path: Path) -> None:
    """Several are read at once, so the message says which one it is."""
    (tmp_path / "ledger.json").write_text('{"releases": [')
    with pytest.raises(RunError, match=f"^{re.escape(str(tmp_path / 'ledger.json'))}: not a ledger of this version"):
        read_ledgers([tmp_path])


@given(st.lists(RELEASES, max_size=8))
def test_one_by_one_is_together(releases: list[Release]) -> None:
    together, one_by_one, again = Ledger().add(releases), Ledger(), Ledger()
    for release in releases:
        one_by_one = one_by_one.add([release])
        again = Ledger.from_json(again.add([release]).to_json())
    assert one_by_one == together == again
    kinds = [replace(release, steps=0) for release in together.releases]
    assert len(set(kinds)) == len(kinds)
    for kind, entry in zip(kinds, together.releases, strict=True):
        steps = [release.steps for release in releases if replace(release, steps=0) == kind]
        assert entry.steps == (steps[0] if kind.name else sum(steps))


@given(LEDGERS, RELEASES)
def test_entering_changes_no_earlier_ledger(ledger: Ledger, release: Release) -> None:
    before = ledger.to_json()
    ledger.add([release]).add([release])
    assert ledger.to_json() == before
    assert ledger.add([release]) == ledger.add([release])


@given(st.lists(RELEASES, max_size=5), RELEASES)
def test_no_step_is_lost_where_a_kind_is_listed_twice(releases: list[Release], release: Release) -> None:
    """Such a ledger is none of Sordino's, and may be read from a file."""
    release = replace(release, name="")
    twice = Ledger(releases=(*releases, release, release))
    before = sum(entry.steps for entry in twice.releases)
    assert sum(entry.steps for entry in twice.add([release]).releases) == before + release.steps


@given(st.floats(0.3, 200), st.floats(1e-12, 0.4))
def test_no_number_of_a_statement_is_smaller_than_the_ledgers(multiplier: float, delta: float) -> None:
    """Rounded to the nearest, a delta of 0.0145 would be told as 0.014, at which epsilon is larger."""
    seen: tuple[Observer, ...] = ("server", "clients", "public")
    release = Release("sums", "client 0", "example", (multiplier,), 1.0, 1, "client", seen)
    ledger = Ledger((release,), delta=delta)
    said = re.findall(r"epsilon = (\S+) at delta = (\S+) for each example", statement(ledger, "example"))
    ((epsilon, told),) = said
    exact = spent(ledger, "server", "example").epsilon
    assert exact <= float(epsilon) <= exact * 1.001 + 1e-12
    assert delta <= float(told) <= delta * 1.1  # of which two digits are told
