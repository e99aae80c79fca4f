"""Recipes, the resumable runner, and scores."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

from transformer_annotated import (
    PAPER_BASE,
    CrossEntropy,
    EncodedCorpus,
    RDrop,
    Transformer,
    average_checkpoints,
    beam_search,
    list_checkpoints,
    load_checkpoint,
    patch,
)
from transformer_annotated.paper.multi30k import paper_rate
from transformer_annotated.paper.toy import UNK
from transformer_annotated.paper.toy import split as sentences
from transformer_annotated.training import reproduction
from transformer_annotated.training.decoding import greedy_search, translate_ids
from transformer_annotated.training.reproduction import (
    RUNS,
    SMALL,
    TOY,
    WMT14_BASE,
    WMT14_BIG,
    ModelOptions,
    Recipe,
    main,
    make_trainer,
    predicted_hours,
    prepare,
    read_results,
    run,
    score_rows,
)
from transformer_annotated.training.tokens import encode_corpus, load_tokenizer, train_words

TINY = replace(
    TOY,
    model=ModelOptions(16, 1, 2, 32, dropout=0.1),
    train=replace(TOY.train, max_tokens=256, steps=6, save_every=2, validate_every=3, keep=2),
    warm_up=2,
)


@lru_cache(maxsize=1)
def corpus() -> EncodedCorpus:
    """Two hundred and twice twelve pairs of the small language, encoded."""
    return encode_corpus(FewPairs(), train_words(w for p in FewPairs().pairs("train") for w in p))


class FewPairs:
    """The small language as a corpus of a few pairs."""

    name, source, target, splits = "toy", "de", "en", ("train", "val", "test")

    def pairs(self, split: str) -> list[tuple[str, str]]:
        train, test = sentences(200, 24, seed=3)
        return {"train": train, "val": test[:12], "test": test[12:]}[split]

    def stream(self, split: str) -> Iterator[tuple[str, str]]:
        return iter(self.pairs(split))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few pairs in a file where `run` looks for them."""
    path = tmp_path_factory.mktemp("encoded") / "toy-de-en-6000.safetensors"
    corpus().save(path)
    return path


def test_every_recipe_builds_its_model() -> None:
    for name, recipe in RUNS.items():
        with torch.device("meta"):
            model = Transformer(recipe.config(recipe.vocab_size))
        assert model.config.d_model == recipe.model.d_model, name
        assert recipe.rate()(1) > 0
        assert recipe.rate()(recipe.train.steps) >= 0


def test_the_papers_recipe_is_the_papers() -> None:
    """Sections 5 and 6.1: sizes, steps, batch, schedule, smoothing, how many are averaged."""
    base, big = WMT14_BASE, WMT14_BIG
    assert (base.train.steps, big.train.steps) == (100_000, 300_000)
    assert (base.train.keep, big.train.keep) == (5, 20)
    assert base.train.max_tokens * base.train.accumulate == 25_000
    assert base.smoothing == big.smoothing == 0.1
    assert (base.model.dropout, big.model.dropout) == (0.1, 0.3)
    assert RUNS["wmt14-en-fr-big"].model.dropout == 0.1
    for recipe in (base, big):
        rate, paper = recipe.rate(), paper_rate(recipe.model.d_model, 4000)
        assert all(rate(step) == pytest.approx(paper(step)) for step in (1, 100, 4000, 90_000))
    with torch.device("meta"):
        mine = Transformer(base.config(37_000))
        theirs = Transformer(patch(PAPER_BASE, {"vocab_size": 37_000}))
    assert [(n, p.shape) for n, p in mine.named_parameters()] == [
        (n, p.shape) for n, p in theirs.named_parameters()
    ]


def test_sharing_is_one_table_or_three() -> None:
    sizes = []
    for share in (True, False):
        with torch.device("meta"):
            recipe = replace(SMALL, model=replace(SMALL.model, share=share))
            sizes.append(sum(p.numel() for p in Transformer(recipe.config(6000)).parameters()))
    assert sizes[1] - sizes[0] == 2 * 6000 * SMALL.model.d_model


