# %% [markdown]
r"""
# Decoding

A trained model writes one token at a time. Keys and values that were computed once are kept, and the next token is the
most probable one, or drawn by chance. At the end, sentences go in and sentences come out.
"""

# %% [markdown]
# Chapter 10 translated with a loop of a few lines and called it wasteful. This chapter measures the waste, removes it, and looks at other ways to choose a token.

# %% mystnb={"figure": {"caption": "Chapter 20 of Part II: from logits to sentences.", "name": "fig-map-decoding"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The ninth, Decoding, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(20);

# %%
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from transformer_annotated.paper.attention import Attend, Mask
from transformer_annotated.paper.embedding import Head
from transformer_annotated.paper.feed_forward import FeedForward
from transformer_annotated.paper.multi_head import KeysValues, MultiHeadAttention
from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK, collate
from transformer_annotated.paper.transformer import Transformer, default_positions
from transformer_annotated.training.tokens import Tokenizer

# %% [markdown]
# ## How much is computed twice
#
# Take a small model with random weights and let `greedy` of Chapter 10 write 20 tokens. A hook counts how many target positions the first decoder layer projects to keys, and how many positions of the memory.

# %% tags=["active-ipynb"]
# from collections import Counter
#
# from transformer_annotated import PAPER_BASE, Transformer, greedy, patch, spec
#
# SMALL = {
#     "vocab_size": 100,
#     "d_model": 32,
#     "n_layers": 2,
#     "dropout": 0.0,
#     "self_attention.n_heads": 4,
#     "cross_attention.n_heads": 4,
#     "ffn.d_ff": 64,
# }
# torch.manual_seed(0)
# model = Transformer(patch(PAPER_BASE, SMALL, {"head": spec(Head, bias=True)})).eval()
# with torch.no_grad():
#     model.head.bias[EOS] = -1e4  # it never ends by itself
# src = torch.randint(4, 100, (1, 10))
# projected = Counter()
# layer = model.decoder.layers[0]
# for name, attention in (("target", layer.self_attention), ("memory", layer.cross_attention)):
#     attention.k_proj.register_forward_hook(
#         lambda module, args, output, name=name: projected.update({name: args[0].shape[1]})
#     )
# slow = greedy(model, src, extra=10)
# print(f"{slow.shape[1]} tokens written; positions projected: {dict(projected)}")

# %% [markdown]
# For 20 tokens, 210 target positions: $1 + 2 + \ldots + 20$. The ten positions of the memory were projected twenty times over, and they never changed.

# %% tags=["hide-input"]
def draw_work(T: int = 8) -> Any:
    """Draw which positions the decoder computes at each step, without and with a cache."""
    import matplotlib.pyplot as plt
    import numpy as np

    from transformer_annotated.figures import COLORS

    axes = plt.subplots(1, 2, figsize=(7.2, 2.6), sharey=True)[1]
    for ax, title in zip(axes, ("read all again", "keep keys and values"), strict=True):
        for t, s in np.ndindex(T, T):
            new = s == t if "keep" in title else s <= t
            color = COLORS[0] if new else "#CFE3F1" if s <= t else "white"
            ax.add_patch(plt.Rectangle((s, t), 0.9, 0.9, facecolor=color))
        ax.set(xlim=(-0.2, T), ylim=(T, -0.2), title=title, xlabel="target position")
        ax.set_xticks(np.arange(T) + 0.45, range(T))
        ax.set_yticks(np.arange(T) + 0.45, range(1, T + 1))
        ax.grid(False)
    axes[0].set_ylabel("step")
    return axes

# %% mystnb={"figure": {"caption": "Without a cache each step computes every position so far. With one it computes the last position and reads the others.", "name": "fig-work"}, "image": {"alt": "Two grids of eight steps by eight positions. Left, the lower triangle is dark. Right, only the diagonal is dark and the triangle below it is pale."}} tags=["active-ipynb"]
# draw_work();

# %% [markdown]
# Dark squares in {numref}`fig-work` are computed, pale ones are read. May the vectors of earlier positions be kept? The causal mask says yes. Position $s$ sees nothing after itself, so its vectors in every layer are the same whatever is written later. Later positions read only two of them: its key and its value. With $x_t$ the vector of the new token in some layer, and matrices as in {eq}`eq-multi-head`,
#
# $$
# o_t = \mathrm{softmax}\!\left(\frac{q_t\,[k_1, \ldots, k_t]^\top}{\sqrt{d}}\right) [v_1, \ldots, v_t], \qquad q_t, k_t, v_t = x_t W^Q,\; x_t W^K,\; x_t W^V .
# $$ (eq-cache)
#
# Of all that stands in this line only $q_t$, $k_t$ and $v_t$ are new. The rest lies in a **cache**.
#
# ## The cache
#
# Part I prepared for it. `MultiHeadAttention` asks a cache for keys and values by `update(project, source, positions)`, where `project(source)` would compute them. In self-attention the source is the new token: project it, add it to the store, return the whole store.
#
# The store must grow. Joining two tensors at each step would copy everything each time. So a store has room for more than it holds, and moves to one twice as large when it is full. Time is its first axis: the part in use is then one piece of memory.

