"""Thoughts as Seed-OSS writes them: in tags of its own, often without the opening one.

<seed:think>The user asks for a town.</seed:think>It is Paris.
"""

from __future__ import annotations

from .thinking import ThinkingFormat


class SeedOss(ThinkingFormat):
    name = "seed_oss"
    begin = "<seed:think>"
    end = "</seed:think>"
    always = True
