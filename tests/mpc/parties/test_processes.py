"""Parties as processes of their own, as `sordino mpc` starts them: that they work, and that their end is noticed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import sordino
from commands import here
from flare.parties import until
from mpc.small import agree, batches, groups, small_tower
from mpc.small_bert import distilled
from ports import free_port
from sordino.cli.app import app
from sordino.errors import ConfigError, SordinoError
from sordino.mpc.dealing.costs import Cost
from sordino.mpc.errors import PartyLost
from sordino.mpc.parties.certificates import DATA_OWNER, MODEL_OWNER, ROLES, SERVERS, Identity
from sordino.mpc.parties.network import network_of
from sordino.mpc.parties.session import Session, connect, provide
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.sentences import Sentences
from sordino.private_tuning.search import SearchState, tune
from sordino.private_tuning.search_settings import Search

pytestmark = pytest.mark.slow
TIMEOUT = 12.0


class Processes:
    """A dealer and two servers, started by the command line on ports that stay; `name` of one is its role."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.running = folder, dict[str, subprocess.Popen[str]]()
        self.addresses = dict(zip(ROLES[:3], free_addresses(3), strict=True))
        self.more: tuple[str, ...] = ()
        done = subprocess.run(
            command("certificates", "--out", str(folder / "parties")), capture_output=True, check=True
        )
        assert len(done.stdout.splitlines()) == len(ROLES)

    def heal(self, *more: str) -> None:
        """Start what is dead, wake what sleeps, and give the servers their model; servers anew if `more` changes."""
        for role, process in list(self.running.items()):
            process.send_signal(signal.SIGCONT)
            if more != self.more and role in SERVERS:
                process.kill()
                process.wait()
        self.more = more
        dead = [role for role in self.addresses if role not in self.running or self.running[role].poll() is not None]
        for role in dead:
            log = (self.folder / f"{role}.log").open("a")
            self.running[role] = subprocess.Popen(
                self._stream(role), stdout=subprocess.PIPE, stderr=log, text=True, cwd=self.folder
            )
        for role in dead:
            stdout = self.running[role].stdout
            assert stdout
            said = stdout.readline()
            assert said == f"listening at {self.addresses[role]}\n", (self.folder / f"{role}.log").read_text()
        if not set(dead).isdisjoint(SERVERS):
            self.provide_small()

    def provide_small(self) -> None:
        """Give the servers `small_tower`."""
        identity = Identity.load(self.folder / "parties" / MODEL_OWNER, MODEL_OWNER)
        provide(identity, self.servers, small_tower(), Calibration.measure(small_tower(), batches(1)), 10.0)

    def stop(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGCONT)
            process.kill()
            process.wait()

    @property
    def servers(self) -> list[str]:
        return [self.addresses[role] for role in SERVERS]

    def session(self) -> ExitStack:
        identity = Identity.load(self.folder / "parties" / DATA_OWNER, DATA_OWNER)
        stack = ExitStack()
        self.current: Session = stack.enter_context(connect(identity, self.servers, TIMEOUT))
        return stack

    def _stream(self, role: str) -> list[str]:
        words = ["--certificates", str(self.folder / "parties" / role), "--listen", self.addresses[role]]
        words += ["--timeout", str(TIMEOUT), "--threads", "1"]
        if role not in SERVERS:
            return command("dealer", *words)
        words += ["--dealer", self.addresses["dealer"], *self.more]
        return command("server", *words, *(["--peer", self.servers[0]] if role == SERVERS[1] else []))


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "sordino", "mpc", *words]


def free_addresses(count: int) -> list[str]:
    return [f"127.0.0.1:{free_port()}" for _ in range(count)]


