"""Distillation of a tower with softmax into one with random feature attention, in the clear, on public text.

The text consists of WordNet's definitions and ImageNet's class names, as timm lists them. No image and no private data
is used. Names stand behind soft contexts, random words with noise on their embeddings, since tuning will put soft
contexts there.

All weights of the layers are trained, including the frequencies. Embeddings stay fixed. The loss is one minus the
cosine of the mean-pooled sentences, plus the squared error of the hidden states after each layer relative to their
size. The second term makes training quick, since each layer has a target of its own. Cosines may add up to zero, and a
quotient on shares needs a divisor well above it, so mean attention weights below `FLOOR` are penalized.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.encoders.bert_folder import EMBEDDINGS, bert_weights
from sordino.encoders.bundled import TEXT_MODEL, Embedder, TextTower, package_path
from sordino.errors import ConfigError, EncoderError, RunError
from sordino.files import ANOTHER_OUT, write_atomically
from sordino.mpc.tower.public_text import (
    HELD_OUT,
    SOFT_NOISE,
    behind_soft_context,
    embedded,
    name_tokens,
    split_definitions,
)
from sordino.mpc.tower.tower import FEATURES, PrivateTower, SoftmaxTower
from sordino.progress import Progress, silent

LONGEST = 32  # tokens of a sentence; the rest is cut off
SOFT_SHARE = 0.25  # probability that a batch is preceded by one of names behind soft contexts
WARM_UP = 50  # steps, at most
FLOOR = 0.3  # mean attention weights below it are penalized by the squared difference
FLOOR_WEIGHT = 3.0
TEMPERATURE = "temperature"  # of a layer in training: logarithms of its heads' temperatures, [H, 1, 1]


@dataclass(frozen=True)
class Agreement:
    """Cosines of student's and teacher's sentences.

    Attributes:
        step: number of training steps before.
        mean, low: mean and 5% quantile over held-out sentences.
    """

    step: int
    mean: float
    low: float


def distill(
    teacher: TextTower,
    steps: int,
    batch: int = 32,
    learning_rate: float = 5e-4,
    features: int = 64,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[PrivateTower, list[Agreement]]:
    """Train a tower with random feature attention to agree with a teacher.

    Args:
        teacher: a BERT-like tower.
        steps: of AdamW, with a linear warm-up and a cosine schedule.
        batch: sentences a step.
        learning_rate: the largest.
        features: R, frequencies a head.
        seed: of frequencies, batches and soft contexts.
        progress: receives the number of steps done.

    Returns:
        The tower, and its agreement with the teacher on held-out sentences: at the start, every 100 steps and at the
        end.

    Raises:
        RunError: training diverged.
    """
    texts, original = _Texts(teacher, batch, seed), SoftmaxTower.of(teacher)
    student = _trainable(PrivateTower.from_softmax(teacher, features, seed))
    parameters = [part for layer in student.layers for part in layer.values()]
    optimizer = torch.optim.AdamW(parameters, learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm_up = max(1, min(WARM_UP, steps // 4))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    agreements = []
    for step, (embeddings, mask) in zip(range(steps + 1), texts.batches(), strict=False):
        if step % 100 == 0 or step == steps:
            agreements.append(_agreement(_folded(student), original, texts, step))
            progress("distill", step, steps, f"cosine {agreements[-1].mean:.4f}")
        if step == steps:
            break
        with torch.no_grad():
            target = original(embeddings, mask)
        loss = _loss(_folded(student).passes(embeddings, mask), target, mask)
        if not loss.isfinite():
            raise RunError(f"distillation diverged in step {step}; lower the learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return _folded(student, detached=True), agreements


def distill_to(
    file: Path, model: Path | None, steps: int, batch: int, features: int, seed: int, progress: Progress = silent
) -> Agreement:
    """Distill a tower, and store it with its teacher's fingerprint, its recipe and its agreement.

    Args:
        file: to write; missing folders are made.
        model: folder of a BERT-like checkpoint; None for the bundled text tower.
        steps, batch, features, seed, progress: see `distill`.

    Returns:
        The agreement at the end.

    Raises:
        ConfigError: there is no such checkpoint.
        RunError: training diverged, or the file cannot be written.
    """
    teacher = teacher_of(model)
    tower, agreements = distill(teacher, steps, batch, features=features, seed=seed, progress=progress)
    recipe = {"steps": steps, "batch": batch, "features": features, "seed": seed}
    about = {"teacher": fingerprint(teacher), "recipe": json.dumps(recipe)}
    about["agreement"] = json.dumps([asdict(agreement) for agreement in agreements])
    write_atomically(file, tower.to_bytes(about), ANOTHER_OUT)
    return agreements[-1]


def teacher_of(model: Path | None) -> TextTower:
    """Load a tower with softmax from a folder, or the bundled one.

    Raises:
        ConfigError: the folder holds no BERT-like checkpoint.
    """
    folder = package_path(*TEXT_MODEL) if model is None else model
    try:
        return TextTower.load(folder, torch.device("cpu"))
    except EncoderError as error:
        raise ConfigError("--model", str(folder), f"no BERT-like checkpoint: {error}") from None


def embedder_of(folder: Path | None) -> Embedder:
    """Load a data owner's part of a checkpoint from a folder that `write_embeddings` made, or of the bundled one.

    Raises:
        ConfigError: the folder holds no embeddings.
    """
    folder = package_path(*TEXT_MODEL) if folder is None else folder
    try:
        return Embedder.of_folder(folder, torch.device("cpu"))
    except EncoderError as error:
        raise ConfigError(
            "model.embeddings", str(folder), f"no folder as 'sordino mpc embeddings' makes them: {error}"
        ) from None


def write_embeddings(model: Path, folder: Path) -> None:
    """Write a data owner's part of a checkpoint: its tokenizer, and the embeddings of tokens and of positions.

    Args:
        model: a BERT folder.
        folder: to make.

    Raises:
        ConfigError: there is no such checkpoint.
        RunError: the folder cannot be written.
    """
    teacher_of(model)  # raises the errors of a folder that is no checkpoint
    named = bert_weights(model, EMBEDDINGS)
    write_atomically(folder / "model.safetensors", safetensors.torch.save(named), ANOTHER_OUT)
    write_atomically(folder / "tokenizer.json", (model / "tokenizer.json").read_bytes(), ANOTHER_OUT)


def pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Pool states to the mean over tokens, with unit norm: [B, T, E] to [B, E]."""
    return F.normalize((states * mask[..., None]).sum(1), dim=-1)


