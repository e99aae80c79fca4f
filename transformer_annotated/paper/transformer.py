# %% [markdown]
r"""
# The whole model
"""

# %%
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from transformer_annotated.paper.add_norm import LayerNorm, PostNorm
from transformer_annotated.paper.attention import Mask, sdpa
from transformer_annotated.paper.embedding import Embedding, Head
from transformer_annotated.paper.feed_forward import FeedForward
from transformer_annotated.paper.multi_head import KeyValueCache, MultiHeadAttention
from transformer_annotated.paper.parts import Spec, check_rate, check_sizes, patch, show, spec

# %%
Pattern = Spec[nn.Module] | None | tuple[Spec[nn.Module] | None, ...]


def check_pattern(name: str, node: Any, *, none: bool = False, tuples: bool = True) -> None:
    """Raise ValueError unless `node` is a spec (or None, or a non-empty tuple of those)."""
    entries = node if tuples and isinstance(node, tuple) else (node,)
    if not entries or not all(isinstance(e, Spec) or (none and e is None) for e in entries):
        raise ValueError(f"{name} must be a spec{' or None' if none else ''}, got {show(node)}")


def check_bool(name: str, value: Any) -> None:
    """Raise ValueError for anything but True and False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")


# %%
@dataclass(frozen=True)
class StackConfig:
    """One stack: how many layers, and the sub-layers of a layer in their order.

    A tuple is a pattern tiled over the layers: `(a, a, b)` gives layers a, a, b, a, a, b.

    Attributes:
        n_layers: number N of layers.
        self_attention, cross_attention, ffn: spec, pattern, or None for no such sub-layer.
        bias: spec of what is added to the scores of self-attention, once per stack; None in the
            paper. It is built with `n_heads=` and called with the positions of queries and keys.
        causal: whether a position is kept from seeing later ones.
    """

    n_layers: int = 6
    self_attention: Pattern = spec(MultiHeadAttention, n_heads=8)
    cross_attention: Pattern = None
    ffn: Pattern = spec(FeedForward, d_ff=2048)
    bias: Spec[nn.Module] | None = None
    causal: bool = False

    def __post_init__(self) -> None:
        check_sizes(n_layers=self.n_layers)
        for name in ("self_attention", "cross_attention", "ffn"):
            check_pattern(name, getattr(self, name), none=True)
        check_pattern("bias", self.bias, none=True, tuples=False)
        check_bool("causal", self.causal)


# %%
@dataclass(frozen=True)
class Config:
    """The 2017 Transformer, base size, as a tree that mirrors the model.

    `patch` changes it, `Transformer` builds it, `to_json` writes it.

    Attributes:
        vocab_size: number V of tokens (of the target language, if `src_vocab_size` is given).
        src_vocab_size: None for one vocabulary and one embedding shared by both languages.
        d_model: width D.
        norm: spec of every norm.
        residual: spec, or pattern over the layers, of what connects a sub-layer to its input.
        final_norm: whether a norm follows each stack.
        dropout: probability for the embedding's sum and each sub-layer's output.
        embedding, head: specs of the way in and the way out.
        encoder, decoder: the stacks; None for an absent one.
    """

    vocab_size: int = 37_000
    src_vocab_size: int | None = None
    d_model: int = 512
    norm: Spec[nn.Module] = spec(LayerNorm)
    residual: Spec[nn.Module] | tuple[Spec[nn.Module], ...] = spec(PostNorm)
    final_norm: bool = False
    dropout: float = 0.1
    embedding: Spec[nn.Module] = spec(Embedding)
    head: Spec[nn.Module] = spec(Head)
    encoder: StackConfig | None = StackConfig()
    decoder: StackConfig | None = StackConfig(
        cross_attention=spec(MultiHeadAttention, n_heads=8), causal=True
    )

    def __post_init__(self) -> None:
        check_sizes(
            vocab_size=self.vocab_size, src_vocab_size=self.src_vocab_size, d_model=self.d_model
        )
        check_rate("dropout", self.dropout)
        check_bool("final_norm", self.final_norm)
        check_pattern("residual", self.residual)
        for name in ("norm", "embedding", "head"):
            check_pattern(name, getattr(self, name), tuples=False)
        for name in ("encoder", "decoder"):
            stack = getattr(self, name)
            if stack is not None and not isinstance(stack, StackConfig):
                raise ValueError(f"{name} must be a StackConfig or None, got {stack!r}")


# %%
class LayerCache(Protocol):
    """The two caches of one layer. Part II builds them; in Part I the argument is None."""

    self_attention: KeyValueCache
    cross_attention: KeyValueCache


class Layer(nn.Module):
    """One layer of a stack: up to three sub-layers, each inside its residual (section 3.1)."""

    def __init__(
        self,
        d_model: int,
        *,
        norm: Spec[nn.Module],
        residual: Spec[nn.Module],
        dropout: float,
        self_attention: Spec[nn.Module] | None,
        cross_attention: Spec[nn.Module] | None,
        ffn: Spec[nn.Module] | None,
    ) -> None:
        super().__init__()

        def build(part: Spec[nn.Module] | None) -> nn.Module | None:
            return None if part is None else part(d_model=d_model)

        self.self_attention = build(self_attention)
        self.cross_attention = build(cross_attention)
        self.ffn = build(ffn)
        self.residuals = nn.ModuleDict(
            {name: residual(d_model=d_model, norm=norm, dropout=dropout)
             for name, part in self.named_children() if name != "residuals"}
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        bias: nn.Module | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; `memory` `(B, S, D)` is what cross-attention reads."""
        if self.self_attention is not None:
            attend_to_self = partial(
                self.self_attention, mask=mask, positions=positions, bias=bias,
                cache=None if cache is None else cache.self_attention,
            )  # fmt: skip
            x = self.residuals["self_attention"](x, attend_to_self)
        if self.cross_attention is not None:
            if memory is None:
                raise ValueError("memory must be given: this layer has cross-attention")
            attend_to_memory = partial(
                self.cross_attention, memory=memory, mask=memory_mask,
                positions=positions, memory_positions=memory_positions,
                cache=None if cache is None else cache.cross_attention,
            )  # fmt: skip
            x = self.residuals["cross_attention"](x, attend_to_memory)
        if self.ffn is not None:
            x = self.residuals["ffn"](x, self.ffn)
        return x


