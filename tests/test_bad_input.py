"""Bad input: a ValueError that names the argument, the value and what is allowed; nothing changed.

The rows are faults A (configuration) and B (model inputs) that concern Part I.
"""
# ruff: noqa: E501  (a table reads best with one row a line)

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from tests.variants import SMALL, build, sentence
from transformer_annotated import (
    DECODER_ONLY,
    ENCODER_ONLY,
    Config,
    Embedding,
    FeedForward,
    Head,
    LayerNorm,
    Mask,
    MultiHeadAttention,
    PostNorm,
    Sinusoid,
    StackConfig,
    Transformer,
    attend,
    from_json,
    patch,
    sdpa,
    spec,
    to_json,
)
from transformer_annotated.paper.transformer import Layer


@dataclass(frozen=True)
class Fault:
    """A mistake, and the words that its error must hold."""

    name: str
    make: Callable[[], Any]
    says: tuple[str, ...]


def heads(n: int, width: int = 4, length: int = 3) -> torch.Tensor:
    return torch.zeros(2, n, length, width)


def saved(old: str, new: str) -> str:
    text = to_json(SMALL)
    assert old in text
    return text.replace(old, new)


NAN = float("nan")
CONFIGURATION = [
    Fault("heads do not divide d_model", lambda: MultiHeadAttention(10, 3), ("d_model", "n_heads", "10", "3")),
    Fault("heads do not divide d_model, in a model", lambda: Transformer(patch(SMALL, {"self_attention.n_heads": 3})), ("d_model", "n_heads", "16", "3")),
    Fault("key heads do not divide heads", lambda: MultiHeadAttention(12, 6, n_kv_heads=4), ("n_heads", "n_kv_heads", "6", "4")),
    Fault("more key heads than heads", lambda: MultiHeadAttention(12, 2, n_kv_heads=4), ("n_heads", "n_kv_heads", "2", "4")),
    Fault("no heads", lambda: MultiHeadAttention(12, 0), ("n_heads", "at least 1", "0")),
    Fault("no key heads", lambda: MultiHeadAttention(12, 2, n_kv_heads=0), ("n_kv_heads", "at least 1", "0")),
    Fault("no head width", lambda: MultiHeadAttention(12, 2, head_dim=0), ("head_dim", "at least 1", "0")),
    Fault("a size that is not whole", lambda: FeedForward(8, 2.5), ("d_ff", "whole number", "2.5")),  # type: ignore[arg-type]
    Fault("a size that is a bool", lambda: FeedForward(8, True), ("d_ff", "whole number", "True")),
    Fault("negative width", lambda: LayerNorm(-1), ("d_model", "at least 1", "-1")),
    Fault("odd width for sinusoids", lambda: Sinusoid(7), ("d_model", "even", "7")),
    Fault("odd width for sinusoids, in a model", lambda: Transformer(patch(SMALL, {"d_model": 9, "self_attention.n_heads": 1, "cross_attention.n_heads": 1})), ("d_model", "even", "9")),
    Fault("base of sinusoids", lambda: Sinusoid(8, base=1.0), ("base", "above 1", "1.0")),
    Fault("eps of a norm", lambda: LayerNorm(8, eps=0.0), ("eps", "above 0", "0.0")),
    Fault("eps is not a number", lambda: LayerNorm(8, eps=NAN), ("eps", "above 0", "nan")),
    Fault("dropout of one", lambda: Config(dropout=1.0), ("dropout", "[0, 1)", "1.0")),
    Fault("negative dropout", lambda: PostNorm(8, spec(LayerNorm), -0.1), ("dropout", "[0, 1)", "-0.1")),
    Fault("dropout that is not a number", lambda: Config(dropout=NAN), ("dropout", "[0, 1)", "nan")),
    Fault("dropout that is text", lambda: Config(dropout="0.1"), ("dropout", "[0, 1)", "'0.1'")),  # type: ignore[arg-type]
    Fault("dropout of attention", lambda: MultiHeadAttention(8, 2, dropout=2.0), ("dropout", "[0, 1)", "2.0")),
    Fault("dropout of the feed-forward", lambda: FeedForward(8, 8, dropout=2.0), ("dropout", "[0, 1)", "2.0")),
    Fault("dropout of the embedding", lambda: Embedding(8, 8, 2.0), ("dropout", "[0, 1)", "2.0")),
    Fault("window of nothing", lambda: MultiHeadAttention(8, 2, window=0), ("window", "at least 1", "0")),
    Fault("window that is not whole", lambda: Mask(window=2.5), ("window", "whole number", "2.5")),  # type: ignore[arg-type]
    Fault("softcap of zero", lambda: MultiHeadAttention(8, 2, softcap=0.0), ("softcap", "above 0", "0.0")),
    Fault("negative softcap of the head", lambda: Head(8, 8, softcap=-1.0), ("softcap", "above 0", "-1.0")),
    Fault("no vocabulary", lambda: Config(vocab_size=0), ("vocab_size", "at least 1", "0")),
    Fault("no source vocabulary", lambda: Config(src_vocab_size=0), ("src_vocab_size", "at least 1", "0")),
    Fault("no layers", lambda: patch(SMALL, {"decoder.n_layers": 0}), ("n_layers", "at least 1", "0")),
    Fault("no head vocabulary", lambda: Head(8, 0), ("vocab_size", "at least 1", "0")),
    Fault("a module in place of a spec", lambda: Config(norm=LayerNorm(8)), ("norm", "must be a spec", "LayerNorm")),  # type: ignore[arg-type]
    Fault("a class in place of a spec", lambda: StackConfig(ffn=FeedForward), ("ffn", "must be a spec", "FeedForward")),  # type: ignore[arg-type]
    Fault("an empty pattern", lambda: StackConfig(ffn=()), ("ffn", "must be a spec", "()")),
    Fault("no norm", lambda: Config(norm=None), ("norm", "must be a spec", "None")),  # type: ignore[arg-type]
    Fault("a spec in place of a stack", lambda: Config(encoder=spec(FeedForward)), ("encoder", "StackConfig", "FeedForward")),  # type: ignore[arg-type]
    Fault("final_norm that is a spec", lambda: Config(final_norm=spec(LayerNorm)), ("final_norm", "True or False", "LayerNorm")),  # type: ignore[arg-type]
    Fault("causal that is a number", lambda: StackConfig(causal=1), ("causal", "True or False", "1")),  # type: ignore[arg-type]
    Fault("no stack at all", lambda: Transformer(patch(SMALL, {"encoder": None, "decoder": None})), ("encoder and decoder are both None",)),
    Fault("cross-attention to nothing", lambda: Transformer(patch(SMALL, {"encoder": None})), ("decoder.cross_attention", "encoder=None")),
    Fault("an encoder that nobody reads", lambda: Transformer(patch(SMALL, {"decoder.cross_attention": None})), ("decoder.cross_attention", "encoder")),
    Fault("two numbers of heads under one bias", lambda: Transformer(patch(SMALL, {"embedding.position": None, "encoder.bias": spec(nn.Identity), "encoder.layers.0.self_attention.n_heads": 2})), ("n_heads", "'2'", "'4'")),
    Fault("positions by the embedding and by a bias", lambda: Transformer(patch(SMALL, {"decoder.bias": spec(nn.Identity)})), ("embedding.position", "Sinusoid", "decoder.bias", "Identity")),
    Fault("positions by the embedding and by a turn, in one layer", lambda: Transformer(patch(SMALL, {"decoder.layers.2.self_attention.position": spec(nn.Identity)})), ("embedding.position", "decoder.self_attention.position", "Identity")),
    # spec
    Fault("misspelt argument", lambda: spec(LayerNorm, epsilon=1e-6), ("LayerNorm", "'epsilon'", "d_model, eps, bias")),
    Fault("a built module as an argument", lambda: spec(FeedForward, activation=nn.ReLU()), ("activation", "spec", "ReLU")),
    Fault("a list as an argument", lambda: spec(FeedForward, d_ff=[1]), ("d_ff", "tuple", "list")),
    Fault("not a class", lambda: spec("LayerNorm"), ("target", "class", "'LayerNorm'")),  # type: ignore[arg-type, var-annotated]
    Fault("a spec of a spec", lambda: spec(spec(LayerNorm)), ("target", "class", "LayerNorm")),
    Fault("a size that is missing", lambda: spec(FeedForward, d_ff=8)(), ("FeedForward", "d_model")),
    Fault("a size that is unknown", lambda: spec(LayerNorm)(d_model=8, width=3), ("LayerNorm", "'width'", "d_model")),
    Fault("a size that is fixed", lambda: spec(LayerNorm, eps=1e-3)(d_model=8, eps=1.0), ("eps", "already fixes")),
    # patch
    Fault("unknown path", lambda: patch(SMALL, {"encoder.fn.d_ff": 8}), ("'encoder.fn.d_ff'", "encoder.ffn.d_ff", "The paths are")),
    Fault("unknown path, one stack left out", lambda: patch(SMALL, {"self_attention.heads": 8}), ("'self_attention.heads'", "self_attention.n_heads")),
    Fault("unknown layer", lambda: patch(SMALL, {"decoder.layers.3.ffn.d_ff": 8}), ("'decoder.layers.3.ffn.d_ff'",)),
    Fault("a layer that is no number", lambda: patch(SMALL, {"decoder.layers.last.ffn": None}), ("'decoder.layers.last.ffn'",)),
    Fault("an empty path", lambda: patch(SMALL, {"": 8}), ("''", "The paths are")),
    Fault("two values for one path", lambda: patch(SMALL, {"d_model": 8}, {"d_model": 24}), ("d_model", "8", "24")),
    Fault("two values, by two names", lambda: patch(SMALL, {"ffn.d_ff": 8}, {"encoder.ffn.d_ff": 24}), ("encoder.ffn.d_ff", "8", "24")),
    Fault("a patch with a bad value", lambda: patch(SMALL, {"dropout": 7.0}), ("dropout", "[0, 1)", "7.0")),
    Fault("a patch with a built module", lambda: patch(SMALL, {"ffn.activation": nn.ReLU()}), ("activation", "spec", "ReLU")),
    # JSON
    Fault("misspelt key in JSON", lambda: from_json(saved('"final_norm"', '"finalnorm"')), ("Config", "'finalnorm'", "final_norm")),
    Fault("misspelt argument in JSON", lambda: from_json(saved('"eps"', '"epsilon"')), ("LayerNorm", "'epsilon'", "eps")),
    Fault("unknown class in JSON", lambda: from_json(saved('"LayerNorm"', '"NoSuchNorm"')), ("'NoSuchNorm'",)),
    Fault("a name that would run code", lambda: from_json(saved('"LayerNorm"', '"__import__"')), ("'__import__'",)),
    Fault("a class that is no text", lambda: from_json(saved('"spec": "LayerNorm"', '"spec": 3')), ("text", "3")),
    Fault("a function that is a class", lambda: from_json(saved('"function": "attend"', '"function": "LayerNorm"')), ("'LayerNorm'",)),
    Fault("NaN in JSON", lambda: from_json(saved('"dropout": 0.0', '"dropout": NaN')), ("finite", "NaN")),
    Fault("infinity in JSON", lambda: from_json(saved('"dropout": 0.0', '"dropout": -Infinity')), ("finite", "-Infinity")),
    Fault("a bad value in JSON", lambda: from_json(saved('"dropout": 0.0', '"dropout": "much"')), ("dropout", "[0, 1)", "'much'")),
    Fault("a size of text in JSON", lambda: from_json(saved('"n_layers": 2', '"n_layers": "two"')), ("n_layers", "whole number", "'two'")),
    Fault("another version of JSON", lambda: from_json(saved('"version": 1', '"version": 2')), ("version 1", '"version": 2')),
    Fault("no config in JSON", lambda: from_json(json.dumps({"version": 1})), ("config", "version")),
    Fault("a list for JSON", lambda: from_json("[]"), ("version 1", "[]")),
    Fault("text that is no JSON", lambda: from_json("Config()"), ("line 1",)),
    Fault("NaN to JSON", lambda: to_json(patch(SMALL, {"norm.eps": NAN})), ("JSON",)),
]  # fmt: skip

