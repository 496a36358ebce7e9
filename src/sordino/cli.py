"""The command line: parses, calls, prints. Heavy imports happen in the commands that need them."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sordino.errors import ConfigError, SordinoError

if TYPE_CHECKING:
    from sordino.compare import Row, Variant
    from sordino.progress import Progress

app = typer.Typer(
    help="Federated prompt learning for frozen vision-language models, private and honest about it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.toml", help="the experiment")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="override a key, e.g. settings.dp-fpl.rank=4")
]
OutFolder = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="where to write; default: a new runs/...")]
Resume = Annotated[bool, typer.Option("--resume", help="go on where DIR was interrupted")]
AsJson = Annotated[
    bool, typer.Option("--json", help="print one JSON object on standard output, and nothing else there")
]

privacy = typer.Typer(help="What a run costs in privacy: before it, and after it.", no_args_is_help=True)
app.add_typer(privacy, name="privacy")

DEMO_ALGORITHMS = ("zero-shot", "local", "promptfl", "dp-fpl")
DEMO_SHADOWS = 4  # few, so that the demo is short; `sordino audit` takes 64

errors = Console(stderr=True)


@app.command()
def demo(out: OutFolder = None, resume: Resume = False, as_json: AsJson = False) -> None:
    """Ten simulated clients learn prompts for handwritten digits, without and with privacy; no download."""
    from sordino.compare import grid
    from sordino.config import load_config

    here = Path(__file__).parent
    variants = grid(load_config(here / "demo.toml"), DEMO_ALGORITHMS)
    variants += grid(load_config(here / "demo_private.toml"), ["dp-fpl"], {"privacy.epsilon": [8.0, 2.0]})
    variants = [replace(each, shadows=DEMO_SHADOWS) if each.config.algorithm == "dp-fpl" else each for each in variants]
    _compare(variants, 1, out, resume, as_json, "demo")


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run one method as a configuration says, and write a run directory."""
    from sordino.config import load_config

    experiment = load_config(config, overrides or [])
    from sordino.experiment import run as run_experiment

    folder = _folder(out, resume, f"{config.stem}-{experiment.algorithm}")
    with _progress() as progress:
        summary = run_experiment(experiment, folder, resume, progress)
    if as_json:
        print(json.dumps(summary))
        return
    from sordino.compare import row_of

    _print_table([row_of([summary])])
    print(summary["privacy"]["statement"])
    print(f"Run directory: {folder}\nReport: {folder / 'report.html'}")


@app.command()
def compare(
    config: ConfigFile,
    algorithms: Annotated[str, typer.Option(help="names, separated by commas; see `sordino methods`")],
    seeds: Annotated[int, typer.Option(min=1, help="how many seeds, from the configuration's on")] = 3,
    vary: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=V1,V2", help="every value of a key, e.g. privacy.epsilon=inf,8,2; may be repeated"),
    ] = None,
    overrides: Overrides = None,
    out: OutFolder = None,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Run several methods with several seeds, and settings, over shared features; a table, a CSV and a report."""
    from sordino.compare import grid
    from sordino.config import load_config, toml_value

    values: dict[str, list[Any]] = {}
    for each in vary or []:
        key, equals, texts = each.partition("=")
        if not (equals and key and texts):
            raise ConfigError("--vary", each, "write key=value,value,..., e.g. privacy.epsilon=inf,8,2")
        values[key.strip()] = [toml_value(text.strip()) for text in texts.split(",")]
    names = [name.strip() for name in algorithms.split(",") if name.strip()]
    variants = grid(load_config(config, overrides or []), names, values)
    _compare(variants, seeds, out, resume, as_json, f"compare-{config.stem}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="RUN", help="a run directory, or one of `compare`")]) -> None:
    """Write the report of a run directory anew."""
    from sordino.report import write_report

    runs = sorted(path.parent for path in folder.rglob("summary.json"))
    if not runs:
        raise ConfigError("RUN", str(folder), "holds no finished run (no summary.json in it or below it)")
    print(write_report(runs, folder / "report.html", f"Sordino: {folder.name}"))


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="a finished run directory")],
    attacks: Annotated[
        str, typer.Option(help="of membership, canaries, inversion, stealing")
    ] = "membership,canaries,inversion,stealing",
    shadows: Annotated[int, typer.Option(min=4, help="shadow federations; each costs as much as the run")] = 64,
    canaries: Annotated[int, typer.Option(min=8, help="planted examples; each costs a gradient every round")] = 128,
    seed: Annotated[int, typer.Option(help="of the attacker's randomness")] = 1,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run, and set what it claims beside what the attacks found."""
    from sordino.audit.run import as_text
    from sordino.audit.run import audit as attack

    names = [name.strip() for name in attacks.split(",") if name.strip()]
    with _progress() as progress:
        found = attack(folder, names, shadows, canaries, seed, progress)
    print(json.dumps(found) if as_json else as_text(found))
    if not as_json:
        print(f"Report: {folder / 'report.html'}")


