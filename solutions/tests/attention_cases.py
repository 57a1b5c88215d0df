"""Random batches for paged attention and what it must answer; every backend and kernel is tested on the same ones.

A case is hostile on purpose: blocks lie in shuffled order, all memory that must not be read holds NaN, and the entries of the
block tables that must not be read are out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from solutions.attention.paged_attention import AttentionBackend, AttentionMetadata

HEADS = ((4, 4), (8, 2), (9, 3), (32, 8))
HEAD_DIMS = (64, 80, 96, 128)
BLOCK_SIZES = (1, 8, 16, 32, 128)
WINDOWS = (None, 256, 7)
GARBAGE = (-1, 2**30, -(2**30))


@dataclass(slots=True)
class AttentionCase:
    """One step's batch: [T, H, D] queries, [T, H_kv, D] new keys and values, a cache that holds the earlier context.

    `keys[i]` and `values[i]`, [context_lens[i], H_kv, D], are the whole context of sequence i in order, new tokens included.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    slot_mapping: Tensor
    block_tables: Tensor
    query_lens: list[int]
    context_lens: list[int]
    keys: list[Tensor]
    values: list[Tensor]
    window: int | None
    scale: float
    soft_cap: float | None = None

    def metadata(self, backend: AttentionBackend) -> AttentionMetadata:
        """The step as a model would see it, not planned yet, on a copy of the cache."""
        device = self.query.device
        return AttentionMetadata(
            kv_caches=[self.kv_cache.clone()],
            slot_mapping=self.slot_mapping,
            block_tables=self.block_tables,
            query_start_loc=torch.tensor([0, *self.query_lens]).cumsum(0).to(device=device, dtype=torch.int32),
            context_lens=torch.tensor(self.context_lens, dtype=torch.int32, device=device),
            max_query_len=max(self.query_lens),
            max_context_len=max(self.context_lens),
            backend=backend,
        )

    def run(self, backend: AttentionBackend) -> Tensor:
        """What `backend` computes, [T, H, D]."""
        metadata = self.metadata(backend)
        metadata.plan = backend.plan(metadata, self.window)
        return backend.attend(0, self.query, self.key, self.value, metadata, self.scale, self.window, self.soft_cap)

    def expected(self) -> Tensor:
        """The answer in float64, from the contiguous keys and values: [T, H, D]."""
        outputs = []
        for q, k, v in zip(self.query.split(self.query_lens), self.keys, self.values, strict=True):
            group = q.shape[1] // k.shape[1]
            k, v = (x.double().repeat_interleave(group, dim=1).transpose(0, 1) for x in (k, v))  # [H, L, D]
            offset = k.shape[1] - len(q)
            visible = torch.ones(len(q), k.shape[1], dtype=torch.bool, device=q.device).tril(offset)
            if self.window is not None:
                visible &= visible.triu(offset - self.window + 1)
            q = q.double().transpose(0, 1)
            if self.soft_cap is None:
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=self.scale)
            else:
                scores = self.soft_cap * torch.tanh(q @ k.transpose(1, 2) * self.scale / self.soft_cap)
                out = scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v
            outputs.append(out.transpose(0, 1))
        return torch.cat(outputs)


