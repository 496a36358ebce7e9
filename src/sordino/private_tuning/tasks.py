"""Tasks that a data owner tunes a prompt for. Sentences leave, features come back, and losses stay with the owner.

A text task classifies sentences. It compares features of '[CLS] prompt sentence [SEP]' with features of the classes'
descriptions behind the same prompt. An image task classifies pictures. Only '[CLS] prompt class name. [SEP]' leaves,
and the features that come back are compared with image features that never leave. All candidates of a generation are
one call of the forward pass. Few-shot splits depend on the seed alone, so all methods of a comparison share them.

Test examples are the same for all seeds. Examples that are neither trained nor tested on serve to choose settings, see
`Part`.
"""

from __future__ import annotations

import csv
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sordino.encoders.bundled import Embedder
from sordino.errors import ConfigError, DataError, shortened
from sordino.experiments.data_record import sequence_digest
from sordino.files import read_regular, user_path
from sordino.mpc.tower.distill import embedder_of
from sordino.mpc.tower.sentences import Forward, encoded
from sordino.private_tuning.settings import PrivateTuning, longest_of, no_sentences
from sordino.prompt_file import KNOWN_FEATURES

Part = Literal["test", "validation"]  # examples to test on; "validation": training examples that are no shots
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

SPLIT_STREAM = 3  # purpose of a generator that is derived from the seed
TEST_SEED = 0  # test examples do not depend on a run's seed
TEXT_SCALE = 50.0  # ratio of a text task's logits to cosines, which differ between classes by some hundredths
MAX_BYTES = 1 << 30  # of a file of sentences
HEADER = ["sentence", "label"]


