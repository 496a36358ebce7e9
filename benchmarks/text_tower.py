"""How much the shared prefix saves: CLIP text features of 100 classes, forward and backward, at the size of ViT-B/16.

The reference is what public prompt-learning code does: transformers' own text layers on every class's sentence, padded
to 77 tokens. Both run the same random weights; times are medians. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from checkpoints import save_clip

from sordino.encoders.base import ClassTokens
from sordino.encoders.clip import ClipEncoder

CONTEXT_LENGTH = 16
CLASS_NAMES = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,
butterfly, camel, can, castle, caterpillar, cattle, chair, chimpanzee, clock, cloud, cockroach, couch, crab, crocodile,
cup, dinosaur, dolphin, elephant, flatfish, forest, fox, girl, hamster, house, kangaroo, keyboard, lamp, lawn mower,
leopard, lion, lizard, lobster, man, maple tree, motorcycle, mountain, mouse, mushroom, oak tree, orange, orchid, otter,
palm tree, pear, pickup truck, pine tree, plain, plate, poppy, porcupine, possum, rabbit, raccoon, ray, road, rocket,
rose, sea, seal, shark, shrew, skunk, skyscraper, snail, snake, spider, squirrel, streetcar, sunflower, sweet pepper,
table, tank, telephone, television, tiger, tractor, train, trout, tulip, turtle, wardrobe, whale, willow tree, wolf,
woman, worm"""


def padded_features(model: CLIPModel, encoder: ClipEncoder, context: Tensor, classes: ClassTokens) -> Tensor:
    """Context [M, E] to unit features [C, D]: C sequences of 77 tokens through transformers' layers, causal."""
    text, limit = model.text_model, model.config.text_config.max_position_embeddings
    start = text.embeddings.token_embedding.weight[model.config.text_config.bos_token_id].expand(len(classes), 1, -1)
    sentence = torch.cat([start, context.expand(len(classes), -1, -1), classes.embeddings], dim=1)
    padded = F.pad(sentence, (0, 0, 0, limit - sentence.shape[1]))
    hidden = text.embeddings(inputs_embeds=padded)
    hidden = text.encoder(inputs_embeds=hidden, is_causal=True).last_hidden_state
    ends = 1 + context.shape[0] + classes.mask.sum(dim=1) - 1
    pooled = text.final_layer_norm(hidden)[torch.arange(len(classes)), ends]
    return F.normalize(model.text_projection(pooled), dim=-1)


def measure(features: Callable[[Tensor], Tensor], context: Tensor, repeats: int) -> tuple[float, Tensor, Tensor]:
    """Median seconds of forward and backward, the features, and the gradient of a fixed function of them."""
    seconds = []
    for _ in range(repeats):
        leaf = context.clone().requires_grad_()
        began = time.perf_counter()
        out = features(leaf)
        target = torch.linspace(-1, 1, out.numel()).view_as(out)
        (gradient,) = torch.autograd.grad((out * target).sum(), leaf)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), out.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the first 50 classes, fewer repeats")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    names = [name.strip() for name in CLASS_NAMES.replace("\n", " ").split(",")]
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    with tempfile.TemporaryDirectory() as folder:
        save_clip(Path(folder), names, text=text | {"vocab_size": 49408}, projection=512, merges=20)
        encoder = ClipEncoder.load(folder, torch.device("cpu"))
        model = CLIPModel.from_pretrained(folder).eval().requires_grad_(False)
    classes = encoder.class_tokens(names[:50] if quick else names)
    context = 0.02 * torch.randn(CONTEXT_LENGTH, encoder.context_width, generator=torch.Generator().manual_seed(0))

    # Warm both, then time one after the other, padded first: neither profits from the other's caches.
    measure(lambda leaf: encoder.text_features(leaf, classes), context, 1)
    padded, expected, expected_gradient = measure(
        lambda leaf: padded_features(model, encoder, leaf, classes), context, 2 if quick else 5
    )
    shared, features, gradient = measure(lambda leaf: encoder.text_features(leaf, classes), context, 7 if quick else 21)
    lengths = classes.mask.sum(dim=1) - 2
    result = {
        "speedup": padded / shared,
        "max_abs_difference": float((features - expected).abs().max()),
        "max_relative_gradient_difference": float((gradient - expected_gradient).norm() / expected_gradient.norm()),
        "padded_seconds": padded,
        "shared_seconds": shared,
        "shared_forward_gflop": encoder.text_flops(1, CONTEXT_LENGTH, classes) / 1e9,
        "classes": len(classes),
        "context_length": CONTEXT_LENGTH,
        "name_tokens": {"mean": float(lengths.float().mean()), "max": int(lengths.max())},
        "text_tower": text,
        "threads": torch.get_num_threads(),
        "quick": quick,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
