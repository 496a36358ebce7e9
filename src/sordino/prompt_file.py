"""`SavedPrompt`: a learned prompt in a file, with all that is needed to use it and to say what it may tell.

One format, for prompts of `run` and of `tune-private`. The file is in safetensors format, so reading it runs no code:
its tensors are the prompt's, and its metadata has one entry, a JSON document with sorted keys. The same prompt makes
the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from torch import Tensor

from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import model_of
from sordino.encoders import choose_device, load_encoder
from sordino.encoders.base import DualEncoder
from sordino.encoders.classifier import Classifier
from sordino.encoders.generative.settings import GenerativeSettings
from sordino.encoders.prompt_model import Prompt, PromptModel, named_parts
from sordino.errors import ConfigError, EncoderError, PromptError, SordinoError, config_error
from sordino.files import Record, read_regular, write_atomically

ENTRY: Final = "sordino"  # of the metadata
FORMAT: Final = "sordino prompt 1"
MAX_BYTES = 1 << 32  # of a file
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64)
KNOWN_FEATURES = "class_features"  # the tensor of prompts whose text tower is not here
REMEDY = "take the file from its run directory again"


class EncoderRecord(Record):
    """The encoder that a prompt belongs to.

    Attributes:
        name: under which Sordino lists it.
        fingerprint: hex digest of its weights, tokenizer and preprocessing.
        checkpoint: the folder or hub name that it was loaded from; None for the bundled one.
        dtype: its precision in training.
        generative: the dialog around picture and prompt, of the encoder of that name; None for others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    fingerprint: str
    checkpoint: str | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    generative: GenerativeSettings | None = None

    LATER: ClassVar = ("generative",)

    @property
    def identity(self) -> str:
        """All that features depend on, as text: encoders with the same one answer alike, wherever they lie."""
        return self.model_dump_json(exclude={"checkpoint"})


class PrivacyRecord(BaseModel):
    """The privacy of a prompt.

    Attributes:
        private: whether everything that was learned, and left a client or is published, was noised.
        simulated: whether the noise can be drawn again; then nothing is private.
        statement: what is protected and what is not, in words.
        ledger_sha256: hex digest of the run's ledger; None where the run has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    private: bool
    simulated: bool
    statement: str
    ledger_sha256: str | None


class _Header(Record):
    """The JSON document of a file."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["sordino prompt 1"] = FORMAT
    version: str
    method: str
    settings: dict[str, Any]
    task: Literal["images", "text"]
    classes: Annotated[tuple[str, ...], FailFast()]  # of a hostile file not one error for each of millions
    encoder: EncoderRecord
    privacy: PrivacyRecord
    gray_range: tuple[float, float] | None
    client: int | None
    bare_context: bool
    shapes: dict[str, tuple[int, ...]]
    words: str | None = None

    LATER: ClassVar = ("words",)


