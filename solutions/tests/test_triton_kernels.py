"""The Triton kernels against float64: compiled where there is a GPU, interpreted on the CPU where there is none."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from solutions.attention import paged_attention_triton
from solutions.attention.paged_attention_triton import (
    DECODE_CONFIGS,
    PREFILL_CONFIGS,
    SHARED_MEMORY,
    Config,
    TritonBackend,
    problem,
)
from solutions.models.rope import rotate_
from solutions.tests.attention_cases import (
    BLOCK_SIZES,
    HEAD_DIMS,
    HEADS,
    WINDOWS,
    AttentionCase,
    contexts,
    make_case,
    mixed_lens,
    quantize_int8,
    relative_error,
)

pytest.importorskip("triton", reason="Triton is not installed, so there are no kernels to test")
from solutions.models.kernels.layers_triton import norm_heads_, rms_norm, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}
# Every pair of (heads, block size) and of (block size, window); head size and window turn along. The interpreter is slow.
GRID = [
    (heads, HEAD_DIMS[(i + j) % len(HEAD_DIMS)], block_size, WINDOWS[(i + j) % len(WINDOWS)])
    for i, heads in enumerate(HEADS)
    for j, block_size in enumerate(BLOCK_SIZES)
]


def boundary_lens(block_size: int) -> tuple[list[int], list[int]]:
    """Decodes and chunks whose contexts end at and beside multiples of the block size and of the kernels' tiles of keys."""
    decodes = [(1, block_size + d) for d in (-1, 0, 1) if block_size + d > 0]
    chunks = [(min(q, 2 * block_size + d), 2 * block_size + d) for q, d in ((2, -1), (3, 0), (17, 1))]
    query_lens, context_lens = zip(*decodes, (1, 300), *chunks, (65, 65), strict=True)
    return list(query_lens), list(context_lens)


def check(case: AttentionCase, backend: TritonBackend, dtype: torch.dtype = torch.float32) -> None:
    out = case.run(backend)
    assert out.dtype == dtype
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), case.expected(), rtol=0, atol=1e-5)
    else:
        assert relative_error(out, case.expected()) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID)
def test_mixed_batch(heads: tuple[int, int], head_dim: int, block_size: int, window: int | None) -> None:
    query_lens, context_lens = (mixed_lens if DEVICE == "cuda" else boundary_lens)(block_size)
    case = make_case(
        query_lens, context_lens, heads=heads, head_dim=head_dim, block_size=block_size, window=window, device=DEVICE
    )
    check(case, TritonBackend())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID[1::7])
def test_half_precision(heads: tuple[int, int], head_dim: int, block_size: int, window: int | None, dtype: torch.dtype) -> None:
    query_lens, context_lens = boundary_lens(block_size)
    case = make_case(
        query_lens,
        context_lens,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        window=window,
        dtype=dtype,
        device=DEVICE,
    )
    check(case, TritonBackend(), dtype)


