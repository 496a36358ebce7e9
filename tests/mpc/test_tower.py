"""The tower without softmax: what its attention is, and that distillation brings it to its teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor
from typer.testing import CliRunner

from sordino.cli import app
from sordino.encoders.bundled import TEXT_MODEL, Embedder, TextTower, package_path
from sordino.errors import ConfigError
from sordino.mpc import MpcError
from sordino.mpc.distill import (
    EMBEDDINGS,
    distil,
    fingerprint,
    pooled,
    teacher_of,
    write_embeddings,
)
from sordino.mpc.public_text import definitions
from sordino.mpc.tower import BUNDLED, FEATURES, PrivateTower, SoftmaxTower, about, bundled_tower


@pytest.fixture(scope="module")
def teacher() -> TextTower:
    return TextTower.load(package_path(*TEXT_MODEL), torch.device("cpu"))


@pytest.fixture(scope="module")
def shallow(teacher: TextTower) -> TextTower:
    """Its first layer alone, so that training takes seconds."""
    tower = TextTower.load(package_path(*TEXT_MODEL), torch.device("cpu"))
    tower.layers = tower.layers[:1]
    tower.depth = 1
    return tower


def sentences(tower: TextTower, texts: list[str]) -> tuple[Tensor, Tensor]:
    rows = [tower.tokenizer.encode(text).ids for text in texts]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return tower.words[tokens] + tower.positions[:longest], mask


TEXTS = ["a photo of a cat", "a sketch of a grand piano on a stage", "an old snipe"]


def test_with_many_frequencies_attention_is_softmax_of_cosines(shallow: TextTower) -> None:
    """E cos(w (q - k)) = exp(-|q - k|^2 / 2) for normal w, which is exp(q k) / e for unit norms."""
    tower = PrivateTower.from_softmax(shallow, 8192, seed=0)
    embeddings, mask = sentences(shallow, TEXTS)
    x = F.layer_norm(embeddings, embeddings.shape[-1:], *tower.norm, tower.epsilon)
    found, _ = tower.attend(x, tower.layers[0], mask)
    qkv = F.linear(x, tower.layers[0]["qkv.weight"], tower.layers[0]["qkv.bias"])
    q, k, v = (part.view(*part.shape[:2], tower.heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
    expected = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
    there = mask.bool()
    assert (found - expected)[there].norm() / expected[there].norm() < 0.02


def test_padding_changes_nothing(teacher: TextTower) -> None:
    tower = PrivateTower.from_softmax(teacher, 64, seed=0)
    embeddings, mask = sentences(teacher, TEXTS)
    together = pooled(tower(embeddings, mask)[-1], mask)
    for number, text in enumerate(TEXTS):
        alone = sentences(teacher, [text])
        torch.testing.assert_close(pooled(tower(*alone)[-1], alone[1])[0], together[number], rtol=1e-4, atol=1e-5)


def test_the_softmax_tower_is_the_encoders_own(teacher: TextTower) -> None:
    names = ["cat", "grand piano"]
    context = teacher.embed("a photo of a")[None]
    expected = F.normalize(teacher(context, teacher.class_tokens(names))[0], dim=-1)
    start, end = (teacher.words[teacher.tokenizer.token_to_id(mark)][None] for mark in ("[CLS]", "[SEP]"))
    for name, wanted in zip(names, expected, strict=True):
        tokens = torch.cat([start, context[0], teacher.embed(f"{name}."), end])[None]
        mask = torch.ones(tokens.shape[:2])
        found = pooled(SoftmaxTower.of(teacher)(tokens + teacher.positions[: tokens.shape[1]], mask)[-1], mask)
        torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)


def test_distillation_brings_the_student_to_its_teacher(shallow: TextTower) -> None:
    steps = 24
    tower, agreements = distil(shallow, steps, batch=8, features=16)
    assert [each.step for each in agreements] == [0, steps]
    assert 1 - agreements[-1].mean < 0.75 * (1 - agreements[0].mean)
    assert tower.layers[0][FEATURES].shape == (12, 32, 16)
    assert not any(part.requires_grad for part in tower.layers[0].values())


def test_a_tower_comes_back_as_it_was_written(shallow: TextTower, tmp_path: Path) -> None:
    tower = PrivateTower.from_softmax(shallow, 8, seed=1)
    file = tmp_path / "tower.safetensors"
    file.write_bytes(tower.to_bytes({"teacher": "it"}))
    again = PrivateTower.load(file)
    assert about(file)["teacher"] == "it"
    assert (again.heads, again.epsilon, len(again.layers)) == (12, tower.epsilon, 1)
    for name, part in tower.layers[0].items():
        torch.testing.assert_close(again.layers[0][name], part.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tower.safetensors"
    file.write_bytes(content)
    with pytest.raises(MpcError, match=r"tower\.safetensors holds no private tower"):
        PrivateTower.load(file)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model.*BERT-like"):
        teacher_of(tmp_path)
    done = CliRunner().invoke(app, ["mpc", "distill", "--out", str(tmp_path / "x"), "--model", str(tmp_path)])
    assert done.exit_code != 0
    assert not (tmp_path / "x").exists()


def test_the_tower_in_the_package_agrees_with_its_teacher(teacher: TextTower) -> None:
    """On definitions of which the tower has seen most, and on sentences that are nobody's definition."""
    tower, told = bundled_tower(), about(BUNDLED)
    assert told["teacher"] == fingerprint(teacher)
    assert BUNDLED.stat().st_size < 25_000_000
    own = [
        "The weather was awful, but we enjoyed the walk.",
        "This film is a waste of time.",
        "a blurry photo of a tram",
    ]
    for texts, least in ((definitions()[::350], 0.9), (own, 0.8)):
        embeddings, mask = sentences(teacher, [text[:120] for text in texts])
        found, wanted = (
            pooled(tower(embeddings, mask)[-1], mask),
            pooled(SoftmaxTower.of(teacher)(embeddings, mask)[-1], mask),
        )
        assert float((found * wanted).sum(-1).mean()) > least
    naive = replace(PrivateTower.from_softmax(teacher, 64, seed=0))
    embeddings, mask = sentences(teacher, own)
    swapped = pooled(naive(embeddings, mask)[-1], mask)
    wanted = pooled(SoftmaxTower.of(teacher)(embeddings, mask)[-1], mask)
    assert float((swapped * wanted).sum(-1).mean()) < 0.75  # what distillation is for


def test_the_owners_part_of_a_checkpoint_has_no_layer(tmp_path: Path) -> None:
    """And embeds as the checkpoint does."""
    folder = package_path(*TEXT_MODEL)
    write_embeddings(folder, tmp_path / "owner")
    assert sorted(file.name for file in (tmp_path / "owner").iterdir()) == ["model.safetensors", "tokenizer.json"]
    with safe_open(tmp_path / "owner" / "model.safetensors", "pt") as stored:
        assert set(stored.keys()) == EMBEDDINGS
    whole, part = (
        TextTower.load(folder, torch.device("cpu")),
        Embedder.of_folder(tmp_path / "owner", torch.device("cpu")),
    )
    assert torch.equal(part.positions, whole.positions)
    assert torch.equal(part.embed("a jacksnipe"), whole.embed("a jacksnipe"))
    with pytest.raises(ConfigError, match="no BERT-like checkpoint"):
        write_embeddings(tmp_path / "owner", tmp_path / "again")
