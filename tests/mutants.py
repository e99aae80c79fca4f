"""Classic mistakes, planted one at a time: each must be noticed by a named test.

`plant` takes a function's source, replaces one piece of it and swaps the compiled code in place,
so that every module that uses the function makes the mistake, until the `with` block ends.
"""
# ruff: noqa: E501  (the pieces of code are quoted as they are)

import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FunctionType
from typing import Any

import torch

from transformer_annotated import attend, sdpa

PACKAGE = "transformer_annotated.paper"


@dataclass(frozen=True)
class Mutant:
    """One mistake: in the code of `target` the text `old` becomes `new`.

    `killed_by` names the test that fails then; `case` is what the test is called with.
    """

    name: str
    mistake: str
    target: str
    old: str
    new: str
    killed_by: str
    case: dict[str, Any] = field(default_factory=dict, hash=False)


LOOP = {"function": attend, "mask": "none", "dtype": torch.float64}
PADDED = {"function": attend, "mask": "padding", "dtype": torch.float64}
CAUSAL = {"function": attend, "mask": "causal", "dtype": torch.float64}
WINDOWED = {"function": attend, "mask": "window", "dtype": torch.float64}
SQUARE = {"function": attend}
PAPER = {"seam": "paper", "cross": True, "dtype": torch.float64}
NORM = {"eps": 0.5, "bias": True, "dtype": torch.float64}
STOCK = {"final_norm": False, "padded": True, "dtype": torch.float64}
FORWARD = "multi_head:MultiHeadAttention.forward"
WEIGHTS = "attention:attention_weights"
DENSE = "attention:Mask.dense"
HEADS_BY_HAND = "tests/test_multi_head.py::test_equal_to_heads_by_hand"
BY_LOOP = "tests/test_attention.py::test_equal_to_a_loop"
WHOLE = "tests/test_against_torch.py::test_whole_transformer"

