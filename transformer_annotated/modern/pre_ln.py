# %% [markdown]
r"""
# Pre-LN and the final norm

The norm moves from behind the addition to the front of the sub-layer. One line changes, deep models become easy to
train, and one more norm is needed at the end of each stack.
"""

# %%
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec
from transformer_annotated.paper.transformer import Stack
from transformer_annotated.training.schedule import check_positive
from transformer_annotated.training.speed import FastDropout

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %%
class PreNorm(nn.Module):
    """The residual of pre-LN: `x + dropout(sublayer(norm(x)))` (Xiong et al. 2020, figure 1b).

    Its parameters have the names of `PostNorm`'s, so weights can be carried over.

    Args:
        d_model: width D.
        norm: spec of the norm.
        dropout: probability of dropping an element of the sub-layer's output in training.

    Raises:
        ValueError: a dropout outside [0, 1).
    """

    def __init__(self, d_model: int, norm: Spec[nn.Module], dropout: float) -> None:
        super().__init__()
        check_rate("dropout", dropout)
        self.norm = norm(d_model=d_model)
        self.dropout = FastDropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return x + self.dropout(sublayer(self.norm(x)))


PRE_LN = {"residual": spec(PreNorm), "final_norm": True}

# %%
class SandwichNorm(PreNorm):
    """A norm on both sides of the sub-layer: `x + dropout(norm_out(sublayer(norm(x))))`.

    CogView (Ding et al. 2021, section 2.3) and Gemma 2 (2024, section 2) have it. `norm_out` is
    the only parameter that `PreNorm` lacks. The arguments are those of `PreNorm`.
    """

    def __init__(self, d_model: int, norm: Spec[nn.Module], dropout: float) -> None:
        super().__init__(d_model, norm, dropout)
        self.norm_out = norm(d_model=d_model)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return x + self.dropout(self.norm_out(sublayer(self.norm(x))))


class DeepNorm(PreNorm):
    """Post-LN with a heavier direct way: `norm(alpha * x + dropout(sublayer(x)))` (Wang et al. 2022).

    With `alpha` 1 it is the paper's frame. The other arguments are those of `PreNorm`.

    Raises:
        ValueError: a dropout outside [0, 1), or an alpha that is not above 0.
    """

    def __init__(
        self, d_model: int, norm: Spec[nn.Module], dropout: float, *, alpha: float = 1.0
    ) -> None:
        check_positive("alpha", alpha)
        super().__init__(d_model, norm, dropout)
        self.alpha = alpha

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return self.norm(self.alpha * x + self.dropout(sublayer(x)))

# %%
def deepnorm_constants(
    encoder: int | None = None, decoder: int | None = None
) -> dict[str, tuple[float, float]]:
    """DeepNorm's alpha and beta for each stack, given the depths (Wang et al. 2022, figure 2).

    One stack alone, N layers: (2N)^(1/4) and (8N)^(-1/4). An encoder of N and a decoder of M
    layers: 0.81 (N^4 M)^(1/16) and 0.87 (N^4 M)^(-1/16); (3M)^(1/4) and (12M)^(-1/4).

    Raises ValueError for a depth below 1, or none at all.
    """
    check_sizes(encoder=encoder, decoder=decoder)
    if encoder is None and decoder is None:
        raise ValueError("encoder and decoder are both None: at least one depth must be given")
    if encoder is None or decoder is None:
        depth = encoder or decoder or 1
        name = "decoder" if encoder is None else "encoder"
        return {name: ((2 * depth) ** 0.25, (8 * depth) ** -0.25)}
    both = encoder**4 * decoder
    return {
        "encoder": (0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)),
        "decoder": ((3 * decoder) ** 0.25, (12 * decoder) ** -0.25),
    }


@torch.no_grad()
def deepnorm_init(model: nn.Module, beta: float) -> None:
    """Multiply the weights of each feed-forward network, `v_proj` and `out_proj` by `beta`, in place.

    Call it once, on a fresh model or on one of its stacks: fresh weights are Glorot's, and the
    product is Glorot's with gain `beta` (Wang et al. 2022, figure 2).

    Raises ValueError for a `beta` that is not above 0, or a model without such weights.
    """
    check_positive("beta", beta)
    chosen = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and {"ffn", "v_proj", "out_proj"} & set(name.split("."))
    ]
    if not chosen:
        raise ValueError("model must hold a feed-forward network or an attention, got neither")
    for linear in chosen:
        linear.weight.mul_(beta)

# %%
@torch.no_grad()
def stream_sizes(stack: Stack, x: Tensor) -> list[float]:
    """The standard deviation of the vectors that enter a stack `(B, T, D)` and leave each layer.

    There is no final norm in it. Entry 0 belongs to `x`, entry n to layer n. For a stack without
    cross-attention.
    """
    sizes = [x.std(correction=0).item()]
    handles = [
        layer.register_forward_hook(
            lambda module, args, out: sizes.append(out.std(correction=0).item())
        )
        for layer in stack.layers
    ]
    try:
        stack(x)
    finally:
        for handle in handles:
            handle.remove()
    return sizes
