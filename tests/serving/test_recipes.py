"""The recipes of docs/recipes.md answer as Sordino does: a published context in transformers and in open_clip."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from sordino.prompt_file import SavedPrompt
from sordino.serving.folder import export
from sordino.serving.registry import Registry
from sordino.serving.sources import from_run
from sordino.serving.trust import Trusted, publisher_key

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = dict(zip(("transformers", "open_clip"), re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL), strict=True))
TOWER = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
VISION = {"image_size": 32, "patch_size": 8}
OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    """open_clip's tokenizer, with the vocabulary of OpenAI's checkpoints, which its package holds."""
    return pytest.importorskip("open_clip", reason="make install").tokenizer.SimpleTokenizer()


def published(make_run: Callable[..., Path], checkpoint: Path, folder: Path) -> SavedPrompt:
    """Train a prompt in a checkpoint, and export it to `fabric-faults` in a folder."""
    run = make_run(f"encoder.checkpoint={checkpoint}", "settings.context_length=5", "rounds=2")
    own, _ = publisher_key()
    material = from_run(run, own)
    with Registry(f"sqlite:///{folder}/prompts.db", create=True) as registry:
        registry.publish("fabric-faults", material.facts, material.files, own, accept_not_private=True)
        export(registry.load("fabric-faults", None, Trusted.of()), folder / "fabric-faults")
    # Scaled to 42 by 32, and cut to 32 by 32: the margin is even. At an odd one the libraries cut a pixel apart.
    noise = np.random.default_rng(3).integers(0, 255, (48, 36, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "new.png")
    return SavedPrompt.load(folder / "fabric-faults" / "prompt.safetensors")


def answers(code: str, saved: SavedPrompt) -> tuple[dict[str, float], dict[str, float]]:
    """What a recipe and Sordino say of `new.png` here; the recipe's block has at most 30 lines."""
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, "docs/recipes.md", "exec", dont_inherit=True), names)
    found = dict(zip(saved.class_names, names["probabilities"].tolist(), strict=True))
    return found, dict(saved.model().classify(["new.png"])[0].probabilities)


def test_the_recipe_for_transformers_answers_as_sordino(
    make_run: Callable[..., Path], clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    saved = published(make_run, clip_folder, tmp_path)
    found, expected = answers(RECIPES["transformers"], saved)
    assert found == pytest.approx(expected, abs=1e-4)
    without = RECIPES["transformers"].replace('file.get_tensor("context")', 'file.get_tensor("context") * 0')
    other, _ = answers(without, saved)
    assert other != pytest.approx(expected, abs=1e-3)  # so the context does matter here


def test_the_recipe_for_open_clip_answers_as_sordino(
    make_run: Callable[..., Path], vocabulary: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a checkpoint that both libraries read, with the real tokenizer; only its name is another than the page's."""
    monkeypatch.chdir(tmp_path)
    saved = published(make_run, twin_checkpoints(vocabulary, tmp_path), tmp_path)
    code = RECIPES["open_clip"].replace('"ViT-B-16-quickgelu", pretrained="openai"', '"local-dir:theirs"')
    code = code.replace('"ViT-B-16-quickgelu"', '"local-dir:theirs"')
    found, expected = answers(code, saved)
    assert found == pytest.approx(expected, abs=1e-4)
    transformers, _ = answers(RECIPES["transformers"], saved)
    assert transformers == pytest.approx(expected, abs=1e-4)


def twin_checkpoints(vocabulary: Any, folder: Path) -> Path:
    """Save one random CLIP for transformers in `ours`, which is returned, and for open_clip in `theirs`."""
    ours, theirs = folder / "ours", folder / "theirs"
    size = vocabulary.vocab_size
    config = CLIPConfig(
        text_config=TOWER
        | {"vocab_size": size, "hidden_act": "quick_gelu", "bos_token_id": size - 2, "eos_token_id": size - 1},
        vision_config=TOWER | VISION | {"hidden_act": "quick_gelu"},
        projection_dim=24,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    model.save_pretrained(ours)
    ids = {token: at for token, at in vocabulary.encoder.items() if at < size - 2}
    ids |= {"<|startoftext|>": size - 2, "<|endoftext|>": size - 1}
    CLIPTokenizer(vocab=ids, merges=list(vocabulary.bpe_ranks)).save_pretrained(ours)
    edge = VISION["image_size"]
    CLIPImageProcessorPil(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}, **OPENAI
    ).save_pretrained(ours)
    theirs.mkdir()
    vision = {"image_size": edge, "layers": 3, "width": 32, "head_width": 16, "patch_size": VISION["patch_size"]}
    text = {"context_length": 77, "vocab_size": size, "width": 32, "heads": 2, "layers": 3}
    towers = {"embed_dim": 24, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    (theirs / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": {}}))
    save_file(open_clip_names(model.state_dict()), theirs / "open_clip_model.safetensors")
    return ours


def open_clip_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a `CLIPModel` under open_clip's names, whose attention holds query, key and value in one."""
    found = {
        "logit_scale": state["logit_scale"],
        "text_projection": state["text_projection.weight"].T,
        "visual.proj": state["visual_projection.weight"].T,
        "token_embedding.weight": state["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": state["text_model.embeddings.position_embedding.weight"],
        "visual.class_embedding": state["vision_model.embeddings.class_embedding"],
        "visual.conv1.weight": state["vision_model.embeddings.patch_embedding.weight"],
        "visual.positional_embedding": state["vision_model.embeddings.position_embedding.weight"],
    }
    norms = {
        "ln_final": "text_model.final_layer_norm",
        "visual.ln_pre": "vision_model.pre_layrnorm",  # so it is spelled
        "visual.ln_post": "vision_model.post_layernorm",
    }
    parts = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj"}
    parts |= {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    for kind in ("weight", "bias"):
        found |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in norms.items()}
        for there, here in (("transformer", "text_model"), ("visual.transformer", "vision_model")):
            for layer in range(TOWER["num_hidden_layers"]):
                block, own = f"{there}.resblocks.{layer}", f"{here}.encoder.layers.{layer}"
                found |= {f"{block}.{theirs}.{kind}": state[f"{own}.{ours}.{kind}"] for theirs, ours in parts.items()}
                attention = [state[f"{own}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(attention)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}
