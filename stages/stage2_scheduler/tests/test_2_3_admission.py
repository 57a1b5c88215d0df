"""Task 2.3: who of the waiting joins the batch, and with how many tokens."""

from __future__ import annotations

import random
import time

import pytest

from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import SequenceStatus
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, counts, ids, make_sequence


def admit(sim: Simulation, budget: int) -> SchedulerOutput:
    """Let the scheduler admit into an empty step, and check its books afterwards."""
    output = SchedulerOutput()
    sim.scheduler.admit_waiting(output, budget)
    sim.scheduler.check_invariants()
    return output


@pytest.mark.parametrize(
    ("computed", "count", "sampled"), [(0, 5, True), (0, 4, False), (3, 1, False), (3, 2, True), (4, 1, True)]
)
def test_only_a_sequence_with_nothing_left_is_sampled(computed: int, count: int, sampled: bool) -> None:
    """Of 5 tokens, `computed` are in the cache and `count` are added: it is sampled if that makes 5, and only then.

    Why: the next token follows from the last known one. Sampling in the middle of a prompt would answer half a question.
    """
    output, seq = SchedulerOutput(), make_sequence(0, 5)
    seq.num_computed_tokens = computed
    output.add(seq, count)
    check_equal(counts(output), {0: count}, "scheduled tokens")
    check_equal(ids(output.sampled), [0] if sampled else [], "sampled sequences")


@pytest.mark.parametrize(("computed", "count", "sampled"), [(0, 5, False), (0, 7, False), (5, 2, False), (6, 1, False),
                                                            (0, 8, True), (5, 3, True)])  # fmt: skip
def test_a_resumed_sequence_is_sampled_at_the_end_of_its_output(computed: int, count: int, sampled: bool) -> None:
    """A sequence with a prompt of 5 and 3 tokens of output that computes all of it again is sampled behind the eighth.

    Why: behind the prompt, or in the middle of the output, the next token is known already. One that is sampled there is a
    token out of nowhere in the middle of an answer.
    """
    output, seq = SchedulerOutput(), make_sequence(0, 5)
    seq.tokens += [21, 22, 23]
    seq.num_computed_tokens = computed
    output.add(seq, count)
    check_equal(ids(output.sampled), [0] if sampled else [], f"sampled, with {computed} + {count} of 8 tokens")


def test_long_prompt_is_sampled_when_it_is_through() -> None:
    """A prompt of 300 tokens whose last 100 are scheduled is sampled.

    Why: Python keeps one object for each small number only, so code that compares with `is` works until prompts get long.
    """
    output, seq = SchedulerOutput(), make_sequence(0, 300)
    seq.num_computed_tokens = 200
    output.add(seq, 100)
    check_equal(ids(output.sampled), [0], "sampled sequences")


def test_decisions_keep_the_order_in_which_they_were_added() -> None:
    """`scheduled` and `sampled` keep the order of the calls; `sampled` leaves out who is not through.

    Why: the batch's rows and the sampled tokens are matched by position. One swap, and two users get each other's words.
    """
    output = SchedulerOutput()
    for seq_id, count in ((3, 4), (1, 2), (2, 4)):
        output.add(make_sequence(seq_id, 4), count)
    check_equal(list(counts(output).items()), [(3, 4), (1, 2), (2, 4)], "scheduled tokens, in order")
    check_equal(ids(output.sampled), [3, 2], "sampled sequences, in order")


@pytest.mark.parametrize("length", [15, 16, 17, 40])
def test_prompt_gets_what_the_budget_has(length: int) -> None:
    """With a budget of 16 tokens a prompt is admitted with min(length, 16), and sampled if that is all of it.

    Why: the budget bounds the time of a step. A prompt that is longer begins anyway and goes on in the next one.
    """
    sim = Simulation(max_num_batched_tokens=16)
    seq = sim.add(length)
    output = admit(sim, 16)
    check_equal(counts(output), {0: min(length, 16)}, "scheduled tokens")
    check_equal(ids(output.sampled), [0] if length <= 16 else [], "sampled sequences")
    check_equal(seq.num_computed_tokens, 0, "num_computed_tokens, which moves when the step has run")


