"""The words of `sordino site`."""

from __future__ import annotations

from typing import Any

from sordino.report.markup import counted
from sordino.results import human_bytes, rounded_up


def facts_as_text(facts: dict[str, Any]) -> str:
    """Return what a site's file means."""
    policy = facts["policy"]
    classes = ", ".join(f"{name} ({count:,})" for name, count in facts["classes"].items())
    clients = ", ".join(f"{client} ({count:,})" for client, count in facts["clients"].items())
    counted = f"{len(facts['clients'])} clients that train on: {clients}"
    held = counted if len(facts["clients"]) > 1 else f"it trains on {sum(facts['clients'].values()):,}"
    at = f"at delta = {policy['delta']:g} for one {policy['unit']}, in all experiments."
    budget = (
        f"It sets no bound on epsilon, which is counted {at}"
        if policy["epsilon"] is None
        else f"It spends at most epsilon = {policy['epsilon']:g} {at}"
    )
    units = {"example": sum(facts["clients"].values()), "client": len(facts["clients"])}.get(policy["unit"], 1)
    if units > 1 and policy["delta"] * units >= 1:
        budget += (
            f" That says nothing: who publishes one of {units:,} in the clear keeps to it. Set policy.delta below "
            f"1/{units}."
        )
    allowed = [*policy["experiments"], *(f"signed by {file}" for file in policy["signers"])]
    return "\n".join(
        [
            f"{facts['name']}: {len(facts['classes'])} classes: {classes}; {held}.",
            f"It knows whose each picture is: {'yes' if facts['persons'] else 'no'}.",
            f"It allows: {', '.join(allowed) or 'no experiment yet'}; mechanisms "
            f"{', '.join(policy['mechanisms'])}; noise by {', '.join(policy['noise_by'])}.",
            budget,
            f"It tells: {', '.join(policy['tells']) or 'nothing'}; uploads' tensors: {', '.join(policy['fields'])}.",
            f"State: {facts['state']}",
        ]
    )


def verdict_as_text(verdict: dict[str, Any], facts: dict[str, Any]) -> str:
    """Return whether a site takes part in an experiment."""
    lines = [f"Experiment {verdict['experiment']}"]
    if "epsilon" in verdict:
        policy, epsilon = facts["policy"], verdict["epsilon"]
        spent = "unbounded epsilon" if epsilon is None else f"epsilon = {rounded_up(epsilon, 4)}"
        lines.append(f"It would spend {spent} at delta = {policy['delta']:g} for one {policy['unit']}.")
    if verdict["allowed"]:
        lines.append(f"{facts['name']} takes part.")
    else:
        lines += [f"{facts['name']} takes no part: {reason}" for reason in verdict["reasons"]]
    return "\n".join(lines)


def ledger_as_text(ledger: dict[str, Any]) -> str:
    """Return what a site's data released."""

    def words(epsilon: float | None) -> str:
        return "unbounded" if epsilon is None else rounded_up(epsilon, 4)

    lines = []
    for experiment, entry in ledger["experiments"].items():
        rounds = [number for number in entry["rounds"] if number]
        parts = [f"{len(rounds)} rounds"] if rounds else []
        parts += ["a release of statistics"] if 0 in entry["rounds"] else []
        lines.append(f"{experiment}: {' and '.join(parts) or 'nothing'}; epsilon {words(entry['epsilon'])}")
    at = f"at delta = {ledger['delta']:g} for one {ledger['unit']}"
    bound = f"{at}; no budget is set" if ledger["budget"] is None else f"of {ledger['budget']:g} {at}"
    total = f"{ledger['site']}: epsilon {words(ledger['epsilon'])} {bound}"
    return "\n".join([*lines, total])


def round_as_text(line: dict[str, Any]) -> str:
    """Return a round of an experiment across machines in a line, or whom it waits for."""
    if line.get("waits"):
        sites = "; ".join(f"{site}: {reason}" for site, reason in line["lost"].items())
        return f"round {line['round']} waits: {sites}"
    parts = [f"{line['seconds']:.1f} s"]
    if (clients := line.get("participants")) is not None:
        down, up = (human_bytes(clients * line[key]) for key in ("broadcast_bytes", "upload_bytes"))
        parts += [counted(clients, "client"), f"{down} down, {up} up"]
    if (mean := (line.get("accuracy") or {}).get("local")) is not None:
        parts.append(f"accuracy {100 * mean:.1f}")
    if epsilons := line.get("epsilon"):
        site = max(epsilons, key=lambda name: float("inf") if epsilons[name] is None else epsilons[name])
        spent = epsilons[site]
        parts.append("epsilon unbounded" if spent is None else f"epsilon {rounded_up(spent)} at {site}, the most")
    told = [f"void: {line['void']}"] if line.get("void") else []
    told += [f"without {site}: {reason}" for site, reason in line.get("lost", {}).items()]
    return "; ".join([f"round {line['round']}: {', '.join(parts)}", *told])
