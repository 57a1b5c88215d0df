"""vLLM's fields beside OpenAI's: token ids, log-probabilities of prompts, prompts cut to a length. The expected ids are the
tokenizer's."""

from __future__ import annotations

from itertools import chain
from typing import Any

import httpx
import openai
import pytest

from solutions.tests.fake_engine import ByteTokenizer, FakeEngine
from solutions.tests.fake_server import body, serve
from solutions.tests.real_server import CHAT, GREEDY
from solutions.tests.slow_cases import slow_after

TEXT = "The sun 😀 rises over the sea, and"
ASKED = {**GREEDY, "max_tokens": 6}


def test_completions_carry_token_ids(client: openai.OpenAI, tokenizer: Any) -> None:
    prompts = [TEXT, "Hello"]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    asked = {**ASKED, "prompt": prompts, "n": 2, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**asked)
    for choice in whole.choices:
        assert choice.prompt_token_ids == ids[choice.index // 2]
        assert (len(choice.token_ids), tokenizer.decode(choice.token_ids)) == (6, choice.text)
    streamed: dict[int, list[int]] = {}
    told: list[tuple[int, list[int]]] = []
    for chunk in client.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        streamed[choice.index] = streamed.get(choice.index, []) + choice.token_ids
        if hasattr(choice, "prompt_token_ids"):
            told.append((choice.index, choice.prompt_token_ids))
    assert streamed == {choice.index: choice.token_ids for choice in whole.choices}
    assert sorted(told) == [(index, ids[index // 2]) for index in range(4)]
    plain = client.completions.create(**ASKED, prompt=TEXT)
    assert not hasattr(plain.choices[0], "token_ids")


def test_an_echo_has_the_ids_of_the_answer_alone(client: openai.OpenAI, tokenizer: Any) -> None:
    for logprobs in (None, 0):
        asked = {**ASKED, "prompt": TEXT, "logprobs": logprobs, "echo": True, "extra_body": {"return_token_ids": True}}
        choice = client.completions.create(**asked).choices[0]
        assert TEXT + tokenizer.decode(choice.token_ids) == choice.text
        assert len(choice.token_ids) == 6


def test_chats_carry_token_ids(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    asked = {**ASKED, "messages": CHAT, "n": 2, "extra_body": {"return_token_ids": True}}
    whole = client.chat.completions.create(**asked)
    assert whole.prompt_token_ids == ids
    for choice in whole.choices:
        assert tokenizer.decode(choice.token_ids) == choice.message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert [getattr(chunk, "prompt_token_ids", None) for chunk in chunks] == [ids] + [None] * (len(chunks) - 1)
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index and choice.delta.content]
        assert list(chain(*(choice.token_ids for choice in mine))) == whole.choices[index].token_ids


def test_ids_of_text_that_is_held_back_are_not_lost(client: openai.OpenAI, tokenizer: Any) -> None:
    """A character of several tokens makes one event, whose ids are all of them."""
    (emoji, *_), ids = tokenizer.encode("😀"), tokenizer.encode("😀")
    assert len(ids) > 1
    bias = {str(token): 100 for token in ids}
    asked = {**ASKED, "prompt": "Smile:", "logit_bias": bias, "extra_body": {"return_token_ids": True}}
    whole = client.completions.create(**asked).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    assert len(chunks) < 6
    assert list(chain(*(chunk.token_ids for chunk in chunks))) == whole.token_ids
    assert emoji in whole.token_ids


def test_tokens_may_be_called_by_their_ids(client: openai.OpenAI) -> None:
    more = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    choice = client.completions.create(**ASKED, prompt=TEXT, logprobs=2, extra_body=more).choices[0]
    names = [f"token_id:{token}" for token in choice.token_ids]
    assert choice.logprobs.tokens == names
    for name, top in zip(names, choice.logprobs.top_logprobs, strict=True):
        assert name in top
        assert all(each.startswith("token_id:") for each in top)
    echoed = client.completions.create(**ASKED, prompt=TEXT, logprobs=0, echo=True, extra_body=more).choices[0]
    assert echoed.logprobs.tokens == [f"token_id:{token}" for token in echoed.prompt_token_ids] + names
    chat = client.chat.completions.create(**ASKED, messages=CHAT, logprobs=True, top_logprobs=1, extra_body=more).choices[0]
    assert [each.token for each in chat.logprobs.content] == [f"token_id:{token}" for token in chat.token_ids]
    assert [each.top_logprobs[0].token for each in chat.logprobs.content] == [f"token_id:{token}" for token in chat.token_ids]


def test_the_prompt_s_log_probabilities_are_those_of_an_echo(client: openai.OpenAI, tokenizer: Any) -> None:
    ids = tokenizer.encode(TEXT)
    echoed = client.completions.create(**ASKED, prompt=TEXT, logprobs=2, echo=True).choices[0].logprobs
    for n in (1, 2):
        for choice in client.completions.create(**ASKED, prompt=TEXT, n=n, extra_body={"prompt_logprobs": 2}).choices:
            first, *others = choice.prompt_logprobs
            assert first is None
            assert [place[str(token)]["logprob"] for token, place in zip(ids[1:], others, strict=True)] == pytest.approx(
                echoed.token_logprobs[1 : len(ids)], abs=1e-3
            )
            assert {entry["rank"] for place in others for entry in place.values()} >= {1, 2}
            assert all(place[str(token)]["decoded_token"] is not None for token, place in zip(ids[1:], others, strict=True))
    chat = client.chat.completions.create(**ASKED, messages=CHAT, extra_body={"prompt_logprobs": 0})
    assert len(chat.prompt_logprobs) == chat.usage.prompt_tokens
    assert not hasattr(client.chat.completions.create(**ASKED, messages=CHAT), "prompt_logprobs")


def test_an_echo_may_be_all(client: openai.OpenAI, tokenizer: Any) -> None:
    """`max_tokens` 0: the prompt and its log-probabilities, plain and streamed; without `echo` there would be nothing."""
    asked: dict[str, Any] = ASKED | {"prompt": [TEXT, "The sea"], "max_tokens": 0, "echo": True}
    more = client.completions.create(**asked | {"max_tokens": 1}, logprobs=1)
    answer = client.completions.create(**asked, logprobs=1, n=1)
    assert [choice.text for choice in answer.choices] == asked["prompt"]
    for choice, longer in zip(answer.choices, more.choices, strict=True):
        assert choice.finish_reason == "length"
        assert choice.logprobs.tokens == longer.logprobs.tokens[:-1]
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(longer.logprobs.token_logprobs[1:-1], abs=1e-3)
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (0, more.usage.prompt_tokens)
    texts = ["", ""]
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == asked["prompt"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        client.completions.create(**asked | {"echo": False})


@pytest.mark.parametrize(("side", "most"), slow_after(2, [("left", 3), ("right", 3), (None, 3), ("left", -1)]))
def test_a_prompt_is_cut_to_a_length(client: openai.OpenAI, side: str | None, most: int) -> None:
    ids = list(range(1000, 1600))  # more than fit
    more = {"truncate_prompt_tokens": most, "truncation_side": side, "return_token_ids": True}
    answer = client.completions.create(**ASKED, prompt=ids, extra_body=more)
    kept = most if most > 0 else 512 - 6
    assert answer.choices[0].prompt_token_ids == (ids[:kept] if side == "right" else ids[-kept:])
    assert answer.usage.prompt_tokens == kept
    short = client.completions.create(**ASKED, prompt=[7, 8], extra_body=more)
    assert short.choices[0].prompt_token_ids == [7, 8]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 600, "prompt": [7] * 700}, "prompt"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"truncate_prompt_tokens": 3, "echo": True}, "echo"),
        ({"prompt_logprobs": 1, "echo": True}, "echo"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_had_is_named(url: str, fields: dict[str, Any], param: str) -> None:
    response = httpx.post(f"{url}/completions", json={**ASKED, "prompt": "x", **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


class Starting(ByteTokenizer):
    """Puts a token before a text, as LLaMA's tokenizer does."""

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return [1] * add_special_tokens + super().encode(text)


def test_a_text_may_go_without_the_tokens_that_the_tokenizer_puts_around_it() -> None:
    engine = FakeEngine()
    engine.tokenizer = engine.input.tokenizer = Starting()
    with serve(engine) as url, httpx.Client(base_url=f"{url}/v1", timeout=30) as http:

        def ids(prompt: Any, **fields: Any) -> list[list[int]]:
            answer = http.post("/completions", json=body(prompt=prompt, return_token_ids=True, **fields))
            assert "x-ignored-fields" not in answer.headers
            return [choice["prompt_token_ids"] for choice in answer.json()["choices"]]

        for value in (None, True):
            assert ids(["hi", "é"], add_special_tokens=value) == [[1, 104, 105], [1, 0xC3, 0xA9]]
        assert ids(["hi", "é"], add_special_tokens=False) == [[104, 105], [0xC3, 0xA9]]
        assert ids([[5, 6]], add_special_tokens=False) == [[5, 6]]
        message = {"messages": [{"role": "user", "content": "x"}]}
        for path, fields, status, param in (
            ("completions", body(prompt="", add_special_tokens=False), 400, "prompt"),
            ("completions", body(add_special_tokens="no"), 400, "add_special_tokens"),
            ("chat/completions", {"model": "fake", "max_tokens": 1, "add_special_tokens": False, **message}, 200, None),
            ("chat/completions", {"model": "fake", "add_special_tokens": True, **message}, 400, "add_special_tokens"),
            ("embeddings", {"model": "fake", "input": "x", "add_special_tokens": True}, 200, None),
            ("embeddings", {"model": "fake", "input": "x", "add_special_tokens": False}, 400, "add_special_tokens"),
        ):
            answer = http.post(f"/{path}", json=fields)
            assert answer.status_code == status, answer.text
            assert answer.json().get("error", {}).get("param") == param
