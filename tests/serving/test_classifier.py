"""`PromptClassifier` answers as the prompt's own classifier does, tells no more than it was asked, and checks first."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sordino.algorithms import METHODS
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.classifier import told
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError, DataError, PromptError
from sordino.prompt_file import SavedPrompt
from sordino.serving.classifier import Answer, PromptClassifier
from sordino.serving.folder import export
from sordino.serving.manifest import PROMPT, facts_of
from sordino.serving.registry import Registry
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted, publisher_key

NOISE = np.random.default_rng(1).integers(0, 255, (7, 30, 40, 3), dtype=np.uint8)
PICTURES = [Image.fromarray(picture) for picture in NOISE]


@pytest.fixture(scope="module")
def encoder(clip_folder: Path) -> DualEncoder:
    return load_encoder("clip", str(clip_folder), "float32", torch.device("cpu"))


@pytest.fixture
def saved(shared_run: Path) -> SavedPrompt:
    return SavedPrompt.load(shared_run / "prompts" / "shared.safetensors")


def exact(answers: list[Answer]) -> list[dict[str, float]]:
    return [dict(answer.classes) for answer in answers]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_it_answers_as_the_prompts_own_classifier(
    method: str, make_run: Callable[..., Path], encoder: DualEncoder
) -> None:
    """Of every method, with class features computed once; alone and in a batch; beside the hand-written prompt."""
    run = make_run(f"algorithm={method}", "partition.clients=4", "partition.scheme=iid")
    saved = SavedPrompt.load(sorted((run / "prompts").iterdir())[-1])
    classifier = PromptClassifier(saved, encoder)
    expected = [each.probabilities for each in saved.model(encoder).classify(PICTURES)]
    answers = classifier.classify(PICTURES, top=99, digits=6, zero_shot=True)
    for found, wanted in zip(exact(answers), expected, strict=True):
        assert found == pytest.approx(wanted, abs=2e-6)
    alone = classifier.classify(PICTURES[3:4], top=99, digits=6)
    assert exact(alone)[0] == pytest.approx(expected[3], abs=2e-6)
    plain = PromptModel(encoder, encoder.class_tokens(saved.class_names))
    pixels = torch.stack([encoder.transform(picture) for picture in PICTURES])
    logits = plain.predict(encoder.embed("a photo of a")[None], encoder.image_features(pixels))[0]
    for answer, row in zip(answers, logits.softmax(-1), strict=True):
        assert answer.zero_shot is not None
        assert dict(answer.zero_shot) == pytest.approx(
            dict(zip(saved.class_names, row.tolist(), strict=True)), abs=2e-6
        )


def test_it_tells_only_the_most_probable_classes_rounded(saved: SavedPrompt, encoder: DualEncoder) -> None:
    classifier = PromptClassifier(saved, encoder)
    whole, short = classifier.classify(PICTURES, 99, 6), classifier.classify(PICTURES, 2, 1)
    for wide, narrow in zip(whole, short, strict=True):
        values = [value for _, value in wide.classes]
        assert sorted(values, reverse=True) == values
        assert len(values) == len(saved.class_names)
        assert [value for _, value in narrow.classes] == pytest.approx(values[:2], abs=0.0501)
        assert all(round(value, 1) == value for _, value in narrow.classes)
        assert narrow.zero_shot is None
        assert set(narrow.as_dict()) == {"classes"}


@given(data=st.data(), digits=st.integers(1, 6), count=st.integers(2, 12))
def test_an_answer_depends_on_rounded_probabilities_alone(data: st.DataObject, digits: int, count: int) -> None:
    """Whoever exchanges values that are told as equal gets the same answer, with the same classes in it."""
    logits = torch.tensor(data.draw(st.lists(st.floats(-9, 9, width=32), min_size=count, max_size=count)))
    exact = logits.softmax(-1)
    shown: dict[float, list[int]] = {}
    for index, value in enumerate(exact.tolist()):
        shown.setdefault(round(value, digits), []).append(index)
    exchanged = exact.clone()
    for indices in shown.values():
        exchanged[indices] = exact[data.draw(st.permutations(indices))]
    for top in range(1, count + 1):
        answer = told(exact, top, digits)
        assert answer == told(exchanged, top, digits)
        assert answer == told(exact, count, digits)[:top]  # a server cuts the answer that it has
        assert answer == sorted(answer, key=lambda pair: (-pair[1], pair[0]))
        left_out = exact[[index for index in range(count) if index not in dict(answer)]]
        assert all(round(float(value), digits) <= answer[-1][1] for value in left_out)


def test_class_features_are_computed_once(
    saved: SavedPrompt, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier = PromptClassifier(saved, encoder)
    classifier.classify(PICTURES[:1], zero_shot=True)

    def fail(*_: object) -> None:
        raise AssertionError("the text tower runs again")

    monkeypatch.setattr(type(encoder), "text_features", fail)
    assert len(classifier.classify(PICTURES, zero_shot=True)) == len(PICTURES)


def test_it_takes_content_files_and_pictures(saved: SavedPrompt, encoder: DualEncoder, tmp_path: Path) -> None:
    classifier = PromptClassifier(saved, encoder)
    file = tmp_path / "picture.png"
    PICTURES[0].save(file)
    answers = classifier.classify([file, str(file), file.read_bytes(), PICTURES[0]], digits=6)
    assert answers == [answers[0]] * 4
    assert classifier.classify([]) == []


def test_what_it_cannot_read_is_named(saved: SavedPrompt, encoder: DualEncoder, tmp_path: Path) -> None:
    classifier = PromptClassifier(saved, encoder)
    for broken in (b"", b"no picture", tmp_path / "absent.png", tmp_path):
        with pytest.raises(DataError, match=r"^picture 2: .*; leave it out"):
            classifier.classify([PICTURES[0], broken])
    with pytest.raises(ConfigError, match="list of pictures"):
        classifier.classify("picture.png")
    with pytest.raises(ConfigError, match="digits"):
        classifier.classify(PICTURES, digits=7)
    with pytest.raises(ConfigError, match="top"):
        classifier.classify(PICTURES, top=0)


def test_it_loads_from_everywhere_with_the_same_answers(
    shared_run: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path, encoder: DualEncoder
) -> None:
    material = from_run(shared_run, key)
    url = f"sqlite:///{tmp_path}/prompts.db"
    with Registry(url, create=True) as registry:
        registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
        export(registry.load("fabric", trusted=trusted), tmp_path / "folder")
        opened = PromptClassifier.from_registry("fabric", 1, registry, trusted, encoder=encoder)
    named = PromptClassifier.from_registry("fabric", registry=url, trusted=trusted)  # loads the encoder by itself
    folder = PromptClassifier.from_folder(tmp_path / "folder", trusted, encoder=encoder)
    file = PromptClassifier.from_file(shared_run / "prompts" / "shared.safetensors", encoder=encoder)
    answers = [each.classify(PICTURES, zero_shot=True) for each in (opened, named, folder, file)]
    assert answers == [answers[0]] * 4
    assert named.manifest is not None
    assert (named.manifest.mark, file.manifest) == ("NOT PRIVATE", None)
    with pytest.raises(PromptError, match="not trusted here"):
        PromptClassifier.from_registry("fabric", registry=url, encoder=encoder)
    with Registry(url) as registry:
        registry.withdraw("fabric", 1, "a test")
        with pytest.raises(PromptError, match="withdrawn"):
            PromptClassifier.from_published(registry.inspect("fabric", 1, trusted), encoder=encoder)


def test_a_manifest_that_describes_another_prompt_is_refused(
    shared_run: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path, encoder: DualEncoder
) -> None:
    """Also where a trusted publisher signed it: what shows must be what answers."""
    material = from_run(shared_run, key)
    facts = material.facts.model_dump()
    facts["privacy"] |= {"private": True, "epsilon": 1.0, "delta": 1e-5, "unit": "example"}
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        registry.publish("fabric", facts_of(**facts), material.files, key)
        with pytest.raises(PromptError, match=rf"{PROMPT} is another one than the manifest describes"):
            PromptClassifier.from_registry("fabric", None, registry, trusted, encoder=encoder)


def test_a_prompt_for_sentences_is_refused_before_an_encoder_is_loaded(saved: SavedPrompt) -> None:
    with pytest.raises(PromptError, match="sorts sentences"):
        PromptClassifier(replace(saved, task="text"))


def test_the_example_of_the_page_runs(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    own, _ = publisher_key()
    material = from_run(shared_run, own)
    with Registry("sqlite:///prompts.db", create=True) as registry:
        registry.publish("fabric-faults", material.facts, material.files, own, accept_not_private=True)
    for name, picture in zip("ab", PICTURES, strict=False):
        picture.save(f"{name}.png")
    exec(compile(code, "docs/serving.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2
