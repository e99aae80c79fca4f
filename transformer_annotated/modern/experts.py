# %% [markdown]
r"""
# Mixture of experts

Many feed-forward networks in the place of one, and a router that sends each token to a few of them: more parameters, the same work for a
token.
"""

# %%
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.feed_forward import FeedForward
from transformer_annotated.paper.parts import Spec, check_sizes, spec
from transformer_annotated.paper.toy import Batch
from transformer_annotated.paper.transformer import Config, Transformer
from transformer_annotated.training.objective import LossSum, Objective

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %%
def route(logits: Tensor, top_k: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Logits `(..., E)` to the weights and the numbers of the chosen experts, both `(..., k)`.

    Best expert first; computed in at least 32-bit precision.

    Args:
        logits: what the router says.
        top_k: how many experts each token gets.
        renormalise: whether the softmax runs over the chosen logits alone, so that weights sum to
            one (Jiang et al. 2024, section 2.1), or over all of them (Fedus et al. 2021).
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    best, chosen = wide.topk(top_k, dim=-1)
    total = (best if renormalise else wide).logsumexp(dim=-1, keepdim=True)
    return (best - total).exp(), chosen

# %%
class MixtureOfExperts(nn.Module):
    """Many feed-forward networks, of which each token passes through `top_k` (Shazeer et al. 2017).

    Args:
        d_model: width D of the input and the output.
        n_experts: number E of networks.
        top_k: how many of them a token reads.
        expert: spec of one network, from `(n, D)` to `(n, D)`.
        renormalise: whether a token's weights sum to one (`route`). With `top_k=1` they are then
            1, and the loss does not teach the router: Switch Transformers take False.
        capacity: None, or the most choices that an expert takes from a call, as a multiple of an
            even share (`within_capacity`); a choice beyond that adds nothing to its token.

    Raises:
        ValueError: a size below 1, `top_k` above `n_experts`, or a capacity not above 0.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int = 8,
        top_k: int = 2,
        *,
        expert: Spec[nn.Module] = spec(FeedForward, d_ff=2048),
        renormalise: bool = True,
        capacity: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_experts=n_experts, top_k=top_k)
        if top_k > n_experts:
            raise ValueError(f"top_k must be at most n_experts, got {top_k} and {n_experts}")
        if capacity is not None and not 0 < capacity < math.inf:
            raise ValueError(f"capacity must be None or above 0 and finite, got {capacity!r}")
        self.top_k, self.renormalise, self.capacity = top_k, renormalise, capacity
        self.router = nn.Linear(d_model, n_experts, bias=False)
        self.experts = nn.ModuleList(expert(d_model=d_model) for _ in range(n_experts))

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        weights, chosen = route(self.router(x), self.top_k, self.renormalise)  # (..., k)
        rows, weights, chosen = x.flatten(0, -2), weights.flatten(0, -2), chosen.flatten(0, -2)
        if self.capacity is not None:
            weights = weights * within_capacity(chosen, len(self.experts), self.capacity)
        gates = weights.new_zeros(len(rows), len(self.experts)).scatter(1, chosen, weights)
        y = torch.zeros_like(rows)
        for e, expert in enumerate(self.experts):
            mine = readers(gates[:, e])  # the tokens of expert e
            y = y.index_add(0, mine, (gates[mine, e, None] * expert(rows[mine])).to(y.dtype))
        return y.view_as(x)


def readers(gate: Tensor) -> Tensor:
    """Which tokens must pass an expert, given their weights `(n,)` for it: those above zero.

    `torch.compile` wants shapes that do not depend on the data. There all tokens pass, and the
    weights of zero do the rest: the same result, for more work.
    """
    if torch.compiler.is_compiling():
        return torch.arange(len(gate), device=gate.device)
    return gate.nonzero()[:, 0]

# %%
def within_capacity(chosen: Tensor, n_experts: int, capacity: float) -> Tensor:
    """Which choices `(n, k)` find a place: bool `(n, k)`.

    An expert has `ceil(capacity * n * k / n_experts)` places. All first choices are served before
    the second ones, and among those the tokens in their order (Lepikhin et al. 2020, algorithm 1).
    """
    n, k = chosen.shape
    places = math.ceil(capacity * n * k / n_experts - 1e-9)  # 1.1 * 10 is a little above 11
    queue = F.one_hot(chosen.T.flatten(), n_experts)  # (k n, E): first choices, then second ones
    turn = (queue.cumsum(dim=0) * queue).sum(dim=-1)  # 1 for whoever comes first to its expert
    return (turn <= places).view(k, n).T

# %%
def mixture_of_experts(
    n_experts: int,
    top_k: int,
    *,
    expert: Spec[nn.Module] = spec(FeedForward, d_ff=2048),
    renormalise: bool = True,
    capacity: float | None = None,
) -> dict[str, Any]:
    """The patch that puts a `MixtureOfExperts` in place of every feed-forward network."""
    mixture = spec(
        MixtureOfExperts, n_experts=n_experts, top_k=top_k, expert=expert,
        renormalise=renormalise, capacity=capacity,
    )  # fmt: skip
    return {"ffn": mixture}


def active_parameters(config: Config) -> int:
    """How many parameters a token meets: all, but of each layer's experts only `top_k`.

    The whole model has `count_parameters(config)["total"]`.
    """
    with torch.device("meta"):
        model = Transformer(config)
    idle = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            one = sum(p.numel() for p in module.experts[0].parameters())
            idle += (len(module.experts) - module.top_k) * one
    return sum(p.numel() for p in model.parameters()) - idle

# %%
def balance_loss(logits: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (share of the choices) times (mean probability).

    1 when all experts get equal shares, and up to E when one gets everything (Fedus et al. 2021,
    equation 4; for k above 1 the shares are of the k choices of all tokens, so they sum to one).

    Args:
        logits: `(..., E)`, the router's answers. The gradient flows through these alone.
        chosen: `(..., k)`, the experts that were chosen.
        real: bool `(...)`, True for the tokens that count; None if all do.
    """
    n_experts = logits.shape[-1]
    count = torch.ones_like(chosen[..., 0], dtype=torch.bool) if real is None else real
    shares = F.one_hot(chosen[count], n_experts).float().mean(dim=(0, 1))  # f, (E,)
    means = logits[count].float().softmax(dim=-1).mean(dim=0)  # P, (E,)
    return n_experts * (shares * means).sum()


def router_z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of the squared log-sum-exp of the logits `(..., E)` (Zoph et al. 2022, equation 5)."""
    squares = logits.float().logsumexp(dim=-1).square()
    return squares.mean() if real is None else squares[real].mean()

# %%
class Routing(NamedTuple):
    """What one router said: `logits` `(B, T, E)`, `weights` and `chosen` `(B, T, k)`."""

    logits: Tensor
    weights: Tensor
    chosen: Tensor


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Inside `with record_routing(model) as routings:`, keep what each router said.

    `routings[name]` belongs to the `MixtureOfExperts` called `name`, before any capacity, and is
    part of the graph. A module that is called twice keeps its last answer.
    """
    routings: dict[str, Routing] = {}

    def watch(name: str, mixture: MixtureOfExperts) -> Any:
        def keep(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            routings[name] = Routing(logits, *route(logits, mixture.top_k, mixture.renormalise))

        return keep

    hooks = [
        module.router.register_forward_hook(watch(name, module))
        for name, module in model.named_modules()
        if isinstance(module, MixtureOfExperts)
    ]
    try:
        yield routings
    finally:
        for hook in hooks:
            hook.remove()

# %%
@dataclass(frozen=True)
class Balanced:
    """Another objective, plus the routers' two losses times the number of tokens.

    Each layer adds its own, as in Fedus et al. 2021, section 2.2. Filler counts in neither.

    Args:
        objective: what is balanced, `CrossEntropy()` say.
        weight: of `balance_loss`; 0.01 in Fedus et al. 2021.
        z_weight: of `router_z_loss`; 0.001 in Zoph et al. 2022.

    Raises ValueError for a weight below 0 or not finite.
    """

    objective: Objective
    weight: float = 0.01
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("weight", "z_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {getattr(self, name)}")

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """The objective's sums; its `nll` stays as it is."""
        with record_routing(model) as routings:
            part = self.objective(model, batch)
        extra = part.loss.new_zeros(())
        for name, (logits, _, chosen) in routings.items():
            real = batch.src_padding if name.startswith("encoder") else batch.tgt_padding
            real = real.repeat(len(logits) // len(real), 1)  # R-Drop sends each row twice
            extra = extra + self.weight * balance_loss(logits, chosen, real)
            extra = extra + self.z_weight * router_z_loss(logits, real)
        return LossSum(part.loss + part.tokens * extra, part.nll, part.tokens)
