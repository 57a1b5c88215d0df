"""How a chat request becomes a prompt, and what the model's answer to it will be made of."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ..core.text.chat_template import render_chat
from .errors import RequestError
from .openai_protocol import ChatCompletionRequest
from .parsed_replies import ParsedReply
from .reasoning.formats import FORMATS as THINKING
from .reasoning.formats import Reasoning
from .responses import ChatReply, Reply
from .template_fields import TemplateFields
from .tool_calls.calling import ToolCalling
from .tool_calls.formats import FORMATS
from .tool_calls.tool_format import Function

NO_REASONING = "thinking_token_budget needs a server that was started with --reasoning-parser"


class ChatReader:
    """Reads chats for one model.

    Args:
        tokenizer: the engine's, or None. calling: how the model calls tools. reasoning: how it thinks.
    """

    def __init__(self, tokenizer: Any, calling: ToolCalling, reasoning: Reasoning) -> None:
        self.tokenizer = tokenizer
        self.calling = calling
        self._reasoning = reasoning

    async def read(self, body: ChatCompletionRequest) -> tuple[list[int], Callable[..., Reply]]:
        """The prompt of a chat, and what makes the reply to it.

        Raises:
            RequestError: messages, tools or variables of the template are not valid, or this model has nothing to limit.
        """
        if body.thinking_token_budget is not None and self._reasoning.format is None and body.insists:
            raise RequestError(NO_REASONING, "thinking_token_budget")
        use = body.tool_use(self.calling, body.form if body.tools or body.functions else None)
        messages = body.conversation()
        last = messages[-1]
        said = _text(last["content"]) if last["role"] == "assistant" else ""
        prompt = await asyncio.to_thread(self.tokens, messages, [] if use is None else use.functions, body)
        thinking = self._reasoning.of(prompt, body.thinking_token_budget, said if body.continue_final_message else None)
        echo = said if body.echo else ""
        if use is None and thinking is None and not echo:
            return prompt, ChatReply
        body.answer_with(use, thinking)
        return prompt, partial(ParsedReply, use, thinking, echo)

    def bare(self, prompts: list[str | list[int]]) -> list[str | list[int]]:
        """Prompts as token ids, without what the tokenizer puts around a text."""
        if self.tokenizer is None:
            return prompts
        return [
            self.tokenizer.encode(prompt, add_special_tokens=False, verbose=False) if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]

    def tokens(self, messages: list[dict[str, Any]], functions: Sequence[Function], fields: TemplateFields) -> list[int]:
        """The conversation as token ids, by the model's chat template, with the functions that it may call.

        Raises:
            RequestError: the model has no chat template, or it does not take this conversation.
        """
        told, tools = self.calling.conversation(messages, functions)
        try:
            return render_chat(self.tokenizer, told, tools, fields.template_options)
        except ValueError as error:
            raise RequestError(f"{error}; /v1/completions takes any prompt", "messages") from error


def add_format_flags(group: argparse._ArgumentGroup) -> None:
    """Add the flags that say what the model's answers look like."""
    group.add_argument("--tool-call-parser", choices=("auto", *FORMATS), default="auto",
                       help="how the model writes calls of tools (default: auto, by its chat template)")  # fmt: skip
    group.add_argument("--enable-auto-tool-choice", action=argparse.BooleanOptionalAction, default=True,
                       help="let the model decide whether to call a tool (default: on)")  # fmt: skip
    group.add_argument("--reasoning-parser", choices=sorted(THINKING),
                       help="how the model writes its thoughts (default: they are a part of what it says)")  # fmt: skip


def formats_from_flags(args: argparse.Namespace) -> dict[str, Any]:
    """What `create_app` has to know of them."""
    return {
        "tool_call_parser": args.tool_call_parser, "enable_auto_tool_choice": args.enable_auto_tool_choice,
        "reasoning_parser": args.reasoning_parser,
    }  # fmt: skip


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
