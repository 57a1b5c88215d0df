"""A linear layer of a quantized checkpoint while it is loaded: codes, scales and zeros, cut as its weight would be."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..quantization.layout.float8 import FLOAT8, ScaledFloat8
from ..quantization.layout.formats import Format
from ..quantization.layout.groups import GroupQuantized
from .linear import Linear, WeightLayer, copy_weight, parameter
from .tensor_parallel import RowParallelLinear, Shard, check_size


class QuantizedLinear(WeightLayer):
    """Stands in the place of a linear layer until its weights are there; it computes nothing.

    Groups that a border between ranks cuts become smaller ones, each with the whole group's scale and zero.

    Args:
        layer: the layer, whose plain weight is given up. form: how the checkpoint keeps it.

    Raises:
        ValueError: with act-order a rank's columns are of all groups; that is not supported.
    """

    layer: Linear

    def __init__(self, layer: Linear, form: Format) -> None:
        super().__init__()
        rows, columns = layer.weight.shape
        inputs = layer.inputs if isinstance(layer, RowParallelLinear) else Shard(columns, 0, columns)
        if form.act_order and columns < inputs.full:
            raise ValueError("desc_act (act-order) with --tensor-parallel-size above 1 is not supported; quantize without it")
        self.__dict__["layer"] = layer  # not as a part of the model
        self.inputs, self.shard_ids, self.bits = inputs, layer.shard_ids, form.bits
        size = self.file_group_size = form.columns_in_group(inputs.full)
        is_whole = inputs.start % size == 0 and (inputs.stop % size == 0 or inputs.stop == inputs.full)
        self.group_size = size if is_whole else math.gcd(size, inputs.start, inputs.stop)
        groups = -(-columns // self.group_size)
        layer.register_parameter("weight", None)
        self.codes = parameter(rows, columns, dtype=form.code_type)
        self.scales = parameter(rows, groups, dtype=torch.float32)
        self.zeros = parameter(rows, groups, dtype=torch.float32) if form.code_type != FLOAT8 else None
        self.order = parameter(columns, dtype=torch.int64) if form.act_order else None
        self.knows_order, self.rounds_inputs = False, form.rounds_inputs
        self.bias = layer.bias

    def weight_loader(self, param: nn.Parameter, loaded: Tensor, shard_id: str | None = None) -> None:
        """Take this rank's part of a piece's codes, scales, zeros or bias. The order of columns is one for all pieces, for they
        have the same input.

        Raises:
            ValueError: the checkpoint's tensor has another shape, or another order.
        """
        if param is self.order:
            if self.knows_order and not torch.equal(param.data, loaded):
                raise ValueError("act-order has sorted the inputs of layers that are merged here in different ways")
            copy_weight(param, loaded)
            self.knows_order = True
            return
        if param is self.scales or param is self.zeros:
            check_size(loaded, 1, -(-self.inputs.full // self.file_group_size))
            loaded = loaded.repeat_interleave(self.file_group_size // self.group_size, dim=1)
            loaded = loaded.narrow(1, self.inputs.start // self.group_size, param.shape[1])
            if isinstance(self.layer, RowParallelLinear):
                copy_weight(param, loaded)
                return
        self.layer.weight_loader(param, loaded, shard_id)

    def take(self) -> GroupQuantized | ScaledFloat8:
        """Hand over what is loaded; nothing of it stays here."""
        order = self.order
        if order is not None and torch.equal(order, torch.arange(len(order), device=order.device)):
            order = None
        codes, scales, zeros = self.codes.data, self.scales.data, self.zeros
        quantized: GroupQuantized | ScaledFloat8
        if zeros is None:
            quantized = ScaledFloat8(codes, scales, self.group_size)
        else:
            quantized = GroupQuantized(
                codes, scales, zeros.data, self.bits, self.group_size, None if order is None else order.data
            )
        for name in ("codes", "scales", "zeros", "order"):
            setattr(self, name, None)
        return quantized
