# %% [markdown]
r"""
# Why attention

Here is the kind of translator that was the starting point before 2017, built on one page: a
bidirectional GRU with Bahdanau's attention. Two measurements speak against recurrence: the number
of steps that must wait for one another, and the loss of signal on the way. A third, the time a
token costs, shows what attention gains and what it pays.
"""

# %%
from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# %% [markdown]
# This is the start of the road. You need Python, a little PyTorch, and nothing from later pages.
# The model built here stays with us: when the Transformer translates its first sentence,
# this one stands beside it with the same budget.

# %% mystnb={"figure": {"caption": "Chapter 1 of Part I: the network that attention replaced.", "name": "fig-map-recurrent"}, "image": {"alt": "Eleven boxes in a row, one a chapter, from Why attention to A real corpus. The first, Why attention, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(1);

# %% [markdown]
# ## One word, four words later
#
# Five numbers arrive one after the other: 1, 0, 0, 0, 0. A reader keeps a single number $h$, which
# starts at 0. At every step the new $h$ is half of the old $h$ plus half of what has just arrived.
# How much of the first number is left in $h$ at the end?
#
# Work it out on paper before you look. Then compare with a second reader, who waits until all five
# are there and takes their mean.

# %% tags=["active-ipynb"]
# x = [1.0, 0.0, 0.0, 0.0, 0.0]
# h = 0.0
# for x_t in x:
#     h = 0.5 * h + 0.5 * x_t
#     print(f"read {x_t:.0f}, now h = {h}")
# print("mean of all five:", sum(x) / len(x))

# %% [markdown]
# The first reader halves the first number at every step. With twenty more words it would be below
# one part in a million. The second reader gives each of $n$ numbers the share $1/n$: also
# less for a longer sentence, but a thousand words cost a factor of a thousand, not $2^{1000}$.
#
# There is a second difference, and it is about time. The first reader cannot take step five before
# step four is done. The second one needs a sum, and hardware with many units can do most of a sum
# at once.
#
# The first way to read is called **recurrence**. The second, with weights that depend on the
# content instead of the fixed $1/n$, is **attention**. {numref}`fig-paths` draws both.

# %% tags=["hide-input"]
def draw_paths(n: int = 5) -> None:
    """Draw how the first of `n` tokens reaches the last: by recurrence and by attention."""
    import matplotlib.pyplot as plt

    _, axes = plt.subplots(1, 2, figsize=(7.2, 2.4))
    titles = (f"recurrence: {n} steps, in order", "attention: one step")
    for ax, title in zip(axes, titles, strict=True):
        ax.set(title=title, xlim=(0.4, n + 0.6), ylim=(-0.5, 1.45))
        ax.set_axis_off()
        for t in range(1, n + 1):
            for y, name in ((0, f"$x_{t}$"), (1, f"$y_{t}$")):
                ax.text(t, y, name, ha="center", va="center", fontsize=12)
            if ax is axes[0] and t < n:
                _arrow(ax, (t + 0.22, 1), (t + 0.78, 1), "C0", 1.8)
            if ax is axes[0]:
                _arrow(ax, (t, 0.2), (t, 0.8), "C0" if t == 1 else "#999999", 1.8 if t == 1 else 1)
                continue
            for s in range(1, n + 1):
                lit = (s, t) == (1, n)
                lean = 0.04 * (t - s)
                start, end = (s + lean, 0.2), (t - lean, 0.8)
                _arrow(ax, start, end, "C1" if lit else "#BBBBBB", 1.8 if lit else 0.7)


def _arrow(
    ax: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float
) -> None:
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    ax.annotate("", end, start, arrowprops=style)


# %% mystnb={"figure": {"caption": "The coloured route takes the first token to the last output. By recurrence it passes every token between them; by attention it is one arrow.", "name": "fig-paths"}, "image": {"alt": "Two diagrams of five inputs below five outputs. On the left each output is reached from its input and from the output before it, and the highlighted route from the first input runs along the whole chain. On the right every input has an arrow to every output, and the highlighted route is a single arrow."}} tags=["active-ipynb"]
# from transformer_annotated import figures
#
# figures.use_style()
# torch.set_num_threads(1)
# draw_paths()

# %% [markdown]
# Follow the coloured arrows from $x_1$ to $y_5$. On the left the route goes through every state in
# between, and each of them mixes its own word in. On the right there are many more arrows, one for
# every pair, and no arrow waits for another. Keep both halves of that sentence: the price of
# attention is in the number of pairs.

# %% [markdown]
# ## A better way to forget: the gated recurrent unit
#
# A reader that always keeps one half is too simple. {cite:t}`cho2014learning` let the reader decide,
# at every step and for each of its $D$ numbers, how much to keep. Two **gates** are computed from
# the input $x$ and the old state $h$; a gate is a number between 0 and 1. The update gate $z$ is the
# share that is kept. The reset gate $r$ says how much of the old state the new proposal $\tilde h$
# may use.
#
# $$
# \begin{aligned}
# r &= \sigma(W_r x + U_r h), \qquad z = \sigma(W_z x + U_z h), \\
# \tilde h &= \tanh(W_h x + r \odot U_h h), \\
# h' &= (1 - z) \odot \tilde h + z \odot h.
# \end{aligned}
# $$ (eq-gru)
#
# Here $\sigma$ is the logistic function and $\odot$ multiplies number by number. Each of the six
# products also adds a bias, not written here. With $z = \frac12$ and $\tilde h = x$ the last
# line is the reader with which we began.
#
# One deviation: in the 2014 paper $r$ multiplies $h$ before the product with $U_h$. PyTorch,
# like cuDNN, multiplies after it, and so does the code.

