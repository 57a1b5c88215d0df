"""A model's quantized matrices as the checkpoint keeps them that it was loaded from: its layers, its names, its order of rows.

Here a matrix may have been merged of several layers of a checkpoint, and its rows may stand in another order; or a checkpoint
may have one tensor for all experts. Nobody is asked but the model's own way of loading: the numbers 0, 1, 2, … go through it in
the place of a tensor's rows, and where they arrive is where these rows are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.layers import CausalLM
from ..models.weight_headers import WeightHeaders
from ..parallelism.linear import WeightLayer
from .layout.groups import GroupQuantized


@dataclass(slots=True)
class StoredModel:
    """What a checkpoint holds in the place of the whole model's tensors, by the names that these have there.

    Attributes:
        layers: quantized ones, such as "model.layers.0.mlp.up_proj".
        changed: other tensors with new values; None: it is not kept, as the layers stand for it.
    """

    layers: dict[str, GroupQuantized] = field(default_factory=dict)
    changed: dict[str, Tensor | None] = field(default_factory=dict)


def as_stored(
    model: CausalLM, headers: WeightHeaders, quantized: dict[str, GroupQuantized], changed: dict[str, Tensor]
) -> StoredModel:
    """The results of a run for the files of the model that it began with.

    Args:
        headers: of those files. quantized, changed: by the names of the model's own matrices, and of its parameters.
    """
    stored = StoredModel()
    for name, shape in headers.shapes.items():
        file_name = headers.homes[name][1]
        ours = next(name[:i] for i in range(len(name) + 1) if file_name.endswith(name[i:]))  # of a model that sees, too
        theirs = file_name.removesuffix(name.removeprefix(ours))
        for piece, like in model.pieces(name, torch.empty(shape, device="meta")):
            placed = model.place(piece, like)
            if placed is None:
                continue
            kept_as, matrix = theirs + piece.removeprefix(ours), placed[0].removesuffix(".weight")
            if matrix in quantized and placed[0] != matrix:
                rows = rows_held(model, piece, like.shape)
                stored.layers[kept_as.removesuffix(".weight")] = rows_of(quantized[matrix], rows)
                if kept_as != file_name:
                    stored.changed[file_name] = None
            elif placed[0] in changed:
                stored.changed[file_name] = changed[placed[0]][rows_held(model, piece, like.shape)]
    return stored


def rows_held(model: CausalLM, name: str, shape: torch.Size) -> Tensor:
    """[n]: for each row of a checkpoint's tensor of this shape, which row of the model's parameter holds it."""
    numbers = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    placed = model.place(name, numbers)
    assert placed is not None
    target, shard, tensor = placed
    parent = target.rpartition(".")[0]
    layer, param = model.get_submodule(parent), model.get_parameter(target)
    assert isinstance(layer, WeightLayer)
    arrived = nn.Parameter(torch.full(param.shape, -1), requires_grad=False)
    layer.weight_loader(arrived, tensor, shard)
    first = arrived.data.flatten(1)[:, 0] if arrived.ndim > 1 else arrived.data
    there = (first >= 0).nonzero()[:, 0]
    return there[first[there].argsort()]


def rows_of(weight: GroupQuantized, rows: Tensor) -> GroupQuantized:
    """Some rows of a matrix, in this order."""
    return GroupQuantized(
        weight.codes[rows], weight.scales[rows], weight.zeros[rows], weight.bits, weight.group_size, weight.order
    )
