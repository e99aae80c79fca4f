# %% [markdown]
r"""
# Add & Norm

What surrounds every sub-layer: dropout, a residual connection, and layer normalisation, in the order of the paper.
The order is easily got wrong.
"""

# %% [markdown]
# Attention and the feed-forward network are the *sub-layers*. This chapter builds the frame they sit in.

# %% mystnb={"figure": {"caption": "Chapter 6 of Part I: the frame around every sub-layer.", "name": "fig-map-add-norm"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The sixth, Add and Norm, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(6);

# %%
from collections.abc import Callable

import torch
from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_rate, check_sizes

# %% [markdown]
# ## Twelve layers and no way back
#
# Stack feed-forward networks, one on another, and ask how much of the gradient at the top arrives at the bottom. Then do it again with
# one change: each network's output is *added* to its input instead of replacing it.

# %% tags=["active-ipynb"]
# import torch.nn.functional as F
#
# from transformer_annotated import FeedForward
#
# torch.manual_seed(0)
# networks = [FeedForward(d_model=64, d_ff=256) for _ in range(24)]
#
#
# def gradient_at_input(depth: int, add: bool) -> float:
#     x = torch.randn(8, 64, requires_grad=True)
#     y = x
#     for network in networks[:depth]:
#         y = y + network(y) if add else network(y)
#     (gradient,) = torch.autograd.grad(y, x, torch.randn(8, 64))
#     return gradient.norm().item()
#
#
# for depth in (1, 6, 12, 24):
#     print(
#         f"depth {depth:2d}   replaced {gradient_at_input(depth, False):9.2e}   "
#         f"added {gradient_at_input(depth, True):9.2e}"
#     )

# %% [markdown]
# Replaced, the signal loses most of its size at each layer, and after 24 there is nothing to learn from. How fast it fades depends on the first weights; with
# others it fades more slowly, or explodes. Added, it arrives whatever they are: the sum has a direct way from top to bottom on which no matrix stands
# {cite:p}`he2016deep,he2016identity`. That is the **residual connection**, and it is why a sub-layer
# must return as many numbers as it gets.
#
# The gradient grows a little with depth. So does the vector itself:

# %% tags=["active-ipynb"]
# with torch.no_grad():
#     y = torch.randn(256, 64)
#     for depth in range(25):
#         if depth % 6 == 0:
#             print(f"after {depth:2d} layers: standard deviation {y.std():.2f}")
#         if depth < 24:
#             y = y + networks[depth](y)

# %% [markdown]
# Here the growth is mild, since the outputs of fresh networks are small. In trained networks it can be much larger. Something has to hold the size of the vectors.
#
# ## Layer normalisation by hand
#
# Take one vector of four numbers. Subtract its mean. Divide by its standard deviation. Now it has mean 0 and variance 1,
# whatever it had before.

# %% tags=["active-ipynb"]
# x = torch.tensor([2.0, 4.0, 6.0, 8.0])
# mean = x.mean()
# variance = ((x - mean) ** 2).mean()
# print("mean", mean.item(), "  variance", variance.item())
# print("normalised", (x - mean) / variance.sqrt())

# %% [markdown]
# Compute the variance yourself: $(9 + 1 + 1 + 9) / 4 = 5$. Divided by 4, not by 3. `torch.var` and `torch.std` divide by 3 unless told otherwise, and
# implementations have been built on them by mistake.
#
# The normalised vector is then stretched and shifted by learned numbers, one pair for each of the $D$ places
# {cite:p}`ba2016layer`:
#
# $$
# \mathrm{LayerNorm}(x) = \gamma \odot \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta, \qquad
# \mu = \frac{1}{D} \sum_i x_i, \quad \sigma^2 = \frac{1}{D} \sum_i (x_i - \mu)^2
# $$ (eq-layer-norm)
#
# $\epsilon$ is tiny and stands *inside* the root. It keeps a constant vector from dividing by zero. Each position is normalised by itself:
# other positions and other sentences have no part in it. That is why layer normalisation, and not batch normalisation, suits sentences of
# different length.

