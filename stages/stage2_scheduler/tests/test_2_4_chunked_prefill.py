"""Task 2.4: what those who run get in a step, and what a step leaves behind."""

from __future__ import annotations

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stages.batching.scheduler_output import Draft, SchedulerOutput
from stages.batching.sequence import Sequence, SequenceStatus
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, counts, ids, make_sequence


def serve(sim: Simulation) -> tuple[dict[int, int], int]:
    """What the running sequences get in a step, and what is left of the budget."""
    output = SchedulerOutput()
    left = sim.scheduler.schedule_running(output)
    return counts(output), left


def add_with_child(sim: Simulation, prompt: int, **fields: object) -> tuple[Sequence, Sequence]:
    """A waiting sequence and a second answer to its prompt, which is in no queue yet."""
    parent = sim.add(prompt, **fields)
    child = make_sequence(len(sim.sequences), list(parent.tokens), parent=parent, **fields)
    sim.sequences.append(child)
    parent.children = [child]
    return parent, child


def test_each_decode_gets_one_token() -> None:
    """Three sequences that decode get a token each of a budget of 10, and 7 are left over.

    Why: what is left goes to chunks of prompts. A decode step alone would leave most of the device idle.
    """
    sim = Simulation(max_num_batched_tokens=10)
    for length in (4, 5, 9):
        sim.start(length)
    check_equal(serve(sim), ({0: 1, 1: 1, 2: 1}, 7), "scheduled tokens and the budget left")


def test_large_batch_of_decodes() -> None:
    """Three hundred sequences decode: a token each, and 100 of a budget of 400 are left.

    Why: on a GPU the batch is hundreds wide, and this loop runs over it at every step.
    """
    sim = Simulation(num_blocks=400, max_num_seqs=300, max_num_batched_tokens=400)
    for _ in range(300):
        sim.start(2)
    check_equal(serve(sim), (dict.fromkeys(range(300), 1), 100), "scheduled tokens and the budget left")


def test_nobody_running_leaves_the_whole_budget() -> None:
    """With nothing running, nothing is scheduled and the whole budget is left.

    Why: the first step of a server has only newcomers.
    """
    check_equal(serve(Simulation(max_num_batched_tokens=10)), ({}, 10), "scheduled tokens and the budget left")


@pytest.mark.parametrize(("left", "count", "budget_left"), [(1, 1, 15), (15, 15, 1), (16, 16, 0), (17, 16, 0), (30, 16, 0)])
def test_prompt_goes_on_with_its_next_chunk(left: int, count: int, budget_left: int) -> None:
    """A prompt of which `left` tokens are missing gets min(left, 16) of a budget of 16.

    Why: a chunk is nothing special, just fewer tokens than are left. The last chunk is as long as it happens to be.
    """
    sim = Simulation(max_num_batched_tokens=16)
    sim.start(40, computed=40 - left)
    check_equal(serve(sim), ({0: count}, budget_left), "scheduled tokens and the budget left")


@pytest.mark.parametrize("left", [2, 3])
def test_few_tokens_are_cut_too(left: int) -> None:
    """Two or three tokens are left of a prompt, and the budget, or the longest chunk, is one less than that.

    Why: where the budget is one, two tokens are one too many, for arrays that were made for one.
    """
    for limits in ({"max_num_batched_tokens": left - 1}, {"long_prefill_token_threshold": left - 1}):
        sim = Simulation(**limits)
        sim.start(9, computed=9 - left)
        check_equal(serve(sim)[0], {0: left - 1}, f"scheduled tokens with {limits}")


@pytest.mark.parametrize("behind", [0, 1, 2, 3, 4])
def test_prompt_in_front_leaves_a_token_for_each_behind(behind: int) -> None:
    """A long prompt stands before some decodes: of a budget of 8 it gets 8 less their number, and they get their tokens.

    Why: under "priority" an urgent document may stand first. If it took the whole budget, every other stream would stall for
    as long as the document lasts.
    """
    sim = Simulation(max_num_batched_tokens=8, policy="priority")
    for _ in range(behind):
        sim.start(4, priority=1)
    sim.start(40, computed=8, priority=0)
    expected = {behind: 8 - behind} | dict.fromkeys(range(behind), 1)
    check_equal(serve(sim), (expected, 0), "scheduled tokens and the budget left")


