"""Task 4.14 ★: where the tokens of a tree stand, what each must not see, and which of them stay."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batching.token_tree import MOST_NODES, TokenTree, accepted_path, hidden_keys, node_depths
from stages.course.fixtures.checks import check_equal

PARENTS = (-1, 0, 1, 1, 0, 4, 2)
"""The root 0 goes on to 1 and 4, 1 to 2 and 3, 2 to 6, and 4 to 5."""


@st.composite
def trees(draw: st.DrawFn) -> tuple[int, ...]:
    size = draw(st.integers(0, 18))
    return (-1, *(draw(st.integers(0, node - 1)) for node in range(1, size + 1)))


def path_to(parents: tuple[int, ...], node: int) -> list[int]:
    """The nodes from the root to one, both included."""
    return [*path_to(parents, parents[node]), node] if node else [0]


def test_a_node_stands_as_deep_as_its_path_is_long() -> None:
    """Depths of a small tree.

    Why: the depth is the token's position in the text behind the root. Where a node lies in the cache says nothing about it.
    """
    check_equal(node_depths(PARENTS), [0, 1, 2, 2, 1, 2, 3], f"node_depths of {PARENTS}")


def test_a_chain_stands_one_behind_the_other_and_hides_nothing() -> None:
    """A chain of five, and a root alone.

    Why: drafts that do not branch are trees, too, and a plain causal mask is right for them.
    """
    for size in (0, 1, 5):
        chain = tuple(range(-1, size))
        check_equal(node_depths(chain), list(range(size + 1)), f"node_depths of {chain}")
        check_equal(hidden_keys(chain), [0] * (size + 1), f"hidden_keys of {chain}")


def test_siblings_are_hidden_from_each_other() -> None:
    """The words of a small tree, bit by bit.

    Why: two guesses at one place exclude each other. A token that sees its sibling's keys was computed in a text that nobody
    has written, and what follows it is checked against nonsense.
    """
    words = hidden_keys(PARENTS)
    check_equal(words[3], 0b10, f"the word of node 3 of {PARENTS}")  # 2, one place before it
    check_equal(words[4], 0b1110, f"the word of node 4 of {PARENTS}")  # 3, 2 and 1
    check_equal(words[5], 0b11100, f"the word of node 5 of {PARENTS}")  # 3, 2 and 1, not its parent 4
    check_equal(words[6], 0b1110, f"the word of node 6 of {PARENTS}")  # 5, 4 and 3, not 2 and 1


@settings(deadline=None, max_examples=60)
@given(trees())
def test_what_is_not_hidden_is_the_own_path(parents: tuple[int, ...]) -> None:
    """Random trees against their paths written out.

    Why: a token must see itself, all from which it goes on, and nothing else of the tree.
    """
    words, depths = hidden_keys(parents), node_depths(parents)
    for node, word in enumerate(words):
        seen = [other for other in range(node + 1) if not word >> (node - other) & 1]
        check_equal(seen, path_to(parents, node), f"what node {node} sees of {parents}")
        check_equal(depths[node], len(seen) - 1, f"the depth of node {node} of {parents}")


@settings(deadline=None, max_examples=30)
@given(trees())
def test_the_text_before_the_root_is_never_hidden(parents: tuple[int, ...]) -> None:
    """No word of a random tree reaches over the root.

    Why: a bit further back is a token of the prompt, which every guess goes on from.
    """
    for node, word in enumerate(hidden_keys(parents)):
        check_equal(word >> max(node, 0), 0, f"bits of node {node} from its root on of {parents}")


def test_the_largest_tree_fits_into_a_word() -> None:
    """63 guesses at one token, as 64-bit numbers with a sign.

    Why: the kernels read the words as int64; a bit too many is another number, or none.
    """
    star = TokenTree((-1, *[0] * MOST_NODES))
    check_equal(star.hidden_keys.tolist()[-1], 2**MOST_NODES - 2, "the last word")
    check_equal(star.depths.tolist()[-1], 1, "the last depth")


DRAFTED = [10, 20, 21, 11, 30, 40]
"""Tokens of the nodes 1 to 6 of `PARENTS`."""


@pytest.mark.parametrize(
    ("own", "path"),
    [
        ([10, 20, 40, 0, 0, 0, 9], [1, 2, 6]),  # to a leaf: the token behind it is the target's own
        ([11, 0, 0, 0, 30, 7, 0], [4, 5]),  # the second child
        ([10, 99, 40, 0, 30, 0, 0], [1]),  # nobody holds 99
        ([77, 20, 40, 0, 30, 0, 0], []),  # not even the first token
        ([20, 21, 0, 0, 0, 0, 0], []),  # held by a node that does not go on from the root
    ],
)
def test_the_walk_follows_what_the_target_says(own: list[int], path: list[int]) -> None:
    """From the root to the node that holds the target's own token, and on from there.

    Why: what comes out is what the target alone would have written. A right token at another place of the tree was computed
    behind another text.
    """
    for more in (0, 40_000):
        drafted, of_target = ([token + more for token in tokens] for tokens in (DRAFTED, own))
        check_equal(accepted_path(PARENTS, drafted, of_target), path, f"accepted_path of {PARENTS}, {drafted}")


def test_a_right_guess_behind_a_wrong_one_is_worth_nothing() -> None:
    """Two branches hold the same token one deeper; only one branch is right.

    Why: behind a rejected token all is computed in a text that is not going to be.
    """
    parents, drafted = (-1, 0, 0, 1, 2), [5, 6, 8, 8]
    found = accepted_path(parents, drafted, [6, 8, 8, 1, 2])
    check_equal(found, [2, 4], f"accepted_path of {parents}")


def test_a_root_alone_accepts_nothing() -> None:
    """No draft at all.

    Why: sequences without a draft are in the same step, and the target's token behind the root is their new one.
    """
    check_equal(accepted_path((-1,), [], [3]), [], "accepted_path of a root")


@settings(deadline=None, max_examples=80)
@given(trees(), st.integers(0, 10**6))
def test_the_walk_finds_the_longest_right_path(parents: tuple[int, ...], seed: int) -> None:
    """Random trees and random answers, against all paths.

    Why: a token that stays is a step that need not be run; one that stays wrongly is a wrong answer.
    """
    rng, drafted = random.Random(seed), [0] * (len(parents) - 1)
    for parent in set(parents):
        children = [node for node in range(1, len(parents)) if parents[node] == parent]
        for node, token in zip(children, rng.sample(range(25), len(children)), strict=True):
            drafted[node - 1] = token
    own = [rng.randrange(25) for _ in parents]
    for node in range(1, len(parents)):
        if rng.random() < 0.5:
            own[parents[node]] = drafted[node - 1]
    paths = [path_to(parents, node) for node in range(len(parents))]
    right = [path for path in paths if all(drafted[b - 1] == own[a] for a, b in itertools.pairwise(path))]
    found = accepted_path(parents, drafted, own)
    check_equal([0, *found], max(right, key=len), f"the walk of {parents}")
