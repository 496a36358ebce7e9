"""The privacy statement of real runs: its numbers by another way, its words, and refusal of whatever was changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sordino
from sordino.audit.findings.strength import judge
from sordino.audit.run import audit
from sordino.cli.app import invoke
from sordino.errors import RunError, StatementError
from sordino.experiments.config import load_config
from sordino.experiments.privacy.plan import plan
from sordino.experiments.privacy.plan_page import write_page
from sordino.experiments.privacy.statement import compare, statement_of
from sordino.experiments.run import run
from sordino.privacy.signature import load_private_key, load_public_key, make_key
from sordino.report.frame import asset
from sordino.report.statement import as_page, check, sealed, write
from sordino.results import rounded_up

# Names that would be markup, end a script, or run one.
ODD = ["<b>bold<b>", "a&amp;b", "</script><script>alert(1)<!--", '"onload=alert(1) x="']

CONFIG = """
algorithm = "{algorithm}"
rounds = 2
device = "cpu"
[data]
source = "imagefolder:{pictures}"
train_per_class = 4
[partition]
scheme = "iid"
clients = 2
[encoder]
name = "clip"
checkpoint = "{checkpoint}"
[settings]
context_length = 4
batch_size = 0
local_steps = 1
[settings.dp-fpl]
rank = 2
"""
PRIVATE = ["privacy.mechanism=cotangent", "privacy.epsilon=4.0", "privacy.delta=0.01", "privacy.subspace=4"]
KINDS = {
    "private": PRIVATE,
    "simulated": [*PRIVATE, "privacy.simulation=true"],
    "trusting": ["privacy.mechanism=dp-sgd", "privacy.epsilon=4.0", "privacy.delta=0.01", "privacy.noise_by=server"],
    "clients": [
        "privacy.mechanism=dp-fedavg",
        "privacy.epsilon=4.0",
        "privacy.delta=0.4",
        "algorithm=promptfl",
        "runtime.weighting=uniform",
    ],
    "bare": [],
    "untrained": ["algorithm=zero-shot"],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, clip_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("statements")
    pictures = root / "<i>odd & 'pictures'"
    generator = np.random.default_rng(0)
    for name in (*ODD[:2], "end", ODD[3]):  # no folder's name has a slash
        folder = pictures / name
        folder.mkdir(parents=True)
        for number in range(8):
            noise = generator.integers(0, 255, (24, 24, 3)).astype(np.uint8)
            Image.fromarray(noise).save(folder / f"{number}.png")
    file = root / "config.toml"
    file.write_text(CONFIG.format(algorithm="dp-fpl", pictures=pictures, checkpoint=clip_folder))
    return file


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Real runs of every kind, each made when it is first asked for."""
    root = tmp_path_factory.mktemp("runs")

    def made(kind: str) -> Path:
        if not (root / kind).exists():
            run(load_config(config, KINDS[kind]), root / kind)
        return root / kind

    return made


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    secret = tmp_path_factory.mktemp("keys") / "officer.pem"
    return secret, make_key(secret)[0]


@pytest.fixture(scope="module")
def content(runs: Callable[[str], Path]) -> dict[str, Any]:
    return statement_of(runs("private"), judge)


@pytest.fixture
def signed(content: dict[str, Any], keys: tuple[Path, Path], tmp_path: Path) -> Path:
    file = tmp_path / "signed.html"
    file.write_bytes(as_page(sealed(content, load_private_key(keys[0]))).encode("utf-8", "replace"))
    return file


