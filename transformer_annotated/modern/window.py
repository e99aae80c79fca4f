# %% [markdown]
r"""
# Sliding window

A query that sees only the last W keys needs no older ones. The work for a token stops growing with the text, and so does the
cache.
"""

# %% [markdown]
# Sharing heads made each token of the cache smaller. This chapter bounds how many tokens there are. The price is that a layer looks only so far, and we measure how far a stack of such layers still sees.

# %% mystnb={"figure": {"caption": "Chapter 33 of Part III: attention that looks a fixed distance.", "name": "fig-map-window"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The ninth, Sliding window, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(33);

# %%
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from transformer_annotated.paper.attention import Attend, Mask
from transformer_annotated.paper.multi_head import KeysValues
from transformer_annotated.paper.parts import Spec
from transformer_annotated.paper.transformer import Transformer, tiled
from transformer_annotated.training.decoding import Cache, SelfAttentionCache

# %% [markdown]
# ## The change
#
# One number for self-attention. Cross-attention is left alone: a target position minus a source position is no distance. The two languages differ in length and in word order.

# %%
def sliding_window(window: int) -> dict[str, int]:
    """The patch: in self-attention a query sees only keys less than `window` positions away.

    In a causal stack these are W keys, itself included; in an encoder W - 1 on either side, too.

    Raises ValueError for `window` below 1.
    """
    Mask(window=window)  # raises ValueError
    return {"self_attention.window": window}

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, diff, patch
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, sliding_window(128))))

# %% mystnb={"figure": {"caption": "The window belongs to self-attention; cross-attention and all other boxes stay.", "name": "fig-seams-window"}, "image": {"alt": "The two stacks of boxes of the Transformer. Self-attention is coloured in both stacks."}} tags=["active-ipynb"]
# figures.seams(["self_attention"]);

# %% [markdown]
# ## What a long text costs
#
# A text of $T$ tokens makes each query meet all the keys before it. The scores grow with the square of $T$, and the cache grows with $T$. Now let every query see at most 4,096 keys, as in Mistral 7B {cite:p}`jiang2023mistral` (32 layers, 8 heads of keys and values of 128 numbers, 16 bits).

# %% tags=["active-ipynb"]
# from transformer_annotated import DECODER_ONLY, cache_bytes, grouped_queries
#
# heads = {"self_attention.n_heads": 32, "self_attention.head_dim": 128}
# full = patch(PAPER_BASE, DECODER_ONLY, heads, grouped_queries(8), {"decoder.n_layers": 32})
# windowed = patch(full, sliding_window(4096))
# print("  tokens   scores of one head: full, window     cache in MiB: full, window")
# for T in (1024, 4096, 32_768, 131_072):
#     scores = (T * (T + 1) // 2, sum(min(t, 4096) for t in range(1, T + 1)))
#     MiB = [cache_bytes(c, T, dtype=torch.bfloat16) / 2**20 for c in (full, windowed)]
#     print(f"{T:8,}{scores[0]:18,}{scores[1]:16,}{MiB[0]:18,.0f}{MiB[1]:10,.1f}")

# %% [markdown]
# Up to the length of the window nothing differs, except that one key less is kept; we come to that. Beyond it, each further token adds 4,096 scores to the window's column, and nothing to its cache.
#
# The table counts only visible scores. `attend` and SDPA with a mask compute all of them and hide most; only a kernel that skips what is hidden saves the time of a long prompt. In decoding it is simpler: keys that the cache has dropped are not multiplied.
#
# ## Who sees whom
#
# The window is a rule of the mask. Query $i$ sees key $j$ where
#
# $$
# 0 \le i - j < W \quad \text{(causal)}, \qquad |i - j| < W \quad \text{(in an encoder)}.
# $$ (eq-window)
#
# Count carefully: $W$ keys in a causal stack, the query's own among them; $2W - 1$ in an encoder. Libraries differ in what they count. FlashAttention's `window_size=(left, right)` counts the *other* keys: our causal window is `(W - 1, 0)`.

