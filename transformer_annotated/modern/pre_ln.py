# %% [markdown]
r"""
# Pre-LN and the final norm

The norm moves from behind the addition to the front of the sub-layer. One line changes, deep models become easy to
train, and each stack needs one more norm at its end.
"""

# %% [markdown]
# Chapter 6 built the frame around every sub-layer in the order of 2017, and Chapter 16 showed its price: without a warm-up, training can stay where it began. Since GPT-2 (2019), most large language models have another order.
#
# You wrote this frame in Exercise 6.3. Chapters 6 and 16 called it *pre-norm*; papers also write *pre-LN* (LN for layer normalisation). The order of 2017 is *post-norm* or *post-LN*.

# %% mystnb={"figure": {"caption": "Chapter 26 of Part III: the frame, in another order.", "name": "fig-map-pre-ln"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The second, Pre-LN, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(26);

# %%
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_sizes, spec
from transformer_annotated.paper.transformer import Stack
from transformer_annotated.training.schedule import check_positive
from transformer_annotated.training.speed import FastPostNorm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# The whole change is a class, whose last line is the point of this page, and a dictionary with two entries. `FastPostNorm` is the paper's frame with the cheap dropout of Chapter 17.

# %%
class PreNorm(FastPostNorm):
    """The residual of pre-LN: `x + dropout(sublayer(norm(x)))` (Xiong et al. 2020, figure 1b).

    Its parameters have the names of `PostNorm`'s, so weights can be carried over.

    Args:
        d_model: width D.
        norm: spec of the norm.
        dropout: probability of dropping an element of the sub-layer's output in training.

    Raises:
        ValueError: a dropout outside [0, 1).
    """

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return x + self.dropout(sublayer(self.norm(x)))

# %%
PRE_LN = {"residual": spec(PreNorm), "final_norm": True}

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, diff, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, PRE_LN)))

# %% mystnb={"figure": {"caption": "What pre-LN changes: the frame of every sub-layer, and a norm after each stack, which 2017 did not have. The picture shows which boxes change, not the order inside them; for that see {numref}`fig-frames`.", "name": "fig-seams-pre-ln"}, "image": {"alt": "The two stacks of the Transformer. All five residual boxes and the final norm on top of each stack are coloured."}} tags=["active-ipynb"]
# figures.seams(["residual", "final_norm"]);

# %% [markdown]
# ## What arrives if the sub-layers add nothing?
#
# Take four numbers, and *silent* sub-layers: they answer with zeros. Nothing is added to anything. Send the numbers through six frames of 2017:

# %% tags=["active-ipynb"]
# from transformer_annotated import LayerNorm, PostNorm
#
# x = torch.tensor([2.0, 4.0, 6.0, 8.0])
# y = x
# for _ in range(6):
#     y = PostNorm(4, spec(LayerNorm), dropout=0.0)(y, torch.zeros_like)
# print("went in  ", x.tolist())
# print("came out ", [round(number, 4) for number in y.tolist()])

# %% [markdown]
# The mean is lost, and so is the size: 2 to 8 became numbers of variance one. The residual connection was meant to be a direct way from bottom to top. In the order of 2017 it is none. A norm stands across it after every addition, and the gradient on its way down must pass through all of them.
#
# ## Off the direct way
#
# So put the norm somewhere else. There are few places:

