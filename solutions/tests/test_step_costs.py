"""What steps with drafts and passes of a drafting model cost, as far as it was measured."""

from __future__ import annotations

import math

import pytest

from solutions.core.speculation.step_costs import ENOUGH, PassCosts, StepCosts, size_class


def test_sizes_are_measured_together_in_steps_of_an_eighth() -> None:
    assert [size_class(count) for count in range(1, 20)] == [*range(1, 17), 18, 18, 20]
    assert [size_class(count) for count in (32, 33, 36, 37, 200, 256, 257)] == [32, 36, 36, 40, 208, 256, 288]


def test_what_was_not_measured_lies_between_limits() -> None:
    costs = StepCosts()
    assert costs.plain(4) is None
    for _ in range(ENOUGH):
        costs.add(4, 0, 10.0)
        costs.add(4, 4, 12.0)
    assert costs.plain(4) == 10.0
    least, greatest = costs.ratios(4, 10)
    # a token on trial costs no more than four of them together, nor than a tenth of one in a plain step, 1/4, and twice a
    # quarter of what four of them cost; so three cost no less than four but for one such token
    more = 0.1 / 4 + 2 * 0.2 / 4
    not_tried = [math.inf] * 2  # twice as many as ever were are; nothing is said of more
    assert least.tolist() == pytest.approx([1, 1, 1.2 - more, *[1.2] * 5, *not_tried])
    assert greatest.tolist() == pytest.approx([1 + more, *[1.2] * 3, *(1.2 + n * more for n in range(1, 5)), *not_tried])
    costs.add(4, 8, 11.0)
    costs.add(4, 8, 11.0)  # fewer are no slower
    more = 0.1 / 4 + 2 * 0.1 / 4
    assert costs.ratios(4, 10)[0].tolist() == pytest.approx([1, 1, 1.1 - more, *[1.1] * 7])


def test_no_more_are_tried_than_twice_as_many_as_ever_or_one_for_each_sequence() -> None:
    costs = StepCosts()
    for _ in range(ENOUGH):
        costs.add(3, 0, 10.0)
    for tried, most in ((0, 6), (1, 6), (3, 6), (4, 8), (7, 14)):
        if tried:
            costs.add(3, tried, 10.0)
        for ratios in costs.ratios(3, 20):
            assert [math.isfinite(ratio) for ratio in ratios] == [count <= most for count in range(1, 21)]


def test_a_token_on_trial_costs_no_more_than_one_in_a_step_without() -> None:
    costs = StepCosts()
    for _ in range(ENOUGH):
        costs.add(2, 0, 10.0)
    assert costs.ratios(2, 3)[1].tolist() == pytest.approx([1.5, 2.0, 2.5])  # nothing is known
    for _ in range(ENOUGH):
        costs.add(2, 1, 14.0)
    assert costs.ratios(2, 3)[1].tolist() == pytest.approx([1.4, 1.9, 2.4])  # and not 0.8 more for each


def test_passes_are_measured_by_their_number() -> None:
    """The first is the dearest, as it reads what has come since."""
    passes = PassCosts()
    assert passes.of(2) == 0.0
    assert not passes.is_known
    passes.add(1, 5.0)
    assert [passes.of(count) for count in range(4)] == [0.0, 5.0, 10.0, 15.0]
    passes.add(4, 8.0)
    assert [passes.of(count) for count in (1, 2, 3, 4, 8)] == [5.0, 6.0, 7.0, 8.0, 16.0]
    passes.add(2, 90.0)  # the machine was busy
    assert [passes.of(count) for count in (1, 2, 3, 4)] == [5.0, 8.0, 8.0, 8.0]
