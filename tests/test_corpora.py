"""Chapter 12: files come whole, a line stays beside its translation, splits share no sentence."""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transformer_annotated.paper.multi30k import SHA256, data_directory, read_lines
from transformer_annotated.training import corpora as chapter
from transformer_annotated.training.corpora import (
    FRENCH,
    Pair,
    ParallelCorpus,
    Remote,
    align,
    at_hand,
    bare,
    components,
    contents,
    decoded,
    fetch,
    lines,
    obtain,
    open_corpus,
    overlap,
    segments,
    sentences,
    share,
    split_by_component,
    tatoeba_splits,
    toy_splits,
    unpack,
)

# A server and a folder for a trial


@dataclass
class Mirror:
    """What the server has, how it behaves, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    breaks: list[int] = field(default_factory=list)  # bytes until each of the next answers breaks
    knows_ranges: bool = True
    heeds_if_range: bool = True
    status: int = 200
    before: Callable[[], None] = lambda: None  # called before each answer


def answer(request: BaseHTTPRequestHandler, mirror: Mirror) -> None:
    """Answer a GET as a web server does: whole, from a byte on, or with an error."""
    wanted = request.headers.get("Range")
    mirror.asked.append((request.path, wanted))
    mirror.before()
    data = mirror.files.get(request.path)
    if data is None or mirror.status != 200:
        request.send_error(404 if data is None else mirror.status)
        return
    version = f'"{hashlib.sha256(data).hexdigest()[:8]}"'
    same = request.headers.get("If-Range") in (None, version) or not mirror.heeds_if_range
    start = int(wanted[6:-1]) if wanted and mirror.knows_ranges and same else 0
    if start >= len(data) > 0:
        request.send_error(416)
        return
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
    request.send_header("ETag", version)
    request.send_header("Content-Length", str(len(data) - start))
    request.end_headers()
    stop = start + mirror.breaks.pop(0) if mirror.breaks else len(data)
    request.wfile.write(data[start:stop])


@contextmanager
def served() -> Iterator[Mirror]:
    """A server on this machine, on a free port, in a thread."""
    mirror = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self, mirror)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    mirror.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield mirror
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def home() -> Iterator[Path]:
    """An empty data directory, and a home without a cache."""
    with tempfile.TemporaryDirectory() as folder:
        chosen = {
            "TRANSFORMER_ANNOTATED_DATA": str(Path(folder) / "data"),
            "HOME": folder,
            "USERPROFILE": folder,
        }
        with mock.patch.dict(os.environ, chosen):
            yield Path(folder) / "data"


def names(folder: Path) -> set[str]:
    """The files below a folder, without the locks."""
    found = (p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return {name for name in found if not name.endswith(".lock")}


def put(path: Path, data: bytes | str) -> Path:
    """Write a file; text goes into a gzip file where the name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(raw) if isinstance(data, str) and path.suffix == ".gz" else raw)
    return path


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


DATA = gzip.compress(os.urandom(200_000))


# Lines

SEPARATORS = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r"


@pytest.mark.parametrize("separator", SEPARATORS, ids=lambda s: f"U+{ord(s):04X}")
def test_only_a_newline_ends_a_line(separator: str) -> None:
    text = f"ein{separator}Hund\neine Katze\n"
    assert len(text.splitlines()) == 3  # the trap
    assert list(decoded(io.BytesIO(text.encode()), "x")) == [f"ein{separator}Hund", "eine Katze"]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"\n", [""]),
        (b"a", ["a"]),
        (b"a\n\n", ["a", ""]),
        (b"\xef\xbb\xbfa\n\xef\xbb\xbfb\n", ["a", "\ufeffb"]),  # the mark of the first line alone
        (b"a\r\nb\r\n", ["a", "b"]),
        (b"a\r\r\nb\rc", ["a\r", "b\rc"]),
        (" a \u00a0\n".encode(), [" a \u00a0"]),
    ],
)
def test_a_text_has_these_lines(data: bytes, expected: list[str], tmp_path: Path) -> None:
    assert list(lines(put(tmp_path / "plain.de", data))) == expected
    assert list(lines(put(tmp_path / "packed.gz", gzip.compress(data)))) == expected


@given(st.lists(st.text(st.characters(exclude_characters="\n\r", exclude_categories=["Cs"]))))
def test_lines_are_those_of_chapter_11(texts: list[str]) -> None:
    """Read one at a time they are the same as read at once."""
    with tempfile.TemporaryDirectory() as folder:
        path = put(Path(folder) / "x.gz", "".join(f"{text}\n" for text in texts))
        assert (list(lines(path)) or [""]) == read_lines(path)


@pytest.mark.parametrize("suffix", [".de", ".gz"])
@pytest.mark.parametrize(
    ("data", "line", "byte"),
    [
        (b"\xff", 1, 0),
        ("schön\n".encode() + b"gro\xdf\n", 2, 10),
        (b"a\n\nb\xc3", 3, 4),
        (b"\xef\xbb\xbfa\r\n\x80", 2, 6),
    ],
)
def test_a_byte_that_is_no_text_is_found(
    data: bytes, line: int, byte: int, suffix: str, tmp_path: Path
) -> None:
    packed = gzip.compress(data) if suffix == ".gz" else data
    path = put(tmp_path / f"train{suffix}", packed)
    with pytest.raises(ValueError, match=rf"train{suffix}, line {line}, byte {byte}: not UTF-8"):
        list(lines(path))


