"""A site's end of the rounds: every request is answered once, and the answer is kept.

A server that died asks again for a round that its sites have already been through. A second answer would be a second
draw of noise, which nobody counted. So state, answer and the round's requests are written together before the answer
leaves. The same request gets the same bytes again; another one for that round is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

from sordino.errors import RunError
from sordino.files import write_private
from sordino.privacy.ledger import ALL_CLIENTS, Release
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.randomness import KeyedRandomness, Randomness, system_bytes
from sordino.runtime import messages
from sordino.runtime.checkpoint import clients_of, tensors_of
from sordino.runtime.client import ClientEnd, ClientReleaseRound, ClientRound
from sordino.runtime.envelope import Envelope, digest
from sordino.runtime.messages import MessageError
from sordino.runtime.release import RELEASE_ROUND
from sordino.secure import Refusal

FILE = "turn.safetensors"
KEY_BYTES = 32
NO_ROUND = -1

# Enters what a round releases in the site's ledger, before it leaves: (round, releases). What is entered stays where
# the answer is then not kept, and is entered once when the round is asked for again.
Charge = Callable[[int, Sequence[Release]], None]


@dataclass
class Journal:
    """The last round that a site took part in.

    Attributes:
        round: its number; NO_ROUND before any, RELEASE_ROUND for the release of statistics.
        key: of its noise; empty once its answer is on the disk, but for a release of several stages.
        requests: as they came, in order; empty where the key is.
        answers: by the request's digest.
    """

    round: int = NO_ROUND
    key: bytes = b""
    requests: list[bytes] = field(default_factory=list)
    answers: dict[str, bytes] = field(default_factory=dict)


class Turns:
    """The rounds of a site's clients, in one experiment.

    Args:
        make_end: makes the clients' end with a source of randomness.
        experiment: its fingerprint.
        folder: keeps state and answers; a new one for a new experiment.
        charge: enters what a round releases.
        randomness: replaces the keyed noise, in tests that compare with a simulation.

    Raises:
        RunError: what the folder holds is damaged, or of another experiment.
    """

    def __init__(
        self,
        make_end: Callable[[Callable[[int, Sequence[int]], Randomness]], ClientEnd],
        experiment: str,
        folder: Path,
        charge: Charge,
        randomness: Callable[[int, Sequence[int]], Randomness] | None = None,
    ) -> None:
        self.experiment, self.folder, self._charge = experiment, folder, charge
        self._journal = Journal()
        self.end = make_end(randomness or self._noise)
        self.training = self.end.start()
        self._open: ClientRound | ClientReleaseRound | None = None
        if (folder / FILE).exists():
            self._load()

    @property
    def round(self) -> int:
        """Return the last round that was answered; 0 before the first."""
        return max(self._journal.round, 0)

    def turn(self, request: bytes) -> bytes:
        """Return the answer to a request of the server's; the stored one, if it was answered before.

        Raises:
            MessageError: the request is not what was agreed, or asks for a round again in other words.
            RunError: the answer could not be written; it did not leave. It may be charged already, and is charged once
                for each client, whichever of them the next request for this round asks.
        """
        name = digest(request)
        if name in self._journal.answers:
            return self._journal.answers[name]
        envelope = Envelope.decode(request)
        if envelope.experiment != self.experiment:
            raise MessageError(f"it is of experiment {envelope.experiment[:12]}, and this is {self.experiment[:12]}")
        if not envelope.contents:
            raise MessageError("it asks no client")
        before = self._journal, self.training, self._open
        try:
            return self._answered(request, envelope)
        except BaseException:  # nothing left, so the site is where it was
            self._journal, self.training, self._open = before
            if isinstance(self._open, ClientReleaseRound):
                self._replay()
            raise

    def _noise(self, number: int, clients: Sequence[int]) -> Randomness:
        return KeyedRandomness(self._journal.key, clients, self.end.federation.device)

    def _begin(self, contents: Mapping[int, bytes]) -> None:
        """Open the round that a request asks for.

        Raises:
            MessageError: it asks for a round that was answered.
        """
        numbers = {messages.round_header(content).round for content in contents.values()}
        number = min(numbers)
        if number == RELEASE_ROUND == self._journal.round and isinstance(self._open, ClientReleaseRound):
            return  # the release has several stages
        if len(numbers) > 1 or number <= self._journal.round:
            answered = f"round {self._journal.round} was answered here"
            raise MessageError(f"{answered}, and another request for round {number} is not; go on with the next round")
        self._journal = Journal(number, system_bytes(KEY_BYTES))
        self._open = self._fresh()

    def _fresh(self) -> ClientRound | ClientReleaseRound:
        """Return the next round, or the release if it comes first."""
        if self.end.federation.mechanism.releases_statistics and not (self.training.release or self.training.round):
            return ClientReleaseRound(self.end, self.training)
        return self.end.round(self.training)

    def _answered(self, request: bytes, envelope: Envelope) -> bytes:
        """Return a new answer, once it is on the disk."""
        opens = all(messages.opens_round(content) for content in envelope.contents.values())
        if opens:
            self._begin(envelope.contents)
        if self._open is None:
            everyone = dict.fromkeys(envelope.contents, "this site was restarted in the middle of the round")
            return Envelope("round", self.experiment, refused=everyone).encode()
        replies = dict(self._open.handle(envelope.contents))
        self.training = self._open.training
        answers = {client: reply for client, reply in replies.items() if isinstance(reply, bytes)}
        refused = {client: reply.reason for client, reply in replies.items() if isinstance(reply, Refusal)}
        answer = Envelope("round", self.experiment, {}, answers, refused).encode()
        journal = self._journal
        kept = replace(journal, answers=journal.answers | {digest(request): answer})
        if opens:  # messages of a protocol on shares die with the process that holds its keys
            kept = replace(kept, requests=[*journal.requests, request])
            self._charge(journal.round, self._releases(envelope.contents))
            self._write(kept)
        self._journal = kept
        return answer

    def _releases(self, contents: Mapping[int, bytes]) -> list[Release]:
        """Return what a round releases of the clients who were asked, as it was planned."""
        mechanism, clients = self.end.federation.mechanism, sorted(contents)
        if self._journal.round != RELEASE_ROUND:
            return mechanism.round_releases(clients)
        assert isinstance(mechanism, StatisticsMechanism)
        parties = {ALL_CLIENTS, *(f"client {client}" for client in clients)}
        return [release for release in mechanism.released(self.experiment) if release.party in parties]

    def _write(self, journal: Journal) -> None:
        """Write state and answers, all or nothing; of a release that has not ended also requests and key.

        Who has the key can draw the noise again, and take it off the answer. So no other round's is written.
        """
        tensors = tensors_of(self.training)
        goes_on = isinstance(self._open, ClientReleaseRound) and not self.training.release
        requests, key = (journal.requests, journal.key) if goes_on else ([], b"")
        contents = [*requests, *journal.answers.values()]
        for number, content in enumerate(contents):
            tensors[f"journal.{number:04d}"] = torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())
        head = {
            "experiment": self.experiment,
            "trained": self.training.round,
            "number": journal.round,
            "key": key.hex(),
            "answers": list(journal.answers),
        }
        write_private(self.folder / FILE, messages.with_head(tensors, head))

    def _load(self) -> None:
        try:
            content = (self.folder / FILE).read_bytes()
            tensors = safetensors.torch.load(content)
            head = messages.head_of(content)
            if head["experiment"] != self.experiment:
                raise ValueError(f"it is of experiment {head['experiment']}")
            parts = [tensors[name].numpy().tobytes() for name in sorted(tensors) if name.startswith("journal.")]
            count = len(parts) - len(head["answers"])
            answers = dict(zip(head["answers"], parts[count:], strict=True))
            self._journal = Journal(int(head["number"]), bytes.fromhex(head["key"]), parts[:count], answers)
            self.training = clients_of(self.end.start(), tensors, int(head["trained"]))
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise RunError(f"{self.folder / FILE} is damaged ({error}); put a backup back, or start anew") from None
        if self._journal.round == RELEASE_ROUND and not self.training.release:
            self._replay()

    def _replay(self) -> None:
        """Bring a release that was interrupted back to where it was; its noise is drawn from the key again.

        Its secure sums are not: their keys died.
        """
        self._open = self._fresh()
        for request in self._journal.requests:
            self._open.handle(Envelope.decode(request).contents)
        if isinstance(self._open, ClientReleaseRound):
            self._open.leave_sums()
