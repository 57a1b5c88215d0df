"""Steps without Python: what a function of the model does is recorded once, and done again by one call.

A step is some hundred kernels of a few microseconds each, and calling them from Python takes nearly as long as running them, or
leaves a card waiting. A recording holds the calls with all their arguments, so only what these point to may change. Hence the
buffers here: each step's inputs are copied to where the recording reads them. `--enforce-eager` switches all of this off.

On a GPU whole decode steps become CUDA graphs, one for each of some batch sizes. A batch that has no graph of its size runs in
the next larger one, filled up with padding: sequences whose context length is 0 and whose tokens have no slot. Graphs are
captured at start, the largest batch first: all share one pool of memory, in which the smaller ones then find room. With several
ranks every rank captures the same sizes in the same order, after a step outside of capture that sets up NCCL's connections;
inside, collectives are captured like any kernel.

On a CPU the layers between embedding and head are recorded when the first step comes, if all their operations are native
kernels. One recording serves any number of tokens up to its buffers' size, prompts too.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, fields
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..attention.paged_attention import AttentionBackend, AttentionMetadata, attention_metadata
from ..attention.paged_attention_cpu import Plan, new_step
from ..batching.step_arrays import FlatArrays, HostArrays
from ..models.kernels.attach import is_native, put
from ..models.layers import Attention, CausalLM
from ..models.llama import LlamaForCausalLM
from ..models.lora.products import AdaptersOfStep
from ..parallelism.linear import WeightLayer
from ..parallelism.tensor_parallel import TensorParallel
from .overlap.lookahead import known_ids
from .platform.native import Recording
from .platform.transfer import put_into

MAX_BATCH = 256
"""Largest batch that is captured. Beyond it the card's work takes so much longer than the launches that they hide behind it."""

PADDING_SLOT = -1

MIN_ROWS = 64
"""Fewest tokens that a CPU's recording has room for; one that needs more is made anew, with room for the next power of two."""

Step = Callable[[], Tensor]
"""Runs a step on the buffers as they are; returns hidden states [size, hidden] that the next call overwrites."""


Inputs = TypeVar("Inputs")


class Capture(abc.ABC, Generic[Inputs]):
    """Recordings of a function of the model, which takes a step's inputs and returns hidden states [T, hidden]."""

    @abc.abstractmethod
    def size_for(self, inputs: Inputs) -> int | None:
        """Rows of the recording that these inputs fit; None: they fit none, and the function itself must run."""
        ...

    @abc.abstractmethod
    def run(self, inputs: Inputs, size: int) -> Tensor:
        """Copy the inputs to where the recording of this size reads them, and replay it: hidden states [T, hidden], which the
        next step overwrites."""
        ...


