"""The roles that can be requested: one list, which says what FLARE signs, and no role for what has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from sordino.cli.app import invoke
from sordino.flare.certificates import VALID_CERT_TYPES
from sordino.flare.project import REQUESTED, ROLES


def test_what_can_be_requested_is_what_is_signed() -> None:
    assert set(REQUESTED) == set(ROLES) & set(VALID_CERT_TYPES)


@pytest.mark.parametrize(
    ("name", "role", "told"),
    [
        ("a@b.org", "boss", "--role = 'boss': choose from lead, org_admin, member\n"),
        ("a@b.org", "client", "--role = 'client': choose from lead, org_admin, member\n"),
        ("a@b.org", "project_admin", "choose from lead, org_admin, member; the project's owner makes that kit with "),
        ("east", "boss", "--role = 'boss': is for administrators, whose names are e-mail addresses; 'east' is none"),
        ("server", "lead", "--role = 'lead': is for administrators"),
    ],
)
def test_a_role_that_cannot_be_is_refused(
    name: str, role: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "request"
    assert invoke(["flare", "request", name, "--organization", "a", "--role", role, "--out", str(out)]) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(("name", "role"), [("a@b.org", role) for role in (None, *REQUESTED)] + [("east", None)])
def test_every_role_of_the_list_can_be_requested(name: str, role: str | None, tmp_path: Path) -> None:
    more = [] if role is None else ["--role", role]
    assert invoke(["flare", "request", name, "--organization", "a", *more, "--out", str(tmp_path / "request")]) == 0
