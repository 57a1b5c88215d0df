"""PrefixCache: what a hash covers, what is matched, and that nothing stale survives."""

from __future__ import annotations

import hashlib
import struct

import pytest

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence
from solutions.memory.prefix_cache import ROOT_HASH, PrefixCache, hash_block


def make(tokens, salt=None):
    return Sequence(0, tokens, SamplingParams(), cache_salt=salt)


def test_hash_is_sha256_over_parent_and_tokens():
    expected = hashlib.sha256(bytes(32) + struct.pack("<3i", 7, 8, 9)).digest()
    assert hash_block(ROOT_HASH, [7, 8, 9]) == expected
    assert hash_block(expected, [1]) == hashlib.sha256(expected + struct.pack("<i", 1)).digest()


def test_hash_depends_on_everything_before_the_block():
    cache = PrefixCache(2)
    a, b = cache.block_hashes(make([1, 2, 3, 4]), 2), cache.block_hashes(make([9, 2, 3, 4]), 2)
    assert a[0] != b[0]
    assert a[1] != b[1], "equal tokens after different beginnings are different content"
    assert cache.block_hashes(make([1, 2, 3, 4]), 2) == a


def test_salt_separates_tenants_through_the_whole_chain():
    cache = PrefixCache(2)
    chains = [cache.block_hashes(make([1, 2, 3, 4], salt), 2) for salt in (None, "a", "b", "")]
    assert len({chain[0] for chain in chains}) == 4
    assert len({chain[1] for chain in chains}) == 4


@pytest.mark.parametrize(("length", "expected"), [(1, 0), (3, 0), (4, 0), (5, 1), (7, 1), (8, 1), (9, 2), (12, 2), (13, 2)])
def test_match_leaves_at_least_one_token_to_compute(length, expected):
    cache = PrefixCache(4)
    tokens = list(range(100, 113))
    for block, block_hash in enumerate(cache.block_hashes(make(tokens[:8]), 2)):
        cache.insert(block_hash, block)
    assert cache.match(make(tokens[:length])) == [0, 1][:expected]


def test_match_stops_at_the_first_missing_block():
    cache = PrefixCache(1)
    hashes = cache.block_hashes(make([5, 6, 7, 8]), 4)
    for block in (0, 2, 3):
        cache.insert(hashes[block], block)
    assert cache.match(make([5, 6, 7, 8, 9])) == [0]


def test_forgotten_block_is_never_matched_again():
    cache = PrefixCache(2)
    block_hash = cache.block_hashes(make([1, 2]), 1)[0]
    cache.insert(block_hash, 5)
    assert 5 in cache
    cache.forget(5)
    assert 5 not in cache
    assert cache.match(make([1, 2, 3])) == []
    cache.forget(5)
    cache.insert(block_hash, 6)
    assert cache.match(make([1, 2, 3])) == [6]
    cache.check_invariants()


def test_second_block_with_the_same_content_stays_out():
    cache = PrefixCache(2)
    block_hash = cache.block_hashes(make([1, 2]), 1)[0]
    cache.insert(block_hash, 5)
    cache.insert(block_hash, 6)
    assert len(cache) == 1
    assert 6 not in cache
    cache.forget(6)
    assert cache.match(make([1, 2, 3])) == [5]


def test_hashes_are_kept_on_the_sequence_and_extended():
    cache, seq = PrefixCache(2), make([1, 2, 3])
    first = list(cache.block_hashes(seq, 1))
    seq.tokens.append(4)
    assert cache.block_hashes(seq, 2)[:1] == first
    assert cache.block_hashes(seq, 2) == PrefixCache(2).block_hashes(make([1, 2, 3, 4]), 2)


def test_check_invariants_sees_a_one_way_entry():
    cache = PrefixCache(1)
    cache.insert(b"x" * 32, 1)
    cache._hash_of[1] = b"y" * 32
    with pytest.raises(AssertionError, match="block 1"):
        cache.check_invariants()
