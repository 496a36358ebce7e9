"""What outlives a restart: a server's encrypted share, and the model owner's calibration."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch

from full_disk import full_disk
from mpc.small import batches, small_tower
from sordino.encoders.bundled import Embedder
from sordino.errors import ConfigError, RunError
from sordino.mpc.parties import kept_model as kept_module
from sordino.mpc.parties import kept_share
from sordino.mpc.parties.kept_model import kept_model
from sordino.mpc.parties.kept_share import PASSPHRASE, KeptShare
from sordino.mpc.parties.model_share import Model
from sordino.mpc.protocols.party import Shared
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.distill import embedder_of
from sordino.mpc.tower.encoder import shared_weights
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan
from sordino.mpc.tower.tower import PrivateTower

SECRET = {PASSPHRASE: "a passphrase that is long"}


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration.measure(small_tower(), batches(1, 20))


@pytest.fixture(scope="module")
def model(calibration: Calibration) -> Model:
    plan = FixedPointPlan.of(small_tower(), calibration)
    return Model("name", "sharing", plan, shared_weights(small_tower(), calibration)[0])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces for a small tower, and guesses that cost nothing."""
    monkeypatch.setattr(kept_share, "PIECE", 2**12)
    monkeypatch.setattr(kept_share, "SCRYPT", (2**4, 8, 1))


def same(first: Model, second: Model) -> bool:
    def equal(a: Shared, b: Shared) -> bool:
        return torch.equal(a.share, b.share) and a.fraction == b.fraction

    names = (first.name, first.sharing, first.plan) == (second.name, second.sharing, second.plan)
    weights = first.weights.keys() == second.weights.keys()
    return names and weights and all(equal(first.weights[name], second.weights[name]) for name in first.weights)


@pytest.mark.parametrize("kind", ["key file", "passphrase"])
def test_a_share_comes_back_to_its_server_only(tmp_path: Path, model: Model, kind: str) -> None:
    key, environment = (tmp_path / "key", {}) if kind == "key file" else (None, SECRET)
    kept = KeptShare.of(tmp_path / "share", key, environment)
    assert kept.load("server-0") is None
    kept.save(model, "server-0")
    again = KeptShare.of(tmp_path / "share", key, environment).load("server-0")
    assert again
    assert same(again, model)
    assert (tmp_path / "share").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="is the share of server-0, and this is server-1") as refused:
        kept.load("server-1")
    assert "move the file away" in str(refused.value)
    assert SECRET[PASSPHRASE] not in repr(kept)


def test_nothing_of_a_share_is_in_the_clear_and_each_file_is_its_own(tmp_path: Path, model: Model) -> None:
    contents = []
    for name in ("a", "b"):
        KeptShare.of(tmp_path / name, None, SECRET).save(model, "server-0")
        contents.append((tmp_path / name).read_bytes())
    _, payload = model.to_message()
    body = contents[0].partition(b"\n")[2]
    assert len(body) > len(payload)
    for start in range(0, len(payload) - 16, 997):
        assert payload[start : start + 16] not in body
    assert model.plan.to_json().encode()[:32] not in body
    other = contents[1].partition(b"\n")[2]
    equal = sum(a == b for a, b in zip(body, other, strict=True)) / len(body)
    assert equal < 0.02  # independent bytes agree once in 256


@pytest.mark.parametrize("change", ["flip", "cut", "piece", "swap", "role", "more", "nothing left"])
def test_what_was_changed_is_refused(tmp_path: Path, model: Model, change: str) -> None:
    """A bit, an end, pieces in another order, and a head that names the other server."""
    kept = KeptShare.of(tmp_path / "share", None, SECRET)
    kept.save(model, "server-0")
    line, newline, body = (tmp_path / "share").read_bytes().partition(b"\n")
    size = kept_share.PIECE + kept_share.TAG
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    assert len(pieces) > 3
    changed = {
        "flip": body[:-30] + bytes([body[-30] ^ 1]) + body[-29:],
        "cut": body[:-1],
        "piece": b"".join(pieces[:-1]),  # at an end of a piece
        "swap": b"".join([pieces[1], pieces[0], *pieces[2:]]),
        "role": body,
        "more": body + b"x",
        "nothing left": b"",
    }[change]
    if change == "role":
        line = line.replace(b"server-0", b"server-1")
    (tmp_path / "share").write_bytes(line + newline + changed)
    with pytest.raises(ConfigError, match="is damaged, or under another passphrase|holds no share"):
        kept.load("server-1" if change == "role" else "server-0")