# %% tags=["hide-input"]
def draw_frames() -> "Figure":
    """Five frames side by side: what stands on the direct way, and what beside it."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    from transformer_annotated.figures import COLORS

    frames: dict[str, tuple[list[str], bool, str]] = {  # the branch, a norm behind, on the way
        "post-LN\n(2017)": (["sub-layer"], True, ""),
        "pre-LN": (["norm", "sub-layer"], False, ""),
        "sandwich": (["norm", "sub-layer", "norm"], False, ""),
        "norm behind\nthe sub-layer": (["sub-layer", "norm"], False, ""),
        "DeepNorm": (["sub-layer"], True, r"$\times\,\alpha$"),
    }
    figure, ax = plt.subplots(figsize=(7.2, 3.3))
    ax.set(xlim=(-0.6, 14.8), ylim=(-0.6, 7.4))
    ax.set_axis_off()
    arrow = {"arrowstyle": "-|>", "color": COLORS[0], "linewidth": 2.2}

    def box(x: float, y: float, text: str) -> None:
        color = COLORS[1] if text == "norm" else "#F3F6FA"
        shape = "round,pad=0.02,rounding_size=0.1"
        ax.add_patch(FancyBboxPatch((x - 0.8, y - 0.3), 1.6, 0.6, boxstyle=shape,
                                    facecolor=color, edgecolor="#555555", zorder=3))  # fmt: skip
        ax.text(x, y, text, ha="center", va="center", fontsize=8.5, zorder=4,
                color="white" if text == "norm" else "black")  # fmt: skip

    for i, (name, (branch, behind, factor)) in enumerate(frames.items()):
        way, side = 3.0 * i + 0.4, 3.0 * i + 1.5
        ax.annotate("", (way, 6.3), (way, 0.0), arrowprops=arrow)
        ax.plot([way, side, side, way], [0.4, 0.4, 4.4, 4.4], color="#555555", zorder=1)
        for j, text in enumerate(branch):
            box(side, 2.4 + 1.1 * (j - (len(branch) - 1) / 2), text)
        ax.text(way, 4.4, "+", ha="center", va="center", zorder=5,
                bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": "#555555"})  # fmt: skip
        if behind:
            box(way, 5.3, "norm")
        if factor:
            ax.text(way, 3.4, factor, ha="center", va="center", fontsize=8, zorder=5,
                    bbox={"boxstyle": "circle", "facecolor": "white", "edgecolor": "#555555"})  # fmt: skip
        ax.text(way + 0.6, 6.9, name, ha="center", va="center", fontsize=9)
        ax.text(way, -0.3, "$x$", ha="center", va="center", fontsize=10)
    return figure

# %% mystnb={"figure": {"caption": "Five frames. In pre-LN, sandwich and the fourth, no norm stands on the direct way, the thick line; in post-LN and DeepNorm one does.", "name": "fig-frames"}, "image": {"alt": "Five small diagrams, each with a thick line from the input x upwards and a branch beside it. Post-LN: the branch holds the sub-layer, and a norm stands on the thick line after the addition. Pre-LN: norm and sub-layer on the branch. Sandwich: norm, sub-layer, norm on the branch. The fourth: sub-layer, then norm, on the branch. DeepNorm: like post-LN, with a small circle, times alpha, on the thick line."}} tags=["active-ipynb"]
# draw_frames();

# %% [markdown]
# The thick line in {numref}`fig-frames` is the direct way. The second frame is **pre-LN**: the sub-layer reads a normalised copy, and its answer is added to $x$ itself.
#
# $$
# y = x + \mathrm{Dropout}\bigl(\mathrm{Sublayer}(\mathrm{LayerNorm}(x))\bigr)
# $$ (eq-pre-norm)
#
# Compare {eq}`eq-post-norm`: the same three operations. What the layers do together is now a plain sum. With $f_n$ for what sub-layer $n$ makes of its normalised input,
#
# $$
# x_n = x_0 + \sum_{i=1}^{n} f_i(x_{i-1}), \qquad \frac{\partial x_n}{\partial x_{n-1}} = I + \frac{\partial f_n}{\partial x_{n-1}}
# $$ (eq-pre-sum)
#
# The vector that runs from bottom to top is called the **residual stream**. Sub-layers read from it and write into it, and none of them can take anything away except by writing its opposite. The derivative contains the identity $I$. So part of the gradient arrives unchanged; the sub-layers add to it, and could only by chance cancel it.
#
# ## The code
#
# It stands at the top of this page. The last line of `PreNorm` is {eq}`eq-pre-norm`. The norm, the dropout and the names of the parameters are inherited. Now the six silent frames again:

# %% tags=["active-ipynb"]
# y = x
# for _ in range(6):
#     y = PreNorm(4, spec(LayerNorm), dropout=0.0)(y, torch.zeros_like)
# assert torch.equal(y, x)
# print("came out ", y.tolist())

# %% [markdown]
# Exactly what went in. And with a sub-layer that adds something, the derivative is the identity plus the sub-layer's own, as {eq}`eq-pre-sum` says. Post-LN's derivative instead has two directions that lead to nothing, because a norm forgets the mean and, up to its $\epsilon$, the size:

# %% tags=["active-ipynb"]
# from transformer_annotated import FeedForward
#
# torch.manual_seed(0)
# ffn, x = FeedForward(16, 32).double(), torch.randn(16).double()
# pre, post = (frame(16, spec(LayerNorm), 0.0).double() for frame in (PreNorm, PostNorm))
# for parameter in [*ffn.parameters(), *pre.parameters()]:
#     nn.init.normal_(parameter, std=0.3)
# post.load_state_dict(pre.state_dict())
# jacobian = torch.autograd.functional.jacobian
# alone = jacobian(lambda y: ffn(pre.norm(y)), x)  # (D, D)
# whole = jacobian(lambda y: pre(y, ffn), x)
# torch.testing.assert_close(whole, torch.eye(16).double() + alone, rtol=0, atol=1e-12)
# singular = torch.linalg.svdvals(jacobian(lambda y: post(y, ffn), x))
# print("pre-LN: identity plus the sub-layer's, to 1e-12")
# print("post-LN: directions that lead to nothing:", int((singular < 1e-5 * singular[0]).sum()))

# %% [markdown]
# ## The sum grows
#
# Nothing on the direct way shrinks the stream any more, and each sub-layer adds to it. `stream_sizes` measures it after each layer.

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

# %% mystnb={"figure": {"caption": "Post-LN returns vectors of size one from every layer. Pre-LN's stream grows with every layer.", "name": "fig-stream"}, "image": {"alt": "Standard deviation against layer, 0 to 24. The post-LN curve is flat at one. The pre-LN curve rises from one to about five."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# from transformer_annotated import DECODER_ONLY, Transformer
#
# SMALL = {"vocab_size": 65, "d_model": 32, "ffn.d_ff": 128, "dropout": 0.0}
# SMALL |= {"self_attention.n_heads": 4}
# DEEP = patch(PAPER_BASE, DECODER_ONLY, SMALL, {"n_layers": 24})
# torch.manual_seed(0)
# random_ids = torch.randint(65, (16, 32))
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for name, change in {"pre-LN": PRE_LN, "post-LN": {}}.items():
#     model = Transformer(patch(DEEP, change))
#     entering = model.embedding(random_ids, torch.arange(32)[None]).detach()
#     ax.plot(stream_sizes(model.decoder, entering), label=name)
# ax.set(xlabel="layer", ylabel="standard deviation", ylim=(0, None))
# ax.legend();

# %% [markdown]
# If $n$ answers of one size have nothing to do with each other, their sum grows like $\sqrt{n}$. The curve of pre-LN in {numref}`fig-stream` looks like such a root. Two things follow.
#
# First, a stack must not hand this on. The head would turn vectors that are too large into logits that are too large, and the model would be very sure of its first guesses. So a norm follows the last layer: the **final norm**. Here is the first loss, before any training, with and without it. Equal chances for all $V$ tokens would cost $\ln V$.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import torch.nn.functional as F
#
# print(f"ln V                       loss {torch.tensor(65.0).log():5.2f}")
# for name, change in {
#     "pre-LN with a final norm": PRE_LN,
#     "pre-LN without": {"residual": spec(PreNorm)},
# }.items():
#     torch.manual_seed(0)
#     model = Transformer(patch(DEEP, change))
#     logits = model(random_ids[:, :-1]).detach()  # (B, T, V)
#     loss = F.cross_entropy(logits.transpose(1, 2), random_ids[:, 1:])
#     print(f"{name:26s} loss {loss:5.2f}   standard deviation of the logits {logits.std():.2f}")

# %% [markdown]
# With the norm, the first loss is a little above that of equal chances. Without it, the model is sure, and wrong.
#
# Second, layers high up the stack matter little at the start: what one of them adds is small beside a large stream. {cite:t}`liu2020understanding` see in this the reason why pre-LN trains calmly, and also an objection: a model that leans little on its sub-layers may never use them fully.
#
# *Which stacks need the final norm?* Both. The decoder's goes to the head. The encoder's goes to cross-attention, and look at {eq}`eq-pre-norm` again: the norm in front of cross-attention acts on $x$, which makes the queries. Keys and values come from the memory as it is. Only the encoder's final norm stands between them and the growing stream.
#
# ## The patch
#
# So `PRE_LN` has two entries, and `final_norm` is one switch for every stack there is. It conflicts with one patch: `FAST` of Chapter 17 fills the seam `residual` too. A frame is either before or after, so `patch` refuses the two together. Take every entry of `FAST` but `residual`; the cheap dropout is in `PreNorm` already.

# %% tags=["active-ipynb"]
# from transformer_annotated import FAST, SDPA, FastPostNorm
#
# REST = {path: part for path, part in FAST.items() if path != "residual"}
# try:
#     patch(PAPER_BASE, FAST, PRE_LN)
# except ValueError as error:
#     print(error)
# print(diff(patch(PAPER_BASE, FAST), patch(PAPER_BASE, REST, PRE_LN)))

# %% [markdown]
# ## Proof
#
# `nn.Transformer(norm_first=True)` has pre-LN frames, and a final norm on each stack. Our model with the patch must equal it, with every weight redrawn and filler in the source. Its weights have other names; the map is the one of Chapter 8.

# %% tags=["active-ipynb"]
# TINY = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "dropout": 0.0, "ffn.d_ff": 64}
# TINY |= {"self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# names = {
#     "residuals.self_attention.norm": "norm1",
#     "residuals.cross_attention.norm": "norm2",
#     "self_attention": "self_attn",
#     "cross_attention": "multihead_attn",
#     "ffn.up": "linear1",
#     "ffn.down": "linear2",
# }
# names |= {f"{part}_proj.": "in_proj_" for part in "qkv"}
#
#
# def stock_name(name: str) -> str:
#     name = name.replace("residuals.ffn.norm", "norm2" if name.startswith("encoder") else "norm3")
#     for ours, theirs in names.items():
#         name = name.replace(ours, theirs)
#     return name

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# model = Transformer(patch(PAPER_BASE, TINY, PRE_LN)).double().eval()
# for parameter in model.parameters():
#     nn.init.normal_(parameter, std=0.3)
# sizes = {"dim_feedforward": 64, "dropout": 0.0, "batch_first": True, "norm_first": True}
# encoder = nn.TransformerEncoder(
#     nn.TransformerEncoderLayer(32, 4, **sizes), 2, nn.LayerNorm(32), enable_nested_tensor=False
# )
# decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, **sizes), 2, nn.LayerNorm(32))
# stock = nn.Transformer(
#     32, 4, custom_encoder=encoder, custom_decoder=decoder, batch_first=True
# ).double()
# weights: dict[str, list[Tensor]] = {}
# for name, value in model.state_dict().items():
#     if not name.startswith("embedding"):
#         weights.setdefault(stock_name(name), []).append(value)
# print(stock.load_state_dict({name: torch.cat(values) for name, values in weights.items()}))

# %% tags=["active-ipynb"]
# src, tgt = torch.randint(4, 50, (2, 7)), torch.randint(4, 50, (2, 5))
# padding = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
# ours = model.decode(tgt, model.encode(src, padding), padding)
# theirs = stock(
#     model.embedding(src, torch.arange(7)[None]),
#     model.embedding(tgt, torch.arange(5)[None]),
#     tgt_mask=torch.ones(5, 5).triu(1).bool(),  # PyTorch: True = hidden
#     src_key_padding_mask=~padding,
#     memory_key_padding_mask=~padding,
# )
# torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
# direction, table = torch.randn_like(ours), model.embedding.weight
# torch.testing.assert_close(
#     *(torch.autograd.grad(out, table, direction) for out in (ours, theirs)), rtol=0, atol=1e-10
# )
# print("vectors, and the gradient of the shared table, equal PyTorch's to 1e-10")

# %% [markdown]
# Loading was strict: a norm missing on either side would be an error. The test suite compares the gradient of every weight, in both precisions.
#
# ## Gradients before the first step
#
# Why should the order matter for training? {cite:t}`xiong2020layer` computed how large gradients are at the start. Take the second matrix of the last feed-forward network, in a model of $L$ layers. In post-LN its gradient is bounded by $O(D \sqrt{\ln D})$, whatever the depth. In pre-LN it is bounded by $O(D \sqrt{\ln D / L})$ (their theorem 1). The reason is {numref}`fig-stream`: the final norm divides by the size of the stream, which is about $\sqrt{L}$.
#
# Let us look. The task is the language model of Chapter 25: characters, one narrow decoder, no dropout. For each depth and order we take the mean over fresh models.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import machine, measured, scale
# from transformer_annotated.modern.language_model import (
#     Characters,
#     any_text,
#     language_model,
#     mean_loss,
#     train_language_model,
# )
#
# full = scale() == "full"
# DEPTHS = (6, 12, 24) if full else (1, 2)
# text = any_text()
# symbols = Characters(text.train + text.val + text.test)
# ids = torch.tensor(symbols.encode(text.train[:200_000]))
# share = ids.bincount().double() / len(ids)
# floor = -torch.special.xlogy(share, share).sum().item()
# print(
#     f"{text.name}: {symbols.vocab_size} characters; their frequencies alone give {floor:.2f} nats"
# )
# torch.set_num_threads(1)
# print(machine())

# %% tags=["active-ipynb", "nbval-ignore-output"]
# ORDERS = {"post-LN": {"residual": spec(FastPostNorm)}, "pre-LN": PRE_LN}
#
#
# def model_of(order: dict, depth: int, seed: int) -> Transformer:
#     torch.manual_seed(seed)
#     shape = language_model(symbols.vocab_size, d_model=32, d_ff=128, n_layers=depth)
#     return Transformer(patch(shape, SDPA, REST, order))
#
#
# def gradients(order: dict, depth: int, seed: int) -> Tensor:
#     """The norm of the gradient of each layer's second feed-forward matrix, (depth,)."""
#     model = model_of(order, depth, seed)
#     starts = torch.randint(len(ids) - 33, (16, 1))
#     mean_loss(model, ids[starts + torch.arange(33)]).backward()
#     return torch.stack([layer.ffn.down.weight.grad.norm() for layer in model.decoder.layers])
#
#
# seeds = range(8 if full else 1)
# found = {
#     (name, depth): torch.stack([gradients(order, depth, seed) for seed in seeds])
#     for name, order in ORDERS.items()
#     for depth in DEPTHS
# }  # each (seeds, depth)

