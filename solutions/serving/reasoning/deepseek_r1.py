"""Thoughts as DeepSeek R1 and what was distilled from it write them: always, and often without the opening tag.

<think>The user asks for a town.</think>It is Paris.
"""

from __future__ import annotations

from .thinking import ThinkingFormat


class DeepSeekR1(ThinkingFormat):
    name = "deepseek_r1"
    begin = "<think>"
    end = "</think>"
    always = True