def test_two_prompts_and_a_decode_share_a_step() -> None:
    """Two prompts of 20 tokens before a decode, budget 10: the first gets 8, the second 1, the decode 1.

    Why: each prompt leaves a token for everybody behind it, other prompts too. So all get on, and the first gets on fast.
    """
    sim = Simulation(max_num_batched_tokens=10, policy="priority")
    sim.start(30, computed=10)
    sim.start(30, computed=10)
    sim.start(4, priority=1)
    check_equal(serve(sim), ({0: 8, 1: 1, 2: 1}, 0), "scheduled tokens and the budget left")


def test_budget_smaller_than_the_batch_serves_the_first() -> None:
    """Four run and the budget is 3: the first three get one token each, and the fourth waits for the next step, unharmed.

    Why: the budget is a promise about the length of a step, so it holds for decodes too.
    """
    sim = Simulation(max_num_batched_tokens=3)
    sim.start(20, computed=4)
    for _ in range(3):
        sim.start(4)
    check_equal(serve(sim), ({0: 1, 1: 1, 2: 1}, 0), "scheduled tokens and the budget left")
    check_equal(ids(sim.scheduler.running), [0, 1, 2, 3], "running sequences")


def test_threshold_caps_every_chunk() -> None:
    """long_prefill_token_threshold = 4: a prompt with 10 tokens left gets 4, one with 3 left gets 3, a decode 1.

    Why: the time of a step is felt by all who decode in it. The threshold bounds what one prompt may add.
    """
    sim = Simulation(max_num_batched_tokens=32, long_prefill_token_threshold=4)
    sim.start(20, computed=10)
    sim.start(20, computed=17)
    sim.start(4)
    check_equal(serve(sim), ({0: 4, 1: 3, 2: 1}, 24), "scheduled tokens and the budget left")


def let_go(sim: Simulation) -> list[int]:
    """Put a stand-in for `preempt`, task 2.5, into a simulation: it frees the victim's blocks, and its id joins this list."""
    victims: list[int] = []

    def preempt(seq: Sequence, output: SchedulerOutput) -> None:
        check_equal(seq in sim.scheduler.running, False, f"sequence {seq.seq_id} is still in `running` when it is preempted")
        victims.append(seq.seq_id)
        output.preempted.append(seq)
        sim.manager.free(seq)

    sim.scheduler.preempt = preempt
    return victims


def test_the_last_of_running_gives_way() -> None:
    """Three run, no block is free, and the first needs one: the last of `running` is taken out of it and preempted, and the
    others get their tokens.

    Why: who was served last has the least to lose. Whoever preempts the one that asks turns the policy upside down.
    """
    sim = Simulation(num_blocks=7, block_size=4)
    for length in (8, 6, 9):
        sim.start(length)
    victims = let_go(sim)
    check_equal(serve(sim), ({0: 1, 1: 1}, sim.scheduler.config.max_num_batched_tokens - 2), "scheduled tokens, budget left")
    check_equal(victims, [2], "preempted sequences")
    check_equal(ids(sim.scheduler.running), [0, 1], "running sequences")


def test_as_many_give_way_as_it_takes() -> None:
    """A first sequence with 8 tokens left needs 4 blocks of 2, and none is free: the last two go, in that order, and no third.

    Why: one victim may not be enough, and one too many is computed again for nothing.
    """
    sim = Simulation(num_blocks=8, block_size=2, max_num_batched_tokens=16)
    first = sim.start(4)
    for _ in range(3):
        sim.start(3)
    first.tokens += list(range(70, 77))
    victims = let_go(sim)
    check_equal(serve(sim), ({0: 8, 1: 1}, 7), "scheduled tokens and the budget left")
    check_equal(victims, [3, 2], "preempted sequences, in the order in which they lost their blocks")


