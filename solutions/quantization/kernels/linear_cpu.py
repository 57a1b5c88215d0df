"""Matrix products with packed weights on a CPU, by ``linear_cpu.cpp``: in the weights' own type, in int8 or in int4.

int8 quantizes each output channel of the weights when they are packed, and groups of `INT8_GROUP` activations of a token as
they come (W8A8; Dettmers et al., "LLM.int8()", NeurIPS 2022, §2.1). A scale is the largest magnitude over 127. One scale for
a whole token would do for most, but a few channels are so large that the others would have hardly any steps left.

int4 quantizes groups of `INT4_GROUP` weights to nearest, and the same groups of activations to int8 (W4A8; Lin et al.,
"QServe", MLSys 2025). Weights that come in groups of 4 or 8 bits from a checkpoint leave the activations as they are (W4A16,
W8A16), for which its quantizer chose them. Decoding waits for memory, which has less than a third of the bytes to deliver.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.platform import native
from ...core.platform.huge_pages import empty_in_huge_pages
from ..layout.groups import GroupQuantized, quantize_groups

INT8_GROUP = 96
"""Activations of a token that share a scale: of the default model's widths a divisor."""
INT4_GROUP = 32
"""Columns that share a scale where the engine itself quantizes to int4: as in a Q4_1 file, whose weights so stay exact."""
STORE, ADD, SILU_MUL = 0, 1, 2

_NAMES = {torch.float32: "f32", torch.bfloat16: "bf16"}


class _Linear(native.Arguments):
    """`Linear` of the C++ file."""

    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "w", "scales", "bias", "y", "other_x", "of_groups", "order")] + [
        (name, ctypes.c_int64) for name in ("ldx", "ldy", "n", "k", "epilogue", "group", "more")
    ]


@dataclass(frozen=True, slots=True)
class Layout:
    """What the kernels, as they are built for this processor, want weights and activations to look like.

    Attributes:
        panel: rows of weights that lie side by side.
        bfloat16, int8: what tiles read of x in the place of a bfloat16, and of a byte.
    """

    panel: int
    bfloat16: torch.dtype
    int8: torch.dtype


@functools.cache
def layout() -> Layout:
    """What `linear_layout` in the C++ file says."""
    numbers = (ctypes.c_int64 * 3)()
    native.loaded().linear_layout(numbers)
    panel, of_bfloat16, of_int8 = numbers
    return Layout(panel, torch.bfloat16 if of_bfloat16 == 2 else torch.float32, torch.uint8 if of_int8 == 1 else torch.int16)


def supports(dtype: torch.dtype, in_features: int, quantization: str | None = None) -> bool:
    """Whether a matrix can be packed: the kernels are built, and have code for this type and number of columns."""
    return dtype in _NAMES and in_features % (16 if quantization == "int8" else 2) == 0 and native.load() is not None


def supports_groups(dtype: torch.dtype, weight: GroupQuantized) -> bool:
    """Whether a quantized matrix can be packed. Scales and zeros become halves, which those of 8 bits have to be already: their
    codes are finer than what halves would round away."""
    if weight.bits == 8 and any(not torch.equal(x.half().float(), x) for x in (weight.scales, weight.zeros - 128)):
        return False
    return weight.group_size % 2 == 0 and supports(dtype, weight.shape[1])


def supports_rows(dtype: torch.dtype, weight: GroupQuantized) -> bool:
    """Whether a matrix of 8 bits can be packed for activations in int8: a row has one scale, and zero is in the middle."""
    is_plain = weight.bits == 8 and weight.order is None and bool((weight.zeros == 128).all())
    return is_plain and bool((weight.scales == weight.scales[:, :1]).all()) and supports(dtype, weight.shape[1], "int8")


