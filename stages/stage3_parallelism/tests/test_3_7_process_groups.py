"""Task 3.7: how ranks find each other, which cores are theirs, and who says what when one does not come."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.rank_jobs import fail_on_rank_1, meet_again, say_who
from stages.parallelism import distributed
from stages.parallelism.distributed import cores_of, has_come, join, leave, open_rendezvous, run_ranks, wait_for_ranks

WAIT = 0.5
"""Seconds that ranks wait for those who never come."""
ENOUGH = 5.0
"""Seconds after which a rank waits for ever, as far as these tests care."""


@pytest.fixture(autouse=True)
def left() -> Iterator[None]:
    """Whatever a test joins is left at its end."""
    yield
    leave()


# Cores


def given(monkeypatch: pytest.MonkeyPatch, cores: set[int], quota: int | None = None) -> None:
    """Let this process have these cores, and be allowed to keep `quota` of them busy."""
    monkeypatch.setattr(os, "sched_getaffinity", {0: cores}.__getitem__, raising=False)  # 0: the process that asks
    monkeypatch.setattr(distributed, "available_cores", lambda: quota or len(cores))


@pytest.mark.parametrize(
    ("cores", "size", "expected"),
    [
        ({0, 1, 2, 3}, 2, [[0, 1], [2, 3]]),
        ({0, 1, 2, 3}, 1, [[0, 1, 2, 3]]),
        ({2, 5, 7, 11}, 4, [[2], [5], [7], [11]]),
        ({0, 1, 2, 3, 4}, 2, [[0, 1], [2, 3]]),
        ({0, 1, 2, 3, 4, 5}, 2, [[0, 1, 2], [3, 4, 5]]),
        ({0, 1, 2}, 2, [[0], [1]]),
    ],
)
def test_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch, cores: set[int], size: int, expected: list[list[int]]) -> None:
    """Every rank gets as many cores, different ones, of those that the process may use; what is left over idles.

    Why: all ranks wait for the slowest in every layer. Two on one core halve the speed of all, and the cores of a container are
    seldom those from 0 on.
    """
    given(monkeypatch, cores)
    check_equal([cores_of(rank, size) for rank in range(size)], expected, "cores of the ranks")


def test_more_ranks_than_cores_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ranks on two cores: one core each, in turn.

    Why: it is slow, and it must run: a laptop with two cores is enough to try four ranks.
    """
    given(monkeypatch, {4, 6})
    check_equal([cores_of(rank, 5) for rank in range(5)], [[4], [6], [4], [6], [4]], "cores of the ranks")


def test_a_quota_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container that sees 8 cores and may keep 4 busy gives each of two ranks two.

    Why: who takes more cores than the quota has is stopped by the system in the middle of a step, and all others wait.
    """
    given(monkeypatch, set(range(8)), quota=4)
    check_equal([cores_of(rank, 2) for rank in range(2)], [[0, 1], [2, 3]], "cores of the ranks")


def test_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system does not tell cores apart, as macOS, no rank gets any.

    Why: the caller takes an empty list for "anywhere". An AttributeError would be the end of the course on every Mac.
    """
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    check_equal(cores_of(0, 2), [], "cores")


# Waiting for ranks


class Doors:
    """Stands in for a rendezvous: the ranks of `at_look[n]` are there from the n-th look on, counted from 0."""

    def __init__(self, *at_look: set[int]) -> None:
        self.at_look, self.checks = at_look, 0

    def check(self, names: list[str]) -> bool:
        come = set().union(*self.at_look[: self.checks + 1])
        return set(names) <= {f"rank {rank}" for rank in come}

    def look_for_the_dead(self) -> None:
        """What the driver passes as `check`: here each call is the end of a look."""
        self.checks += 1
        assert self.checks < 1000, "wait_for_ranks looks again and again, although time is up"


def test_who_is_there_is_not_waited_for() -> None:
    """With ranks 1 and 2 at the rendezvous, or nobody to wait for, wait_for_ranks returns at once and checks nobody.

    Why: a rank that has come needs no check any more, and every engine of one rank comes past here.
    """
    for ranks in ([1, 2], []):
        doors = Doors({1, 2})
        wait_for_ranks(ranks, doors, doors.look_for_the_dead, WAIT)
        check_equal(doors.checks, 0, f"calls of check while waiting for {ranks}")


