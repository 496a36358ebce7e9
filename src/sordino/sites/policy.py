"""The site has the last word: what its policy says of an experiment. No message can change it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from sordino.algorithms.base import named_tensors
from sordino.privacy.ledger import Ledger
from sordino.privacy.mechanism import SLACK
from sordino.privacy.signature import load_public_key
from sordino.results.wording import rounded_up
from sordino.runtime.facts import Federation
from sordino.sites.ledger import SiteLedger
from sordino.sites.proposal import Proposal
from sordino.sites.settings import PolicySettings


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
    if privacy.get("simulation"):
        found.append("privacy.simulation = true: noise that can be drawn again protects nobody")
    return found


def fields_kept_back(policy: PolicySettings, federation: Federation) -> list[str]:
    """Return the names of an upload's tensors that the policy lets not leave."""
    if "*" in policy.fields:
        return []
    names: Iterable[str] = named_tensors(federation.schemas.upload)
    if federation.mechanism.broadcasts_clip:
        names = [*names, "below_clip"]
    return [name for name in names if name not in policy.fields]


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
