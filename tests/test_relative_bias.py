"""ALiBi, T5's learned bias and learned positions."""

import math

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, assert_same, draw, loop_attention, redraw
from tests.variants import SMALL, batch, run
from transformer_annotated import (
    ALIBI,
    DECODER_ONLY,
    T5_BIAS,
    ALiBi,
    Cache,
    LearnedPositions,
    Mask,
    MultiHeadAttention,
    T5Bias,
    Transformer,
    attend,
    patch,
    sdpa,
    spec,
)
from transformer_annotated.modern.relative_bias import LinearBias, alibi_slopes, t5_bucket

SHAPES = [(32, 128), (8, 20), (16, 64), (64, 512), (12, 33)]
# The exponents of two, as published; for 6 heads those of 4 heads and then every other one of 8.
EXPONENTS = {
    1: [8.0],
    2: [4.0, 8.0],
    6: [2.0, 4.0, 6.0, 8.0, 1.0, 3.0],
    8: [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
}
POSITIONS = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 2, 300]])


def bucket_by_hand(distance: int, n: int, most: int, bidirectional: bool) -> int:
    """Count the bucket's lower edges that the distance has reached, in exact order."""
    first, steps = 0, max(-distance, 0)
    if bidirectional:
        n //= 2
        first, steps = (n if distance > 0 else 0), abs(distance)
    exact = n // 2
    edges = [*range(exact)]
    edges += [exact * (most / exact) ** (b / (n - exact)) - 1e-9 for b in range(n - exact)]
    return first + sum(steps >= edge for edge in edges) - 1


def model(*patches: dict, dtype: torch.dtype = torch.float64) -> Transformer:
    built = Transformer(patch(SMALL, *patches))
    redraw(built)
    return built.to(dtype).eval()


# ALiBi -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_heads", EXPONENTS)
def test_slopes_by_hand(n_heads: int) -> None:
    expected = torch.tensor([2.0**-e for e in EXPONENTS[n_heads]])
    assert_close(alibi_slopes(n_heads), expected, tolerance=1e-7)


def test_alibi_by_hand() -> None:
    keys = torch.tensor([[3, 0, 7], [1, 1, 900]])
    bias = ALiBi(6)(POSITIONS, keys).dense()
    slopes = [2.0**-e for e in EXPONENTS[6]]
    expected = torch.tensor(
        [
            [[[-s * abs(int(i) - int(j)) for j in keys[b]] for i in POSITIONS[b]] for s in slopes]
            for b in range(2)
        ]
    )
    assert_close(bias, expected)


def test_slopes_and_tensors_equal_to_mpt_and_bloom() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    T = 40
    positions = torch.arange(T)[None]
    seen = torch.ones(T, T).tril().bool()
    for n_heads in (*range(1, 34), 40, 64):
        ours = ALiBi(n_heads)(positions, positions).dense()[0]  # (H, T, S)
        mpt = build_mpt_alibi_tensor(n_heads, T)  # (H, 1, S), for the last query
        assert_close(ours[:, -1:], mpt, tolerance=1e-5)
        bloom = build_alibi_tensor(torch.ones(1, T), n_heads, torch.float32)  # (H, 1, S)
        for theirs in (mpt, bloom):  # they differ from ours by one number a row
            gap = (theirs - ours).masked_fill(~seen, 0.0)
            first = gap[:, :, :1].expand_as(gap).masked_fill(~seen, 0.0)
            assert_close(gap, first, tolerance=3e-5)


