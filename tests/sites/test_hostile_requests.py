"""Any bytes get an answer from a site: its own end never falls over what a server, or a thief of its key, sends."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sites.owners import NOISE, experiment, write_pictures, write_site
from sordino.runtime import messages
from sordino.runtime.envelope import MAGIC, Envelope
from sordino.runtime.fleet import LocalFleet, Patience
from sordino.sites.coordinator import coordinate
from sordino.sites.proposal import Proposal
from sordino.sites.settings import load_site
from sordino.sites.site import FAULT, Site

ODD: list[Any] = [None, True, -1, 0, 3, 2**31, 2**70, -(2**70), 0.5, float("nan"), float("inf"), "", "0", "a" * 300]
ODD += ["../x", "\u0000", "\ud800", [], [[]], [[0, -5]], {}, {"a": 1}, [None], "f" * 64, "dp-sgd", "any"]
RUNS = {
    "dp-sgd": {"privacy": NOISE, "rounds": 1},
    "statistics": {"privacy": {"mechanism": "statistics", "epsilon": 8.0}, "rounds": 1},
    "sums": {
        "privacy": {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "noise_by": "shares", "colluders": 1},
        "runtime": {"weighting": "uniform"},
        "rounds": 1,
    },
}


@dataclass(frozen=True, repr=False)
class Asked:
    """A site that took part in some experiments.

    Attributes:
        file: the site's.
        requests: all that it answered, in order.
        states: a copy of its state before each.
    """

    file: Path
    requests: list[bytes] = field(default_factory=list)
    states: list[Path] = field(default_factory=list)

    def site_before(self, place: int) -> Site:
        """The site as it was before a request, in a new process; a round is begun again, with its keys."""
        start = place
        while not _begins(self.requests[start]):
            start -= 1
        state = Path(load_site(self.file).state)
        shutil.rmtree(state)
        shutil.copytree(self.states[start], state)
        site = Site(load_site(self.file))
        for request in self.requests[start:place]:
            site.turn(request)
        return site


def _begins(request: bytes) -> bool:
    envelope = Envelope.decode(request)
    return envelope.kind != "round" or all(map(messages.opens_round, envelope.contents.values()))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    folder = tmp_path_factory.mktemp("hostile")
    write_pictures(folder / "pictures", 1, 4)
    two = {"partition": {"scheme": "iid", "clients": 2}, "clients": [0, 1]}
    tells = {"tells": ["sizes", "class_names", "accuracy"]}
    found = Asked(write_site(folder, "east", None, tells, **two))
    site = Site(load_site(found.file))

    def turn(request: bytes) -> bytes:
        state = folder / f"state {len(found.requests)}"
        if site.state.exists():
            shutil.copytree(site.state, state)
        else:
            state.mkdir()
        found.requests.append(request)
        found.states.append(state)
        answer = site.turn(request)
        assert Envelope.decode(answer).kind != "refusal"
        return answer

    for name, tables in RUNS.items():
        config = experiment(None, **tables)
        coordinate(config, Proposal.of(config), LocalFleet({"east": turn}), folder / name, Patience())
    kinds = {Envelope.decode(request).kind for request in found.requests}
    assert kinds == {"hello", "agreement", "round", "evaluate", "end"}
    return found


def places_of(document: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """All values of a JSON document, by their keys and indices."""
    if not isinstance(document, dict | list):
        return [place]
    inside = document.items() if isinstance(document, dict) else enumerate(document)
    return [place, *(each for key, value in inside for each in places_of(value, (*place, key)))]


def replaced(document: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    changed = dict(document) if isinstance(document, dict) else list(document)
    changed[place[0]] = replaced(document[place[0]], place[1:], value)
    return changed


def with_other_json(draw: Any, content: bytes, start: int, size: int) -> bytes:
    """The same bytes with another value somewhere in the JSON document that follows its own length."""
    at = start + size
    length = int.from_bytes(content[start:at], "little")
    document = json.loads(content[at : at + length])
    head = document.get("__metadata__", {}).get("sordino") if size == 8 and draw(st.booleans()) else None
    inner = document if head is None else json.loads(head)
    changed = replaced(inner, draw(st.sampled_from(places_of(inner))), draw(st.sampled_from(ODD)))
    if head is not None:
        changed = document | {"__metadata__": {"sordino": json.dumps(changed)}}
    text = json.dumps(changed).encode()
    return content[:start] + len(text).to_bytes(size, "little") + text + content[at + length :]


@st.composite
def mutations(draw: Any, request: bytes) -> bytes:
    """A request that was valid, with something else in its bytes, its head, or a message in it."""
    envelope, kind = Envelope.decode(request), draw(st.sampled_from(["bytes", "head", "message", "clients"]))
    if kind == "bytes":
        at, count = draw(st.integers(0, len(request))), draw(st.integers(0, 8))
        return request[:at] + draw(st.binary(max_size=8)) + request[at + count :]
    if kind == "head" or not envelope.contents:
        return with_other_json(draw, request, len(MAGIC), 4)
    contents = dict(envelope.contents)
    if kind == "clients":
        numbers = draw(st.lists(st.sampled_from([0, 1, 2, 7, 2**40, 2**70]), unique=True, max_size=3))
        contents = {number: next(iter(contents.values())) for number in numbers}
    else:
        client = draw(st.sampled_from(sorted(contents)))
        content = contents[client]
        readable = int.from_bytes(content[:8], "little") < len(content)
        contents[client] = with_other_json(draw, content, 0, 8) if readable else content[: len(content) // 2]
    return Envelope(envelope.kind, envelope.experiment, envelope.facts, contents).encode()


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_every_request_gets_an_answer(asked: Asked, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(asked.requests) - 1))
    request = data.draw(mutations(asked.requests[place]))
    site = asked.site_before(place)
    answer = Envelope.decode(site.turn(request))
    assert answer.kind in ("hello", "agreement", "round", "evaluate", "end", "refusal")
    assert FAULT not in answer.facts.get("reason", ""), "it is refused for what it is"


@pytest.mark.parametrize(
    "experiment", ["", "a", "a" * 300, "g" * 64, "F" * 64, "..", "\u0000" * 64, "\ud800" * 64, "é" * 64]
)
@pytest.mark.parametrize("kind", ["hello", "agreement", "round", "evaluate", "end"])
def test_an_experiment_is_named_by_64_hexadecimal_digits(experiment: str, kind: Any, asked: Asked) -> None:
    request = Envelope(kind, experiment, {}, {0: b"x"}).encode()
    answer = Envelope.decode(Site(load_site(asked.file)).turn(request))
    assert answer.kind == "refusal"
    assert "64 hexadecimal digits" in answer.facts["reason"]


@pytest.mark.parametrize("odd", [float("inf"), float("nan"), 0.5, "0", None, True, 2**70, [0]])
@pytest.mark.parametrize("of", ["sites", "sizes"])
def test_an_agreement_of_no_numbers_is_refused(of: str, odd: Any, asked: Asked) -> None:
    place = next(at for at, request in enumerate(asked.requests) if Envelope.decode(request).kind == "agreement")
    valid = Envelope.decode(asked.requests[place])
    value: Any = {"east": [odd, 1]} if of == "sites" else [odd, 3]
    request = Envelope("agreement", valid.experiment, {**valid.facts, of: value}).encode()
    answer = Envelope.decode(asked.site_before(place).turn(request))
    assert answer.kind == "refusal"
    assert "agreement" in answer.facts["reason"]


def test_a_fault_of_the_sites_own_is_an_answer_too(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    def falls(*_: Any) -> Any:
        raise ZeroDivisionError("of /a/private/file")

    monkeypatch.setattr(Site, "hello", falls)
    answer = Envelope.decode(Site(load_site(asked.file)).turn(asked.requests[0]))
    assert answer.kind == "refusal"
    assert answer.facts == {"reason": f"{FAULT} (ZeroDivisionError); its log says more", "site": "east"}
