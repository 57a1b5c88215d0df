"""Task 5.1: a body becomes parameters of the engine, or one line that names the field at fault."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from stages.batching.sampling_params import RequestOutputKind, SamplingParams, StructuredOutput
from stages.course.fixtures.checks import check_equal
from stages.serving.openai_fields import describe_validation_error
from stages.serving.openai_protocol import ChatCompletionRequest, CompletionRequest
from stages.serving.tokenizer_routes import TokenizeRequest

DELTA, FINAL_ONLY = RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest(model="m", prompt="hi", **fields)


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "hi"}], **fields)


def test_what_is_not_set_is_left_to_the_engine() -> None:
    """A bare request sets nothing but the kind of output; null is as good as absent.

    Why: defaults are written down once, in SamplingParams. A second copy in the server disagrees after the next release.
    """
    check_equal(completion().sampling_fields(), {"output_kind": FINAL_ONLY}, "fields of a bare completion")
    check_equal(completion(temperature=None, stop=None).sampling_fields(), {"output_kind": FINAL_ONLY}, "fields with nulls")


def test_fields_that_both_have_go_across() -> None:
    """Every field of SamplingParams that the request has and sets, under the same name, also a 0 and a false.

    Why: who drops what is false in Python drops temperature 0, and greedy requests become random.
    """
    fields = completion(temperature=0.0, n=2, stop=["a"], seed=0, ignore_eos=False, min_tokens=0, top_k=5).sampling_fields()
    expected = {"temperature": 0.0, "n": 2, "stop": ["a"], "seed": 0, "ignore_eos": False, "min_tokens": 0, "top_k": 5}
    check_equal(fields, expected | {"output_kind": FINAL_ONLY}, "fields")
    SamplingParams(**fields)
    check_equal(completion(logprobs=2).sampling_fields(), {"logprobs": 2, "output_kind": FINAL_ONLY}, "log-probabilities")


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"guided_regex": "a+"}, StructuredOutput("regex", "a+")),
        ({"guided_json": '{"type": "null"}'}, StructuredOutput("json", '{"type": "null"}')),
        ({"response_format": {"type": "json_object"}}, StructuredOutput("json_object")),
        ({"response_format": {"type": "text"}}, None),
    ],
)
def test_a_form_goes_across(make: Callable[..., Any], fields: dict[str, Any], form: StructuredOutput | None) -> None:
    """The engine calls it `structured_output`, whatever field asks for it; a text like any other is no form.

    Why: a server that forgets it answers with prose where a program waits for JSON.
    """
    check_equal(make(**fields).sampling_fields().get("structured_output"), form, "structured_output")


def test_the_request_stays_as_it_is() -> None:
    """Asked twice, with a bias and two limits, it says the same, and its fields are what the client sent.

    Why: errors are told in the client's words, from the same request.
    """
    request = chat(logit_bias={"50": 1.0}, max_completion_tokens=3, logprobs=True)
    before = request.model_copy(deep=True)
    check_equal(request.sampling_fields(), request.sampling_fields(), "fields, asked twice")
    check_equal(request == before, True, "the request is as before")


def test_fields_of_the_server_stay_behind() -> None:
    """model, prompt, user, stream, priority and their like are no parameters of the engine.

    Why: SamplingParams refuses what it does not know, and the client would get an error about a field that is fine.
    """
    fields = completion(user="ann", priority=1, cache_salt="s", echo=True, stream=True).sampling_fields()
    check_equal(fields, {"output_kind": DELTA}, "fields")


@pytest.mark.parametrize(("stream", "kind"), [(True, DELTA), (False, FINAL_ONLY), (None, FINAL_ONLY)])
def test_a_stream_wants_deltas(stream: bool | None, kind: RequestOutputKind) -> None:
    """Streams get what is new at each step, whole answers nothing before the end.

    Why: cumulative outputs of a long answer cost the square of its length, and most of them are thrown away.
    """
    check_equal(completion(stream=stream).sampling_fields()["output_kind"], kind, "kind of output")


def test_the_tokens_of_a_bias_are_numbers() -> None:
    """JSON's keys are texts, the engine's are token ids. A bias of 0 is one, too.

    Why: a bias for the token "50" is none for the token 50. And what a client sent is what errors and logs show.
    """
    got = completion(logit_bias={"50": -1.5, "7": 3, "8": 0}).sampling_fields()["logit_bias"]
    check_equal(got, {50: -1.5, 7: 3, 8: 0}, "logit_bias")


@pytest.mark.parametrize(
    ("fields", "limit"), [({}, None), ({"max_tokens": 5}, 5), ({"max_completion_tokens": 7}, 7),
                          ({"max_tokens": 7, "max_completion_tokens": 7}, 7), ({"max_completion_tokens": 0}, 0),
                          ({"max_tokens": 0}, 0)]
)  # fmt: skip
def test_a_chat_has_two_names_for_its_limit_and_no_default(fields: dict[str, int], limit: int | None) -> None:
    """max_completion_tokens is the newer name of max_tokens; without either an answer may fill the context. 0 is a limit.

    Why: the engine's own default of 16 tokens is that of completions. A chat that ends after 16 tokens looks broken. And a 0
    that passes for "not set" is a whole context of tokens, where the engine would have refused it.
    """
    check_equal(chat(**fields).sampling_fields()["max_tokens"], limit, "max_tokens")


@pytest.mark.parametrize(
    ("fields", "logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": False, "top_logprobs": 0}, None), ({"top_logprobs": 0}, None),
     ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 0}, 0), ({"logprobs": True, "top_logprobs": 3}, 3)],
)  # fmt: skip
def test_a_chat_says_in_two_fields_how_many_log_probabilities(fields: dict[str, Any], logprobs: int | None) -> None:
    """logprobs: true wants that of the token, top_logprobs so many alternatives beside it; the engine has one number.

    Why: True is 1 in Python, so a careless copy asks for one alternative that nobody wanted. And clients send both fields
    always, with false and 0 for "none", where 0 alone would be the token's own.
    """
    value = chat(**fields).sampling_fields()["logprobs"]
    check_equal((value, type(value)), (logprobs, type(logprobs)), "logprobs and its type")


def problem(request: type[Any], body: Any) -> tuple[str, str | None]:
    """What `describe_validation_error` says of the first thing that is wrong with a body, as FastAPI would report it."""
    with pytest.raises(ValidationError) as caught:
        request.model_validate(body)
    error = caught.value.errors()[0]
    return describe_validation_error(error | {"loc": ("body", *error["loc"])})


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        ({"prompt": "x"}, "model is required", "model"),
        ({"model": "m", "prompt": "x", "nonsense": 1}, "nonsense is not a field of this request", "nonsense"),
        ({"model": "m", "prompt": "x", "body": 1}, "body is not a field of this request", "body"),
        ({"model": "m", "prompt": "x", "": 1}, '"" is not a field of this request', '""'),
        ({"model": "m", "prompt": "x", "stream": True, "stream_options": {"body": 1}},
         "stream_options.body is not a field of this request", "stream_options.body"),
        ({"model": "m", "prompt": "x", "suffix": "y"}, "suffix is not supported by this server", "suffix"),
        ({"model": "m", "prompt": "x", "stream_options": {}},
         "stream_options: only allowed with stream: true", "stream_options"),
        ({"model": "m", "prompt": "x", "stop": [1]}, "stop[0]: Input should be a valid string", "stop[0]"),
        ({"model": "m", "prompt": "x", "stream": True, "stream_options": {"more": 1}},
         "stream_options.more is not a field of this request", "stream_options.more"),
        ({"model": "m", "prompt": "x", "stream": True, "stream_options": {"": 1}},
         'stream_options."" is not a field of this request', 'stream_options.""'),
        ({"model": "m", "prompt": "x", "logit_bias": {"50": "much"}},
         "logit_bias.50: Input should be a valid number", "logit_bias.50"),
        ({"model": "m", "prompt": "x", "stream": "perhaps"},
         "stream: Input should be a valid boolean", "stream"),
        ({"model": "m", "prompt": []}, "prompt: must be a string, token ids, or a list of either, and not empty", "prompt"),
        ([1], "the body must be a JSON object, sent with Content-Type: application/json", None),
    ],
)  # fmt: skip
def test_an_error_names_the_field(body: Any, message: str, param: str | None) -> None:
    """One line, with the path of the field as a person would write it, and that path by itself.

    Why: "Input should be a valid string" sends a user through all of their fields.
    """
    check_equal(problem(CompletionRequest, body), (message, param), "message and field")


def test_an_error_in_a_list_has_its_place() -> None:
    """messages[1].content[0].type: numbers in brackets, names behind dots.

    Why: a conversation has hundreds of messages.
    """
    parts = [{"type": "image_url", "text": "x"}]
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", "content": parts}]}
    check_equal(problem(ChatCompletionRequest, body)[1], "messages[1].content[0].type", "field")


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({}, "messages[1].content is required", "messages[1].content"),
        ({"content": "x", "audio": {"id": "y"}}, "messages[1].audio is not supported by this server", "messages[1].audio"),
        ({"content": "x", "nonsense": 1}, "messages[1].nonsense is not a field of this request", "messages[1].nonsense"),
    ],
)
def test_a_message_is_named_with_its_place(fields: dict[str, Any], message: str, param: str) -> None:
    """What is missing in the second message, not supported there, or unknown: the whole path, and by its last part whether
    this server knows it.

    Why: "content is required" sends a user through all of the conversation.
    """
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}, {"role": "user", **fields}]}
    check_equal(problem(ChatCompletionRequest, body), (message, param), "message and field")


def test_an_error_of_the_whole_body_names_no_field() -> None:
    """Two fields that are wrong together say so; a request without a body, or with another type, is told what a body is.

    Why: a client that sends no body at all must not read " is required".
    """
    check_equal(problem(TokenizeRequest, {"model": "m"}), ("give either prompt or messages", None), "fields that contradict")
    for kind in ("missing", "model_attributes_type"):
        error = {"type": kind, "loc": ("body",), "msg": "Field required"}
        expected = ("the body must be a JSON object, sent with Content-Type: application/json", None)
        check_equal(describe_validation_error(error), expected, f"an error of type {kind}")


def test_broken_json_is_told_with_its_place() -> None:
    """FastAPI reports it with the place in the text instead of a field.

    Why: a missing bracket is no fault of any field.
    """
    error = {"type": "json_invalid", "loc": ("body", 17), "msg": "JSON", "ctx": {"error": "Expecting value"}}
    check_equal(
        describe_validation_error(error), ("the body is not valid JSON: Expecting value at character 17", None), "error"
    )


@pytest.mark.parametrize("make", [completion, chat])
@pytest.mark.parametrize("number", range(3))
def test_any_fields_go_across(make: Callable[..., Any], number: int) -> None:
    """Random values of a random choice of fields arrive as they are.

    Why: a client may set any of them, to anything that is allowed.
    """
    dice = random.Random(510 + number)
    for _ in range(10):
        every = {
            "temperature": dice.randrange(200) / 100, "top_p": dice.randrange(1, 100) / 100, "top_k": dice.randrange(1, 90),
            "n": dice.randrange(1, 5), "seed": dice.randrange(10**6), "max_tokens": dice.randrange(1, 500),
            "stop": [chr(dice.randrange(97, 123)) * dice.randrange(1, 5) for _ in range(2)],
            "presence_penalty": dice.randrange(-200, 200) / 100, "ignore_eos": dice.random() < 0.5,
        }  # fmt: skip
        sent = {name: every[name] for name in dice.sample(list(every), dice.randrange(1, 9))}
        bias = {dice.randrange(10**4): dice.randrange(-100, 100) / 2 for _ in range(3)}
        got = make(**sent, logit_bias={str(token): value for token, value in bias.items()}).sampling_fields()
        check_equal({name: got.get(name) for name in sent}, sent, "fields that were sent")
        check_equal(got["logit_bias"], bias, "logit_bias")
