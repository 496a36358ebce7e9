"""A folder that is signed for OpenSSF's tool, and that tool itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP256R1,
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from full_disk import full_disk
from sordino.cli.app import invoke
from sordino.errors import ConfigError, RunError
from sordino.privacy.signature import keep_key, make_key
from sordino.serving.folder import read_folder
from sordino.serving.openssf import openssf_key

TOOL = Path(sys.executable).with_name("model_signing")


def verified(folder: Path, public_key: Path) -> tuple[int, str]:
    """What the standard tool says; it knows nothing of Sordino."""
    signature = folder.with_name(folder.name + ".sig")
    command = [TOOL, "verify", "key", folder, "--signature", signature, "--public_key", public_key]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def registry(shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SORDINO_REGISTRY", f"sqlite:///{tmp_path / 'prompts.db'}")
    assert invoke(["publish", str(shared_run), "--name", "fabric", "--accept-not-private"]) == 0


@pytest.mark.slow
def test_a_stranger_verifies_with_the_standard_tool(
    registry: None, own_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "handed on"
    assert invoke(["prompts", "export", "fabric", "--out", str(folder), "--sign-openssf"]) == 0
    public = own_config / "openssf.pub.pem"
    assert str(public) in capsys.readouterr().out
    made = load_pem_private_key((own_config / "openssf.pem").read_bytes(), None)
    assert isinstance(made, EllipticCurvePrivateKey)
    assert made.curve.name == "secp256r1"
    assert (own_config / "openssf.pem").stat().st_mode & 0o077 == 0
    read_folder(folder)  # and it is still a folder of ours
    code, words = verified(folder, public)
    assert (code, "succeeded" in words) == (0, True), words
    (folder / "README.md").write_bytes((folder / "README.md").read_bytes() + b" ")
    code, words = verified(folder, public)
    assert code == 1
    assert "README.md" in words
    other = keep_key(generate_private_key(SECP256R1()), tmp_path / "other.pem")
    assert verified(folder, other)[0] == 1


@pytest.mark.slow
def test_a_file_more_or_less_is_noticed(registry: None, own_config: Path, tmp_path: Path) -> None:
    folder, key = tmp_path / "out", tmp_path / "own.pem"
    public = keep_key(generate_private_key(SECP384R1()), key)
    line = ["prompts", "export", "fabric", "--out", str(folder), "--sign-openssf", "--openssf-key", str(key)]
    assert invoke(line) == 0
    assert not (own_config / "openssf.pem").exists()
    (folder / "extra.txt").write_text("more")
    assert verified(folder, public)[0] == 1
    (folder / "extra.txt").unlink()
    assert verified(folder, public)[0] == 0
    (folder / "ledger.json").unlink()
    assert verified(folder, public)[0] == 1


def test_what_cannot_sign_is_refused_before_anything_is_written(
    registry: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_key(tmp_path / "ed.pem")
    out = str(tmp_path / "out")
    export = ["prompts", "export", "fabric", "--out", out]
    assert invoke([*export, "--sign-openssf", "--openssf-key", str(tmp_path / "ed.pem")]) == 2
    assert "P-256" in capsys.readouterr().err
    assert invoke([*export, "--openssf-key", str(tmp_path / "ed.pem")]) == 2
    assert "--sign-openssf" in capsys.readouterr().err
    (tmp_path / "out.sig").write_text("another's")
    assert invoke([*export, "--sign-openssf"]) == 2
    assert "out.sig is there already" in capsys.readouterr().err
    assert not Path(out).exists()
    assert (tmp_path / "out.sig").read_text() == "another's"


def test_the_own_key_is_made_once(own_config: Path) -> None:
    first = openssf_key()
    content = first.read_bytes()
    assert openssf_key().read_bytes() == content
    first.write_text("no key")
    with pytest.raises(ConfigError, match="holds no such key"):
        openssf_key()


def test_half_of_the_own_pair_is_completed_or_told(own_config: Path) -> None:
    with (
        full_disk(),
        pytest.raises(RunError, match=r"openssf\.pem: .*free space, or set SORDINO_CONFIG .* --openssf-key$"),
    ):
        openssf_key()
    assert list(own_config.iterdir()) == []
    public = openssf_key().with_name("openssf.pub.pem")
    content = public.read_bytes()
    public.unlink()
    openssf_key()
    assert public.read_bytes() == content
    (own_config / "openssf.pem").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"openssf\.pem in it holds no such key, .* or move the file away"):
        openssf_key()


def test_the_extra_is_named_where_it_is_missing(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sordino.errors.find_spec", lambda name: None if name == "model_signing" else object())
    assert invoke(["prompts", "export", "fabric", "--out", str(tmp_path / "out"), "--sign-openssf"]) == 2
    assert "pip install 'sordino[openssf]'" in capsys.readouterr().err
