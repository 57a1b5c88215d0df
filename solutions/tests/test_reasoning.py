"""Thoughts: transcripts of each format cut everywhere, answers as the real clients see them, and what grammars hold."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import anthropic
import openai
import pytest
import torch

from solutions.batching.sampling_params import RequestOutputKind, StructuredOutput
from solutions.core.output import CompletionOutput, RequestOutput
from solutions.core.structured.guide import Guide
from solutions.core.structured.structured_output import GrammarCompiler
from solutions.core.text.detokenizer import Detokenizer
from solutions.serving.openai_protocol import ChatCompletionRequest
from solutions.serving.parsed_replies import ParsedReply
from solutions.serving.reasoning.formats import FORMATS, Reasoning
from solutions.serving.reasoning.thinking import Thinking
from solutions.serving.tool_calls.calling import ToolUse
from solutions.serving.tool_calls.formats import FORMATS as TOOL_FORMATS
from solutions.tests.fake_engine import ByteTokenizer, FakeEngine
from solutions.tests.fake_server import serve
from solutions.tests.reasoning_transcripts import TRANSCRIPTS, Transcript
from solutions.tests.tiny_models import EOS, VOCAB_SIZE, byte_tokenizer
from solutions.tests.tool_transcripts import FUNCTIONS
from solutions.tests.tool_transcripts import TRANSCRIPTS as CALLS

ALL = [(name, one) for name, transcripts in TRANSCRIPTS.items() for one in transcripts]
IDS = [f"{name}-{index}" for name, transcripts in TRANSCRIPTS.items() for index in range(len(transcripts))]
ASK = [{"role": "user", "content": "Which town?"}]
CHAT: Any = {"model": "fake", "messages": ASK}


def thinking_of(name: str, is_open: bool) -> Thinking:
    return Thinking(FORMATS[name], is_open or FORMATS[name].always)


def read(thinking: Thinking, pieces: Iterable[str]) -> tuple[str, str]:
    """Thoughts, and what is said."""
    parser = thinking.parser()
    found = list(itertools.chain(*(parser.feed(piece) for piece in pieces), parser.finish()))
    return "".join(each.text for each in found if each.is_thought), "".join(each.text for each in found if not each.is_thought)


@pytest.mark.parametrize(("name", "transcript"), ALL, ids=IDS)
def test_a_transcript_means_the_same_wherever_it_is_cut(name: str, transcript: Transcript) -> None:
    """Once at each border of characters, at all of them, and at the borders of tokens, some of which lie within characters."""
    thinking, text = thinking_of(name, transcript.is_open), transcript.text
    meant = transcript.thought, transcript.says
    assert read(thinking, [text]) == meant
    for at in range(len(text)):
        assert read(thinking, [text[:at], text[at:]]) == meant
    assert read(thinking, text) == meant
    vocabulary = byte_tokenizer()
    tokens = vocabulary.encode(text, add_special_tokens=False)
    stream = Detokenizer(vocabulary.backend_tokenizer, tokens, 0)
    assert read(thinking, [stream.step() for _ in tokens] + [stream.finish(len(tokens))]) == meant


@pytest.mark.parametrize(("name", "transcript"), ALL, ids=IDS)
def test_the_tokens_of_thoughts_are_counted(name: str, transcript: Transcript) -> None:
    """A token a byte, and with marks that are tokens by themselves, as those of the models are."""
    thinking = thinking_of(name, transcript.is_open)
    for has_marks in (False, True):
        vocabulary = byte_tokenizer()
        if has_marks:
            vocabulary.add_tokens([*thinking.format.begins, *thinking.format.ends])
        tokens = vocabulary.encode(transcript.text, add_special_tokens=False)
        # a mark within the thoughts is text to who reads it
        expected = len(vocabulary.encode(transcript.thought, add_special_tokens=False))
        assert thinking.count(vocabulary, tokens) == expected


def replied(
    reply: ParsedReply, pieces: list[str], n: int, reason: str = "stop"
) -> tuple[list[dict[str, Any]], list[str | None]]:
    """What a stream of chunks adds up to, for each choice, and why each ended."""
    said: list[dict[str, Any]] = [{} for _ in range(n)]
    reasons: list[str | None] = [None] * n
    for number, piece in enumerate(pieces):
        is_last = number == len(pieces) - 1
        outputs = [CompletionOutput(index, piece, [], finish_reason=reason if is_last else None) for index in range(n)]
        for index, sequence in reply.choices(RequestOutput("r", None, [1], outputs, is_last)):
            (choice,) = reply.chunk(index, sequence).choices
            reasons[index] = choice.finish_reason or reasons[index]
            for name, value in choice.delta.model_dump().items():
                if name == "tool_calls":
                    for call in value:
                        calls = said[index].setdefault("tool_calls", [])
                        if call["index"] == len(calls):
                            calls.append([call["function"]["name"], ""])
                        calls[call["index"]][1] += call["function"]["arguments"]
                else:
                    said[index][name] = said[index].get(name, "") + value
    return said, reasons


@pytest.mark.parametrize("tool_format", [pytest.param("hermes", marks=pytest.mark.slow), "json", "mistral"])
def test_calls_may_follow_thoughts(tool_format: str) -> None:
    """What the thoughts say of calls is none; streamed in any pieces it is the whole, for each of several choices."""
    use = ToolUse(TOOL_FORMATS[tool_format](), FUNCTIONS, False, True)
    thinking = thinking_of("qwen3", False)
    request = ChatCompletionRequest.model_validate({**CHAT, "n": 2, "stream": True})
    vocabulary = byte_tokenizer()
    for call in CALLS[tool_format]:
        text = f"<think>\nI call {call.text} é\n</think>\n\n{call.text}"

        def reply(pieces: list[str], n: int = 1, use: ToolUse = use) -> Any:
            return replied(ParsedReply(use, thinking, "", "id", request, {"r": [1]}, vocabulary), pieces, n)

        said, reasons = whole = reply([text])
        assert said[0]["reasoning"] == said[0]["reasoning_content"] == f"\nI call {call.text} é\n"
        assert said[0].get("content", "").strip() == call.says.strip()
        assert [(name, json.loads(value)) for name, value in said[0].get("tool_calls", ())] == call.calls
        assert reasons == ["tool_calls" if call.is_whole else "stop"]
        assert reply(list(text), 2) == (said * 2, reasons * 2)
        for at in range(len(text)):
            assert reply([text[:at], text[at:]]) == whole


def test_a_prompt_says_where_its_answers_begin() -> None:
    """By what the template has written at its end; not by what the user says."""
    tokenizer = byte_tokenizer()
    for name, end, begun, is_open in (
        ("qwen3", "<|im_start|>assistant\n", None, False),
        ("qwen3", "<|im_start|>assistant\n<think>\n", None, True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", None, None),
        ("qwen3", "<think>\n<|im_start|>assistant\n", None, False),
        ("qwen3", "<|im_start|>assistant\n<think>\nLet me", "<think>\nLet me", True),
        ("qwen3", "<|im_start|>assistant\nIt is", "It is", None),
        ("qwen3", "<|im_start|>assistant\n<think>Hm</think>It is", "<think>Hm</think>It is", None),
        ("deepseek_r1", "<Assistant>", None, True),
        ("deepseek_r1", "<Assistant></think>", None, None),
        ("mistral", "[/INST]", None, False),
        ("granite", "<|start_of_role|>assistant<|end_of_role|>", None, False),
        ("granite", "<|end_of_role|>Here's my thought process: I", "Here's my thought process: I", True),
        ("granite", "Here is my thought process: I Here's my response:", None, None),
        ("glm45", "<|assistant|>\n<think></think>", None, None),
        ("nemotron_v3", "<think>\n", None, True),
        ("deepseek_v3", "<Assistant></think>", None, None),
    ):
        thinking = Reasoning(tokenizer, name).of(tokenizer.encode(end, add_special_tokens=False), -1, begun)
        assert (None if thinking is None else thinking.is_open) == is_open
        assert thinking is None or thinking.budget is None
    assert Reasoning(tokenizer).of([1], 5) is None


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")
    return GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,))


def allows(grammar: Any, text: str) -> bool:
    """Whether an answer may be this text and end there."""
    guide, masks = Guide(grammar), torch.empty(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    tokens = [*byte_tokenizer().encode(text, add_special_tokens=False), EOS]
    for count, token in enumerate(tokens):
        guide.allow([tokens[:count]], masks)
        if not int(masks[0, token // 32]) >> token % 32 & 1:
            return False
    return True


CALL = '{"name": "now", "arguments": {}}'
HELD: list[tuple[bool, int | None, str, list[str], list[str]]] = [
    (False, None, "text", ["{}", "<think>{</think>{}"], ["<think>{}", "<think></think>", "</think>{}", "x"]),
    (True, None, "text", ["x</think>{}", "<think>x</think>{}"], ["{}", "x</think>y"]),
    (False, 2, "none", ["<think>ab</think>x", "Hi", "<thin", ""], ["<think>abc</think>x", "<think>a"]),
    (True, 2, "none", ["ab</think>x", "<think>ab</think>x", "</think>"], ["abc</think>", "<think>abc</think>", "ab"]),
    (False, 2, "calls", [CALL, f"<think>ab</think>\n\n{CALL}", "<think>a</think>\nHi", "Hi"],
     [f"<think>abc</think>{CALL}", '<think>a</think>\n\n{"name": "now", "arguments": []}', f"<think>a</think>{CALL} and more"]),
    (True, None, "calls", [f"a{CALL}</think>{CALL}", "a</think>Hi"], [CALL, f"a</think>{CALL[:-1]}"]),
    (False, 2, "marked", ["<think>ab</think>Hi", "Hi"], ["<think>abc</think>Hi", "<think>ab</think><tool_call>\n{}"]),
]  # fmt: skip


def test_every_form_of_a_mark_is_held(compiler: GrammarCompiler) -> None:
    """What the parser takes for a mark is one for the grammar."""
    for is_open, good, bad in (
        (False, ["Here is my thought process: {Here's my response:{}", "Here's my thought process:Here is my response:{}"],
         ["Here's my thought process:{}", "Here's my thought process: Here's my response:x Here is my response:{}"]),
        (True, ["{Here's my response:{}", "Here's my thought process:{Here is my response:{}"], ["{}"]),
    ):  # fmt: skip
        form = Thinking(FORMATS["granite"], is_open).form(StructuredOutput("choice", '["{}"]'))
        assert form is not None
        grammar = compiler.compile(form)
        assert [text for text in good if not allows(grammar, text)] == []
        assert [text for text in bad if allows(grammar, text)] == []


@pytest.mark.parametrize("case", HELD, ids=lambda case: f"{case[2]} {case[1]} {'open' if case[0] else 'free'}")
def test_what_is_asked_for_begins_behind_the_thoughts(
    compiler: GrammarCompiler, case: tuple[bool, int | None, str, list[str], list[str]]
) -> None:
    is_open, budget, what, good, bad = case
    thinking = Thinking(FORMATS["qwen3"], is_open, budget)
    asked = StructuredOutput("choice", '["{}"]') if what == "text" else None
    tools = {"calls": "json", "marked": "hermes"}.get(what)
    form = thinking.form(asked, None if tools is None else ToolUse(TOOL_FORMATS[tools](), FUNCTIONS, False, False))
    assert form is not None
    grammar = compiler.compile(form)
    assert [text for text in good if not allows(grammar, text)] == []
    assert [text for text in bad if allows(grammar, text)] == []


def test_stop_strings_end_no_call_behind_thoughts() -> None:
    """And marks that are special tokens come into the text."""
    use = ToolUse(TOOL_FORMATS["json"](), FUNCTIONS, False, True)
    for is_open, text, found in (
        (False, f"<think>a</think>\n\n{CALL}", True),
        (False, CALL, True),
        (False, f"<think>{CALL}", False),
        (True, f"a</think>{CALL}", True),
        (True, f"a {CALL}", False),
    ):
        request = ChatCompletionRequest.model_validate({**CHAT, "stop": ["}"]})
        request.answer_with(use, Thinking(FORMATS["mistral" if is_open else "qwen3"], is_open))
        params = request.to_sampling_params({})
        assert params.stop_until is not None
        text = text.replace("<think>", "[THINK]").replace("</think>", "[/THINK]") if is_open else text
        assert bool(re.search(params.stop_until, text)) == found
        assert params.skip_special_tokens == (not is_open)
        assert params.stop == ["}"]


class Script(FakeEngine):
    """Writes a text, a token a byte, in every sequence."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.script = text.encode()

    def _advance(self) -> Iterator[RequestOutput]:
        for name, (request, done) in list(self.running.items()):
            params, end = request.params, done + 1
            cut = end == params.max_tokens and end < len(self.script)
            finished = cut or end == len(self.script)
            if finished:
                del self.running[name]
            else:
                self.running[name] = request, end
            delta = params.output_kind is RequestOutputKind.DELTA
            if delta or finished:
                start = done if delta else 0
                text = self.script[:end].decode(errors="ignore")
                new = text[len(self.script[:start].decode(errors="ignore")) :]
                reason = "length" if cut else "stop" if finished else None
                sequences = [
                    CompletionOutput(index, new, list(self.script[start:end]), finish_reason=reason)
                    for index in range(params.n)
                ]
                yield RequestOutput(name, None, request.prompt_token_ids, sequences, finished)


