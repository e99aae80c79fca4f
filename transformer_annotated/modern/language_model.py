# %% [markdown]
r"""
# A language model

Leave out the encoder, and the Transformer of 2017 continues any text, one token at a time.
"""

# %%
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    train: str
    val: str
    test: str


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
            `toy`, four thousand English sentences of the small language, never downloaded.

    Raises:
        ValueError: another name, or a file with another sum.
        OSError: no network; the message says what to put where.
    """
    if name == "shakespeare":
        return cut(name, obtain(SHAKESPEARE)[0].read_bytes().decode())
    if name == "toy":
        english = dict.fromkeys(english for _, english in grammar(4000, seed=0))
        return cut(name, "\n".join(english) + "\n")
    raise ValueError(f"name must be 'shakespeare' or 'toy', got {name!r}")


def any_text() -> Text:
    """Shakespeare where the file is at hand, else the toy text; nothing is downloaded."""
    return open_text("shakespeare" if at_hand(SHAKESPEARE) else "toy")


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


# %%
def next_token_nats(model: Transformer, ids: Tensor, mask: Mask | None = None) -> Tensor:
    """The loss `(B, T)` of each next token, in nats, for ids `(B, T + 1)`.

    Position t reads the tokens up to t and is scored on token t + 1.
    """
    logits = model.logits(model.decode(ids[:, :-1], mask=mask))  # (B, T, V)
    return F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


def mean_loss(model: Transformer, ids: Tensor) -> Tensor:
    """The mean of `next_token_nats`: what training makes small."""
    return next_token_nats(model, ids).mean()


# %%
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
            model with an encoder, a `warm_up` that is not below `steps`, gradients of inf or nan.
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
        ValueError: no ids, ids outside the vocabulary, a size below 1, a model with an encoder.
    """
    check_text_ids(model, ids, 1)
    check_sizes(n_bytes=n_bytes, length=length)
    nats = math.log(model.config.vocab_size)
    device = next(model.parameters()).device
    with evaluating(model), torch.inference_mode():
        for window in windows_of(ids, length):
            nats += next_token_nats(model, window.to(device)).double().sum().item()
    return nats / n_bytes / math.log(2)


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
            empty, filler that is not on the left, a model with an encoder.
    """
    if model.encoder is not None or model.decoder is None:
        raise ValueError("model must have a decoder and no encoder")
    if ids.ndim != 2 or not ids.numel():
        raise ValueError(f"ids must be a prompt (B, T) with B, T >= 1, got {tuple(ids.shape)}")
    check_sizes(max_new_tokens=max_new_tokens)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}")
    truncate(torch.zeros(1, 2), top_k, top_p)
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
        if temperature == 0:
            return logits.argmax(dim=-1)
        logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
        p = truncate(logits, top_k, top_p).softmax(dim=-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0]

    def stream() -> Iterator[Tensor]:
        new, real, positions = ids, padding, default_positions(ids, padding)
        for _ in range(max_new_tokens):
            with evaluating(model), torch.inference_mode():
                hidden = model.decode(new, padding=real, positions=positions, cache=kept)
                token = choose(model.logits(hidden[:, -1]).float())  # (B,)
            yield token.clone()
            new, positions = token[:, None], positions[:, -1:] + 1
            real = None if real is None else F.pad(real, (0, 1), value=True)

    return stream()


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
    return Mask(allowed=past | (at < prefix_lengths[:, None, None]))  # (B, T, T)
