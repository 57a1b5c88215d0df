"""Prefill and decode apart: how long chats wait between tokens while long prompts arrive, by what the same cores are used for.

Chats have short prompts and answers that people read as they come; documents have long prompts and short answers. Both come at
random, at the same times for every arrangement: one engine with all cores, two engines that do everything, and one engine that
computes prompts beside one that writes answers. So all serve the same throughput, as long as they keep up. Then all requests
come at once, and throughput is what there is to lose.

examples:
  what results quote
    python -m solutions.benchmarks.two_phase --output-json two_phase.json
  longer documents, which come less often
    python -m solutions.benchmarks.two_phase --document-len 3000 --document-rate 0.08
"""

from __future__ import annotations

import asyncio
import math
import random
from importlib.metadata import version
from itertools import product

from ..core.config import DEFAULT_MODEL
from .datasets import BenchRequest, token_ids
from .end_to_end import Client, arrivals, check
from .latency import duration, percentiles
from .replicas import serving
from .report import Flags, Parser, finish, one_line_errors, say, show_table, spread

ARRANGEMENTS: dict[str, dict[str, int]] = {
    "one engine": {"replicas": 1}, "two engines": {"replicas": 2}, "1 and 1": {"replicas": 1, "prefill_replicas": 1}
}  # fmt: skip
"""What serves → settings of the Ray application."""
LOADS = {False: "at random", True: "all at once"}
CHAT_LEN, DOCUMENT_OUTPUT = 32, 4
"""Tokens of a chat's prompt, and of the answer to a document."""
MEASURES = ("chats, ITL p50", "ITL p99", "ITL longest", "TTFT p50", "documents, TTFT p50", "output tok/s")


def load(args: Flags, seconds: float, at_once: bool, seed: int) -> tuple[list[BenchRequest], list[float]]:
    """The requests of so many seconds in order of arrival, and their times in seconds."""
    rng, plan = random.Random(seed), []
    for kind, (rate, prompt, output) in enumerate(
        ((args.chat_rate, CHAT_LEN, args.chat_output), (args.document_rate, args.document_len, DOCUMENT_OUTPUT))
    ):
        times = arrivals(max(1, round(rate * seconds)), math.inf if at_once else rate, seed=seed + kind)
        plan += [(time, BenchRequest(token_ids(rng, prompt), output)) for time in times]
    plan.sort(key=lambda planned: planned[0])
    return [request for _, request in plan], [time for time, _ in plan]


def measure(url: str, args: Flags, seconds: float, at_once: bool, seed: int) -> dict[str, float]:
    """`MEASURES` of one arrangement under one load, waits in milliseconds. Raises what `check` does."""
    requests, times = load(args, seconds, at_once, seed)
    streams = asyncio.run(Client(url, args.model).open_loop(requests, times))
    check(requests, streams)
    chats = [stream for request, stream in zip(requests, streams, strict=True) if request.output_len != DOCUMENT_OUTPUT]
    documents = [stream for request, stream in zip(requests, streams, strict=True) if request.output_len == DOCUMENT_OUTPUT]
    waits = percentiles(wait for stream in chats for wait in stream.itl)
    first, read = (percentiles(stream.ttft for stream in of)["p50"] for of in (chats, documents))
    rate = sum(stream.num_tokens for stream in streams) / duration(streams)
    return dict(zip(MEASURES, (waits["p50"], waits["p99"], waits["max"], first, read, rate), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("two_phase", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "what to run")
    parser.add_flag("--chat-rate", 1.0, "chats a second")
    parser.add_flag("--chat-output", 48, "tokens of an answer to a chat")
    parser.add_flag("--document-rate", 0.2, "documents a second")
    parser.add_flag("--document-len", 1500, "tokens of a document")
    parser.add_flag("--seconds", 20, "in which requests arrive")
    parser.add_flag("--rounds", 2, "rounds of each arrangement, in turn; the median counts")
    args = parser.parse_args(argv)
    settings = {
        "model": args.model,
        "max_model_len": args.document_len + 64 + args.chat_output,
        "kv_cache_memory_bytes": "512MiB",
    }
    found = {(at_once, name): [] for at_once, name in product((False, True), ARRANGEMENTS)}
    with one_line_errors(RuntimeError), serving(settings, ARRANGEMENTS) as urls:
        for url in urls.values():  # so that every engine has run once
            measure(url, args, 8.0, True, 99)
        for number, (at_once, name) in product(range(args.rounds), found):
            say(f"{name}: round {number + 1} of {args.rounds}, {LOADS[at_once]}")
            found[at_once, name].append(measure(urls[name], args, args.seconds, at_once, 4 * number + 2 * at_once))
    results = {}
    for at_once in (False, True):
        load_name = "all at once" if at_once else "at random"
        results[load_name] = {
            name: {measure: spread(run[measure] for run in found[at_once, name]) for measure in MEASURES}
            for name in ARRANGEMENTS
        }
        rows = [[name, *(f"{of[kind]['median']:.0f}" for kind in MEASURES)] for name, of in results[load_name].items()]
        show_table(f"{args.model}, requests {load_name}; waits in ms", ["what serves", *MEASURES], rows)
    finish(args, "two_phase", results, ray=version("ray"))


if __name__ == "__main__":
    main()
