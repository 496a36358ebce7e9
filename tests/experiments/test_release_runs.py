"""Runs that release class statistics: restarts, and runs that use another run's release again."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from typer.testing import CliRunner

from sordino.cli.app import app
from sordino.errors import ConfigError, RunError
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.release_file import ENTRY, FILE, ReleaseFile, with_release
from sordino.experiments.run import run
from sordino.privacy.accounting import compose, spent
from sordino.privacy.ledger import OBSERVERS, Ledger
from sordino.runtime import local
from sordino.runtime.local import LocalRuntime, RoundError

STATISTICS = ["privacy.mechanism=statistics", "privacy.noise_multiplier=1.0", "privacy.delta=0.01"]
AGAIN = ["privacy.mechanism=statistics"]
SIMULATED = ["privacy.simulation=true", "privacy.nonce=" + "a5" * 16]
QUICK = ["rounds=2", "runtime.evaluate_every=2", "runtime.checkpoint_every=2"]


@pytest.fixture
def configured(config_file: Path) -> Callable[..., Experiment]:
    return lambda *keys: load_config(config_file, [*QUICK, *keys])


def ledger_of(folder: Path) -> Ledger:
    return Ledger.from_json((folder / "ledger.json").read_bytes())


def interrupt(config: Experiment, out: Path, monkeypatch: pytest.MonkeyPatch, name: str = "round") -> None:
    """A run that dies in its first round, or wherever a method of the runtime is called."""

    def dies(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, name, dies)
        with pytest.raises(KeyboardInterrupt):
            run(config, out)


@pytest.mark.parametrize("noise", [[], SIMULATED])
def test_a_restart_before_the_first_checkpoint_does_not_release_again(
    noise: list[str], configured: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configured(*STATISTICS, *noise), tmp_path / "run"
    interrupt(config, out, monkeypatch)
    released, before = (out / FILE).read_bytes(), ledger_of(out)
    assert not (out / "checkpoint").exists()
    assert [release.steps for release in before.releases] == [1, 1]

    def releases(*_: Any) -> Any:
        raise AssertionError("it was released before")

    monkeypatch.setattr(LocalRuntime, "release", releases)
    summary = run(config, out, resume=True)
    assert (out / FILE).read_bytes() == released
    assert ledger_of(out).releases == before.releases
    assert summary.rounds == 2
    assert summary.privacy.private == (not noise)
    assert summary.privacy.epsilon == pytest.approx(spent(before, "server", "example").epsilon, abs=1e-9)


def test_a_kill_between_the_file_and_the_ledger_loses_nothing(
    configured: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = configured(*STATISTICS), tmp_path / "run"
    interrupt(config, out, monkeypatch)
    before = ledger_of(out)
    (out / "ledger.json").unlink()
    run(config, out, resume=True)
    assert ledger_of(out).releases == before.releases


def test_a_restart_has_the_numbers_of_an_uninterrupted_run(
    configured: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(*STATISTICS, *SIMULATED)
    run(config, tmp_path / "whole")
    interrupt(config, tmp_path / "cut", monkeypatch)
    run(config, tmp_path / "cut", resume=True)
    for name in (FILE, "ledger.json", "prompts/client-0000.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert first["round"] == 0
    assert first["upload_bytes"] > 0  # the release's


def test_a_release_that_failed_stays_counted(
    configured: Callable[..., Experiment], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients may have sent theirs before another failed; a restart releases anew, and both count."""

    def fails(self: LocalRuntime, training: local.Training) -> Any:
        mechanism = self.mechanism
        raise RoundError("a client died", training.ledger.add(mechanism.released(training.ledger.run)))  # type: ignore

    budget = 1e-3 + plan(configured(*STATISTICS)).views[0].epsilon
    for keys, name in (([], "free"), ([f"privacy.epsilon={budget}"], "bounded")):
        config, out = configured(*STATISTICS, *keys), tmp_path / name
        with monkeypatch.context() as patch:
            patch.setattr(LocalRuntime, "release", fails)
            with pytest.raises(RoundError):
                run(config, out)
        once = ledger_of(out)
        assert len(once.releases) == 2
        if keys:
            with pytest.raises(RunError, match="have spent the budget"):
                run(config, out, resume=True)
            assert ledger_of(out) == once
            continue
        summary = run(config, out, resume=True)
        both = ledger_of(out)
        assert len(both.releases) == 4
        assert len({release.name for release in both.releases}) == 2
        assert summary.privacy.epsilon > spent(once, "server", "example").epsilon
        assert len(ReleaseFile.load(out / FILE).releases) == 2
        # It is killed as it has the release on the disk, and before the ledger has it beside the failed one.
        interrupt(config, tmp_path / "killed", monkeypatch)
        (tmp_path / "killed" / "ledger.json").write_text(once.to_json())
        run(config, tmp_path / "killed", resume=True)
        assert len({release.name for release in ledger_of(tmp_path / "killed").releases}) == 2


