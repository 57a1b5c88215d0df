"""The layers that all models are built from, over flat tokens: [T, hidden], whatever sequences the T tokens belong to.

Every layer that holds weights knows how a tensor of a checkpoint goes into them (`WeightLayer.weight_loader`), so a
model's file says what the model is and nothing about how its weights are merged, split over devices or packed.

Letters: T tokens of a step, H query heads, H_kv key/value heads, D head size, I width of the MLP, V vocabulary.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention.paged_attention import AttentionMetadata
from ..quantization.checkpoint import QuantizedFormat
from ..quantization.groups import GroupQuantized
from ..quantization.kernels import linear_cpu
from ..quantization.kernels.linear_cpu import PackedLinear
from . import layers_cpu
from .layers_cpu import NativeNorm, NativeRotation
from .model_config import ModelConfig

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}


def parameter(*shape: int) -> nn.Parameter:
    """Memory for a weight of this shape, which is not trained."""
    return nn.Parameter(torch.empty(shape), requires_grad=False)


class WeightLayer(nn.Module):
    """A layer with weights.

    Attributes:
        shard_ids: pieces that a checkpoint keeps apart and this layer merges into one parameter; (None,): no pieces.
    """

    shard_ids: tuple[str | None, ...] = (None,)

    is_native = False
    """Whether its forward is one of the CPU's own kernels and nothing else."""

    def pack(self, quantization: str | None) -> None:
        """Once all weights are there: bring them into the order in which the CPU's kernels read them. By default nothing."""

    def use_triton(self) -> None:
        """Compute with Triton kernels where one is better than what PyTorch has. By default nowhere."""

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        """Copy a checkpoint's tensor into `param`, or into the piece of it called `shard_id`.

        Raises:
            ValueError: the shapes differ.
        """
        copy_weight(param, loaded)


def copy_weight(destination: Tensor, loaded: Tensor) -> None:
    """Fill a weight, or a part of one.

    Raises:
        ValueError: the shapes differ.
    """
    if destination.shape != loaded.shape:  # copy_ would broadcast
        raise ValueError(f"expected shape {list(destination.shape)}, the checkpoint has {list(loaded.shape)}")
    destination.copy_(loaded)