# %% mystnb={"figure": {"caption": "A window cuts the triangle of the causal mask to a band of W keys. In an encoder the band has two sides.", "name": "fig-window-masks"}, "image": {"alt": "Three grids of eight by eight, queries down, keys across. Left, the triangle above the diagonal is blue. Middle, only a band of three white squares is left in each row, ending at the diagonal. Right, a band of five around the diagonal is white."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# masks = {
#     "causal": Mask(causal=True),
#     "causal, W = 3": Mask(causal=True, window=3),
#     "encoder, W = 3": Mask(window=3),
# }
# fig, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), sharey=True)
# for ax, (name, mask) in zip(axes, masks.items(), strict=True):
#     hidden = (~mask.dense(1, 8, 8)).float()
#     labels = {"rows": "01234567", "cols": "01234567", "col_label": "key"}
#     figures.heatmap(ax, hidden, title=name, vmin=0, vmax=1.4, **labels)
# axes[0].set_ylabel("query");

# %% [markdown]
# White is visible in {numref}`fig-window-masks`, as in Chapter 3. `Mask(window=)` and the argument `window` of `MultiHeadAttention` have been there since Part I. Now they are used.
#
# ## Proof
#
# Take a window of 3 and seven positions. The reference does without any mask: for each query it cuts out the keys of {eq}`eq-window` and computes plain attention over them. Output and gradients must agree.

# %% tags=["active-ipynb"]
# from transformer_annotated import MultiHeadAttention, Transformer, attend, spec
#
# torch.manual_seed(0)
# W, T = 3, 7
# attention = MultiHeadAttention(16, 4, window=W).double()
# for parameter in attention.parameters():
#     nn.init.normal_(parameter, std=0.3)
#
#
# def by_slices(x: Tensor) -> Tensor:
#     q, (k, v) = attention.split(attention.q_proj(x)), attention.keys_values(x)
#     rows = []
#     for i in range(T):
#         near = slice(max(0, i - W + 1), i + 1)
#         rows.append(attend(q[:, :, i : i + 1], k[:, :, near], v[:, :, near]))
#     return attention.out_proj(torch.cat(rows, dim=2).transpose(1, 2).flatten(-2))

# %% tags=["active-ipynb"]
# x = torch.randn(2, T, 16, dtype=torch.float64, requires_grad=True)
# a, b = attention(x, mask=Mask(causal=True)), by_slices(x)
# direction, leaves = torch.randn_like(a), [x, *attention.parameters()]
# torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# for g, h in zip(
#     torch.autograd.grad(a, leaves, direction),
#     torch.autograd.grad(b, leaves, direction),
#     strict=True,
# ):
#     torch.testing.assert_close(g, h, rtol=0, atol=1e-10)
# print(f"output and {len(leaves)} gradients equal, to 1e-10")

# %% [markdown]
# And the limiting case: a window as long as the text is no window, bit for bit.

# %% tags=["active-ipynb"]
# from transformer_annotated.modern.language_model import language_model
#
# config = language_model(50, d_model=32, n_layers=4)
# ids = torch.randint(50, (2, 24))
# outputs = []
# for change in ({}, sliding_window(24), sliding_window(23)):
#     torch.manual_seed(0)
#     outputs.append(Transformer(patch(config, change)).eval()(ids))
# print("W = T:    ", torch.equal(outputs[1], outputs[0]))
# print("W = T - 1:", torch.equal(outputs[2], outputs[0]))

# %% [markdown]
# The tests also compare with the mask that Hugging Face builds for Mistral.
#
# ## How far does a stack see?
#
# One layer looks back $W - 1$ positions. But what it finds there has looked back itself, one layer below. After $N$ layers an output can depend on $N(W - 1)$ positions before it:
#
# $$
# \text{reach} = N\,(W - 1)
# $$ (eq-reach)
#
# That is the theory. The gradient measures it: differentiate the last position's output with respect to each input vector. Where the gradient is zero, nothing arrives.

# %% tags=["active-ipynb"]
# def reach(n_layers: int, change: dict[str, Any], T: int = 32) -> Tensor:
#     """How strongly the last output depends on each input vector, `(T,)`."""
#     torch.manual_seed(0)
#     model = Transformer(patch(config, {"decoder.n_layers": n_layers}, change)).double().eval()
#     x = torch.randn(1, T, 32, dtype=torch.float64, requires_grad=True)
#     y = model.decoder(x)[0, -1]
#     (gradient,) = torch.autograd.grad(y, x, torch.randn_like(y))
#     return gradient[0].norm(dim=-1)
#
#
# print("layers   positions back   by the formula")
# for n_layers in (1, 2, 3, 6):
#     found = reach(n_layers, sliding_window(5))
#     back = 31 - int(found.nonzero()[0])
#     print(f"{n_layers:6d}{back:17d}{n_layers * 4:17d}")
#     assert back == n_layers * 4

