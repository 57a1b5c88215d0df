"""Task 2.9 ★: the next step is decided while this one runs, on tokens that nobody has seen."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stages.batching.continuous_batch import ContinuousBatch, FlatBatch
from stages.batching.sampling_params import SamplingParams
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.core.config import EngineConfig
from stages.core.engine import LLMEngine
from stages.core.overlap.lookahead import Lookahead, known_ids
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.simulation import Simulation, counts, ids, next_token
from stages.tests.tiny_models import make_tiny_llama


class Ahead(Simulation):
    """A simulation that is its own device: it computes each step when it is begun, in the order in which they are.

    Attributes:
        log: what happened: ("begin", ids of the sequences) and ("finish", ids of the sampled ones).
    """

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        config, self.log = self.scheduler.config, list[tuple[str, list[int]]]()
        self.batch = ContinuousBatch(config.max_num_seqs, config.max_model_len, self.manager.block_size)
        self.lookahead: Lookahead[Any, Any] = Lookahead(self.scheduler, self.batch, self)

    def begin(self, batch: FlatBatch, tokens: Tensor | None = None) -> dict[Sequence, tuple[int, ...]]:
        """Compute a step: what its last tokens read, by sequence."""
        self.log.append(("begin", ids(batch.sequences)))
        decision, size, read = batch.decision, self.manager.block_size, {}
        self._copy(self.device, self.host, decision.swap_out)
        self._copy(self.host, self.device, decision.swap_in)
        self._copy(self.device, self.device, decision.copies)
        input_ids = torch.from_numpy(batch.input_ids)
        known = (input_ids if tokens is None else known_ids(input_ids, tokens)).tolist()
        for row, seq in enumerate(batch.sequences):
            table = batch.block_tables[row]
            for at in range(batch.query_start_loc[row], batch.query_start_loc[row + 1]):
                behind = int(batch.positions[at]) - 1
                before = self.device.get(int(table[behind // size]) * size + behind % size, ()) if behind >= 0 else ()
                read[seq] = self.device[int(batch.slot_mapping[at])] = (*before, known[at])
        return read

    def finish(
        self, batch: FlatBatch, hidden: dict[Sequence, tuple[int, ...]], meanwhile: Callable[[Tensor], None] | None = None
    ) -> list[list[int]]:
        """The tokens of those who get one, shown to `meanwhile` first."""
        self.log.append(("finish", ids(batch.sampled)))
        check_equal(len(batch.logits_indices), len(batch.sampled), "rows with logits")
        new = [next_token(hidden[seq]) for seq in batch.sampled]
        if new and meanwhile is not None:
            meanwhile(torch.tensor(new))
        return [[token] for token in new]

    def step(self) -> SchedulerOutput:
        """A step as the engine has it."""
        decision = self.scheduler.schedule()
        self.scheduler.check_invariants()
        if decision.scheduled:
            batch = self.lookahead.build(decision, self.manager.tables)
            result = self.lookahead.execute(batch)
            assert all(token >= 0 for seq in self.sequences for token in seq.tokens), "a place holder is left in a sequence"
            self.scheduler.update(decision, result)
            self.lookahead.on_step(decision, 0.0)
            self.scheduler.check_invariants()
        return decision

    def ask(self, prompt: int | list[int], max_tokens: int, stop: tuple[int, ...] = ()) -> Sequence:
        return self.add(prompt, max_tokens=max_tokens, stop_token_ids=list(stop))


def alone(seq: Sequence) -> list[int]:
    """What a sequence says if it is asked token after token."""
    tokens = list(seq.tokens[: seq.num_prompt_tokens])
    while len(tokens) < seq.max_len:
        tokens.append(next_token(tuple(tokens)))
        if tokens[-1] in seq.params.stop_token_ids:
            break
    return tokens[seq.num_prompt_tokens :]


def stops(prompt: list[int], after: int) -> tuple[int]:
    """A stop token that ends a prompt's answer with its token number `after`, and no earlier."""
    tokens = list(prompt)
    for _ in range(after):
        tokens.append(next_token(tuple(tokens)))
    assert tokens[-1] not in tokens[len(prompt) : -1]
    return (tokens[-1],)


