"""A layer's experts with what adapters add to their products, on a CPU in C++ (``adapted_experts_cpu.cpp``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...core.platform import native
from ..moe import Experts
from .products_cpu import AdaptedGate, NativeProduct


class _Product(ctypes.Structure):
    """`AdaptedProduct` of the C++ file."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("multiply", "linear", "adapt", "adapters"))


class _Expert(ctypes.Structure):
    """`AdaptedExpert` of the C++ file."""

    _fields_ = (("gate_up", _Product), ("down", _Product), ("width", ctypes.c_int64))


class _Experts(native.Arguments):
    """`AdaptedExperts` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "both", "inner", "other_x", "of_groups", "experts", "bounds")),
        *((name, ctypes.c_int64) for name in ("hidden", "count", "slots", "element")),
    )


class NativeAdaptedExperts:
    """`AdaptedExperts.one_by_one` of experts all of whose products are packed.

    Args:
        num_slots: of adapters, and the one for none.
    """

    def __init__(self, experts: Experts, num_slots: int) -> None:
        self._table = (_Expert * len(experts.load))()
        products: list[NativeProduct] = []
        for number, expert in experts.own.items():
            gate, down = expert.gate_up_proj.forward, expert.down_proj.multiply
            assert isinstance(gate, AdaptedGate)
            assert isinstance(down, NativeProduct)
            addresses = (_Product(*product.packed.addresses, *product.addresses) for product in (gate.product, down))
            self._table[number] = _Expert(*addresses, down.packed.num_columns)
            products += gate.product, down
        self._kept = products
        self._widest = max((product.packed.num_columns for product in products[1::2]), default=1)
        self._other = max((product.packed.scratch[0] for product in products), default=0)
        self._groups = max((product.packed.scratch[1] for product in products), default=0)
        self._arguments = _Experts(
            experts=ctypes.addressof(self._table), hidden=experts.hidden_size, count=len(experts.load), slots=num_slots
        )
        self._kernel = native.Kernel("adapted_experts", self._arguments)

    @staticmethod
    def fits(experts: Experts) -> bool:
        """Whether all products of these experts are packed, the gate within."""
        return all(
            isinstance(expert.gate_up_proj.forward, AdaptedGate) and isinstance(expert.down_proj.multiply, NativeProduct)
            for expert in experts.own.values()
        )

    def __call__(self, rows: Tensor, bounds: Tensor) -> Tensor:
        """See `AdaptedExperts.one_by_one`."""
        out, count, arguments = torch.zeros_like(rows), len(rows), self._arguments
        memory = {
            "both": rows.new_empty(count, 2 * self._widest),
            "inner": rows.new_empty(count, self._widest),
            "other_x": torch.empty(count, self._other, dtype=torch.uint8),
            "of_groups": torch.empty(count, self._groups),
        }
        for name, tensor in ({"x": rows, "y": out, "bounds": bounds} | memory).items():
            setattr(arguments, name, tensor.data_ptr())
        arguments.rows, arguments.element = count, rows.itemsize
        self._kernel()
        return out
