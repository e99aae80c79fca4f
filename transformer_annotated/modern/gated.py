# %% [markdown]
r"""
# Gated feed-forward

Smoother activations, and a feed-forward network whose hidden units are multiplied by a second set of units, compared with
the paper's ReLU at equal numbers of parameters.
"""

# %% [markdown]
# The feed-forward network of Chapter 5 has one bend: ReLU. Two things have been done to it since. The bend was made round, and a third matrix was added.

# %% mystnb={"figure": {"caption": "Chapter 28 of Part III: the part that computes on each position alone.", "name": "fig-map-gated"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The fourth, Gates, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(28);

# %%
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_annotated.paper.feed_forward import FeedForward
from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec

# %% tags=["active-ipynb"]
# from transformer_annotated import GELU, PAPER_BASE, SWIGLU, diff, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, GELU)), "\n")
# print(diff(PAPER_BASE, patch(PAPER_BASE, SWIGLU)))

# %% mystnb={"figure": {"caption": "One seam changes: the feed-forward network of every layer.", "name": "fig-seams-gated"}, "image": {"alt": "The two stacks of the Transformer. The two feed-forward boxes are coloured."}} tags=["active-ipynb"]
# figures.seams(["ffn"]);

# %% [markdown]
# ## A product of two numbers
#
# Let a network read two numbers and return their product. How hard is that? A ReLU unit is flat on one side of a line and a ramp on the other. We add up more and more of them, in random places, and find the output weights by least squares. (Training the places too would need fewer.) The last line is one unit of the network that this chapter builds. The error is measured on the square from $-1$ to $1$:

# %% tags=["active-ipynb"]
# from transformer_annotated import GatedFeedForward
#
# side = torch.linspace(-1, 1, 41, dtype=torch.float64)
# grid = torch.cartesian_prod(side, side)  # (1681, 2)
# product = grid[:, 0] * grid[:, 1]
# generator = torch.Generator().manual_seed(0)
# for units in (4, 16, 64, 256):
#     w = torch.randn(2, units, generator=generator, dtype=torch.float64)
#     b = torch.randn(units, generator=generator, dtype=torch.float64)
#     hidden = torch.cat((torch.relu(grid @ w + b), torch.ones(len(grid), 1)), dim=1)
#     fit = torch.linalg.lstsq(hidden, product[:, None], driver="gelsd")  # some units may be silent
#     best = hidden @ fit.solution[:, 0]
#     print(f"{units:3d} ReLU units: largest error {(best - product).abs().max():.4f}")
# one = GatedFeedForward(2, 1, activation=spec(nn.Identity)).double()
# with torch.no_grad():
#     one.gate.weight.copy_(torch.tensor([[1.0, 0.0]]))  # reads the first number
#     one.up.weight.copy_(torch.tensor([[0.0, 1.0]]))  # reads the second
#     one.down.weight.copy_(torch.tensor([[1.0], [0.0]]))  # the unit is the first output
#     error = (one(grid)[:, 0] - product).abs().max()
# print(f"  1 unit that multiplies: largest error {error:.4f}")

# %% [markdown]
# Ramps can come near a product, but they need many. A unit that is itself a product of two linear readings has it at once. That is the idea of this chapter's second half. First the bend.
#
# ## Rounder bends
#
# ReLU switches at 0: below, the slope is 0; above, 1. **GELU** multiplies $z$ by the probability that a standard normal number is below $z$ {cite:p}`hendrycks2016gaussian`. **SiLU**, also called Swish, multiplies it by the sigmoid {cite:p}`elfwing2018sigmoid,ramachandran2017searching`:
#
# $$
# \mathrm{GELU}(z) = z \, \Phi(z), \qquad
# \mathrm{SiLU}(z) = z \, \sigma(z) = \frac{z}{1 + e^{-z}}
# $$ (eq-gelu-silu)
#
# $\Phi(z)$ is that probability, and $\sigma(z) = 1 / (1 + e^{-z})$ is the sigmoid.

