"""Task 2.6: the arrays of one step, worked out by hand. Blocks hold 4 tokens unless a test says otherwise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stages.batching.continuous_batch import ContinuousBatch, FlatBatch
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import make_sequence
from stages.course.fixtures.tracing import lines_run


def computed(seq_id: int, tokens: list[int], count: int) -> Sequence:
    """A sequence whose first `count` tokens are in the KV cache."""
    seq = make_sequence(seq_id, tokens)
    seq.num_computed_tokens = count
    return seq


def decide(scheduled: dict[Sequence, int], removed: tuple[int, ...] = ()) -> SchedulerOutput:
    """A decision in which every table is new."""
    sampled = [seq for seq, count in scheduled.items() if seq.num_computed_tokens + count == len(seq.tokens)]
    return SchedulerOutput(
        scheduled=scheduled, sampled=sampled, changed_tables={seq.seq_id for seq in scheduled}, removed=list(removed)
    )


def check_tables(batch: FlatBatch, expected: list[list[int]]) -> None:
    """Each row begins with the blocks of its sequence's context; what comes behind them means nothing."""
    shape = (len(expected), max(map(len, expected)))
    check_equal(batch.block_tables.shape, shape, "shape of block_tables: a row a sequence, columns for the longest context")
    for i, blocks in enumerate(expected):
        check_equal(batch.block_tables[i, : len(blocks)].tolist(), blocks, f"block_tables, row {i}")


def test_one_prompt() -> None:
    """A prompt of 6 tokens in blocks 5 and 2: slots 20 … 23 and 8, 9, and logits for its last token.

    Why: token p lies in slot table[p // 4] * 4 + p % 4. The blocks need not be neighbours; that is what paging means.
    """
    seq = computed(0, [10, 11, 12, 13, 14, 15], 0)
    batch = ContinuousBatch(4, 16, 4).build(decide({seq: 6}), {0: [5, 2]})
    check_equal(batch.input_ids, [10, 11, 12, 13, 14, 15], "input_ids")
    check_equal(batch.positions, [0, 1, 2, 3, 4, 5], "positions")
    check_equal(batch.slot_mapping, [20, 21, 22, 23, 8, 9], "slot_mapping")
    check_equal(batch.query_start_loc, [0, 6], "query_start_loc")
    check_equal(batch.context_lens, [6], "context_lens")
    check_equal(batch.logits_indices, [5], "logits_indices")
    check_tables(batch, [[5, 2]])


def test_decode_prompt_and_chunk_in_one_step() -> None:
    """A decode at position 4, a whole prompt of 3, and 4 tokens in the middle of a prompt of 9, one behind the other.

    Why: no padding and no separate steps for prompts and decodes; the arrays alone say which token is whose.
    """
    decode = computed(0, [10, 11, 12, 13, 14], 4)
    prompt = computed(1, [20, 21, 22], 0)
    chunk = computed(2, [30, 31, 32, 33, 34, 35, 36, 37, 38], 3)
    decision = decide({decode: 1, prompt: 3, chunk: 4})
    batch = ContinuousBatch(4, 16, 4).build(decision, {0: [7, 2], 1: [5], 2: [1, 3, 9]})
    check_equal(batch.input_ids, [14, 20, 21, 22, 33, 34, 35, 36], "input_ids")
    check_equal(batch.positions, [4, 0, 1, 2, 3, 4, 5, 6], "positions")
    check_equal(batch.slot_mapping, [8, 20, 21, 22, 7, 12, 13, 14], "slot_mapping")
    check_equal(batch.query_start_loc, [0, 1, 4, 8], "query_start_loc")
    check_equal(batch.context_lens, [5, 3, 7], "context_lens")
    check_equal(batch.logits_indices, [0, 3], "logits_indices: the chunk is not through its prompt")
    check_tables(batch, [[7, 2], [5], [1, 3]])
    check_equal([seq.seq_id for seq in batch.sequences], [0, 1, 2], "sequences")
    check_equal([seq.seq_id for seq in batch.sampled], [0, 1], "sampled")
    check_equal(batch.decision, decision, "the decision, for the blocks to copy")


