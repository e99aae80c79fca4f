# %% [markdown]
r"""
# Biases instead of positions: ALiBi and T5

Add a number to each score that depends on the distance alone: fixed slopes, or a small learned table. Then test five schemes
on texts eight times as long as those they were trained on.
"""

# %%
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.parts import check_sizes, spec

# %%
def alibi_slopes(n_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slope of each head: `(H,)`, in 32 bits in any model (Press et al. 2022, section 3).

    For a power of two, 2^(-8/H), 2^(-16/H), ..., 2^-8. For another H, the slopes of the power of
    two below it, and then every other slope of the power of two above it.

    Raises ValueError for `n_heads` below 1.
    """
    check_sizes(n_heads=n_heads)
    n = 1 << (n_heads.bit_length() - 1)  # the power of two at or below H
    whole = torch.arange(1, n + 1, device=device) * (-8 / n)
    between = (2 * torch.arange(n_heads - n, device=device) + 1) * (-8 / (2 * n))
    return torch.exp2(torch.cat((whole, between)))


# %%
def distances(positions: Tensor, key_positions: Tensor) -> Tensor:
    """Key minus query, j - i, for each pair: `(B|1, T)` and `(B|1, S)` to `(B|1, T, S)`."""
    return key_positions[:, None, :] - positions[:, :, None]


def told(positions: Tensor | None, key_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both, unchanged; raise ValueError if one is missing, for a bias is a function of them."""
    if positions is None or key_positions is None:
        name = "positions" if positions is None else "key_positions"
        raise ValueError(f"{name} must be given where there is a bias, got None")
    return positions, key_positions


# %%
@dataclass(frozen=True, eq=False)
class LinearBias:
    """ALiBi's bias, not yet a tensor: what a kernel needs to compute it block by block.

    Attributes:
        slopes: `(H,)`.
        positions, key_positions: `(B, T)` or `(1, T)`, and `(B, S)` or `(1, S)`.
    """

    slopes: Tensor
    positions: Tensor
    key_positions: Tensor

    def dense(self) -> Tensor:
        """-slope |i - j|: `(B|1, H, T, S)`."""
        steps = distances(self.positions, self.key_positions).abs()  # (B|1, T, S)
        return -self.slopes[:, None, None] * steps[:, None]


class ALiBi(nn.Module):
    """Attention with linear biases: a fixed penalty on distance (Press et al. 2022).

    Nothing is learned, and there is no longest position. Under a causal mask this is the published
    form; in an encoder it is the same on both sides.

    Raises ValueError for `n_heads` below 1.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads)
        self.n_heads = n_heads

    def forward(self, positions: Tensor | None, key_positions: Tensor | None) -> LinearBias:
        """Positions of queries `(B|1, T)` and keys `(B|1, S)` to the bias of their scores."""
        queries, keys = told(positions, key_positions)
        return LinearBias(alibi_slopes(self.n_heads, queries.device), queries, keys)


# %%
def t5_bucket(
    distance: Tensor, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """The bucket of each distance j - i: integers of the same shape (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each, the other half grow by a constant factor up to
    `max_distance`; the last takes all beyond. A bidirectional bias has such a row for each side,
    keys behind first; a one-sided one puts every key ahead into bucket 0.
    """
    side = torch.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        side = (distance > 0) * n_buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = n_buckets // 2
    growth = (steps.clamp(min=exact) / exact).log() / math.log(max_distance / exact)
    coarse = exact + (growth * (n_buckets - exact)).long()
    return side + torch.where(steps < exact, steps, coarse.clamp(max=n_buckets - 1))


# %%
@dataclass(frozen=True, eq=False)
class BucketBias:
    """T5's bias, not yet a tensor.

    Attributes:
        table: `(n_buckets, H)`, the learned numbers.
        positions, key_positions: `(B, T)` or `(1, T)`, and `(B, S)` or `(1, S)`.
        max_distance, bidirectional: the arguments of `t5_bucket`.
    """

    table: Tensor
    positions: Tensor
    key_positions: Tensor
    max_distance: int
    bidirectional: bool

    def dense(self) -> Tensor:
        """The number of each pair's bucket: `(B|1, H, T, S)`."""
        distance = distances(self.positions, self.key_positions)  # (B|1, T, S)
        bucket = t5_bucket(distance, len(self.table), self.max_distance, self.bidirectional)
        return F.embedding(bucket, self.table).permute(0, 3, 1, 2)


class T5Bias(nn.Module):
    """A learned number for each head and each bucket of distances (Raffel et al. 2020, 2.1).

    One table serves all layers of a stack. It starts at zero: no distance is preferred.

    Args:
        n_heads: number of heads H.
        n_buckets: rows of the table.
        max_distance: all distances from here on share a bucket.
        bidirectional: whether keys ahead have buckets of their own; False in a decoder.

    Raises:
        ValueError: `n_heads` below 1, fewer than two buckets a side, an odd number of them for
            two sides, or a `max_distance` within the distances that have a bucket each.
    """

    def __init__(
        self,
        n_heads: int,
        *,
        n_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads, n_buckets=n_buckets, max_distance=max_distance)
        sides = 2 if bidirectional else 1
        if n_buckets % sides or n_buckets < 2 * sides:
            raise ValueError(f"n_buckets must be {'even and ' if bidirectional else ''}at least "
                             f"{2 * sides}, got {n_buckets}")  # fmt: skip
        if max_distance <= (exact := n_buckets // sides // 2):
            raise ValueError(f"max_distance must be above {exact}, the distances that have a "
                             f"bucket each, got {max_distance}")  # fmt: skip
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.table = nn.Embedding(n_buckets, n_heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, positions: Tensor | None, key_positions: Tensor | None) -> BucketBias:
        """Positions of queries `(B|1, T)` and keys `(B|1, S)` to the bias of their scores."""
        queries, keys = told(positions, key_positions)
        return BucketBias(self.table.weight, queries, keys, self.max_distance, self.bidirectional)


# %%
class LearnedPositions(nn.Module):
    """A learned vector for each position (Gehring et al. 2017; GPT, BERT).

    Args:
        d_model: width D.
        max_len: number of positions that have a vector.
        offset: position p reads row p + offset; 2 in the published weights of BART and OPT.

    Raises:
        ValueError: a size below 1, an `offset` below 0, or, when called, a position of `max_len`
            or more. A GPU and a compiled model check the length of the input only.
    """

    def __init__(self, d_model: int, max_len: int = 512, offset: int = 0) -> None:
        super().__init__()
        check_sizes(d_model=d_model, max_len=max_len)
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise ValueError(f"offset must be a whole number of at least 0, got {offset!r}")
        self.max_len, self.offset = max_len, offset
        self.table = nn.Embedding(max_len + offset, d_model)
        nn.init.normal_(self.table.weight, std=0.5**0.5)  # as large as the clock's vectors

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` to vectors `(B, T, D)`."""
        longest = positions.shape[1]
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            longest = max(longest, int(positions.max()) + 1)
        if longest > self.max_len:
            raise ValueError(f"positions must lie below max_len={self.max_len}, got {longest - 1}")
        return self.table(positions + self.offset)


# %%
ALIBI = {"bias": spec(ALiBi), "embedding.position": None}
T5_BIAS = {
    "bias": spec(T5Bias),
    "decoder.bias.bidirectional": False,
    "embedding.position": None,
}