def test_attention_equal_to_blooms_form() -> None:
    """Bloom adds slope * j, a row's constant away: output and gradients are the same."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    q, k, v = (draw(2, 6, 5, 4, seed=n, dtype=torch.float64).requires_grad_() for n in "qkv")
    positions, mask = torch.arange(5)[None], Mask(causal=True)
    theirs = build_alibi_tensor(torch.ones(1, 5), 6, torch.float64)[None]
    assert_same(
        attend(q, k, v, mask, bias=ALiBi(6)(positions, positions)),
        loop_attention(q, k, v, mask, bias=theirs),
        {"q": q, "k": k, "v": v},
    )


@pytest.mark.parametrize("function", [attend, sdpa])
def test_alibi_equal_to_a_loop(function) -> None:
    q, k, v = (draw(2, 4, 6, 4, seed=n, dtype=torch.float64).requires_grad_() for n in "qkv")
    bias = ALiBi(4)(POSITIONS, POSITIONS)
    for mask in (None, Mask(causal=True)):
        assert_same(
            function(q, k, v, mask, bias=bias),
            loop_attention(q, k, v, mask, bias=bias.dense().double()),
            {"q": q, "k": k, "v": v},
        )


@pytest.mark.parametrize("function", [attend, sdpa])
def test_a_slope_of_zero_is_no_bias(function) -> None:
    q, k, v = (draw(2, 4, 6, 4, seed=n, dtype=torch.float64) for n in "qkv")
    bias = LinearBias(torch.zeros(4), POSITIONS, POSITIONS)
    assert_close(function(q, k, v, bias=bias), function(q, k, v))


def test_slopes_keep_32_bits_in_a_small_model() -> None:
    attention = MultiHeadAttention(12, n_heads=6).bfloat16()
    bias = ALiBi(6).bfloat16()(POSITIONS, POSITIONS)
    assert bias.dense().dtype == torch.float32
    x = draw(2, 6, 12, seed="x").bfloat16()
    assert attention(x, positions=POSITIONS, bias=lambda i, j: bias).dtype == torch.bfloat16


# T5 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_by_hand(bidirectional: bool) -> None:
    distances = torch.arange(-600, 601)
    for n, most in SHAPES:
        expected = [bucket_by_hand(int(d), n, most, bidirectional) for d in distances]
        assert t5_bucket(distances, n, most, bidirectional).tolist() == expected, (n, most)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_and_bias_equal_to_hugging_faces(bidirectional: bool) -> None:
    from transformers.models.t5.configuration_t5 import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    distances = torch.arange(-600, 601)
    for n, most in SHAPES:
        theirs = T5Attention._relative_position_bucket(distances, bidirectional, n, most)
        assert torch.equal(t5_bucket(distances, n, most, bidirectional), theirs)
        config = T5Config(
            d_model=16, d_kv=4, num_heads=4, is_decoder=not bidirectional,
            relative_attention_num_buckets=n, relative_attention_max_distance=most,
        )  # fmt: skip
        attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
        redraw(attention)
        ours = T5Bias(4, n_buckets=n, max_distance=most, bidirectional=bidirectional)
        ours.table.load_state_dict(attention.relative_attention_bias.state_dict())
        for T, S, past in ((70, 70, 0), (1, 90, 89), (3, 150, 147)):
            bias = ours(torch.arange(past, past + T)[None], torch.arange(S)[None]).dense()
            assert_close(bias, attention.compute_bias(T, S, past_seen_tokens=past), tolerance=1e-6)


@pytest.mark.parametrize("function", [attend, sdpa])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_and_its_gradient_equal_to_a_loop(function, bidirectional: bool) -> None:
    """One pair of positions at a time, with left padding and a distance beyond the last edge."""
    bias = T5Bias(4, n_buckets=8, max_distance=20, bidirectional=bidirectional).double()
    redraw(bias)
    table = bias.table.weight
    q, k, v = (draw(2, 4, 6, 4, seed=n, dtype=torch.float64).requires_grad_() for n in "qkv")
    by_hand = torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [table[bucket_by_hand(int(j - i), 8, 20, bidirectional)] for j in row]
                    )
                    for i in row
                ]
            )
            for row in POSITIONS
        ]
    ).permute(0, 3, 1, 2)  # (B, H, T, S)
    mask = Mask(causal=not bidirectional)
    assert_same(
        function(q, k, v, mask, bias=bias(POSITIONS, POSITIONS)),
        loop_attention(q, k, v, mask, bias=by_hand),
        {"q": q, "k": k, "v": v, "table": table},
    )


def test_a_fresh_table_is_no_bias() -> None:
    nowhere = {"embedding.position": None}
    with_table, without = Transformer(patch(SMALL, T5_BIAS)), Transformer(patch(SMALL, nowhere))
    missing = with_table.load_state_dict(without.state_dict(), strict=False)
    assert missing.missing_keys == ["encoder.bias.table.weight", "decoder.bias.table.weight"]
    (src, a), (tgt, b) = batch((5, 3), 0), batch((4, 6), 1)
    assert_close(*(run("seq2seq", m.eval(), src, tgt, a, b) for m in (with_table, without)))


def test_one_table_a_stack_and_one_sided_in_the_decoder() -> None:
    built = model(T5_BIAS)
    tables = {n: p for n, p in built.named_parameters() if "bias.table" in n}
    assert {n: tuple(p.shape) for n, p in tables.items()} == {
        "encoder.bias.table.weight": (32, 4),
        "decoder.bias.table.weight": (32, 4),
    }
    assert built.encoder.bias.bidirectional
    assert not built.decoder.bias.bidirectional


# Whole models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [ALIBI, T5_BIAS])
def test_a_model_knows_distances_only(change: dict) -> None:
    built = model(DECODER_ONLY, change)
    ids, padding = batch((7, 4), 3, left=True)
    at = (padding.long().cumsum(1) - 1).clamp(min=0)
    here, there = (built.decode(ids, padding=padding, positions=at + k) for k in (0, 37))
    assert torch.equal(here, there)
    moved = at.clone()
    moved[:, -1] += 5  # the last token further away: that must show
    assert not torch.allclose(built.decode(ids, padding=padding, positions=moved), here)


@pytest.mark.parametrize("change", [ALIBI, T5_BIAS])
def test_cross_attention_gets_no_bias(change: dict) -> None:
    built = model(change)
    (src, a), (tgt, _) = batch((5, 3), 0), batch((4, 4), 1)
    memory = built.encode(src, a)
    moved = torch.arange(5)[None] * 11
    here, there = (built.decode(tgt, memory, a, memory_positions=p) for p in (None, moved))
    assert torch.equal(here, there)


@pytest.mark.parametrize(("change", "alike"), [({}, False), (ALIBI, True), (T5_BIAS, False)])
def test_alibi_cannot_tell_a_source_from_its_mirror_image(change: dict, alike: bool) -> None:
    """|j - i| knows no left and right, and cross-attention knows no positions."""
    built = model(change)
    (src, _), (tgt, _) = batch((7, 7), 0), batch((4, 4), 1)
    gap = float((built(src, tgt) - built(src.flip(1), tgt)).abs().max().detach())
    assert gap < 1e-10 if alike else gap > 1e-3


@pytest.mark.parametrize("change", [ALIBI, T5_BIAS])
def test_one_token_at_a_time_equals_all_at_once(change: dict) -> None:
    built = model(DECODER_ONLY, change)
    ids, _ = batch((9, 9), 3)
    whole, cache = built.decode(ids), Cache(built)
    with torch.no_grad():
        steps = [
            built.decode(ids[:, t : t + 1], positions=torch.tensor([[t]]), cache=cache)
            for t in range(9)
        ]
    assert_close(torch.cat(steps, dim=1), whole.detach())


def test_a_model_is_told_its_positions_once() -> None:
    with pytest.raises(ValueError, match=r"told twice.*embedding.position.*encoder.bias"):
        Transformer(patch(SMALL, {"bias": spec(ALiBi)}))


# Learned positions -------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 2])
def test_learned_positions_by_hand(offset: int) -> None:
    learned = LearnedPositions(6, max_len=9, offset=offset)
    redraw(learned)
    positions = torch.tensor([[0, 1, 8], [5, 5, 0]])
    table = learned.table.weight
    assert table.shape == (9 + offset, 6)
    expected = torch.stack([torch.stack([table[p + offset] for p in row]) for row in positions])
    assert_same(learned(positions), expected, {"table": table})


def test_learned_positions_end() -> None:
    built = Transformer(
        patch(SMALL, DECODER_ONLY, {"embedding.position": spec(LearnedPositions, max_len=8)})
    )
    built(torch.zeros(1, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"below max_len=8, got 8"):
        built(torch.zeros(1, 9, dtype=torch.long))
    with pytest.raises(ValueError, match=r"below max_len=8, got 11"):
        LearnedPositions(4, max_len=8)(torch.tensor([[11]]))
    with pytest.raises(ValueError, match=r"positions must be at least 0 .* got -1"):
        LearnedPositions(4, max_len=8, offset=2)(torch.tensor([[3, -1]]))


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ALiBi(0), "n_heads must be .* got 0"),
        (lambda: alibi_slopes(-1), "n_heads must be .* got -1"),
        (lambda: T5Bias(0), "n_heads must be .* got 0"),
        (lambda: T5Bias(4, n_buckets=7), "n_buckets must be even and at least 4, got 7"),
        (lambda: T5Bias(4, n_buckets=2), "n_buckets must be even and at least 4, got 2"),
        (lambda: T5Bias(4, n_buckets=1, bidirectional=False), "n_buckets .* at least 2, got 1"),
        (lambda: T5Bias(4, max_distance=8), "max_distance must be above 8, .* got 8"),
        (lambda: T5Bias(4, max_distance=16, bidirectional=False), "above 16, .* got 16"),
        (lambda: LearnedPositions(4, max_len=0), "max_len must be .* got 0"),
        (lambda: LearnedPositions(4, offset=-1), "offset must be .* got -1"),
        (lambda: ALiBi(4)(None, POSITIONS), "positions must be given"),
        (lambda: T5Bias(4)(POSITIONS, None), "key_positions must be given"),
    ],
)
def test_bad_input(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_edges_that_are_allowed() -> None:
    nearest = T5Bias(2, n_buckets=2, max_distance=2, bidirectional=False)
    nn.init.constant_(nearest.table.weight[1], 3.0)
    bias: Tensor = nearest(torch.tensor([[3]]), torch.arange(4)[None]).dense()
    assert bias[0, 0, 0].tolist() == [3.0, 3.0, 3.0, 0.0]
    assert T5Bias(4, n_buckets=7, max_distance=4, bidirectional=False).table.weight.shape == (7, 4)
    assert math.isclose(float(alibi_slopes(1)), 2.0**-8)
