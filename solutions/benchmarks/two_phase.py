"""Prefill and decode apart: how long chats wait between tokens while long prompts arrive, by what the same cores are used for.

Chats have short prompts and answers that people read as they come; documents have long prompts and short answers. Both come at
random, at the same times for every arrangement: one engine with all cores, two engines that do everything, and one engine that
computes prompts beside one that writes answers. So all serve the same throughput, as long as they keep up. Then all requests
come at once, and throughput is what there is to lose.
"""

from __future__ import annotations

import asyncio
import math
import random
from functools import partial
from importlib.metadata import version

from ..core.config import DEFAULT_MODEL
from .datasets import BenchRequest, token_ids
from .end_to_end import Client, arrivals, check
from .latency import duration, percentiles
from .replicas import alternate, serving
from .report import Flags, Parser, finish, one_line_errors, show_table

ARRANGEMENTS: dict[str, dict[str, int]] = {
    "one engine": {"replicas": 1}, "two engines": {"replicas": 2}, "1 and 1": {"replicas": 1, "prefill_replicas": 1}
}  # fmt: skip
"""What serves → settings of the Ray application."""
LOADS = {"at random": False, "all at once": True}
CHAT_LEN, DOCUMENT_OUTPUT = 32, 4
"""Tokens of a chat's prompt, and of the answer to a document."""
FIGURES = ("chats, ITL p50", "ITL p99", "ITL longest", "TTFT p50", "documents, TTFT p50", "output tok/s")


def chats_and_documents(args: Flags, at_once: bool, seed: int) -> tuple[list[BenchRequest], list[float]]:
    """The requests of `args.seconds` in order of arrival, and their times in seconds."""
    rng, plan = random.Random(seed), []
    chats, documents = (args.chat_rate, CHAT_LEN, args.chat_output), (args.document_rate, args.document_len, DOCUMENT_OUTPUT)
    for kind, (rate, prompt, output) in enumerate((chats, documents)):
        times = arrivals(max(1, round(rate * args.seconds)), math.inf if at_once else rate, seed=seed + kind)
        plan += [(time, BenchRequest(token_ids(rng, prompt), output)) for time in times]
    plan.sort(key=lambda planned: planned[0])
    return [request for _, request in plan], [time for time, _ in plan]


def measure(args: Flags, at_once: bool, url: str, number: int) -> dict[str, float]:
    """`FIGURES` of one arrangement in one round, waits in milliseconds. Raises what `check` does."""
    requests, times = chats_and_documents(args, at_once, 4 * number + 2 * at_once)
    streams = asyncio.run(Client(url, args.model).open_loop(requests, times))
    check(requests, streams)
    documents = [stream for request, stream in zip(requests, streams, strict=True) if request.output_len == DOCUMENT_OUTPUT]
    chats = [stream for request, stream in zip(requests, streams, strict=True) if request.output_len != DOCUMENT_OUTPUT]
    waits = percentiles(wait for stream in chats for wait in stream.itl)
    first, read = (percentiles(stream.ttft for stream in of)["p50"] for of in (chats, documents))
    rate = sum(stream.num_tokens for stream in streams) / duration(streams)
    return dict(zip(FIGURES, (waits["p50"], waits["p99"], waits["max"], first, read, rate), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("two_phase", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "what to run")
    parser.add_flag("--chat-rate", 1.0, "chats a second")
    parser.add_flag("--chat-output", 48, "tokens of an answer to a chat")
    parser.add_flag("--document-rate", 0.2, "documents a second")
    parser.add_flag("--document-len", 1500, "tokens of a document")
    parser.add_flag("--seconds", 20, "in which requests arrive")
    parser.add_flag("--rounds", 3, "rounds of each arrangement, in turn; the median counts")
    args = parser.parse_args(argv)
    context = args.document_len + CHAT_LEN + args.chat_output
    settings = {"model": args.model, "max_model_len": context, "kv_cache_memory_bytes": "512MiB"}
    results = {}
    with one_line_errors(RuntimeError), serving(settings, ARRANGEMENTS) as urls:
        for url in urls.values():  # so that every engine has run once
            measure(Flags(**vars(args) | {"seconds": 5}), True, url, 99)
        for load, at_once in LOADS.items():
            results[load] = alternate(urls, args.rounds, partial(measure, args, at_once))
    for load, found in results.items():
        rows = [[name, *(f"{of[figure]['median']:.0f}" for figure in FIGURES)] for name, of in found.items()]
        show_table(f"{args.model}, requests {load}; waits in ms", ["what serves", *FIGURES], rows)
    finish(args, "two_phase", results, ray=version("ray"))


if __name__ == "__main__":
    main()
