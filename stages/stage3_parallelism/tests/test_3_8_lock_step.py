"""Task 3.8: one process decides, all compute. Boards and messages first, then whole engines, at last with real processes."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stages.batching.continuous_batch import ContinuousBatch, FlatBatch
from stages.batching.sampling_params import SamplingParams
from stages.batching.scheduler_output import Draft, SchedulerOutput
from stages.batching.sequence import Sequence
from stages.batching.step_arrays import StepArrays
from stages.core import engine as engine_module
from stages.core import executor as executor_module
from stages.core.engine import LLM
from stages.core.executor import MultiProcExecutor, step_arrays
from stages.core.worker_process import StepBoard, WorkerDiedError
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.lock_step import Log, bare_executor, bare_worker, thread_executor
from stages.course.fixtures.simulation import make_sequence
from stages.parallelism.distributed import join

INT32 = ("block_tables", "query_start_loc", "context_lens")


# The board


def step_of(length: int, start: int = 0) -> StepArrays:
    """A step whose arrays all differ; block moves are none, three and one."""
    tokens = np.arange(length) + start
    tables = np.arange(2 * length).reshape(length, 2) + start
    moves = [np.arange(2 * n).reshape(n, 2) + start for n in (0, 3, 1)]
    return StepArrays(
        tokens, tables.astype(np.int32), (tokens + 3).astype(np.int32), (tokens + 4).astype(np.int32), tokens + 1, tokens + 2,
        tokens + 5, *moves, tokens[: length // 2], np.array([length // 2]),
    )  # fmt: skip


def check_step(got: StepArrays, expected: StepArrays, what: str) -> None:
    for field in fields(StepArrays):
        ours, theirs = getattr(got, field.name), getattr(expected, field.name)
        check_equal(ours.shape, theirs.shape, f"{what}: shape of {field.name}")
        check_equal(ours.ravel(), theirs.ravel(), f"{what}: {field.name}")
        check_equal(str(ours.dtype), "int32" if field.name in INT32 else "int64", f"{what}: type of {field.name}")


def two_boards() -> tuple[StepBoard, StepBoard]:
    """A board and one of another process on the same memory."""
    board = StepBoard()
    return board, StepBoard(os.dup(board.descriptor))


def test_what_is_written_can_be_read() -> None:
    """Another process that is told the shapes reads all twelve arrays, empty ones and tables of two dimensions included.

    Why: this is all that the other ranks ever learn of a step. Shapes travel as text, the numbers do not.
    """
    writer, reader = two_boards()
    shapes = writer.write(step_of(5))
    check_equal(shapes, [[5], [5, 2], [5], [5], [5], [5], [5], [0, 2], [3, 2], [1, 2], [2], [1]], "shapes")
    check_step(reader.read(shapes), step_of(5), "a step of 5")


def test_a_board_grows_and_its_readers_follow() -> None:
    """Steps of 3, 50,000, 200,000 and 1 tokens, read after each: the memory grows, and what is left of a long step is ignored.

    Why: a decode of three sequences is followed by a long prompt. A reader that keeps its old map reads past its end.
    """
    writer, reader = two_boards()
    for start, length in enumerate((3, 50_000, 200_000, 1)):
        step = step_of(length, start)
        check_step(reader.read(writer.write(step)), step, f"a step of {length}")


def test_a_board_has_room_for_twice_the_step_and_keeps_it() -> None:
    """The file behind it is twice as large as the step that it grew for, also when shorter ones follow.

    Why: a prompt that grows a little with each step would map new memory at each. And who reads a map of a file that was cut
    dies of SIGBUS.
    """
    board, _ = two_boards()
    step = step_of(1000)
    num_bytes = sum(getattr(step, field.name).nbytes for field in fields(StepArrays))
    board.write(step)
    check_equal(os.fstat(board.descriptor).st_size, 2 * num_bytes, "bytes of the file")
    for length in (1500, 3):
        board.write(step_of(length))
        check_equal(os.fstat(board.descriptor).st_size, 2 * num_bytes, f"bytes of the file after a step of {length}")


def test_a_step_that_was_read_stays_as_it_is() -> None:
    """The next step is written while the last one is still in use: what was read does not change.

    Why: a rank may be a little behind. If it looks at the board itself, its slots change under its hands.
    """
    writer, reader = two_boards()
    got = reader.read(writer.write(step_of(4)))
    writer.write(step_of(4, start=50))
    check_step(got, step_of(4), "the step read first")


def test_arrays_of_any_layout_and_type() -> None:
    """Tables that are a slice of a larger array, and int64 where int32 is meant, arrive as the numbers that they are.

    Why: a batch's tables are a view of the mirror of all tables. Its bytes do not lie one behind the other.
    """
    writer, reader = two_boards()
    step = step_of(4)
    mirror = np.arange(40).reshape(4, 10)
    step.block_tables = mirror[:, ::3]
    got = reader.read(writer.write(step))
    check_equal(got.block_tables, [[0, 3, 6, 9], [10, 13, 16, 19], [20, 23, 26, 29], [30, 33, 36, 39]], "block_tables")
    check_equal(str(got.block_tables.dtype), "int32", "type of block_tables")
    check_equal(got.context_lens, step.context_lens, "what lies behind the tables")


# What is told


def flat(counts: dict[Sequence, int], **moves: list[tuple[int, int]]) -> FlatBatch:
    """A batch in which sequence i has the blocks 4i, 4i + 1, … of 4 tokens."""
    sampled = [seq for seq, count in counts.items() if seq.num_computed_tokens + count == len(seq.tokens)]
    decision = SchedulerOutput(scheduled=counts, sampled=sampled, changed_tables={seq.seq_id for seq in counts}, **moves)
    tables = {seq.seq_id: [4 * seq.seq_id + i for i in range(4)] for seq in counts}
    return ContinuousBatch(8, 16, 4).build(decision, tables)


def sequence(seq_id: int, length: int, computed: int = 0, **params: Any) -> Sequence:
    seq = make_sequence(seq_id, length, **params)
    seq.num_computed_tokens = computed
    return seq


def mixed_batch() -> FlatBatch:
    """A prompt of 5 whose log-probabilities are wanted, a decode, and a chunk of 3 tokens in the middle of a prompt of 9."""
    counts = {sequence(0, 5, prompt_logprobs=1): 5, sequence(1, 7, computed=6): 1, sequence(2, 9, computed=2): 3}
    return flat(counts, swap_out=[(7, 0)], swap_in=[(1, 3), (2, 4)], copies=[(5, 6)])


def test_the_arrays_of_a_step() -> None:
    """The batch's own arrays, the block moves as pairs, and the rows of each call for logits: those of the prompt's
    log-probabilities first, then those that are sampled.

    Why: the others must move the same blocks, write the same slots and take part in the same gatherings. They need no sequence,
    no text and no sampling parameter for that.
    """
    batch = mixed_batch()
    step = step_arrays(batch)
    for name in ("input_ids", "positions", "slot_mapping", "block_tables", "query_start_loc", "context_lens"):
        check_equal(getattr(step, name), getattr(batch, name), name)
    check_equal(step.swap_out, [[7, 0]], "swap_out")
    check_equal(step.swap_in, [[1, 3], [2, 4]], "swap_in")
    check_equal(step.copies, [[5, 6]], "copies")
    check_equal(step.logit_rows, [0, 1, 2, 3, 4, 5], "logit_rows: four predict prompt tokens, rows 4 and 5 are sampled")
    check_equal(step.logit_counts, [4, 2], "logit_counts")


def test_drafts_have_logits_too() -> None:
    """Of a sequence with two drafted tokens and one without, the call for logits has four rows: three of the first, one of the
    second.

    Why: rank 0 wants logits behind every token on trial. If the others bring fewer rows, the gatherings differ, and with
    speculation every request dies of the time-out.
    """
    drafted, plain = sequence(0, 9, computed=6), sequence(1, 7, computed=6)
    decision = SchedulerOutput(
        scheduled={drafted: 3, plain: 1}, sampled=[drafted, plain], changed_tables={0, 1},
        drafts={drafted: Draft(drafted.tokens[-2:])},
    )  # fmt: skip
    batch = ContinuousBatch(8, 16, 4).build(decision, {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]})
    step = step_arrays(batch)
    check_equal(step.logit_rows, [0, 1, 2, 3], "logit_rows: the token before the drafts, both drafts, the other sequence's")
    check_equal(step.logit_counts, [4], "logit_counts")


def test_a_step_without_moves_and_logits() -> None:
    """A chunk in the middle of a prompt: no pairs, no rows, no calls, in arrays of the same shapes and types as ever.

    Why: most steps move no block, and an empty list has no second dimension unless somebody gives it one.
    """
    step = step_arrays(flat({sequence(0, 9): 4}))
    for name in ("swap_out", "swap_in", "copies"):
        check_equal(getattr(step, name).shape, (0, 2), f"shape of {name}")
    check_equal((step.logit_rows.shape, step.logit_counts.shape), ((0,), (0,)), "shapes of logit_rows and logit_counts")
    check_equal((str(step.logit_rows.dtype), str(step.logit_counts.dtype)), ("int64", "int64"), "their types")


def test_a_step_without_logits_moves_blocks_all_the_same() -> None:
    """A chunk in the middle of a prompt, with blocks that are swapped out, swapped in and copied beside it.

    Why: what is moved belongs to somebody whose step this is not. A rank that moves blocks only where something is sampled
    attends to old keys, and the sums are wrong on every rank.
    """
    step = step_arrays(flat({sequence(0, 9): 4}, swap_out=[(7, 0), (6, 1)], swap_in=[(1, 3)], copies=[(5, 6), (4, 2)]))
    check_equal(step.swap_out, [[7, 0], [6, 1]], "swap_out")
    check_equal(step.swap_in, [[1, 3]], "swap_in")
    check_equal(step.copies, [[5, 6], [4, 2]], "copies")
    check_equal(len(step.logit_counts), 0, "calls for logits")


# What a rank does


def test_a_rank_moves_blocks_computes_and_takes_part_in_every_gathering() -> None:
    """Swap out, swap in, copy; then the model; then logits of rows 0 to 3 and of rows 4 and 5, in two calls. And no sampling.

    Why: this is the order of rank 0. A gathering that a rank leaves out hangs all; a copy that it leaves out makes it attend to
    old keys, and the sums are wrong on every rank.
    """
    log = Log()
    step = step_arrays(mixed_batch())
    bare_worker(log, num_tokens=9).execute_without_sampling(step)
    check_equal(log.tracked, [False] * 3, "whether PyTorch noted what the model does, to go back through it")
    moves = [(what, [tuple(map(int, pair)) for pair in args[0]]) for who, what, args in log.events if who == "cache"]
    check_equal(moves, [("swap_out", [(7, 0)]), ("swap_in", [(1, 3), (2, 4)]), ("copy_blocks", [(5, 6)])], "block moves")
    check_equal([event[0] for event in log.events], ["cache"] * 3 + ["model"] * 3, "order")
    check_equal(
        [rows for _, what, rows in log.events if what == "logits"], [[0, 1, 2, 3], [4, 5]], "rows of each call for logits"
    )


def test_a_rank_computes_no_logits_when_nobody_does() -> None:
    """A chunk: the model runs, and there is no call for logits.

    Why: a gathering of nothing that only one side makes is as bad as one that is missing.
    """
    log = Log()
    bare_worker(log, num_tokens=4).execute_without_sampling(step_arrays(flat({sequence(0, 9): 4})))
    check_equal([what for who, what, _ in log.events if who == "model"], ["forward"], "what the model does")


# What the driver does


def test_everybody_is_told_before_the_driver_computes() -> None:
    """Ranks 1 and 2 are told the shapes, once, and find the arrays on the board; only then does rank 0 execute.

    Why: the first sum of rank 0 waits for the others. Told afterwards, they would never come.
    """
    log = Log()
    executor = bare_executor(log.worker(), [log.rank("rank 1"), log.rank("rank 2")])
    batch = mixed_batch()
    result = executor.execute(batch)
    check_equal(log.order, ["rank 1 send", "rank 2 send", "rank 0 execute"], "who did what")
    assert result is log, "execute returns what the worker gave"
    assert log.events[2][2] == (batch,), "the worker executes the batch itself"
    for _, _, message in log.events[:2]:
        check_equal(list(message), ["step"], "what a rank is told")
        got = StepBoard(os.dup(executor._board.descriptor)).read(message["step"])
        check_step(got, step_arrays(batch), "the step on the board")


def test_every_rank_sets_up_the_same_cache() -> None:
    """Ranks 1 and 2 are told the sizes of the cache, and then rank 0 sets up its own.

    Why: block tables are the same on all ranks, so the blocks must be, too. On a GPU a cache comes with recorded steps, whose
    sums wait for the others: told afterwards, they would never come.
    """
    log = Log()
    bare_executor(log.worker(), [log.rank("rank 1"), log.rank("rank 2")]).create_cache(40, 4, 8)
    check_equal(log.order, ["rank 1 send", "rank 2 send", "rank 0 create_cache"], "who did what")
    told = [message for who, _, message in log.events if who != "rank 0"]
    check_equal(told, [{"cache": [40, 4, 8]}] * 2, "what the others are told")
    check_equal([args for who, _, args in log.events if who == "rank 0"], [(40, 4, 8)], "what rank 0 sets up")


def test_a_sum_that_fails_is_blamed_on_the_dead() -> None:
    """Rank 0's step fails because a connection broke; rank 2 has died: the error is that rank 2 has.

    Why: "connection reset by peer" names nobody. And a process that is just dying needs a moment before it is dead.
    """
    log, death = Log(), WorkerDiedError("the worker of rank 2 has ended")
    executor = bare_executor(
        log.worker(RuntimeError("connection reset")), [log.rank("rank 1"), log.rank("rank 2", error=death)]
    )
    with pytest.raises(WorkerDiedError, match="rank 2 has ended"):
        executor.execute(mixed_batch())
    checks = log.patience
    check_equal([who for who, _ in checks], ["rank 1", "rank 2"], "ranks that were looked at")
    for who, seconds in checks:
        assert 0.5 <= seconds <= 10, f"{who} was given {seconds} seconds to be dead"


def says_out_of_memory(executor: MultiProcExecutor) -> None:
    """Let rank 0's step fail by itself, which must come out."""
    with pytest.raises(RuntimeError) as error:
        executor.execute(mixed_batch())
    if isinstance(error.value, NotImplementedError):  # an unfinished task is a RuntimeError, too
        raise error.value
    check_equal(str(error.value), "out of memory", "what rank 0 says")


