"""A small CLIP checkpoint, distilled from the bundled encoder: a stand-in where no pretrained one can be had.

Methods that put prompts into a vision transformer need a CLIP checkpoint, and without a network there is none but a
random one. This trains one in minutes, to be used as `--set encoder.name=clip --set encoder.checkpoint=OUT`: a ViT whose
feature of a picture, and a text transformer whose feature of a sentence, are those of the bundled encoder.

It is not a CLIP. It saw a few thousand pictures, so absolute accuracies are low. And its pictures include those on
which experiments on the same folders test (without labels, but they were seen), so that its accuracies say nothing
about new pictures: only rows of one table, all on this checkpoint, compare.

Pictures are those below --images and scikit-learn's digits, less a held-out tenth; sentences are hand-written templates
with the class names of the folders, of the digits and of ImageNet. Prints one JSON object:

- seconds of all, pictures, parameters, epochs, threads;
- image_cosine to the teacher's features: mean over the held-out tenth, and over the others; text_cosine, over all
  sentences;
- zero_shot, for every folder and each of its domains: accuracy of 'a photo of a' on all pictures for the teacher and
  the student, and the student's on the held-out ones.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))
from checkpoints import clip_tokenizer

from sordino.encoders.base import DualEncoder
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.cache import FeatureCache
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.encode import encode
from sordino.tasks.images import ImageSet
from sordino.tasks.settings import DataSettings
from sordino.tasks.sources import load_images

SIZE, PATCH, WIDTH, HEADS = 64, 8, 128, 4
RESIZED = 73  # of which SIZE is the centre's share that the teacher sees, 224 of 256
STORED = 80  # pixels a side of the pictures kept for training, of which a view is a crop
TOWER = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS}
MERGES = 2500
VOCABULARY = 3 * 256 + MERGES + 2  # bytes, and again as a word's last, merges; start and end
ZERO_SHOT = "a photo of a"
TEMPLATES = (
    ZERO_SHOT,
    "a picture of the",
    "a sketch of a",
    "a painting of the",
    "a cartoon of a",
    "this is a blurry photo of one",
    "a small picture of the handwritten digit",
    "the",
    # As long as learned contexts are, so that all positions they use are trained.
    "on a sunny day we went out with our new camera and took this good photo of a",
)
TEXT_RATE, TEXT_BATCH, TEXT_EPOCHS = 3e-3, 32, 100  # an epoch has every name once, after one template
IMAGE_BATCH = 64
KEPT_PATCHES, FULL_EPOCHS = 0.5, 0.15  # the share of patches that training sees, and of epochs at the end that see all


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
    sets, targets = {}, {}
    for name, source in sources.items():
        sets[name], targets[name] = known(load_images(DataSettings(source=source)), teacher)
        log(f"{name}: {len(sets[name])} pictures")
    rows = sum(map(len, sets.values()))
    generator = torch.Generator().manual_seed(options.seed)
    held_out = torch.zeros(rows, dtype=torch.bool)
    held_out[torch.randperm(rows, generator=generator)[: rows // 10]] = True

    names = sorted({name.lower() for images in sets.values() for name in images.class_names} | set(imagenet_names()))
    sentences = torch.stack([text_features(teacher, template, names) for template in TEMPLATES])  # [T, C, D]
    torch.manual_seed(options.seed)
    tokenizer = clip_tokenizer([*names, *TEMPLATES], VOCABULARY, MERGES)
    model = small_clip(tokenizer, teacher)
    train_text(model, tokenizer, names, sentences, generator)
    kept = ~held_out
    pixels = torch.cat([stored(images) for images in sets.values()])[kept]
    flippable = torch.cat([torch.full((len(images),), name != "digits") for name, images in sets.items()])[kept]
    features = torch.cat(list(targets.values()))
    train_images(model, pixels, flippable, features[kept], sentences[0], teacher.logit_scale, options.epochs, generator)

    save(model, tokenizer, options.out)
    student = ClipEncoder.load(str(options.out), torch.device("cpu"))
    ours = {name: encode(images, student, None).features for name, images in sets.items()}
    cosine = (torch.cat(list(ours.values())) * features).sum(1)
    texts = torch.stack([text_features(student, template, names) for template in TEMPLATES])
    split = dict(zip(sets, held_out.split([len(images) for images in sets.values()]), strict=True))
    report = {
        "seconds": time.perf_counter() - began,
        "images": rows,
        "parameters": model.num_parameters(),
        "image_cosine": {"held_out": cosine[held_out].mean().item(), "trained": cosine[kept].mean().item()},
        "text_cosine": (texts * sentences).sum(2).mean().item(),
        "zero_shot": {
            part: accuracies(sets[name], where, split[name], {teacher: targets[name], student: ours[name]})
            for name in sets
            for part, where in parts(name, sets[name])
        },
        "epochs": options.epochs,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(report))


def known(images: ImageSet, teacher: DualEncoder) -> tuple[ImageSet, Tensor]:
    """The readable pictures, and the teacher's features [N, D] of them."""
    encoded = encode(images, teacher, FeatureCache())
    rows = np.flatnonzero(encoded.readable)
    return images.subset(rows), encoded.features[rows]


