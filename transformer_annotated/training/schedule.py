# %% [markdown]
r"""
# Optimiser and schedule

How far to step and how the step grows and shrinks: Adam by hand, the paper's learning rate, and what happens
to a post-norm Transformer without a warm-up.
"""

# %% [markdown]
# The objective gives a gradient: for each weight, a direction. This chapter decides how far to go. Two things decide it. The *optimiser* turns a gradient into a step, and the *schedule* says how long steps may be at this point of the run.

# %% mystnb={"figure": {"caption": "Chapter 16 of Part II: the optimiser and its learning rate.", "name": "fig-map-schedule"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The fifth, Schedule, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(16);

# %%
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from transformer_annotated.paper.parts import check_rate, check_sizes
from transformer_annotated.paper.toy import Batch
from transformer_annotated.paper.transformer import Transformer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# %% [markdown]
# ## One rate for very different gradients
#
# Plain gradient descent subtracts `rate * gradient`. In a Transformer that is a poor rule. Look at the gradients of a fresh model, part by part.

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, cross_entropy, patch
#
# SIZES = {
#     "d_model": 64,
#     "dropout": 0.0,
#     "self_attention.n_heads": 4,
#     "cross_attention.n_heads": 4,
#     "ffn.d_ff": 256,
# }
# torch.manual_seed(0)
# model = Transformer(patch(PAPER_BASE, SIZES, {"vocab_size": 100, "n_layers": 2}))
# src, tgt = torch.randint(4, 100, (2, 8, 10))
# everything = torch.ones(8, 10, dtype=torch.bool)
# cross_entropy(model(src, tgt), tgt.roll(-1, dims=1), everything).backward()
# for name in (
#     "embedding.weight",
#     "encoder.layers.0.self_attention.q_proj.weight",
#     "encoder.layers.0.ffn.up.weight",
#     "decoder.layers.1.ffn.down.weight",
#     "decoder.layers.1.residuals.ffn.norm.weight",
# ):
#     gradient = model.get_parameter(name).grad
#     print(f"{name:46s} typical size {gradient.square().mean().sqrt():.1e}")

# %% [markdown]
# The largest of these is many times the smallest. They also change as training goes on, as we shall see. A rate that suits one part gives steps that are too long or too short for another. We want a rule that looks at each weight's own gradients and makes its steps of a similar size.
#
# ## Adam by hand
#
# Take one weight, and three gradients that came one after the other: 4, 2 and 6. Keep two running means: of the gradients, and of their squares. A running mean moves a little towards each new value.

# %% tags=["active-ipynb"]
# mean = square = 0.0
# for step, gradient in enumerate([4.0, 2.0, 6.0], start=1):
#     mean = 0.9 * mean + 0.1 * gradient
#     square = 0.98 * square + 0.02 * gradient**2
#     mean_hat, square_hat = mean / (1 - 0.9**step), square / (1 - 0.98**step)
#     print(
#         f"step {step}: mean {mean:.3f} -> {mean_hat:.3f}   square {square:.3f} -> {square_hat:.2f}"
#         f"   step of {mean_hat / math.sqrt(square_hat):.3f} rates"
#     )

# %% [markdown]
# Both means start at 0, so at first they are far too small: after the first gradient the mean is 0.4 and should be 4. The column behind each arrow corrects that. After $t$ steps the weights of all gradients so far add up to $1 - \beta^t$; dividing by this makes it a proper mean. That is the **bias correction**.
#
# Then the mean is divided by the root of the mean square. Gradients that agree with one another give a step of about one rate. Gradients that point both ways cancel in the mean and give a short step. This is **Adam** {cite:p}`kingma2015adam`:
#
# $$
# m_t = \beta_1 m_{t-1} + (1 - \beta_1)\, g_t, \quad v_t = \beta_2 v_{t-1} + (1 - \beta_2)\, g_t^2, \quad
# \theta_t = \theta_{t-1} - \eta_t\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}
# $$ (eq-adam)
#
# Here $g_t$ is the gradient at step $t$, $m$ and $v$ are the two running means, $\theta$ is the weight and $\eta_t$ the learning rate.

