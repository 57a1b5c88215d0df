"""The sampler against an oracle that treats one row at a time in plain Python (`sampling_oracle.py`)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.sequence import Sequence
from solutions.core.sampling.logits_processors import TokenCounts
from solutions.core.sampling.sampler import Sampler, uniform
from solutions.tests.sampling_oracle import chi_square_z, distribution, sequence

V = 300  # two whole blocks and a part of one
PROMPT = [3, 5, 7, 5, 3, 11]
OUTPUT = [7, 20, 21, 20, 22, 20, 21]
EOS = (2, 4)


def make_logits(rows: int, vocab: int = V, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def seq_of(seq_id: int = 0, prompt: list[int] = PROMPT, output: list[int] = OUTPUT, **params: Any) -> Sequence:
    return sequence(SamplingParams(**params), prompt, output, seq_id=seq_id, eos=EOS)


def check_probabilities(logits: torch.Tensor, sequences: list[Sequence], sampler: Sampler | None = None) -> None:
    got = (sampler or Sampler(logits.shape[1])).probabilities(logits, sequences)
    expected = np.stack([distribution(row.double().numpy(), s) for row, s in zip(logits, sequences, strict=True)])
    assert np.allclose(got.numpy(), expected, rtol=2e-5, atol=1e-9)


PARAMETERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 9e-6},
    {"temperature": 0.3},
    {"temperature": 50.0},
    {"allowed_token_ids": [0, 9, 20, 299]},
    {"bad_words_token_ids": [[17], [299]]},
    {"bad_words_token_ids": [[20, 21, 30], [20, 30, 31], [21, 32], [22, 33]]},
    {"bad_words_token_ids": [[11, *OUTPUT, 34]]},  # begins in the prompt: not output as a whole, so not banned
    {"bad_words_token_ids": [[*OUTPUT, 35]]},
    {"min_tokens": 7, "stop_token_ids": [9]},
    {"min_tokens": 8, "stop_token_ids": [9]},
    {"min_tokens": 8, "stop_token_ids": [9], "ignore_eos": True},
    {"logit_bias": {0: 3.5, 20: -100.0, 299: 100.0}},
    {"repetition_penalty": 1.7},
    {"repetition_penalty": 0.4},
    {"frequency_penalty": 0.6},
    {"frequency_penalty": -0.6},
    {"presence_penalty": 1.1},
    {"presence_penalty": -1.1},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.7},
    {"min_p": 0.1},
    {"top_k": 1},
    {"top_k": 12},
    {"top_k": V},
    {"top_k": V + 1},
    {"top_k": -1},
    {"top_p": 1e-6},
    {"top_p": 0.8},
    {"temperature": 1e300, "top_p": 0.5},
    {"temperature": 1e39, "top_k": 5},
    {"min_p": 1e-300, "top_p": 0.9, "temperature": 9.0},
    {"repetition_penalty": 1e-300},
    {"repetition_penalty": 1e300, "temperature": 0.01},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 0.7},
    {
        "allowed_token_ids": list(range(60)), "bad_words_token_ids": [[20, 21, 8]], "min_tokens": 9,
        "logit_bias": {20: 4.0, 4: 9.0}, "repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2,
        "temperature": 1.4, "min_p": 0.01, "top_k": 30, "top_p": 0.9,
    },
    {"allowed_token_ids": [20, 30, 40], "logit_bias": {50: 100.0}, "temperature": 0.0},
    {"min_tokens": 8, "logit_bias": {4: 100.0}, "temperature": 0.0},
]  # fmt: skip


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_every_parameter_alone_in_a_batch(params: dict[str, Any]) -> None:
    check_probabilities(make_logits(1), [seq_of(**params)])


def test_a_mixed_batch_gives_each_row_what_it_gives_alone() -> None:
    sequences = [seq_of(i, **params) for i, params in enumerate(PARAMETERS)]
    check_probabilities(make_logits(len(sequences)), sequences)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            seq_of,
            prompt=st.lists(st.integers(0, V - 1), min_size=1, max_size=8),
            output=st.lists(st.integers(0, 9), max_size=8),
            temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
            allowed_token_ids=st.none() | st.lists(st.integers(10, V - 1), min_size=1, max_size=40),
            bad_words_token_ids=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), max_size=4),
            min_tokens=st.integers(0, 8),
            logit_bias=st.none() | st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100), max_size=5),
            repetition_penalty=st.sampled_from([0.7, 1.0, 1.5]),
            frequency_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
            presence_penalty=st.sampled_from([-0.5, 0.0, 1.0]),
            min_p=st.sampled_from([0.0, 0.0, 0.013]),
            top_k=st.sampled_from([0, 0, 1, 33]),
            top_p=st.sampled_from([1.0, 1.0, 0.777]),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_any_mixture_of_parameters(sequences: list[Sequence]) -> None:
    check_probabilities(make_logits(len(sequences)), sequences)


def test_generation_while_the_batch_changes() -> None:
    """Counts, bans and plans follow sequences that grow, leave, come back and change rows."""
    names = ({"frequency_penalty": 0.4}, {"repetition_penalty": 1.5, "min_tokens": 3}, {"top_k": 5}, {"presence_penalty": 1.0})
    pool = [seq_of(i, output=[], bad_words_token_ids=[[7, 8]], **params) for i, params in enumerate(names)]
    sampler = Sampler(V)
    for step, order in enumerate([[0, 1], [0, 1], [1, 0, 2], [2], [2, 3, 1], [0, 1, 2, 3], [0, 1, 2, 3], [3, 2, 1, 0]]):
        logits = make_logits(len(order), seed=step)
        batch = [pool[i] for i in order]
        check_probabilities(logits, batch, sampler)
        for seq, token in zip(batch, sampler(logits, batch).token_ids, strict=True):
            seq.tokens += [token, 7]


def test_token_counts_follow_the_sequence() -> None:
    seq = seq_of(output=[])
    counts = TokenCounts(seq)
    for new in ([], [5], [5, 9, 9], [], [3]):
        seq.tokens += new
        counts.update()
        expected = {token: float(seq.output_token_ids.count(token)) for token in seq.tokens}
        assert dict(zip(counts.token_ids, counts.counts, strict=True)) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 5, 128, V])
def test_greedy_takes_the_first_largest_whatever_else_is_in_the_batch(dtype: torch.dtype, vocab: int) -> None:
    logits = make_logits(40, vocab).to(dtype)
    greedy = [seq_of(i, temperature=0.0, top_k=3, seed=1) for i in range(40)]
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert Sampler(vocab)(logits, greedy).token_ids == expected
    mixed = [s if i % 3 else seq_of(i) for i, s in enumerate(greedy)]
    got = Sampler(vocab)(logits, mixed).token_ids
    assert [t for i, t in enumerate(got) if i % 3] == [t for i, t in enumerate(expected) if i % 3]


def test_greedy_of_a_slice_and_of_a_repeated_call() -> None:
    logits = make_logits(8, 256).t().contiguous().t()  # not contiguous
    sequences = [seq_of(i, temperature=0.0) for i in range(8)]
    sampler = Sampler(256)
    assert sampler(logits, sequences).token_ids == logits.argmax(-1).tolist()
    assert sampler(logits[:3].neg(), sequences[:3]).token_ids == logits[:3].argmin(-1).tolist()


@pytest.mark.parametrize("params", PARAMETERS, ids=str)
def test_logits_are_left_as_they_are(params: dict[str, Any]) -> None:
    logits = make_logits(2, 384)
    before = logits.clone()
    Sampler(384)(logits, [seq_of(0, logprobs=2, **params), seq_of(1)])
    assert torch.equal(logits, before)


def test_no_row_at_all() -> None:
    output = Sampler(V)(make_logits(0), [])
    assert (output.token_ids, output.logprobs) == ([], [])


DISTRIBUTIONS: list[dict[str, Any]] = [
    {"temperature": 0.6},
    {"top_k": 20},
    {"top_p": 0.7},
    {"min_p": 0.03},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.001, "frequency_penalty": 1.0},
]
BEYOND_CANDIDATES = {"top_p": 0.97}
"""Keeps more than the tokens that are looked at first."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("params", "seeded"),
    [*((params, seeded) for params in DISTRIBUTIONS for seeded in (False, True)), (BEYOND_CANDIDATES, True)],
    ids=str,
)
def test_samples_follow_the_distribution(params: dict[str, Any], seeded: bool) -> None:
    rows, steps = 500, 40
    row = make_logits(1, seed=3).bfloat16()
    sampler, logits, counts = Sampler(V, seed=1), row.expand(rows, -1), np.zeros(V)
    for step in range(steps):
        seeds = [step * rows + i if seeded else None for i in range(rows)]
        counts += np.bincount(sampler(logits, [seq_of(seed=seed, **params) for seed in seeds]).token_ids, minlength=V)
    assert chi_square_z(counts, distribution(row[0].double().numpy(), seq_of(**params))) < 4


