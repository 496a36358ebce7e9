"""Membership inference against the prompts that a run publishes, by shadow federations.

Three attacks use the same shadows. `shadow_attack` is the one that evaluates DP-FPL (Tran et al., Privacy-Preserving
Personalized Federated Prompt Learning for Multimodal Large Language Models, ICLR 2025, section 5), after Shokri,
Stronati, Song, Shmatikov, Membership Inference Attacks Against Machine Learning Models, S&P 2017. `lira` is Carlini,
Chien, Nasr, Song, Terzis, Tramer, Membership Inference Attacks From First Principles, S&P 2022, Algorithm 1 (online).
`rmia` is Zarifzadeh, Liu, Shokri, Low-Cost High-Power Membership Inference Attacks, ICML 2024, online and offline.

Each client has as many test images for non-members as it has members, class by class. A shadow federation trains on a
random half of these candidates, again of every client and class. So the frequency of classes or clients tells nothing,
nor does one image more or less of a class. If training and test images were split at random, the attacked run's own
members are one more such half.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import logsumexp
from torch import Tensor

from sordino.audit import rmia
from sordino.audit.scores import Attack, Claim
from sordino.audit.subject import Subject, train
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, prompt_count
from sordino.errors import ConfigError, DataError
from sordino.randomness import derive_key, generator
from sordino.runtime.side_by_side import Check, side_by_side

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]

STAGE = "audit: shadow federations"
FEWEST_SHADOWS = 4  # two with and two without each candidate, the least that has a variance
OWN_VARIANCE = 32  # a candidate with as many shadows in, and out, has variances of its own (LiRA, VI.A)
FEWEST_RECORDS = 50  # a class with as many shadows' records in, and out, has an attack model of its own
RUNNERS_UP = 3  # wrong classes whose probabilities an attack model sees, the largest first
ROUNDING = 1e-5  # standard deviation below which confidences differ by rounding only


@dataclass(frozen=True, eq=False)
class Candidates:
    """The n images whose membership is guessed; of every client and class, half are members.

    Attributes:
        rows: [n] indices into the subject's features and labels, none twice; the members, and then a partner of each,
            of the same client and class, in the same order.
        owner: [n] the client of each image. Its prompt is attacked, or the only one.
        member: [n] true if the owner trained on the image in the attacked run.
    """

    rows: Indices
    owner: Indices
    member: Flags


@dataclass(frozen=True, eq=False)
class Shadows:
    """Federations like the attacked one, whose members are known.

    Attributes:
        prompts: S stacks of K prompts each, or of one if clients share it; on the CPU.
        included: [S, n] true for the candidates that each trained on.
    """

    prompts: tuple[Prompt, ...]
    included: Flags


@dataclass(frozen=True)
class Membership:
    """Membership inference against one run.

    Attributes:
        shadow_attack, lira: the two attacks by models of the shadows' outputs.
        rmia, rmia_offline: by pairwise likelihood ratios, from all shadows, and from those without the candidate.
        correction: a of `rmia.offline`, as the shadows chose it.
        members, non_members: number of candidates of each kind, which are equal.
        shadows: number of shadow federations that were trained.
        claimed_epsilon: an example's, against the untrusted observer that learned most; None if it is infinite.
        delta: at which claim and bounds are stated. The attacks' bounds hold together at 95% confidence.
    """

    shadow_attack: Attack
    lira: Attack
    rmia: Attack
    rmia_offline: Attack
    correction: float
    members: int
    non_members: int
    shadows: int
    claimed_epsilon: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def infer_membership(subject: Subject, shadows: int, seed: int = 1, jobs: int = 1) -> Membership:
    """Attack a run: choose candidates, train shadow federations, and guess the members.

    Args:
        subject: the run.
        shadows: number of federations to train; from 64 on, LiRA has a variance for every candidate.
        seed: decides candidates, the shadows' halves, and the shadows' own randomness.
        jobs: shadows that are trained at once.

    Raises:
        ConfigError: too few shadows.
        DataError: no client has both training and test images of a class.
        RunError: a shadow diverged.
    """
    chosen = candidates(subject, generator(seed, "candidates"))
    trained = train_shadows(subject, chosen, shadows, seed, jobs)
    labels = subject.labels.cpu().numpy()[chosen.rows]
    features = subject.features[torch.from_numpy(chosen.rows).to(subject.features.device)]

    def seen(prompt: Prompt) -> Floats:
        return signals(confidences(subject.runtime.model, prompt, features, chosen.owner), labels)

    prompts = subject.runtime.prompts(subject.training)
    target, included = seen(prompts), trained.included
    known = np.stack([seen(prompt) for prompt in trained.prompts])
    group = chosen.owner if prompt_count(prompts) > 1 else np.zeros_like(chosen.owner)
    log_p = (target[:, 1], known[..., 1], included)
    correction = rmia.best_correction(known[..., 1], included)
    scores = {
        "shadow_attack": shadow_attack(target, known, included, labels),
        "lira": lira(target[:, 0], known[..., 0], included),
        "rmia": rmia.rmia(rmia.online(*log_p), group),
        "rmia_offline": rmia.rmia(rmia.offline(*log_p, correction), group),
    }
    claim = Claim.of(subject, subject.ledger)
    return Membership(
        **claim.judge_all(scores, chosen.member, seed, subject.persons_of(chosen.rows)),
        correction=correction,
        members=int(chosen.member.sum()),
        non_members=int((~chosen.member).sum()),
        shadows=shadows,
        claimed_epsilon=claim.epsilon,
        delta=claim.delta,
    )


def candidates(subject: Subject, rng: np.random.Generator) -> Candidates:
    """Choose as many members and non-members as possible, with equal numbers of both for every client and class.

    Within each class, test images are dealt in random order, each once. An image goes to a client in whose local split
    it is: to the one with the fewest so far, up to the number of its training images of the class. For each image, one
    of those training images is drawn at random as a member. So a client without a test image of a class has no members
    of that class. Training images beyond the number of a client's test images are no candidates.

    Raises:
        DataError: there are no candidates.
    """
    task, labels = subject.task, subject.labels.cpu().numpy()
    members, others, owner = [list[int]() for _ in range(3)]
    for label in np.unique(labels[task.test]):
        held = [rows[labels[rows] == label] for rows in task.train]
        # An attacker's pictures have a trigger, by which they stand out, so they are no candidates.
        held[: task.attackers] = [rows[:0] for rows in held[: task.attackers]]
        capacity = np.array([len(rows) for rows in held])
        dealt = np.zeros(len(held), dtype=np.int64)
        unused = [rng.permutation(rows).tolist() for rows in held]
        for position in rng.permutation(np.flatnonzero(labels[task.test] == label)):
            possible = np.flatnonzero((task.local[:, position] > 0) & (dealt < capacity))
            if len(possible):
                client = int(rng.choice(possible[dealt[possible] == dealt[possible].min()]))
                dealt[client] += 1
                members.append(unused[client].pop())
                others.append(int(task.test[position]))
                owner.append(client)
    if not owner:
        raise DataError("no client has a training and a test image of the same class; lower data.train_per_class")
    return Candidates(np.array(members + others), np.array(owner * 2), np.repeat([True, False], len(owner)))


def train_shadows(subject: Subject, candidates: Candidates, count: int, seed: int, jobs: int = 1) -> Shadows:
    """Train the whole federation again, `count` times, each with another seed and another half of the candidates.

    1. Of every client's candidates of every class a random half is in. Every second shadow gets the other halves. So
       each candidate is in half of the shadows (as near as an odd count allows), as LiRA requires.
    2. A client trains on its candidates that are in, and on its training images that are no candidates: the adversary
       is assumed to know those. It holds as many images of each class as in the attacked run, and therefore at least
       one, so that the sampling rate, noise and weights are the same.
    3. It trains as many rounds as the attacked run did, with the same noise if that had any.

    If noise is from the operating system (unless `privacy.simulation`), the seed does not decide it. `jobs` shadows are
    trained at once.

    Raises:
        ConfigError: fewer than four shadows.
        RunError: a shadow diverged.
    """
    if count < FEWEST_SHADOWS:
        raise ConfigError("shadows", count, f"at least {FEWEST_SHADOWS}, two with and two without each image")
    included = _halves(subject, candidates, count, generator(seed, "halves"))
    done = itertools.count(1)

    def shadow(number: int) -> Callable[[Check], Prompt]:
        def trained(check: Check) -> Prompt:
            rows = _held(subject, candidates, included[number])
            shadow_seed = derive_key(seed, "shadow", number)
            runtime = subject.variation(subject.features, subject.labels, rows, shadow_seed)
            training = train(runtime, subject.training.round, lambda *_, **__: check(), STAGE)
            prompts = map_prompt(runtime.prompts(training), Tensor.cpu)
            subject.progress(STAGE, next(done), count)
            return prompts

        return trained

    return Shadows(tuple(side_by_side([shadow(number) for number in range(count)], jobs)), included)


def _halves(subject: Subject, candidates: Candidates, count: int, rng: np.random.Generator) -> Flags:
    """Draw the candidates that are in, [S, n]."""
    labels = subject.labels.cpu().numpy()[candidates.rows]
    included = np.zeros((count, len(labels)), dtype=np.bool_)
    for client, label in sorted({*zip(candidates.owner.tolist(), labels.tolist(), strict=True)}):
        cell = np.flatnonzero((candidates.owner == client) & (labels == label))
        for number in range(0, count, 2):
            included[number, rng.permutation(cell)[: len(cell) // 2]] = True
    included[1::2] = ~included[: count - 1 : 2]
    return included


def _held(subject: Subject, candidates: Candidates, chosen: Flags) -> list[list[int]]:
    """Return the training rows of each client of a shadow, given a mask [n] of the candidates that are in."""
    held = []
    for client, rows in enumerate(subject.task.train):
        known = np.setdiff1d(rows, candidates.rows[candidates.member])
        drawn = candidates.rows[chosen & (candidates.owner == client)]
        held.append(np.sort(np.concatenate([known, drawn])).tolist())
    return held


@torch.no_grad()
def confidences(model: PromptModel, prompt: Prompt, features: Tensor, owner: Indices) -> Floats:
    """Return logarithms of the probabilities [n, C] that each image's owner's prompt gives it.

    Args:
        model: the frozen model.
        prompt: K prompts, or one if clients share it.
        features: [n, ...] of the images.
        owner: [n].
    """
    place = owner if prompt_count(prompt) > 1 else np.zeros_like(owner)
    logits = np.empty((len(features), len(model.classes)))
    for used in np.unique(place).tolist():
        owned = np.flatnonzero(place == used)
        images = features[torch.from_numpy(owned).to(features.device)]
        one = map_prompt(prompt, lambda part, used=used: part[used : used + 1].to(features.device))  # type: ignore[misc]
        logits[owned] = model.predict(one, images)[0].cpu().double().numpy()
    return np.asarray(logits - logsumexp(logits, axis=-1, keepdims=True))


def signals(log_probabilities: Floats, labels: Indices) -> Floats:
    """Compute the features that attacks use of each image: [n, F].

    The first is LiRA's log(p_y / (1 - p_y)). There 1 - p_y is summed up from the other classes, so that it keeps its
    digits when p_y rounds to 1. Then come log p_y, the entropy, and log p of the likeliest wrong classes. All classes
    in their own order would be more numbers than a class has shadows' records to learn from.

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
    """Compute scores [n] of the attack by shadow models: the log-odds that the image was trained on.

    For every class a classifier learns membership from all shadows' signals on all candidates of the class. It then
    scores the attacked prompts' signals. A class with too few records uses a classifier of all classes. A classifier is
    a logistic regression on standardized signals, in and out weighted alike.

    Args:
        target: [n, F] signals of the attacked prompts.
        shadows: [S, n, F] signals of the shadows.
        included: [S, n].
        labels: [n].
    """
    whole = _classifier(shadows, included)
    scores = np.empty(len(labels))
    for label in np.unique(labels):
        of_class = labels == label
        trained_on = included[:, of_class]
        enough = min(trained_on.sum(), (~trained_on).sum()) >= FEWEST_RECORDS
        model = _classifier(shadows[:, of_class], trained_on) if enough else whole
        scores[of_class] = model.decision_function(target[of_class])
    return scores


