# %% [markdown]
r"""
# Looking inside

Where a trained model looks, which of its heads it can do without, and why the first question does not answer the
second.
"""

# %% [markdown]
# The book has trained models and scored them. This last chapter of Part II opens one. It draws its attention with the right labels, counts what each head does over hundreds of sentences, and then takes heads away.

# %% mystnb={"figure": {"caption": "Chapter 24 of Part II: inside a trained model.", "name": "fig-map-inside"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The thirteenth, Looking inside, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(24);

# %%
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.multi_head import MultiHeadAttention, record_attention
from transformer_annotated.paper.toy import Batch, Derivation, Vocabulary, collate
from transformer_annotated.paper.transformer import Transformer
from transformer_annotated.training.decoding import evaluating

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# ## A model to look into
#
# Chapter 10's model, trained by Chapter 10's loop: two encoder layers, two decoder layers, four heads each, on the small language. It is small enough to train here and good enough to be worth a look.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import random
# import time
# from itertools import chain, count, islice
#
# from transformer_annotated import (
#     PAPER_BASE,
#     batches,
#     exact_match,
#     patch,
#     rise_and_fall,
#     train,
#     translate,
# )
# from transformer_annotated.book import machine, scale
# from transformer_annotated.paper.first_translation import encode_pairs
# from transformer_annotated.paper.toy import derive, split
#
# full = scale() == "full"
# text, _ = split(50_000 if full else 600, 0, seed=0)
# vocabulary = Vocabulary.build(sentence.split() for pair in text for sentence in pair)
# data = encode_pairs([(de.split(), en.split()) for de, en in text], vocabulary)
# SMALL = {
#     "vocab_size": len(vocabulary),
#     "d_model": 128,
#     "n_layers": 2,
#     "dropout": 0.0,
#     "self_attention.n_heads": 4,
#     "cross_attention.n_heads": 4,
#     "ffn.d_ff": 512,
# }
# steps = 600 if full else 10
# torch.manual_seed(0)
# model = Transformer(patch(PAPER_BASE, SMALL))
# passes = chain.from_iterable(batches(data, 96 if full else 16, seed=seed) for seed in count())
# start = time.process_time()
# history = train(model, islice(passes, steps), learning_rate=rise_and_fall(2e-3, steps // 6, steps))
# print(machine())
# print(
#     f"{steps} steps in {time.process_time() - start:.0f} s of processor time, last loss {history.loss[-1]:.4f}"
# )

# %% [markdown]
# Two sets of new sentences come next: one to choose by, one to report on. Whoever picks heads by a set of sentences must not measure the result on the same ones. The grammar derives them, so we also get their links: which German word belongs to which English word.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def new_sentences(n: int, seed: int, known: set[str]) -> list[Derivation]:
#     """`n` derivations of at most 14 German words whose German side is not in `known`; they join it."""
#     rng, found = random.Random(seed), []
#     while len(found) < n:
#         d = derive(rng, rng.choice([1, 2]))
#         if len(d.german) <= 14 and " ".join(d.german) not in known:
#             known.add(" ".join(d.german))
#             found.append(d)
#     return found
#
#
# known = {german for german, _ in text}
# choose_by, report_on = (new_sentences(300 if full else 6, seed, known) for seed in (1, 2))
# sources, references = [d.german for d in report_on], [list(d.english) for d in report_on]
# score = exact_match(translate(model, vocabulary, sources, extra=10), references)
# print(f"exact match on {len(report_on)} unseen sentences: {score:.1%}")
# if full:
#     assert score > 0.95

# %% [markdown]
# ## Labels first
#
# An attention map is a matrix of weights: a row for each query, a column for each key. For a sentence of twelve words it has more than a hundred numbers, and no names on them. Turn it by mistake, or shift the words by one, and the picture is as convincing as before. So the names come from the ids that went in, and a map that cannot be right is refused.
#
# What is a row of the decoder? At position $t$ the decoder reads word $t-1$ and has to say word $t$. We name its rows by the word *to be said*, and its columns, in self-attention, by the words that it *reads*.

# %%
Kind = Literal["encoder", "decoder", "cross"]


def kind_of(name: str) -> Kind:
    """Which attention a module is, by its name in a `Transformer`.

    Raises ValueError for a name that belongs to none.
    """
    if name.endswith(".cross_attention"):
        return "cross"
    if name.endswith(".self_attention"):
        return "encoder" if name.startswith("encoder.") else "decoder"
    raise ValueError(f"name must end in .self_attention or .cross_attention, got {name!r}")