# %% mystnb={"figure": {"caption": "GELU and SiLU are ReLU with a round corner: on the left some gradient passes too, of either sign, and on the right the slope goes a little above one.", "name": "fig-activations"}, "image": {"alt": "Two panels from -4 to 4. Left, three activations: all near zero on the left and rising on the right, GELU and SiLU dipping slightly below zero. Right, their slopes: ReLU jumps from 0 to 1, the others pass smoothly."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.6))
# for activation in (nn.ReLU(), nn.GELU(), nn.SiLU()):
#     z = torch.linspace(-4, 4, 401, requires_grad=True)
#     y = activation(z)
#     (slope,) = torch.autograd.grad(y.sum(), z)
#     axes[0].plot(z.detach(), y.detach(), label=type(activation).__name__)
#     axes[1].plot(z.detach(), slope)
# axes[0].set(xlabel="z", title="value", ylim=(-0.5, 4))
# axes[1].set(xlabel="z", title="slope")
# axes[0].legend();

# %% [markdown]
# In {numref}`fig-activations`, left, far from 0 all three come together. Right, what matters in training: for $z < 0$ ReLU passes no gradient, the others some. Further left their slope is even a little below 0: both curves have a lowest point and rise again. SiLU's slope reaches further to the left than GELU's.
#
# GELU has a twin, an approximation by tanh that is in the same paper. GPT-2 has it. BERT's code began with the exact one and was changed to the twin later. How far are they apart?

# %% tags=["active-ipynb"]
# z = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
# apart = (nn.GELU()(z) - nn.GELU(approximate="tanh")(z)).abs()
# by_hand = z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))) / 2
# torch.testing.assert_close(nn.GELU(approximate="tanh")(z), by_hand, rtol=0, atol=1e-12)
# print(f"at most {apart.max():.1e} apart, at z = {z[apart.argmax()].abs():.2f}")

# %% [markdown]
# That is small beside the noise of training, and large beside the rounding errors of two models that should be equal. The twin is `spec(nn.GELU, approximate="tanh")`.
#
# ## A gate
#
# Now the third matrix. A **gate** is a number that something else is multiplied by: at 0 nothing gets through, at 1 all. Let each hidden unit have two readings of $x$. One goes through the activation and becomes the gate. The other is what is gated. A picture of one such unit, for inputs of two numbers:

