"""Paged attention: one operator over a step's flat batch, with several backends behind one signature.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023, §4.1.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..batching.step_arrays import PagedArrays
from ..memory.cache_engine import write_kv


@dataclass(slots=True)
class AttentionMetadata(PagedArrays[Tensor, Tensor]):
    """A step as attention sees it; travels through the model as one argument. `PagedArrays` says where its S sequences and T
    tokens stand: ``slot_mapping`` [T] int64, ``block_tables`` [S, M], ``query_start_loc`` [S + 1], ``context_lens`` [S] int32.

    Attributes:
        kv_caches: for each layer K and V by block, [2, num_blocks, block_size, H_kv, D].
        max_query_len, max_context_len: maxima over the batch, as Python numbers so that nobody waits for the device.
        backend: computes `attend` for every layer.
        plan: what the backend worked out once for this step in `AttentionBackend.plan`.
        kv_scales: of an int8 cache, for each layer the factor of each stored vector, [2, num_blocks, block_size, H_kv] float16.
        rope: (cos, signed sin), [T, 1, D] each, where the layers leave it to the Triton backend to rotate queries and keys.
        groups: the same step for each group of layers, where a model has several.
        hidden_keys: [T] int64, words as in `token_tree.hidden_keys`, on a CPU; None: no key before a token is hidden.
    """

    kv_caches: list[Tensor]
    max_query_len: int
    max_context_len: int
    backend: AttentionBackend
    plan: Any = None
    kv_scales: list[Tensor] | None = None
    rope: tuple[Tensor, Tensor] | None = None
    groups: list[AttentionMetadata] = field(default_factory=list)
    hidden_keys: Tensor | None = None

    def of(self, group: int) -> AttentionMetadata:
        """The step as layers of this group see it."""
        return self.groups[group] if self.groups else self


class AttentionBackend(abc.ABC):
    """Writes a step's keys and values into the cache and attends over the paged context."""

    name: str
    """As in `backends.make_backend`."""

    sinks: Tensor | None = None
    """[H], a score of each head that counts in the softmax and stands for no token. A layer that has them puts them here before
    it attends; `make_backend` sees to a backend that can."""

    capturable = False
    """Whether CUDA graphs can hold it: what it launches depends on shapes and on the metadata's Python numbers alone, a token
    with slot −1 is not stored, and a sequence with a context of 0 is padding, whose output is zeros."""

    @abc.abstractmethod
    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> Any:
        """Work that is the same for every layer of a step; the result is put into `metadata.plan`."""
        ...

    @abc.abstractmethod
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """Causal attention of each token over its own sequence's context, itself included.

        First writes `key` and `value` to the cache at `metadata.slot_mapping`: a sequence may read blocks that another one
        fills in the same step. Query head h reads KV head ``h // (H / H_kv)``.

        Args:
            layer: index into `metadata.kv_caches`.
            query: [T, H, D]. key, value: [T, H_kv, D], already rotated.
            scale: factor on the scores, usually ``D ** -0.5``.
            sliding_window: a token sees itself and the ``sliding_window - 1`` tokens before it; None: all.
            soft_cap: a score x, scaled already, becomes ``soft_cap · tanh(x / soft_cap)`` before the softmax; None: it stays x.

        Returns:
            [T, H, D], in the dtype of `query`.
        """
        ...


def attention_metadata(
    arrays: PagedArrays[Tensor, Tensor], longest: tuple[int, int], kv_caches: list[Tensor], kv_scales: list[Tensor] | None,
    backend: AttentionBackend, windows: Sequence[int | None], hidden_keys: Tensor | None = None,
) -> AttentionMetadata:  # fmt: skip
    """A step's arrays with the caches that they point into, and the backend's plan for them.

    Args:
        arrays: with several groups of layers, each has block tables and slots of its own, see `GroupedBatch`.
        longest: (max_query_len, max_context_len). windows: of each group. The rest: as in `AttentionMetadata`.
    """
    metadata = AttentionMetadata(
        arrays.slot_mapping, arrays.block_tables, arrays.query_start_loc, arrays.context_lens, kv_caches, *longest, backend,
        kv_scales=kv_scales, hidden_keys=hidden_keys,
    )  # fmt: skip
    if len(windows) == 1:
        metadata.plan = backend.plan(metadata, windows[0])
        return metadata
    for window, slots, tables in zip(windows, arrays.slot_mapping, arrays.block_tables, strict=True):
        group = replace(metadata, slot_mapping=slots, block_tables=tables)
        group.plan = backend.plan(group, window)
        metadata.groups.append(group)
    return metadata


class NaiveBackend(AttentionBackend):
    """Paged attention as the paper writes it down: one sequence after the other, block table first, softmax second.

    The version to read and to test the others against; slow, because Python loops over the sequences.
    """

    name = "naive"

    def __init__(self, compute_dtype: torch.dtype = torch.float32) -> None:
        """compute_dtype: of scores, softmax and sums; float64 makes it an oracle for the float32 backends."""
        self.compute_dtype = compute_dtype

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> None:
        return None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend.attend`. Scores, softmax and sums are computed in `compute_dtype`, one sequence at a time; what
        the block table holds beside the visible context is not read. Of all that it is given only the cache changes."""
        raise NotImplementedError(
            "Stage 1 · Task 1.6: NaiveBackend.attend, see stages/stage1_block_management/GUIDE.md#task-1-6"
        )


def gather_context(kv_cache: Tensor, block_table: Tensor, left: int, right: int) -> tuple[Tensor, Tensor]:
    """Keys and values of the positions left..right-1 of one sequence, collected from the blocks that hold them, and no others.

    Args:
        kv_cache: [2, num_blocks, block_size, H_kv, D].
        block_table: [M], read only where these positions lie.

    Returns:
        K and V, [right - left, H_kv, D] each.
    """
    # Hint: Write first, then one sequence at a time: gather its K and V into contiguous tensors, and from there it is
    # the attention you know. The queries are the LAST tokens of the context.
    raise NotImplementedError("Stage 1 · Task 1.6: gather_context, see stages/stage1_block_management/GUIDE.md#task-1-6")
