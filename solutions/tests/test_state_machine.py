"""Random lives of the whole memory and scheduling stack, with invariants and every KV read checked at every step."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from solutions.tests.engine_twins import run_engine_twins
from solutions.tests.simulation import Simulation
from solutions.tests.slow_cases import slow_after
from solutions.tests.twins import run_twins

SETTINGS = st.fixed_dictionaries(
    {
        "num_blocks": st.integers(4, 14),
        "block_size": st.sampled_from([1, 2, 3, 4, 8]),
        "num_host_blocks": st.sampled_from([0, 3, 16]),
        "sliding_window": st.sampled_from([None, None, 3, 7]),
        "enable_prefix_caching": st.booleans(),
        "watermark": st.sampled_from([0.0, 0.01, 0.2]),
        "max_num_batched_tokens": st.sampled_from([1, 3, 5, 17, 256]),
        "max_num_seqs": st.integers(1, 6),
        "policy": st.sampled_from(["fcfs", "priority", "lpm", "fair"]),
        "preemption_mode": st.sampled_from(["recompute", "swap"]),
        "long_prefill_token_threshold": st.sampled_from([0, 0, 2]),
        "ahead": st.booleans(),
        "tier": st.sampled_from([0, 1, 4, 50]),
        "delay": st.sampled_from([0, 0, 1, 3]),
    }
)


class EngineMachine(RuleBasedStateMachine):
    """Adds, forks (n > 1), aborts and steps in any order. Few tokens and small blocks make prefixes collide often."""

    @initialize(chosen=SETTINGS)
    def start(self, chosen):
        self.sim = Simulation(**chosen)
        self.capacity = chosen["num_blocks"] * chosen["block_size"]

    @rule(data=st.data())
    def add(self, data):
        longest = self.capacity - 1
        # A short alphabet and a common stem: shared prefixes, exact repeats and near misses are all likely.
        stem = [0, 1, 0, 0, 1, 1, 0, 1] * 8
        cut = data.draw(st.integers(0, longest), label="stem")
        tail = data.draw(st.lists(st.integers(0, 1), max_size=6), label="tail")
        prompt = (stem[:cut] + tail)[:longest] or [1]
        self.sim.add(
            prompt,
            max_tokens=data.draw(st.integers(1, 12), label="max_tokens"),
            stop_token_ids=data.draw(st.sampled_from([[], [], [3]]), label="stop_token_ids"),
            n=data.draw(st.sampled_from([1, 1, 2, 3]), label="n"),
            priority=data.draw(st.integers(0, 2), label="priority"),
            salt=data.draw(st.sampled_from([None, None, "a", "b"]), label="salt"),
            client=data.draw(st.sampled_from([None, "a", "b"]), label="client"),
        )

    @rule()
    def step(self):
        self.sim.step()

    @rule()
    def several_steps(self):
        for _ in range(5):
            self.sim.step()

    @precondition(lambda self: any(not seq.finished for seq in self.sim.sequences))
    @rule(data=st.data())
    def abort(self, data):
        victim = data.draw(st.sampled_from([seq for seq in self.sim.sequences if not seq.finished]), label="victim")
        self.sim.scheduler.abort(victim)
        assert victim.finished
        assert victim.finish_reason == "abort"

    @invariant()
    def holds(self):
        if hasattr(self, "sim"):
            self.sim.scheduler.check_invariants()

    def teardown(self):
        if hasattr(self, "sim"):
            self.sim.run()
            assert all(seq.finished for seq in self.sim.sequences)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


@pytest.mark.slow
class TestManyEngineMachines(EngineMachine.TestCase):
    settings = settings(TestEngineMachine.settings, max_examples=400)


def run_lives(first, count, **settings):
    for seed in range(first, first + count):
        try:
            run_twins(random.Random(seed), **settings)
        except AssertionError as error:
            raise AssertionError(f"random.Random({seed}): {error}") from error


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 900, 300))
def test_twins_never_read_a_block_before_it_is_computed(first):
    """Of these lives, four copied a block that the step had yet to compute (111, 280, 797, 841)."""
    run_lives(first, 300)


@pytest.mark.parametrize("first", slow_after(1, range(0, 400, 200)))
def test_twins_with_tokens_on_trial_say_what_they_say_alone(first):
    run_lives(first, 200, drafts=True)


@pytest.mark.parametrize("first", slow_after(1, range(0, 400, 100)))
def test_twins_whose_steps_are_begun_ahead_say_what_they_say_alone(first):
    run_lives(first, 100, ahead=True)


@pytest.mark.parametrize(("ahead", "delay"), slow_after(1, [(True, 2), (False, 0), (False, 2), (True, 0)]))
def test_twins_whose_blocks_come_back_from_a_tier_say_what_they_say_alone(ahead, delay):
    for tier in (1, 4, 100):
        run_lives(0, 40, ahead=ahead, tier=tier, delay=delay)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0, 3])
def test_twins_with_tokens_on_trial_and_a_tier_say_what_they_say_alone(delay):
    run_lives(0, 200, drafts=True, tier=6, delay=delay)


@pytest.mark.parametrize("seed", slow_after(4, range(16)))
def test_twins_in_the_engine_say_what_transformers_says(seed):
    run_engine_twins(random.Random(seed))


@pytest.mark.parametrize(("where", "seed"), slow_after(3, [(where, seed) for seed in range(12) for where in ("host", "files")]))
def test_twins_in_an_engine_with_a_tier_say_what_transformers_says(where, seed, tmp_path):
    run_engine_twins(random.Random(seed), "host" if where == "host" else str(tmp_path))
