# %% [markdown]
r"""
# A real corpus
"""

# %%
import gzip
import hashlib
import json
import os
import random
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transformer_annotated.book import machine
from transformer_annotated.paper.first_translation import Ids, Loss, train, translate
from transformer_annotated.paper.parts import from_json, patch, to_json
from transformer_annotated.paper.toy import Batch, Vocabulary, collate
from transformer_annotated.paper.transformer import PAPER_BASE, Config, Transformer

if TYPE_CHECKING:
    from spacy.language import Language

# %%
URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
SHA256 = {  # of the compressed files
    "train.de.gz": "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
    "train.en.gz": "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
    "val.de.gz": "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
    "val.en.gz": "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
    "test_2016_flickr.de.gz": "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
    "test_2016_flickr.en.gz": "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
}


def data_directory() -> Path:
    """Where corpora lie: `TRANSFORMER_ANNOTATED_DATA`, else a folder in the user's cache."""
    chosen = os.environ.get("TRANSFORMER_ANNOTATED_DATA")
    return Path(chosen) if chosen else Path.home() / ".cache" / "transformer_annotated"


def corpus_file(name: str) -> Path:
    """The file `multi30k/name`, downloaded first if it is not there; its SHA-256 is checked.

    A download goes to a temporary file beside its place and is renamed when it is complete and
    right, so a broken one never takes the place of a good one.

    Raises:
        ValueError: the file, on disk or downloaded, is not the one this book was written with.
        OSError: no network; the message says what to fetch and where to put it.
    """
    path = data_directory() / "multi30k" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as part:
            try:
                with urllib.request.urlopen(f"{URL}/{name}", timeout=60) as response:
                    part.write(response.read())
                part.flush()
                os.fsync(part.fileno())
                check_sha256(Path(part.name), SHA256[name])
                os.replace(part.name, path)
            except OSError as error:
                raise OSError(f"cannot download {URL}/{name}; put it at {path}") from error
            finally:
                Path(part.name).unlink(missing_ok=True)
    check_sha256(path, SHA256[name])
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raise ValueError unless the file's SHA-256 is `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has SHA-256 {found}, expected {expected}: delete it and retry")


# %%
def read_lines(path: Path) -> list[str]:
    """The lines of a gzipped UTF-8 text, split at \\n alone.

    `str.splitlines` would also split at U+0085 and U+2028, which occur inside sentences, and
    shift every later line against its translation.

    Raises ValueError with file, line and byte offset for a byte that is not UTF-8.
    """
    with gzip.open(path) as file:
        data = file.read()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}, byte {error.start}: not UTF-8") from error
    return text.removesuffix("\n").split("\n")


def multi30k(split: str) -> list[tuple[str, str]]:
    """The German and English sentences of `train`, `val` or `test_2016_flickr`, as they are.

    Two training lines whose German is the placeholder `@@` are left out.
    Raises ValueError for another split, and for sides of different length.
    """
    splits = sorted({name.split(".")[0] for name in SHA256})
    if split not in splits:
        raise ValueError(f"split must be one of {splits}, got {split!r}")
    german, english = (read_lines(corpus_file(f"{split}.{side}.gz")) for side in ("de", "en"))
    if len(german) != len(english):
        raise ValueError(f"{split} has {len(german)} German and {len(english)} English lines")
    return [(de, en) for de, en in zip(german, english, strict=True) if de != "@@"]


# %%
def tokenizer(language: str) -> Callable[[str], list[str]]:
    """spaCy's rule-based word tokenizer for `"de"` or `"en"`; no model is downloaded."""
    import spacy

    nlp: Language = spacy.blank(language)
    return lambda text: [token.text for token in nlp.tokenizer(text) if not token.is_space]


_GLUE_LEFT = {*".,!?;:)]}%", "n't", "'s", "'re", "'ve", "'m", "'ll", "'d", "\u2019s", "-", "/"}
_GLUE_RIGHT = {*"([{$#", "-", "/"}


def detokenize(tokens: Sequence[str]) -> str:
    """Words back to English text: punctuation joins its neighbour, quotes alternate."""
    text, glue, open_quote = "", True, False
    for token in tokens:
        closing = token == '"' and open_quote
        text += token if glue or closing or token in _GLUE_LEFT else " " + token
        glue = token in _GLUE_RIGHT or (token == '"' and not open_quote)
        open_quote ^= token == '"'
    return text


