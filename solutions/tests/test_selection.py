"""The arg-max, the k largest, the cutoffs of min-p / top-k / top-p and the draw, against plain definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.batching.sampling_params import SamplingParams
from solutions.core.sampling import selection
from solutions.core.sampling.selection import BLOCK, Filters, argmax, draw, ranked, top
from solutions.tests.sampling_oracle import kept

WIDTHS = [BLOCK, 3 * BLOCK, 80 * BLOCK]


def logits(rows: int, width: int, seed: int = 0, step: float = 0.0) -> torch.Tensor:
    """Random logits; multiples of `step` have many ties."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3
    return (x / step).round() * step if step else x


def filters(*params: SamplingParams, width: int) -> Filters:
    return Filters(
        min_p=torch.tensor([p.min_p for p in params]),
        top_k=torch.tensor([p.top_k if p.top_k > 0 else width for p in params]),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64),
        need_mass=any(p.top_p < 1 and not 0 < p.top_k < width and p.min_p == 0 for p in params),
    )


def masked(x: torch.Tensor, *params: SamplingParams) -> np.ndarray:
    """Which logits survive `Filters.mask`."""
    x = x.clone()
    filters(*params, width=x.shape[1]).mask(x, torch.empty_like(x))
    return (x > -math.inf).numpy()


@pytest.fixture(params=["candidates first", "sorted at once"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to a cutoff on this machine: a CPU's, and that of a device whose rows are sorted whole."""
    if request.param == "sorted at once":
        monkeypatch.setattr(selection, "top", lambda x, _: x.sort(-1, descending=True))
    return request.param


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_argmax_is_the_first_largest(width: int, step: float) -> None:
    x = logits(9, width, step=step)
    assert argmax(x).tolist() == [row.index(max(row)) for row in x.tolist()]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 2, 20, 64])
@pytest.mark.parametrize("step", [0.0, 1.0])
def test_top_gives_the_largest_and_where_they_are(width: int, k: int, step: float) -> None:
    x = logits(5, width, step=step)
    values, ids = top(x, k)
    assert values.tolist() == [sorted(row, reverse=True)[:k] for row in x.tolist()]
    assert torch.equal(x.gather(1, ids), values)
    assert all(len(set(row)) == k for row in ids.tolist())


def test_top_of_a_row_shorter_than_k() -> None:
    assert top(logits(2, BLOCK), 500)[0].shape == (2, BLOCK)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("k", [1, 2, 20, 500])
@pytest.mark.parametrize("step", [0.0, 1.0, 50.0])
def test_ranked_puts_equal_ones_in_the_order_of_their_indices(width: int, k: int, step: float) -> None:
    x = logits(5, width, step=step)
    x[1] *= -0.0  # zeros of both signs are equal
    x[2, :] = -math.inf
    assert ranked(x, k).tolist() == [sorted(range(width), key=lambda i: (-row[i], i))[:k] for row in x.tolist()]


@pytest.mark.parametrize("width", [7, *WIDTHS])
def test_draw_gives_each_index_its_share_of_the_numbers(width: int) -> None:
    weights = logits(1, width).mul(0.5).exp()
    weights[:, 2::5] = 0.0
    count = 30_011
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = torch.cat([draw(weights.expand(len(part), -1).contiguous(), part) for part in u.split(4000)])
    assert (drawn.diff() >= 0).all(), "the inverse of a cumulative distribution ascends"
    expected = weights[0].double() / weights[0].double().sum() * count
    # Each boundary between two tokens may be off by the float32 rounding of the sum of a block.
    assert (torch.bincount(drawn, minlength=width) - expected).abs().max() < 1.1


@pytest.mark.parametrize("width", [7, *WIDTHS])
@pytest.mark.parametrize("u", [0.0, 1e-300, 1 - 2.0**-53])
def test_draw_never_gives_a_weight_of_zero(width: int, u: float) -> None:
    weights = torch.diag(10.0 ** torch.linspace(-30, 0, width))
    assert draw(weights, torch.full((width,), u, dtype=torch.float64)).tolist() == list(range(width))


def test_draw_of_the_last_number_ends_at_the_last_weights() -> None:
    weights = logits(3000, 2 * BLOCK).exp()
    weights[:, -40:] = 0.0
    drawn = draw(weights, torch.full((3000,), 1 - 2.0**-53, dtype=torch.float64))
    assert drawn.min() > 2 * BLOCK - 43
    assert drawn.max() == 2 * BLOCK - 41


