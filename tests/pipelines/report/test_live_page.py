"""`glad view` in a browser: marking moves on, undo, notes, Reset, the table, and what a phone shows first."""

import csv
import io
import socket
from pathlib import Path
from threading import Thread

import pytest
import uvicorn
from judged_run import make_judged_run
from rich.console import Console

from pipelines.report.page import report
from pipelines.report.server import make_app
from pipelines.runs import feedback

CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no browser at {CHROMIUM}: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory, tiny_bundle):
    return make_judged_run(tmp_path_factory.mktemp("live"), tiny_bundle)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def address(judged):
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(make_app(judged.run), log_level="warning"))
    serving = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    serving.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    serving.join(10)


def test_marking_moves_on_and_undo_comes_back(browser, address, judged) -> None:
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": 1440, "height": 1000})
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_selector(".card")
    page.select_option("[name=verdict]", "anomalous")
    page.wait_for_selector("#reviewed:has-text('0 of 24 reviewed')")
    page.locator(".card").first.click()
    first = page.inner_text("#detail .path")
    page.fill("[name=note]", "scratch, cf. line 4")
    page.keyboard.press("Enter")
    page.keyboard.press("c")
    page.wait_for_selector("#reviewed:has-text('1 of 24 reviewed')")
    assert page.inner_text("#detail .path") != first
    assert page.input_value("[name=note]") == ""
    page.keyboard.press("f")
    page.wait_for_selector("#reviewed:has-text('2 of 24 reviewed')")
    page.keyboard.press("u")
    page.wait_for_selector("#reviewed:has-text('1 of 24 reviewed')")
    (kept,) = feedback.read_marks(judged.run)
    assert (kept["uri"], kept["verdict"], kept["note"]) == (first, "confirmed", "scratch, cf. line 4")
    page.keyboard.press("u")
    page.wait_for_selector("#reviewed:has-text('0 of 24 reviewed')")
    assert page.inner_text("#detail .path") == first
    page.keyboard.press("Escape")
    with page.expect_download() as download:
        page.click("#download")
    assert len(Path(download.value.path()).read_text().splitlines()) == 25
    page.close()
    assert complaints == []


def test_contours_return_with_reset(browser, address) -> None:
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector(".card")
    shown = "getComputedStyle(document.querySelector('.card .over')).display"
    page.uncheck("#contour")
    assert page.evaluate(shown) == "none"
    page.click("button[type=reset]")
    page.wait_for_selector("body:not(.no-contour)")
    assert page.is_checked("#contour")
    assert page.evaluate(shown) != "none"
    page.close()


def test_a_phone_shows_the_first_card_and_keeps_the_buttons_in_reach(browser, address) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(address)
    page.wait_for_selector(".card")
    box = page.locator(".card").first.bounding_box()
    assert box["y"] + 200 < 844
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert not page.is_visible("#scores")
    page.locator(".card").first.click()
    for name in ("confirmed", "false_alarm"):
        button = page.locator(f"[data-mark={name}]").bounding_box()
        assert 0 < button["y"] < 844 - button["height"]
        assert button["height"] >= 44
    page.close()


def test_the_report_downloads_what_its_filter_shows(browser, judged, tmp_path) -> None:
    report(judged.run.location, str(tmp_path / "report.html"), Console(quiet=True))
    page = browser.new_page()
    page.goto((tmp_path / "report.html").as_uri())
    page.wait_for_selector(".card")
    assert page.is_hidden("#no-reconstructions")
    page.fill("[name=text]", "hacked")
    page.wait_for_selector("#count:has-text('1 of 60')")
    with page.expect_download() as download:
        page.click("#download")
    text = Path(download.value.path()).read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")
    (row,) = csv.DictReader(io.StringIO(text.decode("utf-8-sig")))
    assert row["uri"].endswith("<img src=x onerror=hacked=1><script>&.png")
    assert page.evaluate("table([{uri: 'x/=1', category: '=cmd', decided: true, steps: []}])").count("'=") == 1
    page.click("#help-button")
    assert "what the model says, not what is true" in page.inner_text("#help")
    page.close()
