"""Each CPU kernel beside the machine's limits, PyTorch's operators and the portable path.

A kernel's floor is the longer of two times: its bytes over the bandwidth with which this machine reads memory, and its
operations over the best rate at which it multiplies matrices. Both are measured here, in the same run; the share says how near
a kernel comes. Weights and caches are rotated through copies larger than any cache of the processor, as a model's layers are,
and the kernels here run as in a model, from a recording; PyTorch's are called from Python, which costs them a few microseconds
each.

  linear     the matrix products of SmolLM2-135M, packed; beside PyTorch's on plain weights of the same type (int8, int4: bf16)
  attention  one layer over shuffled blocks of 16; beside the batched PyTorch path, and PyTorch's own on contiguous K and V
  rms_norm   between two products
  experts    router and experts of a layer of OLMoE-1B-7B's shape (64 experts, 8 for a token); the floor counts the weights of
             those that the tokens chose
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention.backends import make_backend
from ..attention.paged_attention import AttentionBackend, AttentionMetadata
from ..core.platform import native
from ..core.platform.huge_pages import zeros_in_huge_pages
from ..core.platform.machine import pick_threads
from ..models.config.experts import Mixture
from ..models.config.model_config import ModelConfig
from ..models.kernels.attach import Plan, attach, packed_of
from ..models.kernels.layers_cpu import NativeNorm
from ..models.sparse import SparseMLP
from ..parallelism.tensor_parallel import SINGLE
from ..quantization.kernels.linear_cpu import PackedLinear
from .report import Parser, finish, show_table, tracked
from .timing import median_seconds

MATRICES = {"qkv": (576, 960), "o": (576, 576), "gate_up": (576, 3072), "down": (1536, 576), "head": (576, 49152)}
"""The matrix products of SmolLM2-135M: name → (in, out) features."""
ROWS = (1, 8, 32, 128, 512)
HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
OLMOE = ModelConfig(
    "MixtralForCausalLM", vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_layers=1, num_heads=16,
    num_kv_heads=16, head_dim=128, max_position_embeddings=4096, norm_eps=1e-5, hidden_act="silu",
    mixture=Mixture(count=64, chosen=8, size=1024, renormalise=False),
)  # fmt: skip
"""Of OLMoE-1B-7B's layers, which have 1.3 billion active weights out of 6.9, one."""
CPU = torch.device("cpu")
CACHE_BYTES = 96 << 20
"""Copies of a small matrix together are at least this large, so that none is read from a cache."""


@dataclass(slots=True)
class Ceilings:
    """What the machine can do: bytes a second read from memory, and operations a second in each precision."""

    read_bytes: float
    operations: dict[str, float]

    def floor(self, precision: str, num_bytes: int, operations: int) -> float:
        """Seconds that the machine needs at least."""
        rate = self.operations["bfloat16" if precision == "int4" else precision]
        return max(num_bytes / self.read_bytes, operations / rate)


@dataclass(slots=True)
class Timing:
    """One kernel at one size; seconds are medians. The machine cannot do it in less than `floor` seconds; `peers` are seconds
    of others doing the same, by name."""

    kernel: str
    size: str
    precision: str
    seconds: float
    bytes: int
    operations: int
    floor: float
    peers: dict[str, float]

    @property
    def share(self) -> float:
        """Of what the machine allows."""
        return self.floor / self.seconds


def seconds_a_call(call: Callable[[int], object], calls: int, repeats: int) -> float:
    """Median over `repeats` of the mean time of `calls` calls; each call gets its number."""
    return median_seconds(lambda: [call(number) for number in range(calls)], repeats, warm_up=1) / calls


def replayed_seconds(call: Callable[[int], object], rows: int, calls: int, repeats: int) -> float:
    """The same for kernels of this package, without Python between them: `calls` calls are recorded and replayed."""
    with native.Recording(rows) as recording:
        for number in range(calls):
            call(number)
    return median_seconds(lambda: recording.replay(rows), repeats, warm_up=1) / calls


