"""The 4-bit Triton kernel against the dequantized product in float64: compiled where there is a GPU, else interpreted."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from solutions.quantization.layout.groups import GroupQuantized, quantize_groups

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.models.kernels.attach import Plan, attach
from solutions.parallelism.linear import Embedding, Linear
from solutions.parallelism.quantized_linear import QuantizedLinear
from solutions.parallelism.tensor_parallel import SINGLE, GateUpParallelLinear, RowParallelLinear, Shard
from solutions.quantization.kernels.w4a16_triton import TritonLinear, supports
from solutions.quantization.layout.checkpoint import QuantizedFormat

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random_weight(outputs: int, inputs: int, size: int, ordered: bool = False) -> GroupQuantized:
    generator = torch.Generator().manual_seed(outputs + inputs)
    groups = math.ceil(inputs / size)
    codes = torch.randint(0, 16, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(outputs, groups, generator=generator) * 0.1 + 0.01).half().float()
    zeros = torch.randint(0, 16, (outputs, groups), generator=generator).float()
    order = torch.randperm(inputs, generator=generator) if ordered else None
    weight = GroupQuantized(codes, scales, zeros, 4, size, order)
    for name in ("codes", "scales", "zeros", "order"):
        if (tensor := getattr(weight, name)) is not None:
            setattr(weight, name, tensor.to(DEVICE))
    return weight


def dense(weight: GroupQuantized) -> torch.Tensor:
    """The matrix in float64, a weight at a time."""
    outputs, inputs = weight.shape
    result = torch.empty(outputs, inputs, dtype=torch.float64)
    order = list(range(inputs)) if weight.order is None else weight.order.tolist()
    codes, scales, zeros = weight.codes.tolist(), weight.scales.tolist(), weight.zeros.tolist()
    for o in range(outputs):
        for j, column in enumerate(order):
            group = j // weight.group_size
            result[o, column] = (codes[o][j] - zeros[o][group]) * scales[o][group]
    return result.to(DEVICE)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "splits"),
    [(64, 32, 32, None), (65, 96, 32, 2), (63, 104, 64, 3), (16, 576, 128, None), (130, 64, 64, 1), (8, 200, 200, 7)],
)
def test_products(outputs, inputs, size, splits, dtype):
    """Tiles with a rest of outputs, groups with a short last one, parts with a rest and without any input."""
    weight = random_weight(outputs, inputs, size)
    assert supports(weight)
    expected = dense(weight)
    linear = TritonLinear(weight, splits)
    for rows in (1, 15, 16, 17, 33):
        wide = torch.randn(rows, 2 * inputs, generator=torch.Generator().manual_seed(rows)).to(DEVICE, dtype)
        x = wide[:, :inputs]
        out = linear(x)
        assert (out.dtype, out.shape) == (dtype, (rows, outputs))
        assert error(out, x.double() @ expected.T) < TOLERANCE[dtype]


def test_columns_in_another_order():
    weight = random_weight(32, 64, 32, ordered=True)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert error(TritonLinear(weight)(x), x.double() @ dense(weight).T) < 1e-5


def test_parts_are_added_in_one_order():
    weight, x = random_weight(32, 256, 32), torch.randn(2, 256, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    linear = TritonLinear(weight, 4)
    assert all(torch.equal(linear(x), linear(x)) for _ in range(3))


def test_what_the_kernel_cannot_take():
    assert not supports(quantize_groups(torch.ones(8, 64), 8, 32))
    assert not supports(quantize_groups(torch.ones(8, 64), 4, 16))
    assert not supports(quantize_groups(torch.ones(8, 60), 4, 32))
    assert supports(quantize_groups(torch.ones(8, 40), 4, -1))


def use_triton(layer: Linear, form: QuantizedFormat, weight: GroupQuantized) -> None:
    """Give a layer quantized weights as a checkpoint would, and Triton's kernels."""
    stand_in = QuantizedLinear(layer, form)
    for name in ("codes", "scales", "zeros"):
        getattr(stand_in, name).data = getattr(weight, name)
    model = torch.nn.ModuleDict({"embedding": Embedding(1, 1), "layer": stand_in})
    attach(model, Plan("triton"))
    assert model["layer"] is layer
    assert stand_in.codes is None  # what remains of the codes, which is nothing


def test_layers_use_it():
    """A quantized layer on Triton: with bias, added to the residual stream, and as gate and up."""
    form = QuantizedFormat("gptq", 4, 32)
    down = RowParallelLinear(Shard(64, 0, 64), 48, True, SINGLE)
    weight = random_weight(48, 64, 32)
    down.bias.data = torch.randn(48, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    use_triton(down, form, weight)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    expected = x.double() @ dense(weight).T + down.bias.double()
    assert error(down(x), expected) < 1e-5
    residual = torch.ones(5, 48, device=DEVICE)
    assert down(x, residual) is residual
    assert error(residual, expected + 1) < 1e-5
    held = sum(p.nbytes for p in down.parameters() if p is not down.bias)
    assert held == 48 * 64 // 2 + 2 * 48 * 2 * 2


def test_gate_and_up():
    config = type("Config", (), {"hidden_size": 32, "intermediate_size": 64, "mlp_bias": False, "hidden_act": "silu"})
    layer = GateUpParallelLinear(config, SINGLE)
    weight = random_weight(128, 32, 32)
    use_triton(layer, QuantizedFormat("awq", 4, 32), weight)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    gate, up = (x.double() @ dense(weight).T).chunk(2, dim=1)
    assert error(layer(x), F.silu(gate) * up) < 1e-4
