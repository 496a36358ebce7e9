"""What makes pFedPT, pFedPG, FedPerfix and SGPT what they are, each against a small computation of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.states import started_in_double
from sordino.algorithms import algorithm, pfedpg, settings_for, sgpt
from sordino.algorithms.base import (
    InitContext,
    PersonalBroadcast,
    RoundContext,
    model_class,
    named_tensors,
)
from sordino.algorithms.pfedpt import frame_places
from sordino.encoders.bundled import BundledEncoder
from sordino.encoders.encode import forward
from sordino.encoders.prompt_model import PromptModel
from sordino.encoders.visual_prompts import ImageTower
from sordino.errors import ConfigError, EncoderError
from sordino.privacy.dp_sgd import example_gradients
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.privacy.settings import PrivacySettings
from sordino.randomness import Streams
from sordino.runtime.facts import participants
from sordino.runtime.local import LocalRuntime, Training
from sordino.runtime.settings import RuntimeSettings

MakeRuntime = Callable[..., LocalRuntime]

IMAGE_SIDE = ["pfedpt", "pfedpg", "fedperfix", "sgpt"]
IN_THE_TOWER = ["pfedpg", "fedperfix", "sgpt"]
ROWS = [list(range(0, 12)), list(range(12, 20)), list(range(20, 40))]
ADAPTERS = {"bottleneck": 6, "initial_up": "random"}  # up-projections of zero would give the others no gradient
QUICK = {
    "context_length": 4,
    "batch_size": 5,
    "local_steps": 4,
    "optimizer": {"learning_rate": 0.5},
    "fedperfix": ADAPTERS,
    "sgpt": {"groups": 3},
}


@pytest.fixture
def make(
    model: PromptModel, read: Callable[[str], Tensor], table: tuple[Tensor, Tensor]
) -> Callable[..., tuple[LocalRuntime, Training]]:
    """A runtime of a method on the same forty pictures, read as the method reads them, with its start in float64."""

    def of(name: str, rows: list[list[int]] = ROWS, privacy: dict[str, Any] | None = None, **tables: Any):
        method, settings = algorithm(name), settings_for(name, QUICK | tables)
        own = model_class(method).of(settings, model.encoder, model.classes)
        features = forward(model.encoder, own.reads, read("pixels"))
        runtime = LocalRuntime(
            method,
            settings,
            own,
            features,
            table[1],
            rows,
            6,
            RuntimeSettings(),
            0,
            PrivacySettings(**(privacy or {})),  # type: ignore[arg-type]
        )
        return runtime, started_in_double(runtime)

    return of


def rounds(runtime: LocalRuntime, training: Training, count: int) -> Training:
    for _ in range(count):
        training, _ = runtime.round(training)
    return training


def clock_of(clients: list[int], number: int = 1) -> RoundContext:
    return RoundContext(number, 6, Streams(0, number, clients, torch.device("cpu")))


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logits_of(runtime: LocalRuntime, prompt: dict[str, Tensor], images: Tensor) -> Tensor:
    return runtime.model.scores(runtime.model.class_features(prompt), prompt, images)


# Without what they add, the methods are what they were added to.


@pytest.mark.parametrize(
    ("name", "own"),
    [("pfedpt", {"frame_deviation": 0.0, "frame_share": 0.0}), ("fedperfix", ADAPTERS | {"scale": 0.0})],
)
def test_a_frame_of_zeros_and_adapters_of_scale_zero_leave_promptfl(name: str, own: dict[str, Any], make) -> None:
    personal, shared = make(name, **{name: own}), make("promptfl")
    ours, reference = rounds(*personal, 3), rounds(*shared, 3)
    moved = reference.server.context - shared[1].server.context
    assert moved.norm() > 1e-3
    torch.testing.assert_close(ours.server.context, reference.server.context, rtol=1e-8, atol=1e-10)
    pixels_logits = personal[0].model.predict(personal[0].prompts(ours), personal[0].data.features)[0]
    expected = shared[0].model.predict(shared[0].prompts(reference), shared[0].data.features)[0]
    torch.testing.assert_close(pixels_logits, expected, rtol=1e-8, atol=1e-8)


def test_up_projections_of_zero_start_at_the_pretrained_tower(make) -> None:
    runtime, start = make("fedperfix", fedperfix=ADAPTERS | {"initial_up": "zero"})
    plain, reference = make("promptfl")
    found = runtime.model.predict(runtime.prompts(start), runtime.data.features)[0]
    expected = plain.model.predict(plain.prompts(reference), plain.data.features)[0]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


# pFedPT.


def framed(images: Tensor, up: Tensor, down: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Images with a frame of four pieces added, put together by hand."""
    edge = up.shape[1]
    inside = torch.zeros(3, images.shape[-2] - 2 * edge, images.shape[-1] - 2 * edge, dtype=images.dtype)
    return images + torch.cat([up, torch.cat([left, inside, right], dim=2), down], dim=1)


