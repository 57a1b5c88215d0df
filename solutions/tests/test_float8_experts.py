"""Experts in float8: their grouped product against the same sums in float64, layers with it, and whole checkpoints. Where there
is no card Triton's interpreter runs the kernels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.models.kernels import attach as passes
from solutions.models.kernels.attach import Plan, attach
from solutions.models.kernels.experts_triton import GroupedPlain, TritonExperts
from solutions.models.moe import Experts
from solutions.parallelism.linear import Linear
from solutions.parallelism.tensor_parallel import SINGLE, TensorParallel
from solutions.quantization.kernels.float8_triton import Float8Linear, round_inputs
from solutions.quantization.kernels.grouped_float8_triton import GroupedFloat8
from solutions.quantization.layout.float8 import has_float8, quantize_float8
from solutions.tests.quantized_folders import PROMPTS, SETTINGS, check_against_transformers
from solutions.tests.test_compressed_checkpoints import FP8, described, fp8, make
from solutions.tests.test_float8 import EXACT, ON_TRITON, dense, error, random, random_weight
from solutions.tests.test_moe import BLOCKS, tokens
from solutions.tests.test_moe import make as make_layer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(not has_float8(DEVICE), reason="this card has no float8")
BLOCKED = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def some_experts(count: int, outputs: int, inputs: int, size: int, rounds: bool, biased: bool) -> list[Float8Linear]:
    bias = random(outputs) if biased else None
    weights = [random_weight(outputs, inputs, size) for _ in range(count)]
    for number, weight in enumerate(weights):  # no two alike
        weight.codes, weight.scales = weight.codes.roll(number, 0).contiguous(), weight.scales * (1 + number)
    return [Float8Linear(weight, rounds, None if bias is None else bias + n) for n, weight in enumerate(weights)]


@pytest.mark.parametrize("dtype", EXACT, ids=str)
@pytest.mark.parametrize(
    ("counts", "outputs", "inputs", "size", "rounds", "biased"),
    [([0, 3, 0, 1], 70, 200, 200, True, False), ([17, 0, 2, 35], 64, 300, 128, True, True), ([1], 63, 96, 96, False, True),
     ([5, 2], 72, 384, 256, False, False), ([0, 0], 64, 128, 128, True, False)],
)  # fmt: skip
def test_products(
    counts: list[int], outputs: int, inputs: int, size: int, rounds: bool, biased: bool, dtype: torch.dtype
) -> None:
    """Experts with many rows and with none; rows of nobody stay as they are; tiles with a rest, a short last group."""
    products = some_experts(len(counts), outputs, inputs, size, rounds, biased)
    for product in products:
        product.bias = None if product.bias is None else product.bias.to(dtype)
    assert GroupedFloat8.fit(products)
    grouped = GroupedFloat8(products)
    x = random(sum(counts) + 2, inputs).to(dtype)
    bounds = torch.tensor([1, *counts], device=DEVICE).cumsum(0)
    out = grouped(x, bounds, torch.full((len(x), outputs), 7.0, dtype=dtype, device=DEVICE))
    assert bool((out[[0, -1]] == 7.0).all())
    whole = dense(*round_inputs(x, size), size) if rounds else x.double()
    for number, product in enumerate(products):
        first, last = int(bounds[number]), int(bounds[number + 1])
        if first == last:
            continue
        few = x[first:last][:3]
        expected = whole[first:last] @ dense(product.codes, product.scales.t(), size).T
        expected += 0.0 if product.bias is None else product.bias.double()
        assert error(out[first:last], expected) < EXACT[dtype]
        assert error(product(few), expected[:3]) < EXACT[dtype]  # each by itself computes the same


def test_no_rows_are_no_launch() -> None:
    grouped = GroupedFloat8(some_experts(3, 64, 128, 128, True, False))
    nothing = random(0, 128)
    assert grouped(nothing, torch.zeros(4, dtype=torch.int64, device=DEVICE), random(0, 64)).shape == (0, 64)


def test_which_experts_fit_together() -> None:
    by_blocks, by_rows, whole = (some_experts(2, 64, 256, size, rounds, False) for size, rounds in (
        (128, True), (256, True), (128, False)
    ))  # fmt: skip
    for products in (by_blocks, by_rows, whole):
        assert GroupedFloat8.fit(products)
    for first, second in ((by_blocks, by_rows), (by_blocks, whole), (by_rows, [Linear(256, 64, False).multiply])):
        assert not GroupedFloat8.fit([first[0], second[0]])
    assert not GroupedFloat8.fit([Linear(256, 64, False).multiply])


def rounded(experts: Experts) -> Experts:
    """With plain weights that are what float8 makes of them."""
    for expert in experts.own.values():
        for layer in (expert.gate_up_proj, expert.down_proj):
            layer.weight.data = quantize_float8(layer.weight.data).dequantize()
    return experts


def storages(experts: Experts) -> int:
    return len({param.untyped_storage().data_ptr() for param in experts.parameters()})


@pytest.mark.parametrize("family", BLOCKS)
def test_the_flag_rounds_experts(family: str) -> None:
    """On one rank and on each of two with whole experts: near to what rounded weights say of whole activations, and not equal
    to it, for activations are rounded, too. The router stays as it is."""
    x = tokens(9)
    for parallel in (SINGLE, TensorParallel(0, 2, None, True), TensorParallel(1, 2, None, True)):
        plain, _ = make_layer(family, parallel)
        fast = copy.deepcopy(plain)
        attach(fast, Plan("triton", "fp8"))
        multiply = fast.experts.multiply
        assert isinstance(multiply, TritonExperts)
        assert isinstance(multiply._gate_up, GroupedFloat8)
        assert isinstance(multiply._down, GroupedFloat8)
        has_shared = family == "qwen2_moe" and len(plain.experts.load) - 1 in plain.experts.own
        assert storages(fast.experts) == 4 + 4 * has_shared  # codes and scales, of all routed experts together
        assert fast.gate.weight.dtype == torch.float32
        with torch.no_grad():
            logits = plain.gate(x)
            got, expected = fast.experts(x, logits), rounded(plain.experts)(x, logits)
        assert 1e-4 < error(got, expected.double()) < 0.15
        assert fast.experts.load.equal(plain.experts.load)


def test_experts_that_do_not_fit_together_are_plain() -> None:
    """One of them was left out when the checkpoint was made: all are computed as plain weights."""
    plain, _ = make_layer("qwen3_moe")
    rounded(plain.experts)
    fast = copy.deepcopy(plain)
    layers = [expert.gate_up_proj for expert in fast.experts.own.values()]
    for layer in layers[1:]:
        product = Float8Linear(quantize_float8(layer.weight))
        layer.multiply = product
        layer.weight, layer.scales = (nn.Parameter(each, requires_grad=False) for each in (product.codes, product.scales))
    fast.experts.multiply = TritonExperts(fast.experts, torch.float32)
    assert isinstance(fast.experts.multiply._gate_up, GroupedPlain)
    x = tokens(7)
    with torch.no_grad():
        logits = plain.gate(x)
        torch.testing.assert_close(fast.experts(x, logits), plain.experts(x, logits), atol=2e-5, rtol=1e-4)
    assert not any(isinstance(layer.multiply, Float8Linear) for layer in layers)


def log_probabilities(path: Path) -> tuple[list[object], list[float]]:
    """What the experts' products of a model are made by, and what it says of a text."""
    llm = LLM(str(path), **SETTINGS, **ON_TRITON)
    try:
        layers = [layer.multiply for layer in llm.llm_engine.executor.worker.model.modules() if isinstance(layer, Experts)]
        params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, logprobs=0, prompt_logprobs=0)
        (output,) = llm.generate([{"prompt_token_ids": PROMPTS[1]["prompt_token_ids"][:9]}], params, use_tqdm=False)
        entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        said = [entry.logprob for position in entries for entry in position.values()]
        grouped = [layer for layer in layers if isinstance(layer, TritonExperts)]
        return [product for layer in grouped for product in (layer._gate_up, layer._down)], said
    finally:
        llm.llm_engine.close()


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepseek_v3", "qwen2_moe", "gpt_oss"))]
)
def test_a_checkpoint_with_blocks_runs_on_its_codes(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSeek-V3 and Qwen3 are published: blocks of 128 × 128 that no side of these experts is a multiple of. Grouped
    products say what those of each expert by itself say; `test_float8` has what these are."""
    _, folder = make(tmp_path, BLOCKED, fp8("block", "weight_scale_inv", (128, 128)), ".weight", family)
    products, said = log_probabilities(folder)
    if family == "gpt_oss":  # whose experts lie in one tensor, which `make` leaves as it is
        assert all(isinstance(product, GroupedPlain) for product in products)
        return
    assert all(isinstance(product, GroupedFloat8) and product.rounds_inputs for product in products)
    monkeypatch.setattr(passes, "_attach_grouped", lambda experts, dtype: None)
    products, expected = log_probabilities(folder)
    assert products == []
    assert said == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_weights_alone_are_what_the_file_says(tmp_path: Path) -> None:
    """compressed-tensors that says nothing of activations: they stay whole, and so results are exact."""
    paths = make(tmp_path, described(8, "float", "float-quantized"), fp8("row"), "experts", "qwen3_moe")
    check_against_transformers(*paths, 2e-3, **ON_TRITON)
    assert all(isinstance(product, GroupedFloat8) for product in log_probabilities(paths[1])[0])


@pytest.mark.slow
def test_blocks_that_no_tile_fits_are_plain(tmp_path: Path) -> None:
    description = FP8 | {"weight_block_size": [20, 36]}
    paths = make(tmp_path, description, fp8("block", "weight_scale_inv"), "experts", "mixtral")
    check_against_transformers(*paths, 2e-3, **ON_TRITON)
    assert all(isinstance(product, GroupedPlain) for product in log_probabilities(paths[1])[0])