class RMSNorm(WeightLayer):
    """``x / sqrt(mean(x²) + eps) · weight`` over the last dimension, computed in float32 (Zhang and Sennrich, 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.eps = eps
        self.native: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        if self.native is not None:
            return self.native(x)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def pack(self, quantization: str | None) -> None:
        if layers_cpu.supports_norm(self.weight):
            self.native = NativeNorm(self.weight, self.eps)
            self.is_native = True

    def use_triton(self) -> None:
        from .layers_triton import rms_norm  # imports Triton, which takes its time and is not everywhere

        self.native = partial(rms_norm, weight=self.weight, eps=self.eps)


class LayerNorm(WeightLayer):
    """``(x − mean) / sqrt(variance + eps) · weight + bias`` over the last dimension (Ba et al., 2016)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = parameter(size)
        self.bias = parameter(size)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [T, hidden] -> [T, hidden]
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Linear(WeightLayer):
    """``x · weightᵀ + bias``. The weight is [out, in]."""

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.weight: nn.Parameter | None = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        for name in ("codes", "scales", "zeros", "order"):  # of a quantized checkpoint, until they are packed
            self.register_parameter(name, None)
        self.bits = self.group_size = 0
        self.packed: PackedLinear | None = None
        self.quantized_product: Callable[[Tensor], Tensor] | None = None
        self.adds_inside = False

    def expect_quantized(self, form: QuantizedFormat) -> None:
        """Make room for codes, scales and zeros in the place of the weight (see `GroupQuantized`)."""
        self._make_room(form, form.columns_in_group(self.weight.shape[1]))

    def _make_room(self, form: QuantizedFormat, group_size: int) -> None:
        rows, columns = self.weight.shape
        groups = -(-columns // group_size)
        self.weight, self.bits, self.group_size = None, form.bits, group_size
        self.codes = nn.Parameter(torch.empty(rows, columns, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(rows, groups, dtype=torch.float32), requires_grad=False)
        self.zeros = nn.Parameter(torch.empty(rows, groups, dtype=torch.float32), requires_grad=False)
        if form.act_order:
            self.order = nn.Parameter(torch.full((columns,), -1, dtype=torch.int64), requires_grad=False)

    def take_quantized(self) -> GroupQuantized | None:
        """Hand over what `expect_quantized` made room for, once it is loaded; None if the weight is a plain one."""
        if self.codes is None:
            return None
        order = self.order
        if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
            order = None
        tensors = (None if t is None else t.data for t in (self.codes, self.scales, self.zeros))
        quantized = GroupQuantized(*tensors, self.bits, self.group_size, None if order is None else order.data)
        self.codes = self.scales = self.zeros = self.order = None
        return quantized

    def dequantize(self) -> None:
        """Where no kernel takes quantized weights: make a plain weight of them, in the type that is computed in."""
        if (quantized := self.take_quantized()) is not None:
            self.weight = nn.Parameter(quantized.dequantize().to(torch.get_default_dtype()), requires_grad=False)

    def forward(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, in] -> [T, out]; with `add_to` [T, out] the result is added to that in place."""
        if self.packed is not None:
            return self.packed(x, add_to)
        if self.quantized_product is not None:
            y = self.quantized_product(x)
            if self.bias is not None:
                y += self.bias
        elif add_to is not None and self.adds_inside:
            return add_to.addmm_(x, self.weight.t())
        else:
            y = F.linear(x, self.weight, self.bias)
        return y if add_to is None else add_to.add_(y)

    def use_triton(self) -> None:
        """Add to the residual stream inside the product's own kernel: a pass over memory less than a kernel that adds, or one
        that adds and normalises. Results are rounded once instead of twice. Weights of 4 bits have a kernel of their own."""
        self.adds_inside = self.bias is None
        if self.codes is None:
            return
        from ..quantization.kernels.w4a16_triton import TritonLinear, supports  # imports Triton, which takes its time

        quantized = self.take_quantized()
        if supports(quantized):
            self.quantized_product = product = TritonLinear(quantized)
            held = {"weight": product.packed, "scales": product.scales, "zeros": product.zeros}
            for name, tensor in held.items():
                setattr(self, name, nn.Parameter(tensor, requires_grad=False))
        else:
            self.weight = nn.Parameter(quantized.dequantize().to(torch.get_default_dtype()), requires_grad=False)

    def pack(self, quantization: str | None, gated: bool = False) -> None:
        dtype = torch.get_default_dtype() if self.weight is None else self.weight.dtype
        if self.codes is not None and linear_cpu.supports_groups(dtype, self.codes.shape[1], self.bits, self.group_size):
            self._use(PackedLinear(self.take_quantized(), self.bias, None, gated, dtype))
            return
        self.dequantize()
        if linear_cpu.supports(dtype, self.weight.shape[1], quantization):
            self._use(PackedLinear(self.weight, self.bias, quantization, gated))

    def _use(self, packed: PackedLinear) -> None:
        self.packed = packed
        self.weight = nn.Parameter(packed.weight, requires_grad=False)
        self.is_native = True


class Embedding(WeightLayer):
    """A row for each token id or position."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(rows, size)

    def forward(self, ids: Tensor) -> Tensor:  # [T] -> [T, hidden]
        return F.embedding(ids, self.weight)


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

    def enable_replay(self) -> None:
        """Let small steps be recorded and replayed, if all their layers are native kernels. By default they are not."""

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
        self.dtype = torch.get_default_dtype()
        self.is_native = False
        self.rotate_: Callable[[Tensor, tuple[Tensor, Tensor]], Tensor] = rotate_

    def pack(self, quantization: str | None) -> None:
        """Rotate with the CPU's own kernel where it can."""
        if layers_cpu.supports_rotation(self.head_dim, self.dtype):
            self.rotate_ = NativeRotation(self.head_dim, self.dtype)
            self.is_native = True

    def forward(self, qkv: Tensor, metadata: AttentionMetadata, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Attend from each token over its sequence.

        Args:
            qkv: [T, (H + 2·H_kv)·D]; with `rope` its queries and keys are rotated in place.
            rope: the step's rotation, from `RotaryEmbedding`.

        Returns:
            [T, H·D].
        """
        heads = qkv.view(len(qkv), -1, self.head_dim)  # [T, H + 2·H_kv, D]
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        fused = {}
        if metadata.backend.rotates:
            fused["rope"] = rope
        elif rope is not None:
            self.rotate_(heads[:, : self.num_heads + self.num_kv_heads], rope)
        out = metadata.backend.attend(self.layer, q, k, v, metadata, self.scale, self.sliding_window, **fused)  # [T, H, D]
        return out.reshape(len(qkv), -1)