def seen(page: str) -> str:
    """The text that a reader of a page sees."""
    body = re.sub(r"<script.*?</script>", "", page.split("<body>")[1], flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", body)).split())


def test_the_numbers_are_the_ledgers_by_another_way(runs: Callable[[str], Path], content: dict[str, Any]) -> None:
    """Every example is in every batch, so a client's releases are one Gaussian release: exact, by the raw ledger."""
    raw = json.loads((runs("private") / "ledger.json").read_bytes())
    by_client: dict[str, float] = {}
    for entry in raw["releases"]:
        assert entry["sampling_rate"] == 1.0
        by_client.setdefault(entry["party"], 0.0)
        by_client[entry["party"]] += entry["steps"] * sum(z**-2 for z in entry["noise_multipliers"])
    expected = max(dp_accounting.get_epsilon_gaussian(total**-0.5, raw["delta"]) for total in by_client.values())
    assert content["epsilon"] == pytest.approx(expected, abs=1e-6)
    assert [entry["epsilon"] for entry in content["observers"]] == pytest.approx([expected] * 3, abs=1e-6)
    example, pair, ten, person, client = content["units"]
    assert example["epsilon"] == pytest.approx(expected, abs=1e-6)
    halved = dp_accounting.get_epsilon_gaussian(max(by_client.values()) ** -0.5 / 2, raw["delta"])
    assert halved <= pair["epsilon"] < ten["epsilon"]
    assert (person["epsilon"], client["epsilon"]) == (None, None)
    text = seen(as_page(sealed(content, None)))
    assert f"ε = {rounded_up(expected)} at δ = {rounded_up(raw['delta'])}" in text
    right = (np.exp(expected) + raw["delta"]) / (1 + np.exp(expected))
    (stated,) = re.findall(r"right at most ([\d.]+)% of the time", text)
    assert right <= float(stated) / 100 <= right + 1e-4
    for name in ("ledger.json", "config.toml"):
        digest = hashlib.sha256((runs("private") / name).read_bytes()).hexdigest()
        assert content["digests"][name] == digest
        assert digest in text
    fingerprint = json.loads((runs("private") / "data.json").read_bytes())["encoder"]["fingerprint"]
    assert content["digests"]["encoder"] == fingerprint


def test_the_page_confirms_no_guess_of_the_data(runs: Callable[[str], Path], content: dict[str, Any]) -> None:
    """Neither digests of clients' pictures, nor that of data.json, nor the key of its salted one."""
    page = as_page(sealed(content, None))
    record = (runs("private") / "data.json").read_bytes()
    hidden = [*json.loads(record)["parties"], hashlib.sha256(record).hexdigest()]
    hidden.append(json.loads((runs("private") / "ledger.json").read_bytes())["run"])
    assert not [digest for digest in hidden if digest in page]
    assert content["digests"]["data.json"] in page


@pytest.mark.parametrize("kind", ["private", "clients"])
def test_the_page_does_not_say_who_holds_what(kind: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    """It is for others, and epsilon bounds nothing of what it copies from the summary: classes by client, and sizes.

    Where the client is the unit, a size is as private as all else.
    """
    whole = statement_of(runs(kind), judge)
    shutil.copytree(runs(kind), tmp_path / "other")
    summary = json.loads((tmp_path / "other" / "summary.json").read_bytes())
    for result in summary["per_client"]:
        result["classes"].reverse()
        result["examples"] += 5 if kind == "clients" else 0
    (tmp_path / "other" / "summary.json").write_text(json.dumps(summary))
    assert statement_of(tmp_path / "other", judge, whole) == whole
    assert ("training pictures" in whole["document"]["subtitle"]) == (kind == "private")


@pytest.mark.parametrize(
    ("kind", "verdict", "banner"),
    [
        ("private", "private", "Differentially private, ε = "),
        ("simulated", "simulated", "NOT PRIVATE: THIS IS A SIMULATION"),
        ("trusting", "private", "Differentially private, ε = "),
        ("clients", "private", "Differentially private, ε = "),
        ("bare", "not private", "NOT PRIVATE"),
        ("untrained", "private", "Private: nothing that was learned"),
    ],
)
def test_every_kind_of_run_says_what_it_is(
    kind: str,
    verdict: str,
    banner: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "page.html"
    assert invoke(["privacy", "statement", str(runs(kind)), "--out", str(file)]) == 0
    checked = check(file)
    assert checked.statement["verdict"] == verdict
    page = file.read_text(encoding="utf-8")
    shown = re.findall(r'<p class="banner(.*?)">(.*?)</p>', page)
    assert [tone for tone, _ in shown] == ["" if verdict == "private" else " exposed"]
    assert shown[0][1].startswith(banner)
    summary = json.loads((runs(kind) / "summary.json").read_bytes())["privacy"]
    assert (verdict == "private") == summary["private"]
    text = seen(page)
    claims = re.findall(r"Differentially private", text)
    assert bool(claims) == (verdict == "private" and summary["epsilon"] != 0)
    if verdict == "simulated":
        assert "no bound: the noise can be taken off" in text
        assert "This run's noise is simulated, so none of it holds here." in text
        assert not re.search(r"<td>[\d.]+%</td>", page)  # no attacker's success stands in a table
    if kind == "trusting":
        server = next(entry for entry in checked.statement["observers"] if entry["observer"] == "server")
        assert (server["trusted"], server["epsilon"]) == (True, None)
        assert "The server is trusted" in text
    if kind == "bare":
        assert all(entry["epsilon"] is None for entry in checked.statement["observers"])
        assert "No epsilon holds" in text
    if kind == "clients":
        assert "Whose pictures are whose is not known" in text
        assert [entry["epsilon"] for entry in checked.statement["units"] if entry["unit"] == "person"] == [None]
    assert capsys.readouterr().out.splitlines()[0].startswith(banner)


def test_a_warning_is_the_largest_text() -> None:
    """On a screen and on paper."""
    screen, paper = asset("document.css").split("@media print")
    sheets = asset("page.css") + screen, paper
    for sheet, unit in zip(sheets, ("rem", "pt"), strict=True):
        sizes = [float(size) for size in re.findall(rf"font-size: ([\d.]+){unit}", sheet)]
        (banner,) = re.findall(rf"\.banner\.exposed {{[^}}]*font-size: ([\d.]+){unit}", sheet)
        assert float(banner) == max(sizes)
        assert sizes.count(max(sizes)) == 1


def test_odd_names_are_shown_and_never_markup(runs: Callable[[str], Path], content: dict[str, Any]) -> None:
    page = as_page(sealed(content, None))
    assert not re.search(r"<b>|<i>|alert\(1\)\s*<|<[^>]*onload", page)
    assert page.count("<script") == page.count("</script>") == 1  # its data, which no browser runs
    assert "script-src" not in page
    text = seen(page)
    assert "imagefolder:<i>odd & 'pictures'" in text
    for name in (*ODD[:2], ODD[3]):
        assert name.replace("_", " ") in text


def test_a_script_cannot_be_ended_by_its_data(content: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "a.html").write_bytes(as_page(sealed(content | {"mechanism": ODD[2]}, None)).encode("utf-8", "replace"))
    assert check(tmp_path / "a.html").statement["mechanism"] == ODD[2]


def test_what_is_no_text_can_be_written_and_checked(content: dict[str, Any], tmp_path: Path) -> None:
    """A path may hold bytes that no page can."""
    document = content["document"] | {"title": os.fsdecode(b"caf\xe9")}
    write(sealed(content | {"document": document}, None), tmp_path / "a.html")
    assert b"<h1>caf?</h1>" in (tmp_path / "a.html").read_bytes()
    assert check(tmp_path / "a.html").statement["document"]["title"] == os.fsdecode(b"caf\xe9")


def test_a_signed_page_is_whole(signed: Path, keys: tuple[Path, Path]) -> None:
    checked = check(signed, load_public_key(keys[1]))
    assert checked.by_given_key
    assert checked.laid_out_again
    assert checked.signer in seen(signed.read_text())
    assert "Anybody can sign with a key of their own" in check(signed).as_text(signed)
    assert "Anybody" not in checked.as_text(signed)


@given(data=st.data())
def test_no_byte_of_a_signed_page_can_be_changed(
    data: st.DataObject, content: dict[str, Any], keys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    page = as_page(sealed(content, load_private_key(keys[0]))).encode("utf-8", "replace")
    place = data.draw(st.integers(0, len(page)))
    kind = data.draw(st.sampled_from(["replace", "insert", "delete"]))
    byte = bytes([data.draw(st.integers(0, 255))])
    changed = page[:place] + (b"" if kind == "delete" else byte) + page[place + (kind != "insert") :]
    file = tmp_path_factory.getbasetemp() / "changed.html"
    file.write_bytes(changed)
    if changed == page:
        check(file)
        return
    with pytest.raises(StatementError) as error:
        check(file)
    assert "\n" not in str(error.value)


def other_digit(key: str, page: str) -> str:
    """The page with another first digit of a hexadecimal number, whichever it had: the number is a random one."""
    return re.sub(f'("{key}":")(.)', lambda found: found[1] + ("1" if found[2] == "0" else "0"), page)


TAMPERING: dict[str, tuple[Callable[[str], str], str]] = {
    "a visible number": (lambda page: page.replace("ε = 4 at", "ε = 1 at", 1), "the text of the page"),
    "the banner": (lambda page: page.replace("Differentially private,", "Safe,", 1), "the text of the page"),
    "a hidden row": (lambda page: page.replace("<li>", '<li style="display:none">', 1), "the text of the page"),
    "the styles": (lambda page: page.replace("</style>", "section{display:none}</style>"), "the text of the page"),
    "a script": (lambda page: page.replace("</body>", "<script>1</script></body>"), "the text of the page"),
    "what follows": (lambda page: page + " ", "the text of the page"),
    "the data": (lambda page: page.replace('"verdict":"private"', '"verdict":"simulated"'), "its signature"),
    "a digest": (lambda page: other_digit("page_sha256", page), "its signature"),
    "no signature": (lambda page: re.sub('"signature":"[^"]*"', '"signature":null', page), "its signature"),
    "no signer": (lambda page: re.sub(r'"signer":{[^}]*}', '"signer":null', page), "its signature"),
    "a fingerprint": (lambda page: other_digit("fingerprint", page), "its signature"),
    "spaces in the data": (lambda page: page.replace('"format":1', '"format": 1'), "its data are not as"),
    "a key twice": (lambda page: page.replace('"format":1', '"format":1,"format":1'), "is no privacy statement"),
    "no number": (lambda page: page.replace('"delta":0.01', '"delta":NaN', 1), "is no privacy statement"),
    "a newer format": (lambda page: page.replace('"format":1', '"format":2'), "has format 2"),
    "two sets of data": (lambda page: page + page, "is no privacy statement"),
    "half of it": (lambda page: page[: len(page) // 2], "is no privacy statement"),
    "nothing": (lambda page: "", "is no privacy statement"),
}


@pytest.mark.parametrize("kind", TAMPERING)
def test_each_kind_of_tampering_is_refused(kind: str, signed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = signed.read_bytes().decode()
    change, reason = TAMPERING[kind]
    changed = change(page)
    assert changed != page
    signed.write_bytes(changed.encode())
    assert invoke(["privacy", "verify", str(signed)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error


def test_a_page_without_signature_must_follow_from_its_data(content: dict[str, Any], tmp_path: Path) -> None:
    """A digest is no secret: who changes text and digest is found by laying the page out again."""
    file = tmp_path / "a.html"
    page = as_page(sealed(content, None)).encode("utf-8", "replace").decode()
    lie = page.replace("Differentially private,", "Certified,", 1)
    opening, closing = '<script type="application/json" id="statement">', "</script>\n"
    around = re.sub(f"{opening}.*?{closing}", "", lie, flags=re.DOTALL)
    digest = hashlib.sha256(around.encode()).hexdigest()
    file.write_text(re.sub('"page_sha256":"[0-9a-f]*"', f'"page_sha256":"{digest}"', lie), encoding="utf-8")
    with pytest.raises(StatementError, match="the page does not follow from its data"):
        check(file)


def test_a_key_of_ones_own_signs_and_is_told_apart(
    content: dict[str, Any], keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_key(tmp_path / "other.pem")
    file = tmp_path / "forged.html"
    file.write_bytes(as_page(sealed(content, load_private_key(tmp_path / "other.pem"))).encode("utf-8", "replace"))
    assert invoke(["privacy", "verify", str(file)]) == 0
    assert "Anybody can sign with a key of their own" in capsys.readouterr().out
    assert invoke(["privacy", "verify", str(file), "--public-key", str(keys[1])]) == 2
    assert "somebody else signed it" in capsys.readouterr().err
    file.write_bytes(as_page(sealed(content, None)).encode("utf-8", "replace"))
    assert invoke(["privacy", "verify", str(file), "--public-key", str(keys[1])]) == 2
    assert "is not signed" in capsys.readouterr().err
    assert invoke(["privacy", "verify", str(file)]) == 2
    assert "anybody can have written it" in capsys.readouterr().err


def test_json_is_a_statement_too(
    runs: Callable[[str], Path], keys: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["privacy", "statement", str(runs("private")), "--key", str(keys[0])]
    assert invoke([*arguments, "--out", str(tmp_path / "a.json"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a.json").read_bytes())
    verify = ["privacy", "verify", str(tmp_path / "a.json"), "--public-key", str(keys[1]), "--json"]
    assert invoke([*verify, "--run", str(runs("private"))]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["signed"], found["by_given_key"], found["same_run"], found["made_again"]) == (True,) * 4
    printed["statement"]["observers"][0]["epsilon"] /= 2
    (tmp_path / "a.json").write_text(json.dumps(printed))
    assert invoke(verify) == 2
    assert "its signature is not that of its content" in capsys.readouterr().err


def test_another_version_checks_by_the_digest_alone(signed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sordino, "__version__", "99.0")
    checked = check(signed)
    assert not checked.laid_out_again
    assert "compared by its signed digest" in checked.as_text(signed)
    signed.write_bytes(signed.read_bytes().replace("ε = 4 at".encode(), "ε = 1 at".encode(), 1))
    with pytest.raises(StatementError, match="the text of the page"):
        check(signed)


def test_a_statement_is_that_of_one_run(
    content: dict[str, Any], runs: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = json.loads(json.dumps(content))
    copy = tmp_path / "moved"
    shutil.copytree(runs("private"), copy)
    assert compare(stated, copy, judge)
    with pytest.raises(StatementError, match=r"Ledger \(ledger.json\) is not the one that was stated"):
        compare(stated, runs("simulated"), judge)
    for name in ("config.toml", "data.json"):
        before = (copy / name).read_bytes()
        (copy / name).write_bytes(before + b"\n")
        with pytest.raises(StatementError, match=re.escape(name)):
            compare(stated, copy, judge)
        (copy / name).write_bytes(before)
    before = (copy / "ledger.json").read_bytes()
    (copy / "ledger.json").write_bytes(before.replace(b'"steps": 2', b'"steps": 1'))
    with pytest.raises(RunError, match="ledger.json is not the one that summary.json was written with"):
        compare(stated, copy, judge)
    (copy / "ledger.json").write_bytes(before)
    monkeypatch.setattr(sordino, "__version__", "99.0")
    assert not compare(stated, copy, judge)


def test_a_false_statement_that_is_signed_is_not_that_of_the_run(content: dict[str, Any], runs: Any) -> None:
    for change in ({"epsilon": 0.1}, {"verdict": "simulated"}, {"document": content["document"] | {"banner": "Safe"}}):
        stated = json.loads(json.dumps(content | change))
        with pytest.raises(StatementError, match=f"gives another '{next(iter(change))}' than was stated"):
            compare(stated, runs("private"), judge)


@pytest.mark.slow
def test_an_audit_stands_in_the_statement_and_belongs_to_it(
    content: dict[str, Any], runs: Callable[[str], Path], tmp_path: Path
) -> None:
    assert "Not audited" in seen(as_page(sealed(content, None)))
    folder = tmp_path / "audited"
    shutil.copytree(runs("private"), folder)
    found = audit(folder, ["membership", "canaries"], shadows=4, canaries=8)
    stated = statement_of(folder, judge)
    text = seen(as_page(sealed(stated, None)))
    assert "Not audited" not in text
    assert f"with {found['attacks']['canaries']['canaries']} canaries" in text
    assert "pairs of pictures, 4 shadow federations" in text
    assert stated["digests"]["audit.json"] == hashlib.sha256((folder / "audit.json").read_bytes()).hexdigest()
    assert compare(json.loads(json.dumps(stated)), folder, judge)
    with pytest.raises(StatementError, match="audit.json"):
        compare(json.loads(json.dumps(content)), folder, judge)  # written before the audit
    found["attacks"]["canaries"] |= {"epsilon": 9.0, "refuted": True}
    (folder / "audit.json").write_text(json.dumps(found))
    contradicted = statement_of(folder, judge)
    assert contradicted["verdict"] == "contradicted"
    assert contradicted["document"]["banner"] == "NOT PRIVATE: ITS OWN AUDIT CONTRADICTS THE CLAIM"
    assert contradicted["document"]["exposed"]


BAD: list[tuple[Callable[[Path], None], str]] = [
    (lambda run: (run / "summary.json").unlink(), "summary.json cannot be read"),
    (lambda run: (run / "ledger.json").unlink(), "ledger.json cannot be read"),
    (lambda run: (run / "data.json").write_text("[]"), "data.json is damaged"),
    (lambda run: (run / "audit.json").write_text("{"), "audit.json is damaged"),
    (lambda run: (run / "summary.json").write_text("{}"), "summary.json is damaged"),
]


@pytest.mark.parametrize(("harm", "reason"), BAD)
def test_an_unfinished_or_damaged_run_has_no_statement(
    harm: Callable[[Path], None],
    reason: str,
    runs: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(runs("private"), tmp_path / "run")
    harm(tmp_path / "run")
    out = tmp_path / "page.html"
    assert invoke(["privacy", "statement", str(tmp_path / "run"), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert not out.exists()


def test_the_keys_command_makes_what_the_others_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["privacy", "key", "--out", str(tmp_path / "me.pem")]) == 0
    assert "Fingerprint: " in capsys.readouterr().out
    load_private_key(tmp_path / "me.pem")
    load_public_key(tmp_path / "me.pub.pem")
    assert invoke(["privacy", "key", "--out", str(tmp_path / "me.pem")]) == 2
    assert "never overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["private", "clients", "simulated", "bare"])
def test_a_plan_has_the_statements_look_and_words(kind: str, config: Path, tmp_path: Path) -> None:
    chosen = plan(load_config(config, KINDS[kind]))
    write_page(chosen, tmp_path / "plan.html")
    page = (tmp_path / "plan.html").read_text(encoding="utf-8")
    assert asset("page.css") in page
    assert asset("document.css") in page
    assert ('data-figure="epsilon"' in page) == (kind != "bare")
    text = seen(page)
    assert ("for training in all" in text) == (kind != "clients")
    starts = {"simulated": "NOT PRIVATE: THIS IS A SIM"}
    starts |= dict.fromkeys(("private", "clients"), "Planned: differentially private, ε = ")
    assert starts.get(kind, "NOT PRIVATE") in text
    assert "imagefolder:<i>odd & 'pictures'" in text
    if kind == "private":
        worst = max(view.epsilon for view in chosen.views)
        assert f"ε = {rounded_up(worst)} at δ = 0.01" in text


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["private", "trusting", "simulated", "bare"])
def test_a_statement_prints_on_two_pages(kind: str, runs: Callable[[str], Path], tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium to print with")
    write(sealed(statement_of(runs(kind), judge), None), tmp_path / "page.html")
    options = ["--headless", "--no-sandbox", "--no-pdf-header-footer", f"--print-to-pdf={tmp_path / 'page.pdf'}"]
    command = [browser, *options, (tmp_path / "page.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    assert 1 <= len(re.findall(rb"/Type\s*/Page[^s]", (tmp_path / "page.pdf").read_bytes())) <= 2
