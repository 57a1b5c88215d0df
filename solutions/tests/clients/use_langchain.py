"""LangChain's ChatOpenAI."""

import shared
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

server = {"model": shared.MODEL, "base_url": shared.URL, "api_key": "unused", "temperature": 0, "max_retries": 0}
model = ChatOpenAI(**server, max_tokens=shared.LIMIT, stream_usage=True)
longer = ChatOpenAI(**server, max_tokens=80)
caller = longer.bind_tools([tool(shared.get_weather)], tool_choice="required", parallel_tool_calls=False, strict=True)


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)


@shared.feature("chat")
def chat() -> None:
    shared.same(model.invoke(shared.QUESTION).content)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces([chunk.content for chunk in model.stream(shared.QUESTION)]))


@shared.feature("usage")
def usage() -> None:
    whole, *rest = model.stream(shared.QUESTION)
    for chunk in rest:
        whole += chunk
    shared.counted(whole.usage_metadata["input_tokens"], whole.usage_metadata["output_tokens"])


@shared.feature("completions")
def completions() -> None:
    shared.goes_on(OpenAI(**server, max_tokens=shared.LIMIT).invoke(shared.BEGINNING))


@shared.feature("tools")
def tools() -> None:
    (called,) = longer.bind_tools([City], tool_choice="City").invoke(shared.ASKED).tool_calls
    shared.a_city(called["args"])


@shared.feature("streamed tools")
def streamed_tools() -> None:
    chunks = list(caller.stream(shared.ASKED))
    arguments = shared.in_pieces([part["args"] or "" for chunk in chunks for part in chunk.tool_call_chunks])
    shared.a_call("get_weather", arguments)


@shared.feature("tool loop")
def tool_loop() -> None:
    asked = HumanMessage(shared.ASKED)
    message = caller.invoke([asked])
    (called,) = message.tool_calls
    result = ToolMessage(shared.get_weather(**called["args"]), tool_call_id=called["id"])
    shared.looped(longer.bind_tools([tool(shared.get_weather)], tool_choice="none").invoke([asked, message, result]).content)


@shared.feature("JSON schema")
def json_schema() -> None:
    shared.a_city(longer.with_structured_output(City, method="json_schema", strict=True).invoke(shared.ASKED).model_dump())


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    scores = model.bind(logprobs=True, top_logprobs=2).invoke(shared.QUESTION).response_metadata["logprobs"]["content"]
    shared.same("".join(score["token"] for score in scores))


@shared.feature("responses")
def responses() -> None:
    spoken = ChatOpenAI(**server, max_tokens=shared.LIMIT, use_responses_api=True)
    shared.same(spoken.invoke(shared.QUESTION).text)
    shared.same(shared.in_pieces([chunk.text for chunk in spoken.stream(shared.QUESTION)]))


@shared.feature("embeddings")
def embeddings() -> None:
    embedder = OpenAIEmbeddings(
        model=shared.MODEL, base_url=shared.URL, api_key="unused", max_retries=0, check_embedding_ctx_length=False
    )  # fmt: skip
    shared.embedded(embedder.embed_documents(["x", shared.QUESTION])[1])


@shared.feature("overflow error")
def overflow() -> None:
    shared.raised(ContextOverflowError, lambda: model.invoke(shared.TOO_LONG))


shared.run()
