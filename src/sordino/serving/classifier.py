"""`PromptClassifier`: answers with one published prompt, for whoever serves it with a server of their own.

What does not depend on a picture is computed once: the class features of the prompt, and of the hand-written words that
it is compared with. What leaves is the most probable classes and rounded probabilities; features and logits stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sordino.encoders.base import DualEncoder
from sordino.encoders.classifier import Classifier, told
from sordino.encoders.encode import forward
from sordino.encoders.generative.model import context_model
from sordino.encoders.prompt_model import Prompt, PromptModel, map_prompt
from sordino.errors import ConfigError, DataError, EncoderError, PromptError, SordinoError
from sordino.files import read_regular
from sordino.pictures.decoding import MAX_BYTES, decode
from sordino.prompt_file import SavedPrompt
from sordino.serving.folder import read_folder
from sordino.serving.manifest import CHANGED, PROMPT, Manifest
from sordino.serving.registry import Published, Registry
from sordino.serving.trust import Trusted

WORDS = "a photo of a"  # hand-written, where the training's are not known
MOST_DIGITS = 6

Picture = bytes | Path | str | Image.Image


@dataclass(frozen=True)
class Answer:
    """The classes of one picture.

    Attributes:
        classes: the most probable ones with their rounded probabilities, the first one first; of those that rounding
            makes equal, the first in the prompt's order.
        zero_shot: the same of the hand-written prompt; None if it was not asked for.
    """

    classes: tuple[tuple[str, float], ...]
    zero_shot: tuple[tuple[str, float], ...] | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        told = {"classes": _listed(self.classes)}
        return told if self.zero_shot is None else told | {"zero_shot": _listed(self.zero_shot)}


class PromptClassifier:
    """One prompt in its encoder, ready to answer.

    Args:
        saved: the prompt.
        encoder: that it belongs to; several prompts may share one. None: load it.
        manifest: of the published version that it is.
        words: before the class name, of the hand-written prompt; None: those of the training.
        checkpoint: the folder or hub name where the encoder is now, if it is loaded here.
        device: "auto", "cpu", "cuda" or "mps", if it is loaded here.

    Raises:
        EncoderError: the encoder is not ready, or another one.
        PromptError: the prompt sorts no pictures, or does not fit its method.
    """

    def __init__(
        self,
        saved: SavedPrompt,
        encoder: DualEncoder | None = None,
        manifest: Manifest | None = None,
        words: str | None = None,
        checkpoint: str | None = None,
        device: str = "auto",
    ) -> None:
        self.saved, self.manifest = saved, manifest
        if encoder is None and saved.task == "images":
            encoder = saved.load_encoder(checkpoint, device)
        self._classifier: Classifier = saved.model(encoder)
        training = None if manifest is None else manifest.training
        self.words = words or (training and training.words) or WORDS
        self._model = self._classifier.model
        self._prompt = map_prompt(self._classifier.prompt, lambda part: part.to(self.encoder.device))
        with torch.inference_mode():
            self._features = self._model.class_features(self._prompt)
        self._hand_written: tuple[PromptModel, Prompt, Tensor] | None = None

    @classmethod
    def from_registry(
        cls,
        name: str,
        version: int | None = None,
        registry: str | Registry | None = None,
        trusted: Trusted | None = None,
        **options: Any,
    ) -> PromptClassifier:
        """Load a published version, with everything checked; see `Registry.load`.

        Args:
            name: of the prompt.
            version: None: the latest that is not withdrawn.
            registry: it, or its URL; None: `$SORDINO_REGISTRY`, or `sqlite:///prompts.db`.
            trusted: publishers; None: those of the user's configuration.
            options: `encoder`, `words`, `checkpoint`, `device`, see the class.

        Raises:
            ConfigError, PromptError, RunError, EncoderError: see `Registry.load` and the class.
        """
        if isinstance(registry, Registry):
            return cls.from_published(registry.load(name, version, trusted), **options)
        with Registry(registry) as opened:
            return cls.from_published(opened.load(name, version, trusted), **options)

    @classmethod
    def from_folder(cls, folder: Path | str, trusted: Trusted | None = None, **options: Any) -> PromptClassifier:
        """Load an exported folder, with everything checked; see `read_folder` and `from_registry`."""
        found = read_folder(Path(folder), Trusted.of() if trusted is None else trusted)
        return cls.from_published(found, **options)

    @classmethod
    def from_file(cls, file: Path | str, **options: Any) -> PromptClassifier:
        """Load a prompt's file of a run directory, which nobody signed; see `from_registry`."""
        return cls(SavedPrompt.load(file), **options)

    @classmethod
    def from_published(cls, found: Published, **options: Any) -> PromptClassifier:
        """Make a classifier of a version that was checked.

        Raises:
            PromptError: it is withdrawn, or its prompt is not what its manifest says.
        """
        if found.withdrawn is not None:
            raise PromptError(f"{found.place}: is withdrawn ({found.withdrawn.reason}); take another version")
        return cls(described(found), manifest=found.manifest, **options)

    @property
    def encoder(self) -> DualEncoder:
        """The frozen encoder."""
        return self._classifier.encoder

    @property
    def class_names(self) -> tuple[str, ...]:
        """The C classes, in the prompt's order."""
        return self._classifier.class_names

    def pixels(self, picture: Picture) -> Tensor:
        """Return the pixels [3, H, W] of one picture, as the encoder takes them.

        Args:
            picture: a file's content, or its path, in any format that training reads; or a picture of Pillow, upright
                and opaque with 8 bits a channel.

        Raises:
            DataError: it cannot be read; the message is the reason.
        """
        if isinstance(picture, Path | str):
            try:
                picture = read_regular(Path(picture), MAX_BYTES)
            except OSError as error:
                raise DataError((error.strerror or str(error)).lower()) from None
        image = decode(picture, self.saved.gray_range) if isinstance(picture, bytes) else picture
        try:
            return self.encoder.transform(image)
        except (OSError, ValueError) as error:  # a size that no transform can bring to the encoder's
            raise DataError(" ".join(str(error).split()) or type(error).__name__) from None

    def classify(
        self, pictures: Sequence[Picture], top: int = 5, digits: int = 2, zero_shot: bool = False
    ) -> list[Answer]:
        """Classify a batch of pictures; see `pixels` and `answer`.

        Raises:
            DataError: one cannot be read; the message counts it from 1.
        """
        if isinstance(pictures, bytes | Path | str | Image.Image):
            raise ConfigError("pictures", type(pictures).__name__, "must be a list of pictures")
        rows = []
        for number, picture in enumerate(pictures, 1):
            try:
                rows.append(self.pixels(picture))
            except SordinoError as error:
                raise DataError(f"picture {number}: {error}; leave it out, or give one that can be read") from None
        return self.answer(torch.stack(rows), top, digits, zero_shot) if rows else []

    def answer(self, pixels: Tensor, top: int = 5, digits: int = 2, zero_shot: bool = False) -> list[Answer]:
        """Answer to pixels [B, 3, H, W].

        Args:
            pixels: of B pictures, see `pixels`.
            top: how many classes of each; of those that are equal once rounded, the first in the prompt's order.
            digits: of probabilities behind the point; fewer tell less of the prompt.
            zero_shot: also what the hand-written prompt says.

        Raises:
            ConfigError: `top` or `digits` is out of range.
            EncoderError: the encoder gives features that are not finite.
        """
        if top < 1:
            raise ConfigError("top", top, "at least one class")
        if not 1 <= digits <= MOST_DIGITS:
            raise ConfigError("digits", digits, f"must be 1 to {MOST_DIGITS}")
        learned, written = self.probabilities(pixels, zero_shot)
        told = [_ranked(self.class_names, row, top, digits) for row in learned]
        if written is None:
            return [Answer(classes) for classes in told]
        others = [_ranked(self.class_names, row, top, digits) for row in written]
        return [Answer(classes, other) for classes, other in zip(told, others, strict=True)]

    @torch.inference_mode()
    def probabilities(self, pixels: Tensor, zero_shot: bool = False) -> tuple[Tensor, Tensor | None]:
        """Return probabilities [B, C] of pixels [B, 3, H, W], and the hand-written prompt's, on the CPU.

        These are exact. Do not hand them on where the prompt must not be copied; `answer` rounds them.

        Raises:
            EncoderError: the encoder gives features that are not finite.
        """
        read = self._classifier.features(pixels)
        learned = self._scored(self._model, self._prompt, self._features, read)
        if not zero_shot:
            return learned, None
        model, prompt, features = self._zero_shot()
        images = read
        if self._model.reads != model.reads:
            images = forward(self.encoder, model.reads, pixels.to(self.encoder.device)).float()
        return learned, self._scored(model, prompt, features, images)

    def _scored(self, model: PromptModel, prompt: Prompt, features: Tensor, images: Tensor) -> Tensor:
        """Return probabilities [B, C] of what a model reads of B pictures, with its class features at hand."""
        pieces = images.split(model.images_at_once(1))
        logits = torch.cat([model.scores(features, prompt, piece[None])[0] for piece in pieces])
        if not logits.isfinite().all():
            raise EncoderError(f"encoder {self.encoder.name!r} gives features that are not finite in this precision")
        return logits.float().softmax(-1).cpu()

    def _zero_shot(self) -> tuple[PromptModel, Prompt, Tensor]:
        """Return the hand-written prompt's model, prompt and class features; computed when first asked for."""
        if self._hand_written is None:
            model = context_model(self.encoder, self.encoder.class_tokens(self.class_names))
            prompt = self.encoder.embed(self.words)[None].to(self.encoder.device)
            self._hand_written = (model, prompt, model.class_features(prompt))
        return self._hand_written


