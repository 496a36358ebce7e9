"""What a prompt tells of its privacy is its ledger's, in every word, by every way that a prompt is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from serving.test_hostile import asked
from serving.test_publishing import AUDITED, edit
from sordino.cli.app import invoke
from sordino.errors import ConfigError, PromptError, RunError
from sordino.prompt_file import SavedPrompt
from sordino.serving.card import card
from sordino.serving.folder import export
from sordino.serving.manifest import AUDIT, CARD, PROMPT, Manifest, Sealed, record
from sordino.serving.registry import Published, Registry
from sordino.serving.server.keys import Keys
from sordino.serving.sources import Material, check_claim, from_file, from_run
from sordino.serving.trust import Trusted

NOISE = ("settings.batch_size=0", "privacy.mechanism=cotangent")
RUNS = {
    "private": (*NOISE, "privacy.epsilon=8.0"),
    "simulated": (*NOISE, "privacy.epsilon=8.0", "privacy.simulation=true"),
    "next to no noise": (*NOISE, "privacy.noise_multiplier=0.05"),
    "without noise": (),
    "on shares": ("algorithm=secfpp", "partition.clients=4", "settings.secfpp.cluster_every=1"),
}
OTHER_WORDS: dict[str, Callable[[str], str]] = {
    "none": lambda said: "",
    "a dot more": lambda said: f"{said}.",
    "of an earlier version": lambda said: said.split(" Assumes that ")[0],
    "more than is so": lambda said: said.replace("rivate", "erfectly private"),
    "another epsilon that no statement has": lambda said: f"ε is 0.1. epsilon = 0.1, they say. {said}",
}
OTHER_CLAIMS: dict[str, Callable[[str], str]] = {
    "epsilon = 0.1": lambda said: said.replace("epsilon = 8 ", "epsilon = 0.1 "),
    "epsilon = 9": lambda said: said.replace("epsilon = 8 ", "epsilon = 9 "),
    "epsilon = 8e": lambda said: said.replace("epsilon = 8 ", "epsilon = 8e "),
    "epsilon = 0.2": lambda said: f"{said} It has epsilon = 0.2 for each example.",
    "delta = 1e-9": lambda said: said.replace("at delta = ", "at delta = 1e-9 for each example, or at delta = "),
    "unit = client": lambda said: said.replace("for each example", "for each client"),
}


@pytest.fixture(scope="module")
def runs(make_run: Callable[..., Path]) -> Callable[[str], Path]:
    """Makes a run of a kind, once."""
    made: dict[str, Path] = {}

    def run(kind: str) -> Path:
        if kind not in made:
            made[kind] = make_run(*RUNS[kind])
        return made[kind]

    return run


def reworded(folder: Path, words: Callable[[str], str]) -> None:
    """Change the statement in a run's summary and prompts alike."""
    said = json.loads((folder / "summary.json").read_bytes())["privacy"]["statement"]
    edit(folder / "summary.json", privacy__statement=words(said))
    for file in (folder / "prompts").iterdir():
        saved = SavedPrompt.load(file)
        replace(saved, privacy=saved.privacy.model_copy(update={"statement": words(said)})).save(file)


def any_prompt(folder: Path) -> tuple[Path, int | None]:
    """A prompt's file of a run, and its client."""
    file = min((folder / "prompts").iterdir())
    return file, SavedPrompt.load(file).client


def both_ways(folder: Path, key: Ed25519PrivateKey, apart: Path) -> list[Callable[[], Material]]:
    """Publishes by the run directory, and by its two files apart from it."""
    file, client = any_prompt(folder)
    apart.mkdir()
    copies = [Path(shutil.copy(each, apart)) for each in (file, folder / "ledger.json")]
    return [lambda: from_run(folder, key, client), lambda: from_file(*copies)]


