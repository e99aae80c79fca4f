# %% [markdown]
r"""
# Reproducing the paper

Everything of this part in one recipe: corpus, pieces, model, schedule, loop, search, score. Run on Multi30k, and written out for
WMT 2014 with a prediction of what it would cost.
"""

# %% [markdown]
# The paper's section 6 is one table: systems, BLEU, cost. To stand in it, a model needs everything of the last eleven chapters at once, and each piece has settings. A **recipe** writes all of them down. Then a run is one function of one value, and can be repeated, interrupted, and compared.

# %% mystnb={"figure": {"caption": "Chapter 23 of Part II: all of it together.", "name": "fig-map-reproduction"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The twelfth, The paper again, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(23);

# %%
import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from transformer_annotated.book import commit, machine
from transformer_annotated.paper.parts import check_rate, check_sizes, patch
from transformer_annotated.paper.toy import collate
from transformer_annotated.paper.transformer import PAPER_BASE, Config, Transformer
from transformer_annotated.training.beam import beam_search
from transformer_annotated.training.bleu import evaluate_translations
from transformer_annotated.training.checkpoints import (
    average_checkpoints,
    list_checkpoints,
    load_checkpoint,
)
from transformer_annotated.training.corpora import open_corpus
from transformer_annotated.training.decoding import Search, greedy_search, translate_ids
from transformer_annotated.training.objective import CrossEntropy, Objective, RDrop
from transformer_annotated.training.schedule import Schedule, adam, cosine, inverse_square_root
from transformer_annotated.training.speed import FAST
from transformer_annotated.training.tokens import (
    EncodedCorpus,
    Tokenizer,
    encode_corpus,
    load_tokenizer,
    train_bpe,
    train_words,
)
from transformer_annotated.training.trainer import (
    LossOf,
    TrainConfig,
    Trainer,
    default_device,
    gradient,
    read_metrics,
    update,
    validation_loss,
)

# %% [markdown]
# ## A recipe
#
# Two dataclasses. `ModelOptions` is the size of the model; what it does not name is as in the paper. `Recipe` adds the corpus, the pieces, the schedule and the objective, and holds the `TrainConfig` of Chapter 19.

# %%
@dataclass(frozen=True)
class ModelOptions:
    """The size of the model.

    Attributes:
        d_model: width D.
        n_layers: layers N of each stack.
        n_heads: heads H of each attention.
        d_ff: width F of the feed-forward layer.
        dropout: probability for the embeddings' sums and the sub-layers' outputs.
        share: one table for source, target and output, as in the paper; else three.
    """

    d_model: int = 512
    n_layers: int = 6
    n_heads: int = 8
    d_ff: int = 2048
    dropout: float = 0.1
    share: bool = True


