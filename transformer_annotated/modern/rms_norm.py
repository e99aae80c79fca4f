# %% [markdown]
r"""
# RMSNorm and QK-norm

Layer normalisation without its mean and without its shift, and the same small norm put on the queries and keys of
attention, where it keeps the scores within a bound.
"""

# %% [markdown]
# Two changes in one chapter, because they are made of one class. The first exchanges every norm of the model for a simpler one. The second adds a norm where the paper has none.

# %% mystnb={"figure": {"caption": "Chapter 27 of Part III: a simpler norm, and one more place for it.", "name": "fig-map-rms-norm"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The third, RMSNorm, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(27);

# %%
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from transformer_annotated.paper.parts import check_sizes, spec

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, QK_NORM, RMS_NORM, diff, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, RMS_NORM, QK_NORM)))

# %% mystnb={"figure": {"caption": "Every box with a norm changes, and self-attention gets two norms of its own.", "name": "fig-seams-rms-norm"}, "image": {"alt": "The two stacks of the Transformer. The residual boxes and the self-attention boxes of both stacks are coloured."}} tags=["active-ipynb"]
# figures.seams(["residual", "self_attention"]);

# %% [markdown]
# ## What is the mean good for?
#
# Layer normalisation (Chapter 6) does four things to a vector: it takes the mean off, divides by the standard deviation, multiplies by a learned weight, adds a learned shift. Do we need all four? Take the vector of Chapter 6. First with its mean taken off. Then only divided, by the root of the mean of its squares:

# %% tags=["active-ipynb"]
# x = torch.tensor([2.0, 4.0, 6.0, 8.0])
# centred = x - x.mean()
# print("with the mean taken off ", centred / centred.square().mean().sqrt())
# print("divided, and no more    ", x / x.square().mean().sqrt())

# %% [markdown]
# Here it matters: these four numbers are mostly mean. But are the vectors inside a Transformer like that? The mean of a vector is one direction out of $D$. Put the mean $\mu$ in all $D$ places: that vector has the squared length $D \mu^2$. Which share of $|x|^2$ is it? If its direction were one like any other, the share would be $1/D$ on average. We train a small language model (Chapter 25, with Chapter 26's pre-LN) and look at what arrives at each of its norms.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import PRE_LN, LayerNorm, Transformer, train_language_model
# from transformer_annotated.book import scale
# from transformer_annotated.modern.language_model import Characters, any_text, language_model
#
# torch.set_num_threads(1)
# full = scale() == "full"
# text = any_text()
# characters = Characters(text.train)
# ids = torch.tensor(characters.encode(text.train))
# small = patch(language_model(characters.vocab_size), PRE_LN)
# torch.manual_seed(0)
# model = Transformer(small)
# train_language_model(model, ids, steps=200 if full else 3, rate=3e-3)
# arrived = {}
# for name, module in model.named_modules():
#     if isinstance(module, LayerNorm):
#         module.register_forward_pre_hook(
#             lambda module, inputs, name=name: arrived.update({name: inputs[0]})
#         )
# with torch.no_grad():
#     model(ids[:1024].view(16, 64))
# print(f"one direction of 64: {1 / 64:.1%}")
# for name, x in arrived.items():
#     share = (64 * x.mean(dim=-1).square().sum() / x.square().sum()).item()
#     print(f"{share:6.1%}, {64 * share:4.1f} times that:  {name.removeprefix('decoder.')}")

# %% [markdown]
# This is after training. In the first layer the mean holds several times its share; further up, its share or less. (This model has LayerNorm, so nothing made it keep the mean small.) And what taking it off does, the next matrix can do as well: if the mean disturbs, the matrix can learn weights that do not read it. Below we train without taking it off, and see.
#
# ## In a picture
#
# The mean of a vector, written once in every place, is the vector's shadow on the line $(1, 1, \dots, 1)$. In symbols: $\mu \mathbf{1} = \frac{x \cdot \mathbf{1}}{\mathbf{1} \cdot \mathbf{1}} \mathbf{1}$, the projection on the all-ones vector $\mathbf{1}$. So layer normalisation first presses every vector flat, onto the plane at right angles to that line, and then stretches it to length $\sqrt{D}$. The division alone leaves the direction as it is.