# %% [markdown]
# Exactly the formula, and exactly zero beyond. So far the window looks almost free: the 32 layers of Mistral reach back 131,000 tokens {cite:p}`jiang2023mistral`. But *can depend* is not *does depend*. Look at the size. The last two models have four layers: `SSSL` stands for three short ones, with the window, and a long one, without; `LLLL` has no window at all.

# %% tags=["hide-input"]
def draw_reach(strengths: dict[str, Tensor]) -> Any:
    """One line of squares a model: how strongly the last output depends on each input."""
    import matplotlib.pyplot as plt

    rows = torch.stack([(s / s.max()).clamp(min=1e-12).log10() for s in strengths.values()])
    rows = rows.masked_fill(torch.stack([s == 0 for s in strengths.values()]), torch.nan)
    ax = plt.subplots(figsize=(7.2, 0.5 + 0.42 * len(rows)))[1]
    image = ax.imshow(rows, aspect="auto", cmap="viridis", vmin=-5, vmax=0)
    ax.set_yticks(range(len(strengths)), list(strengths))
    back = range(rows.shape[1] - 1, -1, -5)
    ax.set_xticks(list(back), [str(rows.shape[1] - 1 - at) for at in back])
    ax.set(xlabel="positions back from the output")
    ax.grid(False)
    bar = ax.figure.colorbar(image, ax=ax, ticks=[-4, -2, 0], pad=0.02)
    bar.ax.set_yticklabels(["1/10,000", "1/100", "1"])
    bar.set_label("relative to the\nrow's largest")
    return ax

# %% mystnb={"figure": {"caption": "With windows the influence ends where the formula says, and near the end of a deep stack's reach it is small. One full layer among four brings everything within reach.", "name": "fig-window-reach"}, "image": {"alt": "Seven rows of squares over 32 positions. With one to six windowed layers the coloured part ends 4, 8, 12, 16 and 24 positions back; the deeper the stack, the darker its end. With one full layer of four, and with four full layers, all positions are coloured."}} tags=["active-ipynb"]
# near = sliding_window(5)
# short, long = (spec(MultiHeadAttention, n_heads=4, window=w) for w in (5, None))
# strengths = {"S" * n: reach(n, near) for n in (1, 2, 3, 4, 6)}
# strengths["SSSL"] = reach(4, {"self_attention": (short, short, short, long)})
# strengths["LLLL"] = reach(4, {})
# draw_reach(strengths);

# %% [markdown]
# White squares in {numref}`fig-window-reach` are exact zeros. Near the end of the reach the influence has become small: it came by a single path, through the oldest key of every layer. In the middle there are many paths. The last row is bright at its far left, too. Every later position reads the first ones, in every layer, and they have few keys of their own among which to divide their attention. We shall meet the first key again. And this is a model of random weights; a trained one need not use its reach at all.
#
# ## Short and long layers in turn
#
# The sixth row of the figure has three windowed layers and one full layer. Such a mixture is common: most layers work near by, and a few look everywhere. In a config it is a tuple of specs, which the stack repeats over its depth (Chapter 8). `pattern` spells it.

# %%
def pattern(letters: str, **specs: Spec[nn.Module]) -> tuple[Spec[nn.Module], ...]:
    """One spec a letter: `pattern("SSSL", S=short, L=long)`. A stack repeats it over its depth.

    Raises ValueError for no letters, a letter without a spec, and a spec without a letter.
    """
    if not letters or set(letters) != specs.keys():
        raise ValueError(f"letters must use each of {', '.join(specs) or 'no specs'}, "
                         f"got {letters!r}")  # fmt: skip
    return tuple(specs[letter] for letter in letters)

# %% tags=["active-ipynb"]
# mixed = {"decoder.self_attention": pattern("SSSL", S=short, L=long), "decoder.n_layers": 10}
# stack = Transformer(patch(config, mixed)).decoder
# print([layer.self_attention.mask.window for layer in stack.layers])

# %% [markdown]
# ## A cache that forgets
#
# The key of a token is seen by the $W - 1$ queries after it, and then never again. So after each step a layer may drop all but the last $W - 1$ tokens. Not $W$: the next query brings the $W$-th key itself.
#
# A long prompt arrives in one piece of $T$ tokens. All of its queries need keys, so for this one call the layer works on what it kept and the whole piece. What it keeps afterwards is $W - 1$ again.

