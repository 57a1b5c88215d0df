"""How long a client waits: moments of a stream of tokens, percentiles, and goodput.

Times are those of a client: from sending a request to reading a piece of its answer. TTFT is the time to the first token;
TPOT the time per token after it, as a mean over one request; ITL every single wait between two pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Stream:
    """What came of one request, and when, in seconds on the clock of `time.perf_counter`.

    Attributes:
        start: when it was sent.
        times: when each piece of the answer came; a piece is a token, or several where the client was slow to read.
        num_tokens: tokens of the answer.
        num_prompt: tokens of the prompt. num_cached: those that the server did not compute, if it says so.
        error: why there is no answer, as the server says it.
    """

    start: float
    times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt: int = 0
    num_cached: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.times[0] - self.start

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token, after which nobody waits."""
        return (self.times[-1] - self.times[0]) / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def latency(self) -> float:
        """To the last token."""
        return self.times[-1] - self.start


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Mean, percentiles and the longest, in milliseconds; a percentile between two values is interpolated.

    Raises:
        ValueError: there are no values.
    """
    values = 1e3 * np.fromiter(seconds, dtype=float)
    if not len(values):
        raise ValueError("there is nothing to take percentiles of")
    of = dict(zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True))
    return {"mean": float(values.mean())} | {f"p{q}": float(value) for q, value in of.items()} | {"max": float(values.max())}


def latencies(streams: Sequence[Stream]) -> dict[str, dict[str, float]]:
    """`percentiles` of TTFT, TPOT, ITL and the whole time, of the streams without an error."""
    answered = [stream for stream in streams if stream.error is None]
    tpots = [stream.tpot for stream in answered if stream.tpot is not None]
    waits = [wait for stream in answered for wait in np.diff(stream.times)]
    kinds = {"ttft": [s.ttft for s in answered], "tpot": tpots, "itl": waits, "latency": [s.latency for s in answered]}
    return {f"{kind}_ms": percentiles(values) for kind, values in kinds.items() if values}


def goodput(streams: Sequence[Stream], seconds: float, ttft: float, tpot: float) -> float:
    """Requests a second whose answer came within both limits, which are in seconds (Zhong et al., "DistServe", OSDI 2024,
    §1). What was refused or answered too late counts for nothing."""
    good = [s for s in streams if s.error is None and s.ttft <= ttft and (s.tpot or 0.0) <= tpot]
    return len(good) / seconds