def test_the_chi_square_test_sees_an_error() -> None:
    p = distribution(make_logits(1, seed=3)[0].numpy(), seq_of())
    wrong = p * np.where(np.arange(V) % 2, 1.2, 1.0)
    assert chi_square_z(np.random.default_rng(0).multinomial(20_000, wrong / wrong.sum()), p) > 4
    assert chi_square_z(np.random.default_rng(0).multinomial(20_000, p), p) < 4
    assert chi_square_z(np.array([5, 1, 0]), np.array([1.0, 0.0, 0.0])) == math.inf


def test_a_seed_gives_the_same_tokens_in_any_company() -> None:
    def generate(extra: list[Sequence], place: int, sampler: Sampler, pause: bool = False) -> list[int]:
        mine = seq_of(99, output=[], seed=1234, temperature=1.3, top_p=0.95)
        for step in range(12):
            if pause and step == 6:  # preempted: others go on, and it comes back as another object
                sampler(make_logits(len(extra), seed=77), extra)
                mine = seq_of(100, output=mine.output_token_ids, seed=1234, temperature=1.3, top_p=0.95)
            batch = [*extra[:place], mine, *extra[place:]]
            logits = make_logits(len(batch), seed=1000 + step)
            logits[place] = make_logits(1, seed=step)[0]
            mine.tokens.append(sampler(logits, batch).token_ids[place])
        return mine.output_token_ids

    alone = generate([], 0, Sampler(V, seed=0))
    assert len(set(alone)) > 5
    others = [seq_of(1), seq_of(2, temperature=0.0), seq_of(3, seed=5), seq_of(4, top_k=4), seq_of(5, frequency_penalty=1.0)]
    assert generate(others, 0, Sampler(V, seed=1)) == alone
    assert generate(others[::-1], 3, Sampler(V, seed=2)) == alone
    assert generate(others, 5, Sampler(V, seed=3), pause=True) == alone


