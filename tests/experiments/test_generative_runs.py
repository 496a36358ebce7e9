"""Runs in vision-language models: configuration to prompts' files, their answers, and refusals."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from encoders.vision_language import save_vision_language
from sordino.algorithms import algorithm
from sordino.algorithms.base import model_kind
from sordino.audit.run import audit
from sordino.cli.app import invoke
from sordino.encoders.generative.encoder import GenerativeEncoder
from sordino.encoders.generative.model import GenerativeModel
from sordino.encoders.generative.settings import PLACES, GenerativeSettings
from sordino.errors import ConfigError, EncoderError, PromptError
from sordino.experiments.compare import compare
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import planned_mechanism
from sordino.experiments.run import run
from sordino.experiments.use.free_answers import answer_freely
from sordino.experiments.variants import grid
from sordino.prompt_file import EncoderRecord, SavedPrompt
from sordino.results import Summary
from sordino.serving.classifier import PromptClassifier
from sordino.sites.fleet_config import NO_DATA
from sordino.sites.proposal import Proposal

ABLE = ("zero-shot", "local", "central", "promptfl", "fedprompt", "dp-fpl", "dplora", "dp-fpl-full")
REFUSED = (
    *("fedpgp", "fedotp", "pfedprompt", "pfedpt", "pfedpg", "fedperfix", "sgpt"),
    *("secfpp", "secfpp-plain", "dp-residual", "head", "class-prior"),
)
DP_SGD = ("privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0", "privacy.simulation=true")
QUESTION = "Which color?"
Runner = Callable[..., tuple[Summary, Path]]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_vision_language(tmp_path_factory.mktemp("smolvlm"), "smolvlm")


@pytest.fixture
def config(pictures: Path, checkpoint: Path, tmp_path: Path) -> Path:
    file = tmp_path / "generative.toml"
    file.write_text(f"""
        algorithm = "promptfl"
        rounds = 2
        device = "cpu"
        [data]
        source = "imagefolder:{pictures}"
        train_per_class = 4
        [partition]
        scheme = "disjoint"
        clients = 2
        [encoder]
        name = "generative"
        checkpoint = "{checkpoint}"
        [encoder.generative]
        question = "{QUESTION}"
        [settings]
        context_length = 3
        batch_size = 4
        [settings.dp-fpl]
        rank = 2
    """)
    return file


@pytest.fixture
def make(config: Path, tmp_path: Path) -> Runner:
    def made(*overrides: str, out: str = "run") -> tuple[Summary, Path]:
        return run(load_config(config, list(overrides)), tmp_path / out), tmp_path / out

    return made


def test_a_run_and_its_prompts_file(make: Runner, checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    summary, out = make()
    assert summary.encoder == "generative"
    assert summary.hand_written is not None
    assert summary.images.encoded == 32
    kept = tomllib.loads((out / "config.toml").read_text())["encoder"]["generative"]
    assert kept == {"question": QUESTION, "prompt_place": "after-image", "kept": "keys-values"}
    assert (out / "report.html").exists()
    # States come from the cache, and the same run is the same.
    again, other = make(out="again")
    assert (again.images.encoded, again.images.cached) == (0, 32)
    name = "prompts/shared.safetensors"
    assert (out / name).read_bytes() == (other / name).read_bytes()
    # The file says which dialog the prompt belongs to; the encoder is loaded with it, wherever it is now.
    saved = SavedPrompt.load(out / name)
    assert saved.encoder.generative == GenerativeSettings(question=QUESTION)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    encoder = saved.load_encoder(str(moved), "cpu")
    assert isinstance(encoder, GenerativeEncoder)
    # Its probabilities are those of the likelihoods.
    picture = Image.open(pictures / "red_apple" / "0.png").convert("RGB")
    (found,) = saved.model(encoder).classify(picture)
    state, answers = encoder.image_state(encoder.transform(picture)[None]), encoder.class_tokens(saved.class_names)
    assert isinstance(saved.prompt, torch.Tensor)
    expected = encoder.likelihoods(saved.prompt[None], state, answers)[0].softmax(-1)
    values = dict(zip(saved.class_names, expected.tolist(), strict=True))
    assert found.probabilities == pytest.approx(values, abs=1e-5)
    other_question = GenerativeEncoder.load(str(checkpoint), torch.device("cpu"))
    with pytest.raises(EncoderError, match="a prompt means nothing to another encoder"):
        saved.model(other_question)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["before-image", "after-image"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_loss(make: Runner, place: str, dtype: str) -> None:
    ways = [
        "rounds=12",
        "settings.local_steps=4",
        "settings.optimizer.name=adam",
        "settings.optimizer.learning_rate=0.3",
    ]
    _, out = make(*ways, f"encoder.generative.prompt_place={place}", f"encoder.dtype={dtype}", "partition.scheme=iid")
    losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLE)
def test_every_method_of_a_context_runs_with_noise_on_each_example(name: str, make: Runner) -> None:
    summary, out = make(f"algorithm={name}", *DP_SGD)
    learns = name != "zero-shot"
    assert bool(json.loads((out / "ledger.json").read_bytes())["releases"]) == learns
    assert summary.privacy.simulated == learns
    assert summary.privacy.private != learns  # simulated noise protects nobody
    assert sorted((out / "prompts").iterdir())


def test_dp_fpl_with_noise_by_the_operating_system(make: Runner) -> None:
    summary, _ = make("algorithm=dp-fpl", "privacy.mechanism=dp-sgd", "privacy.epsilon=8", "rounds=1")
    assert summary.privacy.private
    assert summary.privacy.epsilon == pytest.approx(8, abs=0.01)


@pytest.mark.parametrize("name", ABLE)
def test_methods_of_a_context_have_the_model_of_likelihoods(name: str) -> None:
    assert model_kind(algorithm(name), name, "generative") is GenerativeModel


@pytest.mark.parametrize("name", REFUSED)
def test_other_methods_are_refused_by_name(name: str, config: Path, tmp_path: Path) -> None:
    told = rf"which {name} needs; encoders that do: bundled, clip; or take a method that learns a context alone"
    with pytest.raises(EncoderError, match=told):
        run(load_config(config, [f"algorithm={name}"]), tmp_path / "run")


@pytest.mark.parametrize("mechanism", ["cotangent", "statistics"])
def test_mechanisms_of_features_are_refused(mechanism: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=rf"privacy\.mechanism = '{mechanism}': .* use 'dp-sgd' or 'dp-fedavg'"):
        load_config(config, [f"privacy.mechanism={mechanism}", "privacy.epsilon=8"])


def test_the_mechanism_is_planned_as_it_is_run(config: Path) -> None:
    inputs = planned_mechanism(load_config(config, ["privacy.mechanism=dp-sgd", "privacy.epsilon=8"])).inputs
    assert not inputs.linear
    assert not inputs.one_feature


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["encoder.name=bundled"], r"encoder\.generative = .*set encoder\.name = 'generative', or remove it"),
        (["encoder.generative.qestion=x"], r"encoder\.generative\.qestion = 'x': no such key; did you mean 'question'"),
        (["encoder.generative.prompt_place=inside"], r"encoder\.generative\.prompt_place = 'inside'"),
    ],
)
def test_wrong_settings_are_refused(changes: list[str], told: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        load_config(config, changes)


def test_a_comparison_has_one_dialog(config: Path, tmp_path: Path) -> None:
    variants = grid(load_config(config), ["promptfl"], {"encoder.generative.prompt_place": list(PLACES)})
    with pytest.raises(ConfigError, match=r"encoder = 'encoder\.generative\.prompt_place=after.* share one encoder"):
        compare(variants, 1, tmp_path / "compared")


def test_a_site_takes_the_dialog_of_the_proposal(config: Path) -> None:
    own = load_config(config, ["encoder.generative.prompt_place=before-image"])
    proposal = Proposal.of(own)
    there = proposal.config({**NO_DATA, "encoder": {"checkpoint": "elsewhere/model"}})
    assert there.encoder.generative == own.encoder.generative
    assert there.encoder.checkpoint == "elsewhere/model"


def test_a_checkpoint_is_needed(config: Path) -> None:
    config.write_text("\n".join(line for line in config.read_text().splitlines() if "checkpoint =" not in line))
    with pytest.raises(ConfigError, match=r"encoder\.checkpoint = None: encoder 'generative' needs a directory"):
        load_config(config)


def test_predict_classifies_and_answers_freely(
    make: Runner, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = make("rounds=1")
    file, picture = out / "prompts" / "shared.safetensors", pictures / "blue_sky" / "3.png"
    (pictures / "blue_sky" / "broken.png").write_bytes(b"no picture")

    def said(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = invoke(["predict", str(file), *map(str, arguments)])
        told = capsys.readouterr()
        return code, told.out, told.err

    code, text, _ = said(picture, "--json")
    assert code == 0
    assert len(json.loads(text)["images"][0]["classes"]) == 4
    saved = SavedPrompt.load(file)
    encoder = saved.load_encoder()
    assert isinstance(encoder, GenerativeEncoder)
    assert isinstance(saved.prompt, torch.Tensor)
    pixels = encoder.transform(Image.open(picture).convert("RGB"))
    for more, question in (((), QUESTION), (("--question", "What animal is it?"), "What animal is it?")):
        code, text, _ = said(picture, "--generate", "--most-tokens", 5, "--json", *more)
        content = json.loads(text)
        assert (code, content["question"]) == (0, question)
        asked = GenerativeEncoder.load(encoder.label, encoder.device, settings=GenerativeSettings(question=question))
        expected = asked.generate(saved.prompt, pixels, 5)
        assert content["images"] == [{"image": str(picture), "answer": expected}]
    code, text, err = said(pictures / "blue_sky", "--generate", "--most-tokens", 2)
    assert code == 0
    assert f"skipped {pictures / 'blue_sky' / 'broken.png'}" in err
    assert text.splitlines()[0] == str(pictures / "blue_sky" / "0.png")
    assert all(line.isprintable() for line in text.splitlines())
    for wrong, told in (
        ((picture, "--question", "x"), "goes with --generate"),
        ((pictures / "blue_sky" / "broken.png", "--generate"), "leave it out, or give a picture that can be read"),
        ((picture, "--generate", "--most-tokens", 500), "ask for a shorter answer"),
        ((picture, "--generate", "--question", "<image>?"), "stands for a picture; leave it out"),
    ):
        code, text, err = said(*wrong)
        assert (code, text) == (2, "")
        assert told in err.splitlines()[-1]


def test_a_prompt_of_another_encoder_writes_no_text(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["rounds=1"]), tmp_path / "run")
    file = tmp_path / "run" / "prompts" / "client-0000.safetensors"
    with pytest.raises(PromptError, match=r"encoder 'clip', which scores classes and writes no text; leave --generate"):
        answer_freely(file, [pictures / "blue_sky" / "3.png"])
    # And its record has no entry for what its encoder does not have.
    assert "generative" not in SavedPrompt.load(file).encoder.model_dump()
    assert "generative" in EncoderRecord(name="g", fingerprint="", generative=GenerativeSettings()).model_dump()


def test_a_service_answers_as_the_prompts_own_classifier(make: Runner, pictures: Path) -> None:
    _, out = make("rounds=1")
    saved = SavedPrompt.load(out / "prompts" / "shared.safetensors")
    encoder = saved.load_encoder()
    files = [pictures / "red_apple" / "0.png", pictures / "grey_stone" / "1.png", pictures / "blue_sky" / "2.png"]
    answers = PromptClassifier(saved, encoder).classify(files, top=9, digits=6, zero_shot=True)
    expected = saved.model(encoder).classify(files)
    for found, wanted in zip(answers, expected, strict=True):
        assert dict(found.classes) == pytest.approx(wanted.probabilities, abs=2e-6)
        assert found.zero_shot is not None
        assert dict(found.zero_shot) != dict(found.classes)


@pytest.mark.slow
def test_attacks_apply_or_say_why_not(make: Runner, config: Path) -> None:
    _, out = make("algorithm=dp-fpl", "privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0")
    attacks = audit(out, shadows=4, canaries=8, queries=20)["attacks"]
    assert attacks["membership"]["lira"]["auc"] > 0
    assert attacks["canaries"]["epsilon"] >= 0
    assert attacks["rounds"] != {}
    assert "reason" not in attacks["label-only"]
    assert "copies are fitted on features" in attacks["extraction"]["reason"]
