"""The dealer: deals correlated randomness ahead of the computation, and sees no data.

*Masks* are uniform. Each party draws its share of a mask from a key that only it and the dealer hold, so nothing is
sent. A `Correlation` is a function of masks, such as a product, a truncation or a cosine. Party 0 draws its share of a
correlation from its key, too. The dealer sends party 1 the difference, which is uniform to anyone without party 0's
key. Requests are public: numbers of masks, shapes and constants.

Every mask and every correlation has a number of its own. Both parties count these numbers upwards alike. The number
selects the stream of the generator, and one that does not rise is refused.
"""

from __future__ import annotations

from torch import Tensor

from sordino.mpc.arithmetic.packing import MaskedShare, Octets
from sordino.mpc.arithmetic.prg import Prg
from sordino.mpc.arithmetic.ring import lowest_
from sordino.mpc.dealing.correlations import Correlation, Mask
from sordino.mpc.errors import MaskReused


class Dealer:
    """A dealer for one computation.

    Args:
        keys: of parties 0 and 1, 32 bytes each. Drawn from the operating system if absent. Keys of one computation
            must never be used for another.
    """

    def __init__(self, keys: tuple[bytes, bytes] | None = None) -> None:
        given = keys or (None, None)
        self.generators = Prg(given[0]), Prg(given[1])
        self._last = -1

    def deal(self, number: int, correlation: Correlation) -> Octets:
        """Return party 1's share of a correlation, packed.

        Raises:
            MaskReused: the number is not above every earlier one.
        """
        if number <= self._last:
            raise MaskReused(f"randomness {number} was dealt before; start a computation with new keys")
        self._last = number
        values = correlation.values(*(self._mask(mask) for mask in correlation.masks))
        other = self.generators[0].integers(number, correlation.shape)  # packing keeps its lowest bits
        return MaskedShare(values, other, correlation.bits).packed()

    def _mask(self, mask: Mask) -> Tensor:
        first, second = (generator.integers(mask.number, mask.shape, mask.bits) for generator in self.generators)
        return lowest_(first.add_(second), mask.bits)
