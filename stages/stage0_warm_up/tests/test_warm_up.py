"""The warm-up's tests; ``make test-stage-0`` runs them on your `warm_up.py`."""

from __future__ import annotations

import random

import pytest
import torch

from stages.stage0_warm_up.warm_up import attend, floor_seconds, generate, static_batches


def test_0_1_each_token_is_made_from_all_before_it() -> None:
    """The model's answer is the sum of the whole text. From [1, 2]: 3, then 1 + 2 + 3 = 6, then 12.

    Why: a model has no memory. What it is not handed again, it does not know.
    """
    assert generate(sum, [1, 2], 3) == [3, 6, 12]


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_0_1_the_model_is_called_once_a_token_and_the_prompt_stays(num_tokens: int) -> None:
    """It is called with texts of 3, 4, 5 … tokens, once for each that is wanted; the list handed in is unchanged.

    Why: each call costs as much as reading all the text. One too many is time for nothing.
    """
    lengths, prompt = [], [7, 8, 9]
    assert generate(lambda tokens: lengths.append(len(tokens)) or 5, prompt, num_tokens) == [5] * num_tokens
    assert lengths == [3 + index for index in range(num_tokens)]
    assert prompt == [7, 8, 9]


@pytest.mark.parametrize(("length", "width"), [(1, 4), (2, 1), (9, 16)])
def test_0_2_with_a_cache_it_is_the_attention_of_pytorch(length: int, width: int) -> None:
    """Token by token with your cache, and all at once with `scaled_dot_product_attention` and a causal mask: the same rows.

    Why: the cache must change the cost and nothing else. Every later chapter rests on this equality.
    """
    torch.manual_seed(length)
    query, key, value = torch.randn(3, length, width, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(query[None], key[None], value[None], is_causal=True)[0]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    rows = [attend(query[i], key[i], value[i], keys, values) for i in range(length)]
    torch.testing.assert_close(torch.stack(rows), expected)


def test_0_2_the_cache_grows_by_the_new_token() -> None:
    """After three tokens it holds their three keys and values, in their order, as they were handed in.

    Why: memory for this list is what an engine manages. You will hand it out in blocks in stage 1.
    """
    vectors = torch.randn(3, 2, 4)
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for key, value in vectors:
        attend(torch.ones(4), key, value, keys, values)
    assert torch.equal(torch.stack(keys), vectors[:, 0])
    assert torch.equal(torch.stack(values), vectors[:, 1])


@pytest.mark.parametrize(
    ("work", "expected"), [((100.0, 10.0), 10.0), ((100.0, 40_000.0), 40.0), ((0.0, 1_000.0), 1.0), ((50.0, 5_000.0), 5.0)]
)
def test_0_3_the_slower_of_reading_and_computing_decides(work: tuple[float, float], expected: float) -> None:
    """A machine that reads 10 bytes and does 1,000 operations a second: in one case reading decides, in one computing.

    Why: to speed up the one that does not decide gains nothing. Decoding waits for memory, and prompts for arithmetic.
    """
    assert floor_seconds(*work, 10.0, 1_000.0) == pytest.approx(expected)


def test_0_4_a_batch_lasts_as_long_as_its_longest_answer() -> None:
    """Answers of 2, 8, 3, 3 and 5 tokens, two at a time: 8 + 3 + 5 = 16 steps, and 21 of the 32 seats give a token.

    Why: those who are done keep their seats until the longest is done. Stage 2 gives the seats away at once.
    """
    assert static_batches([2, 8, 3, 3, 5], 2) == (16, pytest.approx(21 / 32))


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_0_4_steps_are_those_of_a_clock(batch_size: int) -> None:
    """Random lengths, against a loop that plays each step: everybody in the batch writes a token until all are done.

    Why: an oracle that is slow and simple finds what a case by hand does not.
    """
    rng = random.Random(batch_size)
    for count in range(12):
        lengths = [rng.randint(1, 20) for _ in range(count)]
        steps, left = 0, list(lengths)
        while left:
            batch, left = left[:batch_size], left[batch_size:]
            while any(length > 0 for length in batch):
                batch = [length - 1 for length in batch]
                steps += 1
        share = sum(lengths) / (batch_size * steps) if steps else 1.0
        assert static_batches(lengths, batch_size) == (steps, pytest.approx(share))
