# %% [markdown]
r"""
# RoPE

Queries and keys are turned, pair by pair, by an angle that grows with their position. Of the positions, a score then
knows only the distance between two words, not where in the text they stand.
"""

# %% [markdown]
# Chapter 7 added the position to the word. This chapter leaves the word alone and turns what is compared. Most language models of today do it this way.

# %% mystnb={"figure": {"caption": "Chapter 29 of Part III: positions as turns.", "name": "fig-map-rope"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The fifth, RoPE, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(29);

# %%
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_annotated.paper.embedding import frequencies
from transformer_annotated.paper.parts import Spec, check_sizes, spec

# %% [markdown]
# Two seams change. The embedding gives up its sinusoids, and self-attention gets positions of its own. Cross-attention stays as it was:

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, ROPE, diff, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, ROPE)))

# %% mystnb={"figure": {"caption": "RoPE takes the positions out of the embedding and puts them into self-attention; cross-attention stays as it was.", "name": "fig-seams-rope"}, "image": {"alt": "Two stacks of boxes, encoder and decoder. The embeddings and the self-attentions of both are coloured; all other boxes are pale."}} tags=["active-ipynb"]
# figures.seams(["embedding", "self_attention"]);

# %% [markdown]
# ## What does a score know?
#
# A text says *the dog sleeps* on its first page and again on its ninth. The two sentences mean the same. Does attention see the same? Take the 2017 way: add a sinusoid to each
# word, project, and score. The two words stay three places apart, and we move both along the text.

# %% tags=["active-ipynb"]
# from transformer_annotated import Sinusoid
#
# torch.manual_seed(0)
# dog, sleeps = torch.randn(2, 16)
# W_q, W_k = torch.randn(2, 16, 16) / 4
# clock = Sinusoid(d_model=16)
#
#
# def wave(p: int) -> Tensor:
#     """The sinusoid of position p: `(16,)`."""
#     return clock(torch.tensor([[p]]))[0, 0]
#
#
# for start in (0, 10, 100, 1000):
#     q, k = (sleeps + wave(start + 3)) @ W_q, (dog + wave(start)) @ W_k
#     print(f"places {start + 3:4d} and {start:4d}: score {q @ k:6.2f}")

# %% [markdown]
# Four places, four scores. Multiply the sum out and you see why. With words $x, y$, the sinusoids $s_i, s_j$ of their positions and $W = W^Q W^{K\top}$, the score is
#
# $$
# (x + s_i)\, W\, (y + s_j)^\top = x W y^\top + x W s_j^\top + s_i W y^\top + s_i W s_j^\top .
# $$ (eq-four-terms)
#
# The first term knows no place. The second and the third know *where* one of the words stands, not how far apart they are. The last could know the distance, for a special $W$; a
# model has to learn it. What we would like is a score that knows the two words and the distance $i - j$, for every $W$.
#
# ## Two arrows
#
# Let queries and keys have two numbers each. They are arrows in a plane, and their product is $|q|\,|k|$ times the cosine of the angle between them. Turn both arrows by the same
# angle: the angle between them stays, and so does the product. Now turn the query by $i$ times some angle and the key by $j$ times that angle. The angle between them changes
# by $i - j$ times the angle. That is the whole idea. Try it, with half a radian a position:

# %% tags=["active-ipynb"]
# def turned(arrow: Tensor, angle: float) -> Tensor:
#     """An arrow `(2,)`, turned to the left by `angle` radians."""
#     a, b = arrow
#     c, s = torch.tensor(angle).cos(), torch.tensor(angle).sin()
#     return torch.stack((a * c - b * s, b * c + a * s))
#
#
# q, k = torch.tensor([0.8, 0.6]), torch.tensor([1.0, 0.2])
# for i, j in ((3, 1), (8, 6), (103, 101), (3, 3), (8, 3)):
#     score = turned(q, 0.5 * i) @ turned(k, 0.5 * j)
#     print(f"query at {i:3d}, key at {j:3d}, distance {i - j}: score {score:6.3f}")

# %% [markdown]
# The first three lines agree: distance 2, wherever it is. The fourth, at distance 0, is the plain product $q \cdot k$. The fifth, at distance 5, is negative: by now the two arrows point nearly opposite ways, as on the right of {numref}`fig-turns`.

# %% tags=["hide-input"]
def draw_turns(omega: float = 0.5) -> Any:
    """Draw the query and the key above, turned by their positions, for three pairs of positions."""
    import math

    import matplotlib.pyplot as plt
    import numpy as np

    from transformer_annotated.figures import COLORS

    axes = plt.subplots(1, 3, figsize=(7.2, 2.7))[1]
    for ax, (i, j) in zip(axes, ((3, 1), (8, 6), (8, 3)), strict=True):
        query, key = math.atan2(0.6, 0.8) + i * omega, math.atan2(0.2, 1.0) + j * omega
        turn = np.linspace(0, 2 * np.pi, 100)
        ax.plot(np.cos(turn), np.sin(turn), color="#CCCCCC", linewidth=1)
        names = {f"q at {i}": query, f"k at {j}": key}
        for (name, angle), color in zip(names.items(), COLORS, strict=False):
            x, y = np.cos(angle), np.sin(angle)
            ax.annotate(
                "", (x, y), (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 2}
            )
            ax.text(1.28 * x, 1.2 * y, name, ha="center", va="center", color=color, fontsize=9)
        arc = np.linspace(key, query, 30)
        ax.plot(0.4 * np.cos(arc), 0.4 * np.sin(arc), color="#555555")
        ax.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.35, 1.35), title=f"distance {i - j}")
        ax.set_axis_off()
    return axes

