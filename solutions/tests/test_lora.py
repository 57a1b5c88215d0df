"""LoRA adapters in the engine, against transformers' models with the adapters added to their weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from solutions.batching.continuous_batch import FlatBatch
from solutions.batching.sampling_params import SamplingParams
from solutions.core.capture import AdaptedReplay
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.core.lora.registry import LoRARequest, UnknownAdapterError, folder_at
from solutions.models.config.entries import ModelError
from solutions.tests.lora_adapters import LLAMA_TARGETS, TARGETS, likeliest, make_adapter
from solutions.tests.tiny_models import FAMILIES, make_tiny

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "max_model_len": 128, "block_size": 4, "num_gpu_blocks_override": 400, "enable_lora": True,
    "max_num_seqs": 16,
}  # fmt: skip
PROMPTS = [[(7 * i + 3 * j) % 250 + 1 for j in range(5 + 6 * i)] for i in range(6)]
COUNT = 12
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v2", "deepseek_v3")
ELSEWHERE = ("llama", "gpt2", "phi3", "gemma2", "gpt_neox", *SPARSE)
"""Families with tests of their own, and two whose tiny models say the same whatever is added to them."""
PARAMS = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True)


class Family:
    """A tiny model with three adapters: `merged[0]` is the model, `merged[i]` with adapter i in its weights."""

    def __init__(self, folder: Path, family: str) -> None:
        self.path, self.folder = folder / "model", folder
        base = make_tiny(family, self.path)
        targets = TARGETS.get(family, LLAMA_TARGETS)
        scaled = "|".join(targets).replace("experts", r"experts\..+")
        self.merged: list[PreTrainedModel] = [
            base,
            make_adapter(folder / "1", base, 4, 1, targets),
            make_adapter(folder / "2", base, 16, 2, (targets[0], targets[-1]), 6.0, use_rslora=True, lora_alpha=24),
            make_adapter(
                folder / "3", base, 1, 3, targets[1:], 5.0, family != "gpt_oss", lora_alpha=7, alpha_pattern={f"({scaled})": 5}
            ),
        ]
        self._seen: dict[tuple[int, int], list[int]] = {}

    def says(self, prompt: int, number: int, tokens: list[int]) -> bool:
        """Whether these are the tokens that the model with this adapter goes on with."""
        if self._seen.get((prompt, number)) != tokens:
            if len(tokens) != COUNT or likeliest(self.merged[number], PROMPTS[prompt], tokens) != tokens:
                return False
            self._seen[prompt, number] = tokens
            same = [other for (p, n), other in self._seen.items() if p == prompt and n != number and other == tokens]
            assert not same  # or a test could not tell the adapters apart
        return True

    def request(self, number: int) -> LoRARequest | None:
        return LoRARequest(f"adapter-{number}", number, str(self.folder / str(number))) if number else None

    def check(self, **settings: Any) -> LLM:
        """All prompts under all adapters in one go, compared with the oracle."""
        llm = LLM(str(self.path), **(SETTINGS | settings))
        pairs = [(prompt, number) for prompt in range(len(PROMPTS)) for number in range(4)]
        outputs = llm.generate(
            [{"prompt_token_ids": PROMPTS[prompt]} for prompt, _ in pairs], PARAMS, use_tqdm=False,
            lora_request=[self.request(number) for _, number in pairs],
        )  # fmt: skip
        for (prompt, number), output in zip(pairs, outputs, strict=True):
            assert self.says(prompt, number, list(output.outputs[0].token_ids)), (prompt, number)
        llm.llm_engine.block_manager.check_invariants()
        return llm


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Family]:
    return functools.cache(lambda name: Family(tmp_path_factory.mktemp(name), name))


# Tokens


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_a_mixed_batch_says_what_merged_models_say(name: str, family: Callable[[str], Family]) -> None:
    family(name).check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [family for family in FAMILIES if family not in ELSEWHERE])
def test_so_does_every_other_family(name: str, family: Callable[[str], Family]) -> None:
    family(name).check()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_gpu_blocks_override": 36, "max_num_batched_tokens": 16},
        {"num_gpu_blocks_override": 36, "preemption_mode": "swap"},
    ],
    ids=["recompute", "swap"],
)
def test_preemption_and_chunks_change_nothing(settings: dict[str, Any], family: Callable[[str], Family]) -> None:
    llm = family("llama").check(**settings)
    assert llm.llm_engine.stats().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"enable_cpu_kernels": False},
        {"enforce_eager": True},
        {"attention_backend": "naive", "enable_prefix_caching": False},
        {"speculative_config": '{"method": "ngram", "num_speculative_tokens": 3, "adaptive": false}'},
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "collective_backend": "ring"},
    ],
    ids=["torch", "eager", "naive", "ngram", "two ranks", "ring"],
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_other_engines_say_the_same(name: str, settings: dict[str, Any], family: Callable[[str], Family]) -> None:
    llm = family(name).check(**settings)
    llm.llm_engine.close()


@pytest.mark.slow
def test_a_draft_model_knows_no_adapters_and_changes_no_answer(family: Callable[[str], Family]) -> None:
    model = family("llama")
    draft = {"method": "draft_model", "model": str(model.path), "num_speculative_tokens": 3, "adaptive": False}
    llm = model.check(speculative_config=json.dumps(draft))
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 0


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_an_adapter_is_added_to_quantized_weights(quantization: str, family: Callable[[str], Family]) -> None:
    """The oracle is a layer's own product, measured without an adapter, plus B·A·x in numpy."""
    model = family("llama")
    llm = LLM(str(model.path), quantization=quantization, **SETTINGS)
    adapters = llm.llm_engine.executor.worker.adapters
    assert adapters is not None
    adapters.load(1, adapters.read(model.folder / "1"))
    tensors = load_file(model.folder / "1" / "adapter_model.safetensors")
    layer = llm.llm_engine.executor.worker.model.get_submodule("model.layers.1.mlp.down_proj")
    x = torch.randn(5, 160)
    slots = torch.tensor([0, 1, 0, 1, 1])
    adapters.begin(torch.zeros(5, dtype=torch.int64).numpy())
    plain = layer(x.clone())
    adapters.begin(slots.numpy())
    got = layer(x.clone())
    stem = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    a, b = tensors[f"{stem}A.weight"].numpy(), tensors[f"{stem}B.weight"].numpy()
    expected = plain.numpy() + slots.numpy()[:, None] * 2.0 * (x.numpy() @ a.T @ b.T)
    torch.testing.assert_close(got, torch.from_numpy(expected).float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(got[slots == 0], plain[slots == 0])


def test_steps_with_and_without_adapters_are_replayed(family: Callable[[str], Family]) -> None:
    """Each kind has one recording, however often they take turns, and an adapter may come into its slot afterwards."""
    model = family("llama")
    llm = LLM(str(model.path), **(SETTINGS | {"max_loras": 1}))
    replay = llm.llm_engine.executor.worker.model.model.run_layers
    if not isinstance(replay, AdaptedReplay):
        pytest.skip("needs the C++ kernels")
    for number in (0, 1, 0, 2, 0):
        llm.llm_engine.adapters.loaded.clear()
        prompt = {"prompt_token_ids": PROMPTS[2]}
        (output,) = llm.generate([prompt], PARAMS, use_tqdm=False, lora_request=model.request(number))
        assert model.says(2, number, list(output.outputs[0].token_ids))
    assert (replay.plain.num_recordings, replay.adapted.num_recordings) == (1, 1)


@pytest.mark.slow
def test_decode_steps_without_adapters_alone_are_in_graphs(family: Callable[[str], Family]) -> None:
    """As on a GPU, by Triton's interpreter, with a recorder that calls the step again."""
    pytest.importorskip("triton")
    from solutions.models.lora.products_triton import TritonProduct

    model = family("llama")
    settings = SETTINGS | {"attention_backend": "triton", "enable_cpu_kernels": False, "enforce_eager": True}
    llm = LLM(str(model.path), **settings)
    worker, replayed = llm.llm_engine.executor.worker, []
    assert isinstance(worker.model.get_submodule("model.layers.0.mlp.down_proj").multiply, TritonProduct)
    worker.capture_graphs([1, 2], lambda step: (step(), step)[1])
    assert worker.graphs is not None
    run_graph = worker.graphs.run

    def watched(batch: FlatBatch, size: int) -> torch.Tensor:
        replayed.append(batch.adapters.tolist())
        return run_graph(batch, size)

    worker.graphs.run = watched  # type: ignore[method-assign]
    for numbers in ((0, 1), (0, 0)):
        prompts = [{"prompt_token_ids": PROMPTS[0]}, {"prompt_token_ids": PROMPTS[1]}]
        requests = [model.request(number) for number in numbers]
        outputs = llm.generate(prompts, PARAMS, use_tqdm=False, lora_request=requests)
        for prompt, (number, output) in enumerate(zip(numbers, outputs, strict=True)):
            assert model.says(prompt, number, list(output.outputs[0].token_ids))
    assert replayed == [[0, 0]] * (COUNT - 1)


# The KV cache


def cached(llm: LLM, prompt: list[int], adapter: LoRARequest | None) -> int:
    """Tokens of a prompt that were found in the cache."""
    return llm.generate([{"prompt_token_ids": prompt}], PARAMS, use_tqdm=False, lora_request=adapter)[0].num_cached_tokens


def test_a_prompt_is_cached_for_its_adapter_alone(family: Callable[[str], Family]) -> None:
    model = family("llama")
    llm, prompt = LLM(str(model.path), **SETTINGS), PROMPTS[5]
    for number in (1, 0, 2):
        assert cached(llm, prompt, model.request(number)) == 0
        assert cached(llm, prompt, model.request(number)) > 0
    adapters = llm.llm_engine.adapters
    salt = adapters.loaded["adapter-1"].salt
    adapters.remove("adapter-1")
    assert cached(llm, prompt, model.request(1)) == 0  # the same name and slot, but perhaps other weights
    assert adapters.loaded["adapter-1"].slot == 1
    assert adapters.loaded["adapter-1"].salt != salt


def test_an_adapter_and_a_salt_of_the_request_both_count(family: Callable[[str], Family]) -> None:
    model = family("llama")
    llm = LLM(str(model.path), **SETTINGS)

    def found(salt: str) -> int:
        prompt = {"prompt_token_ids": PROMPTS[5], "cache_salt": salt}
        return llm.generate([prompt], PARAMS, use_tqdm=False, lora_request=model.request(1))[0].num_cached_tokens

    assert (found("a"), found("b"), found("a") > 0) == (0, 0, True)


# Slots


def run(engine: LLMEngine) -> dict[str, list[int]]:
    said = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            said[output.request_id] = list(output.outputs[0].token_ids)
    return said


def submit(engine: LLMEngine, name: str, adapter: str | None, params: SamplingParams = PARAMS) -> None:
    request = engine.prepare(name, {"prompt_token_ids": PROMPTS[3]}, params)
    request.adapter = adapter
    engine.submit(request)


def test_requests_of_an_adapter_that_is_unloaded_go_on_with_it(family: Callable[[str], Family]) -> None:
    model = family("llama")
    modules = (f"one={model.folder / '1'}",)
    engine = LLMEngine(EngineConfig(str(model.path), **(SETTINGS | {"max_loras": 2, "lora_modules": modules})))
    adapters, two, three = engine.adapters, model.folder / "2", model.folder / "3"
    submit(engine, "a", "one")
    for _ in range(3):
        engine.step()
    adapters.remove("one")
    with pytest.raises(UnknownAdapterError, match="'one' cannot be found"):
        submit(engine, "b", "one")
    adapters.add("one", two, adapters.read(two))  # the name is free, the slot is not
    submit(engine, "b", "one")
    with pytest.raises(ValueError, match="all 2 adapters of --max-loras are in use, 1 for requests that still run"):
        adapters.add("three", three, adapters.read(three))
    said = run(engine)
    assert model.says(3, 1, said["a"])
    assert model.says(3, 2, said["b"])
    adapters.add("three", three, adapters.read(three))
    submit(engine, "c", "three")
    adapters.remove("three")  # while it waits
    with pytest.raises(ValueError, match="already been loaded"):
        adapters.add("one", three, adapters.read(three))
    adapters.add("one", three, adapters.read(three), replace=True)
    submit(engine, "d", "one")
    said = run(engine)
    assert model.says(3, 3, said["c"])
    assert model.says(3, 3, said["d"])


def test_the_answers_of_one_request_share_its_adapter(family: Callable[[str], Family]) -> None:
    model = family("llama")
    llm = LLM(str(model.path), **SETTINGS)
    params = SamplingParams(temperature=0, max_tokens=COUNT, ignore_eos=True, n=3)
    prompts = [{"prompt_token_ids": PROMPTS[4]}] * 2
    outputs = llm.generate(prompts, params, use_tqdm=False, lora_request=[model.request(1), None])
    for output, number in zip(outputs, (1, 0), strict=True):
        assert all(model.says(4, number, list(each.token_ids)) for each in output.outputs)


def test_without_enable_lora_a_model_is_as_it_was(family: Callable[[str], Family]) -> None:
    model = family("llama")
    llm = LLM(str(model.path), **(SETTINGS | {"enable_lora": False}))
    worker = llm.llm_engine.executor.worker
    assert worker.adapters is None
    functions = [value for layer in worker.model.modules() for value in vars(layer).values() if callable(value)]
    assert not [each for each in functions if "lora" in type(each).__module__]
    with pytest.raises(ValueError, match="start it with --enable-lora"):
        llm.generate(["x"], PARAMS, use_tqdm=False, lora_request=model.request(1))
    with pytest.raises(UnknownAdapterError):
        submit(llm.llm_engine, "a", "one")
    assert not llm.llm_engine.has_unfinished_requests()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"enable_lora": False, "lora_modules": ("a=b",)}, "--lora-modules needs --enable-lora"),
        ({"lora_modules": ("a",)}, "'a' is not NAME=FOLDER"),
        ({"lora_modules": ("=a",)}, "'=a' is not NAME=FOLDER"),
        ({"lora_modules": ("a=/nowhere",)}, "/nowhere has no adapter_config.json"),
        ({"max_loras": 0}, "max_loras must be at least 1"),
        ({"max_lora_rank": 513}, "max_lora_rank must be between 1 and 512"),
        ({"batch_invariant": True}, "not with --batch-invariant"),
        ({"distributed_executor_backend": "ray"}, "not with ranks that are Ray actors"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], said: str, family: Callable[[str], Family]) -> None:
    with pytest.raises(ValueError, match=said):
        LLM(str(family("llama").path), **(SETTINGS | settings))


