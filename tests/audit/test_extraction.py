"""Attacks through a service: copies made of answers, and membership by answers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from sordino.audit.extraction import label_only
from sordino.audit.extraction.copying import DEFENCES, USUAL, Answers, fitted, steal_by_asking
from sordino.audit.extraction.label_only import infer_by_asking
from sordino.audit.extraction.pictures import VARIANTS, by_variant, halves, own_and_blended, varied
from sordino.audit.subject import Subject
from sordino.encoders.classifier import told
from sordino.errors import ConfigError
from sordino.experiments.config import load_config
from sordino.experiments.run import run

SCALE = 20.0


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1)


@pytest.fixture
def victim() -> tuple[Tensor, Tensor, Tensor]:
    """Class features [C, D] of a victim and of the hand-written prompt, and a thief's pictures [Q, D]."""
    rng = torch.Generator().manual_seed(3)
    true, start, pictures = (torch.randn(count, 12, generator=rng, dtype=torch.float64) for count in (7, 7, 600))
    return unit(true), unit(start), unit(pictures)


def asked(true: Tensor, pictures: Tensor, defence: str) -> Answers:
    return Answers.of((SCALE * pictures @ true.T).softmax(-1), *DEFENCES[defence])


def agreement(copy: tuple[Tensor, Tensor], true: Tensor) -> float:
    rng = torch.Generator().manual_seed(4)
    fresh = unit(torch.randn(2000, 12, generator=rng, dtype=torch.float64))
    predicted = (SCALE * fresh @ copy[0].T + copy[1]).argmax(-1)
    return float((predicted == (fresh @ true.T).argmax(-1)).double().mean())


def test_exact_answers_give_the_prompt_away(victim: tuple[Tensor, Tensor, Tensor]) -> None:
    """Logits are linear in the feature, so the class features follow but for what all classes have in common."""
    true, start, pictures = victim
    features, bias = fitted(pictures, asked(true, pictures, "none"), start, SCALE)
    apart = features - features.mean(0) - (true - true.mean(0))
    assert apart.norm(dim=-1).max() < 0.02
    assert (bias - bias.mean()).abs().max() < 0.1
    assert agreement((features, bias), true) > 0.995


def test_less_that_is_told_makes_a_worse_copy(victim: tuple[Tensor, Tensor, Tensor]) -> None:
    true, start, pictures = victim
    close = {}
    for name in DEFENCES:
        features, _ = fitted(pictures[:60], asked(true, pictures, name).first(60), start, SCALE)
        close[name] = float(
            torch.nn.functional.cosine_similarity(features - features.mean(0), true - true.mean(0)).mean()
        )
    assert close["none"] > close["two decimals"] > close["top 1, two decimals"]
    assert close["none"] > close["top 5"] > close["top 1, two decimals"]


def test_more_questions_make_a_better_copy_and_none_leaves_the_public_one(
    victim: tuple[Tensor, Tensor, Tensor],
) -> None:
    true, start, pictures = victim
    answers = asked(true, pictures, USUAL)
    agreed = [agreement((start, torch.zeros(7, dtype=torch.float64)), true)]
    agreed += [agreement(fitted(pictures[:size], answers.first(size), start, SCALE), true) for size in (20, 100, 600)]
    assert agreed == sorted(agreed)
    assert agreed[-1] > 0.95
    # A victim that has learned nothing answers as the hand-written prompt does; the copy stays there.
    features, _ = fitted(pictures, asked(start, pictures, USUAL), start, SCALE)
    assert (features - start).norm(dim=-1).max() < 0.05


def test_an_answer_is_likeliest_under_what_it_tells() -> None:
    """The surprise is the cross entropy where all classes are told, and else that of the told ones and of the rest."""
    rng = torch.Generator().manual_seed(5)
    exact = torch.randn(9, 6, generator=rng, dtype=torch.float64).softmax(-1)
    logits = torch.randn(9, 6, generator=rng, dtype=torch.float64)
    log_q = logits.log_softmax(-1)
    whole = Answers(exact, torch.ones_like(exact, dtype=torch.bool))
    torch.testing.assert_close(whole.surprise(logits), -(exact * log_q).sum(-1))
    two = Answers.of(exact, 2, 6)
    assert (two.told.sum(-1) == 2).all()
    assert (two.told.float() * exact).sum() == pytest.approx(float(exact.topk(2).values.sum()))
    rest = 1 - two.probabilities.sum(-1)
    others = log_q.exp().masked_fill(two.told, 0).sum(-1).log()
    expected = -(two.probabilities * log_q).sum(-1) - rest * others
    torch.testing.assert_close(two.surprise(logits), expected)
    assert (two.surprise(exact.log()) <= two.surprise(logits)).all()