def test_all_are_waited_for() -> None:
    """Rank 2 is there at the first look, rank 1 from the third on and rank 3 from the fourth: there are three checks.

    Why: the driver's first sum waits for everybody. And between two looks somebody may die, so there is a check at each.
    """
    doors = Doors({2}, set(), {1}, {3})
    wait_for_ranks([1, 2, 3], doors, doors.look_for_the_dead, ENOUGH, pause=0.001)
    check_equal(doors.checks, 3, "calls of check")


@pytest.mark.parametrize("number", range(3))
def test_ranks_come_when_they_like(number: int) -> None:
    """Random ranks, each of which is there from a random look on: as many checks as the last one lets the others wait.

    Why: in a cluster nobody knows who comes first.
    """
    dice = random.Random(373 + number)
    for _ in range(4):
        looks = {rank: dice.randrange(6) for rank in dice.sample(range(1, 60), dice.randrange(1, 7))}
        doors = Doors(*({rank for rank, look in looks.items() if look == turn} for turn in range(6)))
        wait_for_ranks(list(looks), doors, doors.look_for_the_dead, ENOUGH, pause=0.001)
        check_equal(doors.checks, max(looks.values()), f"calls of check while waiting for {sorted(looks)}")


def test_a_look_every_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks it sleeps for a fiftieth of a second, or as long as it is told to.

    Why: without a pause the driver takes a core from the ranks that it waits for; with a long one every start takes longer.
    """
    for named, expected in (({}, 0.02), ({"pause": 0.5}, 0.5)):
        pauses: list[float] = []
        monkeypatch.setattr(time, "sleep", pauses.append)
        doors = Doors(set(), set(), {1})
        wait_for_ranks([1], doors, doors.look_for_the_dead, ENOUGH, **named)
        check_equal(pauses, [expected] * 2, f"seconds between looks with {named or 'nothing said'}")


def test_a_death_ends_the_waiting() -> None:
    """What `check` raises comes out, and long before time is up.

    Why: a rank that dies while it loads, as there is no memory for its part, never comes. Without this everyone waits for the
    time-out.
    """
    doors = Doors({1})

    def check() -> None:
        doors.look_for_the_dead()
        if doors.checks == 3:
            raise ChildProcessError("rank 2 has ended, killed by SIGKILL")

    start = time.monotonic()
    with pytest.raises(ChildProcessError, match="rank 2 has ended"):
        wait_for_ranks([1, 2], doors, check, ENOUGH, pause=0.001)
    assert time.monotonic() - start < ENOUGH / 2, f"it took {time.monotonic() - start:.1f} s to see a dead process"


def test_a_death_says_more_than_the_clock() -> None:
    """A rank is dead and time is up at the same look: the error is the death.

    Why: "did not come in time" sends people to look for a slow disk.
    """

    def check() -> None:
        raise ChildProcessError("rank 1 has ended")

    with pytest.raises(ChildProcessError):
        wait_for_ranks([1], Doors(set()), check, timeout=0.0)


def test_time_is_up_for_those_who_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 1 and 3 live and do not come: when time is up, by `time.monotonic`, a TimeoutError names both and not the others.

    Why: of eight ranks the one that hangs is the one to look at.
    """
    doors = Doors({2, 4})
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a clock that somebody has set back
    start = time.monotonic()
    with pytest.raises(TimeoutError) as error:
        wait_for_ranks([1, 2, 3, 4], doors, doors.look_for_the_dead, WAIT, pause=0.01)
    assert WAIT <= time.monotonic() - start < ENOUGH, f"it took {time.monotonic() - start:.1f} s and not {WAIT:g}"
    text = re.sub(r"in \S+ s|of 4", "", str(error.value))
    check_equal([rank for rank in range(5) if str(rank) in text], [1, 3], f"ranks named in {str(error.value)!r}")


def test_the_time_is_that_of_all_together() -> None:
    """Of 40 ranks one comes at each look, every 0.05 s, where all have half a second: time is up, and the last is named.

    Why: a limit that begins again with each rank is none. A cluster that starts one rank in ten minutes would be waited for
    all day.
    """
    doors = Doors(*({rank} for rank in range(1, 41)))
    with pytest.raises(TimeoutError, match=r"\b40\b"):
        wait_for_ranks(range(1, 41), doors, doors.look_for_the_dead, WAIT, pause=0.05)


