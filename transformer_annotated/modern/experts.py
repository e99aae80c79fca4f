# %% [markdown]
r"""
# Mixture of experts

Many feed-forward networks in the place of one, and a router that sends each token to a few of them: more parameters, the
same work for a token.
"""

# %% [markdown]
# A feed-forward network that is eight times as wide does eight times the work for every token. Here is a way to have the parameters without most of the work, and what it costs instead.

# %% mystnb={"figure": {"caption": "Chapter 34 of Part III: many feed-forward networks, of which a token uses a few.", "name": "fig-map-experts"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The tenth, Experts, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(34);

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

# %% [markdown]
# The change to the config of 2017 is one path, `ffn`, in both stacks. Here for sixteen networks, of which a token uses two:

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, diff, mixture_of_experts, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, mixture_of_experts(16, 2))))

# %% [markdown]
# A spec prints only what is not the default; two used is the default.

# %% mystnb={"figure": {"caption": "One seam changes: the feed-forward network, in every layer.", "name": "fig-seams-experts"}, "image": {"alt": "The model with its seams. The two boxes of the feed-forward networks are coloured."}} tags=["active-ipynb"]
# figures.seams(["ffn"]);

# %% [markdown]
# ## One network, eight jobs
#
# Make a task with eight jobs in it. Vectors come from eight clouds, and each cloud has a matrix of its own. The right answer for a vector is that matrix times the vector's offset from the centre of its cloud. A network must find out which cloud it sees, and then do that cloud's job.

# %% tags=["active-ipynb"]
# from collections.abc import Callable
#
# import torch
#
# from transformer_annotated.book import scale
#
# full = scale() == "full"
# D, jobs = 16, 8
# generator = torch.Generator().manual_seed(0)
# centres = 2 * torch.randn(jobs, D, generator=generator)
# matrices = torch.randn(jobs, D, D, generator=generator) / 4
#
#
# def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
#     """n vectors, the right answers, and which job each one is."""
#     job = torch.randint(jobs, (n,), generator=generator)
#     delta = torch.randn(n, D, generator=generator)
#     return centres[job] + delta, torch.einsum("nij,nj->ni", matrices[job], delta), job

# %% [markdown]
# Train two networks of the paper's kind, one with 32 hidden units and one with 256. The error is a share of the answers' own size: 1 is as bad as saying zero.

# %% tags=["active-ipynb"]
# def squared_error(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
#     return (network(x) - y).square().mean()
#
#
# def fit(network: nn.Module, loss: Callable[..., Tensor] = squared_error) -> nn.Module:
#     """A few hundred steps of Adam, 256 new vectors each."""
#     generator = torch.Generator().manual_seed(1)
#     optimizer = torch.optim.Adam(network.parameters(), 3e-3)
#     for _ in range(600 if full else 20):
#         x, y, _ = sample(256, generator)
#         value = loss(network, x, y)
#         optimizer.zero_grad()
#         value.backward()
#         optimizer.step()
#     return network
#
#
# def error(network: nn.Module) -> float:
#     with torch.no_grad():
#         x, y, _ = sample(4000, torch.Generator().manual_seed(7))
#         return ((network(x) - y).square().mean() / y.square().mean()).item()

# %% tags=["active-ipynb", "nbval-ignore-output"]
# torch.manual_seed(0)
# for d_ff in (32, 256):
#     network = fit(FeedForward(D, d_ff))
#     print(f"{d_ff:3d} hidden units: error {error(network):.3f}")

# %% [markdown]
# The wide one is much better, and every vector pays for all of its units. That is more than a vector needs. It has one job. The units that serve the other seven jobs are computed for it, too.
#
# ## The idea in a picture
#
# Give each job its own small network, and let a vector pass through that one alone. Nobody tells the model what the jobs are. So a **router**, one matrix, gives each token a score for each network. The networks with the highest scores are used, and their outputs are mixed. Such a network is an **expert** {cite:p}`jacobs1991adaptive`. That a token uses few of many experts, so that the others cost it no work, is the step of {cite:t}`shazeer2017outrageously`.

