"""The C++ kernels of the layers against float64, and how they are built. Those of attention are in test_paged_attention.py."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from solutions.batching.sampling_params import SamplingParams
from solutions.core.capture import LayerReplay
from solutions.core.engine import LLM
from solutions.core.platform import native
from solutions.core.sampling.selection_cpu import native_argmax
from solutions.models.kernels.layers_cpu import NativeHeadNorm, NativeNorm, NativeRotation
from solutions.models.rope import rotate_
from solutions.quantization.kernels.linear_cpu import (
    INT8_GROUP,
    PackedLinear,
    pack,
    pack_groups,
    quantize_channels,
    supports,
    unpack,
)
from solutions.quantization.layout.groups import GroupQuantized, quantize_groups
from solutions.tests.slow_cases import slow_after
from solutions.tests.tiny_models import make_tiny_llama, make_tiny_mistral

HAVE_COMPILER = native.compiler() is not None
needs_kernels = pytest.mark.skipif(not HAVE_COMPILER, reason="no C++ compiler here, so there are no kernels to test")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)
SHAPES = [(32, 2), (33, 16), (64, 48), (31, 64), (576, 576), (100, 1536), (1, 6)]  # (rows, columns) of a matrix
BATCHES = [1, 2, 3, 7, 8, 9, 16, 23, 130]


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference relative to the largest expected value."""
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matrix_products(rows: int, columns: int, dtype: torch.dtype) -> None:
    weight, bias = random(rows, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    plain, biased = PackedLinear(weight, None), PackedLinear(weight, bias)
    for batch in BATCHES:
        x = random(batch, columns, dtype=dtype, seed=batch)
        expected = x.double() @ weight.double().T
        assert error(plain(x), expected) < TOLERANCE[dtype]
        assert error(biased(x), expected + bias.double()) < TOLERANCE[dtype]
        residual = random(batch, rows, dtype=dtype, seed=2)
        wanted = expected + residual.double()
        assert plain(x, add_to=residual) is residual
        assert error(residual, wanted) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_larger_tensor(dtype: torch.dtype) -> None:
    weight, x = random(40, 32, dtype=dtype), random(5, 64, dtype=dtype)
    assert error(PackedLinear(weight, None)(x[:, 32:]), x[:, 32:].double() @ weight.double().T) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_does_not_depend_on_the_rows_beside_it(dtype: torch.dtype, quantization: str | None) -> None:
    """What makes a token's logits the same bits alone and in any batch."""
    packed = PackedLinear(random(96, 64, dtype=dtype), None, quantization)
    x = random(37, 64, dtype=dtype)
    together = packed(x)
    for row in range(len(x)):
        assert torch.equal(packed(x[row : row + 1])[0], together[row])


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("half", [16, 48, 256])
def test_gate_and_up_in_one(half: int, dtype: torch.dtype, quantization: str | None) -> None:
    weight, bias = random(2 * half, 64, dtype=dtype), random(2 * half, dtype=dtype, seed=1)
    gated = PackedLinear(weight, bias, quantization, gated=True)
    for batch in (1, 8, 21):
        x = random(batch, 64, dtype=dtype, seed=batch) * 3
        gate, up = (x.double() @ weight.double().T + bias.double()).chunk(2, dim=-1)
        assert error(gated(x), F.silu(gate) * up) < (TOLERANCE[dtype] if quantization is None else 4e-2)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_silu_at_its_ends(dtype: torch.dtype) -> None:
    """A gate of any size: no overflow in the exponential on either side."""
    values = [-1e4, -200.0, -100.0, -88.0, -87.0, -20.0, -1.0, 0.0, 1.0, 20.0, 87.0, 88.0, 100.0, 1e4, 3e4, -3e4]
    weight = torch.zeros(32, 2, dtype=dtype)
    weight[:16, 0] = torch.tensor(values)
    weight[16:, 1] = 1
    got = PackedLinear(weight, None, gated=True)(torch.ones(1, 2, dtype=dtype))[0].double()
    expected = F.silu(weight[:16, 0].double())
    assert (got - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()
    assert torch.isfinite(got).all()


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (33, 96), (31, 112), (576, 576), (100, 1536)])
def test_int8(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Exactly the sums of the quantized numbers, which themselves are close to the real ones."""
    weight, bias = random(rows, columns, dtype=dtype), random(rows, dtype=dtype, seed=1)
    packed = PackedLinear(weight, bias, "int8")
    scale_w = weight.double().abs().amax(dim=1) / 127
    quantized = (weight.double() / scale_w[:, None]).round()
    for batch in BATCHES:
        x = random(batch, columns, dtype=dtype, seed=batch)
        exact = bias.double().repeat(batch, 1)
        for part, of_part in zip(x.double().split(INT8_GROUP, dim=1), quantized.split(INT8_GROUP, dim=1), strict=True):
            scale_x = part.abs().amax(dim=1, keepdim=True) / 127
            exact += ((part / scale_x).round() @ of_part.T) * scale_x * scale_w
        # a value that lies between two integers may be rounded either way in float32
        assert error(packed(x), exact) < (2e-3 if dtype is torch.float32 else 1e-2)
        assert error(packed(x), x.double() @ weight.double().T + bias.double()) < 3e-2


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("rows", "columns", "group"),
    slow_after(2, [(33, 64, 16), (31, 100, 32), (32, 2, 2), (64, 62, 64), (576, 576, 128), (100, 1536, 64)]),
)
def test_codes_in_groups(rows: int, columns: int, group: int, ordered: bool, bits: int, dtype: torch.dtype) -> None:
    """The products of what the codes stand for, whole groups and a short last one, in the columns' order and in another."""
    generator = torch.Generator().manual_seed(rows)
    num_groups = math.ceil(columns / group)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(rows, num_groups, generator=generator) * 0.1 + 0.01).half().float()
    scales[1:3] *= torch.tensor([[-1.0], [0.0]])  # a GGUF file's may have any sign
    zeros = torch.randint(0, 2**bits, (rows, num_groups), generator=generator).float()
    order = torch.randperm(columns, generator=generator) if ordered else None
    quantized = GroupQuantized(codes, scales, zeros, bits, group, order)
    packed = PackedLinear(quantized, bias := random(rows, dtype=dtype), dtype=dtype)
    weight = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(0, rows, 7):
        for column in range(columns):
            scale, zero = scales[row, column // group].item(), zeros[row, column // group].item()
            place = column if order is None else int(order[column])
            weight[row, place] = (codes[row, column].item() - zero) * scale
    for batch in BATCHES:
        x = random(batch, columns, dtype=dtype, seed=batch)
        expected = (x.double() @ weight.T + bias.double())[:, ::7]
        assert error(packed(x)[:, ::7], expected) < TOLERANCE[dtype]
        residual = random(batch, rows, dtype=dtype, seed=2)
        wanted = expected + residual.double()[:, ::7]
        assert error(packed(x, add_to=residual)[:, ::7], wanted) < TOLERANCE[dtype]


def rounded_to_bytes(x: np.ndarray, group: int) -> np.ndarray:
    """What int8 with a scale for each group of a row stands for, in float64."""
    parts = np.split(x, range(group, x.shape[1], group), axis=1)
    scales = [np.maximum(np.abs(part).max(axis=1, keepdims=True), 1e-30) / 127 for part in parts]
    return np.concatenate([np.round(part / scale) * scale for part, scale in zip(parts, scales, strict=True)], axis=1)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(32, 16), (33, 96), (31, 112), (576, 576), (100, 1536)])