# %%
def adam_update(
    gradient: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-9,
) -> Tensor:
    """What Adam subtracts at step 1, 2, 3, ... for each unit of learning rate.

    `mean` and `square` are the running means of the gradient and of its square; both start at 0
    and are updated in place. All four tensors have the parameter's shape (Kingma & Ba 2015,
    algorithm 1). Raises ValueError for a step below 1.
    """
    check_sizes(step=step)
    beta1, beta2 = betas
    mean.mul_(beta1).add_((1 - beta1) * gradient)
    square.mul_(beta2).add_((1 - beta2) * gradient**2)
    mean_hat = mean / (1 - beta1**step)
    square_hat = square / (1 - beta2**step)
    return mean_hat / (square_hat.sqrt() + eps)

# %% [markdown]
# The proof: twenty steps beside `torch.optim.Adam`, in 64-bit numbers. The gradients come from a real loss, so an error in one step would change the next.

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# data, wanted = torch.randn(32, 6, dtype=torch.float64), torch.randn(32, 3, dtype=torch.float64)
# theirs = nn.Linear(6, 3).double()
# ours = [parameter.detach().clone() for parameter in theirs.parameters()]
# optimiser = torch.optim.Adam(theirs.parameters(), lr=0.01, betas=(0.9, 0.98), eps=1e-9)
# means, squares = ([torch.zeros_like(w) for w in ours] for _ in range(2))
# for step in range(1, 21):
#     optimiser.zero_grad()
#     (theirs(data) - wanted).square().mean().backward()
#     optimiser.step()
#     weight, bias = (w.requires_grad_() for w in ours)
#     loss = (data @ weight.T + bias - wanted).square().mean()
#     gradients = torch.autograd.grad(loss, (weight, bias))
#     with torch.no_grad():
#         for w, g, m, v in zip(ours, gradients, means, squares, strict=True):
#             w -= 0.01 * adam_update(g, m, v, step)
# for mine, its in zip(ours, theirs.parameters(), strict=True):
#     torch.testing.assert_close(mine, its, rtol=0, atol=1e-12)
# print("twenty steps of Adam by hand and of torch.optim.Adam: equal to 1e-12")

# %% [markdown]
# ### The first step is always a full step
#
# At step 1 the two corrected means are $g$ and $g^2$, so the step is $g / |g|$: plus or minus one rate, for *every* weight, however small its gradient was.

# %% tags=["active-ipynb"]
# gradient = torch.tensor([3.0, -0.02, 1e-6, 1e-9, 1e-12])
# first = adam_update(gradient, torch.zeros(5), torch.zeros(5), step=1)
# for g, size in zip(gradient.tolist(), first.tolist(), strict=True):
#     print(f"gradient {g:8.0e}   step of {size:7.4f} rates")

# %% [markdown]
# Keep this in mind; it comes back below. Only $\epsilon$ sets a limit: gradients near $10^{-9}$ and below give short steps. That is all $\epsilon$ does.
#
# ### How long is the memory?
#
# Each step multiplies the old squares by $\beta_2$. A square that is $k$ steps old therefore counts $\beta_2^k$ times as much as a new one, and the mean age is about $1/(1-\beta_2)$ steps: 50 steps for the paper's 0.98, and 1,000 for 0.999, PyTorch's default. What difference does it make? Let the gradients of a weight become ten times smaller at step 500, and stay so. It takes longer than 50 steps until full steps are taken again, because the old squares are a hundred times larger than the new ones: they count until $\beta_2^k$ is well below one hundredth.

# %% mystnb={"figure": {"caption": "After gradients shrink tenfold, the steps are too short for a few hundred steps with the short memory, and for thousands with the long one.", "name": "fig-memory"}, "image": {"alt": "Two curves of step size against training step. Both stand at one, drop to a tenth at step 500 and climb back, one steeply, the other so slowly that it is still below one at the right edge."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# fig, ax = plt.subplots(figsize=(7.2, 2.5))
# for beta2 in (0.98, 0.999):
#     mean, square, sizes = torch.zeros(1), torch.zeros(1), []
#     for step in range(1, 3001):
#         gradient = torch.tensor([1.0 if step <= 500 else 0.1])
#         update = adam_update(gradient, mean, square, step, betas=(0.9, beta2))
#         sizes.append(update.item())
#     ax.plot(range(1, 3001), sizes, label=f"$\\beta_2$ = {beta2}")
# ax.set(xlabel="step", ylabel="step, in rates", ylim=(0, 1.1))
# ax.legend(loc="lower right");

