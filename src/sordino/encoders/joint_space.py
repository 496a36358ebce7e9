"""The bundled encoder's joint space: a ridge map from features of class names to rows of the image classifier.

No image is used. A sentence about each of the 1,000 ImageNet classes has a text feature, and the
image tower's classifier has a weight row for the class. Ridge regression maps the first to the
second. Applied to any other sentence, it predicts the row of a class that the classifier never had
(Frome et al., DeViSE, 2013, NeurIPS; here with no training).

- Texts: every synonym of a class, alone and after 'a photo of a', and its definition (timm's
  `ImageNetInfo`). A class weighs one in total, however many synonyms it has. Text features are unit
  norm, less their weighted mean.
- Targets: the classifier's rows, less their mean (softmax does not see it), at unit norm.
- Images: pooled features less their mean. The mean follows from the last batch norm: if a channel
  before ReLU6 is normal with mean beta and standard deviation gamma, the mean after it has a closed
  form.
- The ridge weight and the logit scale minimize the cross-entropy of classifier rows, taken as
  images of their class, over held-out classes by their predicted rows: ten folds over classes.
- The map has rank at most 384, so its singular value decomposition expresses scores in as many
  dimensions. This is exact up to a positive factor for each image, and up to the half precision in
  which the maps are stored. The shipped space keeps the first 256 dimensions; `docs/encoders.md`
  states the loss.

Run `python -m sordino.encoders.joint_space [--out FILE]` to fit the shipped file again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor

from sordino.encoders.bundled import IMAGE_WEIGHTS, JOINT_SPACE, TEXT_MODEL, TextTower, package_path

CLASSES = 1000
FOLDS = 10
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
WIDTH = 256
LOGIT_SCALES = tuple(range(5, 101))
TEMPLATE = "a photo of a"


@dataclass(frozen=True)
class Corpus:
    """Sentences about the ImageNet classes, encoded.

    Attributes:
        features: [R, 384] unit-norm text features, float64.
        classes: [R] class of each sentence.
        queries: [1000, 384] features of the plain prompt with each class's first synonym, by which
            held-out classes are named.
    """

    features: Tensor
    classes: Tensor
    queries: Tensor


@dataclass(frozen=True)
class HeldOut:
    """The map's accuracy on classes that it was not fitted on, means over all folds.

    Attributes:
        ridge: the ridge weight.
        logit_scale: the scale of least cross-entropy.
        cross_entropy: nats, a row of a held-out class against the names of its fold's 100 held-out
            classes.
        accuracy: fraction of rows whose nearest name is their own (chance 0.01).
        reciprocal_rank: of the right row among all 1000, by a held-out name.
    """

    ridge: float
    logit_scale: float
    cross_entropy: float
    accuracy: float
    reciprocal_rank: float


def fit(
    corpus: Corpus,
    weights: dict[str, Tensor],
    ridge: float,
    logit_scale: float,
    width: int,
) -> dict[str, Tensor]:
    """Compute the joint space as named tensors: maps in half precision, all else float32.

    Args:
        corpus: encoded sentences.
        weights: the image tower's stored weights.
        ridge: weight of the squared norm of the map.
        logit_scale: the inverse temperature that is stored beside the map.
        width: D, at most 384.

    Returns:
        text_mean [384], text_map [384, D], image_mean [1280], image_map [1280, D] (orthonormal
        columns), logit_scale.
    """
    mean, full = ridge_map(corpus, unit_rows(weights), ridge, torch.ones(CLASSES, dtype=torch.bool))
    left, singular, right = torch.linalg.svd(full, full_matrices=False)
    return {
        "text_mean": mean.float(),
        "text_map": (left * singular)[:, :width].half().contiguous(),
        "image_mean": image_mean(weights).float(),
        "image_map": right[:width].T.half().contiguous(),
        "logit_scale": torch.tensor(logit_scale),
    }


def ridge_map(corpus: Corpus, targets: Tensor, ridge: float, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the mean text feature [384] and the map [384, 1280] on the classes of the mask `keep` [1000].

    Every class weighs one in total.
    """
    kept = keep[corpus.classes]
    features, classes = corpus.features[kept], corpus.classes[kept]
    weight = 1 / torch.bincount(classes, minlength=CLASSES)[classes, None].double()  # [R, 1]
    mean = (weight * features).sum(0) / weight.sum()
    centered = features - mean
    gram = centered.T @ (weight * centered) + ridge * torch.eye(
        centered.shape[1],
        dtype=torch.float64,
    )
    return mean, torch.linalg.solve(gram, centered.T @ (weight * targets[classes]))