# %%
@dataclass(frozen=True)
class AttentionMap:
    """The weights of one attention module for one sentence, and what its rows and columns are.

    Attributes:
        kind: whether it is the encoder's or decoder's self-attention, or cross-attention.
        weights: `(H, T, S)`, before dropout; each row sums to one.
        rows, cols: a label for each of the T queries and S keys.

    Raises:
        ValueError: labels that do not fit the shape, rows that do not sum to one (a map that was
            turned, or recorded after dropout), or a decoder that sees what it has yet to say.
    """

    kind: Kind
    weights: Tensor
    rows: tuple[str, ...]
    cols: tuple[str, ...]

    def __post_init__(self) -> None:
        shape = tuple(self.weights.shape)
        if len(shape) != 3 or shape[1:] != (len(self.rows), len(self.cols)):
            raise ValueError(
                f"weights must be (H, {len(self.rows)}, {len(self.cols)}) for these labels, got {shape}"
            )
        off = (self.weights.sum(dim=-1) - 1).abs().max().item()
        if not off < 1e-3:
            raise ValueError(f"each row of weights must sum to 1, but one is off by {off:.3g}")
        if self.kind == "decoder" and self.weights.triu(1).any():
            raise ValueError("weights of the decoder must be 0 above the diagonal")

# %%
@torch.no_grad()
def attention_maps(
    model: Transformer, vocabulary: Vocabulary, source: Sequence[str], target: Sequence[str]
) -> dict[str, AttentionMap]:
    """Every attention map of one sentence pair, by the name of the module.

    The target is read as in training: the rows of the decoder are the words of `target` and EOS.
    The model is in evaluation mode meanwhile, so nothing is dropped.
    """
    batch = collate([(vocabulary.encode(source), vocabulary.encode(target))])
    batch = batch.to(next(model.parameters()).device)
    with evaluating(model), record_attention(model) as weights:
        model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
    said, read, german = (
        tuple(vocabulary.words[i] for i in ids[0].tolist())
        for ids in (batch.tgt_out, batch.tgt_in, batch.src)
    )
    labels = {"encoder": (german, german), "decoder": (said, read), "cross": (said, german)}
    return {
        name: AttentionMap(kind_of(name), w[0].cpu(), *labels[kind_of(name)])
        for name, w in weights.items()
    }

# %% tags=["active-ipynb", "nbval-ignore-output"]
# crossed = [
#     d for d in report_on if len(d.german) == 8 and d.crossing() and d.german[-1][0].islower()
# ]
# example = (crossed or report_on)[0]
# maps = attention_maps(model, vocabulary, example.german, example.english)
# for name, m in maps.items():
#     print(f"{name:34s} {m.kind:8s} (H, T, S) = {tuple(m.weights.shape)}")
# print(" ".join(maps["decoder.layers.0.cross_attention"].rows))
# print(" ".join(maps["decoder.layers.0.cross_attention"].cols))

# %% [markdown]
# Now try to get it wrong: turn a map, drop some of its weights, give it one label too many:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import dataclasses
#
# square = maps["encoder.layers.0.self_attention"]
# for change in (
#     {"weights": square.weights.transpose(1, 2)},
#     {"weights": F.dropout(square.weights, 0.1)},
#     {"rows": (*square.rows, "more")},
# ):
#     try:
#         dataclasses.replace(square, **change)
#     except ValueError as error:
#         print(error)
#     else:
#         raise AssertionError("this should have been refused")

# %%
def draw_attention(maps: Sequence[AttentionMap], head: int | None = None) -> "Figure":
    """Maps side by side, one head of each, or the mean over heads.

    Raises ValueError for no maps and for a head that a map does not have.
    """
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    if not maps:
        raise ValueError("maps must hold at least one map, got none")
    words = {
        "encoder": ("German word", "German word looked at"),
        "decoder": ("English word to be said", "English word read"),
        "cross": ("English word to be said", "German word looked at"),
    }
    figure, axes = plt.subplots(1, len(maps), figsize=(7.2, 3.2), squeeze=False)
    for ax, m in zip(axes[0], maps, strict=True):
        if head is not None and not 0 <= head < len(m.weights):
            raise ValueError(f"head must be in [0, {len(m.weights)}), got {head}")
        weights = m.weights.mean(dim=0) if head is None else m.weights[head]
        row_label, col_label = words[m.kind]
        figures.heatmap(
            ax, weights, rows=m.rows, cols=m.cols, row_label=row_label, col_label=col_label,
            title=m.kind, vmin=0, vmax=1,
        )  # fmt: skip
        ax.tick_params(axis="x", labelrotation=90, labelsize=7)
        ax.tick_params(axis="y", labelsize=7)
    return figure

# %% mystnb={"figure": {"caption": "One sentence, the last layer's three kinds of attention, mean over heads. The decoder sees only what it has read; cross-attention leaves the diagonal where the order of the words differs.", "name": "fig-inside-maps"}, "image": {"alt": "Three heat maps with words as labels: the encoder's, German by German; the decoder's, a lower triangle of English by English; and cross-attention, English by German."}} tags=["active-ipynb", "nbval-ignore-output"]
# last = [
#     maps[f"{n}_attention"]
#     for n in ("encoder.layers.1.self", "decoder.layers.1.self", "decoder.layers.1.cross")
# ]
# draw_attention(last);