# %%
class Stack(nn.Module):
    """N layers, an optional bias shared by all of them, and an optional final norm."""

    def __init__(self, config: Config, stack: StackConfig) -> None:
        super().__init__()
        self.causal = stack.causal
        self.layers = nn.ModuleList(
            Layer(
                config.d_model,
                norm=config.norm,
                residual=tiled(config.residual, i),
                dropout=config.dropout,
                self_attention=tiled(stack.self_attention, i),
                cross_attention=tiled(stack.cross_attention, i),
                ffn=tiled(stack.ffn, i),
            )
            for i in range(stack.n_layers)
        )
        self.bias = None if stack.bias is None else stack.bias(n_heads=n_heads(stack))
        self.norm = config.norm(d_model=config.d_model) if config.final_norm else None

    def forward(
        self,
        x: Tensor,
        memory: Tensor | None = None,
        mask: Mask | None = None,
        memory_mask: Mask | None = None,
        *,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """`(B, T, D)` to `(B, T, D)`; a causal stack joins its own rule to `mask`."""
        if self.causal:
            mask = Mask(causal=True) if mask is None else mask & Mask(causal=True)
        for i, layer in enumerate(self.layers):
            x = layer(
                x, memory, mask, memory_mask, positions=positions,
                memory_positions=memory_positions, bias=self.bias,
                cache=None if cache is None else cache[i],
            )  # fmt: skip
        return x if self.norm is None else self.norm(x)


def tiled(node: Any, index: int) -> Any:
    """Entry `index` of a pattern repeated for ever; a single spec serves every layer."""
    return node[index % len(node)] if isinstance(node, tuple) else node


def n_heads(stack: StackConfig) -> int:
    """The number of heads of the stack's self-attention, which a bias needs to know."""
    counts = {
        part.kwargs.get("n_heads")
        for part in (tiled(stack.self_attention, i) for i in range(stack.n_layers))
        if part is not None
    }
    if len(counts) != 1 or not isinstance(count := counts.pop(), int):
        raise ValueError(f"a bias needs one n_heads for all layers, got {sorted(map(str, counts))}")
    return count


# %%
class Transformer(nn.Module):
    """The Transformer that `config` describes (Vaswani et al. 2017, figure 1).

    With both stacks it translates: `model(src, tgt)`. With one it reads one sequence:
    `model(ids)`. All ids are `(B, T)` integers, all padding is `(B, T)` bool, True for a real
    token, and all logits are `(B, T, V)`.

    Raises:
        ValueError: no stack at all, a decoder whose cross-attention has no encoder to read or
            an encoder that nobody reads, and whatever the components object to.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        encoder, decoder = config.encoder, config.decoder
        if encoder is None and decoder is None:
            raise ValueError("encoder and decoder are both None: there is nothing to build")
        if decoder is not None and (encoder is None) != (not _present(decoder.cross_attention)):
            raise ValueError(
                "decoder.cross_attention must be given if there is an encoder to read, and None "
                f"if there is none; got encoder={encoder!r} and "
                f"decoder.cross_attention={decoder.cross_attention!r}"
            )
        self.config = config
        sizes = {"d_model": config.d_model, "dropout": config.dropout}
        self.embedding = config.embedding(vocab_size=config.vocab_size, **sizes)
        self.src_embedding = None
        if config.src_vocab_size is not None:
            self.src_embedding = config.embedding(vocab_size=config.src_vocab_size, **sizes)
        self.encoder = None if encoder is None else Stack(config, encoder)
        self.decoder = None if decoder is None else Stack(config, decoder)
        self.head = config.head(d_model=config.d_model, vocab_size=config.vocab_size)
        self.apply(init_linear)

    def encode(
        self,
        src: Tensor,
        padding: Tensor | None = None,
        *,
        mask: Mask | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Ids `(B, S)` to the memory `(B, S, D)`.

        `mask` is any rule beyond padding. `positions` default to 0, 1, 2, ... over real tokens.
        """
        if self.encoder is None:
            raise ValueError("this model has no encoder")
        mask = padded(src, padding, mask)
        positions = default_positions(src, padding) if positions is None else positions
        embedding = self.embedding if self.src_embedding is None else self.src_embedding
        return self.encoder(embedding(src, positions), mask=mask, positions=positions)

    def decode(
        self,
        tgt: Tensor,
        memory: Tensor | None = None,
        memory_padding: Tensor | None = None,
        *,
        padding: Tensor | None = None,
        mask: Mask | None = None,
        positions: Tensor | None = None,
        memory_positions: Tensor | None = None,
        cache: Sequence[LayerCache] | None = None,
    ) -> Tensor:
        """Ids `(B, T)`, and the memory `(B, S, D)` of an encoder, to vectors `(B, T, D)`.

        With a `cache`, `tgt` holds the new tokens only and `positions` says where they stand;
        `padding` still covers every key.
        """
        if self.decoder is None:
            raise ValueError("this model has no decoder")
        if (memory is None) != (self.encoder is None):
            raise ValueError(f"memory is {'missing' if memory is None else 'given'}, but this "
                             f"model has {'an' if self.encoder else 'no'} encoder")  # fmt: skip
        if cache is not None and positions is None:
            raise ValueError("positions must be given with a cache: it knows keys, not time")
        mask = padded(tgt, padding, mask) if cache is None else joined(padding, mask)
        positions = default_positions(tgt, padding) if positions is None else positions
        memory_mask = None
        if memory is not None:
            memory_mask = padded(memory, memory_padding, None)
            if memory_positions is None:
                memory_positions = default_positions(memory, memory_padding)
        return self.decoder(
            self.embedding(tgt, positions), memory, mask, memory_mask,
            positions=positions, memory_positions=memory_positions, cache=cache,
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """Vectors `(..., D)` to logits `(..., V)`."""
        return self.head(hidden, self.embedding.weight)

    def forward(
        self,
        src: Tensor,
        tgt: Tensor | None = None,
        *,
        src_padding: Tensor | None = None,
        tgt_padding: Tensor | None = None,
        src_mask: Mask | None = None,
        tgt_mask: Mask | None = None,
    ) -> Tensor:
        """Logits `(B, T, V)` for `tgt`, given `src`; or for `src` itself in a one-stack model.

        Args:
            src, tgt: ids `(B, S)` and `(B, T)`. A model with one stack takes `src` alone.
            src_padding, tgt_padding: bool, True for a real token; None if all are.
            src_mask, tgt_mask: any rule beyond padding and causality.
        """
        if (tgt is None) != (self.encoder is None or self.decoder is None):
            raise ValueError(f"tgt is {'missing' if tgt is None else 'given'}, but this model "
                             f"has {'one stack' if tgt is not None else 'two stacks'}")  # fmt: skip
        if tgt is not None and src.shape[:1] != tgt.shape[:1]:
            raise ValueError("src and tgt must hold the same number of sentences, got "
                             f"{tuple(src.shape)} and {tuple(tgt.shape)}")  # fmt: skip
        if self.encoder is None:
            return self.logits(self.decode(src, padding=src_padding, mask=src_mask))
        memory = self.encode(src, src_padding, mask=src_mask)
        if tgt is None:
            return self.logits(memory)
        return self.logits(
            self.decode(tgt, memory, src_padding, padding=tgt_padding, mask=tgt_mask)
        )


# %%
def _present(node: Pattern) -> bool:
    return any(e is not None for e in node) if isinstance(node, tuple) else node is not None


def default_positions(ids: Tensor, padding: Tensor | None) -> Tensor:
    """0, 1, 2, ... over the real tokens: `(1, T)`, or `(B, T)` when there is padding."""
    if ids.ndim < 2:
        raise ValueError(f"ids must be (B, T) with B, T >= 1, got {tuple(ids.shape)}")
    if padding is None:
        return torch.arange(ids.shape[1], device=ids.device)[None]
    return (padding.long().cumsum(dim=-1) - 1).clamp(min=0)


def padded(ids: Tensor, padding: Tensor | None, mask: Mask | None) -> Mask | None:
    """Join `padding` to `mask`, after checking that it fits `ids`."""
    if padding is not None and padding.shape != ids.shape[:2]:
        raise ValueError(
            f"padding must be {tuple(ids.shape[:2])} like the ids, got {tuple(padding.shape)}"
        )
    return joined(padding, mask)


def joined(padding: Tensor | None, mask: Mask | None) -> Mask | None:
    """`mask` with `padding` joined to it; None if there is neither."""
    if padding is None:
        return mask
    return Mask(padding=padding) if mask is None else mask & Mask(padding=padding)


def init_linear(module: nn.Module) -> None:
    """Glorot's uniform initialisation for every linear layer, and zero biases.

    The paper does not state its initialisation; tensor2tensor's is of this kind. Norms start at
    weight 1 and bias 0, and the embedding initialises itself.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# %%
PAPER_BASE = Config()
PAPER_BIG = patch(
    PAPER_BASE,
    {
        "d_model": 1024,
        "self_attention.n_heads": 16,
        "cross_attention.n_heads": 16,
        "ffn.d_ff": 4096,
        "dropout": 0.3,
    },
)
DECODER_ONLY = {"encoder": None, "decoder.cross_attention": None}
ENCODER_ONLY = {"decoder": None}
SDPA = {"self_attention.attend": sdpa, "cross_attention.attend": sdpa}
