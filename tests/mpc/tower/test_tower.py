"""The tower without softmax: what its attention is, and that distillation brings it to its teacher."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.encoders.bert_folder import EMBEDDINGS
from sordino.encoders.bundled import TEXT_MODEL, Embedder, TextTower, package_path
from sordino.errors import ConfigError
from sordino.mpc import MpcError
from sordino.mpc.parties.certificates import make_certificates
from sordino.mpc.tower.distill import distill, embedder_of, fingerprint, pooled, teacher_of, write_embeddings
from sordino.mpc.tower.public_text import definitions
from sordino.mpc.tower.tower import BUNDLED, FEATURES, PrivateTower, SoftmaxTower, about, bundled_tower


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


@pytest.mark.slow
def test_distillation_brings_the_student_to_its_teacher(shallow: TextTower) -> None:
    steps = 24
    tower, agreements = distill(shallow, steps, batch=8, features=16)
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
    with pytest.raises(ConfigError, match=r"--tower = .*tower\.safetensors': holds no private tower"):
        PrivateTower.load(file, "--tower")


def test_a_tower_whose_parts_do_not_fit_is_refused(shallow: TextTower, tmp_path: Path) -> None:
    tower, file = PrivateTower.from_softmax(shallow, 8, seed=1), tmp_path / "tower.safetensors"
    layer = tower.layers[0]
    cut = {**layer, "inner.weight": layer["inner.weight"][:, :-1]}
    less = {name: part for name, part in layer.items() if name != "norm2.bias"}
    for damaged, message in (
        (replace(tower, layers=(cut,)), r"0\.inner\.weight is of shape \(1536, 383\) and not \(1536, 384\)"),
        (replace(tower, layers=(less,)), r"it lacks norm2\.bias"),
        (replace(tower, heads=7), "7 heads, 384 wide"),
        (replace(tower, layers=()), "0 layers"),
    ):
        file.write_bytes(damaged.to_bytes({}))
        with pytest.raises(ConfigError, match=message):
            PrivateTower.load(file)


def test_a_folder_without_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model.*BERT-like"):
        teacher_of(tmp_path)
    done = CliRunner().invoke(app, ["mpc", "distill", "--out", str(tmp_path / "x"), "--model", str(tmp_path)])
    assert done.exit_code != 0
    assert not (tmp_path / "x").exists()


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small masked language model, as transformers saves it: its encoder's names begin with `bert.`."""
    torch.manual_seed(0)
    folder = tmp_path / "checkpoint"
    BertForMaskedLM(BertConfig(**SIZES, max_position_embeddings=64, initializer_range=0.15)).save_pretrained(folder)
    shutil.copy(package_path(*TEXT_MODEL) / "tokenizer.json", folder)
    return folder


def rewrite(folder: Path, renamed: Callable[[str], str | None]) -> None:
    """Give weights other names, or drop those whose new name is None."""
    weights = {new: part for name, part in load_file(folder / "model.safetensors").items() if (new := renamed(name))}
    save_file(weights, folder / "model.safetensors")


RENAMED: dict[str, Callable[[str], str | None]] = {
    "as it is": lambda name: name,
    "no prefix": lambda name: name.removeprefix("bert."),
    "another prefix": lambda name: f"model.{name}",
    "of BERT's first release": lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"),
}


@pytest.mark.parametrize("renamed", RENAMED.values(), ids=RENAMED)
def test_a_checkpoint_with_a_head_is_what_transformers_computes(
    checkpoint: Path, renamed: Callable[[str], str | None]
) -> None:
    model = BertForMaskedLM.from_pretrained(checkpoint).bert.eval()
    rewrite(checkpoint, renamed)
    tower = teacher_of(checkpoint)
    embeddings, mask = sentences(tower, TEXTS[:1])
    ids = torch.tensor([tower.tokenizer.encode(TEXTS[0]).ids])
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(SoftmaxTower.of(tower)(embeddings, mask)[-1], expected, rtol=1e-4, atol=1e-5)
    write_embeddings(checkpoint, checkpoint / "owner")
    assert torch.equal(embedder_of(checkpoint / "owner").positions, tower.positions)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "relu"}, r"config\.json: hidden_act = 'relu': only 'gelu' is supported"),
        ({"hidden_act": "gelu_new"}, r"config\.json: hidden_act = 'gelu_new': only 'gelu'"),
        ({"model_type": "roberta"}, r"config\.json: model_type = 'roberta': only 'bert' is supported"),
        ({"position_embedding_type": "relative_key"}, r"position_embedding_type = 'relative_key': only 'absolute'"),
        ({"is_decoder": True}, r"is_decoder = True: only False"),
        ({"num_attention_heads": None}, r"num_attention_heads = None: must be a positive number"),
        ({"num_attention_heads": 3}, r"num_attention_heads = 3 must divide the width 16"),
        ({"num_hidden_layers": 3}, r"model\.safetensors lacks bert\.encoder\.layer\.2\.attention\.self\.query\.weight"),
    ],
)
def test_a_form_that_is_not_computed_is_refused(checkpoint: Path, changed: dict[str, Any], message: str) -> None:
    file = checkpoint / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    with pytest.raises(ConfigError, match=f"--model = .*checkpoint': no BERT-like checkpoint: .*{message}"):
        teacher_of(checkpoint)


