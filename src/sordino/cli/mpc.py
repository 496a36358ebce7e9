"""The command line of the parties: `sordino mpc try`, `certificates`, `dealer`, `server`, `provide`, `distill`."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sordino.cli.console import end_with_terminal
from sordino.cli.options import AsJson, ConfigFile, OutFolder, Overrides, Resume, chosen_folder
from sordino.cli.terminal import live_progress
from sordino.errors import ConfigError

if TYPE_CHECKING:
    import grpc

app = typer.Typer(help="Prompts for a model that one may not see, on two servers.", no_args_is_help=True)

Certificates = Annotated[Path, typer.Option(help="the party's folder, of those that 'sordino mpc certificates' made")]
Listen = Annotated[str, typer.Option(metavar="HOST:PORT", help="where to listen; port 0 for any that is free")]
Timeout = Annotated[float, typer.Option(min=0.5, help="seconds of silence after which another party counts as lost")]
Threads = Annotated[int | None, typer.Option(min=1, help="that compute; by default as many as there are cores")]


@app.command("certificates")
def certificates(
    out: Annotated[Path, typer.Option(help="the folder to make, with one folder a party")],
    days: Annotated[int, typer.Option(min=1, help="until they expire; at most 3650")] = 365,
) -> None:
    """Make keys and certificates for all parties; hand each its folder, by a way that nobody else reads."""
    from sordino.mpc.parties.certificates import make_certificates

    for folder in make_certificates(out, days):
        print(folder)


@app.command("dealer")
def dealer(listen: Listen, certificates: Certificates, timeout: Timeout = 60.0, threads: Threads = None) -> None:
    """Deal correlated randomness to the two servers; sees shapes, and no data."""
    from sordino.mpc.parties.certificates import DEALER, Identity
    from sordino.mpc.parties.dealer_service import start_dealer

    identity = Identity.load(certificates, DEALER, key="--certificates")
    _check_address("--listen", listen, least_port=0)
    _use(threads)
    _until_stopped(*start_dealer(identity, listen, timeout))


@app.command("server")
def server(
    listen: Listen,
    certificates: Certificates,
    dealer: Annotated[str, typer.Option(metavar="HOST:PORT", help="where the dealer is")],
    peer: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="for server 1: where server 0 is")] = None,
    timeout: Timeout = 60.0,
    threads: Threads = None,
    imitate: Annotated[
        str | None,
        typer.Option(metavar="NETWORK", help="be as slow as lan, wan, or RATE,DELAY in Mbit/s and ms; at both servers"),
    ] = None,
    keep: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="keep the share there, encrypted, so that a restart needs no model owner"),
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="the key of --keep, of mode 600, made where it is missing; "
            "without it, a passphrase in SORDINO_SHARE_PASSPHRASE",
        ),
    ] = None,
) -> None:
    """Hold shares of a model, and run it on shares of sentences; the certificate says which of the two servers."""
    from sordino.mpc.parties.certificates import SERVERS, Identity
    from sordino.mpc.parties.kept_share import KeptShare
    from sordino.mpc.parties.network import network_of
    from sordino.mpc.parties.server import start_server

    identity = Identity.load(certificates, *SERVERS, key="--certificates")
    if identity.role == SERVERS[0] and peer is not None:
        raise ConfigError("--peer", peer, "is for server-1 alone, which dials server-0 there; leave it out")
    if identity.role == SERVERS[1] and peer is None:
        raise ConfigError("--peer", peer, "server-1 dials server-0: give HOST:PORT of it")
    _check_address("--listen", listen, least_port=0)
    _check_address("--dealer", dealer)
    if peer is not None:
        _check_address("--peer", peer)
    if key_file is not None and keep is None:
        raise ConfigError("--key-file", str(key_file), "goes with --keep FILE, which is missing")
    network = network_of(imitate) if imitate else None
    kept = KeptShare.of(keep, key_file, os.environ) if keep else None
    _use(threads)
    _until_stopped(*start_server(identity, listen, dealer, peer, timeout, network, kept))


@app.command("provide")
def provide(
    servers: Annotated[str, typer.Option(metavar="HOST:PORT,HOST:PORT", help="server 0 and server 1")],
    certificates: Certificates,
    tower: Annotated[Path | None, typer.Option(help="of 'sordino mpc distill'; by default the package's own")] = None,
    model: Annotated[
        Path | None, typer.Option(help="folder of its teacher's checkpoint; by default the bundled text tower")
    ] = None,
    sentences: Annotated[
        int | None, typer.Option(min=300, help="public ones, to measure the tower's ranges on; by default 4,000")
    ] = None,
    timeout: Timeout = 60.0,
) -> None:
    """Give the servers shares of a text tower, as its owner; its ranges are measured on public text, the first time."""
    from sordino.mpc.parties.certificates import MODEL_OWNER, Identity
    from sordino.mpc.parties.kept_model import kept_model
    from sordino.mpc.parties.session import check_servers
    from sordino.mpc.parties.session import provide as give
    from sordino.mpc.tower.distill import teacher_of
    from sordino.mpc.tower.public_text import SENTENCES
    from sordino.mpc.tower.tower import PrivateTower, bundled_tower
    from sordino.private_tuning.settings import is_address

    identity, addresses = Identity.load(certificates, MODEL_OWNER, key="--certificates"), servers.split(",")
    if not (len(addresses) == 2 and all(is_address(address) for address in addresses)):
        raise ConfigError("--servers", servers, "must be two, as HOST:PORT,HOST:PORT")
    weights, teacher = PrivateTower.load(tower, "--tower") if tower else bundled_tower(), teacher_of(model)
    if weights.width != teacher.width:
        theirs = f"is for embeddings {weights.width} wide, and those of --model are {teacher.width} wide"
        remedy = "give the --tower that was distilled from --model; without either option, it is the bundled one"
        raise ConfigError("--tower", tower and str(tower), f"{theirs}; {remedy}")
    check_servers(identity, addresses, timeout)
    with live_progress() as progress:
        known = kept_model(certificates, weights, teacher, sentences or SENTENCES, progress)
    name = give(identity, addresses, weights, known.calibration, timeout, known.name, known.plan)
    print(f"Model {name} is at both servers{', with the ranges measured before' if known.kept else ''}")


@app.command("try")
def try_here(
    config: ConfigFile,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    as_json: AsJson = False,
    whole: Annotated[bool, typer.Option("--whole", help="do not cut the configuration to a few minutes")] = False,
    tower: Annotated[Path | None, typer.Option(help="as of 'sordino mpc provide'")] = None,
    model: Annotated[Path | None, typer.Option(help="as of 'sordino mpc provide'")] = None,
    sentences: Annotated[
        int | None, typer.Option(min=300, help="as of 'sordino mpc provide'; by default 1,000, or all with --whole")
    ] = None,
) -> None:
    """Run all five parties on this machine, as real processes, and print the commands for several machines."""
    from sordino.experiments.started import TRIAL
    from sordino.private_tuning.settings import load_private_config

    settings = load_private_config(config, overrides or [])
    from sordino.private_tuning.trial import recipe, run_trial, trial_of
    from sordino.report.private import write_private_report

    folder = chosen_folder(out, resume, f"{config.stem}-try", TRIAL)
    end_with_terminal()
    trial = trial_of(config, settings, overrides or [], whole, tower, model, sentences)
    for cut in trial.cuts:
        print(f"A trial, --whole leaves it as it is: {cut}", file=sys.stderr)
    run = run_trial(trial, folder, resume, as_json, lambda text: print(text, file=sys.stderr, flush=True))
    report = write_private_report(run, recipe(trial), f"{config.stem}, a trial on one machine")
    if not as_json:
        print(f"Certificates, logs and run directory: {folder}\nReport: {report}\n")
        print(f"The same on several machines, whole, with the hosts' names filled in:\n\n{recipe(trial)}")


@app.command("embeddings")
def embeddings(
    model: Annotated[Path, typer.Option(help="folder of a BERT-like checkpoint")],
    out: Annotated[Path, typer.Option(help="the folder to make")],
) -> None:
    """Take tokenizer and embeddings out of a checkpoint: what a model owner gives to data owners, without a layer."""
    from sordino.mpc.tower.distill import write_embeddings

    write_embeddings(model, out)
    print(f"Embeddings: {out}, for model.embeddings of 'sordino tune-private'")


@app.command("distill")
def distill(
    out: Annotated[Path, typer.Option(help="the file to write, in half precision")],
    model: Annotated[
        Path | None, typer.Option(help="folder of a BERT-like checkpoint; by default the bundled text tower")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="of training; one takes about a second on two cores")] = 500,
    batch: Annotated[int, typer.Option(min=1, help="sentences a step")] = 32,
    features: Annotated[int, typer.Option(min=1, help="frequencies a head; each costs bytes on shares")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="of frequencies and batches")] = 0,
) -> None:
    """Teach a text tower to do without softmax, on public text, so that it is cheap on shares."""
    from sordino.mpc.tower.distill import distill_to

    with live_progress() as progress:
        agreement = distill_to(out, model, steps, batch, features, seed, progress)
    print(f"cosine to the teacher on held-out sentences: {agreement.mean:.4f}, 5% below {agreement.low:.4f}")
    print(f"Tower: {out}")


def _check_address(option: str, text: str, least_port: int = 1) -> None:
    """Refuse what is no HOST:PORT."""
    from sordino.private_tuning.settings import is_address

    if not is_address(text, least_port):
        raise ConfigError(option, text, f"must be HOST:PORT, with a port from {least_port} to 65535")


def _use(threads: int | None) -> None:
    """Settle how this process, a server or the dealer, uses the machine."""
    import torch

    from sordino.memory import keep_freed

    keep_freed()
    if threads:
        torch.set_num_threads(threads)


def _until_stopped(server: grpc.Server, address: str) -> None:
    """Serve until a signal, then end all lines."""
    print(f"listening at {address}", flush=True)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    stop.wait()
    server.stop(grace=1).wait()
    print("stopped", file=sys.stderr)
