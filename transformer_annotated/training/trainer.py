# %% [markdown]
r"""
# The trainer

One loop that can be stopped at any moment and goes on as if nothing had happened: the same batches, the same
random numbers, the same weights to the last bit. It works on one process or on several.
"""

# %% [markdown]
# Chapter 10 trained in five lines. They are still here. What they lacked is everything that happens to a run of hours: the power fails, someone needs the machine, one gradient is not a number, the
# batch does not fit, a second processor is not used. Each costs a few lines, and each can be got wrong without a sign. So each is shown at work below.

# %% mystnb={"figure": {"caption": "Chapter 19 of Part II: the loop.", "name": "fig-map-trainer"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The eighth, Trainer, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(19);

# %%
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from transformer_annotated.paper.first_translation import Ids
from transformer_annotated.paper.parts import check_sizes, to_json
from transformer_annotated.paper.toy import Batch, collate
from transformer_annotated.paper.transformer import Layer, Transformer
from transformer_annotated.training.batching import TokenBatchSampler
from transformer_annotated.training.checkpoints import (
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    order,
    remove,
    save_checkpoint,
)
from transformer_annotated.training.objective import CrossEntropy, LossSum, Objective
from transformer_annotated.training.schedule import Schedule, adam, clip_gradients, set_rate
from transformer_annotated.training.speed import keep_memory
from transformer_annotated.training.tokens import EncodedSplit

# %% [markdown]
# ## What decides a run
#
# Two kinds of settings. The first kind decides the numbers: change one and the run is another run. The second says how long to go on, when to write, and how the machine works. It does not change what is computed, with one exception: `compile` can change the last bits.

# %%
@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained.

    Attributes:
        max_tokens: padded positions a side in one micro-batch.
        accumulate: micro-batches whose gradients make one step, over all processes together.
        clip_norm: largest norm of the gradient of all parameters; None for no limit.
        precision: what the forward pass computes in; the weights are float32 always.
        seed: decides batches and dropout.
        steps: after how many steps of the optimiser the run is over.
        save_every: steps from one checkpoint to the next.
        validate_every: steps from one validation to the next.
        keep: how many checkpoints stay on disk, at least 2.
        compile: compile each layer with torch.compile.
        workers: processes that prepare batches; 0 for none beside the main one.
        minutes: stop, and save, after so long; None for no limit.

    Raises:
        ValueError: a number below 1, `keep` below 2, an unknown precision.
    """

    max_tokens: int = 2048
    accumulate: int = 1
    clip_norm: float | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0
    steps: int = 1000
    save_every: int = 500
    validate_every: int = 500
    keep: int = 2
    compile: bool = False
    workers: int = 0
    minutes: float | None = None

    def __post_init__(self) -> None:
        check_sizes(
            max_tokens=self.max_tokens, accumulate=self.accumulate, steps=self.steps,
            save_every=self.save_every, validate_every=self.validate_every,
        )  # fmt: skip
        if self.keep < 2:
            raise ValueError(f"keep must be at least 2, got {self.keep}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0, got {self.workers}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be float32 or bfloat16, got {self.precision!r}")
        if self.clip_norm is not None and not 0 < self.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be above 0 and finite, got {self.clip_norm}")


# What may change when a run is resumed.
FREE = ("steps", "save_every", "validate_every", "keep", "compile", "workers", "minutes")

# %% [markdown]
# ## Where are we?
#
# A run that goes on must know what comes next. Two things decide it: the batch, and the random numbers of dropout.
#
# Chapter 14 made the batches of an epoch a function of the seed and the epoch. So two integers, the epoch and the place in it, say which batch is next. For dropout we do the same: before each step the generator is
# seeded with a number made of the run's seed, the step and the *rank*, which is the number of the process, 0 for the first. Then the random numbers of step 500 do not depend on what happened before step 500, and there is no state to store.

# %%
def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of the random numbers of one step in one process."""
    return ((seed * 1_000_003 + step) * 1_009 + rank) % 2**63


def index_stream(
    batches: Callable[[int], list[list[int]]], epoch: int, index: int
) -> Iterator[list[int]]:
    """The batches from a place on, epoch after epoch, without end."""
    while True:
        yield from batches(epoch)[index:]
        epoch, index = epoch + 1, 0

# %% tags=["active-ipynb"]
# def three_batches(epoch: int) -> list[list[int]]:
#     return [[10 * epoch + i] for i in range(3)]
#
#
# print("from the start     ", list(islice(index_stream(three_batches, 0, 0), 7)))
# print("from epoch 1, place 2", list(islice(index_stream(three_batches, 1, 2), 2)))

# %% [markdown]
# The second line is the end of the first: whoever knows the place can go on.
#
# ## One step
#
# A batch that does not fit into memory is cut into *micro-batches*. Their gradients are added up, and then there is one step. Let a step have $M$ micro-batches with $n_1, \dots, n_M$ real target tokens, and let $L_m$ be the *sum* of the losses in micro-batch $m$. The gradient of the step is
#
# $$
# g = \nabla \frac{\sum_{m} L_m}{\sum_{m} n_m}
# $$ (eq-accumulated)
#
# so each word counts the same, in whichever micro-batch it stands. Chapter 15 showed what goes wrong with a mean of means. The denominator must be known before the first backward pass. It is: the sampler knows all lengths.
#
# With $P$ processes each takes every $P$-th micro-batch. Each process has its own copy of the model. After the backward pass PyTorch's `DistributedDataParallel` *averages* the gradients over the processes, so that the copies stay equal. We want the sum, so each process multiplies its loss by $P$.

