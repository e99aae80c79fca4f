"""Ours against PyTorch's own modules: outputs, and the gradient of every input and parameter.

Every parameter is redrawn at random first, then copied through a map of names.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.reference import (
    ATTENTION,
    assert_same_model,
    copy_weights,
    draw,
    gather,
    layer_map,
    model_map,
    redraw,
)
from tests.variants import SMALL, build
from transformer_annotated import Mask, MultiHeadAttention, patch
from transformer_annotated.paper.transformer import Layer

B, T, S, D, H, F = 2, 5, 6, 16, 4, 20
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
T_REAL = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
S_REAL = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
LATER = torch.ones(T, T).triu(1).bool()  # the stock modules: True = may NOT be seen

CALLS: dict[str, dict[str, Any]] = {
    "self": {},
    "masked": {"attn_mask": LATER},
    "padded": {"key_padding_mask": ~T_REAL},
    "masked padded": {"attn_mask": LATER, "key_padding_mask": ~T_REAL},
    "cross": {},
    "cross padded": {"key_padding_mask": ~S_REAL},
}
OUR_MASKS: dict[str, Mask | None] = {
    "self": None,
    "masked": Mask(causal=True),
    "padded": Mask(padding=T_REAL),
    "masked padded": Mask(causal=True, padding=T_REAL),
    "cross": None,
    "cross padded": Mask(padding=S_REAL),
}


def vectors(dtype: torch.dtype) -> dict[str, Tensor]:
    """`x` `(B, T, D)` and `memory` `(B, S, D)`, which want gradients."""
    shapes = {"x": (B, T, D), "memory": (B, S, D)}
    return {n: draw(*s, seed=n, dtype=dtype).requires_grad_() for n, s in shapes.items()}


@DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_multi_head_attention(call: str, bias: bool, dtype: torch.dtype) -> None:
    ours = MultiHeadAttention(D, H, qkv_bias=bias, out_bias=bias).to(dtype)
    theirs = nn.MultiheadAttention(D, H, bias=bias, batch_first=True, dtype=dtype)
    redraw(ours)
    names = {k: v for k, v in ATTENTION.items() if bias or "bias" not in k}
    copy_weights(names, ours, theirs)
    inputs = vectors(dtype)
    x = inputs["x"]
    memory = inputs["memory"] if "cross" in call else None
    if memory is None:
        del inputs["memory"]
    source = x if memory is None else memory
    stock, _ = theirs(x, source, source, need_weights=False, **CALLS[call])
    assert_same_model(names, ours, theirs, ours(x, memory, OUR_MASKS[call]), stock, inputs)


@DTYPES
@pytest.mark.parametrize("padded", [False, True])
def test_encoder_layer(padded: bool, dtype: torch.dtype) -> None:
    """Post-norm: `norm_first=False` is the paper's order."""
    config = SMALL.encoder
    assert config is not None
    assert isinstance(config.self_attention, object)
    ours = Layer(
        D, norm=SMALL.norm, residual=SMALL.residual, dropout=0.0,  # type: ignore[arg-type]
        self_attention=config.self_attention, cross_attention=None, ffn=config.ffn,  # type: ignore[arg-type]
    ).to(dtype)  # fmt: skip
    redraw(ours)
    theirs = nn.TransformerEncoderLayer(
        D, H, 24, dropout=0.0, activation="relu", batch_first=True, norm_first=False, dtype=dtype
    )
    copy_weights(layer_map(cross=False), ours, theirs)
    x = vectors(dtype)["x"]
    mine = ours(x, mask=Mask(padding=T_REAL) if padded else None)
    stock = theirs(x, src_key_padding_mask=~T_REAL if padded else None)
    assert_same_model(layer_map(cross=False), ours, theirs, mine, stock, {"x": x})


