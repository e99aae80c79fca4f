"""Chapter 13: byte-pair encoding by hand and by the library, word lists, and encoded corpora."""

import pickle
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from transformer_annotated.paper.multi30k import data_directory, multi30k
from transformer_annotated.paper.toy import BOS, EOS, PAD, SPECIAL, UNK, collate, pairs
from transformer_annotated.training import tokens as chapter
from transformer_annotated.training.corpora import ParallelCorpus
from transformer_annotated.training.tokens import (
    BYTES,
    BPETokenizer,
    EncodedCorpus,
    EncodedSplit,
    Tokenizer,
    WordTokenizer,
    apply_merges,
    byte_alphabet,
    byte_words,
    clean,
    encode_corpus,
    fingerprint,
    join,
    learn_merges,
    load_tokenizer,
    train_bpe,
    train_words,
)

SMALLEST = len(SPECIAL) + 256
NO_SURROGATES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
SENTENCES = [sentence for pair in pairs(300, seed=0) for sentence in pair]
TEXTS = [*SENTENCES, "wait... no!!!!! aaaaa aaaa aaa", "Zoë's café – „so“ 12 345", "日本 日本 日本"]


def bpe() -> BPETokenizer:
    """A small vocabulary of the small language."""
    return train_bpe(TEXTS, 500)


@cache
def bpe_once() -> BPETokenizer:
    return bpe()


def words() -> WordTokenizer:
    """The words of the small language."""
    return train_words(SENTENCES)


MAKE: dict[str, Any] = {"bpe": bpe, "words": words}


# Byte-pair encoding by hand


def test_join_goes_from_left_to_right() -> None:
    assert join("aaabab", ("a", "b")) == ("a", "a", "ab", "ab")
    assert join("aaaaa", ("a", "a")) == ("aa", "aa", "a")
    assert join((), ("a", "b")) == ()


def test_merges_of_four_words() -> None:
    """The words of Sennrich et al. 2016, Algorithm 1, counted by hand."""
    words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
    merges = learn_merges(words, 4)
    assert merges == [("e", "s"), ("es", "t"), ("l", "o"), ("lo", "w")]  # 9, 9, 7, 7
    assert apply_merges("lowest", merges) == ("low", "est")
    assert apply_merges("slow", merges) == ("s", "low")


def merges_by_counting_anew(words: dict[str, int], n: int, min_count: int) -> list[Any]:
    """Byte-pair encoding that counts every pair again for every merge."""
    pieces = {word: tuple(word) for word in words}
    ages = {character: i for i, character in enumerate(sorted(set("".join(words))))}
    merges: list[Any] = []
    while len(merges) < n:
        counts: Counter[Any] = Counter()
        for word, row in pieces.items():
            for pair in pairwise(row):
                counts[pair] += words[word]
        ranked = sorted(counts, key=lambda p: (-counts[p], ages[p[0]], ages[p[1]]))
        if not ranked or counts[ranked[0]] < min_count:
            break
        left, right = ranked[0]
        merges.append((left, right))
        ages.setdefault(left + right, len(ages))
        for word, row in pieces.items():
            marked = list(row)
            i = 0
            while i + 1 < len(marked):
                if marked[i] == left and marked[i + 1] == right:
                    marked[i : i + 2] = [left + right]
                i += 1
            pieces[word] = tuple(marked)
    return merges


WORDS = st.dictionaries(st.text("abc", min_size=1, max_size=8), st.integers(1, 5), max_size=8)


@settings(deadline=None, max_examples=60)
@given(WORDS, st.integers(0, 12), st.integers(1, 3))
def test_updated_counts_equal_new_counts(words: dict[str, int], n: int, least: int) -> None:
    assert learn_merges(words, n, least) == merges_by_counting_anew(words, n, least)


def test_rare_pairs_are_not_merged() -> None:
    assert learn_merges({"ab": 1, "cd": 2}, 9) == [("c", "d")]
    assert learn_merges({}, 9) == []


# The library


def test_merges_equal_to_the_library() -> None:
    ours = learn_merges(Counter(word for text in TEXTS for word in byte_words(text)), 600)
    assert len(ours) > 300
    assert ours == list(train_bpe(TEXTS, SMALLEST + 600).merges)


