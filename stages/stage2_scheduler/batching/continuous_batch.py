"""Turns the scheduler's decision into the flat arrays of one step.

Tokens of all sequences stand one behind the other without padding: prompts, chunks and single decode tokens alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .scheduler_output import SchedulerOutput
from .sequence import Sequence


@dataclass(slots=True)
class FlatBatch:
    """One step's input: S sequences with T tokens in all.

    Attributes:
        sequences: the S sequences in order.
        input_ids, positions, slot_mapping: [T] int64, each token's id, place in its sequence and KV slot.
        block_tables: [S, M] int32, M blocks being enough for the longest context; what a row holds behind its context's blocks
            means nothing.
        query_start_loc: [S + 1] int32, where each sequence's tokens begin.
        context_lens: [S] int32, tokens of each sequence in the cache after this step.
        logits_indices: [N] int64, which tokens need logits for sampling: the last one of each of `sampled`.
        sampled: the N sequences that get a new token.
        decision: the scheduler's decision, for the blocks to copy and the sequences that left.
    """

    sequences: list[Sequence]
    input_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    slot_mapping: NDArray[np.int64]
    block_tables: NDArray[np.int32]
    query_start_loc: NDArray[np.int32]
    context_lens: NDArray[np.int32]
    logits_indices: NDArray[np.int64]
    sampled: list[Sequence]
    decision: SchedulerOutput


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

    def build(self, decision: SchedulerOutput, tables: dict[int, list[int]]) -> FlatBatch:
        """Lay out one step, in the order of ``decision.scheduled``.

        The block tables are mirrored first (`_mirror_tables`); row ``_row_of[seq_id]`` of `_tables` is then a sequence's. A
        batch owns its arrays: it stays as it is when the next one is built.

        Args:
            decision: what the scheduler decided; nothing in it is computed yet.
            tables: seq_id → block ids, the block manager's.
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
            table = tables[seq_id]
            self._tables[row, : len(table)] = table
