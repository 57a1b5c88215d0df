"""Scheduler: budget, chunks, order, preemption, finish; every step is checked by the simulated KV cache."""

from __future__ import annotations

import time

import pytest

from solutions.attention.block_manager import BlockManager
from solutions.batching.queue_order import LPM_PATIENCE
from solutions.batching.sampling_params import SamplingParams
from solutions.batching.scheduler_config import QueueFullError, SchedulerConfig
from solutions.batching.sequence import Sequence, SequenceStatus
from solutions.core.scheduler import Scheduler
from solutions.tests.simulation import Simulation


def ids(seqs):
    return [seq.seq_id for seq in seqs]


def tokens_of(decision):
    return {seq.seq_id: count for seq, count in decision.scheduled.items()}


@pytest.mark.parametrize("length", [15, 16, 17])
def test_prompt_is_chunked_by_the_budget(length):
    sim = Simulation(num_blocks=16, block_size=4, max_num_batched_tokens=16)
    (seq,) = sim.add(list(range(length)), max_tokens=1)
    first = sim.step()
    assert tokens_of(first) == {0: min(16, length)}
    assert bool(first.sampled) == (length <= 16), "a token is sampled when the prompt is through, and only then"
    if length > 16:
        assert seq.num_output_tokens == 0
        assert tokens_of(sim.step()) == {0: 1}
    assert seq.finish_reason == "length"
    sim.check_all_free()


def test_prompts_and_decodes_share_one_step():
    sim = Simulation(num_blocks=32, block_size=4, max_num_batched_tokens=10)
    sim.add([1] * 4, max_tokens=8)
    sim.step()
    sim.add([2] * 20, max_tokens=8)
    assert tokens_of(sim.step()) == {0: 1, 1: 9}
    assert tokens_of(sim.step()) == {0: 1, 1: 9}
    decision = sim.step()
    assert tokens_of(decision) == {0: 1, 1: 2}
    assert ids(decision.sampled) == [0, 1]


def test_running_prompt_leaves_a_token_for_every_decode_behind_it():
    sim = Simulation(num_blocks=64, block_size=4, max_num_batched_tokens=8, policy="priority")
    sim.add([2, 3], max_tokens=8, priority=1)
    sim.step()
    sim.add([1] * 40, max_tokens=4, priority=0)
    assert tokens_of(sim.step()) == {0: 1, 1: 7}
    # The more urgent prompt now stands first and could use the whole budget.
    assert tokens_of(sim.step()) == {1: 7, 0: 1}


def test_long_prefill_threshold_caps_one_prompt_and_admits_the_next():
    sim = Simulation(num_blocks=64, block_size=4, max_num_batched_tokens=32, long_prefill_token_threshold=8)
    sim.add([1] * 20)
    sim.add([2] * 20)
    assert tokens_of(sim.step()) == {0: 8, 1: 8}


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_step():
    sim = Simulation(
        num_blocks=8, block_size=4, max_model_len=32, max_num_batched_tokens=32, enable_chunked_prefill=False, watermark=0
    )
    sim.add([1] * 20, max_tokens=3)
    sim.add([2] * 12, max_tokens=1)
    sim.add([3] * 2, max_tokens=1)
    first = sim.step()
    assert tokens_of(first) == {0: 20, 1: 12}
    sim.run()
    with pytest.raises(ValueError, match="must be at least max_model_len"):
        SchedulerConfig(max_num_batched_tokens=16, max_model_len=32, enable_chunked_prefill=False)


def test_max_num_seqs_holds_back_the_rest():
    sim = Simulation(max_num_seqs=2)
    for _ in range(3):
        sim.add([1, 2], max_tokens=2)
    assert ids(sim.step().scheduled) == [0, 1]
    assert ids(sim.scheduler.waiting) == [2]
    sim.step()
    assert ids(sim.step().scheduled) == [2]


def test_first_in_the_queue_is_never_overtaken():
    sim = Simulation(num_blocks=8, block_size=4, watermark=0)
    sim.add([1] * 20, max_tokens=8)
    sim.step()
    sim.add([2] * 20, max_tokens=1)  # does not fit beside the first
    sim.add([3], max_tokens=1)  # would fit
    assert ids(sim.step().scheduled) == [0]
    assert ids(sim.scheduler.waiting) == [1, 2]
    sim.run()


