"""The public numbers of one secure sum, which every client and the server know before it starts."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sordino.errors import DataError
from sordino.secure.errors import SecureError
from sordino.secure.field import PrimeField
from sordino.secure.lagrange import LagrangeCode
from sordino.secure.messages import Message, Numbers
from sordino.secure.sums.charge import Charge, charge, client_sensitivity, example_sensitivity
from sordino.secure.sums.discrete_gaussian import LARGEST_DEVIATION

Integers = NDArray[np.int64]

MOST_CLIENTS = 2**14
MOST_ENTRIES = 2**27
# The sum of all noise leaves its bound, in any entry, with probability below 2^-40.
FAILURE_BITS = 40
OVERHEAD = 2**11  # bytes of a message besides its arrays
SECRET = 32  # bytes of a mask's secret
LIMBS = 5  # field elements that hold one
SEALED = 2 * LIMBS * 8 + 16  # bytes of a sealed payload: a share of two secrets, and the seal's tag
SESSION = re.compile(r"(?:[0-9a-f]{2}){16,64}")


@dataclass(frozen=True, eq=False)
class SumSetup(Message):
    """The numbers on which all parties agree before a sum; `plan_sum` chooses them.

    Attributes:
        round: the number of the sum in its session. A pair of session and round is used once.
        session: 16 to 64 bytes in hexadecimal digits that no other session has; from the operating
            system, say.
        clients: n, the number of possible participants, numbered from 0.
        threshold: t, the fewest clients whose sum is opened.
        colluders: T, the number of clients who may share all their knowledge with each other and
            the server.
        dimension: d, entries of a vector.
        step: the unit of quantization, a power of two.
        largest: the largest absolute value of an entry, in the vectors' units. Larger ones are
            clipped to it.
        unit: the unit of privacy: "client" or "example".
        clip: the largest Euclidean norm, in the vectors' units. If the client is the unit, it is
            the norm of its vector, which is scaled down to it. If the example is the unit, it is
            the norm of its part of the vector: parts were bounded before they were added up. 0
            means no bound, in a sum without noise.
        ring_bits: 32 or 64: sums are computed modulo 2^32 or 2^64.
        deviations: [n], the deviation of the discrete Gaussian that each client adds, in steps. All
            0 for a sum without noise.
    """

    session: str
    clients: int
    threshold: int
    colluders: int
    dimension: int
    step: float
    largest: float
    unit: str
    clip: float
    ring_bits: int
    deviations: Numbers

    def check(self) -> None:
        """Refuse numbers that do not fit together.

        Raises:
            SecureError: the message names the number and the remedy.
        """
        if not SESSION.fullmatch(self.session):
            raise SecureError(f"session = {self.session[:80]!r}: must be 16 to 64 bytes in hexadecimal digits")
        check_threshold(
            self.clients,
            self.threshold,
            self.colluders,
            noised=bool(self.deviations.any()),
        )
        if not 1 <= self.dimension <= MOST_ENTRIES:
            raise SecureError(f"dimension = {self.dimension}: must be 1 to {MOST_ENTRIES}")
        self._check_scale()
        self._check_deviations()
        self._check_ring()

    def _check_scale(self) -> None:
        """Check step, largest and clip. A step that is a power of two makes the division of an entry by it exact."""
        if not 2.0**-500 <= self.step <= 2.0**500 or math.frexp(self.step)[0] != 0.5:
            raise SecureError(f"step = {self.step}: must be a power of two between 2^-500 and 2^500")
        if not self.step <= self.largest < math.inf:
            raise SecureError(f"largest = {self.largest}: must be finite and at least one step of {self.step}")
        if self.largest / self.step > 2.0**62:
            raise SecureError(f"largest = {self.largest} is more than 2^62 steps of {self.step}; use a larger step")
        if self.unit not in ("client", "example"):
            raise SecureError(f"unit = {self.unit!r}: must be 'client' or 'example'")
        noised = bool(self.deviations.any())
        if not 0 <= self.clip < math.inf or (noised and self.clip == 0):
            raise SecureError(
                f"clip = {self.clip}: must be finite, and positive where noise is added",
            )

    def _check_deviations(self) -> None:
        if self.deviations.shape != (self.clients,):
            raise SecureError(
                f"deviations have shape {self.deviations.shape} where {self.clients} are due, one a client"
            )
        smallest, largest = int(self.deviations.min()), int(self.deviations.max())
        if smallest < 0 or largest > LARGEST_DEVIATION:
            raise SecureError(
                f"deviations are from {smallest} to {largest} steps: must be 0 to 2^26 = {LARGEST_DEVIATION}; "
                "use a larger step"
            )
        if smallest == 0 < largest:
            client = int(np.flatnonzero(self.deviations == 0)[0])
            raise SecureError(
                f"client {client} adds no noise where others do; every client must add its share, or none"
            )

    def _check_ring(self) -> None:
        """Refuse sums that could wrap.

        A discrete Gaussian's moment generating function is at most the continuous one's (Canonne,
        Kamath and Steinke, 2020). So a sum of them is subgaussian with r = sqrt(sum of s_k^2). An
        entry leaves [-B, B] with probability 2 exp(-B^2 / (2 r^2)) at most. Any of d entries leaves
        it with probability 2^-40 for B = r sqrt(2 ln(2 d 2^40)).
        """
        if self.ring_bits not in (32, 64):
            raise SecureError(f"ring_bits = {self.ring_bits}: must be 32 or 64")
        wider = "64 bits, " if self.ring_bits == 32 else ""
        if self.largest_sum >= 2 ** (self.ring_bits - 1):
            raise SecureError(
                f"the sum of {self.clients} clients with entries of at most {self.largest:.6g} in steps of "
                f"{self.step:.3g} may reach {self.largest_sum:.3g} with its noise, which a ring of {self.ring_bits} "
                f"bits does not hold; use {wider}a larger step or a smaller largest"
            )

    @cached_property
    def digest(self) -> bytes:
        """Return 32 bytes that identify all these numbers; every message and every key is bound to them."""
        return hashlib.sha256(b"sordino secure sum" + self.to_bytes()).digest()

    @property
    def largest_integer(self) -> int:
        """Return Q, the largest absolute value of a quantized entry, in steps."""
        return math.ceil(self.largest / self.step)

    @property
    def largest_sum(self) -> int:
        """Return a bound on the entries of a sum with noise, in steps, that fails with probability 2^-40."""
        variance = sum(int(deviation) ** 2 for deviation in self.deviations.tolist())
        logarithm = math.log(2 * self.dimension) + FAILURE_BITS * math.log(2)
        noise = math.ceil(math.sqrt(variance * 2 * logarithm) * (1 + 1e-12))
        return self.clients * self.largest_integer + noise

    @property
    def sensitivity(self) -> float:
        """Return the largest change of the sum of quantized vectors, in steps, for one unit of privacy."""
        of_unit = client_sensitivity if self.unit == "client" else example_sensitivity
        return of_unit(self.clip, self.step, self.dimension)

    @property
    def largest_squared_norm(self) -> int | None:
        """Return the largest squared norm of a quantized vector, in squared steps; None if norms are not bounded."""
        return math.floor(self.sensitivity**2) if self.unit == "client" and self.clip else None

    def charge(self, survivors: Iterable[int]) -> Charge:
        """Return a ledger's charge for the sum of these clients' vectors; see `charge.charge`.

        Raises:
            SecureError: there is no noise, or too little to compare with a continuous Gaussian.
        """
        deviations = [int(self.deviations[client]) for client in survivors]
        return charge(deviations, self.colluders, self.sensitivity, self.dimension)

    @property
    def tolerated(self) -> int:
        """Return the number of clients that may drop out: n - t."""
        return self.clients - self.threshold

    @property
    def word(self) -> np.dtype[Any]:
        """Return the type of a ring's element, little-endian."""
        return np.dtype("<u4" if self.ring_bits == 32 else "<u8")

    @property
    def largest_message(self) -> int:
        """Return an upper bound on the length of the protocol's messages, in bytes."""
        per_client = 8 + 32 + 32 + SEALED  # numbers, keys, and a sealed payload
        return OVERHEAD + self.clients * per_client + self.dimension * self.ring_bits // 8

    @cached_property
    def code(self) -> LagrangeCode:
        """Return Shamir's sharing: one secret block, t - 1 random ones.

        Fewer than t shares are uniform, independent of the secret.
        """
        return LagrangeCode(PrimeField(), 1, self.threshold - 1, self.clients)

    def quantize(self, vector: ArrayLike) -> Integers:
        """Return a client's vector [d] in steps, rounded to the nearest, after bounding it.

        1. If the client is the unit, scale it down to the norm `clip`. Clip entries to `largest`.
        2. Divide by the step, which is exact, and round, ties to even.
        3. If the client is the unit, check the squared norm in integers: it is at most
           `largest_squared_norm`, for any rounding errors of the scaling.

        A client's vector that is not finite counts as zero, because an error would reveal that it
        was not. If the example is the unit, examples that are not finite must be left out before
        they are added up.

        Raises:
            DataError: the vector has another shape, or an entry is not finite and clients' norms
                are not bounded.
        """
        values = np.asarray(vector, np.float64)
        if values.shape != (self.dimension,):
            raise DataError(f"a vector of shape {values.shape} where {self.dimension} entries are summed")
        limit = self.largest_squared_norm
        if not np.isfinite(values).all():
            if limit is None:
                raise DataError("a vector to be summed has entries that are not finite; leave such examples out")
            values = np.zeros(self.dimension)
        if limit is not None:
            values = _shortened(values, self.clip)
        quantized, shorter = self._rounded(values), 2.0**-40
        while limit is not None and squared_norm(quantized) > limit:
            # The scaling's rounding errors are a part in 2^50, so once is enough; doubling ensures
            # that the loop ends.
            values, shorter = values * (1 - shorter), 2 * shorter
            quantized = self._rounded(values)
        return quantized

    def _rounded(self, values: NDArray[np.float64]) -> Integers:
        most = self.largest_integer
        bounded = np.clip(values, -self.largest, self.largest)
        return np.rint(bounded / self.step).clip(-most, most).astype(np.int64)


