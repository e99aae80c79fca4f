# %% [markdown]
r"""
# Checkpoints

A checkpoint is what remains of a run when the machine stops. This chapter writes one so that it is whole or absent,
reads it so that no damage goes unnoticed, and averages several into one better model.
"""

# %% [markdown]
# The next chapter builds a loop for runs of hours. Hours are long enough for a power cut, a full disk, or a colleague who needs the machine. What we have then is what lies on the disk. So before the loop, the disk.

# %% mystnb={"figure": {"caption": "Chapter 18 of Part II: what remains on the disk.", "name": "fig-map-checkpoints"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The seventh, Checkpoints, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(18);

# %%
import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transformer_annotated.paper.parts import from_json, to_json
from transformer_annotated.paper.transformer import Config, Transformer

# %% [markdown]
# ## Two ways to lose a model
#
# Take four weights. Save them, train a little, save them again under the same name. The second time, the machine stops in the middle.

# %% tags=["active-ipynb"]
# import tempfile
#
# from safetensors import SafetensorError
# from safetensors.torch import load, save
#
# folder = Path(tempfile.mkdtemp())
# file = folder / "model.safetensors"
# file.write_bytes(save({"w": torch.tensor([1.0, 2.0, 3.0, 4.0])}))
# new = save({"w": torch.tensor([1.5, 2.5, 3.5, 4.5])})
# file.write_bytes(new[: len(new) // 2])  # the machine stops here
# try:
#     load(file.read_bytes())
# except SafetensorError as error:
#     print("neither the old weights nor the new ones:", error)

# %% [markdown]
# The old model was given up before the new one was there. At least we were told. The second way is silent. One bit of the file changes: a bad cable, an old disk.

# %% tags=["active-ipynb"]
# data = bytearray(new)
# data[-1] ^= 0b0010_0000  # one bit of the last number
# file.write_bytes(data)
# print(load(file.read_bytes())["w"].tolist())

# %% [markdown]
# The last weight was 4.5. Nobody complained. The file has its right form, and a format checks no more than that. The model would translate badly, and we would look for the reason in the code.
#
# These are the two duties of a checkpoint. It must be **whole or absent**: at no moment may half of one be found where a whole one is looked for. And it must be **checked**: what is read must be what was written, or an error.
#
# ## Whole or absent
#
# A **rename** is something that a file system does at once. Before it the name does not exist. After it the name exists, with the whole content. There is no moment in between. So we write everything under another name, and rename at the very end.
#
# Two details matter. The other name must be in the same folder: a rename to another disk is a copy, and a copy takes time. And a file that is written is at first only in memory. The operating system puts it on the disk when it likes, possibly *after* the rename {cite:p}`pillai2014all`. `fsync` waits until the disk has it.

# %%
MODEL, TRAINING = "model.safetensors", "training.safetensors"
STATE, TOKENIZER, SUMS = "state.json", "tokenizer.json", "SHA256SUMS"
VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint that could not be written, or that is missing, damaged or not what was asked for.

    `path` says which file or folder, and `reason` what is wrong with it.
    """

    def __init__(self, path: Path | str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = Path(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"

# %% [markdown]
# One kind of error for everything that can be wrong with a checkpoint, with the path and the reason apart. Whoever catches it need not know which library failed.

# %%
def fsync(path: Path) -> None:
    """Return when the disk itself has what was written to `path`, a file or a folder."""
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, data: bytes) -> str:
    """Write a new file, wait until the disk has it, and return its SHA-256 in hexadecimal."""
    try:
        with path.open("xb") as file:
            file.write(data)
        fsync(path)
    except OSError as error:
        reason = f"could not write {len(data):,} bytes: {error.strerror}"
        raise CheckpointError(path, reason) from error
    return hashlib.sha256(data).hexdigest()

# %% [markdown]
# `"xb"` refuses to write over a file. The sum that `write` returns comes back below. A full disk is an error here, with the size that did not fit, and never a shorter file.
#
# Now the context manager that gives the name.

# %%
def remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that half of one is never found."""
    if path.exists():
        nameless = path.with_name(f".partial-{path.name}")
        path.rename(nameless)
        shutil.rmtree(nameless)


