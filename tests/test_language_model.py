"""Chapter 25: running text, the loss of every next token, bits per byte, generation, prefix-LM."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import assert_close, gradients, redraw
from transformer_annotated import (
    PREFIX_LM,
    Cache,
    Characters,
    Mask,
    Transformer,
    any_text,
    bits_per_byte,
    generate,
    language_model,
    nats_by_position,
    open_text,
    patch,
    prefix_mask,
    train_bpe,
    train_language_model,
)
from transformer_annotated.modern import language_model as chapter
from transformer_annotated.modern.language_model import cut, next_token_nats
from transformer_annotated.training.corpora import at_hand

V = 13
CONFIG = language_model(V, d_model=16, n_layers=2, n_heads=2, d_ff=32)


UNTIED = patch(CONFIG, {"head.tied": False})  # a table of its own: it repeats itself less


def model_of(config: Any = CONFIG, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """A small model in evaluation mode with every parameter redrawn."""
    return redraw(Transformer(config), seed).to(dtype).eval()


def text_ids(n: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (n,), generator=torch.Generator().manual_seed(seed))


def prompts(B: int = 3, T: int = 5, seed: int = 1) -> Tensor:
    return text_ids(B * T, seed).view(B, T)


def all_tokens(*args: Any, **kwargs: Any) -> Tensor:
    """What `generate` yields, side by side: `(B, n)`."""
    return torch.stack(list(generate(*args, **kwargs)), dim=1)


# Texts --------------------------------------------------------------------------------------------


def test_a_text_is_cut_at_line_ends_into_90_5_and_5_per_cent() -> None:
    whole = "".join(f"line {i} of many\n" for i in range(400))
    text = cut("t", whole)
    assert text.train + text.val + text.test == whole
    assert text.train.endswith("\n")
    assert text.val.endswith("\n")
    for piece, share in ((text.train, 0.9), (text.val, 0.05), (text.test, 0.05)):
        assert abs(len(piece) - share * len(whole)) < 20


def test_the_toy_text_needs_no_file_and_repeats_no_sentence() -> None:
    text = open_text("toy")
    lines = (text.train + text.val + text.test).splitlines()
    assert len(lines) == len(set(lines)) > 3000
    assert min(len(text.val), len(text.test)) > 5000


def test_any_text_downloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a download")

    monkeypatch.setattr(chapter, "at_hand", lambda _: None)
    monkeypatch.setattr(chapter, "obtain", refuse)
    assert any_text().name == "toy"


def test_unknown_texts_are_named() -> None:
    with pytest.raises(ValueError, match="name must be 'shakespeare' or 'toy', got 'goethe'"):
        open_text("goethe")


@pytest.mark.data
def test_shakespeare() -> None:
    if not at_hand(chapter.SHAKESPEARE):
        pytest.skip("tinyshakespeare is not at hand")
    text = open_text()
    assert len((text.train + text.val + text.test).encode()) == 1_115_394
    alphabet = Characters(text.train)
    assert alphabet.vocab_size == 65
    assert alphabet.decode(alphabet.encode(text.val)) == text.val
    assert any_text().name == "shakespeare"


def test_characters_come_back_and_strangers_are_refused() -> None:
    alphabet = Characters("to be\nor not")
    assert alphabet.vocab_size == len(set("to be\nor not"))
    assert alphabet.decode(torch.tensor(alphabet.encode("bet\nton"))) == "bet\nton"
    assert Characters(alphabet.symbols).symbols == alphabet.symbols
    with pytest.raises(ValueError, match="text has 'z'"):
        alphabet.encode("zoo")


def test_bpe_keeps_running_text_exactly() -> None:
    text = "A line.\n\nAnother  line,\n  indented\tand \u2028 odd.\n"
    bpe = train_bpe([text], 270)
    assert bpe.decode(bpe.encode(text)) == text


# The loss -----------------------------------------------------------------------------------------


def test_the_loss_of_each_token_is_that_of_a_loop() -> None:
    """Position by position: read the prefix alone, score the token that follows it."""
    model, ids = model_of(dtype=torch.float64), prompts(2, 7)
    losses = next_token_nats(model, ids)
    rows = []
    for row in ids:
        for t in range(1, len(row)):
            scores = model(row[None, :t])[0, -1]
            rows.append(scores.logsumexp(0) - scores[row[t]])
    expected = torch.stack(rows).view(2, 6)
    assert_close(losses, expected)
    leaves = dict(model.named_parameters())
    ours, theirs = gradients(losses, leaves), gradients(expected, leaves)
    for name, gradient in ours.items():
        assert_close(gradient, theirs[name], name)


def test_a_stack_that_sees_the_answers_is_not_scored() -> None:
    """A prefix-LM is scored under its mask, and refused without one."""
    prefix, ids = model_of(patch(CONFIG, PREFIX_LM)), text_ids(40)
    mask = prefix_mask(torch.zeros(1, dtype=torch.long), 39)
    assert_close(next_token_nats(prefix, ids[None], mask), next_token_nats(model_of(), ids[None]))
    for call in (
        lambda: next_token_nats(prefix, ids[None]),
        lambda: bits_per_byte(prefix, ids, 40, length=8),
        lambda: nats_by_position(prefix, ids, length=8),
        lambda: train_language_model(prefix, ids, steps=2, length=8, batch=1),
    ):
        with pytest.raises(ValueError, match="mask must be given: this stack is not causal"):
            call()


def test_chance_cannot_be_learnt() -> None:
    """Independent uniform ids: whoever gets far below ln V sees what it must predict."""
    torch.manual_seed(0)
    losses = train_language_model(
        Transformer(CONFIG), text_ids(4000), steps=60, length=16, batch=8, rate=5e-3
    )
    assert sum(losses[-10:]) / 10 > math.log(V) - 0.1


def test_a_rule_is_learnt() -> None:
    torch.manual_seed(0)
    ids = torch.arange(600) % V
    losses = train_language_model(Transformer(CONFIG), ids, steps=80, length=16, batch=8, rate=5e-3)
    assert losses[0] > 2
    assert losses[-1] < 0.3


def test_training_depends_on_its_seed_alone() -> None:
    config = patch(CONFIG, {"dropout": 0.2})

    def run(seed: int, disturb: int) -> tuple[list[float], Tensor]:
        model = redraw(Transformer(config))
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        losses = train_language_model(model, text_ids(200), steps=4, length=8, batch=3, seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return losses, torch.cat([p.detach().flatten() for p in model.parameters()])

    (first, weights), (again, same), (other, _) = run(0, 1), run(0, 2), run(1, 1)
    assert first == again
    assert torch.equal(weights, same)
    assert first != other


def test_training_reports_each_step() -> None:
    seen: list[tuple[int, float]] = []
    model = model_of()
    losses = train_language_model(
        model, text_ids(30), steps=3, length=8, batch=2,
        on_step=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert seen == list(enumerate(losses, 1))
    assert model.training


# Bits per byte ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 16, 17, 18, 100])
def test_a_model_without_opinion_needs_log2_V_bits_a_token(n: int) -> None:
    """All logits 0: n tokens cost n log2 V bits, however many bytes they stand for."""
    model = Transformer(CONFIG)
    with torch.no_grad():
        model.embedding.weight.zero_()
    for n_bytes in (n, 3 * n):
        got = bits_per_byte(model, text_ids(n), n_bytes, length=16)
        assert abs(got - n * math.log2(V) / n_bytes) < 1e-5


@pytest.mark.parametrize("n", [2, 16, 17, 50])
def test_bits_per_byte_scores_each_token_once(n: int) -> None:
    model, ids, length = model_of(dtype=torch.float64), text_ids(n), 8
    nats = math.log(V)
    for i in range(1, n):
        start = (i - 1) // length * length  # where its window begins
        nats -= model(ids[None, start:i])[0, -1].log_softmax(0)[ids[i]].item()
    assert abs(bits_per_byte(model, ids, 20, length=length) - nats / 20 / math.log(2)) < 1e-8


def test_evaluation_leaves_the_mode_alone() -> None:
    model = Transformer(patch(CONFIG, {"dropout": 0.5})).train()
    values = {bits_per_byte(model, text_ids(40), 40, length=8) for _ in range(2)}
    assert len(values) == 1
    assert model.training


@pytest.mark.parametrize("windows", [None, 1, 3, 99])
def test_nats_by_position(windows: int | None) -> None:
    model, ids, length = model_of(), text_ids(70), 9
    cuts = [ids[i * length : (i + 1) * length + 1] for i in range(7)]
    chosen = {None: range(7), 1: [0], 3: [0, 2, 4], 99: range(7)}[windows]
    with torch.no_grad():
        rows = [F.cross_entropy(model(cuts[i][None, :-1])[0], cuts[i][1:], reduction="none")
                for i in chosen]  # fmt: skip
    got = nats_by_position(model, ids, length=length, windows=windows)
    assert_close(got, torch.stack(rows).mean(0))


# Generation ---------------------------------------------------------------------------------------


def by_reading_all_again(model: Transformer, ids: Tensor, n: int, **mask: Any) -> Tensor:
    """The most probable tokens without a cache: `(B, n)`."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(n):
            ids = torch.cat([ids, model(ids, **mask)[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


def test_cached_is_uncached() -> None:
    model, ids = model_of(UNTIED, 1), prompts()
    expected = by_reading_all_again(model, ids, 20)
    assert len(expected.unique()) > 3
    for more in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-6}):
        assert torch.equal(all_tokens(model, ids, max_new_tokens=20, **more), expected)
    mine = Cache(model)
    assert torch.equal(
        all_tokens(model, ids, max_new_tokens=20, temperature=0, cache=mine), expected
    )
    assert mine.length == 5 + 20 - 1  # the last token is never read


def test_a_prefix_lm_generates_from_its_prefix() -> None:
    """The prompt sees itself in both directions, what is written sees the past."""
    model = model_of(patch(UNTIED, PREFIX_LM), 1)
    ids = start = prompts()
    with torch.no_grad():
        for _ in range(6):
            mask = prefix_mask(torch.full((3,), 5), ids.shape[1])
            ids = torch.cat([ids, model(ids, src_mask=mask)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(all_tokens(model, start, max_new_tokens=6, temperature=0), ids[:, 5:])


@pytest.mark.parametrize("causal", [True, False])
def test_a_shorter_prompt_is_continued_as_if_alone(causal: bool) -> None:
    model = model_of(UNTIED if causal else patch(UNTIED, PREFIX_LM))
    rows = [text_ids(n, n) for n in (6, 2, 4)]
    ids = torch.stack([F.pad(row, (6 - len(row), 0), value=7) for row in rows])
    real = torch.stack([torch.arange(6) >= 6 - len(row) for row in rows])
    together = all_tokens(model, ids, max_new_tokens=9, temperature=0, padding=real)
    for row, got in zip(rows, together, strict=True):
        alone = all_tokens(model, row[None], max_new_tokens=9, temperature=0)[0]
        assert torch.equal(got, alone)


def test_tokens_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token is there before the next is computed, and the mode is the caller's in between."""
    model, lengths = model_of().train(), []
    decode = Transformer.decode

    def counted(self: Transformer, tgt: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lengths.append(tgt.shape[1])
        return decode(self, tgt, *args, **kwargs)

    monkeypatch.setattr(Transformer, "decode", counted)
    stream = generate(model, prompts(), max_new_tokens=4)
    assert lengths == []
    for step, token in enumerate(stream, 1):
        assert token.shape == (3,)
        assert not token.is_inference()
        assert lengths == [5] + [1] * (step - 1)
        assert model.training
        assert torch.is_grad_enabled()
    assert len(lengths) == 4


def test_draws_follow_the_distribution() -> None:
    """20,000 draws of the first token: frequencies within 4.5 standard deviations."""
    model, ids, n = model_of(), prompts(1), 20_000
    for temperature, k in ((1.0, None), (0.5, None), (1.0, 3)):
        with torch.no_grad():
            p = (model(ids)[0, -1] / temperature).softmax(0)
        if k is not None:
            p = torch.where(p >= p.topk(k).values[-1], p, 0)
            p = p / p.sum()
        token = next(generate(model, ids.expand(n, -1), max_new_tokens=1, temperature=temperature,
                              top_k=k, generator=torch.Generator().manual_seed(3)))  # fmt: skip
        share = token.bincount(minlength=V) / n
        assert bool(((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all())


def test_the_same_seed_gives_the_same_text() -> None:
    def draw(seed: int) -> Tensor:
        chance = torch.Generator().manual_seed(seed)
        return all_tokens(model, prompts(), max_new_tokens=8, top_p=0.9, generator=chance)

    model = model_of()
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# Prefix-LM ----------------------------------------------------------------------------------------


def test_a_prefix_mask_pair_by_pair() -> None:
    lengths, T = torch.tensor([0, 1, 3, 6]), 6
    mask = prefix_mask(lengths, T).dense(4, T, T)
    assert mask is not None
    for b, p in enumerate(lengths.tolist()):
        for t in range(T):
            for s in range(T):
                assert bool(mask[b, 0, t, s]) == (s <= t or s < p), (p, t, s)


def test_prefix_lm_between_its_limits() -> None:
    """No prefix is the causal model; a prefix of all tokens is a stack that sees everything."""
    causal, prefix = model_of(), model_of(patch(CONFIG, PREFIX_LM))
    ids = prompts()
    with torch.no_grad():
        none, whole = (prefix(ids, src_mask=prefix_mask(torch.full((3,), p), 5)) for p in (0, 5))
        assert_close(none, causal(ids))
        assert_close(whole, prefix(ids))
        assert (whole - none).abs().max() > 0.01


def test_later_tokens_change_nothing_after_the_prefix() -> None:
    model, ids = model_of(patch(CONFIG, PREFIX_LM)), prompts(1, 8)
    mask, changed = prefix_mask(torch.tensor([3]), 8), ids.clone()
    changed[0, 6] = (ids[0, 6] + 1) % V
    with torch.no_grad():
        a, b = model(ids, src_mask=mask), model(changed, src_mask=mask)
    assert torch.equal(a[:, :6], b[:, :6])
    assert not torch.equal(a[:, 6:], b[:, 6:])


# Bad input ----------------------------------------------------------------------------------------

IDS = torch.zeros(2, 3, dtype=torch.long)
BOTH = {"encoder-decoder": patch(chapter.PAPER_BASE, {
    "vocab_size": V, "d_model": 16, "n_layers": 1, "self_attention.n_heads": 2,
    "cross_attention.n_heads": 2, "ffn.d_ff": 16})}  # fmt: skip


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        (IDS[:, :0], {}, r"ids must be a prompt \(B, T\) with B, T >= 1, got \(2, 0\)"),
        (IDS[0], {}, "ids must be a prompt"),
        (IDS, {"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1, got 0"),
        (IDS, {"temperature": -0.5}, "temperature must be finite and at least 0, got -0.5"),
        (IDS, {"temperature": math.nan}, "temperature must be finite"),
        (IDS, {"top_k": 0}, "top_k must be at least 1, got 0"),
        (IDS, {"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        (IDS, {"padding": torch.ones(2, 2, dtype=torch.bool)}, r"padding must be \(2, 3\) bool"),
        (IDS, {"padding": torch.ones(2, 3)}, "padding must be .* got .* of torch.float32"),
        (IDS, {"padding": torch.tensor([[True, True, False]] * 2)}, "must be on the left"),
        (IDS, {"padding": torch.tensor([[True, False, True]] * 2)}, "must be on the left"),
    ],
)
def test_generate_refuses(ids: Tensor, more: dict[str, Any], message: str) -> None:
    """At the call, before a token is asked for."""
    with pytest.raises(ValueError, match=message):
        generate(model_of(), ids, **{"max_new_tokens": 3, **more})


def test_generate_refuses_a_used_cache_and_an_encoder() -> None:
    model = model_of()
    cache = Cache(model)
    next(generate(model, IDS, max_new_tokens=1, cache=cache))
    with pytest.raises(ValueError, match="cache must be empty, and it holds 3 tokens"):
        generate(model, IDS, max_new_tokens=1, cache=cache)
    with pytest.raises(ValueError, match="model must have a decoder and no encoder"):
        generate(Transformer(BOTH["encoder-decoder"]), IDS, max_new_tokens=1)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generate_refuses_logits_that_are_not_finite(value: float, temperature: float) -> None:
    """When the token is asked for, not at the call."""
    model = model_of()
    with torch.no_grad():
        model.embedding.weight[3] = value
    stream = generate(model, IDS, max_new_tokens=3, temperature=temperature)
    with pytest.raises(ValueError, match="the logits are not finite"):
        next(stream)


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        (torch.zeros(8, dtype=torch.long), {}, "at least length [+] 1 = 9 tokens, got 8"),
        (torch.full((20,), V), {}, rf"ids must be in \[0, {V}\), got {V} to {V}"),
        (torch.full((20,), -1), {}, "ids must be in"),
        (torch.zeros(20), {}, r"ids must be \(n,\) integers"),
        (IDS, {}, r"ids must be \(n,\) integers, got \(2, 3\)"),
        (torch.zeros(20, dtype=torch.long), {"steps": 0}, "steps must be"),
        (torch.zeros(20, dtype=torch.long), {"batch": 0}, "batch must be"),
        (torch.zeros(20, dtype=torch.long), {"warm_up": 3}, r"warm_up must be in \[1, 3\), got 3"),
    ],
)
def test_training_refuses(ids: Tensor, more: dict[str, Any], message: str) -> None:
    model = model_of()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        train_language_model(model, ids, **{"steps": 3, "length": 8, **more})
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert not model.training


def test_measures_refuse() -> None:
    model, ids = model_of(), text_ids(20)
    for wrong in (
        lambda: bits_per_byte(model, ids[:1], 1),
        lambda: bits_per_byte(model, ids, 0),
        lambda: bits_per_byte(model, ids + V, 20),
        lambda: nats_by_position(model, ids, length=20),
        lambda: nats_by_position(model, ids, length=5, windows=0),
        lambda: bits_per_byte(Transformer(BOTH["encoder-decoder"]), ids, 20),
    ):
        with pytest.raises(ValueError, match="must"):
            wrong()


@pytest.mark.parametrize(
    ("lengths", "T", "message"),
    [
        (torch.tensor([1, 7]), 6, r"prefix_lengths must be in \[0, 6\], got \[1, 7\]"),
        (torch.tensor([-1]), 6, "prefix_lengths must be in"),
        (torch.tensor([1.0]), 6, r"prefix_lengths must be \(B,\) integers"),
        (torch.tensor(3), 6, r"prefix_lengths must be \(B,\) integers"),
        (torch.tensor([0]), 0, "T must be"),
    ],
)
def test_prefix_mask_refuses(lengths: Tensor, T: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefix_mask(lengths, T)


def test_a_mask_is_a_mask() -> None:
    assert isinstance(prefix_mask(torch.tensor([1]), 2) & Mask(causal=True), Mask)
