"""Task 4.2: what the cache knows of a block goes when the block is reused, and the least recently used goes first."""

from __future__ import annotations

import random

from stages.attention.block_manager import BlockManager
from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.memory.prefix_cache import PrefixCache

A, B, C = (name.encode() * 32 for name in "abc")


def cached(cache: PrefixCache) -> dict[bytes, int]:
    cache.check_invariants()
    return dict(cache._block_of)


def test_what_is_inserted_is_found_both_ways() -> None:
    """A hash has a block and the block has an entry, until it is forgotten.

    Why: a prompt asks by hash, eviction by block; an entry in one direction only cannot be taken out again.
    """
    cache = PrefixCache(4)
    cache.insert(A, 3)
    cache.insert(B, 5)
    check_equal(cached(cache), {A: 3, B: 5}, "entries")
    check_equal((3 in cache, 5 in cache, 4 in cache, len(cache)), (True, True, False, 2), "which blocks are cached")
    cache.forget(3)
    check_equal(cached(cache), {B: 5}, "entries after block 3 is forgotten")


def test_forgetting_what_is_not_there_changes_nothing() -> None:
    """Every block that is handed out is forgotten first, and most of them hold nothing.

    Why: if it failed for them, no sequence could start.
    """
    cache = PrefixCache(4)
    cache.insert(A, 0)
    cache.forget(7)
    cache.forget(0)
    cache.forget(0)
    check_equal(cached(cache), {}, "entries")


def test_a_later_twin_stays_uncached() -> None:
    """Two requests compute the same block in one step: the first keeps the hash.

    Why: if the twin takes over, the first block's entry points to a hash that leads elsewhere, and when the twin is freed, a
    block that others share is thought to be free.
    """
    cache = PrefixCache(4)
    cache.insert(A, 1)
    cache.insert(A, 2)
    check_equal(cached(cache), {A: 1}, "entries after a twin")
    cache.forget(2)
    check_equal(cached(cache), {A: 1}, "entries after the twin is reused")
    cache.forget(1)
    cache.insert(A, 2)
    check_equal(cached(cache), {A: 2}, "entries when the content is computed anew")


def test_a_block_keeps_the_hash_it_has() -> None:
    """One block, one content: a second hash for it is not taken in.

    Why: the first hash would stay behind, and lead to a block that holds something else.
    """
    cache = PrefixCache(4)
    cache.insert(A, 1)
    cache.insert(B, 1)
    check_equal(cached(cache), {A: 1}, "entries")


def test_hits_are_counted_in_tokens() -> None:
    """`record` adds up what was asked and what was found, over all prompts.

    Why: the hit rate says whether the cache is worth its memory, and prompts are of all lengths.
    """
    cache = PrefixCache(4)
    for asked, found in ((10, 0), (7, 4), (20, 16)):
        cache.record(asked, found)
    check_equal((cache.num_queries, cache.num_hits), (37, 20), "tokens asked and found")


def fill(manager: BlockManager, seq_id: int, tokens: list[int]) -> int:
    """A sequence comes, is computed and goes; returns how many of its tokens were found."""
    seq = Sequence(seq_id, tokens, SamplingParams())
    found = seq.num_computed_tokens = manager.allocate(seq)
    manager.cache_full_blocks(seq, len(tokens) - found)
    manager.check_invariants()
    manager.free(seq)
    manager.check_invariants()
    return found


def test_a_reused_block_is_not_found_under_its_old_hash() -> None:
    """When a block is given to somebody else, its old tokens are gone, and so is their hash.

    Why: an engine that forgot this returned one user the keys and values of another's prompt: a fluent answer to a question
    that nobody asked.
    """
    manager = BlockManager(num_blocks=2, block_size=2, watermark=0)
    first, second = [1, 2, 3], [7, 8, 9]
    check_equal([fill(manager, 0, first), fill(manager, 1, first)], [0, 2], "tokens found, first and second time")
    check_equal([fill(manager, 2, second), fill(manager, 3, second)], [0, 2], "tokens of another prompt")
    manager = BlockManager(num_blocks=2, block_size=2, watermark=0)
    fill(manager, 0, first)
    fill(manager, 1, [4, 5, 6, 6])  # takes both blocks
    check_equal(fill(manager, 2, first), 0, "tokens found of a prompt whose blocks were reused")


def test_the_least_recently_used_prompt_goes_first_and_its_end_before_its_beginning() -> None:
    """With room for three prompts of two blocks, using the first again saves it, and the second is evicted, from its end.

    Why: a beginning is of use without its end; an end without its beginning is never found.
    """
    manager = BlockManager(num_blocks=6, block_size=2, watermark=0)
    prompts = {name: [10 * i + j for j in range(4)] for i, name in enumerate("abcd", 1)}
    for number, name in enumerate("abc"):
        fill(manager, number, prompts[name])
    check_equal(fill(manager, 10, prompts["a"] + [0]), 4, "tokens of a, used again")
    found = {name: len(manager.prefix_cache.match(Sequence(99, [*prompts[name], 0], SamplingParams()))) for name in "abc"}
    check_equal(found, {"a": 2, "b": 1, "c": 2}, "blocks left of each when one block was needed")


def test_random_traffic_never_finds_what_is_not_there() -> None:
    """Prompts over two tokens come and go; every hit is checked against what was last written into the block.

    Why: the mistakes that matter here show after thousands of requests, as somebody else's answer.
    """
    numbers = random.Random(4)
    manager = BlockManager(num_blocks=7, block_size=2, watermark=0)
    content: dict[int, tuple[int, ...]] = {}
    hits = 0
    for seq_id in range(300):
        tokens = [numbers.randrange(2) for _ in range(numbers.randrange(1, 13))]
        seq = Sequence(seq_id, tokens, SamplingParams())
        found = seq.num_computed_tokens = manager.allocate(seq)
        table = manager.tables[seq_id]
        for index, block in enumerate(table):
            beginning = tuple(tokens[: 2 * (index + 1)])
            if 2 * index < found:
                check_equal(content.get(block), beginning, f"tokens up to block {block}, which was found")
                hits += 1
            elif len(beginning) == 2 * (index + 1):
                content[block] = beginning
            else:
                content.pop(block, None)
        manager.cache_full_blocks(seq, len(tokens) - found)
        manager.free(seq)
        manager.check_invariants()
    check_equal(hits > 100, True, "blocks found often")
