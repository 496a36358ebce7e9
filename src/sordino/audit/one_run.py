"""An audit of example-level privacy by one more training run, with canaries in it.

Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846), algorithm 1. Many
canaries are included or left out, each with probability 1/2, independently of all others. An adversary that guesses the
inclusions better than the claimed (epsilon, delta) allows has refuted the claim. `canaries` defines a canary and its
being left out. `white_box` and `decoding` guess the inclusions from noised gradients, and `release` from class
statistics that are released once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.audit.canaries import DELTA, Canaries, with_canaries
from sordino.audit.release import canary_scores
from sordino.audit.scores import claimed
from sordino.audit.statistics import best_guesses
from sordino.audit.subject import train
from sordino.audit.white_box import Watching
from sordino.encoders.prompt_model import map_prompt, prompt_count
from sordino.errors import ConfigError, RunError
from sordino.privacy.mechanism import Mechanism
from sordino.progress import Progress, silent
from sordino.randomness import generator
from sordino.runtime.local import LocalRuntime, Training

CONFIDENCE = 0.95  # of the larger of the two views' bounds; each is at 1 - (1 - CONFIDENCE) / 2


@dataclass(frozen=True)
class View:
    """The result of one observer.

    Attributes:
        observer: the releases that it saw, in words.
        epsilon: lower bound in nats; 0 if nothing is shown.
        guesses: number of canaries it guessed.
        correct: number of these guesses that were right.
    """

    observer: str
    epsilon: float
    guesses: int
    correct: int


@dataclass(frozen=True)
class OneRunAudit:
    """The result of an audit.

    Attributes:
        canaries: number of canaries that were included or left out at random.
        included: number of them that were trained on.
        claimed_epsilon: the claim of the audited training's own ledger, against the untrusted observer that learned
            most; None if it claims nothing.
        delta: the probability at which the claim is made and the bounds hold.
        black_box: the observer that sees the prompts before and after training.
        white_box: the observer that sees every noised gradient, or the released class statistics.
    """

    canaries: int
    included: int
    claimed_epsilon: float | None
    delta: float
    black_box: View
    white_box: View

    @property
    def strongest(self) -> View:
        """Return the view with the larger bound; it holds at 95 % confidence although it was chosen after looking."""
        return max(self.white_box, self.black_box, key=lambda view: view.epsilon)

    @property
    def refuted(self) -> bool:
        """True if the lower bound is above the claim."""
        return self.claimed_epsilon is not None and self.strongest.epsilon > self.claimed_epsilon

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for a report, those of the strongest view on top."""
        return {**asdict(self.strongest), **asdict(self), "confidence": CONFIDENCE, "refuted": self.refuted}


def audit_in_one_run(
    runtime: LocalRuntime, canaries: int, seed: int, progress: Progress = silent, rounds: int | None = None
) -> OneRunAudit:
    """Train a federation once more with canaries in it, and bound epsilon from below.

    1. Draw canaries, and an inclusion bit for each. Give each to one client, which trains on it or leaves it out.
    2. Train from the start, with other randomness, settings and noise as they were, by the same implementation of the
       mechanism. The claim is read from this training's own ledger: clients hold more examples than before.
    3. Black box: a canary's score is the fall of its loss under its owner's prompt in training.
    4. White box: it is the estimate of its inclusion bit from all noised gradients that its owner released
       (`Watching`), or from the class statistics that were released before the first round (`canary_scores`).
    5. Each view guesses "in" for high scores and "out" for low ones, and gets its bound (`best_guesses`) at confidence
       97.5 %: both hold at 95 %, and so does the larger.

    Args:
        runtime: the method with its federation.
        canaries: m, at least 2; bounds grow with them until they hide each other.
        seed: of everything random in the audit.
        progress: is called after every round.
        rounds: number of rounds to train, if the run ended before its last.

    Raises:
        ConfigError: the unit of privacy is not the example, or there are fewer than 2 canaries.
        RunError: the method does not train.
    """
    _check(runtime, canaries)
    data, model = runtime.data, runtime.model
    drawn = Canaries.draw(canaries, len(data), model, data.features.shape[1:], seed).to(data.features)
    audited = with_canaries(runtime, drawn, seed)
    watching = None
    if not audited.releases_statistics:
        watching = Watching(audited.mechanism, drawn, audited.data)
        audited.mechanism = cast(Mechanism, watching)
    before = audited.start()
    after = train(audited, rounds, progress, "audit with canaries")
    delta = DELTA if after.ledger.delta is None else after.ledger.delta
    ties = generator(seed, "ties")

    def view(observer: str, scores: Tensor) -> View:
        included = drawn.included.cpu().numpy()
        confidence = 1 - (1 - CONFIDENCE) / 2
        best = best_guesses(scores.double().cpu().numpy(), included, delta, confidence, ties)
        return View(observer, best.epsilon, best.guesses, best.correct)

    fall = _losses(audited, before, drawn) - _losses(audited, after, drawn)
    if watching is None:
        white_box = view("the class statistics as they were released", canary_scores(audited, after, drawn))
    else:
        white_box = view("every gradient as it was released", watching.scores())
    return OneRunAudit(
        canaries,
        int(drawn.included.sum()),
        claimed(after.ledger),
        delta,
        view("the owner's prompt, before and after", fall),
        white_box,
    )


@torch.no_grad()
def _losses(runtime: LocalRuntime, training: Training, canaries: Canaries) -> Tensor:
    """Return every canary's cross-entropy [m], in nats, under the prompt of its owner."""
    prompts = runtime.prompts(training)
    losses = canaries.features.new_zeros(len(canaries.labels))
    for client in range(prompt_count(prompts)):
        owned = canaries.owners == client if prompt_count(prompts) > 1 else torch.ones_like(canaries.included)
        prompt = map_prompt(prompts, lambda part, place=client: part[place : place + 1])  # type: ignore[misc]
        logits = runtime.model.predict(prompt, canaries.features[owned])[0]
        losses[owned] = F.cross_entropy(logits, canaries.labels[owned], reduction="none").to(losses)
    return losses


def _check(runtime: LocalRuntime, canaries: int) -> None:
    if runtime.privacy.unit != "example":
        remedy = (
            f"its unit is the {runtime.privacy.unit}, and canaries audit example-level privacy only; use 'dp-sgd' or "
            "'cotangent' with privacy.unit = 'example'"
        )
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, remedy)
    if canaries < 2:
        raise ConfigError("canaries", canaries, "must be at least 2: one to call in, and one to call out")
    if not (runtime.rounds or runtime.releases_statistics):
        raise RunError("this method does not train, so there is nothing that canaries could be found in")
