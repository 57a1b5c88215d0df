"""Task 2.8 ★: whose sequence goes next, and what it is charged, worked out by hand; and two clients at one engine."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.batching.queue_order import OUTPUT_COST, FairOrder
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, ids, make_sequence


def asks(seq_id: int, client: str | None, tokens: int, computed: int = 0, new: int = 0) -> Sequence:
    """A client's sequence: a prompt of `tokens`, `new` tokens written behind it, `computed` of them all in the KV cache."""
    seq = make_sequence(seq_id, tokens, max_tokens=100)
    seq.client, seq.num_computed_tokens = client, computed
    for token in range(new):
        seq.append_token(token)
    return seq


def decide(
    order: FairOrder, counts: dict[Sequence, int], waiting: list[Sequence], running: list[Sequence] | None = None
) -> None:
    """A step in which these sequences compute so many tokens; afterwards they have."""
    order.after_decision(SchedulerOutput(scheduled=counts), waiting, list(counts) if running is None else running)
    for seq, count in counts.items():
        seq.num_computed_tokens += count


def admitted(order: FairOrder, waiting: list[Sequence], room: int = 100) -> list[int]:
    """The order in which they go."""
    waiting = list(waiting)
    order.before_admission(waiting, room)
    return ids(waiting)


def test_clients_take_turns() -> None:
    """Of five requests of a and two of b, all as long, a and b get every other place while both have some.

    Why: first come, first served would let b wait for all that a has sent; a client that sends more must not get more.
    """
    waiting = [asks(i, "a", 10) for i in range(5)] + [asks(5, "b", 10), asks(6, "b", 10)]
    check_equal(admitted(FairOrder({}), waiting), [0, 5, 1, 6, 2, 3, 4], "the order of the sequences")


def test_a_turn_lasts_as_long_as_its_tokens() -> None:
    """One prompt of 30 tokens of a counts as much as three of 10 of b. What is computed already does not count.

    Why: turns by requests let whoever sends the longest have the machine.
    """
    waiting = [asks(0, "a", 30), asks(1, "b", 10), asks(2, "b", 10), asks(3, "b", 10), asks(4, "a", 30), asks(5, "b", 10)]
    check_equal(admitted(FairOrder({}), waiting), [0, 1, 2, 3, 4, 5], "a, then three of b, and so on")
    waiting[0].num_computed_tokens = 25
    check_equal(
        admitted(FairOrder({}), waiting), [0, 1, 4, 2, 3, 5], "of the first, 5 tokens are left: a counts 5, b counts 10"
    )


def test_a_weight_of_two_gives_twice_as_much() -> None:
    """With weight 2, a gets two places for each of b. Whoever is in no table has weight 1, also the client None.

    Why: a paying customer's share is a number in a table and not a queue of its own.
    """
    waiting = [asks(i, "a", 10) for i in range(4)] + [asks(4 + i, None, 10) for i in range(2)]
    check_equal(admitted(FairOrder({"a": 2}), waiting), [0, 4, 1, 2, 5, 3], "the order: a counts 5 a sequence, None 10")


def test_arrival_decides_where_counters_do_not() -> None:
    """The list comes in any order; sequences of one client go by arrival, and so do clients that count the same.

    Why: after a preemption the queue is not in order, and an order that changes from step to step lets nobody finish.
    """
    waiting = [asks(3, "b", 10), asks(2, "a", 10), asks(0, "b", 10), asks(1, "a", 10)]
    check_equal(admitted(FairOrder({}), waiting), [0, 1, 2, 3], "the order of the sequences")
    waiting = [asks(9, "a", 10), asks(0, "a", 10), asks(3, "b", 10), asks(2, "a", 10), asks(1, "b", 10)]
    check_equal(admitted(FairOrder({}), waiting), [0, 1, 2, 3, 9], "the order, where one client sends again much later")


def test_many_short_ones_beside_a_long_one() -> None:
    """b's first prompt has 8 tokens, a sends nine of one token: a gets as many places as b's prompt is long.

    Why: what is added for each place is felt where one client has many.
    """
    waiting = [asks(0, "a", 1), asks(1, "b", 8), *(asks(i, "a", 1) for i in range(2, 10)), asks(10, "b", 8)]
    check_equal(admitted(FairOrder({}), waiting), [*range(10), 10], "the order of the sequences")


