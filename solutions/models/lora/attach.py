"""The pass over a loaded model that lets its linear layers add what adapters say; it comes behind the one for kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ...parallelism.linear import Linear
from ...parallelism.tensor_parallel import SINGLE, ColumnParallelLinear, RowParallelLinear
from ..config.entries import ModelError
from ..kernels.attach import packed_of, put
from ..layers import CausalLM
from ..moe import Experts, Router
from ..sparse import SparseForCausalLM
from .adapted_experts_cpu import NativeAdaptedExperts
from .adapter_files import Adapter, read_adapter
from .experts import AdaptedExperts
from .products import AdaptedProduct, AdaptersOfStep
from .products_cpu import AdaptedGate, NativeProduct

_EXPERTS = ".experts."
"""In the names of experts' layers."""


class ModelAdapters:
    """The adapters of one rank's part of a model, each in a numbered slot; slot 0 is none.

    Args:
        hidden_size: of the model. num_slots, max_rank: most adapters, and their highest rank.
        kernels: what the model's layers compute with, see `Plan`.

    Attributes:
        step: which rows of the step are whose.
    """

    def __init__(
        self, model: CausalLM, hidden_size: int, num_slots: int, max_rank: int, kernels: str | None = None
    ) -> None:  # fmt: skip
        embedding = next(model.parameters())
        self.max_rank = max_rank
        self.step, of_expert = AdaptersOfStep(embedding.device), AdaptersOfStep(embedding.device)
        self._products: dict[str, AdaptedProduct] = {}
        for name, layer in reversed(list(model.named_modules())):  # what a layer consists of comes before it
            if isinstance(layer, Experts):
                native = NativeAdaptedExperts(layer, num_slots + 1) if NativeAdaptedExperts.fits(layer) else None
                put(layer, "forward", AdaptedExperts(layer, self.step, of_expert, num_slots + 1, native))
            elif _can_be_adapted(layer):
                step = of_expert if _EXPERTS in name else self.step
                self._products[name] = _product(layer, hidden_size, step, embedding.dtype, num_slots, kernels)
        self.model, self._shapes = model, self._products
        if isinstance(model, SparseForCausalLM) and len(model.mine) < model.mine.full:  # adapters may change others' experts
            with torch.device("meta"):
                self.model = type(model)(model.config, SINGLE)
            layers = ((name, layer) for name, layer in self.model.named_modules() if _can_be_adapted(layer))
            self._shapes = {
                name: AdaptedProduct(layer, layer.multiply, hidden_size, self.step, embedding.dtype) for name, layer in layers
            }

    def begin(self, adapters: NDArray[np.int64]) -> None:
        """Note which adapter each token of the step has, [T] slots."""
        self.step.begin(adapters)

    def read(self, folder: Path) -> Adapter:
        """Read an adapter and see that it fits; any thread may.

        Raises:
            ModelError: it does not; the message says why.
        """
        adapter = read_adapter(folder, self.model, self.max_rank)
        for name, parts in adapter.items():
            product = self._shapes.get(name)
            if product is None:
                raise ModelError(
                    f"the adapter changes {name}, and only linear layers between embedding and head of a "
                    f"{type(self.model).__name__} can have one"
                )
            try:
                product.check(parts)
            except ValueError as error:
                raise ModelError(f"the adapter's {name}: {error}") from None
        return adapter

    @torch.inference_mode()
    def load(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter that `read` has given into a slot, in the place of what was there."""
        for name, product in self._products.items():
            product.load(slot, adapter.get(name, []))
        (self.step.of_experts.add if any(_EXPERTS in name for name in adapter) else self.step.of_experts.discard)(slot)


def _can_be_adapted(layer: nn.Module) -> TypeGuard[Linear]:
    return isinstance(layer, ColumnParallelLinear | RowParallelLinear | Router)


def _product(
    layer: Linear, hidden_size: int, step: AdaptersOfStep, dtype: torch.dtype, num_slots: int, kernels: str | None
) -> AdaptedProduct:
    """Put what adapts a layer's product in its place."""
    packed = packed_of(layer)
    if packed is not None:
        native_product = NativeProduct(layer, packed, hidden_size, step, dtype, num_slots)
        if layer.forward is packed:  # product and gate in one
            put(layer, "forward", AdaptedGate(packed, native_product, dtype))
        else:
            put(layer, "multiply", native_product)
        return native_product
    if kernels == "triton":
        from .products_triton import TritonProduct  # Triton takes its time and is not everywhere

        product: AdaptedProduct = TritonProduct(layer, layer.multiply, hidden_size, step, dtype, num_slots)
    else:
        product = AdaptedProduct(layer, layer.multiply, hidden_size, step, dtype)
    put(layer, "multiply", product)
    return product
