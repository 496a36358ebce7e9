"""The verdict: three sentences for a reader who has one minute, on accuracy, on privacy, and on attacks.

All numbers are those of the tables below it. A difference is claimed only if its interval of 95% leaves zero out; else
the sentence says that it is not shown. With one seed, two methods have no interval, so none is called better.
"""

from collections.abc import Sequence
from html import escape

from sordino.report.groups import EPSILON, Group, settings_of
from sordino.report.sections.evidence import Evidence, evidence
from sordino.results import MEASURES, Interval, Measure, listed, points, rounded_up

# What a method is held against: no training, random vectors, what class frequencies alone give, training alone, and
# pooled data.
YARDSTICKS = ("zero-shot", "random-prompt", "class-prior", "local", "central")
AGAINST = ("local", "class-prior")

_NAMED = 3  # groups that a sentence names; more are counted


def verdict(groups: Sequence[Group]) -> str:
    """Return the section."""
    sentences = "".join(
        f"<p><strong>{topic}.</strong> {escape(sentence)}</p>\n" for topic, sentence in verdict_sentences(groups)
    )
    return (
        f'<section class="verdict" aria-labelledby="verdict"><h2 id="verdict">In short</h2>\n{sentences}'
        f'<p class="none">{escape(_how_sure(groups))}</p></section>\n'
    )


