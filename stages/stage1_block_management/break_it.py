"""Break it yourself: your tests of stage 1. ``make break-it STAGE=1`` tries them on versions that you have not seen.

They must pass on every right version, however unusual, and some must fail on each wrong one. See IMPLEMENTATION_GUIDE.md.
"""

from __future__ import annotations

from stages.memory.block_allocator import BlockAllocator


def test_a_new_allocator_has_all_its_blocks() -> None:
    """Four blocks, and nobody holds one."""
    assert BlockAllocator(4).num_free == 4
