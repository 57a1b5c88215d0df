"""The tier that ``--kv-transfer-config`` or ``--kv-offload`` asks for."""

from __future__ import annotations

from collections.abc import Callable

from ..tiers.choice import make_tier
from ..tiers.tier import Tier
from .block_server import BlockServer
from .outbox import Outbox
from .remote_tier import RemoteTier
from .transfer_config import TransferConfig


class ServedOutbox(Outbox):
    """An outbox and the server that hands out what is in it.

    Attributes:
        server: is closed with it.
    """

    def __init__(self, config: TransferConfig, row_bytes: int, identity: bytes) -> None:
        super().__init__(int(config.kv_buffer_size), row_bytes, config.kv_lease_seconds)
        self.server = BlockServer(config.kv_addresses[0], config.kv_connector == "shm", self, identity)

    def close(self, seconds: float) -> None:
        self.server.close()
        super().close(seconds)


def make_any_tier(
    offload: str | None, size: int, transfer: str | None, row_bytes: int, pinned: bool, identity: Callable[[], bytes]
) -> Tier:
    """For a transfer, an outbox for a producer and the producers' blocks for a consumer; else what `make_tier` makes.

    Args:
        offload, size, row_bytes, pinned, identity: see `make_tier`. transfer: see `TransferConfig.parse`; one of them is None.

    Raises:
        ValueError: as `make_tier` does, or a producer's buffer holds no block, or its address cannot be had.
    """
    if transfer is None:
        assert offload is not None
        return make_tier(offload, size, row_bytes, pinned, identity)
    config = TransferConfig.parse(transfer)
    if config.is_producer:
        return ServedOutbox(config, row_bytes, identity())
    return RemoteTier(config.kv_addresses, config.kv_connector == "shm", identity(), row_bytes, pinned)
