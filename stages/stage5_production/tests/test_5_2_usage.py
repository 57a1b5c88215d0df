"""Task 5.2: which choice a sequence is, and what a request is billed for."""

from __future__ import annotations

import random
from typing import Any

import pytest

from stages.core.output import CompletionOutput, RequestOutput
from stages.course.fixtures.checks import check_equal
from stages.serving.openai_protocol import CompletionRequest
from stages.serving.responses import CompletionReply


def reply(n: int | None, *prompts: list[int]) -> CompletionReply:
    """The answer to prompts "r-0", "r-1", … with n sequences each."""
    return named({f"r-{i}": prompt for i, prompt in enumerate(prompts)}, n=n)


def named(prompts: dict[str, list[int]], **fields: Any) -> CompletionReply:
    """The answer to prompts with these request ids."""
    return CompletionReply("id", CompletionRequest(model="m", prompt=["x"] * len(prompts), **fields), prompts, None)


def output(name: str, *sequences: tuple[int, list[int]], cached: int = 0, finished: bool = True) -> RequestOutput:
    """Sequences as (index, new tokens)."""
    reason = "stop" if finished else None
    outputs = [CompletionOutput(i, "", tokens, -len(tokens) * (i + 1.0), None, reason) for i, tokens in sequences]
    return RequestOutput(name, None, [], outputs, finished, num_cached_tokens=cached)


def numbers(one: Any) -> tuple[int, int, int, int]:
    usage = one.usage
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens, usage.prompt_tokens_details.cached_tokens


def test_sequence_j_of_prompt_i_is_choice_i_n_plus_j() -> None:
    """Two prompts with three sequences each are choices 0 to 5.

    Why: clients find their answers by index; with another count two prompts' answers change places.
    """
    one = reply(3, [1, 2], [3])
    got = [[index for index, _ in one.choices(output(name, (0, [7]), (1, [7]), (2, [7])))] for name in ("r-0", "r-1")]
    check_equal(got, [[0, 1, 2], [3, 4, 5]], "indices of choices")


def test_sequences_come_with_their_choice_in_any_order() -> None:
    """A delta may bring the third sequence alone.

    Why: the place in an output is not the sequence's index.
    """
    one = reply(3, [1], [2])
    pairs = list(one.choices(output("r-1", (2, [7, 8]))))
    check_equal([(index, sequence.token_ids) for index, sequence in pairs], [(5, [7, 8])], "choice and tokens")


@pytest.mark.parametrize("names", [["cmpl-9"], ["z", "a"], ["cmpl-7-1", "cmpl-7-0"]])
def test_an_id_is_a_name_and_no_number(names: list[str]) -> None:
    """A request with one prompt has an id without a number behind it; the order of `prompts` says which is first.

    Why: what stands in an id is the server's business; next month it is something else.
    """
    one = named({name: [1] for name in names}, n=2)
    got = {name: [index for index, _ in one.choices(output(name, (0, [7]), (1, [7])))] for name in names}
    check_equal(got, {name: [2 * i, 2 * i + 1] for i, name in enumerate(names)}, "indices of choices")


def test_a_prompt_counts_once() -> None:
    """Prompts of 2 and 3 tokens with n = 4 are 5 prompt tokens.

    Why: it is computed once; to bill it four times is a well-known bug of servers.
    """
    check_equal(numbers(reply(4, [1, 2], [3, 4, 5]))[0], 5, "prompt tokens")
    check_equal(numbers(reply(None, [1, 2]))[0], 2, "prompt tokens without n")
    check_equal(numbers(reply(1, [1, 2], [1, 2]))[0], 4, "prompt tokens of a prompt that was sent twice")


def test_tokens_add_up_over_deltas() -> None:
    """Each output brings new tokens; the usage is of all that came so far.

    Why: a stream's last chunk must say the same as the whole answer would.
    """
    one = reply(2, [1, 2, 3])
    for step in (output("r-0", (0, [5]), (1, [6]), finished=False), output("r-0", (1, [7, 8]), finished=False)):
        list(one.choices(step))
    check_equal(numbers(one), (3, 4, 7, 0), "usage in the middle")
    list(one.choices(output("r-0", (0, []), (1, [9]))))
    check_equal(numbers(one), (3, 5, 8, 0), "usage at the end")


