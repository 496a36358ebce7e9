"""Openings, products and truncation.

A value is *hidden* by opening it minus a dealt mask; from then on, products with it cost no more openings of it,
however many there are. A weight is hidden once, at set-up, and each product sends only the other operand. Beaver's
trick (Beaver, Efficient Multiparty Protocols Using Circuit Randomization, CRYPTO 1991) in the form of ABY2.0 (Patra,
Schneider, Suresh and Yalame, USENIX Security 2021), where masks belong to values and not to products.

All costs below are for N elements, in bytes that each party sends, where an element of n bits takes n/8 bytes.
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
    """The numbers themselves, float64, to both parties.

    1. Exchange shares, modulo what they are right.
    2. Add.

    Rounds: 1. Online: N n / 8. Offline: 0. Error: none.
    """
    bits = [value.bits for value in values]
    others = party.exchange([value.share for value in values], bits)
    return [
        decode(value.share + other, value.fraction, value.bits) for value, other in zip(values, others, strict=True)
    ]


@protocol
def hide(
    party: Party, *values: Shared, bits: int | Sequence[int] = WORD, fraction: int | Sequence[int] = WORD
) -> list[Masked]:
    """Values opened under a mask, to be factors of products.

    1. Drop fraction bits of the share that are not to be kept; one party rounds down, the other up. What is left is a
       share modulo as much less, so that nothing wraps around.
    2. Take a mask a, uniform modulo 2^bits.
    3. Exchange shares of x - a, modulo 2^bits.
    4. Add.

    What is seen is uniform. Products with a factor of n bits are right modulo 2^n, so n must hold them.

    Rounds: 1, for all values together. Online: N bits / 8. Offline: 0. Error: none; below 2^-fraction where bits are
    dropped, with a mean of zero over uniform shares.

    Args:
        values: any shapes.
        bits: for all, or one each; at most what their shares are right for, less the bits that are dropped.
        fraction: for all, or one each; what is kept of those that have more fraction bits.

    Raises:
        OutOfRange: shares are right modulo less than asked for, or no bit would be left.
    """
    masks, masked_shares = [], []
    for value, width, kept in zip(values, for_each(bits, len(values)), for_each(fraction, len(values)), strict=True):
        dropped = max(0, value.fraction - kept)
        right = value.bits - dropped
        if width < 1:
            raise OutOfRange(f"fraction = {kept}: no bit would be left of a value; keep more")
        if width > right:
            raise OutOfRange(f"a value shared modulo 2^{right} cannot be opened modulo 2^{width}; lift it first")
        mask, share = party.randomness.mask(value.shape, width)
        masks.append(mask)
        masked_shares.append(MaskedShare(value.share.contiguous(), share, width, shift=dropped, up=party.number == 1))
    return [
        Masked(opened, own.mask, mask, value.fraction - own.shift)
        for opened, own, mask, value in zip(party.open(masked_shares), masked_shares, masks, values, strict=True)
    ]


@protocol
def product(party: Party, left: Masked, right: Masked, form: str = "matmul", bias: Shared | None = None) -> Shared:
    """A bilinear map of two hidden values, of N elements, modulo the smaller of their two moduli.

    With x = u + a and y = v + b, where u and v are open: x y = u (v + b) + a v + a b.

    1. Take a share of a b, and [a] v, which is offline work of the party's own where y is fixed.
    2. Party 1 computes u (v + [b]) + [a] v + [a b], party 0 the same without u v; the bias is added.

    Rounds: 0. Online: 0. Offline: N n / 8. Error: none; the result has the fraction bits of both.

    Args:
        left, right: may be the same.
        form: a name in `products.FORMS`.
        bias: added to each row, with as many fraction bits as the product has, or fewer.
    """
    fraction = left.fraction + right.fraction
    row = bias.at(fraction) if bias else None
    bits, apply = min(left.bits, right.bits, row.bits if row else WORD), FORMS[form]
    dealt = party.randomness.correlated(Product(left.mask, right.mask, form, bits))
    fixed = right.fixed
    known = (
        party.randomness.with_fixed(left.mask, right.opened, form) if fixed else apply(left.share, right.opened, bits)
    )
    own = right.share + right.opened if party.number else right.share
    share = apply(left.opened, own, bits).contiguous()
    sums, first, second = (_rows(part).numpy() for part in (share, known, dealt))
    kernels.add_up(sums, first, second, row.share.numpy() if row else None, low_bits(bits))
    return Shared(share, fraction, bits)


@protocol
def triple_product(party: Party, first: Masked, second: Masked, third: Masked) -> Shared:
    """The product of three hidden values, entry by entry and broadcast to N elements.

    With x = u + a, y = v + b, z = w + c, multiplied out: u v w + v w a + u w b + u v c + w ab + v ac + u bc + abc.

    1. Take shares of ab, ac, bc and abc.
    2. Add up; u v w is party 0's.

    Rounds: 0. Online: 0. Offline: 4 N n / 8. Error: none.
    """
    bits = min(first.bits, second.bits, third.bits)
    dealt = party.randomness.correlated(TripleProduct((first.mask, second.mask, third.mask), bits))
    share = torch.empty(dealt.shape[1:], dtype=torch.int64)
    rows, factors = _rows(share), (first, second, third)
    opened = tuple(_rows(each.opened.expand(share.shape)).numpy() for each in factors)
    masks = tuple(_rows(each.share.expand(share.shape)).numpy() for each in factors)
    known = party.number == 0
    kernels.triple(opened, masks, dealt.view(4, *rows.shape).numpy(), known, low_bits(bits), rows.numpy())
    return Shared(share, first.fraction + second.fraction + third.fraction, bits)


@protocol
def multiply(party: Party, left: Shared, right: Shared, bits: int = WORD, form: str = "multiply") -> Shared:
    """The product, or another bilinear map, of two values that are used once.

    1. Hide both.
    2. Take their `product`.

    Rounds: 1. Online: bits / 8 for each element of both factors. Offline: N bits / 8. Error: none.
    """
    hidden_left, hidden_right = hide(party, left, right, bits=bits)
    return product(party, hidden_left, hidden_right, form)


@protocol
def lifted(party: Party, value: Masked, fraction: int, bits: int = WORD) -> Shared:
    """A hidden value with fewer fraction bits, or as many, shared modulo 2^bits; never wrong by wrap-around.

    After Dalskov, Escudero and Keller (Secure Evaluation of Quantized Neural Networks, PETS 2020). Let n be the bits of
    the mask, s the fraction bits to drop, x' = x + 2^(n-2) and r = -a. As |x| < 2^(n-2), x' is below 2^(n-1). Write r =
    m 2^(n-1) + r' with its highest bit m. The opened x' + r has a highest bit t and the rest c, so that x' + r' = c +
    o 2^(n-1) with a carry o, and t = m xor o. Then o = t + m - 2 t m is linear in m, and x' = c - r' + o 2^(n-1) holds
    over the integers: there is no case in which it fails.

    1. Take shares of r' >> s and of m.
    2. Compute (c >> s) - [r' >> s] + (t + (1 - 2 t) [m]) 2^(n-1-s) - 2^(n-2-s).

    Rounds: 0. Online: 0. Offline: 2 N bits / 8. Error: below 2^-fraction, from the two shifts; its mean is zero over
    masks. Nothing at all where no bits are dropped.

    Args:
        value: |x| below 2^(n-2) as an integer, that is 2^(n-2-f) with f fraction bits.
        fraction: f - s.
        bits: of the result.

    Raises:
        OutOfRange: more fraction bits are asked for than there are, or more are dropped than n - 2.
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
    """Values with fewer fraction bits, shared modulo 2^64; never wrong by wrap-around.

    1. Hide them without the s fraction bits that are dropped, modulo 2^(bits-s).
    2. Take what is `lifted`.

    Rounds: 1. Online: N (bits - s) / 8. Offline: 16 N. Error: below 2^-fraction, with a mean of zero over uniform
    shares.

    Args:
        values: up to 2^(bits-2) - 2^s in size, as integers.
        fraction: what they shall have.
        bits: enough for them, and few for the sake of the wire.

    Raises:
        OutOfRange: see `hide` and `lifted`.
    """
    pairs = zip(values, for_each(bits, len(values)), strict=True)
    left = [width - max(0, value.fraction - fraction) for value, width in pairs]
    return [lifted(party, hidden, fraction) for hidden in hide(party, *values, bits=left, fraction=fraction)]


def concatenated(values: Sequence[Shared], axis: int = -1) -> Shared:
    """Shares of values of the same fraction bits and modulus, side by side."""
    return Shared(torch.cat([value.share for value in values], axis), values[0].fraction, values[0].bits)


def _rows(values: Tensor) -> Tensor:
    """As [I, J], of which the last axis is J."""
    return values.reshape(-1, values.shape[-1] if values.ndim else 1)
