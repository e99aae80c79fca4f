# %% [markdown]
r"""
# Multi-head attention

Eight small attentions side by side take as many multiplications as one large one, and can look at eight places at once. One
module, three uses: self-attention, masked self-attention, and cross-attention.
"""

# %% [markdown]
# `attend` from Chapter 3 is a fixed formula: it has nothing to learn. The learning is in what becomes a query, a key and
# a value. That is this chapter.

# %% mystnb={"figure": {"caption": "Chapter 4 of Part I: many heads around one formula.", "name": "fig-map-multi-head"}, "image": {"alt": "Eleven boxes in a row, one a chapter. The fourth, Multi-head, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(4);

# %%
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from transformer_annotated.paper.attention import (
    Attend,
    Bias,
    Mask,
    attend,
    attention_weights,
)
from transformer_annotated.paper.parts import Spec, check_rate, check_sizes

# %% [markdown]
# ## One average is not enough
#
# Read *the queen gives the dog an apple*. To translate *gives* you want to know who gives, and what. One attention
# row is one weighted average. With half the weight on *queen* and half on *apple* you get the mean of the two,
# and a mean forgets what it was made of:

# %% tags=["active-ipynb"]
# import torch
#
# queen, apple = torch.tensor([4.0, 0.0]), torch.tensor([0.0, 2.0])
# dog, ball = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
# print("half queen, half apple:", (queen + apple) / 2)
# print("half dog, half ball:   ", (dog + ball) / 2)

# %% [markdown]
# Two different sentences, one answer. If *two* attentions look, each with a row of its own, one can fetch the queen and the
# other the apple, and their answers lie side by side. That is a **head**: an attention with its own matrices for queries, keys and values.
#
# ## Split, attend, join
#
# Give each head $d = D / H$ numbers instead of all $D$. Then $H$ heads take together as many multiplications as one full attention, because
# the width of the dot products adds up to $D$ again. (The tables of weights are $H$ times as many. Nothing is free.) The paper takes $D = 512$ and $H = 8$, so $d = 64$.
#
# How does a vector of $D$ numbers become $H$ queries of $d$ numbers? A matrix $W^Q$ maps it to $D$ new numbers, and these are
# cut into $H$ pieces. Keys and values likewise, with $W^K$ and $W^V$. The cut is the place to be careful. Take one sentence of
# two positions, and two heads of three numbers:

# %% tags=["active-ipynb"]
# x = torch.tensor([[[11, 12, 13, 21, 22, 23], [31, 32, 33, 41, 42, 43]]])  # (B, T, D) = (1, 2, 6)
# right = x.unflatten(-1, (2, 3)).transpose(1, 2)  # (B, H, T, d)
# wrong = x.reshape(1, 2, 2, 3)  # the same shape
# print("head 1, right:", right[0, 0].tolist())
# print("head 1, wrong:", wrong[0, 0].tolist())

# %% [markdown]
# Right: head 1 has the first three numbers *of both positions*. Wrong: head 1 has all of position 1 and nothing of
# position 2. Both have shape `(1, 2, 2, 3)`, and a test of shapes passes both. Here it is with sizes that differ, as a picture:

