"""OpenAI's Agents SDK: the chat completions model, and the Responses model, which is its default."""

from asyncio import new_event_loop, set_event_loop

import agents
import shared
from agents import Agent, ModelSettings, Runner
from openai import AsyncOpenAI, BadRequestError
from pydantic import BaseModel, ConfigDict, Field

agents.set_tracing_disabled(True)
loop = new_event_loop()  # one for all, as the client keeps its connections
set_event_loop(loop)
client = AsyncOpenAI(base_url=shared.URL, api_key="unused", max_retries=0)
chat_model = agents.OpenAIChatCompletionsModel(shared.MODEL, client)
responses_model = agents.OpenAIResponsesModel(shared.MODEL, client)
short = ModelSettings(temperature=0, max_tokens=shared.LIMIT, include_usage=True)
calling = ModelSettings(temperature=0, max_tokens=80, tool_choice="required", parallel_tool_calls=False)
plain = Agent("plain", model=chat_model, model_settings=short)


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)


def caller(model) -> Agent:
    """An agent that has one tool until it has called it."""
    called = []

    @agents.function_tool(is_enabled=lambda *_: not called)
    def weather_of(city: str) -> str:
        """The weather of a city."""
        called.append(city)
        return shared.get_weather(city)

    weather_of.name = "get_weather"
    return Agent("caller", model=model, model_settings=calling, tools=[weather_of])


def streamed(agent: Agent, question: str, kind: str) -> str:
    """What the events of this kind come to."""

    async def read() -> list:
        return [event async for event in Runner.run_streamed(agent, question).stream_events()]

    raw = [event.data for event in loop.run_until_complete(read()) if event.type == "raw_response_event"]
    return shared.in_pieces([event.delta for event in raw if event.type == kind])


@shared.feature("chat")
def chat() -> None:
    shared.same(Runner.run_sync(plain, shared.QUESTION).final_output)


@shared.feature("stream")
def stream() -> None:
    shared.same(streamed(plain, shared.QUESTION, "response.output_text.delta"))


@shared.feature("usage")
def usage() -> None:
    used = Runner.run_sync(plain, shared.QUESTION).context_wrapper.usage
    shared.counted(used.input_tokens, used.output_tokens)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    arguments = streamed(caller(chat_model), shared.ASKED, "response.function_call_arguments.delta")
    shared.a_call("get_weather", arguments)


@shared.feature("tool loop")
def tool_loop() -> None:
    for model in (chat_model, responses_model):
        shared.looped(Runner.run_sync(caller(model), shared.ASKED).final_output)


@shared.feature("JSON schema")
def json_schema() -> None:
    for model in (chat_model, responses_model):
        agent = Agent("former", model=model, model_settings=ModelSettings(temperature=0, max_tokens=80), output_type=City)
        shared.a_city(Runner.run_sync(agent, shared.ASKED).final_output.model_dump())


@shared.feature("responses")
def responses() -> None:
    agent = Agent("responder", model=responses_model, model_settings=short)
    shared.same(Runner.run_sync(agent, shared.QUESTION).final_output)
    shared.same(streamed(agent, shared.QUESTION, "response.output_text.delta"))


@shared.feature("overflow error")
def overflow() -> None:
    error = shared.raised(BadRequestError, lambda: Runner.run_sync(plain, shared.TOO_LONG))
    assert error.code == "context_length_exceeded", error.code


shared.run()
