# %% [markdown]
r"""
# Corpora

Four sources of sentence pairs behind one small interface: the language of Chapter 9, captions, everyday sentences, and the news and parliament
text of the paper. Files are fetched with care, and a line stays beside its translation.
"""

# %% [markdown]
# Part I ended with one corpus and a few lines to read it. Part II can open four, up to the 4.5 million pairs that the paper had. At that size nobody reads the data through,
# so a fault in it goes unseen: the loss falls a little less far, and no message says why.
#
# This chapter is about the faults. Each has a small example that you can run.

# %% mystnb={"figure": {"caption": "Chapter 12, the first of Part II: where the sentences come from.", "name": "fig-map-corpora"}, "image": {"alt": "Thirteen boxes in a row, one a chapter. The first, Corpora, is filled."}} tags=["active-ipynb", "remove-input"]
# from transformer_annotated import figures
#
# figures.use_style()
# figures.reading_map(12);

# %%
import functools
import gzip
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise, zip_longest
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

from transformer_annotated.paper.multi30k import SHA256, URL, data_directory
from transformer_annotated.paper.toy import pairs as grammar

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Pair = tuple[str, str]

# %% [markdown]
# ## What is a line?
#
# A parallel corpus is two text files. Line 1 of the German file is the translation of line 1 of the English one, and so on. Nothing else holds them together, so everything depends on
# what counts as the end of a line. Here are two German lines and two English ones, read with Python's `splitlines`:

# %% tags=["active-ipynb"]
# german = "Er kam\u2028spät.\nSie ging.\n"
# english = "He came late.\nShe left.\n"
# for pair in zip(german.splitlines(), english.splitlines(), strict=False):
#     print(pair)

# %% [markdown]
# *spät* is now the translation of *She left*. The character between *kam* and *spät* is U+2028. Unicode calls it a line separator. It is one of eight characters that end a line for `splitlines`,
# besides `\n` and `\r`: `\x0b`, `\x0c`, `\x1c`, `\x1d`, `\x1e`, `\x85`, `\u2028` and `\u2029`. In a corpus it is only dirt inside a sentence. From there on every pair is wrong, and `zip` drops what is left over at the end.
#
# So: only the byte `\n` ends a line. A binary file in Python is cut in just this way, one line at a time, so a file of two gigabytes needs no more memory than its longest line. Three more habits of files are dealt with in the same
# place. Some begin with a byte-order mark, three bytes that would stick to the first word. Some come from Windows and end each line with `\r\n`. And some hold bytes that are not UTF-8: those are an error with file, line and byte, because a guess would
# put a wrong letter into the vocabulary.

# %%
@contextmanager
def readable(origin: object) -> Iterator[None]:
    """What a broken packed file raises inside becomes a ValueError that names it."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zipfile.BadZipFile, zlib.error, tarfile.ReadError) as error:
        raise ValueError(f"{origin} is broken ({error}): delete it and retry") from error


def decoded(file: Iterable[bytes], origin: object) -> Iterator[str]:
    r"""The lines of a UTF-8 text, one at a time; only \n ends a line.

    A byte-order mark at the start is left out, and so is the \r of a Windows line end.

    Raises:
        ValueError: a byte is not UTF-8 (with origin, line and byte offset), or the file is packed
            and broken.
    """
    offset = 0
    with readable(origin):
        for number, raw in enumerate(file, 1):
            try:
                text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
            except UnicodeDecodeError as error:
                where = f"{origin}, line {number}, byte {offset + error.start}"
                raise ValueError(f"{where}: not UTF-8") from error
            yield text.removeprefix("\ufeff") if number == 1 else text
            offset += len(raw)


def lines(path: Path) -> Iterator[str]:
    """`decoded` for a file, plain or gzipped; byte offsets are those of the unpacked text."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        yield from decoded(file, path)

# %% tags=["active-ipynb"]
# import io
#
# print(list(decoded(io.BytesIO(b"\xef\xbb\xbf" + german.encode()), "talk.de")))
# try:
#     list(decoded(io.BytesIO("Er ging.\nGrüße!\n".encode("latin-1")), "greetings.de"))
# except ValueError as error:
#     print(error)

# %% [markdown]
# Does this happen in real files? The German side of newstest2009, a test set of the Workshop on Machine Translation (WMT), has U+0085 where an ellipsis was meant: in a code of Windows, byte 85 is an ellipsis.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# path = data_directory() / "wmt-news" / "newstest2009.de.gz"
# if not path.is_file():
#     print("newstest2009 is not at hand")
# else:
#     with gzip.open(path) as file:
#         text = file.read().decode()
#     print(f"{len(list(lines(path))):,} lines, and {len(text.splitlines()):,} by splitlines")

# %% [markdown]
# ## Two sides stay together
#
# Some lines have nothing on them. In Europarl, the debates of the European Parliament, some pairs have a blank line on one side. It is tempting to drop blank lines while reading.
# Done to each file by itself, this shifts all that follows. A pair is dropped whole or kept whole.
#
# And if one file is longer than the other, something is wrong with one of them, and nobody knows with which line it began. That is an error, with both counts.

# %%
def align(first: Iterable[str], second: Iterable[str], names: tuple[str, str]) -> Iterator[Pair]:
    """Line i of one side with line i of the other; a pair with a blank side is left out, whole.

    Raises:
        ValueError: one side has more lines; the message has both counts. It comes when both
            sides have been read, after the pairs of the shorter one.
    """
    n = m = 0
    for a, b in zip_longest(first, second):
        n, m = n + (a is not None), m + (b is not None)
        if a is not None and b is not None and a.strip() and b.strip():
            yield a, b
    if n != m:
        raise ValueError(f"{names[0]} has {n:,} lines and {names[1]} has {m:,}")

# %% tags=["active-ipynb"]
# german, english = ["Ja.", "Danke.", "Tschüss."], ["Yes.", "", "Bye."]
# print("each side by itself:", list(zip(filter(None, german), filter(None, english), strict=False)))
# print("pair by pair:       ", list(align(german, english, ("de", "en"))))
# try:
#     list(align(german, english[:2], ("talk.de", "talk.en")))
# except ValueError as error:
#     print(error)

# %% [markdown]
# The same rule settles another trap. The copy of Multi30k that the library torchtext downloads ends both training files with an extra blank line. Pair by pair it vanishes.
#
# ## The way of a file
#
# Now to the files themselves. {numref}`fig-corpora-way` shows the stations. Each arrow is a place where something breaks in practice: a connection, a server that answers with an error page, a process that is killed,
# two processes that want the same file.

