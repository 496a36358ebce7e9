"""Write pictures to try things with: fabric from three plants, as a folder and a table.

    python examples/fabric.py fabric

360 of the 2,000 simulated pictures of woven fabric in conformal-clip-data (Megahed et al., 2025, arXiv 2501.12596) are
copied to `fabric/pictures`, and `fabric/labels.csv` says of each its label and its plant. Half of a plant's pictures
are of one class, and a quarter of each other.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

import conformal_clip_data as package

FOLDERS = {
    "intact fabric": package.nominal_dir,
    "fabric with a local defect": package.local_dir,
    "fabric with a global defect": package.global_dir,
}
PLANTS = ("north", "south", "west")
MOST, FEW = 60, 30  # pictures of a plant's commonest class, and of each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder")
    folder = parser.parse_args().folder
    (folder / "pictures").mkdir(parents=True)
    rows = []
    for number, (label, place) in enumerate(FOLDERS.items()):
        pictures = iter(sorted(Path(place()).iterdir()))
        for plant, site in enumerate(PLANTS):
            for _ in range(MOST if plant == number else FEW):
                name = f"pictures/{len(rows):03}.jpg"
                shutil.copyfile(next(pictures), folder / name)
                rows.append((name, label, site))
    with (folder / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("file", "label", "site"), *rows])
    print(f"{len(rows)} pictures of {len(FOLDERS)} classes from {len(PLANTS)} plants in {folder}")


if __name__ == "__main__":
    main()