# %% [markdown]
# In {numref}`fig-memory` the short memory notices soon that gradients are small now, and takes full steps again. Early in training gradients can shrink fast. In the experiment below that of one layer falls by more than ten within 40 steps; later it grows again. The price is noise: a mean over 50 squares is rougher than one over 1,000.
#
# Section 5.3 of the paper sets $\beta_1 = 0.9$, $\beta_2 = 0.98$ and $\epsilon = 10^{-9}$. `adam` does the same with PyTorch's optimiser. *Fused* means that it updates all tensors in one pass over memory.

# %%
def adam(
    parameters: Iterable[nn.Parameter],
    *,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-9,
) -> torch.optim.Adam:
    """The paper's optimiser (section 5.3): Adam with beta2 = 0.98 and eps = 1e-9.

    Its learning rate is 0 until `set_rate` sets it. On a CPU or a CUDA device all parameters are
    updated in one fused pass.

    Raises:
        ValueError: a beta outside [0, 1), an `eps` that is not above 0, or no parameters.
    """
    for name, beta in zip(("betas[0]", "betas[1]"), betas, strict=True):
        check_rate(name, beta)
    check_positive("eps", eps)
    chosen = list(parameters)
    if not chosen:
        raise ValueError("parameters must hold at least one tensor, got none")
    fused = all(p.device.type in ("cpu", "cuda") and p.is_floating_point() for p in chosen)
    return torch.optim.Adam(chosen, lr=0.0, betas=betas, eps=eps, fused=fused)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step of `optimizer` use this learning rate, in every group.

    Raises ValueError for a rate that is negative or not finite.
    """
    if not (math.isfinite(rate) and rate >= 0):
        raise ValueError(f"rate must be a finite number of at least 0, got {rate}")
    for group in optimizer.param_groups:
        group["lr"] = rate


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a finite number above 0."""
    if isinstance(value, bool) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")

# %% tags=["active-ipynb"]
# optimiser = adam(model.parameters())
# set_rate(optimiser, 1e-3)
# before = model.get_parameter("encoder.layers.0.ffn.up.weight").detach().clone()
# optimiser.step()
# moved = (model.get_parameter("encoder.layers.0.ffn.up.weight") - before).abs()
# print(f"after one step at rate 0.001: smallest move {moved.min():.6f}, largest {moved.max():.6f}")

# %% [markdown]
# Every number of the matrix moved by almost exactly the full rate. The small rest is rounding and $\epsilon$.
#
# Many later models add **weight decay**: each step also shrinks each weight by a small share. Added to the gradient, the shrinking would be divided by $\sqrt{v}$ too. AdamW applies it to the weight directly {cite:p}`loshchilov2019decoupled`. The paper mentions no weight decay, and `adam` has none.
#
# ## The schedule
#
# The paper's learning rate is Chapter 11's {eq}`eq-rate`: a line up for `warm_up` steps, then down like $1/\sqrt{\text{step}}$. Here it gets one more number.

# %%
Schedule = Callable[[int], float]  # the learning rate at optimiser step 1, 2, 3, ...


def inverse_square_root(d_model: int, warm_up: int = 4000, factor: float = 1.0) -> Schedule:
    """The paper's learning rate (section 5.3, equation 3), times `factor`.

    `factor` is what the authors' library, tensor2tensor, calls the learning-rate constant.

    Raises:
        ValueError: a size below 1 or a factor that is not above 0; later, a step below 1.
    """
    check_sizes(d_model=d_model, warm_up=warm_up)
    check_positive("factor", factor)

    def rate(step: int) -> float:
        check_sizes(step=step)
        return factor * d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)

    return rate

# %% tags=["active-ipynb"]
# from transformer_annotated import paper_rate
#
# paper, again = paper_rate(512), inverse_square_root(512)
# assert all(paper(step) == again(step) for step in range(1, 20_001))
# print("factor 1 is the paper's rate, at each of 20,000 steps")
# for d_model, warm_up, factor in ((512, 4000, 1.0), (1024, 4000, 1.0), (512, 8000, 2.0)):
#     peak = inverse_square_root(d_model, warm_up, factor)(warm_up)
#     print(f"D = {d_model:4d}   warm-up {warm_up}   factor {factor}   peak rate {peak:.2e}")
# try:
#     again(0)
# except ValueError as error:
#     print(error)

