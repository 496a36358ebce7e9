"""The page of a run of `sordino tune-private`: accuracy beside the hand-written prompt, the search, and its cost."""

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from sordino.errors import RunError
from sordino.files import replace_file
from sordino.report.frame import frame
from sordino.report.markup import counted, html_table
from sordino.results import Interval, human_bytes, human_seconds
from sordino.results.wording import ON_SHARES

WIDTH, HEIGHT, LEFT, BOTTOM = 640, 220, 56, 28  # of the plot of losses, in pixels
TICKS = 4


def write_private_report(folder: Path, recipe: str | None = None, name: str | None = None) -> Path:
    """Write `report.html` of a finished run of `sordino tune-private`, and return its path.

    Args:
        folder: the run directory.
        recipe: commands for several machines, to show at the end.
        name: in the title; by default the folder's.

    Raises:
        RunError: the run is not finished, a file of it is damaged, or the page cannot be written.
    """
    out = folder / "report.html"
    try:
        summary = json.loads((folder / "summary.json").read_bytes())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
        configuration = (folder / "config.toml").read_text("utf-8")
        page = _page(name or folder.name, summary, lines, configuration, recipe)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{folder} holds no finished run of 'sordino tune-private' ({error}); go on with --resume"
        ) from None
    try:
        replace_file(out, page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error.strerror}); free space, or mend its permissions") from None
    return out


def _page(
    name: str,
    summary: Mapping[str, Any],
    lines: Sequence[Mapping[str, Any]],
    configuration: str,
    recipe: str | None,
) -> str:
    title = f"Sordino: {name}"
    where = "with the tower in the clear" if summary["clear"] else "on the shares of two servers"
    what = (
        f"{len(summary['classes'])} classes, {counted(summary['shots'], 'example')} a class, "
        f"{counted(summary['generations'], 'generation')}, seed {summary['seed']}, {where}."
    )
    sections = [_accuracy(summary), _by_class(summary), _losses(lines), _costs(summary), _protection(summary)]
    if recipe:
        sections.append(_section("machines", "On several machines", f"<pre>{escape(recipe)}</pre>\n"))
    sections.append(_section("configuration", "Configuration", f"<pre>{escape(configuration)}</pre>\n"))
    body = f"""<main>
<header>
<h1>{escape(title)}</h1>
<p>{escape(what)}</p>
</header>
{_verdict(summary)}{"".join(sections)}</main>
<footer><p>Written by Sordino {escape(str(summary["version"]))}.</p></footer>
"""
    return frame(title, body, figures=False)


def _verdict(summary: Mapping[str, Any]) -> str:
    """Return three sentences for a reader who has one minute: on accuracy, on secrecy, and on what it cost."""
    told = "".join(
        f"<p><strong>{topic}.</strong> {escape(sentence)}</p>\n" for topic, sentence in verdict_sentences(summary)
    )
    return f'<section class="verdict" aria-labelledby="verdict"><h2 id="verdict">In short</h2>\n{told}</section>\n'


