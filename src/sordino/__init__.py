"""Sordino: federated prompt learning for frozen vision-language models, private and honest about it."""

__version__ = "0.1.0"