def check_threshold(clients: int, threshold: int, colluders: int, noised: bool) -> None:
    """Refuse thresholds that protect nobody.

    A client is exposed if the server has t shares of its self mask's seed and t shares of its
    mask's key. The T colluders give both; every other client gives one or the other, once. So both
    kinds need 2 (t - T) answers of the n - T others. These are too few if 2 t > n + T.

    Raises:
        SecureError: the message names the numbers and the remedy.
    """
    if not 2 <= clients <= MOST_CLIENTS:
        raise SecureError(f"clients = {clients}: a secure sum takes 2 to {MOST_CLIENTS}")
    if not 0 <= colluders < clients:
        raise SecureError(
            f"colluders = {colluders}: must be 0 to {clients - 1}, fewer than the {clients} clients",
        )
    if not colluders < threshold <= clients:
        raise SecureError(
            f"threshold = {threshold}: must be more than colluders = {colluders}, and at most clients = {clients}"
        )
    if 2 * threshold <= clients + colluders:
        raise SecureError(
            f"threshold = {threshold} of {clients} clients with {colluders} colluders: twice the threshold must be "
            f"more than {clients + colluders}, or two halves of the clients could open both masks of one; use "
            f"{(clients + colluders) // 2 + 1} or more"
        )
    if not noised and threshold < colluders + 2:
        raise SecureError(
            f"threshold = {threshold} with {colluders} colluders and no noise: a sum of {threshold} would give them "
            f"one client's vector; use {colluders + 2} or more, fewer colluders, or noise"
        )


def default_threshold(clients: int, colluders: int) -> int:
    """Return t = floor(2 n / 3) + 1, or more if T colluders require it; at most n."""
    return min(clients, max(2 * clients // 3 + 1, (clients + colluders) // 2 + 1))


def squared_norm(integers: Integers) -> int:
    """Compute the sum of squares of integers [d], exactly."""
    largest = int(np.abs(integers).max(initial=0))
    if largest**2 * max(1, len(integers)) < 2**63:
        return int((integers * integers).sum())
    return sum(entry * entry for entry in integers.tolist())


def _shortened(values: NDArray[np.float64], clip: float) -> NDArray[np.float64]:
    """Scale values to a norm of at most `clip`, up to rounding errors, without overflow or underflow."""
    top = float(np.abs(values).max(initial=0.0))
    if top == 0:
        return values
    unit = values / top
    norm = float(np.linalg.norm(unit))
    return unit * (clip / norm) if top > clip / norm else values
