"""The command line: `transformer-annotated`, or `python -m transformer_annotated`.

Options come from dataclasses, those of the chapters included, by way of `tyro`. Results go to
standard output; progress, warnings and errors go to standard error. What is wrong with the command
itself ends it with status 2, what fails in the run with status 1 and one line that says why.
"""

import dataclasses
import inspect
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
import tyro
from torch import Tensor

from transformer_annotated import __version__
from transformer_annotated.paper.parts import diff, patch, to_json
from transformer_annotated.paper.transformer import PAPER_BASE, Transformer
from transformer_annotated.training import reproduction
from transformer_annotated.training.beam import beam_search
from transformer_annotated.training.bleu import evaluate_translations
from transformer_annotated.training.checkpoints import (
    Checkpoint,
    CheckpointError,
    average_checkpoints,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    load_weights,
    order,
    save_checkpoint,
)
from transformer_annotated.training.corpora import open_corpus
from transformer_annotated.training.decoding import (
    Search,
    greedy_search,
    packed,
    translate_texts,
)
from transformer_annotated.training.reproduction import Recipe, make_trainer, prepare
from transformer_annotated.training.tokens import Tokenizer, load_tokenizer
from transformer_annotated.training.trainer import default_device

PROGRAM = "transformer-annotated"
SIGPIPE = 13  # not in `signal` on Windows
Corpus = Literal["toy", "multi30k", "tatoeba", "wmt14"]
PRESETS = {
    name.lower().replace("_", "-"): value
    for name, value in vars(reproduction).items()
    if isinstance(value, Recipe) and not name.startswith("_")
}


def say(text: str, *, failure: bool = False) -> None:
    """Print a line for the person at the terminal; results go to standard output.

    Of several processes that train together only the first one speaks, unless it is a failure.
    """
    if failure or os.environ.get("RANK", "0") == "0":
        print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


# Training


@dataclass(frozen=True)
class Train:
    """Train a model, or go on with a run that was stopped.

    A run lives in a folder: its checkpoints, its metrics, its corpus as ids. Where the folder has
    a checkpoint, the run goes on from there, exactly. Ctrl-C finishes the step, saves and stops.
    Prints the newest checkpoint's path.

    Examples:
      transformer-annotated train --data toy
      transformer-annotated train --data multi30k --source en --target de --train.minutes 60
      transformer-annotated train --preset toy --model.n-layers 3 --folder runs/three-layers
      torchrun --nproc-per-node 2 -m transformer_annotated train --train.accumulate 2

    Attributes:
        preset: the recipe that the other options start from; by default the first for `--data`.
        recipe: what is trained, on what, and how.
        folder: where the run lives; `runs/DATA-SOURCE-TARGET` by default.
        resume: go on from this checkpoint instead of the newest in the folder.
        tensorboard: also write events for TensorBoard.
    """

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    preset: str = "toy"
    folder: Path | None = None
    resume: Path | None = None
    tensorboard: bool = False

    def __call__(self) -> int:
        recipe = self.recipe
        name = f"{recipe.data}-{recipe.source}-{recipe.target}"
        folder = self.folder or Path("runs") / name
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder must be the path of a folder, but {folder} is a file")
        say(f"reading {name}")
        folder.mkdir(parents=True, exist_ok=True)
        trainer = make_trainer(
            recipe, prepare(recipe, folder / f"corpus-{recipe.vocab_size}.safetensors"), folder,
            tensorboard=self.tensorboard,
        )  # fmt: skip
        if trainer.resume(None if self.resume is None else find_checkpoint(self.resume)):
            say(f"going on after step {trainer.step:,}")
        parameters = sum(p.numel() for p in trainer.model.parameters())
        say(f"{parameters:,} parameters, {recipe.train.steps:,} steps, on {trainer.device}")
        trainer.train()
        if dist.is_initialized():
            dist.destroy_process_group()
        if trainer.rank == 0:
            for row in trainer.metrics()[-1:]:
                numbers = (f"{key} {value:.4g}" for key, value in row.items() if key != "step")
                say(f"step {row['step']:,}: {', '.join(numbers)}")
            for path in list_checkpoints(folder)[-1:]:
                print(path)
        if trainer.stopped_by is not None:
            say("stopped and saved; the same command goes on")
            return 128 + trainer.stopped_by
        return 0