@contextmanager
def whole_or_absent(path: Path) -> Iterator[Path]:
    """Inside the block: an empty folder beside `path`. After it: that folder, named `path`.

    An error removes the folder. A crash leaves it under a temporary name, which nobody reads and
    the next call removes. What was called `path` before can be read throughout.
    """
    partial, old = path.with_name(f".partial-{path.name}"), path.with_name(f"{path.name}.old")
    try:
        for stale in path.parent.glob(".partial-*"):
            shutil.rmtree(stale)
        partial.mkdir(parents=True)
        yield partial
        fsync(partial)
        if path.exists():
            remove(old)
            path.rename(old)
        partial.rename(path)
        fsync(path.parent)
        remove(old)
    except OSError as error:
        raise CheckpointError(path, f"could not be saved: {error.strerror}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)

# %% [markdown]
# Read it as a list of moments, and ask at each: what if the power fails *now*?
#
# Before the last rename, the new checkpoint has only its hidden name, and the older ones are untouched. After it, the new one is there. A folder cannot be renamed onto another that holds something, so a checkpoint that is replaced steps aside first, as `step-00000300.old`, and readers accept that name too. Deletion goes the other way round: a checkpoint loses its name first, and its files afterwards.
#
# ## What is in it
#
# Text is kept apart from tensors, and what everyone needs from what only training needs.
#
# | file | holds | who reads it |
# |---|---|---|
# | `model.safetensors` | the weights | everyone |
# | `state.json` | step, config, counters | everyone |
# | `tokenizer.json` | how text becomes ids | everyone |
# | `training.safetensors` | the optimiser's two running means (its *moments*, Chapter 16) | who goes on training |
# | `SHA256SUMS` | a sum for each file above | who checks |
#
# PyTorch's own `torch.save` writes a *pickle*: a program that rebuilds an object, so reading one means running it. No file here holds one. A pickle is a program that rebuilds an object, so reading one means running it. A `safetensors` file is a header of JSON, with names, shapes and offsets, and then the numbers.

# %%
def to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as the bytes of a safetensors file; where two share memory, each is written."""
    from safetensors.torch import save

    rows: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        row = tensor.detach().cpu().contiguous()
        place = row.untyped_storage().data_ptr()
        rows[name] = row.clone() if place in places else row
        places.add(place)
    return save(rows, metadata={"format": "pt"})


def as_json(name: str, value: Any) -> bytes:
    """`value` as JSON text. Raises ValueError for what would not come back, NaN included."""

    def plain(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: plain(entry) for key, entry in node.items()}
        return [plain(entry) for entry in node] if isinstance(node, (list, tuple)) else node

    try:
        text = json.dumps(plain(value), allow_nan=False, indent=1, ensure_ascii=False)
        data = text.encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must hold JSON values and finite numbers: {error}") from error
    if json.loads(text) != plain(value):
        raise ValueError(f"{name} must have text as keys: JSON turns every other key into text")
    return data

# %% [markdown]
# JSON is stricter than Python here, on purpose. NaN is no JSON, though Python would write it. And the key `100` would come back as the text `"100"`, so it is refused. Better now than after the crash.

# %% tags=["active-ipynb"]
# for wrong in ({"loss": float("nan")}, {"scores": {100: 0.5}}, {"when": {1, 2}}):
#     try:
#         as_json("state", wrong)
#     except ValueError as error:
#         print(error)

# %% [markdown]
# The same thought, for the weights. A checkpoint that cannot be loaded should not be written. `skeleton` builds the config's model on the device `meta`, where tensors have a shape and no numbers, and `differences` compares. This finds a wrong vocabulary. It also finds a model inside a wrapper: `DistributedDataParallel` (Chapter 19) puts `module.` before every name, `torch.compile` puts `_orig_mod.`.

# %%
def differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """What keeps the weights `found` from fitting a model with the weights `expected`."""
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name} is unexpected" for name in found if name not in expected]
    return wrong + [
        f"{name} is {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]


def skeleton(config: Config) -> dict[str, Tensor]:
    """Names and shapes of the weights of a config's model, without memory for the numbers."""
    with torch.device("meta"):
        return Transformer(config).state_dict()

# %%
def check_saving(
    step: int,
    keep: int,
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer_json: str,
    training: Mapping[str, Tensor],
) -> None:
    """Raise ValueError for arguments of `save_checkpoint` from which nothing could be loaded."""
    for name, value, least in (("step", step, 0), ("keep", keep, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    if wrong := differences(skeleton(config), weights):
        raise ValueError(f"model must fit config, but {'; '.join(wrong)}")
    try:
        json.loads(tokenizer_json)
    except (TypeError, ValueError) as error:
        raise ValueError(f"tokenizer_json must be JSON text, got {tokenizer_json!r:.60}") from error
    for key, tensor in training.items():
        if not isinstance(key, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"training must map names to tensors, got {key!r}: {tensor!r:.60}")

# %% [markdown]
# Now saving is short: check everything, then write five files, then give the name, then tidy up.

# %%
def save_checkpoint(
    folder: Path | str,
    step: int,
    *,
    model: nn.Module,
    config: Config,
    tokenizer_json: str,
    state: Mapping[str, Any],
    training: Mapping[str, Tensor] | None,
    keep: int = 2,
) -> Path:
    """Save a checkpoint as `folder/step-00001234`; return its path once the disk has it.

    A checkpoint of the same step is replaced. Of those with fewer steps, the newest `keep - 1`
    stay, and the others are deleted at the very end. One process at a time may save here.

    Args:
        folder: where the run keeps its checkpoints; made if it is not there.
        step: the number of updates taken.
        model: its `state_dict` is saved, and must fit `config`.
        config: what the model was built from.
        tokenizer_json: the tokenizer, as JSON text.
        state: what else it takes to go on, as JSON values: counters, options, the best score. A
            tuple comes back as a list.
        training: tensors that only going on needs, such as the optimizer's moments. None for a checkpoint that is only used.
        keep: how many checkpoints stay, at least 2.

    Raises:
        ValueError: an argument from which nothing could be loaded; nothing has been touched.
        CheckpointError: the disk is full, or refuses; older checkpoints are intact.
    """
    if not str(folder):
        raise ValueError("folder must be the path of a folder, got an empty text")
    weights = model.state_dict()
    check_saving(step, keep, config, weights, tokenizer_json, training or {})
    path = Path(folder) / f"step-{step:08d}"
    description = {"version": VERSION, "step": step, "config": json.loads(to_json(config))}
    state_json = as_json("state", {**description, "state": state})
    with whole_or_absent(path) as partial:
        sums = {
            MODEL: write(partial / MODEL, to_bytes(weights)),
            STATE: write(partial / STATE, state_json),
            TOKENIZER: write(partial / TOKENIZER, tokenizer_json.encode("utf-8")),
        }
        if training is not None:
            sums[TRAINING] = write(partial / TRAINING, to_bytes(training))
        lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
        write(partial / SUMS, "".join(lines).encode("ascii"))
    retire(path, keep)
    return path

# %% [markdown]
# What is kept? The new checkpoint and the `keep - 1` before it, never fewer than two. While one is being written another must be whole, and if a disk has damaged the newest, there is something to fall back on. Checkpoints with more steps, left by a run that was given up, are not deleted: they are not older.

# %%
NAME = re.compile(r"step-(\d{8,})(\.old)?")


def order(path: Path) -> tuple[int, bool]:
    """Where a checkpoint stands among others: its step first; step -1 for what is none."""
    match = NAME.fullmatch(path.name)
    return (-1, False) if match is None else (int(match[1]), match[2] is None)


def named(folder: Path | str) -> list[Path]:
    """Everything in a folder that has a checkpoint's name, oldest first."""
    return sorted((p for p in Path(folder).glob("step-*") if order(p) >= (0, False)), key=order)


def retire(newest: Path, keep: int) -> None:
    """Delete what is older than `newest` but for the last `keep - 1`. Warns where it cannot."""
    earlier = [path for path in list_checkpoints(newest.parent) if order(path) < order(newest)]
    last_of_each_step = {order(path)[0]: path for path in earlier}
    kept = list(last_of_each_step.values())[1 - keep :]
    for path in earlier:
        try:
            if path not in kept:
                remove(path)
        except OSError as error:
            warnings.warn(f"{path}: could not be deleted: {error.strerror}", stacklevel=3)

# %% [markdown]
# Which folders count? Those that are **complete**: `SHA256SUMS` is there and has the exact form that we gave it, and every file that it lists is there. Damage can hit that file as well, so its form is not trusted.

# %%
LINE = re.compile(rb"([0-9a-f]{64})  ([a-z.]+)\n")


def read_sums(path: Path) -> dict[str, str]:
    """The files of a checkpoint and their sums; all of them are there, but not read yet."""
    if not path.exists():
        raise CheckpointError(path, "there is no such checkpoint")
    try:
        data = (path / SUMS).read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"no complete checkpoint: {SUMS}: {error.strerror}") from error
    lines = LINE.findall(data)
    names = [name.decode() for _, name in lines]
    whole = b"".join(b"%s  %s\n" % line for line in lines) == data
    if not whole or names not in ([MODEL, STATE, TOKENIZER], [MODEL, STATE, TOKENIZER, TRAINING]):
        raise CheckpointError(path / SUMS, "damaged: it does not list a checkpoint's files")
    for name in (MODEL, STATE, TOKENIZER, TRAINING):
        if (path / name).is_file() != (name in names):
            problem = "missing" if name in names else f"not listed in {SUMS}"
            raise CheckpointError(path, f"no complete checkpoint: {name} is {problem}")
    return {name: digest.decode() for (digest, _), name in zip(lines, names, strict=True)}

# %%
def list_checkpoints(folder: Path | str) -> list[Path]:
    """The complete checkpoints of a folder, oldest first. Their contents are not checked."""

    def complete(path: Path) -> bool:
        try:
            return bool(read_sums(path))
        except CheckpointError:
            return False

    return [path for path in named(folder) if complete(path)]

# %% [markdown]
# To see it work, a small model with random weights, and three saves.

# %% tags=["active-ipynb"]
# from transformer_annotated import PAPER_BASE, patch
#
# SMALL = {
#     "vocab_size": 100,
#     "d_model": 16,
#     "n_layers": 1,
#     "self_attention.n_heads": 2,
#     "cross_attention.n_heads": 2,
#     "ffn.d_ff": 32,
# }
# config = patch(PAPER_BASE, SMALL)
# torch.manual_seed(0)
# model = Transformer(config)
#
#
# def save_small(step: int, model: Transformer = model) -> Path:
#     moments = {f"exp_avg/{name}": torch.zeros_like(p) for name, p in model.named_parameters()}
#     return save_checkpoint(
#         folder / "run",
#         step,
#         model=model,
#         config=config,
#         tokenizer_json='{"words": ["sweet"]}',
#         state={"epoch": 0, "tokens": 25_000 * step},
#         training=moments,
#     )
#
#
# for step in (100, 200, 300):
#     path = save_small(step)
# print([p.name for p in list_checkpoints(folder / "run")])
# for file in sorted(path.iterdir()):
#     print(f"{file.stat().st_size:8,} bytes  {file.name}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print((path / "SHA256SUMS").read_text())

# %% [markdown]
# This is the format of a tool that stands on nearly every Unix machine. `sha256sum --check SHA256SUMS` verifies a checkpoint without Python.
#
# What happened on the disk, moment by moment? We save once more and look at the folder at every rename, every `fsync` and every deletion.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from unittest import mock
#
# history: list[dict[str, bool]] = []  # at each moment: name, and whether it is whole
#
#
# def watched(name: str) -> Any:
#     real = getattr(os, name)
#
#     def operation(*arguments: Any, **options: Any) -> Any:
#         result = real(*arguments, **options)
#         whole = list_checkpoints(folder / "run")
#         history.append({p.name: p in whole for p in (folder / "run").iterdir()})
#         return result
#
#     return mock.patch.object(os, name, operation)
#
#
# with watched("mkdir"), watched("fsync"), watched("rename"), watched("unlink"), watched("rmdir"):
#     save_small(400)
# fewest = min(sum(moment.values()) for moment in history)
# print(f"{len(history)} moments, never fewer than {fewest} whole checkpoints")
# assert fewest == 2

# %% mystnb={"figure": {"caption": "A save, operation by operation. At every moment at least two whole checkpoints (blue) have a name; what is incomplete (grey) has none that a reader looks at.", "name": "fig-save"}, "image": {"alt": "Five rows, one a name, over the operations of a save. Two checkpoints exist from the start. A hidden partial folder grows and becomes the newest checkpoint; then the oldest loses its name and disappears."}} tags=["active-ipynb"]
# import matplotlib.pyplot as plt
#
# rows = sorted({name for moment in history for name in moment}, key=lambda n: (n[-8:], n[0] != "."))
# fig, ax = plt.subplots(figsize=(7.2, 2.3))
# for y, name in enumerate(rows):
#     for x, moment in enumerate(history):
#         if name in moment:
#             ax.barh(y, 1, left=x, color=figures.COLORS[0] if moment[name] else "#BBBBBB")
# ax.set_yticks(range(len(rows)), rows)
# ax.set(xlabel="operation on the disk", xlim=(0, len(history)))
# ax.grid(False, axis="y");

# %% [markdown]
# Read {numref}`fig-save` from left to right. The new checkpoint grows in grey, under a name that begins with a dot. At the rename this row ends, and the blue row of its final name begins. Only then does the oldest one lose its name, and its files are deleted under a hidden one.
#
# ## Checked
#
# Reading starts with `SHA256SUMS`. A **hash** such as SHA-256 makes 256 bits of any number of bytes. If one bit of the input changes, about half of the 256 bits change. What was checked is what is parsed: `read_verified` returns the bytes themselves. If the file were read again for parsing, it could have changed by then.

# %%
def read_verified(path: Path, digest: str) -> bytes:
    """The bytes of a file. Raises CheckpointError unless their SHA-256 is `digest`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(path, f"could not be read: {error.strerror}") from error
    if (found := hashlib.sha256(data).hexdigest()) != digest:
        reason = f"damaged: {len(data):,} bytes with SHA-256 {found[:12]}..., not {digest[:12]}..."
        raise CheckpointError(path, reason)
    return data

# %% [markdown]
# In memory, a checkpoint is a value with the file's contents, and it can build its model.

# %%
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: every tensor on the CPU, in the precision it was saved in.

    Attributes:
        path: the folder it came from.
        step: the number of updates taken.
        config: what the model is built from.
        model: the model's weights by name.
        tokenizer_json: the tokenizer, as JSON text.
        state: the JSON values that were saved with it.
        training: the tensors that only going on needs; None where they were not asked for.
    """

    path: Path
    step: int
    config: Config
    model: dict[str, Tensor] = field(repr=False)
    tokenizer_json: str = field(repr=False)
    state: dict[str, Any] = field(repr=False)
    training: dict[str, Tensor] | None = field(repr=False, default=None)

    @property
    def tokenizer_sha256(self) -> str:
        """The SHA-256 of the tokenizer's JSON text, in hexadecimal."""
        return hashlib.sha256(self.tokenizer_json.encode("utf-8")).hexdigest()

    def check_tokenizer(self, sha256: str) -> None:
        """Raise CheckpointError unless the model was trained with the tokenizer of this sum."""
        if sha256 != self.tokenizer_sha256:
            reason = f"trained with tokenizer {self.tokenizer_sha256[:12]}..., not {sha256[:12]}..."
            raise CheckpointError(self.path, reason)

    def build(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> Transformer:
        """The model in evaluation mode, in the saved precision or in `dtype`.

        It has its own memory, and the random generators are as before.
        """
        with torch.random.fork_rng(devices=[]):
            model = Transformer(self.config)
        try:
            load_weights(model, self.model)
        except ValueError as error:
            raise CheckpointError(self.path, str(error)) from error
        return model.to(device=device, dtype=dtype).eval()


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy `weights` into `model`, which takes over their precision.

    Raises ValueError unless the names and shapes are exactly the model's; nothing has been copied.
    """
    own = model.state_dict(keep_vars=True)
    if wrong := differences(own, weights):
        raise ValueError(f"the weights do not fit the model: {'; '.join(wrong)}")
    for name, tensor in own.items():
        tensor.data = tensor.data.to(weights[name].dtype)
    model.load_state_dict(dict(weights), strict=True)

# %% [markdown]
# `build` makes the model. Names and shapes must agree exactly; a vocabulary of another size is an error that names the tensor and both shapes. PyTorch would silently turn a 64-bit weight into a 32-bit one, so the model takes over the precision of the file. And since building a model draws random weights, which are thrown away at once, the random generator is put back: loading must not change what a run draws next.

# %%
def load_checkpoint(path: Path | str, *, training: bool = False) -> Checkpoint:
    """Read a checkpoint. `training` says whether to read what only going on needs, too.

    Every byte that is read is checked against its sum first; nothing in a checkpoint is code.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete, damaged, of another version, or
            has no training state although `training` is True.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = Path(path)
    sums = read_sums(path)
    if training and TRAINING not in sums:
        raise CheckpointError(path, "made for use alone: it has no training state to go on from")
    data = {
        name: read_verified(path / name, digest)
        for name, digest in sums.items()
        if training or name != TRAINING
    }
    try:
        document = json.loads(data[STATE])
        if document["version"] != VERSION:
            raise ValueError(f"version {document['version']!r}, but this program reads {VERSION}")
        return Checkpoint(
            path=path,
            step=document["step"],
            config=from_json(json.dumps(document["config"])),
            model=load(data[MODEL]),
            tokenizer_json=data[TOKENIZER].decode("utf-8"),
            state=document["state"],
            training=load(data[TRAINING]) if training else None,
        )
    except (ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(path, f"not understood: {error}") from error

# %% [markdown]
# The first proof: what comes back is equal, to the bit, and gives the same logits.

# %% tags=["active-ipynb"]
# checkpoint = load_checkpoint(path)
# copy = checkpoint.build()
# ids = torch.arange(4, 24).reshape(2, 10)
# assert checkpoint.config == config
# assert all(torch.equal(a, b) for a, b in zip(copy.parameters(), model.parameters(), strict=True))
# assert torch.equal(copy(ids, ids), model.eval()(ids, ids))
# print("step", checkpoint.step, checkpoint.state, "  training:", checkpoint.training)

# %% [markdown]
# The second: damage. At every fifth byte, and at every byte of the short files, we turn one bit over; then we cut the file off at that place. Every time reading must fail, and with the one error.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
#
# stride = 5 if scale() == "full" else 500
# flips = cuts = 0
# for file in sorted(path.iterdir()):
#     good = file.read_bytes()
#     for i in range(0, len(good), stride if len(good) > 1000 else 1):
#         flipped = good[:i] + bytes([good[i] ^ (1 << i % 8)]) + good[i + 1 :]
#         for damaged in (flipped, good[:i]):
#             file.write_bytes(damaged)
#             try:
#                 load_checkpoint(path, training=True)
#             except CheckpointError:
#                 flips, cuts = flips + (damaged is flipped), cuts + (damaged is not flipped)
#             else:
#                 raise AssertionError(f"{file.name}: damage at byte {i} was not noticed")
#     file.write_bytes(good)
# load_checkpoint(path, training=True)
# print(f"{flips:,} flipped bits and {cuts:,} truncations: each noticed")

# %% [markdown]
# A run that starts again asks for the newest checkpoint. If that one is damaged, the one before is better than nothing, but nobody should find out by accident. And if *all* are damaged, the worst answer is to start from the beginning as if there had never been any.

# %%
def latest_checkpoint(folder: Path | str) -> Path | None:
    """The newest checkpoint of a folder that is complete and undamaged, every byte checked.

    Returns None where there has never been one. Warns for each newer one that had to be passed
    over, and raises CheckpointError where there are some and all are damaged: starting anew in
    their place would hide the loss.
    """
    candidates = named(folder)
    for path in reversed(candidates):
        try:
            for name, digest in read_sums(path).items():
                read_verified(path / name, digest)
        except CheckpointError as error:
            warnings.warn(f"passed over a checkpoint: {error}", stacklevel=2)
        else:
            return path
    if candidates:
        raise CheckpointError(folder, f"none of its {len(candidates)} checkpoints is usable")
    return None

# %% tags=["active-ipynb", "nbval-ignore-output"]
# (folder / "run" / "step-00000400" / "model.safetensors").write_bytes(b"damaged")
# with warnings.catch_warnings(record=True) as caught:
#     warnings.simplefilter("always")
#     print("newest:", latest_checkpoint(folder / "run").name)
# print("warning:", str(caught[0].message).split("/run/")[1])
# (folder / "run" / "step-00000300" / "state.json").unlink()
# with warnings.catch_warnings(record=True):
#     try:
#         latest_checkpoint(folder / "run")
#     except CheckpointError as error:
#         print("error:", error.reason)

# %% [markdown]
# ## Killed while saving
#
# Now a real kill. A process saves a model again and again, and is killed with signal 9, which no program can catch or delay. Then we try to read. Once with `save_checkpoint`, and once the simple way, by writing over one file.

# %%
def kill_while_saving(folder: Path, repeats: int, *, whole: bool) -> int:
    """How often nothing could be read after a process that saves a model was killed. Unix only.

    `whole` says how the process saves: with `save_checkpoint`, or by writing over one file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    model, lost = Transformer(Config(vocab_size=2000, d_model=64)), 0
    file = folder / MODEL
    file.write_bytes(to_bytes(model.state_dict()))
    moments = random.Random(0)
    for first in range(1, 1_000_000 * repeats, 1_000_000):
        if (child := os.fork()) == 0:
            for step in count(first):
                if not whole:
                    file.write_bytes(to_bytes(model.state_dict()))
                    continue
                save_checkpoint(folder, step, model=model, config=model.config,
                                tokenizer_json="{}", state={}, training=None)  # fmt: skip
        while whole and not list_checkpoints(folder):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        try:
            load(file.read_bytes()) if not whole else latest_checkpoint(folder)
        except (CheckpointError, SafetensorError):
            lost += 1
    return lost

# %% [markdown]
# `os.fork` makes a copy of the whole process. A notebook has threads and should not be copied, so a fresh Python does it.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import subprocess
# import sys
#
# repeats = 25 if scale() == "full" else 1
# program = """
# import sys
# from pathlib import Path
# from transformer_annotated.training.checkpoints import kill_while_saving
# for whole in (False, True):
#     folder = Path(sys.argv[1]) / f"killed-{whole}"
#     folder.mkdir()
#     print(kill_while_saving(folder, int(sys.argv[2]), whole=whole), len(list(folder.glob(".partial-*"))))
# """
# done = subprocess.run(
#     [sys.executable, "-c", program, folder, str(repeats)],
#     capture_output=True,
#     text=True,
#     check=True,
# )
# (over_one_file, _), (whole_or_absent_lost, _) = (
#     map(int, line.split()) for line in done.stdout.splitlines()
# )
# print(f"killed {repeats} times while writing over one file: unreadable {over_one_file} times")
# print(
#     f"killed {repeats} times in save_checkpoint:          unreadable {whole_or_absent_lost} times"
# )
# assert whole_or_absent_lost == 0

# %% [markdown]
# A kill is not a power cut. The operating system lives on and finishes its writing, so this experiment tests the order of our operations and not `fsync`. The test suite does more of it: it kills a save before each single operation on a file. For `fsync` it checks that every file is written through before the name is given.
#
# ## How often?
#
# A save takes $\delta$ seconds, in which the model does not learn. A crash costs, on average, half of the interval $\tau$ between two saves. If a crash comes every $M$ seconds on average, the share of time that is lost is about
#
# $$
# \frac{\delta}{\tau} + \frac{\tau}{2M}, \qquad \text{least at} \quad \tau = \sqrt{2 \delta M}
# $$ (eq-young)
#
# which is Young's rule {cite:p}`young1974first`. How long is $\delta$ here? The paper's base model, with the optimiser's two moments:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# import time
#
# sizes = {} if scale() == "full" else SMALL
# base = Transformer(patch(PAPER_BASE, sizes))
# moments = {f"{m}/{n}": p for n, p in base.named_parameters() for m in ("exp_avg", "exp_avg_sq")}
# start = time.perf_counter()
# path = save_checkpoint(
#     folder / "base",
#     1,
#     model=base,
#     config=base.config,
#     tokenizer_json="{}",
#     state={},
#     training=moments,
# )
# seconds = time.perf_counter() - start
# size = sum(file.stat().st_size for file in path.iterdir())
# print(f"{size / 1e6:,.0f} MB in {seconds:.1f} s")
# for hours in (1, 24, 24 * 30):
#     print(
#         f"a crash every {hours:3} hours: save every {(2 * seconds * 3600 * hours) ** 0.5 / 60:.0f} minutes"
#     )
# shutil.rmtree(folder / "base")

# %% [markdown]
# The curve of {eq}`eq-young` is flat around its lowest point. An interval that is twice as long as the best one, or half as long, loses a quarter more than it must: put $2\tau$ for $\tau$ and see.
#
# ## One better model from several
#
# Near the end of training the weights do not stand still. Each batch pushes them a little aside, and the learning rate decides how far. Several checkpoints of one run are several noisy readings of the same thing. What do we do with noisy readings? We take their mean:
#
# $$
# \bar\theta = \frac{1}{k} \sum_{i=1}^{k} \theta_i
# $$ (eq-average)
#
# The mean is over *weights*, one by one, and not over predictions. The result is one model, as fast as any of them.

# %%
def average_checkpoints(paths: Sequence[Path | str]) -> dict[str, Tensor]:
    """The mean of the weights of several checkpoints (section 6.1), summed in float64.

    The result has the names and precisions of the originals. Raises ValueError for no paths or a
    path given twice, and CheckpointError for one that cannot be read, or whose config, tokenizer
    or weights are not those of the first.
    """
    if not paths or len({Path(path).resolve() for path in paths}) != len(paths):
        raise ValueError(f"paths must be different checkpoints, one or more, got {list(paths)}")
    first = load_checkpoint(paths[0])
    total = {name: tensor.double() for name, tensor in first.model.items()}
    for path in paths[1:]:
        other = load_checkpoint(path)
        other.check_tokenizer(first.tokenizer_sha256)
        if other.config != first.config:
            raise CheckpointError(path, f"its config is not that of {first.path}")
        if wrong := differences(first.model, other.model):
            raise CheckpointError(path, f"unlike {first.path}: {'; '.join(wrong)}")
        for name, tensor in other.model.items():
            total[name] += tensor
    return {name: (total[name] / len(paths)).to(first.model[name].dtype) for name in total}

# %% [markdown]
# The sum is in 64 bits, so that twenty models can be summed and only the result is rounded. Checkpoints of different runs are refused as far as that can be seen: another config, another tokenizer. Two runs with different seeds cannot be told apart here, and their mean is useless.
#
# Try it on the small language of Chapter 9. After a rise over 100 steps the learning rate stays constant, so that the weights keep moving. A checkpoint is saved every 20 steps.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from itertools import islice
#
# from transformer_annotated import Vocabulary, batches, collate, cross_entropy, train
# from transformer_annotated.paper.first_translation import encode_pairs
# from transformer_annotated.paper.toy import split
#
# full = scale() == "full"
# train_text, test_text = split(32_000 if full else 300, 500 if full else 20, seed=0)
# words = [[(a.split(), b.split()) for a, b in text] for text in (train_text, test_text)]
# vocabulary = Vocabulary.build(sentence for pair in words[0] for sentence in pair)
# learn, held_out = (encode_pairs(pairs, vocabulary) for pairs in words)
# SIZE = {"d_model": 64, "n_layers": 2, "dropout": 0.0, "ffn.d_ff": 128}
# config = patch(PAPER_BASE, {**SMALL, **SIZE, "vocab_size": len(vocabulary)})
# torch.manual_seed(0)
# model = Transformer(config)
# last, every = (500, 20) if full else (12, 1)
#
#
# def on_step(step: int, loss: float) -> None:
#     if step % every == 0:
#         save_checkpoint(
#             folder / "toy",
#             step,
#             model=model,
#             config=config,
#             keep=10,
#             tokenizer_json="{}",
#             state={"loss": loss},
#             training=None,
#         )
#
#
# stream = islice(batches(learn, 64 if full else 16, seed=0), last)
# train(model, stream, learning_rate=lambda step: 2e-3 * min(1, step / 100), on_step=on_step)
# paths = list_checkpoints(folder / "toy")
# print(f"{len(paths)} checkpoints, steps {paths[0].name} to {paths[-1].name}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# batch = collate(held_out)
#
#
# @torch.no_grad()
# def loss_of(model: Transformer) -> float:
#     logits = model.eval()(batch.src, batch.tgt_in, src_padding=batch.src_padding)
#     return cross_entropy(logits, batch.tgt_out, batch.tgt_padding).item()
#
#
# def mean_of(paths: list[Path]) -> Transformer:
#     averaged = load_checkpoint(paths[-1]).build()
#     load_weights(averaged, average_checkpoints(paths))
#     return averaged
#
#
# single = [loss_of(load_checkpoint(path).build()) for path in paths]
# averaged = [loss_of(mean_of(paths[-k:])) for k in range(1, len(paths) + 1)]
# best = min(range(len(paths)), key=averaged.__getitem__) + 1
# print(f"last checkpoint {single[-1]:.4f}, best single {min(single):.4f}")
# print(f"mean of the last 5 {averaged[4]:.4f}, of the last {best} {averaged[best - 1]:.4f}")
# assert abs(averaged[0] - single[-1]) < 1e-6
# if full:
#     assert averaged[4] < min(single)

# %% mystnb={"figure": {"caption": "Single checkpoints jump up and down and slowly improve; the mean of several lies below all of them.", "name": "fig-average"}, "image": {"alt": "Loss on unseen sentences over the steps. Ten scattered dots, one a checkpoint, and two horizontal lines below them, the means of five and of ten."}} tags=["active-ipynb", "nbval-ignore-output"]
# fig, ax = plt.subplots(figsize=(7.2, 2.6))
# steps = [load_checkpoint(path).step for path in paths]
# ax.plot(steps, single, "o", label="single checkpoints")
# ax.axhline(averaged[4], color=figures.COLORS[1], label="mean of the last 5")
# ax.axhline(averaged[-1], color=figures.COLORS[2], ls="--", label=f"mean of the last {len(paths)}")
# ax.set(xlabel="step", ylabel="loss on unseen sentences", ylim=(0, None))
# ax.legend();

# %% [markdown]
# In {numref}`fig-average` no single checkpoint is as good as the mean. The dots jump, and they also fall, for the model is still learning; so a mean that takes in older and worse weights need not be the best. (A number of checkpoints chosen on these very sentences would be chosen too well. Do not do that on a test set.) Not every run gains that much. When the learning rate has fallen to zero, as in Chapter 10, the readings are all alike, and there is little left to average.
#
# The idea is older than the Transformer. Averaging the path of a stochastic search has a theory {cite:p}`polyak1992acceleration`, and for deep networks it was found to lead to places where the loss changes little when the weights change a little {cite:p}`izmailov2018averaging`.
#
# ## What the paper did
#
# | | paper, section 6.1 | here |
# |---|---|---|
# | base model | mean of the last 5 checkpoints | mean of those that the run keeps; the recipes of Chapter 23 keep 5 |
# | big model | mean of the last 20 | the same with `keep=20` |
# | interval | 10 minutes for the base model | every so many steps, so that a run can be repeated exactly |
# | format | not stated | safetensors, JSON, SHA-256 |
#
# ## How it breaks
#
# - *One file, written over.* Works until the day it is needed. Kill your own program while it saves, twenty-five times.
# - *"Saved", says the log.* An error during saving was caught and forgotten, for instance on a full disk. Look whether the file is there, and how large it is.
# - *A temporary file in `/tmp`.* That may be another disk. Then the rename fails, or copies.
# - *`strict=False`.* Weights that were not loaded keep their random values. The model is worse than it was, and no message says so.
# - *The wrong tokenizer.* Every id is valid and means another word. The output is fluent nonsense. So the tokenizer travels with the weights, and `check_tokenizer` compares sums.
# - *Only the weights were saved.* The optimiser starts again with moments of zero, and the running means start empty. The next chapter resumes exactly.
#
# ## Takeaways
#
# - Write beside, `fsync`, rename, `fsync` the folder, and only then delete.
# - Keep at least two. A damaged one is passed over with a warning; when all are damaged, that is an error.
# - Formats check their form, not their numbers. A sum over the bytes checks both.
# - The mean of the last few checkpoints {eq}`eq-average` can be better than each of them, and costs nothing at translation time.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 18.1.** The base model has 63,082,496 parameters of 4 bytes. A checkpoint holds them, and two moments of the same size. How many bytes are that, without names and text?

# %% tags=["active-ipynb"]
# answer = ...
# check("18.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = 63_082_496 * 4 * 3
# check("18.1", answer)

# %% [markdown]
# **Exercise 18.2.** A save takes 20 seconds, and your machine stops about once a day. How many minutes should lie between two saves, by {eq}`eq-young`?

# %% tags=["active-ipynb"]
# answer = ...
# check("18.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = (2 * 20 * 24 * 3600) ** 0.5 / 60
# check("18.2", answer)

# %% [markdown]
# **Exercise 18.3.** Put these five operations into the order in which they are safe: `"delete"` (the oldest checkpoint), `"rename"` (to the final name), `"fsync files"`, `"fsync parent"` (the folder that holds the name), `"write"`. Answer with a list.

# %% tags=["active-ipynb"]
# answer = ...
# check("18.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = ["write", "fsync files", "rename", "fsync parent", "delete"]
# check("18.3", answer)

# %% [markdown]
# **Exercise 18.4.** Checkpoints arrive one at a time, and there is memory for one sum only. Write a function of the mean of the first $n - 1$ tensors, the $n$-th tensor, and $n$, that returns the mean of all $n$.

# %% tags=["active-ipynb"]
# answer = ...
# check("18.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# def answer(mean: Tensor, new: Tensor, n: int) -> Tensor:
#     return mean + (new - mean) / n
#
#
# check("18.4", answer)
