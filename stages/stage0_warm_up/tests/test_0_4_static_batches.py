"""Task 0.4: a batch waits for its longest answer."""

from __future__ import annotations

import random

import pytest

from stages.stage0_warm_up.warm_up import static_batches


def test_0_4_a_batch_lasts_as_long_as_its_longest_answer() -> None:
    """Answers of 2, 8, 3, 3 and 5 tokens, two at a time: 8 + 3 + 5 = 16 steps, and 21 of the 32 seats give a token.

    Why: those who are done keep their seats until the longest is done. Stage 2 gives the seats away at once.
    """
    assert static_batches([2, 8, 3, 3, 5], 2) == (16, pytest.approx(21 / 32))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_0_4_steps_are_those_of_a_clock(batch_size: int) -> None:
    """Random lengths, against a loop that plays each step: everybody in the batch writes a token until all are done.

    Why: an oracle that is slow and simple finds what a case by hand does not.
    """
    rng = random.Random(batch_size)
    for count in range(12):
        lengths = [rng.randint(1, 20) for _ in range(count)]
        steps, left = 0, list(lengths)
        while left:
            batch, left = left[:batch_size], left[batch_size:]
            while any(length > 0 for length in batch):
                batch = [length - 1 for length in batch]
                steps += 1
        share = sum(lengths) / (batch_size * steps) if steps else 1.0
        assert static_batches(lengths, batch_size) == (steps, pytest.approx(share))
