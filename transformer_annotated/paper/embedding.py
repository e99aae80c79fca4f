# %% [markdown]
r"""
# Embeddings and positions

How a word becomes a vector, how a vector learns where it stands, and how one table of numbers serves as the way in, twice, and
as the way out.
"""

# %% [markdown]
# All parts so far take vectors and return vectors. A sentence is a list of whole numbers, and a translation is another. This chapter is the
# door on both sides.

# %% mystnb={"figure": {"caption": "Chapter 7 of Part I: the way in and the way out.", "name": "fig-map-embedding"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The seventh, Embeddings, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(7);

# %%
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec
from transformer_annotated.paper.recurrent import check_ids

# %% [markdown]
# ## A table of vectors
#
# Give each word of the vocabulary a number, its *id*, and each id a row in a table of $V$ rows and $D$ columns. Reading row 3 is all there is to an
# **embedding**. The rows are parameters: training moves them.

# %% tags=["active-ipynb"]
# from transformer_annotated import attend
#
# torch.manual_seed(0)
# table = torch.randn(5, 4)  # (V, D)
# ids = torch.tensor([[3, 1, 3]])  # (B, T)
# print(table[ids].shape, torch.equal(table[ids][0, 0], table[3]))

# %% [markdown]
# ## Attention cannot count
#
# Here is the question of this chapter. Let three words attend to each other, then the same three in another order. What changes?

# %% tags=["active-ipynb"]
# x = table[torch.tensor([[0, 1, 2]])][:, None]  # one head
# y = table[torch.tensor([[2, 0, 1]])][:, None]
# print(attend(x, x, x)[0, 0, 0])
# print(attend(y, y, y)[0, 0, 1])

# %% [markdown]
# The first line is what word 0 learns in the first order, the second what it learns in the other. They are the same: without a mask, a weighted average does not know the
# order of what it averages. To such a model *dog bites man* and *man bites dog* are one sentence. The recurrent network of Chapter 1 knew the order
# because it read in order. Here the order has to be written into the vectors.
#
# ## A clock with many hands
#
# How do you write a position so that a network can use it? The number itself, 0 to 1000, is too large next to vectors of size one. Think of a clock. The
# second hand tells near moments apart and repeats every minute. The hour hand is too slow for seconds and tells morning from noon. Together they name
# every moment. The paper takes a clock of $D/2$ hands, each slower than the last by a fixed factor, and writes down each hand as a sine and
# a cosine (section 3.5):
#
# $$
# \mathrm{PE}(p, 2i) = \sin(p\, \omega_i), \qquad \mathrm{PE}(p, 2i+1) = \cos(p\, \omega_i), \qquad
# \omega_i = 10000^{-2i/D}
# $$ (eq-sinusoid)
#
# Here $p = 0, 1, 2, \ldots$ is the position and $i = 0, \ldots, D/2 - 1$ the hand. The first hand turns one radian a position, once around in about 6. At $D = 512$ the last takes nearly $2\pi \cdot 10000$ positions.

# %%
def frequencies(d_model: int, base: float = 10_000.0, device: torch.device | None = None) -> Tensor:
    """Radians a position for each pair, base^(-2i / D): `(D/2,)`, in 32 bits in any model."""
    pairs = torch.arange(0, d_model, 2, device=device)  # 2i = 0, 2, 4, ...
    return base ** (-pairs / d_model)

# %%
class Sinusoid(nn.Module):
    """Sinusoidal position encoding (Vaswani et al. 2017, section 3.5).

    Pair i of the vector for position p holds sin(p w_i) and cos(p w_i), w_i = base^(-2i / D).
    Nothing is learned, and there is no longest position.

    Args:
        d_model: width D, even.
        base: the longest wavelength divided by 2 pi.

    Raises:
        ValueError: an odd `d_model`, or a `base` not above 1.
    """

    def __init__(self, d_model: int, base: float = 10_000.0) -> None:
        super().__init__()
        check_sizes(d_model=d_model)
        if d_model % 2:
            raise ValueError(f"d_model must be even for pairs of sine and cosine, got {d_model}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.d_model, self.base = d_model, base

    def forward(self, positions: Tensor) -> Tensor:
        """Positions `(B, T)` to encodings `(B, T, D)`."""
        angles = positions[..., None] * frequencies(self.d_model, self.base, positions.device)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)

