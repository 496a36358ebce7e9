"""Choice of the mechanism for the `[privacy]` table: it fits the method, and its noise is matched to the budget."""

from __future__ import annotations

import math

from torch import Tensor

from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.privacy import accounting
from sordino.privacy.client_level import ClientMechanism
from sordino.privacy.example_level import SUBSPACE, ExampleMechanism
from sordino.privacy.mechanism import INSTEAD_OF_A_MEAN, Mechanism, MechanismInputs
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statistics.mechanism import StatisticsMechanism


def mechanism_for(
    settings: PrivacySettings, inputs: MechanismInputs, model: PromptModel | None, public: Tensor | None = None
) -> Mechanism:
    """Return the mechanism of a run, with its noise matched to the budget.

    Args:
        settings: the `[privacy]` table.
        inputs: of the method and federation.
        model: the frozen model; None if nothing will be run.
        public: [n, D], features of public images; None without any.

    Raises:
        ConfigError: the mechanism does not fit the method, there are too few public images, or delta does not fit the
            number of units.
    """
    if inputs.statistics and settings.on and settings.mechanism != "statistics":
        raise ConfigError(
            "privacy.mechanism", settings.mechanism, "this method works on class statistics; use 'statistics' or 'none'"
        )
    if not settings.on and inputs.statistics:
        return StatisticsMechanism(settings, inputs, model, public=public)
    if not (settings.on and (inputs.trains or inputs.statistics)):
        return Mechanism(settings, inputs, model, public=public)
    _check(settings, inputs)
    if settings.directions == "images" and model is not None:
        _check_public(settings, public)
    if settings.center_share and model is not None and (settings.subspace or math.inf) < model.encoder.feature_width:
        remedy = f"features are seen from a center in all directions, and privacy.subspace = {settings.subspace} keeps "
        remedy += f"some; leave one of the two out, or set privacy.subspace = {model.encoder.feature_width}"
        raise ConfigError("privacy.center_share", settings.center_share, remedy)
    units = len(inputs.sizes) if settings.unit == "client" else sum(inputs.sizes)
    delta = accounting.default_delta(units) if settings.delta is None else settings.delta
    accounting.check_delta(delta, units)
    kind: type[Mechanism] = ClientMechanism if settings.unit == "client" else ExampleMechanism
    if settings.mechanism == "statistics":
        kind = StatisticsMechanism
    if settings.noise_multiplier is not None:
        return kind(settings, inputs, model, delta, settings.noise_multiplier, public)
    assert settings.epsilon is not None
    # The plan does not depend on the noise multiplier, so any one shows the schedules that the budget must cover.
    draft = kind(settings, inputs, model, delta, 1.0, public)
    trusted = set(draft.empty_ledger().trusted)
    seen = [release for release in draft.planned() if set(release.observers) - trusted]
    schedules = {(release.sampling_rate, release.steps) for release in seen if release.steps}
    multiplier = accounting.noise_multiplier(settings.epsilon, delta, schedules)
    return kind(settings, inputs, model, delta, multiplier, public)


def _check(settings: PrivacySettings, inputs: MechanismInputs) -> None:
    if settings.by_person and not inputs.whole_persons:
        raise ConfigError(
            "privacy.unit",
            "person",
            "nothing says whose each image is; set data.person_column (of a Hugging Face data set), data.persons (a "
            "CSV file of files and persons) or data.person_level (the level of the folders that are persons)",
        )
    if settings.mechanism == "statistics":
        _check_statistics(settings, inputs)
        return
    if settings.mechanism == "cotangent" and inputs.forward_only:
        raise ConfigError(
            "privacy.mechanism",
            "cotangent",
            "this method sees losses of prompts and no derivative, and a cotangent is one; use 'dp-sgd', which clips "
            "and noises those losses",
        )
    if settings.mechanism == "cotangent" and not inputs.linear:
        raise ConfigError(
            "privacy.mechanism",
            "cotangent",
            "this method's loss is not the cross-entropy of products of image features and class features; use "
            "'dp-sgd', or 'statistics' if it needs one feature of an image",
        )
    if settings.unit == "client":
        if inputs.server_uses != "mean":
            does = INSTEAD_OF_A_MEAN[inputs.server_uses]
            instead = "'dp-sgd'" if inputs.forward_only or not inputs.linear else "'dp-sgd' or 'cotangent'"
            raise ConfigError("privacy.mechanism", "dp-fedavg", f"this method {does}; use {instead}")
        if not inputs.uniform:
            raise ConfigError(
                "runtime.weighting",
                "examples",
                "with 'dp-fedavg' every client must count the same; set it to 'uniform'",
            )
    elif settings.noise_by != "client":
        if not inputs.shared:
            raise ConfigError(
                "privacy.noise_by",
                settings.noise_by,
                "this method does not upload gradients to be averaged; use 'client'",
            )
        if inputs.steps != 1:
            raise ConfigError(
                "settings.local_steps",
                inputs.steps,
                f"must be 1 with privacy.noise_by = {settings.noise_by!r}: the mean of one step's gradients is noised",
            )
    if settings.noise_by == "shares":
        _check_secure_sum(settings, inputs)
    if settings.compress:
        _check_every_share(settings, inputs, "privacy.compress = true")


def _check_statistics(settings: PrivacySettings, inputs: MechanismInputs) -> None:
    if not inputs.one_feature:
        raise ConfigError(
            "privacy.mechanism",
            "statistics",
            "this method needs more of an image than its one feature, and statistics are of those; use 'dp-sgd', or a "
            "method of the text side such as 'dp-fpl' or 'promptfl'",
        )
    if settings.noise_by != "client" and inputs.server_uses == "nothing":
        raise ConfigError(
            "privacy.noise_by", settings.noise_by, "this method sends nothing that could be summed; use 'client'"
        )
    if settings.noise_by == "shares":
        _check_secure_sum(settings, inputs)


def _check_public(settings: PrivacySettings, public: Tensor | None) -> None:
    rank = settings.subspace or SUBSPACE
    count = 0 if public is None else len(public)
    if count <= rank:
        raise ConfigError(
            "privacy.directions",
            settings.directions,
            f"{rank} directions need more than as many public images, and there are {count}; put more "
            "into data.public, or lower privacy.subspace",
        )


def _check_secure_sum(settings: PrivacySettings, inputs: MechanismInputs) -> None:
    _check_every_share(settings, inputs, "privacy.noise_by = 'shares'")
    clients = len(inputs.sizes)
    most = max(0, (clients - settings.colluders - 1) // 2)  # see sordino.secure.sums.setup.check_threshold
    if settings.dropouts > most:
        raise ConfigError(
            "privacy.dropouts",
            settings.dropouts,
            f"must be at most {most} of {clients} clients with privacy.colluders = {settings.colluders}: else two "
            "halves of the clients could open one's upload",
        )


def _check_every_share(settings: PrivacySettings, inputs: MechanismInputs, setting: str) -> None:
    """Refuse a federation whose clients' shares of the noise may be too few."""
    clients = len(inputs.sizes)
    if inputs.participation < 1:
        raise ConfigError(
            "runtime.participation", inputs.participation, f"must be 1 with {setting}, as every share counts"
        )
    if settings.colluders >= clients:
        raise ConfigError(
            "privacy.colluders",
            settings.colluders,
            f"must be below the number of clients, {clients}: colluders know their own shares of the noise",
        )
