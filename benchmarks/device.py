"""Rounds and encoding on an accelerator: seconds, share of the matrix product's rate, memory, difference to the CPU.

    python benchmarks/device.py                     # on the accelerator that is there; under four minutes
    python benchmarks/device.py --device cpu --quick  # every line of it, in small sizes

Encoders are the bundled one and randomly initialized ones of the sizes of CLIP ViT-B/16, CLIP ViT-L/14 and SigLIP
So400m, in float32 (TF32 is off) and bfloat16. Rounds are whole ones of the local runtime, with their messages: DP-FPL
and PromptFL without a mechanism, and the release of class statistics. A round's name is its number of clients and of
classes. `share_of_gemm` is the rate of the text tower's products, forward and backward, over the rate of a square
product of the same type in the same run. Where backward computes activations anew, that work is not counted. `step` is
the pass through the tower alone, forward and backward, for all clients in one stack, where they fit into one.

The seconds that are left are divided among the encoders that are left. A round that would not fit by the rate of the
product is left out, with the seconds that it would take, and so is one that runs out of memory or fails, with its
reason. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import copy
import json
import logging
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "encoders"))

from sordino.algorithms import algorithm, settings_for
from sordino.encoders import load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.encode import encode
from sordino.encoders.frozen.replay import BEFORE, repeated
from sordino.encoders.prompt_model import PromptModel
from sordino.mpc.arithmetic.ring import low_bits
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings

CONTEXT_LENGTH, RANK, BATCH, EACH, SEED = 16, 8, 32, 64, 10
BUDGET, QUICK_BUDGET = 210.0, 35.0  # seconds, of four minutes, and with --quick
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
LIKELY_SHARE = 0.3  # of the product's rate, by which a round's seconds are foreseen
SECONDS_A_NUMBER = 3e-7  # of the host's noise, likewise


@dataclass(frozen=True)
class Size:
    """The sizes of two towers: width, inner width, layers, heads; and of pictures and patches."""

    family: str
    text: tuple[int, int, int, int]
    vision: tuple[int, int, int, int]
    image: tuple[int, int]


SIZES = {
    "clip_vit_b16": Size("clip", (512, 2048, 12, 8), (768, 3072, 12, 12), (224, 16)),
    "clip_vit_l14": Size("clip", (768, 3072, 12, 12), (1024, 4096, 24, 16), (224, 14)),
    "siglip_so400m": Size("siglip", (1152, 4304, 27, 16), (1152, 4304, 27, 16), (384, 14)),
}
SMALL = {
    "clip_vit_b16": Size("clip", (64, 128, 2, 2), (64, 128, 2, 2), (32, 16)),
    "clip_vit_l14": Size("clip", (96, 192, 2, 2), (96, 192, 2, 2), (28, 14)),
    "siglip_so400m": Size("siglip", (72, 144, 3, 2), (72, 144, 3, 2), (28, 14)),
}


@dataclass
class Bench:
    """The run: its device, sizes and time.

    Attributes:
        device: that is measured.
        quick: whether sizes are small.
        ends: the time at which it should end.
        gemm: the rate of a square product by type, FLOP/s.
    """

    device: torch.device
    quick: bool
    ends: float
    gemm: dict[str, float] = field(default_factory=dict)

    def wait(self) -> None:
        """Wait for all that was launched."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def seconds(self, work: Callable[[], object]) -> float:
        self.wait()
        began = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - began

    def peak_gb(self) -> float | None:
        """Return the most memory that tensors had on a CUDA device since the last call."""
        if self.device.type != "cuda":
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 3)


@contextmanager
def reported(entry: dict[str, Any]) -> Iterator[None]:
    """Enter an error of the device in place of a figure, so that one size does not end the others."""
    try:
        yield
    except torch.OutOfMemoryError:
        entry["left_out"] = "out of memory"
        torch.cuda.empty_cache()
    except (RuntimeError, NotImplementedError) as error:
        entry["left_out"] = " ".join(str(error).split())[:200]