def test_each_rank_gets_its_own_time_to_be_dead() -> None:
    """Three ranks are sure of a death after 10, 30 and 20 s: each is given its own, counted from the failure.

    Why: a process on this machine is dead in a moment, a machine on the network much later. One patience for all is too short
    for some, and an error waits too long for others.
    """
    log = Log()
    others = [log.rank(f"rank {i}", death_seconds=seconds) for i, seconds in ((1, 10.0), (2, 30.0), (3, 20.0))]
    executor = bare_executor(log.worker(RuntimeError("out of memory")), others)
    says_out_of_memory(executor)
    for (who, seconds), most in zip(log.patience, (10.0, 30.0, 20.0), strict=True):
        assert most - 5 <= seconds <= most, f"{who} was given {seconds} of its {most:g} seconds to be dead"


def test_the_others_are_looked_at_at_the_same_time() -> None:
    """Five ranks that live, each of which needs 0.2 s to be sure: together they are given about that long, not five times it.

    Why: an error of rank 0's own is told when the last of the others has been looked at. With eight ranks one after the other
    that would be after 14 s.
    """
    log = Log()
    others = [log.rank(f"rank {i}", death_seconds=0.2, lives=True) for i in range(1, 6)]
    executor = bare_executor(log.worker(RuntimeError("out of memory")), others)
    says_out_of_memory(executor)
    check_equal([who for who, _ in log.patience], [f"rank {i}" for i in range(1, 6)], "ranks that were looked at")
    given = sum(max(0.0, seconds) for _, seconds in log.patience)
    assert given <= 0.3, f"together the five ranks were given {given:.2f} s to be dead"


