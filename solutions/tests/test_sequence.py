"""SamplingParams refuses what cannot be meant, by name; a sequence ends in the order of vLLM's stops."""

from __future__ import annotations

import math
from typing import Any

import pytest

from solutions.batching.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams, StructuredOutput
from solutions.batching.sequence import Sequence, SequenceStatus

EOS = 2
NOT_INTEGERS = [1.0, 1.5, math.nan, "1", True, [1]]
NOT_NUMBERS = [math.nan, math.inf, -math.inf, "1", True, [1.0], 1j, 10**400]

BAD: dict[str, list[Any]] = {
    "n": [0, -1, None, *NOT_INTEGERS],
    "temperature": [-0.1, -1, None, *NOT_NUMBERS],
    "top_p": [0, 0.0, -0.1, 1.0001, None, *NOT_NUMBERS],
    "top_k": [-2, None, *NOT_INTEGERS],
    "min_p": [-0.1, 1.1, None, *NOT_NUMBERS],
    "repetition_penalty": [0, 0.0, -1.0, None, *NOT_NUMBERS],
    "presence_penalty": [-2.01, 2.01, None, *NOT_NUMBERS],
    "frequency_penalty": [-2.01, 2.01, None, *NOT_NUMBERS],
    "seed": NOT_INTEGERS,
    "stop": ["", [""], ["a", ""], [1], 1, {"a": 1}, [None], b"a", True],
    "stop_until": [1, "(", b"a", True],
    "truncate_prompt_tokens": [0, -2, *NOT_INTEGERS],
    "truncation_side": ["", "middle", None, 1],
    "stop_token_ids": [1, "1", [-1], [1, None], {"a": 1}, *([x] for x in NOT_INTEGERS)],
    "bad_words": ["word", [""], [1], 1],
    "bad_words_token_ids": [1, [1], [[]], [[1], []], [[-1]], ["a"], *([[x]] for x in NOT_INTEGERS)],
    "ignore_eos": [0, 1, None, "yes"],
    "max_tokens": [0, -1, *NOT_INTEGERS],
    "min_tokens": [-1, 17, None, *NOT_INTEGERS],
    "logprobs": [-1, MAX_LOGPROBS + 1, *NOT_INTEGERS],
    "prompt_logprobs": [-1, MAX_LOGPROBS + 1, *NOT_INTEGERS],
    "logit_bias": [[1], "a", 1, {-1: 0.0}, {"1": 0.0}, {1.0: 0.0}, {True: 0.0}, {1: 101}, *({1: x} for x in NOT_NUMBERS)],
    "allowed_token_ids": [[], 1, "1", [-1], *([x] for x in NOT_INTEGERS)],
    "structured_output": [{}, "json", 1, True],
    "detokenize": [None, 1],
    "skip_special_tokens": [None, 1],
    "include_stop_str_in_output": [None, 1],
    "output_kind": [None, 0, "delta"],
}

GOOD: dict[str, list[Any]] = {
    "n": [1, 64],
    "temperature": [0, 0.0, 1e-9, 2, 1e9],
    "top_p": [1, 1.0, 1e-300],
    "top_k": [-1, 0, 1, 10**9],
    "min_p": [0, 1, 0.5],
    "repetition_penalty": [1e-3, 1, 100.0],
    "presence_penalty": [-2, 2, 0.5],
    "frequency_penalty": [-2, 2, 0.5],
    "seed": [None, 0, -1, 2**64],
    "stop": [None, [], "a", ["a", "b"], ("a",)],
    "stop_until": [None, "a+"],
    "truncate_prompt_tokens": [None, -1, 1, 10**9],
    "truncation_side": ["left", "right"],
    "stop_token_ids": [None, [], [0, 5], (1,), {1}],
    "bad_words": [None, [], ["a"]],
    "bad_words_token_ids": [None, [], [[1], [2, 3]], [(1, 2)]],
    "ignore_eos": [True],
    "max_tokens": [None, 1, 10**9],
    "min_tokens": [0, 16],
    "logprobs": [None, 0, MAX_LOGPROBS],
    "prompt_logprobs": [None, 0, MAX_LOGPROBS],
    "logit_bias": [None, {}, {0: 100, 1: -100.0}],
    "allowed_token_ids": [None, [0], (1, 2)],
    "structured_output": [None, StructuredOutput("regex", "a+"), StructuredOutput("json_object")],
    "detokenize": [False],
    "skip_special_tokens": [False],
    "include_stop_str_in_output": [True],
    "output_kind": list(RequestOutputKind),
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(name, value, id=f"{name}={str(value)[:20]}") for name, values in table.items() for value in values]


