"""Twins × several answers × preemption × swapping × windows × policies: every read of the KV cache is checked."""

from __future__ import annotations

import random

from solutions.tests.twins import run_twins


def run(rng: random.Random) -> None:
    """One life of twins.

    Raises:
        AssertionError: a sequence read what is not its own.
    """
    run_twins(rng)
