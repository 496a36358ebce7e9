"""`python -m sordino` is `sordino`."""

from __future__ import annotations

import sys

from sordino.cli.console import run_command


def main() -> None:
    """The entry point. All imports but one happen inside, where an interruption is told in one line, too."""

    def command() -> int:
        from sordino.cli.app import invoke

        return invoke()

    sys.exit(run_command(command))


if __name__ == "__main__":
    main()
