"""GGUF files of DeepSeek and gpt-oss: an engine says what transformers says of the weights as their file keeps them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType
from transformers import PreTrainedModel

from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.models.loader import load_model, resolve_model
from solutions.quantization.layout.mxfp4 import VALUES
from solutions.tests.engine_twins import check_tokens
from solutions.tests.gguf_files import cache, write_gguf, write_out
from solutions.tests.test_families import GREEDY, PROMPTS, SETTINGS
from solutions.tests.test_models import run
from solutions.tests.tiny_models import GGUF_SAYS, make_tiny

pytestmark = pytest.mark.usefixtures(cache.__name__)
CPU = torch.device("cpu")
PROMPT = list(b"Which experts a token goes through depends on all of its numbers.")
FAMILIES = ("deepseek_v2", "deepseek_v3", "gpt_oss")
EXPERTS = dict.fromkeys(("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), GGMLType.MXFP4)


def made(family: str, folder: Path, **overrides: Any) -> PreTrainedModel:
    return make_tiny(family, folder, **(GGUF_SAYS.get(family, {}) | overrides))


def check_logits(path: Path, model: PreTrainedModel) -> None:
    source = resolve_model(str(path))
    served = replace(source, config=replace(source.config, max_model_len=100))
    logits = run(load_model(served, torch.float32, CPU), source.config, [PROMPT], [len(PROMPT)])[0]
    with torch.inference_mode():
        torch.testing.assert_close(logits, model(torch.tensor([PROMPT])).logits[0], atol=2e-3, rtol=1e-4)


def numbers_of(tensor: gguf.ReaderTensor) -> torch.Tensor:
    """What a tensor stands for; MXFP4 by its definition: a byte's lower halves are the first 16 of 32, its upper the others."""
    if tensor.tensor_type != GGMLType.MXFP4:
        return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
    blocks = torch.from_numpy(np.array(tensor.data)).unflatten(-1, (-1, 17))
    codes = torch.cat((blocks[..., 1:] & 15, blocks[..., 1:] >> 4), -1)
    table = torch.tensor([*VALUES, *(-value for value in VALUES)])
    return (table[codes.int()] * torch.exp2(blocks[..., :1].float() - 127)).flatten(-2)