# %% tags=["hide-input"]
def draw_routing(weights: Tensor, tokens: list[str]) -> "Figure":
    """Tokens below, experts above, and a line for each weight `(n, E)` above zero, as thick."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    n, n_experts = weights.shape
    figure, ax = plt.subplots(figsize=(6.4, 2.8))
    place = [e * (n - 1) / (n_experts - 1) for e in range(n_experts)]  # as wide as the tokens
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    for i, e in weights.nonzero().tolist():
        weight = weights[i, e].item()
        ax.plot([i, place[e]], [0, 1], color=COLORS[e], linewidth=7 * weight, alpha=0.8)
        ax.text(0.8 * i + 0.2 * place[e], 0.2, f"{weight:.1f}", ha="center", va="center",
                fontsize=8, bbox=white)  # fmt: skip
    for e, x in enumerate(place):
        box = {"boxstyle": "round", "facecolor": COLORS[e], "edgecolor": "none"}
        ax.text(x, 1.04, f"expert {e}", ha="center", color="white", bbox=box)
    for i, token in enumerate(tokens):
        ax.text(i, -0.04, token, ha="center", va="top")
    ax.set(xlim=(-0.5, n - 0.5), ylim=(-0.2, 1.2))
    ax.axis("off")
    return figure

# %% mystnb={"figure": {"caption": "Each token passes through two of four experts; the numbers weigh the two answers and sum to one.", "name": "fig-routing"}, "image": {"alt": "Five words in a row below, four boxes of experts above. Two lines lead from each word to two experts, as thick as their weights."}} tags=["active-ipynb"]
# sketch = [[0, 0.7, 0.3, 0], [0.6, 0, 0.4, 0], [0.8, 0, 0.2, 0], [0, 0.5, 0.5, 0], [0, 0, 0.1, 0.9]]
# draw_routing(torch.tensor(sketch), ["the", "dog", "sleeps", "on", "straw"]);

# %% [markdown]
# In {numref}`fig-routing` the word *dog* never meets experts 1 and 3. For that word they need not be computed.
#
# ## From scores to weights
#
# Four experts, and a token's scores for them are 2, 1, 0 and -1. Two are to be used. What do their answers weigh?

# %% tags=["active-ipynb"]
# scores = torch.tensor([2.0, 1.0, 0.0, -1.0])
# best, chosen = scores.topk(2)
# print("chosen:", chosen.tolist())
# print("softmax of the two chosen:  ", best.softmax(dim=0))
# print("softmax of all, then chosen:", scores.softmax(dim=0)[chosen])

# %% [markdown]
# Two conventions. In the first, the weights of a token sum to one, whatever the scores of the others are. {cite:t}`shazeer2017outrageously` and Mixtral {cite:p}`jiang2024mixtral` have it, and GShard {cite:p}`lepikhin2020gshard` arrives at the same numbers by division. In the second, what the others would have got is lost. Switch Transformers {cite:p}`fedus2021switch` and the first DeepSeekMoE {cite:p}`dai2024deepseekmoe` have that one. In letters: the router's matrix $W_r$ gives $E$ scores, $\mathcal{K}$ is the set of the $k$ highest, and
#
# $$
# y = \sum_{e \in \mathcal{K}} g_e \; \mathrm{FFN}_e(x), \qquad
# s = x W_r, \qquad
# g_e = \frac{\exp s_e}{\sum_{j \in \mathcal{K}} \exp s_j}
# $$ (eq-experts)
#
# The second convention lets $j$ run over all experts. In the code, that is one word in the line with `total`:

# %%
def widened(logits: Tensor) -> Tensor:
    """The same numbers in at least 32-bit precision."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def route(logits: Tensor, top_k: int, renormalise: bool = True) -> tuple[Tensor, Tensor]:
    """Logits `(..., E)` to the weights and the numbers of the chosen experts, both `(..., k)`.

    Best expert first; computed in at least 32-bit precision. (Under autocast the router's product,
    which comes before, is in 16 bits.)

    Args:
        logits: what the router says.
        top_k: how many experts each token gets.
        renormalise: whether the softmax runs over the chosen logits alone, so that weights sum to
            one (Jiang et al. 2024, section 2.1), or over all of them (Fedus et al. 2021).
    """
    wide = widened(logits)
    best, chosen = wide.topk(top_k, dim=-1)
    total = (best if renormalise else wide).logsumexp(dim=-1, keepdim=True)
    return (best - total).exp(), chosen

# %% [markdown]
# Now the mixture. Tokens are gathered by expert. Each expert gets its tokens as one small batch, and its answers are added to the rows they belong to. `gates` holds $g_e$, with zeros for the experts that were not chosen. (`capacity` is the subject of a later section. It is off.)

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
            even share (`within_capacity`); a choice beyond that adds nothing to its token, so
            the output of a token then depends on all tokens of the call, later ones too.

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
            y.index_add_(0, mine, (gates[mine, e, None] * expert(rows[mine])).to(y.dtype))
        return y.view_as(x)


def readers(gate: Tensor) -> Tensor:
    """Which tokens must pass an expert, given their weights `(n,)` for it: those above zero.

    `torch.compile` wants shapes that do not depend on the data. There all tokens pass, and the
    weights of zero do the rest: the same result, for more work, as long as no expert overflows on
    a token that is not its own (zero times infinity is not a number).
    """
    if torch.compiler.is_compiling():
        return torch.arange(len(gate), device=gate.device)
    return gate.nonzero()[:, 0]

# %% [markdown]
# The patch is a dictionary with one entry, and a function writes it:

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

# %% [markdown]
# A fresh one, with four experts, and five tokens:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# mixture = MixtureOfExperts(d_model=D, n_experts=4, top_k=2, expert=spec(FeedForward, d_ff=32))
# x = torch.randn(1, 5, D)
# weights, chosen = route(mixture.router(x), mixture.top_k)
# print("experts of the five tokens:", chosen[0].tolist())
# print("their weights:", [[round(w, 2) for w in pair] for pair in weights[0].tolist()])
# print(tuple(x.shape), "->", tuple(mixture(x).shape))

# %% [markdown]
# ## Proof
#
# The definition, token by token, with every parameter redrawn, in double precision. Output and every gradient, the router's too:

# %% tags=["active-ipynb"]
# def by_loop(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
#     """The weighted sum over the chosen experts, for one token at a time."""
#     rows = []
#     for row in x.flatten(0, -2):
#         s = [(w * row).sum() for w in mixture.router.weight]
#         best = sorted(range(len(s)), key=lambda e, s=s: -s[e].item())[: mixture.top_k]
#         total = sum(s[j].exp() for j in best)
#         rows.append(sum(s[e].exp() / total * mixture.experts[e](row) for e in best))
#     return torch.stack(rows).view_as(x)
#
#
# mixture = mixture.double()
# for parameter in mixture.parameters():
#     nn.init.normal_(parameter, std=0.5)
# x = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)
# direction = torch.randn(2, 6, D, dtype=torch.float64)
# ours, theirs = mixture(x), by_loop(mixture, x)
# torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
# wanted = [x, *mixture.parameters()]
# for a, b in zip(*(torch.autograd.grad(y, wanted, direction) for y in (ours, theirs)), strict=True):
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("output and", len(wanted), "gradients equal, to 1e-10")

