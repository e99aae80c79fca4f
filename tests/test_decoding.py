"""Chapter 20: the cache, greedy search, sampling, and from texts to texts."""

import itertools
import math
import time
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close
from tests.test_beam import sources, talker
from tests.variants import CACHED, SMALL, VARIANTS, batch, build, sentence
from transformer_annotated import (
    Cache,
    Transformer,
    beam_search,
    greedy,
    greedy_search,
    patch,
    sample,
    translate_texts,
)
from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK
from transformer_annotated.training.decoding import (
    is_finished,
    packed,
    token_batches,
    truncate,
)
from transformer_annotated.training.tokens import train_bpe

SEQ2SEQ = [name for name in CACHED if VARIANTS[name].kind == "seq2seq"]
CAUSAL = [name for name in CACHED if VARIANTS[name].kind != "encoder"]
every_seq2seq = pytest.mark.parametrize("variant", SEQ2SEQ)
CHUNKS = [(7, 1, 1, 1, 5, 1), (1,) * 16, (16,), (3, 13), (1, 15)]
T = 16


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("variant", CAUSAL)
def test_cached_is_uncached(variant: str, chunks: tuple[int, ...]) -> None:
    """Fault row 32: fed in any pieces, the decoder gives what it gives in one."""
    model, seq2seq = build(variant), VARIANTS[variant].kind == "seq2seq"
    src, real = batch((7, 4, 2), 5)
    tgt = torch.cat([sentence(T, seed) for seed in (1, 2, 3)])
    with torch.no_grad():
        source = (model.encode(src, real), real) if seq2seq else ()
        expected = model.decode(tgt, *source)
        cache, pieces = Cache(model), []
        for new in tgt.split(chunks, dim=1):
            positions = torch.arange(cache.length, cache.length + new.shape[1])[None]
            pieces.append(model.decode(new, *source, positions=positions, cache=cache))
    assert cache.length == T
    assert_close(torch.cat(pieces, dim=1), expected, tolerance=2e-5)


