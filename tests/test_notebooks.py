"""What the stored notebooks hold: outputs of one clean run, and figures that can be read."""

import re
from typing import Any

import pytest

from tools.build import listed
from tools.pairs import Pair, all_pairs, output_texts, pair, read_notebook, stains, traces

CHAPTERS = [page for page in listed() if page.count("/") == 2]
NOTEBOOKS = [chapter for chapter in all_pairs() if chapter.notebook.is_file()]
each_notebook = pytest.mark.parametrize("chapter", NOTEBOOKS, ids=lambda chapter: chapter.name)


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


@each_notebook
def test_kernel(chapter: Pair) -> None:
    assert read_notebook(chapter).metadata["kernelspec"]["name"] == "python3"


@each_notebook
def test_executed_once_from_top_to_bottom(chapter: Pair) -> None:
    counts = [cell.execution_count for cell in code_cells(read_notebook(chapter))]
    assert counts == list(range(1, len(counts) + 1))


@each_notebook
def test_no_error_warning_or_trace_of_the_machine(chapter: Pair) -> None:
    assert stains(read_notebook(chapter)) == []


@each_notebook
def test_cell_ids_are_there_and_differ(chapter: Pair) -> None:
    ids = [cell.get("id") for cell in read_notebook(chapter).cells]
    assert all(ids)
    assert len(set(ids)) == len(ids)


@each_notebook
def test_figures_have_a_caption_and_a_text(chapter: Pair) -> None:
    names: list[str] = []
    for cell in code_cells(read_notebook(chapter)):
        pictures = [o for o in cell.outputs if "image/png" in o.get("data", {})]
        if not pictures:
            continue
        where = cell.source.splitlines()[0]
        assert len(pictures) == 1, f"one figure a cell: {where}"
        figure = cell.metadata.get("mystnb", {}).get("figure", {})
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        assert figure.get("name", "").startswith("fig-"), where
        assert figure.get("caption", "").rstrip().endswith((".", "?", "!")), where
        assert len(alt) >= 20, f"alt text: {where}"
        names.append(figure["name"])
    assert len(set(names)) == len(names)


@each_notebook
def test_library_cells_print_nothing(chapter: Pair) -> None:
    for cell in code_cells(read_notebook(chapter)):
        if "active-ipynb" not in cell.metadata.get("tags", []):
            assert not cell.outputs, cell.source.splitlines()[0]


@each_notebook
def test_exercises_are_numbered_and_answered(chapter: Pair) -> None:
    from transformer_annotated.exercises import CHECKS

    cells = code_cells(read_notebook(chapter))
    asked, right = set(), set()
    for cell in cells:
        for number in re.findall(r"^check\([\"']([\d.]+)[\"']", cell.source, flags=re.MULTILINE):
            assert number in CHECKS
            told = "".join(output_texts(cell))
            if "hide-cell" in cell.metadata.get("tags", []):
                assert f"Exercise {number}: right." in told
                right.add(number)
            else:
                assert f"Exercise {number}: no answer yet." in told
                asked.add(number)
    assert asked == right


def test_figure_names_differ_between_chapters() -> None:
    owners: dict[str, str] = {}
    for chapter in NOTEBOOKS:
        for cell in read_notebook(chapter).cells:
            name = cell.metadata.get("mystnb", {}).get("figure", {}).get("name")
            if name:
                assert name not in owners, f"{name}: {owners[name]} and {chapter.name}"
                owners[name] = chapter.name


def test_the_check_for_traces_can_fail() -> None:
    assert traces("/tmp/ipykernel_123/4.py:1: UserWarning: x")


@pytest.mark.parametrize(("number", "page"), list(enumerate(CHAPTERS, 1)))
def test_the_map_shows_where_the_chapter_stands(number: int, page: str) -> None:
    """The filled box and the caption have the number that `_toc.yml` gives the chapter."""
    chapter = pair(page)
    if not chapter.notebook.is_file():
        pytest.skip("not executed yet")
    (cell,) = [c for c in code_cells(read_notebook(chapter)) if "reading_map(" in c.source]
    assert f"figures.reading_map({number})" in cell.source
    caption = cell.metadata["mystnb"]["figure"]["caption"]
    assert re.match(rf"Chapter {number}(,[^:]*)? of Part ", caption), caption
