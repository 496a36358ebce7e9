"""The page of an experiment across machines: who is in, rounds, bytes and epsilon by site; it is written as it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from sordino.errors import RunError
from sordino.files import replace_file
from sordino.privacy.accounting import spent
from sordino.privacy.ledger import ALL_CLIENTS, Ledger, Observer, Unit
from sordino.report.document import Block, Document, Section, document_page
from sordino.report.markup import counted
from sordino.results import human_bytes, listed, rounded_up
from sordino.runtime.agreement import Agreement

State = Literal["running", "finished", "stopped"]
PAGE = "report.html"
SHOWN = 100  # rounds in the table; the last ones


def epsilon_by_site(ledger: Ledger, agreement: Agreement, unit: Unit) -> dict[str, float]:
    """Return what the server knows that each site spent, against the server; infinity where something is not noised.

    Sites that were lost may have spent less: what they were asked for is counted.
    """
    if not ledger.releases and not ledger.disclosures:
        return dict.fromkeys(agreement.sites, 0.0)
    observer: Observer = "public" if "server" in ledger.trusted else "server"
    site_of = {f"client {client}": site for site, clients in agreement.sites.items() for client in clients}
    common = [release for release in ledger.releases if release.party == ALL_CLIENTS]
    by_site = {site: list(common) for site in agreement.sites}
    for release in ledger.releases:
        if release.party in site_of:
            by_site[site_of[release.party]].append(release)
    left = tuple(part for part in ledger.disclosures if part.channel not in ("prompt", "memory"))
    return {
        site: spent(replace(ledger, releases=tuple(own), disclosures=left), observer, unit).epsilon
        for site, own in by_site.items()
    }


def write_page(
    folder: Path,
    title: str,
    experiment: str,
    agreement: Agreement,
    left_out: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    epsilons: Mapping[str, float],
    traffic: Mapping[str, tuple[int, int]],
    rounds: int,
    accuracy: Mapping[str, float | None],
    ledger: Ledger,
    budget: float | None,
    state: State = "running",
) -> None:
    """Write `report.html` of a run directory, all or nothing.

    Args:
        folder: the run directory.
        title: of the page.
        experiment: the fingerprint.
        agreement: who takes part.
        left_out: site to the reason why it does not.
        lines: of the rounds so far, as in `metrics.jsonl`.
        epsilons: by site.
        traffic: site to bytes that it was sent, and that it sent.
        rounds: of the whole run.
        accuracy: "client k" to its accuracy, the last that it told.
        ledger: the coordinator's.
        budget: the epsilon that the run may spend; None if none was set.
        state: whether it goes on, is at its end, or stopped before that.

    Raises:
        RunError: it cannot be written.
    """
    done = [line for line in lines if line["round"]]
    number = done[-1]["round"] if done else 0
    now = {
        "running": "running; reload the page to see how far it is",
        "finished": "finished",
        "stopped": "stopped: rounds were void, or could not be asked",
    }
    sections: list[Section] = [
        {"title": "Sites", "blocks": _sites(agreement, left_out, done, epsilons, traffic, accuracy)},
        {"title": "Rounds", "blocks": _rounds(done)},
    ]
    void = sum(bool(line.get("void")) for line in done)
    lost = sum(bool(line.get("lost") or line.get("lost_clients")) for line in done if not line.get("void"))
    document: Document = {
        "title": title,
        "subtitle": f"Experiment {experiment}",
        "banner": f"Round {number} of {rounds}, {now[state]}",
        "exposed": False,
        "lead": [
            f"{counted(len(agreement.sites), 'site')} with {counted(len(agreement.sizes), 'client')} in all. "
            + (f"{counted(lost, 'round')} went on without somebody. " if lost else "")
            + (f"{counted(void, 'round')} of {len(done):,} {'was' if void == 1 else 'were'} void." if void else "")
            + ("" if lost or void else "Nobody was lost so far."),
            _accuracy_told(accuracy, len(agreement.sizes)),
            _promised(epsilons, ledger, budget),
            "No attack was tried: the coordinator has no pictures, and sordino audit attacks runs that have.",
        ],
        "sections": sections,
        "footer": "Epsilon is what the coordinator's ledger counts, an upper bound; each site's own ledger is exact.",
    }
    try:
        replace_file(folder / PAGE, document_page(document).encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"cannot write {folder / PAGE}: {error.strerror or error}; free space, and go on") from None


def _accuracy_told(accuracy: Mapping[str, float | None], clients: int) -> str:
    told = [value for value in accuracy.values() if value is not None]
    if not told:
        return "No site told its accuracy, so nothing here says how good the prompts are."
    mean = f"Local accuracy is {100 * sum(told) / len(told):.1f}%, the mean"
    if len(told) == clients:
        return f"{mean} over all clients, as their sites told it last."
    some = f"the {counted(len(told), 'client')} of {clients:,} whose sites told it"
    return f"{mean} over {some}; of the rest it says nothing."


def _promised(epsilons: Mapping[str, float], ledger: Ledger, budget: float | None) -> str:
    """Return what was promised and spent so far, by the site that spent most."""
    most = max(epsilons.values(), default=0.0)
    if most == float("inf"):
        return "Nothing here is private: what was learned from the pictures left some site without noise."
    if most == 0:
        return "No noisy release was made so far, and nothing was spent."
    site = max(epsilons, key=lambda name: epsilons[name])
    at = f" at δ = {rounded_up(ledger.delta)}" if ledger.delta else ""
    left = f", of a budget of {budget:g}" if budget is not None and budget < float("inf") else ""
    trusted = f" The {listed(ledger.trusted)} is trusted." if ledger.trusted else ""
    if ledger.simulated:
        as_if = f"as if for ε = {rounded_up(most)}{at}"
        return f"Nothing here is private: noise is simulated and can be drawn again ({as_if})."
    return f"So far at most ε = {rounded_up(most)}{at} was spent, by {site}{left}.{trusted}"


def _sites(
    agreement: Agreement,
    left_out: Mapping[str, str],
    lines: Sequence[Mapping[str, Any]],
    epsilons: Mapping[str, float],
    traffic: Mapping[str, tuple[int, int]],
    accuracy: Mapping[str, float | None],
) -> list[Block]:
    rows = []
    for site, clients in sorted(agreement.sites.items()):
        missed = [line for line in lines if site in line.get("lost", {})]
        sent, received = traffic.get(site, (0, 0))
        told = [value for client in clients if (value := accuracy.get(f"client {client}")) is not None]
        rows.append(
            [
                site,
                str(len(clients)),
                f"{len(missed)}: {missed[-1]['lost'][site]}" if missed else "0",
                f"{human_bytes(sent)} / {human_bytes(received)}",
                rounded_up(epsilons[site], 4) if epsilons[site] < float("inf") else "unbounded",
                f"{100 * sum(told) / len(told):.1f}" if told else "not told",
            ]
        )
    head = ["Site", "Clients", "Rounds without it", "Bytes down / up", "Epsilon", "Accuracy"]
    blocks: list[Block] = [{"table": {"caption": "Who takes part.", "head": head, "rows": rows}}]
    if left_out:
        blocks.append({"items": [f"{site} takes no part: {reason}" for site, reason in sorted(left_out.items())]})
    return blocks


def _rounds(lines: Sequence[Mapping[str, Any]]) -> list[Block]:
    rows = []
    for line in reversed(lines[-SHOWN:]):
        without = [f"{site}: {reason}" for site, reason in line.get("lost", {}).items()]
        without += [] if without else [f"client {c}: {why}" for c, why in line.get("lost_clients", {}).items()]
        told = ([f"void: {line['void']}"] if line.get("void") else []) + without
        row = [str(line["round"]), str(line["participants"]), f"{line['seconds']:.1f}"]
        row += [human_bytes(each * line["participants"]) for each in (line["broadcast_bytes"], line["upload_bytes"])]
        mean = (line.get("accuracy") or {}).get("local")
        row += ["" if mean is None else f"{100 * mean:.1f}", _spent(line), "\n".join(told) or "nobody"]
        rows.append(row)
    head = ["Round", "Clients", "Seconds", "Bytes down", "Bytes up", "Accuracy", "Epsilon so far", "Without"]
    caption = f"The last {len(rows)} rounds." if len(lines) > SHOWN else "All rounds so far."
    return [{"table": {"caption": caption, "head": head, "rows": rows}}]


def _spent(line: Mapping[str, Any]) -> str:
    """Return the most that a site had spent after a round; nothing where it was not counted then."""
    if "epsilon_spent" not in line:
        return ""
    return "unbounded" if line["epsilon_spent"] is None else rounded_up(line["epsilon_spent"])
