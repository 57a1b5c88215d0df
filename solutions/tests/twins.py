"""Random lives of twins: equal prompts, several answers each, and memory for a few of them.

Greedy twins go on alike. A sequence that was preempted and comes back therefore finds blocks that a twin is about to fill in
the very same step, and its children would fork from them.
"""

from __future__ import annotations

import random

from solutions.batching.sequence import Sequence
from solutions.tests.simulation import Simulation


def greedy(seq: Sequence) -> int:
    """A token that depends on the text alone, as a greedy model's does."""
    return (sum(seq.tokens) + len(seq.tokens)) % 97


def run_twins(rng: random.Random) -> None:
    """One life in the simulated cache, which compares every slot that a step reads with the sequence's own tokens.

    Raises:
        AssertionError: a sequence read something else, an invariant broke, or blocks were left over.
    """
    size, num_blocks = rng.choice([2, 3, 4, 8, 16]), rng.randint(4, 12)
    simulation = Simulation(
        num_blocks, size, rng.choice([0, 0, 3, 16]), rng.choice([None, None, None, size + 1]),
        watermark=rng.choice([0.0, 0.01, 0.2]), max_num_batched_tokens=rng.choice([7, 64, 512]),
        max_num_seqs=rng.choice([3, 8, 256]), policy=rng.choice(["fcfs", "priority", "lpm"]),
        preemption_mode=rng.choice(["recompute", "swap"]), next_token=greedy,
    )  # fmt: skip
    longest = min(num_blocks * size // 2, 3 * size)
    prompts = [[100 * k + i for i in range(rng.randint(1, longest))] for k in range(rng.randint(1, 3))]
    for _ in range(rng.randint(3, 8)):
        simulation.add(
            rng.choice(prompts), max_tokens=rng.randint(1, 3 * size), n=rng.choice([1, 1, 2, 3]), priority=rng.randint(0, 2)
        )
        for _ in range(rng.choice([0, 0, rng.randint(1, 5)])):
            simulation.step()
    simulation.run()
