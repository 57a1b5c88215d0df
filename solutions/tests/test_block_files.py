"""KV blocks as files: what a good one gives back, what no other one is taken for, and a folder within its limit."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import pytest

from solutions.memory.tiers.block_files import (
    SLACK,
    STALE_SECONDS,
    BadBlockError,
    BlockFolder,
    file_bytes,
    read_block,
    write_block,
)
from solutions.tests.slow_cases import slow_after

ROW = random.Random(0).randbytes(1000)
MINE, OTHERS = sha256(b"mine").digest(), sha256(b"others").digest()
SIZE = file_bytes(len(ROW))


def name(number: int) -> bytes:
    return sha256(str(number).encode()).digest()


def read(path: Path, identity: bytes = MINE, block: int = 0, size: int = len(ROW)) -> bytes:
    row = bytearray(size)
    read_block(path, identity, name(block), memoryview(row))
    return bytes(row)


@pytest.fixture
def block(tmp_path: Path) -> Path:
    path = tmp_path / "block.kv"
    write_block(path, MINE, name(0), memoryview(ROW))
    return path


def test_what_is_written_is_read(block: Path) -> None:
    assert read(block) == ROW
    assert block.stat().st_size == SIZE
    assert [file.name for file in block.parent.iterdir()] == ["block.kv"]


@pytest.mark.parametrize("position", slow_after(12, [*range(0, 112, 12), 111, 112, 600, SIZE - 1, *range(1, 112, 7)]))
def test_a_flipped_bit_is_seen_wherever_it_is(block: Path, position: int) -> None:
    content = bytearray(block.read_bytes())
    content[position] ^= 1 << position % 8
    block.write_bytes(content)
    with pytest.raises(BadBlockError):
        read(block)


@pytest.mark.parametrize("length", [0, 1, 50, 111, 112, 113, SIZE - 1])
def test_a_file_that_ends_too_early_is_seen(block: Path, length: int) -> None:
    os.truncate(block, length)
    with pytest.raises(BadBlockError, match="it ends too early"):
        read(block)


def test_a_page_that_was_never_written_is_seen(block: Path) -> None:
    """As after a loss of power: the length is there, a part of the content is not."""
    content = block.read_bytes()
    block.write_bytes(content[:500] + bytes(SIZE - 500))
    with pytest.raises(BadBlockError, match="checksum"):
        read(block)


def test_others_files_are_no_block(block: Path) -> None:
    with pytest.raises(BadBlockError, match="another model's"):
        read(block, identity=OTHERS)
    with pytest.raises(BadBlockError, match="another block"):
        read(block, block=1)
    with pytest.raises(BadBlockError, match="another size"):
        read(block, size=999)
    with pytest.raises(BadBlockError, match="too early"):
        read(block, size=1001)
    block.write_bytes(ROW + ROW)
    with pytest.raises(BadBlockError, match="it is no KV block"):
        read(block)
    block.unlink()
    with pytest.raises(FileNotFoundError):
        read(block)


def test_what_cannot_be_written_whole_leaves_nothing(tmp_path: Path) -> None:
    """A real limit on the size of files, in a process of its own."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from solutions.memory.tiers.block_files import write_block\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "try: write_block(Path(sys.argv[1]), bytes(32), bytes(32), memoryview(bytes(1000)))\n"
        "except OSError as error: print(error.errno)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.kv")], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(errno.EFBIG)]
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_leaves_no_half_block(tmp_path: Path) -> None:
    """It writes one block after another; whatever stands under a block's name is whole."""
    code = (
        "import sys; from pathlib import Path; from solutions.memory.tiers.block_files import BlockFolder\n"
        "from solutions.tests.test_block_files import MINE, name\n"
        "folder, row = BlockFolder(Path(sys.argv[1]), MINE, 1 << 40), memoryview(bytes(1 << 20))\n"
        "print('ready', flush=True)\n"
        "for number in range(10**6): folder.write(name(number), row)\n"
    )
    folder = BlockFolder(tmp_path, MINE, 1 << 40)
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            deadline = time.monotonic() + 60
            while len(folder.scan()) < 5 and time.monotonic() < deadline:
                pass
            process.send_signal(signal.SIGKILL)
    blocks = folder.scan()
    assert len(blocks) >= 5
    for _, _, path in blocks:
        row = bytearray(1 << 20)
        read_block(Path(path), MINE, bytes.fromhex(Path(path).stem), memoryview(row))


