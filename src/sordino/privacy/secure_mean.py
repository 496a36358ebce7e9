"""Means of clients' vectors by a secure sum, with the noise that clients add in shares.

The server learns the noised sum and nothing else (`sordino.secure.sums`). Colluding clients can take their own shares
of the noise off, and some clients may drop out, so every share is large enough for the rest. Here all parties are
played in one process, through the bytes that they would exchange.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from sordino.privacy.ledger import Unit
from sordino.privacy.noise import Randomness
from sordino.privacy.settings import PrivacySettings
from sordino.secure import local_sum, plan_sum

SESSION_BYTES = 16


class SecureSums:
    """The secure sums of one round.

    Args:
        settings: who may collude and drop out.
        randomness: where clients' noise comes from.

    Attributes:
        sent, received: bytes of the first client's messages so far.
    """

    def __init__(self, settings: PrivacySettings, randomness: Randomness) -> None:
        self._settings, self._randomness = settings, randomness
        self.sent = self.received = 0

    def of(
        self,
        purpose: str,
        fields: Mapping[str, Tensor],
        unit: Unit,
        clip: float,
        noise_multiplier: float,
        largest: float | None = None,
    ) -> tuple[dict[str, Tensor], float]:
        """Sum several fields as one vector a client.

        Args:
            purpose: what the noise is for.
            fields: name to [K, ...]. Where the client is the unit, of a joint norm of at most `clip` each; where the
                example is, one example changes them by at most `clip` in joint norm.
            unit: of privacy.
            clip: the sensitivity before quantization.
            noise_multiplier: z that must be left when clients drop out and collude; 0 adds no noise.
            largest: a bound on entries that does not depend on the data; by default `clip`.

        Returns:
            The sums [...] by name, and the noise multiplier that the survivors' noise is charged.
        """
        flat = torch.cat([field.detach().flatten(1).double().cpu() for field in fields.values()], 1)
        clients, dimension = flat.shape
        setup = plan_sum(
            session=secrets.token_hex(SESSION_BYTES),
            clients=clients,
            dimension=dimension,
            clip=clip,
            unit=unit,
            largest=largest,
            noise_multiplier=noise_multiplier,
            threshold=clients - self._settings.dropouts,
            # A sum without noise promises nothing, so it may be one in which colluders could subtract.
            colluders=self._settings.colluders if noise_multiplier else 0,
        )
        found, traffic = local_sum(setup, flat.numpy(), bits=self._randomness.words(f"noise on {purpose}"))
        self.sent += sum(traffic.sent.get(0, {}).values())
        self.received += traffic.received[0]
        charged = setup.charge(found.survivors).noise_multiplier if noise_multiplier else 0.0
        parts = torch.from_numpy(np.asarray(found.values)).split([field[0].numel() for field in fields.values()])
        pairs = zip(fields.items(), parts, strict=True)
        return {name: part.view(field.shape[1:]).to(field) for (name, field), part in pairs}, charged
