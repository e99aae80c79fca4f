# %% [markdown]
r"""
# Batches

A batch holds a fixed number of positions, not of sentences, and sentences of similar length. Each epoch's batches follow from two integers, and
packing removes the filler that is left.
"""

# %% [markdown]
# Sentences have different lengths, and a tensor is a rectangle. The difference is filler, and filler costs as much as words. This chapter measures how much there is, removes most of it, and makes the order of the
# batches something that can be computed again.

# %% mystnb={"figure": {"caption": "Chapter 14 of Part II: how sentences share a tensor.", "name": "fig-map-batching"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The third, Batches, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(14);

# %%
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Sampler

from transformer_annotated.paper.attention import Mask
from transformer_annotated.paper.parts import check_sizes
from transformer_annotated.paper.toy import PAD

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# ## How much of a batch is filler?
#
# Take four sentences with 2, 9, 3 and 10 words. `collate` adds one special token to each, so they fill 3, 10, 4 and 11 positions. Put them into batches of two, as they come, and then by length. A *place* is a cell of the rectangle, filled or not:

# %% tags=["active-ipynb"]
# sizes = torch.tensor([3, 10, 4, 11])
# for name, pairs_of in (("as they come", [[0, 1], [2, 3]]), ("by length", [[0, 2], [1, 3]])):
#     places = sum(len(batch) * int(sizes[batch].max()) for batch in pairs_of)
#     print(f"{name:13s}{places} places for {int(sizes.sum())} signs")

# %% [markdown]
# Same sentences, same number of batches. The order alone decides how much is computed for nothing.
#
# Here are two dozen sentences of the small language in both ways. A row is a sentence, and the rows of one batch touch.