# %% mystnb={"figure": {"caption": "Before the first step. Post-LN: the top layer's gradient does not get smaller with depth. Pre-LN: the deeper the model, the smaller the gradients at the top.", "name": "fig-init-gradients"}, "image": {"alt": "Two panels, size of the gradient against the place in the stack from bottom to top, a line for each of three depths, darker for deeper models. Left, post-LN: the lines of the deep models rise towards the top, and all end near one value. Right, pre-LN: the lines fall towards the top, and lie lower for deeper models."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.9), sharey=True)
# shades = plt.get_cmap("Greens")(torch.linspace(0.45, 0.95, len(DEPTHS)).tolist())
# for ax, name in zip(axes, ORDERS, strict=True):
#     for depth, shade in zip(DEPTHS, shades, strict=True):
#         place, mean = (torch.arange(depth) + 1) / depth, found[name, depth].mean(dim=0)
#         ax.plot(place, mean, marker=".", color=shade, label=f"{depth} layers")
#     ax.set(title=name, xlabel="place in the stack (1 is the top)", ylim=(0, None))
# axes[0].set(ylabel="size of the gradient")
# axes[1].legend();

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print("the top layer: mean gradient (lowest to highest), and times the root of the depth")
# for (name, depth), norms in found.items():
#     top = norms[:, -1]
#     print(
#         f"{name:8s} {depth:3d} layers   {top.mean():.2f} ({top.min():.2f} to {top.max():.2f})"
#         f"   {top.mean() * depth**0.5:5.2f}"
#     )

