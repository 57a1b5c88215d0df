"""What an engine starts with: settings checked and limits resolved before anything is loaded, then KV blocks that fit the
memory.

Settings that exclude each other, the model or the device are refused here and nowhere else. Only what no file says before it is
read comes later: damaged weights, layers without a kernel, a KV cache that is too small.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, fields, replace
from functools import partial

import torch

from ..attention.backends import check_cache, make_backend
from ..attention.block_manager import BlockManager
from ..attention.handover import handover_of
from ..attention.hybrid_manager import blocks_of_one, longest_of_one, make_block_manager, with_one_more
from ..attention.tiered_manager import TieredBlockManager
from ..batching.pooling import ASSUMED, Pooling
from ..batching.queue_order import parse_weights
from ..batching.scheduler_config import SchedulerConfig
from ..memory.cache_engine import element_type, num_blocks_for_budget
from ..memory.tiers.block_rows import BlockRows
from ..memory.transfer.choice import make_any_tier
from ..models.config.model_config import ModelConfig
from ..models.costs import memory as costs
from ..models.generation_files import with_sampling
from ..models.identity import kv_identity
from ..models.kernels.choice import Choice, Way, choose, is_worth_measuring
from ..models.kernels.invariant import NEEDS_CPU_KERNELS
from ..models.loader import ModelSource, check_quantization
from ..parallelism.tensor_parallel import TensorParallel
from ..quantization.layout.float8 import has_float8
from .config import EngineConfig
from .executor import Executor, MultiProcExecutor, UniProcExecutor
from .lora.registry import AdapterRegistry
from .platform import native
from .platform.machine import available_memory, cpu_has_bf16, format_bytes, pick_threads
from .scheduler import Scheduler
from .worker import Worker, pick_device, pick_dtype, use_cpu_kernels

CPU_TOKEN_BUDGET, GPU_TOKEN_BUDGET = 512, 8192
"""Tokens in a step unless the user says otherwise: on a CPU a larger step gains nothing and delays everyone's next token."""
NOT_FOR_ENCODERS = (
    "kv_cache_memory_bytes", "kv_cache_dtype", "touch_kv_cache", "num_gpu_blocks_override", "preemption_mode",
    "long_prefill_token_threshold", "attention_backend", "batch_invariant", "speculative_config", "enable_lora", "kv_offload",
    "kv_transfer_config",
)  # fmt: skip
"""Settings of the KV cache, of prompts in parts, of causal attention and of adapters."""
CPU_KV_SHARE, CPU_KV_MAX = 0.25, 4 << 30


@dataclass(frozen=True, slots=True)
class Limits:
    """What one engine runs with, resolved from its settings once. What is 0 at first is known once the weights are loaded.

    Attributes:
        max_model_len: longest sequence. max_num_batched_tokens: token budget of a step.
        device, dtype: where and in which precision the model runs. cache_dtype: of the KV cache's elements.
        attention_backend: its name. choice: what the layers compute with. windows: blocks behind them are freed, by group.
        num_blocks, num_host_blocks: KV blocks on the device and, for swapping, on the host.
        kv_bytes, weight_bytes, activation_bytes, free_bytes: the sum of the memory; the last is what was free before the
            KV cache was made.
    """

    max_model_len: int
    max_num_batched_tokens: int
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype
    attention_backend: str
    choice: Choice
    windows: tuple[int | None, ...] = ()
    num_blocks: int = 0
    num_host_blocks: int = 0
    kv_bytes: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    free_bytes: int = 0

    def settle(self, config: EngineConfig) -> EngineConfig:
        """The settings with what was resolved in the place of what was left open."""
        return replace(config, max_model_len=self.max_model_len, enable_cpu_kernels=self.choice.way.kernels)


