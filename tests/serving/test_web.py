"""What the web pages ask for: their files, the server's description, sample pictures, and runs of a folder."""

from __future__ import annotations

import copy
import io
import json
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.testclient import TestClient
from PIL import Image
from sklearn.datasets import load_digits

from serving.conftest import some_facts, some_files
from serving.uploads import PICTURES, huge_png
from sordino.errors import ConfigError
from sordino.report.groups import Group, group_runs, settings_of
from sordino.report.runs import Run
from sordino.results import FILE, Summary
from sordino.serving.registry import Registry
from sordino.serving.server import compared
from sordino.serving.server.app import build
from sordino.serving.server.compared import RunFolder
from sordino.serving.server.keys import Keys
from sordino.serving.server.samples import MOST, Samples
from sordino.serving.server.service import Log, Service
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.shelf import Shelf
from sordino.serving.server.web import ASSETS, HOUSE
from sordino.serving.trust import Trusted

DIGITS = {
    **{"dataset": "digits", "clients": 2, "rounds": 1, "of": "mean", "accuracy": {"local": 0.5}},
    **{"hand_written": None, "words": None},
}
Open = Callable[..., TestClient]


@pytest.fixture
def registry(tmp_path: Path, key: Ed25519PrivateKey) -> Iterator[Registry]:
    """One prompt of an unknown data set, and one of digits."""
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as opened:
        opened.publish("fabric", some_facts(), some_files(), key, accept_not_private=True)
        facts = some_facts(class_names=("three", "seven"), training=DIGITS)
        opened.publish("digits", facts, some_files(), key, accept_not_private=True)
        yield opened


@pytest.fixture
def opened(registry: Registry, trusted: Trusted) -> Iterator[Open]:
    """Opens a server."""
    with ExitStack() as stack:

        def make(needs_key: bool = False, samples: Path | None = None, runs: Path | None = None) -> TestClient:
            limits = ServerSettings()
            shelf = Shelf(registry, trusted, 4, lambda saved: saved.load_encoder())
            service = Service(shelf, limits, needs_key, Log(None))
            compares = None if runs is None else RunFolder(runs)
            app = build(service, samples=Samples(samples, limits), runs=compares)
            return stack.enter_context(TestClient(app))

        yield make


def test_pages_load_nothing_from_elsewhere_and_have_no_script_or_style_inside(opened: Open, tmp_path: Path) -> None:
    client = opened(runs=tmp_path)
    for page in ("/", "/runs"):
        answer = client.get(page)
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert not re.findall(r"<style|\sstyle=|\son\w+=|<script(?! type=\"module\" src=)", answer.text)
        used = re.findall(r'(?:src|href)="([^"#]*)"', answer.text)
        assert {"assets/page.css", "assets/house.css", "assets/icon.svg"} <= set(used)
        for address in used:
            assert "//" not in address
            assert client.get(address).status_code == 200, address
    for name in (*ASSETS, HOUSE):
        answer = client.get(f"/assets/{name}")
        assert "unsafe" not in answer.headers["content-security-policy"]
        text = answer.text.replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|//[a-z]+\.|url\(|@import|innerHTML|outerHTML|insertAdjacent|\beval\b", text)
    assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
    for name in ("nothing.js", "..%2fweb.py", "prompts.html"):
        assert client.get(f"/assets/{name}").status_code == 404


def test_the_second_page_is_there_only_with_runs(opened: Open) -> None:
    client = opened()
    assert client.get("/v1/server").json()["runs"] is False
    assert [client.get(address).status_code for address in ("/runs", "/v1/runs")] == [404, 404]


