"""Accuracy of every client's prompt on the evaluation splits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, prompt_count

# The number of prompts whose logits on all test images are held at once. It bounds memory, not the result.
PROMPTS_AT_ONCE = 32


@dataclass(frozen=True)
class EvaluationSet:
    """Test images with their labels among one list of candidate classes.

    Attributes:
        model: the method's model with these candidates.
        features: [T, ...], the model's input for each image.
        labels: [T], class indices.
    """

    model: PromptModel
    features: Tensor
    labels: Tensor

    def correct(self, prompt: Prompt) -> Tensor:
        """Return which images each of P prompts classifies correctly, [P, T] bool."""
        hits = []
        for start in range(0, prompt_count(prompt), PROMPTS_AT_ONCE):
            chunk = map_prompt(prompt, lambda part, at=start: part[at : at + PROMPTS_AT_ONCE])  # type: ignore[misc]
            predicted = self.model.predict(chunk, self.features).argmax(-1)
            hits.append(predicted == self.labels)
        return torch.cat(hits)


@dataclass(frozen=True)
class Evaluation:
    """The splits on which clients are evaluated.

    Attributes:
        test: images of the classes that were trained on.
        local, neighbor: [K, T] float64 on the CPU, weights over `test` for each client. A row sums to one, or to zero
            if the split is empty.
        novel: images of classes that nobody trained on, or None.
        domain: images of the held-out domain, or None.
        triggered: test images of other classes than an attacker's target, with its trigger and the target's label; or
            None if nobody attacks.
        attackers: the number of clients that attack; they are the first ones.
    """

    test: EvaluationSet
    local: Tensor
    neighbor: Tensor
    novel: EvaluationSet | None
    domain: EvaluationSet | None
    triggered: EvaluationSet | None = None
    attackers: int = 0

    @torch.no_grad()
    def scores(self, prompt: Prompt) -> Scores:
        """Return the accuracies of K prompts, or of one prompt that all K clients share."""
        clients = len(self.local)
        hits = {"test": self.test.correct(prompt).cpu()}  # [K or 1, T]
        correct = hits["test"].double()  # on the CPU, as some devices lack float64

        def over(weights: Tensor) -> list[float | None]:
            accuracy = (correct * weights).sum(1)
            empty = weights.sum(1) == 0
            pairs = zip(accuracy.tolist(), empty.tolist(), strict=True)
            return [None if is_empty else value for value, is_empty in pairs]

        def uniform(split: EvaluationSet | None, name: str) -> list[float | None]:
            if split is None:
                return [None] * clients
            hits[name] = split.correct(prompt).cpu()
            return list(hits[name].double().mean(1).expand(clients).tolist())

        overall = list(correct.mean(1).expand(clients).tolist())
        attacked = [None] * self.attackers + uniform(self.triggered, "triggered")[self.attackers :]
        return Scores(
            over(self.local),
            over(self.neighbor),
            overall,
            uniform(self.novel, "novel"),
            uniform(self.domain, "domain"),
            attacked,
            self.attackers,
            hits,
        )


@dataclass(frozen=True)
class Scores:
    """Accuracies of K clients, fractions in [0, 1]; None if a client has no such split.

    Attributes:
        local, neighbor, overall, novel, domain: accuracies.
        attack_success: fraction of the images with an attacker's trigger that the prompt classifies as its target;
            None for the attackers.
        attackers: the number of clients that attack; they are the first ones, and no mean counts them.
        hits: [K or 1, T] bool by split ("test", "novel", "domain", "triggered"), which pictures each prompt classifies
            correctly; one row if all clients share the prompt.
    """

    local: list[float | None]
    neighbor: list[float | None]
    overall: list[float | None]
    novel: list[float | None]
    domain: list[float | None]
    attack_success: list[float | None]
    attackers: int = 0
    hits: Mapping[str, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def means(self) -> dict[str, float | None]:
        """Return each accuracy's mean over the honest clients that have it."""
        kinds = {"local": self.local, "neighbor": self.neighbor, "overall": self.overall}
        kinds |= {"novel": self.novel, "domain": self.domain}
        return {name: _mean(values[self.attackers :]) for name, values in kinds.items()}

    def mean_attack_success(self) -> float | None:
        """Return the mean over the clients that are attacked, or None if nobody attacks."""
        return _mean(self.attack_success)


def _mean(values: list[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
