"""Scores of vision-language models against transformers' own models, which know nothing of caches and trees here."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders.vision_language import FAMILIES, NAMES, save_vision_language
from sordino.encoders import load_encoder
from sordino.encoders.cache import IMAGE_TOKENS, KEYS_VALUES
from sordino.encoders.generative import encoder as generative_encoder
from sordino.encoders.generative import model as generative_model
from sordino.encoders.generative.encoder import GenerativeEncoder
from sordino.encoders.generative.model import GenerativeModel
from sordino.encoders.generative.pictures import QwenPictures
from sordino.encoders.generative.settings import PLACES, GenerativeSettings
from sordino.errors import ConfigError, EncoderError, SordinoWarning
from sordino.privacy.dp_sgd import example_gradients
from sordino.privacy.gradients import Batch, ExactGradients

CPU = torch.device("cpu")
QWEN_SIDE = 24  # three by three tokens
WRITTEN = "a photo of a"
each_family = pytest.mark.parametrize("family", FAMILIES)
each_place = pytest.mark.parametrize("place", PLACES)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a small checkpoint of a family."""
    return cache(lambda family: save_vision_language(tmp_path_factory.mktemp(family), family))


def settings_of(family: str, place: str, **changes: Any) -> GenerativeSettings:
    size = {"image_size": QWEN_SIDE} if family.startswith("qwen") else {}
    return GenerativeSettings(**({"prompt_place": place} | size | changes))


def loaded(
    folders: Folders, family: str, place: str, dtype: torch.dtype = torch.float32, **changes: Any
) -> GenerativeEncoder:
    return GenerativeEncoder.load(str(folders(family)), CPU, dtype, settings_of(family, place, **changes))


def pictures(count: int = 3) -> list[Image.Image]:
    noise = torch.Generator().manual_seed(7)
    blocks = torch.randint(0, 256, (count, 5, 6, 3), generator=noise, dtype=torch.uint8)
    return [Image.fromarray(block.numpy()).resize((47, 40), Image.Resampling.BICUBIC) for block in blocks]


def read(encoder: GenerativeEncoder, count: int = 3) -> Tensor:
    return torch.stack([encoder.transform(picture) for picture in pictures(count)])


def contexts(encoder: GenerativeEncoder, count: int = 2) -> Tensor:
    drawn = torch.randn(count, 3, encoder.context_width, generator=torch.Generator().manual_seed(3))
    return (0.5 * drawn).to(torch.promote_types(encoder.dtype, torch.float32))


class Plain:
    """A checkpoint as transformers has it, with pictures as its own image processor reads them."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        self.model = model.eval().requires_grad_(False)
        self.processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        self.kind: str = model.config.model_type

    def read(self, picture: Image.Image) -> dict[str, Tensor]:
        """Return the arguments of the model that hold a picture."""
        if self.kind.startswith("qwen"):
            square = picture.resize((QWEN_SIDE, QWEN_SIDE), Image.Resampling.BICUBIC)
            return dict(self.processor(images=square, do_resize=False, return_tensors="pt"))
        if self.kind in ("idefics3", "smolvlm"):
            found = self.processor(images=picture, do_image_splitting=False, return_tensors="pt")
            return {key: found[key] for key in ("pixel_values", "pixel_attention_mask")}
        return {"pixel_values": self.processor(images=picture, return_tensors="pt").pixel_values}

    def typed(self, ids: Sequence[int], picture: Image.Image) -> Tensor:
        """Return the logits [S, V] of typed tokens with a picture, by one plain pass."""
        tokens, read = torch.tensor([list(ids)]), self.read(picture)
        if self.kind.startswith("qwen"):
            read["mm_token_type_ids"] = (tokens == self.model.config.image_token_id).int()
        for key, value in read.items():
            read[key] = value.to(self.model.dtype) if value.is_floating_point() else value
        return self.model(input_ids=tokens, use_cache=False, **read).logits[0]

    def with_prompt(self, ids: Sequence[int], at: int, context: Tensor, picture: Image.Image) -> Tensor:
        """Return the logits [S, V] of a dialog whose tokens from `at` on are replaced by a prompt's vectors."""

        def put(_module: Any, _arguments: Any, embedded: Tensor) -> Tensor:
            return torch.cat([embedded[:, :at], context[None].to(embedded), embedded[:, at + len(context) :]], dim=1)

        handle = self.model.get_input_embeddings().register_forward_hook(put)
        try:
            return self.typed(ids, picture)
        finally:
            handle.remove()


