"""``--batch-invariant``: the logits of a request, bit for bit, whatever else is in its steps and however its prompt is cut."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch

from solutions.attention.latent_attention import LatentBackend
from solutions.attention.latent_in_order import LatentInOrder
from solutions.attention.paged_attention import AttentionMetadata
from solutions.attention.paged_attention_cpu import CpuBackend
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.sampling.sampler import Sampler
from solutions.models.kernels.invariant import in_whole_vectors, token_by_token
from solutions.models.moe import Experts
from solutions.parallelism.tensor_parallel import ACTIVATION_FUNCTIONS
from solutions.tests.attention_cases import make_case, quantize_int8
from solutions.tests.engine_twins import folder as tiny_folder
from solutions.tests.tiny_models import make_tiny, make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SETTINGS = {"max_model_len": 2048, "block_size": 16, "num_gpu_blocks_override": 400}
PROMPTS = [
    {"prompt_token_ids": [(5 * i + j * j) % 250 for j in range(length)]} for i, length in enumerate((3, 700, 17, 64, 1300))
]


OTHERS = ("starcoder2", "gemma3_text", "gpt_oss", "qwen2_moe", "deepseek_v2", "deepseek_v3")
"""What PyTorch computes a part of: GELU, clamped gates, scores of experts, attention over latents."""


@pytest.fixture(scope="module", params=["llama", "gpt2", "mistral"])
def folder(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp(request.param)
    # heads of 16 elements, which the kernels have code for
    sizes = {"llama": {"hidden_size": 64, "max_position_embeddings": 2048}, "gpt2": {"n_embd": 64, "n_positions": 2048}}
    sizes["mistral"] = sizes["llama"] | {"sliding_window": 100}
    {"llama": make_tiny_llama, "gpt2": make_tiny_gpt2, "mistral": make_tiny_mistral}[request.param](
        path, **sizes[request.param]
    )
    return str(path)


def logits_of(llm: LLM, prompts: list[dict], monkeypatch) -> dict[tuple[int, int], torch.Tensor]:
    """(prompt, tokens generated before) → logits."""
    seen, original = {}, Sampler.__call__
    first = llm._num_requests

    def watched(self, logits, sequences, *more):
        for row, seq in zip(logits, sequences, strict=True):
            seen.setdefault((int(seq.request_id) - first, seq.num_output_tokens), row.clone())
        return original(self, logits, sequences, *more)

    monkeypatch.setattr(Sampler, "__call__", watched)
    llm.generate(prompts, PARAMS, use_tqdm=False)
    monkeypatch.setattr(Sampler, "__call__", original)
    return seen


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so there are no kernels to test")
@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [((2, 2), 16), ((9, 3), 64), ((4, 1), 80), ((5, 1), 96), ((14, 2), 128)])
def test_few_rows_equal_the_same_rows_among_many(heads, dim, dtype, int8):
    rng, backend = torch.Generator().manual_seed(dim), CpuBackend(batch_invariant=True)
    for length, (cap, window) in itertools.product(
        (16, 63, 64, 65, 128, 200), ((None, None), (3.0, None), (None, 7), (3.0, 70))
    ):
        q = torch.randn(length, heads[0], dim, generator=rng)
        k, v = torch.randn(2, length, heads[1], dim, generator=rng)

        def attend(count: int, cache: dict, contents=(q, k, v), length=length, cap=cap, window=window) -> torch.Tensor:
            """What a step says of the last `count` queries, the earlier tokens being in the cache."""
            q, k, v = contents
            shape = {"heads": heads, "head_dim": dim, "dtype": dtype, "window": window}
            case = make_case([count], [length], contents=[(q[-count:], k, v)], **shape)
            metadata = case.metadata(backend)
            if not cache:
                quantized, scales = quantize_int8(case.kv_cache)
                cache |= {"kv_caches": [quantized], "kv_scales": [scales]} if int8 else {"kv_caches": metadata.kv_caches}
            metadata = dataclasses.replace(metadata, **cache)
            metadata.plan = backend.plan(metadata, window)
            return backend.attend(0, case.query, case.key, case.value, metadata, case.scale, window, cap).clone()

        cache: dict = {}
        many = attend(length, cache)  # which fills the cache
        for few in range(1, max(2, 8 * heads[1] // heads[0])):
            assert torch.equal(attend(few, cache), many[-few:]), (length, cap, window, few)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", None), ("bfloat16", None), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
def test_logits_alone_and_in_any_batch(folder, dtype, quantization, monkeypatch):
    equal = {}
    for invariant in (True, False):
        settings = SETTINGS | {"dtype": dtype, "quantization": quantization, "batch_invariant": invariant}
        calm = LLM(folder, **settings, enable_prefix_caching=False, max_num_batched_tokens=2048)
        alone = {(i, n): row for i, p in enumerate(PROMPTS) for (_, n), row in logits_of(calm, [p], monkeypatch).items()}
        equal[invariant] = []
        for budget in (6, 90, 2048):  # chunks of all sizes
            llm = LLM(folder, **settings, max_num_batched_tokens=budget)
            for _ in range(2):  # the second time prompts are cached
                together = logits_of(llm, PROMPTS, monkeypatch)
                assert together.keys() == alone.keys()
                equal[invariant] += [torch.equal(together[key], alone[key]) for key in alone]
    assert all(equal[True])
    assert not all(equal[False])  # or this test would see nothing


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", OTHERS)
def test_logits_alone_and_in_any_batch_where_pytorch_has_a_part(family, dtype, monkeypatch):
    """Prompts beyond 171 tokens, from which latents otherwise go another way; int8 KV in the last engine."""
    settings = SETTINGS | {"dtype": dtype, "batch_invariant": True, "max_model_len": 512}
    prompts = [
        {"prompt_token_ids": [(5 * i + j * j) % 250 for j in range(length)]} for i, length in enumerate((3, 250, 17, 64))
    ]
    for kv in ("auto", "int8"):
        settings |= {"kv_cache_dtype": kv}
        calm = LLM(str(tiny_folder(family)), **settings, enable_prefix_caching=False, max_num_batched_tokens=512)
        alone = {(i, n): row for i, p in enumerate(prompts) for (_, n), row in logits_of(calm, [p], monkeypatch).items()}
        for budget in (6, 90, 512):
            llm = LLM(str(tiny_folder(family)), **settings, max_num_batched_tokens=budget)
            for _ in range(2):
                together = logits_of(llm, prompts, monkeypatch)
                assert together.keys() == alone.keys()
                assert all(torch.equal(together[key], alone[key]) for key in alone), (kv, budget)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so there are no kernels to test")
@pytest.mark.parametrize("family", ["starcoder2", "gpt_oss", "llama"])
def test_rows_that_are_no_whole_vectors(family, tmp_path, monkeypatch):
    """An MLP of 80 columns: what stands at the end of a tensor, PyTorch computes in another way."""
    make_tiny(family, tmp_path, intermediate_size=80)
    settings = SETTINGS | {"dtype": "float32", "batch_invariant": True, "max_model_len": 256}
    llm = LLM(str(tmp_path), **settings, enable_prefix_caching=False)
    prompts = [{"prompt_token_ids": [(5 * i + j * j) % 250 for j in range(length)]} for i, length in enumerate((3, 70, 17))]
    alone = {(i, n): row for i, p in enumerate(prompts) for (_, n), row in logits_of(llm, [p], monkeypatch).items()}
    together = logits_of(llm, prompts, monkeypatch)
    assert all(torch.equal(together[key], alone[key]) for key in alone)


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so there are no kernels to test")
def test_a_shared_experts_weight_is_the_same_in_any_batch():
    """Its sigmoid is PyTorch's, of one number a token: some differ where the end of a tensor is."""
    settings = SETTINGS | {"dtype": "bfloat16", "batch_invariant": True, "max_model_len": 256}
    model = LLM(str(tiny_folder("qwen2_moe")), **settings).llm_engine.executor.worker.model
    experts = next(layer for layer in model.modules() if isinstance(layer, Experts))
    logits = torch.randn(3001, experts.mixture.count + 1, generator=torch.Generator().manual_seed(0)).bfloat16() * 4
    together = experts.choose(logits)[0]
    assert torch.equal(torch.cat([experts.choose(row[None])[0] for row in logits]), together)
    assert torch.equal(experts.choose(logits[5:2999])[0], together[5:2999])


