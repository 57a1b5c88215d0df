"""Task 4.1: the hash of a block, and the longest run of cached blocks that a prompt begins with."""

from __future__ import annotations

import hashlib
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.memory.prefix_cache import ROOT_HASH, PrefixCache, hash_block


def make(tokens: list[int], salt: str | None = None) -> Sequence:
    return Sequence(0, tokens, SamplingParams(), cache_salt=salt)


def chain(tokens: list[int], size: int, salt: str | None = None) -> list[bytes]:
    """Hashes of the full blocks, written out: SHA-256 over the parent, the tokens as 32-bit numbers, and the salt at first."""
    hashes: list[bytes] = []
    for start in range(0, len(tokens) - size + 1, size):
        data = (hashes[-1] if hashes else ROOT_HASH) + struct.pack(f"={size}i", *tokens[start : start + size])
        if start == 0 and salt is not None:
            data += b"salt:" + salt.encode()
        hashes.append(hashlib.sha256(data).digest())
    return hashes


@pytest.mark.parametrize("salt", [None, "tenant"])
def test_the_hash_covers_parent_tokens_and_salt(salt: str | None) -> None:
    """SHA-256 over the parent's hash, the tokens as 32-bit numbers, and the salt, marked as one.

    Why: two engines that share a cache must come to the same hash, and nobody may find two prompts with one hash.
    """
    tokens = [0, 1, 70_000, 2**31 - 1]
    check_equal(hash_block(ROOT_HASH, tokens, salt), chain(tokens, 4, salt)[0], "hash of a first block")


def test_the_same_tokens_behind_others_are_another_block() -> None:
    """Blocks with the same tokens and different parents have different hashes, and so have different tokens.

    Why: a key knows where it stands and what stood before it. "bank" behind "river" is not "bank" behind "savings".
    """
    parents = [ROOT_HASH, hash_block(ROOT_HASH, [1, 2]), hash_block(ROOT_HASH, [2, 1])]
    hashes = {hash_block(parent, tokens) for parent in parents for tokens in ([1, 2], [2, 1], [1, 3])}
    check_equal(len(hashes), 9, "different hashes of three blocks behind three parents")


@pytest.mark.parametrize("changed", range(6))
def test_a_block_changes_all_behind_it(changed: int) -> None:
    """Two texts of six blocks that differ in one: hashes before it are equal, its own and all behind it are not.

    Why: equal blocks behind different texts have different keys and values. Found in the cache, they would answer for another
    text.
    """
    tokens = list(range(12))
    other = [*tokens]
    other[2 * changed] += 100
    cache = PrefixCache(2)
    pairs = zip(cache.block_hashes(make(tokens), 6), cache.block_hashes(make(other), 6), strict=True)
    check_equal([a == b for a, b in pairs], [index < changed for index in range(6)], "whether hashes are equal")


def test_tenants_with_different_salts_share_nothing() -> None:
    """Each salt, the empty one too, and none, gives another first hash, and with it another chain.

    Why: who finds out by the time to the first token that a prompt is cached reads what somebody else has asked
    (CVE-2025-46570).
    """
    cache = PrefixCache(2)
    chains = [tuple(cache.block_hashes(make([5, 6, 7, 8], salt), 2)) for salt in (None, "", "a", "b", "ä", "ö")]
    check_equal(len({value for one in chains for value in one}), 12, "different hashes of two blocks under six salts")


def test_only_the_first_block_carries_the_salt() -> None:
    """Later blocks are salted by their parents alone.

    Why: the first hash is in every later one already; a salt in each would fit no other engine's hashes.
    """
    tokens = list(range(6))
    check_equal(PrefixCache(2).block_hashes(make(tokens, "s"), 3), chain(tokens, 2, "s"), "hashes of three blocks")


def test_hashes_are_kept_and_not_computed_twice() -> None:
    """`block_hashes` continues the list on the sequence, and leaves what is there.

    Why: a prompt of 8,000 tokens is asked about at every step that it waits; hashing it each time takes longer than the step.
    """
    seq = make(list(range(8)))
    cache = PrefixCache(2)
    check_equal(cache.block_hashes(seq, 1), chain(seq.tokens, 2)[:1], "after asking for one")
    seq.block_hashes[0] = b"kept" * 8
    got = cache.block_hashes(seq, 3)
    check_equal(got[0], b"kept" * 8, "the first hash, which was there")
    check_equal(list(seq.block_hashes), list(got), "hashes that the sequence keeps")
    check_equal(got[1], hash_block(b"kept" * 8, [2, 3]), "the second hash, built on the first")
    check_equal(len(got), 3, "hashes")


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (3, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_a_match_leaves_one_token_to_compute(length: int, expected: int) -> None:
    """Of a prompt that is cached as a whole, the block with the last token does not count.

    Why: the logits of the last token are what is sampled from; a prompt with nothing to compute gives an empty step, and one
    engine crashed on it.
    """
    tokens = list(range(16))
    cache = PrefixCache(4)
    for index, value in enumerate(chain(tokens, 4)):
        cache._block_of[value], cache._hash_of[10 + index] = 10 + index, value
    check_equal(cache.match(make(tokens[:length])), [10 + i for i in range(expected)], f"blocks found of {length} tokens")


def test_what_was_generated_is_looked_up_too() -> None:
    """A prompt of 4 tokens with 9 generated behind it, all of it cached in blocks of 4: three blocks, each time it is asked,
    and however much is computed.

    Why: a sequence that comes back after a preemption has its output to compute again, and finds it where nobody took it. And
    looking is not taking: the next who asks finds as much.
    """
    tokens = list(range(13))
    cache = PrefixCache(4)
    for index, value in enumerate(chain(tokens, 4)):
        cache._block_of[value], cache._hash_of[10 + index] = 10 + index, value
    seq = make(tokens[:4])
    seq.tokens += tokens[4:]
    check_equal([cache.match(seq), cache.match(seq)], [[10, 11, 12]] * 2, "blocks found, asked twice")
    for computed in (4, 9, 12):
        seq.num_computed_tokens = computed
        check_equal(cache.match(seq), [10, 11, 12], f"blocks found of a sequence with {computed} tokens computed")


def test_a_match_ends_at_the_first_miss() -> None:
    """Blocks behind one that is missing are of no use, cached or not.

    Why: a block table has no gaps: a block behind a missing one would stand at the wrong positions.
    """
    tokens = list(range(17))
    cache = PrefixCache(4)
    for index, value in enumerate(chain(tokens, 4)):
        if index != 1:
            cache._block_of[value], cache._hash_of[index] = index, value
    seq = make(tokens)
    check_equal(cache.match(seq), [0], "blocks found when the second is missing")
    check_equal(len(seq.block_hashes) <= 2, True, "no more hashed than looked up")
    check_equal(cache.match(make(tokens, "salt")), [], "blocks found with another salt")


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    stored=st.lists(st.lists(st.integers(0, 1), max_size=12), max_size=4),
    asked=st.lists(st.integers(0, 1), min_size=1, max_size=14), size=st.integers(1, 4),
)  # fmt: skip
def test_a_match_is_the_longest_common_beginning(stored: list[list[int]], asked: list[int], size: int) -> None:
    """In whole blocks; against comparing token by token with everything that is stored.

    Why: a block too few is computed in vain, a block too many is another prompt's.
    """
    cache = PrefixCache(size)
    for tokens in stored:
        for value in chain(tokens, size):
            if value not in cache._block_of:
                block = len(cache._block_of)
                cache._block_of[value], cache._hash_of[block] = block, value

    def common(tokens: list[int]) -> int:
        whole = tokens[: len(tokens) // size * size]
        return next((i for i, (a, b) in enumerate(zip(whole, asked, strict=False)) if a != b), min(len(whole), len(asked)))

    longest = max([min(common(tokens), len(asked) - 1) // size for tokens in stored], default=0)
    check_equal(len(cache.match(make(asked))), longest, "blocks found")