@pytest.mark.parametrize("words", OTHER_WORDS)
@pytest.mark.parametrize("kind", ["private", "without noise"])
def test_other_words_are_replaced_by_the_ledgers(
    kind: str, words: str, runs: Callable[[str], Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    """As prompts of earlier versions have; and nobody is to believe what is not the ledger's."""
    file, client = any_prompt(runs(kind))
    honest = SavedPrompt.load(file).privacy.statement
    copy = Path(shutil.copytree(runs(kind), tmp_path / "copy"))
    reworded(copy, OTHER_WORDS[words])
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        for publish in both_ways(copy, key, tmp_path / "apart"):
            material = publish()
            assert material.facts.privacy.statement == honest
            assert SavedPrompt.from_bytes(material.files[PROMPT]).privacy.statement == honest
            before, after = SavedPrompt.load(any_prompt(copy)[0]), SavedPrompt.from_bytes(material.files[PROMPT])
            assert replace(after, privacy=before.privacy).to_bytes() == before.to_bytes(), "nothing else is changed"
            registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
            found = registry.inspect("fabric")
            assert f"\n{honest}\n" in found.card.replace("\\", "")
            check_claim(found)
    untouched = from_run(runs(kind), key, client)
    assert untouched.files[PROMPT] == file.read_bytes()


@pytest.mark.parametrize("claim", OTHER_CLAIMS)
@pytest.mark.parametrize("kind", ["private", "simulated"])
def test_another_claim_in_a_statement_is_refused_by_name(
    kind: str, claim: str, runs: Callable[[str], Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs(kind), tmp_path / "copy"))
    reworded(copy, OTHER_CLAIMS[claim])
    for publish in both_ways(copy, key, tmp_path / "apart"):
        with pytest.raises(
            PromptError, match=f"says another privacy than its ledger: {claim}, and the ledger comes to"
        ):
            publish()


@pytest.mark.parametrize(("name", "value"), [("epsilon", 0.1), ("delta", 1e-9), ("unit", "client"), ("epsilon", None)])
def test_a_summary_that_states_another_privacy_is_refused(
    name: str, value: object, runs: Callable[[str], Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(runs("private"), tmp_path / "copy"))
    edit(copy / "summary.json", **{f"privacy__{name}": value})
    with pytest.raises(
        RunError, match=f"states another privacy than its ledger: {name} = {value}, and .*; put it back"
    ):
        from_run(copy, key)


@pytest.mark.parametrize("kind", RUNS)
def test_every_kind_of_run_is_published_as_it_says_and_goes_from_one_registry_to_another(
    kind: str, runs: Callable[[str], Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    file, _ = any_prompt(runs(kind))
    said = SavedPrompt.load(file).privacy
    with Registry(f"sqlite:///{tmp_path}/prompts.db", create=True) as registry:
        for publish in both_ways(runs(kind), key, tmp_path / "apart"):
            material = publish()
            assert material.files[PROMPT] == file.read_bytes()
            assert material.facts.privacy.statement == said.statement
            assert (material.facts.privacy.private, material.facts.privacy.simulated) == (said.private, said.simulated)
            registry.publish("fabric", material.facts, material.files, key, accept_not_private=True)
            check_claim(registry.inspect("fabric"))


def signed(found: Published, key: Ed25519PrivateKey, privacy: dict[str, object], files: dict[str, bytes]) -> Published:
    """A version as its own publisher can sign it with a program of their own, its prompt and card in accord."""
    told = found.manifest.model_dump() | {"privacy": found.manifest.privacy.model_dump() | privacy, "files": {}}
    saved = SavedPrompt.from_bytes(found.files[PROMPT])
    statement = {"statement": told["privacy"]["statement"]}
    prompt = replace(saved, privacy=saved.privacy.model_copy(update=statement)).to_bytes()
    content = {**found.files, PROMPT: prompt}
    others = sorted(name for name in content if name != CARD)
    content |= {CARD: card(Manifest.model_validate(told), others).encode()} | files
    manifest = Manifest.model_validate(told | {"files": {name: record(part) for name, part in content.items()}})
    return Published(manifest, Sealed.of(manifest, key), content, None, "the upload")


def test_a_server_takes_no_version_whose_privacy_is_not_its_ledgers(
    runs: Callable[[str], Path], key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path
) -> None:
    """Nor one whose card says something else; a signed text cannot be replaced."""
    material, url = from_run(runs("private"), key), f"sqlite:///{tmp_path}/served.db"
    with Registry(f"sqlite:///{tmp_path}/own.db", create=True) as own:
        own.publish("fabric", material.facts, material.files, key)
        honest = own.inspect("fabric")
    said = honest.manifest.privacy
    forged: dict[str, Published] = {
        words: signed(honest, key, {"statement": change(said.statement)}, {})
        for words, change in (OTHER_WORDS | OTHER_CLAIMS).items()
    }
    others = {"epsilon": 0.1, "delta": 1e-9, "unit": "client", "private": False, "simulated": True}
    forged |= {name: signed(honest, key, {name: value}, {}) for name, value in others.items()}
    lower = said.statement.replace("epsilon = 8 ", "epsilon = 7.99 ")
    forged["a little less"] = signed(honest, key, {"statement": lower}, {})
    forged["card"] = signed(honest, key, {}, {CARD: honest.files[CARD].replace(b"epsilon = 8 ", b"epsilon = 0.1 ")})
    forged["audit"] = signed(
        honest, key, {}, {AUDIT: json.dumps(AUDITED | {"claimed": {"epsilon": said.epsilon}}).encode()}
    )
    forged["damaged audit"] = signed(honest, key, {}, {AUDIT: b"[]"})
    with Registry(url, create=True) as registry:
        secret = Keys(registry.database).create("kim", ["publish", "read"])
    with asked(url, trusted, needs_key=True) as client:
        headers = {"Authorization": f"Bearer {secret}"}

        def status(version: Published) -> int:
            out = tmp_path / "out"
            export(version, out)
            parts = [(file.name, (file.name, file.read_bytes())) for file in out.iterdir()]
            shutil.rmtree(out)
            return client.post("/v1/prompts", files=parts, headers=headers).status_code

        assert {name: status(version) for name, version in forged.items()} == dict.fromkeys(forged, 422)
        assert client.get("/v1/prompts", headers=headers).json() == []
        elsewhere = said.model_dump() | {"epsilon": said.epsilon * (1 + 1e-5)}  # type: ignore[operator]
        elsewhere["statement"] = said.statement.replace("epsilon = 8 ", "epsilon = 8.001 ")
        check_claim(signed(honest, key, elsewhere, {}))
        assert status(honest) == 201


# Without its run


def test_a_prompt_in_a_run_directory_is_published_with_the_run(
    runs: Callable[[str], Path], key: Ed25519PrivateKey, tmp_path: Path
) -> None:
    """Its audit may contradict it, and by its file the prompt would have no mark."""
    copy, apart = Path(shutil.copytree(runs("private"), tmp_path / "copy")), tmp_path / "apart"
    summary = json.loads((copy / "summary.json").read_bytes())["privacy"]
    canaries = AUDITED["attacks"]["canaries"] | {"refuted": True}  # type: ignore[index]
    audit = {"claimed": {"epsilon": summary["epsilon"]}, "seed": 1, "attacks": {"canaries": canaries}}
    (copy / "audit.json").write_text(json.dumps(audit))
    marked = from_run(copy, key).facts
    assert (marked.mark, marked.attacks) == ("CLAIM CONTRADICTED", "contradicting")
    apart.mkdir()
    file, ledger = any_prompt(copy)[0], copy / "ledger.json"
    (apart / "linked.safetensors").symlink_to(file)
    copies = [Path(shutil.copy(each, apart)) for each in (file, ledger)]
    linked = apart / "linked"
    linked.symlink_to(copy / "prompts")
    ways = [(file, ledger), (file, copies[1]), (copies[0], ledger), (apart / "linked.safetensors", copies[1])]
    for way in (*ways, (linked / file.name, copies[1])):
        with pytest.raises(ConfigError, match=r"lies in the run directory .*copy, whose audit .*; give that instead"):
            from_file(*way)
    (copy / "summary.json").unlink()  # it is the audit's all the same
    with pytest.raises(ConfigError, match="lies in the run directory"):
        from_file(file, ledger)
    assert from_file(*copies).facts.attacks == "unknown"


def test_a_prompt_of_private_tuning_has_no_ledger_to_be_held_against(
    runs: Callable[[str], Path], tmp_path: Path
) -> None:
    saved, file = SavedPrompt.load(any_prompt(runs("without noise"))[0]), tmp_path / "prompt.safetensors"
    replace(saved, privacy=saved.privacy.model_copy(update={"ledger_sha256": None})).save(file)
    ledger = shutil.copy(runs("without noise") / "ledger.json", tmp_path)
    with pytest.raises(PromptError, match="was learned without a ledger"):
        from_file(file, Path(ledger))


def test_only_of_a_run_that_was_read_it_is_said_that_nobody_attacked_it(
    runs: Callable[[str], Path], key: Ed25519PrivateKey, trusted: Trusted, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    url = f"sqlite:///{tmp_path}/prompts.db"
    with Registry(url, create=True) as registry:
        for publish in both_ways(runs("private"), key, tmp_path / "apart"):
            material = publish()
            registry.publish("fabric", material.facts, material.files, key)
        cards = [registry.inspect("fabric", version).card for version in (1, 2)]
    unknown = "Published without its run; whether it was attacked is not known here."
    assert [unknown in each for each in cards] == [False, True]
    assert ["No attack on the run was tried." in each for each in cards] == [True, False]
    with asked(url, trusted) as client:
        assert [each["attacks"] for each in client.get("/v1/prompts").json()] == ["none", "unknown"]
    assert invoke(["prompts", "list", "--registry", url]) == 0
    listed = " ".join(capsys.readouterr().out.split())
    assert listed.index("none tried") < listed.index("not known: without its run")
