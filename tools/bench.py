"""Measure the book against other libraries: python tools/bench.py [training] [--size small]

Training steps and decoding, at two sizes, one thread, on this machine. All variants of a table run
in one process, once in each round, in a random order; a number is the median over the rounds. The
clock is the processor time of this process, so that other programs disturb less. Every library
gets the same sizes, the same batch, the same optimiser, dropout at the paper's two places, and the
same allocator settings. A library that is not installed is named and skipped.

Each table becomes one line of book/results/bench.jsonl, which the chapter on speed shows.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from transformer_annotated.book import machine
from transformer_annotated.paper.embedding import Embedding, Head
from transformer_annotated.paper.first_translation import greedy
from transformer_annotated.paper.parts import patch, spec
from transformer_annotated.paper.toy import BOS, EOS, PAD, Batch
from transformer_annotated.paper.transformer import PAPER_BASE, Transformer
from transformer_annotated.training.beam import beam_search
from transformer_annotated.training.decoding import greedy_search, packed
from transformer_annotated.training.objective import CrossEntropy
from transformer_annotated.training.schedule import adam, set_rate
from transformer_annotated.training.speed import FAST, keep_memory, race

RESULTS = Path(__file__).resolve().parent.parent / "book" / "results" / "bench.jsonl"
V, T, DROPOUT, SMOOTHING = 8000, 32, 0.1, 0.1
LENGTH = 30  # source and target tokens of a decoded sentence
OURS, PART_I = "this book", "this book, Part I"
Run = Callable[[], Any]
Logits = Callable[[Tensor, Tensor, Tensor], Tensor]  # src, tgt, src_padding


@dataclass(frozen=True)
class Size:
    """D, H, F, layers of each stack, and sentence pairs of a training batch."""

    d_model: int
    n_heads: int
    d_ff: int
    n_layers: int
    pairs: int


SIZES = {"small": Size(256, 4, 1024, 3, 64), "base": Size(512, 8, 2048, 6, 16)}


# ------------------------------------------------------------------------------------ the models


def ours(size: Size, *patches: Mapping[str, Any], dropout: float = 0.0) -> Transformer:
    sizes = {
        "vocab_size": V, "d_model": size.d_model, "n_layers": size.n_layers, "dropout": dropout,
        "self_attention.n_heads": size.n_heads, "cross_attention.n_heads": size.n_heads,
        "ffn.d_ff": size.d_ff,
    }  # fmt: skip
    return Transformer(patch(PAPER_BASE, sizes, *patches))


class Stock(nn.Module):
    """`torch.nn.Transformer` with the embedding and the tied head that it lacks."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = Embedding(V, size.d_model, DROPOUT)
        self.body = nn.Transformer(
            size.d_model, size.n_heads, size.n_layers, size.n_layers, size.d_ff, DROPOUT,
            batch_first=True,
        )  # fmt: skip
        for module in self.body.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.dropout = 0.0
            if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
                module.dropout.p = 0.0  # the one inside the feed-forward network

    def forward(self, src: Tensor, tgt: Tensor, padding: Tensor) -> Tensor:
        places = torch.arange(tgt.shape[1])[None]
        later = nn.Transformer.generate_square_subsequent_mask(tgt.shape[1]).isinf()
        x = self.body(
            self.embedding(src, places[:, : src.shape[1]]), self.embedding(tgt, places),
            tgt_mask=later, src_key_padding_mask=~padding, memory_key_padding_mask=~padding,
            tgt_is_causal=True,
        )  # fmt: skip
        return x @ self.embedding.weight.T


def marian(size: Size) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.MarianConfig(
        vocab_size=V, d_model=size.d_model, encoder_layers=size.n_layers, scale_embedding=True,
        decoder_layers=size.n_layers, encoder_attention_heads=size.n_heads, dropout=DROPOUT,
        decoder_attention_heads=size.n_heads, encoder_ffn_dim=size.d_ff, attention_dropout=0.0,
        decoder_ffn_dim=size.d_ff, activation_function="relu", max_position_embeddings=128,
        activation_dropout=0.0, pad_token_id=V - 1, eos_token_id=EOS, decoder_start_token_id=V - 1,
        forced_eos_token_id=None,
    )  # fmt: skip
    return transformers.MarianMTModel(config)


