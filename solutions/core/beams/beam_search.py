"""Beam search: keep the likeliest beginnings of an answer, and continue each of them by its likeliest tokens.

It stands above the engine, as in vLLM. A step of the search is a request of one token for each beam, which the scheduler treats
like any other; beams share the blocks of what they have in common through the prefix cache. Which beams live and when the
search ends is as in transformers (``_beam_search``, ``early_stopping=False``), so the answers are the same, token for token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ...batching.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams

MAX_LENGTH_PENALTY = 10
"""The power of a length must be a number."""


@dataclass(frozen=True, slots=True)
class BeamSearchParams:
    """How `LLM.beam_search` searches, by vLLM's names.

    Attributes:
        beam_width: beams that are kept, and answers that are wanted. max_tokens: of an answer.
        ignore_eos: go on behind an end of sequence.
        length_penalty: the score of an answer is its log-probability by its length to this power.
        include_stop_str_in_output: leave the token that has ended an answer in it.
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    include_stop_str_in_output: bool = False


@dataclass(frozen=True, slots=True)
class BeamSearchSequence:
    """An answer behind its prompt, as vLLM has it.

    Attributes:
        tokens, text: of both. cum_logprob: of the answer. finish_reason: "stop" or "length".
    """

    tokens: list[int]
    cum_logprob: float
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class BeamSearchOutput:
    """The answers to one prompt, the best first."""

    sequences: list[BeamSearchSequence]


@dataclass(frozen=True, slots=True)
class Beam:
    """A beginning of an answer, or a whole one: its tokens, and the sum of their log-probabilities."""

    token_ids: tuple[int, ...] = ()
    logprob: float = 0.0


class BeamSearch:
    """The beams of one prompt.

    Args:
        width: beams that are kept, and answers that are wanted.
        max_tokens: of an answer. ends: tokens that end one.
        length_penalty: the score of an answer is its log-probability by its length to this power.

    Attributes:
        running: beams to continue, the best first.

    Raises:
        ValueError: there are too many beams, or the penalty is out of range.
    """

    def __init__(self, width: int, max_tokens: int, ends: Sequence[int], length_penalty: float) -> None:
        self.width, self.max_tokens, self.ends, self.length_penalty = width, max_tokens, frozenset(ends), length_penalty
        self.running = [Beam()]
        self._answers: list[tuple[float, Beam]] = []  # with their scores, the best first
        if not -MAX_LENGTH_PENALTY <= length_penalty <= MAX_LENGTH_PENALTY:
            raise ValueError(f"length_penalty must be from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}, got {length_penalty}")
        if self.num_candidates > MAX_LOGPROBS:
            raise ValueError(f"at most {MAX_LOGPROBS * width // self.num_candidates} beams are possible, got {width}")

    @property
    def num_candidates(self) -> int:
        """How many of a beam's likeliest next tokens are looked at: with so many, `width` beams go on whatever ends."""
        return max(2, 1 + len(self.ends)) * self.width

    @property
    def answers(self) -> list[Beam]:
        """What is found, the best first."""
        return [beam for _, beam in self._answers]

    def is_ended(self, beam: Beam) -> bool:
        """Whether an answer ends by its last token, not by its length."""
        return beam.token_ids[-1] in self.ends

    def step_params(self) -> SamplingParams:
        """Of the requests that a step makes, one for each of `running`."""
        return SamplingParams(
            temperature=0, max_tokens=1, logprobs=self.num_candidates, detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )  # fmt: skip

    def advance(self, continuations: list[dict[int, float]]) -> None:
        """Take a step.

        Args:
            continuations: for each of `running`, its likeliest next tokens with their log-probabilities.
        """
        candidates = [
            Beam((*beam.token_ids, token), beam.logprob + logprob)
            for beam, found in zip(self.running, continuations, strict=True) for token, logprob in found.items()
        ]  # fmt: skip
        candidates.sort(key=lambda beam: -beam.logprob)
        del candidates[self.num_candidates :]
        length = len(candidates[0].token_ids)
        ended = [length == self.max_tokens or self.is_ended(beam) for beam in candidates]
        scale = length**self.length_penalty
        best = zip(candidates[: self.width], ended, strict=False)  # worse ones only stand in for those that end
        self._answers += [(beam.logprob / scale, beam) for beam, is_whole in best if is_whole]
        self._answers.sort(key=lambda pair: -pair[0])
        del self._answers[self.width :]
        self.running = [beam for beam, is_whole in zip(candidates, ended, strict=True) if not is_whole][: self.width]
        if self.running and len(self._answers) == self.width and self.running[0].logprob / scale <= self._answers[-1][0]:
            self.running = []  # no beam is likely to do better


def likeliest(output: Any) -> dict[int, float]:
    """The likeliest tokens behind a prompt, from the output of a step's request."""
    (logprobs,) = output.outputs[0].logprobs
    return {token: entry.logprob for token, entry in logprobs.items() if entry.logprob > -math.inf}


class Offline(Protocol):
    """What an `LLM` has that searches need."""

    llm_engine: Any

    def get_tokenizer(self) -> Any: ...

    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]: ...


def search_all(llm: Offline, prompts: list[Any], params: BeamSearchParams, adapters: list[Any]) -> list[BeamSearchOutput]:
    """What `LLM.beam_search` does: all prompts take each step together, those whose search has ended excepted.

    Args:
        adapters: of each prompt, or None.

    Raises:
        ValueError: a prompt or parameter is wrong.
    """
    engine, searches, begins = llm.llm_engine, [], []
    ends = () if params.ignore_eos else engine.model_config.eos_token_ids
    for prompt in prompts:
        wanted = SamplingParams(n=params.beam_width, max_tokens=params.max_tokens)
        begins.append(engine.prepare("", prompt, wanted))
        most = min(params.max_tokens, engine.limits.max_model_len - len(begins[-1].prompt_token_ids))
        searches.append(BeamSearch(params.beam_width, most, ends, params.length_penalty))
    while running := [which for which, search in enumerate(searches) if search.running]:
        beams = [(which, beam) for which in running for beam in searches[which].running]
        step = [
            {"prompt_token_ids": [*begins[which].prompt_token_ids, *beam.token_ids]}
            | ({"cache_salt": salt} if (salt := begins[which].cache_salt) else {})
            for which, beam in beams
        ]  # fmt: skip
        outputs = llm.generate(
            step, searches[0].step_params(), use_tqdm=False, lora_request=[adapters[which] for which, _ in beams]
        )  # fmt: skip
        for which in running:
            found = [likeliest(output) for (each, _), output in zip(beams, outputs, strict=True) if each == which]
            searches[which].advance(found)
    tokenizer = llm.get_tokenizer()
    results = []
    for begin, search in zip(begins, searches, strict=True):
        sequences = []
        for beam in search.answers:
            is_ended = search.is_ended(beam)
            said = beam.token_ids[:-1] if is_ended and not params.include_stop_str_in_output else beam.token_ids
            tokens = [*begin.prompt_token_ids, *said]
            text = "" if tokenizer is None else tokenizer.decode(tokens)
            sequences.append(BeamSearchSequence(tokens, beam.logprob, text, "stop" if is_ended else "length"))
        results.append(BeamSearchOutput(sequences))
    return results
