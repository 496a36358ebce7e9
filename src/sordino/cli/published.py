"""The command line of published prompts: `sordino publish`, and `sordino prompts list`, `show`, `verify` and others."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sordino.cli.console import at_work, say
from sordino.cli.options import AsJson
from sordino.cli.terminal import print_items
from sordino.errors import ConfigError, PromptError, require_extra

if TYPE_CHECKING:
    from sordino.serving.manifest import Manifest
    from sordino.serving.registry import Listed, Published
    from sordino.serving.trust import Trusted

app = typer.Typer(help="Published prompts: signed versions in a registry.", no_args_is_help=True)

RegistryUrl = Annotated[
    str | None,
    typer.Option(
        "--registry",
        metavar="URL",
        help="sqlite:///FILE or postgresql://...; default: $SORDINO_REGISTRY, or prompts.db",
    ),
]
Label = Annotated[
    str, typer.Argument(metavar="NAME[:VERSION]", help="a published prompt; by default its latest version")
]
Trust = Annotated[
    list[Path] | None,
    typer.Option(
        "--trust", metavar="KEY.pub.pem", help="a publisher's public key, or a folder of such; may be repeated"
    ),
]

ATTACKS = {
    **{"unknown": "not known: without its run", "none": "none tried"},
    **{"tried": "tried", "contradicting": "contradict it"},
}


def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory, or a prompt's file")],
    name: Annotated[str, typer.Option("--name", help="to publish it under, as fabric-faults")],
    client: Annotated[int | None, typer.Option("--client", min=0, metavar="K", help="whose prompt, from 0")] = None,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", metavar="FILE", help="of a prompt's file without its run")
    ] = None,
    registry: RegistryUrl = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="PEM", help="sign with this private key; default: the user's own")
    ] = None,
    accept_not_private: Annotated[
        bool, typer.Option("--accept-not-private", help="publish a prompt that is not private, marked as such")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Publish a prompt of a finished run as the next version of a name: signed, and never changed after."""
    require_extra("serve", "'sordino publish'")
    from sordino.serving.manifest import check_mark, check_name

    check_name(name)
    if not run.exists():
        raise ConfigError(
            "RUN", str(run), "no such file or directory; give a finished run directory, or a prompt's file"
        )
    if run.is_file() and (ledger is None or client is not None):
        raise ConfigError("--ledger", ledger and str(ledger), "a prompt's file needs its ledger, and has no --client")
    if ledger is not None and not run.is_file():
        raise ConfigError("--ledger", str(ledger), "a run directory has its own; leave it out")
    at_work("nothing was published; repeat the command")
    from sordino.serving.registry import Registry
    from sordino.serving.sources import from_file, read_run
    from sordino.serving.trust import publisher_key

    material = read_run(run, client) if ledger is None else from_file(run, ledger)
    check_mark(material.facts, accept_not_private)  # before a key or a registry is made for what is refused
    private_key, public_file = publisher_key(key)
    files = material.signed(private_key).files
    with Registry(registry, create=True) as prompts:
        manifest = prompts.publish(name, material.facts, files, private_key, accept_not_private)
    if as_json:
        print(json.dumps(manifest.model_dump(mode="json") | {"mark": manifest.mark, "registry": prompts.label}))
        return
    say(f"Published {manifest.label} in {prompts.label}: {manifest.promise}")
    print(f"Signed by the key {manifest.publisher}")
    if public_file is not None:
        print(f"This key is your own; give its public half to whoever uses your prompts: {public_file}")


@app.command("list")
def list_prompts(registry: RegistryUrl = None, trust: Trust = None, as_json: AsJson = False) -> None:
    """List all versions: privacy, state, and whether a trusted key signed them."""
    require_extra("serve", "'sordino prompts'")
    from sordino.serving.registry import Registry

    with Registry(registry) as prompts:
        versions = prompts.listed(_trusted(trust))
    if as_json:
        print(json.dumps({"registry": prompts.label, "prompts": [each.as_dict() for each in versions]}))
        return
    if versions:
        print_items([_row(each) for each in versions])
    else:
        say(f"No prompt is published in {prompts.label}")