@privacy.command("plan")
def privacy_plan(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE.html", help="also a page with a plot")] = None,
    as_json: AsJson = False,
) -> None:
    """Say who will learn what, who adds the noise, and epsilon by round; nothing is trained."""
    from sordino.config import load_config

    experiment = load_config(config, overrides or [])
    from sordino.plan import as_text, plan, write_page

    chosen = plan(experiment)
    if out is not None:
        write_page(chosen, out)
    print(json.dumps(chosen.as_dict()) if as_json else as_text(chosen))
    if out is not None and not as_json:
        print(f"Page: {out}")


@privacy.command("ledger")
def privacy_ledger(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run directories; several are composed")],
    delta: Annotated[float | None, typer.Option(help="at which to state epsilon; default: the run's")] = None,
    as_json: AsJson = False,
) -> None:
    """Read what was released, and what that comes to; of several runs on the same data, together."""
    from sordino.privacy.statement import as_text, read_ledgers, spending

    ledger = read_ledgers(folders, delta)
    print(json.dumps(spending(ledger)) if as_json else as_text(ledger))


@app.command()
def methods(as_json: AsJson = False) -> None:
    """List the methods: paper, what is personal, what is shared, and what they promise."""
    from sordino.algorithms import METHODS, algorithm

    columns = ("paper", "personal", "shared", "privacy", "needs")
    rows = [{"name": name} | {column: getattr(algorithm(name).ABOUT, column) for column in columns} for name in METHODS]
    if as_json:
        print(json.dumps({"methods": rows}))
        return
    _print_items(rows)


