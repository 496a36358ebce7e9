"""Attacks that measure what an adversary learns of the training data from a finished run.

The package can be called: `sordino.audit(folder)` is `sordino.audit.run.audit(folder)`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is also the function of its name.

    Python sets a package as an attribute of the one above when it is first imported, so `sordino.audit` cannot always
    be a function.
    """

    def __call__(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """Attack a finished run; see `sordino.audit.run.audit`."""
        from sordino.audit.run import audit

        return audit(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
