"""Where requests go: to who knows their beginning, within bounds of load; all by itself, without engines."""

from __future__ import annotations

import collections
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.serving.replicas.prefix_router import (
    BLOCK_CHARACTERS,
    BLOCK_TOKENS,
    MAX_BLOCKS,
    PrefixAffinity,
    RoundRobin,
    prefix_keys,
    request_keys,
)

IDLE = {"a": 0, "b": 0, "c": 0}


def text(prefix: str, blocks: int = 4, tail: str = "") -> str:
    return (prefix * BLOCK_CHARACTERS)[: blocks * BLOCK_CHARACTERS].ljust(blocks * BLOCK_CHARACTERS, ".") + tail


# Keys


def test_a_key_covers_everything_before_it() -> None:
    one, other = prefix_keys(text("x", 4)), prefix_keys("y" + text("x", 4)[1:])
    assert len(one) == len(set(one)) == 4
    assert set(one).isdisjoint(other)
    assert prefix_keys(text("x", 2)) == one[:2]


def test_only_full_blocks_have_keys() -> None:
    assert prefix_keys("") == prefix_keys("x" * (BLOCK_CHARACTERS - 1)) == prefix_keys([1] * (BLOCK_TOKENS - 1)) == []
    assert prefix_keys(text("x", 1, "tail")) == prefix_keys(text("x", 1))
    assert len(prefix_keys([7] * (3 * BLOCK_TOKENS + 1))) == 3
    assert len(prefix_keys("x" * BLOCK_CHARACTERS * (MAX_BLOCKS + 5))) == MAX_BLOCKS


def test_a_salt_parts_equal_prompts() -> None:
    assert set(prefix_keys(text("x"), "mine")).isdisjoint(prefix_keys(text("x")))


def test_keys_of_requests() -> None:
    prompt, ids = text("Once"), list(range(40))
    assert request_keys({"prompt": prompt}) == request_keys({"prompt": [prompt, "other"]}) == prefix_keys(prompt)
    assert request_keys({"prompt": ids}) == request_keys({"prompt": [ids, [1]]}) == prefix_keys(ids)
    assert request_keys({"prompt": prompt, "cache_salt": "s"}) == prefix_keys(prompt, "s")
    system = {"role": "system", "content": prompt}
    chats = [request_keys({"messages": [system, {"role": "user", "content": tail * 30}]}) for tail in ("one", "two")]
    assert chats[0][:4] == chats[1][:4]
    assert chats[0][4:] != chats[1][4:]
    parts = {"role": "system", "content": [{"type": "text", "text": prompt}]}
    assert request_keys({"messages": [parts]}) == request_keys({"messages": [system]})
    assert len(request_keys({"prompt": "\ud800" * BLOCK_CHARACTERS, "cache_salt": "\udfff"})) == 1  # JSON can say it
    assert request_keys({"messages": [{**system, "role": "user"}]}) != request_keys({"messages": [system]})


@pytest.mark.parametrize(
    "body",
    [None, [], "text", {}, {"prompt": 5}, {"prompt": None}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [True, "x"]},
     {"prompt": [-1] * 40}, {"prompt": [2**70] * 40}, {"prompt": [1.5] * 40}, {"messages": []}, {"messages": "hi"},
     {"messages": [1, None, {"role": 3}, {"content": [1, {}]}]}, {"prompt": "hi", "cache_salt": 3}],
)  # fmt: skip
def test_bodies_that_are_no_requests_have_no_keys(body: Any) -> None:
    assert request_keys(body) == []


# Choosing


def test_the_same_beginning_goes_to_the_same_engine() -> None:
    policy = PrefixAffinity()
    homes = {name: policy.choose(prefix_keys(text(name, 4, "first")), IDLE) for name in "uvwxyz"}
    assert collections.Counter(homes.values()) == {"a": 2, "b": 2, "c": 2}  # dealt out evenly
    for number in range(3):
        for name, home in homes.items():
            assert policy.choose(prefix_keys(text(name, 4, f"{number} " * 30)), IDLE) == home


