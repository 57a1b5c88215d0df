"""The engine: requests go in, steps run, outputs come out. `LLM` is the offline interface, `LLMEngine` the loop below it.

Run it: ``python -m solutions.core.engine --help``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as Many
from dataclasses import dataclass, field, replace
from typing import Any

from ..batching.engine_observer import EngineObserver
from ..batching.grouped_batch import make_batch
from ..batching.pooling import EmbeddingRequestOutput, PoolingParams, embedding_output
from ..batching.sampling_params import RequestOutputKind, SamplingParams
from ..memory.tiers.tier import TierStats
from ..models.loader import load_tokenizer, resolve_model, with_tokenizer
from .beams.beam_search import BeamSearchOutput, BeamSearchParams, search_all
from .cli import main, startup_report
from .config import DEFAULT_MODEL, EngineConfig
from .draft_model import find_draft, make_proposer
from .executor import local_model
from .input import Adapters, EngineRequest, InputProcessor, Prompt, of_each
from .output import OutputProcessor, RequestOutput
from .overlap.lookahead import Lookahead
from .platform.progress import GenerationProgress, PhaseClock
from .scheduler import Scheduler
from .speculative import make_drafter
from .startup import fit, make_adapters, make_executor, make_memory, make_scheduler_config, resolve_limits, with_blocks
from .text.chat_template import render_chat


@dataclass(slots=True)
class EngineStats:
    """The engine's state and its counters since the start; KV cache usage is a share, 0 to 1."""

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    peak_kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    num_prompt_tokens: int
    num_generation_tokens: int
    num_steps: int
    spec_decode_num_drafts: int = 0
    spec_decode_num_draft_tokens: int = 0
    spec_decode_num_accepted_tokens: int = 0
    spec_decode_accepted: Mapping[int, int] = field(default_factory=dict)
    """Number of accepted tokens → drafts that had so many."""
    spec_decode_mean_length: float = 0.0
    """Tokens drafted for a sequence in a step, on average, where that adapts; 0: drafts do not pay at the moment."""
    num_deferred: int = 0
    """Requests beside the waiting ones whose form of answer is being compiled."""
    served: Mapping[str, int] = field(default_factory=dict)
    """With the policy "fair": client → its counter; see `FairOrder`."""
    num_steps_ahead: int = 0
    num_in_vain: int = 0
    """With `async_scheduling`: steps begun before the one before had ended; sequences in them that ended with that one."""
    kv_offload: TierStats | None = None


