"""Gated feed-forward: by hand, against Llama's and T5's, and what a gate of ones leaves."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.reference import assert_close, assert_same, draw, redraw
from tests.variants import SMALL
from transformer_annotated import (
    GEGLU,
    GELU,
    PAPER_BASE,
    SWIGLU,
    FeedForward,
    GatedFeedForward,
    Transformer,
    count_parameters,
    from_json,
    matched_width,
    patch,
    spec,
    to_json,
)
from transformer_annotated.modern.gated import quiet_share

ACTIVATIONS = {
    "silu": (spec(nn.SiLU), lambda z: z / (1 + torch.exp(-z))),
    "gelu": (spec(nn.GELU), lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
    "tanh": (
        spec(nn.GELU, approximate="tanh"),
        lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2,
    ),
    "relu": (spec(nn.ReLU), lambda z: z * (z > 0)),
    "sigmoid": (spec(nn.Sigmoid), lambda z: 1 / (1 + torch.exp(-z))),
    "none": (spec(nn.Identity), lambda z: z),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_by_hand(name: str, bias: bool) -> None:
    activation, by_hand = ACTIVATIONS[name]
    m = GatedFeedForward(6, 10, activation=activation, bias=bias).double()
    redraw(m)
    x = draw(2, 3, 6, seed="x", dtype=torch.float64).requires_grad_()

    def linear(layer: nn.Linear, x: Tensor) -> Tensor:
        return x @ layer.weight.T + (layer.bias if bias else 0)

    theirs = linear(m.down, by_hand(linear(m.gate, x)) * linear(m.up, x))
    assert_same(m(x), theirs, {"x": x, **dict(m.named_parameters())})


def hugging_face(name: str) -> tuple[Any, dict[str, str]]:
    """A gated network of `transformers`, and its names for our three matrices."""
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import LlamaConfig, T5Config
        from transformers.models.llama.modeling_llama import LlamaMLP
        from transformers.models.t5.modeling_t5 import T5DenseGatedActDense
    if name == "llama":
        llama = LlamaConfig(hidden_size=12, intermediate_size=20, num_attention_heads=2)
        return LlamaMLP(llama), {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
    t5 = T5Config(d_model=12, d_ff=20, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    return T5DenseGatedActDense(t5), {"wi_0": "gate", "wi_1": "up", "wo": "down"}


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_equal_to_hugging_face(name: str) -> None:
    activation = {"llama": spec(nn.SiLU), "t5": spec(nn.GELU, approximate="tanh")}[name]
    ours = GatedFeedForward(12, 20, activation=activation)
    redraw(ours)
    theirs, names = hugging_face(name)
    state = ours.state_dict()
    theirs.load_state_dict(
        {f"{its}.weight": state[f"{mine}.weight"] for its, mine in names.items()}
    )
    x = draw(2, 3, 12, seed="x").requires_grad_()
    its = dict(theirs.named_parameters())
    same = {f"{mine}.weight": its[f"{name}.weight"] for name, mine in names.items()}
    assert_same(
        ours(x), theirs(x), {"x": x, **dict(ours.named_parameters())}, {"x": x, **same}
    )  # fmt: skip


def test_a_gate_of_ones_is_no_gate() -> None:
    """The identity as activation, and a gate that is 1 everywhere: two linear layers are left."""
    m = GatedFeedForward(6, 10, activation=spec(nn.Identity), bias=True).double()
    redraw(m)
    with torch.no_grad():
        m.gate.weight.zero_()
        m.gate.bias.fill_(1.0)
    x, y = (draw(4, 6, seed=seed, dtype=torch.float64) for seed in "xy")
    assert_close(m(x), m.down(m.up(x)))
    zero = m(torch.zeros_like(x))
    assert_close(m(2 * x - 3 * y) - zero, 2 * (m(x) - zero) - 3 * (m(y) - zero))


def test_an_open_gate_is_quadratic() -> None:
    """Without activation and biases, twice the input gives four times the output."""
    m = GatedFeedForward(6, 10, activation=spec(nn.Identity)).double()
    redraw(m)
    x = draw(4, 6, seed="x", dtype=torch.float64)
    assert_close(m(2 * x), 4 * m(x))


def test_one_matrix_or_two() -> None:
    """Gate and up can be one product, whose result is cut in half."""
    m = GatedFeedForward(6, 10).double()
    redraw(m)
    x = draw(2, 3, 6, seed="x", dtype=torch.float64).requires_grad_()
    gate, up = (x @ torch.cat((m.gate.weight, m.up.weight)).T).chunk(2, dim=-1)
    assert_same(m(x), m.down(F.silu(gate) * up), {"x": x, **dict(m.named_parameters())})


def test_each_position_by_itself() -> None:
    m = GatedFeedForward(6, 10).double()
    redraw(m)
    x = draw(2, 5, 6, seed="x", dtype=torch.float64)
    together = m(x)
    for t in range(5):
        assert torch.allclose(together[:, t], m(x[:, t]), atol=1e-12)


def test_dropout_on_the_hidden_layer_in_training_only() -> None:
    m = GatedFeedForward(6, 1000, dropout=0.5)
    x = draw(1, 6, seed="x")
    assert not torch.equal(m(x), m(x))
    m.eval()
    assert torch.equal(m(x), m.down(F.silu(m.gate(x)) * m.up(x)))


def test_matched_width() -> None:
    """Three matrices have what two had, up to the rounding; and Llama's published widths."""
    for d_ff in (30, 96, 256, 2048, 3072):
        for multiple in (1, 8, 64):
            width = matched_width(d_ff, multiple)
            assert width % multiple == 0
            assert -3 < 3 * width - 2 * d_ff < 3 * multiple
    assert matched_width(2048) == 1368
    llama = {4096: 11008, 5120: 13824, 6656: 17920, 8192: 22016}
    assert {d: matched_width(4 * d, 256) for d in llama} == llama


