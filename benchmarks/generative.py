"""How much is saved by scoring all class names in one pass, and by keeping keys and values of pictures.

A random SmolVLM whose language model has the layers and width of the published one of 256 million parameters, one
picture, a prompt of 8 vectors and 20 class names; forward, and backward to the prompt. The reference is a pass for
every name over the whole dialog, through transformers' own layers. The picture has 4 tokens; words before it make
as many tokens before the prompt as a usual picture does. All run the same weights;
times are medians. Prints one JSON object.
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
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from vision_language import save_vision_language

from sordino.encoders.generative.answers import Answers
from sordino.encoders.generative.encoder import GenerativeEncoder
from sordino.encoders.generative.settings import GenerativeSettings

CONTEXT_LENGTH = 8
LONG = "word " * 40  # before the picture
TEMPLATE = "<|im_start|>User: " + LONG + "{image}{question}<end_of_utterance>\nAssistant: {answer}"
CLASS_NAMES = """apple, aquarium fish, baby, bear, beaver, bed, bee, beetle, bicycle, bottle, bowl, boy, bridge, bus,
butterfly, camel, can, castle, caterpillar, cattle"""
FULL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49280}
FULL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2048}
QUICK = FULL | {"num_hidden_layers": 4, "vocab_size": 4000}


def by_class(encoder: GenerativeEncoder, context: Tensor, state: Tensor, answers: Answers) -> Tensor:
    """Return scores [1, C] by a pass over dialog and name for each of C names, padded to the longest."""
    model, layout = encoder._model, encoder.layout
    start, middle, end = (encoder._embedded(ids)[None] for ids in (layout.start, layout.middle, layout.end))
    dialog = torch.cat([start, state, middle, context, end], dim=1)
    x = torch.cat([dialog.expand(len(answers), -1, -1), answers.embeddings[:, :-1]], dim=1)
    hidden = model.model.text_model(inputs_embeds=x, use_cache=False).last_hidden_state[:, dialog.shape[1] - 1 :]
    steps = model.lm_head(hidden).log_softmax(-1).gather(2, answers.ids[:, :, None])[:, :, 0]
    return (torch.where(answers.mask, steps, 0.0).sum(1) / answers.mask.sum(1))[None]


def measure(scores: Callable[[Tensor], Tensor], context: Tensor, repeats: int) -> tuple[float, Tensor, Tensor]:
    """Return median seconds of forward and backward, the scores, and the gradient of the first name's loss."""
    seconds = []
    for _ in range(1 + repeats):  # the first warms up
        leaf = context.clone().requires_grad_()
        started = time.perf_counter()
        found = scores(leaf)
        (gradient,) = torch.autograd.grad(-found.log_softmax(-1)[0, 0], leaf)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]), found.detach(), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer layers and a smaller vocabulary")
    quick = parser.parse_args().quick
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger().setLevel(logging.ERROR)
    names = " ".join(CLASS_NAMES.split()).split(", ")
    torch.manual_seed(0)
    picture, context = Image.new("RGB", (64, 64), (100, 150, 30)), torch.randn(1, CONTEXT_LENGTH, FULL["hidden_size"])
    results, repeats = {}, 3
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = str(save_vision_language(Path(folder), "smolvlm", **(QUICK if quick else FULL)))
        for name, kept, scores in (
            ("by-class", "image-tokens", by_class),
            ("one-pass", "image-tokens", GenerativeEncoder.likelihoods),
            ("kept", "keys-values", GenerativeEncoder.likelihoods),
        ):
            settings = GenerativeSettings(template=TEMPLATE, kept=kept)
            encoder = GenerativeEncoder.load(checkpoint, torch.device("cpu"), settings=settings)
            answers, state = encoder.class_tokens(names), encoder.image_state(encoder.transform(picture)[None])
            results[name] = measure(partial(scores, encoder, state=state, answers=answers), context, repeats)
    before = len(encoder.layout.start) + encoder.image_length + len(encoder.layout.middle)
    reference, one, kept_pass = (results[key] for key in ("by-class", "one-pass", "kept"))
    difference = max(float((found[1] - reference[1]).abs().max()) for found in (one, kept_pass))
    scale = float(reference[2].abs().max())
    gradients = max(float((found[2] - reference[2]).abs().max()) for found in (one, kept_pass)) / scale
    print(
        json.dumps(
            {
                "by_class_seconds": reference[0],
                "one_pass_seconds": one[0],
                "kept_seconds": kept_pass[0],
                "one_pass_speedup": reference[0] / one[0],
                "kept_speedup": reference[0] / kept_pass[0],
                "max_abs_difference": difference,
                "max_gradient_difference": gradients,
                "tokens_before_prompt": before,
                "classes": len(names),
                "threads": torch.get_num_threads(),
                "quick": quick,
            }
        )
    )


if __name__ == "__main__":
    main()
