"""The loop: exact resume, the gradient of a step, what is refused, signals, processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transformer_annotated import (
    PAPER_BASE,
    CheckpointError,
    CrossEntropy,
    LossSum,
    TrainConfig,
    Trainer,
    Transformer,
    adam,
    inverse_square_root,
    list_checkpoints,
    load_checkpoint,
    patch,
)
from transformer_annotated.paper.toy import Batch, collate
from transformer_annotated.training import trainer as module
from transformer_annotated.training.tokens import EncodedSplit
from transformer_annotated.training.trainer import (
    LossOf,
    compare,
    gradient,
    index_stream,
    optimizer_tensors,
    read_metrics,
    restore_optimizer,
    step_seed,
    stop_on_signal,
    update,
    validation_loss,
)

ROOT = Path(__file__).resolve().parent.parent
V = 23
SIZES = {
    "vocab_size": V, "d_model": 16, "n_layers": 1, "self_attention.n_heads": 2,
    "cross_attention.n_heads": 2, "ffn.d_ff": 32, "dropout": 0.1,
}  # fmt: skip
CONFIG = TrainConfig(max_tokens=40, steps=12, save_every=5, validate_every=4, keep=3)


def data(n: int = 40, seed: int = 1) -> EncodedSplit:
    """`n` random pairs of one to seven words, the target a copy of the source."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (n,), generator=draw)
    ids = torch.randint(4, V, (int(lengths.sum()),), generator=draw, dtype=torch.int32)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    return EncodedSplit((ids, ids.clone()), (offsets, offsets.clone()), [], [])


def build(folder: Path, config: TrainConfig = CONFIG, **changes: Any) -> Trainer:
    """A trainer of a tiny model with fresh, fixed weights."""
    torch.manual_seed(0)
    model = Transformer(patch(PAPER_BASE, {**SIZES, **changes.pop("model", {})}))
    settings: dict[str, Any] = {
        "schedule": inverse_square_root(16, 10),
        "device": "cpu",
        "progress": False,
        **changes,
    }
    return Trainer(model, data(), config, folder, **settings)


def trace(folder: Path) -> list[tuple[Any, ...]]:
    """What the metrics say, without the clock."""
    rows = read_metrics(folder / "metrics.jsonl")
    return [tuple((k, v) for k, v in row.items() if k != "tokens_s") for row in rows]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_checkpoint(list_checkpoints(folder)[-1]).model


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps without interruption; it passes the end of an epoch."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = build(folder, evaluate=evaluation)
    trainer.train()
    assert trainer.epoch >= 1
    return folder


def evaluation(model: Transformer) -> dict[str, float]:
    """A validation that also disturbs the random numbers."""
    assert not model.training
    torch.rand(3)
    return {"validation_nll": validation_loss(model, data(8, seed=2))}


# -- exact resume ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", range(1, 12))
def test_resume_is_exact_at_every_step(stop: int, whole: Path, tmp_path: Path) -> None:
    """Losses, rates, norms, validations and weights: equal to the last bit."""
    build(tmp_path, replace(CONFIG, steps=stop), evaluate=evaluation).train()
    torch.manual_seed(99)  # another process would have other random numbers
    second = build(tmp_path, evaluate=evaluation)
    assert second.resume()
    assert second.step == stop
    second.train()
    assert trace(tmp_path) == trace(whole)
    assert same(weights(tmp_path), weights(whole))


def test_resume_twice_from_one_checkpoint_gives_one_trace(whole: Path, tmp_path: Path) -> None:
    first = list_checkpoints(whole)[0]
    results = []
    for name in ("a", "b"):
        trainer = build(tmp_path / name, evaluate=evaluation)
        assert trainer.resume(first)
        trainer.train()
        results.append((trace(tmp_path / name), weights(tmp_path / name)))
    assert results[0][0] == results[1][0] == trace(whole)[-len(results[0][0]) :]
    assert same(results[0][1], results[1][1])
    assert same(results[0][1], weights(whole))


@pytest.mark.parametrize("missing", ["exp_avg/", "exp_avg_sq/", "step/", "index", "epoch"])
def test_everything_that_is_saved_matters(missing: str, whole: Path, tmp_path: Path) -> None:
    """Without any one part of the state the resumed run is another run."""
    trainer = build(tmp_path)
    trainer.resume(list_checkpoints(whole)[-2])
    if missing.endswith("/"):
        for state in trainer.optimizer.state.values():
            state[missing[:-1]].zero_()
    else:
        setattr(trainer, missing, 0)
    trainer.train()
    assert not same(weights(tmp_path), weights(whole))


