"""The tables of measurements in README.md and benchmarks/README.md, made from the records in benchmarks/results.

``python -m tests.measured`` writes the tables into both documents again, after a record has changed. A test holds them equal.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
CPU, AMX, GPU = "epyc-zen4-2core", "xeon-amx-2core", "nvidia-h200"
WORKLOADS = {"W1": "one request", "W2": "32 at once", "W3": "64 of mixed lengths", "W4": "32 with a common prefix"}

Table = list[str]
"""Lines of Markdown: head, rule, rows."""


def record(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def table(head: str, rows: Iterable[Iterable[object]]) -> Table:
    """Lay out a table; columns of numbers are set right.

    Args: head: the columns' names, with `|` between. rows: their cells.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    rules = ["---:" if re.fullmatch(r"[−\d.,]+x?( (%|ms|s|µs))?", cell) else "---" for cell in cells[0][1:]]
    return [f"| {head} |", f"|{'|'.join(['---', *rules])}|", *(f"| {' | '.join(row)} |" for row in cells)]


def find(rows: list[dict[str, Any]], **wanted: object) -> dict[str, Any]:
    """The one row that has all these values."""
    (row,) = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return row


def rate(system: dict[str, Any]) -> str:
    """Output tokens a second of a system, the median of its runs."""
    return f"{system['output_tokens_per_second']['median']:,.0f}"


def percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def milliseconds(seconds: float, digits: int = 0) -> str:
    return f"{1000 * seconds:,.{digits}f} ms"


# README.md


def headline_workloads() -> Table:
    runs, systems = record(f"{CPU}_compare_peers"), ("bf16", "int8", "vllm", "llama.cpp")
    rows = [[text, *(rate(runs[name][system]) for system in systems)] for name, text in WORKLOADS.items()]
    return table("output tokens a second | bfloat16 | int8 | vLLM 0.32 | llama.cpp", rows)


def headlines() -> Table:
    systems, prefix, step = record("memory")["systems"], record(f"{CPU}_prefix_cache")["shared_prefix"], record(f"{GPU}_gpu")
    big, decode = record(f"{GPU}_throughput"), find(step["triton"]["steps"], what="decode", batch=64)
    paged, reserved = (find(systems, system=name)["waste"] for name in ("paged, 16", "contiguous, max 2048"))
    rows = [
        ["KV memory reserved and not filled", percent(paged, 1), percent(reserved), "2,048 slots reserved for each sequence"],
        [
            "time to first token, 512 tokens of the prompt cached", milliseconds(prefix["others"]),
            milliseconds(prefix["first"]), "nothing cached",
        ],
        ["output tokens a second, LLaMA-7B on an H200", rate(big["engine"]), rate(big["hf"]), "transformers, batches of 64"],
        [
            "a decode step of 64 sequences on that H200", milliseconds(decode["seconds"], 1), milliseconds(decode["floor"], 1),
            "the least time that the card allows",
        ],
    ]  # fmt: skip
    return table("what | this engine | baseline | the baseline is", rows)


# benchmarks/README.md


def against_peers() -> Table:
    runs = record(f"{CPU}_compare_peers")
    rows = []
    for name, text in WORKLOADS.items():
        rates = [rate(runs[name][system]) for system in ("bf16", "int8", "gguf", "vllm", "llama.cpp")]
        ratios = [runs[name][peer]["bf16_over_this"]["low"] for peer in ("vllm", "llama.cpp")]
        rows.append([text, *rates, *(f"{ratio:.1f}" for ratio in ratios)])
    peers = "vLLM | llama.cpp | at least, of vLLM | at least, of llama.cpp"
    return table(f"workload | bfloat16 | int8 | 4-bit blocks | {peers}", rows)


