"""Sordino: federated prompt learning for frozen vision-language models, private and honest about it."""

from sordino.waiting import wait_asleep

__version__ = "0.1.0"

wait_asleep()  # before anything imports torch
