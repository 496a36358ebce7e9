"""SecP-Tuning on top of `mpc`: search, tasks, settings, tuning and baselines."""

from sordino.errors import require_extra

require_extra("mpc", "forward-only tuning (sordino tune-private)")  # its modules import what only the extra has
