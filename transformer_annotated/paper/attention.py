# %% [markdown]
r"""
# Scaled dot-product attention

One query, three keys, three values, and a weighted average: from numbers worked by hand to a loop, from the
loop to two matrix products, and from those to the function `attend`. Masks say what may be seen.
"""

# %% [markdown]
# Chapter 1 had a decoder that looked back at the source and took a weighted average of it. This chapter keeps the
# weighted average and throws the recurrence away.

# %% mystnb={"figure": {"caption": "Chapter 3 of Part I: attention, the one operation in which positions exchange information.", "name": "fig-map-attention"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The third, Attention, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(3);

# %%
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# %% [markdown]
# ## Three tokens by hand
#
# Take a sentence of three words: *der Hund schläft*. Each word has a **key**, a short vector that says what it is,
# and a **value**, a vector with what it has to tell. Somebody asks a question, and the question is a vector
# too: the **query**. Here all vectors have two numbers, chosen so that you can compute along.

# %% tags=["active-ipynb"]
# words = ["der", "Hund", "schläft"]
# key = torch.tensor([[1.0, 0.0], [1.0, 2.0], [0.0, 2.0]])
# value = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
# query = torch.tensor([1.0, 1.0])

# %% [markdown]
# How well does each key answer the query? Multiply number by number and add up: the dot product. Do it on paper
# first. For *Hund*: $1 \cdot 1 + 1 \cdot 2 = 3$.

# %% tags=["active-ipynb"]
# scores = torch.tensor([float(query[0] * k[0] + query[1] * k[1]) for k in key])
# scores

# %% [markdown]
# Scores can be any numbers. Weights should be positive and sum to one. The softmax does that: $e^{s}$ for each
# score, divided by the sum of all three.

# %% tags=["active-ipynb"]
# weights = scores.exp() / scores.exp().sum()
# for word, s, w in zip(words, scores.tolist(), weights.tolist(), strict=True):
#     print(f"{word:8s} score {s:.0f}   weight {w:.3f}")

# %% [markdown]
# *Hund* gets two thirds of the attention, *schläft* a quarter, *der* what is left. The answer to the query is the
# average of the values in these proportions:

# %% tags=["active-ipynb"]
# answer_by_hand = sum(w * v for w, v in zip(weights, value, strict=True))
# answer_by_hand

# %% [markdown]
# That is attention: score, softmax, average. Two things will be added. The scores will be divided by a number, and
# some keys will be hidden. Everything else in this chapter is bookkeeping.
#
# ## A loop over queries
#
# In a sentence every word asks. With $T$ queries and $S$ keys the three steps run $T$ times. Written as
# loops over one sentence, nothing is hidden:

