# %% [markdown]
r"""
# All patches together

The ablation matrix: the model of 2017, each patch alone, all of them, and all but one, on one
budget, on translation and on language modelling, with three seeds.
"""

# %% [markdown]
# Each chapter of this part changed one thing. Here all changes meet in one table: the paper's model, each patch alone, all patches, and all patches but one. An **ablation** is an experiment that takes one part away and looks at what is lost.

# %% mystnb={"figure": {"caption": "Chapter 35 of Part III: all patches in one table.", "name": "fig-map-ablation"}, "image": {"alt": "Twelve boxes in a row, one a chapter. The eleventh, All patches, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(35);

# %%
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transformer_annotated.book import commit, machine
from transformer_annotated.modern.experts import Balanced, mixture_of_experts
from transformer_annotated.modern.gated import GEGLU, GELU, SWIGLU
from transformer_annotated.modern.grouped_query import grouped_queries
from transformer_annotated.modern.language_model import (
    Characters,
    bits_per_byte,
    mean_loss,
    open_text,
    train_language_model,
)
from transformer_annotated.modern.pre_ln import PRE_LN
from transformer_annotated.modern.relative_bias import ALIBI, T5_BIAS
from transformer_annotated.modern.rms_norm import QK_NORM, RMS_NORM
from transformer_annotated.modern.rope import ROPE
from transformer_annotated.modern.window import sliding_window
from transformer_annotated.paper.feed_forward import FeedForward
from transformer_annotated.paper.parts import Spec, patch, paths, spec
from transformer_annotated.paper.toy import collate
from transformer_annotated.paper.transformer import (
    DECODER_ONLY,
    PAPER_BASE,
    SDPA,
    Config,
    Transformer,
    count_parameters,
)
from transformer_annotated.training.batching import TokenBatchSampler
from transformer_annotated.training.objective import CrossEntropy, LossSum
from transformer_annotated.training.reproduction import Recipe, prepare, read_results, score
from transformer_annotated.training.schedule import adam, cosine
from transformer_annotated.training.speed import FAST, race
from transformer_annotated.training.tokens import EncodedCorpus, load_tokenizer
from transformer_annotated.training.trainer import (
    LossOf,
    default_device,
    gradient,
    update,
    validation_loss,
)

# %% [markdown]
# ## Seven patches in one line
#
# This is the config diff of the row `all`, at the paper's size, before its hidden width is matched (below). Seven patches, each a dict, none of which knows of another:

# %% tags=["active-ipynb"]
# from transformer_annotated import SWIGLU, diff
#
# patches = (PRE_LN, RMS_NORM, QK_NORM, SWIGLU, ROPE, grouped_queries(4), SDPA)
# print(diff(PAPER_BASE, patch(PAPER_BASE, *patches)))

# %% mystnb={"figure": {"caption": "All patches together touch every seam but the head and the bias.", "name": "fig-seams-all"}, "image": {"alt": "The two stacks of the Transformer as boxes. Embedding, both attentions, residuals, feed-forward networks and final norms are coloured; the head is not."}} tags=["active-ipynb"]
# figures.seams(["embedding", "self_attention", "cross_attention", "residual", "ffn", "final_norm"]);

# %% [markdown]
# ## What a fair comparison needs
#
# Five things can fool us, and the runner of this chapter answers each.
#
# - **Parameters.** SwiGLU has a third matrix, grouped queries have smaller ones. A larger model is better for free. So every row gets the hidden width that brings it to the paper's number of parameters.
# - **Steps and tokens.** Every row sees the same batches in the same number.
# - **The learning rate.** One rate for all rows favours the row for which it was chosen. So each row tries the same few rates with its first seed, and keeps its best for the other seeds.
# - **Luck.** Two runs of one model with two seeds differ. Three seeds show how much. A difference smaller than that is not a finding.
# - **The budget.** What helps in a short run need not help in a long one. Nothing here says what a hundred times the budget would do. No run of this page is longer than `smoke`: the scale `full` is there to be run, and its lines are not in the file.
#
# The budget is one object. `smoke` fits a processor, `full` fits a GPU, and `tiny` is for the tests. `wide` has the paper's width, for measurements of speed.

# %%
Task = Literal["translation", "language"]
Patch = Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """How large the runs of the matrix are. One scale, one budget: every row gets the same.

    Attributes:
        data, text: the corpus that is translated, and the text that is continued.
        vocab_size: pieces shared by both languages, if the corpus has more words.
        d_model, n_layers, n_heads, d_ff, dropout: the model of 2017, in this size.
        steps, max_tokens: of translation: updates, and tokens of a batch.
        text_steps, length, batch: of the language model: updates, characters of a crop, and crops
            of a batch.
        peaks, text_peaks: the highest learning rates that each row may choose from.
        window: keys that the row `window` sees.
        bfloat16: whether the forward pass runs in 16 bits.
    """

    data: str = "toy"
    text: str = "shakespeare"
    vocab_size: int = 4000
    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    d_ff: int = 512
    dropout: float = 0.1
    steps: int = 250
    max_tokens: int = 1000
    peaks: tuple[float, ...] = (2e-3, 4e-3)
    text_steps: int = 200
    length: int = 128
    batch: int = 16
    text_peaks: tuple[float, ...] = (4e-3, 8e-3)
    window: int = 8
    bfloat16: bool = False


