"""Class names that a tokenizer cannot tell apart are refused by every encoder; unknown words are a warning."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from checkpoints import save_clip, save_siglip

from sordino.encoders.base import DualEncoder
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.clip import ClipEncoder
from sordino.errors import EncoderError, SordinoWarning

CPU = torch.device("cpu")
CHINESE = ["鼾", "龘", "麤", "靐"]  # none of them among MiniLM's tokens


@pytest.fixture(scope="module", params=["bundled", "clip", "siglip"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DualEncoder:
    if request.param == "bundled":
        return BundledEncoder.load(CPU)
    save = save_clip if request.param == "clip" else save_siglip
    return ClipEncoder.load(str(save(tmp_path_factory.mktemp(request.param))), CPU)


def features_agree(encoder: DualEncoder, names: list[str]) -> bool:
    """The oracle: whether two names have one feature behind a random context."""
    context = torch.randn(3, encoder.context_width, generator=torch.Generator().manual_seed(0))
    first, second = encoder.text_features(context, encoder.class_tokens(names, compete=False))
    return torch.allclose(first, second, rtol=0, atol=1e-6)  # rows of a batch differ in the last bits


@pytest.mark.parametrize(
    "names",
    [["Cat", "cat"], ["cat", "cat"], ["cat dog", "cat  dog"], ["cafe\u0301", "caf\u00e9"], ["\u212a", "K"]],
    ids=["case", "itself", "spaces", "Unicode form", "Kelvin sign"],
)
@pytest.mark.filterwarnings("ignore::sordino.errors.SordinoWarning")
def test_names_are_refused_exactly_where_their_features_are_equal(encoder: DualEncoder, names: list[str]) -> None:
    if not features_agree(encoder, names):
        assert encoder.class_tokens(names).names == tuple(names)
        return
    with pytest.raises(EncoderError, match="as the same") as caught:
        encoder.class_tokens([names[0], "dog house", names[1]])
    assert repr(names[0]) in str(caught.value)
    assert repr(names[1]) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_case_accents_and_form_are_nothing_to_the_bundled_encoder() -> None:
    encoder = BundledEncoder.load(CPU)
    for names in (["Cat", "cat"], ["café", "cafe"], ["cafe\u0301", "caf\u00e9"], ["cat_dog", "cat dog"]):
        assert features_agree(encoder, names)
        with pytest.raises(EncoderError, match="as the same"):
            encoder.class_tokens(names)


@pytest.mark.parametrize("name", ["", " ", "\u200b"])
@pytest.mark.filterwarnings("ignore::sordino.errors.SordinoWarning")
def test_a_name_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(EncoderError, match="reads nothing in class name"):
        BundledEncoder.load(CPU).class_tokens(["cat", name])


def test_a_script_that_the_tokenizer_does_not_know_is_refused_with_the_reason() -> None:
    encoder = BundledEncoder.load(CPU)
    assert features_agree(encoder, CHINESE[:2])
    with pytest.raises(EncoderError, match="as the same, with words that it does not know") as caught:
        encoder.class_tokens(CHINESE)
    assert all(repr(name) in str(caught.value) for name in CHINESE[:2])


def test_unknown_words_in_names_and_contexts_are_a_warning() -> None:
    encoder = BundledEncoder.load(CPU)
    with pytest.warns(SordinoWarning, match=f"does not know words of class name '{CHINESE[0]}'"):
        encoder.class_tokens(["cat", CHINESE[0]])
    with pytest.warns(SordinoWarning, match="and 1 more"):
        encoder.class_tokens([f"{kind} {CHINESE[0]}" for kind in ("red", "green", "blue", "gray")])
    with pytest.warns(SordinoWarning, match="of context"):
        encoder.embed(f"a photo of {CHINESE[0]}")


def test_siglip_warns_of_unknown_words(tmp_path: Path) -> None:
    encoder = ClipEncoder.load(str(save_siglip(tmp_path)), CPU)
    with pytest.warns(SordinoWarning, match="does not know words of class name '日'"):
        encoder.class_tokens(["cat", "日"])
    with (
        pytest.raises(EncoderError, match="as the same, with words that it does not know"),
        warnings.catch_warnings(),
    ):
        encoder.class_tokens(["日", "本"])


def test_names_that_do_not_compete_may_repeat(encoder: DualEncoder) -> None:
    classes = encoder.class_tokens(["cat", "cat"], compete=False)
    assert torch.equal(classes.embeddings[0], classes.embeddings[1])


def test_the_public_directions_of_the_cotangent_mechanism_repeat_names() -> None:
    """ImageNet has two classes 'maillot' and two 'crane': they are no candidates there."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    names = [info.index_to_description(index).partition(",")[0] for index in (638, 639)]
    assert len(BundledEncoder.load(CPU).class_tokens(names, compete=False)) == 2