def verdict_sentences(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return topics and sentences of the verdict; a difference is claimed only if its interval leaves out zero."""
    tuned, known = _percent(summary["accuracy"]["tuned"]), summary.get("hand_written")
    tests = counted(summary["test_examples"], "test example")
    if not known:
        start = _percent(summary["accuracy"]["zero_shot"])
        accuracy = (
            f"The tuned prompt is right on {tuned}% of {tests}, and the prompt that the search began at on {start}%."
        )
    else:
        gain = Interval(**known["gain"])
        before = _percent(known["accuracy"])
        how = "better than" if gain.above else "worse than" if gain.below else "not shown to differ from"
        sure = "" if gain.low is None else f" (a difference of {gain.percent()} points, with 95% confidence)"
        accuracy = (
            f"The tuned prompt is right on {tuned}% of {tests} and {how} the hand-written one with {before}%{sure}."
        )
    seconds, costs = human_seconds(sum(summary["seconds"][part] for part in ("search", "evaluate"))), summary["costs"]
    if summary["clear"]:
        secrecy = "Nothing left this machine, and nothing was kept secret from it: the tower was in the clear."
    else:
        secrecy = (
            f"No server saw a picture, sentence, label, loss, prompt or weight, as long as {ON_SHARES}; a prompt that "
            "is published is not private."
        )
    cost = f"Search and both accuracies took {seconds} s"
    if costs:
        sent = human_bytes(costs["online_bytes_per_server"])
        cost += f" and {costs['rounds']:,} rounds between the servers, with {sent} each way"
    return [("Accuracy", accuracy), ("Secrecy", secrecy), ("Cost", f"{cost}.")]


def _section(identity: str, heading: str, content: str) -> str:
    return (
        f'<section aria-labelledby="{identity}"><h2 id="{identity}">{escape(heading)}</h2>\n{content}</section>\n'
        if content
        else ""
    )


def _accuracy(summary: Mapping[str, Any]) -> str:
    accuracy, known = summary["accuracy"], summary.get("hand_written")
    rows = [["Initial prompt", _percent(accuracy["zero_shot"]), ""], ["Tuned prompt", _percent(accuracy["tuned"]), ""]]
    words = ""
    if known:
        gain = Interval(**known["gain"])
        rows.insert(0, [f"Hand-written prompt: {escape(known['prompt'])}", _percent(known["accuracy"]), ""])
        rows.append(["Tuned over hand-written", f"{100 * gain.mean:+.1f}", gain.percent()])
        if not gain.above:
            how = "worse than" if gain.below else "no better than"
            words = (
                f'<article><p class="exposed">The tuned prompt is {how} the hand-written one.</p><p>Keep the '
                "hand-written prompt, or tune with more examples or generations.</p></article>\n"
            )
    caption = f"Accuracy in percent on {counted(summary['test_examples'], 'test example')}; interval of 95%."
    return _section(
        "accuracy",
        "Was it worth it",
        words + html_table(caption, ["Prompt", "Accuracy", "Interval"], rows, "Accuracy of the prompts"),
    )


def _by_class(summary: Mapping[str, Any]) -> str:
    parts = summary.get("by_class") or {}
    if not parts:
        return ""
    rows = []
    for name, part in parts.items():
        worse = part["tuned"] < part["hand_written"]
        tuned = _percent(part["tuned"])
        rows.append(
            [
                f'<span class="words">{escape(name)}</span>',
                _percent(part["hand_written"]),
                f'<span class="exposed">{tuned}, worse</span>' if worse else tuned,
                str(part["test_examples"]),
            ]
        )
    head = ["Class", "Hand-written prompt", "Tuned prompt", "Test examples"]
    return _section("by-class", "By class", html_table("Accuracy in percent.", head, rows, "Accuracy by class"))


def _losses(lines: Sequence[Mapping[str, Any]]) -> str:
    """Draw losses by generation as a picture that needs no script."""
    series = [
        ("least so far", "least_loss", "currentColor", ""),
        ("mean of a generation", "mean_loss", "currentColor", "4 3"),
    ]
    values = [float(line[key]) for line in lines for _, key, _, _ in series]
    if len(lines) < 2 or not all(map(math.isfinite, values)):
        return ""
    low, high = min(values), max(values)
    span, last = (high - low) or 1.0, float(lines[-1]["generation"]) or 1.0

    def x(generation: float) -> float:
        return LEFT + (WIDTH - LEFT - 8) * generation / last

    def y(loss: float) -> float:
        return 8 + (HEIGHT - BOTTOM - 8) * (high - loss) / span

    marks = [low + span * step / TICKS for step in range(TICKS + 1)]
    axis = "".join(
        f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y(mark):.1f}" y2="{y(mark):.1f}" stroke="currentColor" opacity="0.15"/>'
        f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end" font-size="12" fill="currentColor">'
        f"{mark:.3g}</text>"
        for mark in marks
    )
    curves = "".join(
        f'<polyline fill="none" stroke="{color}" stroke-width="2" stroke-dasharray="{dashes}" points="'
        + " ".join(f"{x(line['generation']):.1f},{y(line[key]):.1f}" for line in lines)
        + '"/>'
        for _, key, color, dashes in series
    )
    ends = "".join(
        f'<text x="{x(at):.1f}" y="{HEIGHT - 8}" text-anchor="{anchor}" font-size="12" fill="currentColor">'
        f"{at:.0f}</text>"
        for at, anchor in ((0.0, "start"), (last, "end"))
    )
    words = f"Loss by generation: from {lines[0]['least_loss']:.3f} to {lines[-1]['least_loss']:.3f}."
    return _section(
        "losses",
        "Loss by generation",
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" style="max-width:{WIDTH}px;width:100%" role="img" '
        f'aria-label="{escape(words)}">{axis}{curves}{ends}</svg>\n<figcaption>On the training examples. Full line: '
        "the least loss so far; dashed: the mean of a generation's candidates. Generation 0 is the hand-written "
        "prompt.</figcaption></figure>\n",
    )


def _costs(summary: Mapping[str, Any]) -> str:
    seconds, costs = summary["seconds"], summary["costs"]
    rows = [
        ["Search", f"{human_seconds(seconds['search'])} s"],
        ["Both accuracies", f"{human_seconds(seconds['evaluate'])} s"],
    ]
    if costs:
        rows += [
            ["Rounds between the servers", f"{costs['rounds']:,}"],
            ["Sent by each server to the other", human_bytes(costs["online_bytes_per_server"])],
            ["Sent by the dealer", human_bytes(costs["offline_bytes"])],
        ]
        for name, words in (("lan", "LAN of 10 Gbit/s, 0.5 ms"), ("wan", "WAN of 100 Mbit/s, 40 ms")):
            online, offline = (human_seconds(costs["seconds_on"][name][part]) for part in ("online", "offline"))
            rows.append([f"Messages alone on a {words}", f"{online} s, and {offline} s beforehand"])
    return _section("costs", "Cost", html_table("Of the whole run.", ["", ""], rows, "Cost"))


def _protection(summary: Mapping[str, Any]) -> str:
    if summary["clear"]:
        return _section("protection", "Who learned what", "<p>The tower was on this machine; nothing left it.</p>\n")
    return _section(
        "protection",
        "Who learned what",
        "<p>The servers and the dealer learned shapes, times and the tower's form, and no sentence, picture, label, "
        "loss, prompt or weight, as long as no two of them combine their knowledge. The data owner learned features of "
        "its own sentences. The prompt is not private if it is published.</p>\n",
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
