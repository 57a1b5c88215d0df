"""Metrics of the tier below the prefix cache (``--kv-offload``), by vLLM's names for a KV connector where it has them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ..memory.tiers.tier import TierStats


def tier_families(stats: TierStats, labels: dict[str, str]) -> Iterator[Metric]:
    """All of them at this moment, with these labels."""
    names, values = list(labels), list(labels.values())
    for name, text, value in (
        ("vllm:external_prefix_cache_queries", "Prompt tokens that the prefix cache did not have.", stats.num_queries),
        ("vllm:external_prefix_cache_hits", "Of those, tokens that the tier of --kv-offload had.", stats.num_hits),
        ("vllm:kv_offload_load_bytes", "Keys and values that came back from there.", stats.load_bytes),
        ("vllm:kv_offload_store_bytes", "Keys and values that were written there.", stats.store_bytes),
        ("vllm:kv_offload_stores_skipped", "KV blocks that were not, as too many came at once.", stats.num_skipped),
        ("byov:kv_offload_bad_blocks", "KV blocks found damaged or foreign there, and computed again.", stats.num_bad),
        ("byov:kv_offload_failures", "Times that the file system failed there.", stats.num_failures),
    ):
        counter = CounterMetricFamily(name, text, labels=names)
        counter.add_metric(values, value)
        yield counter
    usage = GaugeMetricFamily("byov:kv_offload_usage_perc", "Share of --kv-offload-size in use; 1 is all of it.", labels=names)
    usage.add_metric(values, stats.num_bytes / stats.limit)
    yield usage
