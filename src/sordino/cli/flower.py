"""The command line of the Flower engine: `sordino flower up`, `key`, `node`, `run` and `app`."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import at_work
from sordino.cli.options import AsJson, ConfigFile, Overrides, SigningKey
from sordino.cli.terminal import live_progress
from sordino.errors import ConfigError, require_extra

app = typer.Typer(help="Experiments across machines of several owners, over Flower.", no_args_is_help=True)

LAST_PORT = 65535

ProjectFile = Annotated[Path, typer.Argument(metavar="PROJECT.toml", help="the server, and the sites' public keys")]


@app.command("up")
def up(project: ProjectFile) -> None:
    """Run the server: a SuperLink that only this machine reaches, and the proxy that sites connect to."""
    require_extra("flower", "'sordino flower'")
    from sordino.flower.project import ServerProject

    settings = ServerProject(project)
    from sordino.flower.superlink import up as serve

    _quiet()
    at_work("runs that were at work go on when it is started again and 'sordino flower run' is repeated")
    with live_progress():
        serve(settings, _tell)


@app.command("key")
def key(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="the private key to make, at the site's own machine")],
) -> None:
    """Make a site's key, and print its public half, which the server's operator needs."""
    require_extra("flower", "'sordino flower'")
    from sordino.flower.keys import make_key

    print(make_key(file))


@app.command("node")
def node(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="the site's own file")],
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the server's proxy listens")],
    ca: Annotated[Path, typer.Option(metavar="FILE", help="the project's certificate, from the server's operator")],
    key: Annotated[Path, typer.Option(metavar="FILE", help="the site's private key")],
) -> None:
    """Connect a site to a server, and answer its questions; where the server is away, wait for it."""
    require_extra("flower", "'sordino flower'")
    from sordino.flower.keys import load_key
    from sordino.sites.settings import load_site

    settings = load_site(site)
    own = load_key(key)
    host, colon, port = server.rpartition(":")
    if not (colon and host and "/" not in host and port.isdecimal() and 0 < int(port) <= LAST_PORT):
        raise ConfigError("--server", server, "write host:port, e.g. fl.example.org:8443")
    if not ca.is_file():
        raise ConfigError("--ca", str(ca), "there is no such file; ask the server's operator for ca.crt")
    _require_certificate(ca)
    from sordino.flower.node import serve
    from sordino.sites.site import Site

    at_work("a round that was at work may be charged though its answer was not kept, but only once; start it again")
    _quiet()
    with live_progress():
        serve(Site(settings), server, ca, own, _tell)


@app.command("run")
def run(
    config: ConfigFile,
    project: Annotated[Path, typer.Option(metavar="PROJECT.toml", help="that of 'sordino flower up' on this machine")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="where to copy the run directory at the end")],
    overrides: Overrides = None,
    tries: Annotated[int, typer.Option(min=1, help="the most runs that are started")] = 5,
    key: SigningKey = None,
    as_json: AsJson = False,
) -> None:
    """Run an experiment at the sites of this machine's server, and go on by itself where a run or the server dies."""
    require_extra("flower", "'sordino flower'")
    from sordino.cli.watching import print_outcome, proposed, watching
    from sordino.flower.project import ServerProject

    settings = ServerProject(project)
    chosen, proposal = proposed(config, overrides, key)
    from sordino.flower.control import connected
    from sordino.flower.coordinator import coordinator_settings
    from sordino.flower.server import FlowerServer, write_run
    from sordino.sites.submission import Submission

    _quiet()
    words = ["sordino", "flower", "run", str(config), "--project", str(project), "--out", str(out)]
    at_work(f"the run goes on at the server; to watch it again, repeat {shlex.join(words)}")
    with connected(settings) as control, watching(chosen.experiment.tracking, out) as watch:
        server = FlowerServer(control, coordinator_settings(settings).folder(proposal))
        Submission(server, proposal, chosen.patience, write_run, tries, watch).run(out)
    print_outcome(out, as_json)


@app.command("app")
def app_folder() -> None:
    """Print the folder that `flwr run` takes."""
    require_extra("flower", "'sordino flower'")
    from sordino.flower.control import APP

    print(APP)


def _require_certificate(ca: Path) -> None:
    """Check that a file holds a certificate, before anybody waits for a server.

    Raises:
        ConfigError: it does not.
    """
    import ssl

    try:
        ssl.create_default_context(cafile=str(ca))
    except OSError:  # also of `ssl`
        raise ConfigError("--ca", str(ca), "holds no certificate; ask the server's operator for ca.crt") from None


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _quiet() -> None:
    """Have the libraries say only what is wrong."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