def test_int4_with_activations_of_8_bits(rows: int, columns: int, dtype: torch.dtype) -> None:
    """Exactly the sums of the quantized numbers, whose zeros lie anywhere, on one side of 0 too."""
    weight, bias = random(rows, columns) + random(rows, 1, seed=3) * 4, random(rows, dtype=dtype, seed=1)
    packed = PackedLinear(weight.to(dtype), bias, "int4")
    quantized = quantize_groups(weight.to(dtype), 4, 32, whole_zeros=False)
    groups = np.arange(columns) // 32
    scales = quantized.scales.numpy().astype(np.float16).astype(np.float64)[:, groups]
    zeros = (quantized.zeros.numpy() - 8).astype(np.float16).astype(np.float64)[:, groups] + 8
    exact_weight = (quantized.codes.numpy() - zeros) * scales
    loud = random(1, columns, dtype=dtype)
    loud[0, 5] = 1e4  # beside it the others of its group vanish
    for x in [random(batch, columns, dtype=dtype, seed=batch) for batch in BATCHES] + [loud, torch.zeros_like(loud)]:
        expected = torch.from_numpy(rounded_to_bytes(x.double().numpy(), 32) @ exact_weight.T) + bias.double()
        # a value that lies between two integers may be rounded either way in float32
        assert error(packed(x), expected) < (2e-3 if dtype is torch.float32 else 1e-2)
        residual = random(len(x), rows, dtype=dtype, seed=2)
        wanted = expected + residual.double()
        assert error(packed(x, add_to=residual), wanted) < (2e-3 if dtype is torch.float32 else 1e-2)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_gate_and_up_in_one(bits: int, dtype: torch.dtype) -> None:
    weight, bias = random(96, 64), random(96, dtype=dtype, seed=1)
    quantized = quantize_groups(weight, bits, 32)
    quantized.scales = quantized.scales.half().float()
    gated = PackedLinear(quantized, bias, gated=True, dtype=dtype)
    for batch in (1, 8, 21):
        x = random(batch, 64, dtype=dtype, seed=batch)
        gate, up = (x.double() @ quantized.dequantize().double().T + bias.double()).chunk(2, dim=-1)
        assert error(gated(x), F.silu(gate) * up) < TOLERANCE[dtype]


