"""What every fuzzed model must do: load and give tokens of its vocabulary, or be refused in one line, in good time."""

from __future__ import annotations

import logging
import os
import random
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from solutions.batching.sampling_params import SamplingParams
from solutions.core.engine import LLM

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip
"""Of the models that are damaged."""
SECONDS = 60
"""For one case, which takes about a tenth of a second on an idle machine."""


def check_loads_or_is_refused(model: Path) -> None:
    """Load a model and generate.

    Raises:
        AssertionError: a message of several lines, a token that is none, or no end.
        Exception: whatever the engine raises but a ValueError.
    """
    with _time_limit():
        try:
            llm = LLM(str(model), dtype="float32", max_model_len=24, num_gpu_blocks_override=8, enable_cpu_kernels=False)
        except ValueError as error:
            _check_line(error)
            return
        engine = llm.llm_engine
        vocab_size = engine.model_config.vocab_size
        assert all(0 <= token < vocab_size for token in engine.model_config.eos_token_ids), engine.model_config.eos_token_ids
        params = SamplingParams(temperature=0, max_tokens=3, min_tokens=2)
        prompts = [{"prompt_token_ids": [0]}, {"prompt_token_ids": [0, 1]}]
        if engine.tokenizer is not None:
            with suppress(ValueError):  # it may know more tokens than the model
                prompts.append({"prompt_token_ids": engine.prepare("text", "ab c", params).prompt_token_ids})
        for output in llm.generate(prompts, params, use_tqdm=False):
            tokens = output.outputs[0].token_ids
            assert len(tokens) >= 2
            assert all(0 <= token < vocab_size for token in (*tokens, *output.prompt_token_ids)), tokens


def _check_line(error: ValueError) -> None:
    text = str(error)
    assert text.strip(), f"{error!r} says nothing"
    assert "\n" not in text.strip(), f"several lines: {text!r}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own remarks on what they read, and with a cache that is thrown away."""
    before, cache = logging.root.manager.disable, os.environ.get("BYOV_CACHE")
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        os.environ["BYOV_CACHE"] = folder
        try:
            yield
        finally:
            logging.disable(before)
            if cache is None:
                del os.environ["BYOV_CACHE"]
            else:
                os.environ["BYOV_CACHE"] = cache


@contextmanager
def _time_limit() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def expire(_: int, __: FrameType | None) -> None:
        raise AssertionError(f"no end after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def damage(content: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Change, insert, repeat or cut a few of the first `within` bytes."""
    changed, within = bytearray(content), min(within or len(content), len(content))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(max(1, min(within, len(changed))))
        kind = rng.randrange(5)
        if kind == 0:
            changed[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            changed[place : place + 8] = rng.choice((0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)).to_bytes(8, "little")
        elif kind == 2:
            del changed[place : place + rng.choice((1, 4, 100))]
        elif kind == 3:
            changed[place:place] = changed[place : place + rng.choice((1, 4, 100))]
        else:
            changed[place] ^= 1 << rng.randrange(8) if place < len(changed) else 0
    return bytes(changed)