def pieces_by_hand(tokenizer: BPETokenizer, text: str) -> list[str]:
    """The pieces of a text: its words, each cut by `apply_merges`."""
    return [p for word in byte_words(text) for p in apply_merges(word, tokenizer.merges)]


TRICKY = st.one_of(NO_SURROGATES, st.lists(st.sampled_from("aab.!ñ ")).map("".join))


@settings(deadline=None, max_examples=40)
@given(st.lists(TRICKY, max_size=3))
def test_pieces_equal_to_the_library(texts: list[str]) -> None:
    tokenizer = bpe_once()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert [tokenizer.pieces[i] for i in ids] == pieces_by_hand(tokenizer, text)
        assert tokenizer.encode(text) == ids


def test_sentences_are_cut_as_by_hand() -> None:
    tokenizer = bpe()
    for text in TEXTS[:100] + TEXTS[-3:]:
        pieces = [tokenizer.pieces[i] for i in tokenizer.encode(text)]
        assert pieces == pieces_by_hand(tokenizer, text)


def test_the_order_of_the_texts_does_not_matter() -> None:
    shuffled = random.Random(0).sample(TEXTS, len(TEXTS))
    assert train_bpe(shuffled, 500) == bpe()


def test_vocabulary_size_is_reached_or_told() -> None:
    assert bpe().vocab_size == 500
    small = train_bpe(["ab ab ab"], 1000)
    assert SMALLEST < small.vocab_size < 1000
    assert small.vocab_size == len(small.pieces)
    assert train_bpe([], 1000).vocab_size == SMALLEST
    assert train_bpe(TEXTS, SMALLEST).merges == ()
    with pytest.raises(ValueError, match="vocab_size must be at least 260, got 259"):
        train_bpe(TEXTS, 259)


def test_min_count() -> None:
    assert train_bpe(["xyz"], 1000).merges == ()
    assert train_bpe(["xyz"], 1000, min_count=1).merges != ()


def test_two_ways_to_one_piece_share_an_id() -> None:
    merges = (("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc"))
    tokenizer = BPETokenizer(merges)
    assert tokenizer.vocab_size == SMALLEST + 3
    assert tokenizer.decode(tokenizer.encode("abc")) == "abc"


@pytest.mark.parametrize(
    "merges",
    [
        [("a", "bc")],
        [("a", "b"), ("a", "b")],
        [("ä", "b"), ("€", "x")],
        [("a", "")],
        [("e", "o"), ("eo", "s"), ("<", "eos"), ("<eos", ">")],
    ],
)
def test_impossible_merges(merges: list[Any]) -> None:
    with pytest.raises(ValueError, match="must join two pieces that exist already"):
        BPETokenizer(tuple(merges))


# Text and back


def test_bytes_have_256_visible_characters() -> None:
    alphabet = byte_alphabet()
    assert sorted(alphabet) == list(range(256))
    assert len(set(alphabet.values())) == 256
    assert all(c.isprintable() and not c.isspace() for c in alphabet.values())
    assert alphabet[ord(" ")] == "Ġ"
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(alphabet.values()) == set(ByteLevel.alphabet())


@settings(deadline=None)
@given(NO_SURROGATES)
def test_round_trip(text: str) -> None:
    tokenizer = bpe_once()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == clean(text)
    assert all(UNK < i < tokenizer.vocab_size for i in ids)


ODD = [
    "",
    " ",
    "   ",
    "\t",
    "\n",
    "a  b",
    " a ",
    "\u2028\x85",
    "\x00",
    "日本 ☕",
    "\ufeff",
    "�",
    "Ġ",
]


def test_odd_texts_come_back() -> None:
    tokenizer = bpe()
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_strings_are_text() -> None:
    text = " ".join(SPECIAL) + " <eos> <pad>x"
    texts = [text] * 50
    for tokenizer in (bpe(), train_bpe(texts, 400)):
        ids = tokenizer.encode(text)
        assert min(ids) > UNK
        assert tokenizer.decode(ids) == text
    assert set(train_words(texts).encode("<eos> <pad> <bos> <unk>")) == {UNK}


