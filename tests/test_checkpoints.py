"""Chapter 18: what a checkpoint holds, what a crash and a full disk leave, what damage does."""

import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.reference import assert_close, draw
from tests.variants import SMALL, VARIANTS, build, run, sentence
from transformer_annotated import Transformer, patch
from transformer_annotated.training import checkpoints as chapter
from transformer_annotated.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    average_checkpoints,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
)

TINY = patch(
    SMALL,
    {
        "d_model": 4,
        "n_layers": 1,
        "ffn.d_ff": 4,
        "self_attention.n_heads": 2,
        "cross_attention.n_heads": 2,
    },
)
TOKENIZER = '{"words": ["süß", "sweet"]}\n'
FILES = ["model.safetensors", "state.json", "tokenizer.json", "training.safetensors"]


@contextlib.contextmanager
def empty_folder() -> Iterator[Path]:
    """A folder for one run. (Mutants call tests without fixtures, so there is no tmp_path.)"""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name) / "run"


def tiny(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(TINY)


def save(folder: Path, step: int, model: nn.Module | None = None, **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "model": tiny(step) if model is None else model,
        "config": TINY,
        "tokenizer_json": TOKENIZER,
        "state": {"epoch": step},
        "training": {"moment": torch.full((3,), float(step or 0))},
        **changes,
    }
    return save_checkpoint(folder, step, **arguments)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


# What is in it


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_comes_back(name: str) -> None:
    variant, model = VARIANTS[name], build(name, dropout=0.3)
    with empty_folder() as folder:
        path = save(folder, 7, model, config=model.config)
        checkpoint = load_checkpoint(path)
    copy = checkpoint.build()
    assert checkpoint.config == model.config
    assert checkpoint.training is None
    assert equal(copy.state_dict(), model.state_dict())
    assert not copy.training
    src, tgt = sentence(5, 1), sentence(4, 2)
    assert torch.equal(run(variant.kind, copy, src, tgt), run(variant.kind, model, src, tgt))


def test_everything_comes_back_as_it_was() -> None:
    table = torch.randn(4, 3)
    training = {
        "float64": draw(2, 3, seed=1, dtype=torch.float64),
        "bfloat16": torch.randn(5).bfloat16(),
        "float16": torch.randn(5).half(),
        "count": torch.tensor(2**62 + 1),
        "bool": torch.tensor([True, False]),
        "generator": torch.get_rng_state(),
        "nothing": torch.empty(0, 3),
        "special": torch.tensor([float("inf"), float("-inf"), -0.0, 1e-45]),
        "turned": table.T,
        "table": table,
        "row": table[1],
    }
    state = {"ä": [1, 0.1, None, True, "x"], "n": 2**70, "deep": {"a": {"b": []}}, "pair": (1, 2)}
    with empty_folder() as folder:
        path = save(folder, 123, state=state, training=training)
        checkpoint = load_checkpoint(path, training=True)
        assert names(path) == ["SHA256SUMS", *FILES]
    assert path == folder / "step-00000123"
    assert (checkpoint.path, checkpoint.step) == (path, 123)
    assert checkpoint.tokenizer_json == TOKENIZER
    assert checkpoint.tokenizer_sha256 == hashlib.sha256(TOKENIZER.encode()).hexdigest()
    assert checkpoint.state == {**state, "pair": [1, 2]}
    assert checkpoint.training is not None
    assert equal(checkpoint.training, training)
    checkpoint.training["row"].zero_()  # what was shared is no longer shared
    assert torch.equal(checkpoint.training["table"], table)


def test_the_sums_are_those_of_sha256sum() -> None:
    with empty_folder() as folder:
        path = save(folder, 1)
        for line in (path / "SHA256SUMS").read_text().splitlines():
            digest, name = line.split("  ")
            assert digest == hashlib.sha256((path / name).read_bytes()).hexdigest()
        assert [line.split()[1] for line in (path / "SHA256SUMS").read_text().splitlines()] == FILES


def test_the_state_is_plain_json() -> None:
    with empty_folder() as folder:
        document = json.loads((save(folder, 5) / "state.json").read_text("utf-8"))
    assert document["version"] == 1
    assert document["step"] == 5
    assert document["state"] == {"epoch": 5}
    assert document["config"]["config"]["d_model"] == 4


def test_the_tied_head_owns_no_weight() -> None:
    with empty_folder() as folder:
        checkpoint = load_checkpoint(save(folder, 1))
    assert [name for name in checkpoint.model if name.startswith("head")] == []
    model = checkpoint.build()
    before = model.logits(torch.ones(1, 1, 4))
    with torch.no_grad():
        model.embedding.get_parameter("tokens.weight").mul_(2)
    assert torch.equal(model.logits(torch.ones(1, 1, 4)), 2 * before)


def test_saving_and_building_leave_the_random_generator_alone() -> None:
    """Otherwise a run would depend on how often it was saved."""
    model = tiny()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with empty_folder() as folder:
        load_checkpoint(save(folder, 1, model)).build()
    assert torch.equal(torch.rand(4), expected)


def test_a_model_on_its_way_to_be_used_has_its_own_memory() -> None:
    with empty_folder() as folder:
        checkpoint = load_checkpoint(save(folder, 1))
    first, second = checkpoint.build(), checkpoint.build()
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    assert equal(second.state_dict(), checkpoint.model)
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_kept_or_asked_for(dtype: torch.dtype) -> None:
    with empty_folder() as folder:
        checkpoint = load_checkpoint(save(folder, 1, tiny(1).to(dtype)))
    assert {tensor.dtype for tensor in checkpoint.model.values()} == {dtype}
    assert {p.dtype for p in checkpoint.build().parameters()} == {dtype}
    assert {p.dtype for p in checkpoint.build(dtype=torch.float32).parameters()} == {torch.float32}
    assert {p.device.type for p in checkpoint.build(device="cpu").parameters()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_from_the_gpu_loads_on_the_cpu() -> None:
    with empty_folder() as folder:
        model = tiny().to("cuda")
        checkpoint = load_checkpoint(save(folder, 1, model, training={"m": torch.ones(2).cuda()}))
    assert {tensor.device.type for tensor in checkpoint.model.values()} == {"cpu"}
    assert {p.device.type for p in checkpoint.build(device="cuda").parameters()} == {"cuda"}


# Damage


def check_damage(damage: Callable[[bytes, int], bytes], stride: int) -> None:
    """A change of any file at any place is noticed, with one kind of error, and nothing else is."""
    with empty_folder() as folder:
        path = save(folder, 1)
        for name in ["SHA256SUMS", *FILES]:
            file, data = path / name, (path / name).read_bytes()
            for place in range(0, len(data), stride if len(data) > 1000 else 1):
                file.write_bytes(damage(data, place))
                with pytest.raises(CheckpointError) as told:
                    load_checkpoint(path, training=True)
                assert path in (told.value.path, told.value.path.parent)
                assert str(told.value) == f"{told.value.path}: {told.value.reason}"
            file.write_bytes(data)
        load_checkpoint(path, training=True)


def test_every_flipped_bit_is_noticed() -> None:
    check_damage(
        lambda data, i: data[:i] + bytes([data[i] ^ (1 << (i % 8))]) + data[i + 1 :], stride=3
    )


def test_every_truncation_is_noticed() -> None:
    check_damage(lambda data, i: data[:i], stride=7)


def test_text_after_the_end_is_noticed() -> None:
    check_damage(lambda data, i: data + b"\n" * (i + 1), stride=501)


@pytest.mark.parametrize("name", ["SHA256SUMS", *FILES])
def test_a_missing_file_is_noticed(name: str) -> None:
    with empty_folder() as folder:
        path = save(folder, 1)
        (path / name).unlink()
        assert list_checkpoints(folder) == []
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(path)


def test_a_checkpoint_asked_for_must_exist() -> None:
    with empty_folder() as folder:
        save(folder, 1)
        with pytest.raises(CheckpointError, match="there is no such checkpoint"):
            load_checkpoint(folder / "step-00000002")
        with pytest.raises(CheckpointError, match="SHA256SUMS"):
            load_checkpoint(folder / "step-00000001" / "state.json")


def test_using_a_model_does_not_read_what_only_training_needs() -> None:
    with empty_folder() as folder:
        path = save(folder, 1)
        (path / "training.safetensors").write_bytes(b"damaged")
        assert load_checkpoint(path).training is None
        with pytest.raises(CheckpointError, match="damaged: 7 bytes"):
            load_checkpoint(path, training=True)


def test_a_checkpoint_without_training_state_cannot_be_continued() -> None:
    with empty_folder() as folder:
        path = save(folder, 1, training=None)
        assert names(path) == ["SHA256SUMS", *FILES[:3]]
        load_checkpoint(path)
        with pytest.raises(CheckpointError, match="no training state"):
            load_checkpoint(path, training=True)


def forge(path: Path, name: str, data: bytes) -> None:
    """Change a file and its sum: what someone would do who wants to be believed."""
    old = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / name).write_bytes(data)
    sums = (path / "SHA256SUMS").read_text()
    (path / "SHA256SUMS").write_text(sums.replace(old, hashlib.sha256(data).hexdigest()))


class Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(Path(tempfile.gettempdir()) / "executed-by-pickle"),)


