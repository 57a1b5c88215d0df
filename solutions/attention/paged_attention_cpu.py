"""Paged attention on a CPU in C++: a step's work is cut into items here, once, and computed by ``paged_attention_cpu.cpp``."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.platform import native
from .paged_attention import AttentionBackend, AttentionMetadata

PIECE = 64
"""Most queries in an item: 64 times the query heads of a KV head fill the register tiles and fit the second-level cache."""

FEW = 16
"""Queries of a sequence that are no more than a draft: in what order such items come does not matter."""

MIN_SPLIT = 256
"""Fewest keys that an item of a split context has; below, merging costs more than it gains."""

_KERNELS = {torch.float32: "attend_f32", torch.bfloat16: "attend_bf16"}


class _Step(ctypes.Structure):
    """`Step` of the C++ file."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("slot_mapping", "block_tables", "items", "merges", "partials", "hidden")]
        + [(name, ctypes.c_int64) for name in ("table_stride", "num_items", "num_merges")]
        + [(name, ctypes.c_int64) for name in ("num_heads", "num_kv_heads", "head_dim", "block_size", "num_blocks")]
        + [(name, ctypes.c_int64) for name in ("window", "invariant")]
        + [(name, ctypes.c_float) for name in ("scale", "soft_cap")]
    )


def new_step() -> _Step:
    """An empty step for a recording to read from."""
    return _Step()


class _Attend(native.Arguments):
    """`Attend` of the C++ file."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("step", "query", "key", "value", "cache", "output", "scales", "sinks")
    ) + tuple((name, ctypes.c_int64) for name in ("ldq", "ldkv"))


@dataclass(slots=True)
class Plan:
    """A step's items, and the arrays that the C++ side points into.

    Attributes:
        address: of the structure that the kernels are to read.
        num_partials: rows of partial results. arrays: kept from being freed.
    """

    step: _Step
    address: int
    window: int | None
    num_partials: int
    arrays: list[Any]

    def complete(self, num_heads: int, scale: float, soft_cap: float | None) -> None:
        """Add what only the layers know."""
        step = self.step
        if step.num_heads:
            return
        step.num_heads, step.scale, step.soft_cap = num_heads, scale, soft_cap or 0.0
        if self.num_partials:
            partials = np.empty(self.num_partials * num_heads * (step.head_dim + 2), np.float32)
            self.arrays.append(partials)
            step.partials = partials.ctypes.data

    def move_to(self, step: _Step) -> None:
        """Put the structure where a recording looks for it."""
        ctypes.memmove(ctypes.addressof(step), ctypes.addressof(self.step), ctypes.sizeof(_Step))
        self.address = ctypes.addressof(step)


def problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernels cannot be used, or None where they can."""
    if device.type != "cpu":
        return f"it runs on a CPU, not on {device.type}"
    if dtype not in _KERNELS:
        return f"it has no code for {str(dtype).removeprefix('torch.')}"
    if head_dim % 16:
        return f"the head size must be a multiple of 16, the model's is {head_dim}"
    return None if native.load() is not None else native.why_not


class CpuBackend(AttentionBackend):
    """Writes and attends in one call a layer. Scores, softmax and sums are float32 whatever the cache holds.

    Args:
        num_threads: between which a step's work is shared; None: PyTorch's number.
        batch_invariant: compute each query in the same order whatever else is in the step: by one kernel, over the same 64
            keys at a time, no context split over threads.
    """

    name = "cpu"

    def __init__(self, num_threads: int | None = None, batch_invariant: bool = False) -> None:
        self.batch_invariant = batch_invariant
        self.num_threads = num_threads or torch.get_num_threads()
        self._arguments = _Attend()
        self._kernels = {dtype: native.Kernel(name, self._arguments) for dtype, name in _KERNELS.items()}

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> Plan:
        starts = metadata.query_start_loc.numpy()
        context_lens = metadata.context_lens.numpy()
        if self.batch_invariant:
            items, merges, num_partials = _pieces(starts, context_lens, sliding_window), np.empty((0, 4), np.int32), 0
        else:
            items, merges, num_partials = cut(starts, context_lens, sliding_window, self.num_threads)
        _, num_blocks, block_size, num_kv_heads, head_dim = metadata.kv_caches[0].shape
        tables = metadata.block_tables
        step = _Step(
            slot_mapping=metadata.slot_mapping.data_ptr(), block_tables=tables.data_ptr(), items=items.ctypes.data,
            merges=merges.ctypes.data, table_stride=tables.stride(0), num_items=len(items),
            num_merges=len(merges), num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=block_size, num_blocks=num_blocks,
            window=sliding_window or 0, invariant=self.batch_invariant,
        )  # fmt: skip
        arrays = [items, merges, metadata.slot_mapping, tables, metadata.hidden_keys]
        step.hidden = None if metadata.hidden_keys is None else metadata.hidden_keys.data_ptr()
        return Plan(step, ctypes.addressof(step), sliding_window, num_partials, arrays)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        plan: Plan = metadata.plan
        if plan is None or plan.window != sliding_window:
            plan = metadata.plan = self.plan(metadata, sliding_window)
        step = plan.step
        if query.stride(1) != step.head_dim:  # the kernel wants a token's heads behind one another
            query = query.contiguous()
        if key.stride() != value.stride() or key.stride(1) != step.head_dim:
            key, value = key.contiguous(), value.contiguous()
        tokens, heads, dim = query.shape
        plan.complete(heads, scale, soft_cap)
        output = native.result("attention", tokens, heads * dim, query.dtype)
        arguments = self._arguments
        arguments.rows = tokens
        arguments.step, arguments.cache = plan.address, metadata.kv_caches[layer].data_ptr()
        arguments.scales = None if metadata.kv_scales is None else metadata.kv_scales[layer].data_ptr()
        arguments.query, arguments.ldq = query.data_ptr(), query.stride(0)
        arguments.key, arguments.value, arguments.ldkv = key.data_ptr(), value.data_ptr(), key.stride(0)
        arguments.output = output.data_ptr()
        sinks = None if self.sinks is None else self.sinks.float()  # which is kept until the kernel is through
        arguments.sinks = None if sinks is None else sinks.data_ptr()
        self._kernels[query.dtype]()
        return output.view(query.shape)


