"""The coordinator of an experiment over a fleet: the meeting, the rounds, and a run directory that can go on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import tomli_w
from torch import Tensor

from sordino.encoders import choose_device, load_encoder
from sordino.errors import RunError
from sordino.experiments.config import Experiment
from sordino.experiments.run_folder import Metrics
from sordino.experiments.run_lock import held
from sordino.experiments.tracking import require_tracker, tracked
from sordino.experiments.unread_keys import warn_of_unread
from sordino.files import FREE_SPACE, write_atomically
from sordino.privacy.ledger import Ledger
from sordino.privacy.statement import as_summary
from sordino.progress import log
from sordino.runtime import checkpoint
from sordino.runtime.agreement import Agreement
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import participants, warn_of_unused
from sordino.runtime.fleet import Ask, Fleet, Patience, ServerRuntime
from sordino.runtime.messages import MessageError
from sordino.runtime.server import ServerEnd, ServerRecord, ServerTraining
from sordino.runtime.uploads import RoundError
from sordino.runtime.waiting import Stalled, drive
from sordino.sites.answers import BusyAskedAgain, accuracy_of, answer_of, groups
from sordino.sites.latecomers import Latecomers
from sordino.sites.meeting import Begun, Meeting, Met
from sordino.sites.membership import ANSWERED
from sordino.sites.page import State, epsilon_by_site, write_page
from sordino.sites.policy import ACCURACY
from sordino.sites.proposal import Proposal

PROPOSAL, AGREEMENT, METRICS = "proposal.json", "agreement.json", "metrics.jsonl"
LEDGER, OUTCOME = "ledger.json", "sites.json"
NOISED = "noised"  # folder: sums of class statistics with the server's noise
WRITING = 10  # the page may take one part in so many of the time


@dataclass(frozen=True)
class Outcome:
    """The outcome of an experiment, for its coordinator.

    Attributes:
        training: the server's last state.
        met: who took part.
        accuracy: "client k" to its accuracy on its own test pictures, of sites that tell it.
    """

    training: ServerTraining
    met: Met
    accuracy: Mapping[str, float | None]


def coordinate(
    config: Experiment,
    proposal: Proposal,
    fleet: Fleet,
    out: Path,
    patience: Patience,
    watch: Callable[[dict[str, Any]], None] = lambda line: None,
) -> Outcome:
    """Run an experiment over a fleet; where `out` has its beginning, go on from its last round.

    Args:
        config: of the experiment, with the coordinator's encoder and device.
        proposal: of it.
        fleet: the sites.
        out: the coordinator's run directory.
        patience: how long to wait, and for how many.
        watch: is given a round's line, and now and then `epsilon` by site with it (None: unbounded).

    Raises:
        SordinoError: too few sites take part, the folder is another experiment's, training diverged, or rounds were
            void or could not be asked: several in a row, from which a new call goes on, or all.
    """
    require_tracker(config.tracking)
    fleet = BusyAskedAgain(fleet)
    with held(out, instead=False):
        before = _begun(config, out, proposal)
        own = config.encoder
        encoder = load_encoder(own.name, own.checkpoint, own.dtype, choose_device(config.device), own.generative)
        meeting = Meeting(config, proposal, encoder, fleet, patience)
        try:
            met = meeting.meet(before)
        except RunError:
            if before is None or any((out / name).exists() for name in (LEDGER, NOISED)):
                raise
            # Nobody was asked for a round of what was agreed, or nobody's answer was kept: whoever is there now agrees.
            before, met = None, meeting.meet()
        if before is None:
            write_atomically(out / "config.toml", tomli_w.dumps(dict(proposal.tables)).encode(), FREE_SPACE)
            write_atomically(out / PROPOSAL, json.dumps(proposal.facts, indent=1).encode(), FREE_SPACE)
            write_atomically(out / AGREEMENT, json.dumps(met.agreement.facts, indent=1).encode(), FREE_SPACE)
        for site, reason in sorted(met.left_out.items()):
            so_far = " so far, and is asked again between rounds" if site in met.silent else ""
            log.warning("%s takes no part%s: %s", site, so_far, reason)
        warn_of_unread(config)
        warn_of_unused(met.federation.algorithm, met.federation.settings, met.federation.mechanism)
        late, answered = Latecomers(meeting, met), before.answered if before else {}
        return _Rounds(config, proposal, fleet, out, patience, watch, late, answered).run()


def _begun(config: Experiment, out: Path, proposal: Proposal) -> Begun | None:
    """Return what is known of the experiment in `out`; None if it is new.

    Raises:
        RunError: it is another experiment.
    """
    if not (out / PROPOSAL).exists() or not (out / AGREEMENT).exists():
        return None
    there = Proposal.read(json.loads((out / PROPOSAL).read_bytes()))
    if there.fingerprint != proposal.fingerprint:
        raise RunError(f"{out} holds another experiment, {there.fingerprint[:12]}; choose another --out")
    agreement = Agreement.read(json.loads((out / AGREEMENT).read_bytes()))
    data = Ledger.from_json((out / LEDGER).read_text(encoding="utf-8")).data if (out / LEDGER).exists() else {}
    return Begun(agreement, data, _answered(config, agreement, _lines(out)))


def _lines(out: Path) -> list[dict[str, Any]]:
    """Return the lines of the rounds so far; one that was cut off as its writer died is none."""
    if not (out / METRICS).exists():
        return []
    lines = (out / METRICS).read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _answered(config: Experiment, agreement: Agreement, lines: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return the last round that each site is known to have answered.

    Who is asked in a round follows from the seed. Where clients are sampled it does not, so of those rounds only such
    count in which everybody was asked. A site draws no noise there.
    """
    count, participation = len(agreement.sizes), config.runtime.participation
    sampled = config.privacy.samples_clients(participation)
    answered: dict[str, int] = {}
    for line in lines:
        number, lost, lost_clients = line["round"], line.get("lost", {}), line.get("lost_clients", {})
        if not number or (sampled and line.get("participants", 0) + len(lost_clients) < count):
            continue
        asked = range(count) if sampled else participants(config.seed, number, count, participation).tolist()
        came = {client for client in asked if str(client) not in lost_clients}
        for site, clients in agreement.sites.items():
            if site not in lost and came.intersection(clients) and came.issuperset({*clients}.intersection(asked)):
                answered[site] = number
    return answered