def test_a_pickle_is_not_executed() -> None:
    import pickle

    trap = Path(tempfile.gettempdir()) / "executed-by-pickle"
    assert not trap.exists()
    with empty_folder() as folder:
        path = save(folder, 1)
        forge(path, "model.safetensors", pickle.dumps(Trap()))
        with pytest.raises(CheckpointError, match="not understood"):
            load_checkpoint(path)
    assert not trap.exists()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1,\n "step"', '"version": 2,\n "step"'),
        ('"version": 1,\n "step"', '"version": null,\n "step"'),
        ('"step": 1', '"stop": 1'),
        ('"LayerNorm"', '"os.system"'),
        ('"d_model": 4', '"d_model": -4'),
        ("{", "["),
    ],
)
def test_a_forged_description_is_one_error(old: str, new: str) -> None:
    with empty_folder() as folder:
        path = save(folder, 1)
        text = (path / "state.json").read_text("utf-8")
        assert old in text
        forge(path, "state.json", text.replace(old, new, 1).encode())
        with pytest.raises(CheckpointError, match="not understood"):
            load_checkpoint(path)


def changed(change: Callable[[dict[str, Tensor]], Any]) -> Checkpoint:
    with empty_folder() as folder:
        checkpoint = load_checkpoint(save(folder, 1))
    weights = dict(checkpoint.model)
    change(weights)
    return replace(checkpoint, model=weights)


