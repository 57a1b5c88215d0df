"""Thoughts as Olmo 3 writes them: in tags that its template opens.

<think>The user asks for a town.</think>It is Paris.
"""

from __future__ import annotations

from .thinking import ThinkingFormat


class Olmo3(ThinkingFormat):
    name = "olmo3"
    begin = "<think>"
    end = "</think>"
