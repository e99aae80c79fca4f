"""Bring the two forms of each chapter together: python tools/sync.py [CHAPTER ...]

Whichever side changed since both last agreed is copied to the other. Where both changed, nothing is
written: the difference is printed and the exit status is 1. Outputs are kept, so an edited cell
shows its old output until the chapter is executed again (tools/run.py).
"""

import argparse
import difflib
import sys
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.pairs import (
    KEY,
    Pair,
    all_pairs,
    pair,
    percent,
    read_notebook,
    same_age,
    sha256,
    with_text,
    write_notebook,
)


class Conflict(Exception):
    """Both sides changed since they last agreed."""


def sync(chapter: Pair) -> str:
    """Make both sides equal and say what was done.

    Raises:
        Conflict: both sides changed; the message holds the difference.
        FileNotFoundError: neither side exists.
    """
    if not chapter.notebook.exists():
        if not chapter.module.exists():
            raise FileNotFoundError(f"chapter={chapter.name!r}: no such notebook or module")
        _to_notebook(chapter, chapter.module.read_text(encoding="utf-8"), None)
        return "notebook created"
    notebook = read_notebook(chapter)
    text = percent(notebook, chapter.root)
    if not chapter.module.exists():
        return _to_module(chapter, text, "module created")
    source = chapter.module.read_text(encoding="utf-8")
    if source == text:
        if notebook.metadata.get(KEY, {}).get("synced_sha256") != sha256(text):
            _to_notebook(chapter, source, notebook)  # equal, but the note of it was old
        return "in sync"
    last = notebook.metadata.get(KEY, {}).get("synced_sha256")
    if last == sha256(text):
        _to_notebook(chapter, source, notebook)
        return "module -> notebook"
    if last == sha256(source):
        return _to_module(chapter, text, "notebook -> module")
    difference = difflib.unified_diff(
        text.splitlines(),
        source.splitlines(),
        str(chapter.notebook),
        str(chapter.module),
        n=2,
        lineterm="",
    )
    raise Conflict("\n".join(difference))


def _to_notebook(chapter: Pair, source: str, old: object) -> None:
    notebook = with_text(source, old, chapter.root)
    text = percent(notebook, chapter.root)
    if text != source:  # what a round trip changes: blank lines, the order of metadata
        chapter.module.write_text(text, encoding="utf-8")
    notebook.metadata.setdefault(KEY, {})["synced_sha256"] = sha256(text)
    write_notebook(chapter, notebook)
    same_age(chapter)


def _to_module(chapter: Pair, text: str, what: str) -> str:
    chapter.module.parent.mkdir(parents=True, exist_ok=True)
    chapter.module.write_text(text, encoding="utf-8")
    _to_notebook(chapter, text, read_notebook(chapter))
    return what


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("chapter", nargs="*", help="such as paper/attention; all if none")
    names = parser.parse_args(argv).chapter
    failed = 0
    for chapter in [pair(name) for name in names] or all_pairs():
        try:
            print(f"{chapter.name}: {sync(chapter)}")
        except Conflict as conflict:
            failed += 1
            print(f"{chapter.name}: both sides changed; nothing was written\n{conflict}")
            print("Keep one side: delete the other, or undo its change, and sync again.")
        except FileNotFoundError as error:
            failed += 1
            print(error)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