def check_answers(sim: Ahead) -> None:
    for seq in sim.sequences:
        check_equal(seq.tokens[seq.num_prompt_tokens :], alone(seq), f"the answer of sequence {seq.seq_id}")


@settings(max_examples=60, deadline=None)
@given(tokens=st.lists(st.integers(0, 999), min_size=1, max_size=6), data=st.data())
def test_place_holders_become_the_tokens_of_their_rows(tokens: list[int], data: st.DataObject) -> None:
    """Any mixture of known ids and place holders. What comes in stays as it is.

    Why: a row that reads its neighbour's token goes on with somebody else's answer.
    """
    drawn = data.draw(st.lists(st.integers(-len(tokens), 50), min_size=1, max_size=9))
    input_ids, sampled = torch.tensor(drawn), torch.tensor(tokens)
    found = known_ids(input_ids, sampled)
    check_equal(found.tolist(), [each if each >= 0 else tokens[-1 - each] for each in drawn], "the ids")
    check_equal((input_ids.tolist(), sampled.tolist()), (drawn, tokens), "what came in")


def test_the_host_needs_no_token_to_fill_them_in() -> None:
    """On PyTorch's meta device, where tensors have shapes and no numbers, the ids have their shape all the same.

    Why: what chooses or counts by the values waits for the device, and then nothing is ahead of anything.
    """
    found = known_ids(torch.zeros(7, dtype=torch.int64, device="meta"), torch.zeros(3, dtype=torch.int64, device="meta"))
    check_equal((list(found.shape), found.device.type), ([7], "meta"), "shape and device")


def test_a_step_begins_before_the_one_before_has_ended() -> None:
    """One prompt of three tokens, four tokens to say: each step is begun under the one before and is not decided twice.

    Why: this is what the task is for. A step begun after the last one's tokens are known is one that the device waited for.
    """
    sim = Ahead()
    seq = sim.ask(3, 4)
    begun = []
    for number in range(4):
        check_equal(counts(sim.step()), {0: 3 if number == 0 else 1}, f"step {number}")
        begun.append(len([each for each in sim.log if each[0] == "begin"]))
    check_equal(begun, [2, 3, 4, 4], "steps that have begun when steps 0 to 3 are over")
    check_equal([what for what, _ in sim.log], ["begin", *["finish", "begin"] * 3, "finish"], "begins and ends")
    check_equal((sim.lookahead.num_steps, sim.lookahead.num_in_vain), (3, 0), "num_steps and num_in_vain")
    check_equal(sim.run(), 0, "steps that are left")
    check_answers(sim)
    check_equal(seq.finished, True, "whether it has ended")


def test_an_end_that_is_known_costs_no_row() -> None:
    """Answers of 1, 2 and 4 tokens: who reaches its length is not in the next step, which has it in `removed`.

    Why: the last token of an answer needs no step behind it. One that is computed all the same is a row for nobody.
    """
    sim = Ahead()
    for length in (1, 2, 4):
        sim.ask(3, length)
    decisions = [sim.step() for _ in range(4)]
    check_equal([row for what, row in sim.log if what == "begin"], [[0, 1, 2], [1, 2], [2], [2]], "who is in each step")
    for number in (0, 1):
        assert number in decisions[number + 1].removed, f"step {number + 1} does not say that sequence {number} has left"
    check_equal(sim.lookahead.num_in_vain, 0, "num_in_vain")
    sim.run()
    check_answers(sim)


def test_the_end_of_a_long_text_costs_no_row_either() -> None:
    """A prompt of 300 tokens with an answer of one.

    Why: lengths are compared as numbers. Small ones are the same objects in Python, and large ones are not.
    """
    sim = Ahead(num_blocks=200, max_num_batched_tokens=512)
    sim.ask(300, 1)
    sim.step()
    check_equal([row for what, row in sim.log if what == "begin"], [[0]], "who is in each step")
    check_equal(sim.run(), 0, "steps that are left")
    check_answers(sim)