def test_a_key_is_told_what_it_may_do_and_what_is_left(opened: Open, registry: Registry, tmp_path: Path) -> None:
    keys = Keys(registry.database)
    secret = keys.create("kim", ["classify"], per_minute=9, per_day=5)
    client = opened(needs_key=True, runs=tmp_path)
    assert client.get("/v1/server").json()["needs_key"] is True
    assert client.get("/").status_code == 200
    assert client.get("/v1/key").status_code == 401
    client.headers["Authorization"] = f"Bearer {secret}"
    told = {"name": "kim", "scopes": ["classify"], "per_minute": 9, "per_day": 5, "left_today": 5}
    assert client.get("/v1/key").json() == told
    assert keys.spend("kim", 3, 5)
    assert client.get("/v1/key").json() == told | {"left_today": 2}
    for address in ("/v1/runs", "/v1/prompts/digits/samples", "/v1/prompts/digits/samples/0"):
        refused = client.get(address)
        assert (refused.status_code, refused.json()["error"]) == (403, "this key has no scope 'read'")
    while (answer := client.get("/v1/key")).status_code == 200:
        pass
    assert (answer.status_code, answer.json()["error"]) == (429, "more than 9 requests a minute")


def test_the_bundled_samples_are_the_digits_of_the_prompts_classes(opened: Open) -> None:
    client, digits = opened(), load_digits()
    found = client.get("/v1/prompts/digits/samples").json()
    assert [each["title"] for each in found["samples"]] == ["three", "seven"]
    assert "may have used" in found["origin"]
    for place, label in enumerate((3, 7)):
        content = client.get(f"/v1/prompts/digits/samples/{place}").content
        with Image.open(io.BytesIO(content)) as picture:
            pixels = np.asarray(picture, dtype=float) * 16 / 255
        rows = np.flatnonzero((np.abs(digits.images - pixels) < 0.1).all((1, 2)))
        assert digits.target[rows].tolist() == [label]
    assert client.get("/v1/prompts/fabric/samples").json() == {"origin": "", "samples": []}
    for address in ("/v1/prompts/digits/samples/2", "/v1/prompts/digits/samples/-1", "/v1/prompts/none/samples"):
        assert client.get(address).status_code == 404


def test_the_operators_samples_replace_them_for_all_prompts_or_one(opened: Open, tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    (folder / "digits").mkdir(parents=True)
    (folder / "a_leaf.png").write_bytes(PICTURES["PNG"])
    (folder / "LICENSE.txt").write_text("mine")
    (folder / "digits" / "one.jpg").write_bytes(PICTURES["JPEG"])
    client = opened(samples=folder)
    for name, title, content in (("fabric", "a leaf", PICTURES["PNG"]), ("digits", "one", PICTURES["JPEG"])):
        found = client.get(f"/v1/prompts/{name}/samples").json()
        assert [each["title"] for each in found["samples"]] == [title]
        assert "operator" in found["origin"]
        assert client.get(f"/v1/prompts/{name}/samples/0").content == content


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "no picture in it"),
        ({"a.png": b"no picture"}, r"a\.png.*is no JPEG"),
        ({"a.png": huge_png(20_000, 20_000, b"")}, "more than 25,000,000 pixels"),
        ({"a.png": bytes(5 << 20)}, "larger than"),
        ({f"{number}.png": PICTURES["PNG"] for number in range(MOST + 1)}, f"at most {MOST}"),
    ],
)
def test_a_folder_of_samples_that_cannot_be_shown_is_refused(
    files: dict[str, bytes], words: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"--samples = .*{words}"):
        Samples(tmp_path, ServerSettings())
    with pytest.raises(ConfigError, match="cannot be read"):
        Samples(tmp_path / "missing", ServerSettings())


