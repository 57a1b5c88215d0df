"""Metrics: times of hand-made steps, counts against what a real engine did, and the text that Prometheus reads."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_output import SchedulerOutput
from solutions.batching.sequence import Sequence
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM, EngineStats
from solutions.serving import metrics as metrics_module
from solutions.serving.metrics import EngineMetrics, Histogram, one_two_five
from solutions.serving.server_metrics import ServerMetrics
from solutions.tests.tiny_models import make_tiny_llama

NGRAM = {"method": "ngram", "adaptive": False}
STATS = EngineStats(2, 3, 0.25, 0.5, 40, 30, 1, 50, 60, 7, 8, 32, 24)
NAMES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:prefix_cache_queries",
    "vllm:prefix_cache_hits", "vllm:num_preemptions", "vllm:prompt_tokens", "vllm:generation_tokens", "vllm:request_success",
    "vllm:admission_rejections", "vllm:spec_decode_num_drafts", "vllm:spec_decode_num_draft_tokens",
    "vllm:spec_decode_num_accepted_tokens", "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds",
    "vllm:request_time_per_output_token_seconds", "vllm:e2e_request_latency_seconds", "vllm:request_queue_time_seconds",
    "vllm:request_prefill_time_seconds", "vllm:request_decode_time_seconds", "vllm:request_prompt_tokens",
    "vllm:request_generation_tokens", "vllm:iteration_tokens_total",
}  # fmt: skip


MORE_NAMES = {
    "vllm:request_params_n", "vllm:request_params_max_tokens", "vllm:request_max_num_generation_tokens",
    "vllm:request_inference_time_seconds", "vllm:request_num_preemptions", "vllm:request_prefill_kv_computed_tokens",
    "vllm:cache_config_info", "vllm:num_requests_waiting_by_reason", "vllm:spec_decode_num_accepted_tokens_per_pos",
    "vllm:prompt_tokens_cached", "vllm:prompt_tokens_by_source", "vllm:client_served_tokens",
    "byov:steps_ahead", "byov:rows_in_vain", "byov:spec_decode_mean_length",
}  # fmt: skip


TIER_NAMES = {
    "vllm:external_prefix_cache_queries", "vllm:external_prefix_cache_hits", "vllm:kv_offload_load_bytes",
    "vllm:kv_offload_store_bytes", "vllm:kv_offload_stores_skipped", "byov:kv_offload_bad_blocks",
    "byov:kv_offload_failures", "byov:kv_offload_usage_perc",
}  # fmt: skip


def make() -> EngineMetrics:
    return EngineMetrics("m", lambda: STATS, 4096)


def samples(metrics: EngineMetrics) -> dict[tuple[str, str], float]:
    """(name, label beside the model's) → value, as a reader of the text finds them."""
    found = {}
    for family in text_string_to_metric_families(metrics.text().decode()):
        for sample in family.samples:
            assert sample.labels.pop("model_name", None) == (None if sample.name == "vllm:cache_config_info" else "m")
            found[sample.name, "".join(sample.labels.values())] = sample.value
    return found


def step(metrics: EngineMetrics, now: float, *sequences: Sequence, tokens: int = 1) -> None:
    """A step in which each sequence gets a token, its first behind its prompt."""
    scheduled = {seq: tokens if seq.num_output_tokens else seq.num_prompt_tokens + tokens - 1 for seq in sequences}
    for seq in sequences:
        seq.tokens += [7] * tokens
    metrics.on_step(SchedulerOutput(scheduled, list(sequences)), now)


def sequence(seq_id: int, arrival: float, scheduled: float) -> Sequence:
    seq = Sequence(seq_id, [1, 2, 3], SamplingParams(), arrival_time=arrival)
    seq.first_scheduled_time = scheduled
    return seq


def finish(seq: Sequence, reason: str) -> None:
    seq.finish(reason)


def test_a_value_at_a_bound_is_within_it() -> None:
    histogram = Histogram("h", "text", (1.0, 2.0))
    for value, count in ((0.5, 1), (1.0, 2), (1.5, 3), (2.0, 4), (2.1, 5)):
        histogram.observe(value, count)
    family = histogram.family({"model_name": "m"})
    values = {(s.name, s.labels.get("le")): s.value for s in family.samples}
    assert values == {
        ("h_bucket", "1.0"): 3, ("h_bucket", "2.0"): 10, ("h_bucket", "+Inf"): 15, ("h_count", None): 15,
        ("h_sum", None): pytest.approx(0.5 + 2 + 4.5 + 8 + 10.5),
    }  # fmt: skip


def test_bounds_are_vllms() -> None:
    """Written out, as its documentation has them: dashboards sum over servers, bucket by bucket."""
    metrics = make()
    tens = [1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0]
    between = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, *tens]
    assert list(metrics.between.bounds) == list(metrics.per_token.bounds) == between
    first = [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, *tens, 160.0, 640.0, 2560.0]
    assert list(metrics.first_token.bounds) == first
    whole = [0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680]
    for histogram in (metrics.whole, metrics.queue, metrics.prefill, metrics.decode):
        assert list(histogram.bounds) == whole


