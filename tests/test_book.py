"""The built pages as files: all there, linked soundly, asking no other host for anything."""

import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tools import build as build_tool
from tools.build import fingerprint, listed, missing, pages

ROOT = Path(__file__).resolve().parent.parent
HTML = ROOT / "_build" / "html"


class Page(HTMLParser):
    """The ids, links, loaded files and pictures of one page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.without_alt: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in {"script", "img", "iframe", "source", "audio", "video"} and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in {"stylesheet", "preload", "icon", "shortcut icon"}:
            self.loads.append(given["href"])
        if tag == "img" and "alt" not in given:
            self.without_alt.append(given.get("src", ""))


@cache
def page_of(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def html() -> Path:
    stamp = ROOT / "_build" / "fingerprint"
    if not stamp.is_file():
        pytest.skip("there is no built book: make book")
    if stamp.read_text() != fingerprint():
        pytest.skip("the built book is older than its sources: make book")
    return HTML


@pytest.mark.built
def test_every_listed_page_was_built(html: Path) -> None:
    assert missing() == []
    assert (html / "index.html").is_file()
    assert (html / "search.html").is_file()


@pytest.mark.built
@pytest.mark.parametrize("page", listed())
def test_a_page_loads_nothing_from_another_host(html: Path, page: str) -> None:
    loads = page_of(html / f"{page}.html").loads
    assert [url for url in loads if urlsplit(url).netloc] == []


@pytest.mark.built
@pytest.mark.parametrize("page", listed())
def test_links_and_files_of_a_page_exist(html: Path, page: str) -> None:
    here = html / f"{page}.html"
    parsed = page_of(here)
    broken: list[str] = []
    for link in [*parsed.links, *parsed.loads]:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc or link in ("", "#"):
            continue
        target = (here.parent / unquote(parts.path)).resolve() if parts.path else here
        place = unquote(parts.fragment) if target.suffix == ".html" else ""
        if not target.is_file() or (place and place not in page_of(target).ids):
            broken.append(link)
    assert broken == []


@pytest.mark.built
@pytest.mark.parametrize("page", listed())
def test_a_page_is_complete(html: Path, page: str) -> None:
    text = (html / f"{page}.html").read_text(encoding="utf-8")
    assert re.search(r"<title>[^<]+</title>", text)
    assert re.search(r'<html[^>]* lang="en"', text)
    assert Page(text).without_alt == []
    assert "??" not in re.findall(r'class="std std-numref"[^>]*>([^<]*)', text)


@pytest.mark.built
def test_a_chapter_can_be_downloaded_and_opened_elsewhere(html: Path) -> None:
    for page in listed():
        if (ROOT / f"{page}.ipynb").is_file():
            text = (html / f"{page}.html").read_text(encoding="utf-8")
            assert (html / "_sources" / f"{page}.ipynb").is_file()
            assert "colab.research.google.com/github/" in text
            assert f"{page}.ipynb" in text


# The build itself ------------------------------------------------------------------------------

CONFIG = "title: A book\nonly_build_toc_files: true\nexecute: {execute_notebooks: 'off'}\n"
TOC = "format: jb-book\nroot: index\nchapters:\n  - file: one\n"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "_config.yml").write_text(CONFIG)
    (tmp_path / "_toc.yml").write_text(TOC)
    (tmp_path / "index.md").write_text("# Index\n\nText.\n")
    (tmp_path / "one.md").write_text("# One\n\nText.\n")
    return tmp_path


def test_a_good_build_is_not_repeated(
    tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert build_tool.build(tiny) == 0
    assert "Built 2 pages" in capfd.readouterr().out
    monkeypatch.setattr(build_tool.subprocess, "run", None)  # a second build would fail here
    assert build_tool.build(tiny) == 0
    assert "up to date: 2 pages" in capfd.readouterr().out


def test_a_missing_page_fails_the_build(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tiny / "one.md").unlink()
    assert build_tool.build(tiny) == 1
    assert "failed" in capfd.readouterr().out


def test_a_reference_to_nothing_fails_the_build(tiny: Path) -> None:
    (tiny / "one.md").write_text("# One\n\n{numref}`fig-nowhere`\n")
    assert build_tool.build(tiny) == 1
    assert not (tiny / "_build" / "fingerprint").exists()


def test_pages_that_were_not_made_are_named(tiny: Path) -> None:
    made = tiny / "_build" / "html"
    made.mkdir(parents=True)
    (made / "index.html").write_text("")
    assert missing(tiny) == ["one"]
    (made / "one.html").write_text("")
    assert missing(tiny) == []


def test_the_table_of_contents_is_read_in_order() -> None:
    toc = {
        "root": "a",
        "parts": [
            {"chapters": [{"file": "b", "sections": [{"file": "c.md"}]}]},
            {"chapters": [{"file": "d.ipynb"}]},
        ],
    }
    assert pages(toc) == ["a", "b", "c", "d"]
