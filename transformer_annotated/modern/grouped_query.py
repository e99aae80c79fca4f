# %% [markdown]
r"""
# Multi-query and grouped-query attention

Several query heads can share one head of keys and values. The cache of a decoder shrinks by that factor, and a model that was trained
without sharing can be converted.
"""

# %% [markdown]
# A decoder that writes one token at a time keeps the keys and values of everything it has read. This chapter counts those bytes, makes them fewer, and measures what that costs and what it gains.

# %% mystnb={"figure": {"caption": "Chapter 32 of Part III: fewer heads of keys and values.", "name": "fig-map-grouped-query"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The eighth, Grouped queries, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(32);

# %%
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from transformer_annotated.paper.multi_head import MultiHeadAttention
from transformer_annotated.paper.parts import check_sizes, patch
from transformer_annotated.paper.transformer import Config, Transformer, tiled
from transformer_annotated.training.decoding import Cache

# %% [markdown]
# ## The change
#
# The paper's base model has eight heads. Each has its own queries, keys and values. The patch leaves eight heads of queries and makes two of keys and values, in every attention. (The paper that this chapter follows leaves the encoder's as they are; we come to the reason.)

# %%
def grouped_queries(n_kv_heads: int) -> dict[str, int]:
    """The patch: K heads of keys and values (Ainslie et al. 2023, section 2.2), in every attention.

    The paper leaves the encoder's as they are. K = 1 is multi-query attention (Shazeer 2019), K = H is multi-head attention. K must divide
    every H, which the model checks when it is built.

    Raises ValueError for `n_kv_heads` below 1.
    """
    check_sizes(n_kv_heads=n_kv_heads)
    paths = ("self_attention.n_kv_heads", "cross_attention.n_kv_heads")
    return dict.fromkeys(paths, n_kv_heads)

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, diff
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, grouped_queries(2))))

# %% mystnb={"figure": {"caption": "The patch changes both attentions of every layer, inside the module; no other box notices.", "name": "fig-seams-grouped-query"}, "image": {"alt": "The two stacks of boxes of the Transformer. Self-attention in both stacks and cross-attention in the decoder are coloured."}} tags=["active-ipynb"]
# figures.seams(["self_attention", "cross_attention"]);

# %% [markdown]
# ## What one token reads
#
# To write one token, a decoder multiplies one vector by every weight. It also reads every key and every value in its cache. Weights are read once for all rows of a batch. The cache belongs to one row, and the next row has another.
#
# Take a model as large as GPT-3 {cite:p}`brown2020language`: $N = 96$ layers, $H = 96$ heads of $d = 128$ numbers, two bytes a number. A key and a value for each head and layer:

# %% tags=["active-ipynb"]
# per_token = 2 * 96 * 96 * 128 * 2
# print(f"one token: {per_token:,} bytes")
# row = 2048 * per_token / 2**30
# print(f"2,048 tokens: {row:.1f} GiB a row, {64 * row:.0f} GiB for 64 rows")
# print(f"all weights: {2 * 175e9 / 2**30:.0f} GiB, once for the whole batch")

# %% [markdown]
# With 64 rows the caches are larger than the model. They must lie in memory, and every step reads them all. A processor multiplies faster than its memory delivers, so this reading is most of the time {cite:p}`shazeer2019fast,pope2023efficiently`.
#
# Look at the five factors of that product. Depth and width belong to the model. Two bytes a number can become one, at a loss of precision. What is left is how many heads have keys and values of their own. With $K$ for that number and $b$ bytes a number:
#
# $$
# \text{bytes of one token} = 2 \cdot N \cdot K \cdot d \cdot b
# $$ (eq-cache-bytes)
#
# In 2017, $K = H$. If all queries share one head of keys and one of values, $K = 1$, it is **multi-query attention** {cite:p}`shazeer2019fast`. Anything between is **grouped-query attention** {cite:p}`ainslie2023gqa`.

