"""The agreement of parties on machines of their own: from what each tells, the same federation at every one of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.algorithms.base import Algorithm, named_tensors
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy.choice import mechanism_for
from sordino.privacy.settings import PrivacySettings
from sordino.runtime import aggregation
from sordino.runtime.facts import Federation, Units, mechanism_inputs, schemas_of
from sordino.runtime.messages import MessageError
from sordino.runtime.settings import RuntimeSettings, participant_count

PERSONS_APART = "nobody has images at two sites"


@dataclass(frozen=True)
class Plan:
    """An experiment as a party runs it: method, model, rounds, privacy.

    Attributes:
        algorithm, settings, model: the method.
        rounds, runtime, privacy, seed: of the configuration.
        public: [n, D], features of public images; None without any.
        example: [...], zeros of the shape that the model reads of one picture, where tensors are.
    """

    algorithm: Algorithm
    settings: Any
    model: PromptModel
    rounds: int
    runtime: RuntimeSettings
    privacy: PrivacySettings
    seed: int
    public: Tensor | None
    example: Tensor


@dataclass(frozen=True)
class Agreement:
    """Who takes part, and what all must know of each other.

    Attributes:
        sites: site to the numbers of its clients; all numbers together are 0 to K-1.
        sizes: [K], what each client holds, in units of privacy; ones where it is not told and does not matter.
        whole_persons: whether it is known whose each image is at every site. That nobody has images at two sites is
            an assumption.
    """

    sites: Mapping[str, Sequence[int]]
    sizes: Sequence[int]
    whole_persons: bool

    @property
    def facts(self) -> dict[str, Any]:
        """Return it for a message."""
        return asdict(self)

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Agreement:
        """Read it from a message.

        Raises:
            MessageError: it is malformed.
        """
        try:
            sites = {str(site): list(map(_number, clients)) for site, clients in facts["sites"].items()}
            found = cls(sites, list(map(_number, facts["sizes"])), facts["whole_persons"] is True)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MessageError(f"the agreement cannot be read: {error}") from None
        numbers = sorted(client for clients in sites.values() for client in clients)
        if numbers != list(range(len(found.sizes))) or min(found.sizes, default=0) < 1:
            raise MessageError("the agreement's clients are not numbered from 0, or one of them holds nothing")
        return found

    def federation(self, plan: Plan) -> Federation:
        """Return the federation, the same at every party.

        Raises:
            ConfigError: the mechanism or the aggregation does not fit the method or the clients, or a site holds more
                clients than may pool what they know.
        """
        rounds = plan.rounds if plan.algorithm.ABOUT.trains else 0
        noun = "persons" if plan.privacy.by_person else "examples"
        units = Units(tuple(self.sizes), self.whole_persons, noun)
        method = (plan.algorithm, plan.settings)
        kind, classes = type(plan.model), len(plan.model.classes)
        inputs = mechanism_inputs(*method, units, rounds, plan.runtime, plan.seed, classes, kind)
        mechanism = mechanism_for(plan.privacy, inputs, plan.model, plan.public)
        count = participant_count(len(self.sizes), plan.runtime.participation)
        if check := getattr(plan.algorithm, "check", None):
            check(plan.settings, plan.model, count)
        aggregation.check(plan.runtime, plan.privacy, plan.algorithm.ABOUT, count)
        self._check_pooled(plan, bool(mechanism.noise_multiplier))
        schemas = schemas_of(*method, plan.model, len(self.sizes), rounds, plan.example)
        # Each site sees its own persons. A bound for a person at two of them would be one for a part of the person.
        bounded = self.whole_persons and plan.privacy.on and plan.privacy.unit != "example"
        assumptions = (PERSONS_APART,) if bounded and len(self.sites) > 1 else ()
        facts = (*method, plan.model, len(self.sizes), rounds, plan.runtime, plan.seed, mechanism, schemas)
        return Federation(*facts, plan.example.device, assumptions)

    def _check_pooled(self, plan: Plan, noised: bool) -> None:
        """Refuse a site with more clients than may pool what they know, as it holds what they all hold.

        Raises:
            ConfigError: there is one, and shares of noise or of prompts are spread over clients.
        """
        allowed: dict[str, int] = {}
        if noised and (plan.privacy.noise_by == "shares" or plan.privacy.compress):
            allowed["privacy.colluders"] = plan.privacy.colluders
        if hasattr(plan.algorithm, "client_exchange") and hasattr(plan.settings, "colluders"):
            allowed["settings.colluders"] = plan.settings.colluders
        if len(self.sites) < 2:  # nobody else's numbers are among the shares
            return
        site, held = max(((site, len(clients)) for site, clients in self.sites.items()), key=lambda entry: entry[1])
        for key, most in allowed.items():
            if held > most:
                remedy = "set it to that, or have fewer clients at a site"
                raise ConfigError(key, most, f"site {site} holds {held} clients, and so what they all know; {remedy}")


def _number(value: object) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is no number of a client, or of what one holds")
    return value


def federation_digest(federation: Federation) -> str:
    """Return a digest of what must be the same at every party: noise, sizes, messages."""
    mechanism, schemas = federation.mechanism, federation.schemas
    made_of = (
        repr((mechanism.noise_multiplier, mechanism.delta, mechanism.inputs.sizes, federation.rounds)),
        repr([(name, tuple(t.shape), str(t.dtype)) for name, t in _tensors(schemas.broadcast)]),
        repr([(name, tuple(t.shape), str(t.dtype)) for name, t in _tensors(schemas.upload)]),
    )
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()


def _tensors(message: Any) -> list[tuple[str, torch.Tensor]]:
    return sorted(named_tensors(message).items())
