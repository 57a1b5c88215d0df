"""The shape of a head's drafts, and the passes in which they come to be: at each node the tokens that it holds for the
likeliest, level after level, each in one pass.

The nodes that others go on from are computed behind one another in the head's row of its cache, with the mask that the target
checks the tree by (`token_tree.hidden_keys`). The next draft overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...batching.token_tree import TokenTree, node_depths, tree_of
from .draft_gains import Gains

Indices = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32], Tensor | None]


class Level:
    """Nodes of one depth that others go on from.

    Args:
        parents: of all drafted tokens, as in `TokenTree`. nodes: of this depth, in order. inner: all nodes that others go on
            from but the root, of this depth and the ones above, in the order in which they are computed. above: the level
            before; None: the root's. ranks: of all nodes, see `DraftShape`.

    Attributes:
        num_before: nodes of the levels before this one, but for the root. num_above: nodes of the level before. depth: the
            root's is 0. each: [m], from 0 on.
        parents: [m], which of the level above each goes on from. own_ranks: [m], theirs.
        hidden: [m], the mask of the nodes among `inner`; None: there is nothing in it.
        children: [c], the nodes one deeper. places: [c], which of this level each of them goes on from. ranks: [c], theirs.
    """

    def __init__(
        self, parents: Many[int], nodes: list[int], inner: list[int], above: Level | None, ranks: Many[int]
    ) -> None:  # fmt: skip
        self.nodes, self.num_before = nodes, 0 if above is None else len(inner) - len(nodes)
        self.parents = [] if above is None else [above.nodes.index(parents[node]) for node in nodes]
        self.num_above = 0 if above is None else len(above.nodes)
        self.own_ranks = [ranks[node] for node in nodes]
        self.depth: int = 0 if above is None else above.depth + 1
        self.children = [node for node, parent in enumerate(parents) if parent in nodes]
        self.places = [nodes.index(parents[node]) for node in self.children]
        self.ranks = [ranks[node] for node in self.children]
        shape = [-1, *(inner.index(parents[node]) + 1 if parents[node] else 0 for node in inner)]
        self.each = np.arange(len(nodes))
        self._indices: dict[int, Indices] = {}
        self.hidden: Tensor | None = None
        if not is_chain(shape):
            self.hidden = torch.from_numpy(TokenTree(tuple(shape)).hidden_keys[len(shape) - len(nodes) :].copy())

    def indices(self, num_seqs: int, most: int) -> Indices:
        """What a pass of this level reads for so many sequences, see `Pass`, where `most` tokens are found behind each output
        of the level before: tokens [S · m] and features [S · m]; where each sequence's nodes start [S + 1]; the mask."""
        if num_seqs not in self._indices:
            features = (np.arange(num_seqs)[:, None] * self.num_above + self.parents).ravel()
            tokens = features * most + np.tile(self.own_ranks, num_seqs)
            starts = np.arange(num_seqs + 1, dtype=np.int32) * len(self.nodes)
            mask = None if self.hidden is None else self.hidden.repeat(num_seqs)
            self._indices[num_seqs] = tokens, features, starts, mask
        return self._indices[num_seqs]


class DraftShape:
    """What is drafted for each sequence: a chain, or a tree.

    Args:
        parents: as in `TokenTree`. ranks: for each node behind the root, which choice of the head it is, from 0 on.

    Attributes:
        levels: the root's first, then those whose nodes the head computes. deepest: [n + 1], of the first so many drafted
            tokens. num_in_chain: drafted tokens that it begins with and that are a chain. most: choices that are looked at.
        gains: what its nodes are worth, and beginnings: [n + 1], the tree of its first n drafted tokens; None: it is a chain.
    """

    def __init__(self, parents: Many[int], ranks: Many[int]) -> None:
        ranks = [0, *ranks]
        depths = node_depths(parents)
        self.deepest = [max(depths[: count + 1]) for count in range(len(parents))]
        self.most = 1 + max(ranks)
        self.num_in_chain = next((i for i, parent in enumerate(parents[1:]) if parent != i), len(parents) - 1)
        inner = sorted(set(parents) - {-1, 0}, key=lambda node: (depths[node], node))
        self.levels = [Level(parents, [0], [], None, ranks)]
        for depth in range(1, 1 + max((depths[node] for node in inner), default=0)):
            computed = [node for node in inner if depths[node] <= depth]
            nodes = [node for node in computed if depths[node] == depth]
            self.levels.append(Level(parents, nodes, computed, self.levels[-1], ranks))
        self.gains: Gains | None = None
        self.beginnings: list[TokenTree] | None = None
        if not is_chain(parents):
            tree = TokenTree(tuple(parents))
            self.gains, self.beginnings = Gains(tree, ranks[1:]), [tree.first(count) for count in range(len(parents))]

    @classmethod
    def chain(cls, count: int) -> DraftShape:
        """Of so many tokens."""
        return cls(range(-1, count), [0] * count)

    @classmethod
    def tree(cls, paths: Many[tuple[int, ...]]) -> DraftShape:
        """See `token_tree.tree_of`."""
        tree, ranks = tree_of(paths)
        return cls(tree.parents, ranks)


def is_chain(parents: Many[int]) -> bool:
    """Whether each node goes on from the one before."""
    return list(parents) == list(range(-1, len(parents) - 1))
