"""Task 2.7: a whole step of the engine, and what callers see of it."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.batching.sampling_params import RequestOutputKind, SamplingParams
from stages.batching.scheduler_output import SchedulerOutput
from stages.batching.sequence import Sequence
from stages.core.config import EngineConfig
from stages.core.engine import LLMEngine
from stages.core.output import RequestOutput
from stages.core.worker import StepResult
from stages.course.fixtures.checks import check_equal
from stages.course.fixtures.stand_ins import Recorder, Stream, bare_engine, letters, request_output
from stages.tests.tiny_models import EOS, make_tiny_llama

CUMULATIVE, DELTA, FINAL_ONLY = RequestOutputKind.CUMULATIVE, RequestOutputKind.DELTA, RequestOutputKind.FINAL_ONLY
PROMPTS = [[72, 101, 108, 108, 111], list(range(30, 60)), [7, 7, 9, 7, 7, 9, 7, 7]]
SETTINGS: dict[str, Any] = {
    "dtype": "float32", "device": "cpu", "max_model_len": 128, "block_size": 4, "num_gpu_blocks_override": 96,
    "max_num_seqs": 8, "max_num_batched_tokens": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random LLaMA of three layers: its folder, and the model in transformers."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return folder, make_tiny_llama(folder)


@pytest.fixture
def engine(model: tuple[Path, Any]) -> LLMEngine:
    return LLMEngine(EngineConfig(model=str(model[0]), **SETTINGS))


def greedy(max_tokens: int = 10, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, **{"ignore_eos": True, **fields})


def add(engine: LLMEngine, name: str, prompt: list[int], params: SamplingParams) -> None:
    engine.add_request(name, {"prompt_token_ids": prompt}, params)


def run(engine: LLMEngine) -> list[RequestOutput]:
    """Step until nothing is left, which must leave nothing behind."""
    outputs = []
    for _ in range(500):
        if not engine.has_unfinished_requests():
            check_equal(engine.step(), [], "outputs of a step with nothing to do")
            check_equal(engine.block_manager.usage, 0.0, "share of the blocks in use at the end")
            check_equal(engine.outputs.num_requests, 0, "requests that still wait for their last output")
            return outputs
        outputs += engine.step()
    raise AssertionError("after 500 steps there are still unfinished requests")


def of(outputs: list[RequestOutput], name: str) -> list[RequestOutput]:
    return [output for output in outputs if output.request_id == name]


def answer(engine: LLMEngine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    """The last output of a request that runs alone."""
    add(engine, "alone", prompt, params)
    return run(engine)[-1]


def test_step_is_schedule_execute_update_emit() -> None:
    """A step schedules, drafts, builds the batch, executes it, hands over logprobs, updates the scheduler, emits, and tells the
    observers, in this order, each with its arguments.

    Why: each word needs what the one before it made. Emitting before updating would show callers a step too late who has
    finished, and metrics with another clock than the outputs' disagree with what clients see.
    """
    seq = Sequence(3, [1, 2], SamplingParams())
    decision = SchedulerOutput(scheduled={seq: 2}, sampled=[seq])
    parts = Recorder(decision, StepResult([[9]], {seq: []}, [("a", 1, [])]), [request_output("a", False)])
    check_equal(bare_engine(parts).step(), parts.given, "what step returns: what emit gave")
    in_order = ["schedule", "draft", "build", "execute", "logprobs", "update", "emit", "on_step"]
    check_equal(parts.calls, in_order, "calls of one step")


def test_a_step_that_samples_nobody_is_a_step() -> None:
    """A step of chunks only, in which nobody gets a token, is executed, updated, emitted and told like any other.

    Why: long prompts are computed in such steps. Left out, they are missing in the counters and in every metric.
    """
    seq = Sequence(3, [1, 2, 3, 4], SamplingParams())
    parts = Recorder(SchedulerOutput(scheduled={seq: 2}), StepResult([]), [])
    check_equal(bare_engine(parts).step(), [], "what step returns")
    in_order = ["schedule", "draft", "build", "execute", "logprobs", "update", "emit", "on_step"]
    check_equal(parts.calls, in_order, "calls of one step")


def test_every_observer_is_told() -> None:
    """Of three observers each is told of the step, once, with the same time.

    Why: metrics and the live page both listen. One of them would stand still.
    """
    seq = Sequence(3, [1, 2], SamplingParams())
    parts = Recorder(SchedulerOutput(scheduled={seq: 2}, sampled=[seq]), StepResult([[9]]), [request_output("a", False)])
    engine = bare_engine(parts)
    engine.observers = [parts, parts, parts]
    engine.step()
    check_equal(parts.calls.count("on_step"), 3, "calls of on_step")


def test_step_without_work_is_empty() -> None:
    """When the scheduler decides nothing, a step returns [] and touches neither batch nor model, nor tells anyone.

    Why: a server may step at any time, for instance when all that wait are short of memory. An empty batch would crash the
    model.
    """
    parts = Recorder(SchedulerOutput(), StepResult([]), [])
    engine = bare_engine(parts)
    check_equal(engine.step(), [], "outputs")
    check_equal(parts.calls, ["schedule"], "calls")


def test_answers_are_those_of_transformers(engine: LLMEngine, model: tuple[Path, Any]) -> None:
    """Three prompts run together, in chunks of at most 16 tokens, and each gets what transformers generates for it alone.

    Why: scheduling decides when a token is computed and never which. This is the test that the whole stage stands on.
    """
    for i, prompt in enumerate(PROMPTS):
        add(engine, str(i), prompt, greedy(12))
    outputs = run(engine)
    for i, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            ids = torch.tensor([prompt])
            whole = model[1].generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, eos_token_id=None
            )
        check_equal(of(outputs, str(i))[-1].outputs[0].token_ids, whole[0, len(prompt) :].tolist(), f"answer to prompt {i}")


def test_cumulative_outputs_grow_by_a_token_a_step(engine: LLMEngine) -> None:
    """CUMULATIVE: an output a token, each with all tokens so far and a text that begins with the one before.

    Why: whoever draws the answer anew at each output must never see it shrink.
    """
    add(engine, "a", PROMPTS[0], greedy(9))
    outputs = run(engine)
    check_equal([len(output.outputs[0].token_ids) for output in outputs], list(range(1, 10)), "tokens in each output")
    check_equal([output.finished for output in outputs], [False] * 8 + [True], "finished")
    texts = [output.outputs[0].text for output in outputs]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts)), f"a text does not go on: {texts}"


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long", "repeating"])
def test_deltas_add_up_to_the_whole(engine: LLMEngine, prompt: list[int]) -> None:
    """DELTA: texts and tokens of all outputs, one behind the other, are the text and tokens of the CUMULATIVE request.

    Why: a stream of deltas is what chat clients read. A text that is given twice or left out is seen by everyone.
    """
    whole = answer(engine, prompt, greedy(14)).outputs[0]
    add(engine, "a", prompt, greedy(14, output_kind=DELTA))
    outputs = run(engine)
    check_equal([len(output.outputs[0].token_ids) for output in outputs], [1] * 14, "tokens in each output")
    check_equal("".join(output.outputs[0].text for output in outputs), whole.text, "all texts together")
    check_equal([token for output in outputs for token in output.outputs[0].token_ids], whole.token_ids, "all tokens together")


def test_final_only_is_one_output(engine: LLMEngine) -> None:
    """FINAL_ONLY: one output, at the end, equal to the last CUMULATIVE one; a streaming request beside it is not held up.

    Why: offline use wants answers and not steps, and text that nobody reads need not be made at each step.
    """
    whole = answer(engine, PROMPTS[0], greedy(8)).outputs
    add(engine, "final", PROMPTS[0], greedy(8, output_kind=FINAL_ONLY))
    add(engine, "stream", PROMPTS[2], greedy(8))
    outputs = run(engine)
    check_equal(len(of(outputs, "final")), 1, "outputs with FINAL_ONLY")
    check_equal(of(outputs, "final")[0].outputs, whole, "the final output")
    check_equal(len(of(outputs, "stream")), 8, "outputs of the request beside it")


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (greedy(3), ("length", None, 3)),
        (greedy(5, ignore_eos=False, logit_bias={EOS: 100.0}), ("stop", None, 1)),
        (greedy(5, stop_token_ids=[42], logit_bias={42: 100.0}), ("stop", 42, 1)),
        (greedy(5, stop=["***"], logit_bias={9: 100.0}), ("stop", "***", 3)),
    ],
    ids=["length", "end of sequence", "stop token", "stop string"],
)
@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL_ONLY])
def test_reasons_to_finish(
    engine: LLMEngine, kind: RequestOutputKind, params: SamplingParams, expected: tuple[str, Any, int]
) -> None:
    """A request ends by length, end of sequence, stop token and stop string; its last output says which, whatever its kind.

    Why: clients decide by the reason whether the answer is whole. (The logit_bias makes the model say a token again and again.)
    """
    params.output_kind = kind
    add(engine, "a", PROMPTS[0], params)
    outputs = run(engine)
    last = outputs[-1].outputs[0]
    check_equal((last.finish_reason, last.stop_reason), expected[:2], "finish_reason and stop_reason")
    check_equal([output.finished for output in outputs], [False] * (len(outputs) - 1) + [True], "finished")
    tokens = sum(len(output.outputs[0].token_ids) for output in outputs) if kind is DELTA else len(last.token_ids)
    check_equal(tokens, expected[2], "tokens generated")


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA])
def test_stop_string_never_shows(engine: LLMEngine, kind: RequestOutputKind) -> None:
    """A request that ends at the string "***" never shows a star, not even the first two before the third is known.

    Why: what has been streamed cannot be taken back. A stop string that leaks ends up in somebody's database.
    """
    add(engine, "a", PROMPTS[0], greedy(8, stop=["***"], logit_bias={9: 100.0}, output_kind=kind))
    outputs = run(engine)
    check_equal("".join(output.outputs[0].text for output in outputs), "", "all texts")
    check_equal(len(outputs), 3, "outputs")


def test_nothing_is_left_and_the_id_is_free_again(engine: LLMEngine) -> None:
    """After its last output a request's blocks are free, nobody knows it, and the same id can be used for another one.

    Why: a server runs for months. What each request leaves behind adds up.
    """
    for _ in range(2):
        add(engine, "same id", PROMPTS[1], greedy(4))
        check_equal(run(engine)[-1].finished, True, "whether the last output says finished")
    stats = engine.stats()
    check_equal((stats.num_running, stats.num_waiting, stats.kv_cache_usage), (0, 0, 0.0), "running, waiting, KV cache usage")
    check_equal(stats.num_generation_tokens, 8, "num_generation_tokens")
    check_equal(stats.num_prompt_tokens, 60, "num_prompt_tokens")
    check_equal(stats.num_steps, 5 + 4, "num_steps: two chunks and three decodes, then one chunk, as the rest is cached")


def test_both_answers_of_a_request_come_in_each_output(engine: LLMEngine) -> None:
    """n = 2, CUMULATIVE: outputs hold both sequences by index, and `finished` is said once, when both have finished.

    Why: a request is finished when all of its answers are. Whoever says so at the first cuts off the second.
    """
    add(engine, "a", PROMPTS[0], greedy(6, n=2))
    outputs = run(engine)
    check_equal(
        [[one.index for one in output.outputs] for output in outputs], [[0, 1]] * len(outputs), "indices in each output"
    )
    check_equal([output.finished for output in outputs].count(True), 1, "outputs that say finished")
    check_equal(outputs[-1].finished, True, "whether the last output says finished")
    tokens = [one.token_ids for one in outputs[-1].outputs]
    check_equal(tokens[1], tokens[0], "the second answer: the same, as the model is greedy")
    check_equal(len(tokens[0]), 6, "tokens of an answer")


def test_one_output_a_request_and_step(engine: LLMEngine) -> None:
    """n = 3: a step that advances all three sequences gives one output for the request, not three.

    Why: three outputs with the same content cost three times as much to send, and the client cannot tell them apart.
    """
    add(engine, "a", PROMPTS[0], greedy(6, n=3))
    for _ in range(30):
        if not engine.has_unfinished_requests():
            return
        assert len(engine.step()) <= 1, "a step gave the one request several outputs"
    raise AssertionError("the request did not finish in 30 steps")


def test_abort_ends_one_and_leaves_the_other(engine: LLMEngine) -> None:
    """A request is aborted after four steps: it never comes up again, its blocks are free, and the other one's answer is whole.

    Why: people close tabs all the time. It must cost their neighbours nothing.
    """
    expected = answer(engine, PROMPTS[2], greedy(10)).outputs[0].token_ids
    add(engine, "gone", PROMPTS[0], greedy(60))
    add(engine, "stays", PROMPTS[2], greedy(10))
    early = [output for _ in range(4) for output in engine.step()]
    check_equal(bool(of(early, "gone")), True, "whether the aborted request had outputs before")
    check_equal(engine.abort_request("gone").outputs[0].finish_reason, "abort", "finish_reason of the aborted request")
    late = run(engine)
    check_equal(of(late, "gone"), [], "outputs of the aborted request after the abort")
    check_equal(of(late, "stays")[-1].outputs[0].token_ids, expected, "answer of the other request")


def test_logprobs_reach_the_request_that_asked(engine: LLMEngine, model: tuple[Path, Any]) -> None:
    """Of three requests the second asks for logprobs: it gets those of its own tokens, as transformers gives them; others none.

    Why: the rows of a step belong to different users. Only the row number says whose is whose.
    """
    add(engine, "0", PROMPTS[0], greedy(5))
    add(engine, "1", PROMPTS[2], greedy(5, logprobs=0))
    add(engine, "2", PROMPTS[1], greedy(5))
    outputs = run(engine)
    for name in ("0", "2"):
        check_equal(of(outputs, name)[-1].outputs[0].logprobs, None, f"logprobs of request {name}")
    last = of(outputs, "1")[-1].outputs[0]
    with torch.inference_mode():
        table = model[1](torch.tensor([PROMPTS[2] + last.token_ids])).logits[0].log_softmax(-1)
    expected = [float(table[len(PROMPTS[2]) - 1 + i, token]) for i, token in enumerate(last.token_ids)]
    ours = [entry[token].logprob for entry, token in zip(last.logprobs, last.token_ids, strict=True)]
    assert ours == pytest.approx(expected, abs=1e-4), f"logprobs\n  expected {expected}\n  yours    {ours}"
    assert last.cumulative_logprob == pytest.approx(sum(expected), abs=1e-3), "cumulative_logprob is the sum"


def test_prompt_logprobs_are_complete(engine: LLMEngine, model: tuple[Path, Any]) -> None:
    """A prompt of 30 tokens computed in chunks of 16 gets the logprob of each of its tokens but the first.

    Why: they come with the chunks, long before the first output, and are what evaluations of models are made of.
    """
    output = answer(engine, PROMPTS[1], greedy(2, prompt_logprobs=0))
    with torch.inference_mode():
        table = model[1](torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)
    expected = [float(table[i, token]) for i, token in enumerate(PROMPTS[1][1:])]
    ours = [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], PROMPTS[1][1:], strict=True)]
    assert ours == pytest.approx(expected, abs=1e-4), f"prompt logprobs\n  expected {expected}\n  yours    {ours}"


def test_times_of_a_request() -> None:
    """With tokens at 3.0, 4.0 and 5.0: the first token's time stays 3.0, the last one's follows, finished is 5.0.

    Why: time to first token and time per output token are computed from these, and they are what users feel.
    """
    stream, (a, b, c) = Stream(), letters("abc")
    metrics = stream.emit({0: a}, now=3.0)[0].metrics
    check_equal((metrics.arrival_time, metrics.first_scheduled_time), (1.0, 2.0), "arrival_time and first_scheduled_time")
    check_equal(
        (metrics.first_token_time, metrics.last_token_time, metrics.finished_time), (3.0, 3.0, None), "times, first token"
    )
    metrics = stream.emit({0: b}, now=4.0)[0].metrics
    check_equal(
        (metrics.first_token_time, metrics.last_token_time, metrics.finished_time), (3.0, 4.0, None), "times, second token"
    )
    metrics = stream.emit({0: c}, ends=(0,), now=5.0)[0].metrics
    check_equal(
        (metrics.first_token_time, metrics.last_token_time, metrics.finished_time), (3.0, 5.0, 5.0), "times, last token"
    )


def test_a_prompt_counts_with_its_first_token() -> None:
    """A prompt's tokens are counted when its first token comes, once, and not when the request was added.

    Why: who leaves the queue unserved has used nothing, and prompt tokens a second is what tells two servers apart.
    """
    stream, (a, b) = Stream(), letters("ab")
    check_equal(stream.processor.num_prompt_tokens, 0, "prompt tokens before the first token")
    for token in (a, b):
        stream.emit({0: token})
        check_equal(stream.processor.num_prompt_tokens, stream.sequences[0].num_prompt_tokens, "prompt tokens")


def test_a_prompt_of_several_answers_counts_once() -> None:
    """n = 3: the prompt's tokens are counted with the first token of the request, whichever sequence has it, and never again.

    Why: the prompt was computed once. Three times as much would be read as three times the speed.
    """
    stream, (a,) = Stream(n=3), letters("a")
    for sequences in ({1: a}, {0: a, 1: a, 2: a}):
        stream.emit(sequences)
        check_equal(stream.processor.num_prompt_tokens, stream.sequences[0].num_prompt_tokens, "prompt tokens")


def test_what_nobody_reads_waits_for_the_end() -> None:
    """FINAL_ONLY without stop strings: `_read` is asked once for each sequence, in the step in which it ends.

    Why: text that is made token by token takes ten times as long, in the one thread that keeps the model busy.
    """
    stream, (a, b) = Stream(n=2, output_kind=FINAL_ONLY), letters("ab")
    read, asked = stream.processor._read, []

    def note(state: Any, ended: bool, now: float) -> None:
        asked.append((state.seq.index, ended, now))
        read(state, ended, now)

    stream.processor._read = note
    stream.emit({0: a, 1: a}, now=3.0)
    stream.emit({0: b, 1: b}, ends=(1,), now=4.0)
    stream.emit({0: b}, ends=(0,), now=5.0)
    check_equal(asked, [(1, True, 4.0), (0, True, 5.0)], "calls of _read: index of the sequence, whether it ended, time")


def test_delta_holds_those_that_advanced() -> None:
    """n = 3, DELTA: an output holds just the sequences that got a token in this step, with just that token.

    Why: the answers of a request need not be in step, as each may be preempted by itself. What has no news says nothing.
    """
    stream, (a, b) = Stream(n=3, output_kind=DELTA), letters("ab")
    (output,) = stream.emit({2: a, 0: b})
    check_equal(
        sorted((one.index, one.text) for one in output.outputs), [(0, "b"), (2, "a")], "sequences and texts, first step"
    )
    (output,) = stream.emit({1: a})
    check_equal([(one.index, one.text, one.token_ids) for one in output.outputs], [(1, "a", [a])], "sequences, second step")


def test_cumulative_holds_all_sequences() -> None:
    """n = 2, CUMULATIVE: both sequences stand in the output in order, also when only the second advanced.

    Why: such an output is the state of the request, and a state has no holes.
    """
    stream, (a,) = Stream(n=2), letters("a")
    (output,) = stream.emit({1: a})
    check_equal([(one.index, one.text) for one in output.outputs], [(0, ""), (1, "a")], "sequences and texts")
    check_equal(output.metrics.first_scheduled_time, 2.0, "first_scheduled_time, that of the request's first sequence")


@pytest.mark.parametrize("kind", [CUMULATIVE, DELTA, FINAL_ONLY])
def test_request_finishes_with_its_last_sequence(kind: RequestOutputKind) -> None:
    """n = 2, the second ends first: only the output of the step in which the first ends says finished, and FINAL_ONLY comes
    then.

    Why: the engine forgets a request that says finished; the other answer would go on for nobody.
    """
    stream, (a, b) = Stream(n=2, output_kind=kind), letters("ab")
    outputs = [stream.emit({0: a, 1: a}), stream.emit({0: a, 1: b}, ends=(1,)), stream.emit({0: b}, ends=(0,))]
    finished = [[output.finished for output in step] for step in outputs]
    check_equal(finished, [[], [], [True]] if kind is FINAL_ONLY else [[False], [False], [True]], "finished, by step")
    check_equal(stream.processor.num_requests, 0, "requests that still wait for their last output")
    texts = [one.text for one in outputs[-1][0].outputs]
    check_equal(texts, ["b"] if kind is DELTA else ["aab", "ab"], "texts of the last output")


def test_two_that_end_in_one_step_give_one_finished_output() -> None:
    """n = 2, both end in the same step: one output with both, and it says finished.

    Why: whether a request has finished is known only when all its sequences of this step are read.
    """
    for kind in (CUMULATIVE, DELTA, FINAL_ONLY):
        stream, (a,) = Stream(n=2, output_kind=kind), letters("a")
        (output,) = stream.emit({0: a, 1: a}, ends=(0, 1))
        check_equal((output.finished, [one.text for one in output.outputs]), (True, ["a", "a"]), f"the output with {kind.name}")


def test_final_only_with_a_stop_string_is_read_on_the_way() -> None:
    """FINAL_ONLY with a stop string: the sequence is ended in the step that completes the string, and the one output comes
    then.

    Why: a stop string must end the work, not just the text; otherwise the model goes on until max_tokens for nothing.
    """
    stream, (a, b, c) = Stream(output_kind=FINAL_ONLY, stop=["bc"]), letters("abc")
    check_equal(stream.emit({0: a}) + stream.emit({0: b}), [], "outputs before the string is complete")
    (output,) = stream.emit({0: c})
    check_equal((output.finished, output.outputs[0].text, output.outputs[0].stop_reason), (True, "a", "bc"), "the output")


def test_requests_of_one_step_each_get_their_own_output() -> None:
    """Three requests advance in one step, one of them by two sequences: an output for each, with its own text.

    Why: a step is everybody's, an output is one caller's.
    """
    stream, (a, b, c, d) = Stream(), letters("abcd")
    stream.add("s", n=2)
    stream.add("t", output_kind=DELTA)
    outputs = {output.request_id: output for output in stream.emit({3: d, 0: a, 2: c, 1: b})}
    texts = {name: [one.text for one in output.outputs] for name, output in outputs.items()}
    check_equal(texts, {"r": ["a"], "s": ["b", "c"], "t": ["d"]}, "texts by request")


def test_logprobs_are_those_of_the_sequence() -> None:
    """Sequences 0 and 2 want logprobs, 1 does not, and each output shows the entry of its own sequence.

    Why: an entry that goes to the neighbour names a token that the neighbour never said.
    """
    stream, (a, b, c) = Stream(logprobs=0), letters("abc")
    stream.add("s")
    stream.add("t", logprobs=0)
    rows = [SimpleNamespace(token_ids=[token], logprobs=[value], ranks=[1]) for token, value in ((a, -0.5), (c, -2.0))]
    step = stream.emit({0: a, 1: b, 2: c}, logprobs={0: rows[0], 2: rows[1]})
    outputs = {output.request_id: output.outputs[0] for output in step}
    check_equal(outputs["r"].logprobs[0][a].logprob, -0.5, "logprob of sequence 0")
    check_equal(outputs["s"].logprobs, None, "logprobs of sequence 1")
    check_equal(outputs["t"].logprobs[0][c].logprob, -2.0, "logprob of sequence 2")
    check_equal((outputs["r"].cumulative_logprob, outputs["t"].cumulative_logprob), (-0.5, -2.0), "cumulative_logprob")


def test_logprobs_are_collected_while_nobody_reads() -> None:
    """FINAL_ONLY with logprobs: the one output has an entry for every token, also for those of the steps without an output.

    Why: the text can wait for the end, as it can be made from the tokens. The logprobs are gone after their step.
    """
    stream, tokens = Stream(logprobs=0, output_kind=FINAL_ONLY), letters("abc")
    outputs = []
    for i, token in enumerate(tokens):
        row = SimpleNamespace(token_ids=[token], logprobs=[-1.0 - i], ranks=[1])
        outputs += stream.emit({0: token}, ends=(0,) if i == 2 else (), logprobs={0: row})
    check_equal(len(outputs), 1, "outputs")
    values = [entry[token].logprob for entry, token in zip(outputs[0].outputs[0].logprobs, tokens, strict=True)]
    check_equal(values, [-1.0, -2.0, -3.0], "logprobs")


@pytest.mark.parametrize("number", range(3))
def test_any_steps_tell_each_request_its_own(number: int) -> None:
    """Two requests of random kinds with one to three answers each, whose sequences get random letters in random steps: after
    each, one output for each request with news, with the texts that its kind asks for, and `finished` with its last.

    Why: users are never in step, and neither are the answers of one of them.
    """
    dice = random.Random(271 + number)
    for _ in range(3):
        kinds = {name: dice.choice([CUMULATIVE, DELTA, FINAL_ONLY]) for name in "rs"}
        stream = Stream(n=dice.randrange(1, 4), output_kind=kinds["r"])
        stream.add("s", dice.randrange(1, 4), output_kind=kinds["s"])
        numbers = {name: [i for i, seq in enumerate(stream.sequences) if seq.request_id == name] for name in "rs"}
        left = {i: dice.choices("abcdefgh", k=dice.randrange(1, 6)) for i in range(len(stream.sequences))}
        said = dict.fromkeys(left, "")
        while any(left.values()):
            new = {i: left[i].pop(0) for i in left if left[i] and dice.random() < 0.6}
            said |= {i: said[i] + letter for i, letter in new.items()}
            tokens, ends, got = {i: letters(letter)[0] for i, letter in new.items()}, tuple(i for i in new if not left[i]), {}
            for output in stream.emit(tokens, ends):
                got[output.request_id] = {one.index: one.text for one in output.outputs}, output.finished
            expected = {}
            for name, mine in numbers.items():
                done = not any(left[i] for i in mine)
                if any(i in new for i in mine) and (done or kinds[name] is not FINAL_ONLY):
                    told = new if kinds[name] is DELTA else said
                    expected[name] = {i - mine[0]: told[i] for i in mine if i in told}, done
            check_equal(got, expected, f"texts and ends of the requests with {kinds}")


def test_any_prompts_are_answered_as_by_transformers(engine: LLMEngine, model: tuple[Path, Any]) -> None:
    """Four random prompts of random lengths run together, and each gets what transformers generates for it alone.

    Why: as above, and nobody knows these prompts beforehand.
    """
    dice = random.Random(27)
    prompts = [[dice.randrange(3, 250) for _ in range(dice.randrange(2, 30))] for _ in range(4)]
    for i, prompt in enumerate(prompts):
        add(engine, str(i), prompt, greedy(6 + i))
    outputs = run(engine)
    for i, prompt in enumerate(prompts):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            whole = model[1].generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6 + i, eos_token_id=None
            )
        check_equal(of(outputs, str(i))[-1].outputs[0].token_ids, whole[0, len(prompt) :].tolist(), f"answer to prompt {i}")