# %% tags=["hide-input"]
def draw_units() -> Any:
    """Draw one hidden unit over the plane: ReLU's, and a gated one with its two factors."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import DIVERGING

    side = torch.linspace(-3, 3, 121)
    x = torch.stack(torch.meshgrid(side, side, indexing="xy"), dim=-1)  # (121, 121, 2)
    up, gate = x @ torch.tensor([0.3, 0.9]), x @ torch.tensor([1.0, -0.2])
    panels = {
        "ReLU(up)": torch.relu(up),
        "up": up,
        "SiLU(gate)": nn.functional.silu(gate),
        "SiLU(gate) · up": nn.functional.silu(gate) * up,
    }
    fig, axes = plt.subplots(1, 4, figsize=(7.2, 2.3), sharey=True)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        image = ax.imshow(
            values.numpy(), origin="lower", extent=(-3, 3, -3, 3), cmap=DIVERGING, vmin=-5, vmax=5
        )
        edge = up if title == "ReLU(up)" else values
        ax.contour(side, side, edge.numpy(), levels=[0.0], colors="black", linewidths=0.8)
        ax.set(title=title, xlabel="$x_1$", xticks=[-2, 0, 2], yticks=[-2, 0, 2])
        ax.grid(False)
    axes[0].set_ylabel("$x_2$")
    fig.colorbar(image, ax=axes[3], shrink=0.7, extend="both")
    return axes

# %% mystnb={"figure": {"caption": "A ReLU unit knows two regions, off and a ramp. A gated unit is nearly off where its gate is closed, and elsewhere positive or negative, as its second reading has it.", "name": "fig-gated-unit"}, "image": {"alt": "Four heat maps of the plane. ReLU of up: zero below a line, a ramp above. Up: a ramp through zero. SiLU of gate: near zero on the left, a ramp on the right. Their product: near zero on the left, positive at the upper right, negative at the lower right."}} tags=["active-ipynb"]
# draw_units();

# %% [markdown]
# On the right of {numref}`fig-gated-unit` is the product of the two panels before it. Where the gate is open the unit is a ramp, and how far it is open decides how steep. A ReLU unit's ramp is equally steep everywhere. The black lines are where a panel changes its sign, or leaves zero. (The darkest colour also stands for values beyond the scale.)
#
# In symbols, with three matrices and no biases {cite:p}`shazeer2020glu`:
#
# $$
# \mathrm{FFN}(x) = \bigl( f(x W) \odot x V \bigr) \, W_2
# $$ (eq-gated)
#
# The name depends on $f$. With the sigmoid it is the **GLU** of {cite:t}`dauphin2017language`, the *gated linear unit* that the family is named after. With GELU it is **GEGLU**, with SiLU **SwiGLU**, with no $f$ at all *bilinear*. Only the sigmoid stays between 0 and 1; the word gate is used for all.

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

# %% [markdown]
# The last line is {eq}`eq-gated`: `gate` is $W$, `up` is $V$, `down` is $W_2$, `activation` is $f$. Which of the two readings goes through $f$ is a convention, and files differ in their names for it: Llama has `gate_proj` and `up_proj` in `transformers`, `w1` and `w3` in Meta's own files (there `w2` is the way down), T5 has `wi_0` and `wi_1`. In all three the first goes through $f$.
#
# ## Proof
#
# With explicit sums, in double precision, every parameter redrawn; output and gradients. The tests of the book also compare with the classes of Llama and T5 in `transformers`.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# ffn = GatedFeedForward(d_model=4, d_ff=10).double()
# for parameter in ffn.parameters():
#     nn.init.normal_(parameter)
# x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
#
#
# def by_sums(x: Tensor) -> Tensor:
#     gate = (x[..., None, :] * ffn.gate.weight).sum(dim=-1)  # (B, T, F)
#     up = (x[..., None, :] * ffn.up.weight).sum(dim=-1)
#     hidden = gate / (1 + torch.exp(-gate)) * up
#     return (hidden[..., None, :] * ffn.down.weight).sum(dim=-1)  # (B, T, D)
#
#
# def same(ours: Tensor, theirs: Tensor) -> None:
#     leaves = [x, *ffn.parameters()]
#     direction = torch.randn(2, 3, 4, dtype=torch.float64)
#     found = torch.autograd.grad(ours, leaves, direction)
#     wanted = torch.autograd.grad(theirs, leaves, direction)
#     for a, b in zip((ours, *found), (theirs, *wanted), strict=True):
#         torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
#
#
# same(ffn(x), by_sums(x))
# print("output and four gradients equal, to 1e-10")

# %% [markdown]
# Many files hold one matrix where we hold two: $W$ and $V$ one below the other. One product, then cut the result in half. It is the same function:

# %% tags=["active-ipynb"]
# joined = torch.cat((ffn.gate.weight, ffn.up.weight))  # (2F, D)
# gate, up = (x @ joined.T).chunk(2, dim=-1)
# same(ffn(x), ffn.down(nn.functional.silu(gate) * up))
# print("one matrix", tuple(joined.shape), "or two: equal")

# %% [markdown]
# And the limiting case. With no $f$, and a gate that is 1 whatever comes in, nothing but two linear layers is left:

# %% tags=["active-ipynb"]
# open_gate = GatedFeedForward(4, 10, activation=spec(nn.Identity), bias=True).double()
# with torch.no_grad():
#     open_gate.gate.weight.zero_()
#     open_gate.gate.bias.fill_(1.0)
#     linear = open_gate.down(open_gate.up(x))
#     torch.testing.assert_close(open_gate(x), linear, rtol=0, atol=1e-12)
# print("an open gate is linear")

# %% [markdown]
# ## The same number of parameters
#
# Three matrices instead of two, at the same width, make a larger network. A larger network should be better; that would prove nothing. For a fair comparison $3 D F'$ must equal $2 D F$: the hidden layer shrinks to two thirds. With the usual $F = 4D$ that is $F' = \frac{8}{3} D$. Hardware likes multiples of round numbers, so the width is rounded up to one.

# %%
def matched_width(d_ff: int, multiple: int = 8) -> int:
    """The width that gives three matrices the parameters of two of width `d_ff`.

    Two thirds of `d_ff`, rounded up to a multiple of `multiple` as Llama's code does it.
    Raises ValueError for a number below 1.
    """
    check_sizes(d_ff=d_ff, multiple=multiple)
    return multiple * math.ceil(2 * d_ff // 3 / multiple)

# %% tags=["active-ipynb"]
# print("    D     4D   8/3 D   F' at a multiple of 256")
# for D in (4096, 5120, 6656, 8192):
#     print(f"{D:5d} {4 * D:6d} {8 * D / 3:7.0f} {matched_width(4 * D, 256):6d}")
# llama_3 = 1024 * math.ceil(int(1.3 * (2 * 4 * 4096 // 3)) / 1024)
# print("Llama 3, D = 4096: 1.3 times as wide, multiple of 1024:", llama_3)

# %% [markdown]
# The last column holds the widths of the four models of {cite:t}`touvron2023llama`. Llama 3 8B {cite:p}`grattafiori2024llama3` is wider than the rule by a factor of 1.3 (in its `params.json`): 14,336.
#
# ## The patches
#
# `GELU` changes the activation alone. The other two exchange the network. They have no biases, as in production, so against the paper's network they lose those too. The width of the patch fits the base model. For another size, patch `ffn.d_ff` with it.

# %%
GELU = {"ffn.activation": spec(nn.GELU)}
SWIGLU = {"ffn": spec(GatedFeedForward, d_ff=matched_width(2048))}
GEGLU = {"ffn": spec(GatedFeedForward, d_ff=matched_width(2048), activation=spec(nn.GELU))}

# %% tags=["active-ipynb"]
# from transformer_annotated import count_parameters
#
# total = count_parameters(PAPER_BASE)["total"]
# for name, change in {"GELU": GELU, "SWIGLU": SWIGLU, "GEGLU": GEGLU}.items():
#     more = count_parameters(patch(PAPER_BASE, change))["total"] - total
#     print(f"{name:8s}{more:+8,} of {total:,} parameters ({more / total:+.2%})")
# for width in (1365, 1368, 2048):
#     print(f"width {width}: {3 * 512 * width / (2 * 512 * 2048):.3f} of the two matrices")

# %% [markdown]
# ## Measure: five networks, three seeds
#
# The language model of Chapter 25 with pre-LN, and five feed-forward networks of the same number of parameters, up to the biases. One has ReLU *squared*, which a machine found in a search for better Transformers {cite:p}`so2021primer`. Same text, same batches, same steps.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import PRE_LN, Transformer, bits_per_byte, sdpa, train_language_model
# from transformer_annotated.book import scale
# from transformer_annotated.modern.language_model import Characters, any_text, language_model
#
# torch.set_num_threads(1)
# full = scale() == "full"
# text = any_text()
# characters = Characters(text.train)
# ids = torch.tensor(characters.encode(text.train))
# val = torch.tensor(characters.encode(text.val[: 6000 if full else 200]))
# n_bytes = len(characters.decode(val.tolist()).encode())
# small = patch(language_model(characters.vocab_size), PRE_LN, {"self_attention.attend": sdpa})
#
#
# class SquaredReLU(nn.Module):
#     def forward(self, z: Tensor) -> Tensor:
#         return torch.relu(z).square()
#
#
# two_thirds = {"ffn.d_ff": matched_width(256, 1)}
# VARIANTS = {
#     "ReLU, 2017": small,
#     "ReLU squared": patch(small, {"ffn.activation": spec(SquaredReLU)}),
#     "GELU": patch(small, GELU),
#     "SwiGLU": patch(small, SWIGLU, two_thirds),
#     "GEGLU": patch(small, GEGLU, two_thirds),
# }
# for name, config in VARIANTS.items():
#     print(f"{name:13s} {count_parameters(config)['total']:,} parameters")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def trained(config: object, seed: int, rate: float = 5e-3, steps: int = 150) -> Transformer:
#     torch.manual_seed(seed)
#     model = Transformer(config)
#     train_language_model(model, ids, steps=steps if full else 3, rate=rate, seed=seed)
#     return model.eval()
#
#
# found: dict[str, list[float]] = {name: [] for name in VARIANTS}
# for seed in range(3 if full else 1):
#     for name, config in VARIANTS.items():
#         found[name].append(bits_per_byte(trained(config, seed), val, n_bytes))
# print(f"guessing evenly: {math.log2(characters.vocab_size):.3f} bits, if a character is a byte")
# for name, losses in found.items():
#     better = sum(a < b for a, b in zip(losses, found["ReLU, 2017"], strict=True))
#     print(
#         f"{name:13s} bits per byte {sum(losses) / len(losses):.3f}   "
#         f"from {min(losses):.3f} to {max(losses):.3f}   below ReLU in {better} of {len(losses)}"
#     )

# %% mystnb={"figure": {"caption": "Bits per byte after the same steps, one dot a seed; lower is better. Guessing evenly costs $\\log_2 V$ bits, printed above; all five are far below.", "name": "fig-gated-loss"}, "image": {"alt": "Five rows, one for each network, each with three dots for three seeds and a line for their mean, over bits per byte."}} tags=["active-ipynb"]
# fig, ax = plt.subplots(figsize=(7.2, 2.4))
# for row, losses in enumerate(found.values()):
#     ax.plot(losses, [row] * len(losses), "o", markersize=5)
#     ax.plot([sum(losses) / len(losses)] * 2, [row - 0.3, row + 0.3], color="#555555", linewidth=1)
# ax.set_yticks(range(len(found)), list(found))
# ax.invert_yaxis()
# ax.set(xlabel="bits per byte, on text not trained on");

# %% [markdown]
# Read {numref}`fig-gated-loss` row against row. Three groups. ReLU and GELU mix: three seeds cannot tell them apart. SwiGLU and GEGLU lie below both with every seed, and mix with each other. ReLU squared, without a third matrix, is the lowest of all. The same seed means the same batches, so seeds share their luck; that is why the table above also counts seed against seed.
#
# Be careful with it. The axis is short. All five had one learning rate, and it was tuned for none of them. And this is a small model after few steps, which says nothing about a thousand times as many.
#
# The same budget for every patch of this part, three seeds, two tasks; Chapter 35 has the whole matrix. Lower is better. Look at whether the ranges overlap:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured
#
# print(measured("gelu", "swiglu", "geglu"))

# %% [markdown]
# On translation all three are ahead of the paper's ReLU with every seed, and their ranges lie apart from its range. Most of that is there without a gate. On text the two gated ones are ahead with every seed; GELU's range overlaps the paper's. Which gated network is the better one depends on the task.
#
# And the price in time. The matrices are as large as before. What is new is a product of $F'$ numbers, and SiLU costs more than ReLU; on the other hand there are fewer hidden units to do it for.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from transformer_annotated.book import machine
# from transformer_annotated.training.speed import race
#
# rows, D, F = (1024, 512, 2048) if full else (8, 8, 32)
# x = torch.randn(rows, D, requires_grad=True)
# networks = {
#     "ReLU": FeedForward(D, F),
#     "GELU": FeedForward(D, F, activation=spec(nn.GELU)),
#     "SwiGLU": GatedFeedForward(D, matched_width(F)),
#     "GEGLU": GatedFeedForward(D, matched_width(F), activation=spec(nn.GELU)),
# }
# runs = {n: lambda ffn=ffn: ffn(x).sum().backward() for n, ffn in networks.items()}
# print(machine())
# for name, seconds in race(runs, 8 if full else 1).items():
#     print(f"{name:8s}{1e3 * median(seconds):8.1f} ms, forward and backward")

# %% [markdown]
# The matrix products decide, and there are as many multiplications in them as before.
#
# Memory is another matter. For the backward pass, a network keeps what its gradients need. We count those tensors in one pass, the input and the weights left out:

# %% tags=["active-ipynb"]
# x = torch.randn(10, 512, requires_grad=True)
# for name, ffn in {
#     "ReLU": FeedForward(512, 2048),
#     "GELU": FeedForward(512, 2048, activation=spec(nn.GELU)),
#     "SwiGLU": GatedFeedForward(512, matched_width(2048)),
# }.items():
#     kept: dict[int, Tensor] = {}
#     with torch.autograd.graph.saved_tensors_hooks(
#         lambda t, kept=kept: kept.setdefault(t.data_ptr(), t), lambda t: t
#     ):
#         y = ffn(x)
#     for other in (x, *ffn.parameters()):
#         kept.pop(other.data_ptr(), None)
#     widths = [t.shape[-1] for t in kept.values()]
#     print(f"{name:8s}{len(widths)} x {widths[0]} = {sum(widths)} numbers a token")

# %% [markdown]
# ReLU needs its own output, and that is what the next matrix needs too: one tensor of $F$ numbers. GELU needs its input besides. A gated network keeps four of $F'$: the gate before and after $f$, the other factor, and the product.
#
# ## Dead units
#
# Chapter 5 warned of units that no input wakes. Their slope is 0 for every token, so their own weights get no gradient. Only a change in the layers below can wake them. We count units whose slope never exceeds a hundredth on a piece of text. Each network is trained for fewer steps than above, with the rate above and with one twenty times as high; SiLU without a gate is among them.

# %%
def quiet_share(model: nn.Module, run: Callable[[], Any], slope: float = 0.01) -> float:
    """The share of hidden units whose activation's slope never exceeds `slope` during `run()`.

    Looks at every FeedForward and GatedFeedForward of `model`; a unit that is quiet is hardly trained.
    """
    steepest: dict[str, Tensor] = {}

    def look(name: str, activation: nn.Module, z: Tensor) -> None:
        z = z.detach().flatten(0, -2).requires_grad_()  # (tokens, F)
        with torch.enable_grad():
            (found,) = torch.autograd.grad(activation(z).sum(), z)
        highest = found.abs().amax(dim=0)
        steepest[name] = torch.maximum(steepest.get(name, highest), highest)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (FeedForward, GatedFeedForward)):
            layer = module.gate if isinstance(module, GatedFeedForward) else module.up
            handles.append(
                layer.register_forward_hook(
                    lambda _, __, z, name=name, f=module.activation: look(name, f, z)
                )
            )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(list(steepest.values())).le(slope).float().mean().item()

# %% tags=["active-ipynb", "nbval-ignore-output"]
# some = ids[: 8192 if full else 256].view(-1, 64)
# print(f"{'':9}{'rate 0.005':>14}{'rate 0.1, three seeds':>28}{'mean':>10}")
# for name, config in {
#     "ReLU": small,
#     "GELU": VARIANTS["GELU"],
#     "SiLU": patch(small, {"ffn.activation": spec(nn.SiLU)}),
#     "GEGLU": VARIANTS["GEGLU"],
#     "SwiGLU": VARIANTS["SwiGLU"],
# }.items():
#     lost: dict[float, list[float]] = {5e-3: [], 1e-1: []}
#     for rate, shares in lost.items():
#         for seed in range(3 if full else 1):
#             model = trained(config, seed, rate, steps=60)
#             with torch.no_grad():
#                 shares.append(quiet_share(model, lambda model=model: model(some)))
#     low, high = lost.values()
#     seeds = " ".join(f"{share:6.1%}" for share in high)
#     print(f"{name:9s}  at most {max(low):.1%}{seeds:>28}{sum(high) / len(high):10.1%}")

# %% [markdown]
# At the ordinary rate hardly a unit is lost. At the high one every network loses many, so a round corner alone does not save every unit: far to the left GELU's slope is as good as 0. SiLU's reaches further, and that did not save them either. But look at the spread over seeds: it is as large as the difference between the rows, so this table does not say which of the smooth ones is safest.
#
# ## What the paper said, and what production does
#
# The paper has ReLU and does not discuss it. GPT, BERT and GPT-2 took GELU {cite:p}`radford2018improving,devlin2019bert,radford2019language`. {cite:t}`shazeer2020glu` compared the gated family in T5 at equal parameters and equal work, and found GEGLU and SwiGLU ahead. About the reason he wrote: "We offer no explanation as to why these architectures seem to work; we attribute their success, as all else, to divine benevolence."
#
# - **SwiGLU**: Llama {cite:p}`touvron2023llama`, PaLM {cite:p}`chowdhery2023palm`, Mistral {cite:p}`jiang2023mistral`, Qwen 3 {cite:p}`qwen2025qwen3`.
# - **GEGLU**: T5 in its version 1.1, which followed from Shazeer's work, and Gemma, with the tanh form {cite:p}`gemma2024gemma`.
# - **ReLU**: the first T5 {cite:p}`raffel2020exploring`. **ReLU squared**: {cite:t}`so2021primer`. The log of {cite:t}`karpathy2025nanochat` reports that SwiGLU did worse there than ReLU squared, and was not adopted. It is not settled.
#
# ## How it breaks, and how you notice
#
# - *The roles swapped.* $f$ on `up` instead of on `gate`. Trained so, a model is as good: the names are exchanged. Somebody else's weights give noise: compare logits.
# - *One joined matrix cut the wrong way.* Some files have $W$ first, some $V$, some take every second row. You notice it in the same way: noise, with the right shapes.
# - *The full width kept.* The gated network is half as large again. It may win only because of that. Count parameters before you compare.
# - *GELU and its twin.* Nothing visible: the text looks the same, and the logits differ by more than rounding does. Read the config: `gelu` and `gelu_new` are two things.
#
# ## Takeaways
#
# - GELU and SiLU are ReLU with a round corner and a gradient on both sides.
# - A gated unit multiplies two readings of its input, {eq}`eq-gated`. At equal parameters it has two thirds of the width.
# - Published gains are small, and do not all agree. Compare at equal parameters, with several seeds, or do not compare.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 28.1.** In Exercise 5.2 no network had biases. Now both have them in every layer. The paper's network has $D = 768$ and $F = 3072$. What is the largest width with which a gated one has no more parameters?

# %% tags=["active-ipynb"]
# answer = ...
# check("28.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# D, F = 768, 3072
# answer = (2 * D * F + F) // (3 * D + 2)  # the way down has D biases in both
# check("28.1", answer)

# %% [markdown]
# **Exercise 28.2.** In Exercise 5.3 a ReLU network with two hidden units computed *exclusive or*. One gated unit is enough. Set the weights of a `GatedFeedForward(2, 1)`, with an activation of your choice, so that its first output is 1 for (0, 1) and (1, 0), and 0 for (0, 0) and (1, 1). Answer with the module.

# %% tags=["active-ipynb"]
# answer = ...
# check("28.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = GatedFeedForward(2, 1, activation=spec(nn.Identity))
# with torch.no_grad():
#     answer.gate.weight.copy_(torch.tensor([[1.0, -1.0]]))  # the difference ...
#     answer.up.weight.copy_(torch.tensor([[1.0, -1.0]]))  # ... times itself
#     answer.down.weight.copy_(torch.tensor([[1.0], [0.0]]))
# check("28.2", answer)

# %% [markdown]
# **Exercise 28.3.** A file holds `gate` and `up` as one matrix of $2F$ rows. Its rows 0, 2, 4, ... are the gate's, in their order, and the others are `up`'s. Write a function `split(stored)` that returns the two matrices, `(gate, up)`, for any $F$ and $D$. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("28.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def split(stored: Tensor) -> tuple[Tensor, Tensor]:
#     return stored[0::2], stored[1::2]
#
#
# check("28.3", split)

# %% [markdown]
# **Exercise 28.4.** A model of Llama 3's kind has $D = 5120$, a factor of 1.3, and widths that are multiples of 256. The code cuts $\frac{8}{3} D$ to a whole number, multiplies by the factor, cuts again, and rounds up. How wide is its feed-forward network?

# %% tags=["active-ipynb"]
# answer = ...
# check("28.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 256 * math.ceil(int(1.3 * (8 * 5120 // 3)) / 256)
# check("28.4", answer)
