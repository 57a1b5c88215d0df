"""AutoGen's client for OpenAI's API, and its assistant."""

import asyncio

import shared
from autogen_agentchat.agents import AssistantAgent
from autogen_core.models import UserMessage
from autogen_core.tools import FunctionTool
from autogen_ext.models.openai import OpenAIChatCompletionClient
from openai import BadRequestError
from pydantic import BaseModel, ConfigDict, Field

abilities = {
    "vision": False, "function_calling": True, "json_output": True, "structured_output": True, "family": "unknown",
}  # fmt: skip
server = {"model": shared.MODEL, "base_url": shared.URL, "api_key": "unused", "max_retries": 0, "model_info": abilities}
model = OpenAIChatCompletionClient(**server, temperature=0, max_tokens=shared.LIMIT)
longer = OpenAIChatCompletionClient(**server, temperature=0, max_tokens=80, parallel_tool_calls=False)
question = [UserMessage(content=shared.QUESTION, source="user")]
asked = [UserMessage(content=shared.ASKED, source="user")]
weather = FunctionTool(shared.get_weather, description="The weather of a city.")
wait = asyncio.new_event_loop().run_until_complete


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)


async def pieces(stream) -> list:
    return [piece async for piece in stream]


@shared.feature("chat")
def chat() -> None:
    shared.same(wait(model.create(question)).content)


@shared.feature("stream")
def stream() -> None:
    *texts, last = wait(pieces(model.create_stream(question)))
    shared.same(shared.in_pieces(texts))
    shared.same(last.content)


@shared.feature("usage")
def usage() -> None:
    used = wait(model.create(question)).usage
    shared.counted(used.prompt_tokens, used.completion_tokens)


@shared.feature("tools")
def tools() -> None:
    (called,) = wait(longer.create(asked, tools=[weather], tool_choice="required")).content
    assert called.name == "get_weather"


@shared.feature("streamed tools")
def streamed_tools() -> None:
    *_, last = wait(pieces(longer.create_stream(asked, tools=[weather], tool_choice="required")))
    assert [called.name for called in last.content] == ["get_weather"]


@shared.feature("tool loop")
def tool_loop() -> None:
    class Forced(OpenAIChatCompletionClient):
        """The assistant itself cannot demand a call."""

        async def create(self, messages, *, tools=(), tool_choice="auto", **rest):
            return await super().create(messages, tools=tools, tool_choice="required" if tools else tool_choice, **rest)

    forced = Forced(**server, temperature=0, max_tokens=80, parallel_tool_calls=False)
    agent = AssistantAgent("weatherman", model_client=forced, tools=[weather], reflect_on_tool_use=True)
    shared.looped(wait(agent.run(task=shared.ASKED)).messages[-1].content)


@shared.feature("JSON schema")
def json_schema() -> None:
    plain = OpenAIChatCompletionClient(**server, temperature=0, max_tokens=80)
    shared.a_city(wait(plain.create(asked, json_output=City)).content)


@shared.feature("overflow error")
def overflow() -> None:
    turns = [UserMessage(content=shared.TOO_LONG, source="user")]
    error = shared.raised(BadRequestError, lambda: wait(model.create(turns)))
    assert error.code == "context_length_exceeded", error.code


shared.run()
