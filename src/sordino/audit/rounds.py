"""Membership inference by the server, from the uploads of all clients over the rounds.

Zhu, Li, Gu, Deng, Feng, Fan, FedMIA: An Effective Membership Inference Attack Exploiting "All for One" Principle in
Federated Learning, CVPR 2025 (arXiv 2402.06289). A client did not train on another client's images. So for a candidate
of one client, the uploads of all others show how a measure is distributed if the image was not trained on. The server
compares the measure of the client's own upload with this reference, round by round, and joins the rounds. It trains no
shadow model.

FedMIA measures the cosine of the upload with the image's gradient. Gradients of a prompt share most of their
direction, whatever the image: their cosines hardly tell images of one class apart. So this attack measures the image's
coefficient in the upload instead. An upload is read as a weighted sum of gradients, u = sum_x w_x g_x + noise, over the
candidates x of its client. All w are solved for together, by ridge regression, and what images share counts once. The
ridge is the noise's variance over the coefficients' (Hoerl, Kennard, Technometrics 1970), both estimated from u. If the
noise is far above the gradients, the estimate is the plain product with the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sordino.algorithms.base import (
    AnyState,
    Broadcast,
    ClientState,
    PersonalBroadcast,
    map_tensors,
    named_tensors,
    take,
)
from sordino.audit import stealing
from sordino.audit.membership import Candidates, candidates
from sordino.audit.scores import Attack, Claim
from sordino.audit.subject import Subject, refuse_persons, replaces_images
from sordino.audit.wiretap import Message, no_data, repeated, same_end
from sordino.encoders.prompt_model import Prompt
from sordino.errors import ConfigError
from sordino.privacy.dp_sgd import example_gradients
from sordino.privacy.gradients import Batch, Parameters
from sordino.privacy.mechanism import INSTEAD_OF_A_MEAN
from sordino.randomness import derive_key, generator
from sordino.runtime.local import LocalRuntime

Floats = NDArray[np.float64]

MOST_PAIRS = 500  # of candidates; of more, as many at random
GRADIENTS = 2000  # of single images, which set the number of rounds that are attacked; a minute on a core
LEAST_RIDGE, MOST_RIDGE = 1e-6, 1e6  # in units of the gradients' mean squared length


@dataclass(frozen=True)
class Rounds:
    """The result of the attack.

    Attributes:
        attack: its ROC curve, and the bound on an example's epsilon.
        members, non_members: number of candidates of each kind, which are equal.
        rounds: number of rounds whose uploads were compared, spread evenly, the last one among them.
        same_run: true if the repeated run, whose uploads were recorded, ended at the run's state. With noise from the
            operating system it does not, and its uploads are those attacked.
        claimed_epsilon: an example's, against untrusted observers; None if it is infinite or the server is trusted.
        delta: at which claim and bound are stated.
    """

    attack: Attack
    members: int
    non_members: int
    rounds: int
    same_run: bool
    claimed_epsilon: float | None
    delta: float

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def infer_from_rounds(subject: Subject, seed: int) -> Rounds:
    """Guess the members of every client from the uploads that reach the server.

    1. Repeat the run with its own seed, and record everything that reaches the server.
    2. In several rounds, compute the gradients of all candidates at the prompt that the server knows of their client.
    3. Measure the candidates' coefficients in the upload of their client, and in those of all others.
    4. Score a candidate by the mean over rounds of its own measure, standardized by the others'.

    Args:
        subject: the run.
        seed: decides the candidates, and the server's draws in place of the clients' own.

    Raises:
        ConfigError: the server sees no upload of a single client, there is only one client, or the person is the unit
            of privacy.
        DataError: no client has both training and test images of a class.
    """
    _check(subject)
    chosen = _fewer(candidates(subject, generator(seed, "candidates")), seed)
    training, messages = repeated(subject)
    attacked = _attacked(messages, len(chosen.rows))
    scores, counts = np.zeros(len(chosen.rows)), np.zeros(len(chosen.rows))
    for number, (message, states) in enumerate(_known(subject.runtime, messages, attacked, seed)):
        for client in message.clients:
            own = np.flatnonzero(chosen.owner == client)
            if len(own) and len(message.clients) > 1:
                gradients = _gradients(subject, message, states, client, chosen.rows[own])
                scores[own] += _standardized(gradients, _vectors(subject.runtime, message), message, client)
                counts[own] += 1
        subject.progress("attack over rounds", number + 1, len(attacked))
    scores /= np.maximum(counts, 1)
    claim = Claim.of(subject, training.ledger, observer_is_server=True)
    return Rounds(
        claim.judge(Attack.of(scores, chosen.member, subject.persons_of(chosen.rows)), scores, seed),
        int(chosen.member.sum()),
        int((~chosen.member).sum()),
        len(attacked),
        same_end(training, subject.training),
        claim.epsilon,
        claim.delta,
    )


def _check(subject: Subject) -> None:
    """Refuse a run of persons, and one whose server sees no client's upload, or none that is a sum of gradients."""
    runtime = subject.runtime
    refuse_persons(runtime)
    about, method = runtime.algorithm.ABOUT, subject.config.algorithm
    if replaces_images(runtime):
        remedy = (
            "clients train on examples drawn from what they released once, so uploads tell nothing more; attack the "
            "'release' itself"
        )
        raise ConfigError("privacy.mechanism", "statistics", remedy)
    if not runtime.rounds:
        raise ConfigError("algorithm", method, "no round is trained, so the attack over rounds has no upload to read")
    if about.pools_data or about.server_uses == "nothing":
        raise ConfigError("algorithm", method, "no upload leaves a client, so the attack over rounds has none to read")
    if about.server_uses == "shares":
        does = INSTEAD_OF_A_MEAN["shares"]
        raise ConfigError("algorithm", method, f"this method {does}: the server sees no upload; attack its 'distances'")
    if runtime.privacy.on and runtime.privacy.noise_by == "shares":
        remedy = "the server sees the sum and no upload, so the attack over rounds has none to read"
        raise ConfigError("privacy.noise_by", "shares", remedy)
    if hasattr(runtime.algorithm, "server_exchange"):
        remedy = "clients upload prompts and not changes; 'membership' attacks what a prompt tells"
        raise ConfigError("algorithm", method, remedy)
    if about.forward_only:
        remedy = "uploads come of losses, and are no sums of gradients; 'membership' attacks what a prompt tells"
        raise ConfigError("algorithm", method, remedy)
    if len(runtime.data) < 2:
        raise ConfigError("partition.clients", len(runtime.data), "other clients are the reference; at least 2")


