"""Task 1.7 ★: layers with a window and layers without hold their blocks in groups of their own."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.attention.block_manager import NULL_BLOCK
from stages.attention.hybrid_manager import HybridBlockManager, blocks_of_one
from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal

Windows = tuple[int | None, ...]


def sequence(seq_id: int, tokens: int | list[int], **params: int) -> Sequence:
    """A sequence of these tokens, or of so many that count up from 0."""
    return Sequence(seq_id, list(range(tokens)) if isinstance(tokens, int) else tokens, SamplingParams(**params))


def left(seq: Sequence) -> int:
    """Tokens that are not computed yet."""
    return len(seq.tokens) - seq.num_computed_tokens


class Memory:
    """What lies in each slot: of which group, and the tokens up to its own. Every read of a step is checked."""

    def __init__(self, manager: HybridBlockManager) -> None:
        self.manager, self.slots = manager, dict[int, tuple[int, tuple[int, ...]]]()

    def compute(self, seq: Sequence, count: int) -> bool:
        """Let a sequence compute its next `count` tokens; False if there was no room."""
        manager, size, copies = self.manager, self.manager.block_size, list[tuple[int, int]]()
        manager.begin_step()
        manager.free_out_of_window(seq)
        if not manager.append_slots(seq, count, copies):
            return False
        manager.cache_full_blocks(seq, count)
        for source, target in copies:
            self.slots.update({target * size + i: self.slots.get(source * size + i, (-1, ())) for i in range(size)})
        start, tokens = seq.num_computed_tokens, seq.tokens
        for number, group in enumerate(manager.groups):
            table, window = group.tables[seq.seq_id], group.sliding_window
            for position in range(start, start + count):
                self.slots[table[position // size] * size + position % size] = (number, tuple(tokens[: position + 1]))
            for position in range(0 if window is None else max(0, start - window + 1), start + count):
                block = table[position // size]
                found = self.slots.get(block * size + position % size) if block != NULL_BLOCK else None
                assert found == (number, tuple(tokens[: position + 1])), (
                    f"sequence {seq.seq_id} reads position {position} of group {number} in block {block} and finds {found}"
                )
        seq.num_computed_tokens += count
        manager.check_invariants()
        return True

    def through(self, seq: Sequence, chunk: int) -> int:
        """Let it compute all it has left, chunk by chunk; the most blocks in use at once."""
        peak = self.manager.allocator.num_used
        while left(seq):
            assert self.compute(seq, min(chunk, left(seq))), f"no room behind {seq.num_computed_tokens} tokens"
            peak = max(peak, self.manager.allocator.num_used)
        return peak


def begin(manager: HybridBlockManager, seq: Sequence) -> int:
    seq.num_computed_tokens = manager.allocate(seq)
    return seq.num_computed_tokens


def known(manager: HybridBlockManager, seq: Sequence, windows: Windows) -> int:
    """Blocks of the longest prefix that every group knows: all lengths are tried, from the longest one on."""
    size = manager.block_size
    hashes = manager.prefix_cache.block_hashes(seq, (len(seq.tokens) - 1) // size)
    for length in range(len(hashes), 0, -1):
        seen = [range(0 if window is None else max(0, length * size - window + 1), length * size) for window in windows]
        if all(
            cache.find(hashes[block]) is not None
            for cache, positions in zip(manager._caches, seen, strict=True)
            for block in {position // size for position in positions}
        ):
            return length
    return 0


def state(manager: HybridBlockManager) -> tuple:
    """All that a question must leave as it was."""
    tables = [{seq_id: list(table) for seq_id, table in group.tables.items()} for group in manager.groups]
    return tables, list(manager.allocator.ref_counts), manager.allocator.free_blocks()


@pytest.mark.parametrize(
    ("window", "length", "computed", "blocks"),
    [(None, 9, 0, 3), (None, 8, 8, 2), (6, 40, 0, 4), (6, 40, 8, 4), (6, 40, 9, 5), (6, 40, 16, 6), (6, 13, 8, 4), (6, 9, 0, 3),
     (6, 14, 12, 4), (1, 40, 0, 3), (1, 40, 32, 10), (40, 30, 0, 8)],
)  # fmt: skip
def test_a_group_comes_with_a_window_and_a_chunk(window: int | None, length: int, computed: int, blocks: int) -> None:
    """Blocks of 4 tokens, chunks of 8: what sequences of several lengths come with, of which some tokens are computed.

    Why: with blocks for all of a long prompt, in layers that never see it together, a window costs as much as no window. With
    fewer than the prompt's steps need, it is let in and then has no room.
    """
    manager = HybridBlockManager(64, 4, windows=(None, window), chunk=8)
    check_equal(manager._num_first(manager.groups[1], sequence(0, length), computed), blocks, "blocks of the group")


@pytest.mark.parametrize("chunk", [1, 5, 6, 7])
@pytest.mark.parametrize("computed", [0, 3, 9, 10, 11])
def test_window_and_chunk_are_rounded_up_together(chunk: int, computed: int) -> None:
    """Blocks of 4 tokens and a window of 6, none of which is a multiple of another: as many blocks as the places lie in.

    Why: what is rounded up piece by piece takes a block more than is used, for every sequence in every group with a window.
    """
    manager = HybridBlockManager(64, 4, windows=(None, 6), chunk=chunk)
    places = range(max(6, computed) + chunk)
    found = manager._num_first(manager.groups[1], sequence(0, 40), computed)
    check_equal(found, len({place // 4 for place in places}), f"blocks of the group for {len(places)} places")


def test_a_window_costs_a_window() -> None:
    """A prompt of 400 tokens in two groups, of which one has a window of 16: blocks of 4, chunks of 24.

    Why: this is what groups are for. In one group both would hold 100 blocks, and Gemma 3 has five such groups of six.
    """
    windows, chunk = (None, 16), 24
    most = blocks_of_one(windows, 400, 4, chunk)
    manager = HybridBlockManager(most, 4, 0, 0.0, windows=windows, chunk=chunk)
    seq = sequence(0, 400)
    check_equal(manager.can_allocate(seq), True, "whether it fits in what `blocks_of_one` says")
    begin(manager, seq)
    check_equal([len(group.tables[0]) for group in manager.groups], [100, 10], "blocks that it comes with")
    peak = Memory(manager).through(seq, chunk)
    assert 110 <= peak <= most, f"{peak} blocks were in use at once, of {most}"
    seq.tokens.append(1)
    manager.free_out_of_window(seq)
    check_equal(manager.allocator.num_used, 100 + 4, "blocks in use behind the prompt: all in one group, a window in the other")


def test_a_prefix_ends_where_some_group_knows_no_more() -> None:
    """Blocks of 2, a window of 4: behind four blocks a token sees those at positions 5, 6 and 7. Then single blocks are lost.

    Why: found in one group and not in the other, a block's tokens would be skipped in layers that have no keys of them.
    """
    manager = HybridBlockManager(40, 2, windows=(None, 4), chunk=64)
    first = sequence(0, 9)
    begin(manager, first)
    Memory(manager).through(first, 64)
    full, sliding = (list(group.tables[0]) for group in manager.groups)
    manager.free(first)
    check_equal(manager._find(sequence(1, 9)), [full[:4], [NULL_BLOCK, NULL_BLOCK, *sliding[2:4]]], "what is found")
    check_equal(manager._find(sequence(1, 8)), [full[:3], [NULL_BLOCK, *sliding[1:3]]], "one token less: the last is computed")
    manager.prefix_cache.forget(sliding[0])
    check_equal(manager.num_cached_blocks(sequence(2, 9)), 4, "without block 0 in the window's group, which nobody sees")
    manager.prefix_cache.forget(sliding[3])
    check_equal(manager.num_cached_blocks(sequence(3, 9)), 3, "without block 3 there")
    manager.prefix_cache.forget(sliding[2])
    check_equal(manager._find(sequence(4, 9)), [[], []], "without block 2: behind 2 blocks block 0 is seen, behind 1 it is all")
    check_equal(manager.num_cached_blocks(sequence(5, [7, *range(1, 9)])), 0, "another first token")


def test_a_full_group_stops_at_its_first_gap() -> None:
    """The group without a window has lost block 1 of 5; the one with a window has all.

    Why: its layers see every token, so what lies behind the gap is worth nothing to them.
    """
    manager = HybridBlockManager(40, 2, windows=(4, None), chunk=64)
    first = sequence(0, 11)
    begin(manager, first)
    Memory(manager).through(first, 64)
    lost = manager.groups[1].tables[0][1]
    manager.free(first)
    manager.prefix_cache.forget(lost)
    check_equal([len(row) for row in manager._find(sequence(1, 11))], [1, 1], "blocks that are found in each group")


@pytest.mark.parametrize("caching", [False, True])
def test_who_reads_its_prompt_finds_nothing(caching: bool) -> None:
    """A sequence with log-probabilities of its prompt, and any sequence without a prefix cache: an empty row for each group.

    Why: every token of such a prompt has to be computed, and callers go through the groups and their rows together.
    """
    manager = HybridBlockManager(40, 2, enable_prefix_caching=caching, windows=(None, 3, None), chunk=64)
    first = sequence(0, 9)
    begin(manager, first)
    Memory(manager).through(first, 64)
    seq = sequence(1, 9, prompt_logprobs=1) if caching else sequence(1, 9)
    check_equal(manager._find(seq), [[], [], []], "what is found")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_found_is_what_a_search_finds(data: st.DataObject) -> None:
    """Any windows and block sizes; of a sequence of up to 24 tokens any blocks are forgotten.

    Why: a shortcut from the end or from the beginning is right for one kind of group and wrong for a mixture.
    """
    windows = tuple(data.draw(st.lists(st.sampled_from([None, 1, 2, 3, 5, 8, 30]), min_size=1, max_size=3)))
    size, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 24))
    manager = HybridBlockManager(200, size, windows=windows, chunk=64)
    first = sequence(0, length)
    begin(manager, first)
    Memory(manager).through(first, 64)
    tables = [list(group.tables[0]) for group in manager.groups]
    manager.free(first)
    for table in tables:
        for block in table:
            if data.draw(st.integers(0, 3)) == 0:
                manager.prefix_cache.forget(block)
    seq = sequence(1, list(range(data.draw(st.integers(1, length)))) + [99] * data.draw(st.integers(0, 3)))
    before, found = state(manager), manager._find(seq)
    count = known(manager, seq, windows)
    passed = [0 if window is None else max(0, count * size - window + 1) // size for window in windows]
    rows = [[NULL_BLOCK] * gone + table[gone:count] for table, gone in zip(tables, passed, strict=True)]
    check_equal(found, rows, "what is found")
    check_equal(state(manager), before, "blocks in use and free")


@pytest.mark.parametrize("reader", [False, True], ids=["freed", "in use"])
def test_what_fits_is_what_all_groups_need(reader: bool) -> None:
    """A prompt of 9 needs 5 blocks in each of two groups. 4 and 2 of them are cached, freed or in use; windows of 4.

    Why: a cached block in use costs nothing, one that waits in the free queue costs a free block as a new one does, and one
    that nobody sees costs nothing at all. Whoever counts wrong admits a sequence and then has no block for it.
    """
    manager = HybridBlockManager(24, 2, watermark=0.25, windows=(None, 4), chunk=16)
    first, memory = sequence(0, 9), Memory(manager)
    begin(manager, first)
    memory.through(first, 16)
    unseen, need = manager.groups[1].tables[0][0], 2 if reader else 8  # a new block in each group, and 4 + 2 that are cached
    if not reader:
        manager.free(first)
    while manager.allocator.num_free > need:
        manager.allocator.allocate()  # of those that are not cached: they are reused first
        free = manager.allocator.num_free
        check_equal(manager.can_allocate(sequence(2, 9), keep_watermark=False), True, f"whether it fits in {free} free blocks")
        check_equal(manager.can_allocate(sequence(2, 9)), free - need >= 6, f"the same, with the watermark of 6, in {free}")
    if reader:
        manager.allocator.allocate()
    else:
        manager.allocator.share(unseen)
    check_equal(manager.can_allocate(sequence(2, 9), keep_watermark=False), False, f"whether it fits in {need - 1}")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_fits_is_what_is_taken(data: st.DataObject) -> None:
    """Any windows, chunks and cached prefixes: a sequence fits in exactly so many free blocks as `allocate` then takes.

    Why: the question and the deed count with the same numbers, or a sequence is let in that has no room.
    """
    windows = tuple(data.draw(st.lists(st.sampled_from([None, 1, 3, 6, 30]), min_size=1, max_size=3)))
    size, chunk, length = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    manager = HybridBlockManager(150, size, windows=windows, chunk=chunk)
    first, seq = sequence(0, length), sequence(1, data.draw(st.integers(length, 40)))
    begin(manager, first)
    Memory(manager).through(first, chunk)
    manager.free(first)
    free, fits = manager.allocator.num_free, list[bool]()
    for watermark in range(free + 2):
        manager.watermark_blocks = watermark
        fits.append(manager.can_allocate(seq))
    begin(manager, seq)
    check_equal(
        fits.index(False) - 1, manager.allocator.num_free, "blocks that may stay free when it is let in, and those that do"
    )


def test_a_new_sequence_needs_its_first_blocks_in_every_group() -> None:
    """Nothing is cached. 30 tokens, blocks of 4, windows of 6 in two groups of three, chunks of 8: 8 + 4 + 4 blocks.

    Why: counted for one group, or for whole prompts in each, it is let in too early, or never.
    """
    for free, fits in ((15, False), (16, True), (17, True)):
        manager = HybridBlockManager(free, 4, 0, 0.0, windows=(6, None, 6), chunk=8)
        check_equal(manager.can_allocate(sequence(0, 30)), fits, f"whether it fits in {free} blocks")


@pytest.mark.parametrize("free", [0, 1, 2, 3])
def test_room_is_made_in_all_groups_or_in_none(free: int) -> None:
    """Three groups need a block each for the next token; so many are free.

    Why: asked one after the other, the first groups take what there is and the last one has nothing. The sequence is then
    preempted with blocks that nobody accounts for.
    """
    manager = HybridBlockManager(9 + free, 2, 0, 0.0, windows=(None, 8, None), chunk=4)
    seq, copies = sequence(0, 6), []
    begin(manager, seq)
    Memory(manager).through(seq, 4)
    check_equal(manager.allocator.num_free, free, "free blocks")
    seq.tokens.append(9)
    before = state(manager)
    check_equal(manager.append_slots(seq, 1, copies), free == 3, "whether there is room")
    check_equal(copies, [], "copies")
    if free < 3:
        check_equal(state(manager), before, "tables, references and free blocks")
    else:
        check_equal([len(group.tables[0]) for group in manager.groups], [4, 4, 4], "blocks in each group")


@pytest.mark.parametrize("free", [1, 2])
def test_what_one_group_has_is_not_the_others(free: int) -> None:
    """A prompt of 30 tokens, blocks of 4: the group without a window has all 8 blocks, that with one needs two more for the
    third chunk of 8; so many are free.

    Why: blocks that a group has in advance are its own. Taken off from what the others lack, they let a chunk in without room.
    """
    manager = HybridBlockManager(20, 4, 0, 0.0, windows=(None, 6), chunk=8)
    seq, memory = sequence(0, 30), Memory(manager)
    begin(manager, seq)
    memory.compute(seq, 8)
    memory.compute(seq, 8)
    manager.free_out_of_window(seq)
    check_equal([len(group.tables[0]) for group in manager.groups], [8, 4], "entries of each group's table")
    while manager.allocator.num_free > free:
        manager.allocator.allocate()
    before = state(manager)
    check_equal(manager.append_slots(seq, 8, []), free == 2, "whether there is room")
    if free < 2:
        check_equal(state(manager), before, "tables, references and free blocks")


@pytest.mark.parametrize("free", [2, 3, 4])
def test_a_copy_and_a_new_block_are_two(free: int) -> None:
    """A fork shares the half-full block of two groups and goes on over its end: a copy and a new block in each.

    Why: counted as one, there is room for the copies and none for what comes behind them.
    """
    manager = HybridBlockManager(4 + free, 4, 0, 0.0, windows=(None, 8), chunk=8)
    parent, child, memory = sequence(0, 6), sequence(1, 6), Memory(manager)
    begin(manager, parent)
    memory.through(parent, 8)
    manager.fork(parent, child, 6)
    child.num_computed_tokens = 6
    child.tokens += [50, 51, 52]
    before = state(manager)
    check_equal(memory.compute(child, 3), free == 4, "whether there is room")
    if free < 4:
        check_equal(state(manager), before, "tables, references and free blocks")


@pytest.mark.parametrize("free", [0, 1, 2])
def test_a_shared_block_needs_a_copy_in_every_group(free: int) -> None:
    """A fork shares the half-full block of two groups, and writes its next token; so many blocks are free.

    Why: the block is copied in each group, and a group that is forgotten writes into the other sequence's keys.
    """
    manager = HybridBlockManager(4 + free, 4, 0, 0.0, windows=(None, 8), chunk=8)
    parent, child, memory = sequence(0, 6), sequence(1, 6), Memory(manager)
    begin(manager, parent)
    memory.through(parent, 8)
    manager.fork(parent, child, 6)
    child.num_computed_tokens = 6
    child.tokens.append(50)
    before = state(manager)
    check_equal(memory.compute(child, 1), free == 2, "whether there is room")
    if free < 2:
        check_equal(state(manager), before, "tables, references and free blocks")
        return
    parent.tokens.append(60)
    check_equal(memory.compute(parent, 1), True, "whether the parent has room, in its own blocks")
    child.tokens.append(51)
    check_equal(memory.compute(child, 1), True, "whether the child goes on")


@pytest.mark.parametrize("seed", range(4))
def test_histories_of_sequences(seed: int) -> None:
    """Sequences with common beginnings come, compute chunks, and go, in little memory; every read is checked, in each group.

    Why: groups share one memory. A block that one of them frees is the next one's, and a stale entry of the cache hands a
    layer keys of another layer.
    """
    rng = random.Random(seed)
    windows = rng.choice([(None, 3), (5, None, 5), (4, 4), (2, None)])
    manager = HybridBlockManager(rng.randint(30, 50), rng.randint(1, 4), 0, 0.0, windows=windows, chunk=6)
    memory, running, common, hits = Memory(manager), list[Sequence](), [rng.randrange(50) for _ in range(16)], 0
    for number in range(60):
        seq = sequence(number, common[: rng.randint(0, 16)] + [rng.randrange(50) for _ in range(rng.randint(1, 8))])
        if manager.can_allocate(seq, keep_watermark=False):
            hits += begin(manager, seq) > 0
            manager.check_invariants()
            running.append(seq)
        for each in list(running):
            if not left(each) or not memory.compute(each, min(6, left(each))):
                manager.free(each)
                running.remove(each)
    for each in running:
        manager.free(each)
    check_equal(manager.allocator.num_used, 0, "blocks in use when all have gone")
    assert hits > 5, "hardly anything was found in the cache: the test is about that"