def test_prompts_share_the_budget_in_order() -> None:
    """Prompts of 6, 6, 6 and 6 tokens meet a budget of 16: 6, 6, and a chunk of 4; the fourth waits.

    Why: the step is filled to the brim, which keeps the device busy, and never over it, which keeps everyone's next token on
    time.
    """
    sim = Simulation()
    for _ in range(4):
        sim.add(6)
    output = admit(sim, 16)
    check_equal(counts(output), {0: 6, 1: 6, 2: 4}, "scheduled tokens")
    check_equal(ids(output.sampled), [0, 1], "sampled sequences")
    check_equal(ids(sim.scheduler.waiting), [3], "waiting queue")


@pytest.mark.parametrize(("budget", "admitted"), [(0, []), (1, [0]), (12, [0, 1]), (13, [0, 1, 2])])
def test_nobody_is_admitted_without_a_token(budget: int, admitted: list[int]) -> None:
    """Prompts of 6 tokens are admitted while the budget has at least one token left; with none left, nobody is.

    Why: a sequence that holds blocks but computes nothing takes memory from those who could.
    """
    sim = Simulation()
    for _ in range(3):
        sim.add(6)
    output = admit(sim, budget)
    check_equal(ids(output.scheduled), admitted, "admitted sequences")
    check_equal(ids(sim.scheduler.running), admitted, "running sequences")
    check_equal(sim.manager.allocator.num_used, 2 * len(admitted), "blocks in use")


@pytest.mark.parametrize(("running", "admitted"), [(0, 3), (1, 2), (2, 1), (3, 0)])
def test_running_sequences_take_seats(running: int, admitted: int) -> None:
    """With max_num_seqs = 3 and some running already, only the seats that are left are filled.

    Why: the buffers of the batch, and on a GPU its recorded graphs, have a row for each of max_num_seqs and no more.
    """
    sim = Simulation(max_num_seqs=3)
    for _ in range(running):
        sim.start(4)
    for _ in range(4):
        sim.add(4)
    check_equal(len(admit(sim, 100).scheduled), admitted, "sequences admitted")
    check_equal(len(sim.scheduler.running), 3, "sequences running")
    check_equal(len(sim.scheduler.waiting), 4 - admitted, "sequences waiting")


def test_large_batch_is_filled_to_the_last_seat() -> None:
    """Of 301 prompts of one token, 300 are admitted to 300 seats and one waits.

    Why: on a GPU the batch is hundreds wide, and its limit must hold there as it does in small tests.
    """
    sim = Simulation(num_blocks=400, max_num_seqs=300)
    for _ in range(301):
        sim.add(1)
    check_equal(len(admit(sim, 400).scheduled), 300, "sequences admitted")
    check_equal(ids(sim.scheduler.waiting), [300], "waiting queue")


def test_first_in_line_is_never_skipped() -> None:
    """The first needs 6 blocks where 5 are free, the second needs 1: nobody is admitted, and no block is taken.

    Why: whoever lets small requests pass a big one lets it starve, as there is always another small one.
    """
    sim = Simulation(num_blocks=10, block_size=4)
    sim.start(19)
    first = sim.add(24)
    sim.add(2)
    output = admit(sim, 100)
    check_equal(ids(output.scheduled), [], "admitted sequences")
    check_equal(ids(sim.scheduler.waiting), [1, 2], "waiting queue")
    check_equal(sim.manager.allocator.num_free, 5, "free blocks")
    check_equal((first.status, first.first_scheduled_time), (SequenceStatus.WAITING, None), "status and first_scheduled_time")


@pytest.mark.parametrize(("length", "admitted"), [(19, [0, 1]), (20, [0, 1]), (21, [0])])
def test_the_whole_prompt_has_to_fit_the_memory(length: int, admitted: list[int]) -> None:
    """5 of 8 blocks are left for the second prompt: with blocks of 4 it is admitted up to 20 tokens, though 2 are in the
    budget.

    Why: half a prompt in memory can do nothing but be preempted. Its blocks must be there before its first chunk runs.
    """
    sim = Simulation(num_blocks=8, block_size=4)
    sim.add(12)
    sim.add(length)
    output = admit(sim, 14)
    check_equal(ids(output.scheduled), admitted, "admitted sequences")
    check_equal(output.scheduled.get(sim.sequences[1], 0), 2 if 1 in admitted else 0, "tokens of the second")


