# %% [markdown]
r"""
# The objective

What training lowers: cross-entropy with smoothed labels, summed over real tokens and divided once. The scores of a large vocabulary are never
held all at once.
"""

# %% [markdown]
# Chapter 10 had a loss in one line, and Chapter 11 smoothed its labels. Three things were left open. What does smoothing do to the probabilities? How are batches of different size averaged? And where do 3.7 gigabytes of logits go? At the end the same
# machinery takes a second objective, R-Drop.

# %% mystnb={"figure": {"caption": "Chapter 15 of Part II: what training lowers.", "name": "fig-map-objective"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The fourth, Objective, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(15);

# %%
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from transformer_annotated.paper.embedding import Head
from transformer_annotated.paper.parts import check_sizes
from transformer_annotated.paper.toy import Batch
from transformer_annotated.paper.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# ## How sure should a model be?
#
# A vocabulary of four words, and the second is the right one. Cross-entropy asks for the probabilities 0, 1, 0, 0. With a smoothing of $\epsilon = 0.1$, a tenth is taken from the right word and spread evenly over all four:

# %% tags=["active-ipynb"]
# epsilon, V = 0.1, 4
# q = torch.full((V,), epsilon / V)
# q[1] += 1 - epsilon
# print("asked for ", [round(share, 3) for share in q.tolist()])
# logits = torch.tensor([0.5, 3.0, 1.0, -1.0])
# log_p = logits.log_softmax(dim=-1)
# print(f"plain loss {-log_p[1]:.4f}   smoothed {-(q * log_p).sum():.4f}")

# %% [markdown]
# In letters: for logits $z$ with $p = \mathrm{softmax}(z)$, the right word $y$, and $[w = y]$ which is 1 for it and 0 for the others,
#
# $$
# \mathcal{L} = -\sum_w q(w) \ln p(w), \qquad q(w) = (1 - \epsilon)\,[w = y] + \frac{\epsilon}{V}.
# $$ (eq-objective)
#
# Section 5.4 of the paper uses $\epsilon_{ls} = 0.1$ {cite:p}`vaswani2017attention`, after {cite:t}`szegedy2016rethinking`. The part of the sum with $\epsilon / V$ is $\epsilon$ times the mean of $\ln p$, so the code needs no table of $q$. It returns two numbers. The loss is what training lowers. **nll**, for *negative log-likelihood*, is the plain
# $-\ln p(y)$, to be reported.

# %%
def check_smoothing(smoothing: float) -> None:
    """Raise ValueError for a smoothing outside [0, 1)."""
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")