@dataclass(frozen=True)
class Recipe:
    """All that decides a run, from the corpus to the last step.

    Attributes:
        data: the corpus: toy, multi30k, tatoeba or wmt14.
        source: the language that is translated.
        target: the language that it is translated to.
        vocab_size: pieces shared by both languages; `toy` has words instead, and fewer.
        model: its size.
        train: batches, steps, precision, seed.
        schedule: "inverse_square_root", the paper's; or "cosine", which ends at zero.
        warm_up: steps during which the learning rate rises.
        peak: the highest learning rate; None for the paper's, which follows from the width.
        smoothing: label smoothing.
        r_drop: weight of R-Drop's second term; 0 for none.
        max_length: training pairs with more pieces on a side are left out; None to keep all.
    """

    data: str = "multi30k"
    source: str = "en"
    target: str = "de"
    vocab_size: int = 6000
    model: ModelOptions = field(default_factory=ModelOptions)
    train: TrainConfig = field(default_factory=TrainConfig)
    schedule: Literal["inverse_square_root", "cosine"] = "inverse_square_root"
    warm_up: int = 4000
    peak: float | None = None
    smoothing: float = 0.1
    r_drop: float = 0.0
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_sizes(vocab_size=self.vocab_size, warm_up=self.warm_up)
        check_rate("smoothing", self.smoothing)
        if self.schedule not in ("inverse_square_root", "cosine"):
            raise ValueError(
                f"schedule must be inverse_square_root or cosine, got {self.schedule!r}"
            )
        if self.peak is not None and not self.peak > 0:
            raise ValueError(f"peak must be above 0, got {self.peak}")
        if not self.r_drop >= 0:
            raise ValueError(f"r_drop must be at least 0, got {self.r_drop}")
        check_sizes(max_length=self.max_length)
        if self.max_length is not None and self.max_length >= self.train.max_tokens:
            raise ValueError(
                f"max_length must be below max_tokens={self.train.max_tokens}, "
                f"got {self.max_length}"
            )
        self.rate(), self.objective(), self.config(self.vocab_size)  # what is wrong is wrong now

    def config(self, vocab_size: int) -> Config:
        """The paper's model in this size, with the fast parts of Chapter 17."""
        m = self.model
        config = patch(
            PAPER_BASE,
            {
                "vocab_size": vocab_size,
                "d_model": m.d_model,
                "n_layers": m.n_layers,
                "self_attention.n_heads": m.n_heads,
                "cross_attention.n_heads": m.n_heads,
                "ffn.d_ff": m.d_ff,
                "dropout": m.dropout,
            },
            FAST,
        )
        apart = {"src_vocab_size": vocab_size, "head.tied": False}
        return config if m.share else patch(config, apart)

    def rate(self) -> Schedule:
        """The learning rate of each step."""
        paper = inverse_square_root(self.model.d_model, self.warm_up)
        peak = paper(self.warm_up) if self.peak is None else self.peak
        if self.schedule == "cosine":
            return cosine(peak, self.warm_up, self.train.steps)
        factor = peak / paper(self.warm_up)
        return inverse_square_root(self.model.d_model, self.warm_up, factor)

    def objective(self) -> Objective:
        """What is minimised."""
        if self.r_drop:
            return RDrop(alpha=self.r_drop, smoothing=self.smoothing)
        return CrossEntropy(self.smoothing)

# %% [markdown]
# The recipes of this book. `TOY` is done in about a minute. `SMALL` is for a processor, `PAPER` is the paper's base model on a corpus a hundred times too small for it, and `FINAL` is what we would try first on a GPU: a smaller model,
# more dropout, and R-Drop.

# %%
TOY = Recipe(
    data="toy", source="de", target="en", model=ModelOptions(128, 2, 4, 512, dropout=0.0),
    train=TrainConfig(max_tokens=1024, steps=600, save_every=300, validate_every=300),
    schedule="cosine", warm_up=100, peak=2e-3,
)  # fmt: skip
SMALL = Recipe(
    model=ModelOptions(192, 3, 4, 384, dropout=0.2),
    train=TrainConfig(
        max_tokens=1600, steps=7500, save_every=250, validate_every=500, keep=5,
        precision="bfloat16",
    ),
    schedule="cosine", warm_up=600, peak=2.5e-3,
)  # fmt: skip
PAPER = Recipe(
    vocab_size=8000,
    train=TrainConfig(
        max_tokens=8192, steps=6000, save_every=250, keep=5, precision="bfloat16", clip_norm=None
    ),
)
FINAL = Recipe(
    model=ModelOptions(256, 4, 4, 1024, dropout=0.3),
    train=TrainConfig(max_tokens=8192, steps=8000, save_every=200, keep=5, precision="bfloat16"),
    schedule="cosine", warm_up=1000, peak=3e-3, r_drop=5.0,
)  # fmt: skip

# %% [markdown]
# And the paper's own runs, on WMT 2014. The batch is 25,000 tokens a side, in eight micro-batches, so that 1, 2, 4 or 8 GPUs can share it; the paper cut English and German into 37,000 shared pieces, and English and French into 32,000. The base model took 100,000 steps, the big one 300,000. Checkpoints lay ten minutes apart: at the paper's 0.4 and 1.0 seconds a
# step that is every 1,500 and every 600 steps. The last 5 were averaged for the base model, the last 20 for the big one.

