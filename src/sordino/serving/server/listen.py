"""A server on a port: refused where strangers could reach it without a key, or read what others ask."""

from __future__ import annotations

import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from cryptography import x509
from fastapi import FastAPI

from sordino.errors import ConfigError
from sordino.serving.registry import Registry
from sordino.serving.server.app import build
from sordino.serving.server.compared import RunFolder
from sordino.serving.server.connections import Connection
from sordino.serving.server.keys import Keys
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.samples import Samples
from sordino.serving.server.service import Log, Service
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.shelf import Shelf
from sordino.serving.trust import Trusted

LOCAL_NAMES = ["localhost", "127.0.0.1", "[::1]"]
CONNECTIONS = 200  # at once; more are told to come again


@dataclass(frozen=True)
class Address:
    """Where a server listens, and what it asks for.

    Attributes:
        host, port: to bind; port 0 is any that is free.
        certificate, private_key: of TLS, PEM files; None: plain HTTP.
        open_to_all: on an address that others reach, answer without keys.
        without_tls: there, listen without TLS, as behind a proxy that has it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    certificate: Path | None = None
    private_key: Path | None = None
    open_to_all: bool = False
    without_tls: bool = False

    @property
    def local(self) -> bool:
        """Return True if only this machine reaches it."""
        if self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def names(self, needs_key: bool) -> list[str] | None:
        """Return the names that a server may be asked by, as a browser writes them; None: any.

        Without a key, one of this machine's own goes by its own names, or a page in a browser could reach it under a
        name of its own. With `open_to_all`, whoever asks is meant, also by the name of a proxy before it.
        """
        if needs_key or self.open_to_all or not self.local:
            return None
        host = self.host.lower()
        own = [host]
        if host != "localhost":
            address = ipaddress.ip_address(host)
            own = [host, str(address)] if address.version == 4 else [f"[{host}]", f"[{address}]"]
        return list(dict.fromkeys([*LOCAL_NAMES, *own]))

    def check(self, keys: Keys) -> bool:
        """Check that the address is safe to listen on.

        Returns:
            Whether who asks needs a key.

        Raises:
            ConfigError: it is not, and nobody said in words that this is meant.
        """
        _check_tls(self.certificate, self.private_key)
        known = keys.listed()
        holds = any(key.revoked is None for key in known)
        if self.local:  # even where all keys are revoked: that must not open what they opened
            return bool(known) and not self.open_to_all
        if not holds and not self.open_to_all:
            remedy = "others reach this address, and there is no key; make one with 'sordino keys create', or say "
            raise ConfigError("--host", self.host, f"{remedy}--open-to-all to answer to whoever asks")
        if self.certificate is None and not self.without_tls:
            remedy = "others reach this address, and keys and pictures would be readable on the way; give "
            raise ConfigError("--host", self.host, f"{remedy}--tls-certificate and --tls-key, or say --without-tls")
        return not self.open_to_all


def _check_tls(certificate: Path | None, key: Path | None) -> None:
    """Check that TLS can be had with these files; with neither there is none.

    Raises:
        ConfigError: one is missing, cannot be read or is not the other's, or the certificate has expired.
    """
    if certificate is None and key is None:
        return
    if certificate is None:
        raise ConfigError("--tls-key", str(key), "give --tls-certificate too, or neither")
    if key is None:
        raise ConfigError("--tls-certificate", str(certificate), "give --tls-key too, or neither")
    for option, file in (("--tls-certificate", certificate), ("--tls-key", key)):
        try:
            file.read_bytes()
        except OSError as error:
            raise ConfigError(option, str(file), f"cannot be read ({error.strerror}); give a PEM file") from None
    try:
        # With a passphrase that is given, OpenSSL does not wait at the terminal for one.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key, password="")
        expires = x509.load_pem_x509_certificates(certificate.read_bytes())[0].not_valid_after_utc
    except (OSError, ValueError) as error:
        remedy = f"cannot be used with its key ({error}); give PEM files that belong together, the key unencrypted"
        raise ConfigError("--tls-certificate", str(certificate), remedy) from None
    if expires < datetime.now(UTC):
        told = f"expired on {expires:%Y-%m-%d}, so that nobody would connect; give a new one"
        raise ConfigError("--tls-certificate", str(certificate), told)


def serve(
    registry: Registry,
    trusted: Trusted,
    address: Address,
    settings: ServerSettings,
    log: Path | None,
    load: Sequence[str],
    checkpoint: str | None,
    tell: Callable[[str], None],
    samples: Path | None = None,
    runs: Path | None = None,
) -> None:
    """Serve prompts until the process is told to end.

    Args:
        registry: holds them.
        trusted: publishers.
        address: to listen on.
        settings: limits.
        log: file of who asked what; None: none is kept.
        load: prompts to have in memory before the first request, as NAME or NAME:VERSION.
        checkpoint: the folder or hub name where the prompts' encoder is now; None: where it was in training.
        tell: is told the address once connections are taken.
        samples: folder of pictures that the page offers; None: those of bundled data sets.
        runs: folder of runs that a second page compares; None: there is no such page.

    Raises:
        ConfigError: the address is not safe or not free, or a prompt or folder is not there.
        SordinoError: a prompt to load cannot be used.
    """
    needs_key = address.check(Keys(registry.database))
    offered = Samples(samples, settings)
    compared = None if runs is None else RunFolder(runs)
    try:
        family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
        bound = socket.create_server((address.host, address.port), family=family, backlog=128)
    except (TypeError, ValueError):  # of a name that cannot be one, before it is looked up
        raise ConfigError("--host", address.host, "is no name or address of this machine; give another") from None
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError("--port", address.port, f"cannot listen on {address.host} ({reason}); take another") from None
    with bound:
        shelf = Shelf(registry, trusted, settings.most_prompts, lambda saved: saved.load_encoder(checkpoint))
        for label in load:
            name, _, version = label.partition(":")
            try:
                shelf.take(name, version or None)
            except Refusal as refusal:
                raise ConfigError("PROMPT", label, getattr(refusal, "why", refusal.reason)) from None
        service = Service(shelf, settings, needs_key, Log(log))
        app = build(service, address.names(needs_key), offered, compared)
        server = uvicorn.Server(configured(app, address))
        scheme = "http" if address.certificate is None else "https"
        host = f"[{address.host}]" if ":" in address.host else address.host
        tell(f"{scheme}://{host}:{bound.getsockname()[1]}")
        server.run(sockets=[bound])


def configured(app: FastAPI, address: Address) -> uvicorn.Config:
    """Return the configuration of the HTTP server."""
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=10,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=16384,
        proxy_headers=False,  # whoever asks could write them
        http=Connection,
        ws="none",
        ssl_certfile=None if address.certificate is None else str(address.certificate),
        ssl_keyfile=None if address.private_key is None else str(address.private_key),
    )
