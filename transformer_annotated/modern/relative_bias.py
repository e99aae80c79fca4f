# %% [markdown]
r"""
# Biases instead of positions: ALiBi and T5

A number is added to each score, and it depends on the distance alone. ALiBi fixes these numbers, T5 learns them. Five ways
to tell a model about order are trained on 64 characters and tested on 512.
"""

# %% [markdown]
# The clock of Chapter 7 is added to the words. RoPE of Chapter 29 turns queries and keys. There is a third place, and it is the simplest: the score itself.

# %% mystnb={"figure": {"caption": "Chapter 30 of Part III: what is added to the scores.", "name": "fig-map-relative-bias"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The sixth, Score biases, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(30);

# %%
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.parts import check_sizes, spec

# %% [markdown]
# Two patches, one for each scheme. The clock goes out of the embedding, and each stack gets a bias:

# %% tags=["active-ipynb"]
# from transformer_annotated import ALIBI, PAPER_BASE, T5_BIAS, diff, patch
#
# for change in (ALIBI, T5_BIAS):
#     print(diff(PAPER_BASE, patch(PAPER_BASE, change)), end="\n\n")

# %% mystnb={"figure": {"caption": "Two seams change: the embedding adds no positions any more, and each stack gets a bias for the scores of its self-attention.", "name": "fig-seams-relative-bias"}, "image": {"alt": "The model with its seams; the boxes of the two embeddings and the mark for the bias are filled."}} tags=["active-ipynb"]
# from transformer_annotated import figures
#
# figures.seams(["embedding", "bias"]);

# %% [markdown]
# ## A table that ends
#
# Begin with the most direct scheme. Give each position a row in a table, as each word has one, and let training fill it. Convolutional translation models did so {cite:p}`gehring2017convolutional`. The paper of 2017 tried it too and saw nearly the same results as with sinusoids (section 3.5 and row E of its table 3). GPT and BERT kept it: 512 rows each {cite:p}`radford2018improving,devlin2019bert`.

