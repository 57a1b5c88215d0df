"""Fills a model: from the tensors of a checkpoint, whole or quantized, or with random numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..core.platform.machine import available_memory, format_bytes
from ..core.platform.progress import LateBar
from ..parallelism.linear import Linear, WeightLayer
from ..parallelism.quantized_linear import QuantizedLinear
from ..parallelism.tensor_parallel import ParallelLMHead
from ..quantization.layout.reader import CheckpointError, StoredLayer, Unpacker, find_layers
from .config.entries import ModelError
from .config.model_config import ModelConfig
from .config.text_part import text_name
from .layers import CausalLM

log = logging.getLogger(__name__)

Unpack = Callable[[Iterator[tuple[str, torch.Tensor]]], Iterator[tuple[str, torch.Tensor]]]
"""From the tensors of a file to those of the model, by name."""


def quantized_layers(files: list[Path], config: ModelConfig) -> dict[str, StoredLayer]:
    """The quantized layers of a checkpoint, by name.

    Raises:
        ModelError: the files are not what their description says, or damaged.
    """
    if config.quantization is None:
        return {}
    try:
        found = find_layers(files, config.quantization)
        return {text: layer for name, layer in found.items() if (text := text_name(name)) is not None}
    except CheckpointError as error:
        raise ModelError(f"{files[0].parent}: {error}") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{files[0].parent} has a damaged or incomplete weight file ({error}); fetch it again") from error


def expect_quantized(model: CausalLM, stored: dict[str, StoredLayer]) -> set[str]:
    """Put a `QuantizedLinear` in the place of each linear layer that is quantized.

    A layer whose pieces are kept in different ways, some plain or of other bits, is computed as a plain one; so is the head,
    and what is kept without codes.

    Returns:
        The names of layers in the checkpoint that have to be turned into plain weights.

    Raises:
        ModelError: the model has no such layer, or layers cannot be cut for so many ranks.
    """
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    pieces: dict[str, dict[str | None, str]] = {}
    dense: set[str] = set()
    for name in stored:
        placed = model.place(f"{name}.codes", torch.empty(0))
        if placed is None:
            continue
        target, shard, _ = placed
        if target.rpartition(".")[0] not in layers:
            held = f"{name}.{stored[name].form.mark}"
            raise ModelError(f"the weights hold {held}, which is no weight of a {type(model).__name__} of this config")
        pieces.setdefault(target.rpartition(".")[0], {})[shard] = name
    for target, names in pieces.items():
        layer, forms = layers[target], {stored[name].form for name in names.values()}
        is_whole = names.keys() in ({None}, set(layer.shard_ids))
        if isinstance(layer, ParallelLMHead) or not is_whole or len(forms) > 1 or not next(iter(forms)).has_codes:
            dense.update(names.values())
            continue
        try:
            model.set_submodule(target, QuantizedLinear(layer, forms.pop()))
        except ValueError as error:
            raise ModelError(str(error)) from None
    return dense


def _weights(model: nn.Module) -> dict[str, tuple[WeightLayer, nn.Parameter]]:
    """Each parameter once, by name, with the layer that owns it (a tied head's weight is the embedding's)."""
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, WeightLayer)]
    owners = {f"{name}.{key}": layer for name, layer in layers for key, _ in layer.named_parameters(recurse=False)}
    return {name: (owners[name], param) for name, param in model.named_parameters()}


def check_memory(model: nn.Module) -> None:
    """See that there is memory for the weights before any is written: a system promises more than it has, and ends a process
    that takes it. A GPU has refused by itself.

    Raises:
        ModelError: there is not.
    """
    weights = [*model.parameters(), *model.buffers()]
    needed, free = sum(weight.nbytes for weight in weights if weight.device.type == "cpu"), available_memory()
    if needed > free:
        raise ModelError(
            f"the weights take {format_bytes(needed)}, and {format_bytes(free)} of memory are free; use a smaller model, or a "
            f"quantized checkpoint"
        )


def load_weights(
    model: CausalLM, files: list[Path], stored: dict[str, StoredLayer], names: dict[str, str], progress: bool
) -> None:
    """Fill the model; `names` are other names for tensors of the files."""
    dense = expect_quantized(model, stored)
    check_memory(model)
    unpack: Unpack = Unpacker(stored, dense) if stored else iter
    if dense and progress:
        log.warning("%d of %d quantized layers are computed as plain weights", len(dense), len(stored))
    weights = _weights(model)
    awaited = {(name, shard): None for name, (layer, _) in weights.items() for shard in layer.shard_ids}  # ordered set
    with LateBar("loading weights", sum(file.stat().st_size for file in files), progress) as bar:
        for file in files:
            for name, tensor in _unpacked(unpack, model, file, bar):
                try:
                    placed = model.place(names.get(name, name), tensor)
                    if placed is None:
                        continue
                    target, shard, tensor = placed
                    if target.endswith(".dense"):  # [out, in] as the layer has it, however the checkpoint keeps plain ones
                        target = f"{target.removesuffix('.dense')}.weight"
                    if target not in weights:
                        if stored and name.endswith(".bias") and not tensor.any():  # some tools give all layers a bias of zeros
                            continue
                        raise ModelError(f"{file} holds {name}, {_why_not(name, model, bool(stored))}")
                    layer, param = weights[target]
                    if tensor.is_floating_point() != param.is_floating_point():
                        raise ValueError(f"expected {param.dtype}, the checkpoint has {tensor.dtype}")
                    layer.weight_loader(param, tensor, shard)
                except ModelError:
                    raise
                except (ValueError, RuntimeError, IndexError) as error:
                    reason = str(error).splitlines()[0]
                    raise ModelError(f"{name} in {file}: {reason}, so it is not of the model in config.json") from None
                for piece in (shard,) if shard is not None else layer.shard_ids:
                    awaited.pop((target, piece), None)
    if awaited:
        lacking = [name if shard is None else f"{name} ({shard})" for name, shard in list(awaited)[:3]]
        more = f" and {len(awaited) - 3} more" if len(awaited) > 3 else ""
        raise ModelError(f"{files[0].parent} lacks weights of the model: {', '.join(lacking)}{more}")


def _why_not(name: str, model: CausalLM, is_quantized: bool) -> str:
    """Why a tensor of a file has no place in the model."""
    if name.endswith((".qweight", ".qzeros", ".g_idx")) and not is_quantized:
        return "and neither config.json nor quantize_config.json says how it is quantized"
    return f"which is no weight of a {type(model).__name__} of this config"


def _unpacked(unpack: Unpack, model: CausalLM, file: Path, bar: LateBar) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        for name, tensor in unpack(_read_tensors(file, bar)):
            yield from model.pieces(name, tensor)
    except CheckpointError as error:
        raise ModelError(f"{file}: {error}") from None


def _read_tensors(file: Path, bar: LateBar) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of the text model in a safetensors file; the tensors are the mapped file itself.

    The file is mapped anew for each, because what has been read of a mapping counts as memory of the process until it is gone.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as reader:
            names = list(reader.keys())
        for name in names:
            if (text := text_name(name)) is None:
                continue
            with safe_open(file, framework="pt", device="cpu") as reader:
                tensor = reader.get_tensor(name)
            bar.advance(tensor.nbytes)
            yield text, tensor
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged or incomplete ({error}); fetch or convert it again") from error


def fill_randomly(model: nn.Module, device: torch.device, seed: int, progress: bool) -> None:
    """Matrices with a standard deviation of 0.02 as fresh models have, norms that change nothing, no biases."""
    check_memory(model)
    generator = torch.Generator(device).manual_seed(seed)
    weights = _weights(model)
    limit = 0.02 * 3**0.5
    with LateBar("making random weights", sum(param.nbytes for _, param in weights.values()), progress) as bar:
        for name, (layer, param) in weights.items():
            if param.ndim > 1:
                param.uniform_(-limit, limit, generator=generator)
            else:
                param.fill_(0.0 if name.endswith("bias") else 1.0 - getattr(layer, "offset", 0.0))
            bar.advance(param.nbytes)