def test_the_longest_beginning_decides() -> None:
    policy = PrefixAffinity(min_share=0.0)
    short, long = prefix_keys(text("x", 2)), prefix_keys(text("x", 8))
    assert policy.choose(short, {"a": 0}) == "a"
    assert policy.choose(long, {"b": 0}) == "b"
    assert policy.choose(prefix_keys(text("x", 9)), {"a": 0, "b": 1}) == "b"


def test_a_short_common_beginning_draws_nobody() -> None:
    policy = PrefixAffinity(min_share=0.25)
    prompts = [prefix_keys(text("system", 1) + text(name, 7)) for name in "uvwxyz"]
    assert len({keys[0] for keys in prompts}) == 1
    assert collections.Counter(policy.choose(keys, IDLE) for keys in prompts) == {"a": 2, "b": 2, "c": 2}


def test_an_overloaded_engine_is_passed_over_and_its_beginning_is_shared() -> None:
    policy = PrefixAffinity(max_imbalance=4, max_ratio=1.5)
    keys = prefix_keys(text("x"))
    assert policy.choose(keys, IDLE) == "a"
    assert policy.choose(keys, {"a": 4, "b": 0, "c": 1}) == "a"
    assert policy.choose(keys, {"a": 5, "b": 0, "c": 1}) == "b"
    assert policy.choose(keys, {"a": 5, "b": 4, "c": 4}) == "b"  # which knows it now too; c is no better
    assert policy.choose(keys, {"a": 29, "b": 30, "c": 20}) == "a"  # within the ratio
    assert policy.choose(keys, {"a": 31, "b": 31, "c": 20}) == "c"


def test_without_keys_the_least_loaded_engine_is_chosen() -> None:
    assert PrefixAffinity().choose([], {"a": 2, "b": 1, "c": 3}) == "b"


def test_an_engine_that_is_gone_is_forgotten() -> None:
    policy = PrefixAffinity()
    keys = prefix_keys(text("x"))
    assert policy.choose(keys, IDLE) == "a"
    assert policy.choose(keys, {"b": 3, "c": 1}) == "c"  # not offered, though not yet known to be gone
    policy.retain(["b"])
    assert len(policy) == 0
    policy.check_invariants()
    assert policy.choose(keys, {"a": 5, "b": 5}) == "a"  # a new one of that name knows nothing: by name, like any


def test_the_memory_is_bounded_and_keeps_what_is_used() -> None:
    policy = PrefixAffinity(max_entries=8)
    kept = prefix_keys(text("kept", 4))
    home = policy.choose(kept, IDLE)
    for number in range(20):
        policy.choose(prefix_keys(text(f"{number}-", 4)), IDLE)
        assert policy.choose(kept, {**IDLE, home: 1}) == home
        policy.check_invariants()
        assert len(policy) <= 8


def test_round_robin_takes_turns() -> None:
    policy = RoundRobin()
    assert [policy.choose([b"k"], {"b": 9, "a": 0}) for _ in range(4)] == ["a", "b", "a", "b"]


@settings(max_examples=200, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 5), st.integers(1, 6), st.integers(0, 60)), max_size=120),
    max_imbalance=st.integers(0, 8),
    max_ratio=st.floats(1.0, 3.0),
    max_entries=st.integers(1, 40),
)
def test_no_choice_exceeds_the_allowed_imbalance(
    steps: list[tuple[int, int, int]], max_imbalance: int, max_ratio: float, max_entries: int
) -> None:
    """Requests of some groups come and end in any order, and engines come and go."""
    policy = PrefixAffinity(max_imbalance, max_ratio, max_entries=max_entries)
    loads = dict.fromkeys("abc", 0)
    for group, blocks, event in steps:
        if event < 10 and any(loads.values()):
            loads[max(loads, key=lambda name: (loads[name], name))] -= 1
        elif event == 10 and len(loads) > 1:
            del loads[min(loads)]
            policy.retain(loads)
        elif event == 11:
            loads.setdefault("d", 0)
        least = min(loads.values())
        chosen = policy.choose(prefix_keys(text(str(group), blocks)), loads)
        assert loads[chosen] <= max(least + max_imbalance, least * max_ratio)
        loads[chosen] += 1
        policy.check_invariants()
