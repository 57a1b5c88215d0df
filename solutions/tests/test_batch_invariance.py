"""``--batch-invariant``: the logits of a request, bit for bit, whatever else is in its steps and however its prompt is cut."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from solutions.attention.paged_attention_cpu import CpuBackend
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.sampling.sampler import Sampler
from solutions.tests.attention_cases import make_case, quantize_int8
from solutions.tests.tiny_models import make_tiny_gpt2, make_tiny_llama, make_tiny_mistral

PARAMS = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
SETTINGS = {"max_model_len": 2048, "block_size": 16, "num_gpu_blocks_override": 400}
PROMPTS = [
    {"prompt_token_ids": [(5 * i + j * j) % 250 for j in range(length)]} for i, length in enumerate((3, 700, 17, 64, 1300))
]


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