def test_a_fault_of_its_own_stays_one() -> None:
    """Rank 0's step fails, and all others live: its own error comes out. A ValueError comes out at once.

    Why: whoever blames the others for everything never finds the bug.
    """
    log = Log()
    executor = bare_executor(log.worker(RuntimeError("out of memory")), [log.rank("rank 1")])
    says_out_of_memory(executor)
    executor = bare_executor(log.worker(ValueError("a slip")), [log.rank("rank 1")])
    before = len(log.patience)
    with pytest.raises(ValueError, match="a slip"):
        executor.execute(mixed_batch())
    check_equal(len(log.patience), before, "looks at the others, of which there are none for a ValueError")


def test_who_cannot_be_told_is_dead_already() -> None:
    """Rank 1 cannot be told anything any more: that is the error, and rank 0 does not begin the step.

    Why: rank 0 would wait for it until the time-out of its first sum.
    """
    log = Log()
    executor = bare_executor(log.worker(), [log.rank("rank 1", told=WorkerDiedError("rank 1 has ended"))])
    with pytest.raises(WorkerDiedError, match="rank 1 has ended"):
        executor.execute(mixed_batch())
    check_equal(log.order, ["rank 1 send"], "who did what")


# Whole engines

SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_model_len": 128, "block_size": 4, "max_num_batched_tokens": 16,
    "enable_cpu_kernels": False, "attention_backend": "torch",
}  # fmt: skip
Answers = list[tuple[list[list[int]], list[float]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random LLaMA with 4 query heads over 2 KV heads: its folder, and the model in transformers."""
    StepBoard().write(step_of(1))  # an unfinished task is found before transformers is loaded, which takes seconds
    from stages.tests.tiny_models import make_tiny_llama

    folder = tmp_path_factory.mktemp("tiny-llama")
    return folder, make_tiny_llama(folder)


def greedy(max_tokens: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **fields)


def seeded(max_tokens: int, seed: int, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.9, top_p=0.95, seed=seed, max_tokens=max_tokens, ignore_eos=True, **fields)


def answers(path: Path, size: int, requests: list[tuple[list[int], SamplingParams]], **settings: Any) -> Answers:
    """Token ids of each request's answers, and the log-probabilities of its prompt, from an engine of `size` ranks."""
    llm = LLM(str(path), tensor_parallel_size=size, **SETTINGS | {"num_gpu_blocks_override": 40} | settings)
    try:
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt, _ in requests], [params for _, params in requests], use_tqdm=False
        )
        if "preemption_mode" in settings:
            assert llm.llm_engine.stats().num_preemptions > 0, "this test is to preempt somebody"
    finally:
        llm.llm_engine.close()
    logprobs = [[max(each.logprob for each in entry.values()) for entry in (o.prompt_logprobs or [])[1:]] for o in outputs]
    return [([one.token_ids for one in o.outputs], values) for o, values in zip(outputs, logprobs, strict=True)]


