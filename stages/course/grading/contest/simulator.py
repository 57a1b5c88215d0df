"""The reference's scheduler on a made-up device and clock: what a policy does to requests, the same on every machine."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from dataclasses import dataclass, field

from solutions.attention.block_manager import BlockManager
from solutions.batching.queue_order import QueueOrder
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_config import POLICIES, SchedulerConfig
from solutions.batching.scheduler_output import SchedulerOutput
from solutions.batching.sequence import Sequence
from solutions.benchmarks.latency import Stream
from solutions.core.scheduler import Scheduler
from stages.course.grading.contest.baselines import Policy
from stages.course.grading.contest.player import Request

BLOCK = 16
STEP, TOKEN, CONTEXT = 12e-3, 40e-6, 0.25e-6
"""Seconds that a step of the made-up device costs: to read the weights, for each token that it computes, and for each token in
the KV cache that it reads. Close to a model of 7 B weights on a card with 1 TB/s."""
STARVED = 60.0
"""Simulated seconds without a token after which a request counts as starved; the built-in policies stay well below."""


class Foul(ValueError):
    """What a policy did that disqualifies it; the message names it."""


@dataclass(frozen=True, slots=True)
class Job:
    """A request of a workload. `num_output` is when its answer ends, which no policy is told."""

    arrival: float
    client: str
    priority: int
    prompt: tuple[int, ...]
    num_output: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests and the memory that there is for them, in blocks of 16 tokens."""

    name: str
    jobs: tuple[Job, ...]
    num_blocks: int


@dataclass(slots=True)
class Outcome:
    """What became of a workload: a stream for each job, in their order, and the preemptions."""

    workload: Workload
    streams: list[Stream]
    num_preemptions: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class Clock:
    """Simulated seconds since the workload began."""

    now: float = 0.0


def check_order(answer: object, requests: Many[Request], what: str) -> list[int]:
    """The answer of a policy, if it names each request once.

    Raises:
        Foul: it does not.
    """
    if not isinstance(answer, list) or any(type(each) is not int for each in answer):
        raise Foul(f"{what} must return a list of ids, got {str(answer)[:60]!r}")
    asked, told = {request.id for request in requests}, set(answer)
    if unknown := told - asked:
        raise Foul(f"{what} returned request {min(unknown)}, which was not in the list")
    if len(answer) > len(told):
        raise Foul(f"{what} returned request {next(each for each in answer if answer.count(each) > 1)} more than once")
    if lost := asked - told:
        raise Foul(f"{what} dropped request {min(lost)}")
    return answer


class PolicyOrder(QueueOrder):
    """An order of the scheduler's queues that a policy decides. It gets copies, and what it returns is checked."""

    is_fixed = False

    def __init__(self, policy: Policy, manager: BlockManager, clock: Clock) -> None:
        super().__init__(POLICIES["fcfs"])
        self._policy, self._manager, self._clock = policy, manager, clock

    def before_admission(self, waiting: list[Sequence], room: int) -> None:
        if room > 0 and len(waiting) > 1:
            requests = [self._view(seq, BLOCK * self._manager.num_cached_blocks(seq)) for seq in waiting]
            answer = self._policy.admit_order(list(requests), self._clock.now)
            self._sort(waiting, check_order(answer, requests, "admit_order"))

    def after_decision(self, output: SchedulerOutput, waiting: list[Sequence], running: list[Sequence]) -> None:
        if len(running) > 1:
            requests = [self._view(seq, 0) for seq in running]
            answer = self._policy.run_order(list(requests), self._clock.now)
            self._sort(running, check_order(answer, requests, "run_order"))

    @staticmethod
    def _sort(queue: list[Sequence], order: list[int]) -> None:
        place = {seq_id: index for index, seq_id in enumerate(order)}
        queue.sort(key=lambda seq: place[seq.seq_id])

    @staticmethod
    def _view(seq: Sequence, num_cached: int) -> Request:
        return Request(
            seq.seq_id, seq.client or "", seq.priority, seq.arrival_time, seq.num_prompt_tokens, seq.num_output_tokens,
            seq.num_computed_tokens, num_cached, seq.num_preemptions,
        )  # fmt: skip


@dataclass(slots=True)
class Settings:
    """What the engine may be told: fields of `SchedulerConfig`."""

    max_num_seqs: int = 48
    max_num_batched_tokens: int = 512
    long_prefill_token_threshold: int = 0
    preemption_mode: str = "recompute"
    num_host_blocks: int = field(default=0)


