"""LoRA adapters of experts and routers, against transformers' models with the adapters in their weights, and against NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from solutions.core.capture import AdaptedReplay, LayerReplay
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.models.costs.memory import adapter_bytes
from solutions.models.layers import CausalLM
from solutions.models.loader import load_model, resolve_model
from solutions.models.lora.attach import ModelAdapters
from solutions.models.lora.experts import AdaptedExperts
from solutions.models.moe import Experts
from solutions.parallelism.tensor_parallel import TensorParallel
from solutions.tests.lora_adapters import TARGETS, make_adapter
from solutions.tests.test_lora import PARAMS, PROMPTS, SETTINGS, Family
from solutions.tests.tiny_models import make_tiny

SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    made: dict[str, Family] = {}

    def get(name: str) -> Family:
        if name not in made:
            made[name] = Family(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def loaded(folder: Path, parallel: TensorParallel | None = None) -> CausalLM:
    source = resolve_model(str(folder))
    return load_model(source, torch.float32, torch.device("cpu"), parallel or TensorParallel(), progress=False)


# Tokens


@pytest.mark.parametrize("name", SPARSE)
def test_a_mixed_batch_says_what_merged_models_say(name: str, family: Callable[[str], Family]) -> None:
    """Of adapters 1 and 2 all experts lie in one tensor, of 3 each is a layer (but gpt-oss's)."""
    family(name).check()


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "gpt_oss"])
def test_portable_layers_say_the_same(name: str, family: Callable[[str], Family]) -> None:
    family(name).check(enable_cpu_kernels=False)


@pytest.mark.parametrize("expert_parallel", [False, True], ids=["parts", "whole"])
@pytest.mark.parametrize("name", ["qwen2_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_two_ranks_say_the_same(name: str, expert_parallel: bool, family: Callable[[str], Family]) -> None:
    """Also where each has some experts whole, and those of the other are none of its own."""
    llm = family(name).check(tensor_parallel_size=2, enable_expert_parallel=expert_parallel)
    llm.llm_engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe"])
def test_so_do_layers_in_triton(name: str, family: Callable[[str], Family]) -> None:
    """By Triton's interpreter; an expert with an adapter is computed by itself, not in the grouped product."""
    pytest.importorskip("triton")
    family(name).check(attention_backend="triton", enable_cpu_kernels=False, enforce_eager=True)


def test_steps_without_adapters_of_experts_are_replayed(family: Callable[[str], Family], tmp_path: Path) -> None:
    """One recording serves steps without adapters, one those with adapters of attention; steps with one of experts have none."""
    model = family("mixtral")
    make_adapter(model.folder / "4", model.merged[0], 4, 4, ("q_proj", "gate"))
    llm = LLM(str(model.path), **SETTINGS)
    replay = llm.llm_engine.executor.worker.model.model.run_layers
    if not isinstance(replay, AdaptedReplay):
        pytest.skip("needs the C++ kernels")
    calls = {"plain": 0, "adapted": 0}

    def count(name: str, replay: LayerReplay) -> Callable[..., torch.Tensor]:
        def run(*inputs: Any) -> torch.Tensor:
            calls[name] += 1
            return replay(*inputs)

        return run

    counted = AdaptedReplay(replay.plain, replay.adapted, replay.step)
    llm.llm_engine.executor.worker.model.model.run_layers = counted
    seen = []
    for number in (0, 4, 1, 0):
        prompt = {"prompt_token_ids": PROMPTS[2]}
        (output,) = llm.generate([prompt], PARAMS, use_tqdm=False, lora_request=model.request(number))
        if number != 4:
            assert model.says(2, number, list(output.outputs[0].token_ids))
        seen.append((replay.plain.num_recordings, replay.adapted.num_recordings))
    assert seen == [(1, 0), (1, 1), (1, 1), (1, 1)]