def check_same(got: Answers, expected: Answers, what: str) -> None:
    for i, ((tokens, logprobs), (expected_tokens, expected_logprobs)) in enumerate(zip(got, expected, strict=True)):
        check_equal(tokens, expected_tokens, f"{what}: tokens of request {i}")
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-3), f"{what}: log-probabilities of prompt {i}"


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let engines of several ranks run them as threads, which wait for each other for two seconds and no longer."""
    single = engine_module.make_executor

    def make(config: Any, *rest: Any) -> Any:
        return single(config, *rest) if config.tensor_parallel_size == 1 else thread_executor(config, *rest)

    monkeypatch.setattr(engine_module, "make_executor", make)


@pytest.mark.parametrize("size", [2, 4])
def test_greedy_answers_are_those_of_transformers(threads: None, model: tuple[Path, Any], size: int) -> None:
    """Two prompts on 2 and on 4 ranks, which are more than there are KV heads: what transformers generates.

    Why: the model that is cut must be the model.
    """
    prompts = [[72, 101, 108, 108, 111], list(range(30, 60))]
    got = answers(model[0], size, [(prompt, greedy(8)) for prompt in prompts])
    for prompt, (tokens, _) in zip(prompts, got, strict=True):
        with torch.inference_mode():
            expected = model[1].generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        check_equal(tokens[0], expected[0, len(prompt) :].tolist(), f"answer to a prompt of {len(prompt)} tokens")


CROWD: list[Callable[[], SamplingParams]] = [
    partial(greedy, 24), partial(seeded, 24, seed=1), partial(seeded, 16, seed=2, n=2), partial(greedy, 20, prompt_logprobs=1),
    partial(seeded, 24, seed=4), partial(greedy, 6),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_crowded_engine_says_the_same(threads: None, model: tuple[Path, Any], mode: str) -> None:
    """Chunked prompts, a common beginning, answers that branch, log-probabilities of a prompt, too few blocks for all: two
    ranks say what one says, greedy or sampled.

    Why: each of these moves blocks or asks for logits at a time of its own. A rank that misses one of them is out of step.
    """
    requests = [([5] * 9 + [(7 * i + j) % 250 for j in range(1 + 5 * i)], make()) for i, make in enumerate(CROWD)]
    settings = {"preemption_mode": mode, "num_gpu_blocks_override": 32}
    expected = answers(model[0], 1, requests, **settings)
    check_same(answers(model[0], 2, requests, **settings), expected, f"two ranks, {mode}")


# Real processes


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no rank wait for another one for longer than a test may take."""
    monkeypatch.setattr(executor_module, "join", partial(join, timeout=10), raising=False)