def test_a_seed_gives_another_number_at_every_step() -> None:
    seq, sampler, logits = seq_of(output=[], seed=3), Sampler(V), make_logits(1) * 0.5
    for _ in range(40):
        seq.tokens += sampler(logits, [seq]).token_ids
    assert len(set(seq.output_token_ids)) > 20


def test_seeds_of_neighbours_and_steps_are_unrelated() -> None:
    draws = np.array([[uniform(seed, step) for step in range(200)] for seed in range(-100, 100)])
    assert draws.min() >= 0
    assert draws.max() < 1
    assert len(np.unique(draws)) == draws.size
    limit = 5 / math.sqrt(draws.size)
    assert abs(draws.mean() - 0.5) < limit * math.sqrt(1 / 12)
    for a, b in ((draws[1:], draws[:-1]), (draws[:, 1:], draws[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < limit


def test_requests_without_a_seed_share_the_generator_of_the_engine() -> None:
    logits = make_logits(30)
    sequences = [seq_of(i) for i in range(30)]
    first, again, other = Sampler(V, seed=5), Sampler(V, seed=5), Sampler(V, seed=6)
    runs = [[s(logits, sequences).token_ids for _ in range(3)] for s in (first, again, other)]
    assert runs[0] == runs[1] != runs[2]
    assert runs[0][0] != runs[0][1]
    same = make_logits(1).expand(30, -1)
    assert len(set(first(same, sequences).token_ids)) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_raw_logits(dtype: torch.dtype) -> None:
    logits = make_logits(4).to(dtype)
    wishes = ({"logprobs": 3, "temperature": 0.5, "top_k": 9}, {}, {"logprobs": 0, "logit_bias": {9: 90.0}}, {"logprobs": 20})
    output = Sampler(V)(logits, [seq_of(i, frequency_penalty=1.5, **wish) for i, wish in enumerate(wishes)])
    assert output.logprobs[1] is None
    for row, wish in enumerate(wishes):
        if (entry := output.logprobs[row]) is None:
            continue
        raw = logits[row].double().numpy()
        expected = raw - raw.max() - math.log(np.exp(raw - raw.max()).sum())
        assert entry.token_ids[0] == output.token_ids[row]
        assert len(entry.token_ids) == len(entry.logprobs) == len(entry.ranks) == 1 + wish["logprobs"]
        assert np.allclose(entry.logprobs, expected[entry.token_ids], atol=1e-5)
        assert entry.ranks == [1 + int((raw > raw[token]).sum()) for token in entry.token_ids]
        assert sorted(raw, reverse=True)[: wish["logprobs"]] == raw[entry.token_ids[1:]].tolist()
        assert len(set(entry.token_ids[1:])) == wish["logprobs"]
    assert output.token_ids[2] == 9
    assert output.logprobs[2].ranks[0] > 1


def test_prompt_logprobs_of_more_positions_than_are_worked_out_at_once() -> None:
    logits, targets = make_logits(150), [(7 * i) % V for i in range(150)]
    entries = Sampler(V).prompt_logprobs(logits, targets, 2)
    log_probs = logits.double().log_softmax(-1)
    for row, (entry, target) in enumerate(zip(entries, targets, strict=True)):
        best = log_probs[row].topk(2)
        assert entry.token_ids == [target, *best.indices.tolist()]
        assert np.allclose(entry.logprobs, [log_probs[row, target], *best.values], atol=1e-5)
        assert entry.ranks == [1 + int((log_probs[row] > log_probs[row, target]).sum()), 1, 2]
    assert Sampler(V).prompt_logprobs(logits[:1], torch.tensor(targets[:1]), 0)[0].token_ids == [0]


def test_tokens_that_tie_share_a_rank() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    entry = Sampler(4).prompt_logprobs(logits, [2], 4)[0]
    assert dict(zip(entry.token_ids, entry.ranks, strict=True)) == {0: 4, 1: 1, 2: 1, 3: 3}
    assert Sampler(4).prompt_logprobs(logits, [2], 3)[0].token_ids == [2, 1, 2, 3], "in the order of their ids"
    assert Sampler(4).prompt_logprobs(logits, [2], 1)[0].token_ids == [2, 1]


def test_a_request_that_bans_all_it_allows_still_gets_an_allowed_token() -> None:
    """And nobody else in the batch notices."""
    contradiction = seq_of(0, allowed_token_ids=[2, 4], min_tokens=9)
    for params in ({"temperature": 0.0}, {}, {"top_p": 0.5}):
        tokens = Sampler(V)(make_logits(2), [contradiction, seq_of(1, **params)]).token_ids
        assert tokens[0] in (2, 4)
        assert 0 <= tokens[1] < V


def test_logits_of_a_broken_model_give_some_token() -> None:
    logits = make_logits(3)
    logits[0], logits[1] = math.nan, math.inf
    for params in (
        {"temperature": 0.0},
        {},
        {"top_k": 5},
        {"top_p": 0.9},
        {"frequency_penalty": 1.0, "min_p": 0.1, "logprobs": 2},
    ):
        output = Sampler(V)(logits, [seq_of(i, seed=i, **params) for i in range(3)])
        assert all(0 <= token < V for token in output.token_ids)
        assert output.token_ids[2:] == Sampler(V)(logits[2:], [seq_of(2, seed=2, **params)]).token_ids


@pytest.mark.parametrize("penalty", [1e-300, 1e-45, 1e-30, 1e-5])
@pytest.mark.parametrize("temperature", [0.0, 2e-5, 1.0, 1e300])
def test_a_repetition_penalty_near_zero_leaves_numbers(penalty: float, temperature: float) -> None:
    """Of the tokens that have occurred, those with a positive logit go up without end, and nothing else can come; a token that
    is not allowed stays out, although it has occurred."""
    logits = torch.zeros(1, 64)
    logits[0, :5] = torch.tensor([0.5, 2.0, -1.0, 3.0, 1.0])
    params = SamplingParams(
        temperature=temperature,
        repetition_penalty=penalty,
        allowed_token_ids=[0, 1, 2, 4, *range(5, 64)],
        max_tokens=99,
        seed=1,
    )
    seq = Sequence(0, [1, 2, 3, 0], params)
    drawn = set()
    for _ in range(20):
        (token,) = Sampler(64)(logits, [seq]).token_ids
        drawn.add(token)
        seq.tokens.append(token)
    assert drawn <= ({0, 1} if temperature < 1e300 else set(range(64)) - {3})