def test_decode_step() -> None:
    """Three decodes at positions 4, 9 and 2: one token each, and logits for each.

    Why: this is nearly every step of a busy server, so it has to be right first and fast next.
    """
    sequences = [computed(i, list(range(100 * i, 100 * i + length)), length - 1) for i, length in enumerate((5, 10, 3))]
    batch = ContinuousBatch(4, 16, 4).build(decide(dict.fromkeys(sequences, 1)), {0: [6, 4], 1: [0, 2, 8], 2: [1]})
    check_equal(batch.input_ids, [4, 109, 202], "input_ids")
    check_equal(batch.positions, [4, 9, 2], "positions")
    check_equal(batch.slot_mapping, [16, 33, 6], "slot_mapping")
    check_equal(batch.query_start_loc, [0, 1, 2, 3], "query_start_loc")
    check_equal(batch.context_lens, [5, 10, 3], "context_lens")
    check_equal(batch.logits_indices, [0, 1, 2], "logits_indices")
    check_tables(batch, [[6, 4], [0, 2, 8], [1]])


@pytest.mark.parametrize(
    ("start", "count", "slots"), [(3, 1, [31]), (4, 1, [12]), (3, 2, [31, 12]), (7, 2, [15, 20]), (8, 1, [20])]
)
def test_slots_across_block_boundaries(start: int, count: int, slots: list[int]) -> None:
    """Tokens at the last position of a block, at the first of the next one, and across the two, with the table 7, 3, 5.

    Why: off by one at a boundary writes a key into somebody else's block, and both get wrong answers without any error.
    """
    seq = computed(0, list(range(9)), start)
    batch = ContinuousBatch(2, 16, 4).build(decide({seq: count}), {0: [7, 3, 5]})
    check_equal(batch.slot_mapping, slots, "slot_mapping")
    check_equal(batch.positions, list(range(start, start + count)), "positions")
    check_equal(batch.context_lens, [start + count], "context_lens")
    check_tables(batch, [[7, 3, 5][: (start + count + 3) // 4]])


def test_single_token_in_the_middle_of_a_prompt() -> None:
    """A chunk of one token, the second of four: it is that token and not the last one, and it needs no logits.

    Why: with a budget nearly used up, chunks of one token are common; they only look like decodes.
    """
    seq = computed(0, [5, 6, 7, 8], 1)
    batch = ContinuousBatch(1, 16, 4).build(decide({seq: 1}), {0: [0]})
    check_equal(batch.input_ids, [6], "input_ids")
    check_equal(batch.positions, [1], "positions")
    check_equal(batch.logits_indices, [], "logits_indices")
    check_equal(batch.logits_indices.dtype, np.dtype(np.int64), "dtype of an empty logits_indices")
    check_equal(batch.sampled, [], "sampled")


def test_progress_of_another_model() -> None:
    """The model has computed 4 tokens of one sequence and 2 of another; a second model, by its own count, 1 and 3.

    Why: a model that drafts lags behind the one it drafts for, or runs ahead of it. Its keys are where its own count says.
    """
    first, second = computed(0, [10, 11, 12, 13, 14], 4), computed(1, [20, 21, 22, 23], 2)
    builder, tables = ContinuousBatch(2, 16, 4), {0: [7, 2], 1: [5]}
    batch = builder.build(decide({first: 4, second: 1}), tables, {0: 1, 1: 3})
    check_equal(batch.input_ids, [11, 12, 13, 14, 23], "input_ids of a chunk and a decode")
    check_equal(batch.positions, [1, 2, 3, 4, 3], "positions")
    check_equal(batch.slot_mapping, [29, 30, 31, 8, 23], "slot_mapping")
    check_equal(batch.context_lens, [5, 4], "context_lens")
    batch = builder.build(decide({first: 1, second: 1}), tables, {0: 1, 1: 3})
    check_equal(batch.input_ids, [11, 23], "input_ids of two decodes")
    check_equal(batch.positions, [1, 3], "positions")


def test_logits_come_from_the_last_token_of_each_sampled_sequence() -> None:
    """Chunk, prompt, chunk, prompt of 2, 3, 1 and 2 tokens: logits for tokens 4 and 7, the ends of the prompts.

    Why: the first token of a prompt would answer a question of one word. And logits for all tokens would cost as much as the
    model.
    """
    lengths, counts = (5, 3, 5, 2), (2, 3, 1, 2)
    sequences = [computed(i, list(range(length)), 0) for i, length in enumerate(lengths)]
    decision = decide(dict(zip(sequences, counts, strict=True)))
    batch = ContinuousBatch(4, 16, 4).build(decision, {0: [0, 1], 1: [2], 2: [3, 4], 3: [5]})
    check_equal(batch.logits_indices, [4, 7], "logits_indices")
    check_equal([seq.seq_id for seq in batch.sampled], [1, 3], "sampled")


def test_resumed_sequence_is_computed_from_its_first_token() -> None:
    """A preempted sequence, nothing computed, with a prompt of 3 and an output of 2: all five tokens from position 0.

    Why: prompt and output stand in one list, so that resuming is a prompt like any other.
    """
    seq = make_sequence(0, [10, 11, 12])
    seq.tokens += [20, 21]
    batch = ContinuousBatch(1, 16, 4).build(decide({seq: 5}), {0: [3, 1]})
    check_equal(batch.input_ids, [10, 11, 12, 20, 21], "input_ids")
    check_equal(batch.positions, [0, 1, 2, 3, 4], "positions")
    check_equal(batch.slot_mapping, [12, 13, 14, 15, 4], "slot_mapping")


def test_dtypes_are_those_that_the_model_takes() -> None:
    """Ids, positions, slots and logits indices are int64; tables, starts and lengths int32; in mixed and in decode steps.

    Why: PyTorch indexes with int64 only, and attention kernels read int32. A wrong dtype is an error there, or garbage.
    """
    builder = ContinuousBatch(4, 16, 4)
    prompt, decode = computed(0, [1, 2, 3], 0), computed(1, [1, 2, 3], 2)
    for scheduled in ({prompt: 2, decode: 1}, {decode: 1}):
        batch = builder.build(decide(scheduled), {0: [0], 1: [1]})
        for name in ("input_ids", "positions", "slot_mapping", "logits_indices"):
            check_equal(getattr(batch, name).dtype, np.dtype(np.int64), f"dtype of {name}")
        for name in ("block_tables", "query_start_loc", "context_lens"):
            check_equal(getattr(batch, name).dtype, np.dtype(np.int32), f"dtype of {name}")
        check_equal(batch.block_tables.ndim, 2, "dimensions of block_tables")


def test_slots_beyond_two_billion() -> None:
    """Block 300,000,000 of 16 tokens begins at slot 4,800,000,000, which does not fit into 32 bits.

    Why: block ids are int32 and slots are not. A product in int32 turns negative without a word.
    """
    seq = computed(0, list(range(18)), 16)
    batch = ContinuousBatch(1, 32, 16).build(decide({seq: 2}), {0: [1, 300_000_000]})
    check_equal(batch.slot_mapping, [4_800_000_000, 4_800_000_001], "slot_mapping")


def test_growing_table_is_followed() -> None:
    """A sequence decodes over a block boundary: in the step in which its table grows, the new block is used at once.

    Why: the mirror of the tables copies only those that changed. A change that is missed sends keys to a block of yesterday.
    """
    builder, seq = ContinuousBatch(2, 16, 4), computed(0, [1, 2, 3, 4], 3)
    check_equal(builder.build(decide({seq: 1}), {0: [6]}).slot_mapping, [27], "slot of position 3")
    seq.tokens.append(5)
    seq.num_computed_tokens = 4
    check_equal(builder.build(decide({seq: 1}), {0: [6, 2]}).slot_mapping, [8], "slot of position 4")
    seq.tokens.append(6)
    seq.num_computed_tokens = 5
    unchanged = SchedulerOutput(scheduled={seq: 1}, sampled=[seq])
    batch = builder.build(unchanged, {0: [6, 2]})
    check_equal(batch.slot_mapping, [9], "slot of position 5")
    check_tables(batch, [[6, 2]])


def test_rows_of_those_who_left_are_used_again() -> None:
    """Six sequences pass through two seats, two at a time; whoever comes takes the row of one who left, with blocks of its own.

    Why: the arrays have max_num_seqs rows and live as long as the server. A row that is never given back ends it after a
    while, and one that keeps old blocks lets the newcomer read a stranger's context.
    """
    builder = ContinuousBatch(2, 16, 4)
    for i in range(5):
        pair = [computed(j, [10 * j + k for k in range(6)], 0) for j in (i, i + 1)]
        tables = {j: [2 * j, 2 * j + 1] for j in (i, i + 1)}
        batch = builder.build(decide(dict.fromkeys(pair, 6), removed=(i - 1,) if i else ()), tables)
        check_tables(batch, [tables[i], tables[i + 1]])
        check_equal(batch.slot_mapping, [*range(8 * i, 8 * i + 6), *range(8 * i + 8, 8 * i + 14)], f"slots of {i} and {i + 1}")


def test_preempted_sequence_comes_back_with_other_blocks() -> None:
    """A sequence is removed and scheduled again with a new table in the same decision: its rows hold the new blocks.

    Why: between two steps a sequence may lose its blocks and get others. Both notes come with one decision.
    """
    builder, seq = ContinuousBatch(1, 16, 4), computed(0, list(range(6)), 0)
    builder.build(decide({seq: 6}), {0: [1, 2]})
    batch = builder.build(decide({seq: 6}, removed=(0,)), {0: [3, 0]})
    check_tables(batch, [[3, 0]])
    check_equal(batch.slot_mapping, [12, 13, 14, 15, 0, 1], "slot_mapping")


def test_rows_follow_the_order_of_the_decision() -> None:
    """The same two sequences in the other order give arrays in the other order.

    Why: under "priority" the order changes from step to step. Rows that keep yesterday's order swap two people's contexts.
    """
    builder = ContinuousBatch(2, 16, 4)
    first, second = computed(0, [10, 11, 12], 2), computed(1, [20, 21, 22, 23, 24], 4)
    tables = {0: [5], 1: [7, 3]}
    builder.build(decide({first: 1, second: 1}), tables)
    batch = builder.build(decide({second: 1, first: 1}), tables)
    check_equal(batch.input_ids, [24, 12], "input_ids")
    check_equal(batch.slot_mapping, [12, 22], "slot_mapping")
    check_equal(batch.context_lens, [5, 3], "context_lens")
    check_tables(batch, [[7, 3], [5]])


@pytest.mark.parametrize("length", [7, 8, 9, 16])
def test_tables_are_as_wide_as_the_longest_context(length: int) -> None:
    """With room for 1,000 blocks, a step whose longest context is at or beside a multiple of the block size has tables with a
    column for each block of that context, also where a sequence holds more blocks.

    Why: the tables go to the device at each step. Whole rows of a model with a long context are megabytes of leftovers.
    """
    short, long = computed(0, [1, 2, 3], 2), computed(1, list(range(40)), length - 1)
    batch = ContinuousBatch(4, 4000, 4).build(decide({short: 1, long: 1}), {0: [30], 1: list(range(10))})
    check_tables(batch, [[30], list(range(-(-length // 4)))])


def test_who_leaves_gives_back_the_row_in_any_step() -> None:
    """A sequence leaves in a step in which no table changed: in the next one a newcomer finds its row free.

    Why: most steps change no table. Whoever looks at those who left only when somebody's table changed runs out of rows.
    """
    builder = ContinuousBatch(2, 16, 4)
    first, second = computed(0, [1, 2, 3], 2), computed(1, [4, 5], 1)
    builder.build(decide({first: 1, second: 1}), {0: [6], 1: [3]})
    second.tokens.append(6)
    second.num_computed_tokens = 2
    calm = builder.build(SchedulerOutput(scheduled={second: 1}, sampled=[second], removed=[0]), {1: [3]})
    check_tables(calm, [[3]])
    newcomer = computed(2, [7, 8, 9], 0)
    second.num_computed_tokens = 2
    decision = SchedulerOutput(scheduled={second: 1, newcomer: 3}, sampled=[second, newcomer], changed_tables={2})
    check_tables(builder.build(decision, {1: [3], 2: [5]}), [[3], [5]])


def test_no_loop_over_tokens() -> None:
    """A step of two prompts with 1,500 tokens each runs as many lines of Python as one with 10 each.

    Why: a loop over tokens is right, and in large steps it takes longer than the model. Loops over sequences are allowed.
    """
    lines = []
    for length in (10, 1500):
        builder = ContinuousBatch(2, 2000, 16)
        prompts = [computed(i, list(range(length)), 0) for i in range(2)]
        tables = {i: list(range(100 * i, 100 * i + 100)) for i in range(2)}
        decision = decide(dict.fromkeys(prompts, length))
        lines.append(lines_run(lambda builder=builder, decision=decision, tables=tables: builder.build(decision, tables)))
    assert lines[1] <= lines[0] + 100, f"{lines[0]} lines of Python for 20 tokens, {lines[1]} for 3,000"


def test_building_leaves_its_arguments_alone() -> None:
    """build changes neither the decision, nor the tables, nor what its sequences know and have computed.

    Why: nothing is computed before the step has run. Whoever moves num_computed_tokens here moves it twice.
    """
    seq, decode = computed(0, [1, 2, 3, 4, 5], 1), computed(1, [6, 7, 8], 2)
    decision, tables, progress = decide({seq: 3, decode: 1}), {0: [4, 6], 1: [2]}, {0: 1, 1: 2}
    ContinuousBatch(2, 16, 4).build(decision, tables, progress)
    check_equal((tables, progress), ({0: [4, 6], 1: [2]}, {0: 1, 1: 2}), "tables and progress")
    check_equal((list(decision.scheduled.values()), decision.removed), ([3, 1], []), "tokens of the decision, removed")
    check_equal([each.seq_id for each in decision.sampled], [1], "sampled sequences of the decision")
    check_equal((seq.tokens, seq.num_computed_tokens), ([1, 2, 3, 4, 5], 1), "tokens and computed tokens of a sequence")


def test_earlier_batch_stays_as_it_was() -> None:
    """Building the next step changes nothing in the arrays of the one before.

    Why: a device may still be reading them. Whoever hands out the buffer itself changes the past.
    """
    builder, seq = ContinuousBatch(1, 16, 4), computed(0, [1, 2, 3, 4, 5], 0)
    first = builder.build(decide({seq: 5}), {0: [4, 6]})
    builder.build(decide({seq: 5}), {0: [5, 7]})
    check_tables(first, [[4, 6]])
    check_equal(first.slot_mapping, [16, 17, 18, 19, 24], "slot_mapping of the earlier batch")


def expected_arrays(scheduled: dict[Sequence, int], tables: dict[int, list[int]], size: int) -> dict[str, list[int]]:
    """The arrays of a step by plain loops."""
    arrays: dict[str, list[int]] = {
        "input_ids": [],
        "positions": [],
        "slot_mapping": [],
        "context_lens": [],
        "logits_indices": [],
    }
    arrays["query_start_loc"] = [0]
    for seq, count in scheduled.items():
        for position in range(seq.num_computed_tokens, seq.num_computed_tokens + count):
            arrays["input_ids"].append(seq.tokens[position])
            arrays["positions"].append(position)
            arrays["slot_mapping"].append(tables[seq.seq_id][position // size] * size + position % size)
        arrays["query_start_loc"].append(len(arrays["input_ids"]))
        arrays["context_lens"].append(seq.num_computed_tokens + count)
        if seq.num_computed_tokens + count == len(seq.tokens):
            arrays["logits_indices"].append(len(arrays["input_ids"]) - 1)
    return arrays


@settings(
    max_examples=60, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
@given(data=st.data(), size=st.sampled_from([1, 3, 4]), num_seqs=st.integers(1, 5))
def compare_a_step(data: st.DataObject, size: int, num_seqs: int) -> None:
    blocks = data.draw(st.permutations(range(num_seqs * 12)), label="blocks")
    scheduled, tables = {}, {}
    for i in range(num_seqs):
        length = data.draw(st.integers(1, 12), label="length")
        done = data.draw(st.integers(0, length - 1), label="computed")
        seq = computed(i, [100 * i + k for k in range(length)], done)
        scheduled[seq] = data.draw(st.integers(1, length - done), label="count")
        tables[i] = list(blocks[12 * i : 12 * i + -(-length // size)])
    batch = ContinuousBatch(num_seqs, 12, size).build(decide(scheduled), tables)
    for name, expected in expected_arrays(scheduled, tables, size).items():
        check_equal(getattr(batch, name), expected, name)
    check_tables(batch, [tables[seq.seq_id][: -(-(seq.num_computed_tokens + n) // size)] for seq, n in scheduled.items()])


def test_any_step_is_what_plain_loops_give() -> None:
    """Random sequences, progress, chunks and tables: every array equals the one that a few lines of loops make.

    Why: the loops say what the arrays mean; the array operations only say it faster.
    """
    # First one by hand, so that an empty function says so at once, before a search for the shortest case.
    ContinuousBatch(1, 4, 4).build(decide({computed(0, [1], 0): 1}), {0: [0]})
    compare_a_step()
