# %% [markdown]
r"""
# Beam search

The most probable first word need not begin the most probable sentence. Keep four unfinished translations instead of one, and
a rule that compares finished ones of different length.
"""

# %% [markdown]
# Greedy search never goes back. This chapter shows where that fails, keeps several hypotheses at once, and proves the result against a search that tries everything.

# %% mystnb={"figure": {"caption": "Chapter 21 of Part II: several translations side by side.", "name": "fig-map-beam"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The tenth, Beam search, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(21);

# %%
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_annotated.paper.attention import Attend, Mask
from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK
from transformer_annotated.paper.transformer import Transformer
from transformer_annotated.training.decoding import Session, attending, evaluating, without_causal

# %% [markdown]
# ## A trap
#
# Suppose a model begins with *the* (0.5) or *a* (0.4). After *the* it is unsure: *dog* 0.4, *cat* 0.3, *hen* 0.3. After *a* it is sure: *dog* 0.9. Multiply along each way:

# %% tags=["active-ipynb"]
# first = {"the": 0.5, "a": 0.4}
# second = {"the": {"dog": 0.4, "cat": 0.3, "hen": 0.3}, "a": {"dog": 0.9, "cat": 0.1}}
# for article, p in first.items():
#     for noun, q in second[article].items():
#         print(f"{article} {noun:4s} {p:.1f} · {q:.1f} = {p * q:.2f}")

# %% [markdown]
# Greedy search takes *the*, and can then reach 0.20 at best. *a dog* has 0.36. Whoever keeps both beginnings finds it.
#
# A **hypothesis** is a translation that may be unfinished. **Beam search** keeps the $k$ most probable ones, the **beam** {cite:p}`lowerre1976harpy`. At each step it extends each of them by every word, and of all those candidates keeps the best $k$. With $k = 1$ it is greedy search.
#
# ## As one would write it first
#
# Probabilities are multiplied, so their logarithms are added. For one sentence, with Python lists and no cache:

# %%
def first_search(
    model: Transformer, src: Tensor, beam: int, steps: int
) -> list[list[tuple[float, tuple[int, ...]]]]:
    """Beam search as one would write it first: what is kept at each step, best first.

    `src` is `(1, S)`. A hypothesis is its log-probability and its ids; a finished one stays.
    """
    kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    levels = []
    with torch.no_grad():
        memory = model.encode(src)
        for _ in range(steps):
            candidates = [h for h in kept if h[1][-1:] == (EOS,)]
            for total, ids in kept:
                if ids[-1:] != (EOS,):
                    hidden = model.decode(torch.tensor([[BOS, *ids]]), memory)
                    log_p = model.logits(hidden[0, -1]).log_softmax(dim=-1).tolist()
                    words = [v for v in range(len(log_p)) if v not in (PAD, BOS, UNK)]
                    candidates += [(total + log_p[v], (*ids, v)) for v in words]
            kept = sorted(candidates, reverse=True)[:beam]
            levels.append(kept)
            if all(ids[-1] == EOS for _, ids in kept):
                break
    return levels

# %% [markdown]
# To watch it, train a small model on the small language for a short time. It should be unsure of itself.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from itertools import chain, count, islice
#
# from transformer_annotated import FAST, PAPER_BASE, patch, train
# from transformer_annotated.book import machine, scale
# from transformer_annotated.paper.first_translation import rise_and_fall
# from transformer_annotated.paper.toy import batches, collate, split
# from transformer_annotated.training.tokens import train_words
#
# full = scale() == "full"
# train_text, test_text = split(20_000 if full else 300, 200 if full else 10, seed=0)
# tokenizer = train_words(chain.from_iterable(train_text))
# data = [(tokenizer.encode(german), tokenizer.encode(english)) for german, english in train_text]
# steps = 130 if full else 5
# TOY = {
#     "vocab_size": tokenizer.vocab_size,
#     "d_model": 128,
#     "n_layers": 2,
#     "dropout": 0.0,
#     "self_attention.n_heads": 4,
#     "cross_attention.n_heads": 4,
#     "ffn.d_ff": 512,
# }
# torch.manual_seed(0)
# model = Transformer(patch(PAPER_BASE, TOY, FAST))
# stream = chain.from_iterable(batches(data, 64 if full else 8, seed=seed) for seed in count())
# history = train(model, islice(stream, steps), learning_rate=rise_and_fall(2e-3, steps // 4, steps))
# model.eval()
# print(f"loss {history.loss[0]:.2f} at first, {history.loss[-1]:.2f} after {steps} steps")

