"""Task 6.4: which slots of reserved memory hold a token, which will, and which never do."""

from __future__ import annotations

import random

import pytest

from stages.benchmarks.memory import (
    Buddy,
    FirstFit,
    Usage,
    UsageMeter,
    reserve_exactly,
    reserve_max,
    reserve_power_of_two,
    simulate_contiguous,
)
from stages.course.fixtures.checks import check_equal


def shares(usage: Usage) -> dict[str, float]:
    return {name: round(getattr(usage, name), 9) for name in ("tokens", "later", "never", "free")}


def test_waste_is_a_share_of_what_is_reserved() -> None:
    """Half of the memory is reserved, and half of that holds tokens: 50 % waste.

    Why: free memory is not wasted, it is a queue that is too short. Divided by the whole, an idle server would be the worst.
    """
    check_equal(Usage("toy", tokens=0.25, later=0.15, never=0.1, free=0.5).waste, 0.5, "waste")
    check_equal(round(Usage("toy", tokens=0.9, later=0.06, never=0.0, free=0.04).waste, 9), 0.0625, "waste")


def test_a_slot_is_one_of_four_things() -> None:
    """100 slots, one sequence: 10 tokens held, 40 reserved, 25 when it ends. 15 will be filled, 15 never, 60 are free.

    Why: the three kinds of waste have three cures: paging, shorter reservations, and more requests.
    """
    meter = UsageMeter("toy", 100)
    meter.add([(10, 40, 25)])
    check_equal(shares(meter.result()), {"tokens": 0.1, "later": 0.15, "never": 0.15, "free": 0.6}, "shares")


def test_a_sequence_may_outgrow_what_it_has() -> None:
    """16 slots reserved, 10 held, 50 when it ends: 6 of the reservation will be filled, none never; no other memory counts.

    Why: a paged sequence has only its blocks so far; what it will need later is nobody's yet.
    """
    meter = UsageMeter("toy", 100)
    meter.add([(10, 16, 50)])
    check_equal(shares(meter.result()), {"tokens": 0.1, "later": 0.06, "never": 0.0, "free": 0.84}, "shares")


def test_snapshots_are_averaged() -> None:
    """Two snapshots, one with two sequences and one with none: one sequence runs on average.

    Why: a single moment depends on luck. So does an average of averages, when the moments have different weights.
    """
    meter = UsageMeter("toy", 10)
    meter.add([(1, 4, 4), (3, 4, 3)])
    meter.add([])
    found = meter.result()
    check_equal((found.running, found.steps), (1.0, 2), "running sequences and steps")
    check_equal(shares(found), {"tokens": 0.2, "later": 0.15, "never": 0.05, "free": 0.6}, "shares")


def test_shares_add_up_to_one() -> None:
    """For 100 random snapshots.

    Why: a slot that is in two classes, or in none, makes some system look better than it is.
    """
    dice, meter = random.Random(64), UsageMeter("toy", 1000)
    for _ in range(100):
        meter.add(
            (tokens := dice.randint(0, 20), dice.randint(tokens, 40), dice.randint(tokens, 60))
            for _ in range(dice.randint(0, 25))
        )
    check_equal(round(sum(shares(meter.result()).values()), 6), 1.0, "sum of the shares")


def test_one_after_the_other_by_hand() -> None:
    """Ten slots, each sequence reserves all of them: 2 prompt tokens, 3 output tokens, so 2, 3 and 4 tokens are held.

    Why: the last token is never fed back, so it never needs a slot; whoever counts it finds less waste than there is.
    """
    found = simulate_contiguous("max", 10, [(2, 3)] * 20, reserve_max(10), FirstFit(10))
    check_equal(shares(found), {"tokens": 0.3, "later": 0.1, "never": 0.6, "free": 0.0}, "shares")
    check_equal((found.running, found.steps), (1.0, 17 * 3), "running sequences, and steps that count")


def test_what_the_allocator_gives_is_what_is_reserved() -> None:
    """Prompts of 3 and outputs of 4 need 7 slots and get 8 of a buddy allocator: of 16 slots two sequences have all.

    Why: what is rounded up is reserved, whoever asked for less. Counted as free, a buddy allocator wastes 14 % where it is 25.
    """
    found = simulate_contiguous("buddy", 16, [(3, 4)] * 20, reserve_exactly, Buddy(16))
    check_equal(found.system, "buddy", "name of the system")
    # Both hold 3, 4, 5 and 6 tokens in their four steps, of the 6 slots that they ever fill.
    check_equal(shares(found), {"tokens": 9 / 16, "later": 3 / 16, "never": 4 / 16, "free": 0.0}, "shares")
    check_equal(found.waste, 7 / 16, "waste")


