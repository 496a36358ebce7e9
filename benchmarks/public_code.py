"""Methods' public code beside Sordino's on the same tensors: how it is imported, and the model that both run on.

`parity.py` measures. Clones of the repositories lie in one folder under their own names; nothing of them is here. Their
modules import training loops, checkpoints and vocabularies that a loss does not need, so these are stood in for. The
towers are theirs: the `clip/model.py` of each repository with the weights of one small random CLIP, which Sordino loads
as a checkpoint. All runs in float64, for which their layer norm is kept from rounding to float32.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from checkpoints import save_clip

from sordino.encoders.clip import ClipEncoder

CLASS_NAMES = ("cat", "dog", "sunflower", "grand piano", "red-winged blackbird")
TEXT_WIDTH, IMAGE_WIDTH, FEATURES, LAYERS, HEADS, SIZE, PATCH = 64, 128, 48, 3, 2, 32, 8
HEADLESS = ("dassl", "Dassl", "flcore", "timm")  # training loops: imported by all, used by no loss


@dataclass(frozen=True)
class Subject:
    """One small CLIP, here and as transformers has it.

    Attributes:
        encoder: Sordino's.
        weights: in the names of OpenAI's code.
        pixels: [B, 3, H, W].
        labels: [B].
    """

    encoder: ClipEncoder
    weights: Mapping[str, Tensor]
    pixels: Tensor
    labels: Tensor

    @classmethod
    def make(cls, images: int = 6) -> Subject:
        text = {"hidden_size": TEXT_WIDTH, "intermediate_size": 4 * TEXT_WIDTH, "num_hidden_layers": LAYERS}
        vision = {"hidden_size": IMAGE_WIDTH, "intermediate_size": 4 * IMAGE_WIDTH, "num_hidden_layers": LAYERS}
        heads = {"num_attention_heads": HEADS}
        vision |= heads | {"image_size": SIZE, "patch_size": PATCH}
        with tempfile.TemporaryDirectory() as folder:
            save_clip(Path(folder), CLASS_NAMES, text=text | heads, vision=vision, projection=FEATURES)
            encoder = ClipEncoder.load(folder, torch.device("cpu"), torch.float64)
            assert len(encoder.fingerprint) == 64  # read while the folder is there
            weights = openai_weights(CLIPModel.from_pretrained(folder, dtype=torch.float64))
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(images, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
        return cls(encoder, weights, pixels, torch.arange(images) % len(CLASS_NAMES))

    def tokens(self, sentences: Sequence[str]) -> Tensor:
        """Return token numbers [N, 77] with start and end, then zeros, as OpenAI's `tokenize`."""
        rows = torch.zeros(len(sentences), 77, dtype=torch.long)
        for row, sentence in zip(rows, sentences, strict=True):
            numbers = self.encoder._tokenizer(sentence).input_ids
            row[: len(numbers)] = torch.tensor(numbers)
        return rows

    def random(self, name: str, *shape: int, scale: float = 0.1) -> Tensor:
        """Return normal numbers that depend on the name alone."""
        generator = torch.Generator().manual_seed(sum(map(ord, name)))
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def openai_weights(model: Any) -> dict[str, Tensor]:
    """Return the weights of a transformers CLIP under the names of OpenAI's code."""
    found = {"logit_scale": model.logit_scale}
    text, vision = model.text_model, model.vision_model
    found["token_embedding.weight"] = text.embeddings.token_embedding.weight
    found["positional_embedding"] = text.embeddings.position_embedding.weight
    found["text_projection"] = model.text_projection.weight.T
    found["visual.class_embedding"] = vision.embeddings.class_embedding
    found["visual.conv1.weight"] = vision.embeddings.patch_embedding.weight
    found["visual.positional_embedding"] = vision.embeddings.position_embedding.weight
    found["visual.proj"] = model.visual_projection.weight.T
    norms = {"ln_final": text.final_layer_norm, "visual.ln_pre": vision.pre_layrnorm}
    norms["visual.ln_post"] = vision.post_layernorm
    for prefix, layers in (("transformer", text.encoder.layers), ("visual.transformer", vision.encoder.layers)):
        for number, layer in enumerate(layers):
            block, attention = f"{prefix}.resblocks.{number}", layer.self_attn
            norms |= {f"{block}.ln_1": layer.layer_norm1, f"{block}.ln_2": layer.layer_norm2}
            norms |= {f"{block}.mlp.c_fc": layer.mlp.fc1, f"{block}.mlp.c_proj": layer.mlp.fc2}
            norms[f"{block}.attn.out_proj"] = attention.out_proj
            parts = (attention.q_proj, attention.k_proj, attention.v_proj)
            found[f"{block}.attn.in_proj_weight"] = torch.cat([part.weight for part in parts])
            found[f"{block}.attn.in_proj_bias"] = torch.cat([part.bias for part in parts])
    for name, module in norms.items():
        found |= {f"{name}.weight": module.weight, f"{name}.bias": module.bias}
    return {name: value.detach().clone() for name, value in found.items()}