def test_another_secret_another_version_and_no_share(
    tmp_path: Path, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "share"
    KeptShare.of(file, None, SECRET).save(model, "server-0")
    with pytest.raises(ConfigError, match="damaged, or under another passphrase; give the right one"):
        KeptShare.of(file, None, {PASSPHRASE: "another that is long"}).load("server-0")
    (tmp_path / "key").write_bytes(bytes(32))
    (tmp_path / "key").chmod(0o600)
    with pytest.raises(ConfigError, match="is under a passphrase, and a key file is given; give the passphrase"):
        KeptShare.of(file, tmp_path / "key", {}).load("server-0")
    with monkeypatch.context() as patch:
        patch.setattr(kept_share, "own_versions", lambda: {"package": "9.9", "protocol": 9})
        with pytest.raises(ConfigError, match=r"written by another version, .*0\.\d.*, and this is .*9\.9"):
            KeptShare.of(file, None, SECRET).load("server-0")
    file.write_bytes(b"something else\n")
    with pytest.raises(ConfigError, match="--keep = .*is no share of a server"):
        KeptShare.of(file, None, SECRET).load("server-0")
    with pytest.raises(RunError, match="the share cannot be kept: .*share/below"):
        KeptShare.of(file / "below", None, SECRET).save(model, "server-0")


def test_secrets_that_protect_nothing_are_refused(tmp_path: Path) -> None:
    share, key = tmp_path / "share", tmp_path / "key"
    for key_file, environment, message in (
        (None, {}, f"--key-file FILE or the passphrase in {PASSPHRASE}; neither is given"),
        (key, SECRET, "both are given"),
        (None, {PASSPHRASE: "short"}, "at least 12 characters"),
    ):
        with pytest.raises(ConfigError, match=message) as refused:
            KeptShare.of(share, key_file, environment)
        assert "short" not in str(refused.value)
    key.write_bytes(bytes(31))
    key.chmod(0o640)
    with pytest.raises(ConfigError, match=rf"--key-file = .*others may read it \(mode 640\); run 'chmod 600 {key}'"):
        KeptShare.of(share, key, {})
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="at least 32 random bytes"):
        KeptShare.of(share, key, {})


def test_a_missing_key_file_is_made_once(tmp_path: Path, model: Model) -> None:
    """But not where a share is under the lost one."""
    key = tmp_path / "key"
    kept = KeptShare.of(tmp_path / "share", key, {})
    assert key.stat().st_mode & 0o777 == 0o600
    assert len(kept.secret) == 32
    assert KeptShare.of(tmp_path / "share", key, {}).secret == kept.secret
    assert KeptShare.of(tmp_path / "share", tmp_path / "other", {}).secret != kept.secret
    kept.save(model, "server-0")
    key.unlink()
    with pytest.raises(ConfigError, match="--key-file = .*No such file.*give the file that .*share is under"):
        KeptShare.of(tmp_path / "share", key, {})
    assert not key.exists()


def test_a_full_disk_leaves_no_key_file_that_blocks_the_next_start(tmp_path: Path) -> None:
    key = tmp_path / "key"
    with full_disk(), pytest.raises(ConfigError, match="--key-file = .*cannot be made: .*free space"):
        KeptShare.of(tmp_path / "share", key, {})
    assert list(tmp_path.iterdir()) == []
    assert len(KeptShare.of(tmp_path / "share", key, {}).secret) == 32


# The model owner's side.


@pytest.fixture
def embedder() -> Embedder:
    return embedder_of(None)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, calibration: Calibration) -> list[int]:
    """Calls of the measurement, which takes no time here."""
    calls: list[int] = []

    def measure(tower: PrivateTower, embedder: Embedder, sentences: int, progress: object) -> Calibration:
        calls.append(sentences)
        return calibration

    monkeypatch.setattr(kept_module, "calibration_of", measure)
    return calls


def test_a_model_is_measured_once_and_keeps_its_name(tmp_path: Path, embedder: Embedder, measured: list[int]) -> None:
    first = kept_model(tmp_path, small_tower(), embedder, 300)
    again = kept_model(tmp_path, small_tower(), embedder, 300)
    assert measured == [300]
    assert (first.kept, again.kept) == (False, True)
    assert (again.name, again.calibration, again.plan) == (first.name, first.calibration, first.plan)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600


def test_another_model_is_measured_anew_under_another_name(
    tmp_path: Path, embedder: Embedder, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight, an embedding, the number of sentences, or the version."""
    names = {kept_model(tmp_path, small_tower(), embedder, 300).name}
    other = small_tower()
    other.layers[1]["out.bias"][3] += 1e-3
    names.add(kept_model(tmp_path, other, embedder, 300).name)
    names.add(kept_model(tmp_path, small_tower(), embedder, 400).name)
    moved = embedder_of(None)
    moved.positions[0, 0] += 1e-3
    names.add(kept_model(tmp_path, small_tower(), moved, 300).name)
    monkeypatch.setattr("sordino.__version__", "9.9")
    names.add(kept_model(tmp_path, small_tower(), embedder, 300).name)
    assert len(names) == len(measured) == 5


@pytest.mark.parametrize("damage", ["cut", "other", "form"])
def test_a_damaged_file_is_measured_again_and_told(
    tmp_path: Path, embedder: Embedder, measured: list[int], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    kept_model(tmp_path, small_tower(), embedder, 300)
    (file,) = tmp_path.iterdir()
    stored = json.loads(file.read_bytes())
    content = {"cut": file.read_text()[:-9], "other": "[]", "form": json.dumps(stored | {"calibration": "{}"})}[damage]
    file.write_text(content)
    logging.getLogger("sordino").propagate = True
    assert not kept_model(tmp_path, small_tower(), embedder, 300).kept
    assert any("cannot be used" in message for message in caplog.messages)
    assert kept_model(tmp_path, small_tower(), embedder, 300).kept
    assert len(measured) == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_told(
    tmp_path: Path, embedder: Embedder, measured: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o500)
    logging.getLogger("sordino").propagate = True
    assert not kept_model(tmp_path, small_tower(), embedder, 300).kept
    assert any("cannot be written" in message for message in caplog.messages)
