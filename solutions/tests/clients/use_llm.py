"""llm, the command-line tool, as a library: its chat, completions and Responses models."""

import shared
from llm.default_plugins.openai_models import Chat, Completion, Responses
from openai import BadRequestError

server = {"model_id": "it", "model_name": shared.MODEL, "api_base": shared.URL, "key": "unused"}
abilities = {"supports_schema": True, "supports_tools": True}
model = Chat(**server, **abilities)
settings = {"temperature": 0, "max_tokens": shared.LIMIT}


@shared.feature("chat")
def chat() -> None:
    shared.same(model.prompt(shared.QUESTION, stream=False, **settings).text())


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces(list(model.prompt(shared.QUESTION, **settings))))


@shared.feature("usage")
def usage() -> None:
    used = model.prompt(shared.QUESTION, **settings).usage()
    shared.counted(used.input, used.output)


@shared.feature("completions")
def completions() -> None:
    shared.goes_on(Completion(**server).prompt(shared.BEGINNING, **settings).text())


@shared.feature("JSON schema")
def json_schema() -> None:
    shared.a_city(model.prompt(shared.ASKED, schema=shared.CITY, temperature=0, max_tokens=80).text())


@shared.feature("responses")
def responses() -> None:
    shared.same(Responses(**server, **abilities).prompt(shared.QUESTION, **settings).text())


@shared.feature("overflow error")
def overflow() -> None:
    error = shared.raised(BadRequestError, lambda: model.prompt(shared.TOO_LONG, **settings).text())
    assert error.code == "context_length_exceeded", error.code


shared.run()
