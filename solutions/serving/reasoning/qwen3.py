"""Thoughts as Qwen3 and models like it write them: in tags that its template, or the model, opens; or none at all.

<think>The user asks for a town.</think>It is Paris.
"""

from __future__ import annotations

from .thinking import ThinkingFormat


class Qwen3(ThinkingFormat):
    name = "qwen3"
    begin = "<think>"
    end = "</think>"
