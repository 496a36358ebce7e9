"""Computation on secret shares of two servers, with the protocols of SecP-Tuning. Neither server learns the numbers.

Luo et al., SecP-Tuning, ICLR 2026 (arXiv 2506.15307). Security is semi-honest. Both servers and the dealer follow the
protocol, and no two of them combine their knowledge. The dealer deals correlated randomness and sees no data.

Modules are in rooms, and a room imports only from rooms before it: `arithmetic`, `dealing`, `protocols`, `tower`,
`parties`.

    first, second = share(encode(values, 16))               # by the owner: one share for each server

    def program(party):                                     # run by both servers
        x = Shared((first, second)[party.number], 16)
        (masked,) = mask_and_open(party, x)                 # opened under a mask, once
        return product(party, masked, masked, "multiply")   # products with it send nothing more

    result = run(program)                                   # both servers in this process
    reconstruct(result.results), result.costs.table()
"""

from sordino.errors import require_extra

require_extra("mpc", "computation on secret shares (sordino mpc, sordino tune-private)")  # imports below need it

from sordino.mpc.arithmetic.ring import decode, encode, share
from sordino.mpc.dealing.correlations import Correlation
from sordino.mpc.dealing.costs import Cost, Costs, protocol
from sordino.mpc.dealing.dealer import Dealer
from sordino.mpc.dealing.supply import CorrelatedRandomness, DealerLink
from sordino.mpc.errors import MaskReused, MpcError, OutOfRange, PartyLost
from sordino.mpc.protocols.attention import random_feature_attention
from sordino.mpc.protocols.fourier import (
    Series,
    angle_of,
    cosine_and_sine,
    evaluate,
    fit,
    gelu,
    gelu_series,
    open_angle,
)
from sordino.mpc.protocols.linear import (
    concatenated,
    mask_and_open,
    multiply,
    product,
    reveal,
    triple_product,
    truncate,
    truncate_masked,
)
from sordino.mpc.protocols.party import Channel, Masked, Party, RunResult, Shared, reconstruct, run
from sordino.mpc.protocols.roots import Norm, Root, calibrate, inverse_root, layer_norm, unit_norm, variance_root
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.encoder import Encoder, encode_sentences, shared_weights
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan

__all__ = [
    "Calibration",
    "Channel",
    "CorrelatedRandomness",
    "Correlation",
    "Cost",
    "Costs",
    "Dealer",
    "DealerLink",
    "Encoder",
    "FixedPointPlan",
    "MaskReused",
    "Masked",
    "MpcError",
    "Norm",
    "OutOfRange",
    "Party",
    "PartyLost",
    "Root",
    "RunResult",
    "Series",
    "Shared",
    "angle_of",
    "calibrate",
    "concatenated",
    "cosine_and_sine",
    "decode",
    "encode",
    "encode_sentences",
    "evaluate",
    "fit",
    "gelu",
    "gelu_series",
    "inverse_root",
    "layer_norm",
    "mask_and_open",
    "multiply",
    "open_angle",
    "product",
    "protocol",
    "random_feature_attention",
    "reconstruct",
    "reveal",
    "run",
    "share",
    "shared_weights",
    "triple_product",
    "truncate",
    "truncate_masked",
    "unit_norm",
    "variance_root",
]
