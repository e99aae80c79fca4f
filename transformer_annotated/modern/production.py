# %% [markdown]
r"""
# Paper and production on one page

What each part of the model was in 2017, and what it is in fourteen published models since. Patches build ten of them at
their published sizes, and their parameters are counted and compared.
"""

# %% [markdown]
# Chapters 26 to 34 changed one part each. Here the changes stand side by side, next to the models that people use. Code makes the tables from configs, and ten of the configs can be built and counted.

# %% mystnb={"figure": {"caption": "Chapter 36 of Part III: the paper and production.", "name": "fig-map-production"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The twelfth, Production, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(36);

# %%
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from transformer_annotated.book import results
from transformer_annotated.modern.experts import MixtureOfExperts, mixture_of_experts
from transformer_annotated.modern.gated import GEGLU, GELU, SWIGLU, GatedFeedForward
from transformer_annotated.modern.grouped_query import grouped_queries
from transformer_annotated.modern.long_context import Llama3Scaling, YaRN
from transformer_annotated.modern.pre_ln import PRE_LN, PreNorm, SandwichNorm
from transformer_annotated.modern.relative_bias import (
    ALIBI,
    T5_BIAS,
    ALiBi,
    LearnedPositions,
    T5Bias,
)
from transformer_annotated.modern.rms_norm import QK_NORM, RMS_NORM
from transformer_annotated.modern.rope import ROPE, RoPE
from transformer_annotated.modern.window import pattern, sliding_window
from transformer_annotated.paper.add_norm import PostNorm
from transformer_annotated.paper.embedding import Sinusoid
from transformer_annotated.paper.multi_head import MultiHeadAttention
from transformer_annotated.paper.parts import Spec, patch, spec
from transformer_annotated.paper.transformer import (
    DECODER_ONLY,
    ENCODER_ONLY,
    PAPER_BASE,
    Config,
)

# %% [markdown]
# ## The change
#
# Take Llama 3.1 with 8 billion parameters {cite:p}`grattafiori2024llama3`. It is the decoder of this book's model with five patches, Chapter 31's longer context, its sizes, and a few switches:

# %% tags=["active-ipynb"]
# from transformer_annotated import diff
#
# switches = {
#     "embedding.scale": False,
#     "head.tied": False,
#     "self_attention.qkv_bias": False,
#     "self_attention.out_bias": False,
#     "self_attention.position.base": 500_000.0,
#     "self_attention.position.scaling": spec(Llama3Scaling, factor=8.0, original=8192),
#     "norm.eps": 1e-5,
#     "dropout": 0.0,
# }
# widths = {"vocab_size": 128_256, "d_model": 4096, "self_attention.n_heads": 32}
# depths = {"n_layers": 32, "ffn.d_ff": 14_336}
# five = (PRE_LN, RMS_NORM, ROPE, SWIGLU, grouped_queries(8))
# llama = patch(PAPER_BASE, DECODER_ONLY, *five, switches, widths, depths)
# print(diff(PAPER_BASE, llama))

# %% [markdown]
# ## What would you still recognise?
#
# The list is long. Yet the class that builds this model is the class of Chapter 8. So count. First the places where the two descriptions differ:

# %% tags=["active-ipynb"]
# changed = diff(PAPER_BASE, llama).count("\n- ") + 1
# print(f"{changed} places differ")

# %% [markdown]
# That counts a width like a new idea. Better to count by **seam**: a place where a part can be exchanged. For many models, that needs their facts as data.
#
# ## Published models as data
#
# A published model is a tuple of patches on the paper's model. Where a model has a part that this book has not built, words stand in its place, under the seam's name. So the tables say what the book does not cover.

# %%
Patch = Mapping[str, Any]


@dataclass(frozen=True)
class Published:
    """A published model, as what it changed in the model of 2017.

    Attributes:
        year: of the cited work.
        source: key of that work in the bibliography.
        context: positions of the longest texts that it was trained on; None if not stated.
        parameters: of the published weights, exactly; None where this book cannot build it.
        patches: what it changed, as far as this book has the parts.
        beyond: seam to words, for what this book has not built.
    """

    year: int
    source: str
    context: int | None
    parameters: int | None
    patches: tuple[Patch, ...] = ()
    beyond: Mapping[str, str] = field(default_factory=dict)

    @property
    def config(self) -> Config:
        """The paper's base model with the patches; not the whole model if there is a `beyond`."""
        return patch(PAPER_BASE, *self.patches)

    @property
    def cells(self) -> dict[str, str]:
        """What each seam holds, in words."""
        return {**described(self.config), **self.beyond}

# %%
def sizes(
    vocab_size: int, d_model: int, n_layers: int, n_heads: int, d_ff: int | None = None
) -> Patch:
    """The patch that sets a model's sizes; `d_ff` is None where experts have it."""
    ffn = {} if d_ff is None else {"ffn.d_ff": d_ff}
    heads = dict.fromkeys(("self_attention.n_heads", "cross_attention.n_heads"), n_heads)
    return {"vocab_size": vocab_size, "d_model": d_model, "n_layers": n_layers, **heads, **ffn}

# %% [markdown]
# Many models share their switches, so these have names. The patches of Chapters 26 to 34 are used as they are.