# %% tags=["hide-input"]
def draw_split() -> Any:
    """Draw how `(T, D)` becomes H heads and `(T, D)` again."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    from transformer_annotated.figures import COLORS

    ax = plt.subplots(figsize=(7.2, 2.5))[1]
    ax.set_axis_off()
    ax.set(xlim=(0, 20), ylim=(-0.5, 6.7))

    def block(x: float, y: float, width: float, color: str, text: str = "") -> None:
        for row in range(3):
            ax.add_patch(Rectangle((x, y + row * 0.5), width, 0.46, facecolor=color, alpha=0.75))
        ax.text(x + width / 2, y - 0.35, text, ha="center", va="center", fontsize=8.5)

    for h in range(4):
        block(0.4 + h * 0.8, 2.0, 0.78, COLORS[h])
        block(6.9, 5.0 - h * 1.75, 0.78, COLORS[h])
        block(10.6, 5.0 - h * 1.75, 0.78, COLORS[h])
        ax.text(9.2, 5.75 - h * 1.75, f"head {h + 1}", ha="center", va="center", fontsize=8.5)
        block(14.0 + h * 0.8, 2.0, 0.78, COLORS[h])
    block(18.2, 2.0, 1.5, COLORS[4], "(T, D)")
    ax.text(2.0, 1.6, "x W, (T, D)", ha="center", va="center", fontsize=8.5)
    ax.text(15.6, 1.6, "joined (T, D)", ha="center", va="center", fontsize=8.5)
    arrow = {"arrowstyle": "-|>", "color": "#555555"}
    labels = (
        (4.0, 6.5, "split"),
        (8.0, 10.3, "attend"),
        (11.7, 13.6, "join"),
        (17.4, 18.0, "$W^O$"),
    )
    for start, end, label in labels:
        ax.annotate("", (end, 2.75), (start, 2.75), arrowprops=arrow)
        ax.text((start + end) / 2, 2.95, label, ha="center", fontsize=8.5)
    return ax

# %% mystnb={"figure": {"caption": "Splitting cuts the width into heads; joining puts the pieces back, and one matrix mixes them. Queries, keys and values are all split this way; one of the three is drawn.", "name": "fig-split"}, "image": {"alt": "A drawing from left to right. A block of T rows and D columns is cut into H narrower blocks, each goes through attend, the results are laid side by side again and multiplied by the output matrix."}} tags=["active-ipynb"]
# draw_split();

# %% [markdown]
# After attention the pieces are laid side by side again, and a last matrix $W^O$ mixes what the heads found
# (section 3.2.2 of {cite:t}`vaswani2017attention`):
#
# $$
# \mathrm{MultiHead}(X, M) = \mathrm{Concat}(\mathrm{head}_1, \ldots, \mathrm{head}_H)\, W^O, \qquad
# \mathrm{head}_h = \mathrm{Attention}(X W^Q_h,\; M W^K_h,\; M W^V_h)
# $$ (eq-multi-head)
#
# $W^Q_h$ is the $h$-th block of $d$ columns of $W^Q$, so one product makes all heads' queries. $X$ is where the queries come from. $M$, the *memory*, is where keys and values come from. Without $W^O$ each output number
# would come from one head alone.

# %% [markdown]
# ## The module
#
# Two names first. `KeysValues` is a pair of keys and values. `KeyValueCache` says what a cache would have to offer when words are
# produced one at a time; Part II builds one, and until then the argument is `None`.

# %%
KeysValues = tuple[Tensor, Tensor]  # keys and values, each (B, K, S, d)


class KeyValueCache(Protocol):
    """What attention asks of a cache. Part II builds one; in Part I the argument is None."""

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return all keys, all values and the keys' positions, with those of `source` included.

        `project(source)` makes keys and values; a cache that has them already need not call it.
        """

