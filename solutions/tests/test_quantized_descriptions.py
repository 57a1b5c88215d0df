"""GPTQ and AWQ checkpoints as other tools write them: where the description is, what it is called, which layers are plain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.model_files import weight_files
from solutions.quantization.layout.checkpoint import PARTS, QuantizedFormat
from solutions.quantization.layout.formats import read_format
from solutions.tests.quantized_folders import (
    SETTINGS,
    Stored,
    check_against_transformers,
    describe,
    quantize_folder,
    save_pieces,
)
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
AUTOGPTQ_FILE = {
    "bits": 4, "group_size": 16, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": False,
    "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None, "is_marlin_format": False,
    "quant_method": "gptq",
}  # fmt: skip
GPTQMODEL = {
    "bits": 4, "dynamic": None, "group_size": 16, "desc_act": False, "sym": True, "lm_head": False, "quant_method": "gptq",
    "checkpoint_format": "gptq", "format": "gptq", "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:5.0.0"], "damp_percent": 0.05, "static_groups": False, "mse": 0.0},
}  # fmt: skip
AUTOAWQ_FILE = {"zero_point": True, "q_group_size": 16, "w_bit": 4, "version": "GEMM", "modules_to_not_convert": None}


def make(tmp_path: Path, form_of: Any = None, maker: Any = make_tiny_llama, **config: Any) -> tuple[Path, dict[str, Any]]:
    """A tiny model in `plain`, and the tensors of what `packed` shall hold; by default all but the head have one form."""
    sizes = {"n_layer": 1} if maker is make_tiny_gpt2 else {"num_hidden_layers": 1}
    maker(tmp_path / "plain", **sizes | config)
    form = form_of if isinstance(form_of, Stored) else Stored()
    choose = form_of if callable(form_of) else lambda layer: None if layer == "lm_head" else form
    return tmp_path / "packed", quantize_folder(tmp_path / "plain", tmp_path / "packed", choose)


DESCRIPTIONS = {
    "AutoGPTQ's file": (AUTOGPTQ_FILE, "quantize_config.json", {}),
    "AutoGPTQ's file of old": ({"bits": 4, "group_size": 16, "desc_act": False}, "quantize_config.json", {}),
    "AutoAWQ's file": (AUTOAWQ_FILE, "quant_config.json", {"method": "awq"}),
    "AutoAWQ's entries in AutoGPTQ's file": (AUTOAWQ_FILE, "quantize_config.json", {"method": "awq"}),
    "GPTQModel": (GPTQMODEL, "config.json", {}),
    "GPTQModel's second format": (
        GPTQMODEL | {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, "config.json", {"less_one": False}
    ),
    "GPTQModel's AWQ": (AWQ | {"format": "gemm", "checkpoint_format": "gemm", "sym": False}, "config.json", {"method": "awq"}),
    "the short names in config.json": ({"quant_method": "awq"} | AUTOAWQ_FILE, "config.json", {"method": "awq"}),
    "no method, AWQ's keys": (AUTOAWQ_FILE, "config.json", {"method": "awq"}),
    "no method, GPTQ's keys": ({"bits": 4, "group_size": 16, "desc_act": True}, "config.json", {"sorted_by": 3}),
    "methods and layouts in capitals": (AWQ | {"quant_method": "AWQ", "version": "GEMM"}, "config.json", {"method": "awq"}),
    "null": (GPTQ | {"checkpoint_format": None, "w_bit": None, "desc_act": None}, "config.json", {}),
    "groups wider than the layer": (GPTQ | {"group_size": 2**40}, "config.json", {"size": -1}),
    "whole rows": (GPTQ | {"group_size": -1, "desc_act": True}, "config.json", {"size": -1}),
    "no g_idx": (GPTQ, "config.json", {"g_idx": False}),
    "desc_act, and neighbours are groups (static_groups)": (GPTQ | {"desc_act": True}, "config.json", {}),
    "sorted though desc_act is false": (GPTQ | {"desc_act": False}, "config.json", {"sorted_by": 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_description_in_the_words_of_its_tool(tmp_path, case):
    description, file, form = DESCRIPTIONS[case]
    folder, tensors = make(tmp_path, Stored(**form))
    describe(folder, description, file)
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


def test_a_file_beside_config_json_fills_what_that_leaves_out(tmp_path):
    folder, tensors = make(tmp_path, Stored(less_one=False))
    describe(folder, GPTQ)
    describe(folder, AUTOGPTQ_FILE | {"checkpoint_format": "gptq_v2"}, "quantize_config.json")
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


def one_in_eight_bits(layer: str) -> Stored | None:
    return Stored(bits=8, size=8) if layer.endswith("v_proj") else None if layer == "lm_head" else Stored()


def without(*words: str) -> Any:
    return lambda layer: None if layer == "lm_head" or any(word in layer for word in words) else Stored()


LAYERS = {
    "modules_to_not_convert": (without("down_proj", "k_proj"), AWQ | {"modules_to_not_convert": ["down_proj", "k_proj"]}),
    "modules_in_block_to_quantize": (
        without("self_attn"), GPTQ | {"modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"], ["mlp.down_proj"]]}
    ),
    "inside_layer_modules": (without("mlp"), GPTQ | {"inside_layer_modules": [["self_attn.q_proj"]]}),
    "dynamic leaves out": (without("o_proj", "up_proj"), GPTQMODEL | {"dynamic": {r"-:.*\.(o|up)_proj": {}}}),
    "dynamic changes": (one_in_eight_bits, GPTQMODEL | {"dynamic": {r"+:.*v_proj$": {"bits": 8, "group_size": 8}}}),
    "dynamic, the first match": (
        one_in_eight_bits, GPTQMODEL | {"dynamic": {r".*v_proj$": {"bits": 8, "group_size": 8}, r".*_proj": {"bits": 4}}}
    ),
    "dynamic for all pieces of one product": (
        lambda layer: Stored(bits=8) if "self_attn" in layer else None if layer == "lm_head" else Stored(),
        GPTQMODEL | {"dynamic": {r"+:model\.layers\.\d+\.self_attn": {"bits": 8, "sym": False, "mse": 2.4}}},
    ),
    "one piece sorted": (
        lambda layer: None if layer == "lm_head" else Stored(sorted_by=2 if "q_proj" in layer else None),
        GPTQ | {"desc_act": True},
    ),
    "the head too": (lambda layer: Stored(), GPTQMODEL | {"lm_head": True}),
    "the head alone": (lambda layer: Stored() if layer == "lm_head" else None, GPTQMODEL | {"lm_head": True}),
    "the head by dynamic in other bits": (
        lambda layer: Stored(bits=8 if layer == "lm_head" else 4),
        GPTQMODEL | {"lm_head": True, "dynamic": {"lm_head": {"bits": 8}}},
    ),
}  # fmt: skip


def write_case(tmp_path: Path, case: str) -> Path:
    """The folder of one of `LAYERS`; the plain model is beside it."""
    form_of, description = LAYERS[case]
    if description["quant_method"] == "awq":
        choose, form_of = form_of, lambda layer: choose(layer) and Stored("awq")
    folder, tensors = make(tmp_path, form_of)
    describe(folder, description)
    save_pieces(tensors, folder)
    return folder


@pytest.mark.parametrize("case", LAYERS)
def test_which_layers_are_quantized(tmp_path, case):
    folder = write_case(tmp_path, case)
    check_against_transformers(tmp_path / "plain", folder)
    check_against_transformers(tmp_path / "plain", folder, enable_cpu_kernels=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["modules_to_not_convert", "dynamic changes", "the head too"])
def test_layers_kept_in_several_ways_are_cut_over_two_ranks(tmp_path, case):
    folder = write_case(tmp_path, case)
    check_against_transformers(tmp_path / "plain", folder, tensor_parallel_size=2)


@pytest.mark.parametrize("tied", ["in config.json", "and in the file"])
def test_a_quantized_head_is_no_longer_the_embedding_it_was_tied_to(tmp_path, tied):
    folder, tensors = make(tmp_path, lambda layer: Stored())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    describe(folder, GPTQMODEL | {"lm_head": True})
    if tied != "in config.json":
        tensors["lm_head.bias"] = torch.zeros(320)
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


def test_a_tied_head_that_is_not_quantized_stays_the_embedding(tmp_path):
    folder, tensors = make(tmp_path, tie_word_embeddings=True)
    describe(folder, GPTQ)
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("skipped", [(), ("c_fc",), ("h.0.mlp.c_proj", "c_attn")])
def test_gpt2_keeps_plain_weights_the_other_way_round(tmp_path, method, skipped):
    def form_of(layer: str) -> Stored | None:
        return None if layer == "lm_head" or any(word in layer for word in skipped) else Stored(method)

    folder, tensors = make(tmp_path, form_of, make_tiny_gpt2)
    describe(folder, GPTQ if method == "gptq" else AWQ)
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


def test_gpt2_with_a_quantized_head(tmp_path):
    folder, tensors = make(tmp_path, lambda layer: Stored(), make_tiny_gpt2, tie_word_embeddings=False)
    describe(folder, GPTQ | {"lm_head": True})
    save_pieces(tensors, folder)
    assert "lm_head.qweight" in tensors
    check_against_transformers(tmp_path / "plain", folder)


@pytest.mark.parametrize(
    ("maker", "config"),
    [
        (make_tiny_llama, {"attention_bias": True, "mlp_bias": True}),
        (make_tiny_gpt2, {}),
        (make_tiny_llama, {}),
        (make_tiny_mistral, {}),
    ],
)
def test_biases_of_zeros_where_a_model_has_biases_and_where_it_has_none(tmp_path, maker, config):
    folder, tensors = make(tmp_path, None, maker, **config)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for name, tensor in list(tensors.items()):
        layer = name.removesuffix(".qweight")
        if name.endswith(".qweight") and f"{layer}.bias" not in tensors:
            tensors[f"{layer}.bias"] = torch.zeros(tensor.shape[1], dtype=torch.float16)
        elif name.endswith(".bias"):
            tensors[name] = plain[name] = torch.zeros_like(tensor)
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    describe(folder, GPTQ)
    save_pieces(tensors, folder)
    check_against_transformers(tmp_path / "plain", folder)


@pytest.mark.parametrize(
    ("base", "count", "index"),
    [
        ("gptq_model-4bit-16g", 1, False),
        ("gptq_model-4bit-16g", 1, True),
        ("gptq_model-4bit-16g", 3, True),
        ("gptq_model-4bit-16g", 3, False),
        ("awq_model_w4_g16", 1, False),
        ("Vicuna-7B-1.1-GPTQ-4bit-16g.no-act-order", 1, False),
        ("model", 2, False),
        ("model", 1, True),
    ],
)
def test_weight_files_of_other_names(tmp_path, base, count, index):
    folder, tensors = make(tmp_path)
    describe(folder, GPTQ)
    save_pieces(tensors, folder, base, count, index)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    save_file({"x": torch.zeros(1)}, folder / "consolidated.safetensors")
    check_against_transformers(tmp_path / "plain", folder)


def test_of_several_files_the_description_names_one(tmp_path):
    folder, tensors = make(tmp_path)
    describe(folder, AUTOGPTQ_FILE | {"model_file_base_name": "wanted"}, "quantize_config.json")
    save_pieces(tensors, folder, "wanted")
    save_pieces({"x": torch.zeros(1)}, folder, "other")
    check_against_transformers(tmp_path / "plain", folder)
    describe(folder, AUTOGPTQ_FILE, "quantize_config.json")
    with pytest.raises(ModelError, match=r"several names \(other, wanted\); leave those of one model there"):
        LLM(str(folder), **SETTINGS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00003", "model-00003-of-00003"], "has 2 of 3 weight files like model-0000"),
        (["m-1-of-2", "m-01-of-2"], "several models under one name"),
        (["m-1-of-2", "m-2-of-3"], "several models under one name"),
        (["m-1-of-2", "m"], "several models under one name"),
        (["m-0-of-1"], "several models under one name"),
        (["adapter_model", "consolidated"], "has no weights"),
        ([], "has no weights"),
    ],
)
def test_weight_files_that_are_no_model(tmp_path, names, message):
    for name in names:
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=message):
        weight_files(tmp_path, "")


@pytest.mark.parametrize("mapped", [None, [], {}, {"x": 1}, {"x": None}, "text"])
def test_an_index_that_names_no_files(tmp_path, mapped):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": mapped}))
    with pytest.raises(ModelError, match="names no files"):
        weight_files(tmp_path, "")


REFUSED = {
    "an unknown layout": (GPTQ | {"checkpoint_format": "gptq_v3"}, "'gptq_v3' is not supported, gptq and gptq_v2 are"),
    "marlin": (GPTQ | {"checkpoint_format": "marlin"}, "GPTQ layout 'marlin' is not supported"),
    "marlin of old": (GPTQ | {"is_marlin_format": True}, "GPTQ layout 'marlin' is not supported"),
    "bitblas": (GPTQ | {"format": "bitblas"}, "GPTQ layout 'bitblas' is not supported"),
    "a layout that is no text": (GPTQ | {"checkpoint_format": ["gptq"]}, "GPTQ layout .* is not supported"),
    "gemv": (AWQ | {"version": "GEMV"}, "AWQ layout 'gemv' is not supported, gemm is"),
    "gemv_fast": (AWQ | {"version": None, "format": "gemv_fast"}, "AWQ layout 'gemv_fast' is not supported"),
    "llm-awq": (AWQ | {"backend": "llm-awq"}, "AWQ layout 'llm-awq'"),
    "two bits at once": (GPTQ | {"w_bit": 8}, "contradicts itself: bits=4, w_bit=8"),
    "two sizes at once": (AWQ | {"q_group_size": 32}, "contradicts itself: group_size=16, q_group_size=32"),
    "two layouts at once": (GPTQ | {"checkpoint_format": "gptq", "format": "gptq_v2"}, "itself: checkpoint_format=gptq"),
    "other words": (GPTQ | {"pack_dtype": "int64"}, "packed into int64 are not supported, int32 is"),
    "an adapter": (GPTQ | {"adapter": {"name": "lora", "rank": 8}}, "a checkpoint with adapter is not supported"),
    "no bits": ({"quant_method": "gptq", "group_size": 16}, "gptq with None bits"),
    "bits as text": (GPTQ | {"bits": "q4_k"}, "gptq with q4_k bits"),
    "true bits": (GPTQ | {"bits": True}, "gptq with True bits"),
    "a size as text": (GPTQ | {"group_size": "16"}, "is not supported"),
    "desc_act as text": (GPTQ | {"desc_act": "false"}, "desc_act must be true or false"),
    "no object": ("gptq", "quantization_config is no JSON object but gptq"),
    "a list": (["gptq"], "quantization_config is no JSON object"),
    "a method that is no text": (GPTQ | {"quant_method": ["gptq"]}, "quantized with .* are not supported"),
    "no method": ({"foo": 1}, "quantized with 'unknown methods' are not supported"),
    "bitsandbytes of old": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "with bitsandbytes are not supported"),
    "a broken pattern": (GPTQ | {"dynamic": {"+:(": {"bits": 8}}}, "which is none"),
    "dynamic bits": (GPTQ | {"dynamic": {"+:.*up_proj": {"bits": 3}}}, "gptq with 3 bits"),
    "dynamic layouts": (GPTQ | {"dynamic": {".*up_proj": {"format": "marlin"}}}, "format for some layers only"),
    "dynamic no object": (GPTQ | {"dynamic": ["-:.*"]}, "dynamic must be an object"),
    "dynamic no settings": (GPTQ | {"dynamic": {".*": 8}}, "no object but 8"),
    **{
        name: ({"quant_method": name}, f"quantized with {name} are not supported, gptq, awq, .* are; use the unquantized model")
        for name in ("bitsandbytes", "hqq", "marlin", "nvfp4", "auto-round", "qqq", "quanto")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(case):
    description, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_format(description)
    assert "\n" not in str(caught.value)


def test_descriptions_elsewhere_are_refused_by_name(tmp_path):
    make_tiny_llama(tmp_path, num_hidden_layers=1)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    with pytest.raises(ModelError, match="quantized with modelopt are not supported"):
        LLM(str(tmp_path), **SETTINGS)
    (tmp_path / "config.json").write_text(json.dumps(config | {"compression_config": {"format": "pack-quantized"}}))
    with pytest.raises(ModelError, match="config_groups must be objects by name"):
        LLM(str(tmp_path), **SETTINGS)


def spoil(tensors: dict[str, Any], how: str) -> dict[str, Any]:
    name = "model.layers.0.mlp.up_proj"
    if how == "gone":
        return {key: value for key, value in tensors.items() if key != f"{name}.qzeros"}
    changes = {
        "int64": {f"{name}.qweight": tensors[f"{name}.qweight"].long()},
        "one dimension": {f"{name}.qzeros": tensors[f"{name}.qzeros"].flatten()},
        "short g_idx": {f"{name}.g_idx": tensors[f"{name}.g_idx"][:-1]},
        "no vector": {f"{name}.g_idx": tensors[f"{name}.g_idx"][0]},
        "uneven": {f"{name}.g_idx": torch.zeros(48, dtype=torch.int32)},
        "scales": {f"{name}.scales": tensors[f"{name}.scales"][:2]},
        "plain too": {f"{name}.weight": torch.zeros(80, 48)},
        "elsewhere": {f"model.layers.7.mlp.up_proj.{part}": tensors[f"{name}.{part}"].clone() for part in PARTS},
        "embedding": {f"model.embed_tokens.{part}": tensors[f"{name}.{part}"].clone() for part in PARTS},
        "bias": {f"{name}.bias": torch.ones(80)},
    }
    return tensors | changes[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gone", "up_proj lacks qzeros"),
        ("int64", "up_proj cannot be read: qweight is int64 .* where a matrix of int32 is supported"),
        ("one dimension", "up_proj cannot be read: qzeros is int32"),
        ("short g_idx", "up_proj cannot be read: g_idx"),
        ("no vector", "up_proj cannot be read: g_idx"),
        ("uneven", "g_idx does not put 16 columns in each group"),
        ("scales", "up_proj cannot be read: scales"),
        ("plain too", "up_proj.weight, which is no weight"),
        ("elsewhere", "layers.7.mlp.up_proj.qweight, which is no weight"),
        ("embedding", "embed_tokens.qweight, which is no weight"),
        ("bias", "up_proj.bias, which is no weight"),
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_one_clear_error(tmp_path, how, message):
    folder, tensors = make(tmp_path)
    describe(folder, GPTQ)
    save_pieces(spoil(tensors, how), folder)
    with pytest.raises(ModelError, match=message) as caught:
        LLM(str(folder), **SETTINGS)
    assert "\n" not in str(caught.value)


def test_a_description_without_quantized_weights_and_the_reverse(tmp_path):
    make_tiny_llama(tmp_path / "model", num_hidden_layers=1)
    describe(tmp_path / "model", GPTQ)
    with pytest.raises(ModelError, match="should be quantized with gptq, and no layer has a qweight"):
        LLM(str(tmp_path / "model"), **SETTINGS)
    folder, tensors = make(tmp_path)
    save_pieces(tensors, folder)
    with pytest.raises(ModelError, match=r"neither config\.json nor quantize_config\.json says how it is quantized"):
        LLM(str(folder), **SETTINGS)


def test_sorted_columns_need_their_order(tmp_path):
    folder, tensors = make(tmp_path, Stored(g_idx=False))
    describe(folder, GPTQ | {"desc_act": True})
    save_pieces(tensors, folder)
    with pytest.raises(ModelError, match="lacks g_idx"):
        LLM(str(folder), **SETTINGS)


def test_layers_are_unpacked_where_their_tensors_are():
    """Whatever device new tensors are made on; "meta" has no numbers, so a tensor made there would be noticed."""
    for form in (QuantizedFormat("gptq", 4, 8, act_order=True), QuantizedFormat("awq", 4, 8)):
        parts = {
            "qweight": torch.arange(32, dtype=torch.int32).view((4, 8) if form.method == "gptq" else (32, 1)),
            "qzeros": torch.ones(4, 1, dtype=torch.int32),
            "scales": torch.ones(4, 8, dtype=torch.float16),
        }
        if form.act_order:
            parts["g_idx"] = torch.arange(32, dtype=torch.int32) % 4
        expected = form.unpack(parts).dequantize()
        with torch.device("meta"):
            assert torch.equal(form.unpack(parts).dequantize(), expected)
