"""Rounds on an accelerator: the same results, and nothing that crosses without a reason.

Most tests use a stand-in (`accelerator`), so they run everywhere. One counts real copies, where there is a CUDA device.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from accelerator import DEVICE, Crossing, OnDevice, StandIn, moved
from conftest import CLASS_NAMES
from runtime.federations import NOISE, STATISTICS
from sordino.algorithms import METHODS, algorithm, settings_for
from sordino.algorithms.base import model_class, named_tensors
from sordino.encoders import prompt_model
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.settings import PrivacySettings
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.settings import RuntimeSettings

SIZES = (12, 8, 20)
QUICK = {"context_length": 4, "batch_size": 5, "local_steps": 2, "fedbpt": {"search_width": 6, "population": 8}}
QUICK |= {"dp-fpl": {"rank": 2}}
MECHANISMS: dict[str, dict[str, Any]] = {
    "none": {},
    "cotangent": NOISE | {"mechanism": "cotangent", "subspace": 4},
    "dp-sgd": NOISE | {"mechanism": "dp-sgd"},
    "dp-fedavg": NOISE | {"mechanism": "dp-fedavg", "clip_quantile": 0.5},
    "statistics": STATISTICS,
}
TRAINED = [name for name in METHODS if algorithm(name).ABOUT.trains]
COMMON = [(name, mechanism) for name in ("promptfl", "dp-fpl") for mechanism in MECHANISMS]
RARE = [(name, "none") for name in TRAINED if name not in ("promptfl", "dp-fpl")]

# What may cross in a round, by the start of its place, and why.
MESSAGES = "a message arrives or leaves as bytes; each of its tensors is moved once for all clients of a stack"
DRAWN = (
    "random numbers are drawn on the host: noise that protects somebody from the operating system's entropy, all "
    "others from streams that are the same on every device; a tensor is one copy for all clients"
)
ONE_BY_ONE = "DP-SGD takes the Poisson samples of one client after the other, and decides what of them is finite"
LOGGED = "the round's end: the log has its loss, and only finite numbers go on"
WORDS = "a few words of a vocabulary are chosen by clustering on the host"
SHARES = "shares of a finite field, and clusters, are computed on the host"
ALLOWED = {
    "runtime.messages.on_host": MESSAGES,
    "runtime.facts.stacked": MESSAGES,
    "runtime.client.ClientEnd.read_broadcast": MESSAGES,
    "runtime.client.ClientRound._train": "the places of the round's clients in their stack",
    "runtime.local": LOGGED,
    "runtime.server.finite": LOGGED,
    "algorithms.client_data.ClientData._sizes": "the sizes of clients, from which the host draws batches",
    "algorithms.client_data.ClientData.batches": "the round's batches, drawn on the host, all steps in one copy",
    "algorithms.client_data.ClientData._padded": "a Poisson sample, drawn on the host",
    "algorithms.client_data.ClientData.balanced": "classes of a client are counted one by one, before a protocol",
    "randomness.": DRAWN,
    "privacy.cotangent.CotangentGradients.__call__": "the expected sizes of the samples, known to the host",
    "privacy.dp_sgd.": ONE_BY_ONE,
    "privacy.gradients.ExactGradients._piece": "under a mechanism an example without a finite loss counts as nothing",
    "privacy.client_level.ClientMechanism.server_end.share_below": "the clip adapts on the host, by one number",
    "prompts.optimal_transport.transport_plan": "a transport problem ends by itself, whatever others are in its stack",
    "algorithms.cma_es.": "weights of ranks, and roots of covariances, whose errors the host sees",
    "algorithms.fedbpt.server_round": "the number of the server's generation",
    "algorithms.feddtpt": WORDS,
    "algorithms.secfpp.": SHARES,
    "algorithms.pfedmoap.server_round": "the numbers of the round's clients",
    "algorithms.pfedpg.server_round": "the numbers of the round's clients",
    "algorithms.pfedpt.Model.scores": "the places of a frame's pixels",
    "algorithms.proda.": "contexts are chosen on the host; pairs of two different ones are picked by a constant mask",
}
MakeOn = Callable[..., LocalRuntime]
on_device = cache(moved)  # one for all tests, as what is derived of an encoder is kept by its identity


@pytest.fixture
def make_on(model: PromptModel, table: tuple[torch.Tensor, torch.Tensor], read: Any) -> MakeOn:
    """Builds a runtime whose encoder and data are on a device; there, StandIn must be entered."""

    def make(
        name: str, mechanism: str, device: torch.device, sizes: tuple[int, ...] = SIZES, **changes: object
    ) -> LocalRuntime:
        ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
        rows = [list(range(end - size, end)) for end, size in zip(ends, sizes, strict=True)]
        method, settings = algorithm(name), settings_for(name, QUICK | changes)
        assert len(model.encoder.fingerprint) == 64  # it is made of files, and kept by the copy
        encoder = model.encoder if device.type == "cpu" else on_device(model.encoder, device)
        own = model_class(method).of(settings, encoder, encoder.class_tokens(CLASS_NAMES))
        features = read(model_class(method).of(settings, model.encoder, model.classes).reads)
        return LocalRuntime(
            *(method, settings, own, features.to(device), table[1].to(device), rows, 6),
            RuntimeSettings(weighting="uniform"),
            0,
            PrivacySettings(**MECHANISMS[mechanism]),
        )

    return make


def run(runtime: LocalRuntime, rounds: int) -> Training:
    training = runtime.begun()
    for _ in range(rounds):
        training, _ = runtime.round(training)
    return training


def crossings_of_a_round(make_on: MakeOn, stand_in: StandIn, *arguments: Any, **changes: Any) -> Counter[Crossing]:
    """What crosses in the second round, when everything that is made once was made."""
    runtime = make_on(*arguments, **changes)
    training = run(runtime, 1)
    return stand_in.counted(lambda: runtime.round(training))


@pytest.mark.parametrize(
    ("name", "mechanism"), [*COMMON, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in RARE)]
)
def test_a_round_is_the_same_and_crosses_with_a_reason(name: str, mechanism: str, make_on: MakeOn) -> None:
    expected = run(make_on(name, mechanism, torch.device("cpu")), 2)
    with StandIn() as stand_in:
        runtime = make_on(name, mechanism, DEVICE)
        training = run(runtime, 1)
        before = len(stand_in.crossings)
        training, _ = runtime.round(training)
        crossed = stand_in.crossings[before:]
        for found, known in ((training.server, expected.server), (training.clients, expected.clients)):
            for part, tensor in named_tensors(found).items():
                # An optimizer's count of steps is on the CPU always.
                assert isinstance(tensor, OnDevice) or part.endswith("step"), f"{part} left the device"
                torch.testing.assert_close(tensor.cpu(), named_tensors(known)[part], rtol=1e-9, atol=1e-12)
    without = {crossing for crossing in crossed if not crossing.place.startswith(tuple(ALLOWED))}
    assert not without, "crosses between host and device in a round, for no reason that is known"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mechanism"), [pair for pair in COMMON if pair[1] != "dp-sgd"])
def test_crossings_do_not_grow_with_the_clients(name: str, mechanism: str, make_on: MakeOn) -> None:
    """A thousand clients are one stack: what crosses has more entries then, and not more copies. (DP-SGD is not so.)"""
    with StandIn() as stand_in:
        few = crossings_of_a_round(make_on, stand_in, name, mechanism, DEVICE, sizes=(12, 8))
        many = crossings_of_a_round(make_on, stand_in, name, mechanism, DEVICE, sizes=(8, 6, 7, 5, 6, 8))
    assert kinds(few) == kinds(many)


def kinds(crossings: Counter[Crossing]) -> Counter[tuple[str, str]]:
    return Counter((crossing.kind, crossing.place) for crossing in crossings.elements())


def test_numbers_are_moved_once_a_round_and_not_once_a_step(make_on: MakeOn) -> None:
    with StandIn() as stand_in:
        two = crossings_of_a_round(make_on, stand_in, "dp-fpl", "none", DEVICE)
        five = crossings_of_a_round(make_on, stand_in, "dp-fpl", "none", DEVICE, local_steps=5)

    assert kinds(two) == kinds(five)
    assert kinds(two)["to device", "randomness.Streams.normals"] == 1


def test_a_pass_keeps_a_share_of_the_accelerators_memory(model: PromptModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small accelerator has small passes, however small it is; one that tells nothing has those of 16 GiB."""
    encoder = copy.copy(model.encoder)
    encoder.device = DEVICE
    there = PromptModel(encoder, model.classes)

    def contexts(memory: int) -> int:
        monkeypatch.setattr(prompt_model, "device_memory", lambda device: memory)
        return there.prompts_at_once(torch.zeros(1, 4, encoder.context_width), 1)

    of_four, of_forty = contexts(4 * 2**30), contexts(40 * 2**30)
    assert of_forty == pytest.approx(10 * of_four, rel=1e-2)
    assert contexts(0) == contexts(16 * 2**30)
    kept = of_four * encoder.text_flops(1, 4, model.classes) * prompt_model.KEPT / encoder.context_width
    assert kept * encoder.dtype.itemsize == pytest.approx(2**30, rel=1e-2)  # a quarter


