"""Quantized checkpoints that the commands make of every family, experts too: the engine says of them what transformers says of
the plain weights that they stand for, which NumPy unpacks here from the layouts alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from solutions.models.loader import resolve_model
from solutions.quantization import awq, gptq
from solutions.quantization.calibration import Calibration
from solutions.quantization.rtn import write_rounded
from solutions.tests.engine_twins import folder
from solutions.tests.quantization_cases import fold_randomly
from solutions.tests.quantized_folders import AWQ_NIBBLES, check_against_transformers
from solutions.tests.tiny_models import FAMILIES, make_tiny

MADE = [family for family in FAMILIES if family != "gpt2"]
QUICK = {("mixtral", "awq"), ("deepseek_v3", "gptq"), ("gpt_oss", "gptq"), ("phi3", "gptq")}


def make(method: str, model: Path, output: Path, **flags: Any) -> None:
    text = output.with_suffix(".txt")
    text.write_text("".join(chr(97 + (i * i) % 26) for i in range(300)))
    flags = {"model": model, "output": output, "group-size": 32, "num-samples": 4, "sequence-length": 48} | flags
    arguments = [f"--{name}={value}" for name, value in (flags | {"calibration-file": text}).items()]
    {"gptq": gptq, "awq": awq}[method].main(arguments)


def unpack(parts: dict[str, np.ndarray], method: str) -> np.ndarray:
    """The weight [out, in] of a layer of 4 bits."""
    nibbles = lambda words: (words.view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32)) & 15  # noqa: E731
    scales = parts["scales"].astype(np.float32)
    if method == "awq":
        order = np.argsort(AWQ_NIBBLES)
        codes, zeros = (nibbles(parts[name])[..., order].reshape(len(parts[name]), -1) for name in ("qweight", "qzeros"))
        groups = np.arange(len(codes)) // -(-len(codes) // len(scales))
    else:
        codes = nibbles(parts["qweight"]).transpose(0, 2, 1).reshape(-1, scales.shape[1])
        zeros, groups = (nibbles(parts["qzeros"]).reshape(scales.shape) + 1) % 16, parts["g_idx"]
    return ((codes.astype(np.float32) - zeros.astype(np.float32)[groups]) * scales[groups]).T


def plain(made: Path, method: str, target: Path) -> dict[str, torch.Tensor]:
    """Write what a made checkpoint stands for into `target`, and return it by name."""
    stored, tensors = load_file(made / "model.safetensors"), {}
    for name in stored:
        layer, _, part = name.rpartition(".")
        if part == "qweight":
            parts = {each: stored[f"{layer}.{each}"].numpy() for each in ("qweight", "qzeros", "scales")}
            if method == "gptq":
                parts["g_idx"] = stored[f"{layer}.g_idx"].numpy()
            tensors[f"{layer}.weight"] = torch.from_numpy(unpack(parts, method).copy())
        elif part not in ("qzeros", "scales", "g_idx"):
            tensors[name] = stored[name]
    result = dict(tensors)
    for name in [name for name in tensors if name.endswith("experts.0.down_proj.weight")]:
        before = name.removesuffix(".0.down_proj.weight")
        if f"{before}.down_proj_bias" in tensors:  # gpt-oss: [E, in, out], gate and up in turns
            for matrix in ("gate_up_proj", "down_proj"):
                each = [
                    tensors.pop(f"{before}.{n}.{matrix}.weight").t() for n in range(len(tensors[f"{before}.down_proj_bias"]))
                ]
                whole = torch.stack(each)
                tensors[f"{before}.{matrix}"] = (
                    whole.unflatten(2, (2, -1)).transpose(2, 3).flatten(2) if matrix == "gate_up_proj" else whole
                )
    target.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((made / "config.json").read_text())
    del config["quantization_config"]
    (target / "config.json").write_text(json.dumps(config))
    return result


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param(family, method, marks=() if (family, method) in QUICK else pytest.mark.slow)
        for family in MADE
        for method in ("gptq", "awq")
    ],
)
def test_the_engine_says_what_transformers_says_of_the_unpacked_weights(tmp_path, family, method):
    make(method, folder(family), tmp_path / "made")
    plain(tmp_path / "made", method, tmp_path / "plain")
    for ranks in (1,) if (family, method) in QUICK else (1, 2):
        check_against_transformers(tmp_path / "plain", tmp_path / "made", 2e-3, tensor_parallel_size=ranks)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v2", "gpt_oss", "phi3", "gpt_neox", "gemma3_text"])
def test_every_row_is_where_the_checkpoint_has_it(tmp_path, family):
    """Rounding moves no weight by more than half a step, so each row that came to another place would show."""
    write_rounded(str(folder(family)), tmp_path / "made", 32)
    whole, rounded = load_file(folder(family) / "model.safetensors"), plain(tmp_path / "made", "gptq", tmp_path / "plain")
    quantized = [
        name.removesuffix(".qweight") for name in load_file(tmp_path / "made" / "model.safetensors") if "qweight" in name
    ]
    assert quantized
    for layer in quantized:
        if f"{layer}.weight" in whole:
            weight = whole[f"{layer}.weight"]
        else:  # a matrix of one expert of gpt-oss
            before, number, matrix = layer.rsplit(".", 2)
            weight = whole[f"{before}.{matrix}"][int(number)].t()
            weight = torch.cat((weight[::2], weight[1::2])) if matrix == "gate_up_proj" else weight
        step = (weight.max() - weight.min()) / 15
        assert (rounded[f"{layer}.weight"] - weight).abs().max() < 0.6 * step, layer
    left = {name for name in whole if f"{name.removesuffix('.weight')}.weight" not in rounded and name not in rounded}
    assert all(family == "gpt_oss" and name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name in left)
    assert not any(word in name for name in quantized for word in ("router", "mlp.gate.", "embed", "lm_head"))


@pytest.mark.parametrize("family", MADE)
def test_folding_leaves_what_a_layer_says_as_it_was(family):
    """Whatever norms a family has, and whoever reads them: experts share a scale, and the router beside them has it too."""
    source = resolve_model(str(folder(family)))
    tokens = torch.randint(0, 250, (3, 40), generator=torch.Generator().manual_seed(3))
    whole, folded = Calibration(source, tokens), Calibration(source, tokens)
    for index in range(len(whole.layers)):
        layer = folded.inputs_of(index)
        folds = fold_randomly(layer, seed=index)
        found = [name for fold in folds for name in fold.matrices]
        assert len(found) == len(set(found))
        assert (family in ("olmo2", "olmo3")) == all(fold.norm is None for fold in folds)
        whole.advance(index, {}, {})
        folded.advance(index, {}, {})
        torch.testing.assert_close(folded.hidden, whole.hidden, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_that_no_token_chose_is_rounded_to_nearest(tmp_path, capsys, method):
    """Two experts are never chosen: the bias that corrects DeepSeek-V3's scores puts them behind all others."""
    make_tiny("deepseek_v3", tmp_path / "whole", num_hidden_layers=2)
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][[4, 7]] = -100.0
    save_file(tensors, tmp_path / "whole" / "model.safetensors", {"format": "pt"})
    make(method, tmp_path / "whole", tmp_path / "made")
    said = [line for line in capsys.readouterr().err.splitlines() if "no calibration token chose" in line]
    assert len(said) == 1
    assert said[0].startswith("layer 1: no calibration token chose experts ")
    numbers = [int(number) for number in said[0].split("experts ")[1].split(";")[0].split(", ")]
    assert {4, 7} <= set(numbers)
    made = plain(tmp_path / "made", method, tmp_path / "plain")
    for number in (4, 7):
        name = f"model.layers.1.mlp.experts.{number}.down_proj.weight"  # whose inputs nothing was folded into
        weight = tensors[name].numpy()
        groups = weight.reshape(len(weight), -1, 32)
        low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
        step = (high - low) / 15
        zero = np.round(-low / step)
        nearest = (np.clip(np.round(groups / step + zero), 0, 15) - zero) * step.astype(np.float16).astype(np.float32)
        np.testing.assert_allclose(made[name].numpy(), nearest.reshape(weight.shape), atol=1e-4)
    check_against_transformers(tmp_path / "plain", tmp_path / "made", 2e-3)


