"""What a forward pass of the private text tower costs on shares: rounds, bytes, and seconds of both servers here.

The bundled tower and its calibration, sentences made of held-out definitions. Both servers and the dealer are in
this process, a thread for each server, each with one thread of torch. Randomness is dealt ahead in turns of bounded
memory: `offline_seconds` is server 1's time in those, the dealer's work included, and `seconds` the rest of its time.
`int64_share` is the rate of the matrix products that are left online, multiplications a second of both servers, over
the rate that two such threads reach at plain int64 products of [2048, 384] by [384, 1536]. The timed pass comes
after one of the same shapes, which is recorded. Prints one JSON object.
"""

from __future__ import annotations

import sordino  # noqa: F401  settles how threads wait, so it comes before torch

# isort: split

import argparse
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from sordino.encoders.bundled import TextTower
from sordino.memory import keep_freed
from sordino.mpc import (
    Calibration,
    Costs,
    Encoder,
    FixedPointPlan,
    Party,
    Shared,
    encode,
    encode_sentences,
    reconstruct,
    run,
)
from sordino.mpc.arithmetic.ring import share
from sordino.mpc.dealing.correlations import Mask, Product
from sordino.mpc.dealing.supply import Numbered, RequestTrace
from sordino.mpc.parties.server import HELD
from sordino.mpc.tower.distill import teacher_of
from sordino.mpc.tower.encoder import shared_weights
from sordino.mpc.tower.public_text import SENTENCES, calibration_of, embedded, held_out_rows
from sordino.mpc.tower.sentences import Sentences, batches, in_the_clear
from sordino.mpc.tower.tower import PrivateTower, bundled_tower

FRACTION = 14  # of embeddings


def whole_rows(text_tower: TextTower, batch: int, length: int) -> Sentences:
    """Sentences of exactly so many tokens, of held-out definitions."""
    tokens = [token for row in held_out_rows(text_tower, 128) for token in row[1:-1]]
    inner = length - 2
    first, last = held_out_rows(text_tower, 128)[0][0], held_out_rows(text_tower, 128)[0][-1]
    starts = [number * inner % (len(tokens) - inner) for number in range(batch)]
    rows = [[first, *tokens[start : start + inner], last] for start in starts]
    return Sentences(embedded(text_tower, rows)[0], torch.full((batch,), length))


def multiplications(trace: RequestTrace) -> int:
    """Of a server's matrix products online: one for a product with a fixed factor or of masks, else two."""
    fixed = {each.mask.number for each in trace.requests if not isinstance(each, (Mask, Numbered))}
    total = 0
    for each in trace.requests:
        if isinstance(each, Numbered) and isinstance(each.correlation, Product):
            product = each.correlation
            if product.form.startswith("matmul"):
                inner = product.left.shape[-2 if product.form == "matmul_tn" else -1]
                entries = inner * torch.Size(product.shape).numel()
                total += entries * (1 if product.left.number in fixed else 2)
    return total