# %% tags=["hide-input"]
def draw_groups(H: int = 8, counts: tuple[int, ...] = (8, 2, 1)) -> Any:
    """Draw which query head reads which head of keys and values, for several K."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    axes = plt.subplots(1, len(counts), figsize=(7.2, 2.1))[1]
    for ax, K in zip(axes, counts, strict=True):
        for h in range(H):
            g = h * K // H
            x, color = (g + 0.5) * H / K - 0.5, "#666666" if K == H else COLORS[g]
            ax.plot([h, x], [1, 0], color=color, linewidth=1.2, zorder=1)
            ax.scatter(h, 1, s=90, color=color, zorder=2)
            ax.scatter(x, 0, s=130, marker="s", color=color, zorder=2)
        ax.set(xlim=(-0.8, H - 0.2), ylim=(-0.35, 1.35), title=f"H = {H}, K = {K}")
        ax.set_axis_off()
    axes[0].text(-1.2, 1, "queries", ha="right", va="center", fontsize=9)
    axes[0].text(-1.2, 0, "keys,\nvalues", ha="right", va="center", fontsize=9)
    return axes

# %% mystnb={"figure": {"caption": "Eight heads of queries read eight, two or one head of keys and values. Neighbours share.", "name": "fig-groups"}, "image": {"alt": "Three drawings. Above, eight circles; below, eight, two and one squares. Lines join each circle to a square: one to one, four neighbours to one, all to one."}} tags=["active-ipynb"]
# draw_groups();

# %% [markdown]
# In {numref}`fig-groups` a circle is a head of queries and a square is a head of keys and values. A colour is a group; on the left, nobody shares. The cache holds the squares. In a formula, with heads counted from 0:
#
# $$
# \mathrm{head}_h = \mathrm{Attention}\bigl(X W^Q_h,\; M W^K_{g},\; M W^V_{g}\bigr), \qquad g = \lfloor h K / H \rfloor
# $$ (eq-grouped)
#
# It is {eq}`eq-multi-head` with another index on two matrices. Every query head still weighs the positions in its own way. It chooses among keys that its neighbours use, too.
#
# ## The code
#
# It has stood in `MultiHeadAttention` since Chapter 4: `n_kv_heads` is $K$, and `attend` repeats each key head $H / K$ times before it multiplies. So the patch is one number, in three places, and it remains to prove it. A model that shares heads must equal a model that does not share and happens to hold the same head $H / K$ times. In the gradient, a shared head collects what its copies would get: the sum.
#
# `spread` makes the copies, straight from {eq}`eq-grouped`. It serves weights and biases.

# %% tags=["active-ipynb"]
# def spread(tensor: Tensor, K: int, H: int) -> Tensor:
#     """K heads of d rows, `(K * d, ...)`, as H heads: head h is head `h * K // H`."""
#     heads = tensor.unflatten(0, (K, -1))
#     return torch.cat([heads[h * K // H] for h in range(H)])
#
#
# H, K, d, D = 4, 2, 4, 16
# torch.manual_seed(0)
# shared, copies = MultiHeadAttention(D, H, n_kv_heads=K).double(), MultiHeadAttention(D, H).double()
# for parameter in shared.parameters():
#     torch.nn.init.normal_(parameter, std=0.5)
# state = shared.state_dict()
# for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
#     state[name] = spread(state[name], K, H)
# copies.load_state_dict(state);

# %% tags=["active-ipynb"]
# x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
# a, b = shared(x), copies(x)
# direction = torch.randn_like(a)
# mine = torch.autograd.grad(a, [x, shared.k_proj.weight, shared.v_proj.weight], direction)
# theirs = torch.autograd.grad(b, [x, copies.k_proj.weight, copies.v_proj.weight], direction)
# summed = [theirs[0], *(g.view(K, H // K, d, D).sum(dim=1).view(K * d, D) for g in theirs[1:])]
# for left, right in zip((a, *mine), (b, *summed), strict=True):
#     torch.testing.assert_close(left, right, rtol=0, atol=1e-10)
# print("output and three gradients equal, to 1e-10")

# %% [markdown]
# The other end is $K = H$. It must be the paper's model, bit for bit.

# %% tags=["active-ipynb"]
# SMALL = {
#     "vocab_size": 50,
#     "d_model": 32,
#     "n_layers": 2,
#     "dropout": 0.0,
#     "ffn.d_ff": 64,
#     "self_attention.n_heads": 8,
#     "cross_attention.n_heads": 8,
# }
# small = patch(PAPER_BASE, SMALL)
# src, tgt = torch.randint(4, 50, (3, 7)), torch.randint(4, 50, (3, 20))
# logits = []
# for config in (small, patch(small, grouped_queries(8))):
#     torch.manual_seed(0)
#     logits.append(Transformer(config)(src, tgt))
# assert torch.equal(*logits)
# print("K = H: the same logits, bit for bit")
# try:
#     Transformer(patch(small, grouped_queries(3)))
# except ValueError as error:
#     print(error)

# %% [markdown]
# ## Fewer parameters, too
#
# $W^K$ and $W^V$ shrink as well. A comparison at equal size should give the parameters back, and the usual place is the feed-forward network. Each unit of it costs $2D + 1$ numbers: a row, a bias and a column. The paper's model has twelve such networks, so one more unit in each costs twelve times that.

# %% tags=["active-ipynb"]
# from transformer_annotated.paper.transformer import count_parameters
#
# whole = count_parameters(PAPER_BASE)["total"]
# for K in (8, 4, 2, 1):
#     count = count_parameters(patch(PAPER_BASE, grouped_queries(K)))["total"]
#     wider = (whole - count) / (12 * (2 * 512 + 1))
#     print(f"K = {K}: {count:11,} parameters; given back, nearly, by d_ff = {2048 + wider:.0f}")

# %% [markdown]
# {cite:t}`shazeer2019fast` did just that. His translation model had $D = 1024$, eight heads of 128 and $F = 4096$; with $K = 1$ in all 18 attentions (6 in the encoder, 12 in the decoder) he widened $F$ to 5440. His formulas have no biases, so a unit costs $2D$, in each of 12 networks. The arithmetic agrees:

# %% tags=["active-ipynb"]
# saved = 18 * 2 * 1024 * (8 - 1) * 128
# print(4096 + saved / (12 * 2 * 1024))

# %% [markdown]
# ## Bytes, predicted
#
# `cache_bytes` is {eq}`eq-cache-bytes`, summed over the layers that a config describes. It knows three things more. Cross-attention keeps the keys of the source, which do not grow. Layers may differ. And a layer with a window keeps less; that is the next chapter's.

# %%
def cache_bytes(
    config: Config,
    length: int,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    source_length: int = 0,
) -> int:
    """Bytes of the keys and values that decoding must keep after `length` tokens.

    A self-attention with a window of W keeps the last W - 1 tokens: the next one brings its own
    key. Positions, which no formula of attention needs, are not counted.

    Args:
        config: has a decoder made of `MultiHeadAttention`.
        length: target tokens read so far, in each row.
        batch: number of rows.
        dtype: of the keys and values.
        source_length: tokens of the memory, for cross-attention.

    Raises:
        ValueError: a config without a decoder or with an attention of another class, a negative
            length, `batch` below 1.
    """
    if config.decoder is None:
        raise ValueError("config must have a decoder, and this one has none")
    check_sizes(batch=batch)
    for name, value in (("length", length), ("source_length", source_length)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    numbers = 0
    for i in range(config.decoder.n_layers):
        own, cross = (
            tiled(config.decoder.self_attention, i),
            tiled(config.decoder.cross_attention, i),
        )
        for part, rows in ((own, length), (cross, source_length)):
            if part is None:
                continue
            if part.target is not MultiHeadAttention:
                raise ValueError(f"config must have MultiHeadAttention alone, got {part!r}")
            H, K = part.kwargs["n_heads"], part.kwargs["n_kv_heads"]
            d = part.kwargs["head_dim"] or config.d_model // H
            if part is own and part.kwargs["window"] is not None:
                rows = min(rows, part.kwargs["window"] - 1)
            numbers += 2 * batch * rows * (K or H) * d
    return numbers * dtype.itemsize

# %% [markdown]
# A prediction is worth what its measurement says. `held_bytes` asks the tensors of a real cache (Chapter 20). There are two numbers. The store of a layer doubles when it is full, so it has room for more than it holds: its *capacity*.

# %%
def held_bytes(cache: Sequence[Any]) -> tuple[int, int]:
    """Bytes of the keys and values that a cache holds: those in use, and all that it reserved.

    `cache` is a `Cache`, or some of its layers.
    """
    used = reserved = 0
    for layer in cache:
        own, cross = layer.self_attention, layer.cross_attention
        tensors = [] if own._store is None else [(own._store[: own.length], own._store)]
        tensors += [] if cross._kept is None else [(x, x) for x in cross._kept[:2]]
        used += sum(part.numel() * part.element_size() for part, _ in tensors)
        reserved += sum(whole.untyped_storage().nbytes() for _, whole in tensors)
    return used, reserved

# %% tags=["active-ipynb"]
# print("  K  tokens     predicted        in use      reserved")
# for K in (8, 2, 1):
#     config = patch(small, grouped_queries(K))
#     model = Transformer(config).eval()
#     with torch.no_grad():
#         memory, cache = model.encode(src), Cache(model)
#         for t in range(20):
#             model.decode(tgt[:, t : t + 1], memory, positions=torch.tensor([[t]]), cache=cache)
#             predicted = cache_bytes(config, t + 1, batch=3, source_length=7)
#             used, reserved = held_bytes(cache)
#             assert used == predicted
#             if t + 1 in (16, 17, 20):
#                 print(f"{K:3d}{t + 1:8d}{predicted:14,}{used:14,}{reserved:14,}")

# %% [markdown]
# In use equals predicted, at each of 20 lengths, to the byte. Reserved jumps at token 17: sixteen places were full, and the store moved to 32. It less than doubles, because a part of it is the store of cross-attention, which stays. A production server would rather hand out memory in small blocks than double it {cite:p}`kwon2023efficient`.
#
# ## Bytes, published
#
# The same function counts models that do not fit on this machine. It needs four numbers of each, from the papers and the published config files {cite:p}`brown2020language,chowdhery2023palm,almazrouei2023falcon,touvron2023llama2,grattafiori2024llama3,jiang2023mistral`. Sixteen bits a number; no window; 128 K is 131,072 tokens, whether or not the model was made for so many.

# %% tags=["active-ipynb"]
# from transformer_annotated import DECODER_ONLY
#
# PUBLISHED = {  # layers, heads, key heads, numbers in a head
#     "GPT-3 175B": (96, 96, 96, 128),
#     "PaLM 540B": (118, 48, 1, 256),
#     "Falcon 7B": (32, 71, 1, 64),
#     "Llama 2 7B": (32, 32, 32, 128),
#     "Llama 2 70B": (80, 64, 8, 128),
#     "Llama 3 8B": (32, 32, 8, 128),
#     "Llama 3 70B": (80, 64, 8, 128),
#     "Mistral 7B": (32, 32, 8, 128),
# }

# %% tags=["active-ipynb"]
# print("                 H   K   KiB a token   GiB at 128 K   with K = H")
# for name, (n_layers, H, K, head_dim) in PUBLISHED.items():
#     sizes = {"n_heads": H, "head_dim": head_dim}
#     sizes = {f"self_attention.{key}": value for key, value in sizes.items()}
#     config = patch(PAPER_BASE, DECODER_ONLY, sizes, {"decoder.n_layers": n_layers})
#     shared = patch(config, grouped_queries(K))
#     token, long, whole = (
#         cache_bytes(c, n, dtype=torch.bfloat16)
#         for c, n in ((shared, 1), (shared, 2**17), (config, 2**17))
#     )
#     print(f"{name:14s}{H:4d}{K:4d}{token / 2**10:14,.0f}{long / 2**30:15.1f}{whole / 2**30:13.1f}")

# %% [markdown]
# Compare the rows of Llama 2. The larger model has ten times the parameters and a smaller cache. In the last column one row of 128 K tokens takes 64 GiB or more, most of a card of 80 GB. For the largest it takes several cards. That is why long texts and sharing came together.
#
# Why eight, so often? A large model is spread over several cards, by heads. With eight cards and $K = 8$ each card holds one head of keys and values. With $K = 1$ every card needs a copy of the same one, and nothing more is saved {cite:p}`ainslie2023gqa,pope2023efficiently`.
#
# ## Does it get faster?
#
# Fewer bytes should be read in less time. But the formula of Chapter 3, as written, repeats the shared heads first: it makes the copies that we wanted to be rid of. There is a way without copies. One new query stands in each head. Heads that share keys can be laid side by side as if they were several positions of one head:

# %% tags=["active-ipynb"]
# from statistics import median
#
# from transformer_annotated import attend, sdpa
# from transformer_annotated.book import machine, scale
# from transformer_annotated.training.speed import race
#
# full = scale() == "full"
#
#
# def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
#     """`attend` for one query a head, without copies: `(B, H, 1, d)` as `(B, K, H / K, d)`."""
#     B, H, _, d = q.shape
#     return attend(q.view(B, k.shape[1], -1, d), k, v).view(B, H, 1, d)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# B, H, S, d = (8, 8, 1024, 64) if full else (1, 8, 16, 4)
# runs = {}
# for K in (8, 2, 1):
#     q, store = torch.randn(B, H, 1, d), torch.randn(S, 2, B, K, d)
#     k, v = store.permute(1, 2, 3, 0, 4)  # as the cache keeps them
#     torch.testing.assert_close(folded(q, k, v), attend(q, k, v))
#     for way in (attend, sdpa, folded):
#         runs[way.__name__, K] = lambda way=way, q=q, k=k, v=v: way(q, k, v)
# with torch.inference_mode():
#     times = race(runs, 11 if full else 1)
# print("one new token against", S, "keys, milliseconds of processor time; median, in turns")
# for way in ("attend", "sdpa", "folded"):
#     found = [f"K = {K}: {1e3 * median(times[way, K]):6.2f}" for K in (8, 2, 1)]
#     print(f"{way:8s}", "   ".join(found))
# print(machine())

# %% [markdown]
# The first line is the warning: `attend` gains least from sharing, because it copies. The last line is what a kernel for grouped queries does. A key that is read once serves $H / K$ queries: more arithmetic for each byte. `sdpa` gains more than `attend` and less than `folded`. We use it below because it serves a mask and many queries, too. (Chapter 21 used the same idea for beams that share a sentence.)
#
# That was attention alone. A whole step also multiplies by every weight, and no cache makes that cheaper. So measure whole steps of a small model, with SDPA, after a long prompt:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import SDPA
# from transformer_annotated.modern.language_model import language_model
#
# length, B = (1024, 8) if full else (8, 2)
# sizes = {"d_model": 256, "d_ff": 1024} if full else {"d_model": 32}
#
#
# def one_step(K: int) -> Callable[[], None]:
#     config = patch(language_model(64, n_heads=8, **sizes), SDPA, grouped_queries(K))
#     model = Transformer(config).eval()
#     cache, ids = Cache(model), torch.randint(64, (B, length))
#     with torch.inference_mode():
#         model.decode(ids, positions=torch.arange(length)[None], cache=cache)
#
#     def step() -> None:
#         at = torch.tensor([[cache.length]])
#         with torch.inference_mode():
#             model.logits(model.decode(ids[:, :1], positions=at, cache=cache))
#
#     return step
#
#
# times = race({K: one_step(K) for K in (8, 2, 1)}, 9 if full else 1)
# for K, seconds in times.items():
#     ratio = median(a / b for a, b in zip(times[8], seconds, strict=True))
#     print(f"K = {K}: {1e3 * median(seconds):6.2f} ms a step, {ratio:.2f} times the speed of K = 8")
# print(machine())

# %% [markdown]
# Here the weights of the model and the overhead of each operation take their share. Where the cache is many times as large as here, the bytes decide. On this page the bytes are exact, and the seconds belong to the machine that the last line names.
#
# ## A trained model, converted
#
# {cite:t}`ainslie2023gqa` start from a trained multi-head model. The matrices of a group's key heads are replaced by their mean, and so are those of its value heads. Then training goes on for a twentieth of the steps it had. They call it **uptraining**.
#
# The group must be the one that will share: neighbours, as in {eq}`eq-grouped`. Heads 0 and 2 make a mean of the same shape, and every test of shapes passes.
#
# `fewer_heads` does the cutting, and leaves open how a group becomes one head. All other tensors are copied as they are.

# %%
def fewer_heads(
    model: Transformer, n_kv_heads: int, join: Callable[[Tensor], Tensor]
) -> Transformer:
    """A copy of `model` with K heads of keys and values in every attention.

    Args:
        model: stays as it is.
        n_kv_heads: K, a divisor of the number of key heads of each attention.
        join: makes one head of each group of neighbours: `(K, group, d, ...)` to `(K, d, ...)`.
            It is called with the weights `(K, group, d, D)` of the projections of keys and of
            values, and with their biases `(K, group, d)`.

    Raises:
        ValueError: K below 1, or no divisor of some attention's key heads.
    """
    check_sizes(n_kv_heads=n_kv_heads)
    found = {n: m for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}
    for name, module in found.items():
        if module.n_kv_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads must divide the {module.n_kv_heads} key heads of "
                             f"{name}, got {n_kv_heads}")  # fmt: skip
    state = model.state_dict()
    for name, module in found.items():
        for part in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
            if (key := f"{name}.{part}") in state:  # (heads * d, D), or (heads * d,) for a bias
                heads = state[key].unflatten(0, (n_kv_heads, -1, module.head_dim))
                state[key] = join(heads).flatten(0, 1)
    with torch.random.fork_rng(devices=[]):  # the first weights are drawn, and replaced
        new = Transformer(patch(model.config, grouped_queries(n_kv_heads)))
    like = next(model.parameters())
    new.to(device=like.device, dtype=like.dtype).train(model.training)
    new.load_state_dict(state)
    return new

# %% [markdown]
# The mean is one choice.

# %%
def mean_pooled(model: Transformer, n_kv_heads: int) -> Transformer:
    """`model` with each group of key heads, and of value heads, replaced by its mean.

    This is how a trained multi-head model becomes one with K heads (Ainslie et al. 2023, section
    2.1); some steps of training should follow. A group is what shares a head afterwards:
    neighbours.

    Raises ValueError as `fewer_heads` does.
    """
    return fewer_heads(model, n_kv_heads, lambda heads: heads.mean(dim=1))

# %% [markdown]
# One test needs no training. If the heads of each group are equal already, joining them must change nothing. `copies`, from the proof above, is such a module; here is a whole model of them.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# two = Transformer(patch(small, grouped_queries(2))).eval()
# eight = Transformer(small).eval()
# state = eight.state_dict() | {
#     n: p for n, p in two.state_dict().items() if "k_proj" not in n and "v_proj" not in n
# }
# for name, tensor in two.state_dict().items():
#     if "k_proj" in name or "v_proj" in name:
#         state[name] = spread(tensor, 2, 8)
# eight.load_state_dict(state)
# back = mean_pooled(eight, 2)
# print("eight heads equal two:", torch.allclose(eight(src, tgt), two(src, tgt), atol=1e-5))
# print("converted back:", torch.equal(back(src, tgt), two(src, tgt)))
# assert all(torch.equal(p, two.state_dict()[name]) for name, p in back.state_dict().items())

# %% [markdown]
# Now a trained model. It is the character model of Chapter 25 with the norm in front (Chapter 26) and eight heads.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.modern.language_model import (
#     Characters,
#     any_text,
#     bits_per_byte,
#     train_language_model,
# )
# from transformer_annotated.modern.pre_ln import PRE_LN
#
# text = any_text()
# characters = Characters(text.train + text.val + text.test)
# ids = torch.tensor(characters.encode(text.train))
# held_out = text.val[: 16_000 if full else 300]
# val = torch.tensor(characters.encode(held_out))
#
#
# def score(model: Transformer) -> float:
#     return bits_per_byte(model, val, len(held_out.encode()))
#
#
# config = patch(language_model(characters.vocab_size, n_heads=8), PRE_LN)
# torch.manual_seed(0)
# trained = Transformer(config)
# train_language_model(trained, ids, steps=600 if full else 3, rate=3e-3)
# trained_bits = score(trained)
# print(f"{text.name}: {trained_bits:.2f} bits a byte with eight heads of keys and values")

# %% [markdown]
# Three ways to make $K$ heads of eight: the mean of each group; one head of each, which may be the first or any other; and, as the worst case, fresh random ones. All keep the rest of the model. Score them at once, before any further training. Each head is tried, and random heads are drawn three times: how far do choices of the same kind differ?

# %% tags=["active-ipynb"]
# def random_heads(K: int, seed: int) -> Transformer:
#     torch.manual_seed(seed)
#     fresh = Transformer(patch(config, grouped_queries(K))).state_dict()
#     new = mean_pooled(trained, K)
#     chosen = {n: p for n, p in fresh.items() if "k_proj" in n or "v_proj" in n}
#     new.load_state_dict(new.state_dict() | chosen)
#     return new
#
#
# def ways(K: int) -> dict[str, list[Transformer]]:
#     """The trained model with K heads of keys and values, made in each way."""
#     heads = [fewer_heads(trained, K, lambda group, j=j: group[:, j]) for j in range(8 // K)]
#     drawn = [random_heads(K, seed) for seed in (1, 2, 3)]
#     return {"mean": [mean_pooled(trained, K)], "one head": heads, "random": drawn}

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print(f"bits a byte, at once; {trained_bits:.2f} before")
# at_once = {K: {way: [score(m) for m in models] for way, models in ways(K).items()} for K in (2, 1)}
# for K, found in at_once.items():
#     for way, values in found.items():
#         print(f"K = {K}  {way:9s}", "  ".join(f"{v:.2f}" for v in values))
#     if full and text.name == "shakespeare":
#         assert all(v > trained_bits + 0.2 for values in found.values() for v in values)

# %% [markdown]
# Every conversion costs much. Among trained heads it matters which one is kept, and three draws of random heads differ about as much by chance. So a difference of 0.1 between two *ways* says little here.
#
# Now train each model of $K = 2$ for 80 steps more. The first training had 600. So this is two fifteenths of it, more than the twentieth of the paper, and the rate falls to 0 a second time. Some gain may come without any conversion. So a copy of the unchanged model takes the same 80 steps: the control. What is left of the loss is the distance to *its* curve.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from copy import deepcopy
#
# at = (20, 40, 80) if full else (2,)
#
#
# def up_train(model: Transformer) -> dict[int, float]:
#     found = {0: score(model)}
#
#     def look(step: int, loss: float) -> None:
#         if step in at:
#             found[step] = score(model)
#
#     train_language_model(model, ids, steps=at[-1], rate=1e-3, seed=1, on_step=look)
#     return found
#
#
# made = {"unchanged": [deepcopy(trained)], **ways(2)}
# curves = {way: [up_train(model) for model in models] for way, models in made.items()}

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print("K = 2; bits a byte after step", "".join(f"{n:8d}" for n in (0, *at)))
# for way, found in curves.items():
#     for curve in found:
#         print(f"{way:29s}", "".join(f"{v:8.2f}" for v in curve.values()))
# if full and text.name == "shakespeare":
#     (control,), last = curves["unchanged"], at[-1]
#     kept = curves["mean"] + curves["one head"]
#     assert all(c[last] - control[last] < (c[0] - control[0]) / 2 for c in kept)
#     assert max(c[last] for c in kept) < min(c[last] for c in curves["random"])

# %% mystnb={"figure": {"caption": "Left: at once, each conversion is much worse than the model before (dashed), and which head is kept matters as much as whether the mean is taken. Right: 80 steps win more than half of the loss back for means and for kept heads; random heads stay behind.", "name": "fig-uptraining"}, "image": {"alt": "Left, dots of bits a byte for K = 2 and K = 1: one for the mean, several for single heads around it, three for random heads above. Right, curves against steps for K = 2: the random heads on top, below them the mean within a band of single heads, and at the bottom the unchanged model, nearly flat."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True, width_ratios=(1, 1.6))
# looks = {"mean": "C0", "one head": "C1", "random": "C3", "unchanged": "#666666"}
# for place, found in enumerate(at_once.values()):
#     for shift, (way, values) in enumerate(found.items()):
#         x = [place + 0.2 * (shift - 1)] * len(values)
#         axes[0].plot(x, values, "o", color=looks[way], alpha=0.8)
# axes[0].axhline(trained_bits, color=looks["unchanged"], linewidth=1, linestyle="--")
# axes[0].set_xticks((0, 1), ("K = 2", "K = 1"))
# axes[0].set(ylabel="bits a byte", title="at once", xlim=(-0.5, 1.5))
# for way, found in curves.items():
#     steps, rows = list(found[0]), torch.tensor([list(curve.values()) for curve in found])
#     low, high = rows.amin(dim=0), rows.amax(dim=0)
#     axes[1].fill_between(steps, low, high, color=looks[way], alpha=0.25, linewidth=0)
#     axes[1].plot(steps, rows.mean(dim=0), "o-", color=looks[way], label=way)
# axes[1].set(title="K = 2, trained further", xlabel="steps after the conversion")
# axes[1].legend(ncols=2);

# %% [markdown]
# In {numref}`fig-uptraining` a band on the right goes from the best to the worst of its kind, and its line is their average. The random heads become alike. The trained heads keep their lead over them, so something of the first training is in them. The mean lies among the single heads, at the beginning and at the end.
#
# {cite:t}`ainslie2023gqa` find the mean best, then the first head, then random ones. After some steps the last place is the same here. Between the mean and a single head this page decides nothing: it depends on the head, and nobody knows beforehand which one is good. That speaks for the mean. It needs no luck.
#
# Why does it cost so much? Each query head has learned to speak to its own key head. Keep one head of four, and one query head in four meets the partner it knows; three meet a stranger. With the mean nobody meets a partner alone: a query's score is the average of its scores with all four, one partner and three strangers. Are the strangers at least alike? Compare the matrices of a group, in the trained model and in a fresh one:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def likeness(matrix: Tensor) -> tuple[float, float]:
#     """Two groups of four heads: their mean cosine, and how long the mean is beside a head."""
#     heads = matrix.detach().view(2, 4, -1)
#     unit = heads / heads.norm(dim=-1, keepdim=True)
#     cosines = (unit @ unit.transpose(1, 2))[:, *torch.triu_indices(4, 4, 1)]
#     shorter = heads.mean(dim=1).norm(dim=-1).mean() / heads.norm(dim=-1).mean()
#     return cosines.mean().item(), shorter.item()
#
#
# fresh = dict(Transformer(config).named_parameters())
# print(f"{'trained, and in brackets fresh':46s} cosine            length of the mean")
# for name, matrix in trained.named_parameters():
#     if name.endswith(("k_proj.weight", "v_proj.weight")):
#         (a, b), (c, e) = likeness(matrix), likeness(fresh[name])
#         print(f"{name:46s}{a:7.2f} ({c:5.2f}){b:14.2f} ({e:.2f})")

# %% [markdown]
# The cosines are near 0, and so are those of matrices that never saw a text. Training has not made the heads alike, number by number, and the mean of four is half as long as each. Be careful with the rest. A cosine compares numbers, not functions. Multiply a head's queries by an invertible matrix and its keys by the transposed inverse: every score stays, and the cosine with the neighbours becomes another one. Two heads may do the same work in different coordinates. Their mean does it no longer.
#
# Is it the length that hurts? Then it should help to make the mean as long as a head:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for K in (2, 1):
#     longer = fewer_heads(trained, K, lambda heads: heads.mean(dim=1) * heads.shape[1] ** 0.5)
#     print(f"K = {K}: mean {at_once[K]['mean'][0]:.2f}, made longer {score(longer):.2f}")

# %% [markdown]
# It does not help; the guess was wrong. Before you spend steps on a large model, try the ways on it.
#
# ## Measured
#
# The line from the ablation matrix of Chapter 35: the same budget, three seeds. There $K = H / 2$, in every attention, and the feed-forward network is widened until the model has about as many parameters as the paper's. The numbers of heads stand below the table.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from contextlib import suppress
#
# from transformer_annotated.book import measured, results
#
# print(measured("gqa"))
# with suppress(FileNotFoundError):  # the matrix has not been run
#     lines = [line for line in results("ablation") if line["row"] == "gqa"]
#     for name, H in sorted({(line["scale"], line["budget"]["n_heads"]) for line in lines}):
#         print(f"{name} scale: H = {H}, K = {H // 2}")

# %% [markdown]
# Look at whether the ranges overlap before you read a difference into the means. What the table can show is the price, at this size and on this budget. The gain is in the cache.

# %% [markdown]
# ## What the papers say, and what production does
#
# - *2017.* Every head has its own keys and values {cite:p}`vaswani2017attention`.
# - *Multi-query.* {cite:t}`shazeer2019fast` reports a minor loss of quality and decoding that is many times faster. PaLM and Falcon 7B use it {cite:p}`chowdhery2023palm,almazrouei2023falcon`.
# - *Grouped.* {cite:t}`ainslie2023gqa` find quality close to multi-head at a speed close to multi-query. They leave the encoder as it is, since it reads its sentence in one pass and keeps no cache. In this book that is a patch of two longer paths, `decoder.self_attention.n_kv_heads` and `decoder.cross_attention.n_kv_heads`.
# - *Now.* Llama 2 in its largest sizes, all of Llama 3, and Mistral have eight heads of keys and values {cite:p}`touvron2023llama2,grattafiori2024llama3,jiang2023mistral`.
# - *Another way.* DeepSeek-V2 keeps no heads at all {cite:p}`deepseek2024v2`. Each token leaves one short vector of 512 numbers in each layer, from which keys and values of all heads are computed, and 64 numbers that carry the position, for all heads together. It is called **multi-head latent attention**. This book does not build it; Exercise 32.1 counts it.
#
# ## How it breaks
#
# - *Strided groups.* `repeat` in place of `repeat_interleave`: head 1 reads key head 1, not 0. Fresh models train all the same. Published weights give nonsense. Compare with copies, as above.
# - *A cache of repeated keys.* The keys are repeated first and stored then. All numbers are right, and no byte is saved. Measure the tensors.
# - *Pooling across groups.* The mean is taken of heads that will not share. It looks like a bad start of up-training. Equal heads within a group show it at once.
# - *A kernel that copies.* Memory is saved and time is not. Look at the time of attention alone.
#
# ## Takeaways
#
# - A token costs $2 N K d b$ bytes of cache: {eq}`eq-cache-bytes`. Predicted and held are equal, to the byte.
# - $K$ heads are $H$ heads of which groups of neighbours are equal. $K = H$ is the paper's model.
# - Time follows bytes only where the kernel makes no copies.
# - A trained model can be converted, and trained further. Compare with a control that had the same further steps.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 32.1.** How many bytes of cache does one token take in 16 bits in Llama 3 70B (80 layers, 8 key heads of 128)? And in DeepSeek-V2: 60 layers, each keeping 512 + 64 numbers, with no factor 2? Answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("32.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [2 * 80 * 8 * 128 * 2, 60 * (512 + 64) * 2]
# check("32.1", answer)

# %% [markdown]
# **Exercise 32.2.** Twelve heads of queries, three of keys and values. Which key head does each query head read, counted from 0? Answer with a list of twelve numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("32.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [h * 3 // 12 for h in range(12)]
# check("32.2", answer)

# %% [markdown]
# **Exercise 32.3.** A file of weights comes from a program that shares in strides: there, query head $h$ reads key head $h \bmod K$. It has $H = 8$ and $K = 2$. `MultiHeadAttention` can serve it, if the query heads are loaded in another order (and with them the columns of $W^O$). In which? Answer with a list of eight numbers: the file's head that becomes head 0 here, then the one that becomes head 1, and so on.

# %% tags=["active-ipynb"]
# answer = ...
# check("32.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = sorted(range(8), key=lambda h: h % 2)  # the even heads, then the odd ones
# check("32.3", answer)
