"""The open tasks: what is handed in, how it is judged, and which way each measure is better."""

from __future__ import annotations

import ast
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from statistics import fmean

from solutions.batching.scheduler_config import PREEMPTION_MODES
from solutions.benchmarks.latency import Limits, attainment, percentile, sustained_rate
from stages.course.grading.contest import schedules
from stages.course.grading.contest.baselines import BASELINES
from stages.course.grading.contest.referee import playing
from stages.course.grading.contest.simulator import Foul, Outcome, Settings, Workload, alone, draw, simulate
from stages.course.grading.sandbox import Sandbox

Measures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Measure:
    """A column of the table. `least`: the smaller, the better."""

    name: str
    unit: str
    least: bool
    digits: int


@dataclass(frozen=True, slots=True)
class Contest:
    """An open task.

    Attributes:
        stage: whose folder has the file. file: what is handed in, with a working beginning in it.
        given: SHA-256 of that beginning; a file that is still it is not handed in.
        rivals: what everybody is compared with.
        judge: (text of the file, seed) → its measures. Raises Foul if it breaks a rule.
        judge_rival: (name of a rival, seed) → its measures.
        timed: whether the measures are times of this machine, so that the same file never has quite the same.
    """

    id: str
    title: str
    stage: int
    file: str
    given: str
    measures: tuple[Measure, ...]
    rivals: tuple[str, ...]
    judge: Callable[[str, str], Measures]
    judge_rival: Callable[[str, str], Measures]
    timed: bool = False


def workloads(seed: str) -> list[Workload]:
    """Three kinds of load: talk with enough memory, a client that floods the others, and memory that runs out."""
    rng = random.Random(f"policy {seed}")
    return [
        draw("chats", rng, {"a": 6.0, "b": 5.0, "c": 3.0, "d": 2.0}, 30.0, 400),
        draw("flood", rng, {"a": 2.0, "b": 2.0, "c": 1.0}, 30.0, 300, flood=120),
        draw("tight", rng, {"a": 4.0, "b": 3.0}, 30.0, 100),
    ]


def fairness(outcome: Outcome) -> float:
    """Jain's index (Jain, Chiu and Hawe, DEC-TR-301, 1984) of how fast clients are served, from 1/n to 1, where all are served
    alike. How fast a client is served is the mean of its requests' time alone on the device by their time here."""
    speeds: dict[str, list[float]] = {}
    for job, stream in zip(outcome.workload.jobs, outcome.streams, strict=True):
        speeds.setdefault(job.client, []).append(alone(job) / stream.latency)
    means = [fmean(each) for each in speeds.values()]
    return sum(means) ** 2 / (len(means) * sum(mean * mean for mean in means))


def measure_policy(outcomes: Iterable[Outcome]) -> Measures:
    """The measures of the policies' table. Percentiles and the index are means over the workloads, so that a small one counts
    as much as a large one; preemptions are summed."""
    outcomes = list(outcomes)
    return {
        "p99 TBT": fmean(1000 * percentile([gap for each in run.streams for gap in each.itl], 99) for run in outcomes),
        "p99 TTFT": fmean(percentile([each.ttft for each in run.streams], 99) for run in outcomes),
        "fairness": fmean(map(fairness, outcomes)),
        "preemptions": float(sum(outcome.num_preemptions for outcome in outcomes)),
    }


def judge_policy(text: str, seed: str, seconds: float = 5.0) -> Measures:
    """A learner's policy on all workloads, each with a new `Policy`."""
    outcomes = []
    sandbox = Sandbox()
    with playing(text, sandbox, seconds) as policy:
        for workload in workloads(seed):
            policy.begin()
            outcomes.append(simulate(workload, policy))
    return measure_policy(outcomes)


def judge_built_in(name: str, seed: str) -> Measures:
    """The same for one of `BASELINES`, here."""
    return measure_policy(simulate(workload, BASELINES[name]()) for workload in workloads(seed))


SLO = Limits(ttft=0.5, tpot=0.030)
"""In seconds: what the service of the goodput's contest promises."""
RATES = tuple(range(4, 41))
"""Requests a second that are tried, up to the first that fails."""
SECONDS = 30.0
"""For which requests come, in simulated time."""
BEYOND = 20
"""Requests a second at which the share in time is a measure too: more than the built-in policies stand."""
DEFAULTS: dict[str, object] = {field.name: field.default for field in fields(Settings)} | {"policy": "fcfs"}
HIGHEST = {"max_num_seqs": 4096, "max_num_batched_tokens": 65536, "long_prefill_token_threshold": 65536}
NUM_HOST_BLOCKS = 400


