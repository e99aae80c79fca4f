"""Execute chapters and store their outputs: python tools/run.py CHAPTER ...

Each chapter is synced, run from top to bottom in a fresh kernel, and written only when no cell
failed and no output holds a warning or a trace of this machine. The notebook then remembers which
text was executed, where, at which scale and for how long.
"""

import argparse
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

from tools.pairs import (
    KERNELSPEC,
    KEY,
    Pair,
    pair,
    percent,
    read_notebook,
    same_age,
    sha256,
    stains,
    write_notebook,
)
from tools.sync import Conflict, sync

_VERSIONS = ("torch", "numpy", "matplotlib", "spacy", "sacrebleu")


class Refused(Exception):
    """The chapter ran, or tried to, and its outputs were not written."""


def execute(notebook: Any, root: Path, timeout: int) -> Any:
    """A copy of the notebook with the outputs of a fresh kernel, started in ``root``."""
    fresh = nbformat.from_dict(notebook)
    for cell in fresh.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONHASHSEED": "0"}
    environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        settings = Config()
        if os.name == "posix":  # nothing listens on the network; the sockets lie in the folder
            settings.KernelManager.transport = "ipc"
            settings.KernelManager.ip = str(Path(folder) / "kernel")
        client = NotebookClient(
            fresh, config=settings, timeout=timeout, kernel_name=KERNELSPEC["name"],
            resources={"metadata": {"path": str(root)}}, record_timing=False, coalesce_streams=True,
        )  # fmt: skip
        client.execute(env=environment)
    return fresh


def tidy(notebook: Any) -> None:
    """Leave out what an editor or a clock put there, so that a re-run changes what changed."""
    for cell in notebook.cells:
        for key in ("execution", "ExecuteTime", "collapsed", "scrolled", "trusted"):
            cell.metadata.pop(key, None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["kernelspec"] = dict(KERNELSPEC)
    notebook.metadata["language_info"] = {
        "file_extension": ".py",
        "mimetype": "text/x-python",
        "name": "python",
        "pygments_lexer": "ipython3",
    }


def record(text: str, seconds: float) -> dict[str, Any]:
    """What a notebook remembers of its execution."""
    from transformer_annotated.book import machine, scale

    versions = {"python": platform.python_version()}
    for name in _VERSIONS:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "machine": machine(),
        "scale": scale(),
        "seconds": round(seconds, 1),
        "source_sha256": sha256(text),
        "synced_sha256": sha256(text),
        "versions": versions,
    }


def run(chapter: Pair, timeout: int = 7200) -> float:
    """Sync and execute one chapter, write its outputs, and return the seconds it took.

    Raises:
        Refused: a cell failed or an output is not fit to be stored; nothing was written.
        tools.sync.Conflict: both sides changed since they last agreed.
    """
    sync(chapter)
    began, source_time = time.perf_counter(), chapter.module.stat().st_mtime
    notebook = read_notebook(chapter)
    try:
        done = execute(notebook, chapter.root, timeout)
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from None
    seconds = time.perf_counter() - began
    if found := stains(done, chapter.root):
        raise Refused("\n".join(found))
    tidy(done)
    done.metadata[KEY] = record(percent(done, chapter.root), seconds)
    write_notebook(chapter, done)
    same_age(chapter, source_time)  # an edit of the module made meanwhile stays the newer side
    return seconds


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("chapter", nargs="+", help="such as paper/attention")
    parser.add_argument("--timeout", type=int, default=7200, help="seconds a cell may take")
    options = parser.parse_args(argv)
    failed = 0
    for chapter in [pair(name) for name in options.chapter]:
        try:
            seconds = run(chapter, options.timeout)
        except (Refused, Conflict, FileNotFoundError) as error:
            failed += 1
            print(f"{chapter.name}: not written\n{error}")
        else:
            print(f"{chapter.name}: executed in {seconds:.1f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
