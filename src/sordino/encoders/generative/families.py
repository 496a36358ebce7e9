"""The families of vision-language models that are known here, with the dialog each was trained on."""

from __future__ import annotations

from dataclasses import dataclass

from sordino.encoders.generative.pictures import Idefics3Pictures, Pictures, QwenPictures


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        model_class: its name in transformers.
        decoder: the name of the language model in the model.
        template: the dialog of its published checkpoints.
        image_token: the text of the token that stands for each of a picture's tokens.
        image_text: the text of a picture, with the image token once.
        pictures: how its pictures are read.
    """

    model_class: str
    decoder: str
    template: str
    image_token: str
    image_text: str
    pictures: type[Pictures]


QWEN_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{image}{question}<|im_end|>\n"
    "<|im_start|>assistant\n{answer}"
)
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
IDEFICS_IMAGE = "<fake_token_around_image><global-img><image><fake_token_around_image>"

# By `model_type` of config.json.
FAMILIES = {
    "llava": Family(
        "LlavaForConditionalGeneration",
        "language_model",
        "USER: {image}\n{question} ASSISTANT: {answer}",
        "<image>",
        "<image>",
        Pictures,
    ),
    "idefics3": Family(
        "Idefics3ForConditionalGeneration",
        "text_model",
        "User:{image}{question}<end_of_utterance>\nAssistant: {answer}",
        "<image>",
        IDEFICS_IMAGE,
        Idefics3Pictures,
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        "text_model",
        "<|im_start|>User:{image}{question}<end_of_utterance>\nAssistant: {answer}",
        "<image>",
        IDEFICS_IMAGE,
        Idefics3Pictures,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration", "language_model", QWEN_TEMPLATE, "<|image_pad|>", QWEN_IMAGE, QwenPictures
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration", "language_model", QWEN_TEMPLATE, "<|image_pad|>", QWEN_IMAGE, QwenPictures
    ),
}
