"""Task 1.3: sequences share blocks, and copy one only when they are about to write into it."""

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

B = 4
"""Block size of the examples."""


def sequence(seq_id: int, length: int, computed: int = 0, first: int = 0) -> Sequence:
    """A sequence of `length` tokens counting up from `first`, of which `computed` are in the KV cache."""
    seq = Sequence(seq_id, list(range(first, first + length)), SamplingParams())
    seq.num_computed_tokens = computed
    return seq


def running(num_blocks: int, length: int, **settings: int) -> tuple[BlockManager, Sequence]:
    """A manager and one running sequence, id 0, all of whose `length` tokens are computed."""
    manager = BlockManager(num_blocks, B, **{"enable_prefix_caching": False, **settings})
    parent = sequence(0, length)
    manager.allocate(parent)
    parent.num_computed_tokens = length
    manager.take_changed()
    return manager, parent


def forked(manager: BlockManager, parent: Sequence, num_tokens: int, seq_id: int = 1) -> Sequence:
    """A child that shares the first `num_tokens` tokens. As in the engine it knows one more, which it computes itself."""
    child = sequence(seq_id, num_tokens + 1)
    manager.fork(parent, child, num_tokens)
    child.num_computed_tokens = num_tokens
    return child


def references(manager: BlockManager, seq_id: int) -> list[int]:
    return [manager.allocator.ref_counts[block] for block in manager.tables[seq_id]]


def test_a_fork_costs_no_memory() -> None:
    """After a fork both tables name the same blocks, each with two references, and not one more block is in use.

    Why: n answers to one prompt need the prompt's memory once. For a prompt of 2,000 tokens of LLaMA-7B that is 1 GB for each
    further answer saved.
    """
    manager, parent = running(8, 6)
    before = list(manager.tables[0])
    forked(manager, parent, 6)
    check_equal(manager.tables[1], before, "table of the child")
    check_equal(manager.tables[0], before, "table of the parent")
    check_equal(references(manager, 0), [2, 2], "references to the blocks")
    check_equal(manager.allocator.num_used, 2, "used blocks")
    check_equal(manager.take_changed(), {1}, "sequences with a changed table")
    manager.check_invariants()


@pytest.mark.parametrize(("num_tokens", "shared"), [(1, 1), (3, 1), (4, 1), (5, 2), (7, 2), (8, 2), (9, 3), (13, 4)])
def test_a_fork_takes_only_the_blocks_of_its_tokens(num_tokens: int, shared: int) -> None:
    """A child that shares the first n of 13 tokens holds the first ceil(n / 4) blocks and no others.

    Why: the parent may be far ahead. Blocks of its own answer are not the child's, and holding them would keep them from
    being freed and make the parent copy for nothing.
    """
    manager, parent = running(8, 13)
    forked(manager, parent, num_tokens)
    check_equal(manager.tables[1], manager.tables[0][:shared], f"table of a child that shares {num_tokens} tokens")
    check_equal(references(manager, 0), [2] * shared + [1] * (4 - shared), "references to the parent's blocks")
    manager.check_invariants()


def test_the_child_copies_before_it_writes() -> None:
    """The child's first token goes into a copy of the shared last block; the full block stays shared.

    Why: parent and child write different tokens at the same position. In one block the second would overwrite the first.
    """
    manager, parent = running(8, 6)
    full, partial = manager.tables[0]
    child = forked(manager, parent, 6)
    manager.take_changed()
    copies = [(7, 5)]
    check_equal(manager.append_slots(child, 1, copies), True, "append_slots, with blocks free")
    own = manager.tables[1][1]
    check_equal(manager.tables[0], [full, partial], "table of the parent")
    check_equal(manager.tables[1][0], full, "first block of the child")
    assert own not in (full, partial), "the child writes into a block that the parent holds"
    check_equal(copies, [(7, 5), (partial, own)], "blocks to copy, after one that was in the list before")
    check_equal((references(manager, 0), references(manager, 1)), ([2, 1], [2, 1]), "references: parent's, child's")
    check_equal(manager.take_changed(), {1}, "sequences with a changed table")
    manager.check_invariants()