def test_priority_decides_admission_and_ties_go_by_arrival():
    sim = Simulation(policy="priority", max_num_seqs=1)
    for priority in (5, 1, 1, 0):
        sim.add([1], max_tokens=1, priority=priority)
    order = [ids(sim.step().scheduled)[0] for _ in range(4)]
    assert order == [3, 1, 2, 0]


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 2), ("priority", 0)])
def test_victim_is_the_last_by_policy(policy, victim):
    sim = Simulation(num_blocks=6, block_size=2, watermark=0, policy=policy, enable_prefix_caching=False)
    for priority in (2, 1, 0):
        sim.add([priority] * 4, max_tokens=8, priority=priority)
    sim.step()
    assert len(sim.scheduler.running) == 3
    decision = sim.step()
    assert ids(decision.preempted) == [victim]
    assert victim not in ids(decision.scheduled)
    sim.run()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("caching", [True, False])
def test_preempted_output_equals_unpreempted(mode, caching):
    def outputs(num_blocks):
        sim = Simulation(
            num_blocks, 4, num_host_blocks=64, preemption_mode=mode, enable_prefix_caching=caching, max_model_len=32,
            next_token=lambda seq: (sum(seq.tokens) * 31 + len(seq.tokens)) % 97,
        )  # fmt: skip
        for i in range(6):
            sim.add([i, i + 1, i + 2, 7], max_tokens=20)
        sim.run()
        return [seq.tokens for seq in sim.sequences], sim

    roomy, calm = outputs(64)
    tight, stressed = outputs(9)
    assert calm.scheduler.num_preemptions == 0
    assert stressed.scheduler.num_preemptions > 0
    assert tight == roomy


def test_nothing_is_admitted_in_a_step_that_preempted():
    sim = Simulation(num_blocks=5, block_size=2, watermark=0, enable_prefix_caching=False)
    sim.add([1] * 4, max_tokens=6)
    sim.add([2] * 4, max_tokens=6)
    sim.step()
    sim.add([3], max_tokens=1)
    decision = sim.step()
    assert ids(decision.preempted) == [1]
    assert ids(decision.scheduled) == [0]
    assert ids(sim.scheduler.waiting) == [1, 2]


def test_swap_recomputes_when_host_memory_is_full():
    sim = Simulation(num_blocks=6, block_size=2, num_host_blocks=1, watermark=0, preemption_mode="swap")
    sim.add([1] * 4, max_tokens=8)
    sim.add([2] * 4, max_tokens=8)
    sim.run()
    assert sim.scheduler.num_preemptions > 0
    assert all(seq.num_output_tokens == 8 for seq in sim.sequences)


def test_swapped_sequence_resumes_where_it_was():
    sim = Simulation(num_blocks=6, block_size=2, num_host_blocks=8, watermark=0, preemption_mode="swap")
    sim.add([1] * 4, max_tokens=8)
    (second,) = sim.add([2] * 4, max_tokens=8)
    while not sim.scheduler.num_preemptions:
        decision = sim.step()
    assert second.status is SequenceStatus.SWAPPED
    assert decision.swap_out
    computed = second.num_computed_tokens
    assert computed >= 4
    while second.status is SequenceStatus.SWAPPED:
        decision = sim.step()
    assert decision.swap_in
    assert decision.scheduled[second] == len(second.tokens) - 1 - computed, "only what was not computed before"
    sim.run()


def test_two_requests_with_one_prefix_share_in_the_very_same_step():
    sim = Simulation(num_blocks=16, block_size=4)
    sim.add([1] * 10, max_tokens=2)
    sim.add([1] * 10, max_tokens=2)
    assert tokens_of(sim.step()) == {0: 10, 1: 2}
    assert sim.manager.tables[0][:2] == sim.manager.tables[1][:2]
    sim.run()


def test_repeated_prompt_computes_at_least_one_token():
    sim = Simulation(num_blocks=16, block_size=4)
    for _ in range(2):
        (seq,) = sim.add([1] * 8, max_tokens=1)
        decision = sim.step()
    assert tokens_of(decision) == {1: 4}
    assert seq.num_cached_tokens == 4


def test_n_sequences_share_their_prompt_and_then_part():
    sim = Simulation(num_blocks=32, block_size=4, enable_prefix_caching=False)
    group = sim.add([1] * 10, max_tokens=6, n=3)
    assert tokens_of(sim.step()) == {0: 10}
    decision = sim.step()
    assert tokens_of(decision) == {0: 1, 1: 1, 2: 1}
    tables = [sim.manager.tables[seq.seq_id] for seq in group]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2]
    assert len({table[2] for table in tables}) == 3
    # The parent writes its own token into the shared last block first, so everyone but the last holder copies.
    assert len(decision.copies) == 2
    sim.run()
    assert all(seq.num_output_tokens == 6 for seq in group)


def test_n_sequences_survive_a_parent_that_ends_first():
    sim = Simulation(num_blocks=32, block_size=4, max_num_seqs=1, enable_prefix_caching=False)
    group = sim.add([1] * 5, max_tokens=2, n=3)
    sim.run()
    assert [seq.num_output_tokens for seq in group] == [2, 2, 2]


