"""Two systems beside each other: the same work, in turns, and a ratio with how far it can be trusted.

A machine is never the same for long: its clock, its caches and its other users change by more than most improvements are worth.
What is measured within a minute shares all that, so systems run in turns, and a ratio is formed of each two neighbours, not of
two medians taken an hour apart (Georges et al., "Statistically Rigorous Java Performance Evaluation", OOPSLA 2007, for the
intervals).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .throughput import Measurement

T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110,
    2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
"""Student's t for 95 %, two-sided, for 1 to 29 degrees of freedom; beyond, the normal distribution's 1.960 is near enough."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one system is than another, from pairs of runs.

    Attributes:
        mean: geometric, so that ours over theirs is one over theirs over ours.
        low, high: of the 95 % confidence interval of the mean; the same as it if there is a single pair, which has none.
        values: of each pair, in order.
    """

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def is_clear(self) -> bool:
        """Whether the systems differ by more than their runs do: 1 lies outside the interval, which needs two pairs."""
        return len(self.values) > 1 and not self.low <= 1.0 <= self.high


def in_turns(
    runners: Mapping[str, Callable[[], Measurement]], repeats: int, on_start: Callable[[str, int], None] = lambda *_: None
) -> dict[str, list[Measurement]]:
    """Run all systems `repeats` times in turn, every second time in the opposite order: A B, B A, A B. A machine that becomes
    slower and slower is then no disadvantage to the one that always comes last.

    Args:
        on_start: told the system's name and the number of the repeat, from 1, before each run.

    Returns:
        The runs of each system, in the order of `runners` and of the repeats.

    Raises:
        ValueError: the systems did not do the same work in all runs, see `check_same_work`.
    """
    results: dict[str, list[Measurement]] = {name: [] for name in runners}
    for repeat in range(1, repeats + 1):
        for name in list(runners) if repeat % 2 else reversed(list(runners)):
            on_start(name, repeat)
            results[name].append(runners[name]())
    check_same_work(results)
    return results


def check_same_work(results: Mapping[str, Sequence[Measurement]]) -> None:
    """See that every run of every system had the same requests, prompt tokens and wanted output tokens (how many of them it
    computed is its own business).

    Raises:
        ValueError: one had not the work of the first run; its name and its numbers are in the message.
    """
    expected: tuple[int, int, int] | None = None
    for name, runs in results.items():
        for run in runs:
            work = run.num_requests, run.num_prompt_tokens, run.num_output_tokens
            expected = expected or work
            if work != expected:
                raise ValueError(
                    f"{name} did other work than the rest: (requests, prompt tokens, output tokens) were {work}, not {expected}"
                )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Ours over theirs, of runs that were made in pairs.

    The logarithms of the pairs' ratios are averaged, and their interval is Student's.

    Args:
        ours, theirs: what is better when higher, such as tokens a second; entry i of both is from the same turn.

    Raises:
        ValueError: "a ratio needs pairs of runs", and there are none, or not as many of one as of the other.
    """
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"a ratio needs pairs of runs, got {len(ours)} and {len(theirs)}")
    values = tuple(a / b for a, b in zip(ours, theirs, strict=True))
    logs = [math.log(value) for value in values]
    mean, half = statistics.fmean(logs), 0.0
    if len(logs) > 1:
        half = student_t(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), values)


def student_t(degrees: int) -> float:
    """How many standard errors from the mean the 95 % interval ends."""
    return T95[degrees - 1] if degrees <= len(T95) else 1.960


def rates(runs: Sequence[Measurement]) -> list[float]:
    """Output tokens a second of each run."""
    return [run.output_tokens_per_second for run in runs]
