# %% [markdown]
r"""
# Gated feed-forward

Smoother activations, and a feed-forward network whose hidden units are multiplied by a second set of units, compared with
the paper's ReLU at equal numbers of parameters.
"""

# %%
import math

from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec

# %%
class GatedFeedForward(nn.Module):
    """Gated feed-forward network (Shazeer 2020, equation 6): `down(activation(gate(x)) * up(x))`.

    Args:
        d_model: width D of the input and the output.
        d_ff: width F of the hidden layer; `matched_width` gives the one for equal parameters.
        activation: spec of the gate's non-linearity; SiLU makes SwiGLU, GELU makes GEGLU.
        bias: whether the three layers add a bias; production models have none.
        dropout: probability of dropping a hidden unit in training.

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int = 2048,
        *,
        activation: Spec[nn.Module] = spec(nn.SiLU),
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_ff=d_ff)
        check_rate("dropout", dropout)
        self.gate = nn.Linear(d_model, d_ff, bias=bias)  # W
        self.up = nn.Linear(d_model, d_ff, bias=bias)  # V
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(d_ff, d_model, bias=bias)  # W_2

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return self.down(self.dropout(self.activation(self.gate(x)) * self.up(x)))

# %%
def matched_width(d_ff: int, multiple: int = 8) -> int:
    """The width that gives three matrices the parameters of two of width `d_ff`.

    Two thirds of `d_ff`, rounded up to a multiple of `multiple` as Llama's code does it.
    Raises ValueError for a number below 1.
    """
    check_sizes(d_ff=d_ff, multiple=multiple)
    return multiple * math.ceil(2 * d_ff // 3 / multiple)

# %%
GELU = {"ffn.activation": spec(nn.GELU)}
SWIGLU = {"ffn": spec(GatedFeedForward, d_ff=matched_width(2048))}
GEGLU = {"ffn": spec(GatedFeedForward, d_ff=matched_width(2048), activation=spec(nn.GELU))}
