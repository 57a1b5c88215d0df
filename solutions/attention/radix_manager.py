"""Block tables over a `RadixCache`: whole blocks are shared, and of the next one the tokens that are known are copied."""

from __future__ import annotations

from ..batching.scheduler_output import BlockPairs
from ..batching.sequence import Sequence
from ..memory.radix_cache import RadixCache
from .block_manager import BlockManager


class RadixBlockManager(BlockManager):
    """A `BlockManager` whose prefix cache finds prefixes of any length, not only whole blocks. It knows no windows; otherwise
    its arguments are the same."""

    prefix_cache: RadixCache

    def __init__(self, num_blocks: int, block_size: int, num_host_blocks: int = 0, watermark: float = 0.01) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks, watermark)
        self.prefix_cache = RadixCache(block_size)
        self._copies: BlockPairs = []

    def allocate(self, seq: Sequence) -> int:
        """As `BlockManager.allocate`, and the beginning of the first new block is a copy of one that begins alike.

        Returns:
            Number of tokens whose keys and values are in the cache when the step runs.
        """
        num_hits = super().allocate(seq)
        if not self._looks_up(seq):
            return num_hits
        first = num_hits // self.block_size
        source, num_shared = self.prefix_cache.match_part(seq, first)
        target = self.tables[seq.seq_id][first]
        if not num_shared or source in self.filling:
            return num_hits
        self.allocator.share(source)  # until all blocks of the step are given out
        self._copies.append((source, target))
        self.filling.add(target)  # who is admitted in this step cannot copy it yet
        if seq.num_preemptions == 0:
            self.prefix_cache.record(0, num_shared)
        return num_hits + num_shared

    def take_copies(self) -> BlockPairs:
        copies, self._copies = self._copies, []
        for source, _ in copies:
            self._free_block(source)
        return copies

    def free(self, seq: Sequence) -> None:
        """As `BlockManager.free`; what a sequence has computed of its last block can be found from now on."""
        table, end = self.tables.get(seq.seq_id), seq.num_computed_tokens
        if table and end % self.block_size:
            self.prefix_cache.insert_end(seq, end, table[end // self.block_size])
        super().free(seq)