def test_the_first_word_is_spelt_like_any_other() -> None:
    tokenizer = bpe()
    assert tokenizer.encode("der Mann") == tokenizer.encode("der") + tokenizer.encode("Mann")


def test_ids_fit_the_batches_of_part_one() -> None:
    assert (PAD, BOS, EOS, UNK) == (0, 1, 2, 3)
    tokenizer = bpe()
    assert tokenizer.pieces[: len(SPECIAL)] == SPECIAL
    batch = collate([(tokenizer.encode(a), tokenizer.encode(b)) for a, b in pairs(4, seed=1)])
    for row, (_, english) in zip(batch.tgt_out.tolist(), pairs(4, seed=1), strict=True):
        assert tokenizer.decode(row) == english
    assert [tokenizer.decode(row) for row in batch.tgt_in] == [b for _, b in pairs(4, seed=1)]


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_decode_stops_at_eos(kind: str) -> None:
    tokenizer = MAKE[kind]()
    ids = tokenizer.encode("der Mann")
    assert tokenizer.decode([BOS, *ids, EOS, *ids, PAD]) == "der Mann"
    assert tokenizer.decode([PAD, *ids]) == "der Mann"
    assert tokenizer.decode([]) == tokenizer.decode([EOS, 5]) == ""
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, {tokenizer.vocab_size}\)"):
            tokenizer.decode([bad])


def test_broken_bytes_become_a_sign() -> None:
    tokenizer = bpe()
    half = next(i for i, piece in enumerate(tokenizer.pieces) if piece == BYTES[0xC3])
    assert tokenizer.decode([half]) == "\ufffd"
    assert tokenizer.decode([UNK]) == "\ufffd"


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_two_spellings_are_one(kind: str) -> None:
    tokenizer = MAKE[kind]()
    composed, apart = "M\u00e4dchen \u00e9", "Ma\u0308dchen e\u0301"
    assert composed != apart
    assert tokenizer.encode(composed) == tokenizer.encode(apart)
    assert train_words([composed]) == train_words([apart])
    assert train_bpe([composed] * 9, 300) == train_bpe([apart] * 9, 300)


@pytest.mark.parametrize("kind", ["bpe", "words"])
def test_lone_surrogates_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="lone surrogate '\\\\ud83d' at character 3"):
        MAKE[kind]().encode("ok \ud83d")
    with pytest.raises(ValueError, match="lone surrogate"):
        train_bpe(["fine", "\udc00"], 300)


@pytest.mark.parametrize("kind", ["bpe", "words"])
@pytest.mark.parametrize("text", ["x" * 1_000_000, "é" * 500_000], ids=["x", "é"])
def test_a_line_of_a_megabyte(kind: str, text: str) -> None:
    tokenizer = MAKE[kind]()
    start = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - start < 10
    assert len(ids) <= len(text.encode()) + 1


# Words


def test_words_of_the_small_language_come_back() -> None:
    tokenizer = words()
    for text in SENTENCES:
        ids = tokenizer.encode(text)
        assert UNK not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("der Xylophonist") == [*tokenizer.encode("der"), UNK]
    assert tokenizer.encode("  ") == tokenizer.encode("") == []
    assert tokenizer.encode("qqq www") == [UNK, UNK]
    assert tokenizer.decode([UNK, UNK]) == "<unk> <unk>"


def test_word_list_is_bounded() -> None:
    assert train_words(["a a b c c c"], max_size=6).words.words == (*SPECIAL, "c", "a")
    assert train_words(["a a b"], min_count=2).vocab_size == len(SPECIAL) + 1


@pytest.mark.parametrize("language", ["en", "de", "xx"])
def test_words_by_rules(language: str) -> None:
    text = "A dog, a cat. Two dogs!"
    tokenizer = train_words([text], language)
    assert tokenizer.split("dogs!") == ["dogs", "!"]
    assert tokenizer.decode(tokenizer.encode(text)) == text


# Files of tokenizers