def _fewer(chosen: Candidates, seed: int) -> Candidates:
    """Return the candidates, or `MOST_PAIRS` pairs of them at random."""
    pairs = len(chosen.rows) // 2
    if pairs <= MOST_PAIRS:
        return chosen
    kept = np.sort(generator(seed, "pairs of candidates").permutation(pairs)[:MOST_PAIRS])
    both = np.concatenate([kept, kept + pairs])
    return Candidates(chosen.rows[both], chosen.owner[both], chosen.member[both])


def _attacked(messages: Sequence[Message], count: int) -> list[int]:
    """Return the numbers of the rounds that are attacked with `count` candidates, evenly spread, with the last."""
    seen = [message.number for message in messages if len(message.clients) > 1]
    rounds = min(len(seen), max(1, GRADIENTS // count))
    return [seen[-1 - place * len(seen) // rounds] for place in range(rounds)][::-1]


def _known(
    runtime: LocalRuntime, messages: Sequence[Message], attacked: Sequence[int], seed: int
) -> Iterator[tuple[Message, ClientState]]:
    """Yield each attacked round with the clients' states [K, ...] that the server takes for theirs.

    They are replayed from the uploads where that is possible (`stealing`). Otherwise they are as they publicly started,
    of clients without data: a state may hold images.
    """
    everyone = range(len(runtime.data))
    init = runtime.federation.init_context(everyone)
    states = runtime.algorithm.client_init(runtime.settings, init, no_data(runtime, len(everyone)))
    replays = stealing.inapplicable(runtime) is None
    for message in messages:
        if message.number in attacked:
            yield message, states
        if replays:
            states = stealing.replayed(runtime, [message], states, derive_key(seed, "thief", 0))


def _vectors(runtime: LocalRuntime, message: Message) -> Tensor:
    """Return the participants' uploads as sums of gradients, [K, P], float64 on the CPU.

    A change is against the gradients that it was made of. Its scale does not matter.
    """
    fields = [tensor.flatten(1).double().cpu() for tensor in message.upload.values()]
    sign = 1.0 if runtime.algorithm.ABOUT.averages else -1.0
    return sign * torch.cat(fields, dim=1)


def _gradients(subject: Subject, message: Message, states: ClientState, client: int, rows: NDArray[np.int64]) -> Tensor:
    """Return the gradients [n, P] of some images' losses by the uploaded parameters, at the prompt of one client.

    Under `dp-sgd` they are clipped, as the client clips them.
    """
    runtime = subject.runtime
    one = torch.tensor([client], device=subject.features.device)
    state = take(states, one)
    broadcast = message.broadcast
    personal = isinstance(broadcast, PersonalBroadcast)
    if personal:
        broadcast = take(broadcast, one)
    point = named_tensors(broadcast)
    names = _uploaded(subject.config.algorithm, message.upload, point, personal)
    parameters = {name: point[name][None] for name in names}

    def prompt_of(values: Parameters) -> Prompt:
        return _prompt(runtime, broadcast, state, {name: value[0] for name, value in values.items()})

    index = torch.from_numpy(rows).to(subject.features.device)
    images, labels = subject.features[index][None], subject.labels[index][None]
    batch = Batch(images, labels, torch.ones_like(labels, dtype=torch.bool))
    pieces = example_gradients(runtime.model, prompt_of, parameters, {}, batch).pieces
    vectors = [torch.cat([piece[name].flatten(1) for name in parameters], dim=1).double().cpu() for piece in pieces]
    gradients = torch.cat(vectors)
    if runtime.privacy.mechanism == "dp-sgd":
        clip = runtime.privacy.clip
        gradients = gradients * (clip / gradients.norm(dim=1, keepdim=True).clamp(min=clip))
    return gradients


def _uploaded(method: str, upload: Mapping[str, Tensor], broadcast: Mapping[str, Tensor], personal: bool) -> list[str]:
    """Return the broadcast's fields that an upload's fields are of, in the upload's order.

    They are those of the same name, as "gradient"; or of the same name within a mapping, as "shared.key" is to
    "change.key"; or the only ones of the same shape.

    Args:
        method: its name.
        upload: field to tensor [K, ...].
        broadcast: field to tensor, [1, ...] where `personal`.
        personal: whether each client is sent a broadcast of its own.

    Raises:
        ConfigError: there is no such field, or more than one.
    """
    names = []
    for name, tensor in upload.items():
        within = name.partition(".")[2]
        same = [name] if name in broadcast else [own for own in broadcast if within and own.partition(".")[2] == within]
        alike = [own for own, sent in broadcast.items() if sent.shape[int(personal) :] == tensor.shape[1:]]
        found = same or alike
        if len(found) != 1:
            raise ConfigError(
                "algorithm",
                method,
                f"nothing says what the uploaded {name!r} is a change of, so the attack over rounds has no gradients "
                "to compare it with",
            )
        names += found
    return names


def _prompt(runtime: LocalRuntime, broadcast: Broadcast, state: ClientState, values: Mapping[str, Tensor]) -> Prompt:
    """Return a client's prompt with some of the broadcast's tensors replaced.

    If each client is sent a prompt of its own, its state is the same prompt after training: the round began at the
    broadcast.
    """
    if isinstance(broadcast, PersonalBroadcast):
        state = _replaced(state, values)
    return runtime.algorithm.prompt(_replaced(broadcast, values), state)


def _replaced(state: AnyState, values: Mapping[str, Tensor]) -> AnyState:
    return map_tensors(state, lambda name, tensor: values.get(name, tensor))


def _standardized(gradients: Tensor, uploads: Tensor, message: Message, client: int) -> Floats:
    """Return one round's scores [n] of a client's candidates, in deviations of the others' measures.

    Those of all its candidates together are the reference: few clients have too few uploads for one of each image.
    """
    place = message.clients.index(client)
    measures = coefficients(gradients, uploads, place).numpy()
    others = np.delete(measures, place, axis=0)
    deviation = others.std()
    return (measures[place] - others.mean()) / deviation if deviation > 0 else np.zeros(len(gradients))


def coefficients(gradients: Tensor, uploads: Tensor, place: int) -> Tensor:
    """Compute the coefficients [K, n] of n gradients in each of K uploads, by one linear map.

    The map is ridge regression with the ridge that suits upload number `place`: the variance of its noise, by the
    residual of the least squares, over that of its coefficients, by the rest of its squared length.

    Args:
        gradients: [n, P], float64.
        uploads: [K, P], float64.
        place: the upload that the gradients' images may be in.
    """
    count, width = gradients.shape
    values, vectors = torch.linalg.eigh(gradients @ gradients.T)
    total = values.clamp(min=0).sum()
    if not float(total) > 0:
        return uploads.new_zeros(len(uploads), count)
    unit = total / count
    products = vectors.T @ (gradients @ uploads.T)  # [n, K], in the eigenvectors' basis
    spanned = values > LEAST_RIDGE * unit
    length = uploads[place].square().sum()
    explained = (products[spanned, place].square() / values[spanned]).sum()
    noise = (length - explained).clamp(min=0) / max(width - int(spanned.sum()), 1)
    signal = (length - width * noise) / total
    ridge = (noise / signal).clamp(LEAST_RIDGE * unit, MOST_RIDGE * unit) if signal > 0 else MOST_RIDGE * unit
    solved: Tensor = vectors @ (products / (values.clamp(min=0) + ridge)[:, None])  # [n, K]
    return solved.T