def dialog(encoder: GenerativeEncoder, image_id: int, prompt: Sequence[int]) -> tuple[list[int], int]:
    """Return the tokens of a dialog with a typed prompt, and the place of the prompt."""
    layout, image = encoder.layout, [image_id] * encoder.image_length
    first, second = (image, list(prompt)) if layout.image_first else (list(prompt), image)
    ids = [*layout.start, *first, *layout.middle, *second, *layout.end]
    return ids, len(layout.start) + layout.image_first * (len(image) + len(layout.middle))


def plain_scores(encoder: GenerativeEncoder, plain: Plain, context: Tensor, names: Sequence[str]) -> Tensor:
    """Return the mean log-likelihoods [B, C] by a plain pass for every picture and name."""
    image_id = plain.model.config.image_token_id
    ids, at = dialog(encoder, image_id, [9] * len(context))
    rows = []
    for picture in pictures():
        row = []
        for name in names:
            answer = encoder.class_tokens([name]).ids[0].tolist()
            logits = plain.with_prompt([*ids, *answer], at, context, picture)
            steps = logits[len(ids) - 1 : -1].log_softmax(-1)
            row.append(steps[range(len(answer)), answer].mean())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@each_family
@each_place
def test_scores_are_those_of_a_plain_pass_without_any_cache(folders: Folders, family: str, place: str) -> None:
    encoder, plain = loaded(folders, family, place), Plain(folders(family))
    model = GenerativeModel(encoder, encoder.class_tokens(NAMES))
    assert len(set(model.classes.mask.sum(1).tolist())) > 1
    state = encoder.image_state(read(encoder))
    stack = contexts(encoder)
    found = model.scores(model.class_features(stack), stack, state.expand(2, *state.shape))
    expected = torch.stack([plain_scores(encoder, plain, context, NAMES) for context in stack])
    assert expected.std(-1).min() > 0.1, "the names must differ, or this shows nothing"
    assert (expected[0] - expected[1]).abs().max() > 0.01, "the prompts must differ, or this shows nothing"
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each_family
@each_place
def test_gradients_are_those_of_a_plain_pass(folders: Folders, family: str, place: str) -> None:
    encoder, plain = loaded(folders, family, place, torch.float64), Plain(folders(family), torch.float64)
    model, names = GenerativeModel(encoder, encoder.class_tokens(NAMES[:3])), NAMES[:3]
    labels = torch.tensor([[0, 2, 1]])
    state = encoder.image_state(read(encoder)).double()
    stack = contexts(encoder, 1).double()
    batch = Batch(state[None], labels, torch.ones(1, 3, dtype=torch.bool))
    found = ExactGradients(model)(lambda parameters: parameters["context"], {"context": stack}, {}, batch)
    leaf = stack[0].clone().requires_grad_()
    loss = torch.nn.functional.cross_entropy(plain_scores(encoder, plain, leaf, names), labels[0])
    (expected,) = torch.autograd.grad(loss, leaf)
    assert expected.norm() > 1e-3
    # Rotary angles and norms are float32 in transformers, whatever the weights are.
    torch.testing.assert_close(found.values["context"][0], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.loss[0], loss.detach(), rtol=1e-5, atol=1e-6)


