"""Chapter 36: published models as configs, their parameters, and the tables made of them."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.reference import assert_close, redraw
from transformer_annotated import (
    DECODER_ONLY,
    FAST,
    MODELS,
    PAPER_BASE,
    PRE_LN,
    SDPA,
    Config,
    PreNorm,
    RMSNorm,
    Transformer,
    as_config,
    count_parameters,
    from_json,
    grouped_queries,
    patch,
    sliding_window,
    spec,
    to_json,
)
from transformer_annotated.modern import production
from transformer_annotated.modern.production import (
    CHANGES,
    LATE,
    choices,
    described,
    in_words,
    kept,
    measured_lines,
    small,
    table,
)

ROOT = Path(__file__).resolve().parent.parent
BUILT = [name for name, model in MODELS.items() if not model.beyond and name != "Transformer"]
SEAMS = list(described(PAPER_BASE))


# Parameters ---------------------------------------------------------------------------------------

# The published configurations, typed from the model cards in the names of transformers' configs,
# apart from the data of the chapter. Nothing is left to a default that has to do with a size.
GEMMA = {"attention_bias": False, "tie_word_embeddings": True, "head_dim": 256}
LLAMA = {"tie_word_embeddings": False}
THEIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT-2 small": ("GPT2Config", "GPT2LMHeadModel", {
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}),
    "T5 1.1 base": ("T5Config", "T5ForConditionalGeneration", {
        "vocab_size": 32128, "d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12,
        "num_decoder_layers": 12, "num_heads": 12, "relative_attention_num_buckets": 32,
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "Llama 2 7B": ("LlamaConfig", "LlamaForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, **LLAMA}),
    "MPT 7B": ("MptConfig", "MptForCausalLM", {
        "vocab_size": 50432, "d_model": 4096, "n_layers": 32, "n_heads": 32, "expansion_ratio": 4,
        "no_bias": True}),
    "Mistral 7B": ("MistralConfig", "MistralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, **LLAMA}),
    "Mixtral 8x7B": ("MixtralConfig", "MixtralForCausalLM", {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "num_experts_per_tok": 2, **LLAMA}),
    "Llama 3.1 8B": ("LlamaConfig", "LlamaForCausalLM", {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, **LLAMA}),
    "Gemma 2 2B": ("Gemma2Config", "Gemma2ForCausalLM", {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, **GEMMA}),
    "Gemma 3 1B": ("Gemma3TextConfig", "Gemma3ForCausalLM", {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, **GEMMA}),
    "Qwen3 8B": ("Qwen3Config", "Qwen3ForCausalLM", {
        "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "attention_bias": False, **LLAMA}),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILT)
def test_parameters_are_the_published_ones(name: str) -> None:
    assert count_parameters(as_config(name))["total"] == MODELS[name].parameters


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUILT)
def test_parameters_are_those_of_transformers(name: str) -> None:
    """The library's own class, with the published sizes, has as many."""
    import transformers

    config_name, model_name, sizes = THEIRS[name]
    config = getattr(transformers, config_name)(**sizes)
    with torch.device("meta"):
        model = getattr(transformers, model_name)(config)
    total = sum(p.numel() for p in model.parameters())
    if name == "T5 1.1 base":  # release 5 ties the head, whatever it is told; the weights are not
        total += model.lm_head.weight.numel()
    assert total == MODELS[name].parameters


def test_every_model_that_can_be_built_is_compared() -> None:
    assert set(THEIRS) == set(BUILT)
    assert all((m.parameters is None) == (n not in BUILT) for n, m in MODELS.items())


def test_qwen3_of_the_exercise() -> None:
    """Exercise 36.3: the published 0.6B model."""
    change = {"n_layers": 28, "d_model": 1024, "ffn.d_ff": 3072, "head.tied": True}
    heads = {"self_attention.n_heads": 16, "self_attention.head_dim": 128}
    assert count_parameters(patch(as_config("Qwen3 8B"), change, heads))["total"] == 596_049_920


