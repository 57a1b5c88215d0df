"""BlockAllocator: counts, the LRU free list, and its errors."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from solutions.memory.block_allocator import BlockAllocator, OutOfBlocksError


def test_hands_out_every_block_once_and_then_refuses():
    allocator = BlockAllocator(3)
    assert sorted(allocator.allocate() for _ in range(3)) == [0, 1, 2]
    assert (allocator.num_free, allocator.num_used) == (0, 3)
    with pytest.raises(OutOfBlocksError, match="all 3 KV blocks"):
        allocator.allocate()
    allocator.check_invariants()


def test_least_recently_freed_block_is_reused_first():
    allocator = BlockAllocator(3)
    blocks = [allocator.allocate() for _ in range(3)]
    for block in (blocks[1], blocks[2], blocks[0]):
        allocator.free(block)
    assert [allocator.allocate() for _ in range(3)] == [blocks[1], blocks[2], blocks[0]]


def test_block_with_nothing_to_keep_is_reused_first():
    allocator = BlockAllocator(4)
    a, b = allocator.allocate(), allocator.allocate()
    allocator.free(a)
    allocator.free(b, reuse_first=True)
    assert allocator.free_blocks() == [b, 2, 3, a]


def test_shared_block_is_free_only_after_its_last_reference():
    allocator = BlockAllocator(2)
    block = allocator.allocate()
    allocator.share(block)
    assert allocator.is_shared(block)
    allocator.free(block)
    assert not allocator.is_shared(block)
    assert allocator.num_free == 1
    allocator.free(block)
    assert allocator.num_free == 2
    with pytest.raises(ValueError, match="freed twice"):
        allocator.free(block)


def test_sharing_a_free_block_takes_it_out_of_the_free_list():
    allocator = BlockAllocator(3)
    allocator.share(1)
    assert allocator.free_blocks() == [0, 2]
    assert allocator.ref_counts == [0, 1, 0]
    allocator.check_invariants()


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_needs_a_block(num_blocks):
    with pytest.raises(ValueError, match="num_blocks must be at least 1"):
        BlockAllocator(num_blocks)


def test_check_invariants_sees_a_wrong_count():
    allocator = BlockAllocator(2)
    allocator.ref_counts[1] = 1
    with pytest.raises(AssertionError, match="block 1"):
        allocator.check_invariants()


@given(st.lists(st.tuples(st.sampled_from("asf"), st.integers(0, 4)), max_size=60))
def test_equals_a_model_of_lists(operations):
    """The same operations on a plain list of free blocks and a dictionary of counts give the same answers."""
    allocator, free, counts = BlockAllocator(5), [0, 1, 2, 3, 4], dict.fromkeys(range(5), 0)
    for operation, block in operations:
        if operation == "a" and free:
            expected = free.pop(0)
            counts[expected] = 1
            assert allocator.allocate() == expected
        elif operation == "s":
            if block in free:
                free.remove(block)
            counts[block] += 1
            allocator.share(block)
        elif operation == "f" and counts[block]:
            counts[block] -= 1
            if counts[block] == 0:
                free.append(block)
            allocator.free(block)
        assert allocator.free_blocks() == free
        assert allocator.ref_counts == list(counts.values())
        allocator.check_invariants()
