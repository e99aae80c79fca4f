"""Build the book into _build/html: python tools/build.py [--force]

Warnings and unresolved references are errors, and so is a page that _toc.yml lists and the build
did not make. A build whose inputs did not change since the last good one is not repeated.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
_INPUTS = (
    "_config.yml", "_toc.yml", "book/**/*", "transformer_annotated/**/*.py", "tools/build.py",
)  # fmt: skip


def pages(toc: Any) -> list[str]:
    """The documents that a table of contents lists, in reading order, without their extension."""
    found: list[str] = []
    if isinstance(toc, dict):
        for key in ("root", "file"):
            if key in toc:
                found.append(str(toc[key]).removesuffix(".md").removesuffix(".ipynb"))
        for key in ("parts", "subtrees", "chapters", "sections", "entries"):
            found += pages(toc.get(key, []))
    elif isinstance(toc, list):
        for entry in toc:
            found += pages(entry)
    return found


def listed(root: Path = ROOT) -> list[str]:
    """The pages of the book in reading order."""
    return pages(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))


def missing(root: Path = ROOT) -> list[str]:
    """The pages that _toc.yml lists and _build/html does not hold."""
    html = root / "_build" / "html"
    return [page for page in listed(root) if not (html / f"{page}.html").is_file()]


def _files(root: Path) -> Iterator[Path]:
    for pattern in _INPUTS:
        for path in sorted(root.glob(pattern)):
            hidden = any(part.startswith(".") or part == "__pycache__" for part in path.parts[-3:])
            if path.is_file() and not hidden:
                yield path


def fingerprint(root: Path = ROOT) -> str:
    """One hash over all that the built pages depend on."""
    digest = hashlib.sha256()
    for name in ("jupyter-book", "sphinx-book-theme", "myst-nb"):
        digest.update(f"{name}=={version(name)}".encode())
    for path in _files(root):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def build(root: Path = ROOT, *, force: bool = False) -> int:
    """Build the book and return an exit status: 0 where every page is there and nothing warned."""
    output = root / "_build"
    stamp = output / "fingerprint"
    today = fingerprint(root)
    if not force and stamp.is_file() and stamp.read_text() == today and not missing(root):
        print(f"The book is up to date: {len(listed(root))} pages.")
        return _done(root)
    for old in ("html", ".doctrees", "fingerprint"):  # a deleted page must not live on
        path = output / old
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    command = [
        sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(root),
        "--path-output", str(root), "-W", "--keep-going", "-n", "--all", "-q",
    ]  # fmt: skip
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    status = subprocess.run(command, cwd=root, env=environment, check=False).returncode
    if status != 0:
        print(f"The build failed (exit status {status}); see the warnings above.")
        return 1
    if absent := missing(root):
        print(f"The build made fewer pages than _toc.yml lists. Missing: {', '.join(absent)}")
        return 1
    stamp.write_text(today)
    print(f"Built {len(listed(root))} pages.")
    return _done(root)


def _done(root: Path) -> int:
    print(f"Open {root / '_build' / 'html' / 'index.html'}")
    print("or run `make serve` and open http://127.0.0.1:8000/")
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--force", action="store_true", help="build even where nothing changed")
    return build(force=parser.parse_args(argv).force)


if __name__ == "__main__":
    raise SystemExit(main())
