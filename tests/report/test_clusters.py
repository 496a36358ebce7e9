"""The section on clusters, against runs whose points and clusters are made here."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from report.conftest import WriteRun
from report.test_report import HOSTILE, contrast, page_of, refused, strings
from sordino.report.figures import PALETTE, SYMBOLS
from sordino.report.sections.clusters import agreement, moves
from sordino.report.sections.distance_data import plane
from sordino.results import Summary
from sordino.secure import to_one_scale

Floats = NDArray[np.float64]

STEP = 2.0**-16
ROUNDING = 5e-4  # of numbers on the page, relative: four digits are kept


def drawn(clients: int, dimensions: int = 3, seed: int = 0) -> Floats:
    """Points [clients, dimensions] that are whole numbers of quantization steps."""
    points = np.random.default_rng(seed).normal(size=(clients, dimensions))
    return np.round(points / np.linalg.norm(points, axis=1, keepdims=True) / STEP) * STEP


def between(points: Floats, others: Floats) -> Floats:
    """Distances [rows of points, rows of others]."""
    found: Floats = np.linalg.norm(points[:, None] - others, axis=-1)
    return found


def singles(clients: int) -> list[list[int]]:
    return [[client] for client in range(clients)]


def opened(points: Floats, sets: Sequence[Sequence[int]], factors: Sequence[int] | None = None) -> dict[str, Any]:
    """What the server of these points writes down, computed in whole numbers as the protocol does."""
    whole = np.round(points / STEP).astype(np.int64)
    factors = factors or [1] * len(points)
    columns = []
    for members in sets:
        squared = ((len(members) * whole - whole[list(members)].sum(0)) ** 2).sum(1).tolist()
        values = [factor * value for factor, value in zip(factors, squared, strict=True)]
        columns.append({"members": list(members), "clients": list(range(len(points))), "values": values})
    return {"step": STEP, "columns": columns}


WriteClustered = Callable[..., Path]


@pytest.fixture
def write_clustered(write_run: WriteRun) -> WriteClustered:
    def write(
        directory: Path,
        labels: Mapping[int, Sequence[int]],
        distances: Mapping[int, Any] | None = None,
        *,
        domains: Sequence[Sequence[str] | None] | None = None,
        names: Sequence[str] | None = None,
        ratios: bool = False,
        seed: int = 0,
        rounds: int = 20,
    ) -> Path:
        """Write a run in which the clusters are `labels` from each of its rounds on; distances are of their rounds."""
        clients = len(next(iter(labels.values())))
        settings = {"reveal": "ratios" if ratios else "distances"}
        summary = write_run(directory, "secfpp", seed, clients=clients, rounds=rounds, settings=settings)
        for client, held in zip(summary["per_client"], domains or [None] * clients, strict=True):
            client["domains"] = held
        for client, name in zip(summary["per_client"], names or [""] * clients, strict=True):
            client["name"] = name
        Summary.model_validate(summary).write(directory)
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        current: Sequence[int] = [-1] * clients
        for line in lines[1:]:
            current = labels.get(line["round"], current)
            opened_columns = (distances or {}).get(line["round"], {}).get("columns", [])
            line["clusters"] = list(current)
            line["protocol"] = {"exchanges": 7, "columns": len(opened_columns)}
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "distances").mkdir()
        for number, content in (distances or {}).items():
            (directory / "distances" / f"round-{number:06d}.json").write_text(json.dumps(content))
        return directory

    return write


def heat(figure: dict[str, Any]) -> Floats:
    return np.array([[np.nan if value is None else value for value in row] for row in figure["data"][0]["z"]])


def on_plane(figure: dict[str, Any]) -> Floats:
    (marks,) = figure["data"]
    return np.array([marks["x"], marks["y"]], dtype=float).T


def test_points_of_a_plane_are_recovered_from_their_distances_however_they_lie_in_space() -> None:
    generator = np.random.default_rng(1)
    flat = generator.normal(size=(9, 2))
    basis, _ = np.linalg.qr(generator.normal(size=(6, 6)))
    points = flat @ basis[:2] + 3 * basis[2]
    found, share = plane(between(points, points) ** 2)
    assert between(found, found) == pytest.approx(between(flat, flat), abs=1e-9)
    assert found.mean(0) == pytest.approx([0, 0], abs=1e-9)
    assert share == pytest.approx(1)


def test_the_plane_is_that_of_principal_components_and_its_share_is_theirs() -> None:
    points = np.random.default_rng(2).normal(size=(12, 5)) * [3, 2, 1, 1, 0.5]
    values = np.linalg.svd(points - points.mean(0), compute_uv=False)
    found, share = plane(between(points, points) ** 2)
    assert (found**2).sum(0) == pytest.approx(values[:2] ** 2)
    assert share == pytest.approx((values[:2] ** 2).sum() / (values**2).sum())
    # The share of the sum of squared distances, which is what the page says that it is.
    assert share == pytest.approx((between(found, found) ** 2).sum() / (between(points, points) ** 2).sum())


@pytest.mark.parametrize("points", [[[0.0, 0.0]], [[1.0, 2.0]] * 4, [[0.0, 0.0], [3.0, 4.0]]])
def test_points_that_span_no_plane(points: list[list[float]]) -> None:
    found, share = plane(between(np.array(points), np.array(points)) ** 2)
    assert between(found, found) == pytest.approx(between(np.array(points), np.array(points)))
    assert share == 1


def test_factors_of_rows_follow_from_symmetry() -> None:
    points = drawn(8)
    squared = between(points, points) ** 2
    factors = np.random.default_rng(3).uniform(1, 1000, size=8)
    found = to_one_scale(factors[:, None] * squared)
    assert found / found.sum() == pytest.approx(squared / squared.sum())
    assert to_one_scale(squared) == pytest.approx(squared)
    twice = points[[0, 1, 2, 3, 3, 5, 6, 7]]  # two clients in one place
    squared = between(twice, twice) ** 2
    found = to_one_scale(factors[:, None] * squared)
    assert found / found.sum() == pytest.approx(squared / squared.sum(), abs=1e-9)


def test_moves_in_words() -> None:
    before = [0, 0, 1, 1, -1, 2, 2]
    assert moves(before, before) == "nobody"
    assert moves(before, [0, 1, 1, 3, 2, 2, 2]) == (
        "client 1 from cluster 0 to 1; client 3 from cluster 1 to 3; client 4 into cluster 2"
    )
    assert moves(before, [0, 0, 1, 1, -1, 0, 0]) == "clients 5 and 6 from cluster 2 to 0"
    assert moves(before, [0, 0, 1, 1, -1, 2, -1]) == "client 6 out of cluster 2"


def test_the_index_is_told_only_where_every_client_has_one_domain() -> None:
    assert agreement([3, 3, 1, 1], {0: ("a",), 1: ("a",), 2: ("b",), 3: ("b",)}) == 1
    labels, domains = [0, 0, 1, 1, 1, 2], ["a", "a", "a", "b", "b", "b"]
    by_client = {client: (domain,) for client, domain in enumerate(domains)}
    assert agreement(labels, by_client) == pytest.approx(adjusted_rand_score(domains, labels))
    # Two clients that are in no cluster are not together.
    assert agreement([0, 0, 1, -1, 1, -1], by_client) == pytest.approx(adjusted_rand_score(domains, [0, 0, 1, 3, 1, 4]))
    assert agreement(labels, by_client | {3: ("b", "c")}) is None
    assert agreement(labels, by_client | {3: ()}) is None
    assert agreement(labels, {0: ("a",)}) is None


def test_clusters_by_round(tmp_path: Path, write_clustered: WriteClustered) -> None:
    points = drawn(6)
    labels = {8: [0, 0, 1, 1, 5, 5], 13: [0, 0, 1, 1, 5, -1], 16: [0, 1, 1, 1, 5, -1]}
    distances = {number: opened(points, singles(6)) for number in (8, 12, 16, 20)}
    domains = [["a"], ["a"], ["b"], ["b"], ["c"], ["c"]]
    run = write_clustered(tmp_path / "run", labels, distances, domains=domains)
    page = page_of(tmp_path, run)
    table = page.tables["Clusters by round, secfpp"]
    assert table == [
        ["Round", "Moved"],
        [
            "8 (3 clusters)",
            "clients 0 and 1 into cluster 0; clients 2 and 3 into cluster 1; clients 4 and 5 into cluster 5",
        ],
        ["12 (3 clusters)", "nobody"],
        ["13 (3 clusters)", "client 5 out of cluster 5"],
        ["16 (3 clusters)", "client 1 from cluster 0 to 1"],
        ["20 (3 clusters)", "nobody"],
    ]
    figure = page.figures["clusters-0"]
    assert figure["layout"]["xaxis"]["ticktext"] == ["8", "12", "13", "16", "20"]
    trace = figure["data"][0]
    assert trace["y"] == [str(client) for client in range(6)]
    assert list(zip(*trace["z"], strict=True)) == [
        (0, 0, 1, 1, 5, 5),
        (0, 0, 1, 1, 5, 5),
        (0, 0, 1, 1, 5, None),
        (0, 1, 1, 1, 5, None),
        (0, 1, 1, 1, 5, None),
    ]
    for label in (0, 1, 5):  # where the scale is of one color, from stop to stop
        position = (label - trace["zmin"]) / (trace["zmax"] - trace["zmin"])
        ends = [pair for pair in pairwise(trace["colorscale"]) if pair[0][0] < position < pair[1][0]]
        assert ends
        assert {color for pair in ends for _, color in pair} == {PALETTE[label]}
    score = adjusted_rand_score([held for (held,) in domains], [0, 1, 1, 1, 5, 9])
    said = page.text["Clusters"]
    assert "3 clusters in round 8, 3 in round 20; 2 clients moved on the way. Adjusted Rand index" in said
    assert f"at the end: {score:.2f};" in said
    assert page.tables["Clusters at the end, secfpp"][1:] == [
        ["0 (1 client)", "0", "a"],
        ["1 (3 clients)", "1, 2, 3", "a and b"],
        ["5 (1 client)", "4", "c"],
        ["none (1 client)", "5", "c"],
    ]


def test_clusters_without_shares_show_the_rounds_in_which_they_changed(
    tmp_path: Path, write_clustered: WriteClustered
) -> None:
    labels = {5: [0, 0, 1], 15: [0, 1, 1]}
    page = page_of(tmp_path, write_clustered(tmp_path / "run", labels))
    assert page.figures["clusters-0"]["layout"]["xaxis"]["ticktext"] == ["5", "15"]
    assert {name for name in page.figures if name.startswith(("distances", "plane"))} == set()
    assert "Adjusted Rand" not in page.text["Clusters"]
    assert page.tables["Clusters at the end, secfpp"][0] == ["Cluster", "Clients"]


def test_no_clusters_no_section(tmp_path: Path, write_clustered: WriteClustered, write_run: WriteRun) -> None:
    write_run(tmp_path / "plain", "promptfl")
    write_clustered(tmp_path / "never", {1: [-1, -1, -1]})
    page = page_of(tmp_path, tmp_path / "plain", tmp_path / "never")
    assert "Clusters" not in page.text
    assert not [name for name in page.figures if name.startswith(("clusters", "distances", "plane"))]


def test_numbers_of_the_heat_map_are_distances_and_so_is_the_plane(
    tmp_path: Path, write_clustered: WriteClustered
) -> None:
    points = drawn(7, 2)  # of a plane, so that it shows all distances
    domains = [["a"], ["a"], ["b"], ["b"], ["b"], ["<c>"], ["<c>"]]
    labels = {10: [2, 2, 0, 0, 1, 1, -1]}
    distances = {10: opened(drawn(7, 2, seed=9), singles(7)), 20: opened(points, singles(7)[::-1])}
    page = page_of(tmp_path, write_clustered(tmp_path / "run", labels, distances, domains=domains))
    true = between(points, points)
    figure = page.figures["distances-0"]
    assert heat(figure) == pytest.approx(true, rel=ROUNDING), "the last round's, with clients as numbered"
    assert figure["layout"]["xaxis"]["ticktext"] == [str(client) for client in range(7)]
    numbers = figure["data"][1]
    for column, client, text in zip(numbers["x"], numbers["y"], numbers["text"], strict=True):
        assert float(text) == pytest.approx(true[int(client), column], abs=0.006)
    marks = page.figures["plane-0"]["data"][0]
    located = on_plane(page.figures["plane-0"])
    assert between(located, located) == pytest.approx(true, abs=4e-3)
    assert "carry 100% of the squared distances" in page.text["Clusters"]
    assert marks["marker"]["color"] == [PALETTE[at] for at in (0, 0, 1, 1, 1, 2, 2)], "by domain"
    assert marks["marker"]["symbol"] == [
        *(SYMBOLS[label] for label in (2, 2, 0, 0, 1, 1)),
        "circle-open",
    ], "by cluster"
    assert marks["text"] == [str(client) for client in range(7)]
    assert marks["customdata"][5] == "client 5<br>&lt;c&gt;<br>cluster 1"
    assert page.figures["plane-0"]["layout"]["yaxis"]["scaleanchor"] == "x", "or distances would be distorted"
    nearest = {row[0]: row[1:] for row in page.tables["Nearest and farthest, secfpp"]}
    for client in range(7):
        order = [other for other in np.argsort(true[client]) if other != client]
        assert [cell.split(" (")[0] for cell in nearest[str(client)]] == [f"client {order[at]}" for at in (0, -1)]
    coordinates = page.tables["Clients in two dimensions, secfpp"]
    assert coordinates[0] == ["Client", "Domain", "Cluster", "First axis", "Second axis"]
    assert coordinates[6][:3] == ["5", "<c>", "1"]
    assert float(coordinates[6][3]) == pytest.approx(located[5, 0], rel=6e-3)


def test_clients_with_names_are_called_by_them(tmp_path: Path, write_clustered: WriteClustered) -> None:
    names = ["north", "south", "<east>", "west"]
    labels = {10: [0, 0, 1, 1], 20: [0, 0, 1, 0]}
    distances = {20: opened(drawn(4), singles(4))}
    page = page_of(tmp_path, write_clustered(tmp_path / "run", labels, distances, names=names))
    shown = ["north", "south", "&lt;east&gt;", "west"]
    for figure in ("clusters-0", "distances-0"):
        assert page.figures[figure]["data"][0]["y"] == shown
    assert page.figures["distances-0"]["layout"]["xaxis"]["ticktext"] == shown
    assert page.figures["distances-0"]["data"][0]["text"][0][3] == "client west"
    assert page.figures["plane-0"]["data"][0]["text"] == shown
    assert page.figures["plane-0"]["data"][0]["customdata"][2] == "client &lt;east&gt;<br>cluster 1"
    assert page.tables["Clusters by round, secfpp"][2][1] == "client west from cluster 1 to 0"
    assert [row[1] for row in page.tables["Clusters at the end, secfpp"][1:]] == ["north, south, west", "<east>"]
    assert {row[0] for row in page.tables["Nearest and farthest, secfpp"][1:]} == set(names)
    assert {row[0] for row in page.tables["Clients in two dimensions, secfpp"][1:]} == set(names)


def test_without_domains_the_plane_is_colored_by_cluster(tmp_path: Path, write_clustered: WriteClustered) -> None:
    labels = [3, 3, 1, 1]
    run = write_clustered(tmp_path / "run", {10: labels}, {10: opened(drawn(4), singles(4))})
    page = page_of(tmp_path, run)
    marker = page.figures["plane-0"]["data"][0]["marker"]
    assert marker["color"] == [PALETTE[label] for label in labels]
    assert "except for the colors" not in page.text["Clusters"]


def test_distances_to_centers_have_no_plane_and_are_labeled_by_members(
    tmp_path: Path, write_clustered: WriteClustered
) -> None:
    points = drawn(5)
    sets = [[0, 1, 2, 3, 4], [2], [0, 1], [3, 4, 2]]
    run = write_clustered(tmp_path / "run", {10: [0, 0, 1, 1, 1]}, {10: opened(points, sets)})
    page = page_of(tmp_path, run)
    figure = page.figures["distances-0"]
    centers = np.array([points[members].mean(0) for members in sets])
    assert heat(figure) == pytest.approx(between(points, centers), rel=ROUNDING)
    assert figure["layout"]["xaxis"]["ticktext"] == ["0, 1, 2, 3, 4", "2", "0, 1", "2, 3, 4"]
    assert figure["data"][0]["text"][0][1:3] == ["client 2", "the mean of clients 0 and 1"]
    assert "plane-0" not in page.figures
    assert "to the means of 4 sets of clients" in page.text["Clusters"]


def test_rows_with_a_scale_of_their_own(tmp_path: Path, write_clustered: WriteClustered) -> None:
    points = drawn(6, 2)
    factors = [3, 1000, 17, 250, 8, 90]
    distances = opened(points, [*singles(6), [0, 1, 2]], factors)
    run = write_clustered(tmp_path / "run", {10: [0, 0, 0, 1, 1, 1]}, {10: distances}, ratios=True)
    page = page_of(tmp_path, run)
    true = between(points, points)
    assert heat(page.figures["distances-0"]) == pytest.approx(true / true.mean(1, keepdims=True), rel=ROUNDING)
    located = on_plane(page.figures["plane-0"])
    found = between(located, located)
    assert found / found.sum() == pytest.approx(true / true.sum(), abs=1e-3)
    said = page.text["Clusters"]
    assert "rows have a scale of their own" in said
    assert "up to rotation and to a common scale" in said
    assert "to the means of 1 set" in said, "which is not on the heat map"


def test_what_was_not_opened_leaves_a_gap(tmp_path: Path, write_clustered: WriteClustered) -> None:
    distances = opened(drawn(4), singles(4))
    for part in ("clients", "values"):
        del distances["columns"][1][part][3]
    run = write_clustered(tmp_path / "run", {10: [0, 0, 1, 1]}, {10: distances})
    page = page_of(tmp_path, run)
    assert np.argwhere(np.isnan(heat(page.figures["distances-0"]))).tolist() == [[3, 1]]
    assert "plane-0" not in page.figures


def test_clients_who_took_no_part_have_no_row(tmp_path: Path, write_clustered: WriteClustered) -> None:
    points = drawn(5)
    distances = opened(points, [[1], [2], [4]])
    for column in distances["columns"]:
        column["clients"], column["values"] = [1, 2, 4], [column["values"][client] for client in (1, 2, 4)]
    run = write_clustered(tmp_path / "run", {10: [-1, 0, 0, -1, 0]}, {10: distances})
    page = page_of(tmp_path, run)
    some = points[[1, 2, 4]]
    assert page.figures["distances-0"]["data"][0]["y"] == ["1", "2", "4"]
    assert heat(page.figures["distances-0"]) == pytest.approx(between(some, some), rel=ROUNDING)
    assert page.figures["plane-0"]["data"][0]["text"] == ["1", "2", "4"]


def test_of_several_seeds_the_first_is_shown_and_said(
    tmp_path: Path, write_clustered: WriteClustered, write_run: WriteRun
) -> None:
    runs = [
        write_clustered(tmp_path / f"{seed}", {10: labels}, {10: opened(drawn(4), singles(4))}, seed=seed)
        for seed, labels in ((7, [0, 0, 1, 1]), (2, [0, 1, 1, 0]))
    ]
    write_run(tmp_path / "other", "local")
    page = page_of(tmp_path, tmp_path / "other", *runs)
    assert [row[0] for row in page.figures["clusters-1"]["data"][0]["z"]] == [0, 1, 1, 0]
    assert "Of the run with seed 2, the first of 2 seeds." in page.text["Clusters"]
    assert "clusters-0" not in page.figures, "that algorithm has none"


def test_the_section_is_sound_markup_with_valid_figures(tmp_path: Path, write_clustered: WriteClustered) -> None:
    from plotly import graph_objects

    domains = [[HOSTILE], [HOSTILE], ["b"], None]
    runs = [
        write_clustered(tmp_path / "a", {5: [0, 0, 1, -1]}, {5: opened(drawn(4), singles(4))}, domains=domains),
        write_clustered(tmp_path / "b", {5: [0, 0, 1, 1]}, {5: opened(drawn(4), [[0, 1, 2, 3]])}, ratios=True),
    ]
    page = page_of(tmp_path, *runs)
    assert {"clusters-0", "distances-0", "plane-0", "clusters-1", "distances-1"} <= set(page.figures)
    for figure in page.figures.values():
        graph_objects.Figure(figure)
        for text in strings(figure):
            assert "<" not in re.sub(r"<br>|<extra></extra>", "", text), text
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    headings = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(headings))
    identities = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    regions = [attributes["aria-label"] for _, attributes in page.tags if attributes.get("role") == "region"]
    assert len(regions) == len(set(regions))
    titles = [title for title in page.text if title in ("Accuracy by client", "Clusters", "What crossed the wire")]
    assert titles == ["Accuracy by client", "Clusters", "What crossed the wire"]


def test_numbers_of_clusters_have_contrast(tmp_path: Path, write_clustered: WriteClustered) -> None:
    run = write_clustered(tmp_path / "run", {5: list(range(8))})
    _, numbers = page_of(tmp_path, run).figures["clusters-0"]["data"]
    assert numbers["text"] == [str(label) for label in range(8)]
    for label, ink in enumerate(numbers["textfont"]["color"]):
        assert contrast(PALETTE[label], {"#000": "#000000", "#fff": "#ffffff"}[ink]) >= 4.5


def test_two_hundred_clients(tmp_path: Path, write_clustered: WriteClustered) -> None:
    points = drawn(200)
    labels = {number: [(client * 7 + number) % 11 for client in range(200)] for number in range(1, 101)}
    distances = {100: opened(points, singles(200))}
    run = write_clustered(tmp_path / "run", labels, distances, rounds=100)
    page = page_of(tmp_path, run)
    assert (tmp_path / "report.html").stat().st_size < 8e6
    for name in ("clusters-0", "distances-0"):
        figure = page.figures[name]
        assert len(figure["data"]) == 1, "no numbers in thousands of cells"
        assert figure["layout"]["height"] <= 1200
        assert len(figure["layout"]["xaxis"]["ticktext"]) <= 32
    assert page.figures["plane-0"]["data"][0]["mode"] == "markers"
    widths = [int(found) for found in re.findall(r"min-width:(\d+)px", (tmp_path / "report.html").read_text())]
    assert max(widths) < 600
    assert "Colors repeat after 8 clusters" in page.text["Clusters"]
    assert sum(attributes.get("class") == "key" for _, attributes in page.tags) >= 11, "colors are named beside it"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", " is malformed ("),
        ("[]", " is malformed (the whole: "),
        ({"step": 0}, " is malformed (step: "),
        ({"columns": None}, " is malformed (columns: "),
        ({"members": []}, " is malformed (columns.0.members: "),
        ({"members": [5]}, " is malformed (client 5 in a federation of 3)"),
        ({"clients": [0, 1, 7]}, " is malformed (client 7 in a federation of 3)"),
        ({"values": [1, 2]}, " is malformed (columns.0: Value error, 2 values for 3 clients)"),
        ({"values": [1, -2, 3]}, " is malformed (columns.0.values.1: "),
        ({"values": [1, 10**30, 3]}, " is malformed (columns.0.values.1: "),
        ({"values": [1, float("nan"), 3]}, " is malformed (columns.0.values.1: "),
    ],
)
def test_malformed_distances_are_named(
    tmp_path: Path, content: Any, said: str, write_clustered: WriteClustered
) -> None:
    whole = opened(drawn(3), singles(3))
    write_clustered(tmp_path / "run", {10: [0, 0, 1]}, {10: whole})
    if isinstance(content, dict):
        whole |= {name: value for name, value in content.items() if name in whole}
        for column in whole["columns"] or []:
            column |= {name: value for name, value in content.items() if name in column}
        content = json.dumps(whole)
    (tmp_path / "run" / "distances" / "round-000020.json").write_text(content)
    refused(tmp_path, f"{tmp_path / 'run'}: distances/round-000020.json{said}")


@pytest.mark.parametrize("clusters", [[0, 1], [0, 1, 0, 1], ["a", "b", "c"], [0, 1, 10**30]])
def test_malformed_clusters_are_named(tmp_path: Path, clusters: list[Any], write_clustered: WriteClustered) -> None:
    run = write_clustered(tmp_path / "run", {10: [0, 0, 1]})
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[4] = json.dumps({**json.loads(lines[4]), "clusters": clusters})
    (run / "metrics.jsonl").write_text("\n".join(lines))
    refused(tmp_path, f"{run}: metrics.jsonl line 5 is malformed (clusters")
