"""The layers that all models are built from, over flat tokens: [T, hidden], whatever sequences the T tokens belong to.

Every layer that holds weights knows how a tensor of a checkpoint goes into them (`WeightLayer.weight_loader`), so a
model's file says what the model is and nothing about how its weights are merged or split over devices. Nothing here knows of
kernels: passes over a loaded model put them in place (``kernels/attach.py``).

Letters: T tokens of a step, H query heads, H_kv key/value heads, D head size, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

import abc
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..parallelism.linear import WeightLayer, parameter
from .config.model_config import ModelConfig


class RMSNorm(WeightLayer):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(WeightLayer):
    """``(x − mean) / sqrt(variance + eps) · weight + bias`` over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def rope_inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of a head's elements, [D / 2] in float32, after scaling.

    Scaling stretches the positions a model was trained on over a longer context: "linear" slows all pairs
    (Chen et al., 2023), "dynamic" raises the base as NTK-aware scaling does (bloc97 and emozilla, 2023), "llama3" slows
    only the pairs that turn less than ``low_freq_factor`` times in the trained context and blends up to
    ``high_freq_factor`` (Llama 3.1). The formulas, and the order of their roundings, are those of transformers.

    Dynamic scaling depends on a sequence's length. transformers recomputes the frequencies whenever a sequence grows
    past the trained context, and keys cached earlier keep the old rotation. Here all sequences share one table and
    cached blocks, so one length must hold for all: the longest that is served. If that is within the trained context,
    nothing is scaled; else the frequencies are those that transformers uses on a sequence of `max_model_len` tokens.
    """
    scaling = config.rope_scaling or {"rope_type": "default"}
    kind, theta = scaling["rope_type"], config.rope_theta
    if kind == "dynamic":
        trained, factor = config.max_position_embeddings, scaling["factor"]
        length = max(config.max_model_len or trained, trained)
        theta *= (factor * length / trained - (factor - 1)) ** (config.head_dim / (config.head_dim - 2))
    frequencies = 1.0 / (theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        return scale_llama3(frequencies, **{name: value for name, value in scaling.items() if name != "rope_type"})
    return frequencies


def scale_llama3(
    frequencies: Tensor,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> Tensor:
    """Llama 3.1's scaling of `frequencies` [D / 2]; see `rope_inverse_frequencies`."""
    wavelength = 2 * math.pi / frequencies
    turns = original_max_position_embeddings / wavelength
    smooth = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor)
    blended = (1 - smooth) * frequencies / factor + smooth * frequencies
    slow = wavelength > original_max_position_embeddings / low_freq_factor
    fast = wavelength < original_max_position_embeddings / high_freq_factor
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, blended))


class RotaryEmbedding(nn.Module):
    """RoPE (Su et al., 2021): turns each pair of elements of queries and keys by an angle that grows with the position.

    Pairs are (i, i + D/2), as in GPT-NeoX and all Hugging Face checkpoints. Tables of cos and sin are made once for
    every position, and one look-up serves all layers of a step.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        length = max(config.max_position_embeddings, config.max_model_len or 0)
        positions = torch.arange(length, dtype=torch.float32)
        angles = positions[:, None] * rope_inverse_frequencies(config)  # [positions, D / 2]
        cos, sin = angles.cos(), angles.sin()
        dtype = torch.get_default_dtype()
        self.register_buffer("cos", torch.cat((cos, cos), dim=-1).to(dtype), persistent=False)  # [positions, D]
        self.register_buffer("signed_sin", torch.cat((-sin, sin), dim=-1).to(dtype), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin with its first half negated), each [T, 1, D], for `rotate_`; positions is [T]."""
        return self.cos[positions].unsqueeze(1), self.signed_sin[positions].unsqueeze(1)


def rotate_(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate `heads` [T, any number of heads, D] in place by `rope`, the result of `RotaryEmbedding`."""
    cos, signed_sin = rope
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return heads.mul_(cos).addcmul_(swapped, signed_sin)


class CausalLM(nn.Module, abc.ABC):
    """What the engine asks of a model."""

    @abc.abstractmethod
    def forward(self, input_ids: Tensor, positions: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states after the final norm, [T, hidden], of the tokens `input_ids` [T] at `positions` [T]."""
        ...

    @abc.abstractmethod
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden] -> [N, V]: the caller picks the rows that it needs logits of."""
        ...

    @abc.abstractmethod
    def place(self, name: str, tensor: Tensor) -> tuple[str, str | None, Tensor] | None:
        """Where a checkpoint's tensor goes: (parameter, shard id, tensor in the layout used here); None: nowhere."""
        ...


class Attention(nn.Module):
    """The paged attention of one layer. It has no weights: projections belong to the model."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, layer: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        self.sliding_window = sliding_window

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
        out = metadata.backend.attend(self.layer, q, k, v, metadata, self.scale, self.sliding_window)  # [T, H, D]
        return out.reshape(len(qkv), -1)
