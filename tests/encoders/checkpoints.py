"""Randomly initialized CLIP and SigLIP checkpoints in a folder, as a user would have them from the hub.

Shared by the tests here and by `benchmarks/text_tower.py`; nothing is downloaded.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

WORDS = ["a photo of a", "cat", "dog", "sunflower", "red-winged blackbird", "grand piano", "the", "picture", "."]
END = "</w>"


def clip_tokenizer(words: Iterable[str], vocabulary: int, merges: int = 400) -> CLIPTokenizer:
    """A CLIP tokenizer with byte-pair merges learned from `words`; its start and end tokens are the two highest.

    Args:
        vocabulary: how many tokens the text tower knows; ids between the learned ones and the last two stay unused.
        merges: at most so many merges, so that frequent words become one token and rare ones a few.
    """
    splitter = CLIPTokenizer()._tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix=END))
    learner.normalizer, learner.pre_tokenizer = splitter.normalizer, splitter.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix=END, show_progress=False
    )
    learner.train_from_iterator(words, trainer)
    learned = sorted(learner.get_vocab(), key=learner.get_vocab().__getitem__)
    tokens = [*alphabet, *(letter + END for letter in alphabet)]
    tokens += [token for token in learned if token not in set(tokens)]
    ids = {token: at for at, token in enumerate(tokens)} | {
        "<|startoftext|>": vocabulary - 2,
        "<|endoftext|>": vocabulary - 1,
    }
    assert len(ids) <= vocabulary, f"{len(ids)} tokens do not fit into a vocabulary of {vocabulary}"
    pairs = [(left, right) for left, right in _merges(learner) if left in ids and right in ids]
    return CLIPTokenizer(vocab=ids, merges=pairs)


def _merges(learner: Tokenizer) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]]


def save_clip(
    folder: Path,
    words: Iterable[str] = WORDS,
    *,
    old_end: bool = False,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    projection: int = 24,
    merges: int = 60,
) -> Path:
    """Save a small CLIP; `text` and `vision` change its towers, `old_end` writes old checkpoints' eos_token_id."""
    text = _text(vocab_size=700, max_position_embeddings=77, hidden_act="quick_gelu") | (text or {})
    vocabulary = text["vocab_size"]
    ends = {"bos_token_id": vocabulary - 2, "eos_token_id": 2 if old_end else vocabulary - 1}
    config = CLIPConfig(
        text_config=text | ends,
        vision_config=_vision(hidden_act="quick_gelu") | (vision or {}),
        projection_dim=projection,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    clip_tokenizer(words, vocabulary, merges).save_pretrained(folder)
    size = config.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(
        folder
    )
    return folder


def siglip_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of 80 tokens that, as SigLIP's, lower-cases, drops punctuation, and adds '</s>'."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex(r"[.\-]"), "")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "</s>"]
    letters = [*"abcdefghijklmnopqrstuvwxyz▁"]
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def save_siglip(folder: Path, words: Iterable[str] = WORDS) -> Path:
    """Save a small SigLIP with the tokenizer of `siglip_tokenizer`."""
    config = SiglipConfig(
        text_config=_text(vocab_size=80, max_position_embeddings=32, projection_size=32),
        vision_config=_vision(),
    )
    torch.manual_seed(0)
    model = SiglipModel(config)
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
        model.text_model.embeddings.position_embedding.weight.normal_(std=0.5)
    model.save_pretrained(folder)
    siglip_tokenizer(words).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def _text(**changes: Any) -> dict[str, Any]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2} | changes


def _vision(**changes: Any) -> dict[str, Any]:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return size | {"image_size": 32, "patch_size": 8} | changes