# %% [markdown]
# Nothing here is a parameter: a position's encoding is computed when it is needed, for any position. Sine and cosine of a pair are stacked side by side,
# so they alternate as in {eq}`eq-sinusoid`. Some implementations put all sines first. A trained model does not care, but weights cannot be exchanged
# between the two.

# %% tags=["active-ipynb"]
# import math
#
# clock = Sinusoid(d_model=6)
# print(clock(torch.tensor([[0, 1, 2]])))
# for p in range(3):
#     print([round(f(p * 10000 ** (-2 * i / 6)), 4) for i in range(3) for f in (math.sin, math.cos)])

# %% mystnb={"figure": {"caption": "Left to right the hands get slower: the first columns flicker from position to position, the last hardly move.", "name": "fig-sinusoid"}, "image": {"alt": "A heat map of 64 positions down and 64 dimensions across, with fast stripes at the left that stretch into slow bands at the right."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# from transformer_annotated import figures
#
# encoding = Sinusoid(d_model=64)(torch.arange(64)[None])[0]  # (T, D)
# fig, ax = plt.subplots(figsize=(7.2, 3.4))
# image = figures.heatmap(
#     ax,
#     encoding,
#     row_label="position",
#     col_label="dimension",
#     cmap=figures.DIVERGING,
#     vmin=-1,
#     vmax=1,
# )
# fig.colorbar(image, ax=ax);

# %% [markdown]
# Read {numref}`fig-sinusoid` down a column to watch one hand. Read it along a row to see the time. A pair is two columns: on the right, where the hands
# have hardly moved, the sine is near 0 (white) and the cosine near 1 (red).
#
# ## A shift is a rotation
#
# Why sine *and* cosine? The paper gives the reason in half a sentence: for a fixed distance $k$, the encoding of $p + k$ is a linear function of
# the encoding of $p$. Which one? Take one hand. Its pair $(\sin p\omega, \cos p\omega)$ is a point on a circle. Moving $k$ positions on turns the point by
# the angle $k\omega$, from any start:
#
# $$
# \begin{pmatrix} \sin (p+k)\omega \\ \cos (p+k)\omega \end{pmatrix} =
# \begin{pmatrix} \cos k\omega & \sin k\omega \\ -\sin k\omega & \cos k\omega \end{pmatrix}
# \begin{pmatrix} \sin p\omega \\ \cos p\omega \end{pmatrix}
# $$ (eq-rotation)
#
# The matrix knows $k$ and not $p$. So a projection can learn *three words back* once, for all positions. Check it with one matrix for the whole
# clock:

# %%
def shift_matrix(d_model: int, k: int) -> Tensor:
    """The matrix `(D, D)` that takes the encoding of p to that of p + k, for every p."""
    angle = k * frequencies(d_model).double()
    turns = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), dim=-1)
    return torch.block_diag(*turns.reshape(-1, 2, 2))

# %% tags=["active-ipynb"]
# clock = Sinusoid(d_model=64)
# shift = shift_matrix(64, k=3)
# here = clock(torch.arange(0, 50)[None])[0].double()
# there = clock(torch.arange(3, 53)[None])[0].double()
# error = (here @ shift.T - there).abs().max().item()
# print("one matrix, fifty starting points, largest error below 1e-5:", error < 1e-5)
# assert error < 1e-5

# %% tags=["hide-input"]
def draw_shift(omega: float = 0.35, k: int = 3) -> Any:
    """Draw positions of one hand on the unit circle, and the turn that a shift by k is."""
    import matplotlib.pyplot as plt
    import numpy as np

    from transformer_annotated.figures import COLORS

    ax = plt.subplots(figsize=(7.2, 3.2))[1]
    turn = np.linspace(0, 2 * np.pi, 200)
    ax.plot(np.sin(turn), np.cos(turn), color="#BBBBBB", linewidth=1)
    for p, color in zip((0, 5, 11), COLORS, strict=False):
        a, b = p * omega, (p + k) * omega
        arc = np.linspace(a, b, 40)
        ax.plot(0.93 * np.sin(arc), 0.93 * np.cos(arc), color=color)
        for angle, name in ((a, f"{p}"), (b, f"{p + k}")):
            ax.plot(np.sin(angle), np.cos(angle), "o", color=color)
            ax.text(1.14 * np.sin(angle), 1.14 * np.cos(angle), name, ha="center", va="center")
    ax.set(aspect="equal", xlim=(-1.35, 1.35), ylim=(-1.3, 1.3), xlabel="sine", ylabel="cosine")
    ax.set_xticks([-1, 0, 1])
    ax.set_yticks([-1, 0, 1])
    return ax

