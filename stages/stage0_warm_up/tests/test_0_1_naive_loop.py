"""Task 0.1: a model writes more than one token by being called again."""

from __future__ import annotations

import pytest

from stages.stage0_warm_up.warm_up import generate


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
