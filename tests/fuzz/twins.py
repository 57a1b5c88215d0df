"""Twins × several answers × preemption × swapping × windows × policies × drafts: every read of the KV cache is checked; in one
case of ten the engine runs on a tiny model, and every token is checked."""

from __future__ import annotations

import random

from solutions.tests.engine_twins import run_engine_twins
from solutions.tests.twins import run_twins


def run(rng: random.Random) -> None:
    """One life of twins.

    Raises:
        AssertionError: a sequence read what is not its own, or said what transformers would not.
    """
    if rng.random() < 0.1:
        run_engine_twins(rng)
    else:
        run_twins(rng, drafts=rng.random() < 0.5)
