"""A decode step's wall time on a device that only waits: host and device in turn, or the next step decided under this one."""

from __future__ import annotations

import random
import statistics
import time

from ..batching.sampling_params import RequestOutputKind
from ..core.config import DEFAULT_MODEL
from ..core.overlap.lookahead import Lookahead
from ..core.simulated.engine import make_engine
from .datasets import BenchRequest, token_ids
from .overhead import WARM_UP_STEPS, pin_to_one_core
from .report import Parser, finish, one_line_errors, show_table, tracked


def step_ms(ahead: bool, device_ms: float, num_seqs: int, steps: int) -> float:
    """Median milliseconds of so many decode steps of so many running sequences, text of each token included."""
    count = WARM_UP_STEPS + steps
    engine, rng = make_engine(num_seqs, 36 + count, True, DEFAULT_MODEL), random.Random(0)
    engine.executor.seconds = device_ms / 1e3
    if ahead:
        engine.batch = Lookahead(engine.scheduler, engine.batch, engine.executor)
    for index in range(num_seqs):
        request = BenchRequest(token_ids(rng, 17 + index % 16), count + 2)
        engine.add_request(str(index), request.prompt, request.params(output_kind=RequestOutputKind.DELTA))
    times = [(engine.step(), time.perf_counter())[1] for _ in range(count)]
    return 1e3 * statistics.median(map(float.__sub__, times[WARM_UP_STEPS:], times[WARM_UP_STEPS - 1 :]))


def main(argv: list[str] | None = None) -> None:
    parser = Parser("overlap", __doc__)
    parser.add_flag("--device-ms", [1.0, 2.0, 4.0, 8.0, 16.0], "what a step takes the device", metavar="MS")
    parser.add_flag("--num-seqs", 256, "running")
    parser.add_flag("--steps", 64, "measured steps, of which the median counts")
    args = parser.parse_args(argv)
    pin_to_one_core()
    columns = ["device", "host", "host and device in turn", "next step decided ahead"]
    with one_line_errors():
        cases = [(False, 0.0)] + [(ahead, device) for device in args.device_ms for ahead in (False, True)]
        host, *times = [step_ms(*case, args.num_seqs, args.steps) for case in tracked(cases, "measuring")]
    rows = [[device, host, *times[2 * i : 2 * i + 2]] for i, device in enumerate(args.device_ms)]
    show_table("A step on a simulated device, ms", columns, [[f"{value:.2f}" for value in row] for row in rows])
    finish(args, "overlap", {"milliseconds": [dict(zip(columns, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()