def test_resume_is_exact() -> None:
    """An interrupted run equals an uninterrupted one."""
    steps = 7
    with tempfile.TemporaryDirectory() as name:
        one, two = Path(name, "one"), Path(name, "two")
        build(one, replace(CONFIG, steps=steps)).train()
        build(two, replace(CONFIG, steps=3)).train()
        second = build(two, replace(CONFIG, steps=steps))
        second.resume()
        second.train()
        assert trace(one) == trace(two)
        assert same(weights(one), weights(two))


SCRIPT = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.test_trainer import CONFIG, build, evaluation
config = replace(CONFIG, steps=int(sys.argv[2]), save_every=2, workers=int(sys.argv[3]))
trainer = build(Path(sys.argv[1]), config, evaluate=evaluation)
trainer.resume()
trainer.train()
sys.exit(0 if trainer.stopped_by is None else 128 + trainer.stopped_by)
"""
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder: Path, steps: int, workers: int = 0) -> "subprocess.Popen[str]":
    """The run as a process, in a process group of its own."""
    command = [sys.executable, "-c", SCRIPT, str(folder), str(steps), str(workers)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def wait_for_steps(folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        rows = read_metrics(folder / "metrics.jsonl")
        if rows and rows[-1]["step"] >= steps:
            return
        time.sleep(0.002)
    raise AssertionError("the run did not get that far")


@pytest.mark.slow
def test_killed_and_resumed_is_the_run_that_was_not_killed(tmp_path: Path) -> None:
    """kill -9 in the middle, twice; then the rest. Steps 1 to 60 are the same as in one go."""
    steps = 60
    build(
        tmp_path / "whole", replace(CONFIG, steps=steps, save_every=2), evaluate=evaluation
    ).train()
    folder = tmp_path / "killed"
    for until in (9, 31):
        process = start(folder, 10_000)
        wait_for_steps(folder, until)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()  # type: ignore[union-attr]
    assert list_checkpoints(folder)
    done = start(folder, steps)
    assert done.communicate()[1] == ""
    assert done.returncode == 0
    assert trace(folder) == trace(tmp_path / "whole")
    assert same(weights(folder), weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 0), (signal.SIGTERM, 1)]
)
def test_a_signal_finishes_the_step_and_saves(number: int, workers: int, tmp_path: Path) -> None:
    """Sent to the whole process group, as a terminal, torchrun and a cluster do it."""
    process = start(tmp_path, 100_000, workers)
    wait_for_steps(tmp_path, 3)
    os.killpg(process.pid, number)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + number
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).step == last


def test_the_second_signal_acts_as_usual() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signal() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_stops_and_saves(tmp_path: Path) -> None:
    trainer = build(tmp_path, replace(CONFIG, minutes=1e-9))
    trainer.train()
    assert trainer.step == 0
    assert trainer.stopped_by is None
    trainer = build(tmp_path, replace(CONFIG, steps=10**9, minutes=0.002))
    trainer.train()
    assert 0 < trainer.step < 10**9
    assert load_checkpoint(list_checkpoints(tmp_path)[-1]).step == trainer.step


# -- what a resume refuses -------------------------------------------------------------------------


def test_a_resume_of_another_run_is_refused(whole: Path, tmp_path: Path) -> None:
    changed = [
        build(tmp_path, replace(CONFIG, seed=1)),
        build(tmp_path, replace(CONFIG, accumulate=2)),
        build(tmp_path, model={"d_model": 32}),
        build(tmp_path, identity={"corpus": "another"}),
        build(tmp_path, objective=CrossEntropy(0.2)),
        build(tmp_path, tokenizer_json='{"kind": "other"}'),
    ]
    words = ["train.seed: 0 is now 1", "accumulate", "d_model", "another", "smoothing", "tokenizer"]
    for trainer, word in zip(changed, words, strict=True):
        before = {name: p.clone() for name, p in trainer.model.named_parameters()}
        with pytest.raises(ValueError, match=word):
            trainer.resume(list_checkpoints(whole)[-1])
        assert trainer.step == 0
        assert same(dict(trainer.model.named_parameters()), before)
    assert changed[0].resume(list_checkpoints(whole)[-1], force=True)


def test_how_long_and_how_often_may_change(whole: Path, tmp_path: Path) -> None:
    longer = replace(CONFIG, steps=14, save_every=3, validate_every=2, keep=4)
    trainer = build(tmp_path, longer)
    assert trainer.resume(list_checkpoints(whole)[-1])
    trainer.train()
    assert trainer.step == 14


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert not build(tmp_path).resume()
    with pytest.raises(CheckpointError):
        build(tmp_path).resume(tmp_path / "step-00000099")


def test_other_data_another_optimizer_and_a_function(whole: Path, tmp_path: Path) -> None:
    """Same sizes, other ids; another optimiser; and an objective that is a plain function."""
    last = list_checkpoints(whole)[-1]
    turned = data()
    turned.ids = (turned.ids[0].flip(0), turned.ids[1].flip(0))
    other = build(tmp_path)
    trainer = Trainer(
        other.model, turned, CONFIG, tmp_path, schedule=other.schedule, device="cpu", progress=False
    )
    with pytest.raises(ValueError, match="data"):
        trainer.resume(last)
    with pytest.raises(ValueError, match="optimizer"):
        build(tmp_path, optimizer=torch.optim.SGD(other.model.parameters())).resume(last)
    assert "0x" not in json.dumps(build(tmp_path, objective=plain_objective).identity)


def plain_objective(model: Transformer, batch: Batch) -> LossSum:
    return CrossEntropy(0.1)(model, batch)


def test_a_used_folder_is_not_overwritten(whole: Path, tmp_path: Path) -> None:
    """Without a resume, or after a resume from an older checkpoint, later steps are in the way."""
    shutil.copytree(whole, tmp_path / "used")
    before = trace(tmp_path / "used")
    trainer = build(tmp_path / "used")
    with pytest.raises(ValueError, match="later checkpoints than step 0"):
        trainer.train()
    trainer.resume(list_checkpoints(tmp_path / "used")[0])
    with pytest.raises(ValueError, match="later checkpoints than step 5"):
        trainer.train()
    assert trace(tmp_path / "used") == before


def test_one_run_at_a_time_in_a_folder(tmp_path: Path) -> None:
    from filelock import FileLock

    trainer = build(tmp_path)
    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another process trains"):
        trainer.train()
    assert trainer.step == 0
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_stays_does_not_depend_on_when_a_run_was_stopped(whole: Path, tmp_path: Path) -> None:
    """Checkpoints of a stop come on top of the regular ones, and go at the next one."""
    for until in (1, 4, 6, 7, 11, 12):
        trainer = build(tmp_path, replace(CONFIG, steps=until), evaluate=evaluation)
        trainer.resume()
        trainer.train()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == [path.name for path in list_checkpoints(whole)]
    assert names == ["step-00000005", "step-00000010", "step-00000012"]


def test_a_forced_resume_with_other_batches_goes_on_at_an_epoch(tmp_path: Path) -> None:
    build(tmp_path, replace(CONFIG, steps=4)).train()
    trainer = build(tmp_path, replace(CONFIG, steps=6, max_tokens=400))
    assert trainer.resume(force=True)
    assert trainer.index < len(trainer.batches_of(trainer.epoch))


def test_a_forced_resume_into_another_model_changes_nothing(whole: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path, model={"ffn.d_ff": 24})
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match="ffn"):
        trainer.resume(list_checkpoints(whole)[-1], force=True)
    assert same(dict(trainer.model.named_parameters()), before)
    assert trainer.step == 0


def test_compare_names_the_path() -> None:
    old, new = {"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": None}
    assert list(compare(old, new)) == ["a.c: 2 is now 3"]


# -- the gradient of a step ------------------------------------------------------------------------


def grads(batches: list[Batch], tokens: int | None = None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = Transformer(patch(PAPER_BASE, {**SIZES, "dropout": 0.0})).double()
    total = sum(b.n_tokens for b in batches) if tokens is None else tokens
    gradient(LossOf(model, CrossEntropy(0.1)), batches, total)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    """Three micro-batches of very different size: each word counts the same."""
    pairs = [data(40)[i] for i in range(12)]
    whole = grads([collate(pairs)])
    parts = grads([collate(pairs[:1]), collate(pairs[1:3]), collate(pairs[3:])])
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12)


def test_one_step_of_the_trainer_is_one_step_by_hand(tmp_path: Path) -> None:
    """With two micro-batches, clipping and the schedule's rate, against a loop written out."""
    config = replace(CONFIG, steps=3, accumulate=2, clip_norm=0.5)
    trainer = build(tmp_path, config, model={"dropout": 0.0})
    torch.manual_seed(0)
    model = Transformer(trainer.model.config)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98), eps=1e-9)
    stream = index_stream(trainer.batches_of, 0, 0)
    rate = inverse_square_root(16, 10)
    trainer.train()
    for step in range(1, 4):
        rows = [i for _ in range(2) for i in next(stream)]
        batch = collate([trainer.data[i] for i in rows])
        model.train()
        logits = model(batch.src, batch.tgt_in, src_padding=batch.src_padding)[batch.tgt_padding]
        target = batch.tgt_out[batch.tgt_padding]
        loss = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 0.5 / float(norm))
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
        row = trainer.metrics()[step - 1]
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["norm"] == pytest.approx(float(norm), rel=1e-4)
        assert row["rate"] == rate(step)
        assert row["tokens"] == batch.n_tokens
    theirs = dict(model.named_parameters())
    for name, mine in trainer.model.named_parameters():
        if (
            "k_proj.bias" not in name
        ):  # softmax ignores it: its gradient is noise, which Adam scales
            torch.testing.assert_close(mine, theirs[name], rtol=1e-3, atol=2e-5)


