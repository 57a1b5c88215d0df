"""One device's share of the engine: the model, its KV cache and the sampler, driven by flat batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from ..attention.backends import make_backend
from ..attention.paged_attention import attention_metadata
from ..attention.tiered_manager import TieredBlockManager
from ..batching.continuous_batch import FlatBatch
from ..batching.scheduler_output import BlockPairs
from ..batching.sequence import Sequence
from ..batching.step_arrays import FlatArrays, HostArrays, StepArrays
from ..batching.tree_rows import enter_trees, has_trees
from ..batching.wanted_rows import pool, prompt_spans, sampling_rows
from ..memory.cache_engine import CacheEngine, element_type
from ..models.config.model_config import ModelConfig
from ..models.kernels.attach import Plan, attach
from ..models.kernels.invariant import make_invariant
from ..models.loader import ModelSource, load_model
from ..models.lora.attach import ModelAdapters
from ..parallelism.tensor_parallel import SINGLE, TensorParallel
from .capture import replay_adapted_steps, replay_layers
from .config import EngineConfig
from .graphs.decode_graphs import CudaGraphRecorder, DecodeGraphs, Step, graph_sizes
from .overlap.lookahead import Lookahead, Meanwhile, known_ids
from .platform import native
from .platform.machine import cpu_flags, cpu_has_bf16, pick_threads
from .platform.transfer import to_device
from .sampling.rejection_sampler import verify
from .sampling.sampler import Sampler, TokenLogprobs
from .sampling.tree_verifier import verify_trees

_ARRAYS = [each.name for each in fields(FlatArrays)]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(slots=True)
class StepResult:
    """What a step produced.

    Attributes:
        token_ids: the new tokens of each of ``batch.sampled``: one, or the accepted ones of its draft and one more.
        logprobs: one entry a new token, for the sequences whose request wants them.
        prompt_logprobs: (request_id, position of the first entry, one entry a position) for prompts that asked for it.
    """

    token_ids: list[list[int]]
    logprobs: dict[Sequence, list[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: list[tuple[str, int, list[TokenLogprobs]]] = field(default_factory=list)


def pick_device(name: str) -> torch.device:
    """The device to run on; "auto" is a GPU where there is one.

    Raises:
        ValueError: a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to PyTorch here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device, model_dtype: str | None, cpu_kernels: bool = False) -> torch.dtype:
    """The precision to run in; "auto" is bfloat16 where the processor multiplies it natively, or has AVX2 and the C++ kernels,
    which read half of float32's bytes and widen them at no loss of speed; else float32 on a CPU and the checkpoint's own
    16-bit type on a GPU.

    Args:
        cpu_kernels: whether layers run on the C++ kernels; PyTorch's operators are slow in bfloat16 without its instructions.

    Raises:
        ValueError: float16 on a CPU.
    """
    if name == "float16" and device.type == "cpu":
        raise ValueError("--dtype float16 needs a GPU; use bfloat16 or float32 on a CPU")
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cpu":
        widens = cpu_kernels and "avx2" in cpu_flags()
        return torch.bfloat16 if widens or cpu_has_bf16() else torch.float32
    return torch.float16 if model_dtype == "float16" else torch.bfloat16


def use_cpu_kernels(config: EngineConfig, device: torch.device) -> bool:
    """Whether the model's layers run on the C++ kernels: on a CPU where they are built and wanted."""
    return config.enable_cpu_kernels and device.type == "cpu" and native.load() is not None


def plan_for(config: EngineConfig, model: ModelConfig, cpu_kernels: bool, attention: str) -> Plan:
    """What the model's layers compute with; `attention` is the backend's name."""
    quantization = config.quantization if model.quantization is None else None  # else the flag says what the checkpoint is
    return Plan("cpu" if cpu_kernels else "triton" if attention == "triton" else None, quantization)


