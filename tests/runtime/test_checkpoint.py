import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sordino.algorithms.base import named_tensors
from sordino.errors import RunError
from sordino.runtime import checkpoint
from sordino.runtime.local import LocalRuntime, Training

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(0, 20)), list(range(20, 40))]
TABLES = {"context_length": 3, "rank": 2, "optimizer": {"name": "adam"}}


def trained(runtime: LocalRuntime, rounds: int = 2) -> Training:
    training = runtime.start()
    for _ in range(rounds):
        training, _ = runtime.round(training)
    return training


def same(one: Training, other: Training) -> bool:
    pairs = [(one.server, other.server), (one.clients, other.clients)]
    return one.round == other.round and all(
        torch.equal(named_tensors(a)[name], named_tensors(b)[name]) for a, b in pairs for name in named_tensors(a)
    )


@pytest.mark.parametrize("name", ["zero-shot", "local", "promptfl", "dp-fpl"])
def test_a_checkpoint_comes_back_bit_for_bit(name: str, make_runtime: MakeRuntime, tmp_path: Path) -> None:
    runtime = make_runtime(name, ROWS, TABLES)
    training = trained(runtime) if runtime.rounds else runtime.start()
    checkpoint.save(tmp_path, training)
    found = checkpoint.load(tmp_path, runtime.start())
    assert found is not None
    assert same(found, training)


def test_the_latest_is_loaded_and_old_ones_go(make_runtime: MakeRuntime, tmp_path: Path) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    training = runtime.start()
    for _ in range(4):
        training, _ = runtime.round(training)
        checkpoint.save(tmp_path, training)
    found = checkpoint.load(tmp_path, runtime.start())
    assert found is not None
    assert same(found, training)
    assert len(list(tmp_path.glob("round-*.server.*"))) == len(list(tmp_path.glob("round-*.clients.*"))) == 2


def test_no_checkpoint_is_no_error(make_runtime: MakeRuntime, tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path, make_runtime("local", ROWS, TABLES).start()) is None


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "latest"])
def test_damage_is_told_and_nothing_is_overwritten(damage: str, make_runtime: MakeRuntime, tmp_path: Path) -> None:
    runtime = make_runtime("dp-fpl", ROWS, TABLES)
    checkpoint.save(tmp_path, trained(runtime))
    file = next(tmp_path.glob("round-*"))
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        file.write_bytes(content)
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "remove":
        file.unlink()
    else:
        (tmp_path / checkpoint.LATEST).write_text('{"file": "round-0000')
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="damaged.*nothing was changed"):
        checkpoint.load(tmp_path, runtime.start())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_of_other_settings_does_not_fit(make_runtime: MakeRuntime, tmp_path: Path) -> None:
    checkpoint.save(tmp_path, trained(make_runtime("dp-fpl", ROWS, TABLES)))
    with pytest.raises(RunError, match="shape"):
        checkpoint.load(tmp_path, make_runtime("dp-fpl", ROWS, TABLES | {"context_length": 5}).start())


WRITE_TOO_MUCH = """
import resource, signal, sys
from pathlib import Path
from sordino.errors import RunError
from sordino.files import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    write_atomically(Path(sys.argv[1]), b"new" * 10_000)
except RunError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="the system cannot limit a file's size")
def test_where_no_more_fits_the_old_file_stays(tmp_path: Path) -> None:
    """The operating system refuses the write in the middle, as on a full disk."""
    file = tmp_path / "state"
    file.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", WRITE_TOO_MUCH, str(file)], capture_output=True, text=True, check=True)
    assert f"cannot write {file}" in done.stdout
    assert "--resume" in done.stdout
    assert file.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