def test_the_parent_copies_before_it_writes() -> None:
    """If the parent is the first to write, it is the parent that gets the copy, and the child keeps the old block.

    Why: "parent" says who was there first, not who owns the block. Whoever writes first must leave the shared one alone.
    """
    manager, parent = running(8, 6)
    full, partial = manager.tables[0]
    forked(manager, parent, 6)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(parent, 1, copies), True, "append_slots, with blocks free")
    check_equal(manager.tables[1], [full, partial], "table of the child")
    check_equal(copies, [(partial, manager.tables[0][1])], "blocks to copy")
    assert manager.tables[0][1] != partial, "the parent still writes into the shared block"
    manager.check_invariants()


def test_the_last_one_to_hold_a_block_does_not_copy() -> None:
    """Of three sequences that share a block the first two to write copy it; the third writes into the original.

    Why: once a block is held by one sequence alone, a copy is a block and a memory transfer for nothing.
    """
    manager, parent = running(8, 6)
    partial = manager.tables[0][1]
    children = [forked(manager, parent, 6, seq_id) for seq_id in (1, 2)]
    check_equal(references(manager, 0), [3, 3], "references with two children")
    copies: list[tuple[int, int]] = []
    for seq, left in ((children[0], 2), (parent, 1), (children[1], 1)):
        check_equal(manager.append_slots(seq, 1, copies), True, "append_slots, with blocks free")
        check_equal(manager.allocator.ref_counts[partial], left, "references to the shared last block")
        manager.check_invariants()
    check_equal(copies, [(partial, manager.tables[1][1]), (partial, manager.tables[0][1])], "blocks to copy")
    check_equal(manager.tables[2][1], partial, "last block of the third")
    check_equal(manager.allocator.num_used, 4, "used blocks: one common, three own")


@pytest.mark.parametrize("length", [7, 8, 9])
def test_a_second_answer_to_a_prompt(length: int) -> None:
    """The engine's way to n = 2: the parent has computed a prompt of 7, 8 or 9 tokens, and the child shares all but the last.

    Why: these lengths stand beside and on the edge of a block, where a child that is one token longer than what it shares is
    easily given a block too many, which is then copied for nothing.
    """
    manager, parent = running(8, length)
    table = list(manager.tables[0])
    child = forked(manager, parent, length - 1)
    check_equal(manager.tables[1], table[:2], "table of the child, which shares 6, 7 or 8 tokens")
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(child, 1, copies), True, "append_slots, with blocks free")
    sources = {7: [table[1]], 8: [table[1]], 9: []}[length]
    check_equal([source for source, _ in copies], sources, "blocks that are copied")
    check_equal(len(manager.tables[1]), len(table), "blocks of the child")
    check_equal(manager.allocator.num_used, len(table) + 1, "used blocks")
    manager.check_invariants()


def test_a_copied_block_is_still_found() -> None:
    """When the block that is copied is a full one of the prefix cache, the cache keeps it, and the copy has no entry.

    Why: that is every prompt that ends with a block, and is asked for two answers: the child writes the last position again.
    The next one with this prompt should still find all of it.
    """
    manager, parent = running(8, 8, enable_prefix_caching=True)
    manager.cache_full_blocks(sequence(0, 8), 8)
    table = list(manager.tables[0])
    child = forked(manager, parent, 7)
    copies: list[tuple[int, int]] = []
    manager.append_slots(child, 1, copies)
    check_equal([source for source, _ in copies], [table[1]], "blocks that are copied")
    check_equal(manager.prefix_cache.match(sequence(5, 9)), table, "cached blocks of a prompt with the same 8 tokens")
    check_equal(copies[0][1] in manager.prefix_cache, False, "the copy is in the prefix cache")
    manager.check_invariants()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_copy_takes_the_place_of_its_source(index: int) -> None:
    """A shared block in the beginning, the middle or at the end of a table is replaced where it stands; the others stay.

    Why: blocks that were given in advance follow the one that is written. Their places are what the positions of the
    sequence point to.
    """
    manager = BlockManager(6, B, enable_prefix_caching=False)
    seq = sequence(0, 12, computed=index * B + 1)
    manager.allocate(seq)
    before = list(manager.tables[0])
    manager.allocator.share(before[index])
    manager.tables[1] = [before[index]]
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(seq, 1, copies), True, "append_slots, with blocks free")
    after = manager.tables[0]
    check_equal(copies, [(before[index], after[index])], "blocks to copy")
    assert after[index] not in before, "the copy is a block that the table had before"
    check_equal([after[i] for i in range(3) if i != index], [before[i] for i in range(3) if i != index], "the other blocks")
    check_equal(len(after), 3, "blocks in the table")
    manager.check_invariants()


