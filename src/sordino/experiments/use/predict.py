"""A saved prompt's answers to pictures: files, and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sordino.encoders.classifier import Classifier, Prediction
from sordino.encoders.encode import Skipped
from sordino.errors import ConfigError, DataError
from sordino.pictures.decoding import remedy, suffixes
from sordino.progress import Progress, silent
from sordino.prompt_file import SavedPrompt
from sordino.tasks.passed_over import is_junk

AT_ONCE = 256  # pictures that are held in memory


@dataclass(frozen=True)
class Predictions:
    """The answers of a prompt.

    Attributes:
        saved: the prompt.
        predictions: of the pictures that could be read, in the order in which they were given or found.
        skipped: the pictures in folders that could not be read.
    """

    saved: SavedPrompt
    predictions: tuple[Prediction, ...]
    skipped: tuple[Skipped, ...]

    def as_dict(self, top: int) -> dict[str, Any]:
        """For `--json`, with the `top` most probable classes of each picture."""
        return {
            "prompt": self.saved.source,
            "method": self.saved.method,
            "encoder": self.saved.encoder.name,
            "words": self.saved.words,
            "statement": self.saved.privacy.statement,
            "images": [
                {
                    "image": prediction.name,
                    "classes": [
                        {"class": name, "probability": probability}
                        for name, probability in islice(prediction.probabilities.items(), top)
                    ],
                }
                for prediction in self.predictions
            ],
            "skipped": [{"image": skipped.name, "reason": skipped.reason} for skipped in self.skipped],
        }

    def as_text(self, top: int) -> str:
        """Return text for a terminal: a picture a line, and below it its `top` most probable classes.

        A prompt of words stands before them.
        """
        lines = [] if self.saved.words is None else [f"Prompt: {self.saved.words} CLASS"]
        for prediction in self.predictions:
            lines.append(prediction.name)
            lines += [f"  {value:7.2%}  {name}" for name, value in islice(prediction.probabilities.items(), top)]
        return "\n".join(lines)


def predict(
    file: Path, pictures: Sequence[Path], checkpoint: str | None = None, progress: Progress = silent
) -> Predictions:
    """Rank the classes of pictures by a saved prompt.

    Args:
        file: of the prompt.
        pictures: files, and folders, below which every picture is taken.
        checkpoint: the folder or hub name where the prompt's encoder is now; None: where it was in training.
        progress: is told how many pictures are done.

    Raises:
        PromptError, EncoderError: see `SavedPrompt`.
        ConfigError: a picture is not there, or a folder has none.
        DataError: a file that was named cannot be read as a picture, or none in the folders can.
    """
    saved = SavedPrompt.load(file)
    named, paths = listed(pictures)  # before the encoder is loaded, which takes seconds
    classifier = saved.model(saved.load_encoder(checkpoint))
    predictions: list[Prediction] = []
    skipped: list[Skipped] = []
    progress("classify pictures", 0, len(paths))
    for start in range(0, len(paths), AT_ONCE):
        chunk = paths[start : start + AT_ONCE]
        _classify(classifier, chunk, named, predictions, skipped)
        progress("classify pictures", start + len(chunk), len(paths))
    if not predictions:
        first = f"{skipped[0].name}: {skipped[0].reason}"
        raise DataError(f"no picture can be read, of {len(paths)} tried; the first is {first}; give others")
    return Predictions(saved, tuple(predictions), tuple(skipped))


def _classify(
    classifier: Classifier,
    paths: Sequence[Path],
    named: set[str],
    predictions: list[Prediction],
    skipped: list[Skipped],
) -> None:
    """Add the predictions of some pictures, and the pictures that cannot be read."""
    answers, unreadable = classifier.ranked(paths)
    for picture in unreadable:
        if picture.name in named:
            raise DataError(
                f"IMAGE = {picture.name!r}: {picture.reason}; leave it out, or give a picture that can be read"
            )
    predictions += answers
    skipped += unreadable


def listed(given: Sequence[Path]) -> tuple[set[str], list[Path]]:
    """The files that were named, and these with the pictures below folders that were named, sorted by folder."""
    named: set[str] = set()
    paths: list[Path] = []
    for path in given:
        if path.is_dir():
            inside = sorted(picture for picture in path.rglob("*") if _is_picture(picture, path))
            if not inside:
                endings = ", ".join(sorted(suffixes())[:4])
                raise ConfigError("IMAGE", str(path), f"no picture in this folder or below it ({endings}, ...)")
            paths += inside
        elif path.exists():
            if install := remedy(path.suffix.lower()):
                raise ConfigError("IMAGE", str(path), f"this installation cannot read {path.suffix}: {install}")
            named.add(str(path))
            paths.append(path)
        else:
            raise ConfigError("IMAGE", str(path), "no such file or folder; give pictures, or folders of them")
    return named, paths


def _is_picture(path: Path, root: Path) -> bool:
    """Return whether a path below a folder is one of its pictures: of a known ending, and not hidden or a system's."""
    parts = path.relative_to(root).parts
    if any(part.startswith(".") or is_junk(part) for part in parts):
        return False
    return path.suffix.lower() in suffixes() and path.is_file()
