"""TOFA: one exchange of class statistics, no training: class prototypes by a hierarchical Bayes, fused with the text.

Zhang, Han, Feng, Zhang, Li, Jiang, Lin, Chen, TOFA: Training-Free One-Shot Federated Adaptation for Vision-Language
Models, AAAI 2026 (arXiv 2511.16423). Features of a class are normal around its prototype; prototypes and their common
covariance have a normal-inverse-Wishart prior, first over all clients, then at each client:

    all clients:   m_c  = (kappa a_c + n_c x_c) / (kappa + n_c)
    client k:      m_kc = (rho m_c + n_kc x_kc) / (rho + n_kc)
    covariance:    S    = (f I / D + N W) / (f + N)

with the mean image feature x_c of n_c examples of all clients, x_kc of n_kc of its own, N the sum of n_c, and W the
covariance within classes. The text is the prior: a_c is the text feature, moved by the difference of the mean image
feature and the mean text feature over the classes, as images and texts lie apart. An image has two predictions: p_v of
normal classes around m_kc with covariance S, and p_t, zero-shot. The fused one trusts each as far as it is sure:

    p = w p_v + (1 - w) p_t,    w = s_v / (s_v + s_t),    s = 1 - entropy(p) / log C.

There is no public code, and only the paper's outline was at hand, so the constants and the form of w are choices, and
are settings where they are numbers. The prompts that the paper lets a language model write are here one hand-written
prompt. W is what a release tells of it: one variance, and a few principal directions if their sums of products are
released. Candidates of which nobody has an example have their text as prototype; if that holds for all, p = p_t.

Under the mechanism `statistics` everything that leaves is one noisy release, and all of the above is post-processing:
so the method is private. Estimates x and n are then those that the release supports, drawn to the text by themselves
where noise is large.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from sordino.algorithms.base import ClientData, InitContext, MethodInfo
from sordino.algorithms.class_statistics import (
    Broadcast,
    ClientState,
    Server,
    StatisticsModel,
    Upload,
    broadcast,
    client_round,
    numbers,
    prompt,
    schedule,
    server_init,
    server_round,
    statistics_of,
)
from sordino.algorithms.settings.tofa import Settings
from sordino.encoders.base import ClassTokens, DualEncoder
from sordino.encoders.prompt_model import Prompt, named_parts
from sordino.privacy.ledger import Disclosure
from sordino.prompts.by_class import at_candidates

__all__ = [
    "Broadcast",
    "Server",
    "Upload",
    "broadcast",
    "client_round",
    "prompt",
    "schedule",
    "server_init",
    "server_round",
]

ABOUT = MethodInfo(
    paper="Zhang et al., TOFA, AAAI 2026 (arXiv 2511.16423)",
    personal="class prototypes: the shared ones, moved to its own class means",
    shared="the mean image feature and the number of examples of each class",
    privacy="with noise on class sums and counts, (epsilon, delta) for an image; without noise none",
    needs="text tower, image features",
    discloses=(
        Disclosure("each client's class sums and counts, to the server once", "upload"),
        Disclosure("the mean features and counts of all clients' classes, to all", "mean"),
        Disclosure("each client's class means and counts, where its prompt is published", "memory"),
    ),
    server_uses="mean",
    trains=False,
    statistics=True,
)


@dataclass(frozen=True)
class Model(StatisticsModel):
    """Prompts of class statistics: "means", "shared" [P, C, D], "counts", "shared_counts", "classes" [P, C].

    With "variance" [P] and, if there are any, "principal" [P, q, D], as in `ClassStatistics`.

    Attributes: text_strength, shared_strength, covariance_strength: kappa, rho, f, as in `Settings`.
    """

    text_strength: float = 1.0
    shared_strength: float = 1.0
    covariance_strength: float = 1.0
    linear: ClassVar[bool] = False

    @classmethod
    def of(cls, settings: Any, encoder: DualEncoder, classes: ClassTokens) -> Self:
        strengths = (settings.text_strength, settings.shared_strength, settings.covariance_strength)
        return cls(encoder, classes, settings.prompt_text, 1.0, *strengths)

    def class_features(self, prompt: Prompt) -> Tensor:
        """Return the text features and the prototypes m_kc of the candidates, [P, 2, C, D]."""
        parts = named_parts(prompt)
        text = self._hand_written.expand(len(parts["classes"]), -1, -1)
        own, shared, counts, totals = (
            self._at_candidates(parts, name) for name in ("means", "shared", "counts", "shared_counts")
        )
        share = totals / totals.sum(1, keepdim=True).clamp(min=torch.finfo(totals.dtype).tiny)
        moved = (share[..., None] * (shared - text)).sum(1, keepdim=True)
        together = _posterior(text + moved, self.text_strength, shared, totals)
        return torch.stack([text, _posterior(together, self.shared_strength, own, counts)], dim=1)

    def scores(self, features: Tensor, prompt: Prompt, images: Tensor) -> Tensor:
        """Return the logarithms of the fused probabilities, [P, B, C]."""
        parts, (text, prototypes) = named_parts(prompt), features.unbind(1)
        by_text = self.logits(text, images).log_softmax(-1)
        towards = self._over_covariance(parts, prototypes)  # S^-1 m, [P, C, D]
        by_image = images @ towards.mT - (prototypes * towards).sum(-1)[:, None] / 2
        by_image = by_image.log_softmax(-1)
        sure = [_sureness(each) for each in (by_image, by_text)]  # each [P, B]
        weight = sure[0] / (sure[0] + sure[1]).clamp(min=1e-12)
        known = (self._at_candidates(parts, "shared_counts") > 0).any(1)  # [P]
        weight = torch.where(known[:, None], weight, 0.0)[..., None]
        return torch.logaddexp(weight.log() + by_image, torch.log1p(-weight) + by_text)

    def _at_candidates(self, parts: dict[str, Tensor], name: str) -> Tensor:
        return at_candidates(parts[name].to(self._hand_written), parts["classes"], self._candidates)[0]

    def _over_covariance(self, parts: dict[str, Tensor], x: Tensor) -> Tensor:
        """Return S^-1 x for x [P, C, D], by the formula of Woodbury where there are principal directions."""
        seen = parts["shared_counts"].sum(1).to(x)  # N, [P]
        all_of_it = self.covariance_strength + seen
        variance = (self.covariance_strength / x.shape[-1] + seen * parts["variance"].to(x)) / all_of_it
        variance = variance[:, None, None]
        if "principal" not in parts:
            return x / variance
        u = parts["principal"].to(x) * (seen / all_of_it).sqrt()[:, None, None]  # [P, q, D]
        inner = variance * torch.eye(u.shape[1]).to(x) + u @ u.mT
        removed: Tensor = torch.linalg.solve(inner, u @ x.mT).mT @ u
        return (x - removed) / variance


def _posterior(prior: Tensor, strength: float, means: Tensor, counts: Tensor) -> Tensor:
    """Return the posterior mean [P, C, D] of prototypes, given a prior mean and the means of so many examples."""
    counts = counts[..., None]
    return (strength * prior + counts * means) / (strength + counts)


def _sureness(logarithms: Tensor) -> Tensor:
    """Return 1 - entropy / log C of predictions [P, B, C]; 1 for a single candidate."""
    candidates = logarithms.shape[-1]
    if candidates == 1:
        return torch.ones_like(logarithms[..., 0])
    entropy = -(logarithms.exp() * logarithms).sum(-1)
    return (1 - entropy / math.log(candidates)).clamp(min=0)


def client_init(settings: Settings, init: InitContext, data: ClientData) -> ClientState:
    statistics = statistics_of(data)
    if statistics.shared is None or statistics.shared_counts is None:
        raise ValueError("a method whose MethodInfo has server_uses = 'mean' needs the means over all clients")
    clients = len(statistics.counts)
    parts = {
        "means": statistics.means,
        "shared": statistics.shared.expand(clients, -1, -1).clone(),
        "counts": statistics.counts.clamp(min=0),
        "shared_counts": statistics.shared_counts.clamp(min=0).expand(clients, -1).clone(),
        "variance": statistics.within.clamp(min=0),
        "classes": numbers(statistics, init),
    }
    if statistics.principal is not None:
        parts["principal"] = statistics.principal.expand(clients, -1, -1).clone()
    return ClientState(parts)
