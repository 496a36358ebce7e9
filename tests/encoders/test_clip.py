"""CLIP and SigLIP checkpoints against transformers' own models, on small random ones loaded as a user's would be."""

import json
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel, SiglipImageProcessorPil, SiglipModel

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import save_clip, save_siglip

from sordino.encoders.base import Capability
from sordino.encoders.clip import ClipEncoder
from sordino.encoders.frozen.blocks import blocked
from sordino.errors import EncoderError

CPU = torch.device("cpu")
NAMES = ["cat", "red-winged blackbird", "dog", "Grand  Piano", "sunflower"]  # ragged, one with capitals and two blanks
MODELS = {"clip": CLIPModel, "siglip": SiglipModel}
PROCESSORS = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}
# Features are sums over some 1e3 terms of size one: float32 rounds each to 6e-8, bfloat16 to 4e-3.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 3e-2, torch.float64: 1e-12}


@pytest.fixture(scope="session", params=["clip", "clip-old-end", "clip-gelu", "siglip"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved checkpoint of each kind: both conventions for CLIP's end token, both activations, SigLIP."""
    path = tmp_path_factory.mktemp(request.param)
    if request.param == "siglip":
        return save_siglip(path)
    activation = {"hidden_act": "gelu"} if request.param == "clip-gelu" else {}
    return save_clip(path, old_end=request.param == "clip-old-end", text=activation)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("one-clip"))


def family_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["model_type"]


@cache
def reference_model(folder: Path, dtype: torch.dtype = torch.float32) -> CLIPModel | SiglipModel:
    return MODELS[family_of(folder)].from_pretrained(folder, dtype=dtype).eval()


def padded_features(
    model: CLIPModel | SiglipModel, folder: Path, context: Tensor, names: list[str], later: Tensor | None = None
) -> Tensor:
    """One context [M, E] and C names to unit features [C, D] through transformers' text model on full-length sequences.

    The context replaces the token embeddings of M placeholder words, in a hook, so that everything else (mask, position
    table, pooling by token id, head) is transformers' own.
    """
    tokenizer, length = AutoTokenizer.from_pretrained(folder), len(context)
    limit = model.config.text_config.max_position_embeddings
    sentences = [" ".join(["a"] * length) + f" {name}." for name in names]
    ids = tokenizer(sentences, padding="max_length", max_length=limit, return_tensors="pt").input_ids
    start = 1 if isinstance(model, CLIPModel) else 0

    def put_context(_module: torch.nn.Module, _inputs: object, embedded: Tensor) -> Tensor:
        rows = context.to(embedded).expand(len(names), -1, -1)
        return torch.cat([embedded[:, :start], rows, embedded[:, start + length :]], dim=1)

    handles = [model.text_model.embeddings.token_embedding.register_forward_hook(put_context)]
    for layer, rows in enumerate([] if later is None else later, start=1):  # [J - 1, M, E], of the layers behind

        def put_rows(_module: torch.nn.Module, inputs: tuple[Tensor, ...], rows: Tensor = rows) -> tuple[Tensor, ...]:
            hidden, rest = inputs[0], inputs[1:]
            given = rows.to(hidden).expand(len(names), -1, -1)
            return (torch.cat([hidden[:, :start], given, hidden[:, start + length :]], dim=1), *rest)

        handles.append(model.text_model.encoder.layers[layer].register_forward_pre_hook(put_rows))
    features = model.get_text_features(input_ids=ids).pooler_output
    for handle in handles:
        handle.remove()
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


@cache
def load(folder: Path, dtype: torch.dtype = torch.float32) -> ClipEncoder:
    return ClipEncoder.load(str(folder), CPU, dtype)


def contexts(encoder: ClipEncoder, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, encoder.context_width, generator=generator, dtype=torch.float64)


def picture(mode: str = "RGB", size: tuple[int, int] = (53, 37)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values).resize(size).convert(mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_text_features_are_those_of_the_padded_pass(folder: Path, dtype: torch.dtype) -> None:
    encoder = load(folder, dtype)
    context = contexts(encoder, 5).to(torch.promote_types(dtype, torch.float32))
    features = encoder.text_features(context, encoder.class_tokens(NAMES))
    expected = padded_features(reference_model(folder, dtype), folder, context, NAMES)
    assert features.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(features, expected, rtol=0, atol=ROUNDING[dtype])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(len(NAMES), dtype=features.dtype))


@pytest.mark.parametrize("layers", [2, 3])
def test_deep_contexts_are_those_of_the_padded_pass(folder: Path, layers: int) -> None:
    """Each layer's own vectors in the context's places, up to the last layer; alone and in a stack."""
    encoder, reference = load(folder, torch.float64), reference_model(folder, torch.float64)
    layers = min(layers, encoder.text_layers)
    stack, classes = contexts(encoder, 2, layers, 4).requires_grad_(), encoder.class_tokens(NAMES)
    found = encoder.deep_text_features(stack, classes)
    expected = torch.stack([padded_features(reference, folder, each[0], NAMES, each[1:]) for each in stack])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    weights = contexts(encoder, 2, len(NAMES))[..., : encoder.feature_width]
    ours, theirs = (
        torch.autograd.grad((each * weights).sum(), stack, retain_graph=True)[0] for each in (found, expected)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)
    assert (ours.flatten(2).norm(dim=-1) > 0).all(), "every layer's vectors matter"
    shallow = encoder.text_features(stack[:, 0], classes)
    assert (found - shallow).norm(dim=-1).min() > 1e-3
    torch.testing.assert_close(encoder.deep_text_features(stack[:, :1], classes), shallow, rtol=0, atol=0)


def test_random_features_differ_enough_for_comparisons_to_mean_something(folder: Path) -> None:
    encoder = load(folder)
    features = encoder.text_features(contexts(encoder, 2, 5).float(), encoder.class_tokens(NAMES))
    apart = 1e3 * ROUNDING[torch.float32]
    assert (features[0] - features[1]).norm(dim=-1).min() > apart  # by context
    assert torch.pdist(features[0]).min() > apart  # by class


def test_gradients_are_those_of_the_padded_pass_and_of_finite_differences(folder: Path) -> None:
    encoder = load(folder, torch.float64)
    classes = encoder.class_tokens(NAMES[:3])
    context = contexts(encoder, 2).requires_grad_()
    weights = torch.randn(3, encoder.feature_width, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((encoder.text_features(context, classes) * weights).sum(), context)
    reference = padded_features(reference_model(folder, torch.float64), folder, context, NAMES[:3])
    (expected,) = torch.autograd.grad((reference * weights).sum(), context)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda context: (encoder.text_features(context, classes) * weights).sum(), context, fast_mode=True
    )


def test_recomputed_layers_change_no_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ClipEncoder.load(str(save_siglip(tmp_path)), CPU, torch.float64)
    classes, context = encoder.class_tokens(NAMES), contexts(encoder, 2, 3).requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(encoder.text_features(context, classes)[..., 0].sum(), context)[0]

    kept = gradient()
    monkeypatch.setattr("sordino.encoders.shared_prefix.RECOMPUTED_ROWS", 0)
    torch.testing.assert_close(gradient(), kept, rtol=0, atol=0)


@pytest.mark.parametrize("length", [0, 1, 5])
def test_a_stack_of_contexts_gives_what_each_gives_alone(folder: Path, length: int) -> None:
    encoder = load(folder, torch.float64)
    classes, stack = encoder.class_tokens(NAMES), contexts(encoder, 2, 3, length)
    features = encoder.text_features(stack, classes)
    assert features.shape == (2, 3, len(NAMES), encoder.feature_width)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(features[i, j], encoder.text_features(stack[i, j], classes), rtol=0, atol=1e-12)


def test_a_class_does_not_feel_its_neighbors(folder: Path) -> None:
    encoder = load(folder, torch.float64)
    context = contexts(encoder, 4)
    together = encoder.text_features(context, encoder.class_tokens(NAMES))
    backwards = encoder.text_features(context, encoder.class_tokens(NAMES[::-1])).flip(0)
    alone = torch.cat([encoder.text_features(context, encoder.class_tokens([name])) for name in NAMES])
    torch.testing.assert_close(together, backwards, rtol=0, atol=1e-12)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_hand_written_words_give_transformers_text_features(folder: Path) -> None:
    encoder, model = load(folder), reference_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sentences = ["a photo of a cat.", "A photo of a red-winged blackbird."]
    limit = model.config.text_config.max_position_embeddings
    ids = tokenizer(sentences, padding="max_length", max_length=limit, return_tensors="pt").input_ids
    expected = F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
    classes = encoder.class_tokens(["cat", "red-winged blackbird"])
    torch.testing.assert_close(
        encoder.text_features(encoder.zero_shot_context(), classes), expected, rtol=0, atol=ROUNDING[torch.float32]
    )


def test_class_tokens_are_right_padded_with_a_mask(clip_folder: Path) -> None:
    encoder, tokenizer = load(clip_folder), AutoTokenizer.from_pretrained(clip_folder)
    classes = encoder.class_tokens(NAMES)
    lengths = [len(tokenizer(f"{name}.").input_ids) - 1 for name in NAMES]  # without the start token
    assert classes.names == tuple(NAMES)
    assert classes.mask.sum(dim=1).tolist() == lengths
    assert classes.embeddings.shape == (len(NAMES), max(lengths), encoder.context_width)
    assert torch.equal(classes.mask, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_image_features_are_transformers_image_features(folder: Path, dtype: torch.dtype) -> None:
    encoder, model = load(folder, dtype), reference_model(folder, dtype)
    processor = PROCESSORS[family_of(folder)].from_pretrained(folder)
    pixels = processor(images=[picture(), picture(size=(40, 90))], return_tensors="pt").pixel_values
    ours = torch.stack([encoder.transform(picture()), encoder.transform(picture(size=(40, 90)))])
    torch.testing.assert_close(ours, pixels, rtol=0, atol=1e-6)
    features = encoder.image_features(ours)
    expected = model.get_image_features(pixel_values=pixels.to(dtype)).pooler_output
    expected = F.normalize(expected.float(), dim=-1)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, expected, rtol=0, atol=ROUNDING[dtype])
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(2))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "F"])
def test_pictures_of_any_mode_become_pixels(clip_folder: Path, mode: str) -> None:
    encoder = load(clip_folder)
    pixels = encoder.transform(picture("L").convert(mode))
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == torch.float32
    # All of these but the black-and-white one hold a gray picture, some with a rounding of a step or two of 256.
    if mode != "1":
        torch.testing.assert_close(pixels, encoder.transform(picture("L")), rtol=0, atol=3 / 255 / 0.26)