def test_the_last_may_have_to_give_way_to_nobody() -> None:
    """Only the last of three needs a block and none is free: it is preempted itself, and the step goes on with the others:
    their filled blocks enter the prefix cache, and the rest of the budget is returned.

    Why: the sequences before it have their tokens. Leaving the function at that place forgets what comes behind the loop.
    """
    sim = Simulation(num_blocks=6, block_size=4, prefix_caching=True, max_num_batched_tokens=16)
    for length in (7, 6, 8):
        sim.start(length)
    victims, cached = let_go(sim), len(sim.manager.prefix_cache)
    check_equal(serve(sim), ({0: 1, 1: 1}, 14), "scheduled tokens and the budget left")
    check_equal(victims, [2], "preempted sequences")
    check_equal(ids(sim.scheduler.running), [0, 1], "running sequences")
    check_equal(len(sim.manager.prefix_cache), cached + 1, "cached blocks: the first sequence fills its second one")


def test_who_is_preempted_caches_nothing() -> None:
    """A sequence that is preempted in the step that would have filled its block leaves no entry for it in the prefix cache.

    Why: the entry would name a block that nobody has filled, and the next prompt with these tokens would read it.
    """
    sim = Simulation(num_blocks=3, block_size=4, prefix_caching=True, max_num_batched_tokens=16)
    sim.start(5)
    last = sim.start(4, computed=3)
    last.tokens += [71, 72, 73, 74]
    victims = let_go(sim)
    check_equal(serve(sim), ({0: 1}, 15), "scheduled tokens and the budget left")
    check_equal((victims, len(sim.manager.prefix_cache)), ([1], 0), "preempted sequences, and cached blocks")


@pytest.mark.parametrize("left", [1, 2, 7, 16, 20])
def test_a_resumed_sequence_goes_on_in_chunks(left: int) -> None:
    """A sequence that computes its prompt and output again, `left` tokens of the output still missing, gets min(left, 16) of a
    budget of 16, and is sampled when that is all.

    Why: a sequence with output is not always one that decodes. A token a step for a long answer would take longer than the
    answer did.
    """
    sim = Simulation(max_num_batched_tokens=16)
    seq = sim.start(6, computed=5)
    seq.tokens += list(range(100, 130))
    seq.num_computed_tokens = len(seq.tokens) - left
    sim.manager.free(seq)
    sim.manager.allocate(seq)
    output = SchedulerOutput()
    check_equal(sim.scheduler.schedule_running(output), 16 - min(left, 16), "what is left of the budget")
    check_equal(counts(output), {0: min(left, 16)}, "scheduled tokens")
    check_equal(ids(output.sampled), [0] if left <= 16 else [], "sampled sequences")


def test_a_step_of_chunks_counts() -> None:
    """A step in which nobody is sampled, and no table changed, is a step: it is counted, and so is what it computed.

    Why: the first steps of a long prompt are such. Left out of the counters, a server that works looks idle.
    """
    sim = Simulation(num_blocks=10, block_size=4)
    chunk = sim.start(20, computed=2)
    sim.scheduler.update(SchedulerOutput(scheduled={chunk: 3}), [])
    scheduler = sim.scheduler
    check_equal((scheduler.num_steps, scheduler.num_generation_tokens), (1, 0), "steps and generated tokens")
    check_equal((chunk.num_computed_tokens, scheduler.peak_usage), (5, 0.5), "num_computed_tokens and the peak")


def test_running_come_before_waiting() -> None:
    """Two decodes run and a prompt of 20 waits, budget 8: the decodes get their tokens, the prompt the other 6.

    Why: whoever has begun is finished first; newcomers take what is left.
    """
    sim = Simulation(max_num_batched_tokens=8)
    sim.start(4)
    sim.start(4)
    sim.add(20)
    output = sim.step()
    check_equal(list(counts(output).items()), [(0, 1), (1, 1), (2, 6)], "scheduled tokens, in order")


