"""The layouts in which checkpoints keep quantized weights, by the method that a ``quantization_config`` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from .blocks import read_blocks
from .checkpoint import QuantizedFormat
from .compressed import FP8_METHODS, read_compressed, read_fp8
from .float8 import ScaledFloat8
from .groups import GroupQuantized
from .mxfp4 import read_mxfp4


class Format(Protocol):
    """How a checkpoint, or one of its layers, keeps weights; a dataclass.

    Attributes:
        parts: names of the tensors that may stand for a layer. mark: one that every quantized layer has, for messages.
        ignored: tensors beside them that say nothing of weights. has_codes: whether a layer can hold them as `unpack` gives
            them; if not, it gets a plain weight. code_type: of the codes, uint8 or float8.
        rounds_inputs: activations are to be rounded to 8 bits, whole numbers or floats as weights are, where a kernel can.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def method(self) -> str: ...
    @property
    def bits(self) -> int: ...
    @property
    def act_order(self) -> bool: ...
    @property
    def has_codes(self) -> bool: ...
    @property
    def code_type(self) -> torch.dtype: ...
    @property
    def rounds_inputs(self) -> bool: ...
    @property
    def parts(self) -> tuple[str, ...]: ...
    @property
    def ignored(self) -> tuple[str, ...]: ...
    @property
    def mark(self) -> str: ...

    def of_layer(self, name: str, found: Mapping[str, str]) -> Format | None: ...
    def columns_in_group(self, columns: int) -> int: ...
    def unpack(self, parts: dict[str, Tensor]) -> GroupQuantized | ScaledFloat8 | Tensor: ...


READERS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "compressed-tensors": read_compressed, "gguf": read_blocks, "mxfp4": read_mxfp4, **dict.fromkeys(FP8_METHODS, read_fp8)
}  # fmt: skip
"""Those of GPTQ and AWQ, and of whoever names no method, is `QuantizedFormat.parse`."""


def read_format(config: Any) -> Format:
    """Understand a ``quantization_config``.

    Raises:
        ValueError: it names a method or a layout that cannot be read here.
    """
    method = config.get("quant_method") if isinstance(config, dict) else None
    reader = READERS.get(method.lower()) if isinstance(method, str) else None
    return QuantizedFormat.parse(config) if reader is None else reader(config)