# %% [markdown]
# Look at the right picture of {numref}`fig-inside-maps` first. Its dark cells say, for each English word, from which German position the decoder fetched most. The middle picture is a triangle, as it must be. The left one is hard to read, and that is usual.
#
# A mean over heads hides what single heads do. And one sentence proves nothing: with 24 heads and many sentences one finds a picture that fits any explanation. So we count.
#
# ## What a head does, as a number
#
# Take one head, and a *relation*: a rule that marks some keys for each query, such as *the word before*. The head's share of the relation is the weight that falls on marked keys, averaged over the queries that have any:
#
# $$
# \mathrm{share}(r) = \frac{1}{|Q_r|} \sum_{q \in Q_r} \; \sum_{k \in r(q)} w_{qk}
# $$ (eq-share)
#
# Here $w_{qk}$ is the weight of query $q$ on key $k$, $r(q)$ are the keys that the relation marks for $q$, and $Q_r$ are the queries for which it marks some.
#
# Positions are compared by number. In the decoder *same* is therefore the word just read. In cross-attention it is the German word with the same number. We use five relations: the position before, the same position, the position after, the *sign* (the end of the source or the beginning of the target), and *linked*. In cross-attention a German word is linked to the English word to be said if the grammar says that they belong together. In self-attention two words of one sentence are linked if they share a partner in the other language, such as *lädt* and *ein*.

# %%
RELATIONS = ("before", "same", "after", "sign", "linked")


def relations(derivation: Derivation, kind: Kind) -> dict[str, Tensor]:
    """For each relation the keys that it marks: bool `(T, S)`, laid out as an `AttentionMap`."""
    n, m = len(derivation.german), len(derivation.english)
    rows, cols = (n if kind == "encoder" else m) + 1, (m if kind == "decoder" else n) + 1
    belong = torch.zeros(n, m)
    for i, j in derivation.links:
        belong[i, j] = 1
    linked = torch.zeros(rows, cols, dtype=torch.bool)
    if kind == "encoder":
        linked[:n, :n] = (belong @ belong.T > 0) & ~torch.eye(n, dtype=torch.bool)
    elif kind == "decoder":  # key j + 1 reads word j; a query sees what was said before
        linked[:m, 1:] = (belong.T @ belong > 0).tril(-1)
    else:
        linked[:m, :n] = belong.T > 0
    offset = torch.arange(cols) - torch.arange(rows)[:, None]  # (T, S): key minus query
    sign = torch.zeros(rows, cols, dtype=torch.bool)
    sign[:, 0 if kind == "decoder" else -1] = True
    after = (offset == 1) & (kind != "decoder")
    return {
        "before": offset == -1,
        "same": offset == 0,
        "after": after,
        "sign": sign,
        "linked": linked,
    }

# %% tags=["active-ipynb"]
# by_hand = Derivation(
#     ("er", "wacht", "auf"), ("he", "wakes", "up"), ((0, 0), (1, 1), (1, 2), (2, 1), (2, 2))
# )
# for kind in ("encoder", "decoder", "cross"):
#     print(kind, relations(by_hand, kind)["linked"].int().tolist())

# %% [markdown]
# Check them by hand. *Wacht* and *auf* mark each other in the encoder. In the decoder only *up*, the third word to be said, has a linked word that was read before: *wakes*, which is key 2 after `<bos>` and *he*. In cross-attention *wakes* and *up* each mark both German pieces. The rows of the signs mark nothing.
#
# One more number says how widely a head looks: the **entropy** of its weights, $-\sum_k w_{qk} \ln w_{qk}$, averaged over queries. It is 0 if all the weight is on one key and $\ln S$ if it is equal on all $S$.

# %%
@dataclass(frozen=True)
class HeadStatistics:
    """What one head does, over many sentences.

    Attributes:
        module: name of its attention module.
        head: its number in the module.
        shares: for each relation, the mean weight on the keys it marks (NaN if it marks none).
        entropy: of the weights, in nats, mean over queries.
    """

    module: str
    head: int
    shares: dict[str, float]
    entropy: float


def head_statistics(
    model: Transformer,
    vocabulary: Vocabulary,
    derivations: Sequence[Derivation],
    *,
    uniform: bool = False,
) -> list[HeadStatistics]:
    """The statistics of every head, over all queries of all sentences, in the order of the modules.

    With `uniform` each weight is replaced by an equal one for every visible key: what a head that
    looks everywhere alike would get.

    Raises ValueError for no derivations.
    """
    if not derivations:
        raise ValueError("derivations must hold at least one sentence, got none")
    totals: dict[str, Tensor] = {}  # (H, relations + 1, 2): sums, and how many queries
    for d in derivations:
        for name, m in attention_maps(model, vocabulary, d.german, d.english).items():
            w = m.weights
            if uniform:
                seen = torch.ones_like(w).tril() if m.kind == "decoder" else torch.ones_like(w)
                w = seen / seen.sum(dim=-1, keepdim=True)
            marked = torch.stack(list(relations(d, m.kind).values()))  # (R, T, S)
            sums = torch.einsum("hts,rts->hr", w, marked.to(w.dtype))
            entropy = torch.special.entr(w).sum(dim=(1, 2))[:, None]
            queries = torch.cat((marked.any(dim=-1).sum(dim=-1), torch.tensor([w.shape[1]])))
            found = torch.stack(
                (torch.cat((sums, entropy), dim=1), queries.expand(len(w), -1)), dim=-1
            )
            totals[name] = totals.get(name, torch.zeros_like(found, dtype=torch.float64)) + found
    return [
        HeadStatistics(name, h, dict(zip(RELATIONS, values[:-1], strict=True)), values[-1])
        for name, total in totals.items()
        for h, values in enumerate((total[..., 0] / total[..., 1]).tolist())
    ]

