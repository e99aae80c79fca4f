# %% [markdown]
r"""
# Speed

Where the time of a training step goes, and what gives some of it back without changing what is computed: a fused
norm, a cheaper dropout, memory that is kept, and, at the price of some digits, 16 bits.
"""

# %% [markdown]
# If a run takes a day and could take half a day, one experiment is lost. But a fast step that computes something else is no gain at all. So this chapter changes one part at a
# time, proves that the function stayed the same where it did, and measures.

# %% mystnb={"figure": {"caption": "Chapter 17 of Part II: the same step in less time.", "name": "fig-map-speed"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The sixth, Speed, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(17);

# %%
import ctypes
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from transformer_annotated.paper.add_norm import LayerNorm, PostNorm
from transformer_annotated.paper.embedding import Embedding, Sinusoid
from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, spec

# %% [markdown]
# ## How long must a step take?
#
# Take a small Transformer and one batch, and write a step as one function: the loss, its gradient, the optimiser. The loss is Chapter 15's, the optimiser Chapter 16's. With `half`, matrix products run in 16 bits; more on that below.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import machine, scale
# from transformer_annotated.paper.parts import patch
# from transformer_annotated.paper.toy import Batch
# from transformer_annotated.paper.transformer import PAPER_BASE, Transformer
# from transformer_annotated.training.objective import CrossEntropy
# from transformer_annotated.training.schedule import adam, set_rate
#
# torch.set_num_threads(1)
# full = scale() == "full"
# D, V, B, T = (256, 8000, 32, 32) if full else (32, 100, 2, 8)
# SIZES = {"d_model": D, "vocab_size": V, "n_layers": 3 if full else 1, "ffn.d_ff": 4 * D}
# SIZES |= {"self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# torch.manual_seed(0)
# src, tgt_in, tgt_out = (torch.randint(4, V, (B, T)) for _ in range(3))
# real = torch.ones(B, T, dtype=torch.bool)
# batch = Batch(src, tgt_in, tgt_out, real, real)
# print(machine())

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def step_of(*patches, half: bool = False, objective=CrossEntropy()) -> Callable[[], None]:
#     """One training step of a new model, as a function without arguments."""
#     torch.manual_seed(0)
#     model = Transformer(patch(PAPER_BASE, SIZES, *patches)).train()
#     optimizer = adam(model.parameters())
#     set_rate(optimizer, 1e-4)
#
#     def step() -> None:
#         optimizer.zero_grad()
#         with torch.autocast("cpu", torch.bfloat16, enabled=half):
#             found = objective(model, batch)
#         (found.loss / found.tokens).backward()
#         optimizer.step()
#
#     return step

# %% [markdown]
# Most of a step's work is matrix products, and for those the least time is known. Count the additions and multiplications of one step, its *floating-point operations*, FLOP for short. Then let the machine do nothing but one large matrix product, and see how many it manages in a second: its **peak**. The quotient is a time that this step, on this machine, will not undercut.
#
# Two habits make a measurement worth something. The clock counts the processor time of this program, so that other programs disturb it less. And variants take turns, in a random order, round after round, so that a slow minute hits all of them.