# %%
class SelfAttentionCache:
    """Keys and values of the target so far, for one layer: a `KeyValueCache`.

    They lie in a store `(capacity, 2, N, K, d)`. Time comes first, so that what is in use is the
    store's beginning. A full store moves into one of twice the capacity; nothing is overwritten.
    Keys are kept as they were projected, before a position turns them. No gradient flows.
    """

    def __init__(self) -> None:
        self.length = 0
        self._store: Tensor | None = None
        self._positions: Tensor | None = None  # (N, S) or (1, S)

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add what `source` `(N, T, D)` brings; return all keys and values, `(N, K, S, d)` each.

        Raises ValueError for another number of rows N than before.
        """
        k, v = (x.detach().permute(2, 0, 1, 3) for x in project(source))  # (T, N, K, d)
        start, end = self.length, self.length + len(k)
        store = self._store
        if store is not None and store.shape[2] != k.shape[1]:
            raise ValueError(
                f"source must have the cache's {store.shape[2]} rows, got {len(source)}"
            )
        if store is None or end > len(store):
            room = k.new_empty(max(16, 2 * start, end), 2, *k.shape[1:])
            if store is not None:
                room[:start] = store[:start]
            self._store = store = room
        store[start:end, 0], store[start:end, 1] = k, v
        self.length = end
        if positions is not None:
            old = self._positions
            self._positions = positions if old is None else torch.cat((old, positions), dim=1)
        keys, values = store[:end].permute(1, 2, 3, 0, 4)  # (N, K, S, d) each
        return keys, values, self._positions

    def reorder(self, index: Tensor, start: int = 0) -> None:
        """Row i becomes what row `index[i]` was; rows that are not named are dropped.

        The caller knows that this changes nothing before position `start`.
        """
        if self._store is None:
            return
        if len(index) == self._store.shape[2]:
            moving = self._store[start : self.length]
            moving.copy_(moving.index_select(2, index))
        else:
            self._store = self._store.index_select(2, index)
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[index]

# %% [markdown]
# Keys go in as they were projected. A later part turns keys by their position (RoPE); it will find them unturned, with the positions beside them. `reorder` is used in the section on greedy search, where rows are dropped, and in the next chapter, where they are also copied: rows of the batch are dropped or copied.
#
# Cross-attention is simpler. The memory does not change, so its keys and values are computed at the first call.

# %%
class CrossAttentionCache:
    """Keys and values of the memory, for one layer: projected once, at the first call."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, Tensor, Tensor | None] | None = None

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values `(B, K, S, d)` of the memory `source` `(B, S, D)`.

        Raises ValueError where `source` has another shape than at the first call.
        """
        if self._kept is None:
            k, v = project(source)
            self._kept = k.detach().contiguous(), v.detach().contiguous(), positions
        k = self._kept[0]
        if (len(k), k.shape[2]) != source.shape[:2]:
            raise ValueError(f"source must be {(len(k), k.shape[2])} like the memory that the cache "
                             f"holds, got {tuple(source.shape[:2])}")  # fmt: skip
        return self._kept

    def reorder(self, index: Tensor) -> None:
        """Sentence i becomes what sentence `index[i]` was."""
        if self._kept is not None:
            k, v, positions = self._kept
            if positions is not None and len(positions) > 1:
                positions = positions[index]
            self._kept = k[index], v[index], positions

# %% [markdown]
# A layer has one of each, and a model one pair for each layer.

# %%
class OneLayer:
    """The two caches of one layer: a `LayerCache`."""

    def __init__(self) -> None:
        self.self_attention = SelfAttentionCache()
        self.cross_attention = CrossAttentionCache()


class Cache(Sequence[Any]):
    """What `Transformer.decode(cache=)` takes: the caches of every decoder layer.

    Args:
        model: has a decoder; the cache is empty, and holds nothing of the model.

    Raises:
        ValueError: a model without a decoder.
    """

    def __init__(self, model: Transformer) -> None:
        if model.config.decoder is None:
            raise ValueError("model must have a decoder, and this one has none")
        self._layers = [OneLayer() for _ in range(model.config.decoder.n_layers)]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, index: Any) -> Any:
        return self._layers[index]

    @property
    def length(self) -> int:
        """How many target tokens have been read."""
        return self._layers[0].self_attention.length

    def reorder(self, rows: Tensor, sentences: Tensor | None = None, start: int = 0) -> None:
        """Keep target rows `rows` `(N,)`, in that order, and so with the source's `sentences`.

        The caller knows that nothing changes before target position `start`.
        """
        for layer in self._layers:
            layer.self_attention.reorder(rows, start)
            if sentences is not None:
                layer.cross_attention.reorder(sentences)

# %% tags=["active-ipynb"]
# with torch.no_grad():
#     memory, cache = model.encode(src), Cache(model)
#     for t, token in enumerate([BOS, 17, 60]):
#         ids, at = torch.tensor([[token]]), torch.tensor([[t]])
#         hidden = model.decode(ids, memory, positions=at, cache=cache)
#     keys, values, _ = cache[0].self_attention.update(
#         layer.self_attention.keys_values, torch.randn(1, 1, 32), None
#     )
# print("one new vector:", tuple(hidden.shape), "  keys after a fourth token:", tuple(keys.shape))

# %% [markdown]
# The decoder got one token and returned one vector. The keys of all four are `(B, K, S, d)`, as attention expects.
#
# ## Proof
#
# Feed 16 tokens in any pieces, and the vectors must be those of one pass. A wrong position, a key that is overwritten or a mask that is one off would show.

# %% tags=["active-ipynb"]
# tgt = torch.randint(4, 100, (3, 16))
# src3 = torch.randint(4, 100, (3, 10))
# real = torch.arange(10) < torch.tensor([[10], [6], [3]])
# with torch.no_grad():
#     memory = model.encode(src3, real)
#     whole = model.decode(tgt, memory, real)
#     for pieces in ((7, 1, 1, 1, 5, 1), (1,) * 16, (3, 13)):
#         cache, got = Cache(model), []
#         for new in tgt.split(pieces, dim=1):
#             at = torch.arange(cache.length, cache.length + new.shape[1])[None]
#             got.append(model.decode(new, memory, real, positions=at, cache=cache))
#         torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=0, atol=2e-5)
#         print("in pieces of", ", ".join(map(str, pieces)), "the same, to 2e-5")

# %% [markdown]
# The tests do this for every kind of decoder that the book has, with filler on either side.
#
# ## Greedy search
#
# Now the loop. A **session** holds what belongs to sentences that are being translated: the memory, the cache, and how long each may become. Section 6.1 allows 50 tokens more than the source has. `evaluating` switches dropout off and puts every module back as it was. And one small thing: a single new query is the last of all, so the causal mask hides nothing from it. `attending` exchanges `attend`, the seam of Chapter 3, for one that does not make the mask.

# %%
@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Inside the block no unit is dropped; afterwards each module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def attending(
    model: Transformer, name: Literal["self", "cross"], change: Callable[[Attend], Attend]
) -> Iterator[None]:
    """Inside the block, the decoder's self- or cross-attentions use `change(attend)`."""
    layers = () if model.decoder is None else model.decoder.layers
    parts = [getattr(layer, f"{name}_attention") for layer in layers]
    modules = [part for part in parts if isinstance(part, MultiHeadAttention)]
    originals = [module.attend for module in modules]
    try:
        for module in modules:
            module.attend = change(module.attend)
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            module.attend = original