# %%
class RollingCache(SelfAttentionCache):
    """Keys and values of the last W - 1 tokens, for one layer with a window of W.

    The store `(kept, 2, N, K, d)` has no spare room. Its rows are in the order of time, and the
    last new key is the last, which is what `Mask` expects. `length` counts all tokens read.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self.keep = window - 1

    def update(
        self, project: Callable[[Tensor], KeysValues], source: Tensor, positions: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the keys and values kept so far and those of `source` `(N, T, D)`; keep the last.

        `(N, K, kept + T, d)` each, and their positions.

        Raises ValueError for another number of rows N than before.
        """
        k, v = (x.detach().permute(2, 0, 1, 3) for x in project(source))
        new = torch.stack((k, v), dim=1)  # (T, 2, N, K, d)
        if self._store is not None:
            if self._store.shape[2] != new.shape[2]:
                raise ValueError(f"source must have the cache's {self._store.shape[2]} rows, "
                                 f"got {len(source)}")  # fmt: skip
            new = torch.cat((self._store, new))
        first = max(0, len(new) - self.keep)
        self._store = new[first:].clone()  # a copy, so that the rest can be freed
        self.length += len(k)
        if positions is not None:
            if self._positions is not None:
                positions = torch.cat((self._positions, positions), dim=1)
            self._positions = positions[:, first:].clone()
        keys, values = new.permute(1, 2, 3, 0, 4)  # (N, K, kept + T, d) each
        return keys, values, positions

    def reorder(self, index: Tensor, start: int = 0) -> None:
        """Row i becomes what row `index[i]` was; rows that are not named are dropped."""
        if self._store is not None:
            self._store = self._store.index_select(2, index)
        if self._positions is not None and len(self._positions) > 1:
            self._positions = self._positions[index]

# %% [markdown]
# Joining two tensors copies them, which Chapter 20 avoided because its store grew without end. Here it is two copies of about $W$ rows, and attention reads as many anyway. Production code writes into a ring, over the oldest row; then the order of rows is no longer that of time, and the mask must know.
#
# The causal rule needs no change. `Mask` places the last query at the last key, and counts distances from there. Positions are kept beside the keys, so RoPE and ALiBi see the true ones.
#
# A model has windowed layers and full ones. `WindowCache` gives each what its config says.

# %%
class WindowCache(Cache):
    """A `Cache` that drops the keys that no later query can see.

    A layer with a window of W keeps the last W - 1 tokens, a layer without one keeps all. Where
    `padding` is given as well, decode inside `attending(model, "self", to_last_keys)`.

    Args:
        model: has a decoder; the cache is empty, and holds nothing of the model.

    Raises:
        ValueError: a model without a decoder.
    """

    def __init__(self, model: Transformer) -> None:
        super().__init__(model)
        assert model.config.decoder is not None
        for i, layer in enumerate(self._layers):
            part = tiled(model.config.decoder.self_attention, i)
            window = None if part is None else part.kwargs.get("window")
            if window is not None:
                layer.self_attention = RollingCache(window)

# %% [markdown]
# ## Proof, in pieces
#
# Feed 40 tokens in any pieces, also in one that is longer than the window. The vectors must be those of one pass without a cache. After each piece, the bytes held must be those that `cache_bytes` predicts (Chapter 32).
#
# Which bytes? A view of the last rows has a small shape and a large storage behind it. For a rolling cache, bytes in use and bytes reserved are the same number, so we ask the storage. (A full layer reserves more: its store doubles.)

# %% tags=["active-ipynb"]
# from transformer_annotated.modern.grouped_query import held_bytes
#
# settings = {"all windowed": sliding_window(6), "SSSL": mixed, "all full": {}}
# ids = torch.randint(50, (3, 40))
# for name, change in settings.items():
#     model = Transformer(patch(config, change)).eval()
#     with torch.no_grad():
#         whole = model.decode(ids)
#         for pieces in ((1,) * 40, (23, 1, 1, 15), (40,), (7, 13, 20)):
#             cache, got = WindowCache(model), []
#             for new in ids.split(pieces, dim=1):
#                 at = torch.arange(cache.length, cache.length + new.shape[1])[None]
#                 got.append(model.decode(new, positions=at, cache=cache))
#                 used, _ = held_bytes(cache)
#                 assert used == cache_bytes(model.config, cache.length, batch=3)
#                 rolling = [x for x in cache if isinstance(x.self_attention, RollingCache)]
#                 used, reserved = held_bytes(rolling)  # of the windowed layers alone
#                 assert used == reserved
#             torch.testing.assert_close(torch.cat(got, dim=1), whole, rtol=0, atol=2e-5)
#     print(f"{name:12s} four ways to cut, equal to 2e-5;", end=" ")
#     print(
#         f"{held_bytes(cache)[0]:7,} bytes as predicted, {reserved:6,} reserved by windowed layers"
#     )

