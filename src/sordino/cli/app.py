"""The command line: parses, calls, prints. Heavy imports happen in the commands that need them."""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sordino.cli.console import at_work, fail, run_command, say
from sordino.cli.flare import app as flare
from sordino.cli.flower import app as flower
from sordino.cli.machine import doctor, encoders
from sordino.cli.methods import add_file, with_method
from sordino.cli.methods import app as methods
from sordino.cli.mpc import app as mpc
from sordino.cli.options import (
    AsJson,
    ConfigFile,
    Jobs,
    MethodFile,
    OutFolder,
    Overrides,
    Resume,
    chosen_experiment,
    chosen_folder,
)
from sordino.cli.privacy import app as privacy
from sordino.cli.private import tune_private
from sordino.cli.published import app as prompts
from sordino.cli.published import publish
from sordino.cli.serve import keys, serve
from sordino.cli.site import app as site
from sordino.cli.terminal import live_progress, print_table
from sordino.errors import ConfigError, SordinoError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sordino.encoders.encode import Skipped
    from sordino.experiments.variants import Variant

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(privacy, name="privacy")
app.add_typer(mpc, name="mpc")
app.add_typer(flare, name="flare")
app.add_typer(flower, name="flower")
app.add_typer(methods, name="methods")
app.add_typer(site, name="site")
app.add_typer(prompts, name="prompts")
app.command("tune-private")(tune_private)
app.command()(publish)
app.command()(serve)
app.add_typer(keys, name="keys")

# The base of all errors of usage; typer has a public name for some of its heirs only.
ClickException: Any = next(ancestor for ancestor in typer.BadParameter.__mro__ if ancestor.__name__ == "ClickException")


def _print_version(asked: bool) -> None:
    if asked:
        from sordino import __version__

        print(f"sordino {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version, and end")
    ] = False,
) -> None:
    """Federated prompt learning for frozen vision-language models, private and honest about it."""


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="the same in small, in under a minute")] = False,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="runs at once; default: one a core, at most 4")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Ten simulated clients learn prompts for handwritten digits, without and with privacy; no download."""
    from sordino.cli.demo import variants

    lines = variants(quick, overrides or [])
    from sordino.experiments.started import COMPARISON

    folder = chosen_folder(out, resume, "demo", COMPARISON)
    if jobs is None:
        import torch

        jobs = min(4, torch.get_num_threads())  # each has activations of its own in memory
    _compare(lines, 1, folder, resume, as_json, "demo", jobs)


@app.command()
def run(
    config: ConfigFile,
    method: MethodFile = None,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run one method as a configuration says, and write a run directory."""
    experiment = chosen_experiment(config, with_method(overrides, method), resume)
    from sordino.experiments.started import RUN

    folder = chosen_folder(out, resume, f"{config.stem}-{experiment.algorithm}", RUN)
    from sordino.experiments.run import run as run_experiment

    report = folder / "report.html"
    before = _identity(report)
    with live_progress() as progress:
        summary = run_experiment(experiment, folder, resume, progress)
    if as_json:
        print(json.dumps(summary.as_dict()))
        return
    from sordino.experiments.compare import row_of

    print_table([row_of([summary])])
    for prompt in summary.words:
        print(f"Prompt: {prompt} CLASS")
    print(summary.privacy.statement)
    print(f"Run directory: {folder}")
    if _identity(report) != before:  # a run that was finished keeps its own
        print(f"Report: {report}")