# %% [markdown]
# The third line is how the authors' own library later configured its base model, `transformer_base_v3` {cite:p}`vaswani2018tensor2tensor`: factor 2, 8,000 steps of warm-up, and $\beta_2 = 0.997$. Its peak is higher than the paper's.
#
# Steps count from 1. At step 0 the formula would divide by zero, so 0 is refused.
#
# A second schedule in wide use needs to know in advance when the run ends. It rises in a line and then follows half a cosine down {cite:p}`loshchilov2017sgdr`. With $w$ for the warm-up, $n$ for the number of steps, $\eta$ for the peak and $\eta_0$ for the floor:
#
# $$
# \mathrm{rate}(s) = \begin{cases} \eta\, s / w & s \le w \\ \eta_0 + \tfrac{1}{2} (\eta - \eta_0) \bigl(1 + \cos(\pi \tfrac{s - w}{n - w})\bigr) & s > w \end{cases}
# $$ (eq-cosine)

# %%
def cosine(peak: float, warm_up: int, steps: int, floor: float = 0.0) -> Schedule:
    """A line up to `peak` at step `warm_up`, then half a cosine down to `floor` at step `steps`.

    After `steps` the rate stays at `floor` (Loshchilov & Hutter 2017, without restarts).

    Raises:
        ValueError: unless 1 <= warm_up < steps and 0 <= floor <= peak; later, a step below 1.
    """
    check_sizes(warm_up=warm_up, steps=steps)
    check_positive("peak", peak)
    if warm_up >= steps:
        raise ValueError(f"warm_up must be in [1, {steps}), got {warm_up}")
    if not 0.0 <= floor <= peak:
        raise ValueError(f"floor must be in [0, {peak}], got {floor}")

    def rate(step: int) -> float:
        check_sizes(step=step)
        if step <= warm_up:
            return peak * step / warm_up
        done = min(1.0, (step - warm_up) / (steps - warm_up))
        return floor + (peak - floor) * (1 + math.cos(math.pi * done)) / 2

    return rate

# %% mystnb={"figure": {"caption": "Three schedules with one warm-up and one peak. They differ in how long the rate stays high, and in where it ends.", "name": "fig-schedules"}, "image": {"alt": "Three curves that rise together to one peak. One falls steeply at first and stays above zero, one falls in a straight line to zero, one stays high for long and bends down to zero."}} tags=["active-ipynb"]
# from transformer_annotated import rise_and_fall
#
# steps, warm_up, peak = 10_000, 1000, 1e-3
# schedules = {
#     "inverse square root": inverse_square_root(512, warm_up, factor=peak * (512 * warm_up) ** 0.5),
#     "line (Chapter 10)": rise_and_fall(peak, warm_up, steps),
#     "cosine": cosine(peak, warm_up, steps),
# }
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# for name, rate in schedules.items():
#     ax.plot(range(1, steps + 1), [rate(step) for step in range(1, steps + 1)], label=name)
# ax.set(xlabel="step", ylabel="learning rate", ylim=(0, None))
# ax.legend();

# %% [markdown]
# Read {numref}`fig-schedules` from the right. The inverse square root never arrives anywhere: you may stop it, or train longer, at any time. The other two end at zero at a step that was fixed before the run began.
#
# ## What the warm-up prevents
#
# Now the experiment that Chapter 10 promised. Six encoder and six decoder layers in the paper's post-norm, on the small language. The peak rate is the same in every run. In one half of the runs the rate rises to it over 100 steps, in the other it is there from the first step. Nothing else differs, and after the rise the rate stays constant, so that the fall plays no part.

# %%
def layer_gradients(model: Transformer) -> list[float]:
    """The norm of the gradient of each layer: the encoder's from bottom to top, then the decoder's.

    Call it after a backward pass. Raises ValueError where there are no gradients.
    """
    stacks = [stack for stack in (model.encoder, model.decoder) if stack is not None]
    norms = []
    for layer in (layer for stack in stacks for layer in stack.layers):
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        if not gradients:
            raise ValueError("model must have gradients: call this after backward()")
        norms.append(nn.utils.get_total_norm(gradients).item())
    return norms