def simulate(workload: Workload, policy: Policy, settings: Settings | None = None, patience: float = STARVED) -> Outcome:
    """Serve a workload to its end.

    Args:
        patience: simulated seconds that a request may go without a token; `STARVED`, or infinity.

    Raises:
        Foul: the policy broke a rule, or a request starved.
    """
    settings = settings or Settings()
    manager, clock = BlockManager(workload.num_blocks, BLOCK, settings.num_host_blocks), Clock()
    config = SchedulerConfig(
        settings.max_num_seqs, settings.max_num_batched_tokens, workload.num_blocks * BLOCK,
        long_prefill_token_threshold=settings.long_prefill_token_threshold, preemption_mode=settings.preemption_mode,
    )  # fmt: skip
    scheduler = Scheduler(config, manager)
    scheduler.order = PolicyOrder(policy, manager, clock)
    outcome = Outcome(workload, [Stream(job.arrival, num_prompt=len(job.prompt)) for job in workload.jobs])
    last = [job.arrival for job in workload.jobs]
    coming = sorted(range(len(workload.jobs)), key=lambda number: workload.jobs[number].arrival)[::-1]
    alive: set[int] = set()
    while coming or alive:
        if not alive:
            clock.now = max(clock.now, workload.jobs[coming[-1]].arrival)
        while coming and workload.jobs[coming[-1]].arrival <= clock.now:
            number = coming.pop()
            alive.add(number)
            scheduler.add(_sequence(number, workload.jobs[number]))
        output = scheduler.schedule()
        context = sum(seq.num_computed_tokens for seq in output.scheduled)
        clock.now += STEP + TOKEN * sum(output.scheduled.values()) + CONTEXT * context
        sampled = output.sampled
        scheduler.update(output, [[1_000_000 + 1_000 * seq.seq_id + len(seq.tokens)] for seq in sampled])
        for seq in sampled:
            outcome.streams[seq.seq_id].times.append(clock.now)
            outcome.streams[seq.seq_id].num_tokens += 1
            last[seq.seq_id] = clock.now
        alive -= {seq.seq_id for seq in sampled if seq.finished}
        if alive and clock.now - min(last[number] for number in alive) > patience:
            starved = min(alive, key=last.__getitem__)
            raise Foul(f"request {starved} starved: no token for more than {patience:g} simulated seconds ({workload.name})")
    scheduler.check_invariants()
    outcome.num_preemptions, outcome.seconds = scheduler.num_preemptions, clock.now
    return outcome


def alone(job: Job) -> float:
    """Seconds that a request takes when it has the device to itself, its prompt in one step."""
    length = len(job.prompt)
    decodes = sum(STEP + TOKEN + CONTEXT * (length + index) for index in range(job.num_output - 1))
    return STEP + TOKEN * length + decodes


def draw(name: str, rng: random.Random, rates: dict[str, float], seconds: float, num_blocks: int, flood: int = 0) -> Workload:
    """A workload of clients who send at random times (a Poisson process each), lengths from a log-normal distribution.

    Args:
        rates: client → requests a second. Each client has a system prompt of its own, which all its requests begin with.
        flood: requests that a client "flood" sends all at once, after a second.
    """
    jobs = []
    for client, rate in (*rates.items(), ("flood", 0.0)):
        system = tuple(rng.randrange(30_000) for _ in range(rng.choice((64, 128, 256))))
        times = [1.0] * flood if client == "flood" else []
        at = rng.expovariate(rate) if rate else seconds
        while at < seconds:
            times.append(at)
            at += rng.expovariate(rate)
        for when in times:
            own = min(700, 16 + int(rng.lognormvariate(4.5, 0.9)))
            prompt = (*system, *(rng.randrange(30_000) for _ in range(own)))
            length = min(400, 2 + int(rng.lognormvariate(4.2, 0.7)))
            jobs.append(Job(when, client, rng.choice((0, 1, 1, 1, 2)), prompt, length))
    return Workload(name, tuple(sorted(jobs, key=lambda job: job.arrival)), num_blocks)


def _sequence(number: int, job: Job) -> Sequence:
    params = SamplingParams(max_tokens=job.num_output, ignore_eos=True)
    return Sequence(number, list(job.prompt), params, priority=job.priority, client=job.client, arrival_time=job.arrival)
