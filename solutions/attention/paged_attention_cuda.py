"""Paged attention by hand in CUDA: ``paged_attention_kernel.cu`` on a card, or the same kernel run on a CPU to study it."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ..core.platform import native
from . import cuda_build
from .paged_attention import AttentionBackend, AttentionMetadata

MAX_HEAD_DIM = 128
MIN_SPLIT = 256
"""Fewest keys that a block of a split context has; below, merging costs more than it gains."""

BLOCKS_PER_SM = 4
"""Blocks of threads that one multiprocessor is to have before contexts need no splitting: fewer leave its memory units idle."""

_KERNELS = {torch.float32: "attend_f32", torch.float16: "attend_f16", torch.bfloat16: "attend_bf16"}


class _Step(ctypes.Structure):
    """`Step` of the CUDA file."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("query", "key", "value", "k_cache", "v_cache", "output", "partials")]
        + [(name, ctypes.c_void_p) for name in ("slot_mapping", "block_tables", "query_start_loc", "context_lens")]
        + [(name, ctypes.c_int64) for name in ("query_stride", "kv_stride", "table_stride")]
        + [(name, ctypes.c_int32) for name in ("num_tokens", "num_seqs", "num_heads", "num_kv_heads", "head_dim")]
        + [(name, ctypes.c_int32) for name in ("block_shift", "window", "num_splits", "num_threads")]
        + [("scale", ctypes.c_float)]
    )


def problem(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: int) -> str | None:
    """Why the kernels cannot be used, or None where they can; builds them."""
    if device.type not in ("cuda", "cpu"):
        return f"it runs on a CUDA card, or for study on a CPU, not on {device.type}"
    if dtype not in _KERNELS:
        return f"it has no code for {str(dtype).removeprefix('torch.')}"
    multiple = 16 // dtype.itemsize
    if head_dim % multiple or head_dim > MAX_HEAD_DIM:
        return f"the head size must be a multiple of {multiple} up to {MAX_HEAD_DIM}, the model's is {head_dim}"
    if block_size & (block_size - 1):
        return f"the block size must be a power of two, got {block_size}"
    try:
        cuda_build.load(device)
    except (native.BuildError, OSError) as error:
        return str(error)
    return None


class CudaBackend(AttentionBackend):
    """Two kernels a layer, three where contexts are split; nothing is computed on the host and nobody waits for the device, so
    a CUDA graph can record it. A token of a context length of 0 gets zeros, and one with slot −1 is not stored.

    Args:
        device: where tensors lie. On a CPU the kernel's threads are threads of the operating system: right, and very slow.
        num_splits: parts of each context; 1 is v1, more is v2; None: as many as fill the device.
        num_threads: of a block, a multiple of 32 up to 128; None: 128 on a card, 64 on a CPU.
        library: another build of the kernels.

    Raises:
        BuildError: the kernels cannot be built.
    """

    name = "cuda"
    capturable = True

    def __init__(
        self, device: torch.device | str, num_splits: int | None = None, num_threads: int | None = None,
        library: ctypes.CDLL | None = None,
    ) -> None:  # fmt: skip
        device = torch.device(device)
        self.num_splits = num_splits
        self.on_card = device.type == "cuda"
        self.num_threads = num_threads or (128 if self.on_card else 64)
        self.num_sms = torch.cuda.get_device_properties(device).multi_processor_count if self.on_card else 1
        self._library = library or cuda_build.load(device)
        self._library.error_text.restype = ctypes.c_char_p
        self._partials: list[Tensor] = []

    def plan(self, metadata: AttentionMetadata, sliding_window: int | None) -> None:
        return None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata,
        scale: float, sliding_window: int | None = None, soft_cap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend.attend`; `check_settings` has seen that there is no `soft_cap`.

        Raises:
            ValueError: the cache's dtype is not the model's. RuntimeError: the launch failed; the message is CUDA's.
        """
        cache = metadata.kv_caches[layer]
        if cache.dtype != query.dtype:
            raise ValueError(f"the CUDA kernels need a KV cache of the model's dtype {query.dtype}, got {cache.dtype}")
        query = _vectors(query)
        key, value = _vectors(key), _vectors(value)
        if key.stride(0) != value.stride(0):
            key, value = key.contiguous(), value.contiguous()
        tokens, heads, dim = query.shape
        _, _, block_size, kv_heads, _ = cache.shape
        longest = min(metadata.max_context_len, sliding_window or metadata.max_context_len)
        splits = self.num_splits or choose_splits(tokens * kv_heads, self.num_sms, longest)
        output = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
        step = _Step(
            query=query.data_ptr(), key=key.data_ptr(), value=value.data_ptr(), k_cache=cache[0].data_ptr(),
            v_cache=cache[1].data_ptr(), output=output.data_ptr(), slot_mapping=metadata.slot_mapping.data_ptr(),
            block_tables=metadata.block_tables.data_ptr(), query_start_loc=metadata.query_start_loc.data_ptr(),
            context_lens=metadata.context_lens.data_ptr(), query_stride=query.stride(0), kv_stride=key.stride(0),
            table_stride=metadata.block_tables.stride(0), num_tokens=tokens, num_seqs=len(metadata.context_lens),
            num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, block_shift=block_size.bit_length() - 1,
            window=sliding_window or 0, num_splits=splits, num_threads=self.num_threads, scale=scale,
        )  # fmt: skip
        if splits > 1:
            step.partials = self._room(tokens * heads * splits * (dim + 2), query.device).data_ptr()
        stream = torch.cuda.current_stream(query.device).cuda_stream if self.on_card else None
        kernels = getattr(self._library, _KERNELS[query.dtype])
        if error := kernels(ctypes.byref(step), ctypes.c_void_p(stream)):
            raise RuntimeError(f"the CUDA kernels could not be launched: {self._library.error_text(error).decode()}")
        return output

    def _room(self, size: int, device: torch.device) -> Tensor:
        """Memory for `size` partial results. A CUDA graph that was recorded with a smaller one still writes there, so all are
        kept; each is twice as large as the one before."""
        if not self._partials or self._partials[-1].numel() < size:
            room = max(size, 2 * self._partials[-1].numel()) if self._partials else size
            self._partials.append(torch.empty(room, dtype=torch.float32, device=device))
        return self._partials[-1]


def choose_splits(work: int, num_sms: int, longest: int) -> int:
    """Into how many parts to cut each context: until the device is full, but none shorter than `MIN_SPLIT`.

    Args:
        work: tokens times KV heads. longest: keys that any token may see.
    """
    return max(1, min(num_sms * BLOCKS_PER_SM // work, longest // MIN_SPLIT))


def _vectors(x: Tensor) -> Tensor:
    """x [T, heads, D] as the kernels can load it, 16 bytes at a time: itself, or a copy where it lies otherwise."""
    heads_are_together = x.stride(2) == 1 and x.stride(1) == x.shape[2]
    is_aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if heads_are_together and is_aligned else x.clone(memory_format=torch.contiguous_format)
