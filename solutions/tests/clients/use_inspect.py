"""Inspect's provider for OpenAI-compatible servers, and a whole evaluation."""

import os

import shared

os.environ |= {"SERVER_API_KEY": "unused", "SERVER_BASE_URL": shared.URL, "INSPECT_LOG_DIR": "logs"}
import asyncio

from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.model import ChatMessageTool, ChatMessageUser, GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.tool import ToolFunction, tool
from inspect_ai.util import json_schema as schema_of
from pydantic import BaseModel

settings = GenerateConfig(temperature=0, max_tokens=shared.LIMIT, max_retries=0)
longer = GenerateConfig(temperature=0, max_tokens=80, max_retries=0, parallel_tool_calls=False)
model = get_model(f"openai-api/server/{shared.MODEL}", config=settings)


class City(BaseModel):
    city: str


@tool
def get_weather():
    async def execute(city: str) -> str:
        """The weather of a city.

        Args:
            city: Name of the city
        """
        return shared.get_weather(city)

    return execute


def ask(*arguments, **rest):
    return asyncio.run(model.generate(*arguments, **rest))


@shared.feature("chat")
def chat() -> None:
    (log,) = eval(Task(dataset=[Sample(shared.QUESTION, target="Paris")], scorer=includes()), model=model, display="none")
    assert log.status == "success", log.error
    assert log.results.scores[0].metrics["accuracy"].value == 1
    shared.same(log.samples[0].output.completion)


@shared.feature("usage")
def usage() -> None:
    used = ask(shared.QUESTION).usage
    shared.counted(used.input_tokens + (used.input_tokens_cache_read or 0), used.output_tokens)


@shared.feature("tools")
def tools() -> None:
    answer = ask(shared.ASKED, tools=[get_weather()], tool_choice="any", config=longer)
    (called,) = answer.message.tool_calls
    assert called.function == "get_weather"


@shared.feature("tool loop")
def tool_loop() -> None:
    asked = ChatMessageUser(content=shared.ASKED)
    named = ToolFunction(name="get_weather")
    message = ask([asked], tools=[get_weather()], tool_choice=named, config=longer).message
    (called,) = message.tool_calls
    result = ChatMessageTool(content=shared.get_weather(**called.arguments), tool_call_id=called.id, function=called.function)
    shared.looped(ask([asked, message, result], tools=[get_weather()], tool_choice="none", config=longer).completion)


@shared.feature("JSON schema")
def json_schema() -> None:
    form = ResponseSchema(name="city", json_schema=schema_of(City), strict=True)
    answer = ask(shared.ASKED, config=longer.merge(GenerateConfig(response_schema=form)))
    City.model_validate_json(answer.completion)


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    scores = ask(shared.QUESTION, config=GenerateConfig(logprobs=True, top_logprobs=2)).choices[0].logprobs.content
    shared.same("".join(score.token for score in scores))


@shared.feature("overflow error")
def overflow() -> None:
    assert ask(shared.TOO_LONG).stop_reason == "model_length"


shared.run()
