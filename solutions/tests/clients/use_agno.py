"""Agno's agent, with its models for servers like OpenAI's."""

import shared
from agno.agent import Agent
from agno.exceptions import ContextWindowExceededError
from agno.models.message import Message
from agno.models.openai import OpenAIResponses
from agno.models.openai.like import OpenAILike
from agno.tools import tool
from pydantic import BaseModel, ConfigDict, Field

server = {"id": shared.MODEL, "base_url": shared.URL, "api_key": "unused", "max_retries": 0, "temperature": 0}
plain = Agent(model=OpenAILike(**server, max_tokens=shared.LIMIT), telemetry=False)
longer = OpenAILike(**server, max_tokens=80)


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(plain.run(shared.QUESTION).content)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces([event.content or "" for event in plain.run(shared.QUESTION, stream=True)]))


@shared.feature("usage")
def usage() -> None:
    used = plain.run(shared.QUESTION).metrics
    shared.counted(used.input_tokens, used.output_tokens)


@shared.feature("tools")
def tools() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    last = tool(stop_after_tool_call=True)(shared.get_weather)  # the agent would have to call again after each result
    (called,) = Agent(model=longer, tools=[last], tool_choice=named, telemetry=False).run(shared.ASKED).tools
    shared.a_call(called.tool_name, called.tool_args)


@shared.feature("JSON schema")
def json_schema() -> None:
    agent = Agent(model=longer, output_schema=City, telemetry=False)
    shared.a_city(agent.run(shared.ASKED).content.model_dump())


@shared.feature("responses")
def responses() -> None:
    agent = Agent(model=OpenAIResponses(**server, max_output_tokens=shared.LIMIT), telemetry=False)
    shared.same(agent.run(shared.QUESTION).content)


@shared.feature("overflow error")
def overflow() -> None:
    asked = [Message(role="user", content=shared.TOO_LONG)]
    answer = Message(role="assistant")
    shared.raised(ContextWindowExceededError, lambda: longer.invoke(asked, answer))


shared.run()
