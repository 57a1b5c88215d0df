"""Reads LoRA adapters as PEFT saves them: ``adapter_config.json`` and ``adapter_model.safetensors`` in one folder.

An adapter adds ``scale · B · A`` to weights of linear layers (Hu et al., "LoRA", 2021). What it says beyond that, or about
other layers, is refused by name. The file's names are those of PEFT; the model's own `place` says which of its layers each
belongs to, and turns B's rows as it would turn the weight's.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config.entries import Entries, ModelError, read_json
from ..layers import CausalLM
from .expert_files import is_of_all_experts, matrices

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<half>[AB])(?:\.\w+)?\.weight")
_OTHER_FORMS = {
    "use_dora": "DoRA, which also rescales the weights",
    "use_qalora": "QA-LoRA",
    "lora_bias": "biases on B",
    "modules_to_save": "whole layers (modules_to_save)",
    "trainable_token_indices": "rows of the embedding (trainable_token_indices)",
    "layer_replication": "a model with repeated layers (layer_replication)",
    "alora_invocation_tokens": "an activated adapter (alora_invocation_tokens)",
    "arrow_config": "a router between adapters (arrow_config)",
}
"""Entries that, if they are set, say what a sum of products does not compute."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Initialisations that leave the base model's weights changed; PEFT can convert such an adapter when it saves it."""


@dataclass(slots=True)
class Part:
    """What an adapter adds to a layer, or to a piece of a merged one.

    Attributes:
        shard: the piece (see `WeightLayer.shard_ids`); None: all of the layer.
        a, b: [r, in] and [out, r], of the whole layer, not of a rank's part of it; the scale is in `b`.
    """

    shard: str | None
    a: Tensor
    b: Tensor


Adapter = dict[str, list[Part]]
"""By the names of the model's layers."""


def read_adapter(folder: Path, model: CausalLM, max_rank: int) -> Adapter:
    """Read an adapter for this model. Nothing of the model changes.

    Raises:
        ModelError: a file is missing or damaged, or the adapter asks for more than sums of products of rank `max_rank` at most.
    """
    try:
        has_config, has_weights = ((folder / name).is_file() for name in (CONFIG, WEIGHTS))
    except OSError as error:  # the path is too long, say, or leads through a folder that may not be read
        raise ModelError(f"cannot read {folder}: {error.strerror or error}") from None
    if not has_config:
        raise ModelError(f"{folder} has no {CONFIG}, so it is no LoRA adapter as PEFT saves it")
    if not has_weights:
        raise ModelError(f"{folder} has no {WEIGHTS}; save the adapter with safe_serialization=True")
    settings = Entries(read_json(folder / CONFIG), f"{folder.name}/{CONFIG}")
    _refuse_other_forms(settings)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dictionary
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / WEIGHTS} is damaged or incomplete ({error})") from error
    adapter: Adapter = {}
    for module, (a, b) in _pairs(tensors).items():
        rank, of_layers = len(a), iter([(module, a, b)])
        if is_of_all_experts(module):
            module, rank, of_layers = matrices(module, a, b, model)
        if rank > max_rank:
            raise ModelError(f"{module} has rank {rank}, and --max-lora-rank is {max_rank}")
        scale = scale_of(settings, module, rank)
        for layer, of_a, of_b in of_layers:
            name, shard, rows = model.place(f"{layer}.lora", of_b * scale) or (layer, None, of_b)
            adapter.setdefault(name.removesuffix(".lora"), []).append(Part(shard, of_a, rows))
    return adapter


def scale_of(settings: Entries, module: str, rank: int) -> float:
    """The factor on a module's product: alpha / r, or with ``use_rslora`` alpha / sqrt(r) (Kalajdzievski, 2023)."""
    alpha = settings.number("lora_alpha", 8, above=True)
    patterns = settings.entries("alpha_pattern")
    for pattern in patterns.content:
        try:
            is_meant = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise ModelError(f"{patterns.where}: {pattern!r} is no regular expression ({error})") from None
        if is_meant:
            alpha = patterns.number(pattern, above=True)
            break
    return float(alpha) / (math.sqrt(rank) if settings.flag("use_rslora", False) else rank)


def _refuse_other_forms(settings: Entries) -> None:
    content, where = settings.content, settings.where
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{where}: peft_type is {content.get('peft_type')!r}, and only LORA is supported")
    if content.get("bias", "none") != "none":
        raise ModelError(f"{where}: the adapter changes biases (bias: {content['bias']}), which is not supported")
    for name, what in _OTHER_FORMS.items():
        if content.get(name):
            raise ModelError(f"{where}: the adapter has {what}, which is not supported")
    start = content.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise ModelError(
            f"{where}: init_lora_weights {start!r} has changed the base model's weights; save the adapter with "
            "path_initial_model_for_weight_conversion"
        )


def _pairs(tensors: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """A [r, in] and B [out, r] of each module, in float32, by the base model's name for it."""
    halves: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise ModelError(f"the adapter holds {name}, and only lora_A and lora_B of linear layers are supported")
        if found["half"] in halves.setdefault(found["module"], {}):
            raise ModelError(f"the adapter holds more than one lora_{found['half']} for {found['module']}")
        halves[found["module"]][found["half"]] = tensor.to(torch.float32)
    if not halves:
        raise ModelError("the adapter is empty")
    pairs = {}
    for module, both in halves.items():
        if both.keys() != {"A", "B"}:
            raise ModelError(f"the adapter has only one of lora_A and lora_B for {module}")
        a, b = both["A"], both["B"]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise ModelError(f"lora_A {list(a.shape)} and lora_B {list(b.shape)} of {module} do not fit each other")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ModelError(f"the adapter's numbers for {module} are not all finite")
        pairs[module] = a, b
    return pairs