# %%
def race(
    runs: Mapping[str, Callable[[], Any]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds that each run takes, one entry a round, by `clock`: processor time unless given.

    Every round runs each once, in a new random order. Two rounds that do not count come first.
    Raises ValueError for `rounds` below 1.
    """
    check_sizes(rounds=rounds)
    order, rng = list(runs), random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 2):
        rng.shuffle(order)
        for name in order:
            start = clock()
            runs[name]()
            seconds[name].append(clock() - start)
    return {name: values[2:] for name, values in seconds.items()}

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from statistics import median
#
# from torch.utils.flop_counter import FlopCounterMode
#
# rounds, n = (5, 2048) if full else (1, 64)
# plain, plain_16 = step_of(), step_of(half=True)
# with FlopCounterMode(display=False) as counter:
#     plain()
# work = counter.get_total_flops()
# a = torch.randn(n, n)
# a_16 = a.bfloat16()
# times = race(
#     {"32": plain, "16": plain_16, "a @ a, 32": lambda: a @ a, "a @ a, 16": lambda: a_16 @ a_16},
#     rounds,
# )
# for bits in ("32", "16"):
#     peak = 2 * n**3 / median(times[f"a @ a, {bits}"])
#     print(
#         f"{bits} bits: peak {peak / 1e9:4.0f} GFLOP/s   least time {work / peak:.3f} s   "
#         f"the step takes {median(times[bits]):.3f} s"
#     )

# %% [markdown]
# `2 * n**3` is $n^2$ results of $n$ multiplications and $n$ additions each; a GFLOP is a thousand million. The least time divided by the measured one is the **share of peak**. It says how much is left to win, and no clever code wins more.
#
# ## Operation by operation
#
# Where is the rest? PyTorch calls a few dozen kinds of operations, and lets us intercept every call: a *dispatch mode* is asked instead of the operation. Ours starts the clock, calls the operation, and stops the clock.

# %%
class OperationTimes(TorchDispatchMode):
    """Inside `with OperationTimes() as times:`, `times.seconds` adds up processor time by operation.

    Forward, backward and the optimiser are seen. On a GPU operations return before they are done,
    and this clock would not see them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        start = time.process_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.overloadpacket.__name__] += time.process_time() - start
        return result

# %% tags=["active-ipynb", "nbval-ignore-output"]
# plain_16()
# with OperationTimes() as found:
#     plain_16()
# total = sum(found.seconds.values())
# for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1])[: 14 if full else 3]:
#     print(f"{name:26s}{1e3 * seconds:7.1f} ms {seconds / total:6.1%}")

# %% [markdown]
# `mm`, `addmm` and `bmm` are matrix products. The rest does little with each number. Its time goes into fetching and storing: for an addition of two tensors, a processor waits for memory more than it adds. So the way to save time is to touch memory less often, not to compute less.
#
# How much can one part give? If a share $f$ of the time becomes $s$ times as fast, the whole becomes faster by
#
# $$
# S = \frac{1}{(1 - f) + f / s}
# $$ (eq-amdahl)
#
# With $f = 0.1$ even $s = \infty$ gives $1.11$. This is Amdahl's law {cite:p}`amdahl1967validity`, and it tells where not to look.
#
# ## The norm
#
# Chapter 6 wrote layer normalisation in nine operations, each of which reads and writes the whole tensor. A **fused** operation reads once, keeps a row of $D$ numbers close by, and writes once. PyTorch has it. Our class keeps the parameters of Chapter 6, and changes the one line that computes.

# %%
class FusedNorm(LayerNorm):
    """`LayerNorm`, computed by one operation of PyTorch instead of nine."""

    def forward(self, x: Tensor) -> Tensor:
        """`(..., D)` to `(..., D)`."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

# %% tags=["active-ipynb"]
# ours, fused = LayerNorm(32).double(), FusedNorm(32).double()
# for parameter in ours.parameters():
#     nn.init.normal_(parameter)
# fused.load_state_dict(ours.state_dict())
# x = torch.randn(3, 5, 32, dtype=torch.float64, requires_grad=True)
# direction = torch.randn(3, 5, 32, dtype=torch.float64)
# pairs = [(ours(x), fused(x))]
# pairs += zip(
#     torch.autograd.grad(ours(x), [x, *ours.parameters()], direction),
#     torch.autograd.grad(fused(x), [x, *fused.parameters()], direction),
#     strict=True,
# )
# for a, b in pairs:
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print("output and three gradients equal Chapter 6's, to 1e-10")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# rows = torch.randn(B * T, D, requires_grad=True)
# norms = {"written out": LayerNorm(D), "fused": FusedNorm(D)}
# times = race(
#     {name: lambda norm=norm: norm(rows).sum().backward() for name, norm in norms.items()},
#     30 if full else 2,
# )
# for name, seconds in times.items():
#     print(f"{name:12s}{1e6 * median(seconds):8.0f} µs, forward and backward")

# %% [markdown]
# ## Dropout
#
# Dropout should cost next to nothing: a zero or a one for each number, and a product. It does not, because of the zeros and ones. PyTorch draws for each a random number of its own, and on a CPU that takes longer than the rest of dropout.
#
# A random number has 64 bits, and a mask needs few. With 16 bits for each element, one draw serves four. Say the rate is one tenth. Of the 65,536 values of 16 bits, 6,554 shall mean *drop*. By hand, for one word:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# word = torch.empty(1, dtype=torch.int64).random_(-(2**63), None)
# quarters = word.view(torch.int16)  # the same 64 bits, read as four numbers from -32768 to 32767
# print("four numbers", quarters.tolist())
# print("kept        ", (quarters >= -(2**15) + 6554).int().tolist())

# %% [markdown]
# Two details matter. `random_()` without arguments draws numbers that are not negative: the first of the 64 bits is always 0. Then one of the four 16-bit numbers is never negative. At a rate of one tenth only negative numbers mean *drop*, so one element in four would never be dropped. And the comparison itself is slow here, since it makes a tensor of bool that must be turned to numbers again. `clamp` does it in whole numbers. Let $l$ be the largest number that means *drop*. `clamp` turns everything below $l$ into $l$ and everything above $l + 1$ into $l + 1$. Subtract $l$, and 0 and 1 are left.

# %%
def kept(x: Tensor, p: float) -> tuple[Tensor, float]:
    """A random tensor like `x` of zeros and ones, and the number that a one is worth.

    An element is 0 with probability k / 65536, the multiple nearest to `p`, and the second result
    is 65536 / (65536 - k), so that the mean is exactly 1. Each element costs 16 random bits, from
    torch's generator for the device of `x`.

    Raises ValueError for `p` outside [0, 1).
    """
    check_rate("p", p)
    k = min(round(p * 2**16), 2**16 - 1)
    if k == 0:
        return torch.ones_like(x), 1.0
    n = x.numel()
    words = torch.empty(math.ceil(n / 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None)  # all 64 bits
    low = k - 2**15 - 1  # of the 65536 values, k are at most this
    mask = words.view(torch.int16)[:n].clamp_(low, low + 1).sub_(low)
    return mask.view(x.shape).to(x.dtype), 2**16 / (2**16 - k)


class FastDropout(nn.Dropout):
    """`nn.Dropout` with a cheaper mask; the rate is rounded to a multiple of 1/65536."""

    def forward(self, x: Tensor) -> Tensor:
        """`(...)` to `(...)`; `x` itself outside training."""
        if not self.training or self.p == 0.0:
            return x
        mask, worth = kept(x, self.p)
        return (x * mask).mul_(worth)

# %% [markdown]
# A random function cannot be proved equal to another number by number. What can be proved is its law. The rule from bits to zeros and ones can be tried on every one of the 65,536 values:

# %% tags=["active-ipynb"]
# def mask_of(values: Tensor, k: int) -> Tensor:
#     low = k - 2**15 - 1
#     return values.clamp(low, low + 1) - low
#
#
# every = torch.arange(-(2**15), 2**15).to(torch.int16)
# for p in (0.1, 0.3, 0.5):
#     k = round(p * 2**16)
#     zeros = int((mask_of(every, k) == 0).sum())
#     assert zeros == k
#     print(f"p = {p}: {zeros} of 65536 values mean drop, a rate of {zeros / 2**16:.6f}")

# %% [markdown]
# And on draws: the share of zeros, each of the four quarters for itself, neighbours that are independent, and the same zeros again from the same seed.

# %% tags=["active-ipynb"]
# draws = 1_000_000
# torch.manual_seed(1)
# mask, worth = kept(torch.empty(draws), 0.1)
# again, _ = (torch.manual_seed(1), kept(torch.empty(draws), 0.1))[1]
# assert torch.equal(mask, again)
# rate = 6554 / 65536
# error = math.sqrt(rate * (1 - rate) / (draws / 4))  # of the mean of a quarter
# for i in range(4):
#     assert abs((1 - mask[i::4].mean().item()) - rate) < 5 * error
# both = ((mask[1:] == 0) & (mask[:-1] == 0)).float().mean().item()
# assert abs(both - rate**2) < 5 * math.sqrt(rate**2 / draws)
# assert abs(rate * 0 + (1 - rate) * worth - 1) < 1e-12
# print("rate, quarters, neighbours, mean and seed as they should be")

# %% [markdown]
# The numbers come from torch's own generator. So whoever saves its state can go on with the same masks, which Chapter 19 needs. Now the time:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# dropouts = {"nn.Dropout": nn.Dropout(0.1), "FastDropout": FastDropout(0.1)}
# times = race(
#     {name: lambda drop=drop: drop(rows).sum().backward() for name, drop in dropouts.items()},
#     30 if full else 2,
# )
# for name, seconds in times.items():
#     print(f"{name:12s}{1e6 * median(seconds):8.0f} µs, forward and backward")

# %% [markdown]
# ## The patch
#
# Dropout sits in two seams: the residual and the embedding. Both classes keep everything but that one part. `FAST` is the patch.

# %%
class FastPostNorm(PostNorm):
    """`PostNorm` with `FastDropout`."""

    def __init__(self, d_model: int, norm: Spec[nn.Module], dropout: float) -> None:
        super().__init__(d_model, norm, dropout)
        self.dropout = FastDropout(dropout)


class FastEmbedding(Embedding):
    """`Embedding` with `FastDropout`."""

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        dropout: float,
        *,
        position: Spec[nn.Module] | None = spec(Sinusoid),
        scale: bool = True,
    ) -> None:
        super().__init__(vocab_size, d_model, dropout, position=position, scale=scale)
        self.dropout = FastDropout(dropout)


FAST = {
    "norm": spec(FusedNorm),
    "residual": spec(FastPostNorm),
    "embedding": spec(FastEmbedding),
}

# %% tags=["active-ipynb"]
# from transformer_annotated import diff
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, FAST)))

# %% [markdown]
# The parameters have the same names, so a checkpoint of one model loads into the other. And the function is the same: with dropout off, outputs and all gradients agree; in evaluation mode, with dropout in the config, too.

# %% tags=["active-ipynb"]
# TINY = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "ffn.d_ff": 64}
# for dropout, training in ((0.0, True), (0.1, False)):
#     config = patch(PAPER_BASE, TINY, {"dropout": dropout})
#     plain_model = Transformer(config).double().train(training)
#     fast_model = Transformer(patch(config, FAST)).double().train(training)
#     for parameter in plain_model.parameters():
#         nn.init.normal_(parameter, std=0.3)
#     fast_model.load_state_dict(plain_model.state_dict())  # strict: no name too much or too few
#     ids = torch.randint(4, 50, (2, 6))
#     outputs = [model(ids, ids.flip(1)) for model in (plain_model, fast_model)]
#     direction = torch.randn_like(outputs[0])
#     slopes = [
#         torch.autograd.grad(output, list(model.parameters()), direction)
#         for output, model in zip(outputs, (plain_model, fast_model), strict=True)
#     ]
#     torch.testing.assert_close(*outputs, rtol=0, atol=1e-10)
#     torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)
# print("logits and", len(slopes[0]), "gradients equal, in training and in evaluation")

# %% [markdown]
# ## Sixteen bits
#
# Inside `torch.autocast`, matrix products read their operands in bfloat16: sixteen bits with the range of 32-bit numbers and three digits instead of seven. Weights, optimiser, norms and softmax stay in 32 bits {cite:p}`micikevicius2018mixed`. Half as many bits travel, and processors with instructions for them multiply faster.
#
# It does not compute the same function. How far off is it? Compare with double precision, once for 32 bits and once for autocast:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# exact = plain_model.train(False)
# rounded = Transformer(exact.config).eval()
# rounded.load_state_dict(exact.state_dict())
# with torch.no_grad():
#     truth = exact(ids, ids.flip(1))
#     for half in (False, True):
#         with torch.autocast("cpu", torch.bfloat16, enabled=half):
#             error = (rounded(ids, ids.flip(1)).double() - truth).abs().max() / truth.std()
#         print(
#             f"{'autocast' if half else '32 bits ':9s} largest error {error:.0e} of the logits' spread"
#         )

# %% [markdown]
# Whether the trained model is as good, only a whole run can tell. What 16 bits give in speed depends on the machine, and on the share of the step that they touch. So put everything together, one change more in each line, beginning with a loss that makes all logits at once:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.paper.transformer import SDPA
# from transformer_annotated.training.objective import LossSum
#
#
# def all_at_once(model: Transformer, batch: Batch) -> LossSum:
#     """The same loss, from the logits of the whole batch."""
#     logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding).flatten(0, 1).float()
#     target = batch.tgt_out.flatten()
#     loss = F.cross_entropy(logits, target, label_smoothing=0.1, reduction="sum")
#     return LossSum(loss, loss.detach(), batch.n_tokens)
#
#
# steps = {}
# for half, bits in ((False, ""), (True, ", 16 bits")):
#     steps["Part I" + bits] = step_of(half=half, objective=all_at_once)
#     steps["chunked loss" + bits] = step_of(half=half)
#     steps["FAST" + bits] = step_of(FAST, half=half)
#     steps["FAST + SDPA" + bits] = step_of(FAST, SDPA, half=half)
# times = race(steps, rounds)
# for name, seconds in times.items():
#     ratio = median(a / b for a, b in zip(times["Part I"], seconds, strict=True))
#     print(
#         f"{name:22s}{B * T / median(seconds):8.0f} target tokens a second   {ratio:5.2f} times Part I"
#     )

# %% [markdown]
# *Chunked loss* is Chapter 15's, and `FAST` and what follows have it, too. Each line is a median, and the ratio is taken round by round. `SDPA` is Chapter 3's other way to attention, and it deserves a look of its own.
#
# ## Attention, by length
#
# SDPA never writes the table of weights to memory {cite:p}`dao2022flashattention`. For long sequences that table is what costs. For short ones it is small, and stays close to the processor anyway.

# %% tags=["hide-input"]
def attention_times(lengths: list[int], rounds: int, tokens: int = 2048) -> dict[str, list[float]]:
    """Speed of `sdpa` as a multiple of `attend`'s, by length, for 32 and 16 bits.

    Four heads of 64, forward and backward, batches of about `tokens` tokens; medians over rounds.
    """
    from statistics import median

    from transformer_annotated.paper.attention import attend, sdpa

    ratios: dict[str, list[float]] = {}
    for name, dtype in (("32 bits", torch.float32), ("16 bits", torch.bfloat16)):
        for T in lengths:
            q, k, v = (
                torch.randn(max(1, tokens // T), 4, T, 64).to(dtype).requires_grad_()
                for _ in range(3)
            )
            runs = {
                "attend": lambda q=q, k=k, v=v: attend(q, k, v).sum().backward(),
                "sdpa": lambda q=q, k=k, v=v: sdpa(q, k, v).sum().backward(),
            }
            times = race(runs, rounds)
            pairs = zip(times["attend"], times["sdpa"], strict=True)
            ratios.setdefault(name, []).append(median(a / b for a, b in pairs))
    return ratios

# %% mystnb={"figure": {"caption": "On this processor SDPA pays for long sentences; for short ones in 16 bits the written-out formula is several times as fast.", "name": "fig-attention-speed"}, "image": {"alt": "Two curves over sequence lengths, one for 32 bits and one for 16 bits: the speed of SDPA as a multiple of the written-out formula. A horizontal line marks equal speed."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# lengths = [32, 64, 128, 256, 512, 1024] if full else [8, 16]
# ratios = attention_times(lengths, 5 if full else 1, 2048 if full else 32)
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# for (name, values), marker in zip(ratios.items(), "os", strict=True):
#     ax.plot(lengths, values, marker + "-", label=name)
# ax.axhline(1.0, color="#666666", linewidth=1)
# ax.set(xscale="log", xticks=lengths, xticklabels=lengths, ylim=(0, None))
# ax.set(xlabel="tokens in a sentence", ylabel="speed of SDPA / attend")
# ax.minorticks_off()
# ax.legend();

# %% [markdown]
# Above the line in {numref}`fig-attention-speed`, SDPA is faster. The figure measures attention alone, without a mask; in a whole step with masks the order at thirty tokens can be another. So `FAST` does not decide: sentences of thirty words and documents of a thousand want different things, and `SDPA` is one patch more. The two go together in any order.
#
# ## Memory that is kept
#
# A step makes and frees hundreds of tensors. Where large ones are freed, the C library of most Linux systems gives memory back to the system, and the next large tensor can be new memory, which the system must clear page by page. A first touch of a page is called a **page fault**, and the system counts them. `keep_memory` asks the library to keep what was freed.

# %%
def keep_memory() -> bool:
    """Ask the C library to keep the memory that tensors free, for the next tensors.

    The process then holds on to the most it has ever used. Returns whether the library took the
    request: only glibc (Linux) knows it. The same as starting Python with `MALLOC_MMAP_MAX_=0` and
    `MALLOC_TRIM_THRESHOLD_=2147483647`.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # the names and numbers of malloc.h
    return mallopt is not None and bool(
        mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    )

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def faults(run: Callable[[], Any]) -> int:
#     import resource  # not on Windows
#
#     before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
#     run()
#     return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
#
#
# cases = {
#     "step, all logits at once": steps["Part I, 16 bits"],
#     "step, chunked loss": steps["FAST, 16 bits"],
# }
# if sys.platform.startswith("linux"):
#     for when in ("before", "kept"):
#         if when == "kept":
#             print("the library took the request:", keep_memory())
#         times = race(cases, rounds)
#         for name, run in cases.items():
#             print(f"{when:8s}{name:26s}{faults(run):8,} page fault(s) {median(times[name]):7.3f} s")

# %% [markdown]
# A step gains as far as it makes large tensors, and the largest are the logits of a whole batch. A chunked loss makes none of that size, which is one more of its merits. Nothing about the numbers changes. Where the memory was kept already, before the call, the two halves of the output are alike and their difference is chance. The price: what a run needed at its largest moment stays with it.
#
# ## What is left
#
# Four steps, sorted into kinds of operations:

# %%
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm"),
    "softmax, exp, log": (
        "_softmax",
        "_log_softmax",
        "exp",
        "exp_",
        "gather",
        "nll_loss",
        "nll_loss_forward",
    ),
    "random numbers": ("bernoulli_", "random_", "native_dropout"),
    "copies and casts": ("_to_copy", "clone", "copy_", "cat"),
    "optimiser": ("_fused_adam_",),
}