def imagenet_names() -> list[str]:
    info = ImageNetInfo()
    return [info.index_to_description(index).split(", ")[0].lower() for index in range(1000)]


@torch.no_grad()
def text_features(encoder: DualEncoder, template: str, names: Sequence[str]) -> Tensor:
    """Features [C, D] of 'template name.'"""
    context = encoder.embed(template)
    chunks = [names[start : start + 128] for start in range(0, len(names), 128)]
    return torch.cat([encoder.text_features(context, encoder.class_tokens(chunk)) for chunk in chunks])


def small_clip(tokenizer: Any, teacher: DualEncoder) -> CLIPModel:
    """A CLIP with random weights and the teacher's logit scale."""
    end = tokenizer.eos_token_id
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end, "pad_token_id": end}
    text = {"num_hidden_layers": 3, "vocab_size": end + 1, "max_position_embeddings": 77}
    config = CLIPConfig(
        text_config=TOWER | text | special,
        vision_config=TOWER | {"num_hidden_layers": 4, "image_size": SIZE, "patch_size": PATCH},
        projection_dim=teacher.feature_width,
        logit_scale_init_value=math.log(teacher.logit_scale),
    )
    return CLIPModel(config)


def train_text(
    model: CLIPModel, tokenizer: Any, names: Sequence[str], targets: Tensor, generator: torch.Generator
) -> None:
    """Fit the text tower to the teacher's features [T, C, D] of T templates with C names."""
    ids = [[torch.tensor(tokenizer(f"{template} {name}.").input_ids) for name in names] for template in TEMPLATES]
    weights = [*model.text_model.parameters(), *model.text_projection.parameters()]
    batches = math.ceil(len(names) / TEXT_BATCH)

    def losses(epoch: int) -> Iterator[Tensor]:
        for rows in torch.randperm(len(names), generator=generator).split(TEXT_BATCH):
            template = int(torch.randint(len(TEMPLATES), (), generator=generator))
            sentences = [ids[template][row] for row in rows]
            padded = torch.nn.utils.rnn.pad_sequence(sentences, True, tokenizer.pad_token_id)
            features = F.normalize(model.text_projection(model.text_model(input_ids=padded).pooler_output), dim=1)
            yield (1 - (features * targets[template, rows]).sum(1)).mean()

    optimise("text", weights, losses, TEXT_EPOCHS, batches, TEXT_RATE)


def train_images(
    model: CLIPModel,
    pixels: Tensor,
    flippable: Tensor,
    targets: Tensor,
    classes: Tensor,
    logit_scale: float,
    epochs: int,
    generator: torch.Generator,
) -> None:
    """Fit the image tower to the teacher's features [N, D], and to its softmax over C classes' features [C, D].

    Until the last epochs a batch is seen through half of its patches, at half the cost (Li et al., FLIP, CVPR 2023).
    """
    weights = [*model.vision_model.parameters(), *model.visual_projection.parameters()]
    patches, batches = (SIZE // PATCH) ** 2, math.ceil(len(pixels) / IMAGE_BATCH)

    def losses(epoch: int) -> Iterator[Tensor]:
        kept = patches if epoch >= epochs * (1 - FULL_EPOCHS) else round(patches * KEPT_PATCHES)
        for rows in torch.randperm(len(pixels), generator=generator).split(IMAGE_BATCH):
            seen = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(patches, generator=generator)[:kept]])
            features = image_features(model, views(pixels[rows], flippable[rows], generator), seen)
            cosine = (features * targets[rows]).sum(1)
            expected = (logit_scale * targets[rows] @ classes.T).softmax(1)
            entropy = F.cross_entropy(logit_scale * features @ classes.T, expected)
            yield (1 - cosine).mean() + KL_WEIGHT * entropy

    optimise("images", weights, losses, epochs, batches, 1e-3)


