"""A saved prompt's free answers to pictures: text that a generative encoder writes, and not one of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from sordino.encoders.capabilities import Capability, with_capability
from sordino.encoders.encode import UNREADABLE, Skipped
from sordino.encoders.generative.encoder import GenerativeEncoder
from sordino.errors import DataError, PromptError
from sordino.experiments.use.predict import listed
from sordino.files import read_regular
from sordino.pictures.decoding import MAX_BYTES, decode
from sordino.progress import Progress, silent
from sordino.prompt_file import SavedPrompt


@dataclass(frozen=True)
class FreeAnswers:
    """Answers of a prompt's model to a question on pictures.

    Attributes:
        saved: the prompt.
        question: that was asked.
        answers: (picture, text) of those that could be read, in the order in which they were given or found.
        skipped: the pictures in folders that could not be read.
    """

    saved: SavedPrompt
    question: str
    answers: tuple[tuple[str, str], ...]
    skipped: tuple[Skipped, ...]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "prompt": self.saved.source,
            "method": self.saved.method,
            "encoder": self.saved.encoder.name,
            "statement": self.saved.privacy.statement,
            "question": self.question,
            "images": [{"image": name, "answer": text} for name, text in self.answers],
            "skipped": [{"image": skipped.name, "reason": skipped.reason} for skipped in self.skipped],
        }

    def as_text(self) -> str:
        """Return text for a terminal: a picture a line, and below it the answer."""
        lines = []
        for name, text in self.answers:
            lines.append(name)
            # A model may write anything, and a terminal would obey its control characters.
            shown = ["".join(sign if sign.isprintable() else " " for sign in line) for line in text.splitlines()]
            lines += [f"  {line}" for line in shown or ["(no text)"]]
        return "\n".join(lines)


def answer_freely(
    file: Path,
    pictures: Sequence[Path],
    checkpoint: str | None = None,
    question: str | None = None,
    most_tokens: int = 64,
    progress: Progress = silent,
) -> FreeAnswers:
    """Ask a prompt's model a question on each picture; the most probable token each time.

    Args:
        file: of the prompt.
        pictures: files, and folders, below which every picture is taken.
        checkpoint: the folder or hub name where the prompt's encoder is now; None: where it was in training.
        question: None: the one of the training.
        most_tokens: of an answer.
        progress: is told how many pictures are done.

    Raises:
        PromptError: the prompt's encoder writes no text; or see `SavedPrompt`.
        EncoderError: see `SavedPrompt`; or dialog and answer are longer than the model takes.
        ConfigError: a picture is not there, or a folder has none; or the question is not allowed.
        DataError: a file that was named cannot be read as a picture, or none in the folders can.
    """
    saved = SavedPrompt.load(file)
    if saved.encoder.generative is None:
        able = ", ".join(map(repr, with_capability(Capability.LIKELIHOODS)))
        raise PromptError(
            f"{file} belongs to encoder {saved.encoder.name!r}, which scores classes and writes no text; leave "
            f"--generate out, or give a prompt that was learned in encoder {able}"
        )
    named, paths = listed(pictures)  # before the encoder is loaded, which takes minutes
    classifier = saved.model(saved.load_encoder(checkpoint))
    encoder = cast("GenerativeEncoder", classifier.encoder)
    context = cast("Tensor", classifier.prompt)[0]
    answers: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    progress("ask about pictures", 0, len(paths))
    for done, path in enumerate(paths, 1):
        try:
            pixels = encoder.transform(decode(read_regular(path, MAX_BYTES), classifier.gray_range))
        except UNREADABLE as error:
            reason = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
            if str(path) in named:
                remedy = "leave it out, or give a picture that can be read"
                raise DataError(f"IMAGE = {str(path)!r}: {reason}; {remedy}") from None
            skipped.append(Skipped(str(path), reason))
        else:
            answers.append((str(path), encoder.generate(context, pixels, most_tokens, question)))
        progress("ask about pictures", done, len(paths))
    if not answers:
        first = f"{skipped[0].name}: {skipped[0].reason}"
        raise DataError(f"no picture can be read, of {len(paths)} tried; the first is {first}; give others")
    return FreeAnswers(saved, question or saved.encoder.generative.question, tuple(answers), tuple(skipped))
