"""Break it yourself: your tests of stage 5. ``make break-it STAGE=5`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.serving.metrics import Histogram


def test_a_value_is_counted() -> None:
    """One value in a histogram with one bound."""
    histogram = Histogram("waits", "Seconds.", (1.0,))
    histogram.observe(0.5)
    assert sum(histogram.counts) == 1
