"""Task 4.10: which drafted tokens stay, so that what comes out follows the target's distribution and no other."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from stages.core.sampling.rejection_sampler import _while_equal, rejection_sample
from stages.course.fixtures.checks import check_equal

P = torch.tensor([[0.5, 0.3, 0.2, 0.0], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]])
Q = torch.tensor([[0.2, 0.3, 0.1, 0.4], [0.4, 0.3, 0.2, 0.1]])
SAMPLES = 6_000


def test_what_the_target_likes_better_always_stays() -> None:
    """A token with p >= q is accepted whatever the number.

    Why: such tokens come too seldom from the draft as it is; to drop any makes them rarer still.
    """
    check_equal(rejection_sample([0, 3], Q, P, [0.999, 0.999, 0.6])[:2], [0, 3], "accepted tokens")
    check_equal(rejection_sample([1], Q, P, [0.999, 0.0])[0], 1, "a token that both find equally likely")


@pytest.mark.parametrize(("u", "stays"), [(0.0, True), (0.24, True), (0.26, False), (0.9, False)])
def test_what_the_draft_likes_better_stays_in_proportion(u: float, stays: bool) -> None:
    """Token 0 at the second place has p = 0.1 and q = 0.4: a quarter of the numbers accept it.

    Why: it must come out as often as the target says, and the draft proposes it four times as often.
    """
    new = rejection_sample([0, 0], Q, P, [0.0, u, 0.5])
    check_equal(new[0], 0, "the first token, accepted")
    check_equal(len(new) == 3, stays, f"the second is accepted at {u}")


@pytest.mark.parametrize(("last", "expected"), [(0.0, 0), (0.74, 0), (0.76, 2), (0.99, 2)])
def test_a_rejected_token_is_replaced_from_what_is_missing(last: float, expected: int) -> None:
    """At the first place max(0, p - q) is (0.3, 0, 0.1, 0): three quarters of it token 0, one token 2, never the drafted one.

    Why: drawing from p instead counts twice what the draft has had its chance with, and the answers drift towards the draft
    model's; nothing looks wrong, and every distribution is.
    """
    check_equal(rejection_sample([3, 1], Q, P, [0.0, 0.0, last]), [expected], "tokens after a rejection at the first place")


def test_a_full_acceptance_gives_one_token_more() -> None:
    """Behind the last accepted draft the target's next row says what comes: a step of k drafts can give k + 1 tokens.

    Why: the target has computed that row anyway.
    """
    for last, token in ((0.1, 0), (0.3, 1), (0.6, 2), (0.9, 3)):
        check_equal(rejection_sample([0, 3], Q, P, [0.0, 0.0, last]), [0, 3, token], f"tokens with a last number of {last}")


def test_nothing_behind_a_rejection_counts() -> None:
    """Drafts behind the first rejected one were made for another text.

    Why: kept, they would be the answer to a sentence that nobody said.
    """
    check_equal(len(rejection_sample([3, 3], Q, P, [0.5, 0.0, 0.0])), 1, "tokens when the first is rejected")


@pytest.mark.parametrize("last", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_only_what_is_missing_has_a_weight(last: float) -> None:
    """Of 10,000 tokens the target forbids all but two; a millionth of the first is missing: the first comes, for any number.

    Why: top-p, top-k and grammars forbid tokens by a probability of 0. A small number that is added for safety adds up over a
    vocabulary, and now and then a forbidden token comes out.
    """
    p, q = torch.zeros(2, 10_000), torch.zeros(1, 10_000)
    p[:, :2] = 0.5
    q[0, :2] = torch.tensor([0.499999, 0.500001])
    check_equal(rejection_sample([1], q, p, [0.9999999, last]), [0], "token after the rejection of the second")


def test_distributions_and_numbers_are_read_only() -> None:
    """The rows of p and q are as before, and the numbers may come from an iterator.

    Why: with log-probabilities wanted, the same rows are read once more.
    """
    p, q = P.clone(), Q.clone()
    check_equal(rejection_sample([3, 1], q, p, iter([0.0, 0.0, 0.9])), [2], "tokens")
    check_equal((p.tolist(), q.tolist()), (P.tolist(), Q.tolist()), "p and q")


def test_where_rounding_leaves_nothing_the_target_decides() -> None:
    """p and q that differ in the last digit only: the residual is all zeros, and a draw from zeros is no token.

    Why: a copy of the target as draft model meets this within minutes, and a crash ends everybody's request.
    """
    p, q = torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([[0.50000006, 0.5]])
    check_equal(rejection_sample([0], q, p, [0.9999999999, 0.7]), [1], "token drawn from p")


def p_value(seen: Counter, expected: torch.Tensor) -> float:
    """Of Pearson's chi-square test."""
    total = sum(seen.values())
    likely = [token for token in range(len(expected)) if expected[token] > 0]
    assert all(token in likely for token in seen), f"a token that cannot come came: {seen}"
    statistic = sum((seen[t] - total * float(expected[t])) ** 2 / (total * float(expected[t])) for t in likely)
    return float(torch.special.gammaincc(torch.tensor((len(likely) - 1) / 2), torch.tensor(statistic / 2)))


def test_the_distribution_is_the_targets_and_as_much_as_possible_is_accepted() -> None:
    """6,000 drafts from q: at each place the tokens are spread as p says, and 1 - ½·Σ|p - q| of the drafts stay.

    Why: this is the whole promise of speculation. A sampler that is off by a few percent passes every other test.
    """
    numbers, seen, accepted = random.Random(5), [Counter(), Counter(), Counter()], [0, 0]
    places = [list(row.cumsum(0)) for row in Q]
    sums = [[float(x) for x in row] for row in places]
    for _ in range(SAMPLES):
        draft = []
        for row in sums:
            u = numbers.random() * row[-1]
            draft.append(next(token for token, total in enumerate(row) if u < total))
        new = rejection_sample(draft, Q, P, [numbers.random() for _ in range(3)])
        for place, token in enumerate(new):
            seen[place][token] += 1
        for place in range(len(new) - 1):
            accepted[place] += 1
    for place in range(3):
        value = p_value(seen[place], P[place])
        assert value > 1e-4, f"place {place}: {dict(seen[place])} does not follow {P[place].tolist()} (p-value {value:.1e})"
    share = accepted[0] / (SAMPLES)
    assert abs(share - float(torch.minimum(P[0], Q[0]).sum())) < 0.02, f"{share:.1%} of the first drafts accepted"


@pytest.mark.parametrize(
    ("draft", "own", "expected"),
    [
        ([], [7], [7]),
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [1, 9, 3, 4], [1, 9]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
        ([1, 2, 3], [9, 8, 3, 4], [9]),
        ([1, 2, 3], [1, 9, 8, 4], [1, 9]),
        ([1, 2, 3], [1, 2, 9, 4], [1, 2, 9]),
        ([5, 6, 7], [5, 0, 7, 4], [5, 0]),
    ],
)
def test_without_a_distribution_drafts_stay_while_they_are_the_targets_own(
    draft: list[int], own: list[int], expected: list[int]
) -> None:
    """The target's tokens up to the first that differs from the draft, that one included: as plain decoding would have it.
    With small token ids and with large ones.

    Why: with greedy requests, speculation then changes no token at all.
    """
    for more in (0, 40_000):
        drafted, of_target, right = ([token + more for token in tokens] for tokens in (draft, own, expected))
        check_equal(_while_equal(drafted, of_target), right, f"tokens of draft {drafted} and own {of_target}")