# %%
WMT14_BASE = Recipe(
    data="wmt14", vocab_size=37_000, max_length=256,
    train=TrainConfig(
        max_tokens=3125, accumulate=8, steps=100_000, save_every=1500, validate_every=1500, keep=5,
        precision="bfloat16", clip_norm=None,
    ),
)  # fmt: skip
WMT14_BIG = replace(
    WMT14_BASE,
    model=ModelOptions(1024, 6, 16, 4096, dropout=0.3),
    train=replace(WMT14_BASE.train, steps=300_000, save_every=600, keep=20),
)
RUNS = {
    "toy": TOY,
    "small-en-de": SMALL,
    "small-de-en": replace(SMALL, source="de", target="en"),
    **{
        f"paper-en-de-seed{n}": replace(PAPER, train=replace(PAPER.train, seed=n)) for n in range(3)
    },
    **{
        f"final-en-de-seed{n}": replace(FINAL, train=replace(FINAL.train, seed=n)) for n in range(3)
    },
    "final-de-en": replace(FINAL, source="de", target="en"),
    "final-en-fr": replace(FINAL, source="en", target="fr"),
    "tatoeba-de-en": replace(FINAL, data="tatoeba", source="de", target="en", vocab_size=8000),
    "wmt14-en-de-base": WMT14_BASE,
    "wmt14-en-de-big": WMT14_BIG,
    "wmt14-en-fr-base": replace(WMT14_BASE, target="fr", vocab_size=32_000),
    "wmt14-en-fr-big": replace(
        WMT14_BIG, target="fr", vocab_size=32_000, model=replace(WMT14_BIG.model, dropout=0.1)
    ),
}
_BRIEF = replace(SMALL, warm_up=300, train=replace(SMALL.train, steps=1000))
RUNS |= {  # one change at a time, in fewer steps
    "brief": _BRIEF,
    "brief-no-sharing": replace(_BRIEF, model=replace(_BRIEF.model, share=False)),
    "brief-r-drop": replace(_BRIEF, r_drop=5.0),
}

# %% tags=["active-ipynb"]
# for name, recipe in RUNS.items():
#     if "seed" not in name or name.endswith("seed0"):
#         with torch.device("meta"):  # count without computing
#             model = Transformer(recipe.config(recipe.vocab_size))
#         total = sum(p.numel() for p in model.parameters())
#         print(f"{name:20s}{total:14,} parameters{recipe.train.steps:10,} steps")

# %% [markdown]
# The parameters are counted for the full size of the vocabulary; the small language has fewer words than that. The two WMT models have the sizes that Chapter 8 counted, with a vocabulary of 37,000.
#
# ## From a recipe to a trainer
#
# `prepare` makes the corpus ready once and keeps it in one file. `make_trainer` draws the weights.

# %%
def prepare(recipe: Recipe, cache: Path | None = None) -> EncodedCorpus:
    """The corpus of a recipe as ids.

    `cache` names a file. If it holds this corpus, nothing is read, cut or encoded: neither spaCy
    nor tokenizers nor the corpus itself is needed. Otherwise it is written.

    Raises:
        ValueError: the file holds another corpus, another direction or more pieces.
    """
    if cache is not None and cache.exists():
        data = EncodedCorpus.load(cache)
        wanted = (recipe.data, recipe.source, recipe.target, recipe.max_length)
        found = (data.name, data.source, data.target, data.max_length)
        if wanted != found:
            raise ValueError(f"{cache} holds {found}, not {wanted}")
        size = load_tokenizer(data.tokenizer_json).vocab_size
        if size > recipe.vocab_size:  # fewer may be all that the text had
            raise ValueError(f"{cache} holds {size} pieces, more than {recipe.vocab_size}")
        return data
    corpus = open_corpus(recipe.data, recipe.source, recipe.target)
    texts = (side for pair in corpus.stream("train") for side in pair)
    if recipe.data == "toy":
        tokenizer: Tokenizer = train_words(texts)
    else:
        tokenizer = train_bpe(texts, recipe.vocab_size)
    return encode_corpus(corpus, tokenizer, cache, max_length=recipe.max_length)


