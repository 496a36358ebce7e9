"""The page's tables, and how it puts numbers into words."""

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Context
from html import escape

from sordino.report.figures import human_bytes
from sordino.report.groups import MEASURES, Group, Spread
from sordino.report.runs import Measure

_KEYS = 24  # a key with more marks is cut
_PERSONAL: tuple[Measure, ...] = ("local", "neighbor", "overall")
_TERMS = {
    "local": "test images of the classes that a client holds",
    "neighbor": "of the classes that only other clients hold",
    "overall": "of all classes",
    "novel": "of classes that nobody trained on",
    "domain": "of a domain that was held out",
}
_BACKDOOR = (
    " <em>Backdoor</em>: test images of other classes that an attacker's trigger makes a client's prompt take for the "
    "attacker's target."
)


def results(groups: Sequence[Group]) -> str:
    measures = [
        measure for measure in MEASURES if measure in _PERSONAL or any(group.accuracy(measure) for group in groups)
    ]
    varying = [
        (name, field)
        for name, field in (
            ("Data set", "dataset"),
            ("Encoder", "encoder"),
            ("Clients", "clients"),
            ("Rounds", "rounds"),
        )
        if len({getattr(run.summary, field) for group in groups for run in group.runs}) > 1
    ]
    attacked = any(group.attack_success() for group in groups)
    head = ["Algorithm", *(f"{MEASURES[name]}, %" for name in measures), *(["Backdoor, %"] if attacked else [])]
    head += ["Up", "Down", "Privacy", "Seconds"]
    head += ["Seeds", *(name for name, _ in varying)]
    rows = [
        [
            escape(group.label),
            *(_percent(group.accuracy(measure)) for measure in measures),
            *([_percent(group.attack_success())] if attacked else []),
            human_bytes(group.mean("communication.upload_bytes_per_client_round")),
            human_bytes(group.mean("communication.broadcast_bytes_per_client_round")),
            f'<span class="words">{privacy_words(group)}</span>',
            f"{group.mean('seconds.total'):,.1f}",
            ", ".join(str(seed) for seed in group.seeds),
            *(escape(listed(dict.fromkeys(getattr(run.summary, field) for run in group.runs))) for _, field in varying),
        ]
        for group in groups
    ]
    terms = "; ".join(f"<em>{MEASURES[measure].lower()}</em>, {_TERMS[measure]}" for measure in measures)
    backdoor = _BACKDOOR if attacked else ""
    table = html_table(_spread_words(groups), head, rows, "Results by algorithm")
    return (
        f'<section aria-labelledby="results"><h2 id="results">Results</h2>\n{table}'
        f"<p>Accuracy is measured on {terms}.{backdoor} Up and down are bytes that one client "
        f"sends and receives in one round. Seconds are those of a whole run.</p></section>\n"
    )


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return '<span class="none">n/a</span>'
    text = f"{100 * spread.mean:.1f}"
    return text if spread.deviation is None else f"{text} ± {100 * spread.deviation:.1f}"


def _spread_words(groups: Sequence[Group]) -> str:
    over_seeds = {group.over_seeds for group in groups}
    if over_seeds == {True}:
        where = "over seeds"
    elif over_seeds == {False}:
        where = "over clients, each counted once"
    else:
        where = "over seeds where a row has several, else over clients, each counted once"
    if any(group.over_seeds for group in groups):
        where += ". Bytes and seconds are means over seeds"
    return f"Mean ± sample standard deviation {where}."


def privacy_words(group: Group) -> str:
    spent = [run.summary.privacy for run in group.runs]
    simulated = any(entry.simulated for entry in spent)
    if not all(entry.private or (entry.simulated and entry.epsilon is not None) for entry in spent):
        return '<strong class="exposed">not private</strong>'
    # Over several seeds the page claims only what the worst of them allows.
    epsilons = [entry.epsilon for entry in spent if entry.epsilon is not None]
    deltas = [entry.delta for entry in spent if entry.delta is not None]
    if len(epsilons) < len(spent):
        return "private, no ε stated"
    words = f"{'simulated, not private' if simulated else 'private'}: ε = {_rounded_up(max(epsilons))}"
    words += f", δ = {_rounded_up(max(deltas))}" if deltas else ""
    units = listed(dict.fromkeys(entry.unit for entry in spent if entry.unit))
    return escape(words + (f" for each {units}" if units else ""))


def _rounded_up(value: float) -> str:
    """Three digits, never less than the value: a privacy loss must not look smaller than it is."""
    if math.isinf(value) or math.isnan(value):
        return "∞"
    rounded = float(Context(prec=3, rounding=ROUND_CEILING).create_decimal(repr(value)))
    return f"{rounded:g}".replace("e-0", "e-")


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], label: str) -> str:
    """A table whose cells are HTML; the first cell of a row names the row. Wide ones scroll inside their own box."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    lines = (
        f'<tr><th scope="row">{row[0]}</th>' + "".join(f"<td>{cell}</td>" for cell in row[1:]) + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n<table>\n'
        f"<caption>{caption}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody>\n"
        "</table>\n</div>\n"
    )


def keys(title: str, marks: Sequence[tuple[str, str, str]]) -> str:
    """What the marks of a figure stand for, as (symbol, color in CSS, name); nothing where there are none."""
    shown = "".join(
        f'<span class="key"><span class="swatch" data-symbol="{mark}" style="color:{color}"></span>'
        f"{escape(name)}</span>\n"
        for mark, color, name in marks[:_KEYS]
    )
    more = f"<span>and {len(marks) - _KEYS} more</span>" if len(marks) > _KEYS else ""
    return f'<div class="legend"><span class="none">{escape(title)}</span>\n{shown}{more}</div>\n' if marks else ""


def listed(items: Iterable[object]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    words = [str(item) for item in items]
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