@pytest.mark.parametrize(("length", "scheduled"), [(9, {0: 6, 1: 9, 2: 1}), (10, {0: 6, 1: 10}), (11, {0: 6})])
def test_without_chunks_a_prompt_waits_for_a_budget_that_holds_it(length: int, scheduled: dict[int, int]) -> None:
    """enable_chunked_prefill = False and 10 of 16 tokens left: the second prompt is admitted whole, or waits and holds up the
    third.

    Why: some uses, such as the log-probabilities of a whole prompt in one go, want it so; and it is the baseline that
    chunking is measured against.
    """
    sim = Simulation(enable_chunked_prefill=False, max_num_batched_tokens=64, max_model_len=64)
    sim.add(6)
    sim.add(length)
    sim.add(1)
    check_equal(counts(admit(sim, 16)), scheduled, "scheduled tokens")


def test_without_chunks_a_resumed_sequence_counts_with_its_output() -> None:
    """Without chunks, a sequence that was preempted with a prompt of 6 and an output of 6 waits where 10 tokens are left.

    Why: it computes all twelve in one step. Measured by its prompt it would be cut, which is what was switched off.
    """
    sim = Simulation(enable_chunked_prefill=False, max_num_batched_tokens=64, max_model_len=64)
    seq = sim.add(6)
    seq.tokens += [21, 22, 23, 24, 25, 26]
    seq.num_preemptions = 1
    check_equal(counts(admit(sim, 10)), {}, "scheduled tokens with a budget of 10")
    check_equal(sim.manager.allocator.num_used, 0, "blocks in use")
    check_equal(counts(admit(sim, 12)), {0: 12}, "scheduled tokens with a budget of 12")


@pytest.mark.parametrize(("budget", "count", "sampled"), [(2, 2, []), (3, 3, []), (4, 4, [0]), (9, 4, [0])])
def test_a_swapped_sequence_goes_on_where_it_was(budget: int, count: int, sampled: list[int]) -> None:
    """A SWAPPED sequence with 6 of 10 tokens computed is admitted for the other 4, as far as the budget goes, and is RUNNING.

    Why: `_place` brings its blocks back, and what it has computed is still computed. (A stand-in for `swap_in`, task 2.5, gives
    it blocks here.)
    """
    sim = Simulation(block_size=4, preemption_mode="swap", num_host_blocks=4)
    seq = sim.add(10)
    seq.status, seq.num_computed_tokens, seq.num_preemptions, seq.first_scheduled_time = SequenceStatus.SWAPPED, 6, 1, 12.5
    sim.scheduler.swap_in = lambda seq, output, keep_watermark: sim.manager.allocate(seq) == 0
    output = admit(sim, budget)
    check_equal(counts(output), {0: count}, f"scheduled tokens with a budget of {budget}")
    check_equal(ids(output.sampled), sampled, "sampled sequences")
    check_equal((seq.status, seq.first_scheduled_time), (SequenceStatus.RUNNING, 12.5), "status and first_scheduled_time")
    check_equal((ids(sim.scheduler.waiting), ids(sim.scheduler.running)), ([], [0]), "waiting and running")


def test_a_resumed_sequence_may_come_in_chunks() -> None:
    """A preempted sequence with a prompt of 5 and an output of 3 meets a budget of 6: it is admitted with 6, and not sampled.

    Why: the tokens behind the prompt are known. What follows the sixth stands in its answer already.
    """
    sim = Simulation(block_size=4)
    seq = sim.add(5)
    seq.tokens += [21, 22, 23]
    seq.num_preemptions = 1
    output = admit(sim, 6)
    check_equal(counts(output), {0: 6}, "scheduled tokens")
    check_equal(ids(output.sampled), [], "sampled sequences")
    check_equal(len(sim.manager.tables[0]), 2, "blocks for 8 tokens")


def test_threshold_caps_each_prompt() -> None:
    """long_prefill_token_threshold = 8: prompts of 20, 5 and 20 tokens get 8, 5 and 8 of a budget of 32.

    Why: one long document cannot take a whole step; others start beside it.
    """
    sim = Simulation(max_num_batched_tokens=32, long_prefill_token_threshold=8)
    for length in (20, 5, 20):
        sim.add(length)
    output = admit(sim, 32)
    check_equal(counts(output), {0: 8, 1: 5, 2: 8}, "scheduled tokens")
    check_equal(ids(output.sampled), [1], "sampled sequences")