# %% [markdown]
# In pre-LN the last column stays near one value: the gradient falls like one over the root of the depth. In post-LN the mean itself does not fall. The theory is about bounds and wide models, and it fits what we see in a narrow one. {numref}`fig-init-gradients` shows the rest of the stack: in pre-LN the large gradients are at the bottom, and in a deep post-LN model they are at the top.
#
# This is an observation, not yet a reason. Adam divides by the size of the gradient, and we clip it, so a large gradient alone does not make a large step. Chapter 16 measured what goes wrong in such runs: positions become alike. We did not measure that here.
#
# ## The race
#
# Now train. Two orders, three depths, with a warm-up and without. Everything else is equal: the first weights, the crops of text, the peak rate, the cosine after it. Depth is expensive: six layers get two seeds, the others one. The table of the next section has a second seed for 12 layers.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# STEPS, WARM_UP, PEAK = (150, 60, 3e-3) if full else (4, 2, 3e-3)
# SEEDS = {6: 2, 12: 1, 24: 1} if full else {1: 1, 2: 1}
#
#
# def curve(model: Transformer, seed: int, warm_up: int, **change: float) -> list[float]:
#     """The loss of each step."""
#     plan = {"steps": STEPS, "rate": PEAK, "length": 32, "batch": 8, **change}
#     return train_language_model(model, ids, warm_up=warm_up, seed=seed, **plan)
#
#
# start = time.process_time()
# runs = {
#     (name, depth, warm_up): [
#         curve(model_of(order, depth, s), s, warm_up) for s in range(SEEDS[depth])
#     ]
#     for depth in DEPTHS
#     for name, order in ORDERS.items()
#     for warm_up in (WARM_UP, 1)
# }
# print(f"{time.process_time() - start:.0f} s of processor time")

