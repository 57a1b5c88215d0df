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
from ..models.kernels.attach import is_native, put
from ..models.layers import Attention, CausalLM
from ..models.llama import LlamaForCausalLM
from ..models.lora.products import AdaptersOfStep
from ..parallelism.linear import WeightLayer
from ..parallelism.tensor_parallel import TensorParallel
from .graphs.replay import Replay


class LayerReplay(Replay):
    """Stands in the place of a function that runs a model's layers.

    Args:
        run_layers: takes hidden states [T, hidden], (cos, signed sin) [T, 1, D] and the step's metadata; returns [T, hidden].
    """

    def __init__(self, run_layers: Callable[..., Tensor], attention: Attention, hidden_size: int, dtype: torch.dtype) -> None:
        rope = torch.empty(0, 1, attention.head_dim, dtype=dtype)
        super().__init__([torch.empty(0, hidden_size, dtype=dtype), rope, rope], attention)
        self.run_layers = run_layers

    def twin(self) -> LayerReplay:
        """Another one of the same function, without a recording yet."""
        return LayerReplay(self.run_layers, self.attention, self._inputs[0].shape[1], self._inputs[0].dtype)

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        """What `run_layers` returns."""
        return self.run(((hidden, *rope), metadata), len(hidden))

    def compute(self, inputs: Many[Tensor], metadata: AttentionMetadata) -> Tensor:
        hidden, cos, signed_sin = inputs
        return self.run_layers(hidden, (cos, signed_sin), metadata)


def replay_layers(model: CausalLM, parallel: TensorParallel) -> None:
    """Let a model's layers be recorded and replayed, if all their operations, sums over the ranks too, are native kernels."""
    if isinstance(model, LlamaForCausalLM) and len(model.config.windows) == 1 and parallel.is_native:
        layers = [*model.model.layers.modules(), model.model.norm]
        replay(model.model, model.model.run_layers, layers, model.config.hidden_size, model.model.embed_tokens.weight.dtype)


def can_replay(layers: Many[nn.Module]) -> bool:
    """Whether all that these layers compute is native kernels."""
    return all(is_native(layer) for layer in layers if isinstance(layer, WeightLayer | Attention))


def replay(
    owner: nn.Module, run_layers: Callable[..., Tensor], layers: Many[nn.Module], hidden_size: int, dtype: torch.dtype
) -> None:
    """Let the method `run_layers` of `owner`, which runs these layers, be recorded and replayed, if all of them are native."""
    if can_replay(layers):
        attention = next(layer for layer in layers if isinstance(layer, Attention))
        put(owner, "run_layers", LayerReplay(run_layers, attention, hidden_size, dtype))


@dataclass(frozen=True, slots=True)
class AdaptedReplay:
    """Stands in the place of a `LayerReplay`, `plain`, where steps may have adapters: those that have more to do, and with it a
    recording of their own; but those of experts are in none."""

    plain: LayerReplay
    adapted: LayerReplay
    step: AdaptersOfStep

    def __call__(self, hidden: Tensor, rope: tuple[Tensor, Tensor], metadata: AttentionMetadata) -> Tensor:
        if self.step.reaches_experts:
            return self.plain.run_layers(hidden, rope, metadata)
        return (self.adapted if self.step.active else self.plain)(hidden, rope, metadata)


def replay_adapted_steps(model: CausalLM, step: AdaptersOfStep) -> None:
    """Let steps with adapters be replayed, too, in a model whose layers are; `step` says which step is one."""
    if isinstance(model, LlamaForCausalLM) and isinstance(plain := model.model.run_layers, LayerReplay):
        put(model.model, "run_layers", AdaptedReplay(plain, plain.twin(), step))
