"""A SuperLink as its operator reaches it, from the same machine: which keys it knows, and its runs."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

from sordino.errors import RunError
from sordino.flower.project import ServerProject
from sordino.progress import log

Result = TypeVar("Result")

APP = Path(__file__).parent / "app"
ONLINE = "online"
RECENT = 100  # runs that are looked through


class NoSuperLink(RunError):
    """The SuperLink is not there now; it may come back."""


class Control:
    """The API of a SuperLink that is open on its own machine alone.

    Args:
        project: the server's.
    """

    def __init__(self, project: ServerProject) -> None:
        self.project = project
        if not project.ca.exists():
            raise RunError(f"{project.ca} is not there; start the server on this machine with 'sordino flower up'")
        self._client = ControlHttpClient.from_server_address(
            project.superlink,
            insecure=False,
            root_certificates=str(project.ca),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def close(self) -> None:
        self._client._client.close()

    def register(self) -> None:
        """Have the SuperLink know the keys of the project's file, and no other key."""
        wanted = self.project.sites
        known = {key: node for key, node in self._nodes().items() if node.status != "unregistered"}
        for key, node in known.items():
            if key not in wanted:
                self._ask(self._client.UnregisterNode, UnregisterNodeRequest(node_id=node.node_id))
                log.warning("a key that %s does not list is not known any more", self.project.file)
        for key, name in wanted.items():
            if key not in known:
                self._ask(self._client.RegisterNode, RegisterNodeRequest(public_key=key, name=name))
                log.info("the key of %s is known", name)

    def sites(self) -> frozenset[str]:
        """Return the names of the sites that are connected."""
        names = self.project.sites
        return frozenset(names[key] for key, node in self._nodes().items() if key in names and node.status == ONLINE)

    def runs(self) -> Mapping[int, Any]:
        """Return the latest runs by number."""
        return dict(self._ask(self._client.ListRuns, ListRunsRequest(limit=RECENT)).run_dict)

    def run(self, number: int) -> Any:
        """Return a run; None if there is none of this number."""
        return self._ask(self._client.ListRuns, ListRunsRequest(run_id=number)).run_dict.get(number)

    def start(self, config: Mapping[str, str]) -> int:
        """Start a run of Sordino's app, and return its number."""
        content = build_fab_from_disk(APP)
        fab = Fab(hash_str=hashlib.sha256(content).hexdigest(), content=content)
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(config)))
        return int(self._ask(self._client.StartRun, request).run_id)

    def stop(self, number: int) -> None:
        """Stop a run."""
        self._ask(self._client.StopRun, StopRunRequest(run_id=number))

    def _nodes(self) -> dict[bytes, Any]:
        return {
            bytes(node.public_key): node for node in self._ask(self._client.ListNodes, ListNodesRequest()).nodes_info
        }

    def _ask(self, call: Callable[[Any], Result], request: Any) -> Result:
        """Ask the SuperLink.

        Raises:
            NoSuperLink: it is not there.
            RunError: it refuses.
        """
        try:
            return call(request)
        except httpx.TransportError as error:
            remedy = "start it on this machine with 'sordino flower up'"
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise NoSuperLink(f"no SuperLink at {self.project.superlink} ({text}); {remedy}") from None
        except httpx.HTTPStatusError as error:
            raise RunError(f"the SuperLink refuses: {error.response.text.strip()[:300]}") from None


@contextlib.contextmanager
def connected(project: ServerProject) -> Iterator[Control]:
    """Give a connection to a SuperLink, and end it."""
    control = Control(project)
    try:
        yield control
    finally:
        control.close()
