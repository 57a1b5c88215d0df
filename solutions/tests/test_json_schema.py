"""Grammars of JSON schemas: random answers are valid by the jsonschema library, and what it holds to be valid is accepted."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend, validator_for

from solutions.core.grammar.json_schema import to_grammar
from solutions.core.grammar.numbers import Bounds, numbers

xgrammar = pytest.importorskip("xgrammar", reason="XGrammar is not installed, so there are no answers of a given form")
END = 256
KIND = {"type": "object", "properties": {"kind": {"const": "a"}, "n": {"type": "integer"}}, "required": ["kind"]}
TREE = {
    "$defs": {"t": {"type": "object", "properties": {"v": {"type": "integer"}, "l": {"$ref": "#/$defs/t"}}, "required": ["v"]}}
}
STRINGS = {
    p: {"type": "string", "pattern": p}
    for p in ('^say "[a-z]{2}"$', r"^C:\\[a-z]{3}$", "b", "^[^a]+$", r"^\S\d.$", "^(?=.*1)[a1]+$")
}
CASES: list[tuple[Any, list[Any], list[Any]]] = [
    # schema, valid, not valid
    ({"type": "object", "required": ["a"]}, [{"a": 1}, {"a": None}], [{}]),
    ({"type": "array", "minItems": 2}, [[1, "x"], [[], {}]], [[], [1]]),
    ({"type": "string", "minLength": 2, "maxLength": 3}, ["a\n", "\t\"\\", "é😀", "abc"], ["", "a", "abcd"]),
    ({"type": "string", "maxLength": 100}, ["", "x" * 100, "\x01" * 40], ["x" * 101]),
    ({"type": "string", "minLength": 70}, ["x" * 70, "é" * 200], ["x" * 69]),
    (STRINGS['^say "[a-z]{2}"$'], ['say "ab"'], ['say "ab', "say ab"]),
    (STRINGS[r"^C:\\[a-z]{3}$"], ["C:\\abc"], ["C:\nabc", "C:abc"]),
    (STRINGS["b"], ["abc", "b\n"], ["", "ac"]),
    (STRINGS["^[^a]+$"], ["\n\"", "é\\"], ["", "a"]),
    (STRINGS[r"^\S\d.$"], ['"1\t', "x2é"], [" 12", "x1"]),
    (STRINGS["^(?=.*1)[a1]+$"], ["a1", "11"], ["aa", "b1"]),
    ({"type": "string", "pattern": "^a", "not": {"pattern": "z$"}, "maxLength": 4}, ["abc", "aza"], ["az", "abcde", "b"]),
    ({"type": "integer", "minimum": 3, "exclusiveMaximum": 120, "multipleOf": 7}, [7, 119], [0, 126, 8]),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 1.5}, [1.5, 0.25, 1], [0, -1, 1.51]),
    ({"type": "number", "not": {"type": "integer"}}, [0.5, -3.25], [1, 0]),
    ({"allOf": [{"type": "object", "properties": {"a": {"type": "integer"}}},
       {"required": ["a"], "properties": {"a": {"minimum": 5}}}]},
     [{"a": 5}], [{"a": 4}, {}]),
    ({"properties": {"a": {"anyOf": [{"type": "string"}, {"type": "null"}], "enum": ["x", 1, None]}}, "type": "object",
      "required": ["a"]}, [{"a": "x"}, {"a": None}], [{"a": 1}]),
    ({"oneOf": [KIND, {**KIND, "properties": {"kind": {"const": "b"}}}]}, [{"kind": "a", "n": 1}, {"kind": "b"}],
       [{"kind": "c"}]),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
      "oneOf": [{"required": ["a"]}, {"required": ["b"]}]}, [{"a": 1}, {"b": 2}], [{}, {"a": 1, "b": 2}]),
    ({"oneOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 9}]}, [4, 10], [5, 9]),
    ({"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "null"}}, "required": ["a"],
      "if": {"properties": {"a": {"const": True}}}, "then": {"required": ["b"]}, "else": {"not": {"required": ["b"]}}},
     [{"a": True, "b": None}, {"a": False}], [{"a": True}, {"a": False, "b": None}]),
    ({"type": "object", "properties": {"a": {"const": 1}, "b": {"const": 2}}, "dependentRequired": {"a": ["b"]}},
     [{}, {"b": 2}, {"a": 1, "b": 2}], [{"a": 1}]),
    ({"type": "array", "items": {"enum": ["x", "y", "z"]}, "uniqueItems": True, "minItems": 2},
     [["x", "y"], ["z", "x", "y"]], [["x", "x"], ["x"]]),
    ({"type": "array", "items": {"type": "integer"}, "contains": {"const": 3}, "maxItems": 3}, [[3], [1, 3, 2]], [[], [1, 2]]),
    ({"type": "array", "prefixItems": [{"type": "string"}], "items": False, "minItems": 1}, [["a"]], [[], ["a", 1]]),
    ({"type": "object", "properties": {"a": True}, "patternProperties": {"^x": {"type": "integer"}},
       "additionalProperties": False},
     [{"x1": 1}, {"a": [], "x": 2}], [{"x1": "s"}, {"b": 1}]),
    ({"type": "object", "properties": {"ab": {"type": "integer"}}, "additionalProperties": {"type": "string"}},
     [{"ab": 1, "a": "s"}, {"abc": "s"}], [{"ab": "s"}, {"b": 1}]),
    ({"type": "object", "propertyNames": {"pattern": "^[a-z]{1,3}$"}, "minProperties": 1, "maxProperties": 2},
     [{"abc": 1}], [{}, {"abcd": 1}, {"a": 1, "b": 2, "c": 3}]),
    ({**TREE, "$ref": "#/$defs/t", "required": ["l"]}, [{"v": 1, "l": {"v": 2}}], [{"v": 1}, {"v": 1, "l": {}}]),
    ({"not": {"type": ["string", "object", "array"]}}, [1, None, True, 2.5], ["a", {}, []]),
    ({"const": {"b": [1, {"é": None}]}}, [{"b": [1, {"é": None}]}], [{}]),
    ({"type": "string", "format": "date"}, ["2024-02-29"], []),
    ({"type": "string", "pattern": "^a", "minLength": 7, "anyOf": [{"maxLength": 6}, {"maxLength": 8}]}, ["a234567"], ["a"]),
    ({"type": "string", "format": "uri", "maxLength": 2048}, ["https://www.example.com/articles/2024/05/how?utm=x"], []),
    ({"type": "string", "format": "email", "maxLength": 255}, ["jane.van.der.meulen@mail.example.co.uk"], []),
    ({"type": "string", "format": "regex"}, ["^[a-z]*$", "(a|b)+", r"\.js$", "^(?:x|y[0-9a-f]{2})?"], []),
    ({"type": "integer", "multipleOf": 86400}, [0, -86400, 172800], [86401, 43200]),
    ({"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 1}, [["a"]], [[], ["a", "a"]]),
    ({"type": "array", "uniqueItems": True, "prefixItems": [{"type": "integer"}, {"type": "string"}]}, [[], [1]],
     [[1, 1], ["a"]]),
    ({"type": "array", "uniqueItems": True, "contains": {"type": "integer"}}, [[5]], [[], ["a"], [5, 5]]),
    ({"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 7}, "uniqueItems": True}, [[], [7, 1]],
     [[1, 1], [8]]),
    ({"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 31}, "uniqueItems": True, "minItems": 2,
      "maxItems": 3}, [[1, 7], [3, 4, 31]], [[1], [1, 2, 3, 4], [2, 2]]),
    ({"type": "array", "items": {"enum": [f"c{i}" for i in range(300)]}, "uniqueItems": True},
     [[], ["c7", "c100"], [f"c{i}" for i in range(300)]], [["c1", "c1"]]),
    ({"type": "array", "items": {"type": "string", "pattern": "^(a|b|cd)$"}, "uniqueItems": True}, [["cd", "a"]], [["a", "a"]]),
]  # fmt: skip
CORPUS = json.loads((Path(__file__).parent / "data" / "schemas.json").read_text())
"""Schemas in the style of those that are met, by name: configurations, Kubernetes, news articles, tools, events."""
REFUSED = [
    (
        {"properties": {"a": {"type": "array", "items": {"type": "string"}, "uniqueItems": True, "minItems": 2}}},
        '"uniqueItems" at $.properties.a ',
    ),
    ({"oneOf": [{"format": "hostname"}, {"format": "ipv4"}]}, '"format" at $.oneOf[0] is not supported where hostname'),
    ({"items": {"pattern": r"\bx"}}, '"pattern" at $.items is not supported: a word boundary'),
    ({"anyOf": [{"$ref": "https://example.com/x"}]}, '"$ref" at $.anyOf[0] refers to'),
    ({"properties": {"a": {"unevaluatedProperties": False, "allOf": [{}]}}}, '"unevaluatedProperties" at $.properties.a'),
    ({"properties": {"a b": {"min_length": 1}}}, '"min_length" at $.properties["a b"] is none; "minLength" is'),
    ({"multipleOf": 1e-13}, '"multipleOf" at $ is not supported: 1e-13'),
    ({"required": True}, '"required" at $ must be a list of strings'),
    ({"type": 5}, '"type" at $ must be one of null'),
    ({"$ref": "#"}, '"$ref" at $ leads back to itself'),
    ({"type": "string", "enum": [1]}, "there is no value of this form"),
    (["x"], "$ must be a schema"),
]


def multiple(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """multipleOf by decimals; jsonschema divides floats, by which 0.07 is no multiple of 0.01."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and (Fraction(repr(value)) / Fraction(repr(step))).denominator != 1:
        yield ValidationError(f"{value} is no multiple of {step}")


