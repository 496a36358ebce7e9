"""`tune-private`: what a run directory holds, and that an interrupted run ends where one in one go does."""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.encoders.prompt_model import named_parts
from sordino.errors import ConfigError, PromptError, RunError
from sordino.mpc.dealing.costs import Cost, Costs
from sordino.mpc.errors import PartyLost
from sordino.mpc.parties.certificates import make_certificates
from sordino.mpc.tower.sentences import Forward, Sentences, in_the_clear
from sordino.mpc.tower.tower import PrivateTower, bundled_tower
from sordino.private_tuning.open_task import open_task
from sordino.private_tuning.search import Search, projection, prompts
from sordino.private_tuning.settings import PrivateTuning, load_private_config, parse_private_config
from sordino.private_tuning.tasks import TextTask
from sordino.private_tuning.tuning import as_text, tune_private
from sordino.prompt_file import SavedPrompt
from sordino.report.private import write_private_report

GENERATIONS, POPULATION = 4, 5


@pytest.fixture(scope="module")
def tower() -> PrivateTower:
    """One layer, so that a test takes no time."""
    whole = bundled_tower()
    return PrivateTower(whole.heads, whole.epsilon, whole.norm, whole.layers[:1])


@pytest.fixture
def file(tmp_path: Path, tower: PrivateTower) -> Path:
    """A configuration, with data and a tower beside it."""
    lines = ["sentence\tlabel"]
    for number in range(6):
        lines += [f"a fine film {'!' * number}\t1", f"a dull film {'!' * number}\t0"]
    (tmp_path / "data.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "tower.safetensors").write_bytes(tower.to_bytes({}))
    file = tmp_path / "private.toml"
    file.write_text(f"""
        seed = 3
        [task]
        kind = "text"
        train = "{tmp_path}/data.tsv"
        test = "{tmp_path}/data.tsv"
        label_names = ["negative", "positive"]
        descriptions = ["bad", "good"]
        shots = 2
        [prompt]
        length = 2
        initial = "it was"
        [search]
        width = 4
        population = {POPULATION}
        generations = {GENERATIONS}
        [model]
        tower = "{tmp_path}/tower.safetensors"
    """)
    return file


class Paid:
    """A tower that enters costs as servers do, and may be lost in a call."""

    def __init__(self, tower: PrivateTower, lost_in: int | None = None) -> None:
        self.costs, self.calls, self._lost_in, self._forward = Costs(), 0, lost_in, in_the_clear(tower)

    def __call__(self, groups: Sequence[Sentences]) -> list[Tensor]:
        if self.calls == self._lost_in:
            raise KeyboardInterrupt
        self.calls += 1
        with self.costs.label("layer 0"), self.costs.protocol("multiply"):
            self.costs.add(Cost(2, 1000, 500))
        return self._forward(groups)


def tuned(file: Path, out: Path, forward: Forward, costs: Costs | None = None, **options: Any) -> dict[str, Any]:
    config = load_private_config(file)
    return tune_private(config, out, open_task(config), forward, costs is None, costs, **options)


def timeless(content: Any) -> Any:
    """The same without what a clock says."""
    if isinstance(content, dict):
        return {key: timeless(value) for key, value in content.items() if key != "seconds"}
    return [timeless(each) for each in content] if isinstance(content, list) else content


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_run_directory_is_complete(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = tuned(file, out, in_the_clear(tower))
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    assert load_private_config(out / "config.toml") == load_private_config(file)
    assert summary["evaluations"] == GENERATIONS * POPULATION
    assert summary["clear"] is True
    assert summary["costs"] is None
    last = lines_of(out)[-1]
    assert last["generation"] == GENERATIONS
    losses = json.loads((out / "search.json").read_text(encoding="utf-8"))["losses"]
    assert last["least_loss"] == min(map(min, losses))
    assert last["mean_loss"] == pytest.approx(sum(losses[-1]) / POPULATION)


def test_no_other_user_reads_what_a_search_tells_of_its_data(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = os.umask(0)
    try:
        tuned(file, out, in_the_clear(tower))
    finally:
        os.umask(before)
    assert out.stat().st_mode & 0o777 == 0o700
    shown = {path.name for path in out.rglob("*") if path.is_file() and path.stat().st_mode & 0o077}
    assert shown == {"config.toml", "metrics.jsonl", "summary.json"}
    assert (out / "data.json").exists()


def test_the_stored_prompt_is_the_one_that_was_tested(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = tuned(file, out, in_the_clear(tower))
    config = load_private_config(file)
    task, search = open_task(config), config.search.search(config.seed)
    saved = SavedPrompt.load(out / "prompts" / "private.safetensors")
    prompt, z = (named_parts(saved.prompt)[name] for name in ("context", "z"))
    torch.testing.assert_close(prompt, prompts(search, task.start(), z[None])[0])
    assert not torch.allclose(prompt, task.start())
    assert projection(search, 2, 384).shape == (4, 2, 384)
    assert saved.class_names == ("negative", "positive")
    assert (saved.method, saved.settings["seed"], saved.settings["shots"]) == ("secp-tuning", 3, 2)
    assert saved.encoder.fingerprint == task.record()["embeddings"]
    assert task.accuracy(in_the_clear(tower), prompt) == summary["accuracy"]["tuned"]
    assert task.accuracy(in_the_clear(tower), task.start()) == summary["accuracy"]["zero_shot"]
    with pytest.raises(PromptError, match="sorts sentences behind a private text tower"):
        saved.model()


def test_a_stored_prompt_for_pictures_classifies_without_its_tower(
    file: Path, tower: PrivateTower, pictures: Path, tmp_path: Path
) -> None:
    """By the class features of its test, which cost no call of the tower beside those of a task of sentences."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    tables["task"] = {"kind": "images", "source": f"imagefolder:{pictures}", "shots": 2}
    config = parse_private_config(tables)
    task, forward = open_task(config), Paid(tower)
    summary = tune_private(config, tmp_path / "run", task, forward, False, forward.costs)
    sentences = Paid(tower)
    tuned(file, tmp_path / "sentences", sentences, sentences.costs)
    assert forward.calls == sentences.calls + 1, "of 'a photo of a', where sentences start at their hand-written prompt"
    saved = SavedPrompt.load(tmp_path / "run" / "prompts" / "private.safetensors")
    assert saved.privacy.statement.startswith("Tuned on secret shares")
    assert not saved.privacy.private
    classifier = saved.model()
    guesses = classifier.logits(task.test_features).argmax(-1)
    assert float((guesses == task.test_labels).double().mean()) == summary["accuracy"]["tuned"]
    prompt = named_parts(saved.prompt)["context"]
    expected = task.logits(in_the_clear(tower), prompt[None], test=True)[0]
    torch.testing.assert_close(classifier.logits(task.test_features), expected)


def test_the_search_is_held_against_the_hand_written_prompt(
    file: Path, tower: PrivateTower, pictures: Path, tmp_path: Path
) -> None:
    """Recomputed here; the initial prompt is a part of the hand-written one."""
    tables = tomllib.loads(file.read_text(encoding="utf-8"))
    tables["task"] = {"kind": "images", "source": f"imagefolder:{pictures}", "shots": 2}
    tables["prompt"] = {"length": 1, "initial": "a"}
    config = parse_private_config(tables)
    task, forward = open_task(config), in_the_clear(tower)
    summary = tune_private(config, tmp_path / "run", task, forward, True)
    saved = SavedPrompt.load(tmp_path / "run" / "prompts" / "private.safetensors")

    def correct(prompt: Tensor) -> Tensor:
        return task.logits(forward, prompt[None], test=True)[0].argmax(-1) == task.test_labels

    words, tuned_prompt = task.embedder.embed("a photo of a"), named_parts(saved.prompt)["context"]
    assert summary["accuracy"]["tuned"] == float(correct(tuned_prompt).double().mean())
    held = summary["hand_written"]
    assert held["prompt"] == "a photo of a"
    assert held["accuracy"] == float(correct(words).double().mean())
    assert held["gain"]["mean"] == pytest.approx(summary["accuracy"]["tuned"] - held["accuracy"])
    assert held["gain"]["low"] < held["gain"]["mean"] < held["gain"]["high"]
    assert f"{held['accuracy']:.3f} with the hand-written prompt 'a photo of a'" in as_text(summary)
    assert "than the hand-written prompt: " in as_text(summary)
    earlier = {key: value for key, value in summary.items() if key != "hand_written"}
    assert "hand-written" not in as_text(earlier), "a summary of an earlier version still reads"


def test_norms_are_kept_where_that_is_asked_for() -> None:
    """A prompt points where the projection sends it, with the initial prompt's length."""
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    free = Search(width=4, scale=2.0)
    z = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.0, 0.0, 0.0, 0.0]])
    kept, moved = prompts(replace(free, keep_norms=True), start, z), prompts(free, start, z)
    torch.testing.assert_close(kept.norm(dim=-1), start.norm(dim=-1).expand(2, 3))
    torch.testing.assert_close(cosine_similarity(kept, moved, dim=-1), torch.ones(2, 3))
    torch.testing.assert_close(kept[1], start)
    assert not torch.allclose(kept[0], moved[0])


@pytest.mark.parametrize("lost_in", [0, 1, 3, GENERATIONS + 2])
def test_an_interrupted_run_ends_where_one_in_one_go_does(
    file: Path, tower: PrivateTower, tmp_path: Path, lost_in: int
) -> None:
    """Whatever the call it is interrupted in: before, between and after generations."""
    whole, whole_tower = tmp_path / "whole", Paid(tower)
    expected = tuned(file, whole, whole_tower, whole_tower.costs)
    out, interrupted = tmp_path / "parts", Paid(tower, lost_in)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted, interrupted.costs)
    resumed = Paid(tower)
    summary = tuned(file, out, resumed, resumed.costs, resume=True)
    assert {**timeless(summary), "costs": None} == {**timeless(expected), "costs": None}
    assert (out / "config.toml").read_bytes() == (whole / "config.toml").read_bytes()
    stored = [load_file(each / "prompts" / "private.safetensors") for each in (out, whole)]
    assert all(stored[0][name].equal(stored[1][name]) for name in ("context", "z"))
    kept = ("generation", "least_loss", "mean_loss")
    assert [{key: line[key] for key in kept} for line in lines_of(out)] == [
        {key: line[key] for key in kept} for line in lines_of(whole)
    ]
    losses = [json.loads((each / "search.json").read_text(encoding="utf-8"))["losses"] for each in (out, whole)]
    assert losses[0] == losses[1]


