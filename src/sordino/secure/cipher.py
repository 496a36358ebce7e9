"""The interface that encrypts shares, so that the server that relays them cannot read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Cipher(Protocol):
    """A client's end of an authenticated channel to every other client, over the server.

    `encryption.EncryptingCipher` is one. Keys must reach the peers unchanged: a server that could
    replace them could read everything. `context` is authenticated with a payload, so that it cannot
    be replayed in another round or to another client.
    """

    @property
    def public_key(self) -> bytes:
        """Return the key with which peers seal to this client; it has the same length for all clients."""
        ...

    def meet(self, keys: Mapping[int, bytes]) -> None:
        """Take the public keys of all clients of the round."""
        ...

    def seal(self, recipient: int, content: bytes, context: bytes) -> bytes:
        """Seal a payload for a peer; contents of the same length give payloads of the same length."""
        ...

    def unseal(self, sender: int, content: bytes, context: bytes) -> bytes:
        """Open a payload of a peer.

        Raises:
            SecureError: it was not sealed by this peer, for this client, in this context.
        """
        ...


class PlainCipher:
    """NO SECRECY FROM THE SERVER: payloads travel as they are, and a server that reads what it relays sees all shares.

    It is for simulations in one process, where there is nobody to hide from, and for tests.
    """

    public_key = b""

    def meet(self, keys: Mapping[int, bytes]) -> None:
        """Ignore the keys, of which there are none."""

    def seal(self, recipient: int, content: bytes, context: bytes) -> bytes:
        """Return the content unchanged."""
        return content

    def unseal(self, sender: int, content: bytes, context: bytes) -> bytes:
        """Return the content unchanged."""
        return content