def against_transformers(machine: str = CPU) -> Table:
    runs = record(f"{machine}_compare")
    rows = []
    for name, text in WORKLOADS.items():
        if name not in runs:
            continue
        ratio = runs[name]["hf"]["bf16_over_this"]
        rates = [rate(runs[name][system]) for system in ("bf16", "hf")]
        rows.append([text, *rates, *(f"{ratio[key]:.{0 if ratio['mean'] > 10 else 1}f}" for key in ("mean", "low", "high"))])
    return table("workload | bfloat16 | transformers | bfloat16 / transformers | from | to", rows)


def with_amx() -> Table:
    return against_transformers(AMX)


def fewer_bits_with_amx() -> Table:
    pairs = (
        ("int4 weights against int8 weights", "int4", "int4", "int8"),
        ("int8 KV cache against one in bfloat16", "quantization", "int8-kv", "bf16"),
        ("`--batch-invariant` against without", "quantization", "invariant", "bf16"),
    )
    rows = []
    for text, file, name, first in pairs:
        runs = record(f"{AMX}_{file}")
        found = [runs[load][name][f"{first}_over_this"] for load in ("W1", "W2") if load in runs]
        rows.append([text, *[""] * (2 - len(found)), *(f"{1 / ratio['mean']:.2f}x" for ratio in found)])
    return table("speed | one request | 32 at once", rows)


def throughput() -> Table:
    runs = record(f"{CPU}_throughput_mixed")
    rows = [["this engine", rate(runs["engine"])], ["transformers, static batches of 32", rate(runs["hf"])]]
    return table("output tokens a second | rate", [*rows, ["ratio", f"{runs['ratio_engine_to_hf']['median']:.1f}"]])


def weights() -> Table:
    runs = record(f"{CPU}_quantization")
    names = {
        "bf16": "bfloat16", "int8": "int8 weights", "int4": "int4 weights",
        "gguf": "the GGUF file's own blocks, of 4 bits", "int8-kv": "int8 KV cache", "invariant": "`--batch-invariant`",
    }  # fmt: skip
    rows = [[text, *(rate(runs[workload][name]) for workload in ("W1", "W2"))] for name, text in names.items()]
    return table("output tokens a second | one request | 32 at once", rows)


def beside_busy_processes() -> Table:
    runs = record(f"{CPU}_compare_busy")
    rows = []
    for name in ("W1", "W2"):
        for system, text in (("bf16", "bfloat16"), ("int8", "int8")):
            idle, *beside = (runs[key][system] for key in (name, f"{name} beside 1", f"{name} beside 2"))
            medians = [entry["output_tokens_per_second"]["median"] for entry in (idle, *beside)]
            kept = [percent(median / medians[0]) for median in medians[1:]]
            rows.append([f"{WORKLOADS[name]}, {text}", *map(rate, (idle, *beside)), *kept])
    return table("output tokens a second | idle machine | beside one | beside two | kept beside one | beside two", rows)


def beside(name: str, systems: dict[str, str], heads: str) -> Table:
    """Rows: a workload and what was changed; columns: the speed without it and with it, and their ratio."""
    runs, rows = record(name), []
    for workload in ("W1", "W2"):
        for plain, changed in systems.items():
            pair = [runs[workload][system] for system in (plain, changed)]
            without, with_it = (entry["output_tokens_per_second"]["median"] for entry in pair)
            rows.append([f"{WORKLOADS[workload]}, {plain}", *map(rate, pair), f"{with_it / without:.2f}"])
    return table(heads, rows)


def narrow_registers() -> Table:
    systems = {"bf16": "bf16-avx2", "int8": "int8-avx2"}
    return beside(f"{CPU}_compare_avx2", systems, "output tokens a second | AVX-512 | AVX2 | ratio")


def quota() -> Table:
    return beside(f"{CPU}_compare_quota", {"bf16": "quota"}, "output tokens a second | two cores | 1.5 cores | ratio")


def shares() -> Table:
    models, rows = record(f"{CPU}_shares"), []
    names = {"smollm2-135m": "SmolLM2-135M", "qwen3-0.6b": "Qwen3-0.6B", "moe-1b": "experts, 1B active"}
    for name, text in names.items():
        steps = models[name]["steps"]
        rows.append([text, *(percent(step["floor"] / step["seconds"]) for step in steps)])
    return table("share of the floor | decode, batch 1 | decode, batch 32 | prompt of 512", rows)


