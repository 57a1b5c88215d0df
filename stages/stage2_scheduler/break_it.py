"""Break it yourself: your tests of stage 2. ``make break-it STAGE=2`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.batching.sampling_params import SamplingParams
from stages.batching.sequence import Sequence


def test_a_new_sequence_has_its_prompt_to_compute() -> None:
    """Three tokens are known and none is computed."""
    assert Sequence(0, [5, 6, 7], SamplingParams()).num_uncomputed_tokens == 3
