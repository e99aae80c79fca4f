"""Chapter 35: the rows of the matrix, its runner, and what it measures."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transformer_annotated import book, count_parameters, diff
from transformer_annotated.modern import ablation
from transformer_annotated.modern.ablation import (
    SCALES,
    TOGETHER,
    base,
    build,
    corpus,
    costs,
    kept_bytes,
    main,
    rows,
    run,
    work_off,
    write_costs,
)
from transformer_annotated.training.reproduction import read_results
from transformer_annotated.training.tokens import EncodedCorpus

TINY, SMOKE, FULL = SCALES["tiny"], SCALES["smoke"], SCALES["full"]
TASKS = ("translation", "language")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    corpus(TINY, folder)
    return folder


@pytest.fixture(scope="module")
def data(work: Path) -> EncodedCorpus:
    return corpus(TINY, work)


def test_the_rows_are_the_paper_each_patch_all_and_all_but_one() -> None:
    names = list(rows(SMOKE))
    assert names[:2] == ["paper", "all"]
    assert len(names) == len(set(names)) >= 20
    for name in TOGETHER:
        assert rows(SMOKE)[name][0] in rows(SMOKE)["all"]
        if name != "sdpa":
            left = rows(SMOKE)[f"all but {name}"]
            assert len(left) == len(TOGETHER) - 1
            assert rows(SMOKE)[name][0] not in left


def test_every_row_has_the_papers_parameters() -> None:
    """Within half a per cent; experts have more, and each row differs from the paper."""
    for scale in (SMOKE, FULL):
        for task in TASKS:
            plain = base(scale, task, 500)
            total = count_parameters(plain)["total"]
            for name, patches in rows(scale).items():
                config = build(scale, task, 500, patches)
                ratio = count_parameters(config)["total"] / total
                if name == "experts":
                    assert ratio > 1.1
                else:
                    assert abs(ratio - 1) < 0.005, (name, task, ratio)
                assert (diff(plain, config) == "") == (name == "paper")


def test_a_row_is_a_function_of_its_seed(data: EncodedCorpus) -> None:
    found = [
        run("all", task, seed, (1e-3,), TINY, data)["loss"] for task in TASKS for seed in (0, 0, 1)
    ]
    for first, again, other in (found[:3], found[3:]):
        assert first == again != other


def test_the_best_rate_is_kept(data: EncodedCorpus) -> None:
    found = run("paper", "language", 0, (1e-5, 1e-2), TINY, data)
    assert found["tried"] == {"1e-05": found["tried"]["1e-05"], "0.01": found["loss"]}
    assert found["peak"] == 1e-2
    assert found["loss"] < found["tried"]["1e-05"]


def test_a_rate_that_overflows_loses(data: EncodedCorpus, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ablation.language

    def breaks(scale: Any, config: Any, seed: int, peak: float) -> dict[str, Any]:
        if peak > 1:
            raise FloatingPointError("step 3: the loss is nan; the step was not taken")
        return original(scale, config, seed, peak)

    monkeypatch.setattr(ablation, "language", breaks)
    found = run("paper", "language", 0, (2.0, 1e-3), TINY, data)
    assert found["peak"] == 1e-3
    assert found["tried"]["2.0"] == math.inf


def test_work_goes_on_where_it_stopped(work: Path, tmp_path: Path) -> None:
    results = tmp_path / "lines.jsonl"
    names = ["paper", "rope"]
    assert not work_off("tiny", results, work, names=names, minutes=0.0)
    assert work_off("tiny", results, work, names=names, seeds=[0])
    first = read_results(results)
    assert [(line["row"], line["task"]) for line in first] == [
        (name, task) for name in names for task in TASKS
    ]
    assert work_off("tiny", results, work, names=names, seeds=[0, 1])
    lines = read_results(results)
    assert lines[:4] == first
    assert [line["seed"] for line in lines] == [0] * 4 + [1] * 4
    for one, two in zip(first, lines[4:], strict=True):
        assert list(two["tried"]) == [str(one["peak"])]  # the rate of the first seed
        assert two["loss"] != one["loss"]
        assert ("bleu" in two) == (two["task"] == "translation")


def test_another_budget_is_refused(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "lines.jsonl"
    assert work_off("tiny", results, work, names=["paper"], tasks=["language"], seeds=[0])
    before = results.read_bytes()
    monkeypatch.setitem(SCALES, "tiny", replace(TINY, text_steps=5))
    with pytest.raises(ValueError, match="another budget than today's 'tiny'"):
        work_off("tiny", results, work)
    assert results.read_bytes() == before


@pytest.mark.parametrize(
    ("scale", "names", "said"),
    [("huge", None, "'huge'"), ("tiny", ["paper", "ropes"], "'ropes'.*rope")],
)
def test_unknown_names(
    scale: str, names: list[str] | None, said: str, work: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        work_off(scale, tmp_path / "lines.jsonl", work, names=names)
    assert not (tmp_path / "lines.jsonl").exists()


def test_kept_bytes() -> None:
    """A linear layer keeps its input; a sigmoid after it keeps its own output; weights are free."""
    layer = nn.Linear(8, 16)
    x = torch.randn(4, 8, requires_grad=True)  # so the weight is kept, too
    assert kept_bytes(layer, lambda: layer(x)) == 4 * 4 * 8
    assert kept_bytes(layer, lambda: layer(x).sigmoid()) == 4 * 4 * (8 + 16)


def test_costs(data: EncodedCorpus, work: Path, tmp_path: Path) -> None:
    lines = costs(TINY, "language", ["paper", "sdpa"], data, 2)
    paper, sdpa = lines
    assert paper["relative"] == 1.0
    assert sdpa["kept_mib"] < paper["kept_mib"]  # no scores are kept
    assert sdpa["parameters"] == paper["parameters"]
    middle, low, high = paper["tokens_per_second"]
    assert 0 < low <= middle <= high
    results = tmp_path / "costs.jsonl"
    results.write_text(json.dumps({"scale": "full", "row": "paper"}) + "\n")
    for _ in range(2):  # measured again, they replace the older ones
        write_costs("tiny", results, work, rounds=1)
    stored = read_results(results)
    assert stored[0] == {"scale": "full", "row": "paper"}
    assert len(stored) == 1 + 2 * len(rows(TINY))


def test_the_command_line(work: Path, tmp_path: Path) -> None:
    results = tmp_path / "lines.jsonl"
    common = ["--scale", "tiny", "--work", str(work), "--results", str(results)]
    chosen = ["--rows", "paper", "--tasks", "language", "--seeds", "7"]
    assert main([*common, *chosen, "--minutes", "0"]) == 3
    assert main([*common, *chosen]) == 0
    assert [line["seed"] for line in read_results(results)] == [7]


def line(row: str, seed: int, loss: float, scale: str = "smoke") -> dict[str, Any]:
    return {"row": row, "task": "translation", "seed": seed, "loss": loss, "scale": scale}


def test_measured_counts_the_seeds_that_win(monkeypatch: pytest.MonkeyPatch) -> None:
    stored = [
        line("paper", 0, 1.0), line("paper", 1, 2.0), line("paper", 2, 3.0),
        line("rope", 0, 0.5), line("rope", 1, 2.5), line("rope", 2, 2.75),
        line("rope", 0, 9.0, "tiny"),
    ]  # fmt: skip
    monkeypatch.setattr(book, "results", lambda name: stored)
    text = book.measured("rope").splitlines()
    assert text[1].split() == ["paper", "translation", "2.000", "1.000", "3.000"]
    assert text[2].split()[:5] == ["rope", "translation", "1.917", "0.500", "2.750"]
    assert text[2].endswith("in 2 of 3 seeds")
    assert text[4].split()[:2] == ["rope", "language"]
    assert text[4].endswith("not measured yet")


@pytest.mark.parametrize("task", TASKS)
def test_rows_run_in_16_bits(task: ablation.Task, data: EncodedCorpus) -> None:
    """As the full scale does: two updates and a finite loss, with every kind of component."""
    scale = replace(TINY, bfloat16=True, steps=2, text_steps=2)
    for name in ("all", "alibi", "t5_bias", "window", "experts"):
        assert math.isfinite(run(name, task, 0, (1e-3,), scale, data)["loss"]), name
