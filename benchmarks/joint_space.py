"""What each part of the bundled encoder's joint space contributes. Prints one JSON object.

Held-out figures use no image and are the ones by which the recipe was chosen; zero-shot accuracies only report.
`--quick` takes the shipped recipe only, and no pictures.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from sordino.encoders import joint_space
from sordino.encoders.bundled import IMAGE_WEIGHTS, BundledEncoder, package_path
from sordino.encoders.joint_space import TEMPLATE, Corpus

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Pooled = tuple[torch.Tensor, torch.Tensor, list[str]]  # pooled features [N, 1280], labels [N], class names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--quick", action="store_true", help="the shipped recipe on no pictures")
    options = parser.parse_args()
    encoder = BundledEncoder.load(torch.device("cpu"))
    rows = accuracy(encoder, options.data, options.quick)
    print(json.dumps({"accuracy": rows, "torch": torch.__version__, "quick": options.quick}))


def accuracy(encoder: BundledEncoder, data: Path, quick: bool) -> list[dict[str, object]]:
    """One row a recipe: its held-out figures and its zero-shot accuracy on every set."""
    weights = torch.load(package_path(*IMAGE_WEIGHTS), map_location="cpu", weights_only=True)
    sets = {} if quick else pooled_sets(encoder, data)
    prompts = {name: joint_space.encode(encoder.text, TEMPLATE, names) for name, (_, _, names) in sets.items()}
    full = joint_space.imagenet_corpus(encoder.text)
    synonyms = (
        len(full.classes) - joint_space.CLASSES
    ) // 2  # sentences after the template, then bare, then definitions
    templated = Corpus(full.features[:synonyms], full.classes[:synonyms], full.queries)
    bare = Corpus(full.features[: 2 * synonyms], full.classes[: 2 * synonyms], full.queries)
    first = Corpus(full.queries, torch.arange(joint_space.CLASSES), full.queries)
    zero_mean = torch.zeros(1280)
    recipes = [("first synonym after the template", first, 384, None), ("all synonyms", templated, 384, None)]
    recipes += [("and without the template", bare, 384, None), ("and definitions", full, 384, None)]
    recipes += [("and definitions, images not centered", full, 384, zero_mean)]
    recipes += [(f"and definitions, width {width}", full, width, None) for width in (128, 256)]
    rows = []
    for name, corpus, width, image_mean in recipes[-1:] if quick else recipes:
        trials = [joint_space.held_out(corpus, weights, ridge, width) for ridge in joint_space.RIDGES]
        best = min(trials, key=lambda trial: trial.cross_entropy)
        space = joint_space.fit(corpus, weights, best.ridge, best.logit_scale, width)
        if image_mean is not None:
            space["image_mean"] = image_mean
        zero_shot = {name: round(top_1(space, prompts[name], *sets[name][:2]), 3) for name in sets}
        rows.append({"recipe": name, "held_out": vars(best), "zero_shot": zero_shot})
    return rows


def top_1(space: dict[str, torch.Tensor], prompts: torch.Tensor, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Zero-shot accuracy of encoded prompts [C, 384] on pooled images [N, 1280]."""
    text = F.normalize((prompts.float() - space["text_mean"]) @ space["text_map"].float(), dim=-1)
    scores = (images - space["image_mean"]) @ space["image_map"].float() @ text.T
    return (scores.argmax(1) == labels).float().mean().item()


@torch.inference_mode()
def pooled_sets(encoder: BundledEncoder, data: Path) -> dict[str, Pooled]:
    """Pooled image features of scikit-learn's digits and of the folders under `data` that are there."""
    digits = load_digits()
    pictures = [Image.fromarray((image * (255 / 16)).astype("uint8")) for image in digits.images]
    sets: dict[str, Pooled] = {"digits": (pool(encoder, pictures), torch.tensor(digits.target), DIGITS)}
    folders = {"caltech101": data / "caltech101"}
    folders |= {f"pacs {name}": data / "pacs" / name for name in ("photo", "art_painting", "cartoon", "sketch")}
    for name, folder in folders.items():
        if folder.is_dir():
            classes = sorted(path.name for path in folder.iterdir())
            files = [
                (path, label) for label, group in enumerate(classes) for path in sorted((folder / group).iterdir())
            ]
            images = pool(encoder, [path for path, _ in files])
            sets[name] = (
                images,
                torch.tensor([label for _, label in files]),
                [group.replace("_", " ") for group in classes],
            )
    return sets


def pool(encoder: BundledEncoder, images: list[Image.Image] | list[Path]) -> torch.Tensor:
    """Pooled features [N, 1280] before the joint map."""
    pooled = []
    for start in range(0, len(images), 64):
        chunk = [Image.open(image) if isinstance(image, Path) else image for image in images[start : start + 64]]
        pixels = torch.stack([encoder.transform(image) for image in chunk])
        pooled.append(encoder.image.forward_features(pixels.contiguous(memory_format=torch.channels_last)).mean((2, 3)))
    return torch.cat(pooled)


if __name__ == "__main__":
    main()