# %%
def head_name(module: str, head: int) -> str:
    """A short name: `encoder 2.4` is head 4 of the second layer, both counted from 1."""
    layer = module.split(".layers.")[1].split(".")[0]
    return f"{kind_of(module)} {int(layer) + 1}.{head + 1}"


def draw_statistics(heads: Sequence[HeadStatistics], chance: Sequence[HeadStatistics]) -> "Figure":
    """A table of heads as a heat map; the first row of each kind is what equal weights get."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    kinds = list(dict.fromkeys(kind_of(h.module) for h in heads))
    sizes = [1 + sum(kind_of(h.module) == kind for h in heads) for kind in kinds]
    figure, axes = plt.subplots(
        len(kinds), 1, figsize=(7.2, 0.27 * sum(sizes) + 0.8), height_ratios=sizes, squeeze=False
    )
    for ax, kind in zip(axes[:, 0], kinds, strict=True):
        base = next(h for h in chance if kind_of(h.module) == kind)
        rows = [base, *(h for h in heads if kind_of(h.module) == kind)]
        names = ["equal weights", *(head_name(h.module, h.head) for h in rows[1:])]
        values = torch.tensor([list(h.shares.values()) for h in rows]).nan_to_num(0.0)
        last = kind == kinds[-1]
        figures.heatmap(ax, values, rows=names, values=".2f", vmin=0, vmax=1)
        ax.set_xticks(range(len(RELATIONS)), RELATIONS if last else [""] * len(RELATIONS))
    return figure

# %% mystnb={"figure": {"caption": "Mean weight of each head on five kinds of keys. The second layer's cross-attention puts most of its weight on linked words; no encoder head does one thing only.", "name": "fig-heads-table"}, "image": {"alt": "A table of numbers with shaded cells. A row for each of 24 heads and one of equal weights above each kind; columns for before, same, after, sign and linked."}} tags=["active-ipynb", "nbval-ignore-output"]
# heads = head_statistics(model, vocabulary, report_on)
# chance = head_statistics(model, vocabulary, report_on, uniform=True)
# draw_statistics(heads, chance);

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import math
#
# print("head           entropy   equal weights   furthest above chance")
# for h, base in zip(heads, chance, strict=True):
#     possible = [r for r in RELATIONS if not math.isnan(h.shares[r])]
#     relation = max(possible, key=lambda r: h.shares[r] - base.shares[r])
#     print(
#         f"{head_name(h.module, h.head):14s} {h.entropy:6.2f}   {base.entropy:10.2f}      "
#         f"{relation} ({h.shares[relation]:.2f}, by chance {base.shares[relation]:.2f})"
#     )

# %% [markdown]
# The first row of each block in {numref}`fig-heads-table` is the yardstick: what equal weights would get. Read every number against it. In the decoder the column *after* has no meaning, since it cannot look ahead; the figure shows 0.00.
#
# Start at the bottom. In the second layer the four heads of cross-attention have most of their weight on words that belong together, many times the share of equal weights. In the first layer the same relation is there, weaker. Then the encoder: each head spreads its weight over several things, and all look at their own position more than equal weights would. So a head does several things, and not one, as a picture may suggest.
#
# One column can mislead. In the decoder some heads have a large share on *linked* words. But such English words stand side by side, as in *wants to*. A head that looks at the word just read gets those shares without knowing any links; the column *same* is large for these heads too. A statistic shows where a head looks, and not which rule it follows.
#
# ## Taking a head away
#
# A head that looks at the right word need not be a useful one. To find out, remove it. Equation {eq}`eq-multi-head` says how: the heads are laid side by side and multiplied by $W^O$, which is the same as a sum with one term for each head,
#
# $$
# \mathrm{MultiHead} = \sum_{h=1}^{H} \mathrm{head}_h\, W^O_h
# $$ (eq-sum-of-heads)
#
# where $W^O_h$ are the $d$ rows of $W^O$ that belong to head $h$. Our last projection also has a bias, which belongs to no head and stays when heads are removed. To remove a head is to drop its term. A hook on the last projection does that from outside, by setting the head's slice to zero.

# %%
@contextmanager
def remove_heads(model: nn.Module, heads: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """Inside the `with` block these heads add nothing: `{"decoder.layers.0.self_attention": [2]}`.

    The keys are names of attention modules, the values numbers of heads, counted from 0.

    Raises:
        ValueError: a name that is no attention module, or a head that the module does not have.
    """
    modules = {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    for name, numbers in heads.items():
        if name not in modules:
            raise ValueError(
                f"heads must name attention modules, got {name!r}; there are {', '.join(modules)}"
            )
        for number in numbers:
            if not 0 <= number < modules[name].n_heads:
                raise ValueError(
                    f"heads[{name!r}] must be in [0, {modules[name].n_heads}), got {number}"
                )

    def dropper(numbers: Sequence[int], d: int) -> Callable[[nn.Module, Any], tuple[Tensor]]:
        def drop(module: nn.Module, args: Any) -> tuple[Tensor]:
            side_by_side = args[0].unflatten(-1, (-1, d)).clone()  # (B, T, H, d)
            side_by_side[..., list(numbers), :] = 0
            return (side_by_side.flatten(-2),)

        return drop

    with ExitStack() as stack:
        for name, numbers in heads.items():
            module = modules[name]
            hook = dropper(numbers, module.head_dim)
            stack.callback(module.out_proj.register_forward_pre_hook(hook).remove)
        yield

# %% [markdown]
# The proof: zero the columns of the projection's matrix that read head 2 (PyTorch stores $W^O$ the other way round, so rows of $W^O$ are columns there), and compare output and gradient, with all weights redrawn.

# %% tags=["active-ipynb"]
# import copy
#
# torch.manual_seed(1)
# attention = MultiHeadAttention(d_model=16, n_heads=4).double()
# for parameter in attention.parameters():
#     nn.init.normal_(parameter, std=0.3)
# x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
# with remove_heads(attention, {"": [2]}):
#     removed = attention(x)
# shorter = copy.deepcopy(attention)
# with torch.no_grad():
#     shorter.out_proj.weight[:, 8:12] = 0
# by_hand = shorter(x)
# torch.testing.assert_close(removed, by_hand, rtol=0, atol=1e-12)
# direction = torch.randn_like(x)
# gradients = [torch.autograd.grad(y, x, direction)[0] for y in (removed, by_hand)]
# torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
# assert not torch.allclose(attention(x), removed)  # outside the block nothing is removed
# print("one head removed by the hook and by hand: output and gradient equal, to 1e-12")

# %% [markdown]
# To measure a removal we use the loss on the right translation, and exact match of what the model writes itself.

# %%
@torch.no_grad()
def mean_loss(model: Transformer, data: Sequence[Batch]) -> float:
    """Mean of -log p(word) over the real target tokens of all batches, in nats, nothing dropped."""
    total, tokens = 0.0, 0
    with evaluating(model):
        for batch in data:
            logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
            real = batch.tgt_padding
            total += F.cross_entropy(
                logits[real].float(), batch.tgt_out[real], reduction="sum"
            ).item()
            tokens += batch.n_tokens
    return total / tokens


Head = tuple[str, int]  # the name of an attention module, and the number of a head


def grouped(heads: Sequence[Head]) -> dict[str, list[int]]:
    """Heads by module, as `remove_heads` wants them."""
    return {name: [h for n, h in heads if n == name] for name, _ in heads}

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def as_batches(derivations: list[Derivation], size: int = 100) -> list[Batch]:
#     pairs = sorted(((d.german, d.english) for d in derivations), key=lambda pair: len(pair[0]))
#     ids = encode_pairs(pairs, vocabulary)
#     return [collate(ids[i : i + size]) for i in range(0, len(ids), size)]
#
#
# chosen, reported = as_batches(choose_by), as_batches(report_on)
# every = [(h.module, h.head) for h in heads]
# whole = mean_loss(model, reported)
# alone: dict[Head, float] = {}
# for head in every:
#     with remove_heads(model, grouped([head])):
#         alone[head] = mean_loss(model, reported) - whole
# print(f"loss of the whole model {whole:.4f}, exact match {score:.1%}")
# worst = max(every, key=lambda head: alone[head])
# for head in (worst, min(every, key=lambda head: alone[head])):
#     with remove_heads(model, grouped([head])):
#         output = translate(model, vocabulary, sources, extra=10)
#     print(
#         f"without {head_name(*head):12s} loss {alone[head]:+.4f}   exact match {exact_match(output, references):.1%}"
#     )

# %%
def draw_removals(costs: Mapping[Head, float]) -> "Figure":
    """What the removal of each head costs, one bar a head, sorted within its kind."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(7.2, 2.9))
    ticks: list[str] = []
    for color, kind in zip(figures.COLORS, ("encoder", "decoder", "cross"), strict=False):
        own = sorted((h for h in costs if kind_of(h[0]) == kind), key=lambda h: -costs[h])
        places = range(len(ticks), len(ticks) + len(own))
        ax.bar(places, [max(costs[h], 1e-5) for h in own], color=color, label=kind)
        ticks += [head_name(*h).split()[1] for h in own]
    ax.set_xticks(range(len(ticks)), ticks, rotation=90)
    ax.set(xlabel="head removed (layer.head)", ylabel="loss added, in nats", yscale="log")
    ax.set_ylim(bottom=1e-5)
    ax.legend()
    return figure

