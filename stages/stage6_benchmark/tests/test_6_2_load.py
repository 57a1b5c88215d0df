"""Task 6.2: requests that arrive by themselves, and users who wait for their answers. All of it in simulated time."""

from __future__ import annotations

import asyncio
import math
import random
import statistics
from collections.abc import Iterator
from itertools import count, groupby, pairwise

import pytest

from stages.benchmarks.datasets import BenchRequest
from stages.benchmarks.end_to_end import arrivals, closed_loop, now, open_loop
from stages.benchmarks.latency import Stream
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.clock import simulate


class Server:
    """Answers a request after as many seconds as it has tokens to generate; remembers what happened.

    Args:
        seats: requests that it works on at once; the others wait. None: all.
    """

    def __init__(self, seats: int | None = None) -> None:
        self.sent: list[tuple[float, int]] = []
        self.busy = self.most = 0
        self._seats = asyncio.Semaphore(seats or 10**9)

    async def send(self, request: BenchRequest, due: float) -> Stream:
        self.sent.append((now(), request.output_len))
        self.busy += 1
        self.most = max(self.most, self.busy)
        async with self._seats:
            await asyncio.sleep(request.output_len)
        self.busy -= 1
        return Stream(due, [now()], request.output_len)


def requests(*seconds: int) -> list[BenchRequest]:
    return [BenchRequest([1], each) for each in seconds]


def starts(streams: list[Stream]) -> list[float]:
    return [round(stream.start, 9) for stream in streams]


def ends(streams: list[Stream]) -> list[float]:
    return [round(stream.times[-1], 9) for stream in streams]


# arrivals


def test_arrivals_have_their_rate() -> None:
    """4,000 requests at 8 a second take 500 seconds, give or take; the first comes at 0.

    Why: seconds for requests a second, or the other way around, is a factor of 64 here.
    """
    times = arrivals(4000, 8.0, seed=1)
    check_equal(times[0], 0.0, "the first arrival")
    check_equal(times, sorted(times), "arrivals")
    assert 460 < times[-1] < 540, f"4,000 arrivals at 8 a second end after {times[-1]:.0f} s, expected about 500"


def test_distances_are_exponential() -> None:
    """Their standard deviation is their mean, and 63 % of them are below it.

    Why: arrivals that do not know each other come in clumps. Spaced evenly, they never form a queue, and every server is fast.
    """
    gaps = [later - earlier for earlier, later in pairwise(arrivals(4000, 2.0, seed=2))]
    mean = statistics.fmean(gaps)
    assert 0.93 < statistics.stdev(gaps) / mean < 1.07, f"standard deviation over mean: {statistics.stdev(gaps) / mean:.2f}"
    below = sum(gap < mean for gap in gaps) / len(gaps)
    assert 0.61 < below < 0.66, f"{below:.0%} of the distances are below their mean, expected 63 %"


@pytest.mark.parametrize("burst", [1, 4, 10])
def test_bursts_arrive_together_at_the_same_rate(burst: int) -> None:
    """Groups of `burst` share their time, and a thousand groups take as long as they would one by one.

    Why: a comparison of steady and bursty traffic is about clumps. With another rate it would be about load.
    """
    times = arrivals(1000 * burst, 5.0, burst=burst, seed=3)
    sizes = [len(list(group)) for _, group in groupby(times)]
    check_equal(sizes, [burst] * 1000, "how many arrive together")
    rate = len(times) / times[-1]
    assert 4.5 < rate < 5.5, f"bursts of {burst} arrive at {rate:.2f} requests a second, expected about 5"


@pytest.mark.parametrize(("number", "burst"), [(10, 4), (3, 8), (9, 8), (8, 8), (7, 8), (0, 3)])
def test_the_last_group_may_be_smaller(number: int, burst: int) -> None:
    """Ten requests in groups of four are 4, 4 and 2.

    Why: a run of 10 requests that sends 8 or 12 did other work than it says.
    """
    sizes = [len(list(group)) for _, group in groupby(arrivals(number, 1.0, burst=burst, seed=5))]
    check_equal(sizes, [min(burst, number - first) for first in range(0, number, burst)], "how many arrive together")


def test_nobody_elses_numbers_are_drawn() -> None:
    """The process's own generator, `random.random`, is as it was.

    Why: whoever draws from it after that draws the same every time, and does not know it.
    """
    before = random.getstate()
    arrivals(20, 3.0, seed=4)
    check_equal(random.getstate() == before, True, "the generator is as it was")


