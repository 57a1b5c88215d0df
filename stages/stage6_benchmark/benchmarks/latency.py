"""How long a client waits: moments of a stream of tokens, percentiles, and goodput.

Times are those of a client: from sending a request to reading a piece of its answer. TTFT is the time to the first token;
TPOT the time per token after it, as a mean over one request; ITL every single wait between two pieces.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Stream:
    """What came of one request, and when, in seconds on the clock of the event loop that read it.

    Attributes:
        start: when it was due.
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
        """Time to the first token, in seconds."""
        # Hint: Every one of them is a difference of two entries of `times`, or of the first of them and `start`. Which
        # two?
        raise NotImplementedError("Stage 6 · Task 6.1: Stream.ttft, see stages/stage6_benchmark/GUIDE.md#task-6-1")

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first, in seconds, however many came in a piece. None for an answer of one token,
        after which nobody waits, and where nobody has counted the tokens (`num_tokens` is 0)."""
        raise NotImplementedError("Stage 6 · Task 6.1: Stream.tpot, see stages/stage6_benchmark/GUIDE.md#task-6-1")

    @property
    def itl(self) -> list[float]:
        """Inter-token latencies: the wait before each piece but the first, in seconds."""
        raise NotImplementedError("Stage 6 · Task 6.1: Stream.itl, see stages/stage6_benchmark/GUIDE.md#task-6-1")

    @property
    def latency(self) -> float:
        """To the last token, in seconds."""
        return self.times[-1] - self.start


def percentile(values: Sequence[float], q: float) -> float:
    """The value below which `q` percent of all values lie.

    The sorted values stand at 0 %, ... 100 %, evenly spaced; between two of them it is interpolated (Hyndman and Fan, 1996,
    definition 7; NumPy's default).

    Args:
        values: in any order; left as they are. q: 0 to 100.

    Raises:
        ValueError: "there is no percentile Q of N values", for there are none, or `q` is no percentage.
    """
    raise NotImplementedError("Stage 6 · Task 6.1: percentile, see stages/stage6_benchmark/GUIDE.md#task-6-1")


def percentiles(seconds: Iterable[float]) -> dict[str, float]:
    """Mean, percentiles and the longest, in milliseconds. Raises ValueError if there are no values."""
    values = [1e3 * value for value in seconds]
    of = {f"p{q}": percentile(values, q) for q in PERCENTILES}
    return {"mean": statistics.fmean(values)} | of | {"max": max(values)}


def latencies(streams: Iterable[Stream]) -> dict[str, dict[str, float]]:
    """`percentiles` of TTFT, TPOT, ITL and the whole time, of the streams without an error: "ttft_ms", "tpot_ms", "itl_ms" and
    "latency_ms". What has no values is left out.

    Every request counts once in TTFT, TPOT and latency, and every wait once in ITL, however long its request.
    """
    raise NotImplementedError("Stage 6 · Task 6.1: latencies, see stages/stage6_benchmark/GUIDE.md#task-6-1")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a service promises its users, in seconds: an answer later than this is of no use."""

    ttft: float = math.inf
    tpot: float = math.inf

    def are_met_by(self, stream: Stream) -> bool:
        """Whether an answer came in time, by its TTFT and its TPOT, if it has one; at a limit is in time. What has an error is
        not, even if some of it came."""
        # Hint: An answer is in time or it is not; count those that are. What do you divide by: by time, by what was
        # asked, by what was answered?
        raise NotImplementedError("Stage 6 · Task 6.5: Limits.are_met_by, see stages/stage6_benchmark/GUIDE.md#task-6-5")


def attainment(streams: Sequence[Stream], limits: Limits) -> float:
    """Share of all requests that were answered in time.

    Raises:
        ValueError: there are no requests.
    """
    raise NotImplementedError("Stage 6 · Task 6.5: attainment, see stages/stage6_benchmark/GUIDE.md#task-6-5")


def goodput(streams: Iterable[Stream], seconds: float, limits: Limits) -> float:
    """Requests a second that were answered in time (Zhong et al., "DistServe", OSDI 2024, §1). What was refused or came too
    late counts for nothing, however much work it was.

    Args:
        seconds: that the whole run took.
    """
    raise NotImplementedError("Stage 6 · Task 6.5: goodput, see stages/stage6_benchmark/GUIDE.md#task-6-5")


def sustained_rate(measured: Iterable[tuple[float, float]], share: float = 0.9) -> float:
    """The highest rate of arrivals that a server stands: at it, and at every lower rate measured, at least `share` of the
    requests were in time, each time that it was measured; 0.0 if that is none.

    A server that fails at 4 a second and passes at 5 was lucky at 5.

    Args:
        measured: (rate, attainment) in any order.
    """
    raise NotImplementedError("Stage 6 · Task 6.5: sustained_rate, see stages/stage6_benchmark/GUIDE.md#task-6-5")


def duration(streams: Sequence[Stream]) -> float:
    """Seconds from the first arrival to the last token."""
    return max(stream.times[-1] for stream in streams if stream.error is None) - min(stream.start for stream in streams)


def summarise(streams: Sequence[Stream], limits: Limits) -> dict[str, object]:
    """What a run of many requests comes to, ready for JSON: counts, rates over the time from the first arrival to the last
    token, percentiles, and what was in time. Raises ValueError if nothing was answered."""
    answered = [stream for stream in streams if stream.error is None]
    if not answered:
        raise ValueError(streams[0].error if streams else "there are no requests")
    seconds = duration(streams)
    return {
        "requests": len(streams),
        "refused": len(streams) - len(answered),
        "seconds": seconds,
        "requests_per_second": len(answered) / seconds,
        "output_tokens_per_second": sum(stream.num_tokens for stream in answered) / seconds,
        **latencies(answered),
        "attainment": attainment(streams, limits),
        "goodput": goodput(streams, seconds, limits),
    }
