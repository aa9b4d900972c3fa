"""The page in a real browser (`make test-slow` installs Playwright; Chromium is the system's)."""

import re
import shutil
from collections.abc import Callable, Iterator

import pytest
from live_server import MOSES, Live

from foregate.serve.guard import Rules

pytestmark = pytest.mark.slow
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
if CHROMIUM is None:
    pytest.skip("no chromium on this machine: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable]:
    """open_page(live, **context): the page of a server; at the end there must have been no error in a script."""
    contexts, problems = [], []

    def make(live: Live, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(live.url)
        sync_api.expect(page.locator("#model")).to_have_text("demo")
        return page

    yield make
    for context in contexts:
        context.close()
    assert problems == []


def picture(page) -> str:
    return page.locator("#grid").evaluate("canvas => canvas.toDataURL()")


def test_a_message_streams_the_grid_changes_and_stop_works(open_page: Callable, start: Callable[..., Live]) -> None:
    live = start(max_running=1, max_waiting=0)
    page, expect = open_page(live), sync_api.expect
    before = picture(page)
    page.fill("#tokens", "900")
    page.fill("#message", MOSES)
    page.press("#message", "Enter")
    reply = page.locator(".turn.assistant")
    expect(reply).to_have_text(re.compile("Model.{20}", re.DOTALL))
    early = reply.inner_text()
    expect(page.locator("#log")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#resident")).to_have_text(re.compile(r"\d+ of 96"))
    expect(page.locator("#hit-rate")).to_have_text(re.compile(r"\d+ %"))
    assert picture(page) != before
    expect(reply).not_to_have_text(early)
    page.keyboard.press("Escape")
    expect(reply).to_contain_text("Stopped.")
    expect(page.locator("#send")).to_be_enabled()
    assert live.idle_within(5)
    page.fill("#tokens", "5")
    page.fill("#message", "And then?")  # the conversation goes on
    page.click("#send")
    expect(page.locator(".turn.assistant")).to_have_count(2)
    expect(page.locator("#stop")).to_be_disabled()


def test_errors_are_shown_as_errors_and_the_message_is_kept(open_page: Callable, start: Callable[..., Live]) -> None:
    page, expect = open_page(start()), sync_api.expect
    page.fill("#message", "word " * 3000)
    page.click("#send")
    alert = page.get_by_role("alert").filter(visible=True)
    expect(alert).to_contain_text("the context holds 1024")
    expect(page.locator("#message")).to_have_value(("word " * 3000).strip())
    expect(page.locator(".turn")).to_have_count(0)


def test_a_server_that_is_gone_is_said(open_page: Callable, start: Callable[..., Live]) -> None:
    live = start()
    page, expect = open_page(live), sync_api.expect
    page.route("**/v1/**", lambda route: route.abort())
    expect(page.locator("#grid-error")).to_contain_text("cannot be reached")
    page.fill("#message", "hello")
    page.click("#send")
    expect(page.locator("#log .error")).to_contain_text("cannot be reached")


def test_a_key_is_asked_for_and_used(browser, start: Callable[..., Live]) -> None:
    live, expect = start(rules=Rules(key="secret")), sync_api.expect
    page = browser.new_page()
    page.goto(live.url)
    page.fill("#message", "hello")
    page.fill("#tokens", "3")
    page.click("#send")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    page.click("#send")
    expect(page.locator("#stop")).to_be_disabled()
    expect(page.locator(".turn.assistant")).to_have_count(1)
    expect(page.locator("#model")).to_have_text("demo")
    page.close()


def test_by_keyboard_alone(open_page: Callable, start: Callable[..., Live]) -> None:
    page, expect = open_page(start()), sync_api.expect
    expect(page.locator("#message")).to_be_focused()
    reached = set()
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("() => document.activeElement.id"))
    assert {"temperature", "tokens", "clear", "send", "grid"} <= reached
    page.focus("#grid")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#cell")).to_have_text(re.compile(r"Layer 1, expert 1: .*in memory"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_fits_in_both_schemes(open_page: Callable, start: Callable[..., Live], scheme: str) -> None:
    page = open_page(start(), viewport={"width": 360, "height": 740}, color_scheme=scheme)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    lightness = page.evaluate("() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(lightness) > 384) == (scheme == "light")
    assert page.locator("#grid").bounding_box()["width"] <= 360


def test_all_five_states_can_be_told_apart(open_page: Callable, start: Callable[..., Live]) -> None:
    page = open_page(start())
    states = ["resident", "fetching", "predicted", "chosen", "missed"]
    layer = {"num_experts": 6, "top_k": 1, **{state: [i + 1] for i, state in enumerate(states)}}
    body = page.evaluate("async () => await (await fetch('/v1/experts')).json()") | {"layers": [layer]}
    page.route("**/v1/experts", lambda route: route.fulfill(json=body))
    page.wait_for_timeout(2000)
    page.focus("#grid")
    texts = []
    for _ in range(6):
        page.keyboard.press("ArrowRight")
        texts.append(page.locator("#cell").inner_text())
    wanted = ["not in memory", "in memory", "being fetched", "predicted", "chosen", "missed"]
    assert all(word in text for word, text in zip(wanted, texts, strict=True))
    page.locator("#grid").blur()
    cells = page.evaluate(
        """() => {
          const canvas = document.getElementById("grid"), side = canvas.height, left = canvas.width - 6 * side;
          const context = canvas.getContext("2d");
          return [0, 1, 2, 3, 4].map((i) => context.getImageData(left + i * side, 0, side, side).data.join());
        }"""
    )
    assert len(set(cells)) == 5
