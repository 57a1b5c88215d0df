"""Which KV blocks hold which tokens, by content hash, so that a prompt's known beginning is not computed again.

The hash of a block covers the block's tokens and, through its parent's hash, everything before them; two blocks with one
hash therefore hold the same keys and values. Source: vLLM's automatic prefix caching; the idea of sharing by content is
SOSP 2023 §4.4.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from hashlib import sha256

from ..batching.sequence import Sequence

ROOT_HASH = bytes(32)
"""Parent of every sequence's first block."""


def hash_block(parent: bytes, token_ids: list[int], cache_salt: str | None = None) -> bytes:
    """SHA-256 over the parent's hash, the tokens and, for a first block, the cache salt.

    SHA-256 and not Python's `hash`: whoever finds two prompts with one hash reads another user's keys and values. The salt
    is marked as such, so no choice of tokens can stand for it (CVE-2025-46570).

    Args:
        parent: 32 bytes, the hash of the block before, or `ROOT_HASH`.
        token_ids: the tokens of one full block, each in ``0 .. 2**31 - 1``.
        cache_salt: keeps those who do not know it from sharing the block; an empty text is one, too.
    """
    digest = sha256(parent)
    digest.update(array("i", token_ids).tobytes())
    if cache_salt is not None:
        digest.update(b"salt:" + cache_salt.encode())
    return digest.digest()


class PrefixCache:
    """A two-way map between content hashes and the blocks that hold the content.

    It knows nothing of reference counts: a cached block may be in use or waiting in the allocator's free queue. The block
    manager calls `forget` before it lets a block be overwritten.

    Args:
        block_size: tokens in a block; only full blocks are cached.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self.num_queries = 0
        """Prompt tokens looked up since the start."""
        self.num_hits = 0
        """Of those, tokens found."""

    def __len__(self) -> int:
        return len(self._block_of)

    def __contains__(self, block: int) -> bool:
        return block in self._hash_of

    def blocks(self) -> Iterable[int]:
        """All blocks whose content is known."""
        return self._hash_of.keys()

    def block_hashes(self, seq: Sequence, num_blocks: int) -> list[bytes]:
        """Hashes of the first `num_blocks` blocks of a sequence; they are kept on the sequence and never computed twice."""
        hashes = seq.block_hashes
        size = self.block_size
        for index in range(len(hashes), num_blocks):
            parent = hashes[index - 1] if index else ROOT_HASH
            salt = seq.cache_salt if index == 0 else None
            hashes.append(hash_block(parent, seq.tokens[index * size : (index + 1) * size], salt))
        return hashes

    def match(self, seq: Sequence) -> list[int]:
        """The longest run of cached blocks that a sequence begins with, its output included.

        At most ``len(tokens) - 1`` tokens are matched: the last token must be computed, or there would be no logits to
        sample from.

        Returns:
            Block ids in order; nothing about them is changed.
        """
        limit = (len(seq.tokens) - 1) // self.block_size
        blocks = []
        for index in range(limit):
            # Hash one block at a time: a miss at the start of a long prompt costs one hash.
            block = self._block_of.get(self.block_hashes(seq, index + 1)[index])
            if block is None:
                break
            blocks.append(block)
        return blocks

    def insert(self, block_hash: bytes, block: int) -> None:
        """Record what a block holds. The first block with a hash keeps it; a later twin stays uncached."""
        if block_hash not in self._block_of and block not in self._hash_of:
            self._block_of[block_hash] = block
            self._hash_of[block] = block_hash

    def forget(self, block: int) -> None:
        """Drop a block's entry, if it has one, because the block is about to be overwritten."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]

    def clear(self) -> None:
        """Forget every block."""
        self._block_of.clear()
        self._hash_of.clear()

    def record(self, num_queries: int, num_hits: int) -> None:
        """Count the tokens of one admitted prompt and those of them that were found."""
        self.num_queries += num_queries
        self.num_hits += num_hits

    def check_invariants(self) -> None:
        """Both directions of the map agree.

        Raises:
            AssertionError: names the block that breaks the rule.
        """
        assert len(self._block_of) == len(self._hash_of), "a block or a hash is listed twice"
        for block_hash, block in self._block_of.items():
            assert self._hash_of.get(block) == block_hash, f"block {block} is cached under a hash that is not its own"