@each_family
@each_place
def test_a_prompt_of_real_tokens_is_these_tokens_typed(folders: Folders, family: str, place: str) -> None:
    encoder, plain = loaded(folders, family, place), Plain(folders(family))
    typed: list[int] = encoder._tokenizer(WRITTEN, add_special_tokens=False).input_ids
    ids, _ = dialog(encoder, plain.model.config.image_token_id, typed)
    answers = encoder.class_tokens(NAMES)
    found = encoder.likelihoods(encoder.embed(WRITTEN)[None], encoder.image_state(read(encoder, 1)), answers)[0]
    for name, score in zip(NAMES, found, strict=True):
        answer = encoder.class_tokens([name]).ids[0].tolist()
        steps = plain.typed([*ids, *answer], pictures(1)[0])[len(ids) - 1 : -1].log_softmax(-1)
        torch.testing.assert_close(score, steps[range(len(answer)), answer].mean(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llava", "idefics3", "qwen2_vl"])
def test_dialog_and_pixels_are_those_of_the_processor_of_transformers(folders: Folders, family: str) -> None:
    # LLaVA's line break joins the question's first word where no prompt stands between them.
    encoder = loaded(folders, family, "before-image" if family == "llava" else "after-image")
    words, images = encoder._tokenizer, encoder._pictures.processor
    picture = pictures(1)[0]
    text = {
        "llava": "USER: <image>\nWhat is in the picture? ASSISTANT:",
        "idefics3": "User:<image>What is in the picture?<end_of_utterance>\nAssistant:",
        "qwen2_vl": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
            "<|image_pad|><|vision_end|>What is in the picture?<|im_end|>\n<|im_start|>assistant\n"
        ),
    }[family]
    if family == "llava":
        strategy = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor, options = transformers.LlavaProcessor(images, words, **strategy), {}
    elif family == "idefics3":
        processor = transformers.Idefics3Processor(images, words, image_seq_len=4)
        options = {"do_image_splitting": False}
    else:
        processor = transformers.Qwen2VLProcessor(images, words, transformers.Qwen2VLVideoProcessor())
        options, picture = {"do_resize": False}, picture.resize((QWEN_SIDE, QWEN_SIDE), Image.Resampling.BICUBIC)
    expected = processor(images=[picture], text=[text], return_tensors="pt", **options)
    ids, _ = dialog(encoder, encoder._model.config.image_token_id, [])
    assert ids == expected["input_ids"][0].tolist()
    pixels = encoder.transform(picture)
    if isinstance(encoder._pictures, QwenPictures):
        pixels = encoder._pictures.patched(pixels[None])[0]
    assert torch.equal(pixels, expected["pixel_values"].reshape(pixels.shape))


@each_family
def test_the_state_of_an_image_is_of_that_image_alone(folders: Folders, family: str) -> None:
    encoder = loaded(folders, family, "after-image")
    state = encoder.image_state(read(encoder))
    assert encoder.kind == KEYS_VALUES
    assert state.ndim == 3
    assert state.shape[1] == len(encoder.layout.start) + encoder.image_length + len(encoder.layout.middle)
    alone = torch.cat([encoder.image_state(pixels[None]) for pixels in read(encoder)])
    torch.testing.assert_close(state, alone, rtol=0, atol=1e-5)
    # Whatever prompt, question and names met it, it is as it was, and read anew it is the same.
    before = state.clone()
    encoder.likelihoods(contexts(encoder, 3), state, encoder.class_tokens(NAMES))
    assert torch.equal(state, before)
    assert torch.equal(encoder.image_state(read(encoder)), before)
    other = loaded(folders, family, "after-image", question="Name the animal.")
    assert torch.equal(other.image_state(read(other)), before)


@each_family
def test_kept_tokens_give_the_scores_of_kept_keys_and_values(folders: Folders, family: str) -> None:
    encoder = loaded(folders, family, "after-image")
    thrifty = loaded(folders, family, "after-image", kept="image-tokens")
    assert (encoder.kind, thrifty.kind) == (KEYS_VALUES, IMAGE_TOKENS)
    assert encoder.fingerprint == thrifty.fingerprint
    answers, stack = encoder.class_tokens(NAMES), contexts(encoder, 3)
    found = thrifty.likelihoods(stack, thrifty.image_state(read(thrifty)), answers)
    expected = encoder.likelihoods(stack, encoder.image_state(read(encoder)), answers)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@each_place
def test_a_stack_of_clients_is_each_client_alone(folders: Folders, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = loaded(folders, "smolvlm", place)
    model = GenerativeModel(encoder, encoder.class_tokens(NAMES))
    state = encoder.image_state(read(encoder)).float()
    stack = contexts(encoder, 4)
    features = torch.stack([state[[0, 1]], state[[2, 0]], state[[1, 1]], state[[0, 2]]])
    batch = Batch(features, torch.tensor([[0, 1], [2, 3], [4, 0], [1, 1]]), torch.ones(4, 2, dtype=torch.bool))
    gradients = ExactGradients(model)

    def of(chosen: slice) -> Any:
        part = Batch(batch.features[chosen], batch.labels[chosen], batch.mask[chosen])
        return gradients(lambda parameters: parameters["context"], {"context": stack[chosen]}, {}, part)

    together = of(slice(None))
    alone = [of(slice(client, client + 1)) for client in range(4)]
    torch.testing.assert_close(together.values["context"], torch.cat([one.values["context"] for one in alone]))
    # The same in pieces of one row, which backward recomputes.
    monkeypatch.setattr(generative_model, "NUMBERS_AT_ONCE", 1)
    assert model._rows_at_once(stack) == 1
    pieces = of(slice(None))
    torch.testing.assert_close(together.values["context"], pieces.values["context"], rtol=1e-4, atol=1e-6)
    predicted = model.predict(stack, state)
    expected = torch.stack([model.scores(one[None], one[None], state[None])[0] for one in stack])
    torch.testing.assert_close(predicted, expected, rtol=0, atol=1e-5)


@each_family
def test_gradients_of_examples_are_those_of_a_loop(folders: Folders, family: str) -> None:
    encoder = loaded(folders, family, "after-image")
    model = GenerativeModel(encoder, encoder.class_tokens(NAMES))
    state, labels = encoder.image_state(read(encoder)).float(), torch.tensor([1, 3, 0])
    prompt = contexts(encoder, 1)
    batch = Batch(state[None], labels[None], torch.tensor([[True, False, True]]))
    result = example_gradients(model, lambda parts: parts["context"], {"context": prompt}, {}, batch)
    found = torch.cat([piece["context"] for piece in result.pieces])
    for example in range(3):
        leaf = prompt.clone().requires_grad_()
        scores = encoder.likelihoods(leaf, state[example : example + 1], model.classes)
        loss = torch.nn.functional.cross_entropy(scores, labels[example : example + 1])
        (expected,) = torch.autograd.grad(loss, leaf)
        torch.testing.assert_close(found[example], expected[0] * (example != 1), rtol=1e-4, atol=1e-6)


@each_family
@each_place
def test_bfloat16_is_near(folders: Folders, family: str, place: str) -> None:
    exact, rough = loaded(folders, family, place), loaded(folders, family, place, torch.bfloat16)
    assert rough.dtype == torch.bfloat16
    assert rough.fingerprint == exact.fingerprint
    # States lie in tables of float32, which hold every number of bfloat16.
    found = rough.likelihoods(contexts(exact), rough.image_state(read(rough, 2)).float(), rough.class_tokens(NAMES))
    expected = exact.likelihoods(contexts(exact), exact.image_state(read(exact, 2)), exact.class_tokens(NAMES))
    assert found.dtype == torch.float32
    # Bfloat16 has 8 bits; sums over some thirty steps of some ten numbers near one lose a few hundredths of a nat.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.25)
    assert not torch.equal(found, expected)


@each_family
@each_place
def test_a_free_answer_is_that_of_transformers(folders: Folders, family: str, place: str) -> None:
    encoder, plain = loaded(folders, family, place), Plain(folders(family))
    typed: list[int] = encoder._tokenizer(WRITTEN, add_special_tokens=False).input_ids
    ids, _ = dialog(encoder, plain.model.config.image_token_id, typed)
    tokens, read_picture = torch.tensor([ids]), plain.read(pictures(1)[0])
    if family.startswith("qwen"):
        read_picture["mm_token_type_ids"] = (tokens == plain.model.config.image_token_id).int()
    made = plain.model.generate(input_ids=tokens, **read_picture, max_new_tokens=8, do_sample=False)
    answer = made[0, len(ids) :].tolist()
    found = list(encoder.greedy(encoder.embed(WRITTEN), read(encoder, 1)[0], 8))
    assert found == answer[: len(found)]
    assert len(found) == 8 or answer[len(found)] == 2
    # Where the model ends its answer, it ends.
    encoder._model.generation_config.eos_token_id = [found[2], 2]
    first = found.index(found[2])
    assert list(encoder.greedy(encoder.embed(WRITTEN), read(encoder, 1)[0], 8)) == found[:first]


def test_every_setting_that_changes_scores_is_in_the_fingerprint(folders: Folders, tmp_path: Path) -> None:
    ways: list[dict[str, Any]] = [
        {"place": "after-image"},
        {"place": "before-image"},
        {"place": "after-image", "question": "Name the animal."},
        {"place": "after-image", "template": "{image}{question} {answer}"},
        {"place": "after-image", "image_size": 32},
    ]
    found = [loaded(folders, "qwen2_vl", **way).fingerprint for way in ways]
    assert len(set(found)) == len(ways)
    same = loaded(folders, "qwen2_vl", "after-image", template=None, question="What is in the picture?")
    assert same.fingerprint == found[0]
    moved = shutil.copytree(folders("qwen2_vl"), tmp_path / "moved")
    assert (
        GenerativeEncoder.load(str(moved), CPU, settings=settings_of("qwen2_vl", "after-image")).fingerprint == found[0]
    )


def test_names_share_their_common_beginnings(folders: Folders) -> None:
    encoder = loaded(folders, "llava", "after-image")
    names = ["grand piano", "grand piano dog", "grand cat"]
    answers = encoder.class_tokens(names)
    rows = [ids[mask].tolist() for ids, mask in zip(answers.ids, answers.mask, strict=True)]
    beginnings = {tuple(row[:stop]) for row in rows for stop in range(1, len(row))}
    assert len(answers.tokens) == len(beginnings) < sum(len(row) - 1 for row in rows)
    with pytest.raises(EncoderError, match=r"class names 'cat' and 'cat' as the same"):
        encoder.class_tokens(["cat", "cat"])
    with pytest.raises(EncoderError, match="reads nothing in class name ''"):
        encoder.class_tokens(["cat", ""])
    with pytest.warns(SordinoWarning, match="does not know words of class name"):
        encoder.class_tokens(["cat", "\N{SNOWMAN}"])


def test_it_has_no_features(folders: Folders) -> None:
    encoder = loaded(folders, "llava", "after-image")
    told = r"encoder 'generative' has no features .* image_features needs; encoders that do: bundled, clip"
    with pytest.raises(EncoderError, match=told):
        encoder.image_features(read(encoder))
    with pytest.raises(EncoderError, match="text_features needs"):
        encoder.text_features(contexts(encoder), encoder.class_tokens(NAMES))
    with pytest.raises(EncoderError, match="has no patches"):
        encoder.patch_features(read(encoder))


def test_refusals_name_the_remedy(folders: Folders, clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"model_type is 'clip'; encoder 'generative' loads llava, idefics3"):
        load_encoder("generative", str(clip_folder), "float32", CPU)
    with pytest.raises(EncoderError, match=r"needs encoder\.checkpoint"):
        load_encoder("generative", None, "float32", CPU)
    with pytest.raises(ConfigError, match=r"image_size = 32: the preprocessing of llava says the size; leave it out"):
        loaded(folders, "llava", "after-image", image_size=32)
    with pytest.raises(ConfigError, match=r"image_size = 30: a multiple of 8, such as 32"):
        loaded(folders, "qwen2_vl", "after-image", image_size=30)
    for template in ("{image}{answer}", "{question}{image}{answer}", "{image}{question}{answer}."):
        with pytest.raises(ConfigError, match=r"encoder\.generative\.template = .*once each, in this order"):
            loaded(folders, "llava", "after-image", template=template)
    with pytest.raises(ConfigError, match=r"question = 'What is <image>\?': <image> stands for a picture"):
        loaded(folders, "llava", "after-image", question="What is <image>?")
    encoder = loaded(folders, "llava", "after-image")
    long = torch.zeros(1, 200, encoder.context_width)
    with pytest.raises(EncoderError, match=r"context_length = 200: .* takes 160: use a context_length of at most 1"):
        encoder.likelihoods(long, encoder.image_state(read(encoder, 1)), encoder.class_tokens(NAMES))
    with pytest.raises(EncoderError, match="ask for a shorter answer"):
        encoder.generate(torch.zeros(3, encoder.context_width), read(encoder, 1)[0], 200)


def test_large_states_are_told(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generative_encoder, "LARGEST_STATE", 5000)
    with pytest.warns(SordinoWarning, match=r"take 0 MB .* set encoder\.generative\.kept = 'image-tokens'"):
        encoder = loaded(folders, "llava", "after-image")
    monkeypatch.setattr(generative_encoder, "LARGEST_STATE", 4 * encoder.image_state(read(encoder, 1)).numel())
    with warnings.catch_warnings():
        warnings.simplefilter("error", SordinoWarning)
        loaded(folders, "llava", "after-image")
        monkeypatch.setattr(generative_encoder, "LARGEST_STATE", 0)
        loaded(folders, "llava", "after-image", kept="image-tokens")
        loaded(folders, "llava", "before-image")


def test_weights_that_could_run_code_are_refused(folders: Folders, tmp_path: Path) -> None:
    pickled = shutil.copytree(folders("llava"), tmp_path / "pickled")
    weights = transformers.AutoModelForImageTextToText.from_pretrained(pickled).state_dict()
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    with pytest.raises(EncoderError, match=r"no \*\.safetensors in it, and other files of weights may run code"):
        GenerativeEncoder.load(str(pickled), CPU)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("preprocessor_config.json", r"neither preprocessor_config\.json nor processor_config\.json in it"),
        ("tokenizer.json", "no tokenizer in it"),
        ("config.json", r"no config\.json in it"),
    ],
)
def test_a_missing_file_is_told(file: str, told: str, folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llava"), tmp_path / "whole")
    (folder / file).unlink()
    with pytest.raises(EncoderError, match=told):
        GenerativeEncoder.load(str(folder), CPU)


def test_damaged_weights_are_told(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llava"), tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    less = {name: weight for name, weight in weights.items() if "linear_2.bias" not in name}
    save_file(less, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"1 weights are missing, .*linear_2\.bias first"):
        GenerativeEncoder.load(str(folder), CPU)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(EncoderError, match="its weights cannot be read"):
        GenerativeEncoder.load(str(folder), CPU)
    # A tower that takes other pictures than the preprocessing makes.
    shutil.copy(folders("llava") / "model.safetensors", folder / "model.safetensors")
    pixels = json.loads((folder / "preprocessor_config.json").read_text())
    pixels["crop_size"] = {"height": 24, "width": 24}
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    with pytest.raises(EncoderError, match="its image tower cannot read what its preprocessing makes"):
        GenerativeEncoder.load(str(folder), CPU)


def test_a_tokenizer_of_another_model_is_told(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llava"), tmp_path / "mixed")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders("qwen2_vl") / name, folder / name)
    with pytest.raises(EncoderError, match="the tokenizer belongs to another model"):
        GenerativeEncoder.load(str(folder), CPU)


def test_a_checkpoint_with_code_is_read_without_running_it(folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(folders("llava"), tmp_path / "with code")
    ran = tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = dict.fromkeys(("AutoConfig", "AutoModel", "AutoImageProcessor"), "code.Own")
        content["auto_map"]["AutoTokenizer"] = ["code.Own", None]
        (folder / name).write_text(json.dumps(content))
    encoder = GenerativeEncoder.load(str(folder), CPU)
    assert encoder.image_length == 16
    assert not ran.exists()