def test_weights_that_do_not_fit_are_listed() -> None:
    name, both = "encoder.layers.0.ffn.up.weight", "encoder.layers.0.ffn.up.bias"

    def rename(weights: dict[str, Tensor]) -> None:
        weights["somewhere.else"] = weights.pop(name)
        del weights[both]

    with pytest.raises(CheckpointError) as told:
        changed(rename).build()
    for wrong in (f"{name} is missing", f"{both} is missing", "somewhere.else is unexpected"):
        assert wrong in str(told.value)


def test_another_vocabulary_is_named_with_both_shapes() -> None:
    wrong = changed(lambda weights: weights.update({"embedding.tokens.weight": torch.zeros(17, 4)}))
    with pytest.raises(CheckpointError) as told:
        wrong.build()
    assert "embedding.tokens.weight is (17, 4) instead of (13, 4)" in str(told.value)


def test_nothing_is_copied_where_something_does_not_fit() -> None:
    model = tiny(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {**tiny(2).state_dict(), "more": torch.ones(1)}
    with pytest.raises(ValueError, match="more is unexpected"):
        load_weights(model, weights)
    assert equal(model.state_dict(), before)


def test_another_tokenizer_is_refused() -> None:
    with empty_folder() as folder:
        checkpoint = load_checkpoint(save(folder, 1))
    checkpoint.check_tokenizer(hashlib.sha256(TOKENIZER.encode()).hexdigest())
    with pytest.raises(CheckpointError, match="trained with tokenizer"):
        checkpoint.check_tokenizer(hashlib.sha256(b"{}").hexdigest())


# What is refused before anything is touched


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": 1}, "keep must be a whole number of at least 2, got 1"),
        ({"keep": 0}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": 2.0}, "keep must be"),
        ({"tokenizer_json": "<bpe>"}, "tokenizer_json must be JSON text"),
        ({"tokenizer_json": None}, "tokenizer_json must be JSON text"),
        ({"state": {"loss": float("nan")}}, "state must hold JSON values and finite numbers"),
        ({"state": {"loss": float("inf")}}, "state must hold JSON values and finite numbers"),
        ({"state": {"rng": object()}}, "state must hold JSON values"),
        ({"state": {"text": "\ud800"}}, "state must hold JSON values"),
        ({"state": {"scores": {100: 0.5}}}, "state must have text as keys"),
        ({"training": {"moment": [1.0]}}, "training must map names to tensors"),
        ({"training": {3: torch.ones(1)}}, "training must map names to tensors"),
        ({"config": patch(TINY, {"vocab_size": 14})}, r"is \(13, 4\) instead of \(14, 4\)"),
        ({"model": nn.Linear(2, 2)}, "model must fit config, but .* is missing"),
        ({"model": nn.Sequential(tiny())}, "0.embedding.tokens.weight is unexpected"),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(changes: dict[str, Any], message: str) -> None:
    with empty_folder() as folder:
        save(folder, 1)
        before = names(folder)
        with pytest.raises(ValueError, match=message) as told:
            save(folder, 2, **changes)
        assert not isinstance(told.value, CheckpointError)
        assert names(folder) == before


@pytest.mark.parametrize("step", [-1, 1.0, "1", None, True])
def test_steps_are_counted(step: Any) -> None:
    with empty_folder() as folder:
        with pytest.raises(ValueError, match="step must be a whole number of at least 0"):
            save(folder, step, tiny())
        assert names(folder) == []


def test_a_folder_must_have_a_name() -> None:
    with pytest.raises(ValueError, match="folder must be"):
        save("", 1)  # type: ignore[arg-type]


# Which are kept, and which is the newest


@pytest.mark.parametrize("keep", [2, 3])
def test_the_last_ones_stay(keep: int) -> None:
    with empty_folder() as folder:
        for step in (8, 9, 10, 11, 99_999_999, 100_000_000):
            save(folder, step, keep=keep)
        left = list_checkpoints(folder)
        steps = [chapter.order(path)[0] for path in left]
        assert steps == [11, 99_999_999, 100_000_000][-keep:]
        assert names(folder) == sorted(path.name for path in left)
        assert latest_checkpoint(folder) == folder / "step-100000000"


def test_later_steps_of_an_abandoned_run_stay() -> None:
    with empty_folder() as folder:
        for step in (100, 200, 300, 400):
            save(folder, step, keep=9)
        assert save(folder, 250) in list_checkpoints(folder)
        assert [chapter.order(p)[0] for p in list_checkpoints(folder)] == [200, 250, 300, 400]


def test_the_same_step_is_replaced() -> None:
    with empty_folder() as folder:
        for seed in (1, 2):
            path = save(folder, 5, tiny(seed))
        assert equal(load_checkpoint(path).model, tiny(2).state_dict())
        assert names(folder) == [path.name]
        (path / "SHA256SUMS").unlink()  # a damaged one, too
        assert equal(load_checkpoint(save(folder, 5, tiny(3))).model, tiny(3).state_dict())
        assert names(folder) == [path.name]


def test_no_checkpoint_is_no_error() -> None:
    with empty_folder() as folder:
        assert latest_checkpoint(folder) is None
        assert list_checkpoints(folder) == []
        folder.mkdir()
        (folder / "metrics.jsonl").write_text("{}")
        (folder / "step-1").mkdir()  # not one of ours
        (folder / "step-00000001.txt").mkdir()
        assert latest_checkpoint(folder) is None


def test_a_damaged_newest_one_is_passed_over_loudly() -> None:
    with empty_folder() as folder:
        good, newest = save(folder, 1), save(folder, 2)
        (newest / "training.safetensors").write_bytes(b"")
        with pytest.warns(UserWarning, match=r"passed over.*step-00000002.*0 bytes"):
            assert latest_checkpoint(folder) == good
        (newest / "SHA256SUMS").unlink()
        assert list_checkpoints(folder) == [good]
        with pytest.warns(UserWarning, match=r"passed over.*no complete checkpoint"):
            assert latest_checkpoint(folder) == good


def test_where_all_are_damaged_nobody_starts_anew() -> None:
    with empty_folder() as folder:
        for step in (1, 2):
            (save(folder, step) / "model.safetensors").write_bytes(b"")
        warning = pytest.warns(UserWarning, match="passed over")
        with warning, pytest.raises(CheckpointError, match="none of its 2"):
            latest_checkpoint(folder)


# Crashes


def in_a_fork(action: Callable[[], object]) -> int:
    """Run `action` in a copy of this process, and return the copy's exit status."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and forks
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dying_at(operation: int, folder: Path, action: Callable[[], object]) -> Callable[[], None]:
    """`action`, killed just before its n-th operation on files below `folder`."""

    def run_and_die() -> None:
        left = operation

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        action()

    return run_and_die


def newest(folder: Path) -> Path:
    """The newest checkpoint; none had to be passed over."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            latest = latest_checkpoint(folder)
    except (UserWarning, CheckpointError) as error:
        pytest.fail(f"a damaged checkpoint: {error}")
    assert latest is not None, "no checkpoint is left"
    return latest


def check_a_crash(before: list[int], step: int) -> None:
    """Killed before any operation on a file, a save leaves the old state or the new one, whole."""
    models = {(s, seed): tiny(100 * s + seed) for s in [*before, step] for seed in (0, 1)}
    with empty_folder() as folder:
        for operation in range(1, 200):
            shutil.rmtree(folder, ignore_errors=True)
            for s in before:
                save(folder, s, models[s, 0])
            (folder / ".partial-step-00000001").mkdir()
            status = in_a_fork(
                dying_at(operation, folder, lambda: save(folder, step, models[step, 1]))
            )
            if status == 0:
                break
            assert status == -signal.SIGKILL
            latest = newest(folder)
            checkpoint = load_checkpoint(latest, training=True)
            states = [(before[-1], 0), (step, 1)]
            found = [
                state
                for state in states
                if (checkpoint.step, equal(checkpoint.model, models[state].state_dict()))
                == (state[0], True)
            ]
            assert len(found) == 1, "neither the old nor the new checkpoint"
            # and the next save cleans up
            final = save(folder, step + 1, models[step, 1])
            assert final in list_checkpoints(folder)
            assert len(list_checkpoints(folder)) == len(names(folder)) == 2
        assert operation > 12, "a save consists of more operations"


@pytest.mark.parametrize(("before", "step"), [([1, 2], 3), ([2], 2), ([1, 2], 2)])
def test_a_crash_at_any_operation_leaves_a_whole_checkpoint(before: list[int], step: int) -> None:
    with mock.patch.object(chapter, "fsync"):  # a killed program loses nothing that it has written
        check_a_crash(before, step)


def test_killed_at_a_random_moment_a_checkpoint_always_remains() -> None:
    draw_moment = random.Random(0)
    with empty_folder() as folder:
        save(folder, 0)

        def save_for_ever() -> None:
            model, step = tiny(), 0
            while True:
                step += 1
                save(folder, step, model)

        for _ in range(10):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                pid = os.fork()
            if pid == 0:
                save_for_ever()
            time.sleep(draw_moment.uniform(0.01, 0.05))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            load_checkpoint(newest(folder), training=True).build()


def test_a_leftover_is_ignored_and_then_removed() -> None:
    with empty_folder() as folder:
        path = save(folder, 1)
        shutil.copytree(path, folder / ".partial-step-00000009")
        assert list_checkpoints(folder) == [path]
        assert latest_checkpoint(folder) == path
        save(folder, 2)
        assert names(folder) == ["step-00000001", "step-00000002"]


def test_the_disk_has_everything_before_the_name_is_given() -> None:
    """And the name itself, before the call returns and before an older one is deleted."""
    log: list[str] = []
    real_fsync, real_rename, real_rmtree = chapter.fsync, Path.rename, shutil.rmtree

    def fsync(path: Path) -> None:
        log.append(f"fsync {path.name}")
        real_fsync(path)

    def rename(path: Path, target: Path) -> Path:
        assert path.parent == target.parent, "another folder can be another file system"
        log.append(f"rename {path.name} {target.name}")
        return real_rename(path, target)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        log.append(f"rmtree {path.name}")
        real_rmtree(path, ignore_errors=ignore_errors)

    with empty_folder() as folder:
        save(folder, 1)
        save(folder, 2)
        with (
            mock.patch.object(chapter, "fsync", fsync),
            mock.patch.object(Path, "rename", rename),
            mock.patch.object(shutil, "rmtree", rmtree),
            mock.patch.dict(os.environ, {"TMPDIR": "/nowhere"}),
        ):
            save(folder, 3)
    given = log.index("rename .partial-step-00000003 step-00000003")
    for name in ["SHA256SUMS", *FILES, ".partial-step-00000003"]:
        assert f"fsync {name}" in log[:given], f"{name} was not written through"
    assert log[given + 1] == "fsync run"
    assert "rename step-00000001 .partial-step-00000001" in log[given + 2 :]


# Errors while saving


def check_a_failure(folder: Path, message: str) -> CheckpointError:
    """A save that fails leaves the older checkpoints as they are, and nothing else."""
    before = {path: load_checkpoint(path).model for path in list_checkpoints(folder)}
    with pytest.raises(CheckpointError, match=message) as told:
        save(folder, 3)
    assert names(folder) == [path.name for path in before]
    assert all(equal(load_checkpoint(path).model, before[path]) for path in before)
    return told.value


def test_a_full_disk_is_an_error_with_path_and_size() -> None:
    """The system refuses files above a limit, as it does when the disk is full."""
    with empty_folder() as folder:
        size = (save(folder, 1) / "model.safetensors").stat().st_size
        save(folder, 2)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, hard))
        try:
            error = check_a_failure(folder, f"could not write {size:,} bytes: File too large")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert error.path.name == "model.safetensors"
        assert isinstance(error.__cause__, OSError)
        save(folder, 3)