def without_causal(attend: Attend) -> Attend:
    """`attend` for one query: it is the last, so the causal rule hides nothing and is left out."""

    def attend_once(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **rest: Any
    ) -> Tensor:
        if mask is not None and q.shape[2] == 1:
            mask = Mask(padding=mask.padding, window=mask.window, allowed=mask.allowed)
        return attend(q, k, v, mask, **rest)

    return attend_once


class Session:
    """Sentences that are being translated: memory, cache, and how far each may go.

    Args:
        model: an encoder and a decoder, in evaluation mode.
        src: ids `(B, S)`.
        src_padding: `(B, S)` bool, True for a real token; None if all are.
        extra: how many tokens a translation may have more than its source.

    Raises:
        ValueError: a model with one stack, no room for the four signs, `extra` below 1, and
            whatever the encoder objects to.
    """

    def __init__(
        self, model: Transformer, src: Tensor, src_padding: Tensor | None = None, extra: int = 50
    ) -> None:
        if model.encoder is None or model.decoder is None:
            raise ValueError("model must have an encoder and a decoder to translate")
        if model.config.vocab_size <= UNK + 1:
            raise ValueError(f"vocab_size must be above {UNK + 1}, got {model.config.vocab_size}")
        if extra < 1:
            raise ValueError(f"extra must be at least 1, got {extra}")
        self.model, self.cache, self.step = model, Cache(model), 0
        self.memory = model.encode(src, src_padding)
        self.positions = default_positions(src, src_padding)
        real = torch.ones_like(src, dtype=torch.bool) if src_padding is None else src_padding
        self.padding = None if bool(real.all()) else src_padding
        self.limits = real.sum(dim=-1) + extra  # (B,)
        self._never = torch.tensor([PAD, BOS, UNK], device=src.device)

    def logits(self, ids: Tensor) -> Tensor:
        """Read one more token in each row, `(N,)`; score what may come next, `(N, V)`."""
        hidden = self.model.decode(
            ids[:, None], self.memory, self.padding, positions=ids.new_full((1, 1), self.step),
            memory_positions=self.positions, cache=self.cache,
        )  # fmt: skip
        logits = self.model.logits(hidden[:, -1])
        self.step += 1
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def forbid(self, scores: Tensor) -> Tensor:
        """`scores` `(N, V)`, changed in place: PAD, BOS and UNK can not be chosen."""
        return scores.index_fill_(1, self._never, -torch.inf)

    def check(self, highest: Tensor) -> None:
        """Raise ValueError, with the step's number, if the highest score of a row is nan or inf."""
        if not bool(highest.isfinite().all()):
            raise ValueError(f"the logits at step {self.step} are not finite")

    def keep(self, sentences: Tensor, rows: Tensor | None = None) -> None:
        """Go on with `sentences` only; `rows` are their rows of the target, if not the same."""
        self.memory, self.limits = self.memory[sentences], self.limits[sentences]
        self.padding = None if self.padding is None else self.padding[sentences]
        if len(self.positions) > 1:
            self.positions = self.positions[sentences]
        self.cache.reorder(sentences if rows is None else rows, sentences)