@DTYPES
@pytest.mark.parametrize("padded", [False, True])
def test_decoder_layer(padded: bool, dtype: torch.dtype) -> None:
    config = SMALL.decoder
    assert config is not None
    ours = Layer(
        D, norm=SMALL.norm, residual=SMALL.residual, dropout=0.0,  # type: ignore[arg-type]
        self_attention=config.self_attention, cross_attention=config.cross_attention,  # type: ignore[arg-type]
        ffn=config.ffn,  # type: ignore[arg-type]
    ).to(dtype)  # fmt: skip
    redraw(ours)
    theirs = nn.TransformerDecoderLayer(
        D, H, F, dropout=0.0, activation="relu", batch_first=True, norm_first=False, dtype=dtype
    )
    copy_weights(layer_map(cross=True), ours, theirs)
    inputs = vectors(dtype)
    mine = ours(
        **inputs, mask=Mask(causal=True, padding=T_REAL if padded else None),
        memory_mask=Mask(padding=S_REAL) if padded else None,
    )  # fmt: skip
    stock = theirs(
        *inputs.values(), tgt_mask=LATER,
        tgt_key_padding_mask=~T_REAL if padded else None,
        memory_key_padding_mask=~S_REAL if padded else None,
    )  # fmt: skip
    assert_same_model(layer_map(cross=True), ours, theirs, mine, stock, inputs)


def stock_transformer(dtype: torch.dtype, final_norm: bool) -> nn.Transformer:
    """PyTorch's, with as many layers as ours. Its own stacks would end in a norm; these may not."""
    sizes: dict[str, Any] = {"dropout": 0.0, "batch_first": True, "dtype": dtype}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(D, H, 24, **sizes), 2,
        norm=nn.LayerNorm(D, dtype=dtype) if final_norm else None,
    )  # fmt: skip
    decoder = nn.TransformerDecoder(
        nn.TransformerDecoderLayer(D, H, F, **sizes), 3,
        norm=nn.LayerNorm(D, dtype=dtype) if final_norm else None,
    )  # fmt: skip
    return nn.Transformer(
        D, H, custom_encoder=encoder, custom_decoder=decoder, batch_first=True, dtype=dtype
    )


@DTYPES
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_whole_transformer(final_norm: bool, padded: bool, dtype: torch.dtype) -> None:
    """From ids to logits. The embedding's table also gets the gradient of all its three uses."""
    ours = build(patch(SMALL, {"final_norm": final_norm}), dtype).train()
    theirs = stock_transformer(dtype, final_norm).train()
    names = model_map(2, 3, final_norm)
    copy_weights(names, ours, theirs)
    src = torch.tensor([[5, 3, 12, 0, 1, 1], [7, 7, 2, 9, 4, 11]])
    tgt = torch.tensor([[2, 8, 6, 10, 3], [2, 12, 3, 1, 1]])
    src_real, tgt_real = (S_REAL, T_REAL) if padded else (None, None)
    mine = ours(src, tgt, src_padding=src_real, tgt_padding=tgt_real)

    table = ours.embedding.weight
    encoding = ours.embedding.position
    vectors = [
        nn.functional.embedding(ids, table) * D**0.5 + encoding(torch.arange(ids.shape[1]))
        for ids in (src, tgt)
    ]
    stock = theirs(
        *vectors, tgt_mask=LATER,
        src_key_padding_mask=None if src_real is None else ~src_real,
        tgt_key_padding_mask=None if tgt_real is None else ~tgt_real,
        memory_key_padding_mask=None if src_real is None else ~src_real,
    ) @ table.T  # fmt: skip
    real = T_REAL if padded else torch.ones(B, T).bool()
    assert_same_model(names, ours, theirs, mine[real], stock[real], {"table": table})


def test_every_parameter_is_compared() -> None:
    """The maps leave out nothing: with the table, they name each parameter once."""
    model = build("final_norm")
    names = [name for parts in model_map(2, 3, True).values() for name in parts]
    assert sorted([*names, "embedding.tokens.weight"]) == sorted(model.state_dict())
    gather(model_map(2, 3, True), model.state_dict())
