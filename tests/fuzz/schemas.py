"""Random JSON schemas: random answers of their grammars are valid, and values that a schema was made for are answers.

Multiples are checked as decimals: the jsonschema library divides floats, by which 0.07 is no multiple of 0.01.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import xgrammar
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from solutions.core.grammar.json_schema import to_grammar

END = 256
NAMES = ("a", "b", "id", "x-y", 'q"', "é")
WORDS = ("", "a", "ab", "b1", "x-1", 'say "hi"', "C:\\a", "l\nm", "é😀")
PATTERNS = ("^a", "b$", "^[a-z]*$", "[0-9]", '^say "[a-z]{2}"$', r"^C:\\[a-z]$", r"^\S*$", "^[^a]*$", "^(a|b1)?$")
STEPS = (0.01, 0.1, 0.25, 0.5, 1, 2, 3, 7, 10)
REFUSALS = ("the keyword ", "there is no value of this form", "an array must have", "an object at", '"contains"', "its grammar",
            "it takes more", "bounds of")  # fmt: skip


def is_multiple(value: float, step: float) -> bool:
    """Whether it is, as decimals."""
    return (Fraction(repr(value)) / Fraction(repr(step))).denominator == 1


def multiple(validator: Any, step: Any, value: Any, schema: Any) -> Iterator[ValidationError]:
    """The keyword multipleOf by decimals."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not is_multiple(value, step):
        yield ValidationError(f"{value} is no multiple of {step}")


Validator = extend(Draft202012Validator, {"multipleOf": multiple})


@functools.cache
def compiler() -> xgrammar.GrammarCompiler:
    """For a vocabulary of the 256 bytes and an end."""
    tokens = [chr(i) if i < 128 else f"<0x{i:02X}>" for i in range(256)] + ["</s>"]
    info = xgrammar.TokenizerInfo(tokens, vocab_type=xgrammar.VocabType.BYTE_FALLBACK, vocab_size=257, stop_token_ids=[END])
    return xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)


