"""The variants that the invariant suite runs on. A later part adds rows here and nothing else.

A row is a name, the kind of model, and the patches that make it from `SMALL`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tests.reference import redraw
from transformer_annotated import (
    ALIBI,
    DECODER_ONLY,
    ENCODER_ONLY,
    FAST,
    GEGLU,
    GELU,
    PRE_LN,
    QK_NORM,
    RMS_NORM,
    ROPE,
    SDPA,
    SWIGLU,
    T5_BIAS,
    Config,
    DeepNorm,
    DynamicNTK,
    FeedForward,
    Head,
    LayerNorm,
    LearnedPositions,
    LinearScaling,
    Llama3Scaling,
    MultiHeadAttention,
    NTKScaling,
    RMSNorm,
    RoPE,
    SandwichNorm,
    T5Bias,
    Transformer,
    YaRN,
    grouped_queries,
    mixture_of_experts,
    patch,
    pattern,
    sliding_window,
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
    window too short for the test's sentences. `excepted` names the invariants that the variant
    breaks by its nature, each with the reason; a test makes sure that they are really broken.
    `rounding` is what may differ where the others agree bit by bit: an expert computes as many rows
    as choose it, and the sums of a matrix product are ordered by the number of its rows.
    """

    kind: Kind
    patches: tuple[Patch, ...] = ()
    reach: bool = True
    excepted: Mapping[str, str] = field(default_factory=dict)
    rounding: float = 0.0

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
SHORT, LONG = spec(MultiHeadAttention, n_heads=4, window=2), spec(MultiHeadAttention, n_heads=4)
PATTERN = {"self_attention": (SHORT, LONG)}
NO_POSITIONS = {"embedding.position": None}
ONE_LAYER = {
    "decoder.layers.1.ffn": spec(FeedForward, d_ff=7),
    "encoder.layers.0.self_attention.n_heads": 2,
}

# Part III: one patch a chapter. `SINGLE` is also tested in pairs (tests/test_patch_pairs.py).
EXPERTS = mixture_of_experts(4, 2, expert=spec(FeedForward, d_ff=12))
SINGLE: dict[str, Patch] = {
    "pre_ln": PRE_LN,
    "sandwich": {"residual": spec(SandwichNorm), "final_norm": True},
    "deepnorm": {"residual": spec(DeepNorm, alpha=1.5)},
    "rms_norm": RMS_NORM,
    "gemma_norm": {"norm": spec(RMSNorm, offset=1.0)},
    "qk_norm": QK_NORM,
    "gelu": GELU,
    "swiglu": {**SWIGLU, "ffn.d_ff": 24},
    "geglu": {**GEGLU, "ffn.d_ff": 24},
    "rope": ROPE,
    "alibi": ALIBI,
    "t5_bias": T5_BIAS,
    "learned": {"embedding.position": spec(LearnedPositions, max_len=16)},
    "grouped_queries": grouped_queries(2),
    "sliding_window": sliding_window(6),
    "experts": EXPERTS,
    "sdpa": SDPA,
}
MODERN = (
    PRE_LN, RMS_NORM, QK_NORM, {**SWIGLU, "ffn.d_ff": 24}, ROPE, grouped_queries(2), SDPA
)  # fmt: skip


def rope(**arguments: Any) -> Patch:
    """RoPE with other arguments than the usual ones."""
    return {**ROPE, "self_attention.position": spec(RoPE, **arguments)}


LATER_KEYS = (
    "The frequencies depend on the length, so what was computed for a shorter text differs."
)
QUEUE = "Places in an expert are given out over the whole batch: every token can change any other."

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
    "no_positions": Variant("seq2seq", (NO_POSITIONS,)),
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
    # Part III
    **{name: Variant("seq2seq", (one,)) for name, one in SINGLE.items() if name != "sdpa"},
    "experts": Variant("seq2seq", (EXPERTS,), rounding=1e-5),
    "rope_interleaved": Variant("seq2seq", (rope(interleaved=True),)),
    "rope_partial": Variant("decoder", (DECODER_ONLY, rope(rotary_dim=2))),
    "rope_linear": Variant("seq2seq", (rope(scaling=spec(LinearScaling, factor=2.0)),)),
    "rope_ntk": Variant("seq2seq", (rope(scaling=spec(NTKScaling, factor=2.0)),)),
    "rope_yarn": Variant("seq2seq", (rope(scaling=spec(YaRN, factor=2.0, original=4)),)),
    "rope_llama3": Variant(
        "decoder", (DECODER_ONLY, rope(scaling=spec(Llama3Scaling, factor=2.0, original=4)))
    ),
    "rope_dynamic": Variant(
        "decoder", (DECODER_ONLY, rope(scaling=spec(DynamicNTK, factor=2.0, original=4))),
        excepted={"test_cached_equals_uncached": LATER_KEYS},
    ),
    "alibi_encoder_only": Variant("encoder", (ENCODER_ONLY, ALIBI)),
    "t5_encoder_only": Variant("encoder", (ENCODER_ONLY, NO_POSITIONS, {"bias": spec(T5Bias)})),
    "t5_decoder_only": Variant("decoder", (DECODER_ONLY, T5_BIAS)),
    "experts_capacity": Variant(
        "seq2seq", ({**EXPERTS, "ffn.capacity": 0.75},),
        excepted=dict.fromkeys(
            (
                "test_no_future_leak", "test_padding_invariance",
                "test_garbage_under_the_mask_does_not_matter",
                "test_a_sentence_of_padding_alone_harms_nobody", "test_batch_order_invariance",
                "test_cached_equals_uncached",
            ),
            QUEUE,
        ),
    ),
    "short_short_long": Variant(
        "decoder",
        (DECODER_ONLY, {"self_attention": pattern("SSL", S=SHORT, L=LONG)}),
    ),
    "modern": Variant("seq2seq", MODERN),
    "modern_decoder_only": Variant("decoder", (DECODER_ONLY, *MODERN)),
}  # fmt: skip


# A cache gives these what they get in one go; the others are excepted from that by name.
CACHED = [n for n, v in VARIANTS.items() if "test_cached_equals_uncached" not in v.excepted]


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
