"""Block tables of models whose layers differ in their window: one block manager for each group of layers, over one memory.

Layers with a window and layers without hold their blocks in groups of their own, so a window costs a window: what falls out of
it is freed in its groups alone. All groups have as many layers, so a block is as large in each, and whoever needs one takes it
from the same free queue. Blocks are cached by group, too. A prefix counts as known as far as all groups still have what a token
behind it would see.

Groups without a window hold all tokens of a sequence from its admission on, as `BlockManager` does. Those with one get blocks
as the prompt is computed, chunk by chunk, or a long prompt would take memory for tokens that nobody will see together.
Source: vLLM's hybrid KV cache manager (``v1/core/kv_cache_coordinator.py``).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping

from ..batching.scheduler_output import BlockPairs
from ..batching.sequence import Sequence
from ..memory.prefix_cache import PrefixCache
from .block_manager import NULL_BLOCK, BlockManager
from .radix_manager import RadixBlockManager


def blocks_of_one(windows: tuple[int | None, ...], num_tokens: int, block_size: int, chunk: int) -> int:
    """Most blocks that a sequence of so many tokens holds at once, in all groups of layers, of which these are the windows.

    With one kind of layer it comes with blocks for all its tokens. A step computes at most `chunk` tokens of it.
    """
    whole = -(-num_tokens // block_size)
    if len(windows) == 1:
        return whole
    return sum(whole if window is None else min(whole, (window + chunk) // block_size + 2) for window in windows)


def with_one_more(windows: tuple[int | None, ...]) -> tuple[int | None, ...]:
    """The windows with a token more: a model that drafts is one behind where all that it drafted is right, and still reads what
    the target has just left."""
    return tuple(window if window is None else window + 1 for window in windows)


def longest_of_one(windows: tuple[int | None, ...], num_blocks: int, block_size: int, chunk: int) -> int:
    """Tokens, in whole blocks, of the longest sequence that so many blocks hold; as in `blocks_of_one`."""
    lengths = range(0, (num_blocks + 1) * block_size, block_size)
    return lengths[bisect_right(lengths, num_blocks, key=lambda n: blocks_of_one(windows, n, block_size, chunk)) - 1]


def make_block_manager(
    windows: tuple[int | None, ...], num_blocks: int, block_size: int, num_host_blocks: int, caches: bool, chunk: int,
    radix: bool = False,
) -> BlockManager:  # fmt: skip
    """The block manager of a model with these windows of its groups of layers, or of one without any and a `RadixCache`; the
    rest as in `HybridBlockManager`."""
    sizes = num_blocks, block_size, num_host_blocks
    if radix:
        return RadixBlockManager(*sizes)
    if len(windows) == 1:
        return BlockManager(*sizes, enable_prefix_caching=caches, sliding_window=windows[0])
    return HybridBlockManager(*sizes, enable_prefix_caching=caches, windows=windows, chunk=chunk)


class GroupCache(PrefixCache):
    """The part of a prefix cache that one group sees; the maps are the whole cache's, so any group's block can be forgotten."""

    def __init__(self, whole: PrefixCache, group: int) -> None:
        super().__init__(whole.block_size)
        self._block_of, self._hash_of = whole._block_of, whole._hash_of
        self._suffix = group.to_bytes(4, "big")

    def insert(self, block_hash: bytes, block: int) -> None:
        super().insert(block_hash + self._suffix, block)

    def find(self, block_hash: bytes) -> int | None:
        """The group's block with this hash, if there is one."""
        return self._block_of.get(block_hash + self._suffix)


class Tables(Mapping[int, list[int]]):
    """seq_id → the blocks of all groups, one group behind the other, each as many."""

    def __init__(self, groups: list[dict[int, list[int]]]) -> None:
        self._groups = groups

    def __getitem__(self, seq_id: int) -> list[int]:
        tables = [group[seq_id] for group in self._groups]
        longest = max(map(len, tables))
        return [block for table in tables for block in (*table, *[NULL_BLOCK] * (longest - len(table)))]

    def __iter__(self) -> Iterator[int]:
        return iter(self._groups[0])

    def __len__(self) -> int:
        return len(self._groups[0])


