"""The file that a variation of a method starts from: it imports its parent, keeps its parts, and replaces one."""

from __future__ import annotations

import textwrap

from sordino.algorithms import FUNCTIONS, METHODS, algorithm
from sordino.algorithms.method_file import is_name
from sordino.errors import ConfigError

# See `sordino.algorithms.base`.
OPTIONAL = ("Model", "check", "client_exchange", "discloses", "server_exchange", "unused")
STATES = ("Broadcast", "ClientState", "Server", "Settings", "Upload")

ROUND = '''
def client_round(settings, broadcast, state, data, gradients, round_context):
    """An example to change: what clients compute in a round, what they keep (state) and what they send (upload)."""
    upload, state = parent.client_round(settings, broadcast, state, data, gradients, round_context)
    return upload, state
'''
PROMPT = '''
def prompt(broadcast, state):
    """An example to change: the clients' prompts, from what the server tells them and what they keep."""
    return parent.prompt(broadcast, state)
'''


def variation(name: str, parent: str) -> str:
    """Return the Python text of a method that is its parent in all but a function, which calls the parent's.

    It runs as it is, with the parent's numbers.

    Args:
        name: of the new method.
        parent: one of Sordino's methods, or of an installed package.

    Raises:
        ConfigError: the name cannot be a method's or is taken, or there is no such parent.
    """
    if not is_name(name):
        raise ConfigError("NAME", name, "give lower-case letters and digits, joined by hyphens")
    if name in METHODS:
        raise ConfigError("NAME", name, "a method of this name is here already; choose another")
    module = algorithm(parent)
    if METHODS[parent].added is not None:
        raise ConfigError("--from", parent, "is defined in a file or in Python itself; copy it instead")
    path = METHODS[parent].module
    path = path if "." in path else f"sordino.algorithms.{path}"
    package, _, last = path.rpartition(".")
    changed, example = ("client_round", ROUND) if module.ABOUT.trains else ("prompt", PROMPT)
    kept = sorted(part for part in (*STATES, *FUNCTIONS, *OPTIONAL) if hasattr(module, part) and part != changed)
    names = textwrap.fill(", ".join(kept), 110, initial_indent="    ", subsequent_indent="    ")
    return f'''"""{name}: {parent}, with a change. Say here what changes, and why.

Run it: sordino run CONFIG.toml --method {name}.py

docs/new-method.md has the rules; "sordino methods {parent}" describes the parent and its settings.
"""

from dataclasses import replace

from {package} import {last} as parent
from {path} import (  # noqa: F401
    # The parts that stay.
{names},
)

PARENT = "{parent}"  # its settings apply: those under [settings.{parent}], unless [settings.{name}] has others
ABOUT = replace(parent.ABOUT, paper="a variation of " + parent.ABOUT.paper)

{example}'''