# %%
UNSCALED: Patch = {"embedding.scale": False}
UNTIED: Patch = {"head.tied": False}
NO_BIAS: Patch = {
    f"{name}_attention.{part}_bias": False for name in ("self", "cross") for part in ("qkv", "out")
}
LEARNED: Patch = {"embedding.position": spec(LearnedPositions, max_len=512)}
TANH: Patch = {"ffn.activation.approximate": "tanh"}  # of GELU, as the first code had it
LLAMA: tuple[Patch, ...] = (  # what the models after Llama share
    DECODER_ONLY, PRE_LN, RMS_NORM, ROPE, NO_BIAS, UNSCALED, UNTIED, {"dropout": 0.0},
)  # fmt: skip
GEMMA: tuple[Patch, ...] = (  # they keep the scaled and tied embedding of 2017
    DECODER_ONLY, RMS_NORM, {"norm.offset": 1.0}, NO_BIAS, GEGLU, TANH, {"dropout": 0.0},
    {"residual": spec(SandwichNorm), "final_norm": True, "self_attention.head_dim": 256},
)  # fmt: skip

# %% [markdown]
# Now the facts. They are from the works that the next paragraph names. The first models after 2017:

# %%
EARLY: dict[str, Published] = {
    "Transformer": Published(2017, "vaswani2017attention", None, None),
    "BERT base": Published(
        2019, "devlin2019bert", 512, None,
        (ENCODER_ONLY, LEARNED, UNSCALED, GELU, {"norm.eps": 1e-12},
         sizes(30_522, 768, 12, 12, 3072)),
        {"embedding": "as it is, plus segments, then a norm",
         "head": "the embedding's table, after one more layer, plus a bias"},
    ),
    "GPT-2 small": Published(
        2019, "radford2019language", 1024, 124_439_808,
        (DECODER_ONLY, PRE_LN, LEARNED, {"embedding.position.max_len": 1024}, UNSCALED, GELU, TANH,
         sizes(50_257, 768, 12, 12, 3072)),
    ),
    "T5 1.1 base": Published(
        2020, "google2020t5", 512, 247_577_856,
        (PRE_LN, RMS_NORM, T5_BIAS, NO_BIAS, GEGLU, TANH, UNSCALED, UNTIED, {"dropout": 0.0},
         {"self_attention.scale": 1.0, "cross_attention.scale": 1.0},
         sizes(32_128, 768, 12, 12, 2048)),
    ),
}  # fmt: skip

# %% [markdown]
# And the models since 2023:

# %%
LATE: dict[str, Published] = {
    "Llama 2 7B": Published(
        2023, "touvron2023llama2", 4096, 6_738_415_616,
        (*LLAMA, SWIGLU, {"norm.eps": 1e-5}, sizes(32_000, 4096, 32, 32, 11_008)),
    ),
    "MPT 7B": Published(
        2023, "mosaicml2023mpt", 2048, 6_649_286_656,
        (DECODER_ONLY, PRE_LN, ALIBI, UNSCALED, GELU, NO_BIAS,
         {"norm.bias": False, "ffn.bias": False, "dropout": 0.0},
         sizes(50_432, 4096, 32, 32, 16_384)),
    ),
    "Mistral 7B": Published(
        2023, "jiang2023mistral", 8192, 7_241_732_096,
        (*LLAMA, SWIGLU, {"norm.eps": 1e-5}, grouped_queries(8), sliding_window(4096),
         sizes(32_000, 4096, 32, 32, 14_336)),
    ),
    "Mixtral 8x7B": Published(
        2024, "jiang2024mixtral", 32_768, 46_702_792_704,
        (*LLAMA, {"norm.eps": 1e-5}, grouped_queries(8), sizes(32_000, 4096, 32, 32),
         mixture_of_experts(8, 2, expert=spec(GatedFeedForward, d_ff=14_336)),
         {"self_attention.position.base": 1e6}),
    ),
    "Llama 3.1 8B": Published(
        2024, "grattafiori2024llama3", 131_072, 8_030_261_248,
        (*LLAMA, SWIGLU, {"norm.eps": 1e-5}, grouped_queries(8),
         sizes(128_256, 4096, 32, 32, 14_336),
         {"self_attention.position.base": 5e5,
          "self_attention.position.scaling": spec(Llama3Scaling, factor=8.0, original=8192)}),
    ),
    "Gemma 2 2B": Published(
        2024, "gemma2024gemma2", 8192, 2_614_341_888,
        (*GEMMA, ROPE, grouped_queries(4), sizes(256_000, 2304, 26, 8, 9216),
         {"self_attention": pattern("LG", L=spec(MultiHeadAttention, n_heads=8, window=4096),
                                    G=spec(MultiHeadAttention, n_heads=8)),
          "self_attention.softcap": 50.0, "head.softcap": 30.0}),
    ),
    "OLMo 2 7B": Published(
        2024, "olmo2024olmo2", 4096, None,
        (*LLAMA, SWIGLU, sizes(100_352, 4096, 32, 32, 11_008),
         {"self_attention.position.base": 5e5}),
        {"order": "behind the sub-layer, before the addition, and at the end",
         "scores": "divided by √d, QK-norm over all heads at once"},
    ),
    "DeepSeek-V3": Published(
        2024, "deepseek2024v3", 131_072, None,
        (*LLAMA, sizes(129_280, 7168, 61, 128), {"self_attention.head_dim": 128},
         mixture_of_experts(256, 8, expert=spec(GatedFeedForward, d_ff=2048)),
         {"self_attention.position.scaling": spec(YaRN, factor=40.0, original=4096)}),
        {"positions": "RoPE on 64 extra numbers a head, base 10,000, stretched (YaRN)",
         "scores": "divided by the root of 192, times YaRN's factor",
         "key heads": "from one short vector a token (latent attention)",
         "feed-forward": "256 SwiGLU experts, 8 a token, and a shared one; 3 layers dense"},
    ),
    "Gemma 3 1B": Published(
        2025, "gemma2025gemma3", 32_768, 999_885_952,
        (*GEMMA, QK_NORM, {"self_attention.qk_norm.offset": 1.0}, grouped_queries(1),
         sizes(262_144, 1152, 26, 4, 6912), {"embedding.position": None},
         {"self_attention": pattern(
             "LLLLLG", L=spec(MultiHeadAttention, n_heads=4, window=512, position=spec(RoPE)),
             G=spec(MultiHeadAttention, n_heads=4, position=spec(RoPE, base=1e6)))}),
    ),
    "Qwen3 8B": Published(
        2025, "qwen2025qwen3", 32_768, 8_190_735_360,
        (*LLAMA, SWIGLU, QK_NORM, grouped_queries(8), {"self_attention.position.base": 1e6},
         sizes(151_936, 4096, 36, 32, 12_288)),
    ),
    "gpt-oss-120b": Published(
        2025, "openai2025gptoss", 131_072, None,
        (DECODER_ONLY, PRE_LN, RMS_NORM, ROPE, UNSCALED, UNTIED,
         {"norm.eps": 1e-5, "dropout": 0.0}, grouped_queries(8),
         sizes(201_088, 2880, 36, 64),
         mixture_of_experts(128, 4, expert=spec(GatedFeedForward, d_ff=2880, bias=True)),
         {"self_attention": pattern("LG", L=spec(MultiHeadAttention, n_heads=64, window=128),
                                    G=spec(MultiHeadAttention, n_heads=64)),
          "self_attention.head_dim": 64, "self_attention.position.base": 1.5e5,
          "self_attention.position.scaling": spec(YaRN, factor=32.0, original=4096)}),
        {"scores": "divided by √d, and a learned number in the softmax's sum",
         "feed-forward": "128 experts, 4 a token, with a SwiGLU of their own"
         " (clipped, σ(1.702 x), one branch plus 1)"},
    ),
}  # fmt: skip