# %% tags=["hide-input"]
def draw_batches(sizes: Sequence[int], ways: dict[str, list[list[int]]]) -> "Figure":
    """Each way's batches as blocks of rows: words dark, filler light."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    figure, axes = plt.subplots(1, len(ways), figsize=(7.2, 3.0), sharey=True)
    for ax, (name, batches) in zip(axes, ways.items(), strict=True):
        row = 0.0
        for batch in batches:
            longest = max(sizes[i] for i in batch)
            for i in batch:
                ax.barh(row, longest, height=0.9, color="#F0C9A8")
                ax.barh(row, sizes[i], height=0.9, color=figures.COLORS[0])
                row += 1
            row += 0.8
        ax.set(title=name, xlabel="positions", yticks=[])
        ax.grid(False)
    axes[0].invert_yaxis()  # for both: they share it
    return figure

# %% mystnb={"figure": {"caption": "Four batches of six sentences: drawn at random, much is filler (orange); sorted by length, little is.", "name": "fig-filler"}, "image": {"alt": "Two panels of horizontal bars in four groups of six. Left, bars of mixed length with long light ends. Right, bars of similar length in each group with almost no light ends."}} tags=["active-ipynb"]
# from transformer_annotated.paper.toy import split
#
# some, _ = split(24, 0, seed=3)
# words = [len(german.split()) + 1 for german, _ in some]
# sorted_order = sorted(range(24), key=words.__getitem__, reverse=True)
# figures.use_style()
# draw_batches(
#     words,
#     {
#         "at random": [list(range(i, i + 6)) for i in range(0, 24, 6)],
#         "by length": [sorted_order[i : i + 6] for i in range(0, 24, 6)],
#     },
# );

# %% [markdown]
# In {numref}`fig-filler` the dark areas on both sides are equal. The light ones are what we pay for. Let $n_i$ be the positions of sentence $i$, and let $\mathcal{B}$ be the batches. The **waste** is the share of all places that hold filler:
#
# $$
# \mathrm{waste} = 1 - \frac{\sum_{b \in \mathcal{B}} \sum_{i \in b} n_i}{\sum_{b \in \mathcal{B}} |b| \, \max_{i \in b} n_i}
# $$ (eq-waste)
#
# A pair has two sides, and both are counted. The lengths of a corpus are a table of two columns, $(N, 2)$: Chapter 13 keeps it beside the encoded sentences.

# %%
def waste(lengths: Tensor, batches: Iterable[Sequence[int]]) -> float:
    """The share of positions, source and target together, that is filler.

    `lengths` is `(N, 2)` without specials, as for `TokenBatchSampler`.
    """
    real = places = 0
    for batch in batches:
        sizes = lengths[list(batch)] + 1  # (|b|, 2)
        real += int(sizes.sum())
        places += len(batch) * int(sizes.amax(dim=0).sum())
    return 1 - real / places

# %% [markdown]
# We need lengths to try it on. The toy language is always there. The real ones come from Multi30k, cut into the pieces of Chapter 13; they are used when this page runs at full size.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
#
# full = scale() == "full"
# toy_text, _ = split(20_000 if full else 2000, 0, seed=0)
# corpora = {"toy": torch.tensor([[len(s.split()) for s in pair] for pair in toy_text])}
# if full:
#     from transformer_annotated.training.corpora import open_corpus
#     from transformer_annotated.training.tokens import train_bpe
#
#     text = open_corpus("multi30k").pairs("train")
#     bpe = train_bpe((sentence for pair in text for sentence in pair), 8000)
#     corpora["multi30k"] = torch.tensor([[len(bpe.encode(s)) for s in pair] for pair in text])
# for name, lengths in corpora.items():
#     german, english = lengths.double().mean(dim=0).tolist()
#     print(
#         f"{name:9s}{len(lengths):7,} pairs, {german:.1f} and {english:.1f} tokens a sentence,",
#         end=" ",
#     )
#     print(f"at most {lengths.amax(dim=0).tolist()}")

# %% [markdown]
# ## A budget of positions
#
# How large should a batch be? Sixty-four sentences of 5 words are a small batch, and sixty-four of 100 words may not fit into memory. What a step costs depends on positions. So fix those: a batch may hold `max_tokens` positions on each side, filler and special signs included.
#
# Let the pairs be sorted, the longest first. Then the first pair of a batch is its longest, and the number of pairs that fit is known at once: `max_tokens` divided by that length. Cutting is one division a batch.

# %%
def cut(longer: list[int], max_tokens: int, pool: int) -> list[tuple[int, int]]:
    """Start and end of each batch, for sizes sorted downwards within each pool.

    The first pair of a batch is its longest, so `max_tokens // longer` pairs fit.
    """
    bounds, start = [], 0
    while start < len(longer):
        pool_end = (start // pool + 1) * pool
        end = min(start + max_tokens // longer[start], pool_end, len(longer))
        bounds.append((start, end))
        start = end
    return bounds

# %% tags=["active-ipynb"]
# longer = [11, 10, 9, 4, 3, 3, 2, 2, 2]
# for start, end in cut(longer, max_tokens=22, pool=9):
#     print(longer[start:end], "->", (end - start) * longer[start], "positions")

# %% [markdown]
# Few long sentences, or many short ones. The last batch takes what is left.
#
# ## Similar lengths, but not always the same company
#
# If we sorted the whole corpus once and cut it, each epoch would have the same batches, and a sentence would be averaged with the same others for ever. So there are three steps. Shuffle all pairs. Cut the shuffled row into **pools** of about a hundred batches. Sort within each pool.
# Sentences of equal length keep their shuffled order, so chance decides among them.

# %%
def pool_size(longer: Tensor, max_tokens: int, batches: int = 100) -> int:
    """Pairs in a pool of about `batches` batches; the pools of an epoch are of equal size."""
    N = len(longer)
    wanted = batches * max_tokens * N / int(longer.sum())
    pools = max(1, round(N / wanted))
    return -(-N // pools)


def by_length(sizes: Tensor, pool: int) -> Tensor:
    """The order that sorts each pool by its longer side, longest first, then by the target.

    `sizes` is `(N, 2)`. Ties keep their order, so a shuffle before it decides them.
    """
    longer, target = sizes.amax(dim=1), sizes[:, 1]
    base = int(longer.max()) + 1
    number = torch.arange(len(sizes)) // pool
    key = (number * base + (base - 1 - longer)) * base + (base - 1 - target)
    return key.argsort(stable=True)

# %% [markdown]
# The key of `by_length` is one integer a pair: the pool, then the longer side downwards, then the target's length downwards. A single sort does all pools at once, so 4.5 million pairs take seconds. Look at ten pairs in two pools:

# %% tags=["active-ipynb"]
# sizes = torch.tensor(
#     [[3, 4], [9, 8], [5, 5], [9, 9], [2, 4], [6, 1], [7, 7], [1, 7], [3, 3], [7, 6]]
# )
# order = by_length(sizes, pool=5)
# print("first pool ", sizes[order[:5]].tolist())
# print("second pool", sizes[order[5:]].tolist())

# %% [markdown]
# The longer side counts first, because the budget holds for both sides. The target decides among equals: it costs more, since only targets meet the vocabulary (Chapter 15).
#
# ## Seed and epoch
#
# A run is stopped in the middle of an epoch and goes on the next day. Which batch comes next? One answer is to save the state of the random generator, and the order, and the place in it. Ours is to make the batches of an epoch a *function* of the seed and the epoch. Then nothing needs saving but the epoch and the number of batches done.
#
# The two integers must become one seed. Adding them will not do: seed 0, epoch 1 would equal seed 1, epoch 0. Python's `hash` is not safe either. For integers it is stable, but for text it differs from process to process, and so does the order of a set:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import os
# import subprocess
# import sys
#
# for hash_seed in ("1", "2"):
#     environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
#     code = "print(hash('Hund') % 1000, list({'Hund', 'Katze', 'Pferd'}))"
#     command = [sys.executable, "-c", code]
#     print(subprocess.run(command, env=environment, capture_output=True, text=True).stdout.strip())

# %% [markdown]
# Even the order of a set changes. Whatever is built on it cannot be repeated. SHA-256 is the same everywhere:

# %%
def mixed(*numbers: int) -> int:
    """One seed below 2^32 from several integers, the same in every process."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:4], "big")