def make_trainer(
    recipe: Recipe, data: EncodedCorpus, folder: Path, *, tensorboard: bool = False
) -> Trainer:
    """The model and the trainer of a recipe, with fresh weights drawn from its seed."""
    torch.manual_seed(recipe.train.seed)
    model = Transformer(recipe.config(load_tokenizer(data.tokenizer_json).vocab_size))
    rest = {name: value for name, value in asdict(recipe).items() if name not in ("train", "model")}
    if recipe.schedule == "cosine":
        rest["steps"] = recipe.train.steps  # the rate depends on where the run ends
    validation = data.splits["val"]
    return Trainer(
        model, data.splits["train"], recipe.train, folder,
        schedule=recipe.rate(), objective=recipe.objective(),
        evaluate=lambda m: {"validation_nll": validation_loss(m, validation)},
        tokenizer_json=data.tokenizer_json, identity={"recipe": rest}, tensorboard=tensorboard,
    )  # fmt: skip

# %% [markdown]
# ## From a trainer to a score
#
# A split is translated from its stored ids, scored as text against the raw references, on validation and on test. Whatever is chosen, a number of checkpoints or a search, is chosen on validation.

# %%
def score(
    model: Transformer, data: EncodedCorpus, split: str, search: Search = greedy_search
) -> tuple[dict[str, Any], list[str]]:
    """BLEU and its company on a split, with the seconds it took; and the translations."""
    began = time.perf_counter()
    sources = [source for source, _ in data.splits[split]]
    tokenizer = load_tokenizer(data.tokenizer_json)
    texts = translate_ids(model, tokenizer, sources, search=search)
    seconds = time.perf_counter() - began
    scores = evaluate_translations(texts, data.splits[split].references)
    return {"split": split, **asdict(scores), "seconds": round(seconds, 1)}, texts


def score_rows(
    folder: Path, data: EncodedCorpus, device: str = "cpu"
) -> tuple[list[Any], list[str]]:
    """The rows greedy, beam, and beam with averaged weights, on validation and test.

    The weights are those of the last checkpoint in `folder`, and the mean of all that it keeps.
    Also returns the last row's first test translations.
    """
    paths = list_checkpoints(folder)
    last = load_checkpoint(paths[-1]).build().to(device)
    mean = load_checkpoint(paths[-1]).build()
    mean.load_state_dict(average_checkpoints(paths))
    plans: list[tuple[str, Transformer, Search]] = [
        ("greedy", last, greedy_search),
        ("beam 4", last, beam_search),
        (f"beam 4, mean of {len(paths)} checkpoints", mean.to(device), beam_search),
    ]
    rows: list[Any] = []
    texts: list[str] = []
    for name, model, search in plans:
        for split in ("val", "test"):
            row, texts = score(model, data, split, search)
            rows.append({"row": name, **row})
    return rows, texts[:10]

# %% [markdown]
# ## A run that can be stopped
#
# `run` does one run, or goes on with it. A run that is finished has a line in the results file and is not run again. So a list of runs can be worked off in slices of a few minutes, on a machine that is lent by the minute: call it again until it says that it is done.

# %%
def run(
    name: str, recipe: Recipe, work: Path, results: Path, *, minutes: float | None = None
) -> bool:
    """Train a recipe, or go on with it; when it is done, score it and append a line to `results`.

    Args:
        name: the run's name; the work lies in `work/name`.
        minutes: stop (and save) after so long; call again to go on.

    Returns whether the run is finished. A run whose line is in `results` is not run again.
    """
    if name in {line["run"] for line in read_results(results)}:
        return True
    about = (recipe.data, recipe.source, recipe.target, recipe.vocab_size, recipe.max_length)
    cached = "-".join(str(part) for part in about if part is not None) + ".safetensors"
    data = prepare(recipe, work / cached)
    limited = replace(recipe, train=replace(recipe.train, minutes=minutes))
    trainer = make_trainer(limited, data, work / name)
    trainer.resume()
    trainer.train()
    if trainer.stopped_by is not None:
        raise KeyboardInterrupt(f"stopped by signal {trainer.stopped_by}; saved")
    if trainer.step < recipe.train.steps:
        return False
    if trainer.rank:
        return True  # the first process scores
    rows, translations = score_rows(work / name, data, str(trainer.device))
    line = {"run": name, "recipe": asdict(recipe), **summary(trainer), "rows": rows,
            "translations": translations, "machine": machine(), "commit": commit()}  # fmt: skip
    lines = [*read_results(results), line]
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in lines)
    results.parent.mkdir(parents=True, exist_ok=True)
    part = results.with_suffix(".partial")
    part.write_text(text, encoding="utf-8")
    part.replace(results)
    return True


