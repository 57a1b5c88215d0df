"""Answers with calls as models of each format write them, and what they mean."""

from __future__ import annotations

from typing import Any, NamedTuple

from solutions.serving.tool_calls.tool_format import Function

PARIS = {"city": "Paris", "unit": "c"}
FUNCTIONS = [
    Function(
        "get_weather",
        "The weather of a city.",
        {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": ["c", "f"]},
                "days": {"type": "integer"},
                "at": {"type": "object", "properties": {"lat": {"type": "number"}, "tags": {"type": "array"}}},
                "exact": {"type": "boolean"},
            },
            "required": ["city"],
        },
    ),
    Function("now"),
    Function("write-file", "Write a file.", {"type": "object", "properties": {"text": {"type": "string"}, "mode": {}}}),
]


class Transcript(NamedTuple):
    """An answer; what it says; its calls; whether all of them are whole."""

    text: str
    says: str
    calls: list[tuple[str, dict[str, Any]]]
    is_whole: bool = True


def tagged(*bodies: str) -> str:
    return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


WEATHER = '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "c"}}'
ODD = '{"name": "write-file", "arguments": {"text": "a \\"b\\" \\\\ {[}]\\n</tool_call> é 日本 😀 \\ud83d\\ude00"}}'
ODD_TEXT = {"text": 'a "b" \\ {[}]\n</tool_call> é 日本 😀 😀'}
WRITTEN = ("write-file", ODD_TEXT)
CALLED = ("get_weather", PARIS)
PLAIN = Transcript("Paris is a town. 2 < 3, {x} [y] 😀\n\n", "Paris is a town. 2 < 3, {x} [y] 😀\n\n", [], False)

TRANSCRIPTS: dict[str, list[Transcript]] = {
    "hermes": [
        PLAIN,
        Transcript(tagged(WEATHER), "", [CALLED]),
        Transcript(f"Ich schaue nach – 天気.\n\n{tagged(WEATHER)}\n", "Ich schaue nach – 天気.", [CALLED]),
        Transcript(tagged(WEATHER, '{"name": "now", "arguments": {}}', ODD), "", [CALLED, ("now", {}), WRITTEN]),
        Transcript('<tool_call>{"arguments":{"city":"Paris","unit":"c"},"name":"get_weather"}</tool_call>', "", [CALLED]),
        Transcript('<tool_call>\n{"name": "now"}\n</tool_call>', "", [("now", {})]),
        Transcript(f"{tagged(WEATHER)}\nDone.", "Done.", [CALLED]),
        Transcript("a <tool <tool_cal> b", "a <tool <tool_cal> b", [], False),
        Transcript("<tool_call>\nno JSON</tool_call> after", "<tool_call>\nno JSON</tool_call> after", [], False),
        Transcript('<tool_call>\n{"name": "no', '<tool_call>\n{"name": "no', [], False),
        Transcript("Hm <tool_c", "Hm <tool_c", [], False),
    ],
    "llama3_json": [
        PLAIN,
        Transcript(WEATHER.replace("arguments", "parameters"), "", [CALLED]),
        Transcript(f"<|python_tag|>{WEATHER.replace('arguments', 'parameters')}", "", [CALLED]),
        Transcript(f'{WEATHER}; {{"name": "now", "parameters": {{}}}};{ODD}', "", [CALLED, ("now", {}), WRITTEN]),
        Transcript('{"name":"now","parameters":{}}', "", [("now", {})]),
        Transcript('{"answer": 5}', '{"answer": 5}', [], False),
        Transcript('{"nam', '{"nam', [], False),
        Transcript("<|python_tag|>print(1)", "<|python_tag|>print(1)", [], False),
    ],
    "mistral": [
        PLAIN,
        Transcript(f"[TOOL_CALLS] [{WEATHER}]", "", [CALLED]),
        Transcript(f"[TOOL_CALLS][{WEATHER}, {ODD}]", "", [CALLED, WRITTEN]),
        Transcript('Let me see.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris", "unit": "c"}', "Let me see.", [CALLED]),
        Transcript('[TOOL_CALLS]get_weather{"city": "Paris", "unit": "c"}', "", [CALLED]),
        Transcript("[TOOL_CALLS]now[ARGS]{}[TOOL_CALLS]now[ARGS]{}", "", [("now", {})] * 2),
        Transcript(f'[TOOL_CALLS] [{WEATHER[:-1]}, "id": "abcdefghi"}}]', "", [CALLED]),
        Transcript("[TOOL_CALL] no", "[TOOL_CALL] no", [], False),
    ],
    "qwen3_coder": [
        PLAIN,
        Transcript(
            tagged(
                "<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=unit>\nc\n</parameter>\n</function>"
            ),
            "",
            [CALLED],
        ),
        Transcript(
            "Now.\n"
            + tagged(
                "<function=get_weather>\n<parameter=city>\n5\n</parameter>\n<parameter=days>\n5\n</parameter>\n"
                '<parameter=at>\n{"lat": 1.50, "tags": ["x"]}\n</parameter>\n<parameter=exact>\ntrue\n</parameter>\n'
                "</function>",
                "<function=now>\n</function>",
            ),
            "Now.",
            [("get_weather", {"city": "5", "days": 5, "at": {"lat": 1.5, "tags": ["x"]}, "exact": True}), ("now", {})],
        ),
        Transcript(
            tagged(
                '<function=write-file>\n<parameter=text>\n\n  a "b" \\ </param> <b>\té 日本 😀\n\n\n</parameter>\n'
                "<parameter=mode>\nas it is\n</parameter>\n</function>"
            ),
            "",
            [("write-file", {"text": '\n  a "b" \\ </param> <b>\té 日本 😀\n\n', "mode": "as it is"})],
        ),
        Transcript("<tool_call><function=now></function></tool_call>", "", [("now", {})]),
        Transcript("<tool_call>\n{}", "<tool_call>\n{}", [], False),
    ],
    "pythonic": [
        PLAIN,
        Transcript("[get_weather(city='Paris', unit=\"c\")]", "", [CALLED]),
        Transcript("[now(), get_weather(city='Paris',unit='c')]", "", [("now", {}), CALLED]),
        Transcript(
            "[get_weather(city='a, (b) \\'c\\' 日本 😀', days=-3, at={'lat': 1.5, 'tags': [None, True, (1, 2)]}, exact=False)]",
            "",
            [
                (
                    "get_weather",
                    {
                        "city": "a, (b) 'c' 日本 😀",
                        "days": -3,
                        "at": {"lat": 1.5, "tags": [None, True, [1, 2]]},
                        "exact": False,
                    },
                )
            ],
        ),
        Transcript('[get_weather(city="\\u00e9\\/", exact=true)]', "", [("get_weather", {"city": "é/", "exact": True})]),
        Transcript("[1, 2]", "[1, 2]", [], False),
        Transcript("[see here](http://x.y)", "[see here](http://x.y)", [], False),
    ],
    "json": [
        PLAIN,
        Transcript(WEATHER, "", [CALLED]),
        Transcript(f"{WEATHER}\n{ODD}\n", "", [CALLED, WRITTEN]),
        Transcript('{"name": "Ann", "age": 5}', '{"name": "Ann", "age": 5}', [], False),
    ],
}