def test_gemma_2_as_its_report_counts() -> None:
    """Table 2 of the report: 2,024,517,888 parameters without the embedding."""
    count = count_parameters(as_config("Gemma 2 2B"))
    assert count["total"] - count["embedding"] == 2_024_517_888


# The facts ----------------------------------------------------------------------------------------


def attention(name: str, layer: int) -> dict[str, Any]:
    """The arguments of self-attention in a layer, which counts no parameter sees."""
    config = as_config(name)
    with torch.device("meta"):
        stack = Transformer(patch(config, {"n_layers": max(layer + 1, 6)})).decoder
    assert stack is not None
    module: Any = stack.layers[layer].self_attention
    position = module.position
    return {
        "window": module.mask.window,
        "base": None if position is None else position.base,
        "softcap": module.softcap,
        "scale": module.scale,
    }


FACTS: list[tuple[str, int, dict[str, Any]]] = [
    ("GPT-2 small", 0, {"base": None, "window": None}),
    ("Llama 2 7B", 0, {"base": 10_000, "window": None}),
    ("Mistral 7B", 1, {"base": 10_000, "window": 4096}),
    ("Mixtral 8x7B", 1, {"base": 1_000_000, "window": None}),
    ("Llama 3.1 8B", 0, {"base": 500_000, "window": None}),
    ("Gemma 2 2B", 0, {"base": 10_000, "window": 4096, "softcap": 50.0, "scale": None}),
    ("Gemma 2 2B", 1, {"base": 10_000, "window": None, "softcap": 50.0}),
    ("Gemma 3 1B", 4, {"base": 10_000, "window": 512, "softcap": None}),
    ("Gemma 3 1B", 5, {"base": 1_000_000, "window": None, "softcap": None}),
    ("Qwen3 8B", 0, {"base": 1_000_000, "window": None}),
    ("T5 1.1 base", 0, {"base": None, "scale": 1.0}),
]


@pytest.mark.parametrize(("name", "layer", "facts"), FACTS, ids=lambda x: str(x)[:14])
def test_numbers_without_a_shape(name: str, layer: int, facts: dict[str, Any]) -> None:
    found = attention(name, layer)
    assert {key: found[key] for key in facts} == facts


@pytest.mark.parametrize("name", ["Transformer", *BUILT])
def test_a_small_copy_runs_and_is_described_alike(name: str) -> None:
    """Every seam in its place: it runs, hides the future, and every parameter has a gradient."""
    config = as_config(name)
    assert described(small(config)) == described(config)
    assert from_json(to_json(config)) == config
    model = Transformer(patch(small(config), {"dropout": 0.0})).double()
    ids = torch.randint(50, (4, 33))
    inputs = (ids,) if config.encoder is None else (ids, ids)
    logits = model(*inputs)
    slopes = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    assert all(slope.isfinite().all() and slope.any() for slope in slopes)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    torch.testing.assert_close(
        model(*inputs[:-1], other)[:, :-1], logits[:, :-1], rtol=0, atol=1e-10
    )