def read_bandwidth(repeats: int) -> float:
    """Bytes a second that PyTorch's threads read from memory."""
    data = zeros_in_huge_pages((64 << 20,), torch.float32).fill_(1.0)
    return data.nbytes / min(median_seconds(read, repeats, warm_up=1) for read in (data.sum, data.amax))


def measure_ceilings(repeats: int) -> Ceilings:
    """Read bandwidth over 256 MiB, and the best rate of large matrix products that PyTorch or the kernels here reach; both use
    all cores that this process may use, from now on."""
    torch.set_num_threads(pick_threads())
    native.set_threads(torch.get_num_threads())
    operations = dict.fromkeys(("float32", "bfloat16", "int8"), 0.0)
    for precision in operations:
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        for m, n, k in ((1024, 1024, 1024), (64, 4096, 512)):  # PyTorch likes one; the other's rows stay in the fastest cache
            a, b = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            runs = [partial(PackedLinear(b, None, "int8" if precision == "int8" else None), a)]
            runs += [] if precision == "int8" else [partial(F.linear, a, b)]
            seconds = min(seconds_a_call(lambda _, run=run: run(), 10, repeats) for run in runs)
            operations[precision] = max(operations[precision], 2 * m * n * k / seconds)
    return Ceilings(read_bandwidth(repeats), operations)


