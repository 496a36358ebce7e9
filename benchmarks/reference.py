"""Seconds of a DP-FPL round as public code takes it, over those of the same round here, in one run.

The reference is written here after the step of the method's authors (Tran et al., ICLR 2025, and the code they
published): one client at a time; its state is copied into the model; the personal prompt is factorized; every class has
a prompt of its own, padded to the tower's full length (77 tokens; the same for the bundled tower, which was not theirs)
and sent through the whole tower by `torch.nn.functional`; plain autograd with frozen weights. Gradients and update are
those of the paper's section 4, as here, on the same batches and projections, without noise. So both must end with the
same loss and the same prompts, which is asserted.

Published code also sends the batch's pictures through the image tower in every step, where frozen features could be
kept. `ratio` leaves that out on both sides: it compares rounds on features. `ratio_with_images` counts the passes of
the image tower on the reference's side, as published. Sordino encodes each picture once before the first round, so its
rounds have none. `ratio_unpadded` is against a reference that pads to the longest sentence only.

A round here is a whole one of the local runtime, with its messages. The two take turns, client by client; seconds are
medians. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from text_tower import CLASS_NAMES

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.bundled import TEXT_MODEL, BundledEncoder, package_path
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.prompt_model import PromptModel
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.settings import RuntimeSettings

ENCODERS = ("clip_vit_b16", "bundled")
CONTEXT_LENGTH, RANK, BATCH, CLIENTS, LIMIT = 16, 8, 32, 10, 77
TOLERANCE = 1e-4
FEW = 3  # clients for which the parts beside the padded step are timed
TextFeatures = Callable[[Tensor], Tensor]  # a context [M, E] to unit features [C, D]


@dataclass(frozen=True)
class Subject:
    """An encoder, and what public code would run in its place.

    Attributes:
        encoder: as Sordino has it.
        reference: padded length to the text features of a prompt, by plain operations.
        images: the image tower on pixels [B, 3, H, W].
        size: H and W.
    """

    encoder: DualEncoder
    reference: Callable[[ClassTokens, int], TextFeatures]
    images: Callable[[Tensor], Tensor]
    size: int


def clip_subject(names: list[str]) -> Subject:
    """A randomly initialized CLIP of ViT-B/16's size."""
    from checkpoints import save_clip
    from transformers import CLIPModel

    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    vision = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision |= {"image_size": 224, "patch_size": 16}
    with tempfile.TemporaryDirectory() as folder:
        text |= {"vocab_size": 49408}
        save_clip(Path(folder), names, text=text, vision=vision, projection=512, merges=20)
        encoder = ClipEncoder.load(folder, torch.device("cpu"))
        assert len(encoder.fingerprint) == 64  # read while the folder is there
        model = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    weights, start = dict(model.text_model.named_parameters()), model.config.text_config.bos_token_id
    head, embedding = model.text_projection.weight, model.text_model.embeddings

    def reference(classes: ClassTokens, limit: int) -> TextFeatures:
        count, ends = len(classes), CONTEXT_LENGTH + classes.mask.sum(1)
        first = embedding.token_embedding.weight[start].expand(count, 1, -1)
        later = torch.full((limit, limit), float("-inf")).triu(1)

        def features(context: Tensor) -> Tensor:
            x = torch.cat([first, context.expand(count, -1, -1), classes.embeddings], dim=1)
            x = F.pad(x, (0, 0, 0, limit - x.shape[1])) + embedding.position_embedding.weight[:limit]
            for layer in range(12):
                x = pre_norm_layer(x, weights, f"encoder.layers.{layer}.", 8, later)
            x = norm(x, weights, "final_layer_norm")
            return F.normalize(F.linear(x[torch.arange(count), ends], head), dim=-1)

        return features

    def images(pixels: Tensor) -> Tensor:
        return F.normalize(model.get_image_features(pixel_values=pixels).pooler_output, dim=-1)

    return Subject(encoder, reference, images, 224)


def pre_norm_layer(x: Tensor, weights: dict[str, Tensor], prefix: str, heads: int, mask: Tensor) -> Tensor:
    """One layer of CLIP's text tower on [C, T, E], as its code has it."""
    normed = norm(x, weights, f"{prefix}layer_norm1")
    parts = (linear(normed, weights, f"{prefix}self_attn.{part}_proj") for part in "qkv")
    x = x + linear(attention(*parts, heads, mask), weights, f"{prefix}self_attn.out_proj")
    inner = linear(norm(x, weights, f"{prefix}layer_norm2"), weights, f"{prefix}mlp.fc1")
    return x + linear(inner * torch.sigmoid(1.702 * inner), weights, f"{prefix}mlp.fc2")


