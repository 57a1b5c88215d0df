"""The Triton product of adapters against sums in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from solutions.models.lora.adapter_files import Part
from solutions.models.lora.products import AdaptedProduct, AdaptersOfStep
from solutions.parallelism.tensor_parallel import ColumnParallelLinear, Shard

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.models.lora.products_triton import TritonProduct

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Case:
    """A layer of pieces with an adapter of each of these ranks; those of an odd slot know only the last piece."""

    def __init__(self, inputs: int, sizes: tuple[int, ...], ranks: tuple[int, ...], dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(inputs)
        self.dtype, self.inputs, self.sizes = dtype, inputs, sizes
        self.layer = ColumnParallelLinear(inputs, {str(i): Shard(n, 0, n) for i, n in enumerate(sizes)}, bias=False)
        self.layer.weight = nn.Parameter(self.random(sum(sizes), inputs).to(DEVICE), requires_grad=False)
        self.parts: list[list[Part]] = [[]]
        for slot, rank in enumerate(ranks, 1):
            chosen = [len(sizes) - 1] if slot % 2 else range(len(sizes))
            halves = [(i, self.random(rank, inputs), self.random(sizes[i], rank)) for i in chosen]
            self.parts.append([Part(str(i), a.float(), b.float()) for i, a, b in halves])
        self.step = AdaptersOfStep(DEVICE)

    def random(self, *shape: int) -> Tensor:
        return (torch.randn(shape, generator=self.generator) / shape[-1] ** 0.5).to(self.dtype)

    def product(self, kind: type[AdaptedProduct] = TritonProduct) -> AdaptedProduct:
        more = {"num_slots": len(self.parts) - 1} if kind is TritonProduct else {}
        product = kind(self.layer, self.layer.multiply, self.inputs, self.step, self.dtype, **more)
        for slot, parts in enumerate(self.parts[1:], 1):
            product.load(slot, parts)
        return product

    def expected(self, x: Tensor, slots: list[int]) -> Tensor:
        """A row at a time."""
        y = x.double().cpu() @ self.layer.weight.double().cpu().t()
        for row, slot in enumerate(slots):
            for part in self.parts[slot]:
                first = sum(self.sizes[: int(part.shard or 0)])
                y[row, first : first + len(part.b)] += part.b.double() @ (part.a.double() @ x[row].double().cpu())
        return y

    def check(self, product: AdaptedProduct, slots: list[int]) -> Tensor:
        x = self.random(len(slots), self.inputs).to(DEVICE)
        self.step.begin(np.array(slots, np.int64))
        got = product(x)
        torch.testing.assert_close(
            got.double().cpu(), self.expected(x, slots), rtol=TOLERANCE[self.dtype], atol=TOLERANCE[self.dtype]
        )  # fmt: skip
        return got


STEPS = {
    "none": [0] * 5, "one": [1] * 3, "some without": [0, 2, 0, 1, 2, 0], "a tile": [1] * 16, "more than a tile": [2] * 17 + [0],
    "all in turns": [i % 9 for i in range(40)], "empty": [],
}  # fmt: skip
RANKS = (1, 8, 17, 3, 16, 33, 2, 64)


@pytest.mark.parametrize("slots", STEPS.values(), ids=STEPS)
def test_each_row_gets_its_own_adapter(slots: list[int]) -> None:
    case = Case(96, (64, 32, 32), RANKS, torch.float32)
    case.check(case.product(), slots)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("inputs", "sizes"), [(1600, (65,)), (22, (7, 1, 90)), (2, (3,)), (576, (63, 130))], ids=str)
def test_sizes_that_fit_no_block(inputs: int, sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    case = Case(inputs, sizes, RANKS, dtype)
    for slots in STEPS.values():
        case.check(case.product(), slots)


def test_it_says_what_the_torch_product_says() -> None:
    case = Case(64, (48, 16), RANKS[:3], torch.float32)
    slots, x = [3, 1, 0, 2, 3], case.random(5, 64).to(DEVICE)
    case.step.begin(np.array(slots))
    torch.testing.assert_close(case.product()(x), case.product(AdaptedProduct)(x), rtol=1e-5, atol=1e-5)


def test_an_adapter_leaves_its_slot_and_another_comes() -> None:
    case = Case(64, (48, 16), (4, 8), torch.float32)
    product, kept = case.product(), case.parts[1]
    for parts in ([], case.parts[2], kept):
        case.parts[1] = parts
        product.load(1, parts)
        case.check(product, [1, 0, 1, 2])
        case.check(product, [1, 1])


def test_it_adds_to_the_residual_stream_and_reads_rows_that_lie_apart() -> None:
    case = Case(64, (48,), (4, 17), torch.float32)
    slots, wide, stream = [1, 2, 0], case.random(3, 100).to(DEVICE), torch.ones(3, 60, device=DEVICE)[:, :48]
    case.step.begin(np.array(slots))
    x = wide[:, :64]
    assert case.product()(x, stream) is stream
    torch.testing.assert_close(stream.double().cpu(), 1 + case.expected(x, slots), rtol=1e-5, atol=1e-5)


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    case = Case(96, (64, 32), (5, 17), torch.float32)
    product, x, slots = case.product(), case.random(20, 96).to(DEVICE), [2, 1] * 10
    plain = torch.zeros(20, 96, device=DEVICE)
    case.step.begin(np.array(slots))
    product.add(x, plain)
    for row in (0, 1, 19):
        alone = torch.zeros(1, 96, device=DEVICE)
        case.step.begin(np.array(slots[row : row + 1]))
        product.add(x[row : row + 1], alone)
        assert torch.equal(alone[0], plain[row])
