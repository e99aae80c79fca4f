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
    "training.corpora": ["ParallelCorpus", "open_corpus"],
    "training.tokens": [
        "BPETokenizer", "EncodedCorpus", "Tokenizer", "WordTokenizer", "encode_corpus",
        "load_tokenizer", "train_bpe", "train_words",
    ],
    "training.batching": ["TokenBatchSampler", "pack"],
    "training.objective": ["CrossEntropy", "LossSum", "Objective", "RDrop"],
    "training.schedule": [
        "Schedule", "adam", "clip_gradients", "cosine", "inverse_square_root", "set_rate",
    ],
    "training.speed": ["FAST", "FastDropout", "FastEmbedding", "FastPostNorm", "FusedNorm"],
    "training.checkpoints": [
        "Checkpoint", "CheckpointError", "average_checkpoints", "latest_checkpoint",
        "list_checkpoints", "load_checkpoint", "save_checkpoint",
    ],
    "training.trainer": ["TrainConfig", "Trainer"],
    "training.decoding": ["Cache", "greedy_search", "sample", "translate_texts"],
    "training.beam": ["Hypotheses", "beam_search"],
    "training.bleu": [
        "Scores", "bootstrap_bleu", "corpus_bleu", "corpus_chrf", "evaluate_translations",
    ],
    "training.reproduction": ["Recipe"],
    "training.inside": [
        "AttentionMap", "attention_maps", "greedy_removal", "head_statistics", "remove_heads",
    ],
    "modern.language_model": [
        "Characters", "PREFIX_LM", "Text", "any_text", "bits_per_byte", "generate",
        "language_model", "nats_by_position", "open_text", "prefix_mask", "train_language_model",
    ],
    "modern.pre_ln": ["DeepNorm", "PRE_LN", "PreNorm", "SandwichNorm"],
    "modern.rms_norm": ["QK_NORM", "RMSNorm", "RMS_NORM"],
    "modern.gated": ["GEGLU", "GELU", "GatedFeedForward", "SWIGLU", "matched_width"],
    "modern.rope": ["ROPE", "RoPE", "Scaling"],
    "modern.relative_bias": ["ALIBI", "ALiBi", "LearnedPositions", "T5Bias", "T5_BIAS"],
    "modern.long_context": [
        "DynamicNTK", "Llama3Scaling", "LinearScaling", "NTKScaling", "YaRN",
    ],
    "modern.grouped_query": ["cache_bytes", "grouped_queries", "mean_pooled"],
    "modern.window": ["WindowCache", "pattern", "sliding_window"],
    "modern.experts": [
        "Balanced", "MixtureOfExperts", "active_parameters", "mixture_of_experts",
        "record_routing",
    ],
    "modern.ablation": [],
    "modern.production": ["MODELS", "Published", "as_config"],
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
