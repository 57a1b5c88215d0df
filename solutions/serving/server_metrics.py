"""The rest of what vLLM's servers show at ``/metrics``: what requests asked for, why they wait, how the cache is made.

Names, labels and buckets: vLLM's ``v1/metrics/loggers.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ..batching.scheduler_output import SchedulerOutput
from ..batching.sequence import Sequence
from .metrics import REQUEST, EngineMetrics, Histogram, one_two_five
from .tier_metrics import tier_families

if TYPE_CHECKING:
    from ..core.engine import LLMEngine

N = (1.0, 2.0, 5.0, 10.0, 20.0)
PREEMPTIONS = (1.0, 2.0, 3.0, 4.0, 5.0, 10.0, 20.0)


def cache_labels(engine: LLMEngine) -> dict[str, str]:
    """What the KV cache is made of; unlike others, this sample has no label for the model."""
    config, limits = engine.config, engine.limits
    values = {
        "block_size": config.block_size, "num_gpu_blocks": limits.num_blocks, "num_cpu_blocks": limits.num_host_blocks,
        "cache_dtype": config.kv_cache_dtype, "enable_prefix_caching": config.enable_prefix_caching,
        "gpu_memory_utilization": config.gpu_memory_utilization, "kv_cache_memory_bytes": limits.kv_bytes,
        "num_gpu_blocks_override": config.num_gpu_blocks_override, "swap_space": config.swap_space, "engine": 0,
    }  # fmt: skip
    return {name: str(value) for name, value in values.items()}


class ServerMetrics(EngineMetrics):
    """Those of the engine, and the rest.

    A request counts once, whatever its ``n``, when the last of its sequences has ended; what is said of sequences counts for
    each of them, as in vLLM.

    Args:
        model_name: label of every sample but the cache's.
    """

    def __init__(self, model_name: str, engine: LLMEngine) -> None:
        super().__init__(model_name, engine.stats, engine.limits.max_model_len)
        self.cache = cache_labels(engine)
        self._model = engine.executor.worker.model
        lengths = one_two_five(engine.limits.max_model_len)
        self.prompt_tokens = self.cached_tokens = 0
        self._open: dict[str, list[int]] = {}  # requests with n > 1: sequences that have ended, tokens of the longest of them
        self.n = Histogram("vllm:request_params_n", "The parameter n of a request.", N)
        self.max_tokens = Histogram("vllm:request_params_max_tokens", "The parameter max_tokens, where it is set.", lengths)
        self.longest = Histogram(
            "vllm:request_max_num_generation_tokens", "Generated tokens of a request's longest sequence.", lengths
        )
        self.inference = Histogram("vllm:request_inference_time_seconds", "From the first step to the last token.", REQUEST)
        self.preemptions = Histogram("vllm:request_num_preemptions", "Preemptions of a sequence.", PREEMPTIONS)
        self.computed = Histogram(
            "vllm:request_prefill_kv_computed_tokens", "Prompt tokens of a request that no cache had.", lengths
        )

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        """See `EngineMetrics`. A prompt counts with its first token, as in vLLM."""
        started = [seq for seq in decision.sampled if seq not in self._times and seq.parent is None]
        super().on_step(decision, now)
        if started:
            with self._lock:
                self.prompt_tokens += sum(seq.num_prompt_tokens for seq in started)
                self.cached_tokens += sum(seq.num_cached_tokens for seq in started)

    def _end(self, seq: Sequence, now: float) -> None:
        times, params, started = self._times.get(seq), seq.params, seq.first_scheduled_time
        super()._end(seq, now)
        if params.max_tokens is not None:
            self.max_tokens.observe(params.max_tokens)
        self.preemptions.observe(seq.num_preemptions)
        if times is not None and started is not None:
            self.inference.observe(times[1] - started)
            if seq.parent is None:  # the others share its prompt
                self.computed.observe(seq.num_prompt_tokens - seq.num_cached_tokens)
        ended = self._open.setdefault(seq.request_id, [0, 0])
        ended[:] = ended[0] + 1, max(ended[1], seq.num_output_tokens)
        if ended[0] == params.n:
            del self._open[seq.request_id]
            self.n.observe(params.n)
            self.longest.observe(ended[1])

    def collect(self) -> Iterator[Metric]:
        """All metrics at this moment."""
        yield from super().collect()
        stats, names, values = self._stats(), list(self.labels), list(self.labels.values())
        info = GaugeMetricFamily("vllm:cache_config_info", "How the KV cache is made; always 1.", labels=list(self.cache))
        info.add_metric(list(self.cache.values()), 1)
        yield info
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason",
            "Those of num_requests_waiting. capacity: for their turn; deferred: for the form of their answer to be compiled.",
            labels=[*names, "reason"],
        )
        waiting.add_metric([*values, "capacity"], stats.num_waiting)
        waiting.add_metric([*values, "deferred"], stats.num_deferred)
        yield waiting
        with self._lock:
            prompts, found = self.prompt_tokens, self.cached_tokens
        cached = CounterMetricFamily("vllm:prompt_tokens_cached", "Prompt tokens found in the prefix cache.", labels=names)
        cached.add_metric(values, found)
        yield cached
        sources = CounterMetricFamily(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their keys and values came from.", labels=[*names, "source"]
        )
        sources.add_metric([*values, "local_compute"], prompts - found)
        from_tier = min(found, stats.kv_offload.num_hits) if stats.kv_offload is not None else 0
        sources.add_metric([*values, "local_cache_hit"], found - from_tier)
        sources.add_metric([*values, "external_kv_transfer"], from_tier)
        yield sources
        if stats.kv_offload is not None:
            yield from tier_families(stats.kv_offload, self.labels)
        from ..models.moe import expert_load  # imports torch, which has to wait until the port is ours

        if loads := expert_load(self._model):
            experts = CounterMetricFamily(
                "byov:expert_tokens", "Tokens that experts of this number were chosen for, in all layers together.",
                labels=[*names, "expert"],
            )  # fmt: skip
            for number, count in enumerate(loads):
                experts.add_metric([*values, str(number)], count)
            yield experts
        accepted = CounterMetricFamily(
            "vllm:spec_decode_num_accepted_tokens_per_pos", "Drafted tokens accepted, by their place in the draft.",
            labels=[*names, "position"],
        )  # fmt: skip
        for position in range(max(stats.spec_decode_accepted, default=0)):
            count = sum(drafts for length, drafts in stats.spec_decode_accepted.items() if length > position)
            accepted.add_metric([*values, str(position)], count)
        yield accepted
        length = GaugeMetricFamily(
            "byov:spec_decode_mean_length", "Tokens drafted for a sequence in a step, as it was last decided; 0: none pay.",
            labels=names,
        )  # fmt: skip
        length.add_metric(values, stats.spec_decode_mean_length)
        yield length
        served = GaugeMetricFamily(
            "vllm:client_served_tokens", "With --scheduling-policy fair: tokens computed for a client, over its weight.",
            labels=[*names, "client"],
        )  # fmt: skip
        for client, count in stats.served.items():
            served.add_metric([*values, client], count)
        yield served
        for name, text, value in (
            ("steps_ahead", "Steps begun before the one before had ended, with --async-scheduling.", stats.num_steps_ahead),
            ("rows_in_vain", "Sequences in such a step that ended with the one before.", stats.num_in_vain),
        ):
            counter = CounterMetricFamily(f"byov:{name}", text, labels=names)
            counter.add_metric(values, value)
            yield counter
