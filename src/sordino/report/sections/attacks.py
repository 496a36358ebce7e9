"""The section on attacks: claims, and what was shown against them."""

from collections.abc import Sequence
from html import escape
from typing import Any

from sordino.report.figures import color
from sordino.report.groups import Group
from sordino.report.markup import NONE, Figure, html_table, place, plain
from sordino.report.runs import Run
from sordino.results import Privacy, rounded_up

_TITLES = {"lira": "LiRA", "rmia": "RMIA", "rmia_offline": "RMIA, offline", "shadow_attack": "shadow models"}
_DASHES = {"LiRA": "solid", "RMIA": "dash", "uploads over rounds": "dot", "statistics, regression": "dashdot"}


def audits(groups: Sequence[Group]) -> str:
    """Return the section on attacks, a row a run that was attacked.

    It shows the run's claim, the lower bound that was shown, and the success of each attack.
    """
    audited = [(index, group, run) for index, group in enumerate(groups) for run in group.runs if run.audit]
    if not audited:
        return ""
    rows, guesses = [], []
    for _, group, run in audited:
        attacks = (run.audit or {}).get("attacks", {})
        seed = f" <small>(seed {run.summary.seed})</small>" if group.over_seeds else ""
        name = escape(group.label) + seed
        rows.append(
            [
                name,
                _claim(run.summary.privacy),
                _bound(attacks.get("canaries", {})),
                _inversion(attacks.get("inversion", {})),
                _stealing(attacks.get("stealing", {})),
                _distances(attacks.get("distances", {})),
            ]
        )
        guesses += [[name, title, *_guessed(attack)] for title, attack in _membership_attacks(attacks)]
    head = [
        "Run",
        "Claimed ε",
        "Shown ε, at least",
        "Images recognized from an upload, %",
        "Stolen prompt, local accuracy, %",
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
        "own. <em>Prompt from opened distances</em>: how near the server comes to a client's prompt with the distances "
        "that it clusters by and the help of the other clients, beside what the cluster's mean shows it anyway."
        f"</p>\n{_guesses(guesses)}{_curves(audited)}</section>\n"
    )


def _guesses(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of membership inference, a row an attack; nothing if there was none."""
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
        "not split at random.</p>\n"
    )


def _membership_attacks(attacks: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the attacks that guess members, by title; one that does not apply is its reason."""
    membership, over_rounds = attacks.get("membership", {}), attacks.get("rounds", {})
    release = attacks.get("release", {})
    made = [(title, membership[name]) for name, title in _TITLES.items() if name in membership]
    made += [("membership", membership)] if "reason" in membership else []
    made += [(f"statistics, {name}", release[name]) for name in ("product", "regression") if name in release]
    made += [("statistics", release)] if "reason" in release else []
    if over_rounds:
        made.append(("uploads over rounds", over_rounds.get("attack", over_rounds)))
    return made


def _guessed(attack: dict[str, Any]) -> list[str]:
    """Return the cells of an attack's AUC, its shares of members found, and its bound on epsilon."""
    if "reason" in attack:
        return [f"<small>{escape(attack['reason'])}</small>", NONE, NONE, NONE]
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


def _bound(canaries: dict[str, Any]) -> str:
    if "epsilon" not in canaries:
        return f"<small>{escape(canaries['reason'])}</small>" if "reason" in canaries else NONE
    claim = canaries["claimed_epsilon"]
    claimed = "nothing claimed" if claim is None else f"of {rounded_up(claim)} at δ = {canaries['delta']:.1g}"
    text = f"{canaries['epsilon']:.3g} <small>({claimed})</small>"
    return f'<strong class="exposed">{text}, which refutes the claim</strong>' if canaries["refuted"] else text


def _inversion(inversion: dict[str, Any]) -> str:
    of_one_image = next((attack for attack in inversion.get("attacks", ()) if attack["size"] == 1), None)
    if of_one_image is None:
        return f"<small>{escape(inversion['reason'])}</small>" if inversion.get("reason") else NONE
    recognized, chance = of_one_image["reidentified"], of_one_image["reidentified_chance"]
    return f"{100 * recognized:.0f} <small>(chance {100 * chance:.1g})</small>"


def _stealing(stealing: dict[str, Any]) -> str:
    victims = stealing.get("victims")
    if not victims:
        return f"<small>{escape(stealing['reason'])}</small>" if stealing.get("reason") else NONE
    stolen = sum(victim["by_server"]["local_accuracy"] for victim in victims) / len(victims)
    victims_own = sum(victim["local_accuracy"] for victim in victims) / len(victims)
    return f"{100 * stolen:.1f} <small>(own {100 * victims_own:.1f})</small>"


def _distances(distances: dict[str, Any]) -> str:
    best, mean = distances.get("by_best"), distances.get("by_mean")
    if not best:
        return f"<small>{escape(distances['reason'])}</small>" if distances.get("reason") else NONE
    return f"{best['cosine']:.2f}" + (f" <small>(mean {mean['cosine']:.2f})</small>" if mean else "")


def _curves(audited: Sequence[tuple[int, Group, Run]]) -> str:
    """Return ROC curves of the attacks, on logarithmic axes as the left edge matters most."""
    data: list[Figure] = [_guessing()]
    for index, group, run in audited:
        attacks = (run.audit or {}).get("attacks", {})
        for name, attack in _membership_attacks(attacks):
            if name not in _DASHES or "curve" not in attack:
                continue
            data.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "name": plain(f"{group.label}, seed {run.summary.seed}: {name}"),
                    "x": [max(x, 1e-4) for x, _ in attack["curve"]],
                    "y": [max(y, 1e-4) for _, y in attack["curve"]],
                    "line": {"color": color(index), "dash": _DASHES[name], "width": 2},
                    "meta": {"series": index},
                }
            )
    if len(data) == 1:
        return ""
    axis = {"type": "log", "range": [-3.3, 0], "tickformat": ".1%"}
    layout = {
        "height": 380,
        "margin": {"l": 64, "r": 8, "t": 8, "b": 48},
        "legend": {"orientation": "h", "y": -0.2},
        "xaxis": axis | {"title": {"text": "False positive rate"}},
        "yaxis": axis | {"title": {"text": "True positive rate"}},
    }
    return (
        "<figure>\n"
        + place("roc", {"data": data, "layout": layout}, "ROC curves of membership inference; the table has AUCs.")
        + "<figcaption>Membership inference by LiRA (solid), RMIA (dashed) and the uploads over rounds (dotted), "
        "both axes logarithmic.</figcaption></figure>\n"
    )


def _guessing() -> Figure:
    line = {"color": "#888888", "dash": "dot", "width": 1}
    return {"type": "scatter", "mode": "lines", "name": "guessing", "x": [1e-4, 1], "y": [1e-4, 1], "line": line}
