"""`data.json`: the data, encoder and version that a run directory belongs to, as digests.

It is written before anything is trained. Whoever opens the directory again compares what is there now, and any
difference is refused: a resumed run would mix two data sets, and an audit would attack people who never took part.

A digest confirms a guess of a whole party's data, so `data.json` stays with its owner like the directory around it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sordino.errors import RunError
from sordino.files import write_atomically

FILE = "data.json"
NAMED = 4  # parties that a message lists by number

# Words of a message for each entry but the parties; an entry that is absent here is named by its key.
_WORDS = {
    "test": "the test pictures",
    "novel": "the test pictures of novel classes",
    "domain": "the test pictures of the held-out domain",
    "triggered": "the test pictures with a trigger",
    "persons": "whose the training pictures are",
    "public": "the pictures in data.public",
    "partition": "the partition (which example stands where)",
    "train": "the training examples",
    "tests": "the test examples",
    "embeddings": "the tokenizer or the embeddings of model.embeddings",
    "tower": "the private tower",
}


def set_digest(examples: Iterable[tuple[bytes, str]]) -> str:
    """SHA-256 in hex of a set of examples, each a content digest and a label; their order does not matter."""
    return sequence_digest(sorted(examples))


def sequence_digest(examples: Iterable[tuple[bytes, str]]) -> str:
    """SHA-256 in hex of examples in their order, each a content digest and a label."""
    whole = hashlib.sha256()
    for content, label in examples:
        # Lengths go first, so that no two lists of examples are one text.
        for part in (content, label.encode("utf-8", "surrogatepass")):
            whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()


def pin(folder: Path, record: Mapping[str, Any]) -> None:
    """Write a run's record where the run is new, else see that nothing changed.

    Raises:
        RunError: something did; the message says what. Or the record is missing or damaged.
    """
    if (folder / FILE).exists() or (folder / "config.toml").exists():
        check(folder, record)
    else:
        write_atomically(folder / FILE, (json.dumps(record, indent=2) + "\n").encode(), private=True)


def check(folder: Path, record: Mapping[str, Any]) -> None:
    """See that a run directory is of this data, encoder and version.

    Raises:
        RunError: see `pin`.
    """
    try:
        before = json.loads((folder / FILE).read_bytes())
        if not isinstance(before, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise RunError(
            f"{folder} has no {FILE}, so it cannot be known what it was trained on: an older version made it, or the "
            "file was removed; start a new run"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{folder / FILE} is damaged ({error}); put it back, or start a new run") from None
    changed = changes(before, json.loads(json.dumps(record)))
    if changed:
        raise RunError(
            f"not the same as when {folder} was started: {'; '.join(changed)}; put back what was there, or start a "
            "new run"
        )


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return in words what differs between two records; empty where they are equal."""
    differences = []
    if before.get("version") != after.get("version"):
        differences.append(f"sordino was {before.get('version')!r} and is {after.get('version')!r}")
    differences += _encoder_changes(before.get("encoder"), after.get("encoder"))
    differences += _party_changes(before.get("parties"), after.get("parties"))
    others = [key for key in dict.fromkeys((*after, *before)) if key not in ("version", "encoder", "parties")]
    different = [key for key in others if before.get(key) != after.get(key)]
    if differences and "partition" in different:
        different.remove("partition")  # it follows from the rest, and says nothing more
    return differences + [f"{_WORDS.get(key, key)} changed" for key in different]


def _encoder_changes(before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if not (isinstance(before, dict) and isinstance(after, dict)):
        return ["the encoder changed"]
    names = [
        f"{record.get('name')} {str(record.get('fingerprint'))[:12]} {record.get('dtype')}"
        for record in (before, after)
    ]
    return [f"the encoder was {names[0]} and is {names[1]}"]


def _party_changes(before: Any, after: Any) -> list[str]:
    if before == after:
        return []
    if not (isinstance(before, Sequence) and isinstance(after, Sequence)):
        return ["the training pictures changed"]
    if len(before) != len(after):
        return [f"there were {len(before)} clients and are {len(after)}"]
    changed = [number for number, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]]
    listed = ", ".join(map(str, changed[:NAMED])) + (f" and {len(changed) - NAMED} more" if changed[NAMED:] else "")
    return [f"the training pictures of client{'s' if len(changed) > 1 else ''} {listed} changed"]
