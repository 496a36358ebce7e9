"""The figures that a run is held against: the hand-written prompt, its start, its best round, and its effort."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from sordino.algorithms import lineage, settings_for
from sordino.encoders.generative.model import context_model
from sordino.encoders.prompt_model import PromptModel
from sordino.experiments.config import Experiment
from sordino.experiments.features import EncodedDataset
from sordino.progress import Progress
from sordino.results import MEASURES, Accuracy, BestRound, Effort, HandWritten, PictureVariance
from sordino.runtime.evaluate import Evaluation, EvaluationSet, Scores
from sordino.runtime.facts import participants
from sordino.runtime.local import LocalRuntime
from sordino.runtime.paired import paired_variances
from sordino.tasks.images import Indices
from sordino.tasks.splits import Task

HAND_WRITTEN = "zero-shot"  # the method whose prompt is the hand-written one


def evaluation_of(dataset: EncodedDataset, task: Task, model_for: Callable[[Sequence[str]], PromptModel]) -> Evaluation:
    """Return the splits that a task's clients are evaluated on, whose features are all encoded.

    Args:
        dataset: the task's.
        task: of the run.
        model_for: makes the model of candidate classes.
    """
    device, labels = dataset.encoder.device, torch.from_numpy(task.labels)
    model = model_for(task.class_names)
    features = dataset.tables[model.reads].features

    def evaluation_set(candidates: PromptModel, rows: Indices) -> EvaluationSet:
        chosen = torch.from_numpy(rows)
        return EvaluationSet(candidates, features[chosen].to(device), labels[chosen].to(device))

    return Evaluation(
        evaluation_set(model, task.test),
        torch.from_numpy(task.local),
        torch.from_numpy(task.neighbor),
        evaluation_set(model_for(task.novel_names), task.novel) if task.novel_names else None,
        evaluation_set(model, task.domain) if len(task.domain) else None,
        evaluation_set(model, task.triggered) if len(task.triggered) else None,
        task.attackers,
    )


@dataclass(frozen=True)
class Yardstick:
    """The hand-written prompt, as the method `zero-shot` has it, evaluated on a run's test pictures.

    Attributes:
        words: before the class name.
        evaluation: on the run's splits.
        scores: of the prompt, which all clients share.
        itself: the run is `zero-shot`, or descends from it, and its prompt is this one.
    """

    words: str
    evaluation: Evaluation
    scores: Scores
    itself: bool

    @classmethod
    def of(cls, config: Experiment, dataset: EncodedDataset, task: Task, progress: Progress) -> Yardstick | None:
        """Evaluate it in one pass of the text tower.

        If a run's method reads something else of a picture than its one feature, the test pictures' features are
        encoded here.

        Args:
            config: of the run.
            dataset, task: of the run.
            progress: is told how far encoding is.

        Returns:
            None if the encoder gives no feature of some test picture.

        Raises:
            ConfigError: the words are not allowed.
        """
        words = str(settings_for(HAND_WRITTEN, config.settings).prompt_text)
        tested = np.concatenate([task.test, task.novel, task.domain, task.triggered])
        encoder = dataset.encoder

        def model_for(names: Sequence[str]) -> PromptModel:
            return context_model(encoder, encoder.class_tokens(names))

        if not dataset.encoded(tested, model_for(task.class_names).reads, progress):
            return None
        evaluation = evaluation_of(dataset, task, model_for)
        scores = evaluation.scores(encoder.embed(words)[None])
        return cls(words, evaluation, scores, itself=HAND_WRITTEN in lineage(config.algorithm))

    def against(self, learned: Scores) -> HandWritten:
        """Return its accuracy for the summary of a run, paired by picture with what the run learned."""
        variances = paired_variances(self.evaluation, learned, self.scores)
        by_client = [
            {measure: getattr(self.scores, measure)[client] for measure in MEASURES}
            for client in range(len(self.scores.local))
        ]
        return HandWritten(
            prompt=self.words,
            itself=self.itself,
            accuracy=Accuracy(**self.scores.means()),
            per_client=tuple(Accuracy(**accuracies) for accuracies in by_client),
            variance={name: PictureVariance(**asdict(variance)) for name, variance in variances.items()},  # type: ignore[misc]
        )


def accuracy_before(lines: Sequence[dict[str, Any]]) -> Accuracy | None:
    """Return the accuracy before the first round; None without rounds.

    Args:
        lines: of `metrics.jsonl`.
    """
    if len(lines) < 2 or not lines[0].get("accuracy"):
        return None
    return Accuracy(**lines[0]["accuracy"])


def best_round(lines: Sequence[dict[str, Any]], private: bool) -> BestRound | None:
    """Return the best evaluated round by the first measure that applies, the first of equals; None without rounds.

    Args:
        lines: of `metrics.jsonl`.
        private: a mechanism is on. Then none is offered, as the ledger has no entry for the choice.
    """
    evaluated = [line for line in lines if line.get("accuracy")]
    if private or len(lines) < 2 or not evaluated:
        return None
    measure = next((name for name in MEASURES if evaluated[-1]["accuracy"].get(name) is not None), MEASURES[0])
    best = max(evaluated, key=lambda line: line["accuracy"].get(measure) or 0.0)
    return BestRound(round=best["round"], measure=measure, accuracy=Accuracy(**best["accuracy"]))


def effort(runtime: LocalRuntime, rounds: int) -> Effort:
    """Return the effort of a run after so many rounds, as its method's schedule says.

    Nothing that was drawn enters, as the size of a sampled batch is secret under a mechanism.
    """
    inputs, mechanism, clients = runtime.mechanism.inputs, runtime.mechanism, len(runtime.data)
    share = runtime.runtime.participation
    took_part = np.full(clients, rounds * share if mechanism.samples_clients else 0.0)
    for number in range(0 if mechanism.samples_clients else rounds):
        took_part[participants(runtime.seed, number + 1, clients, share)] += 1
    steps = inputs.steps if inputs.trains else 0
    if mechanism.releases_statistics or inputs.statistics:
        seen = runtime.data.counts.double().cpu().numpy()
    elif mechanism.samples_examples:
        rates = np.array([inputs.rate(client) for client in range(clients)])
        seen = took_part * steps * rates * _usable(runtime)
    else:
        counts = [int(count) for count in runtime.data.counts]
        seen = took_part * [_drawn(count, steps, inputs.batch_size) for count in counts]
    return Effort(
        steps_a_round=steps,
        gradient_steps=steps * float(took_part.mean()),
        examples_seen=float(seen.mean()),
    )


def _usable(runtime: LocalRuntime) -> Any:
    """Return how many images each client's units of sampling have together, [K]; a person has a limited number."""
    data, most = runtime.data, runtime.privacy.person_images
    if data.persons is None or not runtime.privacy.by_person:
        return data.counts.double().cpu().numpy()
    pairs = zip(data.rows, data.counts, strict=True)
    each = [data.persons[rows[: int(count)]].unique(return_counts=True)[1] for rows, count in pairs]
    return np.array([float(images.clamp(max=most).sum()) for images in each])


def _drawn(count: int, steps: int, size: int | None) -> int:
    """Return how many of `count` examples a round's batches hold, as `ClientData.batches` makes them.

    A batch has `size` examples, and the last one of each pass what is left.
    """
    if size is None or size >= count:
        return steps * count
    a_pass = -(-count // size)
    whole, rest = divmod(steps, a_pass)
    return whole * count + rest * size
