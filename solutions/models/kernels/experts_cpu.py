"""A layer's experts on a CPU in C++ (``experts_cpu.cpp``), over the packed products of each."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from ...core.platform import native
from ...quantization.kernels.linear_cpu import PackedLinear
from ..llama import GatedMLP
from ..moe import Experts

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Product(ctypes.Structure):
    """`Product` of the C++ file."""

    _fields_ = (("kernel", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class _Expert(ctypes.Structure):
    """`Expert` of the C++ file."""

    _fields_ = (("gate_up", _Product), ("down", _Product), ("width", ctypes.c_int64))


class _Experts(native.Arguments):
    """`Experts` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "logits", "y", "sorted", "inner", "other_x")),
        *((name, ctypes.c_void_p) for name in ("of_groups", "experts", "load", "numbers", "weights")),
        *((name, ctypes.c_int64) for name in ("ldl", "hidden", "widest", "other_bytes", "groups")),
        *((name, ctypes.c_int64) for name in ("count", "shared", "chosen", "renormalise", "add")),
    )


def packed_products(expert: GatedMLP) -> tuple[PackedLinear, PackedLinear] | None:
    """An expert's products, gate and up in one and down, if both are packed."""
    gate_up, down = expert.gate_up_proj.forward, expert.down_proj.multiply
    return (gate_up, down) if isinstance(gate_up, PackedLinear) and isinstance(down, PackedLinear) else None


class NativeExperts:
    """`Experts.forward`. Where a family chooses in a way of its own, that is PyTorch's, and not to be recorded.

    Args:
        experts: whose products are packed, see `packed_products`; hidden size a multiple of 16.
    """

    def __init__(self, experts: Experts, dtype: torch.dtype) -> None:
        mixture, numbers = experts.mixture, len(experts.load)
        table = (_Expert * numbers)()
        products = {number: packed_products(expert) for number, expert in experts.own.items()}
        self._products = [product for pair in products.values() if pair is not None for product in pair]
        for number, pair in products.items():
            assert pair is not None
            gate_up, down = (_Product(*product.addresses) for product in pair)
            table[number] = _Expert(gate_up, down, pair[1].num_columns)
        self._dtype, self._hidden, self._chosen = dtype, experts.hidden_size, mixture.chosen + numbers - mixture.count
        self._widest = max((each.width for each in table), default=1)
        self._other = max((product.scratch[0] for product in self._products), default=0)
        self._groups = max((product.scratch[1] for product in self._products), default=0)
        self._kept = table, experts.load
        self._choose = None if type(experts).choose is Experts.choose else experts.choose
        self._arguments = _Experts(
            experts=ctypes.addressof(table), load=experts.load.data_ptr(), ldl=numbers, hidden=self._hidden,
            widest=self._widest, other_bytes=self._other, groups=self._groups,
            count=mixture.count, shared=numbers - mixture.count, chosen=mixture.chosen, renormalise=mixture.renormalise,
        )  # fmt: skip
        self._kernel = native.Kernel(f"experts_{_NAMES[dtype]}", self._arguments)

    @property
    def is_whole(self) -> bool:
        """Whether the choice is made in C++, too."""
        return self._choose is None

    def __call__(self, x: Tensor, logits: Tensor, add_to: Tensor | None = None) -> Tensor:
        tokens, arguments = len(x), self._arguments
        y = native.result("experts", tokens, self._hidden, self._dtype) if add_to is None else add_to
        memory = {
            "sorted": native.result("experts_sorted", tokens, self._chosen * self._hidden, self._dtype),
            "inner": native.result("experts_inner", tokens, self._chosen * self._widest, self._dtype),
            "other_x": native.result("experts_other_x", tokens, self._chosen * self._other, torch.uint8),
            "of_groups": native.result("experts_of_groups", tokens, self._chosen * self._groups, torch.float32),
        }
        if self._choose is not None:
            memory["weights"], memory["numbers"] = (chosen.contiguous() for chosen in self._choose(logits))
        for name, tensor in ({"x": x, "logits": logits, "y": y} | memory).items():
            setattr(arguments, name, tensor.data_ptr())
        arguments.rows, arguments.add = tokens, add_to is not None
        self._kernel()
        return y