def test_it_rests_between_two_looks() -> None:
    """In half a second with pauses of 0.1 s there are at most 6 checks.

    Why: the ranks that are waited for load a model on the same cores.
    """
    doors = Doors(set())
    with pytest.raises(TimeoutError):
        wait_for_ranks([1], doors, doors.look_for_the_dead, WAIT, pause=0.1)
    assert doors.checks <= 6, f"{doors.checks} looks in {WAIT:g} s with pauses of 0.1 s"


def failure(function: Callable[..., Any], *args: Any, **named: Any) -> str:
    """The message of the RuntimeError that a call raises. (An unfinished task is a RuntimeError, too, and goes through.)"""
    try:
        result = function(*args, **named)
    except NotImplementedError:
        raise
    except RuntimeError as error:
        return str(error)
    raise AssertionError(f"a RuntimeError was expected, and the result is {result}")


# Joining


def test_one_rank_alone() -> None:
    """A group of one is complete at once; the communicator knows its rank and size.

    Why: one rank is the boundary, and what the tests of a laptop run most.
    """
    communicator = join(0, 1, open_rendezvous(timeout=WAIT), timeout=WAIT)
    check_equal((communicator.rank, communicator.size), (0, 1), "rank and size")


class Meeting:
    """Stands in for what PyTorch does in `join`: a store, a group, the current device. It notes with which arguments."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.connected: list[tuple[str, int, float]] = []
        self.groups: list[tuple[str, float | None]] = []
        self.devices: list[str] = []
        monkeypatch.setattr(distributed.dist, "TCPStore", self._connect)
        monkeypatch.setattr(distributed.dist, "init_process_group", self._init)
        monkeypatch.setattr(distributed.torch.cuda, "set_device", lambda device: self.devices.append(str(device)))
        monkeypatch.setattr(distributed, "Communicator", lambda *_: "joined")

    def _connect(self, host_name: str, port: int, *_: Any, timeout: Any = None, **__: Any) -> Meeting:
        self.connected.append((host_name, port, timeout.total_seconds() if timeout else 300.0))
        return self

    def _init(self, backend: str | None = None, *_: Any, timeout: Any = None, **__: Any) -> None:
        self.groups.append((backend, timeout.total_seconds() if timeout else None))

    def set(self, *_: Any) -> None:
        """All keys are welcome."""

    def wait(self, *_: Any) -> None:
        """All have come."""

    def check(self, *_: Any) -> bool:
        return True


@pytest.mark.parametrize(("device", "backend", "devices"), [("cpu", "gloo", []), ("cuda:1", "nccl", ["cuda:1"])])
@pytest.mark.parametrize("address", ["10.0.0.7:29500", "::1:29500", "some-host:29500"])
def test_how_a_rank_joins(monkeypatch: pytest.MonkeyPatch, device: str, backend: str, devices: list[str], address: str) -> None:
    """By gloo on a CPU; by NCCL on a GPU, which becomes the current device. It waits no longer than it was told: for the store
    at the address, and in the group's own calls.

    Why: by gloo every sum of a GPU goes through the host. And PyTorch's own patience is five minutes for a store and half an
    hour for a group, in which an operator sees nothing.
    """
    meeting = Meeting(monkeypatch)
    check_equal(join(1, 2, address, device, timeout=7.0), "joined", "what join returns")
    host, _, port = address.rpartition(":")
    check_equal(meeting.connected, [(host, int(port), 7.0)], "stores: host, port and seconds to wait")
    check_equal(meeting.groups, [(backend, 7.0)], "groups: what carries the tensors, and seconds to wait")
    check_equal(meeting.devices, devices, "devices that became the current one")


def test_the_reason_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What PyTorch says in several lines is told by its first.

    Why: the others are a stack of its own C++ code, behind which nobody finds the sentence.
    """
    Meeting(monkeypatch)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\nconnection refused\nException raised from connect\nframe #0")

    monkeypatch.setattr(distributed.dist, "init_process_group", fail)
    with pytest.raises(TimeoutError) as error:
        join(1, 2, "10.0.0.7:29500", timeout=7.0)
    check_equal(
        str(error.value), "rank 1: not all of 2 ranks came to the rendezvous in 7 s (connection refused)", "what is said"
    )


