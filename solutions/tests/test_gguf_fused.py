"""GGUF files that keep matrices otherwise than most: several as one, or each expert's by itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from solutions.models.config.entries import ModelError
from solutions.models.gguf_convert import convert_gguf
from solutions.models.gguf_fused import unfused
from solutions.models.loader import load_model, resolve_model
from solutions.tests.gguf_files import cache, write_gguf
from solutions.tests.test_models import run
from solutions.tests.tiny_models import GGUF_SAYS, make_tiny, make_tiny_llama

__all__ = ["cache"]

CASES = [
    ("llama", "fused"), ("qwen2", "fused"), ("qwen3", "fused"), ("gpt_oss", "fused"), ("deepseek_v2", "fused"),
    ("mixtral", "fused"), ("mixtral", "apart"), ("qwen3_moe", "apart"),
]  # fmt: skip
"""Families, with and without biases and rows that llama.cpp reorders, and how their files keep matrices."""


@pytest.mark.parametrize(("family", "how"), CASES)
def test_the_model_is_the_same(tmp_path: Path, cache: Path, family: str, how: str) -> None:
    model = make_tiny(family, tmp_path / "hf", **GGUF_SAYS.get(family, {}))
    source = resolve_model(str(write_gguf(tmp_path / "model.gguf", model, **{how: True})))
    prompt = list(b"Rows of one matrix are those of several, one after the other.")
    logits = run(load_model(source, torch.float32, torch.device("cpu")), source.config, [prompt], [len(prompt)])[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("as_codes", [False, True])
@pytest.mark.parametrize("how", ["fused", "apart"])
@pytest.mark.parametrize("kind", [GGMLType.Q8_0, GGMLType.Q4_0])
def test_blocks_are_the_same(tmp_path: Path, cache: Path, kind: GGMLType, how: str, as_codes: bool) -> None:
    """Quantized, whether their codes are kept or not: both files become the same folder."""
    model = make_tiny("mixtral", tmp_path / "hf")
    contents = []
    for name, flags in (("plain", {}), (how, {how: True})):
        folder = convert_gguf(write_gguf(tmp_path / f"{name}.gguf", model, kind, **flags), as_codes=as_codes)
        contents.append(load_file(folder / "model.safetensors"))
    plain, other = contents
    if not as_codes and how == "apart":  # codes are kept for each expert; plain experts as the file has them
        for name in [name for name in plain if ".experts." in name]:
            for number, expert in enumerate(plain.pop(name)):
                plain[name.replace(".experts.", f".experts.{number}.")] = expert
    assert plain.keys() == other.keys()
    assert all(torch.equal(plain[name], other[name]) for name in plain)


def test_parts_are_tensors_as_other_files_have_them(tmp_path: Path) -> None:
    model = make_tiny("mixtral", tmp_path / "hf")
    config = {"num_attention_heads": 6, "num_key_value_heads": 3}
    files = [
        gguf.GGUFReader(write_gguf(tmp_path / f"{how}.gguf", model, GGMLType.Q8_0, fused=how == "one"))
        for how in ("own", "one")
    ]
    expected, fused = ({tensor.name: tensor for tensor in file.tensors} for file in files)
    found = unfused(fused, config, {})
    assert found.keys() == expected.keys() != fused.keys()
    for name, tensor in found.items():
        assert (tensor.name, tensor.shape.tolist()) == (name, expected[name].shape.tolist())
        assert (tensor.n_elements, tensor.tensor_type) == (expected[name].n_elements, expected[name].tensor_type)
        assert (tensor.data == expected[name].data).all()
    assert unfused(fused, config, {"attn_qkv": "", "ffn_gate_up_exps": ""}) == fused


def test_rows_that_are_no_three_matrices(tmp_path: Path, cache: Path) -> None:
    model: LlamaForCausalLM = make_tiny_llama(tmp_path / "hf")
    rows = torch.zeros(97, 48).numpy()  # heads of 12 elements: 4 of queries, 2 of keys, 2 of values
    with pytest.raises(ModelError, match=r"attn_qkv.weight in the GGUF file has 97 rows, which are no 8 equal parts"):
        resolve_model(str(write_gguf(tmp_path / "a.gguf", model, **{"blk.0.attn_qkv.weight": rows})))