# %%
@torch.no_grad()
def spread(model: Transformer, batch: Batch) -> list[float]:
    """How different the vectors of different positions are, after each layer in the same order.

    It is the standard deviation over all real positions of `batch`, mean over the D places: about
    1 if positions have nothing in common, 0 if all vectors are one. (Each vector alone has a
    standard deviation of about 1 over its places, since the layer ends in a norm.)
    """
    result: list[float] = []

    def measure(padding: Tensor) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, x: result.append(x[padding].std(dim=0).mean().item())

    sides = ((model.encoder, batch.src_padding), (model.decoder, batch.tgt_padding))
    handles = [
        layer.register_forward_hook(measure(padding))
        for stack, padding in sides
        if stack is not None
        for layer in stack.layers
    ]
    try:
        model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
    finally:
        for handle in handles:
            handle.remove()
    return result

# %% [markdown]
# Two instruments. `layer_gradients` says how much gradient each layer receives. `spread` says whether the vectors of different words still differ. If they do not, the layers above cannot know which word they are working on.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from collections import Counter
# from itertools import chain, count, islice
#
# from transformer_annotated import Vocabulary, batches, train
# from transformer_annotated.book import machine, scale
# from transformer_annotated.paper.first_translation import encode_pairs
# from transformer_annotated.paper.toy import EOS, split
#
# full = scale() == "full"
# text = [(de.split(), en.split()) for de, en in split(8000 if full else 200, 0, seed=0)[0]]
# vocabulary = Vocabulary.build(sentence for pair in text for sentence in pair)
# data = encode_pairs(text, vocabulary)
# counts = Counter(token for _, target in data for token in [*target, EOS])
# total = sum(counts.values())
# blind = -sum(n / total * math.log(n / total) for n in counts.values())
# print(f"a model that reads neither the source nor the words before cannot get below {blind:.2f} nats on these sentences")

# %% [markdown]
# That number is the entropy of the word frequencies: the loss of a model that always gives each word its overall frequency. It separates *has learned to read* from *knows which words are frequent*.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# DEEP = patch(PAPER_BASE, SIZES, {"vocab_size": len(vocabulary)})
# PEAK, STEPS, WARM_UP, DEPTH = (2e-3, 240, 100, 6) if full else (2e-3, 6, 3, 2)
#
#
# def stream(seed: int, steps: int) -> Iterable[Batch]:
#     passes = (batches(data, 32 if full else 8, seed=seed) for seed in count(1000 * seed))
#     return islice(chain.from_iterable(passes), steps)
#
#
# def experiment(seed: int, warm_up: int, peak: float = PEAK, n_layers: int = DEPTH) -> dict:
#     torch.manual_seed(seed)
#     model = Transformer(patch(DEEP, {"n_layers": n_layers}))
#     (probe,) = stream(99, 1)
#     seen = {"gradients": [], "spread": [spread(model, probe)]}
#
#     def look(step: int, loss: float) -> None:
#         seen["gradients"].append(layer_gradients(model))
#         if step in (1, 2, 5, 10, 20) or step % 40 == 0:
#             seen["spread"].append(spread(model, probe))
#
#     def rise(step: int) -> float:
#         return peak * min(1.0, step / warm_up)
#
#     seen["loss"] = train(model, stream(seed, STEPS), learning_rate=rise, on_step=look).loss
#     return seen

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# start = time.process_time()
# runs = {(w, seed): experiment(seed, w) for seed in range(3 if full else 1) for w in (WARM_UP, 1)}
# print(machine())
# print(f"{len(runs)} runs of {STEPS} steps in {time.process_time() - start:.0f} s of processor time")
# print("mean loss of the last twenty steps:")
# for warm_up in (WARM_UP, 1):
#     ends = [
#         sum(r["loss"][-20:]) / len(r["loss"][-20:]) for (w, _), r in runs.items() if w == warm_up
#     ]
#     print(f"  warm-up over {warm_up:3d} steps: ", "  ".join(f"{end:.2f}" for end in ends))

