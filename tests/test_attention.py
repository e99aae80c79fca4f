"""Attention: `attend` and `sdpa` against a loop, against torch, and at their edges."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference import assert_close, assert_same, draw, gradients, loop_attention, may_see
from transformer_annotated import Attend, Mask, attend, attention_weights, sdpa

B, T, S = 2, 3, 5
PADDING = torch.tensor([[True] * 5, [False, True, True, True, False]])
ALLOWED = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1], [1, 1, 0, 1, 1]]).bool()
MASKS: dict[str, Mask | None] = {
    "none": None,
    "causal": Mask(causal=True),
    "padding": Mask(padding=PADDING),
    "window": Mask(window=2),
    "allowed": Mask(allowed=ALLOWED),
    "allowed per sentence": Mask(allowed=torch.stack((ALLOWED, ~ALLOWED))),
    "allowed once": Mask(allowed=ALLOWED[None]),
    "causal padding": Mask(causal=True, padding=PADDING),
    "causal window": Mask(causal=True, window=2),
    "window padding": Mask(window=1, padding=PADDING),
    "everything": Mask(causal=True, padding=PADDING, window=3, allowed=ALLOWED),
}


class Added:
    """A bias that is one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def dense(self) -> Tensor:
        return self.tensor


def heads(
    dtype: torch.dtype, *, n_heads: int = 4, n_kv_heads: int = 4, queries: int = T, keys: int = S
) -> dict[str, Tensor]:
    """Queries, keys and values that want gradients; a value is wider than a key."""
    shapes = {
        "q": (B, n_heads, queries, 6), "k": (B, n_kv_heads, keys, 6), "v": (B, n_kv_heads, keys, 7)
    }  # fmt: skip
    return {n: draw(*s, seed=n, dtype=dtype).requires_grad_() for n, s in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("function", [attend, sdpa])
def test_equal_to_a_loop(function: Attend, mask: str, dtype: torch.dtype) -> None:
    x = heads(dtype)
    ours = function(x["q"], x["k"], x["v"], MASKS[mask])
    assert_same(ours, loop_attention(x["q"], x["k"], x["v"], MASKS[mask]), x)


@pytest.mark.parametrize("n_kv_heads", [1, 2])
@pytest.mark.parametrize("mask", ["none", "causal padding"])
@pytest.mark.parametrize("function", [attend, sdpa])
def test_grouped_heads_equal_to_a_loop(function: Attend, mask: str, n_kv_heads: int) -> None:
    x = heads(torch.float64, n_kv_heads=n_kv_heads)
    ours = function(x["q"], x["k"], x["v"], MASKS[mask])
    assert_same(ours, loop_attention(x["q"], x["k"], x["v"], MASKS[mask]), x)


@pytest.mark.parametrize("scale", [None, 1.0, 0.7])
@pytest.mark.parametrize("mask", ["none", "everything"])
@pytest.mark.parametrize("shape", [(1, 4, T, S), (B, 4, T, S), (1, 4, 1, S)], ids=str)
@pytest.mark.parametrize("function", [attend, sdpa])
def test_bias_and_scale_equal_to_a_loop(
    function: Attend, shape: tuple[int, ...], mask: str, scale: float | None
) -> None:
    x = heads(torch.float64)
    x["bias"] = draw(*shape, seed="bias", dtype=torch.float64).requires_grad_()
    q, k, v, bias = x.values()
    ours = function(q, k, v, MASKS[mask], bias=Added(bias), scale=scale)
    assert_same(ours, loop_attention(q, k, v, MASKS[mask], bias=bias, scale=scale), x)


@pytest.mark.parametrize("mask", ["none", "everything"])
def test_softcap_equal_to_a_loop(mask: str) -> None:
    """The cap comes after the scale and before the bias."""
    x = heads(torch.float64)
    x["bias"] = draw(1, 4, T, S, seed="bias", dtype=torch.float64).requires_grad_()
    q, k, v, bias = x.values()
    rest = {"scale": 2.0, "softcap": 1.5}
    ours = attend(q, k, v, MASKS[mask], bias=Added(bias), **rest)  # type: ignore[arg-type]
    theirs = loop_attention(q, k, v, MASKS[mask], bias=bias, **rest)  # type: ignore[arg-type]
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 7), (4, 9)])
def test_attend_equal_to_torch(queries: int, keys: int, dtype: torch.dtype) -> None:
    """With T == S torch's own `is_causal` is the same rule; else the triangle ends right."""
    q, k, v = (x := heads(dtype, queries=queries, keys=keys)).values()
    assert_same(attend(q, k, v), F.scaled_dot_product_attention(q, k, v), x)
    triangle = torch.ones(queries, keys).tril(keys - queries).bool()
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=triangle)
    assert_same(attend(q, k, v, Mask(causal=True)), theirs, x)
    if queries == keys:
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert_same(attend(q, k, v, Mask(causal=True)), theirs, x)


@pytest.mark.parametrize("function", [attend, sdpa])
def test_square_causal_equal_to_a_loop(function: Attend) -> None:
    """T == S: the case for which `sdpa` calls the fused causal kernel."""
    x = heads(torch.float64, queries=5)
    ours = function(x["q"], x["k"], x["v"], Mask(causal=True))
    assert_same(ours, loop_attention(x["q"], x["k"], x["v"], Mask(causal=True)), x)


