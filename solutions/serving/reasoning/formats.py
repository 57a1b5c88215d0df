"""The formats by name, and how a server's model thinks."""

from __future__ import annotations

from typing import Any

from .deepseek_r1 import DeepSeekR1
from .mistral import Mistral
from .olmo3 import Olmo3
from .qwen3 import Qwen3
from .seed_oss import SeedOss
from .thinking import Thinking, ThinkingFormat

FORMATS: dict[str, type[ThinkingFormat]] = {each.name: each for each in (DeepSeekR1, Mistral, Olmo3, Qwen3, SeedOss)}
TAIL = 64
"""Tokens at a prompt's end in which a template may have begun or ended the thinking."""


class Reasoning:
    """How a server's model thinks.

    Args:
        tokenizer: the engine's, or None. parser: a name of `FORMATS`; None: the model does not think.
    """

    def __init__(self, tokenizer: Any, parser: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.format = None if parser is None else FORMATS[parser]()

    def of(self, prompt: list[int], budget: int | None, begun: str | None = None) -> Thinking | None:
        """How the answers to a prompt may think; None: they do not.

        Args:
            budget: tokens of thoughts; None or -1: any number. begun: the beginning of the answer, where the prompt has one.
        """
        known = self.format
        if known is None:
            return None
        limit = None if budget == -1 else budget
        if begun is not None:
            return Thinking(known, True, limit) if begun.startswith(known.begin) and known.end not in begun else None
        end = self._tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
        return None if end.endswith(known.end) else Thinking(known, known.always or end.endswith(known.begin), limit)