MODELS = EARLY | LATE

# %% [markdown]
# The sources, with the years that the tables show. The paper: {cite:t}`vaswani2017attention`. *BERT*: {cite:t}`devlin2019bert`. *GPT-2*: {cite:t}`radford2019language`. *T5*: {cite:t}`raffel2020exploring`; its version 1.1, which was trained anew with gates, is described with its weights {cite:p}`google2020t5`. *Llama 2*: {cite:t}`touvron2023llama2`. *MPT*: {cite:t}`mosaicml2023mpt`. *Mistral 7B*: {cite:t}`jiang2023mistral`. *Mixtral*: {cite:t}`jiang2024mixtral`. *Llama 3.1*: {cite:t}`grattafiori2024llama3`, and the scaling of its positions from the reference code {cite:p}`meta2024llama31`. *Gemma 2* and *Gemma 3*: {cite:t}`gemma2024gemma2`; {cite:t}`gemma2025gemma3`. *OLMo 2*: {cite:t}`olmo2024olmo2`. *DeepSeek-V3*: {cite:t}`deepseek2024v3`. *Qwen3*: {cite:t}`qwen2025qwen3`. *gpt-oss*: {cite:t}`openai2025gptoss`.
#
# Where report and published weights differ, the table follows the weights: 256,000 rows for Gemma 2 (report 256,128), 151,936 for Qwen3 (151,669), and a window of 512 for Gemma 3 1B (the report names 1,024). What a report leaves out is from the weights, too. Dropout is what the reports or the published code say, and 0 where neither names any.

# %%
def as_config(name: str) -> Config:
    """The whole published model as a `Config`, at its published sizes.

    Raises ValueError for an unknown name, and for a model with a part that this book has not built.
    """
    if name not in MODELS:
        raise ValueError(f"name must be one of {', '.join(MODELS)}; got {name!r}")
    if beyond := MODELS[name].beyond:
        parts = "; ".join(f"{seam}: {words}" for seam, words in beyond.items())
        raise ValueError(f"name={name!r} has parts that this book has not built: {parts}")
    return MODELS[name].config

# %% tags=["active-ipynb"]
# assert as_config("Llama 3.1 8B") == llama
# try:
#     as_config("OLMo 2 7B")
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## Proof: the parameters, to the last one
#
# If a config is right, its parameters are as many as those of the published weights. Llama 3 can be counted by hand. Each token has a row in two tables. Each layer has projections of $H$ heads of queries and of output, and of $K$ heads of keys and values; three matrices of the feed-forward network; and two norms. One norm ends the stack:
#
# $$
# P = 2 V D + N \bigl( 2 D d (H + K) + 3 D F + 2 D \bigr) + D
# $$ (eq-production-parameters)

# %% tags=["active-ipynb"]
# from transformer_annotated import count_parameters
#
# V, D, N, H, K, d, F = 128_256, 4096, 32, 32, 8, 128, 14_336
# by_hand = 2 * V * D + N * (2 * D * d * (H + K) + 3 * D * F + 2 * D) + D
# print(f"{by_hand:,}")
# assert by_hand == count_parameters(llama)["total"] == MODELS["Llama 3.1 8B"].parameters

# %% [markdown]
# Now all models whose parts exist here. `count_parameters` builds each without memory for its weights, so 47 billion parameters fit anywhere.

