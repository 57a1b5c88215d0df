"""smolagents: its model for OpenAI-compatible servers, and both kinds of agent."""

import shared
from openai import BadRequestError
from smolagents import OpenAIModel, ToolCallingAgent, tool

server = {"model_id": shared.MODEL, "api_base": shared.URL, "api_key": "unused", "client_kwargs": {"max_retries": 0}}
model = OpenAIModel(**server, temperature=0, max_tokens=shared.LIMIT)
longer = OpenAIModel(**server, temperature=0, max_tokens=80)
weather = tool(shared.get_weather)


@shared.feature("chat")
def chat() -> None:
    shared.same(model.generate(shared.MESSAGES).content)


@shared.feature("stream")
def stream() -> None:
    shared.same(shared.in_pieces([delta.content or "" for delta in model.generate_stream(shared.MESSAGES)]))


@shared.feature("usage")
def usage() -> None:
    *_, last = [delta.token_usage for delta in model.generate_stream(shared.MESSAGES) if delta.token_usage]
    shared.counted(last.input_tokens, last.output_tokens)


@shared.feature("tools")
def tools() -> None:
    turns = [{"role": "user", "content": shared.ASKED}]
    (called,) = longer.generate(turns, tools_to_call_from=[weather], parallel_tool_calls=False).tool_calls
    assert called.function.name == "get_weather"


@shared.feature("tool loop")
def tool_loop() -> None:
    class Answer(ToolCallingAgent):
        """Calls its tool once; after that a call of `final_answer` is all that it may do."""

        def process_tool_calls(self, *arguments):
            yield from super().process_tool_calls(*arguments)
            self.tools.pop("get_weather", None)

    agent = Answer(tools=[weather], model=longer, max_steps=2)
    shared.looped(str(agent.run(shared.ASKED)))


@shared.feature("JSON schema")
def json_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": shared.CITY, "strict": True}}
    shared.a_city(longer.generate(shared.MESSAGES, response_format=form).content)


@shared.feature("overflow error")
def overflow() -> None:
    error = shared.raised(BadRequestError, lambda: model.generate([{"role": "user", "content": shared.TOO_LONG}]))
    assert error.code == "context_length_exceeded", error.code


shared.run()