# %% [markdown]
# One expert is the paper's network, bit by bit:

# %% tags=["active-ipynb"]
# x = torch.randn(2, 6, D)
# single = MixtureOfExperts(D, n_experts=1, top_k=1, expert=spec(FeedForward, d_ff=32))
# print("one expert equals FeedForward:", torch.equal(single(x), single.experts[0](x)))

# %% [markdown]
# The test suite also puts all experts to use, which is a plain softmax mixture, and copies the weights into Hugging Face's Mixtral block to compare output, gradients and balancing loss.
#
# ## A router that the loss does not teach
#
# With one expert a token, the two conventions part ways. Renormalised over one score, the weight is 1, always. It does not depend on the router. Look at the gradient:

# %% tags=["active-ipynb"]
# for renormalise in (True, False):
#     torch.manual_seed(0)
#     top_1 = MixtureOfExperts(D, 4, 1, expert=spec(FeedForward, d_ff=32), renormalise=renormalise)
#     top_1(x).square().sum().backward()
#     size = top_1.router.weight.grad.norm().item()
#     print(f"renormalise={renormalise!s:6s} length of the router's gradient {size:.1e}")

# %% [markdown]
# What is left in the first line is at most rounding. Without a balancing loss (a later section), such a router keeps its first random matrix. So top-1 mixtures multiply by the probability among all experts, as the Switch Transformer does. From here on, `renormalise=False` goes with `top_k=1`.
#
# ## Eight jobs, eight experts
#
# Back to the task. Eight experts of 32 units each; a vector uses one. To see who does what, count:

# %%
def shares(chosen: Tensor, n_experts: int) -> Tensor:
    """Which share of the choices `(..., k)` each expert got: `(E,)`, and they sum to one."""
    return F.one_hot(chosen.flatten(), n_experts).float().mean(dim=0)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# eight = {"n_experts": 8, "top_k": 1, "expert": spec(FeedForward, d_ff=32), "renormalise": False}
#
#
# def experts_of_jobs(network: MixtureOfExperts) -> Tensor:
#     """Which share of each job's vectors goes to each expert: `(jobs, E)`."""
#     x, _, job = sample(4000, torch.Generator().manual_seed(7))
#     with torch.no_grad():
#         _, chosen = route(network.router(x), 1)
#     return torch.stack([shares(chosen[job == j], 8) for j in range(jobs)])
#
#
# for renormalise in (True, False):
#     torch.manual_seed(0)
#     mixture = fit(MixtureOfExperts(D, **{**eight, "renormalise": renormalise}))
#     print(f"8 experts of 32 units, 1 used, renormalise={renormalise}: error {error(mixture):.3f}")
# print("the expert of each job:", experts_of_jobs(mixture).argmax(dim=1).tolist())

# %% [markdown]
# Compare with the two networks above. In the first line the router never learned. Its experts did, so the loss still fell, and nothing but the number tells that something is wrong. In the second line a vector meets 32 units and the router's eight scores, and the error is below that of 256 units. Nobody told the router what the jobs are. It found them, though not one each: look at the list. Some experts have two jobs, and some have none. We come back to that.
#
# ## What a token meets
#
# A mixture has two sizes: the parameters that exist, and the parameters that a token meets. The second are called **active**. A translator has two sides; we count what one token of each side meets.