# %% mystnb={"figure": {"caption": "One hand of the clock: three positions on is the same turn from every starting point.", "name": "fig-shift"}, "image": {"alt": "Unit circle with three dots at different positions, each joined by an arc to a dot further round; all three arcs span the same angle."}} tags=["active-ipynb"]
# draw_shift();

# %% [markdown]
# Keep this picture. RoPE, in Part III, takes the rotation out of the sum and turns the queries and keys themselves {cite:p}`su2021roformer`.
#
# The size of a sinusoid's vector is the same for every position, because $\sin^2 + \cos^2 = 1$ for each hand: always $\sqrt{D/2}$. And two encodings have a dot product
# that depends on their distance alone:

# %% mystnb={"figure": {"caption": "The dot product of two encodings depends on their distance alone, and on the whole falls with it.", "name": "fig-distance"}, "image": {"alt": "Three curves of dot product against distance for starting positions 100, 300 and 500; they lie on one another, highest at distance zero."}} tags=["active-ipynb"]
# encoding = Sinusoid(d_model=512)(torch.arange(600)[None])[0]
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for start, style in ((100, "-"), (300, "--"), (500, ":")):
#     ax.plot(
#         range(-80, 81),
#         encoding[start - 80 : start + 81] @ encoding[start],
#         style,
#         label=f"from {start}",
#     )
# ax.set(xlabel="distance", ylabel="dot product", ylim=(0, None))
# ax.legend();

# %% [markdown]
# The three curves in {numref}`fig-distance` lie on each other. Near positions look alike, distant ones less.
#
# ## How large is a word, how large is a position
#
# The two are simply added. So their sizes matter. A position has numbers between −1 and 1, with a mean square of one half. What about the word vectors? In section 3.4 the paper
# multiplies them by $\sqrt{D}$ and does not say why, and with an initialisation that is not in the paper either. A likely answer lies at the other end of the model.
#
# At the end, vectors must become scores for each word, the **logits**: a product with a $D \times V$ matrix. The paper uses the *same* table for that, transposed, and also
# shares it between the two languages: one table, three uses {cite:p}`press2017using`. As a way out, the table wants small numbers: a logit is a sum of $D$ products, and rows with numbers of
# variance 1 would give logits of variance $D$. Rows of variance $1/D$ give logits of variance 1. As a way in, the same rows are then too small, by exactly $\sqrt{D}$:

# %% tags=["active-ipynb"]
# D, V = 512, 1000
# rows = torch.randn(V, D) * D**-0.5  # standard deviation 1/sqrt(D)
# hidden = torch.randn(100, D)  # what the last norm returns: variance 1
# position = Sinusoid(d_model=D)(torch.arange(100)[None])
# print(f"logits          std {(hidden @ rows.T).std():.2f}")
# print(f"word            rms {rows.square().mean().sqrt():.3f}")
# print(f"word * sqrt(D)  rms {(rows * D**0.5).square().mean().sqrt():.3f}")
# print(f"position        rms {position.square().mean().sqrt():.3f}")
# print(f"logits from a table of variance 1: std {(hidden @ (rows * D**0.5).T).std():.1f}")

# %% [markdown]
# With a standard deviation of $1/\sqrt{D}$ in the table and a factor of $\sqrt{D}$ on the way in, both ends come out right: logits of size 1, words of size 1, positions of size 0.71.
# Leave the factor out and the words are lost among the positions. Start from PyTorch's default table of variance 1, and the first logits are too large by the same factor: see the last line. The softmax then puts
# nearly all probability on one random word. The factor and the initialisation belong together.

