"""Task 2.2: who goes first, and how many may wait."""

from __future__ import annotations

import itertools
import random

import pytest

from stages.batching.scheduler_config import QueueFullError, fcfs, priority
from stages.batching.sequence import Sequence, SequenceStatus
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, ids, make_sequence


def test_fcfs_sorts_by_arrival_and_nothing_else() -> None:
    """Sorted by `fcfs`, sequences stand in order of arrival, which seq_id counts, whatever their priority.

    Why: first come, first served is the only order in which nobody waits for ever. Arrival is the id and not the clock,
    because two requests can carry the same time.
    """
    sequences = [make_sequence(i, 2, priority=rank) for i, rank in ((10, 0), (9, 3), (2, 7), (100, -1))]
    check_equal(ids(sorted(sequences, key=fcfs)), [2, 9, 10, 100], "order by fcfs")


def test_priority_puts_the_lower_value_first() -> None:
    """Sorted by `priority`, the lower value stands first; negative values are more urgent still.

    Why: vLLM's convention, as of Unix's nice. A scheduler with the sign turned round serves the batch job before the person
    who waits.
    """
    sequences = [make_sequence(i, 2, priority=rank) for i, rank in enumerate((5, 0, -2, 1))]
    check_equal(ids(sorted(sequences, key=priority)), [2, 1, 3, 0], "order by priority")


def test_priority_breaks_ties_by_arrival() -> None:
    """Among equal priorities the earlier arrival stands first, in whatever order they are given.

    Why: without a tie-break the order among equals depends on the history of the queue, and someone is passed over again and
    again.
    """
    sequences = [make_sequence(i, 2, priority=rank) for i, rank in enumerate((1, 0, 1, 0, 1))]
    for order in (sequences, sequences[::-1], sequences[2:] + sequences[:2]):
        check_equal(ids(sorted(order, key=priority)), [1, 3, 0, 2, 4], "order by priority, then arrival")


def test_keys_of_different_sequences_differ() -> None:
    """No two sequences have the same key under either policy.

    Why: the order must be total. Equal keys would let the last in line, who is preempted first, depend on chance.
    """
    sequences = [make_sequence(i, 2, priority=i % 2) for i in range(6)]
    for policy in (fcfs, priority):
        check_equal(len({policy(seq) for seq in sequences}), 6, f"different keys under {policy.__name__}")


def test_the_clock_says_nothing_about_the_order() -> None:
    """Arrival is the id: neither arrival_time, nor preemptions, nor the lengths of prompts change the order of a policy.

    Why: a request that was prepared early and submitted late has an early time and a late id. By the clock it would overtake
    those who were in the queue before it, and it would not be the last one that is preempted.
    """
    sequences = [make_sequence(i, length) for i, length in enumerate((200, 2, 90, 1))]
    for seq, time, preemptions in zip(sequences, (9.0, 3.0, 7.0, 1.0), (0, 1, 0, 2), strict=True):
        seq.arrival_time, seq.num_preemptions = time, preemptions
    for policy in (fcfs, priority):
        check_equal(ids(sorted([sequences[i] for i in (2, 3, 1, 0)], key=policy)), [0, 1, 2, 3], f"order by {policy.__name__}")


