"""Task 6.6: two systems on the same work, in turns, and a ratio with its interval."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest

from stages.benchmarks.comparison import check_same_work, in_turns, ratio
from stages.benchmarks.throughput import Measurement
from stages.course.fixtures.checks import check_equal


def measurement(seconds: float, requests: int = 4, prompt: int = 80, output: int = 32) -> Measurement:
    return Measurement("toy", seconds, requests, prompt, output, output, {})


class Machine:
    """Runs systems that take 1 s each on a machine that becomes slower by a tenth of its first speed at every run."""

    def __init__(self) -> None:
        self.runs: list[str] = []

    def system(self, name: str, speed: float = 1.0) -> Callable[[], Measurement]:
        def run() -> Measurement:
            seconds = (1 + 0.1 * len(self.runs)) / speed
            self.runs.append(name)
            return measurement(seconds)

        return run


def test_systems_alternate_and_change_their_order() -> None:
    """Three systems, three repeats: B A C, C A B, B A C; and who listens hears of each run before it begins.

    Why: whoever always comes last has the warmest caches and the hottest processor.
    """
    machine, told = Machine(), []
    names = {name: machine.system(name) for name in "BAC"}
    results = in_turns(names, 3, lambda name, repeat: told.append((name, repeat, len(machine.runs))))
    check_equal("".join(machine.runs), "BACCABBAC", "order of the runs")
    expected = [(name, 1 + i // 3, i) for i, name in enumerate("BACCABBAC")]
    check_equal(told, expected, "name, repeat, and runs so far, when it was told")
    check_equal({name: len(runs) for name, runs in results.items()}, {"A": 3, "B": 3, "C": 3}, "runs of each")
    check_equal(list(results), ["B", "A", "C"], "order of the results")
    machine.runs.clear()
    check_equal(list(in_turns(names, 4)), ["B", "A", "C"], "order of the results, after a turn in the opposite order")
    check_equal("".join(machine.runs), "BACCABBACCAB", "order of the runs of four repeats")


def test_a_machine_that_tires_favours_nobody() -> None:
    """Two equal systems on a machine that becomes slower and slower, in two turns: their times add up to the same.

    Why: one after the other, the second would have lost by a third; in turns without change of order, still by a tenth.
    """
    machine = Machine()
    results = in_turns({"A": machine.system("A"), "B": machine.system("B")}, 2)
    sums = [round(sum(run.seconds for run in results[name]), 9) for name in "AB"]
    check_equal(sums[1], sums[0], "seconds of B, against those of A")


def test_results_keep_the_order_of_the_repeats() -> None:
    """The second run of a system is its second result, in whichever order the systems ran.

    Why: ratios are formed of runs that were neighbours.
    """
    machine = Machine()
    results = in_turns({"A": machine.system("A"), "B": machine.system("B")}, 2)
    check_equal([round(run.seconds, 9) for run in results["A"]], [1.0, 1.3], "seconds of A")
    check_equal([round(run.seconds, 9) for run in results["B"]], [1.1, 1.2], "seconds of B")


@pytest.mark.parametrize("other", [{"requests": 3}, {"prompt": 79}, {"output": 31}], ids=["requests", "prompt", "output"])
def test_other_work_is_no_comparison(other: dict[str, int]) -> None:
    """A system with fewer requests, prompt tokens or output tokens than the first is a ValueError that says its name and its
    numbers; also if it is the third system, and in a later turn; and if the first had none of it at all.

    Why: the easiest way to be faster is to do less, and a server that ends early does it by itself.
    """
    (less,) = other.values()
    with pytest.raises(ValueError, match="theirs") as caught:
        check_same_work({"ours": [measurement(1.0)], "theirs": [measurement(1.0), measurement(0.5, **other)]})
    check_equal(str(less) in str(caught.value), True, f"the message, {str(caught.value)!r}, has the number {less}")
    with pytest.raises(ValueError, match="theirs"):
        in_turns({"ours": lambda: measurement(1.0), "theirs": lambda: measurement(0.5, **other)}, 1)
    with pytest.raises(ValueError, match="theirs"):
        check_same_work({"ours": [measurement(1.0, **dict.fromkeys(other, 0))], "theirs": [measurement(1.0)]})
    for turn in (1, 2):
        runs = iter([measurement(1.0)] * (turn - 1) + [measurement(0.5, **other)] * 2)
        systems = {"ours": lambda: measurement(1.0), "yours": lambda: measurement(1.0), "theirs": lambda runs=runs: next(runs)}
        with pytest.raises(ValueError, match="theirs"):
            in_turns(systems, 2)


def test_the_same_work_passes() -> None:
    """Equal work of any speed is a comparison, also if one system computes more tokens to get there; so is none at all.

    Why: speed is what is compared. A static batch that computes what nobody asked for is slow, and not another task.
    """
    wasteful = Measurement("toy", 2.0, 4, 80, 32, 48, {})
    check_same_work({"ours": [measurement(1.0)], "theirs": [wasteful, wasteful]})
    check_same_work({"ours": [measurement(1.0)], "theirs": [measurement(9.0), measurement(0.5)]})
    check_same_work({})


def test_a_ratio_is_formed_pair_by_pair() -> None:
    """Ours 10, 20, 30 and theirs 5, 10, 15: 2 in every pair, and not a doubt.

    Why: the machine was three times as fast in the end, for both. A ratio of each one's own spread would call that noise.
    """
    found = ratio([10.0, 20.0, 30.0], [5.0, 10.0, 15.0])
    check_equal([round(value, 9) for value in (found.mean, found.low, found.high)], [2.0, 2.0, 2.0], "mean, low, high")
    check_equal(found.values, (2.0, 2.0, 2.0), "pairs")


def test_pairs_stay_in_the_order_of_their_turns() -> None:
    """Pairs of 3, 1 and 2, in this order.

    Why: a machine that becomes slower shows itself in the order of the pairs. Sorted, every machine seems to become faster.
    """
    check_equal(ratio([6.0, 1.0, 4.0], [2.0, 1.0, 2.0]).values, (3.0, 1.0, 2.0), "pairs")


def test_twice_and_half_cancel_out() -> None:
    """Pairs of 2 and 0.5 have a mean of 1, and the other way around; 1, 1 and 8 have one of 2.

    Why: the arithmetic mean is 1.25 both ways: each system would be 25 % faster than the other.
    """
    check_equal(round(ratio([2.0, 1.0], [1.0, 2.0]).mean, 9), 1.0, "mean")
    check_equal(round(ratio([1.0, 2.0], [2.0, 1.0]).mean, 9), 1.0, "mean of the other over this")
    check_equal(round(ratio([1.0, 1.0, 8.0], [1.0] * 3).mean, 9), 2.0, "mean of 1, 1 and 8, whose product is 2 to the third")


def test_the_interval_by_hand() -> None:
    """Pairs of 1, e and e²: logarithms 0, 1, 2, mean 1, deviation 1, so e^(1 ± 4.303/√3). Of 1 and e² it is e^(1 ± 12.706),
    for the deviation is √2; and so for four pairs.

    Why: three runs tell little, and an interval must say so: 4.3 standard errors, not 2. Two runs tell less.
    """
    for logs, half in (((0, 1, 2), 4.303 / math.sqrt(3)), ((0, 2), 12.706), ((0, 2, 0, 2), 3.182 / math.sqrt(3))):
        found = ratio([math.e**x for x in logs], [1.0] * len(logs))
        got = [math.log(value) for value in (found.mean, found.low, found.high)]
        check_equal([round(x, 2) for x in got], [round(x, 2) for x in (1.0, 1.0 - half, 1.0 + half)], f"logarithms of {logs}")


def test_one_pair_has_no_interval() -> None:
    """Its interval is a point, and nothing is clear.

    Why: one run says nothing about the next.
    """
    found = ratio([3.0], [2.0])
    check_equal([round(value, 9) for value in (found.mean, found.low, found.high)], [1.5] * 3, "mean, low, high")
    check_equal(found.is_clear, False, "whether one pair is clear")


def test_pairs_must_be_pairs() -> None:
    """Different numbers of runs, or none, are a ValueError.

    Three hundred pairs are as good as three.

    Why: cut to the shorter list, runs would be compared that were never neighbours.
    """
    check_equal(round(ratio([2.0] * 300, [1.0] * 300).mean, 9), 2.0, "mean of three hundred pairs")
    for ours, theirs in (([1.0], [1.0, 2.0]), ([1.0, 2.0], [1.0]), ([], []), ([1.0], []), ([], [1.0])):
        with pytest.raises(ValueError, match="needs pairs of runs"):
            ratio(ours, theirs)


def test_the_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    """1,000 comparisons of five pairs that scatter by 10 % around 1.3.

    Why: an interval that is too narrow finds improvements that are not there, and one that is too wide finds none.
    """
    dice, hits = random.Random(95), 0
    for _ in range(1000):
        theirs = [dice.uniform(50, 150) for _ in range(5)]
        found = ratio([1.3 * value * math.exp(dice.gauss(0, 0.1)) for value in theirs], theirs)
        hits += found.low <= 1.3 <= found.high
    assert 930 <= hits <= 970, f"{hits} of 1,000 intervals hold the truth, expected about 950"


def test_noise_is_not_clear_and_a_difference_is() -> None:
    """Equal systems, five pairs that scatter by 10 %: no clear difference. Twice as fast: a clear one.

    Why: "3 % faster" of noisy runs is the most published result there is.
    """
    check_equal(ratio([1.1, 0.93, 1.05, 0.95, 1.01], [1.0] * 5).is_clear, False, "whether noise is clear")
    check_equal(ratio([2.2, 1.86, 2.1, 1.9, 2.02], [1.0] * 5).is_clear, True, "whether twice as fast is clear")
