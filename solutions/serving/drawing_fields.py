"""The fields of a request that say how tokens are drawn, when a text ends and who goes first, by vLLM's names.

Completions, chats and responses share them. Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import BeforeValidator, Field, Strict, field_validator

from .openai_fields import Bool, Int, Number, Request, Strings, without_nulls


class DrawingFields(Request):
    """The fields; None is "not set" throughout."""

    top_k: Int | None = None
    min_p: Number | None = None
    stop: Strings | None = None
    seed: Annotated[int, Strict(), Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[str, Number], BeforeValidator(without_nulls)] | None = None
    """Token id, as a string, → bias."""
    min_tokens: Int | None = None
    ignore_eos: Bool | None = None
    stop_token_ids: list[Int] | None = None
    allowed_token_ids: list[Int] | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: Bool | None = None
    include_stop_str_in_output: Bool | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    """Prompts share cached prefixes only with prompts of the same salt."""
    priority: Int | None = None
    """Lower goes first, if the engine schedules by priority."""

    @field_validator("logit_bias")
    @classmethod
    def _check_logit_bias(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for key in bias or ():
            if not re.fullmatch(r"[0-9]{1,9}", key):
                raise ValueError(f"keys must be token ids, got {key!r}")
        return bias
