"""Flower as an engine: a SuperLink behind a proxy, a node that runs no code from outside, and runs that go on.

`node` speaks Flower's Fleet API itself, in the process that holds the site: no app is installed or started there, so
a message chooses nothing but which question is answered. The modules `connection`, `messages`, `answering`, `fleet`,
`control` and `server` import Flower, and no other does.
"""

from sordino.errors import require_extra
from sordino.memory import collect_seldom

require_extra("flower", "an experiment over Flower")
collect_seldom()  # an engine starts processes that import this first
