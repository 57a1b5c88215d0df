"""A model rounded to nearest (RTN), in GPTQ's layout: what GPTQ and AWQ are compared with."""

from __future__ import annotations

from pathlib import Path

from ..models.loader import resolve_model
from .calibration import MATRICES, Calibration, matrix_of, plain_weight
from .layerwise import split_pieces
from .layout.checkpoint import QuantizedFormat, write_model
from .layout.groups import GroupQuantized, quantize_groups


def write_rounded(model: str, folder: Path, group_size: int) -> None:
    """Write the model into a folder, its matrices in 4 bits, a scale and a zero for each group of a row."""
    source = resolve_model(model)
    assert source.path is not None  # its weights are read
    layers: dict[str, GroupQuantized] = {}
    for index, layer in enumerate(Calibration.load(source).model.layers):
        for name in MATRICES:
            matrix = matrix_of(layer, name)
            quantized = quantize_groups(plain_weight(matrix).data, 4, group_size)
            layers |= split_pieces(matrix, f"model.layers.{index}.{name}", quantized)
    form = QuantizedFormat("gptq", 4, group_size, zeros_less_one=True)
    write_model(folder, source.path, layers, form, symmetric=False)
