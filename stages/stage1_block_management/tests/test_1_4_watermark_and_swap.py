"""Task 1.4: what fits, what stays free for those who run, and moving sequences to host memory and back."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from stages.attention.block_manager import NULL_BLOCK, BlockManager
from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.slots import slots

SEARCH = settings(
    max_examples=40, stateful_step_count=25, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
"""How the random test searches: always in the same way, and it reports the shortest failing order of calls."""


def sequence(seq_id: int, length: int, computed: int = 0, first: int = 0, **params: int) -> Sequence:
    """A sequence of `length` tokens counting up from `first`, of which `computed` are in the KV cache."""
    seq = Sequence(seq_id, list(range(first, first + length)), SamplingParams(**params))
    seq.num_computed_tokens = computed
    return seq


def state(manager: BlockManager) -> tuple:
    """All that a question must leave as it was."""
    counters = (manager.prefix_cache.num_queries, manager.prefix_cache.num_hits) if manager.prefix_cache else None
    tables = {seq_id: list(table) for seq_id, table in manager.tables.items()}
    return tables, list(manager.allocator.ref_counts), manager.allocator.free_blocks(), counters


def admitted(num_blocks: int, block_size: int, length: int, computed: int, **settings: int) -> tuple[BlockManager, Sequence]:
    """A manager and one running sequence, id 0."""
    manager = BlockManager(num_blocks, block_size, **{"enable_prefix_caching": False, **settings})
    seq = sequence(0, length)
    manager.allocate(seq)
    seq.num_computed_tokens = computed
    return manager, seq


@pytest.mark.parametrize(
    ("length", "with_watermark", "without"),
    [(1, True, True), (31, True, True), (32, True, True), (33, False, True), (39, False, True), (40, False, True),
     (41, False, False)],
)  # fmt: skip
def test_the_watermark_stays_free(length: int, with_watermark: bool, without: bool) -> None:
    """Of 10 blocks of 4 tokens with a watermark of 2 blocks, a prompt may take 8 (32 tokens); without the watermark all 10.

    Why: every running sequence will want another block soon. If admission takes the last one, somebody who is nearly done is
    thrown out at the next step and computed again from the start.
    """
    manager = BlockManager(10, 4, watermark=0.2)
    seq = sequence(0, length)
    check_equal(manager.can_allocate(seq), with_watermark, f"can_allocate for {length} tokens")
    check_equal(manager.can_allocate(seq, keep_watermark=False), without, f"can_allocate for {length} tokens, no watermark")


def test_what_others_hold_is_not_there() -> None:
    """With 3 of 10 blocks in use and a watermark of 2, five more blocks may be taken; without the watermark seven.

    Why: room is what is free now, not what the machine has.
    """
    manager, _ = admitted(10, 1, 3, 3, watermark=0.2)
    check_equal(manager.can_allocate(sequence(1, 5)), True, "can_allocate for 5 tokens")
    check_equal(manager.can_allocate(sequence(1, 6)), False, "can_allocate for 6 tokens")
    check_equal(manager.can_allocate(sequence(1, 7), keep_watermark=False), True, "for 7 tokens, no watermark")
    check_equal(manager.can_allocate(sequence(1, 8), keep_watermark=False), False, "for 8 tokens, no watermark")


def test_generated_tokens_need_room_too() -> None:
    """can_allocate counts all tokens of a sequence, not only its prompt.

    Why: a preempted sequence waits with its answer so far. Admitting it for its prompt alone ends in OutOfBlocksError.
    """
    manager = BlockManager(2, 4, watermark=0)
    seq = sequence(0, 8)
    check_equal(manager.can_allocate(seq), True, "can_allocate for a prompt of 8 tokens in 2 blocks")
    seq.tokens.append(99)
    check_equal(manager.can_allocate(seq), False, "can_allocate with one generated token more")


def test_cached_blocks_in_use_need_no_room() -> None:
    """A prompt whose beginning a running sequence holds needs free blocks only for the rest.

    Why: ten users of one long system prompt fit where otherwise two would.
    """
    manager = BlockManager(4, 4, watermark=0)
    first = sequence(0, 9)
    manager.allocate(first)
    manager.cache_full_blocks(first, 9)
    check_equal(manager.allocator.num_free, 1, "free blocks")
    check_equal(manager.can_allocate(sequence(1, 12)), True, "12 tokens: 2 blocks shared, 1 new")
    check_equal(manager.can_allocate(sequence(1, 13)), False, "13 tokens: 2 blocks shared, 2 new")
    check_equal(manager.can_allocate(sequence(1, 12, first=50)), False, "12 other tokens: 3 new blocks")


def test_cached_blocks_that_are_free_do_need_room() -> None:
    """A cached block that waits in the free queue counts as one to be taken.

    Why: sharing it takes it out of the queue, so it is not there for anything else. Counted as a gift, the same block would
    be promised twice.
    """
    manager = BlockManager(4, 4, watermark=0)
    first = sequence(0, 16)
    manager.allocate(first)
    manager.cache_full_blocks(first, 16)
    manager.free(first)
    check_equal(manager.can_allocate(sequence(1, 16)), True, "16 tokens: all 4 blocks, cached or not")
    check_equal(manager.can_allocate(sequence(1, 17)), False, "17 tokens: 4 cached free blocks, and no fifth")
    manager.allocate(sequence(2, 5))  # holds the first cached block again, and one more
    check_equal(manager.allocator.num_free, 2, "free blocks")
    check_equal(manager.can_allocate(sequence(1, 12)), True, "12 tokens: 1 held by another, 2 of the free ones")
    check_equal(manager.can_allocate(sequence(1, 16)), False, "16 tokens: 1 held by another, 3 free ones needed")


def test_the_last_free_block_is_not_counted_twice() -> None:
    """When the only free block is the one that holds a prompt's beginning, a prompt that needs one more does not fit.

    Why: it looks like one block found and one block free. But they are the same, and only one of them can be had.
    """
    manager = BlockManager(4, 4, watermark=0)
    first = sequence(0, 16)
    manager.allocate(first)
    manager.cache_full_blocks(first, 16)
    manager.free(first)
    manager.allocate(sequence(2, 12, first=100))  # leaves the first block, which went to the back of the queue
    check_equal(manager.allocator.num_free, 1, "free blocks")
    check_equal(manager.can_allocate(sequence(1, 5)), False, "5 tokens: the cached block and a new one")
    check_equal(manager.can_allocate(sequence(1, 4)), True, "4 tokens: one new block")


def test_cached_blocks_that_are_free_count_against_the_watermark() -> None:
    """Of 6 blocks with a watermark of 2, a prompt whose 3 blocks are cached and free may come when 5 are free, not when 4 are.

    Why: taken out of the queue they are no more there for those who run than new ones would be.
    """
    manager = BlockManager(6, 4, watermark=0.34)
    first = sequence(0, 13)
    manager.allocate(first)
    manager.cache_full_blocks(first, 13)
    manager.free(first)
    manager.allocate(sequence(2, 4, first=100))
    check_equal(manager.can_allocate(sequence(1, 12)), True, "12 tokens: 2 cached blocks that are free, 1 new; 5 free")
    check_equal(manager.can_allocate(sequence(1, 13)), False, "13 tokens: 3 cached blocks that are free, 1 new; 5 free")
    check_equal(manager.can_allocate(sequence(1, 13), keep_watermark=False), True, "13 tokens, no watermark")


def test_who_looks_nothing_up_needs_room_for_all() -> None:
    """A prompt that wants its log-probabilities shares nothing, so all of its blocks must fit, cached or not; `_match` knows.

    Why: `allocate` will give it new blocks. A yes that counts on shared ones ends in OutOfBlocksError.
    """
    manager = BlockManager(4, 4, watermark=0)
    first = sequence(0, 9)
    manager.allocate(first)
    manager.cache_full_blocks(first, 9)
    check_equal(manager.can_allocate(sequence(1, 12)), True, "12 tokens, 8 of them cached; 1 block free")
    check_equal(manager.can_allocate(sequence(1, 12, prompt_logprobs=1)), False, "the same with prompt_logprobs")


@pytest.mark.parametrize(
    ("num_blocks", "with_watermark", "without"), [(0, True, True), (1, True, True), (2, False, True), (3, False, True),
                                                  (4, False, False)],
)  # fmt: skip
def test_one_comparison_for_all(num_blocks: int, with_watermark: bool, without: bool) -> None:
    """_fits with 3 of 10 blocks free and a watermark of 2: one block can be taken, or three when it is not kept.

    Why: every question is this comparison. One that is off by one here is off by one everywhere.
    """
    manager, _ = admitted(10, 1, 7, 7, watermark=0.2)
    check_equal(manager._fits(num_blocks, True), with_watermark, f"_fits({num_blocks}) with 3 free, watermark 2")
    check_equal(manager._fits(num_blocks, False), without, f"_fits({num_blocks}) with 3 free, no watermark")
    manager.allocate(sequence(1, 2))
    check_equal(manager._fits(0, True), False, "_fits(0) with 1 free: the watermark of 2 is not there")
    check_equal(manager._fits(0, False), True, "_fits(0) with 1 free, no watermark")


def test_questions_change_nothing() -> None:
    """Asking can_allocate, can_fork, can_swap_out and can_swap_in leaves tables, counts, queue and counters as they were.

    Why: the scheduler asks for every waiting request at every step, mostly in vain.
    """
    manager = BlockManager(6, 4, num_host_blocks=2)
    first = sequence(0, 9)
    manager.allocate(first)
    manager.cache_full_blocks(first, 9)
    first.num_computed_tokens = 9
    before = state(manager)
    manager.take_changed()
    for keep_watermark in (True, False):
        manager.can_allocate(sequence(1, 12), keep_watermark)
        manager.can_fork(keep_watermark)
        manager.can_swap_in(sequence(2, 8), keep_watermark)
    manager.can_swap_out(first)
    check_equal(state(manager), before, "tables, counts, free queue and counters")
    check_equal(manager.take_changed(), set(), "sequences with a changed table")


def test_a_question_leaves_the_queue_in_its_order() -> None:
    """Two prompts are cached and their blocks are free. can_allocate for the first of them, which was freed first, leaves the
    order of the queue as it was.

    Why: what was used longest ago is overwritten first, and a question is no use. A prompt that waits for memory is asked
    about at every step, and would push all others out of the cache.
    """
    manager = BlockManager(5, 4)
    first, second = sequence(0, 8), sequence(1, 8, first=50)
    for seq in (first, second):
        manager.allocate(seq)
        manager.cache_full_blocks(seq, 8)
    for seq in (first, second):
        manager.free(seq)
    before = state(manager)
    check_equal(manager.can_allocate(sequence(2, 9)), True, "can_allocate for 9 tokens, of which 8 are cached")
    check_equal(manager.can_allocate(sequence(2, 21)), False, "can_allocate for 21 tokens")
    check_equal(state(manager), before, "tables, counts, free queue and counters")


@pytest.mark.parametrize(
    ("used", "fork", "fork_without"), [(6, True, True), (7, True, True), (8, False, True), (10, False, False)]
)
def test_a_fork_needs_one_block(used: int, fork: bool, fork_without: bool) -> None:
    """With a watermark of 2 a fork is possible while 3 blocks are free, and without the watermark while 1 is.

    Why: a fork shares everything but will write its first own token into a block of its own.
    """
    manager, _ = admitted(10, 1, used, used, watermark=0.2)
    check_equal(manager.can_fork(), fork, f"can_fork with {10 - used} free blocks")
    check_equal(manager.can_fork(keep_watermark=False), fork_without, f"can_fork with {10 - used} free blocks, no watermark")


@pytest.mark.parametrize(("computed", "fits"), [(3, True), (4, True), (7, True), (8, True), (9, False), (12, False)])
def test_swapping_out_needs_host_blocks_for_what_is_computed(computed: int, fits: bool) -> None:
    """With two host blocks of 4 tokens a sequence of 12 tokens can leave while at most 8 of them are computed.

    Why: slots of tokens that no step has computed yet hold nothing, so there is nothing to save.
    """
    manager, seq = admitted(4, 4, 12, computed, num_host_blocks=2)
    check_equal(manager.can_swap_out(seq), fits, f"can_swap_out with {computed} computed tokens")


def test_host_memory_can_be_full_or_absent() -> None:
    """can_swap_out is False when others fill the host memory, and when there is none at all.

    Why: swapping is an option that most servers leave off. Then the scheduler has to preempt by computing again.
    """
    manager, first = admitted(6, 4, 8, 8, num_host_blocks=3)
    second = sequence(1, 8)
    manager.allocate(second)
    second.num_computed_tokens = 8
    check_equal(manager.can_swap_out(first), True, "can_swap_out with 3 host blocks free, 2 needed")
    manager.swap_out(first)
    check_equal(manager.can_swap_out(second), False, "can_swap_out with 1 host block free, 2 needed")
    manager, seq = admitted(6, 4, 8, 8)
    check_equal(manager.can_swap_out(seq), False, "can_swap_out without host memory")


@pytest.mark.parametrize(
    ("length", "with_watermark", "without"), [(8, True, True), (9, True, True), (12, True, True), (13, False, True),
                                              (16, False, True), (17, False, False)],
)  # fmt: skip
def test_swapping_in_needs_room_for_all_tokens(length: int, with_watermark: bool, without: bool) -> None:
    """A sequence that left with 5 computed tokens comes back only if all its tokens fit, above the watermark if it is kept.

    Why: the next step computes what is left, so its slots are needed at once; and coming back is an admission like any other.
    """
    manager, seq = admitted(4, 4, 5, 5, num_host_blocks=2, watermark=0.25)
    manager.swap_out(seq)
    seq.tokens += [0] * (length - 5)
    check_equal(manager.can_swap_in(seq), with_watermark, f"can_swap_in with {length} tokens, 4 free blocks, watermark 1")
    check_equal(manager.can_swap_in(seq, keep_watermark=False), without, f"can_swap_in with {length} tokens, no watermark")


def test_swapping_out_moves_what_is_computed() -> None:
    """A sequence of 9 tokens in blocks of 2, 5 of them computed, moves its first three blocks and frees all five.

    Why: the pairs are the list of what is copied. One too many wastes bandwidth to the host, one too few loses tokens.
    """
    manager, seq = admitted(6, 2, 9, 5, num_host_blocks=4)
    before = list(manager.tables[0])
    pairs = manager.swap_out(seq)
    check_equal([source for source, _ in pairs], before[:3], "device blocks to copy")
    check_equal([target for _, target in pairs], manager.host_tables[0], "host blocks to copy to")
    check_equal(len(set(manager.host_tables[0])), 3, "different host blocks")
    check_equal((manager.allocator.num_used, manager.host_allocator.num_used), (0, 3), "used blocks on device and host")
    check_equal(0 in manager.tables, False, "the sequence has a table on the device")
    check_equal(manager.take_changed(), set(), "sequences with a changed table")
    manager.check_invariants()


def test_swapping_in_restores_all_slots() -> None:
    """Coming back, the host blocks are copied in order to the first blocks of a table that has slots for all tokens.

    Why: position p must again lie at table[p // block_size]. Mixed-up blocks give a fluent answer to a scrambled prompt.
    """
    manager, seq = admitted(6, 2, 9, 5, num_host_blocks=4)
    out = manager.swap_out(seq)
    manager.allocate(sequence(1, 1))  # so that it does not get its old blocks
    pairs = manager.swap_in(seq)
    check_equal([source for source, _ in pairs], [target for _, target in out], "host blocks to copy")
    check_equal([target for _, target in pairs], manager.tables[0][:3], "device blocks to copy to")
    check_equal(len(manager.tables[0]), 5, "blocks for 9 tokens")
    check_equal((manager.allocator.num_used, manager.host_allocator.num_used), (6, 0), "used blocks on device and host")
    check_equal(manager.host_tables, {}, "tables on the host")
    check_equal(manager.take_changed(), {0, 1}, "sequences with a changed table")
    manager.check_invariants()


def test_nothing_computed_is_nothing_to_move() -> None:
    """A sequence that has computed nothing swaps out and in without any pair, and still gets its slots.

    Why: it can be preempted in the very step that admitted it.
    """
    manager, seq = admitted(4, 4, 6, 0, num_host_blocks=1)
    check_equal(manager.can_swap_out(seq), True, "can_swap_out with nothing computed")
    check_equal(manager.swap_out(seq), [], "pairs to copy out")
    check_equal(manager.allocator.num_used, 0, "used blocks")
    check_equal(manager.swap_in(seq), [], "pairs to copy in")
    check_equal(len(manager.tables[0]), 2, "blocks for 6 tokens")
    manager.check_invariants()


def test_what_left_the_window_stays_away() -> None:
    """NULL_BLOCKs stay NULL_BLOCKs on the host and back, take no block there, and are in no pair.

    Why: with a sliding window the beginning of a long text is gone. Block -1 copied "back" would be somebody else's.
    """
    manager, seq = admitted(8, 4, 18, 17, num_host_blocks=2, sliding_window=5)
    manager.free_out_of_window(seq)
    check_equal([block == NULL_BLOCK for block in manager.tables[0]], [True] * 3 + [False] * 2, "left the window of 5")
    visible = manager.tables[0][3:]
    out = manager.swap_out(seq)
    check_equal([source for source, _ in out], visible, "device blocks to copy")
    check_equal(manager.host_tables[0], [NULL_BLOCK] * 3 + [target for _, target in out], "host table")
    check_equal(manager.host_allocator.num_used, 2, "used host blocks")
    manager.check_invariants()
    back = manager.swap_in(seq)
    check_equal([source for source, _ in back], [target for _, target in out], "host blocks to copy")
    check_equal(manager.tables[0], [NULL_BLOCK] * 3 + [target for _, target in back], "device table")
    check_equal(manager.host_allocator.num_used, 0, "used host blocks")
    manager.check_invariants()
    seq.num_computed_tokens = 20
    manager.free_out_of_window(seq)  # one more has left; the three are not freed again
    check_equal(manager.allocator.num_used, 1, "used blocks, at position 20")
    manager.free(seq)
    check_equal(manager.allocator.num_used, 0, "used blocks after the end")


def test_what_left_the_window_needs_no_room() -> None:
    """18 tokens of which a window of 5 still sees two blocks: two host blocks take them, and two device blocks on the way back.

    Why: whoever counts the blocks that are gone says no although there is room, and computes the whole text again.
    """
    manager, seq = admitted(8, 4, 18, 17, num_host_blocks=2, sliding_window=5)
    check_equal(manager.can_swap_out(seq), False, "can_swap_out with 5 blocks on the device, 2 host blocks free")
    manager.free_out_of_window(seq)
    check_equal(manager.can_swap_out(seq), True, "can_swap_out with 2 blocks in the window, 2 host blocks free")
    manager.swap_out(seq)
    other = sequence(1, 20)
    manager.allocate(other)
    check_equal(manager.allocator.num_free, 3, "free blocks")
    for length, fits in ((18, True), (20, True), (21, True), (24, True), (25, False)):
        seq.tokens[18:] = [0] * (length - 18)
        check_equal(manager.can_swap_in(seq), fits, f"can_swap_in with {length} tokens, 12 of them out of sight, 3 blocks free")


@pytest.mark.parametrize(("host", "fits"), [(2, False), (3, True)])
def test_what_is_in_the_window_needs_room(host: int, fits: bool) -> None:
    """Five blocks of which a window of 9 still sees three, and so many blocks on the host.

    Why: one block too few on the host, and the swap breaks off in the middle.
    """
    manager, seq = admitted(8, 4, 18, 17, num_host_blocks=host, sliding_window=9)
    manager.free_out_of_window(seq)
    check_equal(manager.tables[0].count(NULL_BLOCK), 2, "blocks out of sight")
    check_equal(manager.can_swap_out(seq), fits, f"can_swap_out with 3 blocks in the window, {host} host blocks free")


def test_host_memory_has_no_watermark() -> None:
    """The watermark is about device memory: a sequence whose blocks fill the host to the last one can be swapped out.

    Why: nobody grows on the host. Blocks kept free there are never used.
    """
    manager, seq = admitted(8, 4, 8, 8, num_host_blocks=2, watermark=0.25)
    check_equal(manager.can_swap_out(seq), True, "can_swap_out with 2 blocks, 2 host blocks free")


def test_shared_blocks_need_room_on_the_host_too() -> None:
    """can_swap_out counts blocks that others hold as well: each is copied.

    Why: the other one may end while this one is away, and take the only copy along.
    """
    manager, seq = admitted(8, 4, 8, 8, num_host_blocks=1)
    for block in manager.tables[0]:
        manager.allocator.share(block)
    manager.tables[1] = list(manager.tables[0])
    check_equal(manager.can_swap_out(seq), False, "can_swap_out with 2 shared blocks, 1 host block free")


def test_what_was_swapped_out_is_still_found() -> None:
    """The device blocks that a swap leaves are freed as `free` does it: the prefix cache knows them, and the end of the text is
    reused before its beginning.

    Why: until they are overwritten they hold what they held. Another prompt with this beginning need not compute it.
    """
    manager, seq = admitted(6, 4, 12, 12, num_host_blocks=3, enable_prefix_caching=True)
    manager.cache_full_blocks(sequence(0, 12), 12)
    table = list(manager.tables[0])
    manager.swap_out(seq)
    check_equal(manager.prefix_cache.match(sequence(1, 13)), table, "cached blocks of another prompt with the same 12 tokens")
    check_equal(manager.allocator.free_blocks()[3:], table[::-1], "end of the free queue")
    manager.check_invariants()


@pytest.mark.parametrize("length", [9, 12, 13])
def test_new_blocks_behind_the_returning_ones_lose_their_content(length: int) -> None:
    """A sequence that left with 8 computed tokens and comes back with room for 9, 12 or 13 overwrites what its further blocks
    held: the prefix cache knows none of its blocks.

    Why: the restored blocks and the new ones behind them are both about to be written. One that keeps its old entry answers
    a later prompt from this sequence's keys and values.
    """
    manager, seq = admitted(4, 4, length, 8, num_host_blocks=2, enable_prefix_caching=True)
    manager.swap_out(seq)
    other = sequence(1, 16, first=100)
    manager.allocate(other)
    manager.cache_full_blocks(other, 16)
    manager.free(other)
    check_equal(len(manager.prefix_cache), 4, "cached blocks before the return")
    manager.swap_in(seq)
    known = [block for block in manager.tables[0] if block in manager.prefix_cache]
    check_equal(known, [], "blocks of the returned sequence that are still known by what they held")
    manager.check_invariants()


def test_a_shared_block_is_saved_but_not_taken_from_others() -> None:
    """When one of two sequences that share a block swaps out, its content is copied and the other keeps the block.

    Why: the one that leaves must find the whole prompt on its return, and the one that stays is still reading it.
    """
    manager = BlockManager(6, 4, num_host_blocks=3)
    first = sequence(0, 5)
    manager.allocate(first)
    manager.cache_full_blocks(first, 5)
    second = sequence(1, 5)
    manager.allocate(second)
    common = manager.tables[0][0]
    check_equal(manager.tables[1][0], common, "first block of both")
    first.num_computed_tokens = second.num_computed_tokens = 5
    table = list(manager.tables[1])
    check_equal([source for source, _ in manager.swap_out(second)], table, "device blocks to copy")
    check_equal(manager.allocator.ref_counts[common], 1, "references to the common block")
    check_equal(manager.tables[0][0], common, "first block of the one who stays")
    manager.check_invariants()


def test_a_returning_sequence_overwrites_what_was_cached() -> None:
    """Blocks that receive a sequence from the host are no longer found by what they held before.

    Why: a swap is a write like any other. With a stale entry the next prompt would read the returned sequence's text.
    """
    manager = BlockManager(2, 4, num_host_blocks=2)
    seq = sequence(0, 8)
    manager.allocate(seq)
    seq.num_computed_tokens = 8
    manager.swap_out(seq)
    other = sequence(1, 8, first=100)
    manager.allocate(other)
    manager.cache_full_blocks(other, 8)
    manager.free(other)
    manager.swap_in(seq)
    check_equal(len(manager.prefix_cache), 0, "cached blocks when all blocks were overwritten")
    manager.check_invariants()


class Swapping(RuleBasedStateMachine):
    """Sequences come, grow, leave for the host and return. Memory is two dictionaries: block → the tokens in it."""

    size = 3

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(6, self.size, num_host_blocks=4, enable_prefix_caching=False, watermark=0)
        self.device: dict[int, dict[int, int]] = {block: {} for block in range(6)}
        self.host: dict[int, dict[int, int]] = {block: {} for block in range(4)}
        self.here: list[Sequence] = []
        self.away: list[Sequence] = []
        self.next_id = 0
        self.next_token = 1000

    def blocks(self, sequences: list[Sequence]) -> int:
        return sum(len(range(0, len(seq.tokens), self.size)) for seq in sequences)

    def write(self, seq: Sequence, end: int) -> None:
        for slot in slots(self.manager, seq, seq.num_computed_tokens, end):
            self.device[slot // self.size][slot % self.size] = seq.tokens[seq.num_computed_tokens]
            seq.num_computed_tokens += 1

    @rule(length=st.integers(1, 8), computed=st.integers(1, 8))
    def come(self, length: int, computed: int) -> None:
        seq = sequence(self.next_id, length, first=self.next_token)
        fits = self.blocks(self.here) + self.blocks([seq]) <= 6
        check_equal(self.manager.can_allocate(seq), fits, f"can_allocate for {length} tokens")
        if fits:
            self.next_id += 1
            self.next_token += length
            self.manager.allocate(seq)
            self.here.append(seq)
            self.write(seq, min(length, computed))

    @precondition(lambda self: self.here)
    @rule(choice=st.integers(0, 9))
    def compute(self, choice: int) -> None:
        seq = self.here[choice % len(self.here)]
        self.write(seq, len(seq.tokens))

    @precondition(lambda self: self.here)
    @rule(choice=st.integers(0, 9))
    def leave(self, choice: int) -> None:
        seq = self.here[choice % len(self.here)]
        taken = sum(len(range(0, other.num_computed_tokens, self.size)) for other in self.away)
        fits = taken + len(range(0, seq.num_computed_tokens, self.size)) <= 4
        check_equal(self.manager.can_swap_out(seq), fits, "can_swap_out")
        if fits:
            for source, target in self.manager.swap_out(seq):
                self.host[target] = dict(self.device[source])
            self.here.remove(seq)
            self.away.append(seq)

    @precondition(lambda self: self.away)
    @rule(choice=st.integers(0, 9))
    def come_back(self, choice: int) -> None:
        seq = self.away[choice % len(self.away)]
        fits = self.blocks(self.here) + self.blocks([seq]) <= 6
        check_equal(self.manager.can_swap_in(seq), fits, "can_swap_in")
        if fits:
            for source, target in self.manager.swap_in(seq):
                self.device[target] = dict(self.host[source])
            self.away.remove(seq)
            self.here.append(seq)

    @precondition(lambda self: self.here or self.away)
    @rule(choice=st.integers(0, 9))
    def end(self, choice: int) -> None:
        everyone = self.here + self.away
        seq = everyone[choice % len(everyone)]
        self.manager.free(seq)
        (self.here if seq in self.here else self.away).remove(seq)

    @invariant()
    def everyone_finds_its_tokens(self) -> None:
        check_equal(self.manager.allocator.num_used, self.blocks(self.here), "used blocks")
        for seq in self.here:
            taken = slots(self.manager, seq, 0, seq.num_computed_tokens)
            read = [self.device[slot // self.size].get(slot % self.size) for slot in taken]
            check_equal(read, seq.tokens[: seq.num_computed_tokens], f"tokens of sequence {seq.seq_id} in memory")
        self.manager.check_invariants()


def test_everyone_finds_its_tokens_again_after_swapping() -> None:
    """Sequences leave for the host and return in random order; each finds its computed tokens where its table says.

    Why: whether a request was swapped must not show in its answer. The copies are made by the pairs that you return.
    """
    run_state_machine_as_test(Swapping, settings=SEARCH)
