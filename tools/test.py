"""Run every check of the book, one after the other: python tools/test.py

All steps run, even after one failed. The end lists the steps, the ten slowest tests over all of
them, and one line in pytest's form; the exit status is 1 where anything failed.
"""

import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "--durations=10", "-p", "no:cacheprovider"]
# Two processes with one thread each, on two cores; a notebook's cells must stay in one process.
PARALLEL = ["-n", os.environ.get("JOBS", "2"), "--dist", "loadfile"]
CORPUS = Path(os.environ.get("TRANSFORMER_ANNOTATED_DATA", "~/.cache/transformer_annotated"))
NO_CORPUS = [] if (CORPUS.expanduser() / "multi30k" / "train.de.gz").is_file() else [
    "--ignore=book/paper/multi30k.ipynb"
]  # fmt: skip
NBVAL = [
    "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "120",
    "--nbval-sanitize-with", "tests/sanitize.cfg", "-W", "ignore", *NO_CORPUS, "book/",
]  # fmt: skip


@dataclass(frozen=True)
class Step:
    """A named command; ``tests`` says that it is a pytest run with a report to read."""

    name: str
    command: list[str]
    tests: bool = False


STEPS = [
    Step("style (ruff)", [sys.executable, "-m", "ruff", "check", "."]),
    Step("types (mypy)", [sys.executable, "-m", "mypy"]),
    Step("unit tests", [*PYTEST, *PARALLEL, "-m", "not built", "tests"], tests=True),
    Step("notebooks (nbval)", [*PYTEST, *PARALLEL, *NBVAL], tests=True),
    Step("book", [sys.executable, "tools/build.py"]),
    Step("built pages", [*PYTEST, "-m", "built", "tests"], tests=True),
]


def environment() -> dict[str, str]:
    """The short scale, no progress bars, one thread a process."""
    return {
        **os.environ,
        "TRANSFORMER_ANNOTATED_SCALE": "short",
        "TQDM_DISABLE": "1",
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def read_report(path: Path) -> tuple[Counter[str], list[tuple[float, str]]]:
    """How many tests ended in which way, and how long each took."""
    counts: Counter[str] = Counter()
    times: list[tuple[float, str]] = []
    if not path.is_file():
        return counts, times
    for case in ElementTree.parse(path).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        if kinds & {"failure", "error"}:
            counts["failed"] += 1
        elif "skipped" in kinds:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        times.append((float(case.get("time", 0.0)), name))
    return counts, times


def main() -> int:
    began = time.monotonic()
    totals: Counter[str] = Counter()
    times: list[tuple[float, str]] = []
    lines: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(STEPS):
            print(f"\n--- {step.name}", flush=True)
            if NO_CORPUS and step.command[-1] == "book/":
                print(
                    "skipped: chapter 11, since Multi30k is not at hand and tests download nothing"
                )
            report = Path(folder) / f"{number}.xml"
            command = [*step.command, f"--junitxml={report}"] if step.tests else step.command
            start = time.monotonic()
            status = subprocess.run(command, cwd=ROOT, env=environment(), check=False).returncode
            seconds = time.monotonic() - start
            counts, durations = read_report(report)
            if status != 0 and not counts["failed"]:
                counts["failed"] += 1  # a step that is no test, or one that fell over
            elif not step.tests:
                counts["passed"] += 1
            totals += counts
            times += durations
            told = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()) if n)
            verdict = "ok" if status == 0 else "FAILED"
            lines.append(f"{verdict:7}{step.name:20}{seconds:7.1f} s  {told}")
    print("\nThe ten slowest tests:")
    for seconds, name in sorted(times, reverse=True)[:10]:
        print(f"{seconds:8.1f} s  {name}")
    print("\n" + "\n".join(lines))
    told = ", ".join(f"{totals[w]} {w}" for w in ("failed", "passed", "skipped") if totals[w])
    print(f"\n===== {told} in {time.monotonic() - began:.2f}s =====")
    return 1 if totals["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