def test_prompt_runs_through_in_chunks_and_is_sampled_at_its_end() -> None:
    """A prompt of 20 beside a decode, budget 8: chunks of 7, 7 and 6, and its first token comes with the third.

    Why: this is the whole of chunked prefill. The prompt's tokens are computed once each and in order, and nobody waits.
    """
    sim = Simulation(max_num_batched_tokens=8)
    sim.start(4)
    prompt = sim.add(20)
    seen = []
    for _ in range(4):
        output = sim.step()
        seen.append((output.scheduled[prompt], ids(output.sampled), prompt.num_computed_tokens, len(prompt.tokens)))
    expected = [(7, [0], 7, 20), (7, [0], 14, 20), (6, [0, 1], 20, 21), (1, [0, 1], 21, 22)]
    check_equal(seen, expected, "a step each: tokens of the prompt, who was sampled, computed tokens, known tokens")


def test_long_prompt_never_stalls_a_decode() -> None:
    """While a prompt of 100 tokens is computed with a budget of 16, the sequence before it gets a token at every step.

    Why: with a step for the whole prompt, every stream would pause for as long as the prompt takes. A llama.cpp user saw 270
    tokens a second fall to 6.6 in this way.
    """
    sim = Simulation(max_num_batched_tokens=16)
    decode = sim.start(4, max_tokens=30)
    prompt = sim.add(100, max_tokens=1)
    for step in range(1, 8):
        before = len(decode.tokens)
        sim.step()
        check_equal(len(decode.tokens), before + 1, f"tokens of the decode after step {step}")
        check_equal(prompt.finished, step == 7, f"whether the prompt is through after step {step}: 100 tokens, 15 a step")


@settings(
    max_examples=40, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
    phases=[Phase.generate, Phase.shrink],
)  # fmt: skip
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    budget=st.integers(6, 20),
    threshold=st.sampled_from([0, 1, 5]),
    policy=st.sampled_from(["fcfs", "priority"]),
)
def play_a_mix(lengths: list[int], budget: int, threshold: int, policy: str) -> None:
    sim = Simulation(
        max_num_batched_tokens=budget, long_prefill_token_threshold=threshold, max_num_seqs=6, max_model_len=64, policy=policy
    )
    for i, length in enumerate(lengths):
        sim.add(length, max_tokens=1 + (7 * i + length) % 9, priority=length % 3)
    while sim.scheduler.has_unfinished():
        decoding = [seq for seq in sim.scheduler.running if seq.num_output_tokens]
        output = sim.step()
        assert output.scheduled, "there is work to do and the step is empty"
        assert sum(output.scheduled.values()) <= budget, f"{counts(output)} are more tokens than the budget of {budget}"
        for seq in decoding:
            assert output.scheduled.get(seq) == 1, (
                f"sequence {seq.seq_id} decodes and got {output.scheduled.get(seq, 0)} tokens"
            )
    lengths_of_answers = [1 + (7 * i + length) % 9 for i, length in enumerate(lengths)]
    check_equal([seq.num_output_tokens for seq in sim.sequences], lengths_of_answers, "tokens generated")


def test_any_mix_keeps_the_budget_and_the_streams() -> None:
    """For random prompts: no step exceeds the budget, whoever decodes gets a token at every step, and every read finds its
    keys.

    Why: the two promises of chunked prefill hold for every mix of prompts or they are none.
    """
    serve(Simulation())  # so that an empty function says so at once, before a search for the shortest case
    play_a_mix()