def fit(config: EngineConfig, source: ModelSource) -> tuple[EngineConfig, ModelSource]:
    """Settings and model as they go together: how embeddings are made and tokens are drawn is settled, and an encoder
    computes a text in one step and keeps nothing of it.

    Raises:
        ValueError: a setting is not for this kind of model, or one with JSON is not well written.
    """
    model = with_sampling(source.config, config.generation_config, config.override_generation_config)
    pooling = model.pooling or ASSUMED if config.pooler_config is None else Pooling.parse(config.pooler_config)
    source = replace(source, config=replace(model, pooling=pooling))
    if not model.is_encoder:
        if config.attention_backend == "full":
            raise ValueError("--attention-backend full: a token would see those behind it, which only an encoder may")
        return config, source
    defaults = {each.name: each.default for each in fields(EngineConfig)}
    given = [name for name in NOT_FOR_ENCODERS if getattr(config, name) != defaults[name]]
    if config.scheduling_policy == "lpm":
        given.append("scheduling_policy")
    if given:
        flag = given[0].replace("_", "-")
        raise ValueError(
            f"--{flag} is not for {config.model}, an encoder: it has no KV cache, parts of prompts, drafts or adapters"
        )
    # Blocks are only counted, so there are enough.
    num_blocks = config.max_num_seqs * -(-longest_sequence(config, model) // max(1, config.block_size))
    config = replace(
        config, enable_chunked_prefill=False, enable_prefix_caching=False, attention_backend="full",
        num_gpu_blocks_override=num_blocks,
    )  # fmt: skip
    return config, source


def make_executor(config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Executor:
    """The executor that ``config.distributed_executor_backend`` names."""
    backend = config.distributed_executor_backend or ("uni" if config.tensor_parallel_size == 1 else "mp")
    if backend == "ray":
        from .ray_executor import RayExecutor  # only then: Ray is an extra

        return RayExecutor(config, source, device, dtype)
    kind = UniProcExecutor if backend == "uni" else MultiProcExecutor
    return kind(config, source, device, dtype)


def make_memory(
    config: EngineConfig, limits: Limits, source: ModelSource, worker: Worker
) -> tuple[BlockManager, TieredBlockManager | None]:
    """The block manager, and once more if it has a tier below its prefix cache.

    Raises:
        ValueError: there can be no such tier; see `make_any_tier`.
    """
    windows, sizes = limits.windows, (limits.num_blocks, config.block_size, limits.num_host_blocks)
    if config.kv_offload is None and config.kv_transfer_config is None:
        budget, radix = limits.max_num_batched_tokens, config.prefix_cache == "radix"
        return make_block_manager(windows, *sizes, config.enable_prefix_caching, budget, radix), None
    rows = BlockRows([*worker.cache.kv_caches, *worker.cache.kv_scales])
    identity = partial(
        kv_identity, source, config.load_format == "dummy", config.seed, limits.max_model_len, rows.layout, limits.dtype,
        limits.choice.way, limits.attention_backend, config.quantization, config.batch_invariant,
    )  # fmt: skip
    facts = rows.num_bytes, limits.device.type == "cuda", identity
    tier = make_any_tier(config.kv_offload, config.kv_offload_size, config.kv_transfer_config, *facts)
    worker.tiers = manager = TieredBlockManager(*sizes, windows[0], tier, rows)
    manager.observer = handover_of(manager)
    weakref.finalize(worker, manager.close)
    return manager, manager


def make_adapters(config: EngineConfig, executor: Executor, scheduler: Scheduler) -> AdapterRegistry:
    """The engine's adapters, those of ``config.lora_modules`` loaded.

    Raises:
        ValueError: one of them cannot be loaded.
    """
    there = executor.worker.adapters
    if there is None:
        return AdapterRegistry(0)
    adapters = AdapterRegistry(
        config.max_loras, there.read, executor.load_adapter, lambda: (*scheduler.waiting, *scheduler.running)
    )
    adapters.load_all(config.lora_modules)
    return adapters


def longest_sequence(config: EngineConfig, model: ModelConfig) -> int:
    """The longest sequence in tokens, prompt and output.

    Raises:
        ValueError: the model's context does not reach so far.
    """
    length = config.max_model_len or model.longest
    if not 1 < length <= model.max_context:
        raise ValueError(f"max_model_len must be between 2 and the model's context of {model.max_context}, got {length}")
    return length


def resolve_limits(config: EngineConfig, source: ModelSource) -> Limits:
    """Check the settings and work out what does not depend on the loaded weights.

    Raises:
        ValueError: a setting is out of range, or excludes another one, the model or the device.
    """
    device = pick_device(config.device)
    choice = choose_way(config, source.config, device)
    config, dtype = replace(config, enable_cpu_kernels=choice.way.kernels), getattr(torch, choice.way.dtype)
    max_model_len = longest_sequence(config, source.config)
    if config.block_size < 1:
        raise ValueError(f"block_size must be at least 1, got {config.block_size}")
    budget = config.max_num_batched_tokens or (CPU_TOKEN_BUDGET if device.type == "cpu" else GPU_TOKEN_BUDGET)
    if not config.enable_chunked_prefill and config.max_num_batched_tokens is None:
        budget = max(budget, max_model_len)
    attention = check_settings(config, source, device, dtype)
    return Limits(max_model_len, budget, device, dtype, element_type(config.kv_cache_dtype, dtype), attention, choice)


def choose_way(config: EngineConfig, model: ModelConfig, device: torch.device) -> Choice:
    """What the layers compute with: as the settings say, and on a CPU, where they leave it open, as a measurement says.

    What only the C++ kernels can do is not given up for speed: 8 and 4 bits, also of a draft, batch invariance, an attention
    backend that is asked for by name. Other machines, Ray's, are not measured.
    """
    kernels = use_cpu_kernels(config, device)

    def way(kernels: bool) -> Way:
        return Way(kernels, str(pick_dtype(config.dtype, device, model.torch_dtype, kernels)).removeprefix("torch."))

    if not kernels:
        reason = f": {native.why_not.splitlines()[0]}" if native.why_not else ": the C++ ones are switched off"
        return Choice(way(False), "PyTorch's" + (reason if device.type == "cpu" else ""))
    is_needed = config.quantization or model.quantization or config.batch_invariant or config.speculative_config
    is_told = config.attention_backend == "cpu" or config.distributed_executor_backend == "ray"
    if is_needed or is_told or not is_worth_measuring(model):
        return Choice(way(True), "C++, built for this processor")
    torch.set_num_threads(pick_threads(ranks=config.tensor_parallel_size))
    native.set_threads(torch.get_num_threads())
    ways = [way(True), way(False)]
    if config.dtype == "auto" and not cpu_has_bf16():  # whether widening costs more than memory gives is open
        ways.insert(1, Way(True, "float32" if way(True).dtype == "bfloat16" else "bfloat16"))
    return choose(ways, model)


def check_settings(config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype) -> str:
    """Refuse what excludes itself.

    Returns:
        The name of the attention backend.

    Raises:
        ValueError: the message says what is in the way.
    """
    size, mp = config.tensor_parallel_size, config.distributed_executor_backend != "ray"
    if mp and device.type == "cuda" and torch.cuda.device_count() < size:
        raise ValueError(f"--tensor-parallel-size {size} needs as many GPUs, and {torch.cuda.device_count()} are visible")
    TensorParallel(0, size).heads(source.config)  # says now if the model cannot be cut
    if config.enable_expert_parallel and source.config.mixture is None:
        raise ValueError(f"--enable-expert-parallel: {source.name} has no experts; leave the flag out")
    kernels = use_cpu_kernels(config, device)
    if config.quantization in ("int8", "int4", "gguf") and not kernels:
        switched_off, elsewhere = not config.enable_cpu_kernels, device.type != "cpu"
        reason = "they are switched off" if switched_off else "they run on a CPU" if elsewhere else native.why_not
        raise ValueError(f"--quantization {config.quantization} needs the CPU kernels: {reason}")
    if (flag := config.tier_flag) is not None and len(source.config.windows) > 1:
        raise ValueError(f"{flag}: not with {source.name}, whose layers differ in their window, and so do their blocks")
    if config.prefix_cache == "radix" and source.config.windows != (None,):
        raise ValueError(
            f"--prefix-cache radix: not with {source.name}, which has a sliding window that blocks leave; use hash"
        )
    attention = make_backend(
        config.attention_backend, device, dtype, source.config.head_dim, config.block_size, kernels,
        config.batch_invariant, source.config.attention_kind,
    ).name  # fmt: skip
    if attention == "cuda" and source.config.attention_soft_cap is not None:
        raise ValueError("--attention-backend cuda: the kernel knows no soft caps, which the model has; use triton or torch")
    check_cache(attention, config.kv_cache_dtype, device, source.config.attention_kind)
    float8 = attention == "triton" and not kernels and has_float8(device)
    check_quantization(source, config.load_format, config.quantization, float8)
    if config.batch_invariant:
        if not kernels or (attention != "cpu" and source.config.latent is None):
            raise ValueError(NEEDS_CPU_KERNELS.format(attention))
        if not mp or (size > 1 and config.collective_backend == "ring"):
            raise ValueError(
                "--batch-invariant: not with sums over ranks by gloo, Ray or a ring, which add in an order that depends on "
                "their length"
            )
    return attention


def make_scheduler_config(config: EngineConfig, limits: Limits) -> SchedulerConfig:
    """The scheduler's part of the settings.

    Raises:
        ValueError: a value is out of range or does not fit another one.
    """
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs, max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len, enable_chunked_prefill=config.enable_chunked_prefill,
        long_prefill_token_threshold=config.long_prefill_token_threshold, policy=config.scheduling_policy,
        preemption_mode=config.preemption_mode, max_num_waiting=config.max_num_waiting,
        client_weights={} if config.client_weights is None else parse_weights(config.client_weights),
    )  # fmt: skip


def with_blocks(
    limits: Limits, config: EngineConfig, model: ModelConfig, weight_bytes: int, draft: ModelConfig | None = None
) -> Limits:
    """Work out how many blocks there are, once the weights are loaded. With a `draft` model each block holds its keys too.

    Args:
        model: the part of it that one rank holds.

    Raises:
        ValueError: the KV cache would not hold one sequence of `max_model_len` tokens, or the memory would not hold the cache
            or what is swapped out; the message shows the sum and what fits.
    """
    device = limits.device
    models = [model] if draft is None else [model, draft]
    bytes_per_block = sum(costs.kv_bytes_per_block(config.block_size, each, limits.cache_dtype) for each in models)
    activation_bytes = costs.activation_bytes(model, limits.max_num_batched_tokens, config.max_num_seqs, limits.dtype)
    if config.enable_lora:
        activation_bytes += costs.adapter_bytes(model, config.max_loras * config.max_lora_rank, limits.dtype)
    free_bytes = available_memory() if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]
    num_blocks = config.num_gpu_blocks_override
    if num_blocks is None:
        num_blocks = num_blocks_for_budget(_kv_budget(config, device, free_bytes, activation_bytes), bytes_per_block)
    limits = replace(
        limits, num_blocks=num_blocks,
        num_host_blocks=num_blocks_for_budget(config.swap_space, bytes_per_block) if config.preemption_mode == "swap" else 0,
        kv_bytes=num_blocks * bytes_per_block, weight_bytes=weight_bytes, activation_bytes=activation_bytes,
        free_bytes=free_bytes, windows=model.windows if draft is None else with_one_more(model.windows),
    )  # fmt: skip
    needed = blocks_of_one(limits.windows, limits.max_model_len, config.block_size, limits.max_num_batched_tokens)
    if num_blocks < needed or limits.kv_bytes + activation_bytes > free_bytes:
        raise ValueError(_too_small(limits, config.block_size, bytes_per_block, needed, limits.windows))
    left = available_memory() - (limits.kv_bytes + activation_bytes if device.type == "cpu" else 0)
    if limits.num_host_blocks * bytes_per_block > left:
        raise ValueError(f"--swap-space {format_bytes(config.swap_space)}: only {format_bytes(left)} of host memory are free")
    return limits


