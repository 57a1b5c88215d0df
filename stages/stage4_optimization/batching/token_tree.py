"""The shape of drafts that branch: which drafted token goes on from which, what each sees, and which of them turn out right.

Node 0 is the last token that a sequence has; the drafted tokens are the nodes behind it, in an order in which each comes after
the one that it goes on from. A path through the tree is one guess at the text to come. All nodes are checked in one step: they
lie behind one another in the KV cache, stand at the position that their depth says, and see the whole context but only those
nodes that they go on from. Source: Miao et al., "SpecInfer: Accelerating Large Language Model Serving with Tree-based
Speculative Inference and Verification", ASPLOS 2024, §4 (tree attention in one pass, verification).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

MOST_NODES = 63
"""Most drafted tokens of a tree: what a token does not see of the 63 before it has room in a word."""


@dataclass(frozen=True)
class TokenTree:
    """The shape of a tree of n drafted tokens, which is the same in every step.

    Attributes:
        parents: [n + 1], the node that each goes on from, which comes before it; −1 for node 0, the root.
    """

    parents: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.parents[0] == -1, "node 0 is the root"
        assert all(0 <= parent < node for node, parent in enumerate(self.parents) if node), self.parents

    @cached_property
    def depths(self) -> NDArray[np.int64]:
        """[n + 1], how many steps each node is from the root, whose depth is 0."""
        return np.array(node_depths(self.parents), np.int64)

    @cached_property
    def hidden_keys(self) -> NDArray[np.int64]:
        """[n + 1], see `hidden_keys`."""
        return np.array(hidden_keys(self.parents), np.int64)

    def first(self, count: int) -> TokenTree:
        """The tree of the first `count` drafted tokens."""
        return self if count + 1 >= len(self.parents) else TokenTree(self.parents[: count + 1])


def node_depths(parents: Sequence[int]) -> list[int]:
    """How many steps each node is from the root: its position in the text is the root's and so many more.

    Args:
        parents: as in `TokenTree`.

    Returns:
        [n + 1], 0 for the root.
    """
    # Hint: Draw the tree of the worked example and number its nodes. Write beside each node the path to it: its length
    # is the depth, and who is on it is seen.
    raise NotImplementedError("Stage 4 · Task 4.14: node_depths, see stages/stage4_optimization/GUIDE.md#task-4-14")


def hidden_keys(parents: Sequence[int]) -> list[int]:
    """The tree's mask: which of the nodes before it each node must not see, as a word of bits.

    Nodes lie behind one another in the KV cache, so a plain causal mask would let each see all nodes before it. It must see
    itself and those that it goes on from, up to the root; what lies before the root all of them see.

    Args:
        parents: as in `TokenTree`; at most `MOST_NODES` behind the root.

    Returns:
        [n + 1] words. Bit d of node i's is set if node i − d is hidden from it. A chain's words are all 0.
    """
    raise NotImplementedError("Stage 4 · Task 4.14: hidden_keys, see stages/stage4_optimization/GUIDE.md#task-4-14")


def accepted_path(parents: Sequence[int], drafted: Sequence[int], own: Sequence[int]) -> list[int]:
    """Walk from the root along the nodes that hold what the target itself says.

    At each node the target has its own next token, drawn behind that node's path. If a node that goes on from here holds it,
    the walk goes there, and the target's token behind that one is asked for next. So what comes out is what plain decoding
    draws, whatever was drafted. A node's children hold different tokens.

    To try the children one by one, accept a token x with the probability p(x) and else go on with what is left of p, as
    SpecInfer's multi-step sampling does, comes to the same where the children are fixed and not drawn: each is accepted with
    p(x) in all.

    Args:
        parents: as in `TokenTree`. drafted: [n], the token of each node behind the root.
        own: [n + 1], the target's own token behind each node.

    Returns:
        The nodes that stay, in the order of the walk, without the root. The new tokens of the sequence are theirs, and behind
        them the target's own token at the last one.
    """
    raise NotImplementedError("Stage 4 · Task 4.14: accepted_path, see stages/stage4_optimization/GUIDE.md#task-4-14")


def tree_of(paths: Sequence[Sequence[int]]) -> tuple[TokenTree, list[int]]:
    """The tree that some paths describe, in an order in which the likeliest chain comes first and then level after level.

    So a draft that is cut short for want of room keeps its best part, and the likeliest path lies in the KV cache as it will
    have to if it is accepted.

    Args:
        paths: of every node but the root, in any order: for each step from the root, which choice of the drafter it is, 0 for
            the likeliest. ``[(0,), (1,), (0, 0)]`` is two guesses at the next token, the first of which goes on.

    Returns:
        The tree, and for each node behind the root, in the same order, the last entry of its path.

    Raises:
        ValueError: a path is empty or there twice, has a negative entry, begins with one that is not there, or there are none
            or too many.
    """
    given = [tuple(path) for path in paths]
    if not 0 < len(given) <= MOST_NODES:
        raise ValueError(f"it must have 1 to {MOST_NODES} tokens, and has {len(given)}")
    for path in given:
        if not path or min(path) < 0 or given.count(path) > 1:
            raise ValueError(f"each path must be there once and have choices from 0 on; {path} is wrong")
        if len(path) > 1 and path[:-1] not in given:
            raise ValueError(f"{path} goes on from {path[:-1]}, which is missing")
    order = [(), *sorted(given, key=lambda path: (any(path), len(path), path))]
    parents = [order.index(path[:-1]) if path else -1 for path in order]
    return TokenTree(tuple(parents)), [path[-1] for path in order[1:]]