def test_objective_and_schedule_follow_the_recipe() -> None:
    assert replace(TINY, smoothing=0.2).objective() == CrossEntropy(0.2)
    objective = replace(TINY, r_drop=3.0).objective()
    assert isinstance(objective, RDrop)
    assert objective.alpha == 3.0
    rate = SMALL.rate()
    assert max(rate(s) for s in range(1, 7501)) == pytest.approx(SMALL.peak)
    assert rate(SMALL.warm_up) == pytest.approx(SMALL.peak)
    assert rate(7500) < 1e-6


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"warm_up": 0}, "warm_up"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"schedule": "linear"}, "schedule"),
        ({"peak": 0.0}, "peak"),
        ({"r_drop": -1.0}, "r_drop"),
        ({"max_length": 0}, "max_length"),
        ({"max_length": 256}, "max_length"),
        ({"warm_up": 6}, "warm_up"),
    ],
)
def test_bad_recipes(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(TINY, **change)


def test_a_prepared_file_is_used_and_another_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise AssertionError("the corpus was opened")

    monkeypatch.setattr(reproduction, "open_corpus", fail)
    assert len(prepare(TINY, cache).splits["train"]) == 200
    with pytest.raises(ValueError, match="not"):
        prepare(replace(TINY, source="en", target="de"), cache)
    with pytest.raises(ValueError, match="pieces, more than 100"):
        prepare(replace(TINY, vocab_size=100), cache)


def test_translations_come_back_in_order() -> None:
    data = corpus()
    tokenizer = load_tokenizer(data.tokenizer_json)
    torch.manual_seed(0)
    model = Transformer(TINY.config(tokenizer.vocab_size)).eval()
    split = data.splits["test"]
    for search in (greedy_search, lambda *args: beam_search(*args).ids):
        together = translate_ids(
            model, tokenizer, [source for source, _ in split], search=search, max_tokens=64
        )
        assert len(together) == len(split)
        for i in (0, 5, 11):
            src = torch.tensor([split[i][0] + [2]])
            alone = search(model, src, torch.ones_like(src, dtype=torch.bool))[0]
            assert together[i] == tokenizer.decode(alone.tolist())


def test_the_tokenizer_knows_the_training_split_alone() -> None:
    class Leaky(FewPairs):
        def pairs(self, split: str) -> list[tuple[str, str]]:
            return [(f"wort {split}", f"word {split}")] * 3

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(reproduction, "open_corpus", lambda *_: Leaky())
        data = prepare(TINY)
    unknown = {name: [*pair[0], *pair[1]].count(UNK) for name, pair in first_pairs(data).items()}
    assert unknown == {"train": 0, "val": 2, "test": 2}


def first_pairs(data: EncodedCorpus) -> dict[str, tuple[list[int], ...]]:
    return {name: split[0] for name, split in data.splits.items()}


def test_an_empty_source_gives_an_empty_translation() -> None:
    data = corpus()
    split = data.splits["test"]
    offsets = (split.offsets[0].clone(), split.offsets[1])
    offsets[0][1:] -= int(offsets[0][1])  # the first source loses its words
    ids = (split.ids[0][int(split.offsets[0][1]) :], split.ids[1])
    without = type(split)(ids, offsets, split.sources, split.references)
    tokenizer = load_tokenizer(data.tokenizer_json)
    model = Transformer(TINY.config(tokenizer.vocab_size))
    texts = translate_ids(model, tokenizer, [source for source, _ in without])
    assert texts[0] == ""
    assert len(texts) == len(split)


def test_a_run_in_slices_is_the_run_in_one_go(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped again and again, the run ends with the same weights and one line of results."""
    for name in ("slices", "whole"):
        (tmp_path / name).mkdir()
        (tmp_path / name / cache.name).write_bytes(cache.read_bytes())
    results = tmp_path / "slices.jsonl"
    calls = 1
    while not run("r", TINY, tmp_path / "slices", results, minutes=0.003):
        calls += 1
        assert calls < 100
    assert run("r", TINY, tmp_path / "whole", tmp_path / "whole.jsonl")
    (line,), (other,) = read_results(results), read_results(tmp_path / "whole.jsonl")
    assert [row["bleu"] for row in line["rows"]] == [row["bleu"] for row in other["rows"]]
    assert line["loss"] == other["loss"]
    means = [average_checkpoints(list_checkpoints(tmp_path / w / "r")) for w in ("slices", "whole")]
    assert all(torch.equal(means[0][name], means[1][name]) for name in means[0])
    assert line["validation"] == other["validation"]
    assert line["steps"] == TINY.train.steps
    assert {row["split"] for row in line["rows"]} == {"val", "test"}
    assert line["parameters"] == other["parameters"] > 0
    assert json.dumps(line, allow_nan=False)
    assert "/" not in line["machine"]
    assert run("r", TINY, tmp_path / "slices", results)  # finished: nothing is added
    assert len(read_results(results)) == 1


def test_rows_are_of_the_last_and_of_the_mean() -> None:
    data, used = corpus(), []
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patched:
        folder = Path(name)
        make_trainer(TINY, data, folder).train()
        paths = list_checkpoints(folder)
        assert len(paths) == TINY.train.keep
        real = reproduction.score

        def score(model: Transformer, *rest: Any) -> Any:
            used.append({name: p.detach().clone() for name, p in model.named_parameters()})
            return real(model, *rest)

        patched.setattr(reproduction, "score", score)
        rows, texts = score_rows(folder, data)
        last, mean = load_checkpoint(paths[-1]).model, average_checkpoints(paths)
    for name, value in mean.items():
        assert torch.equal(used[0][name], last[name])
        assert torch.equal(used[-1][name], value)
    assert not all(torch.equal(mean[name], last[name]) for name in mean)
    assert [row["row"] for row in rows[::2]] == [
        "greedy", "beam 4", f"beam 4, mean of {TINY.train.keep} checkpoints"
    ]  # fmt: skip
    assert texts


def test_another_recipe_does_not_go_on(cache: Path, tmp_path: Path) -> None:
    data = prepare(TINY, cache)
    make_trainer(TINY, data, tmp_path).train()
    longer = replace(TINY, train=replace(TINY.train, steps=9))  # another cosine
    for other in (replace(TINY, smoothing=0.3), replace(TINY, peak=1e-3), longer):
        with pytest.raises(ValueError, match="another run"):
            make_trainer(other, data, tmp_path).resume()


def test_the_command_says_when_there_is_more_to_do(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RUNS, "toy", TINY)
    (tmp_path / cache.name).write_bytes(cache.read_bytes())
    options = ["toy", "--work", str(tmp_path), "--results", str(tmp_path / "r.jsonl")]
    assert main([*options, "--minutes", "0.0001"]) == 3
    assert main(options) == 0
    assert len(read_results(tmp_path / "r.jsonl")) == 1
    with pytest.raises(SystemExit):
        main(["no-such-run"])


def test_a_signal_ends_the_list_of_runs(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C must not look like "more to do", or a script that repeats would never end."""
    (tmp_path / cache.name).write_bytes(cache.read_bytes())

    def train(self: Any) -> None:
        self.stopped_by = 2

    monkeypatch.setattr(reproduction.Trainer, "train", train)
    with pytest.raises(KeyboardInterrupt):
        run("r", TINY, tmp_path, tmp_path / "r.jsonl")
    assert read_results(tmp_path / "r.jsonl") == []


def test_predicted_hours() -> None:
    assert predicted_hours(WMT14_BASE, 25_000) == pytest.approx(100_000 / 3600)
    with pytest.raises(ValueError, match="tokens_per_second"):
        predicted_hours(WMT14_BASE, 0.0)


def test_the_corpus_survives_the_file(cache: Path) -> None:
    data = EncodedCorpus.load(cache)
    assert (data.name, data.source, data.target) == ("toy", "de", "en")
    assert isinstance(TINY, Recipe)
