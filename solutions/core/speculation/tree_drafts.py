"""Trees of drafts by a head: at each node the tokens that it holds for the likeliest, level after level, each in one pass.

The nodes that others go on from are computed behind one another in the head's row of its cache, with the mask that the target
checks the tree by (`token_tree.hidden_keys`). The next draft overwrites them.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module

from ...attention.paged_attention import AttentionBackend
from ...batching.sequence import Sequence
from ...batching.token_tree import TokenTree, tree_of
from ...models.heads.head import DraftHead
from ...parallelism.linear import Layer
from .draft_gains import Gains
from .head_drafts import HeadDrafts


class Level:
    """Nodes of one depth that others go on from.

    Args:
        tree: of all drafted tokens. nodes: of this depth, in order. inner: all nodes that others go on from but the root, of
            this depth and the ones above, in the order in which they are computed. above: the level before; None: the root's.

    Attributes:
        parents: [m], which of the level above each goes on from. hidden: [m], the mask of the nodes among `inner`.
        children: [c], the nodes one deeper. places: [c], which of this level each of them goes on from.
    """

    def __init__(self, tree: TokenTree, nodes: list[int], inner: list[int], above: Level | None) -> None:
        self.nodes = nodes
        self.parents = torch.tensor([] if above is None else [above.nodes.index(tree.parents[node]) for node in nodes])
        shape = [-1, *(inner.index(tree.parents[node]) + 1 if tree.parents[node] else 0 for node in inner)]
        self.hidden = torch.from_numpy(TokenTree(tuple(shape)).hidden_keys[len(shape) - len(nodes) :].copy())
        self.children = [node for node, parent in enumerate(tree.parents) if parent in nodes]
        self.places = [nodes.index(tree.parents[node]) for node in self.children]


def levels_of(tree: TokenTree) -> list[Level]:
    """The root's level first, then those whose nodes the head computes."""
    inner = sorted(set(tree.parents) - {-1, 0}, key=lambda node: (tree.depths[node], node))
    levels = [Level(tree, [0], [], None)]
    for depth in range(1, 1 + max((int(tree.depths[node]) for node in inner), default=0)):
        computed = [node for node in inner if tree.depths[node] <= depth]
        levels.append(Level(tree, [node for node in computed if tree.depths[node] == depth], computed, levels[-1]))
    return levels


class TreeDrafts(HeadDrafts):
    """Drafts that branch, for several sequences at once.

    Args:
        paths: of the tree's nodes, see `token_tree.tree_of`. The rest: as of `HeadDrafts`.

    Attributes:
        tree: of all drafts. beginnings: [n + 1], the tree of its first n drafted tokens. num_in_chain: drafted tokens that it
            begins with and that are a chain. gains: what its nodes are worth.
    """

    def __init__(
        self, paths: Many[tuple[int, ...]], head: DraftHead, embed: Layer, rotary: Module, backend: AttentionBackend, rows: int,
        longest: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.tree, self._ranks = tree_of(paths)
        self.beginnings = [self.tree.first(count) for count in range(len(self._ranks) + 1)]
        self.gains = Gains(self.tree, self._ranks)
        self._levels, self._last = levels_of(self.tree), longest - 1
        self._ranks_of = [[self._ranks[node - 1] for node in level.children] for level in self._levels]
        room = sum(len(level.nodes) for level in self._levels)  # behind a sequence that is as long as can be
        super().__init__(head, embed, rotary, backend, rows, longest + room, num_kv_heads, head_dim, dtype)
        self.num_in_chain = next((i for i, parent in enumerate(self.tree.parents[1:]) if parent != i), len(self._ranks))

    def _go_on(self, hidden: Tensor, drafting: list[Sequence], wanted: dict[Sequence, int]) -> list[list[int]]:
        rows, lengths, firsts = self._places(drafting)
        num_seqs, num_computed = len(drafting), 0
        tokens = np.zeros((num_seqs, len(self.tree.parents)), np.int64)
        deepest = int(self.tree.depths[1 : 1 + max(wanted[seq] for seq in drafting)].max())
        for depth, (level, ranks) in enumerate(zip(self._levels[:deepest], self._ranks_of, strict=False)):
            count = len(level.nodes)
            if depth:  # the root's output is there
                slots = (rows * self.longest + lengths + num_computed)[:, None] + np.arange(count)
                num_computed += count
                starts = np.arange(num_seqs + 1) * count
                metadata = self._metadata(slots.ravel(), rows, starts, lengths + num_computed, level.hidden.repeat(num_seqs))
                features = hidden.view(num_seqs, -1, hidden.shape[1])[:, level.parents].flatten(0, 1)
                positions = np.minimum(firsts + lengths + depth - 1, self._last).repeat(count)
                hidden = self._run(torch.from_numpy(tokens[:, level.nodes].ravel()), features, positions, metadata)
            best = self.head.best(hidden, 1 + max(ranks)).view(num_seqs, count, -1).numpy()
            tokens[:, level.children] = best[:, level.places, ranks]
        drafts: list[list[int]] = tokens[:, 1:].tolist()
        return drafts