@pytest.mark.parametrize(("mode", "kind"), [("I;16", np.uint16), ("I", np.int32)])
def test_sixteen_bit_gray_keeps_its_brightness(clip_folder: Path, mode: str, kind: type) -> None:
    encoder = load(clip_folder)
    image = Image.fromarray(np.asarray(picture("L")).astype(kind) * kind(257))
    assert image.mode == mode
    torch.testing.assert_close(encoder.transform(image), encoder.transform(picture("L")))


def test_patch_features_are_unit_and_follow_the_image_head(folder: Path) -> None:
    encoder, model = load(folder), reference_model(folder)
    pixels = encoder.transform(picture())[None]
    patches = encoder.patch_features(pixels)
    hidden = model.vision_model(pixel_values=pixels).last_hidden_state
    if family_of(folder) == "clip":
        # What the projection would say, were the patch's token the class token.
        expected = model.visual_projection(model.vision_model.post_layernorm(hidden[:, 1:]))
    else:
        expected = torch.stack([model.vision_model.head(patch[None, None]) for patch in hidden[0]], dim=1)
    assert patches.shape == (1, 16, encoder.feature_width)
    torch.testing.assert_close(patches, F.normalize(expected, dim=-1), rtol=0, atol=ROUNDING[torch.float32])
    assert Capability.PATCHES in encoder.capabilities


