"""A BERT text tower for soft tokens: its tokenizer, its embeddings, and a forward pass that computes no padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from sordino.encoders.base import ClassTokens
from sordino.encoders.bert_folder import (
    EMBEDDINGS,
    SHORT,
    bert_form,
    bert_tokenizer,
    bert_weights,
    tower_names,
)
from sordino.encoders.frozen.attention import GroupedAttention
from sordino.encoders.frozen.blocks import attention_for
from sordino.encoders.names import check_names, warn_unknown
from sordino.encoders.transformer import GELU, Layer, Linear, Norm
from sordino.errors import EncoderError

UNKNOWN = "[UNK]"


class Embedder:
    """A tokenizer with the embeddings of its tokens and of positions: a text tower before its first layer.

    Attributes:
        tokenizer: without padding and truncation.
        words: [V, E] embeddings of tokens.
        positions: [P, E], with the embedding of token type 0, which every token here has.
        width: E.
    """

    def __init__(self, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
        """Take BERT weights under transformers' names; only embeddings are used."""
        self.tokenizer = tokenizer
        self.words, positions, token_types = (weights[name] for name in EMBEDDINGS)
        self.positions = positions + token_types[0]
        self.width = self.words.shape[1]

    @classmethod
    def of_folder(cls, folder: Path, device: torch.device) -> Embedder:
        """Read a BERT folder, of which `model.safetensors` may hold the embeddings alone, and `tokenizer.json`.

        Raises:
            EncoderError: a file is missing or damaged, or lacks an embedding or a token.
        """
        weights = bert_weights(folder, EMBEDDINGS)
        on_device = {name: part.to(device, torch.float32) for name, part in weights.items()}
        return Embedder(on_device, bert_tokenizer(folder, len(weights[EMBEDDINGS[0]])))

    def tokens(self, text: str) -> list[int]:
        """Return a text's tokens, without start or end."""
        numbers: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return numbers

    def embed(self, text: str) -> Tensor:
        """Return the token embeddings [M, E] of a text, without positions, start or end token."""
        numbers = torch.tensor(self.tokens(text), dtype=torch.long, device=self.words.device)
        return self.words[numbers]

    def knows(self, text: str) -> bool:
        """Return true if no word of a text becomes the unknown token."""
        return self.tokenizer.token_to_id(UNKNOWN) not in self.tokens(text)

    def check_names(
        self,
        what: str,
        names: Sequence[str],
        texts: Sequence[str],
        nothing: str = "",
    ) -> None:
        """Refuse names whose texts have the same tokens; see `sordino.encoders.names.check_names`."""
        tokens = [self.tokens(text) for text in texts]
        unknown = [not self.knows(text) for text in texts]
        check_names("the text tower", what, names, tokens, self.tokens(nothing), unknown)

    def warn_unknown(self, what: str, texts: Sequence[str]) -> None:
        """Warn of texts that have words which become the unknown token."""
        warn_unknown("the text tower", what, [text for text in texts if not self.knows(text)])

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        """Return the tokens of 'name . [SEP]' for every name; an underscore counts as a space.

        See `DualEncoder.class_tokens`.
        """
        sentences = [f"{name.replace('_', ' ')}." for name in names]
        if compete:
            self.check_names("class name", names, sentences, nothing=".")
        end = self.words[self.tokenizer.token_to_id("[SEP]")][None]
        rows = [torch.cat([self.embed(sentence), end]) for sentence in sentences]
        lengths = torch.tensor([len(row) for row in rows])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        embeddings = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return ClassTokens(tuple(names), embeddings, mask.to(embeddings.device))