# %% tags=["hide-input"]
def draw_norms() -> Any:
    """Draw where LayerNorm and RMSNorm send vectors of two and of three numbers."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    def both(x: Tensor) -> dict[str, Tensor]:
        size = (x.shape[-1],)
        return {"RMSNorm": F.rms_norm(x, size), "LayerNorm": F.layer_norm(x, size)}

    generator = torch.Generator().manual_seed(3)
    fig = plt.figure(figsize=(7.2, 3.5))
    flat = fig.add_subplot(1, 2, 1)
    x = 1.6 * torch.randn(14, 2, generator=generator)
    flat.axline((0, 0), slope=1, color="#999999", linestyle="--", linewidth=1)
    for point, end in zip(x.tolist(), both(x)["RMSNorm"].tolist(), strict=True):
        flat.plot(*zip(point, end, strict=True), color="#CCCCCC", linewidth=0.8)
    flat.scatter(x[:, 0], x[:, 1], s=12, color="#888888", label="before")
    for (name, y), color, size in zip(both(x).items(), COLORS, (22, 60), strict=False):
        flat.scatter(y[:, 0], y[:, 1], s=size, color=color, label=name, zorder=3)
    flat.set(title="D = 2", aspect="equal", xlim=(-3.6, 3.6), ylim=(-3.6, 3.6))
    flat.set(xlabel="first number", ylabel="second number")
    flat.legend(loc="upper left", fontsize=8)
    solid: Any = fig.add_subplot(1, 2, 2, projection="3d")
    x = torch.randn(500, 3, generator=generator)
    for (name, y), color in zip(both(x).items(), COLORS, strict=False):
        solid.scatter(*y.T.numpy(), s=5, color=color, label=name, depthshade=False)
    solid.plot([-2, 2], [-2, 2], [-2, 2], color="#999999", linestyle="--", linewidth=1)
    solid.set(title="D = 3", xticks=[-1, 0, 1], yticks=[-1, 0, 1], zticks=[-1, 0, 1])
    solid.set(xticklabels=[], yticklabels=[], zticklabels=[])
    solid.view_init(elev=18, azim=-12)
    solid.set_box_aspect((1, 1, 1), zoom=1.15)
    return flat

# %% mystnb={"figure": {"caption": "RMSNorm keeps the direction: its results lie all over a circle or a sphere. LayerNorm keeps what is at right angles to the dashed line (1, ..., 1): two points, or a circle.", "name": "fig-norm-shapes"}, "image": {"alt": "Left, a plane: grey points are moved along rays onto a circle by RMSNorm, and to one of two opposite points by LayerNorm. Right, space: blue points cover a sphere, orange points form a circle around the dashed diagonal."}} tags=["active-ipynb"]
# draw_norms();

# %% [markdown]
# On the left of {numref}`fig-norm-shapes` a grey line joins a vector with its RMSNorm. With $D = 2$ layer normalisation has two possible results: all it keeps is which of the two numbers is larger. With $D = 3$ a circle is left of a sphere. One dimension is lost. At $D = 512$ there are 511 others.
#
# ## The norm
#
# Leave out the mean and the shift {cite:p}`zhang2019root`:
#
# $$
# \mathrm{RMSNorm}(x) = \gamma \odot \frac{x}{\sqrt{\frac{1}{D} \sum_i x_i^2 + \epsilon}}
# $$ (eq-rms-norm)
#
# The root of the mean square has given it its name. As before, $\epsilon$ stands *inside* the root. And the old norm is the new one after the projection: without its shift,
#
# $$
# \mathrm{LayerNorm}(x) = \mathrm{RMSNorm}(x - \mu \mathbf{1})
# $$ (eq-layer-as-rms)
#
# because the variance is the mean square of $x - \mu \mathbf{1}$.

# %% [markdown]
# PyTorch would find the gradient by itself, and keep two tensors of the size of $x$ for it. One is enough. Write $\mathrm{rms}$ for the root in {eq}`eq-rms-norm`, $n = x / \mathrm{rms}$ for the vector before $\gamma$, and $g$ for the gradient that arrives there, which is $\gamma$ times the one of the output. Making $x$ longer hardly changes $n$, so the part of $g$ along $n$ is lost on the way back:
#
# $$
# \frac{\partial L}{\partial x} = \frac{1}{\mathrm{rms}} \Big( g - n \, \frac{1}{D} \sum_i g_i n_i \Big)
# $$ (eq-rms-backward)
#
# "Hardly" is $\epsilon$'s doing. The formula is exact all the same: $\epsilon$ is inside $\mathrm{rms}$. We write both passes down:

# %%
class RootMeanSquare(torch.autograd.Function):
    """RMSNorm with its backward pass; it keeps x and one number a vector."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x` `(..., D)` and `weight` `(D,)` to `(..., D)`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        inverse = torch.rsqrt(length.square() / x.shape[-1] + eps)  # 1 / root
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients for `x` and `weight`, given the one for the output."""
        x, weight, inverse = ctx.saved_tensors
        n, g = x * inverse, slope * weight.to(inverse.dtype)
        for_weight = (slope * n).reshape(-1, len(weight)).sum(dim=0)
        along = (g * n).mean(dim=-1, keepdim=True)
        return g.sub_(n.mul_(along)).mul_(inverse).to(x.dtype), for_weight.to(weight.dtype), None


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
        weight = self.weight + self.offset if self.offset else self.weight
        if x.is_cuda:  # there PyTorch has one fused operation for it
            return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps).to(x.dtype)
        return RootMeanSquare.apply(x, weight, self.eps)

# %% [markdown]
# `weight` is $\gamma$; there is no $\beta$. `length` is the length of $x$, so `length.square() / D` is the mean square. `inverse` is one over the root: one number for each vector. `wide` is the precision in which it is found. In `backward`, `slope` is the gradient of the output. `for_weight` is $\gamma$'s: the output's times $n$, added up over all vectors. The last line is {eq}`eq-rms-backward`. `once_differentiable` says that this gradient has none of its own: who asks for a second derivative gets an error, not a wrong number.
#
# `offset` is for Gemma, whose files hold $\gamma - 1$: its fresh weights are 0, and the norm multiplies by $1 + w$. Weight decay then pulls $\gamma$ towards 1, not towards 0.

# %% tags=["active-ipynb"]
# x = torch.tensor([2.0, 4.0, 6.0, 8.0])
# llama, gemma = RMSNorm(4), RMSNorm(4, offset=1.0)
# print(llama(x).data, llama.weight.data)
# print(gemma(x).data, gemma.weight.data)

# %% [markdown]
# ## Proof
#
# Against PyTorch's own, output and both gradients, with weights redrawn. PyTorch finds its gradients by itself, so this proves our `backward` too. (The tests also compare it with finite differences.) The second $\epsilon$ is large on purpose: with a tiny one, a wrong place for it would hardly show.

# %% tags=["active-ipynb"]
# def same(ours: Tensor, theirs: Tensor, mine: list[Tensor], its: list[Tensor]) -> None:
#     direction = torch.randn(ours.shape, dtype=ours.dtype)
#     found = torch.autograd.grad(ours, mine, direction)
#     wanted = torch.autograd.grad(theirs, its, direction)
#     for a, b in zip((ours, *found), (theirs, *wanted), strict=True):
#         torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
#
#
# torch.manual_seed(0)
# x = (1 + torch.randn(3, 5, 32, dtype=torch.float64)).requires_grad_()
# for eps in (1e-6, 0.05):
#     ours, theirs = RMSNorm(32, eps).double(), nn.RMSNorm(32, eps).double()
#     nn.init.normal_(ours.weight)
#     theirs.load_state_dict(ours.state_dict())
#     same(ours(x), theirs(x), [x, ours.weight], [x, theirs.weight])
# print("output and two gradients equal to nn.RMSNorm's, to 1e-10")

# %% [markdown]
# Gemma's, from the definition. The tests of the book do it against the classes of Llama and Gemma in `transformers` too.

# %% tags=["active-ipynb"]
# gemma = RMSNorm(32, eps=0.05, offset=1.0).double()
# nn.init.normal_(gemma.weight)
# by_hand = (1 + gemma.weight) * x / ((x * x).sum(-1, keepdim=True) / 32 + 0.05) ** 0.5
# same(gemma(x), by_hand, [x, gemma.weight], [x, gemma.weight])
# print("Gemma's too")

# %% [markdown]
# {eq}`eq-layer-as-rms`, and what both norms are for: the size of the input does not matter.

# %% tags=["active-ipynb"]
# rms, layer = RMSNorm(32, 1e-6).double(), LayerNorm(32, 1e-6, bias=False).double()
# nn.init.normal_(rms.weight)
# layer.load_state_dict(rms.state_dict())
# same(rms(x - x.mean(-1, keepdim=True)), layer(x), [x, rms.weight], [x, layer.weight])
# with torch.no_grad():
#     moved = [(norm(x + 5) - norm(x)).abs().max().item() for norm in (layer, rms)]
#     grown = [(norm(1000 * x) - norm(x)).abs().max().item() for norm in (layer, rms)]
# print("LayerNorm is RMSNorm after the projection, gradients included")
# print(f"x + 5   moves LayerNorm by {moved[0]:.0e}, RMSNorm by {moved[1]:.0e}")
# print(f"1000 x  moves LayerNorm by {grown[0]:.0e}, RMSNorm by {grown[1]:.0e}")

# %% [markdown]
# A constant added to every number does nothing to LayerNorm and much to RMSNorm. A factor does nothing to either: what is left in the last line is the effect of $\epsilon$.
#
# Half precision needs care. The square of 300 is 90,000, and the largest number of float16 is 65,504. So the squares are added up in 32 bits, and only the result is rounded:

# %% tags=["active-ipynb"]
# x_16 = (300 * torch.randn(1, 64)).half()
# narrow = x_16 * torch.rsqrt(x_16.square().mean(-1, keepdim=True))
# print("all in 16 bits:", narrow[0, :3].tolist())
# print("ours:          ", RMSNorm(64).half()(x_16)[0, :3].tolist())

# %% [markdown]
# ## What it costs
#
# One number fewer to find for a vector, one subtraction and one addition fewer for each element. Does one notice? Chapter 17's race: the two layer norms, {eq}`eq-rms-norm` written out as it stands, PyTorch's `rms_norm`, and our class. Forward and backward.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from transformer_annotated import FusedNorm
# from transformer_annotated.book import machine
# from transformer_annotated.training.speed import race
#
# rows, D = (2048, 512) if full else (16, 8)
# x = torch.randn(rows, D, requires_grad=True)
# weight, direction = torch.randn(D, requires_grad=True), torch.randn(rows, D)
# norms = {
#     "LayerNorm, written out": LayerNorm(D),
#     "LayerNorm, fused": FusedNorm(D),
#     "RMSNorm, written out": lambda x: (
#         weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
#     ),
#     "torch's rms_norm": lambda x: F.rms_norm(x, (D,), weight, 1e-6),
#     "our RMSNorm": RMSNorm(D),
# }
# times = race(
#     {n: lambda norm=norm: norm(x).backward(direction) for n, norm in norms.items()},
#     20 if full else 1,
# )
# print(machine())
# for name, seconds in times.items():
#     print(f"{name:24s}{1e3 * median(seconds):8.2f} ms")

# %% [markdown]
# Compare like with like. Written out, RMSNorm is the cheaper one, as hoped. But a *fused* layer norm is one operation. It reads each element from memory once, where a chain of operations reads it again and again. That counts for more than the arithmetic which RMSNorm saves. On a CPU, PyTorch computes `rms_norm` as such a chain. Ours is a shorter one: `vector_norm` squares and adds in one go, and the backward pass is written by hand. On a GPU there is a fused operation, and our class calls it.
#
# So on this machine the norm to choose for speed is the fused old one. RMSNorm's case is another: one step less to get wrong, and $D$ parameters fewer in each norm. Whether it costs quality is measured below.
#
# ## Scores that grow
#
# Now the second place. A score of attention is $q \cdot k / \sqrt{d}$. The root keeps it near 1 for queries and keys of ordinary size. But nothing keeps *them* at that size. Their matrices are learned, and if both grow by a factor $c$, the scores grow by $c^2$. Take one attention, and let them grow. We look at the largest score, and at the **entropy** of the weights, $-\sum_s w_s \ln w_s$: $\ln S$ if a query looks at all $S$ keys alike, 0 if it looks at one.

# %%
def scores_and_entropy(q: Tensor, k: Tensor, weights: Tensor) -> tuple[float, float]:
    """The largest size of a score, hidden ones included, and the mean entropy of the rows in nats.

    q and k are `(B, H, T, d)` and `(B, H, S, d)`, the weights `(B, H, T, S)`.
    """
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S)
    return scores.abs().max().item(), torch.special.entr(weights).sum(dim=-1).mean().item()

# %% tags=["active-ipynb"]
# import math
#
# from transformer_annotated import attention_weights
#
# torch.manual_seed(0)
# q, k = torch.randn(1, 4, 32, 16), torch.randn(1, 4, 32, 16)
# norm = RMSNorm(16)
# print(f"{'':10}{'not normalised':>24}{'normalised':>24}")
# with torch.no_grad():
#     for c in (1, 2, 4, 8):
#         line = f"factor {c}  "
#         for a, b in ((c * q, c * k), (norm(c * q), norm(c * k))):
#             size, entropy = scores_and_entropy(a, b, attention_weights(a, b))
#             line += f"   score {size:6.1f} entropy {entropy:.2f}"
#         print(line)
# print(f"all keys alike: {math.log(32):.2f}")

# %% [markdown]
# At a factor of 8 nearly every query has chosen one key. Softmax then hardly has a gradient (Chapter 3), so the choice is hard to unlearn. {cite:t}`zhai2023stabilizing` found low entropy where training becomes unstable, and call it **entropy collapse**.
#
# The right-hand column does not move. There, each query and each key goes through an RMSNorm of width $d$ before they meet. After it, a vector is no longer than $\sqrt{d}$ times the largest weight of the norm. So, whatever comes in,
#
# $$
# \frac{|q \cdot k|}{\sqrt{d}} \;\le\; \sqrt{d} \; \max_i |\gamma^q_i| \; \max_i |\gamma^k_i|
# $$ (eq-qk-bound)
#
# With $d = 16$ and fresh weights, no score is above 4. This is **QK-norm**. The weights $\gamma^q$ and $\gamma^k$ are learned, so the model can still sharpen its attention, but only there, in $\gamma^q$ and $\gamma^k$. (In this model only their products $\gamma^q_i \gamma^k_i$ count. With the rotations of Chapter 29 between norm and score, both do.)
#
# Is the bound ever reached? Yes, by a key that points exactly along the query:

# %% tags=["active-ipynb"]
# with torch.no_grad():
#     query = norm(1000 * torch.randn(1, 16))
#     print(f"q . q / sqrt(d) = {(query @ query.T / 16**0.5).item():.6f}")

# %% [markdown]
# ## The patches
#
# The first puts the class where every norm is. The second fills a seam that Chapter 4 left open, `qk_norm`: the attention builds two norms of width $d$, one for queries and one for keys, shared by its heads. Each head of each position is normalised by itself. It happens before a cache keeps the keys, and before the position is put into queries and keys (Chapter 29). `QK_NORM` changes self-attention only. Cross-attention keeps its scores without a bound.
#
# `RMS_NORM` changes $\epsilon$ as well, from $10^{-5}$ to $10^{-6}$: each class has its own default. For a comparison of the norms alone, patch `norm.eps` too.

# %%
RMS_NORM = {"norm": spec(RMSNorm)}
QK_NORM = {"self_attention.qk_norm": spec(RMSNorm)}

# %% tags=["active-ipynb"]
# from transformer_annotated import count_parameters
#
# total = count_parameters(PAPER_BASE)["total"]
# for name, change in {"RMS_NORM": RMS_NORM, "QK_NORM": QK_NORM}.items():
#     more = count_parameters(patch(PAPER_BASE, change))["total"] - total
#     print(f"{name:10s}{more:+8,} of {total:,} parameters")

# %% [markdown]
# Thirty norms lose 512 shifts each. Twelve self-attentions gain two times 64 weights.
#
# ## Measure: a learning rate that is too high
#
# In training, scores grow when steps are large. So we train the small language model, its norms now RMSNorm, with a learning rate of $3 \cdot 10^{-2}$, thirty times the default of `train_language_model`, without and with QK-norm. The seam `attend` is a good place to watch from: a function that looks at queries and keys, and then does what `sdpa` does. After each step we also note the right-hand side of {eq}`eq-qk-bound`, with the weights as they have become.

# %% tags=["active-ipynb"]
# from transformer_annotated import Mask, MultiHeadAttention, bits_per_byte, sdpa
#
# seen: list[tuple[float, float]] = []
#
#
# def watched(q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **rest: object) -> Tensor:
#     with torch.no_grad():
#         a, b = q[:2], k[:2]
#         seen.append(scores_and_entropy(a, b, attention_weights(a, b, mask)))
#     return sdpa(q, k, v, mask, **rest)
#
#
# def bound(model: Transformer) -> float:
#     norms = [
#         (m.q_norm.weight, m.k_norm.weight)
#         for m in model.modules()
#         if isinstance(m, MultiHeadAttention) and m.q_norm is not None
#     ]
#     found = [len(q) ** 0.5 * (q.abs().max() * k.abs().max()).item() for q, k in norms]
#     return max(found, default=math.inf)  # without QK-norm there is none

# %% tags=["active-ipynb", "nbval-ignore-output"]
# base = patch(small, RMS_NORM, {"self_attention.attend": sdpa})
# VARIANTS = {"without": {}, "QK-norm": QK_NORM}
# steps = 100 if full else 3
# history, bounds = {}, {}
# print(f"at the end{'score':>13}{'bound':>8}{'entropy':>10}{'e^entropy':>12}")
# for name, change in VARIANTS.items():
#     seen.clear()
#     torch.manual_seed(0)
#     model = Transformer(patch(base, change, {"self_attention.attend": watched}))
#     limits = [bound(model)]
#     train_language_model(
#         model, ids, steps=steps, rate=3e-2,
#         on_step=lambda *_, model=model, limits=limits: limits.append(bound(model)),
#     )  # fmt: skip
#     history[name] = torch.tensor(seen).view(steps, -1, 2)  # (steps, layers, 2)
#     bounds[name] = torch.tensor(limits[:-1])  # before each step
#     assert (history[name][..., 0] <= (1 + 1e-5) * bounds[name][:, None]).all()
#     score, entropy = history[name][-1, :, 0].max(), history[name][-1, :, 1].mean()
#     print(f"{name:10s}{score:13.1f}{limits[-2]:8.1f}{entropy:10.2f}{entropy.exp():12.2f}")
# print(f"highest possible{torch.arange(1, 65).log().mean():25.2f}")

# %% [markdown]
# Then the same at four learning rates, with three seeds each, and the loss on text that the model was not trained on:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# val = torch.tensor(characters.encode(text.val[: 6000 if full else 200]))
# n_bytes = len(characters.decode(val.tolist()).encode())
#
#
# def losses(config: Any, rate: float) -> list[float]:
#     values = []
#     for seed in range(3 if full else 1):
#         torch.manual_seed(seed)
#         model = Transformer(config)
#         train_language_model(model, ids, steps=steps, rate=rate, seed=seed)
#         values.append(bits_per_byte(model, val, n_bytes))
#     return values
#
#
# rates = (1e-3, 1e-2, 3e-2, 1e-1) if full else (1e-2, 1e-1)
# found: dict[str, dict[float, list[float]]] = {}
# for name, change in VARIANTS.items():
#     found[name] = {rate: losses(patch(base, change), rate) for rate in rates}
#     for rate, values in found[name].items():
#         line = " ".join(f"{value:.3f}" for value in values)
#         print(f"{name:8s} rate {rate:6g}   bits per byte {line}")

# %% mystnb={"figure": {"caption": "Without QK-norm a high learning rate drives scores up and the entropy down. With it the scores stay below the bound, and a rate that is too high costs a little less.", "name": "fig-qk-norm"}, "image": {"alt": "Three panels. Largest score by step, logarithmic: one curve climbs far above the other, which stays below a dashed line. Mean entropy by step: one curve falls far, the other stays up. Bits per byte by learning rate: the curve without QK-norm rises more at the right."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
# for name, values in history.items():
#     axes[0].semilogy(range(1, steps + 1), values[:, :, 0].amax(dim=1), label=name)
#     axes[1].plot(range(1, steps + 1), values[:, :, 1].mean(dim=1))
# axes[0].semilogy(range(1, steps + 1), bounds["QK-norm"], "k--", linewidth=1, label="its bound")
# for by_rate in found.values():
#     bits = torch.tensor(list(by_rate.values()))
#     axes[2].semilogx(list(by_rate), bits.mean(dim=1), marker="o", markersize=3)
#     axes[2].fill_between(list(by_rate), bits.amin(dim=1), bits.amax(dim=1), alpha=0.25)
# axes[0].set(xlabel="step", title="largest score")
# axes[1].set(xlabel="step", title="entropy (nats)", ylim=(0, None))
# axes[2].set(xlabel="learning rate", title="bits per byte")
# fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3);

# %% [markdown]
# In {numref}`fig-qk-norm`, left and middle, the rate is $3 \cdot 10^{-2}$. The score is the largest over all pairs, hidden ones included. Without QK-norm it passes any ordinary size, and the attention shrinks to one or two keys for each query: $e$ to the power of the entropy, in the table above, is about the number of keys that a query reads. (The highest possible entropy is the mean of $\ln t$ over the positions $t$, as position $t$ sees $t$ keys.) With QK-norm the scores keep below the dashed line. That is {eq}`eq-qk-bound`, whose right-hand side grows only with $\gamma$.
#
# On the right, the shaded band is the range over three seeds. At the lowest rate the two curves lie on each other. At the two rates in the middle QK-norm is lower seed by seed, by a few hundredths of a bit. At the highest rate it is lower on average, but the seeds differ by more than that and the ranges overlap. {cite:t}`wortsman2024small` found on small models that with QK-norm less depends on the choice of the rate, and used such models to predict what goes wrong in large ones.
#
# And the first patch? The model without QK-norm, at the rate of $10^{-2}$, once with each norm. Compare seed with seed:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, values in {
#     "LayerNorm": losses(patch(base, {"norm": spec(LayerNorm)}), 1e-2),
#     "RMSNorm": found["without"][1e-2],
# }.items():
#     print(f"{name:10s} bits per byte", " ".join(f"{value:.3f}" for value in values))

# %% [markdown]
# The norms differ by no more than the seeds do. A hundred steps settle nothing here.
#
# The same budget for every patch of this part, three seeds, two tasks; Chapter 35 has the whole matrix. Lower is better. Look at whether the ranges overlap:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured
#
# print(measured("rms_norm", "qk_norm"))

# %% [markdown]
# RMSNorm first. On translation it is behind the paper's norm with every seed, on text it is not; on both tasks the ranges overlap. So three seeds do not show that leaving out the mean is free, and they show no large price. QK-norm is the clearer one: ahead on both tasks with every seed, and its ranges lie apart from the paper's.
#
# ## What the paper said, and what production does
#
# The paper has layer normalisation, and nothing on queries and keys. {cite:t}`zhang2019root` argued that layer normalisation works by its division, not by its centring, and measured that leaving out the mean costs nothing in quality. It also reported 7 to 64 per cent less time, against layer norms of 2019. Against a fused one there may be nothing to gain, as the race above shows. {cite:t}`henry2020query` brought queries and keys to length one, for translation, and replaced $1/\sqrt{d}$ by a learned number. {cite:t}`dehghani2023scaling` needed a layer norm there: their vision Transformers of eight billion parameters and more diverged after a few thousand steps, with scores that grew and weights near one-hot.
#
# | model | norm | where | on queries and keys |
# |---|---|---|---|
# | T5 {cite:p}`raffel2020exploring` | RMSNorm, called layer norm there | before the sub-layer | no |
# | Llama {cite:p}`touvron2023llama` | RMSNorm | before | no |
# | Gemma {cite:p}`gemma2024gemma` | RMSNorm with $1 + w$ | before | no |
# | Gemma 2 {cite:p}`gemma2024gemma2` | the same | before and after | no; soft-caps the scores |
# | Gemma 3 {cite:p}`gemma2025gemma3` | the same | before and after | yes, instead of the cap |
# | OLMo 2 {cite:p}`olmo2024olmo2` | RMSNorm | after the sub-layer, before the addition | yes, over all heads at once |
# | Qwen 3 {cite:p}`qwen2025qwen3` | RMSNorm | before | yes, head by head |
#
# "Before and after" is Chapter 26's `SandwichNorm`. OLMo 2's place, $x + \mathrm{RMSNorm}(f(x))$, keeps the direct way free, as pre-LN does, and bounds what is added to it.
#
# ## How it breaks, and how you notice
#
# - *$\epsilon$ outside the root*, or $10^{-5}$ for $10^{-6}$. Ordinary inputs hardly show it. Compare with a large $\epsilon$, as above, or with small inputs.
# - *Gemma's weights in Llama's norm.* The stored weights are near 0, and so is the output. The text is noise from the first token.
# - *Squares in float16.* Infinite, and the quotient is 0. The vector is gone without an error.
# - *One norm over all heads where the weights want one for each.* The widths differ, $H d$ against $d$, so loading fails. Where the weights were made to fit, outputs are wrong by a factor for each head.
# - *Only some keys normalised.* Old keys come from the cache without the norm, or get it a second time. The model is right without a cache and wrong with one: compare the two. In our attention the order is fixed: norm, cache, positions.
#
# ## Takeaways
#
# - RMSNorm divides by the root of the mean square. LayerNorm without its shift is RMSNorm after the mean has been taken off.
# - The mean is one direction of $D$. Speed is a matter of fusing, not of the mean.
# - QK-norm bounds the scores by $\sqrt{d}$ times the largest weights of its two norms. So large steps cannot drive the attention to single keys as easily.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 27.1.** What does `RMSNorm(3)`, fresh, make of the vector (1, 2, 6)? Compute it by hand, ignoring $\epsilon$, and compare with Exercise 6.1. Answer with a list of three numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("27.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = RMSNorm(3, eps=1e-12)(torch.tensor([1.0, 2.0, 6.0])).tolist()
# check("27.1", answer)

# %% [markdown]
# **Exercise 27.2.** A model has QK-norm with fresh weights and heads of width $d$, so the largest score there can be is $\sqrt{d}$. A query sees 1,000 keys; one has the largest score there can be, all others the smallest. What weight does the one key get? Answer with a list of two numbers between 0 and 1, for $d = 16$ and $d = 64$. Is QK-norm a hindrance to looking at one key?

# %% tags=["active-ipynb"]
# answer = ...
# check("27.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# s = torch.tensor([16.0, 64.0], dtype=torch.float64).sqrt()
# answer = (s.exp() / (s.exp() + 999 * (-s).exp())).tolist()
# print("at width 16 a quarter is left for the others, at 64 hardly anything:", answer)
# check("27.2", answer)

# %% [markdown]
# **Exercise 27.3.** A library offers a fast `F.layer_norm` and no RMSNorm. Write a function `rms(x)` that computes {eq}`eq-rms-norm` with $\gamma = 1$ and $\epsilon = 10^{-5}$ for `x` of any shape `(..., D)`, by one call of `F.layer_norm` on another tensor. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("27.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def rms(x: Tensor) -> Tensor:
#     D = x.shape[-1]
#     return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * D,), eps=1e-5)[..., :D]
#
#
# check("27.3", rms)

# %% [markdown]
# **Exercise 27.4.** How many parameters has the base model with pre-LN, `RMS_NORM` and `QK_NORM` *fewer* than the base model with pre-LN alone? Count on paper first; remember the final norms.

# %% tags=["active-ipynb"]
# answer = ...
# check("27.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# changed = patch(PAPER_BASE, PRE_LN, RMS_NORM, QK_NORM)
# answer = sum(
#     sign * count_parameters(config)["total"]
#     for sign, config in ((1, patch(PAPER_BASE, PRE_LN)), (-1, changed))
# )
# check("27.4", answer)
