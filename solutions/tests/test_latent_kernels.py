"""Attention over latents, on PyTorch and on Triton's kernels, interpreted where there is no card, against sums in
float64; and attention with sinks on both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from solutions.attention.latent_attention import LatentBackend
from solutions.attention.paged_attention import AttentionBackend
from solutions.attention.paged_attention_torch import TorchBackend
from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.graphs.decode_graphs import Step
from solutions.tests.attention_cases import AttentionCase, make_case, quantize_int8, relative_error
from solutions.tests.engine_twins import check_answer, folder
from solutions.tests.test_families import PROMPTS, SETTINGS

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.attention.latent_attention_triton import LatentTritonBackend
from solutions.attention.paged_attention_triton import Config, TritonBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 16
NEAR = [k * BLOCK + d for k in (1, 2, 3) for d in (-1, 0, 1)]
"""Lengths of contexts at and beside full blocks."""
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def latents(query_lens: list[int], context_lens: list[int], heads: int, vector: int, dtype: torch.dtype) -> AttentionCase:
    """Vectors of so many elements, their halves where others have keys and values."""
    case = make_case(
        query_lens, context_lens, heads=(heads, 1), head_dim=vector // 2, block_size=BLOCK, dtype=dtype, device=DEVICE
    )
    query = torch.randn(len(case.query), heads, vector, generator=torch.Generator().manual_seed(1))
    case.query, case.scale = query.to(DEVICE, dtype), vector**-0.5
    return case


def over_latents(case: AttentionCase, rank: int) -> Tensor:
    """In float64: each query sees whole vectors, and sums their first `rank` elements. [T, H, rank]"""
    outputs = []
    for q, k, v in zip(case.query.double().split(case.query_lens), case.keys, case.values, strict=True):
        vectors = torch.cat((k, v), dim=-1)[:, 0].double()
        scores = torch.einsum("qhd,ld->hql", q, vectors) * case.scale
        hidden = torch.ones_like(scores[0], dtype=torch.bool).triu(len(vectors) - len(q) + 1)
        outputs.append(torch.einsum("hql,ld->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vectors[:, :rank]))
    return torch.cat(outputs)


def attend(case: AttentionCase, backend: LatentBackend, rank: int, int8: bool = False) -> Tensor:
    """The tokens that go the absorbed way; those of the plain way are NaN."""
    metadata, backend.rank = case.metadata(backend), rank
    if int8:
        stored, scales = quantize_int8(metadata.kv_caches[0])
        metadata.kv_caches, metadata.kv_scales = [stored], [scales]
    metadata.plan = backend.plan(metadata, None)
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale)[..., :rank]
    for prompt in metadata.plan.prompts:
        out[prompt.tokens] = torch.nan
    return out


def backends() -> list[LatentBackend]:
    config = None if DEVICE == "cuda" else Config(16, 16, 1, 1)
    return [LatentBackend(), LatentTritonBackend(config=config), LatentTritonBackend(num_splits=3, config=config)]


@pytest.mark.parametrize("dtype", ERROR, ids=str)
@pytest.mark.parametrize(("heads", "rank", "turned"), [(16, 96, 32), (6, 40, 8), (34, 512, 64)])
def test_decodes(heads: int, rank: int, turned: int, dtype: torch.dtype) -> None:
    """DeepSeek's vector, one that ends within a tile, more heads than a tile holds."""
    lengths = [1, 2, *NEAR] if rank < 512 else [1, *NEAR[3:6]]
    case = latents([1] * len(lengths), lengths, heads, rank + turned, dtype)
    expected = over_latents(case, rank)
    for backend in backends():
        assert relative_error(attend(case, backend, rank), expected) < ERROR[dtype], backend