@pytest.mark.parametrize("space", ["subspace=8", "center_share=0.2"])
@pytest.mark.parametrize(
    ("first", "second", "noise_by"),
    [
        ("dp-fpl", "promptfl", "client"),
        ("local", "promptfl", "client"),
        ("promptfl", "dp-fpl", "server"),
        ("dp-fpl", "promptfl", "shares"),
    ],
)
def test_a_second_method_uses_the_release_at_no_cost(
    first: str, second: str, noise_by: str, space: str, configured: Callable[..., Experiment], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keys = [f"privacy.noise_by={noise_by}", f"privacy.{space}", "privacy.colluders=1", "privacy.scatter_share=0.1"]
    run(configured(*STATISTICS, *keys, f"algorithm={first}"), one)
    config = configured(*AGAIN, f"algorithm={second}", f"privacy.release={one}")
    summary = run(config, two)
    ledgers = [ledger_of(one), ledger_of(two)]
    assert ledgers[0].releases == ledgers[1].releases
    assert ledgers[0].run != ledgers[1].run
    assert ledgers[0].trusted == ledgers[1].trusted
    for observer in OBSERVERS:
        alone = spent(ledgers[0], observer, "example").epsilon
        assert spent(compose(ledgers), observer, "example").epsilon == alone
        assert spent(compose(ledgers[::-1]), observer, "example").epsilon == alone
    assert summary.privacy.epsilon == pytest.approx(spent(ledgers[0], "public", "example").epsilon)

    table = tomllib.loads((two / "config.toml").read_text())["privacy"]
    assert (table["noise_by"], table["noise_multiplier"]) == (noise_by, 1.0)
    key, value = space.split("=")
    assert table[key] == float(value)
    planned = plan(config)
    for view in planned.views:  # a secure sum's noise is what was planned, or a little more
        spent_on = spent(ledgers[1], view.observer, "example").epsilon
        assert view.epsilon == pytest.approx(spent_on, rel=1e-4)
        assert view.epsilon >= spent_on - 1e-9
    assert planned.as_dict()["noise_by"] == noise_by
    (two / "summary.json").unlink()
    (two / "report.html").unlink()
    assert run(load_config(two / "config.toml"), two, resume=True).rounds == 2  # what a run wrote resumes it
    assert ledger_of(two).releases == ledgers[0].releases


@pytest.fixture
def released(configured: Callable[..., Experiment], tmp_path: Path) -> Path:
    """A run directory with a release."""
    run(configured(*STATISTICS), tmp_path / "released")
    return tmp_path / "released"


def test_a_simulated_release_is_used_again(configured: Callable[..., Experiment], tmp_path: Path) -> None:
    run(configured(*STATISTICS, *SIMULATED), tmp_path / "one")
    keys = [*AGAIN, f"privacy.release={tmp_path / 'one'}", "algorithm=promptfl"]
    for name, more in (("two", []), ("three", ["privacy.simulation=true"])):
        summary = run(configured(*keys, *more), tmp_path / name)
        assert summary.privacy.simulated
        assert not summary.privacy.private


def test_a_release_of_other_data_classes_or_encoder_is_refused(
    released: Path, configured: Callable[..., Experiment], tmp_path: Path, pictures: Path
) -> None:
    keys = [*AGAIN, f"privacy.release={released}"]
    for number, (more, what) in enumerate(
        [
            (["seed=1"], "data of the clients"),
            (["data.train_per_class=3"], "data of the clients"),
            (["encoder.name=bundled", "encoder.checkpoint="], "encoder"),
        ]
    ):
        if "encoder" in what:
            text = (tmp_path / "config.toml").read_text().split("[encoder]")
            (tmp_path / "other.toml").write_text(text[0] + "[runtime]" + text[1].split("[runtime]")[1])
            config = load_config(tmp_path / "other.toml", [*QUICK, *keys])
        else:
            config = configured(*keys, *more)
        with pytest.raises(ConfigError, match=rf"privacy\.release.*a release of other {what}"):
            run(config, tmp_path / f"refused-{number}")
    (pictures / "red_apple").rename(pictures / "red_pear")
    with pytest.raises(ConfigError, match=r"privacy\.release.*a release of other (data|classes)"):
        run(configured(*keys), tmp_path / "refused")


def test_a_release_of_other_persons_is_refused(
    configured: Callable[..., Experiment], pictures: Path, tmp_path: Path
) -> None:
    """Its bound holds for the persons that it was made with."""

    def persons(name: str, of_one: int) -> str:
        files = [file.relative_to(pictures) for file in sorted(pictures.rglob("*.png"))]
        lines = [f"{file.as_posix()},{file.parent.name} {int(file.stem) // of_one}" for file in files]
        (tmp_path / name).write_text("\n".join(["file,person", *lines]) + "\n")
        return f"data.persons={tmp_path / name}"

    first, one = persons("one.csv", 1), tmp_path / "one"
    run(configured(*STATISTICS, "privacy.unit=person", "privacy.clip=2.0", first), one)
    summary = run(configured(*AGAIN, f"privacy.release={one}", "algorithm=promptfl", first), tmp_path / "two")
    assert summary.privacy.unit == "person"
    assert {release.unit for release in ledger_of(tmp_path / "two").releases} == {"person"}
    record = ReleaseFile.load(one / FILE)
    assert record.persons
    with pytest.raises(ConfigError, match=r"privacy\.unit = 'person'"):
        run(configured(*AGAIN, f"privacy.release={one}"), tmp_path / "three")
    other = configured(*AGAIN, f"privacy.release={one}", persons("two.csv", 2))
    with pytest.raises(ConfigError, match=r"privacy\.release.*a release of other (persons|data)"):
        run(other, tmp_path / "four")


def test_joint_statistics_do_not_serve_a_method_that_learns_alone(
    configured: Callable[..., Experiment], tmp_path: Path
) -> None:
    run(configured(*STATISTICS, "algorithm=promptfl", "privacy.noise_by=server"), tmp_path / "one")
    config = configured(*AGAIN, "algorithm=local", f"privacy.release={tmp_path / 'one'}")
    with pytest.raises(ConfigError, match=r"privacy\.(release|noise_by)"):
        run(config, tmp_path / "two")


def tampered(content: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """A release file whose metadata say something else."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    document = json.loads(header["__metadata__"][ENTRY])
    change(document)
    header["__metadata__"][ENTRY] = json.dumps(document)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def test_a_changed_file_is_refused(released: Path, configured: Callable[..., Experiment], tmp_path: Path) -> None:
    content = (released / FILE).read_bytes()

    def louder(document: dict[str, Any]) -> None:
        for entry in document["releases"]:
            entry["noise_multipliers"] = [100.0 for _ in entry["noise_multipliers"]]

    def other_noise(document: dict[str, Any]) -> None:
        document["privacy"]["noise_multiplier"] = 100.0

    def of_others(document: dict[str, Any]) -> None:
        document["digests"] = document["digests"][::-1]

    last = bytes([content[-1] ^ 1])
    changes = [content[:-1] + last, content[:-7], content[:100], b"", b"\xff" * 64]
    changes += [tampered(content, change) for change in (louder, other_noise, of_others, dict.clear)]
    config = configured(*AGAIN, f"privacy.release={released}")
    for changed in changes:
        (released / FILE).write_bytes(changed)
        with pytest.raises(RunError, match=r"release\.safetensors is damaged or was changed"):
            run(config, tmp_path / "run")
    (released / FILE).write_bytes(tampered(content, lambda document: None))  # only written anew
    assert ReleaseFile.load(released / FILE).releases == ledger_of(released).releases
    for older in (1, 2):
        (released / FILE).write_bytes(tampered(content, lambda document, older=older: document.update(format=older)))
        with pytest.raises(RunError, match="written by an earlier version, whose noise had too few bits"):
            run(config, tmp_path / "run")
    (released / FILE).unlink()
    with pytest.raises(RunError, match="no release.safetensors to read"):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.toml").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epsilon", "2.0"),
        ("noise_multiplier", "1.5"),
        ("delta", "0.001"),
        ("noise_by", "server"),
        ("sampling_rate", "0.5"),
        ("subspace", "4"),
        ("count_share", "0.123"),
        ("unit", "person"),
        ("clip", "3.0"),
        ("simulation", "true"),
    ],
)
def test_a_configuration_that_contradicts_the_release_is_refused(
    key: str, value: str, released: Path, configured: Callable[..., Experiment], tmp_path: Path
) -> None:
    config = configured(*AGAIN, f"privacy.release={released}", f"privacy.{key}={value}")
    for attempt in (lambda: run(config, tmp_path / "run"), lambda: plan(config)):
        with pytest.raises(ConfigError, match=rf"privacy\.{key} = .*the release of .* was made with"):
            attempt()
    assert not (tmp_path / "run" / "config.toml").exists()


def test_a_release_without_colluders_of_an_earlier_version_is_refused(
    released: Path, configured: Callable[..., Experiment]
) -> None:
    earlier = ReleaseFile.load(released / FILE)
    replace(earlier, privacy={**earlier.privacy, "noise_by": "shares", "colluders": 0}).save()
    with pytest.raises(RunError, match=r"made with what is refused by now \(privacy.colluders = 0.*; release anew"):
        with_release(configured("privacy.mechanism=statistics", f"privacy.release={released}"))


def test_the_same_keys_as_the_release_are_allowed(
    released: Path, configured: Callable[..., Experiment], tmp_path: Path
) -> None:
    summary = run(configured(*STATISTICS, f"privacy.release={released}", "seed=0"), tmp_path / "run")
    assert summary.rounds == 2


def test_only_statistics_are_released(released: Path, configured: Callable[..., Experiment]) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.release.*needs privacy\.mechanism = 'statistics'"):
        configured("privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0", f"privacy.release={released}")


def test_the_plan_says_that_all_is_paid_before_the_first_round(
    config_file: Path, configured: Callable[..., Experiment], tmp_path: Path
) -> None:
    keys = ["privacy.mechanism=statistics", "privacy.epsilon=2.0", "privacy.delta=0.01"]
    chosen = plan(configured(*keys))
    assert len({epsilons for _, epsilons in chosen.by_round}) == 1
    assert 1.999 < max(view.epsilon for view in chosen.views) <= 2.0 + 1e-6
    summary = run(configured(*keys), tmp_path / "run")
    assert summary.privacy.epsilon == pytest.approx(chosen.views[0].epsilon, abs=1e-6)
    assert {release.steps for release in ledger_of(tmp_path / "run").releases} == {1}
    options = [part for key in keys for part in ("--set", key)]
    result = CliRunner().invoke(app, ["privacy", "plan", str(config_file), *options])
    assert result.exit_code == 0, result.output
    assert "class counts and class sums of features, once; noise by" in result.stdout
    assert "Mechanism: statistics" in result.stdout


def test_the_file_holds_numbers_and_text_only(released: Path) -> None:
    with safetensors.safe_open(released / FILE, "pt") as file:
        assert list(file.metadata()) == [ENTRY]