# Files


def refused(family: Family, folder: Path) -> str:
    from solutions.models.loader import load_model, resolve_model
    from solutions.models.lora.attach import ModelAdapters

    model = load_model(resolve_model(str(family.path)), torch.float32, torch.device("cpu"), progress=False)
    with pytest.raises(ModelError) as error:
        ModelAdapters(model, 192, num_slots=2, max_rank=8).read(folder)
    return str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "changes biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"alpha_pattern": {"q_proj": "much"}}, "q_proj"),
        ({"alpha_pattern": {"(": 1}}, "is no regular expression"),
    ],
)
def test_what_is_no_sum_of_products_is_refused(
    change: dict[str, Any], said: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    model = family("llama")
    make_adapter(tmp_path, model.merged[0], targets=("q_proj",), **change)
    assert said in refused(model, tmp_path)


STEM = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({STEM + "A.weight": (4, 192)}, "only one of lora_A and lora_B"),
        ({STEM + "A.weight": (4, 192), STEM + "B.weight": (192, 3)}, "do not fit each other"),
        ({STEM + "A.weight": (4, 191), STEM + "B.weight": (192, 4)}, "q_proj|qkv_proj"),
        ({STEM + "A.weight": (4, 192), STEM + "B.weight": (191, 4)}, "qkv_proj"),
        ({STEM + "A.weight": (9, 192), STEM + "B.weight": (192, 9)}, "--max-lora-rank is 8"),
        ({f"{STEM}A{which}.weight": (4, 192) for which in ("", ".default")}, "more than one lora_A"),
        ({STEM + "magnitude_vector": (192,)}, "lora_magnitude_vector"),
        ({"base_model.model.model.embed_tokens.lora_embedding_A": (4, 320)}, "lora_embedding_A"),
        ({"base_model.model.lm_head.lora_A.weight": (4, 192), "base_model.model.lm_head.lora_B.weight": (320, 4)}, "lm_head"),
        ({"base_model.model.model.norm.lora_A.weight": (4, 192), "base_model.model.model.norm.lora_B.weight": (1, 4)}, "norm"),
        ({STEM.replace("0", "9") + "A.weight": (4, 192), STEM.replace("0", "9") + "B.weight": (192, 4)}, "layers.9"),
        ({}, "empty"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(
    tensors: dict[str, tuple[int, ...]], said: str, family: Callable[[str], Family], tmp_path: Path
) -> None:
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    message = refused(family("llama"), tmp_path)
    assert any(word in message for word in said.split("|")), message


def test_files_that_are_missing_or_damaged_are_named(family: Callable[[str], Family], tmp_path: Path) -> None:
    model = family("llama")
    assert "File name too long" in refused(model, tmp_path / ("x" * 300))
    with pytest.raises(ValueError, match="nobody_here"):
        folder_at("~nobody_here/adapter")
    assert "no adapter_config.json" in refused(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    assert "safe_serialization" in refused(model, tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x10")
    assert "damaged" in refused(model, tmp_path)
    save_file({STEM + "A.weight": torch.full((4, 192), float("nan")), STEM + "B.weight": torch.ones(192, 4)},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    assert "not all finite" in refused(model, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refused(model, tmp_path)
