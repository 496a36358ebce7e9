"""`sordino flower up`: a SuperLink on the loopback, and the proxy before it; whichever dies is started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sordino.errors import ConfigError, RunError
from sordino.experiments.run_lock import held
from sordino.files import FREE_SPACE, make_private, write_atomically
from sordino.flower.certificates import write_certificates
from sordino.flower.control import connected
from sordino.flower.names import PROJECT_VARIABLE, QUIET
from sordino.flower.project import ServerProject
from sordino.flower.proxy import configuration
from sordino.progress import log

LOOK = 0.5  # seconds between two looks at the processes
AGAIN = 2.0  # seconds until a process that died is started again
START = 120.0  # seconds that a SuperLink may take to answer
END = 10.0  # seconds that a process has to end when it is asked to


@dataclass
class _Process:
    """A process that is kept running."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.running = subprocess.Popen(self.command, env=dict(self.environment), stdin=subprocess.DEVNULL)

    @property
    def code(self) -> int | None:
        """Return its exit code; None while it runs."""
        return None if self.running is None else self.running.poll()

    def end(self) -> None:
        if self.running is None or self.running.poll() is not None:
            return
        self.running.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.running.wait(END)
        if self.running.poll() is None:
            self.running.kill()
        self.running.wait()


def up(project: ServerProject, tell: Callable[[str], None] = log.info) -> None:
    """Run a project's server, until an interruption ends it with all that it started.

    Args:
        project: the project.
        tell: is given a line when sites may connect, and where something dies.

    Raises:
        SordinoError: another server runs in the same folder, a port is in use, or a program is missing.
    """
    server = project.settings.server
    keys = project.sites  # they are read before anything is started
    state = project.state
    nginx = shutil.which(server.nginx)
    if nginx is None:
        raise ConfigError("server.nginx", server.nginx, "is not installed; on Debian: apt-get install nginx")
    make_private(state)
    with held(state, instead=False):
        # nginx tells of a port in use after seconds of trying, which would be after sites were told to connect.
        _require_free(server.address, server.port, "server.port")
        _require_free("127.0.0.1", server.loopback, "server.loopback")
        write_certificates(state, project.settings.name, server.host, server.days)
        chain, key = project.own_certificate or (state / "server.crt", state / "server.key")
        write_atomically(
            state / "nginx.conf",
            configuration(
                state, server.address, server.port, server.loopback, chain, key, project.ca, server.most_bytes
            ).encode(),
            FREE_SPACE,
        )
        superlink = _Process("the SuperLink", _superlink_command(project), environment(project))
        proxy = _Process("the proxy", [nginx, "-c", str(state / "nginx.conf"), "-e", "stderr"], os.environ)
        processes = [superlink, proxy]
        try:
            superlink.start()
            _await(project, superlink)
            with connected(project) as control:
                control.register()
            proxy.start()
            time.sleep(LOOK)
            if proxy.code is not None:
                raise RunError(f"nginx ended with code {proxy.code}; what it says above names the cause")
            tell(f"Sites connect to {server.host}:{server.port} with {project.ca}; {len(keys)} keys are known")
            while True:
                time.sleep(LOOK)
                for process in processes:
                    if process.code is not None:
                        tell(f"{process.name} ended with code {process.code}, and is started again")
                        time.sleep(AGAIN)
                        process.start()
        finally:
            for process in reversed(processes):
                process.end()


def _require_free(address: str, port: int, key: str) -> None:
    """Check that a port can be listened on.

    Raises:
        ConfigError: another program listens there, or this one may not.
    """
    six = ":" in address
    try:
        with socket.socket(socket.AF_INET6 if six else socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
            if six:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)  # as nginx does
            listener.bind((address, port))
    except OSError as error:
        remedy = f"cannot be listened on at {address} ({error.strerror}); end what has it, or choose another"
        raise ConfigError(key, port, remedy) from None


def environment(project: ServerProject) -> dict[str, str]:
    """Return the environment of a SuperLink, which the processes of its runs inherit."""
    # Flower starts its other programs by their names.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    own = {"PATH": path, "FLWR_HOME": str(project.state / "flwr"), PROJECT_VARIABLE: str(project.file)}
    return os.environ | QUIET | own


def _superlink_command(project: ServerProject) -> list[str]:
    state = project.state
    server = "from flwr.superlink.cli.flower_superlink import flower_superlink; flower_superlink()"
    command = [sys.executable, "-c", server, "--host", "127.0.0.1", "--port", str(project.settings.server.loopback)]
    command += ["--database", str(state / "superlink.db"), "--enable-supernode-auth"]
    command += ["--disable-runtime-dependency-installation", "--ssl-ca-certfile", str(project.ca)]
    # Flower takes keys of nodes over TLS alone, also on the loopback.
    return [*command, "--ssl-certfile", str(state / "loopback.crt"), "--ssl-keyfile", str(state / "loopback.key")]


def _await(project: ServerProject, superlink: _Process) -> None:
    """Wait until a SuperLink answers.

    Raises:
        RunError: it ended, or does not in time.
    """
    context = ssl.create_default_context(cafile=str(project.ca))
    end = time.monotonic() + START
    while time.monotonic() < end:
        if superlink.code is not None:
            port = project.settings.server.loopback
            raise RunError(f"the SuperLink ended with code {superlink.code}; is port {port} in use (server.loopback)?")
        try:
            with urllib.request.urlopen(f"https://{project.superlink}/health", timeout=5, context=context):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(LOOK)
    raise RunError(f"the SuperLink does not answer after {START:g} s; what it says above may name the cause")
