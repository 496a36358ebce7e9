"""Compressed uploads: their error is Gaussian, the sum has the noise that is charged, and bytes are few."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from sordino.algorithms import promptfl
from sordino.algorithms.base import RoundContext, Upload, named_tensors
from sordino.errors import ConfigError
from sordino.privacy.accounting import noise_multiplier, spent
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statement import statement
from sordino.privacy.uploads.dithered import drawn_keys, quantized, restored
from sordino.randomness import Streams, SystemRandomness
from sordino.runtime import messages
from sordino.runtime.local import LocalRuntime
from sordino.runtime.messages import MessageError, UploadHeader

MakeRuntime = Callable[..., LocalRuntime]
ROWS = [list(range(8 * k, 8 * k + 8)) for k in range(5)]
TABLES = {"context_length": 4, "batch_size": 4, "local_steps": 1, "optimizer": {"learning_rate": 1e-12}}
COMPRESSED = {"mechanism": "dp-fedavg", "noise_by": "server", "compress": True, "clip": 1e-3, "delta": 0.1}


def accepts(values: Tensor, deviation: float) -> bool:
    """Whether values may be normal with this standard deviation, at one in a hundred million."""
    low, high = stats.chi2.ppf([5e-9, 1 - 5e-9], values.numel())
    return bool(low < float(values.double().square().sum()) / deviation**2 < high)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e3])
def test_the_error_is_gaussian_whatever_is_sent(scale: float) -> None:
    values = scale * torch.linspace(-1, 1, 20_000).expand(3, -1)
    keys = drawn_keys(SystemRandomness(3, torch.device("cpu")))
    codes = quantized(values, 0.5, keys, "change")
    errors = (restored(codes, 0.5, keys, "change") - values.double()).flatten()
    assert stats.kstest(errors.numpy() / 0.5, "norm").pvalue > 1e-9
    if scale:
        correlation = float(torch.corrcoef(torch.stack([errors, values.flatten().double()]))[0, 1])
        assert abs(correlation) < 7 / math.sqrt(60_000)
    # A second tensor, and another client, have dithers of their own.
    others = restored(codes, 0.5, keys, "other") - restored(codes, 0.5, keys, "change")
    assert others.abs().min() > 0
    assert not torch.equal(errors[:20_000], errors[20_000:40_000])


def test_who_has_the_key_sees_no_noise() -> None:
    """The same upload makes the same integers, and the step bounds what it was."""
    keys = drawn_keys(SystemRandomness(1, torch.device("cpu")))
    values = torch.randn(1, 5_000, generator=torch.Generator().manual_seed(0))
    codes = quantized(values, 0.01, keys, "change")
    assert torch.equal(codes, quantized(values, 0.01, keys, "change"))
    moved = quantized(values + 1.0, 0.01, keys, "change")
    assert (moved != codes).all(), "a step is much smaller than one"


def test_the_mean_has_the_noise_that_is_left_when_colluders_take_theirs_off(make_runtime: MakeRuntime) -> None:
    z, moves = 2.0, []
    privacy = COMPRESSED | {"noise_multiplier": z, "colluders": 2}
    runtime = make_runtime("promptfl", ROWS, TABLES, rounds=20, privacy=privacy, weighting="uniform")
    training = runtime.start()
    for _ in range(20):
        after, _ = runtime.round(training)
        moves.append(after.server.context - training.server.context)  # type: ignore[attr-defined]
        training = after
    part = z * COMPRESSED["clip"] / math.sqrt(5 - 2)  # of one client, on the sum
    assert accepts(torch.stack(moves), part * math.sqrt(5) / 5)
    assert not accepts(torch.stack(moves), z * COMPRESSED["clip"] / 5), "the parts of two are more than is charged"
    (release,) = training.ledger.releases
    assert (release.noise_multiplier, release.observers) == (z, ("clients", "public"))
    assert training.ledger.trusted == ("server",)
    told = statement(training.ledger, "client")
    assert "the server knows the dither and sees every upload without noise" in str(told)


def test_what_is_rounded_was_clipped_and_is_nobody_elses(make_runtime: MakeRuntime) -> None:
    """With next to no noise, uploads are read as they were clipped; one client's data change no other's integers."""
    steep = TABLES | {"optimizer": {"learning_rate": 100.0}}
    privacy = COMPRESSED | {"noise_multiplier": 0.01, "simulation": True, "nonce": "0f" * 16}
    seen = []
    for rows in (ROWS, [*ROWS[:-1], [0, 1, 2]]):
        runtime = make_runtime("promptfl", rows, steep, rounds=1, privacy=privacy, weighting="uniform")
        start = runtime.start()
        randomness = Streams(7, 1, range(5), torch.device("cpu"))
        end = runtime.mechanism.client_end(randomness, range(5))
        context = RoundContext(1, 1, randomness)
        told = promptfl.broadcast(start.server)
        upload, _ = promptfl.client_round(runtime.settings, told, start.clients, runtime.data, end.gradients, context)
        sent = end.protect(named_tensors(upload))
        assert end.keys is not None
        read = runtime.mechanism.restored({"change": sent["change"]}, end.keys)["change"]
        noise = 0.01 * COMPRESSED["clip"] / 2 * math.sqrt(read[0].numel())
        assert (read.flatten(1).norm(dim=1) < COMPRESSED["clip"] + 2 * noise).all()
        assert (read.flatten(1).norm(dim=1) > COMPRESSED["clip"] - 2 * noise).all(), "all were longer"
        seen.append(sent["change"])
    assert torch.equal(seen[0][:-1], seen[1][:-1])
    assert not torch.equal(seen[0][-1], seen[1][-1])


def test_epsilon_is_what_noise_by_the_server_has(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(
        "promptfl", ROWS, TABLES, rounds=6, privacy=COMPRESSED | {"epsilon": 2.0}, weighting="uniform"
    )
    assert runtime.mechanism.noise_multiplier == noise_multiplier(2.0, 0.1, [(1.0, 6)])
    assert spent(runtime.mechanism.total, "clients", "client").epsilon <= 2.0


def test_the_server_adds_what_lost_clients_would_have(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(
        "promptfl", ROWS, TABLES, rounds=1, privacy=COMPRESSED | {"noise_multiplier": 3.0}, weighting="uniform"
    )
    randomness = SystemRandomness(2, torch.device("cpu"))
    part = 3.0 * COMPRESSED["clip"] / math.sqrt(5 - 1)
    server = runtime.mechanism.server_end(randomness, [1, 4], {"clip": torch.tensor(COMPRESSED["clip"])})
    mean = server.average("change", torch.zeros(2, 40_000), torch.ones(2))
    assert accepts(mean, part * math.sqrt(5 - 2) / 2)
    whole = runtime.mechanism.server_end(randomness, range(5), {"clip": torch.tensor(COMPRESSED["clip"])})
    assert not whole.average("change", torch.zeros(5, 10), torch.ones(5)).any()


def test_an_upload_takes_a_fraction_of_the_bytes(make_runtime: MakeRuntime) -> None:
    tables = TABLES | {"context_length": 64}
    sent = {}
    for compress in (False, True):
        privacy = COMPRESSED | {"compress": compress, "noise_multiplier": 2.0}
        runtime = make_runtime("promptfl", ROWS, tables, rounds=1, privacy=privacy, weighting="uniform")
        _, record = runtime.round(runtime.start())
        sent[compress] = record.upload_bytes
    assert 10 * sent[True] < sent[False]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"noise_by": "client"}, "privacy.compress = True: needs mechanism = 'dp-fedavg' and noise_by = 'server'"),
        ({"mechanism": "dp-sgd", "noise_by": "client"}, "privacy.compress = True: needs mechanism = 'dp-fedavg'"),
        ({"clip_quantile": 0.5}, "privacy.clip_quantile = 0.5: with privacy.compress the clip is fixed"),
        ({"noise_multiplier": 0.0}, "privacy.compress = True: without noise there is no error"),
    ],
)
def test_what_does_not_fit_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PrivacySettings(**(COMPRESSED | {"noise_multiplier": 1.0} | changed))  # type: ignore[arg-type]
    assert str(refused.value).startswith(words)


def test_federations_with_too_few_parts_are_refused(make_runtime: MakeRuntime) -> None:
    privacy = COMPRESSED | {"noise_multiplier": 1.0}
    with pytest.raises(ConfigError, match=r"runtime.participation = 0.5: must be 1 with privacy.compress = true"):
        make_runtime("promptfl", ROWS, TABLES, privacy=privacy, weighting="uniform", participation=0.5)
    with pytest.raises(ConfigError, match="privacy.colluders = 5: must be below the number of clients"):
        make_runtime("promptfl", ROWS, TABLES, privacy=privacy | {"colluders": 5}, weighting="uniform")


def test_bytes_that_are_no_compressed_message_are_refused() -> None:
    content = messages.encode(Upload(), UploadHeader(3))
    assert messages.inflated(messages.deflated(content), Upload()) == content
    bomb = zlib.compress(bytes(50_000_000), 9)
    for bad, words in (
        (content, "no compressed message"),
        (messages.deflated(content)[:-3], "does not end"),
        (messages.deflated(content) + b"more", "does not end"),
        (bomb, "more than the 65,536 bytes"),
    ):
        with pytest.raises(MessageError, match=words):
            messages.inflated(bad, Upload())
