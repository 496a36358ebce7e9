"""A site in one experiment: what it tells, what it agrees to, its rounds, and the end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import sordino
from sordino.encoders.prompt_model import Prompt
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import Experiment
from sordino.experiments.saved_prompts import save_prompts
from sordino.files import write_private
from sordino.privacy.ledger import Ledger, Release
from sordino.privacy.statement import as_summary
from sordino.runtime.agreement import Agreement, federation_digest
from sordino.runtime.client import ClientEnd
from sordino.runtime.envelope import Envelope
from sordino.runtime.facts import Federation, RandomnessOf
from sordino.runtime.messages import MessageError
from sordino.runtime.turns import FILE, Turns
from sordino.sites.hello import EncoderFacts, Hello, names_digest
from sordino.sites.ledger import SiteLedger, charged_on_joining, epsilon_of, releases_of
from sordino.sites.own_data import OwnData
from sordino.sites.policy import ACCURACY, fields_kept_back, over_budget, unnoised
from sordino.sites.proposal import Proposal
from sordino.sites.settings import SiteSettings
from sordino.tasks.settings import PartitionSettings

PROTOCOL = 2  # of the messages between a coordinator and sites, and of what they compute from them
COPIES = (1, 4, 16, 64)  # of this site, as stand-ins for others that are not known yet
ANSWERED = "answered"  # in an agreement: the last round that the coordinator knows an answer to
AGREED = "agreement.json"  # in the folder of an experiment
LEDGER = "ledger.json"  # there too: what was released of all sites' data, for the prompts
Others = dict[str, Ledger]  # of all other experiments, by fingerprint


class Membership:
    """A site in one experiment.

    Args:
        settings: of the site's file.
        ledger: of all its experiments.
        folder: keeps the site's state in this one.
        proposal: the experiment.
    """

    def __init__(self, settings: SiteSettings, ledger: SiteLedger, folder: Path, proposal: Proposal) -> None:
        self._settings, self._ledger, self._folder, self.proposal = settings, ledger, folder, proposal
        self.config = self._own_config()
        self._agreement: Agreement | None = None
        self._federation: Federation | None = None
        self._turns: Turns | None = None
        self._answered = 0  # the last round that the coordinator is known to have an answer to
        self._affordable: tuple[Ledger, Others] = Ledger(), {}

    @cached_property
    def own(self) -> OwnData:
        """Return the site's data, as the method reads it."""
        names, settings = self.proposal.class_names, self._settings
        tells_names = "class_names" in settings.policy.tells
        return OwnData.open(self.config, settings.clients, names, Path(settings.state), tells_names)

    @property
    def turns(self) -> Turns:
        """Return the site's rounds.

        Raises:
            MessageError: there is no agreement yet, or this site's state is older than its own answers.
        """
        if self._turns is None:
            raise MessageError("there is no agreement yet; who takes part is told before the first round")
        if (last := self._turns.round) < self._answered:
            raise MessageError(
                f"this site answered round {self._answered}, and its state ends with round {last}: it is an old "
                "backup, or another copy's; put the newest state back, and see that no other copy of the site runs"
            )
        return self._turns

    def hello(self) -> Hello:
        """Return what all must know of this site.

        Raises:
            MessageError: the budget does not suffice.
        """
        own, policy = self.own, self._settings.policy
        self._check(self._alone(), range(len(own.numbers)))
        encoder = own.plan.model.encoder
        return Hello(
            version=sordino.__version__,
            protocol=PROTOCOL,
            encoder=EncoderFacts(name=encoder.name, fingerprint=encoder.fingerprint, dtype=str(encoder.dtype)),
            classes=names_digest(own.class_names),
            class_names=list(own.class_names) if "class_names" in policy.tells else None,
            sizes=self._sizes(),
            data=own.digests,
            numbers=None if self._settings.clients is None else own.numbers,
            whole_persons=own.units.whole_persons,
            example=list(own.plan.example.shape),
            public=own.public,
            accuracy="accuracy" in policy.tells,
        )

    def planned_epsilon(self) -> float:
        """Return epsilon of the whole experiment alone, if this site were the only one."""
        federation, policy = self._alone(), self._settings.policy
        clients = range(len(self.own.numbers))
        planned = self._empty(federation, clients).add(releases_of(federation.mechanism.planned(), clients))
        return epsilon_of([planned], policy.unit, policy.delta)

    def resume(self) -> None:
        """Take up again what was agreed before this process started, if anything was.

        Raises:
            SordinoError: what was kept is damaged, or the data is other data now.
        """
        if (self._folder / AGREED).exists():
            document = read_document(self._folder / AGREED)
            self.agree({**document.get("agreement", {}), ANSWERED: document.get(ANSWERED, 0)})

    def agree(self, facts: Mapping[str, Any]) -> bytes:
        """Take note of who takes part, and return what this site makes of it.

        Args:
            facts: of the agreement, with the last round that the coordinator knows an answer of this site to.

        Raises:
            SordinoError: it is not what this site told, another one began before, the budget does not suffice, or
                this site's state is older than its own answers.
        """
        agreement, answered = Agreement.read(facts), _answered(facts)
        mine = agreement.sites.get(self._name)
        if mine is None:
            raise MessageError(f"the agreement leaves out this site, {self._name}")
        told = [agreement.sizes[client] for client in mine]
        if told != self._sizes():
            raise MessageError(f"the agreement says that {self._name} holds {told}, and it told {self._sizes()}")
        document = {"agreement": agreement.facts, "data": self.own.digests}
        answered = max(answered, self._check_unchanged(document, answered))
        federation, turns = self._federation, self._turns
        # The newest state may be back.
        if federation is None or turns is None or turns.round < answered or agreement != self._agreement:
            federation = agreement.federation(self.own.plan)
            self._check(federation, mine)
            turns = self._joined(federation, sorted(mine))
        # Written first, so that a process that starts later refuses, too.
        self._keep(document, answered)
        self._agreement, self._federation, self._turns = agreement, federation, turns
        reply = {"federation": federation_digest(federation), "round": self.turns.round}
        return Envelope("agreement", self.proposal.fingerprint, reply).encode()

    def newest_turns(self, facts: Mapping[str, Any]) -> Turns:
        """Return the site's rounds, where its state is not older than its own answers.

        An old copy of it may be put in its place at any time, and no agreement comes then. So every question about
        rounds says which round this site is known to have answered.

        Args:
            facts: of the question.

        Raises:
            MessageError: the state is older, there is no agreement yet, or the facts are malformed.
        """
        answered = _answered(facts)
        if answered > max(self._answered, self.turns.round):
            self._keep(read_document(self._folder / AGREED), answered)
        return self.turns

    def _keep(self, document: Mapping[str, Any], answered: int) -> None:
        """Keep the agreement, and the last round that this site is known to have answered."""
        write_private(self._folder / AGREED, json.dumps({**document, ANSWERED: answered}, indent=1).encode())
        self._answered = answered

    def _check_unchanged(self, document: dict[str, Any], answered: int) -> int:
        """Refuse what is not as it was when this site joined, in whichever process that was.

        Another agreement may replace one of which nothing was answered or entered: nothing was released for it.

        Returns:
            the last round that this site was told it answered.

        Raises:
            MessageError: others take part, or the data is other data, of which the ledger has the old digests.
        """
        if not (self._folder / AGREED).exists():
            return 0
        before = read_document(self._folder / AGREED)
        if before.get("data") != document["data"]:
            raise MessageError("this site's data changed since it joined; put it back, or propose a new experiment")
        known = before.get(ANSWERED, 0)
        known = known if isinstance(known, int) else 0
        begun = answered or known or (self._folder / FILE).exists()
        if before.get("agreement") != document["agreement"] and (begun or self._is_entered):
            raise MessageError(
                "another agreement was made before, and this site's part in it began; have the same sites take part, "
                "or propose the experiment with another seed"
            )
        return known

    @property
    def _is_entered(self) -> bool:
        """Return whether this site's ledger has anything of the experiment."""
        return self.proposal.fingerprint in self._ledger.experiments

    def evaluate(self, envelope: Envelope) -> bytes:
        """Tell the clients' accuracy with the broadcasts in it, and change nothing.

        Raises:
            MessageError: the policy does not let it.
        """
        if "accuracy" not in self._settings.policy.tells:
            raise MessageError("accuracy is not among what this site tells; see policy.tells")
        facts = {"round": self.turns.round, "accuracy": self._told_accuracies(self._prompt(envelope))}
        return Envelope("evaluate", self.proposal.fingerprint, facts).encode()

    def end(self, envelope: Envelope) -> bytes:
        """Keep the clients' prompts, and tell their accuracy if the policy lets it; the last broadcasts are in it."""
        prompt = self._prompt(envelope)
        federation, end = self._federation, self.turns.end
        assert federation is not None
        ledger = self._ledger_of_prompts(federation, end.numbers)
        write_private(self._folder / LEDGER, ledger.to_json().encode())
        privacy = as_summary(ledger, self.config.privacy.unit)
        folder = self._folder / "prompts"
        model, names = self.own.plan.model, self.own.class_names
        own = end.numbers if federation.algorithm.ABOUT.personal != "nothing" else None
        save_prompts(folder, self.config, model.encoder, names, prompt, privacy, own, model.text(prompt))
        facts: dict[str, Any] = {"round": self.turns.round}
        if "accuracy" in self._settings.policy.tells:
            facts["accuracy"] = self._told_accuracies(prompt)
        return Envelope("end", self.proposal.fingerprint, facts).encode()

    def _ledger_of_prompts(self, federation: Federation, clients: Sequence[int]) -> Ledger:
        """Return what was released of everybody's data that the clients' prompts were learned from.

        A prompt of which a part was averaged tells of all sites' data, and this site's ledger counts its own alone. Of
        the others it knows the plan, which nobody exceeds.
        """
        empty, method = self._empty(federation, clients), federation.algorithm
        own = self._ledger.entry(self.proposal.fingerprint, empty).ledger
        if method.ABOUT.server_uses == "nothing":
            return own
        return replace(own, releases=()).add(federation.mechanism.planned())

    def _prompt(self, envelope: Envelope) -> Prompt:
        """Return the clients' prompts, from their own state and the broadcasts to them."""
        end, training = self.turns.end, self.turns.training
        assert self._federation is not None
        if sorted(envelope.contents) != end.numbers:
            raise MessageError(f"its broadcasts are to clients {sorted(envelope.contents)}, and here are {end.numbers}")
        broadcast, _ = end.read_broadcast([content for _, content in sorted(envelope.contents.items())])
        return self._federation.algorithm.prompt(broadcast, training.state)

    def _told_accuracies(self, prompt: Prompt) -> dict[str, float | None]:
        """Return the clients' accuracies, which are in the ledger before they leave, also where no round was run."""
        assert self._federation is not None
        clients = self.turns.end.numbers
        self._ledger.open(self.proposal.fingerprint, self._empty(self._federation, clients))
        return dict(zip(map(str, clients), self.own.accuracies(prompt), strict=True))

    @property
    def _name(self) -> str:
        return self._settings.name

    def _alone(self) -> Federation:
        """Return the federation as if this site were the only one, before others are known.

        A protocol on shares needs several clients. Then it is as if there were enough others that hold as much.

        Raises:
            ConfigError: the mechanism or the method does not fit, however many clients there are.
        """
        own, sizes, first = self.own, self._sizes(), None
        for copies in COPIES:
            alone = Agreement({self._name: range(copies * len(sizes))}, copies * sizes, own.units.whole_persons)
            try:
                return alone.federation(own.plan)
            except ConfigError as error:
                first = first or error
        assert first is not None
        raise first

    def _sizes(self) -> list[int]:
        """Return the clients' sizes as they are told: ones where nothing needs them.

        Where the client is protected, its size is as private as all else, and would have no noise.
        """
        privacy = self.config.privacy
        needed = self.config.runtime.weighting == "examples" or (privacy.on and privacy.unit != "client")
        if not needed:
            return [1] * len(self.own.numbers)
        if "sizes" not in self._settings.policy.tells:
            raise MessageError(
                "the experiment needs sizes (its mechanism, or runtime.weighting = 'examples'), and policy.tells lacks "
                "them"
            )
        return list(self.own.units.sizes)

    def _own_config(self) -> Experiment:
        site = self._settings
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
        policy = self._settings.policy
        if kept := fields_kept_back(policy, federation):
            raise MessageError(f"upload's {kept[0]!r} may not leave; policy.fields = {policy.fields}")
        empty = self._empty(federation, clients)
        told_before = self._ledger.entry(self.proposal.fingerprint, empty).ledger.disclosures
        planned = replace(empty, disclosures=told_before).add(releases_of(federation.mechanism.planned(), clients))
        if told := unnoised(policy, planned):
            raise MessageError(told)
        if told := over_budget(policy, self._ledger, self.proposal.fingerprint, planned):
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
        part = part and set(after.disclosures) <= set(planned.disclosures)
        if part and others == self._others():
            return ""
        return over_budget(self._settings.policy, self._ledger, self.proposal.fingerprint, after)

    def _others(self) -> Others:
        """Return what all other experiments that this site's data is in released and disclosed."""
        ledgers = {name: entry.ledger for name, entry in self._ledger.experiments.items()}
        return {name: ledger for name, ledger in ledgers.items() if name != self.proposal.fingerprint}

    def _empty(self, federation: Federation, clients: Sequence[int]) -> Ledger:
        """Return the experiment's ledger before any release, with the digests of this site's data."""
        data = {f"client {client}": digest for client, digest in zip(sorted(clients), self.own.digests, strict=True)}
        empty = replace(federation.empty_ledger(), run=self.proposal.fingerprint, data=data)
        if "accuracy" in self._settings.policy.tells:
            empty = replace(empty, disclosures=(*empty.disclosures, ACCURACY))
        return empty

    def _joined(self, federation: Federation, clients: Sequence[int]) -> Turns:
        def make_end(randomness: RandomnessOf) -> ClientEnd:
            return ClientEnd(federation, self.own.data, clients, randomness)

        def charge(number: int, releases: Sequence[Release]) -> None:
            empty, experiment = self._empty(federation, clients), self.proposal.fingerprint
            if told := self._affords(self._ledger.entry(experiment, empty).with_rounds([number], releases).ledger):
                raise MessageError(told)
            self._ledger.charge(experiment, empty, [number], releases)

        if joining := charged_on_joining(federation):
            releases, empty = federation.mechanism.round_releases(clients), self._empty(federation, clients)
            self._ledger.charge(self.proposal.fingerprint, empty, joining, releases)
        return Turns(make_end, self.proposal.fingerprint, self._folder, charge)


def _answered(facts: Mapping[str, Any]) -> int:
    """Return the last round that a site is known to have answered, from a message.

    Raises:
        MessageError: it is no number.
    """
    answered = facts.get(ANSWERED, 0)
    if type(answered) is not int:
        raise MessageError("the message cannot be read: the last round that was answered is no number")
    return answered


def read_document(file: Path) -> dict[str, Any]:
    """Read a JSON document of a site's state.

    Raises:
        RunError: it is damaged.
    """
    try:
        document = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); put a backup back, or say hello to it again") from None
    return document if isinstance(document, dict) else {}
