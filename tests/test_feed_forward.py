"""The feed-forward network against two matrix products written out."""

import pytest
import torch
from torch import nn

from tests.reference import assert_same, draw, redraw
from transformer_annotated import FeedForward, spec


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_two_products(bias: bool, dtype: torch.dtype) -> None:
    m = FeedForward(6, 10, bias=bias).to(dtype)
    redraw(m)
    x = draw(2, 3, 6, seed="x", dtype=dtype).requires_grad_()
    hidden = x @ m.up.weight.T + (m.up.bias if bias else 0)
    hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))  # ReLU
    theirs = hidden @ m.down.weight.T + (m.down.bias if bias else 0)
    assert_same(m(x), theirs, {"x": x, **dict(m.named_parameters())})


def test_each_position_by_itself() -> None:
    m = FeedForward(6, 10).double()
    redraw(m)
    x = draw(2, 5, 6, seed="x", dtype=torch.float64)
    together = m(x)
    for t in range(5):
        assert torch.allclose(together[:, t], m(x[:, t]), atol=1e-12)


def test_the_activation_is_a_seam() -> None:
    m = FeedForward(6, 10, activation=spec(nn.GELU, approximate="tanh")).double()
    redraw(m)
    x = draw(2, 3, 6, seed="x", dtype=torch.float64).requires_grad_()
    theirs = m.down(nn.functional.gelu(m.up(x), approximate="tanh"))
    assert_same(m(x), theirs, {"x": x, **dict(m.named_parameters())})


def test_dropout_on_the_hidden_layer_in_training_only() -> None:
    m = FeedForward(6, 1000, dropout=0.5, bias=False)
    x = draw(1, 6, seed="x")
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m(x))
    plain = FeedForward(6, 1000, bias=False)
    plain.load_state_dict(m.state_dict())
    assert torch.equal(m(x), plain(x))
