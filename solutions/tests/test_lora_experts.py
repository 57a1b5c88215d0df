"""LoRA adapters of experts and routers, against transformers' models with the adapters in their weights, and against NumPy."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solutions.core.capture import AdaptedReplay
from solutions.core.engine import LLM
from solutions.models.config.entries import ModelError
from solutions.models.costs.memory import adapter_bytes
from solutions.models.kernels.attach import Plan, attach
from solutions.models.layers import CausalLM
from solutions.models.loader import load_model, resolve_model
from solutions.models.lora.attach import ModelAdapters
from solutions.models.moe import Experts
from solutions.parallelism.tensor_parallel import TensorParallel
from solutions.tests.lora_adapters import LLAMA_TARGETS, TARGETS, make_adapter
from solutions.tests.test_lora import PARAMS, PROMPTS, SETTINGS, SPARSE, Family
from solutions.tests.test_made_checkpoints import make
from solutions.tests.tiny_models import make_tiny

EXPERTS = "base_model.model.model.layers.1.mlp.experts"


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return functools.cache(lambda name: Family(tmp_path_factory.mktemp(name), name))


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


def test_steps_without_adapters_of_experts_are_replayed(family: Callable[[str], Family], tmp_path: Path) -> None:
    """One recording serves steps without adapters, one those with some of attention; those with some of experts have none."""
    model = family("mixtral")
    make_adapter(model.folder / "4", model.merged[0], 4, 4, ("q_proj", "gate"))
    llm = LLM(str(model.path), **SETTINGS)
    replay = llm.llm_engine.executor.worker.model.model.run_layers
    if not isinstance(replay, AdaptedReplay):
        pytest.skip("needs the C++ kernels")
    seen = []
    for number in (0, 4, 1, 0):
        prompt = {"prompt_token_ids": PROMPTS[2]}
        (output,) = llm.generate([prompt], PARAMS, use_tqdm=False, lora_request=model.request(number))
        if number != 4:
            assert model.says(2, number, list(output.outputs[0].token_ids))
        seen.append((replay.plain.num_recordings, replay.adapted.num_recordings))
    assert seen == [(1, 0), (1, 1), (1, 1), (1, 1)]


# Products


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "gptq", "awq"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_several_adapters_of_experts_in_a_step(name: str, quantization: str | None, tmp_path: Path) -> None:
    """The oracle is the layer without adapters, plus what NumPy adds of each adapter's down to what gate and up have given."""
    base, experts, model = make_tiny(name, tmp_path / "model"), "model.layers.1.mlp.experts", tmp_path / "model"
    if quantization in ("gptq", "awq"):
        make(quantization, tmp_path / "model", model := tmp_path / "made")
        quantization = None
    llm = LLM(str(model), quantization=quantization, **SETTINGS)
    worker = llm.llm_engine.executor.worker
    layer = worker.model.get_submodule(experts)
    assert isinstance(layer, Experts)
    assert worker.adapters is not None
    x, logits = torch.randn(9, 192), torch.randn(9, len(layer.load))
    slots = torch.tensor([0, 2, 1, 1, 0, 2, 1, 0, 2])
    weights, chosen = layer.choose(logits)
    worker.adapters.begin(torch.zeros(9, dtype=torch.int64).numpy())
    load = layer.load.clone()
    plain = layer(x.clone(), logits).clone()
    counted = layer.load - load
    expected = plain.double().numpy()
    for slot, rank in ((1, 3), (2, 5)):
        make_adapter(tmp_path / str(slot), base, rank, slot, ("experts",))
        file = tmp_path / str(slot) / "adapter_model.safetensors"
        tensors = {key: tensor for key, tensor in load_file(file).items() if "base_layer" not in key}  # down alone
        save_file(tensors, file)
        worker.adapters.load(slot, worker.adapters.read(file.parent))
        a, b = (tensors[f"{EXPERTS}.lora_{half}.weight"].double().numpy() for half in "AB")
        count = layer.mixture.count
        for row in (slots == slot).nonzero().flatten().tolist():
            for weight, number in zip(weights[row].tolist(), chosen[row].tolist(), strict=True):
                if number < count:
                    inner = layer.own[number].gate_up_proj(x[row : row + 1]).double().numpy()[0]
                    of_a, of_b = a.reshape(count, rank, -1)[number], b[:, number::count]
                    expected[row] += weight * 2 * (of_b @ (of_a @ inner))
    worker.adapters.begin(slots.numpy())
    load = layer.load.clone()
    got = layer(x.clone(), logits).clone()
    assert torch.equal(layer.load - load, counted)
    torch.testing.assert_close(got.double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[slots == 0], plain[slots == 0], rtol=1e-5, atol=1e-5)
    stream = torch.ones(9, 192)
    assert layer(x.clone(), logits, stream) is stream
    torch.testing.assert_close(stream, 1 + got, rtol=1e-5, atol=1e-5)
    worker.adapters.load(1, {})
    worker.adapters.load(2, {})
    torch.testing.assert_close(layer(x.clone(), logits), plain, rtol=1e-5, atol=1e-5)  # the step began with some
    worker.adapters.begin(slots.numpy())
    assert torch.equal(layer(x.clone(), logits), plain)


