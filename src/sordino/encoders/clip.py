"""CLIP and SigLIP checkpoints as frozen dual encoders, from a folder or from the Hugging Face hub.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021 (arXiv 2103.00020).
Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023 (arXiv 2303.15343).
SigLIP 2 checkpoints of a fixed resolution have SigLIP's architecture and load as such.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from sordino.encoders.base import CAPABILITIES, ClassTokens, DualEncoder
from sordino.encoders.clip_folder import (
    FAMILIES,
    description,
    file_digest,
    load_model,
    load_processor,
    load_tokenizer,
    locate,
    read_json,
    tokenizer_files,
    weight_files,
)
from sordino.encoders.linear import freeze
from sordino.encoders.names import check_names, warn_unknown
from sordino.encoders.pixels import bounded, rgb, shrunk
from sordino.encoders.shared_prefix import (
    TextTower,
    causal_features,
    causal_flops,
    padded_features,
    padded_flops,
)
from sordino.encoders.visual_prompts import ImageTower
from sordino.errors import EncoderError, shortened

CARRIER = "a"  # a word that stands for the context when the tokens of a class name are determined


class ClipEncoder(DualEncoder):
    """A CLIP or SigLIP checkpoint.

    CLIP's text tower is causal: the prefix is computed once per context and shared by all classes,
    see `sordino.encoders.shared_prefix`. SigLIP's is bidirectional and pools the last of all its
    padded positions. Nothing can be shared there, so it costs the full pass. SigLIP's bias on the
    logits is left out: it is the same for every class and cancels in a softmax.

    `patch_features` of CLIP are its patch tokens through the post layer norm and the projection
    that the model trains for its class token. SigLIP pools patches by attention. There a patch's
    feature is the pooling head's output for an image that has this patch only. Attention over one
    token is the identity on its value, which is in the joint space.
    """

    name = "clip"
    capabilities = CAPABILITIES["clip"]

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        processor: Any,
        folder: Path,
        label: str,
    ) -> None:
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
        self._text = TextTower.of(
            model,
            self._embeddings(self._start),
            self._embeddings([self._padding])[0],
        )
        self._description = description(config, processor)
        freeze(model)
        self._vision: Any = model.vision_model
        self._projection: Any = model.visual_projection if self.family == "clip" else nn.Identity()
        self.context_width = self._tokens.shape[1]
        self.feature_width = self._text.head.weight.shape[0]
        vision = config.vision_config
        self.text_layers = len(self._text.layers)
        self.image_width, self.image_layers = vision.hidden_size, vision.num_hidden_layers

    @classmethod
    def load(
        cls,
        checkpoint: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> ClipEncoder:
        """Load a checkpoint without running code of it: safetensors, or else only tensors from a pickle.

        Args:
            checkpoint: a folder as transformers saves it, or a hub name such as
                'openai/clip-vit-base-patch16'.
            device, dtype: device and precision of the towers.

            Raises:
            EncoderError: there is no such checkpoint, it is no CLIP or SigLIP, or a part of it is
                missing or damaged.
        """
        folder = locate(checkpoint)
        family = read_json(folder, "config.json", checkpoint).get("model_type")
        if family not in FAMILIES:
            raise EncoderError(
                f"checkpoint {checkpoint!r}: model_type is {family!r}; encoder 'clip' loads {', '.join(FAMILIES)}: "
                "name a CLIP or SigLIP checkpoint with both towers"
            )
        model_class, processor_class = FAMILIES[family]
        processor = load_processor(folder, processor_class, checkpoint)
        tokenizer = load_tokenizer(folder, checkpoint)
        model = load_model(folder, model_class, checkpoint, dtype)
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
        """Compute a digest of the weights, the relevant configuration, the tokenizer, and the preprocessing.

        The precision is not part of it: a prompt learned in float32 may be used in bfloat16.
        """
        digest = hashlib.sha256(self._description.encode())
        for file in (*weight_files(self.folder), *tokenizer_files(self.folder)):
            stat = file.stat()
            digest.update(file_digest(file, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()

    def transform(self, image: Image.Image) -> Tensor:
        pixels: Tensor = self._processor(
            images=rgb(self._bounded(image)),
            return_tensors="pt",
        ).pixel_values[0]
        return pixels.float()

    def _bounded(self, image: Image.Image) -> Image.Image:
        """Cut or shrink a picture that is so long that scaling it would fill memory."""
        size = getattr(self._processor, "size", None) or {}
        if "shortest_edge" in size:  # the processor then cuts out the middle
            return bounded(image)
        if "height" in size and "width" in size:  # the processor then squeezes the whole picture
            return shrunk(image, max(size["height"], size["width"]))
        return image

    def image_features(self, pixels: Tensor) -> Tensor:
        # Layers that backward may recompute, so that many images fit into memory. They have fewer kernels, but weights
        # of their own: an accelerator's time is worth that memory.
        if pixels.requires_grad or self.device.type != "cpu":
            tower = self.image_tower
            return tower.features(tower.hidden(pixels.to(self.device), self.image_layers)[None])[0]
        pooled = self._vision(pixel_values=pixels.to(self.device, self.dtype)).pooler_output
        return self._unit(self._projection(pooled))

    def patch_features(self, pixels: Tensor) -> Tensor:
        hidden = self._vision(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        # The first token is the class token; the post norm is not yet applied.
        if self.family == "clip":
            return self._unit(self._projection(self._vision.post_layernorm(hidden[:, 1:])))
        alone = self._vision.head(hidden.flatten(0, 1)[:, None])
        return self._unit(alone.view(*hidden.shape[:2], -1))

    @cached_property
    def image_tower(self) -> ImageTower:
        """Return the image tower for prompts inside of it. It has its own weights, so it is created on first use."""
        with torch.inference_mode(False):  # it is kept, and a later pass may want gradients
            return ImageTower.of(self._vision, lambda pooled: self._unit(self._projection(pooled)))

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        whole = [self._tokens_of(name) for name in names]
        suffixes = [self._suffix(name, tokens) for name, tokens in zip(names, whole, strict=True)]
        if compete:
            # CLIP's end token is its unknown one too, so it is left out.
            unknown = [self._has_unknown(tokens[:-1]) for tokens in whole]
            reader = f"checkpoint {self.label!r}"
            check_names(reader, "class name", names, suffixes, self._tokens_of(""), unknown)
        length = max(map(len, suffixes), default=0)
        ids = [token for suffix in suffixes for token in suffix + [self._padding] * (length - len(suffix))]
        mask = torch.tensor([[at < len(suffix) for at in range(length)] for suffix in suffixes])
        embeddings = self._embeddings(ids).view(len(names), length, -1)
        return ClassTokens(tuple(names), embeddings, mask.to(self.device))

    def embed(self, text: str) -> Tensor:
        tokens: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        warn_unknown(
            f"checkpoint {self.label!r}",
            "context",
            [text] if self._has_unknown(tokens) else [],
        )
        return self._embeddings(tokens)

    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Compute unit-norm features [..., C, D]; see `DualEncoder.text_features`.

        Raises:
            EncoderError: a sentence would be longer than the text tower's position table.
        """
        return self.deep_text_features(context[..., None, :, :], classes)

    def deep_text_features(self, contexts: Tensor, classes: ClassTokens, unit: bool = True) -> Tensor:
        self._check_length(contexts.shape[-2], classes)
        flat_shape = (math.prod(contexts.shape[:-3]), *contexts.shape[-3:])
        flat = contexts.to(self.device, self.dtype).reshape(flat_shape)
        compute = causal_features if self.family == "clip" else padded_features
        features = compute(self._text, flat, classes)
        features = self._unit(features) if unit else features.to(torch.promote_types(features.dtype, torch.float32))
        return features.view(*contexts.shape[:-3], *features.shape[1:])

    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        if self.family == "clip":
            return causal_flops(self._text, contexts, context_length, classes)
        return padded_flops(self._text, contexts, classes)

    def _unit(self, features: Tensor) -> Tensor:
        """Normalize in float32, or in float64 if the towers run in it (for checks of gradients)."""
        precision = torch.promote_types(features.dtype, torch.float32)
        return F.normalize(features.to(precision), dim=-1)

    def _embeddings(self, ids: list[int]) -> Tensor:
        if ids and max(ids) >= len(self._tokens):
            raise EncoderError(
                f"checkpoint {self.label!r}: its tokenizer gives token {max(ids)}, its text tower knows "
                f"{len(self._tokens)}: the tokenizer belongs to another model"
            )
        rows = self._tokens[torch.tensor(ids, dtype=torch.long, device=self.device)]
        return rows.to(torch.promote_types(self.dtype, torch.float32))

    def _start_tokens(self) -> list[int]:
        """Return the special tokens that the tokenizer sets before a sentence."""
        bare: list[int] = self._tokenizer(CARRIER, add_special_tokens=False).input_ids
        framed: list[int] = self._tokenizer(CARRIER).input_ids
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start : start + len(bare)] == bare:
                return framed[:start]
        raise EncoderError(f"checkpoint {self.label!r}: its tokenizer cannot read the word {CARRIER!r}: it is damaged")

    def _tokens_of(self, name: str) -> list[int]:
        """Return the tokens that follow the context in a sentence."""
        before = len(self._start) + len(
            self._tokenizer(CARRIER, add_special_tokens=False).input_ids,
        )
        tokens: list[int] = self._tokenizer(f"{CARRIER} {name}.").input_ids[before:]
        return tokens

    def _has_unknown(self, tokens: Sequence[int]) -> bool:
        return self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in tokens

    def _suffix(self, name: str, suffix: list[int]) -> list[int]:
        """Cut a sentence's tokens after the one whose state is the sentence's feature."""
        if self.family != "clip":
            return suffix
        # Checkpoints of before 2023 have eos_token_id 2 in their configuration, wrongly.
        # transformers then takes the sentence's highest token, which in CLIP's vocabulary is the
        # end token. The same is done here.
        end = max(suffix) if self._end_id == 2 else self._end_id
        if end not in suffix:
            raise EncoderError(
                f"checkpoint {self.label!r}: class name {name!r} ends with token {suffix[-1]}, the text tower looks "
                f"for eos_token_id {end}: the tokenizer belongs to another model"
            )
        return suffix[: suffix.index(end) + 1]

    def _check_length(self, context_length: int, classes: ClassTokens) -> None:
        limit, start, longest = len(self._text.positions), len(self._start), classes.mask.shape[1]
        length = start + context_length + longest
        if length > limit:
            name = classes.names[classes.lengths.index(max(classes.lengths))]
            most = limit - start - longest
            remedy = f"use a context_length of at most {most}, or shorter names" if most > 0 else "shorten it"
            raise EncoderError(
                f"context_length = {context_length}: with the longest class name, {shortened(name)}, the sentence has "
                f"{length} tokens and {self.label!r} takes {limit}: {remedy}"
            )