# %% tags=["active-ipynb"]
# for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 23), (12, 3)):
#     print(f"seed {seed:2d}, epoch {epoch:2d}: {mixed(seed, epoch):10d}")

# %% [markdown]
# ## The sampler
#
# Now the pieces together. `epoch_batches` is the function: shuffle, sort the pools, cut, shuffle the batches. The rest checks what comes in, and speaks the language of PyTorch's `DataLoader`, which asks a **sampler** for lists of numbers.

# %%
class TokenBatchSampler(Sampler[list[int]]):
    """Batches of pairs of similar length, each at most `max_tokens` positions on either side.

    Section 5.1 of the paper: "approximately 25000 source tokens and 25000 target tokens". Here
    filler counts too, and so does the one special token that `collate` adds on each side. Every
    pair occurs once in an epoch. The batches of an epoch depend on the lengths, `seed` and the
    epoch's number alone, so an interrupted run needs the epoch and the number of batches done.

    Args:
        lengths: `(N, 2)` integers: tokens of the source and of the target, without specials.
        max_tokens: the most positions of one side of a batch: sentences times the longest.
        seed: decides the order; another seed, another order.
        shuffle: False gives the same batches in each epoch, the longest first: to evaluate.

    Raises ValueError for lengths of another shape or kind, for no pairs at all, and for a pair
    that does not fit into a batch of its own; the message names it.
    """

    def __init__(
        self, lengths: Tensor, max_tokens: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        check_sizes(max_tokens=max_tokens)
        if lengths.ndim != 2 or lengths.shape[1] != 2 or lengths.is_floating_point():
            raise ValueError(
                f"lengths must be integers (N, 2), got {lengths.dtype} {tuple(lengths.shape)}"
            )
        if len(lengths) == 0 or lengths.min() < 0:
            raise ValueError(
                f"lengths must hold at least one pair and nothing below 0, got {len(lengths)} pairs"
                + (f", the smallest length {int(lengths.min())}" if len(lengths) else "")
            )
        self.sizes = lengths.long().cpu() + 1  # (N, 2), with the special token
        self.longer = self.sizes.amax(dim=1)  # (N,)
        worst = int(self.longer.argmax())
        if self.longer[worst] > max_tokens:
            raise ValueError(
                f"max_tokens must fit each pair: pair {worst} has {self.sizes[worst].tolist()} "
                f"positions, got max_tokens={max_tokens}"
            )
        self.max_tokens, self.seed, self.shuffle, self.epoch = max_tokens, seed, shuffle, 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose batches the next loop over the sampler gives, counted from 0."""
        self.epoch = _epoch(epoch)

    def epoch_batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, each a list of pair numbers."""
        generator = torch.Generator().manual_seed(mixed(self.seed, _epoch(epoch)))
        N = len(self.sizes)
        if self.shuffle:
            order = torch.randperm(N, generator=generator)
            pool = pool_size(self.longer, self.max_tokens)
        else:
            order, pool = torch.arange(N), N
        order = order[by_length(self.sizes[order], pool)]
        bounds = cut(self.longer[order].tolist(), self.max_tokens, pool)
        if self.shuffle:
            bounds = [bounds[i] for i in torch.randperm(len(bounds), generator=generator).tolist()]
        numbers = order.tolist()
        return [numbers[start:end] for start, end in bounds]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch_batches(self.epoch))

    def __len__(self) -> int:
        """The number of batches in the current epoch, which is built for it."""
        return len(self.epoch_batches(self.epoch))