# %% mystnb={"figure": {"caption": "Most heads can go alone at little cost. The most expensive ones are in the second layer; some heads of the encoder cost nothing.", "name": "fig-removed-alone"}, "image": {"alt": "Twenty-four bars on a logarithmic axis in three groups, encoder, decoder and cross-attention, sorted within each group."}} tags=["active-ipynb", "nbval-ignore-output"]
# draw_removals(alone);

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for kind in ("decoder", "cross"):
#     own = [h for h in heads if kind_of(h.module) == kind]
#     linked = max(own, key=lambda h: h.shares["linked"])
#     costs = sorted((alone[h.module, h.head] for h in own), reverse=True)
#     cost = alone[linked.module, linked.head]
#     print(
#         f"{head_name(linked.module, linked.head):12s} has the largest share of linked words of its kind, "
#         f"{linked.shares['linked']:.2f}; its cost is number {costs.index(cost) + 1} of {len(costs)}"
#     )

# %% [markdown]
# A bar that is missing in {numref}`fig-removed-alone` stands for a head that costs nothing, or whose removal even helps a little. The axis is logarithmic: a bar half as high is a cost many times smaller. Beside the loss of a model that knows nothing, $\ln V$, all costs are small. Beside this model's own loss, printed above, the largest are not. Even so, most translations stay right. What one head did, the others and the direct way of the residuals mostly make up for.
#
# The two lines above put the two questions side by side. In cross-attention the head that looks most at linked words is also the one that is missed most. In the decoder it is not so: looking at linked words and being needed are two things.
#
# ## How many can go?
#
# One head at a time is not the whole story: two heads may stand in for each other, so that either can go and not both. To remove many, go step by step. At each step try every head that is left, and remove the one whose loss is best without it. This is a *greedy* search. It does not find the best set for sure, but there are $2^{24}$ sets.