@pytest.mark.parametrize("newcomer", [-1, 500, 2000])
def test_a_newcomer_does_not_sort_the_queue(newcomer: int) -> None:
    """A sequence that enters a queue of 1,000, in front, in the middle or at the end, is compared with at most 20 of them.

    Why: the queue is in order already. Sorting it, or walking along it, for each request takes a busy server's time when it has
    least. (`bisect` needs 10 comparisons; here a counting key takes the place of the policy's.)
    """
    scheduler = Simulation().scheduler
    scheduler.waiting = [make_sequence(i, 1) for i in range(1000)]
    scheduler.waiting.pop(500)
    keys = []

    def key(seq: Sequence) -> tuple[int, ...]:
        keys.append(seq.seq_id)
        return (seq.seq_id,)

    scheduler._key = key
    scheduler.add(make_sequence(newcomer, 1))
    check_equal(ids(scheduler.waiting), sorted({*range(1000)} - {500} | {newcomer}), "waiting queue")
    assert len(keys) <= 21, f"{len(keys)} keys were asked for to put one sequence into a sorted queue of 999"


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2, 3]), ("priority", [3, 1, 2, 0])])
def test_queue_is_sorted_after_every_add(policy: str, expected: list[int]) -> None:
    """Whatever the order in which four sequences are added, the waiting queue is in the order of the policy after each.

    Why: admission takes the front and looks no further, so the queue has to be right at all times and not only after a sort.
    """
    for order in itertools.permutations(range(4)):
        scheduler = Simulation(policy=policy).scheduler
        sequences = [make_sequence(i, 2, priority=rank) for i, rank in enumerate((2, 1, 1, 0))]
        for count, index in enumerate(order, 1):
            scheduler.add(sequences[index])
            wanted = [i for i in expected if i in order[:count]]
            check_equal(ids(scheduler.waiting), wanted, f"waiting queue after adding {order[:count]}")


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [1, 4, 7, 9]), ("priority", [4, 1, 7, 9])])
def test_an_earlier_arrival_that_comes_back_goes_to_its_old_place(policy: str, expected: list[int]) -> None:
    """Sequence 1 enters a queue where 4, 7 and 9 wait: first under fcfs, between 4 and 7 under priority.

    Why: a preempted sequence comes back to the queue. At the end of it, it would starve behind everyone who came later.
    """
    scheduler = Simulation(policy=policy).scheduler
    for seq_id, rank in ((4, 0), (7, 1), (9, 1), (1, 1)):
        scheduler.add(make_sequence(seq_id, 2, priority=rank))
    check_equal(ids(scheduler.waiting), expected, "waiting queue")


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_bounded_queue_takes_exactly_its_limit(limit: int) -> None:
    """With `max_num_waiting` = limit, that many are taken and the next one is refused with QueueFullError.

    Why: a queue without an end answers nobody in time. A client that is told "full" at once can go elsewhere.
    """
    scheduler = Simulation(max_num_waiting=limit).scheduler
    for i in range(limit):
        scheduler.add(make_sequence(i, 2))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence(limit, 2))


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_refusal_leaves_the_queue_as_it_was(policy: str) -> None:
    """After a QueueFullError the same sequences wait in the same order, and a place that gets free can be taken.

    Why: the server answers 429 and goes on. If the refused sequence stayed in the queue, it would run for nobody.
    """
    scheduler = Simulation(max_num_waiting=2, policy=policy).scheduler
    for i in (1, 2):
        scheduler.add(make_sequence(i, 2))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence(0, 2, priority=-5))
    check_equal(ids(scheduler.waiting), [1, 2], "waiting queue after the refusal")
    scheduler.waiting.pop(0)
    scheduler.add(make_sequence(3, 2))
    check_equal(ids(scheduler.waiting), [2, 3], "waiting queue after a place got free")


@pytest.mark.parametrize(("waiting", "n", "fits"), [(0, 3, True), (0, 4, False), (1, 2, True), (1, 3, False), (2, 1, True)])
def test_every_sequence_of_a_request_counts(waiting: int, n: int, fits: bool) -> None:
    """Of a queue for 3, a request for n answers takes n places, although only its first sequence is queued at once.

    Why: its children join the queue when the prompt they share is computed, and nobody can refuse them then.
    """
    scheduler = Simulation(max_num_waiting=3).scheduler
    for i in range(waiting):
        scheduler.add(make_sequence(i, 2))
    parent = make_sequence(10, 2)
    parent.children = [make_sequence(10 + i, 2, parent=parent) for i in range(1, n)]
    if fits:
        scheduler.add(parent)
        check_equal(ids(scheduler.waiting), [*range(waiting), 10], "waiting queue")
    else:
        with pytest.raises(QueueFullError):
            scheduler.add(parent)
        check_equal(ids(scheduler.waiting), list(range(waiting)), "waiting queue after the refusal")
        check_equal(len(parent.children), n - 1, "children of the refused sequence")


