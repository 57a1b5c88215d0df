"""Memory for tensors that a CPU reads from end to end, or all over: in huge pages, which spare it most address translations."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

CHUNK = 64 << 20
"""Bytes mapped at once; a huge page is 2 MiB, so smaller tensors share a mapping."""
LINE = 64

_chunk: mmap.mmap | None = None
_used = 0


def empty_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of arbitrary content on the CPU. Its mapping is given back when the last tensor in it is gone."""
    global _chunk, _used
    size = math.prod(shape) * dtype.itemsize
    if size >= CHUNK:
        return _view(_map(size), 0, shape, dtype)
    if _chunk is None or _used + size > CHUNK:
        _chunk, _used = _map(CHUNK), 0
    tensor = _view(_chunk, _used, shape, dtype)
    _used += -(-size // LINE) * LINE
    return tensor


def zeros_in_huge_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a mapping of their own; they cost neither time nor memory until they are written.

    torch.zeros would write them all, which takes seconds for gigabytes. A fresh mapping is zero already, and the system
    provides its pages on first use.
    """
    return _view(_map(math.prod(shape) * dtype.itemsize), 0, shape, dtype)


def _map(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):  # Linux only
        with contextlib.suppress(OSError):  # a kernel without huge pages refuses the advice, which changes only speed
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _view(memory: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)