# %%
def bucketed(data: Sequence[Ids], tokens: int, *, seed: int) -> Iterator[Batch]:
    """Endless batches of similar lengths, each at most `tokens` source or target positions.

    Each pass over the data is shuffled, cut into pools, sorted within a pool and shuffled again,
    so that batches differ from pass to pass.

    Raises ValueError when a sentence alone exceeds `tokens`, or when there is no data.
    """
    sizes = [max(len(source), len(target)) + 1 for source, target in data]
    if not data or max(sizes) > tokens:
        raise ValueError(f"tokens={tokens} must fit the longest of {len(data)} sentences, "
                         f"{max(sizes, default=0)}")  # fmt: skip
    rng, pool = random.Random(seed), 100 * tokens // max(1, sum(sizes) // len(sizes))
    while True:
        order = rng.sample(range(len(data)), len(data))
        chunks: list[list[int]] = []
        for start in range(0, len(order), pool):
            longest = tokens + 1
            for i in sorted(order[start : start + pool], key=sizes.__getitem__, reverse=True):
                if longest * (len(chunks[-1]) + 1 if chunks else 1) > tokens:
                    chunks.append([])
                    longest = sizes[i]
                chunks[-1].append(i)
        rng.shuffle(chunks)
        yield from (collate([data[i] for i in chunk]) for chunk in chunks)


# %%
def label_smoothing(epsilon: float) -> Loss:
    """The paper's loss (section 5.4): cross-entropy with (1 - epsilon) one-hot + epsilon / V.

    Raises ValueError for an epsilon outside [0, 1).
    """
    if not 0 <= epsilon < 1:
        raise ValueError(f"epsilon must be in [0, 1), got {epsilon}")

    def loss(logits: Tensor, target: Tensor, padding: Tensor) -> Tensor:
        logits, target = logits[padding].float(), target[padding]  # (n, V), (n,)
        right = logits.gather(-1, target[:, None])[:, 0]
        expected = (1 - epsilon) * right + epsilon * logits.mean(dim=-1)
        return (logits.logsumexp(dim=-1) - expected).mean()

    return loss


def paper_rate(d_model: int, warm_up: int = 4000) -> Callable[[int], float]:
    """The paper's learning rate (section 5.3, equation 3) at optimiser step 1, 2, 3, ..."""
    return lambda step: d_model**-0.5 * min(step**-0.5, step * warm_up**-1.5)


# %%
def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> Any:
    """Corpus BLEU of detokenised text by sacreBLEU: `(score, signature)`.

    Raises ValueError for no sentences, or for different numbers of them.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(
            f"need one reference for each hypothesis, got {len(hypotheses)} hypotheses and "
            f"{len(references)} references"
        )
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(hypotheses), [list(references)])
    return score.score, str(metric.get_signature())


# %%
@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run: the model's size, the batches and the schedule."""

    d_model: int = 256
    n_layers: int = 3
    n_heads: int = 4
    d_ff: int = 512
    dropout: float = 0.2
    smoothing: float = 0.1
    tokens: int = 1600
    warm_up: int = 1000
    steps: int = 3800
    validate_every: int = 760
    precision: str = "float32"
    seed: int = 0

    def config(self, src_vocab_size: int, vocab_size: int) -> Config:
        """The paper's model in this size, with a vocabulary for each language."""
        return patch(
            PAPER_BASE,
            {
                "vocab_size": vocab_size,
                "src_vocab_size": src_vocab_size,
                "d_model": self.d_model,
                "n_layers": self.n_layers,
                "self_attention.n_heads": self.n_heads,
                "cross_attention.n_heads": self.n_heads,
                "ffn.d_ff": self.d_ff,
                "dropout": self.dropout,
            },
        )


SHORT = Recipe(d_model=64, n_layers=1, d_ff=128, warm_up=20, steps=30, validate_every=15)
FULL = Recipe(precision="bfloat16")
GPU = Recipe(
    d_model=512, n_layers=6, n_heads=8, d_ff=2048, dropout=0.3, tokens=8192, warm_up=2000,
    steps=6000, precision="bfloat16",
)  # fmt: skip