# %% [markdown]
# `logits` is one step: one token in, scores of the next one out. `forbid` is for three signs that no translation contains. `check` stops a search whose scores are not finite, and its message names the step.
#
# The loop itself does not say how a token is chosen. That is the argument `choose`.

# %%
def search(
    model: Transformer,
    src: Tensor,
    src_padding: Tensor | None,
    extra: int,
    choose: Callable[[Tensor], Tensor],
) -> Tensor:
    """Translate token by token; `choose` picks the next ones, `(N, V)` logits to `(N,)` ids."""
    with evaluating(model), torch.inference_mode(), attending(model, "self", without_causal):
        session = Session(model, src, src_padding, extra)
        output = src.new_full((len(src), int(session.limits.max())), PAD)
        rows = torch.arange(len(src), device=src.device)  # the sentences that are not finished
        ids = torch.full_like(rows, BOS)
        while len(rows):
            logits = session.forbid(session.logits(ids))
            session.check(logits.amax(dim=-1))
            ids = choose(logits)
            output[rows, session.step - 1] = ids
            running = (ids != EOS) & (session.step < session.limits)
            if not bool(running.all()):
                ids, rows = ids[running], rows[running]
                session.keep(running.nonzero()[:, 0])
    return output[:, : session.step].clone()


def greedy_search(
    model: Transformer, src: Tensor, src_padding: Tensor | None = None, *, extra: int = 50
) -> Tensor:
    """The most probable next token, again and again, up to EOS: ids `(B, T)`.

    A sentence ends with EOS, or unfinished after `extra` tokens more than its source has
    (section 6.1 allows 50); PAD follows. PAD otherwise, BOS and UNK are never produced. The model
    is in evaluation mode meanwhile. `first_translation.greedy` gives the same ids, more slowly.

    Raises ValueError for a model with one stack, for `extra` < 1, and for scores of nan or inf.
    """
    return search(model, src, src_padding, extra, lambda logits: logits.argmax(dim=-1))


def is_finished(ids: Tensor) -> Tensor:
    """Which rows of ids `(B, T)` have come to EOS, `(B,)`; the others ran into the limit."""
    return (ids == EOS).any(dim=-1)

# %% [markdown]
# A sentence that has ended leaves the batch. Its row is dropped from the cache, and the others go on with less work. Chapter 10 fed it filler to the end.
#
# Same model, same sentences, same ids:

# %% tags=["active-ipynb"]
# assert torch.equal(greedy(model, src3, real, extra=5), greedy_search(model, src3, real, extra=5))
# projected.clear()
# fast = greedy_search(model, src, extra=10)
# assert torch.equal(slow, fast)
# print(f"{fast.shape[1]} tokens written; positions projected: {dict(projected)}")
# print("came to an end:", is_finished(fast).tolist())