def test_admitted_sequence_runs_with_blocks_for_all_its_tokens() -> None:
    """After admission a sequence is RUNNING, in `running` and not in `waiting`, holds blocks for its prompt, and has a time.

    Why: the rest of the engine finds a sequence by its status and its queue. One that is in both is computed twice.
    """
    sim = Simulation(block_size=4)
    seq = sim.add(9)
    check_equal(ids(admit(sim, 5).scheduled), [0], "admitted sequences")
    check_equal(seq.status, SequenceStatus.RUNNING, "status")
    check_equal((ids(sim.scheduler.waiting), ids(sim.scheduler.running)), ([], [0]), "waiting and running")
    check_equal(len(sim.manager.tables[0]), 3, "blocks for 9 tokens in blocks of 4")
    check_equal(type(seq.first_scheduled_time), float, "type of first_scheduled_time")


def test_the_time_of_admission_is_on_the_monotonic_clock() -> None:
    """first_scheduled_time is what `time.monotonic` says while admit_waiting runs, for each of those admitted.

    Why: arrival and first token are measured on that clock. A time of another one makes a time to first token of minus fifty
    years.
    """
    sim = Simulation()
    sequences = [sim.add(4) for _ in range(2)]
    before = time.monotonic()
    admit(sim, 100)
    after = time.monotonic()
    for seq in sequences:
        found = seq.first_scheduled_time
        assert before <= found <= after, f"sequence {seq.seq_id} was admitted at {found}, not from {before} to {after}"


def test_first_scheduled_time_stays_the_first() -> None:
    """A sequence that was admitted before and preempted keeps its first_scheduled_time.

    Why: the time that a request spent in the queue is measured by it. A second admission must not make the queue look longer.
    """
    sim = Simulation()
    seq = sim.add(4)
    seq.num_preemptions, seq.first_scheduled_time = 1, 12.5
    admit(sim, 100)
    check_equal(seq.first_scheduled_time, 12.5, "first_scheduled_time")


def test_resumed_sequence_computes_its_output_too() -> None:
    """A preempted sequence with a prompt of 5 and an output of 3 is admitted with 8 tokens and blocks for them, and sampled.

    Why: its keys and values are gone, all of them. Whoever counts only the prompt leaves holes in its context.
    """
    sim = Simulation(block_size=4)
    seq = sim.add(5)
    seq.tokens += [21, 22, 23]
    seq.num_preemptions = 1
    output = admit(sim, 100)
    check_equal(counts(output), {0: 8}, "scheduled tokens")
    check_equal(ids(output.sampled), [0], "sampled sequences")
    check_equal(len(sim.manager.tables[0]), 2, "blocks for 8 tokens")


@pytest.mark.parametrize(("length", "left", "cached"), [(7, 3, 4), (8, 4, 4), (9, 1, 8), (10, 2, 8)])
def test_cached_beginning_costs_no_tokens(length: int, left: int, cached: int) -> None:
    """Two equal prompts with blocks of 4, admitted in one step: the second gets only the tokens behind its full cached blocks.

    Why: system prompts repeat. The blocks are known once the step that fills them is decided, so that even two requests of
    one step share; and at least one token is always computed, or there would be nothing to sample from.
    """
    sim = Simulation(block_size=4, prefix_caching=True)
    for _ in range(2):
        sim.add(list(range(50, 50 + length)))
    output = admit(sim, 100)
    check_equal(counts(output), {0: length, 1: left}, "scheduled tokens")
    check_equal([seq.num_computed_tokens for seq in sim.sequences], [0, cached], "num_computed_tokens")
    check_equal([seq.num_cached_tokens for seq in sim.sequences], [0, cached], "num_cached_tokens")
    check_equal(ids(output.sampled), [0, 1], "sampled sequences")
    shared = cached // 4
    check_equal(sim.manager.tables[1][:shared], sim.manager.tables[0][:shared], "shared blocks")