def test_the_place_of_one_that_ends_is_given_away_at_once() -> None:
    """Two seats, three requests; the first ends by its length in step 1. The third is admitted for step 2, into its blocks.

    Why: a seat or a block that is free one step later is one step of every short answer in which somebody waits in vain.
    """
    sim = Ahead(num_blocks=6, block_size=4, max_num_seqs=2, max_model_len=24)
    sim.ask(7, 2)
    sim.ask(6, 6)
    sim.ask(9, 3)
    sim.step()
    sim.step()
    check_equal([row for what, row in sim.log if what == "begin"], [[0, 1], [0, 1], [1, 2]], "who is in each step")
    sim.run()
    check_answers(sim)


def test_a_stop_that_is_found_late_is_rolled_back() -> None:
    """Sequence 1 of three says its stop token in step 1, when step 2 has begun with it.

    Why: its row is computed in vain and must lead nowhere: no token, no block, and its neighbours keep their own rows.
    """
    sim = Ahead()
    prompts = [list(range(10 * row, 10 * row + 5)) for row in range(3)]
    sim.ask(prompts[0], 6)
    ending = sim.ask(prompts[1], 6, stops(prompts[1], 2))
    sim.ask(prompts[2], 6)
    sim.step()
    sim.step()
    check_equal((ending.finished, len(ending.tokens)), (True, 7), "whether sequence 1 has ended, and its tokens")
    third = sim.step()
    check_equal(counts(third), {0: 1, 2: 1}, "the decision of step 2")
    check_equal(ids(third.sampled), [0, 2], "who gets a token in it")
    begun = [row for what, row in sim.log if what == "begin"]
    check_equal(begun[2], [0, 1, 2], "who was in step 2 when it was begun")
    check_equal([row for what, row in sim.log if what == "finish"][2], [0, 2], "who is sampled in step 2")
    check_equal(sim.lookahead.num_in_vain, 1, "num_in_vain")
    sim.run()
    check_answers(sim)


def test_a_step_of_which_nobody_is_left_is_forgotten() -> None:
    """The only sequence stops when the next step has begun; a new request comes then.

    Why: a decision with nobody in it looks like an engine with nothing to do, and the new one would wait for ever.
    """
    sim = Ahead()
    prompt = [3, 1, 4]
    sim.ask(prompt, 9, stops(prompt, 2))
    sim.step()
    sim.step()
    check_equal(sim.scheduler.has_unfinished(), False, "whether anything is left")
    late = sim.ask([2, 7, 1, 8], 3)
    check_equal(counts(sim.step()), {late.seq_id: 4}, "the step behind it")
    check_equal(sim.lookahead.num_in_vain, 1, "num_in_vain")
    sim.run()
    check_answers(sim)


def test_one_that_is_aborted_between_steps_leaves_the_one_that_has_begun() -> None:
    """Sequence 0 of two is aborted after the second step, in the middle of its answer.

    Why: clients leave at any time, also while a step with them runs; the engine tells only the scheduler.
    """
    sim = Ahead()
    gone, stays = sim.ask(4, 9), sim.ask(5, 9)
    sim.step()
    sim.step()
    sim.scheduler.abort(gone)
    check_equal(counts(sim.step()), {stays.seq_id: 1}, "the next step")
    check_equal((len(gone.tokens), gone.num_computed_tokens), (6, 5), "tokens of the one that left, and those computed")
    sim.run()
    check_equal(stays.tokens[5:], alone(stays), "the answer of the other")


