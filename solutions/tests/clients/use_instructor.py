"""Instructor, in its modes TOOLS and JSON_SCHEMA."""

import instructor
import shared
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, Field

client = OpenAI(base_url=shared.URL, api_key="unused", max_retries=0)
tools_client = instructor.from_openai(client, mode=instructor.Mode.TOOLS)
forms_client = instructor.from_openai(client, mode=instructor.Mode.JSON_SCHEMA)
settings = {"model": shared.MODEL, "temperature": 0, "max_retries": 0}
ask = {**settings, "messages": [{"role": "user", "content": shared.ASKED}], "max_tokens": 80}


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    fields = {**settings, "messages": shared.MESSAGES, "max_tokens": shared.LIMIT}
    shared.same(tools_client.chat.completions.create(**fields, response_model=None).choices[0].message.content)


@shared.feature("usage")
def usage() -> None:
    answer, completion = tools_client.chat.completions.create_with_completion(**ask, response_model=City)
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens > 80
    shared.a_city(answer.model_dump())


@shared.feature("tools")
def tools() -> None:
    shared.a_city(tools_client.chat.completions.create(**ask, response_model=City).model_dump())


@shared.feature("streamed tools")
def streamed_tools() -> None:
    pieces = list(tools_client.chat.completions.create_partial(**ask, response_model=City))
    assert len(pieces) > 1
    shared.a_city(pieces[-1].model_dump())


@shared.feature("JSON schema")
def json_schema() -> None:
    shared.a_city(forms_client.chat.completions.create(**ask, response_model=City).model_dump())


@shared.feature("overflow error")
def overflow() -> None:
    turns = [{"role": "user", "content": shared.TOO_LONG}]
    fields = {**ask, "messages": turns, "response_model": None}
    error = shared.raised(BadRequestError, lambda: tools_client.chat.completions.create(**fields))
    assert error.code == "context_length_exceeded", error.code


shared.run()
