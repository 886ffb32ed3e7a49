"""A real browser looks at the built site. Needs Chromium, playwright and the site of `nox -s docs`.

It leaves pictures of some pages in screenshots/: wide and narrow, light and dark.
"""

import os
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parents[1]
SITE = ROOT / "site"
PICTURES = ROOT / "screenshots"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
PAGES = sorted(
    path.parent.relative_to(SITE).as_posix().removeprefix(".") for path in SITE.rglob("index.html")
)
SHOWN = {"home": "", "idea": "idea", "results": "results", "api": "api/revcore"}
SIZES = {"wide": (1280, 900), "narrow": (390, 844)}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(SITE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail(f"none of {', '.join(BROWSERS)} is here: apt-get install chromium")
    # Chromium refuses to sandbox for root, as in containers.
    options = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, address):
    """Opens a page of the site, and sees that it is as quiet as it should be."""
    contexts, faults = [], []

    def open_(path, size="wide", scheme="light"):
        width, height = SIZES[size]
        view = {"width": width, "height": height}
        context = browser.new_context(viewport=view, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: m.type in {"error", "warning"} and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "request",
            lambda r: r.url.startswith((address, "data:", "blob:")) or faults.append(r.url),
        )
        page.on("response", lambda r: r.status < 400 or faults.append(f"{r.status} {r.url}"))
        page.goto(address + (f"{path}/" if path else ""))
        return page

    yield open_
    for context in contexts:
        context.close()
    assert not faults


@pytest.mark.parametrize("size", SIZES)
def test_pages_are_quiet_and_fit_and_render_their_formulas(open_page, address, size):
    page, formulas = open_page("", size), 0
    for path in PAGES:
        page.goto(f"{address}{path}")
        # What is still as it was written, or what KaTeX did not understand.
        page.wait_for_function("!document.querySelector('.arithmatex:not(:has(.katex))')")
        assert page.locator(".katex-error").count() == 0, path
        text = page.locator("article").inner_text()
        assert "$$" not in text, path
        assert "\\(" not in text, path
        formulas += page.locator(".arithmatex .katex").count()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= SIZES[size][0], path
    assert formulas > 50


def test_fonts_are_those_of_the_site(open_page):
    page = open_page("idea")
    loaded = page.evaluate(
        "document.fonts.ready.then(() => [...document.fonts].filter(f => f.status == 'loaded')"
        ".map(f => f.family.replaceAll('\"', '')))"
    )
    assert {"Inter", "JetBrains Mono", "KaTeX_Main", "KaTeX_Math"} <= set(loaded)


def test_search_finds_a_class(open_page):
    page = open_page("")
    page.locator(".md-search__input").press_sequentially("ReversibleSequential")
    results = page.locator(".md-search-result__link")
    results.first.wait_for(timeout=20_000)
    links = [link.get_attribute("href") for link in results.all()]
    assert any("api/revcore/" in link for link in links), links


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SHOWN)
def test_pictures(open_page, name, size, scheme):
    page = open_page(SHOWN[name], size, scheme)
    shown = page.evaluate("document.body.dataset.mdColorScheme")
    assert shown == {"light": "default", "dark": "slate"}[scheme]
    # Of the two pictures of a figure one is shown, and it is there.
    for picture in page.locator("article img").all():
        if picture.is_visible():
            picture.scroll_into_view_if_needed()
            assert scheme in picture.get_attribute("src")
            assert picture.evaluate("image => image.naturalWidth") > 0
    page.evaluate("window.scrollTo(0, 0)")
    PICTURES.mkdir(exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}-{size}-{scheme}.png", full_page=True)
