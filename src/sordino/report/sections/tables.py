"""The table of results."""

from collections.abc import Sequence
from html import escape

from sordino.report.groups import TITLES, Group
from sordino.report.markup import NONE, html_table
from sordino.report.sections.promises import privacy_words
from sordino.results import MEASURES, Measure, Spread, human_bytes, human_seconds, listed

_PERSONAL: tuple[Measure, ...] = ("local", "neighbor", "overall")
_TERMS = {
    "local": "test images of the classes that a client holds",
    "neighbor": "of the classes that only other clients hold",
    "overall": "of all classes",
    "novel": "of classes that nobody trained on",
    "domain": "of a domain that was held out",
}
_VARYING = (("Data set", "dataset"), ("Encoder", "encoder"), ("Clients", "clients"), ("Rounds", "rounds"))
_BACKDOOR = (
    " <em>Backdoor</em>: test images of other classes that an attacker's trigger makes a client's prompt take for the "
    "attacker's target."
)


def results(groups: Sequence[Group]) -> str:
    """Return the section with the table of results, a row a group."""
    measures = [measure for measure in MEASURES if measure in _PERSONAL or _has(groups, measure)]
    attacked = any(group.results.attack_success() for group in groups)
    varying = [(name, field) for name, field in _VARYING if len(_distinct(groups, field)) > 1]
    head = [
        "Algorithm",
        *(f"{TITLES[measure]}, %" for measure in measures),
        *(["Backdoor, %"] if attacked else []),
        *("Up", "Down", "Privacy", "Seconds", "Seeds"),
        *(name for name, _ in varying),
    ]
    rows = []
    for group in groups:
        summary = group.results
        spreads = [summary.accuracy(measure) for measure in measures]
        spreads += [summary.attack_success()] if attacked else []
        rows.append(
            [
                escape(group.label),
                *(_percent(spread) for spread in spreads),
                human_bytes(summary.mean_bytes("upload_bytes_per_client_round")),
                human_bytes(summary.mean_bytes("broadcast_bytes_per_client_round")),
                f'<span class="words">{privacy_words(group)}</span>',
                human_seconds(summary.seconds),
                ", ".join(str(seed) for seed in summary.seeds),
                *(escape(listed(_distinct([group], field))) for _, field in varying),
            ]
        )
    terms = "; ".join(f"<em>{TITLES[measure].lower()}</em>, {_TERMS[measure]}" for measure in measures)
    backdoor = _BACKDOOR if attacked else ""
    table = html_table(_spread_words(groups), head, rows, "Results by algorithm")
    return (
        f'<section aria-labelledby="results"><h2 id="results">Results</h2>\n{table}'
        f"<p>Accuracy is measured on {terms}.{backdoor} Up and down are bytes that one client "
        f"sends and receives in one round. Seconds are those of training, without encoding and evaluation.</p>"
        f"</section>\n"
    )


def _has(groups: Sequence[Group], measure: Measure) -> bool:
    return any(group.results.accuracy(measure) for group in groups)


def _distinct(groups: Sequence[Group], field: str) -> list[object]:
    return list(dict.fromkeys(getattr(run.summary, field) for group in groups for run in group.runs))


def _percent(spread: Spread | None) -> str:
    return NONE if spread is None else spread.percent()


def _spread_words(groups: Sequence[Group]) -> str:
    over_seeds = {group.over_seeds for group in groups}
    if over_seeds == {True}:
        where = "over seeds"
    elif over_seeds == {False}:
        where = "over clients, each counted once"
    else:
        where = "over seeds where a row has several, else over clients, each counted once"
    if any(over_seeds):
        where += ". Bytes and seconds are means over seeds"
    return f"Mean ± sample standard deviation {where}."