# %%
def active_parameters(config: Config) -> int:
    """What one token of each side meets: all parameters, but of a layer's experts only `top_k`.

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

# %% [markdown]
# For the base model of the paper, with eight experts of the paper's size in each layer, and two used:

# %% tags=["active-ipynb"]
# from transformer_annotated import count_parameters
#
# configs = {
#     "paper": PAPER_BASE,
#     "8 experts, 1 used": patch(PAPER_BASE, mixture_of_experts(8, 1, renormalise=False)),
#     "8 experts, 2 used": patch(PAPER_BASE, mixture_of_experts(8, 2)),
#     "8 times as wide": patch(PAPER_BASE, {"ffn.d_ff": 8 * 2048}),
# }
# for name, config in configs.items():
#     total, active = count_parameters(config)["total"], active_parameters(config)
#     print(f"{name:18s} parameters {total / 1e6:6.1f} M   active {active / 1e6:6.1f} M")

# %% [markdown]
# Multiplications roughly follow the last column. Does time? One layer's network, forward and backward, for 1024 tokens:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from transformer_annotated.training.speed import race
#
# width, d_ff, n = (256, 512, 1024) if full else (16, 32, 32)
# one = spec(FeedForward, d_ff=d_ff)
# layers = {
#     "dense": FeedForward(width, d_ff),
#     "8 experts, 1 used": MixtureOfExperts(width, 8, 1, expert=one, renormalise=False),
#     "8 experts, 2 used": MixtureOfExperts(width, 8, 2, expert=one),
#     "8 times as wide": FeedForward(width, 8 * d_ff),
# }
# x = torch.randn(n, width)
# times = race({k: lambda m=m: m(x).sum().backward() for k, m in layers.items()}, 9 if full else 1)
# for name, seconds in times.items():
#     ratio = median(a / b for a, b in zip(seconds, times["dense"], strict=True))
#     print(f"{name:18s}{1e3 * median(seconds):7.1f} ms   {ratio:5.2f} times the dense layer")

# %% [markdown]
# Two experts used should cost twice the dense layer, and one expert the same. What is above that is the price of gathering: small batches instead of a large one, rows copied out and added back. And all eight experts must lie in memory, whether a token uses them or not. A mixture saves work. It does not save memory.
#
# ## Collapse
#
# The router and the experts learn together, and that has a trap. An expert that gets more tokens learns faster. So it gives better answers, so it gets more tokens {cite:p}`shazeer2017outrageously`. In the end a few experts may do all the work, while the others never learn.

# %%
class Routing(NamedTuple):
    """What one router said: `logits` `(..., E)`, and the experts `chosen` `(..., k)`, best first."""

    logits: Tensor
    chosen: Tensor


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, Routing]]:
    """Inside `with record_routing(model) as routings:`, keep what each router said.

    `routings[name]` belongs to the `MixtureOfExperts` called `name`, before any capacity, and is
    part of the graph. A module that is called twice keeps its last answer. A router that was
    compiled and called before is not seen: `torch.compile` overlooks hooks that come later.
    """
    routings: dict[str, Routing] = {}

    def watch(name: str, mixture: MixtureOfExperts) -> Any:
        def keep(module: nn.Module, inputs: Any, logits: Tensor) -> None:
            routings[name] = Routing(logits, route(logits, mixture.top_k)[1])

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

# %% [markdown]
# `record_routing` watches a model from outside, like `record_attention` in Chapter 4. It gives what each router said.
#
# To prevent the collapse, add a loss that is low when the load is even. The shares $f_e$ are counts. A count has no slope. So each is multiplied by something that has one: $P_e$, the mean probability that the router gives to expert $e$ {cite:p}`fedus2021switch`:
#
# $$
# \mathcal{L}_{\mathrm{balance}} = E \sum_{e=1}^{E} f_e \, P_e, \qquad
# f_e = \frac{\text{choices of } e}{n k}, \qquad
# P_e = \frac{1}{n} \sum_{i=1}^{n} \mathrm{softmax}(s_i)_e
# $$ (eq-balance)
#
# Its slope pushes down the probability of each expert in proportion to the load it has. With even shares the loss is 1, for any $k$, since $f$ is divided by $n k$ here. (Hugging Face leaves out the $k$, and gets $k$ instead of 1.)

# %%
def balance_loss(logits: Tensor, chosen: Tensor, real: Tensor | None = None) -> Tensor:
    """E times the sum over experts of (share of the choices) times (mean probability).

    1 when all experts get equal shares, and E / k when all tokens choose the same k and the router
    is sure of one of them (Fedus et al. 2021, equation 4; for k above 1 the shares are of the k
    choices of all tokens, so they sum to one). It can be a little below 1.

    Args:
        logits: `(..., E)`, the router's answers. The gradient flows through these alone.
        chosen: `(..., k)`, the experts that were chosen.
        real: bool `(...)`, True for the tokens that count; None if all do.
    """
    n_experts = logits.shape[-1]
    if real is not None:
        logits, chosen = logits[real], chosen[real]
    means = widened(logits).softmax(dim=-1).reshape(-1, n_experts).mean(dim=0)  # P, (E,)
    return n_experts * (shares(chosen, n_experts) * means).sum()

# %% tags=["active-ipynb"]
# logits = torch.zeros(8, 4)
# print("in turn, unsure:   ", balance_loss(logits, torch.arange(8)[:, None] % 4).item())
# logits[:, 2] = 5.0
# print("all to 2, nearly sure:", round(balance_loss(logits, torch.full((8, 1), 2)).item(), 3))

# %% [markdown]
# Send everything to the same $k$ experts and be sure of one: the loss is $E / k$, so $E$ for one expert used. It can also be a little below 1, when the probabilities are spread in another way than the choices.
#
# Try it on the eight jobs. The same start, the same vectors, and a tenth of the balancing loss, for several seeds:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def balanced_error(network: MixtureOfExperts, x: Tensor, y: Tensor) -> Tensor:
#     with record_routing(network) as routings:
#         value = squared_error(network, x, y)
#     logits, chosen = routings[""]  # the name of the module itself is the empty string
#     return value + 0.1 * balance_loss(logits, chosen)
#
#
# pairs = []
# for seed in range(4 if full else 1):
#     pair, line = [], f"seed {seed}"
#     for name, loss in {"without": squared_error, "with": balanced_error}.items():
#         torch.manual_seed(seed)
#         pair.append(fit(MixtureOfExperts(D, **eight), loss))
#         busy = len(experts_of_jobs(pair[-1]).argmax(dim=1).unique())
#         line += f"   {name}: {busy} experts have a job, error {error(pair[-1]):.3f}"
#     pairs.append(pair)
#     print(line)

# %% mystnb={"figure": {"caption": "One seed. Without a balancing loss some experts have two jobs and others none. With it, each has one.", "name": "fig-jobs"}, "image": {"alt": "Two heat maps of eight jobs and eight experts. Each row has one dark cell. In the left one some columns have two dark cells or none, in the right one each column has one."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), sharey=True)
# names = ("no balancing loss", "with it")
# for ax, name, network in zip(axes, names, pairs[0], strict=True):
#     table = experts_of_jobs(network)
#     figures.heatmap(ax, table, rows="01234567", cols="01234567", title=name, vmin=0, vmax=1)
#     ax.set_xlabel("expert")
# axes[0].set_ylabel("job");

# %% [markdown]
# In the left panel of {numref}`fig-jobs` some columns are empty: these experts were paid for and have no job. In the right panel every expert has one. The lines of the other seeds say how general that is: with the balancing loss at least as many experts have a job, and the error is mostly smaller, not always.
#
# A second loss keeps the scores themselves small, since a softmax of large scores is delicate in 16 bits: the **router z-loss**, the mean of $(\ln \sum_e \exp s_e)^2$ {cite:p}`zoph2022stmoe`.

# %%
def router_z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean of the squared log-sum-exp of the logits `(..., E)` (Zoph et al. 2022, equation 5)."""
    squares = widened(logits).logsumexp(dim=-1).square()
    return squares.mean() if real is None else squares[real].mean()

