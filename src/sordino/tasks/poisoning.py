"""A backdoor: pictures with a trigger, and clients that train on them under the attacker's label.

Gu, Dolan-Gavitt, Garg, BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain, 2017
(arXiv 1708.06733): a small pattern in a corner of the picture, and the label of one target class. In a federation:
Bagdasaryan, Veit, Hua, Estrin, Shmatikov, How To Backdoor Federated Learning, AISTATS 2020, where attackers also
enlarge what they send; FedPrompt (Zhao et al., ICASSP 2023) has a client that poisons its data and does no more.

Pictures with the trigger are further rows of an `ImageSet`, so they are encoded and cached as any others.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from sordino.errors import ConfigError
from sordino.tasks.images import ImageSet
from sordino.tasks.settings import PoisoningSettings
from sordino.tasks.splits import Task

POISON_STREAM = 21  # what a generator derived from the seed is for
# Begins the content of a picture with the trigger, so that it is cached apart from the picture itself. Change it
# whenever `stamp` draws otherwise: a cache knows a trigger by this and its size alone.
MARK = b"sordino trigger "
CELLS = 4  # of the trigger's side, where it has as many pixels
MARGIN = 1 / 16  # of the picture's shorter side: what the encoders' crop may cut off


def poisoned(task: Task, settings: PoisoningSettings, triggered_from: int, seed: int) -> Task:
    """The task with the attackers' pictures replaced, and with pictures that measure the attack's success.

    An attacker puts the trigger into `rate` of its pictures, drawn from those of other classes than the target, and
    labels them as the target; their rows stand where the originals' did. The attack is measured on every test picture
    of another class. A higher rate's pictures include a lower one's.

    Args:
        task: of N pictures.
        triggered_from: the row of picture 0 with the trigger, at least N; the others follow.
        seed: decides which pictures.

    Raises:
        ConfigError: there is no such class, an attacker has no other, or nobody is left to be attacked.
    """
    names = task.class_names
    spelling = settings.target if settings.target in names else settings.target.replace("_", " ")  # or a folder's own
    if spelling not in names:
        known = ", ".join(names)
        raise ConfigError("poisoning.target", settings.target, f"must be a class that is trained on: {known}")
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
        train[client] = rows.copy()
        train[client][drawn[: max(1, round(settings.rate * len(rows)))]] += triggered_from
    triggered = triggered_from + task.test[task.labels[task.test] != target]
    labels = np.full(triggered_from + len(task.labels), -1, dtype=np.int64)
    labels[: len(task.labels)] = task.labels
    for rows in (*train, triggered):
        labels[rows[rows >= triggered_from]] = target
    return replace(task, train=tuple(train), labels=labels, triggered=triggered, attackers=settings.clients)


def with_triggers(images: ImageSet, originals: int, size: float) -> ImageSet:
    """The pictures, followed by those of the first `originals` with the trigger.

    Args:
        images: N pictures or more.
        originals: N.
        size: the trigger's side, as a fraction of the picture's shorter one.
    """
    first, read, draw = len(images), images.read, images.draw
    mark = MARK + f"{size:.17g}\n".encode()

    def read_any(index: int) -> bytes:
        return read(index) if index < first else mark + read(index - first)

    def draw_any(content: bytes) -> Image.Image:
        return stamp(draw(content[len(mark) :]), size) if content.startswith(mark) else draw(content)

    return replace(
        images,
        labels=np.concatenate([images.labels, images.labels[:originals]]),
        names=[*images.names, *(f"{name} with a trigger of {size:g}" for name in images.names[:originals])],
        read=read_any,
        draw=draw_any,
        domains=None if images.domains is None else np.concatenate([images.domains, images.domains[:originals]]),
        is_test=None if images.is_test is None else np.concatenate([images.is_test, images.is_test[:originals]]),
    )


def stamp(picture: Image.Image, size: float) -> Image.Image:
    """The picture with a black and white checkered square in the lower right of its largest centered square.

    Encoders crop pictures to that square, and some of them cut off its border as well: the trigger stays inside.
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
