"""The engine on a GPU's backends: on a card as it is, without one by Triton's interpreter and the CUDA kernel run on the CPU.

What only a card can do, CUDA graphs, is tested there; here their padded steps run without being captured.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from solutions.attention.backends import make_backend
from solutions.attention.paged_attention import AttentionMetadata, NaiveBackend
from solutions.batching.continuous_batch import FlatBatch
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.step_arrays import FlatArrays
from solutions.benchmarks import gpu as command
from solutions.benchmarks.gpu import (
    StepTime,
    measure_attention,
    measure_card,
    measure_decode,
    measure_prefill,
    nano_requests,
    typical,
)
from solutions.benchmarks.kernels import Ceilings
from solutions.benchmarks.timing import made_up
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, LLMEngine
from solutions.core.graphs.decode_graphs import PADDING_SLOT, CudaGraphRecorder, DecodeGraphs, Step, graph_sizes
from solutions.models.config.aliases import ALIASES
from solutions.models.costs.roofline import CARDS, Card, decode_cost, num_product_weights, prefill_cost
from solutions.models.kernels.attach import Plan, add_inside, attach
from solutions.models.loader import load_model, resolve_model
from solutions.tests.tiny_models import make_tiny, make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
BACKENDS = [pytest.param("triton", marks=needs_triton), "cuda"]
PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
PROMPTS = [[1, 2, 3], list(range(1, 24)), [5] * 17, [9]]
SETTINGS = {"dtype": "float32", "max_model_len": 128, "device": DEVICE, "enable_cpu_kernels": False}
SETTINGS |= {"kv_cache_memory_bytes": 16 << 20}  # a card has room for many of these at once
SIZES = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}  # a head size that every backend takes


def generate(path: Path, **settings: object) -> tuple[LLM, list[list[int]]]:
    """An engine, and the tokens that it generates after `PROMPTS`."""
    llm = LLM(str(path), **(SETTINGS | settings))
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], PARAMS, use_tqdm=False)
    return llm, [output.outputs[0].token_ids for output in outputs]


def oracle(path: Path) -> list[list[int]]:
    """The same from transformers."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        tokens.append(out[0, len(prompt) :].tolist())
    return tokens


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_mistral])
def test_the_engine_generates_what_transformers_does(tmp_path: Path, make: Callable[..., object], backend: str) -> None:
    make(tmp_path, **SIZES)
    llm, tokens = generate(tmp_path, attention_backend=backend)
    assert llm.llm_engine.executor.attention_backend == backend
    assert tokens == oracle(tmp_path)
    assert f"attention by the {backend} backend" in "\n".join(llm.llm_engine.startup_summary())


@pytest.mark.slow
@needs_triton
def test_a_model_without_rotation(tmp_path: Path) -> None:
    make_tiny_gpt2(tmp_path)
    assert generate(tmp_path, attention_backend="triton")[1] == oracle(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(DEVICE == "cuda", reason="the default model is not on the card's machine; its shapes are tested there")
@needs_triton
def test_the_real_model_on_triton() -> None:
    """Sixteen tokens of the default model with attention by Triton equal those of transformers."""
    source = resolve_model("smollm2-135m")
    hf = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()
    llm = LLM("smollm2-135m", dtype="float32", attention_backend="triton", max_model_len=128)
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    (output,) = llm.generate(["The capital of France is"], params, use_tqdm=False)
    ids = torch.tensor([output.prompt_token_ids])
    expected = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16, do_sample=False)
    assert output.outputs[0].token_ids == expected[0, ids.shape[1] :].tolist()


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3", "phi3", "olmo2"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Biases, norms of heads and behind layers, layers that do not turn, heads that turn in part."""
    make_tiny(family, tmp_path)
    assert generate(tmp_path, attention_backend="triton")[1] == oracle(tmp_path)


@needs_triton
def test_triton_layers_are_used_and_equal_pytorchs(tmp_path: Path) -> None:
    from solutions.models.kernels import layers_triton

    make_tiny_llama(tmp_path)
    source = resolve_model(str(tmp_path))
    device = torch.device(DEVICE)
    models = [load_model(source, torch.float32, device, progress=False) for _ in range(2)]
    attach(models[1], Plan("triton"))
    plain, fused = (model.model.layers[0] for model in models)
    x = torch.randn(9, 48, device=device)
    assert fused.input_layernorm.forward.func is layers_triton.rms_norm
    assert fused.mlp.gate_up_proj.activate is layers_triton.silu_mul
    assert fused.self_attn.o_proj.multiply.func is add_inside
    for layer in ("input_layernorm", "post_attention_layernorm"):
        torch.testing.assert_close(getattr(fused, layer)(x), getattr(plain, layer)(x))
    torch.testing.assert_close(fused.mlp(x, x.clone()), plain.mlp(x, x.clone()))


