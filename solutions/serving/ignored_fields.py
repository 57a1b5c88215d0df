"""Fields that no request has: a tolerant server answers as if they were not there, and says so in a header and in its log.

Clients send what other servers understand, and what comes with tomorrow's API. An answer without such a field is better than
none. Fields that are known to change the answer are still refused by name (`CHANGING`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from .json_body import JsonRequest
from .openai_fields import UNSUPPORTED

logger = logging.getLogger(__name__)

HEADER = "X-Ignored-Fields"
EMPTY = '""'
"""What a name of no characters is called."""
MAX_NAME = 100
"""Characters of one name in the header."""
MAX_HEADER = 1000
"""Characters of all names. Some proxies refuse an answer whose headers take more than a few kilobytes."""
CHANGING = UNSUPPORTED.keys() | {
    "echo", "max_completion_tokens", "messages", "prompt", "top_logprobs",
}  # fmt: skip
"""What `UNSUPPORTED` has, and fields of one kind of request, which mean something that another kind cannot do."""

Path = tuple[int | str, ...]
"""Where a field is in a body: names of fields and indices of lists."""


class TolerantRoute(APIRoute):
    """A route that drops unknown fields from a body (read by `read_json`) and names them in the answer's `HEADER`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler, called again without the fields that it did not know."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            request = JsonRequest(request.scope, request.receive)
            ignored: dict[str, None] = {}
            while True:
                try:
                    response = await handle(request)
                    break
                except RequestValidationError as error:  # the route itself has not been called
                    dropped = [path for path in unknown_fields(error) if drop(await request.json(), path)]
                    if not dropped:
                        raise
                    ignored |= dict.fromkeys(map(name_of, dropped))
            if ignored:
                response.headers[HEADER] = listed(ignored)
                _log(request.scope["path"], listed(ignored))
            return response

        return handler


def unknown_fields(error: RequestValidationError) -> list[Path]:
    """Where a body has fields that may be ignored."""
    paths = [tuple(each["loc"][1:]) for each in error.errors() if each["type"] == "extra_forbidden"]
    return [path for path in paths if path[-1] not in CHANGING]


def drop(body: Any, path: Path) -> bool:
    """Take a field out of a body; False if there is none at this path."""
    for key in path[:-1]:
        try:
            body = body[key]
        except (KeyError, IndexError, TypeError):
            return False
    if not isinstance(body, dict) or path[-1] not in body:
        return False
    del body[path[-1]]
    return True


def name_of(path: Path) -> str:
    """A field's path for a header, ``messages[].name``: the same for all members of a list, and in printable ASCII. All other
    characters, and those that mean something in a list of names, are percent-encoded."""
    text = "".join("[]" if isinstance(key, int) else f".{quote(key, safe='') or EMPTY}" for key in path).removeprefix(".")
    return text if len(text) <= MAX_NAME else text[:MAX_NAME] + "..."


def listed(names: Iterable[str]) -> str:
    """The names as a header's value; those behind `MAX_HEADER` characters are counted instead."""
    names, length = list(names), 0
    for index, name in enumerate(names):
        length += len(name) + 2
        if length > MAX_HEADER:
            return f"{', '.join(names[:index])}, and {len(names) - index} more"
    return ", ".join(names)


@lru_cache(maxsize=1024)
def _log(path: str, names: str) -> None:
    """Once for each combination: whoever sends an unknown field sends it always."""
    logger.warning("%s ignores unknown fields: %s (said once; --strict refuses them)", path, names)
