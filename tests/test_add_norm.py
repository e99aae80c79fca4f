"""LayerNorm and the paper's residual."""

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, assert_same, draw, redraw
from transformer_annotated import LayerNorm, PostNorm, spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_equal_to_torch(eps: float, bias: bool, dtype: torch.dtype) -> None:
    """A large eps too: with a small one, eps outside the square root would hardly show."""
    ours, theirs = LayerNorm(7, eps, bias).to(dtype), nn.LayerNorm(7, eps, bias=bias, dtype=dtype)
    redraw(ours)
    theirs.load_state_dict(ours.state_dict())
    x = (3 + 2 * draw(2, 3, 7, seed="x", dtype=dtype)).requires_grad_()
    mine, stock = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert_same(ours(x), theirs(x), {"x": x, **mine}, {"x": x, **stock})


def test_large_offset_keeps_its_digits() -> None:
    """Variance as a mean of centred squares: E[x^2] - E[x]^2 would lose every digit here."""
    x = 1e4 + draw(4, 16, seed="x", dtype=torch.float64)
    exact = nn.functional.layer_norm(x, (16,))
    ours = LayerNorm(16)(x.float()).double()
    assert_close(ours, exact, tolerance=5e-3)  # 1e4 in fp32 has steps of 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_normalised_in_32_bit(dtype: torch.dtype) -> None:
    """Squares of 300 overflow float16; the statistics are computed wider."""
    x = (300 * draw(4, 16, seed="x")).to(dtype)
    ours = LayerNorm(16).to(dtype)(x)
    assert ours.dtype == dtype
    exact = nn.functional.layer_norm(x.double(), (16,))
    assert (ours.double() - exact).abs().max().item() <= 4 * torch.finfo(dtype).eps


def test_post_norm_written_out() -> None:
    m = PostNorm(6, spec(LayerNorm), 0.0).double()
    redraw(m)
    x = draw(2, 3, 6, seed="x", dtype=torch.float64).requires_grad_()
    w = draw(6, 6, seed="w", dtype=torch.float64).requires_grad_()
    y = x + torch.tanh(x @ w)
    theirs = nn.functional.layer_norm(y, (6,), m.norm.weight, m.norm.bias)
    ours = m(x, lambda x: torch.tanh(x @ w))
    assert_same(ours, theirs, {"x": x, "w": w, **dict(m.named_parameters())})


def test_dropout_falls_on_the_sublayer_alone() -> None:
    """Section 5.4: the sub-layer's output is dropped, then added to an untouched input."""

    class Nothing(nn.Module):
        def __init__(self, d_model: int) -> None:
            super().__init__()

        def forward(self, x: Tensor) -> Tensor:
            return x

    m = PostNorm(1000, spec(Nothing), 0.25)
    x = draw(1, 1, 1000, seed="x", dtype=torch.float64)
    added = m(x, lambda x: torch.ones_like(x)) - x
    dropped = added.abs() < 1e-9
    assert bool((dropped | ((added - 4 / 3).abs() < 1e-9)).all())
    assert 0.15 < dropped.double().mean().item() < 0.35
    m.eval()
    assert_close(m(x, lambda x: torch.ones_like(x)), x + 1)
