"""Write book/mutants.md, the table of planted mistakes: python -m tools.mutant_page"""

from pathlib import Path

from tests.mutants import MUTANTS

PAGE = Path(__file__).resolve().parent.parent / "book" / "mutants.md"

INTRODUCTION = """\
<!-- Written by tools/mutant_page.py from tests/mutants.py and its two companions. -->
# Mutants

A test that never fails proves nothing. So we also test the tests. Below are {n} mistakes that are
easy to make in a Transformer and hard to see, because most of them still train. Each is planted
in the code by itself, and the test in its row must then fail. A mistake that no test notices
would fail `make test`.

A mistake is planted while the tests run: one piece of a function's text is replaced, the function
is compiled again, and its code is exchanged until the test has failed. No file changes. The test
must pass before and fail by an assertion meanwhile (a crash does not count), and afterwards the
function has its own code again. To add a mistake, add a row to `tests/mutants.py` (Part I),
`tests/mutants_training.py` or `tests/mutants_modern.py` and run `python -m tools.mutant_page`.

| Mistake | Where | Noticed by |
| --- | --- | --- |
"""


def render() -> str:
    """The whole page."""
    rows = []
    for mutant in MUTANTS:
        module, name = mutant.target.split(":")
        where = f"`{module}.{name}`"
        rows.append(f"| {mutant.mistake} | {where} | `{mutant.killed_by}` |\n")
    return INTRODUCTION.format(n=len(MUTANTS)) + "".join(rows)


def main() -> None:
    PAGE.write_text(render(), encoding="utf-8")


if __name__ == "__main__":
    main()
