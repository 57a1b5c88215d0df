"""Task 4.12 ★: files of blocks, and whatever may happen to them."""

from __future__ import annotations

import errno
import io
import os
import re
import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.course.fixtures.checks import check_equal
from stages.memory.tiers.block_files import MAGIC, BadBlockError, file_bytes, read_block, write_block

MODEL, KEY = bytes(range(32)), bytes(range(100, 132))
HEADER = file_bytes(0)
FULL = os.strerror(errno.EFBIG)
OTHER, DAMAGED = "it is another model's, or another block", "its checksum is wrong"


def some_row(size: int, first: int = 0) -> bytes:
    return bytes((first + 7 * i) % 251 for i in range(size))


def where(folder: Path) -> Path:
    return folder / f"{KEY.hex()}.kv"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path, size: int, identity: bytes = MODEL, key: bytes = KEY) -> bytes:
    row = bytearray(size)
    read_block(path, identity, key, memoryview(row))
    return bytes(row)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The system writes no file beyond so many bytes, as on a full disk: a part of a write first, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("size", [1, 15, 4096, 1 << 20])
def test_what_was_written_is_read(tmp_path: Path, size: int) -> None:
    """A row of `size` bytes comes back; the file begins with the magic, is as long as header and row, and is alone.

    Why: other processes know a block by its file's name and its header; an unfinished file beside it is counted by nobody.
    """
    path, row, start = where(tmp_path), some_row(size), time.time()
    write_block(path, MODEL, KEY, memoryview(row))
    check_equal(read(path, size), row, "the row")
    assert start - 0.5 < path.stat().st_mtime < time.time() + 0.5, "it was last used now"
    content = path.read_bytes()
    check_equal((content[: len(MAGIC)], len(content)), (MAGIC, HEADER + size), "magic and length")
    check_equal(content[HEADER:], row, "what stands behind the header")
    check_equal(names(tmp_path), [path.name], "what is in the folder")


@pytest.mark.parametrize("change", [1, -1])
@pytest.mark.parametrize(
    ("place", "message"),
    [("magic", "it is no KV block"), ("size", "it is of another size"), ("identity", OTHER), ("hash", OTHER),
     ("checksum", DAMAGED), ("row's first byte", DAMAGED), ("row's last byte", DAMAGED)],
)  # fmt: skip
def test_a_byte_that_changes_is_noticed(tmp_path: Path, place: str, message: str, change: int) -> None:
    """One byte of a file is one more or one less, wherever it stands; the message says where.

    Why: the model would go on from a wrong key, and say something else without a complaint. And who reads the log wants to
    know whether a disk is bad or a folder is somebody else's.
    """
    path, size = where(tmp_path), 300
    write_block(path, MODEL, KEY, memoryview(some_row(size)))
    content = bytearray(path.read_bytes())
    offsets = {"magic": 3, "size": 8, "identity": 20, "hash": 60, "checksum": 90, "row's first byte": HEADER}
    at = offsets.get(place, -1)
    content[at] = (content[at] + change) % 256
    path.write_bytes(content)
    with pytest.raises(BadBlockError, match=f"^{message}$"):
        read(path, size)


@settings(max_examples=40, deadline=None)
@given(row=st.binary(min_size=1, max_size=3000), place=st.integers(0, 1 << 20), bit=st.integers(0, 7))
def test_any_row_comes_back_and_any_flipped_bit_is_noticed(row: bytes, place: int, bit: int) -> None:
    """A row of any bytes is written and read; then any bit of its file is another.

    Why: what is checked at a few places only is not checked.
    """
    with TemporaryDirectory() as folder:
        path = where(Path(folder))
        write_block(path, MODEL, KEY, memoryview(row))
        check_equal(read(path, len(row)), row, "the row")
        content = bytearray(path.read_bytes())
        content[place % len(content)] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(BadBlockError):
            read(path, len(row))