# A folder


def fill(folder: BlockFolder, numbers: range, start: float) -> None:
    """Blocks with these numbers, each used a second after the one before."""
    for number in numbers:
        folder.make_room(SIZE)
        folder.write(name(number), memoryview(ROW), age=time.time() - start - number)


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path, MINE, 10 * SIZE)
    start = time.time() - 1000
    fill(folder, range(10), start)
    assert folder.num_bytes == 10 * SIZE
    assert folder.use(name(0))
    assert not folder.use(name(10))
    removed = folder.make_room(SIZE)
    assert removed == [name(1)]
    assert folder.path(name(0)).exists()
    assert not folder.path(name(1)).exists()


@pytest.mark.parametrize("blocks", [1, 2, 7, 100])
def test_the_limit_holds_whatever_comes(tmp_path: Path, blocks: int) -> None:
    limit = blocks * SIZE + SIZE // 2
    folder = BlockFolder(tmp_path, MINE, limit)
    for number in range(2 * blocks + 5):
        fill(folder, range(number, number + 1), time.time() - 1000)
        held = sum(path.stat().st_size for path in tmp_path.rglob("*.kv"))
        assert held == folder.num_bytes <= limit
        assert folder.path(name(number)).exists()
    assert held >= limit - limit // SLACK - 2 * SIZE


def test_the_limit_is_for_all_models_and_for_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x" * 5000)
    (tmp_path / "notes" / "deeper").mkdir()
    (tmp_path / "notes" / "deeper" / "mine.kv").write_text("x" * 5000)
    fill(BlockFolder(tmp_path, OTHERS, 4 * SIZE), range(4), time.time() - 1000)
    mine = BlockFolder(tmp_path, MINE, 4 * SIZE)
    mine.scan()
    assert mine.num_bytes == 4 * SIZE
    assert mine.make_room(SIZE) == []  # a block of another's was removed, of which nobody here knew
    mine.write(name(0), memoryview(ROW))
    assert mine.num_bytes <= 4 * SIZE
    assert len(list(tmp_path.rglob("*/*/*.kv"))) == 4 + 1
    assert (tmp_path / "notes" / "deeper" / "mine.kv").exists()


def test_several_that_write_exceed_the_limit_by_little(tmp_path: Path) -> None:
    """Each by a sixteenth at most, whoever writes how much; none is told of the others."""
    limit, rng = 64 * SIZE, random.Random(0)
    folders = [BlockFolder(tmp_path, MINE, limit) for _ in range(3)]
    for number in range(400):
        folder = rng.choices(folders, [8, 2, 1])[0]
        fill(folder, range(number, number + 1), time.time() - 1000)
        assert sum(path.stat().st_size for path in tmp_path.rglob("*.kv")) <= limit + 3 * limit // SLACK


def test_what_others_left_unfinished_is_removed_when_it_is_old(tmp_path: Path) -> None:
    folder = BlockFolder(tmp_path, MINE, 10 * SIZE)
    folder.write(name(0), memoryview(ROW))
    old, young = (folder.path(name(0)).with_name(f"{name(number).hex()}.{number:016x}.tmp") for number in (1, 2))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - STALE_SECONDS - 1,) * 2)
    folder.scan()
    assert not old.exists()
    assert young.exists()


def test_a_bad_file_is_removed_and_written_anew(tmp_path: Path) -> None:
    folder, row = BlockFolder(tmp_path, MINE, 10 * SIZE), bytearray(len(ROW))
    folder.write(name(0), memoryview(ROW))
    os.truncate(folder.path(name(0)), 300)
    with pytest.raises(BadBlockError):
        folder.read(name(0), memoryview(row))
    with pytest.raises(FileNotFoundError):
        folder.read(name(0), memoryview(row))
    folder.write(name(0), memoryview(ROW))
    folder.read(name(0), memoryview(row))
    assert row == ROW


def test_two_folders_of_one_path_see_each_others_blocks(tmp_path: Path) -> None:
    one, other, row = BlockFolder(tmp_path, MINE, 10 * SIZE), BlockFolder(tmp_path, MINE, 10 * SIZE), bytearray(len(ROW))
    one.write(name(0), memoryview(ROW))
    other.read(name(0), memoryview(row))
    assert row == ROW
    one.path(name(0)).unlink()
    assert not other.use(name(0))
