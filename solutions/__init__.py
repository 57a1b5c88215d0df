"""The reference engine: paged attention, continuous batching and prefix caching in code short enough to read.

Start with ``core/engine.py``; ``README.md`` in this folder says where everything else is.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    # PyTorch's threads turn for milliseconds after an operator, on cores that the kernels' own (core/platform/shares.h) want
    # next. This makes it some microseconds; OpenMP reads it when PyTorch is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")

__version__ = "0.1.0"
