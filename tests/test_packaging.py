"""What is distributed is whole, declares what it imports, and does without the extras that are not installed."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sordino
from sordino.errors import EXTRAS, MissingExtra, require_extra

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sordino"
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: dict[str, Any] = PYPROJECT["project"]

# Names of files of the source distribution, at its top; whatever else lies beside them stays out.
DISTRIBUTED = {
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
    *("requirements-demo.lock", "requirements-deploy.lock", "requirements.lock"),
    *("benchmarks", "deploy", "docs", "examples", "src", "tests"),
    *(".gitignore", "PKG-INFO"),  # hatchling's own additions
}

# Rooms that work without any extra.
PLAIN = {"algorithms", "audit", "cli", "encoders", "privacy", "prompts", "report", "runtime", "secure", "tasks"}

# Every call of Python's sockets for another host ends the process.
NO_NETWORK = """
import os, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        os.write(2, f"{event} {arguments[-1]!r}: there is no network".encode())
        os._exit(97)
sys.addaudithook(refuse)
"""


def distributions(requirements: Iterable[str]) -> set[str]:
    """The normalized names of the distributions in a list of requirements."""
    return {canonicalize_name(Requirement(line).name) for line in requirements} - {"sordino"}


def imported() -> set[str]:
    """The top-level modules that the package imports, its own and the standard library's left out."""
    found: set[str] = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - sys.stdlib_module_names - {"sordino"}


def test_every_import_is_a_declared_dependency() -> None:
    """Not one that is there because another dependency happens to need it."""
    owners = packages_distributions()
    extras = PROJECT["optional-dependencies"]
    declared = distributions(
        [*PROJECT["dependencies"], *(line for name in extras if name != "dev" for line in extras[name])]
    )
    for module in imported():
        assert {canonicalize_name(name) for name in owners[module]} & declared, f"{module} is not declared"


def test_every_extra_names_its_modules() -> None:
    owners = packages_distributions()
    for extra, modules in EXTRAS.items():
        declared = distributions(PROJECT["optional-dependencies"][extra])
        assert {canonicalize_name(name) for module in modules for name in owners[module]} <= declared
        assert not declared & distributions(PROJECT["dependencies"]), f"{extra} holds nothing of its own"


def test_the_extra_all_has_every_extra_and_dev_has_all() -> None:
    extras = dict(PROJECT["optional-dependencies"])
    (whole,) = (Requirement(line) for line in extras.pop("all"))
    assert [each.extras for line in extras.pop("dev") if (each := Requirement(line)).name == "sordino"] == [{"all"}]
    assert (whole.name, whole.extras) == ("sordino", set(extras))


def locked(file: str) -> dict[str, set[str]]:
    """The versions in a lock file with their hashes, by the distribution's name."""
    pins: dict[str, set[str]] = {}
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            pinned = Requirement(requirement)
            pin = " ".join([str(pinned.specifier), *(each.strip() for each in hashes)])
            pins.setdefault(canonicalize_name(pinned.name), set()).add(pin)
    return pins


@pytest.mark.parametrize("file", ["requirements-demo.lock", "requirements-deploy.lock"])
def test_a_part_is_locked_to_what_the_tests_run_with(file: str) -> None:
    """The same versions with the same hashes, so that `make test` adds packages to the demo and changes none."""
    part, whole = locked(file), locked("requirements.lock")
    assert part.keys() < whole.keys()
    assert {name: pins for name, pins in part.items() if pins != whole[name]} == {}


def test_images_have_both_engines_and_what_reads_sites_data_and_no_tools_of_development() -> None:
    images = locked("requirements-deploy.lock").keys()
    optional = PROJECT["optional-dependencies"]
    extras = ("flare", "flower", "heif", "hub", "medical", "tracking")
    wanted = distributions(
        [
            *PROJECT["dependencies"],
            *PYPROJECT["dependency-groups"]["build"],
            *(line for extra in extras for line in optional[extra]),
        ]
    )
    assert wanted <= images
    tools = {canonicalize_name(name) for name in ("mypy", "playwright", "pytest", "ruff", "sphinx", "hypothesis")}
    assert tools <= distributions(optional["dev"])
    assert not tools & images


def test_the_demo_installs_the_package_with_what_serves_its_prompts_and_builds_it() -> None:
    """docs/quickstart.md publishes and serves a prompt of the demo, so of the extras `serve` is there, and no other."""
    demo = locked("requirements-demo.lock").keys()
    optional = dict(PROJECT["optional-dependencies"])
    serve = distributions(optional.pop("serve"))
    needed = distributions([*PROJECT["dependencies"], *PYPROJECT["dependency-groups"]["build"]]) | serve
    assert needed <= demo
    extras = distributions(line for lines in optional.values() for line in lines) - serve
    # Some packages of extras come with what every method needs.
    needs = {canonicalize_name(name) for name in ("httpx", "huggingface-hub", "packaging")}
    assert extras & demo <= needs
    assert extras <= locked("requirements.lock").keys()