@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_rows_without_an_expert_of_the_rank_are_zeros(tokens: int, family: Callable[[str], Family]) -> None:
    """Of two ranks with whole experts, each adds its own; together they are what one rank says."""
    model = family("qwen2_moe")
    generator = torch.Generator().manual_seed(tokens)
    x, logits = torch.randn(tokens, 192, generator=generator), torch.randn(tokens, 7, generator=generator)
    said = []
    for parallel in (TensorParallel(), *(TensorParallel(rank, 2, None, whole_experts=True) for rank in range(2))):
        whole = loaded(model.path, parallel)
        adapters = ModelAdapters(whole, 192, 2, 16)
        for slot in (1, 2):
            adapters.load(slot, adapters.read(model.folder / str(slot)))
        adapters.begin(torch.arange(tokens).remainder(3).numpy())
        layer = whole.get_submodule("model.layers.2.mlp.experts")
        said.append(layer(x, logits))
    torch.testing.assert_close(said[1] + said[2], said[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_layers_in_triton_say_the_same(name: str, family: Callable[[str], Family]) -> None:
    """By its interpreter; in a step in which an adapter changes an expert each is computed by itself, else all together."""
    pytest.importorskip("triton")
    model, said = family(name), []
    for kernels in (None, "triton"):
        whole = loaded(model.path)
        attach(whole, Plan(kernels))
        adapters, layer = ModelAdapters(whole, 192, 2, 16, kernels), whole.get_submodule("model.layers.1.mlp.experts")
        for slot in (1, 2):
            adapters.load(slot, adapters.read(model.folder / str(slot)))
        generator = torch.Generator().manual_seed(5)
        x, logits = torch.randn(5, 192, generator=generator), torch.randn(5, len(layer.load), generator=generator)
        for slots in ([0, 0, 0, 0, 0], [2, 0, 1, 1, 2], [0, 0, 0, 0, 0]):
            adapters.begin(np.array(slots))
            said.append(layer(x, logits))
        assert torch.equal(said[-1], said[-3])  # nothing of the step before is left
    torch.testing.assert_close(said[3], said[0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(said[4], said[1], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(said[0], said[1], atol=0.1)


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen2_moe", "qwen3_moe"])
def test_memory_counts_what_an_adapter_of_everything_holds(name: str, tmp_path: Path) -> None:
    """The oracle is a file in which each matrix of each expert has tensors of its own."""
    base = make_tiny(name, tmp_path / "model")
    make_adapter(tmp_path, base, 3, 0, TARGETS.get(name, LLAMA_TARGETS), as_layers=True)
    held = sum(tensor.nbytes for tensor in load_file(tmp_path / "adapter_model.safetensors").values())
    config = resolve_model(str(tmp_path / "model")).config
    assert adapter_bytes(config, 3, torch.float32) == held
    assert adapter_bytes(config, 8 * 3, torch.bfloat16) == 4 * held


# Files


def refused(family: Family, folder: Path, parallel: TensorParallel | None = None) -> str:
    adapters = ModelAdapters(loaded(family.path, parallel), 192, num_slots=2, max_rank=8)
    with pytest.raises(ModelError) as error:
        adapters.read(folder)
    return str(error.value)


def write(folder: Path, tensors: dict[str, tuple[int, ...]]) -> Path:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    return folder


def pair(layer: str, a: tuple[int, int], b: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    return {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (pair(EXPERTS, (15, 191), (320, 15)), "expected shapes [5 · r, 192] and [320, 5 · r] or [5 · r, 160] and [192, 5 · r]"),
        (pair(EXPERTS, (15, 320), (192, 15)), "expected shapes"),  # turned around, as early versions of PEFT did
        (pair(EXPERTS, (16, 192), (320, 16)), "expected shapes"),
        (pair(EXPERTS, (4, 192), (320, 4)), "expected shapes"),
        (pair(EXPERTS, (45, 192), (320, 45)), "experts.gate_up_proj has rank 9, and --max-lora-rank is 8"),
        (pair(EXPERTS + ".base_layer.base_layer", (5, 192), (320, 4)), "do not fit each other"),
        (pair(EXPERTS, (5, 160), (192, 5)) | pair(EXPERTS + ".base_layer", (5, 160), (192, 5)), "is there twice"),
        (pair(EXPERTS, (5, 192), (320, 5)) | pair(EXPERTS + ".3.up_proj", (1, 192), (160, 1)), "is there twice"),
        (pair(EXPERTS + ".5.w1", (4, 192), (160, 4)), "the adapter changes model.layers.1.mlp.experts.5.gate_up_proj"),
        (pair(EXPERTS + ".4.w1", (4, 192), (161, 4)), "experts.4.gate_up_proj: expected shape [160, 4]"),
        (pair(EXPERTS + ".4.w2", (4, 161), (192, 4)), "experts.4.down_proj: expected shape [4, 160]"),
        (pair(EXPERTS.removesuffix("experts") + "gate", (4, 192), (6, 4)), "mlp.gate: expected shape [5, 4]"),
    ],
)
@pytest.mark.parametrize("rank", [None, 0, 1], ids=["all experts", "the first", "the last"])
def test_adapters_that_do_not_fit_experts_are_refused(
    rank: int | None, tensors: dict[str, tuple[int, ...]], said: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    """By each rank alike, also if whole experts are those of another: one that fails alone leaves the others waiting."""
    parallel = None if rank is None else TensorParallel(rank, 2, None, whole_experts=True)
    message = refused(family("mixtral"), write(tmp_path, tensors), parallel)
    assert said in message, message


def test_layers_of_latents_take_no_adapter(family: Callable[[str], Family], tmp_path: Path) -> None:
    layer = "model.layers.1.self_attn.kv_a_proj_with_mqa"
    folder = write(tmp_path, pair(f"base_model.model.{layer}", (4, 192), (128, 4)))
    assert f"the adapter changes {layer}, and only linear layers" in refused(family("deepseek_v3"), folder)


def test_a_model_without_experts_takes_no_adapter_of_them(family: Callable[[str], Family], tmp_path: Path) -> None:
    folder = write(tmp_path, pair(EXPERTS, (5, 192), (320, 5)))
    assert "model.layers.1.mlp.experts, and a LlamaForCausalLM has no experts" in refused(family("llama"), folder)
