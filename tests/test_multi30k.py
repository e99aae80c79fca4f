"""Chapter 11: the files of a real corpus, its tokens and batches, the paper's loss, and a run."""

import gzip
import hashlib
import io
import json
import math
import os
import pickle
import random
import sys
import urllib.error
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from http.client import IncompleteRead
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import assert_close, draw
from transformer_annotated import Transformer
from transformer_annotated.paper import multi30k as chapter
from transformer_annotated.paper.first_translation import Ids, cross_entropy
from transformer_annotated.paper.multi30k import (
    FULL,
    GPU,
    SHA256,
    SHORT,
    URL,
    Corpus,
    Recipe,
    bleu,
    bucketed,
    corpus_file,
    data_directory,
    detokenize,
    evaluate,
    label_smoothing,
    load,
    multi30k,
    paper_rate,
    read_lines,
    run,
    save,
    tokenizer,
)
from transformer_annotated.paper.toy import EOS, PAD, UNK, Batch, Vocabulary, collate

NAME = "val.de.gz"


# The files


def packed(text: str | bytes) -> bytes:
    """A gzip file; the same bytes for the same text."""
    return gzip.compress(text.encode() if isinstance(text, str) else text, mtime=0)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory for corpora; the network is out of reach. Returns `multi30k` in it."""

    def no_network(url: str, timeout: float) -> None:
        raise urllib.error.URLError("no network in tests")

    monkeypatch.setenv("TRANSFORMER_ANNOTATED_DATA", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return tmp_path / "multi30k"


@pytest.fixture
def put(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | bytes], Path]:
    """A function that puts a text in place of a corpus file, whose sum is then right."""
    home.mkdir()

    def put(name: str, text: str | bytes) -> Path:
        (home / name).write_bytes(packed(text))
        monkeypatch.setitem(SHA256, name, sha256(packed(text)))
        return home / name

    return put


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_where_corpora_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRANSFORMER_ANNOTATED_DATA", str(tmp_path / "here"))
    assert data_directory() == tmp_path / "here"
    for unset in ("", None):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("TRANSFORMER_ANNOTATED_DATA", "")
        if unset is None:
            monkeypatch.delenv("TRANSFORMER_ANNOTATED_DATA")
        assert data_directory() == tmp_path / ".cache" / "transformer_annotated"


def test_a_file_in_its_place_is_not_downloaded(put: Callable[..., Path]) -> None:
    path = put(NAME, "Ein Hund.\n")
    assert corpus_file(NAME) == path


def test_a_file_with_another_sum_is_refused(put: Callable[..., Path]) -> None:
    path = put(NAME, "Ein Hund.\n")
    path.write_bytes(packed("Ein Hund!\n"))
    with pytest.raises(ValueError, match="SHA-256") as error:
        corpus_file(NAME)
    assert str(path) in str(error.value)
    assert SHA256[NAME] in str(error.value)
    assert path.read_bytes() == packed("Ein Hund!\n")  # what to do with it is the owner's decision


class Response(io.BytesIO):
    """What `urlopen` returns: some bytes, or an error while they are read."""

    def __init__(self, data: bytes | BaseException, before: Callable[[], None]) -> None:
        super().__init__(b"" if isinstance(data, BaseException) else data)
        self.data, self.before = data, before

    def read(self, *size: Any) -> bytes:
        self.before()
        if isinstance(self.data, BaseException):
            raise self.data
        return super().read(*size)


@pytest.fixture
def serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function that makes the network serve some bytes; it returns the addresses asked for."""

    def serve(data: bytes | BaseException, before: Callable[[], None] = lambda: None) -> list[str]:
        asked = []

        def urlopen(url: str, timeout: float) -> Response:
            assert 0 < timeout <= 120
            asked.append(url)
            return Response(data, before)

        monkeypatch.setattr("urllib.request.urlopen", urlopen)
        return asked

    return serve


