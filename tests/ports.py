"""Ports for servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Below the ports that systems give to outgoing connections, which could take one before its server listens. Each
# process of a test run has its own, and takes them in turn.
_FIRST, _EACH = 20_000, 400
_worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 28
_ports = itertools.cycle(range(_FIRST + _EACH * _worker, _FIRST + _EACH * (_worker + 1)))


def free_port() -> int:
    """A port of the loopback at which nobody listens; the next calls give others."""
    for port in itertools.islice(_ports, _EACH):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no port is free")
