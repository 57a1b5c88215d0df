"""Forms that are made of others: grammars of Lark, structural tags, and JSON with white space of the request's own."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from solutions.batching.sampling_params import StructuredOutput
from solutions.core.grammar.lark import is_lark
from solutions.core.structured.guide import Guide
from solutions.core.structured.structured_output import GrammarCompiler
from solutions.serving.answer_forms import FormFields, ResponseFormat, StructuredOutputs, form_of
from solutions.serving.errors import RequestError
from solutions.serving.tool_calls.tool_format import as_form, as_output
from solutions.tests.tiny_models import EOS, VOCAB_SIZE, byte_tokenizer

pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer(), VOCAB_SIZE, (EOS,))


def allows(grammar: Any, text: str) -> bool:
    """Whether a text, as a whole, has the form."""
    guide, masks = Guide(grammar), torch.empty(1, -(-VOCAB_SIZE // 32), dtype=torch.int32)
    tokens = [*byte_tokenizer().encode(text, add_special_tokens=False), EOS]
    for count, token in enumerate(tokens):
        guide.allow([tokens[:count]], masks)
        if not int(masks[0, token // 32]) >> token % 32 & 1:
            return False
    return True


CALCULATOR = r"""
// sums as in Lark's own example
?start: sum
      | NAME "=" sum    -> assign_var

?sum: product
    | sum "+" product   -> add
    | sum "-" product   -> sub
?product: atom
    | product "*" atom  -> mul
    | product "/" atom  -> div
?atom: NUMBER           -> number
     | "-" atom         -> neg
     | NAME             -> var
     | "(" sum ")"

