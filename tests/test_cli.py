"""The command line: what it prints where, its exit statuses, and its page in the book."""

import io
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from transformer_annotated import cli
from transformer_annotated.cli import COMMANDS, PRESETS, lines_as_they_come, main
from transformer_annotated.training.checkpoints import (
    Checkpoint,
    average_checkpoints,
    list_checkpoints,
    load_checkpoint,
)
from transformer_annotated.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
SMALL = shlex.split(
    "--data toy --model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.d-ff 16 "
    "--schedule inverse_square_root --train.max-tokens 64 "
    "--train.save-every 1 --train.validate-every 1000 --train.keep 4"
)
SENTENCES = ["der Hund schläft", "", "  ", "die Frau sieht\u2028ein Buch", "der Hund schläft"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *SMALL, "--train.steps", "3", "--folder", str(folder)]) == 0
    return folder


def beside(run: Path, folder: Path) -> Path:
    """A new folder that has the corpus as ids already, which saves a few seconds."""
    folder.mkdir()
    shutil.copy(next(run.glob("corpus-*.safetensors")), folder)
    return folder


def type_in(monkeypatch: pytest.MonkeyPatch, data: bytes, terminal: bool = False) -> None:
    keyboard = SimpleNamespace(buffer=io.BufferedReader(io.BytesIO(data)), isatty=lambda: terminal)
    monkeypatch.setattr(sys, "stdin", keyboard)


# Help, and commands that are wrong


