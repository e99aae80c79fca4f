# %% [markdown]
r"""
# Tokens

A list of words never holds the next compound. Pieces of words, learnt by counting, spell anything.
Byte-pair encoding in forty lines, the fast library beside it, and a corpus encoded once.
"""

# %% [markdown]
# Chapter 11 cut text into words, and some words of the test set were in no list. The paper cut text into smaller pieces. This chapter
# learns such pieces, checks them against a fast library, and stores a whole corpus as numbers.

# %% mystnb={"figure": {"caption": "Chapter 13 of Part II: text becomes numbers.", "name": "fig-map-tokens"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The second, Tokens, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(13);

# %%
import hashlib
import json
import os
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from transformer_annotated.paper.first_translation import Ids
from transformer_annotated.paper.multi30k import detokenize, tokenizer
from transformer_annotated.paper.toy import BOS, EOS, PAD, SPECIAL, Vocabulary
from transformer_annotated.training.corpora import ParallelCorpus

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# ## Two spellings of one letter
#
# Before any cutting, one trap. Unicode can write *é* in two ways: as one character, or as an *e* followed by an accent that is put on top. They look the same and compare as different.
# `clean` brings text into the shorter form, called **NFC**, once and in one place. It also refuses half characters, so-called lone surrogates, which a damaged file may hold and which cannot be written as UTF-8.

# %%
def clean(text: str) -> str:
    """The text in Unicode's composed form, NFC: one spelling for an é, not two.

    Raises ValueError for half of a surrogate pair, which no UTF-8 can hold.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be Unicode, got the lone surrogate {text[error.start]!r} "
            f"at character {error.start}"
        ) from error
    return unicodedata.normalize("NFC", text)

# %% tags=["active-ipynb"]
# one, two = "Caf\u00e9", "Cafe\u0301"
# print(one, two, one == two, clean(one) == clean(two))
# try:
#     clean("a broken smile \ud83d")
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## What a tokenizer is
#
# A **tokenizer** turns text into ids and ids into text. It says how many ids there are. It can be written as JSON text, and the SHA-256 of that text is its fingerprint: ids mean nothing without the tokenizer that
# made them, so later chapters store the text beside the weights, and refuse to go on with another.

# %%
class Tokenizer(Protocol):
    """What training asks of a tokenizer. The ids 0 to 3 are PAD, BOS, EOS and UNK of Chapter 9.

    `encode` and `encode_batch` give ids without PAD, BOS and EOS. `decode` stops at the first EOS.
    """

    @property
    def vocab_size(self) -> int: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def decode(self, ids: Iterable[int]) -> str: ...
    def to_json(self) -> str: ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without special ones. Raises ValueError for a lone surrogate."""
        return self.encode_batch([text])[0]

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of `to_json()`: equal for equal tokenizers, and for no others."""
        return fingerprint(self.to_json())


def fingerprint(json_text: str) -> str:
    """The SHA-256 of a tokenizer's JSON text."""
    return hashlib.sha256(json_text.encode()).hexdigest()


