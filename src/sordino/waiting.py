"""How threads of matrix kernels wait for each other: asleep, not spinning.

OpenMP's threads spin by default after a parallel part. Beside any other work a spinning thread takes the core that the
others wait for, so that a computation on two cores may become ten times slower. The runtime reads the policy once, when
it is loaded, which importing torch does; so this must come first.
"""

from __future__ import annotations

import os

# What a user may have settled already, by OpenMP's own variable or by those of its two runtimes.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


def wait_asleep() -> None:
    """Choose the passive policy, unless the user chose one; processes that are started from here inherit it."""
    if not any(name in os.environ for name in CHOICES):
        os.environ["OMP_WAIT_POLICY"] = "passive"