def test_the_help_names_every_command_and_status(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"], ["help"]):
        assert main(arguments) == 0
        told = capsys.readouterr()
        assert told.err == ""
        for name in COMMANDS:
            assert f"\n  {name} " in told.out
        for status in ("0 where", "1 where", "2 where", "130 after", "143 after"):
            assert status in told.out.replace("\n", " ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_examples(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert "Examples:\n  transformer-annotated" in told
    assert "Attributes" not in told
    assert COMMANDS[name].__doc__ is not None


def test_every_option_of_our_own_is_explained() -> None:
    for kind in COMMANDS.values():
        told = (kind.__doc__ or "").partition("Attributes:")[2]
        for option in vars(kind)["__annotations__"]:
            assert f"\n        {option}: " in told, f"{kind.__name__}.{option}"


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"transformer-annotated \d+\.\d+\.\d+\n", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "a command is missing; the commands are train, translate"),
        ("trane --data toy", "there is no command 'trane'"),
        ("train --preset huge", "preset must be one of toy"),
        ("train --train.steps 0", "steps must be a whole number of at least 1"),
        ("train --train.steps many", "invalid literal"),
        ("train --train.keep 1", "keep must be"),
        ("train --schedule linear", "invalid choice"),
        ("train --modle.d-model 3", "Unrecognized"),
        ("translate", "Missing"),
        ("translate run --beam 0", "beam must be at least 1"),
        ("translate run --extra 0", "extra must be at least 1"),
        ("translate run --device abacus", "device must be such as cpu"),
        ("evaluate run --split train", "invalid choice"),
        ("evaluate run --limit 0", "limit must be at least 1"),
        ("average --output mean", "checkpoints must be one or more"),
        ("average a b", "Missing"),
        ("average a --output b --last 0", "last must be at least 1"),
        ("download penn-treebank", "invalid choice"),
        ("info", "Missing"),
    ],
)
def test_a_wrong_command_is_status_2(
    command: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in " ".join(re.sub("[│╭╮╰╯─]", "", told.err).split())
    assert "Traceback" not in told.err
    assert "dummy" not in told.err


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said; a failure is one line, after any lines about progress."""
    told = capsys.readouterr()
    assert told.out == ""
    assert all(line.startswith("transformer-annotated: ") for line in told.err.splitlines())
    return told.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("translate {tmp}/nothing", "there is no such checkpoint or folder of a run"),
        ("translate {tmp}", "there is no checkpoint in this folder"),
        ("translate {run} --input {tmp}/nothing.de", "No such file or directory"),
        ("evaluate {run}/step-00000009", "there is no such checkpoint"),
        ("evaluate {run} --source fr --target en", "source and target must be one of"),
        ("info {run}/step-00000003/state.json", "there is no such checkpoint"),
        ("average {run} --output {run}", "output must be another folder than the run's own"),
        ("average {tmp} --output {tmp}/mean", "complete"),
        ("download toy --source fr", "source and target must be one of"),
        ("train --data toy --folder {run}", "is another run; it differs in"),
        ("train --data toy --source fr --folder {tmp}/x", "source and target must be one of"),
        ("train --data toy --folder {run}/metrics.jsonl", "is a file"),
    ],
)
def test_a_failure_is_status_1_and_one_line(
    command: str, message: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command.format(run=run, tmp=tmp_path))) == 1
    assert message in one_line(capsys)


# Training


def test_training_prints_the_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    assert [path.name for path in list_checkpoints(run)] == [
        "step-00000001", "step-00000002", "step-00000003",
    ]  # fmt: skip
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 3


def test_the_same_command_goes_on_where_the_run_stopped(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two steps and then one give the weights of three steps, to the bit."""
    command = ["train", *SMALL]
    for name, plan in (("a", [3]), ("b", [2, 3])):
        folder = beside(run, tmp_path / name)
        for steps in plan:
            assert main([*command, "--folder", str(folder), "--train.steps", str(steps)]) == 0
            told = capsys.readouterr()
            assert told.out == f"{folder}/step-{steps:08d}\n"
    assert "going on after step 2" in told.err
    a, b = (load_checkpoint(tmp_path / x / "step-00000003").model for x in "ab")
    assert all(bool((a[name] == b[name]).all()) for name in a)


def test_ctrl_c_saves_and_is_status_130(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = beside(run, tmp_path / "run") / "metrics.jsonl"

    def press() -> None:
        while not metrics.is_file() or not metrics.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    many = ["--train.steps", "100000", "--train.save-every", "100000"]
    assert main(["train", *SMALL, *many, "--folder", str(tmp_path / "run")]) == 130
    thread.join()
    told = capsys.readouterr()
    (left,) = list_checkpoints(tmp_path / "run")
    assert told.out == f"{left}\n"
    assert "stopped and saved; the same command goes on" in told.err


def test_ctrl_c_elsewhere_is_status_130(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with mock.patch.object(cli, "load_checkpoint", side_effect=KeyboardInterrupt):
        assert main(["info", str(run)]) == 130
    assert one_line(capsys) == "transformer-annotated: interrupted"


def test_a_loss_that_is_no_number_is_status_1(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = beside(run, tmp_path / "run")
    error = FloatingPointError("step 7: the loss is nan")
    with mock.patch.object(Trainer, "train", side_effect=error):
        assert main(["train", *SMALL, "--folder", str(folder)]) == 1
    assert one_line(capsys) == "transformer-annotated: step 7: the loss is nan"


def test_data_and_preset_decide_what_the_options_start_from() -> None:
    def recipe(command: str) -> Any:
        parsed = cli.parse(shlex.split(command))
        assert isinstance(parsed, cli.Train)
        return parsed.recipe

    assert recipe("train") == recipe("train --data toy") == PRESETS["toy"]
    assert recipe("train --data=toy --train.steps=107").train.steps == 107
    multi30k = recipe("train --data multi30k --source de --target en")
    assert (multi30k.data, multi30k.source, multi30k.target) == ("multi30k", "de", "en")
    assert multi30k.model != PRESETS["toy"].model
    for name, preset in PRESETS.items():
        assert recipe(f"train --preset {name}") == preset
    assert recipe("train --preset toy --data multi30k").model == PRESETS["toy"].model


# Translating


def translate(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    run: Path,
    data: bytes,
    *options: str,
) -> list[str]:
    type_in(monkeypatch, data)
    assert main(["translate", str(run), "--beam", "1", "--extra", "3", *options]) == 0
    out = capsys.readouterr().out
    assert out == "" or out.endswith("\n")
    return out.split("\n")[:-1]


def test_as_many_lines_as_went_in(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "\n".join(SENTENCES)
    lines = translate(monkeypatch, capsys, run, text.encode())
    assert len(lines) == 5
    assert lines[1] == lines[2] == ""
    assert lines[0] == lines[4] != ""
    assert translate(monkeypatch, capsys, run, (text + "\n").encode()) == lines
    assert translate(monkeypatch, capsys, run, text.replace("\n", "\r\n").encode()) == lines
    assert translate(monkeypatch, capsys, run, b"\xef\xbb\xbf" + text.encode()) == lines
    assert translate(monkeypatch, capsys, run, b"") == []
    assert translate(monkeypatch, capsys, run, b"\n\n\n") == ["", "", ""]
    file = tmp_path / "test.de"
    file.write_text(text, encoding="utf-8")
    assert translate(monkeypatch, capsys, run, b"", "--input", str(file)) == lines
    assert translate(monkeypatch, capsys, run / "step-00000003", text.encode()) == lines


def test_the_search_is_the_one_asked_for(run: Path) -> None:
    parsed = cli.parse(["translate", str(run), "--beam", "3", "--alpha", "0.5", "--extra", "9"])
    assert isinstance(parsed, cli.Translate)
    search: Any = parsed.decoding.search()
    assert search.func is cli.beam_search
    assert search.keywords == {"beam": 3, "alpha": 0.5, "extra": 9}
    parsed = cli.parse(["translate", str(run), "--beam", "1"])
    assert isinstance(parsed, cli.Translate)
    search = parsed.decoding.search()
    assert (search.func, search.keywords) == (cli.greedy_search, {"extra": 50})


def test_a_byte_that_is_not_utf8_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, "eins\nzwei\nGrüße\n".encode("latin-1"))
    assert main(["translate", str(run)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "transformer-annotated: standard input, line 3, byte 2 of the line: not UTF-8"
    )


def test_at_a_terminal_it_says_what_to_do(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    type_in(monkeypatch, b"der Hund\n", terminal=True)
    assert main(["translate", str(run), "--extra", "3"]) == 0
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert "type a sentence and press Enter; Ctrl-D ends" in told.err


def test_lines_come_when_they_arrive() -> None:
    class Pipe:
        def __init__(self, *parts: bytes) -> None:
            self.parts = list(parts)

        def read1(self, size: int) -> bytes:
            return self.parts.pop(0) if self.parts else b""

    pipe = Pipe(b"a\nb", b"b\n", "cü".encode()[:-1], "ü".encode()[-1:], b"c\n\nd")
    assert list(lines_as_they_come(pipe, "x")) == [["a"], ["bb"], ["cüc", ""], ["d"]]
    with pytest.raises(ValueError, match="x, line 3, byte 1 of the line: not UTF-8"):
        list(lines_as_they_come(Pipe(b"a\nb\n", b"c\xff\n"), "x"))


def start(*arguments: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-m", "transformer_annotated", *arguments],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_pipe_is_answered_at_once_and_may_break(run: Path) -> None:
    """A line is answered before the next is sent; a reader who leaves is no error to report."""
    program = start("translate", str(run), "--beam", "1", "--extra", "3")
    assert program.stdin
    assert program.stdout
    assert program.stderr
    program.stdin.write("der Hund schläft\n".encode())
    program.stdin.flush()
    assert program.stdout.readline().strip()
    program.stdout.close()
    program.stdin.write(b"die Frau\n" * 9)
    program.stdin.close()
    said = program.stderr.read().decode()
    program.stderr.close()
    assert program.wait() == 141
    assert said == "transformer-annotated: step-00000003, beam 1\n"


# Scores and checkpoints


def test_evaluate(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(run), "--beam", "1", "--limit", "4", "--extra", "2"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert re.match(r"BLEU \d+\.\d\d .*nrefs:1", text)
    output = tmp_path / "test.en"
    assert main([*command, "--json", "--output", str(output), "--split", "val"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["sentences"] == 4
    assert (told["data"], told["source"], told["target"], told["split"]) == (
        "toy", "de", "en", "val",
    )  # fmt: skip
    assert len(output.read_text().splitlines()) == 4


def test_a_model_that_does_not_know_its_corpus(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = load_checkpoint

    def forgetful(path: Path) -> Checkpoint:
        checkpoint = real(path)
        checkpoint.state.clear()
        return checkpoint

    with mock.patch.object(cli, "load_checkpoint", forgetful):
        assert main(["evaluate", str(run), "--data", "toy"]) == 1
        assert one_line(capsys).endswith("trained on: add --source, --target")


def test_average(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last_two = list_checkpoints(run)[-2:]
    expected = average_checkpoints(last_two)
    for paths in ([str(run), "--last", "2"], [str(path) for path in last_two]):
        assert main(["average", *paths, "--output", str(tmp_path / "mean")]) == 0
        told = capsys.readouterr()
        assert told.out == f"{tmp_path}/mean/step-00000003\n"
        mean = load_checkpoint(tmp_path / "mean" / "step-00000003")
        assert all(bool((mean.model[name] == expected[name]).all()) for name in expected)
        assert mean.state["averaged"] == ["step-00000002", "step-00000003"]
        assert mean.state["identity"]["recipe"]["data"] == "toy"
    assert main(["info", str(tmp_path / "mean")]) == 0


def test_info(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = load_checkpoint(run / "step-00000003")
    n = sum(tensor.numel() for tensor in checkpoint.model.values())
    assert main(["info", str(run)]) == 0
    text = capsys.readouterr().out
    for fact in ("step        3\n", f"{n:,}", checkpoint.tokenizer_sha256, "+ d_model = 16",
                 "data = toy", "training.safetensors, "):  # fmt: skip
        assert fact in text
    assert main(["info", str(run / "step-00000002"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["parameters"]) == (2, n)
    assert told["config"]["config"]["d_model"] == 16
    assert told["bytes"]["SHA256SUMS"] > 0


def test_a_damaged_checkpoint_is_reported(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "step-00000003" / "model.safetensors").write_bytes(b"")
    assert main(["info", str(copy)]) == 0  # the one before, and a warning
    told = capsys.readouterr()
    assert "step        2\n" in told.out
    assert "transformer-annotated: warning: passed over a checkpoint" in told.err
    assert main(["translate", str(copy / "step-00000003")]) == 1
    assert "damaged: 0 bytes" in one_line(capsys)


def test_download_of_what_needs_no_download(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", "toy"]) == 0
    assert capsys.readouterr().out == "toy de-en is at hand\n"


# Its page, and its place in the package


def test_the_page_shows_commands_that_exist() -> None:
    page = (ROOT / "book" / "cli.md").read_text(encoding="utf-8")
    shown = re.findall(r"transformer-annotated (\w+)([^|>\n`]*)", page)
    assert {name for name, _ in shown} >= set(COMMANDS)
    for name, rest in shown:
        if name in COMMANDS and rest.strip() not in ("", "--help"):
            assert isinstance(cli.parse([name, *shlex.split(rest)]), COMMANDS[name])


def test_the_examples_in_the_help_are_right() -> None:
    for kind in COMMANDS.values():
        for line in re.findall(r"transformer-annotated (\w+ [^|>\n]*)", kind.__doc__ or ""):
            cli.parse(shlex.split(line))


def test_the_console_script_is_this_function() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"transformer-annotated": "transformer_annotated.cli:main"}
    assert any(need.startswith("tyro") for need in project["optional-dependencies"]["train"])
