"""Requests that are answered by beam search (``core/beams/beam_search.py``)."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..batching.sampling_params import SamplingParams
from ..core.beams.beam_search import BeamSearch, likeliest
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
        try:
            searches.append(BeamSearch(params.n, most, () if params.ignore_eos else tuple(ends), penalty))
        except ValueError as error:
            raise RequestError(f"n with use_beam_search: {error}", "n") from None

    def abort(request_ids: list[str]) -> None:
        if request_ids:
            task.cancel()

    stream = OutputStream([request.request_id for request in requests], abort)
    stream.accept()

    async def work() -> None:
        pairs = zip(requests, searches, strict=True)
        every = [asyncio.ensure_future(_run(engine, request, beams, stream)) for request, beams in pairs]
        try:
            await asyncio.gather(*every)
        except Exception as error:
            for each in every:  # nobody reads their answers
                each.cancel()
            stream.fail(error)

    task = asyncio.create_task(work())
    return stream


async def _run(engine: AsyncEngine, request: EngineRequest, beams: BeamSearch, stream: OutputStream) -> None:
    """Search, and put the answers into a stream. Being cancelled aborts the step that runs.

    Raises:
        QueueFullError, EngineDeadError: see `AsyncEngine.submit`. UnknownAdapterError: the adapter is not the same any more.
    """
    if isinstance(request.adapter, str):
        request = replace(request, adapter=engine.engine.adapters.as_now(request.adapter))
    params, num_steps, num_cached = beams.step_params(), 0, 0
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
        beams.advance([likeliest(found[each.request_id]) for each in step])
        num_steps += 1
    answers = [_answer(engine.engine.tokenizer, request, beams, index) for index in range(len(beams.answers))]
    stream.put(
        RequestOutput(request.request_id, request.prompt, request.prompt_token_ids, answers, True, num_cached_tokens=num_cached)
    )


def _answer(tokenizer: Any, request: EngineRequest, beams: BeamSearch, index: int) -> CompletionOutput:
    beam, params = beams.answers[index], request.params
    tokens, is_ended = list(beam.token_ids), beams.is_ended(beam)
    text = ""
    if tokenizer is not None:
        skipped = special_token_ids(tokenizer.backend_tokenizer) if params.skip_special_tokens else frozenset()
        start, whole = len(request.prompt_token_ids), [*request.prompt_token_ids, *tokens]
        end = len(whole) - (is_ended and not params.include_stop_str_in_output)
        text = Detokenizer(tokenizer.backend_tokenizer, whole, start, skipped).finish(end)
    return CompletionOutput(index, text, tokens, beam.logprob, None, "stop" if is_ended else "length")
