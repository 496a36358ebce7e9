"""The prompts that a server holds in memory: checked when they are taken down, and looked up anew for every request."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

from PIL import Image

from sordino.algorithms import METHODS
from sordino.encoders.base import DualEncoder
from sordino.errors import ConfigError, PromptError, SordinoError
from sordino.prompt_file import SavedPrompt
from sordino.serving.classifier import PromptClassifier, described
from sordino.serving.folder import MANIFEST, SIGNATURE, read_files
from sordino.serving.manifest import Manifest, parse_label
from sordino.serving.registry import Published, Registry, WithdrawnError
from sordino.serving.rows import Withdrawal
from sordino.serving.server.refusal import Refusal
from sordino.serving.sources import check_claim
from sordino.serving.trust import Trusted

At = tuple[str, int, str]  # name, version and signature
Loader = Callable[[SavedPrompt], DualEncoder]


class Shelf:
    """Classifiers of published prompts. Its methods may be called from many threads.

    Args:
        registry: holds the prompts.
        trusted: publishers.
        most: classifiers in memory.
        load_encoder: loads a prompt's encoder; prompts of one encoder and precision share it.
    """

    def __init__(self, registry: Registry, trusted: Trusted, most: int, load_encoder: Loader) -> None:
        self.registry, self.trusted = registry, trusted
        self._most, self._load_encoder = most, load_encoder
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._held: OrderedDict[At, PromptClassifier] = OrderedDict()
        self._encoders: dict[str, DualEncoder] = {}  # by `EncoderRecord.identity`

    def take(self, name: str, version: str | None) -> PromptClassifier:
        """Return the classifier of a version that may be used now; see `look` and `load`."""
        at, held = self.look(name, version)
        return self.load(at) if held is None else held

    def look(self, name: str, version: str | None) -> tuple[At, PromptClassifier | None]:
        """Find a version that may be used now, and its classifier if it is in memory. Takes no time.

        Args:
            name: of the prompt.
            version: as a client wrote it; None: the latest that is not withdrawn.

        Raises:
            Refusal: there is none, or it is withdrawn.
            RunError: the registry cannot be read.
        """
        try:
            number = parse_label(name if version is None else f"{name}:{version}")[1]
            # Even of a prompt in memory: it may be withdrawn since, or its row changed.
            at = self.registry.current(name, number)
        except WithdrawnError as error:
            raise Refusal(410, _public(error.withdrawal)) from None
        except ConfigError:
            raise Refusal(404, "there is no such prompt") from None
        with self._lock:
            if at in self._held:
                self._held.move_to_end(at)
            return at, self._held.get(at)

    def versions(self, name: str) -> list[int]:
        """Return the versions of a prompt that may be asked for, ascending.

        Raises:
            RunError: the registry cannot be read.
        """
        return [
            each.version
            for each in self.registry.listed(self.trusted, name)
            if each.manifest is not None and each.trusted and each.withdrawn is None
        ]

    def describe(self, name: str, version: str | None) -> Published:
        """Return a version that may be used now, with everything checked, whatever is in memory.

        Raises:
            Refusal: there is none, or it is withdrawn or cannot be trusted.
            RunError: the registry cannot be read.
        """
        try:
            number = parse_label(name if version is None else f"{name}:{version}")[1]
            self.registry.current(name, number)
        except ConfigError:
            raise Refusal(404, "there is no such prompt") from None
        except WithdrawnError as error:
            raise Refusal(410, _public(error.withdrawal)) from None
        try:
            return self.registry.load(name, number, self.trusted)
        except PromptError as error:
            raise Unusable(str(error)) from None

    def load(self, at: At) -> PromptClassifier:
        """Check a version in full, and take its classifier into memory. May take as long as its encoder.

        Raises:
            Refusal: it cannot be trusted or used.
        """
        with self._loading:
            with self._lock:
                if at in self._held:
                    return self._held[at]
            try:
                found = self.registry.load(at[0], at[1], self.trusted)
                saved = described(found)
                if saved.task != "images":
                    raise Refusal(409, "this prompt sorts no pictures")
                if saved.method not in METHODS:
                    raise Unusable(
                        f"{found.place} was learned by method {saved.method!r}, which is not here; install its "
                        "package, or if it is in a file, answer in Python with sordino.add_method and "
                        "PromptClassifier: a server runs no file"
                    )
                known = saved.encoder.identity
                is_new = known not in self._encoders
                if is_new:
                    self._encoders[known] = self._load_encoder(saved)
                classifier = PromptClassifier.from_published(found, encoder=self._encoders[known])
                if is_new:  # an image tower is loaded with its first picture; let no client wait for it
                    classifier.classify([Image.new("RGB", (9, 9))])
            except SordinoError as error:
                raise Unusable(str(error)) from None
            with self._lock:
                self._held[at] = classifier
                while len(self._held) > self._most:
                    self._held.popitem(last=False)
            return classifier

    def put(self, content: Mapping[str, bytes]) -> Manifest:
        """Store a version that a client sends: the files of an exported folder.

        Raises:
            Refusal: they are not whole, nobody trusted signed them, they claim more privacy than their ledger
                has, or the version is not the next one.
        """
        try:
            if not {MANIFEST, SIGNATURE} <= content.keys():
                raise Refusal(422, f"send {MANIFEST} and {SIGNATURE} of an exported folder, and its files")
            found = read_files(content, "the upload", self.trusted)
            described(found)
            check_claim(found)
        except PromptError as error:
            raise Refusal(422, " ".join(str(error).split())) from None
        try:
            self.registry.accept(found)
        except ConfigError as error:
            raise Refusal(409, str(error)) from None
        return found.manifest


class Unusable(Refusal):
    """A prompt that is in the registry but cannot be answered with; the operator is told why.

    Attributes:
        why: for the operator alone.
    """

    def __init__(self, why: str) -> None:
        super().__init__(503, "this prompt cannot be used; ask the server's operator")
        self.why = why


def _public(withdrawal: Withdrawal) -> str:
    return f"this version is withdrawn since {withdrawal.at} ({withdrawal.reason})"
