# %% [markdown]
r"""
# Sliding window

A query that sees only the last W keys does not need older ones. The cache stops growing.
"""

# %%
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_annotated.paper.attention import Attend, Mask
from transformer_annotated.paper.multi_head import KeysValues
from transformer_annotated.paper.parts import Spec
from transformer_annotated.paper.transformer import Transformer, tiled
from transformer_annotated.training.decoding import Cache, SelfAttentionCache

# %%
def sliding_window(window: int) -> dict[str, int]:
    """The patch: in self-attention a query sees only keys less than `window` positions away.

    In a causal stack these are W keys, itself included; in an encoder W - 1 on either side, too.

    Raises ValueError for `window` below 1.
    """
    Mask(window=window)  # objects
    return {"self_attention.window": window}


def pattern(letters: str, **specs: Spec[nn.Module]) -> tuple[Spec[nn.Module], ...]:
    """One spec a letter: `pattern("SSSL", S=short, L=long)`. A stack repeats it over its depth.

    Raises ValueError for no letters, a letter without a spec, and a spec without a letter.
    """
    if not letters or set(letters) != specs.keys():
        raise ValueError(f"letters must use each of {', '.join(specs) or 'no specs'}, "
                         f"got {letters!r}")  # fmt: skip
    return tuple(specs[letter] for letter in letters)

# %%
class RollingCache(SelfAttentionCache):
    """Keys and values of the last W - 1 tokens, for one layer with a window of W.

    The store `(kept, 2, N, K, d)` has no spare room. Its rows are in the order of time, and the
    last new key is the last, which is what `Mask` expects. `length` counts all tokens read.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.keep = window - 1

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values kept so far and those of `source` `(N, T, D)`; keep the last.

        `(N, K, kept + T, d)` each, and their positions.

        Raises ValueError for another number of rows N than before.
        """
        k, v = (x.detach().permute(2, 0, 1, 3) for x in project(source))
        new = torch.stack((k, v), dim=1)  # (T, 2, N, K, d)
        if self._store is not None:
            if self._store.shape[2] != new.shape[2]:
                raise ValueError(f"source must have the cache's {self._store.shape[2]} rows, "
                                 f"got {len(source)}")  # fmt: skip
            new = torch.cat((self._store, new))
        first = max(0, len(new) - self.keep)
        self._store = new[first:].clone()  # a copy, so that the rest can be freed
        self.length += len(k)
        if positions is not None:
            if self._positions is not None:
                positions = torch.cat((self._positions, positions), dim=1)
            self._positions = positions[:, first:].clone()
        keys, values = new.permute(1, 2, 3, 0, 4)  # (N, K, kept + T, d) each
        return keys, values, positions

    def reorder(self, index: Tensor, start: int = 0) -> None:
        """Row i becomes what row `index[i]` was; rows that are not named are dropped."""
        if self._store is not None:
            self._store = self._store.index_select(2, index)
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[index]


class WindowCache(Cache):
    """A `Cache` that drops the keys that no later query can see.

    A layer with a window of W keeps the last W - 1 tokens, a layer without one keeps all. Where
    `padding` is given as well, decode inside `attending(model, "self", to_last_keys)`.

    Args:
        model: has a decoder; the cache is empty, and holds nothing of the model.

    Raises:
        ValueError: a model without a decoder.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        assert model.config.decoder is not None
        for i, layer in enumerate(self._layers):
            part = tiled(model.config.decoder.self_attention, i)
            window = None if part is None else part.kwargs["window"]
            if window is not None:
                layer.self_attention = RollingCache(window)


def to_last_keys(attend: Attend) -> Attend:
    """`attend` for a cache that may hold fewer keys than `padding` covers: the last ones."""

    def attend_to_last(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **rest: Any
    ) -> Tensor:
        if mask is not None:
            S = k.shape[2]
            padding = None if mask.padding is None else mask.padding[:, -S:]
            allowed = None if mask.allowed is None else mask.allowed[..., -S:]
            mask = Mask(causal=mask.causal, padding=padding, window=mask.window, allowed=allowed)
        return attend(q, k, v, mask, **rest)

    return attend_to_last
