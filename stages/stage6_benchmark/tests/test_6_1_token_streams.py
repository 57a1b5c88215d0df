"""Task 6.1: the moments of a token stream, and percentiles of many."""

from __future__ import annotations

import random
import statistics

import numpy as np
import pytest

from stages.benchmarks.latency import Stream, latencies, percentile
from stages.course.fixtures.checks import check_equal


def rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 9)


def test_ttft_begins_when_the_request_was_due() -> None:
    """Due at 10.0, first piece at 10.5: 0.5 seconds. After a fifth of a millisecond it is that, and not 0.

    Why: the user has waited since then, whatever the client was doing. And what is rounded here is rounded in every mean.
    """
    check_equal(Stream(10.0, [10.5, 10.6, 10.9], num_tokens=3).ttft, 0.5, "ttft")
    short = Stream(0.0, [2**-12, 2**-11], num_tokens=2)
    check_equal((short.ttft, short.tpot, short.itl), (2**-12, 2**-12, [2**-12]), "ttft, tpot and itl of a fast answer")


def test_tpot_leaves_the_first_token_out() -> None:
    """Tokens at 0.5, 0.6 and 0.9: two waits, 0.4 seconds together.

    Why: the first token waited for the queue and the prompt; with it, a long prompt looks like slow decoding.
    """
    check_equal(rounded(Stream(0.0, [0.5, 0.6, 0.9], num_tokens=3).tpot), 0.2, "tpot")


def test_tpot_counts_tokens_and_not_pieces() -> None:
    """Five tokens in three pieces, 0.4 seconds after the first: 0.1 seconds a token.

    Why: a client that reads slowly, or a server that speculates, gets several tokens in a piece; a token's time is the same.
    """
    check_equal(rounded(Stream(0.0, [0.5, 0.6, 0.9], num_tokens=5).tpot), 0.1, "tpot")


def test_one_token_has_no_tpot() -> None:
    """An answer of one token has no time per further token: None, not 0.

    Why: zeros would make the mean and the median look better the more short answers there are.
    """
    check_equal(Stream(0.0, [0.5], num_tokens=1).tpot, None, "tpot")
    check_equal(Stream(0.0, [0.5, 0.6]).tpot, None, "tpot of an answer whose tokens the server has not counted")


def test_tokens_that_came_together_took_no_time() -> None:
    """Five tokens in one piece: 0 seconds a token, which is a value, and counts as one.

    Why: that is what the client saw. An answer that is left out because its number is false in Python makes the others' median
    of it.
    """
    check_equal(Stream(0.0, [0.5], num_tokens=5).tpot, 0.0, "tpot")
    found = latencies([Stream(0.0, [0.5], num_tokens=5), Stream(0.0, [0.5, 0.7], num_tokens=2)])
    check_equal(round(found["tpot_ms"]["mean"], 6), 100.0, "mean TPOT in ms, of 0 and 200")
    found = latencies([Stream(0.0, [0.5, 0.7, 1.1], num_tokens=8)])
    check_equal(round(found["itl_ms"]["mean"], 6), 300.0, "mean ITL in ms, between three pieces of eight tokens")


def test_itl_is_every_wait_but_the_first() -> None:
    """Pieces at 0.5, 0.6 and 0.9 waited 0.1 and 0.3 seconds for.

    Why: TPOT hides one stall among many tokens, and the stall is what a reader sees.
    """
    check_equal([rounded(wait) for wait in Stream(0.0, [0.5, 0.6, 0.9], num_tokens=3).itl], [0.1, 0.3], "itl")
    check_equal(Stream(0.0, [0.5], num_tokens=1).itl, [], "itl of one piece")
    check_equal([rounded(wait) for wait in Stream(0.0, [1.0, 1.5, 1.6], 3).itl], [0.5, 0.1], "itl, in its order")


def test_pieces_that_came_together_waited_for_nothing() -> None:
    """Pieces at 1, 1 and 2: waits of 0 and 1 second, and both are counted.

    Why: a proxy that gathers brings them in clumps. Without the zeros the clumps look like a steady flow that is slow.
    """
    stream = Stream(0.0, [1.0, 1.0, 2.0], num_tokens=3)
    check_equal(stream.itl, [0.0, 1.0], "itl")
    check_equal(round(latencies([stream])["itl_ms"]["p50"], 6), 500.0, "median ITL in ms")


@pytest.mark.parametrize(("q", "expected"), [(0, 10.0), (50, 30.0), (100, 50.0), (25, 20.0), (90, 46.0), (99, 49.6)])
def test_percentiles_lie_between_the_values_beside_them(q: float, expected: float) -> None:
    """Of 10, 20, 30, 40, 50 the 90th percentile is 46: at 0.9 of the way from the first to the last.

    Why: without interpolation the p99 of fewer than a hundred values is the largest, whatever the others are.
    """
    check_equal(round(percentile([30.0, 10.0, 50.0, 20.0, 40.0], q), 9), expected, f"p{q}")