def test_a_file_is_downloaded_once(
    home: Path, serve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = packed("Ein Hund.\n")
    monkeypatch.setitem(SHA256, NAME, sha256(data))
    asked = serve(data)
    assert corpus_file(NAME) == corpus_file(NAME) == home / NAME
    assert asked == [f"{URL}/{NAME}"]
    assert (home / NAME).read_bytes() == data
    assert files(home) == [NAME]


def test_a_download_is_complete_when_it_takes_its_place(
    home: Path, serve: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While bytes arrive there is a temporary file beside the place; when full it is renamed."""
    data = packed("Ein Hund.\n")
    monkeypatch.setitem(SHA256, NAME, sha256(data))
    during, renamed, replace = [], [], os.replace

    def watched(source: str, target: str) -> None:
        renamed.append((Path(source).parent, Path(source).read_bytes(), Path(target)))
        replace(source, target)

    monkeypatch.setattr("os.replace", watched)
    serve(data, before=lambda: during.append(files(home)))
    corpus_file(NAME)
    assert len(during) == len(during[0]) == 1
    assert during[0] != [NAME]
    assert renamed == [(home, data, home / NAME)]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("slow"),
        IncompleteRead(b"half", 99),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_interrupted_download_leaves_nothing(
    error: BaseException, home: Path, serve: Callable[..., list[str]]
) -> None:
    serve(error)
    with pytest.raises((OSError, type(error))):
        corpus_file(NAME)
    assert files(home) == []


def test_half_a_download_is_an_error_that_says_what_to_put_where(
    home: Path, serve: Callable[..., list[str]]
) -> None:
    serve(IncompleteRead(b"half", 99))
    with pytest.raises(OSError) as error:
        corpus_file(NAME)
    assert f"{URL}/{NAME}" in str(error.value)
    assert str(home / NAME) in str(error.value)


def test_a_download_with_another_sum_leaves_nothing(
    home: Path, serve: Callable[..., list[str]]
) -> None:
    serve(packed("<html>not found</html>"))
    with pytest.raises(ValueError, match="SHA-256"):
        corpus_file(NAME)
    assert files(home) == []


def test_a_download_with_another_sum_is_named(home: Path, serve: Callable[..., list[str]]) -> None:
    serve(packed("<html>not found</html>"))
    with pytest.raises(ValueError, match="SHA-256") as error:
        corpus_file(NAME)
    assert f"{URL}/{NAME}" in str(error.value) or str(home / NAME) in str(error.value)


def test_without_network_the_error_says_what_to_put_where(home: Path) -> None:
    with pytest.raises(OSError) as error:
        corpus_file(NAME)
    assert f"{URL}/{NAME}" in str(error.value)
    assert str(home / NAME) in str(error.value)
    assert files(home) == []


def written(path: Path, data: str | bytes) -> Path:
    path.write_bytes(packed(data))
    return path


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("eins\nzwei\n", ["eins", "zwei"]),
        ("eins\nzwei", ["eins", "zwei"]),
        ("eins\n\nzwei\n\n", ["eins", "", "zwei", ""]),
        ("a\u0085b\u2028c\u2029d\x0be\x0cf\x1cg\n", ["a\u0085b\u2028c\u2029d\x0be\x0cf\x1cg"]),
        ("\ufeffeins\nzw\ufeffei\n", ["eins", "zw\ufeffei"]),
        ("Straße, naïve, 犬, 🐕\n", ["Straße, naïve, 犬, 🐕"]),
    ],
)
def test_lines_end_at_a_newline_alone(text: str, lines: list[str], tmp_path: Path) -> None:
    assert read_lines(written(tmp_path / "x.gz", text)) == lines


@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"\xff", 1, 0),
        (b"eins\nzw\xe9i\n", 2, 7),
        ("ä\n\n".encode() + b"\xc3", 3, 4),
        pytest.param(
            "\ufeffa\n".encode() + b"\xff",
            2,
            5,
        ),
    ],
)
def test_a_byte_that_is_no_text_is_found(data: bytes, line: int, byte: int, tmp_path: Path) -> None:
    path = written(tmp_path / "x.gz", data)
    with pytest.raises(ValueError) as error:
        read_lines(path)
    assert str(error.value) == f"{path}, line {line}, byte {byte}: not UTF-8"


def test_pairs_are_the_lines_of_both_files(put: Callable[..., Path]) -> None:
    put("val.de.gz", " Ein Hund. \nZwei\u2028Hunde.\n")
    put("val.en.gz", "A dog.\nTwo dogs.\n")
    assert multi30k("val") == [(" Ein Hund. ", "A dog."), ("Zwei\u2028Hunde.", "Two dogs.")]


def test_a_placeholder_is_left_out_with_its_translation(put: Callable[..., Path]) -> None:
    put("train.de.gz", "Eins.\n@@\nDrei @@.\n")
    put("train.en.gz", "One.\nTwo.\nThree @@.\n")
    assert multi30k("train") == [("Eins.", "One."), ("Drei @@.", "Three @@.")]


def test_sides_of_different_length_are_refused(put: Callable[..., Path]) -> None:
    put("val.de.gz", "Eins.\nZwei.\n@@\n")
    put("val.en.gz", "One.\nTwo.\n")
    with pytest.raises(ValueError, match="val has 3 German and 2 English lines"):
        multi30k("val")


def test_an_unknown_split_is_refused(home: Path) -> None:
    with pytest.raises(ValueError, match=r"\['test_2016_flickr', 'train', 'val'\], got 'dev'"):
        multi30k("dev")


# Tokens


@pytest.fixture(scope="module")
def english() -> Callable[[str], list[str]]:
    return tokenizer("en")


@pytest.fixture(scope="module")
def german() -> Callable[[str], list[str]]:
    return tokenizer("de")


def test_words_are_split_by_the_rules_of_the_language(
    english: Callable[[str], list[str]], german: Callable[[str], list[str]]
) -> None:
    assert english("A dog doesn't run.") == ["A", "dog", "does", "n't", "run", "."]
    assert german("Ein Hund läuft z.B. schnell.") == [
        "Ein",
        "Hund",
        "läuft",
        "z.B.",
        "schnell",
        ".",
    ]
    assert english("z.B. it") != german("z.B. it")
    assert english("  two  dogs\u2028run \n") == ["two", "dogs", "run"]
    assert english("") == []


@pytest.mark.parametrize(
    "text",
    [
        "A dog runs.",
        "Two dogs, a cat; and a bird: all run!",
        "Don't run, it's a dog's life, we're here, I've seen, I'm ill, he'll go and he'd stay?",
        "A well-known man (in a red T-shirt) runs.",
        'He says "stop" and she says "go".',
        'A sign says "Stop", then "Go"!',
        '"Stop"',
        "It costs $5 and 10% more and/or less.",
        "",
    ],
)
def test_text_is_put_together_again(text: str, english: Callable[[str], list[str]]) -> None:
    tokens = english(text)
    assert detokenize(tokens) == text
    assert len(tokens) >= len(text.split())


TOKENS = st.one_of(
    st.sampled_from([*'.,!?;:)]}%([{$#"-/', "n't", "'s", "\u2019s", "dog", "'"]),
    st.text(max_size=4),
)


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.lists(TOKENS, max_size=12))
def test_no_character_is_lost_or_added_but_spaces(tokens: list[str]) -> None:
    def visible(text: str) -> str:
        return "".join(c for c in text if not c.isspace())

    found = detokenize(tokens)
    assert visible(found) == visible("".join(tokens))
    assert len(found) <= sum(map(len, tokens)) + max(0, len(tokens) - 1)


# Batches


PAIRS: list[Ids] = [([4] * (1 + i % 19), [5] * (1 + (i + i // 19) % 19)) for i in range(400)]
NUMBERED: list[Ids] = [([UNK + 1 + i, *source], target) for i, (source, target) in enumerate(PAIRS)]


def rows(batch: Batch) -> list[int]:
    """Which of the numbered sentences a batch holds."""
    return (batch.src[:, 0] - UNK - 1).tolist()


def one_pass(batches: Iterator[Batch], n: int) -> list[Batch]:
    """Batches from an endless stream, until they hold `n` sentences."""
    found, seen = [], 0
    while seen < n:
        found.append(next(batches))
        seen += len(found[-1].src)
    assert seen == n
    return found


def padding(batches: list[Batch]) -> float:
    """The share of places that hold no token."""
    real = sum(int(batch.src_padding.sum()) + batch.n_tokens for batch in batches)
    return 1 - real / sum(batch.src.numel() + batch.tgt_out.numel() for batch in batches)


def test_batches_hold_similar_lengths_within_a_budget_of_tokens() -> None:
    budget = 200
    found = one_pass(bucketed(PAIRS, budget, seed=0), len(PAIRS))
    assert max(max(batch.src.numel(), batch.tgt_out.numel()) for batch in found) <= budget
    shuffled = random.Random(0).sample(PAIRS, len(PAIRS))
    unsorted = [collate(shuffled[i : i + 10]) for i in range(0, len(PAIRS), 10)]
    assert padding(found) < 0.6 * padding(unsorted)
    assert len(found) <= 1.2 * len(unsorted)


def test_each_pass_has_each_sentence_once_in_other_batches() -> None:
    stream = bucketed(NUMBERED, 200, seed=0)
    passes = [one_pass(stream, len(NUMBERED)) for _ in range(3)]
    made = []
    for batches in passes:
        assert Counter(i for batch in batches for i in rows(batch)) == Counter(range(len(NUMBERED)))
        for batch in batches:
            for row, i in enumerate(rows(batch)):
                source, target = NUMBERED[i]
                assert batch.src[row, batch.src_padding[row]].tolist() == [*source, EOS]
                assert batch.tgt_out[row, batch.tgt_padding[row]].tolist() == [*target, EOS]
        made.append({frozenset(rows(batch)) for batch in batches})
    assert len(made[0] & made[1]) < 0.2 * len(made[0])
    assert len(made[1] & made[2]) < 0.2 * len(made[1])


def test_a_batch_is_filled_up_to_its_budget() -> None:
    data: list[Ids] = [([4] * 4, [5] * 3)] * 6
    assert [len(b.src) for b in one_pass(bucketed(data, 15, seed=0), 6)] == [3, 3]
    assert [len(b.src) for b in one_pass(bucketed(data, 14, seed=0), 6)] == [2, 2, 2]


def test_long_and_short_batches_come_mixed() -> None:
    widths = [b.src.shape[1] for b in one_pass(bucketed(PAIRS, 200, seed=0), len(PAIRS))]
    assert widths not in (sorted(widths), sorted(widths, reverse=True))


def test_batches_are_determined_by_the_seed() -> None:
    def first(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + 7)  # other generators do not matter
        random.seed(seed + 7)
        return [rows(batch) for batch in islice(bucketed(NUMBERED, 200, seed=seed), 100)]

    assert first(1) == first(1) != first(2)


@settings(max_examples=60, derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), min_size=1, max_size=40),
    st.integers(0, 60),
    st.integers(0, 9),
)
def test_any_sentences_are_batched(lengths: list[tuple[int, int]], spare: int, seed: int) -> None:
    data: list[Ids] = [([4 + i] * (1 + s), [5] * t) for i, (s, t) in enumerate(lengths)]
    budget = max(max(len(source), len(target)) for source, target in data) + 1 + spare
    found = one_pass(bucketed(data, budget, seed=seed), len(data))
    assert sorted(i - 4 for batch in found for i in batch.src[:, 0].tolist()) == [*range(len(data))]
    assert all(max(batch.src.numel(), batch.tgt_out.numel()) <= budget for batch in found)


def test_a_budget_that_fits_no_batch_is_refused() -> None:
    data: list[Ids] = [([4] * 3, [5] * 9)]
    assert next(bucketed(data, 10, seed=0)).tgt_out.shape == (1, 10)
    with pytest.raises(ValueError, match="tokens=9 must fit the longest of 1 sentences, 10"):
        next(bucketed(data, 9, seed=0))
    with pytest.raises(ValueError, match="the longest of 0 sentences"):
        next(bucketed([], 9, seed=0))


# The loss and the learning rate


def test_label_smoothing_spreads_a_tenth_over_the_vocabulary() -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 7, requires_grad=True), torch.randint(7, (2, 3))
    padding = torch.tensor([[True, True, True], [True, False, False]])
    wanted = 0.9 * F.one_hot(target, 7) + 0.1 / 7  # what the model should say, (B, T, V)
    expected = -(wanted * logits.log_softmax(dim=-1)).sum(dim=-1)[padding].mean()
    found = label_smoothing(0.1)(logits, target, padding)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-7)
    assert not gradients[0][~padding].any()


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5, 0.99])
def test_label_smoothing_is_torchs(epsilon: float) -> None:
    logits = 5 * draw(3, 4, 11, seed=1)
    logits.requires_grad_()
    target = torch.tensor([[4, 5, 6, EOS], [7, EOS, PAD, PAD], [EOS, PAD, PAD, PAD]])
    found = label_smoothing(epsilon)(logits, target, target != PAD)
    expected = F.cross_entropy(logits.mT, target, ignore_index=PAD, label_smoothing=epsilon)
    assert_close(found, expected)
    pair = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    assert_close(*pair, "gradient", tolerance=1e-6)
    if epsilon == 0:
        assert_close(found, cross_entropy(logits, target, target != PAD))


def test_smoothing_does_not_read_the_padding() -> None:
    target, loss = torch.tensor([[4, EOS, PAD], [EOS, PAD, PAD]]), label_smoothing(0.1)
    logits, real = draw(2, 3, 8, seed=2), target != PAD
    expected = loss(logits, target, real)
    logits[~real], target[~real] = torch.nan, -1
    assert torch.equal(loss(logits, target, real), expected)


def test_half_precision_is_smoothed_in_full() -> None:
    logits, target = draw(1, 3, 50, seed=3).bfloat16(), torch.tensor([[4, 5, 6]])
    found = label_smoothing(0.1)(logits, target, target != PAD)
    expected = F.cross_entropy(logits[0].double(), target[0], label_smoothing=0.1)
    assert_close(found, expected.float())


@pytest.mark.parametrize("epsilon", [-0.1, 1.0, 2.0, math.nan])
def test_an_epsilon_that_is_no_share_is_refused(epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon must be in \[0, 1\), got"):
        label_smoothing(epsilon)


@pytest.mark.parametrize("d_model", [512, 1024])
def test_the_learning_rate_is_equation_3(d_model: int) -> None:
    rate = paper_rate(d_model)
    for step in (1, 10, 3_999, 4_000, 4_001, 100_000):
        expected = 1 / math.sqrt(d_model) * min(1 / math.sqrt(step), step / 4_000**1.5)
        assert rate(step) == pytest.approx(expected, rel=1e-12)
    assert rate(4_000) > max(rate(3_999), rate(4_001))
    assert rate(2_000) == pytest.approx(rate(4_000) / 2)
    assert rate(16_000) == pytest.approx(rate(4_000) / 2)


@pytest.mark.parametrize("warm_up", [1, 20, 1_000])
def test_the_rate_peaks_at_the_end_of_the_warm_up(warm_up: int) -> None:
    rate = paper_rate(256, warm_up)
    steps = range(1, 3 * warm_up + 1)
    assert max(steps, key=rate) == warm_up
    assert rate(warm_up) == pytest.approx(1 / (16 * math.sqrt(warm_up)))


# BLEU


FOUND = ["A dog runs in the park.", "Two men are sitting there", "A child (small) plays."]
WANTED = ["A dog runs through the park.", "Two men are sitting here.", "A small child plays."]


def test_bleu_is_sacrebleus() -> None:
    score, signature = bleu(FOUND, WANTED)
    assert score == sacrebleu.corpus_bleu(FOUND, [WANTED]).score
    assert 10 < score < 90
    assert score != bleu(WANTED, FOUND)[0]  # which side is the reference matters
    assert f"version:{sacrebleu.__version__}" in signature
    assert {"nrefs:1", "case:mixed", "tok:13a"} < set(signature.split("|"))


def test_bleu_is_of_the_corpus_and_of_its_text() -> None:
    assert bleu(WANTED, WANTED)[0] == pytest.approx(100)
    assert bleu(["x"] * 3, WANTED)[0] < 1
    assert bleu([text.lower() for text in WANTED], WANTED)[0] < 100
    mean = sum(bleu([f], [w])[0] for f, w in zip(FOUND, WANTED, strict=True)) / 3
    assert bleu(FOUND, WANTED)[0] != pytest.approx(mean, abs=0.5)


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 1), (1, 0), (2, 3), (3, 2)])
def test_bleu_needs_a_reference_for_each_sentence(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"got {n} hypotheses and {m} references"):
        bleu(FOUND[:n], WANTED[:m])


# A run


def test_a_recipe_makes_the_papers_model_in_its_size() -> None:
    recipe = Recipe(d_model=48, n_layers=2, n_heads=3, d_ff=96, dropout=0.25)
    config = recipe.config(30, 20)
    assert (config.src_vocab_size, config.vocab_size) == (30, 20)
    assert (config.d_model, config.dropout, config.final_norm) == (48, 0.25, False)
    for stack in (config.encoder, config.decoder):
        assert stack.n_layers == 2
        assert stack.self_attention.kwargs["n_heads"] == 3
        assert stack.ffn.kwargs["d_ff"] == 96
    assert config.decoder.cross_attention.kwargs["n_heads"] == 3
    logits = Transformer(config).eval()(torch.tensor([[29, EOS]]), torch.tensor([[19]]))
    assert logits.shape == (1, 1, 20)


@pytest.mark.parametrize("recipe", [SHORT, FULL, GPU], ids=["short", "full", "gpu"])
def test_the_recipes_of_the_book_can_be_run(recipe: Recipe) -> None:
    with torch.device("meta"):
        Transformer(recipe.config(50, 50))
    assert isinstance(getattr(torch, recipe.precision), torch.dtype)
    assert 0 < recipe.warm_up <= recipe.steps
    assert 0 < recipe.validate_every <= recipe.steps
    assert json.loads(json.dumps(asdict(recipe))) == asdict(recipe)


SIDES = {
    "train": [
        ("Ein Hund läuft.", "A dog runs."),
        ("Ein Mann läuft.", "A man runs."),
        ("Ein Hund schläft.", "A dog sleeps."),
        ("Ein Mann schläft.", "A man sleeps."),
        ("Ein Mann singt.", "A man sings."),
    ],
    "val": [("Ein Hund singt.", "A dog sings."), ("Ein Mann bellt.", "A man barks.")],
    "test_2016_flickr": [("Ein Hund bellt.", "A dog barks."), ("Ein Hund läuft.", "A dog runs.")],
}
TINY = Recipe(
    d_model=16, n_layers=1, n_heads=2, d_ff=32, tokens=12, warm_up=4, steps=7, validate_every=3
)


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> Corpus:
    """A corpus of a few sentences in place of the real one."""
    monkeypatch.setattr(chapter, "multi30k", SIDES.__getitem__)
    return Corpus.load(min_count=1)


def test_a_corpus_knows_the_words_of_its_training_split_alone(corpus: Corpus) -> None:
    de, en = "Ein Hund Mann läuft schläft singt .", "A dog man runs sleeps sings ."
    assert set(corpus.source.words[UNK + 1 :]) == set(de.split())
    assert set(corpus.target.words[UNK + 1 :]) == set(en.split())
    assert corpus.source.decode(corpus.train[0][0]) == "Ein Hund läuft .".split()
    assert corpus.target.decode(corpus.train[4][1]) == "A man sings .".split()
    assert corpus.sides.keys() == {"val", "test_2016_flickr"}
    source, references = corpus.sides["test_2016_flickr"]
    assert source == ["Ein Hund bellt .".split(), "Ein Hund läuft .".split()]
    assert references == ["A dog barks.", "A dog runs."]  # as they are, not tokenised
    assert corpus.source.encode(source[0])[2] == UNK


def test_a_corpus_leaves_out_words_that_occur_once(corpus: Corpus) -> None:
    assert "singt" in corpus.source
    loaded = Corpus.load()
    assert "singt" not in loaded.source
    assert loaded.source.words[UNK + 1 :][:2] == (".", "Ein")
    assert loaded.train[4][0][2] == UNK


def test_a_trial_keeps_the_first_pairs_of_each_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tenth as many to evaluate on as to train on."""
    monkeypatch.setattr(chapter, "multi30k", lambda split: 10 * SIDES[split])
    corpus = Corpus.load(min_count=1, limit=30)
    whole = Corpus.load(min_count=1)
    assert (len(corpus.train), len(whole.train)) == (30, 50)
    assert corpus.train == whole.train[:30]
    for split, (source, references) in corpus.sides.items():
        assert source == whole.sides[split][0][:3]
        assert references == whole.sides[split][1][:3]
        assert len(source) == len(references) == 3


def test_evaluation_translates_the_split(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is replaced by a dictionary gets the score of its words."""
    known = {"Ein": "A", "Hund": "dog", "bellt": "barks", "läuft": "walks", ".": "."}

    def translate(
        model: object,
        target: Vocabulary,
        sentences: list[list[str]],
        *,
        source_vocabulary: Vocabulary,
    ) -> list[list[str]]:
        assert (target, source_vocabulary) == (corpus.target, corpus.source)
        return [[known[word] for word in words] for words in sentences]

    monkeypatch.setattr(chapter, "translate", translate)
    score, signature, text = evaluate(None, corpus, "test_2016_flickr")
    assert text == ["A dog barks.", "A dog walks."]
    assert (score, signature) == bleu(text, ["A dog barks.", "A dog runs."])


def test_a_run_reports_what_it_did(corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    model, report = run(TINY, corpus)
    assert report.keys() == {
        "recipe", "parameters", "vocabulary", "loss", "validation_bleu", "test_bleu", "signature",
        "seconds", "target_tokens", "threads", "machine", "translations",
    }  # fmt: skip
    stored = json.loads(json.dumps(report, allow_nan=False))
    assert stored["recipe"] == asdict(TINY)
    assert stored["vocabulary"] == [len(corpus.source), len(corpus.target)] == [11, 11]
    assert report["parameters"] == sum(p.numel() for p in model.parameters())
    assert len(report["loss"]) == 7
    assert [step for step, _ in report["validation_bleu"]] == [3, 6]
    assert all(0 <= score <= 100 for _, score in report["validation_bleu"])
    score, signature, text = evaluate(model, corpus, "test_2016_flickr")
    assert (report["test_bleu"], report["signature"], report["translations"]) == (
        score, signature, text,
    )  # fmt: skip
    assert 0 <= score <= 100
    assert report["seconds"] > 0
    assert report["target_tokens"] > 7 * 5
    assert report["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed] == ["3", "6"]


def test_a_run_is_determined_by_its_seed(corpus: Corpus) -> None:
    """Validation in between changes nothing, either."""
    (one, first), (two, second) = run(TINY, corpus), run(replace(TINY, validate_every=1), corpus)
    _, other = run(replace(TINY, seed=1), corpus)
    assert first["loss"] == second["loss"] != other["loss"]
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_run_takes_the_recipes_schedule_loss_and_precision(
    corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    train = chapter.train

    def watched(model: Any, data: Any, **options: Any) -> Any:
        batches = list(data)
        asked.update(options, batches=batches)
        return train(model, batches, **options)

    monkeypatch.setattr(chapter, "train", watched)
    for precision, expected in (("bfloat16", torch.bfloat16), ("float32", None)):
        run(replace(TINY, precision=precision, smoothing=0.3, seed=3), corpus)
        assert asked["autocast"] is expected
    assert [asked["learning_rate"](s) for s in range(1, 9)] == [
        paper_rate(16, 4)(s) for s in range(1, 9)
    ]
    logits, target = draw(1, 2, 11, seed=0), torch.tensor([[4, EOS]])
    assert torch.equal(
        asked["loss"](logits, target, target != PAD),
        label_smoothing(0.3)(logits, target, target != PAD),
    )
    expected = islice(bucketed(corpus.train, 12, seed=3), 7)
    for found, batch in zip(asked["batches"], expected, strict=True):
        assert torch.equal(found.src, batch.src)
        assert torch.equal(found.tgt_out, batch.tgt_out)


def test_a_run_learns(corpus: Corpus) -> None:
    longer = replace(TINY, tokens=25, steps=150, warm_up=30, dropout=0.0, validate_every=150)
    _, report = run(longer, corpus)
    assert report["loss"][-1] < 0.6 * report["loss"][0]
    assert report["translations"][1] == "A dog runs."
    assert report["test_bleu"] > 20


def test_a_saved_model_is_the_same_when_loaded(corpus: Corpus, tmp_path: Path) -> None:
    model = run(replace(TINY, steps=3), corpus)[0]
    save(tmp_path / "model.pt", model, corpus)
    loaded, source, target = load(tmp_path / "model.pt")
    assert (source, target) == (corpus.source, corpus.target)
    assert loaded.config == model.config
    assert not loaded.training
    src, tgt = torch.tensor([[4, 5, EOS]]), torch.tensor([[1, 6]])
    with torch.no_grad():
        assert torch.equal(loaded(src, tgt), model.eval()(src, tgt))


class Trap:
    """An object that does something when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"config": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(pickle.UnpicklingError):
        load(tmp_path / "model.pt")
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the trap works
    assert (tmp_path / "sprung").exists()


# The command line


def test_the_command_line_trains_saves_and_writes_a_line(
    corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    results, weights = tmp_path / "results.jsonl", tmp_path / "model.pt"
    monkeypatch.setattr(chapter, "SHORT", TINY)
    command = ["multi30k", "--scale", "short", "--threads", "1", "--results", str(results)]
    monkeypatch.setattr(sys, "argv", command)
    chapter.main()
    lines = results.read_text().splitlines()
    assert len(lines) == 1
    report = json.loads(lines[0])
    assert report["run"] == "multi30k-short"
    assert report["recipe"] == asdict(TINY)
    assert f"test BLEU {report['test_bleu']:.2f}" in capsys.readouterr().out
    assert not weights.exists()

    more = ["--precision", "bfloat16", "--save", str(weights)]
    monkeypatch.setattr(sys, "argv", command + more)
    chapter.main()
    again = results.read_text().splitlines()
    assert again[0] == lines[0]
    assert [json.loads(line)["recipe"]["precision"] for line in again] == ["float32", "bfloat16"]
    assert load(weights)[1] == Corpus.load().source


@pytest.mark.parametrize("options", [["--scale", "huge"], ["--precision", "int4"]])
def test_the_command_line_refuses_what_it_does_not_know(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["multi30k", *options])
    with pytest.raises(SystemExit):
        chapter.main()
    assert "invalid choice" in capsys.readouterr().err


# The real corpus


def at_hand() -> bool:
    """Whether all files lie where they are looked for, so that nothing would be downloaded."""
    return all((data_directory() / "multi30k" / name).is_file() for name in SHA256)


needs_data = pytest.mark.skipif(
    not at_hand(), reason="Multi30k is not in TRANSFORMER_ANNOTATED_DATA"
)


@pytest.mark.data
@needs_data
def test_the_real_corpus_has_its_lines() -> None:
    splits = {name: multi30k(name) for name in ("train", "val", "test_2016_flickr")}
    assert [len(pairs) for pairs in splits.values()] == [29_000 - 2, 1_014, 1_000]
    for pairs in splits.values():
        assert all(de.strip() and en.strip() for de, en in pairs)
        lengths = torch.tensor([[len(de), len(en)] for de, en in pairs], dtype=torch.float64).T
        assert torch.corrcoef(lengths)[0, 1] > 0.75  # a shifted side would have no correlation


@pytest.mark.data
@needs_data
def test_a_perfect_output_scores_all_but_a_hundred(english: Callable[[str], list[str]]) -> None:
    """The ceiling: references, tokenised and put together again."""
    references = [en for _, en in multi30k("test_2016_flickr")]
    assert bleu([detokenize(english(text)) for text in references], references)[0] >= 99.9


@pytest.mark.data
@needs_data
def test_the_real_vocabulary_knows_the_training_split_alone() -> None:
    corpus = Corpus.load(limit=2_000)
    german, seen = tokenizer("de"), Counter[str]()
    for de, _ in multi30k("train")[:2_000]:
        seen.update(german(de))
    assert set(corpus.source.words[UNK + 1 :]) == {word for word, n in seen.items() if n >= 2}
    unseen = [w for words in corpus.sides["test_2016_flickr"][0] for w in words if w not in seen]
    assert len(unseen) > 100
    assert set(corpus.source.encode(unseen)) == {UNK}
    assert len(corpus.train) == 2_000
    longest = max(len(ids) for pair in corpus.train for ids in pair)
    assert next(bucketed(corpus.train, SHORT.tokens, seed=0)).src.shape[1] <= longest + 1