def test_pfedpt_trains_the_frame_and_then_the_context(make, model: PromptModel) -> None:
    """torch's SGD on a frame of four pieces, then on the context, with the same batches: same losses, same results."""
    frames = {"learning_rate": 0.7, "momentum": 0.5}
    runtime, start = make("pfedpt", [list(range(12))], frame_optimizer=frames)
    context = start.server.context.clone().requires_grad_()
    edge, size = 2, 32
    image = torch.zeros(3, size * size, dtype=torch.float64)
    image[:, frame_places((size, size), 1 / 16)] = start.clients.frame[0]
    image = image.view(3, size, size)
    inner = slice(edge, size - edge)
    pieces = [image[:, :edge], image[:, -edge:], image[:, inner, :edge], image[:, inner, -edge:]]
    pieces = [piece.clone().requires_grad_() for piece in pieces]
    losses = []
    frame_sgd, context_sgd = torch.optim.SGD(pieces, 0.7, momentum=0.5), torch.optim.SGD([context], 0.5)
    batches = runtime.data.batches(4, 5, clock_of([0]).streams)
    for step, batch in enumerate(batches):
        text = model.encoder.text_features(context, model.classes)
        shown = framed(batch.features[0], *pieces)
        logits = model.encoder.logit_scale * model.encoder.image_features(shown) @ text.T
        chosen = batch.mask[0]
        loss = F.cross_entropy(logits[chosen], batch.labels[0, chosen])
        frame_sgd.zero_grad(), context_sgd.zero_grad()
        loss.backward()
        (frame_sgd if step < 2 else context_sgd).step()
        losses.append(loss.item())
    after, record = runtime.round(start)
    assert record.loss == pytest.approx(sum(losses) / 4, rel=1e-9)
    torch.testing.assert_close(after.server.context, context.detach(), rtol=1e-8, atol=1e-10)
    whole = framed(torch.zeros(3, size, size, dtype=torch.float64), *(piece.detach() for piece in pieces))
    found = whole.flatten(1)[:, frame_places((size, size), 1 / 16)]
    torch.testing.assert_close(after.clients.frame[0], found, rtol=1e-8, atol=1e-10)
    assert (after.clients.frame - start.clients.frame).norm() > 1e-3
    momenta = after.clients.optimizer["momentum_buffer"][0]
    assert momenta.norm() > 1e-6  # a client keeps it for the next round


