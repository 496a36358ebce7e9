"""Random feature attention: what takes the place of softmax, with cosine for its only function.

Peng et al., Random Feature Attention, ICLR 2021 (arXiv 2103.02143), on shares: Luo et al., SecP-Tuning, ICLR 2026
(arXiv 2506.15307). With phi(x) = [cos(w_1 x), .., cos(w_R x), sin(w_1 x), .., sin(w_R x)] the attention of a query is
phi(q)^T (sum_j phi(k_j) v_j^T) / phi(q)^T sum_j phi(k_j); the factor 1 / sqrt(R) of phi cancels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sordino.mpc.costs import protocol
from sordino.mpc.fourier import cosine_and_sine
from sordino.mpc.linear import concatenated, hide, product, truncate
from sordino.mpc.party import Masked, Party, Shared
from sordino.mpc.roots import Root, inverse_root

INVERSE = 14  # fraction bits of reciprocals of weights
SCORE = 16  # fraction bits of truncated scores and sums
LARGEST = 4  # log2 of the largest value


@protocol
def random_feature_attention(
    party: Party,
    query: Shared,
    key: Shared,
    value: Shared,
    features: Masked,
    root: Root,
    fraction: int,
    resolution: int = 14,
    precision: int = 8,
    mask: Tensor | None = None,
) -> Shared:
    """Attention of H heads over n tokens each, for queries and keys of unit norm.

    1. Hide queries and keys, modulo a turn; their `product`s with the features, hidden at set-up, are angles.
    2. Take cosines and sines: phi.
    3. Take sums of values, N, and of weights, Z, in the cheaper order: `_by_scores` if n^2 is at most 2 R (d + 1), else
       `_by_state`.
    4. Take the reciprocal of Z.
    5. Hide it and N, multiply, truncate.

    Rounds: 4 + those of step 3 and of the root. Online, for M = B H: 2 M n d (f_q + f_w) / 8 (step 1), 2 M n R
    resolution / 8 (2), those of step 3, those of the root for M n elements, and (2 M n d + M n) b / 8 (5), with b = f_v
    + 36 by scores and 36 by state. Offline: see the parts. Error: cosines and sines are off by at most sqrt(2)
    2^-precision each, at random, which averages out over R; with the defaults and R = 64, n = 32, values of size 1,
    the result is off by less than 2e-3.

    Args:
        query, key: [B, H, n, d], with f_q fraction bits.
        value: [B, H, n, d], with f_v fraction bits, below 2^4 in size.
        features: w / (2 pi) with f_w fraction bits, hidden, [H, d, R].
        root: a `calibrate`d reciprocal, over the range of the mean weight: Z over R and n, each rounded up to a power
            of two. Weights are near R, and the mean near 1, where w is small.
        fraction: bits of the result.
        resolution, precision: see `cosine_and_sine`.
        mask: [B, n], int64, public: 1 for tokens, 0 for padding, which no query sees then. All sentences' lengths have
            the same next power of two as n. Padding must be in range as well, such as a repeated token.

    Raises:
        OutOfRange: there are too many fraction bits for the ring.
    """
    length, width, count = query.shape[-2], value.shape[-1], features.mask.shape[-1]
    hidden_query, hidden_key = hide(party, query, key, bits=query.fraction + features.fraction)
    angles = [product(party, hidden, features) for hidden in (hidden_query, hidden_key)]
    waves = cosine_and_sine(party, *angles, resolution=resolution, precision=precision)
    phi_query, phi_key = (concatenated(pair) for pair in waves)  # [B, H, n, 2 R]
    order = _by_scores if length**2 <= 2 * count * (width + 1) else _by_state
    sums, weights = order(party, phi_query, phi_key, value, mask)
    inverse = inverse_root(party, weights, root, INVERSE)
    bits = sums.fraction + INVERSE + LARGEST + 2
    hidden_sums, hidden_inverse = hide(party, sums, inverse.view(lambda share: share[..., None]), bits=bits)
    result = product(party, hidden_sums, hidden_inverse, "multiply")
    return truncate(party, result, fraction=fraction, bits=bits)[0]


def _by_scores(
    party: Party, phi_query: Shared, phi_key: Shared, value: Shared, mask: Tensor | None
) -> tuple[Shared, Shared]:
    """Means of weighted values [B, H, n, d] and of weights [B, H, n], by way of the n^2 scores.

    1. Hide phi, modulo 2^s that holds scores, which are within [-R, R]; multiply.
    2. Truncate scores, and set those of padding to zero, which a truncated zero need not be; weights are their sums.
    3. Hide scores and values, modulo 2^b; multiply.

    Rounds: 3. Online: (4 M n R + M n^2) s / 8 + (M n^2 + M n d) b / 8.
    """
    log_features, log_length = _logarithms(phi_query)
    bits = 2 * phi_query.fraction + log_features + 3
    hidden_query, hidden_key = hide(party, phi_query, phi_key, bits=bits)
    scores = product(party, hidden_query, hidden_key, "matmul_nt").doubled(-log_features - log_length)
    (scores,) = truncate(party, scores, fraction=SCORE, bits=bits)
    if mask is not None:
        scores = scores.scaled(mask[:, None, None, :])
    bits = SCORE + value.fraction + INVERSE + LARGEST + 2
    hidden_scores, hidden_value = hide(party, scores, value, bits=bits)
    return product(party, hidden_scores, hidden_value), scores.view(lambda share: share.sum(-1))


def _by_state(
    party: Party, phi_query: Shared, phi_key: Shared, value: Shared, mask: Tensor | None
) -> tuple[Shared, Shared]:
    """The same by way of the [2 R, d + 1] means of features times values and ones: linear in n.

    1. Set phi(k) of padding to zero. Hide phi, and the values with ones beside them, modulo 2^s that holds both
       products; multiply phi(k) and values.
    2. Truncate the state.
    3. Hide it; multiply with phi(q).
    4. Truncate; the last column is the weights.

    Rounds: 4. Online: (4 M n R + 2 M n (d + 1) + 4 M R (d + 1)) s / 8.
    """
    log_features, log_length = _logarithms(phi_query)
    scale = phi_query.fraction + LARGEST + 2
    bits = scale + max(value.fraction + log_length, SCORE + log_features + 1)
    if mask is not None:
        phi_key = phi_key.scaled(mask[:, None, :, None])
    ones = party.public(torch.ones(*value.shape[:-1], 1), value.fraction)
    hidden_query, hidden_key, hidden_value = hide(party, phi_query, phi_key, concatenated([value, ones]), bits=bits)
    state = product(party, hidden_key, hidden_value, "matmul_tn").doubled(-log_length)
    (state,) = truncate(party, state, fraction=SCORE, bits=bits)
    (hidden_state,) = hide(party, state, bits=bits)
    both = product(party, hidden_query, hidden_state).doubled(-log_features)
    (both,) = truncate(party, both, fraction=SCORE, bits=bits)
    return both.view(lambda share: share[..., :-1]), both.view(lambda share: share[..., -1])


def _logarithms(phi: Shared) -> tuple[int, int]:
    """log2 of R and of n, rounded up, of phi [B, H, n, 2 R]."""
    return math.ceil(math.log2(phi.shape[-1] // 2)), math.ceil(math.log2(phi.shape[-2]))
