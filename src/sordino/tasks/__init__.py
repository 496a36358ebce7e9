"""Data sets, their partition over clients, and the evaluation splits.

`settings` says what a task is, `sources` loads the pictures, `partitions` divides them over clients, `splits` puts
training and test sets together into a `Task`.
"""

from sordino.tasks.settings import DataSettings, PartitionSettings

__all__ = ["DataSettings", "PartitionSettings"]