def held_out(
    corpus: Corpus,
    weights: dict[str, Tensor],
    ridge: float,
    width: int = WIDTH,
) -> HeldOut:
    """Cross-validate a ridge weight over classes: fit on nine tenths, name the rows of the last tenth."""
    targets = unit_rows(weights)
    fold = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(0)) % FOLDS
    scales = torch.tensor(LOGIT_SCALES, dtype=torch.float64)
    losses, hits, reciprocal = torch.zeros(len(scales), dtype=torch.float64), 0.0, 0.0
    for index in range(FOLDS):
        held = (fold == index).nonzero().flatten()
        mean, full = ridge_map(corpus, targets, ridge, fold != index)
        left, singular, right = torch.linalg.svd(full, full_matrices=False)
        text = F.normalize((corpus.queries[held] - mean) @ (left * singular)[:, :width], dim=-1)
        rows = F.normalize(targets @ right[:width].T, dim=-1)  # [1000, D], rows as images
        scores = text @ rows.T  # [held, 1000]
        right_scores = scores.gather(1, held[:, None])
        reciprocal += (1 / (scores >= right_scores).sum(1)).sum().item()
        among = scores[:, held].T  # [rows, names] of the held-out classes
        labels = torch.arange(len(held))
        hits += (among.argmax(1) == labels).sum().item()
        losses += torch.stack(
            [F.cross_entropy(scale * among, labels, reduction="sum") for scale in scales],
        )
    best = int(losses.argmin())
    return HeldOut(
        ridge,
        float(scales[best]),
        losses[best].item() / CLASSES,
        hits / CLASSES,
        reciprocal / CLASSES,
    )


def unit_rows(weights: dict[str, Tensor]) -> Tensor:
    """Return the classifier's rows [1000, 1280] less their mean, at unit norm."""
    rows = weights["_fc.weight"].double()
    return F.normalize(rows - rows.mean(0), dim=-1)


def image_mean(weights: dict[str, Tensor]) -> Tensor:
    """Compute the mean pooled feature [1280] from the last batch norm's gain and shift.

    Channels before ReLU6 are taken as normal.
    """
    mean, deviation = weights["_bn1.bias"].double(), weights["_bn1.weight"].double().abs()

    def rectified(mean: Tensor) -> Tensor:  # the mean of ReLU(x)
        ratio = mean / deviation
        density = torch.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
        result: Tensor = mean * torch.special.ndtr(ratio) + deviation * density
        return result

    return rectified(mean) - rectified(mean - 6)  # ReLU6(x) = ReLU(x) - ReLU(x - 6)


def imagenet_corpus(
    text: TextTower,
    templates: Sequence[str] = (TEMPLATE, ""),
    definitions: bool = True,
) -> Corpus:
    """Encode every synonym of every ImageNet class after each template, and the definitions."""
    info = ImageNetInfo()
    synonyms = [info.index_to_description(index).split(", ") for index in range(CLASSES)]
    names = [name for group in synonyms for name in group]
    owners = [index for index, group in enumerate(synonyms) for _ in group]
    features = [encode(text, template, names) for template in templates]
    classes = owners * len(templates)
    if definitions:
        full = [info.index_to_description(index, detailed=True) for index in range(CLASSES)]
        features.append(encode(text, "", [sentence.split(": ", 1)[1] for sentence in full]))
        classes = classes + list(range(CLASSES))
    queries = encode(text, TEMPLATE, [group[0] for group in synonyms])
    return Corpus(torch.cat(features), torch.tensor(classes), queries)


@torch.no_grad()
def encode(text: TextTower, template: str, phrases: Sequence[str], batch: int = 128) -> Tensor:
    """Return unit-norm text features [len(phrases), 384], float64, of 'template phrase.'"""
    context = text.embed(template)[None]
    chunks = [phrases[start : start + batch] for start in range(0, len(phrases), batch)]
    pooled = torch.cat(
        [text(context, text.class_tokens(chunk, compete=False))[0] for chunk in chunks],
    )
    return F.normalize(pooled.double(), dim=-1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit the joint space and write it."""
    parser = argparse.ArgumentParser(
        prog="python -m sordino.encoders.joint_space",
        description=__doc__.split("\n")[0],
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=JOINT_SPACE,
        help="where to write (default: the shipped file)",
    )
    parser.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        help="D, at most 384 (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    text = TextTower.load(package_path(*TEXT_MODEL), torch.device("cpu"))
    weights = torch.load(package_path(*IMAGE_WEIGHTS), map_location="cpu", weights_only=True)
    corpus = imagenet_corpus(text)
    trials = [held_out(corpus, weights, ridge, options.width) for ridge in RIDGES]
    best = min(trials, key=lambda trial: trial.cross_entropy)
    for trial in trials:
        print(trial, "<- chosen" if trial is best else "", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(fit(corpus, weights, best.ridge, best.logit_scale, options.width), options.out)


if __name__ == "__main__":
    main()
