# %% [markdown]
r"""
# Position-wise feed-forward

Two matrices and a ReLU, applied to each position alone: two thirds of an encoder layer's parameters, and the place where
a position computes something of its own.
"""

# %% [markdown]
# Attention moves vectors between positions. The feed-forward network does the other half of the work: it computes on each
# vector and moves nothing.

# %% mystnb={"figure": {"caption": "Chapter 5 of Part I: the part of a layer that works on each position alone.", "name": "fig-map-feed-forward"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The fifth, Feed-forward, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(5);

# %%
from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec

# %% [markdown]
# ## What an average cannot do
#
# Ignore the softmax for a moment and keep the weights of attention fixed. Then everything in Chapter 4 is linear: projections,
# averages, projections again. Stack ten such layers and you have one linear map. It cannot compute even
# *exclusive or* (XOR): 1 if exactly one of two inputs is 1.

# %% tags=["active-ipynb"]
# import torch
# from torch import nn
#
# inputs = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
# wanted = torch.tensor([0.0, 1.0, 1.0, 0.0])
# with_one = torch.cat((inputs, torch.ones(4, 1)), dim=1)  # a third column for the bias
# best = torch.linalg.lstsq(with_one, wanted[:, None]).solution
# print("the best linear answer:", (with_one @ best)[:, 0].round(decimals=3).tolist())

# %% [markdown]
# The best it can do is one half for everything. Two steps with a bend between them do it by hand. Count how many inputs are 1. Then
# subtract twice what goes beyond one:

# %% tags=["active-ipynb"]
# count = inputs.sum(dim=1)
# hidden = torch.stack((count, torch.relu(count - 1)))  # two hidden units
# print("count, excess:", hidden.T.tolist())
# print("count - 2 * excess:", (hidden[0] - 2 * hidden[1]).tolist())

# %% [markdown]
# The bend is $\mathrm{ReLU}(z) = \max(0, z)$. It made the second hidden unit a detector: silent until both inputs are on.
# (The first would pass through a ReLU unchanged: a count is never negative.)
#
# ## Two layers, each position alone
#
# The paper does this on a larger scale (section 3.3, equation 2). Up to a hidden layer of $F = 2048$ detectors, ReLU, down to
# $D = 512$ again:
#
# $$
# \mathrm{FFN}(x) = \max(0,\; x W_1 + b_1)\, W_2 + b_2
# $$ (eq-ffn)
#
# The same two matrices serve every position. That is what *position-wise* means. A convolution of width 1 is the same thing.

