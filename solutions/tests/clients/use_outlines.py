"""Outlines: its models for OpenAI's API and for vLLM's server."""

import re

import outlines
import shared
from openai import OpenAI
from outlines.types import CFG, Regex
from pydantic import BaseModel, ConfigDict, Field

client = OpenAI(base_url=shared.URL, api_key="unused", max_retries=0)
model, vllm = outlines.from_openai(client, shared.MODEL), outlines.from_vllm(client, shared.MODEL)
settings = {"temperature": 0, "max_tokens": shared.LIMIT}
longer = {"temperature": 0, "max_tokens": 80}


class City(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(model(shared.QUESTION, **settings))


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces(list(vllm.stream(shared.QUESTION, **settings))))


@shared.feature("JSON schema")
def json_schema() -> None:
    for each in (model, vllm):
        shared.a_city(each(shared.ASKED, City, **longer))


@shared.feature("regex and grammar")
def regex_and_grammar() -> None:
    date = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    assert re.fullmatch(date, vllm("When was that?", Regex(date), **longer))
    assert vllm("Yes or no?", CFG('root ::= "yes" | "no"'), **longer) in ("yes", "no")


shared.run()
