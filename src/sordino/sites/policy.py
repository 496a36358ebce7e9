"""The site has the last word: what its policy says of an experiment. No message can change it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sordino.algorithms.base import named_tensors
from sordino.privacy.ledger import Disclosure, Ledger
from sordino.privacy.mechanism import SLACK
from sordino.privacy.signature import load_public_key
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.results.wording import rounded_up
from sordino.runtime.facts import Federation
from sordino.runtime.release import sums_fields
from sordino.sites.ledger import SiteLedger, left
from sordino.sites.proposal import Proposal
from sordino.sites.settings import PolicySettings

ACCURACY = Disclosure("each client's accuracy on its own test pictures, to the server as it trains", "upload")


def objections(policy: PolicySettings, proposal: Proposal) -> list[str]:
    """Return why a site takes no part in an experiment, as far as its tables say; no data is read for it."""
    found = []
    fingerprint = proposal.fingerprint
    named = "any" in policy.experiments or fingerprint in policy.experiments
    if not (named or any(proposal.is_signed_by(key) for key in _keys(policy))):
        listed = "is not in policy.experiments, and none of policy.signers signed it"
        found.append(f"experiment {fingerprint} {listed}")
    privacy = proposal.tables.get("privacy", {})
    mechanism, noise_by = privacy.get("mechanism", "none"), privacy.get("noise_by", "client")
    if mechanism not in policy.mechanisms:
        found.append(f"privacy.mechanism = {mechanism!r} is not in policy.mechanisms = {policy.mechanisms}")
    elif mechanism != "none" and noise_by not in policy.noise_by:
        found.append(f"privacy.noise_by = {noise_by!r} is not in policy.noise_by = {policy.noise_by}")
    elif "none" not in policy.mechanisms and (key := _noiseless(privacy)):
        lacks = f"adds no noise, and policy.mechanisms = {policy.mechanisms} lacks 'none'"
        found.append(f"privacy.{key} = {privacy[key]:g} {lacks}")
    if privacy.get("simulation"):
        found.append("privacy.simulation = true: noise that can be drawn again protects nobody")
    return found


def _noiseless(privacy: Mapping[str, Any]) -> str:
    """Return the key of a `[privacy]` table that says to add no noise; nothing if none does."""
    if (multiplier := privacy.get("noise_multiplier")) is not None:
        return "noise_multiplier" if multiplier == 0 else ""
    return "epsilon" if privacy.get("epsilon") == math.inf else ""


def fields_kept_back(policy: PolicySettings, federation: Federation) -> list[str]:
    """Return the names of tensors that the experiment has leave a client, and that the policy does not let leave."""
    if "*" in policy.fields:
        return []
    mechanism, names = federation.mechanism, list(named_tensors(federation.schemas.upload))
    if mechanism.broadcasts_clip:
        names.append("below_clip")
    if mechanism.compresses:
        names.append("key")
    if isinstance(mechanism, StatisticsMechanism) and mechanism.releases_statistics:
        names = [*sums_fields(mechanism), *names]
    return [name for name in names if name not in policy.fields]


def unnoised(policy: PolicySettings, planned: Ledger) -> str:
    """Return why an experiment is one without noise, which the policy does not allow; nothing if it is allowed.

    Sizes and accuracy are in `policy.tells`, or do not leave: without noise by the owner's own choice.

    Args:
        policy: the site's.
        planned: the experiment's ledger as its whole plan will leave it.
    """
    if "none" in policy.mechanisms:
        return ""
    told = left(planned)
    parts = tuple(part for part in told.disclosures if part != ACCURACY and part.channel != "sizes")
    told = replace(told, disclosures=parts)
    if told.noised:
        return ""
    what = told.disclosures[0].content if told.disclosures else "a release whose noise is 0"
    return f"without noise it gives away: {what}; policy.mechanisms = {policy.mechanisms} lacks 'none'"


def over_budget(policy: PolicySettings, ledger: SiteLedger, experiment: str, after: Ledger) -> str:
    """Return why an experiment is not within the site's budget, with the numbers; nothing if it is.

    Args:
        policy: the site's.
        ledger: of all its experiments so far.
        experiment: the fingerprint.
        after: the experiment's ledger as it will be.
    """
    if math.isinf(policy.epsilon):  # accounting takes a second or more
        return ""
    total = ledger.spent(policy.unit, policy.delta, {experiment: after})
    if total <= policy.epsilon + SLACK:
        return ""
    before = ledger.spent(policy.unit, policy.delta)
    return (
        f"with it epsilon would be {_words(total)} for one {policy.unit} over all experiments, at delta = "
        f"{policy.delta:g}; policy.epsilon = {policy.epsilon:g}, and {_words(before)} is spent"
    )


def _words(epsilon: float) -> str:
    return "inf" if math.isinf(epsilon) else rounded_up(epsilon, 4)


def _keys(policy: PolicySettings) -> list[bytes]:
    return [load_public_key(Path(file), "policy.signers") for file in policy.signers]