@pytest.mark.parametrize("num_tokens", [4, 8])
def test_a_fork_at_a_block_boundary_copies_nothing(num_tokens: int) -> None:
    """When all shared blocks are full, the child's first token begins a block of its own, without a copy.

    Why: full blocks are never written again, so they can be shared for ever.
    """
    manager, parent = running(8, 9)
    child = forked(manager, parent, num_tokens)
    copies: list[tuple[int, int]] = []
    check_equal(manager.append_slots(child, 1, copies), True, "append_slots, with blocks free")
    check_equal(copies, [], "blocks to copy")
    shared = num_tokens // B
    check_equal(manager.tables[1][:shared], manager.tables[0][:shared], "the shared blocks")
    assert manager.tables[1][shared] not in manager.tables[0], "the child's new block is one of the parent's"
    manager.check_invariants()


def test_tables_are_lists_of_their_own() -> None:
    """When the child grows by several blocks, the parent's table stays what it was.

    Why: assigning a list does not copy it. With one list under two names, every token of the child would move the parent's.
    """
    manager, parent = running(8, 8)
    before = list(manager.tables[0])
    child = forked(manager, parent, 8)
    manager.append_slots(child, 6, [])
    check_equal(manager.tables[0], before, "table of the parent")
    check_equal(len(manager.tables[1]), 4, "blocks of the child, for 8 + 6 tokens")
    manager.check_invariants()


@pytest.mark.parametrize(("num_tokens", "new"), [(1, 0), (2, 0), (3, 1), (6, 1), (7, 2)])
def test_a_copy_and_new_blocks_in_one_step(num_tokens: int, new: int) -> None:
    """A child that writes n tokens after 6 shared ones gets one copy and the new blocks that it needs, and it is refused when
    one free block too few is there.

    Why: what is counted before must be what is taken afterwards. A block too few is noticed when half of it is done, and with
    one too many a sequence is preempted for nothing.
    """
    for free, fits in ((new + 1, True), (new, False)):
        manager, parent = running(2 + free, 6)
        child = forked(manager, parent, 6)
        table, queue = list(manager.tables[1]), manager.allocator.free_blocks()
        copies: list[tuple[int, int]] = []
        check_equal(manager.append_slots(child, num_tokens, copies), fits, f"append_slots with {free} free blocks")
        if fits:
            check_equal(copies, [(table[1], manager.tables[1][1])], "blocks to copy")
            check_equal(len(manager.tables[1]), 2 + new, f"blocks of the child, for 6 + {num_tokens} tokens")
        else:
            check_equal((manager.tables[1], copies), (table, []), "table and copies, unchanged")
            check_equal(manager.allocator.free_blocks(), queue, "free queue, unchanged")
        manager.check_invariants()


def test_who_leaves_first_takes_nothing_along() -> None:
    """Parent and child can be freed in either order; a block is free when both are gone.

    Why: clients disconnect when they like. The answers that go on must keep the prompt they read.
    """
    for first, second in ((0, 1), (1, 0)):
        manager, parent = running(4, 8)
        sequences = [parent, forked(manager, parent, 7)]
        manager.free(sequences[first])
        check_equal(references(manager, second), [1, 1], "references to the blocks of the one who stays")
        copies: list[tuple[int, int]] = []
        manager.append_slots(sequences[second], 1, copies)
        check_equal(copies, [], "blocks to copy for the one who stays")
        manager.free(sequences[second])
        check_equal(manager.allocator.num_used, 0, "used blocks when both are gone")
        manager.check_invariants()


def test_what_left_the_window_is_not_shared() -> None:
    """With a sliding window, a NULL_BLOCK in the parent's table becomes one in the child's and gets no reference.

    Why: NULL_BLOCK is -1, which Python takes for the last block. Counting a reference there keeps a block of somebody else's
    from ever being freed.
    """
    manager, parent = running(8, 14, sliding_window=5)
    manager.free_out_of_window(parent)
    table = list(manager.tables[0])
    check_equal([block == NULL_BLOCK for block in table], [True, True, False, False], "blocks that left the window of 5")
    child = forked(manager, parent, 14)
    check_equal(manager.tables[1], table, "table of the child")
    check_equal([manager.allocator.ref_counts[block] for block in table[2:]], [2, 2], "references to the blocks in the window")
    check_equal(manager.allocator.num_used, 2, "used blocks")
    manager.check_invariants()
    manager.free_out_of_window(child)  # finds nothing more to free
    check_equal(manager.tables[1], table, "table of the child")
    manager.free(parent)
    manager.free(child)
    check_equal(manager.allocator.num_used, 0, "used blocks when both are gone")