@app.command()
def encoders(as_json: AsJson = False) -> None:
    """List the encoders: sizes, capabilities, and whether they are ready."""
    from sordino.doctor import describe_encoders

    infos = describe_encoders()
    if as_json:
        print(json.dumps({"encoders": [vars(info) for info in infos]}))
        return
    by_checkpoint = "as the checkpoint says"
    _print_items(
        [
            {
                "name": info.name,
                "towers": info.towers,
                "size": by_checkpoint if info.megabytes is None else f"{info.megabytes:.0f} MB of weights",
                "features": by_checkpoint if info.feature_width is None else f"{info.feature_width} wide",
                "context": by_checkpoint if info.context_width is None else f"{info.context_width} wide",
                "can do": ", ".join(["text prompts", *info.capabilities]),
                "ready": "yes" if info.ready else f"no: {info.missing}",
            }
            for info in infos
        ]
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what this machine has, and say what is missing and how to mend it; exit code 1 if anything is."""
    from sordino.doctor import examine

    checks = examine()
    if as_json:
        print(json.dumps({"checks": [vars(check) for check in checks]}))
    else:
        for check in checks:
            print(f"{'ok     ' if check.ok else 'missing'}  {check.name}: {check.finding}")
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _compare(
    variants: list[Variant],
    seeds: int,
    out: Path | None,
    resume: bool,
    as_json: bool,
    label: str,
) -> None:
    from sordino.compare import compare as compare_variants

    folder = _folder(out, resume, label)
    with _progress() as progress:
        rows = compare_variants(variants, seeds, folder, resume, progress, f"Sordino: {label}")
    if as_json:
        print((folder / "comparison.json").read_text(encoding="utf-8").replace("\n", ""))
        return
    _print_table(rows)
    print(f"Run directory: {folder}\nReport: {folder / 'report.html'}")


def _folder(out: Path | None, resume: bool, label: str) -> Path:
    """The run directory: the one asked for, or a new one under runs/."""
    if out is not None:
        return out
    if resume:
        raise ConfigError("--resume", True, "say which run with --out DIR")
    return Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{label}"


@contextmanager
def _progress() -> Iterator[Progress]:
    """Live bars on a terminal, a line per tenth where standard error is a file; the log goes to the same place."""
    from rich.logging import RichHandler
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    handler = RichHandler(console=errors, show_path=False, show_level=False, show_time=False)
    logger = logging.getLogger("sordino")
    logger.handlers, logger.level, logger.propagate = [handler], logging.INFO, False
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Bars(*columns, console=errors, disable=not errors.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def draw(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, note=note)
            bars.update(tasks[stage], completed=done, total=total, note=note)
            if bars.disable and (done == total or done % max(1, total // 10) == 0):
                logger.info("%s: %d of %d %s", stage, done, total, note)

        yield draw


def _print_table(rows: list[Row]) -> None:
    from sordino.compare import SPLITS

    splits = [split for split in SPLITS if any(row.accuracy[split] for row in rows)]
    over = "seeds" if rows[0].seeds > 1 else "clients"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))  # three splits fit 80 columns
    table.add_column("algorithm", no_wrap=True)
    attacked = any(row.attack is not None for row in rows)
    for heading in (*splits, *([] if attacked else ["sent up", "down"]), "seconds"):
        table.add_column(heading, justify="right")
    table.add_column("private", no_wrap=True)
    if attacked:
        table.add_column("attack", justify="right")
    for row in rows:
        accuracies = [_percent(row.accuracy[split]) for split in splits]
        # Where there are attacks to show, 80 columns have no room for bytes; the report has them.
        sizes = [] if attacked else [_bytes(row.upload_bytes), _bytes(row.broadcast_bytes)]
        found = ["-" if row.attack is None else f"{row.attack:.2f}"] if attacked else []
        table.add_row(_label(row), *accuracies, *sizes, f"{row.seconds:.0f}", _privacy(row), *found)
    console = Console()
    console.print(table)
    sent = "" if attacked else " Sent up and down: by one client in one round."
    attack = " Attack: area under the ROC curve of membership inference on the prompts; 0.5 is guessing."
    console.print(
        f"Accuracy in percent, mean ± standard deviation over {over}: local on what a client trains on, neighbor on "
        f"what others train on, overall on both.{sent} Private: epsilon, or yes where nothing learned from images left "
        f"a client, no where it left without noise.{attack if attacked else ''}",
        highlight=False,
    )


def _print_items(items: Sequence[Mapping[str, str]]) -> None:
    """Each item under its name, a line a property."""
    console = Console(highlight=False)
    for item in items:
        console.print(item["name"], style="bold", markup=False)
        lines = Table.grid(padding=(0, 2), pad_edge=True)
        for key, value in item.items():
            if key != "name":
                lines.add_row(f"  {key}", value)
        console.print(lines)


def _label(row: Row) -> str:
    """The algorithm, and what varies by the last part of its name."""
    varied = re.sub(r"[\w.-]*\.([\w-]+=)", r"\1", row.variation)
    return f"{row.algorithm} {varied}".strip()


def _privacy(row: Row) -> str:
    if not row.private:
        return "no"
    return f"ε = {row.epsilon:.3g}" if row.epsilon else "yes"


def _percent(value: tuple[float, float] | None) -> str:
    return "-" if value is None else f"{100 * value[0]:.1f} ± {100 * value[1]:.1f}"


def _bytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB" if count >= 1e3 else f"{count} B"


def main() -> None:
    """The entry point: errors that the user can mend are one line and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except SordinoError as error:
        print(f"sordino: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sordino: interrupted; go on with --resume --out DIR", file=sys.stderr)
        sys.exit(130)
