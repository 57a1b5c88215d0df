"""Imports Triton in the mode that fits the machine: its kernels are compiled for a GPU, or interpreted where there is none.

`triton.jit` decides when a function is decorated, so the decision has to stand before the first kernel is defined. Modules with
kernels take `triton` and `tl` from here.
"""

from __future__ import annotations

import importlib
import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # TRITON_INTERPRET=0 compiles kernels without a card, to look at their code

import triton
import triton.language as tl

__all__ = ["INTERPRETED", "cast", "is_interpreted", "tl", "triton"]


def is_interpreted() -> bool:
    """Whether kernels run as NumPy operations on this CPU: slow, for tests and for stepping through them."""
    return bool(triton.knobs.runtime.interpret)


if is_interpreted() and isinstance(tl.max, triton.JITFunction):
    # Somebody, such as transformers, has imported Triton before: its own functions, `tl.max` and the like, are kernels too.
    importlib.reload(tl.standard)
    importlib.reload(tl)

INTERPRETED = tl.constexpr(is_interpreted())
"""The same for kernels, which this lets the compiler decide on."""


@triton.jit
def cast(x, KIND: tl.constexpr):
    """`x` in float32 as another type, rounded to the nearest, halves to even."""
    if INTERPRETED and KIND.is_floating() and KIND.primitive_bitwidth < 32:
        # The interpreter cuts bits off (bfloat16) or loses the carry (float8), so those bits are rounded away beforehand.
        dropped = 23 - KIND.fp_mantissa_width
        bits = x.to(tl.int32, bitcast=True)
        bits += (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        x = (bits >> dropped << dropped).to(tl.float32, bitcast=True)
    return x.to(KIND)
