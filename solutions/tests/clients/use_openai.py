"""openai for Python."""

import json

import shared
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=shared.URL, api_key="unused", max_retries=0)
ask = {"model": shared.MODEL, "messages": shared.MESSAGES, "temperature": 0, "max_tokens": shared.LIMIT}
asked = [{"role": "user", "content": shared.ASKED}]
held = {"tools": [shared.TOOL], "tool_choice": shared.CALLS, "parallel_tool_calls": False}
call = {**ask, "messages": asked, **held, "max_tokens": 80}


class City(BaseModel):
    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(client.chat.completions.create(**ask).choices[0].message.content)


@shared.feature("stream")
def stream() -> None:
    chunks = client.chat.completions.create(**ask, stream=True)
    shared.same(shared.in_pieces([chunk.choices[0].delta.content or "" for chunk in chunks]))


@shared.feature("usage")
def usage() -> None:
    *_, last = client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    shared.counted(last.usage.prompt_tokens, last.usage.completion_tokens)


@shared.feature("completions")
def completions() -> None:
    fields = {"model": shared.MODEL, "prompt": shared.BEGINNING, "temperature": 0, "max_tokens": shared.LIMIT}
    shared.goes_on(client.completions.create(**fields).choices[0].text)
    shared.goes_on(shared.in_pieces([chunk.choices[0].text for chunk in client.completions.create(**fields, stream=True)]))


@shared.feature("tools")
def tools() -> None:
    (called,) = client.chat.completions.create(**call).choices[0].message.tool_calls
    shared.a_call(called.function.name, called.function.arguments)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    with client.chat.completions.stream(**call) as events:
        shared.in_pieces([event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"])
        (called,) = events.get_final_completion().choices[0].message.tool_calls
    shared.a_call(called.function.name, called.function.arguments)


@shared.feature("tool loop")
def tool_loop() -> None:
    message = client.chat.completions.create(**call).choices[0].message
    result = shared.get_weather(**json.loads(message.tool_calls[0].function.arguments))
    turns = [*asked, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result}]
    answer = client.chat.completions.create(**{**call, "messages": turns, "tool_choice": "none"})
    shared.looped(answer.choices[0].message.content)


@shared.feature("JSON schema")
def json_schema() -> None:
    answer = client.chat.completions.parse(**{**ask, "max_tokens": 80}, response_format=City)
    shared.a_city(answer.choices[0].message.parsed.model_dump())


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    scores = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    shared.same("".join(score.token for score in scores))
    assert all(score.logprob == score.top_logprobs[0].logprob for score in scores)


@shared.feature("responses")
def responses() -> None:
    fields = {"model": shared.MODEL, "input": shared.QUESTION, "temperature": 0, "max_output_tokens": shared.LIMIT}
    shared.same(client.responses.create(**fields).output_text)
    with client.responses.stream(**fields) as events:
        shared.same(shared.in_pieces([event.delta for event in events if event.type == "response.output_text.delta"]))


@shared.feature("embeddings")
def embeddings() -> None:
    shared.embedded(client.embeddings.create(model=shared.MODEL, input=["x", shared.QUESTION]).data[1].embedding)


@shared.feature("overflow error")
def overflow() -> None:
    turns = [{"role": "user", "content": shared.TOO_LONG}]
    error = shared.raised(BadRequestError, lambda: client.chat.completions.create(**{**ask, "messages": turns}))
    assert error.code == "context_length_exceeded", error.code


shared.run()
