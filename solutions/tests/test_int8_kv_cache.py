"""The KV cache in int8: attention is exact for the numbers that the cache holds, these are near the real ones, and scales go
wherever their blocks go."""

from __future__ import annotations

import pytest
import torch

from solutions.attention.paged_attention import AttentionBackend
from solutions.attention.paged_attention_cpu import CpuBackend
from solutions.attention.paged_attention_torch import TorchBackend
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.memory.cache_engine import CacheEngine
from solutions.memory.int8_cache import quantize_vectors
from solutions.tests.attention_cases import AttentionCase, contexts, make_case, mixed_lens, quantize_int8, relative_error
from solutions.tests.tiny_models import make_tiny_llama

needs_kernels = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so there are no kernels to test")
BACKENDS = [
    pytest.param(TorchBackend, id="torch"),
    pytest.param(CpuBackend, id="cpu", marks=needs_kernels),
    pytest.param(lambda: CpuBackend(batch_invariant=True), id="cpu-invariant", marks=needs_kernels),
]
SETTINGS = {"dtype": "float32", "max_model_len": 256, "block_size": 4, "num_gpu_blocks_override": 256, "kv_cache_dtype": "int8"}
GREEDY = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": [(i * j + i) % 200 for j in range(3 + 5 * i)]} for i in range(1, 9)]


def check(case: AttentionCase, backend: AttentionBackend) -> None:
    """What a backend computes against float64 attention over what it has stored."""
    unquantized = case.expected()
    metadata = case.metadata(backend)
    quantized, scales = quantize_int8(case.kv_cache)
    metadata.kv_caches, metadata.kv_scales = [quantized], [scales]
    metadata.plan = backend.plan(metadata, case.window)
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale, case.window)
    cache = quantized.double() * scales.double()[..., None]
    stored = cache.flatten(1, 2)[:, case.slot_mapping]
    new = torch.stack([case.key, case.value]).double()
    half_step = new.abs().amax(dim=-1, keepdim=True) / 127 / 2
    assert ((stored - new).abs() <= half_step * 1.003).all()
    case.keys, case.values = contexts(cache[0], case), contexts(cache[1], case)
    tolerance = 2e-5 if case.query.dtype == torch.float32 else 2e-2
    assert relative_error(out, case.expected()) < tolerance
    assert 1e-4 < relative_error(out, unquantized) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("make_backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [1, 8, 16, 128])
def test_decodes_and_chunks(make_backend, dtype, block_size):
    query_lens, context_lens = mixed_lens(block_size)
    check(make_case(query_lens, context_lens, heads=(9, 3), block_size=block_size, dtype=dtype), make_backend())


@pytest.mark.parametrize("make_backend", BACKENDS)
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 4), 80), ((8, 2), 96), ((32, 8), 128)])
def test_head_sizes(make_backend, heads, head_dim):
    check(make_case([1, 1, 5, 40], [63, 129, 65, 40], heads=heads, head_dim=head_dim), make_backend())


@pytest.mark.parametrize("make_backend", BACKENDS[:2])
def test_decodes_alone_and_a_window(make_backend):
    for lengths in ([1], [15, 16, 17, 700], [3000]):
        check(make_case([1] * len(lengths), lengths, heads=(9, 3)), make_backend())


@pytest.mark.parametrize("make_backend", BACKENDS)
def test_zeros_stay_zeros_and_large_vectors_stay_finite(make_backend):
    case = make_case([3], [3], heads=(1, 1))
    case.key[:] = torch.tensor([0.0, 1e6, 1e-9])[:, None, None]
    case.value[:] = torch.tensor([-1e6, 0.0, 1.0])[:, None, None]
    backend = make_backend()
    metadata = case.metadata(backend)
    metadata.kv_caches, metadata.kv_scales = ([x] for x in quantize_int8(case.kv_cache))
    metadata.plan = backend.plan(metadata, None)
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    stored = metadata.kv_caches[0].flatten(1, 2)[:, case.slot_mapping, 0, 5].tolist()
    assert stored[0][:2] == [0, 127]
    assert stored[1] == [-127, 0, 127]
    assert bool(out.isfinite().all())