def following(matcher: xgrammar.GrammarMatcher) -> list[int]:
    """The bytes that may come next, or `END`."""
    mask = xgrammar.allocate_token_bitmask(1, 257)
    matcher.fill_next_token_bitmask(mask)
    words = mask[0].tolist()
    return [token for token in range(257) if words[token // 32] >> token % 32 & 1]


def walk(grammar: xgrammar.CompiledGrammar, rng: random.Random) -> str | None:
    """A random answer; None: it became too long."""
    matcher, answer = xgrammar.GrammarMatcher(grammar), bytearray()
    for _ in range(300):
        tokens = following(matcher)
        assert tokens, f"nothing may follow {bytes(answer)!r}"
        short = len(answer) > 30
        if END in tokens and (len(tokens) == 1 or short or rng.random() < 0.3):
            return answer.decode()
        tokens = [token for token in tokens if token != END]
        liked = [token for token in tokens if token in (b'"]}:1' if short else b'abc1"')]
        answer.append(rng.choice(liked if liked and (short or rng.random() < 0.5) else tokens))
        assert matcher.accept_token(answer[-1])
    return None


def some_value(rng: random.Random, depth: int = 2) -> Any:
    """Any value, members in the order of `NAMES`."""
    kind = rng.randrange(7 if depth else 5)
    if kind < 2:
        return rng.choice((None, True, False))
    if kind == 2:
        return rng.choice((rng.randint(-20, 20), rng.randint(-2000, 2000) / 100, 0))
    if kind < 5:
        return rng.choice(WORDS)
    if kind == 5:
        return [some_value(rng, depth - 1) for _ in range(rng.randrange(4))]
    return {name: some_value(rng, depth - 1) for name in NAMES if rng.random() < 0.4}


def some_schema(rng: random.Random, depth: int = 3) -> Any:
    """Any schema, of the keywords of one type for the most part."""
    if rng.random() < 0.06:
        return rng.choice((True, {}))
    inner = functools.partial(some_schema, rng, depth - 1)
    kinds = ["number", "string", "array", "object"] if depth else ["number", "string"]
    kind = rng.choice([*kinds, "any"])
    schema: dict[str, Any] = {}
    if rng.random() < 0.8 and kind != "any":
        schema["type"] = rng.choice([kind, [kind, "null"], "integer" if kind == "number" else kind])
    could: dict[str, Any] = {
        "number": {"minimum": lambda: rng.randint(-9, 9), "maximum": lambda: rng.randint(0, 250) / 10,
                   "exclusiveMinimum": lambda: rng.randint(-9, 3), "multipleOf": lambda: rng.choice(STEPS)},
        "string": {"minLength": lambda: rng.randint(0, 3), "maxLength": lambda: rng.randint(2, 40),
                   "pattern": lambda: rng.choice(PATTERNS)},
        "array": {"minItems": lambda: rng.randint(0, 2), "maxItems": lambda: rng.randint(1, 4), "items": inner,
                  "prefixItems": lambda: [inner() for _ in range(rng.randint(1, 2))], "contains": inner,
                  "uniqueItems": lambda: True},
        "object": {"properties": lambda: {n: inner() for n in NAMES if rng.random() < 0.4},
                   "required": lambda: rng.sample(NAMES, rng.randint(0, 2)), "minProperties": lambda: rng.randint(0, 2),
                   "maxProperties": lambda: rng.randint(1, 4), "additionalProperties": lambda: rng.choice((False, inner())),
                   "patternProperties": lambda: {rng.choice(("^x", "a", "^[a-c]+$")): inner()},
                   "propertyNames": lambda: {"pattern": rng.choice(PATTERNS)},
                   "dependentRequired": lambda: {rng.choice(NAMES): [rng.choice(NAMES)]}},
        "any": {"enum": lambda: [some_value(rng) for _ in range(3)], "const": lambda: some_value(rng)},
    }[kind]  # fmt: skip
    for keyword, make in could.items():
        if rng.random() < 0.35:
            schema[keyword] = make()
    if depth and rng.random() < 0.25:
        keyword = rng.choice(("anyOf", "oneOf", "allOf", "not", "if", "$ref"))
        if keyword == "$ref":
            schema |= {"$ref": "#/$defs/d"}
        elif keyword in ("not", "if"):
            schema |= {keyword: inner(), **({"then": inner(), "else": inner()} if keyword == "if" else {})}
        else:
            schema[keyword] = [inner() for _ in range(2)]
    return schema


def schema_for(value: Any, rng: random.Random) -> dict[str, Any]:
    """A schema under which a value is valid, written as the grammar writes it."""
    schema: dict[str, Any] = {}
    if rng.random() < 0.12:
        return {"enum": rng.sample([value, "other", 5], 3)} if value not in ("other", 5) else {"const": value}
    if value is None or isinstance(value, bool):
        schema["type"] = ["null", "boolean"]
    elif isinstance(value, int | float):
        steps = [step for step in STEPS if is_multiple(value, step)]
        kind = "integer" if isinstance(value, int) else "number"
        schema = {"type": kind, "minimum": value - rng.choice((0, 1, 0.5)), "maximum": value + rng.choice((0, 3))}
        schema |= {"multipleOf": rng.choice(steps)} if steps and rng.random() < 0.5 else {}
    elif isinstance(value, str):
        schema = {"type": ["string", "null"], "minLength": len(value), "maxLength": len(value) + rng.choice((0, 2, 300))}
        fits = [pattern for pattern in PATTERNS if Validator({"pattern": pattern}).is_valid(value)]
        schema |= {"pattern": rng.choice(fits)} if fits and rng.random() < 0.5 else {}
    elif isinstance(value, list):
        schema = {"type": "array", "minItems": len(value) and rng.choice((0, 1)), "maxItems": len(value) + rng.randrange(3)}
        if value and rng.random() < 0.5:
            schema["prefixItems"] = [schema_for(one, rng) for one in value]
        elif value:
            schema["items"] = {"anyOf": [schema_for(one, rng) for one in value]}
    else:
        others = {name: True for name in NAMES if name not in value and rng.random() < 0.3}
        made = {name: schema_for(one, rng) for name, one in value.items()} | others
        schema = {"type": "object", "properties": {name: made[name] for name in NAMES if name in made}}
        schema["required"] = [name for name in value if rng.random() < 0.5]
        schema |= {"minProperties": len(value)} if rng.random() < 0.2 else {}
        schema |= {"additionalProperties": rng.choice((False, {"type": "string"}))} if rng.random() < 0.4 else {}
    if rng.random() < 0.15:
        return {"anyOf": rng.sample([{"const": "never"}, schema], 2)}
    return {"allOf": [schema]} if rng.random() < 0.1 else schema


def grammar_of(schema: Any) -> xgrammar.CompiledGrammar | None:
    """The compiled grammar, or None where the schema is refused by name."""
    try:
        text = to_grammar(json.dumps(schema))
    except ValueError as error:
        if not str(error).startswith(REFUSALS):
            raise
        return None
    return compiler().compile_grammar(text)


def run(rng: random.Random) -> None:
    """One schema, and one that is made for a value.

    Raises:
        AssertionError: an answer is not valid, or the value is no answer.
    """
    if isinstance(schema := some_schema(rng), dict):
        schema["$defs"] = {"d": some_schema(rng, 1)}
        if "$ref" in json.dumps(schema["$defs"]):
            schema["$defs"] = {"d": {"type": ["string", "integer"]}}
    if (grammar := grammar_of(schema)) is not None:
        for _ in range(4):
            answer = walk(grammar, rng)
            if answer is not None:
                assert Validator(schema).is_valid(json.loads(answer)), f"{answer} under {json.dumps(schema)}"
    value = some_value(rng, 3)
    schema = schema_for(value, rng)
    assert Validator(schema).is_valid(value), "the case is wrong"
    grammar = grammar_of(schema)
    assert grammar is not None, f"{json.dumps(schema)} is refused"
    matcher, text = xgrammar.GrammarMatcher(grammar), json.dumps(value, ensure_ascii=False)
    taken = matcher.accept_string(text) and END in following(matcher)
    assert taken, f"{text} is not taken under {json.dumps(schema)}"
