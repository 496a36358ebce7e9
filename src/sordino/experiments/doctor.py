"""Check what this machine has, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from sordino.encoders import EncoderInfo, missing_packages
from sordino.encoders.capabilities import CAPABILITIES
from sordino.errors import EXTRAS, missing_modules
from sordino.files import entered_by_others

NEEDED_GIGABYTES = 1.0  # for feature caches and run directories of ordinary size


@dataclass(frozen=True)
class Check:
    """One finding, with what to do where it is not ok."""

    name: str
    ok: bool
    finding: str


def describe_encoders() -> list[EncoderInfo]:
    """The encoders, loaded if they can be."""
    from sordino.encoders.clip import ClipEncoder
    from sordino.encoders.generative.families import FAMILIES

    clip = EncoderInfo(
        "clip",
        "any CLIP or SigLIP checkpoint: encoder.checkpoint = a directory or a hub name",
        None,
        None,
        None,
        sorted(capability.value for capability in ClipEncoder.capabilities),
        True,
        "",
    )
    generative = EncoderInfo(
        "generative",
        f"any checkpoint of {', '.join(FAMILIES)}: encoder.checkpoint = a directory or a hub name",
        None,
        0,
        None,
        sorted(capability.value for capability in CAPABILITIES["generative"]),
        True,
        "",
    )
    return [_bundled(), clip, generative]


def _bundled() -> EncoderInfo:
    import torch

    from sordino.encoders.bundled import BundledEncoder, weight_files
    from sordino.errors import EncoderError

    towers = "EfficientNet-Lite0 and all-MiniLM-L6-v2"
    capabilities = sorted(capability.value for capability in BundledEncoder.capabilities)
    try:
        encoder = BundledEncoder.load(torch.device("cpu"))
    except EncoderError as error:
        return EncoderInfo("bundled", towers, None, None, None, capabilities, False, str(error))
    megabytes = sum(path.stat().st_size for path in weight_files()) / 1e6
    return EncoderInfo(
        "bundled", towers, megabytes, encoder.feature_width, encoder.context_width, capabilities, True, ""
    )


def examine() -> list[Check]:
    """All checks."""
    return [_python(), *_packages(), *_extras(), _weights(), _device(), _cache()]


def _python() -> Check:
    version = ".".join(str(part) for part in sys.version_info[:3])
    return Check("python", sys.version_info >= (3, 11), f"{version} (3.11 or newer is needed)")


def _packages() -> list[Check]:
    checks = []
    for name in ("torch", "torchvision", "transformers", "timm", "conformal-clip-data"):
        try:
            checks.append(Check(name, True, version(name)))
        except PackageNotFoundError:
            checks.append(Check(name, False, "not installed; run `make install`"))
    return checks


def _extras() -> list[Check]:
    """Return what is installed of the optional dependencies; what is not is no fault."""
    checks = []
    for extra in EXTRAS:
        missing = missing_modules(extra)
        finding = f"not installed (pip install 'sordino[{extra}]')" if missing else "installed"
        if extra == "flower" and not missing and shutil.which("nginx") is None:
            finding = "installed; nginx is not, which 'sordino flower up' needs (apt-get install nginx)"
        checks.append(Check(f"extra {extra}", True, finding))
    return checks


def _weights() -> Check:
    missing = missing_packages()
    finding = f"install {', '.join(missing)}" if missing else "installed"
    return Check("bundled encoder's weights", not missing, finding)


def _device() -> Check:
    import torch

    from sordino.encoders import choose_device

    device = choose_device("auto")
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    return Check("device", True, f"auto is {device.type}{threads}")


def _cache() -> Check:
    from sordino.encoders.cache import FOLDER, default_directory

    folder = default_directory()
    if folder is None:
        return Check("feature cache", False, "this user has no home directory; set SORDINO_CACHE to a folder")
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not os.access(existing, os.W_OK):
        return Check("feature cache", False, f"{folder} cannot be written; set SORDINO_CACHE to a folder that can")
    free = shutil.disk_usage(existing).free / 1e9
    enough = free >= NEEDED_GIGABYTES
    finding = f"{folder}, {free:.1f} GB free{'' if enough else '; free some space'}"
    if entered := entered_by_others(folder / FOLDER):  # on purpose, perhaps
        finding += f"; {folder / FOLDER} {entered}: run 'chmod 700 {folder / FOLDER}'"
    return Check("feature cache", enough, finding)