def make_case(
    query_lens: list[int], context_lens: list[int], *, heads: tuple[int, int] = (4, 2), head_dim: int = 64,
    block_size: int = 16, window: int | None = None, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0,
    readers: dict[int, int] | None = None, contents: list[tuple[Tensor, Tensor, Tensor]] | None = None,
) -> AttentionCase:  # fmt: skip
    """A random case.

    Args:
        query_lens, context_lens: tokens of each sequence in this step, and in all.
        heads: (query heads, KV heads).
        readers: {j: i}: sequence j shares the full blocks of its earlier context with sequence i, which may be writing
            them in this very step. i must come before j.
        contents: for each sequence the queries [q, H, D] and the whole context's keys and values; random if None.
    """
    rng = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    tables: list[list[int]] = []
    sequences: list[tuple[Tensor, Tensor, Tensor]] = []
    num_blocks = sum(-(-n // block_size) for n in context_lens) + 3
    free = torch.randperm(num_blocks, generator=rng).tolist()
    for i, (q_len, length) in enumerate(zip(query_lens, context_lens, strict=True)):
        assert 1 <= q_len <= length
        if contents is None:
            q = torch.randn(q_len, num_heads, head_dim, generator=rng)
            k, v = torch.randn(2, length, kv_heads, head_dim, generator=rng)
        else:
            q, k, v = (x.clone() for x in contents[i])
        table = []
        if readers and i in readers:
            donor = readers[i]
            shared = min(length - q_len, context_lens[donor]) // block_size
            table = tables[donor][:shared]
            k[: shared * block_size] = sequences[donor][1][: shared * block_size]
            v[: shared * block_size] = sequences[donor][2][: shared * block_size]
        table = table + [free.pop() for _ in range(-(-length // block_size) - len(table))]
        tables.append(table)
        sequences.append((q, k, v))

    kv_cache = torch.full((2, num_blocks, block_size, kv_heads, head_dim), float("nan"))
    new_slots, first_visible = [], []
    for q_len, length, table, (_, k, v) in zip(query_lens, context_lens, tables, sequences, strict=True):
        positions = torch.arange(length)
        blocks, offsets = torch.tensor(table)[positions // block_size], positions % block_size
        earlier = length - q_len
        left = 0 if window is None else max(0, earlier - window + 1)
        kv_cache[0, blocks[left:earlier], offsets[left:earlier]] = k[left:earlier]
        kv_cache[1, blocks[left:earlier], offsets[left:earlier]] = v[left:earlier]
        new_slots.append((blocks * block_size + offsets)[earlier:])
        first_visible.append(left)
    slot_mapping = torch.cat(new_slots)
    kv_cache.flatten(1, 2)[:, slot_mapping] = float("nan")  # these are for the backend to write

    width = max(map(len, tables)) + 2
    block_tables = torch.tensor(GARBAGE).repeat(len(tables), width)[:, :width].int()
    for row, table, left in zip(block_tables, tables, first_visible, strict=True):
        kept = slice(left // block_size, len(table))
        row[kept] = torch.tensor(table[kept])

    def place(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype)

    return AttentionCase(
        query=place(torch.cat([q for q, _, _ in sequences])),
        key=place(torch.cat([k[-q_len:] for q_len, (_, k, _) in zip(query_lens, sequences, strict=True)])),
        value=place(torch.cat([v[-q_len:] for q_len, (_, _, v) in zip(query_lens, sequences, strict=True)])),
        kv_cache=place(kv_cache),
        slot_mapping=slot_mapping.to(device),
        block_tables=block_tables.to(device),
        query_lens=list(query_lens),
        context_lens=list(context_lens),
        keys=[place(k) for _, k, _ in sequences],
        values=[place(v) for _, _, v in sequences],
        window=window,
        scale=head_dim**-0.5,
    )


def mixed_lens(block_size: int) -> tuple[list[int], list[int]]:
    """Query and context lengths of a batch of decodes and chunks, with contexts at and beside multiples of the block size."""
    near = [k * block_size + d for k in (1, 2, 5) for d in (-1, 0, 1) if k * block_size + d > 0]
    decodes = [(1, n) for n in [1, 2, *near]]
    chunks = [(q, q + n) for q, n in zip((2, 3, 17, 40, 64, 65), (0, *near), strict=False)]
    long = [(130, 130), (300, 301), (1, 1000), (33, 950)]
    query_lens, context_lens = zip(*[*decodes, *long, *chunks], strict=True)
    return list(query_lens), list(context_lens)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest error of any token's head, relative to the length of that head's vector. Not a number if anything is."""
    difference = (got.double() - expected).norm(dim=-1)
    return (difference / expected.norm(dim=-1)).max().item()


def quantize_int8(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Each vector of [..., D] as int8 multiples of about its largest magnitude / 127, which float16 must hold. Vectors of NaN
    become 77s of scale NaN."""
    scales = (cache.float().abs().amax(dim=-1) * (1.001 / 127)).half()
    return (cache.float() / scales.float()[..., None]).round().nan_to_num(77).to(torch.int8), scales


def contexts(vectors: Tensor, case: AttentionCase) -> list[Tensor]:
    """What [num_blocks, block_size, H_kv, D] holds of each sequence, [context_len, H_kv, D]."""
    size = vectors.shape[1]
    return [
        torch.stack([vectors[table[p // size], p % size] for p in range(length)])
        for table, length in zip(case.block_tables.tolist(), case.context_lens, strict=True)
    ]
