# %% [markdown]
r"""
# A language model

Leave out the encoder, and the Transformer of 2017 continues any text, one token at a time. Nothing is added; this
chapter trains it, measures it, lets it write, and asks what was lost.
"""

# %% [markdown]
# Parts I and II translated. The best-known models of today do something simpler: they read a text and say what comes next. The class `Transformer` can do that already. This chapter also gives Part III its second test, running text, beside translation; Chapter 35 tries every change on both.

# %% mystnb={"figure": {"caption": "Chapter 25, the first of Part III: the model without an encoder.", "name": "fig-map-language-model"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The first, Language model, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(25);

# %%
import functools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transformer_annotated.paper.attention import Mask
from transformer_annotated.paper.parts import check_sizes, patch
from transformer_annotated.paper.toy import pairs as grammar
from transformer_annotated.paper.transformer import (
    DECODER_ONLY,
    PAPER_BASE,
    Config,
    Transformer,
    default_positions,
)
from transformer_annotated.training.corpora import Remote, at_hand, obtain
from transformer_annotated.training.decoding import Cache, evaluating, truncate
from transformer_annotated.training.schedule import adam, clip_gradients, cosine, set_rate
from transformer_annotated.training.trainer import step_seed

# %% tags=["active-ipynb"]
# from transformer_annotated import diff
#
# print(diff(PAPER_BASE, patch(PAPER_BASE, DECODER_ONLY)))

# %% mystnb={"figure": {"caption": "Coloured: the box that read from the encoder. It goes with its norm, and so does the whole left half.", "name": "fig-seams-language-model"}, "image": {"alt": "The two stacks of the Transformer with the cross-attention box of the decoder coloured. An arrow leads to it from the encoder on the left; a residual and norm box stands above it."}} tags=["active-ipynb"]
# figures.seams(["cross_attention"]);

# %% [markdown]
# Two paths change, and both become `None`. Every chapter of Part III begins like this: with the difference to the config of 2017, and with the seam that it touches. Here the whole left side of {numref}`fig-seams-language-model` goes. The coloured box had nothing else to read, so it goes as well, and the norm above it. What stays is a stack of two sub-layers a layer: self-attention with its causal mask, and the feed-forward network.
#
# ## How well can one guess?
#
# Take a play by Shakespeare and cover everything after some place. Which character comes next? How hard this is depends on what the guesser knows {cite:p}`shannon1951prediction`. First we need the text: his plays, a million characters, as collected by {cite:t}`karpathy2015unreasonable`. Call `open_text()` once to download it: it is checked and kept as in Chapter 12. This page downloads nothing; where the file is not at hand, it runs on sentences of the small language of Chapter 9.

