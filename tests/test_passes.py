"""Models know nothing of kernels: passes put them into a loaded model, and attention has one signature."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from solutions.attention.backends import BACKEND_NAMES
from solutions.attention.paged_attention import AttentionBackend, NaiveBackend
from solutions.core.capture import LayerReplay
from solutions.core.graphs import decode_graphs
from solutions.core.platform import native
from solutions.models.config.model_config import ModelConfig
from solutions.models.kernels import attach as passes
from solutions.models.kernels.attach import Plan, attach, packed_of
from solutions.models.llama import LlamaForCausalLM
from solutions.models.loader import load_model
from solutions.parallelism.linear import Linear
from solutions.parallelism.tensor_parallel import SINGLE
from tests.test_floors import ROOT, imported, name

PASSES = ("models/kernels/", "models/lora/attach.py", "models/lora/products_", "models/lora/adapted_")
"""What puts kernels in place, and the kernels of the layers and of adapters."""
LAYERS = ("parallelism/linear.py", "parallelism/quantized_linear.py", "parallelism/tensor_parallel.py")


def is_kernel(file: str) -> bool:
    """Whether a file is kernels, a pass that puts them in place, a recording, or a backend of attention.

    What the backends for latents share is an interface, too.
    """
    interfaces = ("attention/paged_attention.py", "attention/latent_attention.py")
    is_backend = file.startswith("attention/") and file not in interfaces
    recordings = ("core/capture.py", "core/graphs/decode_graphs.py", "core/graphs/replay.py", "core/platform/native.py")
    return "kernels/" in file or is_backend or file in recordings


def kernels_of(path: Path, source: str) -> set[str]:
    return {file for file in map(name, imported(path, source)) if is_kernel(file)}


def test_models_and_their_layers_import_no_kernel() -> None:
    models = [path for path in (ROOT / "models").rglob("*.py") if not name(path).startswith(PASSES)]
    paths = [*models, *(ROOT / file for file in LAYERS)]
    assert len(models) > 10
    assert {name(path): found for path in paths if (found := kernels_of(path, path.read_text()))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "from .kernels import layers_cpu",
        "def use_triton():\n    from ..quantization.kernels.w4a16_triton import TritonLinear",
        "from ..attention.paged_attention_cpu import new_step",
        "from ..core.platform.native import Recording",
    ],
)
def test_the_check_finds_what_models_imported_before(line: str) -> None:
    assert kernels_of(ROOT / "models" / "llama.py", line)


def test_linear_is_a_page() -> None:
    source = inspect.getsource(Linear)
    assert len(source.splitlines()) <= 20
    assert {n.attr for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "self"} == {
        "weight", "bias", "multiply",
    }  # fmt: skip


def test_few_arguments_load_a_model_and_none_of_them_is_a_kernel() -> None:
    wanted = ["source", "dtype", "device", "parallel", "seed", "progress"]
    assert list(inspect.signature(load_model).parameters) == wanted


def test_every_backend_attends_by_the_one_signature() -> None:
    backends: list[type[AttentionBackend]] = [NaiveBackend]
    for backend in BACKEND_NAMES:
        module = importlib.import_module(f"solutions.attention.paged_attention_{backend}")
        backends.append(getattr(module, f"{backend.capitalize()}Backend"))
    expected = inspect.signature(AttentionBackend.attend)
    assert {backend.name: inspect.signature(backend.attend) for backend in backends} == {
        backend.name: expected for backend in backends
    }


def test_both_kinds_of_recordings_have_one_interface() -> None:
    assert decode_graphs.Capture.__abstractmethods__ == {"size_for", "run"}
    assert {kind.__name__ for kind in decode_graphs.Capture.__subclasses__()} == {"DecodeGraphs", "Replay"}
    assert issubclass(LayerReplay, decode_graphs.Capture)


needs_compiler = pytest.mark.skipif(native.compiler() is None, reason="no C++ compiler here, so nothing is packed")


def tiny_model(width: int = 64) -> LlamaForCausalLM:
    config = ModelConfig.from_hf(
        {"architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": width}
        | {"num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
    )
    return LlamaForCausalLM(config, SINGLE)


def methods_in_place(model: nn.Module) -> dict[str, set[str]]:
    """Module → methods that something else does for it."""
    found = {
        name: {key for key in vars(module) if callable(getattr(type(module), key, None))}
        for name, module in model.named_modules()
    }
    return {name: methods for name, methods in found.items() if methods}


def test_a_plan_without_kernels_leaves_a_model_as_it_was_loaded() -> None:
    model = tiny_model()
    before = {name: id(param) for name, param in model.named_parameters()}
    attach(model, Plan())
    assert methods_in_place(model) == {}
    assert {name: id(param) for name, param in model.named_parameters()} == before


@needs_compiler
def test_a_pass_packs_every_product_and_frees_its_weight_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    embedding = model.model.embed_tokens.weight
    linears = [layer for layer in model.modules() if isinstance(layer, Linear)]
    plain = {id(layer): layer.weight.data_ptr() for layer in linears}
    still_plain: list[int] = []

    class Watched(passes.PackedLinear):
        def __init__(self, *args: object) -> None:
            still_plain.append(sum(layer.weight.data_ptr() == plain[id(layer)] for layer in linears))
            super().__init__(*args)

    monkeypatch.setattr(passes, "PackedLinear", Watched)
    attach(model, Plan("cpu"))
    assert still_plain == [5, 4, 3, 2, 1]
    assert all(packed_of(layer) is not None for layer in linears)
    assert model.model.embed_tokens.weight is embedding  # which the head was tied to
    in_place = methods_in_place(model)
    assert in_place["model.layers.0.mlp.gate_up_proj"] == {"forward"}
    assert in_place["model.layers.0.mlp.down_proj"] == in_place["lm_head"] == {"multiply"}
    assert in_place["model.norm"] == {"forward"}
    assert in_place["model.layers.0.self_attn.attn"] == {"rotate_"}


@needs_compiler
def test_int4_leaves_the_head_at_8_bits() -> None:
    """Logits are touchier than hidden states. Only packed int8 keeps its scales apart."""
    model = tiny_model()
    with torch.no_grad():
        for param in model.parameters():
            param.normal_()
    attach(model, Plan("cpu", "int4"))
    packed = {name: packed_of(layer) for name, layer in model.named_modules() if isinstance(layer, Linear)}
    assert [name for name, product in packed.items() if product is not None and product.scales is not None] == ["lm_head"]


@needs_compiler
@pytest.mark.parametrize(("width", "method"), [(64, "forward"), (40, "multiply"), (48, "forward")])
def test_gate_and_up_are_one_product_only_where_their_panels_fit(width: int, method: str) -> None:
    model = tiny_model(width)
    mlp, x = model.model.layers[0].mlp, torch.randn(3, 32)
    with torch.no_grad():
        for param in mlp.parameters():
            param.normal_(0.0, 0.1)
        gate, up = (x @ mlp.gate_up_proj.weight.T).chunk(2, dim=-1)
        attach(model, Plan("cpu"))
        assert methods_in_place(model)["model.layers.0.mlp.gate_up_proj"] == {method}
        torch.testing.assert_close(mlp.gate_up_proj(x), torch.nn.functional.silu(gate) * up, atol=1e-5, rtol=1e-4)