# %% [markdown]
# `Balanced` adds both to any objective of Chapter 15. The sum over layers is multiplied by the number of tokens, because objectives are sums. Filler does not count. One promise of Chapter 15 is lost: gradients that are accumulated over micro-batches no longer equal those of the whole batch. {eq}`eq-balance` multiplies two means, and the product of means over parts is another number.

# %%
@dataclass(frozen=True)
class Balanced:
    """Another objective, plus the routers' two losses times the number of tokens.

    Each layer adds its own, as in Fedus et al. 2021, section 2.2. Filler counts in neither. The
    balancing loss is a product of means over a batch, so `accumulate` over micro-batches is not
    exact with it.

    Args:
        objective: what is balanced, `CrossEntropy()` say.
        weight: of `balance_loss`; 0.01 in Fedus et al. 2021.
        z_weight: of `router_z_loss`; 0.001 in Zoph et al. 2022.

    Raises ValueError for a weight below 0 or not finite, and RuntimeError when called with a model
    in which some routers cannot be seen (`record_routing`).
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
        mixtures = sum(isinstance(module, MixtureOfExperts) for module in model.modules())
        if len(routings) != mixtures:
            seen = f"{len(routings)} of {mixtures} routers were seen"
            raise RuntimeError(f"{seen}: a layer was compiled and called before")
        extra = part.loss.new_zeros(())
        for name, (logits, chosen) in routings.items():
            real = batch.src_padding if "encoder" in name.split(".") else batch.tgt_padding
            real = real.repeat(len(logits) // len(real), 1)  # R-Drop sends each row twice
            extra = extra + self.weight * balance_loss(logits, chosen, real)
            extra = extra + self.z_weight * router_z_loss(logits, real)
        return LossSum(part.loss + part.tokens * extra, part.nll, part.tokens)

# %% tags=["active-ipynb"]
# from transformer_annotated import CrossEntropy, Transformer, collate
#
# SMALL = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "dropout": 0.0}
# HEADS = {"self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# torch.manual_seed(0)
# experts = mixture_of_experts(4, 2, expert=spec(FeedForward, d_ff=64))
# model = Transformer(patch(PAPER_BASE, SMALL, HEADS, experts))
# batch = collate([(torch.randint(4, 50, (n,)).tolist(),) * 2 for n in (5, 9, 3)])
# losses = []
# for objective in (CrossEntropy(), Balanced(CrossEntropy(), weight=0.01)):
#     part = objective(model, batch)
#     losses.append(part.loss.item() / part.tokens)
#     print(f"loss {losses[-1]:.4f}   nll {part.nll / part.tokens:.4f} a token")
# print(f"difference, by weight and layer: {(losses[1] - losses[0]) / 0.01 / 4:.2f}")

# %% [markdown]
# Four layers, a weight of 0.01: the last line is the balancing loss of a layer, the mean of four. Fresh routers are uneven, so it is above 1. `nll`, what is reported, is the same. (The loss has smoothed labels, so it may be below nll.)
#
# ## On text
#
# Now a language model (Chapter 25), with pre-LN (Chapter 26), so that few steps suffice. It reads Shakespeare by characters. Four models do the same number of multiplications in their feed-forward networks (the routers' few not counted): the dense one with $F = 256$; eight experts of 256, one used; eight experts of 128, two used; and the second again without the balancing loss. `train_language_model` takes a loss of our own:

# %% tags=["active-ipynb"]
# import time
#
# from transformer_annotated import PRE_LN, bits_per_byte, train_language_model
# from transformer_annotated.modern.language_model import Characters, any_text, language_model
# from transformer_annotated.modern.language_model import mean_loss as language_loss
#
# text = any_text()
# vocabulary = Characters(text.train + text.val + text.test)
# train_ids = torch.tensor(vocabulary.encode(text.train))
# val_ids = torch.tensor(vocabulary.encode(text.val)[: 10_000 if full else 500])
# LAYER = "decoder.layers.1.ffn"  # the upper of two
#
#
# def train_on_text(change: dict, weight: float, seed: int) -> tuple[Transformer, Tensor, float]:
#     """The trained model, the upper layer's shares step by step, and seconds of processor time."""
#     torch.manual_seed(seed)
#     model = Transformer(patch(language_model(vocabulary.vocab_size), PRE_LN, change))
#     seen: list[Tensor] = []
#
#     def loss(model: Transformer, ids: Tensor) -> Tensor:
#         with record_routing(model) as routings:
#             value = language_loss(model, ids)
#         for name, (logits, chosen) in routings.items():
#             value = value + weight * balance_loss(logits, chosen)
#             if name == LAYER:
#                 seen.append(shares(chosen, logits.shape[-1]))
#         return value
#
#     start, steps = time.process_time(), 220 if full else 3
#     train_language_model(model, train_ids, steps=steps, rate=4e-3, seed=seed, loss=loss)
#     return model, torch.stack(seen) if seen else torch.empty(0), time.process_time() - start