@pytest.mark.parametrize("when", [0, 1, 2, 5])
def test_abort_at_any_moment_frees_everything(when):
    sim = Simulation(num_blocks=8, block_size=2, num_host_blocks=8, watermark=0, preemption_mode="swap")
    for i in range(4):
        sim.add([i] * 4, max_tokens=8, n=2)
    for _ in range(when):
        sim.step()
    for seq in sim.sequences:
        sim.scheduler.abort(seq)
        sim.scheduler.check_invariants()
    assert not sim.scheduler.has_unfinished()
    sim.check_all_free()


def test_an_abort_behind_the_end_keeps_the_reason():
    sim = Simulation()
    (seq,) = sim.add([1, 2], max_tokens=1)
    sim.run()
    sim.scheduler.abort(seq)
    assert (seq.finish_reason, seq.stop_reason) == ("length", None)


def test_full_queue_refuses_and_keeps_working():
    sim = Simulation(max_num_waiting=2)
    sim.add([1])
    sim.add([2])
    with pytest.raises(QueueFullError, match="at most 2 may"):
        sim.add([3])
    assert sim.run() > 0
    sim.add([4])


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("max_model_len", 0), ("policy", "lifo"), ("preemption_mode", "drop"),
     ("max_num_waiting", 0), ("long_prefill_token_threshold", -1)],
)  # fmt: skip
def test_bad_settings_are_named(setting, value):
    with pytest.raises(ValueError, match=setting.removesuffix("_mode")):
        SchedulerConfig(**{setting: value})


def test_sliding_window_lets_a_long_sequence_live_in_few_blocks():
    sim = Simulation(num_blocks=12, block_size=2, sliding_window=4, max_model_len=24)
    (seq,) = sim.add([1, 2, 3, 4], max_tokens=19)
    most = 0
    while sim.scheduler.has_unfinished():
        sim.step()
        most = max(most, sim.manager.allocator.num_used)
    assert seq.num_output_tokens == 19
    assert most <= 4, "a window of 4 tokens touches at most 3 blocks, and one is being filled"


def test_check_invariants_sees_a_sequence_in_two_queues():
    sim = Simulation()
    (seq,) = sim.add([1, 2])
    sim.step()
    sim.scheduler.waiting.append(seq)
    with pytest.raises(AssertionError, match="queued twice"):
        sim.scheduler.check_invariants()


def test_longest_prefix_match_admits_whose_prompt_is_cached_before_it_is_pushed_out():
    """Three groups with a common prefix each arrive in turns at a cache that holds one and a half prefixes."""
    hits = {}
    for policy in ("fcfs", "lpm"):
        manager = BlockManager(num_blocks=14, block_size=4, watermark=0)
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=56, policy=policy), manager
        )
        for seq_id in range(12):
            prefix = [100 * (seq_id % 3) + i for i in range(32)]
            params = SamplingParams(max_tokens=1)
            scheduler.add(Sequence(seq_id, [*prefix, 500 + seq_id], params, arrival_time=time.monotonic()))
        order = []
        while scheduler.has_unfinished():
            output = scheduler.schedule()
            scheduler.check_invariants()
            order += [seq.seq_id for seq in output.scheduled]
            scheduler.update(output, [[7]] * len(output.sampled))
        assert sorted(order) == list(range(12))
        hits[policy] = manager.prefix_cache.num_hits
        assert order == (list(range(12)) if policy == "fcfs" else sorted(range(12), key=lambda i: (i % 3, i)))
    assert hits == {"fcfs": 0, "lpm": 9 * 32}


def test_with_longest_prefix_match_nobody_waits_forever():
    manager = BlockManager(num_blocks=32, block_size=4, watermark=0)
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=56, policy="lpm")
    scheduler = Scheduler(config, manager)
    now = time.monotonic()
    cached, params = list(range(16)), SamplingParams(max_tokens=1)
    scheduler.add(Sequence(0, cached, params, arrival_time=now))
    output = scheduler.schedule()
    scheduler.update(output, [[7]])
    for seq_id, tokens, age in [(1, [90] * 8, 0.0), (2, [91] * 8, LPM_PATIENCE + 1), (3, [*cached, 5], 0.0)]:
        scheduler.add(Sequence(seq_id, tokens, params, arrival_time=now - age))
    order = []
    while scheduler.has_unfinished():
        output = scheduler.schedule()
        order += [seq.seq_id for seq in output.scheduled]
        scheduler.update(output, [[7]] * len(output.sampled))
    assert order == [2, 3, 1]
