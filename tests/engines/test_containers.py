"""The image and the compose files of both engines fit each other and the repository. No container is started."""

from __future__ import annotations

import fnmatch
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
PARTIES = [(engine, party) for engine in ("flare", "flower") for party in ("server", "site")]
PAGES = {"flare": "deploy.md", "flower": "deploy-flower.md"}


def service_of(engine: str, party: str) -> dict[str, Any]:
    """The one service of a party's compose file, which has the party's name."""
    services = yaml.safe_load(compose_file(engine, party).read_text(encoding="utf-8"))["services"]
    assert list(services) == [party], "compose wants the variables of all services of a file, also of one not started"
    return dict(services[party])


def compose_file(engine: str, party: str) -> Path:
    return ROOT / "deploy" / engine / party / "compose.yaml"


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of the Dockerfile by stage, those of the stages below first."""
    found: dict[str, list[tuple[str, str]]] = {}
    stage: list[tuple[str, str]] = []
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            below, _, name = rest.partition(" AS ")
            found[name] = stage = [*found.get(below, []), (instruction, below)]
        else:
            stage.append((instruction, rest))
    return found


def last(stage: str, instruction: str) -> str:
    return [rest for each, rest in stages()[stage] if each == instruction][-1]


@pytest.mark.parametrize(("engine", "party"), PARTIES)
def test_a_party_has_no_rights_and_is_started_again(engine: str, party: str) -> None:
    service = service_of(engine, party)
    assert service["restart"] == "unless-stopped"
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True, "else nobody waits for processes of jobs, and the first one ignores a stop"
    assert not {"privileged", "network_mode", "user", "entrypoint", "cap_add", "devices", "pid", "ipc"} & set(service)
    if party == "site":
        assert "ports" not in service
    else:
        assert len(service["ports"]) == 1


@pytest.mark.parametrize(("engine", "party"), PARTIES)
def test_a_party_is_built_from_its_stage_of_the_one_dockerfile(engine: str, party: str) -> None:
    build = service_of(engine, party)["build"]
    assert (compose_file(engine, party).parent / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE
    assert build["target"] == engine
    assert service_of(engine, party)["image"] == f"sordino-{engine}"


@pytest.mark.parametrize("engine", PAGES)
def test_the_page_names_each_variable_and_the_user_that_folders_belong_to(engine: str) -> None:
    page = (ROOT / "docs" / PAGES[engine]).read_text(encoding="utf-8")
    for party in ("server", "site"):
        text = compose_file(engine, party).read_text(encoding="utf-8")
        for name in re.findall(r"\$\{(\w+)", text):
            (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
            assert row.split("|")[2 if party == "server" else 3].strip(), f"{name} is a variable of the {party}"
    (user,) = re.findall(r"useradd --uid (\d+) ", DOCKERFILE.read_text(encoding="utf-8"))
    assert f"user {user}" in page
    assert f"chown -R {user} " in page


@pytest.mark.parametrize("engine", PAGES)
def test_what_is_mounted_to_be_worked_in_is_where_the_image_starts(engine: str) -> None:
    for party in ("server", "site"):
        inside = [
            re.sub(r"^\$\{[^}]*\}:", "", volume).removesuffix(":ro") for volume in service_of(engine, party)["volumes"]
        ]
        assert inside[0] == last(engine, "WORKDIR")
        assert ("/data" in inside) == (party == "site")
        assert all(volume.endswith(":ro") == ("/data" in volume) for volume in service_of(engine, party)["volumes"])


@pytest.mark.parametrize("engine", PAGES)
def test_an_image_has_locked_versions_and_a_user_without_rights(engine: str) -> None:
    """Of Python, the oldest that is supported: the lock files are made for it, and tests run with it."""
    stage = stages()[engine]
    oldest = re.findall(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert next(rest.partition("-")[0] for each, rest in stage if each == "FROM") == f"python:{oldest[0]}"
    copied = dict(rest.split(" ") for each, rest in stage if each == "COPY" and ".lock" in rest)
    installs = [words for each, rest in stage if each == "RUN" for words in re.findall(r"pip install ([^&|]*)", rest)]
    assert len(installs) == 2
    assert "--require-hashes" in installs[0]
    assert copied["requirements-deploy.lock"] in installs[0].split()
    assert {"--no-deps", "--no-build-isolation"} <= set(installs[1].split()), "the package, and nothing else"
    (name,) = re.findall(r"useradd .* (\w+)$", " ".join(rest for each, rest in stage if "useradd" in rest))
    assert last(engine, "USER") == name != "root"


def test_what_the_image_copies_is_there_and_nothing_else_is_handed_to_its_build() -> None:
    """A clone has an environment of gigabytes, runs, and what people put there."""
    copied = {source for each, rest in stages()["sordino"] if each == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    assert {rule.removeprefix("!") for rule in rules if rule.startswith("!")} == copied
    left_out = [rule.removeprefix("**/") for rule in rules if rule.startswith("**/")]
    assert any(fnmatch.fnmatch("__pycache__", rule) for rule in left_out)


def test_variables_that_name_an_owners_folders_are_not_committed() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
