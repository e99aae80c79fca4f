"""Chapter 32: shared heads of keys and values, the bytes of the cache, and conversion by means."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close, assert_same, draw, redraw
from tests.variants import SMALL, batch, build, sentence
from transformer_annotated import (
    DECODER_ONLY,
    ENCODER_ONLY,
    FAST,
    Cache,
    LayerNorm,
    MultiHeadAttention,
    Transformer,
    cache_bytes,
    grouped_queries,
    mean_pooled,
    patch,
    spec,
)
from transformer_annotated.modern.grouped_query import fewer_heads, held_bytes

KEYS = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias")


def outputs(model: Transformer) -> Tensor:
    src, real = batch((7, 4, 2), 5)
    tgt = torch.cat([sentence(6, seed) for seed in (1, 2, 3)])
    return model(src, tgt, src_padding=real)


def attentions(model: Transformer) -> dict[str, MultiHeadAttention]:
    return {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}


# The patch ----------------------------------------------------------------------------------------


def test_as_many_key_heads_as_heads_is_the_paper() -> None:
    """K = H: the same numbers, bit for bit, and the same parameters."""
    ours, theirs = build(patch(SMALL, grouped_queries(4))), build("paper")
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(outputs(ours), outputs(theirs))


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_shared_heads_are_repeated_heads(n_kv_heads: int) -> None:
    """A model with K heads is the H-head model whose heads are equal within a group."""
    d, group, dtype = 4, 4 // n_kv_heads, torch.float64
    ours = redraw(MultiHeadAttention(16, 4, n_kv_heads=n_kv_heads)).to(dtype)
    theirs = MultiHeadAttention(16, 4).to(dtype)
    state = dict(ours.state_dict())
    for key in KEYS:
        heads = state[key].unflatten(0, (n_kv_heads, 1, d))
        state[key] = torch.cat([heads] * group, dim=1).flatten(0, 2)
    theirs.load_state_dict(state)
    x = draw(2, 5, 16, seed="x", dtype=dtype).requires_grad_()
    shared = {"x": x, "q": ours.q_proj.weight, "out": ours.out_proj.weight}
    same = {"x": x, "q": theirs.q_proj.weight, "out": theirs.out_proj.weight}
    assert_same(ours(x), theirs(x), shared, same)


# The cache, in bytes ------------------------------------------------------------------------------

SHAPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "grouped": grouped_queries(2),
    "one": grouped_queries(1),
    "wide heads": {"self_attention.head_dim": 6, "self_attention.n_kv_heads": 2},
    "decoder only": {**DECODER_ONLY, "self_attention.n_kv_heads": 2},
    "a pattern": {
        "decoder.self_attention": (
            spec(MultiHeadAttention, n_heads=4, n_kv_heads=1),
            spec(MultiHeadAttention, n_heads=2, head_dim=3),
        )
    },
}


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_bytes_are_measured_bytes(shape: str, length: int) -> None:
    config = patch(SMALL, SHAPES[shape])
    for dtype in (torch.float32, torch.bfloat16):
        model, B, S = build(config, dtype), 3, 5
        tgt = torch.cat([sentence(length, seed) for seed in range(B)])
        cache = Cache(model)
        with torch.no_grad():
            memory = None if model.encoder is None else model.encode(tgt[:, :1].expand(B, S))
            for new in tgt.split(7, dim=1):
                at = torch.arange(cache.length, cache.length + new.shape[1])[None]
                model.decode(new, memory, positions=at, cache=cache)
        used, reserved = held_bytes(cache)
        source = 0 if memory is None else S
        expected = cache_bytes(config, length, batch=B, dtype=dtype, source_length=source)
        assert used == expected, f"{used} bytes held, {expected} predicted"
        assert reserved >= used


def test_bytes_by_hand() -> None:
    """Llama 3 8B: 32 layers, 8 of 32 heads of 128, 16 bits: 128 KiB a token."""
    attention = {"self_attention.n_heads": 32, "self_attention.n_kv_heads": 8}
    config = patch(SMALL, DECODER_ONLY, attention, {"d_model": 4096, "decoder.n_layers": 32})
    assert cache_bytes(config, 1, dtype=torch.bfloat16) == 128 * 1024
    assert cache_bytes(config, 0) == 0
    one, many = cache_bytes(config, 10), cache_bytes(config, 10, batch=7)
    assert many == 7 * one


def test_an_empty_cache_holds_nothing() -> None:
    assert held_bytes(Cache(build("paper"))) == (0, 0)


# Conversion ---------------------------------------------------------------------------------------


def equal_within_groups(model: Transformer, n_kv_heads: int) -> Transformer:
    """Every key and value head becomes its group's first."""
    for module in attentions(model).values():
        for key, tensor in module.state_dict().items():
            if key not in KEYS:
                continue
            heads = tensor.unflatten(0, (n_kv_heads, -1, module.head_dim))
            heads.copy_(heads[:, :1].clone().expand_as(heads))
    return model


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("variant", ["paper", "fast", "qk_norm", "head_dim", "no_bias"])
def test_equal_heads_are_joined_without_a_change(variant: str, n_kv_heads: int) -> None:
    """Where the heads of each group were equal, the model computes what it did."""
    model = equal_within_groups(build(variant, torch.float64), n_kv_heads)
    assert_close(outputs(mean_pooled(model, n_kv_heads)), outputs(model))