# %% tags=["hide-input"]
def draw_way() -> "Figure":
    """The stations of a file, from the web to pairs of sentences."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import FancyBboxPatch

    from transformer_annotated import figures

    figure, ax = plt.subplots(figsize=(7.2, 1.7))
    boxes = ["the web", "train.de.gz\n.part", "checked\npart", "train.de.gz", "pairs of\nlines"]
    for i, text in enumerate(boxes):
        colour = "#DCE9F5" if i == 3 else "#F3F6FA"
        ax.add_patch(
            FancyBboxPatch((2 * i, 0), 1.2, 1, boxstyle="round,pad=0.08", fc=colour, ec="#888888")
        )
        ax.text(2 * i + 0.6, 0.5, text, ha="center", va="center", fontsize=8.5)
    arrow = {"arrowstyle": "->", "color": figures.COLORS[4]}
    for i, text in enumerate(["transfer", "check", "rename", "align"]):
        ax.annotate("", (2 * i + 1.9, 0.5), (2 * i + 1.3, 0.5), arrowprops=arrow)
        ax.text(2 * i + 1.6, 0.68, text, ha="center", va="bottom", fontsize=7.5)
    back = arrow | {"connectionstyle": "arc3,rad=-0.3", "color": figures.COLORS[1]}
    ax.annotate("", (0.7, -0.12), (2.5, -0.12), arrowprops=back)
    ax.text(1.6, -0.78, "broken: ask for the rest", ha="center", color=figures.COLORS[1], fontsize=8)
    ax.set(xlim=(-0.2, 9.4), ylim=(-0.9, 1.2))
    ax.axis("off")
    return figure

# %% mystnb={"figure": {"caption": "A file gets its name last: whoever sees the name sees a complete, checked file.", "name": "fig-corpora-way"}, "image": {"alt": "Five boxes in a row joined by arrows: the web, a part, the part checked, the file in its place, pairs of lines. The arrows say transfer, check, rename, align. An arrow from the part back to the web says: broken, go on from here."}} tags=["active-ipynb"]
# draw_way();

# %% [markdown]
# A `Remote` describes a file: where it lies below the data directory, its address, and the **sum** by which it is recognised, a fingerprint of its bytes as in Chapter 11.
# Files are looked for in the folder that the environment variable `TRANSFORMER_ANNOTATED_DATA` names, then in your cache, and only then on the web. So a machine without network needs nothing but a folder.

# %%
@dataclass(frozen=True)
class Remote:
    """A file of a corpus: its place below the data directory, its URL, and its sum.

    `digest` is `algorithm:hex`, or empty where this book does not know it: then the sum of the
    first download is recorded beside the file. `members` are the files taken out of an archive;
    they lie beside it under their last name. `instead` are files that serve as well.
    """

    path: str
    url: str
    digest: str = ""
    members: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What is read in the end: the members, or the file itself."""
        folder = PurePosixPath(self.path).parent
        return tuple(str(folder / PurePosixPath(m).name) for m in self.members) or (self.path,)


def places() -> list[Path]:
    """Where files are looked for: `TRANSFORMER_ANNOTATED_DATA`, then the user's cache."""
    cache = Path.home() / ".cache" / "transformer_annotated"
    return list(dict.fromkeys([data_directory(), cache]))


def find(path: str) -> Path | None:
    """The first of the `places` that has this file."""
    return next((place / path for place in places() if (place / path).is_file()), None)


def at_hand(remote: Remote) -> list[Path] | None:
    """The files that a remote stands for, or None where something would have to be fetched."""
    for names in (remote.instead, remote.texts):
        found = [path for path in map(find, names) if path is not None]
        if names and len(found) == len(names):
            return found
    return None

# %% tags=["active-ipynb"]
# archive = Remote("wmt14/dev.tgz", "https://www.statmt.org/wmt14/dev.tgz", members=("dev/a.en",))
# print("read in the end:", *archive.texts)
# print("at hand:", at_hand(Remote("no/such.file", "https://example.org/no/such.file")))

# %% [markdown]
# ### Is it the right file?
#
# For Multi30k and for the test sets of WMT the sum is known. For two kinds of files it is not: the large training archives of WMT14 were not at hand when this was written, and Tatoeba's host renews its files. For those the first download is trusted, its SHA-256 is written
# beside it, and the file is compared with that from then on. This finds a file that changed or decayed. It cannot find one that was wrong from the beginning.

# %%
def sum_of(path: Path, algorithm: str = "sha256") -> str:
    """The file's sum in hexadecimal; the file is read piece by piece."""
    with path.open("rb") as file:
        start = functools.partial(hashlib.new, algorithm, usedforsecurity=False)
        return hashlib.file_digest(file, start).hexdigest()


def recorded(place: Path) -> Path:
    """The small file beside a download that holds its SHA-256."""
    return place.with_name(place.name + ".sha256")


def verify(path: Path, remote: Remote, place: Path) -> None:
    """Raise ValueError unless the file has the sum of its remote, or else the recorded one.

    `place` is where the file belongs; a sum is recorded beside it. With no sum nothing is checked.
    """
    note, expected, knows = recorded(place), remote.digest, "this book"
    if not expected and note.is_file():
        expected, knows = f"sha256:{note.read_text(encoding='ascii').strip()}", note.name
    if expected:
        algorithm, _, value = expected.partition(":")
        if (found := sum_of(path, algorithm)) != value:
            remedy = f"delete {place}" if path == place else f"{remote.url} changed, or broke"
            raise ValueError(
                f"{place.name} has {algorithm} {found}, and {knows} expects {value}: {remedy}"
            )

# %% tags=["active-ipynb"]
# with tempfile.TemporaryDirectory() as folder:
#     place, remote = Path(folder) / "x.txt", Remote("x.txt", "https://example.org/x.txt")
#     place.write_bytes(b"What the server sent in May.")
#     recorded(place).write_text(sum_of(place))
#     verify(place, remote, place)  # says nothing: the sums agree
#     place.write_bytes(b"What the server sent in June.")
#     try:
#         verify(place, remote, place)
#     except ValueError as error:
#         print(str(error).replace(f"{folder}/", ""))

# %% [markdown]
# Servers make one mistake that looks like success: status 200, *all is well*, and then a web page that says sorry. Its sum would be recorded like any other. So the first bytes are compared with what the name promises: a gzip file begins with `1f 8b`, a zip file with `PK`.

# %%
MAGIC = {  # how a file of this kind begins: from which byte, and with what
    ".gz": (0, b"\x1f\x8b"),
    ".tgz": (0, b"\x1f\x8b"),
    ".zip": (0, b"PK"),
    ".tar": (257, b"ustar"),
}


def refuse_other_kinds(path: Path, remote: Remote) -> None:
    """Raise ValueError unless the file begins as its name promises; an error page does not."""
    start, magic = MAGIC.get(PurePosixPath(remote.path).suffix, (0, b""))
    with path.open("rb") as file:
        head = file.read(512)
    page = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    if page or head[start : start + len(magic)] != magic:
        raise ValueError(f"{remote.url} sent something else, perhaps an error page: {head[:40]!r}")

# %% tags=["active-ipynb"]
# with tempfile.TemporaryDirectory() as folder:
#     page = Path(folder) / "train.de.gz.part"
#     page.write_bytes(b"<!DOCTYPE html><title>Sorry</title>")
#     print("sum:", sum_of(page)[:16], "...")
#     try:
#         refuse_other_kinds(page, Remote("train.de.gz", "https://example.org/train.de.gz"))
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ### Going on where it broke
#
# A large archive takes long to fetch. When the connection breaks after half of it, one wants the other half only. HTTP can do that. The request says `Range: bytes=40000-`, *from byte 40,000 on*, and the answer
# has status 206 and says where it begins.
#
# There is a danger in it. If the file on the server was renewed in between, the two halves belong to different files. The server therefore gives each version of a file a mark (`ETag`, or the time of its last change), we keep it beside the part, and the second request
# adds `If-Range` with the old mark: *the rest, if it is still this version, or else everything*.

