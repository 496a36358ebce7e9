"""What crosses between a client and the server: the bytes of a Broadcast or an Upload, and of nothing else."""

from __future__ import annotations

from typing import TypeVar

import safetensors.torch

from sordino.algorithms.base import Broadcast, Upload, map_tensors, named_tensors

AnyMessage = TypeVar("AnyMessage", Broadcast, Upload)


def encode(message: Broadcast | Upload) -> bytes:
    """A message as safetensors; a message without tensors takes no bytes.

    Raises:
        TypeError: the value is not a message; what a client holds besides cannot be sent.
    """
    if not isinstance(message, Broadcast | Upload):
        raise TypeError(f"{type(message).__name__} may not leave its party; only a Broadcast or an Upload may be sent")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in named_tensors(message).items()}
    return safetensors.torch.save(tensors) if tensors else b""


def decode(content: bytes, like: AnyMessage) -> AnyMessage:
    """A message of the same type as `like`, on the same devices; loading executes nothing.

    Raises:
        KeyError: a tensor that `like` has is missing.
    """
    tensors = safetensors.torch.load(content) if content else {}
    return map_tensors(like, lambda name, old: tensors[name].to(old.device))
