"""`sordino predict`: pictures in, ranked classes out, and one line where something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from PIL import Image

from encoders.checkpoints import save_clip
from sordino.cli.app import invoke
from sordino.experiments.config import load_config
from sordino.experiments.run import run
from sordino.prompt_file import SavedPrompt

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def prompt(config_file: Path, tmp_path: Path) -> Path:
    """A personal prompt of a short run on four colors."""
    run(load_config(config_file, ["rounds=1"]), tmp_path / "run")
    return tmp_path / "run" / "prompts" / "client-0000.safetensors"


@pytest.fixture
def sordino(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `sordino predict` in this process: its exit code, standard output, and standard error."""

    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = invoke(["predict", *(str(argument) for argument in arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return command


def refused(answer: tuple[int, str, str]) -> str:
    """The one line that a refusal ends with."""
    code, out, said = answer
    assert (code, out) == (2, "")
    line = said.strip().splitlines()[-1]
    assert line.startswith("sordino: ")
    return line


def test_json_is_one_object_with_what_the_classifier_says(prompt: Path, pictures: Path, sordino: Command) -> None:
    files = [pictures / "red_apple" / "0.png", pictures / "blue_sky" / "1.png"]
    code, out, _ = sordino(prompt, *files, "--json", "--top", 3)
    assert code == 0
    assert out.count("\n") == 1
    content = json.loads(out)
    saved = SavedPrompt.load(prompt)
    assert (content["prompt"], content["method"], content["encoder"]) == (str(prompt), "dp-fpl", "clip")
    assert content["statement"] == saved.privacy.statement
    assert content["skipped"] == []
    expected = saved.model().classify(files)
    assert [each["image"] for each in content["images"]] == [str(file) for file in files]
    for each, prediction in zip(content["images"], expected, strict=True):
        ranked = [(line["class"], line["probability"]) for line in each["classes"]]
        assert [name for name, _ in ranked] == list(prediction.probabilities)[:3]
        assert [value for _, value in ranked] == pytest.approx(list(prediction.probabilities.values())[:3])


def test_a_person_gets_a_picture_a_line_and_its_classes_below(prompt: Path, pictures: Path, sordino: Command) -> None:
    file = pictures / "red_apple" / "0.png"
    _, out, _ = sordino(prompt, file)
    first, *ranked = out.splitlines()
    assert first == str(file)
    names, shares = zip(*(reversed(line.strip().split("%  ")) for line in ranked), strict=True)
    assert set(names) == set(SavedPrompt.load(prompt).class_names)
    assert [float(share) for share in shares] == sorted(map(float, shares), reverse=True)
    assert sum(map(float, shares)) == pytest.approx(100, abs=0.1)


def test_folders_give_their_pictures_and_pass_over_the_rest(prompt: Path, pictures: Path, sordino: Command) -> None:
    """Sorted, with all formats of training, without hidden and other files; unreadable ones are skipped by name."""
    shutil.copy(pictures / "red_apple" / "0.png", pictures / "red_apple" / ".hidden.png")
    (pictures / "red_apple" / "notes.txt").write_text("x")
    (pictures / "red_apple" / "4.png").write_text("x")
    Image.new("L", (20, 20), 9).save(pictures / "red_apple" / "gray.tiff")
    code, out, said = sordino(prompt, pictures / "red_apple", pictures / "blue_sky" / "0.png", "--json")
    assert code == 0
    content = json.loads(out)
    names = [f"{number}.png" for number in (0, 1, 2, 3, 5, 6, 7)]
    expected = [pictures / "red_apple" / name for name in [*names, "gray.tiff"]] + [pictures / "blue_sky" / "0.png"]
    assert [each["image"] for each in content["images"]] == [str(path) for path in expected]
    broken = str(pictures / "red_apple" / "4.png")
    assert content["skipped"] == [{"image": broken, "reason": "not a picture in a known format"}]
    assert f"skipped {broken}: not a picture in a known format" in said


def test_an_encoder_that_moved_is_found_by_its_option(
    prompt: Path, pictures: Path, clip_folder: Path, tmp_path: Path, sordino: Command
) -> None:
    shutil.copytree(clip_folder, tmp_path / "moved")
    content = safetensors.torch.load_file(prompt)  # whole, so that only where the encoder is changes below
    saved = SavedPrompt.load(prompt)
    gone = saved.encoder.model_copy(update={"checkpoint": str(tmp_path / "gone")})
    SavedPrompt(**(vars(saved) | {"encoder": gone})).save(prompt)
    assert safetensors.torch.load_file(prompt)["context"].equal(content["context"])
    picture = pictures / "red_apple" / "0.png"
    line = refused(sordino(prompt, picture))
    assert "gone': no such folder" in line
    assert "--encoder" in line
    assert sordino(prompt, picture, "--encoder", tmp_path / "moved")[0] == 0
    other = save_clip(tmp_path / "other", projection=16)
    assert "was learned in encoder 'clip'" in refused(sordino(prompt, picture, "--encoder", other))


def test_the_bundled_encoder_needs_no_option(prompt: Path, pictures: Path, sordino: Command) -> None:
    saved = SavedPrompt.load(prompt)
    bundled = saved.encoder.model_copy(update={"name": "bundled", "checkpoint": None})
    SavedPrompt(**(vars(saved) | {"encoder": bundled})).save(prompt)
    line = refused(sordino(prompt, pictures / "red_apple" / "0.png", "--encoder", "somewhere"))
    assert "encoder = 'somewhere'" in line
    assert "leave it out" in line


@pytest.mark.slow
def test_bad_input_is_one_line_that_names_it(prompt: Path, pictures: Path, tmp_path: Path, sordino: Command) -> None:
    good, bad, empty = pictures / "red_apple" / "0.png", tmp_path / "bad.png", tmp_path / "empty"
    bad.write_text("not a picture")
    empty.mkdir()
    (tmp_path / "only" / "broken").mkdir(parents=True)
    shutil.copy(bad, tmp_path / "only" / "broken")
    assert "no such file; give a file of a prompt" in refused(sordino(tmp_path / "none", good))
    assert f"such as {prompt}" in refused(sordino(prompt.parents[1], good)).replace("client-0001", "client-0000")
    assert "no prompt of Sordino" in refused(sordino(good, good))
    none = tmp_path / "none.png"
    assert f"IMAGE = '{none}': no such file or folder" in refused(sordino(prompt, none))
    assert f"IMAGE = '{bad}': not a picture in a known format" in refused(sordino(prompt, good, bad))
    assert f"IMAGE = '{empty}': no picture in this folder" in refused(sordino(prompt, empty))
    assert "no picture can be read, of 1 tried" in refused(sordino(prompt, tmp_path / "only"))
    assert "not a regular file" in refused(sordino(prompt, "/dev/null"))
    code, _, said = sordino(prompt, good, "--top", "0")
    assert (code, "--top" in said) == (2, True)
    for damage in (b"", b"[" * 20000, b"\xff" * 99, prompt.read_bytes()[:200], prompt.read_bytes()[:-5]):
        file = tmp_path / "damaged.safetensors"
        file.write_bytes(damage)
        assert str(file) in refused(sordino(file, good))
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(good, tmp_path / name)
    code, out, _ = sordino(prompt, tmp_path / name, "--json")
    assert json.loads(out)["images"][0]["image"] == str(tmp_path / name)


@pytest.mark.slow
def test_an_interruption_says_that_nothing_was_written(prompt: Path, pictures: Path) -> None:
    slow = (
        "import sys; sys.argv[0] = 'sordino'\n"
        "import sordino.encoders.encode as e, time\n"
        "def wait(*a): print('here', file=sys.stderr, flush=True); time.sleep(60)\n"
        "e._forward = wait\n"
        "from sordino.__main__ import main; main()"
    )
    command = [sys.executable, "-c", slow, "predict", str(prompt), str(pictures)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "here" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, said = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert said.strip().splitlines()[-1] == "sordino: interrupted; nothing was written; repeat the command"
