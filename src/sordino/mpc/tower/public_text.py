"""Public sentences to distill and to calibrate a tower on: definitions of WordNet and names of ImageNet, from timm.

For calibration, definitions have all lengths up to 128 tokens; long ones are joined from several. Names stand behind
soft contexts, since tuning will put soft contexts there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from sordino.encoders.bundled import Embedder
from sordino.mpc.errors import OutOfRange
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.tower import PrivateTower
from sordino.progress import Progress, silent

HELD_OUT = 512  # definitions that are used neither to train nor to calibrate
SOFT_LENGTHS = (1, 16)  # tokens of a soft context
SOFT_NOISE = 0.03  # standard deviation of the noise on its embeddings in distillation; they have one of 0.05
LENGTHS = (8, 16, 32, 64, 128)  # most tokens of a definition
FEWEST = 32  # most tokens of a name behind the longest soft context
BATCH = 64
SOFT_BATCH = 32
NOISES = (SOFT_NOISE, 0.3, 0.05, 0.1)  # in calibration
SENTENCES = 4000  # for the measurement of ranges
TOKENS = 1024  # of a batch, about, at most
Batch = tuple[Tensor, Tensor]  # embeddings [B, T, E], and mask [B, T]


def calibration_of(
    tower: PrivateTower,
    embedder: Embedder,
    sentences: int = SENTENCES,
    margin: float = 1.5,
    seed: int = 0,
    progress: Progress = silent,
) -> Calibration:
    """Measure a tower's ranges on public text: half definitions, half names behind soft contexts.

    Args:
        tower: in the clear.
        embedder: with the tower's tokenizer and embeddings.
        sentences: about how many, at least 300. 4,000 take a minute on one core. With half as many, a squared norm of
            new soft contexts was once 3% outside.
        margin: see `Calibration.measure`.
        seed: of random draws.
        progress: receives the number of sentences done.

    Raises:
        OutOfRange: attention weights of a query add up to zero or less, or the tower has too few positions.
    """

    def reported() -> Iterator[Batch]:
        done = 0
        for embeddings, mask in calibration_batches(embedder, sentences, seed):
            yield embeddings, mask
            done += len(mask)
            progress("calibrate", min(done, sentences), sentences)

    return Calibration.measure(tower, reported(), margin)


def calibration_batches(tower: Embedder, sentences: int, seed: int) -> Iterator[Batch]:
    """Yield batches of about `sentences` in all, with soft contexts and every length in `LENGTHS`. None is held out.

    Lengths for which a tower has no positions are left out. Three in four soft contexts have more noise than in
    distillation, since a search goes far from its start.

    Raises:
        OutOfRange: the tower has too few positions.
    """
    positions = len(tower.positions)
    if positions < FEWEST:
        raise OutOfRange(f"a tower of {positions} positions: the sentences that ranges are measured on need {FEWEST}")
    generator = torch.Generator().manual_seed(seed)
    texts = split_definitions()[1]

    @cache
    def tokens(index: int) -> list[int]:  # few of the texts are drawn
        ids: list[int] = tower.tokenizer.encode(texts[index]).ids
        return ids

    sizes = {longest: min(BATCH, TOKENS // longest) for longest in LENGTHS if longest <= positions}
    for _ in range(max(1, round(sentences / 2 / sum(sizes.values())))):
        for longest, size in sizes.items():
            yield embedded(tower, [_joined(tokens, len(texts), longest, generator) for _ in range(size)])
    name_rows = name_tokens(tower)
    for number in range(max(len(NOISES), round(sentences / 2 / SOFT_BATCH))):
        yield behind_soft_context(tower, name_rows, SOFT_BATCH, NOISES[number % len(NOISES)], generator)


def held_out_rows(tower: Embedder, longest: int, count: int = HELD_OUT) -> list[list[int]]:
    """Return tokens of held-out definitions, cut to `longest`: the first 512 alone, later ones in reversed pairs.

    Neither distillation nor calibration uses these definitions.
    """
    rows = [tower.tokenizer.encode(text).ids for text in split_definitions()[0]]
    pairs = [[*second[:-1], *first[1:]] for first, second in pairwise(rows)]
    return [_cut(row, longest) for row in [*rows, *pairs][:count]]


def embedded(tower: Embedder, rows: list[list[int]]) -> Batch:
    """Embed sentences of tokens, padded with token 0."""
    longest = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows])
    return tower.words[tokens] + tower.positions[:longest], mask


def definitions() -> list[str]:
    """Return WordNet's 21,841 definitions with their words.

    An example is `jacksnipe, half snipe: a small short-billed snipe`.
    """
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-22k")
    return [info.index_to_description(index, detailed=True) for index in range(info.num_classes())]


def names() -> list[str]:
    """Return ImageNet's 1,000 class names."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    return [info.index_to_description(index).partition(",")[0] for index in range(info.num_classes())]


def split_definitions() -> tuple[list[str], list[str]]:
    """Return held-out definitions, and the others. The split is the same for every seed."""
    texts = definitions()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    return [texts[index] for index in order[:HELD_OUT]], [texts[index] for index in order[HELD_OUT:]]


def name_tokens(tower: Embedder) -> list[list[int]]:
    """Return the tokens of 'name.' for each of ImageNet's names."""
    return [tower.tokenizer.encode(f"{name}.", add_special_tokens=False).ids for name in names()]


def behind_soft_context(
    tower: Embedder, name_rows: list[list[int]], count: int, noise: float, generator: torch.Generator
) -> Batch:
    """Make names behind soft contexts of one length: random words with noise on their embeddings.

    Args:
        tower: with its tokenizer and embeddings.
        name_rows: see `name_tokens`.
        count: number of sentences.
        noise: standard deviation.
        generator: of all random draws.
    """
    low, high = SOFT_LENGTHS
    length = int(torch.randint(low, high + 1, (), generator=generator))
    chosen = torch.randint(len(name_rows), (count,), generator=generator).tolist()
    start, end = (tower.tokenizer.token_to_id(mark) for mark in ("[CLS]", "[SEP]"))
    words = torch.randint(len(tower.words), (count, length), generator=generator).tolist()
    rows = [[start, *context, *name_rows[name], end] for context, name in zip(words, chosen, strict=True)]
    embeddings, mask = embedded(tower, rows)
    drawn = torch.randn(count, length, embeddings.shape[-1], generator=generator)
    embeddings[:, 1 : 1 + length] += noise * drawn.to(embeddings)
    return embeddings, mask


def _joined(tokens: Callable[[int], list[int]], count: int, longest: int, generator: torch.Generator) -> list[int]:
    """Join random definitions between one [CLS] and one [SEP], until they have more than half of `longest` tokens.

    Args:
        tokens: of a definition, by its number.
        count: of definitions.
        longest: most tokens that are returned.
        generator: of the numbers.
    """
    least = longest // 2 + 1
    row: list[int] = []
    while len(row) < least:
        following = tokens(int(torch.randint(count, (), generator=generator)))
        row = [*row[:-1], *following[1:]] if row else following
    return _cut(row, longest)


def _cut(row: list[int], longest: int) -> list[int]:
    return row if len(row) <= longest else [*row[: longest - 1], row[-1]]