def chosen_preset(arguments: Sequence[str]) -> tuple[Recipe, str]:
    """The recipe that the options of `train` start from: `--preset`, or the first for `--data`.

    Raises ValueError for a preset that does not exist.
    """
    data, name = value_of("data", arguments), value_of("preset", arguments)
    if name is None:
        fitting = (key for key, recipe in PRESETS.items() if recipe.data == (data or "toy"))
        name = next(fitting, next(key for key, recipe in PRESETS.items() if recipe.data != "toy"))
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name], name


def value_of(option: str, arguments: Sequence[str]) -> str | None:
    """The last value that `--option` is given, before the real parsing."""
    found = None
    for word, following in zip(arguments, [*arguments[1:], None], strict=False):
        if word == f"--{option}":
            found = following
        elif word.startswith(f"--{option}="):
            found = word.partition("=")[2]
    return found


# Using a model


@dataclass(frozen=True)
class Decoding:
    """How a translation is searched for.

    Attributes:
        beam: hypotheses that run side by side; 1 for greedy search.
        alpha: strength of the length penalty.
        extra: how many tokens longer than its source a translation may be.
        device: where to compute, such as cpu or cuda; by default a GPU if there is one.
    """

    beam: int = 4
    alpha: float = 0.6
    extra: int = 50
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("beam", "extra"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        try:
            kind = torch.device(self.device or "cpu").type
        except RuntimeError as error:
            raise ValueError(f"device must be such as cpu or cuda, got {self.device!r}") from error
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that is there, got {self.device!r}")

    def search(self) -> Search:
        """The function that finds the translations of a batch."""
        if self.beam == 1:
            return partial(greedy_search, extra=self.extra)
        return partial(beam_search, beam=self.beam, alpha=self.alpha, extra=self.extra)

    def load(self, path: Path) -> tuple[Checkpoint, Transformer, Tokenizer]:
        """A checkpoint (or a run's newest), its model on the device, and its tokenizer."""
        checkpoint = load_checkpoint(find_checkpoint(path))
        tokenizer = load_tokenizer(checkpoint.tokenizer_json)
        if tokenizer.vocab_size != checkpoint.config.vocab_size:
            raise CheckpointError(
                checkpoint.path,
                f"its tokenizer has {tokenizer.vocab_size:,} tokens, its model "
                f"{checkpoint.config.vocab_size:,}",
            )
        return checkpoint, checkpoint.build(device=self.device or default_device()), tokenizer


def find_checkpoint(path: Path) -> Path:
    """The checkpoint itself, or the newest one of a run's folder.

    Raises CheckpointError where there is none.
    """
    if order(path)[0] >= 0 or (path / "SHA256SUMS").exists():
        return path
    if not path.is_dir():
        raise CheckpointError(path, "there is no such checkpoint or folder of a run")
    latest = latest_checkpoint(path)
    if latest is None:
        raise CheckpointError(path, "there is no checkpoint in this folder")
    return latest


@dataclass(frozen=True)
class Translate:
    """Translate text, a line at a time: a file, standard input, or what you type.

    As many lines come out as went in; a blank line stays blank. Lines that come through a pipe are
    answered as they arrive.

    Examples:
      transformer-annotated translate runs/toy-de-en
      echo 'der Hund schläft' | transformer-annotated translate runs/toy-de-en
      transformer-annotated translate runs/multi30k-en-de --input test.en > test.de

    Attributes:
        checkpoint: a checkpoint, or the folder of a run for its newest.
        input: a UTF-8 text with a sentence on each line; standard input by default.
        decoding: how a translation is searched for.
    """

    checkpoint: tyro.conf.Positional[Path]
    input: Path | None = None
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)

    def __call__(self) -> int:
        if self.input is None:
            return self.translate(sys.stdin.buffer, "standard input")
        with self.input.open("rb") as file:  # a missing file is found before the model is loaded
            return self.translate(file, str(self.input))

    def translate(self, file: Any, origin: str) -> int:
        """Write a line to standard output for each line of `file`."""
        checkpoint, model, tokenizer = self.decoding.load(self.checkpoint)
        typing = file is sys.stdin.buffer and sys.stdin.isatty()
        say(f"{checkpoint.path.name}, beam {self.decoding.beam}")
        if typing:
            say("type a sentence and press Enter; Ctrl-D ends")
        search = self.decoding.search()
        with packed(model):
            for sentences in lines_as_they_come(file, origin):
                for text in translate_texts(model, tokenizer, sentences, search=search):
                    sys.stdout.write(" ".join(text.split()) + "\n")
                sys.stdout.flush()
        return 0


