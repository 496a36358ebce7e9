"""The page against real runs and variations of them: its numbers are recomputed, its markup is parsed."""

import json
import math
import re
import statistics
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from report.conftest import WriteRun
from sordino.errors import RunError
from sordino.report import write_report
from sordino.report.figures import PALETTE, symbol
from sordino.report.groups import client_names, group_runs
from sordino.report.runs import read_run
from sordino.results import ClientResult, Summary, human_bytes

MEASURES = ("local", "neighbor", "overall", "novel", "domain")
HOSTILE = """</script><script>alert(1)</script>"><img src="http://evil.example/x" onerror=alert(2)>&amp;"""


class Page(HTMLParser):
    """What a page holds: its tables as rows of text, its figures' data, its attributes, and its text by heading."""

    VOID = frozenset({"meta", "link", "input", "img", "br", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.figures: dict[str, dict[str, Any]] = {}
        self.tables: dict[str, list[list[str]]] = {}  # by the accessible name of the table's region
        self.captions: dict[str, str] = {}
        self.text: dict[str, str] = {}  # visible text, by the <h1> or <h2> above it
        self._open: list[str] = []
        self._region = self._heading = self._script = ""
        self.feed(html)
        self.close()
        assert self._open == [], f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in self.VOID:
            self._open.append(tag)
        if attributes.get("role") == "region":
            self._region = attributes["aria-label"] or ""
        if tag == "table":
            self.tables[self._region] = []
            self.captions[self._region] = ""
        elif tag == "tr":
            self.tables[self._region].append([])
        elif tag in ("td", "th"):
            self.tables[self._region][-1].append("")
        elif tag in ("h1", "h2"):
            self._heading = ""
        elif tag == "script":
            self._script = attributes.get("data-figure") or ""

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        inside = self._open[-1] if self._open else ""
        if inside == "script":
            if self._script:
                assert self._script not in self.figures
                assert "<" not in data, "which could end the script early"
                self.figures[self._script] = json.loads(data)
            return
        if inside == "style":
            return
        if inside in ("h1", "h2"):
            self._heading += data
        self.text[self._heading] = self.text.get(self._heading, "") + data
        if "caption" in self._open:
            self.captions[self._region] += data
        elif "td" in self._open or "th" in self._open:
            self.tables[self._region][-1][-1] += data

    def column(self, name: str, table: str = "Results by algorithm") -> dict[str, str]:
        """Row name to cell, for one column of a table."""
        head, *rows = self.tables[table]
        return {row[0]: row[head.index(name)] for row in rows}

    def lines(self, figure: str, role: str = "mean") -> dict[str, dict[str, Any]]:
        return {trace["name"]: trace for trace in self.figures[figure]["data"] if trace["meta"]["role"] == role}


def page_of(tmp_path: Path, *directories: Path, title: str = "A title") -> Page:
    out = write_report(directories, tmp_path / "report.html", title)
    return Page(out.read_text(encoding="utf-8"))


def metrics(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def percent(values: list[float], mean: float | None = None) -> str:
    middle = statistics.fmean(values) if mean is None else mean
    return f"{100 * middle:.1f} ± {100 * statistics.stdev(values):.1f}"


@pytest.fixture
def demo(tmp_path: Path, write_run: WriteRun) -> dict[str, Path]:
    """Four algorithms, one seed."""
    names = ("zero-shot", "local", "promptfl", "dp-fpl")
    for name in names:
        write_run(tmp_path / name, name, rounds=0 if name == "zero-shot" else 20, noised=name == "dp-fpl")
    return {name: tmp_path / name for name in names}


@pytest.fixture
def comparison(tmp_path: Path, write_run: WriteRun) -> dict[str, list[Path]]:
    """Three algorithms x three seeds."""
    directories: dict[str, list[Path]] = {}
    for name in ("local", "promptfl", "dp-fpl"):
        directories[name] = [tmp_path / f"{name}-{seed}" for seed in (3, 1, 2)]
        for directory, seed in zip(directories[name], (3, 1, 2), strict=True):
            write_run(directory, name, seed, seconds={"train": 10.0 + seed, "total": 99.0})
    return directories


def summary(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((directory / "summary.json").read_text())
    return loaded


def test_one_run_spreads_over_its_clients(tmp_path: Path, write_run: WriteRun) -> None:
    # An accuracy that is not the plain mean over clients (they may be weighted) must be shown as the run gave it.
    accuracy = {"local": 0.9, "neighbor": 0.25, "overall": 0.5, "novel": 0.125, "domain": None}
    run = write_run(tmp_path / "run", "dp-fpl", accuracy=accuracy)
    page = page_of(tmp_path, tmp_path / "run")
    for measure, name in (("local", "Local, %"), ("neighbor", "Neighbor, %"), ("overall", "Overall, %")):
        spread = [client[measure] for client in run["per_client"]]
        assert page.column(name) == {"dp-fpl": percent(spread, accuracy[measure])}
    assert page.column("Novel, %") == {"dp-fpl": "12.5"}, "no value by client, so no spread"
    assert "Domain, %" not in page.tables["Results by algorithm"][0], "a column only where a run has it"
    assert "over clients" in page.captions["Results by algorithm"]
    assert page.column("Seconds") == {"dp-fpl": f"{run['seconds']['train']:,.1f}"}
    assert {"A title", "Results", "Privacy"} <= set(page.text)
    for said in ("dp-fpl on digits", "encoder clip", "10 clients", "20 rounds", "seed 0."):
        assert said in page.text["A title"]


def test_demo_has_a_row_a_line_and_a_column_for_each_algorithm(tmp_path: Path, demo: dict[str, Path]) -> None:
    page = page_of(tmp_path, *demo.values())
    expected = {
        name: percent([client["local"] for client in summary(directory)["per_client"]])
        for name, directory in demo.items()
    }
    assert page.column("Local, %") == expected
    assert list(page.column("Local, %")) == list(demo), "in the order given"
    assert page.column("Rounds")["zero-shot"] == "0"
    for measure in ("local", "neighbor", "overall"):
        lines = page.lines(f"round-{measure}")
        assert list(lines) == list(demo)
        for name in ("local", "promptfl", "dp-fpl"):
            recorded = [(row["round"], row["accuracy"][measure]) for row in metrics(demo[name]) if row["accuracy"]]
            assert [round for round, _ in recorded] == [0, 5, 10, 15, 20]
            assert list(zip(lines[name]["x"], lines[name]["y"], strict=True)) == recorded
        (start,) = metrics(demo["zero-shot"])
        assert lines["zero-shot"]["x"] == [0, 20], "a level line to compare with"
        assert lines["zero-shot"]["y"] == [start["accuracy"][measure]] * 2
        assert page.lines(f"round-{measure}", "band") == {}, "one seed has no spread over seeds"
    assert set(page.figures) == {"round-local", "round-neighbor", "round-overall", "clients", "wire", "personal"}


def test_lines_differ_in_dash_by_measure_and_in_color_and_symbol_by_algorithm(
    tmp_path: Path, demo: dict[str, Path]
) -> None:
    page = page_of(tmp_path, *demo.values())
    dashes = [
        {line["line"]["dash"] for line in page.lines(f"round-{measure}").values()}
        for measure in ("local", "neighbor", "overall")
    ]
    assert dashes == [{"solid"}, {"dash"}, {"dot"}]
    lines = page.lines("round-local").values()
    assert len({line["line"]["color"] for line in lines}) == len({line["marker"]["symbol"] for line in lines}) == 4
    marks = [(PALETTE[index % len(PALETTE)], symbol(index)) for index in range(64)]
    assert len(set(marks)) == 64
    swatches = [attributes for _, attributes in page.tags if attributes.get("class") == "swatch"][-4:]  # of the rounds
    assert [swatch["data-symbol"] for swatch in swatches] == [line["marker"]["symbol"] for line in lines]
    assert all(line["line"]["color"] in str(swatch["style"]) for line, swatch in zip(lines, swatches, strict=True))


def test_seeds_are_aggregated_to_mean_and_sample_deviation(tmp_path: Path, comparison: dict[str, list[Path]]) -> None:
    page = page_of(tmp_path, *(directory for directories in comparison.values() for directory in directories))
    for measure, column in (("local", "Local, %"), ("neighbor", "Neighbor, %"), ("overall", "Overall, %")):
        assert page.column(column) == {
            name: percent([summary(directory)["accuracy"][measure] for directory in directories])
            for name, directories in comparison.items()
        }
    caption = page.captions["Results by algorithm"]
    assert "over seeds" in caption
    assert "clients" not in caption
    assert set(page.column("Seeds").values()) == {"1, 2, 3"}
    assert set(page.column("Seconds").values()) == {"12.0"}, "mean of 11, 12 and 13 of training"
    lines, bands = page.lines("round-neighbor"), page.lines("round-neighbor", "band")
    for name, directories in comparison.items():
        recorded = [[row["accuracy"]["neighbor"] for row in metrics(it) if row["accuracy"]] for it in directories]
        means = [statistics.fmean(values) for values in zip(*recorded, strict=True)]
        spread = [statistics.stdev(values) for values in zip(*recorded, strict=True)]
        assert lines[name]["y"] == pytest.approx(means)
        assert lines[name]["customdata"] == pytest.approx(spread)
        edge = list(zip(means, spread, strict=True))
        assert bands[name]["x"] == [0, 5, 10, 15, 20, 20, 15, 10, 5, 0]
        assert bands[name]["y"] == pytest.approx([m + s for m, s in edge] + [m - s for m, s in reversed(edge)])
    # No band lies over a line, and the axis holds every band.
    roles = [trace["meta"]["role"] for trace in page.figures["round-neighbor"]["data"]]
    assert roles == ["band"] * 3 + ["mean"] * 3
    drawn = [
        y
        for measure in ("local", "neighbor", "overall")
        for trace in page.figures[f"round-{measure}"]["data"]
        for y in trace["y"]
    ]
    low, high = page.figures["round-local"]["layout"]["yaxis"]["range"]
    assert low <= max(0, min(drawn))
    assert high >= min(1, max(drawn))


def test_seeds_evaluated_in_different_rounds(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a", seed=0, every=10)
    write_run(tmp_path / "b", seed=1, every=4)
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    line = page.lines("round-overall")["promptfl"]
    assert line["x"] == [0, 4, 8, 10, 12, 16, 20]
    first, second = ({row["round"]: row["accuracy"] for row in metrics(tmp_path / name)} for name in "ab")
    assert line["y"][3] == pytest.approx(first[10]["overall"]), "only the first seed was evaluated here"
    assert line["customdata"][3] == 0
    assert line["y"][6] == pytest.approx((first[20]["overall"] + second[20]["overall"]) / 2)


def test_heat_map_is_the_mean_over_seeds_by_client(tmp_path: Path, comparison: dict[str, list[Path]]) -> None:
    page = page_of(tmp_path, *(directory for directories in comparison.values() for directory in directories))
    heat, numbers = page.figures["clients"]["data"]
    columns = page.figures["clients"]["layout"]["xaxis"]["ticktext"]
    names = {"local": "local", "neighbor": "neighbor"}
    assert columns == [f"{name}<br>{word}" for name in comparison for word in names.values()]
    expected = [
        [
            statistics.fmean(summary(directory)["per_client"][client][measure] for directory in directories)
            for directories in comparison.values()
            for measure in names
        ]
        for client in range(10)
    ]
    assert heat["y"] == [str(client) for client in range(10)]
    for row, values in zip(heat["z"], expected, strict=True):
        assert row == pytest.approx(values, abs=5e-5)
    assert heat["zmin"] == 0
    assert heat["zmax"] == 1
    assert heat["customdata"][9] == ["classes: digit 9, digit 0"]
    cells = dict(zip(zip(numbers["x"], numbers["y"], strict=True), numbers["text"], strict=True))
    assert len(cells) == 60
    assert all(
        cells[column, str(client)] == f"{heat['z'][client][column]:.0%}" for column in range(6) for client in range(10)
    )
    quartiles = page.column("Lowest", "Accuracy by client in quartiles")
    lowest = min((row[0], client) for client, row in enumerate(expected))
    assert quartiles["local, local"] == f"{100 * lowest[0]:.1f} (client {lowest[1]})"


def test_clients_are_called_by_their_names_where_runs_agree() -> None:
    def entry(client: int, name: str) -> ClientResult:
        return ClientResult(client=client, name=name)

    assert client_names([entry(0, "north"), entry(1, "south"), entry(0, "north")]) == {0: "north", 1: "south"}
    assert client_names([entry(0, "north"), entry(1, "south"), entry(0, "west")]) == {0: "0", 1: "south"}
    assert client_names([entry(0, "north"), entry(1, "north")]) == {0: "0", 1: "1"}
    assert client_names([ClientResult(client=3), entry(1, "<b>")]) == {3: "3", 1: "<b>"}


def test_clients_whose_classes_differ_between_runs_are_not_given_those_of_one(
    tmp_path: Path, write_run: WriteRun
) -> None:
    write_run(tmp_path / "a", "local", 0)
    write_run(tmp_path / "b", "local", 1, names=["cat", "dog"])
    heat = page_of(tmp_path, tmp_path / "a", tmp_path / "b").figures["clients"]["data"][0]
    assert heat["customdata"] == [["what it holds differs between runs"]] * 10


def test_one_row_of_several_seeds_beside_one_of_one_seed(tmp_path: Path, write_run: WriteRun) -> None:
    seeds = [write_run(tmp_path / f"local-{seed}", "local", seed) for seed in range(2)]
    single = write_run(tmp_path / "promptfl", "promptfl")
    page = page_of(tmp_path, tmp_path / "local-0", tmp_path / "promptfl", tmp_path / "local-1")
    assert page.column("Overall, %") == {
        "local": percent([run["accuracy"]["overall"] for run in seeds]),
        "promptfl": percent([client["overall"] for client in single["per_client"]]),
    }
    assert "seeds where a row has several, else over clients" in page.captions["Results by algorithm"]


def test_settings_are_never_averaged(tmp_path: Path, write_run: WriteRun) -> None:
    runs = {
        (rank, seed): write_run(tmp_path / f"{rank}-{seed}", "dp-fpl", seed * 10 + rank, settings={"rank": rank})
        for rank in (4, 8)
        for seed in (0, 1)
    }
    page = page_of(tmp_path, *(tmp_path / f"{rank}-{seed}" for rank, seed in runs))
    assert page.column("Local, %") == {
        f"dp-fpl, rank\N{NO-BREAK SPACE}{rank}": percent([runs[rank, seed]["accuracy"]["local"] for seed in (0, 1)])
        for rank in (4, 8)
    }


@pytest.mark.parametrize(
    ("variants", "labels", "lines"),
    [
        ([{}], ["dp-fpl"], ["dp-fpl"]),
        (
            [{"privacy": {"epsilon": 8.0}}, {"privacy": {"epsilon": float("inf")}}, {"privacy": {"epsilon": 0.25}}],
            ["dp-fpl, ε 8", "dp-fpl, ε ∞", "dp-fpl, ε 0.25"],
            ["dp-fpl"] * 3,
        ),
        (
            [
                {"privacy": {"epsilon": e}, "settings": {"dp-fpl": {"rank": r}}}
                for e, r in ((8.0, 1), (8.0, 2), (1.0, 1))
            ],
            ["dp-fpl, ε 8, rank 1", "dp-fpl, ε 8, rank 2", "dp-fpl, ε 1, rank 1"],
            ["dp-fpl, rank 1", "dp-fpl, rank 2", "dp-fpl, rank 1"],
        ),
        # Settings that change together are told by the first; what is not set is a dash.
        ([{"a": {"b_c": True, "z": 1}}, {"a": {"z": 2}}], ["dp-fpl, b c on", "dp-fpl, b c –"], None),
        # The same last name twice is told by more of it.
        (
            [{"a": {"n": 1}, "b": {"n": 1}}, {"a": {"n": 2}, "b": {"n": 1}}, {"a": {"n": 1}, "b": {"n": "x"}}],
            ["dp-fpl, a n 1, b n 1", "dp-fpl, a n 2, b n 1", "dp-fpl, a n 1, b n x"],
            None,
        ),
    ],
)
def test_labels_name_what_tells_variants_apart(
    variants: list[dict[str, Any]],
    labels: list[str],
    lines: list[str] | None,
    tmp_path: Path,
    write_run: WriteRun,
) -> None:
    runs = []
    for number, config in enumerate(variants):
        write_run(tmp_path / str(number), "dp-fpl")
        runs.append(replace(read_run(tmp_path / str(number)), config=config))
    groups = group_runs(runs)
    assert [group.label.replace("\N{NO-BREAK SPACE}", " ") for group in groups] == labels
    if lines is not None:
        assert [group.line.replace("\N{NO-BREAK SPACE}", " ") for group in groups] == lines


def test_other_data_makes_another_row_and_is_said(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "a", "local", dataset="digits")
    write_run(tmp_path / "b", "local", seed=1, dataset="textile")
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    assert list(page.column("Data set").values()) == ["digits", "textile"]
    assert "differ in their data sets" in page.text["A title"]


def test_the_same_run_twice_is_refused(tmp_path: Path, write_run: WriteRun) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name)
    with pytest.raises(RunError, match=r"b: summary\.json .*seed \(0\).*a; give only one") as caught:
        page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    assert "\n" not in str(caught.value)


def test_bytes_by_direction_in_human_units(tmp_path: Path, write_run: WriteRun) -> None:
    wire = {
        "upload_bytes_per_client_round": 999,
        "broadcast_bytes_per_client_round": 1_250_000,
        "total_upload_bytes": 199_800,
        "total_broadcast_bytes": 250_000_000_000,
    }
    write_run(tmp_path / "run", communication=wire)
    write_run(tmp_path / "zero-shot", "zero-shot", rounds=0)
    page = page_of(tmp_path, tmp_path / "run", tmp_path / "zero-shot")
    assert page.tables["Bytes on the wire by algorithm"][1:] == [
        ["promptfl", "999 B", "1.2 MB", "199.8 kB", "250.0 GB"],
        ["zero-shot", "0 B", "0 B", "0 B", "0 B"],
    ]
    assert page.column("Up") == {"promptfl": "999 B", "zero-shot": "0 B"}
    assert page.column("Down") == {"promptfl": "1.2 MB", "zero-shot": "0 B"}
    up, down = page.figures["wire"]["data"]
    assert (up["name"], up["x"], down["name"], down["x"]) == ("up", [999, 0], "down", [1_250_000, 0])
    layout = page.figures["wire"]["layout"]
    assert layout["yaxis"]["ticktext"] == ["promptfl", "zero-shot"]
    assert layout["xaxis"]["type"] == "log", "bars a thousandfold apart"
    assert "logarithmic" in layout["xaxis"]["title"]["text"]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (5e12, "5.0 TB")],
)
def test_human_bytes(size: float, text: str) -> None:
    assert human_bytes(size) == text


def test_privacy_is_said_in_words_and_never_understated(tmp_path: Path, write_run: WriteRun) -> None:
    def spent(epsilon: float, statement: str) -> dict[str, Any]:
        return {"private": True, "epsilon": epsilon, "delta": 1e-5, "unit": "client", "statement": statement}

    write_run(tmp_path / "a", "dp-fpl", 0, privacy=spent(1.2341, "Spent a little."))
    write_run(tmp_path / "b", "dp-fpl", 1, privacy=spent(2.3411, "Spent <more>."))
    exposed = write_run(tmp_path / "without noise")["privacy"]
    write_run(tmp_path / "c", "mixed", 0, noised=True)
    write_run(tmp_path / "d", "mixed", 1, noised=True, privacy=exposed)
    page = page_of(tmp_path, *(tmp_path / name for name in "abcd"))
    assert page.column("Privacy") == {
        "dp-fpl": "private: ε = 2.35, δ = 1e-5 for each client",  # the larger, 2.3411, rounded up
        "mixed": "not private",  # one open run among several
    }
    said = page.text["Privacy"]
    for part in (
        "dp-fpl: private: ε = 2.35",
        "Spent a little. (seed 0)",
        "Spent <more>. (seed 1)",
        "mixed: not private",
    ):
        assert part in said
    assert exposed["statement"] in said
    private = summary(tmp_path / "c")["privacy"]["private"]
    assert f"There are {3 if private else 2} here that spent any" in said
    assert "on the same data spend adds up" in said
    for alone in (["a"], ["a", "without noise"]):
        assert "adds up" not in page_of(tmp_path, *(tmp_path / name for name in alone)).text["Privacy"]


def test_an_epsilon_that_bounds_nothing_is_not_private(tmp_path: Path, write_run: WriteRun) -> None:
    """Whatever the run says of itself: none, an infinite one, and one that nobody could tell from it."""
    spent = {"private": True, "delta": None, "unit": None, "statement": "…"}
    write_run(tmp_path / "a", "a", privacy={**spent, "epsilon": math.inf})
    write_run(tmp_path / "b", "b", privacy={**spent, "epsilon": None})
    write_run(tmp_path / "c", "c", privacy={**spent, "epsilon": 5e39})
    write_run(tmp_path / "d", "d", privacy={**spent, "epsilon": 64.0})
    page = page_of(tmp_path, *(tmp_path / name for name in "abcd"))
    assert page.column("Privacy") == dict.fromkeys("abc", "not private") | {"d": "private: ε = 64"}


def test_nulls_everywhere(tmp_path: Path, write_run: WriteRun) -> None:
    nothing = dict.fromkeys(MEASURES)
    client: dict[str, Any] = {
        "client": 0,
        "local": None,
        "neighbor": None,
        "overall": 0.4,
        "examples": 3,
        "classes": [],
        "domains": None,
    }
    write_run(tmp_path / "run", accuracy=nothing, per_client=[client])
    page = page_of(tmp_path, tmp_path / "run")
    assert [page.column(name)["promptfl"] for name in ("Local, %", "Neighbor, %", "Overall, %")] == ["n/a"] * 3
    assert set(page.figures) == {"clients", "wire"}, "no empty axes for what was not measured"
    heat = page.figures["clients"]["data"][0]
    assert (heat["z"], heat["customdata"]) == ([[0.4]], [[""]])
    assert page.figures["clients"]["layout"]["xaxis"]["ticktext"] == ["promptfl<br>overall"]
    write_run(tmp_path / "empty", accuracy=nothing, per_client=[])
    assert set(page_of(tmp_path, tmp_path / "empty").figures) == {"wire"}


def test_a_client_without_a_value_leaves_a_gap(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run")
    run["per_client"][3]["neighbor"] = None
    Summary.model_validate(run).write(tmp_path / "run")
    page = page_of(tmp_path, tmp_path / "run")
    heat, numbers = page.figures["clients"]["data"]
    assert heat["z"][3][1] is None
    assert (1, "3") not in set(zip(numbers["x"], numbers["y"], strict=True))
    known = [client["neighbor"] for client in run["per_client"] if client["client"] != 3]
    assert page.column("Neighbor, %")["promptfl"] == percent(known, run["accuracy"]["neighbor"])


def test_novel_and_domain_have_columns_and_panels_where_measured(tmp_path: Path, write_run: WriteRun) -> None:
    accuracy = {"local": 0.9, "neighbor": None, "overall": 0.8, "novel": 0.5, "domain": 0.25}
    write_run(tmp_path / "a", "a", accuracy=accuracy)
    write_run(tmp_path / "b", "b")
    page = page_of(tmp_path, tmp_path / "a", tmp_path / "b")
    assert page.column("Novel, %") == {"a": "50.0", "b": "n/a"}
    assert page.column("Domain, %") == {"a": "25.0", "b": "n/a"}
    assert list(page.lines("round-novel")) == ["a"]


def test_a_thousand_clients(tmp_path: Path, write_run: WriteRun) -> None:
    names = [f"a class with a rather long name, number {number}" for number in range(400)]
    algorithms = ("local", "promptfl", "dp-fpl", "dplora")
    for name in algorithms:
        write_run(tmp_path / name, name, clients=1000, names=names, rounds=100, every=1)
    page = page_of(tmp_path, *(tmp_path / name for name in algorithms))
    assert (tmp_path / "report.html").stat().st_size < 8e6
    (heat,) = page.figures["clients"]["data"]  # no numbers in 8,000 cells
    assert (len(heat["z"]), len(heat["z"][0])) == (1000, 8)
    layout = page.figures["clients"]["layout"]
    assert layout["height"] <= 1200
    assert 1000 / layout["yaxis"]["dtick"] <= 32


def test_hostile_names_stay_text(tmp_path: Path, write_run: WriteRun) -> None:
    images = {"encoded": 1, "cached": 0, "skipped": [{"name": f"{HOSTILE}.png", "reason": f"broken {HOSTILE}"}]}
    privacy = {"private": False, "epsilon": None, "delta": None, "unit": None, "statement": HOSTILE}
    write_run(
        tmp_path / "run",
        HOSTILE,
        names=[HOSTILE[:39], "<b>bold</b>"],
        images=images,
        privacy=privacy,
        dataset=HOSTILE,
        encoder=HOSTILE,
        version=HOSTILE,
    )
    page = page_of(tmp_path, tmp_path / "run", title=HOSTILE)
    harmless = page_of(tmp_path, write_harmless(tmp_path, write_run))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in harmless.tags], "the names made no element"
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert list(page.column("Privacy")) == [HOSTILE]
    assert page.tables["Skipped images"][1] == [f"{HOSTILE}.png", f"broken {HOSTILE}"]
    assert HOSTILE in page.text[HOSTILE], "the paragraph under the title"
    # plotly reads tags in its labels, so there no "<" may be left but its own line breaks.
    for figure in page.figures.values():
        for text in strings(figure):
            cleaned = re.sub(r"<br>|<extra></extra>", "", text)
            assert "<" not in cleaned, text
    assert "classes: " in page.figures["clients"]["data"][0]["customdata"][0][0]


def write_harmless(tmp_path: Path, write_run: WriteRun) -> Path:
    images = {"encoded": 1, "cached": 0, "skipped": [{"name": "a.png", "reason": "broken"}]}
    write_run(tmp_path / "harmless", images=images)
    return tmp_path / "harmless"


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def test_names_that_are_not_unicode_do_not_stop_the_page(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run", names=["caf\udce9", "b"])
    page = page_of(tmp_path, tmp_path / "run", title="odd \udce9")
    assert page.figures["clients"]["data"][0]["customdata"][0] == ["classes: caf?, b"]


def test_nothing_is_asked_of_any_host(tmp_path: Path, demo: dict[str, Path]) -> None:
    page = page_of(tmp_path, *demo.values())
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "img"}
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), f"<{tag} {name}={value}>"
    policies = [at for at, (tag, it) in enumerate(page.tags) if it.get("http-equiv") == "Content-Security-Policy"]
    first_script = next(at for at, (tag, _) in enumerate(page.tags) if tag in ("script", "style", "link"))
    assert policies, "the browser itself shall refuse requests"
    assert policies[0] < first_script
    policy = page.tags[policies[0]][1]["content"] or ""
    assert "default-src 'none'" in policy
    sources = {word for directive in policy.split(";") for word in directive.split()[1:]}
    assert sources <= {"'none'", "'unsafe-inline'", "data:", "blob:"}
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count("plotly.js v") == 1, "the bundle stands in the page, once"
    style = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    script = html[html.rindex("<script>") :]
    for setting in ("displaylogo: false", "showSendToCloud: false", 'plotlyServerURL: ""', "responsive: true"):
        assert setting in script


def test_accessible_markup(tmp_path: Path, demo: dict[str, Path]) -> None:
    page = page_of(tmp_path, *demo.values())
    assert ("html", {"lang": "en"}) in page.tags
    assert any(attributes.get("name") == "viewport" for _, attributes in page.tags)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert headings.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(headings))
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags].count("caption") == len(page.tables)
    plots = {it["id"]: it for _, it in page.tags if it.get("class") == "plot"}
    assert plots.keys() == page.figures.keys()
    assert all(it["role"] == "img" for it in plots.values())
    final = metrics(demo["dp-fpl"])[-1]["accuracy"]["local"]
    assert f"to {final:.1%} in round 20" in (plots["round-local"]["aria-label"] or "")
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    labeled = [attributes["aria-labelledby"] for _, attributes in page.tags if "aria-labelledby" in attributes]
    assert set(labeled) <= set(identities)


