"""Haystack's generators for both of OpenAI's APIs, and its agent."""

import shared
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import Tool
from haystack.utils import Secret
from openai import BadRequestError

server = {"model": shared.MODEL, "api_base_url": shared.URL, "api_key": Secret.from_token("unused"), "max_retries": 0}
settings = {"temperature": 0, "max_tokens": shared.LIMIT}
calling = {"temperature": 0, "max_tokens": 80, "tool_choice": "required", "parallel_tool_calls": False}
question, asked = [ChatMessage.from_user(shared.QUESTION)], [ChatMessage.from_user(shared.ASKED)]
weather = Tool("get_weather", "The weather of a city.", shared.CITY, shared.get_weather)


def said(generator, messages: list, pieces: list | None = None) -> ChatMessage:
    """The reply; the pieces of the stream, if there is one, go into the list."""
    (reply,) = generator.run(messages, streaming_callback=None if pieces is None else pieces.append)["replies"]
    return reply


@shared.feature("chat")
def chat() -> None:
    shared.same(said(OpenAIChatGenerator(**server, generation_kwargs=settings), question).text)


@shared.feature("stream")
def stream() -> None:
    pieces: list = []
    shared.same(said(OpenAIChatGenerator(**server, generation_kwargs=settings), question, pieces).text)
    shared.same(shared.in_pieces([piece.content for piece in pieces]))


@shared.feature("usage")
def usage() -> None:
    used = said(OpenAIChatGenerator(**server, generation_kwargs=settings), question).meta["usage"]
    shared.counted(used["prompt_tokens"], used["completion_tokens"])


@shared.feature("tools")
def tools() -> None:
    (called,) = said(OpenAIChatGenerator(**server, generation_kwargs=calling, tools=[weather]), asked).tool_calls
    shared.a_call(called.tool_name, called.arguments)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    pieces: list = []
    (called,) = said(OpenAIChatGenerator(**server, generation_kwargs=calling, tools=[weather]), asked, pieces).tool_calls
    shared.a_call(called.tool_name, called.arguments)
    shared.a_city(shared.in_pieces([part.arguments or "" for piece in pieces for part in piece.tool_calls or ()]))


@shared.feature("tool loop")
def tool_loop() -> None:
    generator = OpenAIChatGenerator(**server, generation_kwargs=calling)
    agent = Agent(chat_generator=generator, tools=[weather], exit_conditions=["get_weather"])
    turns = agent.run(asked)["messages"]
    answering = OpenAIChatGenerator(**server, generation_kwargs={**calling, "tool_choice": "none"}, tools=[weather])
    shared.looped(said(answering, turns).text)


@shared.feature("JSON schema")
def json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": shared.CITY, "strict": True}}
    fields = {"temperature": 0, "max_tokens": 80, "response_format": form}
    shared.a_city(said(OpenAIChatGenerator(**server, generation_kwargs=fields), asked).text)


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    fields = {**settings, "logprobs": True, "top_logprobs": 2}
    scores = said(OpenAIChatGenerator(**server, generation_kwargs=fields), question).meta["logprobs"]["content"]
    shared.same("".join(score["token"] for score in scores))


@shared.feature("responses")
def responses() -> None:
    fields = {"temperature": 0, "max_output_tokens": shared.LIMIT}
    shared.same(said(OpenAIResponsesChatGenerator(**server, generation_kwargs=fields), question).text)


@shared.feature("overflow error")
def overflow() -> None:
    generator = OpenAIChatGenerator(**server, generation_kwargs=settings)
    error = shared.raised(BadRequestError, lambda: said(generator, [ChatMessage.from_user(shared.TOO_LONG)]))
    assert error.code == "context_length_exceeded", error.code


shared.run()
