"""GPTQ and AWQ files: read and written here against readers and writers made from the layouts alone, bit by bit."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.quantization.layout.checkpoint import QuantizedFormat, write_model
from solutions.quantization.layout.groups import GroupQuantized, quantize_groups
from solutions.tests.quantized_folders import SETTINGS, check_against_transformers
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral


def as_int32(word: int) -> int:
    return word - 2**32 if word >= 2**31 else word


def packed_layer(method: str, codes, zeros, scales, groups, bits: int, zeros_less_one: bool) -> dict[str, Tensor]:
    """A layer as its file has it, packed word by word: codes [in][out], zeros and scales [G][out], each input's group."""
    n_in, n_out, per_word = len(codes), len(codes[0]), 32 // bits

    def words(values) -> list[int]:
        return [
            as_int32(sum(int(v) << (bits * i) for i, v in enumerate(values[w : w + per_word])))
            for w in range(0, len(values), per_word)
        ]

    if method == "awq":
        nibbles = [0, 2, 4, 6, 1, 3, 5, 7]

        def shuffled(row):
            return [row[8 * (w // 8) + nibbles[w % 8]] for w in range(len(row))]

        return {
            "qweight": torch.tensor([words(shuffled(row)) for row in codes], dtype=torch.int32),
            "qzeros": torch.tensor([words(shuffled(row)) for row in zeros], dtype=torch.int32),
            "scales": torch.tensor(scales, dtype=torch.float16),
        }
    columns = [words([codes[i][o] for i in range(n_in)]) for o in range(n_out)]
    stored = [[(z - zeros_less_one) % 2**bits for z in row] for row in zeros]
    return {
        "qweight": torch.tensor(columns, dtype=torch.int32).t().contiguous(),
        "qzeros": torch.tensor([words(row) for row in stored], dtype=torch.int32),
        "scales": torch.tensor(scales, dtype=torch.float16),
        "g_idx": torch.tensor(groups, dtype=torch.int32),
    }


def random_layer(numbers: random.Random, n_out: int, n_in: int, size: int, bits: int, order: list[int]):
    """codes, zeros, scales, groups in the form of `packed_layer`, and the weight [out, in] that they stand for."""
    num_groups = math.ceil(n_in / size)
    groups = [0] * n_in
    for place, column in enumerate(order):
        groups[column] = place // size
    codes = [[numbers.randrange(2**bits) for _ in range(n_out)] for _ in range(n_in)]
    zeros = [[numbers.randrange(1, 2**bits) for _ in range(n_out)] for _ in range(num_groups)]
    step = 0.9 / 2**bits
    scales = [[float(torch.tensor(step * (0.5 + numbers.random())).half()) for _ in range(n_out)] for _ in range(num_groups)]
    weight = [[(codes[i][o] - zeros[groups[i]][o]) * scales[groups[i]][o] for i in range(n_in)] for o in range(n_out)]
    return (codes, zeros, scales, groups), torch.tensor(weight, dtype=torch.float32)


def quantize_folder(path: Path, target: Path, method: str, size: int, bits=4, act_order=False, zeros_less_one=True) -> None:
    """Put random quantized weights in the place of a tiny model's, into `path` as plain ones and into `target` packed."""
    tensors, packed, numbers = load_file(path / "model.safetensors"), {}, random.Random(0)
    orders: dict[tuple[str, int], list[int]] = {}
    for name, tensor in list(tensors.items()):
        conv = "gpt2" in json.loads((path / "config.json").read_text())["model_type"]
        if tensor.ndim != 2 or any(word in name for word in ("embed", "lm_head", "wte", "wpe")):
            packed[name] = tensor
            continue
        n_out, n_in = tensor.shape[::-1] if conv else tensor.shape
        layer = name.rpartition(".")[0]
        group_of = (layer.rpartition(".")[0], n_in)  # layers with one input have one order
        width = n_in if size == -1 else size
        if group_of not in orders:
            orders[group_of] = random.Random(n_in).sample(range(n_in), n_in) if act_order else list(range(n_in))
        parts, weight = random_layer(numbers, n_out, n_in, width, bits, orders[group_of])
        tensors[name] = weight.t().contiguous() if conv else weight
        packed |= {f"{layer}.{part}": value for part, value in packed_layer(method, *parts, bits, zeros_less_one).items()}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    target.mkdir()
    for file in path.iterdir():
        if file.name not in ("model.safetensors", "config.json"):
            (target / file.name).write_bytes(file.read_bytes())
    save_file(packed, target / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    quantization = {"quant_method": method, "bits": bits, "group_size": size}
    quantization |= {"version": "gemm"} if method == "awq" else {"desc_act": act_order}
    if not zeros_less_one:
        quantization["checkpoint_format"] = "gptq_v2"
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


CASES = {
    "gptq": {"method": "gptq", "size": 16},
    "gptq with a short last group": {"method": "gptq", "size": 32},
    "gptq of the second format": {"method": "gptq", "size": 16, "zeros_less_one": False},
    "gptq with act-order": {"method": "gptq", "size": 16, "act_order": True},
    "gptq in 8 bits": {"method": "gptq", "size": 16, "bits": 8},
    "gptq in whole rows": {"method": "gptq", "size": -1},
    "awq": {"method": "awq", "size": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_file_packed_by_the_layout_alone_is_the_model(tmp_path, case):
    make_tiny_llama(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", **CASES[case])
    check_against_transformers(tmp_path / "plain", tmp_path / "packed")
    check_against_transformers(tmp_path / "plain", tmp_path / "packed", enable_cpu_kernels=False)


@pytest.mark.parametrize("make", [make_tiny_mistral, make_tiny_gpt2])
def test_other_models(tmp_path, make):
    make(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", "gptq", 16)
    check_against_transformers(tmp_path / "plain", tmp_path / "packed")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gptq with a short last group", "awq"])
def test_two_ranks_cut_groups(tmp_path, case):
    make_tiny_llama(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", **CASES[case])
    check_against_transformers(tmp_path / "plain", tmp_path / "packed", tensor_parallel_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["gptq with a short last group", "gptq in whole rows"])
def test_through_the_triton_kernel(tmp_path, case):
    pytest.importorskip("triton", reason="Triton is not installed")
    make_tiny_llama(tmp_path / "plain", num_hidden_layers=1)
    quantize_folder(tmp_path / "plain", tmp_path / "packed", **CASES[case])
    settings = {"attention_backend": "triton", "enable_cpu_kernels": False}
    check_against_transformers(tmp_path / "plain", tmp_path / "packed", **settings)


def test_four_bits_are_kept_in_four_bits(tmp_path):
    """2 hidden and 3 MLP matrices a layer, in panels of 32 rows, with 4 bytes of scale and zero for 64 weights at most."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    make_tiny_llama(tmp_path / "plain", **sizes)
    plain = LLM(str(tmp_path / "plain"), **SETTINGS | {"dtype": "bfloat16"}).llm_engine.executor.weight_bytes
    quantize_folder(tmp_path / "plain", tmp_path / "packed", "gptq", 64)
    packed = LLM(str(tmp_path / "packed"), **SETTINGS | {"dtype": "bfloat16"}).llm_engine.executor.weight_bytes
    matrices = 2 * (256 * (256 + 2 * 128 + 256) + 3 * 256 * 512)
    assert plain - packed == pytest.approx(matrices * (2 - 0.5625), rel=0.01)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("size", [16, 40, -1])
def test_packing_and_reading_are_each_others_inverse(method, bits, size):
    if method == "awq" and bits == 8:
        with pytest.raises(ValueError, match="awq with 8 bits"):
            QuantizedFormat.parse({"quant_method": "awq", "bits": 8, "group_size": 16})
        return
    for ordered in (False, True) if method == "gptq" else (False,):
        for less_one in (False, True):
            weight = quantize_groups(torch.randn(24, 96, generator=torch.Generator().manual_seed(0)), bits, size)
            weight.order = torch.randperm(96, generator=torch.Generator().manual_seed(1)) if ordered else None
            form = QuantizedFormat(method, bits, size, ordered, less_one and method == "gptq")
            parts = form.pack(weight)
            assert QuantizedFormat.parse(form.to_config(symmetric=False)) == form
            again = form.unpack(parts)
            rounded = GroupQuantized(
                weight.codes, weight.scales.half().float(), weight.zeros, bits, weight.group_size, weight.order
            )
            assert torch.equal(again.dequantize(), rounded.dequantize())
            for name, tensor in form.pack(again).items():
                assert torch.equal(tensor, parts[name])


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_written_model_reads_as_the_layout_says_and_loads(tmp_path, method):
    make_tiny_llama(tmp_path / "plain")
    tensors = load_file(tmp_path / "plain" / "model.safetensors")
    layers = {
        name.removesuffix(".weight"): quantize_groups(tensor, 4, 32)
        for name, tensor in tensors.items() if tensor.ndim == 2 and "embed" not in name and "lm_head" not in name
    }  # fmt: skip
    form = QuantizedFormat(method, 4, 32, zeros_less_one=method == "gptq")
    write_model(tmp_path / "written", tmp_path / "plain", layers, form, symmetric=False)
    written = load_file(tmp_path / "written" / "model.safetensors")
    for name in layers:
        qweight, qzeros, scales = (written.pop(f"{name}.{part}") for part in ("qweight", "qzeros", "scales"))
        if method == "gptq":
            assert written.pop(f"{name}.g_idx").tolist() == [i // 32 for i in range(layers[name].shape[1])]
        restored = torch.empty(layers[name].shape)
        nibble_of = {column: place for place, column in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
        for o in range(restored.shape[0]):
            for i in range(restored.shape[1]):
                if method == "gptq":
                    code = (int(qweight[i // 8, o]) >> (4 * (i % 8))) & 15
                    zero = ((int(qzeros[i // 32, o // 8]) >> (4 * (o % 8))) & 15) + 1 & 15
                else:
                    code = (int(qweight[i, o // 8]) >> (4 * nibble_of[o % 8])) & 15
                    zero = (int(qzeros[i // 32, o // 8]) >> (4 * nibble_of[o % 8])) & 15
                restored[o, i] = (code - zero) * float(scales[i // 32, o])
        tensors[f"{name}.weight"] = restored
    assert written.keys() == {name for name in tensors if name.removesuffix(".weight") not in layers}
    save_file(tensors, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    check_against_transformers(tmp_path / "plain", tmp_path / "written")


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes are not supported, gptq, awq, compressed-tensors and fp8 are"),
        ({"quant_method": "gptq", "bits": 3, "group_size": 16}, "gptq with 3 bits in groups of 16 is not supported"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "in groups of 0 is not supported"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemv"}, "AWQ layout 'gemv' is not supported"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 64}, "should be"),
        ({"quant_method": "awq", "bits": 4, "group_size": 16}, "g_idx, which is no weight"),
    ],
)
def test_a_wrong_description_is_one_clear_error(tmp_path, quantization, message):
    make_tiny_llama(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", "gptq", 16)
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    (tmp_path / "packed" / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    with pytest.raises(ModelError, match=message):
        LLM(str(tmp_path / "packed"), **SETTINGS)


def test_flags_and_files_must_agree(tmp_path):
    make_tiny_llama(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", "gptq", 16, act_order=True)
    LLM(str(tmp_path / "packed"), **SETTINGS, quantization="gptq")
    for folder, settings, message in [
        ("packed", {"quantization": "awq"}, "is quantized already, with gptq; leave the flag out"),
        ("packed", {"quantization": "int4"}, "is quantized already, with gptq"),
        ("packed", {"load_format": "dummy"}, "makes plain weights"),
        ("packed", {"tensor_parallel_size": 2}, "desc_act .*is not supported; quantize without it"),
        ("plain", {"quantization": "gptq"}, "is no gptq checkpoint; make one with python -m solutions.quantization.gptq"),
    ]:
        with pytest.raises(ValueError, match=message):
            LLM(str(tmp_path / folder), **SETTINGS, **settings)


def test_pieces_with_different_orders_cannot_be_merged(tmp_path):
    make_tiny_llama(tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "packed", "gptq", 16, act_order=True)
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.g_idx"
    tensors[name] = tensors[name].flip(0).contiguous()
    save_file(tensors, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="has sorted the inputs of layers that are merged here in different ways"):
        LLM(str(tmp_path / "packed"), **SETTINGS)
