"""A model owner's calibration, kept beside its certificates, so that a model is provided again in seconds.

To measure a tower's ranges takes a minute or two, and a server that restarts has lost its share. So ranges, plan and
name are kept. The name stays that of the model for as long as tower, embeddings and version do.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import sordino
from sordino.encoders.bundled import Embedder
from sordino.files import replace_file
from sordino.mpc.errors import MpcError
from sordino.mpc.parties.versions import PROTOCOL
from sordino.mpc.tower.calibration import Calibration
from sordino.mpc.tower.fixed_point_plan import FixedPointPlan
from sordino.mpc.tower.public_text import calibration_of
from sordino.mpc.tower.tower import PrivateTower
from sordino.progress import Progress, log, silent
from sordino.randomness import system_bytes


@dataclass(frozen=True)
class KeptModel:
    """The part that a model owner needs to provide a tower again.

    Attributes:
        name: random, 16 hexadecimal digits.
        calibration: the tower's ranges.
        plan: made of tower and ranges.
        kept: true if it was read from a file.
    """

    name: str
    calibration: Calibration
    plan: FixedPointPlan
    kept: bool = False


def kept_model(
    folder: Path, tower: PrivateTower, embedder: Embedder, sentences: int, progress: Progress = silent
) -> KeptModel:
    """Read what is kept of a tower, or measure its ranges and keep them.

    Args:
        folder: the model owner's own. The file in it reveals ranges of the tower's states and has mode 600.
        tower: in the clear.
        embedder: with the tower's tokenizer and embeddings.
        sentences: see `calibration_of`.
        progress: receives the number of sentences done.

    Raises:
        OutOfRange: see `calibration_of` and `FixedPointPlan.of`.
    """
    digest = _digest(tower, embedder, sentences)
    file = folder / f"calibration-{digest[:16]}.json"
    try:
        stored = json.loads(file.read_bytes())
        if stored["digest"] == digest:
            calibration, plan = Calibration.from_json(stored["calibration"]), FixedPointPlan.from_json(stored["plan"])
            return KeptModel(str(stored["name"]), calibration, plan, kept=True)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, MpcError) as error:
        log.warning("%s cannot be used (%s); the tower's ranges are measured again", file, type(error).__name__)
    calibration = calibration_of(tower, embedder, sentences, progress=progress)
    model = KeptModel(system_bytes(8).hex(), calibration, FixedPointPlan.of(tower, calibration))
    stored = {"digest": digest, "name": model.name, "calibration": calibration.to_json(), "plan": model.plan.to_json()}
    try:
        replace_file(file, json.dumps(stored).encode(), private=True)
    except OSError as error:
        log.warning("%s cannot be written (%s); to provide again will take as long", file, error.strerror or error)
    return model


def _digest(tower: PrivateTower, embedder: Embedder, sentences: int) -> str:
    """Return the SHA-256 of everything that a calibration depends on."""
    named = {f"norm.{number}": part for number, part in enumerate(tower.norm)}
    for number, layer in enumerate(tower.layers):
        named |= {f"{number}.{name}": part for name, part in layer.items()}
    named |= {"words": embedder.words, "positions": embedder.positions}
    form = [tower.heads, tower.epsilon, sentences, sordino.__version__, PROTOCOL, embedder.tokenizer.to_str()]
    whole = hashlib.sha256(json.dumps(form).encode())
    for name in sorted(named):
        part = named[name].detach().cpu().float().contiguous()
        whole.update(f"{name} {tuple(part.shape)}".encode() + part.numpy().tobytes())
    return whole.hexdigest()
