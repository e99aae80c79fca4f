# %% [markdown]
r"""
# Longer context

RoPE gives an angle to every position, also to positions that no training text reached. Five rules choose the angles
again, so that a model reads texts many times longer than those it was trained on.
"""

# %% [markdown]
# With RoPE (Chapter 29) a model runs at any length. Whether it makes sense there is another matter. We look at what goes wrong, and at the small changes of a frequency that repair it.

# %% mystnb={"figure": {"caption": "Chapter 31 of Part III: new angles for RoPE.", "name": "fig-map-long-context"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The seventh, Long context, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(31);

# %% [markdown]
# The seam is the one of Chapter 29, and only numbers inside it change. The simplest such change raises the base:

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, ROPE, diff, patch
#
# RAISED = {"self_attention.position.base": 500_000.0}
# print(diff(patch(PAPER_BASE, ROPE), patch(PAPER_BASE, ROPE, RAISED)))

# %% [markdown]
# A larger base makes all pairs but the first turn more slowly. Why that helps is the matter of this page.

# %% mystnb={"figure": {"caption": "The seam is the position inside self-attention. RoPE stays in it; its frequencies change.", "name": "fig-long-context-seam"}, "image": {"alt": "The drawing of the model. The boxes of self-attention, which hold the position, are coloured in both stacks."}} tags=["active-ipynb"]
# from transformer_annotated import figures
#
# figures.seams(["self_attention"]);

# %%
import math
from typing import Any

import torch
from torch import Tensor

from transformer_annotated.paper.embedding import frequencies
from transformer_annotated.paper.parts import Spec, check_sizes, patch, spec
from transformer_annotated.paper.transformer import Transformer

# %% [markdown]
# ## Angles that no text has shown
#
# A head of 16 numbers has 8 pairs, and pair $i$ turns by $\omega_i = b^{-2i/d}$ radians a position. Count its full turns within $L$ positions:

# %%
def turns(omega: Tensor, length: int) -> Tensor:
    """How many full turns each pair makes within `length` positions: `length * omega / 2 pi`."""
    return length * omega / (2 * math.pi)

# %% tags=["active-ipynb"]
# omega = frequencies(16)
# print("pair                 ", *(f"{i:7d}" for i in range(8)))
# for length in (256, 2048):
#     print(f"turns within {length:5d}   ", *(f"{t:7.2f}" for t in turns(omega, length).tolist()))

# %% [markdown]
# Suppose that the training texts had 256 tokens. Pairs 0 to 3 went all the way round, so every angle between a query and a key has been seen. Pairs 4 to 7 did not. At position 2,048 pair 4 has made more than three turns, and most of its angles are new. The model has learnt what its scores mean on a small arc of the circle; nothing in training said what they mean elsewhere.
#
# Does that matter? Train a small model on texts of 256 characters, and let it read texts of 2,048. It is the bench of Chapter 25 with RoPE and pre-LN (Chapters 29 and 26).

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import PRE_LN, SDPA, train_language_model
# from transformer_annotated.book import scale
# from transformer_annotated.modern.language_model import (
#     Characters,
#     any_text,
#     language_model,
#     nats_by_position,
# )
#
# full = scale() == "full"
# L, M = (256, 2048) if full else (32, 256)  # trained on, read
# text = any_text()
# characters = Characters(text.train + text.val + text.test)
# train_ids, val_ids = (torch.tensor(characters.encode(part)) for part in (text.train, text.val))
# torch.manual_seed(0)
# model = Transformer(patch(language_model(characters.vocab_size), ROPE, PRE_LN, SDPA))
# steps = 400 if full else 10
# losses = train_language_model(model, train_ids, steps=steps, length=L, batch=8, rate=3e-3)
# print(f"{text.name}: loss {losses[0]:.2f} at first, {losses[-1]:.2f} after {steps} steps")

# %% [markdown]
# The mean loss over a long text would hide where it goes wrong. So cut the text into windows of 2,048 characters and average the loss of each *position* over the windows. Such a loss is often shown as **perplexity**, $e$ to the loss: among how many equally likely characters the model seems to choose.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def by_position(model: Transformer) -> Tensor:
#     return nats_by_position(model, val_ids, length=M, windows=24 if full else 2)
#
#
# curves = {"as trained": by_position(model)}
# for start, part in zip(range(0, M, L // 2), curves["as trained"].split(L // 2), strict=True):
#     print(
#         f"positions {start:4d} to {start + L // 2 - 1:4d}: "
#         f"{part.mean():.2f} nats, perplexity {part.mean().exp():5.1f}"
#     )

# %% [markdown]
# Within the trained length all is well, and a little beyond it too. Then the loss rises, and it does not come back.
#
# ## Two ways to fail
#
# There is a simple cure: divide all frequencies by 8. Then position 2,048 gets the angles of position 256, and no angle is new. The price is at the other end.

