"""Prompt stealing through a service: a copy that is fitted to the answers of a served prompt.

After Tramer, Zhang, Juels, Reiter, Ristenpart, Stealing Machine Learning Models via Prediction APIs, USENIX Security
2016. Encoder and class names are public here, the prompt is not. Logits are linear in an image's feature, so the thief
needs no prompt: one vector a class and one number are a copy. With exact probabilities of all classes, as many answers
as a feature has dimensions would determine it. What is told instead is the most probable classes with rounded
probabilities, so the thief looks for the vectors under which its answers are most probable.

1. The thief asks with its own pictures, half of the test pictures, and with blends of them.
2. It starts at the hand-written prompt's class features. They change under a normal prior, by half their length: with
   few answers the copy stays near what is public. The likelihood of an answer is that of the told classes, and of all
   others together. How much answers count against the prior is settled on a fifth of the answers, held out.
3. Copy and victim are compared on the other half of the test pictures.

The prior and the thief's pictures are weaker than they could be: others may do better. No defence is a guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sordino.audit.extraction.pictures import encoded, halves, own_and_blended
from sordino.audit.subject import Subject
from sordino.encoders.base import Capability
from sordino.encoders.classifier import told
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt, prompt_count
from sordino.errors import ConfigError
from sordino.randomness import generator

STAGE = "audit: copy prompts from answers"
QUERIES = (100, 1_000, 10_000)
FEWEST_QUERIES = 10
VICTIMS = 3  # clients whose prompts are copied, where each has its own
SPREAD, BIAS = 0.5, 5.0  # deviations of a class feature's change, as a share of its length, and of a class's logit
WEIGHTS = (1.0, 1e-2, 1e-4)  # of the prior, against one answer
ITERATIONS = 200
FLOOR = 1e-3  # of the variance along a direction, as a share of the mean one

# What an answer tells: how many classes (None: all), and decimals of a probability. The last but one is the default.
DEFENCES: dict[str, tuple[int | None, int]] = {
    "none": (None, 6),
    "two decimals": (None, 2),
    "top 5": (5, 6),
    "top 5, two decimals": (5, 2),
    "top 1, two decimals": (1, 2),
}
USUAL = "top 5, two decimals"


@dataclass(frozen=True)
class Copy:
    """A copy, compared with the victim; the mean over victims.

    Attributes:
        queries: pictures that were asked about; 0 is the hand-written prompt, which everybody has.
        defence: of DEFENCES; "" for no question.
        agreement: share of test pictures that copy and victim give the same class.
        local_agreement: the same on the victim's own classes.
        local_accuracy: of the copy, there.
        cosine: of the copy's class features to the victim's, both seen from their mean over classes, which answers do
            not depend on; None where the victim's logits come from no class features.
    """

    queries: int
    defence: str
    agreement: float
    local_agreement: float
    local_accuracy: float
    cosine: float | None


@dataclass(frozen=True)
class Extraction:
    """Copies of served prompts.

    Attributes:
        victims: the clients whose prompts were copied; empty where all share one.
        pictures: of the thief's own.
        judged: number of test pictures on which copies are judged.
        local_accuracy: of the victims' own prompts.
        hand_written: the copy without a question.
        copies: by number of queries, and by defence.
    """

    victims: tuple[int, ...]
    pictures: int
    judged: int
    local_accuracy: float
    hand_written: Copy
    copies: tuple[Copy, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def steal_by_asking(subject: Subject, seed: int, most: int = QUERIES[-1]) -> Extraction:
    """Copy the prompts of a run from what a service would answer, with up to `most` queries.

    Args:
        subject: the run.
        seed: of the thief's randomness; it chooses the victims too.
        most: queries; smaller numbers of QUERIES are measured too.

    Raises:
        ConfigError: too few queries, too few test pictures, or the encoder has no features.
    """
    if most < FEWEST_QUERIES:
        raise ConfigError("--queries", most, f"at least {FEWEST_QUERIES}, as a fifth of the answers is held out")
    if len(subject.task.test) < 4:
        raise ConfigError("data", len(subject.task.test), "too few test pictures; the thief has half of them")
    if Capability.LIKELIHOODS in subject.runtime.model.encoder.capabilities:
        name = subject.runtime.model.encoder.name
        remedy = "copies are fitted on features of images and class names, which it has none of; leave this attack out"
        raise ConfigError("encoder.name", name, remedy)
    dataset = subject.encoded_data
    runtime, model = subject.runtime, subject.runtime.model
    prompts = runtime.prompts(subject.training)
    clients = range(prompt_count(prompts))
    chosen = sorted(generator(seed, "victims").permutation(len(clients))[:VICTIMS].tolist())
    own, judging = halves(subject.task.test, seed)
    sizes = [size for size in QUERIES if size < most] + [most]
    asked = own_and_blended(dataset.images, subject.task.test[own.numpy()].tolist(), most, seed)
    features = encoded(asked, model.encoder, (model.reads, "image"), subject.progress)
    rows = torch.from_numpy(subject.task.test[judging.numpy()])
    judges = subject.features[rows.to(subject.features.device)]
    plain = judges if model.reads == "image" else dataset.features_of(rows.numpy(), "image").to(judges.device)
    labels = subject.labels[rows.to(subject.labels.device)].to(judges.device)
    start = _written(model)
    results: dict[tuple[int, str], list[Copy]] = {}
    accuracies, done = [], 0
    for client in chosen:
        prompt = map_prompt(prompts, lambda part, at=client: part[at : at + 1])  # type: ignore[misc]
        # Where all share one prompt, every client's classes are its own.
        weights = torch.from_numpy(subject.task.local[client] if len(clients) > 1 else subject.task.local.mean(0))
        judge = _Judge.of(model, prompt, judges, plain, labels, weights[judging].to(judges.device))
        accuracies.append(judge.accuracy)
        results.setdefault((0, ""), []).append(judge.compare(start, start.new_zeros(len(start))))
        probabilities = model.predict(prompt, features[model.reads])[0].softmax(-1)
        for name, (top, digits) in DEFENCES.items():
            answers = Answers.of(probabilities, top, digits)
            for size in sizes:
                copy = fitted(features["image"][:size], answers.first(size), start, model.encoder.logit_scale)
                found = replace(judge.compare(*copy), queries=size, defence=name)
                results.setdefault((size, name), []).append(found)
                done += 1
                subject.progress(STAGE, done, len(chosen) * len(DEFENCES) * len(sizes))
    means = {key: _mean(copies) for key, copies in results.items()}
    hand_written = means.pop((0, ""))
    return Extraction(
        victims=tuple(chosen) if len(clients) > 1 else (),
        pictures=min(len(own), most),
        judged=len(judging),
        local_accuracy=sum(accuracies) / len(accuracies),
        hand_written=hand_written,
        copies=tuple(means[size, name] for size in sizes for name in DEFENCES),
    )


@dataclass(frozen=True)
class Answers:
    """The words of a service about Q pictures.

    Attributes:
        probabilities: [Q, C] as told; 0 where a class was not told.
        told: [Q, C].
    """

    probabilities: Tensor
    told: Tensor

    @classmethod
    def of(cls, exact: Tensor, top: int | None, digits: int) -> Answers:
        """Return answers about pictures with probabilities [Q, C]."""
        probabilities, named = torch.zeros_like(exact), torch.zeros_like(exact, dtype=torch.bool)
        for row, classes in enumerate(told(each, top or exact.shape[1], digits) for each in exact.cpu()):
            places = [place for place, _ in classes]
            probabilities[row, places] = torch.tensor([value for _, value in classes]).to(exact)
            named[row, places] = True
        return cls(probabilities, named)

    def first(self, count: int) -> Answers:
        """Return the first answers."""
        return Answers(self.probabilities[:count], self.told[:count])

    def surprise(self, logits: Tensor) -> Tensor:
        """Return -log of the probability [Q] that logits [Q, C] give the answers, in nats."""
        whole = logits.logsumexp(-1)
        named = (self.probabilities * (whole[:, None] - logits)).sum(-1)
        rest = (1 - self.probabilities.sum(-1)).clamp(min=0) * ~self.told.all(-1)
        others = logits.masked_fill(self.told, -1e4).logsumexp(-1)
        return named + rest * (whole - others)


def fitted(features: Tensor, answers: Answers, start: Tensor, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return the class features [C, D] and the additions to logits [C] under which answers are most probable.

    The prior's weight is the one under which held-out answers are; the problem is convex for each.

    Args:
        features: [Q, D] of the pictures.
        answers: about them.
        start: [C, D], which the prior is around.
        scale: of logits.
    """
    held_out = torch.arange(len(features), device=features.device) % 5 == 4
    known, test = (Answers(answers.probabilities[part], answers.told[part]) for part in (~held_out, held_out))
    best: tuple[float, Tensor, Tensor] | None = None
    for weight in WEIGHTS:
        change, bias = _most_probable(features[~held_out], known, start, scale, weight)
        found = start + change / scale
        loss = float(test.surprise(scale * features[held_out] @ found.T + bias).mean())
        if best is None or loss < best[0]:
            best = (loss, found, bias)
    assert best is not None
    return best[1], best[2]


