"""The joint space against closed forms, random draws, and a second fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sordino.encoders import joint_space
from sordino.encoders.bundled import IMAGE_WEIGHTS, JOINT_SPACE, BundledEncoder, package_path
from sordino.encoders.joint_space import CLASSES, Corpus


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return torch.load(package_path(*IMAGE_WEIGHTS), weights_only=True)


def synthetic_corpus(repeats: int) -> Corpus:
    """One random sentence a class, class 0's repeated."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(CLASSES, 384, generator=generator).double(), dim=-1)
    classes = torch.cat([torch.zeros(repeats - 1, dtype=torch.long), torch.arange(CLASSES)])
    return Corpus(features[classes], classes, features)


def test_synonyms_do_not_outweigh_other_classes() -> None:
    targets = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(1)).double()
    keep = torch.ones(CLASSES, dtype=torch.bool)
    once = joint_space.ridge_map(synthetic_corpus(1), targets, 1.0, keep)
    often = joint_space.ridge_map(synthetic_corpus(9), targets, 1.0, keep)
    for left, right in zip(once, often, strict=True):
        torch.testing.assert_close(left, right)


def test_the_ridge_map_has_no_gradient() -> None:
    corpus = synthetic_corpus(1)
    targets = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(1)).double()
    keep = torch.arange(CLASSES) < 700
    mean, fitted = joint_space.ridge_map(corpus, targets, 3.0, keep)
    fitted.requires_grad_()
    loss = ((corpus.features[keep] - mean) @ fitted - targets[keep]).square().sum() + 3.0 * fitted.square().sum()
    (gradient,) = torch.autograd.grad(loss, fitted)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-9, rtol=0)


def test_the_image_mean_is_that_of_clipped_normal_draws(weights: dict[str, torch.Tensor]) -> None:
    draws = 20_000
    normal = torch.randn(draws, 1280, generator=torch.Generator().manual_seed(0))
    clipped = (weights["_bn1.bias"] + weights["_bn1.weight"] * normal).clamp(0, 6)
    error = clipped.std(0) / draws**0.5  # standard error; five of them in 1280 channels is a chance of 1e-3
    assert ((clipped.mean(0) - joint_space.image_mean(weights)).abs() <= 5 * error + 1e-6).all()


def test_factors_give_the_scores_of_the_full_map(weights: dict[str, torch.Tensor]) -> None:
    corpus = synthetic_corpus(1)
    targets = joint_space.unit_rows(weights)
    mean, full = joint_space.ridge_map(corpus, targets, 1.0, torch.ones(CLASSES, dtype=torch.bool))
    space = joint_space.fit(corpus, weights, 1.0, 20.0, 384)
    images = torch.randn(5, 1280, generator=torch.Generator().manual_seed(2)).double()
    product = space["text_map"].double() @ space["image_map"].double().T
    # Half precision keeps 11 bits: about 5e-4 of the largest entry of each factor, over 384 terms of random sign.
    torch.testing.assert_close(product @ images.T, full @ images.T, atol=5e-4 * full.norm().item(), rtol=0)
    torch.testing.assert_close(space["text_mean"].double(), mean, atol=1e-6, rtol=0)


def test_the_shipped_space_names_classes_far_above_chance() -> None:
    encoder = BundledEncoder.load(torch.device("cpu"))
    rows = joint_space.unit_rows(torch.load(package_path(*IMAGE_WEIGHTS), weights_only=True)).float()
    known = {"goldfish": 1, "zebra": 340, "grand piano": 579, "pizza": 963, "umbrella": 879}
    images = torch.nn.functional.normalize(rows @ encoder.joint["image_map"], dim=-1)
    with torch.no_grad():
        text = encoder.text_features(encoder.zero_shot_context(), encoder.class_tokens(list(known)))
    assert (text @ images.T).argmax(1).tolist() == list(known.values())


@pytest.mark.slow
def test_a_second_fit_gives_the_shipped_file(tmp_path: Path) -> None:
    joint_space.main(["--out", str(tmp_path / "again.safetensors")])
    again, shipped = load_file(tmp_path / "again.safetensors"), load_file(JOINT_SPACE)
    assert again["logit_scale"] == shipped["logit_scale"]
    for name in ("text_mean", "image_mean"):
        torch.testing.assert_close(again[name], shipped[name], atol=1e-5, rtol=1e-4)
    # Single directions are open to rotation where singular values are close; their product is not.
    first, second = (space["text_map"].float() @ space["image_map"].float().T for space in (again, shipped))
    torch.testing.assert_close(first, second, atol=2e-3 * second.abs().max().item(), rtol=0)


def test_classifier_rows_are_those_that_the_space_was_fitted_to(weights: dict[str, torch.Tensor]) -> None:
    encoder = BundledEncoder.load(torch.device("cpu"))
    projected = joint_space.unit_rows(weights) @ load_file(JOINT_SPACE)["image_map"].double()
    expected = torch.nn.functional.normalize(projected, dim=-1)
    torch.testing.assert_close(encoder.classifier_rows().double(), expected, rtol=0, atol=1e-5)