def luminance(color: str) -> float:
    channels = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_in_both_themes(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run")
    html = write_report([tmp_path / "run"], tmp_path / "report.html", "t").read_text(encoding="utf-8")
    style = html[html.index("<style>") : html.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark", 1)
    for part in (light, dark):
        theme = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", part))
        for background in (theme["paper"], theme["box"]):
            assert all(contrast(theme[text], background) >= 4.5 for text in ("ink", "faint", "exposed"))
        assert all(contrast(color, theme["paper"]) >= 3 for color in PALETTE)


def test_figures_are_valid_plotly(tmp_path: Path, comparison: dict[str, list[Path]]) -> None:
    from plotly import graph_objects

    page = page_of(tmp_path, *(directory for directories in comparison.values() for directory in directories))
    for figure in page.figures.values():
        graph_objects.Figure(figure)  # refuses an unknown property or value


def test_numbers_in_cells_have_contrast(tmp_path: Path, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run", clients=100)
    for client in run["per_client"]:
        client["local"], client["neighbor"] = client["client"] / 99, None
    Summary.model_validate(run).write(tmp_path / "run")
    heat, numbers = page_of(tmp_path, tmp_path / "run").figures["clients"]["data"]
    stops = [(at, [int(part) for part in re.findall(r"\d+", rgb)]) for at, rgb in heat["colorscale"]]
    for client, ink in zip(range(100), numbers["textfont"]["color"], strict=True):
        value = client / 99
        (start, low), (end, high) = next(pair for pair in pairwise(stops) if value <= pair[1][0])
        mix = [round(a + (b - a) * (value - start) / (end - start)) for a, b in zip(low, high, strict=True)]
        cell = "#" + "".join(f"{channel:02x}" for channel in mix)
        assert contrast(cell, {"#000": "#000000", "#fff": "#ffffff"}[ink]) >= 4.5


def test_skipped_images_are_listed_once_and_only_when_there_are_any(tmp_path: Path, write_run: WriteRun) -> None:
    skipped = [{"name": f"image-{number}.png", "reason": "truncated"} for number in range(250)]
    for seed in range(2):
        write_run(tmp_path / f"{seed}", seed=seed, images={"encoded": 1, "cached": 0, "skipped": skipped})
    page = page_of(tmp_path, tmp_path / "0", tmp_path / "1")
    assert len(page.tables["Skipped images"]) == 201
    assert "250 images" in page.captions["Skipped images"]
    write_run(tmp_path / "clean")
    assert "Skipped images" not in page_of(tmp_path, tmp_path / "clean").text


def test_configuration_of_the_first_run(tmp_path: Path, demo: dict[str, Path]) -> None:
    page = page_of(tmp_path, *demo.values())
    assert (demo["zero-shot"] / "config.toml").read_text() in page.text["Configuration"]
    assert "config.toml of zero-shot, the first of 4 runs" in page.text["Configuration"]


def test_rounds_repeated_by_a_resumed_run_count_once(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "run" / "metrics.jsonl").write_text("\n".join([*lines[:11], *lines[5:]]))
    whole = page_of(tmp_path, tmp_path / "run").lines("round-local")["promptfl"]
    assert whole["x"] == [0, 5, 10, 15, 20]


@pytest.mark.parametrize("name", ["config.toml", "summary.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path: Path, name: str, write_run: WriteRun) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / name).unlink()
    refused(tmp_path, f"{tmp_path / 'run'}: {name} is missing; finish the run with --resume")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.toml", "seed = ", "config.toml is malformed ("),
        ("config.toml", b"\xff", "config.toml is malformed (it is not UTF-8 text)"),
        ("summary.json", '{"algorithm": "x"', "summary.json is malformed ("),
        ("summary.json", "[]", "summary.json is malformed (the whole: "),
        ("summary.json", "[" * 100_000, "summary.json is malformed ("),
        ("summary.json", {"accuracy": {"local": 1.5}}, "summary.json is malformed (accuracy.local: "),
        ("summary.json", {"accuracy": {"local": math.nan}}, "summary.json is malformed (accuracy.local: "),
        ("summary.json", {"per_client": [{"client": -1}]}, "summary.json is malformed (per_client.0.client: "),
        ("summary.json", {"privacy": {"private": True}}, "summary.json is malformed (privacy.statement: "),
        ("metrics.jsonl", "", "metrics.jsonl is malformed (it holds no round)"),
        ("metrics.jsonl", '{"round": 0}\n{"rou', "metrics.jsonl line 2 is malformed ("),
        ("metrics.jsonl", '{"round": "first\\nsecond"}', "metrics.jsonl line 1 is malformed (round: "),
    ],
)
def test_a_malformed_file_is_named(tmp_path: Path, name: str, content: Any, said: str, write_run: WriteRun) -> None:
    run = write_run(tmp_path / "run")
    if isinstance(content, dict):
        content = json.dumps({**run, **content})
    (tmp_path / "run" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(tmp_path, f"{tmp_path / 'run'}: {said}")


def refused(tmp_path: Path, message: str) -> None:
    """The report is refused in one line that holds a remedy, and an older page stays as it was."""
    out = tmp_path / "report.html"
    out.write_text("older")
    with pytest.raises(RunError) as caught:
        write_report([tmp_path / "run"], out, "t")
    assert str(caught.value).startswith(message)
    assert "leave this directory out" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert out.read_text() == "older"


def test_no_such_directory_and_no_directory(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nowhere: no such run directory; give"):
        write_report([tmp_path / "nowhere"], tmp_path / "report.html", "t")
    with pytest.raises(RunError, match="no run directory was given"):
        write_report([], tmp_path / "report.html", "t")
    assert list(tmp_path.iterdir()) == []


def test_the_page_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_run: WriteRun) -> None:
    write_run(tmp_path / "run")
    out = tmp_path / "deep" / "er" / "report.html"
    assert write_report([tmp_path / "run"], out, "first") == out
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        assert self.parent == out.parent, "another folder may be another disk"
        assert "<h1>first</h1>" in out.read_text(encoding="utf-8"), "whole until the last step"
        assert self.read_text(encoding="utf-8").endswith("</html>\n")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    write_report([tmp_path / "run"], out, "second")
    assert "<h1>second</h1>" in out.read_text(encoding="utf-8")
    assert [entry.name for entry in out.parent.iterdir()] == ["report.html"], "nothing left behind"


def test_a_place_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, write_run: WriteRun) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "folder", tmp_path / "file" / "report.html"):
        with pytest.raises(RunError, match="the report cannot be written") as caught:
            write_report([tmp_path / "run"], out, "t")
        assert str(out) in str(caught.value)
        assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "folder", "file"}
