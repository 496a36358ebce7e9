"""What each part of the bundled encoder's joint space contributes, and the speed of its text tower: one JSON object.

    python benchmarks/joint_space.py [--data ../shared/data] [--skip-accuracy] [--skip-speed]

Held-out figures use no image and are the ones by which the recipe was chosen; zero-shot accuracies only report.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits

from sordino.encoders import joint_space
from sordino.encoders.bundled import IMAGE_WEIGHTS, BundledEncoder, package_path
from sordino.encoders.joint_space import TEMPLATE, Corpus
from sordino.encoders.linear import frozen_linear

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
Pooled = tuple[torch.Tensor, torch.Tensor, list[str]]  # pooled features [N, 1280], labels [N], class names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--skip-accuracy", action="store_true")
    parser.add_argument("--skip-speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    encoder = BundledEncoder.load(torch.device("cpu"))
    result: dict[str, object] = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    if not options.skip_speed:
        result["speed"] = speed(encoder)
    if not options.skip_accuracy:
        result["accuracy"] = accuracy(encoder, options.data)
    print(json.dumps(result, indent=1))


def accuracy(encoder: BundledEncoder, data: Path) -> list[dict[str, object]]:
    """One row a recipe: its held-out figures and its zero-shot accuracy on every set."""
    weights = torch.load(package_path(*IMAGE_WEIGHTS), map_location="cpu", weights_only=True)
    sets = pooled_sets(encoder, data)
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
    recipes += [("and definitions, images not centred", full, 384, zero_mean)]
    recipes += [(f"and definitions, width {width}", full, width, None) for width in (128, 256)]
    rows = []
    for name, corpus, width, image_mean in recipes:
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


def speed(encoder: BundledEncoder, repeats: int = 5) -> dict[str, float]:
    """Forward and backward of 10 contexts of 16 tokens, 2 at a time, over 100 ImageNet class names."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    classes = encoder.class_tokens([info.index_to_description(index).split(", ")[0] for index in range(0, 1000, 10)])
    generator = torch.Generator().manual_seed(0)
    contexts = 0.05 * torch.randn(10, 16, encoder.context_width, generator=generator)
    matrix = torch.randn(2048, 2048, generator=generator)

    def best(run: object) -> float:
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            run()  # type: ignore[operator]
            times.append(time.perf_counter() - start)
        return min(times)

    def step() -> None:
        for chunk in contexts.split(2):
            chunk = chunk.clone().requires_grad_()
            encoder.text_features(chunk, classes).sum().backward()

    flops = 2 * encoder.text_flops(10, 16, classes)  # the backward pass to the context costs as much as the forward
    seconds = best(step)
    rates = {"matmul": best(lambda: matrix @ matrix), "frozen_linear": best(lambda: frozen_linear(matrix, matrix))}
    gflops = {name: 2 * 2048**3 / value / 1e9 for name, value in rates.items()}
    share = flops / seconds / 1e9 / max(gflops.values())
    return {"seconds_10x100x16": seconds, "gflops": flops / seconds / 1e9, "share_of_gemm": share, **gflops}


if __name__ == "__main__":
    main()