def test_large_scores_keep_their_precision() -> None:
    """Scores around 60, as attention sinks have: rounded to bfloat16 they are wrong by up to 0.125, and so are the weights."""
    case = make_case([1, 40], [300, 200], heads=(4, 2), dtype=torch.bfloat16, device=DEVICE)
    case.query *= 20
    check(case, TritonBackend(), torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("num_splits", [2, 5])
def test_splits_of_a_context(num_splits: int, window: int | None) -> None:
    """Some contexts are shorter than one tile, so most of their splits are empty."""
    case = make_case([1] * 8, [1, 2, 15, 16, 17, 33, 140, 300], heads=(3, 1), head_dim=80, window=window, device=DEVICE)
    check(case, TritonBackend(num_splits=num_splits, config=Config(16, 16, 1, 1)))
    check(case, TritonBackend(num_splits=num_splits))


@pytest.mark.slow
@pytest.mark.parametrize("config", [*DECODE_CONFIGS, *PREFILL_CONFIGS], ids=str)
def test_every_configuration(config: Config) -> None:
    lens = [config.block_n + d for d in (-1, 0, 1)]
    case = make_case([1, 1, 1, 50], [*lens, 70], heads=(6, 2), window=100, dtype=torch.bfloat16, device=DEVICE)
    check(case, TritonBackend(config=config), torch.bfloat16)


def test_more_heads_to_a_kv_head_than_rows_to_a_tile() -> None:
    check(make_case([1, 5], [9, 20], heads=(40, 1), device=DEVICE), TritonBackend(config=Config(16, 16, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
def test_reads_blocks_that_another_sequence_writes_in_this_step(window: int | None) -> None:
    case = make_case([70, 10, 1], [70, 50, 49], block_size=8, window=window, readers={1: 0, 2: 0}, device=DEVICE)
    assert case.block_tables[0, 3] == case.block_tables[1, 3]
    check(case, TritonBackend())


def test_slices_of_a_fused_projection() -> None:
    case = make_case([5, 1], [20, 9], heads=(6, 2), device=DEVICE)
    fused = torch.cat([case.query, case.key, case.value], dim=1)  # [T, H + 2·H_kv, D]
    case.query, case.key, case.value = fused.split([6, 2, 2], dim=1)
    assert not case.key.is_contiguous()
    check(case, TritonBackend())


def test_layers_may_differ_in_window() -> None:
    case, backend = make_case([3, 50], [60, 80], device=DEVICE), TritonBackend()
    for case.window in (None, 10, None):
        check(case, backend)


def test_results_do_not_disturb_each_other() -> None:
    """Partial results share memory between calls: an earlier output must not change, whatever size comes next."""
    backend = TritonBackend(num_splits=2)
    cases = [
        make_case([1] * n, [40 * n] * n, heads=heads, device=DEVICE) for n, heads in ((1, (4, 2)), (3, (4, 4)), (2, (4, 2)))
    ]
    results = [case.run(backend) for case in cases]
    for case, result in zip(cases, results, strict=True):
        torch.testing.assert_close(result.double(), case.expected(), rtol=0, atol=1e-5)
        assert torch.equal(case.run(backend), result)


def test_writes_exactly_the_new_slots() -> None:
    case = make_case([1, 7], [17, 7], heads=(6, 3), block_size=4, device=DEVICE)
    metadata = case.metadata(backend := TritonBackend())
    backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    slots = metadata.kv_caches[0].flatten(1, 2)
    expected = case.kv_cache.flatten(1, 2).clone()
    expected[:, case.slot_mapping] = torch.stack([case.key, case.value])
    torch.testing.assert_close(slots, expected, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_is_neither_stored_nor_read(num_splits: int) -> None:
    """A batch padded for a CUDA graph: its last tokens have slot −1 and their sequences context 0 and no blocks."""
    case = make_case([1, 1, 1], [17, 40, 5], block_size=8, device=DEVICE)
    metadata = case.metadata(backend := TritonBackend(num_splits=num_splits))
    padding = case.query.new_full((2, *case.query.shape[1:]), float("nan"))
    metadata.slot_mapping = F.pad(metadata.slot_mapping, (0, 2), value=-1)
    metadata.block_tables = F.pad(metadata.block_tables, (0, 0, 0, 2), value=2**30)
    metadata.query_start_loc = torch.arange(6, dtype=torch.int32, device=DEVICE)
    metadata.context_lens = F.pad(metadata.context_lens, (0, 2))
    query = torch.cat([case.query, padding])
    key, value = (torch.cat([x, padding[:, : x.shape[1]]]) for x in (case.key, case.value))
    slots_before = metadata.kv_caches[0].flatten(1, 2).clone()
    out = backend.attend(0, query, key, value, metadata, case.scale)
    torch.testing.assert_close(out[:3].double(), case.expected(), rtol=0, atol=1e-5)
    assert torch.equal(out[3:], torch.zeros_like(out[3:]))
    slots_before[:, case.slot_mapping] = torch.stack([case.key, case.value])
    torch.testing.assert_close(metadata.kv_caches[0].flatten(1, 2), slots_before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rotates_on_the_way(head_dim: int, dtype: torch.dtype) -> None:
    """As `rotate_` in float64; the cached context was rotated when it was written."""
    case = make_case([1, 9], [20, 30], heads=(6, 2), head_dim=head_dim, dtype=dtype, device=DEVICE)
    angles = torch.rand(10, 1, head_dim // 2, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    rope = tuple(torch.cat(x, dim=-1).to(dtype) for x in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin())))
    in_float64 = tuple(x.double() for x in rope)
    query = case.query.clone()
    metadata = case.metadata(backend := TritonBackend())
    metadata.rope = rope
    out = backend.attend(0, query, case.key, case.value, metadata, case.scale)

    rotated_query, rotated_key = rotate_(case.query.double(), in_float64), rotate_(case.key.double(), in_float64)
    step = torch.finfo(dtype).eps
    stored = metadata.kv_caches[0].flatten(1, 2)[:, case.slot_mapping].double()
    torch.testing.assert_close(query.double(), rotated_query, rtol=step, atol=step)
    torch.testing.assert_close(stored[0], rotated_key, rtol=step, atol=step)
    assert torch.equal(stored[1], case.value.double())
    case.query = rotated_query
    for context, new in zip(case.keys, rotated_key.to(dtype).split(case.query_lens), strict=True):
        context[-len(new) :] = new
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), case.expected(), rtol=0, atol=1e-5)
    else:
        assert relative_error(out, case.expected()) < TOLERANCE[dtype]


@pytest.mark.slow
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("kind", "distance"), [(torch.int8, 0.02), (torch.float8_e4m3fn, 0.1)], ids=str)
def test_quantized_cache(kind: torch.dtype, distance: float, dtype: torch.dtype, num_splits: int) -> None:
    """Exact for the numbers that the cache holds, and those near the real ones."""
    query_lens = [1, 1, 1] if num_splits > 1 else [1, 8, 33]
    case = make_case(query_lens, [31, 80, 33], heads=(6, 2), dtype=dtype, device=DEVICE)
    unquantized = case.expected()
    metadata = case.metadata(backend := TritonBackend(num_splits=num_splits))
    if kind == torch.int8:
        quantized, scales = quantize_int8(case.kv_cache.float())
        metadata.kv_caches, metadata.kv_scales = [quantized], [scales]
    else:
        metadata.kv_caches = [case.kv_cache.to(kind)]
    metadata.plan = backend.plan(metadata, None)
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale)

    cache = metadata.kv_caches[0].double()
    if kind == torch.int8:
        cache = cache * metadata.kv_scales[0].double()[..., None]
        stored = cache.flatten(1, 2)[:, case.slot_mapping]
        new = torch.stack([case.key, case.value]).double()
        half_step = new.abs().amax(dim=-1, keepdim=True) / 127 / 2
        assert ((stored - new).abs() <= half_step * 1.003).all()
    else:
        stored = metadata.kv_caches[0].flatten(1, 2)[:, case.slot_mapping]
        wanted = torch.stack([case.key, case.value]).to(kind)
        # the interpreter cuts bits off below 2**-6, where steps are 2**-9
        torch.testing.assert_close(stored.float(), wanted.float(), rtol=0, atol=0 if DEVICE == "cuda" else 2**-9)
    case.keys, case.values = contexts(cache[0], case), contexts(cache[1], case)
    if dtype == torch.float32:
        torch.testing.assert_close(out.double(), case.expected(), rtol=0, atol=1e-5)
    else:
        assert relative_error(out, case.expected()) < TOLERANCE[dtype]
    assert 1e-4 < relative_error(out, unquantized) < distance


def test_small_values_of_an_int8_cache_in_float16() -> None:
    """Weights times scales lie below what float16 holds; their sums do not."""
    case = make_case([1, 3], [80, 40], heads=(4, 2), dtype=torch.float16, device=DEVICE)
    case.value *= 1e-3
    metadata = case.metadata(backend := TritonBackend())
    quantized, scales = quantize_int8(case.kv_cache.float() * torch.tensor([1, 1e-3], device=DEVICE).view(2, 1, 1, 1, 1))
    metadata.kv_caches, metadata.kv_scales = [quantized], [scales]
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    cache = quantized.double() * scales.double()[..., None]
    case.keys, case.values = contexts(cache[0], case), contexts(cache[1], case)
    assert relative_error(out, case.expected()) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e6])
def test_queries_of_any_size_over_a_float8_cache(size: float) -> None:
    """They are multiplied in float16, which holds neither a million nor 1e-20."""
    case = make_case([1, 3], [20, 40], heads=(4, 2), dtype=torch.bfloat16, device=DEVICE)
    case.kv_cache.copy_(case.kv_cache.to(torch.float8_e4m3fn))
    for new in (case.key, case.value):
        new.copy_(new.to(torch.float8_e4m3fn))
    case.keys, case.values = ([x.to(torch.float8_e4m3fn).double() for x in each] for each in (case.keys, case.values))
    case.query.mul_(size)
    case.scale /= max(size, 1e-20)
    metadata = case.metadata(backend := TritonBackend())
    metadata.kv_caches = [case.kv_cache.to(torch.float8_e4m3fn)]
    out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    assert relative_error(out, case.expected()) < TOLERANCE[torch.bfloat16]


def test_what_a_quantized_cache_does_at_its_ends() -> None:
    """A vector of zeros has scale 0 and stays zeros; float8 saturates at 448, where a plain cast would give NaN."""
    case = make_case([2], [2], heads=(1, 1), device=DEVICE)
    case.key[:] = torch.tensor([0.0, 1e6], device=DEVICE)[:, None, None]
    case.value[:] = torch.tensor([-1e6, 0.0], device=DEVICE)[:, None, None]
    metadata = case.metadata(backend := TritonBackend())
    metadata.kv_caches = [case.kv_cache.to(torch.float8_e4m3fn)]
    backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    stored = metadata.kv_caches[0].flatten(1, 2)[:, case.slot_mapping].float()
    assert stored[..., 0, 0].tolist() == [[0, 448], [-448, 0]]
    metadata.kv_caches, metadata.kv_scales = ([x] for x in quantize_int8(case.kv_cache))
    backend.attend(0, case.query, case.key, case.value, metadata, case.scale)
    assert metadata.kv_caches[0].flatten(1, 2)[:, case.slot_mapping, 0, 5].tolist() == [[0, 127], [-127, 0]]
    scales = metadata.kv_scales[0].flatten(1, 2)[:, case.slot_mapping, 0]
    torch.testing.assert_close(scales.float().cpu(), torch.tensor([[0, 1e6 / 127], [1e6 / 127, 0]]), rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
@pytest.mark.parametrize("hidden", [1, 64, 576, 1000])
def test_rms_norm(hidden: int, dtype: torch.dtype) -> None:
    rng = torch.Generator().manual_seed(hidden)
    wide = torch.randn(5, 2 * hidden, generator=rng).to(DEVICE, dtype)
    x = wide[:, :hidden]
    weight = torch.randn(hidden, generator=rng).to(DEVICE, dtype)

    expected = x.double() / (x.double().pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    step = max(torch.finfo(dtype).eps, 1e-6)
    normed = rms_norm(x, weight=weight, eps=1e-5)
    assert normed.dtype == dtype
    torch.testing.assert_close(normed.double(), expected, rtol=step, atol=step)
    stream = torch.randn(5, hidden, generator=rng).to(DEVICE, dtype)
    total = stream.double() + expected
    assert rms_norm(x, stream, weight=weight, eps=1e-5) is stream
    torch.testing.assert_close(stream.double(), total, rtol=step, atol=2 * step)


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
def test_norm_of_each_head(dtype: torch.dtype) -> None:
    """In place, and of no head but those that it is given."""
    rng = torch.Generator().manual_seed(1)
    qkv = torch.randn(3, 5, 48, generator=rng).to(DEVICE, dtype) * torch.arange(1, 6, device=DEVICE)[:, None].to(dtype)
    weight = torch.randn(48, generator=rng).to(DEVICE, dtype)
    before, wide = qkv.clone(), qkv[:, 1:4].double()
    expected = wide / (wide.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    norm_heads_(qkv[:, 1:4], weight, 1e-5)
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(qkv[:, 1:4].double(), expected, rtol=step, atol=step)
    assert torch.equal(qkv[:, [0, 4]], before[:, [0, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, *TOLERANCE], ids=str)
@pytest.mark.parametrize("size", [1, 48, 1536])
def test_silu_mul(size: int, dtype: torch.dtype) -> None:
    gate_up = (torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(size)) * 20).to(DEVICE, dtype)
    gate_up[0, 0], gate_up[1, 0], gate_up[1, size] = -1e4, 1e4, 0.5  # no overflow at either end
    gate, up = gate_up.double().chunk(2, dim=-1)
    step = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(silu_mul(gate_up).double(), gate / (1 + torch.exp(-gate)) * up, rtol=step, atol=step)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "expected"),
    [
        ("cpu", torch.float64, 64, "no code for float64"),
        ("cpu", torch.float32, 512, "even and at most 256, the model's is 512"),
        ("cpu", torch.float32, 63, "even and at most 256, the model's is 63"),
        ("meta", torch.float32, 64, "not on meta"),
    ],
)
def test_says_what_it_cannot_do(device: str, dtype: torch.dtype, head_dim: int, expected: str) -> None:
    assert expected in problem(torch.device(device), dtype, head_dim, 16)


def test_runs_here_or_says_that_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert problem(torch.device(DEVICE), torch.bfloat16, 64, 16) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert problem(torch.device(DEVICE), torch.bfloat16, 64, 16) == "Triton is not installed"


def splits_for(monkeypatch: pytest.MonkeyPatch, sms: int, batch: int, context_len: int, window: int | None = None) -> int:
    monkeypatch.setattr(paged_attention_triton, "num_sms", lambda device: sms)
    case = make_case([1] * batch, [1] * batch)
    metadata = case.metadata(backend := TritonBackend())
    metadata.max_context_len = context_len
    return backend._splits(batch * 2, metadata, window, torch.device("cpu"))


def test_splits_fill_the_device_and_are_worth_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    assert splits_for(monkeypatch, 108, 1, 100_000) == 64  # at most
    assert splits_for(monkeypatch, 108, 1, 1100) == 4  # 256 keys at least
    assert splits_for(monkeypatch, 108, 1, 100_000, window=600) == 2
    assert splits_for(monkeypatch, 108, 32, 100_000) == 4  # 432 programs wanted, 64 there, a power of two
    assert splits_for(monkeypatch, 108, 256, 100_000) == 1
    assert splits_for(monkeypatch, 1, 1, 100_000) == 2


FAULTS = {
    "a query does not see itself": ("key_position[None, :] <= position[:, None]", "key_position[None, :] < position[:, None]"),
    "the last key of a tile of keys is lost": ("is_key = key_position < right", "is_key = key_position < right - 1"),
    "the last tile is lost if it has one key": ("in range(left, right, BLOCK_N)", "in range(left, right - 1, BLOCK_N)"),
    "one key too many in the window": ("> position[:, None] - WINDOW)", ">= position[:, None] - WINDOW)"),
    "the next block": ("+ key_position // BLOCK_SIZE", "+ (key_position + 1) // BLOCK_SIZE"),
    "the wrong place in a block": ("+ key_position % BLOCK_SIZE)", "+ (key_position - left) % BLOCK_SIZE)"),
    "hidden keys count": ('tl.where(is_visible, scores, float("-inf"))', "tl.where(is_visible, scores, 0.0)"),
    "sums are not rescaled": ("v, acc * shrink[:, None]", "v, acc"),
    "splits are merged without their tops": (
        "tl.exp2(tops - tl.where(top == float(\"-inf\"), 0.0, top))", "tl.where(is_split, 1.0, 0.0)",
    ),
    "a row that has seen no key is not a number": ('base = tl.where(new_top == float("-inf"), 0.0, new_top)', "base = new_top"),
    "a tile belongs to the sequence before": ("// BLOCK_Q + middle <= tile", "// BLOCK_Q + middle < tile"),
    "heads of a group in the wrong order": ("kv_head * GROUP + row % GROUP  #", "row % GROUP * H_KV + kv_head  #"),
}  # fmt: skip


def load_with_fault(old: str, new: str, folder: Path) -> ModuleType:
    """The kernels' module with one text, which occurs once, replaced."""
    original = Path(importlib.util.find_spec("solutions.attention.paged_kernels_triton").origin).read_text()
    assert original.count(old) == 1
    path = folder / "faulty_kernels.py"
    path.write_text(original.replace(old, new))
    spec = importlib.util.spec_from_file_location("solutions.attention.faulty_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_faults_case(backend: TritonBackend) -> None:
    """A decode in splits and a mixed batch. Tables hold nothing out of range: a faulty kernel must not end the process."""
    for query_lens, window in (([1] * 6, None), ([1, 1, 7, 1, 20, 1], 20)):
        case = make_case(
            query_lens, [15, 16, 17, 33, 40, 65], heads=(6, 2), head_dim=16, block_size=8, window=window, device=DEVICE
        )
        case.block_tables.clamp_(0, case.kv_cache.shape[1] - 1)
        check(case, backend)


def test_the_kernels_without_a_fault(tmp_path: Path) -> None:
    backend = TritonBackend(num_splits=3, config=Config(64, 16, 1, 1))
    backend.kernels = load_with_fault(
        "BLOCK_Q: tl.constexpr = BLOCK_M // GROUP", "BLOCK_Q: tl.constexpr = BLOCK_M // GROUP", tmp_path
    )
    check_faults_case(backend)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, tmp_path: Path) -> None:
    backend = TritonBackend(num_splits=3, config=Config(64, 16, 1, 1))
    backend.kernels = load_with_fault(*FAULTS[fault], tmp_path)
    with pytest.raises(AssertionError):
        check_faults_case(backend)


@pytest.mark.slow
def test_compiles_for_cards_that_are_not_here() -> None:
    """Ahead of time, for compute capability 8.0 and 9.0, the first configurations: the code is accepted and fits."""
    run = subprocess.run(
        [sys.executable, "-m", "solutions.tests.compile_triton"], capture_output=True, text=True, check=False, timeout=280
    )
    assert run.returncode == 0, run.stderr
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    of_float8 = ("round_kernel", "float8_kernel", "grouped_float8_kernel")
    others = ("w4a16_kernel", "shrink", "expand", "grouped_kernel", "norm_kernel", "silu_mul_kernel")
    assert {(r["kernel"], r["capability"], r["head_dim"]) for r in reports} == {
        (kernel, capability, dim)
        for kernel in ("write_kv", "attend", "merge_splits")
        for capability in (80, 90)
        for dim in (64, 128)
    } | {(kernel, capability, 0) for kernel in others for capability in (80, 90)} | {
        (kernel, capability, 0) for kernel in of_float8 for capability in (89, 90)
    } | {("attend", capability, 512) for capability in (80, 90)}
    for report in reports:
        assert report["shared"] <= SHARED_MEMORY, report
        assert report["spilled"] == 0 or report["variant"].startswith(("i8 cache", "fp8e4nv cache")), report
