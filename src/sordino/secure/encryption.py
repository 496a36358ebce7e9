"""Encryption of payloads with X25519 and ChaCha20-Poly1305, from the `cryptography` package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sordino.secure.errors import SecureError

TAG = 16  # bytes by which a sealed payload is longer
ANYBODY = X25519PrivateKey.from_private_bytes(bytes([8]) * 32)  # tries keys; protects nothing


class EncryptingCipher:
    """One round's channel of a client to every other, encrypted and authenticated; the server relays it unread.

    1. A fresh X25519 key pair (RFC 7748); its public half goes to the peers.
    2. A key for each peer and direction: HKDF-SHA256 (RFC 5869) of the shared secret, with both
       public keys as info, the sender's first.
    3. ChaCha20-Poly1305 (RFC 8439) with the context as associated data and as the source of the
       nonce. No context is used twice with one key, as keys are fresh each round.

    Keys are not signed. The carrier of public keys between clients must not replace them: a server
    that does is a man in the middle. The transport, or a directory of long-term keys, has to
    authenticate them.

    Args:
        protocol: the start of every key's info, so that no two protocols share a key.
    """

    def __init__(self, protocol: bytes = b"sordino secpc") -> None:
        self._protocol = protocol
        self._private = X25519PrivateKey.generate()
        self._peers: dict[int, bytes] = {}
        self._secrets: dict[int, bytes] = {}
        self._ciphers: dict[tuple[int, bool], ChaCha20Poly1305] = {}

    @property
    def public_key(self) -> bytes:
        """Return the public key, 32 bytes."""
        return self._private.public_key().public_bytes_raw()

    def meet(self, keys: Mapping[int, bytes]) -> None:
        """Take the public keys of all clients of the round: all of them, or none if one is refused.

        Raises:
            SecureError: a key is malformed, or a peer's key changed within the round.
        """
        secrets: dict[int, bytes] = {}
        for peer, key in keys.items():
            if len(key) != len(self.public_key):
                raise SecureError(f"client {peer} sent a public key of {len(key)} bytes where 32 are due")
            if self._peers.get(peer, key) != key:
                raise SecureError(f"the public key of client {peer} changed within a round")
            try:
                known = self._secrets.get(peer)
                secrets[peer] = known or self._private.exchange(X25519PublicKey.from_public_bytes(key))
            except ValueError:  # of small order
                raise SecureError(f"the public key of client {peer} is not one") from None
        self._peers.update(keys)
        self._secrets.update(secrets)

    def seal(self, recipient: int, content: bytes, context: bytes) -> bytes:
        """Seal a payload for a peer; it is 16 bytes longer than the content."""
        return self._cipher(recipient, sending=True).encrypt(_nonce(context), content, context)

    def unseal(self, sender: int, content: bytes, context: bytes) -> bytes:
        """Open a payload of a peer.

        Raises:
            SecureError: it was not sealed by this peer, for this client, in this context.
        """
        try:
            return self._cipher(sender, sending=False).decrypt(_nonce(context), content, context)
        except InvalidTag:
            raise SecureError(
                f"what client {sender} sent was not sealed by it, or not for this purpose",
            ) from None

    def _cipher(self, peer: int, sending: bool) -> ChaCha20Poly1305:
        if (peer, sending) not in self._ciphers:
            if peer not in self._peers:
                raise SecureError(f"there is no public key of client {peer}")
            peer_key, public_key = self._peers[peer], self.public_key
            keys = public_key + peer_key if sending else peer_key + public_key  # the sender's first
            info = self._protocol + keys
            derivation = HKDF(algorithm=SHA256(), length=32, salt=None, info=info)
            self._ciphers[peer, sending] = ChaCha20Poly1305(derivation.derive(self._secrets[peer]))
        return self._ciphers[peer, sending]


def is_key(key: bytes) -> bool:
    """Return true if 32 bytes are a public key of X25519 with which a secret can be agreed on.

    A point of small order gives everybody the same secret. No client seals to it, so a server that passed it on would
    have all of them refuse.
    """
    try:
        ANYBODY.exchange(X25519PublicKey.from_public_bytes(key))
    except ValueError:
        return False
    return True


def _nonce(context: bytes) -> bytes:
    """Return 12 bytes of the context's SHA-256. A key is used with a few contexts only, so nonces do not collide."""
    return hashlib.sha256(context).digest()[:12]