def test_what_a_service_tells() -> None:
    probabilities = torch.tensor([0.104, 0.511, 0.104, 0.281])
    assert told(probabilities, 3, 2) == [(1, 0.51), (3, 0.28), (0, 0.1)]
    assert told(probabilities, 9, 1) == [(1, 0.5), (3, 0.3), (0, 0.1), (2, 0.1)]


def test_a_thief_asks_with_its_own_pictures_first_and_then_with_blends(clip_run: Path) -> None:
    subject = Subject.open(clip_run)
    images = subject.encoded_data.images
    own, judging = halves(subject.task.test, 1)
    assert not set(own.tolist()) & set(judging.tolist())
    assert sorted([*own.tolist(), *judging.tolist()]) == list(range(len(subject.task.test)))
    rows = subject.task.test[own.numpy()].tolist()
    made = own_and_blended(images, rows, len(rows) + 5, 1)
    shown = [made.image(index).convert("RGB").tobytes() for index in range(len(made))]
    assert sorted(shown[: len(rows)]) == sorted(images.image(row).convert("RGB").tobytes() for row in rows)
    assert len(set(shown[len(rows) :])) == 5
    assert shown == [made.image(index).convert("RGB").tobytes() for index in range(len(made))]


def test_variants_of_a_picture_stand_together(clip_run: Path) -> None:
    images = Subject.open(clip_run).encoded_data.images
    made = varied(images, [3, 5])
    assert len(made) == 2 * len(VARIANTS)
    assert made.image(0).tobytes() == images.image(3).tobytes()
    assert made.image(len(VARIANTS)).tobytes() == images.image(5).tobytes()
    others = {made.image(index).tobytes() for index in range(1, len(VARIANTS))}
    assert len(others) == len(VARIANTS) - 1
    assert made.image(1).size == images.image(3).size
    assert by_variant(torch.arange(len(made))[:, None]).tolist()[1] == [[1], [len(VARIANTS) + 1]]


@pytest.fixture
def clip_run(config_file: Path, tmp_path: Path) -> Path:
    """A run of a small CLIP that anybody may ask."""
    run(load_config(config_file, ["algorithm=local", "rounds=2"]), tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.slow
def test_copies_of_a_run(clip_run: Path) -> None:
    subject = Subject.open(clip_run)
    found = steal_by_asking(subject, 1, 150)
    assert [(copy.queries, copy.defence) for copy in found.copies] == [
        (size, name) for size in (100, 150) for name in DEFENCES
    ]
    assert len(found.victims) == min(3, len(subject.task.train))
    assert found.judged + len(halves(subject.task.test, 1)[0]) == len(subject.task.test)
    values = [found.hand_written, *found.copies]
    assert all(0 <= copy.agreement <= 1 and copy.cosine is not None and abs(copy.cosine) <= 1 for copy in values)
    best = max(copy.agreement for copy in found.copies if copy.defence == "none")
    assert best >= found.hand_written.agreement
    again = steal_by_asking(subject, 1, 150)
    assert again == found
    with pytest.raises(ConfigError, match="--queries"):
        steal_by_asking(subject, 1, 3)


def test_answers_tell_members_of_a_prompt_that_knows_them_by_heart(
    clip_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = Subject.open(clip_run)
    members = {row for rows in subject.task.train for row in rows.tolist()}
    labels = subject.labels.cpu().numpy()
    chosen = label_only._some(label_only.candidates(subject, label_only.generator(1, "candidates")), 1)

    def by_heart(model: object, prompt: object, features: Tensor, owner: np.ndarray) -> np.ndarray:
        """Right about members; about all others, and without a prompt, the class after it."""
        learned = not isinstance(prompt, Tensor) or prompt.shape[0] > 1
        right = np.array([learned and row in members for row in chosen.rows])
        said = (labels[chosen.rows] + ~right) % len(subject.task.class_names)
        return np.log(
            np.full((len(said), len(subject.task.class_names)), 0.02)
            + 0.9 * np.eye(len(subject.task.class_names))[said]
        )

    honest = infer_by_asking(subject, 1)
    assert honest.gap.auc < 1
    assert honest.questions == len(chosen.rows) * len(VARIANTS)
    monkeypatch.setattr(label_only, "confidences", by_heart)
    found = infer_by_asking(subject, 1)
    assert found.members == found.non_members
    assert found.gap.auc == found.augmented.auc == found.answers.auc == 1.0
