"""Chapter 33: sliding windows, patterns of them, and a cache that drops what no query can see."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference import assert_close, assert_same, draw, loop_attention, redraw
from tests.variants import SMALL, batch, build, sentence
from transformer_annotated import (
    DECODER_ONLY,
    ENCODER_ONLY,
    Cache,
    Mask,
    MultiHeadAttention,
    Transformer,
    cache_bytes,
    generate,
    patch,
    pattern,
    sliding_window,
    spec,
)
from transformer_annotated.modern.grouped_query import grouped_queries, held_bytes
from transformer_annotated.modern.window import RollingCache, WindowCache, to_last_keys
from transformer_annotated.training.decoding import attending

SHORT = spec(MultiHeadAttention, n_heads=4, window=3)
LONG = spec(MultiHeadAttention, n_heads=4)
PATTERN = {"decoder.self_attention": pattern("SSL", S=SHORT, L=LONG)}
T = 16
CHUNKS = [(1,) * T, (T,), (3, 13), (7, 1, 1, 1, 5, 1), (2,) * 8]


class Turn(torch.nn.Module):
    """A stand-in for RoPE: queries and keys change with their positions."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor, key_positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        return q * (1 + positions[:, None, :, None]), k / (1 + key_positions[:, None, :, None])


PATCHES: dict[str, tuple[dict[str, Any], ...]] = {
    "window 1": (sliding_window(1),),
    "window 2": (sliding_window(2),),
    "window 5": (sliding_window(5),),
    "window 16": (sliding_window(16),),
    "window 99": (sliding_window(99),),
    "pattern": (PATTERN,),
    "grouped": (sliding_window(4), grouped_queries(2)),
    "decoder only": (DECODER_ONLY, PATTERN),
    "turned": (
        DECODER_ONLY,
        sliding_window(4),
        {"self_attention.position": spec(Turn), "embedding.position": None},
    ),
}


def decode(
    model: Transformer, tgt: Tensor, chunks: tuple[int, ...], padding: Tensor | None = None
) -> tuple[Tensor, WindowCache]:
    """Feed `tgt` in pieces; after each, the cache holds exactly the bytes predicted."""
    memory = None if model.encoder is None else model.encode(tgt[:, :4])
    cache, pieces, start = WindowCache(model), [], 0
    positions = torch.arange(tgt.shape[1])[None]
    if padding is not None:
        positions = (padding.long().cumsum(dim=1) - 1).clamp(min=0)
    for n in chunks:
        new = slice(start, start + n)
        start += n
        pieces.append(
            model.decode(
                tgt[:, new], memory, positions=positions[:, new], cache=cache,
                padding=None if padding is None else padding[:, :start],
            )
        )  # fmt: skip
        used, reserved = held_bytes(cache)
        expected = cache_bytes(
            model.config, start, batch=len(tgt), source_length=0 if memory is None else 4
        )
        assert used == expected, f"{used} bytes held after {start} tokens, {expected} predicted"
        assert reserved >= used
    return torch.cat(pieces, dim=1), cache


# The window ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both sides"])
def test_a_window_holds_w_keys(window: int, causal: bool) -> None:
    """Causal: 0 <= i - j < W. In an encoder: W - 1 on either side."""
    seen = (Mask(causal=causal) & Mask(window=window)).dense(1, 9, 9)
    assert seen is not None
    for i in range(9):
        right = [j for j in range(9) if abs(i - j) < window and (j <= i or not causal)]
        assert seen[i].nonzero()[:, 0].tolist() == right


@pytest.mark.parametrize("window", [1, 3, 9])
def test_equal_to_a_loop(window: int) -> None:
    """Output and gradient of a windowed attention, against a loop over pairs."""
    model = redraw(MultiHeadAttention(8, 2, window=window)).double()
    x = draw(2, 7, 8, seed="x", dtype=torch.float64).requires_grad_()
    mask = Mask(causal=True) & Mask(window=window)

    def by_loop(x: Tensor) -> Tensor:
        q, (k, v) = model.split(model.q_proj(x)), model.keys_values(x)
        return model.out_proj(loop_attention(q, k, v, mask).transpose(1, 2).flatten(-2))

    assert_same(
        model(x, mask=Mask(causal=True)), by_loop(x), {"x": x, **dict(model.named_parameters())}
    )


@pytest.mark.parametrize("variant", ["paper", "sdpa"])
def test_a_window_as_long_as_the_sentence_is_no_window(variant: str) -> None:
    from tests.variants import VARIANTS

    config = VARIANTS[variant].config
    src, real = batch((7, 4, 2), 5)
    tgt = torch.cat([sentence(7, seed) for seed in (1, 2, 3)])
    full, window = build(config), build(patch(config, sliding_window(7)))
    assert torch.equal(full(src, tgt, src_padding=real), window(src, tgt, src_padding=real))