@pytest.fixture(scope="module")
def folder(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one method with two seeds, and of another with one of them."""
    folder = tmp_path_factory.mktemp("compared")
    for name, overrides in {
        "seed-0": [],
        "seed-1": ["seed=1"],
        "zero": ["algorithm=zero-shot"],
    }.items():
        shutil.copytree(make_run(*overrides), folder / "study" / name)
    return folder


def state(folder: Path) -> dict[Path, tuple[int, int, int]]:
    """All that would change if something were written there."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {path: (status.st_ino, status.st_mtime_ns, status.st_size) for path, status in found.items()}


def summary(folder: Path) -> Summary:
    return Summary.from_json((folder / FILE).read_bytes())


def test_runs_are_compared_as_the_report_compares_them(opened: Open, folder: Path) -> None:
    """Means over seeds of the summaries on the disk; and nothing of where they lie on it."""
    before = state(folder)
    answer = opened(runs=folder).get("/v1/runs")
    assert state(folder) == before
    told = answer.json()
    runs = {run["method"]: run for run in told["runs"]}
    assert (len(told["runs"]), told["left_out"], told["cut"]) == (2, [], False)
    seeds = [summary(folder / "study" / name) for name in ("seed-0", "seed-1")]
    values = [each.accuracy.local for each in seeds]
    assert runs["promptfl"]["seeds"] == [0, 1]
    assert runs["promptfl"]["accuracy"]["local"] == pytest.approx([statistics.mean(values), statistics.stdev(values)])
    assert runs["promptfl"]["hand_written"]["local"] == pytest.approx(
        statistics.mean(each.hand_written.accuracy.local for each in seeds if each.hand_written)
    )
    assert [client["local"] for client in runs["promptfl"]["by_client"]] == pytest.approx(
        [statistics.mean(each.per_client[place].local for each in seeds) for place in range(2)]
    )
    assert (runs["zero-shot"]["zero_shot"], runs["promptfl"]["zero_shot"]) == (True, False)
    assert runs["promptfl"]["privacy"]["bounded"] is False
    assert {run["folder"] for run in told["runs"]} == {"study", "study/zero"}, "its own, of one that is by itself"
    for word in (str(folder), seeds[0].dataset, *map(str, folder.parts[1:-1])):
        assert word not in answer.text


def test_a_run_is_read_again_once_its_files_change(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    runs = RunFolder(tmp_path / "copy")
    assert runs.compared() == runs.compared()
    file = tmp_path / "copy" / "study" / "zero" / FILE
    file.write_text(file.read_text().replace('"rounds": 0', '"rounds": 7'))
    assert {run["rounds"] for run in runs.compared()["runs"]} == {1, 7}
    shutil.rmtree(file.parent)
    assert [run["method"] for run in runs.compared()["runs"]] == ["promptfl"]


def damaged(run: Path) -> dict[str, Callable[[], Any]]:
    """Ways to make a run directory what nobody should read."""
    metrics, config = run / "metrics.jsonl", run / "config.toml"
    return {
        "malformed": lambda: config.write_text("= 1"),
        "missing": metrics.unlink,
        "no regular file": lambda: (metrics.unlink(), os.mkfifo(metrics)),
        "regular file": lambda: (metrics.unlink(), metrics.symlink_to("/dev/zero")),
        "has more than": lambda: os.truncate(metrics, compared.MOST_BYTES + 1),
    }


@pytest.mark.parametrize("why", damaged(Path()))
def test_what_cannot_be_read_is_left_out_with_its_reason(why: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    damaged(tmp_path / "copy" / "study" / "seed-1")[why]()
    (tmp_path / "copy" / "loop").symlink_to(tmp_path / "copy")
    found = RunFolder(tmp_path / "copy").compared()
    assert [run["seeds"] for run in found["runs"]] == [[0], [0]]
    ((left),) = found["left_out"]
    assert left["folder"] == "study/seed-1"
    assert why in left["why"]
    assert str(tmp_path) not in left["why"]


def places(content: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a document stand."""
    inside = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, each in inside:
        yield (*before, key)
        yield from places(each, (*before, key))


def with_value(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    changed = copy.deepcopy(content)
    inside = changed
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    return changed


ODD = (float("nan"), float("inf"), -1, 10**400, "\ud800", [], {"a": float("-inf")})


def required_json(found: dict[str, Any]) -> None:
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


def test_no_value_in_a_summary_takes_other_runs_from_the_page(folder: Path, tmp_path: Path) -> None:
    """Each value of each kind; the damaged run has the settings of a good one, but for the seed."""
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "study" / "seed-1" / FILE
    content = json.loads(file.read_bytes())
    runs = RunFolder(tmp_path / "copy")
    for place in places(content):
        for value in ODD:
            file.write_text(json.dumps(with_value(content, place, value)))
            found = runs.compared()
            required_json(found)
            told = (place, value)
            assert "zero-shot" in [run["method"] for run in found["runs"]], told
            assert 0 in [seed for run in found["runs"] if run["method"] == "promptfl" for seed in run["seeds"]], told
            assert all(left["folder"] == "study/seed-1" and left["why"] for left in found["left_out"]), told
            assert str(tmp_path) not in str(found["left_out"])
    file.write_text(json.dumps(with_value(content, ("seconds", "train"), float("inf"))))
    assert "not finite" in runs.compared()["left_out"][0]["why"]


CONFIGS = {
    "dots": "a." * 20_000 + "b = 1",
    "dots in a table": "x = {y = 0, " + "a." * 20_000 + "b = 1}",
    "dots in a name": "[" + "a." * 20_000 + "b]",
    "tables": "a." * 50 + "b = 1",
    "settings": "\n".join(f"x{number} = 1" for number in range(50_000)),
    "lists": "x = " + "[" * 300 + "]" * 300,
    "one long list": "x = [" + "[]," * 100_000 + "]",
    "much": "#" + " " * (2 << 20),
    "bytes": "x = '\ud800'",
    "infinity": "x = inf",
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_no_configuration_takes_other_runs_from_the_page(
    kind: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    file = tmp_path / "copy" / "study" / "seed-1" / "config.toml"
    before = file.read_text()
    start, end = ("", before) if kind != "dots in a name" else (before, "")
    file.write_bytes("\n".join([start, CONFIGS[kind], end]).encode("utf-8", "surrogatepass"))
    most = 0

    def seen(runs: Sequence[Run]) -> list[Group]:
        nonlocal most
        most = max(most, *(len(settings_of(run)) for run in runs))
        return group_runs(runs)

    monkeypatch.setattr(compared, "group_runs", seen)
    found = RunFolder(tmp_path / "copy").compared()
    required_json(found)
    assert {run["method"] for run in found["runs"]} == {"promptfl", "zero-shot"}
    assert 0 in [seed for run in found["runs"] for seed in run["seeds"]]
    assert [left["folder"] for left in found["left_out"]] in ([], ["study/seed-1"])
    assert most < 3_000  # each name is compared with each


def test_runs_and_folders_are_bounded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not RunFolder(folder).compared()["cut"]
    with monkeypatch.context() as patch:
        patch.setattr(compared, "MOST_RUNS", 2)
        found = RunFolder(folder).compared()
        assert (sum(len(run["seeds"]) for run in found["runs"]), found["cut"]) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr(compared, "MOST_FOLDERS", 2)
        assert RunFolder(folder).compared()["cut"]
    with monkeypatch.context() as patch:
        patch.setattr(compared, "MOST_IN_ALL", 100)
        assert RunFolder(folder).compared() | {"palette": 0, "symbols": 0} == {
            **{"runs": [], "left_out": [], "cut": True, "palette": 0, "symbols": 0}
        }
    deep = tmp_path.joinpath(*"abcdefg")
    shutil.copytree(folder, deep)
    assert RunFolder(tmp_path).compared()["runs"] == []
    with pytest.raises(ConfigError, match="--runs"):
        RunFolder(tmp_path / "missing")


def test_a_run_that_was_repeated_stands_beside_itself(folder: Path, tmp_path: Path) -> None:
    """Two runs of one seed are not averaged, which would feign a smaller spread."""
    for name in ("one", "two"):
        shutil.copytree(folder / "study" / "seed-0", tmp_path / "study" / name)
    found = RunFolder(tmp_path).compared()["runs"]
    assert [run["seeds"] for run in found] == [[0], [0]]
    assert [run["folder"] for run in found] == ["study/one", "study/two"], "else nobody could tell one from the other"