def lines_as_they_come(file: Any, origin: str) -> Iterator[list[str]]:
    r"""The lines of a UTF-8 text, as many at a time as have arrived; only \n ends a line.

    `file` is binary and has `read1`, which returns what is there without waiting for more.
    Raises ValueError with the line's number for a byte that is not UTF-8.
    """
    begun: list[bytes] = []  # pieces of a line whose end has not come
    number = 0
    while data := file.read1(2**16):
        first, *others = data.split(b"\n")
        begun.append(first)
        if others:
            complete, rest = [b"".join(begun), *others[:-1]], others[-1]
            yield [decoded(line, origin, number + i) for i, line in enumerate(complete, start=1)]
            begun, number = [rest], number + len(complete)
    if any(begun):
        yield [decoded(b"".join(begun), origin, number + 1)]


def decoded(line: bytes, origin: str, number: int) -> str:
    """A line as text, without a Windows line end, and without a byte-order mark in the first."""
    try:
        text = line.removesuffix(b"\r").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{origin}, line {number}, byte {error.start} of the line: not UTF-8"
        ) from error
    return text.removeprefix("\ufeff") if number == 1 else text


@dataclass(frozen=True)
class Evaluate:
    """Translate a split of a corpus and print its scores: BLEU with an interval, and chrF.

    The corpus is the one that the model was trained on, unless you name another. Choose by the
    score on `val`; look at `test` once.

    Examples:
      transformer-annotated evaluate runs/toy-de-en --split val
      transformer-annotated evaluate runs/multi30k-en-de --beam 1 --json

    Attributes:
        checkpoint: a checkpoint, or the folder of a run for its newest.
        split: val or test.
        data: another corpus than the model's own.
        source: another source language than the model's own.
        target: another target language than the model's own.
        limit: only the first so many sentences.
        output: write the translations to this file, one a line.
        json: print one JSON object instead of text.
        decoding: how a translation is searched for.
    """

    checkpoint: tyro.conf.Positional[Path]
    split: Literal["val", "test"] = "test"
    data: Corpus | None = None
    source: str | None = None
    target: str | None = None
    limit: int | None = None
    output: Path | None = None
    json: bool = False
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    def __call__(self) -> int:
        from tqdm import tqdm

        checkpoint, model, tokenizer = self.decoding.load(self.checkpoint)
        own = checkpoint.state.get("identity", {}).get("recipe", {})
        names = {
            name: getattr(self, name) or own.get(name) for name in ("data", "source", "target")
        }
        if missing := [name for name, value in names.items() if value is None]:
            raise ValueError(
                f"{checkpoint.path} does not say what it was trained on: "
                f"add {', '.join(f'--{name}' for name in missing)}"
            )
        pairs = open_corpus(*names.values()).pairs(self.split)[: self.limit]
        say(f"{checkpoint.path.name} on {len(pairs):,} sentences of {'-'.join(names.values())}")
        search = self.decoding.search()
        with tqdm(total=len(pairs), unit="sentence", disable=None) as bar:

            def counted(model: Transformer, src: Tensor, src_padding: Tensor | None) -> Any:
                found = search(model, src, src_padding)
                bar.update(len(src))
                return found

            texts = translate_texts(model, tokenizer, [pair[0] for pair in pairs], search=counted)
        if self.output is not None:
            lines = (" ".join(text.split()) + "\n" for text in texts)
            self.output.write_text("".join(lines), encoding="utf-8")
        scores = evaluate_translations(texts, [pair[1] for pair in pairs])
        if self.json:
            told = {"checkpoint": checkpoint.path.name, **names, "split": self.split}
            print(json.dumps({**told, **dataclasses.asdict(scores)}))
        else:
            print(scores)
        return 0


