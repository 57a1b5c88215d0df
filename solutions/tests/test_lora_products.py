"""What adapters add to a layer's product, by the C++ kernel and by PyTorch, against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from solutions.core.platform import native
from solutions.models.lora.adapter_files import Part
from solutions.models.lora.products import AdaptedProduct, AdaptersOfStep
from solutions.models.lora.products_cpu import AdaptedGate, NativeProduct
from solutions.parallelism.tensor_parallel import ColumnParallelLinear, Shard
from solutions.quantization.kernels.linear_cpu import PackedLinear

RANKS = (1, 5, 16, 512)
SLOTS = np.array([0, 3, 1, 1, 0, 2, 3, 4, 1] + [2] * 70)  # more than a thread takes at once


def exact(tensor: Tensor) -> NDArray[np.float64]:
    return tensor.double().numpy()


class Case:
    """A layer of pieces with an adapter of each rank, of which the one of rank 5 knows only the last piece."""

    def __init__(self, columns: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(columns)

        def random(*shape: int) -> Tensor:
            return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

        self.layer = ColumnParallelLinear(columns, {str(i): Shard(n, 0, n) for i, n in enumerate(sizes)}, bias=False)
        self.layer.weight = nn.Parameter(random(sum(sizes), columns), requires_grad=False)
        self.x = random(len(SLOTS), columns)
        self.parts = []
        self.added = np.zeros((len(SLOTS), sum(sizes)))
        for slot, rank in enumerate(RANKS, 1):
            chosen = [len(sizes) - 1] if rank == 5 else range(len(sizes))
            parts = [Part(str(i), random(rank, columns).float(), random(sizes[i], rank).float()) for i in chosen]
            self.parts.append(parts)
            rows = slot == SLOTS
            for part in parts:
                first = sum(sizes[: int(part.shard)])
                self.added[rows, first : first + len(part.b)] += exact(self.x)[rows] @ exact(part.a).T @ exact(part.b).T

    def load(self, product: AdaptedProduct) -> None:
        for slot, parts in enumerate(self.parts, 1):
            product.load(slot, parts)


TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2}}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("columns", "sizes"), [(64, (96, 32, 32)), (576, (64,)), (22, (7, 1, 90)), (2, (3,))])
@pytest.mark.parametrize("by", [AdaptedProduct, NativeProduct])
def test_each_row_gets_its_own_adapter(
    by: type[AdaptedProduct], columns: int, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    case, step = Case(columns, sizes, dtype), AdaptersOfStep(torch.device("cpu"))
    if by is NativeProduct:
        if native.load() is None:
            pytest.skip("needs the C++ kernels")
        product: AdaptedProduct = NativeProduct(case.layer, PackedLinear(case.layer.weight, None), columns, step, dtype, 4)
    else:
        product = AdaptedProduct(case.layer, case.layer.multiply, columns, step, dtype)
    case.load(product)
    plain = exact(case.x) @ exact(case.layer.weight).T
    step.begin(SLOTS)
    np.testing.assert_allclose(exact(product(case.x)), plain + case.added, **TOLERANCE[dtype])
    stream = torch.ones(len(SLOTS), sum(sizes), dtype=dtype)
    assert product(case.x, stream) is stream
    np.testing.assert_allclose(exact(stream), 1 + plain + case.added, **TOLERANCE[dtype])
    product.load(3, [])
    left = np.where((SLOTS == 3)[:, None], 0, case.added)
    np.testing.assert_allclose(exact(product(case.x)), plain + left, **TOLERANCE[dtype])
    step.begin(np.zeros(len(SLOTS), np.int64))
    np.testing.assert_allclose(exact(product(case.x)), plain, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels")
def test_a_gate_comes_behind_what_adapters_add(dtype: torch.dtype) -> None:
    case, step = Case(64, (80, 80), dtype), AdaptersOfStep(torch.device("cpu"))
    packed = PackedLinear(case.layer.weight, None, gated=True)
    product = NativeProduct(case.layer, packed, 64, step, dtype, 4)
    gate = AdaptedGate(packed, product, dtype)
    case.load(product)
    for slots in (SLOTS, np.zeros(len(SLOTS), np.int64)):
        step.begin(slots)
        both = exact(case.x) @ exact(case.layer.weight).T + np.where(slots[:, None] > 0, case.added, 0)
        first, second = np.split(both, 2, axis=1)
        np.testing.assert_allclose(exact(gate(case.x)), first / (1 + np.exp(-first)) * second, **TOLERANCE[dtype])


@pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels")
def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    case, step = Case(64, (96, 32), torch.bfloat16), AdaptersOfStep(torch.device("cpu"))
    product = NativeProduct(case.layer, PackedLinear(case.layer.weight, None), 64, step, torch.bfloat16, 4)
    case.load(product)
    step.begin(SLOTS)
    together = product(case.x)
    for row in range(len(SLOTS)):
        step.begin(SLOTS[row : row + 1])
        assert torch.equal(product(case.x[row : row + 1]), together[row : row + 1])


@pytest.mark.skipif(native.load() is None, reason="needs the C++ kernels")
def test_a_layer_that_no_adapter_of_the_step_changes_stays_as_it_is() -> None:
    case, step = Case(64, (96, 32), torch.float32), AdaptersOfStep(torch.device("cpu"))
    packed = PackedLinear(case.layer.weight, None)
    product = NativeProduct(case.layer, packed, 64, step, torch.float32, 4)
    step.begin(SLOTS)
    assert torch.equal(product(case.x), packed(case.x))
