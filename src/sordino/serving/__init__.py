"""Published prompts: a registry of signed versions, and classifiers of what it holds. Needs the extra `serve`.

    from sordino.serving import PromptClassifier

    classifier = PromptClassifier.from_registry("digits", registry="sqlite:///prompts.db")
    print(classifier.classify(["three.png"], top=3)[0].classes)

- `manifest.py` is what a version says of itself, and its signature; `trust.py` which keys count here.
- `sources.py` reads what is published from a run directory or a single file, `card.py` writes the card.
- `registry.py` keeps versions in a database; `tables.py`, `database.py` and `migrations/` are its inside.
- `folder.py` is a version as a folder of files, for whoever has no registry.
- `classifier.py` answers with one version. Nothing else here imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sordino.errors import require_extra

require_extra("serve", "publishing and serving prompts")

if TYPE_CHECKING:
    from sordino.serving.classifier import Answer, PromptClassifier
    from sordino.serving.manifest import Manifest
    from sordino.serving.registry import Published, Registry
    from sordino.serving.trust import Trusted

__all__ = ["Answer", "Manifest", "PromptClassifier", "Published", "Registry", "Trusted"]

# Imported when they are first asked for: to list prompts needs no torch.
_LAZY = {
    "Answer": "sordino.serving.classifier",
    "Manifest": "sordino.serving.manifest",
    "PromptClassifier": "sordino.serving.classifier",
    "Published": "sordino.serving.registry",
    "Registry": "sordino.serving.registry",
    "Trusted": "sordino.serving.trust",
}

if not TYPE_CHECKING:  # or type checkers would take any name for one of the module's

    def __getattr__(name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module 'sordino.serving' has no attribute {name!r}")
        return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__