def test_two_processes_say_what_one_says(processes: None, model: tuple[Path, Any]) -> None:
    """A real second process: greedy and seeded answers, and two that branch, are those of a single rank.

    Why: this is the stage. Only rank 0 samples, so the ranks cannot disagree, and the answer cannot tell how many there were.
    """
    requests = [([5] * 9 + [i] * (1 + 4 * i), make()) for i, make in enumerate(CROWD[:4])]
    check_same(answers(model[0], 2, requests), answers(model[0], 1, requests), "two processes")


def test_a_killed_rank_is_named(processes: None, model: tuple[Path, Any]) -> None:
    """Rank 1 is killed between two steps: the next step raises a WorkerDiedError that names it.

    Why: an operator reads "rank 1 … killed by SIGKILL" and looks for who ran out of memory.
    """
    llm = LLM(str(model[0]), tensor_parallel_size=2, **SETTINGS)
    engine = llm.llm_engine
    try:
        engine.add_request("a", {"prompt_token_ids": [1, 2]}, greedy(20))
        engine.step()
        engine.executor._others[0]._process.kill()
        with pytest.raises(WorkerDiedError, match="rank 1 has ended, killed by SIGKILL"):
            engine.step()
    finally:
        engine.close()


@pytest.mark.parametrize("number", range(4))
def test_any_steps_can_be_read(number: int) -> None:
    """Six steps of random lengths and numbers, one after the other on one board.

    Why: a board is written thousands of times a minute, and no two steps are alike.
    """
    dice, (writer, reader) = random.Random(380 + number), two_boards()
    for _ in range(6):
        step = step_of(dice.randrange(1, 5000), dice.randrange(10_000))
        check_step(reader.read(writer.write(step)), step, f"a step of {len(step.input_ids)}")