def test_buckets_of_lengths() -> None:
    assert one_two_five(1) == (1,)
    assert one_two_five(512) == (1, 2, 5, 10, 20, 50, 100, 200, 500)
    assert one_two_five(1000)[-1] == 1000


def test_times_are_those_of_the_steps() -> None:
    metrics, seq = make(), sequence(0, arrival=10.0, scheduled=10.5)
    step(metrics, 11.0, seq)
    step(metrics, 11.25, seq)
    finish(seq, "length")
    step(metrics, 11.75, seq)
    for histogram, count, total in (
        (metrics.first_token, 1, 1.0),  # from the arrival, not from when it was scheduled
        (metrics.between, 2, 0.75),
        (metrics.per_token, 1, 0.375),  # the first token is not counted
        (metrics.whole, 1, 1.75),
        (metrics.queue, 1, 0.5),
        (metrics.prefill, 1, 0.5),
        (metrics.decode, 1, 0.75),
        (metrics.prompt_len, 1, 3),
        (metrics.output_len, 1, 3),
        (metrics.step_size, 3, 3 + 3),  # the prompt, and three tokens
    ):
        assert (sum(histogram.counts), histogram.sum) == (count, pytest.approx(total)), histogram.name
    assert metrics.finished == {"length": 1}


def test_sequences_that_waited_differently_are_told_apart() -> None:
    metrics = make()
    first, second, third = (sequence(i, 0.0, 0.0) for i in range(3))
    step(metrics, 1.0, first, second)
    step(metrics, 1.0625, first, third)
    step(metrics, 1.1875, first, second, third)
    assert metrics.between.sum == 0.0625 + 0.125 + 0.1875 + 0.125
    assert metrics.between.counts[6:10] == [1, 0, 2, 1]  # up to 75, 100, 150 and 200 ms
    assert metrics.step_size.sum == 3 * 3 + 7  # prompts, and tokens


def test_several_tokens_of_a_step_are_one_wait() -> None:
    """As vLLM counts: what speculation brings comes at once; the time per token knows of all of them."""
    metrics, seq = make(), sequence(0, 0.0, 0.0)
    step(metrics, 1.0, seq)
    finish(seq, "stop")
    step(metrics, 1.5, seq, tokens=5)
    assert (sum(metrics.between.counts), metrics.between.sum) == (1, 0.5)
    assert metrics.per_token.sum == pytest.approx(0.1)


def test_what_is_aborted_counts_as_ended() -> None:
    metrics = make()
    waiting, running, done = (Sequence(i, [1, 2], SamplingParams(), arrival_time=0.0) for i in range(3))
    running.first_scheduled_time = done.first_scheduled_time = 0.5
    finish(done, "stop")
    step(metrics, 1.0, running, done)
    for seq in (waiting, running):
        finish(seq, "abort")
    metrics.on_abort([waiting, running, done], 3.0)
    assert metrics.finished == {"stop": 1, "abort": 2}
    assert (sum(metrics.queue.counts), metrics.queue.sum) == (3, 4.0)  # one has waited all the time
    assert sum(metrics.prefill.counts) == 2
    assert metrics._times == {}


