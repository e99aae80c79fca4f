"""What every chapter needs of the book itself: its scale, its machine and its exercises."""

import json
import os
import platform
import subprocess
from pathlib import Path
from types import EllipsisType
from typing import Any, Literal

import torch

__all__ = ["check", "commit", "machine", "measured", "results", "scale"]


def scale() -> Literal["short", "full"]:
    """How large the experiments of a page are.

    ``"short"`` when the environment variable ``TRANSFORMER_ANNOTATED_SCALE`` is ``short`` (the
    tests set it), ``"full"`` when it is ``full`` or not set (what the stored outputs show).

    Raises:
        ValueError: the variable has another value.
    """
    value = os.environ.get("TRANSFORMER_ANNOTATED_SCALE", "full")
    if value == "short":
        return "short"
    if value == "full":
        return "full"
    raise ValueError(f"TRANSFORMER_ANNOTATED_SCALE={value!r}: expected 'short' or 'full'")


def machine() -> str:
    """One line about the machine: processor or GPU, threads torch uses, Python and torch versions.

    It names no host and no user, so that it can be stored in a published page.
    """
    threads = torch.get_num_threads()
    parts = [_processor(), f"{threads} thread{'s' if threads != 1 else ''}"]
    if torch.cuda.is_available():
        parts.insert(0, torch.cuda.get_device_name())
    parts += [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return ", ".join(parts)


def results(name: str) -> list[dict[str, Any]]:
    """The long runs stored in ``book/results/NAME.jsonl`` of this checkout, oldest first.

    Raises:
        FileNotFoundError: there is no such file, or the package was not installed from a checkout.
    """
    path = Path(__file__).resolve().parent.parent / "book" / "results" / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(*rows: str) -> str:
    """What the ablation matrix (``book/results/ablation.jsonl``) found for these rows, as a table.

    The paper's model comes first. A line shows one task's loss, in nats a token (translation) or
    bits a byte (language): the mean over seeds, then the lowest and the highest. The last column
    counts the seeds in which the row beat the paper's model.
    """
    metrics = {"translation": "loss", "language": "bits_per_byte"}
    try:
        lines = results("ablation")
    except FileNotFoundError:
        lines = []
    lines = [line for line in lines if line["scale"] != "tiny"]
    scales = sorted({line["scale"] for line in lines})  # "full" before "smoke"
    text = [f"{'':18}{'task':13}{'mean':>8}{'lowest':>9}{'highest':>9}   better than the paper"]
    for task, metric in metrics.items():
        found = {
            name: {
                line["seed"]: line[metric]
                for line in lines
                if (line["row"], line["task"], line["scale"]) == (name, task, scales[0])
            }
            for name in ("paper", *rows)
        }
        for name, values in found.items():
            if not values:
                text.append(f"{name:18}{task:13}not measured yet")
                continue
            numbers = list(values.values())
            shared = values.keys() & found["paper"].keys()
            won = sum(values[seed] < found["paper"][seed] for seed in shared)
            last = "" if name == "paper" else f"   in {won} of {len(shared)} seeds"
            text.append(
                f"{name:18}{task:13}{sum(numbers) / len(numbers):8.3f}"
                f"{min(numbers):9.3f}{max(numbers):9.3f}{last}"
            )
    return "\n".join(text)


def commit() -> str:
    """The commit this checkout stands at, with "-dirty" where files differ; or "unknown"."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _processor() -> str:
    """The processor's model name, or the architecture where the system does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return " ".join(value.split())
    return platform.machine() or "unknown processor"


def check(number: str, answer: Any) -> None:
    """Check the answer to a numbered exercise and print what was found.

    ``answer = ...`` (three dots) means that there is no answer yet. A wrong answer prints a hint;
    it does not raise, so that a page with unanswered exercises still runs from top to bottom.

    Raises:
        ValueError: there is no exercise of that number.
    """
    from transformer_annotated.exercises import CHECKS

    if number not in CHECKS:
        raise ValueError(f"number={number!r}: expected one of {', '.join(sorted(CHECKS))}")
    if isinstance(answer, EllipsisType):
        print(f"Exercise {number}: no answer yet.")
        return
    try:
        CHECKS[number](answer)
    except AssertionError as hint:
        print(f"Exercise {number}: not yet. {hint}".rstrip())
    except Exception as error:
        print(f"Exercise {number}: not yet. Checking it raised {type(error).__name__}: {error}")
    else:
        print(f"Exercise {number}: right.")