# %%
class GRUCell(nn.Module):
    """One step of a gated recurrent unit, written out: `(B, D_in), (B, D) -> (B, D)`.

    The variant is PyTorch's: the reset gate acts after the matrix product, and `update` is the
    share of the old state that is kept.
    """

    def __init__(self, d_input: int, d_model: int) -> None:
        super().__init__()
        self.input = nn.Linear(d_input, 3 * d_model)  # W_r, W_z, W_h, stacked
        self.state = nn.Linear(d_model, 3 * d_model)  # U_r, U_z, U_h, stacked

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        x_r, x_z, x_h = self.input(x).chunk(3, dim=-1)
        h_r, h_z, h_h = self.state(state).chunk(3, dim=-1)
        reset = torch.sigmoid(x_r + h_r)
        update = torch.sigmoid(x_z + h_z)
        candidate = torch.tanh(x_h + reset * h_h)
        return (1 - update) * candidate + update * state  # (B, D)


# %% [markdown]
# Is it right? PyTorch has the same cell as `nn.GRUCell`. The cell below draws every weight and bias
# anew, copies them across, and compares the output and all six gradients: those of the input, the
# state and four parameter tensors. Fresh biases can be zero or small, and a mistake multiplied by
# zero is invisible, so everything is redrawn. The same manner of proof returns in every chapter.

# %% tags=["active-ipynb"]
# def redraw(module, seed=0):
#     torch.manual_seed(seed)
#     for parameter in module.parameters():
#         nn.init.normal_(parameter)
#     return module.double()
#
#
# ours, theirs = redraw(GRUCell(3, 4)), nn.GRUCell(3, 4).double()
# names = {"input.weight": "weight_ih", "input.bias": "bias_ih"}
# names |= {"state.weight": "weight_hh", "state.bias": "bias_hh"}
# theirs.load_state_dict({names[key]: value for key, value in ours.state_dict().items()})
#
# x, h = (torch.randn(2, size, dtype=torch.float64, requires_grad=True) for size in (3, 4))
# upstream = torch.randn(2, 4, dtype=torch.float64)
# left = torch.autograd.grad(ours(x, h), [x, h, *ours.parameters()], upstream)
# right_parameters = [theirs.get_parameter(names[key]) for key, _ in ours.named_parameters()]
# right = torch.autograd.grad(theirs(x, h), [x, h, *right_parameters], upstream)
# torch.testing.assert_close(ours(x, h), theirs(x, h), rtol=0, atol=1e-12)
# torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
# print(f"output and {len(left)} gradients equal to nn.GRUCell within 1e-12")

# %% [markdown]
# From here on we use `nn.GRUCell`, and `nn.GRU`, which runs the cell along a whole sequence.
#
# ## From one sentence to another
#
# Two such readers make a translator. An **encoder** reads the source sentence of $S$ tokens. A
# **decoder** writes the target sentence of $T$ tokens, one at a time, and reads back what it has
# written. {cite:t}`cho2014learning` and {cite:t}`sutskever2014sequence` joined them by one vector:
# the encoder's last state is all that the decoder ever learns of the source. The second paper found
# that feeding the source *backwards* helped a great deal. With the word order turned round, the
# first source word is read last, a few steps before the first target word is written. That trick
# already tells where the trouble lies: in the number of steps between words that belong together.
#
# {cite:t}`bahdanau2014neural` removed the single vector. The encoder keeps all its states
# $h_1, \dots, h_S$. At each target step the decoder, with state $q$, gives every source position a
# score, turns the scores into weights that sum to one, and takes the weighted mean:
#
# $$
# e_j = v^\top \tanh(W q + U h_j), \qquad
# a_j = \frac{\exp e_j}{\sum_k \exp e_k}, \qquad
# c = \sum_j a_j h_j.
# $$ (eq-additive)
#
# The **context** $c$ is the second reader from the top of the page, with learnt weights $a_j$ in
# place of $1/n$. Because $W q$ and $U h_j$ are added, this is called additive attention.

