"""Task 5.8: histograms whose times begin and end where their names say."""

from __future__ import annotations

import random

import pytest

from stages.batching.sampling_params import SamplingParams
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.core.engine import EngineStats
from stages.course.fixtures.checks import check_equal
from stages.serving.metrics import EngineMetrics, Histogram


def make() -> EngineMetrics:
    return EngineMetrics("m", lambda: EngineStats(0, 0, 0.0, 0.0, 0, 0, 0, 0, 0, 0), 4096)


def sequence(seq_id: int = 0, arrival: float = 0.0, scheduled: float = 0.0, prompt: int = 3) -> Sequence:
    seq = Sequence(seq_id, [1] * prompt, SamplingParams(), arrival_time=arrival)
    seq.first_scheduled_time = scheduled
    return seq


def finish(seq: Sequence, reason: str) -> Sequence:
    seq.finish(reason)
    return seq


def step(metrics: EngineMetrics, now: float, *sampled: Sequence, tokens: int = 1, beside: int = 0) -> None:
    """A step in which sequences get tokens, their first behind their prompt, and a chunk of somebody's prompt beside."""
    scheduled = {seq: tokens if seq.num_output_tokens else seq.num_prompt_tokens + tokens - 1 for seq in sampled}
    for seq in sampled:
        seq.tokens += [7] * tokens
    if beside:
        scheduled[sequence(99, prompt=beside)] = beside
    metrics.on_step(SchedulerOutput(scheduled, list(sampled)), now)


def entered(histogram: Histogram) -> tuple[int, float]:
    """How many values, and their sum."""
    return sum(histogram.counts), round(histogram.sum, 9)