def _kv_budget(config: EngineConfig, device: torch.device, free_bytes: int, activation_bytes: int) -> int:
    """Bytes for KV blocks; negative where weights and activations take more than there is."""
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cpu":
        return min(CPU_KV_MAX, int(CPU_KV_SHARE * free_bytes)) // config.tensor_parallel_size  # the ranks share the memory
    total = torch.cuda.mem_get_info(device)[1]
    return int(free_bytes - (1 - config.gpu_memory_utilization) * total) - activation_bytes


def _too_small(limits: Limits, block_size: int, bytes_per_block: int, needed: int, windows: tuple[int | None, ...]) -> str:
    room = min(limits.kv_bytes, max(0, limits.free_bytes - limits.activation_bytes))
    fits = longest_of_one(windows, room // bytes_per_block, block_size, limits.max_num_batched_tokens)
    parts = limits.weight_bytes, limits.activation_bytes, limits.kv_bytes, limits.free_bytes
    sizes = "weights {} (loaded) + activations {} + KV {}, with {} free".format(*map(format_bytes, parts))
    if fits >= limits.max_model_len:
        return f"the KV cache is larger than the memory: {sizes}; give at most --kv-cache-memory-bytes {room >> 20}MiB"
    return (
        f"the KV cache is too small for one sequence of {limits.max_model_len} tokens: {sizes}, leave room for {fits} tokens; "
        f"{f'use --max-model-len {fits} or less, or ' if fits > 1 else ''}give at least --kv-cache-memory-bytes "
        f"{-(-needed * bytes_per_block // 2**20)}MiB"
    )
