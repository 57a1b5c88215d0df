"""Pydantic AI."""

import shared
from pydantic import BaseModel, Field
from pydantic_ai import Agent, ModelContextWindowExceededError, NativeOutput, RunContext
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

provider = OpenAIProvider(base_url=shared.URL, api_key="unused")
model = OpenAIChatModel(shared.MODEL, provider=provider)
settings = {"temperature": 0, "max_tokens": shared.LIMIT}
agent = Agent(model, model_settings=settings)
longer = {**settings, "max_tokens": 80, "parallel_tool_calls": False}


class City(BaseModel):
    """A city."""

    city: str = Field(max_length=12)


class CallFirst(AbstractCapability):
    """The first request has to call a tool, the next ones may not."""

    def get_model_settings(self):
        def choice(context: RunContext):
            return {"tool_choice": "required" if context.run_step == 1 else "none"}

        return choice


@shared.feature("chat")
def chat() -> None:
    shared.same(agent.run_sync(shared.QUESTION).output)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces(list(agent.run_stream_sync(shared.QUESTION).stream_text(delta=True, debounce_by=None))))


@shared.feature("usage")
def usage() -> None:
    used = agent.run_sync(shared.QUESTION).usage
    shared.counted(used.input_tokens, used.output_tokens)


@shared.feature("tools")
def tools() -> None:
    shared.a_city(Agent(model, output_type=City, model_settings=longer).run_sync(shared.ASKED).output.model_dump())


@shared.feature("streamed tools")
def streamed_tools() -> None:
    answer = Agent(model, output_type=City, model_settings=longer).run_stream_sync(shared.ASKED)
    *_, last = answer.stream_output(debounce_by=None)
    shared.a_city(last.model_dump())


@shared.feature("tool loop")
def tool_loop() -> None:
    caller = Agent(model, tools=[shared.get_weather], capabilities=[CallFirst()], model_settings=longer)
    shared.looped(caller.run_sync(shared.ASKED).output)


@shared.feature("JSON schema")
def json_schema() -> None:
    former = Agent(model, output_type=NativeOutput(City), model_settings=longer)
    shared.a_city(former.run_sync(shared.ASKED).output.model_dump())


@shared.feature("log-probabilities")
def log_probabilities() -> None:
    response = agent.run_sync(shared.QUESTION, model_settings={"openai_logprobs": True, "openai_top_logprobs": 2}).response
    shared.same("".join(score["token"] for score in response.provider_details["logprobs"]))


@shared.feature("responses")
def responses() -> None:
    responder = Agent(OpenAIResponsesModel(shared.MODEL, provider=provider), model_settings=settings)
    shared.same(responder.run_sync(shared.QUESTION).output)


@shared.feature("overflow error")
def overflow() -> None:
    shared.raised(ModelContextWindowExceededError, lambda: agent.run_sync(shared.TOO_LONG))


shared.run()