def test_a_finished_run_asks_nothing_again(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    summary = tuned(file, tmp_path / "run", in_the_clear(tower))

    def never(groups: Sequence[Sentences]) -> list[Tensor]:
        raise AssertionError

    assert tuned(file, tmp_path / "run", never, resume=True) == summary


def test_a_cut_line_and_a_damaged_state(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    out, interrupted = tmp_path / "run", Paid(tower, 4)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted)
    with (out / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write('{"generation": 9, "lea')
    state = (out / "search.json").read_bytes()
    (out / "search.json").write_bytes(state[:-9])
    with pytest.raises(RunError, match="damaged"):
        tuned(file, out, in_the_clear(tower), resume=True)
    (out / "search.json").write_bytes(state)
    tuned(file, out, in_the_clear(tower), resume=True)
    assert [line["generation"] for line in lines_of(out)][-GENERATIONS:] == [1, 2, 3, 4]


def test_a_folder_is_not_overwritten_and_not_gone_on_with_otherwise(
    file: Path, tower: PrivateTower, tmp_path: Path
) -> None:
    out, interrupted = tmp_path / "run", Paid(tower, 3)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted)
    with pytest.raises(RunError, match="exists; go on with --resume"):
        tuned(file, out, in_the_clear(tower))
    changed = load_private_config(file, ["search.width=5"])
    with pytest.raises(RunError, match=r"search\.width was 4 and is 5"):
        tune_private(changed, out, open_task(changed), in_the_clear(tower), True, resume=True)
    with pytest.raises(RunError, match="go on in the same way"):
        tuned(file, out, interrupted, Costs(), resume=True)
    moved: PrivateTuning = load_private_config(file, ["session.servers=['a:1', 'b:2']"])
    tune_private(moved, out, open_task(moved), in_the_clear(tower), True, resume=True)


CHANGES = [
    ("data.tsv", b"a fine film", b"a good film", "the training examples changed; the test examples changed"),
    ("data.tsv", b"!!\t1", b"!!!!!!!!\t1", "the t.* examples changed"),
    ("tower.safetensors", None, None, "the private tower changed"),
]


@pytest.mark.parametrize(("name", "old", "new", "message"), CHANGES)
def test_what_changed_since_the_start_is_refused(
    file: Path, tower: PrivateTower, tmp_path: Path, name: str, old: bytes | None, new: bytes | None, message: str
) -> None:
    out, interrupted = tmp_path / "run", Paid(tower, 3)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted)
    changed = tmp_path / name
    content = changed.read_bytes()
    changed.write_bytes(replace(tower, layers=()).to_bytes({}) if old is None else content.replace(old, new or b""))
    with pytest.raises(RunError, match=f"not the same as when .* was started: {message}"):
        tuned(file, out, in_the_clear(tower), resume=True)
    changed.write_bytes(content)
    tuned(file, out, in_the_clear(tower), resume=True)


