"""Pseudo-random integers that two holders of one key draw alike without communication: AES-256 in counter mode."""

from __future__ import annotations

import math

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from torch import Tensor

from sordino.mpc.arithmetic.ring import WORD, Shape, lowest_
from sordino.randomness import system_bytes

KEY = 32  # bytes
PIECE = 2**18  # bytes


class Prg:
    """Numbered streams of integers. Stream numbers are below 2^64.

    The upper half of the first counter block is the stream's number, so streams of up to 2^64 blocks never meet.

    Args:
        key: 32 bytes. Drawn from the operating system if absent.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._key = system_bytes(KEY) if key is None else key

    def integers(self, stream: int, shape: Shape, bits: int = WORD) -> Tensor:
        """Draw uniform integers from 0 to 2^bits - 1, int64. A stream and a shape always give the same integers."""
        first_block = stream.to_bytes(8, "big") + bytes(8)
        encryptor = Cipher(algorithms.AES(self._key), modes.CTR(first_block)).encryptor()
        words = np.empty(math.prod(shape), "<i8")
        plain, octets = bytes(min(words.nbytes, PIECE)), words.view(np.uint8).data
        # Pieces are small, so that plaintext and ciphertext stay in the cache.
        for start in range(0, words.nbytes, PIECE):
            piece = octets[start : start + PIECE]
            encryptor.update_into(plain[: len(piece)], piece)
        return lowest_(torch.from_numpy(words.reshape(shape)), bits)