# %% mystnb={"figure": {"caption": "Left and middle: five places further along the text, the same angle between query and key. Right: another distance, another angle.", "name": "fig-turns"}, "image": {"alt": "Three circles, each with an arrow for a query and one for a key and an arc between them. The arcs of the first two circles are equally long; the third is longer."}} tags=["active-ipynb"]
# draw_turns();

# %% [markdown]
# ## The equation
#
# One angle a position is not enough: it comes round, and then two distances look alike. So cut a head of $d$ numbers into $d/2$
# pairs, and give each pair an angle of its own. Su and others {cite:p}`su2021roformer` take the frequencies of Chapter 7 and call the result **RoPE**, rotary position embedding. The letters $i$ and $j$ are
# positions here, so we count pairs by $m$; Chapter 7 called the pair $i$. For pair $m = 0, \ldots, d/2 - 1$, with numbers $(a, b)$, at position $p$:
#
# $$
# R_p \begin{pmatrix} a \\ b \end{pmatrix} =
# \begin{pmatrix} \cos p\,\omega_m & -\sin p\,\omega_m \\ \sin p\,\omega_m & \cos p\,\omega_m \end{pmatrix}
# \begin{pmatrix} a \\ b \end{pmatrix}, \qquad \omega_m = \mathrm{base}^{-2m/d}, \quad \mathrm{base} = 10000
# $$ (eq-rope)
#
# The transpose of a turn turns back, since $\sin(-x) = -\sin x$. So $R_i^\top R_j$ turns back by $i$ and on by $j$, which is a turn by $j - i$, in every pair:
#
# $$
# (R_i\, q)^\top (R_j\, k) = q^\top R_i^\top R_j\, k = q^\top R_{j-i}\, k .
# $$ (eq-relative)
#
# The positions stand on the left, and only their difference on the right. No $W$ had to be learned for that.
#
# ## The code
#
# Read the two rows of {eq}`eq-rope` again. Each number is multiplied by the cosine, and its *partner* in the pair by the sine: with a minus for the first of the two, with a plus for the
# second. So we need the partners, in the places of the numbers.
#
# Which numbers make a pair? There are two habits. **Interleaved**: neighbours, 0 with 1, 2 with 3. **Halves**: number $m$ of the first half with number $m$ of the second. We come back
# to this. In the halves layout the partners are the head rolled by half its width.

# %%
def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn each pair of `x` `(..., r)` by the angle whose `cos` and `sin` are `(..., r/2)`.

    Pair m is the numbers m and m + r/2 (the halves layout), or 2m and 2m + 1 if `interleaved`.
    """
    if interleaved:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        cos, sin = cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    else:
        partner = x.roll(x.shape[-1] // 2, dims=-1)
        cos, sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
    return (x * cos + partner * sin).to(x.dtype)

# %% tags=["active-ipynb"]
# x = torch.arange(6.0)
# quarter = torch.zeros(3), torch.ones(3)  # cos and sin of a quarter turn
# print("halves     ", rotate(x, *quarter).tolist())
# print("interleaved", rotate(x, *quarter, interleaved=True).tolist())

# %% [markdown]
# A quarter turn takes $(a, b)$ to $(-b, a)$. In the first line 0 and 3 were a pair, in the second 0 and 1.
#
# The frequencies may come from elsewhere: Chapter 31 slows some of them down for longer texts. What it hands over is an object of this form, and None leaves the frequencies alone. It also hands over a factor, 1 here; Chapter 31 says what for. You may skip the next cell.

# %%
class Scaling(Protocol):
    """A rule that changes the frequencies, for texts longer than those of training."""

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies in radians a position, and a factor on cosines and sines.

        Args:
            head_dim: how many numbers of a head are turned, r.
            base: the base of the frequencies before scaling.
            length: `(B, 1)`, one more than the largest position of each row.

        Returns:
            Frequencies `(r/2,)`, or `(B, 1, r/2)` where they depend on `length`; and the factor.
        """
        ...

# %% [markdown]
# Now the module. Chapter 4 left a seam for it: `position(q, k, positions, key_positions)`, called after the projections and before the scores. `forward` makes the two vectors on the left side of
# {eq}`eq-relative`, `turn` is {eq}`eq-rope` for a whole tensor. There are no parameters and no table; angles are computed when they are needed.
#
# A position for each vector is not optional here, and a single position for many would be spread over all of them without a word. So they are checked first.