def test_a_percentile_of_any_values_is_numpys() -> None:
    """For 200 random lists, lengths 1 to 40, against `numpy.percentile`.

    Why: two tools that mean different things by p99 cannot be compared, and NumPy's meaning is the usual one.
    """
    dice = random.Random(6)
    for _ in range(200):
        values = [dice.expovariate(1.0) for _ in range(dice.randint(1, 40))]
        q = dice.choice([0, 1, 50, 90, 99, 99.9, 100])
        before = list(values)
        check_equal(round(percentile(values, q), 9), round(float(np.percentile(values, q)), 9), f"p{q} of {len(values)} values")
        check_equal(values, before, "the values that were given")


def test_nothing_has_no_percentile() -> None:
    """No values, or 101 percent, are a ValueError.

    Why: a table that shows 0 ms where nothing was answered is a lie.
    """
    for values, q in (([], 50), ([1.0], 101), ([1.0], -1)):
        with pytest.raises(ValueError, match="percentile"):
            percentile(values, q)


def many() -> list[Stream]:
    """A long answer that flows, two short ones that stall, one of a single token, one that was refused."""
    return [
        Stream(0.0, [0.1 + 0.01 * i for i in range(101)], 101), Stream(0.0, [0.2, 0.7], 2), Stream(0.0, [0.3, 0.9], 2),
        Stream(0.0, [0.4], 1), Stream(0.0, error="429"),
    ]  # fmt: skip


def test_every_request_counts_once_in_tpot_and_every_wait_once_in_itl() -> None:
    """TPOT has three values here, ITL 102.

    Why: the long answer is a third of the users and nearly all of the waits; the two questions have two answers.
    """
    found = latencies(many())
    check_equal(round(found["tpot_ms"]["p50"], 6), 500.0, "median TPOT in ms, of 10, 500 and 600")
    check_equal(round(found["itl_ms"]["p50"], 6), 10.0, "median ITL in ms, of 100 waits of 10 and one of 500 and 600 each")
    check_equal(round(found["itl_ms"]["mean"], 6), round(2100 / 102, 6), "mean ITL in ms")


def test_refused_requests_are_in_no_average() -> None:
    """Four of five have a TTFT: 100, 200, 300 and 400 ms.

    Why: a refusal is quick. Counted as an answer it would make an overloaded server look fast.
    """
    found = latencies(stream for stream in many())["ttft_ms"]
    check_equal({name: round(value, 6) for name, value in found.items()},
                {"mean": 250.0, "p50": 250.0, "p90": 370.0, "p99": 397.0, "max": 400.0}, "TTFT in ms")  # fmt: skip


def test_streams_may_come_from_an_iterator() -> None:
    """Of a generator all four kinds are there, as of a list.

    Why: whoever goes through it once for each kind finds it empty at the second.
    """
    found, expected = latencies(stream for stream in many()), latencies(many())
    check_equal(sorted(expected), ["itl_ms", "latency_ms", "tpot_ms", "ttft_ms"], "what was measured of a list")
    check_equal(found, expected, "what was measured of an iterator")


def test_an_answer_that_broke_off_is_in_no_average() -> None:
    """Two pieces, then an error; beside it an answer after a second.

    Why: it has a fast first token and no end. A server that breaks off under load would look faster for it.
    """
    found = latencies([Stream(0.0, [0.1, 0.2], 2, error="the engine hangs"), Stream(0.0, [1.0, 3.0], 2)])
    got = {kind: round(values["p50"], 6) for kind, values in found.items()}
    check_equal(got, {"ttft_ms": 1000.0, "tpot_ms": 2000.0, "itl_ms": 2000.0, "latency_ms": 3000.0}, "medians in ms")


def test_what_has_no_values_is_left_out() -> None:
    """Answers of one token have a TTFT and a latency, and no TPOT and ITL.

    Why: an absent number is a question, a zero is an answer.
    """
    found = latencies([Stream(0.0, [0.4], 1), Stream(0.0, error="503")])
    check_equal(sorted(found), ["latency_ms", "ttft_ms"], "what was measured")
    check_equal(latencies([Stream(0.0, error="503")]), {}, "of nothing but refusals")


def test_a_mean_is_no_median() -> None:
    """99 answers after 100 ms and one after 10 s: the median is 100 ms, the mean 199 ms, the p99 far above both.

    Why: a mean describes nobody. One user in a hundred waits ten seconds, and nobody waits 199 ms.
    """
    found = latencies([Stream(0.0, [0.1], 1)] * 99 + [Stream(0.0, [10.0], 1)])["ttft_ms"]
    check_equal(round(found["p50"], 6), 100.0, "median in ms")
    check_equal(round(found["mean"], 6), round(statistics.fmean([100.0] * 99 + [10_000.0]), 6), "mean in ms")
    check_equal(round(found["p99"], 6), 199.0, "p99 in ms: a hundredth of the way from 100 to 10,000")