def measure_linear(ceilings: Ceilings, name: str, rows: int, precision: str, repeats: int) -> Timing:
    """One matrix product of the model: packed, beside PyTorch's on plain weights."""
    k, n = MATRICES[name]
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    weight = torch.randn(n, k).mul_(0.05).to(dtype)
    quantization = precision if precision in ("int8", "int4") else None
    packed = PackedLinear(weight, None, quantization)
    copies = -(-CACHE_BYTES // packed.weight.nbytes)
    runs = [PackedLinear(weight, None, quantization) for _ in range(copies)]
    x = torch.randn(rows, k).to(dtype)
    seconds = replayed_seconds(lambda i: runs[i](x), rows, copies, repeats)
    plain = [weight.clone() for _ in range(copies)]
    peers = {"torch": seconds_a_call(lambda i: F.linear(x, plain[i]), copies, repeats)}
    num_bytes, operations = packed.weight.nbytes + x.nbytes + rows * n * x.itemsize, 2 * rows * n * k
    floor = ceilings.floor(precision, num_bytes, operations)
    return Timing(f"linear {name}", f"{rows} rows", precision, seconds, num_bytes, operations, floor, peers)


def measure_norm(ceilings: Ceilings, rows: int, repeats: int) -> Timing:
    """RMSNorm in bfloat16."""
    x, weight = torch.randn(rows, 576).bfloat16(), torch.ones(576).bfloat16()
    norm = NativeNorm(weight, 1e-5)
    seconds = replayed_seconds(lambda _: norm(x), rows, 200, repeats)
    peers = {"torch": seconds_a_call(lambda _: F.rms_norm(x, (576,), weight, 1e-5), 200, repeats)}
    floor = ceilings.floor("bfloat16", 2 * x.nbytes, 4 * x.numel())
    return Timing("rms_norm", f"{rows} rows", "bfloat16", seconds, 2 * x.nbytes, 4 * x.numel(), floor, peers)


def paged_step(
    query_lens: list[int], context_lens: list[int], dtype: torch.dtype, layers: int, heads: tuple[int, int] = (HEADS, KV_HEADS),
    head_dim: int = HEAD_DIM, block_size: int = BLOCK_SIZE, device: torch.device = CPU,
) -> tuple[AttentionMetadata, list[Tensor]]:  # fmt: skip
    """A step over shuffled blocks, and its queries [T, H, D], keys and values [T, H_kv, D]; `heads` are (H, H_kv)."""
    needed = [-(-length // block_size) for length in context_lens]
    order = torch.randperm(sum(needed), dtype=torch.int32)
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    for row, blocks in zip(tables, order.split(needed), strict=True):
        row[: len(blocks)] = blocks
    slots = [
        int(table[p // block_size]) * block_size + p % block_size
        for table, q, c in zip(tables, query_lens, context_lens, strict=True)
        for p in range(c - q, c)
    ]
    shape = (2, sum(needed), block_size, heads[1], head_dim)
    empty = zeros_in_huge_pages if device.type == "cpu" else partial(torch.empty, device=device)
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    metadata = AttentionMetadata(
        torch.tensor(slots).to(device), tables.to(device), starts.to(device), torch.tensor(context_lens).int().to(device),
        [empty(shape, dtype=dtype).normal_() for _ in range(layers)], max(query_lens), max(context_lens),
        make_backend("auto", device, dtype, head_dim, block_size),
    )  # fmt: skip
    rows = torch.randn(sum(query_lens), heads[0] + 2 * heads[1], head_dim).to(device, dtype)
    return metadata, rows.split([heads[0], heads[1], heads[1]], dim=1)


def measure_attention(
    ceilings: Ceilings, label: str, query_lens: list[int], context_lens: list[int], precision: str, repeats: int
) -> Timing:
    """One layer's attention: in C++, in batched PyTorch, and by PyTorch's own operator over contiguous K and V."""
    dtype = getattr(torch, precision)
    kv_row = 2 * KV_HEADS * HEAD_DIM * dtype.itemsize
    layers = max(1, min(30, CACHE_BYTES // (sum(context_lens) * kv_row)))
    metadata, (query, key, value) = paged_step(query_lens, context_lens, dtype, layers)

    def attend(backend: AttentionBackend) -> Callable[[int], Tensor]:
        metadata.plan = backend.plan(metadata, None)
        return lambda layer: backend.attend(layer, query, key, value, metadata, HEAD_DIM**-0.5)

    seconds = replayed_seconds(attend(make_backend("cpu", "cpu", dtype, HEAD_DIM)), len(query), layers, repeats)
    peers = {"portable": seconds_a_call(attend(make_backend("torch", "cpu", dtype, HEAD_DIM)), layers, repeats)}
    if len(set(query_lens)) == len(set(context_lens)) == 1:  # PyTorch's operator knows only equal lengths
        q = query.view(len(query_lens), -1, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = torch.randn(2, layers, len(context_lens), KV_HEADS, context_lens[0], HEAD_DIM).to(dtype)
        causal = query_lens[0] > 1 and query_lens[0] == context_lens[0]
        if causal or query_lens[0] == 1:
            attend_all = partial(F.scaled_dot_product_attention, q, is_causal=causal, enable_gqa=True)
            peers["SDPA, contiguous"] = seconds_a_call(lambda i: attend_all(k[i], v[i]), layers, repeats)
    pairs = sum(q * (c - q) + q * (q + 1) // 2 for q, c in zip(query_lens, context_lens, strict=True))
    num_bytes = sum(context_lens) * kv_row + 2 * query.numel() * dtype.itemsize
    size, operations = f"{len(query_lens)} × {context_lens[0]}", 4 * pairs * HEADS * HEAD_DIM
    floor = ceilings.floor(precision, num_bytes, operations)
    return Timing(f"attention, {label}", size, precision, seconds, num_bytes, operations, floor, peers)


@functools.lru_cache(maxsize=1)
def packed_experts(precision: str) -> SparseMLP:
    """Router and experts with random weights, for the kernels."""
    torch.set_default_dtype(torch.bfloat16)
    layer = SparseMLP(OLMOE, SINGLE)
    torch.set_default_dtype(torch.float32)
    for param in layer.parameters():
        param.uniform_(-0.05, 0.05)
    attach(layer, Plan("cpu", None if precision == "bfloat16" else precision))
    return layer


def measure_experts(ceilings: Ceilings, rows: int, precision: str, repeats: int) -> Timing:
    """Router and experts, on other tokens in each call."""
    layer, inputs = packed_experts(precision), [torch.randn(rows, OLMOE.hidden_size).bfloat16() for _ in range(8)]
    load, read = layer.experts.load, 0
    for x in inputs:
        load.zero_()
        layer(x, None)
        read += int((load > 0).sum())
    products = [packed for packed in map(packed_of, layer.experts.get_submodule("0").modules()) if packed is not None]
    expert = sum(product.weight.nbytes for product in products)
    seconds = replayed_seconds(lambda i: layer(inputs[i], None), rows, len(inputs), repeats)
    num_bytes = read * expert // len(inputs) + layer.gate.weight.nbytes + 2 * inputs[0].nbytes
    operations = 2 * rows * 8 * 3 * OLMOE.hidden_size * OLMOE.intermediate_size
    floor = ceilings.floor(precision, num_bytes, operations)
    size = f"{rows} tokens, {read / len(inputs):.0f} read"
    return Timing("experts", size, precision, seconds, num_bytes, operations, floor, {})


def all_kernels(ceilings: Ceilings, repeats: int) -> list[Callable[[], Timing]]:
    """Every measurement of the table, to be run one by one."""
    linear = partial(measure_linear, ceilings, repeats=repeats)
    attention = partial(measure_attention, ceilings, repeats=repeats)
    todo: list[Callable[[], Timing]] = []
    for precision in ("bfloat16", "int8", "int4", "float32"):
        for name in MATRICES:
            todo += [partial(linear, name, rows, precision) for rows in (ROWS[:3] if name == "head" else ROWS)]
    for precision in ("bfloat16", "float32"):
        for batch, context in ((1, 256), (1, 4000), (32, 256), (32, 1024)):
            todo.append(partial(attention, "decode", [1] * batch, [context] * batch, precision))
        todo += [partial(attention, "prompt", [length], [length], precision) for length in (128, 512, 2048)]
        todo.append(partial(attention, "chunk of 128", [128], [2048], precision))
    for precision in ("bfloat16", "int8", "int4"):
        todo += [partial(measure_experts, ceilings, rows, precision, repeats) for rows in (1, 32, 512)]
    return [*todo, *(partial(measure_norm, ceilings, rows, repeats) for rows in (1, 32, 512))]


def show(ceilings: Ceilings, timings: list[Timing]) -> None:
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in ceilings.operations.items())
    rows = []
    for t in timings:
        peers = ", ".join(f"{name} {seconds / t.seconds:.1f}x" for name, seconds in t.peers.items())
        rate = f"{t.bytes / t.seconds / 1e9:.1f}", f"{t.operations / t.seconds / 1e9:.0f}"
        rows.append([f"{t.kernel}, {t.size}", t.precision, f"{t.seconds * 1e6:.1f}", *rate, f"{t.share:.0%}", peers])
    columns = ["kernel", "type", "µs", "GB/s", "GFLOP/s", "of the floor", "how many times as long others take"]
    title = f"Reads {ceilings.read_bytes / 1e9:.0f} GB/s; matrix products, GFLOP/s: {rates}; {torch.get_num_threads()} threads"
    show_table(title, columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = Parser("kernels", __doc__)
    parser.add_flag("--repeats", 15, "measurements of each kernel; the median counts")
    args = parser.parse_args(argv)
    if native.load() is None:
        sys.exit(f"error: there are no C++ kernels here: {native.why_not}")
    torch.manual_seed(0)
    with torch.inference_mode():
        ceilings = measure_ceilings(args.repeats)
        timings = [measure() for measure in tracked(all_kernels(ceilings, args.repeats), "measuring")]
    show(ceilings, timings)
    results = {"ceilings": asdict(ceilings), "kernels": [asdict(t) | {"share": t.share} for t in timings]}
    finish(args, "kernels", results)


if __name__ == "__main__":
    main()