def read_results(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; none if it is not there. Same rules as for metrics."""
    return read_metrics(path)


def summary(trainer: Trainer, points: int = 100) -> dict[str, Any]:
    """What the metrics of a finished run say: time, tokens, and its curves at `points` places."""
    metrics = trainer.metrics()
    steps = [row for row in metrics if "loss" in row]
    width = max(1, len(steps) // points)
    chunks = [steps[i : i + width] for i in range(0, len(steps) - width + 1, width)]
    mean = [sum(row["loss"] for row in chunk) / width for chunk in chunks]
    return {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "vocab_size": trainer.model.config.vocab_size,
        "steps": trainer.step,
        "target_tokens": trainer.tokens,
        "seconds": round(sum(row["tokens"] / row["tokens_s"] for row in steps), 1),
        "loss": [[chunk[-1]["step"], round(m, 4)] for chunk, m in zip(chunks, mean, strict=True)],
        "validation": [
            [row["step"], round(row["validation_nll"], 4)]
            for row in metrics
            if "validation_nll" in row
        ],
    }

# %% [markdown]
# With several processes all of them train, and the first one scores and writes.

# %%
def main(argv: list[str] | None = None) -> int:
    """Work off runs by name; exit status 3 if there is more to do, so that a script can repeat."""
    import argparse

    parser = argparse.ArgumentParser(description="Run recipes, or go on with them.")
    parser.add_argument("names", nargs="+", choices=list(RUNS), metavar="RUN", help=", ".join(RUNS))
    parser.add_argument("--work", type=Path, default=Path("runs"), help="checkpoints and caches")
    parser.add_argument("--results", type=Path, default=Path("runs/reproduction.jsonl"))
    parser.add_argument("--minutes", type=float, help="stop after so long, all runs together")
    options = parser.parse_args(argv)
    end = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for name in options.names:
        left = None if end is None else (end - time.monotonic()) / 60
        if left is not None and left <= 0:
            return 3
        if not run(name, RUNS[name], options.work, options.results, minutes=left):
            return 3
    return 0

# %% tags=["active-py"]
if __name__ == "__main__":
    raise SystemExit(main())

# %% [markdown]
# On the command line, from the folder of this book:
#
# ```
# python -m transformer_annotated.training.reproduction small-en-de small-de-en --minutes 9
# ```
#
# Here is the whole way at a size that fits a page: a few steps, a stop, a second call that goes on, a line of results.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import tempfile
#
# shortest = replace(
#     TOY,
#     model=ModelOptions(32, 1, 2, 64, dropout=0.0),
#     train=replace(TOY.train, steps=8, save_every=4, validate_every=4),
#     warm_up=2,
# )
# with tempfile.TemporaryDirectory() as name:
#     work, lines = Path(name) / "runs", Path(name) / "results.jsonl"
#     calls = 1
#     while not run("example", shortest, work, lines, minutes=0.02):
#         calls += 1
#     assert run("example", shortest, work, lines)  # finished already: nothing happens
#     (line,) = read_results(lines)
# print(f"{calls} call(s), {line['steps']} steps, validation {line['validation']}")
# for row in line["rows"]:
#     print(f"{row['row']:32s}{row['split']:6s}BLEU {row['bleu']:.2f}")

# %% [markdown]
# Eight steps teach nothing, and the score says so. What follows are the real runs.
#
# ## Multi30k on a processor
#
# Two runs of `SMALL`, one in each direction. Everything below is read from the lines that `run` wrote.

# %% tags=["active-ipynb"]
# from transformer_annotated.book import results
#
# stored = {line["run"]: line for line in results("reproduction")}
# small = [stored[name] for name in ("small-en-de", "small-de-en")]
# for line in small:
#     print(line["run"], "on", line["machine"])
#     print(
#         f"    {line['parameters']:,} parameters, {line['vocab_size']:,} pieces, {line['steps']:,} steps, "
#         f"{line['target_tokens'] / 1e6:.1f} million target pieces in {line['seconds'] / 60:.0f} minutes"
#     )

# %% tags=["active-ipynb"]
# print(
#     f"{'':14s}{'':32s}{'validation':>11s}{'test':>7s}  {'95 % interval':15s}{'lower-cased':>12s}{'chrF':>7s}"
# )
# for line in small:
#     for name in dict.fromkeys(row["row"] for row in line["rows"]):
#         val, test = (
#             next(r for r in line["rows"] if (r["row"], r["split"]) == (name, split))
#             for split in ("val", "test")
#         )
#         interval = f"{test['bleu_low']:.1f} to {test['bleu_high']:.1f}"
#         print(
#             f"{line['run']:14s}{name:32s}{val['bleu']:11.2f}{test['bleu']:7.2f}  {interval:15s}"
#             f"{test['bleu_lowercase']:12.2f}{test['chrf']:7.2f}"
#         )
# print(small[0]["rows"][-1]["bleu_signature"])
# print(small[0]["rows"][-1]["bleu_lowercase_signature"])

# %% mystnb={"figure": {"caption": "Training loss and validation of the two runs of SMALL: validation falls fast, then slowly, to the end of the schedule.", "name": "fig-reproduction-curves"}, "image": {"alt": "Two panels over the steps. Left, the smoothed training loss of both directions, falling. Right, the validation loss in nats a piece of both directions, falling and flattening towards the end."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.8))
# for line in small:
#     label = line["run"].removeprefix("small-").replace("-", " to ")
#     left.plot(*zip(*line["loss"], strict=True), label=label)
#     right.plot(*zip(*line["validation"], strict=True), "o-", markersize=3, label=label)
# left.set(xlabel="step", ylabel="smoothed training loss", ylim=(1, None))
# right.set(xlabel="step", ylabel="validation, nats a piece", ylim=(1, None))
# left.legend();

# %% [markdown]
# In {numref}`fig-reproduction-curves` both directions look alike. A piece of English is easier to predict than a piece of German, so the curve of German to English lies lower; losses over different pieces cannot be compared further than that.
#
# Read the rows of the table from top to bottom: greedy search, then beam search on the same weights, then the same search on the mean of the last checkpoints. The interval says how far the score of another thousand sentences of the same kind could lie (Chapter 22). Rows whose intervals overlap are
# not ordered by this test set alone. The schedule ends at a rate of zero, so the last checkpoints are nearly the same point, and their mean cannot differ much from them. In the paper the rate was still high at the end, and the mean had something to do.
#
# The lower-cased column is there because the literature on this corpus reports lower-cased, tokenised BLEU. The best text-only figure that we found for English to German with a model of this kind is 41.02, for 2.6 million parameters {cite:p}`wu2021good`. It was computed with another tokenizer, so compare it with that column and not with the first ones. The runs here are below it. They are short, one seed each, and nothing was tuned but the width, on a few hundred steps.
#
# Numbers hide a lot. The first test sentences, both ways:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for line in small:
#     corpus = open_corpus("multi30k", line["recipe"]["source"], line["recipe"]["target"])
#     if corpus.missing("test"):
#         print("Multi30k is not at hand")
#         break
#     print(line["run"])
#     for (source, reference), ours in list(
#         zip(corpus.pairs("test"), line["translations"], strict=False)
#     )[:4]:
#         print("   ", source, "\n       model     ", ours, "\n       reference ", reference)

# %% [markdown]
# ## One change at a time
#
# A row of the kind that papers have, in 1,000 steps, so that it takes less time than the runs above: three tables instead of one shared table. `RUNS` has a third, `brief-r-drop`; it has not been run to its end yet, and appears here when it has.

# %% tags=["active-ipynb"]
# brief = [stored[name] for name in ("brief", "brief-no-sharing", "brief-r-drop") if name in stored]
# print(
#     f"{'':18s}{'parameters':>12s}{'validation':>12s}{'test':>7s}{'test, mean of all':>19s}{'minutes':>9s}"
# )
# for line in brief:
#     found = {(row["row"].split(",")[-1], row["split"]): row["bleu"] for row in line["rows"]}
#     mean = next(score for (row, split), score in found.items() if "mean" in row and split == "test")
#     print(
#         f"{line['run']:18s}{line['parameters']:12,}{found['beam 4', 'val']:12.2f}{found['beam 4', 'test']:7.2f}"
#         f"{mean:19.2f}{line['seconds'] / 60:9.0f}"
#     )

# %% [markdown]
# All with beam 4. The column of means shows when *not* to average: in so short a run the older checkpoints are much worse models, and their mean with the last one is worse than the last one alone.
#
# One seed each, and short runs. A difference of less than a point between two rows can be the seed. What sharing does in a long run, these short ones cannot say.
#
# ## What a GPU has not yet measured
#
# No accelerator has run this chapter so far. `RUNS` holds what is to be run there: the paper's recipe and ours with three seeds each, the other direction, French, and Tatoeba, the larger corpus. The command is the same, and `--minutes` cuts it into slices:
#
# ```
# python -m transformer_annotated.training.reproduction paper-en-de-seed0 final-en-de-seed0 --minutes 9
# ```
#
# A machine without spaCy and tokenizers can do it too: make the encoded corpus elsewhere (`prepare` writes it) and carry that file. The lines appear here when they exist:

# %% tags=["active-ipynb"]
# on_gpu = [line for line in stored.values() if "seed" in line["run"]]
# for line in on_gpu:
#     print(line["run"], line["rows"][-1]["bleu"])
# if not on_gpu:
#     print("none of the GPU runs has been made")

# %% [markdown]
# ## WMT 2014
#
# The paper's corpus has 4.5 million sentence pairs in English and German. The recipes `wmt14-en-de-base` and `wmt14-en-de-big` are complete: data, pieces, model, schedule, averaging, search, score. One command downloads, trains and evaluates:
#
# ```
# python -m transformer_annotated.training.reproduction wmt14-en-de-base
# ```
#
# Nobody has run it here. How long would it take? The paper's base model saw 100,000 steps of about 25,000 target tokens. So the number of target tokens $n$ is known, and with a throughput $r$ in target tokens a second the time is
#
# $$
# t = \frac{n}{r}, \qquad n = 100{,}000 \times 25{,}000
# $$ (eq-time)
#
# The only number to measure is $r$: a few steps of the full-size model on random sentences of 32 pieces.

# %%
def predicted_hours(recipe: Recipe, tokens_per_second: float) -> float:
    """Eq. (eq-time): hours for all steps of a recipe, at so many target tokens a second.

    A step is counted as `max_tokens` times `accumulate` target tokens; with filler there are fewer.
    Raises ValueError unless the throughput is above 0.
    """
    if not tokens_per_second > 0:
        raise ValueError(f"tokens_per_second must be above 0, got {tokens_per_second}")
    train = recipe.train
    return train.steps * train.max_tokens * train.accumulate / tokens_per_second / 3600


def throughput(recipe: Recipe, *, pairs: int, length: int = 32, steps: int = 3) -> float:
    """Target tokens a second of training steps on random pairs, the median of `steps` after one."""
    torch.manual_seed(0)
    device = default_device()
    model = Transformer(recipe.config(recipe.vocab_size)).to(device)
    optimizer, loss_of = adam(model.parameters()), LossOf(model, recipe.objective())
    rows = torch.randint(4, recipe.vocab_size, (2, pairs, length - 1)).tolist()
    batch = collate(list(zip(*rows, strict=True))).to(device)
    rates = []
    for _ in range(steps + 1):
        began = time.perf_counter()
        total = gradient(loss_of, [batch], batch.n_tokens, precision=recipe.train.precision)
        update(optimizer, 1e-4, recipe.train.clip_norm, 0, float(total[0]))
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        rates.append(batch.n_tokens / (time.perf_counter() - began))
    return sorted(rates[1:])[steps // 2]

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
#
# paper = {"base": (WMT14_BASE, 12.0), "big": (WMT14_BIG, 84.0)}  # hours on 8 P100, section 5.2
# print(machine())
# print(
#     f"{'':6s}{'paper, tokens/s':>17s}{'paper, hours':>14s}{'here, tokens/s':>16s}{'here, days':>12s}"
# )
# for name, (recipe, hours) in paper.items():
#     its_rate = predicted_hours(recipe, 1.0) / hours  # tokens over seconds
#     if scale() == "full":
#         ours = throughput(recipe, pairs=16)
#         days = predicted_hours(recipe, ours) / 24
#         print(f"{name:6s}{its_rate:17,.0f}{hours:14.0f}{ours:16,.0f}{days:12,.0f}")

# %% [markdown]
# The paper's hours are its own: 12 for the base model, 3.5 days for the big one. The throughput of its eight GPUs follows from them. The last column is a prediction from a few steps on the processor named above it, and says why WMT is not a job for a processor. On rented GPUs the cost is the hours times the number of GPUs times the price of one of them; put in the throughput that you measure there.
#
# ## The table
#
# | | corpus | parameters | BLEU, paper | BLEU, here |
# |---|---|---|---|---|
# | base, en→de | WMT 2014 | 65 M | 27.3 | not run |
# | base, en→fr | WMT 2014 | 65 M | 38.1 | not run |
# | big, en→de | WMT 2014 | 213 M | 28.4 | not run |
# | big, en→fr | WMT 2014 | 213 M | 41.0 | not run |
# | `SMALL`, en→de and de→en | Multi30k | see above | none | see above |
#
# The paper's figures are from its tables 2 and 3 {cite:p}`vaswani2017attention`. They are tokenised BLEU on newstest2014; Chapter 22 explained why another scorer gives other figures for the same text. No figure on Multi30k can be put beside them: captions are short, and a thousand of them are one kind of sentence.
#
# ## What the paper did
#
# | | paper | `WMT14_BASE` |
# |---|---|---|
# | data, section 5.1 | 4.5 M pairs, en-de; 36 M, en-fr | the same corpora; pairs of more than 256 pieces left out |
# | pieces | 37,000 shared; 32,000 for French | the same, byte-level |
# | batch | about 25,000 + 25,000 tokens, 8 GPUs | at most 8 × 3,125 padded positions a side |
# | optimiser, 5.3 | Adam, 0.9, 0.98, $10^{-9}$; warm-up 4,000 | the same |
# | regularisation, 5.4 | dropout 0.1 (big: 0.3; en-fr: 0.1), smoothing 0.1 | the same |
# | precision | not stated | bfloat16 forward pass, float32 weights |
# | averaging, 6.1 | last 5, big: last 20, ten minutes apart | the same numbers, 1,500 and 600 steps apart |
# | search, 6.1 | beam 4, $\alpha = 0.6$, source + 50 | the same |
# | chosen on | newstest2013 | newstest2013 |
#
# ## How it breaks
#
# - *Chosen on the test set.* The best of ten settings on the test set is better there, and nowhere else. Validation first; the test set once, at the end.
# - *The tokenizer was trained on all splits.* No piece of the test set is rare, and the score is a little too good.
# - *A run continued with another recipe.* The trainer refuses. Whoever forces it has a model that no recipe describes.
# - *One seed.* Two runs with different seeds differ. Half a point between two rows of one seed each is not a result.
#
# ## Takeaways
#
# - A recipe is one value that decides a run. Write it next to the score.
# - Search and averaging cost nothing in training. Measure them on the same weights.
# - The time of a long run is tokens over tokens a second. Measure the second before starting the first.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 23.1.** A GPU trains the base model at 250,000 target tokens a second. How many hours does the paper's base run take on it?

# %% tags=["active-ipynb"]
# answer = ...
# check("23.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = predicted_hours(WMT14_BASE, 250_000)
# check("23.1", answer)

# %% [markdown]
# **Exercise 23.2.** With three tables instead of one, how many parameters more does `SMALL` have, for 6,000 pieces?

# %% tags=["active-ipynb"]
# answer = ...
# check("23.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 2 * 6000 * 192
# check("23.2", answer)

# %% [markdown]
# **Exercise 23.3.** Make a recipe from `SMALL` for French to English, with a fifth of the steps and of the warm-up, and seed 7. Answer with the `Recipe`.

# %% tags=["active-ipynb"]
# answer = ...
# check("23.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = replace(
#     SMALL, source="fr", target="en", warm_up=120, train=replace(SMALL.train, steps=1500, seed=7)
# )
# check("23.3", answer)