def test_a_vector_in_python_is_the_nearest_multiples():
    x = torch.randn(50, 3, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 4, 50)[:, None, None]
    codes, scales = quantize_vectors(x)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float16)
    big = x.abs().amax(-1) > 1e-2  # below, float16 has few digits for a scale
    off = (codes.float() * scales.float()[..., None] - x).abs().amax(-1)
    assert (off <= x.abs().amax(-1) / 127 / 2 * 1.003)[big].all()
    assert int(codes.abs().max()) <= 127


def test_scales_are_copied_and_swapped_with_their_blocks():
    cache = CacheEngine(2, 4, 2, 3, 16, torch.int8, "cpu", num_host_blocks=2)
    for layer in range(2):
        for block in range(4):
            cache.kv_caches[layer][:, block] = 10 * layer + block
            cache.kv_scales[layer][:, block] = 10 * layer + block + 0.5
    cache.swap_out([(3, 1)])
    cache.copy_blocks([(1, 3)])
    cache.swap_in([(1, 0)])
    for layer in range(2):
        for block, source in {0: 3, 1: 1, 2: 2, 3: 1}.items():
            assert torch.all(cache.kv_caches[layer][:, block] == 10 * layer + source)
            assert torch.all(cache.kv_scales[layer][:, block] == 10 * layer + source + 0.5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("llama")
    make_tiny_llama(path, hidden_size=64)  # heads of 16, which the kernels have code for
    return str(path)


def tokens(llm: LLM, params=GREEDY) -> list[list[int]]:
    return [c.token_ids for output in llm.generate(PROMPTS, params, use_tqdm=False) for c in output.outputs]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("settings", [{}, {"attention_backend": "torch"}, {"enforce_eager": True}], ids=str)
def test_preemption_cached_prefixes_and_branches_change_nothing(folder, mode, settings):
    for params in (GREEDY, SamplingParams(n=3, seed=1, max_tokens=20, ignore_eos=True)):
        calm = tokens(LLM(folder, **SETTINGS, **settings), params)
        tight = LLM(
            folder, **SETTINGS | {"num_gpu_blocks_override": 64}, **settings, preemption_mode=mode, swap_space=1 << 20,
            max_num_batched_tokens=24,
        )  # fmt: skip
        assert tokens(tight, params) == calm
        assert tokens(tight, params) == calm  # prompts are cached now
        assert tight.llm_engine.stats().num_preemptions > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"tensor_parallel_size": 2},
        {"speculative_config": {"method": "ngram", "prompt_lookup_min": 1, "adaptive": False}},
        {"max_num_batched_tokens": 7},
    ],
    ids=str,
)
def test_ranks_drafts_and_chunks_change_nothing(folder, settings):
    llm = LLM(folder, **SETTINGS, **settings)
    try:
        assert tokens(llm) == tokens(LLM(folder, **SETTINGS))
    finally:
        llm.llm_engine.close()


@pytest.mark.slow
def test_nearly_twice_the_tokens_fit():
    """At a head size of 64: 2 · 64 bytes in bfloat16, 64 + 2 in int8."""
    sizes = {"model": "smollm2-135m", "load_format": "dummy", "max_model_len": 128, "kv_cache_memory_bytes": 64 << 20}
    whole, small = (
        LLM(**sizes, dtype="bfloat16", kv_cache_dtype=kind).llm_engine.limits.num_blocks for kind in ("auto", "int8")
    )
    assert small / whole == pytest.approx(128 / 66, rel=0.01)
    assert small / whole > 1.9


@pytest.mark.slow
def test_perplexity_is_that_of_the_whole_cache():
    """On text of its own making; a default model that forgot scales, or a head's, would be far off."""
    whole = LLM("smollm2-135m", max_model_len=512)
    (made,) = whole.generate("The history of bread", SamplingParams(seed=0, max_tokens=400, ignore_eos=True), use_tqdm=False)
    text = {"prompt_token_ids": made.prompt_token_ids + made.outputs[0].token_ids}
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    means = []
    for llm in (whole, LLM("smollm2-135m", max_model_len=512, kv_cache_dtype="int8")):
        (output,) = llm.generate(text, params, use_tqdm=False)
        values = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        means.append(sum(values) / len(values))
    assert means[1] == pytest.approx(means[0], abs=0.01)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8 needs a GPU"),
        (
            {"attention_backend": "naive"},
            "--kv-cache-dtype int8 needs attention backend torch, cpu, triton, and attention runs on naive",
        ),
    ],
)
def test_what_has_no_such_cache_says_so(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        LLM(folder, **SETTINGS | settings)
