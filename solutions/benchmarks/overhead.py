"""Microseconds that a step costs the host besides the model, a running sequence: scheduling, arrays, results, text.

On a fast device the model waits for the host, so every microsecond here is lost throughput. The engine is real, but a stand-in
for its executor returns tokens of a text at once, and its time is taken out. Time is the CPU time of the thread that steps the
engine, so what else runs does not count. vLLM 0.32 spends about 21 µs a sequence and step on the same work (256 running).

  schedule   who runs, how many tokens each, which blocks they need (with the prefix cache: hashes of full blocks)
  arrays     the flat batch: token ids, positions, slots, block tables
  update     append the new tokens, see who is done, free
  output     DELTA: text of each new token, as a streaming server needs it; FINAL_ONLY: nothing before the end
Goals, on one core: at most 8 µs a sequence and step with text, 4 µs without, and no more at 1,024 sequences than at 64.

examples:
  the whole table
    python -m solutions.benchmarks.overhead --output-json overhead.json
  where the time goes, function by function
    python -m cProfile -s tottime -m solutions.benchmarks.overhead --num-seqs 256 | head -40
"""

from __future__ import annotations

import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..batching.sampling_params import RequestOutputKind
from ..core.config import DEFAULT_MODEL
from ..core.output import RequestOutput
from ..core.platform.machine import settle_heap
from ..core.simulated.engine import make_engine
from .datasets import BenchRequest, token_ids
from .report import Parser, finish, one_line_errors, show_table, tracked
from .timing import pin_to_cores

PHASES = ("schedule", "arrays", "update", "output")
WARM_UP_STEPS = 8


@dataclass(slots=True)
class Overhead:
    """Host time of decode steps, in microseconds a running sequence and step: of each of `PHASES` and of the "rest" of the
    step, and their sum, as the median over rounds and from the lowest to the highest."""

    num_seqs: int
    prefix_caching: bool
    output_kind: str
    phases: dict[str, float]
    total: float
    lowest: float
    highest: float


class PhaseClock(Counter[str]):
    """CPU seconds that this thread spends in some methods, by phase."""

    def watch(self, owner: Any, method: str, phase: str) -> None:
        """Count the calls of one object's method as a phase."""
        call: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any) -> Any:
            start = time.thread_time()
            result = call(*args)
            self[phase] += time.thread_time() - start
            return result

        setattr(owner, method, timed)


def measure(
    num_seqs: int, prefix_caching: bool, kind: RequestOutputKind, *, rounds: int = 5, steps: int = 32,
    tokenizer_of: str = "smollm2-135m", on_output: Callable[[list[RequestOutput]], None] = lambda _: None,
) -> Overhead:  # fmt: skip
    """Time so many rounds of so many decode steps with a constant number of running sequences. Prompts have 17 to 32 tokens, so
    that in every step one sequence in sixteen begins a block, as in a server that has run for a while. With FINAL_ONLY text is
    made when a sequence ends, which none does here. `on_output` sees each step's outputs, outside the clock."""
    num_steps = WARM_UP_STEPS + rounds * steps
    engine = make_engine(num_seqs, 32 + num_steps + 2, prefix_caching, tokenizer_of)
    rng = random.Random(0)
    for index in range(num_seqs):
        request = BenchRequest(token_ids(rng, 17 + index % 16), num_steps + 2)
        engine.add_request(str(index), request.prompt, request.params(output_kind=kind))
    clock = PhaseClock()
    for owner, method, phase in (
        (engine.scheduler, "schedule", "schedule"), (engine.batch, "build", "arrays"),
        (engine.executor, "execute", "model"), (engine.scheduler, "update", "update"), (engine.outputs, "emit", "output"),
        (engine, "step", "step"),
    ):  # fmt: skip
        clock.watch(owner, method, phase)
    for _ in range(WARM_UP_STEPS):
        on_output(engine.step())
    results = []
    for _ in range(rounds):
        clock.clear()
        for _ in range(steps):
            on_output(engine.step())
        phases = {name: clock[name] for name in PHASES}
        phases["rest"] = clock["step"] - clock["model"] - sum(phases.values())
        results.append({name: 1e6 * seconds / (steps * num_seqs) for name, seconds in phases.items()})
    if len(engine.scheduler.running) != num_seqs:
        raise RuntimeError(f"{len(engine.scheduler.running)} of {num_seqs} sequences were running at the end")
    totals = [sum(result.values()) for result in results]
    median = {name: statistics.median(result[name] for result in results) for name in results[0]}
    return Overhead(num_seqs, prefix_caching, kind.name, median, statistics.median(totals), min(totals), max(totals))


GOALS = {"DELTA": 8.0, "FINAL_ONLY": 4.0}
"""Microseconds, by kind of output."""


def pin_to_one_core() -> None:
    """Keep this thread on one core with warm caches, and tensors from more threads; settle the heap as in the server."""
    settle_heap()
    torch.set_num_threads(1)
    pin_to_cores(slice(-1, None))


def show(results: list[Overhead]) -> None:
    columns = ["prefix cache, output", "running", *PHASES, "rest", "total µs", "range", "goal"]
    rows, costs = [], {}
    for r in results:
        goal, setting = GOALS[r.output_kind], f"{'on' if r.prefix_caching else 'off'}, {r.output_kind}"
        phases = [f"{r.phases[name]:.2f}" for name in (*PHASES, "rest")]
        met = f"{goal:g} {'met' if r.total <= goal else 'MISSED'}"
        rows.append([setting, r.num_seqs, *phases, f"{r.total:.2f}", f"{r.lowest:.2f}–{r.highest:.2f}", met])
        costs.setdefault(setting, []).append((r.num_seqs, r.total))
    show_table("Host time of a decode step, µs a running sequence (CPU time of one thread)", columns, rows)
    for setting, every in costs.items():
        (fewest, low), (most, high) = min(every), max(every)
        if fewest < most:
            print(f"prefix cache {setting}: a sequence costs {high / low:.2f}x as much at {most} as at {fewest} running")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("overhead", __doc__)
    parser.add_flag("--num-seqs", [64, 256, 1024], "running", metavar="N")
    parser.add_flag("--steps", 32, "measured steps in a round")
    parser.add_flag("--rounds", 5, "rounds, of which the median counts")
    parser.add_flag("--model", DEFAULT_MODEL, "whose tokenizer makes the text")
    args = parser.parse_args(argv)
    pin_to_one_core()
    settings = [
        (n, caching, RequestOutputKind[kind]) for caching in (True, False) for kind in GOALS for n in sorted(args.num_seqs)
    ]
    sizes = {"rounds": args.rounds, "steps": args.steps, "tokenizer_of": args.model}
    with one_line_errors():
        results = [measure(*setting, **sizes) for setting in tracked(settings, "measuring")]
    show(results)
    finish(args, "overhead", {"microseconds_per_sequence_and_step": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