@pytest.mark.parametrize("operation", ["open", "fsync", "mkdir", "rename"])
def test_a_refusal_is_an_error(operation: str) -> None:
    where: Any = os if operation == "fsync" else Path
    with empty_folder() as folder:
        save(folder, 1)
        save(folder, 2)
        real = getattr(where, operation)

        def refuse(*arguments: Any, **options: Any) -> Any:
            if operation == "open" and "xb" not in arguments:
                return real(*arguments, **options)  # reading is allowed
            raise PermissionError(13, "Permission denied")

        with mock.patch.object(where, operation, refuse):
            check_a_failure(folder, "Permission denied")
        save(folder, 3)


def test_a_file_in_the_way_is_an_error() -> None:
    with empty_folder() as folder:
        folder.write_text("a file")
        with pytest.raises(CheckpointError, match=r"step-00000003: could not be saved"):
            save(folder, 3)
        assert folder.read_text() == "a file"


def test_an_interruption_leaves_nothing_behind() -> None:
    with empty_folder() as folder:
        save(folder, 1)
        with (
            mock.patch.object(chapter, "write", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            save(folder, 2)
        assert names(folder) == ["step-00000001"]


def test_one_that_cannot_be_deleted_is_a_warning() -> None:
    with empty_folder() as folder:
        save(folder, 1)
        save(folder, 2)
        with (
            mock.patch.object(chapter, "remove", side_effect=[None, PermissionError(13, "no")]),
            pytest.warns(UserWarning, match="step-00000001: could not be deleted: no"),
        ):
            save(folder, 3)
        assert len(list_checkpoints(folder)) == 3


def test_one_error_can_travel_between_processes() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(CheckpointError("a/b", "why")))
    assert (str(error), error.path, error.reason) == ("a/b: why", Path("a/b"), "why")


# Averages


def test_the_average_is_the_mean_in_double_precision() -> None:
    models = [tiny(seed) for seed in range(5)]
    for seed, model in enumerate(models):
        for name, parameter in model.named_parameters():
            with torch.no_grad():  # large numbers that cancel, and small ones between them
                parameter.copy_(draw(*parameter.shape, seed=(seed, name)))
                parameter.add_([2.0**25, 0.0, 0.0, 0.0, -(2.0**25)][seed])
    with empty_folder() as folder:
        paths = [save(folder, step, model, keep=9) for step, model in enumerate(models)]
        average = average_checkpoints(paths)
        assert equal(average_checkpoints(paths[:1]), models[0].state_dict())
        assert equal(load_checkpoint(paths[0]).model, models[0].state_dict())
    for name, ours in average.items():
        rows = [model.state_dict()[name].double() for model in models]
        assert ours.dtype == torch.float32
        assert_close(ours.double(), torch.stack(rows).mean(dim=0), name, 1e-6)


def test_an_average_in_half_precision_is_rounded_once() -> None:
    models = [tiny(seed).bfloat16() for seed in range(3)]
    with empty_folder() as folder:
        paths = [save(folder, step, model, keep=9) for step, model in enumerate(models)]
        average = average_checkpoints(paths)
    for name, ours in average.items():
        rows = [model.state_dict()[name].double() for model in models]
        assert torch.equal(ours, torch.stack(rows).mean(dim=0).bfloat16()), name


def test_only_checkpoints_of_one_kind_are_averaged() -> None:
    wide = patch(TINY, {"ffn.d_ff": 8})
    with empty_folder() as folder:
        path = save(folder, 1, keep=9)
        other = save(folder, 2, Transformer(wide), config=wide, keep=9)
        words = save(folder, 3, tokenizer_json="[]", keep=9)
        dropped = save(folder, 4, config=patch(TINY, {"dropout": 0.5}), keep=9)
        for wrong, message in (
            (other, "config is not that of"),
            (dropped, "config is not that of"),
            (words, "trained with tokenizer"),
            (folder / "step-00000009", "no such checkpoint"),
        ):
            with pytest.raises(CheckpointError, match=message):
                average_checkpoints([path, wrong])
        for paths in ([], [path, path], [path, folder / "x" / ".." / path.name]):
            with pytest.raises(ValueError, match="paths must be different checkpoints"):
                average_checkpoints(paths)