@app.command()
def compare(
    config: ConfigFile,
    algorithms: Annotated[str, typer.Option(help="names, separated by commas; see `sordino methods`")],
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds, from the configuration's on")] = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="every value of a key, e.g. privacy.epsilon=inf,8,2; repeated: more keys, or values",
        ),
    ] = None,
    method: Annotated[
        list[Path] | None, typer.Option(metavar="FILE.py", help="one more method, in a file; may be repeated")
    ] = None,
    equal_steps: Annotated[bool, typer.Option("--equal-steps", help="as many gradient steps as the first one")] = False,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    jobs: Jobs = 1,
    as_json: AsJson = False,
) -> None:
    """Run several methods with several seeds, and settings, over shared features; a table, a CSV and a report."""
    from sordino.experiments.started import COMPARISON
    from sordino.experiments.toml_tables import separated
    from sordino.experiments.variants import at_equal_steps, grid

    values: dict[str, list[Any]] = {}
    firsts = []  # a configuration may need a key that is varied, as `privacy.epsilon`
    for variation in vary or []:
        key, equals, texts = variation.partition("=")
        if not (equals and key and texts):
            raise ConfigError("--vary", variation, "write key=value,value,..., e.g. privacy.epsilon=inf,8,2")
        if key.strip() not in values:
            firsts.append(f"{key.strip()}={separated(texts)[0][0]}")
        values.setdefault(key.strip(), []).extend(value for _, value in separated(texts))
    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    names += [name for file in method or [] if (name := add_file(file)) not in names]
    variants = grid(chosen_experiment(config, [*(overrides or []), *firsts], resume), names, values)
    label = f"compare-{config.stem}"
    folder = chosen_folder(out, resume, label, COMPARISON)
    if equal_steps:
        variants = at_equal_steps(variants)
    _compare(variants, seeds, folder, resume, as_json, label, jobs)


@app.command()
def predict(
    prompt: Annotated[Path, typer.Argument(metavar="PROMPT", help="a file from prompts/ of a run directory")],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="pictures, or folders of them")],
    top: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="how many classes to print for each picture; default: 5")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="folder or hub name where the prompt's encoder is now")
    ] = None,
    generate: Annotated[
        bool, typer.Option("--generate", help="answer in free text; for prompts of encoder 'generative'")
    ] = False,
    question: Annotated[str | None, typer.Option(help="of --generate; by default that of the training")] = None,
    most_tokens: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="of an answer of --generate; default: 64")
    ] = None,
    method: MethodFile = None,
    as_json: AsJson = False,
) -> None:
    """Classify pictures with a saved prompt: its classes for each, most probable first. Or ask about them."""
    at_work("nothing was written; repeat the command")
    if question is not None and not generate:
        raise ConfigError("--question", question, "goes with --generate, which asks it; classes answer the training's")
    if most_tokens is not None and not generate:
        raise ConfigError("--most-tokens", most_tokens, "goes with --generate, whose answers it bounds; leave it out")
    if top is not None and generate:
        raise ConfigError("--top", top, "is for classes, and --generate answers in free text; leave one of them out")
    if method is not None:
        add_file(method)
    if generate:
        from sordino.experiments.use.free_answers import answer_freely

        with live_progress() as progress:
            said = answer_freely(prompt, images, encoder, question, most_tokens or 64, progress)
        _print_skipped(said.skipped)
        say(json.dumps(said.as_dict()) if as_json else said.as_text())
        return
    from sordino.experiments.use.predict import predict as predict_classes

    with live_progress() as progress:
        result = predict_classes(prompt, images, encoder, progress)
    _print_skipped(result.skipped)
    say(json.dumps(result.as_dict(top or 5)) if as_json else result.as_text(top or 5))


