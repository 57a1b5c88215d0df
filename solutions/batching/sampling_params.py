"""How one request is decoded (`SamplingParams`), and the form that its answer must have (`StructuredOutput`)."""

from __future__ import annotations

import enum
import math
import re
import sys
from dataclasses import dataclass, field
from typing import Any


class RequestOutputKind(enum.Enum):
    """What each output of a running request holds."""

    CUMULATIVE = 0
    """Everything so far."""
    DELTA = 1
    """What is new since the last output."""
    FINAL_ONLY = 2
    """Nothing until the request has finished, then everything."""


MAX_LOGPROBS = 20
"""Most alternatives a request may ask for at a position (the OpenAI limit)."""
STRUCTURES = ("json", "json_object", "regex", "choice", "grammar", "structural_tag")
MAX_DEFINITION = {"json": 4 << 20, "structural_tag": 32 << 20, "choice": 1 << 20, "regex": 16_384, "grammar": 1 << 17}
"""Characters that may describe a form. What bounds a schema is its cost, see `json_schema`; this only bounds reading it."""


@dataclass(frozen=True, slots=True)
class StructuredOutput:
    """The form that an answer must have.

    Attributes:
        kind: one of `STRUCTURES`.
        definition: a JSON schema as text; nothing for "json_object"; a regular expression; a JSON list of texts for "choice";
            a grammar in XGrammar's EBNF, whose first rule is ``root``; a structural tag in XGrammar's form, as JSON.
    """

    kind: str
    definition: str = ""

    def __post_init__(self) -> None:
        if self.kind not in STRUCTURES:
            raise ValueError(f"structured_output must be one of {', '.join(STRUCTURES)}; got {self.kind!r}")
        if not isinstance(self.definition, str) or (not self.definition and self.kind != "json_object"):
            raise ValueError(f"structured_output: a {self.kind} must be a text that is not empty")
        most = MAX_DEFINITION.get(self.kind, 1 << 14)
        if len(self.definition) > most:
            size = f"{len(self.definition)} characters, and at most {most} may be"
            raise ValueError(f"structured_output: the {self.kind} has {size}")