@pytest.fixture(scope="module")
def shared_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    found = Processes(tmp_path_factory.mktemp("processes"))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distilled(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def processes(shared_processes: Processes) -> Processes:
    shared_processes.heal()
    return shared_processes


def test_they_compute_and_write_nothing(processes: Processes) -> None:
    """No share and no mask in a file or a log: what is there is certificates and a few words."""
    with processes.session():
        assert agree(processes.current.forward(groups()), groups())
    logs = [processes.folder / f"{role}.log" for role in SERVERS]
    until("both servers said that it ended", lambda: all(log.read_text().endswith(" ends\n") for log in logs))
    for role, process in processes.running.items():
        process.terminate()
        assert process.wait(timeout=60) == 0, role
    files = {file.name for file in processes.folder.rglob("*") if file.is_file()}
    assert files == {"key.pem", "certificate.pem", "authority.pem", "dealer.log", "server-0.log", "server-1.log"}
    for log in logs:
        lines = log.read_text().splitlines()
        kinds = [line.split()[0] + " " + line.split()[-1] for line in lines]
        assert [line for line in lines if len(line) > 60] == []
        assert kinds == ["model layers", "session begins", "session ends", "stopped stopped"]


@pytest.mark.parametrize("role", ["server-0", "server-1", "dealer"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_party_that_dies_or_stalls_is_named(processes: Processes, role: str, end: signal.Signals) -> None:
    """Within two timeouts: one to notice, and one for those who wait for who noticed."""
    with processes.session():
        processes.current.forward(groups())
        os.kill(processes.running[role].pid, end)
        began = time.monotonic()
        with pytest.raises(PartyLost, match=role):
            processes.current.forward(groups())
        assert time.monotonic() - began < 2 * TIMEOUT + 1
    if end == signal.SIGKILL:
        processes.running[role].wait()  # its lines may end before the process does, and heal() asks for that


def test_the_search_goes_on_from_the_last_generation(processes: Processes) -> None:
    """Server 1 is killed in the third generation; with new processes, two generations are not asked for again."""
    search, start = Search(width=4, population=4, generations=4), torch.zeros(1, 32)
    asked: list[int] = []

    def losses(prompts: Tensor) -> Tensor:
        if len(asked) == 2:
            processes.running["server-1"].kill()
            processes.running["server-1"].wait()
        (group, _) = groups()
        sentences = [Sentences(group.embeddings + 0.01 * prompt[0], group.lengths) for prompt in prompts]
        features = processes.current.forward(sentences)
        asked.append(len(sentences))
        return torch.stack([part.pow(2).mean() for part in features])

    states: list[str] = []
    with pytest.raises(PartyLost, match="server-1"), processes.session():
        tune(search, start, losses, finished=lambda found: states.append(found.to_json()))
    assert len(states) == len(asked) == 2
    processes.heal()
    asked.extend([0, 0])  # so that nobody is killed again
    with processes.session():
        _, found = tune(search, start, losses, SearchState.from_json(states[-1]))
    assert len(found.losses) == 4
    assert found.losses[:2] == SearchState.from_json(states[-1]).losses
    assert asked == [4, 4, 0, 0, 4, 4, 1]  # the last is the mean


def test_a_server_that_keeps_its_share_needs_nothing_after_a_restart(processes: Processes) -> None:
    """Killed, started again with the same words, and the next session goes on; with another passphrase it does not."""
    share, key = processes.folder / "server-1.share", processes.folder / "server-1.key"
    words = [*processes._stream(SERVERS[1]), "--keep", str(share), "--key-file", str(key)]
    keeping = partial(subprocess.Popen, words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def restarted() -> subprocess.Popen[str]:
        processes.running[SERVERS[1]].kill()
        processes.running[SERVERS[1]].wait()
        found = keeping()
        processes.running[SERVERS[1]] = found
        assert found.stdout
        assert found.stdout.readline().startswith("listening at")
        return found

    restarted()
    processes.provide_small()
    second = restarted()
    with processes.session():
        assert agree(processes.current.forward(groups()), groups())
    second.terminate()
    assert "opened: 2 layers" in second.communicate()[1]
    key.write_bytes(bytes(32))
    refused = keeping()
    _, told = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "is damaged, or under another key file" in told
    for file in (share, key):
        file.unlink()


def test_one_command_of_the_model_owner_is_enough_after_a_restart(processes: Processes, checkpoint: Path) -> None:
    """The second time it measures nothing, and the model keeps its name."""
    folder = processes.folder / "parties" / MODEL_OWNER
    words = command("provide", *model_owner(processes), *tower_of(checkpoint), "--sentences", "300")
    said = []
    for role in (None, SERVERS[0], SERVERS[1]):
        if role:
            processes.running[role].kill()
            processes.running[role].wait()
            processes.running[role] = subprocess.Popen(processes._stream(role), stdout=subprocess.PIPE, text=True)
            stdout = processes.running[role].stdout
            assert stdout
            stdout.readline()
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        said.append((done.stdout, "calibrate" in done.stderr))
        with processes.session():
            pass
    name = said[0][0].split()[1]
    assert said[0] == (f"Model {name} is at both servers\n", True)
    assert said[1:] == [(f"Model {name} is at both servers, with the ranges measured before\n", False)] * 2
    for file in folder.glob("calibration-*.json"):
        file.unlink()
    processes.provide_small()


def test_processes_of_another_version_are_named(processes: Processes) -> None:
    """A data owner with an other release, and a server that has one."""
    code = "import sordino; sordino.__version__ = '0.0.9'; from sordino.__main__ import main; main()"
    folder = task_folder(processes.folder / "version-task")
    words = ["tune-private", "task.toml", "--out", "run", *data_owner(processes)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, cwd=folder)
    assert done.returncode == 2
    told = done.stderr.strip().splitlines()[-1]
    now = rf"sordino {sordino.__version__} with protocol \d+"
    assert re.fullmatch(
        rf"sordino: server-\d \(\S+\) runs {now}, and data-owner runs sordino 0\.0\.9 with protocol \d+; "
        "install one version at all parties",
        told,
    ), told


def test_processes_with_swapped_addresses_are_told_so(processes: Processes) -> None:
    folder = task_folder(processes.folder / "swapped-task")
    servers = list(reversed(processes.servers))
    own = processes.folder / "parties" / DATA_OWNER
    words = [f"session.servers={json.dumps(servers)}", f"session.certificates={own}"]
    sides = [word for side in words for word in ("--set", side)]
    done = here(folder, "tune-private", "task.toml", "--out", "run", *sides)
    assert isinstance(done.exception, SordinoError)
    told = str(done.exception)
    assert told.startswith(f"{servers[0]} shows server-1's certificate; it should be that of server-0: ")
    owner = ["--servers", ",".join(servers), *model_owner(processes)[2:], "--sentences", "300"]
    done = here(folder, "mpc", "provide", *owner)
    assert isinstance(done.exception, SordinoError)
    assert str(done.exception).startswith(f"{servers[0]} shows server-1's certificate")
    assert "server-0 comes first in --servers" in str(done.exception)


def test_certificates_that_expire_soon_are_told_by_every_command(tmp_path: Path) -> None:
    subprocess.run(command("certificates", "--out", str(tmp_path), "--days", "7"), capture_output=True, check=True)
    words = command("dealer", "--listen", "127.0.0.1:0", "--certificates", str(tmp_path / "dealer"))
    dealer = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert dealer.stdout
    dealer.stdout.readline()
    dealer.terminate()
    told = dealer.communicate(timeout=60)[1]
    assert "the certificate of dealer expires in 6 days, on " in told
    assert "sordino mpc certificates --out NEW_FOLDER" in told


def test_a_slow_network_takes_the_time_of_the_model(processes: Processes) -> None:
    """At least that; what the machine takes beyond it is no property of the imitation."""
    seconds, costs = [], []
    for imitate in ([], ["--imitate", "20,10"]):
        processes.heal(*imitate)
        with processes.session():
            processes.current.forward(groups())
            before, waited = processes.current.costs.total, processes.current.seconds
            processes.current.forward(groups())
            after = processes.current.costs.total
            seconds.append(processes.current.seconds - waited)
        costs.append(Cost(after.rounds - before.rounds, after.online - before.online))
    assert costs[0] == costs[1]
    assert seconds[1] >= network_of("20,10").online(costs[1])


def test_a_port_that_is_taken(processes: Processes) -> None:
    own = str(processes.folder / "parties" / "dealer")
    words = ["dealer", "--listen", processes.addresses["dealer"], "--certificates", own]
    done = subprocess.run(command(*words), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    *more, line = done.stderr.strip().splitlines()
    assert not more, done.stderr
    assert line.startswith(f"sordino: --listen = '{processes.addresses['dealer']}': cannot be listened at")


def test_arguments_that_do_not_fit(processes: Processes) -> None:
    folder = processes.folder / "parties"
    server = ["server", "--listen", "127.0.0.1:0", "--dealer", "x:1", "--certificates"]
    for words, message in (
        ([*server, str(folder / SERVERS[1])], "--peer = None: server-1 dials server-0: give HOST:PORT of it"),
        ([*server, str(folder / SERVERS[0]), "--peer", "x:2"], "--peer = 'x:2': is for server-1 alone"),
        ([*server, str(folder / "dealer")], "is that of dealer; server-0 or server-1 is needed"),
        (
            ["provide", "--servers", "x:1", "--certificates", str(folder / MODEL_OWNER)],
            "--servers = 'x:1': must be two",
        ),
        (["certificates", "--out", str(folder)], "choose another folder"),
    ):
        result = CliRunner().invoke(app, ["mpc", *words])
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)


def test_the_commands_tune_a_prompt_as_in_the_clear(processes: Processes) -> None:
    """`provide` with the package's tower, and `tune-private` on shares and with --clear, as a user would: for
    sentences, where the data owner is a process, too, and for pictures.
    """
    folder = task_folder(processes.folder / "task")
    mpc(folder, "provide", *model_owner(processes), "--sentences", "300")
    line = [sys.executable, "-m", "sordino", *tuning("private", *data_owner(processes))]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr
    private = json.loads(done.stdout)
    clear = tuned(folder, "clear", "--clear")
    assert private["train_loss"]["before"] == pytest.approx(clear["train_loss"]["before"], abs=0.05)
    first = [json.loads((folder / run / "search.json").read_text())["losses"][0] for run in ("private", "clear")]
    assert first[0] == pytest.approx(first[1], abs=0.1)
    assert private["costs"]["rounds"] > 1000
    assert set(private["costs"]["by_label"]) >= {"set-up", "embeddings", "layer 0", "layer 5"}
    assert private["costs"]["seconds_on"]["wan"]["online"] > private["costs"]["rounds"] * 0.04
    assert clear["costs"] is None

    pictures_of(folder / "pictures")
    (folder / "task.toml").write_text(
        '[task]\nkind = "images"\nsource = "imagefolder:pictures"\nshots = 1\n[prompt]\nlength = 1\ninitial = "a"\n'
        "[search]\nwidth = 4\npopulation = 4\ngenerations = 1\n"
    )
    private, clear = tuned(folder, "images", *data_owner(processes)), tuned(folder, "images-clear", "--clear")
    assert private["classes"] == clear["classes"] == ["blue", "red"]
    assert private["train_loss"]["before"] == pytest.approx(clear["train_loss"]["before"], abs=0.05)
    processes.provide_small()  # for the other tests


def test_a_checkpoint_from_a_folder_is_tuned_as_in_the_clear(processes: Processes, checkpoint: Path) -> None:
    """One that is narrower than the bundled tower: distilled, provided, and known to the data owner by embeddings."""
    folder = task_folder(processes.folder / "checkpoint-task")
    mpc(folder, "provide", *model_owner(processes), *tower_of(checkpoint), "--sentences", "300")
    embeddings = ["--set", f"model.embeddings={checkpoint / 'owner'}"]
    private = tuned(folder, "private", *data_owner(processes), *embeddings)
    clear = tuned(folder, "clear", "--clear", "--set", f"model.tower={checkpoint / 'tower.safetensors'}", *embeddings)
    first = [json.loads((folder / run / "search.json").read_text())["losses"][0] for run in ("private", "clear")]
    assert first[0] == pytest.approx(first[1], abs=0.1)
    assert private["train_loss"]["before"] == pytest.approx(clear["train_loss"]["before"], abs=0.1)
    assert max(first[1]) - min(first[1]) > 1e-4  # candidates differ, and so a tower that is read has a say
    assert "layer 1" in private["costs"]["by_label"]
    assert "layer 2" not in private["costs"]["by_label"]
    processes.provide_small()


def task_folder(folder: Path) -> Path:
    """A text task of four sentences, and its configuration, task.toml."""
    folder.mkdir()
    rows = [("a fine film", 1), ("a dull film", 0), ("moving and warm", 1), ("it drags and drags", 0)]
    for name in ("train", "test"):
        lines = [f"{text}\t{label}" for text, label in rows]
        (folder / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(lines) + "\n", encoding="utf-8")
    (folder / "task.toml").write_text(
        '[task]\nkind = "text"\ntrain = "train.tsv"\ntest = "test.tsv"\nlabel_names = ["bad", "good"]\n'
        'descriptions = ["a bad film", "a good film"]\nshots = 2\n[prompt]\nlength = 1\ninitial = "film"\n'
        "[search]\nwidth = 4\npopulation = 4\ngenerations = 1\nkeep_norms = true\n",
        encoding="utf-8",
    )
    return folder


def pictures_of(folder: Path) -> None:
    """A folder a class, of pictures in its colour."""
    for name in ("blue", "red"):
        (folder / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (32, 32), name).save(folder / name / f"{number}.png")


def mpc(folder: Path, *words: str) -> None:
    done = here(folder, "mpc", *words)
    assert done.exit_code == 0, done.output


def tuning(out: str, *words: str) -> list[str]:
    return ["tune-private", "task.toml", "--json", "--out", out, *words]


def tuned(folder: Path, out: str, *words: str) -> dict[str, Any]:
    done = here(folder, *tuning(out, *words))
    assert done.exit_code == 0, done.output
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def tower_of(checkpoint: Path) -> list[str]:
    """A small tower's options for its owner."""
    return ["--model", str(checkpoint / "model"), "--tower", str(checkpoint / "tower.safetensors")]


def model_owner(processes: Processes) -> list[str]:
    own = processes.folder / "parties" / MODEL_OWNER
    return ["--servers", ",".join(processes.servers), "--certificates", str(own)]


def data_owner(processes: Processes) -> list[str]:
    own = processes.folder / "parties" / DATA_OWNER
    sides = [f"session.servers={json.dumps(processes.servers)}", f"session.certificates={own}"]
    return [word for side in sides for word in ("--set", side)]