def test_a_copy_does_not_keep_the_name_of_what_it_overwrites() -> None:
    """The block that receives a copy is no longer found by what it held before.

    Why: every way in which a block gets new content must drop its old entry in the prefix cache, this one too; `_new_blocks`
    does it.
    """
    manager, parent = running(4, 4, enable_prefix_caching=True)
    old = sequence(5, 12, first=100)
    manager.allocate(old)
    manager.cache_full_blocks(old, 12)
    manager.free(old)  # all free blocks are cached now
    parent.tokens.append(50)
    manager.append_slots(parent, 1, [])
    parent.num_computed_tokens = 5
    check_equal(len(manager.prefix_cache), 2, "cached blocks before the copy")
    child = forked(manager, parent, 5)
    copies: list[tuple[int, int]] = []
    manager.append_slots(child, 1, copies)
    check_equal(len(copies), 1, "blocks to copy")
    check_equal(len(manager.prefix_cache), 1, "cached blocks after the copy took one")
    assert copies[0][1] not in manager.prefix_cache, "the copy is still known as what the block held before"
    manager.check_invariants()


class TreeOfSequences(RuleBasedStateMachine):
    """Sequences fork and write at random into a memory that is a dictionary: slot → token."""

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(12, 3, enable_prefix_caching=False)
        self.memory: dict[int, int] = {}
        self.sequences: dict[int, Sequence] = {}
        self.next_id = 0
        self.next_token = 1000

    def new_id(self) -> int:
        self.next_id += 1
        return self.next_id - 1

    def pick(self, choice: int) -> Sequence:
        return self.sequences[sorted(self.sequences)[choice % len(self.sequences)]]

    def write(self, seq: Sequence, count: int) -> None:
        """What a step does: get slots, copy blocks, store the tokens."""
        copies: list[tuple[int, int]] = []
        if not self.manager.append_slots(seq, count, copies):
            return
        read = {target * 3 + i: self.memory.get(source * 3 + i, 0) for source, target in copies for i in range(3)}
        self.memory |= read
        start = seq.num_computed_tokens
        for slot in slots(self.manager, seq, start, start + count):
            seq.tokens.append(self.next_token)
            self.memory[slot] = self.next_token
            self.next_token += 1
        seq.num_computed_tokens = len(seq.tokens)

    @precondition(lambda self: not self.sequences)
    @rule()
    def come(self) -> None:
        root = sequence(self.new_id(), 0)
        self.manager.allocate(root)
        self.sequences[root.seq_id] = root
        self.write(root, 5)

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 9), back=st.integers(0, 4))
    def fork(self, choice: int, back: int) -> None:
        parent = self.pick(choice)
        length = max(1, parent.num_computed_tokens - back)
        child = sequence(self.new_id(), 0)
        child.tokens = parent.tokens[:length]
        child.num_computed_tokens = length
        self.manager.fork(parent, child, length)
        self.sequences[child.seq_id] = child

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 9), count=st.integers(1, 4))
    def grow(self, choice: int, count: int) -> None:
        self.write(self.pick(choice), count)

    @precondition(lambda self: self.sequences)
    @rule(choice=st.integers(0, 9))
    def go(self, choice: int) -> None:
        seq = self.pick(choice)
        self.manager.free(self.sequences.pop(seq.seq_id))

    @invariant()
    def everyone_reads_what_it_wrote(self) -> None:
        for seq in self.sequences.values():
            read = [self.memory[slot] for slot in slots(self.manager, seq, 0, seq.num_computed_tokens)]
            check_equal(read, seq.tokens, f"tokens of sequence {seq.seq_id} in memory")
        self.manager.check_invariants()


def test_everyone_reads_its_own_tokens_whatever_the_others_do() -> None:
    """Sequences fork, write and leave in random order; each always finds exactly its own tokens in its slots.

    Why: this is what copy-on-write is for. A forgotten copy shows as one answer with the words of another.
    """
    run_state_machine_as_test(TreeOfSequences, settings=SEARCH)
