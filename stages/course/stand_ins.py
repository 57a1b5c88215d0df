"""Stand-ins for the tests of task 2.7: an engine whose parts only note who calls them, and outputs without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from stages.batching.sequence import SamplingParams, Sequence, SequenceStatus
from stages.core.engine import LLMEngine
from stages.core.output import OutputProcessor, RequestOutput
from stages.core.scheduler import SchedulerOutput
from stages.core.worker import StepResult
from stages.course.checks import check_equal
from stages.tests.tiny_models import byte_tokenizer


class Recorder:
    """Stands in for the parts of an engine: notes who is called with what, and hands on fixed results."""

    def __init__(self, decision: SchedulerOutput, result: StepResult, outputs: list[RequestOutput]) -> None:
        self.calls: list[str] = []
        self.tables: dict[int, list[int]] = {3: [1]}
        self.usage = 0.25
        self.decision, self.result, self.given, self.flat = decision, result, outputs, object()

    def schedule(self) -> SchedulerOutput:
        self.calls.append("schedule")
        return self.decision

    def build(self, decision: SchedulerOutput, tables: dict[int, list[int]]) -> object:
        assert decision is self.decision, "build takes the decision of this step"
        assert tables is self.tables, "build takes the block manager's tables"
        self.calls.append("build")
        return self.flat

    def execute(self, batch: object) -> StepResult:
        assert batch is self.flat, "execute takes the batch that was built"
        self.calls.append("execute")
        return self.result

    def update(self, decision: SchedulerOutput, token_ids: list[int]) -> None:
        assert decision is self.decision, "update takes the decision of this step"
        check_equal(token_ids, self.result.token_ids, "token ids that update takes")
        self.calls.append("update")

    def set_prompt_logprobs(self, request_id: str, position: int, entries: list[Any]) -> None:
        check_equal((request_id, position, entries), self.result.prompt_logprobs[0], "what set_prompt_logprobs takes")
        self.calls.append("prompt logprobs")

    def emit(self, sequences: list[Sequence], logprobs: Any, now: float) -> list[RequestOutput]:
        assert sequences is self.decision.sampled, "emit takes the sequences that were sampled"
        assert logprobs is self.result.logprobs, "emit takes the logprobs of the result"
        check_equal(type(now), float, "type of the time that emit takes")
        self.calls.append("emit")
        self.emitted_at = now
        return self.given

    def on_step(self, decision: SchedulerOutput, now: float) -> None:
        assert decision is self.decision, "on_step takes the decision of this step"
        check_equal(now, self.emitted_at, "the time that on_step takes: the one that emit took")
        self.calls.append("on_step")


def bare_engine(parts: Recorder, names: tuple[str, ...] = ()) -> LLMEngine:
    """An engine without a model, made of a recorder."""
    engine = LLMEngine.__new__(LLMEngine)
    engine.scheduler = engine.batch = engine.executor = engine.outputs = engine.block_manager = parts
    engine.observers = [parts]
    engine._sequences = {name: [] for name in names}
    engine._counters = {"generation": 0, "steps": 0}
    engine._peak_usage = 0.0
    return engine


def request_output(name: str, finished: bool) -> RequestOutput:
    return RequestOutput(name, None, [1], [], finished)


class Stream:
    """An OutputProcessor fed by hand: `emit` plays a step that gives sequences a token each."""

    def __init__(self, n: int = 1, **params: Any) -> None:
        self.stopped: list[int] = []
        self.processor = OutputProcessor(byte_tokenizer(), self._stop)
        self.sequences: list[Sequence] = []
        self.add("r", n, **params)

    def add(self, name: str, n: int = 1, **params: Any) -> None:
        sampling = SamplingParams(n=n, **{"max_tokens": 20, **params})
        first = len(self.sequences)
        new = [Sequence(first + i, [65, 66], sampling, request_id=name, index=i, arrival_time=1.0) for i in range(n)]
        new[0].first_scheduled_time = 2.0
        request = SimpleNamespace(request_id=name, prompt=None, prompt_token_ids=[65, 66], params=sampling, arrival_time=1.0)
        self.processor.add(request, new)
        self.sequences += new

    def emit(
        self, tokens: dict[int, int], ends: tuple[int, ...] = (), now: float = 3.0, logprobs: Any = None
    ) -> list[RequestOutput]:
        """Sequence → its new token; those in `ends` have reached their length with it."""
        for index, token in tokens.items():
            self.sequences[index].tokens.append(token)
            if index in ends:
                self.sequences[index].status, self.sequences[index].finish_reason = SequenceStatus.FINISHED, "length"
        return self.processor.emit([self.sequences[index] for index in tokens], logprobs, now)

    def _stop(self, seq: Sequence, string: str) -> None:
        seq.status = SequenceStatus.FINISHED
        self.stopped.append(seq.seq_id)


def letters(text: str) -> list[int]:
    return byte_tokenizer().encode(text)