KL_WEIGHT = 0.1


def image_features(model: CLIPModel, pixels: Tensor, seen: Tensor) -> Tensor:
    """Unit-norm features [B, D] of pixels [B, 3, SIZE, SIZE], of which the tokens `seen` only."""
    vision = model.vision_model
    x = vision.encoder(inputs_embeds=vision.pre_layrnorm(vision.embeddings(pixels)[:, seen])).last_hidden_state
    return F.normalize(model.visual_projection(vision.post_layernorm(x[:, 0])), dim=1)


def views(pixels: Tensor, flippable: Tensor, generator: torch.Generator) -> Tensor:
    """Random square crops of uint8 pictures [B, 3, STORED, STORED], mirrored at random, as the tower takes them."""
    batch = len(pixels)
    scale = 0.7 + 0.3 * torch.rand(batch, generator=generator)
    shift = (1 - scale)[:, None] * (2 * torch.rand(batch, 2, generator=generator) - 1)
    mirrored = flippable & (torch.rand(batch, generator=generator) < 0.5)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = torch.where(mirrored, -scale, scale), scale, shift
    grid = F.affine_grid(theta, [batch, 3, SIZE, SIZE], align_corners=False)
    drawn = F.grid_sample(pixels.float() / 255, grid, padding_mode="border", align_corners=False)
    mean, deviation = (torch.tensor(each)[:, None, None] for each in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (drawn - mean) / deviation


def stored(images: ImageSet) -> Tensor:
    """The centre of every picture, uint8 [N, 3, STORED, STORED]."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": STORED}, crop_size=STORED, do_rescale=False, do_normalize=False
    )
    pictures = (images.image(row).convert("RGB") for row in range(len(images)))
    return torch.cat([processor(images=each, return_tensors="pt").pixel_values.to(torch.uint8) for each in pictures])


def optimise(
    what: str,
    weights: Iterable[Tensor],
    losses: Callable[[int], Iterator[Tensor]],
    epochs: int,
    batches: int,
    learning_rate: float,
) -> None:
    """AdamW with a twentieth of warm-up and a cosine decay over all epochs."""
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.01)
    steps, warm = epochs * batches, epochs * batches / 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (1 + math.cos(math.pi * step / steps)) / 2)
    )
    for epoch in range(epochs):
        total = 0.0
        for loss in losses(epoch):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        log(f"{what}: epoch {epoch + 1} of {epochs}, loss {total / batches:.4f}")


def save(model: CLIPModel, tokenizer: Any, folder: Path) -> None:
    """Write the checkpoint as transformers does."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": RESIZED}, crop_size=SIZE).save_pretrained(folder)


def parts(name: str, images: ImageSet) -> Iterator[tuple[str, Tensor]]:
    """All pictures of a set, and those of each domain: a name and [N] flags."""
    yield name, torch.ones(len(images), dtype=torch.bool)
    for number, domain in enumerate(images.domain_names or ()):
        yield f"{name} {domain}", torch.from_numpy(images.domains == number)


def accuracies(
    images: ImageSet, where: Tensor, held_out: Tensor, features: dict[DualEncoder, Tensor]
) -> dict[str, float]:
    """Zero-shot accuracy of teacher and student on the pictures `where`, and the student's on those held out."""
    labels = torch.from_numpy(images.labels)
    teacher, student = (
        (mine @ text_features(encoder, ZERO_SHOT, images.class_names).T).argmax(1) == labels
        for encoder, mine in features.items()
    )
    return {
        "teacher": teacher[where].float().mean().item(),
        "student": student[where].float().mean().item(),
        "student_held_out": student[where & held_out].float().mean().item(),
    }


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
