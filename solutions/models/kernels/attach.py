"""Passes over a loaded model that put kernels in the place of PyTorch's operations.

A layer stays what it is: its weights, its part of them on this rank, what is summed over the ranks. What a pass replaces is the
function that computes, `Linear.multiply` or the `forward` of a norm, as gpt-fast's ``quantize.py`` swaps modules. Layers are
done one by one, and a weight that is packed is freed before the next one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...attention.paged_attention import AttentionMetadata
from ...parallelism.linear import Linear
from ...parallelism.quantized_linear import QuantizedLinear
from ...parallelism.tensor_parallel import GateUpParallelLinear, ParallelLMHead
from ...quantization.kernels import linear_cpu
from ...quantization.kernels.linear_cpu import PackedLinear
from ...quantization.layout.float8 import ScaledFloat8, quantize_float8
from ...quantization.layout.groups import GroupQuantized
from ..layers import Attention, HeadNorm, RMSNorm
from ..moe import Experts, Router
from . import layers_cpu
from .experts_cpu import NativeExperts, packed_products
from .layers_cpu import NativeHeadNorm, NativeNorm, NativeRotation


@dataclass(frozen=True, slots=True)
class Plan:
    """What a model's layers compute with.

    Attributes:
        kernels: "cpu", the CPU's own; "triton"; or None for PyTorch's.
        quantization: "int8" or "int4" makes plain weights that, which needs the CPU's kernels; "fp8" needs Triton's; None: they
            stay as they are.
    """

    kernels: str | None = None
    quantization: str | None = None


def attach(model: nn.Module, plan: Plan) -> None:
    """Let the layers of a loaded model compute as planned; where a kernel has no code for a layer, PyTorch computes it."""
    with torch.inference_mode(False), torch.no_grad():
        dtype = next(model.parameters()).dtype  # of the embedding, which is never quantized
        for name, layer in reversed(list(model.named_modules())):  # what a layer consists of comes before it
            quantized: GroupQuantized | ScaledFloat8 | None = None
            rounding, rounds = plan.quantization, True
            is_grouped = plan.kernels == "triton" and ".experts." in name  # one of the matrices of a grouped product
            if isinstance(layer, QuantizedLinear):
                rounds, quantized, layer = layer.rounds_inputs, layer.take(), layer.layer
                rounding = None
                if rounds and plan.kernels == "cpu" and isinstance(quantized, GroupQuantized):
                    rounding = "int8" if linear_cpu.supports_rows(dtype, quantized) else None
                model.set_submodule(name, layer)
                if (is_grouped and isinstance(quantized, GroupQuantized)) or not _has_kernel(plan, quantized, dtype):
                    layer.weight = nn.Parameter(quantized.dequantize().to(dtype), requires_grad=False)
                    quantized = None
            if plan.kernels == "cpu":
                assert not isinstance(quantized, ScaledFloat8)  # a plain weight by now
                _attach_cpu(layer, quantized, rounding, dtype)
            elif isinstance(layer, Experts):
                if plan.kernels == "triton" or layer.load.is_cuda:  # where PyTorch's cannot be captured
                    _attach_grouped(layer, dtype)
            elif plan.kernels == "triton":
                if rounding == "fp8" and isinstance(layer, Linear) and not isinstance(layer, ParallelLMHead | Router):
                    quantized = quantize_float8(layer.weight) if layer.weight.numel() else None
                if quantized is not None or not is_grouped:
                    _attach_triton(layer, quantized, rounds)


def put(module: nn.Module, method: str, function: Callable[..., Tensor]) -> None:
    """Let `function` do what a method of this one module did."""
    setattr(module, method, function)


def packed_of(layer: nn.Module) -> PackedLinear | None:
    """The packed matrix that a layer multiplies by, if it does."""
    return next((function for function in vars(layer).values() if isinstance(function, PackedLinear)), None)


def is_native(layer: nn.Module) -> bool:
    """Whether all that a layer with weights, or an attention's rotation, computes is one of the CPU's own kernels."""
    if isinstance(layer, Attention):
        return isinstance(layer.rotate_, NativeRotation)
    if isinstance(layer, Linear) and not isinstance(layer, GateUpParallelLinear):
        return isinstance(layer.multiply, PackedLinear)
    if isinstance(layer.forward, NativeExperts):
        return layer.forward.is_whole
    return isinstance(layer.forward, PackedLinear | NativeNorm | NativeHeadNorm)


def _has_kernel(plan: Plan, quantized: GroupQuantized | ScaledFloat8, dtype: torch.dtype) -> bool:
    """Whether there is code for a quantized weight as it is; any other becomes a plain one."""
    if plan.kernels == "triton":
        from ...quantization.kernels import float8_triton, w4a16_triton  # Triton takes its time and is not everywhere

        return float8_triton.supports(quantized) if isinstance(quantized, ScaledFloat8) else w4a16_triton.supports(quantized)
    return plan.kernels == "cpu" and isinstance(quantized, GroupQuantized) and linear_cpu.supports_groups(dtype, quantized)


# On a CPU


def _attach_cpu(layer: nn.Module, quantized: GroupQuantized | None, quantization: str | None, dtype: torch.dtype) -> None:
    if isinstance(layer, Linear):
        _pack(layer, quantized, quantization, dtype)
    elif isinstance(layer, RMSNorm) and layers_cpu.supports_norm(layer.weight):
        put(layer, "forward", NativeNorm(layer.weight, layer.eps, layer.offset))
    elif isinstance(layer, HeadNorm) and layers_cpu.supports_norm(layer.weight):
        put(layer, "forward", NativeHeadNorm(layer.weight, layer.eps, layer.offset))
    elif isinstance(layer, Attention) and layers_cpu.supports_rotation(layer.head_dim, dtype):
        put(layer, "rotate_", NativeRotation(layer.head_dim, dtype))
    elif isinstance(layer, Experts) and layer.hidden_size % 16 == 0 and all(map(packed_products, layer.own.values())):
        put(layer, "forward", NativeExperts(layer, dtype))


def _pack(layer: Linear, quantized: GroupQuantized | None, quantization: str | None, dtype: torch.dtype) -> None:
    """Bring a weight into the kernels' order. With int4 the head becomes int8: logits are touchier than hidden states; a router
    is small and stays as it is."""
    if isinstance(layer, Router):
        quantization = None
    if isinstance(layer, ParallelLMHead) and quantization == "int4":
        quantization = "int8"
    weight = layer.weight if quantized is None else quantized
    if quantized is None and (0 in weight.shape or not linear_cpu.supports(dtype, weight.shape[1], quantization)):
        return  # nothing is there where an MLP has fewer columns than ranks want
    is_gated = isinstance(layer, GateUpParallelLinear) and layer.activation is F.silu and weight.shape[0] % 32 == 0
    packed = PackedLinear(weight, layer.bias, quantization, is_gated, dtype)
    layer.weight = nn.Parameter(packed.weight, requires_grad=False)  # an embedding that a head is tied to keeps its own
    put(layer, "forward" if is_gated else "multiply", packed)


# With Triton


def _attach_triton(layer: nn.Module, quantized: GroupQuantized | ScaledFloat8 | None, rounds_inputs: bool) -> None:
    from ...quantization.kernels.float8_triton import Float8Linear
    from ...quantization.kernels.w4a16_triton import TritonLinear
    from .layers_triton import norm_heads_, rms_norm, silu_mul

    if isinstance(layer, RMSNorm):
        put(layer, "forward", partial(rms_norm, weight=layer.weight, eps=layer.eps, offset=layer.offset))
    elif isinstance(layer, HeadNorm):
        put(layer, "forward", partial(norm_heads_, weight=layer.weight, eps=layer.eps, offset=layer.offset))
    elif isinstance(layer, Attention):
        put(layer, "forward", partial(leave_rotation, layer.forward))
    elif isinstance(layer, Linear):
        if isinstance(quantized, ScaledFloat8):
            float8 = Float8Linear(quantized, rounds_inputs, layer.bias)
            put(layer, "multiply", float8)
            for name, tensor in (("weight", float8.codes), ("scales", float8.scales)):
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        elif quantized is not None:
            product = TritonLinear(quantized, bias=layer.bias)
            put(layer, "multiply", product)
            for name, tensor in (("weight", product.packed), ("scales", product.scales), ("zeros", product.zeros)):
                layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        elif layer.bias is None:
            put(layer, "multiply", partial(add_inside, layer.weight))
        if isinstance(layer, GateUpParallelLinear) and layer.activation is F.silu:
            put(layer, "activate", silu_mul)


def _attach_grouped(experts: Experts, dtype: torch.dtype) -> None:
    from .experts_triton import TritonExperts

    put(experts, "multiply", TritonExperts(experts, dtype))


def add_inside(weight: Tensor, x: Tensor, add_to: Tensor | None = None) -> Tensor:
    """`Linear.multiply` that adds to the residual stream inside the product's own kernel: a pass over memory less than a kernel
    that adds, or one that adds and normalises. Results are rounded once instead of twice."""
    return F.linear(x, weight) if add_to is None else add_to.addmm_(x, weight.t())


def leave_rotation(
    forward: Callable[..., Tensor], qkv: Tensor, metadata: AttentionMetadata, rope: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`Attention.forward` that leaves it to the backend to rotate queries and keys, on their way into the cache."""
    metadata.rope = rope
    return forward(qkv, metadata)
