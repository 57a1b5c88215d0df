"""The pass over a loaded model that lets its linear layers add what adapters say; it comes behind the one for kernels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ...parallelism.linear import Linear
from ...parallelism.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from ..config.entries import ModelError
from ..kernels.attach import packed_of, put
from ..layers import CausalLM
from .adapter_files import Adapter, read_adapter
from .products import AdaptedProduct, AdaptersOfStep
from .products_cpu import AdaptedGate, NativeProduct


class ModelAdapters:
    """The adapters of one rank's part of a model, each in a numbered slot; slot 0 is none.

    Attributes:
        step: which rows of the step are whose.
    """

    def __init__(self, model: CausalLM, hidden_size: int, num_slots: int, max_rank: int) -> None:
        embedding = next(model.parameters())
        self.model, self.max_rank = model, max_rank
        self.step = AdaptersOfStep(embedding.device)
        self._products: dict[str, AdaptedProduct] = {}
        for name, layer in model.named_modules():
            if isinstance(layer, ColumnParallelLinear | RowParallelLinear):
                self._products[name] = _adapt(layer, hidden_size, self.step, embedding.dtype, num_slots)

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
            product = self._products.get(name)
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


def _adapt(layer: Linear, hidden_size: int, step: AdaptersOfStep, dtype: torch.dtype, num_slots: int) -> AdaptedProduct:
    packed = packed_of(layer)
    if packed is None:
        product = AdaptedProduct(layer, layer.multiply, hidden_size, step, dtype)
        put(layer, "multiply", product)
        return product
    native_product = NativeProduct(layer, packed, hidden_size, step, dtype, num_slots)
    if layer.forward is packed:  # product and gate in one
        put(layer, "forward", AdaptedGate(packed, native_product, dtype))
    else:
        put(layer, "multiply", native_product)
    return native_product