# %%
def transfer(url: str, part: Path, progress: bool) -> bool:
    """Fetch `url` into `part`, from where an earlier attempt stopped; True when it is complete.

    The rest is asked for only if the server still has the same file (`If-Range`). A server that
    sends the whole file again is obeyed.
    """
    note = part.with_name(part.name + ".json")
    seen = json.loads(note.read_text()) if part.is_file() and note.is_file() else {}
    done = part.stat().st_size if seen.get("url") == url and seen.get("version") else 0
    headers = {"User-Agent": "transformer-annotated", "Accept-Encoding": "identity"}
    if done:
        headers |= {"Range": f"bytes={done}-", "If-Range": seen["version"]}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        if not (answer.headers.get("Content-Range") or "").startswith(f"bytes {done}-"):
            done = 0
            part.unlink(missing_ok=True)  # before the note says that it is of this version
        etag = answer.headers.get("ETag") or ""  # a weak one, W/"...", promises too little
        version = etag if etag.startswith('"') else answer.headers.get("Last-Modified")
        note.write_text(json.dumps({"url": url, "version": version}))
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        received = receive(answer, part, done, total, progress)
        return received == (total or received)

# %%
def receive(
    answer: Any, part: Path, done: int, total: int | None, progress: bool, limit: int = 8 * 2**30
) -> int:
    """Write what comes to `part`, from byte `done` on, and return the size it has then."""
    from tqdm import tqdm

    shown = tqdm(
        total=total, initial=done, unit="B", unit_scale=True, unit_divisor=1024,
        desc=part.stem, disable=None if progress else True,
    )  # fmt: skip
    with part.open("r+b" if done else "wb") as file, shown:
        file.seek(done)
        while data := answer.read(2**18):
            file.write(data)
            shown.update(len(data))
            if file.tell() > limit:
                raise ValueError(f"{part.name} grew beyond {limit:,} bytes")
        return file.tell()

# %% [markdown]
# `receive` counts bytes, since Python's own reader ends without complaint when a connection closes early. To see `transfer` at work we need a server that breaks. This one lives on your machine, for a moment:

# %% tags=["active-ipynb"]
# import threading
# from http.server import BaseHTTPRequestHandler, HTTPServer
#
# parcel, asked = random.Random(0).randbytes(100_000), []
#
#
# class Moody(BaseHTTPRequestHandler):
#     """Serves the parcel from any byte on; its first answer breaks off."""
#
#     def do_GET(self) -> None:
#         asked.append(self.headers["Range"])
#         start = int(self.headers["Range"][6:-1]) if self.headers["Range"] else 0
#         self.send_response(206 if start else 200)
#         if start:
#             self.send_header("Content-Range", f"bytes {start}-99999/100000")
#         self.send_header("Content-Length", str(len(parcel) - start))
#         self.send_header("ETag", '"first edition"')
#         self.end_headers()
#         self.wfile.write(parcel[start:] if start else parcel[:40_000])
#
#     def log_message(self, *_: object) -> None:
#         """Says nothing."""

# %% tags=["active-ipynb"]
# with HTTPServer(("127.0.0.1", 0), Moody) as server, tempfile.TemporaryDirectory() as folder:
#     threading.Thread(target=server.serve_forever, daemon=True).start()
#     part = Path(folder) / "parcel.part"
#     for _ in range(2):
#         complete = transfer(f"http://127.0.0.1:{server.server_port}/", part, progress=False)
#         print(f"asked for {asked[-1]}: complete {complete}, {part.stat().st_size:,} bytes so far")
#     assert part.read_bytes() == parcel
#     server.shutdown()

# %% [markdown]
# ### The name comes last
#
# A file that is being written looks like a file. A process that is killed, or a machine that loses power, would leave half of it under the right name, and the next run would read it. So the part has another name. It is written out to the disk (`fsync`), and then
# renamed. Renaming within a folder happens at once or not at all. {cite:t}`pillai2014all` show what goes wrong in programs that leave out a step.
#
# Two processes may start at once, as they do when a model is trained on two GPUs. A lock lets one in; the other waits, and then finds the file in its place. The lock belongs to the process, so a dead one blocks nobody.

