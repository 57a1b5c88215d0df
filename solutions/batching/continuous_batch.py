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
        self._mirror_tables(decision, tables)
        sequences = list(decision.scheduled)
        num_seqs = len(sequences)
        num_tokens = np.fromiter(decision.scheduled.values(), np.int64, num_seqs)
        if progress is None:
            begins = [seq.num_computed_tokens for seq in sequences]
        else:
            begins = [progress[seq.seq_id] for seq in sequences]
        num_computed = np.fromiter(begins, np.int64, num_seqs)
        starts = np.zeros(num_seqs + 1, np.int64)
        np.cumsum(num_tokens, out=starts[1:])
        if starts[-1] == num_seqs:  # one token each: a pure decode step
            if progress is None:
                input_ids = [seq.tokens[seq.num_computed_tokens] for seq in sequences]
            else:
                input_ids = [seq.tokens[begin] for seq, begin in zip(sequences, begins, strict=True)]
            seq_of_token, positions = np.arange(num_seqs), num_computed
        else:
            input_ids = []
            for seq, begin in zip(sequences, begins, strict=True):
                input_ids += seq.tokens[begin : begin + decision.scheduled[seq]]
            seq_of_token = np.repeat(np.arange(num_seqs), num_tokens)
            positions = np.arange(starts[-1]) - (starts[:-1] - num_computed)[seq_of_token]
        context_lens = num_computed + num_tokens
        num_blocks = -(-int(context_lens.max()) // self.block_size)
        rows = np.fromiter([self._row_of[seq.seq_id] for seq in sequences], np.int64, num_seqs)
        block_tables = self._tables[rows, :num_blocks]
        blocks = block_tables[seq_of_token, positions // self.block_size].astype(np.int64)
        if len(decision.sampled) == num_seqs:
            logits_indices = starts[1:] - 1
        else:
            end_of = dict(zip(sequences, (starts[1:] - 1).tolist(), strict=True))
            logits_indices = np.array([end_of[seq] for seq in decision.sampled], np.int64)
        return FlatBatch(
            sequences=sequences,
            input_ids=np.array(input_ids, np.int64),
            positions=positions,
            slot_mapping=blocks * self.block_size + positions % self.block_size,
            block_tables=block_tables,
            query_start_loc=starts.astype(np.int32),
            context_lens=context_lens.astype(np.int32),
            logits_indices=logits_indices,
            sampled=decision.sampled,
            decision=decision,
        )

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