@dataclass(frozen=True, eq=False)
class SavedPrompt:
    """One learned prompt with what it belongs to.

    Attributes:
        prompt: a context [M, E], or named tensors; without an axis of clients, on the CPU.
        method: the name of the method that learned it.
        settings: the method's settings, all of them, as JSON has them.
        class_names: the C classes that it was learned for.
        encoder: the frozen encoder that it was learned in.
        privacy: what its training released.
        version: of Sordino, which wrote it.
        task: what it sorts into classes: "images", or "text".
        gray_range: as in `[data]`, how gray pictures of more than 8 bits are read.
        client: the number of the client whose own it is; None where all share it.
        words: the prompt as text, which stands before a class name; None if it is vectors.
        source: the file that it was read from, for messages.
    """

    prompt: Prompt
    method: str
    settings: Mapping[str, Any]
    class_names: tuple[str, ...]
    encoder: EncoderRecord
    privacy: PrivacyRecord
    version: str
    task: Literal["images", "text"] = "images"
    gray_range: tuple[float, float] | None = None
    client: int | None = None
    words: str | None = None
    source: str = "the prompt"

    def save(self, file: Path | str, private: bool = False) -> None:
        """Write the file, all or nothing; an older one is replaced.

        Args:
            file: its path.
            private: only its owner may read it; else as the process's umask says.

        Raises:
            RunError: it cannot be written.
        """
        write_atomically(Path(file), self.to_bytes(), private=private)

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        tensors = {name: part.detach().cpu().contiguous() for name, part in named_parts(self.prompt).items()}
        header = _Header(
            version=self.version,
            method=self.method,
            settings=dict(self.settings),
            task=self.task,
            classes=self.class_names,
            encoder=self.encoder,
            privacy=self.privacy,
            gray_range=self.gray_range,
            client=self.client,
            bare_context=isinstance(self.prompt, Tensor),
            shapes={name: tuple(part.shape) for name, part in tensors.items()},
            words=self.words,
        )
        document = json.dumps(header.model_dump(), sort_keys=True)
        # One entry only: safetensors writes several in no fixed order.
        return safetensors.torch.save(tensors, metadata={ENTRY: document})

    @classmethod
    def load(cls, file: Path | str) -> SavedPrompt:
        """Read a file, and check that it is whole.

        Raises:
            PromptError: it is missing, damaged, or no prompt of Sordino; the message names it and says what to do.
        """
        path = Path(file)
        return cls._of(str(path), *_read(path))

    @classmethod
    def from_bytes(cls, content: bytes, source: str = "the prompt") -> SavedPrompt:
        """Read the content of a file, as `load` does.

        Args:
            content: of the file.
            source: where it is from, for messages.

        Raises:
            PromptError: it is damaged, or no prompt of Sordino.
        """
        return cls._of(source, *_parsed(content, source))

    @classmethod
    def _of(cls, path: str, header: _Header, tensors: dict[str, Tensor]) -> SavedPrompt:
        """Check that a document and tensors belong together, and make a prompt of them."""
        shapes = {name: tuple(part.shape) for name, part in tensors.items()}
        if shapes != header.shapes or (header.bare_context and set(shapes) != {"context"}):
            raise PromptError(f"{path} is damaged: its tensors are not those that it names; {REMEDY}")
        if not header.classes:
            raise PromptError(f"{path} is damaged: it names no class; {REMEDY}")
        for name, part in tensors.items():
            if part.dtype not in DTYPES:
                kind = str(part.dtype).removeprefix("torch.")
                raise PromptError(f"{path} is damaged: the tensor {name!r} is of {kind}; {REMEDY}")
            if not part.isfinite().all():
                raise PromptError(f"{path}: the tensor {name!r} is not finite, so training diverged; train it again")
        return cls(
            prompt=tensors["context"] if header.bare_context else tensors,
            method=header.method,
            settings=header.settings,
            class_names=header.classes,
            encoder=header.encoder,
            privacy=header.privacy,
            version=header.version,
            task=header.task,
            gray_range=header.gray_range,
            client=header.client,
            words=header.words,
            source=path,
        )

    def load_encoder(self, checkpoint: str | None = None, device: str = "auto") -> DualEncoder:
        """Load the encoder that the prompt belongs to.

        Args:
            checkpoint: the folder or hub name where it is now; None: where it was in training.
            device: "auto", "cpu", "cuda" or "mps".

        Raises:
            EncoderError: it is not ready, or is another one than in training.
            ConfigError: the encoder needs no checkpoint, or there is no such device.
        """
        known = self.encoder
        if checkpoint is not None and known.checkpoint is None:
            needless = f"{self.source} belongs to encoder {known.name!r}, which needs no checkpoint; leave it out"
            raise ConfigError("encoder", checkpoint, needless)
        try:
            place, where = checkpoint or known.checkpoint, choose_device(device)
            encoder = load_encoder(known.name, place, known.dtype, where, known.generative)
        except EncoderError as error:
            remedy = "" if known.checkpoint is None else "; say where it is now: --encoder, or load_encoder(checkpoint)"
            raise EncoderError(f"{self.source}: {error}{remedy}") from None
        self._check_encoder(encoder, checkpoint)
        return encoder

    def model(self, encoder: DualEncoder | None = None, class_names: Sequence[str] | None = None) -> Classifier:
        """Make a classifier of the prompt.

        Args:
            encoder: the one that it was learned in; None: load it.
            class_names: other candidate classes than those that it was learned on; None: these.

        Raises:
            EncoderError: it is another encoder, or not ready.
            ConfigError: there is no such method here, or it has other settings.
            PromptError: it sorts sentences, or its tensors do not fit the method.
        """
        if self.task != "images":
            raise PromptError(
                f"{self.source} sorts sentences behind a private text tower, whose two servers compute every answer; "
                "give a prompt that sorts pictures"
            )
        encoder = self.load_encoder() if encoder is None else encoder
        self._check_encoder(encoder)
        stack = {name: part[None] for name, part in named_parts(self.prompt).items()}
        prompt = stack["context"] if isinstance(self.prompt, Tensor) else stack
        names = self.class_names if class_names is None else tuple(class_names)
        classifier = Classifier(self._prompt_model(encoder, names), prompt, self.gray_range)
        try:
            classifier.check()
        except ValueError as error:
            raise PromptError(f"{self.source} does not fit method {self.method!r} ({error}); {REMEDY}") from None
        if self.words is not None and classifier.model.text(prompt) != [self.words]:
            raise PromptError(f"{self.source} is damaged: it is not the words {self.words!r} that it names; {REMEDY}")
        return classifier

    def _prompt_model(self, encoder: DualEncoder, class_names: tuple[str, ...]) -> PromptModel:
        classes = encoder.class_tokens(class_names)
        if KNOWN_FEATURES in named_parts(self.prompt):
            if class_names != self.class_names:
                raise PromptError(
                    f"{self.source} came with the features of its own classes from a text tower that is not here; "
                    "it sorts into no others"
                )
            return KnownFeatures(encoder, classes)
        if self.method not in METHODS:
            raise PromptError(
                f"{self.source} was learned by method {self.method!r}, which is not here; install its package, give "
                "its file with --method FILE, or in Python add it with sordino.add_method"
            )
        settings = settings_for(self.method, {self.method: self.settings})
        return model_of(algorithm(self.method), self.method, settings, encoder, classes)

    def _check_encoder(self, encoder: DualEncoder, checkpoint: str | None = None) -> None:
        if encoder.fingerprint == self.encoder.fingerprint:
            return
        given = checkpoint or getattr(encoder, "label", None)
        given = f"{encoder.name!r}" + (f" from {given!r}" if given else "")
        known = f"{self.encoder.name!r}" + (f" from {self.encoder.checkpoint!r}" if self.encoder.checkpoint else "")
        raise EncoderError(
            f"{self.source} was learned in encoder {known} (fingerprint {self.encoder.fingerprint[:12]}), and this is "
            f"{given} (fingerprint {encoder.fingerprint[:12]}); a prompt means nothing to another encoder: give its own"
        )


