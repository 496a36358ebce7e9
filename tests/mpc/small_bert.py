"""A checkpoint that is far smaller than the bundled text tower, as its owner distills and hands it out."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from commands import here
from sordino.encoders.bundled import TEXT_MODEL, package_path


def bert_folder(folder: Path) -> Path:
    """A small BERT with weights that are random but for the words', in a folder as such checkpoints come."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=64,
        initializer_range=0.15,
    )
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    shutil.copy(package_path(*TEXT_MODEL) / "tokenizer.json", folder)
    return folder


def distilled(folder: Path) -> Path:
    """In a folder: `model`, its tower without softmax `tower.safetensors`, and `embeddings` for the data owner."""
    model = bert_folder(folder / "model")
    tower = ("--out", "tower.safetensors", "--steps", "2", "--features", "16")
    for words in (("distill", "--model", str(model), *tower), ("embeddings", "--model", str(model), "--out", "owner")):
        done = here(folder, "mpc", *words)
        assert done.exit_code == 0, done.output
    return folder
