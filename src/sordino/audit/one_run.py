"""An audit of example-level privacy by one more training run, with canaries in it.

Steinke, Nasr, Jagielski, Privacy Auditing with One (1) Training Run, NeurIPS 2023 (arXiv 2305.08846), algorithm 1. Many
canaries are put in or left out, each by a fair coin of its own; whoever guesses the coins better than the claimed
(epsilon, delta) allows has refuted it.

Left out means: a blank example stands in the canary's place, whose image feature is the zero vector. Its gradient is
exactly zero, whatever its label. The loss reaches every parameter through the class features alone, and its derivative
by these is (p - y) x^T / tau, which is 0 for x = 0: so is the plain gradient, the clipped one of dp-sgd, and the term
e z^T of the cotangent mechanism, where z = 0 too. A blank adds nothing to the sums that are noised, and as it takes a
place, clients' sizes, sampling rates, divisors, coins and weights are the same with a canary and without. So the runs
that differ in one coin are neighbours in the accountant's sense: one sum with and without one clipped term, under the
very same sampling; and what each coin is worth is bounded by the epsilon of the ledger.

Canaries are unit vectors drawn at random in the encoder's feature space, with random labels. No class name and no other
image explains them, so nothing but training on a canary itself lowers its loss; with D dimensions two of them are
orthogonal up to some 1/sqrt(D), so they hide each other little; and their errors p - y are large, so clipping leaves
them their full influence. They are not realistic images: the guarantee is for every example, so the audit may choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.algorithms.base import ClientData
from sordino.audit.statistics import best_guesses
from sordino.audit.subject import train, vary
from sordino.encoders.prompt_model import map_prompt, prompt_count
from sordino.errors import ConfigError, RunError
from sordino.privacy import accounting
from sordino.privacy.dp_sgd import example_gradients
from sordino.privacy.gradients import Batch, ExactGradients, Gradient, Parameters, PromptOf
from sordino.privacy.ledger import OBSERVERS, Ledger
from sordino.privacy.mechanism import Mechanism, Round
from sordino.privacy.noise import Randomness
from sordino.progress import Progress, silent
from sordino.randomness import derive_key, generator
from sordino.runtime.local import LocalRuntime, Training

CONFIDENCE = 0.95  # of the larger of the two views' bounds; each is at 1 - (1 - CONFIDENCE) / 2
# At which claim and bound are stated, or smaller where the run states a smaller one: a bound from m canaries gives away
# 2 m delta, so at a delta near one over the number of examples it could show little.
DELTA = 1e-5
RIDGE = 0.1  # of the mean square of canaries' gradients: less lets noise through, more lets them hide each other


@dataclass(frozen=True)
class View:
    """What one observer could tell.

    Attributes:
        observer: what it saw, in words.
        epsilon: lower bound in nats; 0 where nothing is shown.
        guesses: how many canaries it guessed.
        correct: how many of these rightly.
    """

    observer: str
    epsilon: float
    guesses: int
    correct: int


@dataclass(frozen=True)
class OneRunAudit:
    """The outcome of an audit.

    Attributes:
        canaries: how many had a coin of their own.
        included: how many of them were trained on.
        claimed_epsilon: what the audited training claims by its own ledger, towards the untrusted observer that learned
            most; None where it claims nothing.
        delta: at which the claim is made and the bounds hold.
        black_box: who sees the prompts before and after training.
        white_box: who sees every noised gradient.
    """

    canaries: int
    included: int
    claimed_epsilon: float | None
    delta: float
    black_box: View
    white_box: View

    @property
    def strongest(self) -> View:
        """The view with the larger bound, which holds at 95 % confidence although it was chosen after looking."""
        return max(self.white_box, self.black_box, key=lambda view: view.epsilon)

    @property
    def refuted(self) -> bool:
        """Whether the lower bound is above the claim."""
        return self.claimed_epsilon is not None and self.strongest.epsilon > self.claimed_epsilon

    def as_dict(self) -> dict[str, Any]:
        """For a report: plain values, those of the strongest view on top."""
        return {**asdict(self.strongest), **asdict(self), "confidence": CONFIDENCE, "refuted": self.refuted}


@dataclass(frozen=True)
class Canaries:
    """Examples whose presence is to be guessed.

    Attributes:
        features, labels: [m, ..., D] of unit norm, and [m].
        owners: [m], the client that each is offered to.
        included: [m], true where the coin says that it is trained on.
    """

    features: Tensor
    labels: Tensor
    owners: Tensor
    included: Tensor

    @classmethod
    def draw(cls, count: int, clients: int, classes: int, shape: Sequence[int], seed: int) -> Canaries:
        """`count` canaries, each a stack of directions as images of `shape` [..., D] are; clients take turns."""
        draw = generator(seed, "canaries")
        features = F.normalize(torch.from_numpy(draw.standard_normal((count, *shape))), dim=-1)
        labels = torch.from_numpy(draw.integers(classes, size=count))
        included = torch.from_numpy(draw.random(count) < 0.5)
        return cls(features, labels, torch.arange(count) % clients, included)

    def to(self, like: Tensor) -> Canaries:
        """The same on the device of `like`, features in its type."""
        device = like.device
        return Canaries(
            self.features.to(like), self.labels.to(device), self.owners.to(device), self.included.to(device)
        )


def audit_in_one_run(
    runtime: LocalRuntime, canaries: int, seed: int, progress: Progress = silent, rounds: int | None = None
) -> OneRunAudit:
    """Train a federation once more with canaries in it, and bound epsilon from below.

    1. Draw canaries, and a coin for each; offer each to one client, which trains on it or on a blank.
    2. Train from the start, with other randomness, settings and noise as they were, by the same implementation of the
       mechanism. What this training claims is read from its own ledger: clients hold more examples than before.
    3. Black box: a canary's score is how much its loss under its owner's prompt fell in training.
    4. White box: it is the estimate of its coin from all noised gradients that its owner released (`Watching`).
    5. Each view calls those with high scores in, and those with low ones out, and gets its bound (`best_guesses`) at
       confidence 97.5 %: both hold at 95 %, and so does the larger.

    Args:
        runtime: the method with its federation.
        canaries: m, at least 2; bounds grow with them until they hide each other.
        seed: of everything random in the audit.
        progress: is told of the rounds.
        rounds: how many to train, where the run ended before its last.

    Raises:
        ConfigError: the unit of privacy is not the example, or there are fewer than 2 canaries.
        RunError: the method does not train.
    """
    _check(runtime, canaries)
    data, model = runtime.data, runtime.model
    shape, classes = data.features.shape[1:], len(model.classes)
    drawn = Canaries.draw(canaries, len(data), classes, shape, seed).to(data.features)
    audited = with_canaries(runtime, drawn, seed)
    watching = Watching(audited.mechanism, drawn, audited.data)
    audited.mechanism = cast(Mechanism, watching)
    before = audited.start()
    after = train(audited, rounds, progress, "audit with canaries")
    delta = DELTA if after.ledger.delta is None else after.ledger.delta
    ties = generator(seed, "ties")

    def view(observer: str, scores: Tensor) -> View:
        coins = drawn.included.cpu().numpy()
        found = best_guesses(scores.double().cpu().numpy(), coins, delta, 1 - (1 - CONFIDENCE) / 2, ties)
        return View(observer, found.epsilon, found.guesses, found.correct)

    return OneRunAudit(
        canaries,
        int(drawn.included.sum()),
        claimed(after.ledger),
        delta,
        view("the owner's prompt, before and after", _losses(audited, before, drawn) - _losses(audited, after, drawn)),
        view("every gradient as it was released", watching.scores()),
    )


def with_canaries(runtime: LocalRuntime, canaries: Canaries, seed: int) -> LocalRuntime:
    """The same federation, each client with its canaries added, or blanks in their place."""
    data = runtime.data
    there = canaries.included.view(-1, *[1] * (canaries.features.ndim - 1))
    features = torch.where(there, canaries.features, 0.0)
    rows = [
        [*own[: int(count)].tolist(), *(len(data.features) + (canaries.owners == client).nonzero().flatten()).tolist()]
        for client, (own, count) in enumerate(zip(data.rows, data.counts, strict=True))
    ]
    units = sum(map(len, rows))
    stated = runtime.mechanism.delta
    delta = {} if stated is None else {"delta": min(stated, accounting.default_delta(units), DELTA)}
    table, labels = torch.cat([data.features, features]), torch.cat([data.labels, canaries.labels])
    return vary(runtime, table, labels, rows, derive_key(seed, "training"), **delta)


def claimed(ledger: Ledger) -> float | None:
    """The largest epsilon of an example towards an untrusted observer; None where it is infinite."""
    untrusted = [observer for observer in OBSERVERS if observer not in ledger.trusted]
    largest = max(accounting.spent(ledger, observer, "example").epsilon for observer in untrusted)
    return largest if np.isfinite(largest) else None


@dataclass
class Sight:
    """What the observer has of one client's gradient in one call; parameter names to tensors.

    Attributes:
        place: in the stack of the round's participants.
        client: its number.
        size: of its batch; the expected one where coins decide.
        rate: the probability with which each of its examples is in the batch.
        own: its n canaries' gradients [n, ...].
        others: the mean gradient of its other examples [...].
        released: the noised sum [...], as it was released.
    """

    place: int
    client: int
    size: float
    rate: float
    own: dict[str, Tensor]
    others: dict[str, Tensor]
    released: dict[str, Tensor]


class Watching:
    """A mechanism that is used as it is, with an observer of what it releases beside it.

    The observer is that of differential privacy's definition: it knows everything but the coins and the noise. A client
    releases, call after call, R = q sum_i b_i g_i + others + noise, where b_i is canary i's coin, g_i its (clipped)
    gradient at the parameters of the call, q the sampling rate. The scores are the ridge estimate of b:

    1. The direction of the other examples' mean gradient is projected out of R and of all g_i. Its length is left open,
       so that scores do not depend on how a mechanism scales what it releases, as long as it keeps to directions.
    2. A client's <R, q g_i> and <q g_i, q g_j> are added up over calls to a vector r and a matrix A.
    3. Its canaries' scores are (A + `RIDGE` (trace A / n) I)^-1 r. The inner products r alone would be scores as well,
       but canaries that train on the same client then hide each other, even where there is no noise.

    Groups of parameters with a clip of their own are measured in units of it. Where not clients but the server, or all
    clients together, noise the shared gradients, what was released is the mean, and R is that, scaled to a client's
    sum. Of the cotangent mechanism this observer sees the gradients that methods get, not the matrix they are made of,
    and weighs their entries alike, though noise does not reach them alike: there its bounds are lower than need be.
    """

    def __init__(self, mechanism: Mechanism, canaries: Canaries, data: ClientData) -> None:
        self._mechanism, self._canaries, self._data = mechanism, canaries, data
        self._products: dict[int, tuple[Tensor, Tensor]] = {}  # client to r [n] and A [n, n]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mechanism, name)

    def scores(self) -> Tensor:
        """[m], float64, about 1 for what was in and 0 for what was not; 0 where the owner never took part."""
        scores = torch.zeros(len(self._canaries.labels), dtype=torch.float64, device=self._canaries.labels.device)
        for client, (along, gram) in self._products.items():
            ridge = RIDGE * gram.diagonal().mean().clamp(min=torch.finfo(gram.dtype).tiny)
            scores[self._mine(client)] = torch.linalg.solve(gram + ridge * torch.eye(len(gram)).to(gram), along)
        return scores

    def open(self, randomness: Randomness, clients: Sequence[int], state: Mapping[str, Tensor]) -> Round:
        """The mechanism's own round, watched."""
        at_work = self._mechanism.open(randomness, clients, state)
        settings = self._mechanism.settings
        means = self._mechanism.facts.shared if settings.on and settings.noise_by != "client" else {}
        sights: list[Sight] = []

        def gradients(prompt_of: PromptOf, parameters: Parameters, fixed: Parameters, batch: Batch) -> Gradient:
            gradient = at_work.gradients(prompt_of, parameters, fixed, batch)
            sights.extend(self._look(clients, prompt_of, parameters, fixed, batch, gradient))
            return gradient

        def average(name: str, values: Tensor, weights: Tensor) -> Tensor:
            mean = at_work.average(name, values, weights)
            for sight in sights:
                scaled = mean * float(weights.sum() / weights[sight.place]) * sight.size
                sight.released.update({parameter: scaled for parameter, sent_as in means.items() if sent_as == name})
            return mean

        def finish() -> dict[str, Tensor]:
            for sight in sights:
                self._add(sight)
            return at_work.finish()

        return replace(at_work, gradients=gradients, average=average, finish=finish)

    def _look(
        self,
        clients: Sequence[int],
        prompt_of: PromptOf,
        parameters: Parameters,
        fixed: Parameters,
        batch: Batch,
        gradient: Gradient,
    ) -> Iterator[Sight]:
        """What is seen of every client that was offered canaries."""
        model, rows = self._mechanism.model, self._data.rows[list(clients)]
        assert model is not None
        counts = self._data.counts[list(clients)]
        offered = (self._canaries.owners == torch.tensor(clients).to(counts)[:, None]).sum(1)
        mask = torch.arange(rows.shape[1], device=rows.device) < (counts - offered)[:, None]  # canaries come last
        rest = Batch(self._data.features[rows], self._data.labels[rows], mask)
        others = ExactGradients(model)(prompt_of, parameters, fixed, rest).by
        sizes = batch.mask.sum(1) if batch.sampling is None else batch.sampling.expected
        for place, client in enumerate(clients):
            if not offered[place]:
                continue
            mine, slot, size = self._mine(client), slice(place, place + 1), float(sizes[place])
            labels = self._canaries.labels[mine][None]
            examples = Batch(self._canaries.features[mine][None], labels, torch.ones_like(labels, dtype=torch.bool))
            at, held = ({name: value[slot] for name, value in each.items()} for each in (parameters, fixed))
            parts = list(example_gradients(model, prompt_of, at, held, examples).pieces)
            own = {name: torch.cat([part[name] for part in parts]) for name in parameters}
            known = {name: value[place] for name, value in others.items()}
            released = {name: value[place] * size for name, value in gradient.by.items()}
            yield Sight(place, client, size, size / float(counts[place]), own, known, released)

    def _add(self, sight: Sight) -> None:
        settings, shared = self._mechanism.settings, self._mechanism.facts.shared
        own, others, released = [], [], []
        for group in ([n for n in sight.own if n in shared], [n for n in sight.own if n not in shared]):
            if not group:
                continue
            vectors = torch.cat([sight.own[name].flatten(1) for name in group], 1).double()
            unit = 1.0
            if settings.mechanism == "dp-sgd":
                personal = settings.personal_clip if shared and group[0] not in shared else None
                unit = settings.clip if personal is None else personal
                vectors = vectors * (unit / vectors.norm(dim=1, keepdim=True).clamp(min=unit))
            own.append(vectors / unit)
            others.append(torch.cat([sight.others[name].flatten() for name in group]).double() / unit)
            released.append(torch.cat([sight.released[name].flatten() for name in group]).double() / unit)
        known = F.normalize(torch.cat(others), dim=0)
        vectors, sums = sight.rate * torch.cat(own, 1), torch.cat(released)
        vectors = vectors - (vectors @ known)[:, None] * known
        along, gram = vectors @ sums, vectors @ vectors.T  # the vectors have no part along `known`
        before = self._products.get(sight.client, (torch.zeros_like(along), torch.zeros_like(gram)))
        self._products[sight.client] = before[0] + along, before[1] + gram

    def _mine(self, client: int) -> Tensor:
        """Which canaries were offered to a client, as its rows have them."""
        return (self._canaries.owners == client).nonzero().flatten()


