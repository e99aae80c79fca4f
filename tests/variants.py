"""The variants that the invariant suite runs on. A later part adds rows here and nothing else.

A row is a name, the kind of model, and the patches that make it from `SMALL`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tests.reference import redraw
from transformer_annotated import (
    DECODER_ONLY,
    ENCODER_ONLY,
    FAST,
    SDPA,
    Config,
    FeedForward,
    Head,
    LayerNorm,
    MultiHeadAttention,
    Transformer,
    patch,
    spec,
)

Kind = Literal["seq2seq", "decoder", "encoder"]
Patch = Mapping[str, Any]
VOCABULARY = 13

SMALL = patch(
    Config(),
    {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder.n_layers": 2,
        "decoder.n_layers": 3,
        "self_attention.n_heads": 4,
        "cross_attention.n_heads": 4,
        "encoder.ffn.d_ff": 24,
        "decoder.ffn.d_ff": 20,
        "dropout": 0.0,
    },
)


@dataclass(frozen=True)
class Variant:
    """A model to test: what it is made of, and how it is called.

    `reach` is False where some position cannot influence another that the mask would allow: a
    window too short for the test's sentences.
    """

    kind: Kind
    patches: tuple[Patch, ...] = ()
    reach: bool = True

    @property
    def config(self) -> Config:
        return patch(SMALL, *self.patches)


GQA = {"self_attention.n_kv_heads": 2, "cross_attention.n_kv_heads": 2}
MQA = {"self_attention.n_kv_heads": 1, "cross_attention.n_kv_heads": 1}
WINDOW = {"self_attention.window": 3}
NO_BIAS = {
    f"{attention}.{bias}": False
    for attention in ("self_attention", "cross_attention")
    for bias in ("qkv_bias", "out_bias")
}
# Windowed and full layers in turn, as Mistral's successors have them.
PATTERN = {
    "self_attention": (
        spec(MultiHeadAttention, n_heads=4, window=2),
        spec(MultiHeadAttention, n_heads=4),
    )
}
ONE_LAYER = {
    "decoder.layers.1.ffn": spec(FeedForward, d_ff=7),
    "encoder.layers.0.self_attention.n_heads": 2,
}

VARIANTS: dict[str, Variant] = {
    "paper": Variant("seq2seq"),
    "sdpa": Variant("seq2seq", (SDPA,)),
    "final_norm": Variant("seq2seq", ({"final_norm": True},)),
    "no_bias": Variant("seq2seq", (NO_BIAS,)),
    "gqa": Variant("seq2seq", (GQA,)),
    "mqa": Variant("seq2seq", (MQA,)),
    "sdpa_gqa": Variant("seq2seq", (SDPA, GQA)),
    "head_dim": Variant("seq2seq", ({"self_attention.head_dim": 6},)),
    "window": Variant("seq2seq", (WINDOW,), reach=False),
    "sdpa_window": Variant("seq2seq", (SDPA, WINDOW), reach=False),
    "pattern": Variant("seq2seq", (PATTERN,)),
    "softcap": Variant("seq2seq", ({"self_attention.softcap": 5.0, "head.softcap": 3.0},)),
    "scale": Variant("seq2seq", ({"self_attention.scale": 1.0, "head.scale": 0.25},)),
    "qk_norm": Variant("seq2seq", ({"self_attention.qk_norm": spec(LayerNorm)},)),
    "untied": Variant("seq2seq", ({"head": spec(Head, tied=False, bias=True)},)),
    "two_vocabularies": Variant("seq2seq", ({"src_vocab_size": VOCABULARY + 4},)),
    "one_layer": Variant("seq2seq", (ONE_LAYER,)),
    "attention_dropout": Variant("seq2seq", ({"self_attention.dropout": 0.1, "ffn.dropout": 0.1},)),
    "no_positions": Variant("seq2seq", ({"embedding.position": None},)),
    "decoder_only": Variant("decoder", (DECODER_ONLY,)),
    "decoder_only_window": Variant(
        "decoder", (DECODER_ONLY, WINDOW, {"self_attention.n_kv_heads": 2}), reach=False
    ),
    "encoder_only": Variant("encoder", (ENCODER_ONLY,)),
    "encoder_only_window": Variant("encoder", (ENCODER_ONLY, WINDOW), reach=False),
    # Part II
    "fast": Variant("seq2seq", (FAST,)),
    "fast_sdpa_gqa": Variant("seq2seq", (FAST, SDPA, GQA)),
    "fast_decoder_only": Variant("decoder", (FAST, DECODER_ONLY)),
}


def build(
    variant: str | Config, dtype: torch.dtype = torch.float32, dropout: float = 0.0
) -> Transformer:
    """The variant's model in eval mode, every parameter redrawn at random."""
    config = VARIANTS[variant].config if isinstance(variant, str) else variant
    model = Transformer(patch(config, {"dropout": dropout}))
    redraw(model)
    return model.to(dtype).eval()


def sentence(length: int, seed: int) -> Tensor:
    """`(1, length)` ids that depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (1, length), generator=generator)


def batch(lengths: tuple[int, ...], seed: int, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Sentences of these lengths in one tensor, and which of its places are real."""
    width = max(lengths)
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    real = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], real[row, place] = sentence(length, seed + row)[0], True
    return ids, real


def run(
    kind: Kind,
    model: Any,
    src: Tensor,
    tgt: Tensor,
    src_padding: Tensor | None = None,
    tgt_padding: Tensor | None = None,
) -> Tensor:
    """Logits for the target, or for `tgt` alone where the model has one stack."""
    if kind == "seq2seq":
        return model(src, tgt, src_padding=src_padding, tgt_padding=tgt_padding)
    return model(tgt, src_padding=tgt_padding)
