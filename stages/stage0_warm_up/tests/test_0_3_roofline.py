"""Task 0.3: the slower of reading and computing decides."""

from __future__ import annotations

import pytest

from stages.stage0_warm_up.warm_up import floor_seconds


@pytest.mark.parametrize(
    ("work", "expected"), [((100.0, 10.0), 10.0), ((100.0, 40_000.0), 40.0), ((0.0, 1_000.0), 1.0), ((50.0, 5_000.0), 5.0)]
)
def test_0_3_the_slower_of_reading_and_computing_decides(work: tuple[float, float], expected: float) -> None:
    """A machine that reads 10 bytes and does 1,000 operations a second: in one case reading decides, in one computing.

    Why: to speed up the one that does not decide gains nothing. Decoding waits for memory, and prompts for arithmetic.
    """
    assert floor_seconds(*work, 10.0, 1_000.0) == pytest.approx(expected)