# %%
def draw_losses(losses: dict[str, list[list[float]]], floor: float) -> "Figure":
    """Smoothed loss curves, one colour a name, and a dotted line at `floor` nats."""
    import matplotlib.pyplot as plt

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(7.2, 3.0))
    for (name, curves), color in zip(losses.items(), figures.COLORS, strict=False):
        for i, curve in enumerate(curves):
            width = min(10, len(curve))
            smooth = torch.tensor(curve).unfold(0, width, 1).mean(dim=-1)
            ax.plot(range(width, len(curve) + 1), smooth, color=color, label=None if i else name)
    ax.axhline(floor, color="black", linestyle=":", linewidth=1.2)
    ax.text(1, floor, "frequencies only", va="top", ha="left", fontsize=9)
    ax.set(xlabel="step", ylabel="loss, in nats")
    ax.legend()
    return figure

# %% mystnb={"figure": {"caption": "With a warm-up all three runs learn to read. Without one, at the same peak rate, two stay at the loss of the word frequencies, and one leaves it slowly.", "name": "fig-warm-up"}, "image": {"alt": "Loss against step for six runs. The three with a warm-up fall below the dotted line of word frequencies and go on falling. The three without it fall fast at first; two then stay at the dotted line and one leaves it slowly."}} tags=["active-ipynb", "nbval-ignore-output"]
# curves = {
#     name: [run["loss"] for (w, _), run in runs.items() if w == warm_up]
#     for name, warm_up in ((f"rises over {WARM_UP} steps", WARM_UP), ("full rate at once", 1))
# }
# draw_losses(curves, blind);

# %% [markdown]
# Each point of {numref}`fig-warm-up` is the mean of ten steps. The runs with the full rate are lower at first: they learn the word frequencies sooner. Then two of them stay at the dotted line and the third leaves it slowly, while the runs with a warm-up go through it and on.
#
# Is it the depth, or the rate? Take away one at a time, still without a warm-up:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name, change in (
#     ("2 + 2 layers", {"n_layers": 2}),
#     ("a quarter of the rate", {"peak": PEAK / 4}),
# ):
#     loss = experiment(0, warm_up=1, **change)["loss"]
#     print(f"no warm-up, but {name:22s} last loss {sum(loss[-20:]) / len(loss[-20:]):.2f}")

# %% [markdown]
# Both learn (one run each, seed 0). The failure needs depth *and* rate. The small model is even far ahead of all deep ones: within so few steps depth does not help on so small a language. The deep model at the smaller rate ends among the runs with a warm-up. So here the warm-up does not give a better end. It makes a rate usable that is not usable without it. It is one remedy among several. It is the paper's, and it costs one number.
#
# ### What went wrong inside
#
# The instruments kept a record. Here is how different the vectors of different positions are at the top of the decoder, after the first few steps:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# looks = [0, *[s for s in range(1, STEPS + 1) if s in (1, 2, 5, 10, 20) or s % 40 == 0]]
# print("after step              ", "".join(f"{step:7d}" for step in looks[:8]))
# for name, warm_up in (("rises", WARM_UP), ("full rate at once", 1)):
#     top = [layers[-1] for layers in runs[warm_up, 0]["spread"]]
#     print(f"spread, {name:17s}", "".join(f"{value:7.3f}" for value in top[:8]))

# %% mystnb={"figure": {"caption": "Left: with the full rate at once, the vectors of different words become alike, layer by layer. Right: the gradient of the lowest decoder layer then falls by several powers of ten.", "name": "fig-collapse"}, "image": {"alt": "Left, the spread of vectors over twelve layers: high at the start and with a warm-up, falling to zero over the layers without one. Right, the gradient of the first decoder layer on a logarithmic axis: without a warm-up it falls by several powers of ten within forty steps."}} tags=["active-ipynb", "nbval-ignore-output"]
# depth = [f"{side}{i + 1}" for side in "ed" for i in range(DEPTH)]
# at = looks.index(40) if full else -1
# fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.9))
# left.plot(depth, runs[1, 0]["spread"][0], color="#666666", label="before the first step")
# for name, warm_up in (("rises", WARM_UP), ("full rate at once", 1)):
#     run = runs[warm_up, 0]
#     left.plot(depth, run["spread"][at], label=f"{name}, step {looks[at]}")
#     right.plot(range(1, STEPS + 1), [g[len(depth) // 2] for g in run["gradients"]], label=name)
# left.set(xlabel="layer", ylabel="spread over positions", ylim=(0, None))
# right.set(xlabel="step", ylabel="gradient of layer d1", yscale="log")
# left.legend()
# right.legend();

