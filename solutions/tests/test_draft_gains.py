"""What the tokens of a draft are worth, in chains and trees; and how much of a tree is drafted, in simulated time.

The oracle of the second is the same simulated time with a fixed beginning of the tree, or with nothing drafted.
"""

from __future__ import annotations

import random
from itertools import pairwise, product
from statistics import fmean

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.batching.token_tree import accepted_path, tree_of
from solutions.core.speculation.draft_gains import DOUBT, LEARNED, SIDE, Gains, pooled
from solutions.core.speculation.draft_lengths import DraftLengths

PATHS = [[0], [0, 0], [0, 0, 0], [1], [2], [0, 1], [1, 0]]
"""Nodes 1 to 7 in their order: 0, 00, 000, 1, 2, 01, 10."""


def of_tree() -> Gains:
    return Gains(*tree_of(PATHS))


def test_a_chain_is_worth_powers_of_its_chance():
    assert Gains().of([0.5, 0.0, 1.0], 3).tolist() == [[0.5, 0.25, 0.125], [0, 0, 0], [1, 1, 1]]
    assert Gains().passes(np.array([1, 2, 5])).tolist() == [1, 2, 5]


def test_a_tree_is_worth_the_chances_of_its_paths():
    """Each node's chance is that of its path; from where a node brings more than the one before, means of both."""
    side = 0.6 * SIDE
    raw = [0.6, 0.36, 0.216, 0.4 * side, 0.4 * side, 0.6 * 0.4 * side, 0.4 * side * 0.6]
    (row,) = of_tree().of([0.6], 7)
    assert row.tolist() == pytest.approx(raw)  # falls anyway
    (row,) = of_tree().of([0.2], 9)
    side = 0.2 * SIDE
    mean = (0.04 + 0.008 + 2 * 0.8 * side) / 4  # 00 and 000 are worth less than the two behind them
    assert row.tolist() == pytest.approx([0.2, mean, mean, mean, mean, 0.2 * 0.8 * side, 0.8 * side * 0.2, 0, 0])
    assert of_tree().of([0.0], 7).tolist() == [[0.0] * 7]


def test_passes_of_a_tree_are_its_levels():
    assert of_tree().passes(np.array([1, 2, 3, 4, 7, 9])).tolist() == [1, 2, 3, 3, 3, 3]


def test_of_a_walk_each_rank_counts_where_it_was_tried():
    """As multiples of the likeliest's chance, which is 0.5 here and then 0.25."""

    def sides() -> list[float]:
        rows = gains.of([0.9], 5)[0]
        return [float(rows[3]) / 0.09, float(rows[4]) / 0.09]  # of nodes 1 and 2, where 0 is wrong

    gains = of_tree()
    assert gains.walk(7, [1, 2], 0.5) == (2, 3)  # 0 and 00 were right, 000 was not
    assert sides() == pytest.approx([SIDE, SIDE])  # siblings of a right child were not tried
    assert gains.walk(7, [4], 0.5) == (0, 2)  # 1 was right instead of 0, and 10 was not
    hits, total = LEARNED * SIDE * DOUBT, LEARNED * DOUBT + 0.5
    assert sides() == pytest.approx([(hits + 1) / total, hits / total])
    assert gains.walk(3, [], 0.5) == (0, 1)  # a beginning that is a chain
    gains.walk(4, [], 0.25)
    hits, total = LEARNED * (hits + 1), LEARNED * total + 0.25
    assert sides()[0] == pytest.approx(hits / total)


@given(st.lists(st.floats(0, 1), max_size=12))
@settings(max_examples=60)
def test_pooled_values_fall_and_keep_their_sums(values):
    """They are the slopes of the least concave curve above the sums: found here by trying all pairs of ends."""
    found, sums = pooled(values), np.concatenate(([0.0], np.cumsum(values)))
    assert all(one >= two - 1e-9 for one, two in pairwise(found))
    curve = [
        max(
            sums[a] + (sums[b] - sums[a]) * (i - a) / (b - a) if a < b else sums[a]
            for a, b in product(range(i + 1), range(i, len(sums)))
        )
        for i in range(len(sums))
    ]
    assert np.cumsum([0.0, *found]) == pytest.approx(curve, abs=1e-9)


