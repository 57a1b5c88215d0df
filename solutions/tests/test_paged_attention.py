"""Paged attention against attention over contiguous keys and values in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from solutions.attention.backends import make_backend
from solutions.attention.paged_attention import AttentionBackend
from solutions.attention.paged_attention_torch import PIECE, cut_into_pieces, group_pieces
from solutions.memory.cache_engine import write_kv
from solutions.tests.attention_cases import (
    BLOCK_SIZES,
    HEAD_DIMS,
    HEADS,
    WINDOWS,
    AttentionCase,
    make_case,
    mixed_lens,
    relative_error,
)

BACKENDS = ("naive", "torch", "cpu")
# Every pair of (heads, block size), of (heads, window) and of (block size, window); the head size turns along.
GRID = [
    (heads, HEAD_DIMS[(i + j + k) % len(HEAD_DIMS)], block_size, window)
    for i, heads in enumerate(HEADS)
    for j, block_size in enumerate(BLOCK_SIZES)
    for k, window in enumerate(WINDOWS)
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return make_backend(request.param, "cpu", torch.float32, 64)


def by_definition(case: AttentionCase) -> torch.Tensor:
    """softmax(q·k)·v for one token and one head after the other."""
    rows = []
    for i, queries in enumerate(case.query.double().split(case.query_lens)):
        for j, q in enumerate(queries):
            position = case.context_lens[i] - case.query_lens[i] + j
            left = 0 if case.window is None else max(0, position - case.window + 1)
            group = q.shape[0] // case.keys[i].shape[1]
            heads = []
            for h in range(q.shape[0]):
                k = case.keys[i][left : position + 1, h // group].double()
                v = case.values[i][left : position + 1, h // group].double()
                weights = torch.exp(k @ q[h] * case.scale)
                heads.append(weights @ v / weights.sum())
            rows.append(torch.stack(heads))
    return torch.stack(rows)


@pytest.mark.parametrize("window", [None, 5])
def test_the_oracle_is_the_definition(window: int | None) -> None:
    case = make_case([1, 7, 9], [9, 7, 20], heads=(4, 2), head_dim=8, block_size=4, window=window)
    torch.testing.assert_close(case.expected(), by_definition(case), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID)
def test_mixed_batch(backend: AttentionBackend, heads: tuple, head_dim: int, block_size: int, window: int | None) -> None:
    query_lens, context_lens = mixed_lens(block_size)
    case = make_case(query_lens, context_lens, heads=heads, head_dim=head_dim, block_size=block_size, window=window)
    torch.testing.assert_close(case.run(backend).double(), case.expected(), rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in BACKENDS), ("naive", torch.float16), ("torch", torch.float16)]
)
@pytest.mark.parametrize(("heads", "head_dim", "block_size", "window"), GRID[::7])
def test_half_precision(
    name: str, heads: tuple, head_dim: int, block_size: int, window: int | None, dtype: torch.dtype
) -> None:
    backend = make_backend(name, "cpu", dtype, head_dim)
    query_lens, context_lens = mixed_lens(block_size)
    case = make_case(
        query_lens, context_lens, heads=heads, head_dim=head_dim, block_size=block_size, window=window, dtype=dtype
    )
    out = case.run(backend)
    assert out.dtype == dtype
    assert relative_error(out, case.expected()) < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_large_scores_keep_their_precision(backend: AttentionBackend) -> None:
    """Scores around 60, as attention sinks have: rounded to bfloat16 they are wrong by up to 0.125, and so are the weights."""
    case = make_case([1, 40], [300, 200], heads=(4, 2), dtype=torch.bfloat16)
    case.query *= 20
    assert relative_error(case.run(backend), case.expected()) < 2e-2


@pytest.mark.parametrize("window", [None, 256])
def test_long_contexts(backend: AttentionBackend, window: int | None) -> None:
    case = make_case([1, 100, 1], [4000, 4097, 3], heads=(9, 3), window=window)
    torch.testing.assert_close(case.run(backend).double(), case.expected(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("soft_cap", [0.3, 50.0])
def test_soft_caps(backend: AttentionBackend, soft_cap: float) -> None:
    """A cap far below the scores, one that they hardly feel, and scores beyond what exponentials hold."""
    for factor in (1.0, 300.0):
        case = make_case([1, 100, 7, 1], [300, 130, 7, 1], heads=(6, 2), window=70)
        case.soft_cap = soft_cap
        case.query *= factor
        torch.testing.assert_close(case.run(backend).double(), case.expected(), rtol=0, atol=2e-5 * max(1.0, soft_cap / 10))


@pytest.mark.parametrize("batch", [1, 2, 90])
def test_decode_batches(backend: AttentionBackend, batch: int) -> None:
    lengths = torch.randint(1, 400, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    case = make_case([1] * batch, lengths, heads=(9, 3))
    torch.testing.assert_close(case.run(backend).double(), case.expected(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [None, 20])
def test_reads_blocks_that_another_sequence_writes_in_this_step(backend: AttentionBackend, window: int | None) -> None:
    case = make_case([70, 10, 1], [70, 50, 49], block_size=8, window=window, readers={1: 0, 2: 0})
    assert case.block_tables[0, 3] == case.block_tables[1, 3]
    torch.testing.assert_close(case.run(backend).double(), case.expected(), rtol=0, atol=1e-5)


def test_query_of_a_larger_tensor(backend: AttentionBackend) -> None:
    """Models hand over slices of one fused projection, which are not contiguous."""
    case = make_case([5, 1], [20, 9])
    expected = case.run(backend)
    for name in ("query", "key", "value"):
        x = getattr(case, name)
        setattr(case, name, torch.cat([x, x], dim=-1)[..., : x.shape[-1]])
    assert not case.query.is_contiguous()
    torch.testing.assert_close(case.run(backend), expected, rtol=0, atol=1e-6)


def test_layers_and_steps_do_not_disturb_each_other(backend: AttentionBackend) -> None:
    """Scratch memory is shared: an earlier result must not change, whatever size and dtype comes next."""
    cases = [make_case([1, 30], [40, 90], seed=1), make_case([2], [5], dtype=torch.bfloat16), make_case([1] * 40, [99] * 40)]
    results = [case.run(backend) for case in cases]
    for case, result in zip(cases, results, strict=True):
        assert relative_error(result, case.expected()) < 2e-2
        torch.testing.assert_close(case.run(backend), result, rtol=0, atol=0)


def test_inference_mode_and_others_share_a_backend(backend: AttentionBackend) -> None:
    case = make_case([1, 20], [30, 40], dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = case.run(backend)
    with torch.no_grad():
        torch.testing.assert_close(case.run(backend), inside, rtol=0, atol=0)


def test_layers_may_differ_in_window(backend: AttentionBackend) -> None:
    """Some models alternate full and windowed layers; a plan made for one window must not serve another."""
    case = make_case([3, 50], [60, 80])
    metadata = case.metadata(backend)
    metadata.plan = backend.plan(metadata, None)
    for window in (None, 10, None):
        case.window = window
        out = backend.attend(0, case.query, case.key, case.value, metadata, case.scale, window)
        torch.testing.assert_close(out.double(), case.expected(), rtol=0, atol=1e-5)


def test_writes_exactly_the_new_slots(backend: AttentionBackend) -> None:
    case = make_case([1, 7], [17, 7], block_size=4)
    cache = case.kv_cache.clone()
    write_kv(case.key, case.value, cache, case.slot_mapping)
    slots, before = cache.flatten(1, 2), case.kv_cache.flatten(1, 2)
    for t, slot in enumerate(case.slot_mapping.tolist()):
        assert torch.equal(slots[0, slot], case.key[t])
        assert torch.equal(slots[1, slot], case.value[t])
    others = [s for s in range(slots.shape[1]) if s not in case.slot_mapping.tolist()]
    torch.testing.assert_close(slots[:, others], before[:, others], equal_nan=True, rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data(), name=st.sampled_from(BACKENDS), window=st.sampled_from([None, 1, 9, 100]))
def test_chunks_and_placement_do_not_matter(data: st.DataObject, name: str, window: int | None) -> None:
    """A prompt computed in chunks, its blocks anywhere, gives what it gives in one piece."""
    length = data.draw(st.integers(1, 200), "length")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4), "cuts") | {length})
    generator = torch.Generator().manual_seed(length)
    q = torch.randn(length, 4, 16, generator=generator)
    k, v = torch.randn(2, length, 2, 16, generator=generator)
    backend = make_backend(name, "cpu", torch.float32, 64)

    def compute(begin: int, end: int, block_size: int, seed: int) -> torch.Tensor:
        contents = [(q[begin:end], k[:end], v[:end])]
        case = make_case(
            [end - begin], [end], heads=(4, 2), head_dim=16, block_size=block_size, window=window, seed=seed, contents=contents
        )
        return case.run(backend)

    whole = compute(0, length, 16, 0)
    chunks = []
    for begin, end in zip([0, *cuts], cuts, strict=False):
        block_size, seed = data.draw(st.sampled_from([1, 3, 16, 64])), data.draw(st.integers(0, 9))
        chunks.append(compute(begin, end, block_size, seed))
    torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=2e-6)


@settings(max_examples=50, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 500)), min_size=1, max_size=40),
    window=st.sampled_from([None, 1, 64, 200]),
    max_work=st.sampled_from([1, 5000, 1 << 20]),
)
def test_groups_hold_every_query_once(lens: list[tuple[int, int]], window: int | None, max_work: int) -> None:
    query_lens, earlier = torch.tensor(lens).T.numpy()
    starts = torch.tensor([0, *query_lens]).cumsum(0).numpy()
    pieces = cut_into_pieces(starts, query_lens + earlier, window)
    groups = group_pieces(pieces, max_work)
    assert sorted(i for group in groups for i in group) == list(range(pieces.shape[1]))
    _, tokens, counts, left, right = pieces
    assert sorted(t + i for t, n in zip(tokens, counts, strict=True) for i in range(n)) == list(range(starts[-1]))
    assert counts.max() <= PIECE
    assert (left >= 0).all()
    assert (right - left >= counts).all()
    if window is not None:
        assert (right - left < window + counts).all()


@pytest.mark.parametrize(
    ("dtype", "head_dim", "problem"),
    [(torch.float16, 64, "no code for float16"), (torch.float32, 72, "head size must be a multiple of 16, the model's is 72")],
)
def test_the_cpu_backend_says_what_it_cannot_do(dtype: torch.dtype, head_dim: int, problem: str) -> None:
    with pytest.raises(ValueError, match=f"--attention-backend cpu: .*{problem}"):
        make_backend("cpu", "cpu", dtype, head_dim)
    assert type(make_backend("auto", "cpu", dtype, head_dim)).__name__ == "TorchBackend"


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="must be auto, naive or one of torch, cpu, triton, cuda; got 'fast'"):
        make_backend("fast", "cpu", torch.float32, 64)
