"""`ImageSet`: labeled pictures of any source, listed now and read on request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sordino.errors import DataError
from sordino.pictures.decoding import decode
from sordino.pictures.depths import GrayRange
from sordino.tasks.passed_over import PassedOver

Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """N labeled pictures, read one at a time on request.

    Attributes:
        source: the source as in the settings, for messages and summaries.
        class_names: the classes' names as a prompt shows them.
        labels: [N], index into `class_names`.
        names: N names, each of which identifies the picture in its source: a path relative to the
            folder, or 'train[17]'.
        read: returns the content of picture i, the bytes that identify it.
        draw: converts content to a picture.
        domain_names, domains: the domains' names and [N] indices into them; None for a source
            without domains.
        is_test: [N], true in the source's own test split; None for a source without one.
        passed_over: files beside the pictures, by kind and folder.
        person_names, persons: the names of the persons whose pictures these are, and [N] indices into them; None if
            nothing says so.
    """

    source: str
    class_names: tuple[str, ...]
    labels: Indices
    names: Sequence[str]
    read: Callable[[int], bytes]
    draw: Callable[[bytes], Image.Image] = decode
    domain_names: tuple[str, ...] | None = None
    domains: Indices | None = None
    is_test: Flags | None = None
    passed_over: tuple[PassedOver, ...] = ()
    person_names: tuple[str, ...] | None = None
    persons: Indices | None = None

    def __post_init__(self) -> None:
        """Check that classes and domains have names that can be read, written and shown.

        Raises:
            DataError: a name is not text, as may happen with folder names.
        """
        for name in (*self.class_names, *(self.domain_names or ())):
            try:
                name.encode()
            except UnicodeEncodeError:
                raise DataError(f"{self.source}: the name {name!r} is not UTF-8 text; rename the folder") from None

    def __len__(self) -> int:
        return len(self.labels)

    def raw(self, index: int) -> bytes:
        """Return the content of one picture.

        Raises:
            DataError: it cannot be read; the message is the reason alone.
        """
        try:
            return self.read(int(index))
        except OSError as error:
            raise DataError(error.strerror or str(error)) from error
        except ValueError as error:  # a path that no file can have
            raise DataError(f"no file can have its path: {error}") from error

    def image(self, index: int) -> Image.Image:
        """Return one picture.

        Raises:
            DataError: it cannot be read; the message is the reason alone.
        """
        return self.draw(self.raw(index))

    def subset(self, indices: Sequence[int] | Indices) -> ImageSet:
        """Return the pictures at `indices`, in that order, with the same classes, domains and persons."""
        rows = np.asarray(indices, dtype=np.int64)
        read = self.read
        return replace(
            self,
            labels=self.labels[rows],
            names=[self.names[row] for row in rows],
            read=lambda index: read(int(rows[index])),
            domains=None if self.domains is None else self.domains[rows],
            is_test=None if self.is_test is None else self.is_test[rows],
            persons=None if self.persons is None else self.persons[rows],
        )


def with_gray_range(images: ImageSet, gray_range: GrayRange) -> ImageSet:
    """Return the same pictures, with gray of more than 8 bits read between these values of black and white.

    The range becomes part of the content, as the content identifies a picture's features in the
    cache.
    """
    read = images.read
    mark = f"sordino gray range {gray_range[0]!r} {gray_range[1]!r}\n".encode()
    return replace(
        images,
        read=lambda index: mark + read(index),
        draw=lambda content: decode(content[len(mark) :], gray_range),
    )