def test_the_text_has_every_name_once_and_the_engines_numbers() -> None:
    metrics = make()
    metrics.on_rejection("tokens")
    finish(seq := sequence(0, 0.0, 0.0), "stop")
    step(metrics, 1.0, seq)
    families = list(text_string_to_metric_families(metrics.text().decode()))
    assert {family.name for family in families} == NAMES
    assert len(families) == len(NAMES)
    found = samples(metrics)
    expected = {
        "num_requests_running": 2, "num_requests_waiting": 3, "kv_cache_usage_perc": 0.25, "prefix_cache_queries_total": 40,
        "prefix_cache_hits_total": 30, "num_preemptions_total": 1, "prompt_tokens_total": 50, "generation_tokens_total": 60,
        "spec_decode_num_drafts_total": 8, "spec_decode_num_draft_tokens_total": 32,
        "spec_decode_num_accepted_tokens_total": 24,
    }  # fmt: skip
    assert {name: found[f"vllm:{name}", ""] for name in expected} == expected
    assert found["vllm:request_success_total", "stop"] == found["vllm:admission_rejections_total", "tokens"] == 1
    assert found["vllm:time_to_first_token_seconds_bucket", "0.75"] == 0
    assert found["vllm:time_to_first_token_seconds_bucket", "1.0"] == 1


@pytest.mark.parametrize("settings", [{}, {"speculative_config": NGRAM}], ids=["plain", "ngram"])
def test_counts_of_a_real_engine_are_the_truth(tmp_path, settings) -> None:
    """With a queue, preemptions, several samples, cached prefixes and an abort."""
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=96, num_gpu_blocks_override=7, max_num_seqs=4, **settings)
    engine = llm.llm_engine
    metrics = ServerMetrics("m", engine)
    engine.observers.append(metrics)
    prompts = [[5, 6, 7, 8] * 6, [9] * 20, [5, 6, 7, 8] * 6 + [1], [3, 4]]
    params = [SamplingParams(n=n, temperature=0, max_tokens=k, ignore_eos=True) for n, k in ((1, 20), (2, 30), (1, 1), (1, 40))]
    for number, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    engine.add_request("left", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=50, ignore_eos=True))
    lengths, cached = {}, 0
    for number in range(10_000):
        if number == 8:
            engine.abort_request("left")
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished and output.request_id != "left":
                cached += output.num_cached_tokens
            lengths |= {(output.request_id, one.index): len(one.token_ids) for one in output.outputs}
    lengths = {name: length for name, length in lengths.items() if name[0] != "left"}
    found = samples(metrics)
    assert found["vllm:request_success_total", "length"] == len(lengths) == 5
    assert found["vllm:request_success_total", "abort"] == 1
    assert found["vllm:prompt_tokens_total", ""] == sum(map(len, prompts))  # who left had not run
    assert found["vllm:request_generation_tokens_count", ""] == 6
    assert found["vllm:request_generation_tokens_sum", ""] == found["vllm:generation_tokens_total", ""]
    assert found["vllm:request_generation_tokens_sum", ""] - sum(lengths.values()) < 50
    assert found["vllm:iteration_tokens_total_count", ""] == engine.stats().num_steps
    tokens, waits = found["vllm:generation_tokens_total", ""], found["vllm:inter_token_latency_seconds_count", ""]
    first = found["vllm:time_to_first_token_seconds_count", ""]
    extra = found["vllm:spec_decode_num_accepted_tokens_total", ""]
    assert first + waits + extra == tokens
    assert (extra > 0) == bool(settings)
    assert found["vllm:num_preemptions_total", ""] > 0
    assert metrics._times == {}
    parts = [found[f"vllm:request_{name}_time_seconds_sum", ""] for name in ("queue", "prefill", "decode")]
    assert sum(parts) <= found["vllm:e2e_request_latency_seconds_sum", ""] + 1e-6
    families = {family.name: family for family in text_string_to_metric_families(metrics.text().decode())}
    assert families.keys() == NAMES | MORE_NAMES
    assert found["vllm:request_inference_time_seconds_sum", ""] == pytest.approx(parts[1] + parts[2])
    assert (found["vllm:request_params_n_count", ""], found["vllm:request_params_n_sum", ""]) == (5, 1 + 2 + 1 + 1 + 1)
    assert found["vllm:request_params_max_tokens_sum", ""] == 20 + 2 * 30 + 1 + 40 + 50  # of each sequence
    longest = found["vllm:request_generation_tokens_sum", ""] - 30  # two of 30 tokens are one request's
    assert found["vllm:request_max_num_generation_tokens_sum", ""] == longest
    assert found["vllm:request_num_preemptions_sum", ""] == found["vllm:num_preemptions_total", ""]
    assert metrics._open == {}
    sources = [found["vllm:prompt_tokens_by_source_total", source] for source in ("local_compute", "local_cache_hit")]
    assert sum(sources) == found["vllm:prompt_tokens_total", ""]
    assert sources[0] == found["vllm:request_prefill_kv_computed_tokens_sum", ""]
    assert sources[1] == found["vllm:prompt_tokens_cached_total", ""] == cached
    places = [sample.value for sample in families["vllm:spec_decode_num_accepted_tokens_per_pos"].samples]
    assert sum(places) == extra
    assert places == sorted(places, reverse=True)
    (info,) = families["vllm:cache_config_info"].samples
    assert info.value == 1
    wanted = {"block_size": "16", "num_gpu_blocks": "7", "cache_dtype": "auto", "enable_prefix_caching": "True"}
    assert wanted.items() <= info.labels.items()