SCALES = {
    "smoke": Scale(),
    "full": Scale(
        data="multi30k", vocab_size=8000, d_model=256, n_layers=4, n_heads=8, d_ff=1024,
        dropout=0.2, steps=400, max_tokens=8192, peaks=(1e-3, 2e-3), text_steps=300, length=512,
        batch=64, text_peaks=(1e-3, 2e-3), window=32, bfloat16=True,
    ),
    "wide": Scale(d_model=512, n_heads=8, d_ff=2048),  # the paper's width: for costs alone
    "tiny": Scale(
        text="toy", d_model=16, n_layers=1, n_heads=2, d_ff=32, steps=4, max_tokens=200,
        text_steps=4, length=16, batch=2, window=4,
    ),
}  # fmt: skip

# %% tags=["active-ipynb"]
# for name in ("smoke", "full"):
#     s = SCALES[name]
#     print(f"{name}: D = {s.d_model}, N = {s.n_layers}, H = {s.n_heads}, F = {s.d_ff}")
#     print(f"  {s.data}: {s.steps} steps of {s.max_tokens} tokens, rates {s.peaks}")
#     print(f"  {s.text}: {s.text_steps} steps of {s.batch} x {s.length} characters, {s.text_peaks}")

# %% [markdown]
# At the scale `smoke`, translation means the small language of Chapter 9: a real corpus would not get beyond single words in so few steps. The language model reads Shakespeare, by characters.
#
# ## The rows

# %%
TOGETHER: dict[str, Patch] = {
    "pre_ln": PRE_LN,
    "rms_norm": RMS_NORM,
    "qk_norm": QK_NORM,
    "swiglu": SWIGLU,
    "rope": ROPE,
    "gqa": {},  # needs the number of heads: see `rows`
    "sdpa": SDPA,
}


