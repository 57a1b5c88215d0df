"""Break it yourself: your tests of stage 6. ``make break-it STAGE=6`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.benchmarks.latency import Stream


def test_the_first_token_is_timed_from_the_start() -> None:
    """Asked at 1, first token at 1.5."""
    assert Stream(1.0, [1.5, 2.0], 2).ttft == 0.5
