"""Each method's step by its public code, and by Sordino's, for `parity.py`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from public_code import CLASS_NAMES, FEATURES, IMAGE_WIDTH, LAYERS, SIZE, TEXT_WIDTH, Repository, Subject, settings
from torch import Tensor, nn

from sordino.algorithms import algorithm, settings_for
from sordino.algorithms.base import model_of
from sordino.algorithms.pfedpt import frame_places
from sordino.algorithms.prograd import aligned
from sordino.encoders.encode import forward
from sordino.encoders.prompt_model import PromptModel
from sordino.privacy.gradients import Batch, ExactGradients
from sordino.prompts.lowrank import factorize
from sordino.prompts.sentences import SENTENCES

LENGTH = 4
Tensors = Mapping[str, Tensor]
CONFIG = {"INPUT__SIZE": (SIZE, SIZE), "DATASET__NAME": "Caltech101"}
PLAIN = {"trainer": "PromptFL"}  # what builders of towers are told that have variants of them


@dataclass(frozen=True)
class Step:
    """A loss, and its gradient by each parameter under Sordino's names and shapes."""

    loss: Tensor
    gradient: Tensors


def own(
    subject: Subject,
    name: str,
    table: dict[str, Any],
    parts: Tensors,
    prompt_of: Callable[[Any], Any] = dict,
) -> tuple[PromptModel, Any, Batch, Step]:
    """Return Sordino's model, settings, batch and step of one client.

    Args:
        subject: the small CLIP and the batch.
        name: of the method.
        table: its settings.
        parts: its parameters, without the clients' axis.
        prompt_of: parameters [1, ...] to the prompt, as in the method's `client_round`.
    """
    method = algorithm(name)
    chosen = settings_for(name, table)
    model = model_of(method, name, chosen, subject.encoder, subject.encoder.class_tokens(CLASS_NAMES))
    images, labels = forward(subject.encoder, model.reads, subject.pixels), subject.labels[None]
    batch = Batch(images[None], labels, torch.ones_like(labels, dtype=torch.bool))
    stacked = {part: value[None] for part, value in parts.items()}
    found = ExactGradients(model)(prompt_of, stacked, {}, batch)
    prompt = prompt_of(stacked)
    features = model.class_features(prompt)
    loss = model.losses(features, prompt, batch.features, batch.labels).mean()
    penalty = model.penalty(features)
    total = loss if penalty is None else loss + penalty[0]
    return model, chosen, batch, Step(total.detach(), {part: value[0] for part, value in found.values.items()})


def theirs(loss: Tensor, leaves: Tensors) -> Step:
    return Step(loss.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)))


def learned(values: Tensors) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value.clone()) for name, value in values.items()}


def coop_config(**more: Any) -> Any:
    common = {"N_CTX": LENGTH, "CTX_INIT": "", "CSC": False, "CLASS_TOKEN_POSITION": "end", "PREC": "fp32"}
    named = {f"TRAINER__{trainer}__{key}": value for trainer in ("COOP", "COCOOP") for key, value in common.items()}
    return settings(**CONFIG, **named, MODEL__BACKBONE__NAME="small", **more)


