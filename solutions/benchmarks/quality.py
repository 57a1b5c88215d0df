"""What quantization costs in quality: perplexity of one model in several precisions, on text that none of them has seen.

The text is made by the model itself in bfloat16, at temperature 1, from seeds that calibration does not use: nothing needs to be
downloaded, and the model in full precision is as good at it as can be, so every loss shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batching.sequence import SamplingParams
from ..core.engine import LLM
from ..models.loader import resolve_model
from ..quantization.calibration import MATRICES, Calibration
from ..quantization.checkpoint import QuantizedFormat, write_model
from ..quantization.groups import GroupQuantized, quantize_groups
from ..quantization.layerwise import split_pieces

TEXT_SEED = 900_000_007
"""Far from the seeds of `calibration_tokens`."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One precision.

    Attributes:
        name: such as "GPTQ, groups of 64". perplexity: of all tokens but each text's first.
        weight_bytes: of the whole model as loaded.
    """

    name: str
    perplexity: float
    weight_bytes: int


def make_text(model: str, num_samples: int, length: int) -> list[list[int]]:
    """Token ids of `num_samples` texts of `length` tokens."""
    llm = LLM(model, max_model_len=length + 1, enable_prefix_caching=False)
    first = llm.llm_engine.model_config.bos_token_id or 0
    params = [
        SamplingParams(seed=TEXT_SEED + i, max_tokens=length - 1, ignore_eos=True, detokenize=False) for i in range(num_samples)
    ]
    outputs = llm.generate([{"prompt_token_ids": [first]}] * num_samples, params, use_tqdm=False)
    return [[first, *output.outputs[0].token_ids] for output in outputs]


def perplexity(llm: LLM, texts: list[list[int]]) -> float:
    """exp of the mean negative log-probability of each token after those before it."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": tokens} for tokens in texts], params, use_tqdm=False)
    values = [
        entry[token].logprob
        for output in outputs
        for token, entry in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    ]
    return math.exp(-sum(values) / len(values))


def measure(settings: dict[str, dict[str, Any]], texts: list[list[int]]) -> Iterator[Quality]:
    """The perplexity of each precision: name → arguments of `LLM`."""
    length = max(map(len, texts)) + 1
    for name, arguments in settings.items():
        llm = LLM(**arguments, max_model_len=length, enable_prefix_caching=False)
        yield Quality(name, perplexity(llm, texts), llm.llm_engine.executor.weight_bytes)


def write_rounded(model: str, folder: Path, group_size: int) -> None:
    """Write a model rounded to nearest, in GPTQ's layout: what the algorithms are compared with."""
    source = resolve_model(model)
    layers: dict[str, GroupQuantized] = {}
    for index, layer in enumerate(Calibration.load(source).model.layers):
        for name in MATRICES:
            matrix = layer.get_submodule(name)
            quantized = quantize_groups(matrix.weight.data, 4, group_size)
            layers |= split_pieces(matrix, f"model.layers.{index}.{name}", quantized)
    form = QuantizedFormat("gptq", 4, group_size, zeros_less_one=True)
    write_model(folder, source.path, layers, form, symmetric=False)