@dataclass(frozen=True)
class KnownFeatures(PromptModel):
    """The model of a prompt whose class features came from a text tower that is not here."""

    def class_features(self, prompt: Prompt) -> Tensor:
        """The features [P, C, D] that came with the prompt."""
        features = named_parts(prompt)[KNOWN_FEATURES]
        wanted = (len(self.classes), self.encoder.feature_width)
        if features.shape[1:] != wanted:
            raise ValueError(f"{KNOWN_FEATURES} has shape {tuple(features.shape[1:])} instead of {wanted}")
        return features

    def flops(self, prompt: Prompt, images: int) -> float:
        return 2.0 * images * named_parts(prompt)[KNOWN_FEATURES].numel()


def _read(path: Path) -> tuple[_Header, dict[str, Tensor]]:
    """The document and the tensors of a file, see `SavedPrompt.load`."""
    if path.is_dir():
        inside = sorted(file.relative_to(path).as_posix() for file in path.glob("**/prompts/*.safetensors"))
        inside = inside or sorted(file.name for file in path.glob("*.safetensors"))
        remedy = f"such as {path / inside[0]}" if inside else "as `sordino run` writes them into prompts/"
        raise PromptError(f"{path} is a folder; give a file of a prompt, {remedy}")
    try:
        content = read_regular(path, MAX_BYTES)
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file; give a file of a prompt, from prompts/ of a run directory") from None
    except (OSError, ValueError) as error:
        raise PromptError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {REMEDY}") from None
    except SordinoError as error:
        raise PromptError(f"{path} cannot be read: {error}; {REMEDY}") from None
    return _parsed(content, str(path))


def _parsed(content: bytes, path: str) -> tuple[_Header, dict[str, Tensor]]:
    """The document and the tensors of a file's content; see `SavedPrompt.load`."""
    foreign = f"{path} is no prompt of Sordino; give a file from prompts/ of a run directory"
    try:
        metadata = _metadata(content)
    except ValueError:
        raise PromptError(f"{foreign}, or, if it is one, it is damaged: {REMEDY}") from None
    if not isinstance(metadata.get(ENTRY), str):
        raise PromptError(foreign)
    try:
        document = json.loads(metadata[ENTRY])
        if isinstance(document, dict) and document.get("format") != FORMAT:
            raise PromptError(f"{path} has format {document.get('format')!r}; this Sordino reads {FORMAT!r}: update it")
        # By way of JSON, as pydantic's strict mode takes a list for a tuple only there.
        header = _Header.model_validate_json(metadata[ENTRY])
        tensors = safetensors.torch.load(content)
    except ValidationError as error:
        raise PromptError(f"{path} is damaged: {config_error(error, _Header)}; {REMEDY}") from None
    except (ValueError, RecursionError, safetensors.SafetensorError) as error:
        raise PromptError(f"{path} is damaged ({error}); {REMEDY}") from None
    return header, tensors


def _metadata(content: bytes) -> dict[str, Any]:
    """The metadata of a safetensors file, whatever of the tensors is there.

    Raises:
        ValueError: it is none.
    """
    size = int.from_bytes(content[:8], "little")
    if len(content) < 8 or size > len(content) - 8:
        raise ValueError("too short")
    try:
        header = json.loads(content[8 : 8 + size])
    except RecursionError as error:
        raise ValueError("too deep") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}