def bundled_subject(names: list[str]) -> Subject:
    """The bundled encoder; its text tower by plain operations on its weights."""
    from safetensors.torch import load_file

    encoder = load_encoder("bundled", None, "float32", torch.device("cpu"))
    assert isinstance(encoder, BundledEncoder)
    weights, tower = load_file(package_path(*TEXT_MODEL) / "model.safetensors"), encoder.text
    words = weights["embeddings.word_embeddings.weight"]
    start, padding = words[tower.tokenizer.token_to_id("[CLS]")], words[tower.tokenizer.token_to_id("[PAD]")]

    def reference(classes: ClassTokens, limit: int) -> TextFeatures:
        count, lengths = len(classes), 1 + CONTEXT_LENGTH + classes.mask.sum(1)
        real = torch.arange(limit) < lengths[:, None]  # [C, T]
        mask = torch.where(real, 0.0, float("-inf"))[:, None, None]

        def features(context: Tensor) -> Tensor:
            x = torch.cat([start.expand(count, 1, -1), context.expand(count, -1, -1), classes.embeddings], dim=1)
            x = torch.cat([x, padding.expand(count, limit - x.shape[1], -1)], dim=1)
            x = norm(x + tower.positions[:limit], weights, "embeddings.LayerNorm", tower.epsilon)
            for layer in range(tower.depth):
                x = post_norm_layer(x, weights, f"encoder.layer.{layer}.", tower.heads, mask, tower.epsilon)
            pooled = torch.where(real[..., None], x, 0.0).sum(1) / lengths[:, None]
            return encoder.project_text(pooled)

        return features

    return Subject(encoder, reference, encoder.image_features, 224)


def post_norm_layer(
    x: Tensor, weights: dict[str, Tensor], prefix: str, heads: int, mask: Tensor, epsilon: float
) -> Tensor:
    """One layer of BERT on [C, T, E]."""
    parts = (linear(x, weights, f"{prefix}attention.self.{part}") for part in ("query", "key", "value"))
    mixed = linear(attention(*parts, heads, mask), weights, f"{prefix}attention.output.dense")
    x = norm(x + mixed, weights, f"{prefix}attention.output.LayerNorm", epsilon)
    inner = F.gelu(linear(x, weights, f"{prefix}intermediate.dense"))
    return norm(x + linear(inner, weights, f"{prefix}output.dense"), weights, f"{prefix}output.LayerNorm", epsilon)


def norm(x: Tensor, weights: dict[str, Tensor], name: str, epsilon: float = 1e-5) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], epsilon)


def linear(x: Tensor, weights: dict[str, Tensor], name: str) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Multi-head attention [C, T, E], by PyTorch's own fused form."""
    split = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (query, key, value))
    return F.scaled_dot_product_attention(*split, attn_mask=mask).transpose(1, 2).flatten(2)


SUBJECTS: dict[str, Callable[[list[str]], Subject]] = {"clip_vit_b16": clip_subject, "bundled": bundled_subject}


@dataclass(frozen=True)
class ClientStep:
    """The results of one client's step: loss, gradient of the shared context, and the new personal context."""

    loss: float
    gradient: Tensor
    personal: Tensor


def reference_step(
    text: TextFeatures, scale: float, shared: Tensor, personal: Tensor, projection: Tensor, rate: float, batch: Any
) -> ClientStep:
    """One client's step: contexts [M, E], a projection [E, k], and a batch of features [B, D] and labels [B]."""
    features, labels = batch
    u = torch.linalg.qr(personal @ projection).Q
    v = u.T @ personal
    residual = personal - u @ v
    leaves = [torch.nn.Parameter(part.clone()) for part in (shared, u, v)]
    context = leaves[0] + leaves[1] @ leaves[2] + residual
    loss = F.cross_entropy(scale * features @ text(context).T, labels)
    loss.backward()
    gradient, of_u, of_v = (leaf.grad for leaf in leaves)
    assert gradient is not None
    assert of_u is not None
    assert of_v is not None
    return ClientStep(loss.item(), gradient, (u - rate * of_u) @ (v - rate * of_v) + residual)


