"""Formats of calls: transcripts cut everywhere, what is written is read, what a grammar holds, and what begins no call."""

from __future__ import annotations

import copy
import itertools
import json
import random
from collections.abc import Iterable
from typing import Any

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.batching.sampling_params import StructuredOutput
from solutions.core.structured.guide import Guide
from solutions.core.structured.structured_output import GrammarCompiler
from solutions.core.text.chat_template import render_chat
from solutions.core.text.detokenizer import Detokenizer
from solutions.serving.tool_calls.calling import ToolCalling, ToolUse
from solutions.serving.tool_calls.formats import FORMATS
from solutions.serving.tool_calls.tool_format import Function, as_output
from solutions.tests.tiny_models import EOS, VOCAB_SIZE, byte_tokenizer
from solutions.tests.tool_transcripts import FUNCTIONS, TRANSCRIPTS, Transcript

ALL = [(name, one) for name, transcripts in TRANSCRIPTS.items() for one in transcripts]
IDS = [f"{name}-{index}" for name, transcripts in TRANSCRIPTS.items() for index in range(len(transcripts))]
Read = tuple[str, list[tuple[str, str]], bool]


def use_of(name: str, functions: list[Function] = FUNCTIONS, **fields: Any) -> ToolUse:
    return ToolUse(FORMATS[name](), functions, **{"required": False, "several": True} | fields)


def read(use: ToolUse, pieces: Iterable[str]) -> Read:
    """What a parser makes of an answer in pieces: what it says, the calls with their arguments as text, whether it is whole."""
    parser = use.parser()
    says, calls = "", []
    for piece in itertools.chain(*(parser.feed(text) for text in pieces), parser.finish()):
        if piece.call is None:
            says += piece.text
            continue
        if piece.name is not None:
            assert piece.call == len(calls)
            calls.append((piece.name, ""))
        name, arguments = calls[piece.call]
        calls[piece.call] = name, arguments + piece.text
    assert len(calls) == parser.num_calls
    return says, calls, parser.is_whole


def values(answer: Read) -> Transcript:
    says, calls, is_whole = answer
    return Transcript("", says, [(name, json.loads(arguments)) for name, arguments in calls], is_whole)


@pytest.mark.parametrize(("name", "transcript"), ALL, ids=IDS)
def test_a_transcript_means_the_same_wherever_it_is_cut(name: str, transcript: Transcript, tokenizer: Any) -> None:
    """Once at each border of characters, at all of them, and at the borders of tokens, of which some lie within characters."""
    use, text = use_of(name), transcript.text
    whole = read(use, [text])
    assert values(whole)[1:] == transcript[1:]
    for at in range(len(text)):
        assert read(use, [text[:at], text[at:]]) == whole
    assert read(use, text) == whole
    for vocabulary in (byte_tokenizer(), tokenizer):
        tokens = vocabulary.encode(text, add_special_tokens=False)
        stream = Detokenizer(vocabulary.backend_tokenizer, tokens, 0)
        pieces = [stream.step() for _ in tokens] + [stream.finish(len(tokens))]
        assert "".join(pieces) == text
        assert read(use, pieces) == whole


@pytest.mark.parametrize(("name", "transcript"), ALL, ids=IDS)
def test_an_answer_that_is_cut_short_brings_the_beginning_of_its_calls(name: str, transcript: Transcript) -> None:
    use = use_of(name)
    _, calls, _ = read(use, [transcript.text])
    for end in range(len(transcript.text)):
        says, cut, is_whole = read(use, transcript.text[:end])
        assert len(cut) <= len(calls)
        for (got, part), (function, arguments) in zip(cut, calls, strict=False):
            assert got == function
            assert arguments.startswith(part)
        if is_whole:
            assert cut == calls[: len(cut)]
        if not cut:  # nothing is lost but white space
            assert "".join(says.split()) == "".join(transcript.text[:end].split())


CALLS = [("get_weather", {"city": 'a "b"\n\\ é 😀', "unit": "f", "days": 3}), ("now", {}), ("write-file", {"text": "x"})]


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_and_allowed(name: str) -> None:
    use = use_of(name)
    text = use.format.write(CALLS)
    assert values(read(use, [text])) == Transcript("", "", CALLS, True)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")
    return GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,))


