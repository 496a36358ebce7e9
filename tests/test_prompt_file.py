"""A prompt leaves a run as one file, and classifies in another process as it did in the run."""

from __future__ import annotations

import hashlib
import json
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from encoders.checkpoints import save_clip
from sordino.algorithms import METHODS
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.classifier import Classifier
from sordino.encoders.encode import encode
from sordino.encoders.prompt_model import named_parts
from sordino.errors import DataError, EncoderError, PromptError
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.prompt_file import EncoderRecord, PrivacyRecord, SavedPrompt
from sordino.tasks.sources import load_images
from sordino.tasks.splits import build_task

CPU = torch.device("cpu")


@pytest.fixture
def encoder(clip_folder: Path) -> DualEncoder:
    return load_encoder("clip", str(clip_folder), "float32", CPU)


@pytest.fixture
def saved(encoder: DualEncoder) -> SavedPrompt:
    """A context in the small CLIP."""
    return SavedPrompt(
        prompt=torch.randn(3, encoder.context_width, generator=torch.Generator().manual_seed(0)),
        method="promptfl",
        settings={},
        class_names=("cat", "dog", "sunflower"),
        encoder=EncoderRecord(name="clip", fingerprint=encoder.fingerprint, checkpoint="here"),
        privacy=PrivacyRecord(private=False, simulated=True, statement="Not private: a test.", ledger_sha256="00ff"),
        version="0.1.0",
        gray_range=(0.0, 4095.0),
        client=7,
    )