def test_a_frames_momentum_lasts_and_the_contexts_ends_with_the_round(make) -> None:
    """Two rounds as torch's SGD takes them: one optimizer for the frame, and for the context one a round."""
    frames, contexts = {"learning_rate": 0.7, "momentum": 0.5}, {"learning_rate": 0.5, "momentum": 0.9}
    runtime, start = make("pfedpt", [list(range(12))], frame_optimizer=frames, optimizer=contexts)
    frame, context = (t.clone().requires_grad_() for t in (start.clients.frame, start.server.context))
    frame_sgd = torch.optim.SGD([frame], 0.7, momentum=0.5)
    for number in (1, 2):
        context_sgd = torch.optim.SGD([context], 0.5, momentum=0.9)
        for step, batch in enumerate(runtime.data.batches(4, 5, clock_of([0], number).streams)):
            logits = logits_of(runtime, {"context": context[None], "frame": frame}, batch.features)[batch.mask]
            frame.grad, context.grad = None, None
            F.cross_entropy(logits, batch.labels[batch.mask]).backward()
            (frame_sgd if step < 2 else context_sgd).step()
    after = rounds(runtime, start, 2)
    torch.testing.assert_close(after.clients.frame, frame.detach(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(after.server.context, context.detach(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("size", "width", "edge"), [((32, 32), 1 / 16, 2), ((224, 224), 1 / 16, 14), ((10, 8), 0.01, 1)]
)
def test_the_frame_is_the_border(size: tuple[int, int], width: float, edge: int) -> None:
    image = torch.zeros(size[0] * size[1])
    image[frame_places(size, width)] = 1
    expected = torch.ones(size)
    expected[edge:-edge, edge:-edge] = 0
    assert torch.equal(image.view(size), expected)


def test_pfedpt_runs_on_the_bundled_encoder() -> None:
    """Its frame gets a gradient through the convolutions."""
    encoder = BundledEncoder.load(torch.device("cpu"))
    settings = settings_for("pfedpt", {"context_length": 2})
    model = model_class(algorithm("pfedpt")).of(settings, encoder, encoder.class_tokens(["cat", "dog"]))
    pixels = random(1, 2, 3, 224, 224).float()
    frame = random(1, 3, len(frame_places((224, 224), 1 / 16))).float()
    context = encoder.embed("a photo")[None, :2]
    batch = Batch(pixels, torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    by = ExactGradients(model)(dict, {"frame": frame}, {"context": context}, batch).values
    assert by["frame"].isfinite().all()
    assert by["frame"].norm() > 0


# FedPerfix.


def test_fedperfix_has_the_gradients_of_its_formula(make, model: PromptModel) -> None:
    """Same images, adapters and context through transformers' own layers, with K and V changed in hooks."""
    runtime, start = make("fedperfix", [list(range(8))])
    tower, vision, width = model.encoder.image_tower, model.encoder._vision, model.encoder.image_width
    parameters = {"context": start.server.context[None], **start.clients.adapters}
    leaves = {name: value[0].clone().requires_grad_() for name, value in parameters.items()}
    batch = next(iter(runtime.data.batches(1, None, clock_of([0]).streams)))

    def change(layer: int, normed: Tensor) -> Tensor:
        inner = torch.tanh(normed @ leaves["down"][layer] + leaves["down_bias"][layer])
        return 1.5 * (inner @ leaves["up"][layer] + leaves["up_bias"][layer])

    hooks = []
    for number, layer in enumerate(vision.encoder.layers):
        for part, half in (("k_proj", slice(0, width)), ("v_proj", slice(width, None))):
            hooks.append(
                getattr(layer.self_attn, part).register_forward_hook(
                    lambda _, given, out, number=number, half=half: out + change(number, given[0])[..., half]
                )
            )
    hidden = batch.features[0]
    for layer in vision.encoder.layers:
        hidden = layer(hidden, attention_mask=None)
    for hook in hooks:
        hook.remove()
    text = model.encoder.text_features(leaves["context"], model.classes)
    loss = F.cross_entropy(model.encoder.logit_scale * tower.head(hidden) @ text.T, batch.labels[0])
    loss.backward()
    found = ExactGradients(runtime.model)(dict, parameters, {}, batch)
    torch.testing.assert_close(found.loss[0], loss.detach(), rtol=1e-10, atol=0)
    for name, leaf in leaves.items():
        assert leaf.grad.norm() > 1e-8
        torch.testing.assert_close(found.values[name][0], leaf.grad, rtol=1e-8, atol=1e-12)


def test_appended_prefixes_learn_too(make) -> None:
    """The equation, where the authors' code adds: adapters that are alike differ by how they join."""
    adding, start = make("fedperfix")
    appending, _ = make("fedperfix", fedperfix=ADAPTERS | {"join": "append"})
    prompt = adding.prompts(start)
    added = adding.model.predict(prompt, adding.data.features)
    assert (appending.model.predict(prompt, adding.data.features) - added).abs().max() > 1e-3
    after = rounds(appending, start, 2)
    assert all((after.clients.adapters[name] - old).norm() > 0 for name, old in start.clients.adapters.items())


def test_layers_below_the_first_adapter_are_read_from_the_table(make) -> None:
    """With an adapter in the last layer alone, images are read as what enters it, and the logits are those from the
    first layer on with adapters there that do nothing."""
    late, _ = make("fedperfix", fedperfix=ADAPTERS | {"adapted_layers": 1})
    early, start = make("fedperfix")
    assert (late.model.reads, early.model.reads) == ("layer 1", "layer 0")
    adapters = {name: value.clone() for name, value in start.clients.adapters.items()}
    adapters["up"][:, 0], adapters["up_bias"][:, 0] = 0, 0
    context = start.server.context.expand(3, -1, -1)
    last = {name: value[:, 1:] for name, value in adapters.items()}
    found = late.model.predict({"context": context, **last}, late.data.features)
    torch.testing.assert_close(
        found, early.model.predict({"context": context, **adapters}, early.data.features), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize(("name", "layers"), [("pfedpg", 2), ("sgpt", 2), ("fedperfix", 2), ("fedperfix-late", 1)])
def test_no_image_passes_a_layer_twice_in_a_step(name: str, layers: int, make, monkeypatch: pytest.MonkeyPatch) -> None:
    late = ADAPTERS | {"adapted_layers": 1}
    runtime, start = make("fedperfix", fedperfix=late) if name.endswith("late") else make(name)
    passed = 0
    step = ImageTower._step

    def counted(tower: ImageTower, layer: Any, x: Tensor, adapter: Any) -> Tensor:
        nonlocal passed
        passed += x.shape[0] * x.shape[1]
        return step(tower, layer, x, adapter)

    monkeypatch.setattr(ImageTower, "_step", counted)
    runtime.round(start)
    assert passed == layers * 4 * 3 * 5  # four steps of three clients with five images each


# SGPT.


def test_sgpt_with_one_group_has_shared_prompts_only(make, model: PromptModel) -> None:
    """Whatever the key: the group's tokens join for every image, as the shared ones do below."""
    runtime, _ = make("sgpt", sgpt={"groups": 1})
    tower, width, images = model.encoder.image_tower, model.encoder.image_width, runtime.data.features[:7]
    shared, group = random(2, 1, 1, width), random(2, 1, 1, 1, width, seed=2)
    stacked = images.expand(2, *images.shape)
    every = {0: shared[:, 0], 1: group[:, 0, 0]}
    features = tower.features(tower.forward(stacked, 0, 2, every, replace=False))
    text = model.encoder.text_features(model.encoder.embed("a photo of a"), model.classes)
    for seed in (3, 4):
        prompt = {"shared": shared, "group": group, "keys": random(2, 1, width, seed=seed)}
        expected = model.encoder.logit_scale * features @ text.T
        torch.testing.assert_close(logits_of(runtime, prompt, stacked), expected, rtol=1e-10, atol=1e-10)


def test_sgpt_gives_each_image_the_group_of_its_nearest_key(make, model: PromptModel) -> None:
    runtime, _ = make("sgpt")
    tower, width, images = model.encoder.image_tower, model.encoder.image_width, runtime.data.features[None]
    shared, group = random(1, 1, 1, width), random(1, 3, 1, 1, width, seed=2)
    query = F.normalize(tower.summary(tower.forward(images, 0, 1, {0: shared[:, 0]})).relu(), dim=-1)[0]
    keys = query[[0, 1, 2]] * torch.tensor([[5.0], [0.1], [1.0]])  # their length must not matter
    chosen = (query @ F.normalize(keys, dim=-1).T).argmax(-1)
    assert len(chosen.unique()) == 3
    found = logits_of(runtime, {"shared": shared, "group": group, "keys": keys[None]}, images)[0]
    for number in range(3):
        alone = {"shared": shared, "group": group[:, [number]], "keys": keys[None, [number]]}
        expected = logits_of(runtime, alone, images)[0]
        torch.testing.assert_close(found[chosen == number], expected[chosen == number], rtol=1e-10, atol=1e-10)


def test_a_keys_term_is_added_to_the_loss_and_to_its_gradient() -> None:
    logits, term = (5 * random(2, 6, 4)).requires_grad_(), random(2, 6, seed=2).abs().requires_grad_()
    labels = torch.arange(12) % 4
    found = F.cross_entropy(sgpt.with_term(logits, term).flatten(0, 1), labels, reduction="none")
    expected = F.cross_entropy(logits.flatten(0, 1), labels, reduction="none") + term.flatten()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    far = sgpt.with_term(logits.float(), torch.full((2, 6), 200.0))  # exp(200) is no float32
    torch.testing.assert_close(
        F.cross_entropy(far.flatten(0, 1), labels), F.cross_entropy(logits.float().flatten(0, 1), labels) + 200.0
    )
    weights = random(12, seed=3)
    ours = torch.autograd.grad((weights * found).sum(), (logits, term))
    torch.testing.assert_close(ours, torch.autograd.grad((weights * expected).sum(), (logits, term)))


def test_sgpts_keys_move_to_the_images_that_chose_them(make, model: PromptModel) -> None:
    """The gradient of a key is that of minus the cosine, averaged over all images; prompts get that of the loss."""
    runtime, start = make("sgpt", [list(range(8))])
    batch = next(iter(runtime.data.batches(1, None, clock_of([0]).streams)))
    prompt = {name: value[None] for name, value in vars(start.server).items()}
    shared, parameters = prompt.pop("shared"), prompt
    fixed = {"shared": shared, "attraction": torch.full((1,), 0.3, dtype=torch.float64)}
    by = ExactGradients(runtime.model)(dict, parameters, fixed, batch).values
    tower = model.encoder.image_tower
    query = F.normalize(tower.summary(tower.forward(batch.features, 0, 1, {0: shared[:, 0]})).relu(), dim=-1)[0]
    keys = parameters["keys"][0].clone().requires_grad_()
    nearest = (query @ F.normalize(keys, dim=-1).T).max(-1).values
    (-0.3 * nearest.mean()).backward()
    torch.testing.assert_close(by["keys"][0], keys.grad, rtol=1e-8, atol=1e-12)
    without = {"shared": shared, "attraction": torch.zeros(1, dtype=torch.float64)}
    plain = ExactGradients(runtime.model)(dict, parameters, without, batch).values
    torch.testing.assert_close(by["group"], plain["group"], rtol=1e-8, atol=1e-12)
    assert plain["keys"].norm() == 0  # nothing but the term teaches them


def test_a_round_of_sgpt_is_two_descents_of_which_the_second_starts_where_the_first_ended(
    make, model: PromptModel
) -> None:
    """torch's SGD with momentum and decay: shared prompts without groups, then groups and keys behind those prompts."""
    descent = {"learning_rate": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    own = {"groups": 3, "group_momentum": 0.0, "key_momentum": 0.0}
    runtime, start = make("sgpt", [list(range(12))], optimizer=descent, sgpt=own)
    encoder, tower = model.encoder, model.encoder.image_tower
    text = encoder.text_features(encoder.embed("a photo of a"), model.classes)
    shared, group, keys = (t.clone().requires_grad_() for t in vars(start.server).values())
    rates = {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}
    first, second = torch.optim.SGD([shared], **rates), torch.optim.SGD([group, keys], **rates)
    for step, batch in enumerate(runtime.data.batches(4, 5, clock_of([0]).streams)):
        images, labels = batch.features[:, batch.mask[0]], batch.labels[batch.mask]
        x, term = tower.forward(images, 0, 1, {0: shared[:1, 0]}), torch.zeros(())
        if step >= 2:
            query = F.normalize(tower.summary(x).detach().relu(), dim=-1)[0]
            best, chosen = (query @ F.normalize(keys, dim=-1).T).max(-1)
            x, term = torch.cat([x[:, :, :1], group[chosen, 0][None], x[:, :, 1:]], dim=2), (1 - best).mean()
        logits = encoder.logit_scale * tower.features(tower.forward(x, 1, 2))[0] @ text.T
        shared.grad, group.grad, keys.grad = None, None, None
        (F.cross_entropy(logits, labels) + term).backward()
        (first if step < 2 else second).step()
    after = rounds(runtime, start, 1).server
    for name, expected in (("shared", shared), ("group", group), ("keys", keys)):
        assert (expected - getattr(start.server, name)).norm() > 1e-3
        torch.testing.assert_close(getattr(after, name), expected.detach(), rtol=1e-8, atol=1e-10)


def test_the_keys_term_does_not_reach_the_shared_prompts(make) -> None:
    """Keys move to the queries, queries not to the keys: whatever the term weighs, shared prompts learn the same."""
    runtime, start = make("sgpt", [list(range(8))])
    batch = next(iter(runtime.data.batches(1, None, clock_of([0]).streams)))
    prompt = {name: value[None] for name, value in vars(start.server).items()}
    one, five = (
        ExactGradients(runtime.model)(
            dict, prompt, {"attraction": torch.full((1,), w, dtype=torch.float64)}, batch
        ).values
        for w in (1.0, 5.0)
    )
    torch.testing.assert_close(five["shared"], one["shared"], rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(five["keys"], 5 * one["keys"], rtol=1e-8, atol=1e-12)
    assert one["shared"].norm() > 1e-6


@pytest.mark.parametrize(("share", "still"), [(1.0, ("group", "keys")), (0.0, ("shared",))])
def test_sgpt_trains_one_part_at_a_time(share: float, still: tuple[str, ...], make) -> None:
    runtime, start = make("sgpt", sgpt={"groups": 3, "shared_share": share})
    after = runtime.round(start)[0]
    for name, before in vars(start.server).items():
        moved = (getattr(after.server, name) - before).norm()
        assert moved == 0 if name in still else moved > 1e-4


def test_sgpt_keeps_a_share_of_the_old_group_prompts(make) -> None:
    free, start = make("sgpt", sgpt={"groups": 3, "group_momentum": 0.0, "key_momentum": 0.0})
    slow, _ = make("sgpt", sgpt={"groups": 3, "group_momentum": 0.75, "key_momentum": 0.5})
    whole, part = free.round(start)[0].server, slow.round(start)[0].server
    for name, kept in (("shared", 0.0), ("group", 0.75), ("keys", 0.5)):
        before = getattr(start.server, name)
        expected = (1 - kept) * (getattr(whole, name) - before)
        torch.testing.assert_close(getattr(part, name) - before, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize(("depth", "layers"), [(12, (5, 2)), (7, (5, 2)), (6, (4, 2)), (3, (2, 1)), (2, (1, 1))])
def test_sgpt_fits_towers_of_few_layers(depth: int, layers: tuple[int, int]) -> None:
    assert settings_for("sgpt", {}).layers(depth) == layers


def test_sgpts_keys_start_orthonormal(make) -> None:
    keys = make("sgpt")[1].server.keys
    torch.testing.assert_close(keys @ keys.T, torch.eye(3, dtype=torch.float64), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"settings.sgpt.groups = 33: at most 32 keys"):
        make("sgpt", sgpt={"groups": 33})


# pFedPG.


def test_a_generator_whose_attention_gives_nothing_gives_the_base_prompts(make) -> None:
    _, start = make("pfedpg")
    server = start.server
    silent = server.shared | {"output": torch.zeros_like(server.shared["output"])}
    prompts = pfedpg.generate(silent, server.descriptors)
    torch.testing.assert_close(prompts, server.shared["base"].expand(3, -1, -1), rtol=0, atol=0)
    assert (pfedpg.generate(server.shared, server.descriptors) - prompts).norm() > 1e-3


@pytest.mark.parametrize("vectors", [1, 10])
def test_the_generator_attends_to_the_base_prompts_by_descriptor(make, vectors: int) -> None:
    """Against torch's attention, client by client."""
    _, start = make("pfedpg", pfedpg={"descriptor_length": vectors})
    shared, prompts = start.server.shared, pfedpg.generate(start.server.shared, start.server.descriptors)
    for client, descriptor in enumerate(start.server.descriptors):
        attended = F.scaled_dot_product_attention(
            (descriptor @ shared["query"])[None],
            (shared["base"] @ shared["key"])[None],
            (shared["base"] @ shared["value"])[None],
        )[0]
        torch.testing.assert_close(
            prompts[client], shared["base"] + attended @ shared["output"], rtol=1e-10, atol=1e-12
        )


def test_the_server_steps_by_the_vector_jacobian_product(make) -> None:
    """Finite differences of minus the product of prompts and changes; and plain SGD takes that step."""
    steps = {"server_optimizer": {"name": "sgd", "learning_rate": 0.1}}
    runtime, start = make("pfedpg", pfedpg=steps)
    server, clients = start.server, [2, 0]
    change = 0.1 * random(2, 10, runtime.model.encoder.image_width)
    uploads = type("Sent", (), {"each": pfedpg.Upload(change)})()
    after = pfedpg.server_round(runtime.settings, server, uploads, clock_of(clients))

    def value(shared: dict[str, Tensor], descriptors: Tensor) -> Tensor:
        return -(pfedpg.generate(shared, descriptors)[clients] * change).sum()

    for name, tensor in {**server.shared, "descriptors": server.descriptors}.items():
        moved = (after.descriptors if name == "descriptors" else after.shared[name]) - tensor
        direction, eps = random(*tensor.shape, seed=7), 1e-5

        def at(shift: float, name: str = name, direction: Tensor = direction) -> Tensor:
            shared = {key: t + shift * direction if key == name else t for key, t in server.shared.items()}
            return value(shared, server.descriptors + (shift * direction if name == "descriptors" else 0.0))

        slope = (at(eps) - at(-eps)) / (2 * eps)
        torch.testing.assert_close((moved * direction).sum(), -0.1 * slope, rtol=1e-6, atol=1e-10)
        assert moved.norm() > 0
    assert torch.equal(after.descriptors[1], server.descriptors[1])  # the absent client's rests


def test_pfedpg_tells_each_client_its_own_prompt_alone(make) -> None:
    runtime, start = make("pfedpg")
    told = pfedpg.broadcast(start.server)
    assert isinstance(told, PersonalBroadcast)
    assert told.tokens.shape[0] == 3
    _, record = runtime.round(start)
    assert record.broadcast_bytes < 1.2 * told.tokens[0].numel() * told.tokens.element_size()


def test_pfedpg_clients_keep_what_they_trained_and_send_the_change(make) -> None:
    runtime, start = make("pfedpg")
    told = pfedpg.broadcast(start.server)
    upload, state = pfedpg.client_round(
        runtime.settings, told, start.clients, runtime.data, ExactGradients(runtime.model), clock_of([0, 1, 2])
    )
    assert upload.change.norm() > 1e-3
    torch.testing.assert_close(state.tokens, told.tokens + upload.change, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(start.clients.tokens, told.tokens, rtol=1e-5, atol=1e-7)  # before the first round


def test_a_client_starts_alike_in_a_federation_and_in_a_process_of_its_own(make) -> None:
    runtime, _ = make("pfedpg")
    streams, encoder = clock_of([0, 1, 2], 0).streams, runtime.model.encoder
    start = InitContext(encoder.embed, encoder.context_width, (), streams, encoder.image_width, encoder.image_layers)
    together = pfedpg.client_init(runtime.settings, start, runtime.data).tokens
    alone = pfedpg.client_init(runtime.settings, replace(start, streams=clock_of([2], 0).streams), runtime.data).tokens
    torch.testing.assert_close(alone[0], together[2])
    assert (together[0] - together[2]).abs().max() > 1e-6


def test_bad_lengths_of_a_descriptor_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"settings.pfedpg.descriptor_length = 3: must be 1 or prompt_length = 10"):
        settings_for("pfedpg", {"pfedpg": {"descriptor_length": 3}})


# What they share.


@pytest.mark.parametrize("name", IN_THE_TOWER)
def test_an_encoder_without_a_transformer_is_refused_by_name(name: str) -> None:
    encoder = BundledEncoder.__new__(BundledEncoder)
    with pytest.raises(EncoderError, match=rf"'bundled' has no visual-prompts, which {name} needs; .*: clip"):
        model_class(algorithm(name)).of(settings_for(name, {}), encoder, None)


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_an_examples_gradient_is_that_of_the_example_alone(name: str, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DP-SGD takes them: every example with a copy of the parameters."""
    runtime, start = make(name, [list(range(6))])
    module = algorithm(name)
    prompt = dict(module.prompt(module.broadcast(start.server), start.clients))
    fixed = {"attraction": torch.ones(1, dtype=torch.float64)} if name == "sgpt" else {}
    batch = next(iter(runtime.data.batches(1, None, clock_of([0]).streams)))
    found = example_gradients(runtime.model, dict, prompt, fixed, batch)
    by = {key: torch.cat(list(each)) for key, each in _columns(found.pieces).items()}
    exact = ExactGradients(runtime.model)
    for at in range(6):
        one = Batch(batch.features[:, [at]], batch.labels[:, [at]], batch.mask[:, [at]])
        for key, gradient in exact(dict, prompt, fixed, one).values.items():
            torch.testing.assert_close(by[key][[at]], gradient, rtol=1e-8, atol=1e-12)
    whole = exact(dict, prompt, fixed, batch)
    for key, gradient in whole.values.items():
        torch.testing.assert_close(by[key].mean(0, keepdim=True), gradient, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(found.losses.mean()[None], whole.loss, rtol=1e-8, atol=1e-12)
    # A few copies of the parameters at a time, however many examples there are.
    monkeypatch.setattr(type(runtime.model), "prompts_at_once", lambda *_: 4)
    pieces = list(example_gradients(runtime.model, dict, prompt, fixed, batch).pieces)
    for key, tensor in by.items():
        assert [len(piece[key]) for piece in pieces] == [4, 2]
        torch.testing.assert_close(torch.cat([piece[key] for piece in pieces]), tensor, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_a_client_trains_alike_in_a_stack_and_in_a_pass_of_its_own(
    name: str, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients whose prompts differ by now, in one pass and one by one; and the towers stay frozen."""
    from sordino.prompts import visual

    runtime, start = make(name)
    before = rounds(runtime, start, 1)
    together = rounds(runtime, before, 1)
    monkeypatch.setitem(visual.IMAGES_AT_ONCE, "backward", 1)
    alone = rounds(runtime, before, 1)
    for one, other in ((together.server, alone.server), (together.clients, alone.clients)):
        for key, tensor in named_tensors(one).items():
            torch.testing.assert_close(named_tensors(other)[key], tensor, rtol=1e-8, atol=1e-10)
    assert all(weight.grad is None for weight in runtime.model.encoder._vision.parameters())


@pytest.mark.parametrize("name", ["pfedpt", "pfedpg", "fedperfix"])
def test_who_is_absent_keeps_what_it_had(name: str, make) -> None:
    """And so do the descriptors that pFedPG's server has of it; uploads come without those of the absent."""
    runtime, start = make(name)
    before = rounds(runtime, start, 1)
    runtime.runtime = RuntimeSettings(participation=0.67)
    there = participants(0, 2, 3, 0.67).tolist()
    assert there == [0, 2]  # so that a place in the stack is not a client's number
    after = rounds(runtime, before, 1)

    def of_clients(training: Training) -> dict[str, Tensor]:
        server = named_tensors(training.server).items()
        return named_tensors(training.clients) | {key: t for key, t in server if key.startswith("descriptor")}

    for key, old in of_clients(before).items():
        moved = (of_clients(after)[key] - old).view(3, -1).abs().amax(1)
        assert moved[1] == 0
        assert moved[there].min() > 0


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_a_batch_that_coins_leave_empty_has_no_gradients(name: str, make) -> None:
    runtime, start = make(name, [list(range(6))])
    prompt = dict(algorithm(name).prompt(algorithm(name).broadcast(start.server), start.clients))
    nobody = Batch(runtime.data.features[:0][None], torch.zeros(1, 0, dtype=torch.int64), torch.zeros(1, 0) > 0)
    found = example_gradients(runtime.model, dict, prompt, {}, nobody)
    assert list(found.pieces) == []
    assert found.losses.tolist() == []


def _columns(pieces: Any) -> dict[str, list[Tensor]]:
    columns: dict[str, list[Tensor]] = {}
    for piece in pieces:
        for key, tensor in piece.items():
            columns.setdefault(key, []).append(tensor)
    return columns


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_every_gradient_of_a_round_is_in_the_ledger(name: str, make) -> None:
    """Methods that train in parts spend local_steps in all, and toss new coins for each step."""
    runtime, start = make(name, privacy={"mechanism": "dp-sgd", "epsilon": 8.0})
    after, _ = runtime.round(start)
    steps = dict.fromkeys(("client 0", "client 1", "client 2"), 0)
    for release in after.ledger.releases:
        steps[release.party] += release.steps
    assert set(steps.values()) == {4}


def test_client_level_privacy_is_refused_where_the_server_looks_at_each_upload(make) -> None:
    with pytest.raises(ConfigError, match="looks at each upload by itself"):
        make("pfedpg", privacy={"mechanism": "dp-fedavg", "epsilon": 8.0})


@pytest.mark.parametrize("name", IMAGE_SIDE)
def test_predictions_do_not_depend_on_how_many_images_pass_at_once(
    name: str, make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sordino.prompts import visual

    runtime, start = make(name)
    training = rounds(runtime, start, 1)
    whole = runtime.model.predict(runtime.prompts(training), runtime.data.features)
    assert whole.shape[1:] == (40, 4)
    monkeypatch.setitem(visual.IMAGES_AT_ONCE, "forward", 7)
    pieces = runtime.model.predict(runtime.prompts(training), runtime.data.features)
    torch.testing.assert_close(pieces, whole, rtol=1e-10, atol=1e-10)