def test_parameters_in_the_model() -> None:
    """The networks of the base model: two matrices and their biases, or three matrices."""
    before = count_parameters(PAPER_BASE)["total"]
    wide = count_parameters(patch(PAPER_BASE, SWIGLU))["total"]
    per_layer = 3 * 512 * 1368 - (2 * 512 * 2048 + 2048 + 512)
    assert wide - before == 12 * per_layer
    assert abs(wide - before) / before < 1e-3
    assert count_parameters(patch(PAPER_BASE, GEGLU))["total"] == wide
    assert count_parameters(patch(PAPER_BASE, GELU))["total"] == before


def test_patches() -> None:
    """The width goes with a patch of its own, and all of it survives a file."""
    for change, kind in ((SWIGLU, nn.SiLU), (GEGLU, nn.GELU)):
        config = patch(SMALL, change, {"ffn.d_ff": 16})
        assert from_json(to_json(config)) == config
        found = [m for m in Transformer(config).modules() if isinstance(m, GatedFeedForward)]
        assert len(found) == 5
        assert all(m.up.out_features == 16 and isinstance(m.activation, kind) for m in found)
        assert all(p.ndim == 2 for m in found for p in m.parameters())  # no biases
    smooth = Transformer(patch(SMALL, GELU))
    kinds = {type(m.activation) for m in smooth.modules() if isinstance(m, FeedForward)}
    assert kinds == {nn.GELU}


@pytest.mark.parametrize("gated", [True, False])
def test_quiet_units_are_counted(gated: bool) -> None:
    """A unit whose reading is far below 0 for every token has no slope; hooks are taken off."""
    m: Any = GatedFeedForward(4, 10, bias=True) if gated else FeedForward(4, 10)
    layer = m.gate if gated else m.up
    with torch.no_grad():
        layer.weight.mul_(0.1)
        layer.bias.fill_(1.0)
        layer.bias[:3] = -50.0
    model = nn.Sequential(m)
    x = draw(2, 3, 4, seed="x")
    assert quiet_share(model, lambda: model(x)) == pytest.approx(0.3)
    assert not layer._forward_hooks


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"d_model": 0}, "d_model"),
        ({"d_model": 8, "d_ff": 0}, "d_ff"),
        ({"d_model": 8, "dropout": 1.0}, "dropout"),
    ],
)
def test_bad_sizes(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        GatedFeedForward(**arguments)


def test_bad_widths() -> None:
    with pytest.raises(ValueError, match="d_ff"):
        matched_width(0)
    with pytest.raises(ValueError, match="multiple"):
        matched_width(8, 0)