class StandIn(ModuleType):
    """A module in which every name is there: a class without content, or a registry that registers nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.endswith("REGISTRY"):
            return SimpleNamespace(register=lambda *_: lambda trainer: trainer)
        return type(name, (), {})


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds stand-ins for packages of some names, and for all in them."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] in HEADLESS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@dataclass(frozen=True)
class Repository:
    """A clone: its folder of `clip/` and `trainers/`, and the small CLIP as its code builds it.

    Attributes:
        root: the folder.
        subject: the small CLIP and the batch.
    """

    root: Path
    subject: Subject

    def module(self, path: str, **stands_for: Any) -> ModuleType:
        """Import one file. `stands_for` are names in it that are replaced afterwards."""
        with self._imports():
            # A dotted name, so that what it imports from folders around it is found to be stood in for.
            module = _load(path.removesuffix(".py").replace("/", "."), self.root / path)
        for name, value in stands_for.items():
            setattr(module, name, value)
        return module

    def clip(self, **details: Any) -> Any:
        """Build the small CLIP by the repository's own code; `details` are what some ask of every trainer."""
        towers = _load(f"public_{self.root.name}_model", self.root / "clip" / "model.py")
        towers.LayerNorm.forward = nn.LayerNorm.forward
        sizes = (FEATURES, SIZE, LAYERS, IMAGE_WIDTH, PATCH, 77, len(self.subject.weights["token_embedding.weight"]))
        more = (details,) if details else ()
        model = towers.CLIP(*sizes, TEXT_WIDTH, HEADS, LAYERS, *more).double().eval()
        missing, unknown = model.load_state_dict(dict(self.subject.weights), strict=False)
        assert not unknown, unknown
        assert all("VPT" in name for name in missing), missing  # tokens, which the caller puts there
        return model.requires_grad_(False)

    @contextlib.contextmanager
    def _imports(self) -> Iterator[None]:
        subject = self.subject

        class SimpleTokenizer:
            def encode(self, text: str) -> list[int]:
                numbers: list[int] = subject.encoder._tokenizer(text, add_special_tokens=False).input_ids
                return numbers

        def tokenize(texts: str | Sequence[str], *_: Any, **__: Any) -> Tensor:
            return subject.tokens([texts] if isinstance(texts, str) else texts)

        package, functions, words = ModuleType("clip"), ModuleType("clip.clip"), ModuleType("clip.simple_tokenizer")
        functions.tokenize, words.SimpleTokenizer = tokenize, SimpleTokenizer  # type: ignore[attr-defined]
        package.clip, package.tokenize = functions, tokenize  # type: ignore[attr-defined]
        package.__path__ = []
        einops = ModuleType("einops")
        einops.repeat = lambda x, pattern, b: x.expand(b, *x.shape)  # type: ignore[attr-defined]
        ours = {"clip": package, "clip.clip": functions, "clip.simple_tokenizer": words, "einops": einops}
        for folder in ("trainers", "model"):
            ours[folder] = ModuleType(folder)
            ours[folder].__path__ = [str(self.root / folder)]
        with mock.patch.dict(sys.modules, ours), mock.patch.object(sys, "meta_path", [StandIns(), *sys.meta_path]):
            yield


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(**values: Any) -> Any:
    """Return a nested configuration: `TRAINER__COOP__N_CTX=4` is `cfg.TRAINER.COOP.N_CTX`."""
    tree = SimpleNamespace()
    for path, value in values.items():
        *parents, last = path.split("__")
        at = tree
        for parent in parents:
            if not hasattr(at, parent):
                setattr(at, parent, SimpleNamespace())
            at = getattr(at, parent)
        setattr(at, last, value)
    return tree


@contextlib.contextmanager
def as_here() -> Iterator[None]:
    """Let `cuda`, `half` and `float`, which some code calls without asking, do nothing, and turn prints to stderr."""
    with contextlib.ExitStack() as stack:
        for kind in (Tensor, nn.Module):
            for move in ("cuda", "half", "float"):
                stack.enter_context(mock.patch.object(kind, move, lambda self, *_, **__: self))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield
