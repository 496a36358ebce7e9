"""What a run directory or a prompt's file becomes when it is published, and what is refused; by real commands."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from huggingface_hub import ModelCard

from full_disk import full_disk
from serving.conftest import some_facts
from sordino.cli.app import invoke
from sordino.errors import ConfigError, PromptError, RunError
from sordino.privacy.ledger import Ledger, Release
from sordino.privacy.signature import make_key, public_bytes
from sordino.privacy.statement import spending
from sordino.prompt_file import SavedPrompt
from sordino.report.statement import check
from sordino.results import rounded_up
from sordino.serving.card import card
from sordino.serving.folder import export, read_folder
from sordino.serving.manifest import AUDIT, CARD, LEDGER, PROMPT, STATEMENT, Manifest
from sordino.serving.registry import Registry
from sordino.serving.sources import from_file, from_run
from sordino.serving.trust import Trusted, publisher_key


@pytest.fixture(scope="module")
def private_run(make_run: Callable[..., Path]) -> Path:
    """A run with noise that protects every example."""
    settings = ("settings.batch_size=0", "privacy.mechanism=cotangent", "privacy.epsilon=8.0")
    return make_run("algorithm=promptfl", *settings)


@pytest.fixture(scope="module")
def personal_run(make_run: Callable[..., Path]) -> Path:
    """A run whose clients have prompts of their own."""
    return make_run("algorithm=dp-fpl")


@pytest.fixture
def copy(shared_run: Path, tmp_path: Path) -> Path:
    """A run directory to change."""
    return Path(shutil.copytree(shared_run, tmp_path / "copy"))


def summary_of(run: Path) -> dict[str, object]:
    return dict(json.loads((run / "summary.json").read_bytes()))


def test_a_private_run_says_its_privacy_by_the_ledger(private_run: Path, key: Ed25519PrivateKey) -> None:
    facts = from_run(private_run, key).facts
    assert facts.mark == ""
    assert facts.privacy.private
    assert facts.privacy.epsilon == pytest.approx(8.0, rel=1e-2)
    assert facts.privacy.unit == "example"
    assert f"epsilon = {rounded_up(facts.privacy.epsilon, 4)} for" in facts.promise
    summary = summary_of(private_run)
    assert facts.privacy.statement == summary["privacy"]["statement"]  # type: ignore[index]


RUNS = {
    "without": ("privacy.mechanism=none",),
    "cotangent": ("privacy.mechanism=cotangent", "privacy.epsilon=8.0"),
    "dp-sgd": ("privacy.mechanism=dp-sgd", "privacy.epsilon=8.0"),
    "dp-fedavg": ("privacy.mechanism=dp-fedavg", "privacy.epsilon=8.0", "runtime.weighting=uniform"),
    **{
        f"statistics, noise by {who}": (
            "privacy.mechanism=statistics",
            "privacy.epsilon=8.0",
            f"privacy.noise_by={who}",
        )
        for who in ("client", "server", "shares")
    },
}


@pytest.mark.parametrize("mechanism", RUNS)
def test_what_identifies_data_stays_at_home(
    mechanism: str,
    make_run: Callable[..., Path],
    key: Ed25519PrivateKey,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither digests of pictures nor a run's name, which salts published digests, nor a place on this disk."""
    folder = make_run("settings.batch_size=0", "privacy.delta=0.01", *RUNS[mechanism])
    runs = [folder]
    if mechanism.startswith("statistics"):  # one that uses the release again has the first one's name to keep, too
        runs.append(make_run("settings.batch_size=0", "privacy.mechanism=statistics", f"privacy.release={folder}"))
    own = [Ledger.from_json((each / "ledger.json").read_bytes()) for each in runs]
    secrets = [secret for ledger in own for secret in (ledger.run, *ledger.data.values())]
    assert all(len(secret) >= 32 for secret in secrets)
    for number, (each, ledger) in enumerate(zip(runs, own, strict=True)):
        material = from_run(each, key)
        public = Ledger.from_json(material.files[LEDGER])
        assert [replace(release, name="") for release in public.releases] == [
            replace(release, name="") for release in ledger.releases
        ]
        out = tmp_path / f"{number}.html"
        assert invoke(["privacy", "statement", str(each), "--out", str(out)]) == 0
        assert invoke(["privacy", "ledger", str(each), "--json"]) == 0
        shown = {
            **{name: content for name, content in material.files.items() if name != PROMPT},
            **{"facts": material.facts.model_dump_json().encode(), "printed": capsys.readouterr().out.encode()},
            **{"statement": out.read_bytes(), "report": (each / "report.html").read_bytes()},
            **{str(path): path.read_bytes() for path in each.rglob("prompts/*")},
        }
        assert not [
            (name, secret) for name, content in shown.items() for secret in secrets if secret.encode() in content
        ]
        assert material.facts.training is not None
        assert material.facts.training.dataset.startswith("imagefolder:photos")


def test_a_ledger_of_an_earlier_version_is_shown_without_the_run_that_names_its_releases(tmp_path: Path) -> None:
    """In those a release had the name of its run."""
    run = "ab" * 16
    release = Release("means", "client 0", "example", (2.0,), 1.0, 1, "client", ("server", "public"), run)
    ledger = Ledger((release,), delta=1e-3, run=run, data={"client 0": "cd" * 32})
    told = ledger.for_others()
    assert run not in told.to_json() + json.dumps(spending(ledger))
    again = replace(ledger, run="ef" * 16).for_others()
    assert again.releases == told.releases, "a release that two runs use is one for readers too"


def test_the_prompt_is_published_to_the_byte_with_its_own_accuracy(personal_run: Path, key: Ed25519PrivateKey) -> None:
    material = from_run(personal_run, key, client=1)
    assert material.files[PROMPT] == (personal_run / "prompts" / "client-0001.safetensors").read_bytes()
    training, result = material.facts.training, summary_of(personal_run)["per_client"][1]  # type: ignore[index]
    assert training is not None
    assert (training.of, material.facts.client) == ("client", 1)
    assert (training.accuracy.local, training.accuracy.overall) == (result["local"], result["overall"])
    written = summary_of(personal_run)["hand_written"]["per_client"][1]  # type: ignore[index]
    assert training.hand_written is not None
    assert training.hand_written.neighbor == written["neighbor"]


def test_a_shared_prompt_has_the_mean_accuracy(shared_run: Path, key: Ed25519PrivateKey) -> None:
    training = from_run(shared_run, key).facts.training
    assert training is not None
    assert training.of == "mean"
    assert training.accuracy.overall == summary_of(shared_run)["accuracy"]["overall"]  # type: ignore[index]


def test_the_statement_is_signed_with_the_same_key(private_run: Path, key: Ed25519PrivateKey, tmp_path: Path) -> None:
    file = tmp_path / "statement.json"
    file.write_bytes(from_run(private_run, key).files[STATEMENT])
    assert check(file, public_bytes(key)).signer is not None


def test_which_prompt_is_meant_must_be_clear(personal_run: Path, shared_run: Path, key: Ed25519PrivateKey) -> None:
    with pytest.raises(ConfigError, match=r"--client = None: this run has 2 prompts"):
        from_run(personal_run, key)
    with pytest.raises(ConfigError, match="no such client"):
        from_run(personal_run, key, client=2)
    with pytest.raises(ConfigError, match="all clients share one prompt"):
        from_run(shared_run, key, client=0)
    with pytest.raises(ConfigError, match=r"RUN = .*no prompts"):
        from_run(shared_run / "prompts", key)


def edit(file: Path, **changes: object) -> None:
    """Change entries of a JSON file; a dotted place is written with two underscores."""
    content = json.loads(file.read_bytes())
    for place, value in changes.items():
        *tables, last = place.split("__")
        table = content
        for name in tables:
            table = table[name]
        table[last] = value
    file.write_text(json.dumps(content, indent=2) + "\n")


def test_a_summary_that_says_more_than_the_ledger_is_refused(copy: Path, key: Ed25519PrivateKey) -> None:
    edit(copy / "summary.json", privacy__private=True)
    with pytest.raises(PromptError, match="is not of the run"):
        from_run(copy, key)


def test_a_forged_privacy_is_refused_wherever_it_is_forged(copy: Path, key: Ed25519PrivateKey) -> None:
    """In the summary and in the prompt alike: the ledger is counted anew."""
    edit(copy / "summary.json", privacy__private=True)
    file = copy / "prompts" / "shared.safetensors"
    saved = SavedPrompt.load(file)
    replace(saved, privacy=saved.privacy.model_copy(update={"private": True})).save(file)
    with pytest.raises(PromptError, match="says another privacy than its ledger"):
        from_run(copy, key)


def test_another_runs_ledger_is_refused(copy: Path, private_run: Path, key: Ed25519PrivateKey) -> None:
    shutil.copy(private_run / "ledger.json", copy / "ledger.json")
    with pytest.raises(PromptError, match="is not of the run"):
        from_run(copy, key)


AUDITED = {
    "claimed": {"epsilon": None, "delta": None, "unit": None, "simulated": False},
    "seed": 1,
    "attacks": {
        "membership": {"reason": "too few pictures"},
        "canaries": {
            **{"epsilon": 1.5, "correct": 9, "guesses": 10, "canaries": 20, "observer": "server"},
            **{"delta": 1e-5, "claimed_epsilon": None, "refuted": False, "nested": {"epsilon": 2.5}},
        },
    },
}


def test_an_audit_comes_with_its_bounds(copy: Path, key: Ed25519PrivateKey) -> None:
    (copy / "audit.json").write_text(json.dumps(AUDITED))
    material = from_run(copy, key)
    audit = material.facts.audit
    assert audit is not None
    assert {name: attack.epsilon for name, attack in audit.attacks.items()} == {"membership": None, "canaries": 2.5}
    assert "too few pictures" in audit.attacks["membership"].found[0]
    assert not audit.refuted
    assert json.loads(material.files[AUDIT]) == AUDITED
    edit(copy / "audit.json", attacks__canaries__refuted=True)
    assert from_run(copy, key).facts.audit.refuted  # type: ignore[union-attr]


@pytest.mark.parametrize("content", ["{", "[]", '{"claimed": {"epsilon": null}, "attacks": {"canaries": {}}}'])
def test_a_damaged_audit_is_refused(content: str, copy: Path, key: Ed25519PrivateKey) -> None:
    (copy / "audit.json").write_text(content)
    with pytest.raises(RunError, match=r"audit\.json"):
        from_run(copy, key)


def test_an_audit_of_another_claim_is_refused(copy: Path, key: Ed25519PrivateKey) -> None:
    (copy / "audit.json").write_text(json.dumps(AUDITED | {"claimed": {"epsilon": 2.0}}))
    with pytest.raises(RunError, match="another claim"):
        from_run(copy, key)


def test_a_site_publishes_a_prompt_with_its_own_ledger(shared_run: Path, tmp_path: Path) -> None:
    """A site has no run directory: its ledger is a file with the rounds beside it."""
    (tmp_path / "prompts").mkdir()
    prompt = Path(shutil.copy(shared_run / "prompts" / "shared.safetensors", tmp_path / "prompts"))
    shutil.copy(shared_run / "ledger.json", tmp_path)
    ledger = json.loads((tmp_path / "ledger.json").read_bytes())
    (tmp_path / "site.json").write_text(json.dumps({"rounds": [1], "ledger": ledger}))
    material = from_file(prompt, tmp_path / "site.json")
    assert material == from_file(prompt, tmp_path / "ledger.json")
    assert (material.facts.mark, material.facts.training) == ("NOT PRIVATE", None)
    other = ledger | {"run": "00"}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(PromptError, match="another ledger"):
        from_file(prompt, tmp_path / "other.json")


@pytest.fixture
def exported(shared_run: Path, key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path) -> Path:
    material = from_run(shared_run, key)
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
        export(registry.load("fabric", trusted=trusted), tmp_path / "exported")
    return tmp_path / "exported"


def test_an_exported_folder_is_whole_and_its_prompt_classifies(exported: Path, trusted: Trusted) -> None:
    found = read_folder(exported, trusted)
    assert {file.name for file in exported.iterdir()} == {*found.manifest.files, "manifest.json", "signature.json"}
    assert not [file for file in exported.parent.iterdir() if file.name.endswith(".tmp")]
    for name, known in found.manifest.files.items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == known.sha256
    saved = SavedPrompt.load(exported / PROMPT)
    assert saved.class_names == found.manifest.class_names
    with pytest.raises(ConfigError, match="is there already"):
        export(found, exported)


