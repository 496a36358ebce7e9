"""A small CLIP checkpoint, distilled from the bundled encoder: a stand-in where no pretrained one can be had.

Methods that put prompts into a vision transformer need a CLIP checkpoint, and without a network there is none but a
random one. This trains one in some twenty minutes of one core, for `--set encoder.name=clip --set
encoder.checkpoint=OUT`: a ViT whose features of pictures and their patches, and a text transformer whose features of
sentences, are like the bundled encoder's.

It is no CLIP. It sees a few thousand pictures, is clearly worse on others than on them, and absolute accuracies are
low. Its pictures include those on which experiments on the same folders test (without labels, but it has seen them), so
that its accuracies say nothing about new pictures: only rows of one table, all on this checkpoint, compare.

Pictures are those below --images and scikit-learn's digits, less a tenth that is held out; sentences are hand-written
templates with the class names of the folders, of the digits and of ImageNet. Prints one JSON object: seconds in all and
of training, images, parameters, epochs, threads; image_cosine to the teacher's features, a mean over held-out pictures
and one over the others; text_cosine over all sentences; zero_shot, for every folder and each of its domains, the
accuracy of 'a photo of a' on all pictures for teacher and student, and the student's on those held out.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

from sordino.encoders.base import DualEncoder
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.encode import encode
from sordino.tasks.images import ImageSet
from sordino.tasks.settings import DataSettings
from sordino.tasks.sources import load_images

SIZE, PATCH, WIDTH, PATCHES = 64, 8, 128, (64 // 8) ** 2
RESIZED = 73  # the shorter side of a picture whose center of SIZE is what the teacher sees, 224 of 256
STORED = 80  # the side of pictures kept for training
MERGES = 2756
VOCABULARY = 2 * 256 + MERGES + 2  # bytes, bytes that end a word, merges, start and end
ZERO_SHOT = "a photo of a"
TEMPLATES = (
    *(ZERO_SHOT, "the", "a picture of the", "a sketch of a", "a painting of the", "a cartoon of a"),
    *("this is a blurry photo of one", "a small picture of the handwritten digit"),
    # As long as learned contexts are, so that the positions they use are trained.
    "on a sunny day we went out with our new camera and took this good photo of a",
)
BATCH, TEXT_EPOCHS = 64, 40  # an epoch has every name once
ENTROPY_WEIGHT, PLACES_WEIGHT = 0.3, 0.5
KEPT_PATCHES, FULL_EPOCHS = 32, 0.15  # patches seen in training, and the share of epochs at the end that see all
MATRIX_RATE, OTHER_RATE = 0.02, 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="class folders or domain folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--epochs", type=int, default=40, help="over the pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    began = time.perf_counter()
    teacher = BundledEncoder.load(torch.device("cpu"))
    sources = {folder.name: f"imagefolder:{folder}" for folder in options.images} | {"digits": "digits"}
    sets = {name: load_images(DataSettings(source=source)) for name, source in sources.items()}
    for name, images in sets.items():
        sets[name] = images.subset(np.flatnonzero(encode(images, teacher, FeatureCache()).readable))
    features, places = (
        torch.cat([taught(each, teacher, kind) for each in sets.values()]) for kind in ("image", "patch")
    )
    pixels = torch.cat([stored(images) for images in sets.values()])
    flippable = torch.cat([torch.full((len(images),), name != "digits") for name, images in sets.items()])
    generator = torch.Generator().manual_seed(options.seed)
    held_out = torch.randperm(len(pixels), generator=generator) < len(pixels) // 10
    info = ImageNetInfo()
    names = {info.index_to_description(index).split(", ")[0].lower() for index in range(1000)}
    names = sorted(names.union(*({name.lower() for name in images.class_names} for images in sets.values())))
    sentences = torch.stack([text_features(teacher, template, names) for template in TEMPLATES])  # [T, C, D]

    torch.manual_seed(options.seed)
    tokenizer = clip_tokenizer([*names, *TEMPLATES])
    model = small_clip(tokenizer, teacher)
    training = time.perf_counter()
    train_text(model, tokenizer, teacher, names, sentences, generator)
    pictures = [each[~held_out] for each in (pixels, flippable, features, places)]
    train_images(model, pictures, sentences[0], teacher.logit_scale, options.epochs, generator)
    training = time.perf_counter() - training
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    CLIPImageProcessorPil(size={"shortest_edge": RESIZED}, crop_size=SIZE).save_pretrained(options.out)

    student = ClipEncoder.load(str(options.out), torch.device("cpu"))
    learned = torch.cat([encode(images, student, None).features for images in sets.values()])
    cosine = (learned * features).sum(1)
    texts = torch.stack([text_features(student, template, names) for template in TEMPLATES])
    zero_shot, start = {}, 0
    for name, images in sets.items():
        rows = slice(start, start := start + len(images))
        taught_right, learned_right = right(images, teacher, features[rows]), right(images, student, learned[rows])
        parts = {name: torch.ones(len(images), dtype=torch.bool)}
        for number, domain in enumerate(images.domain_names or ()):
            parts[f"{name} {domain}"] = torch.from_numpy(images.domains == number)
        for part, where in parts.items():
            zero_shot[part] = {
                "teacher": taught_right[where].mean().item(),
                "student": learned_right[where].mean().item(),
                "student_held_out": learned_right[where & held_out[rows]].mean().item(),
            }
    report = {
        "seconds": time.perf_counter() - began,
        "training_seconds": training,
        "images": len(pixels),
        "parameters": model.num_parameters(),
        "image_cosine": {"held_out": cosine[held_out].mean().item(), "trained": cosine[~held_out].mean().item()},
        "text_cosine": (texts * sentences).sum(2).mean().item(),
        "zero_shot": zero_shot,
        "epochs": options.epochs,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))


def taught(images: ImageSet, teacher: DualEncoder, kind: str) -> Tensor:
    """The teacher's features of pictures [N, D], or of their 7 x 7 patches [N, D, 7, 7] in half precision."""
    features = encode(images, teacher, FeatureCache(), kind=kind).features
    return features if kind == "image" else features.half().transpose(1, 2).unflatten(2, (7, 7))