def measure(name: str, quick: bool) -> dict[str, object]:
    """One encoder's figures."""
    names = [each.strip() for each in CLASS_NAMES.replace("\n", " ").split(",")]
    names, clients = (names[:20], 3) if quick else (names, CLIENTS)
    subject = SUBJECTS[name](names)
    model = PromptModel(subject.encoder, subject.encoder.class_tokens(names))
    generator = torch.Generator().manual_seed(10)
    features = torch.randn(clients * 5 * BATCH, subject.encoder.feature_width, generator=generator)
    features = F.normalize(features, dim=-1)
    labels = torch.arange(len(features)) % len(names)
    rows = [range(k * 5 * BATCH, (k + 1) * 5 * BATCH) for k in range(clients)]
    settings = settings_for("dp-fpl", {"context_length": CONTEXT_LENGTH, "rank": RANK, "batch_size": BATCH})
    runtime = LocalRuntime(
        algorithm("dp-fpl"), settings, model, features, labels, rows, 1000, RuntimeSettings(), seed=10
    )
    begun = runtime.begun()
    after, record = runtime.round(begun)  # also warms up

    padded = subject.reference(model.classes, LIMIT)
    longest = 1 + CONTEXT_LENGTH + model.classes.mask.shape[1]
    unpadded = subject.reference(model.classes, longest)
    shown = BATCH // 8 if quick else BATCH
    pixels = torch.randn(shown, 3, subject.size, subject.size, generator=generator)
    seconds: dict[str, list[float]] = {"round": [], "padded": [], "unpadded": [], "images": []}

    def timed(kind: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[kind].append(time.perf_counter() - began)
        return result

    steps = []
    with torch.no_grad():
        subject.images(pixels[:2])
    for client in range(clients):
        arguments = client_inputs(runtime, begun, client)
        steps.append(timed("padded", lambda a=arguments: reference_step(padded, *a)))
        timed("round", lambda: runtime.round(after))
        if client >= FEW:
            continue
        timed("unpadded", lambda a=arguments: reference_step(unpadded, *a))
        with torch.no_grad():  # as frozen weights and pictures need no gradient
            timed("images", lambda: subject.images(pixels))
        timed("round", lambda: runtime.round(after))
    differences = compared(runtime, after, record.loss, steps)
    median = {kind: statistics.median(values) for kind, values in seconds.items()}
    median["images"] *= BATCH / shown
    ratio = clients * median["padded"] / median["round"]
    with_images = clients * (median["padded"] + median["images"]) / median["round"]
    return {
        "ratio": ratio,
        "ratio_with_images": with_images,
        "ratio_unpadded": clients * median["unpadded"] / median["round"],
        "reached": {"40 times on features": ratio >= 40, "40 times with images": with_images >= 40},
        "round_seconds": median["round"],
        "reference_seconds": clients * median["padded"],
        "reference_seconds_a_client": {
            "text, padded": median["padded"],
            "text, unpadded": median["unpadded"],
            "images": median["images"],
        },
        "tokens_a_sentence": {"padded": LIMIT, "unpadded": longest},
        **differences,
    }


def client_inputs(runtime: LocalRuntime, training: Training, client: int) -> tuple[Any, ...]:
    """The arguments of `reference_step`: what the client has in the first round, by the same random numbers."""
    data, context, settings = runtime.data, runtime.round_context(1), runtime.settings
    (batch,) = data.batches(1, BATCH, context.streams)
    projection = context.streams.normal("projection 0", runtime.model.encoder.context_width, RANK)
    server: Any = training.server
    clients: Any = training.clients
    return (
        runtime.model.encoder.logit_scale,
        server.context,
        clients.context[client],
        projection[client],
        settings.local_learning_rate,
        (batch.features[client], batch.labels[client]),
    )


def compared(runtime: LocalRuntime, after: Training, loss: float, steps: list[ClientStep]) -> dict[str, float]:
    """The largest differences of loss and prompts after the round.

    Raises:
        AssertionError: they are not the same round.
    """
    server: Any = after.server
    clients: Any = after.clients
    gradient = torch.stack([step.gradient for step in steps]).mean(0)
    begun: Any = runtime.begun().server
    expected = begun.context - runtime.settings.optimizer.rate(runtime.round_context(1)) * gradient
    differences = {
        "loss_difference": abs(loss - statistics.mean(step.loss for step in steps)),
        "shared_difference": float((server.context - expected).abs().max()),
        "personal_difference": float((clients.context - torch.stack([step.personal for step in steps])).abs().max()),
    }
    assert max(differences.values()) < TOLERANCE, differences
    moved = float((server.context - begun.context).abs().max())
    assert differences["shared_difference"] < 0.01 * moved, (differences, moved)
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 classes, 3 clients, an eighth of a batch's pictures")
    parser.add_argument("--one", choices=ENCODERS, help="measure one encoder in this process")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.quick)))
        return
    result: dict[str, object] = {}
    for name in ENCODERS:
        command = [sys.executable, __file__, "--one", name, *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[name] = json.loads(done.stdout)
    size = {"clients": 3, "classes": 20} if arguments.quick else {"clients": CLIENTS, "classes": 100}
    print(json.dumps(result | size | {"threads": torch.get_num_threads(), "quick": arguments.quick}))


if __name__ == "__main__":
    main()
