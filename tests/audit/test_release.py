"""Attacks on a release of class statistics: that they find what is there, and no more than noise lets them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from audit.test_membership import make_task
from sordino.algorithms import algorithm, settings_for
from sordino.audit.broken import with_defect
from sordino.audit.evidence import Evidence, Examples
from sordino.audit.findings.words import as_text
from sordino.audit.release import attack_release, reconstruct, regressed
from sordino.audit.run import audit
from sordino.audit.subject import Subject, train
from sordino.audit.wiretap import repeated, same_end
from sordino.encoders.prompt_model import PromptModel
from sordino.errors import ConfigError
from sordino.experiments.config import Experiment, load_config
from sordino.experiments.run import run
from sordino.privacy.settings import PrivacySettings
from sordino.privacy.statistics.estimates import Released
from sordino.privacy.statistics.mechanism import StatisticsMechanism
from sordino.privacy.statistics.release import unpacked
from sordino.runtime.local import LocalRuntime
from sordino.runtime.settings import RuntimeSettings
from sordino.tasks.settings import DataSettings, PartitionSettings

STATISTICS = {"mechanism": "statistics", "delta": 1e-3, "simulation": True, "nonce": "a5" * 16}
EXACT = STATISTICS | {"noise_multiplier": 0.0}
CLIENTS, IMAGES = 3, 240


def subject_of(
    model: PromptModel,
    privacy: dict[str, Any],
    method: str = "promptfl",
    defect: Any = None,
    known: int = 30,
    rounds: int = 1,
) -> Subject:
    """Three clients with random features of four classes; all but `known` training images have a partner."""
    generator = torch.Generator().manual_seed(2)
    features = F.normalize(
        torch.randn(IMAGES + known, model.encoder.feature_width, generator=generator, dtype=torch.float64), dim=-1
    )
    labels = torch.arange(IMAGES + known) // CLIENTS % 4
    half = IMAGES // 2 + known
    held = [range(client, half, CLIENTS) for client in range(CLIENTS)]
    task = make_task(labels.numpy(), held, range(half, IMAGES + known))
    joined = np.concatenate(task.train)
    rows = np.split(np.arange(len(joined)), np.cumsum([len(part) for part in task.train])[:-1])
    settings = settings_for(method, {"context_length": 2} | ({"rank": 1} if method == "dp-fpl" else {}))
    runtime = LocalRuntime(
        algorithm(method),
        settings,
        model,
        features[joined],
        labels[joined],
        rows,
        rounds,
        RuntimeSettings(),
        0,
        PrivacySettings(**privacy),
    )
    if defect is not None:
        runtime = with_defect(runtime, defect)
    config = Experiment(data=DataSettings(source="digits"), partition=PartitionSettings(scheme="iid", clients=CLIENTS))
    training = train(runtime)
    return Subject(config, runtime, training, training.ledger, task, features, labels)


def statistics_of(subject: Subject) -> StatisticsMechanism:
    mechanism = subject.runtime.mechanism
    assert isinstance(mechanism, StatisticsMechanism)
    return mechanism


@pytest.mark.parametrize(("method", "noise_by"), [("promptfl", "client"), ("promptfl", "server"), ("dp-fpl", "server")])
def test_the_sums_are_those_that_were_released(model: PromptModel, method: str, noise_by: str) -> None:
    """Without noise they are the exact sums, whether told as a matrix or as counts and sums of features."""
    subject = subject_of(model, EXACT | {"noise_by": noise_by}, method)
    evidence, mechanism = Evidence.of(subject.runtime, subject.training), statistics_of(subject)
    own = CLIENTS if noise_by == "client" or method == "dp-fpl" else 0
    of_all = [("matrix", None)] if noise_by == "server" else []
    expected = [*(("matrix", client) for client in range(own)), *of_all, ("center", None), ("scatter", None)]
    assert [(source.part, source.client) for source in evidence.sources] == expected
    for source in evidence.sources:
        rows = torch.from_numpy(
            np.concatenate(subject.task.train) if source.client is None else subject.task.train[source.client]
        )
        centers = mechanism.centers(Released.of(subject.training.at_clients.release), [0])
        exact = mechanism.exact(source.part, subject.features, subject.labels, [rows], centers=centers)[0]
        exact = unpacked(exact) if source.part == "scatter" else exact
        torch.testing.assert_close(source.sums, exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "noise_by"), [("promptfl", "client"), ("promptfl", "server"), ("dp-fpl", "server")])
def test_without_noise_every_member_and_every_feature_is_found(model: PromptModel, method: str, noise_by: str) -> None:
    subject = subject_of(model, EXACT | {"noise_by": noise_by}, method, known=90)
    found = attack_release(subject, seed=1)
    assert found.claimed_epsilon is None
    assert found.members == found.non_members == IMAGES // 2
    # A client's class has 20 candidates in 25 dimensions, less one; all clients' class has 60, too many to solve for.
    assert found.regression.auc > (0.99 if method == "dp-fpl" or noise_by == "client" else 0.75)
    assert 0.5 < found.product.auc <= found.regression.auc
    assert found.reconstruction.cosine == pytest.approx(1, abs=1e-6)
    assert found.reconstruction.reidentified == 1
    assert abs(found.reconstruction.cosine_chance) < 0.1


def test_the_regression_is_the_posterior_mean(model: PromptModel) -> None:
    """Against a dense solution of all unknowns at once, the expected sums' lengths with a flat prior."""
    beside = {"center_share": 0.2, "scatter_share": 0.3}
    subject = subject_of(model, STATISTICS | {"noise_multiplier": 0.7, "noise_by": "server"} | beside, "dp-fpl")
    evidence = Evidence.of(subject.runtime, subject.training)
    everyone = np.concatenate(subject.task.train)
    owner = np.repeat(np.arange(CLIENTS), [len(rows) for rows in subject.task.train])
    unknown = Examples.of(subject.features, subject.labels, everyone[::3], owner[::3])
    rest = Examples.of(subject.features, subject.labels, everyone[1::3], owner[1::3])
    scores = regressed(evidence, unknown, rest)
    count, blocks, sums = len(everyone[::3]), [], []
    assert {source.part for source in evidence.sources} == {"matrix", "center", "scatter"}
    for source in evidence.sources:
        rows, others = evidence.rows(source.part, unknown), evidence.rows(source.part, rest)
        if source.part == "scatter":  # the whole matrices
            rows, others = ((part[:, :, None] * part[:, None, :]).flatten(1) for part in (rows, others))
        for label in range(4) if source.part == "matrix" else [None]:
            own, certain = source.has(unknown.owner), source.has(rest.owner)
            if label is not None:
                own, certain = own & (unknown.labels == label), certain & (rest.labels == label)
            inside = rows * own[:, None]
            expected = others[certain].sum(0) + inside.sum(0) / 2
            blocks.append((inside / source.deviation, expected / source.deviation))
            sums.append((source.sums if label is None else source.sums[label]).flatten() / source.deviation)
    lengths = torch.block_diag(*[expected[None] for _, expected in blocks])
    design = torch.cat([torch.cat([inside for inside, _ in blocks], 1), lengths])
    precision = torch.cat([torch.full((count,), 4.0), torch.full((len(blocks),), 1e-9)]).double()
    mean = torch.linalg.solve(design @ design.T + torch.diag(precision), design @ torch.cat(sums))
    torch.testing.assert_close(scores, mean[:count], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 3.0])