# %% tags=["hide-input"]
def draw_runs(runs: dict[tuple[str, int, int], list[list[float]]], floor: float) -> "Figure":
    """Smoothed losses, a panel a depth; runs are keyed by (order, depth, steps of warm-up)."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    orders = list(dict.fromkeys(order for order, _, _ in runs))
    depths = sorted({depth for _, depth, _ in runs})
    figure, axes = plt.subplots(
        1, len(depths), figsize=(7.2, 3.1), sharey=True, squeeze=False, layout="constrained"
    )
    for (order, depth, warm_up), curves in runs.items():
        ax = axes[0, depths.index(depth)]
        for i, losses in enumerate(curves):
            width = min(15, len(losses))
            smooth = torch.tensor(losses).unfold(0, width, 1).mean(dim=-1)
            label = f"{order}, {'warm-up' if warm_up > 1 else 'no warm-up'}" if i == 0 else None
            ax.plot(range(width, len(losses) + 1), smooth, label=label, linewidth=1.4,
                    color=COLORS[1 - orders.index(order)],
                    linestyle="-" if warm_up > 1 else "--")  # fmt: skip
    for ax, depth in zip(axes[0], depths, strict=True):
        ax.axhline(floor, color="black", linestyle=":", linewidth=1.2)
        ax.set(title=f"{depth} layers", xlabel="step")
    axes[0, 0].set(ylabel="loss, in nats")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure

# %% mystnb={"figure": {"caption": "Every pre-LN run leaves the dotted line of character frequencies, at every depth, with a warm-up and without. Of the post-LN runs only those of six layers with a warm-up begin to.", "name": "fig-orders"}, "image": {"alt": "Three panels, 6, 12 and 24 layers, loss against step. Blue pre-LN curves, solid and dashed, fall through a dotted line and go on falling in all panels. Orange post-LN curves come down to the dotted line and stay there; with six layers and a warm-up they begin to leave it."}} tags=["active-ipynb", "nbval-ignore-output"]
# draw_runs(runs, floor);

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def end(losses: list[float]) -> float:
#     return sum(losses[-20:]) / len(losses[-20:])
#
#
# print(f"mean loss of the last twenty steps, a number a seed; frequencies {floor:.2f}")
# for (name, depth, warm_up), curves in runs.items():
#     rise = f"warm-up {warm_up:2d}" if warm_up > 1 else "no warm-up"
#     print(f"{depth:3d} layers  {name:8s} {rise:11s}", *(f"{end(losses):.2f}" for losses in curves))

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# # The sentences around this cell, as assertions.
# if full:
#     tops = {name: [found[name, depth][:, -1].mean() for depth in DEPTHS] for name in ORDERS}
#     assert tops["pre-LN"][0] > tops["pre-LN"][1] > tops["pre-LN"][2]
#     assert all(a > b for a, b in zip(tops["post-LN"], tops["pre-LN"], strict=True))
# if full and text.name == "shakespeare":
#     ends = {key: max(map(end, curves)) for key, curves in runs.items()}
#     assert all(worst < floor - 0.4 for (name, *_), worst in ends.items() if name == "pre-LN")
#     stuck = [k for k in runs if k[0] == "post-LN" and (k[1] > 6 or k[2] == 1)]
#     assert all(min(map(end, runs[key])) > floor - 0.15 for key in stuck)
#     assert min(map(end, runs["post-LN", 6, WARM_UP])) < floor - 0.15
#     print("pre-LN: every run left the dotted line; post-LN: only with six layers and a warm-up")

# %% [markdown]
# A run fails here as in Chapter 16: it learns how frequent each character is, and stays there. In {numref}`fig-orders` the dotted line is that point. No run exploded. As in Chapter 16, gradients longer than 1 are shortened, so "no run exploded" says little.
#
# Pre-LN does not need the warm-up to leave it. Without one, the 24 layers leave it later than the six, and end nearly as low. At six layers the warm-up helped post-LN: one seed left the dotted line, the other only began to. At 12 and 24 layers it did not help, within this budget.
#
# Two reservations. Deeper was not better here, in so few steps. And a peak rate that suits one order need not suit the other.
#
# None of this says that deep post-LN cannot be trained. The larger BERT has 24 post-LN layers, and was trained with 10,000 steps of warm-up {cite:p}`devlin2019bert`. With pre-LN, no such care was needed here.
#
# ## Two more frames
#
# **Sandwich.** A norm on both sides of the sub-layer, the third picture of {numref}`fig-frames`:
#
# $$
# y = x + \mathrm{Dropout}\bigl(\mathrm{LayerNorm}_2(\mathrm{Sublayer}(\mathrm{LayerNorm}_1(x)))\bigr)
# $$ (eq-sandwich)
#
# However large the sub-layer's own weights become, what it writes has the size that the gain of the second norm allows. CogView introduced it against overflows in 16 bits {cite:p}`ding2021cogview`, and Gemma 2 has it around every sub-layer {cite:p}`gemma2024gemma2`.

# %%
class SandwichNorm(PreNorm):
    """A norm on both sides of the sub-layer: `x + dropout(norm_out(sublayer(norm(x))))`.

    CogView (Ding et al. 2021) and Gemma 2 (2024) have it. The parameters of `norm_out` are the only
    ones that `PreNorm` lacks. The arguments are those of `PreNorm`.
    """

    def __init__(self, d_model: int, norm: Spec[nn.Module], dropout: float) -> None:
        super().__init__(d_model, norm, dropout)
        self.norm_out = norm(d_model=d_model)

    def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`."""
        return x + self.dropout(self.norm_out(sublayer(self.norm(x))))