def read_dict(text: str, name: str) -> dict[str, object]:
    """The dict that a learner's file assigns to a name. The file is read and never run.

    Raises:
        Foul: there is none.
    """
    try:
        nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Assign) and len(node.targets) == 1]
        values = [node.value for node in nodes if isinstance(node.targets[0], ast.Name) and node.targets[0].id == name]
        found = ast.literal_eval(values[-1])
    except (SyntaxError, ValueError, IndexError, RecursionError, MemoryError):
        raise Foul(f"it must hold a line {name} = {{...}} with plain values") from None
    if not isinstance(found, dict):
        raise Foul(f"{name} must be a dict")
    return found


def parse_settings(text: str) -> dict[str, object]:
    """The settings that a learner's file assigns to `SETTINGS`.

    Raises:
        Foul: there are none, or one is unknown or out of range.
    """
    settings = read_dict(text, "SETTINGS")
    for name, value in settings.items():
        choices = {"policy": tuple(BASELINES), "preemption_mode": PREEMPTION_MODES}.get(name)
        if name not in DEFAULTS or name == "num_host_blocks":
            raise Foul(f"there is no setting {name!r}; there are {', '.join(sorted(DEFAULTS.keys() - {'num_host_blocks'}))}")
        if choices is not None and value not in choices:
            raise Foul(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        least = 0 if name == "long_prefill_token_threshold" else 1
        if choices is None and (type(value) is not int or not least <= value <= HIGHEST[name]):
            raise Foul(f"{name} must be a whole number from {least} to {HIGHEST[name]}, got {value!r}")
    return settings


def judge_settings(text: str, seed: str) -> Measures:
    """The highest rate at which nine of ten requests are in time (`SLO`), there and at all lower rates, and the percentage that
    is in time at the rate `BEYOND`."""
    chosen = DEFAULTS | parse_settings(text) | {"num_host_blocks": NUM_HOST_BLOCKS}
    policy = str(chosen.pop("policy"))
    settings, measured = Settings(**chosen), []  # type: ignore[arg-type]  # parse_settings has looked at each

    def in_time(rate: float) -> float:
        workload = draw("goodput", random.Random(f"goodput {seed}"), {"a": rate / 2, "b": rate / 2}, SECONDS, 400)
        return attainment(simulate(workload, BASELINES[policy](), settings, float("inf")).streams, SLO)

    for rate in RATES:
        measured.append((float(rate), in_time(rate)))
        if measured[-1][1] < 0.9:
            break
    return {"goodput": sustained_rate(measured), f"in time at {BEYOND}/s": 100 * in_time(BEYOND)}


def judge_schedule(text: str, seed: str) -> Measures:
    """See `schedules.measure`."""
    return schedules.measure(schedules.check_schedule(read_dict(text, "SCHEDULE")), seed)


POLICY = Contest(
    "2.O", "Your own policy", 2, "open_policy.py",
    "c26aadf3c54446bab306169a387e941c25a058d3b9c9e55e3fcf201ba2b57256",
    (
        Measure("p99 TBT", "ms", True, 1), Measure("p99 TTFT", "s", True, 2),
        Measure("fairness", "", False, 4), Measure("preemptions", "", True, 0),
    ),
    tuple(BASELINES), judge_policy, judge_built_in,
)  # fmt: skip
SCHEDULE = Contest(
    "4.O", "Your own kernel schedule", 4, "open_schedule.py",
    "32e7bb88976681905e378e454089ca7ac5f381e0c9ef0306d2c249bc46c7f7d5",
    (
        Measure("floor, 1 token", "%", False, 0), Measure(f"floor, {schedules.TOKENS} tokens", "%", False, 0),
        Measure("of reference", "", False, 2),
    ),
    tuple(schedules.RIVALS), judge_schedule, lambda name, seed: schedules.measure(schedules.RIVALS[name], seed), timed=True,
)  # fmt: skip
GOODPUT = Contest(
    "6.O", "Your own goodput", 6, "open_goodput.py",
    "b0a5a37e0880792b6fd6405124cc90a2ee2308116ff253d41c9506eee5b66a93",
    (Measure("goodput", "requests/s", False, 0), Measure(f"in time at {BEYOND}/s", "%", False, 1)),
    tuple(BASELINES), judge_settings, lambda name, seed: judge_settings(f'SETTINGS = {{"policy": "{name}"}}', seed),
)  # fmt: skip
CONTESTS = (POLICY, SCHEDULE, GOODPUT)
