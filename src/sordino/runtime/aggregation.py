"""Robust aggregations: they replace the mean of a round's uploads, so that a few clients cannot steer it.

Every aggregation here reads single uploads. It therefore needs uploads that clients may show: those that nobody
noises, or that each client noises for itself. Aggregating them is post-processing and costs no privacy.
"""

from __future__ import annotations

import math

from torch import Tensor

from sordino.algorithms.base import AnyUpload, MethodInfo, Uploads, map_tensors, named_tensors
from sordino.errors import ConfigError
from sordino.privacy.clipping import clip_jointly
from sordino.privacy.mechanism import INSTEAD_OF_A_MEAN, WEIGHT, Average
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.settings import RuntimeSettings

ROUNDING = 1e-9  # 0.29 of 100 clients are 29, whatever the product of the two floats
FEWEST = 3  # clients in a round: of two, a median or a trimmed mean is their mean


def aggregated(settings: RuntimeSettings, upload: AnyUpload, mean: Average) -> Uploads[AnyUpload]:
    """Return uploads whose `mean` is the aggregation of the settings.

    Args:
        settings: the `[runtime]` table.
        upload: of the round's K participants.
        mean: (field, values [K, ...], weights [K]) to the plain mean.
    """
    if settings.aggregation == "median":
        return Uploads(upload, lambda name, values, weights: median(values))
    if settings.aggregation == "trimmed-mean":
        return Uploads(upload, lambda name, values, weights: trimmed_mean(values, settings.trim))
    if settings.aggregation == "norm-bound":
        assert settings.norm_bound is not None
        return Uploads(bounded(upload, settings.norm_bound), mean)
    return Uploads(upload, mean)


def median(values: Tensor) -> Tensor:
    """Return the median over K clients of every coordinate, [K, ...] to [...].

    The median of an even number of values is the mean of the middle two. Source: Yin, Chen, Ramchandran, Bartlett,
    Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, ICML 2018, definition 1.

    If fewer than half of the clients attack, each coordinate stays between the smallest and the largest value of the
    others, whatever the attackers send. Weights are ignored: clients state their own,
    and an attacker would state a large one.
    """
    ordered, count = _ordered(values), len(values)
    middle: Tensor = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return middle


def trimmed_mean(values: Tensor, trim: float) -> Tensor:
    """Return the mean over K clients of every coordinate without its floor(trim K) smallest and largest values.

    Source: Yin et al., 2018, definition 2. If no more clients attack than are cut at one end, each coordinate stays
    between the smallest and the largest value of the others. Weights are ignored, as in `median`.

    Args:
        values: [K, ...].
        trim: the fraction cut at each end, below 1/2.
    """
    cut = trimmed_clients(trim, len(values))
    kept: Tensor = _ordered(values)[cut : len(values) - cut].mean(0)
    return kept


def trimmed_clients(trim: float, clients: int) -> int:
    """Return the number of clients that a trimmed mean cuts at each end; at least one is left."""
    return min(math.floor(trim * clients + ROUNDING), (clients - 1) // 2)


def bounded(upload: AnyUpload, bound: float) -> AnyUpload:
    """Return the upload with each client's tensors clipped to a joint norm of at most `bound`.

    Source: Sun, Kairouz, Suresh, McMahan, Can You Really Backdoor Federated Learning?, 2019 (arXiv 1911.07963),
    section 4. The client's weight stays as it was, and the mean that follows is weighted. A client therefore adds to
    the mean a vector of norm at most `bound` times its share of the weights. An upload that is not finite becomes zero.
    """
    learned = {name: tensor for name, tensor in named_tensors(upload).items() if name != WEIGHT}
    shortened, _ = clip_jointly(learned, bound)
    return map_tensors(upload, lambda name, tensor: shortened.get(name, tensor))


def check(settings: RuntimeSettings, privacy: PrivacySettings, about: MethodInfo, clients: int) -> None:
    """Refuse an aggregation that does not fit the method, the privacy mechanism or the number of clients.

    Args:
        settings, privacy: the `[runtime]` and `[privacy]` tables.
        about: the method.
        clients: the number of clients in a round.

    Raises:
        ConfigError: the method or the privacy mechanism averages otherwise, or a value is missing or without effect.
    """
    kind = settings.aggregation
    if kind == "mean":
        return
    if about.server_uses != "mean":
        does = INSTEAD_OF_A_MEAN[about.server_uses]
        raise ConfigError("runtime.aggregation", kind, f"this method {does}; use 'mean'")
    if privacy.on and privacy.noise_by != "client":
        raise ConfigError(
            "runtime.aggregation",
            kind,
            f"with privacy.noise_by = {privacy.noise_by!r} the noise is that of a mean; "
            "use 'mean', or have noise_by = 'client'",
        )
    if kind == "norm-bound" and settings.norm_bound is None:
        raise ConfigError(
            "runtime.norm_bound",
            None,
            "the aggregation 'norm-bound' needs it; give the largest norm of an upload",
        )
    if kind in ("median", "trimmed-mean") and clients < FEWEST:
        raise ConfigError(
            "runtime.aggregation",
            kind,
            f"{clients} of the clients in a round are too few to leave any out; have {FEWEST} or more by "
            "partition.clients or runtime.participation, or use 'mean' or 'norm-bound'",
        )
    if kind == "trimmed-mean" and settings.trim > 0 and not trimmed_clients(settings.trim, clients):
        raise ConfigError(
            "runtime.trim",
            settings.trim,
            f"cuts nobody of {clients} clients a round; give {math.ceil(1000 / clients) / 1000} or more, or 0",
        )


def _ordered(values: Tensor) -> Tensor:
    """Return each coordinate's values in ascending order, [K, ...]; NaN counts as the largest."""
    return values.sort(dim=0).values