def described(found: Published) -> SavedPrompt:
    """Return the prompt of a version, if it is the one that the manifest describes.

    Raises:
        PromptError: it is damaged, or another one.
    """
    saved = SavedPrompt.from_bytes(found.files[PROMPT], found.place)
    manifest = found.manifest
    said = (
        *(manifest.method, manifest.task, manifest.client, manifest.class_names),
        *(manifest.encoder.name, manifest.encoder.fingerprint),
        *(manifest.privacy.private, manifest.privacy.simulated, manifest.privacy.statement),
    )
    holds = (
        *(saved.method, saved.task, saved.client, saved.class_names),
        *(saved.encoder.name, saved.encoder.fingerprint),
        *(saved.privacy.private, saved.privacy.simulated, saved.privacy.statement),
    )
    if said != holds:
        raise PromptError(f"{found.place}: {PROMPT} is another one than the manifest describes: {CHANGED}")
    return saved


def _ranked(names: Sequence[str], row: Tensor, top: int, digits: int) -> tuple[tuple[str, float], ...]:
    """Return the most probable classes by name; see `told`."""
    return tuple((names[index], probability) for index, probability in told(row, top, digits))


def _listed(classes: Sequence[tuple[str, float]]) -> list[dict[str, Any]]:
    return [{"class": name, "probability": probability} for name, probability in classes]