def smoothed(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Sums of the smoothed loss (section 5.4) and of -log p, for logits `(n, V)`, targets `(n,)`.

    Both are in nats; the first is differentiable, the second is detached.
    """
    log_p = logits.log_softmax(dim=-1)
    nll = -log_p.gather(-1, target[:, None]).sum()
    spread = -log_p.mean(dim=-1).sum()
    return (1 - smoothing) * nll + smoothing * spread, nll.detach()

# %% [markdown]
# The same as PyTorch's own function, in value and gradient:

# %% tags=["active-ipynb"]
# import torch.nn.functional as F
#
# torch.manual_seed(0)
# logits = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
# target = torch.randint(50, (6,))
# for epsilon in (0.0, 0.1, 0.5):
#     ours, _ = smoothed(logits, target, epsilon)
#     theirs = F.cross_entropy(logits, target, label_smoothing=epsilon, reduction="sum")
#     torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
#     gradients = [torch.autograd.grad(loss, logits)[0] for loss in (ours, theirs)]
#     torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
#     print(f"smoothing {epsilon}: {ours.item():.4f}, and the same gradient")

# %% [markdown]
# What does it ask for? Let the right word's logit be $g$ above all others, which are equal. Turn $g$ up and watch the loss:

# %% mystnb={"figure": {"caption": "Without smoothing the loss falls for ever; with it, a gap that grows too large costs again.", "name": "fig-gap"}, "image": {"alt": "Two curves of the loss over the gap between the right logit and the others. One falls towards zero. The other has a minimum at a finite gap, marked with a dot, and rises after it in a straight line."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# V = 1000
# gaps = torch.linspace(0, 20, 201, dtype=torch.float64)
# rows = torch.zeros(201, V, dtype=torch.float64)
# rows[:, 0] = gaps
# first = torch.zeros(1, dtype=torch.long)
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for epsilon in (0.0, 0.1):
#     losses = [smoothed(row[None], first, epsilon)[0].item() for row in rows]
#     ax.plot(gaps, losses, label=f"smoothing {epsilon}")
# best = math.log((1 - epsilon + epsilon / V) / (epsilon / V))
# lowest = smoothed(F.pad(torch.tensor([[best]]), (0, V - 1)), first, epsilon)[0].item()
# ax.plot(best, lowest, "o", color="black", label="lowest")
# ax.set(xlabel="gap between the right logit and the others", ylabel="loss in nats", ylim=(0, None))
# ax.legend();

# %% [markdown]
# Without smoothing there is no end: a larger gap is always better, and the weights grow to make it. With smoothing the best gap in {numref}`fig-gap` is finite. There $p = q$, and the loss is not zero. It is the entropy of $q$.
#
# So a model trained this way holds something back, on purpose. Its *perplexity*, $e$ to the mean nll, gets worse. The paper says so: "This hurts perplexity, as the model learns to be more unsure, but improves accuracy and BLEU score" (section 5.4). Here is the price, for a model that has reached its goal exactly:

# %% tags=["active-ipynb"]
# for V in (1000, 37_000):
#     goal = 0.9 + 0.1 / V
#     entropy = -goal * math.log(goal) - (V - 1) * 0.1 / V * math.log(0.1 / V)
#     print(
#         f"V = {V:6,}: lowest smoothed loss {entropy:.3f}, its nll {-math.log(goal):.3f} instead of 0"
#     )

# %% [markdown]
# Never compare a smoothed loss with a plain one. Compare nll. Across vocabularies not even nll per token can be compared, because the tokens differ. {cite:t}`muller2019label` study what else smoothing changes inside a model.
#
# ## Sums first, division last
#
# A batch too large for the memory is cut into **micro-batches**; their gradients are added up before one step of the optimiser. What must each be divided by? Take two. The first has 2 words with a loss of 6 each. The second has 98 words with a loss of 1.

# %% tags=["active-ipynb"]
# few, many = torch.full((2,), 6.0), torch.full((98,), 1.0)
# print(f"mean over all words   {torch.cat((few, many)).mean():.2f}")
# print(f"mean of the two means {(few.mean() + many.mean()) / 2:.2f}")

# %% [markdown]
# The second line is far too high: two words count as much as the other 98. The cure: keep *sums*, and divide once, by the number of words in all micro-batches together:
#
# $$
# \mathcal{L} = \frac{1}{n_1 + \dots + n_M} \sum_{m=1}^{M} \sum_{i=1}^{n_m} \mathcal{L}_{m,i}
# $$ (eq-sum)
#
# So an **objective** here returns sums, with the number of words beside them.

# %%
@dataclass(frozen=True)
class LossSum:
    """The loss of a batch as a sum, to be divided once, by all tokens of a step.

    Attributes:
        loss: scalar, differentiable: the sum over the real target tokens, in nats.
        nll: scalar, detached: the sum of -log p of those tokens, without smoothing or penalty.
        tokens: how many real target tokens there are.
    """

    loss: Tensor
    nll: Tensor
    tokens: int


class Objective(Protocol):
    """What the trainer asks for: a model and a batch to a sum of losses."""

    def __call__(self, model: Transformer, batch: Batch) -> LossSum: ...

# %%
def accumulate(objective: Objective, model: Transformer, batches: Sequence[Batch]) -> float:
    """Add to `.grad` the gradient of the mean loss per token over all micro-batches together.

    Returns that mean. Each sum is divided by the tokens of *all* batches, so their sizes do not
    matter. Raises ValueError where there is no token at all.
    """
    tokens = sum(batch.n_tokens for batch in batches)
    if tokens == 0:
        raise ValueError(f"batches must hold at least one target token, got {len(batches)} batches")
    total = 0.0
    for batch in batches:
        part = objective(model, batch)
        (part.loss / tokens).backward()
        total += part.loss.item() / tokens
    return total

# %% [markdown]
# `accumulate` works with anything that fits `Objective`. To see the difference, here is the plainest one, and a batch cut in two unequal parts. Gradients of 64-bit weights, so that rounding plays no part:

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, patch
# from transformer_annotated.paper.toy import collate
#
# SMALL = {"d_model": 32, "n_layers": 2, "dropout": 0.0, "ffn.d_ff": 64}
# HEADS = {"self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# small_model = Transformer(patch(PAPER_BASE, {**SMALL, "vocab_size": 50}, HEADS)).double()
#
#
# def plain(model: Transformer, batch: Batch, smoothing: float = 0.1) -> LossSum:
#     """All logits at once, as Part I did."""
#     logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
#     real = batch.tgt_padding
#     return LossSum(*smoothed(logits[real], batch.tgt_out[real], smoothing), int(real.sum()))
#
#
# def random_batch(*lengths: int) -> Batch:
#     """Pairs of random words, as long as asked for."""
#     return collate([(torch.randint(4, 50, (n,)).tolist(),) * 2 for n in lengths])

# %% tags=["active-ipynb"]
# whole = random_batch(3, 20, 24)
# parts = [Batch(*(getattr(whole, f.name)[rows] for f in fields(Batch))) for rows in ([0], [1, 2])]
# table = small_model.embedding.weight
#
#
# def gradient_of(batches: Sequence[Batch]) -> Tensor:
#     """The gradient of the embedding's table, by `accumulate`."""
#     small_model.zero_grad()
#     accumulate(plain, small_model, batches)
#     return table.grad.clone()
#
#
# wanted = gradient_of([whole])
# torch.testing.assert_close(gradient_of(parts), wanted, rtol=0, atol=1e-10)
# means = sum(plain(small_model, part).loss / part.n_tokens for part in parts) / 2
# (wrong,) = torch.autograd.grad(means, table)
# print(f"words in the micro-batches: {[part.n_tokens for part in parts]}")
# print("sum / total:   equal, to 1e-10")
# print(
#     f"mean of means: off by {(wrong - wanted).norm() / wanted.norm():.0%} of the gradient's length"
# )

# %% [markdown]
# Nothing fails in the wrong version. The loss goes down, and what it means depends on how the sentences happened to be cut. The widely used library `transformers` had this error until 2024 {cite:p}`debut2024fixing`. It is one of the [mutants](../mutants.md) of this book.
#
# ## 3.7 gigabytes
#
# The paper's batch has 25,000 target tokens, and its vocabulary 37,000 entries. The logits alone:

# %% tags=["active-ipynb"]
# n, V, D = 25_000, 37_000, 512
# print(f"logits        {n * V * 4 / 1e9:.2f} GB")
# print(f"vectors       {n * D * 4 / 1e9:.2f} GB")
# print(f"the weight    {V * D * 4 / 1e9:.2f} GB")

# %% [markdown]
# Plain training holds several tables of this size at the same time, among them the logarithms after the softmax and gradients. The measurement below shows about three. Everything else in this table is small. Yet the result is one number.
#
# Can the logits be made a piece at a time, as in this picture?

# %% tags=["hide-input"]
def draw_chunks(n: float = 2.5, d: float = 0.8, v: float = 3.7, chunk: float = 0.25) -> "Figure":
    """The vectors, the weight, and the logits of which only one strip exists."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(6.0, 3.2))
    x, top = d + 0.5, n + 0.3
    for left, low, width, height, name in (
        (0.0, 0.0, d, n, "vectors\n(n, D)"),
        (x, top, v, d, "weight (V, D), turned"),
        (x, 0.0, v, n, "logits (n, V)"),
    ):
        dashed = name.startswith("logits")
        face, line = ("white", "--") if dashed else ("#F3F6FA", "-")
        ax.add_patch(Rectangle((left, low), width, height, fc=face, ec="#555555", ls=line))
        ax.text(left + width / 2, low + height * 0.3, name, ha="center", va="center")
    for left, width in ((0.0, d), (x, v)):
        ax.add_patch(Rectangle((left, 0.6 * n), width, chunk, fc=figures.COLORS[0]))
    ax.text(x + v / 2, 0.6 * n + chunk / 2, "one chunk", ha="center", va="center", color="white")
    ax.set(xlim=(-0.1, x + v + 0.1), ylim=(-0.1, top + d + 0.1), aspect="equal")
    ax.axis("off")
    return figure

# %% mystnb={"figure": {"caption": "Only one strip of the logits exists at a time: some tokens, all words.", "name": "fig-chunks"}, "image": {"alt": "A tall narrow box of vectors, a wide flat box of the weight, and a large dashed box of logits. One horizontal strip of the vectors and of the logits is filled."}} tags=["active-ipynb"]
# draw_chunks();

# %% [markdown]
# The areas in {numref}`fig-chunks` show $n$ and $V$ in proportion. $D$ is drawn much wider than it is. The loss is a sum over tokens, so the forward pass is easy: some hundred tokens, their logits, their loss, next. But autograd would keep each piece for the backward pass, and all logits would be in memory again. The way out is to compute the gradient *at once*, while the piece is there. For a sum that is possible: the slope of the loss for a token's logits needs
# nothing from other tokens. By {eq}`eq-objective` it is, with vectors $h$ and weight $W$,
#
# $$
# \frac{\partial \mathcal{L}}{\partial z} = p - q, \qquad
# \frac{\partial \mathcal{L}}{\partial h} = (p - q)\, W, \qquad
# \frac{\partial \mathcal{L}}{\partial W} = (p - q)^\top h .
# $$ (eq-slope)
#
# What remains of a piece is $\partial \mathcal{L} / \partial h$, as small as $h$, and a sum for $W$. First the slope. It is written into the logits' own memory; the underscore in the name says so, as in PyTorch.

# %%
def smoothed_slope_(logits: Tensor, target: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """What `smoothed` returns; `logits` is overwritten with the loss's slope, p - q."""
    log_p = torch.log_softmax(logits, dim=-1)
    nll = -log_p.gather(-1, target[:, None]).sum()
    loss = (1 - smoothing) * nll
    if smoothing:
        loss = loss - smoothing * log_p.mean(dim=-1).sum()
    p = torch.exp(log_p, out=logits)
    p -= smoothing / p.shape[-1]
    p[torch.arange(len(p), device=p.device), target] -= 1 - smoothing
    return loss, nll

# %% tags=["active-ipynb"]
# room = logits.detach().clone()
# loss, _ = smoothed_slope_(room, target, 0.1)
# expected, _ = smoothed(logits, target, 0.1)
# torch.testing.assert_close(loss, expected.detach(), rtol=0, atol=1e-10)
# torch.testing.assert_close(room, torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-10)
# assert room.sum(dim=-1).abs().max() < 1e-12
# print("equal to autograd; the slopes of each token sum to zero")

# %% [markdown]
# The slopes of a token sum to zero: what some words gain, the others lose.
#
# Now the pieces. A loss may want to see more than one vector of logits for a token (R-Drop will want two), so we say only what a loss must offer, and call it a `Rule`.

# %%
class Rule(Protocol):
    """What is summed, for logits `(n, ..., V)` and targets `(n,)`; both give (loss, nll)."""

    @property
    def chunk(self) -> int | None: ...

    def sums(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums, differentiable."""
        ...

    def slope_(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums; `logits` is overwritten with the slope of the loss by each logit."""
        ...

# %% [markdown]
# PyTorch lets us write both directions ourselves, in a `torch.autograd.Function`. `forward` goes through the chunks and keeps the two gradients. `backward` multiplies them by whatever the loss was multiplied by later, such as one over the number of tokens.
#
# Read the loop against {eq}`eq-slope`: logits, slope, slope times $W$, slope times $h$. The rest is precision. Under autocast the products are computed in bfloat16, as autocast would do it; the softmax and all sums stay in float32.

# %%
class ChunkedLoss(torch.autograd.Function):
    """A linear head's loss and its gradient, some tokens at a time, both in the forward pass.

    The inputs are vectors `(n, ..., D)`, the weight `(V, D)`, the bias `(V,)` or None, targets
    `(n,)`, the rule, the head's scale and the tokens of a chunk. The sums of the loss and of
    -log p come out. Matrix products follow autocast; softmax and sums are at least float32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None,
        target: Tensor, rule: Rule, scale: float, chunk: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        x, w = in_autocast(hidden), in_autocast(weight)
        high = torch.promote_types(x.dtype, torch.float32)
        loss, nll = x.new_zeros(2, dtype=high).unbind()
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=high)
        db = None if bias is None else torch.zeros_like(bias, dtype=high)
        with torch.autocast(x.device.type, enabled=False):
            pieces = zip(x.split(chunk), target.split(chunk), dx.split(chunk), strict=True)
            for part, answers, d_part in pieces:
                logits = (part @ w.T).to(high)  # (m, ..., V)
                if bias is not None:
                    logits += bias
                if scale != 1:
                    logits *= scale
                more, more_nll = rule.slope_(logits, answers)  # logits now hold the slope
                loss, nll = loss + more, nll + more_nll
                if scale != 1:
                    logits *= scale
                slope = logits.to(x.dtype)
                torch.matmul(slope, w, out=d_part)
                add_product(dw, slope.flatten(0, -2), part.flatten(0, -2))
                if db is not None:
                    db += logits.flatten(0, -2).sum(dim=0)
        if bias is not None and db is not None:
            db = db.to(bias.dtype)
        ctx.save_for_backward(dx.to(hidden.dtype), dw.to(weight.dtype), db)
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """The stored gradients, times the slope that comes from above."""
        gradients = (None if t is None else t * slope.to(t.dtype) for t in ctx.saved_tensors)
        return (*gradients, None, None, None, None)

# %%
def in_autocast(x: Tensor) -> Tensor:
    """`x` in the precision that autocast would compute a matrix product in."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(device))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add `a.T @ b` to `total`, which may be more precise than they are."""
    if a.dtype == total.dtype:
        total.addmm_(a.T, b)
    else:
        total += a.T @ b

# %% [markdown]
# `d_part` is a window into `dx`: the product is written straight to its place. And `add_product` adds into the weight's gradient without a second matrix of that size, where the precisions agree.
#
# `head_loss` chooses between two ways. A `Head` of Chapter 7 is linear, with a scale and perhaps a bias. Any other head, such as one with a soft cap, has a slope that we have not written down. Then each chunk is computed twice: once for the loss, and again when its gradient is wanted. PyTorch's `checkpoint` does that {cite:p}`chen2016training`.

# %%
ROWS_AT_ONCE = {"cpu": 256, "cuda": 2048}


def head_loss(rule: Rule, model: Transformer, rows: Tensor, target: Tensor) -> LossSum:
    """The sums of `rule` over real tokens: vectors `(n, ..., D)` and their targets `(n,)`.

    Chunks of tokens, so that the logits of the batch never exist together. A `Head` without
    softcap has its gradient computed with its loss; any other head computes each chunk twice.

    Raises ValueError, on a CPU, for a target id outside the vocabulary.
    """
    table, head = model.embedding.weight, model.head
    check_targets(target, model.config.vocab_size)
    at_once = rule.chunk or ROWS_AT_ONCE.get(rows.device.type, 256)
    chunk = max(1, at_once // math.prod(rows.shape[1:-1]))  # tokens
    if torch.is_grad_enabled() and type(head) is Head and head.softcap is None:
        weight = table if head.weight is None else head.weight
        loss, nll = ChunkedLoss.apply(rows, weight, head.bias, target, rule, head.scale, chunk)
        return LossSum(loss, nll, len(target))

    def sums(part: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.logits(part)
        return rule.sums(logits.to(torch.promote_types(logits.dtype, torch.float32)), answers)

    parts = [
        checkpoint(sums, *pair, use_reentrant=False, preserve_rng_state=False)
        for pair in zip(rows.split(chunk), target.split(chunk), strict=True)
    ]
    loss, nll = (torch.stack(column).sum() for column in zip(*parts, strict=True))
    return LossSum(loss, nll, len(target))


def check_targets(target: Tensor, V: int) -> None:
    """Raise ValueError for a target id outside [0, V); on a CPU alone, a GPU would have to wait."""
    if target.device.type == "cpu" and target.numel():
        low, high = (int(t) for t in target.aminmax())
        if low < 0 or high >= V:
            raise ValueError(f"target ids must be in [0, {V}), got {low if low < 0 else high}")

# %% [markdown]
# What is left is to find the vectors. Filler is taken out *before* the head: it gets no logits at all.

# %%
def decoded(model: Transformer, batch: Batch) -> Tensor:
    """The decoder's vectors `(B, T, D)`. Filler stands on the right, where causality hides it."""
    memory = model.encode(batch.src, batch.src_padding)
    return model.decode(batch.tgt_in, memory, batch.src_padding)


def real_rows(batch: Batch) -> Tensor:
    """Where the real target tokens stand among all B T of them: `(n,)`."""
    return batch.tgt_padding.flatten().nonzero()[:, 0]

# %%
@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy with label smoothing (section 5.4), summed over the real target tokens.

    Args:
        smoothing: the share of the target that is spread evenly over the vocabulary; 0.1 in the
            paper, and 0 for plain cross-entropy.
        chunk: how many tokens' logits exist at one time; None chooses by the device.

    Raises ValueError for a smoothing outside [0, 1) and for a chunk below 1.
    """

    smoothing: float = 0.1
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)
        check_sizes(chunk=self.chunk)

    def sums(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums for `(n, V)` logits, differentiable."""
        return smoothed(logits, target, self.smoothing)

    def slope_(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums for `(n, V)` logits, which become p - q."""
        return smoothed_slope_(logits, target, self.smoothing)

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """The loss of `model` on `batch`; the model's mode and autocast are the caller's."""
        hidden = decoded(model, batch).flatten(0, 1)  # (B T, D)
        real = real_rows(batch)
        return head_loss(self, model, hidden.index_select(0, real), batch.tgt_out.flatten()[real])

# %% [markdown]
# ## Proof
#
# The whole model, every weight redrawn. Value and *every* gradient must equal those of `plain`, which holds all logits at once: for the tied head, for one with its own weight, bias and scale, and for one with a soft cap.

# %% tags=["active-ipynb"]
# from torch import nn
#
# from transformer_annotated import spec
#
# kinds = {
#     "tied, as in the paper": {},
#     "own weight, bias, scale": {"head": spec(Head, tied=False, bias=True, scale=0.5)},
#     "soft cap": {"head.softcap": 5.0},
# }
# for name, change in kinds.items():
#     config = patch(PAPER_BASE, {**SMALL, "vocab_size": 50}, HEADS, change)
#     model = Transformer(config).double()
#     for parameter in model.parameters():
#         nn.init.normal_(parameter, std=0.3)
#     expected = plain(model, whole)
#     wanted = torch.autograd.grad(expected.loss, list(model.parameters()))
#     for chunk in (1, 7, 256):
#         ours = CrossEntropy(0.1, chunk)(model, whole)
#         torch.testing.assert_close(ours.loss, expected.loss, rtol=0, atol=1e-9)
#         found = torch.autograd.grad(ours.loss, list(model.parameters()))
#         torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
#     print(f"{name:24s} chunks of 1, 7 and 256: equal to plain in {len(wanted)} gradients")

# %% [markdown]
# The same with numerical differentiation, which knows nothing of our formulas, and in bfloat16:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# shapes = ((5, 3), (7, 3), (7,))
# inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
# answers = torch.tensor([0, 6, 2, 2, 5])
# rule = CrossEntropy(0.1)
# assert torch.autograd.gradcheck(
#     lambda h, w, b: ChunkedLoss.apply(h, w, b, answers, rule, 0.5, 2)[0], inputs
# )
# model = Transformer(patch(PAPER_BASE, {**SMALL, "vocab_size": 50}, HEADS))
# with torch.autocast("cpu", dtype=torch.bfloat16):
#     pair = CrossEntropy(chunk=7)(model, whole).loss, plain(model, whole).loss
# ours, theirs = (torch.autograd.grad(loss, model.embedding.weight)[0] for loss in pair)
# print(f"bfloat16: losses differ by {(pair[0] - pair[1]).abs() / pair[1]:.0e},", end=" ")
# print(f"gradients by {(ours - theirs).norm() / theirs.norm():.1e}")
# assert (ours - theirs).norm() < 0.01 * theirs.norm()

# %% [markdown]
# bfloat16 keeps eight bits of a number, a relative error of up to 1/256, so gradients that were added in another order differ by about that.
#
# ## Memory and time
#
# How much memory does it take? The operating system knows the largest amount that a process ever held. It only grows, so the thrifty way is measured first, in a fresh process.

# %% tags=["active-ipynb"]
# PROBE = """
# import resource, sys
# import torch
# import torch.nn.functional as F
# from transformer_annotated.training.objective import ChunkedLoss, CrossEntropy
# torch.set_num_threads(1)
# V, D = int(sys.argv[1]), 64
# weight = torch.randn(V, D, requires_grad=True)
# def chunked(h, y):
#     return ChunkedLoss.apply(h, weight, None, y, CrossEntropy(), 1.0, 256)[0]
# def plain(h, y):
#     return F.cross_entropy(h @ weight.T, y, label_smoothing=0.1, reduction="sum")
# def peak():
#     return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
# chunked(torch.randn(256, D, requires_grad=True), torch.randint(V, (256,))).backward()
# for name, loss in (("chunked", chunked), ("plain", plain)):
#     for n in map(int, sys.argv[2:]):
#         h, y = torch.randn(n, D, requires_grad=True), torch.randint(V, (n,))
#         loss(h, y).backward()
#         print(name, n, peak())
# """

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import subprocess
# import sys
#
# from transformer_annotated.book import scale
#
# full = scale() == "full"
# V, counts = (37_000, (256, 512, 1024, 2048)) if full else (2000, (256, 512))
# command = [sys.executable, "-c", PROBE, str(V), *map(str, counts)]
# lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
# peaks: dict[str, list[float]] = {"chunked": [], "plain": []}
# for line in lines:
#     name, n, megabytes = line.split()
#     peaks[name].append(float(megabytes))
#     print(f"{name:8s}{int(n):6,} tokens: {float(megabytes):6,.0f} MB")

# %% mystnb={"figure": {"caption": "Peak memory of the process: with all logits it grows with every token, in chunks it stays.", "name": "fig-logits-memory"}, "image": {"alt": "Two lines over the number of tokens. The plain one rises in a straight line; the chunked one is flat."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for name, values in peaks.items():
#     ax.plot(counts, values, "o-", label=name)
# ax.set(xlabel="tokens", ylabel="peak in MB", ylim=(0, None), xticks=counts, title=f"V = {V:,}")
# ax.legend();

# %% [markdown]
# The level of the flat line in {numref}`fig-logits-memory` is Python, PyTorch, the weight (here with $D = 64$), its gradient, and one chunk of logits with its log-probabilities. The peak never falls, so the first plain line only says that 256 tokens need no more than the chunks did; the lines after it show the growth. Each further token costs the chunked way nothing that can be seen.
#
# Is it slower? At sizes of Multi30k, with the clock of the processor and one thread, forward and backward, medians of interleaved runs:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
# from collections.abc import Callable
# from statistics import median
#
# n, D, V = (2048, 256, 8000) if full else (128, 16, 500)
# h = torch.randn(n, D, requires_grad=True)
# weight = (torch.randn(V, D) * D**-0.5).requires_grad_()
# y = torch.randint(V, (n,))
# ways: dict[str, Callable[[], Tensor]] = {
#     "plain": lambda: F.cross_entropy(h @ weight.T, y, label_smoothing=0.1, reduction="sum")
# }
# for chunk in (32, 128, 256, 512, 2048):
#     ways[f"chunks of {chunk}"] = lambda chunk=chunk: ChunkedLoss.apply(
#         h, weight, None, y, CrossEntropy(), 1.0, chunk
#     )[0]
# seconds: dict[str, list[float]] = {name: [] for name in ways}
# for _ in range(7 if full else 1):
#     for name, way in ways.items():
#         start = time.process_time()
#         torch.autograd.grad(way(), (h, weight))
#         seconds[name].append(time.process_time() - start)
# for name, times in seconds.items():
#     print(f"{name:16s}{1000 * median(times):6.0f} ms")
# if full:
#     assert median(seconds["chunks of 256"]) < median(seconds["plain"])

# %% [markdown]
# From 128 tokens on, chunks are *faster* than the plain way. Even one chunk of all tokens beats the plain way, for its slope is written over the logits and not beside them. Smaller chunks gain a little more, probably because their memory is used again and again while it is near the processor. Chunks of 32 tokens are slower, since each of them goes through the whole gradient of the weight. 256 tokens are the default on a CPU.
#
# Today's kernels for language models use the same idea {cite:p}`hsu2024liger,wijmans2025cut`.
#
# ## Two passes that agree
#
# Dropout makes a different network of the model in every pass. In two passes over the same sentence, the probabilities $p_1$ and $p_2$ differ. **R-Drop** {cite:p}`liang2021rdrop` trains both to be right, and adds the difference to the loss. The measure is the *Kullback-Leibler divergence*, $\mathrm{KL}(p_1 \| p_2) = \sum_w p_1(w) \ln \frac{p_1(w)}{p_2(w)}$: zero if the two are equal, positive if not. It has a direction, so both directions are taken:
#
# $$
# \mathcal{L} = \frac{\mathcal{L}_1 + \mathcal{L}_2}{2} + \frac{\alpha}{4} \bigl( \mathrm{KL}(p_1 \| p_2) + \mathrm{KL}(p_2 \| p_1) \bigr)
# $$ (eq-rdrop)
#
# This is half of their equation. A half changes no minimum, and Adam divides it out again. But now the loss is comparable with plain cross-entropy, and $\alpha$ means what it means in their paper.

# %% tags=["active-ipynb"]
# p1, p2 = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.3, 0.2])
# print(f"KL(p1 || p2) = {(p1 * (p1 / p2).log()).sum():.4f}")
# print(f"KL(p2 || p1) = {(p2 * (p2 / p1).log()).sum():.4f}")
# print(f"both at once = {((p1 - p2) * (p1 / p2).log()).sum():.4f}")

# %% [markdown]
# The third line is the sum of the first two, in one expression. That is how the code has it. Its slope for the logits of the first pass is $p_1 (\ln p_1 - \ln p_2 - \mathrm{KL}(p_1 \| p_2)) + p_1 - p_2$, and for the second pass with 1 and 2 exchanged.

# %%
def r_drop(logits: Tensor, target: Tensor, smoothing: float, alpha: float) -> tuple[Tensor, Tensor]:
    """The sums of R-Drop and of -log p (mean of both passes) for logits `(n, 2, V)`."""
    loss, nll = smoothed(logits.flatten(0, 1), target.repeat_interleave(2), smoothing)
    log_p, log_q = logits.log_softmax(dim=-1).unbind(dim=1)  # (n, V) each
    both = ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum()
    return loss / 2 + alpha / 4 * both, nll / 2


def r_drop_slope_(
    logits: Tensor, target: Tensor, smoothing: float, alpha: float
) -> tuple[Tensor, Tensor]:
    """What `r_drop` returns; `logits` is overwritten with the loss's slope."""
    log_p = torch.log_softmax(logits, dim=-1)  # (n, 2, V)
    rows = logits.view(-1, logits.shape[-1])
    loss, nll = smoothed_slope_(rows, target.repeat_interleave(2), smoothing)
    logits /= 2
    gap = log_p - log_p.flip(1)  # ln p1 - ln p2, and ln p2 - ln p1
    p = log_p.exp_()
    kl = (p * gap).sum(dim=-1, keepdim=True)  # (n, 2, 1)
    logits += alpha / 4 * (p * (gap - kl + 1) - p.flip(1))
    return loss / 2 + alpha / 4 * kl.sum(), nll / 2

# %% [markdown]
# Against PyTorch's pieces, put together as the equation says:

# %% tags=["active-ipynb"]
# torch.manual_seed(1)
# logits = (2 * torch.randn(6, 2, 50, dtype=torch.float64)).requires_grad_()
# first, second = logits.unbind(dim=1)
# log_p, log_q = (z.log_softmax(dim=-1) for z in (first, second))
# naive = sum(
#     F.cross_entropy(z, target, label_smoothing=0.1, reduction="sum") for z in (first, second)
# )
# for a, b in ((log_p, log_q), (log_q, log_p)):
#     naive = naive + 5.0 / 2 * F.kl_div(b, a, log_target=True, reduction="sum")
# naive = naive / 2
# (slope,) = torch.autograd.grad(naive, logits)
# room = logits.detach().clone()
# for loss in (r_drop(logits, target, 0.1, 5.0)[0], r_drop_slope_(room, target, 0.1, 5.0)[0]):
#     torch.testing.assert_close(loss, naive, rtol=0, atol=1e-10, check_device=False)
# torch.testing.assert_close(room, slope, rtol=0, atol=1e-10)
# print(f"R-Drop {naive.item():.4f}, equal in value and slope")

# %% [markdown]
# `F.kl_div(ln b, ln a)` computes $\mathrm{KL}(a \| b)$: its arguments stand the other way round.
#
# The objective sends the batch through the model twice, side by side in one batch of double size. The rest is `head_loss`, with two rows of logits for each token.

# %%
@dataclass(frozen=True)
class RDrop:
    """R-Drop (Liang et al. 2021): two passes with different dropout, kept close to each other.

    The loss of a token is the mean of the two passes' cross-entropies plus `alpha` / 4 times
    KL(p1 || p2) + KL(p2 || p1): half of the paper's equation, so that it can be compared with
    `CrossEntropy`, and `alpha` means the same as there. `nll` is the mean of the two passes.

    Args:
        alpha: weight of the divergence; 0 leaves the mean of the cross-entropies.
        smoothing: as in `CrossEntropy`.
        chunk: how many rows of logits exist at one time, two for each token.

    Raises ValueError for an alpha below 0 and for what `CrossEntropy` refuses.
    """

    alpha: float = 5.0
    smoothing: float = 0.1
    chunk: int | None = None

    def __post_init__(self) -> None:
        check_smoothing(self.smoothing)
        check_sizes(chunk=self.chunk)
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha must be at least 0 and finite, got {self.alpha}")

    def sums(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums for `(n, 2, V)` logits, differentiable."""
        return r_drop(logits, target, self.smoothing, self.alpha)

    def slope_(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The two sums for `(n, 2, V)` logits, which become the slope."""
        return r_drop_slope_(logits, target, self.smoothing, self.alpha)

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        """The loss of `model` on `batch`, which goes through it twice, side by side."""
        twice = Batch(*(torch.cat((t, t)) for t in (getattr(batch, f.name) for f in fields(batch))))
        hidden = decoded(model, twice).unflatten(0, (2, -1)).flatten(1, 2)  # (2, B T, D)
        real = real_rows(batch)
        rows = hidden.index_select(1, real).transpose(0, 1).contiguous()  # (n, 2, D)
        return head_loss(self, model, rows, batch.tgt_out.flatten()[real])

# %% tags=["active-ipynb"]
# torch.manual_seed(2)
# dropping = Transformer(patch(PAPER_BASE, {**SMALL, "vocab_size": 50, "dropout": 0.3}, HEADS))
# for mode in (True, False):
#     dropping.train(mode)
#     for name, objective in (("cross-entropy", CrossEntropy()), ("R-Drop", RDrop())):
#         torch.manual_seed(0)
#         result = objective(dropping, whole)
#         print(f"{'training' if mode else 'evaluation':11s}{name:14s}", end="")
#         print(f"loss {result.loss / result.tokens:.4f}   nll {result.nll / result.tokens:.4f}")

# %% [markdown]
# In evaluation mode nothing is dropped, both passes agree, and R-Drop *is* cross-entropy. Each step costs two passes. Chapter 23 measures whether it pays.
#
# ## Nothing to predict, and other cases
#
# If a batch is divided among several processes, one of them may get only filler. Then there is no real target at all. The mean of no numbers is not a number, and one NaN destroys every weight. The sum of no numbers is 0, with a gradient of 0:

# %% tags=["active-ipynb"]
# nothing = F.cross_entropy(torch.zeros(2, 5), torch.tensor([0, 0]), ignore_index=0)
# print("PyTorch's mean over ignored targets:", nothing.item())
# empty = Batch(
#     whole.src, whole.tgt_in, whole.tgt_out, whole.src_padding, torch.zeros_like(whole.tgt_padding)
# )
# for objective in (CrossEntropy(), RDrop()):
#     result = objective(small_model, empty)
#     (gradient,) = torch.autograd.grad(result.loss, small_model.embedding.weight)
#     print(
#         f"{type(objective).__name__:13s}loss {result.loss.item()}, gradient {gradient.abs().max().item()}"
#     )

# %% tags=["active-ipynb"]
# outside = whole.tgt_out.clone()
# outside[0, 0] = 50
# wrong = Batch(whole.src, whole.tgt_in, outside, whole.src_padding, whole.tgt_padding)
# for attempt in (
#     lambda: CrossEntropy()(small_model, wrong),
#     lambda: CrossEntropy(smoothing=1.0),
#     lambda: RDrop(alpha=-1.0),
#     lambda: accumulate(CrossEntropy(), small_model, [empty]),
# ):
#     try:
#         attempt()
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## What the paper did
#
# | | the paper | here |
# |---|---|---|
# | label smoothing | 0.1 (section 5.4) | `CrossEntropy(0.1)` |
# | batch | about 25,000 target tokens (section 5.1) | sums over all micro-batches of a step |
# | logits | not described | in chunks |
# | R-Drop | came four years later; $\alpha = 5$ in its authors' published commands for translation | `RDrop(5.0)` |
#
# ## How it breaks
#
# - *Mean of means.* The loss depends on how sentences were cut into batches. Compare the gradient with that of one large batch.
# - *Filler in the sum.* The loss is lower for batches with more filler, and changes with what stands under the padding.
# - *Smoothed losses compared.* A model with smoothing seems worse than one without. Compare nll.
# - *Softmax in bfloat16.* The loss is a little wrong and nothing fails. Sums of thousands of small numbers need more than eight bits.
# - *R-Drop in evaluation mode.* The divergence is zero for ever: the two passes are the same.
#
# ## Takeaways
#
# - Smoothing asks for $1 - \epsilon + \epsilon / V$ and no more. It costs perplexity by design, so report nll.
# - Objectives return sums. Divide once, by all tokens of the step.
# - The slope of a sum is known token by token. Compute it while the logits are there, and they need not be kept.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 15.1.** What is the lowest loss, in nats a token, that a model can reach with a smoothing of 0.2 and a vocabulary of 8,000?

# %% tags=["active-ipynb"]
# answer = ...
# check("15.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# rest, goal = 0.2 / 8000, 0.8 + 0.2 / 8000
# answer = -goal * math.log(goal) - 7999 * rest * math.log(rest)
# check("15.1", answer)

# %% [markdown]
# **Exercise 15.2.** Three micro-batches have 10, 30 and 60 words, and mean losses of 4, 3 and 2 nats. Answer with two numbers: the loss of the step, and what a mean of means would say.

# %% tags=["active-ipynb"]
# answer = ...
# check("15.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [(10 * 4 + 30 * 3 + 60 * 2) / 100, (4 + 3 + 2) / 3]
# check("15.2", answer)

# %% [markdown]
# **Exercise 15.3.** Some models add a penalty that keeps logits small: $\lambda (\ln \sum_w e^{z_w})^2$ for each token. Write a function of `logits` `(n, V)` and `weight` $\lambda$ that returns the slope of the summed penalty for each logit, `(n, V)`, without autograd. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("15.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def penalty_slope(logits: Tensor, weight: float) -> Tensor:
#     """2 lambda ln(sum) times the softmax."""
#     return 2 * weight * logits.logsumexp(dim=-1, keepdim=True) * logits.softmax(dim=-1)
#
#
# answer = penalty_slope
# check("15.3", answer)
