"""Block tables: which KV blocks each sequence owns, shares, copies before writing, or has moved to host memory.

The allocator below knows blocks, this file knows sequences. Nothing here touches a tensor: moves of data are returned as
pairs of block ids, and whoever owns the cache performs them before the step runs.
Source: PagedAttention, SOSP 2023, §4.3 (block tables), §4.4 (sharing, copy-on-write), §4.5 (swapping).
"""

from __future__ import annotations

from collections import Counter

from ..batching.scheduler_output import BlockPairs
from ..batching.sequence import Sequence
from ..memory.block_allocator import BlockAllocator
from ..memory.prefix_cache import PrefixCache

NULL_BLOCK = -1
"""Stands in a block table where a block has left the sliding window; nothing may read it."""


class BlockManager:
    """Gives every sequence the slots that its tokens need. Token p of a sequence lies in slot
    ``table[p // block_size] * block_size + p % block_size``.

    Args:
        num_blocks: blocks in device memory. num_host_blocks: blocks in host memory, for swapping.
        block_size: tokens in a block.
        watermark: share of the blocks that stays free when a sequence is admitted beside others, so that those running
            can grow for a while before anyone is preempted.
        enable_prefix_caching: find and share blocks by content.
        sliding_window: tokens that a token of the model can see, itself included; blocks behind it are freed.
    """

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int = 0, watermark: float = 0.01,
        enable_prefix_caching: bool = True, sliding_window: int | None = None,
    ) -> None:  # fmt: skip
        if block_size < 1:
            raise ValueError(f"block_size must be at least 1, got {block_size}")
        self.block_size = block_size
        self.watermark_blocks = int(watermark * num_blocks)
        self.sliding_window = sliding_window
        self.allocator = BlockAllocator(num_blocks)
        self.host_allocator = BlockAllocator(num_host_blocks) if num_host_blocks else None
        self.prefix_cache = PrefixCache(block_size) if enable_prefix_caching else None
        self.tables: dict[int, list[int]] = {}
        """seq_id → device blocks, of every sequence that is running."""
        self.host_tables: dict[int, list[int]] = {}
        """seq_id → host blocks, of every sequence that is swapped out."""
        self.filling: set[int] = set()
        """Blocks that the prefix cache was told of since `begin_step`: the step computes them, so until it has run they hold
        nothing that could be copied."""
        self._num_expired: dict[int, int] = {}
        self._changed: set[int] = set()

    # Questions

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        # Hint: Position p lies in block table[p // block_size] at offset p % block_size. Helpers below do the rest:
        # `_match` asks the cache, `_new_blocks` takes blocks, `_set_table` enters a table.
        raise NotImplementedError(
            "Stage 1 · Task 1.2: BlockManager.num_blocks_for, see stages/stage1_block_management/GUIDE.md#task-1-2"
        )

    @property
    def usage(self) -> float:
        """Share of the blocks that some sequence holds, 0 to 1."""
        return self.allocator.num_used / self.allocator.num_blocks

    def can_allocate(self, seq: Sequence, keep_watermark: bool = True) -> bool:
        """Whether all tokens of a waiting sequence fit, with the watermark left over if it is to be kept.

        Blocks that the prefix cache has need no new one, unless they wait in the free queue: to use those takes a free block.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager.can_allocate, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    def num_cached_blocks(self, seq: Sequence) -> int:
        """How many blocks of a waiting sequence's beginning the prefix cache has at this moment."""
        return len(self._match(seq))

    def holds(self, seq: Sequence, num_tokens: int) -> bool:
        """Whether a sequence has, computed and not yet left behind by the window, all that a fork at position `num_tokens`
        would read.

        The fork writes into the block of that position, so the block is copied before the step runs. A block that this very
        step fills is no such source, although a sequence that was admitted with it counts its tokens as computed.
        """
        if seq.seq_id not in self.tables or seq.num_computed_tokens < num_tokens:
            return False
        if num_tokens % self.block_size and self.tables[seq.seq_id][num_tokens // self.block_size] in self.filling:
            return False
        return self._num_expired.get(seq.seq_id, 0) <= self._num_out_of_window(num_tokens)

    def can_fork(self, keep_watermark: bool = True) -> bool:
        """Whether a fork can be given the one block it needs for its first own token."""
        return self._fits(1, keep_watermark)

    def can_swap_out(self, seq: Sequence) -> bool:
        """Whether host memory has room for what is computed of a running sequence; a `NULL_BLOCK` takes none."""
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager.can_swap_out, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    def can_swap_in(self, seq: Sequence, keep_watermark: bool = True) -> bool:
        """Whether a swapped-out sequence fits with all its tokens, with the watermark left over if it is to be kept; a
        `NULL_BLOCK` of its host table needs no block."""
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager.can_swap_in, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    def _fits(self, num_blocks: int, keep_watermark: bool) -> bool:
        """Whether `num_blocks` can be taken from the free blocks, with the watermark left over if it is to be kept."""
        # Hint: All questions come down to one comparison: blocks needed, plus the watermark if it is kept, against the
        # free ones. Write `_fits` first.
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager._fits, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    def _looks_up(self, seq: Sequence) -> bool:
        """Whether a sequence may find blocks: log-probabilities of the prompt, say, need logits that these would skip."""
        return self.prefix_cache is not None and not seq.params.reads_prompt

    def _match(self, seq: Sequence) -> list[int]:
        """The cached blocks that a waiting sequence begins with; none if it does not look them up."""
        return self.prefix_cache.match(seq) if self.prefix_cache is not None and self._looks_up(seq) else []

    # A sequence's life

    def begin_step(self) -> None:
        """A new step is decided: the one before has run, and what it was to fill is filled."""
        self.filling.clear()

    def allocate(self, seq: Sequence) -> int:
        """Give a waiting sequence blocks for all its tokens: those that the prefix cache has (`_match`) shared, then new ones.

        The cache's counters take note (`record`) of a sequence that looks its blocks up (`_looks_up`), and comes for the first
        time, not of one that was preempted.

        Returns:
            Number of tokens whose keys and values are in the cache already; a multiple of the block size.

        Raises:
            OutOfBlocksError: `can_allocate` was not asked.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.2: BlockManager.allocate, see stages/stage1_block_management/GUIDE.md#task-1-2"
        )

    def fork(self, parent: Sequence, child: Sequence, num_tokens: int) -> None:
        """Let `child` share the blocks that hold the first `num_tokens` tokens of `parent`; nothing is copied until one of
        them writes to a shared block. A `NULL_BLOCK`, which the window has left in the table, has nothing to share."""
        # Hint: A fork copies a list of block ids and counts references; not one key or value moves. Slicing a list
        # gives you a new one.
        raise NotImplementedError("Stage 1 · Task 1.3: BlockManager.fork, see stages/stage1_block_management/GUIDE.md#task-1-3")

    def append_slots(self, seq: Sequence, num_tokens: int, copies: BlockPairs) -> bool:
        """Make sure that a running sequence has slots of its own for the `num_tokens` tokens after the computed ones.

        A block that is to be written and that another table holds too is replaced by a copy (`_copy_on_write`); only the first
        one can be such a block. New blocks go to the end of the table, and a table that changed is noted in `_changed`.

        Args:
            copies: receives a (source, destination) pair when a shared block has to be copied before it is written.

        Returns:
            False, with nothing changed, when there are too few free blocks.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.2: BlockManager.append_slots, see stages/stage1_block_management/GUIDE.md#task-1-2"
        )

    def extend(self, seq: Sequence, num_tokens: int) -> bool:
        """Give a running sequence, all of whose tokens have slots, `num_tokens` more behind them, if the watermark stays free.

        Blocks are only added. Those that it has may be shared since they were given out, with sequences admitted in the same
        step, and are written for all of them.

        Returns:
            False, with nothing changed, when memory is short.
        """
        table = self.tables[seq.seq_id]
        num_new = max(0, self.num_blocks_for(len(seq.tokens) + num_tokens) - len(table))
        if not self._fits(num_new, keep_watermark=True):
            return False
        if num_new:
            table.extend(self._new_blocks(num_new))
            self._changed.add(seq.seq_id)
        return True

    def _copy_on_write(self, table: list[int], index: int) -> tuple[int, int]:
        """Put a new block in the place of a shared one, which loses this table's reference.

        Returns:
            (shared block, new block): the first is to be copied to the second before the step writes.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.3: BlockManager._copy_on_write, see stages/stage1_block_management/GUIDE.md#task-1-3"
        )

    def cache_full_blocks(self, seq: Sequence, num_tokens: int) -> None:
        """Enter the blocks that the next `num_tokens` tokens of a sequence will fill into the prefix cache.

        Called when the step is decided. A sequence admitted in the same step may share them at once, because a step writes
        all keys and values of a layer before it reads any. Moves come before that, so until the step has run nobody may copy
        these blocks (`filling`). One whose last token is not known yet (see `Lookahead`) is entered when it is.
        """
        if self.prefix_cache is None or seq.num_computed_tokens % self.block_size + num_tokens < self.block_size:
            return
        if seq.tokens[-1] < 0:
            return
        first = seq.num_computed_tokens // self.block_size
        last = (seq.num_computed_tokens + num_tokens) // self.block_size
        hashes = self.prefix_cache.block_hashes(seq, last)
        table = self.tables[seq.seq_id]
        for index in range(first, last):
            self.prefix_cache.insert(hashes[index], table[index])
            self.filling.add(table[index])

    def free_out_of_window(self, seq: Sequence) -> None:
        """Free the blocks that no token of the sequence will see again."""
        if self.sliding_window is None:
            return
        table = self.tables[seq.seq_id]
        expired = self._num_out_of_window(seq.num_computed_tokens)
        done = self._num_expired.get(seq.seq_id, 0)
        for index in range(done, expired):
            self._free_block(table[index])
            table[index] = NULL_BLOCK
        if expired > done:
            self._num_expired[seq.seq_id] = expired
            self._changed.add(seq.seq_id)

    def free(self, seq: Sequence) -> None:
        """Give back everything a sequence holds, here and on the host; a sequence that holds nothing is fine.

        The last block is freed first, so that the end of a prompt leaves the cache before its beginning.
        """
        for block in reversed(self.tables.pop(seq.seq_id, [])):
            if block != NULL_BLOCK:
                self._free_block(block)
        if self.host_allocator is not None:
            for block in self.host_tables.pop(seq.seq_id, []):
                if block != NULL_BLOCK:
                    self.host_allocator.free(block)
        self._num_expired.pop(seq.seq_id, None)
        self._changed.discard(seq.seq_id)

    def swap_out(self, seq: Sequence) -> BlockPairs:
        """Move what is computed of a sequence to host memory and free its device blocks as `free` does.

        A `NULL_BLOCK` in the table stays one and is not moved.

        Returns:
            (device block, host block) pairs to copy.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager.swap_out, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    def swap_in(self, seq: Sequence) -> BlockPairs:
        """Move a sequence back, with slots for all its tokens, and free its host blocks.

        A `NULL_BLOCK` in the table stays one and is not moved.

        Returns:
            (host block, device block) pairs to copy.
        """
        raise NotImplementedError(
            "Stage 1 · Task 1.4: BlockManager.swap_in, see stages/stage1_block_management/GUIDE.md#task-1-4"
        )

    # For the step that runs

    def take_copies(self) -> BlockPairs:
        """(source, destination) blocks to copy for what the step admits: none where only whole blocks are shared."""
        return []

    def take_changed(self) -> set[int]:
        """Sequences whose block table changed since the last call; who mirrors the tables copies only these."""
        changed, self._changed = self._changed, set()
        return changed

    def check_invariants(self) -> None:
        """Reference counts equal the tables that hold a block, on the device and on the host, and the cache is sound.

        Raises:
            AssertionError: names the block that breaks the rule.
        """
        for allocator, tables in ((self.allocator, self.tables), (self.host_allocator, self.host_tables)):
            if allocator is None:
                assert not tables
                continue
            allocator.check_invariants()
            held = Counter(block for table in tables.values() for block in table if block != NULL_BLOCK)
            for block, count in enumerate(allocator.ref_counts):
                assert count == held[block], f"block {block} has {count} references but stands in {held[block]} tables"
        assert not self.tables.keys() & self.host_tables.keys(), "a sequence is on the device and on the host"
        if self.prefix_cache is not None:
            self.prefix_cache.check_invariants()

    def _set_table(self, seq: Sequence, table: list[int]) -> None:
        """Enter a sequence's table and note how much of it the window has left behind."""
        self.tables[seq.seq_id] = table
        self._num_expired[seq.seq_id] = table.count(NULL_BLOCK)
        self._changed.add(seq.seq_id)

    def _num_out_of_window(self, position: int) -> int:
        """Leading blocks that a token at `position` cannot see; it sees `sliding_window` tokens, itself included."""
        window = self.sliding_window
        return 0 if window is None else max(0, position - window + 1) // self.block_size

    def _new_blocks(self, count: int) -> list[int]:
        """Take free blocks. They are about to be overwritten, so the prefix cache forgets what they held."""
        blocks = [self.allocator.allocate() for _ in range(count)]
        if self.prefix_cache is not None:
            for block in blocks:
                self.prefix_cache.forget(block)
        return blocks

    def _free_block(self, block: int) -> None:
        """Drop a reference. A block that the prefix cache knows is kept for as long as possible, any other is reused first."""
        cached = self.prefix_cache is not None and block in self.prefix_cache
        self.allocator.free(block, reuse_first=not cached)