def test_update_moves_everyone_and_appends_to_the_sampled() -> None:
    """After a step with a chunk of 3 and two decodes, all have moved by their counts; only the sampled got a token, each its
    own.

    Why: a token for a half-computed prompt is a token out of nowhere; and a shift by one gives users each other's words.
    """
    sim = Simulation()
    chunk, first, second = sim.start(10, computed=2), sim.start(4), sim.start(6)
    output = SchedulerOutput(scheduled={chunk: 3, first: 1, second: 1}, sampled=[first, second])
    sim.scheduler.update(output, [[71], [72]])
    check_equal([seq.num_computed_tokens for seq in (chunk, first, second)], [5, 5, 7], "num_computed_tokens")
    check_equal([len(seq.tokens) for seq in (chunk, first, second)], [10, 6, 8], "number of tokens")
    check_equal([first.tokens[-1], second.tokens[-1]], [71, 72], "the new tokens")
    check_equal(ids(sim.scheduler.running), [0, 1, 2], "running sequences")


@pytest.mark.parametrize(("new", "computed"), [([71, 72, 73, 74], 8), ([71, 72, 9], 7), ([9], 5)])
def test_drafts_that_stay_were_computed_with_the_step(new: list[int], computed: int) -> None:
    """Three tokens are on trial behind a sequence with a prompt of 4 and one token; all, two or none of them stay, and one more
    comes. Those that stay are computed, the last one is not; what was on trial is gone.

    Why: a draft that is still there when the new tokens come stands in the answer twice; and what the step has computed would
    be computed again.
    """
    sim = Simulation()
    seq = sim.start(4)
    first = seq.tokens[-1]
    seq.tokens += [71, 72, 73]
    output = SchedulerOutput(scheduled={seq: 4}, sampled=[seq], drafts={seq: Draft([71, 72, 73])})
    sim.manager.append_slots(seq, 4, output.copies)
    sim.scheduler.update(output, [new])
    check_equal(seq.tokens[4:], [first, *new], "tokens behind the prompt")
    check_equal(seq.num_computed_tokens, computed, "num_computed_tokens")
    check_equal(output.scheduled[seq], len(new), "tokens of the step that count")


def test_finished_sequence_leaves_and_gives_its_blocks_back() -> None:
    """Of three sequences the middle one ends: it is FINISHED, out of `running`, its blocks are free, and the others go on.

    Why: memory is what limits the batch. A finished sequence that keeps its blocks even for a step keeps somebody out.
    """
    sim = Simulation(block_size=4)
    sequences = [sim.start(6, max_tokens=n) for n in (8, 2, 8)]
    output = SchedulerOutput(scheduled=dict.fromkeys(sequences, 1), sampled=list(sequences))
    sim.scheduler.update(output, [[71], [72], [73]])
    running, finished = SequenceStatus.RUNNING, SequenceStatus.FINISHED
    check_equal([seq.status for seq in sequences], [running, finished, running], "statuses")
    check_equal(ids(sim.scheduler.running), [0, 2], "running sequences")
    check_equal(sorted(sim.manager.tables), [0, 2], "sequences that hold blocks")
    check_equal(sim.manager.allocator.num_used, 4, "blocks in use: 2 sequences with 6 tokens in blocks of 4")
    check_equal((sequences[1].finish_reason, sequences[1].output_token_ids[-1]), ("length", 72), "reason and last token")


def test_nothing_is_appended_behind_the_end() -> None:
    """A step brings a sequence three tokens, and its length ends it with the second: the third is not appended.

    Why: with speculative decoding a step brings several tokens. What stands behind the end is no part of the answer.
    """
    sim = Simulation()
    seq, other = sim.start(4, max_tokens=3), sim.start(4)
    output = SchedulerOutput(scheduled={seq: 1, other: 1}, sampled=[seq, other])
    sim.scheduler.update(output, [[71, 72, 73], [74]])
    check_equal(seq.output_token_ids[1:], [71, 72], "tokens that were appended")
    check_equal(sim.scheduler.num_generation_tokens, 2, "num_generation_tokens: one for each that was sampled")
    check_equal((seq.status, other.output_token_ids[1:]), (SequenceStatus.FINISHED, [74]), "status, and its neighbour's token")