def quality_plain() -> Table:
    runs = record(f"{CPU}_quality")["runs"]
    names = {"16 bits": "bfloat16", "int8": "int8", "int4, groups of 32": "int4", "int8 KV cache": "int8 KV cache"}
    return table("weights | perplexity", [[text, f"{find(runs, name=name)['perplexity']:.2f}"] for name, text in names.items()])


def quality_groups() -> Table:
    runs = record(f"{CPU}_quality")["runs"]
    lost = {run["name"]: math.log(run["perplexity"] / runs[0]["perplexity"]) for run in runs}
    rows = []
    for name in ("RTN", "GPTQ", "GPTQ, act-order", "AWQ"):
        row = [name, *(f"{find(runs, name=f'{name}, groups of {size}')['perplexity']:.2f}" for size in (64, 128))]
        shares = (1 - lost[f"{name}, groups of {size}"] / lost[f"RTN, groups of {size}"] for size in (64, 128))
        rows.append(row + ([percent(share) for share in shares] if name != "RTN" else ["", ""]))
    return table("4 bits by | perplexity, groups of 64 | of 128 | regained, groups of 64 | of 128", rows)


def speculation() -> Table:
    cases = record(f"{CPU}_speculative")["cases"]
    names = {"repetitive": "text that repeats itself", "ordinary": "ordinary answers", "random": "random text"}
    rows = []
    for name, text in names.items():
        for batch in (1, 4, 16, 32):
            methods = ("ngram", "ngram, always", "draft model")
            found = (find(cases, text=name, batch=batch, method=method) for method in methods)
            rows.append([text, batch, *(f"{case['speedup']:.2f}x" for case in found)])
    return table("text | batch | n-grams, as many as pay | always five | int4 draft, as many as pay", rows)


def heads() -> Table:
    """A head's drafts: what each shape brings a step, and what becomes of the speed."""
    names = {"ordinary": "ordinary answers", "repetitive": "text that repeats itself", "random": "random text"}
    methods = {"one token": "one token", "a chain of three": "three in a chain", "a tree of seven": "a tree of seven"}
    methods |= {"eagle": "up to three, as many as pay", "eagle, tree": "of the tree, as much as pays"}
    cases = record(f"{CPU}_eagle")["cases"]
    rows = []
    for text, batch, method in itertools.product(names, sorted({case["batch"] for case in cases}), methods):
        case = find(cases, text=text, batch=batch, method=method)
        rows.append([names[text], batch, methods[method], f"{case['tokens_per_step']:.2f}", f"{case['speedup']:.2f}x"])
    return table("text | batch | drafted for each | tokens a step | as fast as plain", rows)


def memory() -> Table:
    names = {
        "contiguous, max 2048": "2,048 slots reserved for each", "contiguous, pow2": "output rounded up to a power of two",
        "paged, 16": "blocks of 16",
    }  # fmt: skip
    found = [(text, find(record("memory")["systems"], system=name)) for name, text in names.items()]
    rows = [[text, percent(row["waste"], 1 if row["waste"] < 0.1 else 0), f"{row['running']:.0f}"] for text, row in found]
    return table("24,576 slots of KV memory | reserved and not filled | sequences at once", rows)


def prefix_cache() -> Table:
    result = record(f"{CPU}_prefix_cache")
    ratios = result["ratios_without_hits"]
    rows = [
        ["time to first token, first request", milliseconds(result["shared_prefix"]["first"])],
        ["time to first token, the others", milliseconds(result["shared_prefix"]["others"])],
        ["nothing shared: throughput lost, median of 15 pairs", percent(1 - ratios["median"], 1)],
        ["nothing shared: lost in the best pair", percent(1 - ratios["max"])],
        ["nothing shared: lost in the worst pair", percent(1 - ratios["min"])],
    ]
    return table("what | measured", rows)


