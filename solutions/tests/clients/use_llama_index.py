"""LlamaIndex's OpenAILike and OpenAILikeResponses, and an agent of its workflows."""

import asyncio

import shared
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike, OpenAILikeResponses
from openai import BadRequestError
from pydantic import BaseModel, Field

server = {"model": shared.MODEL, "api_base": shared.URL, "api_key": "unused", "temperature": 0, "max_retries": 0}
kind = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096}
model = OpenAILike(**server, **kind, max_tokens=shared.LIMIT)
longer = OpenAILike(**server, **kind, max_tokens=80)
former = OpenAILike(**server, **kind, max_tokens=80, should_use_structured_outputs=True)
question = [ChatMessage(role="user", content=shared.QUESTION)]
weather = FunctionTool.from_defaults(shared.get_weather)
call = {"user_msg": shared.ASKED, "tool_required": True, "allow_parallel_tool_calls": False}


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(model.chat(question).message.content)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces([chunk.delta for chunk in model.stream_chat(question)]))


@shared.feature("usage")
def usage() -> None:
    used = model.chat(question).raw.usage
    shared.counted(used.prompt_tokens, used.completion_tokens)


@shared.feature("completions")
def completions() -> None:
    plain = OpenAILike(**server, is_chat_model=False, max_tokens=shared.LIMIT)
    shared.goes_on(plain.complete(shared.BEGINNING).text)


@shared.feature("tools")
def tools() -> None:
    (called,) = longer.get_tool_calls_from_response(longer.chat_with_tools([weather], **call))
    shared.a_call(called.tool_name, called.tool_kwargs)


@shared.feature("streamed tools")
def streamed_tools() -> None:
    chunks = list(longer.stream_chat_with_tools([weather], **call))
    assert len(chunks) > 1
    (called,) = longer.get_tool_calls_from_response(chunks[-1])
    shared.a_call(called.tool_name, called.tool_kwargs)


@shared.feature("tool loop")
def tool_loop() -> None:
    async def ask() -> str:
        agent = FunctionAgent(tools=[weather], llm=longer, initial_tool_choice="required", early_stopping_method="generate")
        return str(await agent.run(shared.ASKED, max_iterations=2))

    shared.looped(asyncio.run(ask()))


@shared.feature("JSON schema")
def json_schema() -> None:
    shared.a_city(former.as_structured_llm(City).chat([ChatMessage(role="user", content=shared.ASKED)]).raw.model_dump())


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    scored = OpenAILike(**server, **kind, max_tokens=shared.LIMIT, logprobs=True, top_logprobs=2)
    shared.same("".join(score[0].token for score in scored.chat(question).logprobs))


@shared.feature("responses")
def responses() -> None:
    spoken = OpenAILikeResponses(**server, **kind, max_output_tokens=shared.LIMIT)
    shared.same(spoken.chat(question).message.content)


@shared.feature("overflow error")
def overflow() -> None:
    turns = [ChatMessage(role="user", content=shared.TOO_LONG)]
    error = shared.raised(BadRequestError, lambda: model.chat(turns))
    assert error.code == "context_length_exceeded", error.code


shared.run()
