"""Questions of a site's owner before anything runs: the meaning of its file, and of an experiment for it."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sordino.errors import ConfigError
from sordino.files import replace_file
from sordino.runtime.messages import MessageError
from sordino.sites.policy import objections
from sordino.sites.proposal import Proposal
from sordino.sites.settings import SiteSettings
from sordino.sites.site import Site
from sordino.tasks.overview import tell_passed_over
from sordino.tasks.settings import PartitionSettings
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task

TEMPLATE = """# What this site holds, and what it allows. No message from a server can change it.
name = {name}                # as its certificate or key says it
state = "state"                # keeps what was answered, the ledger and the prompts: back it up

[data]
source = {source}

[policy]
experiments = []               # fingerprints of allowed experiments; `sordino site check` prints them
signers = []                   # or files with the public keys of those whose signed experiments are allowed
epsilon = {epsilon}                  # the most that all experiments together may spend
delta = {delta:g}
unit = {unit}
mechanisms = ["statistics", "dp-sgd", "cotangent", "dp-fedavg"]   # without "none": nothing leaves without noise
noise_by = ["client", "shares"]                                   # without "server": its server is not trusted
tells = ["sizes", "class_names"]                                  # "accuracy" too, if it may leave without noise
"""


def write_template(file: Path, name: str, source: str, epsilon: float, delta: float, unit: str) -> None:
    """Write a new site's file.

    Raises:
        ConfigError: it exists, or cannot be written.
    """
    if file.exists():
        raise ConfigError("SITE.toml", str(file), "exists, and is not overwritten; choose another name")
    text = TEMPLATE.format(
        name=json.dumps(name), source=json.dumps(source), epsilon=float(epsilon), delta=delta, unit=json.dumps(unit)
    )
    try:
        replace_file(file, text.encode())
    except OSError as error:
        raise ConfigError("SITE.toml", str(file), f"cannot be written: {error.strerror or error}") from None


def facts_of(settings: SiteSettings) -> dict[str, Any]:
    """Return what a site's file means: classes and clients with their sizes, and its budget.

    Raises:
        SordinoError: the data is not what the file says.
    """
    images = load_images(settings.data)
    tell_passed_over(images)
    partition = settings.partition or PartitionSettings(scheme="iid", clients=1)
    task = build_task(images, settings.data, partition, 0)
    chosen = settings.clients or range(task.clients)
    counted = Counter(task.class_names[label] for label in task.labels if label >= 0)
    return {
        "name": settings.name,
        "state": settings.state,
        "classes": {name: counted[name] for name in task.class_names},
        "clients": {str(client): len(task.train[client]) for client in chosen},
        "persons": images.persons is not None,
        "policy": policy_of(settings),
    }


def policy_of(settings: SiteSettings) -> dict[str, Any]:
    """Return a site's policy for JSON."""
    policy = settings.policy.model_dump()
    return policy | {"epsilon": None if math.isinf(policy["epsilon"]) else policy["epsilon"]}


def verdict(settings: SiteSettings, proposal: Proposal) -> dict[str, Any]:
    """Return whether a site takes part in an experiment, why not, and what it would spend.

    Raises:
        SordinoError: its own data or encoder are not there.
    """
    site = Site(settings)
    found = objections(settings.policy, proposal)
    listed = [reason for reason in found if not reason.startswith("experiment ")]
    told: dict[str, Any] = {"experiment": proposal.fingerprint, "allowed": not found, "reasons": found}
    if listed:
        return told
    try:
        member = site.membership(proposal)
        member.hello()
        told["epsilon"] = _finite(member.planned_epsilon())
    except MessageError as error:
        told |= {"allowed": False, "reasons": [*found, str(error)]}
    return told


def ledger_of(settings: SiteSettings) -> dict[str, Any]:
    """Return what a site's data released in each experiment, and all of it together."""
    ledger, policy = Site(settings).ledger, settings.policy
    each = {
        experiment: {
            "rounds": list(entry.rounds),
            "epsilon": _finite(ledger.spent_in(experiment, policy.unit, policy.delta)),
            "releases": [asdict(release) for release in entry.ledger.releases],
        }
        for experiment, entry in ledger.experiments.items()
    }
    total = ledger.spent(policy.unit, policy.delta)
    return {
        "site": settings.name,
        "unit": policy.unit,
        "delta": policy.delta,
        "epsilon": _finite(total),
        "budget": _finite(policy.epsilon),
        "experiments": each,
    }


def _finite(epsilon: float) -> float | None:
    """Return epsilon for JSON, which has no infinity."""
    return epsilon if math.isfinite(epsilon) else None