# %% tags=["hide-input"]
def draw_tree(
    levels: Sequence[Sequence[tuple[float, tuple[int, ...]]]], name: Callable[[int], str]
) -> Any:
    """Draw what `first_search` kept; `name` gives an id's word. The best way is orange."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    ax = plt.subplots(figsize=(7.2, 2.9))[1]
    ax.set_axis_off()
    winner = levels[-1][0][1]
    place: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, 0.0)}
    ax.text(0, 0, "<bos>", ha="center", va="center", fontsize=8)
    for x, level in enumerate(levels, start=1):
        for y, (log_p, ids) in enumerate(level):
            if ids in place:  # ended before
                continue
            place[ids] = x, -y
            best = winner[: len(ids)] == ids
            color = COLORS[1] if best else COLORS[4]
            (a, b), width = place[ids[:-1]], 1.6 if best else 0.8
            ax.plot([a + 0.36, x - 0.36], [b, -y], color=color, linewidth=width)
            text = f"{name(ids[-1])}\n{log_p:.2f}"
            ax.text(x, -y, text, ha="center", va="center", fontsize=7.5, color=color)
    ax.set(xlim=(-0.5, len(levels) + 0.5), ylim=(-max(map(len, levels)) + 0.4, 0.6))
    return ax

# %% mystnb={"figure": {"caption": "Three hypotheses at a time. Each number is the log-probability so far; the orange way ends with the highest one.", "name": "fig-tree"}, "image": {"alt": "A tree that grows from left to right. Each column holds up to three boxes with a word and a negative number, joined to the box they continue. One way through is orange."}} tags=["active-ipynb", "nbval-ignore-output"]
# german, english = min(test_text, key=lambda pair: len(pair[0].split()))
# source = torch.tensor([[*tokenizer.encode(german), EOS]])
# levels = first_search(model, source, beam=3, steps=12)
# print(f"{german}   (reference: {english})")
# draw_tree(levels, lambda i: tokenizer.decode([i]) if i != EOS else "<eos>");

# %% [markdown]
# In {numref}`fig-tree` read from left to right. A column holds the hypotheses kept at that step, the best on top. A line leads back to what each of them continues. Some beginnings die out: none of their continuations was good enough.
#
# ## Which is the best
#
# Each word makes a log-probability smaller. So short hypotheses have an advantage that they have not earned, and the more hypotheses are kept, the more likely one of them ends early. The score must take length into account. With $n$ tokens, `<eos>` included, the paper follows {cite:t}`wu2016google`:
#
# $$
# s(y) = \frac{\ln P(y \mid x)}{lp(n)}, \qquad lp(n) = \left(\frac{5 + n}{6}\right)^{\alpha}
# $$ (eq-length-penalty)
#
# $lp(n)$ is called the *length penalty*. A log-probability is negative, and dividing it by a larger number brings it closer to 0. So with $\alpha > 0$ a long hypothesis gets back some of what its many words cost it. With $\alpha = 0$ the score is the log-probability. The paper uses $\alpha = 0.6$. Two hypotheses, one longer and less probable:

# %% tags=["active-ipynb"]
# for alpha in (0.0, 0.6, 1.0):
#     short, long = (log_p / ((5 + n) / 6) ** alpha for log_p, n in ((-4.0, 6), (-4.5, 9)))
#     print(f"alpha {alpha}:  6 tokens {short:.2f}   9 tokens {long:.2f}")

# %% [markdown]
# At 0 the short one wins, at 0.6 the long one.
#
# When may a search end? When enough hypotheses have ended and no running one can still win. The log-probability $\ln P$ of a running hypothesis can only fall, and the largest divisor it can reach is that of the length limit. So its score will never exceed $\ln P / lp(\text{limit})$. If that is no better than what is finished, the rest of the search
# would change nothing. The paper says that it ends early when possible; this is our reading of it.
#
# Programs differ in these rules, and scores with them. So the rule is a value that says what it does. `Scoring` lists the questions, `GNMT` gives the paper's answers.

# %%
class Scoring(Protocol):
    """How finished hypotheses are compared, and when a search may end."""

    def score(self, log_p: Tensor, length: Any) -> Tensor:
        """The score of hypotheses with summed log-probability `log_p` and `length` tokens."""

    def must_finish(self, beam: int, n_best: int) -> int:
        """How many finished hypotheses a search needs before it may end early."""

    def hopeless(self, log_p: Tensor, length: int, limits: Tensor, worst: Tensor) -> Tensor:
        """Which searches may end, `(B,)`: none that runs need be followed further.

        `log_p` is that of the best running hypothesis, `length` its tokens, `limits` the most it
        may have. `worst` is the score of the last of the `must_finish` best finished ones, and
        -inf if there are fewer.
        """

    @property
    def cut_counts(self) -> bool:
        """Whether a hypothesis cut off at the limit competes with finished ones."""


@dataclass(frozen=True)
class GNMT:
    """The paper's score (section 6.1): log P / ((5 + n) / 6)^alpha, n tokens with EOS.

    The penalty is that of Wu et al. (2016, section 7), without their coverage term. The search ends
    when no running hypothesis can still come among the best, so ending early changes no result.
    A hypothesis cut off at the limit is used only where too few have finished.

    Raises ValueError for an alpha that is not finite.
    """

    alpha: float = 0.6
    cut_counts = False

    def __post_init__(self) -> None:
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be finite, got {self.alpha}")

    def score(self, log_p: Tensor, length: Any) -> Tensor:
        return log_p / ((5 + length) / 6) ** self.alpha

    def must_finish(self, beam: int, n_best: int) -> int:
        return n_best

    def hopeless(self, log_p: Tensor, length: int, limits: Tensor, worst: Tensor) -> Tensor:
        # log P only falls, so the score is at most this at the length that divides it most.
        longest = self.score(log_p, limits if self.alpha > 0 else length + 1)
        return longest <= worst

# %% [markdown]
# A step needs the $2k$ best candidates, and not $k$. At most $k$ of them end with EOS, one for each hypothesis, so at least $k$ are left to go on. An EOS finishes its hypothesis if it is among the first $k$: if the beam would have kept it.
#
# ## Made fast
#
# Three parts make the batched search quick. First, the $2k$ best of $k \cdot V$ numbers: with four hypotheses and 8,000 words, 8 of 32,000. It is not necessary to sort all of them.

# %%
def best(scores: Tensor, offset: Tensor, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `n` largest of `scores[b, i, v] + offset[b, i]`: the values, and their i and v.

    `scores` is `(B, m, V)`, `offset` `(B, m)`, each result `(B, n)` with the largest first. Each
    row of V is folded into a table. The n largest numbers stand in the n columns with the largest
    maxima, so that only those are sorted. Missing ones, where `n > m * V`, are -inf.
    """
    (B, m, V), sentence = scores.shape, torch.arange(len(scores), device=scores.device)[:, None]
    height = max(r for r in range(1, 129) if V % r == 0)
    width = V // height
    if scores.numel() < 100_000 or m * width < n:  # few enough for one topk
        flat = (scores + offset[..., None]).flatten(1)
        flat = F.pad(flat, (0, max(0, n - m * V)), value=-torch.inf)
        values, where = flat.topk(n)
        return values, (where // V).clamp(max=m - 1), where % V
    table = scores.view(B, m, height, width)
    maxima = table.amax(dim=2) + offset[..., None]  # (B, m, width)
    columns = maxima.flatten(1).topk(n).indices  # (B, n)
    few = table[sentence, columns // width, :, columns % width]  # (B, n, height)
    few = few + offset.gather(1, columns // width)[..., None]
    values, where = few.flatten(1).topk(n)
    column = columns.gather(1, where // height)
    return values, column // width, where % height * width + column % width

# %% tags=["active-ipynb"]
# torch.manual_seed(0)
# scores, offset = torch.randn(32, 4, 8000), torch.randn(32, 4)
# values, row, column = best(scores, offset, 8)
# everything = (scores + offset[..., None]).flatten(1)
# assert torch.equal(values, everything.topk(8).values)
# print("the best of the first sentence:", [round(v, 2) for v in values[0].tolist()])

# %% [markdown]
# Second, the memory. Four hypotheses of one sentence read the same source. Copying its keys and values four times would cost memory and time. Instead the four queries become four positions of one sentence, and `attend` need not know.

# %%
def grouped(attend: Attend) -> Attend:
    """`attend`, where neighbouring rows of queries may share one row of keys and values.

    Their queries become positions of one sentence, so keys and values are never copied.
    """

    def attend_to_shared(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None, **rest: Any
    ) -> Tensor:
        q = q.unflatten(0, (len(k), -1)).transpose(1, 2)  # (B, H, beam, T, d)
        heads = attend(q.flatten(2, 3), k, v, mask, **rest)  # (B, H, beam * T, d)
        return heads.unflatten(2, q.shape[2:4]).transpose(1, 2).flatten(0, 1)

    return attend_to_shared

# %% [markdown]
# Third, the cache. When a hypothesis is continued twice, its keys and values are needed twice; when it dies, not at all. `Cache.reorder` of Chapter 20 does it: row $i$ becomes what row `index[i]` was. Hypotheses that survive tend to share their beginning, as in {numref}`fig-tree`. Where all of them agree, their rows are equal and need not be moved; `agreed` counts these tokens.
#
# ## The search
#
# `Finished` keeps the best finished hypotheses of each sentence. They are out of the running: nothing can extend them, and they cost no time. This is one change from `first_search`, where a finished hypothesis takes one of the $k$ places and may be pushed out. From here on all $k$ places go to running ones.

# %%
@dataclass(frozen=True)
class Hypotheses:
    """What a beam search found.

    Attributes:
        ids: the best translation of each sentence, `(B, T)`, PAD after EOS.
        scores: its score, `(B,)`.
        finished: whether it ends with EOS, `(B,)`; if not it was cut off at the limit.
        n_best: the best `beam` of each sentence, `(B, beam, T)`, best first.
        n_best_scores: their scores `(B, beam)`, falling; -inf where there was no other hypothesis.
    """

    n_best: Tensor
    n_best_scores: Tensor

    @property
    def ids(self) -> Tensor:
        return self.n_best[:, 0]

    @property
    def scores(self) -> Tensor:
        return self.n_best_scores[:, 0]

    @property
    def finished(self) -> Tensor:
        return (self.ids == EOS).any(dim=-1)


def pick(x: Tensor, index: Tensor) -> Tensor:
    """`x` `(B, m, ...)` at the places `index` `(B, n)`: `(B, n, ...)`."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


def agreed(ids: Tensor) -> int:
    """How many tokens at the beginning all hypotheses of every sentence share; ids `(B, m, n)`."""
    same = (ids == ids[:, :1]).all(dim=1)  # (B, n)
    return int(same.long().cumprod(dim=1).sum(dim=1).min())


class Finished:
    """The best finished hypotheses of each sentence, best first, PAD and -inf where there is none.

    `ids` is `(B, beam, longest)`, `scores` is `(B, beam)`.
    """

    def __init__(self, ids: Tensor, scores: Tensor) -> None:
        self.ids, self.scores = ids, scores

    def add(self, ids: Tensor, scores: Tensor) -> None:
        """Let more hypotheses compete, `(B, m, n)`; one with the score -inf changes nothing."""
        if not bool((scores > self.scores[:, -1:]).any()):
            return
        padded = F.pad(ids, (0, self.ids.shape[2] - ids.shape[2]), value=PAD)
        everything = torch.cat((self.scores, scores), dim=1)
        self.scores, chosen = everything.topk(self.scores.shape[1])
        self.ids = pick(torch.cat((self.ids, padded), dim=1), chosen)

# %% [markdown]
# `continuations` is a step of the model. The softmax is taken over the whole vocabulary, and the three signs are forbidden afterwards.

# %%
def continuations(
    session: Session, last: Tensor, log_p: Tensor, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `n` best continuations of running hypotheses with log-probabilities `(B, m)`.

    Returns their log-probability, the hypothesis that each continues, and its new token, each
    `(B, n)` and best first.
    """
    p = session.forbid(session.logits(last.flatten()).log_softmax(dim=-1))  # (B * m, V)
    top, parent, token = best(p.view(*log_p.shape, -1), log_p, n)
    session.check(top[:, 0])
    return top, parent, token

# %%
def beam_search(
    model: Transformer,
    src: Tensor,
    src_padding: Tensor | None = None,
    *,
    beam: int = 4,
    alpha: float = 0.6,
    n_best: int = 1,
    scoring: Scoring | None = None,
    extra: int = 50,
) -> Hypotheses:
    """Beam search (section 6.1 of the paper: beam 4, alpha 0.6, source length + 50).

    Args:
        model, src, src_padding, extra: as for `greedy_search`.
        beam: how many hypotheses run side by side; 1 is greedy search, and more than the
            vocabulary has is allowed.
        alpha: the strength of the length penalty, where `scoring` is not given.
        n_best: how many hypotheses of each sentence to return, at most `beam`.
        scoring: `GNMT(alpha)` or `HuggingFace(...)`; None for the first.

    Raises:
        ValueError: `beam` below 1, `n_best` outside [1, beam], and what `greedy_search` objects to.
    """
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best must be in [1, {beam}], got {n_best}")
    rule = GNMT(alpha) if scoring is None else scoring
    with (
        evaluating(model), torch.inference_mode(),
        attending(model, "self", without_causal), attending(model, "cross", grouped),
    ):  # fmt: skip
        found = _search(Session(model, src, src_padding, extra), beam, n_best, rule)
    scores = found.scores[:, :n_best].clone()
    ids = found.ids[:, :n_best].masked_fill((scores == -torch.inf)[..., None], PAD)
    return Hypotheses(ids[:, :, : int((ids != PAD).sum(dim=-1).max())], scores)


def _search(session: Session, beam: int, n_best: int, rule: Scoring) -> Finished:
    B, device = len(session.limits), session.limits.device
    longest = int(session.limits.max())
    rank = torch.arange(2 * beam, device=device)
    result = Finished(
        torch.full((B, beam, longest), PAD, device=device),
        torch.full((B, beam), -torch.inf, device=device),
    )
    finished = Finished(result.ids, result.scores)  # of the sentences still searched
    sentence = torch.arange(B, device=device)  # which these are
    # The running hypotheses, best first. At the start there is one, and it is empty.
    ids, log_p = result.ids[:, :1, :0], torch.zeros(B, 1, device=device)
    last = torch.full((B, 1), BOS, device=device)
    while len(sentence):
        settled = agreed(ids) + 1  # BOS comes before the first token
        row = log_p.shape[1] * torch.arange(len(sentence), device=device)[:, None]
        top, parent, token = continuations(session, last, log_p, 2 * beam)
        n, ends, cut = session.step, token == EOS, session.limits <= session.step
        longer = torch.cat((pick(ids, parent), token[..., None]), dim=2)
        counts = (ends | cut[:, None] if rule.cut_counts else ends) & (rank < beam)
        if bool(counts.any()):
            finished.add(longer, rule.score(top, n).masked_fill(~counts, -torch.inf))

        log_p, chosen = top.masked_fill(ends, -torch.inf).topk(beam)  # the others go on
        ids, parent, last = pick(longer, chosen), parent.gather(1, chosen), token.gather(1, chosen)
        if bool(cut.any()):  # nothing has ended: take what there is
            none = cut & (finished.scores[:, 0] == -torch.inf)
            finished.add(ids, rule.score(log_p, n).masked_fill(~none[:, None], -torch.inf))

        worst = finished.scores[:, rule.must_finish(beam, n_best) - 1]
        over = cut | rule.hopeless(log_p[:, 0], n, session.limits, worst)
        if beam == 1:  # greedy search: the first end is the end
            over |= worst > -torch.inf
        on = ~over
        if bool(on.all()):
            session.cache.reorder((row + parent).flatten(), start=settled)
        else:
            result.ids[sentence], result.scores[sentence] = finished.ids, finished.scores
            finished = Finished(finished.ids[on], finished.scores[on])
            sentence, ids, log_p, last = sentence[on], ids[on], log_p[on], last[on]
            session.keep(on.nonzero()[:, 0], (row + parent)[on].flatten())
    return result

# %% [markdown]
# Read the loop in four steps. Candidates come from the model. Those that end are offered to `finished`. The best that do not end go on, and the cache follows them. A sentence leaves the batch at its limit, or when `hopeless` says that the rest cannot matter. A beam of one has a rule of its own: it stops at the first `<eos>`, which makes it greedy search.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# found = beam_search(model, source, beam=4, n_best=4)
# print(german)
# for ids, score in zip(found.n_best[0], found.n_best_scores[0], strict=True):
#     print(f"{score:8.3f}  {tokenizer.decode(ids.tolist())}")

# %% [markdown]
# `n_best` returns the runners-up too, each with its score.
#
# ## Proof
#
# The strongest proof needs no other program. Take a vocabulary of seven, four of which are signs, and a limit of four tokens. Then there are few enough translations to score all of them. A beam that never drops a hypothesis must find the best.

# %% tags=["active-ipynb"]
# from itertools import product
#
# from transformer_annotated import greedy_search
#
# torch.manual_seed(0)
# SEVEN = {**TOY, "vocab_size": 7, "d_model": 16, "ffn.d_ff": 32}
# tiny = Transformer(patch(PAPER_BASE, SEVEN)).eval()
# src = torch.tensor([[4, 6, 5]])
# rule, all_scores = GNMT(0.6), {}
# with torch.no_grad():
#     for n in range(4):
#         for words in product((4, 5, 6), repeat=n):
#             log_p = tiny(src, torch.tensor([[BOS, *words]]))[0].log_softmax(dim=-1)
#             total = sum(log_p[t, w] for t, w in enumerate((*words, EOS)))
#             all_scores[*words, EOS] = rule.score(total, n + 1).item()
# ranked = sorted(all_scores, key=all_scores.get, reverse=True)[:5]
# found = beam_search(tiny, src, beam=40, n_best=5, extra=1)
# for ids, score, expected in zip(found.n_best[0], found.n_best_scores[0], ranked, strict=True):
#     assert tuple(i for i in ids.tolist() if i != PAD) == expected
#     assert abs(score.item() - all_scores[expected]) < 1e-5
#     print(f"{score:.4f}  {expected}")
# print("the five best of", len(all_scores))

# %% [markdown]
# This model is untrained and would rather stop at once, which is `(2,)`. The search found the same five in the same order.
#
# Two more properties. A beam of one is greedy search. And a batch is its sentences: hypotheses that end early, in any sentence, change nothing for the others.

# %% tags=["active-ipynb"]
# batch = collate([(tokenizer.encode(german), []) for german, _ in test_text[:10]])
# one = beam_search(model, batch.src, batch.src_padding, beam=1)
# assert torch.equal(one.ids, greedy_search(model, batch.src, batch.src_padding))
# together = beam_search(model, batch.src, batch.src_padding)
# for i in range(10):
#     alone = beam_search(model, batch.src[i : i + 1, batch.src_padding[i]])
#     T = alone.ids.shape[1]
#     assert torch.equal(together.ids[i, :T], alone.ids[0])
#     assert not together.ids[i, T:].any()
# print("beam 1 is greedy; ten sentences together are ten sentences alone")

# %% [markdown]
# The tests compare it with a search in Python lists, one sentence at a time and without a cache, for nine rules of scoring: ids, order and scores.
#
# ## What it buys
#
# More hypotheses should find more probable translations. Are these better? Both questions have an answer in numbers: the mean log-probability of what is found, without any penalty, and the share of translations that are right in every word.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# sources = [tokenizer.encode(german) for german, _ in test_text]
# batch = collate([(source, []) for source in sources])
# references = [english for _, english in test_text]
# print(" beam   log P   right   tokens")
# for beam in (1, 2, 4, 8, 16) if full else (1, 4):
#     found = beam_search(model, batch.src, batch.src_padding, beam=beam, alpha=0.0, extra=10)
#     texts = [tokenizer.decode(ids) for ids in found.ids.tolist()]
#     right = sum(a == b for a, b in zip(texts, references, strict=True)) / len(texts)
#     length = (found.ids != PAD).sum() / len(texts)
#     print(f"{beam:5d} {found.scores.mean():7.3f} {right:7.1%} {length:8.2f}")

# %% [markdown]
# Here log P rises with every wider beam. That is usual, but no law. The share of right translations need not rise with it. A wider beam is better at finding what the model believes. Where the model is wrong, that does not help: with very wide beams translations get worse, because the most probable one is often too short {cite:p}`koehn2017six`. For strong models
# the single most probable translation can be the empty one {cite:p}`stahlberg2019nmt`.

# %% mystnb={"figure": {"caption": "The stronger the penalty, the longer the translations that win.", "name": "fig-alpha"}, "image": {"alt": "Two line charts over alpha from minus one to two. Left, the mean number of tokens rises. Right, the mean log-probability of the chosen translations is highest near zero."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# alphas = [-1.0, -0.5, 0.0, 0.6, 1.0, 1.5, 2.0] if full else [0.0, 1.0]
# tokens, log_ps = [], []
# for alpha in alphas:
#     found = beam_search(model, batch.src, batch.src_padding, beam=8, alpha=alpha, extra=10)
#     n = (found.ids != PAD).sum(dim=1)
#     tokens.append(n.float().mean().item())
#     log_ps.append((found.scores * ((5 + n) / 6) ** alpha).mean().item())
# fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.6))
# for ax, values, label in zip(axes, (tokens, log_ps), ("mean tokens", "mean log P"), strict=True):
#     ax.plot(alphas, values, "o-")
#     ax.set(xlabel="alpha", ylabel=label)

# %% [markdown]
# In {numref}`fig-alpha` the left curve never falls. On the right, look for the highest point: the log-probability itself is what $\alpha = 0$ asks for, and every other value finds translations that are less probable.
#
# What does it cost?

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from functools import partial
# from statistics import median
#
# from transformer_annotated.training.decoding import packed
# from transformer_annotated.training.speed import race
#
# torch.set_num_threads(1)
# print(machine())
# batch = collate([(source, []) for source in sources[: 64 if full else 2]])
# searches = {
#     f"beam {beam}": partial(beam_search, model, batch.src, batch.src_padding, beam=beam, extra=10)
#     for beam in (1, 2, 4, 8)
# }
# with packed(model):
#     for name, seconds in race(searches, 7 if full else 1).items():
#         rates = sorted(len(batch.src) / s for s in seconds)
#         print(
#             f"{name}: {median(rates):6.0f} sentences a second ({rates[0]:.0f} to {rates[-1]:.0f})"
#         )

# %% [markdown]
# All searches take turns; the median of the rounds, and the range. A beam of four costs less than four times a beam of one, because its rows meet the same weights in one product.
#
# ## Other rules
#
# The library *transformers* of Hugging Face divides by $n^{\ell}$, with $\ell$ called `length_penalty`, and has other habits {cite:p}`wolf2020transformers`. The same $\alpha$ does not mean the same. To compare ids and scores with it, its rules are a second value:

# %%
@dataclass(frozen=True)
class HuggingFace:
    """The rules of `generate` in transformers 5: log P / n^length_penalty, n tokens with EOS.

    Hypotheses that run at the limit are finished as they are. `early_stopping=True` ends with the first `beam` finished ones;
    `False` when the best running one, scored at its present length, is no better than the worst
    of them; `"never"` when it cannot become better.
    """

    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    cut_counts = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, got {self.length_penalty}")
        if self.early_stopping not in (True, False, "never"):
            raise ValueError(
                f'early_stopping must be True, False or "never", got {self.early_stopping!r}'
            )

    def score(self, log_p: Tensor, length: Any) -> Tensor:
        return log_p / length**self.length_penalty

    def must_finish(self, beam: int, n_best: int) -> int:
        return beam

    def hopeless(self, log_p: Tensor, length: int, limits: Tensor, worst: Tensor) -> Tensor:
        if self.early_stopping is True:
            return worst > -torch.inf
        at = limits if self.early_stopping == "never" and self.length_penalty > 0 else length
        return self.score(log_p, at) <= worst

# %% [markdown]
# | | this book, `GNMT` | `HuggingFace` |
# |---|---|---|
# | divisor | $((5 + n) / 6)^\alpha$ | $n^\ell$ |
# | at the limit | cut ones count only if none has ended | all running ones count as they are |
# | ends early | when nothing can change | by `early_stopping`: a guess, at once, or when nothing can change |
#
# A test gives the weights of one model to both programs and compares every hypothesis, ids and scores, for seven settings. It is skipped where `transformers` is not installed.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# batch = collate([(source, []) for source in sources])
# ours = beam_search(model, batch.src, batch.src_padding, extra=10)
# theirs = beam_search(model, batch.src, batch.src_padding, extra=10, scoring=HuggingFace(0.6))
# width = min(ours.ids.shape[1], theirs.ids.shape[1])
# different = (ours.ids[:, :width] != theirs.ids[:, :width]).any(dim=1).sum()
# print(f"{different} of {len(batch.src)} translations differ between the two rules at 0.6")

# %% [markdown]
# ## What the paper did
#
# Section 6.1: beam 4, $\alpha = 0.6$, chosen on the development set; at most 50 tokens more than the source, and an early end when possible. It also averages checkpoints, which is Chapter 18. {cite:t}`wu2016google` add a term that rewards covering the whole source, and two rules that prune weak hypotheses. The paper mentions neither, and we
# leave them out.
#
# ## How it breaks
#
# - *A cache that is not reordered.* Translations stay fluent and mix two hypotheses. Compare with a search without a cache.
# - *All beams start alike.* Then the first step keeps $k$ copies of one word, and beam search is greedy at $k$ times the price. Here one empty hypothesis starts.
# - *Ended hypotheses go on.* They collect words after EOS, or filler with probability one.
# - *The penalty counts differently.* With or without EOS, with or without the first sign: scores of two programs cannot be compared.
# - *Stopping at the first finished hypothesis.* Fast, and a longer better one is never seen.
#
# ## Takeaways
#
# - A beam keeps $k$ hypotheses. Beam 1 is greedy search. A beam that keeps all is a search through everything. Both are used as checks.
# - {eq}`eq-length-penalty` compares hypotheses of different length.
# - The bound $\ln P / lp(\text{limit})$ lets a search end early without changing its result.
# - A more probable translation is not always a better one.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 21.1.** At which $\alpha$ do the two hypotheses above, −4.0 with 6 tokens and −4.5 with 9, have the same score? Answer with a number, to three digits.

# %% tags=["active-ipynb"]
# answer = ...
# check("21.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# import math
#
# answer = math.log(4.5 / 4.0) / math.log((5 + 9) / (5 + 6))
# check("21.1", answer)

# %% [markdown]
# **Exercise 21.2.** A vocabulary has 1,000 words besides EOS, and a translation may have at most 4 tokens, EOS included. How many finished translations are there? And how many candidates does beam search with $k = 4$ score in its four steps, if all hypotheses go on to the end? (The first step has one hypothesis.) Answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("21.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [1 + 1000 + 1000**2 + 1000**3, 1001 + 3 * 4 * 1001]
# check("21.2", answer)

# %% [markdown]
# **Exercise 21.3.** Write a function `rerank(log_p, lengths, alpha)`. `log_p` and `lengths` are `(B, k)`: log-probabilities and token counts of $k$ finished hypotheses. It returns `(B,)`, which of them wins by {eq}`eq-length-penalty`.

# %% tags=["active-ipynb"]
# answer = ...
# check("21.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def rerank(log_p: Tensor, lengths: Tensor, alpha: float) -> Tensor:
#     return (log_p / ((5 + lengths) / 6) ** alpha).argmax(dim=-1)
#
#
# check("21.3", rerank)