@dataclass(slots=True)
class SamplingParams:
    """How one request is decoded. Names, defaults and meaning are vLLM's.

    Raises:
        ValueError: a value is out of range; the message names the field and what it may be.
    """

    n: int = 1
    """Sequences to generate from the prompt; they share the prompt's KV blocks."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 or -1: all tokens."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    """Makes the request's samples independent of whatever else is in the batch."""
    stop: list[str] = field(default_factory=list)
    """Strings that end generation; left out of the text unless `include_stop_str_in_output`."""
    stop_until: str | None = None
    """A regular expression; behind what it matches first, such as the beginning of a call, stop strings end nothing."""
    stop_token_ids: list[int] = field(default_factory=list)
    bad_words: list[str] = field(default_factory=list)
    bad_words_token_ids: list[list[int]] = field(default_factory=list)
    """Filled from `bad_words` by the engine, which has the tokenizer."""
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: up to the model's context."""
    min_tokens: int = 0
    logprobs: int | None = None
    """Alternatives returned at each generated token, besides the sampled one."""
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    """So many tokens of a longer prompt are used; -1: as many as leave room for `max_tokens`."""
    truncation_side: str = "left"
    """Where a prompt is cut off, "left" or "right"."""
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    structured_output: StructuredOutput | None = None
    """The form of the answer; where it is complete the answer ends."""
    detokenize: bool = True
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE

    def __post_init__(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else _list("stop", self.stop)
        self.bad_words = _list("bad_words", self.bad_words)
        self.stop_token_ids = _list("stop_token_ids", self.stop_token_ids)
        self.bad_words_token_ids = [
            _list("bad_words_token_ids", word) for word in _list("bad_words_token_ids", self.bad_words_token_ids)
        ]
        self._check_numbers()
        self._check_tokens()
        for name in ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")
        for name, words in (("stop", self.stop), ("bad_words", self.bad_words)):
            if not all(isinstance(word, str) and word for word in words):
                raise ValueError(f"{name} must be non-empty strings, got {words!r}")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings need detokenize=True")
        if self.structured_output is not None:
            self._check_structure()
        if not isinstance(self.output_kind, RequestOutputKind):
            raise ValueError(f"output_kind must be a RequestOutputKind, got {self.output_kind!r}")

    def _check_structure(self) -> None:
        """What would let the answer go on behind its end, or leave no token, cannot be asked for together with a form."""
        if not isinstance(self.structured_output, StructuredOutput):
            raise ValueError(f"structured_output must be a StructuredOutput, got {self.structured_output!r}")
        for name in ("ignore_eos", "min_tokens", "allowed_token_ids", "bad_words"):
            if getattr(self, name):
                raise ValueError(f"{name} cannot be combined with structured_output")

    def _check_numbers(self) -> None:
        _require_int("n", self.n, 1, None)
        _require_number("temperature", self.temperature, 0.0, math.inf)
        _require_number("top_p", self.top_p, 0.0, 1.0, above=True)
        _require_int("top_k", self.top_k, -1, None)
        _require_number("min_p", self.min_p, 0.0, 1.0)
        _require_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, above=True)
        _require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require_int("seed", self.seed, None, None)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, None)
        _require_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.truncate_prompt_tokens is not None and self.truncate_prompt_tokens != -1:
            _require_int("truncate_prompt_tokens", self.truncate_prompt_tokens, 1, None)
        if self.stop_until is not None:
            _require_pattern("stop_until", self.stop_until)
        if self.truncation_side not in ("left", "right"):
            raise ValueError(f'truncation_side must be "left" or "right", got {self.truncation_side!r}')
        for name, value in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if value is not None:
                _require_int(name, value, 0, MAX_LOGPROBS)

    def _check_tokens(self) -> None:
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _list("allowed_token_ids", self.allowed_token_ids)
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids must not be empty; leave it out to allow all tokens")
        if not all(self.bad_words_token_ids):
            raise ValueError("bad_words_token_ids must not hold an empty word")
        words = [token for word in self.bad_words_token_ids for token in word]
        for name, tokens in (
            ("stop_token_ids", self.stop_token_ids),
            ("allowed_token_ids", self.allowed_token_ids or ()),
            ("bad_words_token_ids", words),
        ):
            for token in tokens:
                _require_int(name, token, 0, None)
        if self.logit_bias is not None and not isinstance(self.logit_bias, dict):
            raise ValueError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        for token, bias in (self.logit_bias or {}).items():
            _require_int("a token id of logit_bias", token, 0, None)
            _require_number(f"logit_bias[{token}]", bias, -100.0, 100.0)

    @property
    def reads_prompt(self) -> bool:
        """Whether something is wanted of each token of the prompt, so that all of it has to be computed."""
        return self.prompt_logprobs is not None

    @property
    def greedy(self) -> bool:
        """Whether the next token is the arg-max of the processed logits."""
        return self.temperature < 1e-5


def _list(name: str, value: Any) -> list[Any]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple, set, frozenset)):
        raise ValueError(f"{name} must be a list, got {value!r}")
    return list(value)


def _require_number(name: str, value: Any, low: float, high: float, *, above: bool = False) -> None:
    """`above`: `low` itself is too low."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # The comparisons also refuse NaN, and integers too large for a float.
    if number and (low < value if above else low <= value) and value <= min(high, sys.float_info.max):
        return
    if high == math.inf:
        limits = f"above {low:g}" if above else f"at least {low:g}"
    else:
        limits = f"in {'(' if above else '['}{low:g}, {high:g}]"
    raise ValueError(f"{name} must be a number {limits}, got {value!r}")


def _require_pattern(name: str, value: Any) -> None:
    """Raises ValueError unless the value is a regular expression."""
    try:
        if not isinstance(value, str):
            raise TypeError(f"got {value!r}")
        re.compile(value)
    except (TypeError, re.error) as error:
        raise ValueError(f"{name} must be a regular expression: {error}") from None


def _require_int(name: str, value: Any, low: int | None, high: int | None) -> None:
    good = isinstance(value, int) and not isinstance(value, bool)
    if good and (low is None or low <= value) and (high is None or value <= high):
        return
    limits = "" if low is None else f" at least {low}" if high is None else f" in [{low}, {high}]"
    raise ValueError(f"{name} must be an integer{limits}, got {value!r}")
