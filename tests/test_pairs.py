"""Each chapter is one text in two forms, and the tools that keep it so."""

import importlib
import os
import shutil
from pathlib import Path

import pytest

from tools import run as run_tool
from tools import sync as sync_tool
from tools.build import listed
from tools.pairs import KEY, Pair, all_pairs, pair, percent, read_notebook, sha256, stains, traces

PAIRS = all_pairs()
each_pair = pytest.mark.parametrize("chapter", PAIRS, ids=lambda chapter: chapter.name)


@each_pair
def test_both_sides_exist(chapter: Pair) -> None:
    assert chapter.notebook.is_file(), f"make run CHAPTER={chapter.name}"
    assert chapter.module.is_file(), "make sync"


@each_pair
def test_both_sides_hold_one_text(chapter: Pair) -> None:
    text = percent(read_notebook(chapter))
    assert text == chapter.module.read_text(encoding="utf-8"), "make sync, then make run"


@each_pair
def test_stored_outputs_come_from_this_text(chapter: Pair) -> None:
    notebook = read_notebook(chapter)
    note = notebook.metadata.get(KEY, {})
    now = sha256(percent(notebook))
    assert note.get("source_sha256") == now, f"make run CHAPTER={chapter.name}"
    assert note["scale"] == "full"
    assert note["machine"]
    assert note["seconds"] > 0
    assert note["versions"]["torch"].startswith("2.13.0")


@each_pair
def test_the_first_cell_is_the_docstring(chapter: Pair) -> None:
    doc = importlib.import_module(chapter.dotted).__doc__
    assert doc is not None
    title, _, summary = doc.strip().partition("\n")
    assert title.startswith("# "), "the first line is the title"
    assert summary.strip(), "a plain-text summary follows"
    assert not summary.strip().startswith(("$", "#", "|", "```")), "the summary is plain text"


@each_pair
def test_every_page_is_listed(chapter: Pair) -> None:
    assert f"book/{chapter.name}" in listed()


# The tools, on a small chapter in a folder of its own -----------------------------------------

TEXT = '''# %% [markdown]
r"""
# A title

What it is about.
"""

# %%
import math


# %%
def half(x: float) -> float:
    """Half of it."""
    return x / 2


# %% tags=["active-ipynb"]
# print(half(math.pi) > 1)
'''


@pytest.fixture
def small(tmp_path: Path) -> Pair:
    root = Path(__file__).resolve().parent.parent
    shutil.copy(root / "pyproject.toml", tmp_path)
    chapter = Pair("paper/small", tmp_path)
    chapter.module.parent.mkdir(parents=True)
    chapter.module.write_text(TEXT)
    return chapter


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_sync_copies_the_side_that_changed(small: Pair) -> None:
    assert sync_tool.sync(small) == "notebook created"
    assert small.module.read_text() == TEXT
    assert sync_tool.sync(small) == "in sync"
    edit(small.module, "Half of it", "One half")
    os.utime(small.notebook)  # the file time misleads: it is the notebook that looks newer
    assert sync_tool.sync(small) == "module -> notebook"
    assert "One half" in small.notebook.read_text()
    edit(small.notebook, "One half", "The half")
    os.utime(small.module)
    assert sync_tool.sync(small) == "notebook -> module"
    assert "The half" in small.module.read_text()


def test_sync_refuses_when_both_sides_changed(small: Pair) -> None:
    sync_tool.sync(small)
    edit(small.module, "Half of it", "One half")
    edit(small.notebook, "Half of it", "The half")
    with pytest.raises(sync_tool.Conflict, match="One half"):
        sync_tool.sync(small)
    assert "One half" in small.module.read_text()
    assert "The half" in small.notebook.read_text()


def test_sync_keeps_outputs_and_cell_ids(small: Pair) -> None:
    run_tool.run(small, timeout=60)
    before = read_notebook(small)
    edit(small.module, "What it is about.", "What it is all about.")
    sync_tool.sync(small)
    after = read_notebook(small)
    assert after.cells[-1].outputs[0].text == "True\n"
    assert [cell.id for cell in after.cells][1:] == [cell.id for cell in before.cells][1:]
    assert after.metadata[KEY]["source_sha256"] != sha256(percent(after, small.root))


def test_run_records_what_it_ran(small: Pair) -> None:
    seconds = run_tool.run(small, timeout=60)
    notebook = read_notebook(small)
    note = notebook.metadata[KEY]
    assert note["source_sha256"] == note["synced_sha256"] == sha256(TEXT)
    assert note["seconds"] == pytest.approx(seconds, abs=0.1)
    assert percent(notebook, small.root) == small.module.read_text() == TEXT
    assert "execution" not in notebook.cells[-1].metadata


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("1 / 0", "ZeroDivisionError"),
        ("import warnings; warnings.warn('careful')", "warning"),
        ("import pathlib; print(pathlib.Path.cwd())", "path"),
        ("import sys; print('hello', file=sys.stderr)", "stderr"),
    ],
)
def test_run_refuses_what_may_not_be_stored(small: Pair, line: str, reason: str) -> None:
    edit(small.module, "# print(half(math.pi) > 1)", f"# {line}")
    with pytest.raises(run_tool.Refused, match=reason):
        run_tool.run(small, timeout=60)
    assert not stains(read_notebook(small), small.root), "nothing of it was written"


def test_names_of_chapters() -> None:
    for name in ("paper/x", "book/paper/x.ipynb", "transformer_annotated/paper/x.py"):
        assert pair(name).name == "paper/x"
    with pytest.raises(ValueError, match=r"chapter='\.\./x'"):
        pair("../x")


def test_traces_of_a_machine_are_found() -> None:
    assert traces("in /home/ada/book") == ["a home directory"]
    assert traces("UserWarning: mind") == ["a warning"]
    assert traces("loss 0.25 after 3 s, /s per token, the root of 2") == []