def follow(guide: Guide, text: str) -> bool | None:
    """Whether a text is allowed: None is up to here, and True as a whole."""
    masks = torch.empty(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    tokens = byte_tokenizer().encode(text, add_special_tokens=False)
    for count in range(len(tokens) + 1):
        guide.allow([tokens[:count]], masks)
        token = tokens[count] if count < len(tokens) else EOS
        if not int(masks[0, token // 32]) >> token % 32 & 1:
            return False if count < len(tokens) else None
    return True


@pytest.mark.parametrize("name", FORMATS)
def test_what_a_grammar_holds(compiler: GrammarCompiler, name: str) -> None:
    """With `auto` any text, and calls from where they begin; else calls; each as many as may be."""
    tool_format = FORMATS[name]()
    one, two = tool_format.write(CALLS[1:2]), tool_format.write(CALLS[:2])
    wrong = one.replace("now", "new")
    mark = max((mark for mark in tool_format.marks(FUNCTIONS) if one.startswith(mark)), key=len)
    cut = one.index(mark) + len(mark)
    for required, several in itertools.product((False, True), repeat=2):
        grammar = compiler.compile(as_output(use_of(name, required=required, several=several).form()))

        def may(text: str, grammar: Any = grammar) -> bool | None:
            return follow(Guide(grammar), text)

        assert may(one) is True
        assert may(two) is several
        assert may("") is (None if required else True)
        assert may("Hello {[< there") is (not required)
        assert may(f"{one} and more") is False
        assert may(one[:-1]) in (None, False)
        assert may(one[:cut] + "?") is False
        if name != "pythonic" or required:  # where the name belongs to what a call begins with
            assert may(wrong) is False
        assert may(f"Well. {one}") is (not required)


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_without_calls_may_have_a_form_too(compiler: GrammarCompiler, name: str) -> None:
    answer = StructuredOutput("json", json.dumps({"type": "object", "properties": {"name": {"type": "string"}}}))
    use = use_of(name, answer=answer)
    grammar = compiler.compile(as_output(use.form()))
    call = use.format.write(CALLS[1:2])
    for text, allowed in (
        (call, True),
        ('{"name": "<tool_call>"}', True),
        ('{"name": "now"}', True),
        ("Hello", False),
        ("", None),
    ):
        assert follow(Guide(grammar), text) is allowed
    assert read(use, [call])[1] == [("now", "{}")]
    for text in ('{"name": "<tool_call>[TOOL_CALLS]"}', '{"name": "now"}'):
        assert read(use, text) == (text, [], False)


SCALARS: list[dict[str, Any]] = [
    {"type": "string"}, {"type": "string", "maxLength": 3}, {"type": "string", "pattern": "^a+$"}, {"type": "integer"},
    {"type": "number", "minimum": 0}, {"type": "boolean"}, {"type": "null"}, {"enum": ["a b", 5, None, "</parameter>"]},
    {"type": "string", "enum": ["x", "y\nz"]}, {"type": ["string", "null"]}, {"const": {"a": [1]}}, {"$ref": "#/$defs/d"},
]  # fmt: skip
DEFINITIONS = {"d": {"type": "array", "items": {"type": "string"}, "maxItems": 2}}
nested = st.recursive(
    st.sampled_from(SCALARS),
    lambda inner: st.one_of(
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner),
        st.builds(lambda value: {"type": "object", "properties": {"k": value}, "required": ["k"]}, inner),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=4,
)
schemas = st.builds(
    lambda properties, required: {
        "type": "object", "properties": properties, "required": sorted({*required} & {*properties}), "$defs": DEFINITIONS,
        "additionalProperties": False,
    },
    st.dictionaries(st.sampled_from(["a", "b_c", "d1", "e"]), nested, max_size=4),
    st.sets(st.sampled_from(["a", "b_c", "d1", "e"])),
)  # fmt: skip


def random_answer(compiler: GrammarCompiler, form: StructuredOutput, seed: int) -> tuple[list[int], bool]:
    """Tokens that a model with random weights may write, and whether it has come to an end. It tires of long texts."""
    draw, tokens = random.Random(seed), []
    guide = Guide(compiler.compile(form))
    masks = torch.empty(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    tired = draw.choice([40, 120])
    while len(tokens) < 1500:
        guide.allow([tokens], masks)
        allowed = [token for token in range(VOCAB_SIZE) if int(masks[0, token // 32]) >> token % 32 & 1]
        ends = [token for token in allowed if token == EOS or chr(token) in '"]}\n<'] if len(tokens) > tired else []
        token = draw.choice(ends or allowed)
        if token == EOS:
            return tokens, True
        tokens.append(token)
    return tokens, False


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_whatever_a_model_writes_its_calls_match_their_schemas(compiler: GrammarCompiler, name: str) -> None:
    """By jsonschema, for any schema; and the answer means the same in any pieces, cut short or not."""
    vocabulary = byte_tokenizer()
    seen = {True: 0, False: 0}

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(st.lists(schemas, min_size=1, max_size=2), st.integers(0, 1 << 32), st.booleans(), st.booleans())
    def check(parameters: list[dict[str, Any]], seed: int, required: bool, several: bool) -> None:
        functions = [Function(f"f-{index}", None, each) for index, each in enumerate(parameters)]
        use = use_of(name, functions, required=required, several=several)
        tokens, has_ended = random_answer(compiler, as_output(use.form()), seed)
        stream = Detokenizer(vocabulary.backend_tokenizer, tokens, 0)
        pieces = [stream.step() for _ in tokens] + [stream.finish(len(tokens))]
        answer = read(use, ["".join(pieces)])
        assert read(use, pieces) == answer
        draw = random.Random(seed)
        text = "".join(pieces)
        cuts = sorted(draw.sample(range(len(text) + 1), min(3, len(text))))
        assert read(use, [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]) == answer
        says, calls, is_whole = answer
        if required:
            assert not has_ended or (is_whole and not says)
        assert several or len(calls) <= 1
        for called, arguments in calls if has_ended else calls[:-1]:
            schema = functions[int(called[2:])].parameters
            jsonschema.validate(json.loads(arguments), schema, cls=jsonschema.Draft202012Validator)
            seen[required] += 1

    check()
    assert seen[True] > 0


TURNS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}CALL {{ c.id }} "
    "{{ c.function.name }} {{ c.function.arguments.city }}{% endfor %}{{ m.tool_call_id }}{% endfor %}<assistant>"
)
TOLD = "{% if tools is not none %}{{ tools | tojson }}{% endif %}"
TEMPLATES = {
    "hermes": TOLD + "Write <tool_call>...</tool_call>." + TURNS,
    "qwen3_coder": TOLD + "Write <tool_call>\n<function=name>." + TURNS,
    "mistral": TOLD + "Write [TOOL_CALLS]." + TURNS.replace("c.id", "(c.id if c.id | length == 9 else 1 // 0)"),
    "llama3_json": TOLD + 'Write {"name": name, "parameters": {}}.' + TURNS,
    "pythonic": TOLD + "Write [func_name1(params_name1=params_value1)]." + TURNS,
}
HISTORY = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [
        {"id": "call_0123456789", "type": "function", "function": {"name": "get_weather", "arguments": {"city": "Rome"}}}
    ]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_0123456789"},
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_tells_of_tools_gets_them(name: str) -> None:
    """And says by what is in it how the model writes calls. The prompt is transformers' own."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    calling = ToolCalling(tokenizer)
    assert (calling.format.name, calling.is_native) == (name, True)
    expected = copy.deepcopy(HISTORY)
    if name == "mistral":  # whose templates take no other
        expected[1]["tool_calls"][0]["id"] = expected[2]["tool_call_id"] = "123456789"
        assert len(calling.format.call_id()) == 9
    messages, tools = calling.conversation(copy.deepcopy(HISTORY), FUNCTIONS)
    assert tools == [each.as_tool() for each in FUNCTIONS]
    given = tokenizer.apply_chat_template(expected, tools=tools, add_generation_prompt=True)["input_ids"]
    assert render_chat(tokenizer, messages, tools) == given
    assert ToolCalling(tokenizer, "json").format.name == "json"
    assert ToolCalling(tokenizer, "json").is_native
    plain = [{"role": "user", "content": "Hi"}]
    assert calling.conversation(plain, []) == (plain, None)


@pytest.mark.parametrize("template", [TURNS, TOLD + "Write whatever." + TURNS, "{{ 1 // 0 }}", None])
def test_of_other_templates_the_model_is_told_in_words(template: str | None) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    for calling, call in (
        (ToolCalling(tokenizer), '{"name": "get_weather", "arguments": {"city": "Rome"}}'),
        (ToolCalling(None, "hermes"), '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
    ):
        assert not calling.is_native
        messages, tools = calling.conversation(copy.deepcopy(HISTORY), FUNCTIONS)
        assert tools is None
        assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
        assert all(json.dumps(each.as_tool()["function"]) in messages[0]["content"] for each in FUNCTIONS)
        assert [message["content"] for message in messages[1:]] == ["Rome?", call, "Result of get_weather: sunny"]
        without, _ = calling.conversation(copy.deepcopy(HISTORY), [])
        assert without == messages[1:]
