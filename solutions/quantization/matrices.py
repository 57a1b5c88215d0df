"""Which matrices of a model are quantized, and what makes their inputs: asked of its layers, whatever family they are of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.layers import LayerNorm, RMSNorm
from ..models.moe import Experts, Router
from ..parallelism.linear import Linear
from ..parallelism.tensor_parallel import ColumnParallelLinear, GateUpParallelLinear, QKVParallelLinear


@dataclass(frozen=True, slots=True)
class Fold:
    """Matrices with the same inputs, which can be divided by a factor each where they are made.

    Attributes:
        matrices: by their names within the layer, as all names here.
        norm: the norm that makes the inputs; None: rows of a matrix do, see `rows_before`.
        routers: matrices that stay as they are and read the same norm.
    """

    matrices: tuple[str, ...]
    norm: str | None = None
    routers: tuple[str, ...] = ()


def matrices_of(layer: nn.Module) -> dict[str, Linear]:
    """The matrices of a decoder layer that are quantized: all but routers, whose few weights decide too much."""
    return {name: each for name, each in layer.named_modules() if isinstance(each, Linear) and not isinstance(each, Router)}


def plain_weight(matrix: Linear) -> nn.Parameter:
    """[N, K] float32: the weight of a matrix that is not quantized."""
    assert matrix.weight is not None, "the model is loaded in float32"
    return matrix.weight


def pieces_of(matrix: Linear, rows: Tensor) -> dict[str | None, Tensor]:
    """What belongs to each of the pieces of a merged matrix, of a tensor with the matrix's rows; views."""
    if not isinstance(matrix, ColumnParallelLinear):
        return {None: rows}
    return dict(zip(matrix.pieces, rows.split([len(piece) for piece in matrix.pieces.values()]), strict=True))


def rows_before(layer: nn.Module, name: str) -> Tensor | None:
    """The rows of another matrix whose outputs are this one's inputs, up to factors: v's for o_proj, up's for down_proj.

    None: there are none. Behind a bias inputs cannot be divided in rows alone, nor where one row makes several of them, as with
    grouped-query attention.
    """
    parent, _, own = name.rpartition(".")
    beside: dict[str, tuple[str, type[ColumnParallelLinear], str]] = {
        "o_proj": ("qkv_proj", QKVParallelLinear, "v"), "down_proj": ("gate_up_proj", GateUpParallelLinear, "up")
    }  # fmt: skip
    sibling, kind, piece = beside.get(own, ("", ColumnParallelLinear, ""))
    before = getattr(layer.get_submodule(parent), sibling, None)
    if not isinstance(before, kind) or before.bias is not None:
        return None
    rows = pieces_of(before, plain_weight(before).data)[piece]
    matrix = layer.get_submodule(name)
    assert isinstance(matrix, Linear)
    return rows if len(rows) == plain_weight(matrix).shape[1] else None


def readers_of_norms(layer: nn.Module, run: Callable[[], Any]) -> dict[str, list[str]]:
    """Which matrices read what a norm of a layer has made, and nothing else, routers too: by the norm's name.

    It is seen while `run` runs the layer: the very tensor goes from the one to the other. All experts of a layer read rows of
    what is given to the layer's `Experts`. A norm whose result is added to something is read by nobody.
    """
    made: list[tuple[str, Tensor]] = []
    readers: dict[str, list[str]] = {}

    def note(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs, made_now: None if kwargs or len(args) > 1 else made.append((name, made_now))

    def look(name: str, module: nn.Module) -> Callable[..., None]:
        names = [name]
        if isinstance(module, Experts):
            names = [f"{name}.{number}.gate_up_proj" for number in module.own]

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            for norm, output in made:
                if args and args[0] is output:
                    readers.setdefault(norm, []).extend(names)

        return hook

    hooks = []
    for name, module in layer.named_modules():
        if isinstance(module, (RMSNorm, LayerNorm)):
            hooks.append(module.register_forward_hook(note(name), with_kwargs=True))
        elif isinstance(module, (Linear, Experts)):
            hooks.append(module.register_forward_pre_hook(look(name, module)))
    run()
    for each in hooks:
        each.remove()
    return readers