@pytest.mark.parametrize("running", [False, True])
def test_children_to_come_keep_their_places(running: bool) -> None:
    """Of a queue for 8, a request for 4 answers whose prompt is not computed yet keeps four places, three once it runs.

    Why: each of five requests for 4 answers found its own four places free, and in the end 13 sequences waited.
    """
    scheduler = Simulation(max_num_waiting=8).scheduler
    parent = make_sequence(0, 2)
    parent.children = [make_sequence(i, 2, parent=parent) for i in range(1, 4)]
    if running:
        parent.status = SequenceStatus.RUNNING
        scheduler.running.append(parent)
    else:
        scheduler.add(parent)
    free = 5 if running else 4
    for i in range(free):
        scheduler.add(make_sequence(10 + i, 2))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence(20, 2))
    check_equal(len(scheduler.waiting), 8 - 3, "sequences in the queue, beside three children to come")


def test_the_children_of_all_count() -> None:
    """Two waiting requests for 3 answers and a running one for 2 take seven places: in a queue for 8 one is left.

    Why: all of their children come. Whoever counts the largest family only fills the queue beyond its end.
    """
    scheduler = Simulation(max_num_waiting=8).scheduler
    for seq_id, n in ((0, 3), (10, 3), (20, 2)):
        parent = make_sequence(seq_id, 2)
        parent.children = [make_sequence(seq_id + i, 2, parent=parent) for i in range(1, n)]
        if n == 3:
            scheduler.add(parent)
        else:
            parent.status = SequenceStatus.RUNNING
            scheduler.running.append(parent)
    scheduler.add(make_sequence(30, 2))
    with pytest.raises(QueueFullError):
        scheduler.add(make_sequence(31, 2))


def test_running_sequences_take_no_place_in_the_queue() -> None:
    """With 2 running and a queue for 1, one more may wait.

    Why: max_num_waiting bounds the time that a newcomer waits; max_num_seqs bounds the batch. They are two limits.
    """
    scheduler = Simulation(max_num_waiting=1).scheduler
    for i in range(2):
        scheduler.running.append(make_sequence(i, 2))
        scheduler.running[-1].status = SequenceStatus.RUNNING
    scheduler.add(make_sequence(2, 2))
    check_equal(ids(scheduler.waiting), [2], "waiting queue")
    check_equal(ids(scheduler.running), [0, 1], "running sequences")


def test_queue_without_a_limit_takes_all() -> None:
    """With `max_num_waiting` = None, 300 sequences are taken.

    Why: offline use hands over all its prompts at once and waits for all the answers.
    """
    scheduler = Simulation(max_num_waiting=None).scheduler
    for i in range(300):
        scheduler.add(make_sequence(i, 2))
    check_equal(len(scheduler.waiting), 300, "sequences waiting")


@pytest.mark.parametrize("number", range(4))
def test_any_crowd_stands_in_the_order_of_the_policy(number: int) -> None:
    """Thirty sequences with random ids and priorities, added in random order.

    Why: who is lucky in a queue of four is found out in one of thirty.
    """
    dice = random.Random(220 + number)
    ranks = {seq_id: dice.randrange(-3, 4) for seq_id in dice.sample(range(1000), 30)}
    for policy, order in (("fcfs", sorted(ranks)), ("priority", sorted(ranks, key=lambda seq_id: (ranks[seq_id], seq_id)))):
        scheduler = Simulation(policy=policy).scheduler
        for seq_id, rank in ranks.items():
            scheduler.add(make_sequence(seq_id, 2, priority=rank))
        check_equal(ids(scheduler.waiting), order, f"waiting queue under {policy}")