def real_ids(ids: Iterable[int], vocab_size: int) -> Iterator[int]:
    """Ids up to the first EOS, without PAD and BOS; ValueError outside [0, vocab_size)."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"ids must lie in [0, {vocab_size}), got {i}")
        if i == EOS:
            return
        if i not in (PAD, BOS):
            yield int(i)

# %% [markdown]
# The first tokenizer is that of Chapter 11: words by spaCy's rules, looked up in a list.

# %%
@dataclass(frozen=True)
class WordTokenizer(Tokenizer):
    """Whole words from a list; every other word is UNK.

    `language` chooses spaCy's rules: "de", "en", or "xx" for several languages at once.
    Without one, words are cut at spaces: enough for the small language of Chapter 9.
    """

    words: Vocabulary
    language: str | None = None

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        return len(self.words)

    def split(self, text: str) -> list[str]:
        """The words of a text, as they are."""
        return _splitter(self.language)(clean(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text's words. Raises ValueError for a lone surrogate."""
        return [self.words.encode(self.split(text)) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: up to the first EOS, without PAD and BOS.

        Words are joined by `detokenize`, whose rules are English, or by spaces without a language.
        Raises ValueError for an id that does not exist.
        """
        words = self.words.decode(real_ids(ids, self.vocab_size))
        return " ".join(words) if self.language is None else detokenize(words)

    def to_json(self) -> str:
        """All there is to know, as JSON text: the same text for the same words."""
        words = self.words.words[len(SPECIAL) :]
        state = {"kind": "words", "language": self.language, "words": words}
        return json.dumps(state, ensure_ascii=False)


@cache
def _splitter(language: str | None) -> Callable[[str], list[str]]:
    return str.split if language is None else tokenizer(language)


def train_words(
    texts: Iterable[str],
    language: str | None = None,
    *,
    min_count: int = 1,
    max_size: int | None = None,
) -> WordTokenizer:
    """A word list from texts: what was seen `min_count` times, at most `max_size` ids."""
    split = WordTokenizer(Vocabulary(SPECIAL), language).split
    words = Vocabulary.build(map(split, texts), min_count, max_size)
    return WordTokenizer(words, language)

# %% [markdown]
# The rest of the page uses Multi30k. The tests run it on the small language, so that nothing has to be fetched.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
# from transformer_annotated.paper.toy import UNK
# from transformer_annotated.training.corpora import open_corpus
#
# full = scale() == "full"
# corpus = open_corpus("multi30k" if full else "toy")
# train_text, test_text = corpus.pairs("train"), corpus.pairs("test")
# if not full:
#     train_text, test_text = train_text[:1000], test_text[:100]
# print(f"{corpus.name}: {len(train_text):,} pairs to train on, {len(test_text):,} to test on")

# %% [markdown]
# One list a language, of the words seen at least twice in training. How many words of the test set are missing from the list of their language?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# languages = {"German": ("de", 0), "English": ("en", 1)}
# lists = {}
# for language, (code, side) in languages.items():
#     lists[language] = train_words((pair[side] for pair in train_text), code, min_count=2)
#     coded = [lists[language].encode(pair[side]) for pair in test_text]
#     unknown = sum(row.count(UNK) for row in coded) / sum(map(len, coded))
#     touched = sum(UNK in row for row in coded) / len(coded)
#     print(
#         f"{language:8} {lists[language].vocab_size:6,} words   {unknown:.1%} of the test words "
#         f"unknown, in {touched:.0%} of the sentences"
#     )

# %% [markdown]
# A few per cent sounds harmless. The second percentage does not: a sentence has a dozen words, so a large part of the German sentences have a hole.
#
# ## Counting pairs
#
# Take four words and how often each was seen, an example of {cite:t}`sennrich2016neural`: *low* 5 times, *lower* 2, *newest* 6, *widest* 3. Cut each into characters. Which two neighbours
# stand together most often? *e* and *s*: six times in *newest* and three in *widest*, nine in all. *s* and *t* do so as well. Such a tie needs a rule, which follows below; here *e* and *s* win. Join them to a new piece, *es*. Count again: *es* and *t*, nine. Then *l* and *o*, seven; *o* and *w* have seven too.
#
# That is **byte-pair encoding**, BPE. Each **merge** joins the most frequent pair $(a, b)$ of neighbours:
#
# $$
# (a, b)^* = \arg\max_{(a, b)} \sum_{w} c(w)\, n_{ab}(w)
# $$ (eq-merge)
#
# Here $c(w)$ says how often word $w$ was seen, and $n_{ab}(w)$ at how many places of $w$ the piece $b$ follows $a$. The merges never cross the border of a word, so it is enough to know the
# words and their counts. Two functions do it. The first joins a pair in one word.

# %%
Merge = tuple[str, str]


def join(pieces: Sequence[str], pair: Merge) -> tuple[str, ...]:
    """The pieces, with every `pair` of neighbours joined, from left to right."""
    joined: list[str] = []
    for piece in pieces:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)

# %% tags=["active-ipynb"]
# print(join("newest", ("e", "s")))
# print(join("aaaaa", ("a", "a")))

# %% [markdown]
# The second learns. Counting every pair again for each merge would be simple and slow. `where` remembers which words hold a pair. Only for these words the counts are taken back before a merge, and added again after it.
# `age` decides ties. A character with a smaller Unicode number counts as older, and any character is older than a merged piece. The pair with the older left piece wins, and if these are equal, the one with the older right piece. Without such a rule two machines could learn two vocabularies.

# %%
def learn_merges(words: Mapping[str, int], n: int, min_count: int = 2) -> list[Merge]:
    """The first `n` merges of byte-pair encoding (Sennrich et al. 2016, section 3.2).

    `words` says how often each word was seen; a word's characters are the first pieces.
    Fewer merges come back where no pair is left that was seen `min_count` times.
    Among equally frequent pairs the one of older pieces wins; characters are ordered by number.
    """
    pieces = {word: tuple(word) for word in words}
    age = {piece: i for i, piece in enumerate(sorted(set().union(*words)))}
    counts: Counter[Merge] = Counter()
    where: defaultdict[Merge, set[str]] = defaultdict(set)

    def count(word: str, sign: int) -> None:
        for pair in pairwise(pieces[word]):
            counts[pair] += sign * words[word]
            where[pair].add(word)

    for word in words:
        count(word, +1)
    merges: list[Merge] = []
    while len(merges) < n and counts:
        best = max(counts, key=lambda pair: (counts[pair], -age[pair[0]], -age[pair[1]]))
        if counts[best] < min_count:
            break
        merges.append(best)
        age.setdefault("".join(best), len(age))
        for word in where.pop(best):
            count(word, -1)
            pieces[word] = join(pieces[word], best)
            count(word, +1)
        del counts[best]
    return merges

# %% tags=["active-ipynb"]
# four_words = {"low": 5, "lower": 2, "newest": 6, "widest": 3}
# four_merges = learn_merges(four_words, 4)
# for i, (left, right) in enumerate(four_merges, 1):
#     print(f"merge {i}: {left} + {right} = {left + right}")

# %% [markdown]
# The merges are all that is learnt. A new word is cut by making the same joins in the same order: of the pairs in the word, the one that was learnt first, until no known pair is left.

# %%
def apply_merges(word: str, merges: Sequence[Merge]) -> tuple[str, ...]:
    """The pieces of a word: its characters, joined in the order in which merges were learnt."""
    rank = {pair: i for i, pair in enumerate(merges)}
    pieces = tuple(word)
    while known := [pair for pair in pairwise(pieces) if pair in rank]:
        pieces = join(pieces, min(known, key=rank.__getitem__))
    return pieces

# %% tags=["active-ipynb"]
# for word in ("newest", "lowest", "slow", "xylophone"):
#     print(f"{word:10}", *apply_merges(word, four_merges))

# %% [markdown]
# *lowest* was in no list. Now it is *low* and *est*, two pieces that mean something. *xylophone* shares one pair with the four words, and the rest of it is spelt letter by letter.
#
# Now German. Take one of the longest words of the test set that Chapter 11 could not read, and cut it with more and more merges, learnt from a few thousand sentences.

# %% tags=["hide-input"]
def draw_pieces(word: str, merges: Sequence[Merge], stops: Sequence[int]) -> "Figure":
    """One row of boxes for each number of merges in `stops`: the pieces of `word` after them."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(7.2, 0.34 * len(stops) + 0.5))
    for row, n in enumerate(stops):
        start = 0
        for piece in apply_merges(word, merges[:n]):
            colour = figures.COLORS[0] if len(piece) > 1 else "#DDE3EA"
            ink = "white" if len(piece) > 1 else "black"
            ax.barh(row, len(piece) - 0.12, left=start + 0.06, height=0.72, color=colour)
            ax.text(start + len(piece) / 2, row, piece, ha="center", va="center", color=ink)
            start += len(piece)
    ax.set(xlim=(0, len(word)), ylabel="merges learnt", xticks=[])
    ax.set_yticks(range(len(stops)), [f"{n:,}" for n in stops])
    ax.invert_yaxis()
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.tick_params(length=0)
    return figure

# %% mystnb={"figure": {"caption": "A compound grows together from letters. Frauen, ball and schaft appear; Mann does not.", "name": "fig-pieces"}, "image": {"alt": "Six rows of boxes that spell the word Frauenfu\u00dfballmannschaft. The top row has one box a letter; towards the bottom the boxes are fewer and longer."}} tags=["active-ipynb", "nbval-ignore-output"]
# seen = Counter(word for german, _ in train_text[:4000] for word in german.split())
# assert "Frauenfußballmannschaft" not in seen
# german_merges = learn_merges(seen, 1000)
# draw_pieces("Frauenfußballmannschaft", german_merges, (0, 10, 30, 100, 300, 1000));

# %% [markdown]
# In {numref}`fig-pieces` the pieces of the last row were learnt from other words: the sentences behind it do not hold this one, as the assertion checks. Not every piece is a part that a grammar knows. BPE has seen counts and nothing else.
#
# ## Bytes instead of characters
#
# A letter that never occurred in training would still be unknown. So cut one step finer. UTF-8 writes every text with at most 256 different **bytes**, one to four for a character. Start from the
# bytes, and nothing can be unknown, in any script {cite:p}`radford2019language`. To print them, each byte gets a visible character; the space is written as Ġ.

# %%
def byte_alphabet() -> dict[int, str]:
    """A visible character for each of the 256 bytes (Radford et al. 2019); a space is Ġ."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


BYTES = byte_alphabet()
PIECE_BYTES = {character: byte for byte, character in BYTES.items()}


def spaced(text: str) -> str:
    """The clean text with a space in front, so that a first word is spelt like any other."""
    return " " + clean(text) if text else ""

# %% tags=["active-ipynb"]
# for text in ("a dog", "Tür", "日本"):
#     print(f"{text:6}", "".join(BYTES[byte] for byte in spaced(text).encode()))

# %% [markdown]
# The space belongs to the word that follows it. That marks where words begin, and the way back gives exactly the cleaned text: put the pieces side by side, read the bytes as UTF-8, drop the first space.
#
# Words must be found before pairs are counted. The library `tokenizers`, written in Rust, cuts text as the language model GPT-2 does: into words, numbers and rows of signs, each with the space before it. We use its cutter for our lines and for the library's, and compare the merges.

# %%
def fast_bpe(ids: Mapping[str, int] | None = None, merges: Sequence[Merge] = ()) -> Any:
    """A `tokenizers.Tokenizer`: cut at spaces, signs and numbers, to bytes, then merge.

    It works on one core unless `TOKENIZERS_PARALLELISM` says otherwise: after using several, it
    would complain when a data loader forks.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = models.BPE() if ids is None else models.BPE(vocab=dict(ids), merges=list(merges))
    fast = Tokenizer(model)
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast


@cache
def _cutter() -> Any:
    return fast_bpe().pre_tokenizer


def byte_words(text: str) -> list[str]:
    """The words of a text, each with the space before it, in the visible alphabet of bytes."""
    return [word for word, _ in _cutter().pre_tokenize_str(spaced(text))]

# %% tags=["active-ipynb"]
# print(byte_words("A dog, 2 cats -- and a Tür."))

# %% [markdown]
# ## The tokenizer of this book
#
# Our tokenizer keeps the merges and nothing else. The ids follow from them: four special ones, 256 bytes, and one for each merge, in order. So its JSON is short, and its fingerprint does not depend on the version of a library.

# %%
@dataclass(frozen=True)
class BPETokenizer(Tokenizer):
    """Byte-pair encoding of bytes, one vocabulary for all languages (the paper, section 5.1).

    Ids: the four special ones, the 256 bytes, then one new piece a merge. Encoding is exact: nothing
    is unknown, and `decode(encode(text))` is `clean(text)`. Special ids never come from text.

    `merges` are pairs of pieces in the order in which they were learnt.
    Raises ValueError for a merge of pieces that do not exist yet, or a repeated one.
    """

    merges: tuple[Merge, ...]

    def __post_init__(self) -> None:
        known, seen = set(PIECE_BYTES), set[Merge]()
        for i, (left, right) in enumerate(self.merges):
            if not {left, right} <= known or (left, right) in seen or left + right in SPECIAL:
                raise ValueError(
                    f"merges[{i}] must join two pieces that exist already, for the first time and "
                    f"not to a special one, got {left!r} and {right!r}"
                )
            known.add(left + right)
            seen.add((left, right))

    @cached_property
    def pieces(self) -> tuple[str, ...]:
        """Every piece in the order of its id, in the visible alphabet of `byte_alphabet`."""
        joined = ("".join(pair) for pair in self.merges)
        return tuple(dict.fromkeys([*SPECIAL, *sorted(PIECE_BYTES), *joined]))

    @property
    def vocab_size(self) -> int:
        """How many ids there are, the special ones included."""
        return len(self.pieces)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text. Raises ValueError for a lone surrogate."""
        return [list(code.ids) for code in self._fast.encode_batch([spaced(t) for t in texts])]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids: up to the first EOS, without PAD and BOS; UNK becomes U+FFFD.

        Bytes that are no UTF-8 become U+FFFD too. Raises ValueError for an id that does not exist.
        """
        data = b"".join(self._bytes[i] for i in real_ids(ids, self.vocab_size))
        return data.decode(errors="replace").removeprefix(" ")

    def to_json(self) -> str:
        """All there is to know, as JSON text: the same text for the same merges."""
        return json.dumps({"kind": "bpe", "merges": self.merges}, ensure_ascii=False)

    @cached_property
    def _bytes(self) -> list[bytes]:
        pieces = self.pieces[len(SPECIAL) :]
        return [
            b"",
            b"",
            b"",
            "\ufffd".encode(),
            *(bytes(PIECE_BYTES[c] for c in p) for p in pieces),
        ]

    @cached_property
    def _fast(self) -> Any:
        return fast_bpe({piece: i for i, piece in enumerate(self.pieces)}, self.merges)

# %% [markdown]
# `decode` is a join of bytes and needs no library. A model may write bytes that are no text, half an *ü* for instance; they become the sign �. Training is left to the library:

# %%
def train_bpe(texts: Iterable[str], vocab_size: int, *, min_count: int = 2) -> BPETokenizer:
    """Learn a shared vocabulary of `vocab_size` ids from texts of all languages.

    The smallest is 260: four special ids and 256 bytes. A small text may not hold enough pairs seen
    `min_count` times; then the vocabulary is smaller, and its `vocab_size` says so.

    Raises ValueError for a `vocab_size` below 260 and for a lone surrogate in a text.
    """
    smallest = len(SPECIAL) + len(BYTES)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest}, got {vocab_size}")
    fast = fast_bpe()
    from tokenizers.trainers import BpeTrainer

    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        min_frequency=min_count,
        initial_alphabet=list(PIECE_BYTES),
        show_progress=False,
    )
    fast.train_from_iterator((spaced(text) for text in texts), trainer)
    return BPETokenizer(tuple(map(tuple, json.loads(fast.to_str())["model"]["merges"])))

