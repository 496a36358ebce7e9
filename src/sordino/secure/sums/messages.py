"""The messages between a client and the server in a secure sum; `secure.messages` encodes them.

| exchange | server to each client | client to server |
|---|---|---|
| 1 | `Invitation`: which sum it is | `Advertisement`: two public keys |
| 2 | `Roster`: who takes part, and their keys | `SumShares`: one sealed payload for each other |
| 3 | `SumDelivery`: the payloads for it | `MaskedInput`: its vector, noised and masked |
| 4 | `UnmaskRequest`: who is in the sum, who dropped out | `Confirmation`: it was asked this, sealed to each other |
| 5 | `Confirmations`: those of the others, for it | `Unmasking`: a share of one secret of each |

Every message carries the digest of the setup, and so of the session, the round, and all other
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from sordino.secure.errors import SecureError
from sordino.secure.messages import Message, Numbers, OctetRows, Octets, WordRows
from sordino.secure.sums.setup import SumSetup


@dataclass(frozen=True, eq=False)
class SumMessage(Message, abstract=True):
    """The base of all messages of a sum.

    Attributes:
        setup: the digest of the setup, [32].
    """

    setup: Octets

    def check_setup(self, setup: SumSetup) -> None:
        """Refuse a message of another session, round or setup.

        Raises:
            SecureError: the message belongs to another session, round or setup.
        """
        if self.round != setup.round:
            raise SecureError(f"late: of round {self.round} in round {setup.round}")
        if self.setup.tobytes() != setup.digest:
            raise SecureError("foreign: of another session, or a sum with other numbers")


@dataclass(frozen=True, eq=False)
class Invitation(SumMessage):
    """A request to take part."""


@dataclass(frozen=True, eq=False)
class Advertisement(SumMessage):
    """A client's acceptance to take part.

    Attributes:
        sender: its number.
        sealing_key: the public key to which shares for it are sealed, [32].
        mask_key: the public key for the agreement on pairwise masks, [32].
    """

    sender: int
    sealing_key: Octets
    mask_key: Octets


@dataclass(frozen=True, eq=False)
class Roster(SumMessage):
    """The participants.

    Attributes:
        members: their numbers, ascending, [members].
        sealing_keys, mask_keys: [members, 32].
    """

    members: Numbers
    sealing_keys: OctetRows
    mask_keys: OctetRows


@dataclass(frozen=True, eq=False)
class SumShares(SumMessage):
    """Shares of a client's two secrets, one payload a member.

    Attributes:
        sender: its number.
        payloads: [members - 1, bytes], sealed to each other member, in the roster's order.
    """

    sender: int
    payloads: OctetRows


@dataclass(frozen=True, eq=False)
class SumDelivery(SumMessage):
    """The payloads that others dealt to a client.

    Attributes:
        dealers: their numbers, ascending, without the client's own, [dealers].
        payloads: [dealers, bytes].
    """

    dealers: Numbers
    payloads: OctetRows


@dataclass(frozen=True, eq=False)
class MaskedInput(SumMessage):
    """A client's quantized vector with its noise and all its masks.

    Attributes:
        sender: its number.
        values: elements of the ring, little-endian, [4 d] or [8 d].
    """

    sender: int
    values: Octets


@dataclass(frozen=True, eq=False)
class UnmaskRequest(SumMessage):
    """The request for shares that follows, once.

    Attributes:
        living: the clients whose vectors are in the sum, ascending; shares of their self masks'
            seeds are requested.
        dead: the clients who dealt shares and sent no vector, ascending; shares of their masks'
            keys are requested.
    """

    living: Numbers
    dead: Numbers


@dataclass(frozen=True, eq=False)
class Confirmation(SumMessage):
    """A client's word, to each other living client, on which request it was sent.

    Attributes:
        sender: its number.
        tags: [living - 1, 16], an empty payload sealed to each, in ascending order. The request is in its context.
    """

    sender: int
    tags: OctetRows


@dataclass(frozen=True, eq=False)
class Confirmations(SumMessage):
    """The confirmations that others sealed to a client.

    Attributes:
        members: their numbers, ascending, without the client's own, [members].
        tags: [members, 16].
    """

    members: Numbers
    tags: OctetRows


@dataclass(frozen=True, eq=False)
class Unmasking(SumMessage):
    """A client's shares of others' secrets.

    Attributes:
        sender: its number.
        shares: [living + dead, 5], by ascending number of the secrets' owners.
    """

    sender: int
    shares: WordRows