class LLMEngine:
    """Continuous batching over one model.

    Args:
        config: all settings.

    Raises:
        ValueError: the model is not found, a setting is wrong, or memory is short. The message is one line and says what to do.

    Attributes:
        observers: are told of every step.
    """

    def __init__(self, config: EngineConfig) -> None:
        clock = PhaseClock()
        source = resolve_model(config.model, config.load_format, config.quantization)
        config, source = fit(config, with_tokenizer(source, config.tokenizer))
        limits = resolve_limits(config, source)
        self.config = config = limits.settle(config)
        scheduler_config = make_scheduler_config(config, limits)
        draft = find_draft(config, source, limits)
        clock.lap("find model")
        self.executor = make_executor(config, source, limits.device, limits.dtype)
        clock.lap("load weights")
        model = source.config
        proposer = make_proposer(draft, limits, self.executor.worker)
        if proposer is not None:
            clock.lap("draft model")
        drafts = None if proposer is None else proposer.model_config
        self.limits = limits = with_blocks(limits, config, local_model(model, config), self.executor.weight_bytes, draft=drafts)
        self.executor.create_cache(limits.num_blocks, config.block_size, limits.num_host_blocks)
        self.tokenizer = load_tokenizer(source)
        self.model_config = model = model.also_ends_at(self.tokenizer.eos_token_id if self.tokenizer is not None else None)
        clock.lap("tokenizer")
        self.block_manager, self.tiers = make_memory(config, limits, source, self.executor.worker)
        self.scheduler = Scheduler(scheduler_config, self.block_manager)
        self.adapters = make_adapters(config, self.executor, self.scheduler)
        self.drafter = make_drafter(proposer, self.block_manager, limits)
        clock.lap("KV cache")
        batch = make_batch(len(model.windows), config.enable_lora, config.max_num_seqs, limits.max_model_len, config.block_size)
        self.ahead = Lookahead(self.scheduler, batch, self.executor.worker) if config.async_scheduling else None
        self.batch = self.ahead or batch
        no_structure = "not with ranks that are Ray actors" if config.distributed_executor_backend == "ray" else None
        self.input = InputProcessor(self.tokenizer, model, limits.max_model_len, config.max_num_seqs, no_structure)
        self.outputs = OutputProcessor(self.tokenizer)
        observers = self.ahead, self.drafter.observer, self.tiers.observer if self.tiers else None
        self.observers: list[EngineObserver] = [each for each in observers if each is not None]
        self._next_seq_id = 0
        self._report = startup_report(config, model, limits, clock.laps)

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> EngineRequest:
        """Tokenize and validate a request without touching the engine's state; safe in any thread. The answer's grammar is not
        compiled yet; `submit` waits for it unless `input.compile` was called before.

        Raises:
            ValueError: something about the request is wrong.
        """
        return self.input.prepare(request_id, prompt, params, priority)

    def submit(self, request: EngineRequest) -> None:
        """Queue a prepared request. If the answer's grammar is not compiled yet, wait for it.

        Raises:
            QueueFullError: the waiting queue is full.
            ValueError: a request with this id is running, the answer's grammar cannot be compiled, or there is no such adapter.
        """
        if self.outputs.sequences(request.request_id):
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.input.complete(request)
        sequences = self.input.sequences(request, self._next_seq_id)
        if request.adapter is not None:
            self.adapters.lend(request.adapter, sequences)
        self.scheduler.add(sequences[0])
        self._next_seq_id += len(sequences)
        self.outputs.add(request, sequences)

    def add_request(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> None:
        """`prepare` and `submit` in one."""
        self.submit(self.prepare(request_id, prompt, params, priority))

    def abort_request(self, request_id: str) -> RequestOutput | None:
        """End a request wherever it is and free its blocks at once; what it had generated, or None if no such request runs."""
        sequences = self.outputs.sequences(request_id)
        if not sequences:
            return None
        for seq in sequences:
            self.scheduler.abort(seq)
        for observer in self.observers:
            observer.on_abort(sequences, time.monotonic())
        return self.outputs.abort(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether another `step` has work to do."""
        return self.scheduler.has_unfinished()

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that sequences in the queue have left to compute."""
        return sum(seq.num_uncomputed_tokens for seq in self.scheduler.waiting)

    def step(self) -> list[RequestOutput]:
        """Run one iteration: one decision of `scheduler` is computed, and what came of it told.

        Nothing is asked for twice. The batch holds the tokens that `drafter` puts on trial. When `scheduler` takes the new
        tokens in, `outputs` has their log-probabilities (`add_logprobs`): stop strings are looked for there, in text that is
        read together with them. Outputs are of sequences that know whether they have ended. A step has one time,
        `time.monotonic` when it has run, for `outputs` and for each of `observers`, who hear of the decision last (`on_step`).
        If nothing is scheduled, nobody else is asked; a step that samples nobody is a step.

        Returns:
            Outputs of the requests that advanced, as their ``output_kind`` asks.
        """
        # Hint: step calls each part once, and every part needs something that another one made: draw an arrow for each
        # need. emit goes through `sequences` once; `_states` knows each by its seq_id.
        raise NotImplementedError("Stage 2 · Task 2.7: LLMEngine.step, see stages/stage2_scheduler/GUIDE.md#task-2-7")

    def stats(self) -> EngineStats:
        """State and counters at this moment."""
        cache, scheduler = self.block_manager.prefix_cache, self.scheduler
        return EngineStats(
            num_running=len(scheduler.running), num_waiting=len(scheduler.waiting), num_deferred=self.input.num_compiling,
            kv_cache_usage=self.block_manager.usage, peak_kv_cache_usage=scheduler.peak_usage,
            prefix_cache_queries=0 if cache is None else cache.num_queries, num_preemptions=scheduler.num_preemptions,
            prefix_cache_hits=0 if cache is None else cache.num_hits, num_prompt_tokens=self.outputs.num_prompt_tokens,
            num_generation_tokens=scheduler.num_generation_tokens - self.outputs.num_pooled, num_steps=scheduler.num_steps,
            spec_decode_num_drafts=scheduler.num_drafts, spec_decode_num_draft_tokens=scheduler.num_draft_tokens,
            spec_decode_num_accepted_tokens=scheduler.num_accepted_tokens, spec_decode_accepted=scheduler.accepted.copy(),
            spec_decode_mean_length=self.drafter.mean_length,
            served={client or "": round(count) for client, count in scheduler.order.served.items()},
            num_steps_ahead=self.ahead.num_steps if self.ahead else 0, num_in_vain=self.ahead.num_in_vain if self.ahead else 0,
            kv_offload=self.tiers.stats() if self.tiers else None,
        )  # fmt: skip

    def check_health(self) -> None:
        """Check that the model can still run. An engine without requests finds out in no other way.

        Raises:
            WorkerDiedError: another rank has ended.
        """
        self.executor.check_health()

    def close(self) -> None:
        """End the other ranks and the grammar compiler. The engine cannot be used afterwards. The end of the process does the
        same."""
        self.input.close()
        self.executor.close()

    def startup_summary(self) -> list[str]:
        """Lines that say what the engine runs with and how long each phase of the start took."""
        return self._report


class LLM:
    """Offline generation with vLLM's interface.

    Args:
        model: alias, folder, .gguf file or hub id.
        **settings: any other field of `EngineConfig`.

    Example:
        >>> LLM("smollm2-135m").generate("The capital of France is", SamplingParams(temperature=0))[0].outputs[0].text
    """

    def __init__(self, model: str = DEFAULT_MODEL, **settings: Any) -> None:
        self.llm_engine = LLMEngine(EngineConfig(model=model, **settings))
        self._num_requests = 0

    def get_tokenizer(self) -> Any:
        """The model's tokenizer (of transformers), or None for random weights without one."""
        return self.llm_engine.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """What holds where a call brings none: the model's own, see `--generation-config`."""
        return SamplingParams(**self.llm_engine.model_config.sampling)

    def generate(
        self, prompts: Prompt | Many[Prompt], sampling_params: SamplingParams | Many[SamplingParams] | None = None, *,
        use_tqdm: bool = True, priority: Many[int] | None = None, lora_request: Adapters = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Complete prompts; all of them run together.

        Args:
            prompts: one or many; a string or ``{"prompt_token_ids": [...]}``.
            sampling_params: one for all prompts, or one for each; None: `get_default_sampling_params`.
            use_tqdm: show a progress bar.
            priority: one for each prompt, for the policy "priority"; lower goes first.
            lora_request: the adapter of all prompts, or one or None for each.

        Returns:
            One output for each prompt, in the same order.

        Raises:
            ValueError: a prompt or parameter is wrong. Nothing is generated then.
        """
        engine, requests = self.llm_engine, list[EngineRequest]()
        params = self.get_default_sampling_params() if sampling_params is None else sampling_params
        for prompt, one, rank, adapter in of_each(prompts, params, priority, lora_request):
            final = replace(one, output_kind=RequestOutputKind.FINAL_ONLY)
            requests.append(engine.prepare(str(self._num_requests), prompt, final, rank))
            requests[-1].adapter = None if adapter is None else engine.adapters.name_of(adapter)
            self._num_requests += 1
        for request in requests:
            engine.input.complete(request)
        for request in requests:
            engine.submit(request)
        return self._run(requests, use_tqdm)

    def chat(
        self, messages: Many[dict[str, str]] | Many[Many[dict[str, str]]],
        sampling_params: SamplingParams | Many[SamplingParams] | None = None, *, use_tqdm: bool = True,
        lora_request: Adapters = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one conversation or many, each a list of ``{"role": ..., "content": ...}``.

        Raises:
            ValueError: see `render_chat` and `generate`.
        """
        alone = [message for message in messages if isinstance(message, dict)]
        if alone and len(alone) < len(messages):
            raise ValueError("messages must be one conversation or a list of conversations, not some of each")
        conversations = [alone] if alone else [list(one) for one in messages if not isinstance(one, dict)]
        prompts: list[Prompt] = [{"prompt_token_ids": render_chat(self.get_tokenizer(), one)} for one in conversations]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, lora_request=lora_request)

    def embed(
        self, prompts: Prompt | Many[Prompt], *, dimensions: int | None = None, use_tqdm: bool = True
    ) -> list[EmbeddingRequestOutput]:
        """A vector for each prompt, made as the model's files or `pooler_config` say; of its numbers the first `dimensions`.

        Raises:
            ValueError: see `generate`; or the model has fewer dimensions.
        """
        params = PoolingParams(pooling=self.llm_engine.model_config.pooling, dimensions=dimensions)
        outputs = self.generate(prompts, params, use_tqdm=use_tqdm)
        return [embedding_output(each.request_id, each.pooled, each.prompt_token_ids) for each in outputs]

    def beam_search(
        self, prompts: Prompt | Many[Prompt], params: BeamSearchParams, *, lora_request: Adapters = None
    ) -> list[BeamSearchOutput]:
        """The likeliest answers to each prompt, ``params.beam_width`` of them, the best first.

        Raises:
            ValueError: see `generate`; or there are too many beams.
        """
        every = of_each(prompts, SamplingParams(), None, lora_request)
        return search_all(self, [prompt for prompt, *_ in every], params, [adapter for *_, adapter in every])

    def _run(self, requests: list[EngineRequest], show_progress: bool) -> list[RequestOutput]:
        finished: dict[str, RequestOutput] = {}
        try:
            with GenerationProgress(len(requests), show_progress) as progress:
                while self.llm_engine.has_unfinished_requests():
                    for output in self.llm_engine.step():
                        finished[output.request_id] = output
                        progress.advance(sum(len(each.token_ids) for each in output.outputs))
        except BaseException:  # an interrupt, say, must not leave requests behind for the next call
            for request in requests:
                self.llm_engine.abort_request(request.request_id)
            raise
        return [finished[request.request_id] for request in requests]


if __name__ == "__main__":
    main(LLM)
