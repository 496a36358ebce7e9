"""An experiment as it is proposed to sites: what all parties must know of it, its fingerprint and its signature."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sordino.errors import ConfigError
from sordino.experiments.config import Experiment, parse_config, resolved
from sordino.privacy.signature import sign, signed_by
from sordino.runtime.messages import MessageError

# Tables of a configuration that are each party's own.
OWN = ("data", "partition", "device", "tracking", "poisoning", "methods")
# And keys of other tables: places on a machine, and noise that can be drawn again.
OWN_KEYS = (("encoder", "checkpoint"), ("privacy", "release"), ("privacy", "nonce"))
CLASS_NAMES = "class_names"


@dataclass(frozen=True)
class Proposal:
    """An experiment without anything that is a party's own.

    Attributes:
        tables: of the configuration, with every default written out; and `class_names`, in order, if they are given.
        signature: of the fingerprint, by Ed25519, in Base64; empty if it is not signed.
    """

    tables: Mapping[str, Any]
    signature: str = ""

    @classmethod
    def of(
        cls, config: Experiment, class_names: tuple[str, ...] | None = None, key: Ed25519PrivateKey | None = None
    ) -> Proposal:
        """Return the proposal of a configuration.

        Args:
            config: of the experiment.
            class_names: the classes, in order; None if all sites have the same.
            key: signs it.

        Raises:
            ConfigError: it has what no site takes part in.
        """
        if config.methods and config.algorithm in config.methods:
            remedy = (
                "sites run no code that is not installed there; use a method of Sordino's or of an installed package"
            )
            raise ConfigError("methods", config.algorithm, remedy)
        if config.privacy.simulation:
            remedy = "noise that can be drawn again protects no site; set it to false"
            raise ConfigError("privacy.simulation", True, remedy)
        if config.poisoning is not None:
            raise ConfigError("poisoning", "", "is for simulations; leave the table out")
        if config.privacy.release is not None:
            raise ConfigError("privacy.release", config.privacy.release, "is for runs of one party; leave it out")
        tables = {name: table for name, table in resolved(config).items() if name not in OWN}
        tables["encoder"].pop("checkpoint", None)
        if class_names is not None:
            tables[CLASS_NAMES] = list(class_names)
        proposal = cls(tables)
        return proposal if key is None else cls(tables, sign(key, _signed(proposal)))

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 of its tables, in hex; equal fingerprints are equal experiments."""
        text = json.dumps(self.tables, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Return the classes, in order; None if all sites have the same."""
        names = self.tables.get(CLASS_NAMES)
        return None if names is None else tuple(names)

    @property
    def facts(self) -> dict[str, Any]:
        """Return it for a message."""
        return {"tables": dict(self.tables), "signature": self.signature}

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> Proposal:
        """Read it from a message.

        Raises:
            MessageError: it is malformed.
        """
        tables, signature = facts.get("tables"), facts.get("signature", "")
        if not isinstance(tables, dict) or not isinstance(signature, str) or set(tables) & set(OWN):
            raise MessageError("the proposal has unknown entries, or lacks the experiment's tables")
        for table, key in OWN_KEYS:
            if not isinstance(inside := tables.get(table, {}), dict) or key in inside:
                raise MessageError(f"the proposal has {table}.{key}, which each party sets for itself")
        names = tables.get(CLASS_NAMES)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise MessageError("the proposal's class names are no list of names")
        return cls(tables, signature)

    def is_signed_by(self, public_key: bytes) -> bool:
        """Tell whether the holder of a key signed it, given the 32 bytes of the public one."""
        return signed_by(public_key, self.signature, _signed(self))

    def config(self, own: Mapping[str, Any]) -> Experiment:
        """Return the configuration with a party's own tables.

        Raises:
            ConfigError: a key or value is not allowed here.
        """
        tables = {name: table for name, table in self.tables.items() if name != CLASS_NAMES}
        encoder = dict(tables.get("encoder", {})) | dict(own.get("encoder") or {})
        return parse_config(tables | dict(own) | {"encoder": encoder})


def _signed(proposal: Proposal) -> bytes:
    """Return what a signature is of: no other document of Sordino's starts like this."""
    return b"sordino experiment " + proposal.fingerprint.encode()