def test_what_is_saved_is_loaded(saved: SavedPrompt, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    saved.save(file)
    loaded = SavedPrompt.load(file)
    assert isinstance(loaded.prompt, torch.Tensor)
    assert loaded.prompt.equal(named_parts(saved.prompt)["context"])
    assert loaded.source == str(file)
    same = replace(loaded, prompt=saved.prompt, source=saved.source)
    assert vars(same) == vars(saved)


def test_the_same_prompt_makes_the_same_bytes(saved: SavedPrompt) -> None:
    again = replace(saved, settings=dict(reversed(list(saved.settings.items()))))
    assert saved.to_bytes() == again.to_bytes()


def test_tensors_with_names_stay_named_even_where_there_is_one(saved: SavedPrompt, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    replace(saved, prompt=named_parts(saved.prompt)).save(file)
    assert not isinstance(SavedPrompt.load(file).prompt, torch.Tensor)


def local_accuracies(folder: Path, encoder: DualEncoder) -> list[float]:
    """Accuracy of a run's saved prompts on each client's own test pictures, from nothing but files."""
    config = load_config(folder / "config.toml")
    images = load_images(config.data)
    task = build_task(images, config.data, config.partition, config.seed)
    files = sorted((folder / "prompts").iterdir())
    classifiers = [SavedPrompt.load(file).model(encoder) for file in files]
    features = encode(images.subset(task.test), encoder, None, kind=classifiers[0].model.reads).features
    accuracies = []
    for client in range(task.clients):
        classifier = classifiers[client if len(files) > 1 else 0]
        assert classifier.class_names == task.class_names
        logits = classifier.logits(features)
        turned = dict(reversed(named_parts(classifier.prompt).items()))  # a file has its tensors in any order
        if len(turned) > 1:
            torch.testing.assert_close(replace(classifier, prompt=turned).logits(features), logits)
        guesses = logits.argmax(-1).numpy()
        accuracies.append(float(((guesses == task.labels[task.test]) * task.local[client]).sum()))
    return accuracies


@pytest.mark.parametrize("method", METHODS)
def test_saved_prompts_have_the_accuracy_of_the_run(
    method: str, config_file: Path, encoder: DualEncoder, tmp_path: Path
) -> None:
    """Of every method: with a context or named tensors, with CoOp's model or its own, personal or shared."""
    # Four clients, as SecFPP needs three, of different classes and with large steps, so that their prompts differ.
    federation = ["partition.scheme=classes", "partition.clients=4", "partition.classes_per_client=2"]
    overrides = [f"algorithm={method}", "rounds=2", "settings.optimizer.learning_rate=0.5", *federation]
    summary = run(load_config(config_file, overrides), tmp_path / "run")
    expected = [client.local for client in summary.per_client]
    assert local_accuracies(tmp_path / "run", encoder) == pytest.approx(expected)


def test_clients_have_files_of_their_own_and_sharers_one(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["rounds=1"]), tmp_path / "personal")
    run(load_config(config_file, ["rounds=1", "algorithm=promptfl"]), tmp_path / "shared")
    personal = [SavedPrompt.load(file) for file in sorted((tmp_path / "personal" / "prompts").iterdir())]
    (shared,) = [SavedPrompt.load(file) for file in (tmp_path / "shared" / "prompts").iterdir()]
    assert [each.client for each in personal] == [0, 1]
    assert not named_parts(personal[0].prompt)["context"].equal(named_parts(personal[1].prompt)["context"])
    assert shared.client is None


def test_a_prompt_says_where_it_comes_from(config_file: Path, clip_folder: Path, tmp_path: Path) -> None:
    """Method with its settings, encoder, ledger and statement, as the run directory has them."""
    out = tmp_path / "run"
    settings = ["privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0", "privacy.simulation=true"]
    summary = run(load_config(config_file, ["rounds=1", *settings]), out)
    saved = SavedPrompt.load(out / "prompts" / "client-0001.safetensors")
    written = tomllib.loads((out / "config.toml").read_text(encoding="utf-8"))
    assert (saved.method, saved.settings) == ("dp-fpl", written["settings"]["dp-fpl"])
    assert saved.encoder.checkpoint == str(clip_folder)
    assert saved.encoder.fingerprint == json.loads((out / "data.json").read_bytes())["encoder"]["fingerprint"]
    assert saved.privacy.ledger_sha256 == hashlib.sha256((out / "ledger.json").read_bytes()).hexdigest()
    assert saved.privacy.statement == summary.privacy.statement
    assert (saved.privacy.private, saved.privacy.simulated) == (False, True)


def test_deep_gray_is_read_as_in_training(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    """The range of black and white travels with the prompt: twelve bits are read as the same eight."""
    for file in pictures.rglob("*.png"):
        values = np.asarray(Image.open(file).convert("L"))
        Image.fromarray(values.astype(np.uint16) * 4095 // 255).save(file)
    run(load_config(config_file, ["rounds=1", "data.gray_range=[0, 4095]"]), tmp_path / "run")
    classifier = SavedPrompt.load(tmp_path / "run" / "prompts" / "client-0000.safetensors").model()
    deep = next(pictures.rglob("*.png"))
    shallow = tmp_path / "shallow.png"
    Image.fromarray((np.asarray(Image.open(deep)).astype(np.int64) * 255 // 4095).astype(np.uint8)).save(shallow)
    one, other = classifier.classify([deep, shallow])
    assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-3)


def test_a_classifier_takes_pixels_features_and_pictures(saved: SavedPrompt, encoder: DualEncoder) -> None:
    """Any leading axes; all three ways give the same answer, which is the softmax of the logits."""
    classifier = saved.model(encoder)
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 255, (40, 40, 3), dtype=np.uint8)) for _ in range(6)]
    pixels = torch.stack([encoder.transform(picture) for picture in pictures])
    logits = classifier(pixels)
    assert logits.shape == (6, 3)
    assert classifier(pixels[0]).shape == (3,)
    torch.testing.assert_close(classifier(pixels.view(2, 3, *pixels.shape[1:])), logits.view(2, 3, 3))
    torch.testing.assert_close(classifier.logits(classifier.features(pixels)), logits)
    features = encoder.image_features(pixels)
    text = encoder.text_features(named_parts(saved.prompt)["context"], encoder.class_tokens(saved.class_names))
    torch.testing.assert_close(logits, encoder.logit_scale * features @ text.T)
    for prediction, row in zip(classifier.classify(pictures), logits.softmax(-1), strict=True):
        assert prediction.best == saved.class_names[int(row.argmax())]
        assert list(prediction.probabilities.values()) == pytest.approx(sorted(row.tolist(), reverse=True), rel=1e-4)
        assert sum(prediction.probabilities.values()) == pytest.approx(1)
        for name, value in zip(saved.class_names, row.tolist(), strict=True):
            assert prediction.probabilities[name] == pytest.approx(value, rel=1e-4)


def test_another_encoder_is_refused_by_name(saved: SavedPrompt, tmp_path: Path) -> None:
    other = save_clip(tmp_path / "other", projection=16)
    with pytest.raises(EncoderError, match=r"learned in encoder 'clip' from 'here' .*this is 'clip' from .*other"):
        saved.model(load_encoder("clip", str(other), "float32", CPU))
    with pytest.raises(EncoderError, match="and this is 'bundled'"):
        saved.model(load_encoder("bundled", None, "float32", CPU))
    with pytest.raises(EncoderError, match=r"this is 'clip' from .*other"):
        saved.load_encoder(str(other), "cpu")


def test_an_encoder_that_moved_is_asked_for(saved: SavedPrompt, clip_folder: Path) -> None:
    with pytest.raises(EncoderError, match="checkpoint 'here': no such folder.*say where it is now: --encoder"):
        saved.load_encoder(device="cpu")
    assert saved.load_encoder(str(clip_folder), "cpu").fingerprint == saved.encoder.fingerprint


def test_a_prompt_that_does_not_fit_is_refused_before_it_classifies(saved: SavedPrompt, encoder: DualEncoder) -> None:
    narrow = replace(saved, prompt=torch.zeros(3, encoder.context_width - 1))
    with pytest.raises(PromptError, match="does not fit method 'promptfl'"):
        narrow.model(encoder)
    with pytest.raises(PromptError, match="does not fit method 'pfedpt'"):  # which needs a frame
        replace(saved, method="pfedpt").model(encoder)
    with pytest.raises(PromptError, match="learned by method 'elsewhere', which is not here"):
        replace(saved, method="elsewhere").model(encoder)


def test_files_that_are_no_prompt_are_told_apart(saved: SavedPrompt, tmp_path: Path) -> None:
    """Missing, a folder, foreign, damaged anywhere, of the future: one line that names the file and says what to do."""
    whole, file = saved.to_bytes(), tmp_path / "prompt.safetensors"

    def refusal(content: bytes | None) -> str:
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(PromptError) as caught:
            SavedPrompt.load(file)
        message = str(caught.value)
        assert "\n" not in message
        assert str(file) in message
        return message

    assert "no such file" in refusal(None)
    assert "no prompt of Sordino" in refusal(b"")
    assert "no prompt of Sordino" in refusal(b"a text that somebody wrote")
    foreign = safetensors.torch.save({"weight": torch.zeros(2)}, metadata={"format": "pt"})
    assert "no prompt of Sordino" in refusal(foreign)
    assert "is damaged" in refusal(whole[:-1])
    assert "is damaged" in refusal(whole + b"\0")
    later = whole.replace(b"sordino prompt 1", b"sordino prompt 2")
    assert "update it" in refusal(later)
    assert "is damaged" in refusal(whole.replace(b"promptfl", b"promptf\\"))
    file.unlink()
    file.mkdir()
    assert "is a folder; give a file of a prompt" in refusal(None)
    (file / "prompts").mkdir()
    (file / "prompts" / "shared.safetensors").write_bytes(whole)
    assert f"such as {file}/prompts/shared.safetensors" in refusal(None)


@pytest.mark.parametrize("key", ["method", "settings", "classes", "encoder", "privacy", "shapes", "bare_context"])
def test_a_missing_key_is_named(key: str, saved: SavedPrompt, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    saved.save(file)
    with safetensors.safe_open(file, "pt") as content:
        document = json.loads(content.metadata()["sordino"])
    del document[key]
    metadata = {"sordino": json.dumps(document)}
    file.write_bytes(safetensors.torch.save(named_parts(saved.prompt), metadata=metadata))
    with pytest.raises(PromptError, match=f"is damaged: {key} = "):
        SavedPrompt.load(file)


def test_other_tensors_than_it_names_are_refused(saved: SavedPrompt, tmp_path: Path) -> None:
    file = tmp_path / "prompt.safetensors"
    saved.save(file)
    with safetensors.safe_open(file, "pt") as content:
        metadata = content.metadata()
    context = named_parts(saved.prompt)["context"]
    for tensors in ({"context": context[:2].clone()}, {"contexts": context}, {"context": context, "more": context + 1}):
        file.write_bytes(safetensors.torch.save(tensors, metadata=metadata))
        with pytest.raises(PromptError, match="is damaged: its tensors are not those that it names"):
            SavedPrompt.load(file)
    replace(saved, prompt=torch.full((3, 4), torch.nan)).save(file)
    with pytest.raises(PromptError, match="not finite"):
        SavedPrompt.load(file)


def rewritten(saved: SavedPrompt, tensors: dict[str, torch.Tensor] | None = None, **changes: object) -> bytes:
    """A file with another document or other tensors, as a hostile program may write it."""
    content = saved.to_bytes()
    size = int.from_bytes(content[:8], "little")
    document = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["sordino"]) | changes
    return safetensors.torch.save(tensors or named_parts(saved.prompt), metadata={"sordino": json.dumps(document)})


@pytest.mark.parametrize("kind", ["bool", "uint8", "complex64", "float8_e4m3fn"])
def test_numbers_of_a_kind_that_no_prompt_has_are_refused(kind: str, saved: SavedPrompt) -> None:
    context = named_parts(saved.prompt)["context"].to(getattr(torch, kind))
    with pytest.raises(PromptError, match=f"the tensor 'context' is of {kind}"):
        SavedPrompt.from_bytes(rewritten(saved, {"context": context}))


def test_a_prompt_without_classes_is_refused(saved: SavedPrompt) -> None:
    with pytest.raises(PromptError, match="it names no class"):
        SavedPrompt.from_bytes(rewritten(saved, classes=[]))


def test_numbers_that_make_no_finite_answer_are_refused_before_one(saved: SavedPrompt, encoder: DualEncoder) -> None:
    """They are finite themselves; answers would be NaN, and look like probabilities."""
    context = torch.full_like(named_parts(saved.prompt)["context"], 1e38)
    with pytest.raises(PromptError, match="logits that are not finite"):
        replace(saved, prompt=context).model(encoder)


def test_a_million_wrong_classes_cost_one_error(saved: SavedPrompt, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr("sordino.prompt_file.config_error", lambda error, _: told.append(error.error_count()) or "")
    with pytest.raises(PromptError, match="is damaged"):
        SavedPrompt.from_bytes(rewritten(saved, classes=[1] * 1000))
    assert told == [1]


def test_pictures_that_cannot_be_read_are_named(saved: SavedPrompt, encoder: DualEncoder, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.new("RGB", (30, 30), "red").save(good)
    bad.write_text("not a picture")
    classifier: Classifier = saved.model(encoder)
    predictions, skipped = classifier.ranked([bad, good])
    assert [each.name for each in predictions] == [str(good)]
    assert [(each.name, each.reason) for each in skipped] == [(str(bad), "not a picture in a known format")]
    with pytest.raises(DataError, match="bad.png: not a picture in a known format; leave it out"):
        classifier.classify([bad, good])
    with pytest.raises(DataError, match="gone.png: no such file"):
        classifier.classify(str(tmp_path / "gone.png"))