def test_image_features_are_the_same_by_either_path(folder: Path) -> None:
    """By transformers' own layers, and by those for gradients and for accelerators."""
    encoder = load(folder, torch.float64)
    pixels = encoder.transform(picture())[None].double()
    with torch.no_grad():
        expected = encoder.image_features(pixels)
    found = encoder.image_features(pixels.requires_grad_())
    torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-10)


def test_attention_in_blocks_gives_the_same_features_and_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text tower in the form for accelerators."""
    encoder = load(folder, torch.float64)
    classes = encoder.class_tokens(NAMES)
    context = torch.randn(3, 4, encoder.context_width, generator=torch.Generator().manual_seed(1)).double()

    def differentiated() -> list[Tensor]:
        leaf = context.clone().requires_grad_()
        features = encoder.text_features(leaf, classes)
        weights = torch.arange(features.numel(), dtype=torch.float64).view_as(features).cos()
        return [features, *torch.autograd.grad((features * weights).sum(), leaf)]

    expected = differentiated()
    monkeypatch.setattr("sordino.encoders.shared_prefix.attention_for", blocked)
    for found, known in zip(differentiated(), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=1e-9, atol=1e-10)


def test_image_features_are_differentiable_in_pixels(folder: Path) -> None:
    encoder = load(folder, torch.float64)
    pixels = encoder.transform(picture())[None].double().requires_grad_()
    assert Capability.PIXEL_GRADIENTS in encoder.capabilities
    assert torch.autograd.gradcheck(
        lambda pixels: encoder.image_features(pixels)[..., :3].sum(), pixels, fast_mode=True
    )


def test_logit_scale_is_the_exponential_of_the_checkpoints(folder: Path) -> None:
    encoder, model = load(folder), reference_model(folder)
    assert encoder.logit_scale == pytest.approx(model.logit_scale.exp().item(), rel=1e-6)


def test_fingerprint_follows_weights_and_preprocessing(tmp_path: Path) -> None:
    first = save_clip(tmp_path / "a")
    again, other = (shutil.copytree(first, tmp_path / name) for name in "bc")
    fingerprint = ClipEncoder.load(str(first), CPU).fingerprint
    assert len(fingerprint) == 64
    assert ClipEncoder.load(str(again), CPU, torch.bfloat16).fingerprint == fingerprint  # same content elsewhere
    settings = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))
    assert ClipEncoder.load(str(other), CPU).fingerprint != fingerprint
    model = CLIPModel.from_pretrained(again)
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    model.save_pretrained(again)
    assert ClipEncoder.load(str(again), CPU).fingerprint != fingerprint


def test_text_flops_count_what_a_profiler_counts(folder: Path) -> None:
    """torch's FLOP counter sees every matrix product and convolution that is run (but not flash attention on a CPU)."""
    encoder = load(folder)
    classes = encoder.class_tokens(NAMES)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        encoder.text_features(contexts(encoder, 3, 5).float(), classes)
    assert encoder.text_flops(3, 5, classes) == counter.get_total_flops()


