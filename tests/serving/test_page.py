"""The web pages in a real Chromium, before a real server with prompts of real runs."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import Browser, FilePayload, Page, expect

from serving.browser import artifacts, chromium, require_accessible, require_no_sideways_scrolling, watched
from serving.uploads import huge_png, real
from sordino.results import FILE, Summary

pytestmark = pytest.mark.slow

# The demo as users run it, with few pictures and one round: seven runs, four of them of one method.
SMALL = ["--set", "rounds=1", "--set", "data.train_per_class=8", "--set", "data.test_per_class=4"]
SIMULATED = ["--set", "algorithm=dp-fpl", "--set", "privacy.simulation=true"]
PRIVATE, OPEN = "dp-fpl/privacy.epsilon=8.0/seed-0", "promptfl/seed-0"
PNG = real("PNG")
DATA_TRANSFER = """([content, name, type]) => {
    const transfer = new DataTransfer();
    transfer.items.add(new File([Uint8Array.from(content)], name, { type }));
    return transfer;
}"""
COPY = """async (content) => {
    const picture = new Blob([Uint8Array.from(content)], { type: "image/png" });
    await navigator.clipboard.write([new ClipboardItem({ "image/png": picture })]);
}"""


@dataclass
class Place:
    """A folder with runs, a registry, and the user's keys."""

    folder: Path

    def command(self, *arguments: str) -> str:
        """Run a command there, and return what it prints."""
        done = subprocess.run(self._words(arguments), cwd=self.folder, env=self._environment, **PIPES)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @contextmanager
    def serving(self, *arguments: str) -> Iterator[str]:
        """Start a server of its own; its address."""
        words = self._words(["serve", "--port", "0", *arguments])
        process = subprocess.Popen(words, cwd=self.folder, env=self._environment, text=True, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("Serving at "), line
            yield line.removeprefix("Serving at ").strip() + "/"
        finally:
            process.terminate()
            process.wait(60)

    def _words(self, arguments: Any) -> list[str]:
        return [sys.executable, "-m", "sordino", *arguments]

    @property
    def _environment(self) -> dict[str, str]:
        own = {"SORDINO_CONFIG": str(self.folder / "config"), "SORDINO_CACHE": str(self.folder / "cache")}
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "SORDINO_REGISTRY": ""}
        return os.environ | own | paths