@pytest.mark.parametrize("make", [bpe, words, lambda: train_words(["a b"], "en")])
def test_json_round_trip(make: Any) -> None:
    tokenizer = make()
    again = load_tokenizer(tokenizer.to_json())
    assert again == tokenizer
    assert again.to_json() == tokenizer.to_json()
    assert again.sha256 == tokenizer.sha256 == fingerprint(tokenizer.to_json())
    assert again.vocab_size == tokenizer.vocab_size
    assert again.encode("der Hund a b") == tokenizer.encode("der Hund a b")
    thawed = pickle.loads(pickle.dumps(tokenizer))
    assert thawed.encode("der Hund") == tokenizer.encode("der Hund")


def test_every_difference_changes_the_fingerprint() -> None:
    plain = words()
    kinds = [bpe(), train_bpe(TEXTS, 499), plain, replace(plain, language="de")]
    assert len({tokenizer.sha256 for tokenizer in kinds}) == len(kinds)
    swapped = BPETokenizer((("a", "b"), ("c", "d"))), BPETokenizer((("c", "d"), ("a", "b")))
    assert swapped[0].sha256 != swapped[1].sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[]", "kind must be"),
        ('{"kind": "unigram"}', "kind must be 'bpe' or 'words', got 'unigram'"),
        ('{"kind": "bpe"}', "merges must be a list of pairs"),
        ('{"kind": "bpe", "merges": ["a b"]}', "merges must be a list of pairs"),
        ('{"kind": "bpe", "merges": [["a"]]}', "merges must be a list of pairs"),
        ('{"kind": "bpe", "merges": [["a", 1]]}', "merges must be a list of pairs"),
        ('{"kind": "bpe", "merges": [["a", "bc"]]}', r"merges\[0\] must join"),
        ('{"kind": "words", "words": "abc"}', "words must be a list"),
        ('{"kind": "words", "words": ["a"], "language": 3}', "its language a text"),
        ('{"kind": "words", "words": ["a", "a"], "language": null}', "distinct"),
        (BPETokenizer((("a", "b"),)).to_json()[:-5], "is no JSON"),
    ],
)
def test_damaged_tokenizers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(text)


# Encoded corpora


@dataclass(frozen=True)
class Small:
    """What `encode_corpus` uses of a corpus."""

    data: dict[str, list[tuple[str, str]]] = field(
        default_factory=lambda: {
            "train": pairs(40, seed=3),
            "val": pairs(5, seed=4),
            "test": [("", "x"), ("der Hund " * 40, "the dog"), ("ein\u2028Hund", "Cafe\u0301")],
        }
    )
    name: str = "small"
    source: str = "de"
    target: str = "en"

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.data)

    def stream(self, split: str) -> Iterator[tuple[str, str]]:
        yield from self.data[split]


def encoded(corpus: Any = None, tokenizer: Tokenizer | None = None, **more: Any) -> EncodedCorpus:
    return encode_corpus(corpus or Small(), tokenizer or bpe_once(), **more)


def same(a: EncodedCorpus, b: EncodedCorpus) -> bool:
    return a.key == b.key and all(
        list(a.splits[name]) == list(split)
        and a.splits[name].sources == split.sources
        and a.splits[name].references == split.references
        for name, split in b.splits.items()
    )


def test_pairs_come_back_as_encoded() -> None:
    corpus, tokenizer = Small(), bpe()
    result = encode_corpus(corpus, tokenizer)
    for name, data in corpus.data.items():
        split = result.splits[name]
        assert len(split) == len(data)
        assert list(split) == [(tokenizer.encode(a), tokenizer.encode(b)) for a, b in data]
        assert split[-1] == split[len(split) - 1]
        assert split[1:3] == [split[1], split[2]]
        assert split.lengths.tolist() == [[len(a), len(b)] for a, b in split]
        assert split.lengths.dtype == torch.int64
        for wrong in (len(split), -len(split) - 1):
            with pytest.raises(IndexError):
                split[wrong]
    collate(result.splits["train"][:4])


def test_raw_text_is_kept_for_scores() -> None:
    corpus = Small()
    result = encoded(corpus)
    for name in ("val", "test"):
        assert result.splits[name].sources == [a for a, _ in corpus.data[name]]
        assert result.splits[name].references == [b for _, b in corpus.data[name]]
    assert result.splits["train"].sources == result.splits["train"].references == []