def test_every_field_has_bad_and_good_values() -> None:
    assert set(BAD) == set(GOOD) == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(("name", "value"), cases(BAD))
def test_a_bad_value_is_refused_in_one_line_that_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as error:
        SamplingParams(**{name: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "value"), cases(GOOD))
def test_a_good_value_is_taken(name: str, value: Any) -> None:
    got = getattr(SamplingParams(**{name: value}), name)
    if name in ("stop", "stop_token_ids", "bad_words", "bad_words_token_ids"):
        expected = [value] if isinstance(value, str) else list(value or [])
        assert got == ([list(word) for word in expected] if name == "bad_words_token_ids" else expected)
    else:
        assert got == (list(value) if isinstance(value, tuple) else value)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -1}, r"temperature must be a number at least 0, got -1"),
        ({"top_p": 0}, r"top_p must be a number in \(0, 1\], got 0"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be a number above 0, got 0"),
        ({"logprobs": 21}, r"logprobs must be an integer in \[0, 20\], got 21"),
        ({"max_tokens": 0}, r"max_tokens must be an integer at least 1, got 0"),
        ({"seed": 0.5}, r"seed must be an integer, got 0\.5"),
        ({"max_tokens": 4, "min_tokens": 5}, r"min_tokens must be an integer in \[0, 4\], got 5"),
        ({"stop": "a", "detokenize": False}, "stop strings need detokenize=True"),
    ],
)
def test_the_message_says_what_would_be_right(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        SamplingParams(**params)


def test_min_tokens_is_bounded_by_nothing_but_max_tokens() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6


def test_lists_are_not_shared_with_the_caller_or_each_other() -> None:
    stop = ["a"]
    first, second = SamplingParams(stop=stop), SamplingParams()
    first.stop.append("b")
    first.stop_token_ids.append(1)
    assert (stop, second.stop, second.stop_token_ids) == (["a"], [], [])


@pytest.mark.parametrize(("temperature", "greedy"), [(0, True), (9.9e-6, True), (1e-5, False), (1.0, False)])
def test_greedy_is_a_temperature_below_a_hundred_thousandth(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def make(prompt: int = 3, max_model_len: int = 100, **params: Any) -> Sequence:
    return Sequence(0, [9] * prompt, SamplingParams(**params), eos_token_ids=(EOS, 3), max_model_len=max_model_len)


def run(seq: Sequence, *tokens: int) -> tuple[int, str | None, int | str | None]:
    """Append tokens until the sequence ends: (how many, finish_reason, stop_reason)."""
    for count, token in enumerate(tokens, 1):
        if seq.append_token(token):
            return count, seq.finish_reason, seq.stop_reason
        assert seq.finish_reason is None
        assert seq.stop_reason is None
    return 0, seq.finish_reason, seq.stop_reason


@pytest.mark.parametrize(
    ("params", "tokens", "expected"),
    [
        ({}, [5, 6, 7], (0, None, None)),
        ({}, [5, EOS, 7], (2, "stop", None)),
        ({}, [5, 3], (2, "stop", None)),
        ({"stop_token_ids": [7]}, [5, 7, EOS], (2, "stop", 7)),
        ({"stop_token_ids": [EOS]}, [EOS], (1, "stop", None)),
        ({"ignore_eos": True}, [EOS, 3, 5], (0, None, None)),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, [3, EOS], (2, "stop", EOS)),
        ({"max_tokens": 2}, [5, 6, 7], (2, "length", None)),
        ({"max_tokens": 2}, [5, EOS], (2, "stop", None)),
        ({"max_tokens": 2, "stop_token_ids": [6]}, [5, 6], (2, "stop", 6)),
        ({"max_tokens": 1}, [5], (1, "length", None)),
        ({"min_tokens": 3}, [EOS, EOS, EOS], (3, "stop", None)),
        ({"min_tokens": 3, "stop_token_ids": [7]}, [7, 7, 5, 7], (4, "stop", 7)),
        ({"min_tokens": 2, "max_tokens": 2}, [EOS, 5], (2, "length", None)),
        ({"min_tokens": 1}, [EOS], (1, "stop", None)),
        ({"ignore_eos": True, "max_tokens": 3}, [EOS, EOS, EOS], (3, "length", None)),
    ],
)
def test_stops_come_in_the_order_eos_stop_token_length(params: dict[str, Any], tokens: list[int], expected: tuple) -> None:
    seq = make(**params)
    assert run(seq, *tokens) == expected
    assert seq.output_token_ids == tokens[: expected[0] or None]
    assert seq.prompt_token_ids == [9] * 3


class Search:
    """Finds a stop string with the token 8, and notes what it was told."""

    def __init__(self) -> None:
        self.told: list[str | None] = []
        self.tokens: list[int] = []

    def find(self, reason: str | None) -> str | None:
        self.told.append(reason)
        return "eight" if self.tokens[-1] == 8 else None


@pytest.mark.parametrize(
    ("params", "tokens", "expected", "told"),
    [
        ({}, [5, 8, 6], (2, "stop", "eight"), [None, None]),
        ({"max_tokens": 2}, [5, 8], (2, "stop", "eight"), [None, "length"]),
        ({"max_tokens": 2}, [5, 6], (2, "length", None), [None, "length"]),
        ({"stop_token_ids": [8]}, [5, 8], (2, "stop", "eight"), [None, "stop"]),
        ({"stop_token_ids": [7]}, [5, 7], (2, "stop", 7), [None, "stop"]),
        ({}, [5, EOS], (2, "stop", None), [None, "stop"]),
    ],
)
def test_a_stop_string_comes_before_every_other_end(
    params: dict[str, Any], tokens: list[int], expected: tuple, told: list[str | None]
) -> None:
    seq = make(**params)
    seq.stop_search = search = Search()
    search.tokens = seq.tokens
    assert run(seq, *tokens) == expected
    assert search.told == told
    assert seq.finished


def test_a_length_that_has_another_reason_says_so() -> None:
    seq = make(max_tokens=2)
    seq.max_len_reason = "too slow"
    assert run(seq, 5, 6) == (2, "length", "too slow")
    seq = make(max_tokens=2)
    seq.max_len_reason = "too slow"
    assert run(seq, 5, EOS) == (2, "stop", None)


@pytest.mark.parametrize(
    ("prompt", "max_model_len", "max_tokens", "generated"),
    [(3, 100, 5, 5), (3, 8, 5, 5), (3, 7, 5, 4), (3, 4, None, 1), (3, 10, None, 7), (7, 8, 16, 1), (1, 2, 1, 1)],
)
def test_length_is_the_least_of_max_tokens_and_the_context(
    prompt: int, max_model_len: int, max_tokens: int | None, generated: int
) -> None:
    seq = make(prompt, max_model_len, max_tokens=max_tokens)
    assert seq.max_len == prompt + generated
    assert run(seq, *[5] * 50) == (generated, "length", None)


def test_counts_of_tokens() -> None:
    prompt = [9, 9]
    seq = Sequence(4, prompt, SamplingParams())
    assert (seq.num_output_tokens, seq.num_uncomputed_tokens, seq.output_token_ids) == (0, 2, [])
    seq.num_computed_tokens = 2
    seq.append_token(8)
    assert (seq.num_output_tokens, seq.num_uncomputed_tokens, seq.output_token_ids) == (1, 1, [8])
    assert prompt == [9, 9], "the caller's list stays as it is"
    assert (seq.request_id, seq.finished) == ("4", False)
    seq.finish("abort")
    assert (seq.status, seq.finish_reason, seq.stop_reason) == (SequenceStatus.FINISHED, "abort", None)
    assert seq.finished
