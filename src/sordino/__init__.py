"""Sordino: federated prompt learning for frozen vision-language models, private and honest about it.

    import sordino

    config = sordino.Experiment.of(
        algorithm="dp-fpl",
        data={"source": "imagefolder:photos"},
        partition={"scheme": "iid", "clients": 4},
        privacy={"mechanism": "cotangent", "epsilon": 8.0},
    )
    summary = sordino.run(config, "runs/photos")
    saved = sordino.load_prompt("runs/photos/prompts/client-0000.safetensors")
    print(saved.model().classify("new.png")[0].best)

Importing this imports nothing heavy: torch comes with the first call. `docs/python.md` has the whole tour.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sordino.errors import (
    ConfigError,
    DataError,
    EncoderError,
    PromptError,
    RunError,
    SordinoError,
    SordinoWarning,
)

if TYPE_CHECKING:
    from sordino.audit.run import audit
    from sordino.encoders.classifier import Classifier, Prediction
    from sordino.experiments.comparison import Comparison
    from sordino.experiments.config import Experiment
    from sordino.experiments.privacy.plan import Plan
    from sordino.progress import Progress
    from sordino.prompt_file import SavedPrompt
    from sordino.results import Summary

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "Comparison",
    "ConfigError",
    "DataError",
    "EncoderError",
    "Experiment",
    "Plan",
    "Prediction",
    "PromptError",
    "RunError",
    "SavedPrompt",
    "SordinoError",
    "SordinoWarning",
    "__version__",
    "add_method",
    "audit",
    "compare",
    "load_config",
    "load_prompt",
    "privacy_plan",
    "run",
]

# What a user may have chosen already, by OpenMP's own variable or by those of its two runtimes.
WAITING_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def _wait_asleep() -> None:
    """Let threads of matrix kernels sleep while they wait for each other, unless the user chose otherwise.

    OpenMP's threads spin by default after a parallel part. Beside any other work, a spinning thread takes the core that
    the others wait for, so that a computation on two cores may become ten times slower. The runtime reads the policy
    once, when it is loaded, which importing torch does; so this must come first. Processes that are started from here
    inherit it.
    """
    if not any(name in os.environ for name in WAITING_CHOICES):
        os.environ["OMP_WAIT_POLICY"] = "passive"


_wait_asleep()

# Names that are imported when they are first asked for. `audit` is a package that can be called.
_LAZY = {
    "Classifier": "sordino.encoders.classifier",
    "Comparison": "sordino.experiments.comparison",
    "Experiment": "sordino.experiments.config",
    "Plan": "sordino.experiments.privacy.plan",
    "Prediction": "sordino.encoders.classifier",
    "SavedPrompt": "sordino.prompt_file",
    "audit": "sordino.audit",
}


if not TYPE_CHECKING:  # or type checkers would take any name for one of the module's

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'sordino' has no attribute {name!r}")
        module = importlib.import_module(_LAZY[name])
        return module if name == "audit" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__


def load_config(path: Path | str, overrides: Sequence[str] | Mapping[str, Any] = ()) -> Experiment:
    """Read a configuration from a TOML file.

    Args:
        path: of the file.
        overrides: dotted keys to values, such as `{"privacy.epsilon": 8.0}`, or `key=value` texts as on the command
            line.

    Raises:
        ConfigError: the file is missing or malformed, or a key or value is not allowed.
    """
    from sordino.experiments.config import load_config

    return load_config(path, overrides)


def run(config: Experiment, out: Path | str, *, resume: bool = False, progress: Progress | None = None) -> Summary:
    """Train a method, evaluate it, and write a run directory.

    Args:
        config: from `load_config` or `Experiment.of`.
        out: the run directory, which must not exist.
        resume: go on in `out` where it was interrupted. A finished run is not repeated; its summary is returned.
        progress: is called with (stage, done, total) and perhaps a note.

    Returns:
        The summary, which `summary.json` in the run directory holds.

    Raises:
        SordinoError: before anything is trained where input is bad; later where the disk is full or training diverges.
    """
    _require_experiment(config)
    from sordino.experiments.run import run
    from sordino.progress import silent

    return run(config, Path(out), resume, progress or silent)


def compare(
    config: Experiment,
    algorithms: Sequence[str],
    out: Path | str,
    *,
    seeds: int = 3,
    vary: Mapping[str, Sequence[Any]] | None = None,
    equal_steps: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    jobs: int = 1,
) -> Comparison:
    """Run several methods, with several seeds and settings, on the same pictures, which are encoded once.

    Args:
        config: what all runs have in common.
        algorithms: names of methods.
        out: the directory of the comparison, which must not exist; each run has one of its own below it.
        seeds: how many, counted from the configuration's.
        vary: dotted keys to the values that each method is run with, such as `{"privacy.epsilon": [8.0, 2.0]}`.
        equal_steps: change `local_steps` so that all take as many gradient steps as the first one that takes any.
        resume: go on in `out` where it was interrupted.
        progress: is called with (stage, done, total) and perhaps a note.
        jobs: runs at once, each with its share of the cores; their seconds are those beside each other.

    Returns:
        The rows of the table; `frame()` makes a pandas frame of them.

    Raises:
        SordinoError: as `run`; before anything is trained where a method or its settings are bad.
    """
    from sordino.experiments.compare import compare
    from sordino.experiments.comparison import Comparison
    from sordino.experiments.variants import grid
    from sordino.progress import silent

    _require_experiment(config)
    if isinstance(algorithms, str):
        raise ConfigError("algorithms", algorithms, f"must be a list of names, such as [{algorithms!r}]")
    if not algorithms:
        raise ConfigError("algorithms", algorithms, "at least one is needed")
    for key, number in (("seeds", seeds), ("jobs", jobs)):
        if not isinstance(number, Integral):
            raise ConfigError(key, number, "must be how many; seeds are counted from the configuration's")
        if number < 1:
            raise ConfigError(key, number, "at least one is needed")
    folder = Path(out)
    variants = grid(config, algorithms, vary, equal_steps)
    title = f"Sordino: {folder.name}"
    return Comparison(compare(variants, seeds, folder, resume, progress or silent, title, jobs=jobs))


def privacy_plan(config: Experiment) -> Plan:
    """Tell what a run will cost in privacy: who will learn what, who adds the noise, and epsilon by round.

    Nothing is trained. `print` shows the plan as text; `as_dict()` is what `sordino privacy plan --json` prints.

    Raises:
        SordinoError: the configuration cannot be run.
    """
    _require_experiment(config)
    from sordino.experiments.privacy.plan import plan

    return plan(config)


def _require_experiment(config: Experiment) -> None:
    """Check that a configuration is one.

    Raises:
        ConfigError: it is a path or a table, for example.
    """
    from sordino.experiments.config import Experiment

    if not isinstance(config, Experiment):
        raise ConfigError("config", config, "must come from sordino.load_config(PATH) or sordino.Experiment.of(...)")


def load_prompt(file: Path | str) -> SavedPrompt:
    """Read a prompt from `prompts/` of a run directory, and check that it is whole.

    `model()` makes a classifier of it.

    Raises:
        PromptError: the file is missing, damaged, or no prompt of Sordino.
    """
    from sordino.prompt_file import SavedPrompt

    return SavedPrompt.load(file)


def add_method(name: str, method: Any) -> None:
    """Give a name to a method that is defined in Python, so that it runs like those of Sordino.

    Args:
        name: in lower case, with hyphens, as in `algorithm = "my-method"`.
        method: a module, an object, a mapping such as `globals()`, or the path of a file, which is executed, with what
            docs/new-method.md asks for.

    Raises:
        ConfigError: the name is taken, or the method lacks something; the message says what.
    """
    from sordino.algorithms import add_method

    add_method(name, method)
