"""A configuration of `tune-private` on six sentences, whose search takes no time."""

from __future__ import annotations

from pathlib import Path


def write_private_config(folder: Path, generations: int | None = None) -> Path:
    """Write a configuration, and the sentences that it reads, in a folder; return the configuration's path."""
    (folder / "data.tsv").write_text("sentence\tlabel\n" + "good\t1\nbad\t0\n" * 3)
    file = folder / "private.toml"
    file.write_text(f"""
        [task]
        kind = "text"
        train = "{folder}/data.tsv"
        test = "{folder}/data.tsv"
        label_names = ["negative", "positive"]
        descriptions = ["bad", "good"]
        shots = 1
        [prompt]
        length = 1
        initial = "it was"
        [search]
        width = 2
        population = 4
        {"" if generations is None else f"generations = {generations}"}
    """)
    return file
