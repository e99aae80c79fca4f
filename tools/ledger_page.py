"""Write book/ledger.md from book/ledger.toml: python tools/ledger_page.py [--check]

The page says, statement by statement, what the paper has, where the book does it, what proves it,
and whether the two agree. tests/test_ledger.py fails where the page is older than the data.
"""

import argparse
import importlib
import inspect
import math
import tomllib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "book" / "ledger.toml"
PAGE = ROOT / "book" / "ledger.md"
VERDICTS = {
    "paper": "As the paper",
    "tensor2tensor": "As tensor2tensor",
    "changed": "Changed",
    "ready": "Ready, not run",
    "later": "Later",
}
MEANINGS = {
    "paper": "The code does what the paper says.",
    "tensor2tensor": "The paper is silent, and the code follows the authors' own "
    "library {cite:p}`vaswani2018tensor2tensor`.",
    "changed": "The code does something else. The entry says what, and why.",
    "ready": "The code is here and tested. Nobody has run it here at the paper's size, so no "
    "result is claimed. [](training/reproduction.ipynb) predicts what a run would cost.",
    "later": "Not built yet.",
}
INTRODUCTION = """\
<!-- Written by tools/ledger_page.py from book/ledger.toml: edit that file. -->
# The fidelity ledger

A book that says "as in the paper" should let you check it.
This page goes through {{cite:t}}`vaswani2017attention` statement by statement: sections 3, 5, 6.1
and 6.2 in full, and what this book uses of section 4. Section 6.3, on parsing, is left out: its
treebank is not free.
Each entry gives the statement in our words, a verdict, the code, and the test that proves it.

{verdicts}

The page is written from a data file. `tests/test_ledger.py` imports every name under *Code*, looks
up every test under *Test*, and fails where one is missing or where this page is out of date.
A test proves what it tests: that the code computes the statement. No test here says that the
paper's results have been reached. For those, see the scores in {scores}.
"""
SIZES = """\
## The sizes in table 3

The paper gives the number of parameters of each model in millions.
*Ours* is the count of our model at V = 37,000, the vocabulary that section 5.1 states.
*V* is the range of vocabularies that would give the paper's number, rounded as it is.

{table}

Rows of table 3 that change nothing but dropout, smoothing or the number of heads have the base
model's size. Rows B change $d_k$ alone, so they are counted by formula and cannot be built.

Any vocabulary from {low:,} to {high:,} gives the paper's number in all {n} rows above the last.
None of those gives the big model its 213 million, and 37,000 gives no row at all.
So the paper's counts cannot be reproduced exactly from its text.
The counts of this book can: {base:,} for the base model and {big:,} for the big one.
"""


@dataclass(frozen=True)
class Entry:
    """One statement of the paper."""

    id: str
    section: str
    says: str
    verdict: str
    code: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Ledger:
    """The sections in order, number to title, and all entries."""

    sections: dict[str, str]
    entries: tuple[Entry, ...]


def load(path: Path = DATA) -> Ledger:
    """Read and check the data file. Raises ValueError for an entry that breaks a rule."""
    return parse(tomllib.loads(path.read_text(encoding="utf-8")))


def parse(data: dict[str, Any]) -> Ledger:
    """The ledger in `data`. Raises ValueError, naming the entry, for one that breaks a rule."""
    sections = {s["number"]: s["title"] for s in data["section"]}
    entries = []
    for raw in data["entry"]:
        name = raw.get("id", "an entry without id")
        unknown = raw.keys() - Entry.__dataclass_fields__.keys()
        missing = {"id", "section", "says", "verdict"} - raw.keys()
        if unknown or missing:
            raise ValueError(f"{name}: unknown keys {sorted(unknown)}, missing {sorted(missing)}")
        lists = {key: tuple(raw.get(key, ())) for key in ("code", "tests")}
        entries.append(Entry(**{**raw, **lists}))
        check(entries[-1], sections)
    repeated = [name for name, n in Counter(e.id for e in entries).items() if n > 1]
    if repeated:
        raise ValueError(f"ids used twice: {repeated}")
    return Ledger(sections, tuple(entries))


def check(entry: Entry, sections: dict[str, str]) -> None:
    """Raise ValueError for an entry that breaks a rule of the ledger."""
    if entry.section not in sections:
        raise ValueError(f"{entry.id}: section {entry.section!r} is none of {list(sections)}")
    if entry.verdict not in VERDICTS:
        raise ValueError(f"{entry.id}: verdict {entry.verdict!r} is none of {list(VERDICTS)}")
    if entry.verdict != "later" and not (entry.code and entry.tests):
        raise ValueError(f"{entry.id}: only a later entry may lack code and tests")
    if entry.verdict != "paper" and not entry.note:
        raise ValueError(f"{entry.id}: a {entry.verdict} entry needs a note")


