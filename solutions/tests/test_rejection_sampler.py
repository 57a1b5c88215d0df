"""Drafts and their verification by themselves: n-grams against a search, distributions by chi-square over many samples."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_output import Draft
from solutions.batching.sequence import Sequence
from solutions.core.sampling.rejection_sampler import draw_one, rejection_sample, verify
from solutions.core.sampling.sampler import Sampler
from solutions.core.speculative import NgramIndex

SAMPLES = 100_000
IMPOSSIBLE = 1e-6
"""A p-value that a right sampler goes below once in a million runs; a fixed seed makes every run the same one."""


def search(tokens: list[int], count: int, min_n: int, max_n: int) -> list[int]:
    """What `NgramIndex` should give, by looking through the whole text."""
    for n in range(max_n, min_n - 1, -1):
        for start in range(len(tokens) - n - 1, -1, -1):
            if n <= len(tokens) and tokens[start : start + n] == tokens[-n:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


@given(
    tokens=st.lists(st.integers(0, 3), min_size=1, max_size=40), cuts=st.lists(st.integers(1, 40), max_size=3),
    count=st.integers(1, 9), min_n=st.integers(1, 3), more=st.integers(0, 2),
)  # fmt: skip
def test_ngrams_are_those_that_a_search_finds(tokens, cuts, count, min_n, more):
    index = NgramIndex(min_n, min_n + more)
    for cut in sorted(cuts):  # read in pieces
        index.update(tokens[:cut])
    index.update(tokens)
    assert index.propose(tokens, count) == search(tokens, count, min_n, min_n + more)


def p_value(observed: Counter, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square test; outcomes that cannot be must not have been."""
    total = sum(observed.values())
    assert all(expected[outcome] > 0 for outcome in observed)
    possible = [outcome for outcome in range(len(expected)) if expected[outcome] > 0]
    statistic = sum(
        (observed[outcome] - total * float(expected[outcome])) ** 2 / (total * float(expected[outcome])) for outcome in possible
    )
    half = torch.tensor([(len(possible) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half))


def distributions(seed: int, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(rows, vocab, generator=generator)).softmax(-1)


def outcomes(sample, p: torch.Tensor, q: torch.Tensor, count: int, seed: int) -> list[Counter]:
    """For each place how often each token came there, of `count` drafts of len(q) tokens."""
    numbers = random.Random(seed)
    seen = [Counter() for _ in p]
    cumulative = [row.double().cumsum(0).tolist() for row in q]
    for _ in range(count):
        draft = []
        for sums in cumulative:
            u = numbers.random() * sums[-1]
            draft.append(next(token for token, total in enumerate(sums) if u < total))
        for place, token in enumerate(sample(draft, q, p, [numbers.random() for _ in p])):
            seen[place][token] += 1
    return seen


@pytest.mark.slow
def test_rejection_sampling_keeps_the_targets_distribution():
    p, q = distributions(1, 3, 8), distributions(2, 2, 8)
    p[0, 3] = 0.0  # as top-k and top-p make them
    p[0] /= p[0].sum()
    q[0, 5] = 0.0
    q[0] /= q[0].sum()
    seen = outcomes(rejection_sample, p, q, SAMPLES, seed=3)
    assert sum(seen[0].values()) == SAMPLES
    for place, counts in enumerate(seen):  # later places come only behind accepted drafts, but are as they should be
        assert p_value(counts, p[place]) > 0.001
    accepted = sum(seen[1].values()) / SAMPLES
    assert accepted == pytest.approx(float(torch.minimum(p[0], q[0]).sum()), abs=0.01)  # theorem 3.5


def wrong_residual(draft, q, p, uniforms):
    """A sampler that draws from p behind a rejection, not from what q left of it."""
    *tests, last = uniforms
    for index, (token, u) in enumerate(zip(draft, tests, strict=True)):
        if u * float(q[index, token]) >= float(p[index, token]):
            return [*draft[:index], draw_one(p[index], last)]
    return [*draft, draw_one(p[len(draft)], last)]


def wrong_ratio(draft, q, p, uniforms):
    """A sampler that accepts what the target finds more likely than a number, whatever the draft model finds."""
    return rejection_sample(draft, torch.ones_like(q) / q.shape[1], p, uniforms)


@pytest.mark.parametrize("broken", [wrong_residual, wrong_ratio])
def test_a_broken_sampler_is_caught(broken):
    p, q = distributions(1, 2, 8), distributions(2, 1, 8)
    assert p_value(outcomes(broken, p, q, 5_000, seed=3)[0], p[0]) < IMPOSSIBLE


def test_equal_distributions_accept_everything():
    p = distributions(5, 4, 16)
    for seed in range(50):
        numbers = random.Random(seed)
        draft = [draw_one(row, numbers.random()) for row in p[:3]]
        assert rejection_sample(draft, p[:3], p, [0.999999] * 4)[:3] == draft


def test_what_rounding_leaves_of_nothing_is_drawn_from_the_target():
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    q = torch.tensor([[0.5000001, 0.5]])
    assert rejection_sample([0], q, p, [0.99999999, 0.7]) == [1]


def sequences(count: int, params: SamplingParams, drafted: list[list[int]]) -> list[Sequence]:
    made = [Sequence(i, [1, 2, 3], params) for i in range(count)]
    for seq, draft in zip(made, drafted, strict=True):
        seq.tokens += draft
    return made


@pytest.mark.slow
@pytest.mark.parametrize("with_probs", [True, False])
def test_verification_of_a_batch_keeps_the_processed_distribution(with_probs):
    """Through temperature, top-k and the sampler: the distribution that a request asks for is what comes out."""
    count, vocab = 4_000, 6
    logits = 2.0 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.7, top_k=4)
    expected = (logits / 0.7).topk(4)
    p = torch.zeros(2, vocab).scatter_(1, expected.indices, expected.values.softmax(-1))
    q = distributions(9, 1, vocab)
    numbers = random.Random(1)
    drafts = [[draw_one(q[0], numbers.random())] for _ in range(count)]
    made = sequences(count, params, drafts)
    given_drafts = {seq: Draft(draft, q if with_probs else None) for seq, draft in zip(made, drafts, strict=True)}
    new, logprobs = verify(Sampler(vocab, seed=2), logits.repeat(count, 1), made, given_drafts)
    assert logprobs == {}
    assert p_value(Counter(tokens[0] for tokens in new), p[0]) > 0.001
    assert p_value(Counter(tokens[1] for tokens in new if len(tokens) > 1), p[1]) > 0.001
    share = sum(len(tokens) > 1 for tokens in new) / count
    likely = torch.minimum(p[0], q[0]).sum() if with_probs else (p[0] * q[0]).sum()
    assert share == pytest.approx(float(likely), abs=0.03)


