"""GGUF files whose blocks stay quantized: codes that mean what the `gguf` package reads, and models that compute on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as GGMLType

from solutions.batching.sampling_params import SamplingParams
from solutions.core.config import EngineConfig
from solutions.core.engine import LLM
from solutions.core.executor import UniProcExecutor
from solutions.core.platform import native
from solutions.models.config.entries import ModelError
from solutions.models.gguf_blocks import TYPES, formats, read_groups
from solutions.models.kernels.attach import packed_of
from solutions.models.loader import resolve_model
from solutions.parallelism.linear import Linear
from solutions.quantization.layout.blocks import BlockFormat
from solutions.tests import gguf_files
from solutions.tests.gguf_files import WIDE, cache, write_gguf
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny, make_tiny_llama

__all__ = ["cache"]

needs_kernels = pytest.mark.skipif(native.load() is None, reason="there is no compiler for the C++ kernels")
KINDS = sorted(TYPES, key=lambda kind: kind.name)
PROMPT = list(range(3, 40))
FAMILIES = ["qwen2", "qwen3", "smollm3", "phi3", "olmo2", "gemma3_text", "gpt_neox", "starcoder2", "mixtral", "qwen3_moe"]


def stored(values: np.ndarray, kind: GGMLType, quantize: Callable[..., np.ndarray] = gguf.quants.quantize) -> np.ndarray:
    """What llama.cpp would write. The package cannot write K-quants: of those it is blocks with any codes and scales, whose
    16-bit numbers are small."""
    try:
        return quantize(values, kind)
    except NotImplementedError:
        size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        count = values.size // size
        blocks = np.random.default_rng(values.size).integers(0, 256, (count, block_bytes), dtype=np.uint8)
        numbers = np.random.default_rng(1).uniform(1e-4, 1e-3, (count, 2)).astype(np.float16).view(np.uint8).reshape(count, 4)
        if kind == GGMLType.Q6_K:
            blocks[:, 208:210] = numbers[:, :2]
        else:
            blocks[:, :4] = numbers
        return blocks.reshape(*values.shape[:-1], -1)


def as_tensor(name: str, values: np.ndarray, kind: GGMLType) -> gguf.ReaderTensor:
    """A tensor as it is read from a file."""
    data = stored(values, kind)
    return gguf.ReaderTensor(name, kind, np.array(values.shape[::-1]), values.size, data.nbytes, 0, data, None)  # type: ignore[arg-type]


def uneven(rows: int, columns: int) -> np.ndarray:
    """Weights with groups of zeros, of one value, far from 0, and with an outlier."""
    values = np.random.default_rng(0).normal(0, 0.02, (rows, columns)).astype(np.float32)
    values[0], values[1], values[2] = 0, 0.25, values[2] * 1e-4 + 3
    values[3, 5] = 4
    return values


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_codes_mean_the_weights_of_the_file(kind: GGMLType) -> None:
    """To a half's 11 bits of the scale and of the zero, whose rounding counts as often as the zero is away from the codes."""
    tensor = as_tensor("blk.0.attn_output.weight", uneven(16, 512), kind)
    exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, kind))
    form = TYPES[kind].form
    parts = form.pack(read_groups(tensor, form))
    assert {part.dtype for part in parts.values()} == {torch.uint8, torch.float16}
    found = form.of_layer("x", dict.fromkeys(parts, "")).unpack(parts)
    largest = exact.unflatten(1, (-1, form.group_size)).abs().amax(dim=2).repeat_interleave(form.group_size, dim=1)
    assert bool(((found.dequantize() - exact).abs() <= largest * 2**-10 + 1e-7).all())
    if kind in (GGMLType.Q4_0, GGMLType.Q5_0, GGMLType.Q8_0):
        torch.testing.assert_close(found.dequantize(), exact, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.Q5_1], ids=lambda kind: kind.name)