def test_a_single_place_is_dealt_out_too() -> None:
    """There is room for one. a has been served and came first, b has not.

    Why: a full engine admits one sequence at a time, and whoever came first would get each of these places.
    """
    order, first = FairOrder({}), asks(0, "a", 10)
    order.before_admission([first, asks(1, "b", 10)], 1)
    decide(order, {first: 10}, [asks(1, "b", 10)])
    check_equal(admitted(order, [asks(2, "a", 5), asks(3, "b", 5)], room=1), [3, 2], "the order of the sequences")


@settings(max_examples=60, deadline=None)
@given(data=st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 40)), min_size=1, max_size=20), start=st.data())
def test_the_order_is_that_of_a_loop(data: list[tuple[str, int]], start: st.DataObject) -> None:
    """For any queue, counters and weights: the same order as from asking all clients anew for each place.

    Why: a heap that forgets to charge, or charges the wrong client, is right for two clients and wrong for three.
    """
    weights = {client: start.draw(st.sampled_from([0.5, 1.0, 2.0])) for client in "ab"}
    counters = {client: float(start.draw(st.integers(0, 50))) for client in "abc"}
    waiting = [asks(i, client, tokens) for i, (client, tokens) in enumerate(data)]
    order = FairOrder(weights)
    order.before_admission(list(waiting), 100)  # all wait already, so that nobody is lifted
    decide(order, {}, waiting)
    order.served.update(counters)
    expected, left = [], list(waiting)
    while left:
        seq = min(left, key=lambda each: (counters[each.client], each.seq_id))
        left.remove(seq)
        expected.append(seq.seq_id)
        counters[seq.client] += len(seq.tokens) / weights.get(seq.client, 1)
    check_equal(admitted(order, waiting), expected, "the order of the sequences")


def test_a_step_charges_what_it_computes() -> None:
    """A prompt of 10 in chunks of 6 and 4 costs 6 and then 4; each token written costs OUTPUT_COST. Weights divide.

    Why: charged by request, or when it ends, a client that asks for long answers is far ahead before anybody notices.
    """
    order, seq = FairOrder({"a": 4}), asks(0, "a", 10)
    order.before_admission([seq], 1)
    decide(order, {seq: 6}, [])
    check_equal(order.served["a"], 6 / 4, "after 6 tokens of the prompt")
    decide(order, {seq: 4}, [])
    check_equal(order.served["a"], 10 / 4, "after the whole prompt")
    seq.append_token(1)
    seq.append_token(2)
    decide(order, {seq: 2}, [])
    check_equal(order.served["a"], (10 + 2 * OUTPUT_COST) / 4, "after two tokens that were written")


def test_two_sequences_of_a_client_share_its_counter() -> None:
    """In one step a computes 5 and 7 tokens and b computes 1.

    Why: a counter for each request would let a client have as many shares as it opens connections.
    """
    order, first, second, other = FairOrder({}), asks(0, "a", 5), asks(1, "a", 7), asks(2, "b", 1)
    order.before_admission([first, second, other], 3)
    decide(order, {first: 5, second: 7, other: 1}, [])
    check_equal(order.served, {"a": 12.0, "b": 1.0}, "the counters")


def test_a_token_is_charged_once() -> None:
    """A prompt of 8, of which 4 come from the prefix cache, costs 4. It writes 2 tokens and is preempted: of the 10 that are
    computed again, only the one that never was costs anything. Chunks that end within what was paid for are free.

    Why: the client has asked neither for the preemption nor for the engine's memory to be too small.
    """
    order, seq = FairOrder({}), asks(0, "a", 8, computed=4)
    order.before_admission([seq], 1)
    decide(order, {seq: 4}, [])
    check_equal(order.served["a"], 4.0, "the half of the prompt that was not cached")
    seq.append_token(1)
    decide(order, {seq: 1}, [])
    seq.append_token(2)
    check_equal(order.served["a"], 4 + OUTPUT_COST, "one token that was written")
    seq.num_computed_tokens = 0  # preempted
    order.before_admission([seq], 1)
    decide(order, {seq: 7}, [])
    check_equal(order.served["a"], 4 + OUTPUT_COST, "a chunk of 7 of the 9 tokens that are paid for")
    decide(order, {seq: 3}, [])
    check_equal(order.served["a"], 4 + 2 * OUTPUT_COST, "the rest, with one token that is new")