# %% tags=["active-ipynb"]
# for name, model in MODELS.items():
#     if model.parameters is not None:
#         total = count_parameters(as_config(name))["total"]
#         print(f"{name:14s} built {total:14,}   published {model.parameters:14,}")
#         assert total == model.parameters

# %% [markdown]
# Equal, to the last parameter. The right column was typed from the published weights. The tests type the sizes a second time and give them to the classes of `transformers` {cite:p}`wolf2020transformers`: that checks the arithmetic. A size wrong in both places, and in the number too, would pass. (Release 5 of that library ties the head of every T5. The weights of T5 1.1 have a head of their own, and the test adds it.)
#
# A number of parameters proves much, and not all. It cannot tell base 10,000 from base 500,000, or post-LN from pre-LN without its last norm. Outputs can. The tests compare outputs as well: small copies of all ten models, with the same random weights, against the classes of `transformers`. All logits agree to $10^{-4}$. With the published weights, a later part does it.
#
# One more check runs on this page. Make each model small, with every part in its place. Does it run, does each parameter get a gradient, is the future hidden? And can its description be saved and read?
#
# Two functions help. `described` reads a config and says in words what stands at each seam; it will also write the tables. `small` changes the sizes, and nothing that `described` tells.

# %% tags=["hide-input"]
WORDS: dict[Any, str] = {
    PostNorm: "behind the addition",
    PreNorm: "before the sub-layer",
    SandwichNorm: "before the sub-layer and behind it",
    Sinusoid: "sinusoids, added",
    LearnedPositions: "learned vectors, added",
    T5Bias: "T5's table, on the scores",
    ALiBi: "ALiBi, on the scores",
    Llama3Scaling: "stretched (Llama 3)",
    YaRN: "stretched (YaRN)",
}


def name_of(part: Spec[nn.Module]) -> str:
    """What a component is called: `WORDS`, or the name of its class."""
    return WORDS.get(part.target, getattr(part.target, "__name__", ""))

# %% tags=["hide-input"]
def positions_of(config: Config, attentions: Sequence[Mapping[str, Any]]) -> str:
    """How a model knows its positions, in words."""
    stack = config.decoder or config.encoder
    bias = None if stack is None else stack.bias
    if (added := config.embedding.kwargs["position"]) is not None:
        return name_of(added)
    if bias is not None:
        return name_of(bias)
    turns = dict.fromkeys(attention["position"] for attention in attentions)
    bases = " and ".join(f"{turn.kwargs['base']:,.0f}" for turn in turns if turn is not None)
    scaling = next((s for t in turns if t is not None and (s := t.kwargs["scaling"])), None)
    if not bases:
        return "none"
    return f"RoPE, base {bases}" + ("" if scaling is None else f", {name_of(scaling)}")


def reach_of(attentions: Sequence[Mapping[str, Any]], n_layers: int) -> str:
    """Which keys a query may see in how many layers, in words; the pattern is repeated."""
    layers = [attentions[i % len(attentions)]["window"] for i in range(n_layers)]
    windows = [window for window in layers if window is not None]
    if not windows:
        return "all positions"
    part = "" if len(windows) == n_layers else f" in {len(windows)} of {n_layers} layers"
    return f"the last {windows[0]:,}{part}"


def feed_forward_of(ffn: Spec[nn.Module]) -> str:
    """The feed-forward network, in words."""
    if ffn.target is MixtureOfExperts:
        one = feed_forward_of(ffn.kwargs["expert"])
        return f"{ffn.kwargs['n_experts']} {one} experts, {ffn.kwargs['top_k']} a token"
    name = name_of(ffn.kwargs["activation"])
    return {"SiLU": "SwiGLU", "GELU": "GEGLU"}[name] if ffn.target is GatedFeedForward else name

# %% tags=["hide-input"]
def parts_of(config: Config) -> tuple[list[Mapping[str, Any]], Spec[nn.Module]]:
    """One round of self-attention's pattern, as arguments, and the feed-forward network.

    They are the decoder's, if there is one. Raises ValueError for a pattern of networks.
    """
    stack = config.decoder or config.encoder
    if stack is None or not isinstance(stack.ffn, Spec):
        raise ValueError(f"config must have one kind of feed-forward network, got {stack!r}")
    own = stack.self_attention
    specs = own if isinstance(own, tuple) else (own,)
    return [part.kwargs for part in specs if part is not None], stack.ffn


def depth_of(config: Config) -> int:
    """The layers of the decoder, or of an encoder alone."""
    stack = config.decoder or config.encoder
    return 0 if stack is None else stack.n_layers