MUTANTS = [
    # attention
    Mutant("no-sqrt-dk", "The scores are not divided by the square root of the head width.",
           WEIGHTS, "d**-0.5 if scale is None", "1.0 if scale is None", BY_LOOP, LOOP),
    Mutant("dk-without-root", "The scores are divided by the head width, without the root.",
           WEIGHTS, "d**-0.5", "d**-1.0", BY_LOOP, LOOP),
    Mutant("scale-twice", "The scale is applied to the queries and again to the scores.",
           WEIGHTS, "k.transpose(-2, -1)", "k.transpose(-2, -1) * scale", BY_LOOP, LOOP),
    Mutant("softmax-axis", "Softmax runs over the queries instead of the keys.",
           WEIGHTS, "return torch.softmax(scores, dim=-1)", "return torch.softmax(scores, dim=-2)",
           BY_LOOP, LOOP),
    Mutant("inverted-mask", "The mask is inverted: what should be hidden is seen.",
           WEIGHTS, "scores.masked_fill(~visible", "scores.masked_fill(visible", BY_LOOP, PADDED),
    Mutant("mask-after-softmax", "Weights are hidden after softmax, and the rest no longer sum to 1.",
           WEIGHTS, "scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)", "pass",
           BY_LOOP, PADDED),
    Mutant("blind-query-averages", "A query that may see nothing gets the mean of all values.",
           WEIGHTS, "weights.masked_fill(~visible, 0.0).to", "weights.to",
           "tests/test_attention.py::test_a_query_that_sees_nothing_gets_zero",
           {"function": attend, "biased": False}),
    Mutant("softcap-factor", "The soft cap's tanh is not multiplied by the cap again.",
           WEIGHTS, "softcap * torch.tanh(scores / softcap)", "torch.tanh(scores / softcap)",
           "tests/test_attention.py::test_softcap_equal_to_a_loop", {"mask": "none"}),
    Mutant("gqa-repeat", "Shared key heads are tiled (0, 1, 0, 1), not repeated (0, 0, 1, 1).",
           WEIGHTS, "k.repeat_interleave(H // K, dim=1)", "k.repeat(1, H // K, 1, 1)",
           "tests/test_attention.py::test_grouped_heads_equal_to_a_loop",
           {"function": attend, "mask": "none", "n_kv_heads": 2}),
    Mutant("dropout-on-the-output", "Attention's dropout drops outputs, not weights.",
           "attention:attend", "F.dropout(weights, dropout) @ v", "F.dropout(weights @ v, dropout)",
           "tests/test_attention.py::test_dropout_drops_whole_weights"),
    # masks
    Mutant("causal-hides-itself", "A query does not see its own position.",
           DENSE, "visible = j <= i", "visible = j < i", BY_LOOP, CAUSAL),
    Mutant("causal-sees-next", "A query sees the next position, the one it must predict.",
           DENSE, "visible = j <= i", "visible = j <= i + 1",
           "tests/test_invariants.py::test_no_future_leak",
           {"variant": "paper", "train": False, "dropout": 0.0}),
    Mutant("top-left", "With fewer queries than keys the triangle starts at the first key.",
           DENSE, "torch.arange(S - T, S, device=device)", "torch.arange(T, device=device)",
           "tests/test_attention.py::test_a_new_query_sees_the_whole_cache"),
    Mutant("sdpa-top-left", "The fused kernel's causal flag is used where T and S differ.",
           "attention:sdpa", "T == S and all(", "all(", BY_LOOP, {**CAUSAL, "function": sdpa}),
    Mutant("sdpa-not-causal", "The fused kernel is not told that the mask is causal.",
           "attention:sdpa", "is_causal=plain and mask.causal", "is_causal=False",
           "tests/test_attention.py::test_square_causal_equal_to_a_loop", {"function": sdpa}),
    Mutant("window-off-by-one", "A window of W shows W + 1 keys.",
           DENSE, ".abs() < self.window", ".abs() <= self.window", BY_LOOP, WINDOWED),
    Mutant("window-one-sided", "A window without causality looks only forwards without limit.",
           DENSE, "(i - j).abs()", "(i - j)", BY_LOOP, WINDOWED),
    Mutant("masks-joined-by-or", "Two masks show what either allows.",
           "attention:_both", "return a & b", "return a | b",
           "tests/test_attention.py::test_and_is_both", {"one": "padding", "other": "allowed"}),
    # multi-head attention
    Mutant("value-from-k-proj", "Values are projected with the matrix of the keys.",
           "multi_head:MultiHeadAttention.keys_values", "self.v_proj(source)", "self.k_proj(source)",
           HEADS_BY_HAND, PAPER),
    Mutant("view-without-transpose", "Heads are cut with a reshape alone, mixing positions.",
           "multi_head:MultiHeadAttention.split", "x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)",
           "x.reshape(len(x), -1, x.shape[1], self.head_dim)", HEADS_BY_HAND, PAPER),
    Mutant("heads-interleaved", "A head takes every H-th feature instead of d neighbours.",
           "multi_head:MultiHeadAttention.split", "x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)",
           "x.unflatten(-1, (self.head_dim, -1)).permute(0, 3, 1, 2)", HEADS_BY_HAND, PAPER),
    Mutant("join-without-transpose", "The heads are joined without bringing them side by side.",
           FORWARD, "heads.transpose(1, 2).flatten(-2)", "heads.reshape(*x.shape[:2], -1)",
           HEADS_BY_HAND, PAPER),
    Mutant("no-out-proj", "The joined heads are returned without the output projection.",
           FORWARD, "return self.out_proj(heads.transpose(1, 2).flatten(-2))",
           "return heads.transpose(1, 2).flatten(-2)", HEADS_BY_HAND, PAPER),
    Mutant("cross-reads-x", "Cross-attention takes keys and values from the decoder itself.",
           FORWARD, "(memory, memory_positions)", "(x, memory_positions)", HEADS_BY_HAND, PAPER),
    Mutant("window-ignored", "A module's window is forgotten once a mask is given.",
           FORWARD, "self.mask & mask", "mask",
           "tests/test_multi_head.py::test_the_window_is_joined_to_the_mask"),
    Mutant("attention-dropout-at-inference", "Attention's dropout stays on in evaluation mode.",
           FORWARD, "self.dropout if self.training else 0.0", "self.dropout",
           "tests/test_multi_head.py::test_attention_dropout_in_training_only"),
    Mutant("q-norm-for-keys", "Keys are normalised with the weights of the queries' norm.",
           "multi_head:MultiHeadAttention.keys_values", "self.k_norm(k)", "self.q_norm(k)",
           HEADS_BY_HAND, {**PAPER, "seam": "qk_norm"}),
    # feed-forward, norm, residual
    Mutant("no-relu", "The feed-forward network has no non-linearity.",
           "feed_forward:FeedForward.forward", "self.activation(self.up(x))", "self.up(x)",
           "tests/test_feed_forward.py::test_equal_to_two_products",
           {"bias": True, "dtype": torch.float64}),
    Mutant("relu-at-the-end", "The non-linearity comes after the second layer.",
           "feed_forward:FeedForward.forward",
           "self.down(self.dropout(self.activation(self.up(x))))",
           "self.activation(self.down(self.dropout(self.up(x))))",
           "tests/test_feed_forward.py::test_equal_to_two_products",
           {"bias": True, "dtype": torch.float64}),
    Mutant("bessel", "LayerNorm divides by D - 1 (Bessel's correction) instead of D.",
           "add_norm:LayerNorm.forward", "centred.square().mean(dim=-1, keepdim=True)",
           "wide.var(dim=-1, keepdim=True)", "tests/test_add_norm.py::test_equal_to_torch", NORM),
    Mutant("eps-outside-the-root", "LayerNorm adds eps to the standard deviation, not the variance.",
           "add_norm:LayerNorm.forward", "centred * torch.rsqrt(variance + self.eps)",
           "centred / (variance.sqrt() + self.eps)", "tests/test_add_norm.py::test_equal_to_torch",
           NORM),
    Mutant("norm-over-time", "LayerNorm averages over the positions: a token sees later ones.",
           "add_norm:LayerNorm.forward", "wide.mean(dim=-1, keepdim=True)",
           "wide.mean(dim=-2, keepdim=True)", "tests/test_invariants.py::test_no_future_leak",
           {"variant": "paper", "train": True, "dropout": 0.1}),
    Mutant("pre-norm", "Pre-norm is sold as the paper's post-norm.",
           "add_norm:PostNorm.forward", "self.norm(x + self.dropout(sublayer(x)))",
           "x + self.dropout(sublayer(self.norm(x)))",
           "tests/test_add_norm.py::test_post_norm_written_out"),
    Mutant("no-residual", "The input is not added to the sub-layer's output.",
           "add_norm:PostNorm.forward", "x + self.dropout", "self.dropout",
           "tests/test_add_norm.py::test_post_norm_written_out"),
    Mutant("dropout-on-the-sum", "Dropout falls on the residual's sum, not on the sub-layer's output.",
           "add_norm:PostNorm.forward", "x + self.dropout(sublayer(x))",
           "self.dropout(x + sublayer(x))",
           "tests/test_add_norm.py::test_dropout_falls_on_the_sublayer_alone"),
    # embedding and head
    Mutant("no-sqrt-d-model", "Token vectors are not multiplied by the root of the width.",
           "embedding:Embedding.forward", "self.tokens(ids) * self.scale", "self.tokens(ids)",
           "tests/test_embedding.py::test_embedding_by_hand", {"scale": True}),
    Mutant("positions-scaled", "The positions are scaled along with the token vectors.",
           "embedding:Embedding.forward", "x + self.position(positions)",
           "x + self.scale * self.position(positions)",
           "tests/test_embedding.py::test_embedding_by_hand", {"scale": True}),
    Mutant("no-embedding-dropout", "The embedding's sum is not dropped.",
           "embedding:Embedding.forward", "return self.dropout(x)", "return x",
           "tests/test_embedding.py::test_embedding_dropout_falls_on_the_sum"),
    Mutant("sin-cos-swapped", "Sines and cosines are swapped.",
           "embedding:Sinusoid.forward", "(angles.sin(), angles.cos())",
           "(angles.cos(), angles.sin())", "tests/test_embedding.py::test_sinusoid_by_hand"),
    Mutant("sin-then-cos", "All sines stand before all cosines, not in pairs.",
           "embedding:Sinusoid.forward", "dim=-1).flatten(-2)", "dim=-2).flatten(-2)",
           "tests/test_embedding.py::test_sinusoid_by_hand"),
    Mutant("angles-in-the-models-precision", "Angles are rounded to 16 bits: far positions coincide.",
           "embedding:Sinusoid.forward", "positions[..., None]", "positions[..., None].bfloat16()",
           "tests/test_embedding.py::test_sinusoid_does_not_lose_precision_with_the_model"),
    # the whole model
    Mutant("final-norm-added", "Each stack ends in a norm, as PyTorch's own Transformer does.",
           "transformer:Stack.forward", "x if self.norm is None else self.norm(x)",
           "torch.nn.functional.layer_norm(x, x.shape[-1:])", WHOLE, STOCK),
    Mutant("second-residual-forgotten", "The feed-forward network stands outside its residual.",
           "transformer:Layer.forward", 'self.residuals["ffn"](x, self.ffn)', "self.ffn(x)",
           WHOLE, STOCK),
    Mutant("memory-padding-ignored", "The decoder reads the padding of the memory.",
           "transformer:Layer.forward", "mask=memory_mask", "mask=None", WHOLE, STOCK),
    Mutant("encoder-causal", "The encoder, too, sees no later position.",
           "transformer:Stack.forward", "if self.causal:", "if True:",
           "tests/test_invariants.py::test_the_encoder_reads_both_directions",
           {"variant": "paper"}),
    Mutant("decoder-not-causal", "The decoder sees later positions.",
           "transformer:Stack.forward", "if self.causal:", "if False:",
           "tests/test_invariants.py::test_no_future_leak",
           {"variant": "paper", "train": False, "dropout": 0.0}),
    Mutant("padding-ignored", "Padding is seen like any token.",
           "transformer:joined", "if padding is None:", "if True:",
           "tests/test_invariants.py::test_padding_invariance",
           {"variant": "paper", "left": False}),
    Mutant("positions-count-padding", "Positions are counted over padding, too.",
           "transformer:default_positions", "if padding is None:", "if True:",
           "tests/test_invariants.py::test_padding_invariance", {"variant": "paper", "left": True}),
    Mutant("positions-from-one", "The first real token stands at position 1.",
           "transformer:default_positions", "padding.long().cumsum(dim=-1) - 1",
           "padding.long().cumsum(dim=-1)",
           "tests/test_invariants.py::test_padding_invariance", {"variant": "paper", "left": False}),
    Mutant("memory-of-one-layer", "Only the first layer of the decoder reads the memory.",
           "transformer:Stack.forward", "x, memory, mask, memory_mask,",
           "x, memory if i == 0 or memory is None else x, mask, memory_mask if i == 0 else None,",
           WHOLE, STOCK),
    Mutant("sharing-broken", "The head has a matrix of its own, a copy of the table.",
           "transformer:Transformer.logits", "self.embedding.weight", "self.embedding.weight.detach()",
           "tests/test_transformer.py::test_one_table_for_three_uses"),
    Mutant("one-layer-for-all", "A pattern over the layers is not tiled: all take its first entry.",
           "transformer:tiled", "node[index % len(node)]", "node[0]",
           "tests/test_transformer.py::test_a_pattern_is_tiled_over_the_layers"),
    Mutant("later-value-wins", "Of two values for one path the later one wins, in silence.",
           "parts:patch", "if address in done and done[address] != value:", "if False:",
           "tests/test_parts.py::test_two_values_for_one_path_are_an_error"),
    # training and decoding
    Mutant("eos-not-frozen", "A finished sentence goes on producing words after its EOS.",
           "first_translation:greedy", ".masked_fill(finished, PAD)", "",
           "tests/test_first_translation.py::test_a_finished_sentence_gets_padding_alone"),
    Mutant("dropout-while-decoding", "Dropout stays on while a sentence is translated.",
           "first_translation:greedy", "model.train(False)", "pass",
           "tests/test_first_translation.py::test_decoding_is_without_dropout"),
    Mutant("source-padding-forgotten", "Decoding looks at the padding of the source.",
           "first_translation:greedy", "model.decode(ids, memory, src_padding)",
           "model.decode(ids, memory)",
           "tests/test_first_translation.py::test_a_batch_is_decoded_like_its_sentences"),
    Mutant("targets-not-shifted", "The decoder reads the very token that it must predict.",
           "toy:collate", "tgt_in = padded([[BOS] + target for", "tgt_in = padded([target + [EOS] for",
           "tests/test_first_translation.py::test_the_decoder_never_reads_what_it_must_predict"),
    Mutant("loss-over-padding", "The loss is averaged over padding, too.",
           "first_translation:cross_entropy", "F.cross_entropy(logits[padding].float(), target[padding])",
           "F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())",
           "tests/test_first_translation.py::test_the_loss_is_a_mean_over_real_tokens"),
    Mutant("smoothing-over-padding", "The smoothed loss counts padding, too.",
           "multi30k:label_smoothing", "logits, target = logits[padding].float(), target[padding]",
           "logits, target = logits.flatten(0, 1).float(), target.flatten()",
           "tests/test_multi30k.py::test_label_smoothing_spreads_a_tenth_over_the_vocabulary"),
    Mutant("warm-up-off-by-one", "The schedule runs one step ahead of the optimiser.",
           "first_translation:train", "learning_rate(step)", "learning_rate(step + 1)",
           "tests/test_first_translation.py::test_the_optimizer_is_the_papers_adam"),
    Mutant("gradients-not-cleared", "Gradients of earlier steps are added up.",
           "first_translation:train", "adam.zero_grad()", "pass",
           "tests/test_first_translation.py::test_the_optimizer_is_the_papers_adam"),
    Mutant("default-betas", "Adam runs with its default second beta, 0.999, not the paper's 0.98.",
           "first_translation:train", "(0.9, 0.98)", "(0.9, 0.999)",
           "tests/test_first_translation.py::test_the_optimizer_is_the_papers_adam"),
]  # fmt: skip