# %% [markdown]
# **DeepNorm** stays with post-LN and makes the direct way heavier {cite:p}`wang2022deepnet`:
#
# $$
# y = \mathrm{LayerNorm}\bigl(\alpha\, x + \mathrm{Dropout}(\mathrm{Sublayer}(x))\bigr)
# $$ (eq-deepnorm)
#
# With $\alpha > 1$, each layer changes its input less than in post-LN. The first weights of the feed-forward network, of `v_proj` and of `out_proj` are also made smaller, by a factor $\beta$. Both numbers depend on the depth.

# %%
class DeepNorm(FastPostNorm):
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
    if encoder is not None and decoder is not None:
        both = encoder**4 * decoder
        return {
            "encoder": (0.81 * both ** (1 / 16), 0.87 * both ** (-1 / 16)),
            "decoder": ((3 * decoder) ** 0.25, (12 * decoder) ** -0.25),
        }
    for name, depth in {"encoder": encoder, "decoder": decoder}.items():
        if depth is not None:
            return {name: ((2 * depth) ** 0.25, (8 * depth) ** -0.25)}
    raise ValueError("encoder and decoder are both None: at least one depth must be given")


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

# %% tags=["active-ipynb"]
# for depths in ({"decoder": 24}, {"encoder": 6, "decoder": 6}):
#     for stack, (alpha, beta) in deepnorm_constants(**depths).items():
#         print(f"{depths}   {stack}: alpha {alpha:.3f}   beta {beta:.3f}")