# %% [markdown]
# The promise was bounded memory. Read 3,000 tokens in pieces of 50 and look at the cache on the way. Dots are measured, lines are predicted. Where all layers roll, a dot is what the storage reserves.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import SDPA
# from transformer_annotated.book import machine, scale
#
# n_tokens = 3000 if scale() == "full" else 300
# model_kinds = {
#     "full": {},
#     "SSSL, W = 128": {
#         "self_attention": pattern("SSSL", S=spec(MultiHeadAttention, n_heads=4, window=128), L=long)
#     },
#     "W = 128": sliding_window(128),
# }
# long_ids, held, decoders = torch.randint(50, (1, n_tokens)), {}, {}
# for name, change in model_kinds.items():
#     model = Transformer(patch(config, change, SDPA)).eval()
#     cache, held[name] = WindowCache(model), {}
#     decoders[name] = model, cache
#     with torch.inference_mode():
#         for new in long_ids.split(50, dim=1):
#             at = torch.arange(cache.length, cache.length + 50)[None]
#             model.decode(new, positions=at, cache=cache)
#             used, reserved = held_bytes(cache)
#             held[name][cache.length] = reserved if name == "W = 128" else used
#     predicted = {n: cache_bytes(model.config, n) for n in held[name]}
#     assert held[name] == predicted
#     print(f"{name:14s}{held[name][n_tokens]:12,} bytes after {n_tokens:,} tokens")

# %% mystnb={"figure": {"caption": "Windowed layers stop growing at W - 1 tokens. With one full layer in four the cache grows a quarter as fast as with four.", "name": "fig-window-bytes"}, "image": {"alt": "Bytes held against tokens read. The line of the full model rises steadily, that of SSSL rises a quarter as fast after a short bend, that of the windowed model is flat. Dots lie on the lines."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for (name, found), change in zip(held.items(), model_kinds.values(), strict=True):
#     lengths = list(range(0, n_tokens + 1, 10))
#     line = [cache_bytes(patch(config, change), n) / 2**20 for n in lengths]
#     (drawn,) = ax.plot(lengths, line, label=name)
#     some = list(found)[4::10]
#     ax.plot(some, [found[n] / 2**20 for n in some], "o", color=drawn.get_color())
# ax.set(xlabel="tokens read", ylabel="MiB held", ylim=(0, None))
# ax.legend();

# %% [markdown]
# In {numref}`fig-window-bytes` the dots lie on the lines; the assertion says so to the byte. The windowed model would hold the same after a million tokens. The mixture still grows, four times more slowly.
#
# And the time of one more token, after all these?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from transformer_annotated.training.speed import race
#
#
# def one_more(model: Transformer, cache: Cache) -> None:
#     with torch.inference_mode():
#         model.decode(long_ids[:, :1], positions=torch.tensor([[cache.length]]), cache=cache)
#
#
# runs = {name: lambda pair=pair: one_more(*pair) for name, pair in decoders.items()}
# times = {name: median(seconds) for name, seconds in race(runs, 15).items()}
# print("                 ms    time   bytes   (as shares of the full model's)")
# for name, seconds in times.items():
#     time, size = seconds / times["full"], held[name][n_tokens] / held["full"][n_tokens]
#     print(f"{name:14s}{1e3 * seconds:5.2f}{time:8.2f}{size:8.2f}")
# print(machine())

# %% [markdown]
# The bytes differ many times over, the times by far less. In so small a model the fixed cost of each operation decides. `race` measures processor time, and the times belong to the machine that the last line names.

# %% [markdown]
# ## Filler on the left
#
# One thing needs care. Prompts of unequal length get filler on the left, and `padding` says which keys are real. It covers *every* key so far. A layer that has dropped keys has fewer, and the mask objects:

# %% tags=["active-ipynb"]
# model = Transformer(patch(config, sliding_window(6))).eval()
# padding = torch.arange(20) >= torch.tensor([[0], [5], [12]])
# positions = (padding.long().cumsum(dim=1) - 1).clamp(min=0)
# new, cache = ids[:, :20], WindowCache(model)
# with torch.no_grad():
#     model.decode(new[:, :18], padding=padding[:, :18], positions=positions[:, :18], cache=cache)
#     try:
#         model.decode(
#             new[:, 18:19], padding=padding[:, :19], positions=positions[:, 18:19], cache=cache
#         )
#     except ValueError as error:
#         print(error)

