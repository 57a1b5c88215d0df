"""Beam search: keep the likeliest beginnings of an answer, and continue each of them by its likeliest tokens.

It stands above the engine, as in vLLM. A step of the search is a request of one token for each beam, which the scheduler treats
like any other; beams share the blocks of what they have in common through the prefix cache. Which beams live and when the
search ends is as in transformers (``_beam_search``, ``early_stopping=False``), so the answers are the same, token for token.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..batching.sampling_params import MAX_LOGPROBS, RequestOutputKind, SamplingParams
from ..core.output import CompletionOutput, RequestOutput
from ..core.text.detokenizer import Detokenizer, special_token_ids
from .async_engine import AsyncEngine
from .errors import RequestError
from .openai_protocol import GenerationRequest
from .output_stream import OutputStream

if TYPE_CHECKING:
    from ..core.input import EngineRequest

EXCLUDED = (
    "stop", "stop_token_ids", "min_tokens", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
    "allowed_token_ids", "bad_words", "structured_output", "logprobs", "prompt_logprobs",
)  # fmt: skip
"""Parameters that would change which tokens are likely, or say more of them. Those of drawing, such as temperature, change
nothing: a search draws no token."""


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
    """

    def __init__(self, width: int, max_tokens: int, ends: Sequence[int], length_penalty: float) -> None:
        self.width, self.max_tokens, self.ends, self.length_penalty = width, max_tokens, frozenset(ends), length_penalty
        self.running = [Beam()]
        self._answers: list[tuple[float, Beam]] = []  # with their scores, the best first

    @property
    def num_candidates(self) -> int:
        """How many of a beam's likeliest next tokens are looked at: with so many, `width` beams go on whatever ends."""
        return max(2, 1 + len(self.ends)) * self.width

    @property
    def answers(self) -> list[Beam]:
        """What is found, the best first."""
        return [beam for _, beam in self._answers]

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
        ended = [length == self.max_tokens or beam.token_ids[-1] in self.ends for beam in candidates]
        scale = length**self.length_penalty
        best = zip(candidates[: self.width], ended, strict=False)  # worse ones only stand in for those that end
        self._answers += [(beam.logprob / scale, beam) for beam, is_whole in best if is_whole]
        self._answers.sort(key=lambda pair: -pair[0])
        del self._answers[self.width :]
        self.running = [beam for beam, is_whole in zip(candidates, ended, strict=True) if not is_whole][: self.width]
        if self.running and len(self._answers) == self.width and self.running[0].logprob / scale <= self._answers[-1][0]:
            self.running = []  # no beam is likely to do better


def check(body: GenerationRequest) -> None:
    """See whether a request can be answered by beam search.

    Raises:
        RequestError: a parameter is not valid, or excludes it.
    """
    if body.stream:
        raise RequestError(
            "stream cannot be combined with use_beam_search: the best answers are known only at the end", "stream"
        )
    if getattr(body, "best_of", None) is not None:
        raise RequestError("best_of cannot be combined with use_beam_search; n is the number of beams", "best_of")
    params, default = body.to_sampling_params({}), SamplingParams()
    for name in EXCLUDED:
        if getattr(params, name) != getattr(default, name):
            raise body.refusal(ValueError(f"{name} cannot be combined with use_beam_search"))


def search(engine: AsyncEngine, body: GenerationRequest, requests: list[EngineRequest]) -> OutputStream:
    """Begin a search for each request.

    Returns:
        A stream of their final outputs, each with ``n`` answers, the best first.

    Raises:
        RequestError: there are too many beams.
    """
    limit, ends = engine.engine.limits.max_model_len, engine.engine.model_config.eos_token_ids
    params = requests[0].params
    penalty = 1.0 if body.length_penalty is None else body.length_penalty
    searches = []
    for request in requests:
        room = limit - len(request.prompt_token_ids)
        most = room if params.max_tokens is None else min(room, params.max_tokens)
        searches.append(BeamSearch(params.n, most, () if params.ignore_eos else tuple(ends), penalty))
    if (count := searches[0].num_candidates) > MAX_LOGPROBS:
        raise RequestError(f"n must be at most {MAX_LOGPROBS * params.n // count} with use_beam_search, got {params.n}", "n")

    def abort(request_ids: list[str]) -> None:
        if request_ids:
            task.cancel()

    stream = OutputStream([request.request_id for request in requests], abort)
    stream.accept()

    async def work() -> None:
        try:
            pairs = zip(requests, searches, strict=True)
            await asyncio.gather(*(_run(engine, request, beams, stream) for request, beams in pairs))
        except Exception as error:
            stream.fail(error)

    task = asyncio.create_task(work())
    return stream


async def _run(engine: AsyncEngine, request: EngineRequest, beams: BeamSearch, stream: OutputStream) -> None:
    """Search, and put the answers into a stream. Being cancelled aborts the step that runs.

    Raises:
        QueueFullError, EngineDeadError: see `AsyncEngine.submit`.
    """
    params = SamplingParams(
        temperature=0, max_tokens=1, logprobs=beams.num_candidates, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
    )
    num_steps, num_cached = 0, 0
    while beams.running:
        step = [
            replace(
                request, request_id=f"{request.request_id}-{num_steps}-{index}", params=params, arrival_time=time.monotonic(),
                prompt_token_ids=[*request.prompt_token_ids, *beam.token_ids],
            ) for index, beam in enumerate(beams.running)
        ]  # fmt: skip
        async with await engine.submit(step) as outputs:
            found = {output.request_id: output async for output in outputs}
        if num_steps == 0:
            num_cached = found[step[0].request_id].num_cached_tokens
        beams.advance([_logprobs(found[each.request_id]) for each in step])
        num_steps += 1
    answers = [_answer(engine.engine.tokenizer, request, beams, index) for index in range(len(beams.answers))]
    stream.put(
        RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, answers, True, num_cached_tokens=num_cached)
    )


def _logprobs(output: RequestOutput) -> dict[int, float]:
    """The likeliest tokens behind a prompt."""
    logprobs = output.outputs[0].logprobs
    assert logprobs is not None, "they were asked for"
    return {token: entry.logprob for token, entry in logprobs[0].items() if entry.logprob > -math.inf}


def _answer(tokenizer: Any, request: EngineRequest, beams: BeamSearch, index: int) -> CompletionOutput:
    beam, params = beams.answers[index], request.params
    tokens, is_ended = list(beam.token_ids), beam.token_ids[-1] in beams.ends
    text = ""
    if tokenizer is not None:
        skipped = special_token_ids(tokenizer.backend_tokenizer) if params.skip_special_tokens else frozenset()
        start, whole = len(request.prompt_token_ids), [*request.prompt_token_ids, *tokens]
        end = len(whole) - (is_ended and not params.include_stop_str_in_output)
        text = Detokenizer(tokenizer.backend_tokenizer, whole, start, skipped).finish(end)
    return CompletionOutput(index, text, tokens, beam.logprob, None, "stop" if is_ended else "length")