# %%
def attend_by_loop(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention for one head of one sentence, one number at a time: the book's slow reference.

    q is `(T, d)`, k `(S, d)`, v `(S, e)`; the result is `(T, e)`.
    """
    rows = []
    for query in q:
        scores = torch.stack([(query * key).sum() * scale for key in k])
        weights = scores.exp() / scores.exp().sum()
        rows.append(sum(w * value for w, value in zip(weights, v, strict=True)))
    return torch.stack(rows)

# %% tags=["active-ipynb"]
# three_queries = torch.tensor([[1.0, 1.0], [0.0, 1.0], [2.0, -1.0]])
# attend_by_loop(three_queries, key, value, scale=1.0)

# %% [markdown]
# The first row is the answer we had.
#
# ## Two matrix products
#
# All the dot products of all queries with all keys are one matrix product, $QK^\top$: row $i$, column $j$ holds
# query $i$ times key $j$. The weighted averages are a second one.

# %% tags=["active-ipynb"]
# scores = three_queries @ key.T  # (T, S)
# result = torch.softmax(scores, dim=-1) @ value  # (T, e)
# assert torch.allclose(result, attend_by_loop(three_queries, key, value, scale=1.0))
# result

# %% [markdown]
# No loop is left. Each row of the softmax looks at one row of scores: `dim=-1`, over the keys. Over the wrong axis the
# shapes still fit, and the columns sum to one instead of the rows. {numref}`fig-by-hand`
# shows the right way round.

# %% mystnb={"figure": {"caption": "Each row sums to one: every query divides one unit of attention among the keys.", "name": "fig-by-hand"}, "image": {"alt": "A heat map of three rows, one a query, and three columns, the words der, Hund and schl\u00e4ft. In the first row Hund has 0.67. The third row gives der 0.87."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# from transformer_annotated import figures
#
# fig, ax = plt.subplots(figsize=(7.2, 2.4))
# figures.heatmap(
#     ax,
#     torch.softmax(scores, dim=-1),
#     rows=["query 1", "query 2", "query 3"],
#     cols=words,
#     values=".2f",
#     vmin=0,
#     vmax=1,
# )
# ax.set_xticklabels(words, rotation=0)
# ax.set_title("attention weights");

# %% [markdown]
# Read it by rows. Query 1 is ours. Query 3 has −1 in second place, so keys with a large second number score low, and
# *der* is what remains.
#
# ## Why divide by $\sqrt{d}$
#
# Vectors of two numbers are for paper. Real queries and keys have 64. What happens to a dot product when vectors get
# longer? Draw queries and keys with independent numbers of mean 0 and variance 1, and look.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# for d in (4, 16, 64, 256, 1024):
#     q, k = torch.randn(4000, d), torch.randn(4000, d)
#     dots = (q * k).sum(dim=-1)
#     print(
#         f"d = {d:4d}   variance of q·k = {dots.var():7.1f}   after division = {(dots / d**0.5).var():.2f}"
#     )

# %% [markdown]
# The variance is $d$, up to chance: a sum of $d$ products, each of variance 1. So typical scores grow like
# $\sqrt{d}$, and a softmax over large scores puts nearly everything on one key. That is bad for learning, not because
# a sharp answer is wrong, but because a saturated softmax has almost no gradient.

# %%
def saturation(widths: Sequence[int], n_keys: int = 32, trials: int = 400) -> dict[str, Tensor]:
    """Mean norm of d(weights)/d(scores) for random queries and keys, without and with 1/sqrt(d).

    Measured for each width d; the norm is that of the softmax's Jacobian, diag(w) - w w^T.
    """
    generator = torch.Generator().manual_seed(0)
    norms: dict[str, list[Tensor]] = {"unscaled": [], "scaled": []}
    for d in widths:
        q = torch.randn(trials, 1, d, generator=generator)
        k = torch.randn(trials, n_keys, d, generator=generator)
        scores = (q @ k.transpose(-2, -1))[:, 0]  # (trials, S)
        for name, s in (("unscaled", scores), ("scaled", scores / d**0.5)):
            w = s.softmax(dim=-1)
            jacobian = torch.diag_embed(w) - w[:, :, None] * w[:, None, :]
            norms[name].append(torch.linalg.matrix_norm(jacobian).mean())
    return {name: torch.stack(values) for name, values in norms.items()}

# %% mystnb={"figure": {"caption": "Without the division the gradient that passes through the softmax fades as heads get wider; with it, the gradient does not depend on the width.", "name": "fig-saturation"}, "image": {"alt": "A line chart, head width from 4 to 1024 on a logarithmic axis against gradient size. The unscaled curve falls towards zero; the scaled curve is flat."}} tags=["active-ipynb"]
# widths = [4, 16, 64, 256, 1024]
# norms = saturation(widths)
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# ax.plot(widths, norms["unscaled"], "o-", label="q·k")
# ax.plot(widths, norms["scaled"], "s-", label="q·k / √d")
# ax.set(
#     xscale="log",
#     xticks=widths,
#     xticklabels=widths,
#     ylim=(0, None),
#     xlabel="head width d",
#     ylabel="gradient through the softmax",
# )
# ax.minorticks_off()
# ax.legend();

# %% [markdown]
# In {numref}`fig-saturation`, follow the blue curve from left to right: the wider the head, the less gets through. The
# orange one stays where it is. For narrow heads there is no loss; at the paper's 64 it has begun, and at 1024 about a quarter is left. What the
# division buys is that the width stops mattering. Dividing by $\sqrt{d}$ makes the variance of the scores 1 at every width, and this is
# the paper's equation 1 {cite:p}`vaswani2017attention`:
#
# $$
# \mathrm{Attention}(Q, K, V) = \mathrm{softmax}\!\left(\frac{Q K^\top}{\sqrt{d}}\right) V
# $$ (eq-attention)
#
# Bahdanau's attention from Chapter 1 computed each score with a small network. The dot product needs no parameters and
# is one matrix product for all pairs. The paper reports, citing {cite:t}`britz2017massive`, that the two are alike in quality at small widths and that
# additive attention is better at large ones without the division. It suspects the reason you have just measured (section 3.2.1).
#
# ## What may be seen
#
# A decoder's input is shifted by one place, as in Chapter 1: place 3 holds word 2 and must predict word 3. So place 3 may see places 1 to 3, itself
# included, and nothing later. A batch with a short sentence has filler at its end, called **padding**, and nobody should look at that. Both are
# the same thing: for some pairs of query and key, the answer to *may I look?* is no. A
# table of yes and no for all pairs is a **mask**.
#
# Conventions differ, and mixing them up is the classic mistake: PyTorch's `nn.MultiheadAttention` says True for
# *ignore*, its `scaled_dot_product_attention` says True for *may be seen*, older code adds 0 and −10⁹. In this book
# **True means: may be seen**, everywhere. And a mask is a value that says what it is. It is not yet a table; it becomes
# one when somebody needs it.

# %%
@dataclass(frozen=True, eq=False)
class Mask:
    """Which keys a query may see, as a value. `True` always means *may be seen*.

    The rules are joined: a key is visible if every rule allows it. With T queries and S keys the
    last query stands at the last key, so a single new query may see a whole cache of keys.

    Attributes:
        causal: a query sees no key that stands after it.
        padding: `(B, S)` bool, True for a real key, False for padding.
        window: a query sees only keys less than `window` positions away, itself included.
        allowed: `(T, S)` or `(B, T, S)` bool: any further rule.

    Raises ValueError for a tensor that is not bool or has the wrong rank, and for `window` < 1.
    """

    causal: bool = False
    padding: Tensor | None = None
    window: int | None = None
    allowed: Tensor | None = None

    def __post_init__(self) -> None:
        for name, ranks in (("padding", (2,)), ("allowed", (2, 3))):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tensor.dtype != torch.bool:
                raise ValueError(f"{name} must be bool (True = visible), got {tensor.dtype}")
            if tensor.ndim not in ranks:
                raise ValueError(f"{name} must have rank {ranks}, got {tuple(tensor.shape)}")
        if self.window is not None and (not isinstance(self.window, int) or self.window < 1):
            raise ValueError(f"window must be a whole number of at least 1, got {self.window!r}")

    def __and__(self, other: "Mask") -> "Mask":
        """Both masks at once: visible only where both allow it."""
        windows = [w for w in (self.window, other.window) if w is not None]
        return Mask(
            causal=self.causal or other.causal,
            padding=_both(self.padding, other.padding),
            window=min(windows, default=None),
            allowed=_both(self.allowed, other.allowed),
        )

    def dense(self, B: int, T: int, S: int, device: torch.device | None = None) -> Tensor | None:
        """The mask as a bool tensor that broadcasts to `(B, H, T, S)`; None if all is visible."""
        visible = None
        if self.causal or self.window is not None:
            i = torch.arange(S - T, S, device=device)[:, None]  # (T, 1)
            j = torch.arange(S, device=device)  # (S,)
            if self.causal:
                visible = j <= i  # (T, S)
            if self.window is not None:
                visible = _both(visible, (i - j).abs() < self.window)
        if self.allowed is not None:
            if self.allowed.shape not in ((T, S), (B, T, S), (1, T, S)):
                raise ValueError(
                    f"allowed must be {(T, S)} or {(B, T, S)}, got {tuple(self.allowed.shape)}"
                )
            rule = self.allowed if self.allowed.ndim == 2 else self.allowed[:, None]
            visible = _both(visible, rule)
        if self.padding is not None:
            if self.padding.shape != (B, S):
                raise ValueError(f"padding must be {(B, S)}, got {tuple(self.padding.shape)}")
            visible = _both(visible, self.padding[:, None, None, :])
        return visible


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a & b

# %% [markdown]
# Four rules, joined by *and*. `causal` and `padding` are the paper's. `window` and `allowed` wait for Part III. Draw
# the first two for a batch of one sentence with six places, the last two of them filler.

# %% mystnb={"figure": {"caption": "A padding mask hides columns, a causal mask hides the upper triangle; joined, a key must pass both.", "name": "fig-masks"}, "image": {"alt": "Three grids of six by six, queries down and keys across. Left: the last two columns are blue. Middle: the triangle above the diagonal is blue. Right: both."}} tags=["active-ipynb"]
# real = torch.tensor([[True] * 4 + [False] * 2])
# padding, causal = Mask(padding=real), Mask(causal=True)
# fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), sharey=True)
# names = ["padding", "causal", "padding & causal"]
# for ax, name, mask in zip(axes, names, (padding, causal, padding & causal), strict=True):
#     table = mask.dense(1, 6, 6).expand(1, 1, 6, 6)[0, 0]
#     figures.heatmap(
#         ax,
#         (~table).float(),
#         rows="123456",
#         cols="123456",
#         title=name,
#         vmin=0,
#         vmax=1.4,
#         col_label="key",
#     )
# axes[0].set_ylabel("query");

# %% [markdown]
# White is visible, blue is hidden. In {numref}`fig-masks`, read a row to learn what one query sees. Row 1 of the causal mask sees
# only key 1. In the right grid rows 5 and 6 belong to filler. They see the four real keys, nobody will read what they
# compute, and that is fine.
#
# With fewer queries than keys, as when one new word is decoded after many, the last query stands at the last key:

# %% tags=["active-ipynb"]
# print(Mask(causal=True).dense(1, 2, 5).int())

# %% [markdown]
# The two queries are the fourth and the fifth of five. PyTorch's own `is_causal=True` aligns the other way, with
# query 1 at key 1. It is the same when $T = S$ and wrong for a cache. A mask also refuses what would be misread:

# %% tags=["active-ipynb"]
# for attempt in (
#     lambda: Mask(padding=torch.tensor([[1, 1, 0]])),
#     lambda: Mask(padding=torch.tensor([True, True, False])),
#     lambda: Mask(window=0),
#     lambda: Mask(padding=torch.ones(2, 3, dtype=torch.bool)).dense(2, 4, 4),
# ):
#     try:
#         attempt()
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## Hidden means weight zero
#
# A hidden key should get weight exactly zero. The usual trick sets its score to $-\infty$ before the softmax, since
# $e^{-\infty} = 0$. It fails in one case: a query that may see *nothing*. All its scores are $-\infty$, the softmax divides
# 0 by 0, and the result is not a number. One such row poisons every gradient.

# %% tags=["active-ipynb"]
# scores = torch.zeros(2, 3, requires_grad=True)
# hidden = torch.tensor([[False, False, True], [True, True, True]])
# torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)

# %% [markdown]
# The first row is right: two visible keys, half each. The second is `nan`. Does that case occur? Yes: a row of pure
# filler, a window that has moved past every key. So we do it in two steps. Hidden scores become the smallest finite
# number, which keeps the softmax finite. Then hidden weights become exactly 0. A query that sees something gets the
# same numbers as before. A query that sees nothing gets zeros, and finite gradients.
#
# In four lines, for one head of one sentence:

# %% tags=["active-ipynb"]
# def attend_plain(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
#     scores = q @ k.T / q.shape[-1] ** 0.5
#     scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
#     weights = torch.softmax(scores, dim=-1).masked_fill(~visible, 0.0)
#     return weights @ v
#
#
# attend_plain(
#     three_queries, key, value, torch.tensor([[True] * 3, [True, False, False], [False] * 3])
# )

# %% [markdown]
# Three rows: a query that sees everything, one that sees only *der*, one that sees nothing.
#
# The library's version does the same for whole batches. Seven letters name its shapes, here and everywhere: $B$ sentences, $H$ query heads, $K$ key
# heads, $T$ queries, $S$ keys, $d$ numbers in a query or key, $e$ in a value. Heads are the next chapter; until then $H = K = 1$, one more axis in
# front. It also has arguments that do nothing unless a later part uses them: `bias` adds something to the scores, `softcap` squashes them, `scale` replaces
# $1/\sqrt{d}$. Skip them on a first reading.
#
# `Bias` is anything that can be added to the scores. `Attend` is the signature that `attend` will have.

# %%
class Bias(Protocol):
    """A number added to each score, such as ALiBi's. Part I has none."""

    def dense(self) -> Tensor:
        """The bias as a tensor that broadcasts to `(B, H, T, S)`."""


class Attend(Protocol):
    """The seam: any function with this signature may compute attention."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask | None = None,
        *,
        bias: Bias | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> Tensor: ...

# %%
def attention_weights(
    q: Tensor,
    k: Tensor,
    mask: Mask | None = None,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """How much each query attends to each key: `(B, H, T, S)`, rows that sum to one.

    A query that may see nothing gets a row of zeros. The arguments are those of `attend`.
    """
    (B, H, T, d), (K, S) = q.shape, k.shape[1:3]
    k = k if K == H else k.repeat_interleave(H // K, dim=1)  # each key head serves H/K query heads
    scale = d**-0.5 if scale is None else scale
    scores = (q * scale) @ k.transpose(-2, -1)  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.dense()
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    visible = None if mask is None else mask.dense(B, T, S, q.device)
    if visible is None:
        return torch.softmax(scores, dim=-1).to(q.dtype)
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    return weights.masked_fill(~visible, 0.0).to(q.dtype)

# %% [markdown]
# Read it against {eq}`eq-attention`. `(q * scale) @ k.transpose` is $QK^\top / \sqrt{d}$. The factor goes to the queries
# first, which is the same up to rounding and overflows later in 16 bits. `scores.to(...)` makes the softmax at least 32 bits
# wide. `repeat_interleave` runs only if there are fewer key heads than query heads. The paper has neither that nor `bias` nor `softcap`.

# %%
def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q `(B, H, T, d)`, k `(B, K, S, d)` and v `(B, K, S, e)` fit."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.ndim == k.ndim == v.ndim == 4):
        raise ValueError(f"q, k and v must have rank 4 (B, H, T, d), got {shapes}")
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q (B, H, T, d), k (B, K, S, d) and v (B, K, S, e) do not fit: {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the heads of q must be a multiple of the heads of k, got {shapes}")

# %%
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention, written out (Vaswani et al. 2017, section 3.2.1).

    Args:
        q: queries `(B, H, T, d)`.
        k: keys `(B, K, S, d)`; K divides H, and each key head serves H/K query heads.
        v: values `(B, K, S, e)`.
        mask: which keys may be seen; None for all.
        bias: added to the scores; None in the paper.
        scale: multiplies the scores; None for 1/sqrt(d), as in the paper.
        softcap: squashes scores into (-softcap, softcap); None in the paper.
        dropout: probability of dropping a weight; the caller passes 0 outside training.

    Returns:
        `(B, H, T, e)`. A query that may see nothing gets exactly zero.

    Raises:
        ValueError: shapes that do not fit.
    """
    check_heads(q, k, v)
    weights = attention_weights(q, k, mask, bias=bias, scale=scale, softcap=softcap)
    v = v if v.shape[1] == q.shape[1] else v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    return F.dropout(weights, dropout) @ v  # (B, H, T, e)

# %% [markdown]
# `Attend`, above, is a type: any function with this signature. It is the first **seam** of the model, a place where one
# part can be exchanged for another. A faster way to compute the same function, such as FlashAttention, will come in here.
#
# ## Proof
#
# First our own example, then a slow reference, then PyTorch's. Numbers alone are not enough. Two functions can agree in
# value and differ in slope, and training follows the slope. So each comparison checks outputs *and* gradients.

# %% tags=["active-ipynb"]
# q, k, v = (x[None, None] for x in (query[None], key, value))
# assert torch.allclose(attend(q, k, v, scale=1.0)[0, 0, 0], answer_by_hand)
# attend(q, k, v, scale=1.0)

# %% tags=["active-ipynb"]
# def heads(T: int, S: int, B: int = 2, H: int = 3, d: int = 8) -> list[Tensor]:
#     """Random q, k, v in double precision that ask for gradients."""
#     shapes = ((B, H, T, d), (B, H, S, d), (B, H, S, d))
#     return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
#
#
# def gradients(output: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
#     """Gradients of a fixed random projection of the output, so that no error can cancel."""
#     generator = torch.Generator().manual_seed(1)
#     direction = torch.randn(output.shape, generator=generator, dtype=output.dtype)
#     return torch.autograd.grad(output, inputs, direction)
#
#
# torch.manual_seed(0)
# inputs = heads(5, 7)
# ours = attend(*inputs)
# loop = torch.stack(
#     [
#         torch.stack([attend_by_loop(*(x[b, h] for x in inputs), scale=8**-0.5) for h in range(3)])
#         for b in range(2)
#     ]
# )
# for a, b in zip((ours, *gradients(ours, inputs)), (loop, *gradients(loop, inputs)), strict=True):
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("output and three gradients equal the loop's, to 1e-10")

# %% [markdown]
# With masks, against PyTorch. The hard case is among them: sentence 2 has a padding row that hides every key.

# %% tags=["active-ipynb"]
# import torch.nn.functional as F
#
# real = torch.rand(2, 7) > 0.4
# real[1] = False
# rules = {
#     "causal": Mask(causal=True),
#     "padding": Mask(padding=real),
#     "both": Mask(causal=True, padding=real),
#     "any table": Mask(allowed=torch.rand(2, 5, 7) > 0.5),
# }
# for name, mask in rules.items():
#     ours = attend(*inputs, mask)
#     theirs = F.scaled_dot_product_attention(*inputs, attn_mask=mask.dense(2, 5, 7))
#     for a, b in zip(
#         (ours, *gradients(ours, inputs)), (theirs, *gradients(theirs, inputs)), strict=True
#     ):
#         torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
#     print(f"{name:9s} equal to PyTorch in value and gradient")
# print("a query that sees nothing gives", attend(*inputs, rules["padding"])[1].abs().max().item())

# %% [markdown]
# Exactly zero, and every gradient finite, or the comparison would have failed.
#
# ## The same function from the library
#
# `torch.nn.functional.scaled_dot_product_attention`, SDPA for short, computes {eq}`eq-attention` without writing the matrix
# of weights to memory where it can. `sdpa` gives it our signature. It hands over `is_causal` when that is all the mask says,
# because the fused kernels know that case, and it refuses a soft-cap, which SDPA does not offer. An implementation that
# cannot honour an argument must say so.

# %%
def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask | None = None,
    *,
    bias: Bias | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """`attend`, computed by `torch.nn.functional.scaled_dot_product_attention`.

    Raises ValueError for `softcap`, which that function does not offer.
    """
    check_heads(q, k, v)
    if softcap is not None:
        raise ValueError(f"sdpa cannot honour softcap={softcap}; use attend")
    mask = mask or Mask()
    (B, _, T, _), S = q.shape, k.shape[2]
    rules = (mask.padding, mask.window, mask.allowed, bias)
    plain = T == S and all(rule is None for rule in rules)  # the fused kernels know this case
    visible: Tensor | None = None
    if not plain:
        visible = mask.dense(B, T, S, q.device)
        if bias is not None:
            added = bias.dense().to(q.dtype)
            visible = added if visible is None else added.masked_fill(~visible, -torch.inf)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=visible, dropout_p=dropout, is_causal=plain and mask.causal,
        scale=scale, enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip

# %% tags=["active-ipynb"]
# for mask in rules.values():
#     torch.testing.assert_close(sdpa(*inputs, mask), attend(*inputs, mask), rtol=0, atol=1e-10)
# try:
#     sdpa(*inputs, softcap=30.0)
# except ValueError as error:
#     print(error)

# %% [markdown]
# The default model of this book computes attention by the formula, so that you can look inside. Where speed counts, one patch
# exchanges `attend` for `sdpa`, and nothing else changes. What that buys depends on the length of the sentences and on the
# machine.
#
# ## What it costs
#
# Every query meets every key: $T \cdot S$ scores for each head. Twice the sentence, four times the work and four times the
# memory for the weights.

# %% tags=["active-ipynb"]
# for T in (128, 1024, 8192, 131072):
#     print(f"T = {T:6d}   weights of one head in 32 bits: {4 * T * T / 2**20:10.1f} MiB")

# %% [markdown]
# At 128 words nobody notices. At 131,072 the weights of a single head take 64 GiB, most of an 80 GB accelerator. Much of what happened between
# 2017 and today is an answer to this column: kernels that never store the weights {cite:p}`dao2022flashattention`, windows
# that hide distant keys {cite:p}`beltagy2020longformer,jiang2023mistral`. Later parts will build both.
#
# ## How it breaks
#
# - *An inverted mask.* Training loss may fall to almost nothing while translations are rubbish: the decoder has been
#   copying the word it should predict. Check that changing a later word leaves earlier outputs untouched.
# - *The softmax over the wrong axis.* Rows no longer sum to one. Assert it once on real weights.
# - *A float mask of zeros and ones.* Some functions *add* it to the scores, so hidden keys lose only a little. `Mask` takes
#   bool and nothing else.
# - *A missing $\sqrt{d}$.* Print the variance of the scores: it should be near 1 at the start.
# - *A row of `nan`.* Some query sees nothing, and somebody used $-\infty$.
#
# ## Takeaways
#
# - Attention is score, softmax, average: {eq}`eq-attention`, two matrix products.
# - Division by $\sqrt{d}$ keeps the scores at variance 1, so that gradients pass through the softmax.
# - A mask says what may be seen. True means visible. A query that sees nothing gets zero.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 3.1.** A query meets four keys and its scores are all equal. What weight does each key get? And if one of the four is hidden?
# Answer with a list of two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("3.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# scores = torch.zeros(1, 1, 1, 4)
# seen = torch.tensor([[True, True, True, False]])
# q, k = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 4, 2)
# answer = [
#     attention_weights(q, k)[0, 0, 0, 0].item(),
#     attention_weights(q, k, Mask(padding=seen))[0, 0, 0, 0].item(),
# ]
# check("3.1", answer)

# %% [markdown]
# **Exercise 3.2.** Queries have variance 4 in each number, keys variance 1, and a head is 64 wide. By what should the scores be divided so
# that their variance is 1?

# %% tags=["active-ipynb"]
# answer = ...
# check("3.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = (4 * 64) ** 0.5
# check("3.2", answer)

# %% [markdown]
# **Exercise 3.3.** Write a function `weights(scores, visible)` for `(T, S)` tensors, with zeros in the row of a query that sees nothing,
# *without* ever using the smallest finite number. Hint: choose harmless scores for such a row first.

# %% tags=["active-ipynb"]
# answer = ...
# check("3.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def solution(scores: Tensor, visible: Tensor) -> Tensor:
#     some = visible.any(dim=-1, keepdim=True)
#     safe = scores.masked_fill(~visible, -torch.inf).masked_fill(~some, 0.0)
#     return torch.softmax(safe, dim=-1) * some
#
#
# check("3.3", solution)

# %% [markdown]
# **Exercise 3.4.** A causal mask over 5 keys and a window of 3, itself included: how many of the 25 pairs are visible?

# %% tags=["active-ipynb"]
# answer = ...
# check("3.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = int(Mask(causal=True, window=3).dense(1, 5, 5).sum())
# check("3.4", answer)