# %% [markdown]
# What a layer holds is always the *last* keys, so the last columns of the padding belong to them. `attending` of Chapter 20 exchanges `attend` for a while, and this is what to exchange it for:

# %%
def to_last_keys(attend: Attend) -> Attend:
    """`attend` for a cache that may hold fewer keys than `padding` covers: the last ones."""

    def attend_to_last(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **rest: Any
    ) -> Tensor:
        if mask is not None:
            S = k.shape[2]
            padding = None if mask.padding is None else mask.padding[:, -S:]
            allowed = None if mask.allowed is None else mask.allowed[..., -S:]
            mask = Mask(causal=mask.causal, padding=padding, window=mask.window, allowed=allowed)
        return attend(q, k, v, mask, **rest)

    return attend_to_last

# %% tags=["active-ipynb"]
# from transformer_annotated.training.decoding import attending
#
# cache, got = WindowCache(model), []
# with torch.no_grad(), attending(model, "self", to_last_keys):
#     whole = model.decode(new, padding=padding)
#     for t in range(20):
#         now = slice(t, t + 1)
#         rest = {"padding": padding[:, : t + 1], "positions": positions[:, now], "cache": cache}
#         got.append(model.decode(new[:, now], **rest))
# torch.testing.assert_close(torch.cat(got, dim=1)[padding], whole[padding], rtol=0, atol=2e-5)
# print("rows of 20, 15 and 8 real tokens: cached equals uncached, to 2e-5")

# %% [markdown]
# `generate` of Chapter 25 takes the cache as an argument. Three prompts of different length, continued by twelve drawn tokens, with either cache:

# %% tags=["active-ipynb"]
# from transformer_annotated import generate
#
# written = []
# with attending(model, "self", to_last_keys):
#     for cache in (Cache(model), WindowCache(model)):
#         seed = torch.Generator().manual_seed(0)
#         tokens = generate(
#             model, new, max_new_tokens=12, generator=seed, cache=cache, padding=padding
#         )
#         written.append(torch.stack(list(tokens), dim=1))  # (B, 12)
# assert torch.equal(*written)
# print("drawn with either cache, the same ids of shape", tuple(written[0].shape))

# %% [markdown]
# ## A window on a model that was trained without
#
# A tempting idea: take a model that was trained with full attention, and give it a window afterwards. No training, bounded memory. {cite:t}`xiao2024efficient` tried it with large models. The loss explodes at the moment when the first tokens of the text leave the window.
#
# Their explanation has two steps. The weights of a softmax sum to one, so a head that finds nothing of interest must still put its weight somewhere. The first token is a good place, since every query sees it. Such a token is an **attention sink**. When it leaves the window, its weight falls on keys that mean something. Their remedy is to keep the first few tokens for ever, beside the window.
#
# Does a small model do this? Every text of this experiment begins with the same sign, as every sentence of Part II begins with `<bos>`. Two models are trained on 64 characters, one with full attention and one with a window of 8. Both have the norm in front and RoPE (Chapters 26 and 29).

# %% tags=["active-ipynb"]
# from transformer_annotated.modern.language_model import (
#     Characters,
#     any_text,
#     next_token_nats,
#     train_language_model,
# )
# from transformer_annotated.modern.pre_ln import PRE_LN
# from transformer_annotated.modern.rope import ROPE
#
# at_full_scale, text = scale() == "full", any_text()
# characters = Characters(text.train + text.val + text.test)
# train_ids, val_ids = (torch.tensor(characters.encode(part)) for part in (text.train, text.val))
# BEGIN, T, W = characters.vocab_size, 64 if at_full_scale else 16, 8
#
#
# def begun(ids: Tensor) -> Tensor:
#     """The first token of each row `(B, T)` becomes the sign that begins a text."""
#     return torch.cat((torch.full_like(ids[:, :1], BEGIN), ids[:, 1:]), dim=1)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# models = {}
# for name, change in (("full", {}), ("window", sliding_window(W))):
#     torch.manual_seed(0)
#     config = patch(language_model(BEGIN + 1), PRE_LN, ROPE, SDPA, change)
#     models[name] = Transformer(config)
#     losses = train_language_model(
#         models[name],
#         train_ids,
#         steps=600 if at_full_scale else 2,
#         length=T,
#         rate=4e-3,
#         loss=lambda model, ids: next_token_nats(model, begun(ids)).mean(),
#     )
#     models[name].eval()
#     print(
#         f"{text.name}, {name:7s} loss of the last steps {sum(losses[-50:]) / len(losses[-50:]):.2f}"
#     )

