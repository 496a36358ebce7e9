"""A process that publishes: `python publisher.py URL NAME COUNT`, with a line once a version is on the disk.

It imports nothing heavy, so that many may start at once.
"""

from __future__ import annotations

import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sordino.serving.manifest import LEDGER, PROMPT, facts_of
from sordino.serving.registry import Registry

url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
privacy = {"private": False, "simulated": False, "epsilon": None, "delta": None, "unit": None}
facts = facts_of(
    method="promptfl",
    task="images",
    client=None,
    class_names=("cat", "dog"),
    encoder={"name": "bundled", "fingerprint": "ab"},
    privacy=privacy | {"statement": "Not private: a test.", "ledger_sha256": None},
    audit=None,
    training=None,
)
assert "torch" not in sys.modules
with Registry(url, create=True) as registry:
    for _ in range(count):
        files = {PROMPT: bytes(200_000), LEDGER: b"{}"}
        print(registry.publish(name, facts, files, key, accept_not_private=True).version, flush=True)