def by_kind(seconds: Mapping[str, float]) -> dict[str, float]:
    """Times by operation to times by kind, in the order of `KINDS`; the rest comes last."""
    totals = dict.fromkeys([*KINDS, "one number at a time"], 0.0)
    for name, value in seconds.items():
        base = name.removesuffix("_backward_data").removesuffix("_backward")
        kind = next((kind for kind, names in KINDS.items() if base in names), None)
        totals[kind or "one number at a time"] += value
    return totals

# %% tags=["hide-input"]
def draw_kinds(measured: Mapping[str, Mapping[str, float]]) -> Any:
    """One bar for each step: milliseconds by kind of operation, as `by_kind` gives them."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    colors = [COLORS[0], COLORS[1], COLORS[3], COLORS[2], "#E8B04A", "#BBBBBB"]
    ax = plt.subplots(figsize=(7.2, 2.9))[1]
    left = dict.fromkeys(measured, 0.0)
    for i, kind in enumerate(next(iter(measured.values()))):
        values = [1e3 * kinds[kind] for kinds in measured.values()]
        ax.barh(list(measured), values, left=list(left.values()), color=colors[i], label=kind)
        left = {name: left[name] + v for name, v in zip(measured, values, strict=True)}
    ax.invert_yaxis()
    ax.set(xlabel="milliseconds of a step")
    ax.grid(axis="y", visible=False)
    ax.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.24))
    return ax

# %% mystnb={"figure": {"caption": "Matrix products take most of a step; what the patch removes is the rest, and in 16 bits the rest weighs more.", "name": "fig-step"}, "image": {"alt": "Four horizontal bars, the training step of Part I and of FAST in 32 and in 16 bits, each divided into matrix products, softmax, random numbers, copies, the optimiser and the rest. Matrix products are the longest piece of each."}} tags=["active-ipynb", "nbval-ignore-output"]
# def kinds_of(step: Callable[[], None]) -> dict[str, float]:
#     measured = []
#     for _ in range(3):
#         with OperationTimes() as found:
#             step()
#         measured.append(by_kind(found.seconds))
#     return {kind: median(m[kind] for m in measured) for kind in measured[0]}
#
#
# chosen = ("Part I", "FAST", "Part I, 16 bits", "FAST, 16 bits")
# measured = {name: kinds_of(steps[name]) for name in chosen}
# draw_kinds(measured);

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, kinds in measured.items():
#     share = kinds["matrix products"] / sum(kinds.values())
#     print(f"{name:18s} matrix products {share:4.0%} of the step")
# if full:
#     assert measured["FAST"]["random numbers"] < measured["Part I"]["random numbers"]

# %% [markdown]
# Read {numref}`fig-step` bar by bar. The blue piece is the same work in each pair: nobody may remove it. Between the two bars lie two changes. The chunked loss shortens the softmax. The patch shortens the random numbers and the small operations. In 16 bits the blue piece is shorter, so everything else weighs more. By {eq}`eq-amdahl`, this gives a limit: if everything else took no time, the blue piece alone would be left. More than that needs fewer multiplications, or another machine.
#
# `torch.compile` writes fused operations by itself. On a CPU it needs a C++ compiler, and the first step waits for it. The trainer of Chapter 19 has it as an option. It has not been measured for this page.
#
# ## Side by side
#
# `make bench` gives other libraries the same sizes, the same batch, the same optimiser, dropout at the paper's two places and the same memory settings, and lets them take turns. One thread, median over the rounds, and the slowest and fastest round beside it. *small* has $D = 256$ and three layers a stack, *base* is the paper's base model; $V = 8000$.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import results
#
# latest = {}
# for line in results("bench"):
#     kept_apart = ("kind", "size", "precision", "sentences", "beam")
#     latest[tuple(line.get(key) for key in kept_apart)] = line
# lines = list(latest.values())
# print(lines[-1]["machine"], lines[-1]["date"])
# print(", ".join(f"{name} {version}" for name, version in lines[-1]["versions"].items()))
#
#
# def table(line: dict[str, Any]) -> None:
#     for row in line["rows"]:
#         share = f"{row['share_of_peak']:5.0%} of peak" if "share_of_peak" in row else ""
#         spread = f"({row['low']:.4g} to {row['high']:.4g})"
#         print(f"  {row['name']:22s}{row['median']:9.4g} {spread:22s}{row['ratio']:6.2f}{share}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for line in (line for line in lines if line["kind"] == "training"):
#     print(
#         f"{line['size']}, {line['precision']}: target tokens a second, and the ratio to this book"
#     )
#     table(line)

# %% [markdown]
# Rows are sorted by their median. The ratio to this book is taken in each round, and its median is printed; so it can differ a little from the ratio of the medians. Below 1 is slower than this book. The share of peak says how much room is left to anybody; the bench measures the peak anew in its own rounds. Where ranges overlap, or order and ratio disagree, call it level.
#
# Decoding comes with Chapters 20 and 21, but its measurements belong here. Every library translates 30 tokens to exactly 30.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for line in (line for line in lines if line["kind"] == "decoding"):
#     print(f"{line['size']}, beam {line['beam']}, {line['sentences']} at a time: sentences a second")
#     table(line)

# %% [markdown]
# CTranslate2 is a decoder written in C++, with weights of 8 bits where it says int8. It has no training. Where it leads, the distance is the price of a program that one can read and change.
#
# ## What the paper did
#
# Section 5.2: eight P100 graphics cards, 0.4 seconds for a step of the base model, 1.0 for the big one; 100,000 and 300,000 steps; twelve hours and three and a half days. Table 2 gives the cost as $3.3 \cdot 10^{18}$ and $2.3 \cdot 10^{19}$ operations {cite:p}`vaswani2017attention`. That is time, times cards, times what a card can do at best (Exercise 17.1). So it is a bound, and not a count as above.
#
# ## How it breaks
#
# - *A faster step that learns less.* A dropout that drops nothing is the fastest. Check the rate, and check outputs with redrawn weights.
# - *Clocks that look away.* The first steps include setting up. On a GPU, operations return before they are done. On a shared machine, one run of each variant says nothing.
# - *A patch that renames parameters.* It runs fast, and no checkpoint loads. `load_state_dict` is strict: let it be.
# - *Random numbers from a private generator.* A resumed run has other masks, and nobody can repeat it.
#
# ## Takeaways
#
# - Count first: operations divided by peak is the least time.
# - Most of what is not a matrix product waits for memory. Fused operations touch memory less.
# - 16 random bits make a mask; torch's generator makes it repeatable.
# - One change, one proof, one measurement. Medians, turns, and the spread.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 17.1.** A footnote of section 6.1 takes 9.5 million million operations a second for a P100. How many operations do eight of them do in the twelve hours of the base model? Compare with Table 2. How many does one card do in a day? Answer with the two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("17.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [8 * 12 * 3600 * 9.5e12, 24 * 3600 * 9.5e12]
# check("17.1", answer)

# %% [markdown]
# **Exercise 17.2.** Dropout takes 12 % of a step. You make it five times as fast. How much faster is the step? And if dropout took no time at all?

# %% tags=["active-ipynb"]
# answer = ...
# check("17.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [1 / (0.88 + 0.12 / 5), 1 / 0.88]
# check("17.2", answer)

# %% [markdown]
# **Exercise 17.3.** With 8 random bits for each element instead of 16, which rate nearest to 0.1 can a mask have, and what is a one worth then?

# %% tags=["active-ipynb"]
# answer = ...
# check("17.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [26 / 256, 256 / (256 - 26)]
# check("17.3", answer)

# %% [markdown]
# **Exercise 17.4.** Somebody writes `words.random_()` in `kept`, so that the first bit of each 64 is always 0. Which share of the elements is dropped then, if `p` is 0.1? Try it, or think.

# %% tags=["active-ipynb"]
# answer = ...
# check("17.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# # A quarter without a sign is never negative, and the dropped values all are.
# answer = 0.75 * 0.1
# check("17.4", answer)