def test_only_training_pairs_are_left_out() -> None:
    long, short, empty = ("der Hund " * 9, "a dog"), ("ein Hund", "a dog"), ("", "a dog")
    data = [long, short, empty, short, ("ein Hund", "")]
    result = encoded(Small({"train": data, "val": data, "test": data}), words(), max_length=5)
    assert [len(result.splits[name]) for name in ("train", "val", "test")] == [2, 5, 5]
    assert result.left_out == 3
    assert encoded(Small({"train": data}), words()).left_out == 2
    exact = encoded(Small({"train": [("ein Hund", "a dog")]}), words(), max_length=2)
    assert len(exact.splits["train"]) == 1
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        encoded(max_length=0)


def test_more_than_one_chunk() -> None:
    data = [(f"a{i} b", f"c{i % 7}") for i in range(20_001)]
    result = encoded(Small({"train": data}), train_words(x for pair in data[:50] for x in pair))
    assert len(result.splits["train"]) == len(data)
    assert result.splits["train"][20_000][0][1] == result.splits["train"][0][0][1]


def test_no_pairs(tmp_path: Path) -> None:
    result = encoded(Small({"train": [], "val": []}))
    result.save(tmp_path / "none")
    again = EncodedCorpus.load(tmp_path / "none")
    assert len(again.splits["train"]) == 0
    assert again.splits["train"].lengths.shape == (0, 2)


def test_a_corpus_of_chapter_12() -> None:
    """Any `ParallelCorpus`; its `stream` is all that is used of it."""
    corpus = ParallelCorpus("mine", "de", "en", read=lambda split: iter(pairs(20, seed=len(split))))
    result = encode_corpus(corpus, bpe_once())
    assert (result.name, result.source, result.target) == ("mine", "de", "en")
    assert set(result.splits) == set(corpus.splits)
    tokenizer = load_tokenizer(result.tokenizer_json)
    test = result.splits["test"]
    assert [tokenizer.decode(target) for _, target in test] == test.references
    assert test.references == [english for _, english in corpus.pairs("test")]


# One file


def test_saved_and_loaded(tmp_path: Path) -> None:
    corpus = encoded(max_length=50)
    path = tmp_path / "new folder" / "corpus.safetensors"
    corpus.save(path)
    again = EncodedCorpus.load(path)
    assert same(corpus, again)
    assert (again.name, again.source, again.target) == ("small", "de", "en")
    assert (again.left_out, again.max_length) == (corpus.left_out, 50)
    assert again.tokenizer_sha256 == bpe().sha256
    assert load_tokenizer(again.tokenizer_json) == bpe()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


BARE = """
import sys
for name in ("spacy", "tokenizers"):
    sys.modules[name] = None
from pathlib import Path
from transformer_annotated.training.tokens import EncodedCorpus, load_tokenizer
corpus = EncodedCorpus.load(Path(sys.argv[1]))
tokenizer = load_tokenizer(corpus.tokenizer_json)
print(tokenizer.decode(corpus.splits["val"][0][1]) == corpus.splits["val"].references[0])
"""