def test_what_is_no_weight_of_the_model_is_copied_once(tmp_path):
    """Mistral's own files lie beside those of Hugging Face in some folders, under other names of tensors."""
    shutil.copytree(folder("mistral"), tmp_path / "whole")
    save_file({"layers.0.attention.wq.weight": torch.zeros(4, 4)}, tmp_path / "whole" / "consolidated.safetensors")
    make("gptq", tmp_path / "whole", tmp_path / "made")
    assert "layers.0.attention.wq.weight" not in load_file(tmp_path / "made" / "model.safetensors")
    plain(tmp_path / "made", "gptq", tmp_path / "plain")
    check_against_transformers(tmp_path / "plain", tmp_path / "made", 2e-3)


def test_the_text_model_of_one_that_sees_keeps_its_names(tmp_path):
    shutil.copytree(folder("mistral"), tmp_path / "whole")
    file, config = tmp_path / "whole" / "model.safetensors", json.loads((folder("mistral") / "config.json").read_text())
    tensors = {f"language_model.{name}": tensor for name, tensor in load_file(file).items()}
    save_file(tensors | {"vision_tower.conv.weight": torch.ones(4, 4)}, file, {"format": "pt"})
    whole = {"model_type": "mistral3", "architectures": ["Mistral3ForConditionalGeneration"], "text_config": config}
    (tmp_path / "whole" / "config.json").write_text(json.dumps(whole))
    make("gptq", tmp_path / "whole", tmp_path / "made")
    made = load_file(tmp_path / "made" / "model.safetensors")
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in made
    assert "vision_tower.conv.weight" in made
    left = {name.removesuffix(".qweight") + ".weight" if name.endswith("qweight") else name for name in made}
    assert {name for name in left if not name.endswith(("qzeros", "scales", "g_idx"))} == load_file(file).keys()
    make("gptq", folder("mistral"), tmp_path / "alone")
    for name, tensor in load_file(tmp_path / "alone" / "model.safetensors").items():
        assert torch.equal(made[f"language_model.{name}"], tensor)