# %%
def greedy_removal(
    model: nn.Module, heads: Sequence[Head], measure: Callable[[], float]
) -> list[tuple[Head, float]]:
    """Remove heads one after the other, each time the one without which `measure()` is least.

    Returns the heads in the order of removal, each with the measure once it and all before it are
    gone. The model itself is not changed. Raises ValueError for a head named twice.
    """
    if len(set(heads)) != len(heads):
        raise ValueError(f"heads must be distinct, got {sorted(heads)}")
    gone: list[Head] = []
    curve: list[tuple[Head, float]] = []
    while len(gone) < len(heads):
        losses: dict[Head, float] = {}
        for head in heads:
            if head not in gone:
                with remove_heads(model, grouped([*gone, head])):
                    losses[head] = measure()
        best = min(losses, key=lambda head: losses[head])
        gone.append(best)
        curve.append((best, losses[best]))
    return curve

# %% tags=["active-ipynb", "nbval-ignore-output"]
# start = time.process_time()
# every = every if full else every[::4]
# order = [head for head, _ in greedy_removal(model, every, lambda: mean_loss(model, chosen[::2]))]
# print(f"{len(every) * (len(every) + 1) // 2} measurements in {time.process_time() - start:.0f} s")
# print("first to go:", ", ".join(head_name(*head) for head in order[:6]))
# print("last to go: ", ", ".join(head_name(*head) for head in order[-6:]))
#
#
# def score_without(gone: list[Head]) -> float:
#     with remove_heads(model, grouped(gone)):
#         return exact_match(translate(model, vocabulary, sources[:100], extra=10), references[:100])
#
#
# numbers = range(0, len(every) + 1, 2 if full else 3)
# rng = random.Random(0)
# shuffled = [rng.sample(every, len(every)) for _ in range(3)]
# greedily = [score_without(order[:n]) for n in numbers]
# by_lot = [[score_without(other[:n]) for n in numbers] for other in shuffled]

# %% mystnb={"figure": {"caption": "In the greedy order several heads can go before exact match falls much. In random orders it falls much earlier.", "name": "fig-removal-curve"}, "image": {"alt": "Exact match against the number of heads removed. The greedy curve stays high for a while and then falls; three grey curves of random orders fall at once."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# ax.plot(numbers, greedily, "o-", label="greedy order")
# for i, curve in enumerate(by_lot):
#     ax.plot(numbers, curve, color="#888888", linewidth=1, label=None if i else "random orders")
# ax.set(xlabel="heads removed, of 24", ylabel="exact match", ylim=(0, 1.03))
# ax.legend();

# %% [markdown]
# The order was chosen on one set of sentences, and the curve of {numref}`fig-removal-curve` is measured on the first hundred of another. Well chosen, a quarter of the heads can go and nearly all translations stay right. In each of the three random orders the same number costs more. And at the right end the attention is gone and nothing works: redundant does not mean useless.
#
# The lists above the figure name the first and the last. Several of the first to go are in the encoder. The first to go need not be the cheapest of {numref}`fig-removed-alone`: the order is measured on other sentences, and costs this small differ from set to set. Among the last are heads of the second layer's cross-attention: by then they are among the last ways from the source to the decoder.
#
# ## Is a dark cell a reason?
#
# The pictures invite a sentence such as *it said "ball" because it looked at "Ball"*. Test it. For each word that the model says, hide one German word and see how far the probabilities for this word move. If the weight told how important a word is, heavy words would move much and light ones little.
#
# There are two ways to hide a word. Hide its *vector* from the decoder: no cross-attention can fetch it, but its neighbours' vectors were made in its presence. Or hide the *word* from the whole model, encoder included. How far two distributions $p$ and $p'$ are apart is measured by their *total variation*, $\tfrac{1}{2} \sum_w |p_w - p'_w|$: 0 if they agree, 1 if they exclude each other. To compare weights and effects we take their *rank correlation*: 1 if both put all pairs into the same order, 0 if the orders have nothing to do with each other.