def cut(
    query_starts: np.ndarray, context_lens: np.ndarray, sliding_window: int | None, num_threads: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Share a step's work out.

    Args:
        query_starts: [S + 1]. context_lens: [S].

    Returns:
        Items [N, 7] (sequence, first query's row, queries, position, first key, end of the keys, first partial result or −1),
        merges [M, 4] (row, queries, first partial result, splits), both int32, and the number of rows of partial results.
    """
    query_lens = query_starts[1:] - query_starts[:-1]
    if query_lens.max() <= FEW and query_lens.min() > 0:  # as in nearly all steps
        whole = np.empty((len(context_lens), 7), np.int32)
        whole[:, 0], whole[:, 1], whole[:, 2] = np.arange(len(whole)), query_starts[:-1], query_lens
        whole[:, 3], whole[:, 5], whole[:, 6] = context_lens - query_lens, context_lens, -1
        whole[:, 4] = 0 if sliding_window is None else np.maximum(0, whole[:, 3] - sliding_window + 1)
    else:
        whole = _pieces(query_starts, context_lens, sliding_window)
    keys = whole[:, 5] - whole[:, 4]
    most = max(MIN_SPLIT, int(keys.sum()) // (4 * num_threads))
    if keys.max() <= 2 * most:
        return whole, np.empty((0, 4), np.int32), 0
    splits = np.where(keys > 2 * most, -(-keys // most), 1)
    items = np.repeat(whole, splits, axis=0)
    nth = np.arange(len(items)) - np.repeat(np.cumsum(splits) - splits, splits)
    parts, size = np.repeat(splits, splits), np.repeat(keys, splits)
    items[:, 4], items[:, 5] = items[:, 4] + size * nth // parts, items[:, 4] + size * (nth + 1) // parts
    rows = np.where(splits > 1, splits * whole[:, 2], 0)
    base = np.cumsum(rows) - rows
    items[:, 6] = np.where(parts > 1, np.repeat(base, splits) + nth * items[:, 2], -1)
    split = splits > 1
    merges = np.stack([whole[split, 1], whole[split, 2], base[split], splits[split]], axis=1)
    return items, np.ascontiguousarray(merges, np.int32), int(rows.sum())


def _pieces(query_starts: np.ndarray, context_lens: np.ndarray, sliding_window: int | None) -> np.ndarray:
    """Items of at most `PIECE` queries, each with all keys that it sees; the largest first, so that none is left at the end."""
    query_lens = np.diff(query_starts)
    counts = -(-query_lens // PIECE)
    seq = np.repeat(np.arange(len(query_lens)), counts)
    nth = np.arange(len(seq)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = query_lens[seq] * nth // counts[seq]
    end = query_lens[seq] * (nth + 1) // counts[seq]
    first = context_lens[seq] - query_lens[seq]  # position of the sequence's first query
    left = np.zeros_like(begin) if sliding_window is None else np.maximum(0, first + begin - sliding_window + 1)
    items = np.stack([seq, query_starts[seq] + begin, end - begin, first + begin, left, first + end, np.full_like(seq, -1)], 1)
    order = np.argsort(-(items[:, 2] * (items[:, 5] - items[:, 4])), kind="stable")
    return np.ascontiguousarray(items[order], np.int32)