def test_noise_hides_a_feature_as_far_as_its_deviation_says(model: PromptModel, multiplier: float) -> None:
    """The row is b z + noise of r entries, so the cosine is near b / sqrt(b^2 + r deviation^2)."""
    subject = subject_of(
        model, STATISTICS | {"noise_multiplier": multiplier, "center_share": 0.0, "scatter_share": 0.0}
    )
    scale, width = math.sqrt(1 - statistics_of(subject).count_share), model.encoder.feature_width
    expected = scale / math.sqrt(scale**2 + width * multiplier**2)
    found = reconstruct(subject, seed=1)
    assert found.images == 64
    assert found.cosine == pytest.approx(expected, abs=4 / math.sqrt(width * found.images))


def test_an_honest_claim_stands_and_a_false_one_is_refuted(model: PromptModel) -> None:
    """Seeds are fixed: one attack in twenty may exceed an honest claim, none of these does."""
    budget = STATISTICS | {"epsilon": 0.5}
    for seed in range(4):
        honest = attack_release(subject_of(model, budget), seed)
        assert honest.claimed_epsilon is not None
        assert not honest.product.refuted
        assert not honest.regression.refuted
    for defect in ("noise left out", "noise divided"):
        broken = attack_release(subject_of(model, budget, defect=defect), 1)
        assert broken.claimed_epsilon == honest.claimed_epsilon
        assert broken.regression.refuted


