"""`python -m sordino` is `sordino`."""

from __future__ import annotations

import sys

from sordino.cli.console import run_command
from sordino.memory import collect_seldom, keep_freed


def main() -> None:
    """The entry point. All imports but one happen inside, where an interruption is told in one line, too."""

    def command() -> int:
        from sordino.cli.app import invoke

        return invoke()

    collect_seldom()
    keep_freed()  # before a library starts threads, whose memory the settings would not reach
    sys.exit(run_command(command))


if __name__ == "__main__":
    main()