# %%
def put_in_place(part: Path, path: Path) -> None:
    """Rename a finished file: its bytes are on the disk before it has its name."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    if os.name == "posix":  # the name, too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time is inside, for this path; a process that dies lets the next one in."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock")):
        yield

# %% [markdown]
# `fetch` puts the steps together. A broken connection is taken up again; there are five attempts at most. A part that was begun by an earlier run may itself be at fault, so a wrong sum is given one more try from the first byte. What fails in the end leaves nothing under the file's name, and the message says which
# file to put where by hand.

# %%
def fetch(remote: Remote, progress: bool = True, attempts: int = 5) -> Path:
    """The downloaded file, checked, in its place; a broken connection is taken up again.

    Raises:
        OSError: no network, or it breaks again and again; the message says what to put where.
        ValueError: the server sent another file than expected; nothing of it is kept.
    """
    place = writable() / remote.path
    part = place.with_name(place.name + ".part")
    note = part.with_name(part.name + ".json")
    with alone(place):
        if found := find(remote.path):  # another process was faster
            return found
        cause: Exception | None = None
        for _ in range(attempts):
            old = part.is_file()
            try:
                if transfer(remote.url, part, progress):
                    refuse_other_kinds(part, remote)
                    verify(part, remote, place)
                    break
            except urllib.error.HTTPError as error:
                error.close()
                if not (old and error.code == 416):  # "that range is not in this file"
                    raise unreachable(remote, place, error) from error
                part.unlink()
            except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
                cause = error
            except OSError as error:
                raise unreachable(remote, place, error) from error
            except ValueError:
                part.unlink()
                if not old:  # what was begun earlier may be at fault: try once more without it
                    note.unlink()
                    raise
        else:
            raise unreachable(remote, place, cause) from cause
        if not remote.digest and not recorded(place).is_file():
            recorded(place).write_text(sum_of(part) + "\n", encoding="ascii")
        put_in_place(part, place)
        note.unlink()
        return place

# %% tags=["hide-input"]
def writable() -> Path:
    """The first of the `places` that can be written, made if need be."""
    for place in places():
        exists = next(p for p in (place, *place.parents) if p.exists())
        if os.access(exists, os.W_OK):
            return place
    raise OSError(f"none of {', '.join(map(str, places()))} can be written")


def unreachable(remote: Remote, place: Path, cause: Exception | None) -> OSError:
    """The error that says what to fetch by hand and where to put it."""
    reason = cause or "the connection broke again and again"
    return OSError(f"cannot download {remote.url} ({reason}); put the file at {place}")

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from unittest import mock
#
# with tempfile.TemporaryDirectory() as folder:
#     try:
#         with mock.patch.dict(os.environ, TRANSFORMER_ANNOTATED_DATA=folder):
#             fetch(Remote("some/train.de.gz", "http://127.0.0.1:9/train.de.gz"))
#     except OSError as error:
#         print(str(error).replace(folder, "FOLDER"))

# %% [markdown]
# Nobody listens at that address, and the message says what you can do about it.
#
# ## Archives can be hostile
#
# The paper's data come as archives: many files in one. An archive says where each file is to be written, and it can say `../../home/you/.profile`. Python's `extractall` did as it was told, until version 3.14.
# An archive can also unpack to a thousand times its size and fill the disk.
#
# Here a member is never written under the name that the archive gives it. We ask for members by name and choose where they go. On top of that, an archive in which any name or link leads out, any member is a device, or the sizes add up to too much is refused as a
# whole: whoever built it did not mean well, or the download is not what it seems. Python's `tarfile.data_filter` knows the tricks with links.

# %%
MAX_UNPACKED, MAX_MEMBERS = 64 * 2**30, 10_000
HOSTILE = "a member that leads out of it or is a device"


def contents(
    archive: Path, max_bytes: int = MAX_UNPACKED, max_members: int = MAX_MEMBERS
) -> Iterator[tuple[str, IO[bytes]]]:
    """The files in a tar or zip archive, name and open file, one after the other.

    Raises:
        ValueError: a name or a link leads out of the archive, a member is a device, the archive
            is larger or has more members than allowed, or it is broken.
    """
    total = 0
    with readable(archive):
        for count, (name, size, opened) in enumerate(entries(archive), 1):
            total += size
            if count > max_members or total > max_bytes:
                limits = f"{max_members:,} files or {max_bytes:,} bytes"
                raise ValueError(f"{archive} unpacks to more than {limits}")
            if PurePosixPath(name).is_absolute() or {"..", "\\", ":"} & {*name.split("/"), *name}:
                raise ValueError(f"{archive} has {HOSTILE}: {name!r}")
            with opened() as file:
                yield str(PurePosixPath(name)), file  # "./a" is "a"

# %% tags=["hide-input"]
Entry = tuple[str, int, Callable[[], IO[bytes]]]


def entries(archive: Path) -> Iterator[Entry]:
    """Name, unpacked size and opener of each file in a tar or zip archive.

    Folders and links inside the archive are passed over.
    """
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if not info.is_dir():
                    yield info.filename, info.file_size, functools.partial(packed.open, info)
        return
    with tarfile.open(archive) as tar:
        for member in tar:
            try:
                tarfile.data_filter(member, str(archive.parent))  # links that lead out, devices
            except tarfile.FilterError as error:
                raise ValueError(f"{archive} has {HOSTILE}: {member.name!r}") from error
            if member.isreg():
                yield member.name, member.size, functools.partial(reader, tar, member)


def reader(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    """The open file behind a regular member."""
    file = tar.extractfile(member)
    assert file is not None
    return file

# %% tags=["active-ipynb", "nbval-ignore-output"]
# def tar_of(path: Path, **sizes: int) -> Path:
#     """A small archive of empty bytes; `up` in a name becomes `../`."""
#     with tarfile.open(path, "w:gz") as tar:
#         for name, size in sizes.items():
#             info = tarfile.TarInfo(name.replace("up", "../"))
#             info.size = size
#             tar.addfile(info, io.BytesIO(bytes(size)))
#     return path
#
#
# with tempfile.TemporaryDirectory() as folder:
#     climbing = tar_of(Path(folder) / "climbing.tgz", upprofile=10)
#     bomb = tar_of(Path(folder) / "bomb.tgz", zeros=50_000_000)
#     print(f"bomb.tgz has {bomb.stat().st_size:,} bytes")
#     for archive in (climbing, bomb):
#         try:
#             list(contents(archive, max_bytes=10_000_000))
#         except ValueError as error:
#             print(str(error).replace(f"{folder}/", ""))

# %%
def unpack(archive: Path, members: Sequence[str], folder: Path) -> list[Path]:
    """Take the named members out of an archive and put them, whole, into `folder`.

    A member lies there under the last part of its name. Raises ValueError as `contents` does, and
    for a member that is not there; then nothing is left behind.
    """
    folder.mkdir(parents=True, exist_ok=True)
    targets = {member: folder / PurePosixPath(member).name for member in members}
    with tempfile.TemporaryDirectory(dir=folder) as scratch, readable(archive):
        taken = {}
        for name, file in contents(archive):
            if name in targets and name not in taken:
                taken[name] = Path(scratch) / targets[name].name
                with taken[name].open("wb") as copy:
                    shutil.copyfileobj(file, copy, 2**20)
        if missing := [name for name in members if name not in taken]:
            raise ValueError(f"{archive} has no member {', '.join(missing)}")
        for name, part in taken.items():
            put_in_place(part, targets[name])
    return list(targets.values())


def obtain(remote: Remote, progress: bool = True) -> list[Path]:
    """The files that a remote stands for: from the `places`, else downloaded; checked, unpacked.

    Raises:
        OSError: no network; the message has the URL and where to put the file.
        ValueError: a file is not the expected one, or an archive is hostile or broken.
    """
    if found := at_hand(remote):
        if not remote.members:
            verify(found[0], remote, found[0])
        return found
    archive = find(remote.path)
    if archive is None:
        archive = fetch(remote, progress)
    else:
        verify(archive, remote, archive)
    if not remote.members:
        return [archive]
    folder = (writable() / remote.path).parent
    with alone(folder / archive.name):
        return at_hand(remote) or unpack(archive, remote.members, folder)

# %% [markdown]
# The corpora below get their files from `obtain`. A file is checked when it is downloaded or found; texts that were unpacked earlier are taken as they are.
#
# ## One interface
#
# A corpus has a name, two languages and three splits: `train` to learn from, `val` to choose by, `test` to look at once. `pairs` gives a list; `stream` gives one pair at a time, for a corpus that does not fit into memory.
# `missing` says what would have to be fetched, and fetches nothing.
#
# Sentences come **as people wrote them**: no small letters, no cutting into words. That is the business of the next chapter, and BLEU needs the untouched references.

# %%
@dataclass(frozen=True)
class ParallelCorpus:
    """Pairs of sentences in two languages, in three splits, as people wrote them.

    `read` gives the pairs of a split; `files` says which files it needs for that.
    """

    name: str
    source: str
    target: str
    read: Callable[[str], Iterator[Pair]] = field(repr=False, compare=False)
    files: Mapping[str, tuple[Remote, ...]] = field(default_factory=dict, repr=False, compare=False)
    splits: tuple[str, ...] = ("train", "val", "test")

    def stream(self, split: str) -> Iterator[Pair]:
        """The (source, target) pairs of a split, one at a time; files are fetched if need be.

        Raises ValueError for an unknown split and for faulty files, OSError without network.
        """
        if split not in self.splits:
            raise ValueError(f"split must be one of {', '.join(self.splits)}, got {split!r}")
        return self.read(split)

    def pairs(self, split: str) -> list[Pair]:
        """The same as a list."""
        return list(self.stream(split))

    def missing(self, split: str | None = None) -> list[str]:
        """The URLs that would have to be fetched for a split, or for all; nothing is fetched."""
        remotes = [r for s in self.splits if split in (None, s) for r in self.files.get(s, ())]
        return list(dict.fromkeys(r.url for r in remotes if not (at_hand(r) or find(r.path))))

    def download(self, progress: bool = True) -> None:
        """Fetch, check and unpack all that is missing; a bar on a terminal shows how far it is."""
        for split in self.splits:
            for remote in self.files.get(split, ()):
                obtain(remote, progress)

# %% [markdown]
# ### The small language
#
# Nothing to download: 20,000 pairs to train on come out of the grammar, and twice 500 to evaluate. One trap is left. In Chapter 9 several German orders share one English sentence. Translating from English, such a sentence could be in training *and* in the test. So only one German order of each is kept.

# %%
@functools.cache
def toy_splits() -> dict[str, list[Pair]]:
    """(German, English) sentences of chapter 9: 20,000, 500 and 500.

    Several German orders share one English sentence. Only the first is kept, so that no sentence
    of either language is in two splits.
    """
    first: dict[str, str] = {}
    for german, english in grammar(21_500, seed=0):
        first.setdefault(english, german)
    both = [(german, english) for english, german in first.items()]
    random.Random(0).shuffle(both)  # the short sentences are found first
    return {"train": both[:20_000], "val": both[20_000:20_500], "test": both[20_500:21_000]}


def read_toy(swap: bool, split: str) -> Iterator[Pair]:
    """The pairs of a split, English first if `swap`."""
    return iter([(b, a) if swap else (a, b) for a, b in toy_splits()[split]])


def open_toy(source: str, target: str) -> ParallelCorpus:
    """The small language; nothing is downloaded."""
    return ParallelCorpus("toy", source, target, functools.partial(read_toy, source == "en"))

# %% tags=["active-ipynb"]
# corpus = open_toy("en", "de")
# print(corpus, "needs", corpus.missing() or "no files")
# print({split: len(corpus.pairs(split)) for split in corpus.splits})
# print(corpus.pairs("test")[0])

# %% [markdown]
# ### Captions
#
# Files with a sentence in each line are read by `lines`. WMT's test sets, below, have a kind of markup instead, one sentence in each `<seg>`; `segments` reads it as sacreBLEU does, exactly. `sentences` chooses between the two, so that one reader serves both corpora.

# %%
def segments(path: Path) -> Iterator[str]:
    """The sentences in a WMT test set: what stands between `<seg ...>` and `</seg>`."""
    for line in lines(path):
        if line.startswith("<seg "):
            text = re.sub(r"<seg.*?>(.*)</seg>.*?", r"\1", line)
            yield re.sub(r"\s+", " ", text.strip())


def sentences(path: Path) -> Iterator[str]:
    """The `segments` of a test set with the suffix .sgm, the `lines` of any other file."""
    return segments(path) if path.suffix == ".sgm" else lines(path)

# %% [markdown]
# Multi30k again, now with its French side {cite:p}`elliott2016multi30k,elliott2017findings`, in any of six directions. Two German lines hold only `@@` and are left out; without German they stay.

# %%
FRENCH = {
    "train.fr.gz": "622e75069e9f4c577425c4f277116ce66e63a2401c0a2312d90073cb12379a3c",
    "val.fr.gz": "ca3106f1a72390591d25f6c45cb4cd39dec4cd3f123e099748a3ce5256c160e9",
    "test_2016_flickr.fr.gz": "6d326e188d259fb1d04ac19eae3af956559b3a0b93d7635e56c90987c40c8b90",
}
Files = Mapping[str, tuple[Remote, ...]]


def read_lines_of(files: Files, placeholder: str | None, split: str) -> Iterator[Pair]:
    """The aligned lines of each remote or pair of remotes, one after the other."""
    paths = [path for remote in files[split] for path in obtain(remote)]
    for a, b in zip(paths[::2], paths[1::2], strict=True):
        for pair in align(sentences(a), sentences(b), (str(a), str(b))):
            if placeholder not in pair:
                yield pair


def open_multi30k(source: str, target: str) -> ParallelCorpus:
    """Captions in English, German and French, without the two whose German is `@@`."""
    sums, files = SHA256 | FRENCH, {}
    for split, prefix in (("train", "train"), ("val", "val"), ("test", "test_2016_flickr")):
        names = [f"{prefix}.{language}.gz" for language in (source, target)]
        files[split] = tuple(
            Remote(f"multi30k/{name}", f"{URL}/{name}", f"sha256:{sums[name]}") for name in names
        )
    read = functools.partial(read_lines_of, files, "@@")
    return ParallelCorpus("multi30k", source, target, read, files)

# %% tags=["active-ipynb", "nbval-ignore-output"]
# corpus = open_multi30k("de", "fr")
# if corpus.missing():
#     print("Multi30k is not at hand")
# else:
#     print({split: len(corpus.pairs(split)) for split in corpus.splits})
#     print(*next(corpus.stream("test")), sep="\n")

# %% [markdown]
# No English in sight: the German and the French caption describe the same photograph, and were both made from the English one.
#
# ### Everyday sentences, and a leak
#
# Tatoeba is a collection of sentences that volunteers write and translate. The site *manythings.org* packs the English ones with their translations: one line a pair, a tab between the sides. It is several times as large as Multi30k, and free to use.
#
# It has no splits, so we must make them. The obvious way is to draw lines at random. Look at the file first:

# %% tags=["active-ipynb", "nbval-ignore-output"]
# from transformer_annotated.book import scale
#
# archive = find("tatoeba/deu-eng.zip")
# rows: list[Pair] = []
# if archive is None:
#     print("Tatoeba is not at hand: the cells about it are skipped")
# else:
#     with zipfile.ZipFile(archive) as packed:
#         text = packed.read("deu.txt").decode()
#     rows = [(en, de) for en, de, *_ in (line.split("\t") for line in text.split("\n") if line)]
#     copies = Counter(en for en, _ in rows)
#     print(f"{len(rows):,} lines, {len(copies):,} English sentences")
#     ((often, n),) = copies.most_common(1)
#     print(f"{often} ({n} lines)", *[de for en, de in rows if en == often][:6], sep="\n    ")

# %% [markdown]
# One English sentence, many translations, a line for each. Put one of these lines into the test, and its neighbours stay in training. The model has then seen the English sentence, and a German one that differs in a word.
#
# How often? Say each line goes to the test with probability $p$, and an English sentence has $k$ lines. Take one that is in the test. Its sentence is unseen only if the $k - 1$ others are in the test, too:
#
# $$
# P(\text{seen in training}) = 1 - p^{\,k - 1}
# $$ (eq-leak)
#
# For a sentence with two lines and $p = 0.01$ that is 99 in 100. Equation {eq}`eq-leak` is easy to test: draw, and count.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# if rows:
#     p, rng = 0.01, random.Random(0)
#     chosen = [rng.random() < p for _ in rows]
#     training = {en for (en, _), test in zip(rows, chosen, strict=True) if not test}
#     tested = [en for (en, _), test in zip(rows, chosen, strict=True) if test]
#     predicted = sum(1 - p ** (copies[en] - 1) for en in tested)
#     found = sum(en in training for en in tested)
#     print(f"{len(tested):,} test lines drawn at random")
#     print(f"English sentence also in training: {found:,}, by the equation {predicted:,.1f}")

# %% [markdown]
# A large part of such a test is no test. The remedy: lines that share a sentence must go together. And not only they. If line A shares its English with B, and B its German with C, then A and C belong together as well. The groups are the **connected components** of a graph: each sentence is a point, each line an edge between an English and a German point.
#
# `components` finds them by *union-find*. Every point refers to another of its group, and following the references leads to one point that stands for all. A new edge lets one of two such points refer to the other. Case and the sign at the end do not count: *Go.* and *Go!* are the same point.

# %%
def components(pairs: Sequence[Pair]) -> list[list[int]]:
    """Indices of the pairs, grouped so that no sentence is in two groups.

    Pairs that share a sentence are in one group, and so are pairs with a common neighbour, and
    so on. Case and the sign at the end of a sentence do not count.
    """
    parent: dict[tuple[int, str], tuple[int, str]] = {}

    def root(node: tuple[int, str]) -> tuple[int, str]:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for pair in pairs:
        parent[root((0, bare(pair[0])))] = root((1, bare(pair[1])))
    groups: dict[tuple[int, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        groups.setdefault(root((0, bare(pair[0]))), []).append(i)
    return list(groups.values())


def bare(sentence: str) -> str:
    """A sentence in small letters, without the sign at its end."""
    return sentence.casefold().strip(" .!?\u2026\u00a0\u202f\u2009")

# %% tags=["active-ipynb"]
# little = [("Go.", "Geh."), ("Go!", "Los!"), ("Run!", "Los."), ("Hi.", "Hallo!")]
# for group in components(little):
#     print([little[i] for i in group])

# %% [markdown]
# *Go* and *Run* are together because both can be *Los*. Could this join everything into one huge group? {numref}`fig-corpora-groups` counts.

# %% tags=["hide-input"]
def draw_groups(sizes: Sequence[int]) -> "Figure":
    """How many groups there are of each size, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 2.6))
    counted = sorted(Counter(sizes).items())
    ax.loglog(*zip(*counted, strict=True), "o", markersize=4)
    ax.set(xlabel="pairs in a group", ylabel="groups of that size")
    return figure