# %%
class Embedding(nn.Module):
    """Token embedding, scaled, plus positions, then dropout (sections 3.4, 3.5 and 5.4).

    Args:
        vocab_size: number V of tokens.
        d_model: width D.
        dropout: probability of dropping an element of the sum in training.
        position: spec of a module `(B, T) -> (B, T, D)`; None adds no positions.
        scale: whether to multiply the token vectors by sqrt(D).

    Raises:
        ValueError: a size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        dropout: float,
        *,
        position: Spec[nn.Module] | None = spec(Sinusoid),
        scale: bool = True,
    ) -> None:
        super().__init__()
        check_sizes(vocab_size=vocab_size, d_model=d_model)
        check_rate("dropout", dropout)
        self.scale = math.sqrt(d_model) if scale else 1.0
        self.tokens = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.tokens.weight, std=d_model**-0.5)
        self.position = None if position is None else position(d_model=d_model)
        self.dropout = nn.Dropout(dropout)

    @property
    def weight(self) -> Tensor:
        """The table `(V, D)`, for a head that shares it."""
        return self.tokens.weight

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Ids `(B, T)` and positions `(B, T)` or `(1, T)` to vectors `(B, T, D)`."""
        check_ids("ids", ids, self.tokens.num_embeddings)
        if positions.shape not in (ids.shape, (1, ids.shape[1])):
            raise ValueError(f"positions must be {tuple(ids.shape)} like the ids, or "
                             f"{(1, ids.shape[1])}, got {tuple(positions.shape)}")  # fmt: skip
        x = self.tokens(ids) * self.scale
        if self.position is not None:
            x = x + self.position(positions).to(x.dtype)
        return self.dropout(x)

# %% [markdown]
# `position` is a seam: learned positions can take the place of the clock, and `None` leaves them out. Dropout acts on the sum, as section 5.4 says. `weight` shows the table to the other
# end. Ids are checked before use. PyTorch's own message for an id outside the table is *index out of range in self*; ours names the id:

# %% tags=["active-ipynb"]
# embedding = Embedding(vocab_size=100, d_model=16, dropout=0.0)
# positions = torch.arange(3)[None]
# print(tuple(embedding(torch.tensor([[5, 99, 0]]), positions).shape))
# for wrong in (torch.tensor([[5, 100, 0]]), torch.tensor([[1.0, 2.0]]), torch.tensor([1, 2])):
#     try:
#         embedding(wrong, positions)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# Positions are an argument, not a count from zero. A sentence padded on the left starts later, and a word that is decoded alone stands where it stands.
#
# ## The way out
#
# `Head` multiplies by the table it is given. It owns nothing unless you ask for a matrix of its own (`tied=False`). So there is one table in the model and one in a saved
# file, and no two copies can drift apart.

