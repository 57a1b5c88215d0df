"""Break it yourself: your tests of stage 3. ``make break-it STAGE=3`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.parallelism.tensor_parallel import TensorParallel


def test_one_rank_has_all() -> None:
    """A single rank's share of seven is seven."""
    assert len(TensorParallel(0, 1).share(7)) == 7