def test_a_token_reads_latents_that_a_later_sequence_of_the_step_writes():
    ordered, usual = LatentInOrder(), LatentBackend()
    query, vectors = (torch.randn(5, *size, generator=torch.Generator().manual_seed(1)) for size in ((2, 8), (8,)))
    said = []
    for backend in (ordered, usual):
        starts, contexts = torch.tensor([0, 1, 5], dtype=torch.int32), torch.tensor([5, 4], dtype=torch.int32)
        tables = torch.tensor([[7, 2], [7, 0]], dtype=torch.int32)  # the second sequence fills block 7, the first one reads it
        slots = torch.tensor([8, 28, 29, 30, 31])
        metadata = AttentionMetadata(slots, tables, starts, contexts, [torch.zeros(2, 8, 4, 1, 4)], 4, 5, backend)
        metadata.plan = backend.plan(metadata, None)

        def attend(still, turned, vectors, metadata, backend=backend):
            first, second = vectors[:, None].chunk(2, dim=-1)
            return backend.attend(0, torch.cat((still, turned), -1), first, second, metadata, 0.5)

        whole = partial(token_by_token, 0, attend) if backend is ordered else attend
        said.append(whole(*query.chunk(2, dim=-1), vectors, metadata))
    torch.testing.assert_close(*said)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 64, 77, 160])
