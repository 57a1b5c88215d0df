"""The flat arrays of a step for a model whose layers hold their blocks in groups: tables and slots of each group."""

from __future__ import annotations

import numpy as np

from .adapted_batch import AdaptedBatch
from .continuous_batch import ContinuousBatch, FlatBatch
from .scheduler_output import SchedulerOutput


class GroupedBatch(ContinuousBatch):
    """A `ContinuousBatch` whose steps have ``block_tables`` [G, S, M] and ``slot_mapping`` [G, T] for G groups of layers.

    Args:
        num_groups: G. A sequence's table is that of each group, one behind the other.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int, num_groups: int) -> None:
        super().__init__(max_num_seqs, max_model_len, block_size)
        self._of_groups = np.zeros((num_groups, *self._tables.shape), np.int32)
        self._tables = self._of_groups[0]

    def build(
        self, decision: SchedulerOutput, tables: dict[int, list[int]], progress: dict[int, int] | None = None
    ) -> FlatBatch:
        batch = super().build(decision, tables, progress)
        num_seqs, num_blocks = batch.block_tables.shape
        rows = np.fromiter([self._row_of[seq.seq_id] for seq in batch.sequences], np.int64, num_seqs)
        batch.block_tables = np.ascontiguousarray(self._of_groups[:, rows, :num_blocks])
        seq_of_token = np.repeat(np.arange(num_seqs), np.diff(batch.query_start_loc))
        blocks = batch.block_tables[:, seq_of_token, batch.positions // self.block_size].astype(np.int64)
        slots = blocks * self.block_size + batch.positions % self.block_size
        batch.slot_mapping = np.ascontiguousarray(slots)  # NumPy may lay such a choice of columns out by token
        return batch

    def _enter(self, row: int, table: list[int]) -> None:
        by_group = np.array(table, np.int32).reshape(len(self._of_groups), -1)
        self._of_groups[:, row, : by_group.shape[1]] = by_group


class AdaptedGroups(AdaptedBatch, GroupedBatch):
    """The same with the adapter of each token."""


def make_batch(num_groups: int, adapters: bool, max_num_seqs: int, max_model_len: int, block_size: int) -> ContinuousBatch:
    """What lays out the steps of a model with so many groups of layers, of an engine with or without adapters."""
    sizes = max_num_seqs, max_model_len, block_size
    if num_groups == 1:
        return AdaptedBatch(*sizes) if adapters else ContinuousBatch(*sizes)
    return (AdaptedGroups if adapters else GroupedBatch)(*sizes, num_groups)