# On a GPU


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes to capture, ascending: 1, 2, 4, then every multiple of 8, up to `max_num_seqs` or `MAX_BATCH`."""
    largest = min(max_num_seqs, MAX_BATCH)
    sizes = [size for size in (1, 2, 4, *range(8, largest + 1, 8)) if size <= largest]
    return sizes if sizes[-1] == largest else [*sizes, largest]


class CudaGraphRecorder:
    """Turns a step into a graph. One of them serves all sizes, so that they share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Run `step` twice outside (kernels are compiled and tuned, libraries take their workspace), then capture it."""
        side = torch.cuda.Stream()  # capturing needs a stream of its own, and so does what precedes it
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            hidden = step()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


class DecodeGraphs(Capture[HostArrays]):
    """Runs decode steps through steps recorded for some batch sizes.

    Args:
        model: whose `forward` is recorded. backend: its attention; must be `capturable`.
        kv_caches, kv_scales: for each layer, as in `AttentionMetadata`.
        sizes: of the batches, ascending. max_model_len, block_size: how long a sequence and its block table can get.
        windows: of each group of layers.
        record: turns a step into its recording; `CudaGraphRecorder()` on a card.
    """

    def __init__(
        self, model: CausalLM, backend: AttentionBackend, kv_caches: list[Tensor], sizes: list[int], max_model_len: int,
        block_size: int, windows: Many[int | None], record: Callable[[Step], Step], kv_scales: list[Tensor] | None = None,
    ) -> None:  # fmt: skip
        device, largest, groups = kv_caches[0].device, sizes[-1], (len(windows),) if len(windows) > 1 else ()
        self.sizes = sizes
        # a step's inputs where the graphs read them; rows past a step's sequences are padding
        self._buffers = FlatArrays(
            slot_mapping=torch.full((*groups, largest), PADDING_SLOT, dtype=torch.int64, device=device),
            block_tables=torch.zeros((*groups, largest, -(-max_model_len // block_size)), dtype=torch.int32, device=device),
            query_start_loc=torch.arange(largest + 1, dtype=torch.int32, device=device),  # one token each: it never changes
            context_lens=torch.zeros(largest, dtype=torch.int32, device=device),
            input_ids=torch.zeros(largest, dtype=torch.int64, device=device),
            positions=torch.zeros(largest, dtype=torch.int64, device=device),
            adapters=torch.empty(0, dtype=torch.int64, device=device),  # steps with adapters are not recorded
        )
        self._steps: dict[int, Step] = {}
        for size in reversed(sizes):
            step = self._views(size)
            metadata = attention_metadata(step, (1, max_model_len), kv_caches, kv_scales, backend, windows)
            self._steps[size] = record(partial(model, step.input_ids, step.positions, metadata))

    def _views(self, size: int) -> FlatArrays[Tensor, Tensor]:
        """The buffers as a step of this size."""
        rows = {each.name: size for each in fields(FlatArrays)} | {"query_start_loc": size + 1}
        views = {name: getattr(self._buffers, name)[:count] for name, count in rows.items()}
        views["slot_mapping"] = self._buffers.slot_mapping[..., :size]
        return FlatArrays(**views | {"block_tables": self._buffers.block_tables[..., :size, :]})

    def size_for(self, batch: HostArrays) -> int | None:
        """The recorded size that `batch` runs in, or None: it is too large, more than decoding, or has adapters."""
        count = len(batch.context_lens)
        if len(batch.input_ids) != count or batch.adapters.any():
            return None
        return next((size for size in self.sizes if size >= count), None)

    def run(self, batch: HostArrays, size: int, tokens: Tensor | None = None) -> Tensor:
        """Hidden states [T, hidden] of a step for which `size_for` gave `size`; the next step overwrites them. For `tokens` see
        `Device.begin`."""
        of, count, width = self._buffers, len(batch.input_ids), batch.block_tables.shape[-1]
        for buffer, array in (
            (of.input_ids[:count], batch.input_ids), (of.positions[:count], batch.positions),
            (of.slot_mapping[..., :count], batch.slot_mapping), (of.block_tables[..., :count, :width], batch.block_tables),
            (of.context_lens[:count], batch.context_lens),
        ):  # fmt: skip
            put_into(buffer, array)
        if tokens is not None:
            of.input_ids[:count] = known_ids(of.input_ids[:count], tokens)
        of.slot_mapping[..., count:size] = PADDING_SLOT
        of.context_lens[count:size] = 0
        return self._steps[size]()[:count]


# On a CPU


LayerInputs = tuple[Tensor, tuple[Tensor, Tensor], AttentionMetadata]


class LayerReplay(Capture[LayerInputs]):
    """Stands in the place of a function that runs a model's layers, every operation of which is a native kernel.

    Args:
        run_layers: takes hidden states [T, hidden], (cos, signed sin) [T, 1, D] and the step's metadata; returns [T, hidden].
        attention: any of the layers' attention, for the sizes that all share.

    Attributes:
        recording: of the last step, if any. num_recordings: made so far.
    """

    def __init__(self, run_layers: Callable[..., Tensor], attention: Attention, hidden_size: int, dtype: torch.dtype) -> None:
        self._run_layers = run_layers
        self._attention = attention
        self._step = new_step()
        self._hidden = torch.empty(0, hidden_size, dtype=dtype)
        self._rope = torch.empty(2, 0, 1, attention.head_dim, dtype=dtype)
        self._out = self._hidden
        self._plan: Plan | None = None
        self.recording: Recording | None = None
        self._kv_caches: list[Tensor] = []
        self.num_recordings = 0

    def twin(self) -> LayerReplay:
        """Another one of the same function, without a recording yet."""
        return LayerReplay(self._run_layers, self._attention, self._hidden.shape[1], self._hidden.dtype)

    def __call__(self, *inputs: *LayerInputs) -> Tensor:
        """What `run_layers` returns."""
        return self.run(inputs, self.size_for(inputs))

    def size_for(self, inputs: LayerInputs) -> int:
        """As many rows as there are: a recording has room for more, and `run` makes one that has."""
        return len(inputs[0])

    def run(self, inputs: LayerInputs, size: int) -> Tensor:
        hidden, rope, metadata = inputs
        if self.recording is None or size > self.recording.max_rows:
            self._make_room(size)
        elif metadata.kv_caches is not self._kv_caches:
            self.recording = None  # it holds the addresses of the cache that it was made with
        self._hidden[:size] = hidden
        self._rope[0, :size], self._rope[1, :size] = rope
        self._plan = metadata.plan  # its arrays are what the step points to
        self._plan.complete(self._attention.num_heads, self._attention.scale, self._attention.soft_cap)
        self._plan.move_to(self._step)
        if self.recording is None:
            self._record(size, metadata)
        else:
            self.recording.replay(size)
        return self._out[:size]

    def _make_room(self, count: int) -> None:
        """Take larger buffers; a recording that reads from the old ones is of no use any more."""
        self.recording = None
        rows = max(MIN_ROWS, 1 << (count - 1).bit_length())
        self._hidden = self._hidden.new_empty(rows, self._hidden.shape[1])
        self._rope = self._rope.new_empty(2, rows, *self._rope.shape[2:])

    def _record(self, count: int, metadata: AttentionMetadata) -> None:
        """Run a step and note what it does."""
        rope = self._rope[0, :count], self._rope[1, :count]
        with Recording(len(self._hidden)) as recording:
            out = self._run_layers(self._hidden[:count], rope, metadata)
        self._out = out.as_strided((len(self._hidden), out.shape[1]), out.stride())  # the buffer that it is the start of
        self.recording, self._kv_caches = recording, metadata.kv_caches
        self.num_recordings += 1


def replay_layers(model: CausalLM, parallel: TensorParallel) -> None:
    """Let a model's layers be recorded and replayed, if all their operations, sums over the ranks too, are native kernels."""
    if isinstance(model, LlamaForCausalLM) and len(model.config.windows) == 1 and parallel.is_native:
        layers = [*model.model.layers.modules(), model.model.norm]
        replay(model.model, model.model.run_layers, layers, model.config.hidden_size, model.model.embed_tokens.weight.dtype)