def measured(tower: PrivateTower, calibration: Calibration, sentences: Sentences) -> dict[str, Any]:
    """A pass that is recorded, and one that is prepared for and timed."""
    plan = FixedPointPlan.of(tower, calibration)
    weights, halves = shared_weights(tower, calibration), share(encode(sentences.embeddings, FRACTION))

    def program(party: Party) -> tuple[Shared, Costs, float, float, int]:
        encoder = Encoder.mask_and_open(party, weights[party.number], plan)
        x = Shared(halves[party.number], FRACTION)
        with party.randomness.recording() as trace:
            encode_sentences(party, encoder, x, sentences.lengths)
        party.exchange([], [])  # both begin together
        began = time.perf_counter()
        party.randomness.prepare(trace, HELD)
        found = encode_sentences(party, encoder, x, sentences.lengths)
        passed = time.perf_counter() - began - party.randomness.seconds
        return found, party.costs, passed, party.randomness.seconds, multiplications(trace)

    result = run(program, timeout=3600, keep_messages=False)
    _, costs, seconds, offline, count = result.results[1]
    labels = [cost for label, cost in costs.by_label().items() if label not in ("set-up", "")]
    layer = max(
        (cost for label, cost in costs.by_label().items() if label.startswith("layer")), key=lambda cost: cost.online
    )
    found, clear = (
        reconstruct((result.results[0][0], result.results[1][0])),
        in_the_clear(tower)([sentences])[0].double(),
    )
    cosines = cosine_similarity(found, clear, dim=-1)
    return {
        "layer": {"online_bytes_per_server": layer.online // 2, "rounds": layer.rounds // 2},
        "online_bytes_per_server": sum(cost.online for cost in labels) // 2,
        "offline_bytes_per_server": sum(cost.offline for cost in labels) // 2,
        "rounds": sum(cost.rounds for cost in labels) // 2,
        "seconds": seconds,
        "offline_seconds": offline,
        "tokens_per_second": int(sentences.lengths.sum()) / seconds,
        "cosine_to_clear": cosines.min().item(),
        "multiplications": 2 * count,
        "cosines": cosines.tolist(),
    }


def plain_rate() -> float:
    """Multiplications a second of two threads, each at plain int64 matrix products."""
    factors = [(torch.randint(-(2**62), 2**62, (2048, 384)), torch.randint(-(2**62), 2**62, (384, 1536)))] * 2

    def work(pair: tuple[Tensor, Tensor]) -> None:
        pair[0] @ pair[1]

    def timed() -> float:
        began = time.perf_counter()
        list(pool.map(work, factors))
        return time.perf_counter() - began

    with ThreadPoolExecutor(2) as pool:
        timed()
        return 2 * 2048 * 384 * 1536 / median(timed() for _ in range(5))


def shallow(tower: PrivateTower, calibration: Calibration, layers: int) -> tuple[PrivateTower, Calibration]:
    """The first layers."""
    return replace(tower, layers=tower.layers[:layers]), replace(calibration, layers=calibration.layers[:layers])


def pick(found: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: found[name] for name in names}


def over_sentences(tower: PrivateTower, calibration: Calibration, text_tower: TextTower, count: int) -> dict[str, Any]:
    """Least and mean cosine over so many held-out sentences, padded to their batches."""
    rows = [embedded(text_tower, [row])[0][0] for row in held_out_rows(text_tower, 128, count)]
    groups, _ = batches(rows, 32)
    outside = {name for group in groups for name in calibration.outside(tower, [(group.embeddings, group.mask)])}
    plan, weights = FixedPointPlan.of(tower, calibration), shared_weights(tower, calibration)
    halves = [share(encode(group.embeddings, FRACTION)) for group in groups]

    def program(party: Party) -> list[Shared]:
        encoder = Encoder.mask_and_open(party, weights[party.number], plan)
        pairs = zip(groups, halves, strict=True)
        found = []
        for number, (group, half) in enumerate(pairs):
            found.append(encode_sentences(party, encoder, Shared(half[party.number], FRACTION), group.lengths))
            if party.number:
                print(f"batch {number + 1} of {len(groups)}", file=sys.stderr, flush=True)
        return found

    result = run(program, timeout=3600, keep_messages=False)
    found = torch.cat([reconstruct(pair) for pair in zip(*result.results, strict=True)])
    cosines = cosine_similarity(found, torch.cat(in_the_clear(tower)(groups)).double(), dim=-1)
    return {
        "sentences": len(rows),
        "least": cosines.min().item(),
        "mean": cosines.mean().item(),
        "outside": sorted(outside),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="2 layers, batch 4, ranges of 300 sentences")
    parser.add_argument("--sentences", type=int, default=0, help="only cosines, over so many held-out sentences")
    args = parser.parse_args()
    keep_freed()  # as `sordino mpc server` does
    torch.set_num_threads(1)
    tower, text_tower = bundled_tower(), teacher_of(None)
    depth, batch = (2, 4) if args.quick else (6, 64)
    tower = replace(tower, layers=tower.layers[:depth])
    began = time.perf_counter()
    calibration = calibration_of(tower, text_tower, 300 if args.quick else SENTENCES)
    result: dict[str, Any] = {"quick": args.quick, "calibration_seconds": time.perf_counter() - began}
    if args.sentences:
        print(json.dumps(result | over_sentences(tower, calibration, text_tower, args.sentences), indent=1))
        return
    few = "online_bytes_per_server", "rounds", "seconds", "offline_seconds"
    forward = measured(tower, calibration, whole_rows(text_tower, batch, 32))
    small_pass = forward if args.quick else measured(tower, calibration, whole_rows(text_tower, 4, 32))
    result["layer"] = small_pass["layer"]
    forward["plain_rate"] = plain_rate()
    forward["int64_share"] = forward["multiplications"] / forward["seconds"] / forward["plain_rate"]
    result["forward"] = {name: part for name, part in forward.items() if name not in ("layer", "cosines")}
    small, lengths, depths = (4, (16,), (1,)) if args.quick else (4, (16, 32, 64, 128), (1, 2, 6))
    result["by_batch"] = small
    result["by_layers_and_length"] = {
        layers: {
            length: pick(measured(*shallow(tower, calibration, layers), whole_rows(text_tower, small, length)), *few)
            for length in lengths
        }
        for layers in depths
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
