"""Throughput offline: all requests are there at once, how many tokens a second come out? Beside it, the same requests
through transformers in static batches, which is what most people would write first.

Both have the same weights in the same precision, as many threads, the same token ids, greedy decoding without an end, and a
short uncounted run first. Only tokens that a request asked for count. A static batch generates up to its longest output, and
what it computes for its shorter ones is wasted; prompts are padded to its longest, and the next batch waits until all of it
is done. That difference is what continuous batching is about
(Yu et al., "Orca", OSDI 2022, §3.1).
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..batching.sampling_params import SamplingParams
from ..core.engine import LLM
from ..core.output import RequestOutput
from ..models.config.aliases import ALIASES
from ..models.config.entries import read_json
from ..models.loader import ModelSource
from .datasets import BenchRequest, check_context
from .report import tracked

WARM_UP_REQUESTS, WARM_UP_TOKENS = 32, 4


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run of one backend over a whole dataset.

    Attributes:
        seconds: wall time from the first submission to the last token. num_output_tokens: tokens that the requests asked for.
        num_computed_tokens: tokens generated to get them; more in a static batch.
        details: what only this backend can tell (the engine: latencies in milliseconds, steps, cache hits).
    """

    backend: str
    seconds: float
    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    details: dict[str, float]

    @property
    def output_tokens_per_second(self) -> float:
        return self.num_output_tokens / self.seconds

    @property
    def total_tokens_per_second(self) -> float:
        """Prompt and output tokens."""
        return (self.num_prompt_tokens + self.num_output_tokens) / self.seconds


def run_engine(llm: LLM, requests: Many[BenchRequest], show_progress: bool = False) -> Measurement:
    """Generate all requests with the engine, timed by `time.perf_counter`, and count what came out.

    The prefix cache, if there is one, is emptied first: a second run over the same prompts would otherwise find all of them.
    Requests are greedy and run to their length; all other parameters are the defaults, as users have them.

    Args:
        show_progress: whether the engine draws a bar.

    Returns:
        The backend is "engine". Its `details` are `_latencies`, and of this run alone "num_steps", "num_preemptions" and
        "prefix_cache_hit_tokens" (in `stats`: `prefix_cache_hits`).

    Raises:
        ValueError: a request does not fit the context (`check_context`); nothing was generated.
        RuntimeError: a request came back with another number of tokens than it asked for (`_check_counts`).
    """
    # Hint: Write down what happens before the clock, while it runs, and after it. Little belongs in the middle.
    raise NotImplementedError("Stage 6 · Task 6.3: run_engine, see stages/stage6_benchmark/GUIDE.md#task-6-3")


def _latencies(outputs: Many[RequestOutput]) -> dict[str, float]:
    """`median_waits` of what the engine itself has noted."""
    waits = []
    for output in outputs:
        times, count = output.metrics, len(output.outputs[0].token_ids)
        later = (times.last_token_time - times.first_token_time) / (count - 1) if count > 1 else None
        waits.append((times.first_token_time - times.arrival_time, later))
    return median_waits(waits)


def median_waits(waits: Iterable[tuple[float, float | None]]) -> dict[str, float]:
    """Medians over the requests, in milliseconds: "ttft_ms_median" and, if any request has one, "tpot_ms_median"; of (seconds
    to the first token, seconds per token after it or None)."""
    first, every = zip(*waits, strict=True)
    later = [wait for wait in every if wait is not None]
    return {f"{name}_ms_median": 1e3 * statistics.median(found) for name, found in (("ttft", first), ("tpot", later)) if found}


def load_hf(source: ModelSource, load_format: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The same model in transformers' own code: with the same weights, or with random ones of its own, which take as long."""
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it writes where results are read
    if load_format == "dummy":
        hf_config = ALIASES[source.name].hf_config if source.path is None else read_json(source.path / "config.json")
        config = getattr(transformers, hf_config["architectures"][0]).config_class(**hf_config)
        with device:
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype).to(device)
    # Every output has the length that its request asks for, so nothing may end one early.
    model.generation_config.eos_token_id = None
    return model.eval()


@torch.inference_mode()
def run_hf(model: nn.Module, requests: Many[BenchRequest], batch_size: int = 32, show_progress: bool = False) -> Measurement:
    """Generate all requests with transformers in static batches, in their order of arrival.

    Prompts are padded on the left to the longest of their batch; a batch generates up to its longest output. Token ids
    are not turned into text here, while the engine's are: the little that this is worth goes to transformers. Raises ValueError
    if a request does not fit the context or `batch_size` is below 1, RuntimeError if a batch came back with another number of
    tokens than its longest request asked for.
    """
    check_context(requests, model.config.max_position_embeddings)
    if batch_size < 1:
        raise ValueError(f"the batch size must be at least 1, got {batch_size}")
    batches = [requests[i : i + batch_size] for i in range(0, len(requests), batch_size)]
    computed, counts = 0, []
    start = time.perf_counter()
    for batch in tracked(batches, "transformers") if show_progress else batches:
        input_ids, mask = (each.to(model.device) for each in left_pad([request.prompt_token_ids for request in batch]))
        longest = max(request.output_len for request in batch)
        tokens = model.generate(input_ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        new_tokens = tokens[:, input_ids.shape[1] :]
        computed += new_tokens.numel()
        counts += [len(row[: request.output_len]) for row, request in zip(new_tokens.tolist(), batch, strict=True)]
    seconds = time.perf_counter() - start
    _check_counts(requests, counts)
    details = {"num_batches": len(batches), "useful_share": sum(counts) / computed}
    return measurement("hf", seconds, requests, computed, details)


def left_pad(prompts: Many[list[int]]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, both [B, longest prompt]; padded left, so that new tokens follow the prompt."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    input_ids, mask = (pad_sequence(each, batch_first=True, padding_side="left") for each in (rows, masks))
    return input_ids, mask


def warm_up_requests(requests: Many[BenchRequest]) -> list[BenchRequest]:
    """The first `WARM_UP_REQUESTS` with at most `WARM_UP_TOKENS` to generate: they go through the same code and memory as the
    real ones. Each begins with another token, which is no larger (or is 1), or a prefix cache would know the real prompts
    afterwards; none has a text, for the same reason."""
    raise NotImplementedError("Stage 6 · Task 6.3: warm_up_requests, see stages/stage6_benchmark/GUIDE.md#task-6-3")


def warmed(run: Callable[[Many[BenchRequest]], Measurement], requests: Many[BenchRequest]) -> Callable[[], Measurement]:
    """Warm a system up with other, short requests, which do not count; returns what runs the real ones."""
    raise NotImplementedError("Stage 6 · Task 6.3: warmed, see stages/stage6_benchmark/GUIDE.md#task-6-3")


def peak_memory_bytes() -> int:
    """The most memory that this process has held since its start: of a card if it used one, else of the machine."""
    if torch.cuda.is_available() and (held := torch.cuda.max_memory_reserved()):
        return held
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux KiB


def _check_counts(requests: Many[BenchRequest], counts: list[int]) -> None:
    for number, (request, count) in enumerate(zip(requests, counts, strict=True)):
        if count != request.output_len:
            raise RuntimeError(f"request {number} asked for {request.output_len} tokens and got {count}")


def measurement(
    backend: str, seconds: float, requests: Many[BenchRequest], computed: int, details: dict[str, float]
) -> Measurement:
    """A run that did what the requests asked for, in so many computed tokens."""
    prompt = sum(len(request.prompt_token_ids) for request in requests)
    useful = sum(request.output_len for request in requests)
    return Measurement(backend, seconds, len(requests), prompt, useful, computed, details)