# %%
SHAKESPEARE = Remote(
    "tinyshakespeare/input.txt",
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
    "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


@dataclass(frozen=True)
class Text:
    """Running text in three pieces: the first 90 per cent, the next 5, the last 5.

    The cuts are at line ends, so that no line is in two pieces.
    """

    name: str
    train: str = field(repr=False)
    val: str = field(repr=False)
    test: str = field(repr=False)


def cut(name: str, text: str) -> Text:
    """A `Text` from one string."""
    first, second = (text.rfind("\n", 0, len(text) * part // 100) + 1 for part in (90, 95))
    return Text(name, text[:first], text[first:second], text[second:])

# %%
@functools.cache
def open_text(name: str = "shakespeare") -> Text:
    """A text by name.

    Args:
        name: `shakespeare`, a million characters of his plays, downloaded unless it is at hand;
            `toy`, about four thousand English sentences of the small language, never downloaded.

    Raises:
        ValueError: another name, or a file with another sum.
        OSError: no network; the message says what to put where.
    """
    if name == "shakespeare":
        return cut(name, obtain(SHAKESPEARE)[0].read_bytes().decode())
    if name == "toy":
        english = list(dict.fromkeys(english for _, english in grammar(4000, seed=0)))
        random.Random(0).shuffle(english)  # the short sentences are found first
        return cut(name, "\n".join(english) + "\n")
    raise ValueError(f"name must be 'shakespeare' or 'toy', got {name!r}")


def any_text() -> Text:
    """Shakespeare where the file is at hand, else the toy text; nothing is downloaded."""
    return open_text("shakespeare" if at_hand(SHAKESPEARE) else "toy")

# %% [markdown]
# A text has no sentence pairs to shuffle, so it is cut in its order: the beginning to learn from, the end to be tested on. Here the middle piece measures; the last is not used in this book. Neighbouring lines are alike, and a random choice of lines would put the neighbours of every test line into training.
#
# The simplest tokenizer gives each character an id.

# %%
class Characters:
    """A tokenizer with one id for each character that occurs in `text`, in Unicode's order."""

    def __init__(self, text: str) -> None:
        self.symbols = "".join(sorted(set(text)))
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    @property
    def vocab_size(self) -> int:
        """How many different characters there are."""
        return len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """One id a character. Raises ValueError for a character that has none."""
        try:
            return [self._ids[symbol] for symbol in text]
        except KeyError as error:
            raise ValueError(f"text has {error.args[0]!r}, which has no id") from None

    def decode(self, ids: Any) -> str:
        """The text of some ids, a list or a tensor `(n,)`."""
        return "".join(self.symbols[i] for i in ids)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import machine, scale
#
# full = scale() == "full"
# text = any_text()
# alphabet = Characters(text.train)
# train_ids, val_ids = (torch.tensor(alphabet.encode(part)) for part in (text.train, text.val))
# val_ids = val_ids[: None if full else 400]
# n_bytes = len(alphabet.decode(val_ids).encode())
# print(f"{text.name}: {len(train_ids):,} characters to learn from, {alphabet.vocab_size} different")
# print(text.val[:130])

# %% [markdown]
# Three guessers without any network. The first knows only how many characters there are. The second knows how frequent each is. The third also looks at the character before. Each gives the true next character some probability $p$, and pays $-\log_2 p$ **bits** for it: one bit if it had given a half, two for a quarter. The mean is what it needs for each byte of the text; in this text a character is one byte.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# V = alphabet.vocab_size
# counts = train_ids.bincount(minlength=V) + 1.0
# pairs = torch.full((V, V), 0.1)  # a pair never seen is not impossible
# pairs.index_put_((train_ids[:-1], train_ids[1:]), torch.tensor(1.0), accumulate=True)
# guesses = {
#     "knows the alphabet": torch.full((V, V), 1 / V),
#     "knows how frequent each is": (counts / counts.sum()).expand(V, V),
#     "knows the character before": pairs / pairs.sum(dim=1, keepdim=True),
# }
# baselines = {n: -p[val_ids[:-1], val_ids[1:]].log2().mean() for n, p in guesses.items()}
# for name, bits in baselines.items():
#     print(f"{name:28s}{bits:6.2f} bits a byte")

# %% [markdown]
# In the code a guesser is a table: a row for the character before, a column for the next one. Read the numbers downwards: each piece of knowledge saves bits. How much does a Transformer save, which may look at everything before?
#
# ## One text, many questions
#
# Eight characters hold seven questions with seven known answers:

# %% tags=["active-ipynb"]
# for t in range(1, len("To be, o")):
#     print(f"{'To be, o'[:t]!r:10} -> {'To be, o'[t]!r}")

# %% [markdown]
# A causal stack answers all of them in one pass. The vector at place $t$ has seen the tokens up to $t$ and nothing later, so it may be asked for token $t + 1$ without giving the answer away. Nobody labelled anything: the text is its own answer.
#
# In a formula: a model of a text $x_1, \ldots, x_n$ is a product of next-token probabilities, and its loss is the mean of their negative logarithms.
#
# $$
# p(x) = \prod_{t=1}^{n} p(x_t \mid x_1, \ldots, x_{t-1}), \qquad L = -\frac{1}{n} \sum_{t=1}^{n} \ln p(x_t \mid x_1, \ldots, x_{t-1}) .
# $$ (eq-language-model)
#
# The product is no assumption. Any distribution over texts can be written so. What the model assumes is how each factor is computed.
#
# ## The code
#
# The model is a config of Part I. Small sizes, so that a page can train it.

# %%
def language_model(
    vocab_size: int,
    *,
    d_model: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    d_ff: int = 256,
    dropout: float = 0.0,
) -> Config:
    """The decoder stack of 2017 without an encoder, and small."""
    sizes = {
        "vocab_size": vocab_size, "d_model": d_model, "dropout": dropout,
        "decoder.n_layers": n_layers, "self_attention.n_heads": n_heads, "ffn.d_ff": d_ff,
    }  # fmt: skip
    return patch(patch(PAPER_BASE, DECODER_ONLY), sizes)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# config = language_model(V)
# model = Transformer(config)
# print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
# print(tuple(model(train_ids[None, :8]).shape), "= (B, T, V)")

# %% [markdown]
# The loss lives in two slices. The model reads tokens $1$ to $T$ of a crop of $T + 1$. It is scored on tokens $2$ to $T + 1$.

# %%
def next_token_nats(model: Transformer, ids: Tensor, mask: Mask | None = None) -> Tensor:
    """The loss `(B, T)` of each next token, in nats, for ids `(B, T + 1)`.

    Position t reads the tokens up to t and is scored on token t + 1.
    Raises ValueError for a stack that is not causal and no `mask`: it would read the answers.
    """
    if mask is None and model.decoder is not None and not model.decoder.causal:
        raise ValueError("mask must be given: this stack is not causal and would see the answers")
    logits = model.logits(model.decode(ids[:, :-1], mask=mask))  # (B, T, V)
    target = ids[:, 1:]  # (B, T)
    nats = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    return nats.view(target.shape)


def mean_loss(model: Transformer, ids: Tensor) -> Tensor:
    """The mean of `next_token_nats`: what training makes small."""
    return next_token_nats(model, ids).mean()

# %% [markdown]
# The proof: the same losses, one question at a time. For each place, give the model only what stands before it, and score the next token by hand. Output and every gradient must agree, with all parameters redrawn at random.

# %% tags=["active-ipynb"]
# small = Transformer(language_model(13, d_model=16, n_heads=2, d_ff=32)).double()
# for parameter in small.parameters():
#     torch.nn.init.normal_(parameter, std=0.3)
# ids = torch.randint(13, (2, 9))
# ours = next_token_nats(small, ids)
# alone = [small(row[None, :t])[0, -1].log_softmax(0)[row[t]] for row in ids for t in range(1, 9)]
# theirs = -torch.stack(alone).view(2, 8)
# weights = torch.randn(2, 8, dtype=torch.float64)
# parameters = list(small.parameters())
# checked = [(ours, theirs)]
# checked += zip(
#     torch.autograd.grad(ours, parameters, weights),
#     torch.autograd.grad(theirs, parameters, weights),
#     strict=True,
# )
# for a, b in checked:
#     torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
# print(f"{tuple(ours.shape)} losses, {len(parameters)} gradients: equal to sixteen single questions")

# %% [markdown]
# ## Training
#
# There are no sentences and no filler. A step takes random **crops**: pieces of the text that begin anywhere. Optimiser, schedule and clipping are those of Chapter 16. The crops of a step are a function of the seed and the step, as in Chapter 19.

# %% tags=["hide-input"]
def check_text_ids(model: Transformer, ids: Tensor, length: int) -> None:
    """Raise ValueError unless ids `(n,)` fit the model and hold a window of `length` + 1."""
    if model.encoder is not None or model.decoder is None:
        raise ValueError("model must have a decoder and no encoder")
    check_sizes(length=length)
    if ids.ndim != 1 or ids.is_floating_point():
        raise ValueError(f"ids must be (n,) integers, got {tuple(ids.shape)} of {ids.dtype}")
    if len(ids) < length + 1:
        raise ValueError(f"ids must hold at least length + 1 = {length + 1} tokens, got {len(ids)}")
    low, high, V = int(ids.min()), int(ids.max()), model.config.vocab_size
    if low < 0 or high >= V:
        raise ValueError(f"ids must be in [0, {V}), got {low} to {high}")

# %%
def train_language_model(
    model: Transformer,
    ids: Tensor,
    *,
    steps: int,
    length: int = 64,
    batch: int = 16,
    rate: float = 1e-3,
    warm_up: int | None = None,
    seed: int = 0,
    loss: Callable[[Transformer, Tensor], Tensor] = mean_loss,
    on_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train on random crops of one long text; return the loss of each step, in nats a token.

    The crops of a step, and the units it drops, are a function of `seed` and the step. Adam with
    the paper's betas, a cosine to 0 after `warm_up` steps, gradients of length 1 at most.

    Args:
        model: a decoder-only model; it is in training mode meanwhile, and afterwards.
        ids: the text, `(n,)` integers.
        steps, length, batch: each step reads `batch` crops of `length` tokens; at least 2 steps.
        rate: the highest learning rate.
        warm_up: steps until it is reached; None for a twentieth of `steps`.
        seed: for the crops and for dropout; torch's own generator is left as it was.
        loss: what is made small: of the model and crops `(batch, length + 1)`, a number.
        on_step: called with the step, 1 to `steps`, and its loss.

    Raises:
        ValueError: a size below 1, fewer than `length` + 1 ids, ids outside the vocabulary, a
            model with an encoder, a `warm_up` that is not below `steps`, gradients of inf or nan,
            a stack that is not causal with the default `loss`.
    """
    check_text_ids(model, ids, length)
    check_sizes(steps=steps, batch=batch)
    schedule = cosine(rate, max(1, steps // 20) if warm_up is None else warm_up, steps)
    optimizer, losses = adam(model.parameters()), []
    device, window = next(model.parameters()).device, torch.arange(length + 1)
    model.train()
    with torch.random.fork_rng():
        for step in range(1, steps + 1):
            torch.manual_seed(step_seed(seed, step))
            starts = torch.randint(len(ids) - length, (batch, 1))
            value = loss(model, ids[starts + window].to(device))  # (batch, length + 1)
            optimizer.zero_grad()
            value.backward()
            clip_gradients(model.parameters(), 1.0)
            set_rate(optimizer, schedule(step))
            optimizer.step()
            losses.append(value.item())
            if on_step is not None:
                on_step(step, losses[-1])
    return losses

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# from transformer_annotated import SDPA
#
# torch.set_num_threads(1)
# steps, length, batch = (1100, 128, 8) if full else (4, 32, 2)
# torch.manual_seed(0)
# model = Transformer(patch(config, SDPA))
# start = time.perf_counter()
# losses = train_language_model(model, train_ids, steps=steps, length=length, batch=batch, rate=5e-3)
# print(f"ln V = {math.log(V):.2f}; first loss {losses[0]:.2f}, last {losses[-1]:.2f} nats a token")
# print(f"{time.perf_counter() - start:.0f} seconds; {machine()}")

# %% [markdown]
# `SDPA` is Chapter 3's other way to attention: the same function, faster. The first loss is above $\ln V$. With one table for input and output, an untrained model bets on the token that it has just read, and that is rarely the next one.

# %% mystnb={"figure": {"caption": "The model first learns which characters are frequent, then which follow which, and goes on below what one character of context can tell.", "name": "fig-language-model-curve"}, "image": {"alt": "A falling, noisy curve of bits a character against training step. Three dashed horizontal lines mark the guessers; the curve crosses all three in turn."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# fig, ax = plt.subplots(figsize=(7.2, 3.0))
# ax.plot(range(1, steps + 1), [nats / math.log(2) for nats in losses], linewidth=0.8)
# for name, bits in baselines.items():
#     ax.axhline(float(bits), color="#666666", linewidth=1, linestyle="--")
#     ax.text(steps, float(bits) + 0.06, name, ha="right", color="#444444", fontsize=9)
# ax.set(xlabel="step", ylabel="bits a character", ylim=(1.8, 7.6));

# %% [markdown]
# In {numref}`fig-language-model-curve` the curve crosses one dashed line after the other. Note where it lingers: at the lowest line. To go below, it must learn to use more than one character. The curve is the loss of the crops just read; the dashed lines are measured on unseen text. The next section measures the model on unseen text, too.
#
# ## Bits per byte
#
# A loss in nats a token cannot be compared between two tokenizers. Whoever cuts the text into longer tokens has fewer and harder questions. What can be compared is what the *whole* text costs, divided by something both agree on: its bytes. With $n$ tokens and the mean loss $L$ of {eq}`eq-language-model`,
#
# $$
# \text{bits per byte} = \frac{n}{\text{number of bytes}} \cdot \frac{L}{\ln 2} .
# $$ (eq-bits-per-byte)
#
# Such a file can really be made: with an arithmetic coder, a model turns a text into a file of about that many bits {cite:p}`deletang2024language`. So nothing may be left out. A window has a first token too; windows therefore share one token, and each token is scored once. The very first token has nothing before it. It costs $\log_2 V$, like a guess.
#
# Two limits. At the start of a window the model has read little, so the result depends on `length`; overlapping windows, of which only the second half is scored, would give a lower number for twice the work. And a text can be cut into tokens in many ways. A model of tokens is charged for one of them, so its number is an upper bound.

# %%
def windows_of(ids: Tensor, length: int) -> Iterator[Tensor]:
    """Cut ids `(n,)` into `(B, length + 1)` pieces that share one token; the last may be shorter."""
    whole = (len(ids) - 1) // length
    if whole:
        yield from ids[: whole * length + 1].unfold(0, length + 1, length).split(64)
    if len(ids) > whole * length + 1:
        yield ids[None, whole * length :]


def bits_per_byte(model: Transformer, ids: Tensor, n_bytes: int, *, length: int = 64) -> float:
    """How many bits the model needs for one byte of a text: lower is better.

    Every token is scored once, in windows of `length` tokens; the first token of all, which has
    nothing before it, costs as much as any: log2 V.

    Args:
        model: a decoder-only model; in evaluation mode meanwhile.
        ids: the text, `(n,)` integers.
        n_bytes: how many bytes of UTF-8 the text has; the tokenizer does not matter then.
        length: the window; within it a token sees what stands before it.

    Raises:
        ValueError: fewer than 2 ids, ids outside the vocabulary, a size below 1, a model with an
            encoder or with a stack that is not causal.
    """
    check_text_ids(model, ids, 1)
    check_sizes(n_bytes=n_bytes, length=length)
    nats = math.log(model.config.vocab_size)
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for window in windows_of(ids, length):
            nats += next_token_nats(model, window.to(device)).double().sum().item()
    return nats / n_bytes / math.log(2)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print([window.tolist() for window in windows_of(torch.arange(8), 3)])
# undecided = Transformer(config)
# torch.nn.init.zeros_(undecided.embedding.weight)  # all logits 0
# print(f"without opinion {bits_per_byte(undecided, val_ids, n_bytes, length=length):.4f}", end="   ")
# print(f"log2 V = {math.log2(V):.4f}")
# measured = {"characters": bits_per_byte(model, val_ids, n_bytes, length=length)}
# print(f"after training  {measured['characters']:.4f}", end="   ")
# print(f"the third guesser {baselines['knows the character before']:.4f}")

# %% [markdown]
# Every number from 1 to 7 is an answer exactly once, and only 0 is not. A model that gives all characters the same score costs exactly $\log_2 V$. That is the check. The last line is the answer to the question above: compare the trained model with the third guesser, who saw one character.
#
# Now another tokenizer: byte-pair encoding, from Chapter 13. It keeps line ends and spaces, so running text comes back exactly. Characters that stand together often are one token now. Ġ is a space and Ċ a line end. The very first Ġ is not in the text: this tokenizer puts a space before it, as before any word, and `decode` takes it away.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import train_bpe
#
# bpe = train_bpe([text.train[: None if full else 20_000]], 1024 if full else 300)
# bpe_train = torch.tensor(bpe.encode(text.train[: None if full else 20_000]))
# val_text = alphabet.decode(val_ids)
# bpe_val = torch.tensor(bpe.encode(val_text))
# assert bpe.decode(bpe_val.tolist()) == val_text
# print(f"{bpe.vocab_size} tokens, {n_bytes / len(bpe_val):.2f} bytes each")
# print(" ".join(bpe.pieces[i] for i in bpe_val[:16].tolist()))

# %% tags=["active-ipynb", "nbval-ignore-output"]
# torch.manual_seed(0)
# other = Transformer(patch(language_model(bpe.vocab_size), SDPA))
# bpe_losses = train_language_model(
#     other, bpe_train, steps=steps // 2, length=length // 2, batch=batch, rate=5e-3
# )
# measured["byte-pair tokens"] = bits_per_byte(other, bpe_val, n_bytes, length=length // 2)
# for (name, bits), final in zip(measured.items(), (losses, bpe_losses), strict=True):
#     nats = sum(final[-50:]) / len(final[-50:])
#     print(f"{name:18s}{nats:5.2f} nats a token at the end   {bits:5.2f} bits a byte on unseen text")

# %% [markdown]
# The second model looks far worse in nats a token. In bits per byte the two are close to each other, and that is the honest comparison. It is no fair race: half the steps, a larger table, and windows that hold more text.
#
# ## Does context help?
#
# Ask for the loss at each place of a window, averaged over many windows.

# %%
def nats_by_position(
    model: Transformer, ids: Tensor, *, length: int, windows: int | None = None
) -> Tensor:
    """The mean loss at each position of a window, `(length,)`: does context help?

    Windows lie side by side in ids `(n,)`; `windows` takes so many, spread evenly, None takes all.
    Raises ValueError as `bits_per_byte` does, and for too few ids for one window.
    """
    check_text_ids(model, ids, length)
    check_sizes(windows=windows)
    cuts = ids.unfold(0, length + 1, length)  # (W, length + 1)
    if windows is not None and windows < len(cuts):
        cuts = cuts[torch.arange(windows) * len(cuts) // windows]
    rows = max(1, 4096 // length)
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        parts = [next_token_nats(model, some.to(device)).sum(0) for some in cuts.split(rows)]
    return torch.stack(parts).sum(0).clone() / len(cuts)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# by_place = nats_by_position(model, val_ids, length=2 * length) / math.log(2)
# print(f"{(len(val_ids) - 1) // (2 * length)} windows of {2 * length} characters")

# %% mystnb={"figure": {"caption": "The first few characters of context help most. Past the length it was trained on, the model soon does no better than after a single character.", "name": "fig-language-model-position"}, "image": {"alt": "Bits a character against the number of characters read. The curve falls steeply over the first ten characters, stays level up to a dashed line that marks the training length, and jumps up after it."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 3.0))
# ax.plot(range(1, 2 * length + 1), by_place)
# ax.axvline(length, color="#666666", linewidth=1, linestyle="--")
# ax.text(length * 0.98, by_place.max(), "trained to here", ha="right", va="top", color="#444444")
# ax.set(xlabel="characters read", ylabel="bits a character", ylim=(0, None));

# %% [markdown]
# Read {numref}`fig-language-model-position` from left to right. Each place is a mean over that many windows, so small wiggles are chance. With one character read, the model knows what the third guesser knows, and does no better. Within ten characters it has gained most of what it will gain; a model of this size, trained this briefly, uses little more. Then comes the dashed line. The positions after it never occurred in training. The paper hoped that its sinusoids "may allow the model to extrapolate" (section 3.5). Here they do not. Chapters 29 to 31 are about this cliff.
#
# ## Writing
#
# Generation is the loop of Chapter 20 without a source. The prompt goes through the model once and fills the cache. Then each new token goes through alone. Two things are different. There is no sign for the end, so somebody else must stop. And the reader wants to see each token when it is there. So `generate` is an *iterator*: it computes a token when it is asked for one.

# %%
def generate(
    model: Transformer,
    ids: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    cache: Cache | None = None,
    padding: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue a prompt: yields the next token of each row, `(B,)`, as soon as it is known.

    Args:
        model: a decoder-only model; in evaluation mode while it computes.
        ids: the prompts, `(B, T)` integers.
        max_new_tokens: how many tokens at most; whoever reads the iterator may stop earlier.
        temperature: the logits are divided by it; 0 takes the most probable token.
        top_k, top_p: see `truncate`; applied after the temperature.
        generator: where chance comes from; None for torch's own.
        cache: an empty cache for keys and values; None for `Cache(model)`.
        padding: `(B, T)` bool, True for a real token. Shorter prompts have their filler first.

    Raises:
        ValueError: at the call, for an empty prompt, `max_new_tokens` below 1, a temperature
            that is negative or not finite, what `truncate` objects to, a cache that is not
            empty, filler that is not on the left, a model with an encoder. And when a token is
            asked for, if the model's logits are not finite.
    """
    if model.encoder is not None or model.decoder is None:
        raise ValueError("model must have a decoder and no encoder")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids must be a prompt (B, T) with B, T >= 1, got {tuple(ids.shape)}")
    check_sizes(max_new_tokens=max_new_tokens)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    truncate(torch.zeros(1, 2), top_k, top_p)  # only for its checks
    if padding is not None:
        if padding.shape != ids.shape or padding.dtype != torch.bool:
            raise ValueError(f"padding must be {tuple(ids.shape)} bool, got "
                             f"{tuple(padding.shape)} of {padding.dtype}")  # fmt: skip
        if not bool((padding[:, -1] & (padding[:, 1:] >= padding[:, :-1]).all(1)).all()):
            raise ValueError("padding must be on the left: each row False, then True to its end")
    if cache is not None and cache.length:
        raise ValueError(f"cache must be empty, and it holds {cache.length} tokens")
    kept = Cache(model) if cache is None else cache

    def choose(logits: Tensor) -> Tensor:
        highest = logits.amax(dim=-1, keepdim=True)  # (B, 1)
        if not bool(highest.isfinite().all()):
            raise ValueError("the logits are not finite")
        if temperature == 0:
            return logits.argmax(dim=-1)
        p = truncate((logits - highest) / temperature, top_k, top_p).softmax(dim=-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    def stream() -> Iterator[Tensor]:
        new, real, positions = ids, padding, default_positions(ids, padding)
        for _ in range(max_new_tokens):
            with evaluating(model), torch.inference_mode():
                hidden = model.decode(new, padding=real, positions=positions, cache=kept)
                token = choose(model.logits(hidden[:, -1]).float())  # (B,)
            yield token.clone()  # outside inference mode: an ordinary tensor
            new, positions = token[:, None], positions[:, -1:] + 1
            real = None if real is None else F.pad(real, (0, 1), value=True)

    return stream()

# %% [markdown]
# Look at the order inside `stream`. The mode of the model and inference mode are set around one step, not around the `yield`. Between two tokens the caller's world is as it was. All checks stand outside of `stream`: they answer at the call, not at the first token.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# prompt = text.val[:20]
# chance = torch.Generator().manual_seed(0)
# print(prompt, end="")
# ids = torch.tensor(alphabet.encode(prompt))[None]
# for token in generate(
#     model, ids, max_new_tokens=length - ids.shape[1], temperature=0.8, generator=chance
# ):
#     print(alphabet.decode(token), end="", flush=True)

# %% [markdown]
# The first twenty characters are the prompt. The rest was printed one by one. Many words are English, the names and the line breaks look like a play, and there is no meaning. More is not to be expected of a hundred thousand parameters.
#
# Is the cache right? Read everything again for each token, take the most probable one, and compare. The temperature 0 means just that, and a very small temperature must agree with it.

# %% tags=["active-ipynb"]
# def read_all_again(ids, n):
#     start = ids.shape[1]
#     for _ in range(n):
#         ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
#     return ids[:, start:]
#
#
# with torch.no_grad():
#     slow = read_all_again(val_ids[None, :9], 20)
# for limit in ({"temperature": 0}, {"temperature": 1e-6}, {"top_k": 1}):
#     fast = torch.stack(list(generate(model, val_ids[None, :9], max_new_tokens=20, **limit)), dim=1)
#     assert torch.equal(fast, slow)
# print("20 tokens: with a cache as without one, and three ways to take the most probable")

# %% [markdown]
# Prompts of different length share a batch with their filler on the *left*, so that all rows end where the new tokens begin. `padding` says where the filler is. A row must not notice its neighbours:

# %% tags=["active-ipynb"]
# rows = [val_ids[:12], val_ids[20:25]]
# ids = torch.stack([F.pad(row, (12 - len(row), 0)) for row in rows])
# real = torch.arange(12) >= torch.tensor([[0], [7]])
# together = torch.stack(
#     list(generate(model, ids, max_new_tokens=15, temperature=0, padding=real)), dim=1
# )
# for row, both in zip(rows, together, strict=True):
#     alone = torch.stack(list(generate(model, row[None], max_new_tokens=15, temperature=0)), dim=1)
#     assert torch.equal(alone[0], both)
# print("two prompts of 12 and 5 tokens: together as alone")

# %% [markdown]
# Three calls that `generate` refuses:

# %% tags=["active-ipynb"]
# for wrong in ({"max_new_tokens": 0}, {"padding": ~real}, {"temperature": -1.0}):
#     try:
#         generate(model, ids, **{"max_new_tokens": 1, **wrong})
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## A prompt that sees itself
#
# A translation can be written as a text: the German sentence, a sign, the English sentence. Then no encoder is needed. But something is lost. In an encoder each German word sees the whole German sentence. Under a causal mask it sees only what stands before it, although the sentence is known from the start.
#
# A **prefix-LM** repairs that with its mask alone: the prefix is seen by everybody, the rest is causal {cite:p}`raffel2020exploring`. With $P$ tokens in the prefix, query $t$ may see key $s$ if
#
# $$
# s \le t \quad \text{or} \quad s \le P .
# $$ (eq-prefix-mask)

# %%
PREFIX_LM = {**DECODER_ONLY, "decoder.causal": False}


def prefix_mask(prefix_lengths: Tensor, T: int) -> Mask:
    """The mask of a prefix-LM: all see the prefix, and later tokens see the past (T5, section 3.2).

    Args:
        prefix_lengths: `(B,)` integers from 0 to T: how many tokens of each row are the prefix.
        T: the length of the rows.

    Raises:
        ValueError: lengths that are not `(B,)` integers in [0, T], or T below 1.
    """
    check_sizes(T=T)
    if prefix_lengths.ndim != 1 or prefix_lengths.is_floating_point():
        raise ValueError(f"prefix_lengths must be (B,) integers, got "
                         f"{tuple(prefix_lengths.shape)} of {prefix_lengths.dtype}")  # fmt: skip
    if bool(((prefix_lengths < 0) | (prefix_lengths > T)).any()):
        raise ValueError(f"prefix_lengths must be in [0, {T}], got {prefix_lengths.tolist()}")
    at = torch.arange(T, device=prefix_lengths.device)
    past = at <= at[:, None]  # (T, T): key s stands at or before query t
    # Places from 0 here, from 1 in the formula.
    return Mask(allowed=past | (at < prefix_lengths[:, None, None]))  # (B, T, T)

# %% tags=["hide-input"]
def draw_masks(prefix: int = 4, T: int = 8) -> Any:
    """Draw who sees whom in a causal LM, a prefix-LM and an encoder-decoder, a colour a stack."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    seen = prefix_mask(torch.tensor([0, prefix]), T).dense(2, T, T)
    assert seen is not None
    axes = plt.subplots(1, 3, figsize=(7.2, 3.0), sharey=True)[1]
    names = ("causal LM", "prefix-LM", "encoder-decoder")
    for ax, name, row in zip(axes, names, (0, 1, 1), strict=True):
        for t, s in seen[row, 0].nonzero().tolist():
            use = 0 if row == 0 or name == "prefix-LM" or s >= prefix else 1 if t < prefix else 2
            ax.add_patch(plt.Rectangle((s, t), 0.9, 0.9, facecolor=COLORS[use]))
        ax.set(xlim=(-0.1, T), ylim=(T, -0.1), title=name, xlabel="key", aspect="equal")
        ticks = [i + 0.45 for i in range(T)]
        ax.set_xticks(ticks, "abcdABCD"[:T])
        ax.set_yticks(ticks, "abcdABCD"[:T])
        ax.grid(False)
    axes[0].set_ylabel("query")
    labels = ("self-attention of the decoder", "of the encoder", "cross-attention")
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=color) for color in COLORS[:3]]
    axes[1].figure.legend(handles, labels, loc="outside lower center", ncols=3)
    return axes

# %% mystnb={"figure": {"caption": "A prefix-LM sees what an encoder-decoder sees. It does with one set of weights what the other does with three.", "name": "fig-prefix-mask"}, "image": {"alt": "Three grids of eight queries by eight keys. Left, the lower triangle. Middle, the lower triangle and the whole upper left square. Right, the same squares as in the middle, in three colours: encoder, cross-attention and decoder."}} tags=["active-ipynb"]
# draw_masks();

# %% [markdown]
# Rows are queries, coloured squares are keys they see; the source is *abcd*, the target *ABCD*. The middle and the right grid of {numref}`fig-prefix-mask` have the same squares. What differs is the colours. An encoder-decoder has matrices of its own for each colour, and its target reads the source as it is after the *last* layer of the encoder. A prefix-LM has one set of matrices, and one softmax in which source and target compete.
#
# The stack must not be causal by itself, since masks are joined by *and*. So `PREFIX_LM` switches that off, and whoever calls the model must give the mask. Chapter 8 warned of this: a call may forget. So `next_token_nats` refuses such a model without a mask. In generation no mask is needed: the prompt is the prefix, and a new token is the last.

# %% tags=["active-ipynb"]
# prefix_config = patch(config, PREFIX_LM)
# print(diff(config, prefix_config))
# prefix_model = Transformer(prefix_config)
# prefix_model.load_state_dict(model.state_dict())  # the same parameters
# ids = val_ids[None, :10]
# with torch.no_grad():
#     for p, same in ((0, model(ids)), (10, prefix_model(ids))):
#         mask = prefix_mask(torch.tensor([p]), 10)
#         torch.testing.assert_close(prefix_model(ids, src_mask=mask), same, rtol=0, atol=1e-5)
# print("without a prefix: the causal model; all prefix: a stack that sees everything")
# mask = prefix_mask(torch.tensor([4]), 10)  # places 0 to 3
# with torch.no_grad():
#     before = prefix_model(ids, src_mask=mask)
#     for place, first in ((3, 0), (4, 4)):
#         changed = ids.clone()
#         changed[0, place] = (ids[0, place] + 1) % V
#         moved = (prefix_model(changed, src_mask=mask) - before).abs().amax(-1)[0] > 1e-4
#         assert moved.tolist() == [t >= first for t in range(10)]
#         print(f"prefix of 4, another token at place {place}: moved {moved.int().tolist()}")

# %% [markdown]
# The last token of the prefix moves every place, even those before it. The first token after the prefix moves itself and what follows.
#
# ## Three ways to translate
#
# Which is best? The small language, German to English, three models of equal size. The encoder-decoder has two layers a stack. Count in $D^2$. An attention has 4, a network of width $F$ has $2F / D$. With $F = 4D$ an encoder layer has $4 + 8$, a decoder layer $8 + 8$; two of each make 56. Four layers without an encoder have $4 (4 + 10) = 56$ if $F = 5D$. All are scored on the English words alone.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated import Vocabulary, collate, cross_entropy
# from transformer_annotated.paper.toy import BOS, EOS, PAD, padded, split
#
# train_text, test_text = split(20_000 if full else 200, 200 if full else 8, seed=0)
# words = Vocabulary.build(side.split() for pair in train_text for side in pair)
# train_pairs, test_pairs = (
#     [tuple(words.encode(side.split()) for side in pair) for pair in part]
#     for part in (train_text, test_text)
# )
# shape = {"vocab_size": len(words), "d_model": 64, "dropout": 0.0, "self_attention.n_heads": 4}
# two_stacks = {"n_layers": 2, "cross_attention.n_heads": 4, "ffn.d_ff": 256}
# one_stack = {"decoder.n_layers": 4, "ffn.d_ff": 320}
# causal = patch(patch(PAPER_BASE, DECODER_ONLY), shape, one_stack)
# configs = {
#     "encoder-decoder": patch(PAPER_BASE, shape, two_stacks),
#     "causal LM": causal,
#     "prefix-LM": patch(causal, PREFIX_LM),
# }
# for name, c in configs.items():
#     print(f"{name:16s}{sum(p.numel() for p in Transformer(c).parameters()):,} parameters")

# %% tags=["active-ipynb"]
# def loss_of(model, pairs):
#     """Nats a target word, for a model with an encoder or without one."""
#     if model.encoder is not None:
#         batch = collate(pairs)
#         logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
#         return cross_entropy(logits, batch.tgt_out, batch.tgt_padding)
#     ids = padded([[*src, BOS, *tgt, EOS] for src, tgt in pairs])
#     prefix = torch.tensor([len(src) + 1 for src, _ in pairs])
#     mask = None if model.decoder.causal else prefix_mask(prefix, ids.shape[1] - 1)
#     scored = (torch.arange(1, ids.shape[1]) >= prefix[:, None]) & (ids[:, 1:] != PAD)
#     return next_token_nats(model, ids, mask)[scored].mean()
#
#
# def translations(model, pairs):
#     """Twenty most probable words for each pair; what follows EOS is not looked at."""
#     prompts = [[*src, BOS] for src, _ in pairs]
#     T = max(map(len, prompts))
#     ids = torch.tensor([[PAD] * (T - len(row)) + row for row in prompts])
#     real = torch.arange(T) >= torch.tensor([[T - len(row)] for row in prompts])
#     stream = generate(model, ids, max_new_tokens=20, temperature=0, padding=real)
#     return torch.stack(list(stream), dim=1).tolist()

# %% [markdown]
# In a row, German, `BOS` and English stand one after the other; `BOS` is the sign between them. The filler at the end of a row needs no mask, since nothing real sees it and it is not scored. Now the same batches, in the same order, for all three.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def learn(config, steps, rows):
#     """A model after some steps; the batches depend on the step alone."""
#     torch.manual_seed(0)
#     learner, chance = Transformer(config), random.Random(0)
#     optimiser = adam(learner.parameters())
#     schedule = cosine(3e-3, max(1, steps // 10), steps)
#     for step in range(1, steps + 1):
#         optimiser.zero_grad()
#         loss_of(learner, chance.choices(train_pairs, k=rows)).backward()
#         clip_gradients(learner.parameters(), 1.0)
#         set_rate(optimiser, schedule(step))
#         optimiser.step()
#     return learner

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from torch.utils.flop_counter import FlopCounterMode
#
# from transformer_annotated import greedy_search
#
# for name, c in configs.items():
#     learner = learn(c, *((300, 32) if full else (2, 4)))
#     with torch.no_grad(), FlopCounterMode(display=False) as work:
#         loss = loss_of(learner.eval(), test_pairs).item()
#     if learner.encoder is None:
#         found = translations(learner, test_pairs)
#     else:
#         batch = collate(test_pairs)
#         found = greedy_search(learner, batch.src, batch.src_padding, extra=10).tolist()
#     right = sum(
#         (row + [EOS])[: len(tgt) + 1] == [*tgt, EOS]  # equal up to and including EOS
#         for row, (_, tgt) in zip(found, test_pairs, strict=True)
#     )
#     print(
#         f"{name:16s}{loss:6.3f} nats a word   {right / len(test_pairs):4.0%} exactly right   "
#         f"{work.get_total_flops() / len(test_pairs) / 1e6:.1f} million operations a pair"
#     )

# %% [markdown]
# At this size and this budget the encoder-decoder learns faster, and it does it with fewer operations: each of its weights meets only one side of the pair, while every weight of the other two meets both. Opening the prefix does not close the gap. Operations are multiplications and additions of one forward pass, filler included. One seed, one learning rate for all, one small language: the distance between the last two lines says little.
#
# ## Why the encoder went
#
# {cite:t}`liu2018generating` dropped it to write articles from long sources; they suspected that encoder and decoder learn the same language twice. GPT trained a decoder on books and then fine-tuned it {cite:p}`radford2018improving`. GPT-2 left the fine-tuning out {cite:p}`radford2019language`. GPT-3 made the prompt the whole interface: show some examples, and the model goes on {cite:p}`brown2020language`. The reasons that are usually given:
#
# - *One stack.* No choice of how to divide the layers, and one kind of layer to make fast.
# - *Every token teaches.* A crop of $T$ tokens gives $T$ losses. With an encoder, the tokens on its side give none. The German words could teach the causal model as well; in the experiment above they do not, so that all three learn from the same losses.
# - *One cache.* In a dialogue, what was answered becomes part of the prompt. A causal stack keeps its keys. An encoder, or a prefix that has grown, must be computed again, since every position sees the new ones.
# - *Any task is a text.* No need to say what is source and what is target.
#
# Was it necessary? At equal computation, which gives the encoder-decoder twice the weights, T5 found it better than both language models on its tasks; with one set of weights for both stacks it was nearly as good {cite:p}`raffel2020exploring`. {cite:t}`wang2022language` compared all three at equal computation, the language models with about five billion parameters. Straight after training on plain text the causal model did best on tasks without examples (zero-shot). With a further stage of training on many tasks, an encoder-decoder trained to fill gaps did best. For translation, {cite:t}`zhang2022examining` found language models behind at small sizes and the distance shrinking as models grow. Where the input is one thing and the output another, encoders are still in use: in Whisper, sound goes in and text comes out {cite:p}`radford2023robust`.
#
# ## How it breaks
#
# - *The target is not shifted.* The loss falls to nothing; shown below.
# - *A window longer than in training.* The text falls apart at a fixed place. {numref}`fig-language-model-position` shows it before a user does.
# - *Nats compared across tokenizers.* A new vocabulary, and the loss is much better or much worse. Count bytes.
# - *Filler on the right of a prompt.* The first new token comes after filler. `generate` refuses it.
# - *A prefix-LM without its mask.* In training it sees the answers, and the loss is too good as well. `next_token_nats` refuses; a loss that you write yourself does not.
#
# The first of these mistakes deserves a look, because its loss looks so good. Score each place on the token that it reads:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def unshifted(model, ids):
#     logits = model(ids[:, :-1])
#     return F.cross_entropy(logits.flatten(0, 1), ids[:, :-1].flatten())
#
#
# copier = Transformer(patch(config, SDPA))
# broken = train_language_model(
#     copier, train_ids, steps=150 if full else 2, batch=8, rate=5e-3, loss=unshifted
# )
# print("loss:", ", ".join(f"{value:.4f}" for value in broken[:: max(1, len(broken) // 5)]))
# written = generate(copier, val_ids[None, :20], max_new_tokens=25, temperature=0)
# print(repr(alphabet.decode(torch.cat(list(written)))))

# %% [markdown]
# The loss is excellent, and the model has learnt to repeat its input. The prompt ends with a line end, so it writes line ends. The loss starts below $\ln V$: the shared table already prefers the token just read. A loss that is too good is a mistake until shown otherwise. A test that finds it: train on random tokens, and the loss must stay near $\ln V$.
#
# ## Takeaways
#
# - A language model is the decoder of 2017 without cross-attention. Nothing is added.
# - One crop of $T + 1$ tokens is $T$ questions, answered in one pass.
# - Bits per byte make tokenizers comparable; nothing of the text may be left unscored.
# - A generator yields tokens as they come; cached and uncached must agree token by token.
# - A prefix-LM differs from a causal one by its mask, and from an encoder-decoder by sharing its weights.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 25.1.** Model A has 1.5 nats a token with tokens of 1 byte. Model B has 3.2 nats a token with tokens of 2.5 bytes on average. How many bits per byte has each, and which is better? Answer with the two numbers, the better one first.

# %% tags=["active-ipynb"]
# answer = ...
# check("25.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = sorted([1.5 / math.log(2), 3.2 / 2.5 / math.log(2)])
# check("25.1", answer)

# %% [markdown]
# **Exercise 25.2.** An encoder-decoder of the paper has $N$ layers a stack and $F = 4D$. How many layers of the same width has a language model with as many weights? Leave biases, norms and the embedding out. Answer for $N = 6$.

# %% tags=["active-ipynb"]
# answer = ...
# check("25.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# # A layer with one attention has 4 D^2 + 8 D^2 weights, one with two has 4 D^2 more.
# answer = (6 * 12 + 6 * 16) / 12
# check("25.2", answer)

# %% [markdown]
# **Exercise 25.3.** Several short texts share one row, as in Chapter 14. A token may see the past of its own text and nothing of the others. Write `own_text(ids, end)`: for ids `(B, T)` in which the token `end` closes each text (and belongs to it), the `Mask` that a causal stack needs in addition. (Chapter 14 also counts the positions of each text from 0; leave that out here.)

# %% tags=["active-ipynb"]
# answer = ...
# check("25.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def own_text(ids, end):
#     number = F.pad((ids == end).cumsum(dim=1), (1, 0))[:, :-1]  # which text: (B, T)
#     return Mask(allowed=number[:, :, None] == number[:, None, :])
#
#
# check("25.3", own_text)

# %% [markdown]
# **Exercise 25.4.** Write `endless(model, ids, n, window)`: an iterator over $n$ most probable next tokens, each `(B,)`, of a prompt `(B, T)`. The model must never be shown more than the last `window` tokens, at positions $0, 1, \ldots$ Why can it not keep a cache?

# %% tags=["active-ipynb"]
# answer = ...
# check("25.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def endless(model, ids, n, window):
#     for _ in range(n):
#         ids = ids[:, -window:]
#         with torch.no_grad():
#             token = model(ids)[:, -1].argmax(dim=-1)
#         yield token
#         ids = torch.cat([ids, token[:, None]], dim=1)
#
#
# # Every token gets another position. And from the second layer on, the kept keys were computed
# # from tokens that have now left the window.
# check("25.4", endless)
