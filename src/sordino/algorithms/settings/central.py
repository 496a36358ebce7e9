"""`central` trains as `local` does, on everybody's images, and has its hyper-parameters."""

from sordino.algorithms.settings.local import Settings

__all__ = ["Settings"]
