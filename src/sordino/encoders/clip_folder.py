"""CLIP and SigLIP checkpoints as folders: found or downloaded, read through transformers, checked, and digested."""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPModel,
    SiglipImageProcessorPil,
    SiglipModel,
)

from sordino.encoders.checkpoint_place import checkpoint_folder
from sordino.errors import EncoderError

# The processors on PIL: they need no torchvision, whose own resizing changes from one release to
# the next.
FAMILIES = {
    "clip": (CLIPModel, CLIPImageProcessorPil),
    "siglip": (SiglipModel, SiglipImageProcessorPil),
}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")


def description(config: Any, processor: Any) -> str:
    """Describe the settings that determine features beside the weights, for the encoder's fingerprint.

    They are the preprocessing, and the part of the configuration that no weight shows.
    """
    keys = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")
    configs = (config.text_config, config.vision_config)
    towers = [{key: getattr(tower, key, None) for key in keys} for tower in configs]
    settings = processor.to_dict().items()
    pixels = {key: value for key, value in settings if not key.startswith(("_", "image_processor"))}
    return json.dumps([config.model_type, towers, pixels], sort_keys=True, default=str)


def locate(checkpoint: str, pickles: bool = True) -> Path:
    """Return the checkpoint's folder. A hub name is downloaded into the hub's cache, or taken from there.

    Args:
        checkpoint: a folder or a hub name.
        pickles: whether to download `pytorch_model.bin` if there are no safetensors.

    Raises:
        EncoderError: there is no such folder, and the hub does not have it or cannot be reached.
    """
    here = checkpoint_folder(checkpoint)
    if here is not None:
        return here
    from huggingface_hub import snapshot_download

    described = ["*.json", "merges.txt", "*.model"]
    try:
        folder = Path(snapshot_download(checkpoint, allow_patterns=[*described, "*.safetensors"]))
        if pickles and not weight_files(folder):
            folder = Path(
                snapshot_download(checkpoint, allow_patterns=[*described, "pytorch_model*.bin"]),
            )
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no such folder, and the hub did not give it ({_first_line(error)}); check the "
            "name and the network, or download it elsewhere and give the folder"
        ) from error
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights: safetensors if there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files that determine the tokens of a class name."""
    patterns = ("*token*.json", "vocab.*", "merges.txt", "*.model")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


@lru_cache
def file_digest(file: Path, size: int, modified: int) -> bytes:
    """Compute the SHA-256 of a file; size and time of change are keys of the cache only."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def read_json(folder: Path, name: str, checkpoint: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Raises:
        EncoderError: the file is missing, or holds no JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no {name} in it; give a folder as transformers' save_pretrained writes it"
        ) from error
    except ValueError as error:
        raise EncoderError(f"checkpoint {checkpoint!r}: {name} is no JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise EncoderError(f"checkpoint {checkpoint!r}: {name} holds no JSON object; download it again")
    return content


def load_processor(folder: Path, processor_class: Any, checkpoint: str) -> Any:
    """Load a checkpoint's image processor.

    Raises:
        EncoderError: it is missing or damaged.
    """
    names = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5
    if not any((folder / name).exists() for name in names):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: neither {' nor '.join(names)} in it; save its image processor there"
        )
    try:
        return processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # Any failure of transformers here and below has its cause in the user's files.
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its image processor cannot be read ({_first_line(error)}); download it again"
        ) from error


def load_model(folder: Path, model_class: Any, checkpoint: str, dtype: torch.dtype) -> Any:
    """Load a checkpoint's model with both towers, without running code of it.

    Raises:
        EncoderError: weights are missing or damaged, or the image tower has no pooling head.
    """
    files = weight_files(folder)
    if not files:
        raise EncoderError(f"checkpoint {checkpoint!r}: no *.safetensors or pytorch_model.bin in it; download it again")
    try:
        model, loading = model_class.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its weights cannot be read ({_first_line(error)}); download it again"
        ) from error
    # transformers would fill missing weights with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: {len(missing)} weights are missing, {missing[0]} first; give a checkpoint "
            "with both towers and their projections"
        )
    if getattr(model.config.vision_config, "vision_use_head", True) is False:
        raise EncoderError(f"checkpoint {checkpoint!r}: its image tower has no pooling head; give one that has")
    return model


def load_tokenizer(folder: Path, checkpoint: str) -> Any:
    """Load a checkpoint's tokenizer.

    Raises:
        EncoderError: it is missing or damaged.
    """
    # Without these files transformers would make an empty tokenizer.
    if not any((folder / name).exists() for name in TOKENIZER_FILES):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no tokenizer in it ({', '.join(TOKENIZER_FILES)}); save it beside the weights"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its tokenizer cannot be read ({_first_line(error)}); if it is spiece.model, "
            "install sentencepiece and protobuf, else download it again"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
