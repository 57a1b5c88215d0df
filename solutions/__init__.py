"""The reference engine: paged attention, continuous batching and prefix caching in code short enough to read.

Start with ``core/engine.py``; ``README.md`` in this folder says where everything else is.
"""

__version__ = "0.1.0"