# %%
class FeedForward(nn.Module):
    """Position-wise feed-forward network (Vaswani et al. 2017, section 3.3).

    `down(activation(up(x)))`: the same two layers for each position.

    Args:
        d_model: width D of the input and the output.
        d_ff: width F of the hidden layer.
        activation: spec of the non-linearity; ReLU in the paper.
        bias: whether both layers add a bias.
        dropout: probability of dropping a hidden unit in training; 0 in the paper.

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int = 2048,
        *,
        activation: Spec[nn.Module] = spec(nn.ReLU),
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, d_ff=d_ff)
        check_rate("dropout", dropout)
        self.up = nn.Linear(d_model, d_ff, bias=bias)  # W_1, b_1
        self.activation = activation()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(d_ff, d_model, bias=bias)  # W_2, b_2

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return self.down(self.dropout(self.activation(self.up(x))))

# %% [markdown]
# Line by line: `up` is $W_1$ and $b_1$, `down` is $W_2$ and $b_2$, `activation` is the $\max(0, \cdot)$. The names say what happens to the
# width. `activation` is a spec, so that GELU can replace ReLU, and Part III replaces the whole network by a gated one. There is a dropout
# on the hidden units, off by default. The paper does not mention one.
#
# ## Proof
#
# Equation {eq}`eq-ffn` written with explicit sums, in double precision, with every parameter redrawn. Output and gradients:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# ffn = FeedForward(d_model=4, d_ff=10).double()
# for parameter in ffn.parameters():
#     nn.init.normal_(parameter)
# x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
#
#
# def by_hand(x: Tensor) -> Tensor:
#     w_1, b_1, w_2, b_2 = ffn.up.weight, ffn.up.bias, ffn.down.weight, ffn.down.bias
#     hidden = (x[..., None, :] * w_1).sum(dim=-1) + b_1  # (B, T, F)
#     hidden = torch.where(hidden > 0, hidden, torch.zeros_like(hidden))
#     return (hidden[..., None, :] * w_2).sum(dim=-1) + b_2  # (B, T, D)
#
#
# wanted_from = [x, *ffn.parameters()]
# direction = torch.randn(2, 3, 4, dtype=torch.float64)
# torch.testing.assert_close(ffn(x), by_hand(x), rtol=0, atol=1e-10)
# for a, b in zip(
#     torch.autograd.grad(ffn(x), wanted_from, direction),
#     torch.autograd.grad(by_hand(x), wanted_from, direction),
#     strict=True,
# ):
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("output and", len(wanted_from), "gradients equal, to 1e-10")

# %% [markdown]
# And that nothing moves between positions: change position 2 of 3, and look at all three.

# %% tags=["active-ipynb"]
# changed = x.detach().clone()
# changed[:, 1] += 1.0
# print((ffn(changed) - ffn(x)).abs().amax(dim=(0, 2)).gt(0).tolist())

# %% [markdown]
# ## Where the parameters are
#
# A layer of the base encoder has one attention and one feed-forward network. Which is larger?

# %% tags=["active-ipynb"]
# from transformer_annotated import MultiHeadAttention
#
# sizes = {"attention": MultiHeadAttention(512), "feed-forward": FeedForward(512)}
# counts = {name: sum(p.numel() for p in m.parameters()) for name, m in sizes.items()}
# for name, n in counts.items():
#     print(f"{name:13s} {n:9,}   {n / sum(counts.values()):.0%} of the two")

# %% [markdown]
# Four matrices of $D \times D$ against two of $D \times 4D$: four against eight. The feed-forward network holds two thirds, and for short
# sentences about two thirds of the multiplications. A decoder layer has two attentions; there it is half.
#
# ## What the detectors do
#
# At the start each hidden unit is a random direction, and ReLU silences it for about half of all inputs. Here is the start. What training makes of it is Exercise
# 10.3: you will count.

# %% mystnb={"figure": {"caption": "Before training a hidden unit is active for about half of the random inputs.", "name": "fig-active"}, "image": {"alt": "A histogram of 2048 hidden units over the share of inputs for which they are active, a narrow peak at one half."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# torch.manual_seed(0)
# fresh = FeedForward(d_model=64, d_ff=2048)
# nn.init.xavier_uniform_(fresh.up.weight)
# nn.init.zeros_(fresh.up.bias)
# active = (fresh.up(torch.randn(2000, 64)) > 0).float().mean(dim=0)  # (F,)
# fig, ax = plt.subplots(figsize=(7.2, 2.3))
# ax.hist(active.detach().numpy(), bins=40, range=(0, 1))
# ax.set(xlabel="share of inputs for which a unit is active", ylabel="hidden units");

# %% [markdown]
# In {numref}`fig-active` every unit is near one half: nothing has specialised. A unit at 0 would be dead. No input wakes it, and no
# gradient reaches it.
#
# ## What production does
#
# GPT, BERT and GPT-2 use GELU, a smooth version of ReLU {cite:p}`hendrycks2016gaussian`; T5 kept ReLU. Llama and most since then
# use a *gated* network: a third matrix decides, unit by unit, how much gets through {cite:p}`shazeer2020glu`. With three matrices, a hidden
# layer of $8/3\,D$ keeps the number of parameters. That is a patch on one path, `ffn`, and Part III measures it. Mixtures of
# experts replace the one network by many, of which a few run.
#
# ## How it breaks
#
# - *No activation.* Two linear layers in a row are one. The loss alone may not tell you; a comparison
#   with {eq}`eq-ffn` will.
# - *Too little width.* Shapes fit with any `d_ff`. A config that says 512 where 2048 was meant trains a smaller model in silence.
#   Count the parameters.
# - *Dead units.* A learning rate that is too high pushes biases far down. Look at the share of active units.
#
# ## Takeaways
#
# - Attention moves, the feed-forward network computes; each position alone, all with the same weights.
# - {eq}`eq-ffn`: up to $4D$, ReLU, down to $D$. Two thirds of an encoder layer's parameters, half of a decoder layer's.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 5.1.** How many multiplications does `FeedForward(512, 2048)` do for a sentence of 30 positions? Biases do not count.

# %% tags=["active-ipynb"]
# answer = ...
# check("5.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 30 * 2 * 512 * 2048
# check("5.1", answer)

# %% [markdown]
# **Exercise 5.2.** A gated network has three matrices of $D \times F$ and no biases. Which $F$ gives it as many parameters as the two matrices, without
# biases, of the paper's network with $D = 512$ and $F = 2048$? Round down.

# %% tags=["active-ipynb"]
# answer = ...
# check("5.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 2 * 2048 // 3
# check("5.2", answer)

# %% [markdown]
# **Exercise 5.3.** Set the weights of a `FeedForward(2, 2)` so that it computes *exclusive or* for inputs of zeros and ones. The answer is the module; its
# first output counts.

# %% tags=["active-ipynb"]
# answer = ...
# check("5.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = FeedForward(2, 2)
# with torch.no_grad():
#     answer.up.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
#     answer.up.bias.copy_(torch.tensor([0.0, -1.0]))
#     answer.down.weight.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
#     answer.down.bias.zero_()
# check("5.3", answer)