def _epoch(epoch: int) -> int:
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"epoch must be a whole number of at least 0, got {epoch!r}")
    return epoch

# %% [markdown]
# `shuffle=False` is for evaluation. There the longest batch comes first, so that a lack of memory shows at once and not after ten minutes.

# %% tags=["active-ipynb"]
# lengths = corpora["toy"]
# sampler = TokenBatchSampler(lengths, max_tokens=512, seed=1)
# first, second = sampler.epoch_batches(0), sampler.epoch_batches(1)
# for batches in (first, second):
#     assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
#     for batch in batches:
#         assert len(batch) * (int(lengths[batch].max()) + 1) <= 512
# assert first == TokenBatchSampler(lengths, max_tokens=512, seed=1).epoch_batches(0)
# same = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
# assert len(same) < len(first) / 100
# print("each pair once, each batch within its budget; epoch 0 again is equal, epoch 1 is not")

# %% [markdown]
# The last assertion compares batches as sets: almost none comes back in the next epoch.
#
# To go on in the middle, drop what was done. A new sampler computes the same batches and skips seven:

# %% tags=["active-ipynb"]
# uninterrupted = sampler.epoch_batches(5)
# resumed = TokenBatchSampler(lengths, max_tokens=512, seed=1).epoch_batches(5)[7:]
# assert uninterrupted[7:] == resumed
# print("the rest of epoch 5 is the same as without a stop")

# %% [markdown]
# The tests start other Python processes with two values of `PYTHONHASHSEED` and compare the lists. One limit remains: `torch.randperm` may change between versions of PyTorch. A resumed run should keep its version.
#
# A `DataLoader` turns the numbers into batches. `collate` of Chapter 9 pads them:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from torch.utils.data import DataLoader
#
# from transformer_annotated.paper.toy import Vocabulary, collate
#
# tokenised = [tuple(side.split() for side in pair) for pair in toy_text]
# vocabulary = Vocabulary.build(sentence for pair in tokenised for sentence in pair)
# data = [tuple(vocabulary.encode(side) for side in pair) for pair in tokenised]
# loader = DataLoader(data, batch_sampler=sampler, collate_fn=collate)
# sampler.set_epoch(1)
# for _, batch in zip(range(4), loader, strict=False):
#     print(
#         f"{len(batch.src):3d} pairs   source {tuple(batch.src.shape)}   target {tuple(batch.tgt_out.shape)}"
#     )
#     assert max(batch.src.numel(), batch.tgt_out.numel()) <= 512

# %% [markdown]
# No line has more than 512 positions on either side. Without `collate_fn` the loader tries to stack sentences of different length, and refuses.
#
# ## How large a pool?
#
# A larger pool leaves less filler. But the larger it is, the more often the same sentences meet again, since less is left to chance. We count both: the waste, and the share of pairs of sentences in one batch that shared a batch in the epoch before.

