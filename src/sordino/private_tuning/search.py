"""Forward-only tuning: a prompt that is found by asking for losses, with no gradient of anything.

The prompt is p_0 + A z, with a fixed random projection A and a short z, which CMA-ES searches: Hansen, The CMA
Evolution Strategy (arXiv 1604.00772), in the `cma` package; for prompts, Sun, Shao, Qian, Huang and Qiu, Black-Box
Tuning for Language-Model-as-a-Service, ICML 2022. Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307), do so on
shares. All candidates of a generation are asked for at once; whoever answers sees prompts, or shares of them, and never
a loss, if the one who searches computes it from what comes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import cma
import numpy as np
import torch
from torch import Tensor

from sordino.errors import ConfigError, RunError
from sordino.progress import Progress, silent

Losses = Callable[[Tensor], Tensor]  # prompts [P, M, E] to their losses [P]


@dataclass(frozen=True)
class Search:
    """How to search.

    Attributes:
        width: of z.
        population: candidates a generation.
        generations: of them.
        deviation: of z at the start.
        scale: standard deviation of a prompt's entries where z's have one of 1.
        seed: of A and of candidates.
        keep_norms: give each of a prompt's tokens the norm that it has in p_0. A tower normalises what enters it, so
            little is lost but the way to values for which a tower on shares was not calibrated.
    """

    width: int = 64
    population: int = 16
    generations: int = 50
    deviation: float = 1.0
    scale: float = 0.05
    seed: int = 0
    keep_norms: bool = False


@dataclass
class Found:
    """Where a search stands; all that it takes to go on.

    Attributes:
        losses: of every candidate so far, a list a generation.
        best: z of the least loss.
        least: that loss; infinite before the first generation.
    """

    losses: list[list[float]] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    least: float = float("inf")

    def better(self, z: Sequence[float], loss: float) -> None:
        """Take z for the best, if it is."""
        if loss < self.least:
            self.best, self.least = [float(each) for each in z], loss

    def to_json(self) -> str:
        """For a file; it holds no prompt but the best z, which is useless without A."""
        return json.dumps({"losses": self.losses, "best": self.best})

    @classmethod
    def from_json(cls, content: str | bytes) -> Found:
        """What `to_json` wrote.

        Raises:
            RunError: it is damaged.
        """
        try:
            stored = json.loads(content)
            losses = [[float(loss) for loss in generation] for generation in stored["losses"]]
            least = min((min(generation) for generation in losses), default=float("inf"))
            return cls(losses, [float(each) for each in stored["best"]], least)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"the state of a search is damaged ({error}); start anew") from None


@lru_cache(maxsize=4)
def projection(search: Search, length: int, width: int) -> Tensor:
    """A, [d, M, E]: fixed by the seed. Its rows are orthogonal, all of one norm, in directions that are uniform.

    With rows that are merely independent, a d near M E stretches some directions many times as far as others, and the
    search is the slower for it.

    Args:
        search: its width, scale and seed.
        length, width: M and E of the prompt.

    Raises:
        ConfigError: z is wider than a prompt.
    """
    if search.width > length * width:
        raise ConfigError("search.width", search.width, f"must be at most the {length * width} numbers of a prompt")
    generator = torch.Generator().manual_seed(search.seed)
    drawn = torch.randn(length * width, search.width, generator=generator, dtype=torch.float64)
    rows, triangle = torch.linalg.qr(drawn)
    rows = rows * triangle.diagonal().sign()  # uniform only with this choice of signs
    norm = search.scale * (length * width / search.width) ** 0.5
    scaled: Tensor = (rows.T * norm).float().view(search.width, length, width)
    return scaled


def prompts(search: Search, start: Tensor, z: Tensor) -> Tensor:
    """p_0 + A z for candidates z [P, d], with p_0's norms if these are kept: [P, M, E]."""
    moved = start + torch.einsum("pd,dme->pme", z.to(start), projection(search, *start.shape).to(start))
    if search.keep_norms:
        moved = moved * (start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
    return moved


def tune(
    search: Search,
    start: Tensor,
    losses: Losses,
    found: Found | None = None,
    finished: Callable[[Found], None] = lambda _: None,
    progress: Progress = silent,
) -> tuple[Tensor, Found]:
    """The prompt of the least loss, of all candidates and the mean of the last distribution.

    That mean is usually better than any candidate, and depends less on which of them came first.

    An interrupted search goes on from the last finished generation: CMA-ES is told the losses it was told before, and
    so stands where it stood, without a forward pass.

    Args:
        search: how to search.
        start: p_0, [M, E].
        losses: of a generation's prompts.
        found: where an earlier search with the same settings ended.
        finished: is given the state after each generation.
        progress: is told how far it is.

    Returns:
        The prompt [M, E], p_0 if there was no generation; and the state.

    Raises:
        RunError: `found` is of another search, or a loss is not finite.
    """
    found = found or Found()
    options = {
        "popsize": search.population,
        "seed": search.seed + 1,  # cma takes 0 for the time of day
        "verbose": -9,
        "maxiter": search.generations,
    }
    strategy = cma.CMAEvolutionStrategy(np.zeros(search.width), search.deviation, options)
    for told in found.losses:
        if len(told) != search.population:
            raise RunError(f"the state has {len(told)} candidates a generation where {search.population} are due")
        strategy.tell(strategy.ask(), told)
    for generation in range(len(found.losses), search.generations):
        candidates = strategy.ask()
        values = losses(prompts(search, start, torch.tensor(np.array(candidates)))).tolist()
        if not np.isfinite(values).all():
            raise RunError(f"a loss in generation {generation + 1} is not finite; lower the deviation or the scale")
        strategy.tell(candidates, values)
        found.better(candidates[int(np.argmin(values))], min(values))
        found.losses.append([float(value) for value in values])
        finished(found)
        progress("tune", generation + 1, search.generations, f"loss {found.least:.3f}")
    if not found.best:
        return start, found
    mean = strategy.result.xfavorite
    found.better(mean, losses(prompts(search, start, torch.tensor(mean[None]))).item())
    return prompts(search, start, torch.tensor([found.best]))[0], found