def function(target: str) -> FunctionType:
    """The function that `module:qualname` names; for a property, its getter."""
    module, name = target.split(":")
    found: Any = importlib.import_module(f"{PACKAGE}.{module}")
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    found = inspect.unwrap(found)
    assert isinstance(found, FunctionType), f"{target} is no function"
    return found


def compiled(source: str, name: str, like: CodeType) -> CodeType:
    """The code of the function `name` in `source`, compiled inside a class for `super()`."""
    text = f"class Dummy:\n{textwrap.indent(textwrap.dedent(source), '    ')}"

    def search(code: CodeType) -> Iterator[CodeType]:
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                if constant.co_name == name:
                    yield constant
                yield from search(constant)

    code = next(search(compile(text, like.co_filename, "exec")))
    assert code.co_freevars == like.co_freevars, "the mistake closes over other variables"
    return code


@contextmanager
def plant(mutant: Mutant) -> Iterator[None]:
    """Inside the `with` block the mistake is made everywhere."""
    target = function(mutant.target)
    source = inspect.getsource(target)
    assert source.count(mutant.old) == 1, f"{mutant.old!r} occurs {source.count(mutant.old)} times"
    original = target.__code__
    target.__code__ = compiled(source.replace(mutant.old, mutant.new), target.__name__, original)
    try:
        yield
    finally:
        target.__code__ = original
