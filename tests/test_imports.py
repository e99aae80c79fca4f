"""The reading order is the import order, and importing the package is cheap and harmless."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.build import listed
from tools.pairs import Pair, all_pairs, read_notebook
from transformer_annotated import _HOME

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "transformer_annotated"
NO_CHAPTERS = {f"{PACKAGE}.book", f"{PACKAGE}.figures", f"{PACKAGE}.exercises"}
PAIRS = [chapter for chapter in all_pairs() if chapter.module.is_file()]
ORDER = [
    page.replace("book/", f"{PACKAGE}/").replace("/", ".")
    for page in listed()
    if page.count("/") == 2
]
PARTS = {name.rpartition(".")[0] for name in ORDER}
each_pair = pytest.mark.parametrize("chapter", PAIRS, ids=lambda chapter: chapter.name)


def imported(source: str) -> Iterator[str]:
    """The modules of the package that a source imports, each as a dotted name."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            elif node.module == PACKAGE:
                for alias in node.names:  # a public name counts as the chapter that has it
                    yield f"{PACKAGE}.{_HOME.get(alias.name, alias.name)}"
            elif node.module in PARTS:  # from a part's folder, a chapter
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith(f"{PACKAGE}."):
                yield node.module


def misplaced(name: str, source: str, *, demo: bool = False) -> list[str]:
    """The imports of a chapter that are relative, or of a chapter that does not stand before it.

    A demo may import what its own chapter builds: Part III's pages open with their patch's diff.
    """
    earlier = ORDER[: ORDER.index(name) + demo]
    return [module for module in imported(source) if module not in {*earlier, *NO_CHAPTERS}]


def runnable(source: str) -> str:
    """A notebook cell without its magic lines."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    return "\n".join(lines)


@each_pair
def test_a_chapter_imports_only_earlier_chapters(chapter: Pair) -> None:
    assert misplaced(chapter.dotted, chapter.module.read_text(encoding="utf-8")) == []


@each_pair
def test_so_do_its_demo_cells(chapter: Pair) -> None:
    if not chapter.notebook.is_file():
        pytest.skip("not executed yet")
    for cell in read_notebook(chapter).cells:
        if cell.cell_type == "code":
            assert misplaced(chapter.dotted, runnable(cell.source), demo=True) == [], cell.source


@pytest.mark.parametrize(
    "source",
    [
        f"from {ORDER[-1]} import x",
        f"import {ORDER[-1]}",
        "from .parts import spec",
        f"from {PACKAGE} import Transformer",
    ],
)
def test_the_check_of_the_order_can_fail(source: str) -> None:
    assert misplaced(ORDER[1], source)


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def test_importing_loads_no_plotting_and_no_tokeniser() -> None:
    told = python(
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        f"import {PACKAGE}\n"
        f"for name in {[chapter.dotted for chapter in PAIRS]!r}: __import__(name)\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "print(json.dumps(sorted(new)))"
    )
    heavy = {"matplotlib", "spacy", "tqdm", "sacrebleu", "pandas", "IPython"}
    assert heavy & set(json.loads(told)) == set()


def test_importing_prints_nothing() -> None:
    assert python(f"import {PACKAGE}\nfor n in {ORDER[:4]!r}: __import__(n)") == ""


def test_importing_takes_little_longer_than_torch() -> None:
    """At most 0.3 s of processor time over importing torch: the best of five."""
    code = (
        "import time, torch\n"
        "start = time.process_time()\n"
        f"import {PACKAGE}\n"
        f"from {PACKAGE} import *\n"
        "print(time.process_time() - start)"
    )
    seconds: list[float] = []
    for _ in range(5):
        seconds.append(float(python(code)))
        if seconds[-1] <= 0.3:
            return
    pytest.fail(f"importing the package took {min(seconds):.2f} s over torch at best")


SOURCES = sorted([*(ROOT / PACKAGE).rglob("*.py"), *(ROOT / "tools").glob("*.py")])


PICKLES = {"pickle", "dill", "marshal", "shelve", "joblib"}


def dangerous(source: str) -> list[str]:
    """Calls and imports that run text or data as code."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            found += [n for n in names if n.split(".")[0] in PICKLES]
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in {"eval", "exec"}:
                found.append(node.func.id)
            for keyword in node.keywords:
                value = getattr(keyword.value, "value", None)
                if (keyword.arg, value) in {("shell", True), ("weights_only", False)}:
                    found.append(f"{keyword.arg}={value}")
            named = {keyword.arg for keyword in node.keywords}
            if getattr(node.func, "attr", "") == "extractall" and "filter" not in named:
                found.append("extractall without filter")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_data_as_code(path: Path) -> None:
    assert dangerous(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    ["eval('1')", "import pickle", "run('ls', shell=True)", "t.extractall()", "from dill import x"],
)
def test_the_check_of_dangerous_calls_can_fail(source: str) -> None:
    assert dangerous(source)