# CUDA graphs


def test_graph_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(3) == [1, 2, 3]
    assert graph_sizes(8) == [1, 2, 4, 8]
    assert graph_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert graph_sizes(1024) == [1, 2, 4, *range(8, 257, 8)]


def recorder(order: list[int]) -> Callable[[Step], Step]:
    """On a card the real one; else a step stays as it is, but must not be given memory of its own for its inputs."""

    def record(step: Step) -> Step:
        order.append(len(step()))
        return CudaGraphRecorder()(step) if DEVICE == "cuda" else step

    return record


def test_a_recording_of_each_size_sees_that_many_rows_of_one_memory() -> None:
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, AttentionMetadata]] = {}

    def model(input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        seen[len(input_ids)] = input_ids, positions, metadata
        return torch.zeros(len(input_ids), 4)

    caches = [torch.zeros(2, 8, 4, 1, 16)]
    DecodeGraphs(model, NaiveBackend(), caches, [1, 2, 5], 10, 4, (None,), lambda step: (step(), step)[1])
    assert list(seen) == [5, 2, 1]
    for size, (input_ids, positions, metadata) in seen.items():
        assert input_ids.shape == positions.shape == metadata.slot_mapping.shape == metadata.context_lens.shape == (size,)
        assert metadata.block_tables.shape == (size, 3)  # of 10 tokens in blocks of 4
        assert metadata.query_start_loc.tolist() == list(range(size + 1))  # a token each
        assert (metadata.max_query_len, metadata.max_context_len, metadata.kv_caches) == (1, 10, caches)
        assert metadata.slot_mapping.data_ptr() == seen[5][2].slot_mapping.data_ptr()


def test_groups_of_layers_have_tables_and_slots_of_their_own_in_a_recording() -> None:
    seen: dict[int, AttentionMetadata] = {}

    def model(input_ids: torch.Tensor, positions: torch.Tensor, metadata: AttentionMetadata) -> torch.Tensor:
        seen[len(input_ids)] = metadata
        return torch.zeros(len(input_ids), 4)

    caches = [torch.zeros(2, 8, 4, 1, 16)]
    graphs = DecodeGraphs(model, NaiveBackend(), caches, [1, 4], 10, 4, (None, 6), lambda step: (step(), step)[1])
    nothing = np.empty(0, np.int64)
    batch = FlatArrays(
        slot_mapping=np.array([[5, 9], [1, 2]]), block_tables=np.array([[[1], [2]], [[0], [3]]], np.int32),
        query_start_loc=np.arange(3, dtype=np.int32), context_lens=np.array([2, 2], np.int32), input_ids=np.array([7, 8]),
        positions=np.array([1, 1]), adapters=nothing,
    )  # fmt: skip
    graphs.run(batch, 4)
    for group, (slots, tables) in enumerate((([5, 9, -1, -1], [1, 2]), ([1, 2, -1, -1], [0, 3]))):
        metadata = seen[4].of(group)
        assert metadata.slot_mapping.tolist() == slots
        assert metadata.block_tables[:2, 0].tolist() == tables
        assert metadata.slot_mapping.is_contiguous()
        assert metadata.block_tables.shape == (4, 3)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_steps_give_the_same_tokens(tmp_path: Path, backend: str) -> None:
    """Batches of 4, then 3, 2, 1 sequences run in recordings for 1, 2 and 5."""
    make_tiny_llama(tmp_path, **SIZES)
    params = [SamplingParams(temperature=0, max_tokens=2 + i, ignore_eos=True) for i in range(len(PROMPTS))]
    prompts = [{"prompt_token_ids": p} for p in PROMPTS]
    llm = LLM(str(tmp_path), attention_backend=backend, enforce_eager=True, **SETTINGS)
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
    worker, order, sizes = llm.llm_engine.executor.worker, [], []
    assert worker.graphs is None
    worker.capture_graphs([1, 2, 5], recorder(order))
    assert order == [5, 2, 1]  # the largest first
    run = worker.graphs.run

    def watched(batch: FlatBatch, size: int) -> torch.Tensor:
        hidden, count, buffers = run(batch, size), len(batch.sequences), worker.graphs._buffers
        sizes.append((count, size))
        assert buffers.slot_mapping[count:size].tolist() == [PADDING_SLOT] * (size - count)  # nothing left of a larger batch
        assert buffers.context_lens[count:size].tolist() == [0] * (size - count)
        return hidden

    worker.graphs.run = watched
    llm.llm_engine.block_manager.prefix_cache.clear()
    assert [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)] == expected
    assert set(sizes) == {(4, 5), (3, 5), (2, 2), (1, 1)}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_decode_steps_that_fit_are_replayed(tmp_path: Path, backend: str) -> None:
    make_tiny_llama(tmp_path, **SIZES)
    llm, expected = generate(tmp_path, attention_backend=backend, enforce_eager=True)
    worker = llm.llm_engine.executor.worker
    worker.capture_graphs([1, 2], recorder([]))
    counts: list[int] = []
    run = worker.graphs.run
    worker.graphs.run = lambda batch, size: (counts.append(len(batch.input_ids)), run(batch, size))[1]
    llm.llm_engine.block_manager.prefix_cache.clear()
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], PARAMS, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    assert counts == []  # four sequences at once are more than two
    (output,) = llm.generate([{"prompt_token_ids": PROMPTS[0]}], PARAMS, use_tqdm=False)
    assert output.outputs[0].token_ids == expected[0]
    assert counts == [1] * 3  # the first token came with the prompt


