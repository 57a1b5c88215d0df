"""Task 2.10 ★: what a request asks of its next token: bans, penalties, and how far down the list it may come from."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.batching.sequence import Sequence
from stages.core.sampling.logits_processors import BANNED, LogitsProcessors, TokenCounts
from stages.core.sampling.sampler import Sampler
from stages.core.sampling.selection import Filters
from stages.course.fixtures.checks import check_close, check_equal
from stages.course.fixtures.simulation import make_sequence

V = 12
EOS = 2


def make(prompt: list[int], output: list[int], **params: Any) -> Sequence:
    """A sequence in the middle of its answer."""
    seq = make_sequence(0, prompt, eos=(EOS,), max_tokens=None, **params)
    seq.tokens.extend(output)
    return seq


def processed(rows: list[list[float]] | Tensor, sequences: list[Sequence], before: LogitsProcessors | None = None) -> Tensor:
    """Logits after everything that the sequences ask for."""
    logits = torch.as_tensor(rows, dtype=torch.float32).clone()
    LogitsProcessors(sequences, logits.shape[1], logits.device, before)(logits)
    return logits


def banned(*sequences: Sequence) -> list[list[int]]:
    """The tokens that each may not write next."""
    logits = processed(torch.zeros(len(sequences), V), list(sequences))
    return [[token for token, value in enumerate(row) if value == torch.tensor(BANNED).item()] for row in logits.tolist()]


# Counting


@settings(max_examples=80, deadline=None)
@given(
    prompt=st.lists(st.integers(0, 5), min_size=1, max_size=8),
    parts=st.lists(st.lists(st.integers(0, 7), max_size=4), min_size=1, max_size=5),
)
def test_counts_are_those_of_the_output(prompt: list[int], parts: list[list[int]]) -> None:
    """A prompt, and an answer that comes in parts: each token once, with its number in the answer.

    Why: the penalties for repeating oneself are for what the model wrote. Words of the question may be used.
    """
    seq = make(prompt, [])
    counts, output = TokenCounts(seq), list[int]()
    for part in parts:
        seq.tokens.extend(part)
        output += part
        counts.update()
        check_equal(list(counts.token_ids), list(dict.fromkeys(prompt + output)), "tokens in the order of their first use")
        check_equal(list(counts.counts), [float(output.count(token)) for token in counts.token_ids], "their counts")


class Watched(list[int]):
    """Tokens that note how many of them were read."""

    num_read = 0

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self.num_read += len(found) if isinstance(index, slice) else 1
        return found

    def __iter__(self) -> Any:
        self.num_read += len(self)
        return super().__iter__()


def test_only_new_tokens_are_read() -> None:
    """A prompt of 4,000 tokens, then 40 times one more: fewer than 8,000 are looked at in all.

    Why: this is done at every step for every sequence. To count the whole text each time makes long answers slower and slower.
    """
    seq = make([5] * 4000, [])
    seq.tokens = tokens = Watched(seq.tokens)
    counts = TokenCounts(seq)
    for _ in range(40):
        counts.update()
        tokens.append(7)
    counts.update()
    check_equal((list(counts.token_ids), list(counts.counts)), ([5, 7], [0.0, 40.0]), "tokens and counts")
    check_equal(tokens.num_read < 8000, True, f"whether few tokens were read ({tokens.num_read})")


def test_a_long_text_has_many_tokens() -> None:
    """A prompt of 600 different tokens, and an answer that repeats the last of them and brings a new one.

    Why: places beyond a few hundred are numbers like any other.
    """
    seq = make(list(range(600)), [599, 700])
    counts = TokenCounts(seq)
    counts.update()
    check_equal(
        (list(counts.token_ids), list(counts.counts)), ([*range(600), 700], [0.0] * 599 + [1.0] * 2), "tokens and counts"
    )


# Bans


@pytest.mark.parametrize(
    ("prompt", "output", "words", "expected"),
    [
        ([1], [], [[9]], [9]),
        ([1], [3], [[9], [9], [8]], [8, 9]),
        ([1], [3, 4], [[3, 4, 5]], [5]),
        ([1], [3, 4], [[4, 6], [3, 6, 7], [5, 3, 4, 8]], [6]),
        ([1], [3, 4, 4], [[3, 4, 5]], []),
        ([1, 3], [4], [[3, 4, 5]], []),
        ([1, 3], [4], [[3, 4, 5], [4, 5]], [5]),
        ([3, 4], [], [[3, 4, 5], [4, 7]], []),
        ([3], [3], [[3, 3]], [3]),
    ],
)
def test_a_bad_word_is_banned_at_its_last_token(
    prompt: list[int], output: list[int], words: list[list[int]], expected: list[int]
) -> None:
    """Words of one to four tokens behind different answers, some of which the prompt begins.

    Why: until its last token a word is part of many others. And who asks about a word does not write it.
    """
    check_equal(banned(make(prompt, output, bad_words_token_ids=words)), [expected], "tokens that may not come")


@pytest.mark.parametrize("ignore_eos", [False, True])
@pytest.mark.parametrize("written", range(6))
def test_no_end_before_min_tokens(written: int, ignore_eos: bool) -> None:
    """`min_tokens` of 3 and stop tokens 7 and 8, behind a long prompt and 0 to 5 tokens: the end of sequence and the stop
    tokens may not come before the third token is out.

    Why: who asks for three tokens gets three. A token that says "end" in the middle of an answer is none of them.
    """
    seq = make([1] * 9, [4] * written, min_tokens=3, stop_token_ids=[7, 8], ignore_eos=ignore_eos)
    check_equal(banned(seq), [[EOS, 7, 8] if written < 3 else []], "tokens that may not come")


def test_every_row_has_its_own_bans() -> None:
    """Four requests in one step; the second asks for nothing.

    Why: one tensor holds the logits of all. An index without its row changes somebody else's answer.
    """
    rows = [
        make([1], [3], bad_words_token_ids=[[3, 9], [4, 8]]), make([1], [3]),
        make([1], [4], bad_words_token_ids=[[3, 9], [4, 8]]), make([1], [4], min_tokens=2, stop_token_ids=[6]),
    ]  # fmt: skip
    check_equal(banned(*rows), [[9], [], [8], [EOS, 6]], "tokens that may not come")


def test_bans_are_in_padded_rows_too() -> None:
    """Two requests in rows of 16, of which 12 are tokens.

    Why: rows are padded to whole blocks of the vocabulary. An index that counts by tokens is right in the first row alone.
    """
    logits = torch.zeros(2, 16)
    rows = [make([1], [3], bad_words_token_ids=[[9]], min_tokens=2) for _ in range(2)]
    LogitsProcessors(rows, 16, logits.device, vocab_size=V)(logits)
    found = (logits == torch.tensor(BANNED)).nonzero().tolist()
    check_equal(found, [[0, EOS], [0, 9], [1, EOS], [1, 9]], "(row, token) of what may not come")


# Penalties

ROW = [2.0, -2.0, 1.0, 4.0, -1.0, 0.0, 3.0, -3.0]
"""Logits of a small vocabulary."""


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 0.5, 2.0, -2.0, 0.0, 3.0, -3.0]),
        ({"frequency_penalty": 0.5}, [2.0, -3.0, 1.0, 4.0, -2.5, -0.5, 3.0, -3.0]),
        ({"presence_penalty": 0.25}, [2.0, -2.25, 1.0, 4.0, -1.25, -0.25, 3.0, -3.0]),
        ({"frequency_penalty": -1.0}, [2.0, 0.0, 1.0, 4.0, 2.0, 1.0, 3.0, -3.0]),
        (
            {"repetition_penalty": 2.0, "frequency_penalty": 0.5, "presence_penalty": 0.25},
            [1.0, -5.25, 0.5, 2.0, -3.75, -0.75, 3.0, -3.0],
        ),
    ],
    ids=["repetition", "frequency", "presence", "a reward", "all three"],
)
def test_each_penalty_by_hand(params: dict[str, float], expected: list[float]) -> None:
    """Prompt 0 1 2 3, answer 1 4 4 5 1 4, and a row of eight logits, some of them negative.

    Why: repetition makes a token less likely whatever the sign of its logit, in prompt and answer; frequency costs each time,
    presence once, both in the answer alone; and what is subtracted is not scaled.
    """
    seq = make([0, 1, 2, 3], [1, 4, 4, 5, 1, 4], **params)
    check_close(processed([ROW], [seq]), torch.tensor([expected]), "the logits")


@pytest.mark.parametrize("logit", [-0.5, 0.5])
def test_repetition_goes_by_the_sign_of_small_logits_too(logit: float) -> None:
    """A token that was there has a logit between -1 and 1, and the repetition penalty is 2.

    Why: divided, -0.5 would become -0.25, so what should be rarer would be more likely.
    """
    row = [logit, 3.0]
    expected = logit / 2 if logit > 0 else logit * 2
    check_close(processed([row], [make([0], [], repetition_penalty=2.0)]), torch.tensor([[expected, 3.0]]), "the logits")


def test_penalties_are_of_their_own_rows() -> None:
    """Four requests, of which the second and the last have a penalty, over a vocabulary of eleven tokens.

    Why: rows are numbered in the batch and not among those that have penalties.
    """
    crowd = [make([1], [2]), make([1, 2], [3], frequency_penalty=0.5), make([3], [4]), make([1], [2, 2], presence_penalty=0.5)]
    logits = torch.tensor([[*ROW, *ROW[:3]]]).repeat(len(crowd), 1)
    expected = torch.stack([by_hand(row, seq) for row, seq in zip(logits.clone(), crowd, strict=True)])
    LogitsProcessors(crowd, 11, logits.device)(logits)
    check_close(logits, expected, "the logits of four rows")


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_rows_do_not_meet_and_counts_go_on(data: st.DataObject) -> None:
    """Some sequences in changing batches, with any penalties or none: at every step each row is what plain Python makes of it.

    Why: the batch is put together anew whenever somebody comes or goes, and rows change places.
    """
    some = st.sampled_from([0.0, 0.5, -0.5])
    crowd = [
        make(
            data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=4)), [],
            repetition_penalty=data.draw(st.sampled_from([1.0, 1.0, 1.5, 0.75])),
            frequency_penalty=data.draw(some), presence_penalty=data.draw(some),
        )
        for _ in range(4)
    ]  # fmt: skip
    processors = None
    for _ in range(data.draw(st.integers(1, 4))):
        batch = data.draw(st.lists(st.sampled_from(crowd), min_size=1, unique_by=id))
        logits = torch.tensor([[ROW[(token + row) % 8] for token in range(11)] for row in range(len(batch))])
        expected = torch.stack([by_hand(row, seq) for row, seq in zip(logits.clone(), batch, strict=True)])
        processors = LogitsProcessors(batch, 11, logits.device, processors)
        for _ in range(2):
            again = logits.clone()
            processors(again)
            check_close(again, expected, f"the logits of {len(batch)} rows")
        for seq in batch:
            seq.tokens.extend(data.draw(st.lists(st.integers(0, 7), max_size=3)))


def by_hand(row: Tensor, seq: Sequence) -> Tensor:
    """Penalties on one row [V], token by token."""
    params, output = seq.params, seq.tokens[seq.num_prompt_tokens :]
    for token in set(seq.tokens):
        factor = params.repetition_penalty
        row[token] = row[token] / factor if row[token] > 0 else row[token] * factor
        row[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty * (token in output)
    return row


def test_penalties_make_no_infinity() -> None:
    """Banned tokens, -inf and a large logit under the largest and the smallest penalties that there are.

    Why: infinities become "not a number" in the softmax, and the whole row is lost. And -inf is a token that is not allowed:
    where all that are allowed are banned, one of these comes, and none of the others.
    """
    row = [-math.inf, BANNED, -50.0, 50.0, 0.0, 1.0]
    for penalty in (1e30, 2.0, 1e-30):
        seq = make([0, 1, 2, 3, 4], [1], repetition_penalty=penalty, frequency_penalty=2.0)
        logits = processed([row], [seq])[0]
        check_equal(logits[0].item(), -math.inf, f"what is not allowed, with a penalty of {penalty}")
        check_equal(logits[1:].isfinite().all().item(), True, f"whether the others are finite, with a penalty of {penalty}")
        check_equal((logits[4].item(), logits[5].item()), (0.0, 1.0), f"a logit of 0, and one that nobody wrote: {penalty}")


# Cutoffs


def filters(rows: int = 1, *, min_p: float = 0.0, top_k: int = 1 << 30, top_p: float = 1.0) -> Filters:
    """The same limits for some rows."""
    wanted = top_p < 1.0 and min_p == 0.0 and top_k == 1 << 30
    return Filters(
        torch.full((rows,), min_p), torch.full((rows,), top_k), torch.full((rows,), top_p, dtype=torch.float64), wanted
    )


@pytest.mark.parametrize(
    ("limits", "kept"),
    [
        ({}, 6), ({"top_k": 1}, 1), ({"top_k": 2}, 3), ({"top_k": 3}, 3), ({"top_k": 4}, 4), ({"top_k": 9}, 6),
        ({"top_p": 0.1}, 1), ({"top_p": 0.4}, 1), ({"top_p": 0.45}, 3), ({"top_p": 0.85}, 4), ({"top_p": 0.999}, 6),
        ({"min_p": 0.6}, 1), ({"min_p": 0.4}, 3), ({"min_p": 0.2}, 4), ({"min_p": 0.01}, 6),
        ({"top_k": 3, "top_p": 0.45}, 1), ({"top_k": 3, "top_p": 0.55}, 3), ({"min_p": 0.2, "top_p": 0.92}, 4),
        ({"min_p": 0.4, "top_k": 1}, 1), ({"min_p": 0.6, "top_p": 0.9}, 1), ({"top_k": 4, "min_p": 0.4, "top_p": 0.99}, 3),
    ],
    ids=str,
)  # fmt: skip
def test_cutoffs_by_hand(limits: dict[str, Any], kept: int) -> None:
    """Weights 8 4 4 2 1 1, which sum to 20: how many are kept.

    Why: top-k takes its number from what min-p leaves, top-p its share of what both leave; the token that fills a share is
    kept; and tokens that are as likely go together, or the order of a sort decides.
    """
    values = torch.tensor([8.0, 4.0, 4.0, 2.0, 1.0, 1.0]).log()[None]
    cutoff, certain = filters(**limits)._cutoffs_of_largest(values.clone(), 6, None)
    check_equal((values >= cutoff).sum().item(), kept, "tokens that are kept")
    check_equal(certain.tolist(), [True], "whether that is certain, as all are known")


def test_a_share_that_is_just_reached_is_enough() -> None:
    """Weights 1, ½ and ½ with half of the mass: the first has it alone.

    Why: the rule says which tokens are kept: those with less than `top_p` on more likely ones.
    """
    values = torch.tensor([[0.0, math.log(0.5), math.log(0.5)]])
    cutoff, _ = filters(top_p=0.5)._cutoffs_of_largest(values.clone(), 3, None)
    check_equal((values >= cutoff).sum().item(), 1, "tokens that are kept")


def test_a_top_p_of_one_keeps_all() -> None:
    """Next to a sure token one of e⁻⁶⁰: without a limit it is kept, beside a row with one it is not.

    Why: a sum of floats reaches its total long before the end. Off is off: a token that a form demands may be that unlikely.
    """
    values = torch.tensor([[0.0, -60.0], [0.0, -60.0]])
    both = Filters(torch.zeros(2), torch.full((2,), 9), torch.tensor([1.0, 0.9], dtype=torch.float64), False)
    cutoff, _ = both._cutoffs_of_largest(values.clone(), 2, None)
    check_equal((values >= cutoff[:, None]).sum(1).tolist(), [2, 1], "tokens that are kept")


def test_a_top_k_of_all_is_the_last_logit() -> None:
    """Top-k of three with all three logits known: the cutoff is the least of them.

    Why: a limit that is just reached is a limit, not none; `top_k` and the number of candidates may be equal.
    """
    values = torch.tensor([[2.0, 1.0, 0.5]])
    cutoff, _ = filters(top_k=3)._cutoffs_of_largest(values.clone(), 3, None)
    check_equal(cutoff.tolist(), [0.5], "the cutoff")


@pytest.mark.parametrize("width", [3, 700])
def test_rows_that_are_known_as_a_whole_are_certain(width: int) -> None:
    """All logits of a row: nothing is unseen, whatever the limit, and whether the largest is a number or not.

    Why: a row that counts as uncertain is computed once more, alone, from all its logits; a row of NaN would get no better.
    """
    for largest in (0.0, math.inf, math.nan):
        values = torch.zeros(1, width)
        values[:, 0] = largest
        if math.isnan(largest):
            values[:] = math.nan
        for limits in ({"top_p": 0.5}, {"top_k": width}):
            certain = filters(**limits)._cutoffs_of_largest(values.clone(), width, None)[1]
            check_equal(certain.tolist(), [True], f"whether it is certain, with {largest} as the largest of {width}")


@pytest.mark.parametrize(
    ("limits", "last", "mass", "certain"),
    [
        ({"top_k": 2}, 1.0, None, True), ({"top_k": 3}, 1.0, None, False), ({"top_k": 4}, 1.0, None, False),
        ({"min_p": 0.3}, 1.0, None, True), ({"min_p": 0.1}, 1.0, None, False), ({"min_p": 0.24}, 1.0, None, False),
        ({"top_p": 0.5}, 1.0, 7.0, True), ({"top_p": 0.5}, 1.0, 13.0, False), ({"top_p": 0.9}, 1.0, 7.0, False),
        ({"min_p": 0.01, "top_p": 0.5}, 1.0, 7.0, False), ({"min_p": 0.3, "top_p": 0.9}, 1.0, None, True),
        ({"top_k": 4, "top_p": 0.5}, 1.0, 7.0, False), ({"top_k": 3, "top_p": 0.5}, 1.0, None, False),
        ({}, 1.0, None, False), ({"top_p": 0.5}, math.nan, 7.0, True), ({"top_k": 100, "top_p": 0.5}, 1.0, 7.0, True),
    ],
    ids=str,
)  # fmt: skip
def test_a_cutoff_is_certain_if_nothing_unseen_is_kept(
    limits: dict[str, Any], last: float, mass: float | None, certain: bool
) -> None:
    """The three largest of a hundred: weights 4, 2 and 1. What is unseen is at most as likely as the last.

    Why: a sort of fifty thousand logits takes longer than a small model's step. A look at few candidates is enough nearly
    always, and where it is not, somebody must know.
    """
    values = torch.tensor([[4.0, 2.0, last]]).log()
    values = values if last == last else torch.full((1, 3), math.nan)
    total = None if mass is None else torch.tensor([mass / 4.0])
    check_equal(filters(**limits)._cutoffs_of_largest(values, 100, total)[1].tolist(), [certain], "whether it is certain")


def test_each_row_takes_its_share_of_what_its_own_limits_leave() -> None:
    """Two rows of a hundred, whose three largest weigh 4, 2 and 1 of 11, with a top-p of a half; the second has a top-k of two.

    Why: the first needs the mass of its whole row, so it is there for both. For the second it is a sum that nobody draws from:
    of the 6 that top-k leaves, the first token has more than half.
    """
    values = torch.tensor([[4.0, 2.0, 1.0]] * 2).log()
    both = Filters(torch.zeros(2), torch.tensor([100, 2]), torch.full((2,), 0.5, dtype=torch.float64), True)
    cutoff, certain = both._cutoffs_of_largest(values.clone(), 100, torch.tensor([11 / 4.0] * 2))
    check_equal(cutoff.tolist(), [values[0, 1].item(), values[1, 0].item()], "the cutoffs: the second logit, and the first")
    check_equal(certain.tolist(), [True, True], "whether they are certain")


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 1000), spread=st.sampled_from([0.02, 1.0, 4.0]), grid=st.booleans(),
    limits=st.lists(
        st.fixed_dictionaries({
            "min_p": st.sampled_from([0.0, 0.013, 0.7]), "top_k": st.sampled_from([0, 1, 33, 64, 65, 200]),
            "top_p": st.sampled_from([1.0, 0.1, 0.777, 0.9999]),
        }),
        min_size=1, max_size=4,
    ),
)  # fmt: skip
def test_a_batch_has_the_distributions_of_the_definitions(
    seed: int, spread: float, grid: bool, limits: list[dict[str, Any]]
) -> None:
    """Rows of 300 logits, flat or steep, some with many equal ones, each row with limits of its own, as the sampler uses them.

    Why: 64 candidates are looked at first. Flat rows keep more than these, and equal logits may lie on both sides.
    """
    logits = torch.randn(len(limits), 300, generator=torch.Generator().manual_seed(seed)) * spread
    logits = (logits * 4).round() / 4 if grid else logits
    sequences = [make([1], [], **each) for each in limits]
    expected = torch.stack([by_definition(row, **each) for row, each in zip(logits.double(), limits, strict=True)])
    check_close(Sampler(300).probabilities(logits, sequences), expected.float(), "probabilities", 1e-4)
    if all(each == {"min_p": 0.0, "top_k": 0, "top_p": 1.0} for each in limits):
        filters()._cutoffs_of_largest(logits[:1].sort(descending=True).values, 300, None)


def by_definition(row: Tensor, min_p: float, top_k: int, top_p: float) -> Tensor:
    """Probabilities [V] of one row, each rule as its sentence says it."""
    p = (row - row.max()).exp()
    keep = p >= min_p * (1 - 1e-9)
    above = row[None, :] > row[:, None]  # [token, other]
    if top_k:
        keep &= (above & keep).sum(1) < top_k
    keep &= ((above & keep) * p).sum(1) < top_p * (p * keep).sum() if top_p < 1.0 else True
    return p * keep / (p * keep).sum()
