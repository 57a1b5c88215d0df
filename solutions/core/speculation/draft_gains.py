"""How likely the tokens of a draft are to stay, in chains and in trees, and how many passes of a drafting model they take.

In a chain each token stays with a chance a if all before it do, the sequence's own chance. In a tree a likeliest child does;
where it does not, another child may be right. Its chance is counted for its rank over all sequences, as a multiple of a: of a
text of which the head foresees nothing, its second thoughts are worth nothing either.
"""

from __future__ import annotations

from collections.abc import Sequence as Many

import numpy as np
from numpy.typing import NDArray

from ...batching.token_tree import TokenTree

SIDE, DOUBT = 0.4, 4.0
"""The chance of a child of another rank at the start, where the likeliest is wrong, as a share of that of the likeliest; it
counts like children whose likeliest siblings have such a sum of chances."""
LEARNED = 0.98
"""Weight of what was counted of a rank before, against the newest step that had such a child."""


class Gains:
    """What each token of a draft brings.

    Args:
        tree: the shape of drafts; None: chains. ranks: of its nodes behind the root, as `token_tree.tree_of` gives them.
    """

    def __init__(self, tree: TokenTree | None = None, ranks: Many[int] = ()) -> None:
        self._tree, self._ranks = tree, [0, *ranks]
        self._sides = dict.fromkeys(sorted(set(ranks) - {0}), (SIDE * DOUBT, DOUBT))
        """Rank → how often such children were right; the sum of their likeliest siblings' chances. Both fade."""

    def of(self, chances: Many[float], longest: int) -> NDArray[np.float64]:
        """The chance of each token to stay, [S, longest], falling along each draft: where a token of a tree brings more than
        the one before, the two are worth their mean, as there is no way to the second without the first.

        Args:
            chances: of each sequence's likeliest tokens. longest: tokens of a draft at most.
        """
        own = np.array(chances, np.float64)[:, None]
        if self._tree is None:
            powers: NDArray[np.float64] = own ** np.arange(1, longest + 1)
            return powers
        columns, sides = [np.ones(len(own))], {rank: hits / total for rank, (hits, total) in self._sides.items()}
        for node, parent in enumerate(self._tree.parents[1 : longest + 1], 1):
            rank = self._ranks[node]
            likely = own[:, 0] if rank == 0 else (1 - own[:, 0]) * np.minimum(sides[rank] * own[:, 0], 1)
            columns.append(columns[parent] * likely)
        columns += [np.zeros(len(own))] * (longest + 1 - len(columns))
        return np.array([pooled(row) for row in np.stack(columns[1:], axis=1)])

    def passes(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Passes of the drafting model, one behind the other, for drafts of so many tokens each, at least one."""
        if self._tree is None:
            return counts
        deepest = np.maximum.accumulate(self._tree.depths)
        return deepest[np.minimum(counts, len(deepest) - 1)]

    def walk(self, count: int, kept: Many[int], chance: float) -> tuple[int, int]:
        """The first `count` nodes of the tree were checked, and `kept` of them stay: count the other ranks. `chance`: of the
        sequence's likeliest tokens.

        Returns:
            How often a likeliest child was right, and how often there was one to be right.
        """
        assert self._tree is not None
        hits = tries = 0
        for here, there in zip([0, *kept], [*kept, -1], strict=True):
            children = [node for node, parent in enumerate(self._tree.parents[: count + 1]) if parent == here]
            right = self._ranks[there] if there > 0 else -1
            for rank in [self._ranks[node] for node in children]:
                if rank == 0:
                    hits, tries = hits + (right == 0), tries + 1
                elif right != 0:
                    found, total = self._sides[rank]
                    self._sides[rank] = LEARNED * found + (right == rank), LEARNED * total + chance
        return hits, tries


def pooled(values: Many[float]) -> list[float]:
    """The values with neighbours that rise replaced by their means, so that none is above the one before and each beginning
    that ends between two means has its sum (Ayer et al., 1955)."""
    groups: list[tuple[float, int]] = []
    for value in values:
        total, size = float(value), 1
        while groups and groups[-1][0] / groups[-1][1] < total / size:
            other, more = groups.pop()
            total, size = total + other, size + more
        groups.append((total, size))
    return [total / size for total, size in groups for _ in range(size)]