def random_model(size: Size, device: torch.device) -> Any:
    """A transformers model of a size, made on the device, as its numbers are many."""
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    def tower(sizes: tuple[int, int, int, int]) -> dict[str, int]:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return dict(zip(names, sizes, strict=True))

    vision = tower(size.vision) | {"image_size": size.image[0], "patch_size": size.image[1]}
    torch.manual_seed(SEED)
    with torch.device(device):
        if size.family == "siglip":
            text = tower(size.text) | {"vocab_size": 32000, "max_position_embeddings": 64}
            return SiglipModel(SiglipConfig(text_config=text | {"projection_size": size.text[0]}, vision_config=vision))
        text = tower(size.text) | {"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
        return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=size.text[0]))


def encoder_of(model: Any, size: Size, names: list[str], device: torch.device, dtype: torch.dtype) -> ClipEncoder:
    """An encoder of a copy of a model."""
    from checkpoints import clip_tokenizer, siglip_tokenizer
    from transformers import CLIPImageProcessorPil

    side = size.image[0]
    processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    tokenizer = siglip_tokenizer(names) if size.family == "siglip" else clip_tokenizer(names, 49408, 20)
    moved = copy.deepcopy(model).eval().to(device, dtype)
    encoder = ClipEncoder(moved, tokenizer, processor, Path(), "random")
    encoder.logit_scale = 100.0
    encoder.fingerprint = "00" * 32  # it is in no file
    return encoder


def class_names(count: int) -> list[str]:
    """ImageNet's names, of which equal ones get a number."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(index).partition(",")[0] for index in range(count)]
    taken = Counter(name.lower() for name in names)
    return [f"{name} {index}" if taken[name.lower()] > 1 else name for index, name in enumerate(names)]


def runtime_of(
    method: str, encoder: DualEncoder, clients: int, classes: int, privacy: dict[str, Any] | None = None
) -> LocalRuntime:
    """A federation of clients with random features."""
    names = class_names(classes)
    model = PromptModel(encoder, encoder.class_tokens(names))
    generator = torch.Generator().manual_seed(SEED)
    features = F.normalize(torch.randn(clients * EACH, encoder.feature_width, generator=generator), dim=-1)
    labels = torch.arange(clients * EACH) % classes
    tables = {"context_length": CONTEXT_LENGTH, "batch_size": BATCH, "local_steps": 1, "dp-fpl": {"rank": RANK}}
    return LocalRuntime(
        algorithm(method),
        settings_for(method, tables),
        model,
        features.to(encoder.device),
        labels.to(encoder.device),
        [range(k * EACH, (k + 1) * EACH) for k in range(clients)],
        1000,
        RuntimeSettings(weighting="uniform"),
        SEED,
        PrivacySettings(**(privacy or {})),
        digests=[f"{k:02x}" * 32 for k in range(clients)],
    )


def measure_round(bench: Bench, encoder: DualEncoder, dtype: str, case: tuple[str, int, int], until: float) -> Any:
    """Seconds, rate and memory of one round's case."""
    method, clients, classes = case
    entry: dict[str, Any] = {}
    with reported(entry):
        runtime = runtime_of(method, encoder, clients, classes)
        flops = 2 * encoder.text_flops(clients, CONTEXT_LENGTH, runtime.model.classes)
        foreseen = flops / (LIKELY_SHARE * bench.gemm[dtype])
        left = until - time.perf_counter()
        if 2 * foreseen > left:
            return {"left_out": f"2 rounds of {foreseen:.1f} s do not fit into {max(0.0, left):.1f} s"}
        bench.peak_gb()
        training = runtime.begun()
        seconds = timed(bench, lambda: runtime.round(training), until)
        rate = flops / statistics.median(seconds)
        entry |= {
            "round_seconds": statistics.median(seconds),
            "rounds_timed": len(seconds),
            "tflops": rate / 1e12,
            "share_of_gemm": rate / bench.gemm[dtype],
            "peak_gb": bench.peak_gb(),
        }
        prompts = torch.zeros(clients, CONTEXT_LENGTH, encoder.context_width, device=bench.device)
        if time.perf_counter() < until and runtime.model.prompts_at_once(prompts, BATCH) >= clients:
            step = statistics.median(timed(bench, step_of(runtime.model, prompts), until))
            entry["step"] = {"seconds": step, "share_of_gemm": flops / step / bench.gemm[dtype]}
    return entry