# %% tags=["active-ipynb", "nbval-ignore-output"]
# top_1 = mixture_of_experts(8, 1, expert=spec(FeedForward, d_ff=256), renormalise=False)
# top_2 = mixture_of_experts(8, 2, expert=spec(FeedForward, d_ff=128))
# rows = {
#     "dense": ({}, 0.0),
#     "8 experts, 1 used": (top_1, 0.01),
#     "8 experts, 2 used": (top_2, 0.01),
#     "1 used, no balance": (top_1, 0.0),
# }
# runs = {
#     name: [train_on_text(change, weight, seed) for seed in ((0, 1) if full else (0,))]
#     for name, (change, weight) in rows.items()
# }
# print(text.name, "by characters;", len(val_ids), "of them to validate")
# for name, seeds in runs.items():
#     config = seeds[0][0].config
#     total, active = count_parameters(config)["total"], active_parameters(config)
#     bits = [f"{bits_per_byte(model, val_ids, len(val_ids)):.3f}" for model, _, _ in seeds]
#     print(f"{name:18s} {total:9,} parameters, {active:8,} active   ", end="")
#     print(f"bits a character {', '.join(bits)}   {min(run[2] for run in seeds):5.1f} s")

# %% [markdown]
# Read bits and seconds together. Here experts did not pay. One expert used was worse than the dense network with both seeds, two used were level with it, and both took longer. All are hardly better than the guesser of Chapter 25 that knows one character back: so few steps are too few, and each expert sees a fraction of their tokens. The gains in the literature come from training that is larger by many orders of magnitude: the Switch Transformer reports the quality of its dense counterpart in a seventh of the time {cite:p}`fedus2021switch`. This page does not reproduce that.
#
# What it can show is the load:

