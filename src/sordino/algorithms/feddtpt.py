"""FedDTPT: a prompt of words. Clients try other words; the server keeps the heaviest of each cluster of tokens.

Wu, Chen, Yang, Li, Hou, Jing, Wang, Chen, Tian, FedDTPT: Federated Discrete and Transferable Prompt Tuning for
Black-Box Large Language Models, 2024 (arXiv 2411.00985). A client changes one word of the prompt at a time and keeps
what predicts more of its examples correctly: the only feedback is accuracy. The server gets the clients' prompts and
treats all their tokens as one set. A token's weight is its mean cosine to the tokens of other clients, softmax over the
tokens of its client. DBSCAN (Ester et al., KDD 1996, by scikit-learn) divides tokens into clusters by the distance of
their embeddings, with the distance at the elbow of the sorted distances to the nearest other token. The heaviest token
of each cluster stays, in the order of their places.

The authors' code was not found; one by others has the server ask a language model instead. What differs, and choices.
A masked language model proposes words in the paper. None of these encoders is one, so words are drawn from a public
vocabulary. The elbow is the point of the sorted distances that is furthest below the chord from the first to the last.
A prompt has always M words: of more clusters, those with the heaviest tokens count; after fewer, the heaviest remaining
words follow, among them those that DBSCAN calls noise. Candidates of a step are tried on one batch, and the current
word is kept unless another has fewer errors there.

With noise on the errors (`sordino.privacy.forward`), whatever clients choose by them is private. The server looks at
each client's words, so the mean that client-level noise needs is not there: `feddtpt-votes` has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from sordino.algorithms import base
from sordino.algorithms.base import ClientData, InitContext, MethodInfo, RoundContext, Schedule, Uploads
from sordino.algorithms.settings.feddtpt import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.privacy.forward.losses import Losses, Question
from sordino.privacy.ledger import Disclosure
from sordino.prompts.words import Vocabulary

ABOUT = MethodInfo(
    paper="Wu et al., FedDTPT, 2024 (arXiv 2411.00985)",
    personal="nothing",
    shared="a prompt of words",
    privacy="images stay, and no gradient is taken; no guarantee on what chosen words tell about them",
    needs="text tower, forward only",
    discloses=(
        Disclosure("each client's choice of words, to the server every round", "upload"),
        Disclosure("the words that the server keeps of them, to all", "mean"),
    ),
    server_uses="each",
    forward_only=True,
)


@dataclass(frozen=True)
class Model(PromptModel):
    """CoOp's model, of prompts that are words.

    Attributes:
        vocabulary: the words by number.
    """

    vocabulary: Vocabulary

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        return cls(encoder, classes, Vocabulary.of(settings.vocabulary, encoder.embed))

    def context(self, prompt: Prompt) -> Tensor:
        """Return the contexts [P, M, E] of word numbers "words" [P, M].

        Raises:
            ValueError: they are no numbers of words.
        """
        words, count = named_parts(prompt)["words"], len(self.vocabulary.words)
        if words.is_floating_point() or (words.numel() and not 0 <= int(words.min()) <= int(words.max()) < count):
            raise ValueError(f"words must be integers from 0 to {count - 1}")
        return self.vocabulary.table[words.to(self.vocabulary.table.device)]

    def text(self, prompt: Prompt) -> list[str]:
        """Return the prompts as text."""
        return [self.vocabulary.text(words) for words in named_parts(prompt)["words"]]

    def class_features(self, prompt: Prompt) -> Tensor:
        return self.text_features(self.context(prompt))

    def flops(self, prompt: Prompt, images: int) -> float:
        return self.encoder.text_flops(1, named_parts(prompt)["words"].shape[-1], self.classes)


@dataclass(frozen=True)
class Server(base.Server):
    words: Tensor  # [M], numbers of words, int64
    table: Tensor  # [V, E], embeddings of all words


@dataclass(frozen=True)
class Broadcast(base.Broadcast):
    words: Tensor  # [M], numbers of words, int64
    count: Tensor  # a scalar, V, a float: how many words there are to propose


@dataclass(frozen=True)
class ClientState(base.ClientState):
    """A client keeps no state."""


@dataclass(frozen=True)
class Upload(base.Upload):
    words: Tensor  # [K, M], numbers of words, int64


def schedule(settings: Settings) -> Schedule:
    return Schedule(settings.local_steps, settings.batch_size or None)


def server_init(settings: Settings, init: InitContext) -> Server:
    vocabulary = Vocabulary.of(settings.vocabulary, init.embed)

    def draw(count: int) -> Tensor:
        return init.streams.common_normal("words", count)

    words = vocabulary.numbers(settings.initial_context, settings.context_length, draw)
    return Server(words.to(init.streams.device), vocabulary.table.to(init.streams.device))


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    return ClientState()


def broadcast(server: Server) -> Broadcast:
    return Broadcast(server.words, server.table.new_tensor(len(server.table)))


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    losses: Losses,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    return Upload(tried(settings, broadcast, data, losses, round_context)), state


def tried(
    settings: Settings, broadcast: Broadcast, data: ClientData, losses: Losses, round_context: RoundContext
) -> Tensor:
    """Return the prompts [K, M] of clients after their steps, as word numbers."""
    words, count = broadcast.words.expand(len(data), -1).clone(), int(broadcast.count)
    clients = torch.arange(len(data), device=words.device)
    batches = data.batches(settings.local_steps, settings.batch_size or None, round_context.streams)
    for step, batch in enumerate(batches):
        drawn = [
            (generator.integers(words.shape[1]), generator.integers(count, size=settings.proposals))
            for generator in round_context.streams.generators(f"proposals {step}")
        ]
        places = torch.tensor([place for place, _ in drawn], device=words.device)  # [K]
        proposed = torch.from_numpy(np.stack([numbers for _, numbers in drawn])).to(words)  # [K, P]
        candidates = words[:, None].repeat(1, 1 + settings.proposals, 1)  # the first is as it was
        candidates[clients, 1:, places] = proposed
        errors = losses(Question(dict, "error"), {"words": candidates}, {}, batch).losses[:, 0]
        best = errors.argsort(dim=1, stable=True)[:, 0]  # of equal ones the first, so the word that was there
        words = candidates[clients, best]
    return words


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    words = uploads.each.words
    weights = attention(server.table, words)
    places = torch.arange(words.shape[1]).repeat(len(words)).tolist()
    kept = kept_words(settings, server.table, words.flatten().tolist(), places, weights.flatten().tolist())
    return Server(torch.tensor(kept, device=words.device), server.table)


def attention(table: Tensor, words: Tensor) -> Tensor:
    """Return the weights [K, M], float64, of the tokens of K clients' prompts [K, M].

    A token's is the softmax, over the tokens of its client, of its mean cosine to the tokens of all other clients. If
    there is no other client, all are alike.
    """
    directions = normalize(table.double(), dim=-1)[words]  # [K, M, E]
    sums = directions.sum(1)
    others = sums.sum(0) - sums  # [K, E]
    count = max(1, (len(words) - 1) * words.shape[1])
    cosines: Tensor = (directions @ others[:, :, None])[..., 0] / count
    return cosines.softmax(dim=1)


def kept_words(
    settings: Settings, table: Tensor, words: Sequence[int], places: Sequence[int], weights: Sequence[float]
) -> list[int]:
    """Return the numbers of M words: the heaviest token of each cluster, in the order of their places.

    Args:
        settings: M, and the smallest cluster.
        table: [V, E], embeddings of all words.
        words, places, weights: of n tokens, the word's number, its place in a prompt, and its weight.
    """
    points = table[torch.tensor(list(words), device=table.device)].double().cpu().numpy()
    labels = clusters(points, settings.smallest_group)
    # From the heaviest down. Rounded, as the order of clients changes weights in their last bits.
    order = sorted(range(len(words)), key=lambda at: (-round(weights[at], 9), places[at], words[at]))
    first: dict[int, int] = {}  # cluster to its heaviest token
    for at in order:
        if labels[at] >= 0:
            first.setdefault(labels[at], at)
    chosen = list(first.values())[: settings.context_length]
    rest = [at for at in order if at not in chosen]
    for repeats in (False, True):  # a word comes twice only where nothing else is left
        for at in rest:
            if len(chosen) < settings.context_length and (repeats or words[at] not in {words[c] for c in chosen}):
                chosen.append(at)
    while len(chosen) < settings.context_length:  # fewer tokens than words
        chosen.append(order[len(chosen) % len(order)])
    return [words[at] for at in sorted(chosen, key=lambda at: (places[at], -round(weights[at], 9), words[at]))]


def clusters(points: NDArray[np.float64], smallest: int) -> list[int]:
    """Return the numbers of the clusters of points [n, E] by DBSCAN; -1 for noise.

    Args:
        points: of n tokens.
        smallest: fewest points within reach of each other that are a cluster.
    """
    from sklearn.cluster import DBSCAN  # slow to import

    reach = elbow(nearest(points))
    # The point at the elbow is within reach, however the two distances are rounded.
    return [int(label) for label in DBSCAN(eps=reach * (1 + 1e-6), min_samples=smallest).fit_predict(points)]


def nearest(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the distance of each of n points [n, E] to the nearest other one; 0 for a single point."""
    squares = (points**2).sum(1)
    distances = np.sqrt(np.maximum(squares[:, None] + squares - 2 * points @ points.T, 0))
    np.fill_diagonal(distances, np.inf)
    return np.where(len(points) > 1, distances.min(1), 0.0)


LEAST_REACH = 1e-6  # of DBSCAN; equal words are at distance zero up to rounding


def elbow(distances: NDArray[np.float64]) -> float:
    """Return the value at the elbow of sorted distances: furthest below the chord from the least to the largest."""
    ordered = np.sort(distances)
    chord = np.linspace(ordered[0], ordered[-1], len(ordered))
    return float(max(ordered[(chord - ordered).argmax()], LEAST_REACH))


def prompt(broadcast: Broadcast, state: ClientState) -> Prompt:
    return {"words": broadcast.words[None]}
