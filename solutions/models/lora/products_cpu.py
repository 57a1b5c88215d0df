"""A packed layer's product with what adapters add, on a CPU in C++ (``lora_cpu.cpp``): one kernel for any number of adapters,
which can be recorded and replayed."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.platform import native
from ...parallelism.linear import Linear
from ...quantization.kernels.linear_cpu import PackedLinear
from .products import AdaptedProduct, AdaptersOfStep, Weights

BLOCK, COLS = 64, 4
"""As in the C++ file."""
_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Adapter(ctypes.Structure):
    """`Adapter` of the C++ file."""

    _fields_ = (("a", ctypes.c_void_p), ("b", ctypes.c_void_p), ("rank", ctypes.c_int64))


class _Adapted(native.Arguments):
    """`Adapted` of the C++ file."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "gated", "order", "spans", "adapters", "columns")),
        *((name, ctypes.c_int64) for name in ("ldx", "ldy", "k", "pieces")),
    )


class NativeProduct(AdaptedProduct):
    """`AdaptedProduct` around a `PackedLinear`.

    Args:
        num_slots: most adapters.
    """

    def __init__(
        self, layer: Linear, product: PackedLinear, hidden_size: int, step: AdaptersOfStep, dtype: torch.dtype,
        num_slots: int,
    ) -> None:  # fmt: skip
        super().__init__(layer, product, hidden_size, step, dtype)
        self.packed = product
        sizes = [len(piece) for piece in self.pieces.values()]
        self._table = (_Adapter * (num_slots + 1))()
        self._columns = (ctypes.c_int64 * len(sizes))(*sizes)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}  # what the table points to
        self._arguments = _Adapted(
            order=step.fixed_order.ctypes.data, spans=step.fixed_spans.ctypes.data, adapters=ctypes.addressof(self._table),
            columns=ctypes.addressof(self._columns), k=len(self.inputs), pieces=len(sizes),
        )  # fmt: skip
        self._kernel = native.Kernel(f"adapt_{_NAMES[dtype]}", self._arguments)

    @property
    def addresses(self) -> tuple[int | None, int]:
        """Of the C function and of its arguments, for a kernel that sets those of a call itself."""
        return ctypes.cast(self._kernel.function, ctypes.c_void_p).value, ctypes.addressof(self._arguments)

    def _keep(self, slot: int, weights: Weights | None) -> None:
        if weights is None:
            self._table[slot].rank = 0
            return
        a = F.pad(weights[0], (0, 0, 0, -len(weights[0]) % COLS))
        b = torch.cat([_in_blocks(each) for each in weights[1]])
        self._held[slot] = a, b
        entry = self._table[slot]
        entry.a, entry.b, entry.rank = a.data_ptr(), b.data_ptr(), b.shape[1]

    def add(self, x: Tensor, y: Tensor, gated: Tensor | None = None) -> None:
        """Add to `y` what the rows' adapters say of `x`; or with `gated` [T, N / 2] put the gate of that sum there. Then `y` is
        one of `PackedLinear.before_gate`, and stays."""
        arguments = self._arguments
        arguments.rows, arguments.x, arguments.ldx = len(x), x.data_ptr(), x.stride(0)
        arguments.y, arguments.ldy = y.data_ptr(), y.stride(0)
        arguments.gated = None if gated is None else gated.data_ptr()
        self._kernel()


def _in_blocks(b: Tensor) -> Tensor:
    """[out, r] as the kernel reads it: [blocks, r, BLOCK], the last block filled up with zeros."""
    blocks: Tensor = F.pad(b.t(), (0, -len(b) % BLOCK)).unflatten(1, (-1, BLOCK)).transpose(0, 1)
    return blocks


class AdaptedGate:
    """Takes the place of the `forward` of a gated layer whose kernel makes product and gate in one: in a step with adapters the
    gate has to wait for what they add.

    Args:
        fused: that kernel. product: what adapters add to it.
    """

    def __init__(self, fused: PackedLinear, product: NativeProduct, dtype: torch.dtype) -> None:
        self.fused, self.product, self.dtype = fused, product, dtype

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden] -> [T, local I]."""
        if not self.product.step.active:
            return self.fused(x)
        gated = native.result("linear", len(x), self.fused.out_features, self.dtype)
        self.product.add(x, self.fused.before_gate(x), gated)
        return gated
