"""The assistant: deals randomness that is correlated, before the computation and without seeing any data.

*Masks* are uniform: each party draws its share from a key that only it and the dealer hold, and nothing is sent. All
else that is dealt is a function of masks, a `Correlation`: their products, truncations, cosines. Party 0 draws its
share of that from its key as well; party 1 is sent the difference, which is uniform as long as it does not know party
0's key. What is asked for is public: numbers of masks, shapes and constants.

Every mask and every correlation has a number of its own, counted upwards by both parties alike, which is the stream of
the generator that it is drawn from. A number that does not rise is refused.
"""

from __future__ import annotations

from torch import Tensor

from sordino.mpc.arithmetic.packing import MaskedShare, Octets
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import lowest_
from sordino.mpc.dealing.correlations import Correlation, Mask
from sordino.mpc.errors import MaskReused


class Dealer:
    """The assistant itself.

    Args:
        keys: those of parties 0 and 1, 32 bytes each; fresh from the operating system if none are given. Keys that were
            used for one computation must not serve another.
    """

    def __init__(self, keys: tuple[bytes, bytes] | None = None) -> None:
        given = keys or (None, None)
        self.generators = Prg(given[0]), Prg(given[1])
        self._last = -1

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Party 1's share of a correlation, packed.

        Raises:
            MaskReused: the number is not above all before it.
        """
        if number <= self._last:
            raise MaskReused(f"randomness {number} was dealt before; start a computation with new keys")
        self._last = number
        values = correlation.values(*(self._mask(mask) for mask in correlation.masks))
        other = self.generators[0].integers(number, correlation.shape)  # of which packing takes the lowest bits
        return MaskedShare(values, other, correlation.bits).packed()

    def _mask(self, mask: Mask) -> Tensor:
        first, second = (generator.integers(mask.number, mask.shape, mask.bits) for generator in self.generators)
        return lowest_(first.add_(second), mask.bits)
