"""From a run directory to what attacks found, and into its report."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sordino.audit.findings.words import as_text
from sordino.audit.run import audit, membership_auc
from sordino.cli.app import app, invoke
from sordino.errors import ConfigError, RunError
from sordino.experiments.compare import compare
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.features import EncodedDataset
from sordino.experiments.run import run
from sordino.experiments.variants import grid
from sordino.progress import silent

DP = ["privacy.mechanism=cotangent", "privacy.epsilon=4.0", "privacy.delta=0.01", "privacy.subspace=4", "rounds=3"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--shadows", "16"], "--shadows = 16: goes with the attack 'membership', which is not among --attacks"),
        (["--canaries", "64"], "--canaries = 64: goes with the attack 'canaries', which is not among --attacks"),
        (["--queries", "100"], "--queries = 100: goes with the attack 'extraction', which is not among --attacks"),
        (["--jobs", "2"], "--jobs = 2: goes with the attack 'membership', which is not among --attacks"),
    ],
)
def test_an_option_that_no_chosen_attack_reads_is_refused(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the run is opened: this one has nothing."""
    assert invoke(["audit", str(tmp_path), "--attacks", "release,label-only", *options]) == 2
    assert said in capsys.readouterr().err


def test_a_run_whose_checkpoint_moved_is_audited_where_it_is_now(
    config_file: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, now, folder = tmp_path / "before", tmp_path / "now", tmp_path / "run"
    shutil.copytree(clip_folder, before)
    run(load_config(config_file, ["rounds=1", f"encoder.checkpoint={before}"]), folder)
    before.rename(now)
    command = ["audit", str(folder), "--attacks", "inversion"]
    assert invoke(command) == 2
    said = capsys.readouterr().err
    assert f"encoder.checkpoint = '{before}': there is no such folder now; put it back there or link it" in said
    assert "--encoder" in said
    assert invoke([*command, "--encoder", str(now), "--json"]) == 0
    moved = json.loads(capsys.readouterr().out)
    before.symlink_to(now)
    assert invoke([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == moved


@pytest.mark.slow
def test_an_encoder_without_a_checkpoint_is_nowhere_else(config_file: Path, tmp_path: Path) -> None:
    digits = ["rounds=1", "data.source=digits", "data.train_per_class=2"]
    tables = load_config(config_file, digits).model_dump(exclude_none=True) | {"encoder": {"name": "bundled"}}
    run(Experiment.of(**tables), tmp_path / "run")
    with pytest.raises(ConfigError, match="^--encoder = 'elsewhere': the run's encoder is 'bundled', which has none"):
        audit(tmp_path / "run", ["inversion"], encoder="elsewhere")


@pytest.mark.slow
def test_a_simulated_claim_is_called_simulated(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, [*DP, "privacy.simulation=true"]), tmp_path / "run")
    found = audit(tmp_path / "run", ["membership"], shadows=4)
    assert found["claimed"]["simulated"]
    assert as_text(found).splitlines()[0].endswith("(simulated, not private)")
    assert "simulated 4" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_an_audit_of_a_run_stands_beside_its_claim(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(load_config(config_file, DP), folder)
    arguments = ["audit", str(folder), "--shadows", "4", "--canaries", "16", "--queries", "20"]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found == json.loads((folder / "audit.json").read_bytes())
    assert set(found["attacks"]) == {
        "membership",
        "release",
        "rounds",
        "canaries",
        "inversion",
        "stealing",
        "distances",
        "extraction",
        "label-only",
    }
    assert found["claimed"]["epsilon"] == pytest.approx(4.0, abs=0.05)
    canaries = found["attacks"]["canaries"]
    assert canaries["epsilon"] <= canaries["claimed_epsilon"]
    assert not canaries["refuted"]
    page = (folder / "report.html").read_text()
    assert '<h2 id="audit">Attacked</h2>' in page
    assert 'data-figure="roc"' in page
    for attack in ("LiRA", "RMIA", "RMIA, offline", "shadow models", "uploads over rounds", "answers, best class"):
        assert f"<td>{attack}</td>" in page
    assert re.search(r"\d+\.\d <small>\(20 questions; own \d+\.\d, hand-written", page)
    text = as_text(found)
    assert "Claimed: epsilon = 4" in text
    assert re.search(r"membership: LiRA, 4 shadows: AUC 0\.\d+", text)
    assert re.search(r"membership: RMIA, 4 shadows: AUC 0\.\d+", text)
    assert re.search(r"rounds: uploads of 3 rounds: AUC [01]\.\d+", text)
    assert "canaries: epsilon is at least" in text
    assert "extraction: a copy from 20 answers (top 5, two decimals): agreement" in text
    assert re.search(r"label-only: best classes of nine variants: AUC [01]\.\d+", text)


def test_attacks_made_before_are_kept(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(load_config(config_file, ["algorithm=promptfl", "rounds=2"]), folder)
    first = audit(folder, ["membership"], shadows=4, seed=5)
    second = audit(folder, ["stealing"], seed=6)
    assert second["seeds"] == {"membership": 5, "stealing": 6}  # each its own
    assert second["attacks"]["membership"] == first["attacks"]["membership"]
    assert second["attacks"]["stealing"]["reason"]  # PromptFL keeps nothing personal that could be stolen
    assert second["claimed"] == {"epsilon": None, "delta": None, "unit": None, "simulated": False}


def test_an_audit_without_the_attack_of_a_comparison_is_added_to(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = load_config(config_file, ["algorithm=promptfl", "rounds=1"])
    run(config, folder)
    audit(folder, ["stealing"])
    found = membership_auc(folder, 4, True, silent, EncodedDataset.open(config))
    attacks = json.loads((folder / "audit.json").read_bytes())["attacks"]
    assert found == attacks["membership"]["lira"]["auc"]
    assert "stealing" in attacks


def test_a_comparison_reads_an_audit_of_its_own_shadows_and_seed_alone(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = load_config(config_file, ["algorithm=promptfl", "rounds=1"])
    run(config, folder)
    dataset = EncodedDataset.open(config)

    def made(shadows: int) -> tuple[float, int, int]:
        auc = membership_auc(folder, shadows, True, silent, dataset)
        found = json.loads((folder / "audit.json").read_bytes())
        assert auc == found["attacks"]["membership"]["lira"]["auc"]
        return auc, found["attacks"]["membership"]["shadows"], found["seeds"]["membership"]

    audit(folder, ["membership"], shadows=4, seed=5)
    assert made(4)[1:] == (4, 1)
    assert made(6)[1:] == (6, 1)
    kept = json.loads((folder / "audit.json").read_bytes())
    kept["attacks"]["membership"]["lira"]["auc"] = 0.125
    (folder / "audit.json").write_text(json.dumps(kept))
    assert made(6) == (0.125, 6, 1)


def test_a_claim_that_is_false_is_called_so(config_file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(load_config(config_file, DP), folder)
    found = audit(folder, ["canaries"], canaries=8)
    found["attacks"]["canaries"] |= {"epsilon": 5.0, "refuted": True}
    (folder / "audit.json").write_text(json.dumps(found))
    CliRunner().invoke(app, ["report", str(folder)])
    assert "which refutes the claim" in (folder / "report.html").read_text()
    assert "THE CLAIM IS FALSE" in as_text(found)
    found = audit(folder, ["rounds"])
    del found["attacks"]["canaries"]
    assert "THE CLAIM IS FALSE" not in as_text(found)
    found["attacks"]["rounds"]["attack"] |= {"epsilon": 5.0, "refuted": True}
    (folder / "audit.json").write_text(json.dumps(found))
    CliRunner().invoke(app, ["report", str(folder)])
    assert "5, which refutes the claim" in (folder / "report.html").read_text()
    assert "THE CLAIM IS FALSE" in as_text(found)


def test_what_cannot_be_attacked_is_told(config_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no finished run \(there is no"):
        audit(tmp_path / "nothing")
    compare(grid(load_config(config_file, ["rounds=1"]), ["zero-shot"]), 1, tmp_path / "compared")
    one = re.escape(str(tmp_path / "compared" / "zero-shot" / "seed-0"))
    with pytest.raises(RunError, match=f"holds a comparison; give one of its runs, such as {one}$"):
        audit(tmp_path / "compared")
    run(load_config(config_file, ["algorithm=zero-shot"]), tmp_path / "zero")
    with pytest.raises(RunError, match="learned nothing"):
        audit(tmp_path / "zero")
    keys = ["algorithm=promptfl", "privacy.mechanism=dp-fedavg", "privacy.noise_multiplier=1.0", "rounds=2"]
    run(load_config(config_file, [*keys, "runtime.weighting=uniform"]), tmp_path / "client")
    with pytest.raises(ConfigError, match="--attacks = '': name one at least; choose from membership"):
        audit(tmp_path / "client", [])
    with pytest.raises(ConfigError, match="'guessing': not an attack; choose from membership"):
        audit(tmp_path / "client", ["guessing"])
    with pytest.raises(ConfigError, match="example"):
        audit(tmp_path / "client", ["canaries"])
    found = audit(tmp_path / "client", shadows=4, queries=20)
    assert "example" in found["attacks"]["canaries"]["reason"]
    assert "lira" in found["attacks"]["membership"]
    run(load_config(config_file, ["algorithm=local", "rounds=2"]), tmp_path / "local")
    with pytest.raises(ConfigError, match="no upload leaves a client"):
        audit(tmp_path / "local", ["rounds"])


def test_a_run_that_ended_at_its_budget_is_imitated_as_it_was(config_file: Path, tmp_path: Path) -> None:
    keys = ["privacy.mechanism=cotangent", "privacy.noise_multiplier=1.0", "privacy.epsilon=1.5", "privacy.delta=0.01"]
    summary = run(load_config(config_file, keys), tmp_path / "run")
    assert 0 < summary.rounds < 6
    found = audit(tmp_path / "run", ["canaries"], canaries=8)
    assert found["attacks"]["canaries"]["claimed_epsilon"] > 0


@pytest.mark.slow
def test_a_comparison_attacks_and_draws_accuracy_over_epsilon(config_file: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    config = load_config(config_file, DP)
    variants = grid(config, ["dp-fpl"], {"privacy.epsilon": [8.0, float("inf")]})
    rows = compare([replace(variants[0], shadows=4), variants[1]], 1, tmp_path / "all", attack=membership_auc)
    assert [row.attack is None for row in rows] == [False, True]
    assert rows[0].epsilon == pytest.approx(8.0, abs=0.05)
    assert (rows[1].private, rows[1].epsilon) == (False, None)
    page = (tmp_path / "all" / "report.html").read_text()
    assert 'data-figure="epsilon-local"' in page
    assert "Accuracy over epsilon" in page
    first, second = csv.DictReader((tmp_path / "all" / "comparison.csv").read_text().splitlines())
    assert 0 <= float(first["membership_auc"]) <= 1
    assert (first["private"], second["private"], second["membership_auc"]) == ("True", "False", "")
