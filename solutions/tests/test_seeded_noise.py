"""A seeded answer with a draft model and without: where they part, rounding has moved a boundary over the number drawn.

A step with drafts computes more rows at once than one without, and matrix products of another shape round differently, in
bfloat16 by some hundredths of a logit. So the same number may fall on the other side of the boundary between two tokens. That
and nothing else is allowed: every token is the one that the request's number picks from the logits of its own step.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM
from solutions.core.sampling.sampler import Sampler, uniform
from solutions.core.sampling.selection import Filters, draw
from solutions.tests.sampling_oracle import kept
from solutions.tests.tiny_models import make_tiny_llama

SETTINGS = {"max_model_len": 128, "block_size": 16, "num_gpu_blocks_override": 128}
PROMPTS = [[(i * j + i) % 200 for j in range(3 + 5 * i)] for i in range(1, 5)]
TEMPERATURE, LENGTH, SEEDS = 0.8, 20, 20


def answers(folder: str, monkeypatch: pytest.MonkeyPatch, params: dict, **settings):
    """Tokens for each seed, and the logits that the target's sampler saw, by (seed, all tokens before)."""
    llm, rows, call = LLM(folder, **SETTINGS, **settings), {}, Sampler.__call__

    def recorded(self, logits, sequences, *more):
        if self is llm.llm_engine.executor.worker.sampler:
            for row, seq in zip(logits, sequences, strict=True):
                rows[seq.params.seed, tuple(seq.tokens)] = row.double().numpy().copy()
        return call(self, logits, sequences, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", recorded)
        wanted = [
            SamplingParams(temperature=TEMPERATURE, seed=seed, max_tokens=LENGTH, ignore_eos=True, **params)
            for seed in range(SEEDS)
        ]
        prompts = [{"prompt_token_ids": PROMPTS[seed % len(PROMPTS)]} for seed in range(SEEDS)]
        outputs = llm.generate(prompts, wanted, use_tqdm=False)
        stats = llm.llm_engine.stats()
    llm.llm_engine.close()
    return [output.outputs[0].token_ids for output in outputs], rows, stats


def boundaries(logits: np.ndarray, params: dict) -> np.ndarray:
    """Where each token's share of [0, 1) ends, tokens in the order of their ids."""
    scaled = logits / TEMPERATURE
    weights = np.exp(scaled - scaled.max()) * kept(scaled, SamplingParams(**params))
    return np.cumsum(weights) / weights.sum()


@pytest.mark.parametrize(
    ("dtype", "params"),
    [("bfloat16", {}), ("bfloat16", {"top_p": 0.9}), ("bfloat16", {"top_k": 20, "min_p": 0.02}), ("float32", {"top_k": 20})],
)
def test_answers_part_only_where_rounding_moves_a_boundary_over_the_number(tmp_path, monkeypatch, dtype, params):
    make_tiny_llama(tmp_path)
    draft = {"method": "draft_model", "model": str(tmp_path), "num_speculative_tokens": 3, "adaptive": False}
    plain, plain_rows, _ = answers(str(tmp_path), monkeypatch, params, dtype=dtype)
    drafted, drafted_rows, stats = answers(str(tmp_path), monkeypatch, params, dtype=dtype, speculative_config=draft)
    assert stats.spec_decode_num_accepted_tokens > SEEDS
    for tokens, rows in ((plain, plain_rows), (drafted, drafted_rows)):
        for seed, answer in enumerate(tokens):
            prompt = PROMPTS[seed % len(PROMPTS)]
            for place, token in enumerate(answer):
                ends = boundaries(rows[seed, (*prompt, *answer[:place])], params)
                u = uniform(seed, place)
                assert (ends[token - 1] if token else 0.0) - 1e-5 <= u < ends[token] + 1e-5, (seed, place)
    noise = {"bfloat16": 0.15, "float32": 1e-3}[dtype]
    for seed, (one, other) in enumerate(zip(plain, drafted, strict=True)):
        same = next((place for place in range(LENGTH) if one[place] != other[place]), LENGTH)
        for place in range(min(same + 1, LENGTH)):
            key = seed, (*PROMPTS[seed % len(PROMPTS)], *one[:place])
            difference = float(np.abs(plain_rows[key] - drafted_rows[key]).max())
            assert difference < noise, (seed, place)
        if same < LENGTH and not params:  # shares move by no more than logits do
            border = max(one[same], other[same]) - 1
            ends = [boundaries(rows[key], params)[border] for rows in (plain_rows, drafted_rows)]
            assert min(ends) - 1e-5 <= uniform(seed, same) <= max(ends) + 1e-5
            assert abs(ends[0] - ends[1]) <= difference / TEMPERATURE


def test_nearly_equal_logits_that_change_places_do_not_change_a_seeded_draw():
    """The same number gives the same token under top-p, whichever of two tokens rounding puts first."""
    width = 1280
    x = torch.randn(width, generator=torch.Generator().manual_seed(0)) * 2
    x = (x * 16).round() / 16  # as coarse as bfloat16 is: many are equal
    rows = x + 1e-4 * torch.randn(64, width, generator=torch.Generator().manual_seed(1))
    filters = Filters(torch.zeros(64), torch.full((64,), 50), torch.ones(64, dtype=torch.float64), False)
    some_u = (torch.arange(40, dtype=torch.float64) + 0.37) / 40
    kept_ids = rows[0].topk(50).indices
    for u in some_u:
        drawn = filters.draw(rows.clone(), u.expand(64).clone(), torch.empty_like(rows))
        weights = torch.where(torch.isin(torch.arange(width), kept_ids), rows[0].exp(), torch.zeros(()))
        near = {int(draw(weights[None], (u + shift).clamp(0, 0.999999)[None])) for shift in (-0.01, 0.0, 0.01)}
        assert set(drawn.tolist()) <= near
