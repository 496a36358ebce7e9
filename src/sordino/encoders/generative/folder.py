"""Checkpoints of vision-language models as folders: read through transformers, from safetensors only, and checked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from sordino.encoders.clip_folder import load_tokenizer, locate, read_json
from sordino.encoders.generative.families import FAMILIES, Family
from sordino.errors import EncoderError

# Settings of a configuration that no weight shows and that change what the model computes.
TOP = ("model_type", "vision_feature_layer", "vision_feature_select_strategy", "scale_factor", "projector_hidden_act")
PARTS = (
    *("model_type", "hidden_act", "num_attention_heads", "num_key_value_heads", "num_heads", "head_dim"),
    *("rms_norm_eps", "layer_norm_eps", "rope_parameters", "patch_size", "spatial_merge_size", "window_size"),
    *("fullatt_block_indexes",),
)


def open_checkpoint(checkpoint: str, dtype: torch.dtype) -> tuple[Path, Family, Any, Any, Any]:
    """Return a checkpoint's folder, family, model, tokenizer and image processor; no code of it is run.

    Raises:
        EncoderError: there is no such checkpoint, it is of another family, or a part is missing or damaged.
    """
    folder = locate(checkpoint, pickles=False)
    kind = read_json(folder, "config.json", checkpoint).get("model_type")
    if kind not in FAMILIES:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: model_type is {kind!r}; encoder 'generative' loads {', '.join(FAMILIES)}: "
            "name a vision-language checkpoint of one of these"
        )
    family = FAMILIES[kind]
    if not weight_files(folder):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no *.safetensors in it, and other files of weights may run code; save it with "
            "transformers' save_pretrained"
        )
    tokenizer = load_tokenizer(folder, checkpoint)
    processor = _load_processor(folder, checkpoint)
    return folder, family, _load_model(folder, family, checkpoint, dtype), tokenizer, processor


def weight_files(folder: Path) -> list[Path]:
    """Return the files that hold the weights, all in safetensors format."""
    return sorted(folder.glob("*.safetensors"))


def description(config: Any, processor: Any, *more: Any) -> str:
    """Describe the settings that determine scores beside the weights, for the encoder's fingerprint."""
    parts = [{key: getattr(part, key, None) for key in PARTS} for part in (config.text_config, config.vision_config)]
    top = {key: getattr(config, key, None) for key in TOP}
    pixels = {key: value for key, value in processor.to_dict().items() if not key.startswith(("_", "image_processor"))}
    return json.dumps([top, parts, pixels, *more], sort_keys=True, default=str)


def _load_processor(folder: Path, checkpoint: str) -> Any:
    names = ("preprocessor_config.json", "processor_config.json")
    if not any((folder / name).exists() for name in names):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: neither {' nor '.join(names)} in it; save its image processor there"
        )
    try:
        # On PIL, as torchvision's own resizing changes from one release to the next.
        return transformers.AutoImageProcessor.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, backend="pil"
        )
    except Exception as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its image processor cannot be read ({_first_line(error)}); download it again"
        ) from error


def _load_model(folder: Path, family: Family, checkpoint: str, dtype: torch.dtype) -> Any:
    try:
        model, loading = getattr(transformers, family.model_class).from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except Exception as error:
        # Any failure of transformers here has its cause in the user's files.
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its weights cannot be read ({_first_line(error)}); download it again"
        ) from error
    # transformers would fill missing weights with random numbers.
    if missing := sorted(loading["missing_keys"]):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: {len(missing)} weights are missing, {missing[0]} first; download it again"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
