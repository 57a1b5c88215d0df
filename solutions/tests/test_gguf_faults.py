"""GGUF files that cannot be used: truncated, damaged, or of a kind that is not supported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from solutions.models.config.entries import ModelError
from solutions.models.loader import load_model, resolve_model
from solutions.tests.gguf_files import cache, tiny, tiny_model, write_gguf, write_out

__all__ = ["cache", "tiny", "tiny_model"]

CPU = torch.device("cpu")


def raises(what: str) -> Any:
    return pytest.raises(ModelError, match=what)


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.003, 0.01, 0.5, 0.999])
def test_truncated_file(tiny: Path, cache: Path, share: float) -> None:
    content = tiny.read_bytes()
    tiny.write_bytes(content[: int(len(content) * share)])
    with raises(r"tiny.gguf is (damaged or incomplete \(.+\); fetch it again|not a GGUF file)"):
        resolve_model(str(tiny))
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(100)])
def test_file_that_is_no_gguf(tmp_path: Path, cache: Path, content: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with raises("model.gguf is not a GGUF file"):
        resolve_model(str(path))


@pytest.mark.parametrize("seed", range(8))
def test_garbage_after_the_first_bytes(tmp_path: Path, cache: Path, seed: int) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF\x03\0\0\0" + np.random.default_rng(seed).bytes(500))
    with raises("model.gguf is damaged or incomplete"):
        resolve_model(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": ["a c"]}, "tokenizer in the GGUF file is damaged .*`ac` out of vocabulary"),
        ({"pre": "stablelm2"}, "pre-tokenizer 'stablelm2' .* known: default, gpt-2, gigachat"),
        ({"llama__expert_count": 8}, "no entry 'llama.expert_used_count'"),
        ({"llama__rope__dimension_count": 16}, "RoPE over a part of the head .* not supported in this family"),
        ({"llama__rope__scaling__type": "ntk", "llama__rope__scaling__factor": 2.0}, "'ntk' is not supported"),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__attn_factor": 0.5,
            },
            "YaRN with attn_factor 0.5 and ext_factor 1",
        ),
        (
            {
                "llama__rope__scaling__type": "yarn",
                "llama__rope__scaling__factor": 2.0,
                "llama__rope__scaling__yarn_ext_factor": 0.5,
            },
            "YaRN with attn_factor 1 and ext_factor 0.5",
        ),
        ({"llama__attention__causal": False}, r"GGUF files of llama whose tokens see later ones \(attention.causal\)"),
        ({"rope_freqs.weight": np.array([1.0] * 31 + [np.inf], np.float32)}, "rope_freqs.weight.* no number above 0"),
        ({"blk.0.attn_q_norm.weight": np.ones(64, np.float32)}, "'blk.0.attn_q_norm.weight' .* no layer of a LlamaForCausalLM"),
        ({"drop": "token_embd.weight"}, "no entry 'token_embd.weight'"),
        ({"merges": ["ab"]}, "tokenizer in the GGUF file is damaged"),
        ({"llama__rope__dimension_count": "64"}, "llama.rope.dimension_count must be a whole number from 1 to .*, got '64'"),
        ({"llama__attention__sliding_window": 2.5}, "llama.attention.sliding_window must be a whole number"),
        ({"llama__rope__scale_linear": -2.0}, "llama.rope.scale_linear must be a number of at least 0, got -2"),
        ({"llama__rope__scale_linear": 0.5}, "factor must be a number of at least 1"),
        ({"tokenizer__ggml__unknown_token_id": 5000}, "ggml.unknown_token_id is 5000, and the vocabulary has 262 tokens"),
    ],
)
def test_unsupported_content(
    tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM, changes: dict[str, Any], message: str
) -> None:
    with raises(message):
        resolve_model(str(write_gguf(tmp_path / "model.gguf", tiny_model, **changes)))


def test_missing_tensor(tmp_path: Path, cache: Path, tiny_model: LlamaForCausalLM) -> None:
    source = resolve_model(str(write_gguf(tmp_path / "model.gguf", tiny_model, drop="blk.0.ffn_up.weight")))
    with raises(r"lacks weights of the model: model.layers.0.mlp.gate_up_proj.weight \(up\)"):
        load_model(source, torch.float32, CPU)


def test_other_architecture(tmp_path: Path, cache: Path) -> None:
    write_out(gguf.GGUFWriter(tmp_path / "model.gguf", "falcon"))
    with raises("GGUF architecture 'falcon' is not supported"):
        resolve_model(str(tmp_path / "model.gguf"))