class Worker:
    """Loads the model, owns the KV cache, executes steps.

    Args:
        config: the engine's settings, as `startup.resolve_limits` has checked them, with the longest sequence in it.
        source: the model, as `resolve_model` found it.
        device, dtype: where and in which precision to run.
        parallel: the ranks that share the model, of which this worker is one.
        threads: for the model on a CPU; default: what `pick_threads` gives one of so many ranks on this machine.

    Attributes:
        ahead: begins steps before they are executed; None: nothing does.
        listener: is given each batch and its hidden states [T, hidden], which the next step overwrites; None: nobody is.
        tiers: moves blocks to and from the tier below the prefix cache; None: there is none.
    """

    def __init__(
        self, config: EngineConfig, source: ModelSource, device: torch.device, dtype: torch.dtype,
        parallel: TensorParallel = SINGLE, threads: int | None = None,
    ) -> None:  # fmt: skip
        self.device, self.dtype = device, dtype
        if device.type == "cpu":  # PyTorch's own choice ignores the quota of a container, and other ranks
            torch.set_num_threads(threads or pick_threads(ranks=parallel.size))
        self.model_config = source.config
        self.parallel = parallel = replace(parallel, whole_experts=config.enable_expert_parallel)
        self.num_kv_heads = len(parallel.heads(source.config)[1])
        cpu_kernels = use_cpu_kernels(config, device)
        if cpu_kernels:
            native.set_threads(torch.get_num_threads())
        self.backend = make_backend(
            config.attention_backend, device, dtype, source.config.head_dim, config.block_size,
            cpu_kernels, config.batch_invariant, source.config.attention_kind,
        )  # fmt: skip
        path = None if config.load_format == "dummy" else source.path
        served = replace(source, path=path, config=replace(source.config, max_model_len=config.max_model_len))
        self.model = load_model(served, dtype, device, parallel, seed=config.seed)
        plan = plan_for(config, source.config, cpu_kernels, self.backend.name)
        attach(self.model, plan)
        if config.batch_invariant:
            make_invariant(self.model, self.backend)
        if self.backend.name == "cpu" and not config.enforce_eager:
            replay_layers(self.model, parallel)
        self.adapters: ModelAdapters | None = None
        if config.enable_lora:
            sizes = source.config.hidden_size, config.max_loras, config.max_lora_rank
            self.adapters = ModelAdapters(self.model, *sizes, plan.kernels)
            replay_adapted_steps(self.model, self.adapters.step)
        self.sampler = Sampler(source.config.vocab_size, config.seed)
        self.config = config
        self.cache: CacheEngine  # from `create_cache` on
        self.graphs: DecodeGraphs | None = None
        self.ahead: Lookahead[Tensor, StepResult] | None = None
        self.listener: Callable[[FlatBatch, Tensor], None] | None = None
        self.tiers: TieredBlockManager | None = None

    @property
    def weight_bytes(self) -> int:
        """Memory that the parameters take; what several share counts once."""
        storages = (parameter.untyped_storage() for parameter in self.model.parameters())
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def create_cache(self, num_blocks: int, block_size: int, num_host_blocks: int) -> None:
        """Set up the KV cache."""
        model = self.model_config
        self.cache = CacheEngine(
            model.num_cached_layers, num_blocks, block_size, self.num_kv_heads, model.head_dim,
            element_type(self.config.kv_cache_dtype, self.dtype), self.device, num_host_blocks,
        )  # fmt: skip
        if self.config.touch_kv_cache:
            for kv_cache in (*self.cache.kv_caches, *self.cache.kv_scales):
                kv_cache.zero_()  # zero already, but the system provides memory only when it is written
        if self.device.type == "cuda" and self.backend.capturable and not self.config.enforce_eager:
            self.capture_graphs(graph_sizes(self.config.max_num_seqs), CudaGraphRecorder())

    @torch.inference_mode()
    def capture_graphs(self, sizes: list[int], record: Callable[[Step], Step]) -> None:
        """Record decode steps of these batch sizes, to be replayed from now on."""
        longest, windows = self.config.max_model_len, self.model_config.windows
        assert longest is not None  # `resolve_limits` has set it
        self.graphs = DecodeGraphs(
            self.model, self.backend, self.cache.kv_caches, sizes, longest, self.config.block_size, windows, record,
            self.cache.kv_scales or None,
        )  # fmt: skip

    def execute(self, batch: FlatBatch) -> StepResult:
        """Move blocks, run the model over the batch, sample."""
        return self.finish(batch, self.begin(batch)) if self.ahead is None else self.ahead.execute(batch)

    @torch.inference_mode()
    def begin(self, batch: FlatBatch, tokens: Tensor | None = None) -> Tensor:
        """Move blocks and run the model: hidden states [T, hidden]. For `tokens` see `Device.begin`."""
        decision = batch.decision
        self.move_blocks(decision.swap_out, decision.swap_in, decision.copies)
        hidden = self.forward(batch, tokens, enter_trees(batch))
        if self.listener is not None:
            self.listener(batch, hidden)
        return hidden

    @torch.inference_mode()
    def finish(self, batch: FlatBatch, hidden: Tensor, meanwhile: Meanwhile | None = None) -> StepResult:
        """Sample from what `begin` gave, which it does not need any more when it calls `meanwhile`."""
        prompt_logprobs = self._prompt_logprobs(batch, hidden)
        pool(batch, hidden)
        if not batch.sampled:
            return StepResult([], {}, prompt_logprobs)
        rows = sampling_rows(batch)
        if len(rows) < len(hidden):
            hidden = hidden[to_device(rows, torch.int64, self.device)]
        logits = self.model.compute_logits(hidden)
        if has_trees(batch):
            return StepResult(*verify_trees(self.sampler, logits, batch, self.cache), prompt_logprobs)
        if drafts := batch.decision.drafts:
            return StepResult(*verify(self.sampler, logits, batch.sampled, drafts), prompt_logprobs)
        sampled = self.sampler(logits, batch.sampled, meanwhile)
        entries = zip(batch.sampled, sampled.logprobs, strict=True)
        logprobs = {seq: [entry] for seq, entry in entries if entry is not None}
        return StepResult([[token] for token in sampled.token_ids], logprobs, prompt_logprobs)

    @torch.inference_mode()
    def execute_without_sampling(self, step: StepArrays) -> None:
        """Do on another rank what rank 0 does in `execute`, up to the logits: every sum over the ranks needs this one's
        part."""
        # Hint: Walk through Worker.execute and mark each line that talks to other ranks or changes the KV cache: the
        # others must do those, in that order, and need nothing else.
        raise NotImplementedError(
            "Stage 3 · Task 3.8: Worker.execute_without_sampling, see stages/stage3_parallelism/GUIDE.md#task-3-8"
        )

    def move_blocks(self, swap_out: BlockPairs, swap_in: BlockPairs, copies: BlockPairs) -> None:
        """Copy KV blocks as the scheduler has decided, before a step runs."""
        # A block given up by one move may be the target of the next, so the order matters.
        if self.tiers is not None:
            self.tiers.move_tiers()
        self.cache.swap_out(swap_out)
        self.cache.swap_in(swap_in)
        self.cache.copy_blocks(copies)

    def forward(self, batch: HostArrays, tokens: Tensor | None = None, hidden_keys: Tensor | None = None) -> Tensor:
        """Hidden states of all tokens, [T, hidden]. Nothing here waits for the work that is queued on a device."""
        if self.adapters is not None:
            self.adapters.begin(batch.adapters)
        if self.graphs is not None and (size := self.graphs.size_for(batch)) is not None:
            return self.graphs.run(batch, size) if tokens is None else self.graphs.run(batch, size, tokens)
        arrays = (torch.from_numpy(getattr(batch, name)) for name in _ARRAYS)
        step = FlatArrays(*(to_device(array, array.dtype, self.device) for array in arrays))
        if tokens is not None:
            step.input_ids = known_ids(step.input_ids, tokens)
        longest = int((batch.query_start_loc[1:] - batch.query_start_loc[:-1]).max()), int(batch.context_lens.max())
        metadata = attention_metadata(
            step, longest, self.cache.kv_caches, self.cache.kv_scales or None, self.backend, self.model_config.windows,
            hidden_keys,
        )  # fmt: skip
        hidden: Tensor = self.model(step.input_ids, step.positions, metadata)
        self.parallel.check()
        return hidden

    def _prompt_logprobs(self, batch: FlatBatch, hidden: Tensor) -> list[tuple[str, int, list[TokenLogprobs]]]:
        """Log-probabilities of the prompt tokens in this step, for the sequences whose request wants them."""
        results = []
        for span in prompt_spans(batch):
            logits = self.model.compute_logits(hidden[span.first : span.first + len(span.targets)])
            target_ids = torch.tensor(span.targets, device=self.device)
            entries = self.sampler.prompt_logprobs(logits, target_ids, span.num_likeliest)
            results.append((span.seq.request_id, span.position, entries))
        return results