def test_logprobs_belong_to_the_tokens_that_come_out():
    vocab, params = 6, SamplingParams(temperature=1.0, logprobs=1)
    logits = torch.randn(3, vocab, generator=torch.Generator().manual_seed(4))
    for seed in range(20):
        (seq,) = made = sequences(1, params, [[2, 0]])
        draft = Draft([2, 0], distributions(seed, 2, vocab))
        (new,), logprobs = verify(Sampler(vocab, seed), logits, made, {seq: draft})
        entries = logprobs[seq]
        assert [entry.token_ids[0] for entry in entries] == new
        for row, (token, entry) in enumerate(zip(new, entries, strict=True)):
            assert entry.logprobs[0] == pytest.approx(float(logits[row].log_softmax(-1)[token]), abs=1e-5)
            assert entry.token_ids[1] == int(logits[row].argmax())


def test_a_stop_token_is_not_accepted_below_min_tokens():
    vocab = 6
    logits = torch.full((4, vocab), -5.0)
    for row, token in enumerate([2, 4, 2, 1]):
        logits[row, token] = 5.0
    for min_tokens, expected in [(0, [2, 4, 2, 1]), (1, [2, 4, 2, 1]), (2, [2, 1])]:
        params = SamplingParams(temperature=0, stop_token_ids=[4], min_tokens=min_tokens, allowed_token_ids=[1, 2, 4])
        (seq,) = made = sequences(1, params, [[2, 4, 2]])
        (new,), _ = verify(Sampler(vocab), logits, made, {seq: Draft([2, 4, 2])})
        assert new == expected