def test_the_card_has_the_front_matter_of_hugging_face(exported: Path) -> None:
    loaded = ModelCard.load(exported / CARD)
    assert loaded.data.library_name == "sordino"
    assert "not-private" in loaded.data.tags
    assert loaded.content.startswith("---\n")
    assert yaml.safe_load(loaded.content.split("---\n")[1])["encoder"] == "clip"
    assert "**NOT PRIVATE.**" in loaded.text


@pytest.mark.parametrize("file", [PROMPT, LEDGER, STATEMENT, CARD, "manifest.json", "signature.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_folder_with_any_file_changed_or_gone_is_refused(
    file: str, how: str, exported: Path, trusted: Trusted
) -> None:
    if how == "gone":
        (exported / file).unlink()
    else:
        content = bytearray((exported / file).read_bytes())
        content[len(content) // 2] ^= 2
        (exported / file).write_bytes(content)
    with pytest.raises(PromptError, match=r"exported: ") as refusal:
        read_folder(exported, trusted)
    assert "\n" not in str(refusal.value)


def test_a_folder_signed_by_somebody_else_is_refused(exported: Path) -> None:
    with pytest.raises(PromptError, match="not trusted here"):
        read_folder(exported, Trusted(frozenset()))


def test_the_card_shows_any_name_as_text(exported: Path) -> None:
    """Names of classes come from folders that anybody may have named."""
    facts = some_facts(class_names=("a\n---\n# injected", "<script>alert(1)</script>", "![x](http://x)"))
    parts = {name: getattr(facts, name) for name in type(facts).model_fields}
    text = card(
        Manifest(**parts, name="a", version=1, created="2026-01-01T00:00:00Z", publisher="x", files={}), [PROMPT]
    )
    assert "\n# injected" not in text
    assert "<script" not in text
    assert not re.search(r"(?<!\\)[][!]", text.split("## Classes")[1].split("## Use")[0])


def call(*arguments: str) -> int:
    return invoke([str(argument) for argument in arguments])


def test_the_commands_from_publishing_to_withdrawal(
    shared_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    own_config: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    run = str(shared_run)
    assert call("prompts", "list") == 2
    assert "there is no registry" in capsys.readouterr().err
    assert call("publish", run, "--name", "fabric") == 2
    assert "--accept-not-private" in capsys.readouterr().err
    assert (list(tmp_path.iterdir()), list(own_config.iterdir())) == ([], [])  # nothing is made for it
    assert call("publish", run, "--name", "fabric", "--accept-not-private") == 0
    told = capsys.readouterr().out
    assert "Published fabric:1 in sqlite:///prompts.db: NOT PRIVATE" in told
    assert str(own_config / "publisher.pub.pem") in told
    assert call("publish", run, "--name", "fabric", "--accept-not-private", "--json") == 0
    assert json.loads(capsys.readouterr().out)["version"] == 2
    assert call("prompts", "list", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["prompts"]
    assert [(each["version"], each["trusted"], each["manifest"]["mark"]) for each in listed] == [
        (1, True, "NOT PRIVATE"),
        (2, True, "NOT PRIVATE"),
    ]
    assert call("prompts", "list") == 0
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert call("prompts", "show", "fabric:1") == 0
    assert "# fabric, version 1" in capsys.readouterr().out
    assert call("prompts", "verify") == 0
    assert call("prompts", "withdraw", "fabric", "--reason", "a test") == 2
    assert call("prompts", "withdraw", "fabric:2", "--reason", "a test") == 0
    capsys.readouterr()
    assert call("prompts", "show", "fabric:2") == 0
    assert "WITHDRAWN" in capsys.readouterr().out
    assert call("prompts", "export", "fabric:2", "--out", "x") == 2
    assert "a test" in capsys.readouterr().err
    assert call("prompts", "export", "fabric", "--out", "folder") == 0
    assert "NOT PRIVATE" in capsys.readouterr().out
    assert call("prompts", "verify", "folder/") == 0


def test_a_folder_is_never_taken_for_the_version_of_its_name(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder knows nothing of a withdrawal, and whoever fills the working folder may have put it there."""
    monkeypatch.chdir(tmp_path)
    assert call("publish", str(shared_run), "--name", "fabric", "--accept-not-private") == 0
    assert call("prompts", "export", "fabric", "--out", "fabric") == 0
    assert call("prompts", "withdraw", "fabric:1", "--reason", "a test") == 0
    capsys.readouterr()
    assert call("prompts", "verify", "fabric", "--registry", "sqlite:///prompts.db") == 0
    assert "Withdrawn since" in capsys.readouterr().out
    assert call("prompts", "verify", "fabric") == 2
    told = capsys.readouterr().err
    assert "fabric/" in told
    assert "--registry" in told
    assert call("prompts", "verify", "fabric:1") == 0  # no folder has this name
    assert "Withdrawn since" in capsys.readouterr().out
    for folder in ("fabric/", "./fabric", str(tmp_path / "fabric")):
        assert call("prompts", "verify", folder) == 0
        assert "Withdrawn" not in capsys.readouterr().out
        assert call("prompts", "verify", folder, "--registry", "sqlite:///prompts.db") == 2
        assert "leave --registry out" in capsys.readouterr().err
    assert call("prompts", "verify", "./absent") == 2
    assert "manifest.json is missing" in capsys.readouterr().err


def test_a_stranger_trusts_by_a_key_that_is_given(
    shared_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not by what lies in the registry, nor in the working folder."""
    public, _ = make_key(tmp_path / "officer.pem")
    registry = f"sqlite:///{tmp_path}/prompts.db"
    options = ["--name", "fabric", "--registry", registry, "--accept-not-private"]
    assert call("publish", str(shared_run), *options, "--key", str(tmp_path / "officer.pem")) == 0
    (tmp_path / "trusted").mkdir()
    shutil.copy(public, tmp_path / "trusted")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call("prompts", "verify", "fabric", "--registry", registry) == 2
    assert "not trusted here" in capsys.readouterr().err
    assert call("prompts", "show", "fabric", "--registry", registry) == 0
    assert "NOT TRUSTED" in capsys.readouterr().out
    assert call("prompts", "list", "--registry", registry) == 0
    assert "NOT TRUSTED" in capsys.readouterr().out
    for place in (str(public), str(tmp_path / "trusted")):
        assert call("prompts", "verify", "fabric", "--registry", registry, "--trust", place) == 0
    assert call("prompts", "verify", "--registry", registry) == 1  # of all
    capsys.readouterr()


def test_keys_in_the_users_own_folder_are_trusted(own_config: Path, tmp_path: Path) -> None:
    public, _ = make_key(tmp_path / "officer.pem")
    assert not Trusted.of().keys
    (own_config / "trusted").mkdir()
    shutil.copy(public, own_config / "trusted" / "officer.pub.pem")
    assert len(Trusted.of().keys) == 1
    key, file = publisher_key()
    again, _ = publisher_key()
    assert key.private_bytes_raw() == again.private_bytes_raw()
    assert file == own_config / "publisher.pub.pem"
    assert len(Trusted.of().keys) == 2
    with pytest.raises(ConfigError, match="--trust"):
        Trusted.of([tmp_path / "empty"])


def test_a_full_disk_leaves_no_key_that_blocks_the_next_publish(own_config: Path) -> None:
    with full_disk(), pytest.raises(RunError, match=r"publisher\.pem: .*free space, or set SORDINO_CONFIG .* --key$"):
        publisher_key()
    assert list(own_config.iterdir()) == []
    publisher_key()
    assert {file.name for file in own_config.iterdir()} == {"publisher.pem", "publisher.pub.pem"}


def test_half_of_the_own_pair_is_completed_or_told(own_config: Path) -> None:
    """A process may be killed between the two files; and an earlier version left the beginning of a key."""
    key, public = publisher_key()
    assert public is not None
    content = public.read_bytes()
    public.unlink()
    again, public = publisher_key()
    assert public is not None
    assert public.read_bytes() == content
    assert again.private_bytes_raw() == key.private_bytes_raw()
    (own_config / "publisher.pem").unlink()
    with pytest.raises(ConfigError, match=r"SORDINO_CONFIG .*pub\.pem is there already.* or give a key with --key$"):
        publisher_key()
    assert {file.name for file in own_config.iterdir()} == {"publisher.pub.pem"}
    (own_config / "publisher.pem").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"publisher\.pem in it holds no such key, .* or move the file away"):
        publisher_key()