# Masks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(3, 5), (5, 5), (5, 3), (1, 4)])
def test_dense_mask_equal_to_a_loop(queries: int, keys: int) -> None:
    """Every combination of rules, and each pair of positions by itself."""
    padding = draw(B, keys, seed="padding") > 0
    allowed = draw(B, queries, keys, seed="allowed") > 0
    rules = itertools.product(
        (False, True), (None, 1, 2, 99), (None, padding), (None, allowed, allowed[0])
    )
    for causal, window, pad, rule in rules:
        mask = Mask(causal=causal, window=window, padding=pad, allowed=rule)
        dense = mask.dense(B, queries, keys)
        pairs = itertools.product(range(B), range(queries), range(keys))
        expected = [may_see(mask, b, i, j, queries, keys) for b, i, j in pairs]
        if dense is None:
            assert all(expected)
        else:
            seen = dense.expand(B, 1, queries, keys) if dense.ndim == 4 else dense
            seen = seen.expand(B, 1, queries, keys).flatten()
            assert seen.tolist() == expected


@pytest.mark.parametrize("one", MASKS)
@pytest.mark.parametrize("other", MASKS)
def test_and_is_both(one: str, other: str) -> None:
    a, b = MASKS[one] or Mask(), MASKS[other] or Mask()
    if a.allowed is not None and b.allowed is not None and a.allowed.ndim != b.allowed.ndim:
        a, b = (b, a) if a.allowed.ndim == 2 else (a, b)
    everything = torch.ones(B, 1, T, S).bool()
    dense = [m.dense(B, T, S) for m in (a, b, a & b)]
    first, second, both = (everything if d is None else d.expand(B, 1, T, S) for d in dense)
    assert torch.equal(both, first & second)


def test_a_new_query_sees_the_whole_cache() -> None:
    """T != S: the last query stands at the last key, so one new query may see all five."""
    dense = Mask(causal=True).dense(1, 1, 5)
    assert dense is not None
    assert dense.tolist() == [[True] * 5]
    dense = Mask(causal=True).dense(1, 2, 4)
    assert dense is not None
    assert dense.tolist() == [[True, True, True, False], [True] * 4]


# Edges ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("function", [attend, sdpa])
def test_a_query_that_sees_nothing_gets_zero(function: Attend, biased: bool) -> None:
    """Its output is exactly zero, every gradient is finite, and other rows do not change."""
    allowed = ALLOWED.clone()
    allowed[1] = False
    x = heads(torch.float32)
    bias = Added(draw(1, 4, T, S, seed="bias")) if biased else None
    output = function(x["q"], x["k"], x["v"], Mask(allowed=allowed), bias=bias)
    assert torch.equal(output[:, :, 1], torch.zeros_like(output[:, :, 1]))
    others = function(x["q"], x["k"], x["v"], Mask(allowed=ALLOWED), bias=bias)
    assert_close(output[:, :, [0, 2]], others[:, :, [0, 2]])
    found = gradients(output, x)
    assert all(bool(torch.isfinite(g).all()) for g in found.values())
    assert torch.equal(found["q"][:, :, 1], torch.zeros_like(found["q"][:, :, 1]))


def test_weights_sum_to_one() -> None:
    x = heads(torch.float64)
    for mask in MASKS.values():
        total = attention_weights(x["q"], x["k"], mask).sum(dim=-1)
        queries = itertools.product(range(B), range(T))
        sees = [any(may_see(mask, b, i, j, T, S) for j in range(S)) for b, i in queries]
        expected = torch.tensor(sees, dtype=torch.float64).view(B, 1, T)
        assert_close(total, expected.expand_as(total))


@pytest.mark.parametrize("function", [attend, sdpa])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(function: Attend, dtype: torch.dtype) -> None:
    """Within twice the rounding of the inputs, and no overflow from a masked score."""
    x = {n: t.detach() for n, t in heads(torch.float32).items()}
    mask = MASKS["causal padding"]
    output = function(*(t.to(dtype) for t in x.values()), mask)
    assert output.dtype == dtype
    exact = loop_attention(*x.values(), mask)  # type: ignore[arg-type]
    worst = (output.float() - exact).abs().max().item()
    assert worst <= 16 * torch.finfo(dtype).eps


def test_large_scores_do_not_overflow() -> None:
    """Scores in the thousands: softmax subtracts the largest first."""
    q, k, v = (t.detach() for t in heads(torch.float32).values())
    output = attend(1000 * q, k, v)
    assert bool(torch.isfinite(output).all())
    assert_close(output, F.scaled_dot_product_attention(1000 * q, k, v), tolerance=1e-3)


def test_dropout_drops_whole_weights() -> None:
    """With values that are one-hot the output is the weights: dropped, or scaled by 1 / (1 - p).

    Each value holds its one twice, and both are dropped together: it is the weight that goes.
    """
    q, k, _ = (t.detach() for t in heads(torch.float64, keys=S).values())
    v = torch.eye(S, dtype=torch.float64).repeat(1, 2).expand(B, 4, S, 2 * S)
    weights, dropped = attend(q, k, v), attend(q, k, v, dropout=0.5)
    assert torch.equal(dropped[..., :S], dropped[..., S:])
    ratio = dropped / weights
    assert bool(((ratio == 0) | ((ratio - 2).abs() < 1e-9)).all())
    assert 0.3 < (ratio == 0).double().mean().item() < 0.7
    assert torch.equal(attend(q, k, v), weights)  # without dropout nothing is random