# %%
class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016; used in Vaswani et al. 2017, section 3.1).

    Args:
        d_model: width D of the vectors to normalise.
        eps: added to the variance, inside the square root.
        bias: whether to add a learned shift.

    Raises:
        ValueError: `d_model` below 1 or `eps` not above 0.
    """

    def __init__(self, d_model: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        if not eps > 0:
            raise ValueError(f"eps must be above 0, got {eps}")
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`; computed in at least 32-bit precision."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        normal = (centred * torch.rsqrt(variance + self.eps)).to(x.dtype)
        return self.weight * normal if self.bias is None else self.weight * normal + self.bias

# %% [markdown]
# `wide` is $x$ in at least 32 bits; `centred` is $x - \mu$; `rsqrt` is one over the root. `weight` and `bias` are $\gamma$ and $\beta$, under PyTorch's
# names. They start at 1 and 0.

# %% tags=["active-ipynb"]
# norm = LayerNorm(d_model=4)
# print(norm(x).data)
# print("a constant vector:", norm(torch.full((4,), 7.0)).data)

# %% [markdown]
# Against PyTorch's own, output and gradients, with weights and biases redrawn. Fresh weights are all 1 and fresh biases all 0: a norm that forgets
# to use them would pass.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# ours, theirs = LayerNorm(32).double(), nn.LayerNorm(32).double()
# for parameter in ours.parameters():
#     nn.init.normal_(parameter)
# theirs.load_state_dict(ours.state_dict())
# x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
# direction = torch.randn(3, 5, 32, dtype=torch.float64)
# pairs = [(ours(x), theirs(x))]
# pairs += zip(
#     torch.autograd.grad(ours(x), [x, *ours.parameters()], direction),
#     torch.autograd.grad(theirs(x), [x, *theirs.parameters()], direction),
#     strict=True,
# )
# for a, b in pairs:
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("output and three gradients equal, to 1e-10")

# %% [markdown]
# What would the two usual mistakes have cost? A variance divided by $D - 1$, and an $\epsilon$ outside the root:

# %% tags=["active-ipynb"]
# with torch.no_grad():
#     for d in (8, 64, 512):
#         x = torch.randn(100, d)
#         right = F.layer_norm(x, (d,))
#         bessel = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-5).sqrt()
#         print(f"D = {d:3d}   largest error with D - 1: {(bessel - right).abs().max():.4f}")
#     small = 1e-3 * torch.randn(100, 64)
#     outside = (small - small.mean(-1, keepdim=True)) / (
#         small.std(-1, correction=0, keepdim=True) + 1e-5
#     )
#     print(
#         f"small vectors, epsilon outside: {(outside - F.layer_norm(small, (64,))).abs().max():.2f}"
#     )

# %% [markdown]
# At width 512 the first is in the third digit. No loss curve will show it. It shows as soon as you load somebody's weights and compare. The second error is large, because for such small vectors $\epsilon$ is larger than the variance.
#
# ## Dropout
#
# In training, each number is set to zero with probability $p$ and the survivors are divided by $1 - p$, so that the mean stays. At any other time
# nothing happens {cite:p}`srivastava2014dropout`. PyTorch has it; it is three lines:

# %% tags=["active-ipynb"]
# def dropout(x: Tensor, p: float) -> Tensor:
#     kept = torch.rand_like(x) >= p
#     return x * kept / (1 - p)
#
#
# torch.manual_seed(0)
# ones = torch.ones(100_000)
# print(
#     f"share of zeros {dropout(ones, 0.1).eq(0).float().mean():.3f}   mean {dropout(ones, 0.1).mean():.3f}"
# )

# %% [markdown]
# The paper applies it in two places with $p = 0.1$ (section 5.4): to the output of each sub-layer *before* it is added, and to the sum of
# embeddings and positions, which is Chapter 7's.
#
# ## In the paper's order
#
# Section 3.1 says: "the output of each sub-layer is LayerNorm(x + Sublayer(x))". With the dropout of section 5.4:
#
# $$
# y = \mathrm{LayerNorm}\bigl(x + \mathrm{Dropout}(\mathrm{Sublayer}(x))\bigr)
# $$ (eq-post-norm)
#
# The norm comes last, *after* the addition. So this order is called **post-norm**, post-LN for short.

# %%
class PostNorm(nn.Module):
    """The paper's residual: `norm(x + dropout(sublayer(x)))` (sections 3.1 and 5.4).

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
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return self.norm(x + self.dropout(sublayer(x)))

# %% [markdown]
# The last line is {eq}`eq-post-norm`. `sublayer` is any function from `(B, T, D)` to `(B, T, D)`; the frame does not care what it does.
# `norm` is a spec, so RMSNorm can take the place of `LayerNorm`.
#
# This class is the seam `residual`. Much teaching code puts the norm elsewhere, `x + dropout(sublayer(norm(x)))`, while quoting the sentence
# above. That is **pre-norm**. It is easier to train and has another normalisation behind it. It is not what the paper describes. You see the difference in the size of
# what comes out:

# %% mystnb={"figure": {"caption": "Post-norm returns vectors of size one after every layer. Pre-norm lets them grow, and needs a final norm after the stack.", "name": "fig-residual"}, "image": {"alt": "A line chart over 24 layers. The post-norm curve stays at one. The pre-norm curve rises steadily."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# from transformer_annotated import spec
#
# sizes = {"post-norm": [1.0], "pre-norm": [1.0]}
# post, pre = torch.randn(256, 64), torch.randn(256, 64)
# with torch.no_grad():
#     for network in networks:
#         frame = PostNorm(d_model=64, norm=spec(LayerNorm), dropout=0.0)
#         post = frame(post, network)
#         pre = pre + network(F.layer_norm(pre, (64,)))
#         sizes["post-norm"].append(post.std().item())
#         sizes["pre-norm"].append(pre.std().item())
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for name, values in sizes.items():
#     ax.plot(values, label=name)
# ax.set(xlabel="layer", ylabel="standard deviation", ylim=(0, None))
# ax.legend();