@pytest.mark.parametrize("step", [0.0, 0.5])
@pytest.mark.parametrize("width", [BLOCK, 12 * BLOCK])
@pytest.mark.parametrize(
    "params",
    [
        *({"top_k": k} for k in (1, 2, 50, 64, 65, 1000, 2000)),
        *({"top_p": p} for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1 - 1e-12)),
        *({"min_p": p} for p in (1e-9, 1e-4, 0.05, 0.9, 1.0)),
        {"top_k": 50, "top_p": 0.9},
        {"top_k": 64, "top_p": 0.5},
        {"top_k": 1400, "top_p": 0.7},
        {"top_p": 0.7, "min_p": 1e-6},
        {"top_p": 0.7, "min_p": 0.1},
        {"top_k": 30, "min_p": 0.01},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.01},
    ],
    ids=str,
)
def test_mask_keeps_what_the_definitions_keep(route: str, params: dict, width: int, step: float) -> None:
    p = SamplingParams(**params)
    x = logits(2, width, step=step)
    expected = np.stack([kept(row.double().numpy(), p) for row in x])
    assert expected.any(1).all()
    assert np.array_equal(masked(x, p, p), expected)


@settings(max_examples=60, deadline=None)
@given(
    levels=st.lists(st.integers(-12, 12), min_size=BLOCK, max_size=BLOCK),
    params=st.lists(
        st.builds(
            SamplingParams,
            top_k=st.integers(0, 2 * BLOCK),
            top_p=st.integers(1, 997).map(lambda i: i / 997),
            min_p=st.sampled_from([0.0, 0.003, 0.3]),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_any_mixture_of_filters_on_any_ties(levels: list[int], params: list[SamplingParams]) -> None:
    x = torch.tensor([levels] * len(params)).repeat(1, 2).float() * 0.37  # everything ties at least once
    expected = np.stack([kept(row.double().numpy(), p) for row, p in zip(x, params, strict=True)])
    assert np.array_equal(masked(x, *params), expected)


@pytest.mark.parametrize("params", [{"top_p": 0.95}, {"top_k": 40}, {"top_k": 900, "min_p": 1e-4}, {"min_p": 0.02}], ids=str)
def test_draw_goes_to_every_kept_token_and_no_other(route: str, params: dict) -> None:
    p, count = SamplingParams(**params), 803
    x = logits(1, 20 * BLOCK)
    keep = kept(x[0].double().numpy(), p)
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = []
    for part in u.split(400):
        some = x.expand(len(part), -1).contiguous()
        drawn.append(filters(*[p] * len(part), width=x.shape[1]).draw(some, part, torch.empty_like(some)))
    weights = (x[0] - x.max()).double().exp().numpy() * keep
    counts = torch.bincount(torch.cat(drawn), minlength=x.shape[1]).numpy()
    assert np.abs(counts - weights / weights.sum() * count).max() < 1.1


def test_the_two_zeros_are_one_number() -> None:
    """A high temperature makes zeros of either sign; the gap from -0.0 to 0.0 is -0.0, whose bits are those of no bucket."""
    x = torch.zeros(2, 3 * BLOCK)
    x[:, ::2] = -0.0
    x[1] *= -1
    top_p, top_k = SamplingParams(top_p=1e-300), SamplingParams(top_k=100)
    assert masked(x, top_p, top_k).all()
    u = torch.tensor([0.0, 0.9999], dtype=torch.float64)
    assert filters(top_p, top_k, width=3 * BLOCK).draw(x, u, torch.empty_like(x)).tolist() == [0, 3 * BLOCK - 1]


def test_broken_rows_stay_among_themselves() -> None:
    x = logits(4, 20 * BLOCK)
    alone, u = x[1:2].clone(), torch.full((4,), 0.3, dtype=torch.float64)
    x[0], x[2], x[3, 5] = math.nan, -math.inf, math.inf
    p = SamplingParams(top_p=0.9)
    drawn = filters(p, p, p, p, width=x.shape[1]).draw(x, u, torch.empty_like(x))
    assert drawn[1:2].equal(filters(p, width=x.shape[1]).draw(alone, u[:1], torch.empty_like(alone)))
    assert drawn.min() >= 0
    assert drawn.max() < x.shape[1]
