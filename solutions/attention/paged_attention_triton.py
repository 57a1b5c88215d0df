"""Paged attention in Triton: chooses tile sizes and splits, and launches the kernels of ``paged_kernels_triton.py``.

Nothing here waits for the device: launches depend on shapes and on the Python numbers of the metadata alone, so a step can be
captured in a CUDA graph.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .paged_attention import AttentionBackend, AttentionMetadata

MAX_HEAD_DIM = 256
"""Larger heads would not leave the registers room for a tile."""

PROGRAMS_PER_SM = 4
"""Programs that a decode is split into at most, for each streaming multiprocessor: some run while others wait for memory."""

LOG2E = math.log2(math.e)

DOT = 16
"""Least rows, columns and depth of a product of tiles."""

MIN_SPLIT = 256
"""Fewest keys that a split is worth starting for; below, merging costs more than it gains."""

MAX_SPLITS = 64
"""Splits of a context, all of which one program of `merge_splits` holds at once."""

SHARED_MEMORY = 96 * 1024
"""Bytes that a program may use: what every card from compute capability 8.0 on has."""

TYPICAL_LEN, TYPICAL_DECODES = 1024, 16
"""The steps on which configurations are compared: a prompt of this length, or so many decodes with such a context."""


@dataclass(frozen=True, slots=True)
class Config:
    """How a tile is computed: rows (queries × heads of a KV head), keys at a time, warps, and loads under way at once."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def shared_memory(self, head_dim: int, query_bytes: int, cache_bytes: int) -> int:
        """Bytes of the queries' tile and of the tiles of keys and values under way, of so many bytes an element."""
        return (self.block_m * query_bytes + 2 * self.block_n * self.num_stages * cache_bytes) * padded(head_dim, DOT)


