"""What an engine starts with: limits resolved from the settings, KV blocks that fit the memory, and a report of both."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..memory.cache_engine import block_bytes, num_blocks_for_budget, scale_bytes
from ..models.config.model_config import ModelConfig
from ..models.loader import ModelSource
from .config import EngineConfig
from .executor import Executor, MultiProcExecutor, UniProcExecutor
from .platform import native
from .platform.machine import available_memory

CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET = 512, 8192
"""Tokens in a step unless the user says otherwise: on a CPU a larger step gains nothing and delays everyone's next token."""
CPU_KV_SHARE, CPU_KV_MAX = 0.25, 4 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes of one engine.

    Attributes:
        max_model_len: longest sequence. max_num_batched_tokens: token budget of a step.
        num_blocks, num_host_blocks: KV blocks on the device and, for swapping, on the host.
        kv_bytes, weight_bytes, activation_bytes, free_bytes: the sum of the memory; the last is what was free before the
            KV cache was made.
    """

    max_model_len: int
    max_num_batched_tokens: int
    num_blocks: int
    num_host_blocks: int
    kv_bytes: int
    weight_bytes: int
    activation_bytes: int
    free_bytes: int


def make_executor(config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Executor:
    """The executor that ``config.distributed_executor_backend`` names."""
    backend = config.distributed_executor_backend or ("uni" if config.tensor_parallel_size == 1 else "mp")
    if backend == "ray":
        from .ray_executor import RayExecutor  # only then: Ray is an extra

        return RayExecutor(config, source, device, dtype)
    kind = UniProcExecutor if backend == "uni" else MultiProcExecutor
    return kind(config, source, device, dtype)


def resolve_limits(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device, weight_bytes: int,
    draft: ModelConfig | None = None,
) -> Limits:  # fmt: skip
    """Work out the sizes once the weights are loaded. With a `draft` model each block holds its keys and values too.

    Raises:
        ValueError: a setting is out of range, or the KV cache would not hold one sequence of `max_model_len` tokens; the
            message shows the sum and the largest `max_model_len` that fits.
    """
    max_model_len = config.max_model_len or model.max_position_embeddings
    if not 1 < max_model_len <= model.max_context:
        raise ValueError(f"max_model_len must be between 2 and the model's context of {model.max_context}, got {max_model_len}")
    if config.block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {config.block_size}")
    budget = config.max_num_batched_tokens or (CPU_TOKEN_BUDGET if device.type == "cpu" else GPU_TOKEN_BUDGET)
    if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
        budget = max(budget, max_model_len)
    bytes_per_block = kv_bytes_per_block(config, model, dtype)
    if draft is not None:
        bytes_per_block += kv_bytes_per_block(config, draft, dtype)
    activation_bytes = _activation_bytes(model, budget, config.max_num_seqs, dtype)
    free_bytes = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = num_blocks_for_budget(_kv_budget(config, device, free_bytes, activation_bytes), bytes_per_block)
    kv_bytes = num_blocks * bytes_per_block
    limits = Limits(
        max_model_len, budget, num_blocks,
        num_blocks_for_budget(config.swap_space, bytes_per_block) if config.preemption_mode == "swap" else 0,
        kv_bytes, weight_bytes, activation_bytes, free_bytes,
    )  # fmt: skip
    if num_blocks * config.block_size < max_model_len or kv_bytes + activation_bytes > free_bytes:
        raise ValueError(_too_small(limits, config.block_size, bytes_per_block))
    return limits


def kv_bytes_per_block(config: EngineConfig, model: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of one block in all layers of a model, scales included."""
    kind = {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[config.kv_cache_dtype]
    sizes = model.num_layers, config.block_size, model.num_kv_heads
    return block_bytes(*sizes, model.head_dim, kind) + scale_bytes(*sizes, kind)


def _kv_budget(config: EngineConfig, device: torch.device, free_bytes: int, activation_bytes: int) -> int:
    """Bytes for KV blocks; negative where weights and activations take more than there is."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cpu":
        return min(CPU_KV_MAX, int(CPU_KV_SHARE * free_bytes)) // config.tensor_parallel_size  # the ranks share the memory
    total = torch.cuda.mem_get_info(device)[1]
    return int(free_bytes - (1 - config.gpu_memory_utilization) * total) - activation_bytes


def _activation_bytes(model: ModelConfig, num_tokens: int, num_seqs: int, dtype: torch.dtype) -> int:
    """What a step needs beside weights and cache: the widest layer's tensors, and logits in the dtype and in float32."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    widest = 3 * model.hidden_size + max(3 * model.intermediate_size, 2 * heads)
    return num_tokens * widest * dtype.itemsize + min(num_seqs, num_tokens) * model.vocab_size * (dtype.itemsize + 4)


def _too_small(limits: Limits, block_size: int, bytes_per_block: int) -> str:
    room = min(limits.kv_bytes, max(0, limits.free_bytes - limits.activation_bytes))
    fits = room // bytes_per_block * block_size
    needed = -(-limits.max_model_len // block_size) * bytes_per_block
    advice = f"use --max-model-len {fits} or less, or " if fits > 1 else ""
    return (
        f"the KV cache is too small for one sequence of {limits.max_model_len} tokens: weights "
        f"{format_bytes(limits.weight_bytes)} (loaded) + activations {format_bytes(limits.activation_bytes)} + KV "
        f"{format_bytes(limits.kv_bytes)}, with {format_bytes(limits.free_bytes)} free, leave room for {fits} tokens; {advice}"
        f"give at least --kv-cache-memory-bytes {-(-needed // 2**20)}MiB"
    )


def format_bytes(count: int) -> str:
    """``1536 MiB`` style, for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def cpu_kernels(config: EngineConfig) -> str:
    """What the layers run on, on a CPU."""
    if not config.enable_cpu_kernels:
        return "PyTorch's: the C++ ones are switched off"
    return "C++, built for this processor" if native.load() else f"PyTorch's: {native.why_not.splitlines()[0]}"


def startup_report(
    config: EngineConfig, limits: Limits, device: torch.device, dtype: torch.dtype, attention: str, seconds: dict[str, float]
) -> list[str]:
    """A few lines for the terminal: what runs where, what fits, how long each phase took."""
    where = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    precision = str(dtype).removeprefix("torch.")
    tokens = limits.num_blocks * config.block_size
    blocks = f"{limits.num_blocks} blocks of {config.block_size} tokens in {format_bytes(limits.kv_bytes)}"
    prefix_cache = "on" if config.enable_prefix_caching else "off"
    kernels = (
        cpu_kernels(config) if device.type == "cpu" else "PyTorch's and Triton's" if attention == "triton" else "PyTorch's"
    )
    step = f"{config.max_num_seqs} sequences and {limits.max_num_batched_tokens} tokens a step"
    return [
        f"model     {config.model}, {precision}, {format_bytes(limits.weight_bytes)} of weights, {where}",
        f"kernels   {kernels}; attention by the {attention} backend",
        f"KV cache  {blocks}: {tokens} tokens, {tokens / limits.max_model_len:.1f} sequences of {limits.max_model_len}",
        f"limits    {step}; prefix cache {prefix_cache}, {config.scheduling_policy}, preemption by {config.preemption_mode}",
        *([f"drafts    {config.speculative_config}"] if config.speculative_config else []),
        "start     " + ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items()),
    ]