@pytest.mark.parametrize("settings", [{}, {"speculative_config": NGRAM}], ids=["plain", "ngram"])
def test_tokens_are_counted_when_they_are_computed_as_in_vllm(tmp_path, settings) -> None:
    """By arithmetic: prompts in chunks and at once, one that looks nothing up, one that leaves before it runs."""
    make_tiny_llama(tmp_path)
    llm = LLM(
        str(tmp_path), dtype="float32", max_model_len=96, num_gpu_blocks_override=32, max_num_seqs=2, block_size=4,
        max_num_batched_tokens=16, **settings,
    )  # fmt: skip
    engine = llm.llm_engine
    metrics = EngineMetrics("m", engine.stats, 96)
    engine.observers.append(metrics)
    prompts = {"chunks": [5, 6, 7, 8] * 10, "short": [9] * 3, "scored": [7] * 20}
    for name, prompt in prompts.items():
        params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, prompt_logprobs=0 if name == "scored" else None)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    engine.add_request("left", {"prompt_token_ids": [1, 2, 3]}, SamplingParams(max_tokens=9))
    assert samples(metrics)["vllm:prompt_tokens_total", ""] == 0
    engine.step()  # a chunk of the first prompt
    assert samples(metrics)["vllm:prompt_tokens_total", ""] == 0
    engine.abort_request("left")
    while engine.has_unfinished_requests():
        engine.step()
    found = samples(metrics)
    computed, generated = 40 + 3 + 20, 3 * 9
    assert found["vllm:prompt_tokens_total", ""] == computed
    assert found["vllm:generation_tokens_total", ""] == generated
    assert found["vllm:iteration_tokens_total_sum", ""] == computed + generated
    assert found["vllm:iteration_tokens_total_count", ""] == engine.stats().num_steps
    assert found["vllm:prefix_cache_queries_total", ""] == 40 + 3
    assert found["vllm:prefix_cache_hits_total", ""] == 0
    (again,) = llm.generate(
        {"prompt_token_ids": [5, 6, 7, 8] * 10}, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    cached = again.num_cached_tokens
    assert cached == 36  # whole blocks, and a token is left to compute
    found = samples(metrics)
    assert found["vllm:prompt_tokens_total", ""] == computed + 40
    assert found["vllm:iteration_tokens_total_sum", ""] == computed + generated + 40 - cached + 1
    assert found["vllm:prefix_cache_queries_total", ""] == 40 + 3 + 40


def test_prompt_tokens_that_the_cache_had_are_not_computed(tmp_path) -> None:
    make_tiny_llama(tmp_path)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=96, num_gpu_blocks_override=32, block_size=4)
    metrics = ServerMetrics("m", llm.llm_engine)
    llm.llm_engine.observers.append(metrics)
    for _ in range(2):
        llm.generate({"prompt_token_ids": [5, 6, 7] * 7}, SamplingParams(n=3, max_tokens=None, seed=1), use_tqdm=False)
    found = samples(metrics)
    assert found["vllm:request_prefill_kv_computed_tokens_count", ""] == 2
    assert found["vllm:request_prefill_kv_computed_tokens_sum", ""] == 21 + 21 - 20
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 21 + 21 - 20
    assert found["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == found["vllm:prompt_tokens_cached_total", ""] == 20
    assert found["vllm:request_params_max_tokens_count", ""] == 0
    assert found["vllm:request_params_n_bucket", "5.0"] - found["vllm:request_params_n_bucket", "2.0"] == 2


def test_a_tier_has_metrics_of_its_own_and_its_tokens_have_a_source(tmp_path) -> None:
    """By arithmetic: a prompt of 21 tokens comes back when another of 24 has taken the device's 8 blocks of 4."""
    make_tiny_llama(tmp_path)
    settings = {"dtype": "float32", "max_model_len": 32, "num_gpu_blocks_override": 8, "block_size": 4}
    llm = LLM(str(tmp_path), **settings, kv_offload="host", kv_offload_size=1 << 16)
    metrics = ServerMetrics("m", llm.llm_engine)
    llm.llm_engine.observers.append(metrics)
    for start, count in ((0, 21), (100, 30), (0, 21)):
        prompt = {"prompt_token_ids": [*range(start, start + count)]}
        llm.generate(prompt, SamplingParams(max_tokens=1), use_tqdm=False)
    found = samples(metrics)
    block = 2 * 3 * 4 * 2 * 12 * 4  # keys and values, layers, tokens, heads, elements, bytes
    assert {name.removesuffix("_total") for name, _ in found if name.removesuffix("_total") in TIER_NAMES} == TIER_NAMES
    assert found["vllm:external_prefix_cache_queries_total", ""] == 21 + 30 + 21 - found["vllm:prefix_cache_hits_total", ""]
    assert found["vllm:external_prefix_cache_hits_total", ""] == 20
    assert found["vllm:prompt_tokens_by_source_total", "external_kv_transfer"] == 20
    assert found["vllm:prompt_tokens_by_source_total", "local_cache_hit"] == 0
    assert found["vllm:prompt_tokens_by_source_total", "local_compute"] == 21 + 30 + 1
    assert found["vllm:kv_offload_load_bytes_total", ""] == 5 * block
    assert found["vllm:kv_offload_store_bytes_total", ""] == (5 + 5) * block
    assert found["byov:kv_offload_usage_perc", ""] == pytest.approx(10 * block / ((1 << 16) // block * block))


def test_engines_that_hand_blocks_over_count_what_travels(tmp_path) -> None:
    """By arithmetic: 5 full blocks of a prompt of 21 tokens, and none of one that is shorter than a block."""
    make_tiny_llama(tmp_path)
    settings = {"dtype": "float32", "max_model_len": 32, "num_gpu_blocks_override": 8, "block_size": 4}
    keys = {"kv_connector": "shm", "kv_addresses": [str(tmp_path / "kv.sock")]}
    found = []
    for role in ("kv_producer", "kv_consumer"):
        llm = LLM(str(tmp_path), **settings, kv_transfer_config=json.dumps({"kv_role": role, **keys}))
        for count in (21, 3):
            llm.generate({"prompt_token_ids": [*range(count)]}, SamplingParams(max_tokens=1), use_tqdm=False)
        found.append((llm, ServerMetrics("m", llm.llm_engine)))
    sent, got = (samples(metrics) for _, metrics in found)
    block = 2 * 3 * 4 * 2 * 12 * 4  # keys and values, layers, tokens, heads, elements, bytes
    assert got["byov:kv_transfer_received_blocks_total", ""] == 5
    assert got["byov:kv_transfer_received_bytes_total", ""] == 5 * block
    assert got["vllm:prompt_tokens_by_source_total", "external_kv_transfer"] == 0  # nobody has told these metrics of requests
    assert got["vllm:external_prefix_cache_hits_total", ""] == 20
    for name in ("failures", "bad_blocks", "skipped_blocks", "expired_blocks"):
        assert sent[f"byov:kv_transfer_{name}_total", ""] == got[f"byov:kv_transfer_{name}_total", ""] == 0
    assert not any(name.startswith("byov:kv_offload") for name, _ in (*sent, *got))
    for llm, _ in found:
        llm.llm_engine.tiers.close()


def test_who_waits_is_told_apart_by_what_for() -> None:
    engine = SimpleNamespace(
        stats=lambda: replace(STATS, num_deferred=4, spec_decode_accepted={0: 5, 1: 3, 3: 2}, spec_decode_mean_length=1.5),
        config=EngineConfig(),
        limits=SimpleNamespace(max_model_len=64, num_blocks=8, num_host_blocks=0, kv_bytes=0),
        executor=SimpleNamespace(worker=SimpleNamespace(model=torch.nn.Identity())),
    )  # fmt: skip
    found = samples(ServerMetrics("m", engine))
    assert found["vllm:num_requests_waiting", ""] == 7
    by_reason = {reason: found["vllm:num_requests_waiting_by_reason", reason] for reason in ("capacity", "deferred")}
    assert by_reason == {"capacity": 3, "deferred": 4}
    places = [found["vllm:spec_decode_num_accepted_tokens_per_pos_total", place] for place in "012"]
    assert places == [5, 2, 2]
    assert found["byov:spec_decode_mean_length", ""] == 1.5


def test_the_dashboard_and_the_configuration_fit() -> None:
    """Every metric that the dashboard asks for is there, with the labels that it uses, and none of the times is left out."""
    folder = Path(metrics_module.__file__).parent
    dashboard = json.loads((folder / "grafana_dashboard.json").read_text())
    text = json.dumps([target["expr"] for panel in dashboard["panels"] for target in panel["targets"]])
    asked = set(re.findall(r"vllm:\w+", text))
    metrics = make()
    metrics.on_rejection("tokens")
    finish(seq := sequence(0, 0.0, 0.0), "stop")
    step(metrics, 1.0, seq)
    assert asked <= {name for name, _ in samples(metrics)}
    assert {re.sub("_(total|bucket)$", "", name) for name in asked} >= {
        "vllm:time_to_first_token_seconds", "vllm:inter_token_latency_seconds", "vllm:e2e_request_latency_seconds",
        "vllm:request_queue_time_seconds", "vllm:kv_cache_usage_perc", "vllm:admission_rejections",
    }  # fmt: skip
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len({tuple(panel["gridPos"].values()) for panel in panels}) == len(panels)
    configuration = yaml.safe_load((folder / "prometheus.yml").read_text())
    assert configuration["scrape_configs"][0]["static_configs"] == [{"targets": ["localhost:8000"]}]


def test_a_scrape_does_not_disturb_the_engine() -> None:
    metrics, stop = make(), threading.Event()

    def scrape() -> None:
        while not stop.is_set():
            samples(metrics)

    reader = threading.Thread(target=scrape)
    reader.start()
    sequences = [sequence(i, 0.0, 0.0) for i in range(50)]
    for now in range(300):
        step(metrics, float(now), *sequences)
    stop.set()
    reader.join()
    assert sum(metrics.between.counts) == 299 * 50
