"""The data of a site: its clients' examples as the method reads them, and its test pictures."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import ClientData
from sordino.encoders.prompt_model import Prompt, map_prompt, prompt_count
from sordino.errors import RunError
from sordino.experiments.config import Experiment
from sordino.experiments.data_digests import party_digests
from sordino.experiments.features import EncodedDataset
from sordino.files import NewFile, create_files
from sordino.progress import silent
from sordino.randomness import system_bytes
from sordino.runtime.agreement import Plan
from sordino.runtime.evaluate import EvaluationSet
from sordino.runtime.facts import Units, client_data
from sordino.runtime.messages import MessageError

KEY = "digests.key"  # in the state folder: digests of data are keyed, so that nobody else can confirm a guess


@dataclass(frozen=True)
class OwnData:
    """A site's clients and their examples.

    Attributes:
        plan: the experiment, with the site's encoder.
        class_names: the classes, in order.
        numbers: of its clients within its own partition.
        data: their examples.
        units: what each holds.
        digests: of each one's data, keyed.
        public: a digest of the public images' features; "" without any.
        tests: for each client its test pictures.
    """

    plan: Plan
    class_names: tuple[str, ...]
    numbers: list[int]
    data: ClientData
    units: Units
    digests: list[str]
    public: str
    tests: list[EvaluationSet]

    @classmethod
    def open(
        cls,
        config: Experiment,
        clients: Sequence[int] | None,
        names: Sequence[str] | None,
        state: Path,
        tells_names: bool = True,
    ) -> OwnData:
        """Read and encode a site's data; encoded pictures come from the cache.

        Args:
            config: the experiment with the site's own data, partition and encoder.
            clients: those of the partition that are here; None: all.
            names: the experiment's classes, in order; None if the data's own are taken.
            state: the site's folder, with the key of digests.
            tells_names: whether an error may name a class.

        Raises:
            SordinoError: data or encoder are not what the site's file says, or persons are at two clients.
            MessageError: the data has a class that the experiment lacks.
        """
        dataset = EncodedDataset.open(config)
        task, _ = dataset.task(config, silent)
        class_names = tuple(names) if names is not None else task.class_names
        if strangers := [name for name in task.class_names if name not in class_names]:
            which = repr(strangers[0]) if tells_names else "something"
            raise MessageError(f"this site has pictures of {which}, which is not a class of the experiment")
        place = torch.tensor([class_names.index(name) for name in task.class_names])
        model = dataset.model(config, class_names)
        device = dataset.encoder.device
        features, labels = dataset.tables[model.reads].features, torch.from_numpy(task.labels)
        labels = torch.where(labels >= 0, place[labels.clamp(min=0)], labels)
        numbers = list(range(task.clients)) if clients is None else sorted(clients)
        train = [task.train[number] for number in numbers]
        held = np.concatenate(train)
        ends = np.cumsum([len(rows) for rows in train])
        rows = [range(end - len(own), end) for own, end in zip(train, ends, strict=True)]
        persons = None if dataset.images.persons is None else dataset.images.persons[held].tolist()
        units = Units.of(rows, persons, config.privacy)
        chosen = torch.from_numpy(held)
        table = (features[chosen].to(device), labels[chosen].to(device))
        data = client_data(*table, rows, config.runtime.weighting, persons, units.sizes)
        public = dataset.public(config, task)
        public_features = None if public is None else public.features.to(device)
        plan = plan_of(config, model, public_features, table[0].new_zeros(table[0].shape[1:]))
        digests = party_digests(dataset, task)
        tests = []
        for number in numbers:
            own = torch.from_numpy(task.test[task.local[number] > 0])
            tests.append(EvaluationSet(model, features[own].to(device), labels[own].to(device)))
        keyed = [_keyed(state, digests[number]) for number in numbers]
        return cls(plan, class_names, numbers, data, units, keyed, public_digest(public_features), tests)

    def accuracies(self, prompt: Prompt) -> list[float | None]:
        """Return each client's accuracy on its own test pictures; None where there are none.

        Args:
            prompt: of the K clients, or the one that they share.
        """
        found: list[float | None] = []
        for place, test in enumerate(self.tests):
            at = place if prompt_count(prompt) > 1 else 0
            own = map_prompt(prompt, lambda part, at=at: part[at : at + 1])  # type: ignore[misc]
            correct = test.correct(own)[0] if len(test.labels) else None
            found.append(None if correct is None else float(correct.double().mean()))
        return found


def plan_of(config: Experiment, model: Any, public: Tensor | None, example: Tensor) -> Plan:
    """Return an experiment's plan with a party's own encoder."""
    return Plan(
        algorithm(config.algorithm),
        settings_for(config.algorithm, config.settings),
        model,
        config.rounds,
        config.runtime,
        config.privacy,
        config.seed,
        public,
        example,
    )


def public_digest(features: Tensor | None) -> str:
    """Return a digest of public images' features; "" if there are none."""
    if features is None:
        return ""
    return hashlib.sha256(features.cpu().contiguous().numpy().tobytes()).hexdigest()


def _keyed(state: Path, digest: str) -> str:
    """Return a digest that only this site can make; the same data has the same one in every experiment."""
    file = state / KEY
    try:
        if not file.exists():
            with contextlib.suppress(FileExistsError):  # another process made it since
                create_files(NewFile(file, system_bytes(32), private=True))
        key = file.read_bytes()
    except OSError as error:
        raise RunError(f"{file}: {error.strerror or error}; choose another state folder in the site's file") from None
    return hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()
