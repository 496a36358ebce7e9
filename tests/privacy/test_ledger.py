"""The ledger's text is plain JSON of its entries, and entering releases one by one is entering them together."""

from __future__ import annotations

import json
import math
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


RELEASE = Release("sums", "client 0", "example", (1.0, 2.0), 0.5, 3, "client", ("server", "public"))
WHOLE = Ledger(
    (RELEASE,), (Disclosure("prompts", "prompt"),), ("server",), ("it is so",), 1e-5, data={"client 0": "ab"}
)

DAMAGES: dict[str, object] = {
    **{"releases": {}, "disclosures": None, "trusted": "server", "assumptions": {}, "delta": "1e-5", "data": []},
    **{"randomness": "dice", "run": 7, "whole_persons": 1},
    **{"releases.0.steps": -3, "releases.0.sampling_rate": 2, "releases.0.observers": [], "releases.0.party": ["me"]},
    **{"releases.0.noise_multipliers": [], "releases.0.noise_multipliers.0": math.nan, "releases.0.unit": "galaxy"},
    **{"releases.0.noise_by": None, "releases.0.name": [], "releases.0.content": 5, "releases.0.more": 1},
    **{"disclosures.0.channel": "pigeon", "disclosures.0.content": None, "trusted.0": "me", "data.client 0": 5},
}


@pytest.mark.parametrize("key", [*DAMAGES, "releases.0"])
def test_a_damaged_value_is_named_with_its_file_and_key(key: str) -> None:
    """And never read as an empty ledger, or as one of less."""
    content = json.loads(WHOLE.to_json())
    assert Ledger.from_json(json.dumps(content)) == WHOLE
    *way, last = (int(part) if part.isdigit() else part for part in key.split("."))
    place = content
    for part in way:
        place = place[part]
    place[last] = DAMAGES.get(key, 5)
    with pytest.raises(RunError) as told:
        Ledger.from_json(json.dumps(content), "runs/a/ledger.json")
    assert str(told.value).startswith("runs/a/ledger.json: not a ledger of this version of Sordino: ")
    assert f" {key} = {DAMAGES.get(key, 5)!r}: " in str(told.value)
    assert str(told.value).endswith("put it back as it was, or run the experiment again")


@pytest.mark.parametrize("value", [0, 1.0, True, "3", math.inf, 10**30])
def test_steps_are_a_whole_number_from_one(value: object) -> None:
    content = json.loads(WHOLE.to_json())
    content["releases"][0]["steps"] = value
    with pytest.raises(RunError, match=r"releases\.0\.steps"):
        Ledger.from_json(json.dumps(content))


@pytest.mark.parametrize("key", sorted(json.loads(WHOLE.to_json()).keys() - {"private", "simulated", "parts"}))
def test_no_part_may_be_missing(key: str) -> None:
    content = json.loads(WHOLE.to_json())
    del content[key]
    if key == "whole_persons":  # of earlier versions, which knew no persons
        assert Ledger.from_json(json.dumps(content)) == WHOLE
        return
    with pytest.raises(RunError, match=key):
        Ledger.from_json(json.dumps(content))


@pytest.mark.parametrize("text", ["[]", "5", "{}", "null", "[" * 100_000, b"\xff"])
def test_what_is_no_ledger_at_all_is_refused(text: str | bytes) -> None:
    with pytest.raises(RunError, match="not a ledger of this version"):
        Ledger.from_json(text)


def test_a_ledger_is_held_against_the_summary_that_names_it(tmp_path: Path) -> None:
    """As by the report, the statement and `publish`; an unfinished run has no summary yet."""
    (tmp_path / "ledger.json").write_text(WHOLE.to_json())
    assert read_ledgers([tmp_path]) == WHOLE
    (tmp_path / "summary.json").write_text(json.dumps({"privacy": {"ledger_digest": WHOLE.digest()}}))
    assert read_ledgers([tmp_path]) == WHOLE
    (tmp_path / "ledger.json").write_text(WHOLE.to_json().replace('"steps": 3', '"steps": 1'))
    with pytest.raises(RunError, match=r"not the one that summary\.json was written with"):
        read_ledgers([tmp_path])
    for damaged in ("{", "[]", '{"privacy": 5}'):
        (tmp_path / "summary.json").write_text(damaged)
        with pytest.raises(RunError, match=r"summary\.json is damaged"):
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
