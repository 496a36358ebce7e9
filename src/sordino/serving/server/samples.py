"""Sample pictures for the page: of the bundled data sets, drawn as training saw them, or of the operator's folder."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from sordino.errors import ConfigError, DataError
from sordino.files import read_regular
from sordino.serving.manifest import Manifest
from sordino.serving.server.refusal import Refusal
from sordino.serving.server.settings import ServerSettings
from sordino.serving.server.uploads import read_picture
from sordino.tasks.settings import DataSettings
from sordino.tasks.sources import load_images

MOST = 12  # pictures of a prompt
MOST_FOLDERS = 100
MOST_BYTES = 4 << 20  # of a picture
THUMBNAIL = 96  # pixels of its longer side
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
OPERATORS = "Chosen by this server's operator."

# Data sets whose pictures are in packages that Sordino needs anyway, under licenses that allow to pass them on.
BUNDLED = {
    "digits": "Handwritten digits of scikit-learn (UCI, CC BY 4.0). Training may have used some of them.",
    "textile": "Simulated fabric of conformal-clip-data (MIT license). Training may have used some of it.",
}


@dataclass(frozen=True)
class Sample:
    """A picture that the page offers.

    Attributes:
        title: in words.
        content: the file, as it would be uploaded.
        thumbnail: a small PNG of it.
    """

    title: str
    content: bytes
    thumbnail: bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON, with the thumbnail alone."""
        return {"title": self.title, "thumbnail": "data:image/png;base64," + base64.b64encode(self.thumbnail).decode()}


class Samples:
    """The sample pictures of a server.

    Args:
        folder: pictures for all prompts, and folders of a prompt's name with pictures for this one; read once. None:
            those of the bundled data set that a prompt was trained on.
        settings: limits.

    Raises:
        ConfigError: there is no such folder, or no picture in it; one is damaged or too large; there are too many.
    """

    def __init__(self, folder: Path | None, settings: ServerSettings) -> None:
        self._own: dict[str, tuple[Sample, ...]] | None = None
        if folder is not None:
            self._own = _read_folder(folder, settings)

    def of(self, manifest: Manifest) -> tuple[str, Sequence[Sample]]:
        """Return where a prompt's samples are from, in words, and the samples; there may be none."""
        if self._own is not None:
            return OPERATORS, self._own.get(manifest.name, self._own.get("", ()))
        dataset = "" if manifest.training is None else manifest.training.dataset
        if dataset not in BUNDLED:
            return "", ()
        return BUNDLED[dataset], _bundled(dataset, manifest.class_names)


def _read_folder(folder: Path, settings: ServerSettings) -> dict[str, tuple[Sample, ...]]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        remedy = f"cannot be read ({error.strerror}); give a folder of pictures"
        raise ConfigError("--samples", str(folder), remedy) from None
    folders = [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    if len(folders) > MOST_FOLDERS:
        raise ConfigError("--samples", str(folder), f"has more than {MOST_FOLDERS} folders; one a prompt is enough")
    found = {"": _pictures(folder, entries, settings)}
    found |= {each.name: _pictures(each, sorted(each.iterdir()), settings) for each in folders}
    if not any(found.values()):
        raise ConfigError("--samples", str(folder), f"no picture in it; put files {', '.join(ENDINGS)} there")
    return {name: samples for name, samples in found.items() if samples}


def _pictures(folder: Path, entries: Sequence[Path], settings: ServerSettings) -> tuple[Sample, ...]:
    files = [entry for entry in entries if entry.suffix.lower() in ENDINGS and not entry.name.startswith(".")]
    if len(files) > MOST:
        raise ConfigError("--samples", str(folder), f"{len(files)} pictures; at most {MOST} are shown, leave some out")
    return tuple(_sample(file, settings) for file in files)


def _sample(file: Path, settings: ServerSettings) -> Sample:
    try:
        content = read_regular(file, min(MOST_BYTES, settings.most_bytes))
        picture = read_picture(content, settings, None)
    except OSError as error:
        raise ConfigError("--samples", str(file), f"cannot be read ({error.strerror}); leave it out") from None
    except DataError as error:
        raise ConfigError("--samples", str(file), f"{error}; leave it out") from None
    except Refusal as error:
        raise ConfigError("--samples", str(file), f"{error.reason}; leave it out") from None
    title = "".join(sign if sign.isprintable() else "?" for sign in file.stem.replace("_", " "))
    return Sample(title, content, _thumbnail(picture))


@cache
def _bundled(dataset: str, class_names: tuple[str, ...]) -> tuple[Sample, ...]:
    """Return the first picture of each of the classes, as the data set stores it."""
    images = load_images(DataSettings(source=dataset))
    labels = images.labels.tolist()
    samples = []
    for name in class_names[:MOST]:
        if name in images.class_names:
            picture = images.draw(images.read(labels.index(images.class_names.index(name))))
            samples.append(Sample(name, _png(picture), _thumbnail(picture)))
    return tuple(samples)


def _thumbnail(picture: Image.Image) -> bytes:
    """Return a small PNG, sharp where the picture itself is smaller."""
    scale = THUMBNAIL / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return _png(picture.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX))


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", optimize=True)
    return out.getvalue()