@pytest.mark.parametrize(
    ("target", "files"),
    [
        ("demo", ["requirements-demo.lock"]),
        ("test", ["requirements-demo.lock", "requirements.lock"]),
        ("lint", ["requirements-demo.lock", "requirements.lock"]),
    ],
)
def test_make_installs_what_a_target_needs_and_no_more(target: str, files: list[str], tmp_path: Path) -> None:
    """From a clone without a virtual environment."""
    command = ["make", "--dry-run", "--no-print-directory", target, f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.findall(r"--require-hashes -r (\S+)", done.stdout) == files
    assert done.stdout.count("--no-build-isolation -e .") == 1  # which needs the packages that build it


def test_make_hands_arguments_to_the_demo(tmp_path: Path) -> None:
    command = ["make", "--no-print-directory", "--dry-run", "demo", f"VENV={tmp_path}", "ARGS=--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/bin/sordino demo --quick"


def test_a_missing_extra_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("mpc", "this")
    monkeypatch.setitem(sys.modules, "numba", None)
    with pytest.raises(MissingExtra, match=r"^this needs numba, which is not installed: pip install 'sordino\[mpc\]'$"):
        require_extra("mpc", "this")
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(ImportError, match=r"cma and numba, which are not installed"):
        require_extra("mpc", "this")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, the wheel that was built of it, and in `tree` one of the tree itself."""
    folder = tmp_path_factory.mktemp("built")
    build = [sys.executable, "-m", "build", "--no-isolation", str(ROOT), "--outdir"]
    for command in ([*build, str(folder)], [*build, str(folder / "tree"), "--wheel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    files = contents(wheel)
    package = {
        path.relative_to(ROOT / "src")
        for path in SOURCE.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    assert {name for name in files if name.startswith("sordino/")} == {path.as_posix() for path in package}
    assert "sordino/py.typed" in files
    rest = {name for name in files if not name.startswith("sordino/")}
    assert all(name.startswith(f"sordino-{sordino.__version__}.dist-info/") for name in rest)


@pytest.mark.slow
def test_the_source_distribution_builds_the_same_wheel(built: Path) -> None:
    (wheel,), (of_tree,) = built.glob("*.whl"), (built / "tree").glob("*.whl")
    assert contents(wheel) == contents(of_tree)


@pytest.mark.slow
def test_the_source_distribution_holds_the_project_and_nothing_else(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        paths = [Path(member.name) for member in opened if not member.isdir()]
    names = {Path(*path.parts[1:]) for path in paths}
    assert {path.parts[0] for path in paths} == {f"sordino-{sordino.__version__}"}
    assert {path.parts[0] for path in names} == DISTRIBUTED
    for path in names:
        hidden = [part for part in path.parts if part.startswith((".", "__pycache__")) and part != ".gitignore"]
        assert not hidden, path
        assert path.suffix not in (".pyc", ".pem", ".key"), path


def needed(requirements: Iterable[Requirement]) -> dict[str, Distribution]:
    """The installed distributions that some requirements, and these in turn, ask for on this machine."""
    found: dict[str, Distribution] = {}
    seen: set[tuple[str, str]] = set()
    left = [(requirement, extra) for requirement in requirements for extra in ("", *requirement.extras)]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found[name] = distribution(name)
        for line in found[name].requires or []:
            each = Requirement(line)
            if each.marker is None or each.marker.evaluate({"extra": extra}):
                left += [(each, wanted) for wanted in ("", *each.extras)]
    return found


def link(one: Distribution, site: Path) -> None:
    """Make an installed distribution importable from another environment's folder of packages, as links."""
    for top in {file.parts[0] for file in one.files or []} - {"..", "__pycache__"}:
        if not (site / top).exists():
            (site / top).symlink_to(Path(str(one.locate_file(top))).resolve())


@pytest.fixture(scope="module")
def plain(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of an environment with the wheel and its dependencies: no extra, and no network."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
    site, scripts = Path(paths["purelib"]), Path(paths["scripts"])
    (wheel,) = built.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(scripts / "python"), "install", "--no-deps", "--no-index"]
    done = subprocess.run([*pip, str(wheel)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for one in needed(Requirement(line) for line in PROJECT["dependencies"]).values():
        link(one, site)
    (site / "no_network.py").write_text(NO_NETWORK)
    (site / "no_network.pth").write_text("import no_network\n")
    return scripts


def call(plain: Path, home: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the environment in an empty folder, which is also the home directory."""
    home.mkdir(exist_ok=True)
    kept = {key: value for key, value in os.environ.items() if key in ("LANG", "LC_ALL", "OMP_NUM_THREADS", "TMPDIR")}
    settings = kept | {"HOME": str(home), "PATH": str(plain), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(plain / program), *arguments]
    return subprocess.run(command, cwd=home, env=settings, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_environment_has_the_wheel_no_extra_and_no_network(plain: Path, tmp_path: Path) -> None:
    """Or else the tests below would prove nothing."""
    code = "import sordino; print(sordino.__file__, sordino.__version__)"
    done = call(plain, tmp_path / "home", "python", "-c", code)
    file, version = done.stdout.split()
    assert Path(file).is_relative_to(plain.parent)
    assert version == sordino.__version__
    for extra in EXTRAS:
        done = call(
            plain, tmp_path / "home", "python", "-c", f"import sordino.errors as e; e.require_extra('{extra}', 'x')"
        )
        assert "MissingExtra: x needs " in done.stderr
    for address in ("('localhost', 9)", "('203.0.113.1', 9)"):
        code = f"import socket; socket.create_connection({address}, 1)"
        assert call(plain, tmp_path / "home", "python", "-c", code).returncode == 97


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel_in_an_empty_folder(plain: Path, tmp_path: Path) -> None:
    """All of it but for rounds and pictures: methods, noise, audits and the report."""
    short = ["rounds=1", "data.train_per_class=8", "data.test_per_class=4"]
    settings = [part for each in short for part in ("--set", each)]
    done = call(plain, tmp_path / "home", "sordino", "demo", *settings, "--json")
    assert done.returncode == 0, done.stderr
    runs = json.loads(done.stdout)["runs"]
    assert [each["algorithm"] for each in runs] == ["zero-shot", "local", "promptfl", *["dp-fpl"] * 4]
    assert [each["privacy"]["private"] for each in runs] == [True, False, False, False, True, True, True]
    assert all(0 <= each["accuracy"]["local"] <= 1 for each in runs)
    (page,) = (tmp_path / "home" / "runs").glob("*-demo/report.html")
    assert page.read_text(encoding="utf-8").rstrip().endswith("</html>")


@pytest.mark.slow
def test_commands_that_need_no_extra_work_without(plain: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    assert "tune-private" in call(plain, home, "sordino", "--help").stdout
    assert "provide" in call(plain, home, "sordino", "mpc", "--help").stdout
    listed = json.loads(call(plain, home, "sordino", "methods", "--json").stdout)["methods"]
    assert {"promptfl", "dp-fpl", "secfpp"} <= {each["name"] for each in listed}
    checks = json.loads(call(plain, home, "sordino", "doctor", "--json").stdout)["checks"]
    for extra in EXTRAS:
        (check,) = (each for each in checks if each["name"] == f"extra {extra}")
        assert f"pip install 'sordino[{extra}]'" in check["finding"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["mpc", "certificates", "--out", "parties"], "mpc"),
        (["mpc", "distill", "--out", "tower"], "mpc"),
        (["tune-private", "private.toml", "--clear"], "mpc"),
        (["run", "hub.toml"], "hub"),
        (["compare", "hub.toml", "--algorithms", "promptfl", "--seeds", "1"], "hub"),
        (["privacy", "plan", "hub.toml"], "hub"),
        (["publish", "runs/a", "--name", "fabric"], "serve"),
        (["prompts", "list"], "serve"),
        (["keys", "list"], "serve"),
        (["serve"], "serve"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value[:2]),
)
def test_a_command_that_needs_an_extra_names_it_in_one_line(
    plain: Path, tmp_path: Path, arguments: list[str], extra: str
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "private.toml").write_bytes((ROOT / "examples" / "private_sst2.toml").read_bytes())
    (home / "hub.toml").write_text(
        '[data]\nsource = "hf:somebody/pictures"\n[partition]\nscheme = "iid"\nclients = 2\n'
        '[privacy]\nmechanism = "dp-sgd"\nepsilon = 8.0\n'
    )
    done = call(plain, home, "sordino", *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    last = [line for line in done.stderr.splitlines() if not line.startswith("Run directory: ")]
    assert len(last) == 1, done.stderr
    assert re.fullmatch(rf"sordino: .* not installed: pip install 'sordino\[{extra}\]'", last[0])


@pytest.mark.slow
def test_every_module_imports_without_extras_or_says_which_it_needs(plain: Path, tmp_path: Path) -> None:
    code = (
        "import importlib, json, pkgutil, sordino\n"
        "failed = {}\n"
        "def note(name):\n"
        "    try: importlib.import_module(name)\n"
        "    except ImportError as error: failed[name] = type(error).__name__\n"
        "for each in pkgutil.walk_packages(sordino.__path__, 'sordino.', onerror=lambda name: None):\n"
        "    if not each.name.endswith('__main__'): note(each.name)\n"
        "print(json.dumps(failed))"
    )
    done = call(plain, tmp_path / "home", "python", "-c", code)
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout)
    assert (
        failed.pop("sordino.tasks.hub") == "ModuleNotFoundError"
    )  # nothing but `load_images`, which checks, imports it
    assert failed["sordino.mpc"] == "MissingExtra"
    assert set(failed.values()) == {"MissingExtra"}
    assert not {name for name in failed if name.split(".")[1] in PLAIN}
