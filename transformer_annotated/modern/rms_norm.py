# %% [markdown]
r"""
# RMSNorm and QK-norm

Layer normalisation without its mean and without its shift, and the same small norm put on the queries and keys of
attention, where it keeps the scores within a bound.
"""

# %%
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.parts import check_sizes, spec

# %%
class RMSNorm(nn.Module):
    """Root mean square normalisation (Zhang & Sennrich 2019, equation 4).

    Args:
        d_model: width D of the vectors to normalise.
        eps: added to the mean square, inside the root.
        offset: added to the learned weight, which starts at `1 - offset`; Gemma has 1.

    Raises:
        ValueError: `d_model` below 1 or `eps` not above 0.
    """

    def __init__(self, d_model: int, eps: float = 1e-6, offset: float = 0.0) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.full((d_model,), 1.0 - offset))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`; computed in at least 32-bit precision, rounded once."""
        weight = self.offset + self.weight
        if x.is_cuda:  # there PyTorch has one fused operation for it
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps).to(x.dtype)
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(length.square() / x.shape[-1] + self.eps)
        return (x * inverse * weight).to(x.dtype)

# %%
RMS_NORM = {"norm": spec(RMSNorm)}
QK_NORM = {"self_attention.qk_norm": spec(RMSNorm)}
