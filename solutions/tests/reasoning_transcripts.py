"""Answers that think as models of each format write them, and what they mean; and Qwen3's own chat template."""

from __future__ import annotations

from typing import NamedTuple


class Transcript(NamedTuple):
    """An answer; its thoughts; what it says; whether its prompt has opened the thoughts."""

    text: str
    thought: str
    says: str
    is_open: bool = False


ODD = "\nDer Nutzer – ユーザー 😀 – sagt <thin </thin </ think> < /think>.\n"
R1 = [
    Transcript("Okay, Paris.</think>\n\nIt is Paris.", "Okay, Paris.", "\n\nIt is Paris."),
    Transcript("<think>\nOkay, Paris.\n</think>\n\nIt is Paris.", "\nOkay, Paris.\n", "\n\nIt is Paris."),
    Transcript("Okay, it never ends é", "Okay, it never ends é", ""),
    Transcript(f"<think>{ODD}</think>{ODD}", ODD, ODD),
    Transcript("</think>Paris </think> <think>", "", "Paris </think> <think>"),
    Transcript("", "", ""),
]
QWEN = [
    Transcript("It is Paris.", "", "It is Paris."),
    Transcript("<think>\nOkay, Paris.\n</think>\n\nIt is Paris.", "\nOkay, Paris.\n", "\n\nIt is Paris."),
    Transcript("\nOkay, Paris.\n</think>\n\nIt is Paris.", "\nOkay, Paris.\n", "\n\nIt is Paris.", True),
    Transcript("<think>\nOkay, it never ends é", "\nOkay, it never ends é", ""),
    Transcript("Okay, it never ends 😀</think", "Okay, it never ends 😀</think", "", True),
    Transcript("<think></think>Paris", "", "Paris"),
    Transcript("<think>\n\n</think>\n\n", "\n\n", "\n\n"),
    Transcript(f"<think>{ODD}</think>{ODD}", ODD, ODD),
    Transcript("A <think>tag</think> within", "", "A <think>tag</think> within"),
    Transcript("<thin", "", "<thin"),
    Transcript("<thinking>no</think>", "", "<thinking>no</think>"),
    Transcript("<think>a<think>b</think>c</think>d", "a<think>b", "c</think>d"),
]


def other(transcripts: list[Transcript], begin: str, end: str) -> list[Transcript]:
    """The same with other marks."""
    return [
        Transcript(*(text.replace("<think>", begin).replace("</think>", end) for text in one[:3]), one.is_open)
        for one in transcripts
    ]


GRANITE = [
    *other(QWEN, "Here is my thought process:", "Here is my response:"),
    *other(QWEN, "Here's my thought process:", "Here's my response:"),
    Transcript("Here's my thought process: Paris.\n\nHere is my response: Paris.", " Paris.\n\n", " Paris."),
    Transcript("Here is my thought process: Here is my Here's my response: a", " Here is my ", " a"),
    Transcript("Here is my response: a", "", "Here is my response: a"),
]
GLM = [
    *(one for one in QWEN if "</think" in one.text),
    *other([one for one in QWEN if one.text.startswith("<think>")], "\n<think>", "</think>"),
    Transcript("\nIt is Paris.", "", "\nIt is Paris."),
    Transcript("\n<thin", "", "\n<thin"),
]
TRANSCRIPTS: dict[str, list[Transcript]] = {
    "deepseek_r1": R1,
    "glm45": GLM,
    "granite": GRANITE,
    "mistral": other(QWEN, "[THINK]", "[/THINK]"),
    "qwen3": QWEN,
    "seed_oss": other(R1, "<seed:think>", "</seed:think>"),
}

QWEN3_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\nYou may call one or more functions to assist with the user query.\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object within <tool_call></tool_call> XML tags.<|im_end|>\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}
            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning_content.strip('\n') + '\n</think>\n\n' }}
            {{- content.lstrip('\n') }}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\n' + content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls or [] %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.function.name + '", "arguments": ' }}
            {{- tool_call.function.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
"""As in Qwen/Qwen3-0.6B's tokenizer_config.json, with fewer words about tools."""