def stored(images: ImageSet) -> Tensor:
    """The central square of every picture, uint8 [N, 3, STORED, STORED]."""
    plain = {"do_rescale": False, "do_normalize": False}
    processor = CLIPImageProcessorPil(size={"shortest_edge": STORED}, crop_size=STORED, **plain)
    pictures = (images.image(row).convert("RGB") for row in range(len(images)))
    return torch.cat([processor(each, return_tensors="pt").pixel_values.to(torch.uint8) for each in pictures])


@torch.no_grad()
def text_features(encoder: DualEncoder, template: str, names: Sequence[str]) -> Tensor:
    """Features [C, D] of 'template name.'"""
    context = encoder.embed(template)
    chunks = [names[start : start + 128] for start in range(0, len(names), 128)]
    return torch.cat([encoder.text_features(context, encoder.class_tokens(chunk, compete=False)) for chunk in chunks])


def clip_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """CLIP's tokenizer with byte-pair merges learned from `texts`, the same ones every time.

    The trainer numbers letters that end a word in random order, and breaks ties by these numbers. So here a letter that
    ends a word is a letter of its own in training, known from the start, and gets its '</w>' afterwards.
    """
    splitter = CLIPTokenizer()._tokenizer
    letters, ends = sorted(pre_tokenizers.ByteLevel.alphabet()), 0x1000
    final = {letter: chr(ord(letter) + ends) for letter in letters}
    normal = [splitter.normalizer.normalize_str(text) for text in texts]
    words = [word for text in normal for word, _ in splitter.pre_tokenizer.pre_tokenize_str(text)]
    learner = Tokenizer(models.BPE())
    alphabet = [*letters, *final.values()]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, show_progress=False)
    learner.train_from_iterator([word[:-1] + final[word[-1]] for word in words], trainer)
    written = str.maketrans({mark: f"{letter}</w>" for letter, mark in final.items()})
    vocabulary = {token.translate(written): number for token, number in learner.get_vocab().items()}
    special = {"<|startoftext|>": VOCABULARY - 2, "<|endoftext|>": VOCABULARY - 1}
    merges = [
        tuple(part.translate(written) for part in pair) for pair in json.loads(learner.to_str())["model"]["merges"]
    ]
    return CLIPTokenizer(vocab=vocabulary | special, merges=merges)