# %%
@dataclass
class Corpus:
    """Multi30k, tokenised and encoded; the vocabularies know the training split alone."""

    source: Vocabulary
    target: Vocabulary
    train: list[Ids]
    sides: dict[str, tuple[list[list[str]], list[str]]]  # split: German tokens, raw English

    @classmethod
    def load(cls, min_count: int = 2, limit: int | None = None) -> "Corpus":
        """Read, tokenise and encode the corpus; `limit` keeps the first pairs of each split."""
        german, english = tokenizer("de"), tokenizer("en")
        train = [(german(de), english(en)) for de, en in multi30k("train")[:limit]]
        source = Vocabulary.build((de for de, _ in train), min_count)
        target = Vocabulary.build((en for _, en in train), min_count)
        encoded = [(source.encode(de), target.encode(en)) for de, en in train]
        sides = {}
        for split in ("val", "test_2016_flickr"):
            raw = multi30k(split)[:limit]
            sides[split] = [german(de) for de, _ in raw], [en for _, en in raw]
        return cls(source, target, encoded, sides)


# %%
def evaluate(model: Transformer, corpus: Corpus, split: str) -> tuple[float, str, list[str]]:
    """Greedy translations of a split: BLEU, its signature, and the text."""
    source, references = corpus.sides[split]
    words = translate(model, corpus.target, source, source_vocabulary=corpus.source)
    text = [detokenize(tokens) for tokens in words]
    return *bleu(text, references), text


def run(recipe: Recipe, corpus: Corpus, *, device: str = "cpu") -> tuple[Transformer, dict[str, Any]]:
    """Train by `recipe`, evaluate on test_2016_flickr, and return the model and a report."""
    torch.manual_seed(recipe.seed)
    config = recipe.config(len(corpus.source), len(corpus.target))
    model = Transformer(config).to(device)
    validation: list[tuple[int, float]] = []

    def on_step(step: int, loss: float) -> None:
        if step % recipe.validate_every == 0:
            validation.append((step, evaluate(model, corpus, "val")[0]))
            print(f"step {step:5d}  loss {loss:.3f}  validation BLEU {validation[-1][1]:.2f}")

    data = bucketed(corpus.train, recipe.tokens, seed=recipe.seed)
    history = train(
        model,
        (batch.to(device) for batch in islice(data, recipe.steps)),
        learning_rate=paper_rate(recipe.d_model, recipe.warm_up),
        loss=label_smoothing(recipe.smoothing),
        autocast=None if recipe.precision == "float32" else getattr(torch, recipe.precision),
        on_step=on_step,
    )
    score, signature, text = evaluate(model, corpus, "test_2016_flickr")
    report = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": [len(corpus.source), len(corpus.target)],
        "loss": history.loss,
        "validation_bleu": validation,
        "test_bleu": score,
        "signature": signature,
        "seconds": history.seconds[-1],
        "target_tokens": history.tokens,
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "translations": text[:8],
    }
    return model, report


# %%
def save(path: Path, model: Transformer, corpus: Corpus) -> None:
    """Keep a trained model with what it takes to use it: config and vocabularies."""
    torch.save(
        {
            "config": to_json(model.config),
            "weights": model.state_dict(),
            "source": corpus.source.words,
            "target": corpus.target.words,
        },
        path,
    )


def load(path: Path) -> tuple[Transformer, Vocabulary, Vocabulary]:
    """Read what `save` wrote: the model in evaluation mode and both vocabularies."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    model = Transformer(from_json(state["config"]))
    model.load_state_dict(state["weights"])
    return model.eval(), Vocabulary(tuple(state["source"])), Vocabulary(tuple(state["target"]))


# %%
def main() -> None:
    """Train on the command line: `python -m transformer_annotated.paper.multi30k --scale full`."""
    import argparse

    parser = argparse.ArgumentParser(description="Train German to English on Multi30k.")
    parser.add_argument("--scale", choices=("short", "full", "gpu"), default="full")
    parser.add_argument("--precision", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, help="CPU threads to use")
    parser.add_argument("--results", type=Path, help="append the report to this JSON-lines file")
    parser.add_argument("--save", type=Path, help="write the trained model here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    recipe = {"short": SHORT, "full": FULL, "gpu": GPU}[options.scale]
    if options.precision:
        recipe = replace(recipe, precision=options.precision)
    corpus = Corpus.load(limit=200 if options.scale == "short" else None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, report = run(recipe, corpus, device=device)
    print(f"test BLEU {report['test_bleu']:.2f}  {report['signature']}  {report['seconds']:.0f} s")
    if options.save:
        save(options.save, model, corpus)
    if options.results:
        with options.results.open("a") as file:
            file.write(json.dumps({"run": f"multi30k-{options.scale}", **report}) + "\n")


# %% tags=["active-py"]
if __name__ == "__main__":
    main()