def test_a_value_at_a_bound_is_within_it() -> None:
    """Bounds 1 and 2: 1 belongs to the first bucket, 2 to the second, 2.5 to the last, which has no end.

    Why: "le" means less or equal. Off by one bucket, every percentile of a dashboard is too high.
    """
    histogram = Histogram("h", "text", (1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    check_equal(histogram.counts, [2, 2, 1], "counts")
    check_equal(histogram.sum, 7.0, "sum")


def test_a_value_is_entered_as_it_is() -> None:
    """Waits of 3 ms and of 1.4 ms: their sum is 4.4 ms.

    Why: on a GPU the time between two tokens is a few milliseconds. Rounded to hundredths of a second it is 0.
    """
    metrics, seq = make(), sequence()
    for now in (1.0, 1.003, 1.0044):
        step(metrics, now, seq)
    check_equal(entered(metrics.between), (2, 0.0044), "between tokens: count, sum")


def test_a_step_is_entered_under_the_lock() -> None:
    """`_lock` is held when a step's size and waits are entered, and when a sequence ends, and free afterwards.

    Why: a scrape comes on another thread. Between two entries of a step it would see a count without its sum.
    """
    metrics, held = make(), []
    for name in ("step_size", "between", "first_token", "whole"):
        histogram = getattr(metrics, name)
        histogram.observe = lambda *args, name=name: held.append((name, metrics._lock.locked()))
    seq = sequence()
    step(metrics, 1.0, seq)
    step(metrics, 2.0, finish(seq, "stop"))
    expected = [(name, True) for name in ("between", "first_token", "step_size", "whole")]
    check_equal(sorted(set(held)), expected, "histograms that were entered, and whether the lock was held")
    check_equal(metrics._lock.locked(), False, "the lock, after the steps")


def test_a_value_may_count_for_many() -> None:
    """observe(3, 10) is ten values of 3.

    Why: a step of a thousand sequences enters one number, not a thousand.
    """
    histogram = Histogram("h", "text", (1.0, 5.0))
    histogram.observe(3.0, 10)
    check_equal((histogram.counts, histogram.sum), ([0, 10, 0], 30.0), "counts and sum")


def test_the_first_token_is_timed_from_the_arrival() -> None:
    """Arrived at 10, first scheduled at 10.5, first token at 11: 1 second.

    Why: measured from when it was scheduled, a server with an hour's queue looks as fast as an empty one.
    """
    metrics = make()
    step(metrics, 11.0, sequence(arrival=10.0, scheduled=10.5))
    check_equal(entered(metrics.first_token), (1, 1.0), "time to first token: count, sum")
    check_equal(entered(metrics.between), (0, 0.0), "between tokens, before there is a second")


def test_times_between_tokens_begin_with_the_second() -> None:
    """Tokens at 1, 1.25 and 2: 0.25 and 0.75.

    Why: the wait for the first is another metric, and a hundred times as long.
    """
    metrics, seq = make(), sequence()
    for now in (1.0, 1.25, 2.0):
        step(metrics, now, seq)
    check_equal(entered(metrics.between), (2, 1.0), "between tokens: count, sum")
    check_equal(entered(metrics.first_token), (1, 1.0), "time to first token: count, sum")


def test_each_sequence_has_its_own_last_token() -> None:
    """One that was not in a step has waited for longer.

    Why: a preempted sequence's gap is what its user sees as a stall; an average over the step hides it.
    """
    metrics, first, second = make(), sequence(0), sequence(1)
    step(metrics, 1.0, first, second)
    step(metrics, 1.5, first)
    step(metrics, 3.0, first, second)
    check_equal(entered(metrics.between), (3, 0.5 + 1.5 + 2.0), "between tokens: count, sum")


def test_equal_waits_are_several() -> None:
    """Three sequences that all waited from 1 to 2: three waits of a second.

    Why: they are gathered to be entered at once, and one entry is not three.
    """
    metrics, sequences = make(), [sequence(i) for i in range(3)]
    step(metrics, 1.0, *sequences)
    step(metrics, 2.0, *sequences)
    check_equal(entered(metrics.between), (3, 3.0), "between tokens: count, sum")
    calls: list[float] = []
    metrics.between.observe = lambda value, count=1: calls.append(value)
    step(metrics, 3.0, *sequences)
    check_equal(calls, [1.0], "entries of three equal waits")


def test_what_comes_in_one_step_is_one_wait() -> None:
    """Speculation brings five tokens at once: one wait. The time per token knows of all five.

    Why: vLLM counts so, and dashboards made for it would show zeros otherwise.
    """
    metrics, seq = make(), sequence()
    step(metrics, 1.0, seq)
    step(metrics, 1.5, finish(seq, "stop"), tokens=5)
    check_equal(entered(metrics.between), (1, 0.5), "between tokens: count, sum")
    check_equal(entered(metrics.per_token), (1, 0.1), "time per output token: count, sum")


def test_the_size_of_a_step_counts_prompts_too() -> None:
    """Two sequences that get a token and a chunk of 30 prompt tokens are 32.

    Why: what a step costs depends on all of its tokens.
    """
    metrics, pair = make(), [sequence(0), sequence(1)]
    step(metrics, 1.0, *pair)
    step(metrics, 2.0, *pair, beside=30)
    check_equal(entered(metrics.step_size), (2, 8.0 + 32.0), "tokens of two steps: count, sum")


def test_a_prompt_and_its_first_token_are_of_one_step() -> None:
    """A prompt of 3 tokens is computed and a token generated: 4. Then 1, then 5 that speculation brought.

    Why: over all steps that is what went in and what came out, as vLLM counts; dashboards compare the two.
    """
    metrics, seq = make(), sequence(prompt=3)
    for now, tokens in ((10.5, 1), (20.5, 1), (30.5, 5)):
        step(metrics, now, seq, tokens=tokens)
    check_equal(entered(metrics.step_size), (3, 3.0 + 7.0), "tokens of three steps: count, sum")


def test_a_pooled_prompt_generates_nothing() -> None:
    """A prompt of 5 tokens whose sequence has no token when its step is over, beside one of 3 that has its first: 5 + 3 + 1.

    Why: an embedding is sampled from nothing. A token counted for each would be tokens a second that nobody got.
    """
    metrics, pooled, other = make(), sequence(0, prompt=5), sequence(1, prompt=3)
    other.tokens.append(7)
    metrics.on_step(SchedulerOutput({pooled: 5, other: 3}, [pooled, other]), 1.0)
    check_equal(entered(metrics.step_size), (1, 9.0), "tokens of steps: count, sum")
    metrics.on_step(SchedulerOutput({}, [finish(pooled, "stop")]), 2.0)
    check_equal(entered(metrics.whole), (1, 2.0), "whole requests: count, sum")
    check_equal(entered(metrics.per_token), (0, 0.0), "time per token: count, sum")


def test_what_is_computed_again_is_not_counted_again() -> None:
    """A sequence with 3 + 2 tokens comes back after a preemption: all 5 are computed again, 2 and then 3 that bring the next.

    Why: a server that preempts much would look like one that gets much done.
    """
    metrics, seq = make(), sequence(prompt=3)
    step(metrics, 1.0, seq)
    step(metrics, 2.0, seq)
    metrics.on_step(SchedulerOutput({seq: 2}, []), 3.0)
    seq.tokens.append(7)
    metrics.on_step(SchedulerOutput({seq: 3}, [seq]), 4.0)
    check_equal(entered(metrics.step_size), (4, 4.0 + 1.0 + 0.0 + 1.0), "tokens of four steps: count, sum")


def test_a_request_is_entered_when_it_ends() -> None:
    """Arrived at 10, scheduled at 10.5, tokens at 11, 12 and 14: every histogram of requests gets one value.

    Why: queue, prefill and decode add up to the whole, so an operator sees which of them grew.
    """
    metrics, seq = make(), sequence(arrival=10.0, scheduled=10.5)
    step(metrics, 11.0, seq)
    step(metrics, 12.0, seq)
    check_equal(entered(metrics.whole), (0, 0.0), "whole requests, before the end")
    step(metrics, 14.0, finish(seq, "length"))
    values = {
        "queue": 0.5, "prefill": 0.5, "decode": 3.0, "whole": 4.0, "per_token": 1.5, "prompt_len": 3.0, "output_len": 3.0
    }  # fmt: skip
    got = {name: entered(getattr(metrics, name)) for name in values}
    check_equal(got, {name: (1, value) for name, value in values.items()}, "histograms: count, sum")
    check_equal(dict(metrics.finished), {"length": 1}, "ended, by reason")


def test_a_single_token_has_no_time_per_token() -> None:
    """An answer of one token: decode took 0 seconds, and there is nothing to divide by.

    Why: 0 / 0 ends the engine's thread. A 0 instead would make the median of short answers a lie.
    """
    metrics = make()
    step(metrics, 2.0, finish(sequence(), "stop"))
    check_equal((entered(metrics.per_token), entered(metrics.decode)), ((0, 0.0), (1, 0.0)), "per token, decode: count, sum")


def test_what_was_found_in_the_cache_is_of_the_prompt() -> None:
    """A prompt of 3 tokens, 2 of which were cached, has a length of 3.

    Why: it is what users send. A cache that works must not look like users who write less.
    """
    metrics, seq = make(), sequence(prompt=3)
    seq.num_cached_tokens = 2
    step(metrics, 1.0, finish(seq, "stop"))
    check_equal(entered(metrics.prompt_len), (1, 3.0), "prompt lengths: count, sum")


@pytest.mark.parametrize("when", ["in the queue", "in its prefill", "after two tokens"])
def test_what_is_aborted_has_ended_too(when: str) -> None:
    """Arrived at 1, aborted at 4. In the queue it has only waited; scheduled at 1.5 and without a token it was not prefilled;
    after tokens at 2 and 2.5 it was decoded for half a second, whatever it waited for then.

    Why: users who leave are the first sign of a slow server, and they must not vanish from its statistics.
    """
    metrics, seq = make(), sequence(arrival=1.0, scheduled=1.5)
    tokens, queue = [], 0.5
    if when == "in the queue":
        seq.first_scheduled_time, queue = None, 3.0
    elif when == "in its prefill":
        metrics.on_step(SchedulerOutput({seq: 2}, []), 2.0)
    else:
        tokens = [2.0, 2.5]
    for now in tokens:
        step(metrics, now, seq)
    metrics.on_abort([finish(seq, "abort")], 4.0)
    check_equal(dict(metrics.finished), {"abort": 1}, "ended, by reason")
    expected = {"whole": (1, 3.0), "queue": (1, queue), "prompt_len": (1, 3.0), "output_len": (1, float(len(tokens)))}
    expected |= {"prefill": (1, 0.5), "decode": (1, 0.5), "per_token": (1, 0.5)} if tokens else {}
    expected |= {name: (0, 0.0) for name in ("prefill", "decode", "per_token") if not tokens}
    check_equal({name: entered(getattr(metrics, name)) for name in expected}, expected, "histograms: count, sum")


def test_nobody_is_remembered_after_the_end() -> None:
    """What is kept of a sequence goes with it.

    Why: a server runs for months; a dictionary that only grows ends it.
    """
    metrics = make()
    sequences = [sequence(i) for i in range(3)]
    step(metrics, 1.0, *sequences)
    step(metrics, 2.0, *(finish(seq, "stop") for seq in sequences[:2]))
    metrics.on_abort([finish(sequences[2], "abort")], 3.0)
    check_equal(len(metrics._times), 0, "sequences that are remembered")


@pytest.mark.parametrize("number", range(4))
def test_any_times_are_entered_where_they_belong(number: int) -> None:
    """A sequence that arrives, is scheduled, and gets its tokens at random times.

    Why: dashboards add these numbers up. Each second must be in one interval and in no other.
    """
    dice = random.Random(580 + number)
    for _ in range(5):
        times = [0.0]
        for _ in range(dice.randrange(4, 12)):
            times.append(times[-1] + dice.randrange(1, 4000) / 1024)  # exact in binary
        arrival, scheduled, first, *later = times
        metrics, seq = make(), sequence(arrival=arrival, scheduled=scheduled, prompt=dice.randrange(1, 90))
        for now in (first, *later[:-1]):
            step(metrics, now, seq)
        step(metrics, later[-1], finish(seq, "stop"))
        last, number_of = later[-1], len(later)
        expected = {
            "first_token": first - arrival, "between": last - first, "queue": scheduled - arrival, "prefill": first - scheduled,
            "decode": last - first, "whole": last - arrival, "per_token": (last - first) / number_of,
            "prompt_len": seq.num_prompt_tokens, "output_len": number_of + 1,
        }  # fmt: skip
        for name, total in expected.items():
            wanted = (number_of if name == "between" else 1, round(total, 9))
            check_equal(entered(getattr(metrics, name)), wanted, f"{name}: count, sum")