@pytest.mark.slow
def test_pictures_that_changed_are_refused(file: Path, pictures: Path, tower: PrivateTower, tmp_path: Path) -> None:
    overrides = ["task={kind='images', shots=4, source='imagefolder:" + str(pictures) + "'}", "search.generations=1"]
    config, out = load_private_config(file, overrides), tmp_path / "run"
    tune_private(config, out, open_task(config), in_the_clear(tower), True)
    record = json.loads((out / "data.json").read_text(encoding="utf-8"))
    assert record["encoder"]["name"] == "bundled"
    (out / "summary.json").unlink()
    tune_private(config, out, open_task(config), in_the_clear(tower), True, resume=True)
    (out / "summary.json").unlink()
    for picture in (pictures / "blue_sky").iterdir():
        picture.write_bytes((pictures / "green_leaf" / picture.name).read_bytes())
    with pytest.raises(RunError, match="the training examples changed; the test examples changed"):
        tune_private(config, out, open_task(config), in_the_clear(tower), True, resume=True)


def test_costs_are_those_of_the_whole_run(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    paid = Paid(tower)
    found = tuned(file, tmp_path / "run", paid, paid.costs)["costs"]
    assert found["rounds"] == 2 * paid.calls
    assert found["online_bytes_per_server"] == 1000 * paid.calls
    assert found["offline_bytes"] == 500 * paid.calls
    whole = {key: found[key] for key in ("rounds", "online_bytes_per_server", "offline_bytes")}
    assert found["by_label"] == {"layer 0": whole}
    assert found["by_protocol"] == found["by_nested_protocol"] == {"multiply": whole}
    assert found["by_label_and_protocol"] == {"layer 0": {"multiply": whole}}
    for name, delay, rate in (("lan", 0.5e-3, 10e9), ("wan", 40e-3, 100e6)):
        seconds = found["seconds_on"][name]
        assert seconds["online"] == pytest.approx(2 * paid.calls * delay + 8 * 1000 * paid.calls / rate)
    spent = [line["rounds"] for line in lines_of(tmp_path / "run")]
    assert spent == sorted(spent)
    assert all(rounds > 0 for rounds in spent)


def test_costs_of_finished_generations_are_kept(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    out, interrupted, resumed = tmp_path / "run", Paid(tower, 4), Paid(tower)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted, interrupted.costs)
    found = tuned(file, out, resumed, resumed.costs, resume=True)["costs"]
    assert found["rounds"] == 2 * (interrupted.calls + resumed.calls)


def test_the_command_prints_one_object(file: Path, tmp_path: Path) -> None:
    arguments = ["tune-private", str(file), "--clear", "--out", str(tmp_path / "run"), "--set", "search.generations=1"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    summary = json.loads(result.stdout)
    assert summary["generations"] == 1
    again = CliRunner().invoke(app, [*arguments, "--resume"])
    assert "accuracy" in again.stdout
    assert f"{summary['accuracy']['tuned']:.3f}" in again.stdout


def test_the_command_says_where_the_hand_written_prompt_is_better(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its text, its summary and its page, from the hits of both prompts on the same examples; names are escaped."""
    arguments = ["tune-private", str(file), "--clear", "--out", str(tmp_path / "run"), "--set", "search.generations=1"]
    arguments += ["--set", 'task.label_names=["negative", "<b>positive</b>"]']
    whole, calls = TextTask.measure, []

    def measure(task: TextTask, forward: Forward, prompt: Tensor) -> Any:
        hits, beside = whole(task, forward, prompt)
        calls.append(prompt)
        return (task.test_labels == 0) if len(calls) == 2 else (hits | True), beside

    monkeypatch.setattr(TextTask, "measure", measure)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "worse than the hand-written prompt: 50.0 to 100.0, interval of the difference" in result.stdout
    assert "keep the hand-written one, or tune with more examples" in result.stdout
    assert "the hand-written prompt is better on <b>positive</b> (100.0 to 0.0)" in result.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["hand_written"]["gain"]["mean"] == -0.5
    assert summary["hand_written"]["gain"]["high"] < 0
    assert summary["by_class"]["negative"] == {"hand_written": 1.0, "tuned": 1.0, "test_examples": 6}
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The tuned prompt is worse than the hand-written one." in page
    assert "In short" in page
    assert "&lt;b&gt;positive&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "Loss by generation" in page


def test_a_page_of_an_older_summary_and_of_no_run(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    """What an older version did not write is left out; a folder without a finished run is named."""
    tuned(file, tmp_path / "run", in_the_clear(tower))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    for key in ("hand_written", "by_class", "model"):
        del summary[key]
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    page = write_private_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "Initial prompt" in page
    assert "Hand-written prompt" not in page
    assert "By class" not in page
    (tmp_path / "run" / "summary.json").write_text("{}")
    with pytest.raises(RunError, match="holds no finished run of 'sordino tune-private'"):
        write_private_report(tmp_path / "run")


def test_a_run_goes_on_with_the_same_model_only(file: Path, tower: PrivateTower, tmp_path: Path) -> None:
    """The servers' model has a name that stays; losses of two models are not mixed."""
    out, interrupted = tmp_path / "run", Paid(tower, 3)
    with pytest.raises(KeyboardInterrupt):
        tuned(file, out, interrupted, interrupted.costs, model="first")
    other = Paid(tower)
    with pytest.raises(RunError, match="the private tower changed"):
        tuned(file, out, other, other.costs, resume=True, model="second")
    assert tuned(file, out, other, other.costs, resume=True, model="first")["model"] == "first"


@pytest.mark.parametrize(
    ("given", "key"), [([], "session.servers"), (["session.servers=['a:1', 'b:2']"], "session.certificates")]
)
def test_without_servers_it_says_what_to_give(file: Path, tmp_path: Path, given: list[str], key: str) -> None:
    options = [part for each in given for part in ("--set", each)]
    result = CliRunner().invoke(app, ["tune-private", str(file), "--out", str(tmp_path / "run"), *options])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.key == key
    assert "--clear" in result.exception.allowed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("begun", [False, True])
def test_only_what_was_begun_is_to_be_resumed(file: Path, tmp_path: Path, begun: bool) -> None:
    """Servers that cannot be reached, at first and after a generation."""
    make_certificates(tmp_path / "parties")
    sides = ["session.servers=['127.0.0.1:1','127.0.0.1:2']", f"session.certificates={tmp_path}/parties/data-owner"]
    options = [word for side in [*sides, "session.timeout=2"] for word in ("--set", side)]
    if begun:
        from sordino.experiments.toml_tables import to_toml

        (tmp_path / "run").mkdir()
        tables = load_private_config(file, sides).model_dump(exclude_none=True)
        (tmp_path / "run" / "config.toml").write_text(to_toml(tables))
        options.append("--resume")
    with pytest.raises(PartyLost, match=r"server-\d .*cannot be reached") as lost:
        CliRunner().invoke(
            app, ["tune-private", str(file), "--out", str(tmp_path / "run"), *options], catch_exceptions=False
        )
    assert ("--resume" in str(lost.value)) == begun
    assert (tmp_path / "run").exists() == begun


def test_a_class_whose_sentence_does_not_fit_is_told_before_the_search(file: Path, pictures: Path) -> None:
    """512 tokens are what the bundled tower takes: a start, the prompt, and 'red apple.' with an end."""
    task = "task={kind='images', shots=1, source='imagefolder:" + str(pictures) + "'}"
    longest = 512 - 1 - 4
    open_task(load_private_config(file, [task, f"prompt.length={longest}"]))
    with pytest.raises(ConfigError, match=rf"prompt.length = {longest + 1}: .* a sentence has 513 tokens"):
        open_task(load_private_config(file, [task, f"prompt.length={longest + 1}"]))