# %% [markdown]
# The first model is then run in three ways: as trained; with a window of 8; and with 7 near keys and the first one, which is 8 again.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# i, j = torch.arange(T)[:, None], torch.arange(T)
# ways = {
#     "as trained": (models["full"], None),
#     "run with a window of 8": (models["full"], Mask(window=W)),
#     "run with 7 keys and the first": (
#         models["full"],
#         Mask(allowed=(i - j < W - 1) | (j == 0)),
#     ),
#     "trained with a window of 8": (models["window"], None),
# }
# rows = val_ids.unfold(0, T + 1, T)
# rows = rows if at_full_scale else rows[:4]
# with torch.inference_mode():
#     nats = {
#         name: torch.cat([next_token_nats(m, begun(r), mask) for r in rows.split(64)]).mean(dim=0)
#         for name, (m, mask) in ways.items()
#     }
# later = {name: found[W:].mean().item() for name, found in nats.items()}
# for name, value in later.items():
#     print(f"{name:30s} {value:.3f} nats a character from position {W} on")
# if at_full_scale and text.name == "shakespeare":
#     assert later["run with a window of 8"] > later["run with 7 keys and the first"]
#     just, far = (
#         [found[part].mean() for found in list(nats.values())[:3]]
#         for part in (slice(W, 2 * W), slice(2 * W, T))
#     )
#     shares = [((run - kept) / (run - whole)).item() for whole, run, kept in (just, far)]
#     print(
#         f"won back by the first key: {shares[0]:.0%} up to position {2 * W}, then {shares[1]:.0%}"
#     )
#     assert shares[0] > 0.75
#     assert 0.25 < shares[1] < 0.75

# %% mystnb={"figure": {"caption": "A window put on a model that was trained without one costs something as soon as the first key is out of sight. Keeping the first key wins part of it back, with no more keys. The lowest line is another model, trained with the window, and differs from the first position on.", "name": "fig-sinks"}, "image": {"alt": "Loss above that of the full model, by position, for three ways. Run with a window, the line is zero up to position 8 and positive from there on. With the first key kept it is lower. The line of the model trained with the window lies below zero everywhere."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.9))
# for (name, found), marker in zip(list(nats.items())[1:], "os^", strict=True):
#     extra = (found - nats["as trained"]).view(-1, 4).mean(dim=1)  # four positions a point
#     ax.plot(torch.arange(2, T + 2, 4), extra, marker + "-", label=name)
# ax.axhline(0, color="#666666", linewidth=1)
# ax.set(xlabel="position", ylabel="nats above the full model")
# ax.legend(loc="upper left", bbox_to_anchor=(0, -0.22), ncols=2);

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import record_attention
#
# with torch.inference_mode(), record_attention(models["full"]) as maps:
#     models["full"].decode(begun(rows[:, :T]))
# even = (1 / (torch.arange(T // 2, T) + 1)).mean()
# print(f"{'an even share for the first key':34s} {even:.3f}")
# first = {name: w[:, :, T // 2 :, 0].mean(dim=(0, 2)) for name, w in maps.items()}
# for name, heads in first.items():
#     print(f"{name:34s}", "  ".join(f"{w:.3f}" for w in heads))
# if at_full_scale and text.name == "shakespeare":
#     lower, upper = first.values()
#     second, most = lower.sort().values[-2:]
#     assert most > 5 * even
#     assert 1.5 * even < second < 3 * even
#     assert upper.max() < even / 10

# %% [markdown]
# In {numref}`fig-sinks` the two upper lines are zero for the first eight positions, since there the window hides nothing. After that the full model pays for the window. The first key carries no information: it is the same in every text. And still, to have it back helps. Just behind the edge it wins back nearly the whole loss; further on about half, because there the lost context counts, too.
#
# The last output shows who uses it. One head of the first layer gives the first key many times the even share, another about twice that share, and the other two stay near it. The four heads of the second layer give it nothing. So in this small model a single head is most of the sink.
#
# The lowest line is not comparable in the same way. It is a second training run, with one seed, as the first. It is better even in the first eight positions, where nothing is hidden from either model. So it is a difference of two runs, and no proof that a window helps.
#
# The effect is small here. Large models lean on their sinks far more, and for them it decides between text and noise {cite:p}`xiao2024efficient`. They also count positions within the cache, so that the kept first tokens and the near ones are numbered without a gap; here each key keeps its true position. The lesson holds at either size: the window is a part of the training.

