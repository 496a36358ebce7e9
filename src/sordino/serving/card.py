"""The card of a published prompt: a README.md in the layout of Hugging Face, front matter and text."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from sordino.serving.manifest import NOT_ATTACKED, WITHOUT_RUN, Accuracies, Manifest

CLASSES_NAMED = 200
JOINERS = "\u200c\u200d"  # of Persian and of emoji


def card(manifest: Manifest, others: Sequence[str]) -> str:
    """Return the card of a version in Markdown, with YAML front matter.

    Args:
        manifest: of the version; its files need not be there yet.
        others: names of the files beside the card.
    """
    tags = ["sordino", "prompt-learning", "federated-learning", manifest.method]
    tags += ["differential-privacy"] if manifest.privacy.epsilon and not manifest.mark else []
    tags += [manifest.mark.lower().replace(", ", "-").replace(" ", "-")] if manifest.mark else []
    front: dict[str, Any] = {
        "library_name": "sordino",
        "pipeline_tag": "image-classification" if manifest.task == "images" else "text-classification",
        "tags": tags,
        "encoder": manifest.encoder.name,
        "encoder_fingerprint": manifest.encoder.fingerprint,
    }
    # A value of JSON is one of YAML too, and no text in it can end the front matter.
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]
    lines += [f"# {manifest.name}, version {manifest.version}", ""]
    lines += [f"**{manifest.mark}.**", ""] if manifest.mark else []
    owner = "shared by all clients" if manifest.client is None else f"client {manifest.client}'s own"
    kind = "pictures" if manifest.task == "images" else "sentences"
    lines += [
        f"A learned prompt ({owner}) for the frozen encoder `{_code(manifest.encoder.name)}`. It sorts {kind} into "
        f"{len(manifest.class_names)} classes. The method is `{_code(manifest.method)}`.",
        "",
        *([] if manifest.words is None else [f"The prompt is the words “{_plain(manifest.words)} CLASS”.", ""]),
        "## Privacy",
        "",
        _plain(manifest.privacy.statement),
        "",
        *_audit(manifest),
        *_training(manifest),
        "## Classes",
        "",
        _classes(manifest.class_names),
        "",
        "## Use",
        "",
        *_use(manifest),
        "",
        "## Origin",
        "",
        f"Published at {manifest.created}. Signed with Ed25519 by the key `{manifest.publisher}`. The signature covers "
        f"`manifest.json`, which names the SHA-256 of {', '.join(f'`{name}`' for name in others)} and of this card.",
        "",
    ]
    return "\n".join(lines)


def _audit(manifest: Manifest) -> list[str]:
    if manifest.audit is None:
        return [WITHOUT_RUN if manifest.attacks == "unknown" else NOT_ATTACKED, ""]
    lines = ["| attack | found | epsilon is at least |", "|---|---|---|"]
    for name, attack in manifest.audit.attacks.items():
        bound = "" if attack.epsilon is None else f"{attack.epsilon:.3g}"
        lines.append(f"| {_plain(name)} | {'; '.join(map(_plain, attack.found))} | {bound} |")
    told = ["**An attack contradicts the claim.**", ""] if manifest.audit.refuted else []
    return [*lines, "", *told]


def _training(manifest: Manifest) -> list[str]:
    training = manifest.training
    if training is None:
        return []
    lines = [
        "## Training",
        "",
        f"Data set {_plain(training.dataset)}, {training.clients} clients, {training.rounds} rounds.",
        "",
    ]
    whose = "this client" if training.of == "client" else "mean over clients"
    rows = [(f"learned ({whose})", training.accuracy)]
    if training.hand_written is not None:
        words = "hand-written" if training.words is None else f"hand-written: {training.words}"
        rows.append((words, training.hand_written))
    lines += ["| prompt | local | neighbor | overall |", "|---|---|---|---|"]
    lines += [f"| {_plain(name)} | {' | '.join(_shares(accuracy))} |" for name, accuracy in rows]
    return [*lines, "", "Accuracy on test pictures; local are a client's own classes, neighbor the others.", ""]


def _shares(accuracy: Accuracies) -> list[str]:
    values = (accuracy.local, accuracy.neighbor, accuracy.overall)
    return ["" if value is None else f"{value:.1%}" for value in values]


def _classes(names: Sequence[str]) -> str:
    shown = ", ".join(_plain(name) for name in names[:CLASSES_NAMED])
    more = len(names) - CLASSES_NAMED
    return f"{shown}, and {more} more in `manifest.json`" if more > 0 else shown


def _use(manifest: Manifest) -> list[str]:
    if manifest.task != "images":
        return ["Two servers hold the text tower that this prompt belongs to; it is of no use without them."]
    return [
        "```python",
        "import sordino",
        "",
        'classifier = sordino.load_prompt("prompt.safetensors").model()',
        'print(classifier.classify("picture.jpg")[0].best)',
        "```",
    ]


def _plain(text: str) -> str:
    """Return text that Markdown shows as it is, in one line, whatever is in it."""
    line = " ".join("".join(sign if sign.isprintable() or sign in JOINERS else " " for sign in text).split())
    line = html.escape(line, quote=False)
    return "".join(f"\\{sign}" if sign in "\\`*_[]|!~" else sign for sign in line)


def _code(text: str) -> str:
    return text.replace("`", "'")
