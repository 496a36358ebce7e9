"""The sections of a run's report: functions from groups of runs to HTML, empty where there is nothing to tell."""
