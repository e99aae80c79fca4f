# %% [markdown]
r"""
# First translation
"""

# %%
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transformer_annotated.paper.toy import BOS, EOS, PAD, UNK, Batch, Vocabulary, batches, collate

# %%
Ids = tuple[list[int], list[int]]  # an encoded pair: source, target


class Translator(Protocol):
    """What training and decoding ask of a model: both the recurrent one and the Transformer."""

    def __call__(
        self, src: Tensor, tgt: Tensor, *, src_padding: Tensor | None = None
    ) -> Tensor: ...
    def encode(self, src: Tensor, padding: Tensor | None = None) -> Any: ...
    def decode(self, tgt: Tensor, memory: Any, memory_padding: Tensor | None = None) -> Tensor: ...
    def logits(self, hidden: Tensor) -> Tensor: ...
    def train(self, mode: bool = True) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...


def encode_pairs(
    pairs: Iterable[tuple[Sequence[str], Sequence[str]]], vocabulary: Vocabulary
) -> list[Ids]:
    """Pairs of token lists to pairs of id lists."""
    return [(vocabulary.encode(src), vocabulary.encode(tgt)) for src, tgt in pairs]


# %%
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, target: Tensor, padding: Tensor) -> Tensor:
    """Mean over the real tokens of -log p(token), in nats.

    `logits` `(B, T, V)`, `target` `(B, T)` ids, `padding` `(B, T)` bool, True for a real token.
    """
    return F.cross_entropy(logits[padding].float(), target[padding])


# %%
@dataclass
class History:
    """What a training run leaves behind: the loss and the clock after each step."""

    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0


def train(
    model: Translator,
    data: Iterable[Batch],
    *,
    learning_rate: Callable[[int], float],
    loss: Loss = cross_entropy,
    autocast: torch.dtype | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Train `model` on each batch of `data` once, with the paper's Adam (section 5.3).

    Args:
        model: trained in place, and left in training mode.
        data: the batches, already on the model's device; their number is the number of steps.
        learning_rate: the rate at step 1, 2, 3, ...
        loss: what to minimise; `cross_entropy` or the like.
        autocast: compute the forward pass in this precision (torch.bfloat16); None for full.
        on_step: called with the step and the loss, to report progress.

    Raises:
        ValueError: a loss that is not finite; the step is not taken.
    """
    history, start = History(), time.perf_counter()
    adam = torch.optim.Adam(model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9)
    model.train()
    for step, batch in enumerate(data, start=1):
        adam.param_groups[0]["lr"] = learning_rate(step)
        device = batch.src.device.type
        with torch.autocast(device, dtype=autocast, enabled=autocast is not None):
            logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)
        value = loss(logits, batch.tgt_out, batch.tgt_padding)
        if not torch.isfinite(value):
            raise ValueError(f"the loss at step {step} is {value.item()}; the step was not taken")
        adam.zero_grad()
        value.backward()
        adam.step()
        history.loss.append(value.item())
        history.seconds.append(time.perf_counter() - start)
        history.tokens += batch.n_tokens
        if on_step is not None:
            on_step(step, value.item())
    return history


# %%
@torch.no_grad()
def greedy(
    model: Translator, src: Tensor, src_padding: Tensor | None = None, *, extra: int = 50
) -> Tensor:
    """The most probable next token, again and again: ids `(B, T)`, T at most S + `extra`.

    A sentence that has produced EOS is finished and only gets PAD. PAD otherwise, BOS and UNK
    are never produced. The model is in evaluation mode meanwhile, and then as it was before.
    """
    if extra < 1:
        raise ValueError(f"extra must be at least 1, got {extra}")
    was_training = getattr(model, "training", False)
    model.train(False)
    try:
        memory = model.encode(src, src_padding)
        ids = torch.full((len(src), 1), BOS, device=src.device)
        finished = torch.zeros(len(src), dtype=torch.bool, device=src.device)
        while ids.shape[1] <= src.shape[1] + extra and not finished.all():
            logits = model.logits(model.decode(ids, memory, src_padding)[:, -1])  # (B, V)
            logits[:, [PAD, BOS, UNK]] = -torch.inf
            new = logits.argmax(dim=-1).masked_fill(finished, PAD)
            finished = finished | (new == EOS)
            ids = torch.cat((ids, new[:, None]), dim=1)
    finally:
        model.train(was_training)
    return ids[:, 1:]


# %%
def translate(
    model: Translator,
    vocabulary: Vocabulary,
    sentences: Sequence[Sequence[str]],
    *,
    source_vocabulary: Vocabulary | None = None,
    batch_size: int = 128,
    extra: int = 50,
) -> list[list[str]]:
    """Translate tokenised sentences with `greedy`, similar lengths together, in their order.

    `vocabulary` names the target tokens, and the source tokens unless `source_vocabulary` does.
    """
    device = next(model.parameters()).device
    source = source_vocabulary or vocabulary
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    result: list[list[str]] = [[] for _ in sentences]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([(source.encode(sentences[i]), []) for i in chosen]).to(device)
        output = greedy(model, batch.src, batch.src_padding, extra=extra)
        for i, ids in zip(chosen, output.tolist(), strict=True):
            result[i] = vocabulary.decode(ids)
    return result


# %%
def warm_up(peak: float, steps: int) -> Callable[[int], float]:
    """A learning rate that rises to `peak` in `steps` steps, then falls as 1/sqrt(step)."""
    return lambda step: peak * min(step / steps, (steps / step) ** 0.5)