@dataclass
class _Rounds:
    config: Experiment
    proposal: Proposal
    fleet: Fleet
    out: Path
    patience: Patience
    watch: Callable[[dict[str, Any]], None]
    late: Latecomers
    answered: Mapping[str, int]  # what was known of each site when this process began
    _began: float = 0.0
    _written: tuple[float, float] = (0.0, 0.0)  # when the page was written, and how long that took
    _awaited: tuple[int, tuple[str, ...]] = (0, ())  # a round, and the sites it was last said to wait for
    _server: ServerRuntime | None = None
    _accuracy: dict[str, float | None] = field(default_factory=dict)
    _metrics: Metrics = field(init=False)

    @property
    def met(self) -> Met:
        return self.late.met

    def run(self) -> Outcome:
        end = ServerEnd(self.met.federation)
        start = end.start(self.proposal.fingerprint, self.met.data)
        folder = self.out / "checkpoint"
        training = self._as_met(checkpoint.load_server(folder, start) or start)
        first = 0 if self.met.federation.mechanism.releases_statistics else 1
        # A line without its state is of a round that is run again.
        last = training.round if training.round or training.released else first - 1
        self._metrics = Metrics(self.out / METRICS, last, numbers=("seconds",), first=first)
        self._began = time.monotonic()
        self._server = server = ServerRuntime(
            end, training, self.met.agreement.sites, self.proposal.fingerprint, self.patience, self._save, self._kept
        )
        with tracked(self.config.tracking, self.out, self._metrics):
            self._tell_answered(self._metrics.lines)
            self._greet_late(needed=self.met.federation.mechanism.releases_statistics and not training.released)
            try:
                training = drive(server, self.late, self._waits)
                self._need_a_round()
            except RoundError as error:  # what may have left all the same
                write_atomically(self.out / LEDGER, error.ledger.to_json().encode(), FREE_SPACE, private=True)
                raise
            except Stalled:
                self._write_page(server.training, self._accuracy, state="stopped")
                raise
        self._greet_late(last=True)
        accuracy = self._end(training)
        training = self._as_met(training, told=bool(accuracy))
        write_atomically(self.out / LEDGER, training.ledger.to_json().encode(), FREE_SPACE, private=True)
        self._write_outcome(training, accuracy)
        self._write_page(training, accuracy, state="finished")
        return Outcome(training, self.met, accuracy)

    def _save(self, training: ServerTraining, record: ServerRecord | None, lost: Mapping[str, str]) -> None:
        """Write what a round made, before anything else is asked: the ledger, a line, the state."""
        write_atomically(self.out / LEDGER, training.ledger.to_json().encode(), FREE_SPACE, private=True)
        now = time.monotonic()
        line: dict[str, Any] = {"round": training.round if record else 0, "seconds": round(now - self._began, 3)}
        self._began = now
        if record is not None:
            line |= {
                "participants": len(record.participants),
                "upload_bytes": record.upload_bytes,
                "broadcast_bytes": record.broadcast_bytes,
            }
            line |= {"void": record.void} if record.void else {}
            line |= {"lost_clients": {str(client): why for client, why in record.lost.items()}} if record.lost else {}
        line |= {"lost": dict(lost)} if lost else {}
        self._metrics.add(line)
        self._tell_answered([line])
        checkpoint.save_server(self.out / "checkpoint", training)
        for site, reason in lost.items():
            log.warning("round %d goes on without %s: %s", line["round"], site, reason)
        due = training.round % self.config.runtime.evaluate_every == 0 or training.round == self.config.rounds
        if record is not None and due and self.met.tells_accuracy:
            self._metrics.extend(self._evaluated(training))
        by_site, now = {}, time.monotonic()
        if now - self._written[0] > WRITING * self._written[1]:  # epsilon of many sites takes its time
            by_site = {"epsilon": self._write_page(training, self._accuracy)}
            self._written = now, time.monotonic() - now
        self.watch({**self._metrics.lines[-1], **by_site})
        self._began = time.monotonic()  # the next round's seconds have the wait for late sites in them
        if training.round < self.met.federation.rounds:
            self._greet_late()

    def _waits(self, away: Sequence[str]) -> None:
        """Say whom the next round waits for, when that changes; meanwhile ask those who are late."""
        assert self._server is not None
        self._greet_late()
        if self._awaited != (waiting := (self._server.number, tuple(away))):
            self._awaited = waiting
            lost = {site: self.met.left_out.get(site, "it is not connected") for site in away}
            log.warning("round %d waits for %s", self._server.number, " and ".join(away))
            self.watch({"round": self._server.number, "seconds": 0.0, "waits": True, "lost": lost})

    def _voids(self) -> int:
        """Return how many rounds were void so far."""
        return sum(bool(line.get("void")) for line in self._metrics.lines)

    def _need_a_round(self) -> None:
        """Raise `Stalled` if all rounds were void, so that nothing was learned."""
        rounds = sum(line["round"] > 0 for line in self._metrics.lines)
        if rounds and self._voids() == rounds:
            raise Stalled(
                f"all {rounds} rounds were void, so nothing was learned, and what they spent is spent. The last: "
                f"{self._metrics.lines[-1]['void']}. See that the sites run and are connected, and run it with another "
                "seed, which makes it another experiment"
            )

    def _kept(self, part: str, draw: Callable[[], Tensor]) -> Tensor:
        """Return a sum of class statistics with the server's noise, on the disk before sites are told of it.

        A coordinator that begins the release again tells the same, and no second noise of the same sums.
        """
        file = self.out / NOISED / f"{part}.safetensors"
        if not file.exists():
            write_atomically(file, safetensors.torch.save({part: draw().cpu().contiguous()}), FREE_SPACE)
        try:
            return safetensors.torch.load(file.read_bytes())[part]
        except (OSError, ValueError, KeyError, safetensors.SafetensorError) as error:
            raise RunError(f"{file} is damaged ({error}); put it back, or start anew in another folder") from None

    def _tell_answered(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Have every question say which round its site is known to have answered, with some more lines.

        A coordinator that goes on asks for a round in the same bytes again, so lines without their states do not count.
        """
        assert self._server is not None
        before = self._server.facts or {site: {ANSWERED: 0} for site in self.met.agreement.sites}
        new = {site: {ANSWERED: number} for site, number in _answered(self.config, self.met.agreement, lines).items()}
        self._server.facts = {**before, **new}

    def _greet_late(self, needed: bool = False, last: bool = False) -> None:
        """Ask those who did not answer in the meeting once more; see `Latecomers.again`."""
        server = self._server
        if server is None or not self.met.silent:
            return
        # A line without its state is of a round that is run again, and was answered all the same.
        answered = {site: max(known[ANSWERED], self.answered.get(site, 0)) for site, known in server.facts.items()}
        self.late.again(answered, needed, last)
        server.training = self._as_met(server.training)

    def _as_met(self, training: ServerTraining, told: bool = False) -> ServerTraining:
        """Return a state whose ledger has what the sites that were met tell, also those that were late so far.

        That is the digests of their data, and an accuracy, which a site may come to tell as an experiment goes on, or
        at its end (`told`).
        """
        ledger, more = training.ledger, (ACCURACY,) if told or self.met.tells_accuracy else ()
        data = {**ledger.data, **self.met.data, **ledger.data}  # as told at first
        disclosures = tuple(dict.fromkeys((*ledger.disclosures, *more)))
        return replace(training, ledger=replace(ledger, data=data, disclosures=disclosures))

    def _evaluated(self, training: ServerTraining) -> dict[str, Any]:
        """Ask the sites that tell it for their accuracy, and return it for the round's line."""
        began = time.monotonic()
        found: dict[str, float | None] = {}
        for site, envelope in self._told("evaluate", training, self.met.tells_accuracy):
            try:
                found |= accuracy_of(envelope, self.met.agreement.sites[site])
            except MessageError as error:
                log.warning("%s tells no accuracy: %s", site, error)
        self._accuracy |= found
        told = [value for value in found.values() if value is not None]
        by_client = {name.removeprefix("client "): value for name, value in found.items()}
        mean = sum(told) / len(told) if told else None
        seconds = round(time.monotonic() - began, 3)
        return {"accuracy": {"local": mean}, "accuracy_by_client": by_client, "evaluate_seconds": seconds}

    def _write_page(
        self, training: ServerTraining, accuracy: Mapping[str, float | None], state: State = "running"
    ) -> dict[str, float | None]:
        """Write the page and the most that a site spent, and return epsilon by site; None where it is unbounded."""
        epsilons = epsilon_by_site(training.ledger, self.met.agreement, self.config.privacy.unit)
        most = max(epsilons.values(), default=0.0)
        if self._metrics.lines:  # a method without rounds has none
            self._metrics.extend({"epsilon_spent": most if most < float("inf") else None})
        assert self._server is not None
        write_page(
            self.out,
            f"Sordino: {self.config.algorithm} across machines",
            self.proposal.fingerprint,
            self.met.agreement,
            self.met.left_out,
            self._metrics.lines,
            epsilons,
            self._server.traffic,
            self.met.federation.rounds,
            accuracy,
            training.ledger,
            self.config.privacy.epsilon,
            state,
        )
        return {site: value if value < float("inf") else None for site, value in epsilons.items()}

    def _end(self, training: ServerTraining) -> dict[str, float | None]:
        """Give all sites the last broadcast, so that each keeps its prompts; their accuracy where they tell it."""
        accuracy: dict[str, float | None] = {}
        for site, told in self._told("end", training, self.met.agreement.sites):
            try:
                accuracy |= accuracy_of(told, self.met.agreement.sites[site])
            except MessageError as error:
                log.warning("%s did not keep its prompts: %s; run the experiment again for them", site, error)
        return accuracy

    def _told(
        self, kind: Literal["evaluate", "end"], training: ServerTraining, sites: Collection[str]
    ) -> Iterator[tuple[str, Envelope]]:
        """Give sites the broadcasts after a round, and yield what each answers; a refusal where it does not."""
        end, experiment = ServerEnd(self.met.federation), self.proposal.fingerprint
        assert self._server is not None
        for group in groups({site: sorted(self.met.agreement.sites[site]) for site in sorted(sites)}):
            payloads = {
                site: Envelope(
                    kind, experiment, self._server.facts.get(site, {}), end.last_broadcasts(training, clients)
                ).encode()
                for site, clients in group.items()
            }
            # What a slow site is asked for now is worth no more than its round.
            quorum = len(payloads) if kind == "end" else self.patience.of(len(payloads))
            told: list[str] = []  # by whom; a refusal is no answer
            waiting = self.patience.deadline, self.patience.grace, lambda told=told, least=quorum: len(told) < least
            for event in self.fleet.ask(Ask(training.round, payloads, quorum, *waiting)):
                yield event.site, (envelope := answer_of(event, kind, experiment))
                told += [event.site] if envelope.kind == kind else []

    def _write_outcome(self, training: ServerTraining, accuracy: Mapping[str, float | None]) -> None:
        privacy = as_summary(training.ledger, self.config.privacy.unit)
        document = {
            "experiment": self.proposal.fingerprint,
            "rounds": training.round,
            "void_rounds": self._voids(),
            "sites": {site: list(clients) for site, clients in self.met.agreement.sites.items()},
            "left_out": dict(self.met.left_out),
            "accuracy": dict(accuracy),
            "privacy": privacy,
        }
        write_atomically(self.out / OUTCOME, json.dumps(document, indent=1).encode(), FREE_SPACE)
