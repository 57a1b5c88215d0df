"""Layers with weights, whole: what the parallel layers cut. A layer knows how a checkpoint's tensors become its parameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def parameter(*shape: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """Memory for a weight of this shape, which is not trained; `dtype` None: of the type that is computed in."""
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Layer(nn.Module):
    """A module whose result is one tensor."""

    __call__: Callable[..., Tensor]


class WeightLayer(Layer):
    """A layer with weights.

    Attributes:
        shard_ids: pieces that a checkpoint keeps apart and this layer merges into one parameter; (None,): no pieces.
    """

    shard_ids: tuple[str | None, ...] = (None,)

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
    """``x · weightᵀ + bias``. The weight is [out, in]; `weight` is another layer's that this one shares."""

    def __init__(self, in_features: int, out_features: int, bias: bool, weight: nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = parameter(out_features, in_features) if weight is None else weight
        self.bias = parameter(out_features) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]."""
        return self.multiply(x)

    def multiply(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """The product itself, whatever a kind of layer does around it: what a kernel takes the place of. With `add_to` [T, out]
        the result is added to that in place."""
        y = F.linear(x, self.weight, self.bias)
        return y if add_to is None else add_to.add_(y)


class Embedding(WeightLayer):
    """A row for each token id or position."""

    def __init__(self, rows: int, size: int) -> None:
        super().__init__()
        self.weight = parameter(rows, size)

    def forward(self, ids: Tensor) -> Tensor:  # [T] -> [T, hidden]
        return F.embedding(ids, self.weight)
