"""Turns the scheduler's decision into the flat arrays of one step.

Tokens of all sequences stand one behind the other without padding: prompts, chunks and single decode tokens alike.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .scheduler_output import SchedulerOutput
from .sequence import Sequence
from .step_arrays import HostArrays

NO_ADAPTERS = np.empty(0, np.int64)


@dataclass(slots=True)
class FlatBatch(HostArrays):
    """One step's input: the arrays of `FlatArrays` for S sequences with T tokens in all, and what rank 0 alone knows. M, the
    width of `block_tables`, is the number of blocks of the longest context of the step.

    Attributes:
        sequences: the S sequences in order.
        logits_indices: [N] int64, which tokens need logits for sampling: the last one of each of `sampled`.
        sampled: the N sequences that get a new token.
        decision: the scheduler's decision, for the blocks to copy and the sequences that left.
        adapters: empty, unless an `AdaptedBatch` has made it.
    """

    sequences: list[Sequence]
    logits_indices: NDArray[np.int64]
    sampled: list[Sequence]
    decision: SchedulerOutput
    adapters: NDArray[np.int64] = field(default_factory=lambda: NO_ADAPTERS, kw_only=True)


class ContinuousBatch:
    """Builds `FlatBatch`es. It mirrors the block tables in one array that lives across steps, a row for each running
    sequence, and copies only those that changed; everything else is a handful of array operations over the whole batch.

    Args:
        max_num_seqs: most sequences in a step.
        max_model_len: longest sequence, in tokens.
        block_size: tokens in a KV block.
    """

    def __init__(self, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self.block_size = block_size
        self._tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._row_of: dict[int, int] = {}
        self._free_rows = list(range(max_num_seqs))[::-1]

    def build(
        self, decision: SchedulerOutput, tables: dict[int, list[int]], progress: dict[int, int] | None = None
    ) -> FlatBatch:
        """Lay out one step, in the order of ``decision.scheduled``, without a Python loop over tokens.

        The block tables are mirrored first (`_mirror_tables`); row ``_row_of[seq_id]`` of `_tables` is then a sequence's. A
        batch owns its arrays: it stays as it is when the next one is built.

        Args:
            decision: what the scheduler decided; nothing in it is computed yet.
            tables: seq_id → block ids, the block manager's.
            progress: seq_id → tokens of it that are in the KV cache; default: `num_computed_tokens` of each sequence. A model
                that drafts has a cache of its own and with it a count of its own.
        """
        # Hint: Write it with plain loops over `decision.scheduled` first. np.repeat and np.cumsum can take the loops
        # out later.
        raise NotImplementedError("Stage 2 · Task 2.6: ContinuousBatch.build, see stages/stage2_scheduler/GUIDE.md#task-2-6")

    def _mirror_tables(self, decision: SchedulerOutput, tables: dict[int, list[int]]) -> None:
        for seq_id in decision.removed:
            row = self._row_of.pop(seq_id, None)
            if row is not None:
                self._free_rows.append(row)
        for seq_id in decision.changed_tables:
            row = self._row_of.get(seq_id)
            if row is None:
                row = self._row_of[seq_id] = self._free_rows.pop()
            self._enter(row, tables[seq_id])

    def _enter(self, row: int, table: list[int]) -> None:
        self._tables[row, : len(table)] = table