def described(config: Config) -> dict[str, str]:
    """What each seam of `config` holds, in words; widths and depths are not told by themselves.

    For a config with self-attention, and one kind of residual and of feed-forward network.
    """
    attentions, ffn = parts_of(config)
    residual = config.residual[0] if isinstance(config.residual, tuple) else config.residual
    first, norm, head = attentions[0], config.norm.kwargs, config.head.kwargs
    group = first["n_heads"] // (first["n_kv_heads"] or first["n_heads"])
    inner = ffn.kwargs.get("expert", ffn)
    biases = (first["qkv_bias"], first["out_bias"], inner.kwargs["bias"])
    cap = "" if first["softcap"] is None else f", soft-cap {first['softcap']:g}"
    only = "encoder" if config.decoder is None else "decoder"
    both = config.encoder is not None and config.decoder is not None
    end = ", and at the end" if config.final_norm else ""
    return {
        "stacks": "encoder and decoder" if both else f"{only} alone",
        "embedding": "times √D" if config.embedding.kwargs["scale"] else "as it is",
        "positions": positions_of(config, attentions),
        "norm": name_of(config.norm)
        + ("" if norm.get("bias", True) else " without shift")
        + (", weight 1 + w" if norm.get("offset") else ""),
        "order": name_of(residual) + end,
        "scores": ("divided by √d" if first["scale"] is None else "not divided" if first["scale"] == 1 else f"times {first['scale']:g}")
        + ("" if first["qk_norm"] is None else ", QK-norm") + cap,
        "key heads": "one for each query head" if group == 1 else f"one for {group} query heads",
        "reach": reach_of(attentions, depth_of(config)),
        "feed-forward": feed_forward_of(ffn),
        "bias vectors": "yes" if all(biases) else "in some parts" if any(biases) else "none",
        "head": ("the embedding's table" if head["tied"] else "a table of its own")
        + ("" if head["softcap"] is None else f", soft-cap {head['softcap']:g}"),
    }  # fmt: skip

