"""The command line of privacy: `sordino privacy plan`, `ledger`, `statement`, `verify`, `key`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sordino.cli.console import say
from sordino.cli.methods import with_method
from sordino.cli.options import AsJson, ConfigFile, MethodFile, Overrides, chosen_experiment
from sordino.errors import ConfigError, StatementError

app = typer.Typer(help="What a run costs in privacy: before it, and after it.", no_args_is_help=True)


@app.command("plan")
def privacy_plan(
    config: ConfigFile,
    method: MethodFile = None,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="also a page with a plot")] = None,
    as_json: AsJson = False,
) -> None:
    """Say who will learn what, who adds the noise, and epsilon by round; nothing is trained."""
    experiment = chosen_experiment(config, with_method(overrides, method))
    from sordino.experiments.privacy.plan import as_text, plan
    from sordino.experiments.privacy.plan_page import write_page

    chosen = plan(experiment)
    if out is not None:
        write_page(chosen, out)
    print(json.dumps(chosen.as_dict()) if as_json else as_text(chosen))
    if out is not None and not as_json:
        print(f"Page: {out}")


@app.command("ledger")
def privacy_ledger(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories; several are composed")],
    delta: Annotated[float | None, typer.Option(help="at which to state epsilon; default: the run's")] = None,
    as_json: AsJson = False,
) -> None:
    """Read what was released, and what that comes to; of several runs on the same data, together."""
    from sordino.privacy.statement import as_text, read_ledgers, spending

    ledger = read_ledgers(folders, delta)
    print(json.dumps(spending(ledger)) if as_json else as_text(ledger))


@app.command("statement")
def privacy_statement(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="the page, .html; or its data, .json")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="PEM", help="sign with this private key")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished run's privacy in plain words, for a data protection officer: two printed pages."""
    from sordino.privacy.signature import load_private_key

    if out is None and not as_json:
        raise ConfigError("--out", None, "say where to write the page, as FILE.html, or print its data with --json")
    private_key = None if key is None else load_private_key(key)
    from sordino.audit.findings.strength import judge
    from sordino.experiments.privacy.statement import statement_of
    from sordino.report.statement import sealed, write

    envelope = sealed(statement_of(run, judge), private_key)
    if out is not None:
        write(envelope, out)
    if as_json:
        print(json.dumps(envelope))
        return
    statement = envelope["statement"]
    signer = statement["signer"]
    say(statement["document"]["banner"])
    print("Not signed; sign with --key" if signer is None else f"Signed by the key {signer['fingerprint']}")
    print(f"Page: {out}")


@app.command("verify")
def privacy_verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a statement, as a page or as JSON")],
    public_key: Annotated[
        Path | None, typer.Option("--public-key", metavar="PEM", help="of whoever should have signed")
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="RUN", help="the run that it should be of")] = None,
    as_json: AsJson = False,
) -> None:
    """See that a privacy statement was not changed, who signed it, and that it is that of a run."""
    from sordino.privacy.signature import load_public_key
    from sordino.report.statement import check

    checked = check(file, None if public_key is None else load_public_key(public_key))
    if checked.signer is None and run is None:
        raise StatementError(
            f"{file}: is not signed, so anybody can have written it; ask for one that is, made with --key, or compare "
            "it with its run by --run"
        )
    made_again = None
    if run is not None:
        from sordino.audit.findings.strength import judge
        from sordino.experiments.privacy.statement import compare

        made_again = compare(checked.statement, run, judge)
    if as_json:
        print(json.dumps(checked.as_dict() | {"same_run": None if run is None else True, "made_again": made_again}))
        return
    say(checked.as_text(file))
    if run is not None:
        rest = "all of it follows from the run" if made_again else "the rest was made by other versions, not again"
        print(f"Of the run {run}: the digests are the same, and {rest}.")


@app.command("key")
def privacy_key(
    out: Annotated[Path, typer.Option("--out", metavar="PEM", help="the private key's file, which must not exist")],
) -> None:
    """Make a pair of keys to sign statements with: keep the private one, and give the public one to readers."""
    from sordino.privacy.signature import make_key

    public_file, fingerprint = make_key(out)
    print(f"Private key, for --key; keep it to yourself: {out}")
    print(f"Public key, for --public-key; give it to readers: {public_file}")
    print(f"Fingerprint: {fingerprint}")
