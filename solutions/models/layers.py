"""The layers that all models are built from, over flat tokens: [T, hidden], whatever sequences the T tokens belong to.

Every layer that holds weights knows how a tensor of a checkpoint goes into them (`WeightLayer.weight_loader`), so a
model's file says what the model is and nothing about how its weights are merged or split over devices. Nothing here knows of
kernels: passes over a loaded model put them in place (``kernels/attach.py``).

Letters: T tokens of a step, H query heads, H_kv key/value heads, D head size, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import Layer, WeightLayer, parameter
from .rope import rotate_


class Norm(WeightLayer):
    """``x / sqrt(mean(x²) + eps) · (offset + weight)`` over the last dimension, computed in float32 (Zhang and Sennrich, 2019).

    Weights around an offset of 1 are small numbers, and 16 bits would not hold the sum.
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.eps, self.offset = eps, offset

    def normed(self, x: Tensor) -> Tensor:
        if not self.offset:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float() + self.offset, self.eps).to(x.dtype)


class RMSNorm(Norm):
    """RMSNorm; with `add_to` [T, hidden] the result is added to that in place."""

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:  # [T, hidden] -> [T, hidden]
        y = self.normed(x)
        return y if add_to is None else add_to.add_(y)


class HeadNorm(Norm):
    """RMSNorm of every head by itself, in place."""

    def forward(self, heads: Tensor) -> Tensor:  # [T, any number of heads, size]
        return heads.copy_(self.normed(heads))


class LayerNorm(WeightLayer):
    """``(x − mean) / sqrt(variance + eps) · weight + bias`` over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class CausalLM(Layer, abc.ABC):
    """What the engine asks of a model."""

    @abc.abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states after the final norm, [T, hidden], of the tokens `input_ids` [T] at `positions` [T]."""
        ...

    @abc.abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, V]: the caller picks the rows that it needs logits of."""
        ...

    def pieces(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """A checkpoint's tensor as those that `place` knows, by name: itself, where a family says nothing else."""
        yield name, tensor

    @abc.abstractmethod
    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        """Where a checkpoint's tensor goes: (parameter, shard id, tensor in the layout used here); None: nowhere."""
        ...


class Attention(Layer):
    """The paged attention of one layer. It has no weights: projections belong to the model."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, layer: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window
        self.soft_cap: float | None = None

    rotate_ = staticmethod(rotate_)

    def forward(self, qkv: Tensor, metadata: AttentionMetadata, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from each token over its sequence.

        Args:
            qkv: [T, (H + 2·H_kv)·D]; with `rope` its queries and keys are rotated in place.
            rope: the step's rotation, from `RotaryEmbedding`.

        Returns:
            [T, H·D].
        """
        heads = qkv.view(len(qkv), -1, self.head_dim)  # [T, H + 2·H_kv, D]
        if rope is not None:
            self.rotate_(heads[:, : self.num_heads + self.num_kv_heads], rope)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        attend = metadata.backend.attend
        out = attend(self.layer, q, k, v, metadata, self.scale, self.sliding_window, self.soft_cap)  # [T, H, D]
        return out.reshape(len(qkv), -1)
