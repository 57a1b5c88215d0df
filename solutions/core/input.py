"""The door of the engine: turns a prompt and its parameters into a request that cannot fail later, or says what is wrong."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict

from ..batching.pooling import NO_TEXTS, PooledSequence, PoolingParams
from ..batching.sampling_params import SamplingParams, StructuredOutput
from ..batching.sequence import Sequence
from ..models.config.model_config import ModelConfig
from .lora.registry import Loaded, LoRARequest
from .structured.grammar_processes import GrammarProcesses
from .structured.grammar_queue import CompilingStoppedError
from .structured.guide import Guide
from .structured.structured_output import GrammarCompiler

if TYPE_CHECKING:
    from concurrent.futures import Future

    from xgrammar import CompiledGrammar


class ContextLengthError(ValueError):
    """A prompt does not fit into the context, or leaves no room for a token of an answer; `num_tokens` is its length."""

    def __init__(self, num_tokens: int, max_model_len: int, answer: int) -> None:
        """answer: 1 where there is to be one, else 0."""
        at_most = f"at most {max_model_len - answer} {'leave room for an answer' if answer else 'are possible'}"
        super().__init__(f"the prompt has {num_tokens} tokens; with max_model_len {max_model_len} {at_most}")
        self.num_tokens = num_tokens


class TokensPrompt(TypedDict, total=False):
    """A prompt that is tokenized already, or a text with a cache salt."""

    prompt: str
    prompt_token_ids: list[int]
    cache_salt: str


Prompt = str | TokensPrompt
Adapters = LoRARequest | Many[LoRARequest | None] | None
"""Of prompts: one for all, one or None for each, or none."""


@dataclass(slots=True)
class EngineRequest:
    """A validated request. `arrival_time` is on the clock of `time.monotonic`. `grammar` is the answer's grammar once it is
    compiled: `InputProcessor.complete` or the server sets it. `adapter` is what computes it, or the name of
    that; None: the model as it is. `client` is for whom it is."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    cache_salt: str | None = None
    arrival_time: float = 0.0
    grammar: CompiledGrammar | None = None
    adapter: str | Loaded | None = None
    client: str | None = None


def of_each(
    prompts: Prompt | Many[Prompt], params: SamplingParams | Many[SamplingParams], priority: Many[int] | None,
    adapter: Adapters,
) -> list[tuple[Prompt, SamplingParams, int, LoRARequest | None]]:  # fmt: skip
    """Each prompt with its own of what was given once for all, for each, or not at all.

    Raises:
        ValueError: the numbers do not match.
    """
    many = [prompts] if isinstance(prompts, (str, dict)) else list(prompts)
    every = [params] * len(many) if isinstance(params, SamplingParams) else list(params)
    priorities = [0] * len(many) if priority is None else list(priority)
    adapters = [adapter] * len(many) if adapter is None or isinstance(adapter, LoRARequest) else list(adapter)
    if not len(many) == len(every) == len(priorities) == len(adapters):
        counts = f"{len(every)} sampling_params, {len(priorities)} priorities and {len(adapters)} adapters"
        raise ValueError(f"{len(many)} prompts, {counts} do not match")
    return list(zip(many, every, priorities, adapters, strict=True))


