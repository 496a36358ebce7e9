"""Each key of `[runtime]` and `[privacy]` changes a run, or a run warns that it does nothing, or it is refused."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_class
from sordino.encoders.clip import ClipEncoder
from sordino.errors import ConfigError
from sordino.experiments.compare import compare, grid
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.run import run
from sordino.experiments.unread_keys import PRIVACY, RUNTIME, Uses, unread_keys, unread_notes
from sordino.experiments.variants import fairness_notes
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.sites.fleet_config import load_fleet_config

CLASS_NAMES = ["cat", "dog", "sunflower", "grand piano"]
EXAMPLES = Path(__file__).parents[2] / "examples"
# Clients hold different classes and different numbers of images, so that weights and doubts about classes matter, and
# two persons or one, with several images each.
ROWS = [[0, 4, 8, 12, 1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [16, 17, 18, 19]]
PERSONS = [next((2 * client + row // 4 % 2 for client, rows in enumerate(ROWS) if row in rows), 9) for row in range(40)]
SIMULATED = {"simulation": True, "nonce": "a5" * 16}
BASE = {"statistics": 3.0, "dp-sgd": 1.0, "cotangent": 1.0, "dp-fedavg": 1.0}  # mechanisms and their noise
BASES: list[dict[str, Any]] = [
    {},
    {"mechanism": "none"},
    *({"mechanism": name, "noise_multiplier": noise, "delta": 0.01} for name, noise in BASE.items()),
    *({"mechanism": name, "noise_multiplier": 1.0, "delta": 0.01, "noise_by": "server"} for name in BASE),
    *({"mechanism": name, "noise_multiplier": 1.0, "delta": 0.01, "noise_by": "shares"} for name in BASE),
    *({"mechanism": name, "noise_multiplier": 1.0, "delta": 0.01, "unit": "person"} for name in BASE),
    {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "delta": 0.01, "clip_quantile": 0.5},
    {"mechanism": "dp-fedavg", "noise_multiplier": 1.0, "delta": 0.01, "noise_by": "server", "compress": True},
    {"mechanism": "statistics", "noise_multiplier": 1.0, "delta": 0.01, "subspace": 8},
]
WITH_ALL = ("dp-fpl",)  # methods that are run with each of these; others with a mechanism each
METHODS = ("dp-fpl", "promptfl", "local", "fed-bbpt", "class-prior", "tofa")
VALUES: dict[str, Any] = {
    **{"unit": "person", "person_images": 1, "epsilon": 0.5, "delta": 0.02, "noise_multiplier": 2.0, "clip": 20.0},
    **{"personal_clip": 0.02, "shared_budget": 0.3, "subspace": 4, "count_share": 0.3, "center_share": 0.3},
    **{
        "scatter_share": 0.3,
        "sampling_rate": 0.5,
        "held_error": (1e-9, 0.999),
        "directions": "images",
        "clip_quantile": 0.4,
    },
    **{"clip_learning_rate": 2.0, "compress": True, "colluders": 2, "dropouts": 1, "nonce": "5a" * 16},
    **{"noise_by": "server", "simulation": False},
}
ELSEWHERE = {"mechanism", "release"}  # the one is in every base; tests/experiments/test_release_runs.py is of the other


def test_the_table_has_all_keys() -> None:
    assert set(RUNTIME) == set(RuntimeSettings.model_fields)
    assert set(PRIVACY) == set(PrivacySettings.model_fields)
    assert set(VALUES) == set(PRIVACY) - ELSEWHERE


@pytest.fixture(scope="module")
def outcome(clip_folder: Path, table: tuple[torch.Tensor, torch.Tensor]) -> Any:
    """All that a short run makes, by method, `[privacy]` and `[runtime]`: its ledger and its tensors."""
    encoder = ClipEncoder.load(str(clip_folder), torch.device("cpu"))
    tokens = encoder.class_tokens(CLASS_NAMES)
    public = torch.nn.functional.normalize(torch.randn(40, encoder.feature_width), dim=-1)

    @cache
    def of(name: str, privacy: tuple[tuple[str, Any], ...], runtime: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
        tables = {"context_length": 2, "batch_size": 3, "local_steps": 1, "rank": 2}
        method, settings = algorithm(name), settings_for(name, tables)
        own = model_class(method).of(settings, encoder, tokens)
        private = PrivacySettings(**dict(privacy))
        federation = LocalRuntime(
            method,
            settings,
            own,
            table[0].float(),
            table[1],
            ROWS,
            2,
            RuntimeSettings(**dict(runtime)),
            3,
            private,
            persons=PERSONS,
            public=public if private.directions == "images" else None,
        )
        vars(federation)["identity"] = "the same"  # else any other key would draw other noise
        paid = not federation.releases_statistics or federation.pays_for_release(federation.start())
        training = federation.begun()
        for _ in range(federation.rounds):
            if not federation.within_budget(training):
                break
            training, _ = federation.round(training)
        ledger, prompts = training.ledger, federation.prompts(training)
        prompts = {"context": prompts} if isinstance(prompts, torch.Tensor) else prompts
        return {
            "tensors": {part: tensor.numpy().tobytes() for part, tensor in prompts.items()},
            "rounds": (training.round, paid),
            "ledger": (ledger.releases, ledger.assumptions, ledger.trusted, ledger.delta, ledger.randomness),
        }

    return lambda name, privacy, runtime: of(name, tuple(privacy.items()), tuple(runtime.items()))


def privacy_cases() -> list[Any]:
    """Pairs of a method and a table, most of which fit together."""
    cases = []
    for name in METHODS:
        for base in BASES if name in WITH_ALL else BASES[:6]:
            more = SIMULATED if base.get("mechanism", "none") != "none" else {}
            cases.append(pytest.param(name, base | more, id=f"{name}-{'-'.join(map(str, base.values()))}"))
    return cases


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base"), privacy_cases())
def test_a_key_of_privacy_changes_a_run_or_is_told_of(name: str, base: dict[str, Any], outcome: Any) -> None:
    runtime = {"weighting": "uniform"}
    try:
        before = outcome(name, base, runtime)
    except ConfigError:  # the mechanism does not fit the method
        return
    for key, values in VALUES.items():
        if key == "simulation" and not base.get(key):
            continue
        changes = False
        for value in values if isinstance(values, tuple) else (values,):
            changed = base | {key: value} | ({"nonce": None} if key == "simulation" else {})
            if key == "directions" and base.get("mechanism") == "statistics":
                changed["subspace"] = 8
            try:
                changes = changes or outcome(name, changed, runtime) != before
            except ConfigError:
                break
        else:
            settings = PrivacySettings(**changed)
            told = unread_keys(Uses(settings, RuntimeSettings(**runtime), algorithm(name).ABOUT))
            if not settings.on:
                assert "mechanism" in settings.model_fields_set, f"{key} does nothing, and nothing is said"
                assert told == {}
            elif base.get(key) != value:
                assert (f"privacy.{key}" in told) != changes, f"{key} changes a run: {changes}; told: {told}"


@pytest.mark.parametrize("aggregation", ["mean", "median", "trimmed-mean", "norm-bound"])
@pytest.mark.parametrize(
    ("key", "value"), [("trim", 0.3), ("norm_bound", 1e-3), ("participation", 0.75), ("weighting", "uniform")]
)
def test_a_key_of_runtime_changes_a_run_or_is_told_of(aggregation: str, key: str, value: Any, outcome: Any) -> None:
    needed = {"trimmed-mean": {"trim": 0.0}, "norm-bound": {"norm_bound": 1e3}}
    base = {"aggregation": aggregation} | needed.get(aggregation, {})
    before, after = (outcome("promptfl", {}, tables) for tables in (base, base | {key: value}))
    runtime = RuntimeSettings(**base | {key: value})
    told = unread_keys(Uses(PrivacySettings(), runtime, algorithm("promptfl").ABOUT))
    counts_alike = key == "weighting" and aggregation in ("median", "trimmed-mean")
    assert (f"runtime.{key}" in told) != (after != before or counts_alike)


MEANT = [
    ("runtime.norm_bound=1e-9", "runtime.norm_bound = 1e-09: needs runtime.aggregation = 'norm-bound'"),
    ("runtime.trim=0.3", "runtime.trim = 0.3: needs runtime.aggregation = 'trimmed-mean'"),
    ("privacy.unit=person", "privacy.unit = 'person': needs privacy.mechanism"),
    ("privacy.unit=client", "privacy.unit = 'client': needs privacy.mechanism"),
    ("privacy.noise_by=shares", "privacy.noise_by = 'shares': needs privacy.mechanism"),
    ("privacy.simulation=true", "privacy.simulation = True: needs privacy.mechanism"),
    ("privacy.delta=0.5", "privacy.delta = 0.5: needs privacy.mechanism"),
    ("privacy.compress=true", "privacy.compress = True: needs privacy.mechanism"),
    ("privacy.subspace=4", "privacy.subspace = 4: needs privacy.mechanism"),
    ("privacy.clip=0.5", "privacy.clip = 0.5: needs privacy.mechanism"),
]


@pytest.mark.parametrize(("override", "message"), MEANT)
@pytest.mark.parametrize("turned_off", [False, True])
def test_a_promise_that_nothing_keeps_is_refused(
    config_file: Path, override: str, message: str, turned_off: bool
) -> None:
    """Also on top of a file that turns it off, as the `config.toml` of a run does."""
    if turned_off:
        text = config_file.read_text().replace("[runtime]", '[runtime]\naggregation = "mean"')
        config_file.write_text(f'{text}\n[privacy]\nmechanism = "none"\n')
    for load in (load_config, load_fleet_config):
        with pytest.raises(ConfigError, match=re.escape(message)):
            load(config_file, [override])
    off = [override, "privacy.mechanism=none", "runtime.aggregation=mean"]
    load_config(config_file, off)  # turned off in the same breath, as one value of --vary may do


def told_by(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of keys that do nothing, since the last call."""
    lines = [record.getMessage() for record in caplog.records if "does nothing" in record.getMessage()]
    caplog.clear()
    return lines


