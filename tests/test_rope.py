"""RoPE: rotation in pairs, its two layouts, and what a model with it cannot notice."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close, assert_same, draw, loop_attention, redraw
from transformer_annotated import (
    DECODER_ONLY,
    PAPER_BASE,
    ROPE,
    SDPA,
    Cache,
    Mask,
    MultiHeadAttention,
    RoPE,
    Transformer,
    patch,
    spec,
)
from transformer_annotated.modern.rope import halves_order, rotate

SMALL = {
    "vocab_size": 13,
    "d_model": 32,
    "n_layers": 2,
    "self_attention.n_heads": 4,
    "ffn.d_ff": 24,
    "dropout": 0.0,
}
HERE = torch.tensor([[0, 1, 2, 3, 4], [3, 4, 5, 9, 12]])
THERE = torch.tensor([[0, 2, 4, 5, 6], [9, 8, 7, 1, 0]])


def by_complex_numbers(
    x: Tensor, positions: Tensor, base: float, r: int, interleaved: bool
) -> Tensor:
    """Each pair of the first r numbers as a complex number, times exp(i p w), in double."""
    head, rest = x[..., :r].double(), x[..., r:]
    pairs = head.unflatten(-1, (-1, 2)) if interleaved else head.unflatten(-1, (2, -1)).mT
    omega = torch.tensor([base ** (-2 * i / r) for i in range(r // 2)], dtype=torch.float64)
    angles = (positions.double()[..., None] * omega)[:, None]
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(
        torch.ones(()).double(), angles
    )
    pairs = torch.view_as_real(turned)
    head = (pairs if interleaved else pairs.mT).flatten(-2)
    return torch.cat((head.to(x.dtype), rest), dim=-1)


def model(*patches: Any, seed: int = 0) -> Transformer:
    """A small decoder-only model with RoPE, every parameter drawn anew, in double precision."""
    config = patch(PAPER_BASE, DECODER_ONLY, SMALL, ROPE, *patches)
    built = redraw(Transformer(config), seed).double().eval()
    assert isinstance(built, Transformer)
    return built


SETTINGS = list(
    itertools.product((False, True), (None, 4), (10_000.0, 500.0))
)  # interleaved, rotary_dim, base


@pytest.mark.parametrize(("interleaved", "rotary_dim", "base"), SETTINGS)
def test_equals_complex_numbers(interleaved: bool, rotary_dim: int | None, base: float) -> None:
    q = draw(2, 4, 5, 8, seed="q").requires_grad_()
    k = draw(2, 2, 5, 8, seed="k").requires_grad_()
    rope = RoPE(8, base=base, rotary_dim=rotary_dim, interleaved=interleaved)
    ours = rope(q, k, HERE, THERE)
    for x, mine, places in ((q, ours[0], HERE), (k, ours[1], THERE)):
        theirs = by_complex_numbers(x, places, base, rotary_dim or 8, interleaved)
        assert_same(mine, theirs, {"x": x})


def test_equals_the_llama_of_hugging_face() -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2)
    theirs = llama.LlamaRotaryEmbedding(config)
    q, k = draw(2, 4, 5, 16, seed="q"), draw(2, 2, 5, 16, seed="k")
    q.requires_grad_(), k.requires_grad_()
    ours = RoPE(16)(q, k, HERE, HERE)
    cos, sin = theirs(q, HERE)
    for mine, reference, x in zip(
        ours, llama.apply_rotary_pos_emb(q, k, cos, sin), (q, k), strict=True
    ):
        assert_close(mine, reference, tolerance=1e-6)
        assert_same(mine, reference, {"x": x})


def test_equals_the_gptj_of_hugging_face() -> None:
    gptj = pytest.importorskip("transformers.models.gptj.modeling_gptj")
    table = gptj.create_sinusoidal_positions(20, 8)[HERE]  # (B, T, r)
    sin, cos = table.chunk(2, dim=-1)
    x = draw(2, 5, 3, 16, seed="x").requires_grad_()  # (B, T, H, d)
    turned = gptj.apply_rotary_pos_emb(x[..., :8], sin, cos)
    reference = torch.cat((turned, x[..., 8:]), dim=-1)
    heads = x.transpose(1, 2)
    ours = RoPE(16, rotary_dim=8, interleaved=True)(heads, heads, HERE, HERE)[0].transpose(1, 2)
    assert_close(ours, reference, tolerance=1e-6)
    assert_same(ours, reference, {"x": x})


@pytest.mark.parametrize("interleaved", [False, True])
def test_a_turn_keeps_lengths_and_position_0_turns_nothing(interleaved: bool) -> None:
    q = draw(2, 4, 5, 8, seed="q", dtype=torch.float64)
    rope = RoPE(8, interleaved=interleaved)
    turned, same = rope(q, q, HERE, torch.zeros(1, 5))
    assert_close(turned.norm(dim=-1), q.norm(dim=-1))
    assert torch.equal(same, q)


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone(interleaved: bool) -> None:
    q, k = (draw(2, 4, 5, 8, seed=name, dtype=torch.float64) for name in "qk")
    rope = RoPE(8, interleaved=interleaved)
    scores = []
    for shift in (0, 1, 1000):
        a, b = rope(q, k, HERE + shift, THERE + shift)
        scores.append(a @ b.mT)
    assert_close(scores[1], scores[0])
    assert_close(scores[2], scores[0])
    a, b = rope(q, k, HERE, HERE)
    assert (a @ b.mT - scores[0]).abs().max() > 0.1, "where the keys stand changed nothing"


def test_the_angle_is_the_querys_minus_the_keys() -> None:
    """With w = 1: a query (1, 0) at i and a key (0, 1) at j have the score sin(i - j)."""
    q, k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    for i, j in ((1, 0), (0, 1), (5, 2)):
        a, b = RoPE(2)(q, k, torch.tensor([[i]]), torch.tensor([[j]]))
        assert (a * b).sum().item() == pytest.approx(math.sin(i - j), abs=1e-6)


def test_attention_turns_queries_and_keys_and_not_values() -> None:
    attention = redraw(MultiHeadAttention(32, 4, n_kv_heads=2, position=spec(RoPE)))
    assert isinstance(attention, MultiHeadAttention)
    x = draw(2, 5, 32, seed="x").requires_grad_()
    ours = attention(x, mask=Mask(causal=True), positions=HERE)
    q, (k, v) = attention.split(attention.q_proj(x)), attention.keys_values(x)
    q, k = (by_complex_numbers(y, HERE, 10_000.0, 8, False) for y in (q, k))
    heads = loop_attention(q, k, v, Mask(causal=True))
    theirs = attention.out_proj(heads.transpose(1, 2).flatten(-2))
    assert_same(ours, theirs, {"x": x, **dict(attention.named_parameters())})


def test_a_decoder_does_not_see_the_numbers_of_its_positions() -> None:
    ids = torch.randint(0, 13, (2, 9), generator=torch.Generator().manual_seed(0))
    built = model()
    far = torch.arange(100, 109)[None]
    assert_close(built.logits(built.decode(ids, positions=far)), built(ids))
    padding = torch.ones(2, 12, dtype=torch.bool)
    padding[:, :3] = False
    left = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    assert_close(built(left, src_padding=padding)[:, 3:], built(ids))


def test_both_languages_may_begin_anywhere_unless_cross_attention_turns_too() -> None:
    small = {**SMALL, "cross_attention.n_heads": 4}
    src, tgt = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[1, 9, 10]])
    differences = []
    for extra in ({}, {"cross_attention.position": spec(RoPE)}):
        built = redraw(Transformer(patch(PAPER_BASE, small, ROPE, extra))).double().eval()
        assert isinstance(built, Transformer)
        moved = torch.arange(7, 11)[None]
        memory = built.encode(src, positions=moved)
        logits = built.logits(built.decode(tgt, memory, memory_positions=moved))
        differences.append((logits - built(src, tgt)).abs().max().item())
    assert differences[0] < 1e-10 < 1e-2 < differences[1]


@pytest.mark.parametrize("rotary_dim", [None, 4])
def test_permuted_rows_turn_one_layout_into_the_other(rotary_dim: int | None) -> None:
    path = "self_attention.position"
    neighbours, halves = (
        model({f"{path}.rotary_dim": rotary_dim, f"{path}.interleaved": flag})
        for flag in (True, False)
    )
    order = halves_order(8, rotary_dim)
    weights = neighbours.state_dict()
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            weights[name] = weight.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    before = halves(ids)
    halves.load_state_dict(weights)
    assert_close(halves(ids), neighbours(ids))
    assert (before - neighbours(ids)).abs().max() > 1e-2
    assert torch.equal(order[order.argsort()], torch.arange(8))


def test_the_order_of_the_halves() -> None:
    assert halves_order(6).tolist() == [0, 2, 4, 1, 3, 5]
    assert halves_order(6, 4).tolist() == [0, 2, 1, 3, 4, 5]


def test_numbers_beyond_rotary_dim_stay() -> None:
    q = draw(2, 4, 5, 8, seed="q")
    turned, _ = RoPE(8, rotary_dim=4)(q, q, HERE, HERE)
    assert torch.equal(turned[..., 4:], q[..., 4:])
    alone, _ = RoPE(4)(q[..., :4], q[..., :4], HERE, HERE)
    assert torch.equal(turned[..., :4], alone)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_angles_keep_32_bits_in_a_model_of_16(dtype: torch.dtype) -> None:
    q = draw(1, 1, 5, 64, seed="q").to(dtype)
    far = torch.tensor([[4000, 4001, 4002, 4003, 4004]])
    ours, _ = RoPE(64)(q, q, far, far)
    assert ours.dtype == dtype
    exact, _ = RoPE(64)(q.double(), q.double(), far, far)
    rounding = torch.finfo(dtype).eps
    assert (ours.double() - exact).abs().max() <= rounding * q.abs().max().item() * 1.5


def test_cached_decoding_equals_the_whole_and_keys_may_be_kept_turned() -> None:
    built = model()
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    cache, steps = Cache(built), []
    for t in range(8):
        hidden = built.decode(ids[:, t : t + 1], positions=torch.tensor([[t]]), cache=cache)
        steps.append(built.logits(hidden))
    assert_close(torch.cat(steps, dim=1), built(ids))
    k, rope = draw(1, 2, 8, 8, seed="k"), RoPE(8)
    places = torch.arange(8)[None]
    omega, factor = rope.frequencies(places, places)
    kept = [rope.turn(k[:, :, t : t + 1], places[:, t : t + 1], omega, factor) for t in range(8)]
    assert torch.equal(torch.cat(kept, dim=2), rope.turn(k, places, omega, factor))


def test_one_graph_and_any_attend() -> None:
    built, fast = model(), model({"self_attention.attend": SDPA["self_attention.attend"]})
    ids = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    assert_close(fast(ids), built(ids))
    compiled = torch.compile(built, fullgraph=True, backend="eager")
    assert_close(compiled(ids), built(ids))


class Halved:
    """A scaling for the test: half the speed, twice the size, and a record of the lengths."""

    lengths: list[Tensor] = []  # noqa: RUF012

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        self.lengths.append(length)
        return base ** (-torch.arange(0, head_dim, 2) / head_dim) / 2, 2.0


def test_a_scaling_is_asked_for_frequencies_and_told_the_length_of_each_row() -> None:
    Halved.lengths.clear()
    q, k = draw(2, 4, 5, 8, seed="q"), draw(2, 2, 5, 8, seed="k")
    ours = RoPE(8, rotary_dim=4, scaling=spec(Halved))(q, k, 2 * HERE, 2 * THERE)
    plain = RoPE(8, rotary_dim=4)(q, k, HERE, THERE)
    for mine, theirs in zip(ours, plain, strict=True):
        assert_close(mine[..., :4], 2 * theirs[..., :4])
        assert torch.equal(mine[..., 4:], theirs[..., 4:])
    assert Halved.lengths[0].tolist() == [[13], [25]]


def test_rotate_takes_any_leading_sizes() -> None:
    quarter = torch.tensor([0.0]), torch.tensor([1.0])
    for interleaved in (False, True):
        assert rotate(torch.tensor([1.0, 0.0]), *quarter, interleaved).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"head_dim": 7}, "head_dim must be even.*got 7"),
        ({"head_dim": 0}, "head_dim.*0"),
        ({"head_dim": 8, "rotary_dim": 3}, "rotary_dim must be even.*got 3"),
        ({"head_dim": 8, "rotary_dim": 0}, "rotary_dim.*0"),
        ({"head_dim": 8, "rotary_dim": 10}, "rotary_dim must be at most head_dim, got 10 and 8"),
        ({"head_dim": 8, "base": 1.0}, "base must be above 1, got 1.0"),
        ({"head_dim": 8, "base": float("nan")}, "base must be above 1, got nan"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RoPE(**arguments)


def test_missing_or_too_few_positions_are_refused() -> None:
    q, k = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 6, 8)
    six = torch.arange(6)[None]
    with pytest.raises(ValueError, match="positions must be given"):
        RoPE(8)(q, k, None, six)
    with pytest.raises(ValueError, match="key_positions must be given"):
        RoPE(8)(q, k, HERE, None)
    with pytest.raises(
        ValueError, match=r"key_positions must be \(2, 6\) or \(1, 6\), got \(1, 1\)"
    ):
        RoPE(8)(q, k, HERE, torch.zeros(1, 1))
    with pytest.raises(ValueError, match="positions are told twice"):
        Transformer(patch(PAPER_BASE, SMALL, {"self_attention.position": spec(RoPE)}))
