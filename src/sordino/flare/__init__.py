"""NVIDIA FLARE as an engine: what runs at its sites and its server, startup kits, and jobs that go on by themselves.

A job is a configuration without code. At a site it chooses nothing: `SiteExecutor` takes no arguments, and all that a
site does is in its own file, `local/site.toml` of its startup kit. The modules `executor`, `controller`, `provision`
and `administrator` import FLARE, and no other does.
"""

from sordino.errors import require_extra
from sordino.memory import collect_seldom

require_extra("flare", "an experiment over NVIDIA FLARE")
collect_seldom()  # an engine starts processes that import this first