@needs_kernels
def test_int4_keeps_weights_that_came_in_four_bits() -> None:
    """Groups of 32 on any 16 evenly spaced values, as in a Q4_1 file, are packed without a loss worth the name."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(64, 4, generator=generator).half().float()
    step = (torch.rand(64, 4, generator=generator) * 0.1 + 0.01).half().float()
    codes = torch.randint(0, 16, (64, 4, 32), generator=generator)
    codes[:, :, 0], codes[:, :, 1] = 0, 15  # the quantizer takes the step from the least and the largest
    weight = (codes * step[:, :, None] + low[:, :, None]).flatten(1)
    x = torch.randint(-127, 128, (3, 128), generator=generator).float()
    x[:, ::32] = 127  # so that bytes stand for them exactly
    assert error(PackedLinear(weight, None, "int4")(x), x.double() @ weight.double().T) < 1e-3


@needs_kernels
def test_codes_that_cannot_be_packed_are_refused() -> None:
    for columns, bits, group in [(7, 4, 2), (8, 4, 3), (7, 8, 2), (8, 8, 3)]:
        with pytest.raises(ValueError, match="codes need even numbers of columns"):
            pack_groups(quantize_groups(random(4, columns), bits, group))


@needs_kernels
def test_int8_of_nothing_and_of_the_extremes() -> None:
    weight = torch.zeros(32, 16)
    weight[0], weight[1, 0] = 5.0, -3.0
    x = torch.zeros(2, 16)
    x[1, 0] = -1e30
    got = PackedLinear(weight, None, "int8")(x)
    assert torch.equal(got[0], torch.zeros(32))
    torch.testing.assert_close(got[1, :3], torch.tensor([-5e30, 3e30, 0.0]))


@needs_kernels
def test_packing_is_undone_by_unpacking() -> None:
    for dtype, columns in ((torch.float32, 3), (torch.bfloat16, 6), (torch.int8, 8)):
        for rows in (1, 31, 32, 33, 96):
            weight = (random(rows, columns) * 50).to(dtype)
            assert torch.equal(unpack(pack(weight), rows), weight)


def test_channels_are_quantized_by_their_largest_value() -> None:
    quantized, scales = quantize_channels(torch.tensor([[1.27, -0.5, 0.0], [0.0, 0.0, 0.0], [-254.0, 127.0, 1.0]]))
    assert quantized.tolist() == [[127, -50, 0], [0, 0, 0], [-127, 64, 0]]
    torch.testing.assert_close(scales, torch.tensor([0.01, 0.0, 2.0]))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, 48, 576, 4096])
@pytest.mark.parametrize("tokens", [1, 4, 5, 33])
def test_rms_norm(tokens: int, size: int, dtype: torch.dtype) -> None:
    x, weight = random(tokens, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    wide = x.double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight.double())
    norm = NativeNorm(weight, 1e-5, offset=1.0)
    assert error(norm(x), expected) < TOLERANCE[dtype]
    stream = random(tokens, size, dtype=dtype, seed=2)
    total = stream.double() + expected
    assert norm(x, stream) is stream
    assert error(stream, total) < TOLERANCE[dtype]


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "heads", "size"), [(1, 1, 16), (5, 3, 48), (33, 4, 128)])
def test_norm_of_each_head(tokens: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """In place, and of no head but those that it is given."""
    qkv, weight = random(tokens, heads + 2, size, dtype=dtype), random(size, dtype=dtype, seed=1)
    qkv *= torch.arange(1, heads + 3)[:, None].to(dtype)  # heads that differ in length
    before = qkv.clone()
    wide = qkv[:, 1:-1].double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    again = qkv.clone()
    NativeHeadNorm(weight, 1e-5)(qkv[:, 1:-1])
    NativeHeadNorm(weight, 1e-5, offset=-2.0)(again[:, 1:-1])
    shifted = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (weight.double() - 2)
    assert error(again[:, 1:-1].flatten(1), shifted.flatten(1)) < TOLERANCE[dtype]
    assert error(qkv[:, 1:-1].flatten(1), expected.flatten(1)) < TOLERANCE[dtype]
    assert torch.equal(qkv[:, [0, -1]], before[:, [0, -1]])


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [1, 5, 33])
def test_rotation(tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    """The same as rotating pairs by definition, and only the heads that it is given."""
    qkv = random(tokens, 5, head_dim, dtype=dtype)
    angles = torch.rand(tokens, 1, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    cos, sin = angles.cos(), angles.sin()
    tables = (torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype))
    a, b = qkv[:, :4].double().chunk(2, dim=-1)
    c, s = (table[..., head_dim // 2 :].double() for table in tables)
    expected = torch.cat((a * c - b * s, b * c + a * s), -1)
    portable = rotate_(qkv[:, :4].clone(), tables)
    last = qkv[:, 4].clone()
    NativeRotation(head_dim, dtype)(qkv[:, :4], tables)
    assert error(qkv[:, :4].flatten(1), expected.flatten(1)) < TOLERANCE[dtype]
    assert error(portable.flatten(1), expected.flatten(1)) < TOLERANCE[dtype]
    assert torch.equal(qkv[:, 4], last)


# Choosing


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 1023, 1024, 1025, 49152])
def test_argmax_is_the_first_largest_and_nan_is_above_all(dtype: torch.dtype, width: int) -> None:
    x = random(5, 2 * width, dtype=dtype)[:, :width].mul(4).round()  # many equals; rows lie apart
    x[1] = -math.inf
    x[2, width // 2] = x[2, width - 1] = math.nan
    x[3, width - 1] = 99
    expected = [row.index(max(row)) for row in x.tolist()]
    expected[2] = width // 2
    assert native_argmax(x).tolist() == expected


# Recording


@needs_kernels
def test_a_recording_runs_again_on_what_its_buffers_hold_now() -> None:
    weight, norm_weight = random(32, 32), random(32, seed=1)
    product, norm = PackedLinear(weight, None), NativeNorm(norm_weight, 1e-5)
    x = torch.zeros(4, 32)
    with native.Recording(4) as recording:
        y = product(norm(x[:3]))
    x.copy_(random(4, 32, seed=2))
    recording.replay(3)
    assert torch.equal(y, product(norm(x[:3])))
    assert not torch.equal(y, torch.zeros(3, 32))
    for rows in (4, 1):
        x.copy_(random(4, 32, seed=2 + rows))
        recording.replay(rows)
        result = recording.buffer("linear", 4, 32, torch.float32)
        assert result.data_ptr() == y.data_ptr()
        assert torch.equal(result[:rows], product(norm(x[:rows])))
    first, second = product(x), product(x)  # outside a recording each result has memory of its own
    assert first.data_ptr() != second.data_ptr()


@needs_kernels
def test_threads_record_apart() -> None:
    """Two engines in one process: one records while the other does, and takes nothing from it."""
    mine, other, x = PackedLinear(random(32, 32), None), PackedLinear(random(32, 32, seed=5), None), random(2, 32)
    recordings = []

    def record_other() -> None:
        with native.Recording(2) as recording:
            other(x)
            other(x)
        recordings.append(recording)

    with native.Recording(2) as recording:
        mine(x)
        thread = threading.Thread(target=record_other)
        thread.start()
        thread.join()
        mine(x)
        mine(x)
    assert len(recording) == 3
    assert len(recordings[0]) == 2


@pytest.mark.slow
@needs_kernels
def test_a_new_cache_needs_new_recordings(tmp_path: Path) -> None:
    """Recordings hold addresses; those of a cache that is gone must not be written to."""
    make_tiny_llama(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=64)
    prompt, params = {"prompt_token_ids": [1, 2, 3]}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    first = llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids
    engine = llm.llm_engine
    old = engine.executor.worker.cache.kv_caches
    before = [cache.clone() for cache in old]
    engine.executor.create_cache(engine.limits.num_blocks, engine.config.block_size, 0)
    engine.block_manager.prefix_cache.clear()
    assert llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids == first
    assert all(torch.equal(a, b) for a, b in zip(old, before, strict=True))
    assert all(cache.abs().sum() > 0 for cache in engine.executor.worker.cache.kv_caches)


@needs_kernels
@pytest.mark.parametrize("change", ["another cache", "a longer prompt"])
def test_a_recording_that_failed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    make_tiny_llama(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=128, enable_prefix_caching=False)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    short, long = {"prompt_token_ids": [1, 2, 3]}, {"prompt_token_ids": list(range(1, 101))}
    expected = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in (short, long)]
    llm = LLM(str(tmp_path), dtype="float32", max_model_len=128, enable_prefix_caching=False)
    llm.generate(short, params, use_tqdm=False)
    engine = llm.llm_engine
    if change == "another cache":
        engine.executor.create_cache(engine.limits.num_blocks, engine.config.block_size, 0)
    replay = engine.executor.worker.model.model.run_layers
    assert isinstance(replay, LayerReplay)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(replay, "run_layers", fail)
        with pytest.raises(RuntimeError, match="planted"):
            llm.generate(short if change == "another cache" else long, params, use_tqdm=False)
    got = [llm.generate(prompt, params, use_tqdm=False)[0].outputs[0].token_ids for prompt in (short, long)]
    assert got == expected


@needs_kernels
@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
@pytest.mark.parametrize("make", [make_tiny_llama, make_tiny_mistral])
def test_replayed_steps_are_the_same_bits(tmp_path: Path, make: Callable[..., object], quantization: str | None) -> None:
    """Sequences that come and go make steps of every size; prefix cache, copies and preemption go on below them."""
    make(tmp_path, hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=96)
    prompts = [{"prompt_token_ids": [(7 * i + j) % 250 for j in range(1 + 5 * i)]} for i in range(9)]
    params = [SamplingParams(temperature=0, max_tokens=3 + 4 * i, ignore_eos=True, n=1 + i % 2) for i in range(9)]
    texts = []
    for eager in (True, False):
        llm = LLM(
            str(tmp_path), dtype="float32", max_model_len=256, enforce_eager=eager, num_gpu_blocks_override=20, block_size=16,
            quantization=quantization,
        )  # fmt: skip
        replay = llm.llm_engine.executor.worker.model.model.run_layers
        assert isinstance(replay, LayerReplay) == (not eager)
        llm.generate(prompts[0], params[0], use_tqdm=False)
        outputs = [llm.generate(prompts, params, use_tqdm=False) for _ in range(2)]
        texts.append([[one.token_ids for one in output.outputs] for run in outputs for output in run])
        if not eager:
            assert replay.num_recordings == 2  # of a few tokens, then of more; between them steps of all sizes
    assert texts[0] == texts[1]


# Building


@pytest.mark.slow
@needs_kernels
def test_kernels_are_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")
    first = native.build(tmp_path)
    assert first.suffix == ".so"
    time_of_build = first.stat().st_mtime_ns
    assert native.build(tmp_path) == first
    assert first.stat().st_mtime_ns == time_of_build
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"another_processor"}))
    assert native.build(tmp_path) != first
    assert not list(tmp_path.glob("*.part"))


def test_set_up_says_in_one_line_what_the_layers_run_on() -> None:
    run = subprocess.run([sys.executable, "-m", "solutions.core.platform.native"], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("C++ kernels are ready" if HAVE_COMPILER else "No C++ kernels")
    assert run.stdout.count("\n") == 1


@pytest.mark.slow
@needs_kernels
def test_a_source_that_does_not_compile_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXXFLAGS", "-O0")
    folder = tmp_path / "mine"
    source = folder / "models" / "kernels" / "layers_cpu.cpp"
    source.parent.mkdir(parents=True)
    source.write_text("int broken( {")
    package = sys.modules["solutions"]
    monkeypatch.setattr(package, "__path__", [str(folder), *package.__path__])
    assert native.find_source("models/kernels/layers_cpu.cpp") == source
    with pytest.raises(native.BuildError, match=r"(?s)could not compile.*layers_cpu\.cpp"):
        native.build(tmp_path / "cache")


def test_without_a_compiler_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(native.BuildError, match=r"no C\+\+ compiler"):
        native.build(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no nothing\.cpp"):
        native.find_source("nothing.cpp")


def test_what_has_no_kernel_is_left_to_pytorch() -> None:
    assert not supports(torch.float16, 64)
    assert not supports(torch.bfloat16, 63)
    assert not supports(torch.bfloat16, 40, "int8")