def small_clip(tokenizer: Any, teacher: DualEncoder) -> CLIPModel:
    """A CLIP with random weights and the teacher's logit scale."""
    end = tokenizer.eos_token_id
    tower = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    text = {"num_hidden_layers": 3, "vocab_size": VOCABULARY, "max_position_embeddings": 77}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    config = CLIPConfig(
        text_config=tower | text | special,
        vision_config=tower | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=teacher.feature_width,
        logit_scale_init_value=math.log(teacher.logit_scale),
    )
    return CLIPModel(config)


def train_text(
    model: CLIPModel, tokenizer: Any, teacher: DualEncoder, names: list[str], targets: Tensor, draw: torch.Generator
) -> None:
    """Fit the text tower to the teacher's features [T, C, D] of T templates with C names.

    At first every token means what the teacher reads in it, as far as WIDTH directions can say it.
    """
    with torch.no_grad():
        tokens = [tokenizer.decode(token).strip() for token in range(VOCABULARY)]
        basis = torch.linalg.svd(targets.flatten(0, 1), full_matrices=False).Vh[:WIDTH]
        model.text_model.embeddings.token_embedding.weight.copy_(text_features(teacher, "a", tokens) @ basis.T)
        model.text_projection.weight.copy_(basis.T)
    ids = [[torch.tensor(tokenizer(f"{template} {name}.").input_ids) for name in names] for template in TEMPLATES]

    def losses(epoch: int) -> Iterator[Tensor]:
        for rows in torch.randperm(len(names), generator=draw).split(BATCH):
            template = int(torch.randint(len(TEMPLATES), (), generator=draw))
            padded = nn.utils.rnn.pad_sequence([ids[template][row] for row in rows], True, tokenizer.eos_token_id)
            features = F.normalize(model.text_projection(model.text_model(input_ids=padded).pooler_output), dim=1)
            yield 1 - (features * targets[template, rows]).sum(1).mean()

    batches = math.ceil(len(names) / BATCH)
    optimize("text", nn.ModuleList([model.text_model, model.text_projection]), losses, TEXT_EPOCHS, batches)


def train_images(
    model: CLIPModel, pictures: Sequence[Tensor], classes: Tensor, scale: float, epochs: int, draw: torch.Generator
) -> None:
    """Fit the image tower to the teacher.

    `pictures` are pixels, whether they may be mirrored, features [N, D] and those of patches [N, D, 7, 7]. The class
    token learns the features, and the teacher's softmax over classes [C, D]. Patches learn what the teacher sees at
    their places, after the last layer and after the one before it, of which the class token reads: small transformers
    learn from few pictures that way (Li et al., Locality Guidance, ECCV 2022). Until the last epochs, batches are seen
    through half of their patches, at half the cost (Li et al., FLIP, CVPR 2023).
    """
    pixels, flippable, targets, places = pictures
    start_images(model, views(pixels[::8], crops(flippable[::8], draw)))
    expected = (scale * targets @ classes.T).softmax(1)

    def losses(epoch: int) -> Iterator[Tensor]:
        kept = PATCHES if epoch >= epochs * (1 - FULL_EPOCHS) else KEPT_PATCHES
        for rows in torch.randperm(len(pixels), generator=draw).split(BATCH):
            theta, seen = crops(flippable[rows], draw), torch.randperm(PATCHES, generator=draw)[:kept]
            early, late = image_features(model, views(pixels[rows], theta), seen)[-2:]  # [B, 1 + kept, D]
            cosine = (late[:, 0] * targets[rows]).sum(1).mean()
            entropy = F.cross_entropy(scale * late[:, 0] @ classes.T, expected[rows])
            local = seen_by_teacher(places[rows].float(), theta)[:, seen]
            local_cosine = ((early[:, 1:] + late[:, 1:]) / 2 * local).sum(2).mean()
            yield 1 - cosine + ENTROPY_WEIGHT * entropy + PLACES_WEIGHT * (1 - local_cosine)

    batches = math.ceil(len(pixels) / BATCH)
    optimize("images", nn.ModuleList([model.vision_model, model.visual_projection]), losses, epochs, batches)