# %% mystnb={"figure": {"caption": "Groups stay small: most have one pair, and the largest is a vanishing part of the whole.", "name": "fig-corpora-groups"}, "image": {"alt": "Number of groups against pairs in a group, both axes logarithmic. The points fall from about a hundred thousand groups of one pair to single groups of several dozen."}} tags=["active-ipynb", "nbval-ignore-output"]
# if rows:
#     sizes = [len(group) for group in components(rows)]
#     draw_groups(sizes)
#     print(f"{len(sizes):,} groups; the largest has {max(sizes)} of {len(rows):,} pairs")

# %% [markdown]
# Which groups are for the test? A random number would depend on the order of the file, and this file is renewed now and then. So the sentence itself decides. SHA-256 turns the alphabetically first sentence $s$ of a group into 256 bits that look like chance and are always the same. The first 64 of them, read as a fraction, are a number between 0 and 1:
#
# $$
# u(s) = \mathrm{SHA256}(s)_{\text{first 64 bits}} \,/\, 2^{64}
# $$ (eq-test-share)
#
# Below 0.01 it is the test, below 0.02 validation, else training. When the file grows, old groups stay where they were unless new lines join them. Of a group outside training only one pair is kept, so that no sentence is counted twice.

# %%
def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, and is spread evenly."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def split_by_component(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """One group in a hundred to test, one to validate, the rest to train on.

    The group's alphabetically first sentence decides, so the order of the file does not matter.
    Of a group outside training only the first pair is kept: no sentence comes twice.
    """
    splits: dict[str, list[Pair]] = {"train": [], "val": [], "test": []}
    for group in components(pairs):
        chosen = min(pairs[i] for i in group)
        number = share(bare(chosen[0]))
        if number < 0.02:
            splits["test" if number < 0.01 else "val"].append(chosen)
        else:
            splits["train"] += [pairs[i] for i in group]
    return splits

# %% tags=["active-ipynb"]
# for text in ("Hallo", "Hallo ", "hallo"):
#     print(f"{text!r:9} {share(text):.4f}")
# shares = [share(str(i)) for i in range(20_000)]
# print("below 0.01:", sum(u < 0.01 for u in shares), "of 20,000")

# %% [markdown]
# The price is a small bias. A group of forty pairs is as likely to be chosen as a group of one, so the test has fewer of the short phrases with many translations than the training set. We accept it: a test with leaks is worse.

# %%
TATOEBA = "https://www.manythings.org/anki"


@functools.lru_cache(maxsize=2)
def tatoeba_splits(archive: Path, member: str) -> dict[str, list[Pair]]:
    """(English, other) pairs of one of Tatoeba's archives, split by component."""
    for name, file in contents(archive, max_bytes=2**30, max_members=100):
        if name == member:
            columns = (line.split("\t")[:2] for line in decoded(file, f"{archive}, {name}"))
            found = [
                (row[0], row[1]) for row in columns if len(row) == 2 and all(map(str.strip, row))
            ]
            return split_by_component(found)
    raise ValueError(f"{archive} has no member {member}")


