"""What a step of decoding takes, and how much longer it takes with tokens on trial: measured while the engine runs.

Nothing here comes from a table of machines. A step of S sequences without drafts takes p(S) seconds. One with N drafted tokens
takes q(S, N) times as long, and q is what tells whether drafts pay: near 1 while the model waits for memory, near (S + N) / S
where it computes all the time. Both are averages of what was measured, the latest steps counting most. Where nothing was
measured yet, q lies between two limits: it does not fall with N, and a token on trial costs no more than one in a step without,
nor much more than those did that were measured. Of many more than were ever on trial nothing is said.

A machine's speed changes, so q is measured in the first steps behind one without drafts. In later ones what is known of q tells
p: else each change of speed would be taken for what drafts cost. Both may be wrong together, as when p was measured while the
machine was busy. So now and then a step goes without drafts, and if it is far quicker than p, what was known of q is forgotten.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

NEWEST = 0.2
"""Weight of the newest measurement in an average that has enough of them."""
MOST_OFF = 1.25
"""A measurement counts as at most this many times the average, or one part in so many of it: now and then a machine is busy
with something else, and one such step must not decide what the next hundred do."""
DOUBTED = 128
"""Steps after which a ratio has to be measured once more, so that one that was measured too high is not believed for ever."""
FIRST_CHECK, FRESH = 8, 64
"""Steps of S sequences with drafts after which one without is due, at first and at most: p(S) grows with the context, and was
perhaps measured while the machine was busy."""
WRONG = 1.15
"""A step without drafts that is so many times as fast as p(S) says shows that p(S) was wrong, and with it each ratio."""
LEAST_SLOPE, STEEPER = 0.1, 2.0
"""What a token on trial may add to q at most, beyond what was measured: so many times what it added up to there, on average,
and a part of what a token costs in a step without."""
FURTHER = 2
"""At most so many times as many tokens are tried as ever were, or as there are sequences: they might cost nothing, and if they
do cost, the step must not be dear."""
NEAR = 4
"""Steps after one without drafts that tell of a ratio; in those behind them, a ratio that is known tells of p(S)."""
ENOUGH = 2
"""The first measurements, of which the least counts, as the first step of a kind is often slow; after them p(S) is known."""


class Average:
    """An average that follows what it measures.

    Attributes:
        value: None before the first measurement. count: how many there were.
    """

    def __init__(self) -> None:
        self.value: float | None = None
        self.count = 0

    def add(self, measured: float) -> None:
        """Take in a measurement, at least 0."""
        self.count += 1
        if self.value is None or self.count <= ENOUGH:
            self.value = measured if self.value is None else min(measured, self.value)
            return
        measured = min(max(measured, self.value / MOST_OFF), self.value * MOST_OFF)
        self.value += max(NEWEST, 1 / self.count) * (measured - self.value)


def size_class(count: int) -> int:
    """Counts that are measured together have the same class: each alone up to 8, and then in steps of an eighth."""
    step = 1 << max(0, count.bit_length() - 4)
    return -(-count // step) * step


class StepCosts:
    """p(S) and q(S, N), by classes of S and N."""

    def __init__(self) -> None:
        self._plain: dict[int, Average] = defaultdict(Average)
        self._ratios: dict[int, dict[int, Average]] = defaultdict(lambda: defaultdict(Average))
        self._limits: dict[tuple[int, int], tuple[NDArray[np.float64], NDArray[np.float64]]] = {}
        self._num_steps: dict[int, int] = defaultdict(int)
        self._num_since_plain: dict[int, int] = defaultdict(int)
        self._due: dict[int, int] = defaultdict(lambda: FIRST_CHECK)
        """Class of S → steps with drafts until one without is due."""
        self._newest: dict[int, tuple[int, float]] = {}
        """Class of S → tokens on trial in the newest step with drafts, and its seconds."""

    def plain(self, num_seqs: int) -> float | None:
        """Seconds of a step of so many sequences without drafts; None where that is not known, or was not measured lately."""
        average, size = self._plain.get(size_class(num_seqs)), size_class(num_seqs)
        if average is None or average.count < ENOUGH or self._num_since_plain[size] >= self._due[size]:
            return None
        return average.value

    def add(self, num_seqs: int, num_drafted: int, seconds: float) -> None:
        """A step has run: so many sequences, so many tokens on trial."""
        size = size_class(num_seqs)
        self._num_steps[size] += 1
        if self._num_steps[size] % DOUBTED == 0:
            for average in self._ratios[size].values():
                average.count = min(average.count, ENOUGH - 1)
            self._limits = {}
        if num_drafted == 0:
            self._check(size, seconds)
            self._plain[size].add(seconds)
            self._num_since_plain[size] = 0
            return
        self._num_since_plain[size] += 1
        self._newest[size] = num_drafted, seconds
        if (plain := self._plain[size].value) is None:
            return
        ratio = self._ratios[size][size_class(num_drafted)]
        if ratio.count >= ENOUGH and ratio.value and self._num_since_plain[size] > NEAR:
            self._plain[size].add(seconds / ratio.value)
        else:
            ratio.add(max(1.0, seconds / plain))
            self._limits = {key: limits for key, limits in self._limits.items() if key[0] != size}

    def _check(self, size: int, seconds: float) -> None:
        """A step without drafts has run. If it comes behind many with drafts: is p(S) what it was taken to be? Where that was
        too much, drafts looked cheap, and as long as there are drafts nothing else tells."""
        plain, num_since = self._plain[size], self._num_since_plain[size]
        if plain.value is None or num_since <= NEAR:
            return
        if wrong := WRONG * seconds < plain.value:
            plain.value = seconds
            self._ratios[size].clear()
            num_drafted, with_drafts = self._newest[size]
            self._ratios[size][size_class(num_drafted)].add(max(1.0, with_drafts / seconds))
            self._limits = {key: limits for key, limits in self._limits.items() if key[0] != size}
        if wrong or num_since >= self._due[size]:
            self._due[size] = FIRST_CHECK if wrong else min(2 * self._due[size], FRESH)

    def measured(self, num_seqs: int, num_drafted: int) -> float:
        """What was measured of q(S, N), which a step has run with."""
        return self._ratios[size_class(num_seqs)][size_class(num_drafted)].value or 1.0

    def ratios(self, num_seqs: int, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The least and the most that q(S, N) may be, for N from 1 to `most`: [N] each, equal where it was measured, infinite
        where N is too far from that."""
        key = size_class(num_seqs), most
        if key not in self._limits:
            self._limits[key] = self._work_out(*key)
        return self._limits[key]

    def _work_out(self, size: int, most: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        known = sorted((count, average) for count, average in self._ratios[size].items())
        counts = [0, *(count for count, _ in known)]
        found = [1.0, *(average.value or 1.0 for _, average in known)]
        values = np.minimum.accumulate(found[::-1])[::-1]  # where more tokens were quicker, fewer are no slower
        least, greatest = np.full(most, np.inf), np.full(most, np.inf)
        steepest = max((float(value - 1) / count for count, value in zip(counts, values, strict=True) if count), default=1.0)
        a_token = min(1 / size, LEAST_SLOPE / size + STEEPER * steepest)
        for num_drafted in range(1, min(most, FURTHER * max(counts[-1], size)) + 1):
            place = bisect_left(counts, size_class(num_drafted))
            is_known = place < len(counts) and counts[place] == size_class(num_drafted)
            below, above = values[place - 1], values[place] if place < len(counts) else np.inf
            least[num_drafted - 1] = below
            if place < len(counts) and not (is_known and known[place - 1][1].count < ENOUGH):
                least[num_drafted - 1] = max(below, above - (counts[place] - num_drafted) * a_token)
            greatest[num_drafted - 1] = min(above, below + (num_drafted - counts[place - 1]) * a_token)
        return least, np.maximum(least, greatest)


class PassCosts:
    """Seconds that a proposer takes for drafts of so many passes of its model, one behind the other: measured for each number.
    The first takes longer than those behind it, as what has come since the last draft is read in it."""

    def __init__(self) -> None:
        self._seconds: dict[int, Average] = defaultdict(Average)

    @property
    def is_known(self) -> bool:
        """Whether anything was measured."""
        return bool(self._seconds)

    def add(self, num_passes: int, seconds: float) -> None:
        """Drafts of so many passes were made."""
        self._seconds[num_passes].add(seconds)

    def of(self, num_passes: int) -> float:
        """Seconds of so many, no more than of a greater number. Of more than were measured each takes as long as
        those did, on average; 0.0 where nothing was measured."""
        measured = sorted((count, average.value or 0.0) for count, average in self._seconds.items())
        known = [(count, min(seconds for _, seconds in measured[place:])) for place, (count, _) in enumerate(measured)]
        if not known:
            return 0.0
        place = bisect_left(known, (num_passes, 0.0))
        if place == len(known):
            count, seconds = known[-1]
            return seconds * num_passes / count
        count, seconds = known[place]
        if count == num_passes:
            return seconds
        fewer, quicker = known[place - 1] if place else (0, 0.0)
        return quicker + (seconds - quicker) * (num_passes - fewer) / (count - fewer)
