"""Both parties in one process, for tests: numbers in, numbers and costs out, and randomness that can be repeated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sordino.mpc.arithmetic.packing import packed_size
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import encode
from sordino.mpc.dealing.costs import Cost, Costs
from sordino.mpc.protocols.party import Party, Shared, reconstruct, run
from sordino.mpc.protocols.roots import Root

KEYS = bytes(range(32)), bytes(range(32, 64))
Held = Callable[[Party], Shared]


def held(values: Tensor, fraction: int, seed: int = 0) -> Held:
    """What each party holds of numbers: a share that the seed fixes."""
    return held_integers(encode(values, fraction), fraction, seed)


def held_integers(integers: Tensor, fraction: int = 0, seed: int = 0) -> Held:
    """The same of integers of the ring."""
    first = Prg(seed.to_bytes(32, "big")).integers(0, tuple(integers.shape))
    shares = first, integers - first
    return lambda party: Shared(shares[party.number], fraction)


def computed(program: Callable[[Party], Shared]) -> tuple[Tensor, Costs]:
    """The numbers that a program comes to, and what they cost."""
    result = run(program, KEYS, timeout=60)
    return reconstruct(result.results), result.costs


def cost_of(costs: Costs, name: str) -> Cost:
    """What a protocol cost, where it was run by itself."""
    return costs.by_protocol()[name]


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def root_cost(root: Root, count: int, fraction: int, x_fraction: int, bits: int = 64) -> Cost:
    """What the docstring of `inverse_root` says, for a result and an x of so many fraction bits."""
    frequencies, steps, some = len(root.start.frequencies), root.steps, bool(root.steps)
    start = 2 * root.precision  # fraction bits
    between = min(root.fractions[0], start)
    step = (root.power + 1) * between + min(root.fractions[1], x_fraction) + (root.power == 2)
    dropped = [start - between, *[step - between] * (steps - 1), step - fraction] if steps else [start - fraction]
    online = packed_size(count, bits) + sum(packed_size(count, 64 - each) for each in dropped)
    online += (8 * steps + 8 * some) * count
    offline = 16 * frequencies + 16 + 16 * some + (8 * (2 * root.power + 1) + 16) * steps
    return Cost(2 + 2 * steps, online, offline * count)
