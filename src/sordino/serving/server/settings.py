"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

ACCEPTED = ("JPEG", "PNG", "WebP")


@dataclass(frozen=True)
class ServerSettings:
    """The limits of a server.

    Attributes:
        digits: decimals of the probabilities that are told.
        most_top: classes that one answer may have.
        most_pictures: in one request.
        most_bytes: of a request's body.
        most_pixels: of a picture.
        most_aspect: of a picture's longer side to its shorter one.
        most_prompts: that are held in memory.
        seconds: that a request may take, with its upload.
        batch: pictures that pass the encoder at once.
        wait: seconds that a picture waits for others.
        workers: batches at once; 0: as many as torch uses threads, or one where an accelerator computes.
        queue: pictures that may wait; more are turned away.
        per_minute, per_day: requests and pictures of one key, where the key has no limits of its own, or of all who ask
            a server without keys.
    """

    digits: int = 2
    most_top: int = 5
    most_pictures: int = 16
    most_bytes: int = 16 << 20
    most_pixels: int = 25_000_000
    most_aspect: float = 20.0
    most_prompts: int = 8
    seconds: float = 30.0
    batch: int = 32
    wait: float = 0.005
    workers: int = 0
    queue: int = 256
    per_minute: int = 600
    per_day: int = 10_000
