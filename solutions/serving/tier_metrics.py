"""Metrics of the tier below the cache (``--kv-offload``, ``--kv-transfer-config``), by vLLM's names where there are some."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from ..memory.tiers.tier import TierStats
from ..memory.transfer.transfer_stats import TransferStats


def tier_families(stats: TierStats, labels: dict[str, str]) -> Iterator[Metric]:
    """All of them at this moment, with these labels."""
    names, values = list(labels), list(labels.values())
    counters: list[tuple[str, str, int]] = [
        ("vllm:external_prefix_cache_queries", "Prompt tokens that the prefix cache did not have.", stats.num_queries),
        ("vllm:external_prefix_cache_hits", "Of those, tokens that the tier below it had.", stats.num_hits),
    ]
    if isinstance(stats, TransferStats):
        title, place = "byov:kv_transfer_buffer_usage_perc", "a kv_producer's kv_buffer_size"
        counters += [
            ("byov:kv_transfer_sent_blocks", "KV blocks that other engines have fetched here.", stats.num_sent),
            ("byov:kv_transfer_sent_bytes", "Their keys and values.", stats.sent_bytes),
            ("byov:kv_transfer_received_blocks", "KV blocks that came from other engines.", stats.num_received),
            ("byov:kv_transfer_received_bytes", "Their keys and values.", stats.received_bytes),
            ("byov:kv_transfer_expired_blocks", "KV blocks that nobody has fetched in time.", stats.num_expired),
            ("byov:kv_transfer_skipped_blocks", "KV blocks for which the buffer had no room.", stats.num_skipped),
            ("byov:kv_transfer_bad_blocks", "KV blocks that came damaged or were others.", stats.num_bad),
            ("byov:kv_transfer_failures", "Transfers that were broken off.", stats.num_failures),
        ]
    else:
        title, place = "byov:kv_offload_usage_perc", "--kv-offload-size"
        counters += [
            ("vllm:kv_offload_load_bytes", "Keys and values that came back from there.", stats.load_bytes),
            ("vllm:kv_offload_store_bytes", "Keys and values that were written there.", stats.store_bytes),
            ("vllm:kv_offload_stores_skipped", "KV blocks that were not, as too many came at once.", stats.num_skipped),
            ("byov:kv_offload_bad_blocks", "KV blocks found damaged or foreign there, and computed again.", stats.num_bad),
            ("byov:kv_offload_failures", "Times that the file system failed there.", stats.num_failures),
        ]
    for name, text, value in counters:
        counter = CounterMetricFamily(name, text, labels=names)
        counter.add_metric(values, value)
        yield counter
    usage = GaugeMetricFamily(title, f"Share of {place} in use; 1 is all of it.", labels=names)
    usage.add_metric(values, stats.num_bytes / stats.limit if stats.limit else 0.0)
    yield usage
