"""Lagrange coded computing: secrets are shared in blocks, computed on as shares, and decoded from any large enough
subset of the shares.

Yu, Li, Raviv, Kalan, Soltanolkotabi and Avestimehr, Lagrange Coded Computing: Optimal Design for
Resiliency, Security, and Privacy, AISTATS 2019 (arXiv 1806.00939). A secret is cut into B blocks.
One polynomial of degree B + T - 1 has the blocks as values at beta_1 .. beta_B, and uniformly
random blocks at beta_{B+1} .. beta_{B+T}. It is evaluated at alpha_1 .. alpha_N, one point a
client.

*Privacy.* Any T shares are uniform, independent of the secret. The random blocks enter them by a T
x T part of the encoding matrix that is invertible, so they are masked as by a one-time pad (their
theorem 1).

*Computation.* If every client applies the same polynomial of degree e to its shares, the results
lie on a polynomial of degree D = e (B + T - 1). Its values at the betas are those of the same
computation on the secrets. Any D + 1 results decode it. Fewer leave every value possible if the
polynomial is otherwise unconstrained.

*Errors.* The A answers of a step are a codeword of a generalized Reed-Solomon code of length A and
dimension D + 1, with R = A - D - 1 checks. The checks apply to one random linear combination of all
values that each client sent. It is drawn afresh from the operating system after the answers are in.
Over a small field there are more combinations, so that a wrong answer escapes with probability at
most 2^-60.

- Any wrong answers from at most R clients are detected.
- Wrong answers from at most R/2 clients are also located; their senders are named, and the rest is
  decoded.
- Wrong answers from more than R/2 clients are reported as beyond correction, with one exception.
  Liars may agree among themselves on answers that lie on another polynomial of degree D together
  with enough honest ones. Then honest clients may be named in their place. With no surplus (R = 0)
  nothing is detected.
- Consistent answers to a wrong input are not errors here: a client may share any prompt. A client
  whose *shares* lie on no polynomial of degree B + T - 1 spoils the answers of all others. This is
  detected if R > 0, and stops the step, but the client is not named.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sordino.randomness import system_bytes
from sordino.secure.errors import TooFewAnswers, TooManyErrors
from sordino.secure.field import Elements, Entropy, PrimeField

ESCAPES = 60  # a wrong answer is overlooked with probability 2^-60


@dataclass(frozen=True)
class Decoded:
    """The decoded answers of a step.

    Attributes:
        values: the polynomial's values at beta_1 .. beta_B, [B, ...]; or their sum, [...].
        bad: the clients whose answers contradict the rest.
    """

    values: Elements
    bad: tuple[int, ...]


@dataclass(frozen=True)
class LagrangeCode:
    """B blocks and T random blocks, at points 1 .. B + T; N clients, at points B + T + 1 .. B + T + N.

    Attributes:
        field: the field of all computations.
        blocks: B.
        privacy: T.
        clients: N.

    Raises:
        ValueError: the field has too few points, or a number is too small.
    """

    field: PrimeField
    blocks: int
    privacy: int
    clients: int

    def __post_init__(self) -> None:
        if self.blocks < 1 or self.privacy < 0 or self.clients < 1:
            raise ValueError(f"{self}: blocks and clients must be 1 or more, privacy not negative")
        if self.field.modulus <= self.blocks + self.privacy + self.clients:
            raise ValueError(f"{self}: the field must have more than blocks + privacy + clients elements")

    @property
    def degree(self) -> int:
        """Return the degree of a share in the client's point, B + T - 1."""
        return self.blocks + self.privacy - 1

    @property
    def betas(self) -> tuple[int, ...]:
        """Return the points of the blocks, random ones last."""
        return tuple(range(1, self.blocks + self.privacy + 1))

    @property
    def alphas(self) -> tuple[int, ...]:
        """Return the points of the clients."""
        first = self.blocks + self.privacy + 1
        return tuple(range(first, first + self.clients))

    def encode(self, blocks: Elements, entropy: Entropy = system_bytes) -> Elements:
        """Compute shares [N, ...] of blocks [B, ...]."""
        noise = self.field.random((self.privacy, *blocks.shape[1:]), entropy)
        return self.evaluate(np.concatenate([blocks, noise]))

    def evaluate(self, values: Elements) -> Elements:
        """Evaluate the polynomial with values [B + T, ...] at the betas at the alphas: [N, ...]."""
        flat = values.reshape(len(values), -1)
        shares = self.field.matmul(basis(self.field, self.betas, self.alphas), flat)
        return shares.reshape(self.clients, *values.shape[1:])

    def masks(self, totals: Elements, degree: int, entropy: Entropy = system_bytes) -> Elements:
        """Draw shares [N, C] of C random polynomials of a degree, whose values at the blocks add up to totals [C].

        The polynomials are uniform among all of this degree whose values at beta_1 .. beta_B have
        these sums. Added to answers of at most that degree, they hide everything about the decoded
        polynomial except its sum over the blocks.

        Raises:
            ValueError: the degree is not below the number of clients.
        """
        known = self.alphas[: degree + 1]
        if len(known) <= degree:
            raise ValueError(
                f"degree = {degree}: must be below the number of clients, {self.clients}",
            )
        shares = self.field.random((degree + 1, len(totals)), entropy)
        # The sum over the blocks is a linear form in the values at degree + 1 points. All values
        # but one are free. The equation is solved for a value whose coefficient is not zero.
        form = self._total(known)
        pivot = int(np.flatnonzero(form)[-1])
        shares[pivot] = 0
        missing = self.field.sub(totals, self.field.matmul(form[None], shares)[0])
        shares[pivot] = self.field.mul(missing, self.field.inverse(form[pivot : pivot + 1]))
        if degree + 1 == self.clients:
            return shares
        rest = self.field.matmul(basis(self.field, known, self.alphas[degree + 1 :]), shares)
        return np.concatenate([shares, rest])

    def decode(
        self,
        answers: Elements,
        clients: Sequence[int],
        degree: int,
        step: str = "decoding",
        total: bool = False,
    ) -> Decoded:
        """Decode the polynomial of a degree D on which the answers lie, at beta_1 .. beta_B; locate wrong answers.

        1. Check all answers at once; locate the wrong ones if there are any.
        2. Check that the others agree.
        3. Interpolate from D + 1 of these.

        Args:
            answers: [A, ...], one row a client.
            clients: the senders, numbers from 0 to N - 1.
            degree: D.
            step: the name of the step in errors.
            total: return the sum over the blocks instead of each.

        Raises:
            TooFewAnswers: A is below D + 1.
            TooManyErrors: more answers are wrong than (A - D - 1) / 2.
        """
        needed = degree + 1
        if len(clients) < needed:
            raise TooFewAnswers(step, needed, len(clients))
        flat = answers.reshape(len(answers), -1)
        points = tuple(self.alphas[client] for client in clients)
        wrong = locate(self.field, points, flat, degree)
        good = np.setdiff1d(np.arange(len(points)), wrong)
        chosen = tuple(points[index] for index in good[:needed])
        targets = self.betas[: self.blocks]
        form = self._total(chosen)[None] if total else basis(self.field, chosen, targets)
        values = self.field.matmul(form, flat[good[:needed]])
        shape = answers.shape[1:] if total else (self.blocks, *answers.shape[1:])
        return Decoded(values.reshape(shape), tuple(clients[index] for index in wrong))

    def _total(self, points: tuple[int, ...]) -> Elements:
        """Return the linear form [points] from values at points to the sum over the blocks."""
        return self.field.sum(basis(self.field, points, self.betas[: self.blocks]), axis=0)