class InputProcessor:
    """Tokenizes and validates. It changes no state, so any thread may call it while the engine runs.

    Args:
        tokenizer: a fast tokenizer of transformers, or None: then prompts must be token ids.
        model: gives vocabulary and end-of-sequence tokens.
        max_model_len: longest sequence, prompt and output.
        max_num_seqs: most sequences that a request may ask for with ``n``.
        no_structure: why structured answers are not available here; None: they are.
    """

    def __init__(
        self, tokenizer: Any, model: ModelConfig, max_model_len: int, max_num_seqs: int, no_structure: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.model = model
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.no_structure = "this model has no tokenizer here" if tokenizer is None else no_structure
        self._grammars: GrammarProcesses | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> EngineRequest:
        """Make a request. The answer's grammar is not compiled yet: `complete` waits for it, `compile` does not wait.

        Raises:
            ContextLengthError: the prompt is too long.
            ValueError: something else is wrong; the message says what, and what is allowed.
        """
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if not isinstance(prompt, dict) or not prompt.keys() <= TokensPrompt.__optional_keys__:
            raise ValueError('a prompt must be a string, {"prompt": "..."} or {"prompt_token_ids": [...]}')
        text, token_ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
        if token_ids is None:
            token_ids = self._tokenize(text)
        params = self._complete(params)
        token_ids = self._truncated(token_ids, params, text if prompt.get("prompt_token_ids") is None else None)
        self._check_token_ids(token_ids, params)
        if params.structured_output is not None and self.no_structure is not None:
            raise ValueError(f"structured_output: {self.no_structure}")
        salt = prompt.get("cache_salt")
        return EngineRequest(request_id, text, list(token_ids), params, priority, salt, time.monotonic())

    def sequences(self, request: EngineRequest, first_id: int) -> list[Sequence]:
        """The ``n`` sequences of a request; all but the first wait until the first has computed the prompt they share."""
        sequences: list[Sequence] = []
        kind = PooledSequence if isinstance(request.params, PoolingParams) else Sequence
        for index in range(request.params.n):
            params = request.params
            if index and params.seed is not None:
                params = replace(params, seed=params.seed + index)
            sequences.append(
                kind(
                    first_id + index, request.prompt_token_ids, params, request_id=request.request_id, index=index,
                    priority=request.priority, cache_salt=request.cache_salt, parent=sequences[0] if index else None,
                    arrival_time=request.arrival_time, eos_token_ids=self.model.eos_token_ids, max_model_len=self.max_model_len,
                    client=request.client,
                )
            )  # fmt: skip
        sequences[0].children = sequences[1:]
        if request.grammar is not None:
            for seq in sequences:
                seq.guide = Guide(request.grammar, partial(_cut_off, seq))
        return sequences

    def compile(self, wanted: StructuredOutput, client: str | None = None) -> Future[CompiledGrammar]:
        """Compile the grammar of a structured answer in another process; see `GrammarProcesses.compile`.

        Raises:
            ValueError: structured answers are not available here. CompilingStoppedError: `close` was called.
        """
        if self.no_structure is not None:
            raise ValueError(f"structured_output: {self.no_structure}")
        return self._compiling().compile(wanted, client)

    def start_compiling(self) -> None:
        """Start the process that compiles grammars, in the background, where structured answers are available; the first one
        then need not wait for it."""
        if self.no_structure is None and not self.model.is_encoder:
            self._compiling().start()

    def _compiling(self) -> GrammarProcesses:
        """What compiles grammars; made when it is first asked for."""
        with self._lock:
            if self._is_closed:
                raise CompilingStoppedError("the engine is shutting down")
            if self._grammars is None:
                needed = self.tokenizer, self.model.vocab_size, self.model.eos_token_ids
                self._grammars = GrammarProcesses(lambda: GrammarCompiler(*needed))
                weakref.finalize(self, self._grammars.close)  # an engine that is dropped leaves no process behind
            return self._grammars

    def complete(self, request: EngineRequest) -> None:
        """Compile the grammar of a request's answer and wait for it. A request without one, or that has it, is left alone.

        Raises:
            ValueError: the grammar cannot be compiled.
        """
        if request.params.structured_output is not None and request.grammar is None:
            request.grammar = self.compile(request.params.structured_output).result()

    @property
    def num_compiling(self) -> int:
        """Requests whose form of answer is being compiled, or waits for that."""
        grammars = self._grammars
        return 0 if grammars is None else grammars.num_waiting

    def close(self) -> None:
        """Stop compiling and end the compiler's process."""
        with self._lock:
            self._is_closed = True
            grammars = self._grammars
        if grammars is not None:
            grammars.close()

    def _tokenize(self, text: str | None) -> list[int]:
        if not isinstance(text, str) or not text:
            raise ValueError("the prompt is empty; give at least one token")
        if self.tokenizer is None:
            raise ValueError("this model has no tokenizer here; give prompt_token_ids instead of text")
        return self._encode("the prompt", text)

    def _encode(self, name: str, text: str, **options: Any) -> list[int]:
        """Token ids of a text."""
        self._check_text(name, text)
        token_ids: list[int] = self.tokenizer.encode(text, verbose=False, **options)  # the length is our own affair
        return token_ids

    @staticmethod
    def _check_text(name: str, text: str) -> None:
        """Raises ValueError if a text holds half of a surrogate pair, which is not a character."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: character {error.start} is half of a surrogate pair; send whole characters") from None

    def _truncated(self, token_ids: list[int], params: SamplingParams, text: str | None) -> list[int]:
        """A prompt as short as the parameters ask for. A `text` whose vector is wanted keeps the tokens that the tokenizer puts
        around it, as it was trained with them."""
        most, pooled = params.truncate_prompt_tokens, isinstance(params, PoolingParams)
        if most == -1:
            most = max(1, self.max_model_len - (0 if pooled else params.max_tokens or 1))
        if most is None or len(token_ids) <= most:
            return token_ids
        bare = self._encode("the prompt", text, add_special_tokens=False) if pooled and text is not None else token_ids
        around = len(token_ids) - len(bare)
        before = next((start for start in range(around + 1) if token_ids[start : start + len(bare)] == bare), 0)
        if around >= most:  # they are too many themselves
            bare, around, before = token_ids, 0, 0
        kept = bare[around - most :] if params.truncation_side == "left" else bare[: most - around]
        return [*token_ids[:before], *kept, *token_ids[before + len(bare) :]]

    def _check_token_ids(self, token_ids: list[int], params: SamplingParams) -> None:
        if len(token_ids) == 0:
            raise ValueError("the prompt is empty; give at least one token")
        answer = 0 if isinstance(params, PoolingParams) else 1
        if len(token_ids) + answer > self.max_model_len:
            raise ContextLengthError(len(token_ids), self.max_model_len, answer)
        self._check_vocabulary("prompt_token_ids", token_ids)

    def _check_vocabulary(self, name: str, token_ids: list[int]) -> None:
        for token in token_ids:
            if type(token) is not int or not 0 <= token < self.model.vocab_size:
                raise ValueError(f"{name}: {token!r} is not a token id; the vocabulary is 0 .. {self.model.vocab_size - 1}")

    def _complete(self, params: SamplingParams) -> SamplingParams:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params must be SamplingParams, got {type(params).__name__}")
        if isinstance(params, PoolingParams):
            if params.dimensions is not None and params.dimensions > self.model.hidden_size:
                raise ValueError(f"dimensions must be at most {self.model.hidden_size}, got {params.dimensions}")
        elif self.model.is_encoder:
            raise ValueError(NO_TEXTS)
        if params.n > self.max_num_seqs:
            raise ValueError(f"n must be at most max_num_seqs ({self.max_num_seqs}), got {params.n}")
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("allowed_token_ids", params.allowed_token_ids or [])
        self._check_vocabulary("logit_bias", list(params.logit_bias or {}))
        self._check_vocabulary("bad_words_token_ids", [token for word in params.bad_words_token_ids for token in word])
        if self.tokenizer is None and (params.stop or params.bad_words):
            raise ValueError("stop and bad_words need a tokenizer, and this model has none here")
        for text in params.stop:
            self._check_text("stop", text)
        if not params.bad_words:
            return params
        # A word looks different at the start of a text and after a space.
        spellings = [prefix + word.lstrip() for word in params.bad_words for prefix in ("", " ")]
        token_ids = [self._encode("bad_words", text, add_special_tokens=False) for text in spellings]
        for text, word in zip(spellings, token_ids, strict=True):  # the tokenizer may know more tokens than the model
            self._check_vocabulary(f"bad_words {text!r}", word)
        return replace(params, bad_words_token_ids=[word for word in token_ids if word])


def _cut_off(seq: Sequence, num_output_tokens: int) -> None:
    """End a sequence with the token after the first `num_output_tokens`, as if `max_len` were reached, and say why."""
    seq.max_len = min(seq.max_len, seq.num_prompt_tokens + num_output_tokens + 1)
    seq.max_len_reason = "structured_output takes too long to follow"
