"""An audit of example-level privacy by one more training run, with canaries in it.

Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846), algorithm 1. Many
canaries are put in or left out, each by a fair coin of its own; whoever guesses the coins better than the claimed
(epsilon, delta) allows has refuted it. What a canary is, and what it is to be left out, is in `canaries`; how the coins
are guessed from noised gradients, in `white_box` and `decoding`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.audit.canaries import DELTA, Canaries, with_canaries
from sordino.audit.statistics import best_guesses
from sordino.audit.subject import train
from sordino.audit.white_box import Watching
from sordino.encoders.prompt_model import map_prompt, prompt_count
from sordino.errors import ConfigError, RunError
from sordino.privacy import accounting
from sordino.privacy.ledger import OBSERVERS, Ledger
from sordino.privacy.mechanism import Mechanism
from sordino.progress import Progress, silent
from sordino.randomness import generator
from sordino.runtime.local import LocalRuntime, Training

CONFIDENCE = 0.95  # of the larger of the two views' bounds; each is at 1 - (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class View:
    """What one observer could tell.

    Attributes:
        observer: what it saw, in words.
        epsilon: lower bound in nats; 0 where nothing is shown.
        guesses: how many canaries it guessed.
        correct: how many of these rightly.
    """

    observer: str
    epsilon: float
    guesses: int
    correct: int


@dataclass(frozen=True)
class OneRunAudit:
    """The outcome of an audit.

    Attributes:
        canaries: how many had a coin of their own.
        included: how many of them were trained on.
        claimed_epsilon: what the audited training claims by its own ledger, towards the untrusted observer that learned
            most; None where it claims nothing.
        delta: at which the claim is made and the bounds hold.
        black_box: who sees the prompts before and after training.
        white_box: who sees every noised gradient.
    """

    canaries: int
    included: int
    claimed_epsilon: float | None
    delta: float
    black_box: View
    white_box: View

    @property
    def strongest(self) -> View:
        """The view with the larger bound, which holds at 95 % confidence although it was chosen after looking."""
        return max(self.white_box, self.black_box, key=lambda view: view.epsilon)

    @property
    def refuted(self) -> bool:
        """Whether the lower bound is above the claim."""
        return self.claimed_epsilon is not None and self.strongest.epsilon > self.claimed_epsilon

    def as_dict(self) -> dict[str, Any]:
        """For a report: plain values, those of the strongest view on top."""
        return {**asdict(self.strongest), **asdict(self), "confidence": CONFIDENCE, "refuted": self.refuted}


def audit_in_one_run(
    runtime: LocalRuntime, canaries: int, seed: int, progress: Progress = silent, rounds: int | None = None
) -> OneRunAudit:
    """Train a federation once more with canaries in it, and bound epsilon from below.

    1. Draw canaries, and a coin for each; give each to one client, which trains on it or passes it over.
    2. Train from the start, with other randomness, settings and noise as they were, by the same implementation of the
       mechanism. What this training claims is read from its own ledger: clients hold more examples than before.
    3. Black box: a canary's score is how much its loss under its owner's prompt fell in training.
    4. White box: it is the estimate of its coin from all noised gradients that its owner released (`Watching`).
    5. Each view calls those with high scores in, and those with low ones out, and gets its bound (`best_guesses`) at
       confidence 97.5 %: both hold at 95 %, and so does the larger.

    Args:
        runtime: the method with its federation.
        canaries: m, at least 2; bounds grow with them until they hide each other.
        seed: of everything random in the audit.
        progress: is told of the rounds.
        rounds: how many to train, where the run ended before its last.

    Raises:
        ConfigError: the unit of privacy is not the example, or there are fewer than 2 canaries.
        RunError: the method does not train.
    """
    _check(runtime, canaries)
    data, model = runtime.data, runtime.model
    drawn = Canaries.draw(canaries, len(data), model, data.features.shape[1:], seed).to(data.features)
    audited = with_canaries(runtime, drawn, seed)
    watching = Watching(audited.mechanism, drawn, audited.data)
    audited.mechanism = cast(Mechanism, watching)
    before = audited.start()
    after = train(audited, rounds, progress, "audit with canaries")
    delta = DELTA if after.ledger.delta is None else after.ledger.delta
    ties = generator(seed, "ties")

    def view(observer: str, scores: Tensor) -> View:
        coins = drawn.included.cpu().numpy()
        found = best_guesses(scores.double().cpu().numpy(), coins, delta, 1 - (1 - CONFIDENCE) / 2, ties)
        return View(observer, found.epsilon, found.guesses, found.correct)

    return OneRunAudit(
        canaries,
        int(drawn.included.sum()),
        claimed(after.ledger),
        delta,
        view("the owner's prompt, before and after", _losses(audited, before, drawn) - _losses(audited, after, drawn)),
        view("every gradient as it was released", watching.scores()),
    )


def claimed(ledger: Ledger) -> float | None:
    """The largest epsilon of an example towards an untrusted observer; None where it is infinite."""
    untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
    largest = max(accounting.spent(ledger, observer, "example").epsilon for observer in untrusted)
    return largest if np.isfinite(largest) else None


@torch.no_grad()
def _losses(runtime: LocalRuntime, training: Training, canaries: Canaries) -> Tensor:
    """Every canary's cross-entropy [m], in nats, under the prompt of its owner."""
    prompt = runtime.prompts(training)
    losses = canaries.features.new_zeros(len(canaries.labels))
    for client in range(prompt_count(prompt)):
        mine = canaries.owners == client if prompt_count(prompt) > 1 else torch.ones_like(canaries.included)
        own = map_prompt(prompt, lambda part, at=client: part[at : at + 1])  # type: ignore[misc]
        logits = runtime.model.predict(own, canaries.features[mine])[0]
        losses[mine] = F.cross_entropy(logits, canaries.labels[mine], reduction="none").to(losses)
    return losses


def _check(runtime: LocalRuntime, canaries: int) -> None:
    if runtime.privacy.unit != "example":
        remedy = "its unit is the client, and canaries audit example-level privacy only; use 'dp-sgd' or 'cotangent'"
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, remedy)
    if canaries < 2:
        raise ConfigError("canaries", canaries, "must be at least 2: one to call in, and one to call out")
    if not runtime.rounds:
        raise RunError("this method does not train, so there is nothing that canaries could be found in")