# %%
def checked_positions(name: str, positions: Tensor | None, x: Tensor) -> Tensor:
    """`positions`, after checking that there is one for each vector of `x` `(B, H, T, d)`."""
    if positions is None:
        raise ValueError(f"{name} must be given: RoPE turns vectors by their positions, got None")
    if positions.shape not in ((x.shape[0], x.shape[2]), (1, x.shape[2])):
        raise ValueError(
            f"{name} must be {(x.shape[0], x.shape[2])} or {(1, x.shape[2])}, "
            f"got {tuple(positions.shape)}"
        )
    return positions

# %%
class RoPE(nn.Module):
    """Rotary position embedding (Su et al. 2021, section 3.2.2).

    Pair m of a query or key at position p is turned by the angle p base^(-2m / r). Nothing is
    learned. Angles are computed in at least 32 bits, whatever the model's dtype.

    Args:
        head_dim: numbers in one head, d.
        base: the longest wavelength is nearly 2 pi base positions.
        rotary_dim: how many numbers of a head, its first, are turned: r; None for all. The
            frequencies are then those of a head of r numbers.
        interleaved: whether a pair is two neighbours (the paper, GPT-J) or numbers r/2 apart
            (GPT-NeoX, Llama's checkpoints at Hugging Face).
        scaling: spec of a `Scaling`; None leaves the frequencies alone.

    Raises:
        ValueError: a `head_dim` or `rotary_dim` that is odd or below 1, a `rotary_dim` above
            `head_dim`, or a `base` not above 1.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        base: float = 10_000.0,
        rotary_dim: int | None = None,
        interleaved: bool = False,
        scaling: Spec[Any] | None = None,
    ) -> None:
        super().__init__()
        check_sizes(head_dim=head_dim, rotary_dim=rotary_dim)
        name, r = ("head_dim", head_dim) if rotary_dim is None else ("rotary_dim", rotary_dim)
        if r % 2:
            raise ValueError(f"{name} must be even, for pairs, got {r}")
        if r > head_dim:
            raise ValueError(f"rotary_dim must be at most head_dim, got {r} and {head_dim}")
        if not base > 1:
            raise ValueError(f"base must be above 1, got {base}")
        self.head_dim, self.rotary_dim = head_dim, r
        self.base, self.interleaved = base, interleaved
        self.scaling: Scaling | None = None if scaling is None else scaling()

    def frequencies(self, positions: Tensor, key_positions: Tensor) -> tuple[Tensor, float]:
        """Radians a position for each pair, and the factor on cosines and sines."""
        if self.scaling is None:
            return frequencies(self.rotary_dim, self.base, positions.device), 1.0
        longest = (p.amax(dim=-1, keepdim=True) for p in (positions, key_positions))
        return self.scaling(self.rotary_dim, self.base, torch.maximum(*longest) + 1)

    def turn(self, x: Tensor, positions: Tensor, omega: Tensor, factor: float = 1.0) -> Tensor:
        """`x` `(B, H, T, d)` with its first `rotary_dim` numbers turned by positions times omega."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = (positions[..., None].to(dtype) * omega.to(dtype))[:, None]  # (B, 1, T, r/2)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if self.rotary_dim == self.head_dim:
            return rotate(x, cos, sin, self.interleaved)
        first, rest = x.split((self.rotary_dim, self.head_dim - self.rotary_dim), dim=-1)
        return torch.cat((rotate(first, cos, sin, self.interleaved), rest), dim=-1)

    def forward(
        self, q: Tensor, k: Tensor, positions: Tensor | None, key_positions: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Turn queries and keys by where they stand.

        Args:
            q, k: `(B, H, T, d)` and `(B, K, S, d)`.
            positions, key_positions: `(B, T)` and `(B, S)`, or one row `(1, T)`, `(1, S)`.

        Raises ValueError for positions that are missing or not as many as the vectors.
        """
        here = checked_positions("positions", positions, q)
        there = checked_positions("key_positions", key_positions, k)
        omega, factor = self.frequencies(here, there)
        return self.turn(q, here, omega, factor), self.turn(k, there, omega, factor)

# %% tags=["active-ipynb"]
# rope = RoPE(head_dim=16)
# q, k = torch.randn(2, 4, 7, 16), torch.randn(2, 2, 7, 16)  # (B, H, T, d), (B, K, S, d)
# positions = torch.arange(7)[None]
# new_q, new_k = rope(q, k, positions, positions)
# print(tuple(new_q.shape), tuple(new_k.shape))
# print("parameters:", sum(p.numel() for p in rope.parameters()))
# for wrong in (lambda: RoPE(15), lambda: RoPE(16, base=1.0), lambda: rope(q, k, None, positions)):
#     try:
#         wrong()
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## Proof
#
# The reference multiplies complex numbers. A pair is a complex number $a + b\,\mathrm{i}$, and turning it is one multiplication by $e^{\mathrm{i} p \omega}$. Positions are drawn at random, other ones for the
# keys than for the queries, so that nothing is right by accident. The frequencies are
# written down a second time, in 64 bits, and compared with the library's, which has 32.

# %% tags=["active-ipynb"]
# def by_complex(x: Tensor, positions: Tensor, interleaved: bool) -> Tensor:
#     """`x` `(B, H, T, d)` with each pair times exp(i p w)."""
#     d = x.shape[-1]
#     exact = 10_000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
#     omega = frequencies(d).double()
#     torch.testing.assert_close(omega, exact, rtol=1e-6, atol=0)
#     pairs = x.unflatten(-1, (-1, 2)) if interleaved else x.unflatten(-1, (2, -1)).mT
#     unit = torch.ones((), dtype=torch.float64)
#     turn = torch.polar(unit, positions[:, None, :, None] * omega)  # exp(i p w)
#     product = torch.view_as_complex(pairs.contiguous()) * turn
#     pairs = torch.view_as_real(product)
#     return (pairs if interleaved else pairs.mT).flatten(-2)
#
#
# q = torch.randn(2, 4, 7, 16, dtype=torch.float64, requires_grad=True)
# k = torch.randn(2, 2, 7, 16, dtype=torch.float64, requires_grad=True)
# here, there = torch.randint(0, 500, (2, 2, 7))  # (B, T), (B, S)
# for interleaved in (False, True):
#     ours = RoPE(16, interleaved=interleaved)(q, k, here, there)
#     for x, at, mine in ((q, here, ours[0]), (k, there, ours[1])):
#         reference = by_complex(x, at, interleaved)
#         torch.testing.assert_close(mine, reference, rtol=0, atol=1e-10)
#         direction = torch.randn_like(x)
#         (a,), (b,) = (torch.autograd.grad(y, x, direction) for y in (mine, reference))
#         torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
#         torch.testing.assert_close(mine.norm(dim=-1), x.norm(dim=-1))  # a turn keeps lengths
# print("frequencies, output and gradient are right in both layouts; lengths are kept")

# %% [markdown]
# The test suite compares with the tensors that Hugging Face's Llama and GPT-J compute. Here is a second reference, from Chapter 7. It had a matrix that moves the *encoding* of a position by $k$ places.
# Is it the same turn? Chapter 7 writes the sine first and the cosine second, so its hands go the other way round, and the matrix must be transposed.

# %% tags=["active-ipynb"]
# from transformer_annotated.paper.embedding import shift_matrix
#
# x = torch.randn(1, 1, 1, 16, dtype=torch.float64)
# ours, _ = RoPE(16, interleaved=True)(x, x, torch.tensor([[5]]), torch.tensor([[5]]))
# torch.testing.assert_close(ours[0, 0, 0], shift_matrix(16, 5).T @ x[0, 0, 0], rtol=0, atol=1e-12)
# print("RoPE at position 5 is Chapter 7's shift by 5")

# %% [markdown]
# So the turn was in the paper of 2017 already. There it related two positions inside a sum; here it acts on the query and the key themselves.
#
# ## The patch
#
# One spec in, one sinusoid out. This is the change that stands at the top of the page:

# %%
ROPE = {"self_attention.position": spec(RoPE), "embedding.position": None}

# %% [markdown]
# A path without a stack means both stacks. Sinusoids and RoPE at once are an error: the model would be told its positions twice.

# %% tags=["active-ipynb"]
# from transformer_annotated import Transformer
#
# try:
#     Transformer(patch(PAPER_BASE, {"self_attention.position": spec(RoPE)}))
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## A model that does not see the numbers
#
# Equation {eq}`eq-relative` holds for one score. Does it hold for a whole model? We build two language models, move every parameter at random, and number the same text from 0 and from 100.

# %% tags=["active-ipynb"]
# from transformer_annotated import DECODER_ONLY
#
# SMALL = {
#     "vocab_size": 50,
#     "d_model": 32,
#     "n_layers": 2,
#     "self_attention.n_heads": 4,
#     "ffn.d_ff": 64,
#     "dropout": 0.0,
# }
#
#
# def build(*patches: dict[str, Any]) -> Transformer:
#     """A small model in 64 bits, every parameter moved at random, norms and biases too."""
#     torch.manual_seed(0)
#     model = Transformer(patch(PAPER_BASE, SMALL, *patches)).double().eval()
#     with torch.no_grad():
#         for parameter in model.parameters():
#             parameter += 0.3 * torch.randn_like(parameter)
#     return model
#
#
# def shown(difference: float) -> str:
#     """A difference in two digits; one that is mere rounding by its bound."""
#     return f"{difference:.2f}" if difference > 1e-10 else "below 1e-10"
#
#
# ids, far = torch.randint(0, 50, (2, 12)), torch.arange(100, 112)[None]
# for name, change in (("sinusoid", {}), ("RoPE", ROPE)):
#     model = build(DECODER_ONLY, change)
#     moved = model.logits(model.decode(ids, positions=far))
#     difference = (moved - model(ids)).abs().max().item()
#     print(f"{name:9s} largest difference of a logit: {shown(difference)}")
#     assert (difference < 1e-10) == (name == "RoPE")

# %% [markdown]
# With RoPE nothing moves but rounding. The number that a text begins with has no influence. (What stands before a phrase still has, of course.)
#
# ## Both directions, and none between languages
#
# An encoder looks both ways: a query sees keys before and after it. With RoPE it hears which, since $\sin$ changes its sign with $i - j$. One pair, one radian a position:

# %% tags=["active-ipynb"]
# rope = RoPE(head_dim=2)
# q, k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.6, 0.8]).view(1, 1, 1, 2)
# for j in range(2, 9):
#     a, b = rope(q, k, torch.tensor([[5]]), torch.tensor([[j]]))
#     print(f"i - j = {5 - j:2d}   score {(a * b).sum():6.3f}")

# %% [markdown]
# Three back and three ahead are different scores. Nothing else had to be added for the encoder.
#
# Cross-attention gets no RoPE. A query stands at place $i$ of an English sentence, a key at place $j$ of a German one. Both can be written down and subtracted, but $i - j$ is no distance: it compares two
# counts that began in different texts. The next cell gives it one all the same. It then numbers the source from 7 instead of 0 and the target as before.

# %% tags=["active-ipynb"]
# src, tgt = torch.randint(0, 50, (1, 9)), torch.randint(0, 50, (1, 6))
# turns_across = {"cross_attention.n_heads": 4, "cross_attention.position": spec(RoPE)}
# for name, change in (("self", {"cross_attention.n_heads": 4}), ("self and cross", turns_across)):
#     model = build(ROPE, change)
#     later = torch.arange(7, 16)[None]
#     memory = model.encode(src, positions=later)
#     moved = model.logits(model.decode(tgt, memory, memory_positions=later))
#     difference = (moved - model(src, tgt)).abs().max().item()
#     print(f"RoPE in {name:15s} largest difference of a logit: {shown(difference)}")
#     assert (difference < 1e-10) == (name == "self")

# %% [markdown]
# With RoPE in self-attention alone, either text may begin anywhere. With RoPE across, the logits depend on the number that the source happens to begin with.
# That alone is no error: the sinusoids of 2017 depend on it too. But the difference of two counts is not a distance, and RoPE would treat it as one.
# Between languages of like word order it may serve as a hint, since word 5 often answers word 5; a title in front, or one longer phrase, spoils it.
#
# How does the decoder find its place in the source, then? It has only the content left: the vectors of the memory have been through the encoder's self-attention and say what stands around them.
#
# ## Two layouts, one function
#
# The paper turns neighbours, and GPT-J does too {cite:p}`wang2021gptj`. GPT-NeoX turns halves {cite:p}`black2022gptneox`, and so do Llama's checkpoints at Hugging Face. Meta's own Llama files turn neighbours; the conversion to Hugging Face permutes the rows, with just this order. Both layouts are right: the numbers
# inside a head have no order of their own, because $q \cdot k$ is a sum. But weights learned in one layout are useless in the other, and no shape differs. To exchange them, permute the rows of `q_proj` and
# `k_proj` within each head:

# %%
def halves_order(head_dim: int, rotary_dim: int | None = None) -> Tensor:
    """The rows of an interleaved head in the order of the halves layout: `(d,)`.

    With `W` the rows of `q_proj` or `k_proj` that make one head, `W[order]` makes the same head
    for the other layout: pair (2m, 2m + 1) moves to (m, m + r/2). `order.argsort()` leads back.
    The bias of the projection and the weight of a QK-norm (a norm on queries and keys,
    Chapter 27) are permuted alike.
    """
    r = head_dim if rotary_dim is None else rotary_dim
    return torch.cat((torch.arange(0, r, 2), torch.arange(1, r, 2), torch.arange(r, head_dim)))

# %% tags=["active-ipynb"]
# order = halves_order(8)
# print("order", order.tolist())
# neighbours, halves = (
#     build(DECODER_ONLY, ROPE, {"self_attention.position.interleaved": flag})
#     for flag in (True, False)
# )
# weights = neighbours.state_dict()
# halves.load_state_dict(weights)
# wrong = (halves(ids) - neighbours(ids)).abs().max().item()
# for name, weight in weights.items():
#     if "q_proj" in name or "k_proj" in name:  # matrices (D, D) and biases (D,)
#         weights[name] = weight.unflatten(0, (-1, 8))[:, order].flatten(0, 1)
# halves.load_state_dict(weights)
# right = (halves(ids) - neighbours(ids)).abs().max().item()
# print(f"the same weights: {shown(wrong)}   permuted rows: {shown(right)}")
# assert right < 1e-10 < wrong

# %% [markdown]
# Values are not permuted: nothing turns them. The first number is what a conversion gets that forgets the rows. The model
# runs, and its logits are wrong.
#
# ## Far away
#
# What does distance do to a score? Take a query and a key that are equal, of length 1, with their numbers of equal size. At distance $n$ their score is the mean of $\cos n \omega_m$ over the pairs.

# %% mystnb={"figure": {"caption": "The score of two equal vectors falls with distance, in ripples; a larger base makes the fall slower.", "name": "fig-rope-decay"}, "image": {"alt": "Two curves over distances from 1 to 4096 on a logarithmic axis. Both start near 1 and fall; the one for base 10,000 falls faster and ripples around a low level, the one for base 500,000 stays above it."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# distance = torch.arange(1, 4097)
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for base, color in ((1e4, figures.COLORS[0]), (5e5, figures.COLORS[1])):
#     scores = (distance[:, None] * frequencies(128, base)).cos().mean(dim=-1)
#     ax.plot(distance, scores, color=color, linewidth=1, label=f"base {base:,.0f}")
# ax.axhline(0, color="#888888", linewidth=0.8)
# ax.set(xlabel="distance", ylabel="score", xscale="log", title="d = 128")
# ax.legend();

# %% [markdown]
# In {numref}`fig-rope-decay` near keys are preferred, for equal vectors. The ripples are the fast pairs coming round. The paper derives a bound for the size of a score and shows in a plot that it falls with distance (section 3.4.3). It is no law about
# trained models: queries and keys need not be alike. Draw them independently, and there is no fall at all:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# q, k = torch.randn(2, 4000, 1, 1, 64)
# for n in (0, 1, 10, 100, 1000):
#     a, b = RoPE(64)(q, k, torch.tensor([[n]]), torch.tensor([[0]]))
#     size = (a * b).sum(dim=-1).square().mean().sqrt() / 8
#     print(f"distance {n:4d}   root mean square of the score {size:.2f}")

# %% [markdown]
# A turned random vector is just as random, so it must be so: on average the score is 0, and its size is the same at every distance. The fall in the figure came from taking query and key equal, and a model can
# choose the distance at which they are: any pair $(q, k)$ with $k = R_n\, q$ scores highest at distance $n$. Here $n = 37$:

# %% tags=["active-ipynb"]
# rope, q = RoPE(64), torch.randn(1, 1, 1, 64)
# _, k = rope(q, q, torch.tensor([[0]]), torch.tensor([[37]]))  # R_37 q
# at = torch.arange(1000)[None]  # a query at each distance from a key at 0
# turned_q, turned_k = rope(q.expand(1, 1, 1000, 64), k, at, torch.tensor([[0]]))
# print("highest score at distance", (turned_q @ turned_k.mT).argmax().item())

# %% [markdown]
# Barbero and others {cite:p}`barbero2025round` found the same, and that a trained Gemma uses fast pairs for heads that look at a fixed place, such as the word before, and slow ones
# for meaning, since those hardly turn.

# %% mystnb={"figure": {"caption": "Wavelengths run from six positions to tens of thousands, or to millions with the larger base; more pairs then do not come round once in 8,192 positions.", "name": "fig-wavelengths"}, "image": {"alt": "Two straight rising lines on a logarithmic axis of positions, over 64 pairs, for base 10,000 and 500,000. A horizontal line marks 8,192 positions."}} tags=["active-ipynb"]
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for base, style in ((1e4, "o"), (5e5, "^")):
#     waves = 2 * torch.pi / frequencies(128, base)
#     ax.plot(range(64), waves, style, markersize=3, label=f"base {base:,.0f}")
# ax.axhline(8192, color="#888888", linewidth=0.8)
# ax.text(0, 13000, "8,192 positions", fontsize=8)
# ax.set(xlabel="pair", ylabel="positions for one turn", yscale="log")
# ax.legend(loc="lower right");

# %% [markdown]
# How many are above the line in {numref}`fig-wavelengths`?

# %% tags=["active-ipynb"]
# for base in (1e4, 5e5):
#     waves = 2 * torch.pi / frequencies(128, base)
#     print(f"base {base:7,.0f}: {(waves > 8192).sum()} of 64 pairs")

# %% [markdown]
# A larger base makes the slow pairs slower. Two things follow. At the same length fewer pairs come round, so far places stay apart. And a slow pair turns less in a given number of positions.
#
# The price: a pair that has not come round in training has not shown all its angles, and a text longer than those of training brings new ones. That is where models of this kind break, and a larger base alone does not
# prevent it: the model must be trained with it. Chapter 31 compares the repairs. Llama 3 has base 500,000 {cite:p}`grattafiori2024llama3`, following {cite:t}`xiong2023effective`.
#
# Not every number has to turn. `rotary_dim` turns the first $r$ of them and leaves the others to meaning alone. The frequencies are then those of a head of $r$ numbers. GPT-J turns 64 of 256, GPT-NeoX a quarter.

# %% [markdown]
# ## With a cache
#
# The cache of Chapter 20 keeps keys as they were projected, before any turn. So each step turns all $S$ keys again, in every layer, and each layer computes the same angles anew. That is simple and always right, and for long texts it costs more than
# the attention itself. One step of one layer, 8 heads of 64 numbers:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from transformer_annotated import sdpa
# from transformer_annotated.book import machine, scale
# from transformer_annotated.training.speed import race
#
# torch.set_num_threads(1)
# full = scale() == "full"
# S = 4096 if full else 64
# q, (k, v) = torch.randn(1, 8, 1, 64), torch.randn(2, 1, 8, S, 64)
# rope, at = RoPE(64), torch.arange(S)[None]
# omega, factor = rope.frequencies(at, at)
# runs = {
#     f"turn {S} keys": lambda: rope.turn(k, at, omega, factor),
#     "turn one key": lambda: rope.turn(k[:, :, -1:], at[:, -1:], omega, factor),
#     f"attend to {S} keys": lambda: sdpa(q, k, v),
# }
# print(machine())
# for name, values in race(runs, 15 if full else 1).items():
#     print(f"{name:20s}{1000 * median(values):7.2f} ms")

# %% [markdown]
# Production computes cosines and sines once for all layers, keeps turned keys, and turns each once. While the frequencies stay as they are, that is the same to the last bit:

# %% tags=["active-ipynb"]
# k, rope, steps = torch.randn(1, 2, 12, 16), RoPE(16), torch.arange(12)[None]
# omega, factor = rope.frequencies(steps, steps)
# kept = [rope.turn(k[:, :, t : t + 1], steps[:, t : t + 1], omega, factor) for t in range(12)]
# assert torch.equal(torch.cat(kept, dim=2), rope.turn(k, steps, omega, factor))
# print("turned one by one and kept == turned together")

# %% [markdown]
# Where frequencies depend on the length of the text it is not, and unturned keys are what one must keep. Chapter 31 shows that case.
#
# ## Measure
#
# First the cost in training. Attention with and without RoPE, 8 rows of 256 positions, a forward and a backward pass:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import MultiHeadAttention
#
# D, T = (512, 256) if full else (64, 16)
# x, steps = torch.randn(8, T, D, requires_grad=True), torch.arange(T)[None]
# kinds = {"none": None, "halves": spec(RoPE), "interleaved": spec(RoPE, interleaved=True)}
# modules = {name: MultiHeadAttention(D, 8, position=p, attend=sdpa) for name, p in kinds.items()}
# runs = {name: (lambda m=m: m(x, positions=steps).sum().backward()) for name, m in modules.items()}
# times = {name: median(values) for name, values in race(runs, 9 if full else 1).items()}
# print(machine())
# for name, seconds in times.items():
#     print(f"{name:12s}{1000 * seconds:7.1f} ms   {seconds / times['none']:.2f} times")

# %% [markdown]
# RoPE adds some per cent to one attention, less to a whole model. Between the layouts nothing can be told from these numbers.
#
# Then the gain. The language model of Chapter 25, with sinusoids, with RoPE, and with no positions at all: the same steps, the same crops, the same first weights, three seeds. Lower is better.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import SDPA, bits_per_byte, train_language_model
# from transformer_annotated.modern.language_model import Characters, any_text, language_model
#
# text = any_text()
# characters = Characters(text.train + text.val + text.test)
# ids = torch.tensor(characters.encode(text.train))
# sample = text.val[: 20_000 if full else 500]
# val, n_bytes = torch.tensor(characters.encode(sample)), len(sample.encode())
# NOTHING = {"embedding.position": None}
# bits: dict[str, list[float]] = {}
# for name, change in (("sinusoid", {}), ("RoPE", ROPE), ("nothing", NOTHING)):
#     bits[name] = []
#     for seed in range(3 if full else 1):
#         torch.manual_seed(seed)
#         model = Transformer(patch(language_model(characters.vocab_size), SDPA, change))
#         train_language_model(model, ids, steps=200 if full else 3, rate=2e-3, seed=seed)
#         bits[name].append(bits_per_byte(model, val, n_bytes))
#     print(f"{name:9s} bits per byte {' '.join(f'{b:.3f}' for b in bits[name])}")
# assert not full or max(bits["RoPE"]) < min(bits["sinusoid"])

# %% [markdown]
# The worst run with RoPE is better than the best with sinusoids; the cell asserts it. The surprise is the third line: without any positions the model does no worse than with sinusoids. What has it learned at all? We compare it with the
# third guesser of Chapter 25, a table of how often each character follows each, on the same sample:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# V = characters.vocab_size
# follows = (ids[:-1] * V + ids[1:]).bincount(minlength=V * V).view(V, V) + 0.1
# guess = (follows / follows.sum(dim=1, keepdim=True)).log2()
# print(f"knows the character before   {-guess[val[:-1], val[1:]].mean():.3f}")

# %% [markdown]
# The last line explains the third. A table that knows only the character before needs about as much as the models with sinusoids and with nothing: after so few steps they have learned little beyond that character, and where a word stands
# cannot help them yet. With RoPE the model already uses more. A likely reason: a shift by one is in its scores from the first step, and a sinusoid must first be learned to be read. All models had the same learning rate; none was
# tuned for it. What remains of the gap after a long training, this page cannot say.
#
# The same budget for every patch of this part, three seeds, two tasks; Chapter 35 has the whole matrix. Look at whether the ranges of the two rows overlap, in translation and in language:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured
#
# print(measured("rope"))

# %% [markdown]
# ## What the papers said, what production does
#
# Relative positions are older than RoPE. Shaw and others {cite:p}`shaw2018self` learned a vector for each distance up to a limit and added it to the keys (and another to the values); T5 learned a number and added it to the score
# {cite:p}`raffel2020exploring`, which is the next chapter. Both need the table of all pairs $(i, j)$ inside attention. RoPE changes $q$ and $k$ before attention begins, so any fast kernel for
# attention works unchanged. GPT-J and GPT-NeoX took it up, then Llama {cite:p}`touvron2023llama` and most decoder-only models since.
#
# Does a decoder need positions at all? Its causal mask lets position $t$ see $t + 1$ keys, and from that it can learn to count {cite:p}`haviv2022transformer`. On some tasks such models,
# called NoPE, went further beyond their training length than models with RoPE {cite:p}`kazemnejad2023impact`. The line *nothing* above is such a model.
#
# ## How it breaks
#
# *Angles in 16 bits.* bfloat16 has eight significant bits. Here is what it makes of the positions around 4000, and of the cosine of a position:

# %% tags=["active-ipynb"]
# p = torch.tensor([3990, 4000, 4001, 4002, 4010])
# print("positions     ", p.bfloat16().tolist())
# print("cos in 32 bits", [round(c, 3) for c in p.float().cos().tolist()])
# print("cos in 16 bits", [round(c, 3) for c in p.bfloat16().cos().float().tolist()])

# %% [markdown]
# Neighbours have become one position, and the fast pairs point anywhere. At the first few dozen positions little is seen, so test at some thousands. `turn` computes in at least 32 bits whatever the model's dtype is, and rounds at the end.
#
# *Very far positions.* Even 32 bits end: an angle $p\,\omega$ is rounded to about seven digits, and for large $p$ few of them are left after the full turns are taken off. We score a thousand random queries at $p + 3$ and keys at $p$.
# By {eq}`eq-relative` $p$ must not matter. Here is the error against 64 bits; the scores themselves are of size 1:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def scores_at(p: int, dtype: torch.dtype) -> Tensor:
#     """A thousand scores of random queries at p + 3 and keys at p, vectors in `dtype`."""
#     a, b = RoPE(128)(q.to(dtype), k.to(dtype), torch.tensor([[p + 3]]), torch.tensor([[p]]))
#     return (a.double() * b.double()).sum(dim=-1) / 128**0.5
#
#
# torch.manual_seed(0)
# q, k = torch.randn(2, 1000, 1, 1, 128)
# exact = scores_at(0, torch.float64)
# print("position     float32  bfloat16")
# for p in (0, 1_000, 2**14, 2**17, 2**20, 2**24):
#     errors = [scores_at(p, dtype) - exact for dtype in (torch.float32, torch.bfloat16)]
#     print(f"{p:10,d}" + "".join(f"{e.square().mean().sqrt():10.0e}" for e in errors))

# %% [markdown]
# At thousands of positions the error of the angles is small beside what bfloat16 rounds anyway. It grows with $p$. Beyond $2^{24}$, about 17 million, 32 bits do not hold every whole number, and neighbouring positions become one.
#
# - *The wrong layout.* No shape differs. Compare the logits of a converted model with those of the original.
# - *Keys turned the other way.* The score then depends on $i + j$. Move a text by 100 positions and see whether the logits move.
# - *Both turned the other way.* Every invariant holds, and a model trained like this is as good. It fits no published weights.
# - *New keys numbered from 0 at each step of decoding.* The first token is right. Compare cached decoding with the whole.
# - *Values turned too.* What is gathered then depends on where it stood. Let a query see a single key: the output must be its value, anywhere.
#
# ## Takeaways
#
# - Turn queries by $i\,\omega$ and keys by $j\,\omega$, in pairs, and scores depend on $i - j$: {eq}`eq-relative`. It is Chapter 7's shift, applied to what is compared.
# - No parameters, no table that ends (but new angles beyond the length of training), nothing for the kernel to know; lengths of vectors stay.
# - Self-attention only: between two texts there is no distance.
# - Two layouts compute the same up to the order of rows. Angles need 32 bits.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 29.1.** A head of two numbers turns one radian a position. What is the score, before any scale, of the query $(2, 0)$ at position 5 and the key $(0, 1)$ at position 4? And if they change places:
# query at 4, key at 5? Answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("29.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# q, k, rope = torch.tensor([[[[2.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]]), RoPE(2)
# answer = []
# for i, j in ((5, 4), (4, 5)):
#     a, b = rope(q, k, torch.tensor([[i]]), torch.tensor([[j]]))
#     answer.append((a * b).sum().item())
# check("29.1", answer)

# %% [markdown]
# **Exercise 29.2.** A model with heads of 128 numbers was trained on texts of 4,096 tokens. How many of its 64 pairs have not come round once? Answer with two numbers: for base 10,000, and for base 500,000.

# %% tags=["active-ipynb"]
# answer = ...
# check("29.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [(2 * torch.pi / frequencies(128, base) > 4096).sum().item() for base in (1e4, 5e5)]
# check("29.2", answer)

# %% [markdown]
# **Exercise 29.3.** Write a function of `weight` `(H d, D)` and `head_dim` that takes the matrix of a `k_proj` in the halves layout back to the interleaved one. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("29.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def to_interleaved(weight: Tensor, head_dim: int) -> Tensor:
#     back = halves_order(head_dim).argsort()
#     return weight.unflatten(0, (-1, head_dim))[:, back].flatten(0, 1)
#
#
# check("29.3", to_interleaved)