def replay(
    owner: nn.Module, run_layers: Callable[..., Tensor], layers: Many[nn.Module], hidden_size: int, dtype: torch.dtype
) -> None:
    """Let the method `run_layers` of `owner`, which runs these layers, be recorded and replayed, if all of them are native."""
    if all(is_native(layer) for layer in layers if isinstance(layer, WeightLayer | Attention)):
        attention = next(layer for layer in layers if isinstance(layer, Attention))
        put(owner, "run_layers", LayerReplay(run_layers, attention, hidden_size, dtype))


@dataclass(frozen=True, slots=True)
class AdaptedReplay:
    """Stands in the place of a `LayerReplay`, `plain`, where steps may have adapters: those that have more to do, and with it a
    recording of their own."""

    plain: LayerReplay
    adapted: LayerReplay
    step: AdaptersOfStep

    def __call__(self, *inputs: *LayerInputs) -> Tensor:
        return (self.adapted if self.step.active else self.plain)(*inputs)


def replay_adapted_steps(model: CausalLM, step: AdaptersOfStep) -> None:
    """Let steps with adapters be replayed, too, in a model whose layers are; `step` says which step is one."""
    if isinstance(model, LlamaForCausalLM) and isinstance(plain := model.model.run_layers, LayerReplay):
        put(model.model, "run_layers", AdaptedReplay(plain, plain.twin(), step))