# %%
class AdditiveAttention(nn.Module):
    """Bahdanau's attention: a learnt, soft choice among the source positions.

    `keys` turns states `(B, S, D)` into what a query is compared with; it is computed once a
    sentence. The call takes a query `(B, D)`, keys and values `(B, S, D)` and a padding tensor
    `(B, S)` (True = real), and returns the context `(B, D)` and the weights `(B, S)`.
    """

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.W = nn.Linear(d_model, d_model, bias=False)
        self.U = nn.Linear(d_model, d_model, bias=False)
        self.v = nn.Linear(d_model, 1, bias=False)

    def keys(self, states: Tensor) -> Tensor:
        """`U h_j` for every position: `(B, S, D) -> (B, S, D)`."""
        return self.U(states)

    def forward(
        self, query: Tensor, keys: Tensor, values: Tensor, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        energy = torch.tanh(self.W(query).unsqueeze(1) + keys)  # (B, S, D)
        scores = self.v(energy).squeeze(-1)  # (B, S)
        if padding is not None:
            scores = scores.masked_fill(~padding, float("-inf"))
        weights = scores.softmax(dim=-1)  # (B, S)
        context = (weights.unsqueeze(-1) * values).sum(dim=1)  # (B, D)
        return context, weights


# %% [markdown]
# Three names will stay for the rest of the book. The **query** is who asks, the **keys** are what
# it is compared with, the **values** are what is averaged. Here the values are the states $h_j$
# and the keys are the same states times $U$.
#
# Sentences in a batch differ in length, so short ones are filled up with padding. A score of
# $-\infty$ becomes a weight of exactly zero. In this book a padding tensor is True where the token
# is real.
#
# The proof: a loop over the batch and the positions, straight from {eq}`eq-additive`, which meets
# padding by stopping before it.

# %% tags=["active-ipynb"]
# def by_the_formula(layer, query, states, lengths):
#     contexts = []
#     for q, h, length in zip(query, states, lengths, strict=True):
#         Wq, U, v = layer.W.weight @ q, layer.U.weight, layer.v.weight[0]
#         e = [v @ torch.tanh(Wq + U @ h[j]) for j in range(length)]
#         total = sum(e_j.exp() for e_j in e)
#         contexts.append(sum(e_j.exp() / total * h[j] for j, e_j in enumerate(e)))
#     return torch.stack(contexts)
#
#
# layer = redraw(AdditiveAttention(4))
# query = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
# states = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
# real = torch.tensor([[True, True, True], [True, True, False]])
# context, weights = layer(query, layer.keys(states), states, real)
# reference = by_the_formula(layer, query, states, lengths=[3, 2])
#
# inputs, upstream = [query, states, *layer.parameters()], torch.randn(2, 4, dtype=torch.float64)
# left = torch.autograd.grad(context, inputs, upstream)
# right = torch.autograd.grad(reference, inputs, upstream)
# torch.testing.assert_close(context, reference, rtol=0, atol=1e-12)
# torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
# print(f"context and {len(left)} gradients equal to the loop within 1e-12; the weights:")
# print(weights.detach().numpy().round(3))

# %% [markdown]
# Each row of weights sums to one, and the padded position of the second sentence has weight zero.
#
# ## The translator of 2014
#
# What the decoder gets to know of the source fits in three tensors.

# %%
class Memory(NamedTuple):
    """What the decoder knows of the source: a state for each token, a start, what is real."""

    states: Tensor  # (B, S, D)
    start: Tensor  # (B, D)
    padding: Tensor | None  # (B, S), True = real


# %% [markdown]
# The encoder is **bidirectional**: one GRU reads from left to right, one from right to left, each
# with $D/2$ numbers of state. Joined, $h_j$ knows what stands on both sides of word $j$.
#
# The reader from the right has a trap. In a padded batch it would begin in the padding, so that the
# same sentence would get other states in other company. `pack_padded_sequence` makes each sentence
# end where its real tokens end.

# %%
class RecurrentEncoder(nn.Module):
    """Read embedded tokens `(B, S, D)` in both directions."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d_model, d_model // 2, batch_first=True, bidirectional=True)
        self.start = nn.Linear(d_model, d_model)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Memory:
        if padding is None:
            states, last = self.gru(x)  # (B, S, D), (2, B, D/2)
        else:
            lengths = padding.sum(dim=1).cpu()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            packed, last = self.gru(packed)
            states, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.size(1))
        start = torch.tanh(self.start(torch.cat([last[0], last[1]], dim=-1)))  # (B, D)
        return Memory(states, start, padding)


# %% [markdown]
# The decoder is the loop that gives recurrence its name. At target step $t$ its state asks for a
# context, then the cell takes the token and the context together and makes the next state. After
# the loop, one matrix (the readout) turns token, context and state into $D$ numbers for each target
# position. That part does not wait for anything, so it runs for all positions at once.

# %%
class RecurrentDecoder(nn.Module):
    """Step through embedded target tokens `(B, T, D)`, looking at the memory before each step."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.attention = AdditiveAttention(d_model)
        self.cell = nn.GRUCell(2 * d_model, d_model)
        self.readout = nn.Linear(3 * d_model, d_model)

    def forward(
        self, x: Tensor, memory: Memory, padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, state = self.attention.keys(memory.states), memory.start
        outputs, looks = [], []
        for token in x.unbind(dim=1):  # (B, D), T times: each step needs the state before it
            context, weights = self.attention(state, keys, memory.states, padding)
            state = self.cell(torch.cat([token, context], dim=-1), state)
            outputs.append(torch.cat([token, context, state], dim=-1))
            looks.append(weights)
        hidden = torch.tanh(self.readout(torch.stack(outputs, dim=1)))
        return hidden, torch.stack(looks, dim=1)  # (B, T, D), (B, T, S)


# %% [markdown]
# Wrong input should be refused by name before it turns into a strange number. Two functions do
# that; unfold them if you are curious.

# %% tags=["hide-input"]
def check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `ids` is a non-empty integer `(B, T)` tensor within the vocabulary.

    The range is checked on the CPU only: on a GPU the check would wait for the device, and
    PyTorch's own assertion stops the kernel there. A compiled model skips it too.
    """
    if ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be integers (torch.long), got {ids.dtype}")
    if ids.ndim != 2 or 0 in ids.shape:
        raise ValueError(f"{name} must be (B, T) with B, T >= 1, got {tuple(ids.shape)}")
    if ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        worst = low if low < 0 else high
        raise ValueError(f"{name} holds {worst}; the vocabulary has ids 0 to {vocab_size - 1}")


def check_right_padding(name: str, padding: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a `ValueError` unless `padding` is bool, `shape`, and each row is real, then padding.

    True = real token. A row without a real token is refused as well.
    """
    if padding.dtype != torch.bool:
        raise ValueError(f"{name} must be bool (True = real token), got {padding.dtype}")
    if tuple(padding.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(padding.shape)}")
    lengths = padding.sum(dim=1, keepdim=True)
    right = torch.arange(shape[1], device=padding.device) < lengths
    bad = (lengths.squeeze(1) == 0) | (padding != right).any(dim=1)
    if bool(bad.any()):
        row = int(bad.int().argmax())
        raise ValueError(
            f"{name}[{row}] is {padding[row].int().tolist()}; allowed: at least one real token "
            "(1), all of them before the padding (0)"
        )


# %% [markdown]
# The whole model: embed, encode, decode, score. One vocabulary of $V$ tokens serves both languages.
# One matrix $E$ of shape $(V, D)$ turns ids into vectors and, used a second time, turns hidden
# states into a score for each word: $\text{logits} = h E^\top$. The four methods `encode`, `decode`,
# `logits` and `forward` are the interface that the Transformer will have too, so that one training
# loop and one search can drive both.

# %%
class RecurrentTranslator(nn.Module):
    """The translator of 2014: bidirectional GRU encoder, additive attention, GRU decoder.

    Ids are int64, `(B, S)` for the source and `(B, T)` for the target. Padding tensors are bool of
    the same shape, True = real token, with the padding on the right. Raises `ValueError` for ids
    outside the vocabulary, a wrong rank or dtype, an empty batch, or a row that is all padding.

    Args:
        vocab_size: V, the number of tokens of both languages together.
        d_model: D, the width of embeddings and states; even, since two directions share it.
        dropout: the share of embeddings and hidden numbers zeroed in training, in [0, 1).
    """

    def __init__(self, vocab_size: int, d_model: int = 256, *, dropout: float = 0.1) -> None:
        super().__init__()
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; allowed: 1 or more")
        if d_model < 2 or d_model % 2:
            raise ValueError(f"d_model is {d_model}; allowed: even numbers from 2 (two directions)")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; allowed: 0 <= dropout < 1")
        self.vocab_size, self.d_model = vocab_size, d_model
        self.embedding = nn.Embedding(vocab_size, d_model)
        nn.init.normal_(self.embedding.weight, std=d_model**-0.5)
        self.encoder = RecurrentEncoder(d_model)
        self.decoder = RecurrentDecoder(d_model)
        self.dropout = nn.Dropout(dropout)

    def encode(self, src: Tensor, padding: Tensor | None = None) -> Memory:
        """Read the source `(B, S)`."""
        check_ids("src", src, self.vocab_size)
        if padding is not None:
            check_right_padding("src_padding", padding, tuple(src.shape))
        return self.encoder(self.dropout(self.embedding(src)), padding)

    def align(
        self, tgt: Tensor, memory: Memory, memory_padding: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states `(B, T, D)` and the weights `(B, T, S)` behind them."""
        check_ids("tgt", tgt, self.vocab_size)
        if len(tgt) != len(memory.states):
            raise ValueError(f"tgt has {len(tgt)} rows; the memory has {len(memory.states)}")
        padding = memory.padding if memory_padding is None else memory_padding
        if padding is not None:
            check_right_padding("memory_padding", padding, tuple(memory.states.shape[:2]))
        hidden, weights = self.decoder(self.dropout(self.embedding(tgt)), memory, padding)
        return self.dropout(hidden), weights

    def decode(self, tgt: Tensor, memory: Memory, memory_padding: Tensor | None = None) -> Tensor:
        """Hidden states `(B, T, D)` for the target so far, `(B, T)`.

        `memory_padding` `(B, S)` replaces the padding that the memory remembers.
        """
        return self.align(tgt, memory, memory_padding)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary: `(B, T, D) -> (B, T, V)`."""
        return F.linear(hidden, self.embedding.weight)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        *,
        src_padding: Tensor | None = None,
        tgt_padding: Tensor | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)` for the token after each target position.

        `tgt_padding` is checked and not used: a decoder that steps from left to right
        never sees what stands to the right.
        """
        if tgt_padding is not None:
            check_right_padding("tgt_padding", tgt_padding, tuple(tgt.shape))
        return self.logits(self.decode(tgt, self.encode(src, src_padding)))


# %% [markdown]
# Three checks on a model with redrawn weights. The shapes are what the docstring says. Padding, and
# whatever ids stand in it, changes nothing. And what comes later in the target does not change what
# came before: a decoder that could look ahead would score well in training and fail in use.

# %% tags=["active-ipynb"]
# model = redraw(RecurrentTranslator(vocab_size=20, d_model=8, dropout=0.0))
# src, tgt = torch.randint(20, (2, 5)), torch.randint(20, (2, 4))
# logits = model(src, tgt)
# assert logits.shape == (2, 4, 20)
# print("logits", tuple(logits.shape))
#
# garbage = torch.cat([src, torch.randint(20, (2, 3))], dim=1)
# real = torch.arange(8).expand(2, 8) < 5
# padded = model(garbage, tgt, src_padding=real)
# torch.testing.assert_close(padded, logits, rtol=0, atol=1e-10)
# print("three padded positions change nothing")
#
# changed = tgt.clone()
# changed[:, 3] = (changed[:, 3] + 1) % 20
# later = model(src, changed)
# torch.testing.assert_close(later[:, :3], logits[:, :3], rtol=0, atol=0)
# assert not torch.equal(later[:, 3], logits[:, 3])
# print("a changed last token leaves the first three positions as they were")
#
# try:
#     model(src + 20, tgt)
# except ValueError as error:
#     print("ValueError:", error)

# %% [markdown]
# ## It works: turning a sequence round
#
# The smallest task in which word order changes is to write a sequence backwards. Random
# sequences of 4 to 12 letters go in; the same letters in reverse order must come out. Nothing can be
# memorised, since hardly any sequence occurs twice. Id 0 is padding and id 1 starts every target.

# %% tags=["active-ipynb"]
# letters = "..abcdefghijklmnopqrst"
#
#
# def reversals(count, longest, generator, shortest=4):
#     lengths = torch.randint(shortest, longest + 1, (count, 1), generator=generator)
#     position = torch.arange(longest)
#     real = position < lengths
#     src = torch.randint(2, len(letters), (count, longest), generator=generator) * real
#     out = src.gather(1, (lengths - 1 - position).clamp(min=0)) * real
#     tgt = torch.cat([torch.ones(count, 1, dtype=torch.int64), out[:, :-1]], dim=1)
#     return src, tgt, out, real
#
#
# src, tgt, out, real = reversals(1, 6, torch.Generator().manual_seed(0))
# for name, ids in (("source", src), ("target in", tgt), ("target out", out)):
#     print(f"{name:10}", ids[0].tolist(), "".join(letters[i] for i in ids[0]))

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import check, machine, scale
#
# steps = 600 if scale() == "full" else 25
# torch.manual_seed(0)
# model = RecurrentTranslator(len(letters), 64, dropout=0.0)
# generator = torch.Generator().manual_seed(1)
# optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
# began = time.perf_counter()
# for step in range(1, steps + 1):
#     src, tgt, out, real = reversals(64, 12, generator)
#     loss = F.cross_entropy(model(src, tgt, src_padding=real)[real], out[real])
#     optimizer.zero_grad()
#     loss.backward()
#     nn.utils.clip_grad_norm_(model.parameters(), 1.0)
#     optimizer.step()
#     if step % (steps // 5) == 0:
#         print(f"step {step:3}  loss {loss.item():.3f}")
# print(f"{time.perf_counter() - began:.0f} s on {machine()}")

# %% [markdown]
# The loss starts near $\ln 20 \approx 3$, the cost of guessing among twenty letters. Now the test:
# new sequences, and a sequence counts only when every letter is right. The second row asks for
# sequences twice as long as any the model was trained on.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# @torch.no_grad()
# def exact_match(shortest, longest):
#     src, tgt, out, real = reversals(500, longest, torch.Generator().manual_seed(2), shortest)
#     right = (model(src, tgt, src_padding=real).argmax(-1) == out) | ~real
#     return right.all(dim=1).double().mean().item(), right[real].double().mean().item()
#
#
# for shortest, longest in ((4, 12), (24, 24)):
#     whole, single = exact_match(shortest, longest)
#     print(f"{shortest:2} to {longest} letters: {whole:.1%} whole, {single:.1%} of letters")
# assert scale() == "short" or exact_match(4, 12)[0] > 0.9

# %% [markdown]
# The first row shows that the small model has learnt the task. The second is the first hint of
# trouble: the rule is the same at any length, and the model has not learnt the rule. It was also
# given the true letters so far as input, which is the easy way to be tested; the chapter on the
# first translation tests models on their own output.
#
# What did it look at? {numref}`fig-reversal` shows the weights $a_j$ for one test sequence. Nobody
# told the model that the letters have to be read from the end.

# %% mystnb={"figure": {"caption": "Trained to reverse, the decoder looks at the source from its end to its beginning.", "name": "fig-reversal"}, "image": {"alt": "Heat map with the letters written, from top to bottom, against the letters read, from left to right. The dark cells run from the top right to the bottom left corner."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# src, tgt, out, real = reversals(1, 10, torch.Generator().manual_seed(5), shortest=10)
# with torch.no_grad():
#     _, weights = model.align(tgt, model.encode(src, real))
# source, target = ([letters[i] for i in ids[0]] for ids in (src, out))
# figure, ax = plt.subplots(figsize=(4.6, 3.6))
# image = figures.heatmap(ax, weights[0], rows=target, cols=source, vmin=0, vmax=1)
# ax.set(xlabel="letter of the source", ylabel="letter to be written")
# figure.colorbar(image, ax=ax, label="weight");

# %% [markdown]
# Each row is one step of the decoder and sums to one. In the row of the first letter to be written,
# most of the weight lies on the last letters of the source, and so on down the diagonal. The weight
# need not lie exactly on the right letter: a state of the encoder also knows its neighbours, so a
# look at a neighbour can be enough. Read such maps as a trace of where information could come from, not
# as an explanation.
#
# ## What grows with the length
#
# Attention has shortened the way *between* the sentences: from any target step to any source state
# it is one step. *Within* each sentence the GRU remains. What does that cost? We measure three
# things, against a layer that has no recurrence at all.
#
# The rival is one line. With a sequence $x$ of shape $(n, D)$, $x x^\top$ compares every token
# with every other, softmax turns each row into weights, and the product with $x$ takes the weighted
# means. It is a stand-in. It has no weights to learn and no $\sqrt{d}$, and it is *not* yet
# the attention of the paper, which is built with care two chapters on.

# %%
def everyone_sees_everyone(x: Tensor) -> Tensor:
    """A stand-in for self-attention, without weights: `(..., n, D) -> (..., n, D)`."""
    return (x @ x.transpose(-2, -1)).softmax(dim=-1) @ x


def read(cell: GRUCell, x: Tensor) -> Tensor:
    """Run a cell along a sequence: `(n, D) -> (n, D)`, the state after each token."""
    state, states = x.new_zeros(1, x.size(1)), []
    for x_t in x.split(1):  # (1, D), n times
        state = cell(x_t, state)
        states.append(state)
    return torch.cat(states)


# %% [markdown]
# ### How many operations have to wait for one another
#
# PyTorch records every operation of the forward pass in a graph, for the sake of the backward pass.
# Each node of it knows the nodes it depends on. So the count needs no theory: walk the graph
# from the last output and find the longest chain down to an input or a weight.

# %%
def longest_chain(output: Tensor) -> int:
    """Count the operations on the longest path of the graph that computed `output`."""
    if output.grad_fn is None:
        raise ValueError("output has no graph: it must depend on a tensor that requires grad")
    depth: dict[object, int] = {}
    stack = [output.grad_fn]
    while stack:  # no recursion: Python would run out of stack before the graph ends
        node = stack[-1]
        parents = [parent for parent, _ in node.next_functions if parent is not None]
        waiting = [parent for parent in parents if parent not in depth]
        if waiting:
            stack.extend(waiting)
        else:
            depth[node] = 1 + max((depth[parent] for parent in parents), default=-1)
            stack.pop()
    return depth[output.grad_fn]


# %% [markdown]
# A chain of three to try it on: a product, a sum and a tanh.

# %% tags=["active-ipynb"]
# w = torch.tensor(2.0, requires_grad=True)
# print("chain of tanh(3 w + 1):", longest_chain(torch.tanh(3 * w + 1)))
#
# torch.manual_seed(0)
# lengths, width = [2, 4, 8, 16, 32, 64, 128], 64
# cell = GRUCell(width, width)
# chains = {"GRU": [], "everyone sees everyone": []}
# for n in lengths:
#     x = torch.randn(n, width, requires_grad=True)
#     chains["GRU"].append([longest_chain(read(cell, x)[-1])])
#     chains["everyone sees everyone"].append([longest_chain(everyone_sees_everyone(x)[-1])])
# for name, counts in chains.items():
#     print(f"{name:22}", *(f"{count:5}" for (count,) in counts))
# (longer,), (shorter,) = chains["GRU"][-1], chains["GRU"][-2]
# print("GRU, operations for each further token:", (longer - shorter) / (lengths[-1] - lengths[-2]))

# %% tags=["hide-input"]
def plot_growth(
    lengths: Sequence[int], curves: Mapping[str, Sequence[Sequence[float]]], ylabel: str
) -> None:
    """Plot the median of each curve's values against length, with the band from least to most.

    `curves[name][i]` holds the values measured at `lengths[i]`. Both axes are logarithmic.
    """
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter

    _, ax = plt.subplots()
    for marker, (name, values) in zip("osD^", curves.items(), strict=False):
        middle = [statistics.median(v) for v in values]
        ax.plot(lengths, middle, marker=marker, markersize=4, label=name)
        ax.fill_between(lengths, [min(v) for v in values], [max(v) for v in values], alpha=0.2)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < 1000:  # then plain numbers read better than powers of ten
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.set(xlabel="length n (tokens)", ylabel=ylabel)
    ax.legend()


# %% mystnb={"figure": {"caption": "The chain of dependent operations grows with the length for the GRU and does not grow at all where everyone sees everyone.", "name": "fig-chains"}, "image": {"alt": "Line plot on logarithmic axes. The longest chain of the GRU rises in a straight line with the length, from tens to more than a thousand operations; that of the other layer is a horizontal line at a few operations."}} tags=["active-ipynb"]
# plot_growth(lengths, chains, "longest chain (operations)")

# %% [markdown]
# In the table above, each column is a length. The GRU pays the same number of operations for every further token, none of which can begin
# before the last one ends. The other layer has a short chain whose length does not depend on $n$.
# A processor with ten thousand arithmetic units can use them inside one operation, but it cannot
# shorten a chain.
#
# ### How much of the signal arrives
#
# To learn that word $n$ depends on word 1, training needs a gradient that reaches from one to the
# other. By the chain rule it is a product with one factor for each step in between:
#
# $$
# \frac{\partial h_n}{\partial x_1}
# = \frac{\partial h_n}{\partial h_{n-1}} \cdots \frac{\partial h_2}{\partial h_1}
# \frac{\partial h_1}{\partial x_1}.
# $$ (eq-product)
#
# If every factor is near one half, the product is near $2^{-n}$. That is the vanishing gradient
# {cite:p}`bengio1994learning`. How near to one half are the factors of a GRU? With fresh weights
# the gates' inputs are near 0 and $\sigma(0) = \frac12$. So measure: take a random direction $u$,
# and the size of the gradient of $u \cdot y_n$ with respect to the first token.

# %%
def reach(layer: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    """Norm of the gradient of `direction · y_n` with respect to token 1; `x` is `(n, D)`."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(layer(x)[-1] @ direction, x)
    return gradient[0].norm().item()


# %% [markdown]
# A third runner joins to keep the comparison fair: a GRU whose update gate gets a bias of 3. Its $z$ starts
# near 0.95 instead of 0.5, so it begins life as a reader that keeps nearly everything. Fresh weights
# are where training starts, not where it ends, and a gate can learn to stay open. The tokens are
# random vectors of length about 1, and each length is drawn several times.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def gru(width, keep=0.0):
#     layer = nn.GRU(width, width).double()
#     with torch.no_grad():
#         layer.bias_hh_l0[width : 2 * width] += keep  # the update gate's bias
#     return lambda x: layer(x)[0]
#
#
# draws = 20 if scale() == "full" else 3
# torch.manual_seed(0)
# reaches = {"GRU": [], "everyone sees everyone": [], "GRU, update bias 3": []}
# for n in lengths:
#     for values in reaches.values():
#         values.append([])
#     for _ in range(draws):
#         x = torch.randn(n, width, dtype=torch.float64) / width**0.5
#         direction = F.normalize(torch.randn(width, dtype=torch.float64), dim=0)
#         layers = gru(width), everyone_sees_everyone, gru(width, keep=3.0)
#         for values, layer in zip(reaches.values(), layers, strict=True):
#             values[-1].append(reach(layer, x, direction))
#
# print("n".rjust(22), *(f"{n:8}" for n in lengths))
# for name, values in reaches.items():
#     print(f"{name:22}", *(f"{statistics.median(v):8.1e}" for v in values))
# longer, shorter = (statistics.median(v) for v in reversed(reaches["GRU"][-2:]))
# factor = (longer / shorter) ** (1 / (lengths[-1] - lengths[-2]))
# print(f"GRU, factor for each further token: {factor:.2f}")

# %% mystnb={"figure": {"caption": "The gradient from the last output to the first token dies exponentially in a fresh GRU, more slowly in one that starts by keeping, and like 1/n where everyone sees everyone.", "name": "fig-reach"}, "image": {"alt": "Line plot on logarithmic axes of the gradient's norm against the length, with narrow bands. The fresh GRU falls off steeply, more than twenty orders of magnitude by 128 tokens. The GRU with update bias 3 falls by two to three orders. The layer without recurrence falls in a gentle straight line."}} tags=["active-ipynb", "nbval-ignore-output"]
# plot_growth(lengths, reaches, "gradient reaching token 1")

# %% [markdown]
# Read the fresh GRU from left to right: every doubling of the length roughly squares the share that
# arrives. The
# printed factor lies somewhat above one half, because the candidate $\tilde h$ also hands on a
# little of the old state. Training usually runs in float32, which carries about seven decimal
# digits, so a gradient ten million times smaller than its neighbours' is lost in their rounding. See
# at which length the row gets there.
#
# The second row falls too, and for another reason. Token 1 is one of $n$ in a weighted mean, and its
# share is about $1/n$. On these axes that is a straight line: doubling the length halves the signal,
# whatever the length. Learnt weights can raise that share again when the first word matters.
#
# The third row is the honest defence of the GRU. An open gate carries the signal much further,
# and training can open gates. But what a step loses is still a factor: the curve bends down at the
# right end of {numref}`fig-reach`, and each doubling from there is worse than the one before. It
# also starts lower, since a state that keeps nearly everything takes in little of what is new.
#
# ### What a token costs
#
# The last measurement is time, forward and backward, on one core and therefore without the help of
# parallel hardware. The comparison has a hole: the one-line layer has no weights, so it does less
# work. A third runner fills it. It passes $x$ through two matrices, $D \times 3D$ and $3D \times D$,
# before everyone sees everyone: $6 D^2$ weights, exactly the number in the GRU's six matrices.

# %%
def time_per_token(
    layers: Mapping[str, Callable[[Tensor], Tensor]],
    lengths: Sequence[int],
    *,
    width: int,
    batch: int,
    rounds: int,
) -> dict[str, list[list[float]]]:
    """Microseconds a token, forward and backward: `times[name][i][round]` at `lengths[i]`.

    Every round runs all layers in a fresh random order, so that a slow moment of the machine
    meets all of them. One round before the first is not counted.
    """
    times: dict[str, list[list[float]]] = {name: [[] for _ in lengths] for name in layers}
    for i, n in enumerate(lengths):
        for turn in range(rounds + 1):
            for name in random.sample(list(layers), len(layers)):
                x = (torch.randn(batch, n, width) / width**0.5).requires_grad_()
                began = time.perf_counter()
                layers[name](x).sum().backward()
                seconds = time.perf_counter() - began
                if turn > 0:
                    times[name][i].append(1e6 * seconds / (batch * n))
    return times


# %% tags=["active-ipynb", "nbval-ignore-output"]
# time_lengths = [16, 32, 64, 128, 256, 512, 1024, 2048] if scale() == "full" else [16, 32, 64]
# unit = nn.GRU(width, width, batch_first=True)
# mix = nn.Sequential(nn.Linear(width, 3 * width), nn.Linear(3 * width, width))
# runners = {
#     "GRU": lambda x: unit(x)[0],
#     "everyone sees everyone": everyone_sees_everyone,
#     "the same, 6 D² weights": lambda x: everyone_sees_everyone(mix(x)),
# }
# rounds = 9 if scale() == "full" else 2
# times = time_per_token(runners, time_lengths, width=width, batch=4, rounds=rounds)
# print(machine())
# print("µs a token at n =".rjust(22), *(f"{n:7}" for n in time_lengths))
# for name, values in times.items():
#     print(f"{name:22}", *(f"{statistics.median(v):7.2f}" for v in values))

# %% mystnb={"figure": {"caption": "On one core the GRU's cost per token shows no trend with the length. The layers without recurrence are far cheaper at the length of sentences and grow dearer as sequences get long.", "name": "fig-times"}, "image": {"alt": "Line plot on logarithmic axes of microseconds a token against the length. The GRU varies around a horizontal. The two layers without recurrence lie well below it for short sequences and rise towards it at the right end."}} tags=["active-ipynb", "nbval-ignore-output"]
# plot_growth(time_lengths, times, "time per token (µs)")

# %% [markdown]
# There are two sides to {numref}`fig-times`. On the left, at the
# lengths of sentences, the layer without recurrence is several times cheaper, with equal weights
# too. One core does the same arithmetic faster as one large product than as many small ones,
# each of which has to be started, fed and waited for. On hardware with thousands of units this gap
# grows, since the large product spreads over them and the chain does not.
#
# On the right the price appears. Every token is compared with $n$ others, so the cost of a token
# grows with $n$ once $n$ is large, while the GRU's does not. Where the lines meet depends on the width,
# the machine and the library. At the very left the layers without recurrence get cheaper with $n$ at
# first: starting an operation has a fixed price, and more tokens share it.
#
# ## What the paper says
#
# {cite:t}`vaswani2017attention` name the obstacle in section 1: the "inherently sequential nature
# precludes parallelization within training examples". Their Table 1 (section 4) counts what we
# measured. In our letters, with a kernel of $k$ tokens for the convolution:
#
# | layer | arithmetic | steps that wait | longest path between two tokens |
# |---|---|---|---|
# | self-attention | $O(n^2 D)$ | $O(1)$ | $O(1)$ |
# | recurrent | $O(n D^2)$ | $O(n)$ | $O(n)$ |
# | convolution, dilated | $O(k n D^2)$ | $O(1)$ | $O(\log_k n)$ |
# | self-attention among $r$ neighbours | $O(r n D)$ | $O(1)$ | $O(n/r)$ |
#
# The third column is {numref}`fig-chains`, the fourth is the reason for {numref}`fig-reach`, and the
# second is behind both halves of {numref}`fig-times`. Counted in multiplications, self-attention is the
# cheaper one while $n$ is smaller than $D$, says the paper; a sentence has tens of tokens, and its $D$
# is 512. In the figure the lines meet later than such a count predicts, because one large product runs
# faster per multiplication than many small ones.
#
# The step from Bahdanau to the title of the paper is then a short one. Attention had made one path
# short, the one between the two sentences. *Attention Is All You Need* uses it for the paths inside
# each sentence as well, and drops the recurrence, which was the only thing left that had to wait.
# The order of the words goes with it; the chapter on embeddings brings it back.
#
# ## What production does
#
# Training is where recurrence lost. When a translator *writes*, each word still waits for
# the one before it, and there a recurrent state of fixed size has an edge over attention, which must
# look at everything again. {cite:t}`chen2018best` got their best results from a Transformer encoder
# with a recurrent decoder, and some of the fastest production translators kept a simple recurrent
# unit in the decoder {cite:p}`kim2019research`. For long texts recurrence has come back in a form
# that trains in parallel, as in RWKV {cite:p}`peng2023rwkv` and Mamba {cite:p}`gu2023mamba`: the
# cost per token is flat again, at the price that the past has to fit in a state of fixed size.
#
# ## How it breaks, and how you notice
#
# **The backward reader starts in the padding.** Nothing fails and the loss goes down. The symptom is
# that a sentence is translated differently in other company. The next cell leaves the padding tensor
# out and measures how far the states of the real tokens move.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# torch.manual_seed(0)
# model = RecurrentTranslator(20, 8, dropout=0.0)
# src = torch.randint(1, 20, (1, 4))
# padded = F.pad(src, (0, 3))
# with torch.no_grad():
#     alone = model.encode(src).states
#     right = model.encode(padded, padded != 0).states[:, :4]
#     wrong = model.encode(padded).states[:, :4]
# from_left, from_right = (wrong - alone).abs().chunk(2, dim=-1)
# print(f"with the padding tensor: {(right - alone).abs().max():.0e}")
# print(f"without it: from the left {from_left.max():.0e}, from the right {from_right.max():.0e}")
# assert (right - alone).abs().max() < 1e-6 < (wrong - alone).abs().max()

# %% [markdown]
# The direction that reads from the left is untouched; the one from the right is off. The test for
# it is the one above: pad, and compare.
#
# **The gradient vanishes.** No error again: short sentences come out well and long ones do not.
# Report the score by length, never only the mean.
#
# **The gradient explodes.** The factors in {eq}`eq-product` can also be larger than one. A loss that
# jumps, or turns into `nan`, is the sign. That is why the training loop above has `clip_grad_norm_`.
#
# ## Takeaways
#
# - A recurrence reads a sentence by a chain of $n$ steps, and no hardware can run them at once.
# - What travels along a chain is multiplied at every step. Gates make the factor better, and it
#   remains a factor.
# - Attention takes a weighted mean of everything: the chain is short, an even share of the
#   signal is $1/n$, and the price is a comparison for every pair.
# - Bahdanau's attention came first and sat between two recurrent networks. The Transformer keeps
#   the attention and drops the networks.
#
# ## Exercises
#
# **Exercise 1.1.** Count multiplications in the forward pass. A GRU of width $D$ with inputs
# of width $D$ uses six $D \times D$ matrices on each token. The one-line layer forms $x x^\top$ and
# multiplies the result by $x$. At which length $n$ do both need the same number of
# multiplications when $D = 512$?

# %% tags=["active-ipynb"]
# answer = ...
# check("1.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# D = 512
# # GRU: n tokens x 6 D^2. One-line layer: two products of n x n x D. So 6 n D^2 = 2 n^2 D.
# answer = 6 * D**2 // (2 * D)
# print("n =", answer)
# check("1.1", answer)

# %% [markdown]
# **Exercise 1.2.** Suppose only the term $z \odot h$ of {eq}`eq-gru` carried the signal, and the
# gate's input were its bias $b$ alone. Which $b$ lets exactly half of the state survive 63 steps?

# %% tags=["active-ipynb"]
# answer = ...
# check("1.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# z = 0.5 ** (1 / 63)  # z to the power of 63 is one half
# answer = torch.logit(torch.tensor(z, dtype=torch.float64))  # the inverse of the logistic function
# print(f"z = {z:.4f}, b = {answer:.3f}")
# check("1.2", answer)

# %% [markdown]
# **Exercise 1.3.** The decoder asks one query at a time. Suppose all $T$ queries were known at once.
# Write a function that takes queries $(B, T, D)$ (already multiplied by $W$), keys $(B, S, D)$ and
# the vector $v$ of $D$ numbers, and returns the weights of {eq}`eq-additive`, $(B, T, S)$, without a
# loop. What is the largest tensor on the way?

# %% tags=["active-ipynb"]
# answer = ...
# check("1.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def answer(queries, keys, v):
#     energy = torch.tanh(queries.unsqueeze(2) + keys.unsqueeze(1))  # (B, T, S, D)
#     return (energy @ v).softmax(dim=-1)  # (B, T, S)
#
#
# check("1.3", answer)
# # The largest tensor holds D numbers for every pair of positions. Chapter 3 scores a pair by a dot
# # product instead, which is a matrix product and never forms that tensor.