@pytest.mark.parametrize("size", [16, 32])
def test_wider_codes_and_smaller_groups_mean_the_same(kind: GGMLType, size: int) -> None:
    tensor = as_tensor("x", uneven(16, 512), kind)
    own, wide = (read_groups(tensor, form) for form in (TYPES[kind].form, BlockFormat(8, size)))
    assert (wide.bits, wide.group_size, wide.scales.shape[1]) == (8, size, 512 // size)
    torch.testing.assert_close(wide.dequantize(), own.dequantize(), rtol=1e-5, atol=1e-6)


def test_matrices_that_become_one_are_kept_alike() -> None:
    """A Q4_K_M file has values in Q6_K beside queries and keys in Q4_K."""
    kinds = {"attn_q": "Q4_K", "attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_0", "ffn_gate": "Q4_K", "ffn_up": "Q5_K",
             "ffn_down": "Q8_0", "ffn_norm": "F32", "ffn_gate_inp": "F32"}  # fmt: skip
    values = np.ones((16, 256), np.float32)
    tensors = [
        as_tensor(f"blk.{layer}.{name}.weight", values, GGMLType[kind]) for layer in (0, 1) for name, kind in kinds.items()
    ]
    tensors.append(as_tensor("blk.2.attn_q.weight", values, GGMLType.Q4_K))
    tensors += [as_tensor(name, values, GGMLType.Q8_0) for name in ("token_embd.weight", "output.weight")]
    found = {name: (form.bits, form.group_size) for name, form in formats(tensors).items()}
    expected = {"attn_q": (8, 16), "attn_k": (8, 16), "attn_v": (8, 16), "attn_output": (4, 32), "ffn_gate": (8, 32),
                "ffn_up": (8, 32), "ffn_down": (8, 32)}  # fmt: skip
    wanted = {f"blk.{layer}.{name}.weight": form for layer in (0, 1) for name, form in expected.items()}
    assert found == wanted | {"blk.2.attn_q.weight": (4, 32)}


def start(path: Path, **settings: object) -> LLM:
    return LLM(str(path), device="cpu", dtype="float32", kv_cache_memory_bytes=1 << 22, **settings)


def answers(llm: LLM) -> list[list[int]]:
    """Greedy tokens of two prompts at once."""
    prompts = [{"prompt_token_ids": PROMPT}, {"prompt_token_ids": PROMPT[::-1]}]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


def kernels(llm: LLM) -> set[str]:
    """What the matrices of layers are multiplied with, but for the head and routers."""
    executor = llm.llm_engine.executor
    assert isinstance(executor, UniProcExecutor)
    layers = {name: packed_of(layer) for name, layer in executor.worker.model.named_modules() if isinstance(layer, Linear)}
    inner = [name for name in layers if "lm_head" not in name and not name.endswith(".gate") and "embed_out" not in name]
    assert inner
    return {packed._kernel.function.__name__ if (packed := layers[name]) else "none" for name in inner}


@needs_kernels
@pytest.mark.parametrize("kind", slow_after(3, ["Q4_0", "Q8_0", "Q4_1", "Q5_0", "Q5_1"]))
def test_answers_are_those_of_the_whole_weights(tmp_path: Path, cache: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_tiny_llama(tmp_path / "model", **WIDE), GGMLType[kind])
    blocks, whole = start(path, quantization="gguf"), start(path)
    assert answers(blocks) == answers(whole)
    assert kernels(blocks) == {"linear_int4_f32" if kind.startswith("Q4") else "linear_codes8_f32"}
    assert kernels(whole) == {"linear_f32"}


@needs_kernels
@pytest.mark.parametrize("family", slow_after(2, FAMILIES))
def test_every_family_computes_on_blocks(tmp_path: Path, cache: Path, family: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_tiny(family, tmp_path / "model"), GGMLType.Q8_0)
    blocks = start(path, quantization="gguf")
    assert answers(blocks) == answers(start(path))
    assert kernels(blocks) == {"linear_codes8_f32"}


@needs_kernels
@pytest.mark.parametrize("settings", slow_after(1, [{}, {"tensor_parallel_size": 2}, {"enforce_eager": True}]), ids=str)
def test_a_file_of_several_types(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object]
) -> None:
    """As a Q4_K_M file has them: what becomes one matrix is of two types, and one type cannot stay as it is."""
    monkeypatch.setattr(gguf_files.gguf.quants, "quantize", partial(stored, quantize=gguf.quants.quantize))
    model = make_tiny_llama(tmp_path / "model", **WIDE | {"num_hidden_layers": 2})
    others = {"attn_v": GGMLType.Q6_K, "ffn_down": GGMLType.Q6_K, "attn_output": GGMLType.BF16, "token_embd": GGMLType.Q6_K}
    path = write_gguf(tmp_path / "tiny.gguf", model, GGMLType.Q4_K, others=others)
    blocks, whole = start(path, quantization="gguf", **settings), start(path)
    assert answers(blocks) == answers(whole)
    if not settings:
        assert kernels(blocks) == {"linear_int4_f32", "linear_codes8_f32", "linear_f32"}