def test_one_that_is_aborted_in_the_middle_of_its_prompt_leaves_too() -> None:
    """A prompt of twelve, beside one that decodes, is aborted when its second chunk has begun.

    Why: it is not sampled, so nobody misses it there. But its blocks are somebody else's by now, and what the step fills would
    enter the prefix cache as its own. And a row that was computed in vain is counted, whether it was to be sampled or not.
    """
    sim = Ahead(num_blocks=32, block_size=4, max_num_batched_tokens=5, prefix_caching=True)
    stays = sim.ask([50], 9)
    sim.step()
    gone = sim.ask(12, 3)
    sim.step()
    check_equal(sim.log[-2:], [("finish", [0]), ("begin", [0, 1])], "what has happened last")
    sim.scheduler.abort(gone)
    check_equal(counts(sim.step()), {stays.seq_id: 1}, "the next step")
    check_equal(sim.lookahead.num_in_vain, 1, "num_in_vain")
    sim.run()
    check_equal(stays.tokens[1:], alone(stays), "the answer of the other")


def test_who_is_left_keeps_its_rows_behind_a_chunk() -> None:
    """A chunk of four in front of two that decode, of which the first says its stop token when that step has begun: the other
    one's logits are in row 5 of the step.

    Why: with one token each, the n-th of those who are sampled is row n of the step. Behind a chunk that is another's row.
    """
    sim = Ahead(max_num_batched_tokens=6, max_num_seqs=3, policy="priority")
    ending = sim.add([50], max_tokens=9, priority=5, stop_token_ids=list(stops([50], 3)))
    stays = sim.add([60], max_tokens=9, priority=5)
    sim.step()
    sim.add(12, max_tokens=3, priority=1)
    sim.step()
    sim.step()
    check_equal((ending.finished, sim.log[-1]), (True, ("begin", [2, 0, 1])), "whether the first has ended, and what has begun")
    decision = sim.scheduler.schedule()
    batch = sim.lookahead.build(decision, sim.manager.tables)
    check_equal((ids(batch.sampled), batch.logits_indices.tolist()), ([stays.seq_id], [5]), "who is sampled, and of which row")


def test_a_chunk_that_samples_nobody_is_followed_by_a_step() -> None:
    """A prompt of ten in chunks of four, beside one that decodes: place holders are of the rows that are sampled.

    Why: row r of the tokens is the r-th of those *sampled*. In a step with a chunk in front that is another number than the
    r-th of those in the step.
    """
    sim = Ahead(max_num_batched_tokens=5, max_num_seqs=3, policy="priority")
    decoding = sim.add([50], max_tokens=12, priority=5)
    sim.step()
    sim.add(10, max_tokens=3, priority=1)  # it stands before the other one
    sim.run()
    chunked = [row for what, row in sim.log if what == "begin" and len(row) == 2]
    check_equal(chunked[:3], [[0, 1], [1, 0], [1, 0]], "the order in the steps with chunks")
    check_answers(sim)
    check_equal(len(decoding.tokens), 13, "tokens of the one that decodes")


def test_an_interrupt_leaves_no_place_holder() -> None:
    """Laying out the step ahead raises. Both sequences are as they were before the step, and nothing has begun.

    Why: Ctrl-C comes at any line. What `abort` hands back to the user must not hold the token -1.
    """
    sim = Ahead()
    first, second = sim.ask(3, 5), sim.ask(4, 5)
    sim.step()
    before = [(list(seq.tokens), seq.num_computed_tokens) for seq in (first, second)]
    build, seen = sim.batch.build, list[list[int]]()

    def interrupted(decision: SchedulerOutput, tables: dict[int, list[int]]) -> FlatBatch:
        seen.append([seq.tokens[-1] for seq in decision.scheduled])
        raise KeyboardInterrupt

    sim.batch.build = interrupted
    with pytest.raises(KeyboardInterrupt):
        sim.step()
    check_equal(seen, [[-1, -2]], "last tokens of the sequences that the layout sees")
    check_equal([(list(seq.tokens), seq.num_computed_tokens) for seq in (first, second)], before, "tokens, and those computed")
    sim.batch.build = build
    check_equal(sim.lookahead.num_steps, 1, "num_steps")
    check_equal(sim.lookahead.take(), None, "what has been decided ahead")