# %% tags=["hide-input"]
def meet_again(first: list[list[int]], second: list[list[int]]) -> float:
    """The share of two sentence pairs in a batch of `first` that share a batch of `second` as well."""
    home = {i: number for number, batch in enumerate(second) for i in batch}
    met = total = 0
    for batch in first:
        counts = torch.tensor([home[i] for i in batch]).bincount()
        met += int((counts * (counts - 1)).sum())
        total += len(batch) * (len(batch) - 1)
    return met / total


def epochs_by_pool(lengths: Tensor, max_tokens: int, batches: int) -> list[list[list[int]]]:
    """Two epochs with pools of that many batches: what the sampler does, step by step."""
    epochs = []
    sizes = lengths + 1
    pool = pool_size(sizes.amax(dim=1), max_tokens, batches)
    for seed in (0, 1):
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed))
        order = order[by_length(sizes[order], pool)]
        bounds = cut(sizes[order].amax(dim=1).tolist(), max_tokens, pool)
        epochs.append([order[start:end].tolist() for start, end in bounds])
    return epochs

# %% mystnb={"figure": {"caption": "Larger pools waste less, and the same sentences meet again more often.", "name": "fig-pools"}, "image": {"alt": "Two lines over the size of a pool in batches, on a logarithmic axis. The waste falls steeply and then levels off; the share of sentences that meet again rises."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# name, lengths = list(corpora.items())[-1]
# pools = (1, 3, 10, 30, 100, 300)
# epochs = {pool: epochs_by_pool(lengths, 1024, pool) for pool in pools}
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# ax.plot(pools, [waste(lengths, epochs[p][0]) for p in pools], "o-", label="waste")
# ax.plot(pools, [meet_again(*epochs[p]) for p in pools], "s--", label="meet again")
# ax.set(xscale="log", xlabel="batches in a pool", ylabel="share", ylim=(0, None), title=name)
# ax.set_xticks(pools, map(str, pools))
# ax.legend();

# %% [markdown]
# Most of the gain in {numref}`fig-pools` comes early. From 100 to 300 batches the waste falls by about one point, while the share that meets again rises by five. We chose a hundred. Even with one batch in a pool the waste is below that of the naive way further down: the pool is sorted, and the budget cuts it where it is full.
#
# ## Nothing left over: packing
#
# Some filler remains: the tail of each pool, and lengths that are similar but not equal. **Packing** goes further. It makes rows of a fixed width and lays several sentences into each, end to end. Which goes where? Take the longest first, and put each into the first row with room for it. The rule is called *first fit decreasing*, and it never needs more than about 11/9 of the fewest rows possible {cite:p}`johnson1973near`.

