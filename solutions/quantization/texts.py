"""Text to calibrate with and text that is kept from it: the language reference that comes with Python, as `help()` shows it."""

from __future__ import annotations

from pydoc_data.topics import topics

from ..models.loader import load_tokenizer, resolve_model

HELD_OUT = 6
"""Every so many pieces, one is kept from calibration."""


def python_topics() -> str:
    """Python's own documentation of its language."""
    return "\n\n".join(topics[name] for name in sorted(topics))


def cut_text(model: str, length: int, num_held_out: int) -> tuple[list[list[int]], str]:
    """Held-out pieces of `length` tokens, and the rest of the text for calibration. Raises ValueError if there are too few, or
    the model has no tokenizer."""
    tokenizer = load_tokenizer(resolve_model(model))
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer")
    ids = tokenizer.encode(python_topics(), add_special_tokens=False, verbose=False)
    pieces = [ids[start : start + length] for start in range(0, len(ids) - length, length)]
    held_out = pieces[1::HELD_OUT][:num_held_out]
    if len(held_out) < num_held_out:
        raise ValueError(f"the text gives {len(held_out)} pieces of {length} tokens, not {num_held_out}")
    del pieces[1::HELD_OUT]
    return held_out, str(tokenizer.decode([token for piece in pieces for token in piece]))