# %% [markdown]
# ## Measured
#
# The line from the ablation matrix of Chapter 35: the same budget, three seeds. The window and the length of the texts stand below the table.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from contextlib import suppress
#
# from transformer_annotated.book import measured, results
#
# print(measured("window"))
# with suppress(FileNotFoundError):  # the matrix has not been run
#     lines = [line for line in results("ablation") if line["row"] == "window"]
#     budgets = {(x["scale"], x["budget"]["window"], x["budget"]["length"]) for x in lines}
#     for name, window, length in sorted(budgets):
#         print(f"{name} scale: W = {window}; texts of {length} characters")

# %% [markdown]
# A window can change something only where a text is longer than it. The crops of text are many times as long. Sentences are short; in the toy language of the small scale about half of them are longer than eight words. So the window can matter on both tasks there. Look at whether the ranges overlap before you read a difference into the means. And a difference on so short a budget says nothing about a longer one.

# %% [markdown]
# ## What the papers say, and what production does
#
# - *2017.* Section 4 of the paper mentions it: self-attention "restricted to considering only a neighborhood of size $r$", as future work {cite:p}`vaswani2017attention`.
# - *Sparse patterns.* {cite:t}`child2019generating` mix near keys with keys at regular distances. Longformer has a window on both sides, and a few tokens that see and are seen by all {cite:p}`beltagy2020longformer`.
# - *Every layer.* Mistral 7B v0.1: $W = 4096$ in all 32 layers, and a ring of 4,096 rows for each {cite:p}`jiang2023mistral`. Version 0.2 dropped the window.
# - *In turn.* Gemma 2 alternates one windowed layer of 4,096 with one full; Gemma 3 has five of 1,024 for each full one {cite:p}`gemma2024gemma2,gemma2025gemma3`. gpt-oss alternates a window of 128 with full attention, and gives each head a learned number in its softmax that works as a sink {cite:p}`openai2025gptoss`.
#
# ## How it breaks
#
# - *One off.* $W + 1$ keys or $W - 1$: trains well, and published weights give wrong logits, only for texts longer than the window. Test with such texts.
# - *The cache keeps too few.* The same symptom, in decoding only. Compare cached with uncached, token by token, well beyond $W$.
# - *A view is kept.* The last rows of a long prompt are a view, and the whole prompt stays in memory. Measure the storage, not the shape.
# - *Full layers are trimmed, too.* A mixed model forgets. It shows only beyond the window.
# - *A window in a model that was trained without.* It runs. Measure the loss by position before you trust it.
#
# ## Takeaways
#
# - A causal window of $W$ shows $W$ keys, the query's own among them: {eq}`eq-window`.
# - A stack of $N$ reaches $N(W - 1)$ positions back, ever more weakly: {eq}`eq-reach`. One full layer reaches all.
# - A layer needs the last $W - 1$ tokens and no more. Held and predicted bytes are equal.
# - A window is part of the training, not a switch to turn afterwards.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 33.1.** Mistral 7B has 32 layers with $W = 4096$. How many positions back can the last layer's output depend on? Answer with a number.

# %% tags=["active-ipynb"]
# answer = ...
# check("33.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 32 * (4096 - 1)
# check("33.1", answer)

# %% [markdown]
# **Exercise 33.2.** Five layers with $W = 1024$ and one full layer in turn, 48 layers in all, after 131,072 tokens. What share of the full model's cache is held? Answer with a number between 0 and 1.

# %% tags=["active-ipynb"]
# answer = ...
# check("33.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = (40 * 1023 + 8 * 131_072) / (48 * 131_072)
# check("33.2", answer)

# %% [markdown]
# **Exercise 33.3.** {cite:t}`child2019generating` let a query see near keys, and of the older ones every `stride`-th: those whose distance is a multiple of `stride`. Write `strided(T, window, stride)`: a bool tensor `(T, T)`, True where a query may see a key, for a causal stack.

# %% tags=["active-ipynb"]
# answer = ...
# check("33.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def strided(T: int, window: int, stride: int) -> Tensor:
#     back = torch.arange(T)[:, None] - torch.arange(T)
#     return (back >= 0) & ((back < window) | (back % stride == 0))
#
#
# check("33.3", strided)