def join_in_vain(rank: int, size: int, store: Any) -> None:
    """Join a group that is never complete, and raise what that raises. It is done in a thread, as nothing can interrupt it."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            join(rank, size, store, timeout=WAIT)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ENOUGH)
    assert not thread.is_alive(), f"rank {rank} was to wait for {WAIT:g} s and still waits after {ENOUGH:g}"
    assert errors, f"rank {rank} of {size} is alone, and join says that all have come"
    raise errors[0]


def test_who_waits_in_vain_says_so_with_its_rank() -> None:
    """Rank 0 of 2 waits for a second that never comes: after the time-out a TimeoutError names rank 0 and the 2.

    Why: a group that is not complete looks like a program that does nothing. Somebody has to say who waits for how many.
    """
    with pytest.raises(TimeoutError, match=r"rank 0\b.*\b2\b"):
        join_in_vain(0, 2, open_rendezvous(timeout=2 * ENOUGH))


def test_who_has_come_can_be_seen() -> None:
    """Rank 1 of 3 comes by the address: the one who opened the rendezvous sees that it has come and that rank 2 has not.

    Why: the driver waits for its workers and looks in between whether they still live, so it must know whom it waits for.
    """
    store = open_rendezvous(timeout=WAIT)
    with pytest.raises(TimeoutError, match=r"rank 1\b"):
        join_in_vain(1, 3, f"127.0.0.1:{store.port}")
    check_equal([has_come(rank, store) for rank in range(3)], [False, True, False], "who has come")


# Real processes


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_find_each_other(size: int) -> None:
    """As many processes meet, each with its own rank, and add up what they bring; results come by rank.

    Why: this is the whole of it: an address, a rank, a size, and then collectives work.
    """
    join(0, 1, open_rendezvous(timeout=WAIT), timeout=WAIT)
    expected = [(rank, size, sum(10**r for r in range(size))) for rank in range(size)]
    check_equal(run_ranks(say_who, size, timeout=20), expected, "rank, size and sum of each")


def test_after_waiting_in_vain_they_can_meet() -> None:
    """Rank 0 first waits for somebody who never comes, then for rank 1, which does: they meet.

    Why: PyTorch numbers the groups of a process, also those that nobody came to. An engine that failed to start must not keep
    the next one in this process from starting.
    """
    join(0, 1, open_rendezvous(timeout=WAIT), timeout=WAIT)
    check_equal(run_ranks(meet_again, 2, WAIT, timeout=20), [(0, 2, 11), (1, 2, 11)], "rank, size and sum of each")


@pytest.mark.parametrize(("how", "says"), [("raise", "rank 1 failed|planted|all_reduce failed"), ("die", "code 7|failed")])
def test_a_rank_that_fails_ends_the_others(how: str, says: str) -> None:
    """Rank 1 raises, or dies without a word, while rank 0 waits for its part of a sum: an error, long before time is up.

    Why: a server whose ranks wait for a dead one answers nobody and looks alive.
    """
    join(0, 1, open_rendezvous(timeout=WAIT), timeout=WAIT)
    start = time.monotonic()
    text = failure(run_ranks, fail_on_rank_1, 2, how, timeout=25)
    assert re.search(says, text), f"the message says {text!r}"
    assert time.monotonic() - start < 15, f"it took {time.monotonic() - start:.1f} s"


@pytest.mark.parametrize("number", range(4))
def test_any_cores_are_dealt_out(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Random cores, of which a random quota may be busy, for a random number of ranks.

    Why: a machine's cores are what its administrator left of them.
    """
    dice = random.Random(370 + number)
    for _ in range(8):
        cores, size = dice.sample(range(96), dice.randrange(2, 40)), dice.randrange(1, 9)
        quota = dice.randrange(1, len(cores) + 1)
        given(monkeypatch, set(cores), quota)
        each, usable = quota // size, sorted(cores)
        expected = [usable[rank * each :][:each] if each else [usable[rank % len(usable)]] for rank in range(size)]
        check_equal([cores_of(rank, size) for rank in range(size)], expected, f"cores of {size} ranks, {quota} of {cores}")
