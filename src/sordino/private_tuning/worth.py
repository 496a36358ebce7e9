"""Judge whether a search for a prompt was worth it: the hand-written prompt on the same test examples.

Both prompts classify the same examples, so the interval is of a paired difference: the adjusted Wald interval of Bonett
and Price (Adjusted Wald Confidence Interval for a Difference of Binomial Proportions Based on Paired Data, Journal of
Educational and Behavioral Statistics 37, 2012).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.mpc.tower.sentences import Forward
from sordino.private_tuning.tasks import ImageTask, Task, TextTask
from sordino.results import Interval, gain_words, points

QUANTILE = 1.959964  # of the normal distribution, for 95%
LISTED = 6  # most classes in a text
PICTURE_PROMPT = "a photo of a"  # as the method `zero-shot` has it


@dataclass(frozen=True)
class HandWritten:
    """The hand-written prompt, whole, where the initial one is cut or repeated.

    Attributes:
        words: for pictures "a photo of a"; for sentences those of `prompt.initial`.
        tokens: [W, E]; None if a sentence has no room for them.
    """

    words: str
    tokens: Tensor | None

    @classmethod
    def of(cls, task: Task) -> HandWritten:
        """Return the hand-written prompt of a task."""
        words = PICTURE_PROMPT if isinstance(task, ImageTask) else task.initial
        tokens = task.embedder.embed(words)
        fits = True
        if isinstance(task, ImageTask):
            fits = task.sentence_length(len(tokens)) <= len(task.embedder.positions)
        elif isinstance(task, TextTask):
            fits = len(tokens) + 2 < task.longest
        return cls(words, tokens if fits else None)

    def correct(self, task: Task, forward: Forward, start: Tensor, at_start: Tensor) -> Tensor | None:
        """Classify the test examples behind it, in one call of `forward`; None if it has no tokens.

        Args:
            task: of the examples.
            forward: maps sentences to features.
            start: the initial prompt [M, E]. If it is this one, nothing is computed again.
            at_start: [T] bool, which examples the initial prompt classifies correctly.
        """
        if self.tokens is None:
            return None
        if torch.equal(self.tokens, start):
            return at_start
        return task.measure(forward, self.tokens)[0]


def gain_of(before: Tensor, after: Tensor) -> Interval:
    """Return the difference of two prompts' accuracies on the same test examples, with its interval of 95%.

    Args:
        before, after: [T] bool, which examples each prompt classifies correctly.
    """
    won, lost, count = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    gained, missed = (won + 1) / (count + 2), (lost + 1) / (count + 2)
    center = gained - missed
    half = QUANTILE * math.sqrt((gained + missed - center**2) / (count + 2))
    return Interval((won - lost) / count, max(-1.0, center - half), min(1.0, center + half))


def summarized(prompt: HandWritten, correct: Tensor | None, tuned: Tensor) -> dict[str, Any] | None:
    """Return the hand-written prompt's part of a summary: its accuracy, and the tuned prompt's gain over it.

    Args:
        prompt: the hand-written one.
        correct, tuned: [T] bool, which test examples each prompt classifies correctly.
    """
    if correct is None:
        return None
    gain = gain_of(correct, tuned)
    return {"prompt": prompt.words, "accuracy": _share(correct), "gain": gain._asdict()}


def by_class(
    names: Sequence[str], labels: Tensor, correct: Tensor | None, tuned: Tensor
) -> dict[str, dict[str, float]] | None:
    """Return the accuracies of the hand-written and the tuned prompt, and the number of test examples, by class.

    Classes without examples are left out.

    Args:
        names: of the classes.
        labels: [T], of the test examples.
        correct, tuned: as for `summarized`.
    """
    if correct is None:
        return None
    found = {}
    for number, name in enumerate(names):
        own = labels == number
        if own.any():
            accuracies = {"hand_written": _share(correct[own]), "tuned": _share(tuned[own])}
            found[name] = {**accuracies, "test_examples": int(own.sum())}
    return found


def _share(correct: Tensor) -> float:
    return float(correct.double().mean())


def as_lines(summary: Mapping[str, Any]) -> list[str]:
    """Return a summary's accuracies in words, whether the search gained anything, and where it lost."""
    accuracy, known = summary["accuracy"], summary.get("hand_written")
    lines = [
        f"accuracy on {summary['test_examples']} test examples: {accuracy['tuned']:.3f}, "
        f"{accuracy['zero_shot']:.3f} with the initial prompt before the search"
    ]
    if known is None:
        return lines
    gain = Interval(**known["gain"])
    lines[0] += f", {known['accuracy']:.3f} with the hand-written prompt '{known['prompt']}'"
    pair = f"{points(accuracy['tuned'])} to {points(known['accuracy'])}"
    advice = "" if gain.above else "; keep the hand-written one, or tune with more examples or generations"
    lines.append(gain_words(gain, pair) + advice)
    if worse := worse_classes(summary):
        named = [f"{name} ({points(part['hand_written'])} to {points(part['tuned'])})" for name, part in worse[:LISTED]]
        more = f", and {len(worse) - LISTED} more" if len(worse) > LISTED else ""
        lines.append(f"the hand-written prompt is better on {', '.join(named)}{more}")
    return lines


def worse_classes(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, float]]]:
    """Return the classes for which the hand-written prompt is better, the largest difference first."""
    parts = summary.get("by_class") or {}
    losses = [(part["hand_written"] - part["tuned"], name) for name, part in parts.items()]
    return [(name, parts[name]) for loss, name in sorted(losses, key=lambda pair: -pair[0]) if loss > 0]