def timed(bench: Bench, work: Callable[[], object], until: float) -> list[float]:
    """Return some seconds of repeated work, after it warmed up as far as there is time: passes are recorded then."""
    seconds: list[float] = []
    for _ in range(BEFORE + 1 + 5):
        took = bench.seconds(work)
        seconds.append(took)
        if until - time.perf_counter() < took:
            break
    return seconds[min(BEFORE + 1, len(seconds) - 1) :]


def step_of(model: PromptModel, prompts: Tensor) -> Callable[[], object]:
    """A pass through the text tower, forward and backward, as a method's round has it."""
    leaf = prompts.clone().requires_grad_()
    generator = torch.Generator().manual_seed(SEED)
    shape = len(prompts), len(model.classes), model.encoder.feature_width
    cotangent = torch.randn(shape, generator=generator).to(prompts.device)

    def step() -> object:
        with repeated():
            features = model.class_features(leaf)
        return torch.autograd.grad(features, [leaf], cotangent)

    return step


def measure_release(bench: Bench, encoder: DualEncoder, clients: int, classes: int, until: float) -> Any:
    """Seconds of a release of class statistics with the system's noise, and of a round on what was released."""
    entry: dict[str, Any] = {}
    numbers = clients * encoder.feature_width * (classes + encoder.feature_width)  # means, and a scatter
    left = until - time.perf_counter()
    if numbers * SECONDS_A_NUMBER > left:
        return {
            "left_out": f"{numbers:,} numbers of noise, which the host draws, do not fit into {max(0.0, left):.1f} s"
        }
    with reported(entry):
        privacy = {"mechanism": "statistics", "noise_multiplier": 1.0, "center_share": 0.1, "scatter_share": 0.1}
        runtime = runtime_of("promptfl", encoder, clients, classes, privacy)
        start = runtime.start()
        bench.peak_gb()
        released: list[Any] = []
        release = bench.seconds(lambda: released.append(runtime.release(start)[0]))
        first = bench.seconds(lambda: runtime.round(released[0]))
        entry |= {"release_seconds": release, "first_round_seconds": first, "peak_gb": bench.peak_gb()}
    return entry


@torch.no_grad()
def measure_images(bench: Bench, encoder: DualEncoder, dtype: str, side: int, until: float) -> Any:
    """Pictures a second: of the tower on pixels that are on the device, and of `encode` on pictures in memory."""
    entry: dict[str, Any] = {}
    with reported(entry):
        batch = 8 if bench.quick else 64
        pixels = torch.randn(batch, 3, side, side).to(bench.device)
        with FlopCounterMode(display=False) as counter:
            encoder.image_features(pixels[:1])
        flops = counter.get_total_flops()
        bench.peak_gb()
        bench.seconds(lambda: encoder.image_features(pixels))
        seconds = [bench.seconds(lambda: encoder.image_features(pixels))]
        while len(seconds) < 5 and time.perf_counter() + seconds[0] < until:
            seconds.append(bench.seconds(lambda: encoder.image_features(pixels)))
        rate = batch / statistics.median(seconds)
        entry |= {
            "images_per_second": rate,
            "share_of_gemm": rate * flops / bench.gemm[dtype],
            "gflop_an_image": flops / 1e9,
            "peak_gb": bench.peak_gb(),
        }
        if time.perf_counter() < until:
            pictures = Pictures(16 if bench.quick else 512, side)
            took = bench.seconds(lambda: encode(pictures, encoder, None, batch_size=batch))
            entry["encoded_per_second"] = len(pictures) / took
    return entry


class Pictures:
    """Random pictures in memory, a little larger than the tower's."""

    def __init__(self, count: int, side: int) -> None:
        generator = np.random.Generator(np.random.Philox(SEED))
        shape = (count, side + 32, side + 32, 3)
        self._pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        self.names = [str(index) for index in range(count)]

    def __len__(self) -> int:
        return len(self.names)

    def raw(self, index: int, /) -> bytes:
        return self._pixels[index].tobytes()

    def image(self, index: int, /) -> Image.Image:
        return Image.fromarray(self._pixels[index])