def test_the_stand_in_counts_and_refuses_as_a_device_does() -> None:
    with StandIn() as stand_in:
        here = torch.arange(6.0).view(2, 3)
        there = here.to(DEVICE)
        assert there.device == DEVICE
        assert isinstance(there + 1, OnDevice)
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + here
        with pytest.raises(RuntimeError):
            there.numpy()
        assert isinstance(there * torch.tensor(2.0), OnDevice)  # a CPU scalar goes along with a launch
        assert not stand_in.crossings[1:]
        torch.testing.assert_close((there @ there.mT).cpu(), here @ here.mT)
        assert bool((there > 4).any())
        assert float(there.sum()) == 15
        assert len(there[there > 2]) == 3
        assert there[torch.tensor([1])].shape == (1, 3)
        leaf = there.clone().requires_grad_()
        (leaf * leaf).sum().backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad.cpu(), 2 * here)
    found = [(crossing.kind, crossing.entries) for crossing in stand_in.crossings]
    expected = [("to device", 6), ("to host", 4), ("read", 1), ("read", 1), ("shape", 1), ("to device", 1)]
    assert found == [*expected, ("to host", 6)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize(("name", "mechanism"), COMMON)
def test_a_device_copies_no_more_than_the_stand_in(name: str, mechanism: str, make_on: MakeOn) -> None:
    from torch.profiler import ProfilerActivity, profile

    with StandIn() as stand_in:
        counted = crossings_of_a_round(make_on, stand_in, name, mechanism, DEVICE)
    runtime = make_on(name, mechanism, torch.device("cuda"))
    training = run(runtime, 1)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        runtime.round(training)
        torch.cuda.synchronize()
    copies = Counter(
        direction
        for event in profiler.events()
        for direction in ("HtoD", "DtoH")
        if event.name.startswith("Memcpy") and direction in event.name
    )
    directions = Counter(crossing.kind for crossing in counted.elements())
    assert copies["HtoD"] <= directions["to device"]
    # A shape is told by a copy of its size.
    assert copies["DtoH"] <= directions["to host"] + directions["read"] + 2 * directions["shape"]