def test_reservations_know_inputs_from_outputs() -> None:
    """`reserve` is asked with (input, output): 5 and the next power of two of 3 are 9 slots, of 12.

    Why: only the output's length is a guess. The other way round it would be 3 + 8, and another system's waste.
    """
    found = simulate_contiguous("pow2", 12, [(5, 3)] * 20, reserve_power_of_two, FirstFit(12))
    check_equal(shares(found), {"tokens": 0.5, "later": round(1 / 12, 9), "never": round(2 / 12, 9), "free": 0.25}, "shares")


def test_the_beginning_and_the_end_do_not_count() -> None:
    """Of 20 requests the first two (a tenth) fill the memory, and with the last one nobody waits any more.

    Why: an empty memory is not fragmented, and a queue that has run dry leaves slots free for want of requests.
    """
    found = simulate_contiguous("exact", 8, [(1, 4)] * 20, reserve_exactly, FirstFit(8))
    check_equal(round(found.free, 9), 3 / 8, "share of free slots: one sequence of 5 in 8 slots, and none beside it")
    check_equal(round(found.never, 9), 1 / 8, "share of slots that are never filled: that of the last token")


def test_who_is_first_is_served_first() -> None:
    """A large request at the head of the queue is not overtaken by small ones that would fit.

    Why: overtaking fills the gaps, and lets large requests starve. A simulation with it flatters contiguous memory.
    """
    lengths = [(6, 5), (6, 5), (2, 1), (2, 1)] * 6
    found = simulate_contiguous("exact", 16, lengths, reserve_exactly, FirstFit(16))
    orders = _running_by_brute_force(lengths, 16)
    check_equal(round(found.running, 9), round(sum(orders) / len(orders), 9), "running sequences on average")


def _running_by_brute_force(lengths: list[tuple[int, int]], capacity: int) -> list[int]:
    """Sequences that run at each step that counts, slot by slot, with the first free run of slots for each."""
    slots: list[int | None] = [None] * capacity
    queue, left, counted, done = list(enumerate(lengths)), {}, [], 0
    while queue:
        while queue:
            number, (prompt, output) = queue[0]
            size = prompt + output
            places = [i for i in range(capacity - size + 1) if all(slot is None for slot in slots[i : i + size])]
            if not places:
                break
            slots[places[0] : places[0] + size] = [number] * size
            left[number] = output
            queue.pop(0)
        if queue and done >= len(lengths) // 10:
            counted.append(len(left))
        for number in list(left):
            left[number] -= 1
            if left[number] == 0:
                del left[number]
                done += 1
                slots = [None if slot == number else slot for slot in slots]
    return counted


def test_long_sequences_end_too() -> None:
    """Twenty requests of 600 and 2 tokens, one at a time in a memory of 700: each holds 600 tokens, then 601, of 602 slots.

    Why: whole numbers above 256 are not the same object in Python when they are equal. A sequence that is compared so never
    ends.
    """
    found = simulate_contiguous("exact", 700, [(600, 2)] * 20, reserve_exactly, FirstFit(700))
    check_equal(found.steps, 34, "steps, of the third to the nineteenth")
    shares = [round(share * 700, 9) for share in (found.tokens, found.later, found.never, found.free)]
    check_equal(shares, [600.5, 0.5, 1.0, 98.0], "slots with a token, with one later, never with one, and free")


@pytest.mark.parametrize("seed", range(5))
def test_random_requests_against_a_memory_of_single_slots(seed: int) -> None:
    """200 requests of random lengths, against an oracle that colours slot by slot.

    Why: pieces that are given back late, or twice, show only in a long run.
    """
    dice = random.Random(seed)
    lengths = [(dice.randint(1, 20), dice.randint(1, 20)) for _ in range(200)]
    found = simulate_contiguous("exact", 100, lengths, reserve_exactly, FirstFit(100))
    counted = _running_by_brute_force(lengths, 100)
    check_equal((round(found.running, 9), found.steps), (round(sum(counted) / len(counted), 9), len(counted)), "running, steps")


def test_what_is_reserved_decides_what_is_wasted() -> None:
    """The same requests: reserving the maximum wastes most, powers of two less, the exact length least.

    Why: this order is the first figure of the paper on paged attention, and the reason for it.
    """
    dice = random.Random(1)
    lengths = [(dice.randint(16, 100), dice.randint(16, 100)) for _ in range(300)]
    wastes = [
        simulate_contiguous("toy", 2048, lengths, reserve, Buddy(2048)).waste
        for reserve in (reserve_max(512), reserve_power_of_two, reserve_exactly)
    ]
    check_equal(wastes, sorted(wastes, reverse=True), "waste, from reserving most to reserving least")
    assert wastes[0] > 0.7, f"reserving 512 slots for about 116 tokens wastes {wastes[0]:.0%}, expected most of it"


def test_a_sequence_that_never_fits_is_an_error() -> None:
    """A request larger than the memory is a ValueError that says what to do.

    Why: the alternative is a loop without end.
    """
    with pytest.raises(ValueError, match="one sequence does not fit the memory of 10 tokens"):
        simulate_contiguous("toy", 10, [(20, 1)] * 5, reserve_exactly, FirstFit(10))
