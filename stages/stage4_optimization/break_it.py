"""Break it yourself: your tests of stage 4. ``make break-it STAGE=4`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.memory.prefix_cache import ROOT_HASH, hash_block


def test_a_hash_has_32_bytes() -> None:
    """SHA-256 of a block."""
    assert len(hash_block(ROOT_HASH, [1, 2, 3])) == 32
