"""Forward-only tuning: a search for a prompt that needs losses only, and no gradient.

The prompt is p_0 + A z, with a fixed random projection A and a short z. CMA-ES searches z: Hansen, The CMA Evolution
Strategy (arXiv 1604.00772), by the `cma` package. The method for prompts is from Sun, Shao, Qian, Huang and Qiu,
Black-Box Tuning for Language-Model-as-a-Service, ICML 2022. Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307), run
it on shares. All candidates of a generation are evaluated at once. The forward pass sees prompts, or shares of them.
It never sees a loss if the searcher computes losses from the features that it returns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sordino.errors import ConfigError, RunError
from sordino.private_tuning.search_settings import Search
from sordino.progress import Progress, silent

Losses = Callable[[Tensor], Tensor]  # maps prompts [P, M, E] to their losses [P]


@dataclass
class SearchState:
    """The state of a search, complete enough to go on.

    Attributes:
        losses: of every candidate so far, a list for each generation.
        best: z of the least loss.
        least: the least loss; infinite before the first generation.
    """

    losses: list[list[float]] = field(default_factory=list)
    best: list[float] = field(default_factory=list)
    least: float = float("inf")

    def better(self, z: Sequence[float], loss: float) -> None:
        """Replace the best z if this loss is lower."""
        if loss < self.least:
            self.best, self.least = [float(value) for value in z], loss

    def to_json(self) -> str:
        """Serialize the state for a file.

        It is as secret as the prompt: A follows from the seed, and so does each candidate with the losses before it.
        """
        return json.dumps({"losses": self.losses, "best": self.best})

    @classmethod
    def from_json(cls, content: str | bytes) -> SearchState:
        """Invert `to_json`.

        Raises:
            RunError: the content is damaged.
        """
        try:
            stored = json.loads(content)
            losses = [[float(loss) for loss in generation] for generation in stored["losses"]]
            least = min((min(generation) for generation in losses), default=float("inf"))
            return cls(losses, [float(value) for value in stored["best"]], least)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"the state of a search is damaged ({error}); start anew") from None


@lru_cache(maxsize=4)
def projection(search: Search, length: int, width: int) -> Tensor:
    """Draw A, [d, M, E], from the seed. Its rows are orthogonal, of one norm, in uniform directions.

    If rows were merely independent, a d near M E would stretch some directions many times as far as others, and slow
    the search.

    Args:
        search: gives width, scale and seed.
        length, width: M and E of the prompt.

    Raises:
        ConfigError: z is wider than a prompt.
    """
    if search.width > length * width:
        raise ConfigError("search.width", search.width, f"must be at most the {length * width} numbers of a prompt")
    generator = torch.Generator().manual_seed(search.seed)
    gaussian = torch.randn(length * width, search.width, generator=generator, dtype=torch.float64)
    rows, triangle = torch.linalg.qr(gaussian)
    rows = rows * triangle.diagonal().sign()  # uniform only with this choice of signs
    norm = search.scale * (length * width / search.width) ** 0.5
    scaled: Tensor = (rows.T * norm).float().view(search.width, length, width)
    return scaled


def prompts(search: Search, start: Tensor, z: Tensor) -> Tensor:
    """Compute p_0 + A z for candidates z [P, d], with p_0's norms if these are kept: [P, M, E]."""
    a = projection(search, *start.shape).to(start)
    moved = start + torch.einsum("pd,dme->pme", z.to(start), a)
    if search.keep_norms:
        moved = moved * (start.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True))
    return moved


def tune(
    search: Search,
    start: Tensor,
    losses: Losses,
    state: SearchState | None = None,
    finished: Callable[[SearchState], None] = lambda _: None,
    progress: Progress = silent,
) -> tuple[Tensor, SearchState]:
    """Find the prompt of the least loss, among all candidates and the mean of the last distribution.

    This mean is usually better than any candidate, and depends less on chance.

    An interrupted search goes on after the last finished generation. CMA-ES is given the recorded losses again, which
    restores its state without a forward pass.

    Args:
        search: settings.
        start: p_0, [M, E].
        losses: of a generation's prompts.
        state: of an interrupted search with the same settings.
        finished: receives the state after each generation.
        progress: receives the number of generations done.

    Returns:
        The prompt [M, E], which is p_0 if there was no generation; and the state.

    Raises:
        RunError: `state` belongs to another search, or a loss is not finite.
    """
    import cma  # slow to import

    state = state or SearchState()
    options = {
        "popsize": search.population,
        "seed": search.seed + 1,  # cma takes 0 for the time of day
        "verbose": -9,
        "maxiter": search.generations,
    }
    strategy = cma.CMAEvolutionStrategy(np.zeros(search.width), search.deviation, options)
    for generation_losses in state.losses:
        if len(generation_losses) != search.population:
            raise RunError(
                f"the state has {len(generation_losses)} candidates a generation where {search.population} are due"
            )
        strategy.tell(strategy.ask(), generation_losses)
    for generation in range(len(state.losses), search.generations):
        candidates = strategy.ask()
        values = losses(prompts(search, start, torch.tensor(np.array(candidates)))).tolist()
        if not np.isfinite(values).all():
            raise RunError(f"a loss in generation {generation + 1} is not finite; lower the deviation or the scale")
        strategy.tell(candidates, values)
        state.better(candidates[int(np.argmin(values))], min(values))
        state.losses.append([float(value) for value in values])
        finished(state)
        progress("tune", generation + 1, search.generations, f"loss {state.least:.3f}")
    if not state.best:
        return start, state
    mean = strategy.result.xfavorite
    state.better(mean, losses(prompts(search, start, torch.tensor(mean[None]))).item())
    return prompts(search, start, torch.tensor([state.best]))[0], state