IDS, OTHER = sentence(5, 1), sentence(4, 2)
TWO_IDS = torch.cat((IDS, IDS))
REAL = torch.ones(1, 5).bool()
MEMORY = torch.zeros(1, 5, 16)
MODEL = build("paper").train()
DECODER, ENCODER = build(patch(SMALL, DECODER_ONLY)), build(patch(SMALL, ENCODER_ONLY))


def decoder_layer() -> Layer:
    layer = MODEL.decoder.layers[0]  # type: ignore[union-attr]
    assert isinstance(layer, Layer)
    return layer


INPUTS = [
    Fault("id of the vocabulary's size", lambda: MODEL(torch.tensor([[1, 13]]), OTHER), ("ids", "13", "0 to 12")),
    Fault("target id too large", lambda: MODEL(IDS, torch.tensor([[1, 99]])), ("ids", "99", "0 to 12")),
    Fault("negative id", lambda: MODEL(torch.tensor([[1, -1]]), OTHER), ("ids", "-1", "0 to 12")),
    Fault("float ids", lambda: MODEL(IDS.float(), OTHER), ("ids", "integers", "float32")),
    Fault("bool ids", lambda: MODEL(REAL, OTHER), ("ids", "integers", "bool")),
    Fault("ids of rank 0", lambda: DECODER(torch.tensor(3)), ("ids", "(B, T)", "()")),
    Fault("ids of rank 1", lambda: DECODER(IDS[0]), ("ids", "(B, T)", "(5,)")),
    Fault("source of rank 1", lambda: ENCODER(IDS[0]), ("ids", "(B, T)", "(5,)")),
    Fault("ids of rank 3", lambda: MODEL(IDS[None], OTHER), ("ids", "(B, T)", "(1, 1, 5)")),
    Fault("empty batch", lambda: MODEL(IDS[:0], OTHER[:0]), ("ids", "B, T >= 1", "(0, 5)")),
    Fault("empty source", lambda: MODEL(IDS[:, :0], OTHER), ("ids", "B, T >= 1", "(1, 0)")),
    Fault("empty target", lambda: MODEL(IDS, OTHER[:, :0]), ("ids", "B, T >= 1", "(1, 0)")),
    Fault("two sources, one target", lambda: MODEL(TWO_IDS, OTHER), ("src", "tgt", "(2, 5)", "(1, 4)")),
    Fault("no target", lambda: MODEL(IDS), ("tgt", "missing", "two stacks")),
    Fault("a target for one stack", lambda: DECODER(IDS, OTHER), ("tgt", "given", "one stack")),
    Fault("encode without an encoder", lambda: DECODER.encode(IDS), ("no encoder",)),
    Fault("decode without a decoder", lambda: ENCODER.decode(IDS), ("no decoder",)),
    Fault("decode without memory", lambda: MODEL.decode(OTHER), ("memory", "missing")),
    Fault("memory for a decoder alone", lambda: DECODER.decode(OTHER, MEMORY), ("memory", "given")),
    Fault("a cache without positions", lambda: DECODER.decode(OTHER, cache=[]), ("positions", "cache")),
    Fault("a layer without memory", lambda: decoder_layer()(MEMORY), ("memory", "cross-attention")),
    Fault("padding of another length", lambda: MODEL(IDS, OTHER, src_padding=REAL[:, :4]), ("padding", "(1, 5)", "(1, 4)")),
    Fault("target padding of another length", lambda: MODEL(IDS, OTHER, tgt_padding=REAL), ("padding", "(1, 4)", "(1, 5)")),
    Fault("padding of rank 1", lambda: MODEL(IDS, OTHER, src_padding=REAL[0]), ("padding", "(1, 5)", "(5,)")),
    Fault("float padding", lambda: MODEL(IDS, OTHER, src_padding=REAL.float()), ("padding", "bool", "float32")),
    Fault("integer padding", lambda: MODEL(IDS, OTHER, tgt_padding=REAL[:, :4].long()), ("padding", "bool", "int64")),
    Fault("memory padding of another length", lambda: MODEL.decode(OTHER, MEMORY, REAL[:, :4]), ("padding", "(1, 5)", "(1, 4)")),
    Fault("positions of another length", lambda: MODEL.encode(IDS, positions=torch.arange(4)[None]), ("positions", "(1, 5)", "(1, 4)")),
    Fault("positions of rank 1", lambda: MODEL.encode(IDS, positions=torch.arange(5)), ("positions", "(1, 5)", "(5,)")),
    Fault("float mask", lambda: Mask(allowed=torch.ones(3, 3)), ("allowed", "bool", "float32")),
    Fault("integer mask", lambda: Mask(padding=torch.ones(2, 3).int()), ("padding", "bool", "int32")),
    Fault("padding of a square mask's shape", lambda: Mask(padding=torch.ones(3, 3, 3).bool()), ("padding", "rank", "(3, 3, 3)")),
    Fault("a four-dimensional mask", lambda: Mask(allowed=torch.ones(1, 1, 3, 3).bool()), ("allowed", "rank", "(1, 1, 3, 3)")),
    Fault("a mask of another length", lambda: MODEL.encode(IDS, mask=Mask(allowed=torch.ones(4, 4).bool())), ("allowed", "(5, 5)", "(4, 4)")),
    Fault("a mask for another batch", lambda: MODEL.encode(IDS, mask=Mask(allowed=torch.ones(2, 5, 5).bool())), ("allowed", "(1, 5, 5)", "(2, 5, 5)")),
    Fault("padding given as a mask of another batch", lambda: attend(heads(2), heads(2), heads(2), Mask(padding=torch.ones(3, 3).bool())), ("padding", "(2, 3)", "(3, 3)")),
    Fault("heads of rank 3", lambda: attend(heads(2)[0], heads(2), heads(2)), ("rank 4", "(2, 3, 4)")),
    Fault("heads of another width", lambda: sdpa(heads(2, 5), heads(2), heads(2)), ("do not fit", "(2, 2, 3, 5)")),
    Fault("fewer values than keys", lambda: attend(heads(2), heads(2), heads(2, length=2)), ("do not fit", "(2, 2, 2, 4)")),
    Fault("heads that do not divide", lambda: attend(heads(4), heads(3), heads(3)), ("multiple", "(2, 4, 3, 4)", "(2, 3, 3, 4)")),
    Fault("softcap for sdpa", lambda: sdpa(heads(2), heads(2), heads(2), softcap=3.0), ("softcap=3.0",)),
]  # fmt: skip


