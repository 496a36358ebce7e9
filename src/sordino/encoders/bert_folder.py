"""A text tower as a folder: weights, configuration and tokenizer of a BERT checkpoint, as transformers saves them.

A model of a form that is not supported is refused, as it would give wrong features without notice.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from sordino.errors import EncoderError

# Keys of a text tower's config.json that must be absent or have this value.
BERT_FORM = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
}
# Keys that must be present, and their types.
_NUMBERS: dict[str, Any] = {
    "num_attention_heads": int,
    "layer_norm_eps": float,
    "num_hidden_layers": int,
}
_EMBEDDING_KINDS = ("word", "position", "token_type")
EMBEDDINGS = tuple(f"embeddings.{kind}_embeddings.weight" for kind in _EMBEDDING_KINDS)
MARKS = ("[CLS]", "[SEP]")  # tokens around a sentence
SHORT = {  # names of a layer's modules, by ours
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norm2": "output.LayerNorm",
}


def bert_weights(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Read weights of a BERT folder from `model.safetensors`, under the names of transformers' `BertModel`.

    A prefix of names, such as "bert." of models with a head, is removed. The older names gamma and
    beta of norms are replaced.

    Args:
        folder: the folder of the file.
        names: the weights that are needed; others are left out.

    Raises:
        EncoderError: the file is missing or damaged, or lacks one of the weights.
    """
    file = folder / "model.safetensors"
    try:
        stored = load_file(file)
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"{file} is missing or damaged ({error}); save the model with transformers' save_pretrained, in one file"
        ) from None
    for old, new in (("gamma", "weight"), ("beta", "bias")):
        stored = {_renamed(name, f"LayerNorm.{old}", f"LayerNorm.{new}"): part for name, part in stored.items()}
    words = EMBEDDINGS[0]
    prefixes = {name.removesuffix(words) for name in stored if name == words or name.endswith(f".{words}")}
    prefix = prefixes.pop() if len(prefixes) == 1 else ""  # with two towers, neither is chosen
    missing = [name for name in names if prefix + name not in stored]
    if missing:
        raise EncoderError(
            f"{file} lacks {prefix}{missing[0]} (of {len(missing)} missing), which a BERT model has",
        )
    return {name: stored[prefix + name] for name in names}


def _renamed(name: str, old: str, new: str) -> str:
    return name.removesuffix(old) + new if name.endswith(old) else name


def tower_names(depth: int) -> list[str]:
    """Return the names of the weights that a tower of `depth` layers needs."""
    parts = [*(f"attention.self.{part}" for part in ("query", "key", "value")), *SHORT.values()]
    layers = (f"encoder.layer.{index}.{part}" for index in range(depth) for part in parts)
    modules = ["embeddings.LayerNorm", *layers]
    return [*EMBEDDINGS, *(f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))]


def bert_form(folder: Path) -> tuple[int, float, int]:
    """Read a text tower's heads, epsilon of the norms, and number of layers from `config.json`.

    Raises:
        EncoderError: the file is missing or malformed, or describes another form than `BERT_FORM`.
    """
    file = folder / "config.json"
    try:
        config: dict[str, Any] = dict(json.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, TypeError) as error:
        raise EncoderError(f"{file} is missing or malformed ({error}); a checkpoint comes with it") from None
    for key, supported in BERT_FORM.items():
        value = config.get(key, supported)
        if value != supported:
            raise EncoderError(f"{file}: {key} = {value!r}: only {supported!r} is supported; take another model")
    for key, kind in _NUMBERS.items():
        value = config.get(key)
        if not isinstance(value, kind) or value <= 0:
            raise EncoderError(
                f"{file}: {key} = {value!r}: must be a positive number, as BERT models have it",
            )
    return config["num_attention_heads"], config["layer_norm_eps"], config["num_hidden_layers"]


def bert_tokenizer(folder: Path, words: int) -> Tokenizer:
    """Load the tokenizer of a BERT folder, without padding and truncation.

    Args:
        folder: the folder of `tokenizer.json`.
        words: the number of embeddings.

    Raises:
        EncoderError: the file is missing or damaged, has no start or end token, or does not fit the
            embeddings.
    """
    file = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises nothing more special
        raise EncoderError(
            f"{file} is missing or damaged ({error}); save the tokenizer with transformers' save_pretrained"
        ) from None
    for mark in MARKS:
        if tokenizer.token_to_id(mark) is None:
            raise EncoderError(f"{file} has no token {mark}, as a BERT model's has")
    largest = max(tokenizer.get_vocab().values())
    if largest >= words:
        raise EncoderError(
            f"{file} has a token {largest}, and model.safetensors embeddings for {words}; they must fit",
        )
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer
