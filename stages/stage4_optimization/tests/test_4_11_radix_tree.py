"""Task 4.11 ★: what is found in a tree of texts with blocks of 4 tokens, and what stays of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import make_sequence
from stages.memory import radix_cache
from stages.memory.radix_cache import RadixCache

SIZE = 4


def text(tokens: list[int], salt: str | None = None) -> Sequence:
    seq = make_sequence(0, list(tokens))
    seq.cache_salt = salt
    return seq


def enter(cache: RadixCache, tokens: list[int], first: int, salt: str | None = None) -> None:
    """Enter a text whose blocks are `first`, `first` + 1, …; the last one need not be full."""
    seq, full = text(tokens, salt), len(tokens) // SIZE
    for block, key in enumerate(list(cache.block_hashes(seq, full)), first):
        cache.insert(key, block)
    if len(tokens) % SIZE:
        cache.insert_end(seq, len(tokens), first + full)
    cache.check_invariants()


def found(cache: RadixCache, tokens: list[int], salt: str | None = None) -> tuple[list[int], tuple[int, int]]:
    """The whole blocks that a text begins with, and what it shares with another block behind them."""
    seq = text(tokens, salt)
    blocks = cache.match(seq)
    return blocks, cache.match_part(seq, len(blocks))


@pytest.mark.parametrize(
    ("length", "blocks", "part"), [(1, 0, 0), (4, 0, 3), (5, 1, 0), (7, 1, 2), (8, 1, 3), (9, 2, 0), (12, 2, 3), (13, 3, 0)]
)
def test_the_last_token_is_not_found(length: int, blocks: int, part: int) -> None:
    """Of a text that is there with 16 tokens, the first `length` are asked for: all but the last one are found.

    Why: without a token to compute there are no logits, and nothing to sample from.
    """
    cache = RadixCache(SIZE)
    enter(cache, list(range(16)), 10)
    got = found(cache, list(range(length)))
    check_equal(got[0], [10, 11, 12][:blocks], "whole blocks")
    check_equal(got[1][1], part, "tokens of the next block")
    if part:
        check_equal(got[1][0], 10 + blocks, "the block that they are in")


def test_a_block_that_shares_nothing_is_none() -> None:
    """There is a text; another one begins with another token, and a third one does so behind the first block.

    Why: a block of which no token is right is one more copy, and is held for nothing.
    """
    cache = RadixCache(SIZE)
    enter(cache, list(range(16)), 10)
    check_equal(found(cache, [50, *range(1, 9)]), ([], (0, 0)), "what is found of a text that begins with another token")
    check_equal(found(cache, [0, 1, 2, 3, 50, 51, 52]), ([10], (0, 0)), "what is found behind the first block")


def test_nothing_is_there_at_first() -> None:
    """In an empty tree, and with another salt, nothing is found; and looking makes nothing.

    Why: a salt keeps those who do not know it from the blocks; a tree that grows by questions would never be empty again.
    """
    cache = RadixCache(SIZE)
    check_equal(found(cache, list(range(9))), ([], (0, 0)), "in an empty tree")
    enter(cache, list(range(8)), 10, salt="theirs")
    check_equal(found(cache, list(range(9))), ([], (0, 0)), "without the salt")
    check_equal(found(cache, list(range(9)), "theirs"), ([10, 11], (0, 0)), "with the salt")
    cache.forget(11)
    cache.forget(10)
    found(cache, list(range(9)))
    cache.check_invariants()
    assert not cache._nodes, "nodes are left in a tree without a block"


@pytest.mark.parametrize("known", [False, True])
def test_a_salt_finds_nothing_but_its_own(known: bool) -> None:
    """A text is there without a salt; it is asked for with one that nothing else has, or another text.

    Why: who has a salt wants to share nothing with others. From what is found, and how fast, either could tell what was asked.
    """
    cache = RadixCache(SIZE)
    enter(cache, list(range(12)), 10)
    if known:
        enter(cache, [7] * 8, 20, "mine")
    check_equal(found(cache, list(range(12)), "mine"), ([], (0, 0)), "of the text that is there without a salt")
    check_equal(found(cache, [7] * 9, "mine")[0], [20, 21] if known else [], "of its own")
    check_equal(found(cache, [7] * 9), ([], (0, 0)), "of the salt's text without the salt")


@pytest.mark.parametrize("prompt", [1, 4, 6, 10])
def test_what_was_answered_is_found_too(prompt: int) -> None:
    """A sequence of 11 tokens, of which the first `prompt` are its prompt; a text of 12 has them all.

    Why: a sequence that was preempted comes back with its answer. Found by its prompt alone, the answer is computed again.
    """
    cache, seq = RadixCache(SIZE), text(list(range(prompt)))
    enter(cache, list(range(12)), 10)
    for token in range(prompt, 11):
        seq.append_token(token)
    check_equal(cache.match(seq), [10, 11], "whole blocks")
    check_equal(cache.match_part(seq, 2), (12, 2), "the block behind them, and its tokens")


def test_a_hole_ends_the_path() -> None:
    """The middle one of three blocks is overwritten, computed anew, and overwritten at the beginning.

    Why: keys behind a hole are right, but those in it are gone: a sequence that used them would read another text there.
    """
    cache = RadixCache(SIZE)
    enter(cache, list(range(12)), 10)
    cache.forget(11)
    cache.check_invariants()
    check_equal(found(cache, list(range(13))), ([10], (0, 0)), "behind the hole")
    enter(cache, list(range(8)), 20)  # 20 is a twin of 10, which stays
    check_equal(found(cache, list(range(13)))[0], [10, 21, 12], "when the hole is filled")
    cache.forget(10)
    check_equal(found(cache, list(range(13))), ([], (0, 0)), "with a hole at the beginning")


@pytest.mark.parametrize(
    ("wanted", "shared"),
    [([5, 5, 5, 5], 0), ([1, 2, 9, 9], 2), ([1, 0, 0, 0], 1), ([1, 2, 3, 9], 3), ([1, 2, 3, 0], 3), ([3, 3, 3, 3], 2),
     ([3, 9, 9, 9], 1), ([0, 0, 0, 0], 0), ([1, 9, 9, 9], 2), ([7, 7, 7, 7], 4), ([7, 7, 0, 0], 2)],
)  # fmt: skip
def test_the_block_that_shares_most_is_found(wanted: list[int], shared: int) -> None:
    """Beside blocks 1 2 3 4, 1 2 7 7, 1 9 0 0, 3 3 0 0 and an end 7 7 of a text of 6 tokens, whatever comes.

    Why: it may stand before or behind the place where the wanted tokens would be; one that is further away shares no more.
    """
    cache, before = RadixCache(SIZE), [8, 8, 8, 8]
    for number, tokens in enumerate(([1, 2, 3, 4], [1, 2, 7, 7], [1, 9, 0, 0], [3, 3, 0, 0], [7, 7], [7, 7, 7, 7])):
        enter(cache, before + tokens, 10 * number)
    blocks, (block, count) = found(cache, [*before, *wanted, 99])
    whole = wanted == [7, 7, 7, 7]
    check_equal(blocks, [0, 51] if whole else [0], "whole blocks")
    check_equal(count, 0 if whole else shared, "tokens of the next block")
    if count:
        holds = {1: [1, 2, 3, 4], 11: [1, 2, 7, 7], 21: [1, 9, 0, 0], 31: [3, 3, 0, 0], 41: [7, 7], 51: [7, 7, 7, 7]}[block]
        check_equal(holds[:count], wanted[:count], f"what block {block} holds")


def test_one_that_was_overwritten_is_passed_over() -> None:
    """Two of three that share 3, 2 and 2 tokens lose their blocks but have children; then the third does.

    Why: a node without a block has nothing to copy from, and the next best is behind it.
    """
    cache = RadixCache(SIZE)
    for number, tokens in enumerate(([1, 2, 3, 4], [1, 2, 5, 5], [1, 2, 0, 0])):
        enter(cache, [*tokens, 6, 6, 6, 6], 10 * number)
    wanted = [1, 2, 3, 9, 9, 9]
    check_equal(found(cache, wanted), ([], (0, 3)), "the best of three")
    cache.forget(0)
    check_equal(found(cache, wanted)[1][1], 2, "the next best")
    cache.forget(10)
    check_equal(found(cache, wanted), ([], (20, 2)), "the last one")
    cache.forget(20)
    check_equal(found(cache, wanted), ([], (0, 0)), "none is left")


def test_a_leaf_takes_what_stood_for_it_alone() -> None:
    """A branch of two texts is overwritten from the root on: each leaf that goes takes the nodes above it that nobody needs.

    Why: nodes that stay are a leak, and nodes that go too early cut off texts whose blocks are there.
    """
    cache = RadixCache(SIZE)
    enter(cache, [0] * 8 + [1] * 4, 10)
    enter(cache, [0] * 8 + [2] * 6, 20)
    check_equal(len(cache._nodes), 6, "nodes of two texts with 8 tokens in common, and their root")
    for block, left in ((10, 6), (11, 6), (12, 5), (22, 5), (23, 0)):
        cache.forget(block)
        cache.check_invariants()
        check_equal(len(cache._nodes), left, f"nodes after block {block}")
    enter(cache, [0] * 12, 30)
    cache.forget(32)
    check_equal(found(cache, [0] * 12), ([30, 31], (0, 0)), "what is above a leaf that has gone")


def test_many_children_are_not_compared_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind one block 2,000 others go on. A search compares a handful of them.

    Why: a system prompt of a service has as many children as the service has users, and each of them asks at every turn.
    """
    cache = RadixCache(SIZE)
    for number in range(2000):
        enter(cache, [0, 0, 0, 0, number // 100, number % 100, 1, 1], 2 * number)
    compared, real = [], radix_cache.shared_length

    def counted(first: tuple[int, ...], second: tuple[int, ...]) -> int:
        compared.append(first)
        return real(first, second)

    monkeypatch.setattr(radix_cache, "shared_length", counted)
    check_equal(found(cache, [0, 0, 0, 0, 7, 31, 5, 5])[1], (2 * 731 + 1, 2), "block and tokens")
    assert len(compared) <= 4, f"{len(compared)} blocks were compared"


@settings(max_examples=60, deadline=None, report_multiple_bugs=False)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8), st.data())
def test_as_much_is_found_as_by_comparing_with_all(texts: list[list[int]], data: st.DataObject) -> None:
    """For any texts and any that is asked for: whole blocks and part together are the longest beginning that one of them has.

    Why: texts of two letters share much, and every way to go wrong in a tree is among them.
    """
    cache = RadixCache(SIZE)
    for number, tokens in enumerate(texts):
        enter(cache, tokens, 10 * number)
    wanted = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=14))
    longest = max(
        next(
            (i for i, pair in enumerate(zip(tokens, wanted[:-1], strict=False)) if pair[0] != pair[1]),
            min(len(tokens), len(wanted) - 1),
        )
        for tokens in texts
    )
    blocks, (_, part) = found(cache, wanted)
    check_equal(len(blocks) * SIZE + part, longest, "tokens that are found")