def test_the_seed_decides() -> None:
    """The same seed gives the same times, another seed others.

    Why: two servers must meet the same luck, or the luckier one wins.
    """
    check_equal(arrivals(50, 3.0, seed=4), arrivals(50, 3.0, seed=4), "twice with the same seed")
    assert arrivals(50, 3.0, seed=4) != arrivals(50, 3.0, seed=5), "seeds 4 and 5 give the same times"


def test_an_infinite_rate_is_all_at_once() -> None:
    """All times are 0.

    Why: that is how throughput is measured.
    """
    check_equal(arrivals(5, math.inf), [0.0] * 5, "arrivals")
    check_equal(arrivals(0, 1.0), [], "no requests")


@pytest.mark.parametrize(("rate", "burst"), [(0.0, 1), (-1.0, 1), (math.nan, 1), (1.0, 0), (math.inf, 0)])
def test_a_rate_that_is_none_is_refused(rate: float, burst: int) -> None:
    """Nothing a second, or bursts of nobody, are a ValueError.

    Why: an experiment that never ends is found out too late.
    """
    with pytest.raises(ValueError, match="rate above 0"):
        arrivals(3, rate, burst=burst)


# The open loop


def test_the_open_loop_sends_at_the_times_given() -> None:
    """Requests due at 0, 1, 1 and 2.5 s are sent then, though each takes 10 s.

    Why: users do not know how busy the server is. That they come all the same is what makes queues.
    """
    server = Server()
    streams = simulate(open_loop(server.send, requests(10, 11, 12, 13), [0.0, 1.0, 1.0, 2.5]))
    check_equal([round(at, 9) for at, _ in server.sent], [0.0, 1.0, 1.0, 2.5], "when requests were sent")
    check_equal(server.most, 4, "requests under way at once")
    check_equal(starts(streams), [0.0, 1.0, 1.0, 2.5], "when their clocks began")


def test_streams_come_in_the_order_of_their_requests() -> None:
    """The first takes longest and ends last; it is still the first.

    Why: what is measured is matched with what was asked for by its place.
    """
    streams = simulate(open_loop(Server().send, requests(9, 1, 5), [0.0, 0.0, 0.0]))
    check_equal([stream.num_tokens for stream in streams], [9, 1, 5], "tokens of the streams")


def test_a_late_client_hides_no_wait() -> None:
    """The client is held up for 3 s when it sends the first; the second, due at 1, has its clock started at 1.

    Why: coordinated omission. A client that stands still while the server does, and starts its clocks afterwards, leaves out
    exactly the waits that matter.
    """
    server = Server()

    async def send(request: BenchRequest, due: float) -> Stream:
        if request.output_len == 7:
            asyncio.get_running_loop().seconds += 3.0  # no other task can run meanwhile
        return await server.send(request, due)

    streams = simulate(open_loop(send, requests(7, 1, 1), [0.0, 1.0, 5.0]))
    check_equal([round(at, 9) for at, _ in server.sent], [3.0, 3.0, 5.0], "when requests reached the server")
    check_equal(starts(streams), [0.0, 1.0, 5.0], "when their clocks began")
    check_equal(ends(streams), [10.0, 4.0, 6.0], "when they were answered")


def test_requests_and_times_may_come_from_iterators() -> None:
    """Both as generators: an open loop needs the next of each, and no list.

    Why: a load of a day is drawn while it is sent.
    """
    streams = simulate(open_loop(Server().send, iter(requests(1, 2)), (float(second) for second in range(2))))
    check_equal((starts(streams), ends(streams)), ([0.0, 1.0], [1.0, 3.0]), "when the clocks began, and the answers")


def test_an_open_loop_begins_now() -> None:
    """Times are seconds after the call, wherever the loop's clock stands.

    Why: a warm-up comes before, and its time has passed.
    """

    async def later() -> list[Stream]:
        await asyncio.sleep(100.0)
        return await open_loop(Server().send, requests(1, 1), [0.0, 2.0])

    check_equal(starts(simulate(later())), [100.0, 102.0], "when the clocks began")


# The closed loop