@lru_cache(maxsize=64)
def basis(field: PrimeField, nodes: tuple[int, ...], targets: tuple[int, ...]) -> Elements:
    """Compute Lagrange's basis: the matrix [targets, nodes] from values at nodes to values at targets.

    The form is barycentric: entry (t, j) is w_j prod_l (t - x_l) / (t - x_j), with w_j = 1 /
    prod_{l != j} (x_j - x_l).

    Raises:
        ZeroDivisionError: a target is a node.
    """
    x, t = field.elements(nodes), field.elements(targets)
    distances = field.sub(t[:, None], x[None])  # [targets, nodes]
    scale = field.product(distances)  # [targets]
    weights = dual_weights(field, nodes)
    matrix = field.mul(field.mul(scale[:, None], weights[None]), field.inverse(distances))
    matrix.flags.writeable = False
    return matrix


@lru_cache(maxsize=64)
def dual_weights(field: PrimeField, nodes: tuple[int, ...]) -> Elements:
    """Compute 1 / prod_{l != j} (x_j - x_l), [nodes]."""
    x = field.elements(nodes)
    distances = field.sub(x[:, None], x[None])
    np.fill_diagonal(distances, 1)
    return field.inverse(field.product(distances))


@lru_cache(maxsize=16)
def checks(field: PrimeField, points: tuple[int, ...], degree: int) -> Elements:
    """Return the parity checks [R, A] of values at A points of a polynomial of a degree: w_i x_i^r, r = 0 .. R - 1.

    The sum of w_i y_i x_i^r is a divided difference of y x^r over all A points. It vanishes if the
    degree of y x^r is below A - 1.
    """
    x = field.elements(points)
    rows, power = [], dual_weights(field, points)
    for _ in range(len(points) - degree - 1):
        rows.append(power)
        power = field.mul(power, x)
    return np.array(rows, np.uint64).reshape(-1, len(points))