def promptfl(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """CoOp's loss, which PromptFL averages the steps of."""
    code = Repository(clones / "CoOp", subject)
    context = subject.random("context", LENGTH, TEXT_WIDTH)
    model = code.module("trainers/coop.py").CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    leaves = learned({"context": context})
    model.prompt_learner.ctx = leaves["context"]
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    return theirs(loss, leaves), own(subject, "promptfl", {}, {"context": context}, lambda p: p["context"])[-1]


def cocoop(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, inner = Repository(clones / "CoOp", subject), FEATURES // 16
    values = {
        "context": subject.random("context", LENGTH, TEXT_WIDTH),
        "down": subject.random("down", inner, FEATURES, scale=1.0),
        "down_bias": subject.random("down bias", inner),
        "up": subject.random("up", TEXT_WIDTH, inner, scale=1.0),
        "up_bias": subject.random("up bias", TEXT_WIDTH),
    }
    model = code.module("trainers/cocoop.py").CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    leaves, learner = learned(values), model.prompt_learner
    learner.ctx = leaves["context"]
    learner.meta_net.linear1.weight, learner.meta_net.linear1.bias = leaves["down"], leaves["down_bias"]
    learner.meta_net.linear2.weight, learner.meta_net.linear2.bias = leaves["up"], leaves["up_bias"]
    learner.train()
    return theirs(model(subject.pixels, subject.labels), leaves), own(subject, "cocoop", {}, values)[-1]


def kgcoop(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, weight = Repository(clones / "KgCoOp" / "KgCoOp", subject), 8.0
    context = subject.random("context", LENGTH, TEXT_WIDTH)
    module = code.module("trainers/kgcoop.py", load_clip_to_cpu=lambda _: code.clip())
    model = module.CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    leaves = learned({"context": context})
    model.prompt_learner.ctx = leaves["context"]
    logits, apart = model(subject.pixels)
    loss = F.cross_entropy(logits, subject.labels) + weight * apart
    table = {"guidance": weight, "hand_written": "a photo of a"}
    return theirs(loss, leaves), own(subject, "kgcoop", table, {"context": context}, lambda p: p["context"])[-1]


def prograd(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """Their step for a context at which the two gradients disagree; the loss is that of general knowledge."""
    root = clones / "Prompt-align"
    code, temperature, strength = Repository(root / "ProGrad.public", subject), 1.0, 0.8
    training = Repository(root / "Dassl.ProGrad.pytorch", subject).module("dassl/engine/trainer.py").TrainerBase
    module = code.module("trainers/prograd.py", load_clip_to_cpu=lambda _: code.clip())
    context = subject.random("context of prograd", LENGTH, TEXT_WIDTH)
    general = module.CLIP(coop_config(), CLASS_NAMES)
    model = module.CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    leaves = learned({"context": context})
    model.prompt_learner.ctx = leaves["context"]
    entropy, divergence = module.ProGradLoss(temperature)(
        model(subject.pixels), general(subject.pixels).detach(), subject.labels
    )
    one = ["context"]
    trainer = SimpleNamespace(
        model_zero_grad=lambda _: None,
        get_model_names=lambda _: one,
        detect_anomaly=lambda _: None,
        _models={"context": nn.ParameterList([leaves["context"]])},
        _optims={"context": SimpleNamespace(step=lambda: None, zero_grad=model.prompt_learner.zero_grad)},
    )
    training.prograd_backward_and_update(trainer, entropy, divergence, strength)
    found = Step(entropy.detach(), {"context": leaves["context"].grad})
    table = {"alignment": strength, "temperature": temperature, "hand_written": "a photo of a"}
    _, chosen, _, step = own(subject, "prograd", table, {"context": context, "general": context})
    own_entropy, along = step.gradient["context"], step.gradient["general"]
    assert float((own_entropy * along).sum()) < 0, "the two gradients agree here, so nothing is projected"
    direction = aligned(own_entropy[None], along[None], chosen.alignment)[0]
    return found, Step(step.loss, {"context": direction})


def fedotp(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """Both run until their plans rest; the code's own few-shot scripts stop after at most 100 iterations."""
    code = Repository(clones / "FedOTP", subject)
    values = {name: subject.random(name, LENGTH, TEXT_WIDTH) for name in ("shared", "personal")}
    config = transport_config("GLP_OT", N=2, OT="COT", TOP_PERCENT=0.8, EPS=0.1, THRESH=1e-12, MAX_ITER=20_000)
    model = code.module("trainers/GLP_OT.py").CustomCLIP(config, CLASS_NAMES, code.clip(trainer="GLP_OT"))
    leaves = learned(values)
    replace(model.prompt_learner, ctx=torch.stack(list(leaves.values())))
    table = {"mass": 0.8, "regularization": 0.1, "iterations": 20_000, "tolerance": 1e-11}
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    return theirs(loss, leaves), own(subject, "fedotp", table, values)[-1]


def plot(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, number = Repository(clones / "PLOT" / "plot-coop", subject), 3
    contexts = subject.random("contexts", number, LENGTH, TEXT_WIDTH)
    module = code.module("trainers/plot.py")
    model = module.CustomCLIP(transport_config("PLOT", N=number), CLASS_NAMES, code.clip())
    leaves = learned({"contexts": contexts})
    patches = forward(subject.encoder, "patch", subject.pixels).transpose(0, 1)
    replace(model.prompt_learner, ctx=leaves["contexts"])
    replace(model, image_encoder=lambda _: torch.cat([patches[:1], patches]))  # the first is the whole image's
    model.eps, model.max_iter = 0.04, 20_000  # its scaling is then so large that it ends when plans rest
    table = {"contexts": number, "regularization": 0.04, "iterations": 20_000, "tolerance": 1e-11}
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    return theirs(loss, leaves), own(subject, "plot", table, {"contexts": contexts})[-1]


def transport_config(trainer: str, **more: Any) -> Any:
    common = {"N_CTX": LENGTH, "CTX_INIT": "", "CSC": False, "CLASS_TOKEN_POSITION": "end", "PREC": "fp32"} | more
    return settings(**CONFIG, **{f"TRAINER__{trainer}__{key}": value for key, value in common.items()})


def replace(module: nn.Module, **values: Any) -> None:
    """Put other things in the place of a module's parameters or parts."""
    for name, value in values.items():
        module._parameters.pop(name, None)
        module._modules.pop(name, None)
        object.__setattr__(module, name, value)


def fedpgp(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, rank, contrast, temperature = Repository(clones / "FedPGP", subject), 2, 0.7, 0.5
    values = {
        "shared": subject.random("shared", LENGTH, TEXT_WIDTH),
        "u": subject.random("u", LENGTH, rank, scale=0.5),
        "v": subject.random("v", rank, TEXT_WIDTH, scale=0.5),
    }
    config = transport_config("FEDPGP", N=1, BOTTLENECK=rank)
    model = code.module("trainers/fedpgp.py").CustomCLIP(config, CLASS_NAMES, code.clip(**PLAIN))
    leaves = learned(values)
    replace(model.prompt_learner, U=leaves["u"][None], V=leaves["v"][None], sigma=leaves["shared"][None])
    model.train()
    general, shared, _, personal, logits = model(subject.pixels)
    near = F.cosine_similarity(general, shared, dim=-1)
    away = F.cosine_similarity(shared, personal, dim=-1)
    pairs = torch.stack([near, away], dim=1) / temperature
    loss = F.cross_entropy(logits, subject.labels)
    loss = loss + contrast * F.cross_entropy(pairs, torch.zeros(len(pairs), dtype=torch.long))
    table = {"rank": rank, "contrast": contrast, "temperature": temperature, "hand_written": "X X X X"}

    def prompt_of(p: Any) -> Any:
        return {"context": p["shared"] + p["u"] @ p["v"], "shared": p["shared"]}

    return theirs(loss, leaves), own(subject, "fedpgp", table, values, prompt_of)[-1]


def dp_fpl(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, rank = Repository(clones / "DP-FPL", subject), 2
    personal, shared = (subject.random(name, LENGTH, TEXT_WIDTH) for name in ("personal", "shared"))
    factors = factorize(personal, subject.random("projection", TEXT_WIDTH, rank))
    config = transport_config("DP_FPL")
    config.FACTORIZATION, config.RANK = "dpfpl", rank
    module = code.module("trainers/DP_FPL.py", factorize_ctx=lambda *_: (factors.u, factors.v, factors.residual))
    model = module.CustomCLIP(config, CLASS_NAMES, code.clip(**PLAIN))
    learner = model.prompt_learner
    learner.global_ctx.data, learner.local_ctx.data = shared, personal
    leaves = {"shared": learner.global_ctx, "u": learner.local_u_ctx, "v": learner.local_v_ctx}
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    values = {"shared": shared, "u": factors.u, "v": factors.v}

    def prompt_of(p: Any) -> Tensor:
        return p["shared"] + p["u"] @ p["v"] + factors.residual

    return theirs(loss, leaves), own(subject, "dp-fpl", {"rank": rank}, values, prompt_of)[-1]


def promptfolio(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, share = Repository(clones / "PromptFolio", subject), 0.3
    values = {name: subject.random(name, LENGTH, TEXT_WIDTH) for name in ("shared", "personal")}
    config = transport_config("PLOT", N=2)
    config.TRAINER.PROMPTFL = SimpleNamespace(CSC=False, FRAC=share)
    model = code.module("trainers/PromptFolio.py").CustomCLIP(config, CLASS_NAMES, code.clip(**PLAIN))
    leaves = learned(values)
    replace(model.prompt_learner, ctx=torch.stack(list(leaves.values())))
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    return theirs(loss, leaves), own(subject, "promptfolio", {"personal": share}, values)[-1]


def pfedmoap(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """A client with two experts. The code's gate has a bias of the keys, whose gradient is zero."""
    code, width, experts = (
        Repository(clones / "pFedMoAP", subject),
        16,
        subject.random("experts", 2, LENGTH, TEXT_WIDTH),
    )
    values = {"context": subject.random("context", LENGTH, TEXT_WIDTH)}
    for name in ("query", "key", "value", "output"):
        values[name] = subject.random(f"gate {name}", width, width, scale=0.5)
        if name != "key":
            values[f"{name}_bias"] = subject.random(f"gate {name} bias", width)
    gate = {"GATING_HEADS": 2, "GATING_EMBED_DIM": width, "SCALING": 3.0, "LMBDA": 0.4}
    config = transport_config("PFEDMOAP", **gate)
    model = code.module("trainers/pfedmoap.py").CustomCLIP(config, CLASS_NAMES, code.clip(**PLAIN))
    leaves = learned(values)
    model.nonlocal_ctx = list(experts)
    model._compute_nonlocal_text_features()
    replace(model.prompt_learner, ctx=leaves["context"])
    for name, layer in (("query", "W_q"), ("key", "W_k"), ("value", "W_v"), ("output", "W_o")):
        part = getattr(model.gating, layer)
        part.weight = leaves[name]
        part.bias = leaves.get(f"{name}_bias", nn.Parameter(torch.zeros_like(part.bias)))
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    table = {"heads": 2, "gate_width": width, "scaling": 3.0, "local_weight": 0.4}
    fixed = {"experts": experts[None], "known": torch.ones(1, 2).to(experts)}
    return theirs(loss, leaves), own(subject, "pfedmoap", table, values, lambda p: {**p, **fixed})[-1]


def fedtpg(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code = Repository(clones / "FedTPG", subject)
    config = settings(**CONFIG, MODEL__N_CTX=LENGTH, MODEL__D_CTX=1, MODEL__DEPTH=0)
    module = code.module("model/FedTPG.py")
    towers = code.clip()
    model = module.FedTPG(config, towers, "cpu")
    sizes = {"prompt_dim": TEXT_WIDTH, "textemb_dim": FEATURES, "depth": 0, "cross_heads": 2}
    generator = module.PromptTranslator(LENGTH, 1, **sizes).double()
    model.prompt_learner.meta_net = generator
    attend, feed = generator.encoder.cross_attend_blocks
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            parameter.add_(subject.random(name, *parameter.shape))
        attend.fn.in_proj_bias[TEXT_WIDTH : 2 * TEXT_WIDTH] = 0  # of the keys, which changes nothing
    names = {
        "queries": generator.soft_prompt,
        "query": attend.fn.q_proj_weight,
        "key": attend.fn.k_proj_weight,
        "value": attend.fn.v_proj_weight,
        "output": attend.fn.out_proj.weight,
        "output_bias": attend.fn.out_proj.bias,
        "inner": feed.net[1].weight,
        "inner_bias": feed.net[1].bias,
        "outer": feed.net[3].weight,
        "outer_bias": feed.net[3].bias,
    }
    for name, norm in (("query_norm", attend.norm), ("name_norm", attend.norm_context), ("inner_norm", feed.net[0])):
        names |= {name: norm.weight, f"{name}_bias": norm.bias}
    both = attend.fn.in_proj_bias
    stops = subject.tokens([f"{name}." for name in CLASS_NAMES])
    replace(model, clip_model_=SimpleNamespace(encode_text=lambda _: towers.encode_text(stops)))
    whole = F.cross_entropy(model(subject.pixels, CLASS_NAMES, "")[0], subject.labels)
    found = theirs(whole, names | {"biases": both})
    query_bias, _, value_bias = found.gradient["biases"].chunk(3)
    gradient = {name: found.gradient[name] for name in names} | {"query_bias": query_bias, "value_bias": value_bias}
    values = {name: part.detach() for name, part in names.items()}
    values["query_bias"], _, values["value_bias"] = both.detach().chunk(3)
    return Step(found.loss, gradient), own(subject, "fedtpg", {"heads": 2}, values)[-1]


def maple(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, depth, length = Repository(clones / "multimodal-prompt-learning", subject), 3, 2
    values = {
        "contexts": subject.random("contexts", depth, length, TEXT_WIDTH),
        "coupling": subject.random("coupling", depth, IMAGE_WIDTH, TEXT_WIDTH),
        "coupling_bias": subject.random("coupling bias", depth, IMAGE_WIDTH),
    }
    config = transport_config("MAPLE", N_CTX=length, PROMPT_DEPTH=depth)
    details = {"trainer": "MaPLe", "maple_length": length, "vision_depth": 0, "language_depth": 0}
    towers = code.clip(**details, vision_ctx=0, language_ctx=0)
    model = code.module("trainers/maple.py").CustomCLIP(config, CLASS_NAMES, towers)
    leaves = learned(values)
    maps = [
        lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)
        for weight, bias in zip(leaves["coupling"], leaves["coupling_bias"], strict=True)
    ]
    first, *deeper = leaves["contexts"]
    learner = model.prompt_learner
    replace(learner, ctx=first, compound_prompts_text=deeper, proj=maps[0], compound_prompt_projections=maps[1:])
    learner.train()
    loss = model(subject.pixels, subject.labels)
    return theirs(loss, leaves), own(subject, "maple", {"context_length": length, "layers": depth}, values)[-1]


def promptsrc(clones: Path, subject: Subject) -> tuple[Step, Step]:
    code, depth, length = Repository(clones / "PromptSRC", subject), 3, 2
    values = {
        "contexts": subject.random("contexts", depth, length, TEXT_WIDTH),
        "tokens": subject.random("tokens", depth, length, IMAGE_WIDTH),
    }
    sizes = {"PROMPT_DEPTH_TEXT": depth, "PROMPT_DEPTH_VISION": depth, "N_CTX_TEXT": length, "N_CTX_VISION": length}
    config = transport_config("PROMPTSRC", **sizes)
    config.OPTIM = SimpleNamespace(MAX_EPOCH=1)
    plain = {"trainer": "IVLP", "vision_depth": 0, "language_depth": 0, "vision_ctx": 0, "language_ctx": 0}
    prompted = {"vision_depth": depth, "language_depth": depth, "vision_ctx": length, "language_ctx": length}
    module = code.module(
        "trainers/promptsrc.py",
        load_clip_to_cpu=lambda *_: code.clip(**plain),
        IMAGENET_TEMPLATES=[f"{sentence} {{}}." for sentence in SENTENCES],
    )
    model = module.CustomCLIP(config, CLASS_NAMES, code.clip(**(plain | prompted)))
    leaves = learned(values)
    replace(model.prompt_learner, ctx=leaves["contexts"][0])
    replace(model.image_encoder, VPT=leaves["tokens"][0])
    for tower, part in ((model.text_encoder.transformer, "contexts"), (model.image_encoder.transformer, "tokens")):
        for layer in range(1, depth):
            replace(tower.resblocks[layer], VPT_shallow=leaves[part][layer])
    model.prompt_learner.train()
    entropy, text, frozen_text, frozen, images, zero_shot, logits = model(subject.pixels, subject.labels)
    divergence = F.kl_div(logits.log_softmax(1), zero_shot.log_softmax(1), reduction="sum", log_target=True)
    loss = entropy + 25 * F.l1_loss(text, frozen_text) + 10 * F.l1_loss(images, frozen) + divergence / logits.numel()
    table = {"context_length": length, "layers": depth, "sentences": len(SENTENCES)}
    return theirs(loss, leaves), own(subject, "promptsrc", table, values)[-1]


def proda(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """By the code of FLiP's benchmark; that of the authors is not to be had."""
    code, number = Repository(clones / "CoOp", subject), 3
    contexts = subject.random("contexts", number, LENGTH, TEXT_WIDTH)
    towers, classes = code.clip(), len(CLASS_NAMES)
    leaves = learned({"contexts": contexts})

    def sentences(endings: Tensor) -> Tensor:
        """Every ending [C, 77] under each context, classes first: [C N, 77, E]."""
        words = towers.token_embedding(endings)[:, None].expand(-1, number, -1, -1)
        own_context = leaves["contexts"].expand(len(endings), -1, -1, -1)
        return torch.cat([words[:, :, :1], own_context, words[:, :, 1 + LENGTH :]], dim=2).flatten(0, 1)

    named = subject.tokens([f"X X X X {name}." for name in CLASS_NAMES])
    nameless = subject.tokens(["X X X X ."])
    prompts = (sentences(named), named.repeat_interleave(number, 0), sentences(nameless), nameless.repeat(number, 1))
    public = Repository(clones / "flip", subject).module("flcore/models/clip/ProDA.py").ProDACLIP
    model = SimpleNamespace(
        image_encoder=lambda pixels: (towers.visual(pixels),),
        dtype=towers.dtype,
        n_cls=classes,
        n_prm=number,
        device="cpu",
        prompt_learner=lambda: prompts,
        text_encoder=code.module("trainers/coop.py").TextEncoder(towers),
        logit_scale=towers.logit_scale,
    )
    logits = public.forward(model, subject.pixels, subject.labels)
    loss = F.cross_entropy(logits, subject.labels) + 0.3 * model.loss_m
    table = {"contexts": number, "contexts_at_once": number, "orthogonality": 0.3}
    return theirs(loss, leaves), own(subject, "proda", table, {"contexts": contexts})[-1]


def fedperfix(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """The adapters of the image tower, in all its layers, and CoOp's context as the head."""
    code, inner, scale = Repository(clones / "CoOp", subject), 8, 1.5
    values = {
        "context": subject.random("context", LENGTH, TEXT_WIDTH),
        "down": subject.random("down", LAYERS, IMAGE_WIDTH, inner),
        "down_bias": subject.random("down bias", LAYERS, inner),
        "up": subject.random("up", LAYERS, inner, 2 * IMAGE_WIDTH),
        "up_bias": subject.random("up bias", LAYERS, 2 * IMAGE_WIDTH),
    }
    public = Repository(clones / "FedPerfix" / "system", subject).module("flcore/trainmodel/prefix.py")
    model = code.module("trainers/coop.py").CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    leaves = learned(values)
    model.prompt_learner.ctx = leaves["context"]
    for number, block in enumerate(model.image_encoder.transformer.resblocks):
        old = block.attn
        parts = SimpleNamespace(
            qkv=lambda x, old=old: F.linear(x, old.in_proj_weight, old.in_proj_bias),
            num_heads=old.num_heads,
            scale=(IMAGE_WIDTH // old.num_heads) ** -0.5,
            attn_drop=nn.Identity(),
            proj=old.out_proj,
            proj_drop=nn.Identity(),
        )
        adapted = public.AdapterAttention(parts, IMAGE_WIDTH, mid_dim=inner, p_scale=scale)
        for part in ("down", "up"):
            weight, bias = leaves[part][number], leaves[f"{part}_bias"][number]
            replace(adapted.adapter, **{part: lambda x, weight=weight, bias=bias: x @ weight + bias})
        # The tower has positions before images, timm's attention has images first.
        replace(block, attention=lambda x, adapted=adapted: adapted(x.transpose(0, 1)).transpose(0, 1))
    loss = F.cross_entropy(model(subject.pixels), subject.labels)
    table = {"bottleneck": inner, "scale": scale}
    return theirs(loss, leaves), own(subject, "fedperfix", table, values)[-1]


def pfedpt(clones: Path, subject: Subject) -> tuple[Step, Step]:
    """The frame of pixels, and CoOp's context as the head."""
    code, edge = Repository(clones / "CoOp", subject), SIZE // 16
    places = frame_places((SIZE, SIZE), 1 / 16)
    frame, context = subject.random("frame", 3, len(places)), subject.random("context", LENGTH, TEXT_WIDTH)
    public = Repository(clones / "pFedPT" / "system", subject).module("flcore/trainmodel/models.py")
    leaves = learned({"context": context, "frame": frame})
    whole = torch.zeros(3, SIZE * SIZE).to(frame).index_copy(1, places, leaves["frame"]).view(1, 3, SIZE, SIZE)
    prompter = public.PadPrompter(3, edge, SIZE, SimpleNamespace(device="cpu"))
    middle = whole[:, :, edge:-edge]
    replace(prompter, pad_up=whole[:, :, :edge], pad_down=whole[:, :, -edge:])
    replace(prompter, pad_left=middle[..., :edge], pad_right=middle[..., -edge:])
    model = code.module("trainers/coop.py").CustomCLIP(coop_config(), CLASS_NAMES, code.clip())
    model.prompt_learner.ctx = leaves["context"]
    loss = F.cross_entropy(model(prompter(subject.pixels)), subject.labels)
    return theirs(loss, leaves), own(subject, "pfedpt", {}, {"context": context, "frame": frame})[-1]


@dataclass(frozen=True)
class Entry:
    """A method, and its public code.

    Attributes:
        steps: clones and subject to the step of their code and of ours.
        repository: on GitHub.
        commit: at which it was run.
        set_aside: what was replaced in their code.
    """

    steps: Callable[[Path, Subject], tuple[Step, Step]]
    repository: str
    commit: str
    set_aside: str = ""


METHODS = {
    "promptfl": Entry(promptfl, "KaiyangZhou/CoOp", "ff61507"),
    "cocoop": Entry(cocoop, "KaiyangZhou/CoOp", "ff61507"),
    "kgcoop": Entry(kgcoop, "htyao89/KgCoOp", "c43ccc3"),
    "prograd": Entry(prograd, "BeierZhu/Prompt-align", "1b76203"),
    "plot": Entry(plot, "CHENGY12/PLOT", "728539f"),
    "fedotp": Entry(fedotp, "HongxiaLee/FedOTP", "9948611"),
    "fedpgp": Entry(fedpgp, "TianyuCuiOvO/FedPGP", "d43045b"),
    "dp-fpl": Entry(dp_fpl, "linhhtran/DP-FPL", "cce74b4", "its factorization, in which V has unit rows"),
    "promptfolio": Entry(promptfolio, "PanBikang/PromptFolio", "8f729aa"),
    "pfedmoap": Entry(pfedmoap, "ljaiverson/pFedMoAP", "a481de3"),
    "fedtpg": Entry(
        fedtpg, "boschresearch/FedTPG", "f141c29", "class names without a full stop, which the generator reads"
    ),
    "maple": Entry(maple, "muzairkhattak/multimodal-prompt-learning", "69bce21"),
    "promptsrc": Entry(promptsrc, "muzairkhattak/PromptSRC", "bb95c77"),
    "fedperfix": Entry(fedperfix, "imguangyu/FedPerfix", "5acbd0c", "its transformer, which is trained whole"),
    "pfedpt": Entry(pfedpt, "hkgdifyu/pFedPT", "cebec63", "its network, which is trained whole"),
    "proda": Entry(proda, "0-ml/flip", "ec3a848"),
}