def test_update_keeps_the_counters() -> None:
    """Two steps of three sequences, two of them sampled: 2 steps, 4 tokens, and the peak is the largest share of the blocks.

    Why: operators size their memory by the peak, and throughput is tokens generated, not tokens computed.
    """
    sim = Simulation(num_blocks=10, block_size=4)
    chunk, first, second = sim.start(12, computed=2), sim.start(4, max_tokens=2), sim.start(4)
    usage = sim.manager.usage
    check_equal(usage, 0.5, "share of the blocks in use: 3 + 1 + 1 of 10")
    sim.scheduler.update(SchedulerOutput(scheduled={chunk: 3, first: 1, second: 1}, sampled=[first, second]), [[71], [72]])
    sim.scheduler.update(SchedulerOutput(scheduled={chunk: 7, second: 1}, sampled=[chunk, second]), [[73], [74]])
    scheduler = sim.scheduler
    check_equal((scheduler.num_steps, scheduler.num_generation_tokens), (2, 4), "steps and generated tokens")
    check_equal(scheduler.peak_usage, usage, "peak of the blocks' usage")


def test_several_may_end_in_one_step() -> None:
    """Two of three end in the same step; both leave, both give their blocks back, and the next step names them as removed.

    Why: whoever removes from a list while walking over it skips a neighbour, which then runs for ever.
    """
    sim = Simulation()
    for n in (2, 2, 8):
        sim.start(4, max_tokens=n)
    sim.step()
    check_equal(ids(sim.scheduler.running), [2], "running sequences")
    check_equal(sim.manager.allocator.num_used, 2, "blocks in use: one sequence with 5 computed tokens in blocks of 4")
    check_equal(sorted(sim.step().removed), [0, 1], "removed sequences, as the next step names them")
    check_equal(sim.step().removed, [], "removed sequences of the step after")


def test_freed_seat_is_taken_in_the_next_step() -> None:
    """With one seat and memory for one sequence, the second starts in the step after the first has ended.

    Why: this is the difference to static batching, where the seat stays empty until the longest answer is done.
    """
    sim = Simulation(num_blocks=2, block_size=4, max_num_seqs=1)
    sim.start(4, max_tokens=3)
    sim.add(5, max_tokens=1)
    seen = [counts(sim.step()) for _ in range(3)]
    check_equal(seen, [{0: 1}, {0: 1}, {1: 5}], "scheduled tokens of three steps")


def test_children_are_queued_when_the_prompt_is_computed() -> None:
    """The second answer to a prompt of 10 tokens comes to the queue after the prompt's last chunk, not before, and once.

    Why: it shares the prompt's blocks, and these are full only then. A step earlier it would have to compute the prompt itself.
    """
    sim = Simulation(max_num_batched_tokens=6)
    parent, child = add_with_child(sim, 10, max_tokens=4)
    sim.step()
    check_equal((ids(sim.scheduler.waiting), ids(parent.children)), ([], [1]), "waiting and children after the first chunk")
    sim.step()
    check_equal((ids(sim.scheduler.waiting), ids(parent.children)), ([1], []), "waiting and children after the last chunk")
    check_equal(counts(sim.step()), {0: 1, 1: 1}, "scheduled tokens of the next step")
    sim.run()
    check_equal(child.output_token_ids, parent.output_token_ids, "the child's answer: the same, as the model is greedy")


def test_children_are_queued_by_a_parent_that_ends_at_once() -> None:
    """A parent with max_tokens = 1 ends at its first token, and its child runs nevertheless.

    Why: a request for n answers gets n answers, also when the first of them is short.
    """
    sim = Simulation()
    parent, child = add_with_child(sim, 6, max_tokens=1)
    sim.step()
    check_equal((parent.finished, ids(sim.scheduler.waiting)), (True, [1]), "parent finished, and waiting sequences")
    sim.run()
    check_equal(child.output_token_ids, parent.output_token_ids, "the child's answer")