# %% [markdown]
# For two stacks the constants differ, and our seam `residual` holds one frame for both. So a config of this book describes DeepNorm exactly where there is one stack.
#
# Each against its formula, written out with PyTorch's norm, and the limit: with $\alpha = 1$ DeepNorm must be post-LN.

# %% tags=["active-ipynb"]
# def norm(x: Tensor, module: nn.Module) -> Tensor:
#     return F.layer_norm(x, (16,), module.weight, module.bias)
#
#
# sandwich = SandwichNorm(16, spec(LayerNorm), 0.0).double()
# deep = DeepNorm(16, spec(LayerNorm), 0.0, alpha=2.5).double()
# unit = DeepNorm(16, spec(LayerNorm), 0.0, alpha=1.0).double()
# for parameter in nn.ModuleList([sandwich, deep]).parameters():
#     nn.init.normal_(parameter)
# unit.load_state_dict(post.state_dict())
# x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
# direction = torch.randn_like(x)
# for ours, formula in (
#     (sandwich(x, ffn), x + norm(ffn(norm(x, sandwich.norm)), sandwich.norm_out)),
#     (deep(x, ffn), norm(2.5 * x + ffn(x), deep.norm)),
#     (unit(x, ffn), post(x, ffn)),
# ):
#     pairs = [(torch.autograd.grad(y, x, direction)[0], y) for y in (ours, formula)]
#     torch.testing.assert_close(*pairs, rtol=0, atol=1e-10)
# print("sandwich, DeepNorm, and DeepNorm with alpha 1: output and gradient equal, to 1e-10")

# %% [markdown]
# Do they train twelve layers where post-LN did not? Also, was post-LN's plan too rough, or were the steps too few? Here every run gets twice the steps. The gentle plan has a third of the rate and a warm-up of two thirds of the steps; both orders get both plans. The seed is another one than in the race; DeepNorm has both.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# depth = DEPTHS[1]
# SANDWICH = {"residual": spec(SandwichNorm), "final_norm": True}
# alpha, beta = deepnorm_constants(decoder=depth)["decoder"]
# HEAVY = {"residual": spec(DeepNorm, alpha=alpha)}
# GENTLE = (PEAK / 3, 4 * STEPS // 3)
# rows = {
#     "post-LN": (ORDERS["post-LN"], 1, PEAK, WARM_UP),
#     "pre-LN": (PRE_LN, 1, PEAK, WARM_UP),
#     "post-LN, gentle": (ORDERS["post-LN"], 1, *GENTLE),
#     "pre-LN, gentle": (PRE_LN, 1, *GENTLE),
#     "sandwich": (SANDWICH, 1, PEAK, WARM_UP),
#     "DeepNorm": (HEAVY, 1, PEAK, WARM_UP),
#     "DeepNorm, again": (HEAVY, 0, PEAK, WARM_UP),
# }
# last = {}
# print(f"{depth} layers, {2 * STEPS} steps; frequencies {floor:.2f}")
# print(f"{'':16s} seed  peak rate  warm-up  loss half-way  at the end")
# for name, (order, seed, peak, warm_up) in rows.items():
#     model = model_of(order, depth, seed)
#     if order is HEAVY:
#         deepnorm_init(model, beta)
#     losses = curve(model, seed, warm_up, rate=peak, steps=2 * STEPS)
#     last[name] = end(losses)
#     plan = f"{seed:4d} {peak:10.3f} {warm_up:8d}"
#     print(f"{name:16s} {plan} {end(losses[:STEPS]):14.2f} {last[name]:11.2f}")

# %% tags=["active-ipynb", "hide-cell", "nbval-ignore-output"]
# if full and text.name == "shakespeare":
#     stuck = {name for name, loss in last.items() if loss > floor - 0.15}
#     assert stuck == {"post-LN", "post-LN, gentle"}
#     print("stayed at the frequencies:", *sorted(stuck), sep="\n  ")

# %% [markdown]
# With twice the steps post-LN is still at the dotted line, and the gentle plan does not help it here. The same plan is enough for pre-LN. So these twelve layers could be trained in these steps; in the order of 2017 they were not.
#
# The sandwich leaves the line as pre-LN does. DeepNorm leaves it too, later than pre-LN, and how late depends on the seed: one run of it says little. Whether the delay comes from $\alpha$ or from the small first weights, this table does not show. It was made for much deeper models: its authors trained 1,000 layers.
#
# ## Measured on both tasks
#
# Chapter 35 trains the paper's model and every patch of this part on translation and on text, small and with two layers, on one budget, three seeds each. The table has two rows a task: the paper's model and this patch.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print(measured("pre_ln"))

