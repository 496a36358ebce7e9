"""Puts faults into a site whose processes have this folder on their PYTHONPATH; the product knows nothing of it.

Python imports a module of this name when it starts. This one waits until the site's module is imported, so that a
process without a site stays as it is and imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SITE = "sordino.sites.site"


class Finder(MetaPathFinder):
    """Changes the site's module after it was executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != SITE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            from site_faults import install

            install()

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())