@app.command("show")
def show(label: Label, registry: RegistryUrl = None, trust: Trust = None, as_json: AsJson = False) -> None:
    """Print the card of a version, checked, even of one that is withdrawn or that nobody trusted signed."""
    require_extra("serve", "'sordino prompts'")
    found, trusted = _inspect(label, registry, trust)
    signer = found.sealed.public_key in trusted
    if as_json:
        print(json.dumps(_about(found, signer)))
        return
    if found.withdrawn is not None:
        say(f"WITHDRAWN since {found.withdrawn.at}: {found.withdrawn.reason}")
    if not signer:
        print("SIGNED BY A KEY THAT IS NOT TRUSTED HERE: anybody can have written this")
    if found.manifest.mark:  # the card is the publisher's text
        print(f"MARKED {found.manifest.mark}")
    say(found.card.removesuffix("\n"))


@app.command("verify")
def verify(
    what: Annotated[
        str | None,
        typer.Argument(metavar="[NAME[:VERSION]|DIR/]", help="a version, or an exported folder; default: all"),
    ] = None,
    registry: RegistryUrl = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Check every byte of a version, of a folder, or of all versions; exit code 1 if one of many is damaged."""
    require_extra("serve", "'sordino prompts'")
    from sordino.serving.folder import read_folder
    from sordino.serving.registry import Registry

    trusted = _trusted(trust)
    if what is not None:
        if _is_folder(what, registry):
            found = read_folder(Path(what), trusted)
        else:
            found, _ = _inspect(what, registry, trust, must_be_trusted=True)
        say(json.dumps(_about(found, True)) if as_json else _verified(found))
        return
    answers: list[dict[str, Any]] = []
    with Registry(registry) as prompts:
        for each in prompts.listed(trusted):
            fault = f"{each.name}:{each.version} in {prompts.label}: {each.fault}" if each.fault else None
            try:
                if fault is None:  # else its row may not even have the name that it is found by
                    prompts.inspect(each.name, each.version, trusted)
            except PromptError as error:
                fault = str(error)
            answers.append({"name": each.name, "version": each.version, "fault": fault})
    if as_json:
        print(json.dumps({"registry": prompts.label, "prompts": answers}))
    else:
        for answer in answers:
            say(answer["fault"] or f"{answer['name']}:{answer['version']}: every byte is as it was signed")
    if any(answer["fault"] for answer in answers):
        raise typer.Exit(1)


@app.command("export")
def export(
    label: Label,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a folder that does not exist")],
    sign_openssf: Annotated[
        bool, typer.Option("--sign-openssf", help="sign the folder for OpenSSF's model_signing too, in DIR.sig")
    ] = False,
    openssf_key: Annotated[
        Path | None,
        typer.Option("--openssf-key", metavar="PEM", help="on curve P-256, P-384 or P-521; default: the user's own"),
    ] = None,
    registry: RegistryUrl = None,
    trust: Trust = None,
) -> None:
    """Write a version as a folder in the layout of Hugging Face: card, prompt, manifest and signature."""
    require_extra("serve", "'sordino prompts'")
    from sordino.serving.folder import export as write_folder
    from sordino.serving.manifest import parse_label
    from sordino.serving.registry import Registry

    if openssf_key is not None and not sign_openssf:
        raise ConfigError("--openssf-key", str(openssf_key), "give --sign-openssf too, or leave it out")
    at_work("nothing was written; repeat the command")
    name, version = parse_label(label)
    if sign_openssf:
        require_extra("openssf", "'--sign-openssf'")
        from sordino.serving import openssf

        openssf.check_free(out)
        signing_key = openssf.openssf_key(openssf_key)
    with Registry(registry) as prompts:
        found = prompts.load(name, version, _trusted(trust))
    write_folder(found, out)
    print(f"Exported {_marked(found.manifest)}: {out}")
    if sign_openssf:
        print(f"Signed for model_signing: {openssf.sign_folder(out, signing_key)}")
        public = signing_key.with_name(f"{signing_key.stem}.pub.pem")
        if public.exists():
            print(f"It is verified with {public}")


@app.command("withdraw")
def withdraw(
    label: Annotated[str, typer.Argument(metavar="NAME:VERSION", help="a version")],
    reason: Annotated[str, typer.Option("--reason", help="why, in one line, which stays with the version")],
    registry: RegistryUrl = None,
) -> None:
    """Withdraw a version for good: it stays in the registry with the reason, and is given to nobody."""
    require_extra("serve", "'sordino prompts'")
    from sordino.serving.manifest import parse_label
    from sordino.serving.registry import Registry

    name, version = parse_label(label, "NAME:VERSION")
    if version is None:
        raise ConfigError("NAME:VERSION", label, f"say which version, as {name}:1")
    with Registry(registry) as prompts:
        made = prompts.withdraw(name, version, reason)
    say(f"Withdrawn {name}:{version} at {made.at}: {made.reason}")


def _is_folder(what: str, registry: str | None) -> bool:
    """Tell an exported folder from the name of a version, by how it is written and not by what lies here.

    A folder can be of a version that its registry has withdrawn since, so it is never taken for the version.

    Raises:
        ConfigError: it may be either, or a folder is given with a registry.
    """
    if what.startswith(".") or any(sign in what for sign in {"/", os.sep}):
        if registry is not None:
            raise ConfigError("DIR", what, "a folder is of no registry; leave --registry out, or give NAME:VERSION")
        return True
    if registry is None and Path(what).is_dir():
        folder = f"{what}/ for the folder of this name that is here"
        remedy = f"write {folder}, or give --registry for the published version"
        raise ConfigError("NAME", what, f"may be either; {remedy}")
    return False


def _trusted(places: list[Path] | None) -> Trusted:
    from sordino.serving.trust import Trusted

    return Trusted.of(places or [])


def _inspect(
    label: str, registry: str | None, trust: list[Path] | None, must_be_trusted: bool = False
) -> tuple[Published, Trusted]:
    from sordino.serving.manifest import parse_label
    from sordino.serving.registry import Registry

    name, version = parse_label(label)
    trusted = _trusted(trust)
    with Registry(registry) as prompts:
        return prompts.inspect(name, version, trusted if must_be_trusted else None), trusted


def _row(listed: Listed) -> dict[str, str]:
    row = {"name": f"{listed.name}:{listed.version}"}
    manifest = listed.manifest
    if manifest is None:
        unknown = dict.fromkeys(("method", "encoder", "classes", "privacy", "attacks"), "")
        return row | unknown | {"state": "DAMAGED", "signer": ""}
    return row | {
        "method": manifest.method,
        "encoder": manifest.encoder.name,
        "classes": str(len(manifest.class_names)),
        "privacy": manifest.promise,
        "attacks": ATTACKS[manifest.attacks],
        "state": f"withdrawn: {listed.withdrawn.reason}" if listed.withdrawn else "",
        "signer": "trusted" if listed.trusted else "NOT TRUSTED",
    }


def _about(found: Published, trusted: bool) -> dict[str, Any]:
    withdrawn = None if found.withdrawn is None else {"at": found.withdrawn.at, "reason": found.withdrawn.reason}
    told = {"mark": found.manifest.mark, "trusted": trusted, "withdrawn": withdrawn}
    return {"manifest": found.manifest.model_dump(mode="json")} | told


def _verified(found: Published) -> str:
    state = "" if found.withdrawn is None else f"\nWithdrawn since {found.withdrawn.at}: {found.withdrawn.reason}"
    return (
        f"{_marked(found.manifest)}: every byte is as it was signed, at {found.manifest.created}\n"
        f"By the trusted key {found.manifest.publisher}{state}"
    )


def _marked(manifest: Manifest) -> str:
    return f"{manifest.label} ({manifest.mark})" if manifest.mark else manifest.label