class TreeRun:
    """Decoding of some sequences in simulated time: a step takes 10 and `per_row` for each row, a pass of the head `a_pass`.

    Args:
        chances: of ranks 0, 1 and 2 at each node, or what they are by the sequence's length. fixed: nodes that are always
            drafted; None: as many as pay.
    """

    def __init__(
        self, chances, num_seqs: int, per_row: float, a_pass: float, fixed: int | None = None, seed: int = 1
    ) -> None:  # fmt: skip
        self.chances, self.per_row, self.a_pass, self.fixed = chances, per_row, a_pass, fixed
        self.tree, self.ranks = tree_of(PATHS)
        self.lengths = DraftLengths(gains=of_tree())
        self.positions, self.time, self.drafted = [0] * num_seqs, 0.0, list[int]()
        self.random = random.Random(seed)

    def step(self) -> None:
        num_seqs, lengths = len(self.positions), self.lengths
        counts = [self.fixed or 0] * num_seqs
        if self.fixed is None and not lengths.rests():
            counts = lengths.choose(range(num_seqs), [7] * num_seqs, [0] * num_seqs)
        spent = self.a_pass * (int(self.tree.depths[1 : max(counts) + 1].max()) if max(counts) else 0)
        if max(counts):
            lengths.drafted(spent, max(counts), [0])
        num_new = num_seqs
        for seq, count in enumerate(counts):
            tree = self.tree.first(count)
            own = [self.random.choices([0, 1, 2, 3], self._weights(seq))[0] for _ in tree.parents]
            kept = accepted_path(tree.parents, self.ranks[:count], own) if count else []
            if count > 3:
                lengths.judge_tree(seq, count, kept)
            elif count:
                lengths.judge(seq, len(kept), count)
            num_new += len(kept)
            self.positions[seq] += 1 + len(kept)
        seconds = 10 + self.per_row * (num_seqs + sum(counts))
        self.time += seconds + spent
        self.drafted.append(sum(counts))
        lengths.ran(num_seqs, sum(counts), num_new, seconds, spent)

    def _weights(self, seq: int) -> list[float]:
        given = self.chances(self.positions[seq]) if callable(self.chances) else self.chances
        return [*given, 1 - sum(given)]

    def rate(self, num_tokens: int) -> float:
        while sum(self.positions) < num_tokens:
            self.step()
        return sum(self.positions) / self.time


@pytest.mark.parametrize("num_seqs", [1, 4])
@pytest.mark.parametrize("chances", [(0.4, 0.2, 0.1), (0.8, 0.1, 0.02), (0.02, 0.01, 0.0)], ids=["fair", "sure", "hopeless"])
@pytest.mark.parametrize("per_row", [0.05, 0.6, 4.0])
def test_as_much_of_a_tree_is_drafted_as_pays(chances, num_seqs, per_row):
    rates = {n: TreeRun(chances, num_seqs, per_row, 0.3, n).rate(1200 * num_seqs) for n in range(8)}
    adapted = fmean(TreeRun(chances, num_seqs, per_row, 0.3, seed=seed).rate(1200 * num_seqs) for seed in range(4))
    assert adapted >= 0.94 * max(rates.values())
    assert adapted >= 0.97 * rates[0]


def test_after_a_text_of_which_nothing_was_foreseen_a_head_is_tried_again():
    """A small model, of whose step the head's pass is a tenth: 300 tokens of which hardly any is foreseen, and then better."""
    best = max(TreeRun((0.5, 0.2, 0.1), 1, 0.1, 1.0, count).rate(600) for count in range(8))
    shares = []
    for seed in range(32):
        run = TreeRun(lambda position: (0.02, 0.0, 0.0) if position < 300 else (0.5, 0.2, 0.1), 1, 0.1, 1.0, seed=seed)
        while run.positions[0] < 300:
            run.step()
        before, first = run.time, len(run.drafted)
        while run.positions[0] < 600:
            run.step()
        shares.append(300 / (run.time - before) / best)
        assert sum(run.drafted[first : first + 60]) > 0
    assert fmean(shares) >= 0.8
