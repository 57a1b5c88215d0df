"""A KV block as a file, and a folder of them within a limit of bytes, which several processes may share.

A file is a header and the block's row. The header names the engine's identity (see `models/identity.py`) and the block's hash,
and holds a SHA-256 of everything else, so that a torn, damaged or foreign file is known for one whatever has happened to it. A
file is written under another name and then renamed, which is atomic: nobody sees half of one. It is not synced to the disk:
after a loss of power the checksum says what has arrived.

A block's time of last use is its file's time of modification, and the folder itself is the only list of what it holds: the
oldest go when the limit is reached, whoever wrote them. Source of the format: none; the layout of folders is git's.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from struct import Struct

MAGIC = b"BYOVKV01"
_HEADER = Struct("<8sQ32s32s32s")
"""Magic, bytes of the row, identity, hash of the block, checksum."""
_NAME = re.compile(r"[0-9a-f]{64}\.kv")
_UNFINISHED = re.compile(r"[0-9a-f]{64}\.[0-9a-f]{16}\.tmp")
STALE_SECONDS = 3600.0
"""After so long an unfinished file is no process's any more."""
SLACK = 16
"""One part in so many of the limit is made free at once, so that the folder is not listed for every block, and it is listed
whenever as much has been written: others may have written, too."""


class BadBlockError(ValueError):
    """A file is not the block that it should be; the message says why."""


def file_bytes(row_bytes: int) -> int:
    """What a block's file takes."""
    return _HEADER.size + row_bytes


def _header(identity: bytes, block_hash: bytes, row: memoryview) -> bytes:
    """What stands before a row in its file, the checksum of both included."""
    head = MAGIC, row.nbytes, identity, block_hash
    digest = sha256(_HEADER.pack(*head, bytes(32)))
    digest.update(row)
    return _HEADER.pack(*head, digest.digest())


def write_block(path: Path, identity: bytes, block_hash: bytes, row: memoryview, age: float = 0.0) -> None:
    """Write a block's file, or none at all: `_header`, then the row.

    Until all is written the file has a name of its own, one that `_UNFINISHED` matches and that no other process or thread
    takes at the same time; then it takes the place of what was at `path`. A file system may write less than it is given and
    say so without an error.

    Args:
        path: named after the hash, in a folder that is there. age: it counts as last used so many seconds ago.

    Raises:
        OSError: the file system refuses, say because it is full. What was at `path` is still there, and nothing else.
    """
    unfinished = path.with_name(f"{path.stem}.{token_hex(8)}.tmp")  # processes in containers may have one number
    try:
        with unfinished.open("wb", buffering=0) as file:
            for part in (memoryview(_header(identity, block_hash, row)), row):
                written = 0
                while written < part.nbytes:
                    written += file.write(part[written:])
        if age:
            os.utime(unfinished, (time.time() - age,) * 2)
        unfinished.replace(path)
    except OSError:
        with suppress(OSError):
            unfinished.unlink()
        raise


def read_block(path: Path, identity: bytes, block_hash: bytes, row: memoryview) -> None:
    """Read a block's file into `row`, whose content is undefined after an error.

    Raises:
        BadBlockError: it is not the block that was asked for, whole and undamaged and as long as `row`, or there is more in it.
            The message is the first that fits of: it ends too early; it is no KV block; it is another model's, or another
            block; it is of another size; its checksum is wrong.
        OSError: it cannot be read; FileNotFoundError: there is none.
    """
    with path.open("rb", buffering=0) as file:
        header = file.read(_HEADER.size) or b""
        count, end = 0, row.nbytes
        while count < end and (more := file.readinto(row[count:])):
            count += more
        longer = bool(file.read(1))
    if len(header) < _HEADER.size or count < end:
        raise BadBlockError("it ends too early")
    magic, size, owner, name, _ = _HEADER.unpack(header)
    if magic != MAGIC:
        raise BadBlockError("it is no KV block")
    if owner != identity or name != block_hash:
        raise BadBlockError("it is another model's, or another block")
    if size != row.nbytes or longer:
        raise BadBlockError("it is of another size")
    if header != _header(identity, block_hash, row):
        raise BadBlockError("its checksum is wrong")


class BlockFolder:
    """The blocks of one identity in a folder, and the limit on all that it holds, of whatever identity.

    Args:
        root: the folder. identity: 32 bytes. limit: bytes that all files of blocks may take.
    """

    def __init__(self, root: Path, identity: bytes, limit: int) -> None:
        self.root, self.identity, self.limit = root, identity, limit
        self.num_bytes = 0
        """Of all blocks, as of the last `scan`, and what this process has written since."""
        self._unlisted = 0
        """Bytes of the latter."""
        self._own = root / identity.hex()[:32]

    def path(self, block_hash: bytes) -> Path:
        """Where a block's file is, if there is one."""
        name = block_hash.hex()
        return self._own / name[:2] / f"{name}.kv"

    def scan(self) -> list[tuple[int, int, str]]:
        """Time of use in nanoseconds, bytes and path of each block, the least recently used first. What others have left
        unfinished is removed."""
        found = []
        for entry in self._entries():
            with suppress(OSError):  # another process has just removed it
                stat = entry.stat()
                if _NAME.fullmatch(entry.name):
                    found.append((stat.st_mtime_ns, stat.st_size, entry.path))
                elif _UNFINISHED.fullmatch(entry.name) and time.time() - stat.st_mtime > STALE_SECONDS:
                    Path(entry.path).unlink()
        self.num_bytes, self._unlisted = sum(size for _, size, _ in found), 0
        return sorted(found)

    def _entries(self) -> Iterator[os.DirEntry[str]]:
        """What lies two folders deep."""
        for path in self.root.glob("*/*/"):
            with suppress(OSError), os.scandir(path) as entries:
                yield from entries

    def make_room(self, size: int) -> list[bytes]:
        """Remove the least recently used blocks if `size` bytes more would exceed the limit.

        Returns:
            Hashes of those of this identity that were removed.
        """
        removed: list[bytes] = []
        if self.num_bytes + size <= self.limit and self._unlisted + size <= self.limit // SLACK:
            return removed
        blocks = self.scan()
        most = self.limit - max(size, self.limit // SLACK) if self.num_bytes + size > self.limit else self.limit
        for _, freed, name in blocks:
            if self.num_bytes <= most:
                break
            path = Path(name)
            with suppress(FileNotFoundError):
                path.unlink()
            self.num_bytes -= freed
            if path.parent.parent == self._own:
                removed.append(bytes.fromhex(path.stem))
        return removed

    def use(self, block_hash: bytes) -> bool:
        """Count a block as just used; whether it is there."""
        try:
            os.utime(self.path(block_hash))
        except FileNotFoundError:
            return False
        return True

    def write(self, block_hash: bytes, row: memoryview, age: float = 0.0) -> None:
        """Keep a block. Raises as `write_block` does."""
        path = self.path(block_hash)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_block(path, self.identity, block_hash, row, age)
        self.num_bytes += file_bytes(row.nbytes)
        self._unlisted += file_bytes(row.nbytes)

    def read(self, block_hash: bytes, row: memoryview) -> None:
        """Read a block into `row`. Raises as `read_block` does; a bad file is removed, so that it is written anew."""
        path = self.path(block_hash)
        try:
            read_block(path, self.identity, block_hash, row)
        except BadBlockError:
            with suppress(OSError):
                path.unlink()
            raise