def test_tokens_that_a_draft_has_brought_are_charged_too() -> None:
    """A prompt of 4 and one token are paid for, up to 5. When the next step is decided 7 of 8 are computed, as a draft has
    brought two more: three tokens are charged.

    Why: a draft's tokens are in no decision, so only where the paid ones end tells of them. A client with long drafts would
    have most of its answer for nothing.
    """
    order, seq = FairOrder({}), asks(0, "a", 4)
    order.before_admission([seq], 1)
    decide(order, {seq: 4}, [])
    seq.append_token(1)
    decide(order, {seq: 1}, [])
    for token in (2, 3, 4):
        seq.append_token(token)
    seq.num_computed_tokens += 2
    decide(order, {seq: 1}, [])
    check_equal(order.served["a"], 4 + 4 * OUTPUT_COST, "the prompt, and four tokens that were written")


@pytest.mark.parametrize(("prompt", "written"), [(4, 3), (3, 2), (5, 1)])
def test_a_chunk_may_end_behind_the_prompt(prompt: int, written: int) -> None:
    """A sequence with some prompt tokens and some written ones, none paid for, computes all of them at once.

    Why: with speculation, or children of a prompt, a step goes over the border; what is behind it costs OUTPUT_COST each.
    """
    order, seq = FairOrder({}), asks(0, "a", prompt, new=written)
    order.before_admission([seq], 1)
    decide(order, {seq: prompt + written}, [])
    check_equal(order.served["a"], prompt + written * OUTPUT_COST, "the counter")


def test_who_was_served_most_is_preempted_first() -> None:
    """After a decision the running sequences stand by counter, the highest last, those of one client by arrival.

    Why: the scheduler takes blocks from the back of this list. By arrival it would take them from whoever came last, which is
    not who fills the memory.
    """
    order = FairOrder({})
    flood, light = [asks(i, "flood", 20) for i in range(3)], asks(3, "light", 5)
    order.before_admission([*flood, light], 4)
    running = [flood[2], light, flood[0], flood[1]]
    decide(order, {seq: len(seq.tokens) for seq in running}, [], running)
    check_equal(ids(running), [3, 0, 1, 2], "the running sequences")


def lifted(others: dict[str, float], newcomer: float | None) -> float:
    """The counter of "new" when it begins to wait beside others that wait already."""
    order = FairOrder({})
    waiting = [asks(i, client, 10) for i, client in enumerate(others)]
    order.before_admission(list(waiting), 0)
    decide(order, {}, waiting)
    order.served.update(others)
    if newcomer is not None:
        order.served["new"] = newcomer
    order.before_admission([*waiting, asks(len(waiting), "new", 10)], 0)
    check_equal({client: order.served[client] for client in others}, others, "the counters of those that waited already")
    return order.served["new"]


@pytest.mark.parametrize("counter", [None, 0.0, 39.0, 40.0, 41.0, 300.0])
def test_who_begins_to_wait_begins_where_others_are(counter: float | None) -> None:
    """Beside clients at 90, 40 and 70 a new one begins at 40; one that was at 300 stays there. Also when there is no room.

    Why: from 0, a client that slept for an hour would be served alone until it has had as much as the others in that hour.
    """
    check_equal(lifted({"x": 90.0, "y": 40.0, "z": 70.0}, counter), max(40.0, counter or 0.0), "the newcomer's counter")


def test_who_waits_again_is_lifted_again() -> None:
    """a and b wait, a is let in with 10 tokens, and b waits on until it is at 90. Then a sends again, and begins at 90.

    Why: to have waited once is no claim for ever. With its old counter a would be served alone until it is where b is.
    """
    order, first, other = FairOrder({}), asks(0, "a", 10), asks(1, "b", 10)
    order.before_admission([first, other], 1)
    decide(order, {}, [first, other])
    order.before_admission([first, other], 1)
    decide(order, {first: 10}, [other])
    order.served["b"] = 90.0
    order.before_admission([other, asks(2, "a", 10)], 0)
    check_equal(order.served, {"a": 90.0, "b": 90.0}, "the counters")


def test_after_a_pause_it_begins_where_the_last_ones_were() -> None:
    """Nobody waits for a while. The next client that does begins at the least counter of those that waited last.

    Why: where all are served at once, nobody is waiting to compare with. From 0 again, a newcomer would be ahead of whoever
    comes back.
    """
    order, first, second = FairOrder({}), asks(0, "a", 30), asks(1, "b", 20)
    order.before_admission([first, second], 2)
    decide(order, {first: 30, second: 20}, [])
    for _ in range(3):
        order.before_admission([], 2)
        decide(order, {}, [])
    order.before_admission([asks(2, "c", 1)], 2)
    check_equal(order.served["c"], 20.0, "the counter of c")