# %% [markdown]
# With two layers pre-LN alone is worse on both tasks, with each seed. This does not contradict the race: there, six layers were the fewest. Two layers train without it, so there is nothing to repair. Chapter 35 shows the whole matrix, and a place where the same patch is missed.
#
# ## What the paper said, and what came after
#
# The paper is post-LN (sections 3.1 and 5.4). The authors' library soon was not. Its settings spell the frame as two strings: what happens before a sub-layer and what after, with `d` for dropout, `a` for add, `n` for norm. `transformer_base_v1` has nothing before and `dan` after. From `transformer_base_v2` on it is `n` before and `da` after: pre-LN {cite:p}`vaswani2018tensor2tensor`. So whoever trained with that library's later settings trained a model that the paper does not describe.
#
# - {cite:t}`wang2019learning` trained deep encoders for translation with pre-LN. Their deepest, with 30 layers, also gives each layer a learned mix of all layers below.
# - {cite:t}`nguyen2019transformers` found it a gain on small corpora, without any warm-up, and a loss on a large one.
# - {cite:t}`liu2020understanding` argue that large gradients are not the whole story: in post-LN, small changes of weights are amplified from layer to layer. They keep post-LN and change the first weights.
# - GPT-2 moved the norm to the input of each sub-layer and added one after the last layer. It also divided the first weights of residual layers by the root of their number, against the growth of {numref}`fig-stream` {cite:p}`radford2019language`. T5 and Llama have pre-LN too {cite:p}`raffel2020exploring,touvron2023llama`.
# - Gemma 2 has the sandwich. OLMo 2 has the fourth picture of {numref}`fig-frames`: one norm, *behind* the sub-layer and inside the residual, $x + \mathrm{norm}(\mathrm{Sublayer}(x))$ {cite:p}`olmo2024olmo2`. You write it in Exercise 26.3.
#
# ## How it breaks
#
# - *No final norm.* The first loss is far above $\ln V$. Print it. We show the first loss only. Within a few hundred steps a small model can repair this.
# - *A final norm on the decoder alone.* Everything runs; keys and values of cross-attention are too large, and the more so the deeper the encoder.
# - *The norm on the direct way.* `x = norm(x); x = x + sublayer(x)` looks like pre-LN. The stream is cut at every layer. Silence the sub-layers: the output must equal the input, to the last bit.
# - *Weights in the wrong frame.* The frames' weights have the same names and shapes. With `final_norm` equal in both configs, nothing reports the mistake. Compare logits.
#
# ## Takeaways
#
# - Pre-LN leaves the direct way free: {eq}`eq-pre-norm`. Its derivative contains the identity.
# - The stream then grows with depth, so each stack needs a final norm; the encoder's serves cross-attention.
# - Before the first step, pre-LN's gradients at the top shrink like one over the root of the depth. In post-LN they do not.
# - Here pre-LN trained at every depth, with and without warm-up. Post-LN began to learn only at six layers with the warm-up. At 12 and 24 it did not, in our few steps.
# - With two layers pre-LN alone was no gain. Its gain came with depth.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 26.1.** A stream starts with standard deviation 1. Each of 2 sub-layers in each of 24 layers adds an answer of standard deviation 1, and no two of them have anything to do with each other. What is the standard deviation at the top? And after how many layers is it 5? Answer with the two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("26.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# # Variances add up: 1 + 48 at the top, and 1 + 2 n = 25.
# answer = [49**0.5, 12]
# check("26.1", answer)

# %% [markdown]
# **Exercise 26.2.** How many parameters does `PRE_LN` add to the base model of the paper? And `SandwichNorm` with a final norm? Answer with the two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("26.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# from transformer_annotated import count_parameters
#
# base = count_parameters(PAPER_BASE)["total"]
# answer = [
#     count_parameters(patch(PAPER_BASE, change))["total"] - base for change in (PRE_LN, SANDWICH)
# ]
# check("26.2", answer)

# %% [markdown]
# **Exercise 26.3.** Write OLMo 2's frame: one norm, behind the sub-layer and inside the residual, with dropout last. A class with the arguments of `PreNorm`. Answer with the class.

# %% tags=["active-ipynb"]
# answer = ...
# check("26.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# class InsideNorm(PreNorm):
#     def forward(self, x: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
#         return x + self.dropout(self.norm(sublayer(x)))
#
#
# check("26.3", InsideNorm)

# %% [markdown]
# **Exercise 26.4.** A silent post-LN frame forgets mean and size. Send the vector $(2, 4, 6, 8)$ through six silent DeepNorm frames with $\alpha = 3$. What comes out? Think before you compute: four numbers, to three digits.

# %% tags=["active-ipynb"]
# answer = ...
# check("26.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# # A norm does not see a factor: the result is that of one norm, (x - 5) / sqrt(5).
# answer = [(number - 5) / 5**0.5 for number in (2, 4, 6, 8)]
# check("26.4", answer)