PIPES: dict[str, Any] = {"capture_output": True, "text": True, "check": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The demo's runs, two of them published: one private in two versions, and one not private; and a simulated one."""
    place = Place(tmp_path_factory.mktemp("place"))
    place.command("demo", "--quick", *SMALL, "--out", "runs/demo")
    for _ in range(2):
        place.command("publish", f"runs/demo/{PRIVATE}", "--client", "0", "--name", "digits")
    place.command("publish", f"runs/demo/{OPEN}", "--name", "shared", "--accept-not-private")
    config = str(files("sordino.cli") / "demo_private.toml")
    place.command("run", config, *SMALL, *SIMULATED, "--out", "simulated")
    place.command("publish", "simulated", "--client", "0", "--name", "simulated", "--accept-not-private")
    for file in ("prompts/client-0000.safetensors", "ledger.json"):
        shutil.copy(place.folder / "simulated" / file, place.folder)
    alone = ["client-0000.safetensors", "--ledger", "ledger.json"]
    place.command("publish", *alone, "--name", "alone", "--accept-not-private")
    return place


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def base(place: Place) -> Iterator[str]:
    """The address of an open server, which compares runs."""
    with place.serving("digits", "--runs", "runs") as address:
        yield address


@pytest.fixture(scope="module")
def keys(base: str, place: Place) -> dict[str, str]:
    """Keys, made when the open server was there already: it stays open."""
    return {
        "kim": place.command("keys", "create", "--name", "kim", "--per-day", "2"),
        "reader": place.command("keys", "create", "--name", "reader", "--scopes", "read"),
        "asker": place.command("keys", "create", "--name", "asker", "--scopes", "classify"),
    }


@pytest.fixture(scope="module")
def locked(keys: dict[str, str], place: Place) -> Iterator[str]:
    """The address of a server of the same registry that asks for keys."""
    with place.serving("--runs", "runs") as address:
        yield address


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return artifacts(tmp_path)


def entered(page: Page, prompt: str = "digits:2") -> Page:
    page.goto(f"./#{prompt}")
    expect(page.locator("#card-body .figure")).to_be_visible()
    return page


def answered(page: Page) -> list[tuple[str, str, str]]:
    """The rows of the answer: class, and what stands for the prompt and for hand-written words."""
    expect(page.locator("#answer")).to_be_visible(timeout=60_000)
    assert page.locator("#alert").inner_text() == ""
    rows = page.locator("#ranked tr").all()
    return [(row.locator("th").inner_text(), *row.locator("td").all_inner_texts()) for row in rows]


def require_answer(page: Page, base: str, content: bytes) -> None:
    """Require that rows and bars are those of the API's answer to the same bytes."""
    form = {"image": ("picture", content)}
    query = {"zero_shot": "true", "version": "2"}
    answer = httpx.post(f"{base}v1/prompts/digits/classify", files=form, params=query, timeout=60).json()["pictures"][0]
    kinds = {"learned": answer["classes"], "written": answer["zero_shot"]}
    rows = answered(page)
    assert [name for name, _, _ in rows][:5] == [each["name"] for each in answer["classes"]]
    for column, (kind, told) in enumerate(kinds.items(), 1):
        values = {each["name"]: each["probability"] for each in told}
        shown = {row[0]: row[column] for row in rows}
        assert {name: f"{value:.0%}" for name, value in values.items()} == {
            name: text for name, text in shown.items() if "not among" not in text
        }
        bars = page.locator(f"#ranked .{kind}").evaluate_all(
            "bars => bars.map((bar) => [bar.closest('tr').firstChild.textContent, "
            "parseFloat(bar.style.width) / 100, bar.offsetWidth / bar.parentElement.clientWidth])"
        )
        assert len(bars) == len(values)
        for name, asked, drawn in bars:
            assert asked == pytest.approx(values[name])
            assert drawn == pytest.approx(values[name], abs=0.03)
    assert page.locator("#verdict strong").inner_text() == answer["classes"][0]["name"]


def upload(page: Page, content: bytes, name: str = "picture.png") -> None:
    """Give a file once a person could: before the prompts are listed it would be dropped with the first choice."""
    expect(page.locator("#columns")).to_be_visible()
    page.set_input_files("#file", files=[{"name": name, "mimeType": "image/png", "buffer": content}])


def answers_choosers(page: Page, content: bytes) -> None:
    """Give a file to every dialog that asks for one.

    From before the page is there: a listener that comes with the click or the key is now and then too late for the
    browser.
    """
    chosen: list[FilePayload] = [{"name": "picture.png", "mimeType": "image/png", "buffer": content}]
    page.on("filechooser", lambda chooser: chooser.set_files(chosen))


def refused(page: Page, place: str = "#alert") -> str:
    message = page.locator(f"{place} .message")
    expect(message).to_be_visible(timeout=60_000)
    assert page.locator(place).get_attribute("role") == "alert"
    return message.inner_text()


def test_a_picture_by_button_gets_the_answer_of_the_api(browser: Browser, base: str, shots: Path) -> None:
    with watched(browser, base) as page:
        answers_choosers(page, PNG)
        entered(page).get_by_text("Choose a picture", exact=True).click()
        require_answer(page, base, PNG)
        expect(page.locator("#status")).to_contain_text("Answer to picture.png")
        page.screenshot(path=shots / "prompt-wide.png", full_page=True)


def test_a_picture_is_dropped(browser: Browser, base: str) -> None:
    with watched(browser, base) as page:
        entered(page)
        content = real("JPEG")
        transfer = page.evaluate_handle(DATA_TRANSFER, [list(content), "a.jpg", "image/jpeg"])
        for event in ("dragenter", "dragover", "drop"):
            page.dispatch_event("#drop", event, {"dataTransfer": transfer})
        require_answer(page, base, content)
        # One that misses the box is not opened in the page's place.
        page.dispatch_event("h1", "drop", {"dataTransfer": transfer})
        answered(page)
        assert page.url.startswith(base)


def test_a_picture_is_pasted(browser: Browser, base: str) -> None:
    """From the clipboard with the keys that a user presses; a browser writes pictures there anew, without a loss."""
    with watched(browser, base) as page:
        entered(page)
        page.evaluate(COPY, list(PNG))
        page.keyboard.press("Control+V")
        require_answer(page, base, PNG)
        page.evaluate("navigator.clipboard.writeText('no picture')")
        page.keyboard.press("Control+V")
        assert "clipboard holds no picture" in refused(page)


def test_a_sample_is_asked_about(browser: Browser, base: str) -> None:
    with watched(browser, base) as page:
        entered(page)
        buttons = page.locator("#sample-list button")
        expect(buttons).to_have_count(5)
        assert "Training may have used" in page.locator("#sample-origin").inner_text()
        title = buttons.nth(2).inner_text().strip()
        buttons.nth(2).click()
        require_answer(page, base, httpx.get(f"{base}v1/prompts/digits/samples/2").content)
        expect(page.locator("#status")).to_contain_text(f"sample “{title}”")


def test_the_card_says_what_the_signed_manifest_says(browser: Browser, base: str, place: Place) -> None:
    manifest = httpx.get(f"{base}v1/prompts/digits").json()["manifest"]
    summary = Summary.from_json((place.folder / "runs" / "demo" / PRIVATE / FILE).read_bytes())
    own = summary.per_client[0]
    with watched(browser, base) as page:
        card = entered(page).locator("#card-body")
        text = card.inner_text()
        assert manifest["publisher"] in text
        assert manifest["privacy"]["statement"] in text
        assert manifest["created"].replace("T", " ").replace("Z", " UTC") in text
        assert f"δ = {manifest['privacy']['delta']:g}, for each example" in text
        shown = float(re.findall(r"ε = ([\d.]+)", card.locator(".figure").inner_text())[0])
        assert manifest["privacy"]["epsilon"] <= shown <= 1.01 * manifest["privacy"]["epsilon"]
        values = [own.local, own.neighbor, own.overall]
        row = card.get_by_role("row", name="Learned")
        assert row.locator("td").all_inner_texts() == [f"{100 * value:.1f}%" for value in values]
        assert "No attack on the run was tried" in text
        assert "NOT PRIVATE" not in page.locator("body").inner_text()


def test_a_prompt_that_is_not_private_is_marked_wherever_it_shows(browser: Browser, base: str, shots: Path) -> None:
    with watched(browser, base, scheme="dark") as page:
        entered(page, "shared:1")
        assert "NOT PRIVATE" in page.locator("#version").inner_text()
        expect(page.locator("#mark")).to_contain_text("NOT PRIVATE")
        expect(page.locator("#card-body .banner")).to_have_text("NOT PRIVATE")
        expect(page.locator("#card-body .figure")).to_have_text("No guarantee")
        upload(page, PNG)
        answered(page)
        expect(page.locator("#verdict .tag")).to_have_text("NOT PRIVATE")
        page.screenshot(path=shots / "prompt-not-private-dark.png", full_page=True)
        # Another prompt takes neither the mark nor the answer over, and can be asked about the same picture.
        page.select_option("#prompt", "digits")
        expect(page.locator("#mark")).to_be_hidden()
        expect(page.locator("#answer")).to_be_hidden()
        page.locator("#again").click()
        require_answer(page, base, PNG)
        assert page.locator("#verdict .tag").count() == 0


def test_simulated_noise_is_no_guarantee(browser: Browser, base: str, shots: Path) -> None:
    with watched(browser, base) as page:
        card = entered(page, "simulated:1").locator("#card-body")
        expect(card.locator(".banner")).to_have_text("SIMULATED, NOT PRIVATE")
        expect(card.locator(".figure.exposed")).to_contain_text("of the simulated noise")
        page.screenshot(path=shots / "prompt-simulated.png")


def test_a_prompt_without_its_run_is_not_said_to_be_attacked_by_nobody(browser: Browser, base: str) -> None:
    with watched(browser, base) as page:
        card = entered(page, "alone:1").locator("#card-body")
        expect(card).to_contain_text("Published without its run; whether it was attacked is not known here.")
        expect(card).not_to_contain_text("No attack on the run was tried")
        assert page.locator("#version").inner_text() == "1, latest, SIMULATED, NOT PRIVATE, attacks not known"


BROKEN = {
    "damaged": (422, b"\x89PNG\r\n\x1a\nbroken", "The picture cannot be read"),
    "no picture": (415, b"GIF89a", "No picture of a known kind"),
    "many pixels": (413, huge_png(20_000, 20_000, b""), "more than 25,000,000 pixels"),
    "narrow": (422, huge_png(2_000, 2, b""), "one side of the picture is more than 20 times the other"),
    "large": (0, bytes((16 << 20) + 1), "16.8 MB"),  # not even sent
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_the_server_refuses_is_told_in_words(kind: str, browser: Browser, base: str, shots: Path) -> None:
    status, content, words = BROKEN[kind]
    with watched(browser, base, refused=(status,)) as page:
        upload(entered(page), content)
        told = refused(page)
        assert words.lower() in told.lower()
        expect(page.locator("#answer")).to_be_hidden()
        expect(page.locator("#progress")).to_be_hidden()
        require_accessible(page)
        page.screenshot(path=shots / f"refused-{kind.replace(' ', '-')}.png")
        upload(page, PNG)  # the page goes on
        require_answer(page, base, PNG)


def test_a_server_that_is_busy_or_gone_is_told_and_asked_again(browser: Browser, base: str) -> None:
    with watched(browser, base, refused=(503,)) as page:
        entered(page)
        busy = {"status": 503, "headers": {"Retry-After": "7"}, "body": '{"error": "too many pictures wait"}'}
        page.route("**/classify*", lambda route: route.fulfill(**busy))
        upload(page, PNG)
        assert "Try again in 7 seconds" in refused(page)
        page.unroute("**/classify*")
        page.locator("#again").click()
        require_answer(page, base, PNG)
    with watched(browser, base, cut_off=1) as page:
        entered(page)
        page.route("**/classify*", lambda route: route.abort())
        upload(page, PNG)
        assert "The server did not answer" in refused(page)


def test_a_version_that_was_withdrawn_since_is_told(browser: Browser, base: str, place: Place) -> None:
    place.command("publish", f"runs/demo/{OPEN}", "--name", "gone", "--accept-not-private")
    with watched(browser, base, refused=(410,)) as page:
        entered(page, "gone:1")
        place.command("prompts", "withdraw", "gone:1", "--reason", "a hospital left")
        upload(page, PNG)
        assert "a hospital left" in refused(page)


def test_an_upload_has_a_progress_and_can_be_stopped(browser: Browser, base: str) -> None:
    with watched(browser, base, cut_off=1) as page:
        entered(page)
        held: list[Any] = []
        page.route("**/classify*", lambda route: held.append(route))
        upload(page, PNG)
        expect(page.locator("#progress")).to_be_visible()
        expect(page.locator("#status")).to_contain_text("Uploading picture.png")
        page.locator("#stop").click()
        expect(page.locator("#status")).to_have_text("Stopped.")
        expect(page.locator("#progress")).to_be_hidden()
        page.unroute("**/classify*")
        page.locator("#again").click()
        require_answer(page, base, PNG)
        assert len(held) == 1


def test_keys_are_asked_for_refused_and_kept_in_the_tab(
    browser: Browser, locked: str, keys: dict[str, str], place: Place, shots: Path
) -> None:
    with watched(browser, locked, refused=(401, 403, 429)) as page:
        page.goto("")
        expect(page.locator("#key-box")).to_be_visible()
        expect(page.locator("#columns")).to_be_hidden()
        expect(page.locator("#key")).to_be_focused()
        require_accessible(page)

        def give(secret: str) -> None:
            page.locator("#key").fill(secret)
            page.keyboard.press("Enter")

        give("sordino_wrong")
        assert "The key was refused" in refused(page, "#key-alert")
        page.screenshot(path=shots / "key-refused.png")
        give(keys["asker"])  # which holds, and may not list
        assert "lacks the scope “read”" in refused(page, "#page-alert")
        page.locator("#forget").click()
        give(keys["reader"])
        expect(page.locator("#card-body .figure")).to_be_visible()
        upload(page, PNG)
        assert "lacks the scope “classify”" in refused(page)
        page.locator("#forget").click()
        give(keys["kim"])
        expect(page.locator("#who-words")).to_have_text("kim · 2 pictures left today")
        for left in ("1 picture left", "0 pictures left"):
            upload(page, PNG)
            answered(page)
            expect(page.locator("#who-words")).to_contain_text(left)
        upload(page, PNG)
        told = refused(page)
        assert "Today’s budget is used" in told
        assert re.search(r"Try again in \d+ (h|minutes|seconds)", told)
        # The other page, and a reload, take it from the tab; it is in no address, and no other tab has it.
        page.get_by_role("link", name="Runs").click()
        expect(page.locator("#rows tr")).to_have_count(7)
        page.reload()
        expect(page.locator("#rows tr")).to_have_count(7)
        assert keys["kim"] not in page.url
        # A key that is revoked while the page is open is asked for anew.
        page.get_by_role("link", name="Prompts").click()
        expect(page.locator("#card-body .figure")).to_be_visible()
        place.command("keys", "revoke", "kim")
        upload(page, PNG)
        assert "The key was refused" in refused(page)
        expect(page.locator("#key")).to_be_focused()
        give(keys["reader"])
        expect(page.locator("#who-words")).to_contain_text("reader")
        other = page.context.new_page()
        other.goto(locked)
        expect(other.locator("#key-box")).to_be_visible()
        assert keys["kim"] not in str(page.context.storage_state())


def focused(page: Page) -> str:
    """What has the focus: its id, the number of its run, or its text."""
    name = "({ id, dataset, innerText }) => (id || dataset.run || innerText).trim()"
    return str(page.evaluate(f"({name})(document.activeElement)"))


def tab_to(page: Page, wanted: Callable[[str], bool], most: int = 60) -> list[str]:
    """Press Tab until something is focused; what was on the way, all of it in sight."""
    seen = []
    for _ in range(most):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        if wanted(seen[-1]):
            return seen
    raise AssertionError(f"not reached with Tab: {seen}")


def test_everything_can_be_done_with_the_keyboard_alone(browser: Browser, base: str) -> None:
    with watched(browser, base) as page:
        answers_choosers(page, PNG)
        entered(page, "shared:1")
        assert tab_to(page, lambda name: "Skip" in name) == ["Skip to the page"]
        page.keyboard.press("Enter")
        assert focused(page) == "main"
        tab_to(page, lambda name: name == "prompt")
        page.keyboard.press("ArrowUp")
        expect(page.locator("#card-body .title")).to_contain_text("digits")
        assert tab_to(page, lambda name: name == "file") == ["version", "file"]
        ring = page.locator("label[for=file]").evaluate("label => getComputedStyle(label).outlineStyle")
        assert ring == "solid"
        page.keyboard.press("Space")
        require_answer(page, base, PNG)
        tab_to(page, lambda name: name == "seven")
        page.keyboard.press("Enter")
        expect(page.locator("#status")).to_contain_text("Answer to sample “seven”", timeout=60_000)
        tab_to(page, lambda name: name == "Its classes")
        page.keyboard.press("Enter")
        expect(page.locator("#card-body details").first).to_have_attribute("open", "")
        page.goto("runs")
        expect(page.locator("#rows tr")).to_have_count(7)
        tab_to(page, lambda name: name == "Local")
        page.keyboard.press("Enter")
        expect(page.locator("th[aria-sort=descending]")).to_have_text("Local")
        assert focused(page) == "Local"
        number = tab_to(page, str.isdigit)[-1]
        page.keyboard.press("Space")
        expect(page.locator(f"[data-run='{number}']")).not_to_be_checked()
        expect(page.locator("#status")).to_contain_text("6 in the figures")
        assert focused(page) == number


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["wide", "phone"])
def test_both_pages_are_accessible_and_fit_the_window(
    size: str, scheme: str, browser: Browser, base: str, shots: Path
) -> None:
    with watched(browser, base, size, scheme) as page:
        entered(page)
        page.locator("#sample-list button").first.click()
        answered(page)
        page.locator("details summary").last.click()
        require_accessible(page)
        require_no_sideways_scrolling(page)
        page.screenshot(path=shots / f"prompt-{size}-{scheme}.png", full_page=True)
        page.goto("runs")
        expect(page.locator("#rows tr")).to_have_count(7)
        page.locator("#clients-more summary").click()
        require_accessible(page)
        require_no_sideways_scrolling(page)
        page.screenshot(path=shots / f"runs-{size}-{scheme}.png", full_page=True)
        colors = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", colors))) < 300) == (scheme == "dark")


def test_runs_are_compared_as_their_summaries_say(browser: Browser, base: str, place: Place) -> None:
    root = place.folder / "runs" / "demo"
    found = [Summary.from_json(path.read_bytes()) for path in root.rglob(FILE)]
    values = {(run.algorithm, run.privacy.epsilon): run.accuracy.local for run in found}
    with watched(browser, base) as page:
        page.goto("runs")
        rows = page.locator("#rows tr")
        expect(rows).to_have_count(len(found))
        page.get_by_role("button", name="Local").click()

        def shown() -> list[float]:  # without the deviation: runs of equal accuracy stay as they stood
            return [float(row.locator("td").nth(1).inner_text().partition("%")[0]) for row in rows.all()]

        assert shown() == [round(100 * value, 1) for value in sorted(values.values(), reverse=True)]
        page.get_by_role("button", name="Local").click()
        assert shown() == [round(100 * value, 1) for value in sorted(values.values())]

        # The chart: a mark for each run but zero-shot, which is a line; higher means more accurate, left more private.
        marks = page.locator("#chart .mark").evaluate_all(
            "marks => marks.map((mark) => [mark.querySelector('title').textContent, "
            "...mark.getAttribute('transform').match(/[0-9.]+/g).map(Number)])"
        )
        assert len(marks) == len(found) - 1
        placed = sorted((float(re.findall(r": ([\d.]+)%", title)[0]), -y) for title, _, y in marks)
        assert placed == sorted(placed, key=lambda mark: mark[1])
        private = sorted((float(re.findall(r"ε = ([\d.]+)", title)[0]), x) for title, x, _ in marks if "ε =" in title)
        assert [epsilon for epsilon, _ in private] == [1, 2, 8]
        assert private == sorted(private, key=lambda mark: mark[1])
        assert max(x for _, x in private) < min(x for title, x, _ in marks if "ε =" not in title)
        known = found[0].hand_written
        assert known is not None
        expect(page.locator("#chart .label")).to_have_text(f"zero-shot {100 * known.accuracy.local:.1f}%")

        # Clients: all of them in the figure and in the table.
        assert page.locator("#clients .mark").count() == sum(run.clients for run in found)
        page.locator("#clients-more summary").click()
        cells = page.locator("#clients-rows td").all_inner_texts()
        one = [f"{100 * client.local:.1f}%" for run in found for client in run.per_client]
        assert sorted(cells) == sorted(one)

        # Filters, and another measure.
        page.get_by_label("dp-fpl", exact=True).uncheck()
        expect(rows).to_have_count(3)
        assert page.locator("#chart .mark").count() == 2
        page.select_option("#measure", "neighbor")
        expect(page.locator("#measure-words")).to_contain_text("only other clients hold")
        titles = page.locator("#chart .mark title").all_text_contents()
        shared = next(run for run in found if run.algorithm == "promptfl")
        assert any(f"promptfl: {100 * shared.accuracy.neighbor:.1f}%" in title for title in titles)
        assert not list(place.folder.glob("runs/*.html"))


def test_the_icon_is_a_picture_that_the_browser_can_draw(browser: Browser, base: str) -> None:
    with watched(browser, base) as page:
        page.goto("")
        drawn = page.evaluate(
            "async () => { const icon = new Image(); icon.src = 'favicon.ico'; await icon.decode(); "
            "return icon.naturalWidth > 0; }"
        )
        assert drawn
        with Image.open(io.BytesIO(page.locator(".brand img").screenshot())) as picture:
            assert len(picture.convert("RGB").getcolors() or [0] * 9) > 2