def test_a_closed_loop_keeps_its_users_busy() -> None:
    """Two users, requests of 3, 1, 1, 1 and 2 s: when the second has its answer after 1 s, it takes the third, and so on.

    Why: sent in pairs, the second would wait for the first, and the server for both: less load than was asked for.
    """
    server = Server()
    streams = simulate(closed_loop(server.send, requests(3, 1, 1, 1, 2), 2))
    check_equal(
        [(round(at, 9), size) for at, size in server.sent], [(0, 3), (0, 1), (1, 1), (2, 1), (3, 2)], "when which was sent"
    )
    check_equal(server.most, 2, "requests under way at once")
    check_equal([stream.num_tokens for stream in streams], [3, 1, 1, 1, 2], "streams in the order of the requests")


def test_a_closed_loop_has_a_clock_for_each_request() -> None:
    """A request's clock starts when its user sends it.

    Why: the request was not due before; its user was reading.
    """
    streams = simulate(closed_loop(Server().send, requests(2, 2, 2), 1))
    check_equal(starts(streams), [0.0, 2.0, 4.0], "when the clocks began")


@pytest.mark.parametrize("users", [1, 3, 8, 20])
def test_never_more_under_way_than_users(users: int) -> None:
    """Of 60 requests of random lengths at most `users` are under way, and as many while there are requests left.

    Why: "at a concurrency of 8" has to mean it.
    """
    server, dice = Server(), random.Random(users)
    work = requests(*(dice.randint(1, 30) for _ in range(60)))
    streams = simulate(closed_loop(server.send, work, users))
    check_equal(server.most, users, "requests under way at once")
    check_equal(len(streams), 60, "streams")


def test_nobody_sends_after_the_time() -> None:
    """Two users for 5 s, requests of 2 s: each sends at 0, 2 and 4, and what is under way at 5 is read to its end.

    Why: cut off in the middle, the slow answers would be the ones that are missing.
    """
    server = Server()
    streams = simulate(closed_loop(server.send, iter(requests(*[2] * 1000)), 2, seconds=5.0))
    check_equal([round(at, 9) for at, _ in server.sent], [0, 0, 2, 2, 4, 4], "when requests were sent")
    check_equal(ends(streams), [2, 2, 4, 4, 6, 6], "when they were answered")


def test_an_answer_may_take_longer_than_the_run() -> None:
    """One user for 5 s: a request of 3 s, then one of 20 s, which is read to its end at 23 s; another is not sent.

    Why: a limit on the run is none on an answer. Broken off when time is up, the slowest would be the ones that are missing.
    """
    server = Server()
    streams = simulate(closed_loop(server.send, requests(3, 20, 1), 1, seconds=5.0))
    check_equal([round(at, 9) for at, _ in server.sent], [0, 3], "when requests were sent")
    check_equal(ends(streams), [3, 23], "when they were answered")


def test_a_closed_loop_begins_now() -> None:
    """Called at 100 s for 5 s, with requests of 2 s without an end: one user sends at 100, 102 and 104.

    Why: the loop's clock counts from whenever it began, not from the run's beginning. And requests that are drawn without an
    end cannot be listed first.
    """
    server = Server()

    def endless() -> Iterator[BenchRequest]:
        for number in count():
            assert number < 10_000, "requests are read long before they are sent"
            yield BenchRequest([1], 2)

    async def later() -> list[Stream]:
        await asyncio.sleep(100.0)
        return await closed_loop(server.send, endless(), 1, seconds=5.0)

    streams = simulate(later())
    check_equal([round(at, 9) for at, _ in server.sent], [100.0, 102.0, 104.0], "when requests were sent")
    check_equal(ends(streams), [102.0, 104.0, 106.0], "when they were answered")


def test_a_slow_server_is_asked_less_in_a_closed_loop_only() -> None:
    """A server with one seat and 2 s a request: eight users see 16 s at most; 1 request a second sees waits grow for ever.

    Why: the closed loop's politeness hides overload. Who measures with it alone finds that every server copes.
    """
    polite = simulate(closed_loop(Server(1).send, requests(*[2] * 40), 8))
    open_ = simulate(open_loop(Server(1).send, requests(*[2] * 40), [float(second) for second in range(40)]))
    check_equal(round(max(stream.latency for stream in polite), 9), 16.0, "longest wait of eight users")
    check_equal(round(max(stream.latency for stream in open_), 9), 41.0, "longest wait of forty arrivals")