def test_scores_do_not_depend_on_which_of_a_pair_is_the_member(model: PromptModel) -> None:
    """Given the same matrices and the same candidates in another order, each has the same score."""
    subject = subject_of(model, STATISTICS | {"noise_multiplier": 1.0})
    evidence = Evidence.of(subject.runtime, subject.training)
    everyone, owner = subject.task.train[0], np.zeros(len(subject.task.train[0]), dtype=np.int64)
    unknown = Examples.of(subject.features, subject.labels, everyone, owner)
    rest = Examples.of(subject.features, subject.labels, everyone[:0], owner[:0])
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(0))
    turned = Examples(unknown.features[order], unknown.labels[order], unknown.owner[order])
    scores = regressed(evidence, unknown, rest)
    torch.testing.assert_close(regressed(evidence, turned, rest), scores[order])


# --- other attacks on such a run


@pytest.mark.parametrize("noise_by", ["client", "server"])
def test_a_repeated_run_uses_the_release_again(model: PromptModel, noise_by: str) -> None:
    """Noise of the operating system is not drawn anew, so the repeated run is the same."""
    privacy = {"mechanism": "statistics", "noise_multiplier": 2.0, "delta": 1e-3, "noise_by": noise_by}
    subject = subject_of(model, privacy, "dp-fpl", rounds=3)
    again, messages = repeated(subject)
    assert len(messages) == 3
    assert same_end(again, subject.training)
    assert again.ledger.releases == subject.ledger.releases


def test_a_variation_has_the_noise_and_the_units_of_the_run(model: PromptModel) -> None:
    """Both follow from the number of examples, unless they are set."""
    subject = subject_of(model, STATISTICS | {"epsilon": 1.0})
    fewer = subject.variation(subject.features, subject.labels, [range(3), range(3, 6), range(6, 9)], 5)
    mechanism, own = fewer.mechanism, statistics_of(subject)
    assert isinstance(mechanism, StatisticsMechanism)
    assert (mechanism.multipliers, mechanism.count_share) == (own.multipliers, own.count_share)
    assert len(train(fewer).ledger.releases) == CLIENTS


def test_what_cannot_be_attacked_is_refused(model: PromptModel) -> None:
    subject = subject_of(model, EXACT)
    for privacy, reason in (
        ({"mechanism": "none"}, "nothing is released of class statistics"),
        ({"mechanism": "dp-sgd", "noise_multiplier": 1.0}, "nothing is released of class statistics"),
    ):
        other = subject_of(model, privacy, rounds=0)
        with pytest.raises(ConfigError, match=reason):
            attack_release(other, 1)
    persons = subject.runtime.privacy.model_copy(update={"unit": "person"})
    subject.runtime.privacy = persons
    with pytest.raises(ConfigError, match="not persons"):
        attack_release(replace(subject), 1)


@pytest.mark.parametrize("release_of_another", [False, True])
def test_an_audit_of_such_a_run_stands_beside_its_claim(
    config_file: Path, tmp_path: Path, release_of_another: bool
) -> None:
    keys = ["privacy.mechanism=statistics", "privacy.epsilon=2.0", "privacy.delta=0.01", "rounds=2"]
    folder = tmp_path / "run"
    run(load_config(config_file, keys), folder)
    if release_of_another:
        folder = tmp_path / "second"
        again = ["privacy.mechanism=statistics", f"privacy.release={tmp_path / 'run'}", "rounds=2"]
        run(load_config(config_file, [*again, "algorithm=promptfl"]), folder)
    found = audit(folder, shadows=4, canaries=16, queries=20)
    attacks = found["attacks"]
    assert found["claimed"]["epsilon"] == pytest.approx(2.0, abs=0.05)
    assert "drawn from" in attacks["rounds"]["reason"]
    assert "drawn from" in attacks["inversion"]["reason"]
    assert "lira" in attacks["membership"]
    assert not attacks["canaries"]["refuted"]
    assert attacks["canaries"]["white_box"]["observer"] == "the class statistics as they were released"
    assert attacks["release"]["regression"]["epsilon"] <= attacks["release"]["claimed_epsilon"]
    if not release_of_another:
        assert attacks["stealing"]["same_run"]
        assert attacks["stealing"]["victims"]
    page = (folder / "report.html").read_text()
    assert "<td>statistics, product</td>" in page
    assert "<td>statistics, regression</td>" in page
    assert "release: regression with the released statistics: AUC" in as_text(found)


def test_the_attack_on_a_release_is_refused_where_there_is_none(config_file: Path, tmp_path: Path) -> None:
    run(load_config(config_file, ["algorithm=promptfl", "rounds=2"]), tmp_path / "run")
    with pytest.raises(ConfigError, match="nothing is released of class statistics"):
        audit(tmp_path / "run", ["release"])