def test_one_that_waits_on_is_not_lifted() -> None:
    """a is behind (10 of 100) and has been waiting; when b, at 100, begins to wait again, a keeps its 10.

    Why: what a client is owed while it waits is the whole point. Only what it did not ask for is lost.
    """
    order, ahead, behind = FairOrder({}), asks(0, "b", 100), asks(1, "a", 10)
    order.before_admission([ahead, behind], 2)
    decide(order, {ahead: 100, behind: 10}, [late := asks(2, "a", 5)])
    check_equal(admitted(order, [late, asks(3, "b", 5)]), [2, 3], "the order of the sequences")
    check_equal(order.served, {"b": 100.0, "a": 10.0}, "the counters")


def test_one_that_has_left_the_queue_is_not_lifted() -> None:
    """a waits at 10 and gives up; c begins to wait beside b, which waits at 40: c begins at 40, and a stays at 10.

    Why: only who begins to wait is to begin where others are. Whoever has left is owed what it was owed.
    """
    order, gone, stays = FairOrder({}), asks(0, "a", 10), asks(1, "b", 10)
    order.before_admission([gone, stays], 0)
    decide(order, {}, [gone, stays])
    order.served.update({"a": 10.0, "b": 40.0})
    order.before_admission([stays, asks(2, "c", 10)], 0)
    check_equal(order.served, {"a": 10.0, "b": 40.0, "c": 40.0}, "the counters")


def test_who_is_ahead_is_remembered() -> None:
    """a is at 300, b at 10 and c, which waits on, at 10; a and b are through. a's counter is kept, b's is not.

    Why: a client that has had a lot would come back as a new one. One at the least counter comes back to the same counter.
    """
    order, waits = FairOrder({}), asks(2, "c", 10)
    order.before_admission([asks(0, "a", 10), asks(1, "b", 10), waits], 0)
    order.served.update({"a": 300.0, "b": 10.0, "c": 10.0})
    for _ in range(2):
        order.before_admission([waits], 1)
        decide(order, {}, [waits])
    check_equal(order.served, {"a": 300.0, "c": 10.0}, "the counters")


def test_a_spray_of_clients_is_forgotten() -> None:
    """Two hundred clients come once each beside one that sends on; the order remembers few of them, and never forgets one
    that still runs.

    Why: where a client is an address, every visitor of a day would stay in memory, and be gone through at every step.
    """
    order, steady = FairOrder({}), asks(0, "steady", 1)
    for number in range(200):
        visitor = asks(number + 1, f"10.0.0.{number}", 3)
        order.before_admission([steady, visitor], 2)
        decide(order, {visitor: 3, asks(1000 + number, "steady", 4): 4}, [steady])
        assert order.served[f"10.0.0.{number}"] >= 3, "one that runs has its counter"
    assert len(order.served) < 20, f"{len(order.served)} counters are kept"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_flood_costs_others_no_more_than_their_share(seed: int) -> None:
    """One client sends 60 long requests first, another 120 short ones. While both wait, what they get differs by at most twice
    what all seats together may write.

    Why: this is the promise of the paper (theorem 4.4), for any mix of lengths; the counters are kept for nothing else.
    """
    rng = random.Random(seed)
    sim = Simulation(num_blocks=512, block_size=4, policy="fair", max_num_seqs=4, max_num_batched_tokens=64)
    for client, count, prompt, most in (("long", 60, 40, 24), ("short", 120, 5, 6)):
        for _ in range(count):
            sim.add(rng.randint(prompt // 2, prompt), max_tokens=rng.randint(1, most)).client = client
    served, steps = {"long": 0.0, "short": 0.0}, 0
    while {seq.client for seq in sim.scheduler.waiting} == set(served):
        before = {seq: seq.num_computed_tokens for seq in sim.sequences}
        for seq, count in sim.step().scheduled.items():
            prompt = max(0, min(before[seq] + count, seq.num_prompt_tokens) - before[seq])
            served[seq.client] += prompt + OUTPUT_COST * (count - prompt)
        gap = abs(served["long"] - served["short"])
        assert gap <= 2 * OUTPUT_COST * 4 * 24, f"after {steps} steps: {served}"
        steps += 1
    assert steps > 20, "both have been waiting for a while"
    sim.run()
