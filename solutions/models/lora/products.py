"""A linear layer's product with what the adapters of the step add to it.

Tokens of several adapters stand in one step. The layer's own product is made for all rows at once, whatever it is made by. Then
each adapter's rows are taken out, multiplied by its A and B, and added where they came from: two small products a layer for
each adapter in the step. (Chen et al., "Punica", 2023, make them of all adapters together, as ``products_cpu.py`` and
``products_triton.py`` do.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...parallelism.linear import Linear
from ...parallelism.tensor_parallel import ColumnParallelLinear, RowParallelLinear, Shard, check_size
from ..moe import Router
from .adapter_files import Part

TILE, SPAN = 16, 64
"""Rows of one adapter that are computed together at most, by a Triton program and by a thread of the C++ kernel."""
MAX_TOKENS = 1 << 20
"""Of a step on a CPU; memory that no step has used costs nothing."""


class AdaptersOfStep:
    """Which rows of the step are whose; all layers of a model share one of these, and all its experts another.

    Attributes:
        active: whether the step has any adapter. What follows is valid only then.
        of_experts: slots whose adapters change an expert. reaches_experts: whether the step has one of these.
        slots: [T], of each row, on the device; of a step alone, not of an expert's rows.
        groups: (slot, first, end) for each slot of the step, 0 among them: its rows are `order` from first to end.
        fixed_order, fixed_spans: on a CPU, [T] and [N, 3], `order` and `spans` of SPAN rows with a slot of -1 behind them, at
            the start of memory that stays, for kernels that are replayed.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.active = self.reaches_experts = False
        self.of_experts: set[int] = set()
        self._slots = np.empty(0, np.int64)
        self.groups: list[tuple[int, int, int]] = []
        self._order = np.empty(0, np.int64)
        size = MAX_TOKENS if device.type == "cpu" else 0
        self.fixed_order, self.fixed_spans = np.empty(size, np.int64), np.empty((size, 3), np.int64)

    def begin(self, adapters: NDArray[np.int64]) -> None:
        """Note a step: [T], the slot of each token's adapter, or 0 for none."""
        self.active, self.reaches_experts = bool(adapters.any()), False
        if self.active:
            order = np.argsort(adapters, kind="stable")
            slots, starts = np.unique(adapters[order], return_index=True)
            ends = [*starts[1:].tolist(), len(adapters)]
            self._slots = adapters
            self.__dict__.pop("slots", None)
            self.arrange(order, list(zip(slots.tolist(), starts.tolist(), ends, strict=True)))
            self.reaches_experts = not self.of_experts.isdisjoint(slots.tolist())

    def arrange(self, order: NDArray[np.int64], groups: list[tuple[int, int, int]]) -> None:
        """Note rows whose `groups` are known, at least one of them with an adapter."""
        self.active, self._order, self.groups = True, order, groups
        for made in ("order", "rows", "tiles"):
            self.__dict__.pop(made, None)
        if self.device.type == "cpu":
            spans = [*self.spans(SPAN), (-1, 0, 0)]
            self.fixed_order[: len(order)], self.fixed_spans[: len(spans)] = order, spans

    def spans(self, most: int) -> list[tuple[int, int, int]]:
        """`groups`, cut into spans of so many rows at most."""
        return [(slot, at, min(at + most, end)) for slot, first, end in self.groups for at in range(first, end, most)]

    @cached_property
    def slots(self) -> Tensor:
        return torch.from_numpy(self._slots).to(self.device)

    @cached_property
    def order(self) -> Tensor:
        """[T], the rows of the step by their slots, on the device."""
        return torch.from_numpy(self._order).to(self.device)

    @cached_property
    def rows(self) -> list[tuple[int, Tensor]]:
        """(slot, its rows) for each adapter."""
        return [(slot, self.order[first:end]) for slot, first, end in self.groups if slot]

    @cached_property
    def tiles(self) -> Tensor:
        """[N, 3] int32, on the device: the `spans` of TILE rows that have an adapter."""
        spans = [span for span in self.spans(TILE) if span[0]]
        return torch.tensor(spans, dtype=torch.int32).to(self.device)