# %%
@torch.no_grad()
def word_effects(
    model: Transformer, vocabulary: Vocabulary, source: Sequence[str], target: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of cross-attention, and the effects of hiding vectors and of hiding words.

    The weights are `(N * H, T + 1, S + 1)`, all heads of all layers; the effects are
    `(T + 1, S + 1)`. Row t is about the prediction of target word t; the last row predicts EOS. An
    effect is the total variation between the predictions with and without one source position,
    hidden from the decoder or from the whole model; the other words keep their positions.
    """
    maps = attention_maps(model, vocabulary, source, target)
    weights = torch.cat([m.weights for m in maps.values() if m.kind == "cross"])
    batch = collate([(vocabulary.encode(source), vocabulary.encode(target))])
    batch = batch.to(next(model.parameters()).device)
    S = batch.src.shape[1]
    src, tgt = batch.src.expand(S, -1), batch.tgt_in.expand(S, -1)
    hidden = ~torch.eye(S, dtype=torch.bool, device=src.device)  # row s: all but s
    positions = torch.arange(S, device=src.device).expand(S, -1)
    with evaluating(model):
        memory = model.encode(batch.src)
        p = model.logits(model.decode(batch.tgt_in, memory)).softmax(dim=-1)  # (1, T, V)
        effects = []
        for m in (memory.expand(S, -1, -1), model.encode(src, hidden, positions=positions)):
            q = model.logits(model.decode(tgt, m, hidden)).softmax(dim=-1)  # (S, T, V)
            effects.append((q - p).abs().sum(dim=-1).T.cpu() / 2)  # (T, S)
    return weights, effects[0], effects[1]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's: the correlation of the ranks of two tensors of equal size; ties share a rank."""

    def ranks(x: Tensor) -> Tensor:
        _, place, number = x.flatten().double().unique(return_inverse=True, return_counts=True)
        return (number.cumsum(0) - (number - 1) / 2)[place]

    return torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1].item()

# %% tags=["active-ipynb", "nbval-ignore-output"]
# triples = [word_effects(model, vocabulary, d.german, d.english) for d in report_on]
# weights = torch.cat([w.flatten(1) for w, _, _ in triples], dim=1)  # (N * H, pairs)
# vector, word = (torch.cat([t[k].flatten() for t in triples]) for k in (1, 2))
# crosses = [head_name(h.module, h.head) for h in heads if kind_of(h.module) == "cross"]
# print(f"{len(vector):,} pairs of a predicted word and a German position")
# print("                  rank correlation with        heaviest position has the largest")
# print("weight of         vector      word             effect: vector    word")
# for i, name in enumerate([*crosses, "mean of all"]):
#     own = weights[i] if i < len(crosses) else weights.mean(dim=0)
#     maps_of = [w[i] if i < len(crosses) else w.mean(dim=0) for w, _, _ in triples]
#     print(
#         f"{name:14s}"
#         + "".join(f"{rank_correlation(own, effect):10.2f}" for effect in (vector, word)),
#         end="   ",
#     )
#     for k in (1, 2):
#         same = [m.argmax(-1) == t[k].argmax(-1) for m, t in zip(maps_of, triples, strict=True)]
#         print(f"{torch.cat(same).float().mean():16.0%}", end="")
#     print()

# %% tags=["active-ipynb", "nbval-ignore-output"]
# weight = weights.mean(dim=0)
# print("mean weight      pairs   effect of the vector           effect of the word")
# print("                         10 %, 50 %, 90 % quantile      10 %, 50 %, 90 % quantile")
# for low, high in ((0.0, 0.05), (0.05, 0.2), (0.2, 0.5), (0.5, 1.01)):
#     of = (weight >= low) & (weight < high)
#     if of.any():
#         numbers = [e[of].quantile(q).item() for e in (vector, word) for q in (0.1, 0.5, 0.9)]
#         print(
#             f"{low:.2f} to {min(high, 1):.2f} {of.sum():9,}"
#             + "".join(f"{x:10.3f}" for x in numbers)
#         )
# missed = ((weight < 0.05) & (word > 0.5)).sum().item()
# idle = ((weight > 0.5) & (word < 0.1)).sum().item()
# print(
#     f"{missed} pairs with a weight below 0.05 and an effect above 0.5; {idle} above 0.5 and below 0.1"
# )

# %% mystnb={"figure": {"caption": "Pairs with small weights mostly have no effect and pairs with large weights mostly a full one. In between the effect may be anything.", "name": "fig-weight-effect"}, "image": {"alt": "Two clouds of points, weight across and effect up. Most points lie at the bottom on the left or at the top on the right; between weights of 0.2 and 0.8 some lie at every height."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.0), sharey=True)
# some = torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))[:3000]
# for ax, effect, name in zip(
#     axes,
#     (vector, word),
#     ("vector hidden from the decoder", "word hidden from the model"),
#     strict=True,
# ):
#     ax.scatter(weight[some], effect[some], s=3, alpha=0.4)
#     ax.set(xlabel="mean weight of all heads", title=name)
# axes[0].set_ylabel("effect on the prediction");