# %% [markdown]
# Twenty positions in place of 210, and the memory once. This model was kept from ending, and the last line says that its translation is unfinished.
#
# What is that worth in time? It depends on the length. The next figure uses a model of width 256 with 3 layers and the fused parts of Chapter 17.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
# from statistics import median
#
# from transformer_annotated import FAST
# from transformer_annotated.book import machine, scale
#
# full = scale() == "full"
# MIDDLE = {
#     **SMALL,
#     "vocab_size": 8000,
#     "d_model": 256,
#     "n_layers": 3,
#     "ffn.d_ff": 1024,
#     "head": spec(Head, bias=True),
# }
# torch.set_num_threads(1)
# middle = Transformer(patch(PAPER_BASE, MIDDLE, FAST)).eval()
# with torch.no_grad():
#     middle.head.bias[EOS] = -1e4
#
#
# def seconds(f: Callable[[], Any], rounds: int = 3) -> float:
#     """The median processor time of some calls."""
#     times = []
#     for _ in range(rounds):
#         start = time.process_time()
#         f()
#         times.append(time.process_time() - start)
#     return median(times)
#
#
# print(machine())

# %% mystnb={"figure": {"caption": "Seconds to write one sentence. Without a cache the time for a token grows with what has been written; with one it hardly does.", "name": "fig-time"}, "image": {"alt": "A line chart of seconds against number of tokens, for search without and with a cache. The first curve bends upwards, the second is close to a straight line and far below."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# lengths = [10, 20, 40, 80, 120] if full else [8, 12]
# one = torch.randint(4, 8000, (1, 5))
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for name, find in (("read all again", greedy), ("cache", greedy_search)):
#     times = [seconds(lambda find=find, n=n: find(middle, one, extra=n - 5)) for n in lengths]
#     ax.plot(lengths, times, "o-", label=name)
# ax.set(xlabel="tokens written", ylabel="seconds", ylim=(0, None))
# ax.legend();

# %% [markdown]
# Follow the upper curve of {numref}`fig-time`: from 40 tokens on, twice the tokens cost more than twice the time. The lower one is close to a straight line. For short sentences the two are close: a step has a cost of its own, however few positions it computes, since every weight is read and every operation is called.
#
# ## Weights in a better order
#
# In each step a few rows meet every weight of the decoder. The order in which PyTorch stores a weight matrix is not the best one for products of a few rows. Its compiler therefore copies weights once into an order that suits the processor. It uses two
# operations that have no public name; `packed` calls them directly, and does nothing where they do not exist. One of them can also apply the ReLU before it stores its result, and `packed` asks for that.

