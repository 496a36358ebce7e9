"""Names that server, sites and jobs must agree on."""

from __future__ import annotations

TASK = "sordino"  # the one task that sites know
CONTENT = "content"  # a task's bytes, and those of its result
PROGRESS = "sordino_progress"  # the command that asks a running job how far it is
PAUSE = "sordino_pause"  # the command that has a running job end after its round, for another to go on

POLL = 0.2  # seconds between two questions of a site's for a task; FLARE's own default is 2

SITE_FILE = "site.toml"  # in the folder `local` of a site's kit
KIT_FILE = "sordino.json"  # in that of an administrator's: the names of the sites

RESULTS = "sordino"  # the folder of a job's results with a copy of the run directory

EXECUTOR = "sordino.flare.executor.SiteExecutor"
CONTROLLER = "sordino.flare.controller.Coordinator"
GATE = "sordino.flare.gate.Gate"  # which FLARE makes from `local/resources.json`, at sites and at the server
