"""How positions become angles, as ``config.json`` says it: in transformers 5's ``rope_parameters``, or in the older
``rope_theta`` and ``rope_scaling``."""

from __future__ import annotations

import math
from typing import Any

from .entries import MAX_WHOLE, Entries, ModelError

NUMBERS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": (),
}
"""Supported kinds of RoPE scaling besides "default", and the numbers that each must bring."""

OLDER_NAMES = {"su": "longrope", "mrope": "default"}
"""What the first files with a kind called it; one that counts positions of images, too, counts those of texts as usual."""


def read_rope(hf: Entries, head_dim: int) -> dict[str, Any]:
    """The fields of a `ModelConfig` that say how positions become angles, for heads of `head_dim` elements.

    With linear and YaRN scaling the context is the factor times that of the original model, as in vLLM:
    ``max_position_embeddings``, or ``original_max_position_embeddings`` where the file has both. With "llama3" and "longrope"
    the first is always the whole context.

    Raises:
        ModelError: the kind of scaling is not supported, or a number is missing or wrong.
    """
    given = hf.entries("rope_parameters" if hf.content.get("rope_parameters") else "rope_scaling")
    trained = hf.whole("max_position_embeddings")
    theta = float(given.number("rope_theta", hf.number("rope_theta", 10000.0, above=True), above=True))
    kind = given.text("rope_type", given.text("type", "default"))
    kind = OLDER_NAMES.get(kind, kind)
    share = given.number("partial_rotary_factor", hf.number("partial_rotary_factor", 1.0))
    rotary_dim = None if share == 1 else int(head_dim * share)
    fields = {"rope_theta": theta, "max_position_embeddings": trained, "rotary_dim": rotary_dim}
    if kind == "default":
        return fields
    if kind not in NUMBERS:
        raise ModelError(f"RoPE scaling {kind!r} is not supported; supported are default, {', '.join(NUMBERS)}")
    scaling: dict[str, Any] = {"rope_type": kind}
    scaling |= {name: given.number(name, low=1.0 if name == "factor" else 0.0) for name in NUMBERS[kind]}
    original = given.whole("original_max_position_embeddings", trained)
    if kind in ("llama3", "yarn", "longrope"):
        original = scaling["original_max_position_embeddings"] = hf.whole("original_max_position_embeddings", original)
    if kind == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"] > 0:
        raise ModelError("RoPE scaling llama3 needs a low_freq_factor above 0 and a high_freq_factor above that")
    if kind == "yarn":
        scaling |= _yarn(given, scaling["factor"])
    if kind == "longrope":
        scaling |= _longrope(given, given.number("factor", trained / original), original)
    if kind in ("linear", "yarn"):
        fields["max_position_embeddings"] = max(trained, min(int(original * scaling["factor"]), MAX_WHOLE))
    return fields | {"rope_scaling": scaling}


def _yarn(given: Entries, factor: float) -> dict[str, Any]:
    """How often a pair turns in the trained context that keeps its speed, and one that is slowed in full; and the factor on
    cosines and sines."""
    scaling = {
        "beta_fast": given.number("beta_fast", 32.0, above=True),
        "beta_slow": given.number("beta_slow", 1.0, above=True),
    }
    if scaling["beta_fast"] <= scaling["beta_slow"]:
        raise ModelError("RoPE scaling yarn needs a beta_fast above beta_slow")
    one, all_dims = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    default = yarn_magnitude(factor, one) / yarn_magnitude(factor, all_dims) if one and all_dims else yarn_magnitude(factor)
    magnitude = given.number("attention_factor", default, above=True)
    return scaling | {"truncate": given.flag("truncate", True), "attention_factor": magnitude}


def yarn_magnitude(factor: float, share: float = 1.0) -> float:
    """What YaRN enlarges queries and keys by."""
    return 0.1 * share * math.log(factor) + 1.0


def _longrope(given: Entries, factor: float, original: int) -> dict[str, Any]:
    """A divisor for each pair, within the trained context and beyond it; and the factor on cosines and sines."""
    default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    divisors = {name: given.numbers(name) for name in ("short_factor", "long_factor")}
    return divisors | {"attention_factor": given.number("attention_factor", default, above=True)}
