"""A site's ledger counts each client once in every round that may have left, whoever is asked, and however often."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sites.owners import NOISE, experiment, write_pictures, write_site
from sordino.privacy.ledger import ALL_CLIENTS, OBSERVERS, Ledger, Release
from sordino.runtime import messages, turns
from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import LocalFleet, Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.ledger import Entry, SiteLedger
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import Site


def releases_of(clients: set[int], multiplier: float = 1.0) -> list[Release]:
    """Two releases of each client in a round, and one of all clients."""
    parties = [*(f"client {client}" for client in sorted(clients) for _ in range(2)), ALL_CLIENTS]
    return [Release("a sum", party, "example", (multiplier,), 0.5, 3, "client", OBSERVERS) for party in parties]


def steps_of(entry: Entry) -> dict[str, int]:
    return {release.party: release.steps for release in entry.ledger.releases}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sets(st.integers(1, 4), min_size=1), st.sets(st.integers(0, 3), min_size=1)), min_size=1))
def test_each_client_is_entered_once_in_each_round_that_asked_it(asked: list[tuple[set[int], set[int]]]) -> None:
    entry, counted, rounds = Entry(Ledger()), dict[str, set[int]](), set[int]()
    for numbers, clients in asked:
        entry = Entry.from_json(entry.with_rounds(numbers, releases_of(clients)).to_json().encode())
        rounds |= numbers
        for party in (*(f"client {client}" for client in clients), ALL_CLIENTS):
            counted[party] = counted.get(party, set()) | numbers
    assert entry.rounds == tuple(sorted(rounds))
    each = {party: 3 if party == ALL_CLIENTS else 6 for party in counted}
    assert steps_of(entry) == {party: each[party] * len(numbers) for party, numbers in counted.items()}


def test_a_round_with_less_noise_than_was_entered_is_entered_too() -> None:
    """It is another release, of which the first entry says too little."""
    entry = Entry(Ledger()).with_rounds([1], releases_of({0})).with_rounds([1], releases_of({0}, 0.5))
    assert sorted(release.noise_multipliers for release in entry.ledger.releases if release.party == "client 0") == [
        (0.5,),
        (1.0,),
    ]


def test_a_file_of_an_earlier_version_is_read_and_never_counts_too_little() -> None:
    entry = Entry(Ledger()).with_rounds([1, 2], releases_of({0, 1})).with_rounds([3], releases_of({0}))
    document = json.loads(entry.to_json())
    del document["entered"]
    old = Entry.from_json(json.dumps(document).encode())
    assert (old.ledger, old.rounds) == (entry.ledger, entry.rounds)
    again = old.with_rounds([1, 2, 3], releases_of({0}))
    assert steps_of(again) == steps_of(old), "it is in all rounds, so in these"
    assert Entry.from_json(again.to_json().encode()).with_rounds([3], releases_of({0})) == again
    assert steps_of(old.with_rounds([3], releases_of({1})))["client 1"] == 18, "it was asked in two rounds"
    assert steps_of(old.with_rounds([2], releases_of({1})))["client 1"] == 18, "nobody knows in which"


@pytest.mark.parametrize("fault", ["full disk", "kill"])
def test_a_site_whose_answer_was_not_kept_counts_whom_the_next_question_asks(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One client is asked, and the answer is not kept; then both are asked, and it is. Both spent that round."""
    write_pictures(tmp_path / "east" / "pictures", 1, 8)
    two = {"partition": {"scheme": "iid", "clients": 2}, "clients": [0, 1]}
    file = write_site(tmp_path / "east", "east", None, **two)
    config = experiment(None, privacy=NOISE)
    fingerprint = Proposal.of(config).fingerprint
    sites, asked = [Site(load_site(file))], set[int]()

    def fails(*_: Any, **__: Any) -> None:
        raise turns.RunError("disk full") if fault == "full disk" else KeyboardInterrupt

    def turn(request: bytes) -> bytes:
        envelope = Envelope.decode(request)
        if envelope.kind == "round":
            number = messages.round_header(next(iter(envelope.contents.values()))).round
            one = {number - 1: envelope.contents[number - 1]} if number in (1, 2) else {}
            if one and number not in asked:
                asked.add(number)
                of_one = Envelope("round", envelope.experiment, envelope.facts, one).encode()
                with monkeypatch.context() as patched:
                    patched.setattr(turns, "write_private", fails)
                    if fault == "full disk":
                        assert Envelope.decode(sites[-1].turn(of_one)).kind == "refusal"
                    else:
                        with pytest.raises(KeyboardInterrupt):
                            sites[-1].turn(of_one)
                        sites.append(Site(load_site(file)))
        return sites[-1].turn(request)

    coordinate(config, Proposal.of(config), LocalFleet({"east": turn}), tmp_path / "out", Patience())
    assert asked == {1, 2}
    entry = SiteLedger(sites[-1].state / "ledger").experiments[fingerprint]
    assert entry == sites[-1].ledger.experiments[fingerprint]
    assert entry.rounds == (1, 2, 3)
    assert steps_of(entry) == {"client 0": 3, "client 1": 3}
