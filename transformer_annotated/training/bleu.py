# %% [markdown]
r"""
# BLEU

One number for a thousand translations: derived on one sentence, equal to sacreBLEU's, with an interval that says how much of it is chance, and with
the reasons why the paper's 28.4 is most likely on another scale than yours.
"""

# %% [markdown]
# The decoder of the last two chapters writes translations. Are those of this week better than those of last week? Someone must read them, or a rule must count something. BLEU counts {cite:p}`papineni2002bleu`.
# Nearly every table on translation holds it, the paper's included. This chapter takes it apart.

# %% mystnb={"figure": {"caption": "Chapter 22 of Part II: a number for translations.", "name": "fig-map-bleu"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The eleventh, BLEU, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(22);

# %%
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# %% [markdown]
# ## One sentence
#
# A person translated a sentence as *a small dog runs across the green grass in spring*. A model wrote *a small dog runs over the green green grass*. How good is that?
#
# Not the same, but close. There are many good translations, and nobody can list them. But good ones share words with the reference, and runs of words. A run of $n$ neighbouring tokens is an **n-gram**. So count: how many n-grams of the
# translation does the reference have?
#
# One thing needs care. *green* stands twice in the translation and once in the reference. If both counted, then *the the the the* would be made of nothing but right words. So an n-gram counts at most
# as often as the reference has it. That is called **clipping** (not the clipping of gradients).

# %%
def n_grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of `n` neighbouring tokens occurs."""
    return Counter(zip(*(tokens[i:] for i in range(n)), strict=False))


def clipped(hypothesis: Sequence[str], reference: Sequence[str], n: int) -> int:
    """How many n-grams of the hypothesis the reference has, each at most as often as it does."""
    return (n_grams(hypothesis, n) & n_grams(reference, n)).total()

# %% tags=["active-ipynb"]
# reference = "a small dog runs across the green grass in spring".split()
# hypothesis = "a small dog runs over the green green grass".split()
# for n in (1, 2, 3, 4):
#     found = n_grams(hypothesis, n) & n_grams(reference, n)  # the smaller of both counts
#     print(f"n = {n}: {clipped(hypothesis, reference, n)} of {n_grams(hypothesis, n).total()}")
#     print("    ", ", ".join(" ".join(gram) for gram in found))

# %% tags=["hide-input"]
def draw_matches(hypothesis: Sequence[str], reference: Sequence[str]) -> "Axes":
    """Draw every n-gram of a hypothesis as a bar, filled where the reference has it."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    ax, y = plt.subplots(figsize=(7.2, 2.9))[1], 0.0
    for n in (1, 2, 3, 4):
        left = n_grams(reference, n)
        for i in range(len(hypothesis) - n + 1):
            gram = tuple(hypothesis[i : i + n])
            hit, left[gram] = left[gram] > 0, left[gram] - 1
            face = COLORS[0] if hit else "white"
            ax.barh(y - i % n, n - 0.12, 0.7, left=i + 0.06, color=face, edgecolor=COLORS[0])
        share = f"{clipped(hypothesis, reference, n)} of {len(hypothesis) - n + 1}"
        ax.text(len(hypothesis) + 0.2, y - (n - 1) / 2, f"n = {n}:  {share}", va="center")
        y -= n + 0.6
    ax.set(xlim=(0, len(hypothesis) + 1.8), ylim=(y + 0.4, 0.7))
    ax.set_xticks([i + 0.5 for i in range(len(hypothesis))], hypothesis)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.set_yticks([])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return ax

# %% mystnb={"figure": {"caption": "One wrong word breaks one 1-gram and up to four 4-grams.", "name": "fig-bleu-matches"}, "image": {"alt": "The nine words of the translation in a row. Under each group of one, two, three and four words lies a bar, filled where the reference has that group. Most single words are filled, and only one bar of four words."}} tags=["active-ipynb"]
# draw_matches(hypothesis, reference);

# %% [markdown]
# In {numref}`fig-bleu-matches` a filled bar is a match. Single words say whether the vocabulary is right. Longer n-grams say whether the order is: *over* spoils every run that passes through it.
#
# ## Four shares, one number
#
# Call the four shares $p_1$ to $p_4$. BLEU takes their **geometric mean**, the fourth root of their product. The shares shrink as $n$ grows, and in a plain mean the first share would count far more than the fourth. In a product, making any share a tenth larger has the same effect.
#
# Something is still missing. The shares only ask about what was written. A system that writes *a small dog* and stops has four perfect shares. So BLEU has a **brevity penalty**: with $c$ tokens written where the references have $r$, a translation that is too short is multiplied by
# $e^{1 - r/c}$. One that is too long needs no penalty, because its extra words lower the shares already.
#
# $$
# \mathrm{BLEU} = 100 \cdot \min\left(1,\ e^{\,1 - r/c}\right) \cdot \left(p_1\, p_2\, p_3\, p_4\right)^{1/4},
# \qquad p_n = \frac{\sum_s m_n(s)}{\sum_s t_n(s)}
# $$ (eq-bleu)
#
# Here $m_n(s)$ are the clipped matches of sentence $s$, and $t_n(s)$ the n-grams that its translation has. The sums run over the whole test set, and so do $c$ and $r$. All division comes last.
#
# So a sentence gives ten whole numbers, and the test set their sums:

