"""Steps of a CPU without Python: what a model's layers do is recorded once, and done again by one call.

A step is some hundred kernels of a few microseconds each, and calling them from Python takes nearly as long as running them. A
recording holds the calls with all their arguments, so only what these point to may change: each step's inputs are copied to
buffers where the recording reads them. `--enforce-eager` switches this off. `graphs/decode_graphs.py` does the like on a GPU.

The layers between embedding and head are recorded when the first step comes, if all their operations are native kernels. One
recording serves any number of tokens up to its buffers' size, prompts too.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..attention.paged_attention_cpu import Plan, new_step
from ..models.kernels.attach import is_native, put
from ..models.layers import Attention, CausalLM
from ..models.llama import LlamaForCausalLM
from ..models.lora.products import AdaptersOfStep
from ..parallelism.linear import WeightLayer
from ..parallelism.tensor_parallel import TensorParallel
from .graphs.decode_graphs import Capture
from .platform.native import Recording

MIN_ROWS = 64
"""Fewest tokens that a CPU's recording has room for; one that needs more is made anew, with room for the next power of two."""

LayerInputs = tuple[Tensor, tuple[Tensor, Tensor], AttentionMetadata]


class LayerReplay(Capture[LayerInputs]):
    """Stands in the place of a function that runs a model's layers, every operation of which is a native kernel.

    Args:
        run_layers: takes hidden states [T, hidden], (cos, signed sin) [T, 1, D] and the step's metadata; returns [T, hidden].
        attention: any of the layers' attention, for the sizes that all share.

    Attributes:
        run_layers: as it was given.
        recording: of the last step, if any. num_recordings: made so far.
    """

    def __init__(self, run_layers: Callable[..., Tensor], attention: Attention, hidden_size: int, dtype: torch.dtype) -> None:
        self.run_layers = run_layers
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
        return LayerReplay(self.run_layers, self._attention, self._hidden.shape[1], self._hidden.dtype)

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
            out = self.run_layers(self._hidden[:count], rope, metadata)
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
    recording of their own; but those of experts are in none."""

    plain: LayerReplay
    adapted: LayerReplay
    step: AdaptersOfStep

    def __call__(self, *inputs: *LayerInputs) -> Tensor:
        if self.step.reaches_experts:
            return self.plain.run_layers(*inputs)
        return (self.adapted if self.step.active else self.plain)(*inputs)


def replay_adapted_steps(model: CausalLM, step: AdaptersOfStep) -> None:
    """Let steps with adapters be replayed, too, in a model whose layers are; `step` says which step is one."""
    if isinstance(model, LlamaForCausalLM) and isinstance(plain := model.model.run_layers, LayerReplay):
        put(model.model, "run_layers", AdaptedReplay(plain, plain.twin(), step))