# %% [markdown]
# In this model, on this language, the mean weight is a fair guide: see the last line of the first table. This is the most favourable case. Nearly every English word has one or two German words, and cross-attention is the only way by which the source can reach the target. Even so it fails in two ways.
#
# It fails for many single heads. In the second layer the heaviest position is mostly the one that matters. In the first layer it often is not. A picture of one head does not show which kind of head it is.
#
# And it fails for single words, as {numref}`fig-weight-effect` shows. Between a weight of 0.2 and 0.5 the lower and the upper quantile are nearly nothing and nearly everything. The last line of the second table counts words that were hardly looked at and yet decide the prediction, and words that were looked at most and do not matter. Note too that the two effects differ: hiding a vector is not hiding a word, because neighbours have mixed in what they saw.
#
# So the pictures are not useless. They show where vectors were fetched from, and in which share. {cite:t}`jain2019attention` found weights that rank words differently from their effects, and other weights with nearly the same predictions. {cite:t}`wiegreffe2019attention` answered that other weights, found afterwards, do not prove the first ones meaningless, and that it depends on what one wants an explanation to do. The careful use is the one of this page: a picture gives an idea, and a removal tests it.
#
# ## What the papers found
#
# | paper | model | finding |
# |---|---|---|
# | {cite:t}`vaswani2017attention`, appendix | encoder, layer 5 of 6 | pictures of heads that seem to follow the structure of a sentence |
# | {cite:t}`voita2019analyzing` | encoder heads, translation | a few heads with a clear role (position, syntax, rare words) matter most; many others can be pruned by training for it |
# | {cite:t}`michel2019sixteen` | big translation model, BERT | most heads can be removed one at a time at test time with little loss; cross-attention suffers most if many go |
# | {cite:t}`clark2019` | BERT | many heads put much of their weight on a separator sign |
#
# Their models are much larger than ours, and were trained on real text. Read our counts as counts about this model.
#
# ## How it breaks
#
# - *Labels from another tokenisation, or shifted by one.* Take them from the ids, in the function that computes the map.
# - *A map recorded in training mode.* After dropout its rows do not sum to one. `AttentionMap` refuses it.
# - *One pretty sentence.* Count over hundreds, and put the share that equal weights get beside each number.
# - *Heads chosen and measured on the same sentences.* The curve looks better than it is.
# - *A removal that changes the model.* Forgetting one hook poisons every later measurement. Compare the loss with the first one at the end.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# assert mean_loss(model, reported) == whole
# print("after all removals the whole model has the same loss, to the last bit")

# %% [markdown]
# ## Takeaways
#
# - Labels belong to the map; a map whose rows do not sum to one is no map.
# - A share over many sentences, beside the share of equal weights, says what a head does: {eq}`eq-share`.
# - Attention is a sum over heads, {eq}`eq-sum-of-heads`, so a head can be removed exactly. What that costs says what the head is worth *to this model, with the others in place*.
# - A weight is not an effect. Measure the effect.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 24.1.** A head puts the weights 0.5, 0.25 and 0.25 on three keys. What is its entropy, and what would it be with equal weights? Answer with two numbers, in nats.

# %% tags=["active-ipynb"]
# answer = ...
# check("24.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [torch.special.entr(torch.tensor(w)).sum() for w in ([0.5, 0.25, 0.25], [1 / 3] * 3)]
# check("24.1", answer)

# %% [markdown]
# **Exercise 24.2.** The base model of the paper has 6 + 6 layers with 8 heads in each attention. How many heads are there, and how many measurements does `greedy_removal` make to remove them all?

# %% tags=["active-ipynb"]
# answer = ...
# check("24.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# n = 8 * (6 + 6 + 6)
# answer = [n, n * (n + 1) // 2]
# check("24.2", answer)

# %% [markdown]
# **Exercise 24.3.** All heads of one attention module are removed. What does the module return? Answer with its output for `attention` of this page and any input, as a tensor of 16 numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("24.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# with remove_heads(attention, {"": range(4)}):
#     answer = attention(x)[0, 0]
# assert torch.equal(answer, attention.out_proj.bias)
# check("24.3", answer)

# %% [markdown]
# **Exercise 24.4.** In layer 2 the "word" at a position is already a mixture. *Attention rollout* {cite:p}`abnar2020quantifying` takes the mixing into account: for each layer, add the identity (the residual connection) to the weights and halve, then multiply the layers' matrices, the last on the left. Write `rollout(maps)`; it takes a list of `(T, T)` weights from the first layer to the last and returns one `(T, T)` matrix. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("24.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def rollout(maps: Sequence[Tensor]) -> Tensor:
#     result = torch.eye(len(maps[0]), dtype=maps[0].dtype)
#     for weights in maps:
#         result = (weights + torch.eye(len(weights), dtype=weights.dtype)) / 2 @ result
#     return result
#
#
# answer = rollout
# check("24.4", answer)