# %%
class MultiHeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, section 3.2.2).

    Args:
        d_model: width D of the input and the output.
        n_heads: number H of query heads.
        n_kv_heads: number K of key and value heads, a divisor of H; None for H.
        head_dim: width d of a head; None for D / H.
        qkv_bias, out_bias: whether the projections add a bias.
        position: spec of a module `(q, k, positions, key_positions) -> q, k`; None in the paper.
        qk_norm: spec of a norm applied to each query and key head; None in the paper.
        attend: the function that computes attention from heads.
        window: keys further away than this are hidden; None for no limit.
        softcap: squashes the scores; None in the paper.
        scale: multiplies the scores; None for 1/sqrt(d).
        dropout: probability of dropping an attention weight in training; 0 in the paper.

    Raises:
        ValueError: a size below 1, heads that do not divide, a dropout outside [0, 1).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int = 8,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        out_bias: bool = True,
        position: Spec[nn.Module] | None = None,
        qk_norm: Spec[nn.Module] | None = None,
        attend: Attend = attend,
        window: int | None = None,
        softcap: float | None = None,
        scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(d_model=d_model, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim)
        check_rate("dropout", dropout)
        if softcap is not None and not softcap > 0:
            raise ValueError(f"softcap must be above 0, got {softcap}")
        n_kv_heads = n_kv_heads or n_heads
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"d_model must be a multiple of n_heads, got {d_model} and {n_heads}")
        if n_heads % n_kv_heads:
            raise ValueError(
                f"n_heads must be a multiple of n_kv_heads, got {n_heads} and {n_kv_heads}"
            )
        d = head_dim or d_model // n_heads
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, d
        self.attend, self.scale, self.softcap, self.dropout = attend, scale, softcap, dropout
        self.mask = Mask(window=window)
        self.q_proj = nn.Linear(d_model, n_heads * d, bias=qkv_bias)
        self.k_proj = nn.Linear(d_model, n_kv_heads * d, bias=qkv_bias)
        self.v_proj = nn.Linear(d_model, n_kv_heads * d, bias=qkv_bias)
        self.out_proj = nn.Linear(n_heads * d, d_model, bias=out_bias)
        self.position = None if position is None else position(head_dim=d)
        self.q_norm = None if qk_norm is None else qk_norm(d_model=d)
        self.k_norm = None if qk_norm is None else qk_norm(d_model=d)

    def split(self, x: Tensor) -> Tensor:
        """`(B, T, heads * d)` to `(B, heads, T, d)`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, source: Tensor) -> KeysValues:
        """Keys and values `(B, K, S, d)` of `source` `(B, S, D)`."""
        k, v = self.split(self.k_proj(source)), self.split(self.v_proj(source))
        return (k if self.k_norm is None else self.k_norm(k)), v

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        bias: Callable[[Tensor | None, Tensor | None], Bias] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Let each vector of `x` gather from `memory`, or from `x` itself.

        Args:
            x: `(B, T, D)`, where the queries come from.
            memory: `(B, S, D)`, where keys and values come from; None for `x` (self-attention).
            mask: which keys may be seen; a `window` of this module is joined to it.
            positions, memory_positions: `(B, T)` and `(B, S)` positions for `position` and `bias`.
            bias: makes the bias from the positions of queries and keys; None in the paper.
            cache: holds keys and values of earlier calls; None to compute them all.

        Returns:
            `(B, T, D)`.
        """
        source, key_positions = (x, positions) if memory is None else (memory, memory_positions)
        q = self.split(self.q_proj(x))  # (B, H, T, d)
        q = q if self.q_norm is None else self.q_norm(q)
        if cache is None:
            k, v = self.keys_values(source)  # (B, K, S, d)
        else:
            k, v, key_positions = cache.update(self.keys_values, source, key_positions)
        if self.position is not None:
            q, k = self.position(q, k, positions, key_positions)
        heads = self.attend(
            q, k, v, self.mask if mask is None else self.mask & mask,
            bias=None if bias is None else bias(positions, key_positions),
            scale=self.scale, softcap=self.softcap,
            dropout=self.dropout if self.training else 0.0,
        )  # fmt: skip
        return self.out_proj(heads.transpose(1, 2).flatten(-2))  # (B, T, D)

# %% [markdown]
# Follow the shapes at full size, for a batch of 2 sentences of 7 words. `x` is `(2, 7, 512)`. Each projection keeps that shape. `split` makes `(2, 8, 7, 64)`: the heads
# have become an axis, and from here on they do not know of one another. `attend` returns the same shape. `transpose` and `flatten` lay the heads side by side again, `(2, 7, 512)`, and
# `out_proj` mixes them.
#
# That is the longest class of Part I, and half of it is its own description. Read `forward` against {eq}`eq-multi-head`.
# `q_proj`, `k_proj` and `v_proj` hold all heads of $W^Q$, $W^K$, $W^V$ at once, `split` cuts them, `self.attend` is Chapter 3, the
# last line joins and applies $W^O$. If there is no `memory`, the vectors look at each other.
#
# The rest are seams. Each has a default that means *as in 2017*:
#
# | argument | 2017 | for |
# |---|---|---|
# | `attend` | the formula, written out | faster kernels that compute the same |
# | `position` | None | rotating queries and keys by their positions (RoPE) |
# | `n_kv_heads`, `head_dim` | $H$, $D / H$ | several query heads sharing a key head |
# | `window`, `softcap`, `scale`, `qk_norm` | none, none, $1/\sqrt{d}$, none | Mistral, Gemma 2, T5, Qwen 3 |
# | `bias` (of the call) | None | ALiBi, T5 |
# | `cache` (of the call) | None | decoding one word at a time |
#
# One deviation, so that you need not find it yourself: the paper's formula has no bias vectors in the four projections. We
# add them, as most published implementations do; `qkv_bias=False, out_bias=False` removes them. The ledger at the end of the
# book counts what they cost.
#
# ## Three uses, one module
#
# Self-attention: a sentence looks at itself. Masked self-attention: each position looks back only. Cross-attention: one sentence
# looks at another. The three calls differ in their arguments and in nothing else.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# attention = MultiHeadAttention(d_model=16, n_heads=4)
# german, english = torch.randn(2, 6, 16), torch.randn(2, 4, 16)  # (B, S, D), (B, T, D)
# real = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
# calls = {
#     "self": attention(german, mask=Mask(padding=real)),
#     "masked self": attention(english, mask=Mask(causal=True)),
#     "cross": attention(english, memory=german, mask=Mask(padding=real)),
# }
# for name, output in calls.items():
#     print(f"{name:12s} {tuple(output.shape)}")

