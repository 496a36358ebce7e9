"""`sordino methods`: list the methods, describe one, and write the file that a new one starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sordino.cli.options import AsJson
from sordino.cli.terminal import print_items, print_method
from sordino.errors import ConfigError

SHOW = "show"  # the command that `sordino methods NAME` is


class _Group(TyperGroup):
    """Commands, and the names of methods beside them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the hidden command before the name of a method."""
        places = [place for place, argument in enumerate(args) if not argument.startswith("-")]
        if places and args[places[0]] not in self.commands:
            args = [SHOW, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    invoke_without_command=True,
    help="List the methods: paper, what is personal, what is shared, what they promise, need and release. "
    "`sordino methods NAME`, or NAME.py, tells all about one.",
    rich_markup_mode=None,
)


@app.callback()
def list_methods(context: typer.Context, as_json: AsJson = False) -> None:
    """List the methods, unless a command follows."""
    if context.invoked_subcommand is not None:
        return
    from sordino.experiments.methods import rows

    if as_json:
        print(json.dumps({"methods": rows()}))
        return
    print_items(rows())


@app.command(SHOW, hidden=True)
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="a method, or its file NAME.py, which is executed")],
    as_json: AsJson = False,
) -> None:
    """Describe one method with its settings."""
    from sordino.experiments.methods import card

    if name.endswith(".py"):
        name = add_file(Path(name))
    described = card(name)
    if as_json:
        print(json.dumps(described.as_dict()))
    else:
        print_method(described)


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the new method; its file is NAME.py")],
    parent: Annotated[str, typer.Option("--from", metavar="METHOD", help="the method that it varies")],
    as_json: AsJson = False,
) -> None:
    """Write a variation of a method into NAME.py: it runs at once, and one function is yours to change."""
    from sordino.algorithms.variation import variation
    from sordino.files import NewFile, create_files

    text, file = variation(name, parent), Path(f"{name}.py")
    try:
        create_files(NewFile(file, text.encode()))
    except FileExistsError:
        raise ConfigError("NAME", name, f"{file} is here already; choose another name, or move the file away") from None
    except OSError as error:
        raise ConfigError(
            "NAME",
            name,
            f"{file} cannot be written ({error.strerror or error}); free space, or change to another folder",
        ) from None
    if as_json:
        print(json.dumps({"name": name, "parent": parent, "file": str(file)}))
        return
    print(f"{file}: a variation of {parent}\nRun it: sordino run CONFIG.toml --method {file}")


def add_file(file: Path) -> str:
    """Execute the file of a method that the command line names, and return the method's name."""
    from sordino.algorithms import add_method
    from sordino.algorithms.method_file import method_name

    name = method_name(file)
    add_method(name, file, "--method")
    return name


def with_method(overrides: list[str] | None, file: Path | None) -> list[str]:
    """Return overrides that make a file's method known, and run it."""
    if file is None:
        return overrides or []
    from sordino.algorithms.method_file import method_name

    name = method_name(file)
    return [*(overrides or []), f"methods.{name}={file.absolute()}", f"algorithm={name}"]