def _classifier(signals: Floats, included: Flags) -> Pipeline:
    from sklearn.linear_model import LogisticRegression  # slow to import, and few commands attack
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return model.fit(signals.reshape(-1, signals.shape[-1]), included.reshape(-1))


def lira(target: Floats, shadows: Floats, included: Flags) -> Floats:
    """Compute scores [n] of the likelihood ratio attack, online: log N(target | in) - log N(target | out).

    The Gaussians of a candidate are those of its confidences over the shadows with it, and over those without. With
    fewer than 32 of either, its variances are those of all candidates around their own means, as Carlini et al.
    recommend (VI.A) for few shadows.

    Args:
        target: [n] log(p_y / (1 - p_y)) of the attacked prompts.
        shadows: [S, n] the same of the shadows.
        included: [S, n].

    Raises:
        ValueError: a candidate is in no shadow or in all, or none is in two and out of two, so that variances are
            unknown.
    """
    rarer = np.minimum(included.sum(0), (~included).sum(0))
    if rarer.min() < 1 or rarer.max() < 2:
        raise ValueError(f"candidate {int(rarer.argmin())} has {rarer.min()} shadows with or without it: train more")
    separate = rarer >= OWN_VARIANCE
    # Differences to the target: if nothing was learned, all are exactly zero, and so is the score.
    differences = shadows - target
    inside = _log_likelihood_of_zero(differences, included, separate)
    outside = _log_likelihood_of_zero(differences, ~included, separate)
    return inside - outside


def _log_likelihood_of_zero(values: Floats, chosen: Flags, separate: Flags) -> Floats:
    """Return log N(0) [n], N fitted to the chosen values of each column of [S, n].

    Columns that are `separate` [n] have their own variance; the others share one.
    """
    counts = chosen.sum(0)
    mean = np.where(chosen, values, 0).sum(0) / counts
    squares = np.where(chosen, (values - mean) ** 2, 0).sum(0)
    pooled = squares.sum() / (counts - 1).sum()
    variance = np.where(separate, squares / np.maximum(counts - 1, 1), pooled)
    from scipy.stats import norm  # slow to import

    return np.asarray(norm.logpdf(0.0, mean, np.maximum(np.sqrt(variance), ROUNDING)))