def test_only_what_this_step_computes_enters_the_cache() -> None:
    """Of a prompt of 16 tokens, 9 are in the budget: two full blocks of 4 enter the prefix cache, and no third.

    Why: a block in the cache is read by others at once. One that is filled only in the next step would give them garbage.
    """
    sim = Simulation(block_size=4, prefix_caching=True)
    sim.add(16)
    check_equal(counts(admit(sim, 9)), {0: 9}, "scheduled tokens")
    check_equal(len(sim.manager.prefix_cache), 2, "blocks in the prefix cache")


@pytest.mark.parametrize(("length", "admitted"), [(60, [1]), (64, [1]), (65, [])])
def test_watermark_is_kept_beside_others(length: int, admitted: list[int]) -> None:
    """Of 20 blocks, 2 are the watermark and 2 run: a newcomer may take 16, that is 64 tokens, and no more.

    Why: everyone who runs will soon need another block. Without a reserve the newcomer is admitted only to be preempted.
    """
    sim = Simulation(num_blocks=20, block_size=4, watermark=0.1)
    sim.start(6)
    sim.add(length)
    check_equal(ids(admit(sim, 100).scheduled), admitted, "admitted sequences")


def test_alone_a_sequence_may_use_the_last_block() -> None:
    """With nobody running, a prompt that needs all 20 blocks is admitted in spite of the watermark.

    Why: a reserve for nobody would make the longest allowed prompt wait for ever.
    """
    sim = Simulation(num_blocks=20, block_size=4, watermark=0.1)
    sim.add(80)
    check_equal(counts(admit(sim, 100)), {0: 80}, "scheduled tokens")


def test_running_stays_in_the_order_of_the_policy() -> None:
    """Under "priority" an urgent newcomer is put before those who run already and are less urgent.

    Why: the last of `running` is preempted first. A newcomer at the end would be the first victim, however urgent.
    """
    sim = Simulation(policy="priority")
    sim.start(4, priority=1)
    sim.start(4, priority=5)
    for rank in (3, 0, 9):
        sim.add(4, priority=rank)
    check_equal(ids(admit(sim, 100).scheduled), [3, 2, 4], "order of admission, by priority")
    check_equal(ids(sim.scheduler.running), [3, 0, 2, 1, 4], "running sequences, by priority")


def test_child_shares_the_prompt_and_computes_one_token() -> None:
    """The second answer to a prompt of 9 tokens is admitted with 1 token, on its parent's blocks.

    Why: n answers cost one prompt. Only its last token is computed again, for logits of the child's own.
    """
    sim = Simulation(block_size=4)
    parent = sim.start(9)
    child = sim.add(list(parent.prompt_token_ids), parent=parent)
    output = admit(sim, 100)
    check_equal(counts(output), {1: 1}, "scheduled tokens")
    check_equal(ids(output.sampled), [1], "sampled sequences")
    check_equal(sim.manager.tables[1][:2], sim.manager.tables[0][:2], "shared blocks")
    check_equal(child.num_cached_tokens, 0, "num_cached_tokens, which counts the prefix cache only")


@pytest.mark.parametrize("number", range(4))
def test_any_crowd_fills_the_budget_in_order(number: int) -> None:
    """Prompts of random lengths meet a random budget and a random number of seats.

    Why: a step is filled to the brim by those who came first, and by nobody else.
    """
    dice = random.Random(230 + number)
    for _ in range(8):
        lengths, seats, budget = [dice.randrange(1, 12) for _ in range(9)], dice.randrange(1, 10), dice.randrange(1, 70)
        sim = Simulation(block_size=dice.choice([1, 2, 4]), num_blocks=128, max_num_seqs=seats, max_num_batched_tokens=80)
        for length in lengths:
            sim.add(length)
        expected, left = {}, budget
        for seq_id, length in enumerate(lengths[:seats]):
            if left:
                expected[seq_id] = min(length, left)
                left -= expected[seq_id]
        output = admit(sim, budget)
        check_equal(counts(output), expected, "scheduled tokens")
        check_equal(ids(output.sampled), [i for i, count in expected.items() if count == lengths[i]], "sampled sequences")
        check_equal(ids(sim.scheduler.waiting), list(range(len(expected), 9)), "waiting queue")