@pytest.mark.skipif(DEVICE != "cuda", reason="no GPU here")
def test_graphs_are_captured_at_start_unless_switched_off(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path, **SIZES)
    with_graphs, tokens = generate(tmp_path, max_num_seqs=8)
    assert with_graphs.llm_engine.executor.worker.graphs.sizes == graph_sizes(8)
    without, expected = generate(tmp_path, enforce_eager=True)
    assert without.llm_engine.executor.worker.graphs is None
    assert tokens == expected == oracle(tmp_path)


def test_backends_that_ask_the_device_are_not_captured() -> None:
    assert not make_backend("torch", "cpu", torch.float32, 64).capturable
    assert make_backend("cuda", "cpu", torch.float32, 64).capturable
    assert PADDING_SLOT == -1


# The benchmark


def test_floors_of_llama_7b() -> None:
    """By hand: 32 layers of 4·4096² + 3·4096·11008 weights and a head of 32000·4096; 512 KiB of KV a token."""
    model = ALIASES["llama-7b"].config
    weights = 32 * (4 * 4096**2 + 3 * 4096 * 11008) + 32000 * 4096
    assert num_product_weights(model) == weights == 6_607_077_376
    cost = decode_cost(model, 32, 1024)
    assert cost.weight_bytes == 2 * weights
    assert cost.kv_bytes == 32 * 1024 * (512 << 10)
    assert cost.product_operations == 2 * 32 * weights
    assert cost.attention_operations == 32 * 1024 * 32 * 4 * 4096
    a100, h100, _ = CARDS
    assert cost.floor(a100) == pytest.approx((2 * weights + 32 * 1024 * 524288) / 2.039e12)
    assert cost.floor(h100) == pytest.approx(9.07e-3, rel=2e-3)
    assert decode_cost(model, 1024, 0).floor(a100) == pytest.approx(2 * weights * 1024 / 312e12)  # bound by operations


def test_floor_of_a_prompt() -> None:
    model = ALIASES["llama-7b"].config
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    cost = prefill_cost(model, 3)
    assert cost.product_operations == 2 * (3 * layers + 32000 * 4096)
    assert cost.attention_operations == 32 * 4 * 4096 * (1 + 2 + 3)
    assert cost.kv_bytes == 3 * (512 << 10)


def test_measured_steps_are_the_steps_asked_for(tmp_path: Path) -> None:
    make_tiny_llama(tmp_path)
    engine = LLMEngine(EngineConfig(model=str(tmp_path), max_model_len=128, device=DEVICE, num_gpu_blocks_override=64))
    looks = [lambda: Card("toy", 1e9, 1e9, 1e9)]
    step = measure_decode(engine, looks, batch=3, context=64, steps=4)
    assert (step.what, step.batch) == ("decode", 3)
    assert 56 <= step.context <= 64
    assert step.tokens_per_second == pytest.approx(3 / step.seconds)
    assert not engine.has_unfinished_requests()
    short = measure_decode(engine, looks, batch=16, context=120, steps=2)
    assert short.context <= 48  # 64 blocks of 16 hold 16 sequences of no more
    prompt = measure_prefill(engine, looks, 40, repeats=2)
    assert (prompt.what, prompt.context) == ("prefill", 40)
    assert engine.stats().prefix_cache_hits == 0
    with pytest.raises(ValueError, match="no room for 60 sequences"):
        measure_decode(engine, looks, batch=60, context=100, steps=8)


def test_the_round_with_the_median_share_counts() -> None:
    """Each round looks at the machine, which is another one each time, before it measures."""
    happened: list[str] = []

    def look(speed: float) -> Card:
        happened.append(f"look {speed}")
        return Card("toy", speed, speed, 0)

    def measure(card: Card) -> StepTime:
        happened.append(f"measure {card.rate}")
        return StepTime("decode", 1, 8, 1.0, {1.0: 0.5, 2.0: 0.9, 3.0: 0.2}[card.rate], 0.0)

    assert typical([partial(look, speed) for speed in (1.0, 2.0, 3.0)], measure).floor == 0.5
    assert happened == [f"{what} {speed}" for speed in (1.0, 2.0, 3.0) for what in ("look", "measure")]


