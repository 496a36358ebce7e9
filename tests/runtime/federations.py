"""Small federations that several tests run: six clients, four classes, four rounds."""

from __future__ import annotations

from typing import Any

NONCE = "00112233445566778899aabbccddeeff"
SIX = [[4 * i + c for i in range(k, 10, 3) for c in classes] for classes in ((0, 1), (2, 3)) for k in range(3)]
QUICK = {"context_length": 4, "batch_size": 5, "local_steps": 2, "optimizer": {"name": "adam", "learning_rate": 0.05}}
NOISE = {"noise_multiplier": 1.0, "simulation": True, "nonce": NONCE}
ADAPTIVE = NOISE | {"mechanism": "dp-fedavg", "clip_quantile": 0.5}
STATISTICS = NOISE | {"mechanism": "statistics", "center_share": 0.1, "scatter_share": 0.1}
UNIFORM = {"weighting": "uniform"}
ONE_STEP = QUICK | {"local_steps": 1, "dp-fpl": {"rank": 2}}

FEDERATIONS: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "dp-fpl, adaptive clip, noise by the clients": ("dp-fpl", ONE_STEP, ADAPTIVE, UNIFORM),
    "dp-fpl, adaptive clip, noise by the server": (
        *("dp-fpl", ONE_STEP, ADAPTIVE | {"noise_by": "server"}),
        UNIFORM | {"participation": 0.5},
    ),
    "dp-fpl, compressed uploads": (
        *("dp-fpl", ONE_STEP, NOISE | {"mechanism": "dp-fedavg", "noise_by": "server", "compress": True}),
        UNIFORM,
    ),
    "dp-fpl, adaptive clip, a secure sum": ("dp-fpl", ONE_STEP, ADAPTIVE | {"noise_by": "shares"}, UNIFORM),
    "dp-fpl, dp-sgd, a secure sum": ("dp-fpl", ONE_STEP, NOISE | {"mechanism": "dp-sgd", "noise_by": "shares"}, {}),
    "dp-fpl, dp-sgd": ("dp-fpl", QUICK | {"dp-fpl": {"rank": 2}}, NOISE | {"mechanism": "dp-sgd"}, {}),
    **{
        f"{method}, statistics, noise by {noise_by}": (
            *(method, {**QUICK, "dp-fpl": {"rank": 2}}, STATISTICS | {"noise_by": noise_by}),
            {},
        )
        for method in ("dp-fpl", "promptfl")
        for noise_by in ("client", "server", "shares")
    },
    "secfpp": ("secfpp", QUICK | {"batch_size": 0, "secfpp": {"cluster_every": 2, "clusters": 2}}, {}, {}),
    "pfedpg": ("pfedpg", QUICK, {}, {"participation": 0.67}),
    "pfedmoap": ("pfedmoap", QUICK | {"experts": 3}, {}, {"participation": 0.67}),
    "pfedmoap, dp-sgd": ("pfedmoap", QUICK | {"experts": 3}, NOISE | {"mechanism": "dp-sgd"}, {}),
}