def read_tatoeba(files: Files, member: str, swap: bool, split: str) -> Iterator[Pair]:
    """The pairs of a split, English last if `swap`."""
    (archive,) = obtain(files[split][0])
    return iter([(b, a) if swap else (a, b) for a, b in tatoeba_splits(archive, member)[split]])


def open_tatoeba(source: str, target: str) -> ParallelCorpus:
    """Everyday sentences by volunteers. The host renews its files, so no sum is known."""
    other = {"de": "deu", "fr": "fra"}[target if source == "en" else source]
    remote = Remote(f"tatoeba/{other}-eng.zip", f"{TATOEBA}/{other}-eng.zip")
    files = dict.fromkeys(("train", "val", "test"), (remote,))
    read = functools.partial(read_tatoeba, files, f"{other}.txt", target == "en")
    return ParallelCorpus("tatoeba", source, target, read, files)

# %% [markdown]
# ### The paper's data
#
# Section 5.1 of the paper trains on WMT 2014: about 4.5 million pairs for English-German, and 36 million for English-French. They come from the parliament of the European Union (Europarl, {cite:t}`koehn2005europarl`), from pages of the web, and from
# newspaper comments; for French, documents of the United Nations and of Canadian and international offices are added {cite:p}`bojar2014findings`. newstest2013 serves to validate, newstest2014 to test.
#
# sacreBLEU knows the sum of the archive with the test set, so that sum is checked. It is an MD5, an older kind of fingerprint: good enough to notice a change, not to notice a forger.