class PackedLinear:
    """One matrix of [N, K], packed.

    Args:
        weight: [N, K], float32 or bfloat16, or quantized in groups of an even number of columns. With `gated` the first half
            of the rows is the gate, the second is up.
        bias: [N] or None.
        quantization: None, "int8" or "int4". With a quantized weight "int8" says that activations become bytes, for which it
            has to be as `supports_rows` wants it.
        gated: the product is followed by ``silu(gate) · up``, so the result has N / 2 columns.
        dtype: of the activations; default: that of `weight`.

    Attributes:
        kind: of its results' buffer in a recording, where they shall outlast those of other products.
        weight: the packed weights in the kernel's order: [P, K / g, panel, g] for P panels in the weights' own type; of int8
            and int4 the bytes of each, sums, scales and zeros among them, [P, B].
    """

    def __init__(
        self, weight: Tensor | GroupQuantized, bias: Tensor | None, quantization: str | None = None, gated: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        self.kind = "linear"
        self.num_rows, self.num_columns = weight.shape
        self.out_features = self.num_rows // 2 if gated else self.num_rows
        self.epilogue = SILU_MUL if gated else STORE
        rows = gate_and_up_order(self.num_rows) if gated else slice(None)
        if dtype is None:
            assert isinstance(weight, Tensor)  # codes do not say what is computed in
            dtype = weight.dtype
        self._dtype = dtype
        operand = layout().bfloat16 if dtype is torch.bfloat16 else dtype
        w4a8 = False
        if quantization == "int4" and not isinstance(weight, GroupQuantized):
            w4a8 = self.num_columns % 16 == 0
            weight = quantize_groups(weight, 4, INT4_GROUP, whole_zeros=False)
        self.scales = self.order = None
        self._scratch: tuple[int, torch.dtype, int] | None = None
        """Memory that the kernel needs for a row of x: in another form, of what type, and how many groups."""
        group = 0
        if isinstance(weight, GroupQuantized) and w4a8:
            kind, group = "w4a8_", INT4_GROUP
            self._scratch = (self.num_columns, layout().int8, 2 * weight.scales.shape[1])
            self.weight = pack_groups(weight, rows, 4)
        elif isinstance(weight, GroupQuantized) and quantization != "int8":
            kind, group = "int4_" if weight.bits == 4 else "codes8_", weight.group_size
            is_moved = weight.order is not None or operand is not self._dtype
            self._scratch = (self.num_columns if is_moved else 0, operand, weight.scales.shape[1])
            self.weight = pack_groups(weight, rows)
            self.order = None if weight.order is None else weight.order.to(torch.int32).contiguous()
        elif quantization == "int8":
            kind, group = "int8_", INT8_GROUP
            self._scratch = (self.num_columns, layout().int8, -(-self.num_columns // INT8_GROUP))
            codes, scales = quantize_channels(weight)
            self.scales = _padded(scales[rows])
            self.weight = pack_int8(codes[rows])
        else:
            assert isinstance(weight, Tensor)
            kind = ""
            if operand is not self._dtype:
                self._scratch = (self.num_columns, operand, 0)
            self.weight = pack(weight[rows])
        self.bias = None if bias is None else _padded(bias[rows].float())
        self._arguments = _Linear(n=self.num_rows, k=self.num_columns, w=self.weight.data_ptr(), group=group)
        for field in ("scales", "bias", "order"):
            tensor = getattr(self, field)
            setattr(self._arguments, field, None if tensor is None else tensor.data_ptr())
        self._kernel = native.Kernel(f"linear_{kind}{_NAMES[self._dtype]}", self._arguments)

    def __call__(self, x: Tensor, add_to: Tensor | None = None) -> Tensor:
        """``x · weightᵀ + bias``.

        Args:
            x: [T, K], rows contiguous. add_to: [T, N], to which the result is added in place.

        Returns:
            [T, N], or `add_to`.
        """
        y = native.result(self.kind, len(x), self.out_features, self._dtype) if add_to is None else add_to
        self._run(x, y, self.epilogue if add_to is None else ADD)
        return y

    def before_gate(self, x: Tensor) -> Tensor:
        """What a gated matrix multiplies to, without the gate: [T, K] -> [T, N], in the order of `gate_and_up_order`."""
        y = native.result("linear", len(x), self.num_rows, self._dtype)
        self._run(x, y, STORE)
        return y

    @property
    def addresses(self) -> tuple[int | None, int]:
        """Of the C function and of its arguments, for a kernel that sets those of a call itself."""
        return ctypes.cast(self._kernel.function, ctypes.c_void_p).value, ctypes.addressof(self._arguments)

    @property
    def scratch(self) -> tuple[int, int]:
        """Memory that the kernel needs for a row of x: bytes in another form, and groups."""
        columns, dtype, groups = self._scratch or (0, torch.uint8, 0)
        return columns * dtype.itemsize, groups

    def _run(self, x: Tensor, y: Tensor, epilogue: int) -> None:
        rows, arguments = x.shape[0], self._arguments
        arguments.x, arguments.ldx, arguments.rows = x.data_ptr(), x.stride(0), rows
        arguments.y, arguments.ldy, arguments.epilogue = y.data_ptr(), y.stride(0), epilogue
        if self._scratch is not None:
            columns, dtype, groups = self._scratch
            other_x = native.result("other_x", rows, columns, dtype)
            of_groups = native.result("of_groups", rows, groups, torch.float32)
            arguments.other_x, arguments.of_groups = other_x.data_ptr(), of_groups.data_ptr()
        self._kernel()


def gate_and_up_order(rows: int) -> Tensor:
    """Rows so that one half of each panel is of the gate, the other of up, and both the same.

    Raises:
        ValueError: half of the rows is no multiple of 16, of which half of any processor's panel is a part.
    """
    half = rows // 2
    if half % 16:
        raise ValueError(f"a gated matrix needs a multiple of 32 rows, got {rows}")
    gate = torch.arange(half).view(-1, layout().panel // 2)
    return torch.cat((gate, gate + half), dim=1).flatten()


def quantize_channels(weight: Tensor | GroupQuantized) -> tuple[Tensor, Tensor]:
    """int8 weights [N, K] with a scale [N] float32 for each row, which a quantized matrix has already."""
    if isinstance(weight, GroupQuantized):
        return (weight.codes ^ 128).view(torch.int8), weight.scales[:, 0]
    weight = weight.float()
    scales = weight.abs().amax(dim=1) / 127
    return (weight / scales.clamp_min(1e-30)[:, None]).round_().to(torch.int8), scales


def pack(weight: Tensor) -> Tensor:
    """[N, K] in panels of rows: [P, K / g, panel, g], g values of a row side by side (1 float, 2 bfloat16, 4 int8)."""
    rows, columns = weight.shape
    group, panel = 4 // weight.itemsize, layout().panel
    panels = -(-rows // panel)
    if rows % panel:
        weight = torch.cat((weight, weight.new_zeros(panels * panel - rows, columns)))
    in_order = weight.view(panels, panel, columns // group, group).transpose(1, 2)
    return empty_in_huge_pages(tuple(in_order.shape), weight.dtype).copy_(in_order)


def pack_int8(weight: Tensor) -> Tensor:
    """int8 weights [N, K] as ``Int8`` in ``linear_cpu.h`` reads them.

    Returns:
        Bytes [P, B] for panels of rows; before each group's weights stand the sums of the group.
    """
    panel = layout().panel
    sums = weight.new_zeros(-(-len(weight) // panel) * panel, -(-weight.shape[1] // INT8_GROUP), dtype=torch.int16)
    for group, part in enumerate(weight.split(INT8_GROUP, dim=1)):
        sums[: len(weight), group] = part.sum(dim=1, dtype=torch.int16)
    heads = sums.unflatten(0, (-1, panel)).transpose(1, 2).contiguous().view(torch.uint8)  # [P, G, 2 * panel]
    return _with_heads(heads, pack(weight).view(torch.uint8).flatten(2), INT8_GROUP // 4)


def _with_heads(heads: Tensor, body: Tensor, length: int) -> Tensor:
    """[P, B]: each panel's groups one behind the other, a head [P, G, ...] before `length` rows of the body [P, R, ...]."""
    pieces: list[Tensor] = []
    for group in range(heads.shape[1]):
        pieces += heads[:, group], body[:, group * length : (group + 1) * length].flatten(1)
    packed = torch.cat(pieces, dim=1)
    return empty_in_huge_pages(tuple(packed.shape), torch.uint8).copy_(packed)


def pack_groups(weight: GroupQuantized, rows: slice | Tensor = slice(None), together: int = 2) -> Tensor:
    """Codes with their scales and zeros, as ``linear_groups_cpu.h`` reads them: bytes [P, B] for panels of rows.

    Args:
        rows: which, in which order. together: columns that lie side by side: 2, or 4 where activations are bytes.

    Raises:
        ValueError: columns or groups are no even numbers.
    """
    columns, size = weight.shape[1], weight.group_size
    if columns % 2 or size % 2:
        raise ValueError(f"codes need even numbers of columns, got {columns} in groups of {size}")

    panel = layout().panel

    def panels(values: Tensor) -> Tensor:  # [N, x] -> [P, panel, x]
        values = values[rows]
        missing = values.new_zeros(-len(values) % panel, values.shape[1])
        in_panels: Tensor = torch.cat((values, missing)).unflatten(0, (-1, panel))
        return in_panels

    in_panels = panels(weight.codes).unflatten(2, (-1, together)).transpose(1, 2)  # [P, K / t, panel, t]
    if weight.bits == 4:
        low, high = in_panels.chunk(2, dim=2)
        codes = (low | high << 4).flatten(2)  # [P, K / t, panel / 2 * t]
    else:
        codes = (in_panels ^ 128).flatten(2)  # [P, K / t, panel * t]
    head = torch.stack((panels(weight.scales), panels(weight.zeros - 2 ** (weight.bits - 1))), dim=1)  # [P, 2, panel, G]
    head = head.permute(0, 3, 1, 2).to(torch.float16).contiguous().view(torch.uint8).flatten(2)  # [P, G, 4 * panel]
    return _with_heads(head, codes, size // together)


def unpack(packed: Tensor, rows: int) -> Tensor:
    """The [rows, K] matrix that `pack` was given."""
    panels, groups, panel, group = packed.shape
    return packed.transpose(1, 2).reshape(panels * panel, groups * group)[:rows]


def _padded(values: Tensor) -> Tensor:
    """Zeros at the end up to a whole panel, where the kernel reads them."""
    missing = -len(values) % layout().panel
    return torch.cat((values, values.new_zeros(missing))).contiguous()