class TextTower(Embedder):
    """MiniLM's weights and a forward pass for soft tokens that computes no padding.

    Sentences of one length form a group. Attention runs group by group and needs no mask;
    everything else runs on the tokens of all groups in one matrix.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        tokenizer: Tokenizer,
        heads: int,
        epsilon: float,
    ) -> None:
        """Take BERT weights under transformers' names, all on one device and in one precision."""
        super().__init__(weights, tokenizer)
        self.heads = heads
        self.epsilon = epsilon
        self.norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
        layer_keys = [key for key in weights if key.startswith("encoder.layer.")]
        self.depth = 1 + max(int(key.split(".")[2]) for key in layer_keys)
        self.layers = [_layer(weights, f"encoder.layer.{index}.") for index in range(self.depth)]
        self.inner = self.layers[0]["inner.weight"].shape[0]

    @classmethod
    def load(
        cls,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> TextTower:
        """Read a BERT folder: `model.safetensors`, `tokenizer.json` and `config.json`.

        Raises:
            EncoderError: a file is missing or damaged, or the model has a form that is not
                supported.
        """
        heads, epsilon, depth = bert_form(folder)
        weights = bert_weights(folder, tower_names(depth))
        width = weights[EMBEDDINGS[0]].shape[1]
        if width % heads:
            raise EncoderError(f"{folder / 'config.json'}: num_attention_heads = {heads} must divide the width {width}")
        tokenizer = bert_tokenizer(folder, len(weights[EMBEDDINGS[0]]))
        return cls(
            {name: part.to(device, dtype) for name, part in weights.items()},
            tokenizer,
            heads,
            epsilon,
        )

    def __call__(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Return mean-pooled last hidden states [N, C, E] of contexts [N, M, E] and C classes."""
        n, sorted_names = len(context), classes.by_length
        start = self.words[self.tokenizer.token_to_id("[CLS]")].expand(n, 1, -1)
        prefix = torch.cat([start, context], 1)[:, None]  # [N, 1, 1 + M, E]
        rows, groups = [], []
        members = sorted_names.order.split([count for count, _ in sorted_names.groups])
        for group, (_, length) in zip(members, sorted_names.groups, strict=True):
            names = classes.embeddings[group, :length].to(context.dtype).expand(n, -1, -1, -1)
            sentences = torch.cat([prefix.expand(-1, len(group), -1, -1), names], 2)  # [N, c, T, E]
            rows.append((sentences + self.positions[: sentences.shape[2]]).flatten(1, 2))
            groups.append((len(group), sentences.shape[2]))
        x = F.layer_norm(torch.cat(rows, 1), (self.width,), *self.norm, self.epsilon)  # [N, tokens, E]
        grouped = GroupedAttention(self.heads, tuple(groups), scale=(self.width // self.heads) ** -0.5)
        attention = attention_for(grouped, x)
        for weights in self.layers:
            layer = _as_layer(weights, self.epsilon)
            x = layer.finish(x, attention(layer.project(x)))
        parts = x.split([sentences * length for sentences, length in groups], dim=1)
        pooled = [part.unflatten(1, group).mean(2) for part, group in zip(parts, groups, strict=True)]
        return torch.cat(pooled, 1)[:, sorted_names.rank]


def _as_layer(weights: Mapping[str, Tensor], epsilon: float) -> Layer:
    """View one layer's weights, by short names, as a layer that norms behind each half."""
    qkv, out, fc1, fc2 = (
        Linear(weights[f"{name}.weight"], weights[f"{name}.bias"]) for name in ("qkv", "out", "inner", "outer")
    )
    norm1, norm2 = (Norm(weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon) for name in ("norm1", "norm2"))
    return Layer(norm1, qkv, out, norm2, fc1, GELU, fc2, norm_first=False)


def _layer(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return one layer's weights under short names, with queries, keys and values in one matrix."""
    layer = {}
    for kind in ("weight", "bias"):
        names = [f"{prefix}attention.self.{part}.{kind}" for part in ("query", "key", "value")]
        parts = [weights[name] for name in names]
        layer[f"qkv.{kind}"] = torch.cat(parts)
        layer |= {f"{name}.{kind}": weights[f"{prefix}{full}.{kind}"] for name, full in SHORT.items()}
    return layer
