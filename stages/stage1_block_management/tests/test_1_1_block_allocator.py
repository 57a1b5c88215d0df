"""Task 1.1: BlockAllocator hands out, shares and takes back block ids."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from stages.course.fixtures.checks import check_equal
from stages.memory.block_allocator import BlockAllocator, OutOfBlocksError

SEARCH = settings(
    max_examples=40, stateful_step_count=30, derandomize=True, deadline=None, database=None, report_multiple_bugs=False,
    phases=(Phase.generate, Phase.shrink),
)  # fmt: skip
"""How the random test searches: always in the same way, and it reports the shortest failing order of calls."""


def test_every_block_is_handed_out_once() -> None:
    """Allocating as many times as there are blocks gives each block exactly once, with one reference each.

    Why: two sequences that are given the same block overwrite each other's keys and values, and both answers turn to nonsense.
    """
    allocator = BlockAllocator(5)
    blocks = [allocator.allocate() for _ in range(5)]
    check_equal(sorted(blocks), [0, 1, 2, 3, 4], "blocks handed out, sorted")
    check_equal(allocator.ref_counts, [1] * 5, "reference counts")
    check_equal((allocator.num_free, allocator.num_used), (0, 5), "free and used blocks")
    allocator.check_invariants()


def test_an_empty_free_queue_is_an_error_that_changes_nothing() -> None:
    """When every block is in use, allocate raises OutOfBlocksError; after one is freed it works again.

    Why: the engine must learn at once that memory is full. A KeyError from the depths, or an id that does not exist, would end
    the server instead of making it preempt somebody.
    """
    allocator = BlockAllocator(2)
    first, second = allocator.allocate(), allocator.allocate()
    with pytest.raises(OutOfBlocksError):
        allocator.allocate()
    check_equal(allocator.ref_counts, [1, 1], "reference counts after the refusal")
    allocator.free(second)
    check_equal(allocator.allocate(), second, "the only free block")
    check_equal(allocator.ref_counts[first], 1, "references to the other block")
    allocator.check_invariants()


def test_the_block_freed_longest_ago_is_reused_first() -> None:
    """Freed blocks join the back of the queue, allocate takes from its front.

    Why: a freed block still holds keys and values that the prefix cache can find. First in, first out keeps the freshest ones
    longest; last in, first out would overwrite exactly those that the next request is likely to want.
    """
    allocator = BlockAllocator(4)
    a, b, c = (allocator.allocate() for _ in range(3))
    for block in (b, c, a):
        allocator.free(block)
    check_equal(allocator.free_blocks(), [3, b, c, a], "free queue: the never used block, then b, c, a as they were freed")
    check_equal([allocator.allocate() for _ in range(4)], [3, b, c, a], "blocks in the order of reuse")


def test_a_shared_block_is_free_only_after_its_last_reference() -> None:
    """Each share adds a reference and each free takes one; only the last free puts the block into the queue.

    Why: the block of a common prompt belongs to everyone who reads it. If the first one to finish gave it away, the others
    would go on reading somebody else's text.
    """
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.share(block)
    allocator.share(block)
    for left in (3, 2, 1):
        check_equal(allocator.ref_counts[block], left, "references to the block")
        check_equal(allocator.is_shared(block), left > 1, f"shared with {left} references")
        check_equal(allocator.num_free, 1, f"free blocks while {left} references are left")
        allocator.check_invariants()
        allocator.free(block)
    check_equal(allocator.ref_counts[block], 0, "references after the last free")
    check_equal(allocator.free_blocks(), [1, block], "free queue")


def test_a_free_block_is_shared_out_of_the_middle_of_the_queue() -> None:
    """Sharing a block that is free takes it out of the queue, wherever it stands there, and leaves the others in order.

    Why: this is how a cached prefix comes back to life. A block that stayed in the queue would be handed to somebody else
    while it is being read.
    """
    allocator = BlockAllocator(4)
    allocator.share(2)
    check_equal(allocator.free_blocks(), [0, 1, 3], "free queue")
    check_equal(allocator.ref_counts, [0, 0, 1, 0], "reference counts")
    allocator.check_invariants()
    check_equal([allocator.allocate() for _ in range(3)], [0, 1, 3], "blocks handed out afterwards")


def test_reuse_first_puts_a_block_at_the_front() -> None:
    """free(block, reuse_first=True) makes it the next block to be reused; without it the block goes to the back.

    Why: a block that is not in the prefix cache is worth nothing to anybody. Reusing it first lets cached ones live longer.
    """
    allocator = BlockAllocator(5)
    a, b, c = (allocator.allocate() for _ in range(3))
    allocator.free(a)
    allocator.free(b, reuse_first=True)
    check_equal(allocator.free_blocks(), [b, 3, 4, a], "free queue")
    allocator.free(c, reuse_first=True)
    check_equal(allocator.free_blocks(), [c, b, 3, 4, a], "free queue")
    check_equal(allocator.allocate(), c, "the next block")
    allocator.check_invariants()


def test_reuse_first_waits_for_the_last_reference() -> None:
    """With reuse_first, too, a block that others still hold stays out of the queue.

    Why: "nothing in it is worth keeping" is the opinion of the one who leaves. Those who stay are still reading.
    """
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    allocator.share(block)
    allocator.free(block, reuse_first=True)
    check_equal(allocator.free_blocks(), [1, 2], "free queue while one reference is left")
    allocator.free(block, reuse_first=True)
    check_equal(allocator.free_blocks(), [block, 1, 2], "free queue after the last reference")


def test_a_double_free_is_refused() -> None:
    """Freeing a block that is free raises ValueError and changes nothing.

    Why: a block that stands in the queue twice is handed to two sequences. Such a bug shows much later and elsewhere, so it
    has to stop here, where its cause is on the stack.
    """
    allocator = BlockAllocator(3)
    block = allocator.allocate()
    allocator.free(block)
    for reuse_first in (False, True):
        with pytest.raises(ValueError, match=str(block)):
            allocator.free(block, reuse_first)
        with pytest.raises(ValueError, match="2"):
            allocator.free(2, reuse_first)  # was never handed out
        check_equal(allocator.free_blocks(), [1, 2, block], "free queue after the refusal")
        check_equal(allocator.ref_counts, [0, 0, 0], "reference counts after the refusal")
        allocator.check_invariants()


class WalkedQueue(OrderedDict[int, None]):
    """The allocator's queue, counting the entries that somebody walks over."""

    walked = 0

    def _count(self, entries: Iterator) -> Iterator:
        for entry in entries:
            self.walked += 1
            yield entry

    def __iter__(self) -> Iterator[int]:
        return self._count(super().__iter__())

    def __reversed__(self) -> Iterator[int]:
        return self._count(super().__reversed__())

    def keys(self) -> Iterator[int]:
        return iter(self)

    def items(self) -> Iterator[tuple[int, None]]:
        return ((block, None) for block in self)