@pytest.mark.parametrize("length", [0, 7, HEADER - 1, HEADER, HEADER + 1, HEADER + 299, HEADER + 301])
def test_a_file_of_another_length_is_noticed(tmp_path: Path, length: int) -> None:
    """A file of 300 bytes and a header is cut at `length`, or has a byte more.

    Why: that is what a kill, a loss of power or a full disk leaves, whoever wrote it.
    """
    path = where(tmp_path)
    write_block(path, MODEL, KEY, memoryview(some_row(300)))
    path.write_bytes((path.read_bytes() + b"x")[:length])
    with pytest.raises(BadBlockError, match="it ends too early" if length < HEADER + 300 else "it is of another size"):
        read(path, 300)
    path.write_bytes(bytes(HEADER - 1))
    with pytest.raises(BadBlockError, match="it ends too early"):
        read(path, 0)


@pytest.mark.parametrize("size", [299, 301])
def test_a_row_of_another_size_is_not_filled(tmp_path: Path, size: int) -> None:
    """The file is whole, but what is asked for has `size` bytes instead of 300.

    Why: another precision or layout has other rows; a part of one is no block.
    """
    path = where(tmp_path)
    write_block(path, MODEL, KEY, memoryview(some_row(300)))
    with pytest.raises(BadBlockError):
        read(path, size)


def test_another_block_or_model_is_noticed(tmp_path: Path) -> None:
    """A good file under the name of another block, or in the folder of another model. One that is not there is not found.

    Why: somebody copies a folder, or a name is wrong; the row is sound, and not the one that was asked for.
    """
    path = where(tmp_path)
    write_block(path, MODEL, KEY, memoryview(some_row(64)))
    for identity, key in ((KEY, KEY), (MODEL, MODEL)):
        with pytest.raises(BadBlockError):
            read(path, 64, identity, key)
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.kv", 64)


def test_the_first_complaint_that_fits_is_the_one(tmp_path: Path) -> None:
    """Files with several faults: too short, no block, another model's, another block, too long. One that is a folder is none.

    Why: "of another size" sounds like a bad disk, where somebody has only named another model's folder. And what cannot be read
    may be good: a block that counts as damaged is removed.
    """
    path = where(tmp_path)
    for identity, key, size, magic, message in (
        (KEY, KEY, 200, b"?", "it ends too early"), (KEY, KEY, 400, b"?", "it is no KV block"), (KEY, KEY, 400, b"", OTHER),
        (MODEL, MODEL, 400, b"", OTHER), (KEY, KEY, 300, b"", OTHER), (MODEL, KEY, 400, b"", "it is of another size"),
    ):  # fmt: skip
        write_block(path, identity, key, memoryview(some_row(size)))
        path.write_bytes(magic + path.read_bytes()[len(magic) :])
        with pytest.raises(BadBlockError, match=f"^{message}$"):
            read(path, 300)
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        read(path, 300)


def test_a_write_may_be_short_at_any_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system takes 50 bytes of whatever it is given without a buffer, and says so.

    Why: it may, and not only in the row. A file with half of a header is moved to its place, and found bad when it is wanted.
    """
    opened, written = io.open, os.write

    class Short(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(memoryview(data)[:50])

    def short(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **others: Any) -> Any:
        plain = buffering or mode.startswith("r")
        return opened(file, mode, buffering, *rest, **others) if plain else Short(file, mode.replace("b", ""))

    path, row = where(tmp_path), some_row(300)
    with monkeypatch.context() as patch:
        patch.setattr("io.open", short)
        patch.setattr("builtins.open", short)
        patch.setattr("os.write", lambda number, data: written(number, memoryview(data)[:50]))
        write_block(path, MODEL, KEY, memoryview(row))
    check_equal(path.stat().st_size, HEADER + 300, "bytes of the file")
    check_equal(read(path, 300), row, "the row")


def test_a_file_is_whole_and_at_home_before_it_is_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is moved to the block's path comes from the same folder and has all of its bytes.

    Why: a move is atomic within a file system. From a temporary folder on another one it is none, or an error for each block.
    """
    path, moved = where(tmp_path), []

    def noted(move: Any) -> Any:
        def run(source: Any, target: Any, **others: Any) -> None:
            moved.append((str(Path(source).parent), Path(source).stat().st_size))
            move(source, target, **others)

        return run

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, noted(getattr(os, name)))
    write_block(path, MODEL, KEY, memoryview(some_row(300)))
    assert set(moved) <= {(str(tmp_path), HEADER + 300)}, f"folders and bytes of what was moved: {moved}"
    check_equal(read(path, 300), some_row(300), "the row")


