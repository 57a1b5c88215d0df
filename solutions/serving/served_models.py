"""What a request's ``model`` may be: names of the model, and of the adapters that are loaded for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..batching.pooling import NO_TEXTS
from .errors import RequestError
from .openai_answers import ModelCard

if TYPE_CHECKING:
    from ..core.engine import LLMEngine


class ServedModels:
    """The models of a server.

    Args:
        engine: whose adapters come and go. names: of its model.

    Raises:
        ValueError: an adapter has a name of the model.
    """

    def __init__(self, engine: LLMEngine, names: Sequence[str]) -> None:
        self.engine = engine
        root, self._length = engine.config.model, engine.limits.max_model_len
        self._cards = {name: ModelCard(id=name, root=root, max_model_len=self._length) for name in names}
        for name in engine.adapters.loaded:
            self.check_new(name)

    def cards(self) -> list[ModelCard]:
        """All models, those of adapters with their parent."""
        parent = next(iter(self._cards))
        adapters = [
            ModelCard(
                id=name, created=loaded.created, root=str(loaded.folder), parent=parent, max_model_len=self._length
            )
            for name, loaded in list(self.engine.adapters.loaded.items())  # a copy: the engine's thread changes it
        ]  # fmt: skip
        return [*self._cards.values(), *adapters]

    def find(self, name: str) -> ModelCard:
        """The model of this name.

        Raises:
            RequestError: there is none.
        """
        cards = {card.id: card for card in self.cards()}
        if name not in cards:
            there = ", ".join(cards)
            raise RequestError(f"model {name!r} does not exist; this server has {there}", "model", 404, "model_not_found")
        return cards[name]

    def find_writer(self, name: str) -> ModelCard:
        """The same for a request that wants a text.

        Raises:
            RequestError: there is none, or it is an encoder.
        """
        if self.engine.model_config.is_encoder:
            raise RequestError(NO_TEXTS, "model")
        return self.find(name)

    def adapter(self, name: str) -> str | None:
        """The adapter that a model of this name is computed by, if it is no name of the model itself. Whether it is loaded,
        the engine says when it takes the request."""
        return None if name in self._cards else name

    def check_new(self, name: str) -> None:
        """See that an adapter may have this name.

        Raises:
            ValueError: it is one of the model.
        """
        if name in self._cards:
            raise ValueError(f"the adapter {name!r} has a name of the model that it is for; give it another one")