def test_shared_block_is_copied_before_two_write_to_it() -> None:
    """Parent and child share the half-full last block of a prompt of 10; the step in which both write to it copies it once.

    Why: without the copy both write their own words into the same slots, and each reads the other's.
    """
    sim = Simulation(block_size=4)
    add_with_child(sim, 10, max_tokens=6)
    sim.step()
    output = sim.step()
    check_equal(len(output.copies), 1, "copied blocks")
    check_equal(counts(output), {0: 1, 1: 1}, "scheduled tokens")
    sim.run()


def test_blocks_enter_the_prefix_cache_as_chunks_and_answers_fill_them() -> None:
    """Blocks of 4, a prompt of 16 in chunks of 8: 2 blocks are cached in the first step, 4 in the second, 5 when 20 are
    computed.

    Why: the next turn of a chat begins with this prompt and this answer. What was cached need not be computed again.
    """
    sim = Simulation(block_size=4, prefix_caching=True, max_num_batched_tokens=8)
    seq = sim.add(16, max_tokens=8)
    cached = []
    for _ in range(6):
        sim.step()
        cached.append(len(sim.manager.prefix_cache))
    check_equal(seq.num_computed_tokens, 20, "num_computed_tokens after 6 steps")
    check_equal(cached, [2, 4, 4, 4, 4, 5], "cached blocks after each step")


def test_chunks_in_the_middle_of_a_prompt_enter_the_prefix_cache() -> None:
    """Blocks of 4, a prompt of 32 in chunks of 8, beside one that decodes: with each chunk two more blocks are cached.

    Why: a middle chunk samples nobody and is computed all the same. A block that is left out is a gap, behind which nothing of
    the prompt is found again.
    """
    sim = Simulation(block_size=4, prefix_caching=True, max_num_batched_tokens=9)
    sim.start([90], max_tokens=3)
    sim.add(32, max_tokens=1)
    cached = []
    for _ in range(4):
        sim.step()
        cached.append(len(sim.manager.prefix_cache))
    check_equal(cached, [2, 4, 6, 8], "cached blocks after each step")


def test_sliding_window_lets_go_of_old_blocks() -> None:
    """With a window of 4 tokens and blocks of 2, an answer of 18 tokens never holds more than 4 blocks.

    Why: the model does not see what lies behind its window, so these blocks can serve others.
    """
    sim = Simulation(num_blocks=12, block_size=2, sliding_window=4)
    seq, most = sim.start(4, max_tokens=18), 0
    while not seq.finished:
        sim.step()
        most = max(most, sim.manager.allocator.num_used)
    check_equal(seq.num_output_tokens, 18, "tokens generated")
    assert most <= 4, f"{most} blocks were in use at once; a window of 4 tokens touches 3 blocks, and one more is being filled"


def test_a_long_prompt_lets_go_of_old_blocks_too() -> None:
    """With a window of 4 tokens and blocks of 2, a prompt of 24 in chunks of 4 holds fewer blocks from chunk to chunk.

    Why: it was given blocks for all of it. Those behind the window can serve others long before its first token.
    """
    sim = Simulation(num_blocks=12, block_size=2, sliding_window=4, max_num_batched_tokens=4)
    sim.start(24, computed=4, max_tokens=1)
    held = []
    for _ in range(4):
        sim.step()
        held.append(sim.manager.allocator.num_used)
    check_equal(held, [12, 10, 8, 6], "blocks in use after the steps that begin at tokens 4, 8, 12 and 16")


def test_the_window_gives_its_blocks_before_one_is_asked_for() -> None:
    """All blocks are in use, and the sequence that needs a new one has one behind its window: it takes that one, and nobody is
    preempted.

    Why: a block that nobody sees any more is room. Asked for before it is freed, it costs somebody his place.
    """
    sim = Simulation(num_blocks=4, block_size=2, sliding_window=3, max_num_batched_tokens=8)
    sim.start(6)
    sim.start(1)
    victims = let_go(sim)
    check_equal(serve(sim), ({0: 1, 1: 1}, 6), "scheduled tokens and the budget left")
    check_equal(victims, [], "preempted sequences")