class HybridBlockManager(BlockManager):
    """A `BlockManager` for each group, asked together: a sequence has its blocks in all of them, or in none.

    Args:
        windows: of each group. chunk: most tokens that a step computes of a sequence. The rest: as of `BlockManager`.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int = 0, watermark: float = 0.01,
        enable_prefix_caching: bool = True, windows: tuple[int | None, ...] = (None,), chunk: int = 1,
    ) -> None:  # fmt: skip
        sliding = next((window for window in windows if window is not None), None)
        super().__init__(num_blocks, block_size, num_host_blocks, watermark, enable_prefix_caching, sliding)
        self.chunk = chunk
        self.groups = [BlockManager(num_blocks, block_size, num_host_blocks, watermark, False, window) for window in windows]
        self._caches: list[GroupCache] = []
        for index, group in enumerate(self.groups):
            group.allocator, group.host_allocator = self.allocator, self.host_allocator
            if self.prefix_cache is not None:
                self._caches.append(GroupCache(self.prefix_cache, index))
                group.prefix_cache = self._caches[-1]
        self.tables = Tables([group.tables for group in self.groups])  # type: ignore[assignment]
        self.host_tables = Tables([group.host_tables for group in self.groups])  # type: ignore[assignment]

    # Questions

    def can_allocate(self, seq: Sequence, keep_watermark: bool = True) -> bool:
        """Whether what a waiting sequence comes with fits, in all groups together, with the watermark left over if it is to be
        kept.

        That is `_num_first` blocks in each group, of which those that `_find` gives need no new one. But a cached block that
        waits in the free queue takes a free one when it is used, and a `NULL_BLOCK` takes none.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.7: HybridBlockManager.can_allocate, see stages/stage1_block_management/GUIDE.md#task-1-7"
        )

    def num_cached_blocks(self, seq: Sequence) -> int:
        return len(self._find(seq)[0])

    def holds(self, seq: Sequence, num_tokens: int) -> bool:
        return all(group.holds(seq, num_tokens) for group in self.groups)

    def can_fork(self, keep_watermark: bool = True) -> bool:
        return self._fits(len(self.groups), keep_watermark)

    def can_swap_out(self, seq: Sequence) -> bool:
        if self.host_allocator is None:
            return False
        count = self.num_blocks_for(seq.num_computed_tokens)
        tables = [group.tables[seq.seq_id][:count] for group in self.groups]
        return sum(len(table) - table.count(NULL_BLOCK) for table in tables) <= self.host_allocator.num_free

    def can_swap_in(self, seq: Sequence, keep_watermark: bool = True) -> bool:
        num_new = 0
        for group in self.groups:
            num_expired = group.host_tables.get(seq.seq_id, []).count(NULL_BLOCK)
            num_new += self._num_first(group, seq, seq.num_computed_tokens) - num_expired
        return self._fits(num_new, keep_watermark)

    def _num_first(self, group: BlockManager, seq: Sequence, num_computed: int) -> int:
        """Blocks of one group that a sequence comes with, counted from its first token on, so with those that the window has
        left behind.

        Without a window they hold all its tokens. With one they hold what is computed, or a window if that is more, and the
        `chunk` of a step behind it, but no more than all tokens: what comes after that is appended as it is computed, and no
        step of the prompt needs more at once than the one that begins a window behind the first token.

        Args:
            num_computed: tokens whose keys and values are in the cache already, in whole blocks or not.
        """
        # Hint: Write the table of each group below the other: positions in columns, a cross where the window has
        # passed. What must be there for the next token, and what for a newcomer's?
        raise NotImplementedError(
            "Stage 1 · Task 1.7: HybridBlockManager._num_first, see stages/stage1_block_management/GUIDE.md#task-1-7"
        )

    def _find(self, seq: Sequence) -> list[list[int]]:
        """The cached blocks that a waiting sequence begins with: those of its longest prefix of whole blocks that every group
        knows.

        A group knows a prefix if it has, in its own of `_caches`, each block that the token behind the prefix sees there: all
        of them without a window, those from `_left` on with one. That token has to be computed, so the prefix ends before the
        last one of the sequence.

        Returns:
            A row for each group, all of the same length: its blocks, and `NULL_BLOCK` for each that the window has left behind,
            whether it is cached or not. Empty rows if nothing is known, or the sequence does not look blocks up.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.7: HybridBlockManager._find, see stages/stage1_block_management/GUIDE.md#task-1-7"
        )

    def _by_group(self, rows: list[list[int | None]]) -> Iterator[tuple[BlockManager, list[int | None]]]:
        return zip(self.groups, rows, strict=True)

    def _left(self, group: BlockManager, num_blocks: int) -> int:
        """The first block that the token behind so many blocks sees."""
        return group._num_out_of_window(num_blocks * self.block_size)

    # A sequence's life

    def begin_step(self) -> None:
        for group in self.groups:
            group.begin_step()
        self.filling.clear()

    def allocate(self, seq: Sequence) -> int:
        hits = self._find(seq)
        num_cached = len(hits[0]) * self.block_size
        for row in hits:  # before any block is taken, or one of them might be
            for block in row:
                if block != NULL_BLOCK:
                    self.allocator.share(block)
        for group, row in zip(self.groups, hits, strict=True):
            group._set_table(seq, row + group._new_blocks(self._num_first(group, seq, num_cached) - len(row)))
        if self.prefix_cache is not None and self._looks_up(seq) and seq.num_preemptions == 0:
            self.prefix_cache.record(len(seq.tokens), num_cached)
        return num_cached

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        for group in self.groups:
            group.fork(parent, child, num_tokens)

    def append_slots(self, seq: Sequence, num_tokens: int, copies: BlockPairs) -> bool:
        """Make sure of slots as `BlockManager.append_slots` does, in all groups or in none.

        Returns:
            False, with nothing changed in any group, when there are too few free blocks for all groups together. Each needs its
            new blocks, and one more where the first block to be written is shared.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.7: HybridBlockManager.append_slots, see stages/stage1_block_management/GUIDE.md#task-1-7"
        )

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        end = self.num_blocks_for(len(seq.tokens) + num_tokens)
        missing = sum(max(0, end - len(group.tables[seq.seq_id])) for group in self.groups)
        if not self._fits(missing, keep_watermark=True):
            return False
        for group in self.groups:
            group.extend(seq, num_tokens)
        return True

    def cache_full_blocks(self, seq: Sequence, num_tokens: int) -> None:
        for group in self.groups:
            group.cache_full_blocks(seq, num_tokens)
            self.filling |= group.filling

    def free_out_of_window(self, seq: Sequence) -> None:
        for group in self.groups:
            group.free_out_of_window(seq)

    def free(self, seq: Sequence) -> None:
        for group in self.groups:
            group.free(seq)

    def swap_out(self, seq: Sequence) -> BlockPairs:
        self.free_out_of_window(seq)  # or it would come back with more than fits: see `blocks_of_one`
        return [pair for group in self.groups for pair in group.swap_out(seq)]

    def swap_in(self, seq: Sequence) -> BlockPairs:
        assert self.host_allocator is not None  # or nothing was swapped out
        pairs: BlockPairs = []
        for group in self.groups:
            host_table = group.host_tables.pop(seq.seq_id)
            table = [NULL_BLOCK if block == NULL_BLOCK else group._new_blocks(1)[0] for block in host_table]
            moved = [pair for pair in zip(host_table, table, strict=True) if pair[0] != NULL_BLOCK]
            for block, _ in moved:
                self.host_allocator.free(block)
            pairs += moved
            more = self._num_first(group, seq, seq.num_computed_tokens) - len(table)
            group._set_table(seq, table + group._new_blocks(more))
        return pairs

    # For the step that runs

    def take_changed(self) -> set[int]:
        return set().union(*(group.take_changed() for group in self.groups))

    def check_invariants(self) -> None:
        """Reference counts equal the tables of all groups that hold a block, which hold the same sequences.

        Raises:
            AssertionError: names the block that breaks the rule.
        """
        for allocator, name in ((self.allocator, "tables"), (self.host_allocator, "host_tables")):
            tables = [getattr(group, name) for group in self.groups]
            assert all(each.keys() == tables[0].keys() for each in tables), "a sequence has blocks in some groups alone"
            if allocator is None:
                assert not tables[0]
                continue
            allocator.check_invariants()
            rows = (row for each in tables for row in each.values())
            held = Counter(block for row in rows for block in row if block != NULL_BLOCK)
            for block, count in enumerate(allocator.ref_counts):
                assert count == held[block], f"block {block} has {count} references but stands in {held[block]} tables"
        assert not self.tables.keys() & self.host_tables.keys(), "a sequence is on the device and on the host"
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()