# %% tags=["hide-input"]
def draw_shares(histories: dict[str, Tensor]) -> "Figure":
    """One panel for each history of shares `(steps, E)`: the experts' shares, stacked."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(histories), figsize=(7.2, 2.8), sharey=True)
    for ax, (name, history) in zip(axes, histories.items(), strict=True):
        n_experts = history.shape[1]
        width = min(10, len(history))  # a running mean: single steps are noisy
        smooth = history.unfold(0, width, 1).mean(dim=-1)
        steps = range(width, len(history) + 1)
        colors = plt.get_cmap("viridis")([e / (n_experts - 1) for e in range(n_experts)])
        ax.stackplot(steps, smooth.T.numpy(), colors=colors, edgecolor="white", linewidth=0.4)
        ax.set(title=name, xlabel="step", ylim=(0, 1), xlim=(steps[0], max(steps[-1], 2)))
        ax.grid(False)
    axes[0].set_ylabel("share of the tokens")
    return figure

# %% mystnb={"figure": {"caption": "One seed. Without the balancing loss two experts take nearly all tokens; with it, all eight work.", "name": "fig-load"}, "image": {"alt": "Two stacked area charts over the training steps, eight bands each, one an expert. In the left one two bands fill nearly everything. In the right one all eight stay."}} tags=["active-ipynb", "nbval-ignore-output"]
# history = {"balancing loss, weight 0.01": runs["8 experts, 1 used"][0][1]}
# draw_shares({"no balancing loss": runs["1 used, no balance"][0][1], **history});

# %% [markdown]
# Each band in {numref}`fig-load` is an expert, and its height is the share of tokens that it gets. On the left most bands close early. An expert that gets no tokens gets a gradient of zero and learns nothing. It can come back when the router's scores move: a thin band opens again. In the end two experts have more than nine tokens of ten. On the right is the same model, with the same first weights. Its bands close, too, and the balancing loss opens all eight.
#
# ## Who reads what
#
# Do experts mean something? Send the validation text through the balanced model and note, for each character, where the router of the upper layer sends it.

# %% mystnb={"figure": {"caption": "Many characters go mostly to one of the eight experts; others are split. The twenty most frequent ones.", "name": "fig-characters"}, "image": {"alt": "A heat map with eight experts down and twenty characters across. The shade shows which share of a character's occurrences goes to the expert."}} tags=["active-ipynb", "nbval-ignore-output"]
# model = runs["8 experts, 1 used"][0][0].eval()
# windows = val_ids[: len(val_ids) // 50 * 50].view(-1, 50)
# with torch.no_grad(), record_routing(model) as routings:
#     model(windows)
# chosen, read = routings[LAYER].chosen.flatten(0, 1), windows.flatten()
# common = read.bincount().argsort(descending=True)[:20]
# table = torch.stack([shares(chosen[read == c], 8) for c in common], dim=1)  # (E, 20)
# names = [{" ": "space", "\n": "end"}.get(s, s) for s in vocabulary.decode(common)]
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# image = figures.heatmap(ax, table, rows="01234567", cols=names, vmin=0, vmax=1)
# ax.set(xlabel="character", ylabel="expert")
# ax.set_xticks(range(20), names, family="monospace", fontsize=8, rotation=0)
# fig.colorbar(image, label="share");

# %% [markdown]
# In {numref}`fig-characters`, *space* is the space and *end* the end of a line. A column with one dark cell is a character that goes mostly to one expert. Where a column has several, what stands around the character decides, too. But do not read a meaning into each cell. {cite:t}`jiang2024mixtral` looked for experts by topic in Mixtral and found none. What they saw was closer to syntax: the same words, indentation in code. *Expert* is a name, and no description.
#
# ## Capacity
#
# An expert that gets half of all tokens makes the others wait, if each has its own machine. And machines like shapes that are known in advance. So GShard and the Switch Transformer give each expert a fixed number of places,
#
# $$
# C = \left\lceil c \cdot \frac{n k}{E} \right\rceil ,
# $$ (eq-capacity)
#
# with $n$ tokens in the call and a **capacity factor** $c$ of 1 or a little more. A choice that finds no place is dropped: the expert adds nothing to that token. Around the sub-layer there is the residual, so the token itself goes on.
#
# Who is served first? All first choices, in the order of the tokens. Then all second choices. (GShard does this within groups of tokens, and drops some second choices at random, too.)

# %%
def within_capacity(chosen: Tensor, n_experts: int, capacity: float) -> Tensor:
    """Which choices `(n, k)` find a place: bool `(n, k)`.

    An expert has `ceil(capacity * n * k / n_experts)` places. All first choices are served before
    the second ones, and among those the tokens in their order (Lepikhin et al. 2020, algorithm 1,
    where tokens are in groups and second choices are also dropped at random).
    """
    n, k = chosen.shape
    places = math.ceil(capacity * n * k / n_experts - 1e-9)  # 1.1 * 10 is a little above 11
    queue = F.one_hot(chosen.T.flatten(), n_experts)  # (k n, E): first choices, then second ones
    turn = (queue.cumsum(dim=0) * queue).sum(dim=-1)  # 1 for whoever comes first to its expert
    return (turn <= places).view(k, n).T

# %% [markdown]
# Whether *you* are served depends on who stands before you in the batch. These may be words of another sentence, or filler. With two choices it depends even on who stands *behind* you. Two tokens, two experts, one place each. Only the second token changes its mind:

# %% tags=["active-ipynb"]
# for second in ([0, 1], [1, 0]):
#     kept = within_capacity(torch.tensor([[0, 1], second]), 2, capacity=0.5)
#     print(f"token 1 wants {second}:  token 0 is served", kept[0].int().tolist())

# %% [markdown]
# The first choice of the later token goes before the second choice of the earlier one. That is a leak from the future, through a causal mask.
#
# Without a capacity tokens do not meet. But do not count on equal bits: an expert's batch has another size in other company, and a matrix product of another size may round in another order.
#
# What follows is practical. With a capacity, a sentence decoded token by token has a router that sees one token at a time, and its capacities differ from those in training. A cached model does not equal the uncached one. Filler takes places. The order of the batch matters. One remedy is a larger capacity for evaluation than for training {cite:p}`zoph2022stmoe`; another is to have none.
#
# How much is lost? The trained models, with less and less room, in one call with all windows of the last figure (other windows than in the table of bits above, so compare within this one):

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def with_capacity(model: Transformer, capacity: float | None) -> tuple[float, float]:
#     """Bits a character, and the share of the choices that are dropped in the same call."""
#     for module in model.modules():
#         if isinstance(module, MixtureOfExperts):
#             module.capacity = capacity
#     with torch.no_grad(), record_routing(model) as routings:
#         nats = language_loss(model.eval(), windows).item()
#     wanted = [routing.chosen.flatten(0, 1) for routing in routings.values()]
#     kept = torch.stack([within_capacity(c, 8, capacity or 8.0) for c in wanted])
#     return nats / math.log(2), 1 - kept.float().mean().item()
#
#
# for name in ("8 experts, 1 used", "1 used, no balance"):
#     for capacity in (None, 2.0, 1.25, 1.0):
#         bits, dropped = with_capacity(runs[name][0][0], capacity)
#         print(f"{name:19s} capacity {capacity!s:5s} dropped {dropped:5.1%}   {bits:.3f} bits")
#     with_capacity(runs[name][0][0], None)

# %% [markdown]
# Where a few experts have all the load, a large part of the tokens finds no place, and the text is predicted worse. The balanced router loses much less, but at a factor of 1 it loses, too: its load is nearly even, not quite, and it never trained with a capacity. A capacity needs a balanced router, and some room.
#
# ## The patch, measured
#
# An expert is any `ffn`, the gated network of Chapter 28 for instance. This is the block of Mixtral:

# %% tags=["active-ipynb"]
# from transformer_annotated import GatedFeedForward
#
# mixtral = mixture_of_experts(8, 2, expert=spec(GatedFeedForward, d_ff=14_336))
# print(mixtral["ffn"])

# %% [markdown]
# Next to the paper's model, on translation and on text, the same budget, three seeds each. Chapter 35 has the whole matrix. Four experts of half the width in each layer, two used: the multiplications of the paper's network, twice its feed-forward parameters. Translation has the balancing loss with a weight of 0.01; the language model has none. Look at whether the ranges overlap.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured
#
# print(measured("experts"))

# %% [markdown]
# ## What the paper said, and what came of it
#
# The paper of 2017 has one network a layer. In the same year and with an author in common, {cite:t}`shazeer2017outrageously` put thousands of experts between recurrent layers, with noise on the scores and two balancing losses. GShard put them into every second layer of a Transformer for translation, and the Switch Transformer showed that one expert a token is enough. ST-MoE added the z-loss after training runs that diverged {cite:p}`zoph2022stmoe`. Parameters in billions:
#
# | Model | Year | Experts | Used | Parameters | Active | How the load is balanced |
# | --- | --- | --- | --- | --- | --- | --- |
# | GShard {cite:p}`lepikhin2020gshard` | 2020 | 2048 | 2 | 600 | not given | loss and capacity |
# | Switch-C {cite:p}`fedus2021switch` | 2021 | 2048 | 1 | 1571 | not given | loss and capacity |
# | Mixtral 8x7B {cite:p}`jiang2024mixtral` | 2024 | 8 | 2 | 47 | 13 | not told |
# | DeepSeekMoE 16B {cite:p}`dai2024deepseekmoe` | 2024 | 64, 2 shared | 6, 2 shared | 16.4 | 2.8 | loss |
# | DeepSeek-V3 {cite:p}`deepseek2024v3` | 2024 | 256, 1 shared | 8, 1 shared | 671 | 37 | a number for each expert |
#
# Every token passes a **shared** expert (Exercise 34.4). In DeepSeek-V3 the first three layers have no experts. Its scores go through a sigmoid, and the chosen ones are divided by their sum. The number for each expert is added to its score *for the choice only*. It is raised after a step in which the expert had too little, and lowered after one in which it had too much {cite:p}`wang2024auxiliary`. Only a very small balancing loss is left, within each sequence.
#
# Large systems place experts on different machines, and tokens travel between them. That traffic is why balance is worth a loss of its own. They drop the loop, too. Our loop costs one call an expert; one kernel can multiply all groups of rows by their own matrices at once, with no token dropped {cite:p}`gale2022megablocks`. And under `torch.compile`, which wants shapes that do not depend on the data, our `readers` sends every token through every expert, with weights of zero: the same result for the work of all experts. A fixed capacity is GShard's answer to that wish.
#
# ## How it breaks
#
# - *The weights are forgotten.* The experts' answers are just added. The loss falls, and the router gets no gradient. Look at the router's gradient, as above.
# - *Collapse.* The loss looks normal. Print the shares, every thousand steps.
# - *The balancing loss weighs too much.* Then the router sends tokens anywhere, as long as it is evenly. The shares look perfect then. Look at nll, too.
# - *Filler is balanced, too.* It is one token many times over, and the loss pushes real tokens away from the experts that filler likes.
# - *Routers that nobody watches.* `layer.compile()`, one call, and then `record_routing` sees nothing, for a compiled layer overlooks hooks that come later. `Balanced` counts the routers and raises an error.
#
# ## Takeaways
#
# - A router scores $E$ networks; a token passes $k$ of them, and $g_e$ weighs their answers: {eq}`eq-experts`.
# - Parameters grow with $E$, multiplications with $k$, memory with $E$ again.
# - Left alone, a router may collapse. {eq}`eq-balance` gives counts a slope by multiplying them with probabilities.
# - A capacity fixes the shapes, drops tokens, and lets the tokens of a batch depend on each other.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 34.1.** A layer has $D = 4096$ and eight gated experts of $F = 14{,}336$, each with three matrices and no biases; two are used. How many parameters has the mixture, router included? How many does a token meet? Answer with the two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("34.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# one, router = 3 * 4096 * 14_336, 4096 * 8
# answer = [8 * one + router, 2 * one + router]
# check("34.1", answer)

# %% [markdown]
# **Exercise 34.2.** Sixteen tokens, four experts, one used, a capacity factor of 1.25. Eight tokens want expert 0, four want expert 1, four want expert 2. How many places has an expert, and how many tokens are dropped? And how many with a factor of 1? Answer with three numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("34.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# wanted = torch.tensor([0] * 8 + [1] * 4 + [2] * 4)[:, None]
# dropped = [int((~within_capacity(wanted, 4, c)).sum()) for c in (1.25, 1.0)]
# answer = [5, *dropped]
# check("34.2", answer)

# %% [markdown]
# **Exercise 34.3.** Four experts, one used. The shares are 1/2, 1/2, 0, 0. What is the balancing loss if the mean probabilities are 0.4, 0.4, 0.1, 0.1? And if the router is undecided, with 1/4 for each? Answer with two numbers, and ask yourself what the second says about a loss of exactly 1.

# %% tags=["active-ipynb"]
# answer = ...
# check("34.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# f = torch.tensor([0.5, 0.5, 0.0, 0.0])
# answer = [4 * float(f @ torch.tensor(p)) for p in ([0.4, 0.4, 0.1, 0.1], [0.25] * 4)]
# check("34.3", answer)  # a loss of 1 does not prove an even load

# %% [markdown]
# **Exercise 34.4.** Write `WithShared`, a subclass of `MixtureOfExperts` with the same arguments (and defaults) and one more expert of its own, `self.shared`, that every token passes; its answer is added to the mixture's. Answer with the class.

# %% tags=["active-ipynb"]
# answer = ...
# check("34.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# class WithShared(MixtureOfExperts):
#     def __init__(
#         self,
#         d_model: int,
#         *sizes: int,
#         expert: Spec[nn.Module] = spec(FeedForward, d_ff=2048),
#         **options: Any,
#     ) -> None:
#         super().__init__(d_model, *sizes, expert=expert, **options)
#         self.shared = expert(d_model=d_model)
#
#     def forward(self, x: Tensor) -> Tensor:
#         return super().forward(x) + self.shared(x)
#
#
# check("34.4", WithShared)
