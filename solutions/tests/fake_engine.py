"""An engine without a model for tests of the server: it has `LLMEngine`'s interface and writes the alphabet.

Each step gives every running sequence one token, a byte: sequence j of a request writes "abc…" from its j-th letter on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from solutions.batching.pooling import PoolingParams
from solutions.batching.sampling_params import RequestOutputKind, SamplingParams
from solutions.batching.scheduler_config import QueueFullError
from solutions.core.config import EngineConfig
from solutions.core.engine import EngineStats
from solutions.core.input import EngineRequest, InputProcessor, Prompt
from solutions.core.lora.registry import AdapterRegistry
from solutions.core.output import CompletionOutput, Logprob, RequestOutput

MAX_MODEL_LEN = 4096
STEP_SECONDS = 0.001


class ByteTokenizer:
    """A token is a byte."""

    chat_template = "a template"

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int], **_: Any) -> str:
        return bytes(token_ids).decode(errors="replace")

    def convert_ids_to_tokens(self, ids: int | list[int]) -> str | list[str]:
        """What byte-level BPE calls printable bytes."""
        return chr(ids) if isinstance(ids, int) else [chr(each) for each in ids]

    def apply_chat_template(self, messages: list[dict[str, str]], tokenize: bool = True, **_: Any) -> list[int] | str:
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>"
        return self.encode(text) if tokenize else text


def letter(index: int, position: int) -> str:
    """What sequence `index` of a request writes at `position`."""
    return chr(ord("a") + (index + position) % 26)


class FakeEngine:
    """See the module.

    Args:
        max_waiting: requests it takes.
        fail_at: the step, counted from 1, that raises.
        gate: each step waits for it, when given; set it to let the engine run.
    """

    def __init__(self, *, max_waiting: int = 1000, fail_at: int | None = None, gate: threading.Event | None = None) -> None:
        self.config = EngineConfig()
        self.executor = SimpleNamespace(worker=SimpleNamespace(model=torch.nn.Module()))
        self.limits = SimpleNamespace(max_model_len=MAX_MODEL_LEN, num_blocks=8, num_host_blocks=0, kv_bytes=0)
        self.adapters = AdapterRegistry(0)
        self.tokenizer = ByteTokenizer()
        self.observers: list[Any] = []
        self.num_waiting_tokens = 0
        self.model_config = model = SimpleNamespace(
            vocab_size=256, eos_token_ids=(), hidden_size=4, is_encoder=False, pooling=None, sampling={}
        )
        self.input = InputProcessor(self.tokenizer, model, MAX_MODEL_LEN, max_num_seqs=256)
        self.max_waiting, self.fail_at, self.gate = max_waiting, fail_at, gate
        self.running: dict[str, tuple[EngineRequest, int]] = {}  # request and its tokens so far
        self.submitted: list[str] = []
        self.aborted: list[str] = []
        self.prepared_in: list[str] = []  # names of threads
        self.num_steps = 0
        self.num_polls = 0
        self.in_step = threading.Event()

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, priority: int = 0) -> EngineRequest:
        self.prepared_in.append(threading.current_thread().name)
        return self.input.prepare(request_id, prompt, params, priority)

    def stats(self) -> EngineStats:
        return EngineStats(len(self.running), 0, 0.0, 0.0, 0, 0, 0, 0, 0, self.num_steps)

    def startup_summary(self) -> list[str]:
        return ["a fake engine"]

    def submit(self, request: EngineRequest) -> None:
        if len(self.running) >= self.max_waiting:
            raise QueueFullError(f"{self.max_waiting} sequences are waiting")
        self.submitted.append(request.request_id)
        self.running[request.request_id] = (request, 0)

    def abort_request(self, request_id: str) -> None:
        if self.running.pop(request_id, None) is not None:
            self.aborted.append(request_id)

    def close(self) -> None:
        """It holds nothing."""

    def check_health(self) -> None:
        """It has no ranks that could end."""

    def has_unfinished_requests(self) -> bool:
        self.num_polls += 1
        return bool(self.running)

    def step(self) -> list[RequestOutput]:
        self.in_step.set()
        if self.gate is not None:
            self.gate.wait()
        time.sleep(STEP_SECONDS)
        self.num_steps += 1
        if self.num_steps == self.fail_at:
            raise RuntimeError("a fault in /secret/path")
        return list(self._advance())

    def _advance(self) -> Iterator[RequestOutput]:
        for name, (request, done) in list(self.running.items()):
            finished = done + 1 == request.params.max_tokens
            self.running[name] = (request, done + 1)
            if finished:
                del self.running[name]
            kind = request.params.output_kind
            if finished or kind is not RequestOutputKind.FINAL_ONLY:
                positions = range(done, done + 1) if kind is RequestOutputKind.DELTA else range(done + 1)
                outputs = [self._completion(request, j, positions, finished) for j in range(request.params.n)]
                given = RequestOutput(name, request.prompt, request.prompt_token_ids, outputs, finished)
                if isinstance(request.params, PoolingParams):
                    given.pooled = np.full(request.params.dimensions or 4, len(request.prompt_token_ids), np.float32)
                yield given

    def _completion(self, request: EngineRequest, index: int, positions: range, finished: bool) -> CompletionOutput:
        text = "".join(letter(index, position) for position in positions)
        logprobs = total = None
        if request.params.logprobs is not None:
            # the sampled letter comes second; the first is one half of a two-byte character
            logprobs = [{195: Logprob(-0.25, 1, "\ufffd"), ord(c): Logprob(-float("inf"), 2, c)} for c in text]
            total = sum(each[ord(c)].logprob for each, c in zip(logprobs, text, strict=True))
        return CompletionOutput(index, text, list(text.encode()), total, logprobs, "length" if finished else None)
