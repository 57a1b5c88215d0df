"""A model rounded to nearest (RTN), in GPTQ's layout: what GPTQ and AWQ are compared with."""

from __future__ import annotations

from pathlib import Path

from ..models.loader import resolve_model
from ..models.model_files import weight_files
from ..models.weight_headers import WeightHeaders
from .as_stored import as_stored
from .calibration import Calibration
from .layout.checkpoint import QuantizedFormat, write_model
from .layout.groups import quantize_groups
from .matrices import matrices_of, plain_weight


def write_rounded(model: str, folder: Path, group_size: int) -> None:
    """Write the model into a folder, its matrices in 4 bits, a scale and a zero for each group of a row."""
    source = resolve_model(model)
    assert source.path is not None  # its weights are read
    whole = Calibration.load(source)
    rounded = {
        f"model.layers.{index}.{name}": quantize_groups(plain_weight(matrix).data, 4, group_size)
        for index, layer in enumerate(whole.model.layers)
        for name, matrix in matrices_of(layer).items()
    }
    headers = WeightHeaders.open(weight_files(source.path, ""))
    form = QuantizedFormat("gptq", 4, group_size, zeros_less_one=True)
    stored = as_stored(whole, headers, rounded, {})
    write_model(folder, source.path, stored.layers, form, symmetric=False, changed=stored.changed, files=headers.files)
