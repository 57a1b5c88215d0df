"""Collectives of the ranks of one host through memory that they all map, in C++ (``shared_memory_cpu.cpp``).

A library for networks takes a millisecond or two for a sum of a few kilobytes, most of it threads that wake each other. Ranks
that see the same memory need two cache lines to agree, and the sum is one pass over what all have written there. The calls are
native kernels, so a recorded step (core/capture.py) has them in it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.platform import native
from .communication import CommunicationError, Communicator
from .distributed import TIMEOUT_SECONDS

PART_BYTES = 1 << 18
"""What a thread writes at once; small enough to stay in a core's cache until the others have read it."""

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_TROUBLE = {1: "has ended", 2: "did not come in time"}


def nameless_file() -> int:
    """The descriptor of an empty file in memory that processes can share; it is gone with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("byov")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


class _Memory(ctypes.Structure):
    """`Memory` of the C++ file."""

    _fields_ = (
        ("base", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rank", "size", "parts", "part_bytes", "timeout_ns", "parent", "nanoseconds")),
        ("run_parts", ctypes.c_void_p),
    )


class _Collective(native.Arguments):
    """`Collective` of the C++ file."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("x", "y", "memory")), ("width", ctypes.c_int64))


class SharedMemory:
    """A rank's view of memory in which some ranks add and gather float32 and bfloat16.

    Sums are made in float32 in the order of ranks and rounded once.

    Args:
        descriptor: of the file, the same on all ranks; see `nameless_file`. rank, size: this one, and how many there are.
        threads: of each rank, the same on all. timeout: seconds until a rank that does not come is given up.
        part_bytes: what a thread writes at once, the same on all ranks. library: of `native.SUMS`; None: that of the engine.

    Raises:
        BuildError: there is no such library.
    """

    def __init__(
        self, descriptor: int, rank: int, size: int, threads: int, timeout: float = TIMEOUT_SECONDS,
        part_bytes: int = PART_BYTES, library: ctypes.CDLL | None = None,
    ) -> None:  # fmt: skip
        self.rank, self.size = rank, size
        library = self._library = library or native.sums()
        library.shared_memory_bytes.restype = library.shared_memory_trouble.restype = ctypes.c_int64
        length = library.shared_memory_bytes(*map(ctypes.c_int64, (size, threads, part_bytes)))
        os.ftruncate(descriptor, length)  # the same for all, so whoever comes first makes it
        self._map = mmap.mmap(descriptor, length)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        loop = ctypes.cast(native.loaded().run_parts, ctypes.c_void_p)
        self._memory = _Memory(base, rank, size, threads, part_bytes, int(timeout * 1e9), os.getppid(), 0, loop)
        library.shared_memory_enter(ctypes.byref(self._memory))
        self._arguments = _Collective(memory=ctypes.addressof(self._memory))
        self._kernels = {
            (call, dtype): native.Kernel(f"{call}_{name}", self._arguments, library)
            for call in ("all_reduce", "all_gather")
            for dtype, name in _NAMES.items()
        }

    @property
    def seconds_in_kernels(self) -> float:
        """Time in calls so far, recorded steps' and waiting for others included; of the first thread."""
        nanoseconds: int = self._memory.nanoseconds
        return nanoseconds / 1e9

    def call(self, name: str, x: Tensor, y: Tensor) -> None:
        """What all ranks call at once: "all_reduce", y = the sum of all x, or "all_gather", y = all x behind one another.

        Args:
            x, y: contiguous, with a dimension at least; of a sum they may be the same.

        Raises:
            CommunicationError: as `check` does.
        """
        arguments = self._arguments
        arguments.x, arguments.y = x.data_ptr(), y.data_ptr()
        arguments.rows, arguments.width = len(x), x.numel() // max(1, len(x))
        self._kernels[name, x.dtype]()
        self.check()

    def check(self) -> None:
        """See whether all ranks have come to all calls.

        Raises:
            CommunicationError: one has ended or has not come in time; from then on no call brings anything.
        """
        trouble = self._library.shared_memory_trouble(ctypes.byref(self._memory))
        if trouble:
            rank, reason = divmod(trouble, 4)
            raise CommunicationError(f"rank {self.rank} of {self.size}: rank {rank} {_TROUBLE[reason]}")


class SharedMemoryCommunicator(Communicator):
    """Sums and gathers of float32 and bfloat16 through `SharedMemory`; all else, and other types, through the library.

    Args:
        descriptor, threads, timeout, part_bytes: as in `SharedMemory`.
    """

    is_native = True

    def __init__(
        self, descriptor: int, threads: int, timeout: float = TIMEOUT_SECONDS, group: dist.ProcessGroup | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:  # fmt: skip
        super().__init__(group)
        self._shared = SharedMemory(descriptor, self.rank, self.size, threads, timeout, part_bytes)

    def check(self) -> None:
        self._shared.check()

    @property
    def seconds_in_kernels(self) -> float:
        """Time in calls so far, see `SharedMemory`."""
        return self._shared.seconds_in_kernels

    def all_reduce(self, x: Tensor) -> Tensor:
        if x.dtype not in _NAMES or not x.is_contiguous() or not x.dim():
            return super().all_reduce(x)
        with self._counted("all_reduce", x.nbytes):
            self._shared.call("all_reduce", x, x)
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        if x.dtype not in _NAMES:
            return super().all_gather(x)
        out = x.new_empty((self.size * len(x), *x.shape[1:]))
        with self._counted("all_gather", x.nbytes):
            self._shared.call("all_gather", x.contiguous(), out)
        return out
