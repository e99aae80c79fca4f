"""The Transformer, annotated and executable: the book's package.

    from transformer_annotated import Config, Transformer, patch, spec

Every public name of the chapters can be imported from here; it is loaded when first used.
"""

import importlib
from typing import Any

_NAMES = {
    "paper.recurrent": ["RecurrentTranslator"],
    "paper.parts": ["Spec", "diff", "from_json", "patch", "paths", "spec", "to_json"],
    "paper.attention": ["Attend", "Bias", "Mask", "attend", "attention_weights", "sdpa"],
    "paper.multi_head": ["KeyValueCache", "MultiHeadAttention", "record_attention"],
    "paper.feed_forward": ["FeedForward"],
    "paper.add_norm": ["LayerNorm", "PostNorm"],
    "paper.embedding": ["Embedding", "Head", "Sinusoid"],
    "paper.transformer": [
        "Config", "DECODER_ONLY", "ENCODER_ONLY", "Layer", "LayerCache", "PAPER_BASE",
        "PAPER_BIG", "SDPA", "Stack", "StackConfig", "Transformer", "count_parameters",
    ],
    "paper.toy": ["Batch", "Vocabulary", "batches", "collate"],
    "paper.first_translation": [
        "History", "Translator", "cross_entropy", "exact_match", "greedy", "rise_and_fall",
        "train", "translate",
    ],
    "paper.multi30k": [
        "bleu", "bucketed", "detokenize", "label_smoothing", "paper_rate", "tokenizer",
    ],
}  # fmt: skip
_HOME = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
