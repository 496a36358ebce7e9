"""SecP-Tuning on top of `mpc`: search, tasks, settings, tuning and baselines."""