# Checkpoints


@dataclass(frozen=True)
class Average:
    """Average the weights of several checkpoints of one run, and save the mean as another.

    The paper averages the last 5 for its base model and the last 20 for the big one.
    A run keeps as many checkpoints as `--train.keep` says. Prints the new checkpoint's path.

    Examples:
      transformer-annotated average runs/multi30k-en-de --last 5 --output runs/mean
      transformer-annotated average runs/a/step-00001000 runs/a/step-00002000 --output runs/mean

    Attributes:
        checkpoints: checkpoints, or the folder of a run for its last ones.
        output: the folder that gets the mean; not one that holds a checkpoint of the mean.
        last: how many of a folder's checkpoints to take; all by default.
    """

    checkpoints: tyro.conf.Positional[tuple[Path, ...]]
    output: Path
    last: int | None = None

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise ValueError("checkpoints must be one or more, got none")
        if self.last is not None and self.last < 1:
            raise ValueError(f"last must be at least 1, got {self.last}")

    def __call__(self) -> int:
        paths: list[Path] = []
        for path in self.checkpoints:
            inside = [] if order(path)[0] >= 0 else list_checkpoints(path)
            paths += inside[-self.last :] if self.last and inside else inside or [path]
        if self.output.resolve() in {path.resolve().parent for path in paths}:
            raise ValueError(f"output must be another folder than the run's own, got {self.output}")
        newest = load_checkpoint(max(paths, key=order))
        say(f"averaging {', '.join(path.name for path in paths)}")
        model = newest.build()
        load_weights(model, average_checkpoints(paths))
        saved = save_checkpoint(
            self.output, newest.step, model=model, config=newest.config,
            tokenizer_json=newest.tokenizer_json, training=None,
            state={**newest.state, "averaged": [path.name for path in paths]},
        )  # fmt: skip
        print(saved)
        return 0


@dataclass(frozen=True)
class Download:
    """Fetch a corpus from its official host, check its sums, and keep it.

    Files go to the folder that TRANSFORMER_ANNOTATED_DATA names, or else to the user's cache. What
    is there already is not fetched again, and a download that broke off goes on.

    Examples:
      transformer-annotated download multi30k
      transformer-annotated download wmt14 --source en --target fr

    Attributes:
        data: the corpus.
        source: the source language.
        target: the target language.
        quiet: show no progress.
    """

    data: tyro.conf.Positional[Corpus]
    source: str = "de"
    target: str = "en"
    quiet: bool = False

    def __call__(self) -> int:
        open_corpus(self.data, self.source, self.target).download(progress=not self.quiet)
        print(f"{self.data} {self.source}-{self.target} is at hand")
        return 0


