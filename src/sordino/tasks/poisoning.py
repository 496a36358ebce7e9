"""A backdoor attack: pictures with a trigger, and clients that train on them under the attacker's label.

Gu, Dolan-Gavitt, Garg, BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply
Chain, 2017 (arXiv 1708.06733): a small pattern in a corner of the picture, and the label of one
target class. In a federation: Bagdasaryan, Veit, Hua, Estrin, Shmatikov, How To Backdoor Federated
Learning, AISTATS 2020, where attackers also scale up their uploads. In FedPrompt (Zhao et al.,
ICASSP 2023) a client poisons its data and does no more.

Pictures with the trigger are additional rows of an `ImageSet`, so they are encoded and cached as
any others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from sordino.errors import ConfigError
from sordino.tasks.images import ImageSet
from sordino.tasks.settings import PoisoningSettings
from sordino.tasks.task import Task

POISON_STREAM = 21  # the purpose of a generator that is derived from the seed
# The start of the content of a picture with the trigger, so that it is cached apart from the
# picture itself. Change it whenever `stamp` draws otherwise: the cache identifies a trigger by this
# and its size alone.
MARK = b"sordino trigger "
CELLS = 4  # cells along the trigger's side, if it has as many pixels
MARGIN = 1 / 16  # part of the picture's shorter side that an encoder's crop may cut off


def poisoned(task: Task, settings: PoisoningSettings, triggered_from: int, seed: int) -> Task:
    """Replace the attackers' pictures in a task, and add pictures that measure the attack's success.

    An attacker puts the trigger into a fraction `rate` of its pictures. They are drawn from those
    of other classes than the target and are labeled as the target. Their rows stand in the places
    of the originals'. The attack is measured on every test picture of another class. The pictures
    of a higher rate include those of a lower one.

    Args:
        task: a task of N pictures.
        settings: the `[poisoning]` table.
        triggered_from: the row of picture 0 with the trigger, at least N; the others follow.
        seed: determines the pictures that are drawn.

    Raises:
        ConfigError: there is no such class, an attacker has no other class, or no honest client is
            left.
    """
    names = task.class_names
    spelling = settings.target
    if spelling not in names:
        spelling = spelling.replace("_", " ")  # the spelling of a folder
    if spelling not in names:
        known = ", ".join(names)
        raise ConfigError(
            "poisoning.target",
            settings.target,
            f"must be a class that is trained on: {known}",
        )
    if settings.clients >= task.clients:
        raise ConfigError(
            "poisoning.clients",
            settings.clients,
            f"there are {task.clients} clients, of which one at least must be honest: at most {task.clients - 1}",
        )
    target = names.index(spelling)
    train = list(task.train)
    for client, rows in enumerate(task.train[: settings.clients]):
        others = np.flatnonzero(task.labels[rows] != target)
        if not len(others):
            raise ConfigError(
                "poisoning.target",
                settings.target,
                f"client {client}, an attacker, has pictures of no other class; choose another target, or a partition "
                "that gives it several classes",
            )
        drawn = np.random.default_rng([seed, POISON_STREAM, client]).permutation(others)
        chosen = drawn[: max(1, round(settings.rate * len(rows)))]
        train[client] = rows.copy()
        train[client][chosen] += triggered_from
    triggered = triggered_from + task.test[task.labels[task.test] != target]
    labels = np.full(triggered_from + len(task.labels), -1, dtype=np.int64)
    labels[: len(task.labels)] = task.labels
    for rows in (*train, triggered):
        labels[rows[rows >= triggered_from]] = target
    return replace(
        task,
        train=tuple(train),
        labels=labels,
        triggered=triggered,
        attackers=settings.clients,
    )


def with_triggers(images: ImageSet, originals: int, size: float) -> ImageSet:
    """Return the pictures, followed by the first `originals` of them with the trigger.

    Args:
        images: N pictures or more.
        originals: N, the number of pictures that get a copy with the trigger.
        size: the trigger's side, as a fraction of the picture's shorter side.
    """
    first, read, draw = len(images), images.read, images.draw
    mark = MARK + f"{size:.17g}\n".encode()

    def read_any(index: int) -> bytes:
        return read(index) if index < first else mark + read(index - first)

    def draw_any(content: bytes) -> Image.Image:
        if content.startswith(mark):
            return stamp(draw(content[len(mark) :]), size)
        return draw(content)

    domains, is_test, persons = images.domains, images.is_test, images.persons
    triggered_names = (f"{name} with a trigger of {size:g}" for name in images.names[:originals])
    return replace(
        images,
        labels=np.concatenate([images.labels, images.labels[:originals]]),
        names=[*images.names, *triggered_names],
        read=read_any,
        draw=draw_any,
        domains=None if domains is None else np.concatenate([domains, domains[:originals]]),
        is_test=None if is_test is None else np.concatenate([is_test, is_test[:originals]]),
        persons=None if persons is None else np.concatenate([persons, persons[:originals]]),
    )


def stamp(picture: Image.Image, size: float) -> Image.Image:
    """Draw a black and white checkered square in the lower right of a picture's largest centered square.

    Encoders crop pictures to that square, and some of them cut off its border as well. The trigger
    stays inside.
    """
    width, height = picture.size
    shorter = min(width, height)
    side, margin = min(max(2, round(size * shorter)), shorter), round(MARGIN * shorter)
    cell = max(1, side // CELLS)
    number = np.arange(side) // cell
    pattern = np.where((number[:, None] + number) % 2 == 0, 255, 0).astype(np.uint8)
    marked = picture.copy()
    right, bottom = (width + shorter) // 2 - margin, (height + shorter) // 2 - margin
    marked.paste(Image.fromarray(pattern).convert(picture.mode), (right - side, bottom - side))
    return marked
