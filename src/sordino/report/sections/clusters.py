"""The page's section on clusters: their members by round, and the distances that the server saw to find them."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import pairwise

from sordino.report.figures import PALETTE
from sordino.report.groups import Clients, Group
from sordino.report.markup import Figure, counted, html_table, keys, place
from sordino.report.runs import Run
from sordino.report.sections.distances import cluster_color, what_the_server_saw
from sordino.report.sections.heatmap import client_layout, luminance, numbered, numbers, tick_step
from sordino.results import listed
from sordino.secure import NOBODY

Clustering = tuple[int, tuple[int, ...]]  # a round, and the number of each client's cluster or NOBODY

_OPEN_TEXT = 4000  # characters; a longer table is folded


def clusters(groups: Sequence[Group]) -> str:
    """Return the section: clusters by round, distances and a plane.

    It shows the run of the first seed of each group that clusters its clients, and is empty if no group does.
    """
    parts = [_of_run(index, group) for index, group in enumerate(groups)]
    if not any(parts):
        return ""
    return f'<section aria-labelledby="clusters"><h2 id="clusters">Clusters</h2>\n{"".join(parts)}</section>\n'


def clusterings(run: Run) -> list[Clustering]:
    """Return the rounds in which clients were clustered or changed clusters, from the first with any cluster on."""
    shown: list[Clustering] = []
    last: tuple[int, ...] | None = None
    for entry in run.rounds:
        if entry.clusters is None:
            continue
        labels = tuple(max(label, NOBODY) for label in entry.clusters)
        computed = entry.protocol is not None and entry.protocol.columns > 0
        any_cluster = max(labels, default=NOBODY) > NOBODY
        if (shown or any_cluster) and (computed or labels != last):
            shown.append((entry.round, labels))
        last = labels
    return shown


def moves(before: Sequence[int], after: Sequence[int], name: Callable[[int], str] = str) -> str:
    """Return the clients that moved, in words: `client 4 from cluster 1 to 3; clients 5 and 6 into cluster 0`.

    Args:
        before, after: the number of each client's cluster, or NOBODY.
        name: says what a client is called.
    """
    moved: dict[tuple[int, int], list[str]] = {}
    for client, (old, new) in enumerate(zip(before, after, strict=True)):
        if old != new:
            moved.setdefault((old, new), []).append(name(client))
    routes = (
        f"into cluster {new}" if old < 0 else f"out of cluster {old}" if new < 0 else f"from cluster {old} to {new}"
        for old, new in moved
    )
    phrases = (f"{_clients(names)} {route}" for names, route in zip(moved.values(), routes, strict=True))
    return "; ".join(phrases) or "nobody"


def agreement(labels: Sequence[int], domains: Mapping[int, tuple[str, ...]]) -> float | None:
    """Return the adjusted Rand index (Hubert and Arabie, 1985) between clusters and domains.

    A client in no cluster counts as one of its own. None unless every client has one domain.
    """
    if not labels or any(len(domains.get(client, ())) != 1 for client in range(len(labels))):
        return None
    from sklearn.metrics import adjusted_rand_score  # slow to import

    alone = [label if label >= 0 else NOBODY - client for client, label in enumerate(labels)]
    return float(adjusted_rand_score([domains[client][0] for client in range(len(labels))], alone))


def _of_run(index: int, group: Group) -> str:
    run = min(group.runs, key=lambda candidate: candidate.summary.seed)
    history = clusterings(run)
    clients = Clients.of(run.summary.per_client)
    rounds = _over_rounds(index, group.label, history, clients) if history else ""
    distances = what_the_server_saw(index, group.label, run, clients)
    if not (rounds or distances):
        return ""
    seed = f"<p>Of the run with seed {run.summary.seed}, the first of {len(group.runs)} seeds.</p>\n"
    return f"<h3>{escape(group.label)}</h3>\n{seed if group.over_seeds else ''}{rounds}{distances}"


def _clients(names: Sequence[str]) -> str:
    return f"client{'' if len(names) == 1 else 's'} {listed(names)}"


def _count(labels: Sequence[int]) -> int:
    return len({label for label in labels if label >= 0})


def _over_rounds(index: int, label: str, history: Sequence[Clustering], clients: Clients) -> str:
    labels = history[-1][1]
    figure = _by_round(history, clients)
    present = _numbers(history)
    words = (
        f"Clusters of {counted(len(labels), 'client')} in {counted(len(history), 'round')}; the tables below say who "
        "is in which, and who moved."
    )
    unnumbered = len(figure["data"]) == 1
    legend = keys("Cluster", [("square", cluster_color(number), str(number)) for number in present if unnumbered])
    repeated = f" Colors repeat after {len(PALETTE)} clusters." if max(present) >= len(PALETTE) else ""
    steps = pairwise([(0, (NOBODY,) * len(labels)), *history])
    rows = [
        [
            f"{number} <small>({counted(_count(after), 'cluster')})</small>",
            f'<span class="words">{moves(before, after, clients.name)}</span>',
        ]
        for (_, before), (number, after) in steps
    ]
    table = html_table("Who changed clusters, by round.", ["Round", "Moved"], rows, f"Clusters by round, {label}")
    folded = "" if len(table) > _OPEN_TEXT else " open"
    return (
        f"<h4>Clusters over rounds</h4>\n<p>{_in_words(history, clients)}</p>\n"
        f"<figure>\n{legend}{place(f'clusters-{index}', figure, words)}<figcaption>Each row is a client, each column a "
        "round in which clusters were computed or changed. Colors are clusters, which keep their numbers from round "
        f"to round.{repeated}</figcaption>\n</figure>\n"
        f"<details{folded}><summary>Who moved</summary>\n{table}</details>\n{_at_the_end(label, labels, clients)}"
    )


def _numbers(history: Sequence[Clustering]) -> list[int]:
    """Return the numbers of all clusters, ascending."""
    return sorted({number for _, labels in history for number in labels if number >= 0})


def _in_words(history: Sequence[Clustering], clients: Clients) -> str:
    (first, start), (last, labels) = history[0], history[-1]
    text = f"{counted(_count(start), 'cluster')} in round {first}"
    if len(history) > 1:
        moved = sum(len(set(over_rounds)) > 1 for over_rounds in zip(*(row for _, row in history), strict=True))
        text += (
            f", {_count(labels)} in round {last}; {counted(moved, 'client') if moved else 'nobody'} moved on the way"
        )
    score = agreement(labels, clients.domains)
    if score is None:
        return text + "."
    alone = " A client in no cluster counts as one of its own." if NOBODY in labels else ""
    return (
        f"{text}. Adjusted Rand index between clusters and domains at the end: <strong>{score:.2f}</strong>; 1 is full "
        f"agreement, 0 what chance gives.{alone}"
    )


def _by_round(history: Sequence[Clustering], clients: Clients) -> Figure:
    """Return a heat map: rows are clients, columns rounds, and colors clusters."""
    present = _numbers(history)
    edges = [present[0] - 0.5, *((a + b) / 2 for a, b in pairwise(present)), present[-1] + 0.5]
    shares = [(edge - edges[0]) / (edges[-1] - edges[0]) for edge in edges]
    count = len(history[-1][1])
    few = numbered(count, len(history))
    heat = {
        "type": "heatmap",
        "x": list(range(len(history))),
        "y": [clients.name(client) for client in range(count)],
        "z": [
            [label if label >= 0 else None for label in row]
            for row in zip(*(labels for _, labels in history), strict=True)
        ],
        "customdata": [[clients.holding(client)] for client in range(count)],
        "text": [[str(number) for number, _ in history]],
        "zmin": edges[0],
        "zmax": edges[-1],
        "colorscale": [
            [share, cluster_color(number)]
            for number, ends in zip(present, pairwise(shares), strict=True)
            for share in ends
        ],
        "showscale": False,
        "hoverongaps": False,
        "hovertemplate": "client %{y}, round %{text}: cluster %{z}<br>%{customdata}<extra></extra>",
        "xgap": 2 if few else 0,
        "ygap": 2 if few else 0,
    }
    layout = client_layout(count, [str(number) for number, _ in history], clients.called(range(count)))
    layout["height"] -= 60  # without the long labels that columns of accuracies have
    step = tick_step(2 * len(history))
    axis = layout["xaxis"]
    axis |= {"tickvals": axis["tickvals"][::step], "ticktext": axis["ticktext"][::step], "title": {"text": "Round"}}

    def luminance_of(label: float) -> float:
        return luminance(bytes.fromhex(cluster_color(int(label))[1:]))

    return {"data": [heat, numbers(heat, str, luminance_of)] if few else [heat], "layout": layout}


def _at_the_end(label: str, labels: Sequence[int], clients: Clients) -> str:
    domains = clients.domains
    known, rows = any(domains.values()), []
    for number in sorted({*labels}, key=lambda label: (label < 0, label)):  # those in no cluster come last
        members = [client for client, label_of in enumerate(labels) if label_of == number]
        held = listed(dict.fromkeys(name for client in members for name in domains.get(client, ())))
        cells = [", ".join(clients.name(client) for client in members), *([escape(held)] if known else [])]
        words = [f'<span class="words">{cell}</span>' for cell in cells]
        name = str(number) if number >= 0 else "none"
        rows.append([f"{name} <small>({counted(len(members), 'client')})</small>", *words])
    head = ["Cluster", "Clients", *(["Domains"] if known else [])]
    return html_table("Clusters at the end.", head, rows, f"Clusters at the end, {label}")