def find(code: str) -> Any:
    """The object that `module:qualname` names. Raises ValueError where there is none."""
    module, _, qualname = code.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in qualname.split("."):
            # a dataclass field without a plain default is no attribute of its class
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[name] if name in fields else getattr(found, name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {code}: {error}") from error
    return found


def link(code: str) -> str:
    """A link to the API page, where `code` stands there; else its name."""
    module, _, qualname = code.partition(":")
    if not module.startswith("transformer_annotated."):
        return f"`{qualname}`"
    found, (owner, _, name) = find(code), qualname.rpartition(".")
    target = f"{module}.{qualname}"
    documented = inspect.isclass(found) or inspect.isfunction(found) or isinstance(found, property)
    if not documented and owner:  # a field: its class is documented
        target, documented = f"{module}.{owner}", True
    elif name.startswith("_") or not found.__doc__:
        documented = False
    return f"{{py:obj}}`{qualname} <{target}>`" if documented else f"`{qualname}`"


def show_test(test: str) -> str:
    """The file of a test and its name, which may be broken on a narrow screen."""
    path, _, name = test.partition("::")
    return f"`{path}` [{name}]{{.text-break}}"


def block(entry: Entry) -> str:
    """One entry as an item of a definition list."""
    lines = [f"**{VERDICTS[entry.verdict]}.** {entry.note}".rstrip()]
    if entry.code:
        lines.append("Code: " + ", ".join(map(link, entry.code)))
    lines += [f"Test: {show_test(test)}" for test in entry.tests]
    return f"{entry.says}\n: " + "\\\n  ".join(lines)


def verdicts(ledger: Ledger) -> str:
    """What each verdict means, and how many entries have it."""
    n = Counter(entry.verdict for entry in ledger.entries)
    items = [f"{VERDICTS[v]} ({n[v]} entries)\n: {MEANINGS[v]}" for v in VERDICTS]
    return "\n\n".join(items)


def training_flops(hours: float, gpus: int = 8, tflops: float = 9.5) -> float:
    """Floating-point operations by the paper's estimate: section 6.1 and footnote 5."""
    return hours * 3600 * gpus * tflops * 1e12


# name, what the row changes in the base model, millions of parameters: table 3 of the paper
TABLE_3: tuple[tuple[str, dict[str, int], int], ...] = (
    ("base", {}, 65),
    ("B", {"d_k": 16}, 58),
    ("B", {"d_k": 32}, 60),
    ("C", {"N": 2}, 36),
    ("C", {"N": 4}, 50),
    ("C", {"N": 8}, 80),
    ("C", {"D": 256, "d_k": 32, "d_v": 32}, 28),
    ("C", {"D": 1024, "d_k": 128, "d_v": 128}, 168),
    ("C", {"F": 1024}, 53),
    ("C", {"F": 4096}, 90),
    ("big", {"D": 1024, "F": 4096, "h": 16}, 213),
)


def n_parameters(
    V: int = 37_000, N: int = 6, D: int = 512, F: int = 2048, h: int = 8, d_k: int = 64,
    d_v: int = 64,
) -> int:  # fmt: skip
    """The parameters of the 2017 model, one shared matrix and attention biases, by formula."""
    attention = 2 * (D * h * d_k + h * d_k) + (D * h * d_v + h * d_v) + (h * d_v * D + D)
    feed_forward = (D * F + F) + (F * D + D)
    norm = 2 * D
    encoder = attention + feed_forward + 2 * norm
    decoder = 2 * attention + feed_forward + 3 * norm
    return V * D + N * (encoder + decoder)


def vocabularies(change: dict[str, int], millions: int) -> tuple[int, int]:
    """The smallest and the largest V for which the model has that many million parameters."""
    D, rest = change.get("D", 512), n_parameters(V=0, **change)
    low = math.ceil((millions * 1_000_000 - 500_000 - rest) / D)
    high = math.ceil((millions * 1_000_000 + 500_000 - rest) / D) - 1
    return low, high


def sizes() -> str:
    """The section on the parameter counts of table 3."""
    rows = ["| Row | Paper | Ours | V |", "|---|---:|---:|---|"]
    for name, change, millions in TABLE_3:
        if name != "big":
            name = ", ".join([name, *(f"{k} = {v}" for k, v in change.items())])
        low, high = vocabularies(change, millions)
        rows.append(f"| {name} | {millions} | {n_parameters(**change):,} | {low:,} to {high:,} |")
    ranges = [vocabularies(change, m) for name, change, m in TABLE_3 if name != "big"]
    return SIZES.format(
        table="\n".join(rows),
        n=len(ranges),
        low=max(low for low, _ in ranges),
        high=min(high for _, high in ranges),
        base=n_parameters(),
        big=n_parameters(**TABLE_3[-1][1]),
    )


def page(ledger: Ledger) -> str:
    """The whole page."""
    scores = "[](paper/multi30k.ipynb) and [](training/reproduction.ipynb)"
    parts = [INTRODUCTION.format(verdicts=verdicts(ledger), scores=scores).rstrip()]
    for number, title in ledger.sections.items():
        heading = title if number == "open" else f"{number} {title}"
        entries = [block(e) for e in ledger.entries if e.section == number]
        parts += [f"## {heading}", *entries]
    parts.append(sizes().rstrip())
    return "\n\n".join(parts) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    text = page(load())
    if parser.parse_args(argv).check:
        fresh = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text
        print("up to date" if fresh else "book/ledger.md is older than book/ledger.toml")
        return 0 if fresh else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
