"""The configuration of `tune-private`: what is allowed, and messages that name key, value and remedy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from sordino.errors import ConfigError
from sordino.experiments.toml_tables import to_toml
from sordino.private_tuning.search import Search
from sordino.private_tuning.settings import is_address, load_private_config, longest_of, parse_private_config

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("private_*.toml"))
TEXT: dict[str, Any] = {
    "kind": "text",
    "train": "train.tsv",
    "test": "test.tsv",
    "label_names": ["negative", "positive"],
    "descriptions": ["bad", "good"],
}
IMAGES: dict[str, Any] = {"kind": "images", "source": "imagefolder:pictures"}
PROMPT = {"length": 4, "initial": "it was"}


def tables(task: Mapping[str, Any] = TEXT, **others: Any) -> dict[str, Any]:
    return {"task": dict(task), "prompt": PROMPT, **others}


def test_defaults_are_those_of_the_search() -> None:
    config = parse_private_config(tables(seed=7))
    assert config.search.search(config.seed) == Search(seed=7)
    assert longest_of(config.task) == 64


def test_paths_are_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_private_config(tables()).task.train == str(tmp_path / "train.tsv")
    assert parse_private_config(tables(IMAGES)).task.source == f"imagefolder:{tmp_path / 'pictures'}"


def test_what_is_resolved_is_read_again(tmp_path: Path) -> None:
    config = parse_private_config(tables(session={"servers": ["a:1", "b:2"]}, search={"width": 8}))
    (tmp_path / "config.toml").write_text(to_toml(config.model_dump(exclude_none=True)), encoding="utf-8")
    assert load_private_config(tmp_path / "config.toml") == config


def test_overrides_win(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text(to_toml(tables()), encoding="utf-8")
    config = load_private_config(file, ["seed=3", "search.population=8", "prompt.initial=a photo of"])
    assert (config.seed, config.search.population, config.prompt.initial) == (3, 8, "a photo of")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (tables({**TEXT, "source": "imagefolder:x"}), r"task\.source = 'imagefolder:x': does not apply.*remove it"),
        (tables({**IMAGES, "train": "x"}), r"task\.train = 'x': does not apply to kind 'images'; remove it"),
        (tables({**IMAGES, "longest": 9}), r"task\.longest = 9: does not apply"),
        (tables({key: TEXT[key] for key in TEXT if key != "test"}), r"task\.test = None: is needed"),
        (tables({"kind": "images"}), r"task\.source = None: is needed with kind 'images'"),
        (tables({**TEXT, "descriptions": ["bad"]}), r"task\.descriptions = \['bad'\]: must be as many .*: 2"),
        (tables({**TEXT, "descriptions": ["bad", " "]}), r"task\.descriptions = .*must not be empty"),
        (tables({**TEXT, "label_names": ["", "a"]}), r"task\.label_names = .*must not be empty"),
        (tables({**TEXT, "gray_range": [0.0, 1.0]}), r"task\.gray_range = .*does not apply to kind 'text'"),
        (tables({**TEXT, "person_level": 1}), r"task\.person_level = 1: does not apply to kind 'text'; remove it"),
        (
            tables({**IMAGES, "persons": "p.csv", "person_column": "who"}),
            r"task\.person_column = 'who': person_column and persons both say whose a picture is",
        ),
        (
            tables({**IMAGES, "source": "table:x.csv", "person_level": 1}),
            r"task\.person_level = 1: person_level applies to a source 'imagefolder:PATH' only",
        ),
        (tables({**IMAGES, "gray_range": [1.0, 1.0]}), r"task\.gray_range = .*two different"),
        (tables({**TEXT, "longest": 6}), r"task\.longest = 6: must be at least 7 with a prompt of 4 tokens"),
        (tables({**TEXT, "shots": 0}), r"task\.shots = 0: "),
        (tables({**TEXT, "shot": 1}), r"task\.shot = 1: no such key"),
        (tables({**TEXT, "kind": "sound"}), r"task\.kind = 'sound': "),
        (tables(IMAGES, model={"embeddings": "x"}), r"model\.embeddings = 'x': images go with the bundled ones"),
        (tables(search={"population": 2}), r"search\.population = 2: "),
        (tables(search={"scale": float("nan")}), r"search\.scale = nan: "),
        (tables(session={"servers": ["a:1"]}), r"session\.servers = \['a:1'\]: must be two"),
        (tables(session={"servers": ["a:1", "b"]}), r"session\.servers = .*each as 'host:port'"),
        (tables(session={"servers": ["a:1", "b:70000"]}), r"session\.servers"),
        (tables(sed=1), r"sed = 1: no such key"),
    ],
)
def test_mistakes_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_private_config(bad)


@pytest.mark.parametrize("text", ["localhost:7000", "10.0.0.1:65535", "[::1]:1", "server-0.example.org:443"])
def test_addresses(text: str) -> None:
    assert is_address(text)


@pytest.mark.parametrize(
    "text", ["", "a", ":1", "a:", "a:0", "a:65536", "a:-1", "a:x", "http://a:1", " a:1", "a:1,b:2"]
)
def test_what_is_no_address(text: str) -> None:
    assert not is_address(text)


def test_any_port_to_listen_at() -> None:
    assert is_address("a:0", least_port=0)


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.name)
def test_examples_are_valid(file: Path) -> None:
    config = load_private_config(file)
    assert config.task.shots == (4 if "messages" in file.name else 16)  # the others are the paper's task


def test_there_are_examples() -> None:
    assert [file.name for file in EXAMPLES] == ["private_messages.toml", "private_pacs.toml", "private_sst2.toml"]