# %% [markdown]
# The result always has the shape of the queries. In a translation model the encoder uses the first, the decoder the second and
# the third. For each use the paper's section 3.2.3 has a paragraph; here each is a line.
#
# Does the mask do what it says? Change the last English vector and see which outputs move.

# %% tags=["active-ipynb"]
# changed = english.clone()
# changed[:, -1] += 1.0
# difference = attention(changed, mask=Mask(causal=True)) - calls["masked self"]
# print([round(value, 3) for value in difference.abs().amax(dim=(0, 2)).tolist()])
# assert difference[:, :-1].abs().max() == 0

# %% [markdown]
# Only the last. The other differences are not small, they are zero.
#
# ## Proof
#
# The reference is PyTorch's `nn.MultiheadAttention`. It stacks the three input projections in one matrix and says True for
# *ignore* in its masks. First all weights are redrawn at random, biases too: fresh biases are zero or small, and a
# comparison with zeros would not notice a bias that is never added.

# %% tags=["active-ipynb"]
# from torch import nn
#
#
# def redraw(module: nn.Module) -> None:
#     """Give every parameter new random values, so that none is zero or one by accident."""
#     for parameter in module.parameters():
#         nn.init.normal_(parameter, std=0.3)
#
#
# ours = MultiHeadAttention(d_model=16, n_heads=4).double()
# redraw(ours)
# theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=torch.float64)
# projections = (ours.q_proj, ours.k_proj, ours.v_proj)
# with torch.no_grad():
#     theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
#     theirs.in_proj_bias.copy_(torch.cat([p.bias for p in projections]))
#     theirs.out_proj.load_state_dict(ours.out_proj.state_dict())

# %% tags=["active-ipynb"]
# x = torch.randn(2, 4, 16, dtype=torch.float64, requires_grad=True)
# memory = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
# upper = torch.ones(4, 4).triu(1).bool()
# cases = {
#     "self": (ours(x), theirs(x, x, x)[0]),
#     "masked self": (ours(x, mask=Mask(causal=True)), theirs(x, x, x, attn_mask=upper)[0]),
#     "cross": (
#         ours(x, memory, Mask(padding=real)),
#         theirs(x, memory, memory, key_padding_mask=~real)[0],
#     ),
# }
# for name, (a, b) in cases.items():
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
#     used = [x, memory] if name == "cross" else [x]
#     direction = torch.randn_like(a)
#     mine = torch.autograd.grad(a, [*used, *(p.weight for p in projections)], direction)
#     (*rest, stacked) = torch.autograd.grad(b, [*used, theirs.in_proj_weight], direction)
#     for g, h in zip(mine, [*rest, *stacked.chunk(3)], strict=True):
#         torch.testing.assert_close(g, h, rtol=0, atol=1e-10)
#     print(f"{name:12s} output and {len(mine)} gradients equal, to 1e-10")

# %% [markdown]
# The test suite does the same in single precision and for the remaining parameters.
#
# ## Looking inside
#
# The weights are worth a look, and `forward` throws them away. `record_attention` watches a model from outside: inside
# the `with` block it keeps the weights of each call, before dropout. The model computes what it always did.

