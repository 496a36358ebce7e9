"""The command line of the server of prompts: `sordino serve`, and `sordino keys create`, `list`, `revoke`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import at_work, say
from sordino.cli.options import AsJson
from sordino.cli.published import RegistryUrl, Trust
from sordino.cli.terminal import print_items
from sordino.errors import require_extra

MOST = 2**31 - 1  # of a count that both databases can hold

keys = typer.Typer(help="Keys of the server of prompts.", no_args_is_help=True)


def serve(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME[:VERSION]...]", help="prompts to load before the first request")
    ] = None,
    registry: RegistryUrl = None,
    trust: Trust = None,
    host: Annotated[str, typer.Option(help="the address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 is any that is free")] = 8000,
    tls_certificate: Annotated[Path | None, typer.Option(metavar="PEM", help="with its chain")] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="PEM", help="the certificate's private key")] = None,
    open_to_all: Annotated[bool, typer.Option("--open-to-all", help="answer to whoever asks, without a key")] = False,
    without_tls: Annotated[
        bool, typer.Option("--without-tls", help="listen for others in plain HTTP, as behind a proxy that has TLS")
    ] = False,
    log: Annotated[Path, typer.Option(metavar="FILE", help="who asked what prompt when; never a picture")] = Path(
        "sordino-serve.jsonl"
    ),
    encoder: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="folder or hub name where the prompts' encoder is now")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="pictures that the page offers, for all prompts or by name")
    ] = None,
    runs: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="add the page /runs, which compares the runs below it")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="the most classes that an answer has")] = 5,
    digits: Annotated[int, typer.Option(min=1, max=6, help="decimals of probabilities")] = 2,
    per_minute: Annotated[
        int, typer.Option(min=1, max=MOST, help="requests of a key without a limit of its own")
    ] = 600,
    per_day: Annotated[
        int, typer.Option(min=1, max=MOST, help="pictures of a key without a limit of its own")
    ] = 10_000,
) -> None:
    """Answer to pictures with the prompts of a registry, over HTTP and on a web page."""
    require_extra("serve", "'sordino serve'")
    from sordino.serving.registry import Registry
    from sordino.serving.server.listen import Address
    from sordino.serving.server.listen import serve as listen
    from sordino.serving.server.settings import ServerSettings
    from sordino.serving.trust import Trusted

    settings = ServerSettings(most_top=top, digits=digits, per_minute=per_minute, per_day=per_day)
    address = Address(host, port, tls_certificate, tls_key, open_to_all, without_tls)
    at_work("the server ended")
    with Registry(registry) as opened:
        listen(opened, Trusted.of(trust or []), address, settings, log, prompts or [], encoder, _tell, samples, runs)


@keys.command("create")
def create(
    name: Annotated[str, typer.Option("--name", help="whose key it is")],
    scopes: Annotated[str, typer.Option(help="of read, classify and publish")] = "read,classify",
    per_minute: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="requests; default: the server's limit")
    ] = None,
    per_day: Annotated[int | None, typer.Option(min=1, max=MOST, help="pictures; default: the server's limit")] = None,
    registry: RegistryUrl = None,
) -> None:
    """Make a key, and print it; only its hash is kept."""
    require_extra("serve", "'sordino keys'")
    from sordino.serving.registry import Registry
    from sordino.serving.server.keys import Keys

    asked = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    with Registry(registry) as opened:
        print(Keys(opened.database).create(name, asked, per_minute, per_day))


@keys.command("list")
def list_keys(registry: RegistryUrl = None, as_json: AsJson = False) -> None:
    """List all keys, without what opens anything."""
    require_extra("serve", "'sordino keys'")
    from sordino.serving.registry import Registry
    from sordino.serving.server.keys import Keys

    with Registry(registry) as opened:
        found = Keys(opened.database).listed()
    if as_json:
        print(json.dumps({"keys": [key.as_dict() for key in found]}))
    elif not found:
        print("There is no key; make one with 'sordino keys create'")
    else:
        rows = [key.as_dict() | {"scopes": ", ".join(key.scopes)} for key in found]
        print_items([{name: "" if value is None else str(value) for name, value in row.items()} for row in rows])


@keys.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the key")], registry: RegistryUrl = None
) -> None:
    """Revoke a key at once and for good."""
    require_extra("serve", "'sordino keys'")
    from sordino.serving.registry import Registry
    from sordino.serving.server.keys import Keys

    with Registry(registry) as opened:
        Keys(opened.database).revoke(name)
    say(f"Revoked: {name}")


def _tell(address: str) -> None:
    print(f"Serving at {address}", flush=True)
