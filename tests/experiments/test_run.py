"""From a folder of pictures to a run directory, and back after every kind of interruption."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
from PIL import Image

from sordino.errors import ConfigError, DataError, EncoderError, RunError
from sordino.experiments.compare import compare
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.run import run
from sordino.experiments.variants import grid
from sordino.results import Copies, PassedOver


def prompts(folder: Path) -> dict[str, bytes]:
    """The final tensors, bit for bit."""
    files = sorted((folder / "prompts").iterdir())
    return {path.name: safetensors.torch.load_file(path)["context"].numpy().tobytes() for path in files}


def test_a_run_directory_is_complete(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    summary = run(load_config(config_file), out)
    assert summary.as_dict() == json.loads((out / "summary.json").read_text())
    assert {path.name for path in out.iterdir()} == {
        "config.toml", "data.json", "metrics.jsonl", "checkpoint", "prompts", "ledger.json", "summary.json",
        "report.html",
    }  # fmt: skip
    assert summary.clients == 2
    accuracy = summary.as_dict()["accuracy"]
    assert all(0 <= accuracy[split] <= 1 for split in ("local", "neighbor", "overall"))
    assert summary.accuracy.novel is None
    for split in ("local", "neighbor", "overall"):
        mean = sum(getattr(client, split) for client in summary.per_client) / 2
        assert accuracy[split] == pytest.approx(mean)
    assert not summary.privacy.private
    assert "Not private" in summary.privacy.statement
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(7))
    assert [line["round"] for line in lines if line["accuracy"]] == [0, 2, 4, 6]
    assert lines[-1]["accuracy"] == accuracy
    total = sum(line["upload_bytes"] * line["participants"] for line in lines)
    assert summary.communication.total_upload_bytes == total > 0


def test_a_prompt_says_what_it_belongs_to(config_file: Path, tmp_path: Path) -> None:
    """In the metadata of a safetensors file, as JSON, which others can read too."""
    run(load_config(config_file), tmp_path / "run")
    file = tmp_path / "run" / "prompts" / "client-0001.safetensors"
    with safetensors.safe_open(file, "pt") as content:
        (document,) = content.metadata().values()
        assert content.get_tensor("context").shape[0] == 4
    about = json.loads(document)
    assert set(about["classes"]) == {"red apple", "green leaf", "blue sky", "grey stone"}
    assert about["privacy"]["private"] is False
    ledger = (tmp_path / "run" / "ledger.json").read_bytes()
    assert about["privacy"]["ledger_sha256"] == hashlib.sha256(ledger).hexdigest()


def test_the_same_seed_gives_the_same_bits(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file), tmp_path / "one")
    run(load_config(config_file), tmp_path / "two")
    run(load_config(config_file, ["seed=1"]), tmp_path / "three")
    assert prompts(tmp_path / "one") == prompts(tmp_path / "two")
    assert prompts(tmp_path / "one") != prompts(tmp_path / "three")


def test_a_second_run_encodes_no_image(config_file: Path, tmp_path: Path) -> None:
    first = run(load_config(config_file), tmp_path / "one")
    second = run(load_config(config_file, ["seed=3"]), tmp_path / "two")
    assert (first.images.encoded, first.images.cached) == (32, 0)
    assert (second.images.encoded, second.images.cached) == (0, 32)


@pytest.mark.parametrize("algorithm", ["dp-fpl", "local", "promptfl"])
@pytest.mark.parametrize("stop_after", [0, 1, 3, 5])
def test_resuming_equals_no_interruption(
    algorithm: str, stop_after: int, config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sordino.runtime.local import LocalRuntime

    config = load_config(config_file, [f"algorithm={algorithm}", 'settings.optimizer.name="adam"'])
    run(config, tmp_path / "whole")
    original = LocalRuntime.round

    def stopping(self, training):
        if training.round == stop_after:
            raise KeyboardInterrupt
        return original(self, training)

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, "round", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "parts")
    # As if the process had also died while it wrote a line of metrics.
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"round": 99, "lo')
    run(config, tmp_path / "parts", resume=True)
    assert prompts(tmp_path / "parts") == prompts(tmp_path / "whole")

    def lines(name: str) -> list[dict[str, object]]:
        content = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if "seconds" not in key} for line in content]

    assert lines("parts") == lines("whole")


@pytest.mark.slow
def test_resuming_after_kill_9_equals_no_interruption(config_file: Path, tmp_path: Path) -> None:
    """Real processes are killed some time after their first checkpoints, one after the other in one directory."""
    config = load_config(config_file, ["rounds=300"])
    run(config, tmp_path / "whole")
    out = tmp_path / "killed"
    latest = out / "checkpoint" / "latest.json"
    command = [sys.executable, "-m", "sordino", "run", str(config_file), "--set", "rounds=300", "--out", str(out)]
    for delay in (0.0, 0.2, 0.5):
        before = latest.read_bytes() if latest.exists() else None
        words = command if before is None else [*command, "--resume"]
        process = subprocess.Popen(words, env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while (not latest.exists() or latest.read_bytes() == before) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(delay)
        assert process.poll() is None, "the run was over before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (out / "summary.json").exists()
    run(config, out, resume=True)
    assert prompts(out) == prompts(tmp_path / "whole")


def test_resuming_a_finished_run_changes_nothing(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = run(load_config(config_file), out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(load_config(config_file), out, resume=True) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_existing_directory_is_not_overwritten(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(load_config(config_file), out)
    before = prompts(out)
    with pytest.raises(RunError, match=r"exists; go on with --resume, or choose another --out"):
        run(load_config(config_file), out)
    with pytest.raises(RunError, match=r"settings.dp-fpl.rank was 2 and is 3"):
        run(load_config(config_file, ["settings.dp-fpl.rank=3"]), out, resume=True)
    assert prompts(out) == before


def test_an_output_that_cannot_be_written_is_told_first(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RunError, match=r"file/run cannot be written.*choose another --out"):
        run(load_config(config_file), tmp_path / "file" / "run")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_damaged_checkpoint_stops_the_resumption(config_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(load_config(config_file), out)
    (out / "summary.json").unlink()
    for file in (out / "checkpoint").glob("round-*"):
        file.write_bytes(file.read_bytes()[:-1])
    before = (out / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match="damaged"):
        run(load_config(config_file), out, resume=True)
    assert (out / "metrics.jsonl").read_bytes() == before


def test_unreadable_pictures_are_named_counted_and_skipped(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    broken = pictures / "red_apple" / "3.png"
    broken.write_bytes(broken.read_bytes()[:60])
    (pictures / "blue_sky" / "7.png").write_text("not a picture")
    summary = run(load_config(config_file), tmp_path / "run")
    assert sorted(image.name for image in summary.images.skipped) == ["blue_sky/7.png", "red_apple/3.png"]
    assert summary.images.encoded == 30


def test_files_passed_over_are_told_once_and_in_the_summary(
    config_file: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (pictures / "red_apple" / "photo.xyz").write_bytes(b"x")
    (pictures / "blue_sky" / "scan").write_bytes(b"x")
    summary = run(load_config(config_file), tmp_path / "run")
    assert summary.images.passed_over == (
        PassedOver(kind=".xyz", folder="red_apple", files=1),
        PassedOver(kind="no extension", folder="blue_sky", files=1),
    )
    told = [record.getMessage() for record in caplog.records if "passed over" in record.getMessage()]
    assert len(told) == 1
    assert "1 .xyz in 'red_apple'" in told[0]
    assert (tmp_path / "run" / "summary.json").read_text().count("red_apple") >= 1


def test_copies_are_told_once_and_in_the_summary(
    config_file: Path, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = (pictures / "red_apple" / "0.png").read_bytes()
    for path in [*(pictures / "red_apple").iterdir(), pictures / "green_leaf" / "0.png"]:
        path.write_bytes(same)
    clean = run(load_config(config_file, ["data.train_per_class=2"]), tmp_path / "first")
    config = load_config(config_file, ["data.train_per_class=2"])
    found = compare(grid(config, ["promptfl", "local"]), 1, tmp_path / "both")
    assert len(found) == 2
    copies = clean.images.copies
    # All eight apples are one picture: two train, six test; the leaf is a third copy if it trains or tests, as it does.
    assert copies.in_two_classes == 1
    assert copies.tested_and_trained in (6, 7)
    assert copies.repeated_in_training in (1, 2)
    assert set(copies.examples["in_two_classes"]) & {"green_leaf/0.png"}
    told = [record.getMessage() for record in caplog.records if record.getMessage().startswith("copies of pictures")]
    assert len(told) == 2  # once for the run, once for both of the comparison
    assert "in two classes ('" in told[0]


def test_a_clean_run_has_no_copies_and_says_nothing(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    summary = run(load_config(config_file), tmp_path / "run")
    assert summary.images.copies == Copies()
    assert summary.images.passed_over == ()
    assert not [record for record in caplog.records if "copies" in record.getMessage()]


def test_names_that_read_the_same_end_a_run_before_anything_is_encoded(
    config_file: Path, pictures: Path, tmp_path: Path
) -> None:
    (pictures / "red_apple").rename(pictures / "Blue sky")
    with pytest.raises(EncoderError, match="reads class names 'Blue sky' and 'blue sky' as the same"):
        run(load_config(config_file), tmp_path / "run")


def test_deep_gray_in_a_run(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    """Twelve bits in 16-bit files: refused with the remedy, which then gives what 8 bits give."""
    gray = tmp_path / "eight"
    for folder in sorted(pictures.iterdir()):
        (gray / folder.name).mkdir(parents=True)
        for file in folder.iterdir():
            values = np.asarray(Image.open(file).convert("L"))
            Image.fromarray(values).save(gray / folder.name / file.name)
            Image.fromarray(values.astype(np.uint16) * 4095 // 255).save(file)
    with pytest.raises(DataError, match="has no readable picture"):
        run(load_config(config_file), tmp_path / "refused")
    given = run(load_config(config_file, ["data.gray_range=[0, 4095]"]), tmp_path / "deep")
    expected = run(load_config(config_file, [f"data.source=imagefolder:{gray}"]), tmp_path / "gray")
    assert given.images.encoded == expected.images.encoded == 32
    deep, eight = prompts(tmp_path / "deep"), prompts(tmp_path / "gray")
    assert given.images.skipped == ()
    assert deep.keys() == eight.keys()


def test_a_configuration_may_begin_with_a_byte_order_mark(config_file: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked.toml"
    marked.write_bytes(b"\xef\xbb\xbf" + config_file.read_bytes())
    assert load_config(marked) == load_config(config_file)


def test_too_few_readable_pictures_are_told_before_training(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    for number in range(5):
        (pictures / "red_apple" / f"{number}.png").write_bytes(b"")
    with pytest.raises(DataError, match="red apple"):
        run(load_config(config_file), tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_novel_classes_and_a_held_out_domain_are_evaluated(config_file: Path, pictures: Path, tmp_path: Path) -> None:
    domains = tmp_path / "domains"
    for domain in ("day", "night", "fog"):
        shutil.copytree(pictures, domains / domain)
    overrides = [
        f"data.source=imagefolder:{domains}",
        "data.novel_classes=1",
        "data.held_out_domain=fog",
        "partition.scheme=domain",
        "data.train_per_class=3",
    ]
    summary = run(load_config(config_file, overrides), tmp_path / "run")
    assert summary.accuracy.novel == 1.0  # one novel class has no rival
    assert 0 <= summary.accuracy.domain <= 1
    assert [client.domains for client in summary.per_client] == [("day",), ("night",)]


def test_compare_shares_features_and_aggregates(config_file: Path, tmp_path: Path) -> None:
    rows = compare(grid(load_config(config_file), ["zero-shot", "promptfl", "dp-fpl"]), 2, tmp_path / "all")
    assert [(row.algorithm, row.seeds) for row in rows] == [("zero-shot", 2), ("promptfl", 2), ("dp-fpl", 2)]
    summaries = json.loads((tmp_path / "all" / "comparison.json").read_text())["runs"]
    assert sum(summary["images"]["encoded"] for summary in summaries) == 32
    two = [summary["accuracy"]["local"] for summary in summaries if summary["algorithm"] == "dp-fpl"]
    mean, spread = rows[2].accuracy["local"] or (0, 0)
    assert mean == pytest.approx(sum(two) / 2)
    assert spread == pytest.approx(abs(two[0] - two[1]) / 2**0.5)
    header, *lines = (tmp_path / "all" / "comparison.csv").read_text().splitlines()
    assert header.startswith("algorithm,variation,seeds,local_mean,local_spread")
    assert len(lines) == 3
    alone = run(load_config(config_file), tmp_path / "alone")
    assert alone.as_dict()["accuracy"] == next(s for s in summaries if s["algorithm"] == "dp-fpl")["accuracy"]


def test_compare_varies_settings_and_skips_what_a_method_ignores(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file, ["rounds=1"])
    variants = grid(config, ["zero-shot", "promptfl", "dp-fpl"], {"settings.dp-fpl.rank": [1, 2], "rounds": [1, 2]})
    assert [(each.config.algorithm, each.variation) for each in variants[:2]] == [
        ("zero-shot", "settings.dp-fpl.rank=1, rounds=1"),
        ("zero-shot", "settings.dp-fpl.rank=1, rounds=2"),
    ]
    assert [each.config.algorithm for each in variants].count("dp-fpl") == 4
    rows = compare(variants[-2:], 1, tmp_path / "all")
    assert [row.variation for row in rows] == ["settings.dp-fpl.rank=2, rounds=1", "settings.dp-fpl.rank=2, rounds=2"]
    assert (tmp_path / "all" / "dp-fpl" / "settings.dp-fpl.rank=2_rounds=2" / "seed-0" / "summary.json").exists()
    (alone,) = grid(config, ["promptfl"], {"settings.dp-fpl.rank": [1, 2]})
    assert alone.variation == ""
    with pytest.raises(ConfigError, match="settings.dp-fpl.rank = 9"):
        grid(config, ["dp-fpl"], {"settings.dp-fpl.rank": [1, 9]})


def test_compare_checks_every_algorithm_before_it_trains(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    with pytest.raises(ConfigError, match="promptlf"):
        compare(grid(config, ["zero-shot", "promptlf"]), 1, tmp_path / "all")
    bad = Experiment.model_validate(config.model_dump() | {"settings": {"context_length": 4, "dplora": {"rank": 9}}})
    with pytest.raises(ConfigError, match="rank = 9"):
        compare(grid(bad, ["zero-shot", "dplora"]), 1, tmp_path / "all")
    assert not (tmp_path / "all").exists()


@pytest.mark.slow
def test_the_bundled_encoder_on_real_pictures(real_data: Callable[[str], Path], tmp_path: Path) -> None:
    """The example on a part of PACS: zero-shot is far above chance, and learning gets above it on held-out pictures."""
    overrides = [
        f"data.source=imagefolder:{real_data('pacs')}",
        "data.train_per_class=6",
        "data.test_per_class=6",
        "rounds=20",
        "device=cpu",
    ]
    config = load_config(Path(__file__).parents[2] / "examples" / "pacs.toml", overrides)
    rows = compare(grid(config, ["zero-shot", "dp-fpl", "local"]), 1, tmp_path / "out")
    accuracy = {row.algorithm: {split: (row.accuracy[split] or (0, 0))[0] for split in row.accuracy} for row in rows}
    assert accuracy["zero-shot"]["local"] > 0.35  # chance is 1/7
    assert accuracy["dp-fpl"]["local"] > accuracy["zero-shot"]["local"] + 0.1
    assert accuracy["dp-fpl"]["neighbor"] > accuracy["local"]["neighbor"]
