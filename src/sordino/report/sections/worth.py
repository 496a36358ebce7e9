"""The section on whether training was worth it: hand-written prompt, start, best round, effort, and differences."""

from collections.abc import Callable, Sequence
from html import escape

from sordino.report.groups import TITLES, Group
from sordino.report.markup import NONE, html_table
from sordino.results import BEST_NOT_OFFERED, BEST_TOO_HIGH, Interval, points, unequal_steps, verdict


def worth(groups: Sequence[Group]) -> str:
    """Return the section, a row a group; nothing if no run knows what it is held against."""
    first = groups[0].results
    measure = first.leading
    if not any(group.results.hand_written(measure) is not None for group in groups):
        return ""
    best, several = any(group.results.best for group in groups), len(groups) > 1
    head = [
        "Algorithm",
        *("Hand-written, %", "Before, %", "Last, %"),
        *(["Best (round), %"] if best else []),
        "Gain (95%)",
        *(["To the first row (95%)"] if several else []),
        *("Steps", "Examples"),
    ]
    rows = []
    for place, group in enumerate(groups):
        results = group.results
        learned = results.accuracy(measure)
        rows.append(
            [
                escape(group.label),
                _shown(results.hand_written(measure)),
                _shown(results.before(measure)),
                _shown(learned.mean if learned else None),
                *([str(results.best) if results.best else NONE] if best else []),
                _change(results.gain(measure)),
                *([_change(results.difference(first, measure) if place else None)] if several else []),
                _shown(results.gradient_steps, _whole),
                _shown(results.examples_seen, _whole),
            ]
        )
    caption = f"{TITLES[measure]} accuracy, by which rows are compared as it leads the table above."
    words = next((group.results.hand_written_prompt for group in groups if group.results.hand_written_prompt), "")
    table = html_table(caption, head, rows, "What was gained by algorithm")
    return (
        f'<section aria-labelledby="worth"><h2 id="worth">Was it worth it?</h2>\n{_verdicts(groups)}{table}'
        f"<p><em>Hand-written</em> is the prompt “{escape(words)} CLASS”, and <em>before</em> is before training. "
        f"<em>Gain</em> is over the hand-written prompt, with an interval of 95%: of several seeds over the seeds, of "
        f"one run over its clients and its test pictures.{_FIRST if several else ''} Steps are gradient steps of one "
        f"client in the run, and examples the training images in them.{f' {BEST_TOO_HIGH}' if best else ''}"
        f"{f' {BEST_NOT_OFFERED}' if any(group.results.best_withheld for group in groups) else ''}</p>\n"
        f"{_words(groups)}</section>\n"
    )


def _words(groups: Sequence[Group]) -> str:
    """Return a table of the learned prompts that are words; nothing if there is none."""
    rows = [
        [escape(group.label), str(run.summary.seed), escape(f"{words} CLASS")]
        for group in groups
        for run in group.runs
        for words in dict.fromkeys(run.summary.words)
    ]
    if not rows:
        return ""
    return html_table("Learned prompts that are words.", ["Algorithm", "Seed", "Prompt"], rows, "Prompts of words")


_FIRST = " Differences to the first row are paired by seed."


def _verdicts(groups: Sequence[Group]) -> str:
    """Return one line for each group that learned something, and one if steps are unequal."""
    lines = [(group.label, words) for group in groups if (words := verdict(group.results))]
    items = "".join(f"<li><strong>{escape(label)}</strong>: {escape(words)}.</li>\n" for label, words in lines)
    pairs = [(group.label, group.results) for group in groups]
    steps = {label: (results.steps_a_round or 0, results.gradient_steps or 0.0) for label, results in pairs}
    unequal = unequal_steps(steps)
    warning = f"<p><strong>Unequal steps</strong>: {escape(unequal)}.</p>\n" if unequal else ""
    return (f"<ul>\n{items}</ul>\n" if items else "") + warning


def _shown(value: float | None, form: Callable[[float], str] = points) -> str:
    return NONE if value is None else form(value)


def _whole(value: float) -> str:
    return f"{value:,.0f}"


def _change(change: Interval | None) -> str:
    """Return a difference in points, and its interval in small print."""
    if change is None:
        return NONE
    ends = "" if change.low is None else f" <small>({change.percent()})</small>"
    return f"{points(change.mean)}{ends}"