@torch.no_grad()
def _losses(runtime: LocalRuntime, training: Training, canaries: Canaries) -> Tensor:
    """Every canary's cross-entropy [m], in nats, under the prompt of its owner."""
    prompt = runtime.prompts(training)
    losses = canaries.features.new_zeros(len(canaries.labels))
    for client in range(prompt_count(prompt)):
        mine = canaries.owners == client if prompt_count(prompt) > 1 else torch.ones_like(canaries.included)
        own = map_prompt(prompt, lambda part, at=client: part[at : at + 1])  # type: ignore[misc]
        logits = runtime.model.predict(own, canaries.features[mine])[0]
        losses[mine] = F.cross_entropy(logits, canaries.labels[mine], reduction="none").to(losses)
    return losses


def _check(runtime: LocalRuntime, canaries: int) -> None:
    if runtime.privacy.unit != "example":
        remedy = "its unit is the client, and canaries audit example-level privacy only; use 'dp-sgd' or 'cotangent'"
        raise ConfigError("privacy.mechanism", runtime.privacy.mechanism, remedy)
    if canaries < 2:
        raise ConfigError("canaries", canaries, "must be at least 2: one to call in, and one to call out")
    if not runtime.rounds:
        raise RunError("this method does not train, so there is nothing that canaries could be found in")