@pytest.mark.parametrize("number", range(3))
def test_any_decision_is_told(number: int) -> None:
    """Random sequences with random chunks, and random blocks that are moved: tokens, moves, and the rows of those whose chunk
    is their last.

    Why: what the others are told of a step is all that they know of it, whatever the step is.
    """
    dice = random.Random(383 + number)
    for _ in range(4):
        moves = {
            name: [(dice.randrange(99), dice.randrange(99)) for _ in range(dice.randrange(4))]
            for name in ("swap_out", "swap_in", "copies")
        }
        counts, tokens, rows = {}, [], []
        for seq_id in range(dice.randrange(1, 5)):
            computed, left = dice.randrange(6), dice.randrange(1, 8)
            count, seq = dice.randrange(1, left + 1), sequence(seq_id, computed + left, computed)
            counts[seq] = count
            tokens += seq.tokens[computed : computed + count]
            rows += [len(tokens) - 1] * (count == left)
        step = step_arrays(flat(counts, **moves))
        check_equal(step.input_ids, tokens, "input_ids")
        for name, pairs in moves.items():
            check_equal(getattr(step, name).tolist(), [list(pair) for pair in pairs], name)
        check_equal(step.logit_rows, rows, "logit_rows")
        check_equal(step.logit_counts, [len(rows)] if rows else [], "logit_counts")
