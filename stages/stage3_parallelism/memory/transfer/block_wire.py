"""KV blocks on their way between two engines: what is said over a socket, and how rows of bytes come along.

    consumer → producer    the engine's identity, hashes of blocks in their order
    producer → consumer    how many of the first of them it has
    consumer → producer    how many of those it takes
    producer → consumer    shm: a file descriptor of memory with all rows; for each block its checksum, and tcp: its row
    consumer → producer    how many have arrived: all, or the connection ends

A consumer that wants nothing of what there is closes the connection.

The checksum is a SHA-256 of identity, hash and row, so that a torn, damaged or foreign block is known for one. Shared memory
has no name: it is handed over as a descriptor, and ends with the last process that has it, however that ends.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any

import torch
from torch import Tensor

MAGIC = b"BYOVKVT1"
MOST_BLOCKS = 1 << 16
"""Of one request; who asks for more is no engine."""
FOREIGN = 0
"""Stands for the bytes of a row where the two engines compute other keys and values."""
_ASK, _OFFER, _COUNT, _BLOCK = Struct("<8s32sQ"), Struct("<8sQQ"), Struct("<Q"), Struct("<32s")
CHUNK = 1 << 16
"""Bytes after which a receiver asks whether it is still wanted."""


class TransferError(ConnectionError):
    """The other end is no engine that hands over what was asked for; the message says why."""


class BadRowError(TransferError):
    """What has arrived is not the block that was asked for."""


def checksum(identity: bytes, block_hash: bytes, row: memoryview) -> bytes:
    """32 bytes over all that a block is."""
    digest = sha256(MAGIC + identity + block_hash)
    digest.update(row)
    return digest.digest()


def receive(sock: socket.socket, into: memoryview, is_wanted: Callable[[], bool] = lambda: True) -> None:
    """Fill `into` from a socket. Raises OSError: it closes, falls silent for its timeout, or nobody wants the rest."""
    done = 0
    while done < into.nbytes:
        if not is_wanted():
            raise TransferError("it took too long")
        count = sock.recv_into(into[done : done + CHUNK])
        if not count:
            raise TransferError("the connection was closed")
        done += count


def _receive(sock: socket.socket, layout: Struct, is_wanted: Callable[[], bool] = lambda: True) -> tuple[Any, ...]:
    data = bytearray(layout.size)
    receive(sock, memoryview(data), is_wanted)
    return layout.unpack(data)


# ---------------------------------------------------------------------------------------------------------- the producer


def read_question(sock: socket.socket) -> tuple[bytes, list[bytes]]:
    """Identity and hashes that a consumer sends. Raises OSError, or TransferError if it is none."""
    magic, identity, count = _receive(sock, _ASK)
    if magic != MAGIC or count > MOST_BLOCKS:
        raise TransferError("no engine asks so")
    names = bytearray(32 * count)
    receive(sock, memoryview(names))
    return identity, [bytes(names[start : start + 32]) for start in range(0, len(names), 32)]


def offer(sock: socket.socket, row_bytes: int, count: int) -> int:
    """Say how many blocks there are; how many the consumer takes, none if it leaves now."""
    sock.sendall(_OFFER.pack(MAGIC, row_bytes, count))
    try:
        return min(count, int(_receive(sock, _COUNT)[0]))
    except ConnectionError:
        return 0


def send_rows(sock: socket.socket, identity: bytes, blocks: list[tuple[bytes, Tensor]], shared: bool) -> int:
    """Send blocks, (hash, row) each, one at least, by shared memory or in the stream; how many the consumer says have arrived.
    Raises OSError if it goes away, or takes longer than the socket's timeout for a row."""
    rows = [row.numpy().data for _, row in blocks]
    if shared:
        home = "/dev/shm" if sys.platform == "linux" and Path("/dev/shm").is_dir() else None
        with tempfile.TemporaryFile(dir=home, buffering=0) as file:  # it has no name
            for row in rows:
                written = 0
                while written < row.nbytes:
                    written += file.write(row[written:])
            socket.send_fds(sock, [b"m"], [file.fileno()])
    for (block_hash, _), row in zip(blocks, rows, strict=True):
        sock.sendall(_BLOCK.pack(checksum(identity, block_hash, row)))
        if not shared:
            sock.sendall(row)
    return min(len(blocks), int(_receive(sock, _COUNT)[0]))


# ---------------------------------------------------------------------------------------------------------- the consumer


def ask(sock: socket.socket, identity: bytes, hashes: list[bytes], row_bytes: int) -> int:
    """How many of the first of these blocks a producer has.

    Raises:
        OSError: it does not answer. TransferError: it is another kind of server, or computes other keys and values.
    """
    sock.sendall(_ASK.pack(MAGIC, identity, len(hashes)) + b"".join(hashes))
    magic, size, count = _receive(sock, _OFFER)
    if magic != MAGIC or count > len(hashes):
        raise TransferError("no engine answers so")
    if size != row_bytes:
        raise TransferError("it computes other keys and values; give both engines the same model, dtype and other settings")
    return int(count)


def take(
    sock: socket.socket, identity: bytes, hashes: list[bytes], row_bytes: int, pinned: bool, shared: bool,
    keep: Callable[[bytes, Tensor], None], is_wanted: Callable[[], bool],
) -> None:  # fmt: skip
    """Bring blocks that a producer has said it has, and tell it which have come.

    Args:
        row_bytes: of a row. pinned: rows go to a GPU. keep: is given each block, in their order, as soon as it has been checked
            against its checksum, and no other. is_wanted: whether to go on; is asked while bytes come (`receive`).

    Raises:
        ConnectionError: the producer goes away, or nothing is wanted any more; what has come before is kept. Whatever else a
            socket raises passes through.
        BadRowError: a row is not what it should be.
    """
    # Hint: Three small machines. Draw each: which blocks are new behind a step, who still wants a block, and what the
    # next byte on the wire means.
    raise NotImplementedError("Stage 3 · Task 3.10: take, see stages/stage3_parallelism/GUIDE.md#task-3-10")


def _shared_rows(sock: socket.socket, row_bytes: int, count: int) -> Tensor:
    """Rows [count, row_bytes] in memory that the producer shares; they stay when it ends."""
    _, descriptors, _, _ = socket.recv_fds(sock, 1, 1)
    if not descriptors:
        raise TransferError("the connection was closed")
    with os.fdopen(descriptors[0], "rb", buffering=0) as file:
        try:
            memory = mmap.mmap(file.fileno(), count * row_bytes, access=mmap.ACCESS_COPY)
        except ValueError:
            raise BadRowError("the shared memory is too short") from None
    return torch.frombuffer(memory, dtype=torch.uint8).view(count, row_bytes)
