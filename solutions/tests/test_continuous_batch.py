"""ContinuousBatch: every array of a step, against lists worked out by hand or by plain loops."""

from __future__ import annotations

import numpy as np

from solutions.batching.continuous_batch import ContinuousBatch
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_output import SchedulerOutput
from solutions.batching.sequence import Sequence


def sequence(seq_id: int, tokens: list[int], computed: int) -> Sequence:
    seq = Sequence(seq_id, tokens, SamplingParams())
    seq.num_computed_tokens = computed
    return seq


def decision(*scheduled: tuple[Sequence, int], removed: tuple[int, ...] = ()) -> SchedulerOutput:
    output = SchedulerOutput(removed=list(removed))
    for seq, count in scheduled:
        output.add(seq, count)
    output.changed_tables = {seq.seq_id for seq, _ in scheduled}
    return output


def test_decode_prompt_and_chunk_in_one_step():
    decode = sequence(0, [10, 11, 12, 13, 14], 4)
    prompt = sequence(1, [20, 21, 22], 0)
    chunk = sequence(2, [30, 31, 32, 33, 34, 35, 36, 37, 38], 3)
    tables = {0: [7, 2], 1: [5], 2: [1, 3, 9]}
    batch = ContinuousBatch(4, 16, 4).build(decision((decode, 1), (prompt, 3), (chunk, 4)), tables)
    assert batch.sequences == [decode, prompt, chunk]
    assert batch.input_ids.tolist() == [14, 20, 21, 22, 33, 34, 35, 36]
    assert batch.positions.tolist() == [4, 0, 1, 2, 3, 4, 5, 6]
    assert batch.slot_mapping.tolist() == [2 * 4 + 0, 20, 21, 22, 1 * 4 + 3, 12, 13, 14]
    assert batch.query_start_loc.tolist() == [0, 1, 4, 8]
    assert batch.context_lens.tolist() == [5, 3, 7]
    assert batch.block_tables[:, 0].tolist() == [7, 5, 1]
    assert batch.block_tables[0, :2].tolist() == [7, 2]
    assert batch.block_tables[2, :2].tolist() == [1, 3]
    assert batch.sampled == [decode, prompt], "the chunk is not the end of its sequence"
    assert batch.logits_indices.tolist() == [0, 3]
    assert batch.input_ids.dtype == batch.positions.dtype == batch.slot_mapping.dtype == np.int64
    assert batch.block_tables.dtype == batch.query_start_loc.dtype == batch.context_lens.dtype == np.int32


def test_pure_decode_step():
    seqs = [sequence(i, [i] * (5 + i), 4 + i) for i in range(3)]
    tables = {i: [i * 3, i * 3 + 1] for i in range(3)}
    batch = ContinuousBatch(4, 16, 4).build(decision(*((seq, 1) for seq in seqs)), tables)
    assert batch.positions.tolist() == [4, 5, 6]
    assert batch.slot_mapping.tolist() == [4, 4 * 4 + 1, 7 * 4 + 2]
    assert batch.logits_indices.tolist() == [0, 1, 2]


def test_single_token_chunk_in_the_middle_of_a_prompt_takes_that_token():
    seq = sequence(0, [5, 6, 7, 8], 1)
    batch = ContinuousBatch(1, 8, 2).build(decision((seq, 1)), {0: [0, 1]})
    assert batch.input_ids.tolist() == [6]
    assert batch.sampled == []
    assert batch.logits_indices.tolist() == []


def test_only_changed_tables_are_read_again():
    builder, seq = ContinuousBatch(2, 16, 2), sequence(0, [1, 2, 3], 2)
    builder.build(decision((seq, 1)), {0: [4, 6]})
    unchanged = decision((seq, 1))
    unchanged.changed_tables = set()
    assert builder.build(unchanged, {0: [9, 9]}).block_tables.tolist() == [[4, 6]]
    assert builder.build(decision((seq, 1)), {0: [4, 8]}).block_tables.tolist() == [[4, 8]]


def test_rows_are_given_back_by_those_who_left():
    builder = ContinuousBatch(1, 8, 2)
    for seq_id in range(5):
        seq = sequence(seq_id, [1, 2, 3], 0)
        removed = (seq_id - 1,) if seq_id else ()
        batch = builder.build(decision((seq, 3), removed=removed), {seq_id: [seq_id, seq_id + 1]})
        assert batch.block_tables.tolist() == [[seq_id, seq_id + 1]]


def test_earlier_batches_stay_as_they_were():
    builder, seq = ContinuousBatch(2, 16, 2), sequence(0, [1, 2, 3], 0)
    first = builder.build(decision((seq, 3)), {0: [4, 6]})
    seq.num_computed_tokens = 2
    builder.build(decision((seq, 1)), {0: [5, 7]})
    assert first.block_tables.tolist() == [[4, 6]]
    assert first.positions.tolist() == [0, 1, 2]
