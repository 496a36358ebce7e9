"""Plain words for ledgers that few runs leave: persons and clients as the unit, and noise of several kinds."""

from __future__ import annotations

import dp_accounting
import pytest

from sordino.experiments.privacy import words
from sordino.privacy.ledger import OBSERVERS, Disclosure, Ledger, Release, Unit
from sordino.privacy.meaning import percent_up, right_at_most
from sordino.results import rounded_up


def ledger(unit: Unit, noise: float = 2.0, whole_persons: bool = True, **changes: object) -> Ledger:
    release = Release("a sum", "client 0", unit, (noise,), 1.0, 1, "client", OBSERVERS)
    return Ledger((release,), delta=1e-3, run="ab", whole_persons=whole_persons, **changes)  # type: ignore[arg-type]


def bounds(of: Ledger, unit: Unit) -> dict[str, float | None]:
    return {entry["unit"]: entry["epsilon"] for entry in words.unit_data(of, unit) if entry["number"] == 1}


def test_a_person_is_covered_and_a_picture_by_another_rule() -> None:
    """One picture more or less moves a clipped person twice as far: half the noise multiplier."""
    found = bounds(ledger("person"), "person")
    assert found["person"] == pytest.approx(dp_accounting.get_epsilon_gaussian(2.0, 1e-3), abs=1e-9)
    assert found["example"] == pytest.approx(dp_accounting.get_epsilon_gaussian(1.0, 1e-3), abs=1e-9)
    assert found["client"] is None
    section = words.units_section(words.unit_data(ledger("person"), "person"), ledger("person"), "person", False)
    assert section is not None
    assert "with all their pictures, however many" in section["blocks"][0]["text"]


@pytest.mark.parametrize("whole", [True, False])
def test_a_client_covers_its_persons_if_they_are_whole(whole: bool) -> None:
    of = ledger("client", whole_persons=whole)
    found = bounds(of, "client")
    assert (found["person"] is None) == (not whole)
    section = words.units_section(words.unit_data(of, "client"), of, "client", False)
    assert section is not None
    assert ("Whose pictures are whose is not known" in section["blocks"][0]["text"]) == (not whole)
    rows = section["blocks"][1]["table"]["rows"]
    assert rows[-1][1] == rounded_up(found["client"])
    assert rows[-1][2] == percent_up(right_at_most(found["client"], 1e-3))


def test_no_noise_is_no_privacy_whatever_else_was_done() -> None:
    of = ledger("example", noise=0.0)
    assert words.verdict(of, "example") == "not private"
    assert words.banner(of, "example") == words.BARE_BANNER
    assert words.meaning(of, "example", 10, False) is None
    assert words.units_section(words.unit_data(of, "example"), of, "example", False) is None
    (row,) = words.who_learns_what(words.observer_data(of, "example"), "example", False)["blocks"][0]["table"]["rows"]
    assert row[2:] == ["unbounded", "no bound"]


def test_a_simulation_with_a_leak_has_no_epsilon_that_it_would_have_had() -> None:
    of = ledger("example", randomness="simulation", disclosures=(Disclosure("a prompt", "prompt"),))
    assert words.banner(of, "example") == words.SIMULATED_BANNER
    assert "no epsilon would hold either" in words.lead(of, "example")[0]


def test_pictures_that_are_handed_over_are_called_that() -> None:
    of = Ledger(disclosures=(Disclosure("every client's images", "images"), Disclosure("the prompt", "prompt")))
    server, clients, public = words.observer_data(of, "example")
    assert server["in_short"] == "The pictures themselves:"
    assert clients["in_short"].startswith("Numbers that were computed from the pictures")
    assert public["in_short"] == clients["in_short"]


def test_what_is_assumed_trusted_or_bare_is_listed() -> None:
    of = ledger(
        "example", trusted=("server",), assumptions=("sizes are known",), disclosures=(Disclosure("x", "upload"),)
    )
    listed = " ".join(words.left_open(of))
    assert "Taken as given: sizes are known." in listed
    assert "Leaves without noise: x. Seen by: the server." in listed
    assert "The server is trusted" in listed
    assert words.verdict(of, "example") == "private"  # against all others
    assert "against the other clients and whoever is given a prompt" in words.lead(of, "example")[0]