# %%
@contextmanager
def record_attention(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Inside `with record_attention(model) as maps:`, keep each call's weights.

    `maps[name]` is `(B, H, T, S)`, before dropout, for the attention module called `name`.
    A module that is called twice keeps its last map.
    """
    maps: dict[str, Tensor] = {}
    watched = {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    originals = {name: module.attend for name, module in watched.items()}

    def recorder(name: str, original: Attend) -> Attend:
        def recorded(
            q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, *, dropout: float = 0.0,
            **rest: Any,
        ) -> Tensor:  # fmt: skip
            maps[name] = attention_weights(q, k, mask, **rest).detach()
            return original(q, k, v, mask, dropout=dropout, **rest)

        return recorded

    try:
        for name, module in watched.items():
            module.attend = recorder(name, originals[name])
        yield maps
    finally:
        for name, module in watched.items():
            module.attend = originals[name]

# %% tags=["active-ipynb"]
# with record_attention(attention) as maps:
#     again = attention(english, memory=german, mask=Mask(padding=real))
# assert torch.equal(again, calls["cross"])
# weights = maps[""]  # the name of the module itself is the empty string
# print("shape (B, H, T, S):", tuple(weights.shape))
# print("rows sum to one:", torch.allclose(weights.sum(dim=-1), torch.ones(())))

# %% mystnb={"figure": {"caption": "Four heads of one untrained module weigh the keys of sentence 2 in four random ways; none looks at the two hidden keys.", "name": "fig-heads"}, "image": {"alt": "Four heat maps side by side, four queries down and six keys across. The patterns differ between heads, and the last two columns are blank in all of them."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# from transformer_annotated import figures
#
# fig, axes = plt.subplots(1, 4, figsize=(7.2, 2.0), sharey=True)
# for h, ax in enumerate(axes):
#     figures.heatmap(
#         ax,
#         weights[1, h],
#         rows="1234",
#         cols="123456",
#         title=f"head {h + 1}",
#         col_label="key",
#         vmin=0,
#         vmax=1,
#     )
# axes[0].set_ylabel("query");

# %% [markdown]
# Nothing is trained, so the patterns in {numref}`fig-heads` mean nothing yet. What they show is that heads differ from the
# start, and that padding is white. Chapter 10 looks again after training.
#
# ## What production does
#
# Most models keep heads of 64 to 128 numbers. What changed is the number of *key* heads. Every word that has been read must keep its
# keys and values, so fewer key heads mean less to store: Llama 3's 8B model has 32 query heads and 8 key heads
# {cite:p}`grattafiori2024llama3`. Part III measures what sharing them costs (Chapter 32). Biases in the projections mostly went away.
#
# ## How it breaks
#
# - *`value = self.k_proj(...)`.* One letter, and it trains. A comparison with a reference with redrawn weights finds it;
#   a shape test does not.
# - *Heads split by `reshape` alone.* Positions and heads are mixed. The two-line example above tells.
# - *Cross-attention that reads `x`.* The decoder ignores the source and becomes a language model: fluent, and unrelated.
# - *Weights stored after dropout.* Rows do not sum to one, and pictures of attention flicker.
#
# ## Takeaways
#
# - A head is an attention of width $d = D/H$ with its own projections; $H$ heads take the multiplications of one wide attention.
# - Split, attend, join, mix: {eq}`eq-multi-head`.
# - Self-, masked and cross-attention are three calls of one module.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 4.1.** How many parameters has `MultiHeadAttention(d_model=512, n_heads=8)`, and how many with `n_heads=16`? Answer with two
# numbers, computed by hand if you can.

# %% tags=["active-ipynb"]
# answer = ...
# check("4.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [sum(p.numel() for p in MultiHeadAttention(512, n).parameters()) for n in (8, 16)]
# check("4.1", answer)

# %% [markdown]
# **Exercise 4.2.** Permute the words of the memory. What happens to the output of cross-attention without a mask? Answer with the largest
# absolute difference you find, rounded to three digits.

# %% tags=["active-ipynb"]
# answer = ...
# check("4.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# order = torch.tensor([3, 0, 5, 1, 4, 2])
# difference = attention(english, memory=german[:, order]) - attention(english, memory=german)
# answer = round(difference.abs().max().item(), 3)
# check("4.2", answer)

# %% [markdown]
# **Exercise 4.3.** With 32 query heads, 8 key heads and heads of 128 numbers, how many numbers must be kept for one word in one layer? And
# with 32 key heads? Answer with a list of two.

# %% tags=["active-ipynb"]
# answer = ...
# check("4.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [2 * heads * 128 for heads in (8, 32)]
# check("4.3", answer)