def locate(field: PrimeField, points: tuple[int, ...], answers: Elements, degree: int) -> list[int]:
    """Locate the answers among [A, V] at A points that are off the polynomials of a degree of the others.

    1. Combine the V values of each answer at random.
    2. Compute the syndromes; if all are zero, nothing is wrong.
    3. Find the shortest recurrence of the syndromes (Berlekamp and Massey). Its roots are the wrong
       points.
    4. Check that the others agree.

    Raises:
        TooManyErrors: there is no such polynomial within half of the surplus.
    """
    surplus = len(points) - degree - 1
    count = -(-ESCAPES // (field.modulus.bit_length() - 1))
    combined = field.matmul(answers, field.random((answers.shape[1], count)))  # [A, count]
    syndromes = field.matmul(checks(field, points, degree), combined)  # [R, count]
    if not syndromes.any():
        return []
    x, wrong = field.elements(points), np.zeros(len(points), bool)
    for sequence in syndromes.T:
        connection = _shortest_recurrence(field, sequence)
        reversed_value = np.zeros_like(x)
        for coefficient in connection:
            reversed_value = field.add(field.mul(reversed_value, x), coefficient)
        roots = reversed_value == 0  # of prod (1 - x_i z) at z = 1 / x, times x^L
        if len(connection) - 1 != roots.sum():
            raise TooManyErrors(len(points), degree + 1)
        wrong |= roots
    rest = tuple(np.asarray(points)[~wrong].tolist())
    if wrong.sum() > surplus // 2:
        raise TooManyErrors(len(points), degree + 1)
    if field.matmul(checks(field, rest, degree), combined[~wrong]).any():
        raise TooManyErrors(len(points), degree + 1)
    return [int(index) for index in np.flatnonzero(wrong)]


def _shortest_recurrence(field: PrimeField, sequence: Elements) -> Elements:
    """Compute the connection polynomial [L + 1], constant term 1, of the shortest recurrence of a sequence.

    Massey, Shift-Register Synthesis and BCH Decoding, IEEE Transactions on Information Theory
    15(1), 1969.
    """
    size = len(sequence) + 1
    current, previous = np.zeros(size, np.uint64), np.zeros(size, np.uint64)
    current[0] = previous[0] = 1
    length, shift, last = 0, 1, 1
    for n in range(len(sequence)):
        terms = field.mul(current[: length + 1], sequence[n - length : n + 1][::-1])
        discrepancy = int(field.sum(terms))
        if discrepancy:
            factor = field.elements([discrepancy * pow(last, -1, field.modulus) % field.modulus])
            changed = current.copy()
            changed[shift:] = field.sub(
                current[shift:],
                field.mul(previous[: size - shift], factor),
            )
            if 2 * length <= n:
                previous, last, length, shift = current, discrepancy, n + 1 - length, 0
            current = changed
        shift += 1
    return current[: length + 1]
