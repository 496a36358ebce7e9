"""Few-shot tasks: who trains and who tests, and losses that are those of one sentence at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sordino.errors import ConfigError, DataError, EncoderError, SordinoWarning
from sordino.mpc.tower.sentences import Forward, Sentences, encoded, in_the_clear
from sordino.mpc.tower.tower import PrivateTower, bundled_tower
from sordino.private_tuning.open_task import open_task, pictures_of, split_images
from sordino.private_tuning.settings import PrivateTuning, parse_private_config
from sordino.private_tuning.tasks import (
    TEXT_SCALE,
    ImageTask,
    Part,
    TextTask,
    cross_entropies,
    drawn,
    initial_prompt,
    read_sentences,
)
from sordino.tasks import DataSettings
from sordino.tasks.sources import load_images

GOOD = ["a fine film", "a delight from start to end", "moving", "the best of the year , and by far the funniest"]
BAD = ["a dull film", "it drags and drags , and then it drags some more", "awful", "not worth the price of popcorn"]


@pytest.fixture(scope="module")
def tower() -> PrivateTower:
    """Two layers, so that a test takes no time."""
    whole = bundled_tower()
    return PrivateTower(whole.heads, whole.epsilon, whole.norm, whole.layers[:2])


@pytest.fixture
def text_config(tmp_path: Path) -> Callable[..., PrivateTuning]:
    """Twelve sentences a class to train on, four to test on."""
    for name, times in (("train", 3), ("test", 1)):
        rows = [f"{each} {'!' * n}\t{label}" for n in range(times) for label in (0, 1) for each in (BAD, GOOD)[label]]
        (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\n" + "\n".join(rows) + "\n", encoding="utf-8")

    def make(seed: int = 0, prompt: int = 2, **task: object) -> PrivateTuning:
        table = {
            "kind": "text",
            "train": str(tmp_path / "train.tsv"),
            "test": str(tmp_path / "test.tsv"),
            "label_names": ["negative", "positive"],
            "descriptions": ["it was terrible.", "it was great."],
            "shots": 3,
        }
        return parse_private_config(
            {"seed": seed, "task": table | task, "prompt": {"length": prompt, "initial": "it was"}}
        )

    return make


@pytest.fixture
def image_config(pictures: Path) -> Callable[..., PrivateTuning]:
    """Four classes of eight pictures, of which four of each test."""

    def make(seed: int = 0, **task: object) -> PrivateTuning:
        table = {"kind": "images", "source": f"imagefolder:{pictures}", "shots": 2}
        return parse_private_config(
            {"seed": seed, "task": table | task, "prompt": {"length": 3, "initial": "a photo of a"}}
        )

    return make


def counted(forward: Forward) -> tuple[Forward, list[int]]:
    """The same, and a list of how many sentences each call had."""
    calls: list[int] = []

    def inner(groups: Sequence[Sentences]) -> list[Tensor]:
        calls.append(sum(len(group.lengths) for group in groups))
        return forward(groups)

    return inner, calls


def alone(task: TextTask | ImageTask, tower: PrivateTower, prompt: Tensor, tokens: Tensor) -> Tensor:
    """One sentence by itself, without padding: '[CLS] prompt tokens' to its mean state [E]."""
    start = task.embedder.words[task.embedder.tokenizer.token_to_id("[CLS]")][None]
    whole = torch.cat([start, prompt, tokens])
    return tower((whole + task.embedder.positions[: len(whole)])[None], torch.ones(1, len(whole)))[-1][0].mean(0)


def candidates(task: TextTask | ImageTask, count: int = 3) -> Tensor:
    noise = torch.randn(count, *task.start().shape, generator=torch.Generator().manual_seed(1))
    return task.start() + 0.05 * noise


def test_text_losses_are_those_of_one_sentence_at_a_time(
    text_config: Callable[..., PrivateTuning], tower: PrivateTower
) -> None:
    task = open_task(text_config(longest=12))
    assert isinstance(task, TextTask)
    prompts, losses = candidates(task), []
    for prompt in prompts:

        def feature(text: str, prompt: Tensor = prompt) -> Tensor:
            ids = task.embedder.tokenizer.encode(text, add_special_tokens=False).ids[: 12 - 2 - 2]
            end = task.embedder.tokenizer.token_to_id("[SEP]")
            return F.normalize(alone(task, tower, prompt, task.embedder.words[torch.tensor([*ids, end])]), dim=0)

        classes = torch.stack([feature(text) for text in task.descriptions])
        logits = torch.stack([TEXT_SCALE * classes @ feature(text) for text in task.sentences])
        losses.append(F.cross_entropy(logits, task.labels))
    torch.testing.assert_close(task.losses(in_the_clear(tower), prompts), torch.stack(losses), rtol=1e-4, atol=1e-4)


def test_image_losses_are_those_of_one_class_at_a_time(
    image_config: Callable[..., PrivateTuning], tower: PrivateTower
) -> None:
    task = open_task(image_config())
    assert isinstance(task, ImageTask)
    prompts, losses = candidates(task), []
    for prompt in prompts:
        names = [task.embedder.class_tokens([name]).embeddings[0] for name in task.class_names]
        classes = torch.stack([task.project(alone(task, tower, prompt, name)) for name in names])
        losses.append(F.cross_entropy(task.logit_scale * task.features @ classes.T, task.labels))
    torch.testing.assert_close(task.losses(in_the_clear(tower), prompts), torch.stack(losses), rtol=1e-4, atol=1e-4)


def test_a_generation_is_one_call_and_keeps_no_graph(
    text_config: Callable[..., PrivateTuning], image_config: Callable[..., PrivateTuning], tower: PrivateTower
) -> None:
    for task, sentences in ((open_task(text_config()), 2 + 6), (open_task(image_config()), 4)):
        forward, calls = counted(in_the_clear(tower))
        losses = task.losses(forward, candidates(task).requires_grad_())
        assert calls == [3 * sentences]  # pictures are no part of it
        assert not losses.requires_grad
        assert losses.shape == (3,)


def test_a_padded_sentence_is_encoded_as_it_is_alone(tower: PrivateTower) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [0.1 * torch.randn(length, 384, generator=generator) for length in (9, 16, 3, 12, 5, 10)]
    together = encoded(in_the_clear(tower), rows)
    one_by_one = torch.cat([encoded(in_the_clear(tower), [row]) for row in rows])
    torch.testing.assert_close(together, one_by_one, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_prompt_where_they_are_wanted(
    text_config: Callable[..., PrivateTuning], tower: PrivateTower
) -> None:
    task = open_task(text_config())
    prompt = task.start().clone().requires_grad_()
    (loss,) = cross_entropies(task.logits(in_the_clear(tower), prompt[None]), task.labels)
    (gradient,) = torch.autograd.grad(loss, prompt)
    moved = torch.stack([prompt.detach() - 1e-2 * gradient / gradient.norm(), prompt.detach()])
    lower, here = task.losses(in_the_clear(tower), moved).tolist()
    assert lower < here


def test_the_shots_depend_on_the_seed_alone(text_config: Callable[..., PrivateTuning]) -> None:
    first, again = open_task(text_config()), open_task(text_config(prompt=5, longest=20, test_limit=2))
    other = open_task(text_config(seed=1))
    assert isinstance(first, TextTask)
    assert isinstance(again, TextTask)
    assert isinstance(other, TextTask)
    assert first.sentences == again.sentences
    assert set(first.sentences) != set(other.sentences)
    assert set(first.test_sentences) == set(other.test_sentences)
    assert first.labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_fewer_shots_are_among_more() -> None:
    labels = np.array([0, 1] * 20)
    among = np.ones(40, dtype=np.bool_)
    few, many = (set(drawn(labels, among, shots, 5, "data").tolist()) for shots in (4, 16))
    assert few < many
    masked = among.copy()
    masked[list(few)] = False
    assert not few & set(drawn(labels, masked, 16, 5, "data").tolist())


@pytest.mark.slow
def test_settings_are_chosen_on_neither_shots_nor_tests(
    text_config: Callable[..., PrivateTuning], image_config: Callable[..., PrivateTuning]
) -> None:
    chosen = open_task(text_config(), "validation")
    assert isinstance(chosen, TextTask)
    assert len(chosen.test_sentences) == 24 - 6
    assert not set(chosen.sentences) & set(chosen.test_sentences)
    tests = open_task(image_config())
    assert isinstance(tests, ImageTask)
    for seed in (0, 1, 2):
        pictures, validation = open_task(image_config(seed)), open_task(image_config(seed), "validation")
        assert isinstance(pictures, ImageTask)
        assert isinstance(validation, ImageTask)
        assert pictures.test_features.equal(tests.test_features)
        assert len(pictures.test_labels) == 16
        assert len(validation.test_labels) == 8
        everything = torch.cat([pictures.features, validation.test_features, tests.test_features])
        assert len(everything.unique(dim=0)) == 8 + 8 + 16  # no picture twice


@pytest.fixture
def pictures_of_patients(tmp_path: Path) -> Path:
    """Sixty files of twenty patients, each with pictures of both classes; nobody reads them to list them."""
    root, rows = tmp_path / "patients", ["file_name,patient"]
    for number in range(60):
        name = f"{('benign', 'malign')[number // 3 % 2]}/{number}.png"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
        rows.append(f"{name},p{number % 20}")
    (root / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    return root


@pytest.mark.parametrize("own_split", [False, True])
@pytest.mark.parametrize("part", ["test", "validation"])
def test_shots_and_pictures_to_test_on_share_no_person(
    pictures_of_patients: Path, image_config: Callable[..., PrivateTuning], part: Part, own_split: bool
) -> None:
    if own_split:  # in which two patients are in both
        table = (pictures_of_patients / "metadata.csv").read_text(encoding="utf-8").splitlines()
        tests = [number % 20 >= 12 and number not in (12, 33) for number in range(60)]
        rows = [f"{row},{'test' if test else 'train'}" for row, test in zip(table[1:], tests, strict=True)]
        text = "\n".join([table[0] + ",split", *rows])
        (pictures_of_patients / "metadata.csv").write_text(text, encoding="utf-8")
    tested = set()
    for seed in range(8):
        config = image_config(seed, source=f"imagefolder:{pictures_of_patients}", shots=3)
        images = pictures_of(config)
        assert images.persons is not None
        shots, tests = split_images(images, np.ones(len(images), dtype=np.bool_), config, part)
        assert len(shots) == 2 * 3
        assert len(tests)
        assert set(images.persons[shots].tolist()).isdisjoint(images.persons[tests].tolist())
        if images.is_test is not None:
            assert not images.is_test[shots].any()
            assert images.is_test[tests].all() == (part == "test")
        tested.add(tuple(tests.tolist()))
    if part == "test":
        assert len(tested) == 1  # the same for all seeds


def test_pictures_are_those_that_other_commands_read(
    pictures_of_patients: Path, image_config: Callable[..., PrivateTuning]
) -> None:
    """Persons by each way that `[data]` has, and labels of a list or a table."""
    root, keys = pictures_of_patients, {}
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.png"))
    lines = [f"{name},{'ab'[row % 2]},q{row % 7}" for row, name in enumerate(names)]
    (root / "list.csv").write_text("\n".join(["file,finding,person", *lines]), encoding="utf-8")
    keys["table"] = {"source": f"table:{root}/list.csv", "label_column": "finding", "class_names": ["no", "yes"]}
    keys["list"] = {"source": f"imagefolder:{root}", "persons": f"{root}/list.csv"}
    for task in keys.values():
        expected = load_images(DataSettings(**task))  # type: ignore[arg-type]
        images = pictures_of(image_config(**task))
        assert images.class_names == expected.class_names
        assert (images.person_names, list(images.names)) == (expected.person_names, list(expected.names))
        assert images.person_names == tuple(f"q{number}" for number in range(7))
    (root / "list.csv").write_text("file,person\nx.png,y\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"task\.persons: .* has no line for"):
        pictures_of(image_config(**keys["list"]))
    with pytest.raises(ConfigError, match=r"task\.person_column = 'who': there is no such column"):
        pictures_of(image_config(source=f"imagefolder:{root}", person_column="who"))


def test_a_picture_that_cannot_be_read_is_passed_over(
    image_config: Callable[..., PrivateTuning], pictures: Path
) -> None:
    whole = open_task(image_config(shots=4))
    next((pictures / "red_apple").glob("*.png")).write_bytes(b"no picture")
    short = open_task(image_config(shots=1))
    assert len(short.test_labels) in (15, 16)
    assert len(whole.labels) == 16
    with pytest.raises(DataError, match=r"readable examples of label \d, and 5 are needed"):
        open_task(image_config(shots=5))


def test_sentences_longer_than_a_checkpoints_are_refused(
    text_config: Callable[..., PrivateTuning],
) -> None:
    open_task(text_config(longest=512))
    with pytest.raises(ConfigError, match=r"task.longest = 513: must be at most 512"):
        open_task(text_config(longest=513))


def test_a_prompt_is_cut_or_repeated(text_config: Callable[..., PrivateTuning]) -> None:
    embedder = open_task(text_config()).embedder
    words = embedder.embed("a photo of a")
    assert initial_prompt(embedder, "a photo of a", 2).equal(words[:2])
    assert initial_prompt(embedder, "a photo of a", 6).equal(torch.cat([words, words[:2]]))
    with pytest.raises(ConfigError, match="prompt.initial"):
        initial_prompt(embedder, "", 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\nfine\t1\n", "the first line must be the header"),
        ("sentence\tlabel\nfine\t1\nbad\t2\n", "line 3: must be .* a label from 0 to 1"),
        ("sentence\tlabel\nfine\n", "line 2"),
        ("sentence\tlabel\n \t1\n", "line 2"),
    ],
)
def test_malformed_lines_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "data.tsv"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_sentences(file, "task.train", 2)


def test_a_file_of_sentences_may_begin_with_a_byte_order_mark_and_must_be_a_file(tmp_path: Path) -> None:
    file = tmp_path / "data.tsv"
    file.write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\nfine\t1\r\n")
    assert read_sentences(file, "task.train", 2)[0] == ("fine",)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(ConfigError, match=r"task\.train = .*not a regular file"):
            read_sentences(path, "task.train", 2)


def test_descriptions_that_read_the_same_are_refused(text_config: Callable[..., PrivateTuning]) -> None:
    with pytest.raises(EncoderError, match="reads descriptions 'It was great.' and 'it was great.' as the same"):
        open_task(text_config(descriptions=["It was great.", "it was great."]))
    long = "it was a film of the year"
    open_task(text_config(descriptions=[f"{long} one", f"{long} two"]))
    with pytest.raises(ConfigError, match=r"task\.descriptions = .*same in their first 7 tokens"):
        open_task(text_config(descriptions=[f"{long} one", f"{long} two"], longest=11))


def test_unknown_words_in_sentences_and_prompts_are_a_warning(text_config: Callable[..., PrivateTuning]) -> None:
    with pytest.warns(SordinoWarning, match="does not know words of description"):
        open_task(text_config(descriptions=["龘", "it was great."]))
    embedder = open_task(text_config()).embedder
    with pytest.warns(SordinoWarning, match="does not know words of prompt.initial"):
        initial_prompt(embedder, "a 龘", 2)
    file = Path(str(text_config().task.test))
    file.write_text(file.read_text(encoding="utf-8").replace("moving", "龘"), encoding="utf-8")
    with pytest.warns(SordinoWarning, match="does not know words of sentence '龘"):
        open_task(text_config())


def test_class_folders_that_read_the_same_are_refused(
    image_config: Callable[..., PrivateTuning], pictures: Path
) -> None:
    config = image_config()
    (pictures / "red_apple").rename(pictures / "Blue Sky")
    with pytest.raises(EncoderError, match="'Blue Sky' and 'blue sky' as the same"):
        open_task(config)


def test_deep_grey_is_read_in_a_given_range(image_config: Callable[..., PrivateTuning], pictures: Path) -> None:
    generator = np.random.default_rng(0)
    for file in pictures.rglob("*.png"):
        Image.fromarray(generator.integers(0, 4096, (8, 8), dtype=np.uint16)).save(file)
    with pytest.raises(DataError, match="0 readable examples"):
        open_task(image_config())
    assert len(open_task(image_config(gray_range=[0, 4095])).labels) == 8


def test_what_is_missing_is_named(text_config: Callable[..., PrivateTuning], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.train = .*absent\.tsv.*no such file"):
        open_task(text_config(train=str(tmp_path / "absent.tsv")))
    with pytest.raises(DataError, match="12 readable examples of label 0, and 13 are needed"):
        open_task(text_config(shots=13))


def test_sst2_is_read(real_data: Callable[[str], Path]) -> None:
    folder = real_data("sst2")
    sentences, labels = read_sentences(folder / "validation.tsv", "task.test", 2)
    assert len(sentences) == len(labels) == 872
    assert set(labels.tolist()) == {0, 1}