def test_an_age_that_cannot_be_set_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file system refuses to set a time: the older file is there, and nothing else.

    Why: an error says that nothing was written, so nobody counts the file's bytes.
    """

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("no times here")

    path = where(tmp_path)
    write_block(path, MODEL, KEY, memoryview(b"older"))
    monkeypatch.setattr(os, "utime", refuse)
    with pytest.raises(PermissionError):
        write_block(path, MODEL, KEY, memoryview(b"newer"), 100.0)
    check_equal(names(tmp_path), [path.name], "what is in the folder")
    check_equal(read(path, 5), b"older", "the row")


@pytest.mark.parametrize("limit", [HEADER // 2, HEADER + 5000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, limit: int) -> None:
    """The system takes `limit` bytes of a file and then refuses: with nothing at the path, and with an older file there.

    Why: the first write reports a part and no error. Half a file must not take the place of a whole one, nor lie beside it.
    """
    path, row = where(tmp_path), some_row(100_000)
    with files_of_at_most(limit), pytest.raises(OSError, match=FULL):
        write_block(path, MODEL, KEY, memoryview(row))
    check_equal(names(tmp_path), [], "what is in the folder")
    write_block(path, MODEL, KEY, memoryview(row))
    with files_of_at_most(limit), pytest.raises(OSError, match=FULL):
        write_block(path, MODEL, KEY, memoryview(some_row(100_000, 9)))
    check_equal(names(tmp_path), [path.name], "what is in the folder then")
    assert read(path, len(row)) == row, "the older file is not what it was"


def test_nobody_meets_half_of_a_file(tmp_path: Path) -> None:
    """While a file of 64 MiB is written, whoever looks at its path finds none, or all of it. What else is in the folder has the
    block's name, a dot, 16 hexadecimal digits and ``.tmp``.

    Why: another server that shares the folder may look at any moment. It would find a bad file, and remove it.
    """
    path, row, seen, done = where(tmp_path), bytes(64 << 20), set(), threading.Event()
    others = set[str]()

    def look() -> None:
        while not done.is_set():
            seen.add(path.stat().st_size if path.exists() else None)
            others.update(name for name in names(tmp_path) if name != path.name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        write_block(path, MODEL, KEY, memoryview(row))
    finally:
        done.set()
        thread.join()
    assert seen <= {None, HEADER + len(row)}, f"sizes that were seen: {seen}"
    assert all(re.fullmatch(KEY.hex() + r"\.[0-9a-f]{16}\.tmp", name) for name in others), f"names that were seen: {others}"


def test_several_may_write_one_block(tmp_path: Path) -> None:
    """Eight threads write the same block at once, again and again; in the end one of their files is there, whole and alone.

    Why: servers that share a folder compute the same system prompt, and keep it in the same second.
    """
    path, errors, start = where(tmp_path), [], threading.Barrier(8)

    def write(number: int) -> None:
        try:
            for _ in range(20):
                start.wait(60)
                write_block(path, MODEL, KEY, memoryview(bytes([number]) * 50_000))
        except Exception as error:
            errors.append(error)
            start.abort()

    write_block(path, MODEL, KEY, memoryview(b"first"))
    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_equal(errors, [], "errors of the threads")
    assert len(set(read(path, 50_000))) == 1, "the file is of several"
    check_equal(names(tmp_path), [path.name], "what is in the folder")


def test_a_block_can_be_older_than_its_file(tmp_path: Path) -> None:
    """With an age of 1,000 seconds the file's time is so long ago; without one it is now.

    Why: what is kept at the end of a server was used at different times, and the least recently used goes first.
    """
    for age in (0.0, 1000.0):
        before = time.time()
        write_block(where(tmp_path), MODEL, KEY, memoryview(some_row(9)), age)
        changed = where(tmp_path).stat().st_mtime
        assert before - age - 2 <= changed <= time.time() - age + 2, f"age {age}: {time.time() - changed} s ago"
