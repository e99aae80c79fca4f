# %% [markdown]
r"""
# Longer context

RoPE gives every position an angle, also positions that no training text reached. Five rules choose those angles again, so that
a model reads longer texts than it was trained on.
"""

# %%
import math

import torch
from torch import Tensor

from transformer_annotated.paper.embedding import frequencies
from transformer_annotated.paper.parts import Spec, check_sizes, patch, spec
from transformer_annotated.paper.transformer import Transformer

# %%
def check_factor(factor: float) -> None:
    """Raise ValueError for a factor by which a text cannot become longer."""
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1 <= factor < math.inf:
        raise ValueError(f"factor must be a finite number of at least 1, got {factor!r}")


class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`.

    Args:
        factor: how many times longer texts become, s.

    Raises:
        ValueError: a factor below 1.
    """

    def __init__(self, factor: float) -> None:
        check_factor(factor)
        self.factor = factor

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        return frequencies(head_dim, base, length.device) / self.factor, 1.0

# %%
def stretched_base(base: float, factor: float | Tensor, head_dim: int) -> float | Tensor:
    """The base whose slowest pair turns `factor` times more slowly than with `base`.

    Raises ValueError for a `head_dim` of 2: its only pair has frequency 1 with every base.
    """
    if head_dim < 4:
        raise ValueError(f"head_dim must be at least 4 to stretch the base, got {head_dim}")
    return base * factor ** (head_dim / (head_dim - 2))


class NTKScaling:
    """NTK-aware scaling (bloc97 2023): a larger base; the slowest pair alone gets the full factor.

    Args:
        factor: how many times more slowly the slowest pair turns, s.

    Raises:
        ValueError: a factor below 1; when called, a `head_dim` below 4.
    """

    def __init__(self, factor: float) -> None:
        check_factor(factor)
        self.factor = factor

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        larger = float(stretched_base(base, self.factor, head_dim))
        return frequencies(head_dim, larger, length.device), 1.0

# %%
def turns(omega: Tensor, length: int) -> Tensor:
    """How many full turns each pair makes within `length` positions: `length * omega / 2 pi`."""
    return length * omega / (2 * math.pi)


class YaRN:
    """YaRN (Peng et al. 2023, section 3): fast pairs stay, slow pairs are divided by `factor`.

    Between the two, over the pairs that make `beta_fast` to `beta_slow` turns within `original`
    positions, a linear ramp joins them. Cosines and sines are multiplied by `attention_factor`.

    Args:
        factor: how many times longer texts become, s.
        original: the length of the training texts, L.
        beta_fast, beta_slow: turns within L at the two ends of the ramp.
        attention_factor: None for the paper's 0.1 ln(s) + 1.

    Raises:
        ValueError: a factor below 1, a length below 1, an attention factor not above 0, or
            `beta_fast` not above `beta_slow`, or that not above 0.
    """

    def __init__(
        self,
        factor: float,
        original: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
    ) -> None:
        check_factor(factor)
        check_sizes(original=original)
        if not beta_fast > beta_slow > 0:
            raise ValueError(
                f"beta_fast must be above beta_slow, and that above 0; got {beta_fast}, {beta_slow}"
            )
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1
        if not attention_factor > 0:
            raise ValueError(f"attention_factor must be above 0, got {attention_factor}")
        self.factor, self.original = factor, original
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.attention_factor = attention_factor

    def pair(self, n_turns: float, head_dim: int, base: float) -> float:
        """Which pair (a fraction, counted from 0) makes so many turns within `original`."""
        ratio = self.original / (2 * math.pi * n_turns)
        return head_dim * math.log(ratio) / (2 * math.log(base))

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)`, and the factor on cosines and sines; `length` is not used."""
        omega = frequencies(head_dim, base, length.device)
        low = max(math.floor(self.pair(self.beta_fast, head_dim, base)), 0)
        high = min(math.ceil(self.pair(self.beta_slow, head_dim, base)), head_dim - 1)
        i = torch.arange(head_dim // 2, device=length.device)
        stretched = ((i - low) / (high - low or 0.001)).clamp(0, 1)  # 0: as it was, 1: divided
        return omega * (1 - stretched + stretched / self.factor), self.attention_factor

# %%
class Llama3Scaling:
    """Llama 3.1's rule: pairs with fewer than `low` turns are divided, with more than `high` kept.

    Between the two the share that is kept grows linearly with the number of turns.

    Args:
        factor: what slow frequencies are divided by, s; 8 in Llama 3.1.
        original: the length of the texts before the extension, L; 8192 in Llama 3.1.
        low, high: turns within L below which a pair is slow, and above which it is fast.

    Raises:
        ValueError: a factor below 1, a length below 1, or `low` not in (0, `high`).
    """

    def __init__(self, factor: float, original: int, low: float = 1.0, high: float = 4.0) -> None:
        check_factor(factor)
        check_sizes(original=original)
        if not high > low > 0:
            raise ValueError(f"low must be above 0 and below high; got {low} and high {high}")
        self.factor, self.original, self.low, self.high = factor, original, low, high

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        omega = frequencies(head_dim, base, length.device)
        kept = (turns(omega, self.original) - self.low) / (self.high - self.low)
        kept = kept.clamp(0, 1)
        return omega * (kept + (1 - kept) / self.factor), 1.0

# %%
class DynamicNTK:
    """NTK-aware scaling by the length at hand: none up to `original`, more with each token after.

    Args:
        factor: the growth s; a text of n > L tokens is stretched by s n / L - (s - 1).
        original: the length of the training texts, L.

    Raises:
        ValueError: a factor below 1 or a length below 1; when called, a `head_dim` below 4.
    """

    def __init__(self, factor: float, original: int) -> None:
        check_factor(factor)
        check_sizes(original=original)
        self.factor, self.original = factor, original

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(B, 1, d/2)`, each row's by its own `length` `(B, 1)`; and the factor 1."""
        grown = (self.factor * length / self.original - (self.factor - 1)).clamp(min=1)
        larger = torch.as_tensor(stretched_base(base, grown, head_dim))  # (B, 1)
        exponents = torch.arange(0, head_dim, 2, device=length.device) / head_dim
        return larger[..., None] ** -exponents, 1.0

    def at(self, length: int) -> Spec[NTKScaling]:
        """The rule for texts of `length` tokens, with a factor that no longer changes.

        A text that is written with a cache needs it: choose the length before the first token.
        """
        check_sizes(length=length)
        grown = max(self.factor * length / self.original - (self.factor - 1), 1.0)
        return spec(NTKScaling, factor=grown)

# %%
def rescaled(model: Transformer, **changes: object) -> Transformer:
    """A copy of `model`, weights and all, whose RoPE has other arguments.

    Args:
        model: has RoPE in its self-attention.
        changes: arguments of `RoPE` that own no parameters, such as `scaling` or `base`.

    Raises:
        ValueError: no RoPE, or an argument it does not have.
    """
    changed = {f"self_attention.position.{name}": value for name, value in changes.items()}
    copy = Transformer(patch(model.config, changed))
    like = next(model.parameters())
    copy.to(like.device, like.dtype).load_state_dict(model.state_dict())
    return copy.train(model.training)