# %%
STATMT = "https://www.statmt.org"
# archive: its members, with {other} for the language that is not English and {side} for each
TRAINING = {
    "wmt13/training-parallel-europarl-v7.tgz": "training/europarl-v7.{other}-en.{side}",
    "wmt13/training-parallel-commoncrawl.tgz": "commoncrawl.{other}-en.{side}",
    "wmt14/training-parallel-nc-v9.tgz": "training/news-commentary-v9.{other}-en.{side}",
}
FRENCH_TRAINING = {
    "wmt13/training-parallel-un.tgz": "un/undoc.2000.{other}-en.{side}",
    "wmt10/training-giga-fren.tar": "giga-fren.release2.fixed.{side}.gz",
}
NEWSTEST2013 = {  # SHA-256 of the plain texts
    "de": "d7ea35ab91ff3709e03ad9cb6bf5b4f2cc775cd2d72efd5254c4aec5e69663ca",
    "en": "ace268a1d9724ca76f6d8e5c720ffdc08f01bdce45630ed8b269dc7918e1c16e",
    "fr": "909b63be5df3eb8c13e1d5967bf3f0adfdb9f6ed5e638c5bffff563ee2ff7f41",
}
TEST_FULL = "md5:a8cd784e006feb32ac6f3d9ec7eb389a"  # as sacreBLEU has it

# %%
def wmt14_files(source: str, target: str) -> Files:
    """The archives of the paper's data and what is taken out of them, for each split."""
    other = target if source == "en" else source
    training = TRAINING | (FRENCH_TRAINING if other == "fr" else {})

    def both(pattern: str) -> tuple[str, ...]:
        sides = ((source, "src"), (target, "ref")) if pattern else ()
        return tuple(pattern.format(other=other, side=side, role=role) for side, role in sides)

    def remote(archive: str, member: str, digest: str = "", instead: str = "") -> Remote:
        path = f"wmt14/{PurePosixPath(archive).name}"
        return Remote(path, f"{STATMT}/{archive}", digest, both(member), both(instead))

    test = "test-full/newstest2014-{other}en-{role}.{side}.sgm"
    val = "dev/newstest2013.{side}", "", "wmt-news/newstest2013.{side}.gz"
    return {
        "train": tuple(remote(*row) for row in training.items()),
        "val": (remote("wmt14/dev.tgz", *val),),
        "test": (remote("wmt14/test-full.tgz", test, TEST_FULL),),
    }


def read_wmt14(files: Files, source: str, target: str, split: str) -> Iterator[Pair]:
    """The pairs of a split; newstest2013 is compared with its known sums first."""
    if split == "val":
        for path, language in zip(obtain(files[split][0]), (source, target), strict=True):
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                if hashlib.sha256(file.read()).hexdigest() != NEWSTEST2013[language]:
                    raise ValueError(f"{path} is not the newstest2013 that this book knows")
    return read_lines_of(files, None, split)


def open_wmt14(source: str, target: str) -> ParallelCorpus:
    """The paper's data; newstest2013 to validate, newstest2014 to test."""
    files = wmt14_files(source, target)
    read = functools.partial(read_wmt14, files, source, target)
    return ParallelCorpus("wmt14", source, target, read, files)

# %% tags=["active-ipynb"]
# for split, remotes in open_wmt14("en", "de").files.items():
#     for remote in remotes:
#         print(f"{split:6}{remote.url.removeprefix(STATMT)}\n{'':6}{', '.join(remote.members)}")

# %% [markdown]
# These archives are large, and this page does not fetch them. The tests have a small mirror: they build archives with the same names and a few lines each, serve them on a local port, and read all four directions from there.
# **Not measured yet:** the number of pairs that come out of the real archives.
#
# Last, the function that everything else in Part II calls.

# %%
WITH_GERMAN, WITH_ENGLISH = (("de", "en"),), (("de", "en"), ("en", "fr"))
OPEN: dict[str, tuple[Callable[[str, str], ParallelCorpus], tuple[tuple[str, str], ...]]] = {
    "toy": (open_toy, WITH_GERMAN),
    "multi30k": (open_multi30k, (*WITH_ENGLISH, ("de", "fr"))),
    "tatoeba": (open_tatoeba, WITH_ENGLISH),
    "wmt14": (open_wmt14, WITH_ENGLISH),
}


def open_corpus(name: str, source: str = "de", target: str = "en") -> ParallelCorpus:
    """A corpus by its name: "toy", "multi30k", "tatoeba" or "wmt14". Nothing is fetched yet.

    Raises ValueError for an unknown name, and for languages that the corpus does not have.
    """
    if name not in OPEN:
        raise ValueError(f"name must be one of {', '.join(OPEN)}, got {name!r}")
    opener, languages = OPEN[name]
    if tuple(sorted((source, target))) not in languages:
        known = ", ".join(f"{a}-{b}" for a, b in languages)
        raise ValueError(
            f"source and target must be one of {known}, in either order, for {name}, "
            f"got {source!r} and {target!r}"
        )
    return opener(source, target)

# %% tags=["active-ipynb"]
# for name, languages in (("toy", ("de", "en")), ("toy", ("de", "fr")), ("wmt17", ("de", "en"))):
#     try:
#         print(open_corpus(name, *languages))
#     except ValueError as error:
#         print(error)

# %% [markdown]
# ## What they hold
#
# Numbers, then a picture. *Words* are what stands between spaces. What is not on this machine is left out, and says so.

# %% tags=["active-ipynb", "nbval-ignore-output"]
# table = [("toy", "de"), ("multi30k", "de"), ("multi30k", "fr"), ("tatoeba", "de"), ("wmt14", "de")]
# table += [("tatoeba", "fr"), ("wmt14", "fr")] if scale() == "full" else []
# print(f"{'corpus':9}{'pair':7}{'split':7}{'pairs':>9}{'source':>9}{'English':>9}{'longest':>9}")
# loaded: dict[tuple[str, str, str], list[Pair]] = {}
# for name, language in table:
#     corpus = open_corpus(name, language, "en")
#     for split in corpus.splits:
#         if corpus.missing(split):
#             print(f"{name:9}{language}-en  {split:7}not at hand")
#             continue
#         pairs = loaded[name, language, split] = corpus.pairs(split)
#         words = [[len(side.split()) for side in pair] for pair in pairs]
#         means = [sum(column) / len(pairs) for column in zip(*words, strict=True)]
#         cells = f"{means[0]:9.1f}{means[1]:9.1f}{max(map(max, words)):9}"
#         print(f"{name:9}{language}-en  {split:7}{len(pairs):9,}{cells}")

# %% [markdown]
# In the captions and in the news German needs fewer words than English for the same thing, since it writes compounds as one. French needs more. In the everyday sentences the two are about equal. The small language has no compounds, and its German comma counts as a word, so its German is a little longer.