def test_half_a_gzip_file_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = put(tmp_path / "half.gz", gzip.compress(b"ein Hund\n" * 99)[:-9])
    with pytest.raises(ValueError, match=r"half\.gz is broken .*: delete it and retry"):
        list(lines(path))


# Pairs


def test_a_blank_side_takes_its_translation_with_it() -> None:
    german, english = ["eins", "", "drei", " \u00a0", "fünf"], ["one", "two", "", "\t", "five"]
    assert list(align(german, english, ("de", "en"))) == [("eins", "one"), ("fünf", "five")]


@pytest.mark.parametrize(("n", "m"), [(3, 2), (2, 3), (0, 1), (5, 1)])
def test_sides_of_different_length_are_refused(n: int, m: int) -> None:
    found: list[Pair] = []
    with pytest.raises(ValueError, match=f"x.de has {n} lines and x.en has {m}"):
        found.extend(align(["a"] * n, ["b"] * m, ("x.de", "x.en")))


def torchtext(folder: Path) -> tuple[Path, Path]:
    """An archive with the two traps of torchtext's copy of Multi30k: sides and AppleDouble."""
    archive = folder / "training.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (
            ("./._train.de", "\x00\x05\x16\x07"), ("train.de", "ein Hund\neine Katze\n\n"),
            ("./._train.en", "\x00\x05\x16\x07"), ("./train.en", "a dog\na cat\n\n"),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    german, english = unpack(archive, ["train.de", "train.en"], folder)
    return german, english


def test_the_traps_of_torchtexts_copy(tmp_path: Path) -> None:
    """An extra blank line at the end of both sides, and files that only a Mac can read."""
    german, english = torchtext(tmp_path)
    assert len(list(lines(german))) == 3
    pairs = list(align(lines(german), lines(english), ("de", "en")))
    assert pairs == [("ein Hund", "a dog"), ("eine Katze", "a cat")]
    assert names(tmp_path) == {"training.tar.gz", "train.de", "train.en"}


# Downloads


def test_a_file_is_downloaded_once() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        remote = Remote("some/x.gz", f"{mirror.url}/x.gz", sha256(DATA))
        assert at_hand(remote) is None
        for _ in range(2):
            assert obtain(remote) == [data / "some" / "x.gz"]
        assert same((data / "some" / "x.gz"), DATA)
        assert mirror.asked == [("/x.gz", None)]
        assert names(data) == {"some/x.gz"}


def test_a_broken_connection_is_taken_up_again() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"], mirror.breaks = DATA, [70_000, 0, 60_000]
        fetch(Remote("x.gz", f"{mirror.url}/x.gz", sha256(DATA)))
        assert same((data / "x.gz"), DATA)
        assert [r for _, r in mirror.asked] == [
            None, "bytes=70000-", "bytes=70000-", "bytes=130000-",
        ]  # fmt: skip
        assert names(data) == {"x.gz"}


def test_a_later_process_goes_on() -> None:
    """After too many breaks the part is kept; the next call asks for the rest."""
    with home() as data, served() as mirror:
        mirror.files["/x.gz"], mirror.breaks = DATA, [90_000, 0, 0, 0, 0]
        remote = Remote("x.gz", f"{mirror.url}/x.gz", sha256(DATA))
        with pytest.raises(OSError, match=r"cannot download http.*x\.gz .*broke again and again"):
            fetch(remote)
        assert names(data) == {"x.gz.part", "x.gz.part.json"}
        mirror.asked.clear()
        assert same(fetch(remote), DATA)
        assert mirror.asked == [("/x.gz", "bytes=90000-")]
        assert names(data) == {"x.gz"}


def same(path: Path, data: bytes) -> bool:
    """Whether a file holds these bytes. (A plain == would let pytest print their difference.)"""
    return path.read_bytes() == data


def test_a_server_that_sends_the_whole_file_again_is_obeyed() -> None:
    with home(), served() as mirror:
        mirror.files["/x.gz"], mirror.breaks, mirror.knows_ranges = DATA, [70_000], False
        assert same(fetch(Remote("x.gz", f"{mirror.url}/x.gz")), DATA)
        assert [r for _, r in mirror.asked] == [None, "bytes=70000-"]


def test_halves_of_two_files_are_never_joined() -> None:
    """The file changed while we were away: the server is asked to go on only with the old one."""
    new = gzip.compress(os.urandom(150_000))
    with home(), served() as mirror:
        mirror.files["/x.gz"], mirror.breaks = DATA, [70_000, 0, 0, 0, 0]
        remote = Remote("x.gz", f"{mirror.url}/x.gz")
        with pytest.raises(OSError, match="cannot download"):
            fetch(remote)
        mirror.files["/x.gz"] = new
        assert same(fetch(remote), new)