def test_loading_needs_neither_spacy_nor_tokenizers(tmp_path: Path) -> None:
    encoded().save(tmp_path / "corpus")
    command = [sys.executable, "-c", BARE, str(tmp_path / "corpus")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("True", "")


@pytest.mark.parametrize("step", ["safetensors.torch.save_file", "os.fsync", "os.replace"])
def test_a_broken_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "corpus"
    old, new = encoded(), encoded(Small(name="other"))
    old.save(path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(step, full)
    with pytest.raises(OSError, match="no space left"):
        new.save(path)
    monkeypatch.undo()
    assert same(EncodedCorpus.load(path), old)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def test_the_file_appears_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "corpus", []
    replace_file = chapter.os.replace

    def watched(part: Path, whole: Path) -> None:
        seen.append((Path(part).parent == tmp_path, whole.exists(), EncodedCorpus.load(part).name))
        replace_file(part, whole)

    monkeypatch.setattr("os.replace", watched)
    encoded().save(path)
    assert seen == [(True, False, "small")]


def damaged(path: Path, how: str) -> None:
    """Damage an encoded corpus."""
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("ein Hund\n")
    elif how == "tokenizer":
        path.write_bytes(data.replace(b"bpe", b"bqe", 1))
    elif how == "format":
        path.write_bytes(data.replace(b"encoded_corpus.1", b"encoded_corpus.9", 1))
    elif how == "weights":
        save_file({"a": torch.zeros(2)}, path)
    elif how == "offsets":
        corpus = EncodedCorpus.load(path)
        corpus.splits["val"].offsets[0][1] = 10_000
        corpus.save(path)
    elif how == "tensor":
        header, tensors = chapter._read(path)
        del tensors["val.text"]
        save_file(tensors, path, metadata=header)


@pytest.mark.parametrize(
    "how", ["cut", "empty", "text", "tokenizer", "format", "weights", "offsets", "tensor"]
)
def test_damaged_files_are_refused(tmp_path: Path, how: str) -> None:
    path = tmp_path / "corpus"
    encoded(cache=path)
    damaged(path, how)
    with pytest.raises(ValueError, match="corpus"):
        EncodedCorpus.load(path)
    data = path.read_bytes()
    with pytest.raises(ValueError, match="corpus is in the way, delete it"):
        encoded(cache=path)
    assert path.read_bytes() == data


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file"):
        EncodedCorpus.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        EncodedCorpus.load(tmp_path)


def test_wrong_offsets() -> None:
    ids = torch.zeros(4, dtype=torch.int32)
    good = torch.tensor([0, 3, 4])
    for bad in ([1, 3, 4], [0, 3, 5], [0, 5, 4], []):
        with pytest.raises(ValueError, match="offsets must rise from 0 to 4"):
            EncodedSplit((ids, ids), (good, torch.tensor(bad, dtype=torch.int64)), [], [])
    with pytest.raises(ValueError, match="equally long"):
        EncodedSplit((ids, ids), (good, torch.tensor([0, 4])), [], [])


# The cache


class Unwilling:
    """A tokenizer that must not encode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.sha256, self.vocab_size = tokenizer.sha256, tokenizer.vocab_size

    def encode_batch(self, texts: Any) -> Any:
        raise AssertionError("encoded, where the file should have been read")


def test_a_cached_corpus_is_read(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    first = encoded(cache=path)
    written = path.stat().st_mtime_ns
    again = encode_corpus(Small(), Unwilling(bpe()), path)  # type: ignore[arg-type]
    assert same(first, again)
    assert path.stat().st_mtime_ns == written


CHANGES: dict[str, Any] = {
    "tokenizer": lambda: {"tokenizer": train_bpe(TEXTS, 499)},
    "name": lambda: {"corpus": Small(name="other")},
    "source": lambda: {"corpus": Small(source="fr")},
    "target": lambda: {"corpus": Small(target="fr")},
    "max_length": lambda: {"max_length": 7},
}


@pytest.mark.parametrize("what", CHANGES)
def test_another_corpus_is_written_anew(what: str) -> None:
    change = CHANGES[what]()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus"
        first = encoded(cache=path)
        second = encoded(cache=path, **change)
        assert second.key != first.key
        assert same(second, encoded(**change))
        assert same(EncodedCorpus.load(path), second)


# The exercises


def test_exercise_hug() -> None:
    """By hand: ug 20, un 16, hug 15."""
    words = {"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}
    assert learn_merges(words, 3) == [("u", "g"), ("u", "n"), ("h", "ug")]


# A real corpus


@pytest.mark.data
def test_multi30k() -> None:
    if not (data_directory() / "multi30k" / "train.de.gz").exists():
        pytest.skip("Multi30k is not at hand: set TRANSFORMER_ANNOTATED_DATA")
    texts = [text for pair in multi30k("train")[:1500] for text in pair]
    tokenizer = train_bpe(texts, SMALLEST + 300)
    counts = Counter(word for text in texts for word in byte_words(text))
    assert list(tokenizer.merges) == learn_merges(counts, 300)
    test = [text for pair in multi30k("test_2016_flickr") for text in pair]
    assert [tokenizer.decode(ids) for ids in tokenizer.encode_batch(test)] == test