class Task(ABC):
    """A few-shot task; P prompts, N examples, C classes.

    Attributes:
        kind: "text" or "images".
        embedder: the owner's: tokenizer, and embeddings of tokens and of positions.
        class_names: C names.
        initial: the words of the initial prompt.
        length: M, tokens of the prompt. The initial one is cut or repeated to this length.
        labels: of training examples, [N].
        test_labels: of test examples, [T].
    """

    kind: ClassVar[Literal["text", "images"]]
    embedder: Embedder
    class_names: tuple[str, ...]
    initial: str
    length: int
    labels: Tensor
    test_labels: Tensor

    def start(self) -> Tensor:
        """Return the initial prompt, [M, E]."""
        return initial_prompt(self.embedder, self.initial, self.length)

    @abstractmethod
    def logits(self, forward: Forward, prompts: Tensor, test: bool = False) -> Tensor:
        """Compute logits [P, N, C] of training or test examples behind prompts [P, M, E], in one call of `forward`.

        Differentiable in the prompts if `forward` is.
        """

    @abstractmethod
    def contents(self, test: bool = False) -> list[bytes]:
        """Return the SHA-256 of each training or test example, in order."""

    def record(self) -> dict[str, Any]:
        """Return the task's digests for the run directory; see `sordino.experiments.data_record`."""
        words = self.embedder
        embeddings = hashlib.sha256(words.tokenizer.to_str().encode())
        for part in (words.words, words.positions):
            embeddings.update(part.detach().cpu().float().numpy().tobytes())

        def digest(test: bool) -> str:
            labels = (self.test_labels if test else self.labels).tolist()
            names = [self.class_names[label] for label in labels]
            return sequence_digest(zip(self.contents(test), names, strict=True))

        return {"train": digest(False), "tests": digest(True), "embeddings": embeddings.hexdigest()}

    def losses(self, forward: Forward, prompts: Tensor) -> Tensor:
        """Compute the mean cross-entropy [P] over training examples for prompts [P, M, E], without a gradient."""
        with torch.no_grad():
            return cross_entropies(self.logits(forward, prompts), self.labels)

    def accuracy(self, forward: Forward, prompt: Tensor) -> float:
        """Compute the accuracy on test examples behind a prompt [M, E]."""
        return float(self.measure(forward, prompt)[0].double().mean())

    def measure(self, forward: Forward, prompt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Classify the test examples behind a prompt [M, E], in one call of `forward`.

        Returns:
            Which are classified correctly [T] bool, and by name what a classifier of new examples needs beside the
            prompt.
        """
        with torch.no_grad():
            return self._correct(self.logits(forward, prompt[None], test=True)[0]), {}

    def _correct(self, logits: Tensor) -> Tensor:
        return logits.argmax(-1) == self.test_labels


def cross_entropies(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute mean cross-entropies over examples, from [P, N, C] and [N] to [P]."""
    return F.cross_entropy(logits.mT, labels.expand(len(logits), -1), reduction="none").mean(1)


@dataclass(frozen=True, eq=False)
class TextTask(Task):
    """Classification of sentences into classes given by descriptions.

    Attributes:
        embedder: the owner's: tokenizer, and embeddings of tokens and of positions.
        class_names: C names.
        descriptions: C texts, one a class.
        initial, length: see `Task`.
        longest: most tokens of a sentence with prompt, start and end. The rest is cut off.
        sentences, labels: training examples.
        test_sentences, test_labels: test examples.
    """

    kind = "text"

    embedder: Embedder
    class_names: tuple[str, ...]
    descriptions: tuple[str, ...]
    initial: str
    length: int
    longest: int
    sentences: tuple[str, ...]
    labels: Tensor
    test_sentences: tuple[str, ...]
    test_labels: Tensor

    def contents(self, test: bool = False) -> list[bytes]:
        texts = self.test_sentences if test else self.sentences
        return [hashlib.sha256(text.encode()).digest() for text in texts]

    def logits(self, forward: Forward, prompts: Tensor, test: bool = False) -> Tensor:
        """Compute scaled cosines of sentences to descriptions behind the same prompt; see `Task`."""
        texts = [*self.descriptions, *(self.test_sentences if test else self.sentences)]
        features = self.features(forward, prompts, texts)
        count = len(self.descriptions)
        classes, sentences = features[:, :count], features[:, count:]
        logits: Tensor = TEXT_SCALE * sentences @ classes.mT
        return logits

    def features(self, forward: Forward, prompts: Tensor, texts: Sequence[str]) -> Tensor:
        """Compute unit-norm features of texts behind each prompt, [P, M, E] to [P, len(texts), E]."""
        room = self.longest - prompts.shape[1] - 2
        tokens = [self.embedder.embed(text)[:room] for text in texts]
        end = _mark(self.embedder, "[SEP]")
        rows = [torch.cat([embedded, end]) for embedded in tokens]
        return F.normalize(_behind(self.embedder, forward, prompts, rows), dim=-1)


@dataclass(frozen=True, eq=False)
class ImageTask(Task):
    """Classification of pictures into classes given by names.

    Attributes:
        embedder: as in `TextTask`.
        class_names: C names.
        initial, length: see `Task`.
        project: maps mean-pooled sentences [..., E] to unit-norm features [..., D].
        logit_scale: of cosines.
        features, labels: training examples, as unit-norm image features [N, D].
        test_features, test_labels: test examples.
        digests, test_digests: SHA-256 of the pictures' contents.
        encoder: name, fingerprint and precision of the image tower.
    """

    kind = "images"

    embedder: Embedder
    class_names: tuple[str, ...]
    initial: str
    length: int
    project: Callable[[Tensor], Tensor]
    logit_scale: float
    features: Tensor
    labels: Tensor
    test_features: Tensor
    test_labels: Tensor
    digests: tuple[bytes, ...]
    test_digests: tuple[bytes, ...]
    encoder: Mapping[str, str]

    def check_length(self) -> None:
        """Check that every class's sentence fits the checkpoint, before the search.

        Raises:
            ConfigError: a sentence does not fit.
        """
        classes, limit = self.embedder.class_tokens(self.class_names), len(self.embedder.positions)
        whole = self.sentence_length(self.length)
        if whole > limit:
            name = self.class_names[int(classes.mask.sum(1).argmax())]
            raise ConfigError(
                "prompt.length",
                self.length,
                f"with the longest class name, {shortened(name)}, a sentence has {whole} tokens and "
                f"the checkpoint takes {limit}: shorten one of them",
            )

    def sentence_length(self, length: int) -> int:
        """Return the tokens of the longest sentence behind a prompt of this length."""
        return 1 + length + int(self.embedder.class_tokens(self.class_names).mask.sum(1).max())

    def contents(self, test: bool = False) -> list[bytes]:
        return list(self.test_digests if test else self.digests)

    def record(self) -> dict[str, Any]:
        return super().record() | {"encoder": dict(self.encoder)}

    def logits(self, forward: Forward, prompts: Tensor, test: bool = False) -> Tensor:
        """Compute scaled cosines of image features to class features; see `Task`. No image enters `forward`."""
        return self._cosines(self.class_features(forward, prompts), test)

    def class_features(self, forward: Forward, prompts: Tensor) -> Tensor:
        """Compute unit-norm features [P, C, D] of the classes' sentences behind prompts [P, M, E]."""
        classes = self.embedder.class_tokens(self.class_names)
        rows = [row[is_token] for row, is_token in zip(classes.embeddings, classes.mask, strict=True)]
        return self.project(_behind(self.embedder, forward, prompts, rows))

    def measure(self, forward: Forward, prompt: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Classify the pictures, and return the prompt's class features [C, D]: with them the tower is not needed."""
        with torch.no_grad():
            features = self.class_features(forward, prompt[None])
            return self._correct(self._cosines(features, test=True)[0]), {KNOWN_FEATURES: features[0]}

    def _cosines(self, class_features: Tensor, test: bool) -> Tensor:
        """Scaled cosines [P, N, C] of training or test examples."""
        images = self.test_features if test else self.features
        logits: Tensor = self.logit_scale * images @ class_features.mT
        return logits


def text_task(config: PrivateTuning, part: Part = "test") -> TextTask:
    """Open the text task of a configuration, with shots drawn from the seed.

    Args:
        config: of `sordino tune-private`.
        part: examples to test on.

    Raises:
        ConfigError: a file or a checkpoint is missing, or sentences may be longer than a checkpoint's.
        DataError: data is malformed, or there is too little.
    """
    task, names, folder = config.task, tuple(config.task.label_names or ()), config.model.embeddings
    try:
        embedder = embedder_of(None if folder is None else user_path(folder, "model.embeddings"))
    except ConfigError as error:
        raise ConfigError("model.embeddings", folder, error.allowed) from None
    positions = len(embedder.positions)
    if longest_of(task) > positions:
        raise ConfigError("task.longest", longest_of(task), f"must be at most {positions}, the checkpoint's positions")
    sentences, labels = read_sentences(Path(str(task.train)), "task.train", len(names))
    shots = drawn(labels, np.ones(len(labels), dtype=np.bool_), task.shots, config.seed, str(task.train))
    among = ~np.isin(np.arange(len(labels)), shots)
    test_sentences, test_labels, where = sentences, labels, str(task.train)
    if part == "test":
        test_sentences, test_labels = read_sentences(Path(str(task.test)), "task.test", len(names))
        among, where = np.ones(len(test_labels), dtype=np.bool_), str(task.test)
    tests = drawn(test_labels, among, task.test_limit, TEST_SEED, where)
    chosen = [test_sentences[row] for row in tests] + [sentences[row] for row in shots]
    _check_texts(embedder, task.descriptions or (), chosen, longest_of(task) - config.prompt.length - 2)
    return TextTask(
        embedder=embedder,
        class_names=names,
        descriptions=tuple(task.descriptions or ()),
        initial=config.prompt.initial,
        length=config.prompt.length,
        longest=longest_of(task),
        sentences=tuple(sentences[row] for row in shots),
        labels=torch.from_numpy(labels[shots]),
        test_sentences=tuple(test_sentences[row] for row in tests),
        test_labels=torch.from_numpy(test_labels[tests]),
    )


def _check_texts(embedder: Embedder, descriptions: Sequence[str], sentences: Sequence[str], room: int) -> None:
    """Refuse descriptions that have the same tokens, also after a cut to `room` tokens. Warn of unknown words."""
    embedder.check_names("description", descriptions, descriptions)
    cut: dict[tuple[int, ...], str] = {}
    for text in descriptions:
        other = cut.setdefault(tuple(embedder.tokens(text)[:room]), text)
        if other != text:
            raise ConfigError(
                "task.descriptions",
                [other, text],
                f"are the same in their first {room} tokens, after which task.longest cuts; shorten them or raise it",
            )
    embedder.warn_unknown("sentence", sentences)


def initial_prompt(embedder: Embedder, text: str, length: int) -> Tensor:
    """Embed a text's tokens, cut or repeated to M tokens: [M, E].

    Raises:
        ConfigError: the text has no token.
    """
    embedder.warn_unknown("prompt.initial", [text])
    tokens = embedder.embed(text)
    if not len(tokens):
        raise ConfigError("prompt.initial", text, "must have a word at least")
    return tokens.repeat(-(-length // len(tokens)), 1)[:length]


def read_sentences(file: Path, key: str, classes: int) -> tuple[tuple[str, ...], Indices]:
    """Read sentences and labels from a tab-separated file with the header `sentence label`.

    Args:
        file: to read.
        key: configuration key that names the file, for messages.
        classes: C. Labels are below it.

    Raises:
        ConfigError: there is no such file.
        DataError: the header is another, or a line lacks a sentence or a known label. The message names the line.
    """
    try:
        lines = read_regular(file, MAX_BYTES).decode("utf-8-sig").splitlines()
    except FileNotFoundError:
        raise ConfigError(key, str(file), no_sentences(file)) from None
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise ConfigError(key, str(file), f"not a readable text file: {error}") from None
    rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != HEADER:
        raise DataError(f"{file}: the first line must be the header 'sentence<TAB>label'")
    known = {str(label) for label in range(classes)}
    for number, row in enumerate(rows[1:], 2):
        if len(row) != 2 or not row[0].strip() or row[1] not in known:
            raise DataError(f"{file}, line {number}: must be a sentence, a tab, and a label from 0 to {classes - 1}")
    sentences = tuple(row[0].strip() for row in rows[1:])
    return sentences, np.array([int(row[1]) for row in rows[1:]], dtype=np.int64)


def drawn(labels: Indices, among: Flags, per_class: int | None, seed: int, what: str) -> Indices:
    """Draw rows of examples of each class, sorted by class. The draw of 4 shots is part of the draw of 16.

    Args:
        labels: [N].
        among: [N], false for rows that must not be drawn. They do not change the draw of the others.
        per_class: examples of each class; None for all.
        seed: of the draw.
        what: name of the examples' source, for messages.

    Raises:
        DataError: a class has too few examples.
    """
    chosen = []
    for label in range(int(labels.max()) + 1):
        generator = np.random.default_rng([seed, SPLIT_STREAM, label])
        rows = generator.permutation(np.flatnonzero(labels == label))
        rows = rows[among[rows]]
        if len(rows) < (per_class or 1):
            raise DataError(
                f"{what} has {len(rows)} readable examples of label {label}, and {per_class or 1} are needed; "
                "add examples, or lower task.shots"
            )
        chosen.append(rows[:per_class])
    return np.concatenate(chosen)


def _behind(embedder: Embedder, forward: Forward, prompts: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Encode '[CLS] prompt row' for each prompt [P, M, E] and row [T, E] in one call: mean-pooled, [P, rows, E]."""
    start = _mark(embedder, "[CLS]")
    sentences = []
    for prompt in prompts:
        for row in rows:
            whole = torch.cat([start, prompt.to(row), row])
            sentences.append(whole + embedder.positions[: len(whole)])
    return encoded(forward, sentences).view(len(prompts), len(rows), -1)


def _mark(embedder: Embedder, mark: str) -> Tensor:
    """Return a special token's embedding, [1, E]."""
    return embedder.words[embedder.tokenizer.token_to_id(mark)][None]
