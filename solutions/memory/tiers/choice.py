"""The tier that ``--kv-offload`` names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ...core.platform.machine import available_memory, format_bytes
from .file_tier import FileTier
from .host_tier import HostTier
from .tier import Tier


def make_tier(where: str, size: int, row_bytes: int, pinned: bool, identity: Callable[[], bytes]) -> Tier:
    """A tier of at most `size` bytes.

    Args:
        where: "host", or a folder. row_bytes: of a block. pinned: the device is a GPU. identity: see `FileTier`; it takes a
            while, and host memory, which ends with the process, needs none.

    Raises:
        ValueError: the size holds no block or exceeds the memory, or there is no folder and none can be made.
    """
    if where != "host":
        return FileTier(Path(where).expanduser(), identity(), size, row_bytes, pinned)
    free = available_memory()
    if size > free:
        raise ValueError(f"--kv-offload-size {format_bytes(size)}: only {format_bytes(free)} of host memory are free")
    return HostTier(size, row_bytes, pinned)
