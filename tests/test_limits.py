"""Limits are resolved once, and what excludes itself is refused before any weights are loaded."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from solutions.core import worker
from solutions.core.config import EngineConfig
from solutions.core.engine import LLMEngine
from solutions.core.platform import native

ROOT = Path(__file__).parents[1]
MODEL, WINDOWED = "smollm2-135m", "mistral-7b"


def test_one_place_falls_back_to_the_models_context() -> None:
    """`config.max_model_len or …` stands in one line of all that an engine or a benchmark runs."""
    found = []
    for path in (*(ROOT / "solutions").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and "tests" not in path.parts:
                first = ast.unparse(node.values[0])
                if first.endswith("max_model_len") and ast.unparse(node.values[1]).endswith(
                    (".longest", "max_position_embeddings")
                ):
                    found.append(path.relative_to(ROOT).as_posix())
    assert found == ["solutions/core/startup.py"]


def draft(**keys: Any) -> str:
    return json.dumps({"method": "draft_model", **keys})


def transfer() -> str:
    return json.dumps({"kv_connector": "tcp", "kv_role": "kv_producer", "kv_addresses": ["127.0.0.1:0"]})


HEAD = {"method": "eagle", "model": "no-such-head"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_model_len": 1}, "max_model_len must be between"),
    ({"max_model_len": 1 << 20}, "max_model_len must be between"),
    ({"block_size": 0}, "block_size must be at least 1"),
    ({"max_num_seqs": 0}, "max_num_seqs must be at least 1"),
    ({"max_num_waiting": 0}, "max_num_waiting must be at least 1"),
    ({"enable_chunked_prefill": False, "max_num_batched_tokens": 64}, "without chunked prefill"),
    ({"dtype": "float16"}, "--dtype float16 needs a GPU"),
    ({"quantization": "int8", "enable_cpu_kernels": False}, "needs the CPU kernels: they are switched off"),
    ({"quantization": "gptq"}, "is no gptq checkpoint"),
    ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 needs a GPU"),
    ({"kv_cache_dtype": "int8", "attention_backend": "naive"}, "--kv-cache-dtype int8 needs attention backend"),
    ({"attention_backend": "cpu", "dtype": "float16", "device": "cpu"}, "--dtype float16 needs a GPU"),
    ({"batch_invariant": True, "attention_backend": "torch"}, "--batch-invariant: it needs the C"),
    ({"batch_invariant": True, "enable_cpu_kernels": False}, "--batch-invariant: it needs the C"),
    ({"batch_invariant": True, "distributed_executor_backend": "ray"}, "--batch-invariant: not with sums"),
    (
        {"batch_invariant": True, "dtype": "float32", "collective_backend": "ring", "tensor_parallel_size": 3},
        "--batch-invariant: not with sums",
    ),
    ({"tensor_parallel_size": 2, "distributed_executor_backend": "uni"}, "uni has one rank"),
    ({"tensor_parallel_size": 7}, "cannot be cut for 7 ranks"),
    ({"scheduling_policy": "lpm", "enable_prefix_caching": False}, "--scheduling-policy lpm"),
    ({"kv_offload": ""}, "--kv-offload takes a folder, or host"),
    ({"kv_offload": "host", "enable_prefix_caching": False}, "--kv-offload goes by what the prefix cache knows"),
    ({"kv_offload": "host", "tensor_parallel_size": 3}, "--kv-offload: only with one rank"),
    ({"kv_offload": "host", "distributed_executor_backend": "ray"}, "--kv-offload: only with one rank"),
    ({"kv_offload": "host", "model": "gemma-3-270m"}, "--kv-offload: not with gemma-3-270m, whose layers differ"),
    ({"kv_offload": "host", "speculative_config": draft(model=MODEL)}, "--kv-offload: not with a draft model"),
    ({"kv_transfer_config": "{"}, "--kv-transfer-config: not valid JSON"),
    ({"kv_transfer_config": transfer(), "kv_offload": "host"}, "--kv-transfer-config: not with --kv-offload"),
    ({"kv_transfer_config": transfer(), "enable_lora": True}, "--kv-transfer-config: not with --enable-lora"),
    ({"kv_transfer_config": transfer(), "async_scheduling": True}, "a kv_producer not with --async-scheduling"),
    ({"kv_transfer_config": transfer(), "enable_prefix_caching": False}, "--kv-transfer-config goes by what the prefix cache"),
    ({"kv_transfer_config": transfer(), "tensor_parallel_size": 3}, "--kv-transfer-config: only with one rank"),
    ({"kv_transfer_config": transfer(), "prefix_cache": "radix"}, "radix: not with --kv-transfer-config"),
    ({"kv_transfer_config": transfer(), "model": "gemma-3-270m"}, "--kv-transfer-config: not with gemma-3-270m, whose layers"),
    ({"kv_transfer_config": transfer(), "speculative_config": draft(model=MODEL)}, "--kv-transfer-config: not with a draft"),
    ({"speculative_config": "{"}, "--speculative-config is not valid JSON"),
    ({"model": WINDOWED, "speculative_config": draft(model=MODEL)}, "the draft model has a vocabulary of"),
    ({"speculative_config": draft(model=MODEL, quantization="gptq")}, "is no gptq checkpoint"),
    ({"speculative_config": draft(model=MODEL, quantization="int8"), "enable_cpu_kernels": False}, "needs the CPU kernels"),
    ({"speculative_config": HEAD, "model": "gemma-3-270m"}, "method eagle: only for models of the LLaMA family"),
    ({"speculative_config": HEAD, "tensor_parallel_size": 3}, "method eagle: only with one rank"),
    ({"speculative_config": HEAD, "distributed_executor_backend": "ray"}, "method eagle: only with one rank"),
    ({"speculative_config": HEAD, "async_scheduling": True}, "--async-scheduling: not with --speculative-config"),
    ({"speculative_config": HEAD | {"quantization": "int8"}, "enable_cpu_kernels": False}, "needs the CPU kernels"),
    ({"speculative_config": HEAD}, "method eagle: there is no drafting head in no-such-head"),
]  # fmt: skip


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr(worker, "load_model", load)


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[", ".join(settings) for settings, _ in REFUSED])
def test_what_excludes_itself_is_refused_before_weights_are_loaded(
    settings: dict[str, Any], message: str, nothing_is_loaded: None
) -> None:
    if settings.get("batch_invariant") and native.load() is None:  # without a compiler this is missed first
        message = "--batch-invariant: it needs the C"
    with pytest.raises(ValueError, match=message):
        LLMEngine(EngineConfig(**{"model": MODEL, "load_format": "dummy", "device": "cpu"} | settings))