def test_an_elementwise_function_says_the_same_of_a_row_anywhere(columns, dtype):
    """As PyTorch calls them, some of these do not: an end is computed number by number, and each thread has one."""
    rows = torch.randn(900, columns, generator=torch.Generator().manual_seed(columns)).to(dtype) * 3
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for function in (*ACTIVATION_FUNCTIONS.values(), torch.sigmoid):
            alone = torch.cat([in_whole_vectors(function, row[None]) for row in rows])
            torch.testing.assert_close(alone, function(rows), rtol=0.02, atol=1e-5)
            for first, last in ((0, 900), (1, 8), (333, 899)):
                part = torch.cat((rows, rows), 1)[first:last, columns:]  # of a larger tensor, as gate and up are
                assert torch.equal(in_whole_vectors(function, part), alone[first:last])
    finally:
        torch.set_num_threads(threads)


def test_speculation_changes_no_bit(folder):
    settings = SETTINGS | {"dtype": "bfloat16", "batch_invariant": True}
    params = dataclasses.replace(PARAMS, max_tokens=60)
    plain = LLM(folder, **settings).generate(PROMPTS, params, use_tqdm=False)
    drafts = {"method": "ngram", "prompt_lookup_min": 1, "adaptive": False}
    llm = LLM(folder, **settings, speculative_config=drafts)
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.outputs[0].token_ids for o in outputs] == [o.outputs[0].token_ids for o in plain]
    assert llm.llm_engine.stats().spec_decode_num_accepted_tokens > 0


def test_what_cannot_be_invariant_is_refused_by_name(folder):
    for settings, message in [
        ({"enable_cpu_kernels": False}, "needs the C\\+\\+ kernels of a CPU, and attention runs on torch"),
        ({"attention_backend": "naive"}, "attention runs on naive"),
    ]:
        with pytest.raises(ValueError, match=f"--batch-invariant: .*{message}"):
            LLM(folder, **(SETTINGS | {"dtype": "float32", "batch_invariant": True} | settings))


@pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so there are no kernels to test")
def test_a_product_without_a_kernel_is_refused_by_name(tmp_path):
    make_tiny("llama", tmp_path, intermediate_size=77)
    with pytest.raises(ValueError, match=r"which have none for model\.layers\.0\.mlp\.down_proj, 192x77"):
        LLM(str(tmp_path), **SETTINGS | {"dtype": "float32", "batch_invariant": True, "max_model_len": 256})