# %% tags=["hide-input"]
def draw_dilemma(original: int = 256, factor: float = 8.0, slow: int = 4, d: int = 16) -> Any:
    """Draw the angles of a slow pair and of the fastest pair, as they are and divided by `factor`."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    omega = frequencies(d)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
    p = torch.arange(0, int(original * factor) + 1, original // 8)
    left.axhspan(0, original * omega[slow].item(), color="#E3E9F0", label="seen in training")
    right.axhspan(0, 20, color="#E3E9F0")
    few = torch.arange(9)
    for name, divisor, color in (
        ("as it is", 1.0, COLORS[1]),
        (f"divided by {factor:.0f}", factor, COLORS[0]),
    ):
        left.plot(p, p * omega[slow] / divisor, color=color, label=name)
        right.plot(few, few * omega[0] / divisor, "o-", color=color, markersize=4)
    left.set(xlabel="position", ylabel="angle in radians", title=f"slow: pair {slow}")
    right.set(xlabel="position", ylim=(0, 9), title="fast: pair 0, the first positions")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure

# %% mystnb={"figure": {"caption": "A slow pair leaves the angles of training unless it is divided. A fast pair has seen them all, and dividing it brings neighbours close together.", "name": "fig-dilemma"}, "image": {"alt": "Two line charts of angle against position. Left, a slow pair: the line as it is climbs out of a shaded band, the divided line stays in it. Right, the fastest pair: as it is, neighbours are one radian apart; divided, an eighth."}} tags=["active-ipynb"]
# draw_dilemma();

# %% [markdown]
# The shaded band in {numref}`fig-dilemma` is what training has shown. On the left, the pair as it is leaves the band soon; divided, it stays inside. On the right nothing leaves the band, since a fast pair has been everywhere. But there two neighbouring positions were 1 radian apart, and are now an eighth of that. The model learnt to find *the previous character* by a turn of 1 radian. That turn now belongs to the eighth character before.
#
# So each pair has its own answer. With $\sigma_i$ for how much slower pair $i$ shall turn,
#
# $$
# \omega_i' = \frac{\omega_i}{\sigma_i}, \qquad \sigma_i \ge 1 .
# $$ (eq-stretch)
#
# Every rule of this chapter is a choice of $\sigma$. Most have a **factor** $s$, the largest $\sigma$ that they give. It is near $M / L$, with $M$ for the length to be read: how many times longer texts become. Some rules take it larger, and Llama 3.1 smaller (8 for 16 times), after raising the base.
#
# In code such a rule is a function that is given the head's width, the base and the length, and returns frequencies: the `Scaling` of Chapter 29. It returns one more number, by which cosines and sines are multiplied. That is 1 until we need it.
#
# ## All alike: position interpolation
#
# The first rule takes $\sigma_i = s$ for all pairs {cite:p}`chen2023extending`. Dividing every frequency is the same as dividing every position, hence the name: position 3 of a long text is put at 0.375, between two positions of training.

# %%
def check_factor(factor: float) -> None:
    """Raise ValueError for a factor that would not make texts longer."""
    if (
        isinstance(factor, bool)
        or not isinstance(factor, (int, float))
        or not 1 <= factor < math.inf
    ):
        raise ValueError(f"factor must be a finite number of at least 1, got {factor!r}")


class LinearScaling:
    """Position interpolation (Chen et al. 2023): every frequency is divided by `factor`.

    Args:
        factor: how many times longer texts become, s.

    Raises:
        ValueError: a factor below 1.
    """

    def __init__(self, factor: float) -> None:
        check_factor(factor)
        self.factor = factor

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        return frequencies(head_dim, base, length.device) / self.factor, 1.0

# %% [markdown]
# ## Through the base: NTK-aware scaling
#
# The second rule leaves the fastest pair alone, gives the slowest the full $s$, and lets $\sigma$ grow between them, by the same ratio from each pair to the next. One number does all that: a larger base $b'$. The slowest pair has $2i = d - 2$, so $\sigma_{d/2-1} = (b'/b)^{(d-2)/d}$. Set it to $s$:
#
# $$
# b' = b \, s^{d/(d-2)}, \qquad \sigma_i = s^{2i/(d-2)} .
# $$ (eq-ntk)
#
# It was published in a forum post {cite:p}`bloc2023ntk`. The name is that of a theory, the *neural tangent kernel*, in which networks have trouble learning fast oscillations from slow inputs {cite:p}`tancik2020fourier`; the rule keeps the fast pairs fast.

# %%
def stretched_base(base: float, factor: float | Tensor, head_dim: int) -> float | Tensor:
    """The base whose slowest pair turns `factor` times more slowly than with `base`.

    Raises ValueError for a `head_dim` below 4: a single pair has frequency 1 with every base.
    """
    if head_dim < 4:
        raise ValueError(f"head_dim must be at least 4 to stretch the base, got {head_dim}")
    return base * factor ** (head_dim / (head_dim - 2))


class NTKScaling:
    """NTK-aware scaling (bloc97 2023): a larger base; the slowest pair alone gets the full factor.

    Args:
        factor: how many times more slowly the slowest pair turns, s.

    Raises:
        ValueError: a factor below 1; when called, a `head_dim` below 4.
    """

    def __init__(self, factor: float) -> None:
        check_factor(factor)
        self.factor = factor

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        larger = float(stretched_base(base, self.factor, head_dim))
        return frequencies(head_dim, larger, length.device), 1.0

# %% tags=["active-ipynb"]
# anywhere = torch.zeros(1, 1, dtype=torch.long)
# slower = omega / NTKScaling(8.0)(16, 10_000.0, anywhere)[0]
# print("base", round(stretched_base(10_000.0, 8.0, 16)), "instead of 10000")
# print("each pair turns more slowly by", [round(value, 2) for value in slower.tolist()])

# %% [markdown]
# From 1 to 8, each time by the same ratio. Without the exponent $d/(d-2)$ the slowest pair would get less than 8.
#
# ## By turns: YaRN
#
# Look at the first table again. The pairs that need help are those with less than one turn within $L$. YaRN goes by that {cite:p}`peng2024yarn`. Pair $i$ makes $r$ turns within $L$ positions if $L\,b^{-2i/d} = 2\pi r$, that is
#
# $$
# i(r) = \frac{d}{2} \cdot \frac{\ln (L / 2\pi r)}{\ln b} .
# $$ (eq-yarn-pair)
#
# Pairs up to $i(32)$, with 32 turns and more, stay as they are. Pairs from $i(1)$ on, with less than one turn, are divided by $s$. A straight line $\gamma$ joins the two, from 0 at the first to 1 at the second:
#
# $$
# \omega_i' = (1 - \gamma_i)\,\omega_i + \gamma_i\,\frac{\omega_i}{s}, \qquad \gamma_i = \min\!\left(1, \max\!\left(0, \frac{i - i(32)}{i(1) - i(32)}\right)\right).
# $$ (eq-yarn)
#
# There is a second part. The authors found that in longer texts it helps to sharpen the softmax a little: they multiply the cosines and sines of queries and of keys by $0.1 \ln s + 1$. Where the whole head is turned, that multiplies each score by the square. With a `rotary_dim` below the width of the head, only the turned part of a score grows.

# %%
class YaRN:
    """YaRN (Peng et al. 2024, section 3): fast pairs stay, slow pairs are divided by `factor`.

    Between the two, over the pairs that make `beta_fast` to `beta_slow` turns within `original`
    positions, a linear ramp joins them. Cosines and sines are multiplied by `attention_factor`.

    Args:
        factor: how many times longer texts become, s.
        original: the length of the training texts, L.
        beta_fast, beta_slow: turns within L at the two ends of the ramp.
        attention_factor: None for the paper's 0.1 ln(s) + 1.

    Raises:
        ValueError: a factor below 1, a length below 1, an attention factor not above 0, or
            `beta_fast` not above `beta_slow`, or that not above 0.
    """

    def __init__(
        self,
        factor: float,
        original: int,
        beta_fast: float = 32.0,
        beta_slow: float = 1.0,
        attention_factor: float | None = None,
    ) -> None:
        check_factor(factor)
        check_sizes(original=original)
        if not beta_fast > beta_slow > 0:
            raise ValueError(
                f"beta_fast must be above beta_slow, and that above 0; got {beta_fast}, {beta_slow}"
            )
        if attention_factor is None:
            attention_factor = 0.1 * math.log(factor) + 1
        if not attention_factor > 0:
            raise ValueError(f"attention_factor must be above 0, got {attention_factor}")
        self.factor, self.original = factor, original
        self.beta_fast, self.beta_slow = beta_fast, beta_slow
        self.attention_factor = attention_factor

    def pair(self, n_turns: float, head_dim: int, base: float) -> float:
        """Which pair, counted from 0 and not rounded, makes so many turns within `original`."""
        ratio = self.original / (2 * math.pi * n_turns)
        return head_dim / 2 * math.log(ratio) / math.log(base)

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)`, and the factor on cosines and sines; `length` is not used."""
        omega = frequencies(head_dim, base, length.device)
        low = max(math.floor(self.pair(self.beta_fast, head_dim, base)), 0)
        high = min(math.ceil(self.pair(self.beta_slow, head_dim, base)), head_dim - 1)
        i = torch.arange(head_dim // 2, device=length.device)
        gamma = ((i - low) / (high - low or 0.001)).clamp(0, 1)
        return omega * (1 - gamma + gamma / self.factor), self.attention_factor

# %% [markdown]
# `pair` is {eq}`eq-yarn-pair` and the last line is {eq}`eq-yarn`. The two ends of the line are rounded outwards to whole pairs, and `0.001` keeps the line from dividing by zero where they fall together. Both come from its authors' code. The paper draws the line over turns, and the code draws it over pairs; libraries follow the code, and so do we.
#
# ## By turns again: Llama 3.1
#
# Llama 3.1 has the same two bands and another line between them, drawn over turns: less than 1 turn within $L$ is divided, more than 4 is kept {cite:p}`meta2024llama31`.

# %%
class Llama3Scaling:
    """Llama 3.1's rule: pairs with fewer than `low` turns are divided, with more than `high` kept.

    Between the two the share that is kept grows linearly with the number of turns.

    Args:
        factor: what slow frequencies are divided by, s; 8 in Llama 3.1.
        original: the length of the texts before the extension, L; 8192 in Llama 3.1.
        low, high: turns within L below which a pair is slow, and above which it is fast.

    Raises:
        ValueError: a factor below 1, a length below 1, or `low` not in (0, `high`).
    """

    def __init__(self, factor: float, original: int, low: float = 1.0, high: float = 4.0) -> None:
        check_factor(factor)
        check_sizes(original=original)
        if not high > low > 0:
            raise ValueError(f"low must be above 0 and below high; got {low} and high {high}")
        self.factor, self.original, self.low, self.high = factor, original, low, high

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(d/2,)` in radians a position, and the factor 1; `length` is not used."""
        omega = frequencies(head_dim, base, length.device)
        kept = (turns(omega, self.original) - self.low) / (self.high - self.low)
        kept = kept.clamp(0, 1)
        return omega * (kept + (1 - kept) / self.factor), 1.0

# %% [markdown]
# ## By the text at hand: dynamic NTK
#
# A fixed $s$ changes short texts too, which needed no change. The fifth rule, from another forum post {cite:p}`emozilla2023dynamic`, looks at the length $n$ of the text and stretches only as far as needed: {eq}`eq-ntk` with a factor that grows,
#
# $$
# s_n = \max\!\left(1, \frac{a\,n}{L} - (a - 1)\right) .
# $$ (eq-dynamic)
#
# Up to $n = L$ this is 1 and nothing changes. The **growth** $a$ is the slope: each $L$ tokens more add $a$. With $a = 1$ it is $n / L$; a larger growth stretches more at every length above $L$. In code it is called `factor`, as in the libraries.

# %%
class DynamicNTK:
    """NTK-aware scaling by the length at hand: none up to `original`, more with each token after.

    Args:
        factor: the growth a; a text of n > L tokens is stretched by a n / L - (a - 1).
        original: the length of the training texts, L.

    Raises:
        ValueError: a factor below 1 or a length below 1; when called, a `head_dim` below 4.
    """

    def __init__(self, factor: float, original: int) -> None:
        check_factor(factor)
        check_sizes(original=original)
        self.factor, self.original = factor, original

    def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
        """Frequencies `(B, 1, d/2)`, each row's by its own `length` `(B, 1)`; and the factor 1."""
        grown = (self.factor * length / self.original - (self.factor - 1)).clamp(min=1)
        larger = torch.as_tensor(stretched_base(base, grown, head_dim))  # (B, 1)
        exponents = torch.arange(0, head_dim, 2, device=length.device) / head_dim
        return larger[..., None] ** -exponents, 1.0

    def at(self, length: int) -> Spec[NTKScaling]:
        """The rule for texts of `length` tokens, with a factor that no longer changes.

        A text that is written with a cache needs it: choose the length before the first token.
        """
        check_sizes(length=length)
        grown = max(self.factor * length / self.original - (self.factor - 1), 1.0)
        return spec(NTKScaling, factor=grown)

# %% [markdown]
# `length` has one entry for each row of the batch, so a short text keeps its angles beside a long one. But within a row the end decides for the beginning: add a token, and the logits of every earlier position change a little. With the other rules a causal model never looks ahead. We come back to this, and to `at`, below.
#
# ## Proof
#
# Against a loop over pairs, in double precision, that goes by the definitions and not by our formulas. For YaRN it counts the turns of each pair, and looks which is the last with 32 and the first with 1:

# %% tags=["active-ipynb"]
# def by_hand(kind: str, i: int, d: int, b: float, s: float, L: int, n: int) -> float:
#     turns_of = [L * b ** (-2 * j / d) / (2 * math.pi) for j in range(d // 2)]
#     w, r = b ** (-2 * i / d), turns_of[i]
#     if kind == "LinearScaling":
#         return w / s
#     if kind in ("NTKScaling", "DynamicNTK"):
#         sigma = s if kind == "NTKScaling" else max(1, 1 + s * (n - L) / L)
#         return w / sigma ** (i / (d / 2 - 1))
#     if kind == "YaRN":  # count the pairs, with no logarithm
#         first = max(j for j, turned in enumerate(turns_of) if turned >= 32)
#         last = min(j for j, turned in enumerate(turns_of) if turned <= 1)
#         share = 0 if i <= first else 1 if i >= last else (i - first) / (last - first)
#     else:
#         share = 1 if r < 1 else 0 if r > 4 else (4 - r) / 3
#     return w * (1 - share) + w / s * share

# %% tags=["active-ipynb"]
# rules = [LinearScaling(8.0), NTKScaling(8.0)]
# rules += [kind(8.0, original=4096) for kind in (YaRN, Llama3Scaling, DynamicNTK)]
# for rule in rules:
#     for n in (100, 10_000):
#         got, factor = rule(128, 10_000.0, torch.tensor([[n]]))
#         name = type(rule).__name__
#         want = [by_hand(name, i, 128, 10_000.0, 8.0, 4096, n) for i in range(64)]
#         error = (got.double().flatten() / torch.tensor(want, dtype=torch.float64) - 1).abs().max()
#         assert error < 1e-6
#         assert math.isclose(factor, 1 + math.log(8) / 10 if name == "YaRN" else 1)
#     print(f"{name:14s} equal by hand, to 1e-6 of each frequency; on cos and sin {factor:.3f}")

# %% [markdown]
# The tests compare with Hugging Face's library as well {cite:p}`wolf2020transformers`: frequencies and factors of its linear, dynamic, YaRN and Llama 3 rules are ours, to one part in a million.
#
# And inside attention? A turn by any frequencies is a multiplication of complex numbers, $z \mapsto f z e^{i p \omega}$, with $f$ for the factor. Output and gradient:

# %% tags=["active-ipynb"]
# from transformer_annotated import RoPE
#
# torch.manual_seed(0)
# q, k = (torch.randn(2, 3, 20, 16, dtype=torch.float64, requires_grad=True) for _ in "qk")
# at = torch.arange(20).expand(2, 20)
# rope = RoPE(16, scaling=spec(YaRN, factor=8.0, original=256))
# w, f = YaRN(8.0, 256)(16, 10_000.0, at)
# phase = f * torch.exp(1j * at[:, None, :, None] * w.double())
# ours = rope(q, k, at, at)
# for x, mine in zip((q, k), ours, strict=True):
#     z = torch.complex(*x.chunk(2, dim=-1)) * phase
#     torch.testing.assert_close(mine, torch.cat((z.real, z.imag), dim=-1), rtol=0, atol=1e-10)
#     direction = torch.randn_like(x)
#     (got,) = torch.autograd.grad(mine, x, direction, retain_graph=True)
#     back = torch.complex(*direction.chunk(2, dim=-1)) * phase.conj()
#     torch.testing.assert_close(got, torch.cat((back.real, back.imag), -1), rtol=0, atol=1e-10)
# print("output and gradient equal complex numbers, to 1e-10")

# %% [markdown]
# ## Which pairs are stretched
#
# For a head of 128 numbers, trained on 4,096 tokens and stretched to 32,768, here is $\sigma$ for each pair:

# %% mystnb={"figure": {"caption": "How much more slowly each pair turns. Interpolation stretches all pairs alike, NTK-aware scaling grows by the same ratio from each pair to the next, YaRN and Llama 3 leave fast pairs alone and stretch slow ones in full.", "name": "fig-stretch"}, "image": {"alt": "A line chart over 64 pairs, with a logarithmic scale. Linear is level at 8. NTK climbs from 1 to 8 in a straight line. YaRN and Llama 3 stay at 1, then climb to 8 and stay there, Llama 3 within fewer pairs."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# plain, turn = frequencies(128), turns(frequencies(128), 4096)
# fig, ax = plt.subplots(figsize=(7.2, 3.0))
# for rule in rules[:4]:
#     sigma = plain / rule(128, 10_000.0, anywhere)[0]
#     ax.plot(sigma, label=type(rule).__name__)
# for count in (32, 4, 1):
#     last = int((turn >= count).sum()) - 0.5
#     ax.axvline(last, color="#999999", linestyle=":", linewidth=1)
#     label = f"{count} turn{'s' if count > 1 else ''}"
#     ax.text(last + 0.4, 7.2, label, rotation=90, va="top", fontsize=8)
# ax.set_yscale("log", base=2)
# ax.set_yticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
# ax.set(xlabel="pair $i$, from fast to slow", ylabel=r"$\sigma_i$: times more slowly")
# ax.legend(loc="upper left", bbox_to_anchor=(0.02, 0.93));

# %% [markdown]
# In {numref}`fig-stretch` the dotted lines say how often a pair goes round within 4,096 positions. To the right of *1 turn* lie the angles that training has not shown. There YaRN and Llama 3's rule give the full 8. NTK-aware scaling gives less than 8 to every pair but the last, so some of those pairs still leave the range of training before $8 L$.
#
# ## The patch
#
# Each rule is a spec for one argument of RoPE. A trained model needs no new weights for it, since RoPE has none. So we take the config, patch it, build it, and load the weights that are there:

# %%
def rescaled(model: Transformer, **changes: object) -> Transformer:
    """A copy of `model`, weights and all, whose RoPE has other arguments.

    Args:
        model: has RoPE in its self-attention.
        changes: arguments of `RoPE` that own no parameters, such as `scaling` or `base`.

    Raises:
        ValueError: no RoPE, or an argument it does not have.
    """
    changed = {f"self_attention.position.{name}": value for name, value in changes.items()}
    copy = Transformer(patch(model.config, changed))
    like = next(model.parameters())
    copy.to(like.device, like.dtype).load_state_dict(model.state_dict())
    return copy.train(model.training)

# %% tags=["active-ipynb"]
# YARN = {"self_attention.position.scaling": spec(YaRN, factor=8.0, original=256)}
# print(diff(patch(PAPER_BASE, ROPE), patch(PAPER_BASE, ROPE, YARN)))

# %% [markdown]
# ## Measure: eight times longer, no further training
#
# Now the small model of the first section again. The same weights read the same windows of 2,048 characters, each time with other angles. The last line is for comparison: the angles as trained, and each query sees the last 256 keys alone.
#
# These rules have no line in the matrix of Chapter 35: there the texts to be read are no longer than those of training, and there is nothing to stretch.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# s = M / L
# stretched = {
#     "linear": rescaled(model, scaling=spec(LinearScaling, factor=s)),
#     "NTK": rescaled(model, scaling=spec(NTKScaling, factor=s)),
#     "YaRN": rescaled(model, scaling=spec(YaRN, factor=s, original=L)),
#     "Llama 3": rescaled(model, scaling=spec(Llama3Scaling, factor=s, original=L)),
#     "dynamic": rescaled(model, scaling=spec(DynamicNTK, factor=2.0, original=L)),
# }
# cut = Transformer(patch(model.config, {"self_attention.window": L}))
# cut.load_state_dict(model.state_dict());

# %% tags=["active-ipynb", "nbval-ignore-output"]
# curves |= {name: by_position(other) for name, other in stretched.items()}
# curves[f"window {L}"] = by_position(cut)
# print(
#     f"{'nats at positions':20s}{f'0 to {L - 1}':>12s}{f'to {M // 2 - 1}':>10s}{f'to {M - 1}':>10s}"
# )
# for name, curve in curves.items():
#     parts = curve[:L], curve[L : M // 2], curve[M // 2 :]
#     print(f"{name:20s}{parts[0].mean():12.2f}{parts[1].mean():10.2f}{parts[2].mean():10.2f}")

# %% tags=["hide-input"]
def draw_by_position(curves: dict[str, Tensor], trained: int) -> Any:
    """Draw the loss at each position, averaged over 64 neighbours, and where training ended."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    figure, ax = plt.subplots(figsize=(7.2, 3.2))
    colors = ["black", *COLORS]
    for (name, curve), color in zip(curves.items(), colors, strict=False):
        width = min(64, len(curve) // 8)
        middle = torch.arange(len(curve) - width + 1) + width / 2
        ax.plot(middle, curve.unfold(0, width, 1).mean(-1), color=color, label=name)
    ax.axvline(trained, color="#999999", linestyle=":")
    ax.set(xlabel="position", ylabel="loss, nats a character")
    figure.legend(loc="outside upper center", ncols=len(curves))
    return ax

# %% mystnb={"figure": {"caption": "A model trained on 256 characters reads 2,048, without further training. As trained it fails soon after 256. Interpolation fails everywhere. NTK-aware scaling holds for a while, YaRN to the end. A window of 256 keys, with no new angle, does best.", "name": "fig-by-position"}, "image": {"alt": "A line chart of loss against position up to 2,048, with a dotted line at 256 where training ended. The black curve, as trained, jumps up soon after it. Linear is high throughout. NTK and dynamic are low and jump up late. YaRN and Llama 3 stay low to the end, and the window is below them."}} tags=["active-ipynb", "nbval-ignore-output"]
# draw_by_position({name: curves[name] for name in curves if name != "dynamic"}, trained=L);

# %% [markdown]
# Read {numref}`fig-by-position` from the left. The small waves are the text's: all models read the same windows.
#
# - *As trained* is the best of all up to 256, and fails soon after.
# - *Linear* puts no angle outside its range, and is bad from the first character on: its fast pairs say something else now. Its authors trained on after the change; so does the next section.
# - *NTK* costs little at the start. It does not reach 2,048, as {numref}`fig-stretch` let us expect. The authors of YaRN note that it has to be given a larger factor than the text needs {cite:p}`peng2024yarn`.
# - *YaRN* and *Llama 3* reach the end. At the start YaRN pays hardly more than NTK, Llama 3 more. Early positions lose, late ones win.
# - *Dynamic* is in the table alone. The window is one text of 2,048 characters, so by {eq}`eq-dynamic` with $a = 2$ it is NTK-aware scaling by 15. That holds longer than scaling by 8, and rises too towards the end. A text of 256 it reads like the model as trained.
# - *Window* changes no angle: each query simply sees the last 256 keys, as in Chapter 30. It loses nothing at the start and nothing at the end.
#
# One seed, and a head of 8 pairs. Look at $\sigma$ for these pairs:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for rule in (YaRN(s, L), Llama3Scaling(s, L)):
#     sigma = (omega / rule(16, 10_000.0, anywhere)[0]).tolist()
#     print(f"{type(rule).__name__:14s}", *(f"{value:5.2f}" for value in sigma))

# %% [markdown]
# Llama 3's rule was made for 64 pairs. Here it keeps the first pairs and divides nearly all others by 8, while YaRN's line takes in several pairs. Do not read their order as a verdict.
#
# The curves of the models that hold are nearly flat beyond 256. Longer context hurts them little, and it helps them little: so small a model has learnt to use little of what lies far back. For a text that needs only near words, cutting is enough. The rules are for texts where a far word must be reached, and this bench does not test that. A flat curve shows that nothing breaks. It does not show that a word 2,000 characters back is *found*. Benchmarks for that hide a fact in a long text and ask for it; many models do worse at it than their context length promises {cite:p}`hsieh2024ruler`, and the middle of a text is the hardest place {cite:p}`liu2024lost`.
#
# ## A few steps at the new length
#
# Interpolation was published together with a remedy: train a little longer, on long texts, with the new angles. Its authors used 1,000 steps {cite:p}`chen2023extending`; we take a few, on one text of 2,048 characters a step.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# tuned = {name: rescaled(stretched[name]) for name in ("linear", "YaRN")}  # copies
# tuned = {"as trained": rescaled(model), **tuned}
# tuned["larger base"] = rescaled(model, base=RAISED["self_attention.position.base"])
# for other in tuned.values():
#     few = 30 if full else 2
#     train_language_model(other, train_ids, steps=few, length=M, batch=1, rate=1e-3)
# after = {name: by_position(other) for name, other in tuned.items()}
# for name, curve in after.items():
#     parts = curve[:L], curve[L:]
#     print(f"{name:12s} up to {L}: {parts[0].mean():.2f}   beyond: {parts[1].mean():.2f} nats")

# %% [markdown]
# Compare the first three with the table above: all read long texts better than before. YaRN and the larger base lead; interpolation comes back from far away, and so few steps do not bring it all the way. The model whose angles were left alone learns the new ones too. It pays with its short texts. Part of every gain is simply more training.
#
# *Larger base* is the simplest rule of all: raise $b$ to a round number, and train on. {cite:t}`xiong2023effective` compared it with interpolation and found it better; it is {eq}`eq-ntk` with a factor that is chosen and not computed. `RAISED`, the patch at the top of this page, is this rule.
#
# ## Dynamic angles and the cache
#
# Dynamic NTK has a problem that the others do not have. When a text grows by one token, *all* its angles change, also those of keys that lie in a cache. What may be kept? Take a text of $2L$ tokens. Read the first quarter at once, and the other three one token at a time. There are two ways to keep keys:
#
# 1. keep each key as it was turned when it came. Many programs do;
# 2. keep keys unturned and turn them all at each step, as our cache does (Chapter 20).
#
# Compare both with a pass that keeps nothing and reads the whole text again. This is right by definition. A third line will show the cure, which is explained below. The first way needs a RoPE that remembers:

# %% tags=["active-ipynb"]
# class TurnedKeys(RoPE):
#     def forward(self, q, k, positions, key_positions):
#         omega, factor = self.frequencies(positions, key_positions)
#         new = self.turn(k[:, :, -q.shape[2] :], positions, omega, factor)
#         begins = k.shape[2] == q.shape[2]  # a new text: no older keys
#         self.kept = new if begins else torch.cat((self.kept, new), dim=2)
#         return self.turn(q, positions, omega, factor), self.kept
#
#
# growing = stretched["dynamic"]
# position = spec(TurnedKeys, scaling=spec(DynamicNTK, factor=2.0, original=L))
# turned = Transformer(patch(growing.config, {"self_attention.position": position})).eval()
# turned.load_state_dict(model.state_dict());

# %% tags=["active-ipynb"]
# from transformer_annotated import Cache
#
#
# @torch.no_grad()
# def gap(cached: Transformer, afresh: Transformer, every: int = 8) -> Tensor:
#     """Largest difference of a logit between a cache and a new pass, at every eighth length."""
#     ids, cache, worst = val_ids[None, : 2 * L], Cache(cached), []
#     for new in ids.split([L // 2] + [1] * (2 * L - L // 2), dim=1):
#         at = torch.arange(cache.length, cache.length + new.shape[1])[None]
#         logits = cached.logits(cached.decode(new, positions=at, cache=cache))[:, -1]
#         if cache.length % every == 0:
#             worst.append((logits - afresh(ids[:, : cache.length])[:, -1]).abs().max())
#     return torch.stack(worst)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# frozen = rescaled(model, scaling=DynamicNTK(2.0, L).at(2 * L))
# gaps = {
#     "keys kept turned": gap(turned, growing),
#     "keys kept unturned": gap(growing, growing),
#     "length chosen beforehand": gap(frozen, frozen),
# }
# for name, values in gaps.items():
#     within, beyond = values.tensor_split([L // 16 + 1])
#     print(f"{name:26s}up to {L}: {within.max():.6f}   beyond: {beyond.max():.6f}")
# assert gaps["length chosen beforehand"].max() < 1e-3

# %% mystnb={"figure": {"caption": "With dynamic angles no cache of keys gives what a new pass gives, once the text is longer than 256. Chosen for the whole text beforehand, the angles stay, and the cache is exact up to rounding.", "name": "fig-cache-gap"}, "image": {"alt": "A line chart on a logarithmic scale: the largest difference of a logit against the tokens read. Two curves jump up at 256, the one for keys kept turned above the one for keys kept unturned. A third stays near a millionth."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.8))
# lengths = range(L // 2 + 8, 2 * L + 1, 8)  # without the first, which read no cache
# for name, values in gaps.items():
#     ax.semilogy(lengths, values[1:].clamp(min=1e-7), label=name)
# ax.axvline(L, color="#999999", linestyle=":")
# ax.set(xlabel="tokens read", ylabel="largest difference of a logit")
# fig.legend(loc="outside upper center", ncols=3);

# %% [markdown]
# In {numref}`fig-cache-gap` all three agree up to the trained length: there the angles do not change. Beyond it, turned keys are wrong at once, since a query of today's angles meets keys of yesterday's.
#
# Unturned keys are turned anew at each step, so the scores of the *first* layer are right; for a model of one layer the tests find no difference. But a key of the second layer was computed from what the first layer returned *then*, under the angles of then. A new pass would return something else. No cache of keys can know that, at any depth above one.
#
# So an exact cache needs angles that stay. Decide how long the text may become before its first token is read, and take the rule for that length: `DynamicNTK(2.0, 256).at(512)`. It is a plain `NTKScaling`. At its full length it is what the dynamic rule gives; before, it is stretched more than needed. The other exact way is to empty the cache and read the text again whenever the angles change. Change them rarely then; Exercise 31.4 does it at each doubling.
#
# Hugging Face's library keeps turned keys, and in a batch the longest row sets the angles of all rows (read in its version 5.23). There an answer can depend on the cache and on the neighbours in the batch. In ours a row depends on its own length.
#
# ## What the paper said, and what is done today
#
# The paper of 2017 hoped that sinusoids would let the model "extrapolate to sequence lengths longer than the ones encountered during training" (section 3.5). RoPE's paper counts "the flexibility of sequence length" among its properties {cite:p}`su2021roformer`. This page shows what it takes to use it. What models did:
#
# | model | lengths in training | base | rule |
# |---|---|---|---|
# | Llama {cite:p}`touvron2023llama` | 2,048 | 10,000 | none |
# | Llama 2 {cite:p}`touvron2023llama2` | 4,096 | 10,000 | none |
# | Code Llama {cite:p}`roziere2023code` | 4,096, then 16,384 | 1,000,000 | larger base |
# | Llama 2 Long {cite:p}`xiong2023effective` | 4,096, then 32,768 (7B, 13B) or 16,384 (34B, 70B) | 500,000 | larger base |
# | Llama 3.1 {cite:p}`grattafiori2024llama3` | 8,192, then in stages to 131,072 | 500,000 | its own, $s = 8$ |
# | Qwen2.5 {cite:p}`qwen2024qwen25` | 4,096, then 32,768 | 1,000,000 | larger base; YaRN and Dual Chunk Attention to read 131,072 |
# | DeepSeek-V3 {cite:p}`deepseek2024v3` | 4,096, then 32,768 and 131,072 | 10,000 | YaRN, $s = 40$ |
#
# The later ones train again at the new length, for a small part of the first training: DeepSeek-V3 for 1,000 steps in each of its two phases. Another cost does not go away: attention's work grows with the square of the length, and the cache with the length. Chapters 32 and 33 are about those.
#
# ## How it breaks
#
# - *The rule in a checkpoint's config is not read.* Short texts can look right. Compare logits at positions beyond the original length.
# - *Interpolation that multiplies.* $\omega s$ in place of $\omega / s$: the model is out of range after $L / s$ tokens.
# - *YaRN without its factor*, or with it on queries alone. All shapes and most texts are right, and every score is too small. Compare scores with a loop.
# - *`original` and the new length exchanged.* YaRN then keeps pairs that leave their range. Print {eq}`eq-yarn-pair` for 1 and 32 turns.
# - *Dynamic angles with a cache.* Right up to $L$, wrong after. Compare a cached run with a new pass at $2L$, not at 20 tokens.
# - *A mean over a long text.* The end is hidden by the beginning. Draw the loss by position.
#
# ## Takeaways
#
# - A model has seen all angles of fast pairs and an arc of those of slow pairs. Beyond the trained length slow pairs leave the arc.
# - Every rule divides each frequency by some $\sigma_i \ge 1$: all alike (interpolation), by a ratio that is the same from pair to pair (NTK), by the turns within $L$ (YaRN, Llama 3.1).
# - YaRN also multiplies each score by $(0.1 \ln s + 1)^2$, if the whole head is turned.
# - Angles that change while a text grows do not go together with a cache. Choose the length beforehand.
# - Where near words are enough, a window does without any new angle.
# - A level loss by position shows that nothing breaks. Whether far words are used is another test.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 31.1.** A model with heads of 128 numbers and base 10,000 shall read four times longer texts by NTK-aware scaling. Which base does it get?

# %% tags=["active-ipynb"]
# answer = ...
# check("31.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 10_000 * 4 ** (128 / 126)
# check("31.1", answer)

# %% [markdown]
# **Exercise 31.2.** Llama 3.1 has heads of 128 numbers, base 500,000, and was trained on 8,192 tokens first. How many of its 64 pairs does its rule leave alone, how many does it divide in full, and how many lie between? Answer with three whole numbers in that order.

# %% tags=["active-ipynb"]
# answer = ...
# check("31.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# count = turns(frequencies(128, 500_000.0), 8192)
# kept, divided = int((count >= 4).sum()), int((count <= 1).sum())
# answer = [kept, divided, 64 - kept - divided]
# check("31.2", answer)

# %% [markdown]
# **Exercise 31.3.** DeepSeek-V3 uses YaRN with $s = 40$. By how much does YaRN's factor multiply each score?

# %% tags=["active-ipynb"]
# answer = ...
# check("31.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = (0.1 * math.log(40) + 1) ** 2
# check("31.3", answer)

# %% [markdown]
# **Exercise 31.4.** Write a `Scaling` whose angles change rarely: a class `Doubling` with the argument `original`. It is NTK-aware scaling by the smallest of 1, 2, 4, 8, ... that is at least `length / original`, for each row by itself. A call returns frequencies of shape `(B, 1, d/2)` and 1.0, as `DynamicNTK` does. Answer with the class.

# %% tags=["active-ipynb"]
# answer = ...
# check("31.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# class Doubling:
#     def __init__(self, original: int) -> None:
#         self.original = original
#
#     def __call__(self, head_dim: int, base: float, length: Tensor) -> tuple[Tensor, float]:
#         factor = 2.0 ** (length / self.original).log2().ceil().clamp(min=0)  # (B, 1)
#         larger = stretched_base(base, factor, head_dim)
#         exponents = torch.arange(0, head_dim, 2, device=length.device) / head_dim
#         return larger[..., None] ** -exponents, 1.0
#
#
# check("31.4", Doubling)
