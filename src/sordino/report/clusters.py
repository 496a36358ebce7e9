"""The page's section on clusters: who was with whom, who moved, and what the server saw of clients to find it out."""

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from sordino.report.distances import Domains, cluster_color, holding, what_the_server_saw
from sordino.report.figures import PALETTE, Figure
from sordino.report.groups import Group
from sordino.report.heatmap import client_layout, luminance, numbered, numbers, tick_step
from sordino.report.runs import Run
from sordino.report.tables import counted, html_table, keys, listed
from sordino.secure import NOBODY

Clustering = tuple[int, tuple[int, ...]]  # a round, and the number of each client's cluster or NOBODY

_OPEN_TEXT = 4000  # characters; a longer table is folded


def clusters(groups: Sequence[Group]) -> str:
    """Of each group that clusters its clients, the run of the first seed: clusters by round, distances, a plane."""
    parts = [_of_run(index, group) for index, group in enumerate(groups)]
    if not any(parts):
        return ""
    return f'<section aria-labelledby="clusters"><h2 id="clusters">Clusters</h2>\n{"".join(parts)}</section>\n'


def clusterings(run: Run) -> list[Clustering]:
    """The rounds in which clients were clustered or their clusters changed, from the first with any cluster on."""
    found: list[Clustering] = []
    last: tuple[int, ...] | None = None
    for entry in run.rounds:
        if entry.clusters is None:
            continue
        labels = tuple(max(label, NOBODY) for label in entry.clusters)
        computed = entry.protocol is not None and entry.protocol.columns > 0
        if (found or max(labels, default=NOBODY) > NOBODY) and (computed or labels != last):
            found.append((entry.round, labels))
        last = labels
    return found


def moves(before: Sequence[int], after: Sequence[int]) -> str:
    """Who moved, in words: `client 4 from cluster 1 to 3; clients 5 and 6 into cluster 0`."""
    moved: dict[tuple[int, int], list[int]] = {}
    for client, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            moved.setdefault((old, new), []).append(client)
    ways = (
        f"into cluster {new}" if old < 0 else f"out of cluster {old}" if new < 0 else f"from cluster {old} to {new}"
        for old, new in moved
    )
    return "; ".join(f"{_clients(who)} {way}" for who, way in zip(moved.values(), ways, strict=True)) or "nobody"


def agreement(labels: Sequence[int], domains: Domains) -> float | None:
    """Adjusted Rand index (Hubert and Arabie, 1985) between clusters and domains.

    A client in no cluster counts as one of its own. None unless every client has one domain.
    """
    if not labels or any(len(domains.get(client, ())) != 1 for client in range(len(labels))):
        return None
    from sklearn.metrics import adjusted_rand_score  # slow to import

    alone = [label if label >= 0 else NOBODY - client for client, label in enumerate(labels)]
    return float(adjusted_rand_score([domains[client][0] for client in range(len(labels))], alone))


def _of_run(index: int, group: Group) -> str:
    run = min(group.runs, key=lambda each: each.summary.seed)
    found = clusterings(run)
    domains = {client.client: client.domains or () for client in run.summary.per_client}
    which = f"<p>Of the run with seed {run.summary.seed}, the first of {len(group.runs)} seeds.</p>\n"
    over = _over_rounds(index, group.label, found, domains) if found else ""
    saw = what_the_server_saw(index, group.label, run, domains)
    return f"<h3>{escape(group.label)}</h3>\n{which if group.over_seeds else ''}{over}{saw}" if over or saw else ""


def _clients(numbers_of: Sequence[int]) -> str:
    return f"client{'' if len(numbers_of) == 1 else 's'} {listed(numbers_of)}"


def _count(labels: Sequence[int]) -> int:
    return len({label for label in labels if label >= 0})


