"""Multi-head attention: its heads, its seams, and what a recorder sees."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, assert_same, draw, loop_attention, redraw
from transformer_annotated import (
    LayerNorm,
    Mask,
    MultiHeadAttention,
    attention_weights,
    record_attention,
    sdpa,
    spec,
)

B, T, S, D, H, d = 2, 3, 4, 12, 4, 3


class Shift(nn.Module):
    """A stand-in for rotary positions: it adds positions to queries and keys."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.zeros(head_dim))

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        q = q + positions[:, None, :, None] * self.direction
        return q, k + key_positions[:, None, :, None] * self.direction


SEAMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "grouped": {"n_kv_heads": 2},
    "one key head": {"n_kv_heads": 1},
    "wide heads": {"head_dim": 5},
    "no bias": {"qkv_bias": False, "out_bias": False},
    "window": {"window": 2},
    "softcap": {"softcap": 1.5},
    "scale": {"scale": 0.3},
    "qk_norm": {"qk_norm": spec(LayerNorm)},
    "position": {"position": spec(Shift)},
    "sdpa": {"attend": sdpa},
    "many": {
        "n_kv_heads": 2, "head_dim": 5, "window": 2, "qk_norm": spec(LayerNorm),
        "position": spec(Shift), "qkv_bias": False, "scale": 0.4,
    },
}  # fmt: skip


def by_hand(m: MultiHeadAttention, x: Tensor, source: Tensor, **rest: Any) -> Tensor:
    """Each head by itself, from rows of the weight matrices, without a reshape."""

    def project(linear: nn.Linear, rows: slice, y: Tensor, norm: nn.Module | None) -> Tensor:
        y = y @ linear.weight[rows].T + (0 if linear.bias is None else linear.bias[rows])
        return y if norm is None else norm(y)

    width = m.head_dim
    rows = [slice(h * width, (h + 1) * width) for h in range(m.n_heads)]
    q = torch.stack([project(m.q_proj, r, x, m.q_norm) for r in rows], dim=1)
    k = torch.stack([project(m.k_proj, r, source, m.k_norm) for r in rows[: m.n_kv_heads]], dim=1)
    v = torch.stack([project(m.v_proj, r, source, None) for r in rows[: m.n_kv_heads]], dim=1)
    if m.position is not None:
        q, k = m.position(q, k, torch.arange(x.shape[1])[None], torch.arange(source.shape[1])[None])
    heads = loop_attention(q, k, v, scale=m.scale, softcap=m.softcap, **rest)
    joined = torch.cat([heads[:, h] for h in range(m.n_heads)], dim=-1)
    out = joined @ m.out_proj.weight.T
    return out if m.out_proj.bias is None else out + m.out_proj.bias


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("seam", SEAMS)
def test_equal_to_heads_by_hand(seam: str, cross: bool, dtype: torch.dtype) -> None:
    m = MultiHeadAttention(D, H, **SEAMS[seam]).to(dtype)
    redraw(m)
    x = draw(B, T, D, seed="x", dtype=dtype).requires_grad_()
    memory = draw(B, S, D, seed="memory", dtype=dtype).requires_grad_() if cross else None
    positions, memory_positions = torch.arange(T)[None], torch.arange(S)[None]
    ours = m(x, memory, positions=positions, memory_positions=memory_positions)
    theirs = by_hand(m, x, x if memory is None else memory, mask=m.mask)
    inputs = {"x": x} | ({} if memory is None else {"memory": memory})
    assert_same(ours, theirs, {**inputs, **dict(m.named_parameters())})


def test_the_window_is_joined_to_the_mask() -> None:
    m = MultiHeadAttention(D, H, window=2).double()
    redraw(m)
    x = draw(B, 5, D, seed="x", dtype=torch.float64)
    ours = m(x, mask=Mask(causal=True))
    assert_close(ours, by_hand(m, x, x, mask=Mask(causal=True, window=2)))
    assert not torch.allclose(ours, by_hand(m, x, x, mask=Mask(causal=True)))


def test_bias_is_made_from_both_positions() -> None:
    """The bias receives the positions of the queries and of the keys, in that order."""

    class Distance:
        def __init__(self, queries: Tensor, keys: Tensor) -> None:
            self.tensor = -0.5 * (queries[:, :, None] - 2.0 * keys[:, None, :])[:, None].double()

        def dense(self) -> Tensor:
            return self.tensor

    m = MultiHeadAttention(D, H).double()
    redraw(m)
    x, memory = draw(B, T, D, seed="x").double(), draw(B, S, D, seed="memory").double()
    here, there = torch.arange(T)[None] + 7, torch.arange(S)[None] * 3
    ours = m(x, memory, positions=here, memory_positions=there, bias=Distance)
    assert_close(ours, by_hand(m, x, memory, bias=Distance(here, there).dense()))
    itself = m(x, positions=here, bias=Distance)
    assert_close(itself, by_hand(m, x, x, bias=Distance(here, here).dense()))


def test_attention_dropout_in_training_only() -> None:
    m = MultiHeadAttention(D, H, dropout=0.5)
    x = draw(B, T, D, seed="x")
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))
    plain = MultiHeadAttention(D, H).eval()
    plain.load_state_dict(m.state_dict())
    assert torch.equal(m(x), plain(x))


@pytest.mark.parametrize("seam", ["paper", "grouped", "window", "softcap", "sdpa"])
def test_recorded_weights_are_those_used(seam: str) -> None:
    """Weights times values, joined and projected, is the output; afterwards nothing is changed."""
    m = MultiHeadAttention(D, H, **SEAMS[seam])
    redraw(m)
    before = m.attend
    x, mask = draw(B, T, D, seed="x"), Mask(causal=True)
    with record_attention(nn.ModuleDict({"it": m})) as maps:
        output = m(x, mask=mask)
    assert m.attend is before
    assert torch.equal(output, m(x, mask=mask))
    assert list(maps) == ["it"]
    _, v = m.keys_values(x)
    values = v.repeat_interleave(H // m.n_kv_heads, dim=1)
    joined = torch.cat([(maps["it"] @ values)[:, h] for h in range(H)], dim=-1)
    assert_close(m.out_proj(joined), output)
    q, k = m.split(m.q_proj(x)), m.keys_values(x)[0]
    expected = attention_weights(q, k, mask & m.mask, softcap=m.softcap)
    assert_close(maps["it"], expected.detach())


def test_recording_ends_after_an_error() -> None:
    m = MultiHeadAttention(D, H)
    before = m.attend
    with pytest.raises(RuntimeError, match="stop"), record_attention(m):
        raise RuntimeError("stop")
    assert m.attend is before