@pytest.fixture(scope="module")
def compiler() -> Any:
    tokens = [chr(i) if i < 128 else f"<0x{i:02X}>" for i in range(256)] + ["</s>"]
    info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.BYTE_FALLBACK, vocab_size=257, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1)


def following(matcher: Any) -> list[int]:
    """The bytes that may come next, or `END`."""
    mask = xgrammar.allocate_token_bitmask(1, 257)
    matcher.fill_next_token_bitmask(mask)
    words = mask[0].tolist()
    return [token for token in range(257) if words[token // 32] >> token % 32 & 1]


def accepts(grammar: Any, value: Any) -> bool:
    matcher = xgrammar.GrammarMatcher(grammar)
    return matcher.accept_string(json.dumps(value, ensure_ascii=False)) and END in following(matcher)


def walk(grammar: Any, rng: random.Random) -> str | None:
    """A random answer; None: it became too long."""
    matcher, answer = xgrammar.GrammarMatcher(grammar), bytearray()
    while len(answer) < 600:
        tokens = following(matcher)
        assert tokens, bytes(answer)
        if END in tokens and (len(tokens) == 1 or len(answer) > 40 or rng.random() < 0.3):
            return answer.decode()
        tokens = [token for token in tokens if token != END]
        liked = [token for token in tokens if token in (b'"]}:,b1' if len(answer) > 40 else b'abc1"')]
        token = rng.choice(liked if liked and (len(answer) > 40 or rng.random() < 0.5) else tokens)
        assert matcher.accept_token(token)
        answer.append(token)
    return None


@pytest.mark.parametrize("case", range(len(CASES)), ids=[json.dumps(case[0])[:60] for case in CASES])
def test_answers_are_valid_and_valid_values_are_answers(compiler: Any, case: int) -> None:
    schema, valid, invalid = CASES[case]
    validator = validator_for(schema, default=Draft202012Validator)(schema)
    grammar = compiler.compile_grammar(to_grammar(json.dumps(schema)))
    for value in valid:
        assert validator.is_valid(value), "the test is wrong"
        assert accepts(grammar, value), value
    for value in invalid:
        assert not validator.is_valid(value), "the test is wrong"
        assert not accepts(grammar, value), value
    finished = [text for seed in range(12) if (text := walk(grammar, random.Random(seed))) is not None]
    for text in finished:
        assert validator.is_valid(json.loads(text)), text
    assert finished


@pytest.mark.parametrize("name", CORPUS)
def test_schemas_as_they_are_met_are_taken(compiler: Any, name: str) -> None:
    schema, valid = CORPUS[name]["schema"], CORPUS[name]["valid"]
    validator = extend(validator_for(schema, default=Draft202012Validator), {"multipleOf": multiple})(schema)
    grammar = compiler.compile_grammar(to_grammar(json.dumps(schema)))
    for value in valid:
        assert validator.is_valid(value), "the test is wrong"
        assert accepts(grammar, value), value
    for seed in range(3):
        if (text := walk(grammar, random.Random(seed))) is not None:
            assert validator.is_valid(json.loads(text)), text


@pytest.mark.parametrize("step", [0.01, 0.07, 1.1, 1e-6, 12.5, 3600, 1000000])
def test_multiples_are_those_of_decimals(step: float) -> None:
    language, rng = numbers(Bounds(multiples=(step,))), random.Random(0)
    for _ in range(300):
        value = Decimal(rng.randint(-999, 999)) / 100
        value = Decimal(repr(step)) * rng.randint(-(10**6), 10**6) if rng.random() < 0.5 else value
        assert language.accepts(format(value, "f")) == (value % Decimal(repr(step)) == 0), value


@pytest.mark.parametrize(("schema", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_honoured_is_refused_with_keyword_and_path(schema: Any, message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        to_grammar(json.dumps(schema))
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["{", '{"minimum": 1e400}', '{"minimum": NaN}', r'{"const": "\ud800"}', "[" * 5000])
def test_what_is_no_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"not JSON|too large|surrogate|nested|must be a schema"):
        to_grammar(text)


def test_cost_is_bounded_and_not_length() -> None:
    long = {"type": "object", "properties": {f"p{i}": {"type": "string", "description": "x" * 300} for i in range(300)}}
    assert len(json.dumps(long)) > 100_000
    assert to_grammar(json.dumps(long))
    with pytest.raises(ValueError, match="steps"):
        to_grammar(
            json.dumps({"allOf": [{"anyOf": [{"minimum": i}, {"maximum": 99 + i}, {"multipleOf": i}]} for i in range(1, 12)]})
        )


def test_names_of_a_schema_s_own_say_nothing() -> None:
    """Whoever switches a keyword off by an underscore, as JSONSchemaBench does, or adds an extension, means no keyword."""
    own = {"_uniqueItems": True, "_format": "int32", "x-kubernetes-preserve-unknown-fields": True, "x-enum": [1]}
    assert to_grammar(json.dumps({"type": "integer", **own})) == to_grammar('{"type": "integer"}')


@pytest.mark.parametrize("pattern", ["^(a|bc){1,300}$", "^(ab|abc|x[0-9]){1,250}$"])
def test_a_large_length_beside_a_pattern_makes_shorter_texts_not_a_refusal(compiler: Any, pattern: str) -> None:
    schema = {"type": "string", "pattern": pattern, "maxLength": 400}
    grammar = compiler.compile_grammar(to_grammar(json.dumps(schema)))
    assert accepts(grammar, "abc" if "x" in pattern else "abcbca")
    for seed in range(5):
        answer = walk(grammar, random.Random(seed))
        assert answer is None or Draft202012Validator(schema).is_valid(json.loads(answer))
