"""Names that the server, its proxy, nodes and runs must agree on."""

from __future__ import annotations

# Keys of a message's records.
RECORD = "sordino"
SITE, TOKEN = "site", "token"
CONTENT = "content"
PART = 4 * 2**20  # bytes of a message in one request; the proxy takes somewhat more

# Keys of a run's configuration; `app/pyproject.toml` has the same.
PROPOSAL, FINGERPRINT, PATIENCE, CONFIG = "proposal", "fingerprint", "patience", "config"

PROJECT_VARIABLE = "SORDINO_FLOWER_PROJECT"  # the server's file, for the process of a run
SITE_VARIABLE = "SORDINO_SITE"  # a site's file, for a plain SuperNode

# What nodes with a registered key ask of a server; nothing else is let through from outside.
FLEET = tuple(
    f"/v1/fleet/{call}"
    for call in (
        *("activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages"),
        *("pull-object", "push-object", "confirm-message-received", "get-run", "get-fab"),
    )
)
HEALTH = "/health"

LINES = "lines.jsonl"  # in a run directory: the rounds' lines of the run that is at work there, as they are told
PROCESS = "process.json"  # in a run directory: which run of Flower's is at work there, in which process

# Flower asks for updates and tells of its use otherwise, and installs what an app names.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