def tiers() -> Table:
    columns = ("computed", "host memory", "files in memory", "files on disk", "computed and written")
    rows = [
        [f"{int(length):,}", *(milliseconds(times[name]["median"]) for name in columns)]
        for length, times in record(f"{CPU}_kv_tiers").items()
    ]
    return table(f"tokens of the prompt | {' | '.join(columns)}", rows)


def overhead() -> Table:
    costs = record(f"{CPU}_overhead")["microseconds_per_sequence_and_step"]
    kinds = {"DELTA": "text streamed", "FINAL_ONLY": "text at the end"}
    rows = [
        [text, *(f"{find(costs, num_seqs=n, prefix_caching=True, output_kind=kind)['total']:.1f}" for n in (256, 1024))]
        for kind, text in kinds.items()
    ]
    return table("µs a running sequence | 256 running | 1,024 running", rows)


def kernels() -> Table:
    names = {
        "a product of 576 × 3,072, 1 token": ("linear gate_up", "1 rows"),
        "the same, 32 tokens": ("linear gate_up", "32 rows"),
        "the same, 512 tokens": ("linear gate_up", "512 rows"),
        "attention, 32 sequences of 256": ("attention, decode", "32 × 256"),
        "attention, a prompt of 512": ("attention, prompt", "1 × 512"),
        "RMSNorm, 512 tokens": ("rms_norm", "512 rows"),
    }
    found, rows = record(f"{CPU}_kernels")["kernels"], []
    for text, (kernel, size) in names.items():
        cases = {case["precision"]: case for case in found if (case["kernel"], case["size"]) == (kernel, size)}
        shares = [percent(cases[kind]["share"]) if kind in cases else "" for kind in ("bfloat16", "int8")]
        rows.append([text, *shares])
    return table("share of the floor | bfloat16 | int8", rows)


def ranks() -> Table:
    steps = record(f"{CPU}_scaling")["steps"]
    kinds = {
        "a decode step, batch 1": {"what": "decode", "batch": 1},
        "a decode step, batch 8": {"what": "decode", "batch": 8},
        "a prompt of 256": {"what": "prefill", "batch": 1},
    }
    rows = []
    for text, wanted in kinds.items():
        one, two = (find(steps, ranks=n, **wanted) for n in (1, 2))
        times = [milliseconds(step["seconds"]) for step in (one, two)]
        rows.append([text, *times, f"{one['seconds'] / two['seconds']:.2f}x", percent(two["communication"])])
    return table("what | one rank | two ranks | ratio | of it sums", rows)


def sums() -> Table:
    found = record(f"{CPU}_scaling")["collectives"]
    rows = [[name, f"{1e6 * find(found, method=name, bytes=1024)['seconds']:.0f} µs"] for name in ("shared memory", "gloo")]
    return table("one sum of 1 KiB over two ranks | time", rows)


def serving() -> Table:
    result = record(f"{CPU}_serving")
    before, after = result["offline_tokens_per_second"]["values"]
    rows = [
        ["output tokens a second, served", f"{result['served_tokens_per_second']:.0f}"],
        ["output tokens a second, offline before", f"{before:.0f}"],
        ["output tokens a second, offline after", f"{after:.0f}"],
        ["cost of HTTP and text", percent(result["cost_of_serving"], 1)],
        ["errors", result["errors"]],
        ["`/health`, 99th percentile", f"{result['health_ms']['p99']:.0f} ms"],
    ]
    return table("what | measured", rows)


def adapters() -> Table:
    rows = []
    for what, times in record(f"{CPU}_lora").items():
        medians = {count: times[count]["median"] for count in ("0", "1", "8") if count in times}
        cells = [milliseconds(medians["0"], 1)]
        cells += [f"{medians[count] / medians['0']:.2f}x" if count in medians else "" for count in ("1", "8")]
        rows.append([what, *cells])
    return table("a step | no adapter | one, times as long | eight, times as long", [rows[1], rows[2], rows[0]])


