"""What quantization costs in quality: perplexity of one model in several precisions, on text that calibration has not seen.

The text is the language reference that comes with Python, as `help()` shows it (the topics of ``pydoc_data``, PSF licence):
natural English on every machine, nothing to download. It is cut into pieces; every sixth is held out, the others calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..batching.sequence import SamplingParams
from ..core.engine import LLM
from ..models.loader import load_tokenizer, resolve_model
from ..quantization.calibration import MATRICES, Calibration
from ..quantization.layerwise import split_pieces
from ..quantization.layout.checkpoint import QuantizedFormat, write_model
from ..quantization.layout.groups import GroupQuantized, quantize_groups

HELD_OUT = 6
"""Every so many pieces, one is kept from calibration."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One precision.

    Attributes:
        name: such as "GPTQ, groups of 64". perplexity: of all tokens but each piece's first.
        weight_bytes: of the whole model as loaded.
    """

    name: str
    perplexity: float
    weight_bytes: int


def python_topics() -> str:
    """Python's own documentation of its language."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def cut_text(model: str, length: int, num_held_out: int) -> tuple[list[list[int]], str]:
    """Held-out pieces of `length` tokens, and the rest of the text for calibration.

    Raises:
        ValueError: the text has not so many pieces.
    """
    tokenizer = load_tokenizer(resolve_model(model))
    ids = tokenizer.encode(python_topics(), add_special_tokens=False, verbose=False)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    held_out = pieces[1::HELD_OUT][:num_held_out]
    if len(held_out) < num_held_out:
        raise ValueError(f"the text gives {len(held_out)} pieces of {length} tokens, not {num_held_out}")
    rest = [piece for index, piece in enumerate(pieces) if index % HELD_OUT != 1]
    return held_out, tokenizer.decode([token for piece in rest for token in piece])


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