def test_absent_keys_are_berts_own(checkpoint: Path) -> None:
    file = checkpoint / "config.json"
    kept = ("num_attention_heads", "num_hidden_layers", "layer_norm_eps")
    before = fingerprint(teacher_of(checkpoint))
    file.write_text(json.dumps({key: json.loads(file.read_text())[key] for key in kept}))
    assert fingerprint(teacher_of(checkpoint)) == before


@pytest.mark.parametrize("missing", [*EMBEDDINGS, "embeddings.LayerNorm.bias", "encoder.layer.1.output.dense.weight"])
def test_a_weight_that_is_missing_is_named(checkpoint: Path, missing: str) -> None:
    rewrite(checkpoint, lambda name: None if name == f"bert.{missing}" else name)
    message = rf"{checkpoint / 'model.safetensors'} lacks (bert\.)?{missing}"
    with pytest.raises(ConfigError, match=message) as found:
        teacher_of(checkpoint)
    assert found.value.key == "--model"
    if missing in EMBEDDINGS:
        with pytest.raises(ConfigError, match=message) as found:
            embedder_of(checkpoint)
        assert found.value.key == "model.embeddings"


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("content", [None, b"", b"[1]"])
def test_a_file_that_is_missing_or_damaged_is_named(checkpoint: Path, name: str, content: bytes | None) -> None:
    (checkpoint / name).unlink()
    if content is not None:
        (checkpoint / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--model = .*{name} is missing or (damaged|malformed)"):
        teacher_of(checkpoint)


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    words = "bert.embeddings.word_embeddings.weight"
    save_file(weights | {words: weights[words][:100].clone()}, checkpoint / "model.safetensors")
    with pytest.raises(ConfigError, match=r"tokenizer\.json has a token 30521, and .* embeddings for 100"):
        teacher_of(checkpoint)


def test_a_tower_of_another_width_is_refused_before_anything_is_done(checkpoint: Path, tmp_path: Path) -> None:
    """By `provide`, and by `tune-private` with a message that names the configuration's key, and no run directory."""
    narrow, parties = tmp_path / "narrow.safetensors", tmp_path / "parties"
    narrow.write_bytes(PrivateTower.from_softmax(teacher_of(checkpoint), 8, seed=0).to_bytes({}))
    make_certificates(parties)
    provide = ["mpc", "provide", "--servers", "a:1,b:2", "--certificates", str(parties / "model-owner")]
    (tmp_path / "data.tsv").write_text("sentence\tlabel\na fine film\t1\na dull film\t0\n")
    (tmp_path / "task.toml").write_text(
        f'[task]\nkind = "text"\ntrain = "{tmp_path}/data.tsv"\ntest = "{tmp_path}/data.tsv"\nshots = 1\n'
        'label_names = ["bad", "good"]\ndescriptions = ["a bad film", "a good film"]\n'
        '[prompt]\nlength = 1\ninitial = "film"\n[search]\nwidth = 4\n'
    )
    tune = ["tune-private", str(tmp_path / "task.toml"), "--clear", "--out", str(tmp_path / "run"), "--set"]
    absent = tmp_path / "absent.safetensors"
    for words, message in (
        ([*provide, "--tower", str(narrow)], r"--tower = .*narrow.*16 wide, .* 384 wide"),
        ([*provide, "--model", str(checkpoint)], r"--tower = None.* 384 wide, .* 16 wide"),
        ([*provide, "--tower", str(absent)], r"--tower = .*absent.*: no such file"),
        ([*tune, f"model.tower={narrow}"], r"model\.tower = .*narrow.*16 wide, .* 384 wide"),
        ([*tune, f"model.tower={absent}"], r"model\.tower = .*absent.*: no such file"),
    ):
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, words, catch_exceptions=False)
    assert not (tmp_path / "run").exists()


def test_embeddings_of_another_width_are_refused(shallow: TextTower) -> None:
    tower = PrivateTower.from_softmax(shallow, 8, seed=0)
    with pytest.raises(MpcError, match=r"embeddings are 16 wide where the tower takes 384: set model\.tower"):
        tower(torch.zeros(1, 2, 16), torch.ones(1, 2))


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
        assert set(stored.keys()) == set(EMBEDDINGS)
    whole, part = (
        TextTower.load(folder, torch.device("cpu")),
        Embedder.of_folder(tmp_path / "owner", torch.device("cpu")),
    )
    assert torch.equal(part.positions, whole.positions)
    assert torch.equal(part.embed("a jacksnipe"), whole.embed("a jacksnipe"))
    with pytest.raises(ConfigError, match="no BERT-like checkpoint"):
        write_embeddings(tmp_path / "owner", tmp_path / "again")
