"""Vision-language models of transformers as frozen encoders that score class names as answers.

A dialog is `start, picture, prompt, question, name of class c`, or with the prompt before the picture. The score of a
class is the mean log-likelihood of the tokens of its name, in nats a token. No token of the dialog attends to the
answer, so the dialog is computed once for all classes. The names follow as one tree: each token attends to the dialog,
to the tokens of its name before it, and to no other name. Both hold exactly, not approximately. All layers are those
of transformers, which gets the mask of the tree and the positions from here.

If the picture stands before the prompt, keys and values of all that precedes the prompt do not depend on it. They are
computed once and kept, see `sordino.encoders.cache`.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import DynamicCache

from sordino.encoders.base import CAPABILITIES, ClassTokens, DualEncoder
from sordino.encoders.cache import IMAGE_TOKENS, KEYS_VALUES, Kind
from sordino.encoders.capabilities import with_features
from sordino.encoders.clip_folder import file_digest, tokenizer_files
from sordino.encoders.generative.answers import Answers
from sordino.encoders.generative.families import Family
from sordino.encoders.generative.folder import description, open_checkpoint, weight_files
from sordino.encoders.generative.layout import Dialog, Layout
from sordino.encoders.generative.settings import GenerativeSettings
from sordino.encoders.linear import freeze
from sordino.encoders.names import check_names, warn_unknown
from sordino.errors import EncoderError, SordinoWarning, shortened

LARGEST_STATE = 32_000_000  # bytes of one picture's keys and values without a warning
PICTURES_AT_ONCE = 16  # in one pass of the image tower and of the language model


class GenerativeEncoder(DualEncoder):
    """A checkpoint of LLaVA, Idefics3, SmolVLM, Qwen2-VL or Qwen2.5-VL.

    It has no joint space: `image_features` and `text_features` are refused. Instead `image_state` reads a picture, and
    `likelihoods` scores class names.

    Attributes:
        kind: of the state that is kept of a picture.
        image_length: T, the number of tokens of a picture.
        layout: the tokens around picture and prompt.
        row_flops, head_flops: floating-point operations of one token through the layers of the language model, without
            attention, and through its head.
        vocabulary: V, the number of tokens that it predicts.
    """

    name = "generative"
    capabilities = CAPABILITIES["generative"]
    feature_width = 0
    logit_scale = 1.0

    def __init__(
        self,
        family: Family,
        model: Any,
        tokenizer: Any,
        processor: Any,
        settings: GenerativeSettings,
        folder: Path,
        label: str,
    ) -> None:
        """Take over a loaded transformers model (which is frozen in place); `label` names it in errors."""
        config = model.config
        self.label, self.folder, self.settings = label, folder, settings
        self.family: str = config.model_type
        self.device, self.dtype = model.device, model.dtype
        self._tokenizer = tokenizer
        template = settings.template or family.template
        self._dialog = Dialog(
            *(tokenizer, template, settings.question, family.image_text, family.image_token),
            *(config.image_token_id, settings.prompt_place == "after-image", label),
        )
        self.layout = self._dialog.layout()
        self._pictures = family.pictures(model, processor, settings.image_size)
        self._description = description(
            config, processor, template, settings.question, settings.prompt_place, self._pictures.size
        )
        freeze(model)
        self._model: Any = model
        self._decoder: Any = getattr(model.model, family.decoder)
        self._table: Tensor = model.get_input_embeddings().weight.detach()
        self.context_width = self._table.shape[1]
        text = config.text_config
        self._heads: int = text.num_key_value_heads
        self._layers: int = text.num_hidden_layers
        windows = [text.max_position_embeddings, getattr(text, "sliding_window", None)]
        self._limit = min(window for window in windows if window)
        weights = sum(part.numel() for part in self._decoder.layers.parameters())
        self.row_flops: float = 2.0 * weights
        self.head_flops: float = 2.0 * model.lm_head.weight.numel()
        self.vocabulary: int = len(model.lm_head.weight)
        self.image_length = self._measure()
        keeps_pairs = self.layout.image_first and settings.kept == "keys-values"
        self.kind: Kind = KEYS_VALUES if keeps_pairs else IMAGE_TOKENS
        if keeps_pairs:
            self._warn_of_size(text)

    @classmethod
    def load(
        cls,
        checkpoint: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        settings: GenerativeSettings | None = None,
    ) -> GenerativeEncoder:
        """Load a checkpoint from safetensors, without running code of it.

        Args:
            checkpoint: a folder as transformers saves it, or a hub name such as 'llava-hf/llava-1.5-7b-hf'.
            device, dtype: device and precision of the model.
            settings: the text around picture and prompt.

        Raises:
            EncoderError: there is no such checkpoint, it is of another family, or a part is missing or damaged.
            ConfigError: template or size of pictures do not fit.
        """
        folder, family, model, tokenizer, processor = open_checkpoint(checkpoint, dtype)
        chosen = settings or GenerativeSettings()
        return cls(family, model.to(device), tokenizer, processor, chosen, folder, checkpoint)

    @cached_property
    def fingerprint(self) -> str:  # type: ignore[override]
        """Compute a digest of weights, configuration, tokenizer, preprocessing, dialog and the prompt's place.

        The precision is not part of it: a prompt learned in float32 may be used in bfloat16.
        """
        digest = hashlib.sha256(self._description.encode())
        for file in (*weight_files(self.folder), *tokenizer_files(self.folder)):
            stat = file.stat()
            digest.update(file_digest(file, stat.st_size, stat.st_mtime_ns))
        return digest.hexdigest()

    def transform(self, image: Image.Image) -> Tensor:
        return self._pictures.transform(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        raise self._no_features("image_features")

    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        raise self._no_features("text_features")

    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        """Count the floating-point operations of one picture's scores under `contexts` prompts."""
        assert isinstance(classes, Answers)
        layout, nodes = self.layout, len(classes.tokens)
        spine = context_length + len(layout.end)
        before = len(layout.start) + len(layout.middle) + self.image_length
        kept = before if self.kind == KEYS_VALUES else 0
        rows = spine + nodes + before - kept
        attention = 4.0 * self._layers * self.context_width * rows * (rows + kept)
        return contexts * (rows * self.row_flops + attention + (1 + nodes) * self.head_flops)

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> Answers:
        tokens = [self._dialog.answer(name) for name in names]
        if compete:
            reader = f"checkpoint {self.label!r}"
            check_names(reader, "class name", names, tokens, [], [self._has_unknown(ids) for ids in tokens])
        return Answers.of(names, tokens, self._table)

    def embed(self, text: str) -> Tensor:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        unknown = [text] if self._has_unknown(ids) else []
        warn_unknown(f"checkpoint {self.label!r}", "context", unknown)
        return self._embedded(ids).to(torch.promote_types(self.dtype, torch.float32))

    @torch.no_grad()
    def image_state(self, pixels: Tensor, kind: Kind | None = None) -> Tensor:
        """Return what is kept of pictures: one row a token.

        Args:
            pixels: [B, 3, H, W].
            kind: IMAGE_TOKENS for the language model's tokens [B, T, E] of each picture, KEYS_VALUES for keys and
                values [B, S, W] of the S tokens before the prompt; None: `self.kind`.
        """
        pieces = pixels.to(self.device, self.dtype).split(PICTURES_AT_ONCE)
        tokens = torch.cat([self._pictures.tokens(piece) for piece in pieces])
        if (kind or self.kind) == IMAGE_TOKENS:
            return tokens
        return torch.cat([self._keys_values(piece) for piece in tokens.split(PICTURES_AT_ONCE)])

    def likelihoods(self, context: Tensor, state: Tensor, answers: Answers, kind: Kind | None = None) -> Tensor:
        """Return the mean log-likelihood [N, C] of each class name's tokens, differentiable in the prompt.

        Args:
            context: [N, M, E] the prompts.
            state: [N, T, E] or [N, S, W], of the picture that each prompt meets, as `image_state` returns it.
            answers: the C names.
            kind: of the state; None: `self.kind`.

        Raises:
            EncoderError: a dialog is longer than the language model takes.
        """
        self._check_length(context.shape[1], answers)
        x, cache, seen = self._spine(self.layout, context, state, kind or self.kind)
        nodes = self._embedded(answers.tokens).expand(len(x), -1, -1)
        depth = int(answers.depths.max()) if len(answers.depths) else 0
        positions = self._positions(self.layout, context.shape[1], depth)
        spine, ends = positions[..., seen : positions.shape[-1] - depth], positions[..., positions.shape[-1] - depth :]
        hidden = self._decoder(
            inputs_embeds=torch.cat([x, nodes], dim=1),
            attention_mask=self._mask(seen, x.shape[1], answers.sees),
            position_ids=torch.cat([spine, ends[..., answers.depths - 1]], dim=-1),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        logits = self._model.lm_head(hidden[:, x.shape[1] - 1 :])
        return answers.scores(logits.to(torch.promote_types(self.dtype, torch.float32)))

    @torch.no_grad()
    def generate(self, context: Tensor, pixels: Tensor, most: int, question: str | None = None) -> str:
        """Return a free answer: the most probable token each time, until the model ends it.

        Args:
            context: [M, E] the prompt.
            pixels: [3, H, W].
            most: the largest number of tokens.
            question: None: that of the settings.

        Raises:
            ConfigError: the question holds the image token.
            EncoderError: the dialog with the answer is longer than the language model takes.
        """
        tokens = list(self.greedy(context, pixels, most, question))
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True)).strip()

    @torch.no_grad()
    def greedy(self, context: Tensor, pixels: Tensor, most: int, question: str | None = None) -> Iterator[int]:
        """Yield the tokens of `generate`, without the one that ends the answer."""
        layout = self.layout if question is None else self._dialog.asking(question).layout()
        # Keys and values of all before the prompt hold no part of the question.
        x, cache, seen = self._spine(layout, context[None], self.image_state(pixels[None]), self.kind)
        cache = DynamicCache() if cache is None else cache
        positions = self._positions(layout, context.shape[0], most)
        self._check_positions(positions)
        ends = self._model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        place = seen
        mask: Tensor | None = self._mask(seen, x.shape[1], None)
        for _ in range(most):
            hidden = self._decoder(
                inputs_embeds=x,
                attention_mask=mask,
                position_ids=positions[..., place : place + x.shape[1]],
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
            place, mask = place + x.shape[1], None
            token = int(self._model.lm_head(hidden[:, -1]).argmax())
            if token in ends:
                return
            yield token
            x = self._embedded([token])[None]

    def _spine(
        self, layout: Layout, context: Tensor, state: Tensor, kind: Kind
    ) -> tuple[Tensor, DynamicCache | None, int]:
        """Return the embeddings [N, S, E] of the dialog that are to be computed, and the cache of those before."""
        start, middle, end = (self._embedded(ids) for ids in (layout.start, layout.middle, layout.end))
        context, state = context.to(self.device, self.dtype), state.to(self.device, self.dtype)
        if kind == KEYS_VALUES:
            return _joined([context, end]), self._cache(state), state.shape[1]
        parts = [start, state, middle, context, end] if layout.image_first else [start, context, middle, state, end]
        return _joined(parts), None, 0

    def _keys_values(self, tokens: Tensor) -> Tensor:
        """Return keys and values [B, S, W] of all tokens before the prompt; a row holds all layers'."""
        x = _joined([self._embedded(self.layout.start), tokens, self._embedded(self.layout.middle)])
        cache = DynamicCache()
        self._decoder(
            inputs_embeds=x,
            attention_mask=self._mask(0, x.shape[1], None),
            position_ids=self._positions(self.layout, 0, 0)[..., : x.shape[1]],
            past_key_values=cache,
            use_cache=True,
        )
        pairs = [torch.stack([layer.keys, layer.values], 1) for layer in cache.layers]
        return torch.stack(pairs, 1).permute(0, 4, 1, 2, 3, 5).flatten(2)  # [B, S, layers 2 heads d]

    def _cache(self, state: Tensor) -> DynamicCache:
        """Return transformers' cache of kept keys and values [N, S, W]."""
        pairs = state.unflatten(2, (self._layers, 2, self._heads, -1)).permute(2, 3, 0, 4, 1, 5)
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(pairs):
            cache.update(keys, values, layer)
        return cache

    def _embedded(self, ids: Sequence[int] | Tensor) -> Tensor:
        """Return token embeddings [n, E]."""
        known = torch.as_tensor(ids, dtype=torch.int64, device=self.device)
        if len(known) and int(known.max()) >= len(self._table):
            raise EncoderError(
                f"checkpoint {self.label!r}: its tokenizer gives token {int(known.max())}, its language model knows "
                f"{len(self._table)}: the tokenizer belongs to another model"
            )
        embedded: Tensor = self._model.get_input_embeddings()(known)
        return embedded

    def _positions(self, layout: Layout, context_length: int, answer_length: int) -> Tensor:
        """Return the positions of a whole dialog, of shape [..., 1, S]."""
        return self._pictures.positions(layout.is_image(self.image_length, context_length, answer_length))

    def _mask(self, seen: int, spine: int, sees: Tensor | None) -> Tensor:
        """Return the attention mask [1, 1, S + R, seen + S + R]: 0 where a token is attended to, else most negative."""
        nodes = 0 if sees is None else len(sees)
        allowed = torch.ones(spine + nodes, seen + spine + nodes, dtype=torch.bool, device=self.device)
        allowed = allowed.tril(seen)
        if sees is not None:
            allowed[spine:, seen + spine :] = sees
        least = torch.finfo(self.dtype).min
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill(~allowed, least)[None, None]

    def _warn_of_size(self, text: Any) -> None:
        """Warn if keys and values of one picture are so many that a data set of them would fill memory."""
        tokens = len(self.layout.start) + self.image_length + len(self.layout.middle)
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        size = 4 * tokens * 2 * self._layers * self._heads * width
        if size > LARGEST_STATE:
            warnings.warn(
                f"checkpoint {self.label!r}: keys and values of one picture take {size / 1e6:.0f} MB in memory and in "
                "the cache; set encoder.generative.kept = 'image-tokens' for the same scores in less",
                SordinoWarning,
                stacklevel=2,
            )

    def _measure(self) -> int:
        """Return the number of a picture's tokens, of a plain picture; this shows that all parts fit together.

        Raises:
            EncoderError: they do not.
        """
        plain = self.transform(Image.new("RGB", (64, 64), (128, 128, 128)))
        try:
            with torch.no_grad():
                tokens = self._pictures.tokens(plain[None].to(self.device, self.dtype))
        except (RuntimeError, ValueError) as error:
            raise EncoderError(
                f"checkpoint {self.label!r}: its image tower cannot read what its preprocessing makes "
                f"({str(error).splitlines()[0]}); mend preprocessor_config.json"
            ) from error
        if tokens.shape[2] != self.context_width:
            raise EncoderError(
                f"checkpoint {self.label!r}: its image tokens are {tokens.shape[2]} wide, and its language model takes "
                f"{self.context_width}; download it again"
            )
        return tokens.shape[1]

    def _no_features(self, caller: str) -> EncoderError:
        able = ", ".join(with_features())
        return EncoderError(
            f"encoder {self.name!r} has no features of images and class names, which {caller} needs; encoders that do: "
            f"{able}"
        )

    def _has_unknown(self, tokens: Sequence[int]) -> bool:
        return self._tokenizer.unk_token_id is not None and self._tokenizer.unk_token_id in tokens

    def _check_length(self, context_length: int, answers: Answers) -> None:
        layout, longest = self.layout, answers.mask.shape[1]
        rest = len(layout.start) + len(layout.middle) + len(layout.end) + self.image_length + longest
        if rest + context_length > self._limit:
            name = answers.names[int(answers.mask.sum(dim=1).argmax())]
            most = self._limit - rest
            remedy = f"use a context_length of at most {most}, or shorter names" if most > 0 else "shorten it"
            raise EncoderError(
                f"context_length = {context_length}: with the longest class name, {shortened(name)}, the dialog has "
                f"{rest + context_length} tokens and {self.label!r} takes {self._limit}: {remedy}"
            )

    def _check_positions(self, positions: Tensor) -> None:
        if positions.shape[-1] > self._limit:
            raise EncoderError(
                f"the dialog with its answer has {positions.shape[-1]} tokens and {self.label!r} takes {self._limit}: "
                "ask for a shorter answer"
            )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join tokens [S, E], which all rows share, and [N, S, E] to one sequence [N, S, E]."""
    rows = max(len(part) for part in parts if part.ndim == 3)
    return torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1)
