"""Checkpoints of compressed-tensors and in FP8, written in NumPy from the layouts alone, next to the plain model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.quantization.kernels.linear_cpu import PackedLinear
from solutions.quantization.layout.formats import read_format
from solutions.quantization.layout.groups import GroupQuantized
from solutions.tests.quantized_folders import PROMPTS, SETTINGS, check_against_transformers, words
from solutions.tests.tiny_models import FAMILIES, make_tiny, make_tiny_llama

Written = tuple[dict[str, np.ndarray | Tensor], np.ndarray]
"""A layer's tensors in a file, and the weight [out, in] that they stand for."""
Write = Callable[[np.random.Generator, int, int], Written]


def packed(bits: int = 4, size: int = 16, asymmetric: bool = False, sort: bool = False, bytes_: bool = False) -> Write:
    """bytes_: the zeros are whole numbers around 0, as older files have them."""

    def write(numbers: np.random.Generator, rows: int, columns: int) -> Written:
        count, top = (1 if size == -1 else columns // size), 2**bits
        codes = numbers.integers(0, top, (rows, columns))
        scales = ((0.5 + numbers.random((rows, count))) * 0.9 / top).astype(np.float16)
        zeros = numbers.integers(1, top, (rows, count)) if asymmetric else np.full((rows, count), top // 2)
        groups = np.arange(columns) // (columns // count)
        if sort:
            groups = np.random.default_rng(columns).permutation(groups)
        parts: dict[str, Any] = {
            "weight_packed": words(codes, bits), "weight_scale": scales, "weight_shape": np.array([rows, columns]),
        }  # fmt: skip
        if asymmetric:
            parts["weight_zero_point"] = (zeros - top // 2).astype(np.int8) if bytes_ else words(zeros.T, bits).T
        if sort:
            parts["weight_g_idx"] = groups.astype(np.int32)
        return parts, (codes - zeros[:, groups]) * scales[:, groups].astype(np.float32)

    return write


def int8(one: bool = False, asymmetric: bool = False, top: int = 128, halves: bool = False) -> Write:
    def write(numbers: np.random.Generator, rows: int, columns: int) -> Written:
        codes = numbers.integers(-top, top, (rows, columns)).astype(np.int8)
        scales = ((0.5 + numbers.random((1 if one else rows, 1))) / 256).astype(np.float32)
        scales = scales.astype(np.float16).astype(np.float32) if halves else scales
        zeros = numbers.integers(-9, 9, scales.shape).astype(np.int8) if asymmetric else np.zeros_like(scales, np.int8)
        parts: dict[str, Any] = {"weight": codes, "weight_scale": scales[0] if one else scales}
        if asymmetric:
            parts["weight_zero_point"] = zeros[0] if one else zeros
        return parts, (codes.astype(np.float32) - zeros) * scales

    return write


def fp8(kind: str, name: str = "weight_scale", block: tuple[int, int] = (20, 36)) -> Write:
    def write(numbers: np.random.Generator, rows: int, columns: int) -> Written:
        codes = torch.from_numpy(numbers.normal(0, 60, (rows, columns))).to(torch.float8_e4m3fn)
        shapes = {
            "tensor": (1,),
            "scalar": (),
            "row": (rows, 1),
            "flat": (rows,),
            "block": (-(-rows // block[0]), -(-columns // block[1])),
        }
        scales = np.asarray((0.5 + numbers.random(shapes[kind])) / 300, np.float32)
        wide = scales[:, None] if kind == "flat" else scales
        if kind == "block":
            wide = np.repeat(np.repeat(scales, block[0], 0)[:rows], block[1], 1)[:, :columns]
        beside = {"input_scale": np.ones(1, np.float32)} if kind == "tensor" else {}
        return {"weight": codes, name: scales} | beside, codes.float().numpy() * wide

    return write


def described(
    bits: int, kind: str = "int", layout: str = "pack-quantized", inputs: bool = False, **more: Any
) -> dict[str, Any]:
    """As LLM Compressor describes a checkpoint."""
    weights = {"num_bits": bits, "type": kind, "strategy": "channel", "group_size": None, "symmetric": True} | more
    group = {"targets": ["Linear"], "weights": weights, "format": layout, "output_activations": None}
    group["input_activations"] = {"num_bits": 8, "type": kind, "dynamic": True, "strategy": "token"} if inputs else None
    return {
        "quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": group}, "ignore": ["lm_head"],
        "quantization_status": "compressed", "kv_cache_scheme": None, "sparsity_config": {}, "transform_config": {},
    }  # fmt: skip


GROUPS = {"strategy": "group", "group_size": 16}
BLOCKS = {"strategy": "block", "block_structure": [20, 36]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
CASES: dict[str, tuple[dict[str, Any], Write]] = {
    "W4A16": (described(4, **GROUPS), packed()),
    "W4A16, zeros": (described(4, symmetric=False, **GROUPS), packed(asymmetric=True)),
    "W4A16, rows": (described(4, symmetric=False), packed(size=-1, asymmetric=True)),
    "W4A16, sorted": (described(4, actorder="group", **GROUPS), packed(sort=True)),
    "W4A16, zeros in bytes": (described(4, symmetric=False, **GROUPS), packed(asymmetric=True, bytes_=True)),
    "W8A16": (described(8, **GROUPS), packed(bits=8)),
    "int8": (described(8, layout="int-quantized"), int8()),
    "int8, one scale": (described(8, layout="int-quantized", strategy="tensor"), int8(one=True)),
    "int8, zeros": (described(8, layout="int-quantized", symmetric=False), int8(asymmetric=True)),
    "int4 in bytes": (described(4, layout="naive-quantized", **GROUPS), int8(top=8)),
    "FP8, one scale": (described(8, "float", "float-quantized", strategy="tensor"), fp8("tensor")),
    "FP8, rows": (described(8, "float", "float-quantized"), fp8("row")),
    "FP8, rows without columns": (described(8, "float", "float-quantized"), fp8("flat")),
    "FP8, blocks": (described(8, "float", "float-quantized", **BLOCKS), fp8("block")),
    "AutoFP8": (FP8 | {"activation_scheme": "static"}, fp8("tensor")),
    "DeepSeek": (FP8 | {"weight_block_size": [20, 36]}, fp8("block", "weight_scale_inv")),
    "Qwen without blocks": (FP8, fp8("scalar", "weight_scale_inv")),
    "FBGEMM": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, fp8("row")),
}


NO_MATRICES = ("embed", "lm_head", "gate.weight", "router", "_bias", "sinks")
"""What names of tensors have in them that stay as they are: routers among them."""


def make(
    path: Path, description: dict[str, Any], write: Write, only: str = "_proj", family: str | None = None, **sizes: Any
) -> tuple[Path, Path]:
    """A tiny model in `plain`, LLaMA or one of another family, and in `packed` the same with layers as `write` keeps them."""
    plain, target = path / "plain", path / "packed"
    if family is None:
        make_tiny_llama(plain, **({"num_hidden_layers": 1} | sizes))
    else:
        make_tiny(family, plain)
    tensors, stored, numbers = load_file(plain / "model.safetensors"), {}, np.random.default_rng(0)
    for name in list(tensors):
        if only not in name or tensors[name].ndim != 2 or any(word in name for word in NO_MATRICES):
            stored[name] = tensors[name]
            continue
        parts, weight = write(numbers, *tensors[name].shape)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
        layer = name.removesuffix(".weight")
        stored |= {f"{layer}.{part}": torch.as_tensor(np.ascontiguousarray(value) if isinstance(value, np.ndarray) else value)
                   for part, value in parts.items()}  # fmt: skip
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    target.mkdir()
    for file in plain.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    save_file(stored, target / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"quantization_config": description}))
    return plain, target


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_says_what_its_plain_weights_say(case: str, tmp_path: Path) -> None:
    check_against_transformers(*make(tmp_path, *CASES[case]))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["W4A16, zeros", "W4A16, sorted", "int8, zeros", "FP8, rows", "DeepSeek"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt2"])
def test_every_family_reads_them(family: str, case: str, tmp_path: Path) -> None:
    """Fused and turned rows, experts, latents: codes and scales go where the weights would."""
    check_against_transformers(*make(tmp_path, *CASES[case], only=".weight", family=family), 2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["W4A16, zeros", "int8", "DeepSeek"])
def test_ranks_take_their_parts(case: str, tmp_path: Path) -> None:
    paths = make(tmp_path, *CASES[case], hidden_size=96, intermediate_size=96, num_attention_heads=6, num_key_value_heads=3)
    check_against_transformers(*paths, tensor_parallel_size=2)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
def test_activations_are_not_rounded_where_no_kernel_can(tmp_path: Path) -> None:
    """W8A8 whose zeros are not in the middle: the codes have a kernel, but only for whole activations."""
    plain, target = make(
        tmp_path, described(8, layout="int-quantized", inputs=True, symmetric=False), int8(asymmetric=True, halves=True)
    )
    check_against_transformers(plain, target)
    layer = LLM(str(target), **SETTINGS).llm_engine.executor.worker.model.model.layers[0].self_attn.qkv_proj
    assert layer.multiply._kernel.function.__name__.startswith("linear_codes8_")


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
def test_activations_are_rounded_where_they_were_meant_to_be(tmp_path: Path) -> None:
    """W8A8: weights stay int8, and log-probabilities are near those of whole activations, but not the same."""
    plain, target = make(tmp_path, described(8, layout="int-quantized", inputs=True), int8(), num_hidden_layers=2)
    check_against_transformers(plain, target, 2.0)
    with pytest.raises(AssertionError):
        check_against_transformers(plain, target, 1e-4)
    check_against_transformers(plain, target, enable_cpu_kernels=False)
    llm = LLM(str(target), **SETTINGS)
    layer = llm.llm_engine.executor.worker.model.model.layers[0].self_attn.qkv_proj
    assert layer.multiply.weight.numel() < 1.3 * 96 * 48


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
def test_codes_reach_the_int8_kernel_as_they_are() -> None:
    numbers = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 256, (64, 96), generator=numbers, dtype=torch.uint8)
    codes[:, 5] = 255  # of 127 steps, the most that rounding makes: it finds the same codes then
    scales = (torch.rand(64, 1, generator=numbers) + 0.5) / 100
    stored = GroupQuantized(codes, scales, torch.full_like(scales, 128.0), 8, 96)
    x = torch.randn(5, 96, generator=numbers)
    rounded = PackedLinear(stored.dequantize(), None, "int8")
    given = PackedLinear(stored, None, "int8", dtype=torch.float32)
    assert torch.equal(given.weight, rounded.weight)
    assert torch.allclose(given(x), rounded(x), rtol=1e-5)
    codes[:, 5] = 0  # −128, which rounding never makes
    extreme = PackedLinear(stored, None, "int8", dtype=torch.float32)
    exact = x @ stored.dequantize().t()
    assert float((extreme(x) - exact).abs().max()) < 0.02 * float(exact.abs().max())


@pytest.mark.parametrize("asymmetric", [False, True])
def test_rows_and_columns_that_fill_no_word(asymmetric: bool) -> None:
    """13 rows of 21 codes, eight to a word; what fills up the last words is not 0."""
    numbers = np.random.default_rng(0)
    codes, zeros = numbers.integers(0, 16, (13, 21)), numbers.integers(0, 16, (13, 1))
    scales = np.asarray(0.5 + numbers.random((13, 1)), np.float32)
    parts = {"weight_packed": words(np.pad(codes, ((0, 0), (0, 3)), constant_values=9), 4), "weight_scale": scales}
    parts["weight_shape"] = np.array([13, 21])
    if asymmetric:
        parts["weight_zero_point"] = words(np.pad(zeros.T, ((0, 0), (0, 3)), constant_values=7), 4).T
    form = read_format(described(4, symmetric=not asymmetric))
    layer = form.unpack({name: torch.from_numpy(np.ascontiguousarray(part)) for name, part in parts.items()})
    assert isinstance(layer, GroupQuantized)
    expected = (codes - (zeros if asymmetric else 8)) * scales
    torch.testing.assert_close(layer.dequantize(), torch.from_numpy(expected.astype(np.float32)))


def test_pieces_that_are_kept_in_different_ways_become_plain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_against_transformers(*make(tmp_path, *CASES["W4A16"], only="gate_proj"))
    assert [record.getMessage() for record in caplog.records if "quantized" in record.getMessage()] == [
        "1 of 1 quantized layers are computed as plain weights"
    ]


def test_files_that_name_the_description_otherwise(tmp_path: Path) -> None:
    plain, target = make(tmp_path, *CASES["W4A16"])
    config = json.loads((target / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    check_against_transformers(plain, target)


def test_what_rounds_caches_and_activations_is_passed_over(tmp_path: Path) -> None:
    plain, target = make(tmp_path, *CASES["int8"])
    tensors = load_file(target / "model.safetensors")
    for name in ("k_scale", "v_scale", "o_proj.input_scale"):
        tensors[f"model.layers.0.self_attn.{name}"] = torch.ones(1)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    check_against_transformers(plain, target)


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("W4A16", {"weight_scale": None}, "up_proj lacks weight_scale"),
        ("W4A16", {"weight_shape": None}, "up_proj lacks weight_shape"),
        ("int8", {"weight_scale": None}, "up_proj lacks weight_scale"),
        ("int8", {"weight": None}, "up_proj lacks weight"),
        ("int8", {"weight": torch.ones(80, 48)}, "its weight is F32: it is not compressed"),
        ("int8", {"weight_scale": torch.ones(3, 1)}, r"\[3, 1\] scales do not fit 80 rows"),
        ("W4A16", {"weight_scale": torch.ones(80, 2)}, r"scales \[80, 2\] and zeros \[80, 2\] should be \[80, 3\]"),
        ("W4A16", {"weight_shape": torch.tensor([80, 64])}, r"holds \[80, 48\] codes and weight_shape says \[80, 64\]"),
        ("DeepSeek", {"weight_scale_inv": torch.ones(2, 2)}, r"\[2, 2\] scales do not fit weights \[80, 48\] in blocks"),
        ("FP8, rows", {"weight_scale": torch.ones(4, 2)}, "in blocks of None"),
    ],
)
def test_damaged_layers_are_one_clear_error(case: str, change: dict[str, Tensor | None], message: str, tmp_path: Path) -> None:
    _, target = make(tmp_path, *CASES[case])
    tensors = load_file(target / "model.safetensors")
    for part, value in change.items():
        tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
        tensors |= {} if value is None else {f"model.layers.0.mlp.up_proj.{part}": value}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=message) as caught:
        LLM(str(target), **SETTINGS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("description", "message"),
    [
        (described(4, "float", "nvfp4-pack-quantized"), "layout 'nvfp4-pack-quantized' is not supported, pack-quantized is"),
        (described(4, "float"), "weights of float with 4 bits are not supported"),
        (described(3), "weights of int with 3 bits are not supported"),
        (described(4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, r"sparse weights \(sparse-24-bitmask\)"),
        (described(4) | {"transform_config": {"config_groups": {"R1": {}}}}, "with transform_config is not supported"),
        (described(4) | {"config_groups": None}, "config_groups must be objects"),
        (described(4, strategy="group", group_size="16"), "groups of '16' are not supported"),
        (described(8, "float", "float-quantized", block_structure=[128]), r"blocks must be two whole numbers, got \[128\]"),
        (FP8 | {"fmt": "ue8m0"}, "fmt 'ue8m0' is not supported"),
        (FP8 | {"weight_block_size": 128}, "blocks must be two whole numbers, got 128"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(description: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_format(description)


@pytest.mark.parametrize(
    ("case", "wanted", "message"),
    [
        ("W4A16", "gptq", "is quantized already, with compressed-tensors; leave the flag out"),
        ("W4A16", "compressed-tensors", None),
        ("DeepSeek", "fp8", None),
        (None, "fp8", "is no fp8 checkpoint; int8 and int4 round any model"),
    ],
)
def test_the_flag(case: str | None, wanted: str, message: str | None, tmp_path: Path) -> None:
    plain, target = make(tmp_path, *CASES[case or "W4A16"])
    if message is None:
        assert LLM(str(target), **SETTINGS, quantization=wanted).generate(PROMPTS[0], use_tqdm=False)
        return
    with pytest.raises(ModelError, match=message):
        LLM(str(target if case else plain), **SETTINGS, quantization=wanted)