def x_transformer(size: Size) -> Any:
    from x_transformers import XTransformer

    stack = {
        "num_tokens": V, "max_seq_len": 64, "depth": size.n_layers, "heads": size.n_heads,
        "attn_flash": True, "pre_norm": False, "emb_dropout": DROPOUT,
        "attn_sublayer_dropout": DROPOUT, "ff_sublayer_dropout": DROPOUT,
        "ff_mult": size.d_ff // size.d_model, "ff_custom_activation": nn.ReLU(),
    }  # fmt: skip
    sides = {f"{side}_{key}": value for side in ("enc", "dec") for key, value in stack.items()}
    model = XTransformer(dim=size.d_model, tie_token_emb=True, **sides)
    net = model.decoder.net
    net.to_logits = nn.Linear(size.d_model, V, bias=False)
    net.to_logits.weight = net.token_emb.emb.weight
    return model


def installed(*modules: str) -> bool:
    return all(importlib.util.find_spec(module) for module in modules)


# -------------------------------------------------------------------------------------- training


def training_runs(size: Size, bf16: bool) -> tuple[dict[str, Run], list[str], int]:
    """One step of each library, those that are not installed, and the operations of a step."""
    generator = torch.Generator().manual_seed(0)

    def ids() -> Tensor:
        return torch.randint(4, V - 1, (size.pairs, T), generator=generator)

    src, tgt_in, tgt_out = ids(), ids(), ids()
    lengths = torch.randint(T // 2, T + 1, (size.pairs, 1), generator=generator)
    lengths[0] = T
    padding = torch.arange(T)[None] < lengths
    batch = Batch(src, tgt_in, tgt_out, padding, torch.ones_like(padding))

    def step(model: nn.Module, loss: Callable[[], Tensor]) -> Run:
        optimizer = adam(model.parameters())
        set_rate(optimizer, 1e-4)

        def run() -> None:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss()
            value.backward()
            optimizer.step()

        return run

    def usual(model: nn.Module, logits: Logits) -> Run:
        def loss() -> Tensor:
            scores = logits(src, tgt_in, padding).flatten(0, 1).float()
            return F.cross_entropy(scores, tgt_out.flatten(), label_smoothing=SMOOTHING)

        return step(model.train(), loss)

    torch.manual_seed(0)
    plain, fast = ours(size, dropout=DROPOUT), ours(size, FAST, dropout=DROPOUT).train()
    objective = CrossEntropy(SMOOTHING)

    def our_loss() -> Tensor:
        found = objective(fast, batch)
        return found.loss / found.tokens

    stock = Stock(size)
    runs = {
        OURS: step(fast, our_loss),
        PART_I: usual(plain, lambda s, t, p: plain(s, t, src_padding=p)),
        "torch.nn.Transformer": usual(stock, stock),
    }
    counter = FlopCounterMode(display=False)
    with counter:
        runs[PART_I]()
    missing = []
    if installed("transformers"):
        hf = marian(size)
        runs["Hugging Face Marian"] = usual(
            hf,
            lambda s, t, p: (
                hf(input_ids=s, attention_mask=p, decoder_input_ids=t, use_cache=False).logits
            ),
        )
    else:
        missing.append("Hugging Face Marian")
    if installed("x_transformers"):
        xt = x_transformer(size)

        def xt_logits(s: Tensor, t: Tensor, p: Tensor) -> Tensor:
            memory = xt.encoder(s, mask=p, return_embeddings=True)
            return xt.decoder.net(t, context=memory, context_mask=p)

        runs["x-transformers"] = usual(xt, xt_logits)
    else:
        missing.append("x-transformers")
    return runs, missing, counter.get_total_flops()


def peak_run(bf16: bool) -> Run:
    a, b = (torch.randn(2048, 2048).to(torch.bfloat16 if bf16 else torch.float32) for _ in "ab")
    return lambda: a @ b


def training(name: str, bf16: bool, rounds: int) -> dict[str, Any]:
    size = SIZES[name]
    runs, missing, flops = training_runs(size, bf16)
    seconds = race({**runs, "matmul": peak_run(bf16)}, rounds)
    peak = 2 * 2048**3 / statistics.median(seconds.pop("matmul"))
    table = summary(seconds, size.pairs * T)
    for row in table:
        row["share_of_peak"] = round(row["median"] / (size.pairs * T) * flops / peak, 3)
    about: dict[str, Any] = {
        "kind": "training",
        "size": name,
        "precision": "bf16" if bf16 else "fp32",
    }
    about |= {"unit": "target tokens/s", "flops": flops, "peak": round(peak / 1e9, 1)}
    return {**about, "rows": table, "missing": missing}


# -------------------------------------------------------------------------------------- decoding


def without_end(model: Transformer) -> Transformer:
    """Never the end sign: every sentence gets its full length, in every library."""
    with torch.no_grad():
        model.head.bias[EOS] = -1e9  # type: ignore[operator]
    return model.eval()


def our_decoders(size: Size, src: Tensor, beam: int, stack: ExitStack) -> dict[str, Run]:
    """Weights are packed once, as `translate_texts` does for all its batches."""

    def search(model: Transformer) -> Run:
        if beam == 1:
            return lambda: greedy_search(model, src[:, 1:], extra=1)
        return lambda: beam_search(model, src[:, 1:], beam=beam, extra=1).ids

    BIAS = {"head": spec(Head, bias=True)}
    model = without_end(ours(size, FAST, BIAS))
    half = without_end(ours(size, FAST, BIAS)).to(torch.bfloat16)
    stack.enter_context(packed(model))
    runs = {OURS: search(model), f"{OURS}, bf16": search(half)}
    if beam == 1:
        written_out = without_end(ours(size, BIAS))
        runs[PART_I] = lambda: greedy(written_out, src[:, 1:], extra=1)
    return runs


def converted(model: Any, folder: str, quantization: str) -> Any:
    """The Marian model, converted for CTranslate2; the words of its vocabulary do not matter."""
    import ctranslate2
    from ctranslate2.converters.transformers import MarianMTLoader

    loader = MarianMTLoader()
    words = [f"w{i}" for i in range(V - 1)]
    words[EOS], words[1] = "</s>", "<unk>"
    loader.get_vocabulary = lambda *_: list(words)
    signs = SimpleNamespace(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    spec = loader(model, signs)
    spec.validate()
    spec.optimize(quantization=quantization)
    spec.save(folder)
    return ctranslate2.Translator(folder, device="cpu", compute_type=quantization, intra_threads=1)


def decoding_runs(
    size: Size, n: int, beam: int, folder: Path, stack: ExitStack
) -> tuple[dict[str, Run], list[str]]:
    """`n` sentences translated by each library, and those libraries that are not installed."""
    src = torch.randint(4, V - 1, (n, LENGTH), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    runs, missing = our_decoders(size, src, beam, stack), []
    if installed("transformers"):
        hf = marian(size).eval()
        options = {
            "max_new_tokens": LENGTH, "min_new_tokens": LENGTH, "num_beams": beam,
            "do_sample": False, "attention_mask": torch.ones_like(src),
        }  # fmt: skip
        runs["Hugging Face Marian"] = lambda: hf.generate(src, **options)
        if installed("ctranslate2"):
            tokens = [[f"w{i}" for i in row] for row in src.tolist()]
            limits = {"min_decoding_length": LENGTH, "max_decoding_length": LENGTH}
            for quantization in ("float32", "int8"):
                (folder / quantization).mkdir()
                fast = converted(hf, str(folder / quantization), quantization)
                runs[f"CTranslate2 {quantization}"] = partial(
                    fast.translate_batch, tokens, beam_size=beam, **limits
                )
        else:
            missing.append("CTranslate2")
    else:
        missing += ["Hugging Face Marian", "CTranslate2 (converted from it)"]
    if not installed("x_transformers"):
        missing.append("x-transformers")
    elif beam == 1:
        xt = x_transformer(size).eval()
        start = torch.full((n, 1), BOS)
        runs["x-transformers"] = lambda: xt.generate(
            src, start, LENGTH, cache_kv=True, temperature=0.0
        )
    return runs, missing


def decoding(name: str, n: int, beam: int, rounds: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        runs, missing = decoding_runs(SIZES[name], n, beam, Path(folder), stack)
        for label, run in runs.items():
            check_length(label, run())
        table = summary(race(runs, rounds), n)
    about = {"kind": "decoding", "size": name, "sentences": n, "beam": beam}
    return {**about, "unit": "sentences/s", "rows": table, "missing": missing}


def check_length(label: str, output: Any) -> None:
    """Raise RuntimeError unless every sentence got all its tokens: no library may do less work."""
    if isinstance(output, Tensor):
        wanted = (LENGTH, LENGTH + 1)  # some return the first sign too
        right = output.shape[1] in wanted and bool((output[:, 1:] != PAD).all())
    else:
        right = all(len(result.hypotheses[0]) == LENGTH for result in output)
    if not right:
        raise RuntimeError(f"{label} did not produce {LENGTH} tokens for every sentence")


# --------------------------------------------------------------------------------------- results


def summary(seconds: Mapping[str, Sequence[float]], amount: int) -> list[dict[str, Any]]:
    """Rows, fastest first: speed, its spread, and its ratio to this book's, round by round."""
    rows: list[dict[str, Any]] = []
    for name, values in seconds.items():
        ratios = [a / b for a, b in zip(seconds[OURS], values, strict=True)]
        numbers = {
            "median": amount / statistics.median(values),
            "low": amount / max(values),
            "high": amount / min(values),
            "ratio": statistics.median(ratios),
            "ratio_low": min(ratios),
            "ratio_high": max(ratios),
        }
        rows.append({"name": name, **{key: round(value, 4) for key, value in numbers.items()}})
    return sorted(rows, key=lambda row: -row["median"])


def shown(result: Mapping[str, Any]) -> str:
    """A result as lines of text."""
    about = ", ".join(
        f"{key} {result[key]}"
        for key in ("size", "precision", "sentences", "beam", "peak")
        if key in result
    )
    lines = [f"{result['kind']}: {about} ({result['unit']}; ratio to {OURS})"]
    for row in result["rows"]:
        share = f"{row['share_of_peak']:7.0%} of peak" if "share_of_peak" in row else ""
        lines.append(
            f"  {row['name']:24s}{row['median']:9.1f} ({row['low']:.1f} to {row['high']:.1f})"
            f"{row['ratio']:7.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){share}"
        )
    lines += [f"  {name}: not installed, skipped" for name in result["missing"]]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "x-transformers", "ctranslate2")
    return {name: version(name) for name in names if installed(name.replace("-", "_"))}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the book against other libraries.")
    parser.add_argument("kinds", nargs="*", metavar="training | decoding")
    parser.add_argument("--size", choices=list(SIZES), action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    kinds = options.kinds or ["training", "decoding"]
    if unknown := set(kinds) - {"training", "decoding"}:
        parser.error(f"choose training or decoding, got {', '.join(sorted(unknown))}")
    work: list[Callable[[], dict[str, Any]]] = []
    for size in options.size or list(SIZES):
        if "training" in kinds:
            work += [partial(training, size, bf16, options.rounds) for bf16 in (False, True)]
        if "decoding" in kinds:
            work += [
                partial(decoding, size, n, beam, options.rounds) for beam in (1, 4) for n in (1, 32)
            ]
    for measure in work:
        result = measure() | {
            "rounds": options.rounds, "clock": "processor time", "machine": machine(),
            "load": round(os.getloadavg()[0], 1), "versions": versions(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        }  # fmt: skip
        print(shown(result), flush=True)
        if not options.no_save:
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