class WalkedCounts(list[int]):
    """The allocator's reference counts, counting those that somebody walks over."""

    walked = 0

    def __iter__(self) -> Iterator[int]:
        for count in super().__iter__():
            self.walked += 1
            yield count

    def __reversed__(self) -> Iterator[int]:
        self.walked += len(self)
        return super().__reversed__()

    def __contains__(self, count: object) -> bool:
        return any(count == other for other in self)

    def __getitem__(self, place):
        self.walked += len(self) if isinstance(place, slice) else 0
        return super().__getitem__(place)

    def __add__(self, other: list[int]) -> list[int]:
        self.walked += len(self)
        return super().__add__(other)

    def copy(self) -> list[int]:
        return list(self)

    def count(self, count: int) -> int:
        return sum(count == other for other in self)

    def index(self, count: int, *limits: int) -> int:
        self.walked += len(self)
        return super().index(count, *limits)


def test_no_call_walks_through_the_counts() -> None:
    """None of the three functions looks through the reference counts of all blocks.

    Why: "is there a block with a count of 0" answers the right question in time proportional to the size of the card, for
    every block, at every step. (Here a counting list takes the place of `ref_counts`.)
    """
    allocator = BlockAllocator(1000)
    allocator.ref_counts = WalkedCounts(allocator.ref_counts)
    blocks = [allocator.allocate() for _ in range(900)]
    for block in (blocks[800], blocks[3], 950):
        allocator.share(block)
    for block in (blocks[800], blocks[7], blocks[3], blocks[3]):
        allocator.free(block)
    allocator.free(blocks[10], reuse_first=True)
    assert isinstance(allocator.ref_counts, WalkedCounts), "the counts were copied into a new list, which walks through them"
    check_equal(allocator.ref_counts.walked, 0, "reference counts that 908 calls walked over")


def test_no_call_walks_through_the_queue() -> None:
    """None of the three functions looks at more than one entry of the free queue, however long it is.

    Why: a large card holds tens of thousands of blocks. Searching them for every block that is taken, at every step, keeps the
    GPU waiting. (The starter gives the queue, an OrderedDict; here a counting one takes its place.)
    """
    allocator = BlockAllocator(1000)
    allocator._free = WalkedQueue(allocator._free)
    allocator._free.walked = 0
    blocks = [allocator.allocate() for _ in range(100)]
    allocator.share(700)
    for block in (blocks[50], blocks[3], 700):
        allocator.free(block)
    allocator.free(blocks[10], reuse_first=True)
    allocator.share(blocks[3])
    assert isinstance(allocator._free, WalkedQueue), "the queue was copied into a new one, which walks through all of it"
    walked = allocator._free.walked
    assert walked <= 106, f"106 calls looked at {walked} entries of the queue; O(1) means at most one a call"


class AllocatorAgainstLists(RuleBasedStateMachine):
    """The allocator beside the simplest thing that could be right: a list of free blocks and a list of counts."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(5)
        self.free = [0, 1, 2, 3, 4]
        self.counts = [0] * 5

    @rule()
    def allocate(self) -> None:
        if not self.free:
            with pytest.raises(OutOfBlocksError):
                self.allocator.allocate()
            return
        expected = self.free.pop(0)
        self.counts[expected] = 1
        check_equal(self.allocator.allocate(), expected, "block from allocate()")

    @rule(block=st.integers(0, 4))
    def share(self, block: int) -> None:
        if block in self.free:
            self.free.remove(block)
        self.counts[block] += 1
        self.allocator.share(block)

    @precondition(lambda self: any(self.counts))
    @rule(choice=st.integers(0, 4), reuse_first=st.booleans())
    def free_used(self, choice: int, reuse_first: bool) -> None:
        used = [block for block, count in enumerate(self.counts) if count]
        block = used[choice % len(used)]
        self.counts[block] -= 1
        if self.counts[block] == 0:
            self.free.insert(0 if reuse_first else len(self.free), block)
        self.allocator.free(block, reuse_first)

    @invariant()
    def same_state(self) -> None:
        check_equal(self.allocator.free_blocks(), self.free, "free queue")
        check_equal(self.allocator.ref_counts, self.counts, "reference counts")
        self.allocator.check_invariants()


def test_any_order_of_calls_agrees_with_plain_lists() -> None:
    """Random allocate, share and free calls give the same blocks, counts and queue as a slow model made of lists.

    Why: the bugs of reference counting hide in orders that nobody thinks of. If this one alone fails, read the shortest
    failing order of calls that it prints.
    """
    run_state_machine_as_test(AllocatorAgainstLists, settings=SEARCH)
