"""Whether a search for a prompt was worth it: the hand-written prompt on the same test examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sordino.mpc.tower.sentences import Forward
from sordino.private_tuning.tasks import ImageTask, Task, TextTask
from sordino.results import Interval, gain_words, paired, points

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


def summarized(prompt: HandWritten, correct: Tensor | None, tuned: Tensor) -> dict[str, Any] | None:
    """Return the hand-written prompt's part of a summary: its accuracy, and the tuned prompt's gain over it.

    The gain's interval of 95% is Student's t on the differences by test example.

    Args:
        prompt: the hand-written one.
        correct, tuned: [T] bool, which test examples each prompt classifies correctly.
    """
    if correct is None:
        return None
    gain = paired((tuned.double() - correct.double()).tolist())
    accuracy = float(correct.double().mean())
    return {"prompt": prompt.words, "accuracy": accuracy, "gain": gain._asdict()}


def as_lines(summary: dict[str, Any]) -> list[str]:
    """Return the accuracies of a summary in words, and whether the search gained anything."""
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
    return [*lines, gain_words(gain, pair)]