def page() -> Table:
    feed = record(f"{CPU}_feed")["cost_of_feed"]
    rows = [
        ["share of throughput that a watcher of `/live` costs, mean of 9", percent(feed["mean"], 1)],
        ["standard error of that mean", percent(feed["standard_error"], 1)],
    ]
    return table("what | measured", rows)


def replicas() -> Table:
    result = record(f"{CPU}_replicas")
    rows = [
        ["prompt tokens cached", *(percent(way["hit_rate"]["median"]) for way in result.values())],
        ["time to first token, median", *(f"{way['ttft_p50']['median'] / 1000:.2f} s" for way in result.values())],
        ["time to first token, 99th percentile", *(f"{way['ttft_p99']['median'] / 1000:.1f} s" for way in result.values())],
        ["output tokens a second", *(rate(way) for way in result.values())],
    ]
    assert list(result) == ["prefix", "round_robin"]
    return table("what | by prefix | in turn", rows)


def arrangements(load: str, names: dict[str, str]) -> Table:
    """Rows are what is measured, columns what serves."""
    found = record(f"{CPU}_two_phase")[load]
    rows = [[text, *(f"{of[figure]['median']:,.0f}" for of in found.values())] for figure, text in names.items()]
    return table(f"what | {' | '.join(found)}", rows)


def two_phase() -> Table:
    names = {
        "chats, ITL p50": "a chat's wait between tokens, median, ms", "ITL p99": "99th percentile, ms",
        "ITL longest": "longest, ms", "TTFT p50": "a chat's time to first token, median, ms",
        "documents, TTFT p50": "a document's, median, ms",
    }  # fmt: skip
    return arrangements("at random", names)


def two_phase_at_once() -> Table:
    names = {"output tok/s": "output tokens a second", "TTFT p50": "a chat's time to first token, median, ms"}
    return arrangements("all at once", names)


def fairness() -> Table:
    found = record(f"{CPU}_fairness")
    names = {"without the flood": "no flood", "fcfs": "`fcfs`", "fair": "`fair`"}
    figures = ("a question's TTFT, p50", "TTFT, p99", "latency, p99")
    rows = [[text, *(f"{found[name][of]['median']:,.0f} ms" for of in figures)] for name, text in names.items()]
    for row in rows[1:]:
        flood = found[row[0].strip("`")]["flood's latency, p50"]
        row.append(f"{flood['median']:,.0f} ms")
    rows[0].append("")
    head = "policy | a question's TTFT, median | 99th percentile | its latency, 99th percentile | the flood's latency, median"
    return table(head, rows)


def radix() -> Table:
    """A row for each trace, cache and block size: memory is ample, but for one column."""
    every = record(f"{CPU}_radix")
    rows = []
    for case in every:
        if case["memory"] == "ample":
            short = find(every, **{key: case[key] for key in ("trace", "block_size", "cache")}, memory="short")
            rows.append([
                f"{case['trace']}, {case['cache']} of {case['block_size']}".replace("tree of", "tree, blocks of"),
                percent(case["found"], 1), percent(short["found"], 1), f"{case['host']['median']:.1f} µs", f"{case['kept']:,}",
                f"{case['index']:.0f}",
            ])  # fmt: skip
    head = "trace, cache | prompt tokens found | found in short memory | host, a block | KV slots kept | index, bytes a slot"
    return table(head, rows)


def gpu_throughput() -> Table:
    runs = record(f"{GPU}_throughput")
    engine = runs["engine"]["runs"][0]["details"]
    rows = [
        ["output tokens a second", rate(runs["engine"]), rate(runs["hf"])],
        ["time per output token, median", f"{engine['tpot_ms_median']:.1f} ms", ""],
    ]
    return table("what | this engine | transformers", rows)