def test_one_update_per_step() -> None:
    """After twelve micro-batches in four steps the schedule stands at four."""
    with tempfile.TemporaryDirectory() as name:
        trainer = build(Path(name), replace(CONFIG, steps=4, accumulate=3))
        asked: list[int] = []
        schedule = trainer.schedule
        trainer.schedule = lambda step: asked.append(step) or schedule(step)
        trainer.train()
        assert asked == [1, 2, 3, 4]
        counts = {int(s["step"]) for s in trainer.optimizer.state.values()}
        assert counts == {4}
        assert [row["step"] for row in trainer.metrics()] == [1, 2, 3, 4]


def test_every_pair_once_an_epoch(tmp_path: Path) -> None:
    trainer = build(tmp_path)
    first = trainer.batches_of(0)
    assert sorted(i for batch in first for i in batch) == list(range(len(trainer.data)))
    trainer = build(tmp_path, replace(CONFIG, steps=len(first)))
    trainer.train()
    assert (trainer.epoch, trainer.index) == (1, 0)
    assert trainer.tokens == int(trainer.data.lengths[:, 1].sum()) + len(trainer.data)


def test_bfloat16_keeps_the_weights_in_float32(tmp_path: Path) -> None:
    trainer = build(tmp_path, replace(CONFIG, steps=2, precision="bfloat16"))
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {s["exp_avg"].dtype for s in trainer.optimizer.state.values()} == {torch.float32}


