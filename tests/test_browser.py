"""The built pages in a real browser: no error, no other host, math, search, small and dark."""

import json
import os
import re
import shutil
import threading
import tomllib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tools.build import fingerprint, listed
from tools.serve import server

pytestmark = pytest.mark.built

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"
SHOTS = os.environ.get("TRANSFORMER_ANNOTATED_SCREENSHOTS")  # a folder, to look at the pages
WIDE, NARROW = (1280, 900), (390, 844)
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-default-apps", "--disable-extensions", "--disable-dev-shm-usage",
    "--force-color-profile=srgb", "--hide-scrollbars",
    # Another host is not found, so that a page which needs one fails here as it would offline.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Browser:
    """One headless Chromium, and what a page did in it."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.axe = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")

    def look(self, size: tuple[int, int], scheme: str) -> None:
        """Set the size of the window in CSS pixels and the preferred colour scheme."""
        width, height = size
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, url: str) -> None:
        """Load a page and wait until its formulas are set."""
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.driver.get(url)
        self.driver.set_script_timeout(60)
        self.driver.execute_async_script(
            "const done = arguments[0];"
            "(window.MathJax?.startup?.promise ?? Promise.resolve()).then(() => done());"
        )

    def errors(self) -> list[str]:
        """The console's errors since the page was opened."""
        return [e["message"] for e in self.driver.get_log("browser") if e["level"] == "SEVERE"]

    def foreign_requests(self) -> list[str]:
        """The addresses on other hosts that the page asked for."""
        found: list[str] = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                parts = urlsplit(url)
                asks = parts.scheme in ("http", "https", "ws", "wss")
                if asks and parts.hostname != "127.0.0.1":
                    found.append(url)
        return found

    def ask(self, script: str) -> Any:
        return self.driver.execute_script(script)

    def violations(self) -> list[dict[str, str]]:
        """What axe-core finds: one entry for each element, with its rule, selector and HTML.

        The coloured words of all but the first code cells, and all but the first formulas, become
        plain text before: they are alike, and by the thousand they take axe-core half a minute.
        """
        self.driver.execute_script(FLATTEN)
        self.driver.execute_script(self.axe)
        results = self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            "axe.run(document, {resultTypes: ['violations']}).then(r => done(r.violations));"
        )
        return [
            {"rule": rule["id"], "selector": str(node["target"]), "html": node["html"]}
            for rule in results
            for node in rule["nodes"]
        ]

    def shot(self, name: str) -> None:
        if SHOTS:
            Path(SHOTS).mkdir(parents=True, exist_ok=True)
            self.driver.save_screenshot(str(Path(SHOTS) / f"{name}.png"))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        absent = "Chromium" if chromium is None else "chromedriver"
        pytest.skip(f"no {absent} found (Debian: apt install chromium chromium-driver)")
    selenium = pytest.importorskip("selenium.webdriver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = selenium.ChromeService(executable_path=chromedriver)
    driver = selenium.Chrome(options=options, service=service)
    yield Browser(driver)
    driver.quit()


def serve(folder: Path) -> Iterator[str]:
    web = server(folder)
    thread = threading.Thread(target=web.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{web.server_address[1]}"
    web.shutdown()
    web.server_close()
    thread.join()


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    stamp = ROOT / "_build" / "fingerprint"
    if not stamp.is_file() or stamp.read_text() != fingerprint():
        pytest.skip("the book is not built, or older than its sources: make book")
    yield from serve(HTML)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """An empty site, for pages that are wrong on purpose."""
    (tmp_path / "favicon.ico").write_bytes(b"")
    for address in serve(tmp_path):
        yield tmp_path, address


KNOWN = tomllib.loads((Path(__file__).parent / "axe_known.toml").read_text()).get("known", [])


def unknown(violations: list[dict[str, str]]) -> list[dict[str, str]]:
    """The violations that the list of the theme's own does not hold."""
    return [
        found
        for found in violations
        if not any(
            known["rule"] == found["rule"]
            and re.search(known["element"], f"{found['selector']} {found['html']}")
            for known in KNOWN
        )
    ]


# How far the page reaches beyond the window, in pixels; boxes that scroll by themselves are fine.
OVERHANG = (
    "return Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
    " - window.innerWidth"
)
UNSET_MATH = """
const plain = [...document.querySelectorAll('.math')]
    .filter(e => !e.querySelector('mjx-container'));
const errors = [...document.querySelectorAll('mjx-merror, [data-mjx-error]')];
return plain.concat(errors).map(e => e.textContent.trim().slice(0, 100));
"""
FLATTEN = """
for (const [selector, kept] of [['pre', 4], ['dt.sig', 8], ['mjx-container', 20]])
    for (const e of [...document.querySelectorAll(selector)].slice(kept))
        e.textContent = e.textContent;
const still = document.createElement('style');
still.textContent = '*, ::before, ::after { transition: none !important }';
document.head.append(still);
"""
RAW_TEX = r"""
const text = document.querySelector('article')?.innerText ?? '';
return (text.match(/\\[\[(].{0,60}/g) ?? []).filter(t => !t.includes('`'));
"""


@pytest.mark.parametrize("page", listed())
def test_a_page(browser: Browser, site: str, page: str) -> None:
    name = page.replace("/", "-")
    browser.look(WIDE, "light")
    browser.open(f"{site}/{page}.html")
    assert browser.errors() == []
    assert browser.foreign_requests() == []
    assert browser.ask(UNSET_MATH) == []
    assert browser.ask(RAW_TEX) == []
    assert browser.ask(OVERHANG) <= 0
    assert browser.ask("return document.documentElement.dataset.theme") == "light"
    browser.shot(f"{name}-light")
    light = unknown(browser.violations())
    browser.look(NARROW, "dark")
    browser.open(f"{site}/{page}.html")
    assert browser.errors() == []
    assert browser.ask("return window.innerWidth") == NARROW[0]
    assert browser.ask(OVERHANG) <= 0
    assert browser.ask("return document.documentElement.dataset.theme") == "dark"
    browser.shot(f"{name}-dark-390")
    assert (light, unknown(browser.violations())) == ([], [])


def test_the_site_opens_at_its_root(browser: Browser, site: str) -> None:
    browser.look(WIDE, "light")
    browser.open(f"{site}/")
    assert browser.driver.current_url == f"{site}/book/index.html"
    assert browser.errors() == []


def test_formulas_are_there_to_be_set(browser: Browser, site: str) -> None:
    browser.look(WIDE, "light")
    browser.open(f"{site}/book/notation.html")
    assert browser.ask("return document.querySelectorAll('mjx-container').length") >= 10


@pytest.mark.parametrize(
    ("word", "page"), [("seam", "book/notation"), ("softmax", "book/paper/attention")]
)
def test_the_search_finds_a_word_of_the_text(
    browser: Browser, site: str, word: str, page: str
) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    browser.look(WIDE, "light")
    browser.open(f"{site}/search.html?q={word}")
    links = "return [...document.querySelectorAll('#search-results li a')].map(a => a.href)"
    WebDriverWait(browser.driver, 20).until(
        lambda _: any(f"/{page}.html" in link for link in browser.ask(links))
    )
    assert browser.errors() == []
    assert browser.foreign_requests() == []


def test_a_folded_solution_opens(browser: Browser, site: str) -> None:
    browser.look(WIDE, "light")
    for page in listed():
        if "/paper/" not in page:
            continue
        browser.open(f"{site}/{page}.html")
        if browser.ask("return document.querySelectorAll('details.hide').length"):
            browser.ask("document.querySelector('details.hide summary').click()")
            assert browser.ask("return document.querySelector('details.hide').open")
            return
    pytest.skip("no chapter has a folded cell yet")


# What these checks are worth: each of them fails on a page made to fail it ------------------------


def test_an_error_and_another_host_are_noticed(browser: Browser, folder: tuple[Path, str]) -> None:
    path, address = folder
    page = "<!doctype html><title>x</title><script src='https://cdn.example.org/a.js'></script>"
    (path / "bad.html").write_text(page + "<script>throw new Error('planted')</script>")
    browser.open(f"{address}/bad.html")
    assert any("planted" in message for message in browser.errors())
    assert browser.foreign_requests() == ["https://cdn.example.org/a.js"]


def test_a_wide_page_and_unset_math_are_noticed(browser: Browser, folder: tuple[Path, str]) -> None:
    path, address = folder
    page = "<!doctype html><title>x</title><article><div style='width:600px'>wide</div>"
    (path / "bad.html").write_text(page + r"<span class='math'>\(x^2\)</span></article>")
    browser.look(NARROW, "light")
    browser.open(f"{address}/bad.html")
    assert browser.ask(OVERHANG) > 0
    assert browser.ask(UNSET_MATH) == [r"\(x^2\)"]
    assert browser.ask(RAW_TEX) == [r"\(x^2\)"]


def test_a_picture_without_text_is_noticed(browser: Browser, folder: tuple[Path, str]) -> None:
    path, address = folder
    (path / "bad.html").write_text("<!doctype html><title>x</title><img src='favicon.ico'>")
    browser.open(f"{address}/bad.html")
    assert "image-alt" in {found["rule"] for found in unknown(browser.violations())}
