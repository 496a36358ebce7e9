"""Puts faults into a site whose processes have this folder on their PYTHONPATH; the product knows nothing of it.

Python imports a module of this name when it starts. This one waits until the site's module is imported, so that a
process without a site stays as it is and imports nothing heavy. With SORDINO_TEST_HOSTILE it waits for FLARE's, too.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def _faults(module: ModuleType) -> None:
    from site_faults import install

    install()


def _hostile(party: str) -> Callable[[ModuleType], None]:
    def change(module: ModuleType) -> None:
        from hostile import install

        install(getattr(module, party))

    return change


class Finder(MetaPathFinder):
    """Changes a module after it was executed.

    Args:
        module: its name.
        change: what is done with it.
    """

    def __init__(self, module: str, change: Callable[[ModuleType], None]) -> None:
        self._module, self._change = module, change

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self._module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def executed(module: ModuleType) -> None:
            execute(module)
            self._change(module)

        spec.loader.exec_module = executed  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder("sordino.sites.site", _faults))
if "SORDINO_TEST_HOSTILE" in os.environ:
    sys.meta_path.insert(0, Finder("nvflare.private.fed.client.admin", _hostile("FedAdminAgent")))
    sys.meta_path.insert(0, Finder("nvflare.private.fed.server.admin", _hostile("FedAdminServer")))
