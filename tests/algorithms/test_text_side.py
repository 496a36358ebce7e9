"""What makes FedOTP, FedPGP and pFedPrompt what they are: identities, and the numbers of their authors' code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import fedotp, fedpgp, pfedprompt, settings_for
from sordino.encoders.cache import Kind
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
TABLES: dict[str, Any] = {
    "context_length": 4,
    "batch_size": 5,
    "local_steps": 2,
    "optimizer": {"learning_rate": 0.5},
}


def train(runtime: LocalRuntime, rounds: int = 3) -> Training:
    training = started_in_double(runtime)
    while training.round < rounds:
        training, _ = runtime.round(training)
    return training


def wave(*shape: int) -> Tensor:
    """Numbers that anybody can make again."""
    return torch.sin(torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64) * 1.7).view(shape)


def ripple(rate: float, *shape: int) -> Tensor:
    return torch.cos(torch.arange(torch.Size(shape).numel(), dtype=torch.float64) * rate).view(shape)


# FedOTP


def test_fedotp_scores_as_its_authors_code_does(model: PromptModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, loss and gradient of HongxiaLee/FedOTP at commit 9948611 (GLP_OT.py, OT = COT) on the same features."""
    monkeypatch.setattr(model.encoder, "logit_scale", 10.0)
    patches, labels = F.normalize(wave(3, 5, 6), dim=-1), torch.tensor([0, 3, 1])
    text = F.normalize(wave(2, 4, 6) + 0.3 * ripple(1.0, 2, 4, 6), dim=-1).requires_grad_()
    expected = {
        0.1: ([6.817386064869222, 6.132585439390459, 4.4733083339203885], 1.483584126303061, 1.2315396173330442),
        0.01: ([6.81862235471263, 6.135578023957589, 4.549977077907595], 1.470356112617092, 1.367753332125985),
    }
    for weight, (first, loss, norm) in expected.items():
        own = fedotp.Model(model.encoder, model.classes, 0.8, weight, 20_000, 1e-13)
        logits = own.scores(text[None], {}, patches[None])[0]
        found = F.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(found, text)
        torch.testing.assert_close(logits[0, :3], torch.tensor(first, dtype=torch.float64), rtol=1e-5, atol=0)
        assert float(found.detach()) == pytest.approx(loss, rel=1e-5)
        assert float(gradient.norm()) == pytest.approx(norm, rel=1e-5)


def test_one_prompt_and_balanced_transport_are_coop_on_mean_patches(
    model: PromptModel, read: Callable[[Kind], Tensor]
) -> None:
    """With one prompt every patch gives all it has to it, whatever it costs."""
    own = fedotp.Model(model.encoder, model.classes, 1.0, 0.1, 100, 1e-9)
    contexts = 0.5 * wave(3, 4, model.encoder.context_width)
    patches = read("patch")[:6].expand(3, 6, -1, -1)
    features = own.class_features({"shared": contexts})
    logits = own.scores(features, {"shared": contexts}, patches)
    torch.testing.assert_close(logits, model.logits(model.text_features(contexts), patches.mean(2)))


