"""Prompts that become one vector each: how it is made of the hidden states, and the sequence that ends with its prompt.

Such a request goes through the scheduler like any other: in chunks, beside others, with blocks of its own. It gets no token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .sampling_params import RequestOutputKind, SamplingParams
from .sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor

POOLING_TYPES = ("mean", "last", "cls")
NO_TEXTS = "this model is an encoder, which writes no text; it makes embeddings: /v1/embeddings, or LLM.embed"
SHORTEST = 1e-12
"""Vectors are divided by no less than this."""


@dataclass(frozen=True, slots=True)
class Pooling:
    """How a prompt's hidden states become one vector.

    Attributes:
        kind: "mean" of all tokens, that of the "last", or that of the first, "cls".
        normalize: divide the vector by its length.
        assumed: neither the model's files nor the settings ask for it, so the model may not be trained for embeddings.

    Raises:
        ValueError: there is no such kind.
    """

    kind: str = "mean"
    normalize: bool = True
    assumed: bool = False

    def __post_init__(self) -> None:
        if self.kind not in POOLING_TYPES:
            raise ValueError(f"pooling_type must be one of {', '.join(POOLING_TYPES)}; got {self.kind!r}")

    @classmethod
    def parse(cls, text: str) -> Pooling:
        """What ``--pooler-config`` says: ``{"pooling_type": "mean", "normalize": true}``, both as vLLM has them.

        Raises:
            ValueError: it is not that.
        """
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"--pooler-config is not valid JSON: {error}") from None
        known = isinstance(given, dict) and given.keys() <= {"pooling_type", "normalize"}
        if not known or not isinstance(given.get("normalize", True), bool):
            raise ValueError(f'--pooler-config must be like {{"pooling_type": "mean", "normalize": true}}, got {text}')
        return cls(str(given.get("pooling_type", "mean")).lower(), given.get("normalize", True))


ASSUMED = Pooling(assumed=True)
"""What is done where nobody says anything."""


@dataclass(slots=True)
class PoolingParams(SamplingParams):
    """Asks for a prompt's vector instead of an answer; what `SamplingParams` has on answers stays as it is.

    Attributes:
        pooling: how the vector is made; None: as for a model that says nothing of it.
        dimensions: keep only so many of its numbers, the first; None: all.

    Raises:
        ValueError: `dimensions` is less than 1.
    """

    temperature: float = 0.0
    max_tokens: int | None = 1
    detokenize: bool = False
    truncation_side: str = "right"
    output_kind: RequestOutputKind = RequestOutputKind.FINAL_ONLY
    pooling: Pooling | None = None
    dimensions: int | None = None

    def __post_init__(self) -> None:
        SamplingParams.__post_init__(self)
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions must be at least 1, got {self.dimensions}")

    @property
    def reads_prompt(self) -> bool:
        return self.how.kind != "last"

    @property
    def how(self) -> Pooling:
        """How the vector is made."""
        return self.pooling or ASSUMED


class PooledSequence(Sequence):
    """A prompt whose hidden states are pooled as its chunks are computed. It ends when all are: the token that the step then
    samples is nobody's.

    Attributes:
        params: `PoolingParams`.
    """

    __slots__ = ("_pooled",)

    params: PoolingParams

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._pooled: Tensor | None = None

    def append_token(self, token: int) -> bool:
        """End with the prompt's last chunk; `token` is dropped."""
        self.finish("stop")
        return True

    def take(self, hidden: Tensor) -> None:
        """Take in the hidden states [tokens, hidden] of the next chunk. A prompt that is computed anew, after a preemption,
        begins anew here, too."""
        kind, start = self.params.how.kind, self.num_computed_tokens
        if kind == "mean":
            total = hidden.float().sum(0)
            self._pooled = total if start == 0 or self._pooled is None else self._pooled + total
        elif kind == "last":
            self._pooled = hidden[-1].float().clone()  # the next step overwrites `hidden`
        elif start == 0:
            self._pooled = hidden[0].float().clone()

    def vector(self) -> NDArray[np.float32] | None:
        """The prompt's vector, once all chunks are taken in; None if it was aborted before."""
        if self._pooled is None or self.finish_reason != "stop":
            return None
        vector: NDArray[np.float32] = self._pooled.cpu().numpy()
        if self.params.how.kind == "mean":
            vector = vector / np.float32(self.num_prompt_tokens)
        vector = vector[: self.params.dimensions]
        if self.params.how.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), SHORTEST)
        return np.asarray(vector, np.float32)


@dataclass(frozen=True, slots=True)
class EmbeddingOutput:
    """A prompt's vector."""

    embedding: list[float]


@dataclass(frozen=True, slots=True)
class EmbeddingRequestOutput:
    """What `LLM.embed` returns for a prompt; names are vLLM's."""

    request_id: str
    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    finished: bool = True


def embedding_output(request_id: str, vector: NDArray[np.float32] | None, token_ids: list[int]) -> EmbeddingRequestOutput:
    """A finished prompt's output, of what its request gave."""
    assert vector is not None  # its params asked for one
    return EmbeddingRequestOutput(request_id, EmbeddingOutput(vector.tolist()), token_ids)
