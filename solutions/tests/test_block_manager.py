"""BlockManager: block tables, forks with copy-on-write, watermark, swapping, the sliding window."""

from __future__ import annotations

import pytest

from solutions.attention.block_manager import NULL_BLOCK, BlockManager
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence


def sequence(seq_id, length, computed=0, start=0, **params):
    seq = Sequence(seq_id, list(range(start, start + length)), SamplingParams(**params))
    seq.num_computed_tokens = computed
    return seq


@pytest.mark.parametrize(("length", "blocks"), [(1, 1), (3, 1), (4, 1), (5, 2), (7, 2), (8, 2), (9, 3)])
def test_allocates_just_enough_blocks(length, blocks):
    manager = BlockManager(8, 4)
    assert manager.allocate(sequence(0, length)) == 0
    assert len(manager.tables[0]) == blocks
    assert manager.allocator.num_used == blocks
    manager.check_invariants()


@pytest.mark.parametrize("computed", [3, 4, 5])
def test_appending_takes_a_block_only_at_a_boundary(computed):
    manager = BlockManager(8, 4)
    seq = sequence(0, computed)
    manager.allocate(seq)
    before = list(manager.tables[0])
    seq.num_computed_tokens = computed
    seq.tokens.append(1)
    assert manager.append_slots(seq, 1, [])
    assert manager.tables[0][: len(before)] == before
    assert len(manager.tables[0]) - len(before) == (1 if computed == 4 else 0)


def test_append_without_room_changes_nothing():
    manager = BlockManager(2, 2)
    seq = sequence(0, 4, computed=0)
    manager.allocate(seq)
    seq.num_computed_tokens = 4
    assert not manager.append_slots(seq, 1, [])
    assert len(manager.tables[0]) == 2
    manager.check_invariants()


def test_watermark_keeps_blocks_for_those_who_run():
    manager = BlockManager(10, 1, watermark=0.2)
    assert manager.can_allocate(sequence(0, 8))
    assert not manager.can_allocate(sequence(0, 9))
    assert manager.can_allocate(sequence(0, 10), keep_watermark=False)
    assert not manager.can_allocate(sequence(0, 11), keep_watermark=False)


def test_fork_shares_and_the_first_write_copies():
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    parent = sequence(0, 6)
    manager.allocate(parent)
    parent.num_computed_tokens = 6
    first, last = manager.tables[0]
    child = sequence(1, 6)
    manager.fork(parent, child, 5)
    child.num_computed_tokens = 5
    assert manager.tables[1] == [first, last]
    assert manager.allocator.num_used == 2, "a fork costs no memory"

    copies = []
    assert manager.append_slots(child, 1, copies)
    assert manager.tables[0] == [first, last]
    assert manager.tables[1][0] == first
    assert copies == [(last, manager.tables[1][1])]
    assert manager.tables[1][1] not in (first, last)
    manager.check_invariants()

    copies.clear()
    parent.tokens.append(9)
    assert manager.append_slots(parent, 1, copies)
    assert copies == [], "the parent's last block is its own again"
    assert manager.allocator.is_shared(first)


def test_fork_at_a_block_boundary_needs_no_copy():
    manager = BlockManager(8, 4, enable_prefix_caching=False)
    parent = sequence(0, 5)
    manager.allocate(parent)
    parent.num_computed_tokens = 5
    child = sequence(1, 5)
    manager.fork(parent, child, 4)
    child.num_computed_tokens = 4
    copies = []
    assert manager.append_slots(child, 1, copies)
    assert copies == []
    assert manager.tables[1][0] == manager.tables[0][0]
    assert manager.tables[1][1] != manager.tables[0][1]


def test_freeing_a_parent_leaves_the_shared_blocks_to_the_child():
    manager = BlockManager(4, 4, enable_prefix_caching=False)
    parent = sequence(0, 8)
    manager.allocate(parent)
    parent.num_computed_tokens = 8
    child = sequence(1, 8)
    manager.fork(parent, child, 7)
    manager.free(parent)
    assert manager.allocator.num_used == 2
    manager.free(child)
    assert manager.allocator.num_used == 0
    manager.free(child)
    manager.check_invariants()


def test_prefix_is_found_again_after_its_owner_is_gone():
    manager = BlockManager(8, 4)
    seq = sequence(0, 10)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 10)
    blocks = list(manager.tables[0])
    manager.free(seq)
    again = sequence(1, 10)
    assert manager.allocate(again) == 8
    assert manager.tables[1][:2] == blocks[:2]
    assert (manager.prefix_cache.num_queries, manager.prefix_cache.num_hits) == (20, 8)
    manager.check_invariants()


def test_exactly_repeated_prompt_still_computes_its_last_block():
    manager = BlockManager(8, 4)
    seq = sequence(0, 8)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 8)
    assert manager.allocate(sequence(1, 8)) == 4


def test_reused_block_loses_its_content():
    manager = BlockManager(2, 4)
    seq = sequence(0, 8)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 8)
    manager.free(seq)
    other = sequence(1, 8, start=100)
    manager.allocate(other)
    manager.free(other)
    assert manager.allocate(sequence(2, 8)) == 0


