"""What a CPU's layers compute with, chosen by a measurement: the C++ kernels or PyTorch's operators, and in which precision.

Nobody can say for all processors and compilers which is faster, so a product of the model's own shape is computed both ways,
with one row as in decoding, with a batch and with a prompt. The result is kept beside the kernels, for this processor, this
build of them, this PyTorch and this number of threads.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.platform import native
from ...core.platform.machine import cache_root, processor_name
from ...quantization.kernels.linear_cpu import PackedLinear
from ..config.model_config import ModelConfig

ROWS = (1, 32, 128)
"""Tokens of the products that are measured."""
SMALLEST, LARGEST = 1 << 18, 1 << 22
"""Numbers in a matrix. A model whose matrices are smaller is not worth a measurement; of a larger one a part stands for all."""
COPIES = 3
"""Matrices that take turns, so that a decoding step's does not lie in a cache already."""
CLEARLY = 1.1
"""So many times as fast something must be to displace what comes before it: noise shall decide nothing."""
PATIENCE = 1.0
"""Seconds after which no further round is begun; each has one run of all."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to compute: with the C++ kernels or without, in a type such as "bfloat16"."""

    kernels: bool
    dtype: str

    def __str__(self) -> str:
        return f"{'C++' if self.kernels else 'PyTorch'} in {self.dtype}"


@dataclass(frozen=True, slots=True)
class Choice:
    """The way that was chosen, and why, in words for a start's report."""

    way: Way
    why: str


def is_worth_measuring(model: ModelConfig) -> bool:
    """Whether a model is large enough that the choice matters."""
    return model.hidden_size % 2 == 0 and model.hidden_size * model.intermediate_size >= SMALLEST


def choose(ways: Sequence[Way], model: ModelConfig) -> Choice:
    """The fastest of some ways for a model's MLP, the first of them unless another is clearly faster. At most a second or two;
    no time at all when it has been measured before.

    Args:
        ways: at least one. The threads of either kind are set already.
    """
    shape, build = (model.hidden_size, model.intermediate_size), Path(native.loaded()._name).name
    facts = [processor_name(), build, torch.__version__, torch.get_num_threads(), shape, CLEARLY, *map(str, ways)]
    file = cache_root() / "native" / f"choice-{hashlib.sha256(repr(facts).encode()).hexdigest()[:20]}.json"
    try:
        kept = json.loads(file.read_text())
        return Choice(Way(**kept["way"]), kept["why"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not what was written
        choice = judge(measure(ways, *shape))
    with suppress(OSError):  # without a cache to write to, the next start measures again
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        part.write_text(json.dumps(asdict(choice)))
        part.rename(file)
    return choice


def judge(seconds: dict[Way, list[float]]) -> Choice:
    """The choice that follows from times of each way at each of `ROWS`: by the geometric mean over these."""

    def gains(way: Way, other: Way) -> list[float]:  # how many times as fast as the other
        return [theirs / ours for ours, theirs in zip(seconds[way], seconds[other], strict=True)]

    first, *others = seconds
    best = first
    for way in others:
        if _mean(gains(way, best)) > CLEARLY:
            best = way
    found = []
    for other in seconds:
        if other != best:
            each = ", ".join(f"{gain:.1f}" for gain in gains(best, other))
            found.append(f"{_mean(gains(best, other)):.1f} times as fast as {other} ({each})")
    said = f": {'; '.join(found)} for {', '.join(map(str, ROWS))} tokens" if found else ""
    return Choice(best, f"{best}{said}")


def _mean(values: list[float]) -> float:
    return math.prod(values) ** (1 / len(values))


def measure(ways: Sequence[Way], hidden_size: int, intermediate_size: int) -> dict[Way, list[float]]:
    """Least seconds of a product by each way at each of `ROWS`. All take turns, so that what disturbs one disturbs all."""
    rows = max(1, min(2 * intermediate_size, LARGEST // hidden_size))
    weight = torch.randn(rows, hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        products = {way: _products(way, weight) for way in ways}
        best = {way: [math.inf] * len(ROWS) for way in ways}
        end = time.perf_counter() + PATIENCE
        for number in range(20):
            for way, product in products.items():
                for i, count in enumerate(ROWS):
                    x = torch.ones(count, hidden_size, dtype=getattr(torch, way.dtype))
                    start = time.perf_counter()
                    product(x, number)
                    if number:  # the first is to warm up
                        best[way][i] = min(best[way][i], time.perf_counter() - start)
            if number and time.perf_counter() > end:
                break
    return best


def _products(way: Way, weight: Tensor) -> Callable[[Tensor, int], Tensor]:
    """A product of x and one of several copies of the weight."""
    copies = [weight.to(getattr(torch, way.dtype), copy=True) for _ in range(COPIES)]
    if not way.kernels:
        return lambda x, number: F.linear(x, copies[number % COPIES])
    packed = [PackedLinear(each, None) for each in copies]
    return lambda x, number: packed[number % COPIES](x)