def fingerprint(tower: TextTower) -> str:
    """Return the SHA-256 of a tower's weights. A stored student records its teacher's."""
    digest = hashlib.sha256()
    layer_parts = (layer[name] for layer in tower.layers for name in sorted(layer))
    for part in (tower.words, tower.positions, *layer_parts):
        digest.update(part.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()


def _loss(passes: list[tuple[Tensor, Tensor]], targets: list[Tensor], mask: Tensor) -> Tensor:
    """Compute the loss of states and mean attention weights against a teacher's states."""
    whole = (1 - (pooled(passes[-1][0], mask) * pooled(targets[-1], mask)).sum(-1)).mean()
    tokens = mask[..., None]
    layers = [
        ((states - target) ** 2 * tokens).sum() / (target**2 * tokens).sum()
        for (states, _), target in zip(passes, targets, strict=True)
    ]
    short = [(F.relu(FLOOR - weights) ** 2 * mask[:, None]).sum() for _, weights in passes]
    return whole + torch.stack(layers).mean() + FLOOR_WEIGHT * torch.stack(short).sum() / mask.sum()


@torch.no_grad()
def _agreement(student: PrivateTower, original: SoftmaxTower, texts: _Texts, step: int) -> Agreement:
    cosines = []
    for embeddings, mask in texts.held_out():
        states, target = student(embeddings, mask)[-1], original(embeddings, mask)[-1]
        cosines.append((pooled(states, mask) * pooled(target, mask)).sum(-1))
    all_cosines = torch.cat(cosines)
    return Agreement(step, float(all_cosines.mean()), float(all_cosines.quantile(0.05)))


def _trainable(tower: PrivateTower) -> PrivateTower:
    """Copy a tower with weights that take gradients, and a temperature for each head."""
    layers = []
    for layer in tower.layers:
        named = {**layer, TEMPERATURE: torch.zeros(tower.heads, 1, 1).to(layer[FEATURES])}
        layers.append({name: part.detach().clone().requires_grad_() for name, part in named.items()})
    return replace(tower, layers=tuple(layers))


def _folded(tower: PrivateTower, detached: bool = False) -> PrivateTower:
    """Fold a tower's temperatures into its frequencies."""
    layers = []
    for layer in tower.layers:
        named = {name: part for name, part in layer.items() if name != TEMPERATURE}
        named[FEATURES] = layer[FEATURES] * layer[TEMPERATURE].exp()
        layers.append({name: part.detach() if detached else part for name, part in named.items()})
    return replace(tower, layers=tuple(layers))


class _Texts:
    """Embedded sentences, in batches of about one length."""

    def __init__(self, tower: TextTower, batch: int, seed: int) -> None:
        self._tower, self._batch = tower, batch
        self._generator = torch.Generator().manual_seed(seed)
        self._held, self._train = (
            [tower.tokenizer.encode(text).ids[:LONGEST] for text in texts] for texts in split_definitions()
        )
        self._names = name_tokens(tower)

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield all held-out sentences."""
        for start in range(0, HELD_OUT, 64):
            yield embedded(self._tower, self._held[start : start + 64])

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield training batches without end: embeddings [B, T, E] and mask [B, T]."""
        while True:
            drawn = torch.randperm(len(self._train), generator=self._generator)[: 16 * self._batch].tolist()
            sentences = sorted((self._train[index] for index in drawn), key=len)
            for number in torch.randperm(16, generator=self._generator).tolist():
                if float(torch.rand((), generator=self._generator)) < SOFT_SHARE:
                    yield behind_soft_context(self._tower, self._names, self._batch, SOFT_NOISE, self._generator)
                yield embedded(self._tower, sentences[number * self._batch : (number + 1) * self._batch])
