"""GPTQ and AWQ: the algorithms against slow ones written from the papers, and the commands on a tiny model."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.models.loader import resolve_model
from solutions.quantization import awq, gptq, layerwise
from solutions.quantization.awq import output_error, quantize_clipped, search_scale
from solutions.quantization.calibration import Calibration, Statistics
from solutions.quantization.gptq import gptq_quantize
from solutions.quantization.layout.groups import quantize_groups
from solutions.quantization.matrices import Fold
from solutions.tests.quantization_cases import correlated, fold_randomly, optimal_brain_quantization, random_weight
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral


@pytest.mark.parametrize(("columns", "size"), [(48, 16), (40, 16), (300, 32), (150, 150), (160, 40)])
@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_is_optimal_brain_quantization_in_a_fixed_order(columns, size, bits):
    weight, x = random_weight(5, columns), correlated(4 * columns, columns)
    hessian = x.T @ x
    expected = optimal_brain_quantization(weight.numpy(), hessian.numpy(), bits, size, 0.01)
    got = gptq_quantize(weight, hessian, bits, size).dequantize().double().numpy()
    step = (weight.max() - weight.min()).item() / (2**bits - 1)
    # where a weight lies between two codes rounding may fall either way in float32, and move what is behind it
    assert (np.abs(got - expected) < 0.05 * step).mean() > 0.97
    wrong = ((got - weight.numpy()) @ x.numpy().T) ** 2
    right = ((expected - weight.numpy()) @ x.numpy().T) ** 2
    assert wrong.sum() == pytest.approx(right.sum(), rel=0.05)


@pytest.mark.parametrize("block", [1, 16, 50, 96, 1000])
def test_how_many_columns_are_gathered_changes_nothing(monkeypatch, block):
    weight, x = random_weight(5, 96), correlated(400, 96)
    expected = gptq_quantize(weight, x.T @ x, 4, 16).dequantize()
    monkeypatch.setattr(gptq, "BLOCK", block)
    got = gptq_quantize(weight, x.T @ x, 4, 16).dequantize()
    assert (got - expected).abs().lt(1e-4).float().mean() > 0.97  # a tie may fall either way


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [32, -1])
def test_gptq_makes_a_smaller_error_than_rounding(symmetric, act_order, size):
    weight, x = random_weight(16, 96), correlated(400, 96)
    hessian = x.T @ x
    rounded = quantize_groups(weight, 4, size, symmetric)
    quantized = gptq_quantize(weight, hessian, 4, size, symmetric, act_order)
    errors = [output_error(q.dequantize() - weight, hessian).sum() for q in (quantized, rounded)]
    assert errors[0] < 0.6 * errors[1]
    assert (quantized.order is not None) == act_order
    if act_order:
        diagonal = hessian.diagonal()[quantized.order]
        assert torch.all(diagonal[:-1] >= diagonal[1:])


def test_gptq_with_inputs_that_are_always_zero():
    weight, x = random_weight(4, 32), correlated(100, 32)
    x[:, [3, 17]] = 0
    quantized = gptq_quantize(weight, x.T @ x, 4, 16).dequantize()
    assert torch.all(quantized[:, [3, 17]] == 0)
    assert bool(quantized.isfinite().all())


def test_a_hessian_that_cannot_be_inverted_is_one_clear_error():
    with pytest.raises(ValueError, match="use more calibration samples or a larger --damping"):
        gptq_quantize(random_weight(4, 8), torch.full((8, 8), torch.nan), 4, 8)


def test_statistics_of_many_parts_are_those_of_the_whole():
    x = correlated(100, 12)
    parts = Statistics.empty(12)
    for piece in x.split([1, 40, 59]):
        parts.add(piece)
    torch.testing.assert_close(parts.covariance, x.T @ x / 100, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(parts.magnitude, x.abs().mean(0), rtol=1e-4, atol=1e-4)


def test_the_searched_scale_is_the_best_of_the_grid():
    weight, x = random_weight(8, 64), correlated(300, 64)
    magnitude = x.abs().mean(0)
    scale = search_scale(weight, magnitude, x.T @ x / len(x), 4, 16, False)
    errors = []
    for step in range(20):
        candidate = magnitude ** (step / 20)
        candidate = candidate / (candidate.max() * candidate.min()).sqrt()
        rounded = quantize_groups(weight * candidate, 4, 16).dequantize() / candidate
        errors.append(float(((x @ (rounded - weight).T) ** 2).mean()))
    best = magnitude ** (errors.index(min(errors)) / 20)
    torch.testing.assert_close(scale, best / (best.max() * best.min()).sqrt())
    assert min(errors) < 0.9 * errors[0]


def test_where_all_inputs_are_alike_nothing_is_scaled():
    weight = random_weight(8, 64)
    assert torch.equal(search_scale(weight, torch.ones(64), torch.eye(64), 4, 16, False), torch.ones(64))


def test_clipping_never_makes_a_groups_error_larger():
    weight, x = random_weight(8, 40), correlated(300, 40)
    weight[0, 5] = 9.0  # an outlier that is worth its steps, or not
    covariance = x.T @ x / len(x)
    for size in (16, -1):
        clipped, rounded = quantize_clipped(weight, covariance, 4, size, False), quantize_groups(weight, 4, size)
        for start in range(0, 40, clipped.group_size):
            part = slice(start, start + clipped.group_size)
            errors = [output_error((q.dequantize() - weight)[:, part], covariance[part, part]) for q in (clipped, rounded)]
            assert torch.all(errors[0] <= errors[1] * 1.0001)


def texts(count: int = 6, length: int = 40) -> Tensor:
    return torch.randint(0, 250, (count, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        (make_tiny_llama, {}),
        (make_tiny_llama, {"num_key_value_heads": 4}),
        (make_tiny_llama, {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
        (make_tiny_mistral, {}),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_folding_scales_leaves_the_models_outputs_as_they_were(tmp_path, make, sizes):
    make(tmp_path, **sizes)
    source = resolve_model(str(tmp_path))
    plain, folded = Calibration(source, texts()), Calibration(source, texts())
    for index in range(len(plain.layers)):
        layer = folded.inputs_of(index)
        folds = fold_randomly(layer, seed=index)
        assert (Fold(("self_attn.o_proj",)) in folds) == (sizes == {"num_key_value_heads": 4})
        assert set(layer.changed) == {"input_layernorm.weight", "post_attention_layernorm.weight"}
        plain.advance(index, {}, {})
        folded.advance(index, {}, {})
        torch.testing.assert_close(folded.hidden, plain.hidden, rtol=1e-3, atol=1e-3)


def command(method: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"solutions.quantization.{method}", *arguments], capture_output=True, text=True, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_command_makes_a_model_that_loads(tmp_path, method):
    make_tiny_llama(tmp_path / "whole")
    (tmp_path / "text").write_text("Alice was beginning to get very tired of sitting by her sister on the bank. " * 20)
    flags = ["--model", str(tmp_path / "whole"), "--output", str(tmp_path / "small"), "--group-size", "16"]
    flags += ["--calibration-file", str(tmp_path / "text"), "--num-samples", "8", "--sequence-length", "64"]
    run = command(method, *flags)
    assert run.returncode == 0, run.stderr
    assert "is ready; try: make serve MODEL=" in run.stdout
    config = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["bits"], config["group_size"]) == (method, 4, 16)
    assert not (tmp_path / "small" / layerwise.WORK).exists()
    settings = {"dtype": "float32", "max_model_len": 64, "num_gpu_blocks_override": 32}
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    totals = []
    for folder in ("whole", "small"):
        output = LLM(str(tmp_path / folder), **settings).generate("Alice was very tired of her sister.", params)[0]
        totals.append(sum(next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]))
    assert totals[0] != totals[1]
    assert totals[1] == pytest.approx(totals[0], rel=0.15)  # random weights: 4 bits are felt, a wrong layout would be far off
    assert "is not empty; choose another folder" in command(method, *flags).stderr


METHODS = {"gptq": gptq, "awq": awq}


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_goes_on_and_gives_the_same_files(tmp_path, capsys, method):
    make_tiny_llama(tmp_path / "whole")
    text = tmp_path / "text"
    text.write_text("Alice was beginning to get very tired of sitting by her sister on the bank. " * 4)
    form = gptq.QuantizedFormat(method, 4, 16, zeros_less_one=method == "gptq")

    def recipe(**changes) -> layerwise.Recipe:
        sizes = {"num_samples": 4, "sequence_length": 24, "calibration_file": str(text)}
        return layerwise.Recipe(method, str(tmp_path / "whole"), 4, 16, **sizes | changes)

    def quantize(output: str, stop_at: int | None = None, settings: layerwise.Recipe | None = None) -> list[int]:
        done = []

        def layer(inputs, what):
            if len(done) == stop_at:
                raise KeyboardInterrupt
            done.append(1)
            return METHODS[method].quantize_layer(inputs, what)

        with contextlib.suppress(KeyboardInterrupt):
            layerwise.quantize_model(settings or recipe(), tmp_path / output, layer, form, progress=False)
        return done

    assert len(quantize("at-once")) == 3
    assert len(quantize("in-two", stop_at=2)) == 2
    assert not (tmp_path / "in-two" / "config.json").exists()
    with pytest.raises(ValueError, match="holds a run with another seed; delete"):
        quantize("in-two", settings=recipe(seed=5))
    with pytest.raises(ValueError, match="tokens and a sample takes 999"):
        quantize("short", settings=recipe(sequence_length=999))
    before = text.read_text()
    text.write_text(before.replace("Alice", "Bob"))
    with pytest.raises(ValueError, match="holds a run with another calibration text; delete"):
        quantize("in-two")
    text.write_text(before)
    assert len(quantize("in-two")) == 1
    assert "2 layers are done" in capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("at-once", "in-two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_model_that_computes_nan_is_one_clear_error(tmp_path):
    make_tiny_llama(tmp_path)
    calibration = Calibration(resolve_model(str(tmp_path)), texts())
    calibration.layers[1].get_parameter("input_layernorm.weight").data[0] = torch.nan
    calibration.advance(0, {}, {})
    with pytest.raises(ValueError, match=r"layer 1, self_attn\.qkv_proj: the model computes NaN or infinity"):
        calibration.inputs_of(1)


def test_what_cannot_be_quantized_is_one_clear_error(tmp_path):
    make_tiny_gpt2(tmp_path / "gpt2")
    make_tiny_llama(tmp_path / "llama")
    (tmp_path / "short").write_text("too short")
    for flags, message in [
        (
            ["--model", str(tmp_path / "gpt2")],
            "models of GPT2LMHeadModel cannot be quantized here",
        ),
        (
            ["--model", str(tmp_path / "llama"), "--calibration-file", str(tmp_path / "short")],
            "has 9 tokens and a sample takes 512",
        ),
        (["--model", str(tmp_path / "llama"), "--group-size", "0"], "--group-size at least 1 or -1"),
    ]:
        for method in (gptq, awq):
            with pytest.raises(SystemExit, match=f"error: .*{message}"):
                method.main([*flags, "--output", str(tmp_path / "out")])
