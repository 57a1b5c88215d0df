"""Weights in float8 against the same sums in float64: the Triton kernels, interpreted where there is no card; what PyTorch
multiplies; and whole models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.parallelism.linear import Linear
from solutions.quantization.kernels.float8_triton import Float8Linear, round_inputs, supports
from solutions.quantization.layout.float8 import ScaledFloat8, has_float8, quantize_float8
from solutions.tests.quantized_folders import SETTINGS, check_against_transformers
from solutions.tests.test_compressed_checkpoints import described, fp8, make
from solutions.tests.tiny_models import make_tiny_llama

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not has_float8(DEVICE), reason="this card has no float8")
EXACT = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
SIZES = {"hidden_size": 160, "intermediate_size": 200, "num_attention_heads": 5, "num_key_value_heads": 1}
ON_TRITON = {"attention_backend": "triton", "enable_cpu_kernels": False}


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def random_weight(outputs: int, inputs: int, size: int) -> ScaledFloat8:
    groups = -(-inputs // size)
    return ScaledFloat8(
        (random(outputs, inputs) * 60).to(torch.float8_e4m3fn), (random(outputs, groups).abs() + 0.1) / 60, size
    )


def dense(codes: Tensor, scales: Tensor, size: int) -> Tensor:
    """In float64, a group at a time."""
    parts = [codes[:, i : i + size].double() * scales[:, i // size, None].double() for i in range(0, codes.shape[1], size)]
    return torch.cat(parts, dim=1)


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    ("outputs", "inputs", "size", "splits", "rounds"),
    [(65, 200, 200, None, True), (64, 384, 128, 2, True), (72, 300, 128, None, True), (64, 256, 256, 1, False),
     (63, 300, 128, 3, False), (48, 96, 96, None, True)],
)  # fmt: skip
def test_products(outputs: int, inputs: int, size: int, splits: int | None, rounds: bool, dtype: torch.dtype) -> None:
    """Tiles with a rest, a short last group, parts of the inputs; the last case is PyTorch's where the type is bfloat16."""
    weight, bias = random_weight(outputs, inputs, size), random(outputs).to(dtype)
    assert supports(weight)
    linear = Float8Linear(weight, rounds, bias, splits)
    matrix = dense(weight.codes, weight.scales, size)
    for rows in (0, 1, 17, 33):
        x = random(rows, 2 * inputs).to(dtype)[:, :inputs]
        whole = dense(*round_inputs(x, size), size) if rounds and rows else x.double()
        expected = whole @ matrix.T + bias.double()
        out = linear(x)
        assert (out.dtype, out.shape) == (dtype, (rows, outputs))
        assert not rows or error(out, expected) < EXACT[dtype]
        onto = torch.ones_like(out)
        assert linear(x, onto) is onto
        assert torch.equal(onto, 1 + out)


@pytest.mark.parametrize("size", [3, 64, 130])
def test_inputs_are_rounded_to_the_nearest(size: int) -> None:
    """A group's largest magnitude becomes 448; others are the nearest of all 256 numbers, and a group of zeros stays zeros."""
    x = random(2, 130)
    x[1, :size] = 0.0
    codes, scales = round_inputs(x, size)
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    grid = grid[grid.isfinite()].to(DEVICE)
    for i in range(0, 130, size):
        group, scale = x[:, i : i + size].double(), scales[:, i // size, None].double()
        largest = group.abs().amax(dim=1, keepdim=True)
        assert torch.allclose(scale, torch.where(largest > 0, largest / 448, 1.0), rtol=1e-6)
        wanted = (group / scale)[..., None]
        off = (codes[:, i : i + size].double() - wanted[..., 0]).abs()
        assert bool((off <= (grid - wanted).abs().amin(dim=-1) + 1e-4).all())


def test_a_row_of_weights_is_rounded_by_its_largest() -> None:
    weight = random(7, 33)
    weight[2] = 0.0
    rounded = quantize_float8(weight)
    assert torch.equal(rounded.codes.float().abs().amax(dim=1), torch.tensor([448.0] * 2 + [0.0] + [448.0] * 4, device=DEVICE))
    far = (rounded.dequantize() - weight).abs() / weight.abs().clamp(min=weight.abs().amax() / 4096)
    assert float(far.max()) < 2**-4 + 1e-3  # 3 bits of mantissa, halves to even


def test_what_the_kernel_cannot_take() -> None:
    assert not supports(random_weight(8, 256, 64))
    assert not supports(random_weight(8, 300, 192))
    assert supports(random_weight(8, 300, 256))
    assert supports(random_weight(8, 36, 36))
    for rows, columns, size in ((48, 96, 96), (40, 96, 96), (48, 100, 100), (48, 256, 128)):  # cards want multiples of 16
        assert Float8Linear(random_weight(rows, columns, size)).by_torch is ((rows, columns, size) == (48, 96, 96))


def test_the_capability_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, has in (((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, said=capability: said)
        assert has_float8(torch.device("cuda")) is has
    assert has_float8(torch.device("cpu"))


def on_codes(model: nn.Module) -> list[bool]:
    """Which linear layers multiply float8; the head, the last one, never does."""
    return [isinstance(layer.multiply, Float8Linear) for layer in model.modules() if isinstance(layer, Linear)]


@pytest.mark.parametrize("block", [[128, 128], pytest.param(None, marks=pytest.mark.slow)])
def test_a_checkpoint_runs_on_its_codes(block: list[int] | None, tmp_path: Path) -> None:
    """A scale for each row, and blocks that no side is a multiple of; log-probabilities are those of rounded activations."""
    description = {"quant_method": "fp8", "weight_block_size": block}
    paths = make(tmp_path, description, fp8("row" if block is None else "block", "weight_scale_inv", (128, 128)), **SIZES)
    check_against_transformers(*paths)  # the CPU's own kernels have plain weights
    check_against_transformers(*paths, 2.0, **ON_TRITON)
    with pytest.raises(AssertionError):
        check_against_transformers(*paths, 1e-4, **ON_TRITON)
    assert on_codes(LLM(str(paths[1]), **SETTINGS, **ON_TRITON).llm_engine.executor.worker.model) == [True] * 4 + [False]


def test_weights_for_whole_activations(tmp_path: Path) -> None:
    """compressed-tensors that says nothing of activations: only weights are rounded, as they are in the file."""
    paths = make(tmp_path, described(8, "float", "float-quantized"), fp8("row"))
    check_against_transformers(*paths, **ON_TRITON)
    model = LLM(str(paths[1]), **SETTINGS, **ON_TRITON).llm_engine.executor.worker.model
    assert on_codes(model) == [True] * 4 + [False]


def test_the_flag_rounds_any_model(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    make_tiny_llama(folder, num_hidden_layers=1)
    with pytest.raises(ModelError, match="no fp8 checkpoint; int8 and int4 round any model on a CPU, fp8 on a GPU of compute"):
        LLM(str(folder), **SETTINGS, quantization="fp8", attention_backend="torch")
    model = LLM(str(folder), **SETTINGS, quantization="fp8", **ON_TRITON).llm_engine.executor.worker.model
    plain = LLM(str(folder), **SETTINGS, **ON_TRITON).llm_engine.executor.worker.model
    layer, other = (m.model.layers[0].mlp.down_proj for m in (model, plain))
    assert on_codes(model) == [True] * 4 + [False]
    x = random(5, layer.multiply.codes.shape[1])
    assert 1e-4 < error(layer(x), other(x).double()) < 0.1
