"""Three repairs of the rendered book, none of which changes a word of it.

1. MathJax is copied from the package sphinx-mathjax-offline into the built site, so that no page
   asks another host for it. (Under _static it would be loaded twice: Jupyter Book adds every script
   there to every page.)
2. Scripts that two extensions add twice are added once. Without it each page reports
   "Identifier 'THEBE_JS_URL' has already been declared".
3. Docstrings are written for readers. A chapter's docstring is the Markdown of its first cell: the
   API page, whose docstrings are reStructuredText, leaves it out and links to the chapter.
"""

import re
import shutil
from importlib import import_module
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

_MATHJAX = ("tex-mml-chtml.js", "output/chtml/fonts/woff-v2")


def mathjax_folder() -> Path:
    """Where the package keeps MathJax."""
    package = distribution("sphinx-mathjax-offline")
    return Path(str(package.locate_file("sphinx-mathjax-offline/static/mathjax")))


def copy_mathjax(app: Any, error: Exception | None) -> None:
    """Put the one script and its fonts at the root of the site."""
    if error is not None or app.builder.format != "html":
        return
    target = Path(app.outdir) / "mathjax"
    for name in _MATHJAX:
        source = mathjax_folder() / name
        if source.is_dir():
            shutil.copytree(source, target / name, dirs_exist_ok=True)
        else:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    (target / "LICENSE").write_text(
        "MathJax 3, (c) The MathJax Consortium, Apache License 2.0: "
        "https://www.apache.org/licenses/LICENSE-2.0\n",
        encoding="utf-8",
    )


def without_duplicates(app: Any, page: str, template: str, context: Any, doctree: Any) -> None:
    """Keep the first of equal scripts."""
    seen: set[str] = set()
    kept = []
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body")
        key = body or str(getattr(script, "filename", script))
        if key not in seen:
            seen.add(key)
            kept.append(script)
    context["script_files"] = kept


def without_chapter_text(
    app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Leave a chapter's own docstring to the chapter, and an attribute's sentence as it is."""
    if what == "module" and name.count(".") == 2:
        lines.clear()
    elif what in ("attribute", "property", "data") and lines:
        lines[:0] = ["..", ""]  # else napoleon takes what stands before a colon for a type


def joined_names(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """``embedding, head: text`` names two things; Sphinx would read a type and a name."""
    for number, line in enumerate(lines):
        if match := re.match(r":(ivar|param) (\w+(?:, \w+)+):", line):
            names = match[2].replace(", ", ",\u200b")
            lines[number] = f":{match[1]} {names}:{line[match.end() :]}"


def setup(app: Any) -> dict[str, Any]:
    # autodoc_preserve_defaults rewrites the defaults of what it documents, which a chapter imported
    # later would read: so all are imported before.
    for chapter in sorted(Path(app.confdir, "transformer_annotated").glob("*/[a-z]*.py")):
        import_module(f"transformer_annotated.{chapter.parent.name}.{chapter.stem}")
    app.connect("html-page-context", without_duplicates, priority=900)
    app.connect("autodoc-process-docstring", without_chapter_text, priority=400)
    app.connect("autodoc-process-docstring", joined_names, priority=600)
    app.connect("build-finished", copy_mathjax)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
