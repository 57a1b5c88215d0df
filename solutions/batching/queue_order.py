"""Who goes first: the order of the scheduler's queues, under each of its policies."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from heapq import heapify, heappop, heappush
from math import inf
from typing import Any

from .scheduler_config import POLICIES, SchedulerConfig
from .scheduler_output import SchedulerOutput
from .sequence import Sequence

LPM_PATIENCE = 10.0
"""After this many seconds, sequences with more of their prompt cached may no longer overtake a waiting one."""
OUTPUT_COST = 2.0
"""What an output token counts in tokens of a prompt: those are computed many at a time."""

Client = str | None


class QueueOrder:
    """An order by a key that never changes: "fcfs" and "priority".

    Args:
        key: sort key of both queues: the first is served first, the last is preempted first.

    Attributes:
        is_fixed: both queues are in the key's order at any time. Otherwise the waiting ones are only while a step is decided.
        served: what clients have been served, where that decides; see `FairOrder`.
    """

    is_fixed = True

    def __init__(self, key: Callable[[Sequence], tuple[Any, ...]]) -> None:
        self.key = key
        self.served: dict[Client, float] = {}

    def before_admission(self, waiting: list[Sequence], room: int) -> None:
        """Bring the waiting sequences into the order in which a step admits them, of which `room` may run."""

    def after_decision(self, output: SchedulerOutput, waiting: list[Sequence], running: list[Sequence]) -> None:
        """Take note of what a step will compute, when all is decided."""


class PrefixOrder(QueueOrder):
    """Longest prefix match, "lpm": the waiting sequences of whose tokens most are cached go first, ties by arrival.

    What is cached is used before others' new blocks push it out (Zheng et al., "SGLang", NeurIPS 2024, §3). Sequences that were
    preempted stay in front, and so do those that have waited for `LPM_PATIENCE` seconds, or they might wait forever.

    Args:
        num_cached_blocks: how many of a sequence's blocks the cache holds.
    """

    is_fixed = False

    def __init__(self, num_cached_blocks: Callable[[Sequence], int]) -> None:
        super().__init__(POLICIES["lpm"])
        self._num_cached_blocks = num_cached_blocks

    def before_admission(self, waiting: list[Sequence], room: int) -> None:
        overdue = time.monotonic() - LPM_PATIENCE

        def key(seq: Sequence) -> tuple[bool, int, int]:
            first = seq.num_preemptions > 0 or seq.arrival_time < overdue
            return (not first, 0 if first else -self._num_cached_blocks(seq), seq.seq_id)

        waiting.sort(key=key)


class FairOrder(QueueOrder):
    """Fair shares between clients, "fair": the client that was served least goes first, and is preempted last.

    A client's virtual counter grows with each token that is computed for it, divided by its weight. So while two clients have
    requests waiting, neither gets much more than the other, however many it sends. A client that begins to wait is lifted to
    the least counter among those that wait already: what it did not use before is not owed to it. Nobody who is served is
    stopped for another's sake, unless memory runs out. Source: virtual token counters, Sheng et al., "Fairness in Serving Large
    Language Models", OSDI 2024, §4.1, algorithm 2.

    The scheduler calls `before_admission` before it lets sequences in, then `after_decision` unless nothing is scheduled.

    Args:
        weights: client → its share, relative to those of others; 1 for all that are not here.

    Attributes:
        served: client → its counter.
        _waiting: the clients with sequences that the last decision left waiting.
        _last: the clients with sequences that waited before a decision, the last time that any did.
    """

    is_fixed = False

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__(lambda seq: (self.served.get(seq.client, 0.0), seq.seq_id))
        self._weights: dict[Client, float] = dict(weights.items())
        self._waiting: set[Client] = set()
        self._last: set[Client] = set()

    def before_admission(self, waiting: list[Sequence], room: int) -> None:
        """Deal the places out in turns: always to the client whose counter is least, counting what its sequences that go before
        will take. Among the sequences of one client, by arrival.

        Args:
            waiting: sorted in place. A sequence that goes before counts with the tokens it has left to compute, each as a token
                of a prompt. Where two clients count the same, the sequence that arrived first goes first.
            room: how many of them may run at most. Clients that begin to wait are lifted in any case; where there is no room,
                the order may stay.
        """
        self._lift({seq.client for seq in waiting})
        if room <= 0:
            return
        queues: dict[Client, deque[Sequence]] = {}
        for seq in sorted(waiting, key=POLICIES["fcfs"]):
            queues.setdefault(seq.client, deque()).append(seq)
        turns = [(self.served[client], queue[0].seq_id, client) for client, queue in queues.items()]
        heapify(turns)
        waiting.clear()
        while turns:
            counter, _, client = heappop(turns)
            queue = queues[client]
            waiting.append(seq := queue.popleft())
            if queue:
                heappush(turns, (counter + self._cost(client, seq.num_uncomputed_tokens, 0), queue[0].seq_id, client))

    def after_decision(self, output: SchedulerOutput, waiting: list[Sequence], running: list[Sequence]) -> None:
        """Charge each client for the tokens that the step computes. A token is charged once, in its first step: what was cached
        is free, and so is what is computed again after a preemption, for which no client has asked.

        Args:
            output: what each sequence computes. `num_computed_tokens` is still what it was before.
                ``seq.num_charged_tokens`` keeps where the tokens of `seq` end that are paid for; 0: none has been yet.
            waiting: the sequences that are left waiting.
            running: sorted in place by `key`, with the new counters: the last is preempted first.

        A counter is forgotten when the client neither waits nor runs nor is one of `_last`, and would be lifted above it
        anyway: it is at most the least counter of those that wait or, if nobody does, of `_last`. So a spray of clients that
        come once takes no memory.
        """
        for seq, num_tokens in output.scheduled.items():
            start, end = seq.num_charged_tokens or seq.num_computed_tokens, seq.num_computed_tokens + num_tokens
            if end > start:
                num_prompt_tokens = max(0, min(end, seq.num_prompt_tokens) - start)
                self.served[seq.client] += self._cost(seq.client, num_prompt_tokens, end - start - num_prompt_tokens)
                seq.num_charged_tokens = end
        running.sort(key=self.key)
        self._waiting = {seq.client for seq in waiting}
        floor = min(self.served[client] for client in self._waiting or self._last)
        here = self._waiting | self._last | {seq.client for seq in running}
        self.served = {client: count for client, count in self.served.items() if count > floor or client in here}

    def _lift(self, clients: set[Client]) -> None:
        """Let clients that have begun to wait begin where others are, and remember who waits.

        Args:
            clients: those with sequences that wait now. Those of them that are not in `_waiting` have begun to. Their counters
                rise to the least counter of those that are, or, if none is, of `_last`; to 0 if that is empty, too. No counter
                falls, and those that have waited on stay as they are.
        """
        floor = min((self.served[client] for client in clients & self._waiting or self._last), default=0.0)
        for client in clients - self._waiting:
            self.served[client] = max(self.served.get(client, 0.0), floor)
        self._last = clients or self._last

    def _cost(self, client: Client, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """What these tokens add to the client's counter."""
        return (num_prompt_tokens + OUTPUT_COST * num_output_tokens) / self._weights.get(client, 1.0)


def parse_weights(text: str) -> dict[str, float]:
    """What ``--client-weights`` says: client → its share.

    Raises:
        ValueError: it is not a JSON object of positive numbers.
    """
    try:
        weights = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--client-weights is not valid JSON: {error}") from None
    if not isinstance(weights, dict) or not all(type(each) in (int, float) and 0 < each < inf for each in weights.values()):
        raise ValueError(f'--client-weights must be positive numbers by client, like {{"203.0.113.7": 2}}, got {text}')
    return weights


def make_order(config: SchedulerConfig, num_cached_blocks: Callable[[Sequence], int]) -> QueueOrder:
    """The order of a policy; see `PrefixOrder` for `num_cached_blocks`."""
    if config.policy == "lpm":
        return PrefixOrder(num_cached_blocks)
    return FairOrder(config.client_weights) if config.policy == "fair" else QueueOrder(POLICIES[config.policy])
