"""Quantizes a model layer by layer: the recipe, the run, and the command that GPTQ and AWQ share.

A finished layer is written to the output folder at once, so an interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..batching.sampling_params import SamplingParams
from ..models.families import MODEL_CLASSES
from ..models.llama import LlamaForCausalLM
from ..models.loader import ModelSource, load_tokenizer, resolve_model
from ..models.model_files import weight_files
from ..models.weight_headers import WeightHeaders
from .as_stored import as_stored
from .calibration import Calibration, LayerInputs
from .layout.checkpoint import QuantizedFormat, write_model
from .layout.groups import BITS, GroupQuantized, quantize_groups

WORK = "layers-so-far"
"""Folder in the output folder with the finished layers of a run that is not through."""
MANIFEST = "recipe.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is quantized; a run can only be continued with the same.

    Attributes:
        num_samples, sequence_length: of the calibration text, in tokens. seed: of the text, if the model makes it itself.
        damping, act_order: of GPTQ alone.
    """

    method: str
    model: str
    bits: int = 4
    group_size: int = 64
    symmetric: bool = False
    act_order: bool = False
    damping: float = 0.01
    num_samples: int = 64
    sequence_length: int = 512
    seed: int = 0
    calibration_file: str | None = None

    def identity(self) -> dict[str, object]:
        """All that decides the result, the calibration file by its content; what `MANIFEST` holds.

        Raises:
            OSError: the file cannot be read.
        """
        text = None if self.calibration_file is None else Path(self.calibration_file).read_bytes()
        return asdict(self) | {"calibration text": None if text is None else hashlib.sha256(text).hexdigest()}


QuantizeLayer = Callable[[LayerInputs, Recipe], dict[str, GroupQuantized]]
"""What a method does: all matrices of a layer, from the statistics of their inputs."""


def calibration_tokens(recipe: Recipe, source: ModelSource) -> Tensor:
    """[B, L] int64: from the file, or from what the model itself says.

    Raises:
        ValueError: the text is too short, or there is no tokenizer to read it with.
    """
    wanted, length = recipe.num_samples, recipe.sequence_length
    if recipe.calibration_file is not None:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise ValueError(f"{source.name} has no tokenizer to read {recipe.calibration_file} with")
        text = Path(recipe.calibration_file).read_text(encoding="utf-8")
        ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
        samples = len(ids) // length
        if samples < 1:
            raise ValueError(f"{recipe.calibration_file} has {len(ids)} tokens and a sample takes {length}; give more text")
        return torch.tensor(ids[: min(samples, wanted) * length]).view(-1, length)
    from ..core.engine import LLM  # which builds on this package's kernels

    llm = LLM(recipe.model, max_model_len=length + 1, enable_prefix_caching=False)
    first = source.config.bos_token_id if source.config.bos_token_id is not None else 0
    params = [
        SamplingParams(seed=recipe.seed * 100_003 + i, max_tokens=length - 1, ignore_eos=True, detokenize=False)
        for i in range(wanted)
    ]
    outputs = llm.generate([{"prompt_token_ids": [first]}] * wanted, params)
    return torch.tensor([[first, *output.outputs[0].token_ids] for output in outputs])


def quantize_model(
    recipe: Recipe, output: Path, quantize_layer: QuantizeLayer, form: QuantizedFormat, progress: bool = True
) -> None:
    """Quantize a model layer by layer and write it; a run that was interrupted is continued.

    Raises:
        ValueError: the model is of another kind, or the folder holds a run with other settings.
    """
    source = resolve_model(recipe.model)
    if source.path is None:
        raise ValueError(f"{recipe.model} has no weights here that could be quantized")
    if not issubclass(MODEL_CLASSES[source.config.architecture], LlamaForCausalLM):  # GPT-2, and encoders
        raise ValueError(f"{recipe.model}: models of {source.config.architecture} cannot be quantized here")
    if source.config.quantization is not None:
        raise ValueError(f"{recipe.model} is quantized already; start from the whole model")
    work = output / WORK
    done = finished_layers(recipe, output, work)
    calibration = Calibration(source, calibration_tokens(recipe, source))
    if done:
        print(f"going on in {output}: {len(done)} layers are done", file=sys.stderr)
    work.mkdir(parents=True, exist_ok=True)
    (work / MANIFEST).write_text(json.dumps(recipe.identity(), indent=2) + "\n")
    layers: dict[str, GroupQuantized] = {}
    changed: dict[str, Tensor] = {}
    for index in track(range(len(calibration.layers)), "layers", console=Console(file=sys.stderr), disable=not progress):
        file = work / f"{index:04}.safetensors"
        if file in done:
            quantized, new = read_layer(file, recipe)
        else:
            layer = calibration.inputs_of(index)
            quantized = quantize_layer(layer, recipe) | round_untouched(layer, recipe, index)
            new = layer.changed
            write_layer(file, quantized, new)
        calibration.advance(index, quantized, new)
        prefix = f"model.layers.{index}"
        layers |= {f"{prefix}.{name}": weight for name, weight in quantized.items()}
        changed |= {f"{prefix}.{name}": tensor for name, tensor in new.items()}
    headers = WeightHeaders.open(weight_files(source.path, ""))
    stored = as_stored(calibration.model, headers, layers, changed)
    write_model(output, source.path, stored.layers, form, recipe.symmetric, stored.changed, headers.files)
    shutil.rmtree(work)


