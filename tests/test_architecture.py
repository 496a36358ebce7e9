"""Imports point down, in no circle, and the command line starts without heavy ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sordino"

# The rooms from the ground up. A module imports from its own room and from rooms before it, and from no others.
FLOORS = (
    *("errors", "progress", "randomness", "memory", "files", "results", "pictures", "secure"),
    *("encoders", "prompts", "tasks", "privacy", "mpc", "algorithms", "runtime", "prompt_file"),
    *("report", "experiments", "sites", "flare", "flower", "private_tuning", "audit", "serving", "cli", "__main__"),
)

# What a room must not know of, not even through what it imports, though it is above it.
MASKED = {
    "encoders": {"algorithms", "tasks", "privacy"},
    "tasks": {"algorithms", "encoders", "privacy"},
    "prompts": {"algorithms", "tasks"},
    "privacy": {"algorithms", "tasks", "mpc"},
    "secure": {"algorithms", "encoders", "prompts", "tasks"},
    "mpc": {"algorithms", "tasks", "runtime", "experiments"},
    "algorithms": {"tasks", "runtime", "mpc"},
    "runtime": {"tasks", "mpc", "report"},
    "report": {"algorithms", "encoders", "tasks", "runtime"},
    "results": {"algorithms", "encoders", "privacy", "secure", "pictures"},
    "experiments": {"audit", "mpc", "private_tuning"},
    "sites": {"audit", "mpc", "private_tuning"},
    "flare": {"audit", "mpc", "private_tuning"},
    "flower": {"audit", "flare", "mpc", "private_tuning"},
    "private_tuning": {"audit", "flare", "flower"},
    "audit": {"flare", "flower"},
    "serving": {"flare", "flower", "private_tuning"},
}

# Functions may import these of our own: they bring heavy packages of other people, and not every user needs them.
LATE = {
    "audit": {"audit.run"},
    "encoders": {"encoders.bundled", "encoders.clip", "encoders.generative.encoder"},
    "experiments.doctor": {
        *("encoders", "encoders.bundled", "encoders.cache", "encoders.clip", "encoders.generative.families", "errors")
    },
    "mpc.parties.transport": {"errors"},
    "tasks.sources": {"tasks.hub"},
}
FACES = ("", "__main__", "cli")  # they import nearly everything late, so that `--help` is quick

MOST_MODULES, MOST_LINES, MOST_AT_ROOT = 20, 400, 8


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, without the package's name; a package is named as its folder."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def imports(module: str, late: bool = False) -> frozenset[str]:
    """The package's modules that one imports: when it is imported itself, or late, inside functions."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(node) for function in functions for node in ast.walk(function)}
    nodes = [node for node in ast.walk(tree) if (id(node) in inside) == late]
    return frozenset(name for node in nodes for name in named(node) if name != module)


def named(node: ast.AST) -> Iterator[str]:
    """The package's modules that an import names."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
    for name in names:
        if not name.startswith("sordino."):
            continue
        name = name.removeprefix("sordino.")
        while name not in modules():
            name = name.rpartition(".")[0]
        if name:
            yield name


def room(module: str) -> str:
    return module.split(".")[0]


@cache
def reached(module: str) -> frozenset[str]:
    """All modules that importing one brings along, and those that its functions import late."""
    found, ahead = set[str](), {module}
    while ahead:
        name = ahead.pop()
        found.add(name)
        ahead |= (imports(name) | imports(name, late=True)) - found
    return frozenset(found - {module})


@pytest.mark.parametrize("module", [name for name in modules() if name])
def test_imports_point_down(module: str) -> None:
    assert room(module) in FLOORS, f"{module} is in a room without a floor"
    own = FLOORS.index(room(module))
    upwards = {name for name in imports(module) | imports(module, late=True) if FLOORS.index(room(name)) > own}
    assert not upwards, f"{module} imports {sorted(upwards)}"
    masked = {name for name in reached(module) if room(name) in MASKED.get(room(module), set())}
    assert not masked, f"{module} knows of {sorted(masked)} through what it imports"


@pytest.mark.parametrize("module", [name for name in modules() if room(name) not in FACES])
def test_no_arrow_is_hidden_in_a_function(module: str) -> None:
    hidden = imports(module, late=True) - LATE.get(module, set())
    assert not hidden, f"{module} imports {sorted(hidden)} inside a function"


def test_no_circle_of_files() -> None:
    above = {name: imports(name) | imports(name, late=True) for name in modules() if name}
    while above:
        lowest = {name for name, below in above.items() if not below & above.keys()}
        assert lowest, f"a circle among {sorted(above)}"
        above = {name: below for name, below in above.items() if name not in lowest}


def test_the_house_is_small_enough() -> None:
    files = modules().values()
    by_method = {SOURCE / "algorithms", SOURCE / "algorithms" / "settings"}  # a file for each
    folders = {file.parent for file in files} - {SOURCE, *by_method}
    crowded = {folder.name for folder in folders if len(list(folder.glob("*.py"))) > MOST_MODULES}
    assert not crowded
    assert len(list(SOURCE.glob("*.py"))) <= MOST_AT_ROOT
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in modules().items()}
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}


def test_the_rooms_of_mpc_are_a_strict_order() -> None:
    order = ("mpc.errors", "mpc.arithmetic", "mpc.dealing", "mpc.protocols", "mpc.tower", "mpc.parties")
    parts = [name for name in modules() if name.startswith("mpc.")]
    assert {".".join(name.split(".")[:2]) for name in parts} == {*order}, "a room of mpc without a place in the order"
    for name in parts:
        place = order.index(".".join(name.split(".")[:2]))
        for below in imports(name) | imports(name, late=True):
            # The public names of mpc come from every room but the last, so none of its rooms may take them from there.
            assert below != "mpc", f"{name} imports all of mpc"
            if below.startswith("mpc."):
                assert order.index(".".join(below.split(".")[:2])) <= place, f"{name} imports {below}"


def test_private_tuning_knows_no_federation() -> None:
    masked = {"algorithms", "report", "runtime"}
    for name in modules():
        if room(name) == "private_tuning":
            upwards = {below for below in imports(name) | imports(name, late=True) if room(below) in masked}
            assert not upwards, f"{name} imports {sorted(upwards)}"


def test_the_runtime_knows_no_method_by_name() -> None:
    for name in modules():
        if room(name) == "runtime":
            methods = {below for below in imports(name) if room(below) == "algorithms"}
            assert methods <= {"algorithms.base"}, f"{name} imports {methods}"


def test_one_module_asks_the_operating_system_for_randomness() -> None:
    """And nobody draws from a generator that has no seed."""
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call | ast.Attribute):
                continue
            text = ast.unparse(node)
            system = text in ("os.urandom", "os.getrandom") or text.startswith(("secrets.", "random."))
            assert not system or name == "randomness", f"{name}: {text}"
            assert text not in ("np.random.default_rng()", "torch.seed()"), f"{name}: {text}"
            assert not text.startswith(("np.random.seed", "np.random.rand", "torch.manual_seed")), f"{name}: {text}"


def test_reading_a_summary_needs_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "numpy", "datasets")
    code = f"import sordino.results, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_starts_light() -> None:
    heavy = ("torch", "transformers", "numpy", "pydantic", "datasets")
    code = f"import sordino.cli.app, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
