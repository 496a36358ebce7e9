"""Membership inference through a service, by its answers alone.

Choquette-Choo, Tramer, Carlini, Papernot, Label-Only Membership Inference Attacks, ICML 2021. Three attacks guess which
candidates the prompt of their owner was trained on; all know the candidate's class:

- **gap**: one question, and the best class of its answer. A picture that gets its class is said to be a member.
- **augmented**: nine questions, of the picture as it is, shifted and rotated, and the best class of each. The score is
  how often the class is right, less how often the hand-written prompt is, which everybody has: pictures that are easy
  for any prompt tell nothing.
- **answers**: one question, and all that the service tells by default, the probability of the class in two decimals if
  it is among the five told. Less that of the hand-written prompt.

No shadow federations are trained. `sordino.audit.membership` has them, and all exact probabilities.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.audit.extraction.pictures import VARIANTS, by_variant, encoded, varied
from sordino.audit.membership import Candidates, candidates, confidences
from sordino.audit.scores import Attack, Claim
from sordino.audit.subject import Subject, refuse_persons
from sordino.encoders.classifier import told
from sordino.encoders.generative.model import context_model
from sordino.randomness import generator

Floats = NDArray[np.float64]

MOST_PAIRS = 256  # of a member and a non-member; each is asked about nine times
TOP, DIGITS = 5, 2  # what a service tells by default


@dataclass(frozen=True)
class LabelOnly:
    """Membership inference by answers.

    Attributes:
        gap, augmented, answers: see the module.
        members, non_members: number of candidates of each kind, which are equal.
        questions: pictures that were asked about.
        claimed_epsilon: an example's, against the untrusted observer that learned most; None if it is infinite.
        delta: at which claim and bounds are stated. The attacks' bounds hold together at 95% confidence.
    """

    gap: Attack
    augmented: Attack
    answers: Attack
    members: int
    non_members: int
    questions: int
    claimed_epsilon: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def infer_by_asking(subject: Subject, seed: int = 1) -> LabelOnly:
    """Guess members by what a service answers.

    Args:
        subject: the run.
        seed: decides candidates and ties.

    Raises:
        ConfigError: the person is the unit of privacy.
        DataError: no client has both training and test images of a class.
    """
    runtime, model = subject.runtime, subject.runtime.model
    refuse_persons(runtime)
    chosen = _some(candidates(subject, generator(seed, "candidates")), seed)
    labels = subject.labels.cpu().numpy()[chosen.rows]
    pictures = varied(subject.encoded_data.images, chosen.rows.tolist())
    plain = context_model(model.encoder, model.classes)
    features = {
        kind: by_variant(found)
        for kind, found in encoded(pictures, model.encoder, (model.reads, plain.reads), subject.progress).items()
    }
    prompts = runtime.prompts(subject.training)
    written = model.encoder.zero_shot_context()[None].to(model.encoder.device)
    nobody = np.zeros_like(chosen.owner)
    learned = np.stack([confidences(model, prompts, each, chosen.owner) for each in features[model.reads]])
    public = np.stack([confidences(plain, written, each, nobody) for each in features[plain.reads]])
    right, easy = learned.argmax(-1) == labels, public.argmax(-1) == labels
    scores: dict[str, Floats] = {
        "gap": right[0].astype(np.float64),
        "augmented": right.mean(0) - easy.mean(0),
        "answers": _told(learned[0], labels) - _told(public[0], labels),
    }
    claim = Claim.of(subject, subject.ledger)
    return LabelOnly(
        **claim.judge_all(scores, chosen.member, seed, subject.persons_of(chosen.rows)),
        members=int(chosen.member.sum()),
        non_members=int((~chosen.member).sum()),
        questions=len(labels) * len(VARIANTS),
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
    )


def _some(chosen: Candidates, seed: int) -> Candidates:
    """Return at most `MOST_PAIRS` of the pairs, at random."""
    pairs = len(chosen.rows) // 2
    kept = np.sort(generator(seed, "pairs that are asked about").permutation(pairs)[:MOST_PAIRS])
    both = np.concatenate([kept, kept + pairs])
    return Candidates(chosen.rows[both], chosen.owner[both], chosen.member[both])


def _told(log_probabilities: Floats, labels: NDArray[np.int64]) -> Floats:
    """Return the probability [n] that an answer tells of each picture's class; 0 where it tells none."""
    rows: Tensor = torch.from_numpy(np.exp(log_probabilities))
    return np.array(
        [dict(told(row, TOP, DIGITS)).get(int(label), 0.0) for row, label in zip(rows, labels, strict=True)]
    )
