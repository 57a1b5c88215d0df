"""Task 4.13 ★: each token's experts, and each expert's tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.course.fixtures.checks import check_close, check_equal
from stages.models.config.experts import Mixture
from stages.models.config.model_config import ModelConfig
from stages.models.moe import Experts
from stages.parallelism.tensor_parallel import SINGLE, TensorParallel

HIDDEN, WIDTH = 24, 16


def make(count: int = 6, chosen: int = 2, parallel: TensorParallel = SINGLE, **mixture: Any) -> Experts:
    """A layer's experts; each has its own random weights, the same on every rank."""
    config = ModelConfig(
        "MixtralForCausalLM", vocab_size=32, hidden_size=HIDDEN, intermediate_size=WIDTH, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=HIDDEN, max_position_embeddings=64, norm_eps=1e-5, hidden_act="silu",
        mixture=Mixture(count, chosen, WIDTH, **({"renormalise": False} | mixture)),
    )  # fmt: skip
    experts = Experts(config, parallel)
    with torch.no_grad():
        for number, expert in experts.own.items():
            generator = torch.Generator().manual_seed(100 + number)
            for param in expert.parameters():
                param.copy_(torch.randn(param.shape, generator=generator) * 0.3)
    return experts.requires_grad_(False)


def inputs(num_tokens: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens [T, hidden], and logits [T, columns] of which no two of a token are alike."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.stack([torch.randperm(columns, generator=generator) for _ in range(num_tokens)]) * 0.37 - 1.0
    return torch.randn(num_tokens, HIDDEN, generator=generator), logits + 0.1 * torch.rand(
        num_tokens, columns, generator=generator
    )


def choices(row: list[float], mixture: Mixture) -> list[tuple[int, float]]:
    """One token's experts with their weights, by the definition."""
    powers = [math.exp(logit) for logit in row[: mixture.count]]
    scores = [power / sum(powers) for power in powers]
    best = sorted(range(mixture.count), key=lambda number: -scores[number])[: mixture.chosen]
    total = sum(scores[number] for number in best) if mixture.renormalise else 1.0
    found = [(number, scores[number] / total) for number in best]
    if mixture.shared_size:
        found.append((mixture.count, 1 / (1 + math.exp(-row[mixture.count]))))
    return found


def expected(experts: Experts, x: Tensor, logits: Tensor) -> Tensor:
    """A token after the other, an expert after the other."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, row in enumerate(logits.tolist()):
        for number, weight in choices(row, experts.mixture):
            if number in experts.own:
                out[token] += weight * experts.own[number](x[token : token + 1], None)[0].double()
    return out.float()


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("chosen", [1, 2, 6])
def test_the_best_experts_and_their_weights(renormalise: bool, chosen: int) -> None:
    """Five tokens choose one, two or all of six experts, with and without a sum of 1.

    Why: Mixtral's weights sum up to 1 and OLMoE's do not; the wrong kind makes every layer too loud or too quiet.
    """
    experts = make(6, chosen, renormalise=renormalise)
    _, logits = inputs(5, 6)
    weights, numbers = experts.choose(logits)
    assert (weights.dtype, numbers.dtype) == (torch.float32, torch.int64), f"types are {weights.dtype} and {numbers.dtype}"
    check_equal(list(weights.shape), [5, chosen], "shape of the weights")
    for token, row in enumerate(logits.tolist()):
        wanted = dict(choices(row, experts.mixture))
        check_equal(sorted(numbers[token].tolist()), sorted(wanted), f"experts of token {token}")
        got = torch.tensor([wanted[number] for number in numbers[token].tolist()])
        check_close(weights[token], got, f"weights of token {token}")


def test_scores_are_float32_whatever_the_logits_are() -> None:
    """Logits in bfloat16, as a model in bfloat16 has them, of 64 experts of which 8 are chosen.

    Why: a softmax in bfloat16 keeps three digits. Each weight is off by up to half a percent, in every layer.
    """
    experts = make(64, 8)
    logits = inputs(4, 64)[1].bfloat16()
    weights, numbers = experts.choose(logits)
    for token, row in enumerate(logits.tolist()):
        powers = [math.exp(logit) for logit in row]
        wanted = torch.tensor([powers[number] / sum(powers) for number in numbers[token].tolist()])
        check_close(weights[token], wanted, f"weights of token {token}", 1e-6)


@pytest.mark.parametrize("renormalise", [False, True])
def test_a_shared_expert_is_everybodys_last(renormalise: bool) -> None:
    """Four experts of which two are chosen, and one that all tokens go through; its logit is high, or low.

    Why: Qwen's shared expert is no competitor: it takes nothing from the others' weights and is not chosen by rank.
    """
    experts = make(4, 2, renormalise=renormalise, shared_size=WIDTH)
    for shared in (-3.0, 0.0, 5.0):
        x, logits = inputs(3, 5)
        logits[:, 4] = shared
        weights, numbers = experts.choose(logits)
        check_equal(numbers[:, 2].tolist(), [4, 4, 4], "the last expert of each token")
        check_close(weights[:, 2], torch.full((3,), 1 / (1 + math.exp(-shared))), "its weight")
        check_equal((numbers[:, :2] < 4).all().item(), True, "whether the others are routed experts")
        check_close(experts(x, logits), expected(experts, x, logits), "the layer")


def test_the_layer_says_what_makes_a_shared_weight() -> None:
    """The layer's `activation` is a hyperbolic tangent.

    Why: families differ there, and a layer of theirs sets it. A sigmoid by its name weighs their shared expert wrong.
    """
    experts = make(4, 2, shared_size=WIDTH)
    experts.activation = torch.tanh
    _, logits = inputs(3, 5)
    weights, _ = experts.choose(logits)
    check_close(weights[:, 2], torch.tensor([math.tanh(row[4]) for row in logits.tolist()]), "weights of the shared expert")


@settings(max_examples=40, deadline=None)
@given(
    num_tokens=st.integers(1, 9), count=st.integers(1, 7), chosen=st.integers(1, 7), renormalise=st.booleans(),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_any_layer_says_what_a_loop_says(num_tokens: int, count: int, chosen: int, renormalise: bool, seed: int) -> None:
    """Up to nine tokens and seven experts, against a loop over tokens and over their experts.

    Why: sorting is only a way to compute the same. A row that returns to another token is some token's wrong answer.
    """
    experts = make(count, min(count, chosen), renormalise=renormalise)
    x, logits = inputs(num_tokens, count, seed)
    check_close(experts(x, logits), expected(experts, x, logits), "the layer")


def test_an_expert_is_one_product_over_its_rows() -> None:
    """Forty tokens: `multiply` is called once, and gets each expert's tokens as neighbours, in the order of the experts.

    Why: an expert's weights are read from memory once for all of its tokens, and that is what takes the time.
    """
    experts, calls = make(5, 2), []
    x, logits = inputs(40, 5)
    multiply = experts.multiply

    def noted(rows: Tensor, bounds: Tensor) -> Tensor:
        calls.append((rows.clone(), bounds.tolist()))
        return multiply(rows, bounds)

    experts.multiply = noted
    check_close(experts(x, logits), expected(experts, x, logits), "the layer")
    check_equal(len(calls), 1, "calls of multiply")
    rows, bounds = calls[0]
    wanted = {number: [] for number in range(5)}
    for token, row in enumerate(logits.tolist()):
        for number, _ in choices(row, experts.mixture):
            wanted[number].append(x[token].tolist())
    check_equal((len(rows), bounds[0], bounds[-1]), (80, 0, 80), "rows, and where the first and the last end")
    for number in range(5):
        got = sorted(rows[bounds[number] : bounds[number + 1]].tolist())
        check_equal(got, sorted(wanted[number]), f"rows of expert {number}")


def test_an_expert_that_nobody_chose_says_nothing() -> None:
    """All tokens choose experts 1 and 3; the weights of all others are not numbers.

    Why: multiplying all experts and weighing most by 0 reads them all, and 0 times infinity is not 0.
    """
    experts = make(6, 2)
    for number, expert in experts.own.items():
        if number not in (1, 3):
            for param in expert.parameters():
                param.fill_(math.nan)
    x, _ = inputs(4, 6)
    logits = torch.tensor([[-1.0, 3.0, -2.0, 2.0, -3.0, -4.0]] * 4)
    check_close(experts(x, logits), expected(experts, x, logits), "the layer")


def test_the_load_is_counted() -> None:
    """Two steps; each expert's load is the tokens that chose it in both. A shared expert has every token's.

    Why: an expert that gets all tokens is the bottleneck of a machine, and the metrics show it.
    """
    experts, wanted = make(4, 2, shared_size=WIDTH), [0] * 5
    for seed, num_tokens in ((1, 7), (2, 3)):
        x, logits = inputs(num_tokens, 5, seed)
        experts(x, logits)
        for row in logits.tolist():
            for number, _ in choices(row, experts.mixture):
                wanted[number] += 1
        check_equal(experts.load.tolist(), wanted, f"the load after {num_tokens} tokens more")


def test_the_result_is_added_in_place() -> None:
    """With `add_to` the sums are added to that tensor, which is returned; without, neither input changes.

    Why: `add_to` is the residual stream. A copy of it costs memory traffic in every layer, and `x` is needed again.
    """
    experts = make()
    x, logits = inputs(5, 6)
    stream = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(3))
    before, x_before = stream.clone(), x.clone()
    got = experts(x, logits, stream)
    assert got is stream, "another tensor than add_to was returned"
    check_close(stream, before + expected(experts, x, logits), "the stream")
    check_close(experts(x, logits), expected(experts, x, logits), "without a stream")
    check_equal(x, x_before, "the tokens")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_experts_of_their_own_add_up(size: int) -> None:
    """Each rank has some of five experts; the sum over the ranks is the layer, and every rank counts all of the load.

    Why: with expert parallelism a rank leaves the rows of other ranks' experts at zero, and one all-reduce brings them in.
    """
    x, logits = inputs(8, 5)
    whole = make(5, 2)
    wanted = expected(whole, x, logits)
    whole(x, logits)
    ranks = [make(5, 2, TensorParallel(rank, size, None, True)) for rank in range(size)]
    parts = [rank(x, logits) for rank in ranks]
    for rank, part in zip(ranks, parts, strict=True):
        check_close(part, expected(rank, x, logits), "one rank's part")
        check_equal(rank.load.tolist(), whole.load.tolist(), "its load")
    check_close(sum(parts, torch.zeros_like(x)), wanted, "the sum over the ranks")


def test_sums_are_rounded_once() -> None:
    """In bfloat16, with eight experts of sixteen: the sum over a token's experts is exact to the last bit of a bfloat16.

    Why: eight roundings of a sum in bfloat16 lose a digit of three, in every layer.
    """
    experts = make(16, 8).bfloat16()
    x, logits = inputs(12, 16)
    x = x.bfloat16()
    weights, numbers = experts.choose(logits)
    rows = torch.stack([
        torch.stack([experts.own[number](x[token : token + 1], None)[0] for number in chosen])
        for token, chosen in enumerate(numbers.tolist())
    ])  # fmt: skip
    exact = (rows.double() * weights.double()[..., None]).sum(1)
    got = experts(x, logits)
    assert got.dtype == torch.bfloat16, f"the result is {got.dtype}"
    check_close(got.float(), exact.float(), "the layer", 2.0**-8)
    assert ((got.double() - exact).abs() <= exact.abs() * 2.0**-8 + 1e-6).all(), "more than one rounding is to be seen"