def test_blocks_are_known_by_tokens_and_not_by_place_holders() -> None:
    """A prompt of three and nine tokens of answer fill blocks of four; the same text as a prompt finds what is full.

    Why: a block that entered the prefix cache under the hash of a place holder would be found by nobody, or by a stranger.
    """
    sim = Ahead(num_blocks=32, block_size=4, prefix_caching=True)
    first = sim.ask([5, 6, 7], 9)
    sim.run()
    second = sim.ask(list(first.tokens), 1)
    sim.run()
    check_equal(second.num_cached_tokens, 8, "tokens of the second prompt that were cached")
    check_answers(sim)


@pytest.mark.parametrize("swap", [False, True], ids=["recompute", "swap"])
def test_memory_that_runs_out_under_a_step(swap: bool) -> None:
    """Three answers need twice the blocks that there are, so the step ahead preempts somebody who is in the one that runs.

    Why: its new token comes after it was thrown out. It counts as computed from there on, or is counted twice.
    """
    sim = Ahead(num_blocks=8, block_size=2, num_host_blocks=16 if swap else 0, max_num_seqs=3, max_model_len=14,
                preemption_mode="swap" if swap else "recompute")  # fmt: skip
    for prompt in (3, 4, 2):
        sim.ask(prompt, 9)
    sim.run()
    assert sim.scheduler.num_preemptions > 1, "nobody was preempted: the test is about those who are"
    check_answers(sim)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_load_is_answered_as_if_each_were_alone(data: st.DataObject) -> None:
    """Requests with common beginnings, stop tokens and lengths, at different times, in little memory and small budgets.

    Why: a step ahead changes when things are done and nothing of what is said.
    """
    sim = Ahead(
        num_blocks=data.draw(st.integers(8, 24)), block_size=3, max_num_seqs=data.draw(st.integers(1, 4)), max_model_len=24,
        max_num_batched_tokens=data.draw(st.integers(4, 16)), prefix_caching=data.draw(st.booleans()),
    )  # fmt: skip
    common = [7, 8, 9, 10, 11, 12, 13]
    for number in range(data.draw(st.integers(1, 6))):
        prompt = common[: data.draw(st.integers(0, 7))] + [number] * data.draw(st.integers(1, 5))
        length = data.draw(st.integers(1, 10))
        text, late = list(prompt), data.draw(st.booleans())
        for _ in range(data.draw(st.integers(1, length)) if late else 0):
            text.append(next_token(tuple(text)))
        sim.ask(prompt, length, (text[-1],) if late else ())
        for _ in range(data.draw(st.integers(0, 3))):
            if sim.scheduler.has_unfinished():
                sim.step()
    sim.run()
    check_answers(sim)


def test_the_engine_says_what_transformers_say(tmp_path: Path) -> None:
    """Three prompts at an engine with ``async_scheduling``; one has a stop token in the middle of its answer.

    Why: in the engine the tokens are on a device, and the layers take them from there.
    """
    model = make_tiny_llama(tmp_path)
    prompts, expected = [[5, 6, 7], list(range(20, 33)), [9, 9, 3, 9]], []
    for prompt in prompts:
        answer = model.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
        expected.append(answer[0, len(prompt) :].tolist())
    stop = expected[1][3]
    expected[1] = expected[1][: expected[1].index(stop) + 1]
    limits: dict[str, Any] = {"max_model_len": 64, "block_size": 4, "max_num_batched_tokens": 8, "max_num_seqs": 4}
    engine = LLMEngine(EngineConfig(model=str(tmp_path), dtype="float32", device="cpu", async_scheduling=True, **limits))
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=0.0, max_tokens=8, ignore_eos=True, stop_token_ids=[stop] if number == 1 else [], logprobs=number
        )
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    said: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        said.update({each.request_id: list(each.outputs[0].token_ids) for each in engine.step() if each.finished})
    check_equal([said[str(number)] for number in range(3)], expected, "the answers")
    stats = engine.stats()
    check_equal(stats.num_steps_ahead > 5, True, "whether steps were begun ahead")
    check_equal(stats.kv_cache_usage, 0.0, "KV cache usage")
    engine.close()
