"""Random lives of twins: equal prompts, several answers each, and memory for a few of them.

Greedy twins go on alike. A sequence that was preempted and comes back therefore finds blocks that a twin is about to fill in
the very same step, and its children would fork from them. Tokens on trial are in the cache, too, until they are rejected.
"""

from __future__ import annotations

import random
from copy import copy
from functools import partial
from itertools import accumulate

from solutions.batching.scheduler_output import Draft, SchedulerOutput
from solutions.batching.sequence import Sequence
from solutions.core.speculation.settings import SpeculativeConfig
from solutions.core.speculative import Proposer
from solutions.tests.simulation import Simulation


def greedy(seq: Sequence) -> int:
    """A token that depends on the text alone, as a greedy model's does."""
    return (sum(seq.tokens) + len(seq.tokens)) % 97


class Guesses(Proposer):
    """Drafts what a greedy model would say, but for a token here and there."""

    def __init__(self, config: SpeculativeConfig, rng: random.Random) -> None:
        super().__init__(config)
        self.rng = rng

    def propose(self, output: SchedulerOutput, wanted: dict[Sequence, int]) -> dict[Sequence, Draft]:
        drafts = {}
        for seq, count in wanted.items():
            text, start = copy(seq), len(seq.tokens)
            text.tokens = list(seq.tokens)
            for _ in range(self.rng.randint(0, count)):
                text.tokens.append(greedy(text) if self.rng.random() < 0.8 else self.rng.randrange(97))
            if len(text.tokens) > start:
                drafts[seq] = Draft(text.tokens[start:])
        return drafts


def run_twins(
    rng: random.Random, drafts: bool = False, ahead: bool = False, radix: bool = False, tier: int = 0, delay: int = 0
) -> None:
    """One life in the simulated cache, which compares every slot that a step reads with the sequence's own tokens.

    Args:
        drafts: put tokens on trial. ahead: begin each step before the one before has ended, and let some end by their tokens.
        radix, tier, delay: see `Simulation`.

    Raises:
        AssertionError: a sequence read or said something else, an invariant broke, or blocks were left over.
    """
    size, num_blocks = rng.choice([2, 3, 4, 8, 16]), rng.randint(4, 12)
    proposer = None
    if drafts:
        config = SpeculativeConfig("ngram", num_speculative_tokens=rng.randint(1, 5), disable_by_batch_size=rng.choice([2, 64]))
        proposer = Guesses(config, rng)
        proposer.foretells = rng.random() < 0.5
    simulation = Simulation(
        num_blocks, size, rng.choice([0, 0, 3, 16]), rng.choice([None, None, None, size + 1]),
        watermark=rng.choice([0.0, 0.01, 0.2]), max_num_batched_tokens=rng.choice([7, 64, 512]),
        max_num_seqs=rng.choice([3, 8, 256]), policy=rng.choice(["fcfs", "priority", "lpm", "fair"]),
        preemption_mode=rng.choice(["recompute", "swap"]), next_token=greedy, radix=radix,
        proposer=proposer, ahead=ahead, tier=tier, delay=delay,
        clock=partial(next, accumulate(iter(rng.random, None))) if rng.random() < 0.5 else None,
    )  # fmt: skip
    longest = min(num_blocks * size // 2, 3 * size)
    prompts = [[100 * k + i for i in range(rng.randint(1, longest))] for k in range(rng.randint(1, 3))]
    stops = rng.sample(range(97), rng.choice([0, 5, 30])) if ahead else []
    for _ in range(rng.randint(3, 8)):
        simulation.add(
            rng.choice(prompts), max_tokens=rng.randint(1, 3 * size), n=rng.choice([1, 1, 2, 3]), priority=rng.randint(0, 2),
            stop_token_ids=stops,
        )  # fmt: skip
        if ahead and rng.random() < 0.2 and (victims := [seq for seq in simulation.sequences if not seq.finished]):
            simulation.scheduler.abort(rng.choice(victims))
        for _ in range(rng.choice([0, 0, rng.randint(1, 5)])):
            simulation.step()
    simulation.run()
    for seq in simulation.sequences:
        text = copy(seq)
        text.tokens = list(seq.prompt_token_ids)
        while len(text.tokens) < seq.max_len and (len(text.tokens) == seq.num_prompt_tokens or text.tokens[-1] not in stops):
            text.tokens.append(greedy(text))
        if seq.finish_reason == "abort":
            text.tokens = text.tokens[: len(seq.tokens)]
        assert seq.tokens == text.tokens, f"{seq} says {seq.tokens}, alone it would say {text.tokens}"