def raises(fault: Fault) -> None:
    with pytest.raises(ValueError) as raised:
        fault.make()
    message = str(raised.value)
    missing = [word for word in fault.says if word not in message]
    assert not missing, f"{message!r} does not say {missing}"


@pytest.mark.parametrize("fault", CONFIGURATION, ids=lambda fault: fault.name)
def test_bad_configuration(fault: Fault) -> None:
    """The configuration that the mistake was made with is what it was."""
    before = to_json(SMALL)
    raises(fault)
    assert to_json(SMALL) == before


@pytest.mark.parametrize("fault", INPUTS, ids=lambda fault: fault.name)
def test_bad_input(fault: Fault) -> None:
    """No parameter, gradient or mode of the model has changed, and it still works."""
    models = (MODEL, DECODER, ENCODER)
    before = [{n: t.clone() for n, t in m.state_dict().items()} for m in models]
    raises(fault)
    for model, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
    assert [m.training for m in models] == [True, False, False]
    assert MODEL(IDS, OTHER).shape == (1, 4, 13)


def test_names_of_faults_are_unique() -> None:
    names = [fault.name for fault in (*CONFIGURATION, *INPUTS)]
    assert len(names) == len(set(names))


def test_a_config_cannot_be_changed_in_place() -> None:
    for name in ("d_model", "dropout"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(SMALL, name, 1)


def test_a_window_longer_than_the_sentence_is_no_window() -> None:
    """Not a fault: it hides nothing."""
    windowed = build(patch(SMALL, {"self_attention.window": 99}))
    assert torch.allclose(windowed(IDS, OTHER), build("paper")(IDS, OTHER), atol=1e-6)


def test_a_mask_is_never_a_float_that_is_added() -> None:
    """PyTorch adds a float mask to the scores; here a 0/1 mask of floats is an error."""
    for dtype in (torch.float32, torch.int64, torch.uint8):
        for name, shape in (("padding", (2, 3)), ("allowed", (3, 3))):
            with pytest.raises(ValueError, match=f"{name} must be bool"):
                Mask(**{name: torch.ones(*shape, dtype=dtype)})
