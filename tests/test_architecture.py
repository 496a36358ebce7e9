"""Imports point down, and the command line starts without heavy ones."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "sordino"

# What each room must not know of; a room that is absent here may import any other.
TOP = {"runtime", "report", "serving", "audit", "experiments", "cli"}
HIDDEN = {
    "pictures": TOP | {"algorithms", "encoders", "prompts", "privacy", "secure", "mpc", "tasks"},
    "encoders": TOP | {"algorithms", "tasks"},
    "tasks": TOP | {"algorithms", "encoders"},
    "prompts": TOP | {"algorithms", "tasks"},
    "privacy": TOP | {"algorithms", "tasks"},
    "secure": TOP | {"algorithms", "encoders", "prompts", "tasks"},
    "mpc": TOP | {"algorithms", "tasks"},
    "algorithms": TOP | {"tasks"},
    "runtime": TOP - {"runtime"},
    "report": TOP - {"report"} | {"algorithms", "encoders", "tasks"},
    "audit": {"serving", "cli"},
    "experiments": {"serving", "cli", "audit"},
    "results": TOP | {"algorithms", "encoders", "mpc", "prompts", "privacy", "secure", "tasks", "pictures"},
}


def imported(path: Path) -> set[str]:
    """The sordino modules that a file imports, without the package's name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("sordino.") for name in found if name.startswith("sordino.")}


@pytest.mark.parametrize("room", HIDDEN)
def test_imports_point_down(room: str) -> None:
    files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").exists() else sorted((SOURCE / room).rglob("*.py"))
    assert files
    for file in files:
        upwards = {name for name in imported(file) if name.split(".")[0] in HIDDEN[room]}
        assert not upwards, f"{file.relative_to(SOURCE)} imports {sorted(upwards)}"


def test_the_rooms_of_mpc_are_a_strict_order() -> None:
    order = ("errors", "arithmetic", "dealing", "protocols", "tower", "parties")
    parts = (SOURCE / "mpc").iterdir()
    rooms = {path.stem for path in parts if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms == {*order, "__init__"}, "a room of mpc without a place in the order"
    for place, room in enumerate(order):
        later = {f"mpc.{name}" for name in order[place + 1 :]} | {"private_tuning"}
        files = sorted((SOURCE / "mpc" / room).rglob("*.py")) or [SOURCE / "mpc" / f"{room}.py"]
        for file in files:
            names = imported(file)
            upwards = {name for name in names if any(f"{name}.".startswith(f"{above}.") for above in later)}
            assert not upwards, f"{file.relative_to(SOURCE)} imports {sorted(upwards)}"
            # The public names of mpc come from every room but the last, so none of its rooms may take them from there.
            assert "mpc" not in names, f"{file.relative_to(SOURCE)} imports all of mpc"


def test_private_tuning_knows_no_federation() -> None:
    masked = {"algorithms", "audit", "cli", "report", "runtime", "serving"}
    files = sorted((SOURCE / "private_tuning").rglob("*.py"))
    assert files
    for file in files:
        upwards = {name for name in imported(file) if name.split(".")[0] in masked}
        assert not upwards, f"{file.relative_to(SOURCE)} imports {sorted(upwards)}"


def test_the_runtime_knows_no_method_by_name() -> None:
    allowed = {"algorithms", "algorithms.base"}
    for file in (SOURCE / "runtime").rglob("*.py"):
        methods = {
            name for name in imported(file) if name.startswith("algorithms.") and not name.startswith("algorithms.base")
        }
        assert not methods - allowed, f"{file.name} imports {methods}"


def test_the_report_has_no_circle_of_files_and_no_arrow_hidden_in_a_function() -> None:
    above: dict[str, set[str]] = {}
    for file in (SOURCE / "report").glob("*.py"):
        name = f"report.{file.stem}"
        above[name] = {module for module in imported(file) if module.startswith("report.")}
        hidden = {
            node.module
            for function in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(function, ast.FunctionDef)
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sordino")
        }
        assert not hidden, f"{name} imports {sorted(map(str, hidden))} inside a function"
    while above:
        lowest = {name for name, modules in above.items() if not modules & above.keys()}
        assert lowest, f"a circle among {sorted(above)}"
        above = {name: modules for name, modules in above.items() if name not in lowest}


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