# %%
def check_pairs(hypotheses: Sequence[Any], references: Sequence[Any]) -> None:
    """Raise ValueError unless there is one reference for each hypothesis, and at least one."""
    for name, side in (("hypotheses", hypotheses), ("references", references)):
        if isinstance(side, str):
            raise ValueError(f"{name} must be a list of sentences, got one text {side[:40]!r}")
        if not len(side):
            raise ValueError(f"{name} must hold at least one sentence, got none")
    if len(hypotheses) != len(references):
        raise ValueError(
            f"need one reference for each hypothesis, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references"
        )


def count_matches(
    hypotheses: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> Tensor:
    """What BLEU needs to know of each sentence: whole numbers, `(N, 10)`, float64.

    The columns: tokens of the hypothesis, tokens of the reference, matches for n = 1 to 4, and
    n-grams of the hypothesis for n = 1 to 4.

    Raises ValueError for no sentences, or for different numbers of them.
    """
    check_pairs(hypotheses, references)
    rows = []
    for hyp, ref in zip(hypotheses, references, strict=True):
        matches = [clipped(hyp, ref, n) for n in (1, 2, 3, 4)]
        totals = [max(len(hyp) - n + 1, 0) for n in (1, 2, 3, 4)]
        rows.append([len(hyp), len(ref), *matches, *totals])
    return torch.tensor(rows, dtype=torch.float64)

# %% [markdown]
# `check_pairs` refuses more than seems necessary. We come back to it. Now the equation, sign by sign:

# %%
def bleu_score(counts: Tensor, *, smooth: bool = False) -> Tensor:
    """BLEU, 0 to 100, of counts summed over the sentences: `(..., 10)` to `(...,)`.

    `smooth` is sacreBLEU's "exp": the k-th order without a match gets 1 / 2^k of a match.
    """
    written, wanted = counts[..., 0], counts[..., 1]  # (...,)
    matches, totals = counts[..., 2:6], counts[..., 6:10]  # (..., 4)
    if smooth:
        halves = 0.5 ** (matches == 0).cumsum(dim=-1)
        matches = torch.where((matches == 0) & (matches[..., :1] > 0), halves, matches)
    precision = torch.where(totals > 0, matches / totals.clamp(min=1), 0.0)
    brevity = (1 - wanted / written.clamp(min=1)).clamp(max=0).exp()
    return 100 * brevity * precision.log().mean(dim=-1).exp()


def corpus_bleu(
    hypotheses: Sequence[Sequence[str]],
    references: Sequence[Sequence[str]],
    *,
    smooth: bool = False,
) -> float:
    """BLEU, 0 to 100, of token lists against one reference each (Papineni et al., 2002).

    Counts are summed over the corpus before anything is divided. Equal to sacreBLEU with
    `tokenize="none"` and `smooth_method="none"`, or `"exp"` where `smooth` is True.

    Raises ValueError for no sentences, or for different numbers of them.
    """
    return bleu_score(count_matches(hypotheses, references).sum(dim=0), smooth=smooth).item()

# %% tags=["active-ipynb"]
# import math
#
# counts = count_matches([hypothesis], [reference])
# print(
#     "c, r:", counts[0, :2].tolist(), "  m:", counts[0, 2:6].tolist(), "  t:", counts[0, 6:].tolist()
# )
# by_hand = 100 * math.exp(1 - 10 / 9) * (7 / 9 * 5 / 8 * 2 / 7 * 1 / 6) ** (1 / 4)
# print(f"by hand {by_hand:.6f}, by code {corpus_bleu([hypothesis], [reference]):.6f}")

# %% [markdown]
# Is that the BLEU that others use? sacreBLEU is the reference implementation {cite:p}`post2018call`. Told to take tokens as they are (`tokenize="none"`), it must agree, on token lists good and bad:

# %% tags=["active-ipynb"]
# from sacrebleu.metrics import BLEU, CHRF
#
# rng, largest = random.Random(0), 0.0
# for _trial in range(200):
#     words = rng.choice(("ab", "abcdef", "abcdefghijklmnopqrstuvwxyz"))
#     sides = [[rng.choices(words, k=rng.randint(0, 9)) for _ in range(4)] for _ in range(2)]
#     texts = [[" ".join(tokens) for tokens in side] for side in sides]
#     for smooth, name in ((False, "none"), (True, "exp")):
#         theirs = BLEU(tokenize="none", smooth_method=name).corpus_score(texts[0], [texts[1]])
#         largest = max(largest, abs(corpus_bleu(*sides, smooth=smooth) - theirs.score))
# print("200 random corpora agree:", largest < 1e-9)
# assert largest < 1e-9

# %% [markdown]
# `smooth` is for small sets. If no 4-gram matches, the product is zero, however good the words are. sacreBLEU's default, "exp", then counts half a match, a quarter for the next such $n$, and so on {cite:p}`chen2014systematic`. A test set of a thousand sentences hardly ever needs it. A single sentence often does, and that is one reason not to score single sentences:

# %% tags=["active-ipynb"]
# pair = [["it", "rains", "here", "today"], ["a", "small", "dog", "runs", "over", "the", "grass"]]
# refs = [["it", "is", "raining", "today"], ["a", "small", "dog", "runs", "over", "the", "grass"]]
# alone = [corpus_bleu([h], [r]) for h, r in zip(pair, refs, strict=True)]
# print("sentence by sentence:", [round(score, 1) for score in alone], " mean", sum(alone) / 2)
# print(f"as a corpus of two:   {corpus_bleu(pair, refs):.1f}")

# %% [markdown]
# The mean of sentence scores is not BLEU. In the first sentence two of four words are right, and alone it gets nothing.
#
# ## What a number means
#
# Is 30 good? BLEU has no unit. But we can make translations whose errors we know. Take the thousand German references of Multi30k's test set {cite:p}`elliott2016multi30k`. Spoil each word with some probability: drop it, replace it, or swap it with the one before. Then score. No model writes
# like this, since real errors come in groups.

# %%
KINDS = ("drop", "replace", "swap")


def corrupt(
    texts: Sequence[str], rate: float, *, seed: int, kinds: Sequence[str] = KINDS
) -> list[str]:
    """Texts in which each word goes wrong with probability `rate`, in one of the `kinds`.

    A word is dropped, replaced by any word of the texts, or swapped with the one before it.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie between 0 and 1, got {rate}")
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds must be some of {KINDS}, got {tuple(kinds)!r}")
    rng, words, result = random.Random(seed), [w for text in texts for w in text.split()], []
    for text in texts:
        new: list[str] = []
        for word in text.split():
            kind = rng.choice(kinds) if rng.random() < rate else "keep"
            if kind == "swap":
                new.insert(max(len(new) - 1, 0), word)
            elif kind != "drop":
                new.append(rng.choice(words) if kind == "replace" else word)
        result.append(" ".join(new))
    return result

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
# from transformer_annotated.paper.multi30k import multi30k
#
# full = scale() == "full"
# test = multi30k("test_2016_flickr")[: None if full else 60]
# references = [german for german, _ in test]
# for rate in (0.0, 0.1, 0.3):
#     print(f"{rate:.0%}  {corrupt(references, rate, seed=2)[1]}")

# %% [markdown]
# The references are text, with a full stop stuck to the last word. BLEU is about tokens. So text must be cut, and sacreBLEU brings tokenizers of its own. `cut` gives what they give. Its default, `13a`, copies the script that the yearly
# translation contests (WMT) used. It takes most punctuation off the words. More about cutting below.

# %%
TOKENIZERS = ("13a", "intl", "char", "none")


def cut(text: str, tokenize: str = "13a", *, lowercase: bool = False) -> list[str]:
    """The tokens of `text` as sacreBLEU counts them; `tokenize` is one of `TOKENIZERS`."""
    from sacrebleu.metrics import BLEU

    if tokenize not in TOKENIZERS:
        raise ValueError(f"tokenize must be one of {TOKENIZERS}, got {tokenize!r}")
    metric = BLEU(tokenize=tokenize)
    return str(metric.tokenizer((text.lower() if lowercase else text).rstrip())).split()

# %% tags=["active-ipynb"]
# print(cut('Zwei Männer, "im T-Shirt", warten.'))

# %%
def bleu_of_text(
    hypotheses: Sequence[str],
    references: Sequence[str],
    tokenize: str = "13a",
    *,
    lowercase: bool = False,
) -> float:
    """BLEU of text, cut by one of sacreBLEU's tokenizers and smoothed as it does."""
    sides = ([cut(text, tokenize, lowercase=lowercase) for text in side]
             for side in (hypotheses, references))  # fmt: skip
    return corpus_bleu(*sides, smooth=True)

# %% mystnb={"figure": {"caption": "BLEU falls fast, and hardly cares whether words are lost, replaced or swapped, until a third of them is spoilt.", "name": "fig-bleu-rate"}, "image": {"alt": "Four curves of BLEU over the share of spoilt words, from 100 at none. They fall steeply and close together. After 0.3 the one for swapped words falls no further."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# rates = (0, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5) if full else (0, 0.1, 0.5)
# fig, ax = plt.subplots()
# curves: dict[str, list[float]] = {}
# for name, kinds in {"all three": KINDS, **{kind: (kind,) for kind in KINDS}}.items():
#     spoilt = [corrupt(references, rate, seed=0, kinds=kinds) for rate in rates]
#     curves[name] = [bleu_of_text(texts, references) for texts in spoilt]
#     ax.plot(rates, curves[name], "o-", markersize=3, label=name, lw=2.4 if len(kinds) > 1 else 1.4)
# ax.set(xlabel="share of words spoilt", ylabel="BLEU", ylim=(0, 102))
# ax.legend();

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for rate, value in zip(rates, curves["all three"], strict=True):
#     print(f"{rate:6.1%} of words spoilt: BLEU {value:5.1f}")
# assert curves["all three"] == sorted(curves["all three"], reverse=True)

# %% [markdown]
# Read the table before you read anyone's score. A tenth of the words spoilt costs far more than a tenth of BLEU: each wrong word breaks up to four 4-grams. And the score says nothing about *which* words. A lost *not* costs as much as a lost *the*.
#
# Human translators disagree with each other too. {cite:t}`papineni2002bleu` scored two of them by BLEU, and both stayed far below 100. A 40 on captions and a 28 on news cannot be compared. Nor can two languages.
#
# ## Letters instead of words
#
# German *Hundes* is wrong where *Hund* was asked, and BLEU sees two unrelated tokens. **chrF** counts n-grams of characters, for $n$ from 1 to 6, without the spaces {cite:p}`popovic2015chrf`. Beside the share of the translation's n-grams that match, the precision $P$, it takes the share of the *reference's*
# n-grams that were found, the recall $R$. Both are means over the six $n$. So it needs no brevity penalty: a short translation has low recall. Recall weighs twice:
#
# $$
# \mathrm{chrF} = 100 \cdot \frac{5\, P R}{4 P + R}
# $$ (eq-chrf)
#
# A text is a sequence of characters, so `clipped` works as it is.

# %%
def corpus_chrf(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """chrF2, 0 to 100: character n-grams for n = 1 to 6, spaces left out (Popović, 2015).

    Recall weighs twice as much as precision. Equal to sacreBLEU's default.

    Raises ValueError for no sentences, or for different numbers of them.
    """
    check_pairs(hypotheses, references)
    shares = []
    for n in range(1, 7):
        match = found = wanted = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            hyp, ref = ("".join(text.split()) for text in (hypothesis, reference))
            match += clipped(hyp, ref, n)
            found += max(len(hyp) - n + 1, 0) if len(ref) >= n else 0
            wanted += max(len(ref) - n + 1, 0)
        if found and wanted:
            shares.append((match / found, match / wanted))
    precision, recall = torch.tensor(shares or [(0.0, 0.0)], dtype=torch.float64).mean(dim=0)
    f2 = 5 * precision * recall / (4 * precision + recall)
    return 100 * f2.nan_to_num(0.0).item()

# %% tags=["active-ipynb", "nbval-ignore-output"]
# spoilt = corrupt(references, 0.2, seed=0)
# ours, theirs = corpus_chrf(spoilt, references), CHRF().corpus_score(spoilt, [references]).score
# print(f"chrF: ours {ours:.6f}, sacreBLEU's {theirs:.6f}")
# assert abs(ours - theirs) < 1e-9
# ending = (
#     "Ein kleiner Hund rennt über den grünen Rasen.",
#     "Ein kleiner Hunde rennt über die grünen Rasen.",
# )
# print(f"two wrong endings: BLEU {bleu_of_text(ending[1:], ending[:1]):.1f}", end="")
# print(f", chrF {corpus_chrf(ending[1:], ending[:1]):.1f}")

# %% [markdown]
# Two wrong endings take most of this sentence's BLEU, and a fifth of its chrF. For languages with many endings chrF can be the fairer of the two.
#
# ## Is the difference real?
#
# Last week's model has 40.1, this week's has 40.6. Better? Start with systems that are equally good *by construction*: the same rate of spoilt words, another seed.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# equals = [corrupt(references, 0.2, seed=seed) for seed in range(20 if full else 4)]
# scores = torch.tensor([bleu_of_text(texts, references) for texts in equals])
# print(f"{len(scores)} equally good systems: BLEU {scores.min():.2f} to {scores.max():.2f}")
# assert scores.min() < scores.max()

# %% [markdown]
# So a difference of half a BLEU can easily be luck, on a thousand sentences. There is a second kind of luck: which sentences are in the test set. Another thousand photographs would have given another score. We cannot have them. But we can draw a thousand sentences *from these, with replacement*, so that some
# come twice and some not at all, and score that. Do it a thousand times, and the spread of the scores shows how much the choice matters. This is the **bootstrap**; {cite:t}`koehn2004statistical` brought it to translation.
#
# All that BLEU needs are ten numbers a sentence, so a new test set costs one sum:

# %%
def bootstrap_bleu(counts: Tensor, *, resamples: int = 1000, seed: int = 0) -> Tensor:
    """BLEU of `resamples` test sets, drawn from this one with replacement (Koehn, 2004).

    Args:
        counts: `(N, 10)` gives `(resamples,)`. For M systems on the same test set, `(N, M, 10)`
            gives `(resamples, M)`, and the sentences of a drawn set are the same for all.

    Raises ValueError for `resamples` < 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    generator, N = torch.Generator().manual_seed(seed), len(counts)
    draws = (torch.randint(N, (N,), generator=generator) for _ in range(resamples))
    return bleu_score(torch.stack([counts[drawn].sum(dim=0) for drawn in draws]), smooth=True)


def interval(scores: Tensor) -> tuple[float, float]:
    """The middle 95 of 100 scores `(resamples,)`: what lies between the ends of the rest."""
    low, high = scores.quantile(torch.tensor([0.025, 0.975], dtype=scores.dtype)).tolist()
    return low, high

# %% tags=["active-ipynb", "nbval-ignore-output"]
# wanted = [cut(text) for text in references]
# first = count_matches([cut(text) for text in equals[0]], wanted)
# resampled = bootstrap_bleu(first)
# low, high = interval(resampled)
# print(
#     f"BLEU {bleu_score(first.sum(dim=0), smooth=True):.2f}, 95 % between {low:.2f} and {high:.2f}"
# )
# theirs = BLEU().corpus_score(equals[0], [references], n_bootstrap=1000)
# print(f"sacreBLEU: {theirs.score:.2f}, {theirs._mean:.2f} ± {theirs._ci:.2f}")
# assert abs((low + high) / 2 - theirs._mean) < 0.3 * theirs._ci

# %% [markdown]
# That is the **95 % interval** of the score: 95 of 100 drawn test sets score inside. sacreBLEU draws other sentences, so its ends differ a little.
#
# Two intervals that overlap look like "no difference". Often that is wrong. Both systems translate the *same* sentences, and for real systems what is hard for one is often hard for the other. So draw the sentences once for both, and look at the **difference**, set by set: the *paired* bootstrap. Our counts only need an axis for the system.
#
# Two cases. The system *same* is as good as the first, with its own errors. The system *worse* has the first one's errors and a few more.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# worse = corrupt(equals[0], 0.004 if full else 0.1, seed=99)
# systems = {"first": equals[0], "same": equals[1], "worse": worse}
# tokens = {name: [cut(text) for text in texts] for name, texts in systems.items()}
# counts = torch.stack([count_matches(tokens[name], wanted) for name in systems], dim=1)
# drawn = bootstrap_bleu(counts)  # (1000, 3)
# actual = bleu_score(counts.sum(dim=0), smooth=True)
# for i, name in enumerate(systems):
#     print(
#         f"{name:6} {actual[i]:.2f}   {interval(drawn[:, i])[0]:.2f} to {interval(drawn[:, i])[1]:.2f}"
#     )
# for i, name in ((1, "same"), (2, "worse")):
#     low, high = interval(drawn[:, i] - drawn[:, 0])
#     share = (drawn[:, i] > drawn[:, 0]).double().mean()
#     print(f"{name:6} minus first: {low:+.2f} to {high:+.2f}; ahead in {share:.1%} of the sets")

# %% mystnb={"figure": {"caption": "Left: the scores of three systems overlap. Right: one difference lies clear of zero, the other does not.", "name": "fig-bleu-bootstrap"}, "image": {"alt": "Left, three overlapping hills of BLEU scores. Right, two hills of differences: a wide one that covers zero, and a narrow one to the left of zero."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
# ends = torch.linspace(drawn.min(), drawn.max(), 40).tolist()
# for i, name in enumerate(systems):
#     left.hist(drawn[:, i].tolist(), bins=ends, histtype="step", lw=1.6, label=name)
# left.set(xlabel="BLEU on a drawn test set", ylabel="number of test sets")
# left.legend()
# differences = drawn - drawn[:, :1]
# ends = torch.linspace(differences.min(), differences.max(), 60).tolist()
# style = {"bins": ends, "histtype": "stepfilled", "alpha": 0.6}
# for i, name in ((1, "same"), (2, "worse")):
#     right.hist(differences[:, i].tolist(), color=figures.COLORS[i], label=name, **style)
# right.axvline(0, color="black", lw=1)
# right.set(xlabel="BLEU minus that of first", ylabel="number of test sets")
# right.legend();

# %% [markdown]
# On the left of {numref}`fig-bleu-bootstrap`, three hills that overlap: no single score tells these systems apart. On the right, the differences. *Worse* is below zero in every one of the drawn sets, though its score is within the other's interval. *Same* lies on both sides. The question with pairs is the
# one to ask. sacreBLEU has a paired test too. It centres the differences as an older script did, so its p-value is not our share. The verdicts agree:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from sacrebleu.significance import PairedTest
#
# named = [("first", equals[0]), ("same", equals[1]), ("worse", worse)]
# signature, table = PairedTest(
#     named, {"BLEU": BLEU()}, [references], test_type="bs", n_samples=1000
# )()
# for name, result in zip(table["System"], table["BLEU"], strict=True):
#     p = "" if result.p_value is None else f"p = {result.p_value:.3f}"
#     print(f"{name:6} {result.score:.2f}  {p}")
# print(signature["BLEU"])

# %% [markdown]
# A caution. The bootstrap knows about the choice of sentences. It does not know that training again, with another seed, gives another model. For that there is only one way: train again. Chapter 23 lists runs with three seeds, for a GPU.
#
# ## Five ways to cut
#
# The same German translations, a fifth of the words spoilt, against the same references. Only the cutting differs. `intl` separates all punctuation, also inside words. `none` cuts at spaces. `char` makes each character a token.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# ways = {
#     "13a": ("13a", False),
#     "13a, lower-cased": ("13a", True),
#     "intl": ("intl", False),
#     "none": ("none", False),
#     "char": ("char", False),
# }
# table = {
#     name: bleu_of_text(equals[0], references, tokenize, lowercase=lowercase)
#     for name, (tokenize, lowercase) in ways.items()
# }
# for name, (tokenize, lowercase) in ways.items():
#     tokens_of_it = cut("Er sagt: T-Shirt.", tokenize, lowercase=lowercase)
#     print(f"{name:17} {table[name]:.2f}   {' '.join(tokens_of_it)}")
# assert table["none"] < table["13a"] < table["char"]

# %% mystnb={"figure": {"caption": "The same translations, prepared in five ways, have four different scores. The one of characters is far above the rest.", "name": "fig-bleu-cuts"}, "image": {"alt": "Five bars of BLEU: four of similar height for tokens that are words, and a much higher one for tokens that are characters."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.2))
# bars = ax.barh(list(table), list(table.values()))
# ax.bar_label(bars, fmt="%.1f", padding=4)
# ax.invert_yaxis()
# ax.grid(axis="y", visible=False)
# ax.set(xlabel="BLEU", xlim=(0, 100));

# %% [markdown]
# Nothing about the translations changed. (Spoilt words keep their case, so lower-casing does nothing here. A model's wrong capitals would be forgiven.) So a BLEU score without its way of cutting is half a number. {cite:t}`post2018call` found differences of up to 1.8 between the ways that papers used, without saying which. The remedy is sacreBLEU. It gets plain text on both sides, cuts it itself, and prints what it did. For that, your output must *be* plain text.
# If the model writes tokens, they must be joined again.
#
# ## Ceilings
#
# Joining can go wrong. Then even a perfect model loses. The **ceiling** of a tokenizer is the score of perfect translations: the references, to ids and back. Chapter 13's word list and its byte pairs:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.paper.multi30k import detokenize, tokenizer
# from transformer_annotated.training.tokens import train_bpe, train_words
#
# training = multi30k("train")[: None if full else 300]
# bpe = train_bpe((text for pair in training for text in pair), 8000 if full else 400)
# rows = []
# for side, language in enumerate(("de", "en")):
#     raw = [pair[side] for pair in test]
#     split = tokenizer(language)
#     words = train_words((pair[side] for pair in training), language, min_count=2)
#     rows += [
#         (language, "words, cut and joined", [detokenize(split(text)) for text in raw]),
#         (language, "words seen twice", [words.decode(words.encode(text)) for text in raw]),
#         (language, "byte pairs", [bpe.decode(bpe.encode(text)) for text in raw]),
#     ]
#     for language, name, back in rows[-3:]:
#         changed = sum(a != b for a, b in zip(back, raw, strict=True))
#         print(f"{language}  {name:22} ceiling {bleu_of_text(back, raw):6.2f}   {changed} changed")
# assert bleu_of_text(rows[-1][2], raw) > 99.99

# %% [markdown]
# A list of words cannot say a word that is not on it, and a model of words loses BLEU for it before it makes its first mistake. Byte pairs can say everything: their ceiling is the top. Write the ceiling beside the score, and the reader knows what the model had to lose.
#
# ## The whole evaluation
#
# One function for the rest of the book. Text in, and out come the score, its signature, its interval, chrF, and the lower-cased score. The last is there because papers on Multi30k report BLEU of lower-cased tokens, most of them cut by Moses's tokenizer. 13a cuts captions
# nearly as Moses does, but not exactly: Moses also takes *'s* off a word. So compare with care.

# %%
@dataclass(frozen=True)
class Scores:
    """What is reported of a set of translations. Scores go from 0 to 100.

    `bleu_lowercase` comes near what papers on Multi30k report, BLEU-4 of lower-cased tokens. Most of
    them cut text with Moses's tokenizer; here it is mteval's 13a, as the signature says.
    """

    sentences: int
    bleu: float
    bleu_low: float | None  # the 95 % interval; None without bootstrap
    bleu_high: float | None
    bleu_signature: str
    chrf: float
    chrf_signature: str
    bleu_lowercase: float
    bleu_lowercase_signature: str

    def __str__(self) -> str:
        low, high = self.bleu_low, self.bleu_high
        between = "" if low is None or high is None else f"  ({low:.1f} to {high:.1f})"
        return (
            f"BLEU {self.bleu:.2f}{between}  {self.bleu_signature}\n"
            f"chrF {self.chrf:.2f}  {self.chrf_signature}\n"
            f"BLEU {self.bleu_lowercase:.2f}  {self.bleu_lowercase_signature}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The same as a dictionary that JSON can hold."""
        return asdict(self)

# %%
def evaluate_translations(
    hypotheses: Sequence[str],
    references: Sequence[str],
    *,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Scores:
    """Score translations, as people would write them, against one raw reference each.

    sacreBLEU's BLEU and chrF with their signatures, the 95 % interval of BLEU from `bootstrap`
    drawn test sets (0 for none), and BLEU of the lower-cased text beside it.

    Raises ValueError for no sentences, for different numbers of them, for one that is no text,
    and for `bootstrap` < 0; nothing is computed then.
    """
    check_pairs(hypotheses, references)
    for name, side in (("hypotheses", hypotheses), ("references", references)):
        for i, text in enumerate(side):
            if not isinstance(text, str):
                raise ValueError(f"{name}[{i}] must be a text, got {text!r}")
    if bootstrap < 0:
        raise ValueError(f"bootstrap must be at least 0, got {bootstrap}")
    from sacrebleu.metrics import BLEU, CHRF

    metrics = BLEU(), CHRF(), BLEU(lowercase=True)
    values = [m.corpus_score(list(hypotheses), [list(references)]).score for m in metrics]
    bleu, chrf, lowercase = zip(values, (str(m.get_signature()) for m in metrics), strict=True)
    low = high = None
    if bootstrap:
        tokens = [[cut(text) for text in side] for side in (hypotheses, references)]
        low, high = interval(bootstrap_bleu(count_matches(*tokens), resamples=bootstrap, seed=seed))
    return Scores(len(hypotheses), bleu[0], low, high, bleu[1], *chrf, *lowercase)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# scores = evaluate_translations(equals[0], references, bootstrap=1000 if full else 50)
# print(scores)
# assert scores.bleu == BLEU().corpus_score(equals[0], [references]).score

# %% [markdown]
# Three scores, each with a **signature**: how many references, whether upper and lower case differ, the tokenizer, the smoothing, the version. Copy it with the score.
#
# Now `check_pairs`. Lose a line of either side, and each later translation stands beside the wrong reference. If the last *reference* is lost, sacreBLEU says nothing at all: here it does not count the nonsense, and gives 100.

# %% tags=["active-ipynb"]
# two, one = ["A dog runs over the grass.", "Nonsense."], ["A dog runs over the grass."]
# print(f"sacreBLEU, two translations and one reference: {BLEU().corpus_score(two, [one]).score:.1f}")
# for hypotheses, wanted_ones in ((two, one), ([], []), ("A dog.", "A dog.")):
#     try:
#         evaluate_translations(hypotheses, wanted_ones)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## What the paper did
#
# Section 6.1 reports 28.4 for English to German with the big model and 27.3 with the base model, on newstest2014. It does not say how BLEU was computed. The authors' library has a script for it, `get_ende_bleu.sh` {cite:p}`vaswani2018tensor2tensor`. It cuts text by Moses's tokenizer, then does something that looks odd:

# %%
def split_hyphens(tokens: Sequence[str]) -> list[str]:
    """Tokens as `get_ende_bleu.sh` of tensor2tensor makes them: a hyphen inside a word is a token."""
    return re.sub(r"(\S)-(\S)", r"\1 ##AT##-##AT## \2", " ".join(tokens)).split()

# %% tags=["active-ipynb"]
# print(split_hyphens("ein High-Tech-Büro in Baden-Baden".split()))
# print(split_hyphens(["a-b-c"]))

# %% [markdown]
# A hyphen inside a word becomes a token, written so that nobody takes it for a word. Earlier systems needed that, and later ones had to do the same to be comparable. A correct compound now brings three tokens that match, and n-grams inside it. (The second line shows what the expression overlooks: matches cannot share a letter.)
#
# A second habit is about quotation marks. The German references of 2014 write „so“. Whoever turns them into straight ones in the *reference* helps a model that writes straight ones. How much do the two matter? Here is newstest2013, the paper's development set. Its marks are straight, so
# we give the references those of 2014, and the spoilt translations keep theirs:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.training.corpora import open_corpus
#
# straight = [german for _, german in open_corpus("wmt14", "en", "de").pairs("val")]
# straight = straight if full else straight[:200]
# raw = [re.sub(r'"([^"]+)"', r"„\1“", text) for text in straight]
# output = corrupt(straight, 0.2, seed=0)
# split_up = [[split_hyphens(cut(text)) for text in side] for side in (output, raw, straight)]
# print(f"{sum('-' in text for text in raw)} of {len(raw)} sentences have a hyphen, ", end="")
# print(f"{sum('„' in text for text in raw)} have quotation marks")
# print(f"sacreBLEU's way                {bleu_of_text(output, raw):.2f}")
# print(f"hyphens split                  {corpus_bleu(split_up[0], split_up[1]):.2f}")
# print(f"reference with straight marks  {bleu_of_text(output, straight):.2f}")
# print(f"both                           {corpus_bleu(split_up[0], split_up[2]):.2f}")
# assert bleu_of_text(output, straight) > bleu_of_text(output, raw)

# %% [markdown]
# The translations are the same in every line. M. Popel measured it on real ones {cite:p}`popel2018unable`: a base model that the authors published:
#
# | how | newstest2013 | newstest2014 |
# |---|---|---|
# | sacreBLEU, `13a` | 26.25 | 27.52 |
# | sacreBLEU, `intl` | 26.59 | 28.33 |
# | sacreBLEU, `intl`, lower-cased | 27.10 | 28.85 |
# | `get_ende_bleu.sh`, reference with straight marks | 26.50 | 29.02 |
#
# In 2013, whose marks are straight, the script gives little more than `13a`. In 2014 it gives a point and a half.
#
# And {cite:t}`ott2018scaling` give both for one model: 29.3 with split compounds, 28.6 by sacreBLEU. So the paper's 28.4 was most likely counted as in the last row, not as in the first. Whoever puts it beside a sacreBLEU score compares two ways of counting, and not only two models.
#
# BLEU is old and crude, and its faults are well documented {cite:p}`callison2006reevaluating,mathur2020tangled`. Metrics with a neural network inside agree better with human judges {cite:p}`rei2020comet`. But they are models themselves, of gigabytes, and their numbers move with their versions. For the question of this part, whether we reach what others reached, BLEU is the scale that they used.
#
# ## How it breaks
#
# - *Translations and references out of step.* The score is near zero although the text reads well. Print three lines from the end.
# - *Tokens scored as text.* A space before each full stop. sacreBLEU warns when a hundred lines end so. The score is wrong by a little, and a small error is harder to notice.
# - *References that went through your own script.* The score is too good. References are read from the file and touched by nobody.
# - *Scores without a signature.* They cannot be compared, with anyone's. Print it.
# - *The mean of sentence scores, or of batch scores.* Neither is BLEU. Sum the counts, and divide at the end.
# - *Checkpoints chosen on the test set.* No figure shows it. Choose on validation, and open the test set once.
#
# ## Takeaways
#
# - BLEU is the geometric mean of four clipped shares, times a penalty for brevity {eq}`eq-bleu`. Ten sums over the test set are all it needs.
# - A score needs its test set, its signature and its ceiling.
# - On a thousand sentences the interval is more than a point wide on each side. Compare two systems in pairs.
# - The paper's 28.4 is most likely on another scale than sacreBLEU's.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 22.1.** The reference is *a cat sleeps on the mat*, the translation *the the cat on the mat*. What are $p_1$ and $p_2$? Do it by hand, and answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("22.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [4 / 6, 2 / 5]
# check("22.1", answer)

# %% [markdown]
# **Exercise 22.2.** A system writes 8 words for every 10 of the reference, and every one of its n-grams matches. What is its BLEU?

# %% tags=["active-ipynb"]
# answer = ...
# check("22.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 100 * math.exp(1 - 10 / 8)
# check("22.2", answer)

# %% [markdown]
# **Exercise 22.3.** With several references for a sentence, an n-gram may count as often as in the reference that has it most often. Write `clipped_by_all(hypothesis, references, n)`: the clipped matches of a token list against a list of token lists.

# %% tags=["active-ipynb"]
# answer = ...
# check("22.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def clipped_by_all(hypothesis: Sequence[str], references: Sequence[Sequence[str]], n: int) -> int:
#     """Clipped matches against the union of the references' counts."""
#     most: Counter[tuple[str, ...]] = Counter()
#     for reference in references:
#         most |= n_grams(reference, n)  # the larger of both counts
#     return (n_grams(hypothesis, n) & most).total()
#
#
# answer = clipped_by_all
# check("22.3", answer)

# %% [markdown]
# **Exercise 22.4.** An interval shrinks with the square root of the number of sentences. That of a score on 1,000 sentences is 1.2 BLEU to each side. About how many sentences would it take for 0.6?

# %% tags=["active-ipynb"]
# answer = ...
# check("22.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 1000 * (1.2 / 0.6) ** 2  # the spread of a mean shrinks with the root
# check("22.4", answer)
