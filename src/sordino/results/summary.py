"""The schema of `summary.json`, the results of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, ValidationError

from sordino.files import write_atomically

FILE = "summary.json"

Measure = Literal["local", "neighbor", "overall", "novel", "domain"]
MEASURES: tuple[Measure, ...] = ("local", "neighbor", "overall", "novel", "domain")


def _text(value: Any) -> str:
    """Accept any string: a class name may hold bytes of a folder's name that are not UTF-8, which pydantic refuses."""
    if not isinstance(value, str):
        raise ValueError("Input should be a valid string")
    return value


# The mean of n weights 1/n can exceed 1 by rounding; the bounds refuse NaN too.
Fraction = Annotated[float, Field(ge=0, le=1 + 1e-9)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[float, Field(ge=0)]
Variance = Annotated[float, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]
Text = Annotated[str, PlainValidator(_text)]


class _Part(BaseModel):
    # A newer version may have written more; what is known must be right.
    model_config = ConfigDict(frozen=True, extra="ignore")


class _Measured(_Part):
    def of(self, measure: Measure) -> float | None:
        """Return one of the five accuracies."""
        value: float | None = getattr(self, measure)
        return value


class Accuracy(_Measured):
    """Accuracies, fractions in [0, 1]: means over the clients that do not attack; None if a measure does not apply."""

    local: Fraction | None = None
    neighbor: Fraction | None = None
    overall: Fraction | None = None
    novel: Fraction | None = None
    domain: Fraction | None = None


class ClientResult(_Measured):
    """The result of one client, and a description of its data.

    Attributes:
        client: its number in the federation, from 0.
        name: its domain's, numbered where several have it, or else its number.
        local, neighbor, overall, novel, domain: accuracies, fractions in [0, 1].
        attack_success: fraction of the images with an attacker's trigger that its prompt takes for the target; None for
            attackers, and for everyone if nobody attacks.
        examples: training images.
        classes: names of the classes that it trains on.
        domains: names of its domains, or None if the data set has none.
    """

    client: Count
    name: Text = ""
    local: Fraction | None = None
    neighbor: Fraction | None = None
    overall: Fraction | None = None
    novel: Fraction | None = None
    domain: Fraction | None = None
    attack_success: Fraction | None = None
    examples: Count = 0
    classes: tuple[Text, ...] = ()
    domains: tuple[Text, ...] | None = None

    @property
    def called(self) -> str:
        """Its name, or its number in a summary that has no names."""
        return self.name or str(self.client)


class PictureVariance(_Part):
    """How much the gain over the hand-written prompt varies over test pictures; see `sordino.results.interval`.

    Attributes:
        pictures: the number of test pictures that count.
        over_pictures: variance of the mean difference, with pictures as its sample; None for one picture.
        over_pairs: the same with pairs of a client and a picture as its sample.
    """

    pictures: Count
    over_pictures: Variance | None = None
    over_pairs: Variance = 0.0


class HandWritten(_Part):
    """The hand-written prompt on the same test pictures: what one has without training.

    Attributes:
        prompt: its words before the class name.
        itself: the run learns nothing, and its prompt is this one.
        accuracy: means over the clients that do not attack.
        per_client: one a client, in order of their numbers.
        variance: of the run's gain over it, by measure.
    """

    prompt: Text
    itself: bool = False
    accuracy: Accuracy
    per_client: tuple[Accuracy, ...]
    variance: dict[Measure, PictureVariance] = {}


class BestRound(_Part):
    """The evaluated round with the highest accuracy on the test pictures. Prompts are kept of the last one.

    Attributes:
        round: its number, the first of equals; 0 is before training.
        measure: the accuracy that it is the highest of.
        accuracy: in this round.
    """

    round: Count
    measure: Measure
    accuracy: Accuracy


class Effort(_Part):
    """The training that a run did, so that methods can be compared at equal effort.

    Attributes:
        steps_a_round: gradients that a client computes in a round.
        gradient_steps: of one client in the whole run, the mean over clients.
        examples_seen: training images in these steps' batches, repeated ones counted again; of one client, the mean
            over clients. The expected number if batches are sampled. Statistics are released of each example once.
    """

    steps_a_round: Count
    gradient_steps: Amount
    examples_seen: Amount


class ObserverEpsilon(_Part):
    """The privacy loss towards one observer, by both accountants; None if it is unbounded."""

    observer: Text
    epsilon: float | None = None
    epsilon_rdp: float | None = None


# Nothing with a larger epsilon is called private: e^100 is above 10^43, so no number of observations could ever tell
# that such a bound holds from that there is none.
MOST_PRIVATE_EPSILON = 100.0


class Privacy(_Part):
    """The privacy that was spent, and the statement in words that belongs to it.

    Attributes:
        private: everything that was learned from images and left a client was noised.
        simulated: noise was added that can be drawn again, so that nothing is private.
        epsilon, delta: towards the worst untrusted observer; None if there is no bound.
        unit: what one unit of privacy is: `example`, `person` or `client`.
        noise_multiplier: the smallest one of all releases.
        noise_by: who added noise.
        trusted: observers that are trusted.
        randomness: the source of the noise.
        observers: the privacy loss by observer.
        statement: the guarantee, and what it does not cover, in words.
        ledger_digest: SHA-256 of `ledger.json`, in hex.
        rounds_unpaid: rounds that were not run because the budget was spent.
    """

    private: bool
    simulated: bool = False
    epsilon: float | None = None
    delta: float | None = None
    unit: Text | None = None
    noise_multiplier: float | None = None
    noise_by: tuple[Text, ...] = ()
    trusted: tuple[Text, ...] = ()
    randomness: Text | None = None
    observers: tuple[ObserverEpsilon, ...] = ()
    statement: Text
    ledger_digest: Text = ""
    rounds_unpaid: Count = 0

    @property
    def bounded(self) -> bool:
        """True if there is an epsilon, and it is small enough to say something."""
        return self.epsilon is not None and self.epsilon <= MOST_PRIVATE_EPSILON


class Communication(_Part):
    """Bytes of serialized messages, and of images if clients hand these over.

    Attributes:
        upload_bytes_per_client_round, broadcast_bytes_per_client_round: of one client in one round, the largest round.
        total_upload_bytes, total_broadcast_bytes: of all clients in all rounds.
    """

    upload_bytes_per_client_round: Count
    broadcast_bytes_per_client_round: Count
    total_upload_bytes: Count
    total_broadcast_bytes: Count


class Durations(_Part):
    """Seconds of a run's parts; `total` holds what lies between them too."""

    encode: Seconds | None = None
    train: Seconds
    evaluate: Seconds | None = None
    total: Seconds


class SkippedImage(_Part):
    """An image that could not be used."""

    name: Text
    reason: Text


class PassedOver(_Part):
    """Files that are no images: how many of a kind are in a folder."""

    kind: Text
    folder: Text
    files: Count


class Copies(_Part):
    """Images of a task that are copies of others in it; see `sordino.tasks.copies`."""

    tested_and_trained: Count = 0
    in_two_classes: Count = 0
    at_two_clients: Count = 0
    repeated_in_training: Count = 0
    examples: dict[Text, tuple[Text, ...]] = {}


class Images(_Part):
    """Images that were encoded, came from the cache, or were left out."""

    encoded: Count = 0
    cached: Count = 0
    skipped: tuple[SkippedImage, ...] = ()
    passed_over: tuple[PassedOver, ...] = ()
    copies: Copies = Copies()


class Summary(_Part):
    """`summary.json`: the results of one run.

    Attributes:
        algorithm, encoder: their names.
        dataset: the source of the images, as in `data.source`.
        clients, rounds: their numbers.
        accuracy: means over the clients that do not attack.
        attack_success: mean over the clients that are attacked; None if nobody attacks.
        per_client: one result a client, in order of their numbers.
        before: accuracy before the first round; None if the method has no rounds.
        hand_written: the hand-written prompt's accuracy; None if its features were not at hand.
        best: the best evaluated round; None if the method has no rounds, or under a privacy mechanism: to choose a
            round by the accuracy of test pictures is a release that no epsilon covers.
        effort: the training that was done.
        words: the prompts as text, one a client or one for all, if they are words; else empty.

    The four before the last are None in summaries of earlier versions.
    """

    algorithm: Text
    encoder: Text
    dataset: Text
    clients: Count
    rounds: Count
    seed: int
    accuracy: Accuracy
    attack_success: Fraction | None = None
    per_client: tuple[ClientResult, ...]
    privacy: Privacy
    communication: Communication
    seconds: Durations
    images: Images = Images()
    before: Accuracy | None = None
    hand_written: HandWritten | None = None
    best: BestRound | None = None
    effort: Effort | None = None
    words: tuple[Text, ...] = ()
    version: Text = ""

    @property
    def honest(self) -> tuple[ClientResult, ...]:
        """The clients that the means are over: all but attackers, who alone are attacked by nobody."""
        if self.attack_success is None:
            return self.per_client
        return tuple(result for result in self.per_client if result.attack_success is not None)

    def as_dict(self) -> dict[str, Any]:
        """Return the content of `summary.json` as dictionaries, lists, strings, numbers and None."""
        content: dict[str, Any] = json.loads(json.dumps(self.model_dump()))
        return content

    def write(self, folder: Path) -> None:
        """Write `summary.json` in a run directory, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        write_atomically(folder / FILE, (json.dumps(self.as_dict(), indent=2) + "\n").encode())

    @classmethod
    def from_json(cls, content: bytes | str) -> Summary:
        """Read the content of `summary.json`.

        Raises:
            ValueError: it is no JSON, or not that of a summary; the message is one line.
            RecursionError: it is nested too deeply.
        """
        # Not pydantic's parser: Python writes NaN and Infinity, and lone surrogates.
        fields = json.loads(content)
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(complaint(error)) from None


def complaint(error: ValidationError) -> str:
    """Return the first complaint of a validation in one line: the place and the reason."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "the whole"
    return f"{place}: {first['msg']}"
