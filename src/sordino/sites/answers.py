"""What sites answer beside the rounds: to the questions for their accuracy, and to the last broadcast."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sordino.runtime.envelope import Envelope
from sordino.runtime.fleet import Answer, Lost
from sordino.runtime.messages import MessageError

AT_ONCE = 10_000  # clients whose broadcasts after the last round are held at once


def groups(sites: Mapping[str, Sequence[int]]) -> Iterator[dict[str, Sequence[int]]]:
    """Yield groups of sites that together have not many more than `AT_ONCE` clients."""
    group: dict[str, Sequence[int]] = {}
    for site, clients in sites.items():
        group[site] = clients
        if sum(map(len, group.values())) >= AT_ONCE:
            yield group
            group = {}
    if group:
        yield group


def read_answer(event: Answer | Lost, kind: str, experiment: str) -> Envelope:
    """Return a site's answer of a kind; a refusal where it has none."""
    try:
        if isinstance(event, Lost):
            raise MessageError(event.reason)
        answer = Envelope.decode(event.content)
        if answer.kind not in (kind, "refusal"):
            raise MessageError(f"it answered with a {answer.kind}")
    except MessageError as error:
        return Envelope("refusal", experiment, {"reason": str(error)})
    return answer


def accuracy_of(answer: Envelope, clients: Sequence[int]) -> dict[str, float | None]:
    """Return the accuracies that a site tells of its own clients.

    Raises:
        MessageError: it refused, or tells something else.
    """
    if answer.kind == "refusal":
        raise MessageError(str(answer.facts.get("reason", "it refused")))
    told = answer.facts.get("accuracy", {})
    if not isinstance(told, dict) or set(told) - set(map(str, clients)):
        raise MessageError("it tells accuracies of clients that are not its own")
    if any(not (value is None or (isinstance(value, float | int) and 0 <= value <= 1)) for value in told.values()):
        raise MessageError("it tells accuracies that are none")
    return {f"client {client}": value for client, value in told.items()}
