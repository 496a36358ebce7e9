"""Prompts inside the image tower, against transformers' own tower and against each prompt alone."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import save_clip, save_siglip

from sordino.encoders import visual_prompts
from sordino.encoders.base import Capability
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.cache import FeatureCache, layer_kind, layer_of
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.encode import encode, forward
from sordino.encoders.visual_prompts import Adapter
from sordino.errors import EncoderError

LAYERS = 3


@pytest.fixture(scope="session", params=["clip", "clip-gelu", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "siglip":
        return save_siglip(path)
    activation = {"hidden_act": "gelu"} if request.param == "clip-gelu" else {}
    return save_clip(path, vision={"num_hidden_layers": LAYERS} | activation)


@cache
def load(folder: Path, dtype: torch.dtype = torch.float64) -> ClipEncoder:
    return ClipEncoder.load(str(folder), torch.device("cpu"), dtype)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(encoder: ClipEncoder, layer: int, clients: int, images: int = 2) -> Tensor:
    """Hidden states [K, B, T, W] that enter a layer, of other images for each client."""
    hidden = encoder.image_tower.hidden(random(clients * images, 3, 32, 32), layer)
    return hidden.view(clients, images, *hidden.shape[1:])


def adapters(encoder: ClipEncoder, clients: int, scale: float = 0.8, seed: int = 3) -> Adapter:
    w, r = encoder.image_width, 5
    shapes = ((clients, w, r), (clients, r), (clients, r, 2 * w), (clients, 2 * w))
    return Adapter(*(random(*shape, seed=seed + at) for at, shape in enumerate(shapes)), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("entered", [0, 1, 2])
def test_without_prompts_the_features_are_transformers(folder: Path, entered: int, dtype: torch.dtype) -> None:
    """From the pixels, or from what enters a later layer."""
    encoder = load(folder, dtype)
    tower, pixels = encoder.image_tower, random(2, 3, 32, 32).to(dtype)
    hidden = tower.hidden(pixels, entered)
    found = tower.features(tower.forward(hidden[None], entered, encoder.image_layers))[0]
    expected = encoder.image_features(pixels)  # by transformers' tower
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 2e-6)


def test_hidden_states_are_transformers(folder: Path) -> None:
    encoder, pixels = load(folder), random(2, 3, 32, 32)
    said = encoder._vision(pixel_values=pixels, output_hidden_states=True).hidden_states
    for layer in range(encoder.image_layers + 1):
        torch.testing.assert_close(encoder.image_tower.hidden(pixels, layer), said[layer], rtol=0, atol=1e-12)


def test_gradients_flow_after_a_first_pass_without_any(folder: Path) -> None:
    """What is made once, in the first pass, serves later ones, whichever kind the first was."""
    encoder = load(folder)
    classes, pixels = encoder.class_tokens(("cat", "dog")), random(2, 3, 32, 32)
    context = encoder.embed("cat").detach().clone()
    with torch.inference_mode():
        encoder.image_tower.hidden(pixels, 1)
        encoder.text_features(context, classes)
    for leaf in (pixels.requires_grad_(), context.requires_grad_()):
        made = encoder.image_tower.hidden(leaf, 1) if leaf is pixels else encoder.text_features(leaf, classes)
        (gradient,) = torch.autograd.grad(made[..., 0].sum(), leaf)
        assert gradient.isfinite().all()
        assert gradient.any()


def test_no_tokens_and_adapters_of_scale_zero_change_nothing(folder: Path) -> None:
    encoder = load(folder)
    tower, x, depth = encoder.image_tower, states(encoder, 0, 2), encoder.image_layers
    plain = tower.features(tower.forward(x, 0, depth))
    none = {layer: random(2, 0, encoder.image_width) for layer in range(depth)}
    still = {layer: adapters(encoder, 2, scale=0.0) for layer in range(depth)}
    torch.testing.assert_close(tower.features(tower.forward(x, 0, depth, none, still)), plain, rtol=0, atol=1e-14)


def reference(encoder: ClipEncoder, hidden: Tensor, prompts: dict[int, Tensor], deep: bool) -> Tensor:
    """One client's images [B, T, W] with prompts [n, W] through transformers' own layers, to unit features [B, D]."""
    vision, first, joined = encoder._vision, encoder.image_tower.class_tokens, 0
    for number, layer in enumerate(vision.encoder.layers):
        if number in prompts:
            after = hidden[:, first + (joined if deep else 0) :]
            hidden = torch.cat([hidden[:, :first], prompts[number].expand(len(hidden), -1, -1), after], dim=1)
            joined = len(prompts[number])
        hidden = layer(hidden, attention_mask=None)
    if encoder.family == "clip":
        pooled = encoder._projection(vision.post_layernorm(hidden[:, 0]))
    else:
        pooled = vision.head(vision.post_layernorm(hidden[:, -16:]))
    return torch.nn.functional.normalize(pooled, dim=-1)


@pytest.mark.parametrize("deep", [True, False], ids=["deep", "beside"])
def test_prompt_tokens_go_where_visual_prompt_tuning_puts_them(folder: Path, deep: bool) -> None:
    """A stack of clients gives what transformers' layers give each client, whose prompts stand behind its class token.

    Prompts of two layers: those of the second take the place of the first's, or stand beside them.
    """
    encoder = load(folder)
    tower, x = encoder.image_tower, states(encoder, 0, 3)
    prompts = {0: random(3, 4, encoder.image_width, seed=5), 1: random(3, 2, encoder.image_width, seed=6)}
    left = tower.forward(x, 0, encoder.image_layers, prompts, replace=deep)
    assert left.shape[2] == x.shape[2] + (2 if deep else 6)
    for client in range(3):
        own = {layer: tokens[client] for layer, tokens in prompts.items()}
        expected = reference(encoder, x[client], own, deep)
        torch.testing.assert_close(tower.features(left)[client], expected, rtol=0, atol=1e-12)


def test_an_image_may_have_prompts_of_its_own(folder: Path) -> None:
    encoder = load(folder)
    tower, x, depth = encoder.image_tower, states(encoder, 1, 2, images=3), encoder.image_layers
    tokens = random(2, 3, 2, encoder.image_width)
    found = tower.features(tower.forward(x, 1, depth, {1: tokens}))
    for image in range(3):
        alone = tower.forward(x[:, image : image + 1], 1, depth, {1: tokens[:, image]})
        torch.testing.assert_close(found[:, image : image + 1], tower.features(alone), rtol=0, atol=1e-12)


def test_adapters_add_to_the_keys_and_values_of_their_client(folder: Path) -> None:
    """Against transformers' attention, whose key and value projections get the adapter's output in a hook."""
    encoder = load(folder)
    tower, x, depth = encoder.image_tower, states(encoder, 0, 2), encoder.image_layers
    adapter, width = adapters(encoder, 2), encoder.image_width
    found = tower.features(tower.forward(x, 0, depth, adapters={1: adapter}))
    attention = encoder._vision.encoder.layers[1].self_attn
    for client in range(2):

        def change(normed: Tensor, client: int = client) -> Tensor:
            inner = torch.tanh(normed @ adapter.down[client] + adapter.down_bias[client])
            return 0.8 * (inner @ adapter.up[client] + adapter.up_bias[client])

        hooks = [
            attention.k_proj.register_forward_hook(lambda _, given, out: out + change(given[0])[..., :width]),
            attention.v_proj.register_forward_hook(lambda _, given, out: out + change(given[0])[..., width:]),
        ]
        expected = reference(encoder, x[client], {}, True)
        for hook in hooks:
            hook.remove()
        torch.testing.assert_close(found[client], expected, rtol=0, atol=1e-12)


def test_appended_prefixes_stand_beside_the_keys_and_values(folder: Path) -> None:
    """Softmax over 2 T keys, of which the adapter makes the first T, in one layer and head by head."""
    encoder = load(folder)
    tower, x, heads = encoder.image_tower, states(encoder, 1, 2), 2
    adapter = replace(adapters(encoder, 2), appended=True)
    layer = encoder._vision.encoder.layers[1]
    found = tower.forward(x, 1, 2, adapters={1: adapter})
    for client in range(2):
        normed = layer.layer_norm1(x[client])
        inner = torch.tanh(normed @ adapter.down[client] + adapter.down_bias[client])
        given = 0.8 * (inner @ adapter.up[client] + adapter.up_bias[client])
        query, key, value = (getattr(layer.self_attn, f"{part}_proj")(normed) for part in "qkv")
        key, value = (torch.cat(both, dim=1) for both in zip(given.chunk(2, dim=-1), (key, value), strict=True))
        mixed = []
        for q, k, v in zip(*(part.chunk(heads, dim=-1) for part in (query, key, value)), strict=True):
            mixed.append((q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1) @ v)
        after = x[client] + layer.self_attn.out_proj(torch.cat(mixed, dim=-1))
        expected = after + layer.mlp(layer.layer_norm2(after))
        torch.testing.assert_close(found[client], expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences_and_survive_recomputation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = load(folder)
    tower, x, depth = encoder.image_tower, states(encoder, 0, 2), encoder.image_layers
    tokens = random(2, 2, encoder.image_width).requires_grad_()
    down = adapters(encoder, 2).down.requires_grad_()

    def loss(tokens: Tensor, down: Tensor) -> Tensor:
        plugged = {1: replace(adapters(encoder, 2), down=down)}
        return tower.features(tower.forward(x, 0, depth, {0: tokens}, plugged))[..., :3].sum()

    assert torch.autograd.gradcheck(loss, (tokens, down), fast_mode=True)
    kept = torch.autograd.grad(loss(tokens, down), (tokens, down))
    monkeypatch.setattr(visual_prompts, "KEPT_AT_ONCE", 0)
    torch.testing.assert_close(torch.autograd.grad(loss(tokens, down), (tokens, down)), kept, rtol=0, atol=0)


def test_flops_count_what_a_profiler_counts(folder: Path) -> None:
    """All products of the layers; the profiler also sees the head's."""
    encoder = load(folder, torch.float32)
    tower, x = encoder.image_tower, states(encoder, 1, 2).float()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower.forward(x, 1, encoder.image_layers, {1: random(2, 3, encoder.image_width).float()})
    assert tower.flops(4, start=1, prompts=3) == counter.get_total_flops()