def difference(encoder: DualEncoder, on_cpu: DualEncoder) -> dict[str, float]:
    """The largest differences to float32 on the CPU: two clients, eight classes, one round."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, each in (("device", encoder), ("cpu", on_cpu)):
        runtime = runtime_of("dp-fpl", each, 2, 8)
        begun = runtime.begun()
        after, _ = runtime.round(begun)
        server: Any = after.server
        clients: Any = after.clients
        start: Any = begun.server
        with torch.no_grad():
            features = runtime.model.class_features(start.context[None])
        moved = server.context - start.context
        found[name] = {"class_features": features, "shared_prompt": moved, "personal_prompts": clients.context}
    differences = {
        part: float((found["device"][part].cpu().double() - tensor.double()).abs().max())
        for part, tensor in found["cpu"].items()
    }
    return differences | {"largest_shared_step": float(found["cpu"]["shared_prompt"].abs().max())}


def copies_of_a_round(bench: Bench, encoder: DualEncoder) -> dict[str, int] | str:
    """The copies between host and device in a DP-FPL round of 10 clients and 20 classes, by direction."""
    if bench.device.type != "cuda":
        return "only counted on CUDA; tests/runtime/test_accelerators.py counts them on a stand-in"
    from torch.profiler import ProfilerActivity, profile

    runtime = runtime_of("dp-fpl", encoder, 10, 20)
    training, _ = runtime.round(runtime.begun())
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        runtime.round(training)
        bench.wait()
    names = [event.name for event in profiler.events() if event.name.startswith("Memcpy")]
    return {way: sum(way in name for name in names) for way in ("HtoD", "DtoH", "DtoD")}


def product_rate(bench: Bench, dtype: torch.dtype) -> float:
    """FLOP/s of a square product, the best of several."""
    side = 512 if bench.quick else 8192
    square = torch.randn(side, side, device=bench.device).to(dtype)
    return 2 * side**3 / min(bench.seconds(lambda: square @ square) for _ in range(2 if bench.quick else 10))


def ring_product(left: Tensor, right: Tensor, bits: int) -> Tensor:
    """Multiply integers [I, J] by [K, J] transposed modulo 2^bits by products of bytes, as `sordino.mpc` on a CPU."""
    count = bits // 8

    def digits(integers: Tensor) -> list[Tensor]:
        parts, rest = [], integers
        for _ in range(count):
            digit = ((rest + 128) & 255) - 128
            parts.append(digit.to(torch.int8))
            rest = (rest - digit) >> 8
        return parts

    of_left, of_right = digits(left), digits(right)
    total = torch.zeros(len(left), len(right), dtype=torch.int64, device=left.device)
    for place in range(count):
        ahead = torch.cat(of_left[: place + 1], dim=1)
        behind = torch.cat(of_right[place::-1], dim=1)
        total += torch._int_mm(ahead, behind.T).to(torch.int64) << (8 * place)
    return total & low_bits(bits)


def private_forward(bench: Bench) -> dict[str, Any]:
    """What keeps a private forward pass off the device, and how fast the ring's products could be there."""
    rows, inner, columns = (64, 64, 64) if bench.quick else (2048, 384, 1536)
    source = torch.Generator().manual_seed(SEED)
    left = torch.randint(-(2**47), 2**47, (rows, inner), generator=source)
    right = torch.randint(-(2**47), 2**47, (columns, inner), generator=source)
    expected = (left @ right.T) & low_bits(48)
    result: dict[str, Any] = {
        "runs": False,
        "reason": "sordino.mpc packs, truncates and looks up with kernels that numba compiles for the CPU, draws "
        "shares from the operating system, and torch has no product of int64 on CUDA; only its products could move",
    }
    plain: dict[str, Any] = {}
    there = left.to(bench.device), right.to(bench.device)
    with reported(plain):
        there[0] @ there[1].T
        plain["multiplications_per_second"] = rows * inner * columns / bench.seconds(lambda: there[0] @ there[1].T)
    by_bytes: dict[str, Any] = {}
    with reported(by_bytes):
        found = ring_product(*there, 48)
        by_bytes["exact"] = bool((found.cpu() == expected).all())
        took = min(bench.seconds(lambda: ring_product(*there, 48)) for _ in range(3))
        by_bytes["multiplications_per_second"] = rows * inner * columns / took
    return result | {"int64_products": plain, "products_of_48_bits_by_bytes": by_bytes}