# %% tags=["hide-input"]
def draw_lengths(lengths: Mapping[str, Sequence[int]], longest: int = 60) -> "Figure":
    """The share of sentences of each length, a line for each corpus."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7.2, 2.9))
    for (label, some), style in zip(lengths.items(), ("-", "--", "-.", ":"), strict=False):
        found = Counter(some)
        shares = [found[n] / len(some) for n in range(1, longest + 1)]
        ax.plot(range(1, longest + 1), shares, style, label=label)
    ax.set(xlabel="German words in a sentence", ylabel="share of the corpus", ylim=(0, None))
    ax.legend()
    return figure

# %% mystnb={"figure": {"caption": "News sentences are much longer than captions and everyday sentences, and spread much wider.", "name": "fig-corpora-lengths"}, "image": {"alt": "Share of sentences against the number of German words, a line for each corpus. Everyday sentences peak near six words, captions near ten, news spread from a few to more than fifty."}} tags=["active-ipynb", "nbval-ignore-output"]
# shown = {("toy", "train"), ("multi30k", "train"), ("tatoeba", "train"), ("wmt14", "val")}
# draw_lengths(
#     {
#         f"{name}, {split}": [len(source.split()) for source, _ in pairs]
#         for (name, language, split), pairs in loaded.items()
#         if language == "de" and (name, split) in shown
#     }
# );

# %% [markdown]
# {numref}`fig-corpora-lengths` has one line a corpus. The toy's two humps are sentences of one and two clauses. Everyday sentences are the shortest. Captions are longer. News sentences spread widest, up to 45 words and a few beyond. The axis ends at 60. The widths matter in Chapter 14, where
# sentences of similar length share a batch.
#
# ## Duplicates and leaks
#
# A test sentence that was in training measures memory, not translation. `overlap` counts them. For web-sized text the question is a research field of its own {cite:p}`lee2022deduplicating`; here it is three sets.

# %%
def overlap(pairs: Sequence[Pair], train: Sequence[Pair]) -> tuple[int, int, int]:
    """How many of the pairs have their source, their target, both as a pair, in training."""
    sources, targets, both = {a for a, _ in train}, {b for _, b in train}, set(train)
    return (
        sum(a in sources for a, _ in pairs),
        sum(b in targets for _, b in pairs),
        sum(pair in both for pair in pairs),
    )

# %% tags=["active-ipynb", "nbval-ignore-output"]
# print(f"{'':16}{'twice in train':>15}   also in training: {'source':>7}{'target':>8}{'pair':>6}")
# for (name, language, split), pairs in loaded.items():
#     train = loaded.get((name, language, "train"))
#     if train is not None and split != "train":
#         both = [f"{n:7}" for n in overlap(pairs, train)]
#         twice = len(train) - len(set(train))
#         print(f"{name:9}{language}-en {split:5}{twice:14}{'':20}{' '.join(both)}")
# for name in ("toy", "tatoeba"):
#     for split in ("val", "test"):
#         if (name, "de", split) in loaded:
#             assert overlap(loaded[name, "de", split], loaded[name, "de", "train"]) == (0, 0, 0)

# %% [markdown]
# The first column counts the lines of the training set that repeat an earlier one. The others count test or validation sentences that are also in training. There the small language and Tatoeba have zeros, by construction. Multi30k was split by photograph, which is nearly as good: now and then two photographs got the same caption. We leave its splits as published, so that scores can be compared, and the table says what that costs.
#
# ## Who owns the sentences?
#
# Free to download is not free to use. Tatoeba's sentences are under CC BY 2.0 FR: use them, and name *tatoeba.org* and *manythings.org*. The Multi30k repository states terms for its images, which belong to Flickr's photographers, and none for its text. The WMT data are offered for research, and we found
# no licence in the files of the test sets. The small language belongs to this book and is under its licence. None of the corpora is stored here beyond the few sentences that a page shows; each reader fetches them from their hosts.
#
# ## What the paper did
#
# | | paper, section 5.1 | here |
# |---|---|---|
# | English-German | WMT 2014, about 4.5 million pairs | the three archives of WMT 2014; and three smaller corpora |
# | English-French | WMT 2014, 36 million pairs | the five archives of WMT 2014 |
# | validate | newstest2013 (section 6.2) | the same |
# | test | newstest2014 | the same, the full set of 3,003 |
# | cleaning | not described | blank sides dropped, pair by pair |
#
# The paper does not say how the text was cleaned, and repositories that build on it differ in this. A count of pairs that is off by some thousands is no error by itself.
#
# ## How it breaks
#
# - *Lines have slipped.* The loss stops near that of a model that knows only how frequent each word is. Print a few pairs from the **end** of the file; equal counts are not enough: one side may be cut once too often while the other has one line more.
# - *The test was in training.* The score is too good. `overlap` takes a second.
# - *Half a file under the right name.* The corpus is smaller than the table says. Compare sums.
# - *A renewed file.* Scores of two people differ although nothing did. Compare sums.
# - *The wrong letters.* `Ã¼` in a translation is `ü` read as Latin-1. Search the text of the corpus for `Ã`, not the vocabulary: Chapter 13 writes bytes in this way on purpose.
#
# ## Takeaways
#
# - Only `\n` ends a line, and a pair is dropped whole or not at all.
# - A file is fetched under another name, checked, written out, and renamed last.
# - Lines that share a sentence belong to the same split; equation {eq}`eq-leak` says what happens otherwise.
# - `open_corpus(name, source, target)` hides all of this. The next chapter uses `pairs`, `stream` and `splits`, and opens no corpus file itself.
#
# ## Exercises

# %% tags=["active-ipynb"]
# from transformer_annotated.book import check

# %% [markdown]
# **Exercise 12.1.** A sentence has three translations, each on its own line. A tenth of all lines is drawn for the test, and one of the three is among them: it is in the test. How likely is it that training has the sentence, too?

# %% tags=["active-ipynb"]
# answer = ...
# check("12.1", answer)

# %% tags=["active-ipynb", "hide-cell"]
# p, k = 0.1, 3
# answer = 1 - p ** (k - 1)
# check("12.1", answer)

# %% [markdown]
# **Exercise 12.2.** The text `"a\x0cb\r\nc\u2028d\n\x85\n"` is one side of a corpus. How many lines has it for `decoded`, and how many for `splitlines`? Give both numbers; predict before you run.

# %% tags=["active-ipynb"]
# answer = ...
# check("12.2", answer)

# %% tags=["active-ipynb", "hide-cell"]
# text = "a\x0cb\r\nc\u2028d\n\x85\n"
# answer = [len(list(decoded(io.BytesIO(text.encode()), "exercise"))), len(text.splitlines())]
# check("12.2", answer)

# %% [markdown]
# **Exercise 12.3.** In a chain of pairs (A, a), (B, a), (B, b), (C, b), (C, c), and so on, each sentence is shared with the next pair. There are 26 capital letters. Into how many groups does the chain fall if the single pair (M, m) is taken out?

# %% tags=["active-ipynb"]
# answer = ...
# check("12.3", answer)

# %% tags=["active-ipynb", "hide-cell"]
# capitals = [chr(65 + i) for i in range(26)]
# chain = [(x, x.lower()) for x in capitals if x != "M"]
# chain += [(y, x.lower()) for x, y in pairwise(capitals)]
# answer = len(components(chain))
# check("12.3", answer)

# %% [markdown]
# **Exercise 12.4.** A download of 1,000,000 bytes breaks after 250,000. The second request goes on, and breaks after 500,000 more. What `Range` does the third one ask for, and how many bytes have crossed the network when it is done? Give a pair such as `("bytes=0-", 17)`.

# %% tags=["active-ipynb"]
# answer = ...
# check("12.4", answer)

# %% tags=["active-ipynb", "hide-cell"]
# answer = (f"bytes={250_000 + 500_000}-", 1_000_000)
# check("12.4", answer)