# %%
@contextmanager
def packed(model: Transformer) -> Iterator[None]:
    """Inside the block, weights lie in memory as the processor's matrix product wants them.

    The function is the same, computed faster on a CPU in 32 bits; elsewhere nothing changes.
    Weights that are changed inside the block are not noticed, and no gradient flows. PyTorch's own
    compiler uses these two operations; they have no public name.
    """
    operations = torch.ops.mkldnn
    table: Any = model.embedding.weight
    possible = table.device.type == "cpu" and table.dtype == torch.float32
    possible = possible and hasattr(operations, "_linear_pointwise")
    changed: list[nn.Module] = []

    def replace(module: nn.Module, weight: Any, bias: Any, then: str = "none") -> None:
        weight = operations._reorder_linear_weight(weight)

        def forward(x: Tensor, table: Tensor | None = None) -> Any:
            return operations._linear_pointwise(x, weight, bias, then, [], "")

        vars(module)["forward"] = forward
        changed.append(module)

    def change(module: nn.Module) -> None:
        first: nn.Module = module.up if type(module) is FeedForward else module
        if "forward" in vars(first):
            return  # a block within this block, or done with its neighbour
        if type(module) is FeedForward and type(module.activation) is nn.ReLU:
            replace(module.up, module.up.weight, module.up.bias, "relu")  # both at once
            vars(module.activation)["forward"] = lambda x: x
            changed.append(module.activation)
        elif type(module) is nn.Linear:
            replace(module, module.weight, module.bias)
        elif type(module) is Head and module.softcap is None:
            weight = table if module.weight is None else module.weight.detach()
            bias = None if module.bias is None else module.bias * module.scale
            replace(module, weight * module.scale, bias)

    try:
        with torch.inference_mode():
            for module in model.modules() if possible else ():
                change(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for rows in (1, 4, 32) if full else (1, 2):
#     some = torch.randint(4, 8000, (rows, 5))
#     plain = greedy_search(middle, some, extra=20)
#     before = seconds(lambda some=some: greedy_search(middle, some, extra=20))
#     with packed(middle):
#         assert torch.equal(greedy_search(middle, some, extra=20), plain)
#         after = seconds(lambda some=some: greedy_search(middle, some, extra=20))
#     print(f"{rows:2d} rows: {before * 1000:4.0f} ms as stored, {after * 1000:4.0f} ms packed")

# %% [markdown]
# The function is the same, and the ids are too. How much is gained depends on the rows and on the processor. Packing costs one copy of the weights, so it is done once for many sentences. The next chapter has four rows for each sentence.
#
# ## Drawing the next token
#
# The most probable token is not the only choice. A model gives a distribution over the next token, and one can draw from it. For translation that is rarely wanted. For stories and dialogue it is, because the most probable text is dull and repeats itself {cite:p}`holtzman2020curious`.
#
# Take eight scores, and divide them by a number, the **temperature** $\tau$, before the softmax: $p_i \propto e^{z_i / \tau}$.

# %% mystnb={"figure": {"caption": "A low temperature sharpens the distribution, a high one flattens it; at 1 it is the model's own.", "name": "fig-temperature"}, "image": {"alt": "Three bar charts of the same eight tokens at temperatures 0.5, 1 and 2. The first is steep, the last is nearly flat."}} tags=["active-ipynb"]
# z = torch.tensor([3.0, 2.6, 1.5, 1.0, 0.6, 0.0, -0.5, -1.0])
# fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.2), sharey=True)
# for ax, tau in zip(axes, (0.5, 1.0, 2.0), strict=True):
#     ax.bar(range(1, 9), (z / tau).softmax(dim=-1))
#     ax.set(title=f"temperature {tau}", xlabel="token", xticks=range(1, 9))
# axes[0].set_ylabel("probability");

# %% [markdown]
# Temperature 0 would divide by zero. Its limit is the most probable token, and that is `greedy_search`.
#
# A high temperature has a price that eight bars do not show. A vocabulary has thousands of tokens that are each nearly impossible, and together they are drawn often. Two rules cut them off. **Top-k** keeps the $k$ most probable tokens {cite:p}`fan2018hierarchical`. **Top-p** keeps the fewest that together have at least probability $p$. That is many tokens where the model is unsure and few where it is sure {cite:p}`holtzman2020curious`.

# %%
def truncate(logits: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Logits `(N, V)`, with -inf for all but the most probable tokens.

    Args:
        logits: `(N, V)`.
        top_k: how many tokens stay; more than V means all. None for no such limit.
        top_p: the fewest tokens stay that together have this probability, after `top_k`. The
            most probable token always stays. None for no such limit.

    Raises:
        ValueError: `top_k` below 1, `top_p` outside (0, 1].
    """
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}")
    if top_k is not None and top_k < logits.shape[-1]:
        best, where = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, where, best)
    if top_p is not None:
        ordered, where = logits.sort(dim=-1, descending=True)
        p = ordered.softmax(dim=-1)
        before = p.cumsum(dim=-1) - p  # the probability of all that is more probable
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, where, ordered)
    return logits

# %% mystnb={"figure": {"caption": "Top-k keeps three tokens whether the model is sure or not. Top-p keeps two where it is sure and five where it is not.", "name": "fig-truncated"}, "image": {"alt": "Two rows of three bar charts. Top row, a peaked distribution: whole, cut to three tokens, cut to two. Bottom row, a flat distribution: whole, cut to three tokens, cut to five."}} tags=["active-ipynb"]
# distributions = {"sure": 1.5 * z, "unsure": 0.5 * z}
# rules = {"all": {}, "top_k=3": {"top_k": 3}, "top_p=0.8": {"top_p": 0.8}}
# fig, axes = plt.subplots(2, 3, figsize=(7.2, 3.4), sharex=True, sharey="row")
# kept = {}
# for row, (name, scores) in zip(axes, distributions.items(), strict=True):
#     for ax, (rule, arguments) in zip(row, rules.items(), strict=True):
#         p = truncate(scores[None], **arguments)[0].softmax(dim=-1)
#         kept[name, rule] = int((p > 0).sum())
#         ax.bar(range(1, 9), p)
#         ax.set(title=f"{name}, {rule}", xticks=range(1, 9))
#     row[0].set_ylabel("probability")
# assert list(kept.values()) == [8, 3, 2, 8, 3, 5]

# %% [markdown]
# What is left is made to sum to one again. In {numref}`fig-truncated` compare the middle column with the right one: top-p adapts. Note how a token exactly at the border is treated: it stays if what is *before* it has less than $p$, so at least one token always stays.
#
# One token of each sentence is drawn at each step. Chance comes from a generator, so that the same seed gives the same text.

# %%
def sample(
    model: Transformer,
    src: Tensor,
    src_padding: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    extra: int = 50,
) -> Tensor:
    """Draw each next token from the model's distribution, up to EOS: ids `(B, T)`.

    Args:
        model, src, src_padding, extra: as for `greedy_search`.
        temperature: the logits are divided by it; below 1 sharpens, above 1 flattens.
        top_k, top_p: see `truncate`; applied after the temperature.
        generator: where chance comes from; the same state gives the same tokens. None for
            torch's own.

    Raises:
        ValueError: a `temperature` that is not above 0 (0 would be `greedy_search`), and what
            `truncate` and `greedy_search` object to.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(
            f"temperature must be above 0 and finite, got {temperature}; "
            "the limit of temperature 0 is greedy_search"
        )
    truncate(torch.zeros(1, 2), top_k, top_p)  # objects before anything is computed

    def choose(logits: Tensor) -> Tensor:
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        p = truncate(logits, top_k, top_p).softmax(dim=-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    return search(model, src, src_padding, extra, choose)

# %% tags=["active-ipynb"]
# draws = [
#     sample(model, src, temperature=0.7, extra=1, generator=torch.Generator().manual_seed(seed))
#     for seed in (1, 1, 2)
# ]
# print("seed 1:", draws[0][0].tolist(), "\nseed 1:", draws[1][0].tolist())
# print("seed 2:", draws[2][0].tolist())
# assert torch.equal(draws[0], draws[1])

# %% tags=["active-ipynb"]
# for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 1.2}):
#     try:
#         sample(model, src, **wrong)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## From sentences to sentences
#
# The last step is for people: text in, text out, in the order of the input. Inside, sentences of similar length share a batch, as in Chapter 14. An empty line has the empty translation. A line of a megabyte without an end must not use up all memory, so a source is cut at `longest` tokens, and a warning
# says so.

# %%
class Search(Protocol):
    """From source ids and their padding to target ids `(B, T)`, or to something that has `.ids`."""

    def __call__(self, model: Transformer, src: Tensor, src_padding: Tensor | None) -> Any: ...


def token_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices of similar lengths together; a batch is at most `max_tokens` places, or one row."""
    chosen: list[int] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        if chosen and (len(chosen) + 1) * lengths[i] > max_tokens:
            yield chosen
            chosen = []
        chosen.append(i)
    if chosen:
        yield chosen


def translate_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    sentences: Sequence[str],
    *,
    search: Search = greedy_search,
    max_tokens: int = 4096,
    longest: int = 512,
) -> list[str]:
    """Translate sentences, similar lengths together, and return them in their order.

    Args:
        model: on any device; in evaluation mode meanwhile.
        tokenizer: serves both languages.
        sentences: raw text. One without a token, such as an empty line, is translated to "".
        search: `greedy_search` or the like; `functools.partial` fills in its arguments.
        max_tokens: places in a batch of sources, filler included.
        longest: a source with more tokens than this is cut there, with a warning.

    Raises:
        ValueError: a `str` in place of a sequence, `max_tokens` or `longest` below 1, ids outside
            the vocabulary.
    """
    if isinstance(sentences, str):
        raise ValueError("sentences must be a sequence of texts, got one text")
    for name, value in (("max_tokens", max_tokens), ("longest", longest)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    sources = []
    for i, text in enumerate(sentences):
        # A line without end takes no time, and one of spaces has nothing to translate.
        ids = tokenizer.encode(text[: 32 * longest]) if text.strip() else []
        if len(ids) > longest or len(text) > 32 * longest:
            warnings.warn(f"sentence {i} is longer than {longest} tokens; the rest is left out",
                          stacklevel=2)  # fmt: skip
        sources.append(ids[:longest])
    return translate_ids(model, tokenizer, sources, search=search, max_tokens=max_tokens)


def translate_ids(
    model: Transformer,
    tokenizer: Tokenizer,
    sources: Sequence[list[int]],
    *,
    search: Search = greedy_search,
    max_tokens: int = 4096,
) -> list[str]:
    """`translate_texts` for sources that are ids already, as an encoded corpus holds them."""
    filled = [i for i, ids in enumerate(sources) if ids]
    device = next(model.parameters()).device
    output = [""] * len(sources)
    with packed(model):
        for chosen in token_batches([len(sources[i]) + 1 for i in filled], max_tokens):
            rows = [filled[i] for i in chosen]
            batch = collate([(sources[i], []) for i in rows]).to(device)
            found = search(model, batch.src, batch.src_padding)
            found = getattr(found, "ids", found)
            for i, ids in zip(rows, found.tolist(), strict=True):
                output[i] = tokenizer.decode(ids)
    return output

# %% [markdown]
# To see it work, train a small model on the small language of Chapter 9, for a short time.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from itertools import chain, count, islice
#
# from transformer_annotated import train
# from transformer_annotated.paper.first_translation import rise_and_fall
# from transformer_annotated.paper.toy import batches, split
# from transformer_annotated.training.tokens import train_words
#
# train_text, test_text = split(20_000 if full else 300, 50, seed=0)
# tokenizer = train_words(chain.from_iterable(train_text), min_count=1)
# data = [(tokenizer.encode(german), tokenizer.encode(english)) for german, english in train_text]
# steps = 120 if full else 5
# TOY = {**SMALL, "vocab_size": tokenizer.vocab_size, "d_model": 128, "ffn.d_ff": 512}
# torch.manual_seed(0)
# toy = Transformer(patch(PAPER_BASE, TOY, FAST))
# stream = chain.from_iterable(batches(data, 64 if full else 8, seed=seed) for seed in count())
# history = train(toy, islice(stream, steps), learning_rate=rise_and_fall(2e-3, steps // 4, steps))
# print(f"loss {history.loss[0]:.2f} at first, {history.loss[-1]:.2f} after {steps} steps")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from functools import partial
#
# sentences = [german for german, _ in test_text[:3]] + [""]
# chance = partial(sample, generator=torch.Generator().manual_seed(0))
# found = translate_texts(toy, tokenizer, sentences)
# drawn = translate_texts(toy, tokenizer, sentences, search=chance)
# for german, a, b in zip(sentences, found, drawn, strict=True):
#     print(f"{german!r}\n    greedy  {a!r}\n    drawn   {b!r}")
# assert found[-1] == drawn[-1] == ""

# %% [markdown]
# The model was trained for a short time only, and its greedy translations need not be right. The drawn ones are worse: at temperature 1 a less probable word is drawn now and then, and what follows must go on from it. Both languages share one vocabulary, so even a German word can be drawn. `partial` fills in the arguments of a search, and anything with the signature of `Search` will do. The next chapter brings one more.
#
# ## What the paper did
#
# The paper used beam search for its translations (section 6.1), the next chapter's subject, and says nothing of a cache. The code it links to, tensor2tensor, has one. Caching changes no number, only the time. Memory is the price: two vectors of $D$ numbers for each token and layer. Later models shrank that by sharing key heads
# {cite:p}`shazeer2019fast,ainslie2023gqa`, and Part III measures it.
#
# ## How it breaks
#
# - *The new token at position 0.* Every token is told that it stands first. Cached and uncached differ from the second token on.
# - *A cache that outlives its sentence.* The second translation continues the first one. Here a session makes its own.
# - *Rows dropped from the batch and not from the cache.* Sentences exchange their histories, in batches only. Compare a batch with its sentences one by one.
# - *Keys stored after they were turned by position.* Harmless until the rule for turning changes with the length; then old keys are wrong.
# - *Dropout left on.* The same sentence, two translations.
#
# ## Takeaways
#
# - The causal mask makes keys and values final, so they can be kept: {eq}`eq-cache`. $T$ positions are computed in place of $T(T + 1)/2$.
# - The memory's keys and values are computed once.
# - Greedy takes the most probable token. Sampling draws, from a distribution that temperature, top-k and top-p reshape.
# - Cached equals uncached, in any pieces, and a batch equals its sentences. The page shows the first, the tests both.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 20.1.** The base model of the paper (6 decoder layers, $D = 512$) writes 100 tokens for a source of 80 tokens, in 32 bits. How many bytes do the keys and values of one sentence take, self-attention and cross-attention together? Answer with a number.

# %% tags=["active-ipynb"]
# answer = ...
# check("20.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 6 * 2 * 512 * 4 * (100 + 80)
# check("20.1", answer)

# %% [markdown]
# **Exercise 20.2.** A cache is given a prompt of 12 tokens in one piece and then 8 tokens one by one. How many pairs of query and key does one self-attention layer score in total, those hidden by the mask included? And without a cache, with the prompt and then the growing whole, nine calls in all? Answer with two
# numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("20.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [12 * 12 + sum(range(13, 21)), sum(n * n for n in range(12, 21))]
# check("20.2", answer)

# %% [markdown]
# **Exercise 20.3.** Another rule, **min-p**, keeps each token whose probability is at least `min_p` times that of the most probable one {cite:p}`nguyen2025turning`. Write it as a function of logits `(N, V)` and `min_p` that returns logits with −∞ for the others. Hint: the softmax is not needed.

# %% tags=["active-ipynb"]
# answer = ...
# check("20.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# import math
#
#
# def min_p_rule(logits: Tensor, min_p: float) -> Tensor:
#     best = logits.amax(dim=-1, keepdim=True)
#     return logits.masked_fill(logits < best + math.log(min_p), -torch.inf)
#
#
# check("20.3", min_p_rule)