Weights = tuple[Tensor, list[Tensor]]
"""An adapter's part of a layer: A of all pieces one below the other, [pieces · r, in], and each piece's B, [out, r]."""


class AdaptedProduct:
    """Takes the place of `Linear.multiply`.

    Args:
        layer: whose product it is. product: what `multiply` was. hidden_size: of the model.
        step: says which rows are whose.
        dtype: of the activations.
    """

    def __init__(
        self, layer: Linear, product: Callable[..., Tensor], hidden_size: int, step: AdaptersOfStep, dtype: torch.dtype
    ) -> None:
        self.product, self.step, self.dtype = product, step, dtype
        whole = Shard(hidden_size, 0, hidden_size)
        self.inputs = layer.inputs if isinstance(layer, ColumnParallelLinear | RowParallelLinear) else whole
        self.pieces = {"": whole}
        if isinstance(layer, ColumnParallelLinear):
            self.pieces = layer.pieces
        elif isinstance(layer, Router):
            sizes = {"routed": layer.count, "shared": 1}
            self.pieces = {name: Shard(sizes[name], 0, sizes[name]) for name in sizes if name in ("routed", *layer.shard_ids)}
        self._weights: dict[int, Weights | None] = {}

    def check(self, parts: list[Part]) -> None:
        """See that an adapter is one for a layer of this shape.

        Raises:
            ValueError: it is not.
        """
        names = [name for part in parts for name in self._pieces_of(part)]
        if len(names) != len(set(names)):
            raise ValueError("the layer, or a piece of it, is there twice")
        for part in parts:
            check_size(part.a, 1, self.inputs.full)
            if part.shard is not None and part.shard not in self.pieces:
                raise ValueError(f"the layer has no piece {part.shard}")
            check_size(part.b, 0, sum(self.pieces[name].full for name in self._pieces_of(part)))

    def _pieces_of(self, part: Part) -> list[str]:
        return list(self.pieces) if part.shard is None else [part.shard]

    def load(self, slot: int, parts: list[Part]) -> None:
        """Take this rank's part of an adapter that fits; without parts the slot adds nothing."""
        if not parts:
            self._keep(slot, None)
            return
        rank = max(len(part.a) for part in parts)
        names = list(self.pieces)
        a = torch.zeros(len(names), rank, len(self.inputs), dtype=self.dtype)
        b = [torch.zeros(len(piece), rank, dtype=self.dtype) for piece in self.pieces.values()]
        for part in parts:
            chosen = self._pieces_of(part)
            sizes = [self.pieces[name].full for name in chosen]
            for name, rows in zip(chosen, part.b.split(sizes), strict=True):
                at, r = names.index(name), len(part.a)
                a[at, :r] = self.inputs.of(part.a, dim=1)
                b[at][:, :r] = self.pieces[name].of(rows)
        device = self.step.device
        self._keep(slot, (a.flatten(0, 1).to(device), [each.to(device) for each in b]))

    def _keep(self, slot: int, weights: Weights | None) -> None:
        """Hold what a slot adds from now on; None: nothing."""
        self._weights[slot] = weights

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """[T, in] -> [T, out]; see `Linear.multiply`."""
        y = self.product(x, add_to)
        if self.step.active:
            self.add(x, y)
        return y

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add to `y` [T, out] what each row's adapter says of `x` [T, in]."""
        for slot, rows in self.step.rows:
            weights = self._weights[slot]
            if weights is None:
                continue
            a, b = weights
            inner = (x[rows] @ a.t()).chunk(len(b), dim=1)  # [rows, r] for each piece
            y.index_add_(0, rows, torch.cat([part @ each.t() for part, each in zip(inner, b, strict=True)], dim=1))