def test_the_requests_are_those_of_nano_vllm() -> None:
    requests = nano_requests(256)
    assert sum(request.output_len for request in requests) == 133_966  # as its README counts them
    for lengths in ([len(r.prompt_token_ids) for r in requests], [r.output_len for r in requests]):
        assert 100 <= min(lengths) < 110
        assert 1014 < max(lengths) <= 1024
    assert 9_900 < max(max(request.prompt_token_ids) for request in requests) <= 10_000


def test_a_made_up_mixture_has_a_billion_active_weights() -> None:
    """By hand, and a step of one token counts the weights of the chosen experts alone."""
    with made_up("moe-1b") as place:
        model = resolve_model(place, "dummy").config
    attention, expert = 2048 * (2 * 32 + 2 * 4) * 64, 3 * 2048 * 1024
    assert num_product_weights(model) == 16 * (attention + 8 * expert) + 32000 * 2048 == 1_021_837_312
    assert num_product_weights(model, 10_000) == 16 * (attention + 32 * expert) + 32000 * 2048
    with made_up("qwen3-0.6b") as place:
        assert place == "qwen3-0.6b"
    # 32 tokens choose all but a few of 32 experts, each by 8 of them: there the bytes take longer, in all else the operations
    card, others = Card("", 40e9, 360e9, 1e12), 16 * attention + 32000 * 2048
    chosen = round(32 * (1 - (3 / 4) ** 32) * 1024) * 3 * 2048 * 16
    kv = 2 * 4 * 64 * 2 * 16 * 32 * 256
    expected = 2 * 32 * others / 360e9 + 2 * chosen / 40e9 + kv / 40e9
    assert decode_cost(model, 32, 256).floor(card) == pytest.approx(expected)
    assert 2 * chosen / 40e9 > 2 * 32 * 16 * 8 * expert / 360e9
    prompt = prefill_cost(model, 512)  # one limit for all: nothing changes
    assert prompt.floor(card) == pytest.approx((prompt.product_operations + prompt.attention_operations) / 360e9)
    assert decode_cost(model, 1, 0).floor(card) == pytest.approx(2 * num_product_weights(model) / 40e9)


def test_models_are_measured_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shapes that a card is measured with, in small: steps, prompts and the requests of nano-vllm."""
    monkeypatch.setattr(command, "measure_ceilings", lambda _: Ceilings(1e9, {"bfloat16": 2e12}))
    folders = {family: str(tmp_path / family) for family in ("qwen3", "mixtral", "deepseek_v2")}
    for family, folder in folders.items():
        make_tiny(family, Path(folder))
    flags = "--device cpu --batches 1 3 --context 40 --prompts 20 --steps 4 --requests 3 --longest 24 --output-json"
    command.main([*flags.split(), str(tmp_path / "r.json"), "--models", *folders.values()])
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    assert (results["card"]["bandwidth"], results["card"]["rate"]) == (1e9, 2e12)
    for folder in folders.values():
        steps = results[folder]["steps"]
        assert [(step["what"], step["batch"]) for step in steps] == [("decode", 1), ("decode", 3), ("prefill", 1)]
        config = resolve_model(folder, "dummy").config
        for step in steps[:2]:
            moved = decode_cost(config, step["batch"], step["context"])
            assert step["floor"] == pytest.approx((moved.weight_bytes + moved.kv_bytes) / 1e9)
            assert step["seconds"] > 0
        assert results[folder]["requests"]["num_output_tokens"] == sum(r.output_len for r in nano_requests(3, 24))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "kv_cache_dtype", "vector_bytes"),
    [("torch", "auto", 64 * 4), ("cuda", "auto", 64 * 4), ("triton", "fp8", 64), ("triton", "int8", 64 + 2)],
)
def test_attention_is_measured_over_more_than_a_cache_holds(
    backend: str, kv_cache_dtype: str, vector_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("solutions.benchmarks.gpu.CACHE_BYTES", 1 << 16)
    card = measure_card(torch.device(DEVICE), copy_bytes=1 << 16, size=32, repeats=2)
    assert min(card.bandwidth, card.rate) > 0
    time = measure_attention(
        backend,
        card,
        torch.device(DEVICE),
        (2, 1),
        64,
        2,
        20,
        16,
        repeats=1,
        dtype=torch.float32,
        kv_cache_dtype=kv_cache_dtype,
    )
    assert (time.backend, time.kv_cache_dtype, time.batch, time.context) == (backend, kv_cache_dtype, 2, 20)
    assert time.bandwidth_share == pytest.approx(2 * 2 * 20 * vector_bytes / time.seconds / card.bandwidth)
