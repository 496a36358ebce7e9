"""A server's share of a model, as a message and as the content of a file."""

from __future__ import annotations

from dataclasses import dataclass

from sordino.mpc.arithmetic.packing import Octets, pack, unpack_each
from sordino.mpc.arithmetic.ring import WORD
from sordino.mpc.parties.transport import Header
from sordino.mpc.protocols.party import Shared
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan


@dataclass(frozen=True, eq=False)
class Model:
    """A server's share of a tower.

    Attributes:
        name: drawn by the model owner, the same at both servers and whenever this model is provided again.
        sharing: drawn whenever the weights are shared, the same at both servers.
        plan: of the computation.
        weights: shares, by name.
    """

    name: str
    sharing: str
    plan: FixedPointPlan
    weights: dict[str, Shared]

    def to_message(self) -> tuple[Header, bytes]:
        """Return the header and payload of a message."""
        forms = {name: {"shape": list(part.shape), "fraction": part.fraction} for name, part in self.weights.items()}
        header = {"name": self.name, "sharing": self.sharing, "plan": self.plan.to_json(), "weights": forms}
        return header, b"".join(pack(part.share, WORD) for part in self.weights.values())

    @classmethod
    def of_message(cls, header: Header, payload: Octets) -> Model:
        """Invert `to_message`.

        Raises:
            KeyError, TypeError, ValueError, MpcError: the message is malformed.
        """
        plan, forms = FixedPointPlan.from_json(header["plan"]), header["weights"]
        shapes = [tuple(int(side) for side in form["shape"]) for form in forms.values()]
        shares = unpack_each(payload, shapes, [WORD] * len(shapes))
        weights = {
            str(name): Shared(share, int(form["fraction"]))
            for (name, form), share in zip(forms.items(), shares, strict=True)
        }
        return cls(str(header["name"]), str(header["sharing"]), plan, weights)