def test_an_encoder_without_layers_names_one_that_has_them() -> None:
    with pytest.raises(EncoderError, match=r"'bundled' has no visual-prompts, which .* needs; encoders that do: clip"):
        BundledEncoder.require(BundledEncoder.__new__(BundledEncoder), Capability.VISUAL_PROMPTS, "pfedpg")


class Pictures:
    """Four pictures in memory that count how often they are decoded."""

    def __init__(self) -> None:
        from PIL import Image

        self.decoded = 0
        self.pictures = [Image.new("RGB", (40, 40), (60 * at, 20, 200 - 50 * at)) for at in range(4)]
        self.names = [str(at) for at in range(4)]

    def __len__(self) -> int:
        return 4

    def raw(self, index: int, /) -> bytes:
        return self.pictures[index].tobytes()

    def image(self, index: int, /):  # type: ignore[no-untyped-def]
        self.decoded += 1
        return self.pictures[index]


@pytest.mark.parametrize(("layer", "decoded"), [(0, 8), (1, 4)])
def test_what_enters_a_later_layer_is_kept_on_disk(folder: Path, tmp_path: Path, layer: int, decoded: int) -> None:
    """And what enters the first is not: it is a patch embedding away from the pixels."""
    encoder, pictures, cache = load(folder, torch.float32), Pictures(), FeatureCache(tmp_path)
    kind = layer_kind(layer)
    assert layer_of(kind) == layer
    first, again = (encode(pictures, encoder, cache, kind=kind) for _ in range(2))
    assert pictures.decoded == decoded
    assert torch.equal(first.features, again.features)
    pixels = torch.stack([encoder.transform(picture) for picture in pictures.pictures])
    torch.testing.assert_close(first.features, forward(encoder, kind, pixels), rtol=0, atol=2e-6)
