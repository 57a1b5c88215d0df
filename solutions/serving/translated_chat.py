"""A chat completion that was made from a request of another API."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Self

from pydantic import ValidationError

from .errors import RequestError
from .openai_fields import describe_validation_error
from .openai_protocol import ChatCompletionRequest

_PLACE = re.compile(r"^messages\b[^:]*: ")


class TranslatedChat(ChatCompletionRequest):
    """Its errors name the other API's fields. Messages have other places there, so an error in one names them all."""

    limit_field: ClassVar[str] = "max_tokens"
    names: ClassVar[dict[str, str]] = {}
    """Fields of a chat → what the other API calls them, where it is not the same."""

    @property
    def token_limit(self) -> tuple[str, int | None]:
        return self.limit_field, self.max_completion_tokens

    @classmethod
    def read(cls, body: dict[str, Any]) -> Self:
        """A chat of these fields, as far as they are set.

        Raises:
            RequestError: one is not valid.
        """
        try:
            return cls.model_validate({name: value for name, value in body.items() if value is not None})
        except ValidationError as error:
            first: Any = error.errors()[0]
            message, param = describe_validation_error({**first, "loc": ("body", *first["loc"])})
            raise cls._renamed(RequestError(message, param)) from None

    def refusal(self, error: ValueError) -> RequestError:
        return self._renamed(super().refusal(error))

    def conversation(self) -> list[dict[str, Any]]:
        try:
            return super().conversation()
        except RequestError as error:
            raise self._renamed(error) from None

    @classmethod
    def _renamed(cls, error: RequestError) -> RequestError:
        if error.param in cls.names:
            name = cls.names[error.param]
            return RequestError(str(error).replace(error.param, name), name)
        if error.param is None or not error.param.startswith("messages"):
            return error
        return RequestError(f"{cls.prompt_field}: {_PLACE.sub('', str(error))}", cls.prompt_field)
