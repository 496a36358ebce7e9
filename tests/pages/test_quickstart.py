"""docs/quickstart.md: its three commands lead to an answer, with the demo made short."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from PIL import Image, ImageDraw

from pages.blocks import blocks, lines
from ports import free_port

SHORT = ["--quick", "--set", "rounds=1", "--set", "data.train_per_class=8", "--set", "data.test_per_class=4"]


@pytest.mark.slow
def test_three_commands_lead_from_a_clone_to_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a user without any keys would; the page's fourth command asks the server, and its last needs none."""
    monkeypatch.setenv("SORDINO_CONFIG", str(tmp_path / "config"))
    monkeypatch.delenv("SORDINO_REGISTRY", raising=False)
    demo, publish, serve, ask, predict = (
        words for block in blocks("docs/quickstart.md", "sh") for words in lines(block)
    )
    arguments = shlex.split(demo[-1].removeprefix("ARGS="))
    assert demo[:2] == ["make", "demo"]
    runs = json.loads(call(tmp_path, ["sordino", "demo", *arguments, *SHORT, "--json"]))["runs"]
    assert [each["algorithm"] for each in runs] == ["zero-shot", "local", "promptfl", *["dp-fpl"] * 4]
    assert all(each["clients"] == 5 for each in runs)
    assert all(each["accuracy"]["novel"] is not None for each in runs)  # of the digits that no client holds
    (shown,) = blocks("docs/quickstart.md", "")
    assert call(tmp_path, publish).splitlines()[0] == shown.text.strip()
    picture = Image.new("L", (160, 200))
    ImageDraw.Draw(picture).ellipse((40, 30, 120, 170), outline=255, width=22)
    picture.save(tmp_path / "my-digit.png")
    port = free_port()
    command = [sys.executable, "-m", "sordino", *serve[1:], "--port", str(port)]
    server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        address = re.search(r"http\S+", " ".join(ask)).group().replace("8000", str(port))  # type: ignore[union-attr]
        answer = asked(address, tmp_path / "my-digit.png", server)
    finally:
        server.terminate()
        server.wait(timeout=60)
    (found,) = answer["pictures"]
    assert (answer["prompt"], answer["version"], answer["mark"]) == ("digits", 1, "")
    assert len(found["classes"]) == len(found["zero_shot"]) == 3
    assert len(call(tmp_path, predict).splitlines()) == 4


def call(folder: Path, words: list[str]) -> str:
    """Run a command of the page with the interpreter of the tests, in a folder; what it prints."""
    command = [sys.executable, "-m", "sordino", *words[1:]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def asked(address: str, picture: Path, server: subprocess.Popen[str]) -> dict[str, object]:
    """The answer to a picture, as soon as the server is there."""
    deadline = time.monotonic() + 120
    while True:
        try:
            reply = httpx.post(address, files={"image": picture.read_bytes()}, timeout=60)
        except httpx.TransportError:
            assert server.poll() is None, server.stdout and server.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.3)
        else:
            assert reply.status_code == 200, reply.text
            return dict(reply.json())
