"""Task 5.10 ★: a request goes to the engine that knows its beginning, unless that one has too much to do."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.course.fixtures.checks import check_equal
from stages.serving.replicas.prefix_router import BLOCK_CHARACTERS, BLOCK_TOKENS, MAX_BLOCKS, PrefixAffinity, prefix_keys

IDLE = {"a": 0, "b": 0, "c": 0}


def keys_of(*blocks: str) -> list[bytes]:
    """The keys of a text whose blocks are these letters, each often enough."""
    return prefix_keys("".join(block * BLOCK_CHARACTERS for block in blocks))


def noted(policy: PrefixAffinity) -> dict[bytes, set[str]]:
    """What is remembered, from the key that is forgotten first to the one that is last."""
    return {key: set(owners) for key, owners in policy._owners.items()}


# Keys


@settings(max_examples=60, deadline=None)
@given(
    first=st.lists(st.sampled_from("xyz"), max_size=5), second=st.lists(st.sampled_from("xyz"), max_size=5),
    salts=st.tuples(st.sampled_from(["", "s"]), st.sampled_from(["", "s"])),
)  # fmt: skip
def test_a_key_stands_for_all_before_it(first: list[str], second: list[str], salts: tuple[str, str]) -> None:
    """Two texts of up to five blocks, each with a salt: they have key n in common where salt and first n blocks are the same.

    Why: equal blocks behind different beginnings have different keys and values in the engine. And who has a salt wants nobody
    to learn from the time an answer takes what others have asked.
    """
    texts = ["".join(block * BLOCK_CHARACTERS for block in blocks) for blocks in (first, second)]
    ours, theirs = (prefix_keys(text, salt) for text, salt in zip(texts, salts, strict=True))
    check_equal((len(ours), len(theirs)), (len(first), len(second)), "numbers of keys")
    same = salts[0] == salts[1]
    shared = next((at for at, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))
    check_equal(
        [key in theirs for key in ours], [same and at < shared for at in range(len(first))], "keys that both have in common"
    )
    check_equal(len(set(ours)), len(ours), "different keys of one text")


@pytest.mark.parametrize("size", [0, 1, 2])
def test_only_full_blocks_count_and_not_too_many(size: int) -> None:
    """Texts and token ids of `size` blocks and one letter less, or as much as a block without one more; and a very long prompt.

    Why: an engine's cache knows full blocks, too. And a prompt of a million letters must not take a router a second.
    """
    for extra in (0, BLOCK_CHARACTERS - 1):
        check_equal(
            len(prefix_keys("m" * (size * BLOCK_CHARACTERS + extra))), size, f"keys of a text with {extra} letters more"
        )
    for extra in (0, BLOCK_TOKENS - 1):
        check_equal(len(prefix_keys([5] * (size * BLOCK_TOKENS + extra))), size, f"keys of ids with {extra} more")
    check_equal(len(prefix_keys("m" * BLOCK_CHARACTERS * (MAX_BLOCKS + 3))), MAX_BLOCKS, "keys of a very long text")
    ids = list(range(3 * BLOCK_TOKENS))
    other = [*ids[: 2 * BLOCK_TOKENS], ids[2 * BLOCK_TOKENS] + (1 << 30), *ids[2 * BLOCK_TOKENS + 1 :]]
    check_equal([a == b for a, b in zip(prefix_keys(ids), prefix_keys(other), strict=True)], [True, True, False], "equal keys")


def test_half_a_character_is_text() -> None:
    """A lone surrogate in prompt and salt, as JSON can spell it.

    Why: one request with "\\ud800" would otherwise end in an error 500, whenever somebody likes.
    """
    check_equal(len(prefix_keys("\ud800" * BLOCK_CHARACTERS, "\udfff")), 1, "keys")


@pytest.mark.parametrize("length", [1, 64, 65, 1000])
def test_all_of_a_salt_counts(length: int) -> None:
    """Two salts of so many letters that differ in the last one, before a text and before token ids.

    Why: a salt may be an address or a token of several hundred letters. Cut short, two of them are the same.
    """
    ours, theirs = ("s" * (length - 1) + last for last in "ab")
    for prompt in ("m" * 2 * BLOCK_CHARACTERS, [5] * 2 * BLOCK_TOKENS):
        check_equal(set(prefix_keys(prompt, ours)) & set(prefix_keys(prompt, theirs)), set(), "keys that both have in common")


@pytest.mark.parametrize(
    ("first", "second"),
    [("\ud800" * BLOCK_CHARACTERS, "\ud801" * BLOCK_CHARACTERS), ("\ud800" * BLOCK_CHARACTERS, "?" * BLOCK_CHARACTERS),
     ([1, 23] * BLOCK_TOKENS, [12, 3] * BLOCK_TOKENS), ([1] * BLOCK_TOKENS, [1 + (1 << 16)] * BLOCK_TOKENS)],
    ids=["half characters", "a half and a question mark", "ids of the same digits", "ids of 17 bits"],
)  # fmt: skip
def test_prompts_that_look_alike_have_other_keys(first: str | list[int], second: str | list[int]) -> None:
    """Two prompts that some spelling of text or of token ids makes the same.

    Why: a key in common says that an engine has the beginning. It sends the prompt to one that must compute all of it.
    """
    check_equal(set(prefix_keys(first)) & set(prefix_keys(second)), set(), "keys that both have in common")


class Counted(str):
    """A text that counts the letters of all that was cut out of it."""

    letters = 0

    def __getitem__(self, place: Any) -> str:
        found = super().__getitem__(place)
        self.letters += len(found)
        return found


def test_each_block_is_cut_out_once() -> None:
    """Of a text of 200 blocks no more is cut out than twice its letters.

    Why: a router that reads each beginning anew reads a long chat a hundred times, and all requests wait behind it.
    """
    prompt = Counted("m" * 200 * BLOCK_CHARACTERS)
    check_equal(len(prefix_keys(prompt)), 200, "keys")
    assert prompt.letters <= 2 * len(prompt), f"{prompt.letters} letters of {len(prompt)} were cut out"


def test_keys_are_the_same_in_every_process() -> None:
    """Another process, with another seed of Python's own hashes, finds the same keys.

    Why: routers come in several processes, and after a restart all prompts would be strangers.
    """
    prompt = chr(97 + random.Random(0).randrange(26)) * (2 * BLOCK_CHARACTERS)
    expected = str([key.hex() for key in prefix_keys(prompt, "s")])
    code = (
        f"from stages.serving.replicas.prefix_router import prefix_keys; print([k.hex() for k in prefix_keys({prompt!r}, 's')])"
    )
    other = os.environ | {"PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=other, check=True)
    check_equal(found.stdout.strip(), expected, "keys of the other process")


# Choosing


def test_a_conversation_stays_where_it_began() -> None:
    """Three conversations, each asked again and again with a block more, when its engine has five requests and the others none:
    each has one engine, and each engine one of them.

    Why: elsewhere the whole conversation is computed again, with every question of it.
    """
    policy, homes = PrefixAffinity(), {}
    for length in range(1, 13):
        for name in "xyz":
            chosen = policy.choose(keys_of(*name * length), IDLE | {homes[name]: 5} if name in homes else IDLE)
            check_equal(chosen, homes.setdefault(name, chosen), f"engine of conversation {name} with {length} blocks")
    check_equal(sorted(homes.values()), ["a", "b", "c"], "engines of the three conversations")


@pytest.mark.parametrize(
    ("load", "least", "expected"),
    [(0, 0, "a"), (10, 0, "a"), (16, 0, "a"), (17, 0, "b"), (40, 0, "b"), (32, 16, "a"), (33, 16, "b"), (41, 25, "a")],
)
def test_too_much_to_do_is_more_than_both_limits(load: int, least: int, expected: str) -> None:
    """Engine a knows the beginning and has so many requests, b has the least: up to 16 more it is still a.

    Why: a popular system prompt would otherwise make one engine answer everybody while all others idle.
    """
    policy = PrefixAffinity()
    keys = keys_of("x", "y")
    policy._remember(keys, "a")
    check_equal(policy.choose(keys, {"a": load, "b": least}), expected, "the engine")


@pytest.mark.parametrize(("load", "expected"), [(117, "a"), (150, "a"), (151, "b")])
def test_under_load_the_ratio_counts(load: int, expected: str) -> None:
    """The least loaded engine has 100 requests: up to half as many more it is still the one that knows the beginning.

    Why: of 100 and 117 requests the difference is noise, and every change computes a prompt anew.
    """
    policy = PrefixAffinity()
    keys = keys_of("x", "y")
    policy._remember(keys, "a")
    check_equal(policy.choose(keys, {"a": load, "b": 100}), expected, "the engine")


def test_a_second_engine_learns_a_popular_beginning() -> None:
    """a has too much to do, so b computes it once; from then on the one of both with less to do is chosen.

    Why: this is how a popular beginning comes to lie on as many engines as its load needs.
    """
    policy, keys = PrefixAffinity(), keys_of("x", "y", "z")
    policy._remember(keys, "a")
    check_equal(policy.choose(keys, {"a": 30, "b": 0, "c": 0}), "b", "the engine when a has too much to do")
    check_equal(policy.choose(keys, {"a": 3, "b": 4, "c": 0}), "a", "the engine when a has less to do than b")
    check_equal(policy.choose(keys, {"a": 5, "b": 4, "c": 0}), "b", "the engine when b has less to do")


def test_the_next_best_is_no_substitute() -> None:
    """a knows all of the prompt and has too much to do, b knows two blocks of three; c knows nothing and has least to do.

    Why: what several want is to lie on one more engine, and the one that idles has the time to compute it.
    """
    policy = PrefixAffinity()
    policy._remember(keys_of(*"xyz"), "a")
    policy._remember(keys_of(*"xy"), "b")
    check_equal(policy.choose(keys_of(*"xyz"), {"a": 30, "b": 5, "c": 0}), "c", "the engine")


def test_a_shorter_beginning_may_have_been_forgotten() -> None:
    """Of three blocks only the third key is remembered, or the second and the third one; b knows the first.

    Why: a key stands for all before it. Whoever has seen it has the beginning, whatever else was forgotten.
    """
    for first in (1, 2):
        policy, keys = PrefixAffinity(), keys_of(*"xyz")
        policy._remember(keys[first:], "a")
        check_equal(policy._knowing(keys, IDLE), ["a"], f"who knows the longest beginning, without the first {first}")
        policy._remember(keys[:1], "b")
        check_equal(policy._knowing(keys, IDLE), ["a"], f"who knows it when b knows the first block, without {first}")


def test_the_longest_beginning_counts_and_not_the_most_of_it() -> None:
    """a knows one block of the prompt, b three, c two; and b is not the least loaded.

    Why: what is known of a prompt need not be computed. A block more is a block less of work.
    """
    policy = PrefixAffinity()
    for name, blocks in (("a", "x"), ("b", "xyz"), ("c", "xy")):
        policy._remember(keys_of(*blocks), name)
    check_equal(policy._knowing(keys_of(*"xyzw"), IDLE), ["b"], "who knows the longest beginning")
    check_equal(policy.choose(keys_of(*"xyzw"), {"a": 0, "b": 9, "c": 1}), "b", "the engine")
    check_equal(sorted(policy._knowing(keys_of(*"xy"), IDLE)), ["b", "c"], "who knows two blocks")


@pytest.mark.parametrize(("known", "of", "expected"), [(1, 4, ["a"]), (1, 5, []), (2, 5, ["a"]), (2, 9, []), (3, 3, ["a"])])
def test_a_small_share_does_not_matter(known: int, of: int, expected: list[str]) -> None:
    """a knows some of a prompt's blocks; they count from a quarter of them on.

    Why: all requests of an application begin with the same few lines. They would all go to one engine because of them.
    """
    policy, prompt = PrefixAffinity(), [chr(97 + number) for number in range(of)]
    policy._remember(keys_of(*prompt[:known]), "a")
    check_equal(policy._knowing(keys_of(*prompt), IDLE), expected, "who knows enough")


def test_an_engine_that_is_gone_is_not_asked() -> None:
    """a knows most, but is not there any more; b knows less, and is.

    Why: replicas come and go. A name that nobody answers to is an error for somebody who did nothing wrong.
    """
    policy = PrefixAffinity()
    policy._remember(keys_of(*"xyz"), "a")
    policy._remember(keys_of(*"xy"), "b")
    loads = {"b": 3, "c": 0}
    check_equal(policy._knowing(keys_of(*"xyz"), loads), ["b"], "who knows the longest beginning")
    check_equal(policy.choose(keys_of(*"xyz"), loads), "b", "the engine")


def test_of_equals_the_one_that_has_seen_least() -> None:
    """Nobody knows the prompt. c has the fewest requests, though it has seen most; of a and b, b has seen fewer keys; then it
    is the name.

    Why: at rest all loads are 0. By name alone the first engine would get every new conversation.
    """
    policy = PrefixAffinity()
    policy._remember(keys_of(*"pq"), "a")
    policy._remember(keys_of(*"r"), "b")
    policy._remember(keys_of(*"stu"), "c")
    check_equal(policy.choose(keys_of("x"), {"a": 1, "b": 1, "c": 0}), "c", "the engine: c has least to do")
    check_equal(policy.choose(keys_of(*"yz"), {"a": 1, "b": 1, "c": 2}), "b", "the engine: b has seen one key, a two")
    check_equal(policy.choose([], {"b": 0, "a": 0}), "a", "the engine of a prompt without keys: a has seen two, b three")
    check_equal(PrefixAffinity().choose([], {"b": 0, "a": 0}), "a", "the engine by name")
    policy = PrefixAffinity()
    check_equal([policy.choose([], {"b": 0, "a": 0}) for _ in range(2)], ["a", "a"], "a has seen no key, like b")


# Remembering


def test_longer_beginnings_are_forgotten_first() -> None:
    """Room for four keys. A prompt of three blocks, then another one of two: the end of the first goes.

    Why: short beginnings are what prompts share. Without its first block a prompt's later ones are worth nothing either.
    """
    policy = PrefixAffinity(max_entries=4)
    first, second = keys_of(*"xyz"), keys_of(*"pq")
    policy._remember(first, "a")
    policy._remember(second, "b")
    check_equal(list(noted(policy)), [first[1], first[0], second[1], second[0]], "what is left, the first to go first")
    policy._remember(first[:1], "a")
    policy._remember(keys_of(*"v"), "b")
    check_equal(list(noted(policy))[:2], [second[1], second[0]], "what goes next: the first prompt's beginning was used again")
    policy.check_invariants()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_counts_are_those_of_the_map(data: st.DataObject) -> None:
    """Any order of prompts and engines in a small memory: `check_invariants` holds, and what is remembered is a list's.

    Why: counts that drift send all new conversations to one engine, after a week.
    """
    policy, order = PrefixAffinity(max_entries=data.draw(st.integers(1, 8))), list[tuple[bytes, set[str]]]()
    for _ in range(data.draw(st.integers(1, 12))):
        keys = keys_of(*data.draw(st.lists(st.sampled_from("xy"), min_size=1, max_size=4)))
        name = data.draw(st.sampled_from("ab"))
        policy._remember(keys, name)
        for key in reversed(keys):
            owners = next((each for known, each in order if known == key), set())
            order = [(known, each) for known, each in order if known != key] + [(key, owners | {name})]
        order = order[-policy.max_entries :]
        check_equal(list(noted(policy).items()), order, "what is remembered, the first to go first")
        policy.check_invariants()