# %%
class Head(nn.Module):
    """From vectors to logits: one score for each token (section 3.4).

    Args:
        d_model: width D.
        vocab_size: number V of tokens.
        tied: whether to use the embedding's table, as the paper does, or a matrix of its own.
        bias: whether to add a learned bias to each logit.
        scale: multiplies the logits; 1 in the paper.
        softcap: squashes logits into (-softcap, softcap); None in the paper.
    """

    def __init__(
        self,
        d_model: int,
        vocab_size: int,
        *,
        tied: bool = True,
        bias: bool = False,
        scale: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, vocab_size=vocab_size)
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be above 0, got {softcap}")
        self.scale, self.softcap = scale, softcap
        self.weight = None if tied else nn.Parameter(torch.empty(vocab_size, d_model))
        self.bias = nn.Parameter(torch.zeros(vocab_size)) if bias else None
        if self.weight is not None:
            nn.init.normal_(self.weight, std=d_model**-0.5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """Vectors `(..., D)` and the embedding's table `(V, D)` to logits `(..., V)`."""
        weight = table if self.weight is None else self.weight
        logits = F.linear(x, weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

# %% tags=["active-ipynb"]
# head = Head(d_model=16, vocab_size=100)
# x = torch.randn(2, 3, 16)
# logits = head(x, embedding.weight)
# print("shape", tuple(logits.shape), "  own parameters", sum(p.numel() for p in head.parameters()))
# assert torch.equal(logits, x @ embedding.weight.T)

# %% [markdown]
# Does the gradient reach the table from both ends? From the input alone, only the rows of words that occur would move. From the output, every word's row does, since the softmax
# pushes down what was not said.

# %% tags=["active-ipynb"]
# ids = torch.tensor([[5, 6]])
# for name, way_in in (("both ends", embedding.weight), ("output only", embedding.weight.detach())):
#     x = F.embedding(ids, way_in) * 4
#     loss = F.cross_entropy(head(x, embedding.weight)[0], torch.tensor([7, 8]))
#     (gradient,) = torch.autograd.grad(loss, embedding.weight)
#     norms = gradient.norm(dim=1)
#     print(f"{name:12s} row 5: {norms[5]:.3f}   row 7: {norms[7]:.3f}   row 50: {norms[50]:.4f}")

# %% [markdown]
# Row 5 is a word that went in, row 7 one that should have come out, row 50 one that had nothing to do with it. With both ends joined, row 5 gets more. Sharing also saves
# parameters: at $V = 37{,}000$ and $D = 512$ the table has 18.9 million, and with three of them the base model would have 101 million instead of 63.
#
# ## Proof
#
# The embedding against a loop that looks up, scales and adds one number at a time, with `math.sin` in double precision:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# module = Embedding(vocab_size=11, d_model=8, dropout=0.0)
# ids, positions = torch.randint(0, 11, (2, 5)), torch.tensor([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
# output = module(ids, positions)
# for b in range(2):
#     for t in range(5):
#         for j in range(8):
#             angle = positions[b, t].item() * 10000 ** (-(j - j % 2) / 8)
#             wave = math.sin(angle) if j % 2 == 0 else math.cos(angle)
#             expected = module.weight[ids[b, t], j].item() * math.sqrt(8) + wave
#             assert abs(output[b, t, j].item() - expected) < 1e-5
# (gradient,) = torch.autograd.grad(output.sum(), module.weight)
# counts = torch.bincount(ids.flatten(), minlength=11)
# torch.testing.assert_close(gradient, (counts * math.sqrt(8))[:, None].expand(11, 8))
# print("eighty numbers and the gradient equal the loop's")

# %% [markdown]
# ## What production does
#
# BERT and GPT-2 learn a table of positions and cannot go beyond its end. T5 and ALiBi add something to the scores
# that depends on distance. Llama and most since rotate queries and keys. The tied table is still common in small models, where it is a large share of the parameters, and rare
# in large ones. The factor $\sqrt{D}$ lives on in Gemma.
#
# ## How it breaks
#
# - *No positions at all.* To the encoder, *dog bites man* and *man bites dog* are one memory. (The decoder still learns some order: its causal mask shows each place a different number of words.)
# - *No $\sqrt{D}$.* Slow at the start. Print the sizes of words and positions.
# - *Positions that count the padding.* A sentence gives another answer in another batch. Test with padding on the left.
# - *A "shared" table that is copied.* The count of parameters is too high by $V D$.
#
# ## Takeaways
#
# - Attention ignores order. Positions are added to the vectors: sines and cosines, from fast to slow.
# - A shift by $k$ is one rotation, the same from everywhere: {eq}`eq-rotation`.
# - One table serves three times. Standard deviation $1/\sqrt{D}$ and the factor $\sqrt{D}$ make both ends come out at size 1.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 7.1.** With $D = 512$, after how many positions does the first hand come round, and how many does the last one take? Answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("7.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# omega = frequencies(512)
# answer = [2 * math.pi / omega[0].item(), 2 * math.pi / omega[-1].item()]
# check("7.1", answer)

# %% [markdown]
# **Exercise 7.2.** What is the norm, the root of the sum of squares, of the vector that `Sinusoid(512)` gives to position 1234? Answer before you compute.

# %% tags=["active-ipynb"]
# answer = ...
# check("7.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = Sinusoid(512)(torch.tensor([[1234]])).norm().item()
# check("7.2", answer)

# %% [markdown]
# **Exercise 7.3.** The base model has $V = 37{,}000$ and $D = 512$. How many parameters does three-way sharing save, compared with three tables of that size?

# %% tags=["active-ipynb"]
# answer = ...
# check("7.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 2 * 37_000 * 512
# check("7.3", answer)