@dataclass(frozen=True)
class Info:
    """Say what a checkpoint holds, after checking every byte of what using it needs.

    Examples:
      transformer-annotated info runs/toy-de-en
      transformer-annotated info runs/toy-de-en/step-00000600 --json

    Attributes:
        checkpoint: a checkpoint, or the folder of a run for its newest.
        json: print one JSON object with everything.
    """

    checkpoint: tyro.conf.Positional[Path]
    json: bool = False

    def __call__(self) -> int:
        checkpoint = load_checkpoint(find_checkpoint(self.checkpoint))
        config, tensors = checkpoint.config, checkpoint.model.values()
        tokenizer = json.loads(checkpoint.tokenizer_json)
        kind = tokenizer.get("kind", "unknown") if isinstance(tokenizer, dict) else "unknown"
        facts = {
            "checkpoint": str(checkpoint.path),
            "step": checkpoint.step,
            "parameters": sum(tensor.numel() for tensor in tensors),
            "precision": ", ".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors})),
            "vocabulary": config.vocab_size,
            "tokenizer": f"{kind}, SHA-256 {checkpoint.tokenizer_sha256}",
        }
        sizes = {file.name: file.stat().st_size for file in sorted(checkpoint.path.iterdir())}
        if self.json:
            whole = {**facts, "bytes": sizes, "config": json.loads(to_json(config))}
            print(json.dumps({**whole, "state": checkpoint.state}))
            return 0
        for name, value in facts.items():
            print(f"{name:12s}{value:,}" if isinstance(value, int) else f"{name:12s}{value}")
        for name, size in sizes.items():
            print(f"{'file':12s}{name}, {size:,} bytes")
        for name, value in checkpoint.state.get("identity", {}).get("recipe", {}).items():
            print(f"{'recipe':12s}{name} = {value}")
        same = patch(PAPER_BASE, {"vocab_size": config.vocab_size})
        print("config, against the paper's base model:")
        print(diff(same, config) or "no difference")
        return 0


# All of it

Command = Train | Translate | Evaluate | Average | Download | Info
COMMANDS: dict[str, type[Command]] = {
    kind.__name__.lower(): kind for kind in (Train, Translate, Evaluate, Average, Download, Info)
}


def about(command: type[Command]) -> str:
    """What the help of a command begins with: its docstring, up to the options."""
    return inspect.cleandoc(command.__doc__ or "").partition("\nAttributes:")[0].strip()


def usage() -> str:
    """The help of the whole program."""
    commands = "\n".join(
        f"  {name:11s}{about(kind).splitlines()[0]}" for name, kind in COMMANDS.items()
    )
    return f"""usage: {PROGRAM} COMMAND [OPTIONS]

The Transformer of 2017: train it, translate with it, measure it.

Commands:
{commands}

Examples:
  {PROGRAM} train --data toy
  {PROGRAM} translate runs/toy-de-en
  {PROGRAM} COMMAND --help

Options:
  -h, --help     show this text
  --version      show the version

Exit status: 0 where all went well, 1 where the run failed, 2 where the command was wrong,
130 after Ctrl-C, 143 after SIGTERM."""


def parse(arguments: Sequence[str]) -> Command:
    """The command that the arguments describe.

    Raises SystemExit: with 0 after a help text, with 2 for arguments that are wrong.
    """
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(usage())
        raise SystemExit(0)
    if arguments and arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
        raise SystemExit(0)
    if not arguments or arguments[0] not in COMMANDS:
        wrong = f"there is no command {arguments[0]!r}" if arguments else "a command is missing"
        say(f"{wrong}; the commands are {', '.join(COMMANDS)}")
        raise SystemExit(2)
    kind, rest = COMMANDS[arguments[0]], list(arguments[1:])
    options: dict[str, Any] = {}
    try:
        if kind is Train:
            options["default"] = Train(*chosen_preset(rest))
        return tyro.cli(
            kind, prog=f"{PROGRAM} {arguments[0]}", description=about(kind), args=rest, **options
        )  # fmt: skip
    except ValueError as error:
        say(" ".join(str(error).split()))
        raise SystemExit(2) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    for stream in (sys.stdout, sys.stderr):  # whatever the system's own encoding is
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() != "utf-8":
            stream.reconfigure(encoding="utf-8")
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations are no business of the person who types
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_: say(f"warning: {message}")
        try:
            return command()
        except KeyboardInterrupt:
            say("interrupted")
            return 128 + signal.SIGINT
        except BrokenPipeError:
            # Whoever read our output has had enough. Python would complain once more at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + SIGPIPE
        except (ValueError, OSError, ArithmeticError, ImportError, torch.OutOfMemoryError) as error:
            say(" ".join(str(error).split()) or type(error).__name__, failure=True)
            return 1