def test_it_learns_to_copy(tmp_path: Path) -> None:
    config = TrainConfig(max_tokens=200, steps=60, save_every=60, validate_every=60)
    trainer = build(tmp_path, config, schedule=lambda step: 5e-3, model={"dropout": 0.0})
    trainer.train()
    rows = [row for row in trainer.metrics() if "nll" in row]
    assert rows[-1]["nll"] < 0.8 * rows[0]["nll"]
    assert not trainer.model.training


# -- not finite ------------------------------------------------------------------------------------


class Broken(CrossEntropy):
    """An objective that fails at one call: in the loss, or only in the gradient."""

    calls, at, where = 0, 3, "loss"

    def __call__(self, model: Transformer, batch: Batch) -> LossSum:
        sums = super().__call__(model, batch)
        Broken.calls += 1
        if Broken.calls == Broken.at:
            weight = next(model.parameters())
            if Broken.where == "loss":
                return replace(sums, loss=sums.loss * float("nan"))
            # the slope of a root at 0 is infinite, and 0 times that is not a number
            return replace(sums, loss=sums.loss + (weight.flatten()[0] * 0).sqrt() * 0)
        return sums


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(where: str, tmp_path: Path) -> None:
    Broken.calls, Broken.where = 0, where
    trainer = build(tmp_path, replace(CONFIG, save_every=2), objective=Broken())
    with pytest.raises(FloatingPointError, match="step 3"):
        trainer.train()
    assert trainer.step == 2
    assert [row["step"] for row in trainer.metrics()] == [1, 2]
    saved = load_checkpoint(list_checkpoints(tmp_path)[-1])
    assert saved.step == 2
    assert same(dict(trainer.model.state_dict()), saved.model)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_update_refuses_without_touching_anything() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = adam([weight])
    weight.grad = torch.tensor([1.0, float("inf"), 1.0])
    with pytest.raises(FloatingPointError, match="step 7"):
        update(optimizer, 0.1, 1.0, 7, 2.0)
    assert torch.equal(weight.data, torch.ones(3))
    assert not optimizer.state


# -- state, metrics, bad input ---------------------------------------------------------------------


