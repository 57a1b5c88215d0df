"""Layers with weights, whole: what the parallel layers cut. A layer knows how a checkpoint's tensors become its parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantization.kernels import linear_cpu
from ..quantization.kernels.linear_cpu import PackedLinear
from ..quantization.layout.checkpoint import QuantizedFormat
from ..quantization.layout.groups import GroupQuantized


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