@pytest.mark.parametrize("variant", CAUSAL)
def test_cached_is_uncached_with_padding_on_the_left(variant: str) -> None:
    """Positions count real tokens, and `padding` covers every key so far."""
    model, seq2seq = build(variant), VARIANTS[variant].kind == "seq2seq"
    src, src_real = batch((7, 4, 2), 5, left=True)
    tgt, real = batch((9, 5, 3), 8, left=True)
    positions = (real.long().cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        source = (model.encode(src, src_real), src_real) if seq2seq else ()
        expected = model.decode(tgt, *source, padding=real)
        cache, pieces, start = Cache(model), [], 0
        for n in (4, 1, 1, 3):
            new = slice(start, start + n)
            start += n
            at, seen = positions[:, new], real[:, :start]
            pieces.append(
                model.decode(tgt[:, new], *source, padding=seen, positions=at, cache=cache)
            )
    assert_close(torch.cat(pieces, dim=1)[real], expected[real], tolerance=2e-5)


def turn(q: Tensor, k: Tensor, positions: Tensor, key_positions: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for a position that turns queries and keys (RoPE): a factor for each."""
    return q * (1 + positions[:, None, :, None]), k / (1 + key_positions[:, None, :, None])


def test_keys_are_kept_unturned_with_their_positions() -> None:
    """What Part I promises a later position: every key as projected, and where it stands."""
    model = build("paper")
    tgt, src = sentence(T, 1), sentence(4, 2)
    for layer in model.decoder.layers:
        layer.self_attention.position = turn
    positions = torch.arange(T)[None] + 5
    with torch.no_grad():
        memory, cache = model.encode(src), Cache(model)
        expected = model.decode(tgt, memory, positions=positions)
        got = [
            model.decode(tgt[:, t : t + 1], memory, positions=positions[:, t : t + 1], cache=cache)
            for t in range(T)
        ]
    assert_close(torch.cat(got, dim=1), expected, tolerance=2e-5)


def test_a_long_cache_forgets_nothing() -> None:
    """Fault row 34: the store grows; its first entries are still what they were."""
    model, src, length = build("paper"), sentence(4, 2), 150
    tgt = sentence(length, 1)
    with torch.no_grad():
        memory, cache = model.encode(src), Cache(model)
        for t in range(length):
            at = torch.tensor([[t]])
            last = model.decode(tgt[:, t : t + 1], memory, positions=at, cache=cache)
        expected = model.decode(tgt, memory)[:, -1:]
    assert cache.length == length
    assert_close(last, expected, tolerance=2e-5)


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 0, 1, 1, 2, 2]], ids=str)
def test_reordered_rows_go_on_as_the_rows_they_were(rows: list[int]) -> None:
    """Fault row 35: after `reorder`, row i continues the sentence that row index[i] was."""
    model, (src, real) = build("paper"), batch((7, 4, 2), 5)
    tgt, index = torch.cat([sentence(6, seed) for seed in (1, 2, 3)]), torch.tensor(rows)
    with torch.no_grad():
        memory, cache = model.encode(src, real), Cache(model)
        model.decode(tgt[:, :5], memory, real, positions=torch.arange(5)[None], cache=cache)
        cache.reorder(index, index)
        new = tgt[index]
        at, source = torch.tensor([[5]]), (memory[index], real[index])
        last = model.decode(new[:, 5:], *source, positions=at, cache=cache)
        expected = model.decode(new, memory[index], real[index])[:, 5:]
    assert_close(last, expected, tolerance=2e-5)


def test_the_memory_is_projected_once() -> None:
    model, src = build("paper"), sentence(7, 1)
    calls = {"self": 0, "cross": 0}
    for layer in model.decoder.layers:
        for name, part in (("self", layer.self_attention), ("cross", layer.cross_attention)):
            part.k_proj.register_forward_hook(
                lambda *args, name=name: calls.__setitem__(name, calls[name] + 1)
            )
    steps = greedy_search(model, src, extra=3).shape[1]
    assert calls == {"self": 3 * steps, "cross": 3}


def test_a_cache_refuses_other_rows() -> None:
    model, src = build("paper"), torch.cat((sentence(4, 1), sentence(4, 2)))
    with torch.no_grad():
        memory, cache = model.encode(src), Cache(model)
        at = torch.tensor([[0]])
        model.decode(src[:, :1], memory, positions=at, cache=cache)
        with pytest.raises(ValueError, match="source must have the cache's 2 rows, got 1"):
            model.decode(src[:1, :1], memory[:1], positions=at + 1, cache=cache)
        with pytest.raises(ValueError, match=r"source must be \(2, 4\) like the memory"):
            model.decode(src[:, :1], memory[:, :3], positions=at + 1, cache=cache)
    with pytest.raises(ValueError, match="model must have a decoder"):
        Cache(build("encoder_only"))


# Greedy search ------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@every_seq2seq
def test_greedy_search_is_greedy(variant: str, left: bool) -> None:
    """The same ids as Part I's search, which reads everything again at each step."""
    model = build(variant)
    src, real = batch((7, 4, 2), 5, left=left)
    assert torch.equal(greedy_search(model, src, real, extra=9), greedy(model, src, real, extra=9))


@pytest.mark.parametrize("seed", range(4))
def test_greedy_search_is_greedy_where_sentences_end(seed: int) -> None:
    model, (src, real) = talker(seed, eos=0.0), sources(24, (6, 3, 5, 4, 2, 6))
    found = greedy_search(model, src, real, extra=12)
    assert torch.equal(found, greedy(model, src, real, extra=12))
    for row in range(len(src)):
        alone = greedy_search(model, src[row : row + 1, real[row]], extra=12)[0]
        assert torch.equal(found[row, : len(alone)], alone)
        assert not found[row, len(alone) :].any()


def test_the_limit_is_reported() -> None:
    """Fault row 44."""
    model, (src, real) = talker(0, eos=-1e4), sources(24)
    found = greedy_search(model, src, real, extra=2)
    assert (found != PAD).sum(dim=1).tolist() == [8, 5, 7, 6]
    assert not is_finished(found).any()
    assert is_finished(greedy_search(talker(0, eos=9.0), src, real)).all()


def searches(model: Transformer, src: Tensor, real: Tensor) -> Iterable[Tensor]:
    yield greedy_search(model, src, real, extra=3)
    yield sample(model, src, real, extra=3)
    yield beam_search(model, src, real, extra=3).ids


def test_forbidden_tokens_never_come() -> None:
    """Fault row 46, although the model wants nothing else; PAD only fills up after EOS."""
    model, (src, real) = talker(0), sources(24)
    with torch.no_grad():
        model.head.bias[[PAD, BOS, UNK]] = 50.0
    for ids in searches(model, src, real):
        assert not torch.isin(ids, torch.tensor([BOS, UNK])).any()
        for row in ids.tolist():
            real_part = row[: row.index(EOS)] if EOS in row else row
            assert PAD not in real_part or not any(real_part[real_part.index(PAD) :])
            assert row[0] != PAD


def test_modes_are_restored() -> None:
    """Fault row 40: no dropout inside, and each module is afterwards in the mode it was in."""
    model, (src, real) = build("paper", dropout=0.5), batch((7, 4, 2), 5)
    expected = list(searches(model, src, real))[::2]
    model.train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    assert all(map(torch.equal, list(searches(model, src, real))[::2], expected))
    assert [module.training for module in model.modules()] == modes


def test_results_can_be_trained_on() -> None:
    model, (src, real) = talker(0), sources(24)
    for ids in searches(model, src, real):
        model(src, ids, src_padding=real).sum().backward()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers(value: float) -> None:
    """Fault row 43: the step is named."""
    model, (src, real) = talker(0, eos=-1e4), sources(24)
    original = model.head.forward
    steps = itertools.count(1)

    def broken(x: Tensor, table: Tensor) -> Tensor:
        logits = original(x, table)
        return logits.index_fill(1, torch.tensor([7]), value) if next(steps) == 3 else logits

    model.head.forward = broken
    for search in (greedy_search, sample, beam_search):
        steps = itertools.count(1)
        with pytest.raises(ValueError, match="the logits at step 3 are not finite"):
            search(model, src, real)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra": 0}, "extra must be at least 1, got 0"),
        ({"temperature": 0.0}, "temperature must be above 0 .* greedy_search"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": math.nan}, "temperature must be above 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    """Fault rows 41 and 42: before the model is asked."""
    model = talker(0)
    model.encode = None
    with pytest.raises(ValueError, match=message):
        sample(model, *sources(24), **arguments)


def test_models_that_cannot_translate() -> None:
    src = torch.tensor([[4, 5]])
    for name in ("decoder_only", "encoder_only"):
        with pytest.raises(ValueError, match="model must have an encoder and a decoder"):
            greedy_search(build(name), src)
    tiny = Transformer(patch(SMALL, {"vocab_size": 4}))
    with pytest.raises(ValueError, match="vocab_size must be above 4, got 4"):
        greedy_search(tiny, src[:, :1] * 0)


# Sampling -----------------------------------------------------------------------------------------


def kept_by_hand(p: list[float], top_k: int | None, top_p: float | None) -> set[int]:
    """Which tokens stay: from the most probable down, one at a time."""
    order = sorted(range(len(p)), key=lambda i: -p[i])[:top_k]
    total, mass, kept = sum(p[i] for i in order), 0.0, set()
    for i in order:
        if top_p is None or mass / total < top_p:
            kept.add(i)
        mass += p[i]
    return kept


@pytest.mark.parametrize("top_p", [None, 1e-9, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [None, 1, 3, 10, 99])
def test_truncate_keeps_the_right_tokens(top_k: int | None, top_p: float | None) -> None:
    logits = 2 * torch.randn(50, 10)
    found = truncate(logits, top_k, top_p)
    for row, before in zip(found, logits, strict=True):
        kept = {i for i, value in enumerate(row.tolist()) if value > -math.inf}
        assert kept == kept_by_hand(before.double().softmax(dim=-1).tolist(), top_k, top_p)
        assert all(row[i] == before[i] for i in kept)


def test_sampling_draws_from_the_distribution() -> None:
    """The first token's frequencies against its probabilities, at temperature 2 and top-k 4."""
    draws = 4000
    model, src = talker(0, vocab_size=12), torch.tensor([[4, 6, 5]])
    with torch.no_grad():
        logits = model(src, torch.tensor([[BOS]]))[0, 0] / 2
    logits[[PAD, BOS, UNK]] = -math.inf
    p = truncate(logits[None], top_k=4)[0].softmax(dim=-1)
    ids = sample(model, src.expand(draws, -1), temperature=2.0, top_k=4, extra=1)
    frequency = torch.bincount(ids[:, 0], minlength=12) / draws
    assert (frequency - p).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert not frequency[p == 0].any()


def test_a_small_temperature_is_nearly_greedy() -> None:
    model, (src, real) = talker(1), sources(24)
    expected = greedy_search(model, src, real)
    assert torch.equal(sample(model, src, real, temperature=1e-30), expected)
    assert torch.equal(sample(model, src, real, top_k=1), expected)
    assert torch.equal(sample(model, src, real, top_p=1e-9), expected)


def test_the_same_seed_draws_the_same() -> None:
    """Fault row 49."""
    model, (src, real) = talker(1, eos=0.0), sources(24)
    first, again, other = (
        sample(model, src, real, generator=torch.Generator().manual_seed(seed))
        for seed in (3, 3, 4)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


# Packed weights -----------------------------------------------------------------------------------


@every_seq2seq
def test_packed_weights_compute_the_same(variant: str) -> None:
    model, (src, real) = build(variant), batch((7, 4, 2), 5)
    with torch.no_grad():
        expected = model(src, src, src_padding=real)
        with packed(model), packed(model):
            got = model(src, src, src_padding=real)
        assert_close(got, expected, tolerance=2e-5)
        assert torch.equal(model(src, src, src_padding=real), expected)
    assert not any("forward" in vars(module) for module in model.modules())


def test_packing_leaves_other_precisions_alone() -> None:
    model, (src, real) = build("paper", dtype=torch.float64), batch((7, 4, 2), 5)
    before = model(src, src, src_padding=real)
    with packed(model):
        assert torch.equal(model(src, src, src_padding=real), before)
        assert greedy_search(model, src, real, extra=2).shape == (3, 9)


# Texts --------------------------------------------------------------------------------------------


class Letters:
    """A tokenizer: a letter is a token."""

    vocab_size, sha256 = 30, "0"

    def encode(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + UNK + 1 for c in text if c != " "]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        ids = list(itertools.takewhile(lambda i: i != EOS, ids))
        return "".join(chr(i + ord("a") - UNK - 1) for i in ids if i > UNK)

    def to_json(self) -> str:
        return "{}"


TEXTS = ["bad", "", "a", "cabbage", "   ", "deed", "fed", "faced", "a"]


@pytest.mark.parametrize("max_tokens", [1, 12, 4096])
def test_texts_come_back_in_their_order(max_tokens: int) -> None:
    model = talker(1, vocab_size=30, eos=1.0)
    search = partial(greedy_search, extra=6)
    together = translate_texts(model, Letters(), TEXTS, search=search, max_tokens=max_tokens)
    for text, translation in zip(TEXTS, together, strict=True):
        ids = Letters().encode(text)
        alone = search(model, torch.tensor([[*ids, EOS]]))[0].tolist() if ids else []
        assert translation == Letters().decode(alone)
    assert together[1] == together[4] == ""
    assert len(set(together)) > 4


def test_spaces_have_no_translation() -> None:
    """Byte pairs have ids for a line of spaces; it is blank all the same."""
    tokenizer = train_bpe(["a b c"], 260)
    model = talker(1, vocab_size=260)
    assert tokenizer.encode("   ")
    assert translate_texts(model, tokenizer, ["", "  ", "\t "], search=greedy_search) == [""] * 3


def test_any_search_will_do() -> None:
    model = talker(1, vocab_size=30)
    found = translate_texts(model, Letters(), TEXTS, search=beam_search)
    for text, translation in zip(TEXTS, found, strict=True):
        if text.strip():
            ids = beam_search(model, torch.tensor([[*Letters().encode(text), EOS]])).ids[0]
            assert translation == Letters().decode(ids.tolist())
    assert translate_texts(model, Letters(), []) == []


def test_a_line_without_end_is_cut() -> None:
    """Fault row 87: a megabyte without a space costs what 20 tokens cost, and says so."""
    model = talker(1, vocab_size=30)
    start = time.process_time()
    with pytest.warns(UserWarning, match="sentence 1 is longer than 20 tokens"):
        found = translate_texts(model, Letters(), ["bad", "a" * 1_000_000], longest=20)
    assert time.process_time() - start < 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found == translate_texts(model, Letters(), ["bad", "a" * 20], longest=20)


def test_token_batches_hold_every_sentence_once() -> None:
    lengths = torch.randint(1, 40, (200,)).tolist()
    batches = list(token_batches(lengths, 100))
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(200))
    for chosen in batches:
        assert len(chosen) == 1 or len(chosen) * max(lengths[i] for i in chosen) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sentences": "bad"}, "sentences must be a sequence of texts, got one text"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"longest": 0}, "longest must be at least 1, got 0"),
    ],
)
def test_bad_texts(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_texts(talker(0), Letters(), **{"sentences": ["a"], **arguments})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_texts_on_a_gpu() -> None:
    model = talker(1, vocab_size=30, eos=1.0)
    expected = translate_texts(model, Letters(), TEXTS)
    assert translate_texts(model.cuda(), Letters(), TEXTS) == expected