# %% [markdown]
# In {numref}`fig-residual` the post-norm line is flat at 1: each layer ends in a norm. The pre-norm line rises, because nothing ever shrinks the sum.
#
# Post-norm has a price, and the paper pays it with a warm-up: the learning rate starts near zero and rises (Chapter 10). At the start, gradients near the top are large. Part III puts both side by side, at
# depth 6, 12 and 24, with and without warm-up, and shows which runs fail {cite:p}`xiong2020layer`.
#
# ## Proof
#
# PyTorch's encoder layer has the same frame twice. With dropout off, one attention and one feed-forward network in our frames must equal
# `nn.TransformerEncoderLayer(norm_first=False)`, with all weights redrawn.

# %% tags=["active-ipynb"]
# from transformer_annotated import MultiHeadAttention
#
# torch.manual_seed(0)
# attention, ffn = MultiHeadAttention(16, 4), FeedForward(16, 32)
# frames = [PostNorm(16, norm=spec(LayerNorm), dropout=0.0) for _ in range(2)]
# for parameter in nn.ModuleList([attention, ffn, *frames]).parameters():
#     nn.init.normal_(parameter, std=0.3)
# stock = nn.TransformerEncoderLayer(16, 4, dim_feedforward=32, dropout=0.0, batch_first=True)
# qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
# with torch.no_grad():
#     stock.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in qkv]))
#     stock.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in qkv]))
# for mine, its in (
#     (attention.out_proj, stock.self_attn.out_proj),
#     (ffn.up, stock.linear1),
#     (ffn.down, stock.linear2),
#     (frames[0].norm, stock.norm1),
#     (frames[1].norm, stock.norm2),
# ):
#     its.load_state_dict(mine.state_dict())

# %% tags=["active-ipynb"]
# x = torch.randn(2, 5, 16, requires_grad=True)
# ours = frames[1](frames[0](x, attention), ffn)
# theirs = stock(x)
# direction = torch.randn(2, 5, 16)
# torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
# torch.testing.assert_close(
#     torch.autograd.grad(ours, x, direction),
#     torch.autograd.grad(theirs, x, direction),
#     rtol=0,
#     atol=1e-5,
# )
# print("one encoder layer equals PyTorch's, output and gradient, to 1e-5")

# %% [markdown]
# ## How it breaks
#
# - *Pre-norm called post-norm.* Shapes agree, training works. Check the size of the output: post-norm gives variance 1 at the start.
# - *`std` in the norm.* An error in the third digit. Compare with `nn.LayerNorm` at a small width, where it is large.
# - *Dropout after the addition.* It then drops the direct way too, and a share of the input is lost in each layer.
# - *A model left in training mode.* The same sentence gives two answers. Call `eval()` before you look at anything.
#
# ## Takeaways
#
# - The residual connection keeps the gradient alive; the norm keeps the size in bounds.
# - Layer normalisation works on one position: mean 0, variance 1 (divided by $D$), stretch, shift.
# - The paper is post-norm: {eq}`eq-post-norm`. Dropout acts on the sub-layer's output, before the sum.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 6.1.** What does `LayerNorm(3)`, fresh, make of the vector (1, 2, 6)? Compute it by hand, ignoring $\epsilon$. Answer with a list of three numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("6.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = LayerNorm(3, eps=1e-12)(torch.tensor([1.0, 2.0, 6.0])).tolist()
# check("6.1", answer)

# %% [markdown]
# **Exercise 6.2.** A fresh `LayerNorm` gets a vector $x$, then $10\,x$, then $x + 5$. By how much do the second and the third result differ from the first? Answer with
# two numbers, the largest absolute differences, rounded to two digits. Take any $x$ with numbers of ordinary size.

# %% tags=["active-ipynb"]
# answer = ...
# check("6.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# x, norm = torch.randn(64), LayerNorm(64)
# answer = [round((norm(y) - norm(x)).abs().max().item(), 2) for y in (10 * x, x + 5)]
# check("6.2", answer)

# %% [markdown]
# **Exercise 6.3.** Write the pre-norm frame: a class `PreNorm(PostNorm)` with a `forward` of one line. Answer with the class.

# %% tags=["active-ipynb"]
# answer = ...
# check("6.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# class PreNorm(PostNorm):
#     def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
#         return x + self.dropout(sublayer(self.norm(x)))
#
#
# check("6.3", PreNorm)
