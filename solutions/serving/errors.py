"""Errors in OpenAI's format: one line that says what is wrong, a type, the field at fault, and a code.

Source: https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

import re

from pydantic import BaseModel

CONTEXT_LENGTH = "context_length_exceeded"
"""OpenAI's code for a request that does not fit into the context. LangChain and others then shorten the conversation."""
_CODES = {401: "invalid_api_key", 429: "rate_limit_exceeded"}
MAX_MESSAGE = 500
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029\ud800-\udfff]")
_ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class RequestError(Exception):
    """A request is refused: an HTTP status, one line that says why, the field at fault, and OpenAI's code if there is one."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code or ("invalid_value" if param and status == 400 else None)


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int | str
    """OpenAI's word for what is wrong, or the HTTP status where it has none."""


class ErrorBody(BaseModel):
    error: ErrorDetail


def error_body(message: str, status: int, param: str | None = None, code: str | None = None) -> ErrorBody:
    """The body of every answer that is not a success."""
    kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    param, word = None if param is None else _quoted(param), code or _CODES.get(status) or status
    return ErrorBody(error=ErrorDetail(message=_quoted(message), type=kind, param=param, code=word))


def _quoted(text: str) -> str:
    """A text that may quote a client, as one line that is not too long and holds only printable characters."""
    if len(text) > MAX_MESSAGE:
        text = text[:MAX_MESSAGE] + "…"
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def context_error(limit: int, num_tokens: int, prompt: str, asked: tuple[str, int] | None = None) -> RequestError:
    """Refuse a request that does not fit into the context, in OpenAI's words. LiteLLM searches for the first sentence,
    LangChain for the code (also within the text), and others read the numbers.

    Args:
        limit: of prompt and answer, in tokens. num_tokens: of the prompt. prompt: the field that holds it.
        asked: the field that limits the answer, and its tokens; None: the prompt alone is too long.
    """
    start = f"This model's maximum context length is {limit} tokens. However, "
    if asked is None:
        text = f"your {prompt} resulted in {num_tokens} tokens. Please reduce the length of the {prompt}. ({CONTEXT_LENGTH})"
        return RequestError(start + text, prompt, code=CONTEXT_LENGTH)
    field, count = asked
    text = f"you requested {num_tokens + count} tokens ({num_tokens} in the {prompt}, {count} in the completion)."
    advice = f"Please reduce the length of the {prompt} or {field}. ({CONTEXT_LENGTH})"
    return RequestError(f"{start}{text} {advice}", field, code=CONTEXT_LENGTH)