def test_tail_of_a_prompt_leaves_the_cache_before_its_head():
    manager = BlockManager(4, 2)
    seq = sequence(0, 8)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 8)
    manager.free(seq)
    manager.allocate(sequence(1, 3, start=50))  # takes two blocks
    probe = sequence(2, 8)
    assert manager.prefix_cache.match(probe) == manager.allocator.free_blocks()[::-1]


def test_cached_blocks_count_against_free_ones():
    manager = BlockManager(4, 4, watermark=0)
    seq = sequence(0, 16)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 16)
    manager.free(seq)
    assert manager.can_allocate(sequence(1, 16))
    assert not manager.can_allocate(sequence(1, 17))


def test_prompt_logprobs_skip_the_cache():
    manager = BlockManager(8, 4)
    seq = sequence(0, 8)
    manager.allocate(seq)
    manager.cache_full_blocks(seq, 8)
    assert manager.allocate(sequence(1, 8, prompt_logprobs=1)) == 0


def test_only_computed_blocks_are_swapped_and_come_back():
    manager = BlockManager(6, 2, num_host_blocks=4)
    seq = sequence(0, 9)
    manager.allocate(seq)
    seq.num_computed_tokens = 5
    before = list(manager.tables[0])
    assert manager.can_swap_out(seq)
    out = manager.swap_out(seq)
    assert [source for source, _ in out] == before[:3]
    assert manager.allocator.num_used == 0
    assert manager.host_allocator.num_used == 3
    manager.check_invariants()
    back = manager.swap_in(seq)
    assert [source for source, _ in back] == [target for _, target in out]
    assert manager.tables[0][:3] == [target for _, target in back]
    assert len(manager.tables[0]) == 5
    assert manager.host_allocator.num_used == 0
    manager.check_invariants()


def test_swapping_needs_host_memory():
    manager = BlockManager(6, 2, num_host_blocks=2)
    seq = sequence(0, 5)
    manager.allocate(seq)
    seq.num_computed_tokens = 4
    assert manager.can_swap_out(seq)
    seq.num_computed_tokens = 5
    assert not manager.can_swap_out(seq)
    assert not BlockManager(6, 2).can_swap_out(seq)


@pytest.mark.parametrize(("computed", "expired"), [(6, 0), (7, 1), (8, 1), (9, 2), (15, 5)])
def test_blocks_left_of_the_window_are_freed(computed, expired):
    """Block size 2, window 6: the token at position p sees p - 5 .. p."""
    manager = BlockManager(10, 2, sliding_window=6, enable_prefix_caching=False)
    seq = sequence(0, 16)
    manager.allocate(seq)
    seq.num_computed_tokens = computed
    manager.free_out_of_window(seq)
    first_visible = computed - 5
    assert expired == max(0, first_visible) // 2
    assert [block == NULL_BLOCK for block in manager.tables[0]] == [True] * expired + [False] * (8 - expired)
    assert manager.allocator.num_used == 8 - expired
    manager.check_invariants()
    manager.free_out_of_window(seq)
    manager.free(seq)
    assert manager.allocator.num_used == 0


def test_parent_beyond_its_window_can_no_longer_be_forked():
    manager = BlockManager(10, 1, sliding_window=2, enable_prefix_caching=False)
    parent = sequence(0, 6)
    manager.allocate(parent)
    parent.num_computed_tokens = 4
    manager.free_out_of_window(parent)
    assert manager.holds(parent, 4)
    assert not manager.holds(parent, 3), "the token at 3 sees position 2, whose block is gone"
    assert not manager.holds(parent, 5), "position 4 is not computed"


def test_changed_tables_are_reported_once():
    manager = BlockManager(8, 4)
    seq = sequence(0, 4)
    manager.allocate(seq)
    assert manager.take_changed() == {0}
    seq.num_computed_tokens = 3
    manager.append_slots(seq, 1, [])
    assert manager.take_changed() == set()
    seq.num_computed_tokens = 4
    manager.append_slots(seq, 1, [])
    assert manager.take_changed() == {0}


def test_check_invariants_sees_a_block_in_two_tables():
    manager = BlockManager(4, 4)
    manager.allocate(sequence(0, 4))
    manager.tables[9] = list(manager.tables[0])
    with pytest.raises(AssertionError, match="stands in 2 tables"):
        manager.check_invariants()


def test_block_size_must_be_positive():
    with pytest.raises(ValueError, match="block_size must be at least 1"):
        BlockManager(4, 0)


def test_a_block_may_be_copied_once_the_step_that_fills_it_has_run():
    """A fork at position 6 copies the second block, which the step in between fills."""
    manager = BlockManager(8, 4)
    parent = sequence(0, 8, computed=8)
    manager.allocate(parent)
    assert manager.holds(parent, 6)
    parent.num_computed_tokens = 4
    manager.cache_full_blocks(parent, 4)
    parent.num_computed_tokens = 8  # so it is counted for one that is admitted in the same step and finds the block
    assert manager.holds(parent, 4)  # nothing is copied: the fork begins a block of its own
    assert not manager.holds(parent, 6)
    manager.begin_step()
    assert manager.holds(parent, 6)