@needs_kernels
def test_blocks_take_their_bytes_and_not_those_of_whole_weights(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", make_tiny_llama(tmp_path / "model", **WIDE | {"num_hidden_layers": 4}), GGMLType.Q4_0
    )
    sizes = [
        LLM(
            str(path), device="cpu", dtype="bfloat16", kv_cache_memory_bytes=1 << 20, quantization=way
        ).llm_engine.executor.weight_bytes
        for way in (None, "gguf")
    ]
    embedding = 2 * 262 * 256 * 2
    assert sizes[1] - embedding < (sizes[0] - embedding) * 0.36  # 5 bits of 16, and norms


@pytest.mark.parametrize("kind", ["F32", "Q2_K"])
def test_a_file_without_such_blocks_says_so(tmp_path: Path, cache: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_tiny_llama(tmp_path / "model", **WIDE), GGMLType[kind])
    with pytest.raises(ModelError, match=r"has no matrix in blocks of Q4_0, .*; leave the flag out"):
        resolve_model(str(path), quantization="gguf")
    assert not list((cache / "gguf").glob("*.partial"))


def test_both_folders_of_a_file_stay(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", make_tiny_llama(tmp_path / "model", **WIDE), GGMLType.Q4_0)
    folders = {resolve_model(str(path), quantization=way).path for way in ("gguf", None, "gguf", None)}
    assert len(folders) == 2
    assert all(folder is not None and folder.is_dir() for folder in folders)


def test_other_models_and_devices_refuse_it(tmp_path: Path, cache: Path) -> None:
    make_tiny_llama(tmp_path / "folder")
    with pytest.raises(ValueError, match=r"--quantization gguf computes on the blocks of a GGUF file, and .* is none"):
        LLM(str(tmp_path / "folder"), device="cpu", quantization="gguf")
    path = write_gguf(tmp_path / "tiny.gguf", make_tiny_llama(tmp_path / "model", **WIDE), GGMLType.Q4_0)
    with pytest.raises(ValueError, match="--quantization gguf needs the CPU kernels: they are switched off"):
        LLM(str(path), device="cpu", quantization="gguf", enable_cpu_kernels=False)


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [("max_num_seqs", "8", "a whole number"), ("max_num_seqs", True, "a whole number"), ("block_size", 16.0, "a whole number"),
     ("seed", None, "a whole number"), ("kv_offload_size", "4G", "a whole number"), ("max_model_len", "1k", "a whole number"),
     ("enable_prefix_caching", "no", "True or False"), ("enforce_eager", 1, "True or False")],
)  # fmt: skip
def test_a_setting_of_another_type_is_refused(field: str, value: object, kind: str) -> None:
    with pytest.raises(ValueError, match=f"{field}: {kind}, not {value!r}"):
        EngineConfig(**{field: value})
    assert EngineConfig(max_model_len=None).max_model_len is None


@pytest.mark.parametrize(
    ("field", "value"),
    [("quantization", "foo"), ("attention_backend", "flash"), ("kv_cache_dtype", "int4"), ("dtype", "int3"), ("device", "tpu"),
     ("preemption_mode", "x"), ("scheduling_policy", "x"), ("load_format", "x"), ("collective_backend", "x")],
)  # fmt: skip
def test_a_setting_that_is_none_of_its_choices_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"--{field.replace('_', '-')}: one of .*, not '{value}'"):
        EngineConfig(**{field: value})
