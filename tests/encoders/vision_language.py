"""Randomly initialized vision-language checkpoints in a folder, as a user would have them from the hub.

Shared by the tests here and by `benchmarks/generative.py`; nothing is downloaded. Weights
are larger than usual initial ones, so that scores differ and every layer matters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessorPil,
)

FAMILIES = ("llava", "idefics3", "smolvlm", "qwen2_vl", "qwen2_5_vl")
NAMES = ("cat", "catfish", "dog", "red-winged blackbird", "grand piano")
WORDS = (
    *NAMES,
    *("a photo of a", "What is in the picture?", "USER: ASSISTANT:", "User: Assistant:", "system user assistant"),
    "You are a helpful assistant.",
)
SPECIAL = {
    "llava": ["<unk>", "<s>", "</s>", "<image>"],
    "idefics": ["<unk>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>"],
    "qwen": ["<unk>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<video>"],
}
VOCABULARY = 400
TEXT = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of byte pairs: LLaVA's marks spaces and sets a start token, the others' are of bytes."""
    special = SPECIAL[kind]
    learned = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "llava":
        learned.pre_tokenizer, learned.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        alphabet = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.?!:-'▁\n"]
        learned.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    else:
        learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        learned.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 20, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    learned.train_from_iterator(WORDS, trainer)
    ends = {"eos_token": special[2], "pad_token": "<unk>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=learned, **ends)


def save_vision_language(folder: Path, family: str, **text: Any) -> Path:
    """Save a small checkpoint of a family: model, tokenizer and image processor; `text` changes its language model."""
    kind = "llava" if family == "llava" else "qwen" if family.startswith("qwen") else "idefics"
    words = tokenizer(kind)
    torch.manual_seed(0)
    model, processor = {"llava": _llava, "idefics": _idefics, "qwen": _qwen}[kind](family, words, TEXT | text)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.7 / weight[0].numel() ** 0.5)
        model.get_input_embeddings().weight.normal_(std=0.5)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _llava(family: str, words: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 32, "patch_size": 8} | tower,
        text_config={"model_type": "llama"} | text,
        image_token_index=words.convert_tokens_to_ids("<image>"),
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return LlavaForConditionalGeneration(config).eval(), processor


def _idefics(family: str, words: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any]:
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config_class, model_class, processor_class = {
        "idefics3": (Idefics3Config, Idefics3ForConditionalGeneration, Idefics3ImageProcessorPil),
        "smolvlm": (SmolVLMConfig, SmolVLMForConditionalGeneration, SmolVLMImageProcessorPil),
    }[family]
    config = config_class(
        vision_config={"image_size": 32, "patch_size": 8} | tower,
        text_config={"model_type": "llama"} | text,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=family == "smolvlm",  # as small published ones have it
    )
    processor = processor_class(size={"longest_edge": 64}, max_image_size={"longest_edge": 32})
    return model_class(config).eval(), processor


def _qwen(family: str, words: PreTrainedTokenizerFast, text: dict[str, Any]) -> tuple[Any, Any]:
    sizes = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config_class, model_class, vision = {
        "qwen2_vl": (
            Qwen2VLConfig,
            Qwen2VLForConditionalGeneration,
            {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
        ),
        "qwen2_5_vl": (
            Qwen2_5_VLConfig,
            Qwen2_5_VLForConditionalGeneration,
            {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "window_size": 16}
            | {"fullatt_block_indexes": [1]},
        ),
    }[family]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    config = config_class(
        vision_config=sizes | vision,
        text_config=text | {"rope_parameters": rope},
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<video>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=family == "qwen2_vl",  # as small published ones have it
    )
    processor = Qwen2VLImageProcessorPil(patch_size=4, temporal_patch_size=2, merge_size=2)
    return model_class(config).eval(), processor