%import common.CNAME -> NAME
%import common.NUMBER
%import common.WS_INLINE
%ignore WS_INLINE
"""
JSON_GRAMMAR = r"""
?start: value
?value: object | array | string | SIGNED_NUMBER | "true" | "false" | "null"
array  : "[" [value ("," value)*] "]"
object : "{" [pair ("," pair)*] "}"
pair   : string ":" value
string : ESCAPED_STRING
%import common (ESCAPED_STRING, SIGNED_NUMBER, WS)
%ignore WS
"""
PARTS = r"""
start: "let"i HEX ~ 2..3 (";" | "\n") end   # letters of either case
HEX.2: "0".."9" | "a".."f"
!end: TAIL?
TAIL: /[^a-z\/"]+/ | "\u00fc"
"""
LARK = {
    CALCULATOR: (
        ["1", "x = 2*(3 + -y1) / 4.5e-3", " 1 - 2 ", "((7))", "a\t=\tb"], ["", "1 +", "x == 2", "(1", "1 2", "2 = x", "1\n"],
    ),
    JSON_GRAMMAR: (
        ['{"a": [1, -2.5e3, true], "b\\"c" : null}', "[]", '"é \\u00e9"', " [ 1 ,2 ] "],
        ["{a: 1}", "[1,]", '"a', "tru", "{}{}", '{"a" 1}'],
    ),
    PARTS: (["LeT0a;", "let123\n", "let99;A-Z", "let99;ü", "let00;!?"], ["let1;", "let1234;", "lEt1g;", "let00;a", "let00"]),
    'start: "a" rest\nrest: | "b" rest': (["a", "ab", "abbb"], ["", "b", "aab"]),
}  # fmt: skip


@pytest.mark.parametrize("grammar", LARK, ids=["calculator", "json", "parts", "nothing"])
def test_a_grammar_of_lark_allows_its_texts(compiler: GrammarCompiler, grammar: str) -> None:
    """Which are written by hand; where Lark is installed, it agrees."""
    assert is_lark(grammar)
    compiled = compiler.compile(StructuredOutput("grammar", grammar))
    good, bad = LARK[grammar]
    assert [text for text in good if not allows(compiled, text)] == []
    assert [text for text in bad if allows(compiled, text)] == []
    try:
        import lark
    except ImportError:
        return
    parser = lark.Lark(grammar, parser="earley")
    for text in good:
        parser.parse(text)
    for text in bad:
        with pytest.raises(lark.exceptions.UnexpectedInput):
            parser.parse(text)


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ('start: "a" other', "line 1: there is no rule 'other'"),
        ('rule: "a"', "there is no rule 'start'"),
        ('start: "a"\nstart: "b"', "line 2: 'start' is defined twice"),
        ('start: ("a"', "line 1: '\\)' is missing before the end"),
        ("start: a{B}\nB: /b/", "a template cannot be had here"),
        ("start: A\n%declare A", "line 2: %declare cannot be had here"),
        ("%import python.NAME\nstart: NAME", "line 1: an import of anything but common"),
        ("%import common.NOTHING\nstart: NOTHING", "common.NOTHING cannot be had here"),
        ("start: /a/i", "line 1: a regular expression with the flags 'i'"),
        ("start: /(?<=a)b/", "line 1: /\\(\\?<=a\\)b/"),
        ('start: "z".."a"', "the range from 'z' to 'a'"),
        ("start: A ~ 5..2\nA: /a/", "5 to 2 times"),
        ('start: "a" ^ "b"', "line 1: .* is not of a grammar of Lark"),
        ('start: "a" start', "there is no text of this form|the rule 'start' has no text"),
        ("start: %", "is missing before"),
    ],
)
def test_what_a_grammar_of_lark_cannot_have_is_named(compiler: GrammarCompiler, grammar: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"structured_output: the grammar is not valid: .*({says})"):
        compiler.compile(StructuredOutput("grammar", grammar))


def test_ebnf_is_not_taken_for_lark() -> None:
    assert not is_lark('root ::= "a: b" rest\nrest ::= [a-z]*')
    assert not is_lark('# start: not a rule\nroot ::= "x"')


SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (None, ['{"a": [1, 2]}'], ['{"a":[1,2]}', '{ "a": [1, 2] }']),
        ("", ['{"a":[1,2]}', '{"a":[]}'], ['{"a": [1, 2]}']),
        (" ?", ['{"a":[1,2]}', '{"a": [1, 2]}', '{ "a" : [ 1 , 2 ] }'], ['{"a":  [1]}', '{"a":\n[1]}', ' {"a":[1]}']),
        (r"[\n\t]*", ['{\n\t"a":\n[\n]\n}'], ['{ "a":[1]}']),
        (r"\s", ['{ "a" : [ 1 , 2 ] }'], ['{"a":[1]}', '{\u00a0"a" : [ 1 ] }']),
    ],
)
def test_json_may_have_white_space_of_the_request_s_own(
    compiler: GrammarCompiler, pattern: str | None, good: list[str], bad: list[str]
) -> None:
    """As it is and as a part of another form, which is how it comes behind thoughts."""
    wanted = StructuredOutput("json", json.dumps(SCHEMA), pattern)
    for form in (wanted, as_output(as_form(wanted))):
        compiled = compiler.compile(form)
        assert [text for text in good if not allows(compiled, text)] == []
        assert [text for text in bad if allows(compiled, text)] == []
    for text in good:
        json.loads(text)


def test_older_names_and_other_servers_ask_for_the_same_forms() -> None:
    """By what the newer names come to."""
    newer = FormFields.model_validate({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": r"\n"}})
    older = FormFields.model_validate({"guided_json": SCHEMA, "guided_whitespace_pattern": r"\n"})
    assert (older.form[1], older.form[0]) == (newer.form[1], "guided_json")
    for fields in ({"guided_regex": "a"}, {"structured_outputs": {"json": SCHEMA}}, {}):
        with pytest.raises(RequestError, match="guided_whitespace_pattern needs guided_json"):
            _ = FormFields.model_validate(fields | {"guided_whitespace_pattern": " "}).form
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    ours, theirs = (FormFields(response_format=each) for each in (schema, {"type": "json_object", "schema": SCHEMA}))
    assert ours.form == theirs.form
    assert FormFields(response_format={"type": "json_object"}).form[1].kind == "json_object"
    for kind in ("text", "json_schema", "structural_tag"):
        with pytest.raises(ValueError, match=r"json_object may have schema|needs json_schema|needs format"):
            ResponseFormat.model_validate({"type": kind, "schema": SCHEMA})


def test_a_pattern_that_is_no_white_space_is_refused(compiler: GrammarCompiler) -> None:
    for pattern in ("x", "(", "\u00a0"):
        with pytest.raises(ValueError, match="whitespace_pattern"):
            compiler.compile(StructuredOutput("json", json.dumps(SCHEMA), pattern))
    with pytest.raises(ValueError, match="whitespace_pattern is for JSON"):
        StructuredOutput("regex", "a", " ")
    with pytest.raises(ValueError, match="whitespace_pattern must be"):
        StructuredOutput("json", "{}", " " * 300)


OLD_TAG = {
    "type": "structural_tag", "triggers": ["<f="],
    "structures": [{"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"}, {"begin": "<f=b>", "schema": {}, "end": "</f>"}],
}  # fmt: skip
NEW_TAG = {"type": "structural_tag", "format": {"type": "sequence", "elements": [
    {"type": "const_string", "value": "Answer: "}, {"type": "json_schema", "json_schema": SCHEMA},
    {"type": "regex", "pattern": "[.!]"}, {"type": "grammar", "grammar": 'start: "x" | "y"'},
]}}  # fmt: skip
TAGGED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    (OLD_TAG, ["Hello", 'Hi <f=a>{"a": [1]}</f> and <f=b>null</f>.'], ["<f=c>", '<f=a>{"b": 1}</f>', '<f=a>{"a": []}']),
    (NEW_TAG, ['Answer: {"a": [1]}!y'], ["Answer: ", '{"a": [1]}!y', 'Answer: {"a": ["x"]}!y', 'Answer: {"a": [1]}!z']),
]


@pytest.mark.parametrize(("tag", "good", "bad"), TAGGED, ids=["older", "newer"])
def test_a_structural_tag_comes_by_three_fields(
    compiler: GrammarCompiler, tag: dict[str, Any], good: list[str], bad: list[str]
) -> None:
    asked: list[Any] = [
        {"structured_outputs": StructuredOutputs.model_validate({"structural_tag": tag})},
        {"structured_outputs": StructuredOutputs.model_validate({"structural_tag": json.dumps(tag)})},
        {"response_format": ResponseFormat.model_validate(tag)},
    ]
    for fields in asked:
        found = form_of(fields)
        assert found is not None
        for form in (found[1], as_output(as_form(found[1]))):
            compiled = compiler.compile(form)
            assert [text for text in good if not allows(compiled, text)] == []
            assert [text for text in bad if allows(compiled, text)] == []


@pytest.mark.parametrize(
    "tag",
    [
        {"x": 1}, {"format": 5}, {"structures": []}, {"structures": [{"begin": "<"}], "triggers": ["<"]}, "[", "5", "null",
        {"structures": 5, "triggers": []},
    ],
)  # fmt: skip
def test_a_tag_of_neither_form_is_refused_by_its_field(tag: Any) -> None:
    with pytest.raises(RequestError, match="structural_tag") as caught:
        form_of({"structured_outputs": StructuredOutputs.model_validate({"structural_tag": tag})})
    assert caught.value.param == "structured_outputs.structural_tag"


@pytest.mark.parametrize("text", ["{", "", "[" * 100_000, "{'a': 1}"])
def test_a_text_that_is_no_json_is_refused_by_its_field(text: str) -> None:
    """Before anything is made of it: behind thoughts a schema is a part of another form."""
    for fields, param in (
        ({"structured_outputs": StructuredOutputs.model_validate({"json": text})}, "structured_outputs.json"),
        ({"guided_json": text}, "guided_json"),
        (
            {"structured_outputs": StructuredOutputs.model_validate({"structural_tag": text})},
            "structured_outputs.structural_tag",
        ),
    ):
        with pytest.raises(RequestError) as caught:
            form_of(fields)
        assert caught.value.param == param


def test_a_tag_that_xgrammar_does_not_know_is_one_line(compiler: GrammarCompiler) -> None:
    for wrong in ({"type": "nothing"}, {"type": "regex", "pattern": "("}, {"type": "sequence"}):
        text = json.dumps({"type": "structural_tag", "format": wrong})
        with pytest.raises(ValueError, match="structured_output: the structural_tag is not valid: ") as caught:
            compiler.compile(StructuredOutput("structural_tag", text))
        assert "\n" not in str(caught.value)
    half = {"type": "regex", "pattern": r"\ud800"}
    with pytest.raises(ValueError, match="surrogate"):
        compiler.compile(as_output(half))
    for fields in (
        {"type": "structural_tag"},
        {"type": "text", "triggers": []},
        {"type": "text", "format": {"type": "any_text"}},
    ):
        if fields != {"type": "text", "triggers": []}:
            with pytest.raises(ValueError, match="structural_tag"):
                ResponseFormat.model_validate(fields)
