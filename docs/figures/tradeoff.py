"""Draw the curves of docs/privacy.md from the tables on that page: `python docs/figures/tradeoff.py`.

Each subsection that has tables of accuracy by epsilon gets one picture beside this file, a panel for each table.
"""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PAGE = HERE.parent / "privacy.md"
TABLE = re.compile(r"^(\w+) accuracy by epsilon.*?:\n\n((?:\|.*\n)+)", re.MULTILINE)
COLORS = {"promptfl": "#555555", "dp-fpl-full": "#b35806", "dplora": "#1a6faf", "dp-fpl": "#2f8f4e"}
MARKERS = {"": "o", "1": "v", "2": "^", "4": "s", "8": "D"}


def main() -> None:
    """Draw every picture anew."""
    mpl.rcParams.update({"svg.hashsalt": "sordino", "svg.fonttype": "none", "font.size": 9})
    for section in re.split(r"^### ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        tables = TABLE.findall(section)
        if tables:
            slug = re.sub(r"\W+", "-", title.lower()).strip("-")
            draw(tables, HERE / f"tradeoff-{slug}.svg")


def draw(tables: list[tuple[str, str]], path: Path) -> None:
    """One panel a table, a line a row."""
    figure, panels = plt.subplots(1, len(tables), figsize=(4.6 * len(tables), 4.2), sharey=True, squeeze=False)
    for panel, (measure, table) in zip(panels[0], tables, strict=True):
        header, _, *rows = ([cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines())
        for algorithm, rank, *cells in rows:
            values = [[float(number) for number in cell.split("±")] for cell in cells]
            label = f"{algorithm}, rank {rank}" if rank else algorithm
            panel.errorbar(
                range(len(values)),
                [value[0] for value in values],
                [value[1] for value in values],
                label=label,
                color=COLORS[algorithm],
                marker=MARKERS[rank],
                markersize=4,
                linewidth=1,
                elinewidth=0.5,
                linestyle="--" if algorithm == "dplora" else "-",
            )
        panel.set(title=f"{measure} accuracy, percent", xlabel="epsilon", ylim=(0, None))
        panel.set_xticks(range(len(header) - 2), header[2:])
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    main()