def verdict_sentences(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """Return three topics, each with its sentence, as plain text."""
    return [("Accuracy", _accuracy(groups)), ("Privacy", _privacy(groups)), ("Attacks", _attacks(groups))]


def contenders(groups: Sequence[Group]) -> list[Group]:
    """Return the groups that can be the best: those that learned, without yardsticks if there are others."""
    learned = [group for group in groups if not _hand_written_itself(group)]
    methods = [group for group in learned if _algorithm(group) not in YARDSTICKS]
    return methods or learned or list(groups)


def best_of(groups: Sequence[Group]) -> tuple[Group, Measure] | None:
    """Return the contender with the highest accuracy, and the measure that it is compared by; None without one."""
    among = contenders(groups)
    for measure in MEASURES:
        means = {index: group.results.accuracy(measure) for index, group in enumerate(among)}
        known = {index: spread.mean for index, spread in means.items() if spread}
        if known:
            return among[max(known, key=lambda index: known[index])], measure
    return None


def _accuracy(groups: Sequence[Group]) -> str:
    best = best_of(groups)
    if best is None:
        return "No accuracy was measured, so nothing here says how good the prompts are."
    if not _comparable(groups):
        return (
            "These runs differ in their data, encoder or number of clients, so none of them is called the best; the "
            "table has the accuracy of each."
        )
    group, measure = best
    spread = group.results.accuracy(measure)
    assert spread is not None
    rivals = [other for other in contenders(groups) if other is not group and other.results.accuracy(measure)]
    if rivals:
        start = f"Of {len(rivals) + 1} {_kind(groups)}, {short(group)} has the highest {measure} accuracy"
    else:
        start = f"{short(group)} has a {measure} accuracy of"
    if _hand_written_itself(group):
        return f"{start} {points(spread.mean)}%, that of the hand-written prompt: nothing was learned."
    clauses = [f"{start}{',' if rivals else ''} {points(spread.mean)}%{_beside(group, measure)}"]
    clauses += [_lead(group, rivals, measure)] if rivals else []
    clauses.append(_over_hand_written(group, measure))
    clauses += [_over(group, other, measure) for other in _stand_beside(group, groups, measure)]
    return "; ".join(clauses) + "."


def _kind(groups: Sequence[Group]) -> str:
    among = contenders(groups)
    return "methods" if len({_algorithm(group) for group in among}) == len(among) else "variants"


def _beside(group: Group, measure: Measure) -> str:
    """Return the neighbor accuracy, where a local one leads: a prompt may know its own classes only."""
    neighbor = group.results.accuracy("neighbor")
    return f" (neighbor {points(neighbor.mean)}%)" if measure == "local" and neighbor else ""


def _lead(group: Group, rivals: Sequence[Group], measure: Measure) -> str:
    """Return which rivals are surely behind, and which are not told apart."""
    changes = [(other, group.results.difference(other.results, measure)) for other in rivals]
    level = [short(other) for other, change in changes if change is None or not change.above]
    if not level:
        return "it is ahead of each of the others" if len(rivals) > 1 else f"it is ahead of {short(rivals[0])}"
    seeds = _seeds(group)
    return f"{seeds} {'does' if seeds == 'one seed' else 'do'} not tell it apart from {_named(level)}"


def _over_hand_written(group: Group, measure: Measure) -> str:
    gain, given = group.results.gain(measure), group.results.hand_written(measure)
    if gain is None or given is None:
        return "the hand-written prompt's accuracy is not known"
    return _compared(gain, f"the hand-written prompt's {points(given)}%")


def _stand_beside(group: Group, groups: Sequence[Group], measure: Measure) -> list[Group]:
    """Return the best group of each yardstick that needs no federation."""
    found = []
    for algorithm in AGAINST:
        same = [other for other in groups if _algorithm(other) == algorithm and other is not group]
        known = [(spread.mean, -at) for at, other in enumerate(same) if (spread := other.results.accuracy(measure))]
        found += [same[-max(known)[1]]] if known else []
    return found


def _over(group: Group, other: Group, measure: Measure) -> str:
    spread, change = other.results.accuracy(measure), group.results.difference(other.results, measure)
    name = f"the {points(spread.mean)}% of {short(other)}{_beside(other, measure)}" if spread else short(other)
    return _compared(change, name) if change else f"not compared with {name}, of other seeds"


def _compared(change: Interval, name: str) -> str:
    """Return a difference in words: claimed only if its interval leaves zero out."""
    if change.low is None:
        return f"{points(change.mean)} points from {name}, of too few seeds to claim a difference"
    ends = f"95% interval {change.percent()}"
    if change.above:
        return f"{points(change.mean)} points better than {name} ({ends})"
    if change.below:
        return f"{points(-change.mean)} points worse than {name} ({ends} of the difference)"
    return f"not shown to differ from {name} ({points(change.mean)} points, {ends})"


def _privacy(groups: Sequence[Group]) -> str:
    learned = [group for group in groups if not learned_nothing(group)]
    if not learned:
        return "Nothing was learned from the images, so there is nothing to protect."
    promised = [group for group in learned if _promises(group)]
    simulated = [group for group in learned if group.results.claim.bounded and group.results.claim.simulated]
    open_ones = [group for group in learned if not group.results.claim.bounded]
    if not promised and not simulated:
        return (
            "Nothing here is private: what was learned from the images left the clients with no noise that bounds it."
        )
    clauses = []
    if promised:
        clauses.append(f"{_promise(promised, len(learned) == 1)}{_trust(promised)}")
        clauses += _cost(promised, groups)
    else:
        epsilons = _epsilons(simulated)
        clauses.append(f"Nothing here is private: noise was simulated and can be drawn again (as if for {epsilons})")
    if promised and simulated:
        clauses.append(f"{_named([short(group) for group in simulated])} only simulated noise, which protects nobody")
    if open_ones:
        clauses.append(f"not private: {_named([short(group) for group in open_ones])}")
    return "; ".join(clauses) + "."


def _promise(promised: Sequence[Group], alone: bool) -> str:
    units = list(dict.fromkeys(unit for group in promised for unit in group.results.claim.units))
    whom = f" for each {listed(units)}" if units else ""
    if alone:
        return f"{short(promised[0])} promises {_epsilons(promised)}{whom}"
    lines = list(dict.fromkeys(group.line.replace(", ", " ") for group in promised))
    return f"{_named(lines)} promised {_epsilons(promised)}{whom}"


def _epsilons(groups: Sequence[Group]) -> str:
    claims = [group.results.claim for group in groups]
    known = sorted({claim.epsilon for claim in claims if claim.epsilon is not None})
    low, high = rounded_up(known[0]), rounded_up(known[-1])
    deltas = sorted({claim.delta for claim in claims if claim.delta})
    at = f" at δ = {rounded_up(deltas[-1])}" + (" or less" if len(deltas) > 1 else "") if deltas else ""
    return (f"ε = {low}" if low == high else f"ε from {low} to {high}") + at


def _trust(promised: Sequence[Group]) -> str:
    trusted = {observer for group in promised for run in group.runs for observer in run.summary.privacy.trusted}
    return f", if the {listed(sorted(trusted))} can be trusted" if trusted else ""


def _cost(promised: Sequence[Group], groups: Sequence[Group]) -> list[str]:
    """Return the cost in accuracy of the most accurate promise, at the largest and the smallest of its epsilons."""
    best = best_of(promised)
    if best is None:
        return []
    group, measure = best
    line = [other for other in promised if other.line == group.line]
    line.sort(key=lambda other: other.results.claim.epsilon or 0.0, reverse=True)
    ends = line if len(line) < 2 else [line[0], line[-1]]
    without = _without_noise(group, groups)
    if without is None:
        return [
            f"what this cost in accuracy is not known, as no run of {short(group)} with the same other settings and no "
            "noise is beside it"
        ]
    told = [
        f"{short(other)} {_costs(change, measure)}"
        for other in ends
        if (change := other.results.difference(without.results, measure))
    ]
    return [f"against {short(without)}, without noise, {' and '.join(told)}"] if told else []


def _costs(change: Interval, measure: Measure) -> str:
    if change.low is None:
        return f"differs by {points(change.mean)} points, of too few seeds to claim a cost"
    ends = f"95% interval {change.percent()}"
    if change.below:
        return f"costs {points(-change.mean)} points of {measure} accuracy ({ends} of the difference)"
    if change.above:
        return f"is better by {points(change.mean)} points of {measure} accuracy ({ends})"
    return f"is not shown to cost {measure} accuracy ({points(change.mean)} points, {ends})"


def _without_noise(group: Group, groups: Sequence[Group]) -> Group | None:
    """Return the same method with the same settings but those of privacy, and without noise; None if it was not run.

    One that also clips and samples, at infinite epsilon, is preferred: then noise is the only difference.
    """
    wanted = _but_privacy(group)
    same = [other for other in groups if not other.results.claim.bounded and _but_privacy(other) == wanted]
    same.sort(key=lambda other: settings_of(other.runs[0]).get(EPSILON) != float("inf"))
    return next(iter(same), None)


def _but_privacy(group: Group) -> dict[str, object]:
    settings = settings_of(group.runs[0])
    return {name: value for name, value in settings.items() if not name.startswith("privacy.")}


def _attacks(groups: Sequence[Group]) -> str:
    found = [(group, evidence(run)) for group in groups for run in group.runs if run.audit]
    made = [(group, part) for group, part in found if part.tried]
    if not made:
        promised = any(_promises(group) for group in groups)
        open_question = "nothing here tests what is promised" if promised else "what an attacker learns is not known"
        return f"No attack was tried, so {open_question}: sordino audit RUN tries."
    refuted = list(dict.fromkeys(short(group) for group, part in made if part.refuted))
    if refuted:
        bound = max(part.shown for _, part in made if part.refuted)
        return f"An attack refutes the claim of {_named(refuted)}: it shows ε of at least {bound:.3g}."
    labels = list(dict.fromkeys(short(group) for group, _ in made))
    clauses = [f"On {_named(labels)}, {_membership([part for _, part in made])}"]
    clauses += _bounds([part for _, part in made])
    clauses += [words for _, part in made for words in part.others][:_NAMED]
    untried = [group for group in groups if short(group) not in labels and not learned_nothing(group)]
    clauses += ["none was tried on the others"] if untried else []
    quiet = not any(guess.low > 0.5 for _, part in made for guess in part.guesses)
    clauses += ["an attack that finds nothing proves nothing"] if quiet else []
    return "; ".join(clauses) + "."


def _membership(parts: Sequence[Evidence]) -> str:
    guesses = [guess for part in parts for guess in part.guesses]
    if not guesses:
        return "no attack on membership was made"
    right = [guess for guess in guesses if guess.low > 0.5]
    best = max(right or guesses, key=lambda guess: guess.auc)
    ends = f"{best.auc:.2f}, 95% interval {best.low:.2f} to {best.high:.2f}"
    if not right:
        return f"none of {len(guesses)} attacks on membership is shown to beat guessing (highest AUC {ends})"
    return f"{len(right)} of {len(guesses)} attacks on membership beat guessing (highest AUC {ends})"


def _bounds(parts: Sequence[Evidence]) -> list[str]:
    """Return the largest bound on epsilon that was shown, beside the claim that it tests."""
    bounds = [bound for part in parts for bound in part.bounds]
    if not bounds:
        return []
    most = max(bounds, key=lambda bound: bound.shown)
    claim = "where nothing is claimed" if most.claimed is None else f"where {rounded_up(most.claimed)} is claimed"
    shown = f"ε of at least {most.shown:.3g}" if most.shown > 0 else "no ε above 0"
    return [f"they show {shown} {claim}"]


def _how_sure(groups: Sequence[Group]) -> str:
    """Return how much weight these sentences bear."""
    count = len(contenders(groups))
    text = f"Rests on {listed(dict.fromkeys(_seeds(group) for group in groups))}"
    text += ", on these test pictures. Intervals are of 95%, each for itself."
    if count > 1:
        text += f" The best of {count} was chosen on the same pictures, which flatters it."
    if len(groups) == 1 and not groups[0].over_seeds:
        text += " That of one run is over clients and test pictures: another seed may differ by more."
    return text


def short(group: Group) -> str:
    """Return a group's label without commas, so that it can stand in a list."""
    return group.label.replace(", ", " ")


def _seeds(group: Group) -> str:
    count = len(group.runs)
    return "one seed" if count == 1 else f"{count} seeds"


def _named(labels: Sequence[str], most: int = _NAMED) -> str:
    rest = len(labels) - most
    return listed(labels) if rest <= 1 else f"{', '.join(labels[:most])} and {rest} more"


def _comparable(groups: Sequence[Group]) -> bool:
    runs = [run.summary for group in groups for run in group.runs]
    return len({(run.dataset, run.encoder, run.clients) for run in runs}) == 1


def _algorithm(group: Group) -> str:
    return group.runs[0].summary.algorithm


def _hand_written_itself(group: Group) -> bool:
    return all(run.summary.hand_written is not None and run.summary.hand_written.itself for run in group.runs)


def learned_nothing(group: Group) -> bool:
    """Return True if the runs tell nothing about images to anybody, by their own statement."""
    claim = group.results.claim
    return _hand_written_itself(group) or (claim.private and claim.epsilon == 0)


def _promises(group: Group) -> bool:
    return group.results.claim.private and not learned_nothing(group)