def test_every_source_is_in_the_bibliography_and_in_the_page() -> None:
    """With the year that the tables show."""
    bib = (ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    page = Path(production.__file__).read_text(encoding="utf-8")
    for part in MODELS.values():
        entry = re.search(rf"@\w+{{{part.source},(.*?)\n}}", bib, re.DOTALL)
        assert entry is not None, part.source
        year = re.search(r"year\s*=\s*{(\d+)}", entry[1])
        assert year is not None
        assert int(year[1]) == part.year, part.source
        assert re.search(rf"{{cite:[pt]}}`[\w,]*{part.source}", page), part.source


# The outputs --------------------------------------------------------------------------------------

# Small copies, typed in the names of transformers: 8 heads of 8, 2 of keys in most, a window of 7.
# Numbers without a shape are typed as published.
WINDOW = 7
PLAIN = {"vocab_size": 50, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8,
         "head_dim": 8, "num_hidden_layers": 2, "tie_word_embeddings": False}  # fmt: skip
GEMMAS = {**PLAIN, "num_hidden_layers": 6, "tie_word_embeddings": True, "rms_norm_eps": 1e-6,
          "query_pre_attn_scalar": 8, "sliding_window": WINDOW,
          "hidden_activation": "gelu_pytorch_tanh"}  # fmt: skip


def turned(base: float, **scaling: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base, **scaling}


SMALL: dict[str, dict[str, Any]] = {
    "GPT-2 small": {"vocab_size": 50, "n_positions": 1024, "n_embd": 64, "n_layer": 2, "n_head": 8,
                    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
    "T5 1.1 base": {"vocab_size": 50, "d_model": 64, "d_kv": 8, "d_ff": 256, "num_layers": 2,
                    "num_heads": 8, "relative_attention_num_buckets": 32,
                    "relative_attention_max_distance": 128, "feed_forward_proj": "gated-gelu",
                    "layer_norm_epsilon": 1e-6, "tie_word_embeddings": False},
    "Llama 2 7B": {**PLAIN, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
                   "rope_parameters": turned(1e4)},
    "MPT 7B": {"vocab_size": 50, "d_model": 64, "n_layers": 2, "n_heads": 8, "no_bias": True},
    "Mistral 7B": {**PLAIN, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                   "sliding_window": WINDOW, "rope_parameters": turned(1e4)},
    "Mixtral 8x7B": {**PLAIN, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                     "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
                     "rope_parameters": turned(1e6)},
    "Llama 3.1 8B": {**PLAIN, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
                     "max_position_embeddings": 131_072,
                     "rope_parameters": turned(
                         5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                         high_freq_factor=4.0, original_max_position_embeddings=8192)},
    "Gemma 2 2B": {**GEMMAS, "num_key_value_heads": 4, "rope_parameters": turned(1e4),
                   "layer_types": ["sliding_attention", "full_attention"] * 3,
                   "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma 3 1B": {**GEMMAS, "num_key_value_heads": 2,
                   "rope_parameters": {"sliding_attention": turned(1e4),
                                       "full_attention": turned(1e6)},
                   "layer_types": ["sliding_attention"] * 5 + ["full_attention"]},
    "Qwen3 8B": {**PLAIN, "num_key_value_heads": 2, "rms_norm_eps": 1e-6,
                 "rope_parameters": turned(1e6)},
}  # fmt: skip


def shrunken(name: str) -> Config:
    """A published model of this book, with the sizes of `SMALL`; what is no size is left."""
    config = as_config(name)
    group = "d_ff" if name != "Mixtral 8x7B" else "expert.d_ff"
    theirs = SMALL[name]
    heads = {"n_heads": 8, "n_kv_heads": theirs.get("num_key_value_heads", 8), "head_dim": 8}
    change = {f"{kind}_attention.{k}": v for kind in ("self", "cross") for k, v in heads.items()}
    config = patch(
        config,
        {"vocab_size": 50, "d_model": 64, f"ffn.{group}": 256, "dropout": 0.0, **change},
        {"n_layers": theirs.get("num_hidden_layers", 2)},
    )
    assert config.decoder is not None
    own = config.decoder.self_attention
    if isinstance(own, tuple):
        return patch(config, {"self_attention": tuple(map(near, own))})
    return patch(config, {"self_attention": near(own)})


def near(attention: Any) -> Any:
    """The spec of an attention, with `WINDOW` in place of a window that it has."""
    arguments = attention.kwargs
    return spec(attention.target, **arguments | {"window": arguments["window"] and WINDOW})


LLAMAS = [
    (r"^embedding\.tokens", "model.embed_tokens"), (r"^decoder\.", "model."),
    (r"^head", "lm_head"), ("self_attention.out_proj", "self_attn.o_proj"),
    (r"residuals\.self_attention\.norm\.", "input_layernorm."),
    (r"residuals\.ffn\.norm\.", "post_attention_layernorm."),
    (r"self_attention\.", "self_attn."), (r"ffn\.(gate|up|down)", r"mlp.\1_proj"),
    (r"ffn\.router", "mlp.gate"),
]  # fmt: skip
SANDWICH = [
    (r"residuals\.self_attention\.norm_out", "post_attention_layernorm"),
    (r"residuals\.ffn\.norm\.", "pre_feedforward_layernorm."),
    (r"residuals\.ffn\.norm_out", "post_feedforward_layernorm"),
]
GPT2 = [
    (r"^embedding\.tokens", "transformer.wte"),
    (r"^embedding\.position\.table", "transformer.wpe"),
    (r"^decoder\.norm", "transformer.ln_f"), (r"^decoder\.layers", "transformer.h"),
    ("self_attention.qkv", "attn.c_attn"), ("self_attention.out_proj", "attn.c_proj"),
    ("residuals.self_attention.norm", "ln_1"), ("residuals.ffn.norm", "ln_2"),
    (r"ffn\.up", "mlp.c_fc"), (r"ffn\.down", "mlp.c_proj"),
]  # fmt: skip
MPT = [
    (r"^embedding\.tokens", "transformer.wte"), (r"^decoder\.norm", "transformer.norm_f"),
    (r"^decoder\.layers", "transformer.blocks"), ("self_attention.qkv", "attn.Wqkv"),
    ("self_attention.out_proj", "attn.out_proj"), ("residuals.self_attention.norm", "norm_1"),
    ("residuals.ffn.norm", "norm_2"), (r"ffn\.(up|down)", r"ffn.\1_proj"),
]  # fmt: skip
T5 = [
    (r"^embedding\.tokens", "shared"), (r"^head", "lm_head"),
    (r"coder\.norm", "coder.final_layer_norm"),
    (r"coder\.bias\.table", "coder.block.0.layer.0.SelfAttention.relative_attention_bias"),
    (r"residuals\.self_attention\.norm", "layer.0.layer_norm"),
    (r"residuals\.cross_attention\.norm", "layer.1.layer_norm"),
    (r"(encoder\..*)residuals\.ffn\.norm", r"\1layer.1.layer_norm"),
    (r"(decoder\..*)residuals\.ffn\.norm", r"\1layer.2.layer_norm"),
    (r"self_attention\.(.)\w*_proj", r"layer.0.SelfAttention.\1"),
    (r"cross_attention\.(.)\w*_proj", r"layer.1.EncDecAttention.\1"),
    (r"(encoder\..*)ffn\.", r"\1layer.1.DenseReluDense."),
    (r"(decoder\..*)ffn\.", r"\1layer.2.DenseReluDense."),
    ("Dense.gate", "Dense.wi_0"), ("Dense.up", "Dense.wi_1"), ("Dense.down", "Dense.wo"),
    (r"coder\.layers", "coder.block"),
]  # fmt: skip
RULES = {"GPT-2 small": GPT2, "MPT 7B": MPT, "T5 1.1 base": T5,
         "Gemma 2 2B": SANDWICH + LLAMAS, "Gemma 3 1B": SANDWICH + LLAMAS}  # fmt: skip


def renamed(name: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our weights under the names of transformers, joined where that library joins them."""
    if name in ("GPT-2 small", "MPT 7B"):  # queries, keys and values in one matrix
        for key in [key for key in weights if ".q_proj." in key]:
            parts = [weights.pop(key.replace(".q_", f".{part}_")) for part in "qkv"]
            weights[key.replace("q_proj", "qkv")] = torch.cat(parts)
    if name == "GPT-2 small":  # its matrices stand the other way round
        inner = {k for k, v in weights.items() if v.ndim == 2 and "embedding" not in k}
        weights = {k: v.T if k in inner else v for k, v in weights.items()}
    if name == "Mixtral 8x7B":  # all experts of a layer in one tensor
        for key in [key for key in weights if ".experts.0.gate" in key]:
            gate, up, down = (
                torch.stack([
                    weights.pop(key.replace("0.gate", f"{e}.{part}")) for e in range(8)
                ])
                for part in ("gate", "up", "down")
            )  # fmt: skip
            layer = key.split("ffn.")[0]
            weights[f"{layer}mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
            weights[f"{layer}mlp.experts.down_proj"] = down
    found = {}
    for key, weight in weights.items():
        new = key
        for old, text in RULES.get(name, LLAMAS):
            new = re.sub(old, text, new)
        found[new] = weight
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BUILT)
def test_logits_are_those_of_transformers(name: str) -> None:
    """Small copies with the same random weights: all logits of the whole model."""
    import transformers

    config_name, model_name, _ = THEIRS[name]
    config = getattr(transformers, config_name)(**SMALL[name])
    config._attn_implementation = "eager"
    theirs = getattr(transformers, model_name)(config).eval()
    ours = redraw(Transformer(shrunken(name))).eval()
    if name == "T5 1.1 base":  # release 5 ties the head; the published weights do not
        theirs.lm_head.weight = torch.nn.Parameter(theirs.lm_head.weight.detach().clone())
    weights = renamed(name, {k: p.detach() for k, p in ours.named_parameters()})
    named = dict(theirs.named_parameters())
    assert named.keys() == weights.keys()
    with torch.no_grad():
        for key, parameter in named.items():
            assert parameter.shape == weights[key].shape, key
            parameter.copy_(weights[key])
        source, ids = torch.randint(1, 50, (2, 2, 40), generator=torch.manual_seed(0))
        if name == "T5 1.1 base":
            found = ours(source, ids), theirs(input_ids=source, decoder_input_ids=ids).logits
        else:
            found = ours(ids), theirs(ids).logits
    assert found[0].std() > 0.1
    assert_close(*found, tolerance=1e-4)


# The words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_cells_are_the_seams(name: str) -> None:
    assert list(MODELS[name].cells) == SEAMS
    assert all(MODELS[name].cells.values())


CASES: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({}, {}),
    (SDPA, {}),  # it changes how attention is computed, and not what
    (FAST, {"norm": "FusedNorm", "order": "FastPostNorm", "embedding": "times √D"}),
    (DECODER_ONLY, {"stacks": "decoder alone"}),
    ({"residual": spec(PreNorm)}, {"order": "before the sub-layer"}),
    (PRE_LN, {"order": "before the sub-layer, and at the end"}),
    ({"norm": spec(RMSNorm, offset=1.0)}, {"norm": "RMSNorm, weight 1 + w"}),
    ({"norm.bias": False}, {"norm": "LayerNorm without shift"}),
    (grouped_queries(2), {"key heads": "one for 4 query heads"}),
    (grouped_queries(8), {}),
    (sliding_window(7), {"reach": "the last 7"}),
    ({"embedding.position": None}, {"positions": "none"}),
    ({"self_attention.out_bias": False}, {"bias vectors": "in some parts"}),
    ({"self_attention.scale": 0.5}, {"scores": "times 0.5"}),
    ({"head.tied": False, "head.softcap": 9.0}, {"head": "a table of its own, soft-cap 9"}),
    ({"d_model": 64, "n_layers": 2, "vocab_size": 9, "dropout": 0.5}, {}),
]


@pytest.mark.parametrize(("change", "words"), CASES, ids=lambda x: ",".join(x)[:30] or "none")
def test_described_names_what_changed_and_nothing_else(
    change: dict[str, Any], words: dict[str, str]
) -> None:
    paper, ours = described(PAPER_BASE), described(patch(PAPER_BASE, change))
    assert ours == {**paper, **words}


def test_a_pattern_is_described() -> None:
    assert MODELS["Gemma 3 1B"].cells["reach"] == "the last 512 in 22 of 26 layers"
    assert MODELS["Gemma 3 1B"].cells["positions"] == "RoPE, base 10,000 and 1,000,000"
    assert MODELS["Gemma 2 2B"].cells["scores"] == "divided by √d, soft-cap 50"


def test_kept_counts_what_is_as_in_2017() -> None:
    assert kept("Transformer") == SEAMS
    assert kept("GPT-2 small") == ["norm", "scores", "key heads", "reach", "bias vectors", "head"]
    assert kept("BERT base") == ["norm", "order", "scores", "key heads", "reach", "bias vectors"]
    assert "scores" not in kept("OLMo 2 7B")  # what is beyond the book is a change, too


def test_how_much_is_left_of_2017() -> None:
    """What the caption and the text of the figure say."""
    counts = {name: len(kept(name)) for name in MODELS}
    assert {counts[name] for name in LATE} == {1, 2, 3, 4}
    assert counts["BERT base"] == counts["GPT-2 small"] == 6
    assert len(choices("positions")["sinusoids, added"]) == 1
    assert len(choices("feed-forward")["ReLU"]) == 1
    assert not set.intersection(*(set(kept(name)) for name in MODELS))


@pytest.mark.parametrize("seam", SEAMS)
def test_choices_name_every_model_once(seam: str) -> None:
    found = choices(seam)
    names = [name for group in found.values() for name in group]
    assert sorted(names) == sorted(MODELS)
    assert next(iter(found)) == described(PAPER_BASE)[seam]
    for words, group in found.items():
        assert all(MODELS[name].cells[seam] == words for name in group)


def test_table() -> None:
    assert (
        table(["a", "b"], [(1, "x"), (2, "y")]) == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
    )
    for name in MODELS:  # a bar would split a cell
        assert "|" not in "".join((name, *MODELS[name].cells.values()))


# Changes and measurements -------------------------------------------------------------------------


def test_changes_are_the_single_patches_of_the_matrix() -> None:
    from transformer_annotated.modern.ablation import SCALES, rows

    names = [n for n, patches in rows(SCALES["smoke"]).items() if len(patches) == 1]
    assert sorted(CHANGES) == sorted(set(names) - {"sdpa"})


def test_users_of_a_change() -> None:
    assert CHANGES["t5_bias"].users == ["T5 1.1 base"]
    assert CHANGES["alibi"].users == ["MPT 7B"]
    assert CHANGES["gelu"].users == ["BERT base", "GPT-2 small", "MPT 7B"]
    assert CHANGES["experts"].users == ["Mixtral 8x7B", "DeepSeek-V3", "gpt-oss-120b"]
    assert CHANGES["qk_norm"].users == ["OLMo 2 7B", "Gemma 3 1B", "Qwen3 8B"]
    assert {"Gemma 2 2B", "GPT-2 small"} <= set(CHANGES["pre_ln"].users)
    assert "OLMo 2 7B" not in CHANGES["pre_ln"].users


def line(row: str, seed: int, value: float, scale: str = "smoke") -> dict[str, Any]:
    return {"row": row, "task": "language", "seed": seed, "bits_per_byte": value, "loss": 99.0,
            "scale": scale, "machine": "m"}  # fmt: skip


def test_an_effect_in_words() -> None:
    assert in_words([-0.5, 0.25, 0.0]) == "-0.083, better in 1 of 3"
    assert in_words([0.5]) == "+0.500, better in 0 of 1"
    assert in_words([]) == "not measured yet"


def test_measured_lines_are_of_one_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line("paper", 0, 1.0, scale) for scale in ("tiny", "smoke", "full", "smoke")]

    def stored(kinds: set[str]) -> Callable[[str], list[dict[str, Any]]]:
        return lambda name: [entry for entry in lines if entry["scale"] in kinds]

    monkeypatch.setattr(production, "results", stored({"tiny", "smoke", "full"}))
    assert [entry["scale"] for entry in measured_lines()] == ["full"]
    monkeypatch.setattr(production, "results", stored({"tiny", "smoke"}))
    assert [entry["scale"] for entry in measured_lines()] == ["smoke", "smoke"]
    monkeypatch.setattr(production, "results", stored({"tiny"}))
    assert measured_lines() == []

    def missing(name: str) -> list[dict[str, Any]]:
        raise FileNotFoundError(name)

    monkeypatch.setattr(production, "results", missing)
    assert measured_lines() == []


# Bad input ----------------------------------------------------------------------------------------


def test_a_model_with_unknown_parts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name='OLMo 2 7B' has parts .* order: .*; scores: "):
        as_config("OLMo 2 7B")


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of Transformer, .*; got 'Llama'"):
        as_config("Llama")


def test_a_pattern_of_networks_is_refused() -> None:
    ffn = PAPER_BASE.decoder.ffn if PAPER_BASE.decoder else None
    with pytest.raises(ValueError, match="one kind of feed-forward network"):
        described(patch(PAPER_BASE, {"ffn": (ffn, ffn)}))