def _over_rounds(index: int, label: str, found: Sequence[Clustering], domains: Domains) -> str:
    from sordino.report.page import place  # the page imports this module

    labels = found[-1][1]
    figure = _by_round(found, [holding(domains.get(client, ())) for client in range(len(labels))])
    present = sorted({label for _, each in found for label in each if label >= 0})
    words = (
        f"Clusters of {counted(len(labels), 'client')} in {counted(len(found), 'round')}; the tables below say who is "
        "in which, and who moved."
    )
    unnumbered = len(figure["data"]) == 1
    legend = keys("Cluster", [("square", cluster_color(each), str(each)) for each in present if unnumbered])
    repeated = f" Colors repeat after {len(PALETTE)} clusters." if max(present) >= len(PALETTE) else ""
    steps = pairwise([(0, (NOBODY,) * len(labels)), *found])
    rows = [
        [
            f"{number} <small>({counted(_count(after), 'cluster')})</small>",
            f'<span class="words">{moves(before, after)}</span>',
        ]
        for (_, before), (number, after) in steps
    ]
    table = html_table("Who changed clusters, by round.", ["Round", "Moved"], rows, f"Clusters by round, {label}")
    folded = "" if len(table) > _OPEN_TEXT else " open"
    return (
        f"<h4>Clusters over rounds</h4>\n<p>{_told(found, domains)}</p>\n"
        f"<figure>\n{legend}{place(f'clusters-{index}', figure, words)}<figcaption>Each row is a client, each column a "
        "round in which clusters were computed or changed. Colors are clusters, which keep their numbers from round "
        f"to round.{repeated}</figcaption>\n</figure>\n"
        f"<details{folded}><summary>Who moved</summary>\n{table}</details>\n{_at_the_end(label, labels, domains)}"
    )


def _told(found: Sequence[Clustering], domains: Domains) -> str:
    (first, start), (last, labels) = found[0], found[-1]
    text = f"{counted(_count(start), 'cluster')} in round {first}"
    if len(found) > 1:
        moved = sum(len({each[client] for _, each in found}) > 1 for client in range(len(labels)))
        text += (
            f", {_count(labels)} in round {last}; {counted(moved, 'client') if moved else 'nobody'} moved on the way"
        )
    score = agreement(labels, domains)
    if score is None:
        return text + "."
    alone = " A client in no cluster counts as one of its own." if NOBODY in labels else ""
    return (
        f"{text}. Adjusted Rand index between clusters and domains at the end: <strong>{score:.2f}</strong>; 1 is full "
        f"agreement, 0 what chance gives.{alone}"
    )


def _by_round(found: Sequence[Clustering], holdings: Sequence[str]) -> Figure:
    """Heat map: rows are clients, columns rounds, and colors clusters."""
    present = sorted({label for _, labels in found for label in labels if label >= 0})
    edges = [present[0] - 0.5, *((a + b) / 2 for a, b in pairwise(present)), present[-1] + 0.5]
    shares = [(edge - edges[0]) / (edges[-1] - edges[0]) for edge in edges]
    few = numbered(len(holdings), len(found))
    heat = {
        "type": "heatmap",
        "x": list(range(len(found))),
        "y": [str(client) for client in range(len(holdings))],
        "z": [
            [label if label >= 0 else None for label in row] for row in zip(*(each for _, each in found), strict=True)
        ],
        "customdata": [[text] for text in holdings],
        "text": [[str(number) for number, _ in found]],
        "zmin": edges[0],
        "zmax": edges[-1],
        "colorscale": [
            [at, cluster_color(each)] for each, ends in zip(present, pairwise(shares), strict=True) for at in ends
        ],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "client %{y}, round %{text}: cluster %{z}<br>%{customdata}<extra></extra>",
        "xgap": 2 if few else 0,
        "ygap": 2 if few else 0,
    }
    layout = client_layout(len(holdings), [str(number) for number, _ in found])
    layout["height"] -= 60  # without the long labels that columns of accuracies have
    step = tick_step(2 * len(found))
    axis = layout["xaxis"]
    axis |= {"tickvals": axis["tickvals"][::step], "ticktext": axis["ticktext"][::step], "title": {"text": "Round"}}

    def luminance_of(label: float) -> float:
        return luminance(bytes.fromhex(cluster_color(int(label))[1:]))

    return {"data": [heat, numbers(heat, str, luminance_of)] if few else [heat], "layout": layout}


def _at_the_end(label: str, labels: Sequence[int], domains: Domains) -> str:
    known, rows = any(domains.values()), []
    for number in sorted({*labels}, key=lambda each: (each < 0, each)):
        members = [client for client, each in enumerate(labels) if each == number]
        held = listed(dict.fromkeys(name for client in members for name in domains.get(client, ())))
        cells = [", ".join(str(client) for client in members), *([escape(held)] if known else [])]
        words = [f'<span class="words">{cell}</span>' for cell in cells]
        name = str(number) if number >= 0 else "none"
        rows.append([f"{name} <small>({counted(len(members), 'client')})</small>", *words])
    head = ["Cluster", "Clients", *(["Domains"] if known else [])]
    return html_table("Clusters at the end.", head, rows, f"Clusters at the end, {label}")