# %% tags=["hide-input"]
def small(config: Config) -> Config:
    """The model with small widths, and one layer if all are alike; its `described` is the same."""
    attentions, ffn = parts_of(config)
    group = attentions[0]["n_heads"] // (attentions[0]["n_kv_heads"] or attentions[0]["n_heads"])
    depth = 1 if len(attentions) == 1 else depth_of(config)
    hidden = "ffn.expert.d_ff" if ffn.target is MixtureOfExperts else "ffn.d_ff"
    change: dict[str, Any] = {"vocab_size": 50, "d_model": 32, "n_layers": depth}
    for name in ("self_attention", "cross_attention"):
        change |= {f"{name}.n_heads": 8, f"{name}.n_kv_heads": 8 // group, f"{name}.head_dim": 8}
    return patch(config, change, {hidden: 48})

# %% tags=["active-ipynb"]
# import torch
#
# from transformer_annotated import Transformer, from_json, to_json
#
# torch.manual_seed(0)
# ids = torch.randint(50, (4, 33))
# for name in (name for name, model in MODELS.items() if not model.beyond):
#     config = as_config(name)
#     assert described(small(config)) == described(config)
#     assert from_json(to_json(config)) == config
#     model = Transformer(patch(small(config), {"dropout": 0.0})).double()
#     inputs = (ids,) if config.encoder is None else (ids, ids)
#     logits = model(*inputs)  # (B, T, V)
#     slopes = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
#     assert all(slope.isfinite().all() and slope.any() for slope in slopes)
#     other = ids.clone()
#     other[:, -1] = (other[:, -1] + 1) % 50
#     past = (model(*inputs[:-1], other)[:, :-1], logits[:, :-1])  # one future was changed
#     torch.testing.assert_close(*past, rtol=0, atol=1e-10)
#     print(f"{name:14s} runs, hides the future, every parameter has a gradient")

# %% [markdown]
# 33 tokens are fewer than any window, so no window acts here; Chapter 33 tests windows. In the tests' copies windows are 7 tokens wide, and act.
#
# ## The tables
#
# No cell about a part that the book has was typed by hand: `described` reads the configs. Only what lies beyond the book is typed, in the entries above. Three helpers collect the words.

# %%
def kept(name: str) -> list[str]:
    """The seams that a model of `MODELS` has as the paper has them."""
    paper = described(PAPER_BASE)
    return [seam for seam, words in MODELS[name].cells.items() if words == paper[seam]]


def choices(seam: str) -> dict[str, list[str]]:
    """What stands at a seam in the models of `MODELS`, oldest first: words to model names."""
    found: dict[str, list[str]] = {}
    for name, model in MODELS.items():
        found.setdefault(model.cells[seam], []).append(name)
    return found

# %%
def table(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)

# %% [markdown]
# **The frame.** Stacks, norms, and where the norms stand (Chapters 25 to 27):

# %% tags=["active-ipynb"]
# from IPython.display import Markdown
#
#
# def show(*seams: str) -> Markdown:
#     lines = [
#         (f"**{seam}**" * (i == 0), words, ", ".join(f"{n} ({MODELS[n].year})" for n in names))
#         for seam in seams
#         for i, (words, names) in enumerate(choices(seam).items())
#     ]
#     return Markdown(table(["seam", "what stands there", "in"], lines))
#
#
# show("stacks", "norm", "order")

# %% [markdown]
# The first line of each seam is the paper's. Only T5 still has two stacks. The norm has moved in front of the sub-layer in most, and Gemma and OLMo 2 have one behind it too, or instead.
#
# **Positions** (Chapters 29 to 31):

# %% tags=["active-ipynb"]
# show("positions")

# %% [markdown]
# Nobody but the paper adds sinusoids to the embedding. But RoPE turns queries and keys by the same angles: the clock survived, and moved. What differs is the base, and how the frequencies are stretched for long texts.
#
# **Attention** (Chapters 27, 32 and 33):

# %% tags=["active-ipynb"]
# show("scores", "key heads", "reach")

# %% [markdown]
# All models but T5 still divide the scores by the root of a width. QK-norm and the soft-cap guard against large scores. The learned number of gpt-oss lets a head look at nothing. More than half of the later models share key heads. Windows are found in some, mostly in a pattern with full layers.
#
# **Feed-forward networks, and the two ends** (Chapters 28 and 34, and Chapter 7):

# %% tags=["active-ipynb"]
# show("feed-forward", "bias vectors", "embedding", "head")

# %% [markdown]
# ReLU is gone from this list. Since 2023 all models here but MPT have gated networks. Bias vectors went, and came back in gpt-oss. In the paper's own formulas only the feed-forward network has them; this book's base model has them in attention too, as Chapter 4 says.
#
# **Sizes.** The letters are those of the notation. For experts, $F$ is the width of one:

# %% tags=["active-ipynb"]
# def sizes_of(config: Config) -> list[str]:
#     attentions, ffn = parts_of(config)
#     H, K, d = (attentions[0][key] for key in ("n_heads", "n_kv_heads", "head_dim"))
#     stack = config.decoder or config.encoder
#     d_ff = ffn.kwargs.get("expert", ffn).kwargs["d_ff"]
#     numbers = (stack.n_layers, config.d_model, H, K or H, d or config.d_model // H, d_ff)
#     return [f"{number:,}" for number in (*numbers, config.vocab_size)]
#
#
# lines = [(name, *sizes_of(model.config)) for name, model in MODELS.items()]
# latent = {"DeepSeek-V3": ("–", "128 + 64")}  # no key heads are stored; 64 numbers more for RoPE
# lines = [(*l[:4], *latent.get(l[0], l[4:6]), *l[6:]) for l in lines]
# Markdown(table(["model", "N", "D", "H", "K", "d", "F", "V"], lines))

# %% [markdown]
# What one text of the full length costs: the bytes of the cache in 16 bits (Chapter 32), where the book can build the model and it writes. A layer with a window of $W$ keeps the last $W - 1$ tokens (Chapter 33). T5's number includes 512 source positions.

# %% tags=["active-ipynb"]
# from transformer_annotated import cache_bytes
#
# lines = []
# for name, model in MODELS.items():
#     if model.context is not None:
#         cache = "–"
#         if not model.beyond:
#             source = model.context if model.config.encoder else 0
#             half = {"dtype": torch.bfloat16, "source_length": source}
#             cache = f"{cache_bytes(model.config, model.context, **half) / 2**20:,.0f} MiB"
#         lines.append((name, f"{model.context:,}", cache))
# Markdown(table(["model", "positions", "cache"], lines))

# %% [markdown]
# Compare Gemma 3 1B with Qwen3 at the same length, or Llama 2 with Mistral at twice its length. Shared heads and windows are about this column.
#
# ## How much is left of 2017?
#
# Now count by seam.

# %% tags=["hide-input"]
def draw_changes() -> Any:
    """A row a model, a column a seam: as in 2017, changed, or changed beyond this book."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    from transformer_annotated.figures import COLORS

    seams, (figure, ax) = list(described(PAPER_BASE)), plt.subplots(figsize=(7.2, 4.9))
    looks: dict[str, dict[str, Any]] = {
        "as in 2017": {"facecolor": "white"},
        "changed by a patch of this book": {"facecolor": COLORS[0]},
        "changed in a way not built here": {"facecolor": "#9CC3DD", "hatch": "///"},
    }
    as_paper, patched, beyond = looks
    for y, (name, model) in enumerate(MODELS.items()):
        same = kept(name)
        for x, seam in enumerate(seams):
            look = as_paper if seam in same else beyond if seam in model.beyond else patched
            ax.add_patch(Rectangle((x, y), 1, 1, edgecolor="#555555", **looks[look]))
        ax.text(len(seams) + 0.5, y + 0.5, str(len(same)), ha="center", va="center", fontsize=9)
    ax.set(xlim=(0, len(seams) + 1), ylim=(len(MODELS), 0))
    ax.set_xticks(
        [x + 0.5 for x in range(len(seams) + 1)], [*seams, "as in 2017"], rotation=40, ha="right"
    )
    ax.set_yticks(
        [y + 0.5 for y in range(len(MODELS))], [f"{n}, {m.year}" for n, m in MODELS.items()]
    )
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, edgecolor="#555555", **look) for look in looks.values()]
    figure.legend(handles, list(looks), loc="outside upper center", ncols=3, fontsize=8)
    return ax

# %% mystnb={"figure": {"caption": "After 2020 no model of this list keeps more than four of the eleven seams as they were in 2017, and no seam is kept by all.", "name": "fig-changes"}, "image": {"alt": "A grid: fifteen models as rows, eleven seams as columns. The first row is white. BERT and GPT-2 have six white cells, the models after 2020 between one and four. At the right stands the number of white cells."}} tags=["active-ipynb"]
# draw_changes();

# %% [markdown]
# Read {numref}`fig-changes` by columns. *Scores* and *reach* are the whitest: a weighted mean with a softmax, over all positions, is what most models still compute. *Positions* and *feed-forward* are coloured everywhere below the first row.
#
# ## What did not change
#
# The figure shows what moved. This did not:
#
# - **The stream.** Vectors of one width pass from bottom to top, and each sub-layer adds to them.
# - **Attention.** A softmax over scaled scores, a weighted mean of values, several heads side by side.
# - **The rhythm.** Attention mixes positions; then a network works on each position alone.
# - **The ends.** A table of tokens in, a score for every token out. Tokens are pieces of words {cite:p}`sennrich2016neural`.
# - **The training, mostly.** The next token, at all positions at once, with the truth as input. There are exceptions: BERT and T5 fill gaps (T5 by writing them), the two Gemmas learn from a larger model's probabilities, and DeepSeek-V3 also predicts the token after the next. The optimiser is a relative of Adam {cite:p}`kingma2015adam`: Llama 3 and DeepSeek-V3 use AdamW {cite:p}`loshchilov2019decoupled`.
#
# That these parts stayed is visible in the code: `Layer.forward` and `MultiHeadAttention.forward` of Part I run the ten models that this book can build, unchanged.
#
# ## What we measured
#
# Each patch, its chapter, how many of the fourteen models have it, and what it did in the ablation matrix of [Chapter 35](ablation.ipynb). There each patch alone is compared with the paper's model: the same budget, with the width of the feed-forward network chosen so that the parameters are nearly equal (experts excepted). The difference is in nats a token for translation and in bits a byte for language. Below zero is better. A model counts if it has the idea, sandwich norms under `pre_ln`, gated experts under `swiglu`; the row measures the patch as printed.

# %%
@dataclass(frozen=True)
class Change:
    """A change of the ablation matrix, its chapter, and how to see it in a model's words.

    Attributes:
        chapter: of this book.
        seam, sign: a model has the change if its words at `seam` hold `sign`.
    """

    chapter: int
    seam: str
    sign: str

    @property
    def users(self) -> list[str]:
        """The models of `MODELS` that have it."""
        return [name for name, model in MODELS.items() if self.sign in model.cells[self.seam]]


CHANGES: dict[str, Change] = {  # by the rows of the ablation matrix
    "pre_ln": Change(26, "order", "before the sub-layer"),
    "rms_norm": Change(27, "norm", "RMSNorm"),
    "qk_norm": Change(27, "scores", "QK-norm"),
    "gelu": Change(28, "feed-forward", "GELU"),
    "geglu": Change(28, "feed-forward", "GEGLU"),
    "swiglu": Change(28, "feed-forward", "SwiGLU"),
    "rope": Change(29, "positions", "RoPE"),
    "t5_bias": Change(30, "positions", "T5"),
    "alibi": Change(30, "positions", "ALiBi"),
    "gqa": Change(32, "key heads", "query heads"),
    "window": Change(33, "reach", "last"),
    "experts": Change(34, "feed-forward", "experts"),
}

# %%
def measured_lines() -> list[dict[str, Any]]:
    """The runs of the ablation matrix at its largest scale that was run; none if none was."""
    try:
        lines = [line for line in results("ablation") if line["scale"] != "tiny"]
    except FileNotFoundError:
        return []
    scale = min((line["scale"] for line in lines), default="")  # "full" comes before "smoke"
    return [line for line in lines if line["scale"] == scale]


def in_words(differences: Sequence[float]) -> str:
    """Differences to the paper's model, one a seed: their mean, and how many are better (below 0)."""
    if not differences:
        return "not measured yet"
    mean, better = sum(differences) / len(differences), sum(d < 0 for d in differences)
    return f"{mean:+.3f}, better in {better} of {len(differences)}"

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.modern.ablation import SCALES, effects, rows
#
# found = measured_lines()
# s = SCALES[found[0]["scale"] if found else "smoke"]
# alone = rows(s)
# tasks = ("translation", "language")
# corpora = {"toy": "Chapter 9's small language", "multi30k": "Chapter 11's captions"}
# corpora["shakespeare"] = "Shakespeare by characters"
# print(f"Here: {s.n_layers} layers of width {s.d_model};")
# print(f"translation is {corpora[s.data]}, {s.steps} steps;")
# print(f"text is {corpora[s.text]}, {s.text_steps} steps.")
# print(f"Measured on: {found[0]['machine']}" if found else "No runs are stored yet.")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def line(name: str, chapter: int, users: str) -> tuple[object, ...]:
#     changes = {path: getattr(v, "__name__", repr(v)) for path, v in alone[name][0].items()}
#     settings = "<br>".join(f"`{path}` = `{v}`" for path, v in changes.items())
#     measured = [in_words(effects(found, task).get(name, ())) for task in tasks]
#     return name, chapter, users, *measured, settings
#
#
# count = len(MODELS) - 1
# lines = [line(n, c.chapter, f"{len(c.users)} of {count}") for n, c in CHANGES.items()]
# header = ["patch", "chapter", "models", "translation", "language", "what it sets"]
# Markdown(table(header, [*lines, line("sdpa", 3, "–")]))

# %% [markdown]
# The last row, `sdpa`, computes the paper's own function with other roundings. It shows the noise of arithmetic, the smallest kind. Few seeds and many rows: one of them may well be better in every seed by luck alone.
#
# Compare the column *models* with the two after it. What most models have need not win here, and what wins here need not be in most models. That is a reason to ask what the table *cannot* say:
#
# - *Short budgets.* The gains of `rope`, `alibi` and `window` on language are mostly speed of learning: in so few steps the paper's model has not learnt to look at near characters (Chapter 35).
# - *Depth.* Pre-LN is for stacks deeper than those of the matrix; Chapter 26 trains deeper ones.
# - *Scale.* Our models are small and our budgets short. That QK-norm keeps training stable is a finding about models of billions of parameters, or of high rates {cite:p}`dehghani2023scaling,wortsman2024small`.
# - *Long texts.* RoPE's base, its scaling, and windows are for texts much longer than those of the matrix.
# - *Serving.* Shared key heads and windows exist to save memory and time at decoding. A loss cannot show that; the cache column above does.
# - *Many tokens.* Experts add parameters, which a large corpus can fill. Ours are small.
#
# What the table cannot say is said elsewhere: in other chapters, and in citations. For the norm and the activations you have a measurement beside the citation.
#
# ## How to read such a table
#
# **Look for what else changed.** Suppose Llama 3.1 answers better than Llama 2. What has the architecture to do with it?

# %% tags=["active-ipynb"]
# print(diff(as_config("Llama 2 7B"), as_config("Llama 3.1 8B")))

# %% [markdown]
# Sizes, shared key heads, a base and its scaling; that is all. The data grew from 2 trillion tokens {cite:p}`touvron2023llama2` to about 15 trillion {cite:p}`grattafiori2024llama3`. A table of parts invites you to give the parts the credit. Only a comparison on one budget can. {cite:t}`narang2021transformer` put many changes into one code base, with one budget: most did little, and gated networks and RMSNorm were among those that helped.
#
# **Ask how numbers were counted.** The report of Gemma 2 gives its 2B model a feed-forward width of 18,432 and 2,024,517,888 parameters without the embedding. Do the two fit?

# %% tags=["active-ipynb"]
# for width in (18_432, 9216):
#     count = count_parameters(patch(as_config("Gemma 2 2B"), {"ffn.d_ff": width}))
#     print(f"width {width:6,}: {count['total'] - count['embedding']:13,} without the embedding")
# assert count["total"] - count["embedding"] == 2_024_517_888

# %% [markdown]
# The published number fits half the width. 18,432 counts the gate and the other half together; in this book $F$ is one matrix. The parameter count found it out.
#
# **Do not trust a name.** Is Mixtral 8x7B eight models of seven billion?

# %% tags=["active-ipynb"]
# from transformer_annotated import active_parameters
#
# mistral, mixtral = as_config("Mistral 7B"), as_config("Mixtral 8x7B")
# print(f"8 x Mistral 7B            {8 * count_parameters(mistral)['total'] / 1e9:5.1f} billion")
# print(f"Mixtral 8x7B, all         {count_parameters(mixtral)['total'] / 1e9:5.1f} billion")
# print(f"Mixtral 8x7B, for a token {active_parameters(mixtral) / 1e9:5.1f} billion")

# %% [markdown]
# The experts share their attention and the embedding. The report's own figures are 47 and 13 billion {cite:p}`jiang2024mixtral`.
#
# **Remember who is missing.** A report lists what was kept. What was tried and dropped is seldom written down, and of many closed models nothing is published.
#
# ## How it breaks
#
# - *A config copied from a class's defaults.* In a library, the defaults of a model's class are often those of one size, or of none. Count the parameters.
# - *A head of $D/H$ numbers, assumed.* Gemma 3 1B has $D = 1152$ and $H = 4$, and heads of 256. The shapes still fit together; the count does not.
# - *Tied, or not.* Two tables in place of one: the count is off by exactly $V D$.
# - *Facts that no count can see.* The base of RoPE, an $\epsilon$, a window, the soft-cap, tanh in GELU. Weights load, and the outputs are slightly wrong, or wrong at long lengths only. Compare logits, and compare them far from the start.
#
# ## Takeaways
#
# - Llama, Mistral, Mixtral, Gemma, Qwen, MPT, GPT-2 and T5 are configs of one class: {eq}`eq-production-parameters` and its kin give their parameters to the last one.
# - Most seams changed; the stream, attention's formula, the two-step rhythm did not, and teacher forcing hardly did.
# - A parameter count checks shapes. It cannot check numbers that have no shape. Logits can.
# - Who uses a part tells you that it works, not that it is why the model is good.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 36.1.** By how many parameters does QK-norm enlarge Qwen3 8B? Do it by hand: 36 layers, heads of 128 numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("36.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 36 * 2 * 128
# check("36.1", answer)

# %% [markdown]
# **Exercise 36.2.** Which of these patches change how many bytes a decoder must keep for a text of 100 tokens: `pre_ln`, `rms_norm`, `qk_norm`, `swiglu`, `rope`, `alibi`, `gqa`, `window`, `experts`? Predict, then measure with `cache_bytes` if you like. Answer with a list of names.

# %% tags=["active-ipynb"]
# answer = ...
# check("36.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# plain = cache_bytes(PAPER_BASE, 100)
# names = ["pre_ln", "rms_norm", "qk_norm", "swiglu", "rope", "alibi", "gqa", "window", "experts"]
# answer = [n for n in names if cache_bytes(patch(PAPER_BASE, *alone[n]), 100) != plain]
# check("36.2", answer)

# %% [markdown]
# **Exercise 36.3.** Write the config of Qwen3 0.6B {cite:p}`qwen2025qwen3`. It differs from the 8B model in these points: 28 layers of width 1024, 16 heads of queries, which have 128 numbers each all the same, a feed-forward width of 3072, and a tied head.

# %% tags=["active-ipynb"]
# answer = ...
# check("36.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# change = {"n_layers": 28, "d_model": 1024, "ffn.d_ff": 3072, "head.tied": True}
# heads = {"self_attention.n_heads": 16, "self_attention.head_dim": 128}
# answer = patch(as_config("Qwen3 8B"), change, heads)
# check("36.3", answer)

# %% [markdown]
# **Exercise 36.4.** How many times larger would the cache of Gemma 3 1B be at 32,768 tokens if no layer had a window? Answer with a number.

# %% tags=["active-ipynb"]
# answer = ...
# check("36.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# gemma = as_config("Gemma 3 1B")
# full = patch(gemma, {"self_attention.window": None})
# answer = cache_bytes(full, 32_768) / cache_bytes(gemma, 32_768)
# check("36.4", answer)