def round_untouched(layer: LayerInputs, recipe: Recipe, index: int) -> dict[str, GroupQuantized]:
    """The matrices of experts that no token of the calibration text went through: rounded to nearest, which needs no inputs."""
    experts = sorted({int(name.split(".experts.")[1].split(".")[0]) for name in layer.untouched})
    if experts:
        named = ", ".join(map(str, experts))
        print(f"layer {index}: no calibration token chose experts {named}; they are rounded to nearest", file=sys.stderr)
    arguments = recipe.bits, recipe.group_size, recipe.symmetric
    return {name: quantize_groups(layer.weight(name), *arguments) for name in layer.untouched}


def finished_layers(recipe: Recipe, output: Path, work: Path) -> set[Path]:
    """Files of the layers that an interrupted run has finished.

    Raises:
        ValueError: the folder holds something else, or a run with other settings.
    """
    manifest = work / MANIFEST
    if manifest.is_file():
        before, now = json.loads(manifest.read_text()), recipe.identity()
        if before != now:
            differing = [name for name, value in now.items() if before.get(name) != value]
            raise ValueError(
                f"{output} holds a run with another {', '.join(differing)}; delete {work} or choose another folder"
            )
        return set(work.glob("*.safetensors"))
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder")
    return set()


def write_layer(file: Path, quantized: dict[str, GroupQuantized], changed: dict[str, Tensor]) -> None:
    """Keep a finished layer; the file is there as a whole or not at all."""
    tensors = {f"changed.{name}": tensor for name, tensor in changed.items()}
    for name, weight in quantized.items():
        for part in ("codes", "scales", "zeros", "order"):
            if (tensor := getattr(weight, part)) is not None:
                tensors[f"{part}.{name}"] = tensor
    partial = file.with_suffix(".part")
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, partial)
    partial.rename(file)


def read_layer(file: Path, recipe: Recipe) -> tuple[dict[str, GroupQuantized], dict[str, Tensor]]:
    """What `write_layer` was given."""
    tensors = load_file(file)
    quantized = {}
    for name in [key.removeprefix("codes.") for key in tensors if key.startswith("codes.")]:
        codes = tensors[f"codes.{name}"]
        size = codes.shape[1] if recipe.group_size == -1 else recipe.group_size
        parts = tensors[f"scales.{name}"], tensors[f"zeros.{name}"]
        quantized[name] = GroupQuantized(codes, *parts, recipe.bits, size, tensors.get(f"order.{name}"))
    prefix = "changed."
    return quantized, {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def run_command(
    method: str, text: str, quantize_layer: QuantizeLayer, form: Callable[[Recipe], QuantizedFormat], argv: list[str] | None
) -> None:
    """The command line of a method; exits with 1 and one line on a problem."""
    parser = argparse.ArgumentParser(
        prog=f"python -m solutions.quantization.{method}", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=text.split("\n\n")[0] + "\n\nThe result is a folder in Hugging Face's format that --model takes.",
        epilog=f"example:\n  python -m solutions.quantization.{method} --model smollm2-135m --group-size 64 --output small\n"
        "  make serve MODEL=small",
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="alias, folder, .gguf file or hub id of a whole model")
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to write; continues an interrupted run"
    )
    parser.add_argument("--group-size", type=int, default=64, help="weights that share a scale; -1: a whole row (default: 64)")
    parser.add_argument("--symmetric", action="store_true", help="round symmetrically around zero")
    if method == "gptq":
        parser.add_argument("--bits", type=int, default=4, choices=BITS, help="bits of a weight (default: 4)")
        parser.add_argument(
            "--act-order",
            "--desc-act",
            action="store_true",
            help="round columns with large inputs first, which loses far less; the result runs on one rank only",
        )
        parser.add_argument("--damping", type=float, default=0.01, help="added to the Hessian's diagonal (default: 0.01)")
    else:
        parser.add_argument("--bits", type=int, default=4, choices=(4,), help="bits of a weight (default: 4)")
    parser.add_argument("--calibration-file", metavar="FILE", help="calibration text (default: text that the model writes)")
    parser.add_argument("--num-samples", type=int, default=64, help="samples of calibration text (default: 64)")
    parser.add_argument("--sequence-length", type=int, default=512, help="tokens of a sample (default: 512)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the text that the model writes (default: 0)")
    args = vars(parser.parse_args(argv))
    output = args.pop("output")
    try:
        recipe = Recipe(method=method, **args)
        if min(recipe.num_samples, recipe.sequence_length - 1) < 1 or not (recipe.group_size == -1 or recipe.group_size > 0):
            raise ValueError("--num-samples must be at least 1, --sequence-length at least 2, --group-size at least 1 or -1")
        quantize_model(recipe, output, quantize_layer, form(recipe))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{output} is ready; try: make serve MODEL={output}")