# %% [markdown]
# Read the table first. One step of {eq}`eq-adam` at the full rate moves every weight of twelve layers by 0.002 at once, and the vectors of different words have lost most of their difference. The gradient was right for a small move, and this move was not small. Within some steps all positions hold nearly the same vector. The left half of {numref}`fig-collapse` shows that the difference is lost layer by layer, and is gone at the top.
#
# From there the way back is long. If a layer's output hardly depends on its input, hardly any gradient comes through. On the right, the gradient of the first decoder layer falls by several powers of ten and stays there. With the warm-up the spread falls too, but not to nothing, and it recovers.
#
# What we measured is the loss, the spread and the gradients. Why post-norm is prone to this is the subject of papers. {cite:t}`xiong2020layer` show that at the start the gradients near the top of a post-norm stack are large, however many layers it has. In *pre-norm*, where the norm stands before the sub-layer and not after the addition, they become smaller as layers are added; so a large rate is dangerous there. {cite:t}`liu2020understanding` find the cause elsewhere: each post-norm layer leans heavily on its sub-layer, and small changes of the weights are amplified from layer to layer. {cite:t}`noci2022signal` prove that queries and keys get no gradient where all positions hold the same vector. Part III brings the remedies: pre-norm, and others, with and without warm-up.
#
# ## Clipping
#
# A second guard is widely used, though not by the paper. Some batch may give a gradient that is far longer than usual. *Clipping by the global norm* measures all gradients of the model as one long vector $g$, and shortens it to length $c$ if it is longer {cite:p}`pascanu2013difficulty`:
#
# $$
# g \leftarrow g \cdot \min\Bigl(1, \frac{c}{\lVert g \rVert}\Bigr)
# $$ (eq-clip)
#
# The direction stays. PyTorch has this as `torch.nn.utils.clip_grad_norm_`, and it has a trap. Let one single number of a gradient be NaN, which means *not a number*:

# %% tags=["active-ipynb"]
# def damaged() -> nn.Sequential:
#     torch.manual_seed(0)
#     model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1))
#     model(torch.randn(2, 4)).sum().backward()
#     model[1].bias.grad[0] = float("nan")
#     return model
#
#
# for clip in (False, True):
#     model = damaged()
#     if clip:
#         nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
#     torch.optim.AdamW(model.parameters()).step()
#     lost = sum(p.isnan().sum().item() for p in model.parameters())
#     size = sum(p.numel() for p in model.parameters())
#     print(
#         f"{'with' if clip else 'without'} clipping: {lost} of {size} weights are NaN after the step"
#     )

# %% [markdown]
# The length of a vector with one NaN is NaN. Every gradient is multiplied by $c / \text{NaN}$, and the step ruins the whole model. So the length must be looked at before it is used.

# %%
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Shorten the gradient of all parameters together to `max_norm`; return its length before.

    Raises:
        ValueError: the length is not finite (no gradient is changed), or a `max_norm` not above 0.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm must be above 0, got {max_norm}")
    chosen = [p for p in parameters if p.grad is not None]
    length = nn.utils.get_total_norm([p.grad for p in chosen if p.grad is not None])
    if not torch.isfinite(length):
        raise ValueError(f"the norm of the gradient is {length.item()}; no gradient was changed")
    nn.utils.clip_grads_with_norm_(chosen, max_norm, length)
    return length

# %% tags=["active-ipynb"]
# model = damaged()
# kept = [p.grad.clone() for p in model.parameters()]
# try:
#     clip_gradients(model.parameters(), max_norm=1.0)
# except ValueError as error:
#     print(error)
# for p, before in zip(model.parameters(), kept, strict=True):
#     assert torch.equal(p.grad.nan_to_num(7.0), before.nan_to_num(7.0))
# model[1].bias.grad[0] = 1.0
# before = clip_gradients(model.parameters(), max_norm=1.0)
# after = nn.utils.get_total_norm([p.grad for p in model.parameters()])
# print(f"length {before:.3f} before, {after:.3f} after")