def test_prompts_and_decodes_of_one_step() -> None:
    """Parts of prompts at borders of blocks beside decodes; the longest goes the plain way, and nobody writes over it."""
    case = latents([1, 15, 16, 17, 40, 1, 3], [47, 15, 33, 48, 90, 1, 64], 4, 64, torch.float32)
    expected = over_latents(case, 48)
    for backend in backends():
        assert relative_error(attend(case, backend, 48), expected) < 1e-5
        backend.plain_from = 40
        out = attend(case, backend, 48)
        assert torch.isnan(out[1 + 15 + 16 + 17 :][:40]).all()
        is_absorbed = ~torch.isnan(out[:, 0, 0])
        assert int(is_absorbed.sum()) == len(out) - 40
        assert relative_error(out[is_absorbed], expected[is_absorbed]) < 1e-5
        backend.plain_from = 1
        assert torch.isnan(attend(case, backend, 48)).all()


def test_int8_vectors() -> None:
    """Each half has a scale; what is cached stays what it was rounded to, and new vectors are rounded on their way."""
    case = latents([1, 1, 5, 1], [15, 16, 33, 49], 6, 48, torch.float32)
    exact = over_latents(case, 32)
    for each in (case.keys, case.values):
        each[:] = [stored.float() * scales[..., None].float() for stored, scales in map(quantize_int8, each)]
    for backend in backends():
        out = attend(case, backend, 32, int8=True)
        assert relative_error(out, over_latents(case, 32)) < 2e-3 < relative_error(out, exact)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("window", [None, 7])
def test_sinks(window: int | None, queries: int) -> None:
    """A column of sinks beside the scores, and no value for it: small ones, a large one, and one far above any score."""
    lengths = [1, 6, 7, 8, *NEAR, 70]
    case = make_case(
        [1] * (len(lengths) - 1) + [queries], lengths, heads=(4, 2), head_dim=32, block_size=BLOCK, window=window, device=DEVICE
    )
    sinks = torch.tensor([-2.0, 0.0, 30.0, 1e4], device=DEVICE)
    without = case.expected()
    kept = []
    for q, k in zip(case.query.double().split(case.query_lens), case.keys, strict=True):
        at, places = torch.arange(len(k) - len(q), len(k), device=DEVICE)[:, None], torch.arange(len(k), device=DEVICE)
        hidden = (places > at) | (places <= at - (window or len(k) + 1))
        scores = torch.einsum("qhd,lhd->qhl", q, k.double().repeat_interleave(2, 1)) * case.scale
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
        kept.append(torch.sigmoid(scores.logsumexp(-1) - sinks))
    expected = without * torch.cat(kept)[..., None]
    config = None if DEVICE == "cuda" else Config(16, 16, 1, 1)
    decodes: list[AttentionBackend] = [TorchBackend(), TritonBackend(config=config), TritonBackend(num_splits=3, config=config)]
    for backend in decodes:
        backend.sinks = sinks
        torch.testing.assert_close(case.run(backend).double(), expected, atol=1e-5, rtol=1e-4)
        backend.sinks = None
        torch.testing.assert_close(case.run(backend).double(), without, atol=1e-5, rtol=1e-4)


class Watched(Exception):
    """Somebody has asked the device."""


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_an_engine_on_triton(family: str, kv_cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers, experts too, say what transformers says; decode steps ask the device nothing, so a graph can hold them."""
    settings = {"attention_backend": "triton", "enable_cpu_kernels": False, "kv_cache_dtype": kv_cache_dtype}
    llm = LLM(str(folder(family)), **SETTINGS, **settings)
    steps = []

    def record(step: Step) -> Step:
        def watched() -> Tensor:
            with monkeypatch.context() as patch:
                for name in ("tolist", "item", "nonzero", "__bool__", "__int__"):
                    patch.setattr(Tensor, name, refuse)
                steps.append(1)
                return step()

        step()
        return watched

    worker = llm.llm_engine.executor.worker
    assert worker.backend.capturable
    worker.capture_graphs([4], record)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS[:3]]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    for prompt, output in zip(PROMPTS, llm.generate(prompts, params, use_tqdm=False), strict=False):
        check_answer(family, kv_cache_dtype, "triton", prompt, list(output.outputs[0].token_ids))
    assert len(steps) == 5


def refuse(*_: object) -> None:
    raise Watched