# %%
class LossOf(nn.Module):
    """A model and its objective as one module, so that the processes can be kept in step."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, batch: Batch) -> LossSum:
        """The summed loss of a batch."""
        return self.objective(self.model, batch)


def gradient(
    loss_of: nn.Module,
    batches: Sequence[Batch],
    tokens: int,
    *,
    precision: Literal["float32", "bfloat16"] = "float32",
) -> Tensor:
    """Add the gradient of one step, eq. (eq-accumulated), to the parameters' `.grad`.

    Args:
        loss_of: a `LossOf`, or one wrapped in DistributedDataParallel.
        batches: the micro-batches of this process.
        tokens: real target tokens of the whole step, in all processes.

    Returns:
        `(2,)`: loss and negative log-likelihood in nats, summed over this process's tokens.
    """
    parallel = isinstance(loss_of, DistributedDataParallel)
    size = dist.get_world_size() if parallel else 1
    device = batches[0].src.device
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for m, batch in enumerate(batches, start=1):
        wait = parallel and m < len(batches)  # exchange gradients once, after the last
        mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
        with loss_of.no_sync() if wait else nullcontext():  # type: ignore[operator]
            with mixed:
                sums: LossSum = loss_of(batch)
            (sums.loss * (size / tokens)).backward()
        total += torch.stack((sums.loss.detach(), sums.nll)).to(total)
    return total

# %% [markdown]
# The step itself. Gradient first, then a look at it, and only then the update. The norm of the whole gradient is one number, and if a single element is not a number, neither is the norm. `clip_gradients` of Chapter 16 refuses it. So one check covers everything, and it comes *before* the optimiser touches a weight:

# %%
def update(
    optimizer: torch.optim.Optimizer, rate: float, clip_norm: float | None, step: int, loss: float
) -> float:
    """Clip the gradient, check it, and take one step. Returns the norm before clipping.

    Raises:
        FloatingPointError: the loss or the gradient is not finite. No weight has changed, and the
            gradient is cleared.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    problem = "" if math.isfinite(loss) else f"the loss is {loss}"
    try:
        norm = float(clip_gradients(parameters, math.inf if clip_norm is None else clip_norm))
    except ValueError as error:
        problem = problem or str(error)
    if problem:
        optimizer.zero_grad()
        raise FloatingPointError(f"step {step}: {problem}; the step was not taken")
    set_rate(optimizer, rate)
    optimizer.step()
    optimizer.zero_grad()
    return norm

# %% [markdown]
# ## Signals, processes, metrics
#
# Ctrl-C sends a program the signal SIGINT; a cluster that wants its machine back sends SIGTERM. At the first signal of either kind the trainer finishes the step and saves. A second one of the same kind does what it always did: it ends the program at once.

# %%
@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; a second one acts as usual."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received  # only the main thread may have handlers
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    try:
        for number in before:
            signal.signal(number, note)
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def join_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as `torchrun` started them; else (0, 1)."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    if not dist.is_initialized():
        gpus = torch.cuda.device_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus >= here else "gloo")
    return dist.get_rank(), dist.get_world_size()


def own_group(worker: int) -> None:
    """Keep signals to the run's process group from a data loader's worker: the trainer ends it."""
    if hasattr(os, "setsid"):
        os.setsid()

# %% [markdown]
# Metrics go to a text file, one JSON object a line, because everything can read that. A killed process may leave half a line, and lines of steps that no checkpoint holds. On a resume both are cut off, and the steps are computed again.

# %%
class Metrics:
    """A file of JSON lines, one a step or validation, and TensorBoard events beside it if wanted."""

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False) -> None:
        self.path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(self.path) if row["step"] <= step]
        part = self.path.with_suffix(".partial")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        os.replace(part, self.path)
        self.file = self.path.open("a", encoding="utf-8")
        self.events = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.events = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def write(self, step: int, **values: float) -> None:
        """Append a line, and hand it to the operating system at once."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.events is not None:
            for name, value in values.items():
                self.events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the file and the events."""
        self.file.close()
        if self.events is not None:
            self.events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off is left out.

    Raises ValueError for a damaged line that is not the last one.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_text(encoding="utf-8").split("\n")
    try:
        rows = [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} has a damaged line: {error.doc!r}") from error
    with suppress(json.JSONDecodeError):
        rows.append(json.loads(last))
    return rows

# %% [markdown]
# The optimiser has memory too: two running means for each parameter (Chapter 16). They are saved under the parameter's name, so that the file says what it holds and needs no pickle.

