"""CLIP and SigLIP checkpoints as frozen dual encoders, from a folder or from the Hugging Face hub.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv 2103.00020).
Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023 (arXiv 2303.15343).
SigLIP 2 checkpoints of a fixed resolution have SigLIP's architecture and load as such.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.linear import freeze
from sordino.encoders.names import check_names, warn_unknown
from sordino.encoders.pixels import bounded, rgb, shrunk
from sordino.encoders.shared_prefix import TextTower, causal_features, causal_flops, padded_features, padded_flops
from sordino.encoders.visual_prompts import ImageTower
from sordino.errors import EncoderError
from sordino.files import user_path

# The processors on PIL: they need no torchvision, whose own resizing changes from one release to the next.
FAMILIES = {"clip": (CLIPModel, CLIPImageProcessorPil), "siglip": (SiglipModel, SiglipImageProcessorPil)}
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
CARRIER = "a"  # a word that stands for the context when a class name is tokenized as what follows it


class ClipEncoder(DualEncoder):
    """A CLIP or SigLIP checkpoint.

    CLIP's text tower is causal: the prefix is computed once per context and shared by all classes, see
    `sordino.encoders.shared_prefix`. SigLIP's is bidirectional and pools the last of all its padded positions, so that
    nothing can be shared; it costs the full pass. SigLIP's bias on the logits is left out: it is the same for every
    class and cancels in a softmax.

    `patch_features` of CLIP are its patch tokens through the post layer norm and the projection that the model trains
    for its class token. SigLIP pools patches by attention; there a patch's feature is what the pooling head makes of an
    image that has this patch only (attention over one token is the identity on its value), which is in the joint space.
    """

    name = "clip"
    capabilities = frozenset({Capability.PATCHES, Capability.PIXEL_GRADIENTS, Capability.VISUAL_PROMPTS})

    def __init__(self, model: Any, tokenizer: Any, processor: Any, folder: Path, label: str) -> None:
        """Take over a loaded transformers model (which is frozen in place); `label` names it in errors."""
        config = model.config
        self.family: str = config.model_type
        self.label, self.folder = label, folder
        self.device, self.dtype = model.logit_scale.device, model.logit_scale.dtype
        self.logit_scale = float(model.logit_scale.detach().double().exp())
        self._tokenizer, self._processor = tokenizer, processor
        self._padding: int = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._start = self._start_tokens()
        self._end_id: int = config.text_config.eos_token_id
        self._tokens: Tensor = model.text_model.embeddings.token_embedding.weight.detach()
        self._text = TextTower.of(model, self._embeddings(self._start), self._embeddings([self._padding])[0])
        self._description = _description(config, processor)
        freeze(model)
        self._vision: Any = model.vision_model
        self._projection: Any = model.visual_projection if self.family == "clip" else nn.Identity()
        self.context_width = self._tokens.shape[1]
        self.feature_width = self._text.head.weight.shape[0]
        vision = config.vision_config
        self.image_width, self.image_layers = vision.hidden_size, vision.num_hidden_layers

    @classmethod
    def load(cls, checkpoint: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ClipEncoder:
        """Load a checkpoint; no code of it is run (safetensors, or else tensors only from a pickle).

        Args:
            checkpoint: a folder as transformers saves it, or a hub name such as 'openai/clip-vit-base-patch16'.
            device, dtype: where and in what precision the towers run.

        Raises:
            EncoderError: nothing is there, it is no CLIP or SigLIP, or a part of it is missing or damaged.
        """
        folder = _locate(checkpoint)
        family = _read_json(folder, "config.json", checkpoint).get("model_type")
        if family not in FAMILIES:
            raise EncoderError(
                f"checkpoint {checkpoint!r}: model_type is {family!r}; encoder 'clip' loads {', '.join(FAMILIES)}: "
                "name a CLIP or SigLIP checkpoint with both towers"
            )
        model_class, processor_class = FAMILIES[family]
        processor = _load_processor(folder, processor_class, checkpoint)
        tokenizer = _load_tokenizer(folder, checkpoint)
        model = _load_model(folder, model_class, checkpoint, dtype)
        encoder = cls(model.to(device), tokenizer, processor, folder, checkpoint)
        size = model.config.vision_config.image_size
        made = tuple(encoder.transform(Image.new("RGB", (3, 2))).shape[1:])
        if made != (size, size):
            raise EncoderError(
                f"checkpoint {checkpoint!r}: its preprocessing makes {made[0]}x{made[1]} pixels, its image tower takes "
                f"{size}x{size}: mend size and crop_size in preprocessor_config.json"
            )
        return encoder

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Digest of the weights, of what the configuration adds to them, of the tokenizer, and of the preprocessing.

        The precision is not part of it: a prompt learned in float32 may be used in bfloat16.
        """
        digest = hashlib.sha256(self._description.encode())
        for file in (*_weight_files(self.folder), *_tokenizer_files(self.folder)):
            stat = file.stat()
            digest.update(_file_digest(file, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()

    def transform(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._processor(images=rgb(self._bounded(image)), return_tensors="pt").pixel_values[0]
        return pixels.float()

    def _bounded(self, image: Image.Image) -> Image.Image:
        """The picture, cut or shrunk first where it is so long that scaling it would fill memory."""
        size = getattr(self._processor, "size", None) or {}
        if "shortest_edge" in size:  # and then the middle of it is cut out
            return bounded(image)
        return shrunk(image, max(size["height"], size["width"])) if "height" in size and "width" in size else image

    def image_features(self, pixels: Tensor) -> Tensor:
        if pixels.requires_grad:  # by way of layers that backward may recompute, so that many images fit into memory
            tower = self.image_tower
            return tower.features(tower.forward(tower.embed(pixels.to(self.device))[None], 0, self.image_layers))[0]
        pooled = self._vision(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return self._unit(self._projection(pooled))

    def patch_features(self, pixels: Tensor) -> Tensor:
        hidden = self._vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        if self.family == "clip":  # the first token is the class token; the post norm is not yet applied
            return self._unit(self._projection(self._vision.post_layernorm(hidden[:, 1:])))
        alone = self._vision.head(hidden.flatten(0, 1)[:, None])
        return self._unit(alone.view(*hidden.shape[:2], -1))

    @cached_property
    def image_tower(self) -> ImageTower:
        """The image tower for prompts inside of it, with weights of its own: made only for methods that ask for it."""
        return ImageTower.of(self._vision, lambda pooled: self._unit(self._projection(pooled)))

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        whole = [self._tokens_of(name) for name in names]
        suffixes = [self._suffix(name, tokens) for name, tokens in zip(names, whole, strict=True)]
        if compete:
            unknown = [self._has_unknown(tokens[:-1]) for tokens in whole]  # CLIP's end token is its unknown one too
            check_names(f"checkpoint {self.label!r}", "class name", names, suffixes, self._tokens_of(""), unknown)
        length = max(map(len, suffixes), default=0)
        ids = [token for suffix in suffixes for token in suffix + [self._padding] * (length - len(suffix))]
        mask = torch.tensor([[at < len(suffix) for at in range(length)] for suffix in suffixes])
        embeddings = self._embeddings(ids).view(len(names), length, -1)
        return ClassTokens(tuple(names), embeddings, mask.to(self.device))

    def embed(self, text: str) -> Tensor:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        warn_unknown(f"checkpoint {self.label!r}", "context", [text] if self._has_unknown(tokens) else [])
        return self._embeddings(tokens)

    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """See `DualEncoder.text_features`.

        Raises:
            EncoderError: a sentence would be longer than the text tower's position table.
        """
        self._check_length(context.shape[-2], classes)
        flat = context.to(self.device, self.dtype).reshape(math.prod(context.shape[:-2]), *context.shape[-2:])
        compute = causal_features if self.family == "clip" else padded_features
        features = self._unit(compute(self._text, flat, classes))
        return features.view(*context.shape[:-2], *features.shape[1:])

    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        if self.family == "clip":
            return causal_flops(self._text, contexts, context_length, classes)
        return padded_flops(self._text, contexts, classes)

    def _unit(self, features: Tensor) -> Tensor:
        """Unit norm, in float32 (float64 where the towers run in it, for checks of gradients)."""
        return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)

    def _embeddings(self, ids: list[int]) -> Tensor:
        if ids and max(ids) >= len(self._tokens):
            raise EncoderError(
                f"checkpoint {self.label!r}: its tokenizer gives token {max(ids)}, its text tower knows "
                f"{len(self._tokens)}: the tokenizer belongs to another model"
            )
        rows = self._tokens[torch.tensor(ids, dtype=torch.long, device=self.device)]
        return rows.to(torch.promote_types(self.dtype, torch.float32))

    def _start_tokens(self) -> list[int]:
        """The special tokens that the tokenizer sets before a sentence."""
        bare: list[int] = self._tokenizer(CARRIER, add_special_tokens=False).input_ids
        framed: list[int] = self._tokenizer(CARRIER).input_ids
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start : start + len(bare)] == bare:
                return framed[:start]
        raise EncoderError(f"checkpoint {self.label!r}: its tokenizer cannot read the word {CARRIER!r}: it is damaged")

    def _tokens_of(self, name: str) -> list[int]:
        """What follows the context in a sentence."""
        before = len(self._start) + len(self._tokenizer(CARRIER, add_special_tokens=False).input_ids)
        tokens: list[int] = self._tokenizer(f"{CARRIER} {name}.").input_ids[before:]
        return tokens

    def _has_unknown(self, tokens: Sequence[int]) -> bool:
        return self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in tokens

    def _suffix(self, name: str, suffix: list[int]) -> list[int]:
        """A sentence's tokens after the context, up to the one whose state is the sentence's feature."""
        if self.family != "clip":
            return suffix
        # Checkpoints of before 2023 have eos_token_id 2 in their configuration, wrongly; transformers then takes the
        # sentence's highest token, which in CLIP's vocabulary is the end token, and so do we.
        end = max(suffix) if self._end_id == 2 else self._end_id
        if end not in suffix:
            raise EncoderError(
                f"checkpoint {self.label!r}: class name {name!r} ends with token {suffix[-1]}, the text tower looks "
                f"for eos_token_id {end}: the tokenizer belongs to another model"
            )
        return suffix[: suffix.index(end) + 1]

    def _check_length(self, context_length: int, classes: ClassTokens) -> None:
        limit, start, longest = len(self._text.positions), len(self._start), classes.mask.shape[1]
        if start + context_length + longest > limit:
            name = classes.names[int(classes.mask.sum(dim=1).argmax())]
            raise EncoderError(
                f"context_length = {context_length}: with the longest class name, {name!r}, the sentence has "
                f"{start + context_length + longest} tokens and {self.label!r} takes {limit}: use a context_length of "
                f"at most {limit - start - longest}, or shorter names"
            )


def _description(config: Any, processor: Any) -> str:
    """What decides features beside the weights: the preprocessing, and what of the configuration no weight shows."""
    keys = ("hidden_act", "num_attention_heads", "layer_norm_eps", "eos_token_id")
    towers = [{key: getattr(tower, key, None) for key in keys} for tower in (config.text_config, config.vision_config)]
    pixels = {key: value for key, value in processor.to_dict().items() if not key.startswith(("_", "image_processor"))}
    return json.dumps([config.model_type, towers, pixels], sort_keys=True, default=str)


def _locate(checkpoint: str) -> Path:
    """The checkpoint's folder; a hub name is downloaded into (or found in) the hub's cache."""
    folder = user_path(checkpoint, "encoder.checkpoint")
    if folder.is_dir():
        return folder
    if folder.is_absolute() or checkpoint.startswith((".", "~")) or checkpoint.count("/") != 1:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no such folder; give a folder with config.json, or a hub name 'owner/model'"
        )
    from huggingface_hub import snapshot_download

    described = ["*.json", "merges.txt", "*.model"]
    try:
        folder = Path(snapshot_download(checkpoint, allow_patterns=[*described, "*.safetensors"]))
        if not _weight_files(folder):
            folder = Path(snapshot_download(checkpoint, allow_patterns=[*described, "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"checkpoint {checkpoint!r}: no such folder, and the hub did not give it ({_first_line(error)}); check the "
            "name and the network, or download it elsewhere and give the folder"
        ) from error
    return folder


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: safetensors where there are any."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def _tokenizer_files(folder: Path) -> list[Path]:
    """The files that decide how a class name is split into tokens."""
    patterns = ("*token*.json", "vocab.*", "merges.txt", "*.model")
    return sorted({file for pattern in patterns for file in folder.glob(pattern)})


@lru_cache
def _file_digest(file: Path, size: int, modified: int) -> bytes:
    """sha256 of a file; size and time of change are there for the cache only."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


def _read_json(folder: Path, name: str, checkpoint: str) -> dict[str, Any]:
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


def _load_processor(folder: Path, processor_class: Any, checkpoint: str) -> Any:
    names = ("preprocessor_config.json", "processor_config.json")  # the second since transformers 5
    if not any((folder / name).exists() for name in names):
        raise EncoderError(
            f"checkpoint {checkpoint!r}: neither {' nor '.join(names)} in it; save its image processor there"
        )
    try:
        return processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever transformers stumbles on lies in the user's files, here and below
        raise EncoderError(
            f"checkpoint {checkpoint!r}: its image processor cannot be read ({_first_line(error)}); download it again"
        ) from error


def _load_model(folder: Path, model_class: Any, checkpoint: str, dtype: torch.dtype) -> Any:
    files = _weight_files(folder)
    if not files:
        raise EncoderError(f"checkpoint {checkpoint!r}: no *.safetensors or pytorch_model.bin in it; download it again")
    try:
        model, found = model_class.from_pretrained(
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
    if missing := sorted(found["missing_keys"]):  # transformers would fill them with random numbers
        raise EncoderError(
            f"checkpoint {checkpoint!r}: {len(missing)} weights are missing, {missing[0]} first; give a checkpoint "
            "with both towers and their projections"
        )
    if getattr(model.config.vision_config, "vision_use_head", True) is False:
        raise EncoderError(f"checkpoint {checkpoint!r}: its image tower has no pooling head; give one that has")
    return model


def _load_tokenizer(folder: Path, checkpoint: str) -> Any:
    if not any((folder / name).exists() for name in TOKENIZER_FILES):  # transformers would make an empty one
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
