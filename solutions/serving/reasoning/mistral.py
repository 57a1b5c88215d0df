"""Thoughts as Magistral writes them: between special tokens.

[THINK]The user asks for a town.[/THINK]It is Paris.
"""

from __future__ import annotations

from .thinking import ThinkingFormat


class Mistral(ThinkingFormat):
    name = "mistral"
    begin = "[THINK]"
    end = "[/THINK]"
    has_special_tokens = True