def test_the_optimizers_state_comes_back() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    tensors = {name: value.clone() for name, value in optimizer_tensors(model, optimizer).items()}
    assert set(tensors) == {
        f"{kind}/{name}"
        for kind in ("step", "exp_avg", "exp_avg_sq")
        for name in ("weight", "bias")
    }
    fresh = adam(model.parameters())
    restore_optimizer(model, fresh, tensors)
    assert same(optimizer_tensors(model, fresh), tensors)
    with pytest.raises(ValueError, match="other"):
        restore_optimizer(model, fresh, {"step/other": torch.zeros(())})


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.5}]
    assert read_metrics(tmp_path / "none.jsonl") == []
    (tmp_path / "bad.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="damaged line"):
        read_metrics(tmp_path / "bad.jsonl")
    metrics = module.Metrics(tmp_path, 1)
    metrics.write(2, loss=2.0)
    metrics.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_line_of_a_lost_step_is_written_once() -> None:
    """A kill leaves metrics of steps that no checkpoint holds; the resumed run repeats them."""
    with tempfile.TemporaryDirectory() as name:
        for step, written in ((0, (1, 2, 3)), (2, (3, 4))):
            metrics = module.Metrics(Path(name), step)
            for n in written:
                metrics.write(n, loss=1.0)
            metrics.close()
        rows = read_metrics(Path(name, "metrics.jsonl"))
        assert [row["step"] for row in rows] == [1, 2, 3, 4]


def test_tensorboard_events(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    build(tmp_path, replace(CONFIG, steps=2), tensorboard=True).train()
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_random_numbers_of_a_step() -> None:
    seeds = {step_seed(s, n, r) for s in range(4) for n in range(50) for r in range(4)}
    assert len(seeds) == 4 * 50 * 4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"steps": 0}, "steps"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"accumulate": 0}, "accumulate"),
        ({"keep": 1}, "keep"),
        ({"precision": "float16"}, "precision"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"save_every": 0}, "save_every"),
        ({"workers": -1}, "workers"),
        ({"minutes": 0.0}, "minutes"),
        ({"clip_norm": float("nan")}, "clip_norm"),
    ],
)
def test_bad_settings(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        replace(CONFIG, **change)


def test_validation_loss_is_the_mean_over_words() -> None:
    torch.manual_seed(0)
    model, pairs = Transformer(patch(PAPER_BASE, SIZES)), data(11)
    model.train()
    got = validation_loss(model, pairs, max_tokens=16)
    assert model.training
    model.eval()
    losses = []
    for pair in pairs:
        b = collate([pair])
        with torch.no_grad():
            logits = model(b.src, b.tgt_in)[0]
        losses.append(torch.nn.functional.cross_entropy(logits, b.tgt_out[0], reduction="none"))
    assert got == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


# -- several processes -----------------------------------------------------------------------------

PROCESSES = """
import sys
from dataclasses import replace
from pathlib import Path
import torch.distributed as dist
from tests.test_trainer import CONFIG, build
config = replace(CONFIG, steps=8, accumulate=2, save_every=4)
trainer = build(Path(sys.argv[1]), config, model={"dropout": 0.0})
trainer.resume()
trainer.train()
if dist.is_initialized():
    dist.destroy_process_group()
"""


def torchrun(folder: Path, script: Path, processes: int) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={processes}", str(script), str(folder),
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Through DistributedDataParallel and gloo: the same losses, to 1e-5."""
    script = tmp_path / "script.py"
    script.write_text(PROCESSES)
    torchrun(tmp_path / "two", script, 2)
    config = replace(CONFIG, steps=8, accumulate=2, save_every=4)
    build(tmp_path / "one", config, model={"dropout": 0.0}).train()
    one, two = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        assert a["tokens"] == b["tokens"]
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["norm"] == pytest.approx(b["norm"], rel=1e-3)
    assert json.dumps(load_checkpoint(list_checkpoints(tmp_path / "two")[-1]).state["step"]) == "8"


def test_more_processes_than_micro_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "join_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="accumulate must be a multiple of the 2 processes"):
        build(tmp_path)


def test_the_number_of_processes_belongs_to_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout is drawn for each process, so a run with another number of them is another run."""
    config = replace(CONFIG, accumulate=2)
    build(tmp_path, replace(config, steps=2)).train()
    monkeypatch.setattr(module, "join_world", lambda: (0, 2))
    with pytest.raises(ValueError, match="processes: 1 is now 2"):
        build(tmp_path, config).resume()