@app.command()
def transfer(
    prompts: Annotated[
        list[Path], typer.Argument(metavar="PROMPT...", help="files of prompts, or run directories, of one method")
    ],
    to: Annotated[str, typer.Option(metavar="SOURCE", help="the other data set, as data.source")],
    per_class: Annotated[int | None, typer.Option(min=1, metavar="N", help="most pictures of a class")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="of the choice of --per-class; default: 0")] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="folder or hub name where the prompts' encoder is now")
    ] = None,
    method: MethodFile = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate saved prompts on another data set than they were learned on, with its class names."""
    at_work("nothing was written; repeat the command")
    if seed is not None and per_class is None:
        raise ConfigError("--seed", seed, "goes with --per-class, whose pictures it draws; leave it out")
    if method is not None:
        add_file(method)
    from sordino.experiments.use.transfer import transfer as transferred

    with live_progress() as progress:
        result = transferred(prompts, to, per_class, seed or 0, encoder, progress)
    say(json.dumps(result.as_dict()) if as_json else result.as_text())


def _print_skipped(skipped: Sequence[Skipped]) -> None:
    for picture in skipped:
        say(f"skipped {picture.name}: {picture.reason}", sys.stderr)


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or one of `compare`")]) -> None:
    """Write the report of a run directory anew."""
    from sordino.experiments.run_lock import held
    from sordino.report import finished_runs, write_report

    runs = finished_runs(folder)
    if not runs:
        raise ConfigError("RUN", str(folder), "holds no finished run (no summary.json in it or below it)")
    at_work("repeat the command")
    with held(folder, instead=False):
        print(write_report(runs, folder / "report.html", f"Sordino: {folder.name}"))


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    attacks: Annotated[
        str,
        typer.Option(
            help="of membership, release, rounds, canaries, inversion, stealing, distances, extraction, label-only"
        ),
    ] = "membership,release,rounds,canaries,inversion,stealing,distances,extraction,label-only",
    shadows: Annotated[
        int | None,
        typer.Option(min=4, help="of membership: shadow federations; each costs as much as the run; default: 64"),
    ] = None,
    canaries: Annotated[
        int | None,
        typer.Option(min=8, help="of canaries: planted examples; each costs a gradient every round; default: 128"),
    ] = None,
    queries: Annotated[
        int | None,
        typer.Option(min=10, help="of extraction: most questions of a copy made of answers; default: 10000"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the attacker's randomness")] = 1,
    method: MethodFile = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="of membership: shadow federations at once, which share the cores"),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="CHECKPOINT", help="folder or hub name where the run's encoder is now")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run, and set what it claims beside what the attacks found."""
    from sordino.experiments.run_folder import require_run

    require_run(folder)
    from sordino.audit.findings.words import as_text
    from sordino.audit.run import audit as attack

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    if method is not None:
        add_file(method)
    at_work("nothing was changed, as an audit is written at its end; repeat the command")
    with live_progress() as progress:
        result = attack(folder, names, shadows, canaries, seed, progress, None, queries, jobs, encoder)
    print(json.dumps(result) if as_json else as_text(result))
    if not as_json:
        print(f"Report: {folder / 'report.html'}")


app.command()(encoders)
app.command()(doctor)


def _compare(
    variants: list[Variant],
    seeds: int,
    folder: Path,
    resume: bool,
    as_json: bool,
    label: str,
    jobs: int,
) -> None:
    from sordino.audit.run import membership_auc
    from sordino.experiments.compare import compare as compare_variants

    attack = functools.partial(membership_auc, jobs=jobs)
    with live_progress() as progress:
        rows = compare_variants(variants, seeds, folder, resume, progress, f"Sordino: {label}", attack, jobs)
    if as_json:
        print((folder / "comparison.json").read_text(encoding="utf-8").replace("\n", ""))
        return
    print_table(rows)
    print(f"Run directory: {folder}\nReport: {folder / 'report.html'}")


def _identity(file: Path) -> tuple[int, int] | None:
    """Return what a file that was written anew has anew, as a file is written beside its place and put there."""
    status = file.stat() if file.exists() else None
    return status and (status.st_ino, status.st_mtime_ns)


def invoke(arguments: list[str] | None = None) -> int:
    """Run one command; its exit code. Errors that the user can mend are one line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors are ours to tell
    command = typer.main.get_command(app)
    try:
        # Not the command's own `main`, which would end an interruption without a word.
        with command.make_context("sordino", sys.argv[1:] if arguments is None else arguments) as context:
            command.invoke(context)
    except typer.Exit as end:
        return int(end.exit_code)
    except ClickException as error:
        error.show()
        return int(error.exit_code)
    except SordinoError as error:
        return fail(error)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error))):
            raise
        reason = str(error).strip().splitlines()[:1] or ["no more is to be had"]
        return fail(f"out of memory ({reason[0]}); choose smaller batches, fewer clients, or shorter prompts")
    return 0


# As torch says it, which has no class of its own for the CPU.
_OUT_OF_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|overflow.*(size|numel)|numel.*overflow"
)


def main() -> None:
    """The entry point."""
    sys.exit(run_command(invoke))
