"""A node's connection to a server, over Flower's Fleet API: signed requests over TLS, as a SuperNode makes them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, no_object_id_recompute
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from sordino.errors import RunError
from sordino.flower.keys import public_bytes

Result = TypeVar("Result")

BEAT = 20.0  # seconds between two signs of life; the server waits for twice HEARTBEAT_DEFAULT_INTERVAL
TRIES = 20.0  # seconds for which a request is repeated
SPARE = 2**20  # bytes of a message beside its content; the site itself refuses content that is too long, in words
NOT_RUNNING, UNKNOWN, UNSIGNED = 403, 412, 401  # as a SuperLink answers
AWAY = (502, 503, 504)  # what the proxy says while the server is away


class Unreachable(RunError):
    """The server cannot be reached, or does not let this node in; it may later."""


class Dropped(RunError):
    """A question or an answer that nobody waits for any more, or that cannot be read."""


class Connection:
    """A node that is known to its server, until `close`.

    Args:
        server: host and port.
        authority: file with the certificate that the server's is checked with.
        key: the node's.
        most: bytes of the longest message that is taken.
        before: number that the server gave this node earlier, so that one that died can come back at once.

    Raises:
        Unreachable: the server is not there, is another one than the certificate says, or does not know the key.
    """

    def __init__(
        self, server: str, authority: str, key: ec.EllipticCurvePrivateKey, most: int, before: int | None = None
    ) -> None:
        self._most = most + SPARE
        self._client = FleetHttpClient.from_server_address(
            server,
            insecure=False,
            root_certificates=authority,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        self._over = threading.Event()
        try:
            self.number = self._activated(public_bytes(key.public_key()), before)
        except BaseException:
            self._client.close()
            raise
        self._node = Node(node_id=self.number)
        threading.Thread(target=self._live, daemon=True).start()

    def receive(self) -> Message | None:
        """Return the newest question; None if there is none. Older ones are superseded, and nobody waits for them.

        Raises:
            Unreachable: the server went away.
            Dropped: the question cannot be read.
        """
        newest: tuple[Any, Any] | None = None
        while True:
            response = self._patiently(lambda: self._client.PullMessages(PullMessagesRequest(node=self._node)))
            if not response.messages_list:
                break
            newest = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        if newest is None:
            return None
        message, tree = newest
        run, read = message.metadata.run_id, 0
        # It raises where a part is not there yet, and is called again.
        pull_part = make_pull_object_fn_protobuf(
            lambda request: self._patiently(lambda: self._client.PullObject(request)), self._node, run
        )

        def pull(number: str) -> bytes:
            nonlocal read
            content = bytes(pull_part(number))
            read += len(content)
            if read > self._most:
                raise Dropped(f"the server sent more than {self._most:,} bytes")
            return content

        def confirm(number: str) -> None:
            request = ConfirmMessageReceivedRequest(node=self._node, run_id=run, message_object_id=number)
            self._patiently(lambda: self._client.ConfirmMessageReceived(request))

        try:
            question: Message = pull_and_inflate_object_from_tree(
                tree,
                pull,
                confirm,
                return_type=Message,
                max_concurrent_pulls=1,
                initial_backoff=0.1,
                backoff_cap=1.0,
                max_time=TRIES,
            )
        except RunError:
            raise
        except Exception as error:  # of whatever the server sent
            raise Dropped(f"a question cannot be read ({type(error).__name__}: {error})") from None
        question.metadata.__dict__["_message_id"] = tree.object_id  # it is not in what was sent
        return question

    def send(self, reply: Message, seconds: float) -> None:
        """Send a reply.

        Args:
            reply: to a question.
            seconds: that it took to make.

        Raises:
            Unreachable: the server went away.
            Dropped: nobody waits for it.
        """
        reply.metadata.__dict__["_message_id"] = reply.object_id
        about = message_to_proto(remove_content_from_message(reply))
        with no_object_id_recompute():
            request = PushMessagesRequest(
                node=self._node,
                messages_list=[about],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[seconds],
            )
            response = self._patiently(lambda: self._client.PushMessages(request))
            push = make_push_object_fn_protobuf(
                lambda part: self._patiently(lambda: self._client.PushObject(part)),
                self._node,
                reply.metadata.run_id,
                response.session_id,
            )
            push_objects(get_all_nested_objects(reply), push, object_ids_to_push=set(response.objects_to_push))

    def close(self) -> None:
        """Tell the server that this node leaves."""
        self._over.set()
        try:
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.number))
        except (httpx.HTTPError, ValueError):
            pass
        finally:
            self._client.close()

    def _activated(self, public: bytes, before: int | None) -> int:
        """Return the number that the server has for this node."""
        if before is not None:
            try:
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=before))
            except httpx.HTTPStatusError:
                pass  # it was not connected, or the server is a new one
            except httpx.HTTPError as error:
                raise Unreachable(_reason(error)) from None
        request = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        try:
            return int(self._client.ActivateNode(request).node_id)
        except (httpx.HTTPError, ValueError) as error:
            raise Unreachable(_reason(error)) from None

    def _live(self) -> None:
        """Give signs of life, also while the site computes."""
        request = SendNodeHeartbeatRequest(node=self._node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while not self._over.wait(BEAT):
            try:
                self._client.SendNodeHeartbeat(request)
            except (httpx.HTTPError, ValueError, RuntimeError):  # the next request tells
                continue

    def _patiently(self, ask: Callable[[], Result]) -> Result:
        """Ask the server, and repeat it while it is away for a moment."""
        end = time.monotonic() + TRIES
        while True:
            try:
                return ask()
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError) and error.response.status_code == NOT_RUNNING:
                    raise Dropped("the run of a question is over") from None
                away = not isinstance(error, httpx.HTTPStatusError) or error.response.status_code in AWAY
                if not away or time.monotonic() > end or self._over.is_set():
                    raise Unreachable(_reason(error)) from None
                time.sleep(1)


def _reason(error: Exception) -> str:
    """Return why a server does not take a request."""
    if isinstance(error, httpx.HTTPStatusError):
        code = error.response.status_code
        if code == UNKNOWN:
            return "the server does not know this node's key, or takes a node with it for connected"
        if code == UNSIGNED:
            return "the server does not know this node's key, or its clock and this one differ by minutes"
        if code == 413:
            return "an answer is longer than the server's proxy takes (server.most_bytes)"
        return f"the server answers with {code}"
    text = str(error)
    if "CERTIFICATE_VERIFY_FAILED" in text:
        return "the server's certificate is not signed by the authority of --ca, or is for another name"
    return f"the server cannot be reached ({text.splitlines()[0] if text else type(error).__name__})"
