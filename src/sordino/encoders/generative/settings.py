"""The settings of the encoder `generative`. This imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is in the picture?"
PLACES = ("before-image", "after-image")


class GenerativeSettings(BaseModel):
    """The `[encoder.generative]` table: the text around picture and prompt, and what is kept of a picture."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    question: str = Field(default=QUESTION, min_length=1, description="follows picture and prompt")
    prompt_place: Literal["before-image", "after-image"] = Field(
        default="after-image", description="where the prompt stands; the question follows both"
    )
    kept: Literal["keys-values", "image-tokens"] = Field(
        default="keys-values",
        description="of a picture: keys and values of all before the prompt, or its tokens; the same scores",
    )
    template: str | None = Field(
        default=None,
        description="a dialog with {image}, {question} and {answer}; absent: the one of the checkpoint's family",
    )
    image_size: int | None = Field(
        default=None, ge=1, description="Qwen: side in pixels of the square that pictures are scaled to; absent: 224"
    )