DECODE_CONFIGS = (Config(16, 32, 2, 2), Config(16, 64, 4, 2), Config(16, 64, 2, 3), Config(16, 128, 4, 2))
PREFILL_CONFIGS = (Config(64, 32, 4, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(128, 32, 4, 3))
INTERPRETER_DECODE_CONFIG = Config(16, 128, 1, 1)
INTERPRETER_PREFILL_CONFIG = Config(64, 64, 1, 1)


def padded(size: int, least: int = 1) -> int:
    """The next power of two, as sizes of tiles have to be; matrix products want at `least` `DOT` of each."""
    return max(least, 1 << (size - 1).bit_length())


def problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernels cannot be used, or None where they can. Any `block_size` is served."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type not in ("cuda", "cpu"):
        return f"it runs on a GPU, or interpreted on a CPU, not on {device.type}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it has no code for {str(dtype).removeprefix('torch.')}"
    if head_dim % 2 or head_dim > MAX_HEAD_DIM:
        return f"the head size must be even and at most {MAX_HEAD_DIM}, the model's is {head_dim}"
    from ..core.platform.triton_mode import is_interpreted

    if device.type == "cpu" and not is_interpreted():
        return "Triton compiles for the GPU here; to interpret its kernels on the CPU set TRITON_INTERPRET=1"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


@cache
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; a CPU counts as one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


class TritonBackend(AttentionBackend):
    """Rotates and writes in one kernel, attends in a second, merges splits in a third where there are any.

    Args:
        num_splits: of every context in a decode; None: as many as keep the device busy.
        config: of every launch; None: on a GPU the fastest of a few, measured once for each kind of step outside of CUDA graph
            capture, and a fixed one under the interpreter.
    """

    name = "triton"
    capturable = True
    decode_configs: tuple[Config, ...] = DECODE_CONFIGS
    prefill_configs: tuple[Config, ...] = PREFILL_CONFIGS

    def __init__(self, num_splits: int | None = None, config: Config | None = None) -> None:
        from . import paged_kernels_triton  # here, because this module is imported where there is no Triton

        self.kernels = paged_kernels_triton
        self.num_splits = num_splits
        self.config = config
        self._fastest: dict[tuple[Any, ...], Config] = {}
        self._partials: dict[tuple[int, int], Tensor] = {}

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> Any:
        """Nothing is worked out ahead: programs find their sequences themselves.

        Raises:
            ValueError: the cache is float8 and the GPU has no such type.
        """
        device = metadata.slot_mapping.device
        is_fp8 = metadata.kv_caches[0].dtype == torch.float8_e4m3fn
        if is_fp8 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
            raise ValueError(
                "an fp8 KV cache needs a GPU of compute capability 8.9 or newer; use --kv-cache-dtype int8 or auto"
            )

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend.attend`. With `metadata.rope`, keys are rotated on their way into the cache, and `query` in
        place; without, both are rotated already or need it not."""
        dim = query.shape[2]
        query, key, value = (x if x.stride(1) == dim and x.stride(2) == 1 else x.contiguous() for x in (query, key, value))
        cache = Cache.of_layer(metadata, layer)
        self._write(query, key, value, cache, metadata)
        return self._attend(query, cache, metadata, scale, sliding_window, soft_cap)

    def _attend(
        self, query: Tensor, cache: Cache, metadata: AttentionMetadata, scale: float, sliding_window: int | None,
        soft_cap: float | None,
    ) -> Tensor:  # fmt: skip
        config = self._choose(query, cache, metadata, scale, sliding_window, soft_cap)
        return self._launch(config, query, cache, metadata, scale, sliding_window, soft_cap)

    def _write(self, query: Tensor, key: Tensor, value: Tensor, cache: Cache, metadata: AttentionMetadata) -> None:
        (tokens, heads, _), dim = query.shape, key.shape[2]
        kv_heads, half = key.shape[1], padded(dim // 2)
        cos, signed_sin = metadata.rope or (None, None)
        self.kernels.write_kv[(tokens, 1 if cos is None else 2)](
            query, key, value, cos, signed_sin, cache.keys, cache.values, cache.key_scales, cache.value_scales,
            metadata.slot_mapping, query.stride(0), key.stride(0), value.stride(0), 0 if cos is None else cos.stride(0),
            H=heads, H_KV=kv_heads, D=dim,
            H_PADDED=padded(heads), H_KV_PADDED=padded(kv_heads), HALF_PADDED=half,
            num_warps=min(16, max(1, padded(heads) * half // 512)),
        )  # fmt: skip

    def _launch(
        self, config: Config, query: Tensor, cache: Cache, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None, soft_cap: float | None,
    ) -> Tensor:  # fmt: skip
        tokens, heads, _ = query.shape
        group, kv_heads, dim, turned = self._shape(config, query, cache)
        output = query.new_empty(tokens, heads, dim)
        block_m = padded(group, config.block_m)
        num_seqs = len(metadata.context_lens)
        num_tiles = tokens // (block_m // group) + num_seqs
        splits = self._splits(tokens * kv_heads, metadata, sliding_window, query.device)
        sums = stats = None
        if splits > 1:
            sums, stats = self._scratch(splits * tokens, heads, group, dim, query.device)
        self.kernels.attend[(num_tiles, kv_heads, splits)](
            query, cache.keys, cache.values, cache.key_scales, cache.value_scales,
            metadata.block_tables, metadata.query_start_loc, metadata.context_lens, output, sums, stats, self.sinks,
            num_seqs, tokens, metadata.block_tables.stride(0), query.stride(0), scale * LOG2E, (soft_cap or 0.0) * LOG2E,
            GROUP=group, H_KV=kv_heads, D=dim, D_PADDED=padded(dim, DOT), BLOCK_SIZE=cache.keys.shape[1],
            WINDOW=sliding_window or 0, CAPPED=soft_cap is not None, BLOCK_M=block_m, BLOCK_N=config.block_n,
            TURNED=turned, TURNED_PADDED=padded(turned, DOT), num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if splits > 1:
            self.kernels.merge_splits[(tokens * heads,)](
                sums, stats, output, splits, tokens * heads, D=dim, D_PADDED=padded(dim), SPLITS_PADDED=padded(splits)
            )
        return output

    def _shape(self, config: Config, query: Tensor, cache: Cache) -> tuple[int, int, int, int]:
        """Query heads that share a KV head, KV heads, elements of a head, and of the turned part behind a latent."""
        kv_heads = cache.keys.shape[2]
        return query.shape[1] // kv_heads, kv_heads, query.shape[2], 0

    def _bytes(self, config: Config, query: Tensor, cache: Cache) -> int:
        """Bytes of shared memory that a program takes."""
        return config.shared_memory(query.shape[2], query.itemsize, cache.keys.itemsize)

    def _splits(self, programs: int, metadata: AttentionMetadata, sliding_window: int | None, device: torch.device) -> int:
        """Splits of each context: a power of two, so that few variants of `merge_splits` are compiled."""
        if metadata.max_query_len > 1:
            return 1
        if self.num_splits is not None:
            return self.num_splits
        keys = min(metadata.max_context_len, sliding_window or metadata.max_context_len)
        splits = min(PROGRAMS_PER_SM * num_sms(device) // programs, keys // MIN_SPLIT, MAX_SPLITS)
        return 1 << (splits.bit_length() - 1) if splits > 1 else 1

    def _scratch(self, rows: int, heads: int, group: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Room for `rows` tokens' partial sums and statistics (see `attend` of the kernels).

        Made once, as large as `_splits` can ever ask for, because CUDA graphs keep its address; only a forced number of splits
        can want more.
        """
        size, most = rows * heads * (dim + 2), PROGRAMS_PER_SM * num_sms(device) * group * (dim + 2)
        buffer = self._partials.get((group, dim))
        if buffer is None or buffer.numel() < size:
            buffer = self._partials[group, dim] = torch.empty(max(size, most), dtype=torch.float32, device=device)
        return buffer[: rows * heads * dim], buffer[rows * heads * dim :]

    def _choose(
        self, query: Tensor, cache: Cache, metadata: AttentionMetadata, scale: float, sliding_window: int | None,
        soft_cap: float | None,
    ) -> Config:  # fmt: skip
        is_decode = metadata.max_query_len == 1
        if self.config is not None:
            return self.config
        if query.device.type == "cpu":
            return INTERPRETER_DECODE_CONFIG if is_decode else INTERPRETER_PREFILL_CONFIG
        candidates = self.decode_configs if is_decode else self.prefill_configs
        fitting = [c for c in candidates if self._bytes(c, query, cache) <= SHARED_MEMORY] or [candidates[0]]
        key = (is_decode, query.shape[1:], query.dtype, cache.keys.shape[1:], cache.keys.dtype, sliding_window, soft_cap)
        if key not in self._fastest:
            if torch.cuda.is_current_stream_capturing():
                return fitting[0]
            self._fastest[key] = self._compare(fitting, is_decode, query, cache, metadata, scale, sliding_window, soft_cap)
        return self._fastest[key]

    def _compare(
        self, candidates: list[Config], is_decode: bool, query: Tensor, cache: Cache, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None, soft_cap: float | None,
    ) -> Config:  # fmt: skip
        """The fastest on a typical step that reads the cache as it is, whatever lies there."""
        from ..core.platform.triton_mode import triton

        step = typical_step(metadata, is_decode, cache.keys.shape[:2], query.device)
        typical = torch.zeros(
            TYPICAL_DECODES if is_decode else TYPICAL_LEN, *query.shape[1:], dtype=query.dtype, device=query.device
        )
        times = [
            triton.testing.do_bench(
                lambda config=config: self._launch(config, typical, cache, step, scale, sliding_window, soft_cap),
                warmup=5,
                rep=20,
            )
            for config in candidates
        ]
        return candidates[times.index(min(times))]


@dataclass(slots=True)
class Cache:
    """One layer's keys and values, [num_blocks, block_size, H_kv, D] each, with their scales if they are int8."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None

    @classmethod
    def of_layer(cls, metadata: AttentionMetadata, layer: int) -> Cache:
        keys, values = metadata.kv_caches[layer]
        scales = (None, None) if metadata.kv_scales is None else metadata.kv_scales[layer]
        return cls(keys, values, *scales)


def typical_step(
    metadata: AttentionMetadata, is_decode: bool, blocks: tuple[int, ...], device: torch.device
) -> AttentionMetadata:
    """A step to compare configurations on; `blocks` is (num_blocks, block_size)."""
    num_blocks, block_size = blocks
    num_seqs, query_len = (TYPICAL_DECODES, 1) if is_decode else (1, TYPICAL_LEN)
    width = -(-TYPICAL_LEN // block_size)
    tables = (torch.arange(num_seqs * width, device=device, dtype=torch.int32) % num_blocks).view(num_seqs, width)
    return AttentionMetadata(
        kv_caches=metadata.kv_caches,
        slot_mapping=metadata.slot_mapping,
        block_tables=tables,
        query_start_loc=torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * query_len,
        context_lens=torch.full((num_seqs,), TYPICAL_LEN, device=device, dtype=torch.int32),
        max_query_len=query_len,
        max_context_len=TYPICAL_LEN,
        backend=metadata.backend,
    )
