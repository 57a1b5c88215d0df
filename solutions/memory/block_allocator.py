"""Who holds which KV block: ids, reference counts and a free list in least-recently-used order. Every call is O(1)."""

from __future__ import annotations

from collections import OrderedDict


class OutOfBlocksError(RuntimeError):
    """No block is free. Callers ask `BlockAllocator.num_free` first; this error means that one did not."""


class BlockAllocator:
    """Hands out the blocks ``0 .. num_blocks - 1``.

    A block is free (reference count 0) or used by one or more block tables. Free blocks wait in a queue: `allocate` takes
    the one at its front, `free` puts a block at its back, so what was cached in a freed block survives as long as memory
    allows and the least recently used content goes first. A free block whose content turns out to be wanted again is taken
    out of the middle of the queue by `share`.

    Args:
        num_blocks: blocks to manage, at least 1.

    Raises:
        ValueError: `num_blocks` is below 1.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be at least 1, got {num_blocks}")
        self.num_blocks = num_blocks
        self.ref_counts = [0] * num_blocks
        # A dictionary used as an ordered set: it is a hash map over a doubly linked list, so both ends and the middle are O(1).
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def allocate(self) -> int:
        """Take the least recently used free block.

        Returns:
            Its id; the reference count is 1.

        Raises:
            OutOfBlocksError: every block is in use.
        """
        if not self._free:
            raise OutOfBlocksError(f"all {self.num_blocks} KV blocks are in use")
        block, _ = self._free.popitem(last=False)
        self.ref_counts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add a reference to a block, used or free; a block with references is in no queue."""
        if self.ref_counts[block] == 0:
            del self._free[block]
        self.ref_counts[block] += 1

    def free(self, block: int, reuse_first: bool = False) -> None:
        """Drop a reference; with the last one the block joins the free queue.

        Args:
            block: the id of a used block.
            reuse_first: put it at the front of the queue, because nothing in it is worth keeping.

        Raises:
            ValueError: the block is free already; the message names it.
        """
        if self.ref_counts[block] == 0:
            raise ValueError(f"block {block} is freed twice")
        self.ref_counts[block] -= 1
        if self.ref_counts[block] == 0:
            self._free[block] = None
            if reuse_first:
                self._free.move_to_end(block, last=False)

    def is_shared(self, block: int) -> bool:
        """Whether more than one block table holds the block, so that writing to it needs a copy first."""
        return self.ref_counts[block] > 1

    def free_blocks(self) -> list[int]:
        """The free blocks in the order in which they will be reused."""
        return list(self._free)

    def check_invariants(self) -> None:
        """Every block is either free with no reference or used with at least one.

        Raises:
            AssertionError: names the block that breaks the rule.
        """
        for block, count in enumerate(self.ref_counts):
            assert count >= 0, f"block {block} has {count} references"
            assert (count == 0) == (block in self._free), f"block {block} has {count} references, free: {block in self._free}"
        assert self.num_free + self.num_used == self.num_blocks