# %% [markdown]
# One more thing about clipping and Adam. Adam divides by the size of the gradients it has seen, so a factor that is always there cancels:

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# gradients = torch.randn(30, 5, dtype=torch.float64)
# ends = []
# for scaled in (gradients, 1000 * gradients):
#     state = torch.zeros(2, 5, dtype=torch.float64)
#     ends.append(sum(adam_update(g, *state, step=t) for t, g in enumerate(scaled, start=1)))
# print(
#     f"thirty steps with gradients a thousand times longer: difference {(ends[0] - ends[1]).abs().max():.0e}"
# )
# torch.testing.assert_close(*ends, rtol=0, atol=1e-6)

# %% [markdown]
# If every gradient is longer than the limit, clipping hardly shortens Adam's steps. It only removes the difference between long and short gradients. How long the steps are is decided by the rate.
#
# ## What the paper did
#
# | | paper, section 5.3 | here |
# |---|---|---|
# | optimiser | Adam, $\beta_1 = 0.9$, $\beta_2 = 0.98$, $\epsilon = 10^{-9}$ | `adam` |
# | rate | $D^{-1/2} \min(s^{-1/2}, s \cdot w^{-3/2})$ | `inverse_square_root`, factor 1 |
# | warm-up | 4,000 steps | an argument |
# | weight decay, clipping | not mentioned | none, and `clip_gradients` for those who want it |
#
# {cite:t}`popel2018training` tried many values of rate and warm-up with the authors' library on one pair of languages, and are worth reading before you tune.
#
# ## How it breaks
#
# - *A schedule that counts batches.* With gradients of four batches added up before a step, the warm-up ends four times too early. Print the rate beside the step.
# - *Steps counted from 0.* The paper's formula divides by zero there; other schedules make a first step of rate 0. Here step 0 is an error.
# - *A resumed run that starts at step 1 again.* The running means are empty and the warm-up comes twice. Chapter 18 saves the means and the step.
# - *Too short a warm-up.* The loss stays near the entropy of the word frequencies. Compute that number for your data and draw it into the plot.
# - *One NaN and clipping.* All weights are NaN a step later. Look at the length first.
#
# ## Takeaways
#
# - Adam makes steps of about one rate where successive gradients agree, whatever their size, and shorter ones where they do not: {eq}`eq-adam`. Its first step is a full one in every weight whose gradient is well above $\epsilon$.
# - $1/(1-\beta_2)$ is how many steps it remembers: about 50 in the paper, 1,000 by PyTorch's default.
# - In a deep post-norm model a full rate from the start can make all positions alike, and then hardly any gradient gets through. A warm-up prevents it; so does a smaller rate or fewer layers.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 16.1.** A weight's first gradient is 0.003 and the learning rate is 0.001. How far does Adam move it, and how far would it move without the two bias corrections? Take the paper's $\beta$s, ignore $\epsilon$, and answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("16.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [0.001, 0.001 * 0.1 / math.sqrt(0.02)]
# check("16.1", answer)

# %% [markdown]
# **Exercise 16.2.** All gradients of a weight become zero. After how many steps has the running mean of their squares fallen below a hundredth of what it was, for $\beta_2 = 0.98$ and for 0.999? Answer with two whole numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("16.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [math.ceil(math.log(0.01) / math.log(beta2)) for beta2 in (0.98, 0.999)]
# check("16.2", answer)

# %% [markdown]
# **Exercise 16.3.** For a model of width 256 you want 1,000 steps of warm-up and a peak rate of 0.001. Which `factor` of `inverse_square_root` does it?

# %% tags=["active-ipynb"]
# answer = ...
# check("16.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 1e-3 / inverse_square_root(256, 1000)(1000)
# check("16.3", answer)

# %% [markdown]
# **Exercise 16.4.** Write `shorten(gradients, max_norm)`: it takes a list of tensors and returns a list of new ones by {eq}`eq-clip`, without help from `torch.nn.utils`. Answer with the function.

# %% tags=["active-ipynb"]
# answer = ...
# check("16.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def shorten(gradients: list[Tensor], max_norm: float) -> list[Tensor]:
#     length = math.sqrt(sum(g.square().sum().item() for g in gradients))
#     return [g * min(1.0, max_norm / max(length, 1e-12)) for g in gradients]
#
#
# answer = shorten
# check("16.4", answer)
