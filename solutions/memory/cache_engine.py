"""The memory behind the block tables: one tensor a layer holds the keys and values of every block.

Which block belongs to whom is decided elsewhere (`block_allocator`, `block_manager`); here blocks are only sized, copied and
moved to host memory and back. Source: Kwon et al., PagedAttention, SOSP 2023, §4.3 and §4.5 (swapping).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..batching.scheduler_output import BlockPairs
from ..core.platform.huge_pages import zeros_in_huge_pages


def element_type(kv_cache_dtype: str, dtype: torch.dtype) -> torch.dtype:
    """The type of the KV cache's elements, as ``--kv-cache-dtype`` names it; `dtype` is the model's."""
    return {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kv_cache_dtype]


def block_bytes(num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of `block_size` tokens in all layers. Types of whole numbers count as any others."""
    return 2 * num_layers * block_size * num_kv_heads * head_dim * dtype.itemsize


def num_blocks_for_budget(budget_bytes: int, bytes_per_block: int) -> int:
    """How many whole blocks of so many bytes fit into a budget; 0 if not even one does, or the budget is negative."""
    return max(0, budget_bytes // bytes_per_block)


def write_kv(key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
    """Store the keys and values of T tokens in one layer's cache, and change nothing else. The number of tensor operations does
    not grow with T.

    Args:
        key, value: [T, H_kv, D].
        kv_cache: [2, num_blocks, block_size, H_kv, D].
        slot_mapping: [T] int64, a different slot for each token: ``block * block_size + offset``.
    """
    slots = kv_cache.flatten(1, 2)  # [2, num_slots, H_kv, D]
    slots[0].index_copy_(0, slot_mapping, key)
    slots[1].index_copy_(0, slot_mapping, value)


def scale_bytes(num_layers: int, block_size: int, num_kv_heads: int, dtype: torch.dtype) -> int:
    """What the scales of a block take beside `block_bytes`: two bytes for each vector of an int8 cache."""
    return 2 * num_layers * block_size * num_kv_heads * 2 if dtype == torch.int8 else 0


def move_blocks(source: list[Tensor], target: list[Tensor], pairs: BlockPairs) -> None:
    """Copy whole blocks in every layer, and change nothing else. All sources are read before any destination is written, into
    memory for these blocks: there is no room for a second cache.

    Args:
        source, target: for each layer [2, num_blocks, block_size, H_kv, D]; may be the same tensors, or on two devices.
        pairs: (block of `source`, block of `target`).

    Raises:
        ValueError: a destination appears twice.
        IndexError: there is no such block (see `check_blocks`).
    """
    if not pairs:
        return
    sources, targets = zip(*pairs, strict=True)
    if len(set(targets)) < len(targets):
        raise ValueError(f"a block is the destination of two copies: {pairs}")
    check_blocks(sources, source)
    check_blocks(targets, target)
    read = torch.tensor(sources, device=source[0].device)
    write = torch.tensor(targets, device=target[0].device)
    for source_layer, target_layer in zip(source, target, strict=True):
        blocks = source_layer.index_select(1, read)  # [2, len(pairs), block_size, H_kv, D]
        target_layer.index_copy_(1, write, blocks.to(target_layer.device))


class CacheEngine:
    """Owns the KV cache on the device and, for swapping, a second one on the host.

    Attributes:
        kv_caches: for each layer [2, num_blocks, block_size, H_kv, D]; index 0 holds keys, 1 values.
        kv_scales: of an int8 cache, for each layer [2, num_blocks, block_size, H_kv] float16; else empty.
        host_caches: the same as `kv_caches` with `num_host_blocks` blocks in host memory, pinned where the device is a GPU;
            empty if there are none. host_scales: likewise.
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
        quantized = dtype == torch.int8
        self.kv_caches = [_zeros((2, num_blocks, *layout), dtype, self.device) for _ in range(num_layers)]
        self.kv_scales = [
            _zeros((2, num_blocks, *layout[:2]), torch.float16, self.device) for _ in range(num_layers * quantized)
        ]
        self.host_caches: list[Tensor] = []
        self.host_scales: list[Tensor] = []
        if num_host_blocks:
            pinned = self.device.type == "cuda"  # the GPU copies from and to pinned memory at full speed
            self.host_caches = [_host_zeros((2, num_host_blocks, *layout), dtype, pinned) for _ in self.kv_caches]
            self.host_scales = [_host_zeros((2, num_host_blocks, *layout[:2]), torch.float16, pinned) for _ in self.kv_scales]

    def copy_blocks(self, pairs: BlockPairs) -> None:
        """Copy blocks within the device (copy-on-write). All sources are read before any destination is written.

        Raises:
            ValueError: a destination appears twice.
            IndexError: there is no such block.
        """
        self._move(self.kv_caches, self.kv_caches, self.kv_scales, self.kv_scales, pairs)

    def swap_out(self, pairs: BlockPairs) -> None:
        """Copy (device block, host block) pairs to the host; done when it returns. Raises as `copy_blocks` does."""
        self._move(self.kv_caches, self.host_caches, self.kv_scales, self.host_scales, pairs)

    def swap_in(self, pairs: BlockPairs) -> None:
        """Copy (host block, device block) pairs back to the device. Raises as `copy_blocks` does."""
        self._move(self.host_caches, self.kv_caches, self.host_scales, self.kv_scales, pairs)

    @staticmethod
    def _move(source: list[Tensor], target: list[Tensor], scales: list[Tensor], to: list[Tensor], pairs: BlockPairs) -> None:
        move_blocks(source, target, pairs)
        if scales:
            move_blocks(scales, to, pairs)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return zeros_in_huge_pages(shape, dtype) if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


def _host_zeros(shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> Tensor:
    return torch.zeros(shape, dtype=dtype, pin_memory=True) if pinned else _zeros(shape, dtype, torch.device("cpu"))


def check_blocks(blocks: Iterable[int], caches: list[Tensor]) -> None:
    """A wrong index is an error on a CPU but ends the whole process on a GPU, so it is caught here.

    Raises:
        IndexError: names the block that `caches` does not have.
    """
    num_blocks = caches[0].shape[1] if caches else 0
    for block in blocks:
        if not 0 <= block < num_blocks:
            raise IndexError(f"there is no KV block {block}, only 0 to {num_blocks - 1}" if caches else "no host KV blocks")