def test_a_kill_between_two_versions_does_not_join_them() -> None:
    """The file changed, and the process ends before the first byte of the new one is written."""
    new = gzip.compress(os.urandom(150_000))
    with home(), served() as mirror:
        mirror.files["/x.gz"], mirror.breaks = DATA, [70_000, 0, 0, 0, 0]
        remote = Remote("x.gz", f"{mirror.url}/x.gz")
        with pytest.raises(OSError, match="cannot download"):
            fetch(remote)
        mirror.files["/x.gz"] = new
        with (
            mock.patch.object(chapter, "receive", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            fetch(remote)
        assert same(fetch(remote), new)


def test_joined_halves_are_found_by_their_sum() -> None:
    """A server that heeds no If-Range: the sum is wrong, and the download begins anew."""
    new = DATA[:10] + os.urandom(len(DATA) - 10)
    with home(), served() as mirror:
        mirror.files["/x.gz"], mirror.breaks, mirror.heeds_if_range = (
            DATA,
            [70_000] + [0] * 4,
            False,
        )
        remote = Remote("x.gz", f"{mirror.url}/x.gz", sha256(new))
        with pytest.raises(OSError, match="cannot download"):
            fetch(remote)
        mirror.files["/x.gz"] = new
        mirror.asked.clear()
        assert same(fetch(remote), new)
        assert [r for _, r in mirror.asked] == ["bytes=70000-", None]


def test_a_part_that_is_whole_already_is_fetched_anew() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        url = f"{mirror.url}/x.gz"
        version = f'"{hashlib.sha256(DATA).hexdigest()[:8]}"'
        put(data / "x.gz.part", DATA)
        put(data / "x.gz.part.json", json.dumps({"url": url, "version": version}).encode())
        assert same(fetch(Remote("x.gz", url, sha256(DATA))), DATA)
        assert [r for _, r in mirror.asked] == [f"bytes={len(DATA)}-", None]  # 416, then all


@pytest.mark.parametrize(
    "note", [b"", b"{}", b"{half", b'{"url": "http://elsewhere", "version": "\\"1\\""}']
)
def test_a_part_of_unknown_origin_is_not_used(note: bytes) -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        put(data / "x.gz.part", b"something else")
        if note:
            put(data / "x.gz.part.json", note)
        assert same(fetch(Remote("x.gz", f"{mirror.url}/x.gz")), DATA)
        assert mirror.asked == [("/x.gz", None)]


def test_a_download_with_another_sum_leaves_nothing() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = gzip.compress(b"another text")
        remote = Remote("x.gz", f"{mirror.url}/x.gz", sha256(DATA))
        with pytest.raises(ValueError, match=r"x\.gz has sha256 .* this book expects .* changed"):
            fetch(remote)
        assert names(data) == set()


@pytest.mark.parametrize("path", ["x.gz", "x.tgz", "x.zip", "x.tar", "x.txt"])
@pytest.mark.parametrize("page", [b"<!DOCTYPE html><p>Not here", b"  <HTML>"])
@pytest.mark.parametrize("known", [True, False])
def test_an_error_page_is_refused(path: str, page: bytes, known: bool) -> None:
    """Also where no sum is known, and the server says 200."""
    with home() as data, served() as mirror:
        mirror.files[f"/{path}"] = page
        digest = sha256(DATA) if known else ""
        with pytest.raises(ValueError, match="sent something else, perhaps an error page"):
            fetch(Remote(path, f"{mirror.url}/{path}", digest))
        assert names(data) == set()


@pytest.mark.parametrize("status", [403, 404, 503])
def test_an_error_of_the_server_says_what_to_put_where(status: int) -> None:
    with home() as data, served() as mirror:
        if status != 404:
            mirror.files["/x.gz"], mirror.status = DATA, status
        with pytest.raises(OSError, match=rf"HTTP Error {status}.*; put the file at") as caught:
            fetch(Remote("a/x.gz", f"{mirror.url}/x.gz"))
        assert f"{mirror.url}/x.gz" in str(caught.value)
        assert str(data / "a" / "x.gz") in str(caught.value)
        assert names(data) == set()


def test_without_network_the_error_says_what_to_put_where() -> None:
    with home() as data:
        remote = Remote("a/x.gz", "http://127.0.0.1:9/x.gz", sha256(DATA))
        with pytest.raises(OSError, match="cannot download") as caught:
            obtain(remote)
        assert "http://127.0.0.1:9/x.gz" in str(caught.value)
        assert str(data / "a" / "x.gz") in str(caught.value)
        put(data / "a" / "x.gz", DATA)
        assert obtain(remote) == [data / "a" / "x.gz"]


def test_an_unknown_sum_is_recorded_and_checked_from_then_on() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        remote = Remote("x.gz", f"{mirror.url}/x.gz")
        obtain(remote)
        assert f"sha256:{(data / 'x.gz.sha256').read_text().strip()}" == sha256(DATA)
        assert obtain(remote) == [data / "x.gz"]
        put(data / "x.gz", DATA[:-1])
        with pytest.raises(ValueError, match=r"x\.gz\.sha256 expects .*: delete"):
            obtain(remote)
        (data / "x.gz").unlink()
        mirror.files["/x.gz"] = gzip.compress(b"a newer text")
        with pytest.raises(ValueError, match=r"x\.gz\.sha256 expects .* changed, or broke"):
            obtain(remote)
        (data / "x.gz.sha256").unlink()  # the reader wants the newer one
        obtain(remote)
        assert names(data) == {"x.gz", "x.gz.sha256"}


def test_an_interrupted_download_is_not_at_its_place() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        remote = Remote("x.gz", f"{mirror.url}/x.gz", sha256(DATA))
        with (
            mock.patch("os.replace", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            fetch(remote)
        assert "x.gz" not in names(data)
        assert same(fetch(remote), DATA)


def test_bytes_are_on_the_disk_before_the_name_is() -> None:
    """fsync, rename within the folder, fsync of the folder; and the sum is checked before."""
    done: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def watch(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            done.append(name)
            if name == "replace":
                assert Path(args[0]).parent == Path(args[1]).parent
                assert same(Path(args[0]), DATA)
            return real[name](*args)

        return call

    with home(), served() as mirror:
        mirror.files["/x.gz"] = DATA
        with mock.patch("os.fsync", watch("fsync")), mock.patch("os.replace", watch("replace")):
            fetch(Remote("x.gz", f"{mirror.url}/x.gz", sha256(DATA)))
    assert done[:2] == ["fsync", "replace"]
    assert done[2:] == (["fsync"] if os.name == "posix" else [])


def test_two_processes_download_once() -> None:
    """While another process downloads, this one waits; both read the same complete file."""
    code = (
        "import sys\n"
        "from transformer_annotated.training.corpora import Remote, obtain\n"
        "print(len(obtain(Remote('x.gz', sys.argv[1]), progress=False)[0].read_bytes()))\n"
    )
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        url, began = f"{mirror.url}/x.gz", threading.Event()

        def slow() -> None:
            began.set()
            time.sleep(0.3)

        mirror.before = slow
        command = [sys.executable, "-c", code, url]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=Path(__file__).parent.parent, text=True
        ) as other:
            assert began.wait(60)
            assert obtain(Remote("x.gz", url)) == [data / "x.gz"]
            assert same((data / "x.gz"), DATA)
            assert other.communicate()[0] == f"{len(DATA)}\n"
        assert mirror.asked == [("/x.gz", None)]
        assert names(data) == {"x.gz", "x.gz.sha256"}


def test_a_download_without_end_is_stopped() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        receive = chapter.receive

        def small(*args: Any) -> int:
            return receive(*args, limit=1000)

        with mock.patch.object(chapter, "receive", small), pytest.raises(ValueError, match="1,000"):
            fetch(Remote("x.gz", f"{mirror.url}/x.gz"))
        assert names(data) == set()


def test_files_are_looked_for_in_the_data_directory_then_in_the_cache() -> None:
    with home() as data:
        cache = data.parent / ".cache" / "transformer_annotated"
        remote = Remote("a/x.txt", "http://127.0.0.1:9/x.txt")
        put(cache / "a" / "x.txt", b"cache")
        assert obtain(remote) == [cache / "a" / "x.txt"]
        put(data / "a" / "x.txt", b"data")
        assert obtain(remote) == [data / "a" / "x.txt"]


def test_what_is_fetched_goes_where_one_can_write() -> None:
    with home() as data, served() as mirror:
        mirror.files["/x.gz"] = DATA
        data.mkdir()
        with mock.patch("os.access", lambda path, mode: Path(path) != data):
            path = fetch(Remote("x.gz", f"{mirror.url}/x.gz"))
        assert path == data.parent / ".cache" / "transformer_annotated" / "x.gz"
        with (
            mock.patch("os.access", return_value=False),
            pytest.raises(OSError, match="can be written"),
        ):
            fetch(Remote("y.gz", f"{mirror.url}/x.gz"))


# Archives


def tar_with(path: Path, *members: tuple[str, bytes | dict[str, Any]]) -> Path:
    """A tar archive; bytes are a file's, a dict the fields of another member."""
    with tarfile.open(path, "w:gz") as tar:
        for name, what in members:
            info = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                info.size = len(what)
                tar.addfile(info, io.BytesIO(what))
            else:
                for key, value in what.items():
                    setattr(info, key, value)
                tar.addfile(info)
    return path


def zip_with(path: Path, *members: tuple[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, data in members:
            packed.writestr(name, data)
    return path


HOSTILE_NAMES = ["../evil", "a/../../evil", "/tmp/evil", "..", "a\\..\\evil", "C:/evil"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_leads_out_is_refused(name: str, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        members = ("good.txt", b"good"), (name, b"evil")
        inner = Path(folder) / "inner"
        inner.mkdir()
        path = (
            tar_with(inner / "x.tgz", *members)
            if kind == "tar"
            else zip_with(inner / "x.zip", *members)
        )
        with pytest.raises(ValueError, match=r"x\.(tgz|zip) has a member"):
            unpack(path, ["good.txt", name], inner)
        assert names(Path(folder)) == {f"inner/{path.name}"}


@pytest.mark.parametrize(
    "member",
    [
        {"type": tarfile.SYMTYPE, "linkname": "../../outside"},
        {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        {"type": tarfile.LNKTYPE, "linkname": "../outside"},
        {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        {"type": tarfile.FIFOTYPE},
    ],
    ids=["symlink", "absolute symlink", "hard link", "device", "pipe"],
)
def test_links_out_and_devices_are_refused(member: dict[str, Any], tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x.tgz", ("link", member), ("link/good.txt", b"good"))
    with pytest.raises(
        ValueError, match=r"x\.tgz has a member that leads out of it or is a device: 'link'"
    ):
        unpack(path, ["link/good.txt"], tmp_path)
    assert names(tmp_path) == {"x.tgz"}


def test_a_link_inside_the_archive_is_passed_over(tmp_path: Path) -> None:
    path = tar_with(
        tmp_path / "x.tgz",
        ("folder", {"type": tarfile.DIRTYPE}),
        ("link", {"type": tarfile.SYMTYPE, "linkname": "folder"}),
        ("folder/good.txt", b"good"),
    )
    assert [name for name, _ in contents(path)] == ["folder/good.txt"]
    with pytest.raises(ValueError, match="has no member link"):
        unpack(path, ["link"], tmp_path)


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
def test_a_bomb_is_refused_before_it_is_unpacked(suffix: str, tmp_path: Path) -> None:
    make = tar_with if suffix == ".tgz" else zip_with
    big = make(tmp_path / f"big{suffix}", ("a", bytes(10**6)), ("b", bytes(10**6)))
    assert big.stat().st_size < 5_000
    with pytest.raises(ValueError, match=r"more than 10,000 files or 1,500,000 bytes"):
        list(contents(big, max_bytes=1_500_000))
    many = make(tmp_path / f"many{suffix}", *[(f"{i}", b"") for i in range(11)])
    with pytest.raises(ValueError, match=r"more than 10 files"):
        list(contents(many, max_members=10))
    assert len(list(contents(many, max_members=11))) == 11


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
def test_half_an_archive_leaves_nothing(suffix: str, tmp_path: Path) -> None:
    make = tar_with if suffix == ".tgz" else zip_with
    path = make(tmp_path / f"x{suffix}", ("a.txt", os.urandom(10_000)), ("b.txt", b"b"))
    path.write_bytes(path.read_bytes()[:6_000])
    with pytest.raises(ValueError, match=r"is broken .*: delete it and retry"):
        unpack(path, ["a.txt", "b.txt"], tmp_path)
    assert names(tmp_path) == {path.name}


def test_a_member_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tar_with(tmp_path / "x.tgz", ("a.txt", b"a"))
    with pytest.raises(ValueError, match=r"x\.tgz has no member b\.txt, c\.txt"):
        unpack(path, ["a.txt", "b.txt", "c.txt"], tmp_path)
    assert names(tmp_path) == {"x.tgz"}


# The interface


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [("wmt15", "de", "en"), ("toy", "de", "fr"), ("multi30k", "en", "cs"), ("tatoeba", "de", "fr"),
     ("wmt14", "en", "en"), ("", "de", "en"), ("multi30k", "EN", "de")],
)  # fmt: skip
def test_an_unknown_corpus_or_language_is_refused(name: str, source: str, target: str) -> None:
    with pytest.raises(ValueError, match=r"^(name|source and target) must be one of .* got '"):
        open_corpus(name, source, target)


@pytest.mark.parametrize("name", ["toy", "multi30k", "tatoeba", "wmt14"])
def test_opening_a_corpus_fetches_nothing(name: str) -> None:
    with home() as data:
        corpus = open_corpus(name)
        assert (corpus.name, corpus.source, corpus.target) == (name, "de", "en")
        assert corpus.splits == ("train", "val", "test")
        assert bool(corpus.missing()) == (name != "toy")
        assert corpus.missing() == list(dict.fromkeys(corpus.missing()))
        with pytest.raises(ValueError, match="split must be one of train, val, test, got 'valid'"):
            corpus.stream("valid")
        assert names(data.parent) == set()
        with pytest.raises(AttributeError):
            corpus.name = "x"  # type: ignore[misc]


# The small language


def test_the_small_language_has_three_splits_that_share_no_sentence() -> None:
    corpus, turned = open_corpus("toy"), open_corpus("toy", "en", "de")
    splits = [corpus.pairs(split) for split in corpus.splits]
    assert [len(pairs) for pairs in splits] == [20_000, 500, 500]
    for side in (0, 1):
        all_of_it = [pair[side] for pairs in splits for pair in pairs]
        assert len(set(all_of_it)) == len(all_of_it)
    assert turned.pairs("val") == [(english, german) for german, english in splits[1]]
    assert 5 < sum(len(german.split()) for german, _ in splits[2]) / 500 < 14  # short and long
    corpus.download()
    assert toy_splits() is toy_splits()


# Multi30k


def small_multi30k(data: Path) -> dict[str, str]:
    """Gzip files of a few lines in place of the real ones, and their sums."""
    text = {"de": "ein Hund\n@@\neine Katze\n", "en": "a dog\na horse\na cat\n",
            "fr": "un chien\nun cheval\nun chat\n"}  # fmt: skip
    sums = {}
    for split in ("train", "val", "test_2016_flickr"):
        for language in text:
            path = put(data / "multi30k" / f"{split}.{language}.gz", text[language])
            sums[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return sums


@pytest.mark.parametrize("source", ["de", "en", "fr"])
@pytest.mark.parametrize("target", ["de", "en", "fr"])
def test_multi30k_in_every_direction(source: str, target: str) -> None:
    if source == target:
        with pytest.raises(ValueError, match="de-en, en-fr, de-fr, in either order"):
            open_corpus("multi30k", source, target)
        return
    last = {"de": "eine Katze", "en": "a cat", "fr": "un chat"}
    with home() as data, mock.patch.dict(chapter.FRENCH, small_multi30k(data)):
        corpus = open_corpus("multi30k", source, target)
        assert corpus.missing() == []
        for split in corpus.splits:
            pairs = corpus.pairs(split)
            assert len(pairs) == (2 if "de" in (source, target) else 3)
            assert pairs[-1] == (last[source], last[target])
            assert list(corpus.stream(split)) == pairs
        put(data / "multi30k" / f"val.{source}.gz", "ein anderer Text\n")
        with pytest.raises(ValueError, match=rf"val\.{source}\.gz has sha256 .* this book expects"):
            corpus.pairs("val")


def test_multi30k_knows_a_sum_for_each_file() -> None:
    assert len(SHA256 | FRENCH) == 9
    for split in open_corpus("multi30k", "fr", "de").files.values():
        assert [len(remote.digest) for remote in split] == [len("sha256:") + 64] * 2


# Tatoeba

ROWS = [
    ("Go.", "Geh."), ("Go.", "Geh!"), ("Go!", "Los!"), ("Run!", "Los!"), ("Run!", "Lauf!"),
    ("I see.", "Ich verstehe."), ("I understand.", "Ich verstehe."), ("Hi.", "Hallo!"),
]  # fmt: skip


def test_pairs_that_share_a_sentence_are_in_one_group() -> None:
    """Directly, or through others: Go, Los, Run, Lauf."""
    assert sorted(map(sorted, components(ROWS))) == [[0, 1, 2, 3, 4], [5, 6], [7]]
    assert components([]) == []
    assert components([("a", "b"), ("b", "a")]) == [[0], [1]]  # the same word in two languages


def drawn(n: int) -> list[Pair]:
    """`n` pairs, many of which share a sentence with another."""
    return [(f"Sentence {i * i % (n // 2)}.", f"Satz {i * 7 % (2 * n // 3)}!") for i in range(n)]


def test_no_sentence_is_in_two_splits() -> None:
    """Not even with another sign at its end."""
    pairs = [(f"Sentence {i // 3}{'.!?'[i % 3]}", f"Satz {i // 2}") for i in range(9_000)]
    splits = split_by_component(pairs)
    for side in (0, 1):
        sets = [{bare(pair[side]) for pair in splits[name]} for name in ("train", "val", "test")]
        assert len(set().union(*sets)) == sum(map(len, sets))
    assert min(map(len, splits.values())) > 0
    assert set(splits["train"]) < set(pairs)


def test_the_split_depends_neither_on_the_order_nor_on_the_rest() -> None:
    pairs = drawn(3_000)
    splits = split_by_component(pairs)
    turned = split_by_component(pairs[::-1])
    assert {k: set(v) for k, v in turned.items()} == {k: set(v) for k, v in splits.items()}
    new = [(f"New {i}", f"Neu {i}") for i in range(1_000)]
    more = split_by_component(pairs + new)
    for name, found in splits.items():
        assert set(found) == set(more[name]) - set(new)


def test_shares_are_spread_evenly() -> None:
    found = [share(str(i)) for i in range(10_000)]
    assert all(0 <= number < 1 for number in found)
    assert abs(sum(number < 0.01 for number in found) / 10_000 - 0.01) < 0.003
    assert share("Hallo") == pytest.approx(0.4578640, abs=1e-6)


def test_overlap_counts_each_side() -> None:
    train = [("a", "1"), ("b", "2"), ("c", "3")]
    pairs = [("a", "1"), ("a", "1"), ("a", "2"), ("d", "3"), ("d", "4")]
    assert overlap(pairs, train) == (3, 4, 2)
    assert overlap([], train) == overlap(pairs, []) == (0, 0, 0)


@pytest.mark.parametrize("columns", [2, 3])
def test_tatoebas_archive_is_read(columns: int) -> None:
    """Two columns or three; a byte-order mark, U+2028 inside and blank sides do no harm."""
    rows = [(f"Go {i}.\u2028", f"Geh {i}!", "CC-BY 2.0 (France)") for i in range(400)]
    text = "\ufeff" + "".join("\t".join(row[:columns]) + "\n" for row in rows) + "a\t \n\nb\n"
    with home() as data:
        put(data / "tatoeba" / "x", b"")
        zip_with(
            data / "tatoeba" / "deu-eng.zip", ("_about.txt", b"CC"), ("deu.txt", text.encode())
        )
        german, english = open_corpus("tatoeba"), open_corpus("tatoeba", "en", "de")
        assert german.missing() == []
        found = [pair for split in german.splits for pair in german.pairs(split)]
        assert sorted(found) == sorted((row[1], row[0]) for row in rows)
        assert german.pairs("test")
        assert english.pairs("test") == [(b, a) for a, b in german.pairs("test")]
        with pytest.raises(ValueError, match=r"deu-eng\.zip has no member fra\.txt"):
            tatoeba_splits(data / "tatoeba" / "deu-eng.zip", "fra.txt")


def test_a_bad_byte_in_tatoebas_archive_is_found(tmp_path: Path) -> None:
    path = zip_with(tmp_path / "deu-eng.zip", ("deu.txt", b"Hi.\tHallo!\nGo.\tGr\xfc\xdf\n"))
    with pytest.raises(ValueError, match=r"deu-eng\.zip, deu\.txt, line 2, byte 17: not UTF-8"):
        tatoeba_splits(path, "deu.txt")


# WMT14, from a small mirror

SGM = """<srcset setid="newstest2014" srclang="any">
<doc sysid="ref" docid="1" genre="news" origlang="en">
<hl>
<seg id="1">{} one &amp; only</seg>
</hl>
<p>
<seg id="2"> {}  two\u00a0</seg>
</p>
</doc>
</srcset>
"""


def small_wmt14(mirror: Mirror, folder: Path) -> str:
    """The archives of the paper's data with a few lines each; returns the sum of test-full.tgz."""

    def sides(pattern: str, text: str, others: tuple[str, ...] = ("de", "fr")) -> list[Any]:
        return [
            (pattern.format(other=other, side=side), text.replace("#", side).encode())
            for other in others
            for side in (other, "en")
        ]

    texts = {
        "wmt13/training-parallel-europarl-v7.tgz": sides(
            "training/europarl-v7.{other}-en.{side}", "# parliament\n\n# a\u2028b\n"
        ),
        "wmt13/training-parallel-commoncrawl.tgz": sides(
            "commoncrawl.{other}-en.{side}", "# web\x85page\n"
        ),
        "wmt14/training-parallel-nc-v9.tgz": sides(
            "training/news-commentary-v9.{other}-en.{side}", "# news\n"
        ),
        "wmt13/training-parallel-un.tgz": sides(
            "un/undoc.2000.{other}-en.{side}", "# nations\n", ("fr",)
        ),
        "wmt10/training-giga-fren.tar": [
            (name, gzip.compress(data))
            for name, data in sides("giga-fren.release2.fixed.{side}.gz", "# giga\n", ("fr",))
        ],
        "wmt14/dev.tgz": [
            *sides("dev/newstest2013.{side}", "# news of 2013\n", ("de", "fr"))[:3],
            ("dev/newstest2012.en", b"old"),
        ],
        "wmt14/test-full.tgz": [
            (f"test-full/newstest2014-{pair}-{role}.{side}.sgm", SGM.format(side, side).encode())
            for pair, both in (("deen", ("de", "en")), ("fren", ("fr", "en")))
            for side in both
            for role in ("src", "ref")
        ],
    }
    for name, members in texts.items():
        path = tar_with(folder / "archive.tgz", *members)
        data = path.read_bytes()
        if name.endswith(".tar"):
            data = gzip.decompress(data)
        mirror.files[f"/{name}"] = data
    return f"md5:{hashlib.md5(mirror.files['/wmt14/test-full.tgz']).hexdigest()}"


@contextmanager
def wmt14() -> Iterator[tuple[Path, Mirror]]:
    """A data directory and a small mirror that the chapter takes for statmt.org."""
    with home() as data, served() as mirror, tempfile.TemporaryDirectory() as folder:
        known = {
            side: hashlib.sha256(f"{side} news of 2013\n".encode()).hexdigest()
            for side in ("de", "en", "fr")
        }
        with (
            mock.patch.object(chapter, "STATMT", mirror.url),
            mock.patch.object(chapter, "TEST_FULL", small_wmt14(mirror, Path(folder))),
            mock.patch.dict(chapter.NEWSTEST2013, known),
        ):
            yield data, mirror


@pytest.mark.parametrize(
    ("source", "target"), [("en", "de"), ("de", "en"), ("en", "fr"), ("fr", "en")]
)
def test_wmt14_from_a_small_mirror(source: str, target: str) -> None:
    """Fetched, unpacked, filtered and aligned; the second reading needs no server."""
    with wmt14() as (_, mirror):
        corpus = open_corpus("wmt14", source, target)
        assert len(corpus.missing()) == (5 if "de" in (source, target) else 7)
        train = ["parliament", "a\u2028b", "web\x85page", "news"]
        train += ["nations", "giga"] if "fr" in (source, target) else []
        for _ in range(2):
            assert corpus.pairs("train") == [(f"{source} {t}", f"{target} {t}") for t in train]
            assert corpus.pairs("val") == [(f"{source} news of 2013", f"{target} news of 2013")]
            assert corpus.pairs("test") == [
                (f"{source} one &amp; only", f"{target} one &amp; only"),
                (f"{source} two", f"{target} two"),
            ]
            corpus.download(progress=False)
        assert corpus.missing() == []
        assert (
            len(mirror.asked)
            == len(set(mirror.asked))
            == len(mirror.files) - (2 if "de" in (source, target) else 0)
        )


def test_wmt14_reads_newstest2013_from_the_local_layout() -> None:
    with wmt14() as (data, mirror):
        for side in ("en", "de"):
            put(data / "wmt-news" / f"newstest2013.{side}.gz", f"{side} news of 2013\n")
        corpus = open_corpus("wmt14", "en", "de")
        assert corpus.missing("val") == []
        assert corpus.pairs("val") == [("en news of 2013", "de news of 2013")]
        assert mirror.asked == []
        put(data / "wmt-news" / "newstest2013.de.gz", "de news of 2012\n")
        with pytest.raises(ValueError, match=r"newstest2013\.de\.gz is not the newstest2013"):
            corpus.pairs("val")


def test_wmt14s_test_set_is_checked() -> None:
    with wmt14() as (data, mirror):
        mirror.files["/wmt14/test-full.tgz"] = mirror.files["/wmt14/dev.tgz"]
        with pytest.raises(ValueError, match=r"test-full\.tgz has md5 .* this book expects"):
            open_corpus("wmt14", "en", "de").pairs("test")
        assert names(data) == set()


def test_an_archive_put_there_by_hand_is_unpacked() -> None:
    with wmt14() as (data, mirror):
        put(data / "wmt14" / "dev.tgz", mirror.files["/wmt14/dev.tgz"])
        assert open_corpus("wmt14", "en", "fr").missing("val") == []
        assert open_corpus("wmt14", "en", "fr").pairs("val") == [
            ("en news of 2013", "fr news of 2013")
        ]
        assert mirror.asked == []
        assert names(data) == {"wmt14/dev.tgz", "wmt14/newstest2013.en", "wmt14/newstest2013.fr"}


def test_segments_are_sacrebleus(tmp_path: Path) -> None:
    from sacrebleu.dataset import DATASETS

    path = put(tmp_path / "newstest2014-deen-src.en.sgm", SGM.format("en", "en").encode())
    DATASETS["wmt14/full"]._convert_format(str(path), str(tmp_path / "out"))
    assert list(segments(path)) == (tmp_path / "out").read_text(encoding="utf-8").splitlines()
    assert list(sentences(path)) == list(segments(path))


def test_the_test_set_of_wmt14_is_sacrebleus() -> None:
    """Address, sum and members, for each direction."""
    from sacrebleu.dataset import DATASETS

    known = DATASETS["wmt14/full"]
    for source, target in (("en", "de"), ("de", "en"), ("en", "fr"), ("fr", "en")):
        (remote,) = open_corpus("wmt14", source, target).files["test"]
        assert [remote.url.replace("//www.", "//")] == known.data
        assert [remote.digest] == [f"md5:{sum_}" for sum_ in known.md5]
        assert list(remote.members) == known.langpairs[f"{source}-{target}"]


# The real files


def at_hand_or_skip(name: str, source: str, target: str, split: str) -> ParallelCorpus:
    corpus = open_corpus(name, source, target)
    if corpus.missing(split):
        pytest.skip(f"{name} is not in TRANSFORMER_ANNOTATED_DATA")
    return corpus


@pytest.mark.data
@pytest.mark.parametrize(
    ("source", "target", "n"), [("de", "en", 28_998), ("en", "fr", 29_000), ("fr", "de", 28_998)]
)
def test_the_real_multi30k(source: str, target: str, n: int) -> None:
    corpus = at_hand_or_skip("multi30k", source, target, "train")
    assert [len(corpus.pairs(split)) for split in corpus.splits] == [n, 1_014, 1_000]


@pytest.mark.data
def test_the_real_multi30k_is_that_of_chapter_11() -> None:
    from transformer_annotated.paper.multi30k import multi30k

    corpus = at_hand_or_skip("multi30k", "de", "en", "train")
    assert corpus.pairs("train") == multi30k("train")
    assert corpus.pairs("test") == multi30k("test_2016_flickr")


@pytest.mark.data
@pytest.mark.parametrize(("language", "n"), [("de", 160_000), ("fr", 130_000)])
def test_the_real_tatoeba_shares_no_sentence_between_splits(language: str, n: int) -> None:
    corpus = at_hand_or_skip("tatoeba", language, "en", "train")
    splits = [corpus.pairs(split) for split in corpus.splits]
    assert len(splits[0]) > n
    assert all(800 < len(pairs) < 1_500 for pairs in splits[1:])
    for side in (0, 1):
        train, val, test = ({bare(pair[side]) for pair in pairs} for pairs in splits)
        assert len(train | val | test) == len(train) + len(val) + len(test)
        for i, found in ((1, val), (2, test)):
            assert len(found) == len(splits[i])  # nor twice in one


@pytest.mark.data
@pytest.mark.parametrize("language", ["de", "fr"])
def test_the_real_newstest2013(language: str) -> None:
    corpus = at_hand_or_skip("wmt14", "en", language, "val")
    assert len(corpus.pairs("val")) == 3_000


@pytest.mark.data
def test_the_real_newstest2009_has_a_trap() -> None:
    path = data_directory() / "wmt-news" / "newstest2009.de.gz"
    if not path.is_file():
        pytest.skip("newstest2009 is not in TRANSFORMER_ANNOTATED_DATA")
    with gzip.open(path) as file:
        text = file.read().decode()
    assert (len(list(lines(path))), len(text.splitlines())) == (2_525, 2_533)


@pytest.mark.data
def test_the_real_torchtext_copy(tmp_path: Path) -> None:
    folder = data_directory() / "multi30k-torchtext"
    if not (folder / "training.tar.gz").is_file():
        pytest.skip("torchtext's copy is not in TRANSFORMER_ANNOTATED_DATA")
    german, english = unpack(folder / "training.tar.gz", ["train.de", "train.en"], tmp_path)
    assert len(list(lines(german))) == 29_001
    assert len(list(align(lines(german), lines(english), ("de", "en")))) == 29_000
    found = unpack(folder / "mmt16_task1_test.tar.gz", ["test.de", "test.en"], tmp_path)
    assert [len(list(lines(path))) for path in found] == [1_000, 1_000]