def measure_encoder(
    bench: Bench, encoder: DualEncoder, on_cpu: DualEncoder, dtype: str, side: int, until: float
) -> dict[str, Any]:
    """All figures of an encoder in one precision."""
    few, many = ((2, 4), (4, 8)) if bench.quick else ((10, 100), (100, 1000))
    entry: dict[str, Any] = {"rounds": {}}
    with reported(entry):
        entry["max_abs_difference_to_cpu"] = difference(encoder, on_cpu)
    entry["images"] = measure_images(bench, encoder, dtype, side, until)
    entry["statistics"] = {}
    sizes = ((few[0], many[0]), (20 if bench.quick else 1000, many[0]), (few[0], many[1]))
    for clients, classes in (*sizes, (few[1], many[0]), (few[1], many[1])):
        for method in ("dp-fpl", "promptfl"):
            if clients > few[1] and method != "dp-fpl":
                continue
            case = (method, clients, classes)
            cells = entry["rounds"].setdefault(method, {})
            cells[f"{clients}x{classes}"] = measure_round(bench, encoder, dtype, case, until)
    for clients, classes in ((few[0], many[0]), (few[1], many[0]), (few[0], many[1])):
        entry["statistics"][f"{clients}x{classes}"] = measure_release(bench, encoder, clients, classes, until)
    for figure in ("round_seconds", "tflops", "share_of_gemm"):
        entry[figure] = {
            f"{method} {name}": cell.get(figure)
            for method, cells in entry["rounds"].items()
            for name, cell in cells.items()
        }
    return entry


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--quick", action="store_true", help="small towers, few clients and classes")
    parser.add_argument(
        "--budget", type=float, help=f"seconds, {BUDGET:.0f} by default, {QUICK_BUDGET:.0f} with --quick"
    )
    arguments = parser.parse_args()
    began = time.perf_counter()
    transformers_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    device = torch.device(arguments.device) if arguments.device != "auto" else found or torch.device("cpu")
    quick = arguments.quick or device.type == "cpu"
    budget = arguments.budget or (QUICK_BUDGET if quick else BUDGET)
    bench = Bench(device, quick, began + budget)
    bench.gemm = {name: product_rate(bench, dtype) for name, dtype in DTYPES.items()}
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "accelerator": device.type != "cpu",
        "note": None
        if device.type != "cpu"
        else "no accelerator: small sizes on the CPU, figures of which mean nothing",
        "quick": quick,
        "torch": torch.__version__,
        "not_measured": "torch.compile",
        "gemm_tflops": {name: rate / 1e12 for name, rate in bench.gemm.items()},
        "private_forward": private_forward(bench),
        "encoders": {},
    }
    sizes = SMALL if quick else SIZES
    waiting = [(name, dtype) for name in ("bundled", *sizes) for dtype in DTYPES]
    names, random = class_names(1000), {}
    for done, (name, dtype) in enumerate(waiting):
        entry: dict[str, Any] = {}
        if time.perf_counter() > bench.ends:
            result["encoders"].setdefault(name, {})[dtype] = {"left_out": "no time was left"}
            continue
        until = time.perf_counter() + (bench.ends - time.perf_counter()) / (len(waiting) - done)
        with reported(entry):
            if name == "bundled":
                pair = [
                    load_encoder("bundled", None, *on) for on in ((dtype, device), ("float32", torch.device("cpu")))
                ]
            else:
                random = random if name in random else {name: random_model(sizes[name], device)}
                places = ((device, DTYPES[dtype]), (torch.device("cpu"), torch.float32))
                pair = [encoder_of(random[name], sizes[name], names, *on) for on in places]
            side = sizes[name].image[0] if name in sizes else 224
            entry |= measure_encoder(bench, pair[0], pair[1], dtype, side, until)
            if name == "bundled" and dtype == "float32":
                result["copies_in_a_round"] = copies_of_a_round(bench, pair[0])
        result["encoders"].setdefault(name, {})[dtype] = entry
    print(json.dumps(result | {"seconds": time.perf_counter() - began}))


if __name__ == "__main__":
    main()
