"""Block tables over a prefix cache that has a tier below it: blocks that are reused go there, and come back for a later prompt.

A block leaves when it is about to be overwritten, and only if the prefix cache knows its content. It comes back as a new block
of a waiting sequence, behind those that the prefix cache has, before the step that admits the sequence reads it. A sequence
whose blocks are still on their way waits at the front of the queue, while those that run go on.
Sources: vLLM's ``OffloadingConnector``; SGLang's HiCache; Gao et al., "CachedAttention", USENIX ATC 2024, §3.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from torch import Tensor

from ..batching.engine_observer import EngineObserver
from ..batching.sequence import Sequence
from ..memory.prefix_cache import PrefixCache
from ..memory.tiers.block_rows import BlockRows
from ..memory.tiers.tier import Fetch, Tier, TierStats
from .block_manager import BlockManager

logger = logging.getLogger(__name__)

GRACE_SECONDS = 0.005
"""So long those that run wait for the blocks of one that is admitted, so that a few blocks cost it no step."""
PATIENCE_SECONDS = 5.0
"""After so long blocks that have not come are computed: a disk hangs."""
CLOSE_SECONDS = 10.0
"""So long the end of an engine may take, to keep what it has computed."""
FLUSH_AGE = 1e-3
"""Seconds between the times of use of what is kept at the end, the latest first."""


class LeavingBlocks(PrefixCache):
    """A prefix cache that notes which blocks it forgets.

    Attributes:
        left: (block, hash) of those that are about to be overwritten, in their order.
    """

    def __init__(self, block_size: int) -> None:
        super().__init__(block_size)
        self.left: list[tuple[int, bytes]] = []

    def forget(self, block: int) -> None:
        block_hash = self._hash_of.get(block)
        if block_hash is not None:
            self.left.append((block, block_hash))
        super().forget(block)

    def block_of(self, block_hash: bytes) -> int | None:
        """The block that holds what has this hash, if one does."""
        return self._block_of.get(block_hash)

    def hash_of(self, block: int) -> bytes | None:
        """Of what a block holds, if that is known."""
        return self._hash_of.get(block)


class TieredBlockManager(BlockManager):
    """A `BlockManager` with a tier below its prefix cache.

    Args:
        tier: keeps what leaves. rows: reads and writes the cache's blocks. The rest: as of `BlockManager`.

    Attributes:
        observer: of the engine's steps, if the tier needs one.
    """

    prefix_cache: LeavingBlocks

    def __init__(
        self, num_blocks: int, block_size: int, num_host_blocks: int, sliding_window: int | None, tier: Tier, rows: BlockRows
    ) -> None:
        super().__init__(num_blocks, block_size, num_host_blocks, sliding_window=sliding_window)
        self.prefix_cache = LeavingBlocks(block_size)
        self.tier, self.rows = tier, rows
        self._fetches: dict[int, Fetch] = {}
        """seq_id → what comes for a waiting sequence."""
        self._coming: list[tuple[int, Tensor]] = []
        """(block, row) of what the next step reads."""
        self._is_closed = False
        self.observer: EngineObserver | None = None

    def can_allocate(self, seq: Sequence, keep_watermark: bool = True) -> bool:
        """Whether a waiting sequence fits, and what the tier has of it has come."""
        return super().can_allocate(seq, keep_watermark) and self._has_arrived(seq)

    def allocate(self, seq: Sequence) -> int:
        """As `BlockManager.allocate`; the tokens whose blocks the tier has sent are in the cache, too, when the step runs."""
        num_cached = super().allocate(seq)
        fetch = self._fetches.pop(seq.seq_id, None)
        if not self._looks_up(seq):
            return num_cached
        rows = fetch.rows if fetch is not None and fetch.wait(0) else {}
        table, first = self.tables[seq.seq_id], num_cached // self.block_size
        index = first
        while index < self._limit(seq) and (row := rows.get(self._hash(seq, index))) is not None:
            self.prefix_cache.insert(self._hash(seq, index), table[index])
            self.filling.add(table[index])
            self._coming.append((table[index], row))
            index += 1
        num_hits = (index - first) * self.block_size
        if seq.num_preemptions == 0:
            self.tier.stats.num_queries += len(seq.tokens) - num_cached
            self.tier.stats.num_hits += num_hits
        return num_cached + num_hits

    def free(self, seq: Sequence) -> None:
        super().free(seq)
        if (fetch := self._fetches.pop(seq.seq_id, None)) is not None:
            fetch.is_wanted = False

    def _limit(self, seq: Sequence) -> int:
        """Blocks that a sequence need not compute, at most: the last token's logits are wanted."""
        return (len(seq.tokens) - 1) // self.block_size

    def _hash(self, seq: Sequence, index: int) -> bytes:
        return self.prefix_cache.block_hashes(seq, index + 1)[index]

    def _has_arrived(self, seq: Sequence) -> bool:
        """Whether nothing is on its way for a waiting sequence; if it is asked for the first time, all that the tier has is
        sent. Where nothing runs meanwhile, wait for it."""
        if not self._looks_up(seq):
            return True
        fetch = self._fetches.get(seq.seq_id)
        if fetch is None:
            first, limit = len(self._match(seq)), self._limit(seq)
            if first >= limit or not self.tier.has(self._hash(seq, first)):
                return True
            fetch = self.tier.fetch([self._hash(seq, index) for index in range(first, limit)])
            self._fetches[seq.seq_id] = fetch
        age, patience = time.monotonic() - fetch.begun, GRACE_SECONDS if self.tables else PATIENCE_SECONDS
        if fetch.wait(max(0.0, patience - age)):
            return True
        fetch.is_wanted = max(age, patience) < PATIENCE_SECONDS
        return not fetch.is_wanted

    # For the step that runs

    def move_tiers(self) -> None:
        """Keep what leaves and bring what comes, before the step's own moves write anything."""
        left, self.prefix_cache.left = self.prefix_cache.left, []
        coming, self._coming = self._coming, []
        if left:
            left = [pair for pair in left if self.tier.wants(pair[1])]
            kept = left[max(0, len(left) - self.tier.most_rows) :]  # the beginning of a text leaves last
            self.tier.stats.num_skipped += len(left) - len(kept)
            left = kept
        rows = self.rows.read([block for block, _ in left]) if left else None
        if coming:
            self.rows.write([row for _, row in coming], [block for block, _ in coming])
            self.tier.stats.load_bytes += len(coming) * self.rows.num_bytes
        if rows is not None:
            self.tier.store([block_hash for _, block_hash in left], rows)

    # For the engine

    def stats(self) -> TierStats:
        """The tier's counters at this moment."""
        return replace(self.tier.stats)

    def close(self) -> None:
        """Keep what the prefix cache still has, the latest first, as far as the tier takes it at once; then end the tier. The
        second time, nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self.tier.outlives:
            try:
                self._keep_all()
            except RuntimeError as error:  # a device that has failed
                logger.warning("KV blocks could not be kept: %s", error)
        self.tier.close(CLOSE_SECONDS)

    def _keep_all(self) -> None:
        """Where sequences have blocks still, the last step may have failed, and what it was to fill is left out."""
        unsure = self.filling if self.tables else ()
        free = reversed(self.allocator.free_blocks())
        used = (block for block, count in enumerate(self.allocator.ref_counts) if count)
        hashes = {block: self.prefix_cache.hash_of(block) for block in (*used, *free) if block not in unsure}
        new = [(block, known) for block, known in hashes.items() if known is not None and self.tier.wants(known)]
        if new := new[: self.tier.most_rows]:
            self.tier.store([known for _, known in new], self.rows.read([block for block, _ in new]), FLUSH_AGE)