def test_fedotp_learns_both_contexts_and_sends_one(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime("fedotp", ROWS, TABLES)
    start, after = started_in_double(runtime), train(runtime)
    assert (after.server.context - start.server.context).norm() > 1e-3  # type: ignore[attr-defined]
    moved = (after.clients.context - start.clients.context).flatten(1).norm(dim=1)  # type: ignore[attr-defined]
    assert (moved > 1e-3).all()
    _, record = runtime.round(start)
    assert record.upload_bytes < 1.5 * start.server.context.nbytes  # type: ignore[attr-defined]


# FedPGP


def test_fedpgps_loss_is_its_authors_codes(model: PromptModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradient of TianyuCuiOvO/FedPGP at commit d43045b (trainers/fedpgp.py) on the same features."""
    monkeypatch.setattr(model.encoder, "logit_scale", 10.0)
    images, labels = F.normalize(wave(3, 6), dim=-1), torch.tensor([0, 3, 1])
    raw = [
        (wave(4, 6) + 0.3 * ripple(1.0, 4, 6)).requires_grad_(),
        (wave(4, 6) + 0.5 * ripple(0.6, 4, 6)).requires_grad_(),
    ]
    own = fedpgp.Model(model.encoder, model.classes, contrast=0.7, temperature=0.5)
    own.__dict__["_general"] = F.normalize(ripple(0.9, 4, 6), dim=-1)
    features = torch.stack([F.normalize(each, dim=-1) for each in raw])[None]  # [1, 2, C, D]
    penalty = own.penalty(features)
    assert penalty is not None
    loss = F.cross_entropy(own.scores(features, {}, images[None])[0], labels) + penalty[0]
    by_own, by_shared = torch.autograd.grad(loss, raw)
    assert float(loss.detach()) == pytest.approx(10.089857862692117, rel=1e-6)
    assert float(penalty.detach()) == pytest.approx(0.7 * 1.7806177060247113, rel=1e-6)
    assert float(by_own.norm()) == pytest.approx(2.432910415501347, rel=1e-6)
    assert float(by_shared.norm()) == pytest.approx(0.3209723115867711, rel=1e-6)
    expected = torch.tensor([-0.037342092721702656, -0.05599394246981937, -0.027745326337479517], dtype=torch.float64)
    torch.testing.assert_close(by_shared.flatten()[:3], expected, rtol=1e-6, atol=0)


def test_fedpgp_without_rank_and_contrast_is_promptfl(make_runtime: MakeRuntime) -> None:
    plain = TABLES | {"fedpgp": {"rank": 0, "contrast": 0.0}}
    one, other = make_runtime("fedpgp", ROWS, plain), make_runtime("promptfl", ROWS, TABLES)
    torch.testing.assert_close(
        one.prompts(train(one)), other.prompts(train(other)).expand(3, -1, -1), rtol=1e-8, atol=1e-10
    )


def test_contrast_draws_the_shared_prompt_to_the_hand_written_one(make_runtime: MakeRuntime) -> None:
    def nearness(contrast: float, seed: int) -> float:
        slow = {"optimizer": {"learning_rate": 0.02}, "fedpgp": {"contrast": contrast, "temperature": 0.1}}
        runtime = make_runtime("fedpgp", ROWS, TABLES | slow, rounds=10, seed=seed)
        shared = train(runtime, 10).server.context  # type: ignore[attr-defined]
        general = runtime.model.text_features(runtime.model.encoder.embed("a photo of a"))
        return float((runtime.model.text_features(shared) * general).sum(-1).mean())

    nearer = [nearness(1.0, seed) - nearness(0.0, seed) for seed in range(6)]
    assert sum(nearer) / 6 > 0.1


@pytest.mark.parametrize("privacy", [{"mechanism": "dp-sgd", "clip": 1e5}, {"mechanism": "cotangent", "clip": 1.414}])
def test_no_noise_and_no_clip_leave_the_penalty_alone(make_runtime: MakeRuntime, privacy: dict[str, Any]) -> None:
    """Mechanisms with nothing to clip and almost no noise give what no mechanism gives, contrastive term included."""
    tables = TABLES | {"batch_size": 0, "local_steps": 1, "fedpgp": {"contrast": 5.0}}
    free = make_runtime("fedpgp", ROWS, tables)
    subspace = {"subspace": free.model.encoder.feature_width} if privacy["mechanism"] == "cotangent" else {}
    noised = make_runtime("fedpgp", ROWS, tables, privacy=privacy | subspace | {"noise_multiplier": 1e-13})
    torch.testing.assert_close(noised.prompts(train(noised)), free.prompts(train(free)), rtol=1e-4, atol=1e-5)


# pFedPrompt


def test_pfedprompt_with_weight_zero_is_promptfl(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    one = make_runtime("pfedprompt", ROWS, TABLES | {"pfedprompt": {"attention": 0.0}})
    other = make_runtime("promptfl", ROWS, TABLES)
    images = table[0][:7]
    predicted = one.model.predict(one.prompts(train(one)), images)
    expected = other.model.predict(other.prompts(train(other)), images)
    torch.testing.assert_close(predicted, expected.expand(3, -1, -1), rtol=1e-8, atol=1e-10)


def test_pfedprompt_adds_what_the_memory_says(make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]) -> None:
    """alpha exp(-beta (1 - x F^T)) L, image by image and shot by shot."""
    features, labels = table
    runtime = make_runtime(
        "pfedprompt", ROWS, TABLES | {"pfedprompt": {"attention": 3.0, "sharpness": 2.0, "shots": 2}}
    )
    prompt = runtime.prompts(started_in_double(runtime))
    images, classes = features[:5], len(runtime.model.classes)
    found = runtime.model.predict(prompt, images)
    for client, rows in enumerate(ROWS):
        expected = runtime.model.logits(runtime.model.text_features(prompt["context"][client]), images)
        for label in range(classes):
            for row in [row for row in rows if labels[row] == label][:2]:
                expected[:, label] += 3.0 * torch.exp(-2.0 * (1 - images @ features[row]))
        torch.testing.assert_close(found[client], expected, rtol=1e-8, atol=1e-10)


def test_a_memory_is_silent_on_classes_that_it_does_not_know(
    make_runtime: MakeRuntime, table: tuple[Tensor, Tensor]
) -> None:
    runtime = make_runtime("pfedprompt", ROWS, TABLES)
    names = ["violin", "dog", "barge"]
    elsewhere = replace(runtime.model, classes=runtime.model.encoder.class_tokens(names))
    prompt = runtime.prompts(started_in_double(runtime))
    added = elsewhere.predict(prompt, table[0][:5]) - elsewhere.predict(
        dict(prompt) | {"labels": 0 * prompt["labels"]}, table[0][:5]
    )
    assert added[..., 1].abs().min() > 0
    assert not added[..., [0, 2]].any()


def test_no_mechanism_covers_a_memory(make_runtime: MakeRuntime) -> None:
    noised = make_runtime("pfedprompt", ROWS, TABLES, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})
    left = [each.content for each in noised.mechanism.empty_ledger().disclosures]
    assert left == ["each client's memory of image features, where its prompt is published"]
    assert not noised.mechanism.empty_ledger().private


@pytest.mark.parametrize(
    ("name", "tables", "key"),
    [
        ("fedotp", {"mass": 0.0}, "mass"),
        ("fedotp", {"mass": 1.5}, "mass"),
        ("fedpgp", {"rank": -1}, "rank"),
        ("fedpgp", {"temperature": 0.0}, "temperature"),
        ("pfedprompt", {"shots": 0}, "shots"),
    ],
)
def test_bad_settings_are_named(name: str, tables: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=f"settings.{name}.{key} = "):
        settings_for(name, {name: tables})


def test_the_cotangent_mechanism_refuses_patches(make_runtime: MakeRuntime) -> None:
    with pytest.raises(ConfigError, match=r"privacy.mechanism = 'cotangent'.*use 'dp-sgd'"):
        make_runtime("fedotp", ROWS, TABLES, privacy={"mechanism": "cotangent", "noise_multiplier": 1.0})
    assert pfedprompt.Model.linear
