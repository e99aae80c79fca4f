# %% [markdown]
r"""
# Multi-query and grouped-query attention

Several query heads can share one head of keys and values. The cache shrinks by that factor, and a trained model can be
converted.
"""

# %%
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from transformer_annotated.paper.multi_head import MultiHeadAttention
from transformer_annotated.paper.parts import check_sizes, patch
from transformer_annotated.paper.transformer import Config, Transformer, tiled
from transformer_annotated.training.decoding import Cache

# %%
def grouped_queries(n_kv_heads: int) -> dict[str, int]:
    """The patch: K heads of keys and values in every attention (Ainslie et al. 2023, section 2.2).

    K = 1 is multi-query attention (Shazeer 2019), K = H is multi-head attention. K must divide
    every H, which the model checks when it is built.

    Raises ValueError for `n_kv_heads` below 1.
    """
    check_sizes(n_kv_heads=n_kv_heads)
    paths = ("self_attention.n_kv_heads", "cross_attention.n_kv_heads")
    return dict.fromkeys(paths, n_kv_heads)

# %%
def cache_bytes(
    config: Config,
    length: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    source_length: int = 0,
) -> int:
    """Bytes of the keys and values that decoding must keep after `length` tokens.

    A self-attention with a window of W keeps the last W - 1 tokens: the next one brings its own
    key. Positions, which no formula of attention needs, are not counted.

    Args:
        config: has a decoder made of `MultiHeadAttention`.
        length: target tokens read so far, in each row.
        batch: number of rows.
        dtype: of the keys and values.
        source_length: tokens of the memory, for cross-attention.

    Raises:
        ValueError: a config without a decoder, a negative length, `batch` below 1.
    """
    if config.decoder is None:
        raise ValueError("config must have a decoder, and this one has none")
    check_sizes(batch=batch)
    for name, value in (("length", length), ("source_length", source_length)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    numbers = 0
    for i in range(config.decoder.n_layers):
        own, cross = tiled(config.decoder.self_attention, i), tiled(config.decoder.cross_attention, i)
        for part, rows in ((own, length), (cross, source_length)):
            if part is None:
                continue
            H, K = part.kwargs["n_heads"], part.kwargs["n_kv_heads"]
            d = part.kwargs["head_dim"] or config.d_model // H
            if part is own and part.kwargs["window"] is not None:
                rows = min(rows, part.kwargs["window"] - 1)
            numbers += 2 * batch * rows * (K or H) * d
    return numbers * dtype.itemsize


def held_bytes(cache: Cache) -> tuple[int, int]:
    """Bytes of the keys and values that a cache holds: those in use, and all that it reserved."""
    used = reserved = 0
    for layer in cache:
        own, cross = layer.self_attention, layer.cross_attention
        tensors = [] if own._store is None else [(own._store[: own.length], own._store)]
        tensors += [] if cross._kept is None else [(x, x) for x in cross._kept[:2]]
        used += sum(part.numel() * part.element_size() for part, _ in tensors)
        reserved += sum(whole.untyped_storage().nbytes() for _, whole in tensors)
    return used, reserved

# %%
def fewer_heads(
    model: Transformer, n_kv_heads: int, join: Callable[[Tensor], Tensor]
) -> Transformer:
    """A copy of `model` with K heads of keys and values in every attention.

    Args:
        model: stays as it is.
        n_kv_heads: K, a divisor of the number of key heads of each attention.
        join: makes one head of each group of neighbours: `(K, group, d, ...)` to `(K, d, ...)`.
            It is called with the weights `(K, group, d, D)` of the projections of keys and of
            values, and with their biases `(K, group, d)`.

    Raises:
        ValueError: K below 1, or no divisor of some attention's key heads.
    """
    check_sizes(n_kv_heads=n_kv_heads)
    found = {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    for name, module in found.items():
        if module.n_kv_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads must divide the {module.n_kv_heads} key heads of "
                             f"{name}, got {n_kv_heads}")  # fmt: skip
    state = model.state_dict()
    for name, module in found.items():
        for key in (f"{name}.{part}" for part in ("k_proj.weight", "v_proj.weight", "k_proj.bias",
                                                  "v_proj.bias")):  # fmt: skip
            if key in state:  # (K_old * d, D), or (K_old * d,) for a bias
                heads = state[key].unflatten(0, (n_kv_heads, -1, module.head_dim))
                state[key] = join(heads).flatten(0, 1)
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and replaced
        new = Transformer(patch(model.config, grouped_queries(n_kv_heads)))
    like = next(model.parameters())
    new.to(device=like.device, dtype=like.dtype).train(model.training)
    new.load_state_dict(state)
    return new


def mean_pooled(model: Transformer, n_kv_heads: int) -> Transformer:
    """`model` with each group of key heads, and of value heads, replaced by its mean.

    This is how a trained multi-head model becomes one with K heads (Ainslie et al. 2023, section
    2.1); some steps of training should follow. A group is what shares a head afterwards:
    neighbours.

    Raises ValueError as `fewer_heads` does.
    """
    return fewer_heads(model, n_kv_heads, lambda heads: heads.mean(dim=1))
