"""Commands on what is installed here: `sordino encoders` and `sordino doctor`."""

from __future__ import annotations

import json

import typer

from sordino.cli.options import AsJson
from sordino.cli.terminal import print_items


def encoders(as_json: AsJson = False) -> None:
    """List the encoders: sizes, capabilities, and whether they are ready."""
    from sordino.experiments.doctor import describe_encoders

    infos = describe_encoders()
    if as_json:
        print(json.dumps({"encoders": [vars(info) for info in infos]}))
        return
    by_checkpoint = "as the checkpoint says"
    print_items(
        [
            {
                "name": info.name,
                "towers": info.towers,
                "size": by_checkpoint if info.megabytes is None else f"{info.megabytes:.0f} MB of weights",
                "features": by_checkpoint if info.feature_width is None else _width(info.feature_width),
                "context": by_checkpoint if info.context_width is None else f"{info.context_width} wide",
                "can do": ", ".join(["text prompts", *info.capabilities]),
                "ready": "yes" if info.ready else f"no: {info.missing}",
            }
            for info in infos
        ]
    )


def _width(numbers: int) -> str:
    return f"{numbers} wide" if numbers else "none"


def doctor(as_json: AsJson = False) -> None:
    """Check what this machine has, and say what is missing and how to mend it; exit code 1 if anything is."""
    from sordino.experiments.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps({"checks": [vars(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{'ok     ' if check.ok else 'missing'}  {check.name}: {check.finding}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)