def test_too_long_a_sentence_is_refused_with_the_longest_name(folder: Path) -> None:
    encoder = load(folder)
    classes = encoder.class_tokens(NAMES)
    limit = 77 if encoder.family == "clip" else 32
    most = limit - (encoder.family == "clip") - classes.mask.shape[1]
    encoder.text_features(contexts(encoder, most).float(), classes)
    with pytest.raises(
        EncoderError, match=rf"context_length = {most + 1}: .*blackbird.* takes {limit}: .* most {most}"
    ):
        encoder.text_features(contexts(encoder, most + 1).float(), classes)
    # No context makes room for a name that fills the sentence alone.
    with pytest.raises(
        EncoderError, match=rf"class name, 'cat .*\.\.\..*', the sentence .* takes {limit}: shorten it$"
    ):
        encoder.text_features(contexts(encoder, 1).float(), encoder.class_tokens(["dog", " ".join(["cat"] * 100)]))


def damage(folder: Path, how: str) -> None:
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "broken config":
        (folder / "config.json").write_text("{")
    elif how == "model type":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "blip"}))
    elif how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif how == "no processor":
        (folder / "preprocessor_config.json").unlink()
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif how == "missing weights":
        CLIPModel.from_pretrained(folder).vision_model.save_pretrained(folder / "vision")
        (folder / "vision" / "model.safetensors").replace(folder / "model.safetensors")
    elif how == "image size":
        CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "no config.json in it; give a folder"),
        ("broken config", "config.json is no JSON .*download it again"),
        ("model type", "model_type is 'blip'; encoder 'clip' loads clip, siglip"),
        ("no tokenizer", "no tokenizer in it .*tokenizer.json"),
        ("no processor", "neither preprocessor_config.json nor processor_config.json"),
        ("no weights", "no .*safetensors or pytorch_model.bin"),
        ("cut weights", "weights cannot be read .*download it again"),
        ("missing weights", "weights are missing, .* both towers"),
        ("image size", "makes 48x48 pixels, its image tower takes 32x32"),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(tmp_path: Path, how: str, message: str) -> None:
    damage(save_clip(tmp_path), how)
    with pytest.raises(EncoderError, match=message) as refusal:
        ClipEncoder.load(str(tmp_path), CPU)
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


@pytest.mark.parametrize("checkpoint", ["/nowhere/clip", "./nowhere", "nowhere", "a/b/c"])
def test_a_missing_folder_is_refused(checkpoint: str) -> None:
    with pytest.raises(EncoderError, match=rf"checkpoint '{checkpoint}': no such folder; give .* hub name"):
        ClipEncoder.load(checkpoint, CPU)


def test_a_hub_name_without_network_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        EncoderError, match=r"checkpoint 'nobody/no-clip': .*network, or download it elsewhere"
    ) as refusal:
        ClipEncoder.load("nobody/no-clip", CPU)
    assert "\n" not in str(refusal.value)


def test_weights_in_a_pickle_load_as_tensors_only(tmp_path: Path) -> None:
    save_clip(tmp_path)
    model = CLIPModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    ClipEncoder.load(str(tmp_path), CPU)

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    torch.save({"weights": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(EncoderError, match="weights cannot be read"):
        ClipEncoder.load(str(tmp_path), CPU)
    assert not (tmp_path / "executed").exists()


def test_fingerprint_follows_the_tokenizer(tmp_path: Path) -> None:
    """Another split of class names into tokens gives other text features of the same weights."""
    folder = save_clip(tmp_path / "a")
    fingerprint = ClipEncoder.load(str(folder), CPU).fingerprint
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))
    assert ClipEncoder.load(str(folder), CPU).fingerprint != fingerprint
