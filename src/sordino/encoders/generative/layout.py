"""The order of tokens in a dialog: text, picture, soft prompt, question, answer.

A template is plain text with `{image}`, `{question}` and `{answer}`, such as 'USER: {image}\\n{question} ASSISTANT:
{answer}'. It is filled in, never executed. Nothing follows the answer. Spaces before `{answer}` belong to the answer,
as tokenizers join them with the word that follows.

The whole dialog is tokenized at once. Picture and prompt are marked by the tokenizer's image token, which splits text
at that place for certain. So no token reaches over the border of a picture or of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sordino.errors import ConfigError, EncoderError

FIELDS = ("{image}", "{question}", "{answer}")
CARRIER = "a"  # a word by which the tokens that the tokenizer sets before a text are found


@dataclass(frozen=True)
class Layout:
    """Tokens of a dialog up to the answer, without those of the picture and of the prompt.

    Attributes:
        start: tokens before the first of picture and prompt.
        middle: tokens between the two.
        end: tokens after the second, up to the answer.
        image_first: whether the picture stands before the prompt.
    """

    start: tuple[int, ...]
    middle: tuple[int, ...]
    end: tuple[int, ...]
    image_first: bool

    def is_image(self, image_length: int, context_length: int, answer_length: int = 0) -> list[bool]:
        """Return for every token of a dialog whether it is one of the picture."""
        first, second = (image_length, context_length) if self.image_first else (context_length, image_length)
        marks = [False] * len(self.start) + [self.image_first] * first + [False] * len(self.middle)
        return marks + [not self.image_first] * second + [False] * (len(self.end) + answer_length)


@dataclass(frozen=True)
class Dialog:
    """A template with its question, read by a tokenizer.

    Attributes:
        tokenizer: of the checkpoint.
        template: text with `FIELDS`.
        question: the text of the question.
        image_text: the text of a picture: the image token once, with the tokens that stand around it.
        image_token: the image token's text.
        image_id: its number.
        image_first: whether the picture stands before the prompt.
        label: of the checkpoint, for messages.
    """

    tokenizer: Any
    template: str
    question: str
    image_text: str
    image_token: str
    image_id: int
    image_first: bool
    label: str

    def __post_init__(self) -> None:
        wrong = next((field for field in FIELDS if self.template.count(field) != 1), None)
        if wrong or not self.template.endswith(FIELDS[-1]) or self._places() != sorted(self._places()):
            remedy = "must have {image}, {question} and {answer} once each, in this order, with nothing behind"
            raise ConfigError("encoder.generative.template", self.template, remedy)
        if self.image_token in self.question:
            raise ConfigError(
                "encoder.generative.question", self.question, f"{self.image_token} stands for a picture; leave it out"
            )

    def layout(self) -> Layout:
        """Return the tokens of the dialog up to the answer.

        Raises:
            EncoderError: the tokenizer does not know the image token.
        """
        ids, pieces = self._ids(""), [[]]  # type: list[int], list[list[int]]
        for token in ids:
            if token == self.image_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
        if len(pieces) != 3:
            raise EncoderError(
                f"checkpoint {self.label!r}: its tokenizer reads {self.image_token!r} as other tokens than the model's "
                f"image token {self.image_id}; the tokenizer belongs to another model"
            )
        start, middle, end = (tuple(piece) for piece in pieces)
        return Layout((*self._start_tokens(), *start), middle, end, self.image_first)

    def asking(self, question: str) -> Dialog:
        """Return the same dialog with another question.

        Raises:
            ConfigError: the question holds the image token.
        """
        return replace(self, question=question)

    def answer(self, name: str) -> list[int]:
        """Return the tokens of an answer as they stand behind the dialog.

        Raises:
            EncoderError: the tokenizer joins the answer with the text before it.
        """
        before = self._ids("")
        whole = self._ids(name)
        if whole[: len(before)] != before:
            raise EncoderError(
                f"checkpoint {self.label!r}: its tokenizer joins the answer {name!r} with the text before it; end the "
                "text before {answer} in encoder.generative.template with a space or a line break"
            )
        return whole[len(before) :]

    def _places(self) -> list[int]:
        return [self.template.find(field) for field in FIELDS]

    def _ids(self, answer: str) -> list[int]:
        """Return the dialog's tokens, with the image token once for the picture and once for the prompt."""
        text = self.template.removesuffix(FIELDS[-1])
        bare = text.rstrip(" ")
        spaces = text[len(bare) :]
        image, question = self.image_text, self.question
        if self.image_first:
            question = self.image_token + question
        else:
            image = self.image_token + image
        text = bare.replace(FIELDS[0], image).replace(FIELDS[1], question) + (spaces + answer if answer else "")
        ids: list[int] = self.tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def _start_tokens(self) -> Sequence[int]:
        """Return the special tokens that the tokenizer sets before a text, unless the template begins with them."""
        bare: list[int] = self.tokenizer(CARRIER, add_special_tokens=False).input_ids
        framed: list[int] = self.tokenizer(CARRIER).input_ids
        for start in range(len(framed) - len(bare) + 1):
            if bare and framed[start : start + len(bare)] == bare:
                special = framed[:start]
                return () if self._ids("")[:start] == special else special
        raise EncoderError(f"checkpoint {self.label!r}: its tokenizer cannot read the word {CARRIER!r}: it is damaged")