# %%
def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors: `exp_avg/decoder.layers.0....`."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` gave.

    Raises:
        ValueError: a tensor whose parameter the model does not have.
    """
    parameters = dict(model.named_parameters())
    unknown = sorted({key.split("/", 1)[-1] for key in tensors} - parameters.keys())
    if unknown:
        raise ValueError(f"the optimiser's state names parameters the model lacks: {unknown[:5]}")
    optimizer.state.clear()
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        parameter = parameters[name]
        # fused Adam wants its step counter beside the parameter; the others are as wide as it is
        optimizer.state[parameter][kind] = value.to(parameter.device).clone()

# %% [markdown]
# ## The trainer
#
# What is left is to put these in order. `Trainer` holds the model, the data, the optimiser and the place. `train` is the loop: a group of micro-batches, a gradient, an update, a line of metrics, and now and then a validation or a checkpoint.

# %%
class Trainer:
    """Trains a translation model, and can be stopped and resumed at any step.

    Args:
        model: trained in place.
        data: encoded pairs, an `EncodedSplit`.
        config: how to train.
        folder: where checkpoints and metrics go; made if it is not there.
        schedule: the learning rate of step 1, 2, 3, ...
        objective: what to minimise.
        optimizer: None for the paper's Adam.
        evaluate: called with the model in evaluation mode every `validate_every` steps; what it
            returns goes to the metrics.
        tokenizer_json: the tokenizer as text; it becomes a part of every checkpoint.
        identity: anything else that decides the run, as JSON values (corpus, schedule, objective).
            A resume is refused where it differs.
        device: where to train; None for a GPU if there is one.
        tensorboard: whether to write TensorBoard events.
        progress: whether to show a progress bar (on a terminal only).

    Under `torchrun` each process makes its own Trainer with the same arguments.

    Raises:
        ValueError: `accumulate` is not a multiple of the number of processes.
    """

    def __init__(
        self,
        model: Transformer,
        data: EncodedSplit,
        config: TrainConfig,
        folder: Path | str,
        *,
        schedule: Schedule,
        objective: Objective | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        evaluate: Callable[[Transformer], Mapping[str, float]] | None = None,
        tokenizer_json: str = "{}",
        identity: Mapping[str, Any] | None = None,
        device: torch.device | str | None = None,
        tensorboard: bool = False,
        progress: bool = True,
    ) -> None:
        self.rank, self.size = join_world()
        if config.accumulate % self.size:
            raise ValueError(
                f"accumulate must be a multiple of the {self.size} processes, "
                f"got {config.accumulate}"
            )
        self.device = torch.device(device or default_device())
        self.model, self.data, self.config = model.to(self.device), data, config
        self.folder, self.schedule, self.evaluate = Path(folder), schedule, evaluate
        self.objective = objective or CrossEntropy()
        self.optimizer = optimizer or adam(self.model.parameters())
        self.tokenizer_json, self.progress, self.tensorboard = tokenizer_json, progress, tensorboard
        self.identity = self._identity(identity or {})
        sampler = TokenBatchSampler(data.lengths, config.max_tokens, seed=config.seed)
        self.batches_of = lru_cache(maxsize=2)(sampler.epoch_batches)
        self.step = self.epoch = self.index = self.tokens = 0
        self.stopped_by: int | None = None
        if config.compile:
            for layer in (m for m in self.model.modules() if isinstance(m, Layer)):
                layer.compile(dynamic=True)

    def _identity(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that decides the numbers of this run, as JSON values."""
        train = {name: value for name, value in asdict(self.config).items() if name not in FREE}
        objective = getattr(self.objective, "__qualname__", None) or repr(self.objective)
        optimizer = {k: repr(v) for k, v in self.optimizer.defaults.items() if k != "lr"}
        mine = {"model": json.loads(to_json(self.model.config)), "train": train,
                "data": self.data.sha256, "objective": objective, "processes": self.size,
                "optimizer": {"class": type(self.optimizer).__name__, **optimizer},
                **more}  # fmt: skip
        return json.loads(json.dumps(mine, allow_nan=False))

    def train(self) -> None:
        """Take steps until there are `config.steps`, or until a signal says stop.

        `stopped_by` is the signal's number afterwards, or None. In both cases the last step is
        saved. The model is left in evaluation mode.

        Raises:
            FloatingPointError: a loss or gradient that is not finite; see `update`.
            ValueError: the folder holds a later checkpoint, or another process trains in it, or
                the processes do not stand at the same step.
        """
        keep_memory()  # Chapter 17; for the whole Python process
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone():
            self._check_place()
            self._train()

    def _train(self) -> None:
        loss_of: nn.Module = LossOf(self.model, self.objective)
        if self.size > 1:
            loss_of = DistributedDataParallel(loss_of)
        metrics = None
        if self.rank == 0:
            metrics = Metrics(self.folder, self.step, tensorboard=self.tensorboard)
        saved, limit = self.step, (self.config.minutes or math.inf) * 60 + time.monotonic()
        try:
            with stop_on_signal() as received, self._bar() as bar:
                groups, began = self._groups(), time.perf_counter()
                while self.step < self.config.steps:
                    if self._agreed(bool(received) or time.monotonic() > limit):
                        break
                    row = self._take_step(loss_of, *next(groups))
                    row["tokens_s"] = row["tokens"] / (time.perf_counter() - began)
                    began = time.perf_counter()
                    if metrics is not None:
                        metrics.write(self.step, **row)
                    bar.set_postfix(loss=f"{row['loss']:.3f}", tok_s=f"{row['tokens_s']:,.0f}")
                    bar.update()
                    if self.step % self.config.validate_every == 0:
                        self._validate(metrics)
                    if self.step % self.config.save_every == 0:
                        self.save()
                        saved = self.step
                    if self.step == saved or self.step % self.config.validate_every == 0:
                        began = time.perf_counter()  # neither belongs to a step
                self.stopped_by = received[0] if received else None
                if saved < self.step:
                    self.save()
        finally:
            self.model.eval()
            if metrics is not None:
                metrics.close()

    def _take_step(self, loss_of: nn.Module, batches: list[Batch], tokens: int) -> dict[str, float]:
        """One step: its loss, its rate, its gradient's norm, its number of words."""
        step, config = self.step + 1, self.config
        self.model.train()
        torch.manual_seed(step_seed(config.seed, step, self.rank))
        total = gradient(loss_of, batches, tokens, precision=config.precision)
        if self.size > 1:
            dist.all_reduce(total)
        loss, nll = (total / tokens).tolist()
        rate = self.schedule(step)
        norm = update(self.optimizer, rate, config.clip_norm, step, loss)
        self.step, self.tokens = step, self.tokens + tokens
        self._advance()
        return {"loss": loss, "nll": nll, "rate": rate, "norm": norm, "tokens": tokens}

    def _groups(self) -> Iterator[tuple[list[Batch], int]]:
        """For each step from here on: this process's micro-batches, and the tokens of all."""
        config, place = self.config, (self.epoch, self.index)
        mine = islice(index_stream(self.batches_of, *place), self.rank, None, self.size)
        loader = iter(
            DataLoader(
                cast(Any, self.data), batch_sampler=mine, collate_fn=collate, num_workers=config.workers,
                worker_init_fn=own_group,
            )  # any iterable of index lists will do
        )  # fmt: skip
        everyone = index_stream(self.batches_of, *place)
        while True:
            rows = [i for batch in islice(everyone, config.accumulate) for i in batch]
            tokens = int(self.data.lengths[rows, 1].sum()) + len(rows)  # and an EOS each
            batches = islice(loader, config.accumulate // self.size)
            yield [batch.to(self.device) for batch in batches], tokens

    def _advance(self) -> None:
        """Move the place behind the micro-batches of one step."""
        self.index += self.config.accumulate
        while self.index >= len(self.batches_of(self.epoch)):
            self.index -= len(self.batches_of(self.epoch))
            self.epoch += 1

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let one run at a time write into the folder; the first process holds the lock."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self.folder / ".lock", timeout=0) if self.rank == 0 else nullcontext():
                yield
        except Timeout:
            raise ValueError(f"another process trains in {self.folder}") from None

    def _check_place(self) -> None:
        """Refuse to overwrite later steps, and to train from different places."""
        later = [path.name for path in list_checkpoints(self.folder) if order(path)[0] > self.step]
        if later and self.rank == 0:
            raise ValueError(
                f"{self.folder} holds later checkpoints than step {self.step}, up to {later[-1]}: "
                "resume, or choose another folder"
            )
        if self.size > 1:
            here = torch.tensor([self.step, self.epoch, self.index], device=self.device)
            least, most = here.clone(), here.clone()
            dist.all_reduce(least, dist.ReduceOp.MIN)
            dist.all_reduce(most, dist.ReduceOp.MAX)
            if not torch.equal(least, most):
                raise ValueError(
                    "the processes stand at different steps, epochs or places: "
                    f"{least.tolist()} to {most.tolist()}"
                )

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop."""
        if self.size == 1:
            return stop
        flag = torch.tensor(float(stop), device=self.device)
        dist.all_reduce(flag)
        return bool(flag)

    def _validate(self, metrics: Metrics | None) -> None:
        """Let the first process evaluate; the others wait."""
        if self.evaluate is not None and metrics is not None:
            self.model.eval()
            metrics.write(self.step, **self.evaluate(self.model))
        if self.size > 1:
            dist.barrier()

    def _bar(self) -> AbstractContextManager[Any]:
        """A progress bar over the steps, on a terminal and in the first process only."""
        from tqdm import tqdm

        hide = None if self.progress and self.rank == 0 else True
        return tqdm(total=self.config.steps, initial=self.step, unit="step", disable=hide)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics so far: a row a step, and a row a validation."""
        return read_metrics(self.folder / "metrics.jsonl")

    def save(self) -> Path | None:
        """Write a checkpoint of this step; in the first process only.

        The newest `keep` regular ones stay, those of every `save_every` steps. One that was written
        because the run was stopped comes on top, and goes when the next one is there. So what
        stays in the end does not depend on when a run was stopped.
        """
        path = None
        if self.rank == 0:
            regular = self.config.save_every
            stops = [p for p in list_checkpoints(self.folder) if order(p)[0] % regular]
            stops = [p for p in stops if order(p)[0] != self.step]
            keep = self.config.keep + len(stops) + bool(self.step % regular)
            state = {"step": self.step, "epoch": self.epoch, "index": self.index,
                     "tokens": self.tokens, "identity": self.identity}  # fmt: skip
            path = save_checkpoint(
                self.folder, self.step, model=self.model, config=self.model.config,
                tokenizer_json=self.tokenizer_json, state=state,
                training=optimizer_tensors(self.model, self.optimizer), keep=keep,
            )  # fmt: skip
            for stop in stops:
                remove(stop)
        if self.size > 1:
            dist.barrier()
        return path

    def resume(self, path: Path | str | None = None, *, force: bool = False) -> bool:
        """Continue from a checkpoint: from `path`, or from the newest one in the folder.

        Returns False if `path` is None and the folder holds none.

        Raises:
            ValueError: the checkpoint belongs to another run; the message lists what differs.
                `force=True` goes on all the same.
            CheckpointError: it is not there, not complete, or damaged.
        """
        chosen = latest_checkpoint(self.folder) if path is None else Path(path)
        if chosen is None:
            return False
        checkpoint = load_checkpoint(chosen, training=True)
        state, tensors = checkpoint.state, checkpoint.training
        if tensors is None:
            raise ValueError(f"{chosen} holds weights alone: there is no training to resume")
        missing = {"step", "epoch", "index", "tokens", "identity"} - state.keys()
        if missing:
            raise ValueError(f"{chosen} was not written by a Trainer: {sorted(missing)} missing")
        differences = list(compare(state["identity"], self.identity))
        if checkpoint.tokenizer_json != self.tokenizer_json:
            differences.append("the tokenizer")
        if differences and not force:
            raise ValueError(f"{chosen} is another run; it differs in " + "; ".join(differences))
        load_weights(self.model, checkpoint.model)
        restore_optimizer(self.model, self.optimizer, tensors)
        self.step, self.tokens = state["step"], state["tokens"]
        self.epoch, self.index = state["epoch"], state["index"]
        if self.index >= len(self.batches_of(self.epoch)):  # forced, and the batches are others
            self.epoch, self.index = self.epoch + 1, 0
        return True

# %%
def default_device() -> str:
    """The GPU of this process, or the CPU."""
    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else "cpu"


def compare(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Where two trees of JSON values differ, as `path: old is now new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from compare(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield f"{path}: {old!r} is now {new!r}"


@torch.no_grad()
def validation_loss(model: Transformer, data: Sequence[Ids], *, max_tokens: int = 4096) -> float:
    """Mean of -log p over the real target tokens of `data`, in nats; no smoothing, no dropout."""
    sampler = TokenBatchSampler(data.lengths, max_tokens, shuffle=False)  # type: ignore[attr-defined]
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        sums = [
            CrossEntropy(0.0)(model, collate([data[i] for i in rows]).to(device))
            for rows in sampler.epoch_batches(0)
        ]
    finally:
        model.train(was_training)
    return float(sum(float(s.nll) for s in sums)) / sum(s.tokens for s in sums)

# %% [markdown]
# Three of the small methods deserve a word. `_groups` yields, for each step, the micro-batches of this process and the number of words of all. `_agreed` asks all processes whether one of them wants to stop: if one stopped alone, the others would wait for it without end. `_identity` lists all that decides the numbers.
#
# `compare` says in which settings two runs differ. A resume with another seed, another model or another tokenizer would go on without an error and give a model that nobody can make again. So it is refused, and the message
# lists the differences.
#
# ## A run
#
# The small language again, with a small model. `train` returns when the last step is done, or when a signal has said stop.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import tempfile
#
# from transformer_annotated import PAPER_BASE, patch
# from transformer_annotated.book import machine, scale
# from transformer_annotated.training.corpora import open_corpus
# from transformer_annotated.training.schedule import cosine
# from transformer_annotated.training.tokens import encode_corpus, train_words
#
# full = scale() == "full"
# toy = open_corpus("toy", "de", "en")
# words = train_words(side for pair in toy.pairs("train") for side in pair)
# corpus = encode_corpus(toy, words)
# SMALL = {
#     "vocab_size": words.vocab_size,
#     "d_model": 64,
#     "n_layers": 2,
#     "self_attention.n_heads": 4,
#     "cross_attention.n_heads": 4,
#     "ffn.d_ff": 128,
#     "dropout": 0.1,
# }
# steps = 240 if full else 12
# SETTINGS = TrainConfig(
#     max_tokens=1024, steps=steps, save_every=steps // 3, validate_every=steps // 4
# )
#
#
# def trainer(folder: str, config: TrainConfig = SETTINGS, **more: Any) -> Trainer:
#     """A trainer with fresh weights, always the same ones."""
#     torch.manual_seed(0)
#     model = Transformer(patch(PAPER_BASE, {**SMALL, **more.pop("change", {})}))
#     return Trainer(
#         model,
#         corpus.splits["train"],
#         config,
#         Path(scratch) / folder,
#         schedule=cosine(4e-3, steps // 4, steps),
#         evaluate=lambda m: {"validation_nll": validation_loss(m, corpus.splits["val"])},
#         **more,
#     )
#
#
# holder = tempfile.TemporaryDirectory()
# scratch = holder.name
# whole = trainer("whole")
# whole.train()
# for row in whole.metrics():
#     if "validation_nll" in row:
#         print(f"step {row['step']:4d}   validation {row['validation_nll']:.3f} nats a word")
# print({name: round(value, 4) for name, value in whole.metrics()[0].items()})
# print(machine())

# %% [markdown]
# The dictionary is one line of the metrics: loss with label smoothing, plain negative log-likelihood, learning rate, norm of the gradient, words, and words a second.

# %% mystnb={"figure": {"caption": "Loss and gradient norm of the run above. The loss falls; the norm of the gradient is high at the start, and jumps most often while the rate is high.", "name": "fig-trainer-run"}, "image": {"alt": "Two curves over the steps of a training run: the loss falls, and the norm of the gradient falls from its highest value and then stays low, with the clipping limit drawn as a line."}} tags=["active-ipynb", "nbval-ignore-output"]
# import matplotlib.pyplot as plt
#
# rows = [row for row in whole.metrics() if "loss" in row]
# checks = [row for row in whole.metrics() if "validation_nll" in row]
# fig, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7))
# left.plot(
#     [row["step"] for row in rows],
#     [row["loss"] for row in rows],
#     label="training, with label smoothing",
# )
# left.plot(
#     [row["step"] for row in checks],
#     [row["validation_nll"] for row in checks],
#     "o-",
#     label="validation",
# )
# left.set(xlabel="step", ylabel="nats a word", ylim=(0, None))
# left.legend()
# right.plot([row["step"] for row in rows], [row["norm"] for row in rows])
# right.axhline(1.0, color="#888888", linewidth=1)
# right.set(xlabel="step", ylabel="norm of the gradient", ylim=(0, None));

# %% [markdown]
# In {numref}`fig-trainer-run` the two losses on the left are not the same thing: training counts smoothing and runs with dropout, validation does neither. On the right, the line at 1 is `clip_norm`. Where the curve is above it, the gradient was shortened to length 1 before the step. The jumps are single batches. Without clipping such a batch would count up to three times as much in Adam's running means.
#
# ## Stopped and resumed
#
# Now the same run in three pieces. The first stops at a third. Then a new trainer is made, with new random weights, as a new process would do it, and goes on from the checkpoint. The third one ends it.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# for until in (steps // 3, steps // 2, steps):
#     part = trainer(
#         "parts", SETTINGS if until == steps else TrainConfig(**{**asdict(SETTINGS), "steps": until})
#     )
#     torch.manual_seed(until)  # a new process has other random numbers
#     print("went on from step", part.step if part.resume() else 0, "to", until)
#     part.train()
#
#
# def trace(run: Trainer) -> list[dict[str, Any]]:
#     """The metrics without the clock."""
#     return [{k: v for k, v in row.items() if k != "tokens_s"} for row in run.metrics()]
#
#
# def equal_weights(a: Trainer, b: Trainer) -> bool:
#     theirs = b.model.state_dict()
#     return all(torch.equal(value, theirs[name]) for name, value in a.model.state_dict().items())
#
#
# assert trace(part) == trace(whole)
# assert equal_weights(part, whole)
# print(
#     "every loss, rate, norm and weight is equal to the last bit; epochs ended on the way:",
#     part.epoch,
# )

# %% [markdown]
# Equal means `torch.equal`, not *close*. The end of an epoch matters: a sampler that forgets the number of the epoch would agree until there.
#
# Now the hard way. The next cell starts a smaller run as a process of its own, kills it with `kill -9` when it is somewhere in the middle, which leaves it no time for anything, and starts it again:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import sys
#
# PROGRAM = """
# import sys
# from pathlib import Path
# import torch
# from transformer_annotated import *
# folder, steps = Path(sys.argv[1]), int(sys.argv[2])
# corpus = EncodedCorpus.load(folder.parent / "corpus.safetensors")
# words = load_tokenizer(corpus.tokenizer_json)
# torch.manual_seed(0)
# sizes = {"vocab_size": words.vocab_size, "d_model": 32, "n_layers": 1, "ffn.d_ff": 64,
#          "self_attention.n_heads": 4, "cross_attention.n_heads": 4}
# trainer = Trainer(
#     Transformer(patch(PAPER_BASE, sizes)), corpus.splits["train"],
#     TrainConfig(max_tokens=512, steps=steps, save_every=5), folder,
#     schedule=inverse_square_root(32, 20), progress=False,
# )
# trainer.resume()
# trainer.train()
# """
#
#
# def start(folder: str, steps: int = 40) -> "subprocess.Popen[bytes]":
#     command = [sys.executable, "-c", PROGRAM, str(Path(scratch) / folder), str(steps)]
#     return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
#
#
# def lines(folder: str) -> list[dict[str, Any]]:
#     rows = read_metrics(Path(scratch) / folder / "metrics.jsonl")
#     return [{k: v for k, v in row.items() if k != "tokens_s"} for row in rows]
#
#
# import subprocess
#
# corpus.save(Path(scratch) / "corpus.safetensors")  # so that each process need not encode it
# assert start("calm").wait() == 0
# victim = start("killed")
# while len(lines("killed")) < 18:
#     time.sleep(0.005)
# victim.kill()
# print("killed with signal", -victim.wait(), "after", len(lines("killed")), "steps")
# assert start("killed").wait() == 0
# assert lines("killed") == lines("calm")
# print("after the second start:", len(lines("killed")), "steps, the same as without the kill")

# %% [markdown]
# The killed run lost the steps since its last checkpoint. It computed them again, and got the same. SIGTERM is the polite form. It loses nothing:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.training.checkpoints import list_checkpoints
#
# victim = start("asked", steps=100_000)
# while len(lines("asked")) < 8:
#     time.sleep(0.005)
# victim.terminate()
# victim.wait()
# last = lines("asked")[-1]["step"]
# print(
#     "steps in the metrics",
#     last,
#     "  newest checkpoint",
#     list_checkpoints(Path(scratch) / "asked")[-1].name,
# )
# assert list_checkpoints(Path(scratch) / "asked")[-1].name == f"step-{last:08d}"

# %% [markdown]
# And a run with another seed is another run:

# %% tags=["active-ipynb"]
# other = trainer("parts", TrainConfig(**{**asdict(SETTINGS), "seed": 1}))
# try:
#     other.resume()
# except ValueError as error:
#     print(str(error).replace(f"{scratch}/", "").split("/")[-1].split(" ", 1)[1])

# %% [markdown]
#
# ## A gradient that is not a number
#
# One NaN among the gradients, and the ordinary way, clip and step, makes every weight NaN (Chapter 16). One infinite element does harm too: the norm is infinite, clipping turns all other gradients into 0, and infinity times 0 is NaN. `update` looks at the norm first.

# %% tags=["active-ipynb"]
# layer = nn.Linear(3, 3)
# before = layer.weight.detach().clone()
# optimizer = adam(layer.parameters())
# layer(torch.ones(1, 3)).sum().backward()
# layer.weight.grad[0, 0] = torch.inf
# try:
#     update(optimizer, 1e-3, 1.0, step=7, loss=2.5)
# except FloatingPointError as error:
#     print(error)
# assert torch.equal(layer.weight, before)

# %% [markdown]
# ## Many micro-batches, or many processes
#
# Equation {eq}`eq-accumulated` says that the gradient of a step does not depend on how its words are divided. Divide one batch of 24 sentences into three very unequal parts, without dropout and in 64-bit numbers:

# %% tags=["active-ipynb"]
# def gradients(batches: list[Batch]) -> dict[str, Tensor]:
#     torch.manual_seed(0)
#     model = Transformer(patch(PAPER_BASE, {**SMALL, "dropout": 0.0})).double()
#     gradient(LossOf(model, CrossEntropy(0.1)), batches, sum(b.n_tokens for b in batches))
#     return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
#
#
# some = corpus.splits["train"][:24]
# whole_batch = gradients([collate(some)])
# in_parts = gradients([collate(some[:1]), collate(some[1:5]), collate(some[5:])])
# worst = max((whole_batch[name] - in_parts[name]).abs().max().item() for name in whole_batch)
# assert worst < 1e-12
# print("largest difference below 1e-12 over", len(whole_batch), "tensors of gradients")

# %% [markdown]
# The same holds for processes, without dropout. With it each process draws its own random numbers, so one process and two give different, equally good runs. `torchrun` starts two of them on this machine. They exchange gradients through *gloo*, PyTorch's library for processors; with GPUs it would be *nccl*. The loop knows about them in few places: `gradient` has the factor $P$ and the waiting, `_groups` deals out the micro-batches, losses and the wish to stop are summed over all processes, and only the first process writes.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# script = Path(scratch) / "script.py"
# two = PROGRAM.replace("max_tokens=512", "accumulate=2, max_tokens=512").replace(
#     '"n_layers": 1,', '"n_layers": 1, "dropout": 0.0,'
# )
# END = """
# print(f"process {trainer.rank} of {trainer.size}")
# if trainer.size > 1:
#     torch.distributed.destroy_process_group()
# """
# script.write_text(two + END)
# alone = [sys.executable, str(script), str(Path(scratch) / "one"), "12"]
# run_two = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
# together = [sys.executable, *run_two, str(script), str(Path(scratch) / "two"), "12"]
# for command in (alone, together):
#     done = subprocess.run(
#         command,
#         env={**os.environ, "OMP_NUM_THREADS": "1"},
#         check=True,
#         capture_output=True,
#         text=True,
#     )
#     print(sorted(done.stdout.splitlines()))
# pairs = list(zip(lines("one"), lines("two"), strict=True))
# worst = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
# print(f"{len(pairs)} steps; largest difference of the losses {worst:.1e}")
# assert worst < 1e-5

# %% [markdown]
# With two processes even the last bit may agree: a sum of two numbers does not depend on their order. With more it does, and then the losses are close and not equal. For the same reason a resume is exact to the last bit on one process and on two; with three and more, `DistributedDataParallel` may add in another order after a restart.
#
# ## What a step costs beside the step
#
# Checks, metrics, seeds and the sampler are work that the five lines of Chapter 10 did not do. How much? Five runs of each, in turn; the median.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from functools import partial
#
# from transformer_annotated.paper.first_translation import train as train_plainly
# from transformer_annotated.paper.multi30k import label_smoothing
#
#
# def seconds(run: Callable[[], Any]) -> float:
#     began = time.perf_counter()
#     run()
#     return time.perf_counter() - began
#
#
# short_run = TrainConfig(max_tokens=1024, steps=20 if full else 3)
# times: dict[str, list[float]] = {"five lines": [], "trainer": []}
# for attempt in range(5 if full else 1):
#     plain = trainer(f"plain-{attempt}", short_run)
#     stream = islice(index_stream(plain.batches_of, 0, 0), short_run.steps)
#     batches = [collate([corpus.splits["train"][i] for i in rows]) for rows in stream]
#     loss = label_smoothing(0.1)
#     times["five lines"].append(
#         seconds(
#             partial(train_plainly, plain.model, batches, learning_rate=plain.schedule, loss=loss)
#         )
#     )
#     times["trainer"].append(seconds(trainer(f"timed-{attempt}", short_run).train))
# for name, values in times.items():
#     print(f"{name:12s}{sorted(values)[len(values) // 2] / short_run.steps * 1000:8.1f} ms a step")

# %% [markdown]
# Compare the two lines. This is not the pure cost of the checks: the trainer also makes its batches and writes a checkpoint at the end, but it saves time in the loss, which it computes at real positions only (Chapter 15).
#
# Now the temporary folder may go.

# %% tags=["active-ipynb"]
# holder.cleanup()

# %% [markdown]
# ## What the paper did
#
# | | paper, section 5 | here |
# |---|---|---|
# | hardware | 8 P100 GPUs, one machine | one process, or several through `torchrun` |
# | batch | about 25,000 + 25,000 tokens over the 8 GPUs | `max_tokens` × `accumulate`, over all processes |
# | precision | not stated | 32 bits, or bfloat16 for the forward pass |
# | clipping | none mentioned | norm 1 by default; `clip_norm=None` for none |
# | checkpoints | every 10 minutes | every `save_every` steps, so that they do not depend on the clock |
#
# Half precision with 16-bit *floats* (float16) needs a factor that keeps small gradients above zero, and steps that are skipped when it was too large {cite:p}`micikevicius2018mixed`. bfloat16 has the range of 32 bits and needs none, so there is no such factor here.
#
# ## How it breaks
#
# - *The shuffle is not restored.* The resumed run sees some sentences twice in the epoch and others not at all. The loss looks normal. Only a comparison with an uninterrupted run shows it. If only the *number of the epoch* is lost, even that comparison agrees until the first epoch ends.
# - *The optimiser is not restored.* The running means start empty, and the first steps are far too long or too short (Chapter 16).
# - *The schedule counts micro-batches.* Warm-up is over too early, by the factor `accumulate`.
# - *A mean of means.* Words in small micro-batches count more than words in large ones. The loss is not even wrong by much.
# - *A step before the check.* One NaN in the gradient, clipped and stepped, and every weight is NaN.
# - *Checkpoints that are written in place.* The kill comes while the file is half written, and the old one is gone (Chapter 18).
#
# ## Takeaways
#
# - Batches and random numbers are functions of the seed and the step. Then a resume needs the step, the place, the weights and the optimiser's memory.
# - Sum the losses, divide once by all words of the step.
# - Look at the norm before the update. It is finite only if everything is.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 19.1.** Two micro-batches have 10 and 90 words, with mean losses of 4.0 and 2.0 nats a word. What is the loss of the step? And the mean of the means? Answer with both.

# %% tags=["active-ipynb"]
# answer = ...
# check("19.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [(10 * 4.0 + 90 * 2.0) / 100, (4.0 + 2.0) / 2]
# check("19.1", answer)

# %% [markdown]
# **Exercise 19.2.** A run uses `accumulate=4` on 2 processes, and takes 500 steps. How many micro-batches has each process seen, and what is the argument of the schedule at the last step? `accumulate` counts over all processes. Answer with two numbers.

# %% tags=["active-ipynb"]
# answer = ...
# check("19.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = [500 * 4 // 2, 500]
# check("19.2", answer)

# %% [markdown]
# **Exercise 19.3.** Write a function `place(batches, step, accumulate)` that returns the epoch and the index of the next batch after `step` steps, where `batches(epoch)` is the list of batches of an epoch. Epochs may differ in length.

# %% tags=["active-ipynb"]
# answer = ...
# check("19.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def place(batches: Callable[[int], list[Any]], step: int, accumulate: int) -> tuple[int, int]:
#     epoch, index = 0, step * accumulate
#     while index >= len(batches(epoch)):
#         index -= len(batches(epoch))
#         epoch += 1
#     return epoch, index
#
#
# answer = place
# check("19.3", answer)
