"""Draw a page of a report as a picture, with a Chromium that is installed.

python docs/figures/screenshot.py runs/compared/report.html docs/images/tutorial-compared.png --height 1400
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SECONDS = 8  # of the page's own time, in which figures are drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, help="an HTML file")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    parser.add_argument("--width", type=int, default=1200, help="in pixels")
    parser.add_argument("--height", type=int, default=1000, help="in pixels")
    chosen = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed; install one")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [f"--user-data-dir={profile}", f"--virtual-time-budget={SECONDS * 1000}"]
        command += [f"--window-size={chosen.width},{chosen.height}", f"--screenshot={chosen.picture.resolve()}"]
        subprocess.run([*command, chosen.page.resolve().as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