def rows(scale: Scale) -> dict[str, tuple[Patch, ...]]:
    """The rows of the matrix by name, the most telling first: the patches that make each."""
    together = {**TOGETHER, "gqa": grouped_queries(scale.n_heads // 2)}
    experts = mixture_of_experts(4, 2, expert=spec(FeedForward, d_ff=scale.d_ff // 2))
    alone: dict[str, Patch] = {
        **together, "gelu": GELU, "geglu": GEGLU, "alibi": ALIBI, "t5_bias": T5_BIAS,
        "window": sliding_window(scale.window), "experts": experts,
    }  # fmt: skip
    but_one = {
        f"all but {name}": tuple(p for other, p in together.items() if other != name)
        for name in together
        if name != "sdpa"  # it changes how attention is computed, and not what
    }
    single = {name: (change,) for name, change in alone.items()}
    return {"paper": (), "all": tuple(together.values()), **single, **but_one}

# %% tags=["active-ipynb"]
# for name, changes in rows(SCALES["smoke"]).items():
#     print(f"{name:18}{', '.join(path for change in changes for path in change)}")

# %% [markdown]
# Not every patch is in `all`. ALiBi, T5's bias and RoPE are three answers to one question, and a model takes one. GELU and GEGLU are rivals of SwiGLU. A window and experts change what the model is for. What is in it is what most decoder-only models of today have; QK-norm is the newest and not in all. Chapter 36 shows which of them has what.
#
# `sdpa` computes the same function as the written-out attention, with other roundings. It is a patch like the others, and its row has a second use: its distance to the paper's row is the noise of rounding. There is no row `all but sdpa`, since the function would be that of `all`.
#
# ## Equal parameters
#
# A model's parameters grow linearly with the hidden width F: so many for each unit. Two counts give the line, and the line gives the width:
#
# $$
# F = 8 \left\lfloor \frac{P - P_8}{P_{16} - P_8} \right\rceil + 8
# $$ (eq-matched)
#
# $P$ is the paper's number of parameters, and $P_8$, $P_{16}$ are the row's with F = 8 and 16. Widths are multiples of 8, which hardware likes.

# %%
def base(scale: Scale, task: Task, vocab_size: int) -> Config:
    """The model of 2017 in this size, both stacks or the decoder alone, with Chapter 17's parts."""
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "d_model": scale.d_model,
        "n_layers": scale.n_layers,
        "self_attention.n_heads": scale.n_heads,
        "ffn.d_ff": scale.d_ff,
        "dropout": scale.dropout,
    }
    if task == "language":
        return patch(PAPER_BASE, DECODER_ONLY, sizes, FAST)
    return patch(PAPER_BASE, sizes, {"cross_attention.n_heads": scale.n_heads}, FAST)


def matched(config: Config, parameters: int) -> Config:
    """`config` with the hidden width, a multiple of 8, that brings it nearest to `parameters`.

    Experts are left as they are: they have more parameters than a token meets.
    """
    if any(path.startswith(("ffn.expert", "decoder.ffn.expert")) for path in paths(config)):
        return config

    def total(d_ff: int) -> int:
        return count_parameters(patch(config, {"ffn.d_ff": d_ff}))["total"]

    step = total(16) - total(8)
    return patch(config, {"ffn.d_ff": max(8, 8 + 8 * round((parameters - total(8)) / step))})


def build(scale: Scale, task: Task, vocab_size: int, patches: Sequence[Patch]) -> Config:
    """The config of a row: `patches` on the base, with as many parameters as the base."""
    plain = base(scale, task, vocab_size)
    return matched(patch(plain, *patches), count_parameters(plain)["total"])

# %% tags=["active-ipynb"]
# for name, patches in rows(SCALES["smoke"]).items():
#     config = build(SCALES["smoke"], "translation", 500, patches)
#     n = count_parameters(config)["total"]
#     assert config.decoder is not None
#     assert isinstance(config.decoder.ffn, Spec)
#     print(f"{name:18}{n:10,} parameters   F = {config.decoder.ffn.kwargs.get('d_ff', '-')}")

# %% [markdown]
# The 500 words are an example; each task has a vocabulary of its own. SwiGLU's width is two thirds of the paper's, and with grouped queries the network gets the parameters that the heads gave up. Experts stay as they are: they have more parameters in all, and each token meets about as many as in the paper's model.
#
# ## Two tasks
#
# Nothing in the two training loops is new. Translation uses the batches, the loss, the schedule and the step of Part II; the language model uses `train_language_model` of Chapter 25. The objective of translation is wrapped in `Balanced`: for models without experts it changes nothing. The language model has no such term, so there the experts are trained without balance.

# %%
def translation(
    scale: Scale, config: Config, data: EncodedCorpus, seed: int, peak: float
) -> dict[str, Any]:
    """Train a translator on the budget; its validation loss in nats a token and its test BLEU."""
    torch.manual_seed(seed)
    device = default_device()
    model = Transformer(config).to(device)
    train = data.splits["train"]
    sampler = TokenBatchSampler(train.lengths, scale.max_tokens, seed=seed)
    rate = cosine(peak, max(1, scale.steps // 10), scale.steps)
    optimizer, loss_of = adam(model.parameters()), LossOf(model, Balanced(CrossEntropy(0.1)))
    step = epoch = 0
    while step < scale.steps:
        for places in sampler.epoch_batches(epoch)[: scale.steps - step]:
            batch = collate([train[i] for i in places]).to(device)
            precision: Any = "bfloat16" if scale.bfloat16 else "float32"
            loss = gradient(loss_of, [batch], batch.n_tokens, precision=precision)
            step += 1
            update(optimizer, rate(step), 1.0, step, float(loss[0]))
        epoch += 1
    return {
        "loss": validation_loss(model, data.splits["val"]),
        "bleu": score(model.eval(), data, "test")[0]["bleu"],
    }


def language(scale: Scale, config: Config, seed: int, peak: float) -> dict[str, Any]:
    """Train a language model on the budget; its loss in nats a character, and bits a byte."""
    torch.manual_seed(seed)
    device = default_device()
    text = open_text(scale.text)
    characters = Characters(text.train)
    ids, held_out = (
        torch.tensor(characters.encode(t), device=device) for t in (text.train, text.val)
    )
    model = Transformer(config).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=scale.bfloat16):
        train_language_model(
            model, ids, steps=scale.text_steps, length=scale.length, batch=scale.batch,
            rate=peak, warm_up=max(1, scale.text_steps // 10), seed=seed,
        )  # fmt: skip
    n_bytes = len(text.val.encode())
    bits = bits_per_byte(model, held_out, n_bytes, length=scale.length)
    return {"loss": bits * math.log(2) * n_bytes / len(held_out), "bits_per_byte": bits}

# %% [markdown]
# A run tries its rates, keeps the best and says what it found. A run whose numbers overflow has lost: its loss counts as infinite.

# %%
def corpus(scale: Scale, work: Path) -> EncodedCorpus:
    """The pairs to translate, German to English, as ids; kept in the folder `work`."""
    recipe = Recipe(data=scale.data, source="de", target="en", vocab_size=scale.vocab_size)
    return prepare(recipe, work / f"{scale.data}-de-en-{scale.vocab_size}.safetensors")


def run(
    name: str, task: Task, seed: int, peaks: Sequence[float], scale: Scale, data: EncodedCorpus
) -> dict[str, Any]:
    """Train and score one row with one seed, at the best of these rates; what was found.

    The best is the one with the lowest validation loss. A rate at which the numbers overflow loses.
    """
    began = time.perf_counter()
    vocab_size = load_tokenizer(data.tokenizer_json).vocab_size
    if task == "language":
        vocab_size = Characters(open_text(scale.text).train).vocab_size
    config = build(scale, task, vocab_size, rows(scale)[name])
    tried: dict[float, dict[str, Any]] = {}
    for peak in peaks:
        try:
            if task == "translation":
                tried[peak] = translation(scale, config, data, seed, peak)
            else:
                tried[peak] = language(scale, config, seed, peak)
        except (FloatingPointError, ValueError) as error:
            if "finite" not in str(error) and "nan" not in str(error):
                raise
            tried[peak] = {"loss": math.inf}
    best = min(tried, key=lambda peak: tried[peak]["loss"])
    return {
        **tried[best], "peak": best, "tried": {str(p): found["loss"] for p, found in tried.items()},
        "parameters": count_parameters(config)["total"],
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip

# %% [markdown]
# The runner works the list off. It appends one line a run, so it can be stopped at any time, and it goes on where it stopped. Every row gets its first seed before any row gets its second: a matrix that was cut off is a smaller matrix and not half of one.

# %%
def work_off(
    scale_name: str,
    results: Path,
    work: Path,
    *,
    names: Sequence[str] | None = None,
    tasks: Sequence[Task] = ("translation", "language"),
    seeds: Sequence[int] = (0, 1, 2),
    minutes: float | None = None,
) -> bool:
    """Run what `results` does not hold yet and append a line for each run; whether all is done.

    Every row gets its first seed before any gets its second. With its first seed a row tries every
    rate of the scale, and keeps the best for the others. A run that was cut off starts again.

    Raises:
        ValueError: an unknown scale or row, or lines in `results` of another budget.
    """
    if scale_name not in SCALES:
        raise ValueError(f"scale must be one of {', '.join(SCALES)}, got {scale_name!r}")
    scale, end = SCALES[scale_name], None if minutes is None else time.monotonic() + 60 * minutes
    known, budget = rows(scale), json.loads(json.dumps(asdict(scale)))
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise ValueError(f"unknown rows {unknown}; there are {', '.join(known)}")
    lines = [line for line in read_results(results) if line["scale"] == scale_name]
    if any(line["budget"] != budget for line in lines):
        raise ValueError(f"{results} holds runs of another budget than today's {scale_name!r}")
    done = {(line["row"], line["task"], line["seed"]) for line in lines}
    chosen = {(line["row"], line["task"]): line["peak"] for line in lines}
    data = corpus(scale, work)
    for seed, name, task in itertools.product(seeds, names or known, tasks):
        if (name, task, seed) in done:
            continue
        if end is not None and time.monotonic() > end:
            return False
        all_peaks = scale.peaks if task == "translation" else scale.text_peaks
        peaks = (chosen[name, task],) if (name, task) in chosen else all_peaks
        found = run(name, task, seed, peaks, scale, data)
        chosen[name, task] = found["peak"]
        line = {
            "row": name, "task": task, "seed": seed, "scale": scale_name, **found,
            "machine": machine(), "commit": commit(), "budget": budget,
        }  # fmt: skip
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    return True

# %% tags=["active-ipynb"]
# import tempfile
#
# with tempfile.TemporaryDirectory() as folder:
#     lines, work = Path(folder) / "lines.jsonl", Path(folder) / "work"
#     for call in (1, 2):
#         done = work_off(
#             "tiny", lines, work, names=["paper", "rope"], tasks=["language"], seeds=[0, call]
#         )
#         print(f"call {call}: done {done}, {len(read_results(lines))} lines")
#     row = read_results(lines)[0]
#     print({name: row[name] for name in ("row", "task", "seed", "peak", "parameters")})

# %% [markdown]
# The first call asked for four runs and made them. The second asked for four, and found two of them done.
#
# ## Speed and memory
#
# Speeds must not be read off runs that came one after the other, since a machine has other work at other times. `costs` takes one training step of every row in turn, in a new order each round, as in Chapter 17. Memory is counted, not sampled: what a step keeps for the backward pass, and the weights, their gradients and Adam's two means, four numbers of four bytes for each parameter.

# %%
def kept_bytes(model: nn.Module, run: Callable[[], Any]) -> int:
    """Bytes that `run()` keeps for the backward pass, the model's own weights not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = run()
    del held
    return sum(size for address, size in kept.items() if address not in own)


def seconds() -> float:
    """Processor time where the CPU computes, undisturbed by others; else time on the wall."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()

# %%
def training_step(
    scale: Scale, task: Task, config: Config, data: EncodedCorpus
) -> tuple[Transformer, Callable[[], LossSum], int]:
    """A fresh model in training, the loss of one fixed batch, and the batch's tokens."""
    torch.manual_seed(0)
    device = default_device()
    model = Transformer(config).to(device).train()
    if task == "translation":
        train = data.splits["train"]
        sampler = TokenBatchSampler(train.lengths, scale.max_tokens)
        pairs = collate([train[i] for i in sampler.epoch_batches(0)[0]]).to(device)
        return model, lambda: CrossEntropy(0.1)(model, pairs), pairs.n_tokens
    crops = torch.randint(config.vocab_size, (scale.batch, scale.length + 1), device=device)
    n = scale.batch * scale.length
    return model, lambda: LossSum(mean_loss(model, crops) * n, torch.zeros(()), n), n


def costs(
    scale: Scale, task: Task, names: Sequence[str], data: EncodedCorpus, rounds: int
) -> list[dict[str, Any]]:
    """Tokens a second and memory of a training step of each row, all measured in turn.

    A line has the median, lowest and highest number of tokens a second over `rounds`; `relative`,
    the median of the ratios to the first row in the same round; `kept_mib`, what a step keeps for
    the backward pass; and `state_mib`: weights, gradients and Adam's two means.
    """
    runs: dict[str, Callable[[], None]] = {}
    lines: dict[str, dict[str, Any]] = {}
    tokens = 0
    device_type = torch.device(default_device()).type
    for name in names:
        if task == "translation":
            vocab_size = load_tokenizer(data.tokenizer_json).vocab_size
        else:
            vocab_size = Characters(open_text(scale.text).train).vocab_size
        config = build(scale, task, vocab_size, rows(scale)[name])
        model, loss, tokens = training_step(scale, task, config, data)
        optimizer = adam(model.parameters())

        def step(
            loss: Callable[[], LossSum] = loss, optimizer: torch.optim.Optimizer = optimizer
        ) -> None:
            with torch.autocast(device_type, torch.bfloat16, enabled=scale.bfloat16):
                sums = loss()
            (sums.loss / sums.tokens).backward()
            optimizer.step()
            optimizer.zero_grad()

        runs[name] = step
        parameters = sum(p.numel() for p in model.parameters())
        lines[name] = {
            "row": name, "task": task, "parameters": parameters,
            "kept_mib": round(kept_bytes(model, loss) / 2**20, 2),
            "state_mib": round(16 * parameters / 2**20, 2),
        }  # fmt: skip
    times = race(runs, rounds, seconds)
    for name, line in lines.items():
        speeds = sorted(tokens / spent for spent in times[name])
        line["tokens_per_second"] = [round(x) for x in (median(speeds), speeds[0], speeds[-1])]
        pairs = zip(times[names[0]], times[name], strict=True)
        line["relative"] = round(median(first / spent for first, spent in pairs), 3)
    return list(lines.values())


def write_costs(scale_name: str, results: Path, work: Path, *, rounds: int) -> None:
    """Measure `costs` of every row and task, and put them in place of earlier ones in `results`."""
    scale = SCALES[scale_name]
    data = corpus(scale, work)
    about = {"scale": scale_name, "rounds": rounds, "machine": machine(), "commit": commit()}
    lines = [line for line in read_results(results) if line["scale"] != scale_name]
    for task in ("translation", "language"):
        lines += [{**line, **about} for line in costs(scale, task, list(rows(scale)), data, rounds)]
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

# %%
def main(argv: list[str] | None = None) -> int:
    """Work off the matrix; exit status 3 if there is more to do, so that a script can repeat."""
    import argparse

    parser = argparse.ArgumentParser(description="Run the ablation matrix, or go on with it.")
    parser.add_argument("--scale", choices=list(SCALES), default="smoke")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="all rows unless named")
    parser.add_argument("--tasks", nargs="+", choices=["translation", "language"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs"), help="the encoded corpus")
    parser.add_argument(
        "--results", type=Path, help="the file of lines, in book/results/ if not given"
    )
    parser.add_argument("--minutes", type=float, help="start no run after so long")
    parser.add_argument("--costs", type=int, metavar="ROUNDS", help="measure speed and memory only")
    options = parser.parse_args(argv)
    usual = "ablation.jsonl" if options.costs is None else "ablation_costs.jsonl"
    results = options.results or Path("book/results") / usual
    if options.costs is not None:
        write_costs(options.scale, results, options.work, rounds=options.costs)
        return 0
    done = work_off(
        options.scale, results, options.work, names=options.rows,
        tasks=options.tasks or ("translation", "language"), seeds=options.seeds,
        minutes=options.minutes,
    )  # fmt: skip
    return 0 if done else 3

# %% tags=["active-py"]
if __name__ == "__main__":
    raise SystemExit(main())

# %% [markdown]
# On the command line, from the folder of this book; the second form goes on in slices of nine minutes:
#
# ```
# python -m transformer_annotated.modern.ablation --scale smoke
# python -m transformer_annotated.modern.ablation --scale full --minutes 9
# python -m transformer_annotated.modern.ablation --scale smoke --costs 9
# python -m transformer_annotated.modern.ablation --scale wide --costs 5
# ```
#
# ## The matrix
#
# What follows is read from `book/results/ablation.jsonl`, one line a run. The hardware stands in each line.

# %% tags=["hide-input"]
def effects(lines: Sequence[Mapping[str, Any]], task: Task) -> dict[str, list[float]]:
    """Each row's metric minus the paper's with the same seed: one number a seed."""
    metric = "loss" if task == "translation" else "bits_per_byte"
    found = {(line["row"], line["seed"]): line[metric] for line in lines if line["task"] == task}
    names = dict.fromkeys(row for row, _ in found)
    return {
        name: [
            value - found["paper", seed]
            for (row, seed), value in found.items()
            if row == name and ("paper", seed) in found
        ]
        for name in names
    }


def draw_effects(lines: Sequence[Mapping[str, Any]]) -> Any:
    """A dot for each run: how far it lies from the paper's model with the same seed."""
    import matplotlib.pyplot as plt

    from transformer_annotated.figures import COLORS

    axes = plt.subplots(1, 2, figsize=(7.2, 5.4), sharey=True)[1]
    titles = {"translation": "nats a token", "language": "bits a byte"}
    for ax, (task, unit) in zip(axes, titles.items(), strict=True):
        found = effects(lines, task)  # type: ignore[arg-type]
        del found["paper"]
        for y, values in enumerate(found.values()):
            color = COLORS[0] if max(values) < 0 else COLORS[1] if min(values) > 0 else COLORS[4]
            ax.plot(values, [y] * len(values), "o", markersize=4.5, color=color, alpha=0.8)
            ax.plot([sum(values) / len(values)] * 2, [y - 0.3, y + 0.3], color=color)
        ax.axvline(0, color="#333333", linewidth=0.8)
        ax.set(title=task, xlabel=f"difference to the paper, {unit}")
    axes[0].set_yticks(range(len(found)), found)
    axes[0].invert_yaxis()
    return axes

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import measured, results
#
# lines = [line for line in results("ablation") if line["scale"] == "smoke"]
# machines = sorted({line["machine"] for line in lines})
# minutes = sum(line["seconds"] for line in lines) / 60
# print(f"{len(lines)} runs in {minutes:.0f} minutes, on", *machines)
# print(measured(*(name for name in rows(SCALES["smoke"]) if name != "paper")))

# %% mystnb={"figure": {"caption": "Left of the line is better than the paper. Blue rows win with every seed, orange rows lose with every seed, grey rows win with some and lose with others.", "name": "fig-effects"}, "image": {"alt": "Two panels of dots, translation and language, with one row for each patch and one dot for each seed. The vertical line at zero is the paper."}} tags=["active-ipynb", "nbval-ignore-output"]
# draw_effects(lines);

# %% [markdown]
# The table has nats a token for translation and bits a byte for language. First the row `all`. On text it beats every single patch with every seed. On translation it beats the paper on average, but with one seed by no more than two roundings of one model differ; and SwiGLU, GEGLU and GELU alone are each better on average. All patches together are not the sum of the patches.
#
# How much is luck? The row `sdpa` in {numref}`fig-effects` computes the paper's function with other roundings: its dots lie on the line. That is the noise of arithmetic, and it is the smallest kind. With the same seed two rows read the same batches. They start from the same weights only if the patch leaves the shapes and the order of the draws alone. SwiGLU, grouped queries, T5's bias, experts and all rows `all ...` start elsewhere: their dots contain the luck of the start, too. The paper's own three seeds show how large that is.
#
# **On text, positions decide.** RoPE, ALiBi and the window each move the loss by several times as much as any other single patch. ALiBi and the window favour near keys outright; RoPE makes a shift by one easy to express (Chapter 29). In two hundred steps a model with sinusoids has not learned to find the character before the last one: its loss lies near the level of character pairs (Chapter 25). So the gain is one in *speed of learning*. What these schemes do beyond the length of training, Chapter 30 shows.
#
# **On translation, the largest gains come from the feed-forward network.** All three smooth activations win with every seed, with a gate and without; the gate's own share is within the scatter. QK-norm wins with every seed on both tasks.
#
# **Some patches lose.** ALiBi and T5's bias lose on translation. Both take the sinusoids from the encoder. Chapter 30 shows why ALiBi cannot know the order of a source sentence at all; T5's table can, but it starts at zero, and these runs are short. Grouped queries lose clearly on translation when they are alone, and hardly in `all`, as the next table shows. So missing keys are not the whole reason. Alone, the row took the lower rate and failed at the higher one; a still lower one might have helped. RMSNorm loses a little on translation and wins a little on text: a row to be called level. Experts are level on translation and lose on text with every seed, with more parameters than any other row.
#
# **Pre-LN loses alone, on both tasks.** Two layers do not need it: Chapter 26 shows post-LN failing at twelve.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for task in ("translation", "language"):
#     found = effects(lines, task)
#     print(f"{task}: what is lost without a patch, seed by seed; and the patch alone, on average")
#     for name in (name for name in found if name.startswith("all but ")):
#         lost = [x - y for x, y in zip(found[name], found["all"], strict=True)]
#         alone = found[name[8:]]
#         seeds = "  ".join(f"{x:+.3f}" for x in lost)
#         print(f"  {name[8:]:10}{seeds}   alone {sum(alone) / len(alone):+.3f}")

# %% [markdown]
# A positive number says that `all` becomes worse if the patch is taken out, a negative one that it becomes *better*. For the patch alone it is the other way round: there a negative number is a gain.
#
# On text, RoPE tells the same story in both columns. On translation it does not: alone it gains on average, and `all` is better without it, with every seed. RMSNorm and grouped queries do not keep one sign over the seeds: they are undecided. Pre-LN is decided, and it is the odd one. On translation it loses alone and in company: `all` without it is the best model of the whole matrix, with every seed. That its single row had foretold. On text it loses alone, and is missed in `all`, with every seed. The rates that were tried say why (in nats a token; on text a nat is 1.44 bits):

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name in ("all", "all but pre_ln"):
#     for line in lines:
#         if line["row"] == name and line["seed"] == 0:
#             tried = ", ".join(f"{loss:.3f} at {rate}" for rate, loss in line["tried"].items())
#             print(f"{name:15}{line['task']:13}{tried}")

# %% [markdown]
# On text `all` likes the higher rate, at which it fails without pre-LN. At the lower rate it would not miss it. So whether a model of two layers should have pre-LN depends on the task, on the rate, and on what else is in it.

# %% [markdown]
# ## Translations are scored, too

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for name in rows(SCALES["smoke"]):
#     scores = sorted(l["bleu"] for l in lines if l["row"] == name and l["task"] == "translation")
#     print(f"{name:18}BLEU " + "  ".join(f"{score:5.1f}" for score in scores))

# %% [markdown]
# BLEU on the small language goes with the loss, but not always: a row with a lower loss can have the lower BLEU, and one run can fall far below the others of its row. BLEU counts words that were decoded one after the other, so one confusion that comes again and again costs much of it and little of the loss. The best argument for ranking by loss is the row `sdpa`: the same function as the paper's, and its BLEU moves by a point or two.

# %% [markdown]
# ## What the patches cost

# %% tags=["active-ipynb", "nbval-ignore-output"]
# costed = [line for line in results("ablation_costs") if line["scale"] == "smoke"]
# print(costed[0]["machine"] + f", {costed[0]['rounds']} rounds, interleaved")
# print(
#     f"{'':18}{'task':13}{'tokens/s':>9}{'  lowest-highest':16}{'relative':>9}{'kept MiB':>10}{'state MiB':>11}"
# )
# for line in costed:
#     middle, low, high = line["tokens_per_second"]
#     print(
#         f"{line['row']:18}{line['task']:13}{middle:9,}{f'{low:,}-{high:,}':>16}"
#         f"{line['relative']:9.3f}{line['kept_mib']:10.1f}{line['state_mib']:11.1f}"
#     )

# %% [markdown]
# `relative` is the speed relative to the paper's row in the same round; above 1 is faster. In a model this narrow, most patches are a handful of small operations and cost one or a few per cent each. `sdpa` gives some of it back. How much depends on the task: on text, with crops of 128 characters, it gives back all, and `all` is level with the paper. On translation the sentences are short, there is little attention to save, and `all` is slower.
#
# A real model is wider, and its matrix products grow with the square of the width. So the same measurement at the paper's width, with two layers (the last column is the sum of both kinds of memory):

# %% tags=["active-ipynb", "nbval-ignore-output"]
# wide = [line for line in results("ablation_costs") if line["scale"] == "wide"]
# print(wide[0]["machine"] + f", {wide[0]['rounds']} rounds, interleaved")
# for line in (line for line in wide if line["row"] in ("paper", "all", *TOGETHER)):
#     middle, low, high = line["tokens_per_second"]
#     total = line["kept_mib"] + line["state_mib"]
#     print(
#         f"{line['row']:18}{line['task']:13}{middle:9,}{f'{low:,}-{high:,}':>16}"
#         f"{line['relative']:9.3f}{line['kept_mib']:10.1f}{line['state_mib']:11.1f}{total:9.1f}"
#     )

# %% [markdown]
# At this width a step with all seven patches is slower by a hundredth or two, less than the rounds differ: its range overlaps with the paper's. Memory is another matter. `all` keeps more for the backward pass than the paper's model, and one patch is most of the reason; QK-norm is the next. Grouped queries save the cache of decoding and not this memory: their parameters went into a wider network. ReLU's network keeps one hidden vector a token, since its output says all that its gradient needs. SwiGLU keeps four: the gate, the gate after SiLU, the other branch, and their product. Each has two thirds of the width, so the network keeps nearly three times as much. `sdpa` gives back a part: on text much, on translation little. Production recomputes: a kernel for gated networks keeps the two branches and their product, and computes SiLU again {cite:p}`hsu2024liger`.

# %% [markdown]
# ## What the paper did, and others after it
#
# The paper has an ablation of its own: Table 3 varies heads, widths, dropout and positions of the base model, one at a time, on a development set {cite:p}`vaswani2017attention`. Rows (A) to (E) are one patch each in the sense of this book. It reports one run for each row. {cite:t}`narang2021transformer` did for later changes what this chapter does in small: dozens of modifications of T5, in one code base, on one budget. Most of them did not help in a meaningful way. Among those that did are gated networks and RMSNorm, which production kept.
#
# Other people's numbers cannot be put beside each other: data, tokenizer, budget and tuning differ, and each moves the loss by more than most patches do. One code base, one budget and several seeds are what make rows comparable. That is why this table exists.

# %% [markdown]
# ## How it breaks, and how you notice
#
# - **One seed.** Rank the rows by the first seed alone, then by the second. Where two rows change places, three seeds cannot tell them apart:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for task in ("translation", "language"):
#     found = effects(lines, task)
#     orders = [sorted(found, key=lambda name: found[name][s]) for s in range(len(found["paper"]))]
#     print(task)
#     for seed, order in enumerate(orders):
#         print(f"  seed {seed}: {', '.join(order[:6])} ... {order[-1]}")

# %% [markdown]
# - **One rate.** A new part often wants another learning rate. If it is tried at the old part's best rate alone, the old part wins. Here is how often each rate was chosen:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from collections import Counter
#
# for task in ("translation", "language"):
#     first = [line for line in lines if line["task"] == task and line["seed"] == 0]
#     print(task, dict(Counter(line["peak"] for line in first)), "rates chosen, by row")
#     tried = next(line["tried"] for line in first if line["row"] == "paper")
#     print("  the paper:", ", ".join(f"{loss:.3f} at {rate}" for rate, loss in tried.items()))

# %% [markdown]
#   There are two rates, so every row chose an edge: a higher one might have suited some, a lower one others. At the paper's best rate on translation, `all` would have lost to the paper; at the other it wins. And the first seed's loss chose the rate that it is reported with, which flatters every row a little.
# - **Unequal models.** Leave out `matched`, and SwiGLU at the paper's width has half as many parameters again in each network. It then wins for two reasons at once, and you learn nothing about either.
# - **Stale rows.** Change the budget, run half of the rows again, and the table mixes two experiments. `work_off` refuses a file that holds lines of another budget.
#
# ## Takeaways
#
# - A patch is a claim, and a matrix with seeds is how it is tested: alone, and as the one part that is missing.
# - Equal parameters, equal tokens, the same choice of rates, several seeds, speeds measured in turn.
# - A patch can lose much alone and almost nothing among others (grouped queries on translation), or lose alone and be missed among others (pre-LN on text).
# - The size of an effect belongs to a budget. At another size it must be measured again.
#
# ## Exercises
#
# **Exercise 35.1.** A row's losses with seeds 0, 1, 2 are 2.31, 2.40 and 2.36. The paper's are 2.38, 2.43 and 2.35. What is the mean difference, row minus paper, and with how many seeds does the row win? Answer with a pair.

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check
#
# answer = ...
# check("35.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# differences = [2.31 - 2.38, 2.40 - 2.43, 2.36 - 2.35]
# check("35.1", (sum(differences) / 3, sum(d < 0 for d in differences)))

# %% [markdown]
# **Exercise 35.2.** A network of width D = 128 and F = 512 has two matrices and no biases. Which width does a gated network of three matrices need for the same number of parameters, as a multiple of 8?

# %% tags=["active-ipynb"]
# answer = ...
# check("35.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# check("35.2", 8 * round(2 * 128 * 512 / (3 * 128) / 8))

# %% [markdown]
# **Exercise 35.3.** Add a row of your own: the paper's model with pre-LN and RoPE, no more. Give the config for translation at the scale `smoke`, with 500 words and as many parameters as the paper's.

# %% tags=["active-ipynb"]
# answer = ...
# check("35.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# check("35.3", build(SCALES["smoke"], "translation", 500, (PRE_LN, ROPE)))

# %% [markdown]
# **Exercise 35.4.** Two rows have the same true mean. The loss of a run scatters around it, evenly to both sides. How probable is it that the first beats the second with all of three seeds, by luck alone? And that at least one of twenty such rows beats the paper's, if their luck were independent? (Here it is not quite: all meet the same three runs of the paper.)

# %% tags=["active-ipynb"]
# answer = ...
# check("35.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# once = 0.5**3
# check("35.4", (once, 1 - (1 - once) ** 20))

# %% [markdown]
# So among twenty rows, a row that wins with every seed is no surprise, and a small win is not yet a finding. Look at its size beside the scatter of the paper's own seeds.

