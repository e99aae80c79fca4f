# %% [markdown]
r"""
# All patches together

The ablation matrix: the model of 2017, each patch alone, all of them, and all but one, on the same
budget, on translation and on language modelling, with several seeds.
"""

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
from transformer_annotated.paper.parts import check_sizes, patch, paths, spec
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
        dropout=0.2, steps=1000, max_tokens=8192, peaks=(1e-3, 2e-3), text_steps=800, length=512,
        batch=64, text_peaks=(1e-3, 2e-3), window=32, bfloat16=True,
    ),
    "wide": Scale(d_model=512, n_heads=8, d_ff=2048),  # the paper's width: for costs alone
    "tiny": Scale(
        text="toy", d_model=16, n_layers=1, n_heads=2, d_ff=32, steps=4, max_tokens=200,
        text_steps=4, length=16, batch=2, window=4,
    ),
}  # fmt: skip


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
    ids, held_out = (torch.tensor(characters.encode(t), device=device) for t in (text.train, text.val))
    model = Transformer(config).to(device)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=scale.bfloat16):
        train_language_model(
            model, ids, steps=scale.text_steps, length=scale.length, batch=scale.batch,
            rate=peak, warm_up=max(1, scale.text_steps // 10), seed=seed,
        )  # fmt: skip
    n_bytes = len(text.val.encode())
    bits = bits_per_byte(model, held_out, n_bytes, length=scale.length)
    return {"loss": bits * math.log(2) * n_bytes / len(held_out), "bits_per_byte": bits}


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
    parser.add_argument("--results", type=Path, help="the file of lines, in book/results/ if not given")
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