def test_a_token_counts_before_it_is_passed_on() -> None:
    """Two choices of 1 and 2 tokens: with the first in hand the usage is 1, with the second 3.

    Why: whoever makes a chunk of what he has in hand puts the usage so far into it.
    """
    one = reply(2, [1])
    seen = [one.usage.completion_tokens for _ in one.choices(output("r-0", (0, [5]), (1, [6, 7])))]
    check_equal(seen, [1, 3], "completion tokens at each choice")


def test_what_best_of_threw_away_is_counted() -> None:
    """Three sampled, of 3, 2 and 1 tokens, and one returned: 6 tokens.

    Why: they were computed, and OpenAI bills them too.
    """
    one = named({"r": [1, 2]}, best_of=3, n=1)
    whole = one.whole([output("r", (0, [5, 5, 5]), (1, [6, 6]), (2, [7]))])
    check_equal(len(whole.choices), 1, "choices that are returned")
    check_equal(numbers(one), (2, 6, 8, 0), "usage")


def test_tokens_are_counted_by_choice() -> None:
    """Two choices of one prompt, with 3 and 1 tokens: so says `_tokens`.

    Why: a stream may bring a usage in every chunk (`continuous_usage_stats`), that of its choice.
    """
    one = reply(2, [1, 2], [3])
    list(one.choices(output("r-1", (0, [5]), (1, [6]), finished=False)))
    list(one.choices(output("r-1", (0, [7, 8]))))
    check_equal(dict(one._tokens), {2: 3, 3: 1}, "choice and tokens")


def test_asking_for_the_usage_changes_nothing() -> None:
    """Twice the same.

    Why: a property that counts is a trap for whoever logs it.
    """
    one = reply(1, [1, 2])
    list(one.choices(output("r-0", (0, [5, 6]))))
    check_equal([numbers(one), numbers(one)], [(2, 2, 4, 0)] * 2, "usage, asked twice")


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_cached_tokens_are_those_of_each_prompt_once(n: int, steps: int) -> None:
    """The first prompt found 16 tokens, the second 32, and every output says so again: 48, however many samples there are.

    Why: the number comes with each delta. Added up step by step, or sample by sample, it would exceed the prompt.
    """
    one, sequences = reply(n, [0] * 20, [0] * 40), [(i, [1]) for i in range(n)]
    for _ in range(steps):
        list(one.choices(output("r-0", *sequences, cached=16, finished=False)))
        list(one.choices(output("r-1", *sequences, cached=32, finished=False)))
    check_equal(numbers(one), (60, 2 * n * steps, 60 + 2 * n * steps, 48), "usage")


@pytest.mark.parametrize("number", range(4))
def test_any_answer_is_numbered_and_counted(number: int) -> None:
    """Random prompts with a random n, whose sequences get random tokens in random order.

    Why: a bill is right for every request or it is wrong.
    """
    dice = random.Random(520 + number)
    for _ in range(10):
        n, prompts = dice.randrange(1, 5), [[1] * dice.randrange(1, 50) for _ in range(dice.randrange(1, 5))]
        one, seen, told, cached = reply(n, *prompts), [], [], [dice.randrange(len(prompt) + 1) for prompt in prompts]
        for prompt, index in dice.sample([(i, j) for i in range(len(prompts)) for j in range(n)], n * len(prompts)):
            tokens = [dice.randrange(99) for _ in range(dice.randrange(6))]
            told.append((prompt * n + index, tokens))
            choices = one.choices(output(f"r-{prompt}", (index, tokens), cached=cached[prompt]))
            seen += [(choice, sequence.token_ids) for choice, sequence in choices]
        check_equal(seen, told, "choices and tokens")
        before, after = sum(map(len, prompts)), sum(len(tokens) for _, tokens in told)
        check_equal(numbers(one), (before, after, before + after, sum(cached)), "usage")