# %% [markdown]
# Is it the algorithm above? The proof: the same sentences, learnt by the forty lines and by the library, must give the same merges in the same order; and sentences must be cut into the same pieces.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# sample = [text for pair in train_text[:1000] for text in pair]
# counts = Counter(word for text in sample for word in byte_words(text))
# start = time.process_time()
# ours = learn_merges(counts, 500)
# middle = time.process_time()
# theirs = train_bpe(sample, 260 + 500)
# end = time.process_time()
# assert ours == list(theirs.merges)
# for text in sample[:500]:
#     pieces = [piece for word in byte_words(text) for piece in apply_merges(word, ours)]
#     assert pieces == [theirs.pieces[i] for i in theirs.encode(text)]
# print(f"{len(ours)} merges are equal, and the pieces of {len(sample[:500])} sentences")
# print(f"our lines {middle - start:.2f} s, the library {end - middle:.2f} s")

# %% [markdown]
# And the way back is exact, for text that was never seen, for two spaces, for a script without spaces, and for text that looks like one of our signs:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for text in ("", "  two  spaces ", "日本 ☕", "Cafe\u0301", "<eos> is text"):
#     ids = theirs.encode(text)
#     assert theirs.decode(ids) == clean(text)
#     assert all(i >= len(SPECIAL) for i in ids)
#     print(f"{text!r:18} {len(ids):3} ids, back to {theirs.decode(ids)!r}")