@pytest.mark.parametrize(("window", "depth"), [(2, 3), (3, 1), (3, 3), (4, 2)])
def test_the_receptive_field(window: int, depth: int) -> None:
    """An output depends on itself and the depth * (window - 1) positions before, and no others."""
    config = patch(SMALL, DECODER_ONLY, sliding_window(window), {"decoder.n_layers": depth})
    model = redraw(Transformer(config)).double().eval()
    assert model.decoder is not None
    x = draw(1, 16, 16, seed="x", dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(model.decoder(x)[0, -1].square().sum(), x)
    reached = gradient[0].abs().amax(dim=-1) > 0
    assert reached.nonzero()[:, 0].tolist() == list(range(15 - depth * (window - 1), 16))


@pytest.fixture(scope="module")
def mistral() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("transformers.masking_utils")


@pytest.mark.parametrize(("T", "S", "window"), [(9, 9, 4), (1, 12, 5), (3, 10, 4), (6, 6, 1)])
def test_the_same_keys_as_mistral(mistral: Any, T: int, S: int, window: int) -> None:
    """transformers' rule for Mistral's window shows each query the same keys."""
    rule = mistral.sliding_window_causal_mask_function(window)
    ours = (Mask(causal=True) & Mask(window=window)).dense(1, T, S)
    assert ours is not None
    for i in range(T):
        theirs = [bool(rule(0, 0, torch.tensor(S - T + i), torch.tensor(j))) for j in range(S)]
        assert ours[i].tolist() == theirs


# Patterns -----------------------------------------------------------------------------------------


def test_a_pattern_is_repeated_over_the_depth() -> None:
    """SSSL over ten layers: every fourth sees all."""
    spelled = {"decoder.self_attention": pattern("SSSL", S=SHORT, L=LONG)}
    model = Transformer(patch(SMALL, DECODER_ONLY, spelled, {"decoder.n_layers": 10}))
    assert model.decoder is not None
    windows = [layer.self_attention.mask.window for layer in model.decoder.layers]
    assert windows == [3, 3, 3, None, 3, 3, 3, None, 3, 3]


def test_a_pattern_of_one_letter_is_the_patch() -> None:
    one = patch(SMALL, {"decoder.self_attention": pattern("S", S=SHORT)})
    other = patch(SMALL, {"decoder.self_attention": SHORT})
    ids, src = sentence(9, 1), sentence(5, 2)
    assert torch.equal(build(one)(src, ids), build(other)(src, ids))


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", CHUNKS, ids=str)
@pytest.mark.parametrize("name", PATCHES)
def test_cached_is_uncached(name: str, chunks: tuple[int, ...]) -> None:
    """In any pieces, longer than the window too; never a byte more than predicted."""
    model = build(patch(SMALL, *PATCHES[name]))
    tgt = torch.cat([sentence(T, seed) for seed in (1, 2, 3)])
    with torch.no_grad():
        expected = model.decode(tgt, None if model.encoder is None else model.encode(tgt[:, :4]))
        got, cache = decode(model, tgt, chunks)
    assert cache.length == T
    assert_close(got, expected, tolerance=2e-5)


@pytest.mark.parametrize("name", PATCHES)
def test_cached_is_uncached_with_filler_on_the_left(name: str) -> None:
    """`to_last_keys` cuts the padding to the keys that a layer holds."""
    model = build(patch(SMALL, *PATCHES[name]))
    tgt, real = batch((12, 7, 3), 8, left=True)
    with torch.no_grad(), attending(model, "self", to_last_keys):
        memory = None if model.encoder is None else model.encode(tgt[:, :4])
        expected = model.decode(tgt, memory, padding=real)
        got, _ = decode(model, tgt, (5, 1, 1, 2, 3), real)
    assert_close(got[real], expected[real], tolerance=2e-5)


def test_a_rule_for_single_pairs_is_cut_too() -> None:
    """`allowed`, like padding, covers every key so far."""
    model = build(patch(SMALL, DECODER_ONLY, sliding_window(3)))
    ids, allowed = sentence(8, 1), draw(8, 8, seed="allowed") > -1
    with torch.no_grad(), attending(model, "self", to_last_keys):
        expected = model.decode(ids, mask=Mask(allowed=allowed))
        cache, got = WindowCache(model), []
        for t in range(8):
            rule, at = Mask(allowed=allowed[t : t + 1, : t + 1]), torch.tensor([[t]])
            got.append(model.decode(ids[:, t : t + 1], mask=rule, positions=at, cache=cache))
    assert_close(torch.cat(got, dim=1), expected, tolerance=2e-5)


def test_a_layer_without_a_window_keeps_all() -> None:
    """Windowed and full layers lie side by side, and each drops what it may."""
    model = build(patch(SMALL, *PATCHES["decoder only"]))
    with torch.no_grad():
        _, cache = decode(model, sentence(T, 1), (5, 11))
    kept = [layer.self_attention._store[: layer.self_attention.length].shape[0] for layer in cache]
    assert kept == [2, 2, T]


def test_memory_is_bounded_over_thousands_of_tokens() -> None:
    """3,000 tokens; what is held and what is reserved stays below W keys a layer."""
    config = patch(SMALL, DECODER_ONLY, sliding_window(8), {"decoder.n_layers": 1})
    model, held = build(config), set()
    model.embedding.position = None
    ids = sentence(30, 1)
    with torch.inference_mode():
        cache = WindowCache(model)
        for step in range(100):
            at = torch.arange(30)[None] + 30 * step
            model.decode(ids, positions=at, cache=cache)
            held.add(held_bytes(cache))
    bound = cache_bytes(config, 10**6)
    assert cache.length == 3000
    assert held == {(bound, bound)}
    assert cache[0].self_attention._positions.untyped_storage().nbytes() == 7 * 8


def test_without_windows_it_is_the_plain_cache() -> None:
    model = build("paper")
    assert not any(isinstance(layer.self_attention, RollingCache) for layer in WindowCache(model))


@pytest.mark.parametrize("rows", [[2, 0, 1], [1, 1, 0], [2], [0, 0, 1, 1, 2, 2]], ids=str)
def test_reordered_rows_go_on_as_the_rows_they_were(rows: list[int]) -> None:
    model = build(patch(SMALL, *PATCHES["turned"]))
    tgt, index = torch.cat([sentence(T, seed) for seed in (1, 2, 3)]), torch.tensor(rows)
    positions = torch.arange(T) + torch.tensor([[0], [5], [9]])
    with torch.no_grad():
        cache = WindowCache(model)
        model.decode(tgt[:, :-1], positions=positions[:, :-1], cache=cache)
        cache.reorder(index, start=9)
        at = positions[index]
        last = model.decode(tgt[index, -1:], positions=at[:, -1:], cache=cache)
        expected = model.decode(tgt[index], positions=at)[:, -1:]
    assert_close(last, expected, tolerance=2e-5)


def test_generation_is_the_same_with_either_cache() -> None:
    """Prompts longer than the window, filler on the left."""
    model = build(patch(SMALL, *PATCHES["decoder only"]))
    ids, real = batch((12, 7, 3), 8, left=True)
    written = []
    with attending(model, "self", to_last_keys):
        for cache in (Cache(model), WindowCache(model)):
            seed = torch.Generator().manual_seed(1)
            new = generate(model, ids, max_new_tokens=9, generator=seed, cache=cache, padding=real)
            written.append(torch.stack(list(new)))
    assert torch.equal(*written)
    assert written[0].unique().numel() > 3


def test_searches_take_it() -> None:
    """Greedy search's shortcut for a single query serves a rolling cache as well."""
    from transformer_annotated.training.decoding import without_causal

    model = build(patch(SMALL, DECODER_ONLY, sliding_window(3)))
    ids = sentence(T, 1)
    with torch.no_grad():
        expected = model.decode(ids)
        with attending(model, "self", without_causal):
            got, _ = decode(model, ids, (1,) * T)
    assert_close(got, expected, tolerance=2e-5)


def test_the_plain_cache_serves_windows_too() -> None:
    """It holds more than it must, and computes the same."""
    model = build(patch(SMALL, DECODER_ONLY, sliding_window(3)))
    ids = sentence(T, 1)
    with torch.no_grad():
        cache, at = Cache(model), torch.arange(T)[None]
        first = model.decode(ids[:, :9], positions=at[:, :9], cache=cache)
        second = model.decode(ids[:, 9:], positions=at[:, 9:], cache=cache)
        assert_close(torch.cat((first, second), dim=1), model.decode(ids), tolerance=2e-5)
    assert held_bytes(cache)[0] > cache_bytes(model.config, T)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, -3, 2.5])
def test_bad_windows_are_named(window: Any) -> None:
    with pytest.raises(ValueError, match=f"window must be a whole number .* got {window}"):
        sliding_window(window)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="letters must use each of S, L, got 'SSX'"):
        pattern("SSX", S=SHORT, L=LONG)
    with pytest.raises(ValueError, match="letters must use each of S, L, got 'S'"):
        pattern("S", S=SHORT, L=LONG)
    with pytest.raises(ValueError, match="letters must use each of S, got ''"):
        pattern("", S=SHORT)
    with pytest.raises(ValueError, match="model must have a decoder"):
        WindowCache(build(patch(SMALL, ENCODER_ONLY)))
    model = build(patch(SMALL, DECODER_ONLY, sliding_window(3)))
    with torch.no_grad():
        _, cache = decode(model, torch.cat((sentence(4, 1), sentence(4, 2))), (4,))
        with pytest.raises(ValueError, match="source must have the cache's 2 rows, got 1"):
            model.decode(sentence(1, 1), positions=torch.tensor([[4]]), cache=cache)
