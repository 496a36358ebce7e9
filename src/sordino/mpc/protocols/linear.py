"""Openings, products and truncation.

A value is *masked* by opening it minus a dealt mask. Any number of products with it then need no further opening of
it. A weight is masked once, at set-up, and each product with it opens only the other operand. This is Beaver's trick
(Beaver, Efficient Multiparty Protocols Using Circuit Randomization, CRYPTO 1991) in the form of ABY2.0 (Patra,
Schneider, Suresh and Yalame, USENIX Security 2021), where masks belong to values and not to products.

All costs below are for N elements, in bytes that each party sends. An element of n bits takes n/8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sordino.mpc.arithmetic import kernels
from sordino.mpc.arithmetic.packing import MaskedShare
from sordino.mpc.arithmetic.products import FORMS
from sordino.mpc.arithmetic.ring import WORD, decode, for_each, low_bits, lowest_
from sordino.mpc.dealing.correlations import Lift, Product, TripleProduct
from sordino.mpc.dealing.costs import protocol
from sordino.mpc.errors import OutOfRange
from sordino.mpc.protocols.party import Masked, Party, Shared


@protocol
def reveal(party: Party, *values: Shared) -> list[Tensor]:
    """Open values to both parties, and return the numbers, float64.

    1. Exchange shares, modulo the 2^bits that they are right for.
    2. Add.

    Rounds: 1. Online: N n / 8. Offline: 0. Error: none.
    """
    bits = [value.bits for value in values]
    others = party.exchange([value.share for value in values], bits)
    return [
        decode(value.share + other, value.fraction, value.bits) for value, other in zip(values, others, strict=True)
    ]


@protocol
def mask_and_open(
    party: Party, *values: Shared, bits: int | Sequence[int] = WORD, fraction: int | Sequence[int] = WORD
) -> list[Masked]:
    """Open values under masks, so that they can be factors of products.

    1. Drop the fraction bits of the share that are not kept. One party rounds down, the other up. The modulus shrinks
       by as many bits, so nothing wraps around.
    2. Take a mask a, uniform modulo 2^bits.
    3. Exchange shares of x - a, modulo 2^bits.
    4. Add.

    The opened x - a is uniform. Products with a factor of n bits are right modulo 2^n, so n must hold them.

    Rounds: 1, for all values together. Online: N bits / 8. Offline: 0. Error: none if no bits are dropped, else below
    2^-fraction, with a mean of zero over uniform shares.

    Args:
        values: any shapes.
        bits: one for all, or one each. At most the bits that shares are right for, less those that are dropped.
        fraction: one for all, or one each. Fraction bits beyond it are dropped.

    Raises:
        OutOfRange: shares are right modulo less than 2^bits, or no bit would be left.
    """
    masks, masked = [], []
    widths, fractions = for_each(bits, len(values)), for_each(fraction, len(values))
    for value, width, kept in zip(values, widths, fractions, strict=True):
        dropped = max(0, value.fraction - kept)
        right = value.bits - dropped
        if width < 1:
            raise OutOfRange(f"fraction = {kept}: no bit would be left of a value; keep more")
        if width > right:
            raise OutOfRange(f"a value shared modulo 2^{right} cannot be opened modulo 2^{width}; lift it first")
        mask, share = party.randomness.mask(value.shape, width)
        masks.append(mask)
        rounds_up = party.number == 1
        masked.append(MaskedShare(value.share.contiguous(), share, width, shift=dropped, up=rounds_up))
    return [
        Masked(opened, masked_share.mask, mask, value.fraction - masked_share.shift)
        for opened, masked_share, mask, value in zip(party.open(masked), masked, masks, values, strict=True)
    ]


@protocol
def product(party: Party, left: Masked, right: Masked, form: str = "matmul", bias: Shared | None = None) -> Shared:
    """Compute a bilinear map of two masked values, of N elements, modulo the smaller of their moduli.

    With x = u + a and y = v + b, where u and v are open: x y = u (v + b) + a v + a b.

    1. Take a share of a b, and compute [a] v. Where y is fixed, [a] v is local offline work.
    2. Party 1 computes u (v + [b]) + [a] v + [a b]. Party 0 computes the same without u v. Both add the bias.

    Rounds: 0. Online: 0. Offline: N n / 8. Error: none. The result has the fraction bits of both factors.

    Args:
        left, right: the factors; may be the same.
        form: a name in `products.FORMS`.
        bias: added to each row, with at most the product's fraction bits.
    """
    fraction = left.fraction + right.fraction
    row = bias.at(fraction) if bias else None
    bits = min(left.bits, right.bits, row.bits if row else WORD)
    apply = FORMS[form]
    dealt = party.randomness.correlated(Product(left.mask, right.mask, form, bits))  # [a b]
    if right.fixed:
        known = party.randomness.with_fixed(left.mask, right.opened, form)  # [a] v, prepared offline
    else:
        known = apply(left.share, right.opened, bits)
    # Party 1 takes u v, as part of u (v + [b]).
    right_share = right.share + right.opened if party.number else right.share
    share = apply(left.opened, right_share, bits).contiguous()
    sums, first, second = (_rows(part).numpy() for part in (share, known, dealt))
    kernels.add_up(sums, first, second, row.share.numpy() if row else None, low_bits(bits))
    return Shared(share, fraction, bits)


@protocol
def triple_product(party: Party, first: Masked, second: Masked, third: Masked) -> Shared:
    """Multiply three masked values, entry by entry and broadcast to N elements.

    With x = u + a, y = v + b and z = w + c, the product is
    u v w + v w a + u w b + u v c + w ab + v ac + u bc + abc.

    1. Take shares of ab, ac, bc and abc.
    2. Add up. Party 0 alone adds u v w.

    Rounds: 0. Online: 0. Offline: 4 N n / 8. Error: none.
    """
    bits = min(first.bits, second.bits, third.bits)
    dealt = party.randomness.correlated(TripleProduct((first.mask, second.mask, third.mask), bits))
    share = torch.empty(dealt.shape[1:], dtype=torch.int64)
    rows, factors = _rows(share), (first, second, third)
    opened = tuple(_rows(factor.opened.expand(share.shape)).numpy() for factor in factors)
    masks = tuple(_rows(factor.share.expand(share.shape)).numpy() for factor in factors)
    known = party.number == 0
    kernels.triple(opened, masks, dealt.view(4, *rows.shape).numpy(), known, low_bits(bits), rows.numpy())
    return Shared(share, first.fraction + second.fraction + third.fraction, bits)


@protocol
def multiply(party: Party, left: Shared, right: Shared, bits: int = WORD, form: str = "multiply") -> Shared:
    """Multiply two values that are used once, or take another bilinear map of them.

    1. Mask and open both.
    2. Take their `product`.

    Rounds: 1. Online: bits / 8 for each element of both factors. Offline: N bits / 8. Error: none.
    """
    masked_left, masked_right = mask_and_open(party, left, right, bits=bits)
    return product(party, masked_left, masked_right, form)


@protocol
def truncate_masked(party: Party, value: Masked, fraction: int, bits: int = WORD) -> Shared:
    """Share a masked value modulo 2^bits with fewer fraction bits, or as many. Never wrong by wrap-around.

    After Dalskov, Escudero and Keller (Secure Evaluation of Quantized Neural Networks, PETS 2020). Let n be the bits of
    the mask, s the fraction bits to drop, x' = x + 2^(n-2) and r = -a. As |x| < 2^(n-2), x' is below 2^(n-1). Write
    r = m 2^(n-1) + r', where m is its highest bit. The opened x' + r has a highest bit t and the rest c. So
    x' + r' = c + o 2^(n-1) with a carry o, and t = m xor o. Then o = t + m - 2 t m is linear in m, and
    x' = c - r' + o 2^(n-1) holds over the integers: there is no case in which it fails.

    1. Take shares of r' >> s and of m.
    2. Compute (c >> s) - [r' >> s] + (t + (1 - 2 t) [m]) 2^(n-1-s) - 2^(n-2-s).

    Rounds: 0. Online: 0. Offline: 2 N bits / 8. Error: below 2^-fraction, from the two shifts, with a mean of zero
    over masks. None if no bits are dropped.

    Args:
        value: |x| below 2^(n-2) as an integer, that is below 2^(n-2-f) with f fraction bits.
        fraction: f - s, the result's fraction bits.
        bits: of the result.

    Raises:
        OutOfRange: the result would have more fraction bits than x, or more than n - 2 bits would be dropped.
    """
    shift, top = value.fraction - fraction, value.bits - 1
    if not 0 <= shift < top:
        raise OutOfRange(f"fraction = {fraction}: must be from {value.fraction - top + 1} to {value.fraction}")
    dealt = party.randomness.correlated(Lift(value.mask, shift, bits)).view(2, -1)
    opened, share = value.opened.contiguous(), torch.empty(value.opened.shape, dtype=torch.int64)
    known = party.number == 0
    kernels.lift(opened.view(-1).numpy(), dealt.numpy(), top, shift, known, share.view(-1).numpy())
    return Shared(lowest_(share, bits), fraction, bits)


@protocol
def truncate(party: Party, *values: Shared, fraction: int, bits: int | Sequence[int] = WORD) -> list[Shared]:
    """Share values modulo 2^64 with fewer fraction bits. Never wrong by wrap-around.

    1. Mask and open them without the s fraction bits that are dropped, modulo 2^(bits-s).
    2. Apply `truncate_masked` to each.

    Rounds: 1. Online: N (bits - s) / 8. Offline: 16 N. Error: below 2^-fraction, with a mean of zero over uniform
    shares.

    Args:
        values: up to 2^(bits-2) - 2^s in size, as integers.
        fraction: the results' fraction bits.
        bits: one for all, or one each. Enough for the values, and few, as they are sent.

    Raises:
        OutOfRange: see `mask_and_open` and `truncate_masked`.
    """
    pairs = zip(values, for_each(bits, len(values)), strict=True)
    left = [width - max(0, value.fraction - fraction) for value, width in pairs]
    return [
        truncate_masked(party, masked, fraction)
        for masked in mask_and_open(party, *values, bits=left, fraction=fraction)
    ]


def concatenated(values: Sequence[Shared], axis: int = -1) -> Shared:
    """Concatenate shares of values that have the same fraction bits and modulus."""
    return Shared(torch.cat([value.share for value in values], axis), values[0].fraction, values[0].bits)


def _rows(values: Tensor) -> Tensor:
    """Flatten all but the last axis, to [I, J]."""
    return values.reshape(-1, values.shape[-1] if values.ndim else 1)