def _most_probable(
    features: Tensor, answers: Answers, start: Tensor, scale: float | Tensor, weight: float
) -> tuple[Tensor, Tensor]:
    """Return the changes [C, D] of class features, times the scale, and the additions [C] of the best fit."""
    base = scale * features @ start.T
    # Features differ in a few directions far more than in others; a solver wants them alike.
    gram = features.T @ features / len(features)
    values, vectors = torch.linalg.eigh(gram)
    alike = vectors * (values.clamp(min=0) + FLOOR * values.mean()).rsqrt()
    features = features @ alike
    change, bias = torch.zeros_like(start), torch.zeros_like(start[:, 0])
    change.requires_grad_()
    bias.requires_grad_()
    # Class features have unit norm, so a coordinate changes by SPREAD / sqrt(D).
    stiff = weight * start.shape[1] / (2 * (SPREAD * scale) ** 2)
    stiff_bias = weight / (2 * BIAS**2)
    solver = torch.optim.LBFGS([change, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        surprise = answers.surprise(base + features @ change.T + bias).sum()
        value: Tensor = (surprise + stiff * (change @ alike.T).square().sum() + stiff_bias * bias.square().sum()) / len(
            features
        )
        value.backward()
        return value

    solver.step(loss)
    return (change @ alike.T).detach(), bias.detach()


@dataclass(frozen=True)
class _Judge:
    """Compares copies with one victim.

    Attributes:
        plain, labels: [T, D] and [T], the pictures that judge.
        weights: [T], of the victim's own classes; they sum to 1.
        predicted: [T], by the victim.
        class_features: [C, D] of the victim; None where its logits come from none.
        accuracy: of the victim on its own classes.
        scale: of logits.
    """

    plain: Tensor
    labels: Tensor
    weights: Tensor
    predicted: Tensor
    class_features: Tensor | None
    accuracy: float
    scale: float | Tensor

    @classmethod
    def of(
        cls, model: PromptModel, prompt: Prompt, images: Tensor, plain: Tensor, labels: Tensor, weights: Tensor
    ) -> _Judge:
        predicted = model.predict(prompt, images)[0].argmax(-1)
        weights = weights / weights.sum().clamp(min=1e-12)
        features = None
        if model.linear and model.reads == "image":
            with torch.no_grad():
                features = model.linear_part(model.class_features(prompt))[0]
        accuracy = float((weights * (predicted == labels)).sum())
        return cls(plain, labels, weights, predicted, features, accuracy, model.encoder.logit_scale)

    def compare(self, features: Tensor, bias: Tensor) -> Copy:
        """Compare a copy with the victim."""
        predicted = (self.scale * self.plain @ features.T + bias).argmax(-1)
        same = predicted == self.predicted
        cosine = None
        if self.class_features is not None:
            one, other = (part - part.mean(0) for part in (features, self.class_features))
            cosine = float(F.cosine_similarity(one, other).mean())
        return Copy(
            queries=0,
            defence="",
            agreement=float(same.double().mean()),
            local_agreement=float((self.weights * same).sum()),
            local_accuracy=float((self.weights * (predicted == self.labels)).sum()),
            cosine=cosine,
        )


@torch.no_grad()
def _written(model: PromptModel) -> Tensor:
    """Return the class features [C, D] of the hand-written prompt."""
    plain = PromptModel(model.encoder, model.classes)
    return plain.class_features(model.encoder.zero_shot_context()[None].to(model.encoder.device))[0]


def _mean(copies: Sequence[Copy]) -> Copy:
    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    cosines = [copy.cosine for copy in copies if copy.cosine is not None]
    return replace(
        copies[0],
        agreement=mean([copy.agreement for copy in copies]),
        local_agreement=mean([copy.local_agreement for copy in copies]),
        local_accuracy=mean([copy.local_accuracy for copy in copies]),
        cosine=mean(cosines) if cosines else None,
    )
