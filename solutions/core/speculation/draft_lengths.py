"""How many tokens are drafted for each sequence of a step: as many as pay, or none.

With S sequences and the chance a that a drafted token is right, k drafted tokens bring a + a² + … + aᵏ more (Leviathan et al.,
2023, §3.1); of drafts that branch the first k nodes are made (`draft_gains.py`). The sum of new tokens over the batch, by the
seconds that the step and its drafts take, is the rate to be made large. Tokens are put in the order of their chances, over all
sequences, so a sequence whose text repeats itself gets many and its neighbour none; how many of them are drafted is where the
rate is highest. To measure by goodput is the idea of Liu et al., "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput", 2024.

*What is known.* Costs are measured (`step_costs.py`). Chances are counted: for each sequence, its last drafts count most. Where
drafts follow from the text alone, as n-grams do, they are also made for sequences for which nothing is put on trial: whether
the first token of such a draft is the one that then comes is seen without the model. What a model drafts has to be tried:
of a new sequence as much is expected as of all others and a standard error more, so that a bad beginning is no verdict, and
where nothing is drafted, a token for one sequence is a probe now and then.

*What it may cost.* All that is tried for the sake of knowledge, and all that turns out wrong, is paid from an account. A share
`ALLOWANCE` of the time that passes is paid in, and so is what drafts win, up to `MOST_SAVED` steps. A step may draft only what
the account could pay if all of it were rejected. So speculation loses at most `ALLOWANCE` of the time and `MOST_SAVED` steps,
whatever the text does, and `FOR_LOOKS` for drafts that are only looked at. Up to 1, 2, 4, 8 sequences and so on have an
account of their own each, so that what 32 have lost holds nobody up who is alone. What it takes to decide is not paid from it:
that is the same in every step, and of a small model it is more than the share, so that nothing would ever be tried again.
Probes have an account of their own, into which `FOR_PROBES` of the time is paid: what a text costs of which nothing can be
foreseen is not missing where the next one can be. One thing is lent and not paid: what a draft model computes of a text that
it has missed, where drafts pay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .draft_gains import Gains
from .step_costs import MOST_OFF, Average, PassCosts, StepCosts, size_class

ALLOWANCE = 0.01
FOR_LOOKS, MOST_LOOKED = 0.005, 0.2
"""The share of the time that drafts may take of which nothing is put on trial, and what may be saved or owed of it, in steps: a
first look reads the whole prompt, and must not be the last for long."""
AT_FIRST, MOST_SAVED, MOST_OWED = 1.0, 2.0, 0.1
"""What the account holds at the start, at most and at least, in steps without drafts. It falls below 0 if a step took longer
than anything that was measured before."""
FOR_A_MODEL, SAVED_FOR_A_MODEL = 3.5, 8.0
"""The same for a model that drafts, at the start and at most: its first steps are slow, each token of a draft is one, and what
drafts win comes in lumps, so that some in a row may win nothing where they pay."""
FOR_PROBES, MOST_PROBED, DEAREST = 0.0075, 0.4, 4.0
"""The share of the time that a model's drafts may take that are only made to see whether they pay by now, and what may be saved
of it and what one may take, in steps."""
LEAST_GAIN = 1.02
"""Drafts are made where they bring this much more than none."""
REST, MOST_REST = 3, 12
"""Steps after one for which nothing was drafted in which nothing is decided anew; of a model, which has to be tried to see what
it is worth, twice as many each time, up to so many."""
AGAIN = 2
"""Steps after one for which something was drafted in which a model drafts as much again, if its drafts have won something. To
decide takes longer than a pass of a small one."""
MEMORY = 0.9
"""Weight of what was counted before, against the newest draft of a sequence."""
MEMORY_OF_A_MODEL = 0.97
"""The same for a model that drafts: where copies of the text are right or wrong for long, its tokens are now and then."""
DOUBT, DOUBT_OF_A_MODEL = 2.0, 3.0
"""What is known of all sequences counts for a new one like so many tokens of its own; of a model that drafts, whose sequences
differ less."""
UNSEEN = 0.5
"""The chance of a token at the start; where chances can be seen without a trial, also the most that a new sequence gets."""
MISSED_AT_ONCE = 8
"""Tokens of a sequence that a draft model may have missed and computes beside a new one in about the same time."""
HORIZON = 32
"""Steps over which a draft model may earn back what it has to compute before it drafts."""


@dataclass(slots=True)
class Chance:
    """How often drafted tokens were right lately: `hits` of `tries`."""

    hits: float = 0.0
    tries: float = 0.0

    def add(self, num_right: int, num_drafted: int, memory: float) -> None:
        """A draft was compared: its first `num_right` tokens were right, and those behind the first wrong one say nothing."""
        self.count(num_right, min(num_right + 1, num_drafted), memory)

    def count(self, hits: int, tries: int, memory: float) -> None:
        """So many tokens more were right, of so many."""
        self.hits, self.tries = memory * self.hits + hits, memory * self.tries + tries

    def value(self, expected: float, doubt: float = DOUBT) -> float:
        """The chance of the next token, with `expected` in the place of what is not known."""
        return (self.hits + doubt * expected) / (self.tries + doubt)


class DraftLengths:
    """Decides how many tokens are drafted, and learns from what becomes of them. Times are in seconds.

    Args:
        foretold: whether drafts follow from the text alone, so that they can be judged without a trial.
        gains: of drafts that branch; None: they are chains.

    Attributes:
        accounts: number of sequences, up to 1, 2, 4, 8 and so on → what may be lost, in steps without drafts. A machine that
            becomes busy or idle changes what they take, and not what they hold.
        mean_length: tokens for each sequence, on average, as it was last decided; 0: drafts do not pay at the moment.
    """

    def __init__(self, foretold: bool = False, gains: Gains | None = None) -> None:
        self.costs, self._gains = StepCosts(), gains or Gains()
        self.accounts: dict[int, float] = {}
        self.mean_length = 0.0
        self._paying: dict[int, bool] = {}
        """Class of the number of sequences → whether drafts paid when it was last decided."""
        self._size = 0
        """The class for which it was decided last."""
        self._foretold = foretold
        self._most_saved = MOST_SAVED if foretold else SAVED_FOR_A_MODEL
        self._memory = MEMORY if foretold else MEMORY_OF_A_MODEL
        self._chances: dict[int, Chance] = {}
        self._all = Chance(UNSEEN, 1.0)
        self._drafting: defaultdict[int, PassCosts] = defaultdict(PassCosts)
        """Class of the number of sequences → what the proposer takes."""
        self._is_first = True
        self._reading: Average = Average()
        """Seconds that it takes for a token that it has missed."""
        self._turn = self._rest = 0
        self._patience = REST
        self._again: list[tuple[int, int]] = []
        """(sequence, tokens) as it was decided. `_num_again`: steps in which that holds."""
        self._num_again = 0
        self._for_looks = 0.0
        self._for_probes, self._is_probe = 0.0, False
        self._lent = 0.0
        """Seconds of this step that drafts are expected to earn back."""

    def choose(self, seq_ids: Many[int], most: Many[int], missed: Many[int]) -> list[int]:
        """Tokens to draft for each sequence of a step in which each gets one token.

        Args:
            seq_ids: the sequences. most: tokens that may be drafted for each. missed: tokens of each that the proposer must
                compute before it drafts.

        Returns:
            As many as pay, or as are worth knowing about; 0 for all where nothing is.
        """
        num_seqs = len(seq_ids)
        counts, plain, drafting = [0] * num_seqs, self.costs.plain(num_seqs), self._drafting[size_class(num_seqs)]
        if not drafting.is_known and not self._foretold:  # what a token takes is to be known before there are many
            most = [min(room, 1) for room in most]
        longest = max(most, default=0)
        self._lent = 0.0
        self._is_probe = False
        if plain is None or longest == 0:
            return counts
        if self._num_again and max(missed) <= MISSED_AT_ONCE and [seq_id for seq_id, _ in self._again] == list(seq_ids):
            self._num_again -= 1
            return [min(count, room) for (_, count), room in zip(self._again, most, strict=True)]
        self._rest, self._size = self._patience, size_class(num_seqs)
        account = self.accounts.setdefault(_account(num_seqs), AT_FIRST if self._foretold else FOR_A_MODEL) * plain
        if account <= 0:
            self.mean_length, self._paying[self._size] = 0.0, False
            return counts
        chances = [self._chance(seq_id) for seq_id in seq_ids]
        if self._foretold and sum(chances) < (LEAST_GAIN - 1) * (1 - max(chances)) * num_seqs:  # not even if they cost nothing
            self.mean_length, self._paying[self._size] = 0.0, False
            return counts
        powers = self._gains.of(chances, longest)  # [S, longest]
        powers[np.arange(longest) >= np.array(most)[:, None]] = -1.0  # there is no room for these
        order = np.argsort(-powers, axis=None, kind="stable")[: sum(most)]
        rows, depths = np.divmod(order, longest)
        gains, behind = powers.flat[order], np.where(depths == 0, np.array(missed)[rows], 0)
        # where drafts cost a pass of a model for each place, a shorter one of all may be better than the best tokens
        best, is_dear = (LEAST_GAIN * num_seqs / plain, 0, longest), drafting.of(1) > 0.01 * plain
        passes = self._gains.passes(np.arange(1, longest + 1))
        seconds = np.array([drafting.of(count) for count in range(passes[-1] + 1)])[passes]
        for depth in np.flatnonzero(np.diff(passes, append=passes[-1] + 1)) + 1 if is_dear else [longest]:
            taken = depths < depth
            spent = seconds[np.maximum.accumulate(depths[taken])]
            best = max(best, (*self._best(account, plain, num_seqs, gains[taken], spent, behind[taken]), int(depth)))
        _, chosen, depth = best
        for row in rows[depths < depth][:chosen]:
            counts[row] += 1
        self.mean_length, self._paying[self._size] = chosen / num_seqs, chosen > 0
        self._rest = 0 if chosen else self._patience
        self._num_again = 0
        if chosen and not self._foretold and account > FOR_A_MODEL * plain:
            self._num_again, self._again = AGAIN, list(zip(seq_ids, counts, strict=True))
        self._patience = REST if chosen or self._foretold else min(2 * self._patience, MOST_REST)
        return counts if chosen or self._foretold else self._probe(plain, most, missed)

    def rests(self) -> bool:
        """Whether nothing is to be decided for the next step, as nothing was drafted for one just now."""
        rests, self._rest = self._rest > 0, max(0, self._rest - 1)
        return rests

    def wake(self) -> None:
        """Something new has come, so decide with the next step."""
        self._rest, self._patience, self._num_again = 0, REST, 0

    def _best(
        self, account: float, plain: float, num_seqs: int, gains: NDArray[np.float64], drafting: NDArray[np.float64],
        missed: NDArray[np.int64],
    ) -> tuple[float, int]:  # fmt: skip
        """The best rate, and how many of the tokens to draft for it; 0 and 0 where nothing can be paid. All are [N], in the
        order in which tokens are taken: the chance of each, seconds for drafts up to it, what it must read first."""
        least, greatest = self.costs.ratios(num_seqs, len(gains))
        reading = (self._reading.value or 0.0) * np.cumsum(missed) / HORIZON
        tokens = num_seqs + np.cumsum(gains)
        affordable = plain * (greatest - 1) + drafting <= account
        for ratio in (least, greatest):  # as good as it may be, where that can be paid for; else as bad as it may be
            rates = np.where(affordable, tokens / (plain * ratio + drafting + reading), 0.0)
            place = int(rates.argmax())
            if rates[place] > LEAST_GAIN * num_seqs / plain:
                return float(rates[place]), place + 1
        return 0.0, 0

    def _probe(self, plain: float, most: Many[int], missed: Many[int]) -> list[int]:
        """One token for one sequence, where what is set apart for that pays for it; they take turns."""
        counts = [0] * len(most)
        self._turn += 1
        row = min((row for row, room in enumerate(most) if room), key=lambda row: (missed[row], (row + self._turn) % len(most)))
        ratio = self.costs.ratios(len(most), 1)[1][0] - 1
        cost = plain * ratio + self._drafting[self._size].of(1) + missed[row] * (self._reading.value or 0.0)
        if self._for_probes > 0 and cost <= DEAREST * plain:
            counts[row], self._is_probe = 1, True
        return counts

    def pays(self, num_seqs: int) -> bool:
        """Whether drafts have paid with so many sequences; also true before the first decision."""
        return self._paying.get(size_class(num_seqs), True)

    def may_look(self) -> bool:
        """Whether to draft for no trial, only to see what would have been right."""
        return self._foretold and self._for_looks > 0

    def looked(self, seconds: float) -> None:
        """Drafts that are on no trial took so long."""
        self._for_looks -= seconds

    def drafted(self, seconds: float, most: int, missed: Many[int]) -> None:
        """The proposer has taken so long for drafts of up to `most` tokens, and for what it had `missed` of each sequence."""
        if self._is_first:  # which is slower than those that follow, and is paid, but no measure
            self._is_first = False
            return
        depth = int(self._gains.passes(np.array([most]))[0])
        if max(missed) <= MISSED_AT_ONCE:
            self._drafting[self._size].add(depth, seconds)
            return
        reading = max(0.0, seconds - self._drafting[self._size].of(depth))
        self._lent = reading if self._paying.get(self._size, True) else 0.0
        if self._drafting[self._size].is_known:
            self._reading.add(reading / sum(missed))

    def judge(self, seq_id: int, num_right: int, num_drafted: int) -> None:
        """A sequence's draft, on trial or not, began with so many right tokens."""
        self._chances.setdefault(seq_id, Chance()).add(num_right, num_drafted, self._memory)
        self._all.add(num_right, num_drafted, self._memory ** (1 / 8))

    def judge_tree(self, seq_id: int, num_drafted: int, kept: Many[int]) -> None:
        """A sequence's draft was the first nodes of the tree, so many; these of them stay."""
        hits, tries = self._gains.walk(num_drafted, kept, self._chance(seq_id))
        self._chances.setdefault(seq_id, Chance()).count(hits, tries, self._memory)
        self._all.count(hits, tries, self._memory ** (1 / 8))

    def ran(self, num_seqs: int, num_drafted: int, num_new: int, seconds: float, spent: float) -> None:
        """A step has ended in which each sequence was to get one token: they got `num_new` together, in `seconds`, after the
        proposer had `spent` some. A step that takes far longer than it may is the machine's doing and no fault of drafts."""
        plain = self.costs.plain(num_seqs)
        self.costs.add(num_seqs, num_drafted, seconds)
        size = _account(num_seqs)
        if plain is None or size not in self.accounts:
            return
        won = 0.0
        if num_drafted:
            usual = plain * self.costs.measured(num_seqs, num_drafted)
            won = plain * num_new / num_seqs - min(seconds, MOST_OFF * usual)
        won += self._lent - spent
        if self._is_probe:
            self._for_probes, won = self._for_probes + won, 0.0
        paid = won + ALLOWANCE * (seconds + spent)
        self.accounts[size] = min(max(self.accounts[size] + paid / plain, -MOST_OWED), self._most_saved)
        self._for_probes = min(max(self._for_probes, -DEAREST * plain) + FOR_PROBES * seconds, MOST_PROBED * plain)
        self._for_looks = min(max(self._for_looks, -MOST_LOOKED * plain) + FOR_LOOKS * seconds, MOST_LOOKED * plain)

    def forget(self, seq_ids: Many[int]) -> None:
        """These sequences have left."""
        for seq_id in seq_ids:
            self._chances.pop(seq_id, None)

    def _chance(self, seq_id: int) -> float:
        expected, known = self._all.value(UNSEEN), self._chances.get(seq_id) or Chance()
        if self._foretold:
            return known.value(min(expected, UNSEEN))
        error = math.sqrt(expected * (1 - expected) / (self._all.tries + DOUBT))
        return known.value(expected + error, DOUBT_OF_A_MODEL)


def _account(num_seqs: int) -> int:
    """The account that is charged with so many sequences: up to 1, 2, 4, 8 and so on share one."""
    return 1 << (num_seqs - 1).bit_length()