def as_the_file_has_it(path: Path, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the numbers of its file, put back by the rules that llama.cpp's converter has."""
    kept = {tensor.name: numbers_of(tensor) for tensor in gguf.GGUFReader(path).tensors}
    turned = model.config.model_type == "gpt_oss"
    own = {
        "embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output", "q_proj": "attn_q", "k_proj": "attn_k",
        "v_proj": "attn_v", "o_proj": "attn_output", "q_a_proj": "attn_q_a", "q_b_proj": "attn_q_b",
        "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    }  # fmt: skip
    state = dict(model.state_dict())
    for name, tensor in state.items():
        layer = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
        part, _, kind = name.removeprefix("model.").rpartition(".")
        part = part.rpartition(".")[2]
        if part == "experts":
            matrix, kind = kind.removesuffix("_bias"), "bias" if kind.endswith("_bias") else "weight"
            turn = (lambda x: x.transpose(1, 2)) if turned and kind == "weight" else (lambda x: x)
            if matrix == "down_proj":
                found = turn(kept[f"{layer}.ffn_down_exps.{kind}"])
            else:
                gate, up = (kept[f"{layer}.ffn_{half}_exps.{kind}"] for half in ("gate", "up"))
                found = turn(torch.stack((gate, up), 2).flatten(1, 2) if turned else torch.cat((gate, up), 1))
        elif part == "kv_b_proj":
            k, v = (kept[f"{layer}.attn_{half}_b.weight"] for half in "kv")
            found = torch.cat((k.transpose(1, 2), v), 1).flatten(0, 1)
        elif part in own:
            found = kept[f"{layer}.{own[part]}.{kind}".removeprefix(".")]
        elif part.endswith("_proj"):
            shared = "_shexp" if "shared_experts" in name else ""
            found = kept[f"{layer}.ffn_{part.removesuffix('_proj')}{shared}.{kind}"]
        elif part in ("gate", "router") and kind in ("weight", "bias"):
            found = kept[f"{layer}.ffn_gate_inp.{kind}"]
        else:  # vectors, which are as they were
            continue
        assert found.shape == tensor.shape, name
        state[name] = found
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_is_the_model_it_was_made_of(tmp_path: Path, family: str) -> None:
    model = made(family, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", model)
    ours, theirs = (dataclasses.asdict(resolve_model(str(each)).config) for each in (path, tmp_path / "hf"))
    scale = theirs["attention_scale"]
    assert ours == theirs | {"vocab_size": ours["vocab_size"], "attention_scale": scale and pytest.approx(scale)}
    check_logits(path, model)


@pytest.mark.parametrize(("family", "others"), [("deepseek_v2", {}), ("deepseek_v3", {}), ("gpt_oss", EXPERTS)])
def test_quantized_files_say_what_their_numbers_say(tmp_path: Path, family: str, others: dict[str, GGMLType]) -> None:
    model = made(family, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", model, GGMLType.Q8_0, others=others)
    whole = [
        name.split(".")[2] for name, kind in ((t.name, t.tensor_type) for t in gguf.GGUFReader(path).tensors) if kind == 39
    ]
    assert set(whole) == set(others)
    check_logits(path, as_the_file_has_it(path, model))


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here")
@pytest.mark.parametrize(("family", "others"), [("deepseek_v3", {}), ("gpt_oss", EXPERTS)])
def test_blocks_are_computed_as_they_are(tmp_path: Path, family: str, others: dict[str, GGMLType]) -> None:
    """With --quantization gguf; what is joined of two tensors, and MXFP4, become plain weights."""
    model = made(family, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", model, GGMLType.Q8_0, others=others)
    llm = LLM(str(path), **SETTINGS, quantization="gguf")
    model = as_the_file_has_it(path, model)
    for output in llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]], GREEDY, use_tqdm=False):
        check_tokens(model, output.prompt_token_ids, list(output.outputs[0].token_ids), 0.02)


def test_parts_of_one_matrix_in_two_types(tmp_path: Path) -> None:
    model = made("deepseek_v3", tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", model, GGMLType.F16, others={"attn_v_b": GGMLType.Q8_0})
    check_logits(path, as_the_file_has_it(path, model))


def test_an_older_file_has_the_matrix_whole(tmp_path: Path) -> None:
    """Before the absorbed way a file had heads of their own lengths, attn_kv_b, and nothing of groups."""
    model = made("deepseek_v2", tmp_path / "hf", topk_method="greedy", n_group=1, topk_group=1)
    path = write_gguf(tmp_path / "new.gguf", model)
    reader, writer = gguf.GGUFReader(path), gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    config = model.config
    lengths = {"attention.key_length": config.qk_nope_head_dim + config.qk_rope_head_dim}
    lengths |= {"attention.value_length": config.v_head_dim, "attention.head_count_kv": config.num_attention_heads}
    for name, field in reader.fields.items():
        if (
            name.startswith("GGUF.")
            or name == "general.architecture"
            or "group" in name
            or name.endswith(("_mla", "gating_func"))
        ):
            continue
        kinds = [*field.types, None]
        writer.add_key_value(name, lengths.get(name.removeprefix("deepseek2."), field.contents()), kinds[0], kinds[1])
    for tensor in reader.tensors:
        layer, _, part = tensor.name.removesuffix(".weight").rpartition(".")
        if part == "attn_k_b":
            whole = model.state_dict()[f"model.layers.{layer.split('.')[1]}.self_attn.kv_b_proj.weight"]
            writer.add_tensor(f"{layer}.attn_kv_b.weight", whole.numpy())
        elif part != "attn_v_b":
            writer.add_tensor(tensor.name, np.array(tensor.data))
    write_out(writer)
    check_logits(tmp_path / "old.gguf", model)


def test_mxfp4_is_kept_in_two_bytes(tmp_path: Path) -> None:
    """Each of its numbers is one of bfloat16's, so a converted folder is no larger than it must be."""
    path = write_gguf(tmp_path / "model.gguf", made("gpt_oss", tmp_path / "hf"), GGMLType.Q8_0, others=EXPERTS)
    folder = resolve_model(str(path)).path
    with (folder / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert header["model.layers.0.mlp.experts.up_proj.weight"]["dtype"] == "BF16"
    assert header["model.layers.0.self_attn.q_proj.weight"]["dtype"] == "F32"


@pytest.mark.parametrize(
    ("drop", "extra", "complaint"),
    [
        ("blk.1.attn_v_b.weight", {}, "no entry 'blk.1.attn_v_b.weight'"),
        ("", {"deepseek2__expert_gating_func": 3}, "expert_gating_func 3 in a GGUF file is not supported"),
        ("", {"deepseek2__attention__kv_lora_rank": 0}, "attention.kv_lora_rank.* must be a whole number from 1"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, drop: str, extra: dict[str, Any], complaint: str) -> None:
    model = made("deepseek_v3", tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", model, drop=drop, **extra)
    with pytest.raises(ModelError, match=complaint):
        resolve_model(str(path))
