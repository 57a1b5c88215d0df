"""Adapters of experts as PEFT saves them for models whose experts lie in one tensor, as in transformers 5.

Such a model has no layer for an expert, so PEFT adapts two parameters of all experts (``target_parameters``): A [E · r, in], an
expert's rows one below the other, and B [out, r · E], where the columns of an expert stand E apart. It wraps the module once
for each parameter and says nowhere which wrapper is whose. The sizes do: those of gate and up in one are never those of down.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..config.entries import ModelError
from ..layers import CausalLM
from ..moe import mixture_of
from ..sparse import SparseForCausalLM

WRAPPER = ".base_layer"
"""What PEFT puts into a module's name where it wraps a wrapper."""


def is_of_all_experts(module: str) -> bool:
    """Whether a module of an adapter, as its file names it, stands for all experts of a layer."""
    return module.replace(WRAPPER, "").endswith(".experts")


def matrices(module: str, a: Tensor, b: Tensor, model: CausalLM) -> tuple[str, int, Iterator[tuple[str, Tensor, Tensor]]]:
    """Take the adapter of all experts of a layer apart.

    Args:
        module: as the file names it. a, b: [E · r, in] and [out, r · E].

    Returns:
        The parameter's name, the rank, and of each expert its layer's name with A [r, in] and B [out, r], whose rows are in the
        order of the weight's.

    Raises:
        ModelError: the model has no experts, or other ones.
    """
    experts = module.replace(WRAPPER, "")
    if not isinstance(model, SparseForCausalLM):
        raise ModelError(f"the adapter changes {experts}, and a {type(model).__name__} has no experts")
    mixture, hidden = mixture_of(model.config), model.config.hidden_size
    sizes = {(hidden, 2 * mixture.size): "gate_up_proj", (mixture.size, hidden): "down_proj"}
    matrix, rank = sizes.get((a.shape[1], len(b))), len(a) // mixture.count
    if matrix is None or rank * mixture.count != len(a) or not rank:
        wanted = " or ".join(f"[{mixture.count} · r, {into}] and [{out}, {mixture.count} · r]" for into, out in sizes)
        raise ModelError(f"lora_A {list(a.shape)} and lora_B {list(b.shape)} of {experts}: expected shapes {wanted}")
    name, of_all = f"{experts}.{matrix}", b.unflatten(1, (rank, mixture.count)).permute(2, 0, 1)  # [E, out, r]
    pieces = model.pieces(name, of_all.transpose(1, 2) if model.is_transposed else of_all)
    of_experts = zip(pieces, a.unflatten(0, (mixture.count, rank)), strict=True)
    return name, rank, ((layer.removesuffix(".weight"), of_a, of_b) for (layer, of_b), of_a in of_experts)
