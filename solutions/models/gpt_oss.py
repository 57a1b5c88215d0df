"""gpt-oss (OpenAI, 2025): experts with a clamped gate, attention with sinks, a window in every other layer.

How it differs from ``moe.py``: each head of attention has a *sink*, a score that counts in the softmax and stands for no token,
so that a head need not look anywhere. An expert's gate and up are cut off at a limit, and 1 is added to up; the experts and
their router have biases. Files keep gate and up in turns, and the published ones keep experts in MXFP4
(``quantization/layout/mxfp4.py``), which become plain weights as they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import WeightLayer, copy_weight, parameter
from ..parallelism.tensor_parallel import GateUpParallelLinear, Shard, TensorParallel
from .config.model_config import ModelConfig
from .llama import GatedMLP, LlamaAttention
from .moe import Experts, mixture_of
from .sparse import SparseDecoderLayer, SparseForCausalLM, SparseMLP

_OF_ALL = re.compile(r"(.*\.experts)\.(gate_up_proj|down_proj)(\.dense|_bias)?")
"""A tensor of all experts of a layer."""
_BIASES = re.compile(r"(.*\.experts)\.((?:gate|up|down)_proj\.bias)")
"""The same from a GGUF file, which has gate and up apart."""


class Sinks(WeightLayer):
    """A score for each of this rank's heads."""

    def __init__(self, heads: Shard) -> None:
        super().__init__()
        self.weight, self.heads = parameter(len(heads)), heads

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        copy_weight(param, self.heads.of(loaded))


class GptOssAttention(LlamaAttention):
    """LLaMA's attention with sinks."""

    def __init__(self, config: ModelConfig, layer: int, parallel: TensorParallel) -> None:
        super().__init__(config, layer, parallel)
        self.sinks = Sinks(parallel.heads(config)[0])

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor] | None, metadata: AttentionMetadata, add_to: Tensor | None
    ) -> Tensor:
        metadata.backend.sinks = self.sinks.weight
        out = super().forward(x, rope, metadata, add_to)
        metadata.backend.sinks = None  # a head that drafts has none, and shares the backend
        return out


class ClampedGateUp(GateUpParallelLinear):
    """``gate · sigmoid(alpha · gate) · (up + 1)`` of a gate of `limit` at most, and up between −limit and limit."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        clamped = mixture_of(config).clamped
        assert clamped is not None
        self.alpha, self.limit = clamped
        self.activation = self.sigmoid_gate

    def sigmoid_gate(self, gate: Tensor) -> Tensor:
        return gate * (self.alpha * gate).sigmoid()

    def activate(self, gate_up: Tensor) -> Tensor:
        """[T, 2 · local I] -> [T, local I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        return self.activation(gate.clamp(max=self.limit)).mul_(up.clamp(-self.limit, self.limit).add_(1))


class ClampedMLP(GatedMLP):
    """An expert."""

    def __init__(self, config: ModelConfig, parallel: TensorParallel) -> None:
        super().__init__(config, parallel)
        self.gate_up_proj = ClampedGateUp(config, parallel)


class ClampedExperts(Experts):
    """Experts with a clamped gate."""

    kind = ClampedMLP


class GptOssMLP(SparseMLP):
    """Router and experts."""

    kind = ClampedExperts


class GptOssDecoderLayer(SparseDecoderLayer):
    """Attention with sinks, and experts."""

    attention = GptOssAttention
    sparse = GptOssMLP


class GptOssForCausalLM(SparseForCausalLM):
    """gpt-oss with its head."""

    decoder_layer = GptOssDecoderLayer
    is_transposed = True

    def pieces(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A matrix of all experts is [E, in, out], but [E, out, in] where it was packed; gate and up are columns in turns."""
        found = _OF_ALL.fullmatch(name)
        if found is None:
            biases = _BIASES.fullmatch(name)
            apart = ((f"{biases[1]}.{number}.{biases[2]}", bias) for number, bias in enumerate(tensor)) if biases else ()
            yield from apart if biases else super().pieces(name, tensor)
            return
        experts, matrix, form = found.groups()
        tensor = tensor.transpose(1, 2) if form is None else tensor  # [E, out, in], or of a bias [E, out]
        for number, of_expert in enumerate(tensor):
            if matrix == "gate_up_proj":
                of_expert = of_expert.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
            yield f"{experts}.{number}.{matrix}.{'bias' if form == '_bias' else 'weight'}", of_expert

    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        if _OF_ALL.fullmatch(name.removesuffix(".codes")):  # no layer of its own; it comes in `pieces`
            return None
        name = f"{name}.weight" if name.endswith(".sinks") else name
        return super().place(name.replace(".mlp.router.", ".mlp.gate."), tensor)