def test_a_joined_head_is_the_mean_of_its_group() -> None:
    """Keys and values of head k are the mean of those of heads k * group to (k + 1) * group - 1."""
    model = build("paper")
    pooled = mean_pooled(model, 2)
    x = draw(2, 5, 16, seed="x")
    for name, old in attentions(model).items():
        new = attentions(pooled)[name]
        assert (new.n_heads, new.n_kv_heads) == (4, 2)
        for ours, theirs in zip(new.keys_values(x), old.keys_values(x), strict=True):
            for k in range(2):
                assert_close(ours[:, k], (theirs[:, 2 * k] + theirs[:, 2 * k + 1]) / 2)


def test_nothing_else_changes() -> None:
    """Other tensors, the mode, the dtype, the random numbers and the model itself stay."""
    model = build("paper", torch.float64).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chance = torch.get_rng_state()
    pooled = mean_pooled(model, 2)
    assert torch.equal(torch.get_rng_state(), chance)
    assert pooled.training
    assert pooled.config == patch(model.config, grouped_queries(2))
    after = pooled.state_dict()
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
        if not name.endswith(KEYS):
            assert torch.equal(after[name], tensor)
            assert after[name].data_ptr() != model.state_dict()[name].data_ptr()
        assert after[name].dtype == torch.float64


def test_means_of_means_are_means() -> None:
    model = build("paper", torch.float64)
    once, twice = mean_pooled(model, 1), mean_pooled(mean_pooled(model, 2), 1)
    assert once.config == twice.config
    assert_close(outputs(once), outputs(twice))


def test_all_heads_kept_is_the_model() -> None:
    model = build("paper")
    assert torch.equal(outputs(mean_pooled(model, 4)), outputs(model))


@pytest.mark.parametrize("norm", [None, spec(LayerNorm)])
def test_a_converted_model_learns_and_decodes(norm: Any) -> None:
    """Gradients arrive at the joined heads, and cached equals uncached."""
    config = patch(SMALL, DECODER_ONLY, FAST, {"self_attention.qk_norm": norm})
    model = mean_pooled(build(config), 1)
    ids = torch.cat([sentence(9, seed) for seed in (1, 2)])
    model(ids).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.weight"):
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0
    with torch.no_grad():
        cache, pieces = Cache(model), []
        for t in range(9):
            at = torch.tensor([[t]])
            pieces.append(model.decode(ids[:, t : t + 1], positions=at, cache=cache))
        assert_close(torch.cat(pieces, dim=1), model.decode(ids), tolerance=2e-5)


# Bad input ----------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="n_kv_heads must be a whole number of at least 1, got 0"):
        grouped_queries(0)
    with pytest.raises(ValueError, match="n_heads must be a multiple of n_kv_heads, got 4 and 3"):
        Transformer(patch(SMALL, grouped_queries(3)))
    model = build("paper")
    with pytest.raises(ValueError, match=r"must divide the 4 key heads of .*attention, got 3"):
        mean_pooled(model, 3)
    with pytest.raises(ValueError, match=r"must divide the 2 key heads of .*attention, got 4"):
        fewer_heads(mean_pooled(model, 2), 4, lambda heads: heads[:, 0])
    with pytest.raises(ValueError, match="config must have a decoder"):
        cache_bytes(patch(SMALL, ENCODER_ONLY), 3)
    other = patch(SMALL, DECODER_ONLY, {"decoder.self_attention": spec(torch.nn.Identity)})
    with pytest.raises(ValueError, match=r"MultiHeadAttention alone, got spec\(Identity\)"):
        cache_bytes(other, 3)
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        cache_bytes(SMALL, -1)
    with pytest.raises(ValueError, match="source_length must be at least 0, got -2"):
        cache_bytes(SMALL, 1, source_length=-2)
    with pytest.raises(ValueError, match="batch must be a whole number of at least 1, got 0"):
        cache_bytes(SMALL, 1, batch=0)
