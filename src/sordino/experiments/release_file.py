"""`release.safetensors` of a run directory: what was released of class statistics, for restarts and for other runs.

Whatever is made of a release is post-processing. So a run may use another run's release again, at no further cost, if
it is of the same data: `privacy.release = RUN`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from pydantic import ValidationError
from torch import Tensor

from sordino.errors import ConfigError, RunError, config_error
from sordino.experiments.config import Experiment
from sordino.files import absolute_path, write_atomically
from sordino.privacy.ledger import Release
from sordino.privacy.settings import OF_A_RELEASE, PrivacySettings
from sordino.privacy.statistics.estimates import Noise
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.runtime.local import LocalRuntime, Training

FILE = "release.safetensors"
ENTRY = "sordino"
# 1 is of a time when features were seen from a center that was found with a noisy count, 2 of one when noise had so few
# bits that numbers told which data they came from.
FORMAT = 3
ANEW = "release anew in another directory"


@dataclass(frozen=True)
class ReleaseFile:
    """A release of class statistics.

    Attributes:
        path: where it was read; for messages.
        tensors: name to tensor, on the CPU, as `ClientTraining.release`.
        releases: the ledger's entries of it.
        digests: of each party's data.
        class_names: the classes, in order.
        encoder: the encoder's fingerprint.
        privacy: the `[privacy]` table, with the noise multiplier, delta and counts' share that were used.
        noise: the noise multipliers of its parts.
        persons: a digest of whose the examples are if persons are protected, else "".
        public: a digest of the public images' features that the directions are made of, or "".
    """

    path: Path
    tensors: Mapping[str, Tensor]
    releases: tuple[Release, ...]
    digests: tuple[str, ...]
    class_names: tuple[str, ...]
    encoder: str
    privacy: Mapping[str, Any]
    noise: Noise
    persons: str
    public: str

    @classmethod
    def of(cls, runtime: LocalRuntime, training: Training, path: Path) -> ReleaseFile:
        """Return the release of a run that has just made it."""
        mechanism = runtime.mechanism
        assert isinstance(mechanism, StatisticsMechanism)
        used = {
            "noise_multiplier": mechanism.noise_multiplier,
            "delta": mechanism.delta,
            "count_share": mechanism.count_share,
            "center_share": mechanism.center_share,
            "scatter_share": mechanism.scatter_share,
            "nonce": runtime.nonce if runtime.privacy.simulation else None,
        }
        return cls(
            path,
            {name: tensor.detach().cpu().contiguous() for name, tensor in training.at_clients.release.items()},
            training.ledger.releases,
            tuple(runtime.digests),
            runtime.model.classes.names,
            runtime.model.encoder.fingerprint,
            runtime.privacy.model_dump() | used,
            mechanism.multipliers,
            runtime.persons_digest,
            runtime.public_digest,
        )

    def save(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            RunError: it cannot be written.
        """
        document = {
            "format": FORMAT,
            "releases": [asdict(release) for release in self.releases],
            "digests": self.digests,
            "class_names": self.class_names,
            "encoder": self.encoder,
            "privacy": dict(self.privacy),
            "noise": asdict(self.noise),
            "persons": self.persons,
            "public": self.public,
        }
        document["sha256"] = _digest(self.tensors, document)
        content = safetensors.torch.save(dict(self.tensors), metadata={ENTRY: json.dumps(document)})
        write_atomically(self.path, content, private=True)

    @classmethod
    def load(cls, path: Path) -> ReleaseFile:
        """Read a release; nothing is executed.

        Raises:
            RunError: there is none, or it is damaged or was changed.
        """
        try:
            content = path.read_bytes()
            length = int.from_bytes(content[:8], "little")
            document = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][ENTRY])
            tensors = safetensors.torch.load(content)
            if document["format"] in range(1, FORMAT):
                older = "was written by an earlier version, whose noise had too few bits: its epsilon does not hold"
                raise RunError(f"{path} {older}; {ANEW}")
            if document["format"] != FORMAT or document.pop("sha256") != _digest(tensors, document):
                raise ValueError("its content is not what was written")
            releases = [
                Release(**entry | {name: tuple(entry[name]) for name in ("noise_multipliers", "observers")})
                for entry in document["releases"]
            ]
            return cls(
                path,
                tensors,
                tuple(releases),
                tuple(document["digests"]),
                tuple(document["class_names"]),
                document["encoder"],
                document["privacy"],
                Noise(**document["noise"]),
                document["persons"],
                document["public"],
            )
        except OSError as error:
            reason = f"no {FILE} to read ({error.strerror}); give the directory of a run with mechanism 'statistics'"
            raise RunError(f"{path.parent}: {reason}") from None
        except (ValueError, KeyError, TypeError, RecursionError, safetensors.SafetensorError) as error:
            raise RunError(f"{path} is damaged or was changed ({error}); {ANEW}") from None

    def check(self, runtime: LocalRuntime) -> None:
        """See that the release is of this run's data, classes and encoder.

        Raises:
            ConfigError: it is not.
        """
        encoder = runtime.model.encoder
        same = {
            "data of the clients": (self.digests, tuple(runtime.digests)),
            "classes": (self.class_names, runtime.model.classes.names),
            "encoder": (self.encoder, encoder.fingerprint),
            "persons": (self.persons, runtime.persons_digest),
            "public images": (self.public, runtime.public_digest),
        }
        for what, (released, here) in same.items():
            if released != here:
                raise ConfigError(
                    "privacy.release",
                    str(self.path.parent),
                    f"is a release of other {what}; use the [data], [partition], [encoder] and seed that it was made "
                    "with, or leave the key out to release anew",
                )
        if "own" not in self.tensors and runtime.mechanism.inputs.server_uses == "nothing":
            raise ConfigError(
                "privacy.release",
                str(self.path.parent),
                "holds all clients' joint statistics only, and this method learns from each client's own; release anew",
            )


def with_release(config: Experiment) -> tuple[Experiment, ReleaseFile | None]:
    """Return the configuration with the noise of an earlier release, and the release, if it names one.

    Raises:
        RunError: the release cannot be read, or was made with settings that are refused by now.
        ConfigError: the configuration says something else than the release.
    """
    if config.privacy.release is None:
        return config, None
    folder = absolute_path(config.privacy.release, "privacy.release")
    earlier = ReleaseFile.load(folder / FILE)
    here = config.privacy.model_dump()
    for key in sorted(config.privacy.model_fields_set & set(OF_A_RELEASE)):
        if key in earlier.privacy and here[key] != earlier.privacy[key]:
            raise ConfigError(
                f"privacy.{key}",
                here[key],
                f"the release of {folder} was made with {earlier.privacy[key]!r}; leave the key out, or release anew",
            )
    given = {key: value for key, value in earlier.privacy.items() if key in OF_A_RELEASE} | {"release": str(folder)}
    try:
        return config.model_copy(update={"privacy": PrivacySettings(**here | given)}), earlier
    except ValidationError as error:  # an earlier version allowed it
        wrong = config_error(error, PrivacySettings, "privacy")
        raise RunError(f"{folder}: its release was made with what is refused by now ({wrong}); {ANEW}") from None


def _digest(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> str:
    """Return a digest in hex of all that a file says."""
    total = hashlib.sha256(json.dumps(document, sort_keys=True).encode())
    for name in sorted(tensors):
        total.update(f"{name} {tuple(tensors[name].shape)}".encode() + tensors[name].numpy().tobytes())
    return total.hexdigest()
