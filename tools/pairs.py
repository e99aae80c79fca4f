"""The two forms of a chapter: book/PART/NAME.ipynb and transformer_annotated/PART/NAME.py.

Both hold one text. The notebook's metadata remembers two states of that text, as SHA-256 of its
py:percent form: ``synced_sha256``, the last one in which both sides agreed, and ``source_sha256``,
the one that produced the stored outputs.
"""

import hashlib
import os
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupytext.config import JupytextConfiguration, load_jupytext_config

ROOT = Path(__file__).resolve().parent.parent
KEY = "transformer_annotated"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PERCENT = "py:percent"


@dataclass(frozen=True)
class Pair:
    """A chapter's name, such as ``paper/attention``, and the root of the repository it is in."""

    name: str
    root: Path = ROOT

    @property
    def notebook(self) -> Path:
        return self.root / "book" / f"{self.name}.ipynb"

    @property
    def module(self) -> Path:
        return self.root / "transformer_annotated" / f"{self.name}.py"

    @property
    def dotted(self) -> str:
        return f"transformer_annotated.{self.name.replace('/', '.')}"


def pair(name: str | Path, root: Path = ROOT) -> Pair:
    """The pair that a user names: ``paper/x``, ``book/paper/x.ipynb`` or the module's path."""
    text = re.sub(r"\.(ipynb|py)$", "", str(name).replace(os.sep, "/"))
    text = text.removeprefix(root.as_posix() + "/").removeprefix("./")
    text = text.removeprefix("book/").removeprefix("transformer_annotated/")
    if not re.fullmatch(r"\w+/\w+", text):
        raise ValueError(f"chapter={str(name)!r}: expected a name such as paper/attention")
    return Pair(text, root)


def all_pairs(root: Path = ROOT) -> list[Pair]:
    """Every chapter that exists on either side, by name."""
    names = {p.relative_to(root / "book").with_suffix("") for p in root.glob("book/*/*.ipynb")}
    package = root / "transformer_annotated"
    for path in package.glob("*/*.py"):
        if not path.name.startswith("_") and (root / "book" / path.parent.name).is_dir():
            names.add(path.relative_to(package).with_suffix(""))
    return [Pair(name.as_posix(), root) for name in sorted(names)]


def config(root: Path = ROOT) -> JupytextConfiguration:
    return load_jupytext_config(str(root / "book" / "any.ipynb"))


def read_notebook(chapter: Pair) -> Any:
    return jupytext.read(chapter.notebook, config=config(chapter.root))


def percent(notebook: Any, root: Path = ROOT) -> str:
    """The notebook's text as the paired module has it."""
    return jupytext.writes(notebook, PERCENT, config=config(root))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_text(text: str, old: Any, root: Path = ROOT) -> Any:
    """The notebook that a module's text describes, with outputs and cell ids from the old one."""
    from jupytext.combine import combine_inputs_with_outputs

    new = jupytext.reads(text, PERCENT, config=config(root))
    if old is not None:
        new = combine_inputs_with_outputs(new, old, fmt={"extension": ".py"})
    metadata = dict(old.metadata) if old is not None else {}
    new.metadata = nbformat.from_dict(metadata)
    new.metadata.pop("jupytext", None)
    new.metadata["kernelspec"] = dict(KERNELSPEC)
    new.nbformat, new.nbformat_minor = 4, 5
    for cell in new.cells:
        if not cell.get("id"):
            cell["id"] = uuid.uuid4().hex[:8]
    # Written and read once, since a notebook file sorts the keys of the cells' metadata.
    return jupytext.reads(nbformat.writes(new, version=4), "ipynb", config=config(root))


def write_notebook(chapter: Pair, notebook: Any) -> None:
    """Write the notebook through a temporary file, so that a stopped run leaves the old one."""
    chapter.notebook.parent.mkdir(parents=True, exist_ok=True)
    text = nbformat.writes(notebook, version=4)
    temporary = chapter.notebook.with_suffix(".ipynb.tmp")
    temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
    temporary.replace(chapter.notebook)


def same_age(chapter: Pair, seconds: float | None = None) -> None:
    """Give the notebook the module's time: jupytext goes by time, and a tie keeps the module."""
    when = chapter.module.stat().st_mtime if seconds is None else seconds
    os.utime(chapter.notebook, (when, when))


# What a stored output may not contain: whoever ran the notebook is not part of the book.
_TRACES = {
    "a warning": re.compile(r"\w*Warning\b"),
    "a temporary kernel path": re.compile(r"ipykernel_\d+"),
    "a home directory": re.compile(r"(?<![\w.])(/home/\w+|/Users/\w+|/root/|[A-Z]:\\Users\\)"),
    "a temporary path": re.compile(r"(?<![\w.])(/tmp/|/var/folders/)\w"),
    "an installation path": re.compile(r"site-packages[/\\]"),
}
_ORDINARY = {"root", "user", "admin", "runner", "jovyan", "ubuntu", "debian", "vscode", "me"}


def traces(text: str, root: Path = ROOT) -> list[str]:
    """What of the machine, or of a warning, is in an output's text; empty where all is well."""
    found = [what for what, pattern in _TRACES.items() if pattern.search(text)]
    for what, path in (("the repository's path", root), ("the home directory", Path.home())):
        if len(path.parts) > 1 and re.search(rf"{re.escape(str(path))}(?![\w])", text):
            found.append(what)
    user = os.environ.get("USER") or os.environ.get("USERNAME") or ""
    telling = len(user) > 2 and user.lower() not in _ORDINARY
    if telling and re.search(rf"\b{re.escape(user)}\b", text):
        found.append("the user's name")
    return found


def output_texts(cell: Any) -> list[str]:
    """Every piece of text among a cell's outputs; pictures in base64 are left out."""
    texts: list[str] = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(output.text)
        elif output.output_type == "error":
            texts.append("\n".join([output.ename, output.evalue, *output.traceback]))
        else:
            for mime, data in output.get("data", {}).items():
                if not mime.startswith("image/") or mime == "image/svg+xml":
                    texts.append(data if isinstance(data, str) else str(data))
    return texts


def stains(notebook: Any, root: Path = ROOT) -> list[str]:
    """Stored errors, warnings and machine traces in a notebook: a line for each, with its cell."""
    found: list[str] = []
    for number, cell in enumerate(notebook.cells):
        where = f"cell {number} ({cell.source.strip().splitlines()[0][:60] if cell.source else ''})"
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                found.append(f"{where}: stored error {output.ename}: {output.evalue}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"{where}: output on stderr: {output.text.strip()[:120]!r}")
        for text in output_texts(cell):
            found += [f"{where}: {what} in {text.strip()[:160]!r}" for what in traces(text, root)]
    return found
