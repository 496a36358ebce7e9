"""Random feature attention: the replacement of softmax, with cosine as its only function.

Peng et al., Random Feature Attention, ICLR 2021 (arXiv 2103.02143), on shares: Luo et al., SecP-Tuning, ICLR 2026
(arXiv 2506.15307). With phi(x) = [cos(w_1 x), .., cos(w_R x), sin(w_1 x), .., sin(w_R x)] the attention of a query is
phi(q)^T (sum_j phi(k_j) v_j^T) / phi(q)^T sum_j phi(k_j). The factor 1 / sqrt(R) of phi cancels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sordino.mpc.arithmetic.ring import WORD
from sordino.mpc.dealing.costs import protocol
from sordino.mpc.protocols.fourier import cosine_and_sine
from sordino.mpc.protocols.linear import concatenated, mask_and_open, product, truncate
from sordino.mpc.protocols.party import Masked, Party, Shared
from sordino.mpc.protocols.roots import Root, inverse_root

INVERSE = 14  # fraction bits of reciprocals of weights
SCORE = 16  # fraction bits of truncated scores and sums
NUMERATOR = 14  # fraction bits that sums of values keep
LARGEST = 4  # log2 of the largest value
FINER = 2  # fraction bits of dealt cosines and sines, beyond those that cosines keep


@protocol
def random_feature_attention(
    party: Party,
    query: Shared,
    key: Shared,
    value: Shared,
    features: Masked,
    root: Root,
    fraction: int,
    kept: int = 14,
    resolution: int = 14,
    precision: int = 8,
    mask: Tensor | None = None,
) -> Shared:
    """Compute the attention of H heads over n tokens each, for queries and keys of unit norm.

    1. Mask and open queries and keys with f_q fraction bits, modulo a turn. Their `product`s with the features, which
       were masked at set-up, are angles.
    2. Take cosines and sines, phi, of which p fraction bits are kept.
    3. Sum values to N and weights to Z, in the cheaper order: `_by_scores` if n^2 is at most 2 R (d + 1), else
       `_by_state`.
    4. Take the reciprocal of Z.
    5. Mask and open it and N, multiply, truncate.

    Rounds: 4 + those of step 3 and of the root. Online, for M = B H: 2 M n d (f_q + f_w) / 8 (step 1), 2 M n R
    resolution / 8 (2), those of step 3, those of the root for M n elements, and (M n d (2 b - s) + M n b) / 8 (5), with
    b = 34 and the s = 28 - fraction bits that are dropped. Offline: 2 M n R (f_q + f_w) / 8 (1), 4 M n R w / 8 for
    cosines of w = s' + p + 4 bits, at most 64, where step 3 masks phi modulo 2^s' (2), those of step 3 and of the
    root, M n d b / 8 + 16 M n d (5). Error: cosines and sines are off by 0.5 2^-p in the root mean square, which
    averages out over R. With the defaults and R = 64, n = 32, values of size 1, the result is off by less than 2e-3.

    Args:
        query, key: [B, H, n, d], shared modulo 2^(f_q + f_w), and one bit more for each fraction bit beyond f_q.
        value: [B, H, n, d], with f_v fraction bits, below 2^4 in size.
        features: w / (2 pi) with f_w fraction bits, masked, [H, d, R].
        root: a `calibrate`d reciprocal, over the range of the mean weight. The mean is Z over R and n, each rounded up
            to a power of two. Where w is small, weights are near R, and the mean near 1.
        fraction: bits of the result.
        kept: f_q.
        resolution: see `cosine_and_sine`.
        precision: p.
        mask: [B, n], int64, public: 1 for tokens, 0 for padding, which no query attends to. All sentences' lengths
            have the same next power of two as n. Padding must be in range as well, such as a repeated token.

    Raises:
        OutOfRange: there are too many fraction bits for the ring.
    """
    length, width, count = query.shape[-2], value.shape[-1], features.mask.shape[-1]
    bits = min(kept, query.fraction) + features.fraction
    masked_query, masked_key = mask_and_open(party, query, key, bits=bits, fraction=kept)
    angles = [product(party, masked, features) for masked in (masked_query, masked_key)]
    logs = math.ceil(math.log2(count)), math.ceil(math.log2(length))
    if length**2 <= 2 * count * (width + 1):
        order = _by_scores
        bits = 2 * precision + logs[0] + 3
    else:
        order = _by_state
        bits = precision + LARGEST + 2 + max(value.fraction + logs[1], SCORE + logs[0] + 1)
    finer = precision + FINER
    pairs = cosine_and_sine(
        party, *angles, resolution=resolution, precision=finer, bits=min(WORD, bits + 2 * finer - precision)
    )
    phi = [concatenated(pair) for pair in pairs]  # of queries and keys, [B, H, n, 2 R]
    sums, weights = order(party, phi, value, mask, precision, bits, logs)
    inverse = inverse_root(party, weights, root, INVERSE)
    left = min(NUMERATOR, sums.fraction)
    bits = left + INVERSE + LARGEST + 2
    inverse = inverse.view(lambda share: share[..., None])
    masked_sums, masked_inverse = mask_and_open(party, sums, inverse, bits=bits, fraction=[left, INVERSE])
    result = product(party, masked_sums, masked_inverse, "multiply")
    return truncate(party, result, fraction=fraction, bits=bits)[0]


def _by_scores(
    party: Party, phi: Sequence[Shared], value: Shared, mask: Tensor | None, kept: int, bits: int, logs: tuple[int, int]
) -> tuple[Shared, Shared]:
    """Compute means of weighted values [B, H, n, d] and of weights [B, H, n] from the n^2 scores.

    1. Mask and open phi with p fraction bits, modulo a 2^s that holds scores, which are within [-R, R]. Multiply.
    2. Truncate scores. Set those of padding to zero, since a truncated zero may differ from it. Weights are their sums.
    3. Mask and open scores and values, modulo 2^b. Multiply.

    Rounds: 3. Online: 4 M n R s / 8 + M n^2 (s - t) / 8 + (M n^2 + M n d) b / 8, with the t bits that step 2 drops.
    Offline: M n^2 s / 8 + 16 M n^2 + M n d b / 8. Error: 2^-16 a score, from step 2, and that of phi's p bits.

    Args:
        phi: of queries and keys, [B, H, n, 2 R].
        kept, bits: p, s.
        logs: log2 of R and of n, rounded up.
    """
    masked_query, masked_key = mask_and_open(party, *phi, bits=bits, fraction=kept)
    scores = product(party, masked_query, masked_key, "matmul_nt").times_power_of_two(-sum(logs))
    (scores,) = truncate(party, scores, fraction=min(SCORE, scores.fraction), bits=bits)
    if mask is not None:
        scores = scores.scaled(mask[:, None, None, :])
    bits = scores.fraction + value.fraction + INVERSE + LARGEST + 2
    masked_scores, masked_value = mask_and_open(party, scores, value, bits=bits)
    return product(party, masked_scores, masked_value), scores.view(lambda share: share.sum(-1))


def _by_state(
    party: Party, phi: Sequence[Shared], value: Shared, mask: Tensor | None, kept: int, bits: int, logs: tuple[int, int]
) -> tuple[Shared, Shared]:
    """Compute the same from the [2 R, d + 1] means of features times values and ones. The cost is linear in n.

    1. Set phi(k) of padding to zero. Append ones to the values. Mask and open phi with p fraction bits, and the values,
       modulo a 2^s that holds both products. Multiply phi(k) and values: the state.
    2. Truncate the state.
    3. Mask and open it. Multiply with phi(q).
    4. Truncate. The last column holds the weights.

    Rounds: 4. Online: (4 M n R + M n (d + 1) + 2 M R (d + 1)) s / 8 for masked values, and
    (M n (d + 1) + 2 M R (d + 1)) s / 8, less the bits that are dropped, for truncated ones.
    Offline: M (2 R + n) (d + 1) (s / 8 + 16).
    Error: 2^-16 an entry of the state and of the results, from steps 2 and 4, and that of phi's p bits.
    """
    phi_query, phi_key = phi
    if mask is not None:
        phi_key = phi_key.scaled(mask[:, None, :, None])
    ones = party.public(torch.ones(*value.shape[:-1], 1), value.fraction)
    both = concatenated([value, ones])
    fractions = [kept, kept, value.fraction]
    masked_query, masked_key, masked_value = mask_and_open(
        party, phi_query, phi_key, both, bits=bits, fraction=fractions
    )
    state = product(party, masked_key, masked_value, "matmul_tn").times_power_of_two(-logs[1])
    (state,) = truncate(party, state, fraction=SCORE, bits=bits)
    (masked_state,) = mask_and_open(party, state, bits=bits)
    both = product(party, masked_query, masked_state).times_power_of_two(-logs[0])
    (both,) = truncate(party, both, fraction=SCORE, bits=bits)
    return both.view(lambda share: share[..., :-1]), both.view(lambda share: share[..., -1])