def gpu_steps() -> Table:
    result = record(f"{GPU}_gpu")["triton"]
    rows = []
    for batch, text in {1: "1", 32: "32", 64: "64", 256: "256, at 840"}.items():
        graphs, eager = (find(result[kind], what="decode", batch=batch) for kind in ("steps", "eager"))
        shares = [percent(step["floor"] / step["seconds"]) for step in (graphs, eager)]
        rows.append([text, milliseconds(graphs["seconds"], 1), *shares])
    return table("batch | time | share of the floor | without CUDA graphs", rows)


def gpu_prompts() -> Table:
    steps = [step for step in record(f"{GPU}_gpu")["triton"]["steps"] if step["what"] == "prefill"]
    rows = [[f"{s['context']:,}", milliseconds(s["seconds"]), percent(s["floor"] / s["seconds"])] for s in steps]
    return table("tokens of the prompt | time | share of the floor", rows)


def gpu_attention() -> Table:
    found = record(f"{GPU}_gpu")["attention"]
    ways = {
        "Triton": ("triton", "auto"), "CUDA": ("cuda", "auto"), "PyTorch's operators": ("torch", "auto"),
        "Triton, fp8 cache": ("triton", "fp8"), "Triton, int8 cache": ("triton", "int8"),
    }  # fmt: skip
    rows = []
    for text, (backend, dtype) in ways.items():
        cases = [find(found, backend=backend, kv_cache_dtype=dtype, batch=batch, context=1024) for batch in (32, 64)]
        rows.append([text, *(percent(case["bandwidth_share"]) for case in cases)])
    return table("share of the bandwidth | batch 32 | batch 64", rows)


def gpu_caches() -> Table:
    names = {
        "kv-auto": "LLaMA-7B, bfloat16 cache", "kv-fp8": "LLaMA-7B, fp8 cache", "kv-int8": "LLaMA-7B, int8 cache",
        "mistral-7b": "Mistral-7B, bfloat16 cache",
    }  # fmt: skip
    rows = [[text, rate(record(f"{GPU}_throughput_{name}")["engine"])] for name, text in names.items()]
    return table("model and KV cache | output tokens a second", rows)


def gpu_latency() -> Table:
    rows = [
        [
            f"{row['size']:.1f}", f"{row['ttft_ms']['p50']:.0f} ms", f"{row['ttft_ms']['p99']:.0f} ms",
            f"{row['tpot_ms']['p50']:.1f} ms", percent(row["attainment"]),
        ]
        for row in record(f"{GPU}_latency")["rows"]
        if row["kind"] == "rate"
    ]  # fmt: skip
    return table("requests a second | TTFT, median | TTFT, 99th percentile | TPOT, median | within both limits", rows)


DOCUMENTS = {
    "README.md": (headline_workloads, headlines),
    "benchmarks/README.md": (
        against_peers, against_transformers, throughput, with_amx, fewer_bits_with_amx, weights, beside_busy_processes,
        quota, narrow_registers, shares,
        quality_plain, quality_groups, speculation, heads, memory, prefix_cache, radix, tiers, overhead, kernels, ranks, sums,
        serving, page, replicas, two_phase, two_phase_at_once, fairness, adapters,
        gpu_throughput, gpu_caches, gpu_steps, gpu_prompts, gpu_attention, gpu_latency,
    ),
}  # fmt: skip
"""Document → what makes its tables, in their order."""
TABLE = re.compile(r"(?<=<!-- measured -->\n).*?(?=\n\n)", re.DOTALL)
"""A table of measurements in a document: it stands below a comment that says so."""


def tables_in(text: str) -> list[Table]:
    return [found.splitlines() for found in TABLE.findall(text)]


def with_tables(text: str, tables: list[Table]) -> str:
    """The document with its tables of measurements replaced, in their order."""
    left = iter(tables)
    return TABLE.sub(lambda _: "\n".join(next(left)), text)


def main() -> None:
    for document, makers in DOCUMENTS.items():
        path = ROOT / document
        path.write_text(with_tables(path.read_text(encoding="utf-8"), [make() for make in makers]), encoding="utf-8")


if __name__ == "__main__":
    main()