THOUGHT, SAID = "\nÜber Paris 😀.\n", "\n\nEs ist Paris 😀."
SCRIPT = f"<think>{THOUGHT}</think>{SAID}"


@pytest.fixture(scope="module")
def scripted() -> Iterator[str]:
    with serve(Script(SCRIPT), reasoning_parser="qwen3") as url:
        yield url


def of_openai(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("limit", [None, 5, 20, 26, 30, 40])
def test_the_client_reads_thoughts_whole_and_streamed(scripted: str, limit: int | None) -> None:
    """Cut short within the mark, the thoughts, the other mark and the text; `n` choices alike."""
    client = of_openai(scripted)
    shown = SCRIPT.encode()[:limit].decode(errors="ignore")
    thought, _, said = shown.removeprefix("<think>").partition("</think>")
    thought, said = (thought, said) if shown.startswith("<think>") else ("", shown)
    answer = client.chat.completions.create(**CHAT, n=3, max_tokens=limit)
    for choice in answer.choices:
        message = choice.message
        assert message.content == (said or (None if limit else said))
        told = {name: getattr(message, name, "") for name in ("reasoning_content", "reasoning")}
        assert told == dict.fromkeys(told, thought)
        assert choice.finish_reason == ("length" if limit else "stop")
    count = 3 * len(thought.encode())
    if limit != 20:  # where a byte of the emoji is out, and its text is not
        assert answer.usage.completion_tokens_details.reasoning_tokens == count
    streamed: dict[tuple[int, str], str] = {}
    usage = None
    for chunk in client.chat.completions.create(
        **CHAT, n=3, max_tokens=limit, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            for name, value in choice.delta.model_dump(exclude_none=True).items():
                if name != "role":
                    streamed[choice.index, name] = streamed.get((choice.index, name), "") + value
    for index in range(3):
        assert streamed.get((index, "content"), "") == said
        for name in ("reasoning", "reasoning_content"):
            assert streamed.get((index, name), "") == thought
    assert usage == answer.usage


def test_thoughts_may_be_left_out_or_not_told_apart(scripted: str) -> None:
    client = of_openai(scripted)
    message = client.chat.completions.create(**CHAT, extra_body={"include_reasoning": False}).choices[0].message
    assert message.content == SAID
    assert "reasoning" not in message.model_dump()
    with serve(Script(SCRIPT)) as url:
        client = of_openai(url)
        answer = client.chat.completions.create(**CHAT)
        assert answer.choices[0].message.content == SCRIPT
        assert answer.usage.completion_tokens_details is None
        with pytest.raises(openai.BadRequestError, match="--reasoning-parser") as caught:
            client.chat.completions.create(**CHAT, extra_body={"thinking_token_budget": 5})
        assert caught.value.param == "thinking_token_budget"


def test_a_response_has_its_thoughts_as_an_item(scripted: str) -> None:
    client = of_openai(scripted)
    whole = client.responses.create(model="fake", input="Which town?")
    thoughts, message = whole.output
    assert [part.text for part in thoughts.content] == [THOUGHT]
    assert (thoughts.type, thoughts.status, message.content[0].text) == ("reasoning", "completed", SAID)
    assert whole.output_text == SAID
    assert whole.usage.output_tokens_details.reasoning_tokens == len(THOUGHT.encode())
    kinds: list[str] = []
    text = {"response.reasoning_text.delta": "", "response.output_text.delta": ""}
    for number, event in enumerate(client.responses.create(model="fake", input="Which town?", stream=True)):
        assert event.sequence_number == number
        if event.type in text:
            text[event.type] += event.delta
        if not kinds or kinds[-1] != event.type:
            kinds.append(event.type)
    assert [*text.values()] == [THOUGHT, SAID]
    assert kinds == [f"response.{kind}" for kind in (
        "created", "in_progress", "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done",
        "content_part.done", "output_item.done", "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done", "completed",
    )]  # fmt: skip
    assert [item.model_dump(exclude={"id"}) for item in event.response.output] == [
        item.model_dump(exclude={"id"}) for item in whole.output
    ]
    again = client.responses.create(model="fake", input="And?", previous_response_id=whole.id)
    assert again.output_text == SAID
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="fake", input="Hi", reasoning={"effort": "furious"})  # type: ignore[typeddict-item]
    assert caught.value.param == "reasoning.effort"


def test_a_message_has_its_thoughts_as_a_block(scripted: str) -> None:
    client = anthropic.Anthropic(base_url=scripted, api_key="none", max_retries=0)
    asked: Any = {"model": "fake", "max_tokens": 1000, "messages": ASK}
    thoughts, text = client.messages.create(**asked).content
    assert (thoughts.type, thoughts.thinking, text.type, text.text) == ("thinking", THOUGHT, "text", SAID)
    with client.messages.stream(**asked) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert "thinking" in events
    assert [block.model_dump(exclude_none=True) for block in final.content] == [
        block.model_dump(exclude_none=True) for block in (thoughts, text)
    ]
    history = [*ASK, {"role": "assistant", "content": [thoughts.model_dump(), text.model_dump(exclude_none=True)]}, *ASK]
    assert client.messages.create(**asked | {"messages": history}).content[1].text == SAID


# A real model of random weights, which would write anything; its tokens are bytes, its template is Qwen3's


def test_the_server_knows_its_formats() -> None:
    """Those that have the same marks have the same transcripts."""
    assert set(FORMATS) == {
        "deepseek_r1", "deepseek_v3", "glm45", "granite", "holo2", "mimo", "minimax_m2", "mistral", "nemotron_v3", "olmo3",
        "qwen3", "seed_oss", "step3",
    }  # fmt: skip
    assert {*FORMATS.values()} == {FORMATS[name] for name in TRANSCRIPTS}
    assert ByteTokenizer().decode([60]) == "<"
