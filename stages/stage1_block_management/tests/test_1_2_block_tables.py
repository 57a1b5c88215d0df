"""Task 1.2: BlockManager gives sequences block tables, and lets them grow."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from stages.attention.block_manager import BlockManager
from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.slots import slots
from stages.memory.block_allocator import OutOfBlocksError

SEARCH = settings(
    max_examples=30, stateful_step_count=20, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
"""How the random test searches: always in the same way, and it reports the shortest failing order of calls."""

LENGTHS = {1: [1, 2, 3], 4: [1, 3, 4, 5, 7, 8, 9], 16: [1, 15, 16, 17, 31, 32, 33]}
"""Block size → prompt lengths at and beside its multiples."""
CASES = [(size, length) for size, lengths in LENGTHS.items() for length in lengths]


def sequence(seq_id: int, length: int, computed: int = 0, first: int = 0, **params: int) -> Sequence:
    """A sequence of `length` tokens counting up from `first`, of which `computed` are in the KV cache."""
    seq = Sequence(seq_id, list(range(first, first + length)), SamplingParams(**params))
    seq.num_computed_tokens = computed
    return seq


def plain_manager(num_blocks: int, block_size: int) -> BlockManager:
    return BlockManager(num_blocks, block_size, enable_prefix_caching=False)


def state(manager: BlockManager) -> tuple:
    """All that a call which refuses must leave as it was."""
    tables = {seq_id: list(table) for seq_id, table in manager.tables.items()}
    return tables, list(manager.allocator.ref_counts), manager.allocator.free_blocks()


@pytest.mark.parametrize(
    ("block_size", "num_tokens", "blocks"),
    [(1, 0, 0), (1, 1, 1), (1, 7, 7), (4, 0, 0), (4, 1, 1), (4, 3, 1), (4, 4, 1), (4, 5, 2), (4, 8, 2), (4, 9, 3),
     (16, 15, 1), (16, 16, 1), (16, 17, 2), (16, 4095, 256), (16, 4096, 256), (16, 4097, 257), (256, 1, 1), (256, 255, 1),
     (256, 257, 2), (256, 513, 3)],
)  # fmt: skip
def test_number_of_blocks_rounds_up(block_size: int, num_tokens: int, blocks: int) -> None:
    """num_blocks_for gives the fewest blocks that hold the tokens: a started block counts, a full one needs no further one.

    Why: one block too few and the last token has no place; one too many, for every sequence, is memory that no other request
    can use.
    """
    check_equal(plain_manager(4, block_size).num_blocks_for(num_tokens), blocks, f"blocks for {num_tokens} tokens")


@pytest.mark.parametrize(("block_size", "length"), CASES)
def test_a_prompt_gets_just_enough_blocks(block_size: int, length: int) -> None:
    """allocate gives ceil(length / block_size) different blocks, each with one reference, and says that nothing is cached.

    Why: before paging, each request reserved its longest possible context at once and wasted most of it. Here the waste
    is less than one block a sequence.
    """
    manager = plain_manager(6, block_size)
    seq = sequence(0, length)
    check_equal(manager.allocate(seq), 0, "cached tokens")
    needed = len(range(0, length, block_size))
    table = manager.tables[0]
    check_equal(len(table), needed, f"blocks in the table of {length} tokens")
    check_equal(len(set(table)), needed, "different blocks in the table")
    check_equal([manager.allocator.ref_counts[block] for block in table], [1] * needed, "references to its blocks")
    check_equal(manager.allocator.num_used, needed, "used blocks")
    check_equal(manager.take_changed(), {0}, "sequences with a changed table")
    manager.check_invariants()


def test_tokens_beyond_the_prompt_need_slots_too() -> None:
    """allocate counts all tokens of a sequence, those it has generated as well.

    Why: a preempted sequence comes back with its answer so far, and computes prompt and answer again.
    """
    manager = plain_manager(4, 4)
    seq = sequence(0, 4)
    seq.tokens.append(99)
    manager.allocate(seq)
    check_equal(len(manager.tables[0]), 2, "blocks for a prompt of 4 and 1 generated token")


def test_tables_do_not_overlap() -> None:
    """Sequences that are there at the same time have no block in common.

    Why: this is what keeps one user's conversation out of another's.
    """
    manager = plain_manager(9, 4)
    for seq_id, length in enumerate((1, 4, 5, 12)):
        manager.allocate(sequence(seq_id, length))
        manager.check_invariants()
    blocks = [block for table in manager.tables.values() for block in table]
    check_equal(sorted(blocks), list(range(7)), "all blocks in the tables, sorted")
    check_equal(manager.allocator.num_free, 2, "free blocks")


def test_who_does_not_ask_is_told() -> None:
    """allocate for more tokens than are free raises OutOfBlocksError, which comes from the allocator.

    Why: a sequence that is admitted with half a table computes into memory of somebody else. The scheduler asks
    `can_allocate` first; when it forgets to, the engine must hear of it.
    """
    manager = plain_manager(3, 4)
    manager.allocate(sequence(0, 5))
    with pytest.raises(OutOfBlocksError):
        manager.allocate(sequence(1, 5))


@pytest.mark.parametrize(("block_size", "computed"), CASES)
def test_decoding_takes_a_block_exactly_at_the_boundary(block_size: int, computed: int) -> None:
    """One more token gets a new block when the computed ones fill their blocks to the brim, and none otherwise.

    Why: this runs for every sequence at every step. A block too early is waste; a block too late is a write beyond the end of
    the table, into memory of somebody else.
    """
    manager = plain_manager(8, block_size)
    seq = sequence(0, computed)
    manager.allocate(seq)
    before = list(manager.tables[0])
    manager.take_changed()
    seq.num_computed_tokens = computed
    seq.tokens.append(99)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, 1, copies), True, "append_slots, with blocks free")
    new = int(computed % block_size == 0)
    check_equal(manager.tables[0][: len(before)], before, "the blocks that it had")
    check_equal(len(manager.tables[0]), len(before) + new, f"blocks after {computed} + 1 tokens")
    check_equal(manager.take_changed(), {0} if new else set(), "sequences with a changed table")
    check_equal(copies, [], "blocks to copy")
    (slot,) = slots(manager, seq, computed, computed + 1)
    check_equal(slot % block_size, computed % block_size, "offset of the new token in its block")
    manager.check_invariants()


@pytest.mark.parametrize(("num_tokens", "blocks"), [(1, 1), (2, 2), (5, 2), (6, 3), (9, 3), (10, 4)])
def test_several_tokens_at_once(num_tokens: int, blocks: int) -> None:
    """With 3 computed tokens in blocks of 4, appending n tokens leaves a table of ceil((3 + n) / 4) blocks.

    Why: speculative decoding writes several tokens in one step, so growing by more than one block must work.
    """
    manager = plain_manager(8, 4)
    seq = sequence(0, 3)
    manager.allocate(seq)
    seq.num_computed_tokens = 3
    check_equal(manager.append_slots(seq, num_tokens, []), True, "append_slots, with blocks free")
    check_equal(len(manager.tables[0]), blocks, f"blocks for 3 + {num_tokens} tokens")
    check_equal(len(set(slots(manager, seq, 0, 3 + num_tokens))), 3 + num_tokens, "different slots")
    manager.check_invariants()


def test_a_chunk_of_a_prompt_finds_its_slots_there() -> None:
    """Tokens for which allocate has already made room need no further block, even when no block is free.

    Why: a long prompt is computed in chunks, and all its blocks are taken at admission. Counting from the chunk and not from
    the table would take them twice.
    """
    manager = plain_manager(3, 4)
    seq = sequence(0, 12)
    manager.allocate(seq)
    manager.take_changed()
    before = state(manager)
    for computed in (0, 4, 7):
        seq.num_computed_tokens = computed
        check_equal(manager.append_slots(seq, 4, []), True, f"append_slots for 4 of 12 tokens after {computed}")
        check_equal(state(manager), before, "tables, counts and free queue")
    check_equal(manager.take_changed(), set(), "sequences with a changed table")


@pytest.mark.parametrize(("num_tokens", "fits"), [(4, True), (5, False), (8, False), (9, False)])
def test_append_without_room_changes_nothing(num_tokens: int, fits: bool) -> None:
    """When fewer blocks are free than needed, append_slots returns False and takes none; when they just suffice it works.

    Why: the scheduler then preempts somebody and asks again. Blocks taken halfway would be lost or counted twice.
    """
    manager = plain_manager(3, 4)
    seq, other = sequence(0, 4), sequence(1, 2)
    manager.allocate(seq)
    manager.allocate(other)
    seq.num_computed_tokens = 4
    manager.take_changed()
    before = state(manager)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, num_tokens, copies), fits, f"append_slots({num_tokens}) with 1 block of 4 free")
    if not fits:
        check_equal(state(manager), before, "tables, counts and free queue")
        check_equal(copies, [], "blocks to copy")
        check_equal(manager.take_changed(), set(), "sequences with a changed table")
    manager.check_invariants()


@pytest.mark.parametrize(
    ("length", "computed", "index", "num_tokens", "free"),
    [(3, 3, 0, 1, 0), (6, 6, 1, 1, 0), (12, 3, 0, 1, 0), (12, 9, 2, 1, 0), (6, 6, 1, 3, 1), (6, 6, 1, 7, 2)],
)
def test_a_block_is_needed_for_a_copy_before_it_is_made(
    length: int, computed: int, index: int, num_tokens: int, free: int
) -> None:
    """A token that would go into a shared block needs a free block, for a copy, beside those for further tokens. With too few
    free ones: False, and nothing changed.

    Why: sequences that share a prompt may not write into each other's block (the copy itself is task 1.3), and running out
    of memory in the middle of it must not leave a table half changed. That holds for a chunk in the middle of a prompt too.
    """
    manager = plain_manager(len(range(0, length, 4)) + free, 4)
    seq = sequence(0, length)
    manager.allocate(seq)
    seq.num_computed_tokens = computed
    block = manager.tables[0][index]
    manager.allocator.share(block)
    manager.tables[1] = [block]
    before = state(manager)
    check_equal(manager.append_slots(seq, num_tokens, []), False, f"append_slots into a shared block with {free} free")
    check_equal(state(manager), before, "tables, counts and free queue")


def test_who_runs_may_have_the_last_block() -> None:
    """A running sequence gets the one block that is free, although the watermark is two.

    Why: the watermark is kept from newcomers so that those who run can grow. Who keeps it from them preempts somebody while
    blocks are free.
    """
    manager = BlockManager(4, 4, watermark=0.5, enable_prefix_caching=False)
    seq = sequence(0, 12, computed=12)
    manager.allocate(seq)
    check_equal((manager.allocator.num_free, manager.watermark_blocks), (1, 2), "free blocks, and the watermark")
    check_equal(manager.append_slots(seq, 1, []), True, "append_slots with one block free")
    check_equal(len(manager.tables[0]), 4, "blocks of the table")


def test_one_free_block_is_enough_for_a_copy() -> None:
    """A token that goes into a shared block, with one free block: it takes the copy, and the table is no longer.

    Why: who counts a block for the token beside the one for its copy preempts a sequence that had room. (A stand-in that
    gives the pair (70, 71) takes the place of task 1.3.)
    """
    manager = plain_manager(2, 4)
    seq = sequence(0, 3, computed=3)
    manager.allocate(seq)
    manager.allocator.share(manager.tables[0][0])
    manager.tables[1] = list(manager.tables[0])
    manager._copy_on_write = lambda table, index: (70, 71)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, 1, copies), True, "append_slots into a shared block with 1 free")
    check_equal(len(manager.tables[0]), 1, "blocks of the table")
    check_equal(copies, [(70, 71)], "blocks to copy")


@pytest.mark.parametrize(("num_tokens", "new"), [(1, 0), (2, 0), (3, 1)])
def test_a_table_with_a_copy_in_it_has_changed(num_tokens: int, new: int) -> None:
    """append_slots asks `_copy_on_write(table, index)` for a copy of the shared block that it writes first, puts the pair
    behind those in `copies`, and notes the sequence in `_changed`, whether or not new blocks come as well.

    Why: the arrays that attention reads mirror only tables that are noted. With the old one, two sequences write into one
    block. (A stand-in that gives the pair (70, 71) takes the place of task 1.3.)
    """
    manager = plain_manager(6, 4)
    seq = sequence(0, 6, computed=6)
    manager.allocate(seq)
    table = list(manager.tables[0])
    manager.allocator.share(table[1])
    manager.tables[1] = [table[1]]
    manager.take_changed()
    asked: list[tuple[list[int], int]] = []

    def copy(table: list[int], index: int) -> tuple[int, int]:
        asked.append((list(table), index))
        return 70, 71

    manager._copy_on_write = copy
    copies = [(8, 9)]
    check_equal(manager.append_slots(seq, num_tokens, copies), True, "append_slots, with blocks free")
    check_equal(asked, [(table, 1)], "tables and places that were asked to be copied")
    check_equal(copies, [(8, 9), (70, 71)], "blocks to copy, after one that was in the list before")
    check_equal(len(manager.tables[0]), 2 + new, f"blocks for 6 + {num_tokens} tokens")
    check_equal(manager.take_changed(), {0}, "sequences with a changed table")


def test_a_shared_block_that_is_full_is_left_alone() -> None:
    """A sequence whose next token begins a new block takes one, and its shared full block stays shared.

    Why: full blocks of a common prompt are only read. Copying them would give away what sharing saved.
    """
    manager = plain_manager(3, 4)
    seq = sequence(0, 4)
    manager.allocate(seq)
    seq.num_computed_tokens = 4
    (block,) = manager.tables[0]
    manager.allocator.share(block)
    manager.tables[1] = [block]
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, 1, copies), True, "append_slots, with two blocks free")
    check_equal(manager.tables[0][0], block, "first block of the table")
    check_equal((len(manager.tables[0]), copies), (2, []), "blocks in the table, and blocks to copy")
    manager.check_invariants()


def test_a_long_table_grows_like_a_short_one() -> None:
    """A sequence whose 300 blocks are full gets block 301 for its next token, and nothing is copied.

    Why: the table's end is where most appends happen; 300 blocks are a context of 4,800 tokens, which is nothing unusual.
    """
    manager = plain_manager(400, 1)
    seq = sequence(0, 300, computed=300)
    check_equal(manager.num_blocks_for(300), 300, "blocks for 300 tokens")
    manager.allocate(seq)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, 1, copies), True, "append_slots, with blocks free")
    check_equal(len(manager.tables[0]), 301, "blocks in the table")
    check_equal(copies, [], "copies")


def test_a_known_beginning_is_shared_and_counted() -> None:
    """A prompt whose first 8 tokens are cached shares their two blocks, gets new ones for the rest, and returns 8.

    Why: a chat sends its whole history with every message. Sharing the blocks saves both their memory and their computation.
    The counters become the hit rate on the server's dashboard.
    """
    manager = BlockManager(8, 4)
    first = sequence(0, 10)
    check_equal(manager.allocate(first), 0, "cached tokens of the first prompt")
    manager.cache_full_blocks(first, 10)
    second = sequence(1, 8)
    second.tokens += [50, 51, 52, 53, 54]
    check_equal(manager.allocate(second), 8, "cached tokens of a prompt with the same beginning")
    check_equal(manager.tables[1][:2], manager.tables[0][:2], "the shared blocks")
    check_equal(len(manager.tables[1]), 4, "blocks for 13 tokens")
    check_equal([manager.allocator.ref_counts[block] for block in manager.tables[1]], [2, 2, 1, 1], "references")
    check_equal(manager.allocator.num_used, 5, "used blocks: 3 of the first, 2 more")
    hits = (manager.prefix_cache.num_queries, manager.prefix_cache.num_hits)
    check_equal(hits, (23, 8), "tokens looked up (10 + 13) and found")
    manager.check_invariants()


@pytest.mark.parametrize(("length", "cached"), [(4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_fully_cached_prompt_leaves_a_token_to_compute(length: int, cached: int) -> None:
    """When all of a prompt is in the cache, at least its last token is left out of what allocate reports as cached.

    Why: the next token comes from the logits of the last one, so a step must compute it. nano-vllm once sent such a prompt
    through the model with zero tokens, and crashed.
    """
    manager = BlockManager(12, 4)
    first = sequence(0, 16)
    manager.allocate(first)
    manager.cache_full_blocks(first, 16)
    again = sequence(1, length)
    check_equal(manager.allocate(again), cached, f"cached tokens of a prompt of {length}")
    check_equal(len(manager.tables[1]), len(range(0, length, 4)), "blocks in the table")
    manager.check_invariants()


def test_cached_blocks_are_secured_before_new_ones_are_taken() -> None:
    """Cached blocks that wait in the free queue are shared first; only then new blocks come from the queue.

    Why: the other way round the queue may hand out the very block that was about to be shared, and the prompt would read
    what it is overwriting.
    """
    manager = BlockManager(3, 4)
    first, other = sequence(0, 8), sequence(1, 4, first=100)
    for seq in (first, other):
        manager.allocate(seq)
        manager.cache_full_blocks(seq, len(seq.tokens))
    blocks, (last,) = list(manager.tables[0]), manager.tables[1]
    manager.free(first)
    manager.free(other)
    check_equal(manager.allocator.free_blocks(), [blocks[1], blocks[0], last], "free queue: a cached block is at its front")
    again = sequence(2, 9)
    check_equal(manager.allocate(again), 8, "cached tokens")
    check_equal(manager.tables[2], [*blocks, last], "table: the two cached blocks, then the one that is left")
    manager.check_invariants()


def test_a_reused_block_loses_its_old_content() -> None:
    """A block that is handed out again, by allocate or by append_slots, is no longer found by what it held before.

    Why: with a stale entry a prompt is answered from another prompt's keys and values. nano-vllm had this bug.
    """
    manager = BlockManager(2, 4)
    first = sequence(0, 8)
    manager.allocate(first)
    manager.cache_full_blocks(first, 8)
    manager.free(first)
    other = sequence(1, 4, first=100)
    manager.allocate(other)  # the block that held positions 4 to 7
    check_equal(len(manager.prefix_cache), 1, "blocks in the prefix cache after allocate took one of two")
    other.num_computed_tokens = 4
    check_equal(manager.append_slots(other, 1, []), True, "append_slots with one block free")
    check_equal(len(manager.prefix_cache), 0, "blocks in the prefix cache after append_slots took the other")
    check_equal(manager.prefix_cache.match(sequence(2, 8)), [], "cached blocks of the first prompt")
    manager.check_invariants()


def test_who_comes_back_is_not_counted_again() -> None:
    """A preempted sequence uses the cache as any other does, but the counters leave it out.

    Why: it would find its own tokens, and the more the server thrashes the better its hit rate would look.
    """
    manager = BlockManager(8, 4)
    seq = sequence(0, 9)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 9)
    manager.free(seq)
    seq.num_preemptions = 1
    check_equal(manager.allocate(seq), 8, "cached tokens of the preempted sequence")
    check_equal((manager.prefix_cache.num_queries, manager.prefix_cache.num_hits), (9, 0), "tokens looked up and found")


def test_prompt_logprobs_need_the_whole_prompt() -> None:
    """A request that asks for the prompt's log-probabilities shares nothing; `_match` takes care of it.

    Why: those come from the logits of every prompt token, and a cached block would skip their computation.
    """
    manager = BlockManager(8, 4)
    first = sequence(0, 9)
    manager.allocate(first)
    manager.cache_full_blocks(first, 9)
    check_equal(manager.allocate(sequence(1, 9, prompt_logprobs=1)), 0, "cached tokens")
    check_equal(set(manager.tables[0]) & set(manager.tables[1]), set(), "common blocks")


def test_who_looks_nothing_up_is_not_counted() -> None:
    """Of two prompts, 9 tokens each, the second wants its log-probabilities: 9 tokens were looked up, not 18.

    Why: the hit rate is what was found of what was asked for. Who does not ask is no miss.
    """
    manager = BlockManager(8, 4)
    manager.allocate(sequence(0, 9))
    manager.allocate(sequence(1, 9, prompt_logprobs=0))
    check_equal((manager.prefix_cache.num_queries, manager.prefix_cache.num_hits), (9, 0), "tokens looked up and found")


class GrowingSequences(RuleBasedStateMachine):
    """Sequences come, grow and go; the model knows only how many tokens each of them has room for."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = plain_manager(6, 3)
        self.sequences: dict[int, Sequence] = {}
        self.room: dict[int, int] = {}
        self.next_id = 0

    def blocks(self) -> int:
        return sum(len(range(0, tokens, 3)) for tokens in self.room.values())

    @rule(length=st.integers(1, 8))
    def come(self, length: int) -> None:
        if self.blocks() + len(range(0, length, 3)) > 6:
            return
        seq = sequence(self.next_id, length)
        self.next_id += 1
        self.manager.allocate(seq)
        seq.num_computed_tokens = length
        self.sequences[seq.seq_id], self.room[seq.seq_id] = seq, length

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 9), count=st.integers(1, 5))
    def grow(self, choice: int, count: int) -> None:
        seq_id = sorted(self.sequences)[choice % len(self.sequences)]
        seq, before = self.sequences[seq_id], list(self.manager.tables[seq_id])
        length = seq.num_computed_tokens + count
        fits = self.blocks() - len(before) + len(range(0, length, 3)) <= 6
        check_equal(self.manager.append_slots(seq, count, []), fits, "append_slots")
        check_equal(self.manager.tables[seq_id][: len(before)], before, "the blocks that it had")
        if fits:
            self.room[seq_id] = length
            seq.tokens += [0] * count
            seq.num_computed_tokens = length

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 9))
    def go(self, choice: int) -> None:
        seq_id = sorted(self.sequences)[choice % len(self.sequences)]
        self.manager.free(self.sequences.pop(seq_id))
        del self.room[seq_id]

    @invariant()
    def every_token_has_a_slot_of_its_own(self) -> None:
        check_equal(self.manager.allocator.num_used, self.blocks(), "used blocks")
        taken = [slot for seq_id, seq in self.sequences.items() for slot in slots(self.manager, seq, 0, self.room[seq_id])]
        check_equal(len(set(taken)), len(taken), "different slots")
        self.manager.check_invariants()


def test_coming_growing_and_going_in_any_order() -> None:
    """Whatever order sequences come, grow and leave in, each token has its own slot and no block is lost.

    Why: a server runs for weeks. A leak of one block an hour ends it, and one block in two tables corrupts answers.
    """
    run_state_machine_as_test(GrowingSequences, settings=SEARCH)
