"""Data sets, their partition over clients, and the evaluation splits.

`settings` defines a task, `sources` loads the pictures, `partitions` divides them over clients, and
`splits` joins training and test sets to a `Task`.
"""

from sordino.tasks.settings import DataSettings, PartitionSettings

__all__ = ["DataSettings", "PartitionSettings"]
