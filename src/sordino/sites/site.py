"""A site: it answers hello, agreement, rounds and the end of experiments, each by its own policy, data and state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sordino
from sordino.errors import RunError, SordinoError
from sordino.experiments.config import Experiment
from sordino.experiments.run_lock import held
from sordino.experiments.saved_prompts import save_prompts
from sordino.files import write_atomically
from sordino.privacy.ledger import Ledger, Release
from sordino.privacy.statement import as_summary
from sordino.randomness import system_bytes
from sordino.runtime.agreement import Agreement, federation_digest
from sordino.runtime.client import ClientEnd
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import Federation, RandomnessOf
from sordino.runtime.messages import MessageError
from sordino.runtime.turns import Turns
from sordino.sites.ledger import SiteLedger, epsilon_of
from sordino.sites.own_data import OwnData
from sordino.sites.policy import fields_kept_back, objections, over_budget
from sordino.sites.proposal import Proposal
from sordino.sites.settings import SiteSettings
from sordino.tasks.settings import PartitionSettings

PROTOCOL = 1  # of the messages between a coordinator and sites
PROPOSED, AGREED = "proposal.json", "agreement.json"  # in the folder of an experiment
LAST = "process"  # in the state folder: which process answered last


class Site:
    """What a site does; every engine hands it requests and takes its answers.

    Args:
        settings: of the site's file.
    """

    def __init__(self, settings: SiteSettings) -> None:
        self.settings, self.state = settings, Path(settings.state)
        self.ledger = SiteLedger(self.state / "ledger")
        self._members: dict[str, Membership] = {}
        self._name = system_bytes(16).hex()  # of this process

    def turn(self, request: bytes) -> bytes:
        """Return the answer to a request. A refusal says why; nothing raises.

        The same request gets the same answer, however often it comes, and to whichever process of this site.
        """
        try:
            with held(self.state):
                self._take_over()
                return self._answer(request)
        except SordinoError as error:
            return self._refusal("", error)

    def _take_over(self) -> None:
        """Read the state again if another process of this site has answered since this one did."""
        file = self.state / LAST
        if file.exists() and file.read_text() == self._name:
            return
        self._members.clear()
        self.ledger = SiteLedger(self.state / "ledger")
        write_atomically(file, self._name.encode())

    def _refusal(self, experiment: str, error: SordinoError) -> bytes:
        return Envelope("refusal", experiment, {"reason": str(error), "site": self.settings.name}).encode()

    def _answer(self, request: bytes) -> bytes:
        experiment = ""
        try:
            if len(request) > self.settings.policy.most_bytes:
                most = self.settings.policy.most_bytes
                raise MessageError(f"a request of {len(request):,} bytes, and policy.most_bytes = {most:,}")
            envelope = Envelope.decode(request)
            experiment = envelope.experiment
            if envelope.kind == "hello":
                return self.hello(envelope)
            member = self._member(experiment)
            if envelope.kind == "agreement":
                return member.agree(Agreement.read(envelope.facts))
            if envelope.kind == "round":
                return member.turns.turn(request)
            if envelope.kind == "end":
                return member.end(envelope)
            raise MessageError(f"a {envelope.kind} is no request")
        except SordinoError as error:
            return self._refusal(experiment, error)

    def hello(self, envelope: Envelope) -> bytes:
        """Answer who is here, or why this site takes no part.

        Raises:
            SordinoError: the policy forbids it, the budget does not suffice, or data or encoder are not there.
        """
        proposal = Proposal.read(envelope.facts)
        if proposal.fingerprint != envelope.experiment:
            raise MessageError(f"the proposal is of experiment {proposal.fingerprint}")
        if found := objections(self.settings.policy, proposal):
            raise MessageError("; ".join(found))
        member = self._members.get(proposal.fingerprint)
        if member is None:
            member = Membership(self, proposal)
        facts = member.hello()
        write_atomically(self.folder(proposal.fingerprint) / PROPOSED, json.dumps(proposal.facts, indent=1).encode())
        self._members[proposal.fingerprint] = member
        return Envelope("hello", proposal.fingerprint, facts).encode()

    def _member(self, experiment: str) -> Membership:
        """Return what this site is in an experiment, also after a restart."""
        if experiment not in self._members:
            folder = self.folder(experiment)
            if not (folder / PROPOSED).exists():
                raise MessageError(f"this site has not joined experiment {experiment[:12]}; say hello first")
            proposal = Proposal.read(_document(folder / PROPOSED))
            if found := objections(self.settings.policy, proposal):  # the policy may have changed
                raise MessageError("; ".join(found))
            member = Membership(self, proposal)
            if (folder / AGREED).exists():
                member.agree(Agreement.read(_document(folder / AGREED)))
            self._members[experiment] = member
        return self._members[experiment]

    def folder(self, experiment: str) -> Path:
        """Return where the state of an experiment is."""
        if not experiment.isalnum():  # it comes from a message, and names a folder
            raise MessageError("an experiment's fingerprint is hexadecimal")
        return self.state / "experiments" / experiment


class Membership:
    """A site in one experiment.

    Args:
        site: the site.
        proposal: the experiment.
    """

    def __init__(self, site: Site, proposal: Proposal) -> None:
        self.site, self.proposal = site, proposal
        self.config = self._own_config()
        self._agreement: Agreement | None = None
        self._federation: Federation | None = None
        self._turns: Turns | None = None
        self._affordable: tuple[Ledger, dict[str, tuple[int, ...]]] = Ledger(), {}

    @cached_property
    def own(self) -> OwnData:
        """Return the site's data, as the method reads it."""
        names, state = self.proposal.class_names, self.site.state
        return OwnData.open(self.config, self.site.settings.clients, names, state)

    @property
    def turns(self) -> Turns:
        """Return the site's rounds.

        Raises:
            MessageError: there is no agreement yet.
        """
        if self._turns is None:
            raise MessageError("there is no agreement yet; who takes part is told before the first round")
        return self._turns

    def hello(self) -> dict[str, Any]:
        """Return what all must know of this site.

        Raises:
            MessageError: the budget does not suffice.
        """
        own, policy = self.own, self.site.settings.policy
        alone = Agreement({self._name: range(len(own.numbers))}, self._sizes(), own.units.whole_persons)
        federation = alone.federation(own.plan)
        self._check(federation, range(len(own.numbers)))
        encoder = own.plan.model.encoder
        facts: dict[str, Any] = {
            "version": sordino.__version__,
            "protocol": PROTOCOL,
            "encoder": {"name": encoder.name, "fingerprint": encoder.fingerprint, "dtype": str(encoder.dtype)},
            "classes": names_digest(own.class_names),
            "clients": len(own.numbers),
            "sizes": self._sizes(),
            "whole_persons": own.units.whole_persons,
            "example": list(own.plan.example.shape),
            "public": own.public,
            "data": own.digests,
        }
        if self.site.settings.clients is not None:
            facts["numbers"] = own.numbers
        if "class_names" in policy.tells:
            facts["class_names"] = list(own.class_names)
        return facts

    def planned_epsilon(self) -> float:
        """Return epsilon of the whole experiment alone, if this site were the only one."""
        alone = Agreement({self._name: range(len(self.own.numbers))}, self._sizes(), self.own.units.whole_persons)
        federation = alone.federation(self.own.plan)
        policy = self.site.settings.policy
        planned = self._empty(federation, range(len(self.own.numbers))).add(federation.mechanism.planned())
        return epsilon_of([planned], policy.unit, policy.delta)

    def agree(self, agreement: Agreement) -> bytes:
        """Take note of who takes part, and return what this site makes of it.

        Raises:
            SordinoError: it is not what this site told, another one was made before, or the budget does not suffice.
        """
        mine = agreement.sites.get(self._name)
        if mine is None:
            raise MessageError(f"the agreement leaves out this site, {self._name}")
        told = [agreement.sizes[client] for client in mine]
        if told != self._sizes():
            raise MessageError(f"the agreement says that {self._name} holds {told}, and it told {self._sizes()}")
        if self._agreement is not None and self._agreement.facts != agreement.facts:
            raise MessageError("another agreement was made before; who takes part does not change within an experiment")
        if self._federation is None:
            federation = agreement.federation(self.own.plan)
            self._check(federation, mine)
            folder = self.site.folder(self.proposal.fingerprint)
            write_atomically(folder / AGREED, json.dumps(agreement.facts, indent=1).encode())
            self._agreement, self._federation = agreement, federation
            self._turns = self._joined(federation, sorted(mine), folder)
        facts = {"federation": federation_digest(self._federation), "round": self.turns.round}
        return Envelope("agreement", self.proposal.fingerprint, facts).encode()

    def end(self, envelope: Envelope) -> bytes:
        """Keep the clients' prompts, and tell their accuracy if the policy lets it; the last broadcasts are in it."""
        federation, end = self._federation, self.turns.end
        assert federation is not None
        training = self.turns.training
        broadcast, _ = end.read_broadcast([content for _, content in sorted(envelope.contents.items())])
        prompt = federation.algorithm.prompt(broadcast, training.state)
        ledger = self.site.ledger.entry(self.proposal.fingerprint, self._empty(federation, end.numbers)).ledger
        privacy = as_summary(ledger, self.config.privacy.unit)
        folder = self.site.folder(self.proposal.fingerprint) / "prompts"
        encoder, names = self.own.plan.model.encoder, self.own.class_names
        own = end.numbers if federation.algorithm.ABOUT.personal != "nothing" else None
        save_prompts(folder, self.config, encoder, names, prompt, privacy, own)
        facts: dict[str, Any] = {"round": self.turns.round}
        if "accuracy" in self.site.settings.policy.tells:
            accuracies = self.own.accuracies(prompt)
            facts["accuracy"] = dict(zip(map(str, end.numbers), accuracies, strict=True))
        return Envelope("end", self.proposal.fingerprint, facts).encode()

    @property
    def _name(self) -> str:
        return self.site.settings.name

    def _sizes(self) -> list[int]:
        """Return the clients' sizes as they are told: ones where the policy does not tell them."""
        if "sizes" in self.site.settings.policy.tells:
            return list(self.own.units.sizes)
        if self.config.privacy.on or self.config.runtime.weighting == "examples":
            raise MessageError(
                "the experiment needs sizes (privacy, or runtime.weighting = 'examples'), and policy.tells lacks them"
            )
        return [1] * len(self.own.numbers)

    def _own_config(self) -> Experiment:
        site = self.site.settings
        partition = site.partition or PartitionSettings(scheme="iid", clients=1)
        own: dict[str, Any] = {"data": site.data, "partition": partition, "device": site.device}
        tables = {
            name: value.model_dump(exclude_none=True) if hasattr(value, "model_dump") else value
            for name, value in own.items()
        }
        if site.encoder is not None:
            tables["encoder"] = site.encoder.model_dump(exclude_none=True)
        return self.proposal.config(tables)

    def _check(self, federation: Federation, clients: Sequence[int]) -> None:
        """Refuse an experiment whose whole plan is not within the policy.

        Raises:
            MessageError: it is not; it says what, with the numbers.
        """
        policy = self.site.settings.policy
        if kept := fields_kept_back(policy, federation):
            raise MessageError(f"upload's {kept[0]!r} may not leave; policy.fields = {policy.fields}")
        planned = self._empty(federation, clients).add(_of(federation.mechanism.planned(), clients))
        if told := over_budget(policy, self.site.ledger, self.proposal.fingerprint, planned):
            raise MessageError(told)
        self._affordable = planned, self._others()

    def _affords(self, after: Ledger) -> str:
        """Return why the site's budget does not pay for what the experiment will have released; nothing if it does.

        The whole plan was found to be affordable. So is a part of it, while no other experiment released anything.
        Then nothing is computed: accounting takes a second or more.
        """
        planned, others = self._affordable
        steps = {replace(release, steps=0): release.steps for release in planned.releases}
        part = all(release.steps <= steps.get(replace(release, steps=0), 0) for release in after.releases)
        if part and others == self._others():
            return ""
        return over_budget(self.site.settings.policy, self.site.ledger, self.proposal.fingerprint, after)

    def _others(self) -> dict[str, tuple[int, ...]]:
        """Return the rounds of all other experiments that this site's data is in."""
        entries = self.site.ledger.experiments
        return {name: entry.rounds for name, entry in entries.items() if name != self.proposal.fingerprint}

    def _empty(self, federation: Federation, clients: Sequence[int]) -> Ledger:
        """Return the experiment's ledger before any release, with the digests of this site's data."""
        data = {f"client {client}": digest for client, digest in zip(sorted(clients), self.own.digests, strict=True)}
        return replace(federation.mechanism.empty_ledger(), run=self.proposal.fingerprint, data=data)

    def _joined(self, federation: Federation, clients: Sequence[int], folder: Path) -> Turns:
        def make_end(randomness: RandomnessOf) -> ClientEnd:
            return ClientEnd(federation, self.own.data, clients, randomness)

        def charge(number: int, releases: Sequence[Release]) -> None:
            empty, experiment = self._empty(federation, clients), self.proposal.fingerprint
            if told := self._affords(self.site.ledger.entry(experiment, empty).with_round(number, releases).ledger):
                raise MessageError(told)
            self.site.ledger.charge(experiment, empty, number, releases)

        return Turns(make_end, self.proposal.fingerprint, folder, charge)


def _document(file: Path) -> dict[str, Any]:
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); put a backup back, or say hello to it again") from None
    return document if isinstance(document, dict) else {}


def _of(releases: Sequence[Release], clients: Sequence[int]) -> list[Release]:
    """Return the releases of some clients, and those of all together."""
    parties = {f"client {client}" for client in clients}
    return [release for release in releases if release.party in parties or not release.party.startswith("client ")]


def names_digest(names: Sequence[str]) -> str:
    """Return a digest of the classes, in order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
