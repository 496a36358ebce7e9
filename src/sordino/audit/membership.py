"""Was this image trained on? Membership inference against the prompts that a run publishes, by shadow federations.

Two attacks on the same shadows: `shadow_attack`, with which DP-FPL is evaluated (Tran et al., Privacy-Preserving
Personalized Federated Prompt Learning for Multimodal Large Language Models, ICLR 2025, section 5), after Shokri,
Stronati, Song, Shmatikov, Membership Inference Attacks Against Machine Learning Models, S&P 2017; and `lira`, Carlini,
Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, S&P 2022, Algorithm 1 (online).

Each client has as many test images for non-members as it has members, class by class, and a shadow federation trains
on a random half of these candidates, again of every client and class. So nothing is won by knowing which classes or
clients are frequent, and one image more or less of a class tells nothing. Where training and test images were split at
random, the attacked run's own members are one more such half.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from sordino.audit.statistics import Roc, auc_interval, roc
from sordino.audit.subject import Subject, train
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, prompt_count
from sordino.errors import ConfigError, DataError
from sordino.randomness import derive_key, generator

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]

STAGE = "audit: shadow federations"
FALSE_POSITIVE_RATES = (0.001, 0.01)
FEWEST_SHADOWS = 4  # two with and two without each candidate, the least that has a variance
OWN_VARIANCE = 32  # shadows with, and without, a candidate, from which on it has variances of its own (LiRA, VI.A)
FEWEST_RECORDS = 50  # shadows' records of a class, in and out each, from which on it has an attack model of its own
RUNNERS_UP = 3  # wrong classes whose probabilities an attack model sees, the largest first
ROUNDING = 1e-5  # standard deviation below which confidences differ by rounding only
CURVE_POINTS = 200


@dataclass(frozen=True, eq=False)
class Candidates:
    """The n images whose membership is guessed; of every client and class, half are members.

    Attributes:
        rows: [n] indices into the subject's features and labels, none twice.
        owner: [n] the client that each belongs to. Its prompt is attacked, or the only one.
        member: [n] whether its owner trained on it in the attacked run.
    """

    rows: Indices
    owner: Indices
    member: Flags


@dataclass(frozen=True, eq=False)
class Shadows:
    """Federations like the attacked one, whose members are known.

    Attributes:
        prompts: S stacks of K prompts each, or of one where clients share it; on the CPU.
        included: [S, n] which candidates each trained on.
    """

    prompts: tuple[Prompt, ...]
    included: Flags


@dataclass(frozen=True)
class Point:
    """How many members are found at a false positive rate, with the 95% Clopper-Pearson interval."""

    false_positive_rate: float
    true_positive_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Attack:
    """What an attack achieved.

    Attributes:
        auc: area under the ROC curve; a half is guessing.
        auc_interval: its 95% interval, for candidates that are independent given the prompts.
        found: at the false positive rates of 0.1% and 1%. With fewer non-members than the rate's reciprocal, these
            are the members that outscore every non-member.
        curve: (false positive rate, true positive rate), at most 200 points of the ROC curve, ends included.
    """

    auc: float
    auc_interval: tuple[float, float]
    found: tuple[Point, ...]
    curve: tuple[tuple[float, float], ...]

    @classmethod
    def of(cls, scores: Floats, member: Flags) -> Attack:
        """From scores [n], higher where the attack says "member", and the truth [n]."""
        curve = roc(scores, member)
        found = tuple(Point(rate, curve.at(rate), *curve.interval_at(rate)) for rate in FALSE_POSITIVE_RATES)
        return cls(curve.auc, auc_interval(scores, member), found, _thinned(curve))


@dataclass(frozen=True)
class Membership:
    """Membership inference against one run.

    Attributes:
        shadow_attack, lira: the two attacks.
        members, non_members: how many candidates of each kind, which are equal.
        shadows: how many shadow federations were trained.
    """

    shadow_attack: Attack
    lira: Attack
    members: int
    non_members: int
    shadows: int

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return asdict(self)


def infer_membership(subject: Subject, shadows: int, seed: int = 1) -> Membership:
    """Attack a run: choose candidates, train shadow federations, and guess who was trained on.

    Args:
        subject: the run.
        shadows: how many federations to train; from 64 on, LiRA has a variance for every candidate.
        seed: decides candidates, coins, and the shadows' own randomness.

    Raises:
        ConfigError: too few shadows.
        DataError: no client has both training and test images of a class.
        RunError: a shadow diverged.
    """
    chosen = candidates(subject, generator(seed, "candidates"))
    trained = train_shadows(subject, chosen, shadows, seed)
    labels = subject.labels.cpu().numpy()[chosen.rows]
    features = subject.features[torch.from_numpy(chosen.rows).to(subject.features.device)]

    def seen(prompt: Prompt) -> Floats:
        return signals(confidences(subject.runtime.model, prompt, features, chosen.owner), labels)

    target = seen(subject.runtime.prompts(subject.training))
    known = np.stack([seen(prompt) for prompt in trained.prompts])
    return Membership(
        Attack.of(shadow_attack(target, known, trained.included, labels), chosen.member),
        Attack.of(lira(target[:, 0], known[..., 0], trained.included), chosen.member),
        int(chosen.member.sum()),
        int((~chosen.member).sum()),
        shadows,
    )


def candidates(subject: Subject, rng: np.random.Generator) -> Candidates:
    """Members and non-members, as many as there are with as many of either for every client and class.

    Within each class, test images are dealt, in random order and each once, to the clients whose own cells they are of,
    to the one with the fewest so far, up to the number of training images that it has of the class. For each, one of
    those is drawn at random as a member. So a class that a client gets no test image of has no members there, and
    training images beyond the test images that a client got are no candidates.

    Raises:
        DataError: there are none.
    """
    task, labels = subject.task, subject.labels.cpu().numpy()
    members, others, owner = [list[int]() for _ in range(3)]
    for label in np.unique(labels[task.test]):
        held = [rows[labels[rows] == label] for rows in task.train]
        held[: task.attackers] = [rows[:0] for rows in held[: task.attackers]]  # pictures with a trigger stand out
        wanted, given = np.array([len(rows) for rows in held]), np.zeros(len(held), dtype=np.int64)
        unused = [rng.permutation(rows).tolist() for rows in held]
        for position in rng.permutation(np.flatnonzero(labels[task.test] == label)):
            possible = np.flatnonzero((task.local[:, position] > 0) & (given < wanted))
            if len(possible):
                client = int(rng.choice(possible[given[possible] == given[possible].min()]))
                given[client] += 1
                members.append(unused[client].pop())
                others.append(int(task.test[position]))
                owner.append(client)
    if not owner:
        raise DataError("no client has a training and a test image of the same class; lower data.train_per_class")
    return Candidates(np.array(members + others), np.array(owner * 2), np.repeat([True, False], len(owner)))


def train_shadows(subject: Subject, candidates: Candidates, count: int, seed: int) -> Shadows:
    """Train the whole federation again, `count` times, each with another seed and another half of the candidates.

    1. Of every client's candidates of every class a random half is in. Every second shadow gets the other halves, so
       that each candidate is in half of the shadows (as near as an odd count allows), as LiRA wants it.
    2. A client trains on its candidates that are in, and on its training images that are no candidates: the adversary
       is taken to know those. It holds as many images of each class as in the attacked run, at least one therefore, so
       that the sampling rate, noise and weights are the same.
    3. It trains as many rounds as the attacked run did, with the same noise where that had any.

    Where noise is from the operating system (unless `privacy.simulation`), the seed does not decide it.

    Raises:
        ConfigError: fewer than four.
        RunError: a shadow diverged.
    """
    if count < FEWEST_SHADOWS:
        raise ConfigError("shadows", count, f"at least {FEWEST_SHADOWS}, two with and two without each image")
    included = _halves(subject, candidates, count, generator(seed, "halves"))
    prompts = []
    for number, chosen in enumerate(included):
        rows = _held(subject, candidates, chosen)
        shadow_seed = derive_key(seed, "shadow", number)
        runtime = subject.variation(subject.features, subject.labels, rows, shadow_seed)
        prompts.append(map_prompt(runtime.prompts(train(runtime, subject.training.round)), Tensor.cpu))
        subject.progress(STAGE, number + 1, count)
    return Shadows(tuple(prompts), included)


def _halves(subject: Subject, candidates: Candidates, count: int, rng: np.random.Generator) -> Flags:
    """[S, n] which candidates are in."""
    labels = subject.labels.cpu().numpy()[candidates.rows]
    included = np.zeros((count, len(labels)), dtype=np.bool_)
    for client, label in sorted({*zip(candidates.owner.tolist(), labels.tolist(), strict=True)}):
        cell = np.flatnonzero((candidates.owner == client) & (labels == label))
        for number in range(0, count, 2):
            included[number, rng.permutation(cell)[: len(cell) // 2]] = True
    included[1::2] = ~included[: count - 1 : 2]
    return included


def _held(subject: Subject, candidates: Candidates, chosen: Flags) -> list[list[int]]:
    """What each client of a shadow trains on, given which candidates [n] are in."""
    held = []
    for client, rows in enumerate(subject.task.train):
        known = np.setdiff1d(rows, candidates.rows[candidates.member])
        drawn = candidates.rows[chosen & (candidates.owner == client)]
        held.append(np.sort(np.concatenate([known, drawn])).tolist())
    return held


@torch.no_grad()
def confidences(model: PromptModel, prompt: Prompt, features: Tensor, owner: Indices) -> Floats:
    """Logarithms of the probabilities [n, C] that its owner's prompt gives each image.

    Args:
        model: the frozen model.
        prompt: K prompts, or one where clients share it.
        features: [n, ...] of the images.
        owner: [n].
    """
    place = owner if prompt_count(prompt) > 1 else np.zeros_like(owner)
    logits = np.empty((len(features), len(model.classes)))
    for used in np.unique(place).tolist():
        mine = np.flatnonzero(place == used)
        images = features[torch.from_numpy(mine).to(features.device)]
        own = map_prompt(prompt, lambda part, at=used: part[at : at + 1].to(features.device))  # type: ignore[misc]
        logits[mine] = model.predict(own, images)[0].cpu().double().numpy()
    return np.asarray(logits - logsumexp(logits, axis=-1, keepdims=True))


def signals(log_probabilities: Floats, labels: Indices) -> Floats:
    """What attacks look at, of each image: [n, F].

    The first is LiRA's log(p_y / (1 - p_y)), where 1 - p_y is summed up from the other classes, so that it keeps its
    digits where p_y rounds to 1. Then log p_y, the entropy, and log p of the likeliest wrong classes; all classes in
    their own order would be more numbers than a class has shadows' records to learn from.

    Args:
        log_probabilities: [n, C], C at least 2.
        labels: [n].
    """
    true = np.arange(log_probabilities.shape[1]) == labels[:, None]
    others = log_probabilities[~true].reshape(len(labels), -1)
    log_p = log_probabilities[true]
    entropy = -(np.exp(log_probabilities) * log_probabilities).sum(1)
    runners_up = -np.sort(-others, axis=1)[:, :RUNNERS_UP]
    return np.column_stack([log_p - logsumexp(others, axis=1), log_p, entropy, runners_up])


def shadow_attack(target: Floats, shadows: Floats, included: Flags, labels: Indices) -> Floats:
    """Scores [n] of the attack by shadow models: the log-odds that the image was trained on.

    For every class a classifier learns, from all shadows' signals on all candidates of the class, which were trained
    on; it is asked about the attacked prompts' signals. A class of which that is too little shares a classifier with
    all. It is a logistic regression on standardized signals, in and out weighted alike.

    Args:
        target: [n, F] signals of the attacked prompts.
        shadows: [S, n, F] those of the shadows.
        included: [S, n].
        labels: [n].
    """
    whole = _classifier(shadows, included)
    scores = np.empty(len(labels))
    for label in np.unique(labels):
        mine = labels == label
        trained_on = included[:, mine]
        enough = min(trained_on.sum(), (~trained_on).sum()) >= FEWEST_RECORDS
        model = _classifier(shadows[:, mine], trained_on) if enough else whole
        scores[mine] = model.decision_function(target[mine])
    return scores


def _classifier(signals: Floats, included: Flags) -> Pipeline:
    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return model.fit(signals.reshape(-1, signals.shape[-1]), included.reshape(-1))


def lira(target: Floats, shadows: Floats, included: Flags) -> Floats:
    """Scores [n] of the likelihood ratio attack, online: log N(target | in) - log N(target | out).

    The Gaussians of a candidate are those of its confidences over the shadows with it, and over those without. With
    fewer than 32 of either, its variances are those of all candidates around their own means, as Carlini et al.
    recommend (VI.A) where shadows are few.

    Args:
        target: [n] log(p_y / (1 - p_y)) of the attacked prompts.
        shadows: [S, n] those of the shadows.
        included: [S, n].

    Raises:
        ValueError: a candidate is in no shadow or in all, or none is in two and out of two, so that variances are
            unknown.
    """
    rarer = np.minimum(included.sum(0), (~included).sum(0))
    if rarer.min() < 1 or rarer.max() < 2:
        raise ValueError(f"candidate {int(rarer.argmin())} has {rarer.min()} shadows with or without it: train more")
    own = rarer >= OWN_VARIANCE
    # Differences to the target, so that where nothing was learned all are exactly zero, and so is the score.
    differences = shadows - target
    return _log_likelihood_of_zero(differences, included, own) - _log_likelihood_of_zero(differences, ~included, own)


def _log_likelihood_of_zero(values: Floats, chosen: Flags, own: Flags) -> Floats:
    """[n] log N(0), N fitted to the chosen values of each column of [S, n]; `own` [n] have their own variance."""
    counts = chosen.sum(0)
    mean = np.where(chosen, values, 0).sum(0) / counts
    squares = np.where(chosen, (values - mean) ** 2, 0).sum(0)
    variance = np.where(own, squares / np.maximum(counts - 1, 1), squares.sum() / (counts - 1).sum())
    return np.asarray(norm.logpdf(0.0, mean, np.maximum(np.sqrt(variance), ROUNDING)))


def _thinned(curve: Roc) -> tuple[tuple[float, float], ...]:
    """At most `CURVE_POINTS` of a curve, logarithmically spaced in the false positive rate, its ends among them."""
    x, y = curve.false_positive_rate, curve.true_positive_rate
    kept = np.arange(len(x))
    if len(x) > CURVE_POINTS:
        rates = np.geomspace(1 / curve.non_members, 1, CURVE_POINTS - 2)
        highest = np.searchsorted(x, [0.0, *rates], side="right") - 1  # the best threshold at each rate
        kept = np.unique([0, *highest, len(x) - 1])
    return tuple((float(x[at]), float(y[at])) for at in kept)
