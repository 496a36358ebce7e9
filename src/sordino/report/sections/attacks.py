"""The section on attacks: claims, and what was shown against them."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from sordino.report.groups import Group
from sordino.report.markup import NONE, html_table
from sordino.report.sections.bounds import claimed_and_shown
from sordino.report.sections.evidence import copied, membership_attacks, of_audit, of_one_image, stolen
from sordino.report.sections.roc import curves
from sordino.results import Privacy, rounded_up


def audits(groups: Sequence[Group]) -> str:
    """Return the section on attacks, a row a run that was attacked.

    It shows the run's claim, the lower bound that was shown, and the success of each attack.
    """
    audited = [(index, group, run) for index, group in enumerate(groups) for run in group.runs if run.audit]
    if not audited:
        return ""
    rows, guesses, unbounded = [], [], list[str]()
    for _, group, run in audited:
        seed = f" <small>(seed {run.summary.seed})</small>" if group.over_seeds else ""
        name = escape(group.label) + seed
        row, guessed, reasons = of_audit(run, _told)
        rows.append([name, _claim(run.summary.privacy), *row])
        guesses += [[name, *cells] for cells in guessed]
        unbounded += [f"{name}: {escape(reason)}." for reason in reasons]
    head = [
        "Run",
        "Claimed ε",
        "Shown ε, at least",
        "Images recognized from an upload, %",
        "Stolen prompt, local accuracy, %",
        "Copy from answers, local accuracy, %",
        "Prompt from opened distances, cosine",
    ]
    caption = "Claims and attacks. An attack that finds nothing proves nothing; one that succeeds does."
    table = html_table(caption, head, rows, "Claims and attacks by run")
    return (
        '<section aria-labelledby="audit"><h2 id="audit">Attacked</h2>\n'
        f"{table}<p><em>Shown ε</em>: the lower bound of the one-run audit with canaries, at 95% confidence, for the "
        "attacked run's mechanism trained once more; above the claim, the claim is false. <em>Images recognized</em>: "
        "by the server, from a client's upload of one image, with the share that chance gives. <em>Stolen prompt</em>: "
        "the mean over clients of the personal prompt that the server can replay from uploads, beside the client's "
        "own. <em>Copy from answers</em>: one that fits what a service tells by default, beside the owners' own. "
        "<em>Prompt from opened distances</em>: how near the server comes to a client's prompt with the distances "
        "that it clusters by and the help of the other clients, beside what the cluster's mean shows it anyway."
        f"</p>\n{claimed_and_shown(audited)}{_guesses(guesses, unbounded)}{curves(audited)}</section>\n"
    )


def _told(attacks: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """Return the cells of an audit's row, those of each attack on membership, and reasons why these bound nothing."""
    row = [
        _bound(attacks.get("canaries", {})),
        _inversion(attacks),
        _stealing(attacks),
        _copied(attacks),
        _distances(attacks.get("distances", {})),
    ]
    made = list(membership_attacks(attacks))
    reasons = dict.fromkeys(str(attack["no_bound"]) for _, attack, _ in made if attack.get("no_bound"))
    return row, [[title, *_guessed(attack)] for title, attack, _ in made], list(reasons)


def _guesses(rows: Sequence[Sequence[str]], unbounded: Sequence[str]) -> str:
    """Return the table of membership inference, a row an attack; nothing if there was none.

    Args:
        rows: cells.
        unbounded: markup that says of a run why pairs bound nothing.
    """
    if not rows:
        return ""
    head = [
        "Run",
        "Attack",
        "AUC",
        "Found at 0.1% false positives, %",
        "Found at 1% false positives, %",
        "Shown ε, at least",
    ]
    caption = "Membership inference: was an image trained on?"
    return (
        html_table(caption, head, rows, "Membership inference by run and attack")
        + "<p><em>AUC</em>: half is guessing, with its 95% interval. LiRA, RMIA and shadow models attack the published "
        "prompts. <em>Uploads over rounds</em>: the server compares each client's uploads with those of the others. "
        "<em>Statistics</em>: the images' products with the class statistics that were released, and their "
        "coefficients in them. "
        "<em>Shown ε</em>: a lower bound at 95% confidence, by pairs of a member and a non-member; n/a where they were "
        f"not drawn at random, one by one.{''.join(f' {words}' for words in unbounded)}</p>\n"
    )


def _guessed(attack: Mapping[str, Any]) -> list[str]:
    """Return the cells of an attack's AUC, its shares of members found, and its bound on epsilon."""
    if "reason" in attack:
        return [_reason(attack), NONE, NONE, NONE]
    low, high = attack["auc_interval"]
    bound = attack.get("epsilon")
    shown = NONE if bound is None else f"{bound:.3g}"
    if attack.get("refuted"):
        shown = f'<strong class="exposed">{shown}, which refutes the claim</strong>'
    return [
        f"{attack['auc']:.3f} <small>({low:.3f} to {high:.3f})</small>",
        *(f"{100 * point['true_positive_rate']:.1f}" for point in attack["found"]),
        shown,
    ]


def _claim(claimed: Privacy) -> str:
    if claimed.epsilon is None:
        return "none"
    delta = f" <small>(δ = {claimed.delta:.1g})</small>" if claimed.delta else ""
    return ("simulated " if claimed.simulated else "") + f"{rounded_up(claimed.epsilon)}{delta}"


def _bound(canaries: Mapping[str, Any]) -> str:
    if "epsilon" not in canaries:
        return _reason(canaries)
    claim = canaries["claimed_epsilon"]
    claimed = "nothing claimed" if claim is None else f"of {rounded_up(claim)} at δ = {canaries['delta']:.1g}"
    text = f"{canaries['epsilon']:.3g} <small>({claimed})</small>"
    return f'<strong class="exposed">{text}, which refutes the claim</strong>' if canaries["refuted"] else text


def _inversion(attacks: Mapping[str, Any]) -> str:
    if (found := of_one_image(attacks)) is None:
        return _reason(attacks.get("inversion", {}))
    return f"{100 * found[0]:.0f} <small>(chance {100 * found[1]:.1g})</small>"


def _stealing(attacks: Mapping[str, Any]) -> str:
    if (found := stolen(attacks)) is None:
        return _reason(attacks.get("stealing", {}))
    return f"{100 * found[0]:.1f} <small>(own {100 * found[1]:.1f})</small>"


def _copied(attacks: Mapping[str, Any]) -> str:
    if (found := copied(attacks)) is None:
        return _reason(attacks.get("extraction", {}))
    queries, theirs, own, written = found
    others = f"{queries:,} questions; own {100 * own:.1f}, hand-written {100 * written:.1f}"
    return f"{100 * theirs:.1f} <small>({others})</small>"


def _distances(distances: Mapping[str, Any]) -> str:
    best, mean = distances.get("by_best"), distances.get("by_mean")
    if not best:
        return _reason(distances)
    return f"{best['cosine']:.2f}" + (f" <small>(mean {mean['cosine']:.2f})</small>" if mean else "")


def _reason(attack: Mapping[str, Any]) -> str:
    """Return the reason why an attack does not apply, in small print that wraps; n/a where none was given."""
    if not attack.get("reason"):
        return NONE
    return f'<span class="words"><small>{escape(attack["reason"])}</small></span>'
