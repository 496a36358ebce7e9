"""`sordino transfer`: prompts on another data set than they were learned on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sordino.cli.app import invoke
from sordino.encoders.classifier import Classifier
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.prompt_file import SavedPrompt

Command = Callable[..., tuple[int, str, str]]
SHADES = {"dark_cellar": (20, 20, 30), "white_snow": (240, 240, 250), "orange_fruit": (250, 150, 20)}


@pytest.fixture
def finished(config_file: Path, tmp_path: Path) -> Path:
    """A run on four colors, with personal prompts."""
    run(load_config(config_file, ["rounds=1"]), tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def shades(tmp_path: Path) -> Path:
    """Another data set: three other classes, with four pictures each, and one file that is none."""
    folder = tmp_path / "shades"
    for name, color in SHADES.items():
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), tuple(min(255, part + 3 * number) for part in color)).save(
                folder / name / f"{number}.png"
            )
    (folder / "white_snow" / "broken.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def sordino(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = invoke(["transfer", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def right(classifier: Classifier, folder: Path) -> float:
    """The accuracy on a folder, a picture at a time by the classifier's own answers."""
    files = sorted(file for file in folder.rglob("*.png") if file.name != "broken.png")
    best = [classifier.classify(file)[0].best for file in files]
    return sum(name == file.parent.name.replace("_", " ") for name, file in zip(best, files, strict=True)) / len(files)


def test_each_prompt_of_a_run_is_right_where_its_classifier_is(finished: Path, shades: Path, sordino: Command) -> None:
    code, out, said = sordino(finished, "--to", f"imagefolder:{shades}", "--json")
    assert code == 0, said
    told = json.loads(out)
    assert (told["classes"], told["pictures"]) == (3, 12)
    assert "broken.png" in said
    files = sorted((finished / "prompts").glob("*.safetensors"))
    assert [Path(one["file"]) for one in told["prompts"]] == files
    names = [name.replace("_", " ") for name in sorted(SHADES)]
    for one, file in zip(told["prompts"], files, strict=True):
        accuracy = right(SavedPrompt.load(file).model(class_names=names), shades)
        assert one["accuracy"] == pytest.approx(accuracy)
        assert one["gain"]["mean"] == pytest.approx(accuracy - told["hand_written"])
    mean = sum(one["accuracy"] for one in told["prompts"]) / len(files)
    assert told["accuracy"] == pytest.approx(mean)
    assert told["gain"]["mean"] == pytest.approx(mean - told["hand_written"])
    assert told["gain"]["low"] <= told["gain"]["mean"] <= told["gain"]["high"]


def test_the_hand_written_prompt_gains_nothing_over_itself(
    config_file: Path, tmp_path: Path, shades: Path, sordino: Command
) -> None:
    run(load_config(config_file, ["algorithm=zero-shot"]), tmp_path / "zero")
    code, out, _ = sordino(tmp_path / "zero", "--to", f"imagefolder:{shades}", "--json")
    told = json.loads(out)
    assert code == 0
    assert told["accuracy"] == told["hand_written"]
    assert told["gain"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_part_of_each_class_may_be_taken(finished: Path, shades: Path, sordino: Command) -> None:
    file = finished / "prompts" / "client-0000.safetensors"
    code, out, _ = sordino(file, "--to", f"imagefolder:{shades}", "--per-class", 2)
    assert code == 0
    first, second = out.splitlines()
    assert "on imagefolder:" in first
    assert "(3 classes, " in first
    assert first.endswith("its prompt")
    assert "the hand-written prompt: " in second


def test_what_cannot_be_evaluated_is_told_in_one_line(
    finished: Path, config_file: Path, tmp_path: Path, shades: Path, sordino: Command
) -> None:
    source = f"imagefolder:{shades}"
    run(load_config(config_file, ["algorithm=promptfl", "rounds=1"]), tmp_path / "other")
    run(load_config(config_file, ["encoder.dtype=bfloat16", "rounds=1"]), tmp_path / "half")
    for other in ("other", "half"):
        code, out, said = sordino(finished, tmp_path / other, "--to", source)
        assert (code, out) == (2, "")
        assert "of another method, encoder or precision" in said
    code, _, said = sordino(tmp_path, "--to", source)
    assert code == 2
    assert "has no prompts/ of a finished run" in said
    code, _, said = sordino(finished, "--to", shades)
    assert code == 2
    assert said.startswith(f"sordino: --to = '{shades}': must be 'digits', 'textile', 'imagefolder:PATH', ")
    code, _, said = sordino(finished, "--to", f"imagefolder:{tmp_path / 'nothing'}")
    assert code == 2
    assert "nothing" in said


def test_a_prompt_that_is_given_twice_is_refused(finished: Path, sordino: Command) -> None:
    """It would be half of the mean, and of its interval, twice."""
    one = sorted((finished / "prompts").glob("*.safetensors"))[0]
    for given in ([one, one], [finished, one], [one, finished / "prompts" / ".." / "prompts" / one.name]):
        code, _, said = sordino(*given, "--to", "digits")
        assert code == 2
        assert f"PROMPT = '{given[1]}': is there twice" in said or f"PROMPT = '{one}': is there twice" in said
