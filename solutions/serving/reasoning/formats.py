"""The formats by name, and how a server's model thinks.

An answer such as ``<think>The user asks for a town.</think>It is Paris.`` has other marks in some families. Names and marks are
vLLM's; what a format does beyond its marks is `ThinkingFormat`.
"""

from __future__ import annotations

from typing import Any

from .thinking import Thinking, ThinkingFormat

BEGINS, ENDS = ("<think>",), ("</think>",)
TAGS = ThinkingFormat(BEGINS, ENDS)
"""The model writes the first tag, or its template does, or there are no thoughts."""
OPEN_TAGS = ThinkingFormat(BEGINS, ENDS, always=True)
FORMATS: dict[str, ThinkingFormat] = {
    "deepseek_r1": OPEN_TAGS,
    "deepseek_v3": TAGS,
    "glm45": ThinkingFormat(("<think>", "\n<think>"), ENDS),
    "granite": ThinkingFormat(
        ("Here is my thought process:", "Here's my thought process:"), ("Here is my response:", "Here's my response:")
    ),
    "holo2": TAGS,
    "mimo": TAGS,
    "minimax_m2": OPEN_TAGS,
    "mistral": ThinkingFormat(("[THINK]",), ("[/THINK]",), has_special_tokens=True),
    "nemotron_v3": OPEN_TAGS,
    "olmo3": TAGS,
    "qwen3": TAGS,
    "seed_oss": ThinkingFormat(("<seed:think>",), ("</seed:think>",), always=True),
    "step3": OPEN_TAGS,
}
TAIL = 64
"""Tokens at a prompt's end in which a template may have begun or ended the thinking."""


class Reasoning:
    """How a server's model thinks.

    Args:
        tokenizer: the engine's, or None. parser: a name of `FORMATS`; None: the model does not think.
    """

    def __init__(self, tokenizer: Any, parser: str | None = None) -> None:
        self._tokenizer = tokenizer
        self.format = None if parser is None else FORMATS[parser]

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
            thinks = begun.startswith(known.begins) and not any(mark in begun for mark in known.ends)
            return Thinking(known, True, limit) if thinks else None
        end = self._tokenizer.decode(prompt[-TAIL:], skip_special_tokens=False).rstrip()
        return None if end.endswith(known.ends) else Thinking(known, known.always or end.endswith(known.begins), limit)
