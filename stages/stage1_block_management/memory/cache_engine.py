"""The memory behind the block tables: one tensor a layer holds the keys and values of every block.

Which block belongs to whom is decided elsewhere (`block_allocator`, `block_manager`); here blocks are only sized, copied and
moved to host memory and back. Source: Kwon et al., PagedAttention, SOSP 2023, §4.3 and §4.5 (swapping).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.huge_pages import zeros_in_huge_pages

BlockPairs = list[tuple[int, int]]
"""(source, destination) block numbers."""


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in all layers."""
    # Hint: A token has a key and a value in every layer for every KV head. And a cache whose block and offset axes are
    # flattened into one is indexed by slot.
    raise NotImplementedError("Stage 1 · Task 1.5: block_bytes, see IMPLEMENTATION_GUIDE.md#task-1-5")


def num_blocks_for_budget(
    budget_bytes: int, num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """How many whole blocks fit into `budget_bytes`; 0 if not even one does."""
    raise NotImplementedError("Stage 1 · Task 1.5: num_blocks_for_budget, see IMPLEMENTATION_GUIDE.md#task-1-5")


def write_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store the keys and values of T tokens in one layer's cache.

    Args:
        key, value: [T, H_kv, D].
        kv_cache: [2, num_blocks, block_size, H_kv, D].
        slot_mapping: [T] int64, a different slot for each token: ``block * block_size + offset``.
    """
    raise NotImplementedError("Stage 1 · Task 1.5: write_kv, see IMPLEMENTATION_GUIDE.md#task-1-5")


def move_blocks(source: list[Tensor], target: list[Tensor], pairs: BlockPairs) -> None:
    """Copy whole blocks in every layer. All sources are read before any destination is written.

    Args:
        source, target: for each layer [2, num_blocks, block_size, H_kv, D]; may be the same tensors, or on two devices.
        pairs: (block of `source`, block of `target`).

    Raises:
        ValueError: a destination appears twice.
        IndexError: there is no such block (see `check_blocks`).
    """
    raise NotImplementedError("Stage 1 · Task 1.5: move_blocks, see IMPLEMENTATION_GUIDE.md#task-1-5")


class CacheEngine:
    """Owns the KV cache on the device and, for swapping, a second one on the host.

    Attributes:
        kv_caches: for each layer [2, num_blocks, block_size, H_kv, D]; index 0 holds keys, 1 values.
        host_caches: the same with `num_host_blocks` blocks in host memory, pinned where the device is a GPU; empty if there
            are none.
    """

    def __init__(
        self, num_layers: int, num_blocks: int, block_size: int, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device | str, num_host_blocks: int = 0,
    ) -> None:  # fmt: skip
        """Reserve all memory at once, filled with zeros: a kernel that reads a whole block and masks must not meet NaN.

        Raises:
            ValueError: there is no block, or a negative number of host blocks.
        """
        if num_blocks < 1 or num_host_blocks < 0:
            raise ValueError(f"the KV cache needs at least one block, got {num_blocks} and {num_host_blocks} on the host")
        self.device = torch.device(device)
        layout = (block_size, num_kv_heads, head_dim)
        self.kv_caches = [_zeros((2, num_blocks, *layout), dtype, self.device) for _ in range(num_layers)]
        self.host_caches: list[Tensor] = []
        if num_host_blocks:
            shape = (2, num_host_blocks, *layout)
            pinned = self.device.type == "cuda"  # the GPU copies from and to pinned memory at full speed
            self.host_caches = [
                torch.zeros(shape, dtype=dtype, pin_memory=True) if pinned else _zeros(shape, dtype, torch.device("cpu"))
                for _ in range(num_layers)
            ]

    def copy_blocks(self, pairs: BlockPairs) -> None:
        """Copy blocks within the device (copy-on-write). All sources are read before any destination is written.

        Raises:
            ValueError: a destination appears twice.
            IndexError: there is no such block.
        """
        move_blocks(self.kv_caches, self.kv_caches, pairs)

    def swap_out(self, pairs: BlockPairs) -> None:
        """Copy (device block, host block) pairs to the host; done when it returns. Raises as `copy_blocks` does."""
        move_blocks(self.kv_caches, self.host_caches, pairs)

    def swap_in(self, pairs: BlockPairs) -> None:
        """Copy (host block, device block) pairs back to the device. Raises as `copy_blocks` does."""
        move_blocks(self.host_caches, self.kv_caches, pairs)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return zeros_in_huge_pages(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def check_blocks(blocks: Iterable[int], caches: list[Tensor]) -> None:
    """A wrong index is an error on a CPU but ends the whole process on a GPU, so it is caught here.

    Raises:
        IndexError: names the block that `caches` does not have.
    """
    num_blocks = caches[0].shape[1] if caches else 0
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise IndexError(f"there is no KV block {block}, only 0 to {num_blocks - 1}" if caches else "no host KV blocks")
