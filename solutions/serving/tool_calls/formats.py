"""The formats by name, and which of them a model's template calls for."""

from __future__ import annotations

from typing import Any

from .hermes import Hermes
from .json_lines import JsonLines
from .llama3_json import Llama3Json
from .mistral import Mistral
from .pythonic import Pythonic
from .qwen3_coder import Qwen3Coder
from .tool_format import Function, ToolFormat

FORMATS: dict[str, type[ToolFormat]] = {
    each.name: each for each in (Hermes, Llama3Json, Mistral, Qwen3Coder, Pythonic, JsonLines)
}
SIGNS: dict[str, type[ToolFormat]] = {
    "<function=": Qwen3Coder,
    "<tool_call>": Hermes,
    "[TOOL_CALLS]": Mistral,
    "[func_name1(": Pythonic,
    "<|python_tag|>": Llama3Json,
    '"parameters": ': Llama3Json,
}
"""What a template has in it → the format that its model writes, the surest sign first."""
PROBE = Function("zqtool", "What it is for.")


def writes_tools(tokenizer: Any) -> bool:
    """Whether a tokenizer's chat template tells the model of tools."""
    try:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Hello"}], tools=[PROBE.as_tool()], add_generation_prompt=True, tokenize=False
        )
    except Exception:  # a template is a program, and there may be none
        return False
    return PROBE.name in prompt


def format_of(tokenizer: Any) -> type[ToolFormat] | None:
    """The format that a chat template asks for, if it is a known one."""
    text = repr(tokenizer.chat_template)  # of several templates, a dictionary
    return next((made for sign, made in SIGNS.items() if sign in text), None)