IDLE = [
    *("privacy.mechanism=dp-sgd", "privacy.noise_multiplier=1.0", "privacy.subspace=4", "privacy.colluders=2"),
    *("runtime.aggregation=mean", "runtime.norm_bound=0.5", "privacy.simulation=true", "rounds=1"),
]
LINES = [
    "runtime.norm_bound = 0.5: does nothing in this run, as it needs runtime.aggregation = 'norm-bound'; set that, or "
    "leave it out",
    "privacy.subspace = 4: does nothing in this run, as it needs privacy.mechanism = 'cotangent' or 'statistics'; set "
    "that, or leave it out",
    "privacy.colluders = 2: does nothing in this run, as it needs privacy.noise_by = 'shares', or privacy.compress = "
    "true; set that, or leave it out",
]


def test_run_plan_and_compare_warn_once(config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = load_config(config_file, IDLE)
    run(config, tmp_path / "run")
    assert told_by(caplog) == LINES
    plan(config)
    assert told_by(caplog) == LINES
    compare(grid(config, ["dp-fpl", "promptfl"]), 2, tmp_path / "compared")
    assert told_by(caplog) == LINES


def test_a_comparison_whose_lines_read_a_key_says_nothing(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ["privacy.noise_multiplier=1.0", "privacy.personal_clip=0.5", "privacy.subspace=4", "rounds=1"]
    vary = {"privacy.mechanism": ["none", "dp-sgd", "cotangent"], "runtime.aggregation": ["mean", "norm-bound"]}
    config = load_config(config_file, [*keys, "runtime.norm_bound=0.5", *(f"{key}={vary[key][0]}" for key in vary)])
    assert not any("does nothing" in note for note in fairness_notes(grid(config, ["dp-fpl", "zero-shot"], vary)))
    compare(grid(config, ["dp-fpl"], vary), 1, tmp_path / "compared")
    assert told_by(caplog) == []


MECHANISMS = [
    [],
    ["privacy.mechanism=dp-sgd", "privacy.epsilon=8", "privacy.personal_clip=0.5"],
    ["privacy.mechanism=statistics", "privacy.epsilon=8", "privacy.noise_by=server"],
    ["privacy.mechanism=cotangent", "privacy.epsilon=8", "privacy.simulation=true", "privacy.subspace=4"],
    ["privacy.mechanism=dp-fedavg", "privacy.epsilon=8", "privacy.delta=0.1", "runtime.weighting=uniform"],
    ["runtime.aggregation=norm-bound", "runtime.norm_bound=0.5"],
]


@pytest.mark.parametrize("keys", MECHANISMS, ids=lambda keys: keys[0] if keys else "none")
def test_a_written_configuration_runs_again_without_a_word(
    keys: list[str], config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(load_config(config_file, ["rounds=1", *keys]), tmp_path / "run")
    run(load_config(tmp_path / "run" / "config.toml"), tmp_path / "again")
    assert told_by(caplog) == []


def test_one_release_is_used_again_without_a_word(
    config_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its keys are those of the run that made it, whose method may have had more parts."""
    keys = ["privacy.mechanism=statistics", "rounds=1"]
    made = ["privacy.noise_multiplier=1.0", "privacy.noise_by=server", "privacy.shared_budget=0.3"]
    run(load_config(config_file, [*keys, *made]), tmp_path / "one")
    again = load_config(config_file, [*keys, "algorithm=promptfl", f"privacy.release={tmp_path / 'one'}"])
    run(again, tmp_path / "two")
    assert told_by(caplog) == []


EXAMPLE_FILES = [path for path in sorted(EXAMPLES.glob("*.toml")) if not path.name.startswith("private_")]


@pytest.mark.parametrize("example", EXAMPLE_FILES, ids=lambda path: path.name)
def test_no_example_has_a_key_that_does_nothing(example: Path) -> None:
    config = load_config(example)
    vary = {"runtime.aggregation": ["mean", "trimmed-mean", "norm-bound"]} if config.poisoning else {}
    assert unread_notes([variant.config for variant in grid(config, [config.algorithm], vary)]) == []