# %%
def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Sentences in rows of `capacity` positions: longest first, each into the first row it fits.

    Returns the sentence numbers of each row. This rule, first fit decreasing, needs at most about
    11/9 of the fewest rows possible. Raises ValueError for a length outside [1, capacity].
    """
    check_sizes(capacity=capacity)
    for i, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"lengths[{i}] must be in [1, {capacity}], got {length}")
    rows: list[list[int]] = []
    space: list[int] = []  # free positions of each row
    row = 0
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for before, i in zip([None, *order], order, strict=False):
        if before is not None and lengths[i] < lengths[before]:
            row = 0  # a shorter sentence may fit where the longer ones did not
        while row < len(rows) and space[row] < lengths[i]:
            row += 1
        if row == len(rows):
            rows.append([])
            space.append(capacity)
        rows[row].append(i)
        space[row] -= lengths[i]
    return rows

# %% [markdown]
# A sentence of the same length as the one before need not try the rows that were too full for it. So `row` only moves forward, and starts again when the length changes.

# %% tags=["active-ipynb"]
# lengths_of_ten = [5, 3, 8, 2, 4, 7, 3, 6, 1, 1]
# for row in pack(lengths_of_ten, capacity=10):
#     print([lengths_of_ten[i] for i in row], "=", sum(lengths_of_ten[i] for i in row))

# %% [markdown]
# Four full rows, no filler. But now sentences that do not belong together stand side by side. Two things are needed. A position may look at its own sentence only: that is a mask. And each sentence counts its positions from 0.

# %%
@dataclass(frozen=True)
class Packed:
    """Several sentences in each row. `sentence` numbers them within all rows; -1 is filler."""

    ids: Tensor  # (R, C)
    sentence: Tensor  # (R, C)
    positions: Tensor  # (R, C), starting again at 0 in each sentence

    @property
    def mask(self) -> Mask:
        """A position sees its own sentence, and only that."""
        same = self.sentence[:, :, None] == self.sentence[:, None, :]  # (R, C, C)
        return Mask(allowed=same, padding=self.sentence >= 0)

# %%
def packed(sentences: Sequence[Sequence[int]], capacity: int) -> Packed:
    """Sentences of ids, packed into rows of `capacity` positions."""
    rows = pack([len(ids) for ids in sentences], capacity)
    ids = torch.full((len(rows), capacity), PAD)
    sentence, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    for r, row in enumerate(rows):
        start = 0
        for i in row:
            end = start + len(sentences[i])
            ids[r, start:end] = torch.tensor(sentences[i])
            sentence[r, start:end] = i
            positions[r, start:end] = torch.arange(end - start)
            start = end
    return Packed(ids, sentence, positions)

# %% mystnb={"figure": {"caption": "The mask of one packed row: three sentences, and each position sees its own.", "name": "fig-packed-mask"}, "image": {"alt": "A square grid with three dark blocks along the diagonal, of sizes five, three and two, and nothing outside them."}} tags=["active-ipynb"]
# rows = packed([[11, 12, 13, 14, 15], [21, 22, 23], [31, 32]], capacity=10)
# print("ids      ", rows.ids[0].tolist())
# print("positions", rows.positions[0].tolist())
# visible = rows.mask.dense(1, 10, 10)[0, 0]
# labels = [str(i) for i in rows.ids[0].tolist()]
# fig, ax = plt.subplots(figsize=(3.6, 3.0))
# figures.heatmap(ax, visible, rows=labels, cols=labels, row_label="query", col_label="key");

# %% [markdown]
# {numref}`fig-packed-mask` is three small attentions in one. Everything else in the encoder works on each position alone, so it cannot mix sentences.
#
# ## Proof
#
# If that is right, a packed sentence gets the same vectors as it gets alone, and the embedding table gets the same gradient. Seven sentences, an encoder in double precision with every weight redrawn:

# %% tags=["active-ipynb"]
# from torch import nn
#
# from transformer_annotated import PAPER_BASE, Transformer, patch
#
# torch.manual_seed(0)
# small = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "dropout": 0.0, "ffn.d_ff": 64}
# heads = {"self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# model = Transformer(patch(PAPER_BASE, small, heads)).double().eval()
# for parameter in model.parameters():
#     nn.init.normal_(parameter, std=0.3)
# texts = [torch.randint(4, 50, (n,)).tolist() for n in (3, 7, 1, 5, 4, 2, 6)]
# rows = packed(texts, capacity=10)
# together = model.encode(rows.ids, mask=rows.mask, positions=rows.positions)  # (R, C, D)
# apart = torch.cat([model.encode(torch.tensor([ids]))[0] for ids in texts])  # (28, D)
# ours = torch.cat([together[rows.sentence == i] for i in range(len(texts))])
# torch.testing.assert_close(ours, apart, rtol=0, atol=1e-10)
# direction = torch.randn_like(apart)
# table = model.embedding.weight
# (packed_gradient,) = torch.autograd.grad(ours, table, direction)
# (apart_gradient,) = torch.autograd.grad(apart, table, direction)
# torch.testing.assert_close(packed_gradient, apart_gradient, rtol=0, atol=1e-10)
# print(f"{len(texts)} sentences in {len(rows.ids)} rows: same vectors, same gradient, to 1e-10")

# %% [markdown]
# Packing removes filler and changes no result. Leave out the positions or the mask, and the proof fails at once; both are among the [mutants](../mutants.md).
#
# ## Four ways, measured
#
# *Naive*: sentences in random order, always the same number of them. *Sorted*: the whole corpus by length. *Bucketed*: our sampler. *Packed*: rows of 64 positions. The packed line counts each side for itself.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def four_ways(lengths: Tensor, max_tokens: int = 1024) -> dict[str, float]:
#     """The waste of each way to make batches."""
#     n = int(max_tokens / (lengths.double().mean() + 1))
#     order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(0))
#     width = max(64, int(lengths.max()) + 1)
#     sides = (lengths + 1).T.tolist()
#     places = sum(width * len(pack(side, width)) for side in sides)
#     return {
#         "naive": waste(lengths, [part.tolist() for part in order.split(n)]),
#         "sorted": waste(lengths, TokenBatchSampler(lengths, max_tokens, shuffle=False)),
#         "bucketed": waste(lengths, TokenBatchSampler(lengths, max_tokens)),
#         "packed": 1 - sum(map(sum, sides)) / places,
#     }
#
#
# table = {name: four_ways(lengths) for name, lengths in corpora.items()}
# print(" " * 9 + "".join(f"{way:>10s}" for way in table["toy"]))
# for name, row in table.items():
#     print(f"{name:9s}" + "".join(f"{share:10.1%}" for share in row.values()))
#     assert row["naive"] > 2 * row["bucketed"] > 0
# if full:
#     assert all(row["bucketed"] > row["sorted"] for row in table.values())

# %% mystnb={"figure": {"caption": "Order removes most of the filler; what pools and packing do is small beside it.", "name": "fig-four-ways"}, "image": {"alt": "Bars of the waste for naive, sorted, bucketed and packed batches. The naive bars are several times as high as the others."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for k, (name, row) in enumerate(table.items()):
#     bars = ax.bar([x + 0.38 * k for x in range(4)], row.values(), width=0.36, label=name)
#     ax.bar_label(bars, fmt=lambda share: f"{share:.1%}", fontsize=8)
# ax.set_xticks([x + 0.19 * (len(table) - 1) for x in range(4)], list(row))
# ax.set(ylabel="share of filler")
# ax.grid(axis="x", visible=False)
# ax.legend();

# %% [markdown]
# From left to right in {numref}`fig-four-ways`: the naive way computes a large part for nothing. Sorting removes most of that. Pools and chance bring a part of the filler back. For Multi30k packing leaves the least filler. For the small language it leaves slightly more than the buckets do.
#
# Why not pack always? A packed row needs a mask, and attention in a row of $C$ positions compares $C^2$ pairs, most of them hidden, where a sentence alone compares $n^2$. And in translation both sides of a pair must find each other: cross-attention would need a mask of its own, between a packed source and a packed target.
# For models that read one sequence, packing is common {cite:p}`krell2021efficient`. For sentence pairs we stay with buckets. The last question is what they are worth in time:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# encoder = Transformer(patch(PAPER_BASE, {**small, "d_model": 128, "ffn.d_ff": 512}, heads)).eval()
# n = 2000 if full else 60
# texts = [torch.randint(4, 50, (length,)).tolist() for length in lengths[:n, 0].tolist()]
# by_size = sorted(range(n), key=lambda i: -len(texts[i]))
#
#
# @torch.no_grad()
# def padded_seconds(order: Sequence[int]) -> float:
#     """Time to encode the sentences in batches of 64."""
#     start = time.process_time()
#     for k in range(0, n, 64):
#         batch = collate([(texts[i], []) for i in order[k : k + 64]])
#         encoder.encode(batch.src, batch.src_padding)
#     return time.process_time() - start
#
#
# @torch.no_grad()
# def packed_seconds() -> float:
#     """Time to encode them in packed rows, sixteen rows at a time; each ends with a sign."""
#     start = time.process_time()
#     rows = packed([[*ids, 2] for ids in texts], capacity=max(64, len(texts[by_size[0]]) + 1))
#     for k in range(0, len(rows.ids), 16):
#         part = Packed(*(t[k : k + 16] for t in (rows.ids, rows.sentence, rows.positions)))
#         encoder.encode(part.ids, mask=part.mask, positions=part.positions)
#     return time.process_time() - start

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# runs = [(padded_seconds(range(n)), padded_seconds(by_size), packed_seconds()) for _ in range(5)]
# for name, times in zip(
#     ("as they come", "by length", "packed"), zip(*runs, strict=True), strict=True
# ):
#     print(f"{name:13s}{median(times):6.2f} s")

# %% [markdown]
# Sorting is worth a lot. Packing is worth nothing more here: probably because what it saves in filler it spends on hidden pairs. The model is small, and its encoder alone was timed.
#
# ## What the paper did
#
# "Each training batch contained a set of sentence pairs containing approximately 25000 source tokens and 25000 target tokens" (section 5.1), and pairs were "batched together by approximate sequence length" {cite:p}`vaswani2017attention`. That is a sampler with `max_tokens` of about 25,000, spread over eight GPUs.
# The paper does not say whether filler counts. Ours counts it, since memory does.
#
# Its English-German corpus has about 4.5 million pairs. How long does one epoch's order take for so many? The lengths are drawn at random here.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# generator = torch.Generator().manual_seed(0)
# n_pairs = 4_500_000 if full else 20_000
# german = (0.5 * torch.randn(n_pairs, generator=generator) + 3.1).exp().clamp(1, 250)
# english = (german * (1 + 0.15 * torch.randn(n_pairs, generator=generator))).clamp(1, 250)
# many = TokenBatchSampler(torch.stack((german, english), dim=1).long(), 25_000)
# start = time.process_time()
# epoch = many.epoch_batches(0)
# print(f"{n_pairs:,} pairs, {len(epoch):,} batches, {time.process_time() - start:.1f} s")

# %% [markdown]
# ## How it breaks
#
# - *One pair longer than the budget.* It fits into no batch. Dropped in silence, it would be missing for ever; the sampler refuses and names it.
# - *The same batches in every epoch.* The loss goes down as usual, and a little less on other data. Compare the batches of two epochs as sets.
# - *Sorted batches, not shuffled.* The loss curve shows teeth: long sentences first, short ones last, in each epoch.
# - *The order hangs on a set or on `hash`.* Two runs with the same seed differ, and a resumed one repeats some pairs and never sees others.
# - *Packed rows without the mask or the positions.* Nothing fails. The loss is a little worse.

# %% tags=["active-ipynb"]
# wrong = {
#     "too long": (torch.tensor([[5, 6], [3, 80]]), 64),
#     "empty": (torch.zeros(0, 2, dtype=torch.long), 64),
#     "one column": (torch.tensor([5, 6]), 64),
# }
# for lengths_given, budget in wrong.values():
#     try:
#         TokenBatchSampler(lengths_given, budget)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## Takeaways
#
# - A batch is a budget of positions. Sentences of similar length share it.
# - Shuffle, sort within pools, cut, shuffle again. The batches of an epoch follow from the seed and the epoch's number. With the same seed, the epoch and the number of batches done say where a run stands.
# - Packing needs a mask and positions, and changes no result.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 14.1.** Four sentences fill 4, 12, 5 and 4 positions. What is the waste of one batch of all four, and what is the least waste in two batches of two? Answer with a list of two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("14.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [1 - 25 / (4 * 12), 1 - 25 / (2 * 12 + 2 * 4)]
# check("14.1", answer)

# %% [markdown]
# **Exercise 14.2.** The longest pair of a batch has 39 source and 49 target tokens, before the special signs. How many pairs can the batch hold at most with the paper's 25,000?

# %% tags=["active-ipynb"]
# answer = ...
# check("14.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 25_000 // (49 + 1)
# check("14.2", answer)

# %% [markdown]
# **Exercise 14.3.** A log says only how many batches a run has done since its start, over all epochs. Write a function of a sampler and that number which returns the epoch and the place in it where the run goes on. Epochs may differ in their number of batches. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("14.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def place(sampler: TokenBatchSampler, done: int) -> tuple[int, int]:
#     """Epoch and place after `done` batches."""
#     epoch = 0
#     while done >= (n := len(sampler.epoch_batches(epoch))):
#         epoch, done = epoch + 1, done - n
#     return epoch, done
#
#
# answer = place
# check("14.3", answer)
