"""Task 2.5: what happens when blocks run out, and that no answer shows it."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence, SequenceStatus
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, counts, ids

SETTINGS = settings(
    max_examples=40, stateful_step_count=25, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow], phases=[Phase.generate, Phase.shrink],
)  # fmt: skip


def preempt(sim: Simulation, seq: Sequence) -> SchedulerOutput:
    """Preempt a running sequence as `schedule_running` does: first out of `running`, then `preempt`."""
    output = SchedulerOutput()
    sim.scheduler.running.remove(seq)
    sim.scheduler.preempt(seq, output)
    sim.scheduler.check_invariants()
    return output


def test_recompute_gives_up_blocks_and_progress_but_no_tokens() -> None:
    """After a preemption by recomputation a sequence is WAITING, holds no block, has nothing computed, and knows all its
    tokens.

    Why: the three go together. A sequence without blocks that still counts tokens as computed resumes with a stale length and
    attends to slots that belong to others by now.
    """
    sim = Simulation(block_size=4)
    seq = sim.start(9)
    tokens = list(seq.tokens)
    output = preempt(sim, seq)
    check_equal(seq.status, SequenceStatus.WAITING, "status")
    check_equal(seq.num_computed_tokens, 0, "num_computed_tokens")
    check_equal(sim.manager.allocator.num_used, 0, "blocks in use")
    check_equal(seq.tokens, tokens, "tokens")
    check_equal((output.swap_out, output.swap_in, output.copies), ([], [], []), "blocks to move")


@pytest.mark.parametrize(("computed", "blocks"), [(7, 2), (8, 2), (9, 3)])
def test_swap_moves_what_is_computed_to_the_host(computed: int, blocks: int) -> None:
    """With the mode "swap" a sequence is SWAPPED, stays as computed as it was, and its full and half-full blocks go to the
    host.

    Why: that it need not compute them again is the point of swapping. The pairs tell the cache engine what to copy.
    """
    sim = Simulation(block_size=4, num_host_blocks=8, preemption_mode="swap")
    seq = sim.start(20, computed=computed)
    table = list(sim.manager.tables[0])
    output = preempt(sim, seq)
    check_equal(seq.status, SequenceStatus.SWAPPED, "status")
    check_equal(seq.num_computed_tokens, computed, "num_computed_tokens")
    check_equal(sim.manager.allocator.num_used, 0, "device blocks in use")
    check_equal([source for source, _ in output.swap_out], table[:blocks], "device blocks to copy")
    check_equal([target for _, target in output.swap_out], sim.manager.host_tables[0], "host blocks to copy to")


@pytest.mark.parametrize(("host_blocks", "status"), [(4, "swapped"), (3, "swapped"), (2, "waiting"), (0, "waiting")])
def test_full_host_means_recompute(host_blocks: int, status: str) -> None:
    """9 computed tokens in blocks of 4 need 3 host blocks: with 3 or more the sequence is swapped, with fewer it recomputes.

    Why: host memory is finite too. A full one must slow a request down and never break it.
    """
    sim = Simulation(block_size=4, num_host_blocks=host_blocks, preemption_mode="swap")
    seq = sim.start(9)
    output = preempt(sim, seq)
    check_equal(seq.status, SequenceStatus(status), "status")
    check_equal(seq.num_computed_tokens, 9 if status == "swapped" else 0, "num_computed_tokens")
    check_equal(len(output.swap_out), 3 if status == "swapped" else 0, "blocks to move to the host")


def test_recompute_leaves_the_host_alone() -> None:
    """With the mode "recompute" nothing goes to the host, also where it has room.

    Why: over a slow bus, computing again is often faster than moving. Whoever chose the mode measured it.
    """
    sim = Simulation(num_host_blocks=8, preemption_mode="recompute")
    seq = sim.start(9)
    check_equal(preempt(sim, seq).swap_out, [], "blocks to move to the host")
    check_equal(seq.status, SequenceStatus.WAITING, "status")


def test_preemption_is_counted_and_noted() -> None:
    """Each preemption counts 1 for the sequence and 1 for the scheduler; the step names who lost its blocks.

    Why: a rising counter is how an operator sees that memory is too small. The batch frees the row of whoever is named removed.
    """
    sim = Simulation()
    first, second = sim.start(4), sim.start(4)
    output = preempt(sim, second)
    check_equal(ids(output.preempted), [1], "preempted sequences")
    preempt(sim, first)
    check_equal((first.num_preemptions, second.num_preemptions), (1, 1), "num_preemptions of the sequences")
    check_equal(sim.scheduler.num_preemptions, 2, "num_preemptions of the scheduler")


def test_one_that_is_thrown_out_again_counts_again() -> None:
    """A sequence is preempted, comes back, and is preempted once more: both counters say 2.

    Why: with too little memory it is always the same ones that go. Counted once each, an engine that does little but throw them
    out and compute them again looks healthy.
    """
    sim = Simulation()
    seq = sim.start(4)
    preempt(sim, seq)
    sim.step()
    preempt(sim, seq)
    check_equal((seq.num_preemptions, sim.scheduler.num_preemptions), (2, 2), "num_preemptions of sequence and scheduler")


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_what_a_preemption_leaves_alone(mode: str) -> None:
    """Parent, first_scheduled_time, num_cached_tokens and the tokens stay as they were, in both modes.

    Why: the first says how long a request queued, the second what its prompt found in the cache. A preemption comes later, and
    is counted by itself.
    """
    sim = Simulation(num_host_blocks=8, preemption_mode=mode)
    parent, seq = sim.start(9), sim.start(9)
    tokens = list(seq.tokens)
    seq.first_scheduled_time, seq.num_cached_tokens, seq.parent = 12.5, 4, parent
    preempt(sim, seq)
    check_equal((seq.first_scheduled_time, seq.num_cached_tokens), (12.5, 4), "first_scheduled_time and num_cached_tokens")
    check_equal((seq.parent, seq.tokens), (parent, tokens), "parent and tokens")


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_two_victims_of_one_step(mode: str) -> None:
    """Two sequences are preempted in one step, in either mode: it names both as preempted and removed, has the moves of both,
    and counts both; one that was preempted four times before counts 5.

    Why: a step may need more than one victim. What is assigned instead of added, or noted for one mode only, loses the first:
    its blocks are never copied, or its row in the batch is never given back.
    """
    sim = Simulation(block_size=4, num_host_blocks=16, preemption_mode=mode)
    sequences = [sim.start(9), sim.start(6)]
    tables = [list(sim.manager.tables[seq.seq_id]) for seq in sequences]
    output = SchedulerOutput()
    for seq in sequences[::-1]:
        sim.scheduler.running.remove(seq)
        sim.scheduler.preempt(seq, output)
    check_equal(ids(output.preempted), [1, 0], "preempted sequences")
    check_equal(sim.scheduler._removed, [1, 0], "_removed")
    moved = [*tables[1], *tables[0]] if mode == "swap" else []
    check_equal([source for source, _ in output.swap_out], moved, "device blocks to copy to the host")
    check_equal(len({target for _, target in output.swap_out}), len(moved), "different host blocks")
    check_equal(sim.scheduler.num_preemptions, 2, "num_preemptions of the scheduler")
    check_equal([seq.num_preemptions for seq in sequences], [1, 1], "num_preemptions of the sequences")
    check_equal(ids(sim.scheduler.waiting), [0, 1], "waiting queue")
    sequences[0].num_preemptions = 4
    sim.scheduler.waiting.remove(sequences[0])
    sim.manager.free(sequences[0])
    sim.manager.allocate(sequences[0])
    sim.scheduler.preempt(sequences[0], output)
    check_equal(sequences[0].num_preemptions, 5, "num_preemptions of one that was preempted four times before")


def test_two_come_back_in_one_step() -> None:
    """Two swapped sequences are brought back for one step: it has the moves of both, and what they have computed stays.

    Why: memory becomes free for several at once. The moves that are overwritten never happen, and a sequence reads what
    another one left.
    """
    sim = Simulation(block_size=4, num_host_blocks=16, preemption_mode="swap")
    sequences = [sim.start(9), sim.start(6)]
    for seq in sequences:
        preempt(sim, seq)
    hosts = [list(sim.manager.host_tables[seq.seq_id]) for seq in sequences]
    output = SchedulerOutput()
    for seq in sequences:
        check_equal(sim.scheduler.swap_in(seq, output, keep_watermark=False), True, "what swap_in returns")
    check_equal([source for source, _ in output.swap_in], [*hosts[0], *hosts[1]], "host blocks to copy to the device")
    check_equal([seq.num_computed_tokens for seq in sequences], [9, 6], "num_computed_tokens")


@pytest.mark.parametrize(("policy", "expected"), [("fcfs", [0, 1, 2]), ("priority", [1, 0, 2])])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_preempted_sequence_waits_at_its_old_place(policy: str, expected: list[int], mode: str) -> None:
    """The first to arrive is preempted while 1 and 2 wait: it waits first under fcfs, between them under priority.

    Why: at the back of the queue it would be passed by everyone who comes while it waits, and its user would see a stream that
    stops for ever.
    """
    sim = Simulation(policy=policy, num_host_blocks=8, preemption_mode=mode)
    seq = sim.start(4, priority=1)
    sim.add(4, priority=0)
    sim.add(4, priority=1)
    preempt(sim, seq)
    check_equal(ids(sim.scheduler.waiting), expected, "waiting queue")


@pytest.mark.parametrize(("policy", "victim"), [("fcfs", 2), ("priority", 0)])
def test_last_in_line_is_the_victim(policy: str, victim: int) -> None:
    """Three sequences need a new block each and one is free: the last by the policy loses its blocks, the others go on.

    Why: the one that is served last has the least to lose, and the first in line always gets on, so everybody ends at last.
    """
    sim = Simulation(num_blocks=7, block_size=2, policy=policy)
    for rank in (2, 1, 0):
        sim.start(4, priority=rank)
    output = sim.step()
    check_equal(ids(output.preempted), [victim], "preempted sequences")
    check_equal(sorted(counts(output)), sorted({0, 1, 2} - {victim}), "scheduled sequences")
    check_equal(output.removed, [victim], "sequences that the step names as removed")


def test_the_one_that_needs_a_block_may_be_the_last_itself() -> None:
    """No block is free, only the last in line needs one: it preempts itself, and the other gets its token.

    Why: to take a block from somebody who comes before it would turn the policy upside down.
    """
    sim = Simulation(num_blocks=4, block_size=4)
    sim.start(5)
    sim.start(8)
    output = sim.step()
    check_equal(ids(output.preempted), [1], "preempted sequences")
    check_equal(counts(output), {0: 1}, "scheduled tokens")


def test_as_many_are_preempted_as_it_takes() -> None:
    """A chunk of 8 tokens needs 4 blocks of 2 and none is free: two sequences of 2 blocks each have to give up theirs.

    Why: one victim is not always enough, and one more than needed is computed again for nothing.
    """
    sim = Simulation(num_blocks=8, block_size=2, max_num_batched_tokens=16)
    first = sim.start(4)
    for _ in range(3):
        sim.start(3)
    first.tokens += list(range(70, 77))
    output = sim.step()
    check_equal(ids(output.preempted), [3, 2], "preempted sequences, in the order in which they lost their blocks")
    check_equal(counts(output), {0: 8, 1: 1}, "scheduled tokens")


def test_nobody_is_admitted_in_a_step_that_preempted() -> None:
    """A step preempts, one block stays free, and somebody urgent waits who would fit: nobody is admitted before the next step.

    Why: memory has just run out. Whoever takes what the victim gave up makes it run out again, and engines that did so
    preempted at every step and computed the same prompts over and over.
    """
    sim = Simulation(num_blocks=7, block_size=2, policy="priority")
    for length in (4, 4, 5):
        sim.start(length, priority=1)
    sim.add(1, priority=0)
    output = sim.step()
    check_equal(ids(output.preempted), [2], "preempted sequences")
    check_equal(counts(output), {0: 1, 1: 1}, "scheduled tokens")
    check_equal((sim.manager.allocator.num_free, ids(sim.scheduler.waiting)), (1, [3, 2]), "free blocks and waiting queue")
    check_equal(counts(sim.step()), {0: 1, 1: 1, 3: 1}, "scheduled tokens of the next step")


@pytest.mark.parametrize("watermark", [False, True])
@pytest.mark.parametrize(("free", "fits"), [(2, False), (3, None), (4, True)])
def test_swap_in_waits_for_memory(free: int, fits: bool | None, watermark: bool) -> None:
    """A swapped sequence with 10 tokens needs 3 blocks of 4, and 1 more where the watermark is to be kept; else nothing
    happens.

    Why: its answer goes on in these blocks. Bringing only a part back would leave it unable to do its next step.
    """
    sim = Simulation(num_blocks=10, block_size=4, num_host_blocks=8, preemption_mode="swap", watermark=0.1)
    seq = sim.start(9)
    preempt(sim, seq)
    sim.start(4 * (10 - free) - 1)
    output = SchedulerOutput()
    expected = not watermark if fits is None else fits
    check_equal(sim.scheduler.swap_in(seq, output, watermark), expected, f"what swap_in returns with {free} free blocks")
    check_equal(len(output.swap_in), 3 if expected else 0, "blocks to move to the device")
    check_equal(sim.manager.allocator.num_free, free - 3 if expected else free, "free blocks")
    check_equal((0 in sim.manager.tables, 0 in sim.manager.host_tables), (expected, not expected), "on the device, on the host")


def test_swapped_sequence_goes_on_where_it_was() -> None:
    """A sequence swapped out in the middle of its prompt, at 6 of 10 tokens, is brought back and computes the other 4.

    Why: with recomputation it would do all 10. The simulated cache also checks that its keys came back to the right slots.
    """
    sim = Simulation(block_size=4, num_host_blocks=8, preemption_mode="swap")
    seq = sim.start(10, computed=6)
    sim.start(4, max_tokens=20)
    moved = preempt(sim, seq)
    sim.compute(moved)
    sim.start(8, max_tokens=20)  # takes the device blocks that the first gave up
    output = sim.step()
    check_equal(output.scheduled[seq], 4, "scheduled tokens of the sequence that came back")
    check_equal([source for source, _ in output.swap_in], [target for _, target in moved.swap_out], "host blocks to move back")
    sim.run()


def answers(num_blocks: int, **settings_: object) -> tuple[list[list[int]], int]:
    """Answers to seven requests of different lengths, and how often somebody was preempted for them."""
    sim = Simulation(num_blocks, block_size=4, max_model_len=36, **settings_)
    for i in range(7):
        sim.add(3 + 2 * i, max_tokens=20 - i, priority=i % 3)
    sim.run()
    return [seq.output_token_ids for seq in sim.sequences], sim.scheduler.num_preemptions


@pytest.mark.parametrize("mode", ["recompute", "swap"])
@pytest.mark.parametrize("host_blocks", [0, 5, 64])
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("budget", [7, 64])
def test_answers_are_those_of_unlimited_memory(mode: str, host_blocks: int, caching: bool, budget: int) -> None:
    """Seven requests in 9 blocks, where they need 40, end with the very tokens that they get in 200 blocks.

    Why: preemption is the engine's own affair. vLLM once had requests that went on with other words after it [#16832].
    """
    roomy, calm = answers(200)
    check_equal(calm, 0, "preemptions with 200 blocks")
    tight, preemptions = answers(
        9, preemption_mode=mode, num_host_blocks=host_blocks, prefix_caching=caching, max_num_batched_tokens=budget
    )
    assert preemptions > 0, "9 blocks are too few for all, and yet nobody was preempted"
    for i, (ours, expected) in enumerate(zip(tight, roomy, strict=True)):
        check_equal(ours, expected, f"answer of sequence {i}")


class Lives(RuleBasedStateMachine):
    """Requests come, run, lose their blocks and are aborted in any order. `Simulation` checks each step and each read."""

    @initialize(
        blocks=st.integers(4, 10), block_size=st.sampled_from([1, 2, 4]), host=st.sampled_from([0, 2, 30]),
        mode=st.sampled_from(["recompute", "swap"]), policy=st.sampled_from(["fcfs", "priority"]), caching=st.booleans(),
        budget=st.sampled_from([2, 5, 64]),
    )  # fmt: skip
    def start(self, blocks, block_size, host, mode, policy, caching, budget) -> None:
        self.sim = Simulation(
            blocks, block_size, host, prefix_caching=caching, preemption_mode=mode, policy=policy, max_num_batched_tokens=budget
        )

    @rule(length=st.integers(1, 12), same=st.booleans(), max_tokens=st.integers(1, 10), priority=st.integers(0, 2))
    def add(self, length: int, same: bool, max_tokens: int, priority: int) -> None:
        length = min(length, self.sim.scheduler.config.max_model_len - 1)
        self.sim.add(list(range(length)) if same else length, max_tokens=max_tokens, priority=priority)

    @rule(count=st.integers(1, 4))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.sim.step()

    @precondition(lambda self: self.sim.scheduler.has_unfinished())
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.sim.scheduler.abort(data.draw(st.sampled_from(self.sim.scheduler.waiting + self.sim.scheduler.running)))

    @invariant()
    def books_are_in_order(self) -> None:
        if hasattr(self, "sim"):
            self.sim.scheduler.check_invariants()

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.run()


def test_random_lives_keep_every_invariant() -> None:
    """Random requests, steps and aborts in little memory: the books are right after each, and at the end every block is free.

    Why: preemption goes wrong in combinations that nobody thinks of, such as an abort while swapped out, or a cached prefix
    whose owner was just preempted.
    """
    # A first preemption by hand, so that this test cannot pass on a machine in which memory never ran out.
    sim = Simulation()
    preempt(sim, sim.start(4))
    run_state_machine_as_test(Lives, settings=SETTINGS)


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_any_crowd_gets_the_answers_of_unlimited_memory(mode: str) -> None:
    """Prompts of random lengths, with random limits and priorities, in little memory of random size.

    Why: who is preempted when follows from all lengths together. No table of cases has them all.
    """
    dice = random.Random(25)
    for _ in range(3):
        crowd = [(dice.randrange(5, 14), dice.randrange(14, 20), dice.randrange(3)) for _ in range(6)]
        blocks, tokens = dice.randrange(9, 12), []
        for sim in (
            Simulation(200, max_model_len=36),
            Simulation(blocks, num_host_blocks=dice.choice([3, 64]), max_model_len=36, preemption_mode=mode, policy="priority"),
        ):
            for prompt, most, rank in crowd:
                sim.add(prompt, max_tokens=most, priority=rank)
            sim.run()
            tokens.append([seq.output_token_ids for seq in sim.sequences])
        assert sim.scheduler.num_preemptions > 0, f"{blocks} blocks are too few for all, and yet nobody was preempted"
        check_equal(tokens[1], tokens[0], f"answers in {blocks} blocks")
