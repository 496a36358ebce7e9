"""The certificate that a party shows, looked at before a connection.

gRPC decides by itself whom it believes, and says little when it does not. So a caller first looks whose certificate the
address shows. Swapped addresses, folders of another authority and expired certificates then have errors with a remedy.
"""

from __future__ import annotations

import socket
import ssl
from contextlib import closing

from cryptography import x509

from sordino.mpc.errors import PartyLost
from sordino.mpc.parties.certificates import (
    DATA_OWNER,
    DEALER,
    MODEL_OWNER,
    SERVERS,
    Identity,
    dates_problem,
    role_of,
    warn_of_expiry,
)

PATIENCE = 10.0  # most seconds for TCP to connect
OWNERS = {DATA_OWNER: "session.servers", MODEL_OWNER: "--servers"}  # where an owner gives the servers' addresses


def check_shown(identity: Identity, role: str, address: str, timeout: float) -> None:
    """Check the certificate that an address shows. An address that cannot be reached is left to gRPC.

    Args:
        identity: of the caller.
        role: that the certificate should show.
        address: host:port.
        timeout: seconds of silence after which the other party counts as lost.

    Raises:
        PartyLost: the certificate is that of another role or of another authority, or it expired, or no TLS is spoken
            there. Or the caller's own certificate expired since it was loaded.
    """
    own = f"the certificate of {identity.role}"
    problem = dates_problem(identity.chain, own)
    if problem:
        raise PartyLost(problem)
    warn_of_expiry(identity.chain, own)
    certificate = _shown(role, address, timeout)
    if certificate is None:
        return
    if not identity.issued(certificate):
        raise PartyLost(
            f"{address} shows a certificate of another authority than that of {identity.role}; give all parties their "
            "folders of one 'sordino mpc certificates'"
        )
    shown = role_of(certificate)
    if shown != role:
        raise PartyLost(f"{address} shows {shown}'s certificate; {_remedy(identity.role, role)}")
    problem = dates_problem([certificate], f"the certificate of {role} ({address})")
    if problem:
        raise PartyLost(problem)
    warn_of_expiry([certificate], f"the certificate of {role} ({address})")


def _remedy(own: str, role: str) -> str:
    """Say what to change if another party is where a role was expected."""
    if role == DEALER:
        return f"it should be that of {role}: give {own}'s --dealer the address of the dealer"
    if own == SERVERS[1]:
        return f"it should be that of {role}: give {own}'s --peer the address of {role}"
    order = f"{SERVERS[0]} comes first in {OWNERS.get(own, 'the list')}, then {SERVERS[1]}"
    return f"it should be that of {role}: {order}; or a server was started with the other's --certificates"


def _shown(role: str, address: str, timeout: float) -> x509.Certificate | None:
    """Return the certificate that an address shows; None if it cannot be reached.

    It is not verified here: the caller of this function does so, and gRPC again. In TLS 1.3 a server shows its
    certificate before it asks for the caller's, so none is sent.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["h2"])
    host, _, port = address.rpartition(":")
    try:
        plain = socket.create_connection((host.strip("[]"), int(port)), timeout=min(timeout, PATIENCE))
    except OSError:
        return None
    with closing(plain):
        try:
            plain.settimeout(timeout)
            with context.wrap_socket(plain, server_hostname=role) as stream:
                content = stream.getpeercert(binary_form=True)
        except TimeoutError:
            raise PartyLost(f"{role} ({address}) sent nothing for {timeout:g} s") from None
        except ssl.SSLError:
            raise PartyLost(f"{address} speaks no TLS 1.3, so {role} is not there; check the address") from None
        except OSError:  # reset: a proxy, or a party that ends right now
            return None
    return x509.load_der_x509_certificate(content) if content else None