# %%
class LearnedPositions(nn.Module):
    """A learned vector for each position (Gehring et al. 2017; GPT, BERT).

    Args:
        d_model: width D.
        max_len: number of positions that have a vector.
        offset: position p reads row p + offset; 2 in the published weights of BART and OPT.

    Raises:
        ValueError: a size below 1, an `offset` below 0, or, when called, a position below 0 or of
            `max_len` or more. On a GPU and in a compiled model PyTorch alone checks the rows.
    """

    def __init__(self, d_model: int, max_len: int = 512, offset: int = 0) -> None:
        super().__init__()
        check_sizes(d_model=d_model, max_len=max_len)
        if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
            raise ValueError(f"offset must be a whole number of at least 0, got {offset!r}")
        self.max_len, self.offset = max_len, offset
        self.table = nn.Embedding(max_len + offset, d_model)
        nn.init.normal_(self.table.weight, std=0.5**0.5)  # as large as the clock's vectors

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` to vectors `(B, T, D)`."""
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            first, last = int(positions.min()), int(positions.max())
            if first < 0 or last >= self.max_len:
                wrong = first if first < 0 else last
                raise ValueError(
                    f"positions must be at least 0 and below max_len={self.max_len}, got {wrong}"
                )
        return self.table(positions + self.offset)

# %% [markdown]
# The rows start as large as the vectors of the clock: a mean square of one half. `offset` is a matter of history. In the published weights of BART {cite:p}`lewis2020bart` and OPT {cite:p}`zhang2022opt` position 0 reads row 2: the code that trained them keeps the rows up to the id of padding, which is 1, for padding {cite:p}`ott2019fairseq`.
#
# What happens at the ninth token, if the table has eight rows?

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# learned = LearnedPositions(d_model=16, max_len=8)
# print(tuple(learned(torch.arange(8)[None]).shape))
# try:
#     learned(torch.arange(9)[None])
# except ValueError as error:
#     print(error)

# %% [markdown]
# It stops. A larger table does not help by itself: rows that no training text reached still hold their first random numbers. The clock has a vector for every position, but a network that never saw position 500 never learned to read it. Here is the question of this chapter. Can a model be told about order in such a way that position 500 is nothing new?
#
# ## Only the distance
#
# Whether a word matters for another often depends less on *where* the two stand than on how far apart they are. {cite:t}`shaw2018self` put that into attention: they added a learned vector to each key, one for each distance up to a limit. The schemes of this chapter add less, a single number:
#
# $$
# s_{h,ij} = \frac{q_{h,i} \cdot k_{h,j}}{\sqrt{d}} + b_h(j - i)
# $$ (eq-score-bias)
#
# $s_{h,ij}$ is the score that query $i$ gives to key $j$ in head $h$, before the softmax. The **bias** $b_h$ is a function of the distance $j - i$: negative for a key behind, positive for a key ahead. Adding $-1$ to a score divides the weight of that key by $e \approx 2.72$, before the row is made to sum to one.
#
# Move the whole text ten positions on. Every $i$ and $j$ grows by ten, and no distance changes. So no output changes either. The clock cannot promise that.
#
# First the distance itself, for all pairs. Positions arrive as `(B, T)`, or as `(1, T)` if all rows agree. Part I hands them over, so padding on the left is already counted out.

# %%
def distances(positions: Tensor, key_positions: Tensor) -> Tensor:
    """Key minus query, j - i, for each pair: `(B|1, T)` and `(B|1, S)` to `(B|1, T, S)`."""
    return key_positions[:, None, :] - positions[:, :, None]


def both_given(positions: Tensor | None, key_positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both positions, after checking that neither is missing (else ValueError)."""
    if positions is None or key_positions is None:
        name = "positions" if positions is None else "key_positions"
        raise ValueError(f"{name} must be given where there is a bias, got None")
    return positions, key_positions

# %% tags=["active-ipynb"]
# print(distances(torch.tensor([[3, 4]]), torch.tensor([[0, 1, 2, 3, 4]])))

# %% [markdown]
# Two queries at positions 3 and 4, five keys. The zero marks the key at the query's own place.
#
# ## ALiBi: a slope for each head
#
# Take 1/2 away for each step of distance. A key ten steps back then loses 5, and its weight is divided by $e^5 \approx 148$. Take 1/256 away for each step instead, and ten steps change almost nothing. **ALiBi**, attention with linear biases {cite:p}`press2022train`, gives each head one such slope:
#
# $$
# b_h(j - i) = -m_h\,|j - i|, \qquad m_h = 2^{-8h/H}, \quad h = 1, \ldots, H
# $$ (eq-alibi)
#
# With 8 heads the slopes are 1/2, 1/4, …, 1/256. They are not learned. For a number of heads that is no power of two the authors' code has a rule of its own: take the slopes of the next power of two below, then every other slope of the next one above.

# %%
def alibi_slopes(n_heads: int, device: torch.device | None = None) -> Tensor:
    """ALiBi's slope of each head: `(H,)`, in 32 bits in any model (Press et al. 2022, section 3).

    For a power of two, 2^(-8/H), 2^(-16/H), ..., 2^-8. For another H, the slopes of the power of
    two below it, and then every other slope of the power of two above it.

    Raises ValueError for `n_heads` below 1.
    """
    check_sizes(n_heads=n_heads)
    n = 1 << (n_heads.bit_length() - 1)  # the power of two at or below H
    whole = torch.arange(1, n + 1, device=device) * (-8 / n)
    between = (2 * torch.arange(n_heads - n, device=device) + 1) * (-8 / (2 * n))
    return torch.exp2(torch.cat((whole, between)))

# %% tags=["active-ipynb"]
# for n_heads in (8, 6):
#     print(n_heads, "heads: 2 to the", alibi_slopes(n_heads).log2().tolist())

# %% [markdown]
# Six heads: the four slopes of four heads, then the first and the third of eight. The order looks odd and matters: a published model with another order of slopes is another model.
#
# The slopes are computed when they are needed, in 32 bits whatever the model's own precision. Nothing has to be stored, saved or moved.
#
# What should the bias be, as a value? A tensor `(H, T, S)` would do. But it follows from $H$ slopes and the positions, which are far fewer numbers. So the value holds these, and `dense()` writes the tensor out. `attend` and `sdpa` ask for that in every layer. With a bias `sdpa` also loses its shortest way, the one for a plain causal mask. The later chapters on FlashAttention need no such tensor: they compute the scores block by block, and take the slopes.

# %%
@dataclass(frozen=True, eq=False)
class LinearBias:
    """ALiBi's bias, not yet a tensor: the few numbers that it follows from.

    Attributes:
        slopes: `(H,)`.
        positions, key_positions: `(B, T)` or `(1, T)`, and `(B, S)` or `(1, S)`.
    """

    slopes: Tensor
    positions: Tensor
    key_positions: Tensor

    def dense(self) -> Tensor:
        """`-slope * |i - j|`, for each pair: `(B|1, H, T, S)`."""
        steps = distances(self.positions, self.key_positions).abs()  # (B|1, T, S)
        return self.slopes[:, None, None] * -steps[:, None]

# %% [markdown]
# `dense` is {eq}`eq-alibi` in two lines. The module that makes such values has no parameters. It is built once for each stack, with the number of heads, and called in each layer with positions.

# %%
class ALiBi(nn.Module):
    """Attention with linear biases: a fixed penalty on distance (Press et al. 2022).

    Nothing is learned, and there is no longest position. Under a causal mask this is the published
    form. In an encoder it is the same on both sides: an encoder-decoder that has no other positions
    cannot tell a source from its mirror image.

    Raises ValueError for `n_heads` below 1.
    """

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads)
        self.n_heads = n_heads

    def forward(self, positions: Tensor | None, key_positions: Tensor | None) -> LinearBias:
        """Positions of queries `(B|1, T)` and keys `(B|1, S)` to the bias of their scores."""
        queries, keys = both_given(positions, key_positions)
        return LinearBias(alibi_slopes(self.n_heads, queries.device), queries, keys)

# %% tags=["active-ipynb"]
# positions = torch.arange(4)[None]  # (1, T)
# bias = ALiBi(n_heads=2)(positions, positions)
# print("slopes", bias.slopes.tolist(), "  shape", tuple(bias.dense().shape))
# print(bias.dense()[0, 0])

# %% [markdown]
# In an encoder this matrix is used as it is: the penalty is the same to the left and to the right. Under a causal mask the upper triangle is hidden, and the rest is the form of the paper.
#
# One formula serves both stacks, at a price. The paper has decoders only. In an encoder $|j - i|$ does not know left from right, and cross-attention knows no positions. So the decoder receives the same vectors for *A B C* and for *C B A*: an encoder-decoder with ALiBi cannot tell a sentence from its mirror image. We shall see it in numbers below.

# %% tags=["hide-input"]
def draw_biases(n_heads: int = 4, T: int = 128) -> Any:
    """Draw ALiBi's bias of each head, in a decoder (above) and in an encoder (below)."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    positions = torch.arange(T)[None]
    bias = ALiBi(n_heads)(positions, positions).dense()[0]  # (H, T, T)
    hidden = torch.ones(T, T).triu(1).bool()
    fig, axes = plt.subplots(2, n_heads, figsize=(7.2, 4.0), sharex=True, sharey=True)
    for row, name in enumerate(("decoder", "encoder")):
        for h, ax in enumerate(axes[row]):
            shown = bias[h].masked_fill(hidden, math.nan) if name == "decoder" else bias[h]
            ax.set_facecolor("#CCCCCC")  # what the causal mask hides
            image = figures.heatmap(ax, shown, vmin=-8, vmax=0, cmap="Blues_r")
            ax.set_xticks([0, T - 1])
            ax.set_yticks([0, T - 1])
            if row == 0:
                ax.set_title(f"slope 1/{round(1 / float(alibi_slopes(n_heads)[h]))}")
            else:
                ax.set_xlabel("key")
        axes[row, 0].set_ylabel(f"{name}\nquery")
    fig.colorbar(image, ax=axes, label="added to the score", shrink=0.8)
    return axes

# %% mystnb={"figure": {"caption": "ALiBi's four biases for four heads. The first head sees little beyond a few steps, the last sees all keys almost alike; in an encoder both sides fade in the same way, so left and right are one.", "name": "fig-alibi"}, "image": {"alt": "Two rows of four heat maps, query down and key across. Above, the lower triangles alone. In the first column the colour fades quickly away from the diagonal, in the last it hardly changes."}} tags=["active-ipynb"]
# draw_biases();

# %% [markdown]
# Read {numref}`fig-alibi` along a row, from the diagonal to the left: that is one query looking back. Dark means much taken away. How far does a head look, if the words say nothing and the bias alone decides? Here is the mean distance of such a query, with plenty of keys behind it:

# %% tags=["active-ipynb"]
# back = torch.arange(20_000).double()  # how many steps back a key stands
# for slope in alibi_slopes(8).double().tolist():
#     weights = torch.softmax(-slope * back, dim=0)
#     print(f"slope 1/{round(1 / slope):<4} mean distance {(weights * back).sum():6.1f}")

# %% [markdown]
# One over the slope, less about a half; Exercise 30.3 finds the formula. The eight heads look back over ranges that double from each to the next. The words can still overrule the bias: it is a preference, and scores are added to it.
#
# ## Proof, and why Bloom's form looks different
#
# Bloom {cite:p}`lescao2022bloom` and MPT {cite:p}`mosaicml2023mpt` are published models with ALiBi. Bloom's code adds $+m_h\, j$, with no query in it at all. Is that the same thing? Under a causal mask $j \le i$, and then
#
# $$
# -m_h\,|j - i| = m_h\,(j - i) = m_h\, j - m_h\, i
# $$ (eq-row-constant)
#
# The last term is the same number for a whole row. Softmax does not notice a number that is added to a whole row. So the two forms give one result. Check it, output and gradients, with PyTorch's function as the reference and Bloom's form as its mask:

# %% tags=["active-ipynb"]
# from transformer_annotated import Mask, attend
#
# torch.manual_seed(0)
# B, H, T, d = 2, 6, 10, 4
# q, k, v = (torch.randn(B, H, T, d, dtype=torch.float64, requires_grad=True) for _ in "qkv")
# positions = torch.arange(T)[None]
# ours = attend(q, k, v, Mask(causal=True), bias=ALiBi(H)(positions, positions))
# bloom = alibi_slopes(H).double()[:, None, None] * positions  # (H, 1, S): no query in it
# seen = torch.ones(T, T).tril().bool()
# theirs = F.scaled_dot_product_attention(q, k, v, bloom.masked_fill(~seen, -torch.inf))
# torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
# direction = torch.randn_like(ours)
# mine, reference = (torch.autograd.grad(y, (q, k, v), direction) for y in (ours, theirs))
# for a, b in zip(mine, reference, strict=True):
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("Bloom's form and ours: output and three gradients equal, to 1e-10")

# %% [markdown]
# In an encoder the shortcut fails: with keys on both sides $|j - i|$ does not come apart into a term of $j$ and a term of $i$. The test suite compares slopes and tensors with the functions of Hugging Face's Bloom and MPT, for 1 to 64 heads.
#
# ## T5: learn the numbers
#
# Why a straight line? T5 {cite:p}`raffel2020exploring` lets training decide: one learned number for each head and each distance. With 512 positions there would be 1023 distances, and the far ones are rare. So far distances share. In T5's encoder each distance up to 7 steps has a number of its own; beyond, a number serves a range of distances, and the ranges grow by a constant factor. These ranges are **buckets**.
#
# Let a side have $R$ buckets, $e = R/2$ of them exact, and let $n$ be the number of steps and $M$ the `max_distance`. The bucket of $n$ is
#
# $$
# \beta(n) = \begin{cases} n & n < e \\ \min\!\left(R - 1,\; e + \left\lfloor \frac{\ln (n / e)}{\ln (M / e)} (R - e) \right\rfloor\right) & n \ge e \end{cases}
# $$ (eq-bucket)
#
# An encoder looks both ways: of 32 buckets, 16 go to the keys behind and 16 to those ahead. A decoder has only keys behind, and all 32 are theirs.

# %%
def t5_bucket(
    distance: Tensor, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
) -> Tensor:
    """The bucket of each distance j - i: integers of the same shape (Raffel et al. 2020, 2.1).

    Half of the buckets hold one distance each, the other half grow by a constant factor up to
    `max_distance`; the last takes all beyond. A bidirectional bias has such a row for each side,
    keys behind first; a one-sided one puts every key ahead into bucket 0.
    """
    side = torch.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        side = (distance > 0) * n_buckets
        steps = distance.abs()
    else:
        steps = (-distance).clamp(min=0)
    exact = n_buckets // 2
    growth = (steps.clamp(min=exact) / exact).log() / math.log(max_distance / exact)
    coarse = exact + (growth * (n_buckets - exact)).long()
    return side + torch.where(steps < exact, steps, coarse.clamp(max=n_buckets - 1))

# %% tags=["active-ipynb"]
# back = torch.tensor([0, 1, 7, 8, 15, 16, 20, 64, 127, 128, 10_000])
# print("steps back    ", back.tolist())
# print("encoder       ", t5_bucket(-back).tolist())
# print("encoder, ahead", t5_bucket(back).tolist())
# print("decoder       ", t5_bucket(-back, bidirectional=False).tolist())
# for name, both in (("encoder", True), ("decoder", False)):
#     behind = t5_bucket(-torch.arange(200), bidirectional=both)
#     print(f"{name}: the last bucket begins at {int((behind < behind.max()).sum())} steps")

# %% [markdown]
# By the floor in {eq}`eq-bucket` the last bucket begins a little before $M = 128$. In a picture, with even steps up to a distance of 8 and a scale of powers beyond:

# %% mystnb={"figure": {"caption": "Each step of the staircase is one learned number. Near distances have one each. Far ones share: on a scale of powers their steps are equally wide, and the last has no end. The decoder spends all its steps on the keys behind.", "name": "fig-buckets"}, "image": {"alt": "Bucket number against distance from minus 256 to 256, on a scale of powers beyond 8. The encoder's line rises in steps on both sides of zero, the side ahead starting at 17. The decoder's line rises to 31 on the left and is zero on the right."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# distance = torch.arange(-256, 257)
# fig, ax = plt.subplots()
# for name, both in (("encoder: both sides", True), ("decoder: behind only", False)):
#     ax.step(distance, t5_bucket(distance, bidirectional=both), where="mid", label=name)
# ax.set_xscale("symlog", linthresh=8)  # even up to 8 steps, then in powers
# marks = [-128, -32, -8, -4, 0, 4, 8, 32, 128]
# ax.set_xticks(marks, labels=[f"{mark}".replace("-", "−") for mark in marks])
# ax.xaxis.set_minor_locator(plt.NullLocator())
# ax.set(xlabel="distance j − i (negative: the key is behind)", ylabel="bucket")
# ax.legend();

# %% [markdown]
# Read {numref}`fig-buckets` from 0 to the left: that is a query looking back. One row of the encoder's table is never used: no key is ahead by 0 steps. The value and the module follow the pattern of ALiBi. The table is the only parameter.

# %%
@dataclass(frozen=True, eq=False)
class BucketBias:
    """T5's bias, not yet a tensor.

    Attributes:
        table: `(n_buckets, H)`, the learned numbers.
        positions, key_positions: `(B, T)` or `(1, T)`, and `(B, S)` or `(1, S)`.
        max_distance, bidirectional: the arguments of `t5_bucket`.
    """

    table: Tensor
    positions: Tensor
    key_positions: Tensor
    max_distance: int
    bidirectional: bool

    def dense(self) -> Tensor:
        """The number of each pair's bucket: `(B|1, H, T, S)`."""
        distance = distances(self.positions, self.key_positions)  # (B|1, T, S)
        bucket = t5_bucket(distance, len(self.table), self.max_distance, self.bidirectional)
        return F.embedding(bucket, self.table).permute(0, 3, 1, 2)

# %%
class T5Bias(nn.Module):
    """A learned number for each head and each bucket of distances (Raffel et al. 2020, 2.1).

    One table serves all layers of a stack. It starts at zero: no distance is preferred.

    Args:
        n_heads: number of heads H.
        n_buckets: rows of the table.
        max_distance: all distances from here on, and a few before, share the last bucket.
        bidirectional: whether keys ahead have buckets of their own; False in a decoder.

    Raises:
        ValueError: `n_heads` below 1, fewer than two buckets a side, an odd number of them for
            two sides, or a `max_distance` within the distances that have a bucket each.
    """

    def __init__(
        self,
        n_heads: int,
        *,
        n_buckets: int = 32,
        max_distance: int = 128,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(n_heads=n_heads, n_buckets=n_buckets, max_distance=max_distance)
        sides = 2 if bidirectional else 1
        if n_buckets % sides or n_buckets < 2 * sides:
            raise ValueError(f"n_buckets must be {'even and ' if bidirectional else ''}at least "
                             f"{2 * sides}, got {n_buckets}")  # fmt: skip
        if max_distance <= (exact := n_buckets // sides // 2):
            raise ValueError(f"max_distance must be above {exact}, the distances that have a "
                             f"bucket each, got {max_distance}")  # fmt: skip
        self.max_distance, self.bidirectional = max_distance, bidirectional
        self.table = nn.Embedding(n_buckets, n_heads)
        nn.init.zeros_(self.table.weight)

    def forward(self, positions: Tensor | None, key_positions: Tensor | None) -> BucketBias:
        """Positions of queries `(B|1, T)` and keys `(B|1, S)` to the bias of their scores."""
        queries, keys = both_given(positions, key_positions)
        return BucketBias(self.table.weight, queries, keys, self.max_distance, self.bidirectional)

# %% [markdown]
# The table starts at zero, so that no distance is preferred. A fresh model is then one without positions, and the first gradients fill the table.
#
# ## Proof
#
# The reference is a loop over pairs. It finds the bucket in another way, by counting how many bucket edges the distance has reached. The far edges are powers, and computed with rounding: one that is a whole number may come out a little too high. So $10^{-9}$ is taken off. Compare the bias and the gradient of the table, with the table drawn at random:

# %% tags=["active-ipynb"]
# def bucket_by_hand(steps: int, R: int, M: int) -> int:
#     e = R // 2
#     edges = [*range(e), *(e * (M / e) ** (b / (R - e)) - 1e-9 for b in range(R - e))]
#     return sum(steps >= edge for edge in edges) - 1
#
#
# t5 = T5Bias(n_heads=3, n_buckets=8, max_distance=20, bidirectional=False).double()
# nn.init.normal_(t5.table.weight)
# positions = torch.tensor([[0, 1, 3, 4, 9, 40]])
# reached = t5_bucket(distances(positions, positions), 8, 20, bidirectional=False)
# assert set(reached.flatten().tolist()) == set(range(8))  # no row is left out
# ours = t5(positions, positions).dense()  # (1, H, T, S)
# theirs = torch.zeros_like(ours)
# for i in range(6):
#     for j in range(6):
#         steps = max(0, int(positions[0, i] - positions[0, j]))
#         theirs[0, :, i, j] = t5.table.weight[bucket_by_hand(steps, R=8, M=20)]
# direction = torch.randn_like(ours)
# mine, reference = (torch.autograd.grad(y, t5.table.weight, direction)[0] for y in (ours, theirs))
# assert torch.equal(ours, theirs)
# torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)
# print("bias equal, gradient of the table equal to 1e-10")

# %% [markdown]
# The tests do the same for both sides, and compare every distance from −600 to 600 with Hugging Face's T5.
#
# ## The patches
#
# Part I built the seam. A stack with a `bias` builds it once, and each of its layers calls it: one table serves all layers. That is also T5's rule. Cross-attention gets no bias: a source position and a target position have no distance.

# %%
ALIBI = {"bias": spec(ALiBi), "embedding.position": None}
T5_BIAS = {
    "bias": spec(T5Bias),
    "decoder.bias.bidirectional": False,
    "embedding.position": None,
}

# %% [markdown]
# The diffs at the top of the page are those of these two. T5's bias in the decoder is one-sided. The embedding's clock is taken out, and must be: a model that is told its positions twice is refused.

# %% tags=["active-ipynb"]
# from transformer_annotated import Transformer
#
# try:
#     Transformer(patch(PAPER_BASE, {"bias": spec(ALiBi)}))
# except ValueError as error:
#     print(error)

# %% [markdown]
# Now the promise of {eq}`eq-score-bias` for a whole model: move a text by 1000 positions, and nothing may change. And the limiting case: T5's fresh table of zeros must equal a model without any positions.

# %% tags=["active-ipynb"]
# from transformer_annotated import SDPA
# from transformer_annotated.modern.language_model import language_model
#
# tiny = language_model(50, d_model=32)
# ids = torch.randint(50, (2, 12))
# here = torch.arange(12)[None]
# for name, change in {"clock": {}, "ALiBi": ALIBI, "T5": T5_BIAS}.items():
#     model = Transformer(patch(tiny, change)).eval()
#     for parameter in model.parameters():
#         nn.init.normal_(parameter, std=0.2)
#     moved = model.decode(ids, positions=here + 1000) - model.decode(ids, positions=here)
#     print(f"{name:6s} largest change {moved.abs().max():.3g}")
#     assert (name == "clock") == bool(moved.any())

# %% tags=["active-ipynb"]
# fresh = Transformer(patch(tiny, T5_BIAS)).eval()
# without = Transformer(patch(tiny, {"embedding.position": None})).eval()
# left_over = fresh.load_state_dict(without.state_dict(), strict=False)
# print("not in the other model:", left_over.missing_keys)
# assert torch.equal(fresh(ids), without(ids))

# %% [markdown]
# And the price of ALiBi in an encoder. Give an encoder-decoder a source and its mirror image, with one target. By how much do the logits differ?

# %% tags=["active-ipynb"]
# small = patch(PAPER_BASE, {"vocab_size": 50, "d_model": 32, "n_layers": 2, "ffn.d_ff": 64})
# src, tgt = torch.randint(50, (2, 1, 9))
# for name, change in {"clock": {}, "ALiBi": ALIBI, "T5": T5_BIAS}.items():
#     model = Transformer(patch(small, change)).double().eval()
#     for parameter in model.parameters():
#         nn.init.normal_(parameter)
#     mirrored = (model(src, tgt) - model(src.flip(1), tgt)).abs().max()
#     print(f"{name:6s} largest difference {mirrored:.2g}")
#     assert (name == "ALiBi") == bool(mirrored < 1e-10)

# %% [markdown]
# With ALiBi only rounding is left. T5's table can tell the two apart, because each side has rows of its own.
#
# ## Train short, test long
#
# Here is the experiment that the chapter is about. Five small language models (Chapter 25) differ in their positions and in nothing else. All are trained on pieces of 64 characters. Then they read windows of 512, and we look at the loss at each position. Up to 64 they are at home.
#
# Two details. The learned table gets 512 rows, of which training reaches 64. And T5's `max_distance` is 32 here, so that training reaches its last bucket too; Exercise 30.2 asks what 128 would do. One seed a scheme: read large differences only.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import ROPE, train_language_model
# from transformer_annotated.book import machine, scale
# from transformer_annotated.modern.language_model import Characters, any_text, nats_by_position
#
# STEPS, LONG, WINDOWS = (600, 512, None) if scale() == "full" else (5, 128, 8)
# text = any_text()
# characters = Characters(text.train + text.val + text.test)
# train, val = (torch.tensor(characters.encode(part)) for part in (text.train, text.val))
# schemes = {
#     "sinusoid": {},
#     "learned": {"embedding.position": spec(LearnedPositions, max_len=512)},
#     "RoPE": ROPE,
#     "ALiBi": ALIBI,
#     "T5": {**T5_BIAS, "bias": spec(T5Bias, max_distance=32)},
# }
# print(f"{text.name}, {len(train):,} characters; {STEPS} steps; {machine()}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# models, curves = {}, {}
# print(f"nats a character     at 32-63  at 64-127  at {LONG - 64}-{LONG - 1}")
# for name, change in schemes.items():
#     torch.manual_seed(0)
#     model = Transformer(patch(language_model(characters.vocab_size), change, SDPA))
#     train_language_model(model, train, steps=STEPS, length=64, rate=3e-3)
#     models[name], curves[name] = model, nats_by_position(model, val, length=LONG, windows=WINDOWS)
#     parts = [curves[name][a:b].mean() for a, b in ((32, 64), (64, 128), (LONG - 64, LONG))]
#     print(f"{name:18s}" + "".join(f"{part:12.2f}" for part in parts))
#     assert curves[name].shape == (LONG,)
#     assert curves[name].isfinite().all()

# %% mystnb={"figure": {"caption": "Five models trained on 64 characters read 512. With ALiBi the loss stays where it was; with the other four it rises, at once or later.", "name": "fig-extrapolate"}, "image": {"alt": "Five lines of nats a character against the position from 0 to 512, with a mark at 64. ALiBi's line stays level. Those of the sinusoid and the learned table rise steeply at the mark, T5's slowly, RoPE's after about 120."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 3.6))
# middle = torch.arange(LONG).view(-1, 16).float().mean(dim=1)
# for (name, curve), style in zip(curves.items(), ("-", "--", "-.", "-", ":"), strict=True):
#     ax.plot(middle, curve.view(-1, 16).mean(dim=1), style, label=name)
# ax.axvline(64, color="black", linewidth=1)
# ax.text(68, ax.get_ylim()[1], "longest in training", va="top", fontsize=9)
# ax.set(xlabel="position in the window", ylabel="nats a character")
# ax.legend(ncols=5, loc="upper center", bbox_to_anchor=(0.5, 1.14));

# %% [markdown]
# Read {numref}`fig-extrapolate` from the mark on. The clock and the learned table fail at once: they know places, and these places are new. But RoPE and T5 know distances only, as ALiBi does, and they fail too, later. Why?
#
# A late query differs from an early one in two ways: it stands at a new place, and it has more keys, at new distances. The second can be taken away. Give the trained models a *window*, so that each query sees the last 64 keys only, and look again:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, model in models.items():
#     near = Transformer(patch(model.config, {"self_attention.window": 64}))
#     near.load_state_dict(model.state_dict())
#     curve = nats_by_position(near, val, length=LONG, windows=WINDOWS)
#     far = [values[-64:].mean() for values in (curves[name], curve)]
#     print(f"{name:9s} far out: all keys {far[0]:.2f}, the last 64 keys {far[1]:.2f}")

# %% [markdown]
# Where the loss comes back, the new place was harmless and the many distant keys did the damage. Where it does not, the place itself was. So a bias of distances removes one of two difficulties, the places. ALiBi copes with the other too. How? These are the slopes of the four heads. Let all words be equal, and 512 keys be visible:

# %% tags=["active-ipynb"]
# back = torch.arange(512).double()
# for slope in alibi_slopes(4).double().tolist():
#     far = torch.softmax(-slope * back, dim=0)[64:].sum()
#     print(f"slope 1/{round(1 / slope):<4} weight beyond the last 64 keys: {far:6.1%}")

# %% [markdown]
# ALiBi's steep heads act like windows. Its flat heads still see far keys, but every step further counts less. Look at its line in the table before: with a window of 64 the loss hardly moves, so nothing far away was needed. A level curve means that the distant text does no harm, not that it is used.
#
# ## Measure
#
# The paper's model against the two patches, on two tasks: translation, and language as above. All rows of a task have the same budget, with three seeds; Chapter 35 has the whole matrix. Look at whether the ranges overlap.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured
#
# print(measured("alibi", "t5_bias"))

# %% [markdown]
# These texts are as long as those of the training. That is the ordinary case, and there a bias has to earn its place without the advantage of {numref}`fig-extrapolate`. In translation ALiBi has a handicap besides: its encoder cannot tell a source from its mirror image, and the decoder has to guess the order from the words. T5's table starts at zero: its encoder begins without any order, and a short run has to bring that first.
#
# ## What the papers said, what production does
#
# *Train short, test long* is the title of the ALiBi paper. Its main result: a model of 1.3 billion parameters, trained on 1024 tokens, reads 2048 as well as a sinusoidal model that was trained on 2048 {cite:p}`press2022train`. Bloom and MPT took it up. MPT's StoryWriter was tuned on pieces of 65,536 tokens, and its makers report texts of 84,000 {cite:p}`mosaicml2023mpt`.
#
# T5's table came first, in 2019, and the later T5 models keep it. Two habits of the published T5 go with it. Its scores are not divided by $\sqrt{d}$: that is `{"self_attention.scale": 1.0, "cross_attention.scale": 1.0}` here, and left out of `T5_BIAS`, because it is another change. And its norm is the one of Chapter 27.
#
# Loss by position is not the last word either. {cite:t}`kazemnejad2023impact` trained small decoders on tasks such as addition and tested them on longer ones. ALiBi, RoPE and absolute positions carried over badly; T5's bias did best of the schemes that tell a position, and decoders without any did as well or better. A causal mask alone lets a model find out where it is.
#
# Most open models of today rotate instead: Llama does {cite:p}`touvron2023llama,grattafiori2024llama3`. How RoPE is stretched to lengths it was not trained for is the next chapter.
#
# ## How it breaks
#
# - *ALiBi in an encoder.* It trains, and left and right are one. Read a source backwards and compare the logits.
# - *Slopes in another order.* Training from scratch works; published weights make no sense. Compare the slopes of 6 heads, not of 8.
# - *Distance as query minus key.* A causal T5 then puts everything into bucket 0. ALiBi does not notice, because of $|\cdot|$.
# - *A two-sided table in a decoder.* It trains. Half of its rows never get a gradient, and distances are told apart half as finely.
# - *Positions counted over padding.* A bias of distances does not care about a shift, but it does care about padding *between* real tokens.
# - *Distances in 16 bits.* bfloat16 has 8 bits for a number's digits: beyond 256 neighbouring distances become one.

# %% tags=["active-ipynb"]
# steps = torch.arange(1024)
# rounded = (steps * alibi_slopes(8)[0]).bfloat16()  # the bias, rounded to 16 bits
# print("distances 0 to 1023 give", len(rounded.unique()), "different biases in bfloat16")
# attended = ALiBi(8).bfloat16()(steps[None], steps[None]).dense()
# print("in this chapter:", len(attended[0, 0].unique()), "in", attended.dtype)

# %% [markdown]
# `attend` adds the bias in 32 bits. `sdpa` hands PyTorch a mask of the queries' type, and rounds last. That does little harm: where a rounded bias is large, the key has hardly any weight left.
#
# ## Takeaways
#
# - A bias is a number for each head and distance, added to the score: {eq}`eq-score-bias`. Moving the text changes nothing.
# - ALiBi: fixed slopes, {eq}`eq-alibi`. No parameters, no longest position, and no left and right: it is made for decoders. A number that is the same for a whole row may be dropped.
# - T5: a learned table over buckets, {eq}`eq-bucket`; one a stack, one-sided in a decoder, none in cross-attention.
# - What training never reached is not learned: rows, buckets, angles. A level curve beyond the training length means *no harm*, not *long memory*.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 30.1.** Twelve heads: which slopes does ALiBi give them, in order? Answer with a list of twelve numbers, without calling `alibi_slopes`.

# %% tags=["active-ipynb"]
# answer = ...
# check("30.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [2.0**-h for h in range(1, 9)] + [2.0 ** -(h + 0.5) for h in range(4)]
# check("30.1", answer)

# %% [markdown]
# **Exercise 30.2.** A decoder with T5's default table, 32 buckets and `max_distance` 128, is trained on texts of 64 tokens. Which rows of the table never get a gradient? Answer with a sorted list.

# %% tags=["active-ipynb"]
# answer = ...
# check("30.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# reached = t5_bucket(-torch.arange(64), bidirectional=False).tolist()
# answer = sorted(set(range(32)) - set(reached))
# check("30.2", answer)

# %% [markdown]
# **Exercise 30.3.** A head has slope $m$, all products $q \cdot k$ are equal, and there are endlessly many keys behind the query. What is the mean distance at which it looks, as a formula of $m$? Answer with its values for $m = 1/2$ and $m = 1/256$.

# %% tags=["active-ipynb"]
# answer = ...
# check("30.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [1 / math.expm1(m) for m in (1 / 2, 1 / 256)]  # a geometric series: 1 / (e^m - 1)
# check("30.3", answer)

# %% [markdown]
# **Exercise 30.4.** Fill the table of `T5Bias(4, n_buckets=16, max_distance=64, bidirectional=False)` so that it equals `ALiBi(4)` for all distances that have a bucket of their own. Answer with a tensor `(16, 4)`; the other rows may hold anything.

# %% tags=["active-ipynb"]
# answer = ...
# check("30.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = -alibi_slopes(4) * torch.arange(16)[:, None]
# check("30.4", answer)
