# %% [markdown]
r"""
# RoPE

Queries and keys are turned, pair by pair, by an angle that grows with their position. A score then depends on the
distance between two words and not on where in the text they stand.
"""

# %%
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_annotated.paper.embedding import frequencies
from transformer_annotated.paper.parts import Spec, check_sizes, spec

# %%
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of `x` `(..., r)` by the angle whose `cos` and `sin` are `(..., r/2)`.

    Pair i is the numbers i and i + r/2 (the halves layout), or 2i and 2i + 1 if `interleaved`.
    """
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        partner = x.roll(x.shape[-1] // 2, dims=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return (x * cos + partner * sin).to(x.dtype)

# %%
class Scaling(Protocol):
    """A rule that changes the frequencies, for texts longer than those of training."""

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies in radians a position, and a factor on cosines and sines.

        Args:
            head_dim: how many numbers of a head are turned, r.
            base: the base of the frequencies before scaling.
            length: `(B, 1)`, one more than the largest position of each row.

        Returns:
            Frequencies `(r/2,)`, or `(B, 1, r/2)` where they depend on `length`; and the factor.
        """
        ...

# %%
class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, section 3.4.2).

    Pair i of a query or key at position p is turned by the angle p base^(-2i / r). Nothing is
    learned. Angles are computed in at least 32 bits, whatever the model's dtype.

    Args:
        head_dim: numbers in one head, d.
        base: the longest wavelength is nearly 2 pi base positions.
        rotary_dim: how many numbers of a head, its first, are turned: r; None for all.
        interleaved: whether a pair is two neighbours (the paper, GPT-J) or numbers r/2 apart
            (GPT-NeoX, Llama's checkpoints at Hugging Face).
        scaling: spec of a `Scaling`; None leaves the frequencies alone.

    Raises:
        ValueError: a `head_dim` or `rotary_dim` that is odd or below 1, a `rotary_dim` above
            `head_dim`, or a `base` not above 1.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: Spec[Any] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(head_dim=head_dim, rotary_dim=rotary_dim)
        name, r = ("head_dim", head_dim) if rotary_dim is None else ("rotary_dim", rotary_dim)
        if r % 2:
            raise ValueError(f"{name} must be even, for pairs, got {r}")
        if r > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim, got {r} and {head_dim}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.head_dim, self.rotary_dim = head_dim, r
        self.base, self.interleaved = base, interleaved
        self.scaling: Scaling | None = None if scaling is None else scaling()

    def frequencies(self, positions: Tensor, key_positions: Tensor) -> tuple[Tensor, float]:
        """Radians a position for each pair, and the factor on cosines and sines."""
        if self.scaling is None:
            return frequencies(self.rotary_dim, self.base, positions.device), 1.0
        longest = (p.amax(dim=-1, keepdim=True) for p in (positions, key_positions))
        return self.scaling(self.rotary_dim, self.base, torch.maximum(*longest) + 1)

    def turn(self, x: Tensor, positions: Tensor, omega: Tensor, factor: float = 1.0) -> Tensor:
        """`x` `(B, H, T, d)` with its first `rotary_dim` numbers turned by positions times omega."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = (positions[..., None].to(dtype) * omega.to(dtype))[:, None]  # (B, 1, T, r/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self.rotary_dim == self.head_dim:
            return rotate(x, cos, sin, self.interleaved)
        first, rest = x.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
        return torch.cat((rotate(first, cos, sin, self.interleaved), rest), dim=-1)

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None, key_positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by where they stand.

        Args:
            q, k: `(B, H, T, d)` and `(B, K, S, d)`.
            positions, key_positions: `(B, T)` and `(B, S)`, or one row `(1, T)`, `(1, S)`.

        Raises ValueError for positions that are missing or not as many as the vectors.
        """
        here, there = places("positions", positions, q), places("key_positions", key_positions, k)
        omega, factor = self.frequencies(here, there)
        return self.turn(q, here, omega, factor), self.turn(k, there, omega, factor)


def places(name: str, positions: Tensor | None, x: Tensor) -> Tensor:
    """`positions`, after checking that there is one for each vector of `x` `(B, H, T, d)`."""
    if positions is None:
        raise ValueError(f"{name} must be given: RoPE turns vectors by their positions, got None")
    if positions.shape not in ((x.shape[0], x.shape[2]), (1, x.shape[2])):
        raise ValueError(
            f"{name} must be {(x.shape[0], x.shape[2])} or {(1, x.shape[2])}, "
            f"got {tuple(positions.shape)}"
        )
    return positions

# %%
def halves_order(head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """The rows of an interleaved head in the order of the halves layout: `(d,)`.

    With `W` the rows of `q_proj` or `k_proj` that make one head, `W[order]` makes the same head
    for the other layout: pair (2i, 2i + 1) moves to (i, i + r/2). `order.argsort()` leads back.
    """
    r = head_dim if rotary_dim is None else rotary_dim
    return torch.cat((torch.arange(0, r, 2), torch.arange(1, r, 2), torch.arange(r, head_dim)))

# %%
ROPE = {"self_attention.position": spec(RoPE), "embedding.position": None}