# %% [markdown]
# The text `<eos>` is five characters to the tokenizer. The id of the sign is 2, and no text can produce it: whoever writes `<eos>` into a sentence does not end it.
#
# A tokenizer is stored as its JSON text. `load_tokenizer` builds it again, and says what is wrong where it cannot.

# %%
def load_tokenizer(json_text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote.

    Raises ValueError that says what is wrong: no JSON, another kind, or a damaged list.
    """
    try:
        state = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the tokenizer is no JSON: {error}") from error
    kind = state.get("kind") if isinstance(state, dict) else None
    if kind == "bpe":
        merges = state.get("merges")
        if not _are_texts(merges, 2):
            raise ValueError("the tokenizer's merges must be a list of pairs of text")
        return BPETokenizer(tuple((left, right) for left, right in merges))
    if kind == "words":
        words, language = state.get("words"), state.get("language")
        if not _are_texts([words]) or not isinstance(language, str | None):
            raise ValueError("the tokenizer's words must be a list of text, its language a text")
        return WordTokenizer(Vocabulary((*SPECIAL, *words)), language)
    raise ValueError(f"the tokenizer's kind must be 'bpe' or 'words', got {kind!r}")


def _are_texts(rows: Any, length: int | None = None) -> bool:
    """Whether `rows` is a list of lists of text, each of that length."""
    return isinstance(rows, list) and all(
        isinstance(row, list)
        and length in (None, len(row))
        and all(isinstance(text, str) for text in row)
        for row in rows
    )

# %% tags=["active-ipynb", "nbval-ignore-output"]
# stored = theirs.to_json()
# assert load_tokenizer(stored) == theirs
# print(f"{len(stored):,} characters, SHA-256 {theirs.sha256[:16]}...")
# for damaged in (stored[:100], stored.replace('"bpe"', '"unigram"'), '{"kind": "bpe"}'):
#     try:
#         load_tokenizer(damaged)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## One vocabulary for two languages
#
# The paper has one vocabulary for both languages (section 5.1). So we learn the merges from the German and the English sentences together. Names, numbers and signs are written alike in both, and so are words that one
# language borrowed from the other. A frequent one becomes one piece with one vector. It is also what the single table of section 3.4 needs: source, target and output can share their numbers only if they share their ids.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# shared = train_bpe((text for pair in train_text for text in pair), 8000)
# used = [
#     Counter(i for row in shared.encode_batch(side) for i in row)
#     for side in zip(*train_text, strict=True)
# ]
# both = used[0].keys() & used[1].keys()
# print(
#     f"{shared.vocab_size:,} ids; {len(used[0]):,} used in German, {len(used[1]):,} in English, "
#     f"{len(both):,} in both"
# )
# share = sum(count[i] for count in used for i in both) / sum(map(Counter.total, used))
# print(f"{share:.0%} of all tokens are pieces that both use; the longest of them:")
# text = {i: shared.decode([i]) for i in both if min(used[0][i], used[1][i]) >= 20}
# print(", ".join(sorted(sorted(text.values()), key=len)[-12:]))

# %% [markdown]
# Some of the shared pieces are such words; others are rows of letters that each language uses in its own way.
#
# ## How many pieces?
#
# More merges make longer pieces, and shorter sentences. Attention compares every position with every other one, so length costs. But each id costs a row of $D$ numbers in the table, and a rare piece is seldom
# trained. The merges are a list in order, so a smaller vocabulary is simply the beginning of a larger one: we learn once and cut the list.

# %% mystnb={"figure": {"caption": "Each doubling of the vocabulary shortens the sentences, and each by less than the one before.", "name": "fig-vocabulary-size"}, "image": {"alt": "Two falling curves over the vocabulary size on a logarithmic axis: tokens in a German and in an English sentence. Two dashed lines, the number of words, lie just below the right ends of the curves."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# sizes = [500, 1000, 2000, 4000, 8000, 16000]
# largest = train_bpe((text for pair in train_text for text in pair), sizes[-1])
# ax = plt.subplots(figsize=(6.0, 3.0))[1]
# for (language, (_, side)), colour in zip(languages.items(), figures.COLORS, strict=False):
#     texts = [pair[side] for pair in test_text]
#     mean = [
#         sum(map(len, BPETokenizer(largest.merges[: size - 260]).encode_batch(texts))) / len(texts)
#         for size in sizes
#     ]
#     words = sum(map(len, lists[language].encode_batch(texts))) / len(texts)
#     ax.plot(sizes, mean, "o-", color=colour, label=f"{language}, pieces")
#     ax.axhline(words, color=colour, linestyle="--", label=f"{language}, words")
#     saved = [before - after for before, after in pairwise(mean)]
#     assert not full or saved == sorted(saved, reverse=True)
# ax.set(xscale="log", xlabel="vocabulary", ylabel="tokens in a sentence", ylim=(0, None))
# ax.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
# ax.set_xticks([], minor=True)
# ax.legend();

# %% [markdown]
# {numref}`fig-vocabulary-size` shows what a larger table buys. At its right end a sentence is only a little longer than with words, and still nothing is unknown. The largest vocabulary need not be the best one. A piece seen twice in the corpus is an input or an answer only twice in a pass over it, so little is learnt about it. Which size translates best is a question for the validation set, not for this figure; for Transformers on small corpora, {cite:t}`ding2019call` found rather small ones best.
#
# ## The ceiling
#
# Translate perfectly, cut the reference into tokens, put it together again, and score it. A tokenizer that loses something here loses it for every model. Chapter 11 called this score the ceiling, and measured it for cutting and joining alone. Now unknown words count as well: a model can only write words that it has.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.paper.multi30k import bleu
#
# for language, (_, side) in languages.items():
#     references = [pair[side] for pair in test_text]
#     for name, cut in (("words", lists[language]), ("pieces", shared)):
#         perfect = [cut.decode(ids) for ids in cut.encode_batch(references)]
#         print(f"{language:8} {name:7} ceiling {bleu(perfect, references)[0]:6.2f} BLEU")
#     assert perfect == references

# %% [markdown]
# With word lists even a perfect translator loses points: every hole is an error, and for German the joining rules are English ones. With pieces nothing is lost.
#
# ## A corpus, encoded once
#
# Tokenising takes time, and every run would repeat it. So a corpus is encoded once, into one file: all ids of a split end to end, and **offsets**, which say where each sentence begins. A machine that only trains needs this file, and neither spaCy nor the library.

# %%
@dataclass(eq=False)
class EncodedSplit(Sequence[Ids]):
    """Encoded pairs, end to end in two one-dimensional tensors, one for each side; `[i]` gives two lists of ids, no special ones.

    `ids`: int32, source and target. `offsets`: int64 `(N + 1,)` each; pair `i` is from
    `offsets[i]` to `offsets[i + 1]`. `sources`, `references`: the raw text, empty for training.

    Raises ValueError for offsets that do not rise from 0 to the number of ids.
    """

    ids: tuple[Tensor, Tensor]
    offsets: tuple[Tensor, Tensor]
    sources: list[str]
    references: list[str]

    def __post_init__(self) -> None:
        for ids, offset in zip(self.ids, self.offsets, strict=True):
            ends = offset[[0, -1]].tolist() if offset.numel() else []
            if ends != [0, len(ids)] or bool((offset.diff() < 0).any()):
                raise ValueError(f"offsets must rise from 0 to {len(ids)}, got ends {ends}")
        if len(self.offsets[0]) != len(self.offsets[1]):
            raise ValueError(
                f"offsets must be equally long for source and target, got "
                f"{len(self.offsets[0])} and {len(self.offsets[1])}"
            )

    def __len__(self) -> int:
        return len(self.offsets[0]) - 1

    def __getitem__(self, index: Any) -> Any:
        """Pair `index`, or a list of pairs for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # an index from the end, and IndexError
        spans = (offset[i : i + 2].tolist() for offset in self.offsets)
        source, target = (ids[a:b].tolist() for ids, (a, b) in zip(self.ids, spans, strict=True))
        return source, target

    @cached_property
    def sha256(self) -> str:
        """The fingerprint of all ids, in their order."""
        digest = hashlib.sha256()
        for tensor in (*self.ids, *self.offsets):
            digest.update(tensor.contiguous().numpy().data)
        return digest.hexdigest()

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens of each source and target, special ones not counted: int64 `(N, 2)`."""
        return torch.stack([offset.diff() for offset in self.offsets], dim=1)

# %% tags=["active-ipynb"]
# tiny = EncodedSplit(
#     ids=(torch.tensor([7, 8, 9, 7], dtype=torch.int32), torch.tensor([5, 6], dtype=torch.int32)),
#     offsets=(torch.tensor([0, 3, 4]), torch.tensor([0, 1, 2])),
#     sources=[],
#     references=[],
# )
# print(list(tiny), tiny.lengths.tolist())

# %% [markdown]
# The file also holds the tokenizer and the raw text of the validation and test sentences, since scores are computed on text. The format is safetensors: numbers with a header of text, and nothing that could run code. As in Chapter 11, it is written under a temporary name, and renamed when it is complete.

# %%
FORMAT = "transformer_annotated.encoded_corpus.1"
SIDES = "source", "target"


@dataclass(eq=False)
class EncodedCorpus:
    """A corpus as ids, with the tokenizer that made them: all that training needs, in one file.

    `left_out` counts the training pairs that were empty on one side or longer than `max_length`.
    """

    name: str
    source: str
    target: str
    tokenizer_json: str
    splits: dict[str, EncodedSplit]
    left_out: int = 0
    max_length: int | None = None

    @cached_property
    def tokenizer_sha256(self) -> str:
        """The fingerprint of the tokenizer."""
        return fingerprint(self.tokenizer_json)

    @property
    def key(self) -> tuple[Any, ...]:
        """What a cached file must agree on to be used."""
        return self.name, self.source, self.target, self.tokenizer_sha256, self.max_length

    def save(self, path: Path) -> None:
        """Write one safetensors file: to a temporary name beside it, synced, then renamed."""
        tensors: dict[str, Tensor] = {}
        for name, split in self.splits.items():
            for side, ids, offsets in zip(SIDES, split.ids, split.offsets, strict=True):
                tensors |= {f"{name}.{side}.ids": ids, f"{name}.{side}.offsets": offsets}
            text = json.dumps([split.sources, split.references], ensure_ascii=False)
            tensors[f"{name}.text"] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        fields = ("name", "source", "target", "left_out", "max_length")
        header = {
            "format": FORMAT,
            "about": json.dumps({field: getattr(self, field) for field in fields}),
            "tokenizer": self.tokenizer_json,
            "tokenizer_sha256": self.tokenizer_sha256,
        }
        _write(path, tensors, header)

    @classmethod
    def load(cls, path: Path) -> "EncodedCorpus":
        """Read what `save` wrote. It imports neither spaCy nor tokenizers.

        Raises FileNotFoundError, and ValueError with the path for a file that is damaged, or is
        something else.
        """
        header, tensors = _read(path)
        if header.get("format") != FORMAT:
            raise ValueError(f"{path} has the format {header.get('format')}, expected {FORMAT}")
        splits = {}
        try:
            for name in sorted({key.split(".")[0] for key in tensors}):
                ids, offsets = (
                    (tensors[f"{name}.source.{part}"], tensors[f"{name}.target.{part}"])
                    for part in ("ids", "offsets")
                )
                sources, references = json.loads(bytes(tensors[f"{name}.text"].tolist()))
                splits[name] = EncodedSplit(ids, offsets, sources, references)
            about = json.loads(header["about"])
            corpus = cls(tokenizer_json=header["tokenizer"], splits=splits, **about)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged: {error!r}") from error
        if corpus.tokenizer_sha256 != header.get("tokenizer_sha256"):
            raise ValueError(f"{path}: the tokenizer does not have the SHA-256 stored beside it")
        return corpus

# %% tags=["hide-input"]
def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """A safetensors file, under a temporary name until it is complete and on the disk."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(tensors, part, metadata=header)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a safetensors file; ValueError with the path if it is none."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error

# %% [markdown]
# One split is encoded like this. It reads ten thousand pairs at a time, so that of a large corpus only the numbers stay in memory. A training pair with an empty side teaches nothing, and a very long one may not fit into a batch: such pairs are left out, and counted. Validation and test pairs all stay. Leaving out the hard ones there would change the score.

# %%
def _encode_split(
    corpus: ParallelCorpus,
    name: str,
    tokenizer: Tokenizer,
    bounds: tuple[int, int | None],
    progress: bool,
) -> tuple[EncodedSplit, int]:
    """One split, and how many pairs were left out because a side is shorter or longer."""
    from tqdm import tqdm

    low, high = bounds
    ids, offsets = (array("i"), array("i")), (array("q", [0]), array("q", [0]))
    texts: tuple[list[str], list[str]] = [], []
    left_out = 0
    stream = iter(tqdm(corpus.stream(name), desc=name, unit=" pairs", disable=not progress))
    while chunk := list(islice(stream, 10_000)):
        columns = [tokenizer.encode_batch(column) for column in zip(*chunk, strict=True)]
        for raw, pair in zip(chunk, zip(*columns, strict=True), strict=True):
            if any(len(row) < low or (high is not None and len(row) > high) for row in pair):
                left_out += 1
                continue
            for side in (0, 1):
                ids[side].extend(pair[side])
                offsets[side].append(len(ids[side]))
                if name != "train":
                    texts[side].append(raw[side])
    flat = (_tensor(ids[0], torch.int32), _tensor(ids[1], torch.int32))
    starts = (_tensor(offsets[0], torch.int64), _tensor(offsets[1], torch.int64))
    return EncodedSplit(flat, starts, *texts), left_out


def _tensor(numbers: "array[int]", dtype: torch.dtype) -> Tensor:
    """A tensor that shares the memory of an array."""
    return torch.frombuffer(numbers, dtype=dtype) if numbers else torch.empty(0, dtype=dtype)

# %% [markdown]
# The rest asks first whether a file holds the result already.

# %%
def encode_corpus(
    corpus: ParallelCorpus,
    tokenizer: Tokenizer,
    cache: Path | None = None,
    *,
    max_length: int | None = None,
    progress: bool = False,
) -> EncodedCorpus:
    """Encode every split of a corpus, streaming: four bytes a token, whatever its size.

    Training pairs with an empty side, or with more than `max_length` tokens on one, are left out
    and counted in `left_out`. Validation and test pairs all stay, with their raw text.

    `cache` names a file. If it holds the same corpus, languages, tokenizer and `max_length`, it is
    read and nothing is encoded; if it holds another corpus, it is written anew. `progress` shows
    a bar.

    Raises ValueError for a `max_length` below 1, and for a `cache` that is no encoded corpus.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be at least 1, got {max_length}")
    if cache is not None and cache.exists():
        try:
            cached = EncodedCorpus.load(cache)
        except ValueError as error:  # it may be anything: it is not overwritten
            raise ValueError(f"cache={cache} is in the way, delete it: {error}") from error
        key = (corpus.name, corpus.source, corpus.target, tokenizer.sha256, max_length)
        if cached.key == key:
            return cached
    splits, left_out = {}, 0
    for name in corpus.splits:
        bounds = (1, max_length) if name == "train" else (0, None)
        splits[name], short = _encode_split(corpus, name, tokenizer, bounds, progress)
        left_out += short
    encoded = EncodedCorpus(corpus.name, corpus.source, corpus.target, tokenizer.to_json(),
                            splits, left_out, max_length)  # fmt: skip
    if cache is not None:
        encoded.save(cache)
    return encoded

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import tempfile
#
# with tempfile.TemporaryDirectory() as folder:
#     path = Path(folder) / "corpus.safetensors"
#     start = time.process_time()
#     encoded = encode_corpus(corpus, shared, path)
#     middle = time.process_time()
#     again = encode_corpus(corpus, shared, path)
#     end = time.process_time()
#     size = path.stat().st_size
# assert all(list(again.splits[name]) == list(encoded.splits[name]) for name in corpus.splits)
# print(f"encoded in {middle - start:.2f} s, read in {end - middle:.3f} s; {size / 1e6:.1f} MB")
# print("pairs:", {name: f"{len(split):,}" for name, split in again.splits.items()})
# print("tokens in a training pair:", again.splits["train"].lengths.float().mean(0).tolist())

# %% [markdown]
# The second call found the file, compared corpus, languages and the tokenizer's fingerprint, and encoded nothing. With another tokenizer it would write the file anew: ids of one tokenizer are noise to another.
#
# An encoded pair is what `collate` of Chapter 9 takes, so everything of Part I works on it. Here is the first training pair: the source with EOS added, the source as pieces, and the target read back from its ids.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.paper.toy import collate
#
# source, target = again.splits["train"][0]
# batch = collate([(source, target)])
# print("source ids        ", batch.src[0].tolist())
# print("source pieces     ", " ".join(shared.pieces[i] for i in source))
# print("target, read back ", load_tokenizer(again.tokenizer_json).decode(batch.tgt_out[0].tolist()))

# %% [markdown]
# ## What the paper did
#
# | | paper, section 5.1 | here |
# |---|---|---|
# | English-German | byte-pair encoding, about 37,000 tokens | the same, any number of tokens |
# | English-French | 32,000 word pieces {cite:p}`wu2016google` | byte-pair encoding |
# | vocabulary | shared by source and target | shared |
# | where it starts | characters {cite:p}`sennrich2016neural` | bytes {cite:p}`radford2019language` |
# | where words meet | a mark at the end of a word | a space at the beginning |
#
# For byte-pair encoding the paper cites {cite:t}`britz2017massive`, who use the method of Sennrich et al.; the last two rows describe that method. There we differ: bytes leave nothing unknown, and a space before each word makes the way back exact. For translation, pieces of bytes did as well as pieces of characters in the comparison of {cite:t}`wang2020neural`.
#
# ## How it breaks
#
# - *Weights with another tokenizer.* Every id may be valid, and every word is wrong. Compare the tokenizers before you go on: the trainer of Chapter 19 does.
# - *Merges learnt from the test set too.* The pieces fit it too well. Learn from the training split alone.
# - *Signs that can be typed.* A sentence holds `<eos>`, and its translation ends there. Encode the text `<eos>` and look for id 2.
# - *Two spellings.* Half of the accented words become rare. Normalise once, in the tokenizer, never in some of its callers.
# - *A lossy way back.* The score is a little too low for every model, and nobody asks why. Compute the ceiling.
#
# ## Takeaways
#
# - A merge joins the most frequent pair of neighbours. The list of merges, in order, is all that is learnt.
# - From 256 bytes upwards nothing is unknown, and the ceiling is a perfect score.
# - One vocabulary for both languages lets one table serve source, target and output.
# - Ids, tokenizer and fingerprint travel together.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 13.1.** *hug* was seen 10 times, *pug* 5, *pun* 12, *bun* 4 and *hugs* 5. Which are the first three merges? Count by hand, and answer with a list of three pairs.

# %% tags=["active-ipynb"]
# answer = ...
# check("13.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = learn_merges({"hug": 10, "pug": 5, "pun": 12, "bun": 4, "hugs": 5}, 3)
# check("13.1", answer)

# %% [markdown]
# **Exercise 13.2.** How many ids does a `BPETokenizer` without any merges give for the text *Zoë*?

# %% tags=["active-ipynb"]
# answer = ...
# check("13.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = len(spaced("Zoë").encode())  # a space, Z, o, and two bytes for ë
# assert answer == len(BPETokenizer(()).encode("Zoë"))
# check("13.2", answer)

# %% [markdown]
# **Exercise 13.3.** A word is always cut in the same way, so a model rarely sees how it is spelt. *BPE-dropout* forgets each possible join with probability $p$, anew at every step {cite:p}`provilkov2020bpe`.
# Write `forgetful(word, merges, p, rng)`: like `apply_merges`, but in each round every pair of neighbours that could be joined is forgotten where `rng.random() < p`. Of the others, join the one learnt first, at its first place. Stop when none is left.

# %% tags=["active-ipynb"]
# answer = ...
# check("13.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# import random
#
#
# def forgetful(word: str, merges: Sequence[Merge], p: float, rng: random.Random) -> tuple[str, ...]:
#     """The pieces of a word, with joins left out at random."""
#     rank = {pair: i for i, pair in enumerate(merges)}
#     pieces = list(word)
#     while True:
#         places = [
#             (rank[pair], i)
#             for i, pair in enumerate(pairwise(pieces))
#             if pair in rank and not rng.random() < p
#         ]
#         if not places:
#             return tuple(pieces)
#         _, i = min(places)
#         pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
#
#
# print(*(forgetful("lowest", four_merges, 0.5, random.Random(seed)) for seed in range(4)))
# check("13.3", forgetful)
