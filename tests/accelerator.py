"""A stand-in for an accelerator: tensors on a device that is not there, and a count of what leaves it or reaches it.

Tests run where there is no accelerator. Under `StandIn`, tensors that are put on `DEVICE` keep their numbers in
ordinary memory, yet say that they are elsewhere, as an accelerator's do:

- an operation on tensors of both sides is an error, but for a CPU scalar;
- `numpy()` of a tensor on the device is an error;
- a copy from one side to the other is counted, and so is an index that lies on the other side;
- so is everything that makes the host wait for the device: a number that is read, and a shape that depends on numbers.

The device is named "meta", which is the one name for which autograd runs on the host's own thread. Nothing is as fast
or rounds as on a real one.
"""

from __future__ import annotations

import copy
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import sordino

DEVICE = torch.device("meta")
SOURCE = Path(sordino.__file__).parent
aten = torch.ops.aten

# Operators after which the host knows numbers of the device.
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
# Operators whose result has a shape that only the device knows, or that look at their result for errors.
SHAPES = {"nonzero", "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2", "bincount"}
SHAPES |= {"repeat_interleave", "linalg_eigh", "_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex", "linalg_inv_ex"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}  # they take indices of either side
LATE = {"image_tower"}  # what an encoder makes when it is first asked for
MOVES = {"_to_copy", "copy_", "lift_fresh"}


@dataclass(frozen=True)
class Crossing:
    """Something that passes between host and device.

    Attributes:
        kind: "to device", "to host", "read" (one number) or "shape".
        place: the innermost function of the package, as `module.function`.
        entries: the number of entries that pass.
    """

    kind: str
    place: str
    entries: int


class OnDevice(Tensor):
    """A tensor that says it is on `DEVICE`; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnDevice:
        made: OnDevice = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        return made

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.tensor(data, dtype=options.get("dtype", self.dtype)).to(DEVICE)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on {DEVICE} outside of StandIn")


class StandIn(TorchDispatchMode):
    """While it is entered, `DEVICE` can be used; it counts crossings."""

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []
        self._factories = _Factories()

    def __enter__(self) -> StandIn:
        self._factories.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._factories.__exit__(*error)

    def counted(self, work: Callable[[], Any]) -> Counter[Crossing]:
        """Return the crossings of some work."""
        before = len(self.crossings)
        work()
        return Counter(self.crossings[before:])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice)]
        to_device = self._target(name, kwargs, there)
        self._count(name, args, there, here, to_device)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        inside = {id(tensor.held): tensor for tensor in there}
        plain = tree_map_only(OnDevice, lambda tensor: tensor.held, (args, kwargs))
        if name == "_to_copy":  # even to where it seems to be
            result: Any = plain[0][0].to(plain[1].get("dtype"), copy=True)
        else:
            result = func(*plain[0], **plain[1])

        def put(tensor: Tensor) -> Tensor:
            known = inside.get(id(tensor))
            return OnDevice(tensor) if known is None else known

        return tree_map_only(Tensor, put, result) if to_device else result

    def _target(self, name: str, kwargs: dict[str, Any], there: Sequence[OnDevice]) -> bool:
        """Tell whether an operator's result is on the device."""
        if name == "copy_":
            return bool(there)
        device = kwargs.get("device")
        return bool(there) if device is None else torch.device(device).type == DEVICE.type

    def _count(self, name: str, args: Any, there: Sequence[OnDevice], here: Sequence[Tensor], to_device: bool) -> None:
        if name == "_to_copy":
            if bool(there) != to_device:
                self._add("to device" if to_device else "to host", args[0].numel())
        elif name == "copy_":
            target, source = args[:2]
            if isinstance(target, OnDevice) != isinstance(source, OnDevice):
                self._add("to device" if isinstance(target, OnDevice) else "to host", source.numel())
        elif there and name in READS:
            self._add("read", 1)
        elif there and name in SHAPES:
            self._add("shape", 1)
        elif there and name in INDEXED:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self._add("shape", 1)
            for index in indices:
                if not isinstance(index, OnDevice):
                    self._add("to device", index.numel())
        elif there and name not in MOVES:
            strangers = [tensor for tensor in here if tensor.ndim]
            if strangers:
                raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU, of shape {tuple(strangers[0].shape)}")

    def _add(self, kind: str, entries: int) -> None:
        self.crossings.append(Crossing(kind, place(), entries))


class _Factories(TorchFunctionMode):
    """`torch.tensor` and `torch.as_tensor`, which fill memory themselves and so do not pass by the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and not isinstance(args[0], OnDevice):
            kwargs["device"] = torch.device("cpu")
            return func(*args, **kwargs).to(device)
        return func(*args, **kwargs)


def place() -> str:
    """Return the innermost function of the package that is at work, as `module.function`."""
    for frame, _ in traceback.walk_stack(None):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(SOURCE):
            module = file.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
            return f"{module}.{frame.f_code.co_qualname.replace('.<locals>', '')}"
    return "elsewhere"


def moved(value: Any, device: torch.device) -> Any:
    """Return a copy of an encoder, or of a part of one, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, nn.Module):
        return _moved_module(copy.deepcopy(value), device)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{part.name: moved(getattr(value, part.name), device) for part in fields(value)})
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, torch.device):
        return device
    if type(value).__module__.startswith("sordino.encoders"):
        made = copy.copy(value)
        for name, part in vars(value).items():
            if name in LATE:  # it holds the original; the copy makes its own
                del vars(made)[name]
            else:
                vars(made)[name] = moved(part, device)
        return made
    return value


def _moved_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module in place; frozen weights become buffers, as a parameter cannot change its class."""
    for part in module.modules():
        for name, tensor in [*part._parameters.items(), *part._buffers.items()]:
            if tensor is not None:
                part._parameters.pop(name, None)
                part._buffers[name] = tensor.detach().to(device)
    return module
