"""A site's hello: all that the coordinator must know of it before the first round."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sordino.runtime.messages import MessageError

MOST_CLIENTS = 1_000_000  # at a site
LARGEST_EXAMPLE = 10_000_000  # numbers that a model reads of one picture

Size = Annotated[int, Field(ge=1)]
Number = Annotated[int, Field(ge=0)]


class EncoderFacts(BaseModel):
    """The encoder of a party; all must have the same."""

    model_config = ConfigDict(frozen=True, strict=True)

    name: str
    fingerprint: str
    dtype: str


class Hello(BaseModel):
    """The facts that a site tells.

    Attributes:
        version, protocol: of Sordino, and of the messages between a coordinator and sites.
        encoder: the site's.
        classes: a digest of the classes, in order.
        class_names: the classes, if the site tells them.
        sizes: what each of its clients holds; ones where nothing needs it.
        data: for each client a digest of its data that nobody else can make.
        numbers: its clients' numbers, where it holds parts of one partition.
        whole_persons: whether it knows whose each image is.
        example: shape of what the model reads of one picture.
        public: a digest of public images' features; "" without any.
        accuracy: whether it will tell its clients' accuracies, which have no noise.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    version: str
    protocol: int
    encoder: EncoderFacts
    classes: str
    class_names: list[str] | None = Field(default=None, fail_fast=True)
    sizes: list[Size] = Field(min_length=1, max_length=MOST_CLIENTS, fail_fast=True)
    data: list[str] = Field(fail_fast=True)
    numbers: list[Number] | None = Field(default=None, fail_fast=True)
    whole_persons: bool
    example: list[Size] = Field(max_length=8)
    public: str = ""
    accuracy: bool = False

    @model_validator(mode="after")
    def _of_one_length(self) -> Hello:
        lengths = {len(self.sizes), len(self.data), len(self.sizes if self.numbers is None else self.numbers)}
        if len(lengths) > 1 or len(set(self.numbers or [])) < len(self.numbers or []):
            raise ValueError("sizes, data and numbers are not of the same clients")
        if math.prod(self.example) > LARGEST_EXAMPLE:
            raise ValueError(f"an example of shape {self.example} is too large")
        return self

    @property
    def facts(self) -> dict[str, Any]:
        """Return it for a message."""
        return self.model_dump(exclude_none=True)

    @classmethod
    def read(cls, facts: Mapping[str, Any], version: tuple[str, int]) -> Hello:
        """Read it from a message.

        Args:
            facts: of the message.
            version: the coordinator's, with its protocol.

        Raises:
            MessageError: the site runs another version, or the facts are malformed.
        """
        theirs = (facts.get("version"), facts.get("protocol"))
        if theirs != version:  # another version may say other things
            ours = f"{version[0]} with protocol {version[1]}"
            raise MessageError(
                f"it runs {theirs[0]} with protocol {theirs[1]}, and the coordinator {ours}; install the same"
            )
        try:
            return cls.model_validate(dict(facts))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "its facts"
            raise MessageError(f"its hello cannot be read: {where}: {first['msg']}") from None


def names_digest(names: Sequence[str]) -> str:
    """Return a digest of the classes, in order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()
