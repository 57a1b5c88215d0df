"""What one client's flood costs another client: first come, first served against --scheduling-policy fair.

One client sends all of its requests at once. The other asks a question now and then, alone at first, then beside the flood
under each of both policies, in turns.
"""

from __future__ import annotations

import random
import time

from ..core.config import DEFAULT_MODEL, EngineConfig
from ..core.engine import LLMEngine
from .datasets import BenchRequest, token_ids
from .latency import percentiles
from .report import Flags, Parser, finish, one_line_errors, show_table, spread, tracked
from .timing import in_new_process

CASES = {"without the flood": ("fcfs", False), "fcfs": ("fcfs", True), "fair": ("fair", True)}
"""Name → policy, and whether the flood comes."""
FIGURES = ("a question's TTFT, p50", "TTFT, p99", "latency, p50", "latency, p99", "flood's latency, p50")


def measure(args: Flags, policy: str, flooded: bool, seed: int) -> dict[str, float]:
    """`FIGURES` in milliseconds; the last one is 0 without a flood. A request's clock starts when it is due."""
    engine = LLMEngine(EngineConfig(args.model, max_num_seqs=args.seats, scheduling_policy=policy, max_model_len=1024))
    rng, waits = random.Random(seed), {"flood": [], "questions": []}
    coming = [(0.0, "flood", BenchRequest(token_ids(rng, 128), 64)) for _ in range(args.flood * flooded)]
    coming += [(1.0 + args.every * n, "questions", BenchRequest(token_ids(rng, 96), 32)) for n in range(args.questions)]
    due, start = {}, time.monotonic()
    while coming or engine.has_unfinished_requests():
        while coming and coming[0][0] <= time.monotonic() - start:
            later, client, asked = coming.pop(0)
            request = engine.prepare(f"{client} {len(due)}", asked.prompt, asked.params())
            request.client, due[request.request_id] = client, start + later
            engine.submit(request)
        for output in engine.step():
            if output.finished:
                moments = output.metrics.first_token_time, output.metrics.finished_time
                waits[output.request_id.split()[0]].append([moment - due[output.request_id] for moment in moments])
    engine.close()
    first, last = (percentiles(wait[which] for wait in waits["questions"]) for which in (0, 1))
    flood = percentiles(wait[1] for wait in waits["flood"])["p50"] if flooded else 0.0
    return dict(zip(FIGURES, (first["p50"], first["p99"], last["p50"], last["p99"], flood), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("fairness", __doc__)
    parser.add_flag("--model", DEFAULT_MODEL, "what to run")
    parser.add_flag("--flood", 64, "requests of the first client, of 128 tokens in and 64 out")
    parser.add_flag("--questions", 10, "requests of the second, of 96 tokens in and 32 out")
    parser.add_flag("--every", 0.5, "seconds from one question to the next")
    parser.add_flag("--seats", 8, "requests that run at once")
    parser.add_flag("--rounds", 3, "runs of each, in turn; medians count")
    args = parser.parse_args(argv)
    runs = [(number, name) for number in range(args.rounds) for name in CASES]
    with one_line_errors(RuntimeError):
        found = [(name, in_new_process(measure, args, *CASES[name], number)) for number, name in tracked(runs, "runs")]
    results = {name: {figure: spread(run[figure] for of, run in found if of == name) for figure in FIGURES} for name in CASES}
    rows = [[name, *(f"{of[figure]['median']:.0f}" for figure in FIGURES)] for name, of in results.items()]
    show_table(f"{args.model}, {args.flood} requests of one client at once; milliseconds", ["", *FIGURES], rows)
    finish(args, "fairness", results)


if __name__ == "__main__":
    main()