@torch.no_grad()
def start_images(model: CLIPModel, pixels: Tensor) -> None:
    """Whitened patches, positions as waves, keys as queries: a start from which a few epochs lead somewhere.

    The last lets tokens attend to near and similar ones (as in Trockman and Kolter, Mimetic Initialization, ICML 2023).
    """
    patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)  # [P, 3 PATCH^2]
    values, vectors = torch.linalg.eigh(patches.T.cov())
    embeddings = model.vision_model.embeddings
    whitening = (vectors / (values + 0.05).sqrt())[:, -WIDTH:].T
    embeddings.patch_embedding.weight.copy_(whitening.view_as(embeddings.patch_embedding.weight))
    side = SIZE // PATCH
    waves = torch.arange(side)[:, None] * 0.5 ** torch.linspace(0, 4, WIDTH // 4)
    waves = torch.cat([waves.sin(), waves.cos()], 1)  # [side, WIDTH / 2]
    both = torch.cat([waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)], 2)
    embeddings.position_embedding.weight[1:] = both.flatten(0, 1)
    for layer in model.vision_model.encoder.layers:
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight.mul_(2))


def image_features(model: CLIPModel, pixels: Tensor, seen: Tensor) -> list[Tensor]:
    """Unit-norm features [B, 1 + P, D] of the class token and of the P patches `seen`, after every layer."""
    vision = model.vision_model
    x, features = vision.pre_layrnorm(vision.embeddings(pixels)[:, F.pad(1 + seen, (1, 0))]), []
    for layer in vision.encoder.layers:
        x = layer(x, attention_mask=None)
        features.append(F.normalize(model.visual_projection(vision.post_layernorm(x)), dim=2))
    return features


def crops(flippable: Tensor, draw: torch.Generator) -> Tensor:
    """Squares about as large as the teacher's view, mirrored at random: [B, 2, 3], as affine_grid takes them."""
    scale = 0.8 + 0.15 * torch.rand(len(flippable), generator=draw)
    mirrored = flippable & (torch.rand(len(flippable), generator=draw) < 0.5)
    theta = torch.zeros(len(flippable), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(mirrored, -scale, scale), scale
    theta[:, :, 2] = (1 - scale)[:, None] * (2 * torch.rand(len(flippable), 2, generator=draw) - 1)
    return theta


def views(pixels: Tensor, theta: Tensor) -> Tensor:
    """Crops of uint8 pictures [B, 3, STORED, STORED], as the tower takes them."""
    grid = F.affine_grid(theta, [len(pixels), 3, SIZE, SIZE], align_corners=False)
    drawn = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (drawn - mean) / deviation


def seen_by_teacher(places: Tensor, theta: Tensor) -> Tensor:
    """The same crops of the teacher's features [B, D, 7, 7], which are of the picture's center: unit norm [B, P, D]."""
    side = SIZE // PATCH
    grid = F.affine_grid(theta * RESIZED / SIZE, [*places.shape[:2], side, side], align_corners=False)
    drawn = F.grid_sample(places, grid, padding_mode="border", align_corners=False)
    return F.normalize(drawn.flatten(2).transpose(1, 2), dim=2)


def optimize(
    what: str, modules: nn.Module, losses: Callable[[int], Iterator[Tensor]], epochs: int, batches: int
) -> None:
    """Muon (Jordan et al., 2024) on the layers' matrices and AdamW on all else, warmed up, with a cosine decay."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, weight in modules.named_parameters():
        groups[".layers." in name and weight.ndim == 2].append(weight)
    muon = torch.optim.Muon(groups[True], lr=MATRIX_RATE, weight_decay=0.01)
    optimizers = [muon, torch.optim.AdamW(groups[False], lr=OTHER_RATE, weight_decay=0.01)]
    steps = epochs * batches

    def rate(step: int) -> float:
        return min(20 * (step + 1) / steps, (1 + math.cos(math.pi * step / steps)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    for epoch in range(epochs):
        total = 0.0
        for loss in losses(epoch):
            modules.zero_grad()
            loss.backward()
            for each in (*optimizers, *schedules):
                each.step()
            total += loss.item()
        print(f"{what}: epoch {epoch + 1} of {epochs}, loss {total / batches:.4f}", file=sys.stderr, flush=True)


def right(images: ImageSet, encoder: DualEncoder, features: Tensor) -> Tensor:
    """Which of N pictures, with features [N, D], zero-shot classification gets right: [N], 1 or 0."""
    scores = features @ text_features(encoder, ZERO_SHOT, images.class_names).T
    return (scores.argmax(1) == torch.from_numpy(images.labels)).double()


if __name__ == "__main__":
    main()
