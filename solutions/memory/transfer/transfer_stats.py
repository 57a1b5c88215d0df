"""What an engine counts of the KV blocks that it hands to others or fetches from them."""

from __future__ import annotations

from dataclasses import dataclass

from ..tiers.tier import TierStats


@dataclass(slots=True)
class TransferStats(TierStats):
    """A tier's counters, and those of what travels: blocks, bytes, and blocks that nobody has come for in time.

    `num_bytes` and `limit` are of a producer's buffer; `num_skipped` counts blocks for which it had no room; `num_failures`
    transfers that were broken off.
    """

    num_sent: int = 0
    sent_bytes: int = 0
    num_received: int = 0
    received_bytes: int = 0
    num_expired: int = 0
