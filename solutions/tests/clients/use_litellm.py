"""LiteLLM, as a library."""

import json
import os

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # fetches a list of models otherwise
import litellm
import shared
from pydantic import BaseModel, Field

litellm.suppress_debug_info = True
server = {"api_base": shared.URL, "api_key": "unused", "temperature": 0, "num_retries": 0}
chats = {**server, "model": f"hosted_vllm/{shared.MODEL}"}
ask = {**chats, "messages": shared.MESSAGES, "max_tokens": shared.LIMIT}
asked = [{"role": "user", "content": shared.ASKED}]
held = {"tools": [shared.TOOL], "tool_choice": shared.CALLS, "parallel_tool_calls": False}
call = {**chats, "messages": asked, **held, "max_tokens": 80}


class City(BaseModel):
    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(litellm.completion(**ask).choices[0].message.content)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces([chunk.choices[0].delta.content or "" for chunk in litellm.completion(**ask, stream=True)]))


@shared.feature("usage")
def usage() -> None:
    *_, last = litellm.completion(**ask, stream=True, stream_options={"include_usage": True})
    shared.counted(last.usage.prompt_tokens, last.usage.completion_tokens)


@shared.feature("completions")
def completions() -> None:
    fields = {**server, "model": f"text-completion-openai/{shared.MODEL}", "prompt": shared.BEGINNING}
    shared.goes_on(litellm.text_completion(**fields, max_tokens=shared.LIMIT).choices[0].text)


@shared.feature("tools")
def tools() -> None:
    (called,) = litellm.completion(**call).choices[0].message.tool_calls
    shared.a_call(called.function.name, called.function.arguments)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    chunks = list(litellm.completion(**call, stream=True))
    shared.in_pieces([part.function.arguments for chunk in chunks for part in chunk.choices[0].delta.tool_calls or ()])
    (called,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    shared.a_call(called.function.name, called.function.arguments)


@shared.feature("tool loop")
def tool_loop() -> None:
    message = litellm.completion(**call).choices[0].message
    result = shared.get_weather(**json.loads(message.tool_calls[0].function.arguments))
    turns = [*asked, message, {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": result}]
    shared.looped(litellm.completion(**{**call, "messages": turns, "tool_choice": "none"}).choices[0].message.content)


@shared.feature("JSON schema")
def json_schema() -> None:
    shared.a_city(litellm.completion(**{**ask, "max_tokens": 80}, response_format=City).choices[0].message.content)


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    scores = litellm.completion(**ask, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    shared.same("".join(score.token for score in scores))


@shared.feature("responses")
def responses() -> None:
    fields = {**server, "model": f"openai/{shared.MODEL}", "input": shared.QUESTION}
    shared.same(litellm.responses(**fields, max_output_tokens=shared.LIMIT).output[0].content[0].text)


@shared.feature("overflow error")
def overflow() -> None:
    turns = [{"role": "user", "content": shared.TOO_LONG}]
    shared.raised(litellm.ContextWindowExceededError, lambda: litellm.completion(**{**ask, "messages": turns}))


shared.run()
