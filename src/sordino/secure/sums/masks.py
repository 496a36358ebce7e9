"""The masks of a secure sum, and the limbs in which their secrets are shared.

A mask is a stream of AES-256 in counter mode. Its key is HKDF-SHA256 (RFC 5869) of 32 secret bytes.
They are a client's seed for its self mask, and the X25519 secret (RFC 7748) of two clients for
their pairwise mask. The info holds the digest of the setup, so that keys of different sessions,
rounds, or clients differ.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from sordino.secure.errors import SecureError
from sordino.secure.field import Elements
from sordino.secure.sums.setup import LIMBS, SECRET, SumSetup

Ring = NDArray[Any]  # uint32 or uint64, whose sums wrap as those of the ring do

LIMB_BITS = 60  # below the field's 61
PIECE = 2**18  # bytes
ZEROS = bytes(PIECE)


def keystream(key: bytes, count: int, word: np.dtype[Any]) -> Ring:
    """Return `count` elements of the ring from the stream of a key, which must be used for nothing else."""
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    words = np.empty(count, word)
    octets = words.view(np.uint8).data
    for start in range(
        0,
        words.nbytes,
        PIECE,
    ):  # the zeros and a piece of their ciphertext stay in the cache
        piece = octets[start : start + PIECE]
        encryptor.update_into(memoryview(ZEROS)[: len(piece)], piece)
    return words


def self_mask(setup: SumSetup, client: int, seed: bytes) -> Ring:
    """Return the mask [d] of one client, which only its seed can remove."""
    return _mask(setup, seed, b"self" + client.to_bytes(4, "big"))


def pair_mask(
    setup: SumSetup,
    private: X25519PrivateKey,
    client: int,
    peer: int,
    peer_key: bytes,
) -> Ring:
    """Return the mask [d] that a client adds for its peer. The peer's is its negative, so they cancel in a sum.

    Raises:
        SecureError: the peer's public key is malformed.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(peer_key))
    except ValueError:
        raise SecureError(f"the mask key of client {peer} is not one") from None
    low, high = min(client, peer), max(client, peer)
    mask = _mask(setup, secret, b"pair" + low.to_bytes(4, "big") + high.to_bytes(4, "big"))
    return mask if client == low else np.negative(mask, out=mask)


def to_limbs(secret: bytes) -> Elements:
    """Return 32 bytes as field elements of 60 bits, lowest first, [5]."""
    number = int.from_bytes(secret, "little")
    limbs = [number >> LIMB_BITS * place & 2**LIMB_BITS - 1 for place in range(LIMBS)]
    return np.array(limbs, np.uint64)


def from_limbs(limbs: Elements) -> bytes:
    """Return the bytes of `to_limbs`.

    Raises:
        SecureError: the elements [5] are not limbs of 32 bytes.
    """
    parts = [int(limb) for limb in limbs.tolist()]
    number = sum(part << LIMB_BITS * place for place, part in enumerate(parts))
    if any(part >= 2**LIMB_BITS for part in parts) or number >= 2 ** (8 * SECRET):
        raise SecureError("shares do not belong to a secret of 32 bytes")
    return number.to_bytes(SECRET, "little")


def _mask(setup: SumSetup, secret: bytes, purpose: bytes) -> Ring:
    info = b"sordino secure sum mask" + setup.digest + purpose
    key = HKDF(algorithm=SHA256(), length=32, salt=None, info=info).derive(secret)
    return keystream(key, setup.dimension, setup.word)
