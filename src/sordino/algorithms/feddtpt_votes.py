"""FedDTPT by votes: the server sees the mean of votes for words, and no client's words.

A variant of `feddtpt` (Wu et al., 2024, arXiv 2411.00985), not of the paper. A client votes, for each place of the
prompt, for the word that its search ended at. It sends the change: +1 for the new word at a place, -1 for the word that
was there, nothing where it changed nothing. So its vector has norm at most sqrt(2 min(M, local_steps)), known before
the run, and a client more or less moves the sum by no more: `dp-fedavg` with `clip` at that norm adds Gaussian noise
to the histogram of votes and shortens nothing. A secure sum hides single votes as well.

The server takes the pairs of place and word with the most votes, as many as clients can have voted for, and votes
that noise made negative as none. A token's weight is its votes times exp of its mean cosine to all votes: attention
over all tokens at once, as the softmax within a client needs that client's words. Clustering and the choice of words
are those of `feddtpt`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from sordino.algorithms import base, feddtpt
from sordino.algorithms.base import ClientData, MethodInfo, RoundContext, Uploads
from sordino.algorithms.feddtpt import (
    Broadcast,
    ClientState,
    Model,
    Server,
    broadcast,
    client_init,
    kept_words,
    prompt,
    schedule,
    server_init,
    tried,
)
from sordino.algorithms.settings.feddtpt import Settings
from sordino.privacy.forward.losses import Losses
from sordino.privacy.ledger import Disclosure

__all__ = [
    "ABOUT",
    "PARENT",
    "Broadcast",
    "ClientState",
    "Model",
    "Server",
    "Settings",
    "Upload",
    "broadcast",
    "client_init",
    "client_round",
    "prompt",
    "schedule",
    "server_init",
    "server_round",
]

PARENT = "feddtpt"

ABOUT: MethodInfo = replace(
    feddtpt.ABOUT,
    paper="a variant of FedDTPT; from no paper",
    discloses=(
        Disclosure("each client's votes for words, to the server every round", "upload"),
        Disclosure("the words that have the votes, to all", "mean"),
    ),
    server_uses="mean",
)


@dataclass(frozen=True)
class Upload(base.Upload):
    change: Tensor  # [K, M, V], of the votes for each word at each place
    weight: Tensor  # [K], its weight in the average


def client_round(
    settings: Settings,
    broadcast: Broadcast,
    state: ClientState,
    data: ClientData,
    losses: Losses,
    round_context: RoundContext,
) -> tuple[Upload, ClientState]:
    words, count = tried(settings, broadcast, data, losses, round_context), int(broadcast.count)
    votes = one_hot(words, count) - one_hot(broadcast.words, count)
    return Upload(votes.to(broadcast.count), data.weights), state


def server_round(settings: Settings, server: Server, uploads: Uploads[Upload], round_context: RoundContext) -> Server:
    votes = uploads.mean("change").double() + one_hot(server.words, len(server.table))  # [M, V]
    cast = len(uploads.each.weight) * len(server.words)
    shares, order = votes.flatten().sort(descending=True, stable=True)
    real = (shares > 1e-9) & (torch.arange(len(shares), device=shares.device) < cast)
    pairs, shares = order[real], shares[real]
    if not len(pairs):  # noise left no vote
        return server
    places, words = pairs // len(server.table), pairs % len(server.table)
    directions = normalize(server.table.double(), dim=-1)[words]
    cosines = directions @ (shares[:, None] * directions).sum(0) / shares.sum()
    weights = shares * cosines.exp()
    kept = kept_words(settings, server.table, words.tolist(), places.tolist(), weights.tolist())
    return Server(torch.tensor(kept, device=server.words.device), server.table)
