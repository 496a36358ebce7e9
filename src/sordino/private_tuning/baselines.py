"""Baselines for forward-only tuning on shares: other methods on the same few-shot tasks, in the clear.

Each method takes an opened task and returns the accuracy on its test examples. The methods are those in the tables of
Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307): full fine-tuning, gradient prompt tuning (Lester, Al-Rfou and
Constant, EMNLP 2021), and forward-only tuning, with softmax attention and with random features. Two methods need almost
no learning: the hand-written prompt alone and, for text, a logistic regression on features of one forward pass.

Settings were chosen on "validation" (`tasks.Part`), which has no test examples, with seeds 10 and 11. A comment at each
constant lists the values that were tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sordino.mpc.tower.sentences import Forward, in_the_clear
from sordino.mpc.tower.tower import PrivateTower
from sordino.private_tuning.search import tune
from sordino.private_tuning.search_settings import Search
from sordino.private_tuning.tasks import ImageTask, TextTask, cross_entropies


@dataclass(frozen=True)
class Descent:
    """Gradient descent on all shots at once, with a linear decay to zero.

    Attributes:
        steps: their number.
        learning_rate: the largest.
        warm_up: steps until the largest rate. A prompt has none. Its first gradients are the largest, and if steps are
            small then, Adam hardly moves for as long as it remembers them.
    """

    steps: int
    learning_rate: float
    warm_up: int = 0


# By kind of task. Tried on one seed each, AdamW 20 steps: 5e-5, 2e-4 (text); 5e-5, 1e-4, 2e-4 (images).
FULL = {
    "text": Descent(steps=20, learning_rate=5e-5, warm_up=2),
    "images": Descent(steps=20, learning_rate=5e-5, warm_up=2),
}
# Tried, Adam: 40 steps of 3e-3, and of 1e-2 with a warm-up (text); 60 and 100 steps of 3e-2 (images, two seeds).
PROMPT = {"text": Descent(steps=40, learning_rate=3e-3), "images": Descent(steps=100, learning_rate=3e-2)}
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)  # of the logistic regression; cross-validation among the shots decides


def zero_shot(task: TextTask | ImageTask, tower: PrivateTower) -> float:
    """Compute the accuracy of the hand-written prompt."""
    return task.accuracy(in_the_clear(tower), task.start())


def logistic_regression(task: TextTask, tower: PrivateTower) -> float:
    """Compute the accuracy of a linear classifier on features behind the hand-written prompt."""
    from sklearn.linear_model import LogisticRegressionCV

    forward, prompts = in_the_clear(tower), task.start()[None]
    with torch.no_grad():
        shots, tests = (
            task.features(forward, prompts, texts)[0].numpy() for texts in (task.sentences, task.test_sentences)
        )
    folds = min(4, int(task.labels.bincount().min()))
    classifier = LogisticRegressionCV(
        Cs=PENALTIES, cv=folds, l1_ratios=(0,), scoring="accuracy", use_legacy_attributes=False, max_iter=2000
    )
    return float(classifier.fit(shots, task.labels.numpy()).score(tests, task.test_labels.numpy()))


def fine_tuning(task: TextTask | ImageTask, tower: PrivateTower, descent: Descent | None = None) -> float:
    """Compute the accuracy after AdamW has trained all weights of all layers, behind the hand-written prompt."""
    descent = descent or FULL[task.kind]
    layers = [{name: part.clone().requires_grad_() for name, part in layer.items()} for layer in tower.layers]
    norm = (tower.norm[0].clone().requires_grad_(), tower.norm[1].clone().requires_grad_())
    tuned = type(tower)(tower.heads, tower.epsilon, norm, tuple(layers))
    parameters = [*norm, *(part for layer in layers for part in layer.values())]
    prompts = task.start()[None]
    _descend(torch.optim.AdamW(parameters, descent.learning_rate), descent, lambda: _loss(task, tuned, prompts))
    return task.accuracy(in_the_clear(tuned), prompts[0])


def prompt_tuning(task: TextTask | ImageTask, tower: PrivateTower, descent: Descent | None = None) -> float:
    """Compute the accuracy after Adam has trained the prompt, starting at the hand-written one."""
    descent = descent or PROMPT[task.kind]
    prompt = task.start().clone().requires_grad_()
    _descend(torch.optim.Adam([prompt], descent.learning_rate), descent, lambda: _loss(task, tower, prompt[None]))
    return task.accuracy(in_the_clear(tower), prompt.detach())


def forward_only(task: TextTask | ImageTask, forward: Forward, search: Search) -> float:
    """Compute the accuracy of a prompt found without gradients, as by `sordino tune-private --clear`."""
    prompt, _ = tune(search, task.start(), lambda prompts: task.losses(forward, prompts))
    return task.accuracy(forward, prompt)


def _loss(task: TextTask | ImageTask, tower: PrivateTower, prompts: Tensor) -> Tensor:
    return cross_entropies(task.logits(in_the_clear(tower), prompts), task.labels).sum()


def _descend(optimizer: torch.optim.Optimizer, descent: Descent, loss: Callable[[], Tensor]) -> None:
    def factor(step: int) -> float:
        return min((step + 1) / max(1, descent.warm_up), (descent.steps - step) / max(1, descent.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in range(descent.steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        schedule.step()
