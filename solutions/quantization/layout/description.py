"""What AutoGPTQ, GPTQModel and AutoAWQ say of a quantized checkpoint, in whichever words they say it.

The description is config.json's ``quantization_config``, or a file of its own. Keys have changed their names over the years;
what bears on the numbers is read here, or refused by name, and what tells only how the codes were found is passed over.
Which layers are quantized is not read from it: the weight files say so themselves (see `reader`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from .groups import BITS

METHODS = ("gptq", "awq")
OTHER_METHODS = ("compressed-tensors", "fp8")
"""Those that `compressed` reads."""
FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files with a description, where config.json has none, and the method of those that name none."""

LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
SIGNS = (
    ("gptq", ("desc_act", "damp_percent", "static_groups", "true_sequential", "is_marlin_format")),
    ("awq", ("zero_point",)),
    ("bitsandbytes", ("load_in_4bit", "load_in_8bit")),
    ("awq", ("w_bit", "q_group_size")),
    ("gptq", ("sym",)),
)
"""Keys that tell a method, the surest first: AutoGPTQ reads AWQ's short names too."""

CHANGES = ("adapter", "rotation")
"""What GPTQModel may do to a model besides rounding, which would have to be undone or computed."""


@dataclass(frozen=True, slots=True)
class Override:
    """Layers whose names begin with a match of `pattern` have their own bits and group size (GPTQModel's ``dynamic``)."""

    pattern: str
    bits: int
    group_size: int


@dataclass(frozen=True, slots=True)
class Description:
    """What is said, in one form: `layout` is one of `LAYOUTS`."""

    method: str
    layout: str
    bits: int
    group_size: int
    act_order: bool
    overrides: tuple[Override, ...]


def implied_method(config: dict[str, Any]) -> str | None:
    """The method that a description without ``quant_method`` is of, by its layout or its keys; None: they do not tell."""
    layouts = [config.get(key) for key in ("checkpoint_format", "format", "version")]
    for method, known in LAYOUTS.items():
        if any(isinstance(layout, str) and layout.lower() in known for layout in layouts):
            return method
    return next((method for method, keys in SIGNS if any(config.get(key) is not None for key in keys)), None)


def read_description(config: Any) -> Description:
    """Understand the ``quantization_config`` of a config.json, or the content of one of `FILES`.

    Raises:
        ValueError: it names a method or a layout that cannot be read here, or contradicts itself.
    """
    if not isinstance(config, dict):
        raise ValueError(f"quantization_config is no JSON object but {_short(config)}")
    method = config.get("quant_method") or implied_method(config) or "unknown methods"
    method = method.lower() if isinstance(method, str) else method
    if method not in METHODS:
        known = f"{', '.join((*METHODS, *OTHER_METHODS[:-1]))} and {OTHER_METHODS[-1]}"
        raise ValueError(
            f"checkpoints quantized with {_short(method)} are not supported, {known} are; use the unquantized model"
        )
    if config.get("backend") == "llm-awq":
        raise ValueError("quantization_config: AWQ layout 'llm-awq' (backend) is not supported, gemm is")
    layout = "marlin" if config.get("is_marlin_format") else _one_of(config, "checkpoint_format", "format", "version")
    layout = LAYOUTS[method][0] if layout is None else layout
    if layout not in LAYOUTS[method]:
        known = " and ".join(LAYOUTS[method])
        verb = "is" if method == "awq" else "are"
        raise ValueError(f"quantization_config: {method.upper()} layout {layout!r} is not supported, {known} {verb}")
    if str(config.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
        raise ValueError(f"quantization_config: codes packed into {_short(config['pack_dtype'])} are not supported, int32 is")
    for key in CHANGES:
        if config.get(key):
            raise ValueError(f"quantization_config: a checkpoint with {key} is not supported; quantize without it")
    if not isinstance(config.get("desc_act") or False, bool):
        raise ValueError(f"quantization_config: desc_act must be true or false, not {_short(config['desc_act'])}")
    bits, size = _one_of(config, "bits", "w_bit", "wbits"), _one_of(config, "group_size", "q_group_size")
    _check_sizes(method, bits, size)
    overrides = _read_dynamic(config.get("dynamic"), method, bits, size)
    return Description(method, layout, bits, size, bool(config.get("desc_act")), overrides)


def _one_of(config: dict[str, Any], *names: str) -> Any:
    """The value of a setting that has several names; texts in small letters; None: it is not there."""
    given = {name: config[name] for name in names if config.get(name) is not None}
    values = [value.lower() if isinstance(value, str) else value for value in given.values()]
    if any(value != values[0] for value in values):
        raise ValueError(f"quantization_config contradicts itself: {', '.join(f'{k}={_short(v)}' for k, v in given.items())}")
    return values[0] if values else None


def _check_sizes(method: str, bits: Any, size: Any) -> None:
    fits = type(bits) is int and bits in (BITS if method == "gptq" else (4,))
    if not fits or type(size) is not int or (size < 1 and size != -1):
        raise ValueError(f"quantization_config: {method} with {_short(bits)} bits in groups of {_short(size)} is not supported")


def _read_dynamic(dynamic: Any, method: str, bits: int, size: int) -> tuple[Override, ...]:
    """GPTQModel's exceptions: ``{"-:regex": {}}`` leaves layers out, which their files show;
    ``{"+:regex": {"bits": 8}}`` changes their settings."""
    if dynamic is not None and not isinstance(dynamic, dict):
        raise ValueError(f"quantization_config: dynamic must be an object of patterns, not {_short(dynamic)}")
    overrides = []
    for key, changes in (dynamic or {}).items():
        pattern = key.removeprefix("+:").removeprefix("-:")
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"quantization_config: dynamic has the pattern {_short(key)}, which is none ({error})") from None
        if key.startswith("-:"):
            continue
        if not isinstance(changes, dict):
            raise ValueError(f"quantization_config: dynamic gives {_short(key)} no object but {_short(changes)}")
        for name in ("quant_method", "method", "format", "checkpoint_format", "pack_dtype", *CHANGES):
            if changes.get(name) is not None:
                raise ValueError(f"quantization_config: {name} for some layers only (dynamic {_short(key)}) is not supported")
        own_bits, own_size = _one_of(changes, "bits", "w_bit"), _one_of(changes, "group_size", "q_group_size")
        own_bits, own_size = bits if own_bits is None else own_bits, size if own_size is None else own_size
        _check_sizes(method, own_bits, own_size)
        overrides.append(Override(pattern, own_bits, own_size))
    return tuple(overrides)


def _short(value: Any) -> str:
    """A value for a message of one line; plain words without quotes where they are a name."""
    if isinstance(value, str) and re.fullmatch(r"[\w./-]+", value) and len(value) < 60:
        return value
    text = " ".join(repr(value).split())
    return text if len(text) < 60 else f"{text[:60]}…"
